//! The inbound path: a connection to the pod's application.
//!
//! first bytes → ours (TLS with ALPN `tulle/1`), or plain → authorise → the application. What the
//! application's own TLS carries is opaque.

mod authorize;
mod mesh;
mod plain;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::server::Acceptor;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::wire::ALPN;

use crate::claim::{Claims, introduce};
use crate::detect;
use crate::error::Failure;
use crate::http1::Head;
use crate::io::Prefixed;
use crate::listen::{canonical, original_destination};
use crate::tls::peer_identity;
use crate::worker::Worker;

/// A handshake that takes longer is abandoned.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest ClientHello that is waited for.
const MAX_HELLO: usize = 16 * 1024;

/// Who connects, and to what.
#[derive(Clone, Debug)]
pub struct Client {
    /// Whom its certificate names; `None` for plain connections.
    pub identity: Option<WorkloadId>,
    /// Its address.
    pub address: SocketAddr,
    /// The address of ours that it dialled.
    pub destination: SocketAddr,
}

impl Client {
    /// Tells the application who calls.
    fn introduce(&self, head: &mut Head) {
        introduce(head, self.identity.as_ref());
    }
}

/// Admits what a client sends as long as it claims no identity.
fn no_claims<'a>(worker: &'a Worker, client: &'a Client) -> impl FnMut(&[u8]) -> bool + 'a {
    let mut claims = Claims::default();
    move |bytes| {
        let admitted = claims.admit(bytes);
        if !admitted {
            worker.telemetry.event("refused_connection", "ClaimedIdentity");
            tracing::warn!(
                client = %client.address, identity = ?client.identity, port = client.destination.port(),
                "broken off: the client claims an identity in HTTP that is none by the standard"
            );
        }
        admitted
    }
}

/// Serves one connection to the application.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr) {
    let Some(destination) = original_destination(&stream) else {
        worker.telemetry.event("refused_connection", "NotRedirected");
        return;
    };
    if stream.set_nodelay(true).is_err() {
        return;
    }
    // Nothing is accepted before the rules are known: an allow by ignorance would be a hole.
    worker.config.inbound_known().await;
    let client = Client { identity: None, address: canonical(peer), destination };
    if let Err(failure) = accept(&worker, stream, client).await {
        worker.telemetry.event("inbound_connection", failure.name());
        tracing::debug!(%destination, %peer, %failure, "an inbound connection ended");
    }
}

async fn accept(worker: &Rc<Worker>, mut stream: TcpStream, client: Client) -> Result<(), Failure> {
    let mut buffer = BytesMut::new();
    let hello = plain::first_of_client(worker, &mut stream, &mut buffer, &client).await?;
    let Some(app) = hello else {
        if !detect::is_tls(&buffer) {
            return plain::serve(worker, stream, buffer, client, None).await;
        }
        return match offers_mesh(&mut stream, &mut buffer).await {
            true => accept_mesh(worker, Prefixed::new(stream, buffer), client).await,
            false => plain::serve(worker, stream, buffer, client, None).await,
        };
    };
    plain::serve(worker, stream, buffer, client, Some(app)).await
}

/// Whether a ClientHello offers `tulle/1`. Its bytes stay in the buffer.
async fn offers_mesh(stream: &mut TcpStream, buffer: &mut BytesMut) -> bool {
    loop {
        let mut acceptor = Acceptor::default();
        let mut bytes = &buffer[..];
        if acceptor.read_tls(&mut bytes).is_err() {
            return false;
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                return accepted
                    .client_hello()
                    .alpn()
                    .is_some_and(|mut names| names.any(|name| name == ALPN));
            }
            Ok(None) if buffer.len() < MAX_HELLO => {}
            _ => return false,
        }
        buffer.reserve(2 * 1024);
        match timeout(HANDSHAKE_TIMEOUT, stream.read_buf(buffer)).await {
            Ok(Ok(read)) if read > 0 => {}
            _ => return false,
        }
    }
}

async fn accept_mesh(worker: &Rc<Worker>, stream: Prefixed, mut client: Client) -> Result<(), Failure> {
    let configs = worker.tls.current().ok_or(Failure::UpstreamConnect)?;
    let handshake = TlsAcceptor::from(Arc::clone(&configs.mesh_server)).accept(stream);
    let stream =
        timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| Failure::Timeout("the handshake"))?;
    let stream = stream.map_err(|error| {
        tracing::info!(peer = %client.address, %error, "refused a handshake");
        Failure::ClientBadRequest("a handshake that is refused")
    })?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    client.identity = leaf.and_then(|leaf| peer_identity(leaf).ok());
    if client.identity.is_none() {
        return Err(Failure::ClientBadRequest("a certificate that names no workload"));
    }
    mesh::serve(worker, stream, client).await
}
