//! The gRPC port: TLS 1.3, and who may call what. `Identity.Sign` needs a token, everything else a
//! certificate of this mesh; a sidecar is answered for its own pod only.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::discovery_server::{Discovery, DiscoveryServer};
use tulle_mesh::proto::identity_server::{Identity, IdentityServer};
use tulle_mesh::proto::relay_server::{Relay, RelayServer};
use tulle_mesh::proto::{
    OperatorMessage, RelayMessage, RelayReply, SidecarMessage, relay_message, sidecar_message,
};

use super::registry::Registry;
use super::relay::{LeaderRelay, report_of};
use super::session::Session;
use crate::telemetry::Aggregates;
use crate::watch::Hub;

/// New subscriptions that are computed at the same time.
const ADMITTED: usize = 16;

/// The operator's own TLS; renewed by `identity`.
#[derive(Debug)]
pub struct Tls {
    /// For connections of sidecars and of other replicas.
    pub server: RwLock<Arc<ServerConfig>>,
    /// To other replicas.
    pub client: RwLock<Arc<ClientConfig>>,
    /// Whom the certificate names.
    pub identity: WorkloadId,
}

/// A connection's verified peer; `None`: it showed no certificate.
#[derive(Clone, Debug)]
pub struct PeerIdentity(pub Option<WorkloadId>);

/// What the services share.
#[derive(Clone)]
pub struct Services {
    /// The model.
    pub hub: Arc<Hub>,
    /// Takes the sidecars' reports to the leader.
    pub relay: Arc<LeaderRelay>,
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// What is counted.
    pub aggregates: Arc<Aggregates>,
    /// Whom this operator is.
    pub me: WorkloadId,
    admission: Arc<Semaphore>,
}

impl Services {
    /// The services.
    pub fn new(
        hub: Arc<Hub>,
        relay: Arc<LeaderRelay>,
        registry: Arc<Registry>,
        aggregates: Arc<Aggregates>,
        me: WorkloadId,
    ) -> Self {
        Self { hub, relay, registry, aggregates, me, admission: Arc::new(Semaphore::new(ADMITTED)) }
    }
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, tls: Arc<Tls>, services: Services, signer: impl Identity) {
    let routes = Routes::new(DiscoveryServer::new(services.clone()))
        .add_service(RelayServer::new(services))
        .add_service(IdentityServer::new(signer));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: waiting a little lets others close.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let (tls, routes) = (Arc::clone(&tls), routes.clone());
        tokio::spawn(async move {
            if let Err(error) = connection(stream, &tls, routes).await {
                tracing::debug!(%peer, error = format!("{error:#}"), "a connection ended");
            }
        });
    }
}

async fn connection(stream: TcpStream, tls: &Tls, routes: Routes) -> Result<()> {
    stream.set_nodelay(true)?;
    let config = Arc::clone(&tls.server.read().unwrap_or_else(std::sync::PoisonError::into_inner));
    let stream = timeout(Duration::from_secs(10), TlsAcceptor::from(config).accept(stream)).await??;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = leaf.map(tulle_mesh::svid::peer_identity).transpose()?;
    let identity = PeerIdentity(identity);
    let service = tower::ServiceBuilder::new()
        .map_request(move |mut request: http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(identity.clone());
            request.map(tonic::body::Body::new)
        })
        .service(routes.prepare());
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(10))
        .max_concurrent_streams(16)
        .max_header_list_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await?;
    Ok(())
}

fn caller<T>(request: &Request<T>) -> Result<WorkloadId, Status> {
    let identity = request.extensions().get::<PeerIdentity>().and_then(|peer| peer.0.clone());
    identity.ok_or_else(|| Status::unauthenticated("a certificate of this mesh is needed"))
}

#[tonic::async_trait]
impl Discovery for Services {
    type StreamStream = ReceiverStream<Result<OperatorMessage, Status>>;

