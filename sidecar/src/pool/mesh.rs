//! Connections to other sidecars: few per peer, each with many streams.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::pki_types::ServerName;
use socket2::SockRef;
use tokio::task::spawn_local;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;
use tulle_mesh::identity::WorkloadId;

use super::{Gate, IMPATIENT, connect, entry, handshake_limit, not_connected};
use crate::error::Failure;
use crate::io::Prefixed;
use crate::listen::MESH_UNACKNOWLEDGED;
use crate::telemetry::Limited;
use crate::tls::store::Configs;
use crate::tls::{TlsStore, peer_identity};
use crate::wire::{Connection, Receiver, Role, Sender, TLS_BUFFER, drive};

/// Streams on one connection before another is opened. A peer takes 128.
const STREAMS_PER_CONNECTION: usize = 100;
/// Connections to one peer, beside those that only wait for their last stream: an opaque connection may last for weeks,
/// and each may keep one of those.
const MAX_CONNECTIONS: usize = 256;
/// A head up to this size shares its connection with others. Earlier sidecars, which take no more, end the whole
/// connection over a longer one, with everything that runs on it.
const SHARED_HEAD: usize = 40 * 1024;
/// Connections to one peer that are opened because the others carry bulk. One thread drives them all: more
/// would only take memory.
const MAX_BESIDE_BULK: usize = 4;
/// When another one is tried after one beside bulk could not be opened.
const BESIDE_BULK_AGAIN: Duration = Duration::from_secs(1);
/// A connection that carries nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// A connection is replaced at this age, and up to a tenth earlier, so that buffers that have grown are given
/// back (a peer keeps 700 KB per connection for ever).
const MAX_AGE: Duration = Duration::from_secs(600);

/// Connections to other sidecars.
pub struct MeshPool {
    tls: Arc<TlsStore>,
    peers: RefCell<HashMap<SocketAddr, Rc<Peer>>>,
}

#[derive(Default)]
struct Peer {
    connections: RefCell<Vec<Rc<Kept>>>,
    gate: Gate,
    /// A connection beside those with bulk is being opened.
    spreading: Cell<bool>,
}

struct Kept {
    connection: Connection,
    identity: WorkloadId,
    configs: Arc<Configs>,
    born: Instant,
    max_age: Duration,
    used: Cell<Instant>,
}

/// A new stream, and whether it shares its connection with bulk.
struct Opened {
    halves: (Sender, Receiver),
    beside_bulk: bool,
}

impl MeshPool {
    /// An empty pool.
    pub fn new(tls: Arc<TlsStore>) -> Self {
        Self { tls, peers: RefCell::default() }
    }

    /// Opens a stream to a sidecar that must be `identity`. `head` writes its head, and is asked again where a
    /// connection had to be waited for: a head may say how much time there is left. `limit`: how long connecting may
    /// take, or waiting for a handshake that is under way. It `waits` as long as that is another's, whose failure is then
    /// not one more.
    ///
    /// # Errors
    /// [`Failure`] of connecting; no byte of the head was sent.
    pub async fn open(
        &self,
        address: SocketAddr,
        identity: &WorkloadId,
        head: impl Fn() -> BytesMut,
        end: bool,
        limit: Duration,
        waits: &Cell<bool>,
    ) -> Result<(Sender, Receiver), Failure> {
        let block = head();
        if block.len() > SHARED_HEAD {
            drop(block);
            return self.open_alone(address, identity, head, end, limit).await;
        }
        let peer = entry(&self.peers, address, |peer| peer.connections.borrow().is_empty());
        if let Some(opened) = peer.open(identity, &block, end) {
            if opened.beside_bulk {
                // This one does not wait for a handshake; those that follow have a connection of their own.
                self.spread(&peer, address, identity);
            }
            return Ok(opened.halves);
        }
        drop(block);
        let turn = peer.gate.enter(address, limit, waits).await?;
        if let Some(opened) = peer.open(identity, &head(), end) {
            waits.set(false);
            return Ok(opened.halves);
        }
        if let Some(failure) = turn.shared_failure() {
            return Err(failure);
        }
        waits.set(false);
        let open = in_use(peer.connections.borrow().iter().map(|kept| &kept.connection));
        if open >= MAX_CONNECTIONS {
            return Err(not_connected(address, "tulle/1", &"too many connections"));
        }
        let kept = open_connection(&self.tls, address, identity, turn.left())
            .await
            .map_err(|failure| turn.failed(failure))?;
        let stream = kept.connection.open(&head(), end);
        let stream = stream.map_err(|error| not_connected(address, "tulle/1", &error))?;
        peer.connections.borrow_mut().push(kept);
        Ok(stream)
    }

