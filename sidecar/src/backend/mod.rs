//! Where requests go: a port of a Service, or one pod.
//!
//! In: who serves it, in which shares, and what policies say of the choice. Out: one endpoint per [`Backend::pick`], and
//! whether a retry may be made ([`Backend::may_retry`]). Never opens a connection, waits, or looks at HTTP.
//!
//! ```text
//!   balancer    first the revision by its share, then those that are near, then the better of two endpoints
//!   candidates  the endpoints that a request may go to
//!   zone        which endpoints are near
//!   breaker     which endpoints are left alone for a while
//!   steer       which version a request is meant for while a Canary steers
//!   budget      how many retries there may be
//!   upstream    an endpoint, and what this worker has seen of it
//!   tried       the endpoints that a request has been to
//! ```

mod balancer;
mod breaker;
mod budget;
mod candidates;
pub mod steer;
#[cfg(test)]
mod tests;
mod tried;
mod upstream;
mod zone;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::Instant;

use crate::config::traffic::HashKey;
use crate::config::{Destination, Endpoint, Endpoints, EndpointsEntry, Place, PodRoute, Service, Steering};
use crate::telemetry::BreakerGauge;
use balancer::Balancer;
use budget::Budget;
use upstream::{Group, hash};

pub use breaker::{Change, Verdict};
pub use budget::SidecarRetries;
pub use tried::Tried;
pub use upstream::{InFlight, Outcome, Upstream};

/// What a choice takes into account. The default is a request that has been nowhere, and is like any other.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Where the request has been.
    pub tried: Tried,
    /// Which version it goes to, where there are several.
    pub cohort: Cohort,
    /// What it has in common with others that go to the same endpoint, see [`Backend::hash_key`].
    pub hash: Option<u64>,
    /// The endpoint that it should go to as long as that may be used.
    pub stay: Option<SocketAddr>,
    /// The breaker learns nothing from this choice, because no attempt follows or nobody judges it: it must not be the
    /// one that finds out whether an ejected endpoint serves again.
    pub no_probe: bool,
}

/// Which of the versions of a workload a request goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Cohort {
    /// Any of them, by its share.
    #[default]
    ByShare,
    /// By its share, for a user who stays with a version: where that user stands among all, 0 to 1. The version on trial
    /// begins at 0, so that a user who has come to it stays while its share grows.
    Point(f64),
    /// The version on trial, whatever its share.
    OnTrial,
    /// The approved version.
    Stable,
}

/// One place to send requests to, shared by every port of the worker that leads to it.
#[derive(Debug)]
pub struct Backend {
    /// Where its endpoints are kept current; `None`: a pod's own address.
    entry: Option<Arc<EndpointsEntry>>,
    /// What the balancer has taken over.
    seen: RefCell<Option<Arc<Endpoints>>>,
    balancer: Balancer,
    service: Option<Bytes>,
    group: Rc<Group>,
    budget: Budget,
    /// What a policy that is only tried would have spent.
    shadow_budget: Budget,
    retries: Arc<SidecarRetries>,
    gauge: OnceCell<Gauged>,
}

/// What of a gauge is this backend's: every worker has one of its own.
#[derive(Debug)]
struct Gauged {
    gauge: Arc<BreakerGauge>,
    ejected: RefCell<Vec<SocketAddr>>,
    is_panicking: Cell<bool>,
}

impl Gauged {
    fn set(&self, ejected: Vec<SocketAddr>, is_panicking: bool) {
        let panics = i64::from(is_panicking) - i64::from(self.is_panicking.replace(is_panicking));
        let mut now = self.ejected.borrow_mut();
        self.gauge.change(&now, &ejected, panics);
        *now = ejected;
    }
}

impl Drop for Gauged {
    fn drop(&mut self) {
        self.set(Vec::new(), false);
    }
}

impl Backend {
    fn of_service(of: &Backends, service: &Service) -> Self {
        let route = &service.route;
        let name = format!("{}/{}:{}", route.namespace, route.name, route.port);
        let entry = Some(Arc::clone(&service.endpoints));
        Self { entry, service: Some(name.into()), ..Self::named(of, &route.namespace, &route.name) }
    }

