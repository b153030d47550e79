//! Many sidecars at one operator, over TCP and TLS, old ones and new ones: they come all at once, and some never read
//! what they are sent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that panics has failed")]

mod client;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use rcgen::KeyPair;
use rustls::ClientConfig;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::timeout;
use tonic::{Request, Response, Status};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{
    Endpoint as Sent, ResourceName, ResourceType, SignRequest, SignResponse, destination, resource,
};
use tulle_operator::discovery::AckTracker;
use tulle_operator::discovery::relay::LeaderRelay;
use tulle_operator::discovery::server::{Services, serve};
use tulle_operator::identity::authority::Authority;
use tulle_operator::lease::Leadership;
use tulle_operator::model::object::ServicePort;
use tulle_operator::model::{Endpoint, Model, Pod, Service, Slice};
use tulle_operator::run::own_tls;
use tulle_operator::telemetry::Aggregates;
use tulle_operator::watch::Hub;

use client::{Certificate, Stream, name};

/// More than are computed at the same time.
const STUCK: u32 = 24;
const SIDECARS: u32 = 100;
const SERVICES: u32 = 1_000;
/// Enough for what one sidecar is sent to be more than its window takes unread.
const ENDPOINTS: u32 = 100;
/// A bound on what must not hang; nothing is measured.
const BOUND: Duration = Duration::from_secs(60);

/// Nobody needs to be signed for here.
struct Nobody;

#[tonic::async_trait]
impl Identity for Nobody {
    async fn sign(&self, _: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        Err(Status::unimplemented("the clients have certificates"))
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

/// An operator whose whole world is `model`, and what sidecars connect with.
struct Operator {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    hub: Arc<Hub>,
    acks: Arc<AckTracker>,
}

impl Operator {
    async fn start() -> Self {
        let authority = Authority::generate("cluster.local").unwrap().0;
        let key = KeyPair::generate().unwrap();
        let leaf = authority.sign(&key, &id("app"), Duration::from_secs(3600)).unwrap();
        let certificate = Certificate {
            root: authority.root().to_vec(),
            leaf: leaf.chain.first().unwrap().to_vec(),
            key: key.serialize_der(),
        };
        let hub = Arc::new(Hub::complete(model()));
        let (acks, aggregates) = (Arc::new(AckTracker::default()), Arc::new(Aggregates::default()));
        let (_, leadership) = watch::channel(Leadership { mine: true, ..Leadership::default() });
        let relay =
            LeaderRelay::new(Arc::clone(&acks), Arc::clone(&aggregates), Arc::clone(&hub), leadership);
        let tls = Arc::new(own_tls(&authority, &id("operator")).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut services =
            Services::new(Arc::clone(&hub), relay, Arc::clone(&acks), aggregates, id("operator"));
        // All come over loopback.
        services.check_addresses = false;
        tokio::spawn(serve(listener, tls, services, Nobody));
        Self { address, tls: Arc::new(certificate.tls()), hub, acks }
    }

    async fn stream(&self, number: u32, names: Vec<ResourceName>) -> Stream {
        let uid = format!("pod-{number}");
        let open = Stream::open(self.address, Arc::clone(&self.tls), &uid, names);
        timeout(BOUND, open).await.unwrap().unwrap()
    }
}

/// Whether a sidecar is of the version before the small resources.
fn is_old(number: u32) -> bool {
    number % 2 == 1
}

/// What a sidecar subscribes to for what it enforces, and for these addresses.
fn wanted(number: u32, addresses: impl Iterator<Item = SocketAddr>) -> Vec<ResourceName> {
    use ResourceType::{Access, Destination, Inbound, Mtls, Route, Workload};
    let uid = format!("pod-{number}");
    let sections: &[ResourceType] = if is_old(number) { &[Inbound] } else { &[Workload, Mtls, Access] };
    let leads = if is_old(number) { Destination } else { Route };
    let sections = sections.iter().map(|section| name(*section, uid.as_str()));
    sections.chain(addresses.map(|address| name(leads, address.to_string()))).collect()
}

/// The endpoints of a Service, in an old resource or a new one.
fn endpoints(body: &resource::Body) -> Option<&[Sent]> {
    match body {
        resource::Body::Endpoints(found) => Some(&found.endpoints),
        resource::Body::Destination(found) => match &found.kind {
            Some(destination::Kind::Service(service)) => Some(&service.endpoints),
            _ => None,
        },
        _ => None,
    }
}

async fn next(stream: &mut Stream) -> resource::Body {
    let resource = timeout(BOUND, stream.next()).await.expect("nothing came").unwrap();
    resource.expect("the stream was closed").body.unwrap()
}

/// Reads until the endpoints of so many Services have come. Returns how many resources have.
async fn served(stream: &mut Stream, services: usize) -> usize {
    let (mut resources, mut found) = (0, 0);
    while found < services {
        resources += 1;
        if let Some(endpoints) = endpoints(&next(stream).await) {
            assert_eq!(endpoints.len(), ENDPOINTS as usize);
            found += 1;
        }
    }
    resources
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sidecars_that_read_nothing_hold_up_nobody_else() {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let operator = Operator::start().await;
    // They subscribe to everything, and what is returned keeps their streams open.
    let mut stuck = Vec::new();
    for number in 0..STUCK {
        stuck.push(operator.stream(number, wanted(number, (0..SERVICES).map(service_address))).await);
    }
    // All ask at once, for services of their own and for one that all of them use.
    let mine = |number: u32| wanted(number, [0, number, number + 50].into_iter().map(service_address));
    let opened = (STUCK..STUCK + SIDECARS).map(|number| operator.stream(number, mine(number)));
    let mut sidecars: Vec<(u32, Stream)> = (STUCK..).zip(join_all(opened).await).collect();
    for (number, stream) in &mut sidecars {
        // The last route comes behind its endpoints.
        let all = if is_old(*number) { 1 + 3 } else { 3 + 2 * 3 - 1 };
        assert_eq!(served(stream, 3).await, all, "sidecar {number}");
        if !is_old(*number) {
            let last = next(stream).await;
            assert!(matches!(last, resource::Body::Route(_)), "sidecar {number}: {last:?}");
            // It came with the route: this makes no difference.
            stream.subscribe(name(ResourceType::Endpoints, "shop/service-0:80")).await.unwrap();
        }
    }
    assert!(operator.acks.connected() >= SIDECARS as usize, "nobody who reads was turned away");
    operator
        .hub
        .change(|model| model.apply_slice(("shop".into(), "service-0".into()), slice("service-0", 3)));
    for (number, stream) in &mut sidecars {
        let body = next(stream).await;
        assert_eq!(endpoints(&body).map(<[Sent]>::len), Some(3), "sidecar {number}: {body:?}");
    }
    let dropped = async {
        while operator.acks.connected() != SIDECARS as usize {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(BOUND, dropped).await.expect("those who read nothing are not dropped");
    drop(stuck);
}
