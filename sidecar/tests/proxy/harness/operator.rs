//! The control plane: the operator's own discovery and certificate authority, and a model that tests write. It does
//! not ask who a sidecar is, because only tests connect.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rcgen::KeyPair;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio::runtime::Builder;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::identity_server::Identity;
use tulle_mesh::proto::{SignRequest, SignResponse};
use tulle_operator::discovery::AckTracker;
use tulle_operator::discovery::relay::LeaderRelay;
use tulle_operator::discovery::server::{Services, serve};
use tulle_operator::identity::authority::Authority;
use tulle_operator::lease::Leadership;
use tulle_operator::model::Model;
use tulle_operator::run::own_tls;
use tulle_operator::telemetry::Aggregates;
use tulle_operator::watch::Hub;
use tulle_sidecar::listen::Descriptors;
use tulle_sidecar::tls::{Credentials, TlsStore};

use super::{NAMESPACE, TRUST_DOMAIN};

const LIFETIME: Duration = Duration::from_secs(3600);

/// Whom the operator's certificate names.
pub fn identity() -> WorkloadId {
    WorkloadId::new(TRUST_DOMAIN, "tulle-system", "tulle-operator")
}

/// Signs every request. The service account of a pod is called like its uid.
struct UnauthenticatedSigner(Arc<Authority>);

#[tonic::async_trait]
impl Identity for UnauthenticatedSigner {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let request = request.into_inner();
        let identity = WorkloadId::new(TRUST_DOMAIN, NAMESPACE, &request.pod_uid);
        let leaf = self.0.sign_request(&request.csr_der, &identity, LIFETIME);
        let leaf = leaf.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let chain_der = leaf.chain.iter().map(|der| der.to_vec()).collect();
        Ok(Response::new(SignResponse { chain_der, not_after_unix: leaf.not_after_unix }))
    }
}

/// An operator on a thread of its own; it ends with this value.
pub struct Operator {
    /// Where sidecars reach it.
    pub address: SocketAddr,
    authority: Arc<Authority>,
    hub: Arc<Hub>,
    stop: CancellationToken,
}

impl Operator {
    /// Starts one whose world is empty.
    pub fn start() -> Self {
        // A whole cluster in one process: more than the 1,024 descriptors that shells allow.
        Descriptors::raise();
        // Another test may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let authority = Arc::new(Authority::generate(TRUST_DOMAIN).unwrap().0);
        let hub = Arc::new(Hub::complete(Model::default()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let operator = Self { address, authority, hub, stop: CancellationToken::new() };
        let (authority, hub) = (Arc::clone(&operator.authority), Arc::clone(&operator.hub));
        let stop = operator.stop.clone();
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(stop.run_until_cancelled(run(listener, authority, hub)));
        });
        operator
    }

    /// Changes the model.
    pub fn change(&self, change: impl FnOnce(&mut Model)) {
        self.hub.change(change);
    }

    /// The trust bundle.
    pub fn root_pem(&self) -> &str {
        self.authority.root_pem()
    }

    /// The credentials of a workload that is not a pod here.
    pub fn credentials(&self, account: &str) -> TlsStore {
        let key = KeyPair::generate().unwrap();
        let identity = WorkloadId::new(TRUST_DOMAIN, NAMESPACE, account);
        let leaf = self.authority.sign(&key, &identity, LIFETIME).unwrap();
        let credentials = Credentials {
            chain: leaf.chain,
            key: PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
            not_after: leaf.not_after_unix,
        };
        let store = TlsStore::default();
        store.install(TRUST_DOMAIN, &credentials, &[self.authority.root().clone()]).unwrap();
        store
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn run(listener: std::net::TcpListener, authority: Arc<Authority>, hub: Arc<Hub>) {
    let (acks, aggregates) = (Arc::new(AckTracker::default()), Arc::new(Aggregates::default()));
    let leader = Leadership { mine: true, ..Leadership::default() };
    let (_leading, leadership) = watch::channel(leader);
    let relay = LeaderRelay::new(Arc::clone(&acks), Arc::clone(&aggregates), Arc::clone(&hub), leadership);
    let tls = Arc::new(own_tls(&authority, &identity()).unwrap());
    let mut services = Services::new(hub, relay, acks, aggregates, identity());
    // All come over loopback.
    services.check_addresses = false;
    let listener = TcpListener::from_std(listener).unwrap();
    serve(listener, tls, services, UnauthenticatedSigner(authority)).await;
}