    fn of_pod(of: &Backends, pod: &PodRoute) -> Self {
        let (namespace, name) = match &pod.endpoint.identity {
            Some(id) => (id.namespace.as_str(), id.service_account.as_str()),
            None => ("", "pod"),
        };
        let backend = Self::named(of, namespace, name);
        let endpoints = vec![pod.endpoint.clone()];
        backend.balancer.update(&Endpoints { endpoints, ..Endpoints::default() });
        backend
    }

    /// A backend without endpoints.
    fn named(of: &Backends, namespace: &str, name: &str) -> Self {
        let group = Rc::new(Group::named(namespace, name));
        let balancer = Balancer::new(of.client, &group);
        balancer.set_place(&of.place.borrow());
        Self {
            entry: None,
            seen: RefCell::default(),
            balancer,
            service: None,
            group,
            budget: Budget::default(),
            shadow_budget: Budget::default(),
            retries: Arc::clone(&of.retries),
            gauge: OnceCell::new(),
        }
    }

    /// The Service, `namespace/name:port`, ready to travel to the server's sidecar; `None` for a pod's own address.
    pub fn service(&self) -> Option<Bytes> {
        self.service.clone()
    }

    /// The namespace and name that requests are counted under. Of a pod's own address: those of its identity.
    pub fn counted_as(&self) -> (&str, &str) {
        (&self.group.namespace, &self.group.name)
    }

    /// Chooses an endpoint; `None`: there is none that may be used and was not tried.
    pub fn pick(&self, ask: &Ask) -> Option<Rc<Upstream>> {
        self.pick_at(ask, Instant::now())
    }

    /// The same for who has looked at the clock already.
    pub fn pick_at(&self, ask: &Ask, now: Instant) -> Option<Rc<Upstream>> {
        self.refresh();
        self.balancer.pick_at(ask, now)
    }

    /// The endpoints as they are now, where some requests are steered to one of their versions.
    pub fn steering(&self) -> Option<Arc<Endpoints>> {
        self.refresh();
        self.seen.borrow().as_ref().filter(|endpoints| endpoints.steering.is_some()).cloned()
    }

    /// Whether the version on trial is compared by copies, and so only with requests that could have been copied.
    pub fn compares_copies(&self) -> bool {
        let endpoints = self.steering();
        endpoints.is_some_and(|endpoints| endpoints.steering.as_ref().is_some_and(Steering::compares_copies))
    }

    /// What requests have in common that go to the same endpoint; `None`: nothing that matters.
    pub fn hash_key(&self) -> Option<HashKey> {
        self.balancer.hash_key()
    }

    /// A first attempt is made, which earns this share of a retry: of what a policy does, and of what one that is only
    /// tried would do.
    pub fn earn_retries(&self, share: Option<f64>, shadow: Option<f64>) {
        if let Some(share) = share {
            self.budget.deposit(share, self.retries.cap());
        }
        if let Some(share) = shadow {
            self.shadow_budget.deposit(share, self.retries.cap());
        }
    }

    /// Whether a retry may be made. It is paid for with that.
    pub fn may_retry(&self, now: Instant) -> bool {
        self.budget.withdraw(self.retries.enforced(), now)
    }

    /// The same for a policy that is only tried.
    pub fn might_retry(&self, now: Instant) -> bool {
        self.shadow_budget.withdraw(self.retries.shadow(), now)
    }

    /// Takes over how an attempt at an endpoint ended now that began `since`, and returns what that changes for it.
    pub fn observe(
        &self,
        upstream: &Upstream,
        since: Instant,
        verdict: Verdict,
        now: Instant,
    ) -> Option<Change> {
        let change = self.balancer.observe(upstream, since, verdict, now)?;
        self.publish();
        Some(change)
    }

    /// Whether so many endpoints are ejected that all are used.
    pub fn is_panicking(&self) -> bool {
        self.balancer.counts().is_panicking
    }

    /// From now on what is ejected is shown there.
    pub fn show(&self, gauge: impl FnOnce() -> Arc<BreakerGauge>) {
        let gauged =
            || Gauged { gauge: gauge(), ejected: RefCell::default(), is_panicking: Cell::new(false) };
        self.gauge.get_or_init(gauged);
        self.publish();
    }

    fn publish(&self) {
        if let Some(gauged) = self.gauge.get() {
            gauged.set(self.balancer.ejected(), self.balancer.counts().is_panicking);
        }
    }

