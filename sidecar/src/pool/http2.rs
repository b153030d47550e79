//! Connections to HTTP/2 servers, each shared by as many requests as the server takes at once.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tokio::time::{Instant, timeout};

use super::{Gate, Server, connect, entry, handshake_limit, not_connected};
use crate::error::Failure;
use crate::http2::{self, WithoutEmptyData};

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

type SendRequest = h2::client::SendRequest<Bytes>;

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
    async fn place(&self) -> Option<(SendRequest, Place)> {
        loop {
            let place = self.shared.borrow().iter().find_map(Shared::place)?;
            match place.0.send.clone().ready().await {
                Ok(send) => return Some((send, place)),
                Err(_) => place.0.closed.set(true),
            }
        }
    }
}

struct Shared {
    send: SendRequest,
    active: Cell<usize>,
    used: Cell<Instant>,
    closed: Cell<bool>,
}

impl Shared {
    /// A place, if there is one: a request beyond what the server takes would wait for another to end.
    fn place(self: &Rc<Self>) -> Option<Place> {
        let most = match self.send.current_max_send_streams() {
            http2::UNSETTLED => BEFORE_SETTINGS,
            most => most.min(MAX_REQUESTS),
        };
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
    ) -> Result<(SendRequest, Place, bool), Failure> {
        let known = entry(&self.servers, server, |known| known.shared.borrow().is_empty());
        if let Some((send, place)) = known.place().await {
            return Ok((send, place, true));
        }
        let turn = known.gate.enter(server.address, limit, waits).await?;
        if let Some((send, place)) = known.place().await {
            waits.set(false);
            return Ok((send, place, true));
        }
        if let Some(failure) = turn.shared_failure() {
            return Err(failure);
        }
        waits.set(false);
        let (send, shared) = open(server, turn.left()).await.map_err(|failure| turn.failed(failure))?;
        let place = shared
            .place()
            .ok_or_else(|| not_connected(server.address, "HTTP/2", &"the server takes no request"))?;
        known.shared.borrow_mut().push(shared);
        Ok((send, place, false))
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&self) {
        self.servers.borrow_mut().retain(|_, known| {
            known.shared.borrow_mut().retain(|shared| {
                let idle = shared.active.get() == 0 && shared.used.get().elapsed() > IDLE;
                !idle && !shared.closed.get()
            });
            !known.shared.borrow().is_empty() || Rc::strong_count(known) > 1
        });
    }
}

async fn open(server: Server, limit: Duration) -> Result<(SendRequest, Rc<Shared>), Failure> {
    let failed = |error: &dyn std::fmt::Display| not_connected(server.address, "HTTP/2", error);
    let stream = connect(server, limit).await?;
    let stream = WithoutEmptyData::of_server(stream);
    let handshake = timeout(handshake_limit(limit), http2::client().handshake(stream)).await;
    let (send, connection) = handshake.map_err(|error| failed(&error))?.map_err(|error| failed(&error))?;
    let shared = Rc::new(Shared {
        send: send.clone(),
        active: Cell::new(0),
        used: Cell::new(Instant::now()),
        closed: Cell::new(false),
    });
    let settled = Rc::new(Notify::new());
    spawn_local(drive(connection, Rc::downgrade(&shared), Rc::clone(&settled)));
    // One that says nothing gets its request all the same.
    let _ = timeout(SETTINGS.min(limit), settled.notified()).await;
    let send = send.ready().await.map_err(|error| failed(&error))?;
    Ok((send, shared))
}

/// Drives a connection to its end, and says when the server's SETTINGS have come, or when they cannot come any more.
async fn drive(
    connection: h2::client::Connection<WithoutEmptyData<TcpStream>, Bytes>,
    shared: Weak<Shared>,
    settled: Rc<Notify>,
) {
    let (mut connection, mut waited_for) = (pin!(connection), Some(settled));
    poll_fn(|cx| {
        let ended = connection.as_mut().poll(cx).map(drop);
        let is_settled = |shared: Rc<Shared>| shared.send.current_max_send_streams() != http2::UNSETTLED;
        if waited_for.is_some()
            && (ended.is_ready() || shared.upgrade().is_some_and(is_settled))
            && let Some(settled) = waited_for.take()
        {
            settled.notify_one();
        }
        ended
    })
    .await;
    if let Some(shared) = shared.upgrade() {
        shared.closed.set(true);
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::super::IMPATIENT;
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
            let waits = Cell::new(false);
            let ready = || pool.ready(address.into(), IMPATIENT, &waits);
            let (_, first, kept) = ready().await.unwrap();
            assert!(!kept);
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
