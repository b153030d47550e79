//! Connections that are kept: to other sidecars, to HTTP/1 and to HTTP/2 servers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tulle_mesh::identity::WorkloadId;

use crate::error::Failure;
use crate::http1::conn::split;
use crate::http1::{Reader, Writer};
use crate::http2;
use crate::io::Prefixed;
use crate::listen::KEEPALIVE;
use crate::tls::store::Configs;
use crate::tls::{TlsStore, peer_identity};
use crate::wire::{Connection, Receiver, Role, Sender, drive};

/// A TCP connection within a cluster that takes longer is not coming. One lost packet is sent again after a
/// second.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// The same to the pod's own application: one that has too much to do may accept late, and is the only one.
pub const APP_TIMEOUT: Duration = Duration::from_secs(5);
/// The same with a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Streams on one connection before another is opened.
const STREAMS_PER_CONNECTION: usize = 100;
/// A connection between sidecars that carries nothing for this long is closed.
const MESH_IDLE: Duration = Duration::from_secs(60);
/// A connection between sidecars is replaced at this age, and up to a tenth earlier, so that buffers
/// that have grown are given back (a peer keeps 700 KB per connection for ever).
const MESH_MAX_AGE: Duration = Duration::from_secs(600);
/// A connection to an HTTP/1 server that carries nothing for this long is closed.
const HTTP1_IDLE: Duration = Duration::from_secs(20);
/// The same of HTTP/2.
const HTTP2_IDLE: Duration = Duration::from_secs(60);
/// Kept connections to one HTTP/1 server.
const HTTP1_KEPT: usize = 128;

/// Connects.
///
/// # Errors
/// [`Failure::UpstreamConnect`].
pub async fn connect(address: SocketAddr) -> Result<TcpStream, Failure> {
    connect_within(address, CONNECT_TIMEOUT).await
}

/// Connects, and waits for as long as this.
///
/// # Errors
/// [`Failure::UpstreamConnect`].
pub async fn connect_within(address: SocketAddr, limit: Duration) -> Result<TcpStream, Failure> {
    let stream = timeout(limit, TcpStream::connect(address)).await;
    let stream = stream.map_err(|_| Failure::UpstreamConnect)?.map_err(|_| Failure::UpstreamConnect)?;
    stream.set_nodelay(true).map_err(|_| Failure::UpstreamConnect)?;
    SockRef::from(&stream).set_tcp_keepalive(&KEEPALIVE).map_err(|_| Failure::UpstreamConnect)?;
    Ok(stream)
}

/// Connections to other sidecars.
pub struct MeshPool {
    tls: Arc<TlsStore>,
    peers: RefCell<HashMap<SocketAddr, Rc<Peer>>>,
}

#[derive(Default)]
struct Peer {
    connections: RefCell<Vec<Rc<Kept>>>,
    /// One handshake at a time: those who wait will find its connection.
    connecting: Mutex<()>,
    /// When a handshake last failed, and of what: those who waited for it share its outcome, instead of
    /// trying a dead address one after another.
    failed: RefCell<Option<(Instant, Failure)>>,
}

struct Kept {
    connection: Connection,
    identity: WorkloadId,
    configs: Arc<Configs>,
    born: Instant,
    max_age: Duration,
    used: Cell<Instant>,
}

impl MeshPool {
    /// An empty pool.
    pub fn new(tls: Arc<TlsStore>) -> Self {
        Self { tls, peers: RefCell::default() }
    }

    /// Opens a stream to a sidecar that must be `identity`.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`] or [`Failure::UpstreamIdentity`]; no byte of the head was sent.
    pub async fn open(
        &self,
        address: SocketAddr,
        identity: &WorkloadId,
        head: &[u8],
        end: bool,
    ) -> Result<(Sender, Receiver), Failure> {
        let peer = Rc::clone(self.peers.borrow_mut().entry(address).or_default());
        if let Some(stream) = peer.open(identity, head, end) {
            return Ok(stream);
        }
        let asked = Instant::now();
        let _one_at_a_time = peer.connecting.lock().await;
        if let Some(stream) = peer.open(identity, head, end) {
            return Ok(stream);
        }
        if let Some((_, failure)) = peer.failed.borrow().as_ref().filter(|(at, _)| *at >= asked) {
            return Err(failure.clone());
        }
        let kept = match self.connect(address, identity).await {
            Ok(kept) => kept,
            Err(failure) => {
                peer.failed.replace(Some((Instant::now(), failure.clone())));
                return Err(failure);
            }
        };
        let stream = kept.connection.open(head, end).map_err(|_| Failure::UpstreamConnect)?;
        peer.connections.borrow_mut().push(kept);
        Ok(stream)
    }

