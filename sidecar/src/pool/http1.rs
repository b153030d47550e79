//! Connections to HTTP/1 servers that may carry another request.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::Instant;

use super::{MAX_SERVERS, Server, connect};
use crate::error::Failure;
use crate::http1::conn::split;
use crate::http1::{Reader, Writer};

/// A connection that carries nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(20);
/// Kept connections to one server.
const KEPT: usize = 128;
/// Kept connections to all servers: each is a file descriptor.
const KEPT_IN_ALL: usize = 2_048;

/// A server that keeps connections is taken to keep one for so long after its answer. Usual limits are a second and
/// more: with those of 1 s (gunicorn, Node) and 5 s (Node), 7 of 247 POSTs failed that came when a kept connection was
/// about that old.
const YOUNG: Duration = Duration::from_millis(500);
/// For so long it is remembered that a server closes its connections after their first answer without announcing it.
const REMEMBERED: Duration = Duration::from_secs(300);
/// A server that restarts or crashes closes its connections too, young ones among them, but all within this time.
const RESTART: Duration = Duration::from_secs(1);

/// A connection that carries nothing.
struct Idle {
    source: Option<IpAddr>,
    reader: Reader,
    writer: Writer,
    since: Instant,
    /// When its server began its last answer: it cannot have waited for longer, however slowly the client has read.
    answered: Instant,
    /// It had carried a request before the last one, or nothing is known of that.
    reused: bool,
}

impl Idle {
    /// Whether it may carry another request.
    fn is_alive(&mut self) -> bool {
        self.since.elapsed() < IDLE && self.reader.is_quiet()
    }

    fn is_young(&self) -> bool {
        self.answered.elapsed() < YOUNG
    }
}

/// A kept connection that another request takes.
pub struct Taken {
    /// Where answers come from.
    pub reader: Reader,
    /// Where requests go.
    pub writer: Writer,
    /// The server began an answer on it a moment ago, and is not known to close connections soon: if it breaks off now,
    /// that is not because the connection was idle.
    pub in_use: bool,
}

/// What is kept to one address.
#[derive(Default)]
struct Kept {
    /// The youngest last.
    idle: Vec<Idle>,
    /// When the server was first seen to have closed a connection soon after its first answer.
    suspected_at: Option<Instant>,
    /// Until when the server is taken for one that closes each connection soon after its answer.
    closes_until: Option<Instant>,
}

impl Kept {
    fn closes_soon(&self) -> bool {
        self.closes_until.is_some_and(|until| Instant::now() < until)
    }

    fn is_suspected(&self) -> bool {
        self.suspected_at.is_some_and(|at| at.elapsed() < REMEMBERED)
    }

    /// The server has closed a connection soon after its first answer, which was kept at `since`. Once is not enough: a
    /// fresh connection for each request, of many, would use up the ports of a pod (28,000, each for a minute).
    fn closed_early(&mut self, since: Instant) {
        let now = Instant::now();
        if !self.is_suspected() {
            self.suspected_at = Some(now);
        } else if self.suspected_at.is_some_and(|at| since >= at + RESTART) {
            self.closes_until = Some(now + REMEMBERED);
        }
    }
}

/// Connections to HTTP/1 servers that may carry another request.
#[derive(Default)]
pub struct Http1Pool {
    idle: RefCell<HashMap<SocketAddr, Kept>>,
    kept: Cell<usize>,
}

impl Http1Pool {
    /// A kept connection that is still quiet, the youngest first.
    pub fn take(&self, server: Server) -> Option<Taken> {
        self.youngest(server, |_| true)
    }

    /// The same for a request that must not meet a server that is closing: only a connection which the server has used
    /// a moment ago, and no server that is known to close soon. One that is passed over is closed, because a fresh one
    /// takes its place: otherwise they would gather, and keep a server of one connection at a time waiting.
    pub fn take_young(&self, server: Server) -> Option<Taken> {
        self.youngest(server, |in_use| in_use)
    }

    fn youngest(&self, server: Server, suits: impl Fn(bool) -> bool) -> Option<Taken> {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.get_mut(&server.address)?;
        while let Some(place) = kept.idle.iter().rposition(|one| one.source == server.source) {
            // Those behind it, if any, come from other addresses and may be in any order.
            let mut one = kept.idle.swap_remove(place);
            self.kept.set(self.kept.get().saturating_sub(1));
            if one.is_alive() {
                let in_use = one.is_young() && !kept.closes_soon();
                return suits(in_use).then_some(Taken { reader: one.reader, writer: one.writer, in_use });
            }
            // One that had been used again belongs to a server that keeps connections, and has restarted, say.
            if one.is_young() && !one.reused {
                kept.closed_early(one.since);
            }
        }
        None
    }

    /// Keeps a connection that has ended its exchange cleanly.
    pub fn put(&self, server: Server, reader: Reader, writer: Writer) {
        self.put_after(server, reader, writer, None, true);
    }

    /// The same, and when its last answer began (`None`: now). `reused`: it had carried another request before, or
    /// nothing is known of that.
    pub fn put_after(
        &self,
        server: Server,
        reader: Reader,
        writer: Writer,
        answered: Option<Instant>,
        reused: bool,
    ) {
        let mut idle = self.idle.borrow_mut();
        if self.kept.get() >= KEPT_IN_ALL || idle.len() >= MAX_SERVERS {
            return;
        }
        let kept = &mut idle.entry(server.address).or_default().idle;
        if kept.len() < KEPT {
            self.kept.set(self.kept.get() + 1);
            let since = Instant::now();
            let answered = answered.unwrap_or(since);
            kept.push(Idle { source: server.source, reader, writer, since, answered, reused });
        }
    }