    /// Opens a stream on a connection of its own, which ends with it.
    async fn open_alone(
        &self,
        address: SocketAddr,
        identity: &WorkloadId,
        head: impl Fn() -> BytesMut,
        end: bool,
        limit: Duration,
    ) -> Result<(Sender, Receiver), Failure> {
        let alone = open_connection(&self.tls, address, identity, limit).await?;
        let stream = alone.connection.open(&head(), end);
        alone.connection.drain();
        stream.map_err(|error| not_connected(address, "tulle/1", &error))
    }

    /// Opens another connection in the background, unless there are enough.
    fn spread(&self, peer: &Rc<Peer>, address: SocketAddr, identity: &WorkloadId) {
        let open = peer.connections.borrow().iter().filter(|kept| kept.connection.takes_streams()).count();
        if open > MAX_BESIDE_BULK || peer.spreading.replace(true) {
            return;
        }
        let (tls, peer, identity) = (Arc::clone(&self.tls), Rc::clone(peer), identity.clone());
        spawn_local(async move {
            match open_connection(&tls, address, &identity, IMPATIENT).await {
                Ok(kept) => peer.connections.borrow_mut().push(kept),
                Err(_) => sleep(BESIDE_BULK_AGAIN).await,
            }
            peer.spreading.set(false);
        });
    }

    /// Ends every connection once its streams have ended and their last bytes are out.
    pub async fn drain(&self) {
        let mut all: Vec<Rc<Kept>> = Vec::new();
        for peer in self.peers.borrow().values() {
            all.extend(peer.connections.borrow().iter().cloned());
        }
        // All at once: one whose streams run on does not keep the others from their end.
        all.iter().for_each(|kept| kept.connection.drain());
        while !all.iter().all(|kept| kept.connection.is_closed()) {
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Drains what is too old, idle, or of former credentials; forgets what has ended.
    pub fn sweep(&self) {
        let current = self.tls.current();
        self.peers.borrow_mut().retain(|_, peer| {
            peer.connections.borrow_mut().retain(|kept| {
                let stale = current.as_ref().is_some_and(|configs| !Arc::ptr_eq(configs, &kept.configs));
                let idle = kept.connection.active() == 0 && kept.used.get().elapsed() > IDLE;
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
    fn open(&self, identity: &WorkloadId, head: &[u8], end: bool) -> Option<Opened> {
        let connections = self.connections.borrow();
        let of_peer = connections.iter().filter(|kept| kept.identity == *identity);
        let kept = choose(of_peer.map(|kept| (kept, &kept.connection)))?;
        let beside_bulk = kept.connection.is_bulk();
        kept.used.set(Instant::now());
        let halves = kept.connection.open(head, end).ok()?;
        Some(Opened { halves, beside_bulk })
    }
}

/// The connection for a new stream: the first without bulk, so that those opened later are idle sooner; else
/// the one with the fewest streams.
fn choose<'a, T: Copy>(all: impl Iterator<Item = (T, &'a Connection)>) -> Option<T> {
    let mut fewest: Option<(T, usize)> = None;
    for (one, connection) in all {
        let active = connection.active();
        if active >= STREAMS_PER_CONNECTION || !connection.takes_streams() {
            continue;
        }
        if !connection.is_bulk() {
            return Some(one);
        }
        if fewest.is_none_or(|(_, least)| active < least) {
            fewest = Some((one, active));
        }
    }
    fewest.map(|(one, _)| one)
}

/// How many of these may still get streams.
fn in_use<'a>(all: impl Iterator<Item = &'a Connection>) -> usize {
    all.filter(|connection| !connection.is_draining()).count()
}

/// Logs why a TLS handshake failed. A server that does not speak TLS gets a line at level warn, because connections to it
/// do not arrive at its sidecar, and nothing in its own pod can notice that.
fn handshake_failed(address: SocketAddr, error: &io::Error) -> Failure {
    static LINES: Limited = Limited::new(1);
    if is_not_tls(error)
        && let Some(suppressed) = LINES.allow()
    {
        tracing::warn!(%address, %error, suppressed, "a server with a sidecar did not answer in TLS, so its application answered in place of the sidecar; if this lasts longer than seconds, which a reused address does not, software in the pod has removed the redirect rules (nft flush ruleset): restart the pod, and let the software delete only its own tables");
    }
    not_connected(address, "TLS", error)
}

/// Whether what came is not TLS, which every sidecar speaks.
fn is_not_tls(error: &io::Error) -> bool {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(cause, Some(rustls::Error::InvalidMessage(_)))
}

async fn open_connection(
    tls: &TlsStore,
    address: SocketAddr,
    identity: &WorkloadId,
    limit: Duration,
) -> Result<Rc<Kept>, Failure> {
    let failed = |error: &dyn std::fmt::Display| not_connected(address, "TLS", error);
    let configs = tls.current().ok_or(Failure::OursNoCertificate)?;
    let stream = connect(address.into(), limit).await?;
    SockRef::from(&stream).set_tcp_user_timeout(Some(MESH_UNACKNOWLEDGED)).map_err(|error| failed(&error))?;
    // The name is not sent; whom we expect is compared below.
    let name = ServerName::try_from("mesh.tulle").map_err(|error| failed(&error))?;
    let handshake = TlsConnector::from(Arc::clone(&configs.mesh_client))
        .connect(name, Prefixed::new(stream, BytesMut::new()));
    let stream = timeout(handshake_limit(limit), handshake).await;
    let stream = stream.map_err(|error| failed(&error))?;
    let mut stream = stream.map_err(|error| handshake_failed(address, &error))?;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
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
        max_age: MAX_AGE.mul_f64(0.9 + 0.1 * fastrand::f64()),
        used: Cell::new(now),
    }))
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use bytes::Bytes;
    use tokio::io::{AsyncWriteExt as _, duplex};
    use tokio::task::LocalSet;

    use super::*;
    use crate::wire::Event;

    #[test]
    fn connections_that_wait_for_their_last_stream_leave_room_for_others() {
        let all = [Role::Client; 3].map(Connection::new);
        let _streams = all[0].open(b"lasts for weeks", false).unwrap();
        all[0].drain();
        assert_eq!(in_use(all.iter()), 2);
    }

    #[tokio::test]
    async fn a_certificate_that_we_lack_is_not_the_peers_fault() {
        let pool = MeshPool::new(Arc::default());
        let identity = WorkloadId::new("cluster.local", "shop", "web");
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let waits = Cell::new(false);
        let opened = pool.open(address, &identity, || BytesMut::from("head"), true, IMPATIENT, &waits).await;
        assert_eq!((opened.err(), waits.get()), (Some(Failure::OursNoCertificate), false));
    }

    /// The error of a handshake with a server that answers with these bytes and closes.
    async fn handshake_with(answer: &[u8]) -> io::Error {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let roots = rustls::RootCertStore::empty();
        let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let (near, mut far) = duplex(1 << 16);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let name = ServerName::try_from("mesh.tulle").unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, near).await.err().unwrap()
    }

