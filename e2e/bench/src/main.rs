//! Control plane of the benchmark, without Kubernetes.
//!
//! Runs the operator's discovery and certificate authority for a model of two pods and one Service, whose rules and
//! policies ([`rules`]), traces ([`traces`]) and tap ([`taps`]) files turn on and off ([`switch`]). It does not authenticate sidecars, because only the benchmark runs in its
//! network namespaces.

mod rules;
mod switch;
mod taps;
mod traces;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use rcgen::KeyPair;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{SignRequest, SignResponse};
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

use switch::{Feature, Switch};

const LIFETIME: Duration = Duration::from_secs(3600);

/// The control plane of the benchmark.
#[derive(Parser)]
struct Arguments {
    /// Address to listen on for sidecars.
    #[arg(long)]
    listen: SocketAddr,
    /// Folder for the trust bundle and Envoy's certificates.
    #[arg(long)]
    folder: PathBuf,
    /// IP address of the client.
    #[arg(long)]
    client: IpAddr,
    /// IP address of the server.
    #[arg(long)]
    server: IpAddr,
    /// ClusterIP of the Service.
    #[arg(long)]
    service: IpAddr,
}

/// Signs every request, for the pod UID in it.
struct UnauthenticatedSigner {
    authority: Arc<Authority>,
}

#[tonic::async_trait]
impl Identity for UnauthenticatedSigner {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let request = request.into_inner();
        let identity = WorkloadId::new("cluster.local", "bench", &request.pod_uid);
        let leaf = self.authority.sign_request(&request.csr_der, &identity, LIFETIME);
        let leaf = leaf.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let chain_der = leaf.chain.iter().map(|der| der.to_vec()).collect();
        Ok(Response::new(SignResponse { chain_der, not_after_unix: leaf.not_after_unix }))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let installed = rustls::crypto::aws_lc_rs::default_provider().install_default();
    installed.map_err(|_| anyhow::anyhow!("another cryptography provider is installed"))?;
    let (authority, _) = Authority::generate("cluster.local")?;
    let authority = Arc::new(authority);
    fs::write(arguments.folder.join("roots.pem"), authority.root_pem())?;
    for name in ["client", "server"] {
        let key = KeyPair::generate()?;
        let leaf = authority.sign(&key, &WorkloadId::new("cluster.local", "bench", name), LIFETIME)?;
        fs::write(arguments.folder.join(format!("{name}.key")), key.serialize_pem())?;
        fs::write(arguments.folder.join(format!("{name}.crt")), leaf.pem)?;
    }
    let hub = Arc::new(Hub::complete(model(&arguments)));
    tokio::spawn(collect(arguments.folder.join("spans")));
    let (acks, aggregates) = (Arc::new(AckTracker::default()), Arc::new(Aggregates::default()));
    let leader = Leadership { mine: true, ..Leadership::default() };
    let (_leading, leadership) = watch::channel(leader);
    let relay = LeaderRelay::new(Arc::clone(&acks), Arc::clone(&aggregates), Arc::clone(&hub), leadership);
    let me = WorkloadId::new("cluster.local", "tulle-system", "tulle-operator");
    let tls = Arc::new(own_tls(&authority, &me)?);
    let listener = TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let services = Services::new(Arc::clone(&hub), relay, acks, aggregates, me);
    let mut switch = Switch::new(hub, &arguments.folder, features(&services, &arguments.folder));
    switch.turn()?;
    tokio::spawn(switch.follow());
    serve(listener, tls, services, UnauthenticatedSigner { authority }).await;
    Ok(())
}

fn locked(tap: &Mutex<taps::Switched>) -> MutexGuard<'_, taps::Switched> {
    tap.lock().unwrap_or_else(PoisonError::into_inner)
}

fn features(services: &Services, folder: &Path) -> [Feature; 3] {
    let tap = taps::Switched::new(Arc::clone(&services.taps), folder.join("tapped"));
    let tap = Arc::new(Mutex::new(tap));
    let other = Arc::clone(&tap);
    [
        Feature::of_model("rules", rules::apply, rules::delete),
        Feature::of_model("traces", traces::apply, traces::delete),
        Feature {
            file: "taps",
            apply: Box::new(move |_| locked(&tap).apply()),
            delete: Box::new(move |_| locked(&other).delete()),
        },
    ]
}

/// Runs the collector of traces.
async fn collect(file: PathBuf) {
    if let Err(error) = traces::collect(file).await {
        eprintln!("{error:#}");
    }
}

fn model(arguments: &Arguments) -> Model {
    let mut model = Model::default();
    for (name, address) in [("client", arguments.client), ("server", arguments.server)] {
        model.apply_pod(Pod {
            uid: name.into(),
            name: name.into(),
            namespace: "bench".into(),
            service_account: name.into(),
            ips: Box::new([address]),
            injected: true,
            containers_ready: true,
            ready: true,
            ..Pod::default()
        });
    }
    let ports = [
        ("http", 80, 8080, "http"),
        ("opaque", 81, 8081, "tcp"),
        ("http2", 82, 8082, "h2c"),
        ("bulk", 5201, 5201, "tcp"),
    ];
    let service_ports = ports.iter().map(|(name, port, _, protocol)| ServicePort {
        name: (*name).to_owned(),
        port: *port,
        app_protocol: Some((*protocol).to_owned()),
    });
    let service = Service {
        cluster_ips: vec![arguments.service],
        ports: service_ports.collect(),
        ..Service::default()
    };
    let key = ("bench".into(), "server".into());
    model.apply_service(key, service);
    let endpoint = Endpoint {
        address: Some(arguments.server),
        ready: true,
        serving: true,
        pod_uid: Some("server".into()),
        ..Endpoint::default()
    };
    let slice_ports = ports.iter().map(|(name, _, port, _)| ((*name).to_owned(), *port));
    let slice = Slice { service: "server".into(), ports: slice_ports.collect(), endpoints: vec![endpoint] };
    model.apply_slice(("bench".into(), "server-1".into()), slice);
    model
}
