//! What one data thread has for itself: pools, ports, backends. Nothing here is shared with another thread but
//! configuration, certificates and counters.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::app_latency::AppLatency;
use crate::app_waiting::AppWaiting;
use crate::backend::{Backends, SidecarRetries};
use crate::config::ConfigStore;
use crate::pool::{Http1Pool, Http2Pool, MeshPool};
use crate::route::{Plan, Port, Target};
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::tls::TlsStore;
use crate::wire::Connection;

/// Ports that are kept before those are dropped that are no longer kept current. The store keeps half as many.
const MAX_PORTS: usize = 20_000;
/// What runs when the sidecar ends may take so long; then connections to other sidecars are ended properly, whatever
/// still runs.
const TASKS_END_WITHIN: Duration = Duration::from_millis(400);

/// One data thread.
pub struct Worker {
    /// The pod and its operator.
    pub settings: Arc<Settings>,
    /// What the operator has sent.
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
    /// How long the pod's application takes for the head of an answer.
    pub app_latency: AppLatency,
    /// Copies of requests that are under way.
    pub copies: Cell<u32>,
    /// Connections that wait for the pod's application, in all workers and in probes.
    pub app_waiting: Arc<AppWaiting>,
    /// By the address that was dialled.
    ports: RefCell<HashMap<SocketAddr, Rc<Port>>>,
    backends: Backends,
    /// Connections that other sidecars have opened.
    peers: RefCell<Vec<Connection>>,
}

impl Worker {
    /// A worker without connections.
    pub fn new(
        settings: Arc<Settings>,
        config: Arc<ConfigStore>,
        tls: Arc<TlsStore>,
        telemetry: Arc<Telemetry>,
        app_waiting: Arc<AppWaiting>,
        retries: Arc<SidecarRetries>,
    ) -> Rc<Self> {
        Rc::new(Self {
            mesh: MeshPool::new(Arc::clone(&tls)),
            backends: Backends::new(&settings.pod_uid, retries),
            settings,
            config,
            tls,
            telemetry,
            http1: Http1Pool::default(),
            http2: Http2Pool::default(),
            load: Cell::new(0),
            app_latency: AppLatency::default(),
            copies: Cell::new(0),
            app_waiting,
            ports: RefCell::default(),
            peers: RefCell::default(),
        })
    }

    /// The port of a dialled address. The first use waits for the operator's answer, for 3 s at most.
    pub async fn port(&self, address: SocketAddr) -> Rc<Port> {
        if let Some(port) = self.current_port(address) {
            return port;
        }
        // Once per address: not a part of every connection's task.
        let entry = Box::pin(self.config.resolve(address)).await;
        // Another connection may have been faster: what one teaches, all shall know.
        if let Some(port) = self.current_port(address) {
            return port;
        }
        self.backends.set_place(&self.config.place());
        let port = Rc::new(Port::new(address, entry));
        let mut ports = self.ports.borrow_mut();
        if ports.len() >= MAX_PORTS {
            ports.retain(|_, port| !port.is_gone());
        }
        ports.insert(address, Rc::clone(&port));
        port
    }

    fn current_port(&self, address: SocketAddr) -> Option<Rc<Port>> {
        self.ports.borrow().get(&address).filter(|port| !port.is_gone()).cloned()
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
        let ended = async {
            while Rc::strong_count(tasks) > 1 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        let _ = timeout(TASKS_END_WITHIN, ended).await;
        self.mesh.drain().await;
    }

    /// Closes what is idle or old, forgets ports that are no longer kept current and backends that none leads to.
    pub fn sweep(&self) {
        self.mesh.sweep();
        self.http1.sweep();
        self.http2.sweep();
        self.peers.borrow_mut().retain(|connection| !connection.is_closed());
        let mut ports = self.ports.borrow_mut();
        ports.retain(|_, port| !port.is_gone());
        let kept = ports.len() * 2;
        ports.shrink_to(kept);
        drop(ports);
        self.backends.set_place(&self.config.place());
        self.backends.sweep();
    }
}

/// A port as this worker sees it. Here, so that routes do not depend on workers.
impl Port {
    /// What kind of destination this is now. Cheap: a connection may ask again with each request.
    pub fn target(&self, worker: &Worker) -> Target {
        self.target_for(&worker.backends, &worker.settings.pod_ips)
    }

    /// Where what arrives there goes now; `None`: nobody knows the address.
    pub fn plan(&self, worker: &Worker) -> Option<Rc<Plan>> {
        self.plan_of(&worker.backends)
    }

    /// For a connection that passes through because there was no answer yet: resolves when the answer is that a
    /// sidecar listens there. The connection must then end, for its next one is not to be sent in plain text. With any
    /// other answer it never resolves.
    pub async fn becomes_meshed(&self, worker: &Worker) {
        worker.config.becomes_meshed(self.address(), Arc::clone(self.entry())).await;
    }
}
