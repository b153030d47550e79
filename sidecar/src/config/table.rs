//! The addresses that are subscribed, and the endpoints that their routes name. Several addresses of one Service share
//! its endpoints, which are released with the last route that names them.
//!
//! In: addresses that are dialled, resources that arrive. Out: what to subscribe to and what not any more
//! ([`Table::wishes`]). Bounded by what an operator keeps current for one sidecar: beyond, what has not been used for
//! the longest time is forgotten.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::{Destination, EndpointsEntry, Entry, Service};
use super::resource::{Endpoints, Route, ServiceRoute};

/// Addresses that are subscribed. An operator keeps twice as many resources current for one sidecar
/// (`MAX_SUBSCRIPTIONS` of its sessions): each address may lead to endpoints of its own.
pub(super) const MAX_ADDRESSES: usize = 10_000;

/// What is subscribed to beside the pod's own sections.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Name {
    /// Where an address leads.
    Route(SocketAddr),
    /// Who serves a Service's port.
    Endpoints(Arc<str>),
}

/// What the client is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Subscribe to a resource.
    Subscribe(Name),
    /// Unsubscribe from it.
    Unsubscribe(Name),
}

/// An address that somebody uses.
#[derive(Debug)]
struct Address {
    entry: Arc<Entry>,
    answered: bool,
    /// The endpoints of the route in force.
    endpoints: Option<Arc<str>>,
    /// A route whose endpoints are not known yet.
    waiting: Option<ServiceRoute>,
}

/// Endpoints under their name.
#[derive(Debug)]
struct Named {
    /// `None`: not known yet.
    entry: Option<Arc<EndpointsEntry>>,
    /// The addresses whose routes name them. None yet: the endpoints came before the first route.
    routes: HashSet<SocketAddr>,
    /// The clock when they became known here.
    since: u64,
}

/// Addresses and endpoints.
#[derive(Debug, Default)]
pub(super) struct Table {
    addresses: HashMap<SocketAddr, Address>,
    endpoints: HashMap<Arc<str>, Named>,
    /// Counts up with time and with new entries.
    clock: Arc<AtomicU64>,
    /// The clock when idle entries were last forgotten.
    horizon: u64,
    /// What to subscribe to and what not any more, in this order.
    pub(super) wishes: Vec<Wanted>,
}

impl Table {
    /// The entry of an address; it is subscribed if it is new.
    pub(super) fn entry(&mut self, address: SocketAddr) -> Arc<Entry> {
        if let Some(found) = self.addresses.get(&address) {
            found.entry.mark_used();
            return Arc::clone(&found.entry);
        }
        self.make_room();
        self.clock.fetch_add(1, Ordering::Relaxed);
        let entry = Entry::new(&self.clock);
        let new = Address { entry: Arc::clone(&entry), answered: false, endpoints: None, waiting: None };
        self.addresses.insert(address, new);
        self.wishes.push(Wanted::Subscribe(Name::Route(address)));
        entry
    }

    /// Takes over where an address leads, once its endpoints are known. Of an address that is not subscribed nothing is
    /// kept.
    pub(super) fn set_route(&mut self, address: SocketAddr, route: Route) {
        let Some(found) = self.addresses.get_mut(&address) else { return };
        found.answered = true;
        let (before, in_force) = (found.waiting.take(), found.endpoints.clone());
        if let Route::Service(service) = &route {
            self.join(&service.endpoints, address);
        }
        if let Some(before) = before {
            let still_named =
                matches!(&route, Route::Service(service) if service.endpoints == before.endpoints);
            if !still_named && in_force.as_ref() != Some(&before.endpoints) {
                self.leave(&before.endpoints, address);
            }
        }
        match route {
            Route::Unknown => self.activate(address, Destination::Unknown, None),
            Route::Pod(pod) => self.activate(address, Destination::Pod(pod), None),
            Route::Service(service) => self.wait_or_activate(address, service),
        }
    }

    /// An address leads to something that this sidecar refused. The last good route stays, and so must its endpoints:
    /// the operator has ended its own subscription to them with the route that it sent.
    pub(super) fn refuse_route(&mut self, address: SocketAddr) {
        let Some(found) = self.addresses.get(&address) else { return };
        found.entry.refuse();
        let named = [found.endpoints.as_ref(), found.waiting.as_ref().map(|route| &route.endpoints)];
        let named = named.into_iter().flatten().cloned();
        self.wishes.extend(named.map(|name| Wanted::Subscribe(Name::Endpoints(name))));
    }

    /// Takes endpoints over. They may come before the route that names them.
    pub(super) fn set_endpoints(&mut self, name: &Arc<str>, endpoints: Endpoints) {
        let Some(named) = self.endpoints.get_mut(name) else {
            if self.endpoints.len() < MAX_ADDRESSES {
                let entry = Some(EndpointsEntry::new(endpoints));
                let since = self.clock.load(Ordering::Relaxed);
                self.endpoints.insert(Arc::clone(name), Named { entry, routes: HashSet::new(), since });
            }
            return;
        };
        match &named.entry {
            Some(entry) => return entry.set(endpoints),
            None => named.entry = Some(EndpointsEntry::new(endpoints)),
        }
        let routes: Vec<SocketAddr> = named.routes.iter().copied().collect();
        for address in routes {
            let waiting = self
                .addresses
                .get_mut(&address)
                .and_then(|found| found.waiting.take_if(|service| service.endpoints == *name));
            if let Some(service) = waiting {
                self.wait_or_activate(address, service);
            }
        }
    }

