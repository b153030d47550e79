//! What one data thread has for itself: pools, routes, balancers. Nothing here is shared with another
//! thread but configuration, certificates and counters.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::balance::{Balancer, Upstream};
use crate::config::{ConfigStore, Destination, Endpoint, Entry, Protocol};
use crate::pool::{Http1Pool, Http2Pool, MeshPool};
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::tls::TlsStore;
use crate::wire::Connection;

/// One data thread.
pub struct Worker {
    /// The pod and its operator.
    pub settings: Arc<Settings>,
    /// What the operator has said.
    pub config: Arc<ConfigStore>,
    /// Key, chain, roots.
    pub tls: Arc<TlsStore>,
    /// Counters.
    pub telemetry: Arc<Telemetry>,
    /// Connections to other sidecars.
    pub mesh: MeshPool,
    /// Connections to HTTP/1 servers.
    pub http1: Http1Pool,
    /// Connections to HTTP/2 servers.
    pub http2: Http2Pool,
    /// Requests that the pod's application has in hand.
    pub load: Cell<u32>,
    routes: RefCell<HashMap<SocketAddr, Rc<Route>>>,
    /// Connections that other sidecars have opened.
    peers: RefCell<Vec<Connection>>,
}

/// Where a dialled address leads, with this worker's knowledge of it.
pub struct Route {
    /// The address as it was dialled.
    pub address: SocketAddr,
    entry: Arc<Entry>,
    seen: RefCell<Option<Arc<Destination>>>,
    balancer: Balancer,
    single: RefCell<Option<Rc<Upstream>>>,
    /// What earlier connections to this address have taught.
    pub learned: Cell<Learned>,
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

/// What kind of destination a route leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nobody that the mesh knows, or this pod itself.
    Passthrough,
    /// One or more endpoints, spoken to like this.
    Endpoints(Protocol),
}

impl Worker {
    /// A worker without connections.
    pub fn new(
        settings: Arc<Settings>,
        config: Arc<ConfigStore>,
        tls: Arc<TlsStore>,
        telemetry: Arc<Telemetry>,
    ) -> Rc<Self> {
        Rc::new(Self {
            mesh: MeshPool::new(Arc::clone(&tls)),
            settings,
            config,
            tls,
            telemetry,
            http1: Http1Pool::default(),
            http2: Http2Pool::default(),
            load: Cell::new(0),
            routes: RefCell::default(),
            peers: RefCell::default(),
        })
    }

    /// The route of an address.
    pub async fn route(&self, address: SocketAddr) -> Rc<Route> {
        if let Some(route) = self.routes.borrow().get(&address).filter(|route| !route.entry.is_gone()) {
            return Rc::clone(route);
        }
        let entry = self.config.resolve(address).await;
        let route = Rc::new(Route {
            address,
            entry,
            seen: RefCell::default(),
            balancer: Balancer::of_client(&self.settings.pod_uid),
            single: RefCell::default(),
            learned: Cell::default(),
        });
        self.routes.borrow_mut().insert(address, Rc::clone(&route));
        route
    }

    /// Whether an address is this pod's own.
    pub fn is_own(&self, address: SocketAddr) -> bool {
        self.settings.pod_ips.contains(&address.ip())
    }

    /// Keeps a connection that another sidecar has opened, to end it properly later.
    pub fn opened_by_peer(&self, connection: &Connection) {
        self.peers.borrow_mut().push(connection.clone());
    }

    /// Ends properly: sidecars that are connected are told to open no new streams here, what runs may end
    /// (`tasks`: everything that serves a connection holds one), and what has been written goes out.
    pub async fn drain(&self, tasks: &Rc<()>) {
        let peers = self.peers.take();
        peers.iter().for_each(Connection::drain);
        while Rc::strong_count(tasks) > 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.mesh.drain().await;
    }

    /// Closes what is idle or old, forgets routes that are no longer kept current.
    pub fn sweep(&self) {
        self.mesh.sweep();
        self.http1.sweep();
        self.http2.sweep();
        self.peers.borrow_mut().retain(|connection| !connection.is_closed());
        self.routes.borrow_mut().retain(|_, route| !route.entry.is_gone());
    }
}

impl Route {
    /// Whether this route is no longer kept current: a connection that outlives it asks for a new one.
    pub fn is_gone(&self) -> bool {
        self.entry.is_gone()
    }

    /// What kind of destination this is now.
    pub fn target(&self, worker: &Worker) -> Target {
        self.refresh();
        match self.seen.borrow().as_deref() {
            None | Some(Destination::Unknown) => Target::Passthrough,
            Some(Destination::Pod(endpoint)) if worker.is_own(endpoint.address) => Target::Passthrough,
            Some(Destination::Pod(_)) => Target::Endpoints(Protocol::Detect),
            Some(Destination::Service(service)) => Target::Endpoints(service.protocol),
        }
    }

    /// The Service that was dialled, as it travels to the server's sidecar.
    pub fn service_name(&self) -> Option<String> {
        match self.seen.borrow().as_deref() {
            Some(Destination::Service(s)) => Some(format!("{}/{}:{}", s.namespace, s.name, s.port)),
            _ => None,
        }
    }

    /// Chooses an endpoint that is not among `tried`.
    pub fn pick(&self, tried: &[SocketAddr]) -> Option<Rc<Upstream>> {
        self.refresh();
        if let Some(single) = &*self.single.borrow() {
            return (!tried.contains(&single.endpoint.address)).then(|| Rc::clone(single));
        }
        self.balancer.pick(tried)
    }

    /// Whether an endpoint, as it is known now, is about to end.
    pub fn is_ending(&self, endpoint: &Endpoint) -> bool {
        self.refresh();
        self.balancer.is_ending(endpoint)
    }

    fn refresh(&self) {
        let current = self.entry.current();
        let unchanged = match (&current, &*self.seen.borrow()) {
            (Some(current), Some(seen)) => Arc::ptr_eq(current, seen),
            (None, None) => true,
            _ => false,
        };
        if unchanged {
            return;
        }
        match current.as_deref() {
            Some(Destination::Service(service)) => {
                self.single.replace(None);
                self.balancer.update(service);
            }
            Some(Destination::Pod(endpoint)) => {
                self.single.replace(Some(single(endpoint)));
            }
            _ => drop(self.single.replace(None)),
        }
        self.seen.replace(current);
    }
}

fn single(endpoint: &Endpoint) -> Rc<Upstream> {
    let (namespace, name) = match &endpoint.identity {
        Some(id) => (id.namespace.as_str(), id.service_account.as_str()),
        None => ("", "pod"),
    };
    Upstream::new(endpoint.clone(), &Rc::new((namespace.to_owned(), name.to_owned())))
}
