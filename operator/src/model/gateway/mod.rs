//! Routes of the Gateway API whose parents are Services (GAMMA): routes in by `apply_route` and `delete_route`, out the
//! merged rules of a Service's port and what the status of each route says. Like the rest of the model: no client, no
//! clock, no I/O.
//!
//! ```text
//!   object     routes as they are kept
//!   check      their rules, checked once when a route is applied
//!   matching   … the matches
//!   filter     … the filters
//!   attach     which routes hold at a port of a Service, for clients of which namespace
//!   backend    Services that rules lead to
//!   compile    the rules of a port, merged, as sidecars are sent them
//!   reach      from which addresses a route leads somewhere
//!   listed     routes by the Services that they are attached to, for people to read
//!   status     what the status of a route says
//! ```
//!
//! A route of the Service's own namespace (a producer's) concerns all clients. One of another namespace (a consumer's)
//! concerns the clients of its own namespace only, and for these the routes of their namespace replace those of the
//! producer. Traffic is matched by the Service's address and port, never by a `Host` header, and the routes of a backend
//! are not applied again (GEP-1294, GEP-1324).

mod attach;
mod backend;
mod check;
mod compile;
mod filter;
mod listed;
mod matching;
mod object;
mod reach;
mod status;

pub use attach::Standings;
pub use compile::RouteClient;
pub use listed::{AttachedBackend, AttachedRoute, AttachedRule};
pub use object::{
    BackendRef, CookieSpec, CorsSpec, FilterSpec, FractionSpec, HeaderSpec, HeadersSpec, MatchSpec,
    MatchType, MethodSpec, MirrorSpec, ParentRef, PathModifierSpec, PathSpec, RedirectSpec, RetrySpec,
    RewriteSpec, RouteKey, RouteKind, RouteObject, RouteSpec, RuleSpec, SessionSpec, TimeoutsSpec, ValueSpec,
};
pub use status::{FlawedRule, ParentStatus, RouteCondition};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::sync::Arc;

use super::{Key, Model};
use check::CheckedRule;

/// All routes, and who names which Service.
#[derive(Debug, Default)]
pub(super) struct Gateway {
    routes: BTreeMap<RouteKey, Held>,
    /// Routes by the Services that they name as parents, whether or not these exist.
    by_parent: HashMap<Key, BTreeSet<RouteKey>>,
    /// Routes by the Services that they lead to, whether or not these exist.
    by_backend: HashMap<Key, BTreeSet<RouteKey>>,
}

/// A route, with its rules checked.
#[derive(Debug)]
pub(super) struct Held {
    object: RouteObject,
    rules: Vec<CheckedRule>,
    /// About how many bytes its rules are for a sidecar.
    bytes: usize,
}

impl Held {
    fn new(object: RouteObject) -> Self {
        let rules = check::rules(&object);
        let bytes = rules.iter().map(compile::estimate).sum();
        Self { object, rules, bytes }
    }

    /// Whether at least one rule is in force as it is written, or there is none that is not.
    fn is_accepted(&self) -> bool {
        self.rules.is_empty() || self.rules.iter().any(|rule| rule.flaw.is_none())
    }

    /// Whether it decides about any request. A route that is not accepted may: what would have passed an unsupported
    /// filter is answered with an error.
    fn is_in_force(&self) -> bool {
        self.rules.is_empty() || self.rules.iter().any(|rule| !rule.matches.is_empty())
    }

    /// The Services that it names as parents.
    fn parents(&self) -> BTreeSet<Key> {
        self.object.parents.iter().filter_map(|parent| attach::service_of(&self.object, parent)).collect()
    }

    /// The Services that it leads to.
    fn backends(&self) -> BTreeSet<Key> {
        let references = check::references(&self.object);
        references.filter_map(|to| backend::service_of(&self.object.namespace, to)).collect()
    }
}

