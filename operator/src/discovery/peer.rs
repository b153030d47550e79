//! The operator's own TLS, and connections to other replicas.

use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tulle_mesh::identity::WorkloadId;

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

/// A connection to another replica, as tonic wants it.
#[derive(Clone)]
pub struct Peer(SendRequest<tonic::body::Body>);

impl Peer {
    /// Connects; the other side must be the operator too.
    ///
    /// # Errors
    /// What could not be reached, or was not the operator.
    pub async fn connect(address: &str, tls: &Tls) -> Result<Self> {
        timeout(Duration::from_secs(10), Self::connect_for_ever(address, tls))
            .await
            .context("connecting took longer than 10 s")?
    }

    async fn connect_for_ever(address: &str, tls: &Tls) -> Result<Self> {
        let stream = TcpStream::connect((address, tulle_mesh::ports::DISCOVERY)).await?;
        let config = Arc::clone(&tls.client.read().unwrap_or_else(PoisonError::into_inner));
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
