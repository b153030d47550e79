//! Connections to HTTP/2 servers, each shared by as many requests as the server takes at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::{Gate, Server, connect, entry, not_connected};
use crate::error::Failure;
use crate::http1::Head;
use crate::http2;

/// A connection that carries nothing for this long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// Requests at once on one connection, if the server does not take fewer: as many as we take from a client.
const MAX_REQUESTS: usize = 1_000;
/// How long a new connection waits for the server's SETTINGS, its first frame (RFC 9113 §3.4). They say how many
/// requests it takes at once: those beyond would be refused, or wait behind the others for ever.
const SETTINGS: Duration = Duration::from_millis(250);
/// Requests at once on a connection of a server that has not said how many it takes (RFC 9113 §6.5.2 recommends that it
/// take no fewer).
const BEFORE_SETTINGS: usize = 100;

/// Connections to HTTP/2 servers.
#[derive(Default)]
pub struct Http2Pool {
    servers: RefCell<HashMap<Server, Rc<Connections>>>,
}

/// Those to one server.
#[derive(Default)]
struct Connections {
    shared: RefCell<Vec<Rc<Shared>>>,
    gate: Gate,
}

impl Connections {
    /// A place on a kept connection that takes requests.
    fn place(&self) -> Option<Place> {
        self.shared.borrow().iter().find_map(Shared::place)
    }
}

struct Shared {
    client: http2::Client,
    active: Cell<usize>,
    used: Cell<Instant>,
}

impl Shared {
    /// A place, if there is one: a request beyond what the server takes would wait for another to end.
    fn place(self: &Rc<Self>) -> Option<Place> {
        let most = self.client.max_streams().map_or(BEFORE_SETTINGS, |most| most.min(MAX_REQUESTS));
        if !self.client.is_shareable() || self.active.get() >= most {
            return None;
        }
        self.active.set(self.active.get() + 1);
        Some(Place(Rc::clone(self)))
    }
}

/// The place of a request on a connection that it shares.
pub struct Place(Rc<Shared>);

impl Place {
    /// Sends the head of the request: see [`http2::Client::open`].
    pub fn open(
        &self,
        head: &Head,
        end: bool,
        grpc_timeout: Option<&[u8]>,
    ) -> Option<(http2::SendStream, http2::RecvStream)> {
        self.0.client.open(head, end, grpc_timeout)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.active.set(self.0.active.get().saturating_sub(1));
        self.0.used.set(Instant::now());
    }
}

impl Http2Pool {
    /// A place on a connection that takes a request, and whether that is a kept one. `limit`: how
    /// long connecting may take. It `waits` as long as another one opens the connection, whose failure is then not one
    /// more.
    ///
    /// # Errors
    /// [`Failure::UpstreamConnect`].
    pub async fn ready(
        &self,
        server: Server,
        limit: Duration,
        waits: &Cell<bool>,
    ) -> Result<(Place, bool), Failure> {
        let known = entry(&self.servers, server, |known| known.shared.borrow().is_empty());
        if let Some(place) = known.place() {
            return Ok((place, true));
        }
        let turn = known.gate.enter(server.address, limit, waits).await?;
        if let Some(place) = known.place() {
            waits.set(false);
            return Ok((place, true));
        }
        if let Some(failure) = turn.shared_failure() {
            return Err(failure);
        }
        waits.set(false);
        let shared = open(server, turn.left()).await.map_err(|failure| turn.failed(failure))?;
        let place = shared
            .place()
            .ok_or_else(|| not_connected(server.address, "HTTP/2", &"the server takes no request"))?;
        known.shared.borrow_mut().push(shared);
        Ok((place, false))
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        self.servers.borrow_mut().retain(|_, known| {
            known.shared.borrow_mut().retain(|shared| {
                let idle = shared.active.get() == 0 && shared.used.get().elapsed() > IDLE;
                !idle && shared.client.is_open()
            });
            !known.shared.borrow().is_empty() || Rc::strong_count(known) > 1
        });
    }
}

async fn open(server: Server, limit: Duration) -> Result<Rc<Shared>, Failure> {
    let stream = connect(server, limit).await?;
    let (client, driving) = http2::client(stream);
    spawn_local(driving);
    // One that says nothing gets its request all the same.
    let _ = timeout(SETTINGS.min(limit), client.settled()).await;
    Ok(Rc::new(Shared { client, active: Cell::new(0), used: Cell::new(Instant::now()) }))
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::super::IMPATIENT;
    use super::*;
    use bytes::Bytes;
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
            let waits = Cell::new(false);
            let ready = || pool.ready(address.into(), IMPATIENT, &waits);
            let (first, kept) = ready().await.unwrap();
            assert!(!kept);
            let (second, kept) = ready().await.unwrap();
            assert!(kept, "there is another place");
            let (third, kept) = ready().await.unwrap();
            assert!(!kept, "it would wait for one of the others to end");
            drop((first, second, third));
            let (_, kept) = ready().await.unwrap();
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
            let waits: Vec<Cell<bool>> = (0..50).map(|_| Cell::new(false)).collect();
            let all = waits.iter().map(|waits| pool.ready(address.into(), IMPATIENT, waits));
            let all = futures::future::join_all(all).await;
            assert!(all.into_iter().all(|one| matches!(one, Err(Failure::UpstreamConnect))));
            let own = waits.iter().filter(|waits| !waits.get()).count();
            assert_eq!(own, 1, "one has tried, and all others have waited for it");
        };
        LocalSet::new().run_until(test).await;
    }
}