    async fn stream(
        &self,
        request: Request<Streaming<SidecarMessage>>,
    ) -> Result<Response<Self::StreamStream>, Status> {
        let identity = caller(&request)?;
        if !self.hub.is_synced() {
            return Err(Status::unavailable("the operator is still reading the cluster"));
        }
        let mut up = request.into_inner();
        let first = timeout(Duration::from_secs(10), up.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no hello"))??;
        let Some(sidecar_message::Message::Hello(hello)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument("a hello comes first"));
        };
        // A sidecar speaks for its own pod only: namespace and account are those of its certificate.
        {
            let model = self.hub.model();
            let pod =
                model.pod(&hello.pod_uid).ok_or_else(|| Status::unavailable("this pod is not known yet"))?;
            if *pod.namespace != *identity.namespace || *pod.service_account != *identity.service_account {
                self.aggregates.refused("stream", "OtherPod");
                tracing::warn!(%identity, pod = hello.pod_name, "a sidecar asked for another's pod");
                return Err(Status::permission_denied("the certificate is of another workload"));
            }
        }
        let held = hello.held.into_iter().filter_map(|held| {
            let name = held.name?;
            Some(((name.r#type, name.name), held.version))
        });
        let held: HashMap<_, _> = held.collect();
        let (down, messages) = mpsc::channel(64);
        let session = Session {
            hub: Arc::clone(&self.hub),
            relay: Arc::clone(&self.relay),
            admission: Arc::clone(&self.admission),
            pod_uid: hello.pod_uid,
            down,
        };
        tokio::spawn(session.run(up, held));
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}

#[tonic::async_trait]
impl Relay for Services {
    type ForwardStream = ReceiverStream<Result<RelayReply, Status>>;

    async fn forward(
        &self,
        request: Request<Streaming<RelayMessage>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        if caller(&request)? != self.me {
            return Err(Status::permission_denied("only replicas of the operator relay"));
        }
        let (sender, replies) = mpsc::channel(256);
        let services = self.clone();
        let mut messages = request.into_inner();
        tokio::spawn(async move {
            let mut mine: HashMap<String, u32> = HashMap::new();
            while let Ok(Some(relayed)) = messages.message().await {
                let uid = relayed.pod_uid;
                match relayed.message {
                    // Counts that are taken by one who leads no more would be lost.
                    Some(relay_message::Message::Telemetry(_)) if !services.relay.leads() => break,
                    Some(relay_message::Message::Telemetry(report)) => {
                        services.aggregates.add(&uid, &report);
                        let reply = RelayReply { pod_uid: uid, sequence: report.sequence };
                        if sender.send(Ok(reply)).await.is_err() {
                            break;
                        }
                    }
                    Some(message) => {
                        if let relay_message::Message::Connected(connected) = &message {
                            let streams = mine.entry(uid.clone()).or_default();
                            *streams = if *connected { *streams + 1 } else { streams.saturating_sub(1) };
                        }
                        if let Some(report) = report_of(message) {
                            services.registry.relayed(&uid, report);
                        }
                    }
                    None => {}
                }
            }
            // The replica is gone, and its streams with it.
            for (uid, streams) in mine {
                for _ in 0..streams {
                    services.registry.relayed(&uid, super::Report::Gone);
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

/// A connection to another replica, as tonic wants it.
#[derive(Clone)]
pub struct Peer(SendRequest<tonic::body::Body>);

impl Peer {
    /// Connects; the other side must be the operator too.
    ///
    /// # Errors
    /// What could not be reached, or was not the operator.
    pub async fn connect(address: &str, tls: &Tls) -> Result<Self> {
        let stream = TcpStream::connect((address, tulle_mesh::ports::DISCOVERY)).await?;
        let config = Arc::clone(&tls.client.read().unwrap_or_else(std::sync::PoisonError::into_inner));
        let name = ServerName::try_from("operator.tulle")?;
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        let leaf: Option<&CertificateDer<'_>> =
            stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let identity = tulle_mesh::svid::peer_identity(leaf.context("no certificate")?)?;
        anyhow::ensure!(identity == tls.identity, "{address} is {identity}, not a replica of the operator");
        let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        builder.timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(5));
        let (send, connection) = builder.handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(send))
    }
}

impl tower::Service<http::Request<tonic::body::Body>> for Peer {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