impl Model {
    /// Takes a route over.
    pub fn apply_route(&mut self, mut route: RouteObject) {
        if !route.parents.iter().any(attach::is_service) {
            // A gateway's, of which there may be thousands: nothing of it is used here.
            (route.rules, route.hostnames) = (Vec::new(), Vec::new());
        }
        let key = route.key();
        if self.gateway.routes.get(&key).is_some_and(|known| known.object == route) {
            // Only its status.
            return;
        }
        self.take_route_out(&key);
        let held = Held::new(route);
        for parent in held.parents() {
            self.gateway.by_parent.entry(parent).or_default().insert(key.clone());
        }
        for backend in held.backends() {
            self.gateway.by_backend.entry(backend).or_default().insert(key.clone());
        }
        self.gateway.routes.insert(key.clone(), held);
        self.touch_route(&key);
    }

    /// Forgets a route.
    pub fn delete_route(&mut self, key: &RouteKey) {
        self.take_route_out(key);
    }

    fn take_route_out(&mut self, key: &RouteKey) {
        self.touch_route(key);
        let Some(old) = self.gateway.routes.remove(key) else { return };
        for parent in old.parents() {
            remove_from(&mut self.gateway.by_parent, &parent, key);
        }
        for backend in old.backends() {
            remove_from(&mut self.gateway.by_backend, &backend, key);
        }
    }

    /// All routes, in order.
    pub fn routes(&self) -> impl Iterator<Item = &RouteObject> {
        self.gateway.routes.values().map(|held| &held.object)
    }

    /// Whether some route leads to a Service.
    pub(super) fn is_led_to(&self, service: &Key) -> bool {
        self.gateway.by_backend.contains_key(service)
    }

    /// A route.
    pub fn route_object(&self, key: &RouteKey) -> Option<&RouteObject> {
        self.gateway.routes.get(key).map(|held| &held.object)
    }

    /// A route as it is now: the addresses of its parents, and the routes that share a parent with it, which it may
    /// conflict with.
    fn touch_route(&mut self, key: &RouteKey) {
        let Some(held) = self.gateway.routes.get(key) else { return };
        self.touched.routes.insert(key.clone());
        for parent in held.parents() {
            self.touched.routes.extend(self.gateway.by_parent.get(&parent).into_iter().flatten().cloned());
            self.touch_frontend_for(&parent, &key.namespace);
        }
    }

    /// A Service has come, gone or changed: what its routes say, and where those lead that name it as a backend.
    pub(super) fn touch_routes_naming(&mut self, service: &Key) {
        let gateway = &self.gateway;
        let naming = [&gateway.by_parent, &gateway.by_backend].into_iter().filter_map(|by| by.get(service));
        self.touched.routes.extend(naming.flatten().cloned());
        self.touch_routes_of(service);
    }

    /// The addresses of a Service, and of the Services with routes that name it as a backend: what sidecars are sent for
    /// them carries the sections of MeshPolicies for it.
    pub(super) fn touch_routes_of(&mut self, service: &Key) {
        self.touch_frontend(service);
        for (parent, from) in self.gateway.parents_leading_to(service) {
            self.touch_frontend_for(&parent, &from);
        }
    }

    /// The addresses of a Service for the clients that routes of the namespace `from` concern: all of them where it is
    /// the Service's own, and else those in it. Of a popular Service every sidecar dials the addresses: the routes of one
    /// tenant must not wake those of all others.
    fn touch_frontend_for(&mut self, service: &Key, from: &Arc<str>) {
        if service.0 == *from {
            self.touch_frontend(service);
        } else if let Some(service) = self.services.get(service) {
            self.touched.consumers.extend(service.ips().map(|ip| (ip, Arc::clone(from))));
        }
    }

    /// The addresses of a Service, without its destinations and endpoints, which carry nothing of routes.
    fn touch_frontend(&mut self, service: &Key) {
        if let Some(service) = self.services.get(service) {
            self.touched.addresses.extend(service.ips());
        }
    }
}

/// Removes one entry of an index, and the index's key with the last one.
fn remove_from<K: Hash + Eq, V: Ord>(index: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}
