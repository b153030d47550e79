//! The proxy on a thread of its own, as one worker: what `tulle_sidecar::run` starts, except for its fixed ports.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tulle_sidecar::config::store::Wanted;
use tulle_sidecar::config::{ConfigStore, Destination, Rules, client, identity};
use tulle_sidecar::route::Target;
use tulle_sidecar::settings::{Settings, SourceAddress};
use tulle_sidecar::telemetry::Telemetry;
use tulle_sidecar::tls::TlsStore;
use tulle_sidecar::trace::export;
use tulle_sidecar::worker::Worker;
use tulle_sidecar::{inbound, outbound};

use super::operator::{self, Operator};
use super::{NAMESPACE, TRUST_DOMAIN, within};

/// What a sidecar is asked to do.
enum Command {
    /// Serve a connection of the application to this destination.
    Dial(std::net::TcpStream, SocketAddr),
    /// Serve connections to this listener as if they had been redirected on their way to this destination.
    Redirect(std::net::TcpListener, SocketAddr),
    /// Say when it is known where this address leads.
    Resolve(SocketAddr, oneshot::Sender<()>),
    /// End, and say when that has begun.
    Stop(oneshot::Sender<()>),
}

/// A sidecar; it is told to stop when this is dropped.
pub struct Sidecar {
    /// What it has been told by the operator.
    pub config: Arc<ConfigStore>,
    /// What it has counted.
    pub telemetry: Arc<Telemetry>,
    commands: UnboundedSender<Command>,
}

struct Parts {
    settings: Arc<Settings>,
    config: Arc<ConfigStore>,
    tls: Arc<TlsStore>,
    telemetry: Arc<Telemetry>,
}

/// Settings of the sidecar of a pod, without addresses and files. `operator`: where it is.
pub fn settings(uid: &str, operator: &str) -> Settings {
    Settings {
        pod_name: uid.to_owned(),
        pod_namespace: NAMESPACE.to_owned(),
        pod_uid: uid.to_owned(),
        pod_ips: Vec::new(),
        trust_domain: TRUST_DOMAIN.to_owned(),
        operator: operator.to_owned(),
        operator_addresses: Vec::new(),
        operator_identity: operator::identity(),
        token_file: String::new(),
        trust_file: String::new(),
        probes: Vec::new(),
        workers: 1,
        source_address: SourceAddress::Sidecar,
        features: Vec::new(),
        telemetry: true,
    }
}

impl Sidecar {
    /// Starts the sidecar of a pod with these addresses. It is ready when this returns. `folder`: with the trust
    /// bundle and the token.
    pub async fn start(operator: &Operator, folder: &Path, uid: &str, ips: &[Ipv4Addr]) -> Self {
        let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let settings = Settings {
            pod_ips: ips.iter().map(|ip| (*ip).into()).collect(),
            token_file: path("token"),
            trust_file: path("roots.pem"),
            features: tulle_mesh::features::ALL.to_vec(),
            ..settings(uid, &operator.address.to_string())
        };
        let (config, wanted) = ConfigStore::new();
        let (tls, telemetry) = (Arc::<TlsStore>::default(), Arc::<Telemetry>::default());
        let (commands, received) = unbounded_channel();
        let parts = Parts {
            settings: Arc::new(settings),
            config: Arc::clone(&config),
            tls: Arc::clone(&tls),
            telemetry: Arc::clone(&telemetry),
        };
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, run(parts, wanted, received));
        });
        within(tls.ready()).await;
        within(config.inbound_known()).await;
        Self { config, telemetry, commands }
    }

    /// A connection of the pod's application to this destination.
    pub async fn dial(&self, destination: SocketAddr) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let near = near.unwrap();
        near.set_nodelay(true).unwrap();
        self.ask(Command::Dial(accepted.unwrap().0.into_std().unwrap(), destination));
        near
    }

    /// From here on this listener is where connections to `destination` arrive.
    pub fn redirect(&self, listener: std::net::TcpListener, destination: SocketAddr) {
        self.ask(Command::Redirect(listener, destination));
    }

    /// Waits until it is known where this address leads.
    pub async fn resolve(&self, address: SocketAddr) {
        let (known, answer) = oneshot::channel();
        self.ask(Command::Resolve(address, known));
        within(answer).await.unwrap();
    }

    /// The rules of this address; `None`: it has none.
    pub fn rules(&self, address: SocketAddr) -> Option<Arc<Rules>> {
        let known = self.config.snapshot().into_iter().find(|known| known.address == address)?;
        match known.destination.as_deref()? {
            Destination::Service(service) => service.route.rules.clone(),
            Destination::Unknown | Destination::Pod(_) => None,
        }
    }

    /// How often this has happened for this reason.
    pub fn count_of(&self, kind: &str, reason: &str) -> u64 {
        let events = self.telemetry.events();
        events.iter().filter(|(event, _)| *event == (kind, reason)).map(|(_, count)| count).sum()
    }

    /// Tells it to stop. Returns when it accepts nothing any more, and what runs may still end.
    pub async fn stop(&self) {
        let (begun, answer) = oneshot::channel();
        self.ask(Command::Stop(begun));
        within(answer).await.unwrap();
    }

    /// How often this has happened.
    pub fn count(&self, kind: &str) -> u64 {
        self.telemetry.events().iter().filter(|((name, _), _)| *name == kind).map(|(_, count)| count).sum()
    }

    fn ask(&self, command: Command) {
        assert!(self.commands.send(command).is_ok(), "the sidecar has ended");
    }
}

