//! Where requests go: a port of a Service, or one pod.
//!
//! In: who serves it, and in which shares. Out: one endpoint per [`Backend::pick`]. Never opens a connection, waits, or
//! looks at HTTP.
//!
//! ```text
//!   balancer   first the revision by its share, then the better of two endpoints
//!   upstream   an endpoint, and what this worker has seen of it
//!   tried      the endpoints that a request has been to
//! ```

mod balancer;
#[cfg(test)]
mod tests;
mod tried;
mod upstream;

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use bytes::Bytes;

use crate::config::{Destination, Endpoint, Endpoints, EndpointsEntry, PodRoute, Service};
use balancer::{Balancer, hash};
use upstream::Group;

pub use tried::Tried;
pub use upstream::{InFlight, Outcome, Upstream};

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
}

impl Backend {
    fn of_service(client: u64, service: &Service) -> Self {
        let route = &service.route;
        let group = Rc::new(Group::named(&route.namespace, &route.name));
        let name = format!("{}/{}:{}", route.namespace, route.name, route.port);
        Self {
            entry: Some(Arc::clone(&service.endpoints)),
            seen: RefCell::default(),
            balancer: Balancer::new(client, &group),
            service: Some(name.into()),
            group,
        }
    }

    fn of_pod(client: u64, pod: &PodRoute) -> Self {
        let (namespace, name) = match &pod.endpoint.identity {
            Some(id) => (id.namespace.as_str(), id.service_account.as_str()),
            None => ("", "pod"),
        };
        let group = Rc::new(Group::named(namespace, name));
        let balancer = Balancer::new(client, &group);
        balancer.update(&Endpoints { endpoints: vec![pod.endpoint.clone()], ..Endpoints::default() });
        Self { entry: None, seen: RefCell::default(), balancer, service: None, group }
    }

    /// The Service, `namespace/name:port`, ready to travel to the server's sidecar; `None` for a pod's own address.
    pub fn service(&self) -> Option<Bytes> {
        self.service.clone()
    }

    /// The namespace and name that requests are counted under. Of a pod's own address: those of its identity.
    pub fn counted_as(&self) -> (&str, &str) {
        (&self.group.namespace, &self.group.name)
    }

    /// Chooses an endpoint that is not among `tried`; `None`: there is none that may be used.
    pub fn pick(&self, tried: &Tried) -> Option<Rc<Upstream>> {
        self.refresh();
        self.balancer.pick(tried)
    }

    /// Whether another endpoint than this one could serve.
    pub fn has_other(&self, than: SocketAddr) -> bool {
        self.refresh();
        self.balancer.has_other(than)
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub fn is_ending(&self, endpoint: &Endpoint) -> bool {
        self.refresh();
        self.balancer.is_ending(endpoint)
    }

    fn refresh(&self) {
        let Some(entry) = &self.entry else { return };
        let newer = entry.newer_than(self.seen.borrow().as_ref());
        if let Some(newer) = newer {
            self.balancer.update(&newer);
            self.seen.replace(Some(newer));
        }
    }
}

/// The backends of one worker, by the name of their endpoints. They live as long as a port leads to them.
#[derive(Debug)]
pub struct Backends {
    client: u64,
    by_name: RefCell<HashMap<Arc<str>, Weak<Backend>>>,
}

impl Backends {
    /// No backends, for the pod with this uid. All workers of a pod are one client to Services with session affinity.
    pub fn of_client(pod_uid: &str) -> Self {
        Self { client: hash(pod_uid), by_name: RefCell::default() }
    }

    /// The backend of a destination: that of a Service's port is shared, that of a pod's own address is new. `None`:
    /// nobody in the cluster.
    pub fn of(&self, destination: &Destination) -> Option<Rc<Backend>> {
        match destination {
            Destination::Unknown => None,
            Destination::Pod(pod) => Some(Rc::new(Backend::of_pod(self.client, pod))),
            Destination::Service(service) => {
                let backend = self.of_service(service);
                backend.balancer.set_affinity(service.route.affinity);
                Some(backend)
            }
        }
    }

    fn of_service(&self, service: &Service) -> Rc<Backend> {
        let mut by_name = self.by_name.borrow_mut();
        let found = by_name.get(&service.route.endpoints).and_then(Weak::upgrade);
        // Endpoints that were forgotten and came back are kept current elsewhere.
        let is_current = |backend: &Rc<Backend>| {
            backend.entry.as_ref().is_some_and(|e| Arc::ptr_eq(e, &service.endpoints))
        };
        if let Some(backend) = found.filter(is_current) {
            return backend;
        }
        let backend = Rc::new(Backend::of_service(self.client, service));
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