    fn wait_or_activate(&mut self, address: SocketAddr, route: ServiceRoute) {
        let known = self.endpoints.get(&route.endpoints).and_then(|named| named.entry.clone());
        if let Some(endpoints) = known {
            let name = Arc::clone(&route.endpoints);
            self.activate(address, Destination::Service(Service { route, endpoints }), Some(name));
        } else if let Some(found) = self.addresses.get_mut(&address) {
            found.waiting = Some(route);
        }
    }

    fn activate(&mut self, address: SocketAddr, destination: Destination, endpoints: Option<Arc<str>>) {
        let Some(found) = self.addresses.get_mut(&address) else { return };
        found.entry.set(destination);
        let before = std::mem::replace(&mut found.endpoints, endpoints.clone());
        if let Some(before) = before.filter(|before| endpoints.as_ref() != Some(before)) {
            self.leave(&before, address);
        }
    }

    /// The route of an address names these endpoints.
    fn join(&mut self, name: &Arc<str>, address: SocketAddr) {
        let since = self.clock.load(Ordering::Relaxed);
        let new = || Named { entry: None, routes: HashSet::new(), since };
        let named = self.endpoints.entry(Arc::clone(name)).or_insert_with(new);
        if named.routes.is_empty() {
            // Also where they are here already: that the operator sent them is no promise to send what follows.
            self.wishes.push(Wanted::Subscribe(Name::Endpoints(Arc::clone(name))));
        }
        named.routes.insert(address);
    }

    /// The route of an address does not name these endpoints any more.
    fn leave(&mut self, name: &Arc<str>, address: SocketAddr) {
        let Some(named) = self.endpoints.get_mut(name) else { return };
        named.routes.remove(&address);
        if named.routes.is_empty() {
            self.endpoints.remove(name);
            self.wishes.push(Wanted::Unsubscribe(Name::Endpoints(Arc::clone(name))));
        }
    }

    fn forget(&mut self, address: SocketAddr) {
        let Some(found) = self.addresses.remove(&address) else { return };
        found.entry.forget();
        self.wishes.push(Wanted::Unsubscribe(Name::Route(address)));
        for name in [found.endpoints, found.waiting.map(|route| route.endpoints)].into_iter().flatten() {
            self.leave(&name, address);
        }
    }

    /// Forgets what has not been used for the longest time where there is no room for one more. A sixteenth goes at
    /// once, so that a client of very many addresses does not pay for a look at all of them with each.
    fn make_room(&mut self) {
        if self.addresses.len() < MAX_ADDRESSES {
            return;
        }
        let used = self.addresses.iter().map(|(address, found)| (found.entry.last_used(), *address));
        let mut all: Vec<(u64, SocketAddr)> = used.collect();
        let (oldest, _, _) = all.select_nth_unstable(MAX_ADDRESSES / 16);
        tracing::warn!(
            forgotten = oldest.len(),
            "more addresses in use than are kept current; the oldest are forgotten"
        );
        let oldest: Vec<SocketAddr> = oldest.iter().map(|(_, address)| *address).collect();
        oldest.into_iter().for_each(|address| self.forget(address));
    }

    /// Forgets what has not been used since the last call.
    pub(super) fn forget_idle(&mut self) {
        let horizon = self.horizon;
        self.horizon = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let idle = self.addresses.iter().filter(|(_, found)| found.entry.last_used() < horizon);
        let idle: Vec<SocketAddr> = idle.map(|(address, _)| *address).collect();
        idle.into_iter().for_each(|address| self.forget(address));
        self.drop_unnamed(horizon);
        self.addresses.shrink_to(self.addresses.len() * 2);
        self.endpoints.shrink_to(self.endpoints.len() * 2);
    }

    /// Drops endpoints that came before this and that no route has named.
    fn drop_unnamed(&mut self, before: u64) {
        let wishes = &mut self.wishes;
        self.endpoints.retain(|name, named| {
            let keep = !named.routes.is_empty() || named.since >= before;
            if !keep {
                wishes.push(Wanted::Unsubscribe(Name::Endpoints(Arc::clone(name))));
            }
            keep
        });
    }

    /// Whether something good is here under this name.
    pub(super) fn holds(&self, name: &Name) -> bool {
        match name {
            Name::Route(address) => self.addresses.get(address).is_some_and(|found| found.answered),
            Name::Endpoints(name) => self.endpoints.get(name).is_some_and(|named| named.entry.is_some()),
        }
    }

    /// Everything that is subscribed. Endpoints come first: the operator then knows what is held of them when a route
    /// names them.
    pub(super) fn subscribed(&self) -> Vec<Name> {
        let endpoints = self.endpoints.keys().map(|name| Name::Endpoints(Arc::clone(name)));
        endpoints.chain(self.addresses.keys().copied().map(Name::Route)).collect()
    }

    /// The entries by address.
    pub(super) fn entries(&self) -> impl Iterator<Item = (SocketAddr, &Arc<Entry>)> {
        self.addresses.iter().map(|(address, found)| (*address, &found.entry))
    }
}
