//! Connections that are kept: to other sidecars ([`MeshPool`]), to HTTP/1 ([`Http1Pool`]) and to HTTP/2
//! servers ([`Http2Pool`]).
//!
//! In: whom to reach, and for how long to try. Out: a stream, a connection or a place on one. What is idle, old
//! or of former credentials is closed when the worker sweeps. Nothing here knows a request.

mod http1;
mod http2;
mod mesh;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::{Instant, timeout};

pub use http1::{Http1Pool, Taken};
pub use http2::{Http2Pool, Place};
pub use mesh::MeshPool;

use crate::error::Failure;
use crate::listen::KEEPALIVE;
use crate::telemetry::Limited;
use crate::transparent;

/// Connect timeout where nobody else could serve: about as long as the kernel itself tries (`tcp_syn_retries`
/// = 6), so that an application waits as long as it would without a mesh.
pub const PATIENT: Duration = Duration::from_secs(130);
/// Connect timeout where another endpoint could serve. Allows one SYN retransmission, after a second.
pub const IMPATIENT: Duration = Duration::from_millis(1_500);
/// How long a handshake above TCP may take: it needs the other process, not only its kernel.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// The same where nobody else could serve.
const PATIENT_HANDSHAKE: Duration = Duration::from_secs(10);
/// Servers that a pool knows at once. Beyond it those without a connection are forgotten.
const MAX_SERVERS: usize = 10_000;

/// A server, and whose address it must see.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// The address that connections to it come from (`tulle.dev/source-address: preserve`); `None`: the pod's
    /// own.
    pub source: Option<IpAddr>,
}

impl From<SocketAddr> for Server {
    fn from(address: SocketAddr) -> Self {
        Self { address, source: None }
    }
}

/// Connects, within `limit`. The connection is not shared, and not kept.
///
/// # Errors
/// [`Failure::UpstreamConnect`], whose cause is logged at debug level; [`Failure::OursResources`] where this pod lacks
/// something.
pub async fn connect(server: Server, limit: Duration) -> Result<TcpStream, Failure> {
    let connected = match server.source {
        Some(source) => transparent::connect(source, server.address, limit).await,
        None => timeout(limit, TcpStream::connect(server.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())),
    };
    connected.and_then(prepare).map_err(|error| failed(server.address, &error))
}

fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(&stream);
    socket.set_tcp_keepalive(&KEEPALIVE)?;
    // An urgent byte keeps its place in the stream, as on accepted connections.
    socket.set_out_of_band_inline(true)?;
    Ok(stream)
}

/// Logs why a connection could not be opened, and says whose fault it is.
fn failed(address: SocketAddr, error: &io::Error) -> Failure {
    static LINES: Limited = Limited::new(1);
    let failure = Failure::connecting(error);
    if failure != Failure::OursResources {
        return not_connected(address, "TCP", error);
    }
    if let Some(suppressed) = LINES.allow() {
        tracing::warn!(%address, %error, suppressed, "cannot connect for want of a resource of this pod");
    }
    failure
}

/// Logs why a server cannot be used, and at which step.
fn not_connected(address: SocketAddr, step: &'static str, error: &dyn std::fmt::Display) -> Failure {
    tracing::debug!(%address, step, %error, "cannot connect to a server");
    Failure::UpstreamConnect
}

/// How long a handshake above TCP may take when connecting may take `limit`.
fn handshake_limit(limit: Duration) -> Duration {
    limit.clamp(HANDSHAKE_TIMEOUT, PATIENT_HANDSHAKE)
}

/// Lets one connection to a server be opened at a time: those who wait find a place on it, or share its
/// failure instead of trying a dead address one after another.
#[derive(Default)]
struct Gate {
    one: Mutex<()>,
    failed: RefCell<Option<Failed>>,
}

struct Failed {
    at: Instant,
    /// Who waits for longer than this tries again.
    tried: Duration,
    failure: Failure,
}

/// Somebody's turn to open a connection.
struct Entered<'a> {
    gate: &'a Gate,
    asked: Instant,
    entered: Instant,
    limit: Duration,
    _one: MutexGuard<'a, ()>,
}