async fn run(parts: Parts, wanted: UnboundedReceiver<Wanted>, mut commands: UnboundedReceiver<Command>) {
    let Parts { settings, config, tls, telemetry } = parts;
    tokio::spawn(identity::run(Arc::clone(&settings), Arc::clone(&tls)));
    let (store, keys, counters) = (Arc::clone(&config), Arc::clone(&tls), Arc::clone(&telemetry));
    let last_report = CancellationToken::new();
    tokio::spawn(client::run(Arc::clone(&settings), store, keys, counters, wanted, last_report));
    let spans =
        (Arc::clone(&settings), Arc::clone(&config), Arc::clone(&telemetry), CancellationToken::new());
    tokio::spawn(export::run(spans.0, spans.1, spans.2, spans.3));
    let worker = Worker::new(settings, config, tls, telemetry, Arc::default(), Arc::default());
    spawn_local(inbound::app::watch(Rc::clone(&worker)));
    let sweeping = Rc::clone(&worker);
    spawn_local(async move {
        loop {
            sleep(Duration::from_secs(5)).await;
            sweeping.sweep();
        }
    });
    // Whoever serves a connection holds one, as in the proxy.
    let tasks = Rc::new(());
    let mut listeners: Vec<AbortHandle> = Vec::new();
    let mut begun = None;
    while let Some(command) = commands.recv().await {
        match command {
            Command::Dial(stream, destination) => {
                let stream = TcpStream::from_std(stream).unwrap();
                let (worker, task) = (Rc::clone(&worker), Rc::clone(&tasks));
                spawn_local(async move {
                    outbound::serve_to(worker, stream, destination).await;
                    drop(task);
                });
            }
            Command::Redirect(listener, destination) => {
                let listener = TcpListener::from_std(listener).unwrap();
                let task = Rc::downgrade(&tasks);
                let accepting = accept(Rc::clone(&worker), task, listener, destination);
                listeners.push(spawn_local(accepting).abort_handle());
            }
            Command::Resolve(address, known) => {
                let worker = Rc::clone(&worker);
                spawn_local(async move {
                    // An operator that is slow is asked again.
                    while worker.port(address).await.target(&worker) == Target::Passthrough {
                        sleep(Duration::from_millis(5)).await;
                    }
                    let _ = known.send(());
                });
            }
            Command::Stop(stops) => {
                begun = Some(stops);
                break;
            }
        }
    }
    listeners.iter().for_each(AbortHandle::abort);
    // They end, and close their listeners, when they are next polled.
    tokio::task::yield_now().await;
    if let Some(begun) = begun {
        let _ = begun.send(());
    }
    worker.drain(&tasks).await;
}

async fn accept(
    worker: Rc<Worker>,
    tasks: std::rc::Weak<()>,
    listener: TcpListener,
    destination: SocketAddr,
) {
    loop {
        let (stream, peer) = listener.accept().await.unwrap();
        let (worker, task) = (Rc::clone(&worker), tasks.upgrade());
        spawn_local(async move {
            inbound::serve_to(worker, stream, peer, destination).await;
            drop(task);
        });
    }
}