    #[tokio::test]
    async fn an_application_that_answers_in_place_of_its_sidecar_is_not_taken_for_one_that_ends() {
        for greeting in ["HTTP/1.1 400 Bad Request\r\n\r\n", "-ERR unknown command\r\n", "220 mail ready\r\n"]
        {
            assert!(is_not_tls(&handshake_with(greeting.as_bytes()).await), "{greeting:?}");
        }
        assert!(!is_not_tls(&handshake_with(b"").await), "it has closed");
        // A fatal alert: no application protocol in common.
        assert!(!is_not_tls(&handshake_with(&[21, 3, 3, 0, 2, 2, 120]).await), "it speaks TLS");
    }

    #[tokio::test]
    async fn new_streams_avoid_connections_with_bulk_while_it_moves() {
        let test = async {
            let (near, far) = duplex(1 << 20);
            let (busy, server) = (Connection::new(Role::Client), Connection::new(Role::Server));
            spawn_local(drive(busy.clone(), near));
            spawn_local(drive(server.clone(), far));
            let other = Connection::new(Role::Client);
            let chosen = || choose([(0, &busy), (1, &other)].into_iter());
            let (sender, _receiver) = busy.open(b"bulk", false).unwrap();
            let (_, _answer, mut request) = poll_fn(|cx| server.poll_accept(cx)).await.unwrap();
            assert_eq!(chosen(), Some(0), "nothing has moved yet");
            let sending = spawn_local(async move {
                sender.data(Bytes::from(vec![0; 2 << 20])).await.unwrap();
                sender
            });
            let mut read = 0;
            while read < 2 << 20 {
                let Event::Data(bytes) = request.next().await else { panic!("it broke off") };
                read += bytes.len();
            }
            assert_eq!(chosen(), Some(1));
            assert_eq!(choose([(0, &busy)].into_iter()), Some(0), "there is no other");
            drop(sending.await.unwrap());
            assert_eq!(chosen(), Some(0), "the stream has ended");
        };
        LocalSet::new().run_until(test).await;
    }
}