impl Gate {
    /// Waits for a turn, and says that it `waits`: until it does not, a failure is that of whoever has the turn.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`] when it takes longer than `limit`.
    async fn enter(
        &self,
        address: SocketAddr,
        limit: Duration,
        waits: &Cell<bool>,
    ) -> Result<Entered<'_>, Failure> {
        let asked = Instant::now();
        waits.set(true);
        let one = timeout(limit, self.one.lock())
            .await
            .map_err(|_| not_connected(address, "another handshake", &"it has not ended in time"))?;
        Ok(Entered { gate: self, asked, entered: Instant::now(), limit, _one: one })
    }
}

impl Entered<'_> {
    /// The failure of one that ended while this one waited.
    fn shared_failure(&self) -> Option<Failure> {
        let failed = self.gate.failed.borrow();
        let failed =
            failed.as_ref().filter(|failed| failed.at >= self.asked && failed.tried >= self.limit)?;
        Some(failed.failure.clone())
    }

    /// Notes a failure for those who wait.
    fn failed(&self, failure: Failure) -> Failure {
        let now = Instant::now();
        // A refusal holds for everybody, a timeout for those who would not have waited for longer.
        let timed_out = now.duration_since(self.entered) >= self.left();
        let tried = if timed_out { self.left() } else { Duration::MAX };
        self.gate.failed.replace(Some(Failed { at: now, tried, failure: failure.clone() }));
        failure
    }

    /// What is left of the limit.
    fn left(&self) -> Duration {
        self.limit.saturating_sub(self.entered.duration_since(self.asked))
    }
}

/// The entry of a server; room is made among those that `is_empty` and that nobody uses.
fn entry<K, T>(table: &RefCell<HashMap<K, Rc<T>>>, key: K, is_empty: impl Fn(&T) -> bool) -> Rc<T>
where
    K: Eq + std::hash::Hash,
    T: Default,
{
    let mut table = table.borrow_mut();
    if let Some(known) = table.get(&key) {
        return Rc::clone(known);
    }
    if table.len() >= MAX_SERVERS {
        table.retain(|_, server| Rc::strong_count(server) > 1 || !is_empty(server));
    }
    Rc::clone(table.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_with_those_who_would_not_have_tried_for_longer() {
        let gate = Gate::default();
        let address = SocketAddr::from(([192, 0, 2, 1], 80));
        let trying = async {
            let entered = gate.enter(address, IMPATIENT, &Cell::new(false)).await.unwrap();
            tokio::time::sleep(IMPATIENT).await;
            entered.failed(Failure::UpstreamConnect)
        };
        let wait =
            async |limit| gate.enter(address, limit, &Cell::new(false)).await.unwrap().shared_failure();
        let (impatient, patient) = (wait(Duration::from_millis(1_500)), wait(PATIENT));
        let (_, patient, impatient) = tokio::join!(trying, patient, async {
            tokio::time::sleep(Duration::from_millis(10)).await;
            impatient.await
        });
        assert_eq!(impatient, Some(Failure::UpstreamConnect));
        assert_eq!(patient, None, "it was tried for a second and a half only");
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_in_flight_is_waited_for_no_longer_than_the_limit() {
        let gate = Gate::default();
        let address = SocketAddr::from(([192, 0, 2, 1], 80));
        let waits = Cell::new(false);
        let _first = gate.enter(address, PATIENT, &Cell::new(false)).await.unwrap();
        let since = Instant::now();
        assert!(gate.enter(address, IMPATIENT, &waits).await.is_err());
        assert!(waits.get(), "it has opened none itself");
        assert_eq!(since.elapsed().as_millis() / 10, IMPATIENT.as_millis() / 10);
    }

    #[test]
    fn what_this_pod_lacks_is_told_from_an_endpoint_that_refuses() {
        let address = SocketAddr::from(([192, 0, 2, 1], 80));
        assert_eq!(failed(address, &io::Error::from_raw_os_error(24)), Failure::OursResources);
        assert_eq!(failed(address, &io::ErrorKind::ConnectionRefused.into()), Failure::UpstreamConnect);
        assert_eq!(failed(address, &io::ErrorKind::TimedOut.into()), Failure::UpstreamConnect);
    }

    #[test]
    fn a_full_table_forgets_servers_without_connections_only() {
        let table = RefCell::default();
        let kept = |server: &RefCell<u32>| *server.borrow() == 0;
        for key in 0..MAX_SERVERS {
            entry(&table, key, kept).replace(u32::from(key % 2 == 0));
        }
        entry(&table, usize::MAX, kept);
        assert_eq!(table.borrow().len(), MAX_SERVERS / 2 + 1);
    }
}