    /// Whether another endpoint than this one could serve.
    pub fn has_other(&self, than: SocketAddr) -> bool {
        self.refresh();
        self.balancer.has_other(than)
    }

    /// Whether any endpoint has a sidecar. What no endpoint has served is counted with what its endpoints serve.
    pub fn is_meshed(&self) -> bool {
        self.refresh();
        self.balancer.is_meshed()
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub fn is_ending(&self, endpoint: &Endpoint) -> bool {
        self.refresh();
        self.balancer.is_ending(endpoint)
    }

    fn refresh(&self) {
        let Some(entry) = &self.entry else { return };
        let newer: Option<Arc<Endpoints>> = entry.newer_than(self.seen.borrow().as_ref());
        if let Some(newer) = newer {
            self.balancer.update(&newer);
            self.seen.replace(Some(newer));
            self.publish();
        }
    }
}

/// The backends of one worker, by the name of their endpoints. They live as long as a port leads to them.
#[derive(Debug)]
pub struct Backends {
    client: u64,
    place: RefCell<Arc<Place>>,
    retries: Arc<SidecarRetries>,
    by_name: RefCell<HashMap<Arc<str>, Weak<Backend>>>,
}

impl Backends {
    /// No backends, for the pod with this uid, whose sidecar has one data thread.
    pub fn of_client(pod_uid: &str) -> Self {
        Self::new(pod_uid, Arc::default())
    }

    /// No backends, for the pod with this uid. All workers of a pod are one client to Services with session affinity,
    /// and have the same `retries`.
    pub fn new(pod_uid: &str, retries: Arc<SidecarRetries>) -> Self {
        Self {
            retries,
            client: hash(pod_uid),
            place: RefCell::new(Arc::new(Place { zone: Arc::default(), node: Arc::default() })),
            by_name: RefCell::default(),
        }
    }

    /// Takes over where the pod runs. Cheap where that is known already.
    pub fn set_place(&self, place: &Arc<Place>) {
        if Arc::ptr_eq(&self.place.replace(Arc::clone(place)), place) {
            return;
        }
        for backend in self.by_name.borrow().values().filter_map(Weak::upgrade) {
            if backend.balancer.set_place(place) {
                backend.seen.replace(None);
            }
        }
    }

    /// The backend of a destination: that of a Service's port is shared, that of a pod's own address is new. `None`:
    /// nobody in the cluster.
    pub fn of(&self, destination: &Destination) -> Option<Rc<Backend>> {
        match destination {
            Destination::Unknown => None,
            Destination::Pod(pod) => Some(Rc::new(Backend::of_pod(self, pod))),
            Destination::Service(service) => {
                let backend = self.of_service(service);
                backend.balancer.set_affinity(service.route.affinity);
                Some(backend)
            }
        }
    }

    /// The backend of a Service's port, with what its policies say. Whether clients stay with their endpoint is left as
    /// it is: only who is dialled says that.
    pub fn of_service(&self, service: &Service) -> Rc<Backend> {
        let backend = self.shared(service);
        if backend.balancer.set_traffic(&service.route.traffic, &service.route.shadow) {
            // The next use takes the endpoints over anew.
            backend.seen.replace(None);
        }
        backend
    }

    fn shared(&self, service: &Service) -> Rc<Backend> {
        let mut by_name = self.by_name.borrow_mut();
        let found = by_name.get(&service.route.endpoints).and_then(Weak::upgrade);
        // Endpoints that were forgotten and came back are kept current elsewhere.
        let is_current = |backend: &Rc<Backend>| {
            backend.entry.as_ref().is_some_and(|e| Arc::ptr_eq(e, &service.endpoints))
        };
        if let Some(backend) = found.filter(is_current) {
            return backend;
        }
        let backend = Rc::new(Backend::of_service(self, service));
        by_name.insert(Arc::clone(&service.route.endpoints), Rc::downgrade(&backend));
        backend
    }

    /// Forgets those that no port leads to any more.
    pub fn sweep(&self) {
        let mut by_name = self.by_name.borrow_mut();
        by_name.retain(|_, backend| backend.strong_count() > 0);
        let kept = by_name.len() * 2;
        by_name.shrink_to(kept);
    }

    /// How many there are, with those that have not been swept yet.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.by_name.borrow().len()
    }
}