    async fn connect(&self, address: SocketAddr, identity: &WorkloadId) -> Result<Rc<Kept>, Failure> {
        let configs = self.tls.current().ok_or(Failure::UpstreamConnect)?;
        let stream = connect(address).await?;
        // The name is not sent; whom we expect is compared below.
        let name = ServerName::try_from("mesh.tulle").map_err(|_| Failure::UpstreamConnect)?;
        let handshake = TlsConnector::from(Arc::clone(&configs.mesh_client))
            .connect(name, Prefixed::new(stream, BytesMut::new()));
        let stream = timeout(HANDSHAKE_TIMEOUT, handshake).await.map_err(|_| Failure::UpstreamConnect)?;
        let stream = stream.map_err(|error| {
            tracing::debug!(%address, %error, "no handshake with a sidecar");
            Failure::UpstreamConnect
        })?;
        let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let named = leaf.and_then(|leaf| peer_identity(leaf).ok());
        if named.as_ref() != Some(identity) {
            tracing::warn!(%address, expected = %identity, found = ?named, "a stale endpoint: another workload has its address");
            return Err(Failure::UpstreamIdentity);
        }
        let connection = Connection::new(Role::Client);
        let driven = connection.clone();
        spawn_local(async move {
            if let Err(error) = drive(driven, stream).await {
                tracing::debug!(%address, %error, "a connection to a sidecar ended");
            }
        });
        let now = Instant::now();
        Ok(Rc::new(Kept {
            connection,
            identity: identity.clone(),
            configs,
            born: now,
            max_age: MESH_MAX_AGE.mul_f64(0.9 + 0.1 * fastrand::f64()),
            used: Cell::new(now),
        }))
    }

    /// Ends every connection once its streams have ended and their last bytes are out.
    pub async fn drain(&self) {
        let peers: Vec<Rc<Peer>> = self.peers.borrow().values().cloned().collect();
        for peer in peers {
            let kept: Vec<Rc<Kept>> = peer.connections.borrow().clone();
            kept.iter().for_each(|kept| kept.connection.drain());
            while !kept.iter().all(|kept| kept.connection.is_closed()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    /// Drains what is too old, idle, or of former credentials; forgets what has ended.
    pub fn sweep(&self) {
        let current = self.tls.current();
        self.peers.borrow_mut().retain(|_, peer| {
            peer.connections.borrow_mut().retain(|kept| {
                let stale = current.as_ref().is_some_and(|configs| !Arc::ptr_eq(configs, &kept.configs));
                let idle = kept.connection.active() == 0 && kept.used.get().elapsed() > MESH_IDLE;
                if stale || idle || kept.born.elapsed() > kept.max_age {
                    kept.connection.drain();
                }
                !kept.connection.is_closed()
            });
            !peer.connections.borrow().is_empty() || Rc::strong_count(peer) > 1
        });
    }
}

impl Peer {
    fn open(&self, identity: &WorkloadId, head: &[u8], end: bool) -> Option<(Sender, Receiver)> {
        let connections = self.connections.borrow();
        let free = |kept: &&Rc<Kept>| {
            kept.connection.takes_streams()
                && kept.connection.active() < STREAMS_PER_CONNECTION
                && kept.identity == *identity
        };
        let kept = connections.iter().find(free)?;
        kept.used.set(Instant::now());
        kept.connection.open(head, end).ok()
    }
}

/// A connection that carries nothing, and since when.
type Idle = (Reader, Writer, Instant);

/// Connections to HTTP/1 servers that may carry another request.
#[derive(Default)]
pub struct Http1Pool {
    idle: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
}

impl Http1Pool {
    /// A kept connection that is still quiet, the youngest first.
    pub fn take(&self, address: SocketAddr) -> Option<(Reader, Writer)> {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.get_mut(&address)?;
        while let Some((mut reader, writer, since)) = kept.pop() {
            if since.elapsed() < HTTP1_IDLE && reader.is_quiet() {
                return Some((reader, writer));
            }
        }
        None
    }

    /// Keeps a connection that has ended its exchange cleanly.
    pub fn put(&self, address: SocketAddr, reader: Reader, writer: Writer) {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.entry(address).or_default();
        if kept.len() < HTTP1_KEPT {
            kept.push((reader, writer, Instant::now()));
        }
    }

    /// Connects anew, within this time.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`].
    pub async fn connect(&self, address: SocketAddr, limit: Duration) -> Result<(Reader, Writer), Failure> {
        Ok(split(connect_within(address, limit).await?, BytesMut::new()))
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        self.idle.borrow_mut().retain(|_, kept| {
            kept.retain_mut(|(reader, _, since)| since.elapsed() < HTTP1_IDLE && reader.is_quiet());
            !kept.is_empty()
        });
    }
}

/// Connections to HTTP/2 servers, each shared by as many requests as the server takes at once.
#[derive(Default)]
pub struct Http2Pool {
    servers: RefCell<HashMap<SocketAddr, Rc<Server>>>,
}

#[derive(Default)]
struct Server {
    connections: RefCell<Vec<Rc<Shared>>>,
    /// One is opened at a time: those who wait will find places on it, or share its failure.
    connecting: Mutex<()>,
    failed: Cell<Option<Instant>>,
}

impl Server {
    /// A place on a kept connection that takes requests.
    async fn place(&self) -> Option<(h2::client::SendRequest<Bytes>, Place)> {
        loop {
            let place = self.connections.borrow().iter().find_map(Shared::place)?;
            match place.0.send.clone().ready().await {
                Ok(send) => return Some((send, place)),
                Err(_) => place.0.closed.set(true),
            }
        }
    }
}

struct Shared {
    send: h2::client::SendRequest<Bytes>,
    active: Cell<usize>,
    used: Cell<Instant>,
    closed: Cell<bool>,
}

impl Shared {
    /// A place, if there is one: a request beyond what the server takes would wait for another to end.
    fn place(self: &Rc<Self>) -> Option<Place> {
        let most = self.send.current_max_send_streams().min(STREAMS_PER_CONNECTION);
        if self.closed.get() || self.active.get() >= most {
            return None;
        }
        self.active.set(self.active.get() + 1);
        Some(Place(Rc::clone(self)))
    }
}

/// The place of a request on a connection that it shares.
pub struct Place(Rc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get().saturating_sub(1));
        self.0.used.set(Instant::now());
    }
}

impl Http2Pool {
    /// A connection that takes a request, the request's place on it, and whether it is a kept one. `limit`: how
    /// long connecting may take.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`].
    pub async fn ready(
        &self,
        address: SocketAddr,
        limit: Duration,
    ) -> Result<(h2::client::SendRequest<Bytes>, Place, bool), Failure> {
        let server = Rc::clone(self.servers.borrow_mut().entry(address).or_default());
        if let Some((send, place)) = server.place().await {
            return Ok((send, place, true));
        }
        let asked = Instant::now();
        let _one_at_a_time = server.connecting.lock().await;
        if let Some((send, place)) = server.place().await {
            return Ok((send, place, true));
        }
        if server.failed.get().is_some_and(|at| at >= asked) {
            return Err(Failure::UpstreamConnect);
        }
        let opened = Self::open(address, limit).await;
        let (send, shared) = opened.inspect_err(|_| server.failed.set(Some(Instant::now())))?;
        let place = shared.place().ok_or(Failure::UpstreamConnect)?;
        server.connections.borrow_mut().push(shared);
        Ok((send, place, false))
    }

