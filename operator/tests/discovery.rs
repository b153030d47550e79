//! Many real sidecars at one operator, over TCP and TLS: they come all at once, and some never read what
//! they are sent.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::discovery_client::DiscoveryClient;
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{
    Hello, ResourceName, ResourceType, SidecarMessage, SignRequest, SignResponse, Subscribe, sidecar_message,
};
use tulle_operator::discovery::Registry;
use tulle_operator::discovery::relay::LeaderRelay;
use tulle_operator::discovery::server::{Services, serve};
use tulle_operator::identity::authority::Authority;
use tulle_operator::lease::Leadership;
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Endpoint, Model, Pod, Service, Slice};
use tulle_operator::run::own_tls;
use tulle_operator::telemetry::Aggregates;
use tulle_operator::watch::Hub;
use tulle_sidecar::config::client::{self, Operator};
use tulle_sidecar::config::identity;
use tulle_sidecar::config::resource::Destination;
use tulle_sidecar::config::store::ConfigStore;
use tulle_sidecar::settings::Settings;
use tulle_sidecar::telemetry::Telemetry;
use tulle_sidecar::tls::TlsStore;

/// More than are computed at the same time.
const STUCK: u32 = 24;
const SIDECARS: u32 = 100;
const SERVICES: u32 = 1_000;
/// Enough for what one sidecar is sent to be more than its window takes unread.
const ENDPOINTS: u32 = 100;
/// A bound on what must not hang; nothing is measured.
const BOUND: Duration = Duration::from_secs(60);

/// Signs for every pod.
struct Everybody(Arc<Authority>);

#[tonic::async_trait]
impl Identity for Everybody {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let request = request.into_inner();
        let leaf = self.0.sign_request(&request.csr_der, &id("app"), Duration::from_secs(3600)).unwrap();
        let chain_der = leaf.chain.iter().map(|der| der.to_vec()).collect();
        Ok(Response::new(SignResponse { chain_der, not_after_unix: leaf.not_after_unix }))
    }
}

fn id(account: &str) -> WorkloadId {
    WorkloadId::new("cluster.local", "shop", account)
}

fn service_address(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x0a60_0000 + number), 80).into()
}

fn pod_address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0af4_0000 + number).into()
}

fn model() -> Model {
    let mut model = Model::default();
    for number in 0..STUCK + SIDECARS {
        model.apply_pod(Pod {
            uid: format!("pod-{number}").into(),
            name: format!("pod-{number}").into(),
            namespace: "shop".into(),
            service_account: "app".into(),
            ips: Box::new([pod_address(number)]),
            injected: true,
            ..Pod::default()
        });
    }
    for number in 0..SERVICES {
        let name = format!("service-{number}");
        let port = ServicePort { name: "http".into(), port: 80, app_protocol: None };
        let cluster_ips = vec![service_address(number).ip()];
        let service = Service { cluster_ips, ports: vec![port], ..Service::default() };
        model.apply_service(("shop".into(), name.as_str().into()), service);
        model.apply_slice(("shop".into(), name.as_str().into()), slice(&name, ENDPOINTS));
    }
    model
}

fn slice(service: &str, endpoints: u32) -> Slice {
    let endpoint = |number| Endpoint {
        address: Some(pod_address(number)),
        ready: true,
        serving: true,
        pod_uid: Some(format!("pod-{number}").into()),
        ..Endpoint::default()
    };
    let endpoints = (0..endpoints).map(endpoint).collect();
    Slice { service: service.into(), ports: vec![("http".into(), 8080)], endpoints }
}

