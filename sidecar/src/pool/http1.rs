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

/// A connection that carries nothing.
struct Idle {
    source: Option<IpAddr>,
    reader: Reader,
    writer: Writer,
    since: Instant,
}

impl Idle {
    /// Whether it may carry another request.
    fn is_alive(&mut self) -> bool {
        self.since.elapsed() < IDLE && self.reader.is_quiet()
    }
}

/// Connections to HTTP/1 servers that may carry another request.
#[derive(Default)]
pub struct Http1Pool {
    /// The youngest last.
    idle: RefCell<HashMap<SocketAddr, Vec<Idle>>>,
    kept: Cell<usize>,
}

impl Http1Pool {
    /// A kept connection that is still quiet, the youngest first.
    pub fn take(&self, server: Server) -> Option<(Reader, Writer)> {
        let mut idle = self.idle.borrow_mut();
        let kept = idle.get_mut(&server.address)?;
        while let Some(place) = kept.iter().rposition(|one| one.source == server.source) {
            // Those behind it, if any, come from other addresses and may be in any order.
            let mut one = kept.swap_remove(place);
            self.kept.set(self.kept.get().saturating_sub(1));
            if one.is_alive() {
                return Some((one.reader, one.writer));
            }
        }
        None
    }

    /// Keeps a connection that has ended its exchange cleanly.
    pub fn put(&self, server: Server, reader: Reader, writer: Writer) {
        let mut idle = self.idle.borrow_mut();
        if self.kept.get() >= KEPT_IN_ALL || idle.len() >= MAX_SERVERS {
            return;
        }
        let kept = idle.entry(server.address).or_default();
        if kept.len() < KEPT {
            self.kept.set(self.kept.get() + 1);
            kept.push(Idle { source: server.source, reader, writer, since: Instant::now() });
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
        let closed = self.idle.borrow_mut().remove(&address);
        self.kept.set(self.kept.get().saturating_sub(closed.map_or(0, |closed| closed.len())));
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        let mut left = 0;
        self.idle.borrow_mut().retain(|_, kept| {
            kept.retain_mut(Idle::is_alive);
            left += kept.len();
            !kept.is_empty()
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
}