    async fn open(
        address: SocketAddr,
        limit: Duration,
    ) -> Result<(h2::client::SendRequest<Bytes>, Rc<Shared>), Failure> {
        let stream = connect_within(address, limit).await?;
        let handshake = timeout(HANDSHAKE_TIMEOUT, http2::client().handshake(stream)).await;
        let handshake = handshake.map_err(|_| Failure::UpstreamConnect)?;
        let (send, connection) = handshake.map_err(|_| Failure::UpstreamConnect)?;
        let shared = Rc::new(Shared {
            send: send.clone(),
            active: Cell::new(0),
            used: Cell::new(Instant::now()),
            closed: Cell::new(false),
        });
        let driven = Rc::downgrade(&shared);
        spawn_local(async move {
            let _ = connection.await;
            if let Some(shared) = driven.upgrade() {
                shared.closed.set(true);
            }
        });
        let send = send.ready().await.map_err(|_| Failure::UpstreamConnect)?;
        Ok((send, shared))
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        self.servers.borrow_mut().retain(|_, server| {
            server.connections.borrow_mut().retain(|shared| {
                let idle = shared.active.get() == 0 && shared.used.get().elapsed() > HTTP2_IDLE;
                !idle && !shared.closed.get()
            });
            !server.connections.borrow().is_empty() || Rc::strong_count(server) > 1
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    /// An HTTP/2 server that takes two requests at once, and answers none.
    async fn server() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn_local(async move {
                    let mut builder = h2::server::Builder::new();
                    let handshake = builder.max_concurrent_streams(2).handshake::<_, Bytes>(stream);
                    let mut connection = handshake.await.unwrap();
                    while connection.accept().await.is_some() {}
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn a_request_beyond_what_a_server_takes_at_once_goes_over_another_connection() {
        let test = async {
            let (address, pool) = (server().await, Http2Pool::default());
            let ready = || pool.ready(address, CONNECT_TIMEOUT);
            let (send, first, kept) = ready().await.unwrap();
            assert!(!kept);
            // What the server takes is known with its settings.
            for _ in 0..500 {
                if send.current_max_send_streams() == 2 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let (_, second, kept) = ready().await.unwrap();
            assert!(kept, "there is another place");
            let (_, third, kept) = ready().await.unwrap();
            assert!(!kept, "it would wait for one of the others to end");
            drop((first, second, third));
            let (_, _, kept) = ready().await.unwrap();
            assert!(kept);
        };
        LocalSet::new().run_until(test).await;
    }

    #[tokio::test]
    async fn all_who_wait_for_a_server_that_is_gone_are_told_at_once() {
        let test = async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            drop(listener);
            let pool = Http2Pool::default();
            let all = (0..50).map(|_| pool.ready(address, CONNECT_TIMEOUT));
            let all = futures::future::join_all(all).await;
            assert!(all.into_iter().all(|one| matches!(one, Err(Failure::UpstreamConnect))));
        };
        LocalSet::new().run_until(test).await;
    }
}