/// An operator whose whole world is `model`.
async fn operator(folder: &Path) -> (SocketAddr, Arc<Hub>, Arc<Registry>) {
    let authority = Arc::new(Authority::generate("cluster.local").unwrap().0);
    std::fs::write(folder.join("roots.pem"), authority.root_pem()).unwrap();
    std::fs::write(folder.join("token"), "token").unwrap();
    let hub = Arc::new(Hub::complete(model()));
    let (registry, aggregates) = (Arc::new(Registry::default()), Arc::new(Aggregates::default()));
    let (_, leadership) = watch::channel(Leadership { mine: true, ..Leadership::default() });
    let relay = LeaderRelay::new(Arc::clone(&registry), Arc::clone(&aggregates), leadership);
    let tls = Arc::new(own_tls(&authority, &id("operator")).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut services =
        Services::new(Arc::clone(&hub), relay, Arc::clone(&registry), aggregates, id("operator"));
    // All come over loopback.
    services.check_addresses = false;
    tokio::spawn(serve(listener, tls, services, Everybody(authority)));
    (address, hub, registry)
}

fn settings(number: u32, operator: SocketAddr, folder: &Path) -> Arc<Settings> {
    Arc::new(Settings {
        pod_name: format!("pod-{number}"),
        pod_namespace: "shop".into(),
        pod_uid: format!("pod-{number}"),
        pod_ips: vec![pod_address(number)],
        trust_domain: "cluster.local".into(),
        operator: operator.to_string(),
        operator_identity: id("operator"),
        token_file: folder.join("token").display().to_string(),
        trust_file: folder.join("roots.pem").display().to_string(),
        probes: Vec::new(),
        workers: 1,
        features: tulle_mesh::features::ALL.to_vec(),
    })
}

/// A sidecar's certificate, and what the proxy runs to keep its configuration.
fn sidecar(settings: &Arc<Settings>) -> Arc<ConfigStore> {
    let (store, wanted) = ConfigStore::new();
    let (tls, stop) = (Arc::new(TlsStore::default()), CancellationToken::new());
    tokio::spawn(identity::run(Arc::clone(settings), Arc::clone(&tls)));
    let telemetry = Arc::new(Telemetry::default());
    tokio::spawn(client::run(Arc::clone(settings), Arc::clone(&store), tls, telemetry, wanted, stop));
    store
}

/// Subscribes to everything and reads nothing. What is returned keeps the stream open.
async fn stuck(settings: Arc<Settings>) -> impl Sized {
    let tls = Arc::new(TlsStore::default());
    tokio::spawn(identity::run(Arc::clone(&settings), Arc::clone(&tls)));
    tls.ready().await;
    let config = Arc::clone(&tls.current().unwrap().operator_client);
    let operator = Operator::connect(&settings, config).await.unwrap();
    let (up, messages) = mpsc::channel(SERVICES as usize + 1);
    let hello = Hello { pod_uid: settings.pod_uid.clone(), ..Hello::default() };
    let say = |message| SidecarMessage { message: Some(message) };
    up.try_send(say(sidecar_message::Message::Hello(hello))).unwrap();
    for number in 0..SERVICES {
        let name = service_address(number).to_string();
        let name = ResourceName { r#type: ResourceType::Destination as i32, cluster: String::new(), name };
        up.try_send(say(sidecar_message::Message::Subscribe(Subscribe { name: Some(name) }))).unwrap();
    }
    let origin = http::Uri::from_static("http://operator.tulle");
    let mut client = DiscoveryClient::with_origin(operator, origin);
    let down = client.stream(ReceiverStream::new(messages)).await.unwrap();
    (up, client, down)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sidecars_that_read_nothing_hold_up_nobody_else() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (operator, hub, registry) = operator(folder).await;
    let mut open = Vec::new();
    for number in 0..STUCK {
        open.push(timeout(BOUND, stuck(settings(number, operator, folder))).await.unwrap());
    }
    let sidecars: Vec<_> =
        (STUCK..STUCK + SIDECARS).map(|number| sidecar(&settings(number, operator, folder))).collect();
    // All ask at once, for services of their own and for one that all of them use.
    let mine = |number: usize| [0, number as u32, number as u32 + 50].map(service_address);
    for store in &sidecars {
        timeout(BOUND, store.inbound_known()).await.expect("no answer on what to enforce");
    }
    for (number, store) in sidecars.iter().enumerate() {
        for address in mine(number) {
            let entry = timeout(BOUND, store.resolve(address)).await.unwrap();
            let Some(destination) = entry.current() else { panic!("{number} was not told of {address}") };
            let Destination::Service(service) = &*destination else { panic!("{address}: {destination:?}") };
            assert_eq!(service.endpoints.len(), ENDPOINTS as usize);
        }
    }
    assert!(registry.connected() >= SIDECARS as usize, "nobody who reads was turned away");
    hub.change(|model| model.apply_slice(("shop".into(), "service-0".into()), slice("service-0", 3)));
    for store in &sidecars {
        let changed = async {
            let entry = store.resolve(service_address(0)).await;
            while !matches!(entry.current().as_deref(), Some(Destination::Service(s)) if s.endpoints.len() == 3)
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(BOUND, changed).await.expect("a change did not come");
    }
    let dropped = async {
        while registry.connected() != SIDECARS as usize {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(BOUND, dropped).await.expect("those who read nothing are not dropped");
}
