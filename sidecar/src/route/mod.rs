//! Where a dialled address leads.
//!
//! In: what the operator has answered of the address. Out: how to speak there ([`Target`]) and to whom
//! ([`Backend`]). Today a port has one implicit rule, which leads everything to one backend. Never waits, opens a
//! connection, or looks at a request.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use crate::backend::{Backend, Backends};
use crate::config::{Destination, Entry, Protocol};

/// A dialled address, with this worker's knowledge of it.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    entry: Arc<Entry>,
    compiled: RefCell<Compiled>,
    /// What earlier connections to this address have taught.
    pub learned: Cell<Learned>,
}

/// What the operator has answered, as it is used.
#[derive(Debug, Default)]
struct Compiled {
    destination: Option<Arc<Destination>>,
    backend: Option<Rc<Backend>>,
}

/// What earlier connections have taught about a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Learned {
    /// Nothing yet.
    #[default]
    Nothing,
    /// Its clients speak first.
    ClientFirst,
    /// Its servers speak first: the content is opaque.
    ServerFirst,
}

/// What kind of destination a port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nobody that the mesh knows, or this pod itself.
    Passthrough,
    /// One or more endpoints, and what is spoken there as far as it was declared.
    Endpoints(Protocol),
}

impl Port {
    /// A port of which nothing has been learned.
    pub(crate) fn new(address: SocketAddr, entry: Arc<Entry>) -> Self {
        Self { address, entry, compiled: RefCell::default(), learned: Cell::default() }
    }

    /// The address as it was dialled.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether this port is no longer kept current: a connection that outlives it asks for a new one.
    pub fn is_gone(&self) -> bool {
        self.entry.is_gone()
    }

    /// What is known of the address.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// What kind of destination this is now, for a pod with these addresses.
    pub(crate) fn target_for(&self, backends: &Backends, own: &[IpAddr]) -> Target {
        self.refresh(backends);
        match self.compiled.borrow().destination.as_deref() {
            None | Some(Destination::Unknown) => Target::Passthrough,
            Some(Destination::Pod(pod)) if own.contains(&pod.endpoint.address.ip()) => Target::Passthrough,
            Some(Destination::Pod(pod)) => Target::Endpoints(pod.protocol),
            Some(Destination::Service(service)) => Target::Endpoints(service.route.protocol),
        }
    }

    /// Where requests to it go now; `None`: nobody knows the address.
    pub(crate) fn backend_of(&self, backends: &Backends) -> Option<Rc<Backend>> {
        self.refresh(backends);
        self.compiled.borrow().backend.clone()
    }

    fn refresh(&self, backends: &Backends) {
        let newer = self.entry.newer_than(self.compiled.borrow().destination.as_ref());
        if let Some(destination) = newer {
            let backend = backends.of(&destination);
            self.compiled.replace(Compiled { destination: Some(destination), backend });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Tried;
    use crate::config::{ConfigStore, Endpoint, Endpoints, PodRoute, Route, ServiceRoute};

    const DIALLED: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80);

    fn endpoint(port: u16) -> Endpoint {
        Endpoint {
            address: SocketAddr::from(([10, 0, 0, 1], port)),
            identity: None,
            revision: "".into(),
            terminating: false,
            pod_uid: "pod".into(),
        }
    }

    fn service(endpoints: &str, protocol: Protocol) -> Route {
        Route::Service(ServiceRoute { protocol, endpoints: endpoints.into(), ..ServiceRoute::default() })
    }

    async fn port() -> (Arc<ConfigStore>, Port) {
        let (store, _wanted) = ConfigStore::new();
        let entry = store.resolve(DIALLED).await;
        (store, Port::new(DIALLED, entry))
    }

    #[tokio::test]
    async fn an_address_without_an_answer_passes_through_and_leads_somewhere_once_there_is_one() {
        let (store, port) = port().await;
        let backends = Backends::of_client("client");
        assert_eq!(port.target_for(&backends, &[]), Target::Passthrough);
        assert!(port.backend_of(&backends).is_none());
        store.set_route(DIALLED, service("shop/web:80", Protocol::Http2));
        assert_eq!(port.target_for(&backends, &[]), Target::Passthrough, "its endpoints are not known yet");
        let endpoints = Endpoints { endpoints: vec![endpoint(8080)], ..Endpoints::default() };
        store.set_endpoints(&"shop/web:80".into(), endpoints);
        assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Http2));
        let chosen = port.backend_of(&backends).unwrap().pick(&Tried::default()).unwrap();
        assert_eq!(chosen.endpoint.address.port(), 8080);
        store.set_route(DIALLED, Route::Unknown);
        assert_eq!(port.target_for(&backends, &[]), Target::Passthrough);
        assert!(port.backend_of(&backends).is_none());
    }

    #[tokio::test]
    async fn what_is_known_of_endpoints_outlives_a_change_of_their_route() {
        let (store, port) = port().await;
        let backends = Backends::of_client("client");
        store.set_endpoints(&"shop/web:80".into(), Endpoints::default());
        store.set_route(DIALLED, service("shop/web:80", Protocol::Detect));
        let before = port.backend_of(&backends).unwrap();
        store.set_route(DIALLED, service("shop/web:80", Protocol::Http1));
        assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Http1));
        assert!(Rc::ptr_eq(&before, &port.backend_of(&backends).unwrap()));
    }

    #[tokio::test]
    async fn a_pods_address_has_the_protocol_that_was_declared_and_the_pods_own_passes_through() {
        let (store, port) = port().await;
        let backends = Backends::of_client("client");
        let pod = PodRoute { endpoint: endpoint(6379), protocol: Protocol::Opaque };
        let own = [pod.endpoint.address.ip()];
        store.set_route(DIALLED, Route::Pod(pod));
        assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Opaque));
        assert_eq!(port.target_for(&backends, &own), Target::Passthrough);
    }
}