    /// Connects anew, within this time.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`].
    pub async fn connect(&self, server: Server, limit: Duration) -> Result<(Reader, Writer), Failure> {
        Ok(split(connect(server, limit).await?, BytesMut::new()))
    }

    /// Closes what is kept to this address, from whatever source: the server has others to attend to.
    pub fn close_idle(&self, address: SocketAddr) {
        let mut idle = self.idle.borrow_mut();
        let closed = idle.get_mut(&address).map(|kept| std::mem::take(&mut kept.idle));
        self.kept.set(self.kept.get().saturating_sub(closed.map_or(0, |closed| closed.len())));
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        let mut left = 0;
        self.idle.borrow_mut().retain(|_, kept| {
            kept.idle.retain_mut(Idle::is_alive);
            left += kept.idle.len();
            !kept.idle.is_empty() || kept.closes_soon() || kept.is_suspected()
        });
        self.kept.set(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::timeout;

    async fn kept(pool: &Http1Pool, listener: &TcpListener, source: Option<IpAddr>) -> (Server, TcpStream) {
        let address = listener.local_addr().unwrap();
        let (reader, writer) = pool.connect(address.into(), Duration::from_secs(1)).await.unwrap();
        let server = Server { address, source };
        pool.put(server, reader, writer);
        (server, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn a_connection_is_taken_by_the_source_that_it_comes_from_only() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Http1Pool::default();
        let (plain, _a) = kept(&pool, &listener, None).await;
        let (of_client, _b) = kept(&pool, &listener, Some([10, 0, 0, 1].into())).await;
        let of_other = Server { source: Some([10, 0, 0, 2].into()), ..plain };
        assert!(pool.take(of_other).is_none());
        assert!(pool.take(plain).is_some() && pool.take(plain).is_none());
        assert!(pool.take(of_client).is_some());
        assert_eq!(pool.kept.get(), 0);
    }

    #[tokio::test]
    async fn idle_connections_are_closed_when_others_wait() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Http1Pool::default();
        let (server, mut peer) = kept(&pool, &listener, None).await;
        pool.close_idle(server.address);
        let read = timeout(Duration::from_secs(1), peer.read(&mut [0])).await.expect("it is still open");
        assert_eq!(read.unwrap(), 0);
        assert!(pool.take(server).is_none());
        assert_eq!(pool.kept.get(), 0);
    }

    #[tokio::test]
    async fn a_connection_that_the_server_has_closed_is_not_taken() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pool = Http1Pool::default();
        let (server, peer) = kept(&pool, &listener, None).await;
        drop(peer);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(pool.take(server).is_none());
    }

    /// A connection whose server has begun its last answer so long ago, as one exchange leaves it.
    async fn answered(pool: &Http1Pool, listener: &TcpListener, ago: Duration, reused: bool) -> TcpStream {
        let server = Server::from(listener.local_addr().unwrap());
        let (reader, writer) = pool.connect(server, Duration::from_secs(1)).await.unwrap();
        pool.put_after(server, reader, writer, Some(Instant::now().checked_sub(ago).unwrap()), reused);
        listener.accept().await.unwrap().0
    }

    const MOMENT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_request_that_must_not_meet_a_closing_server_takes_a_young_connection_only() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (pool, server) = (Http1Pool::default(), listener.local_addr().unwrap().into());
        let _young = answered(&pool, &listener, Duration::ZERO, false).await;
        assert!(pool.take_young(server).is_some());
        let _older = answered(&pool, &listener, YOUNG, true).await;
        assert!(pool.take(server).is_some(), "others take it");
        let mut older = answered(&pool, &listener, YOUNG, true).await;
        assert!(pool.take_young(server).is_none());
        let read = timeout(Duration::from_secs(1), older.read(&mut [0])).await;
        assert_eq!(read.expect("a fresh one would come beside it").unwrap(), 0);
        assert_eq!(pool.kept.get(), 0);
    }

    #[tokio::test]
    async fn a_server_that_closes_behind_its_first_answer_is_remembered_and_one_that_restarts_is_not() {
        for (reused, apart, remembered) in
            [(false, RESTART, true), (false, Duration::ZERO, false), (true, RESTART, false)]
        {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (pool, server) = (Http1Pool::default(), listener.local_addr().unwrap().into());
            for wait in [apart, Duration::ZERO] {
                let closing = answered(&pool, &listener, Duration::ZERO, reused).await;
                let another = answered(&pool, &listener, Duration::ZERO, reused).await;
                drop((closing, another));
                tokio::time::sleep(MOMENT).await;
                assert!(pool.take(server).is_none());
                pool.sweep();
                tokio::time::sleep(wait).await;
            }
            pool.close_idle(listener.local_addr().unwrap());
            let _next = answered(&pool, &listener, Duration::ZERO, false).await;
            assert_eq!(pool.take_young(server).is_none(), remembered, "{reused}, {apart:?}");
            let _next = answered(&pool, &listener, Duration::ZERO, false).await;
            assert!(pool.take(server).is_some(), "others still take it");
        }
    }

    #[tokio::test]
    async fn a_server_that_has_kept_its_connection_for_long_is_not_one_that_closes_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (pool, server) = (Http1Pool::default(), listener.local_addr().unwrap().into());
        drop(answered(&pool, &listener, YOUNG, false).await);
        tokio::time::sleep(MOMENT).await;
        assert!(pool.take_young(server).is_none());
        let _next = answered(&pool, &listener, Duration::ZERO, false).await;
        assert!(pool.take_young(server).is_some());
    }
}
