//! The addresses that are subscribed, and the endpoints that their routes name: those of the Service itself and of all
//! that its rules lead to. Several addresses share endpoints, which are released with the last route that names them.
//!
//! In: addresses that are dialled, resources that arrive. Out: what to subscribe to and what not any more
//! ([`Table::wishes`]). Bounded by what an operator keeps current for one sidecar: beyond, what has not been used for
//! the longest time is forgotten.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::endpoints::Endpoints;
use super::entry::{Destination, EndpointsEntry, Entry, Service};
use super::resource::{Route, ServiceRoute};

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
    /// What is known of it is what could be used of a route that was refused.
    makeshift: bool,
    /// All endpoints of the route in force.
    endpoints: Vec<Arc<str>>,
    /// A route some of whose endpoints are not known yet.
    waiting: Option<Waiting>,
}

/// A route some of whose endpoints are not known yet.
#[derive(Debug)]
struct Waiting {
    route: ServiceRoute,
    /// All its endpoints.
    endpoints: Vec<Arc<str>>,
    ticket: Ticket,
}

/// Tells the waits of an address apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

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
    /// Routes that have come.
    routes: u64,
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
        let new = Address {
            entry: Arc::clone(&entry),
            answered: false,
            makeshift: false,
            endpoints: Vec::new(),
            waiting: None,
        };
        self.addresses.insert(address, new);
        self.wishes.push(Wanted::Subscribe(Name::Route(address)));
        entry
    }

    /// Takes over where an address leads, once all its endpoints are known; until then the result is to be given to
    /// [`Self::wait_no_longer`] later. Of an address that is not subscribed nothing is kept.
    pub(super) fn set_route(&mut self, address: SocketAddr, route: Route) -> Option<Ticket> {
        let found = self.addresses.get_mut(&address)?;
        found.answered = true;
        found.makeshift = false;
        let before = found.waiting.take().map_or_else(Vec::new, |waiting| waiting.endpoints);
        let in_force = found.endpoints.clone();
        let endpoints = match &route {
            Route::Service(service) => service.all_endpoints(),
            Route::Unknown | Route::Pod(_) => Vec::new(),
        };
        for name in &endpoints {
            self.join(name, address);
        }
        for name in before.iter().filter(|name| !endpoints.contains(name) && !in_force.contains(name)) {
            self.leave(name, address);
        }
        match route {
            Route::Unknown => self.activate(address, Destination::Unknown, endpoints),
            Route::Pod(pod) => self.activate(address, Destination::Pod(pod), endpoints),
            Route::Service(route) => {
                self.routes += 1;
                let ticket = Ticket(self.routes);
                return self.wait_or_activate(address, Waiting { route, endpoints, ticket });
            }
        }
        None
    }

    /// An address leads to something that this sidecar refused. The last good route stays, and so must its endpoints:
    /// the operator has ended its own subscription to them with the route that it sent. Without a good one, what could
    /// be used of this is taken over; see [`Self::set_route`] for the result.
    pub(super) fn refuse_route(&mut self, address: SocketAddr, usable: Option<Route>) -> Option<Ticket> {
        let found = self.addresses.get(&address)?;
        let good = !found.makeshift && (found.entry.peek().is_some() || found.waiting.is_some());
        if let (false, Some(usable)) = (good, usable) {
            let ticket = self.set_route(address, usable);
            let found = self.addresses.get_mut(&address)?;
            (found.answered, found.makeshift) = (false, true);
            return ticket;
        }
        found.entry.refuse();
        let waiting = found.waiting.iter().flat_map(|waiting| &waiting.endpoints);
        let waiting = waiting.filter(|name| !found.endpoints.contains(name));
        let named = found.endpoints.iter().chain(waiting).cloned();
        self.wishes.extend(named.map(|name| Wanted::Subscribe(Name::Endpoints(name))));
        None
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
                .and_then(|found| found.waiting.take_if(|waiting| waiting.endpoints.contains(name)));
            if let Some(waiting) = waiting {
                self.wait_or_activate(address, waiting);
            }
        }
    }

    /// Endpoints that have still not come count as none: a Service that one of its routes cannot reach is not held up
    /// by it. Does nothing where that wait has ended.
    pub(super) fn wait_no_longer(&mut self, address: SocketAddr, ticket: Ticket) {
        let waiting = self.addresses.get(&address).and_then(|found| found.waiting.as_ref());
        let Some(waiting) = waiting.filter(|waiting| waiting.ticket == ticket) else { return };
        for name in waiting.endpoints.clone() {
            if self.endpoints.get(&name).is_some_and(|named| named.entry.is_none()) {
                tracing::warn!(%address, endpoints = &*name, "the operator has not sent endpoints that a route names");
                self.set_endpoints(&name, Endpoints::default());
            }
        }
    }

    /// What the route leads to; `None`: not all its endpoints are known.
    fn joined(&self, route: &ServiceRoute) -> Option<Service> {
        let known = |name: &Arc<str>| self.endpoints.get(name)?.entry.clone();
        let behind = route.rules.iter().flat_map(|rules| &rules.services).map(|service| {
            let endpoints = known(&service.endpoints)?;
            Some(Service { route: service.clone(), endpoints, behind: Box::default() })
        });
        let behind = behind.collect::<Option<_>>()?;
        Some(Service { endpoints: known(&route.endpoints)?, route: route.clone(), behind })
    }

    fn wait_or_activate(&mut self, address: SocketAddr, waiting: Waiting) -> Option<Ticket> {
        if let Some(service) = self.joined(&waiting.route) {
            self.activate(address, Destination::Service(service), waiting.endpoints);
            return None;
        }
        let ticket = waiting.ticket;
        self.addresses.get_mut(&address)?.waiting = Some(waiting);
        Some(ticket)
    }

    fn activate(&mut self, address: SocketAddr, destination: Destination, endpoints: Vec<Arc<str>>) {
        let Some(found) = self.addresses.get_mut(&address) else { return };
        found.entry.set(destination);
        let before = std::mem::replace(&mut found.endpoints, endpoints.clone());
        for name in before.iter().filter(|name| !endpoints.contains(name)) {
            self.leave(name, address);
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
        let waiting = found.waiting.map_or_else(Vec::new, |waiting| waiting.endpoints);
        // Whoever has left is not there to leave once more.
        for name in found.endpoints.iter().chain(&waiting) {
            self.leave(name, address);
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

    /// Endpoints by their name; `None`: they are not known.
    pub(super) fn endpoints(&self, name: &str) -> Option<Arc<EndpointsEntry>> {
        self.endpoints.get(name)?.entry.clone()
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
