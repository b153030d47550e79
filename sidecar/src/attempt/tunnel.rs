//! Bytes both ways, as they are: opaque connections, and what follows an upgrade or a CONNECT.
//!
//! Each way ends by itself, and its end passes on, so that a half-closed client is answered. A way that breaks
//! off ends the other, and both ends see that it was not a proper end.

use std::cell::Cell;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::{Either, select};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tulle_mesh::wire::frame::Code;

use super::answer::Answer;
use super::body::RequestBody;
use super::exchange::{UpSink, UpSource};
use super::{Attempt, End, Pace};
use crate::claim::ForgedIdentityFilter;
use crate::error::{Failure, PumpError};
use crate::http1::conn::split;
use crate::http1::{Head, Reader, Writer};
use crate::message::{Sink, Source, pump};

/// A server that takes what a client sends for so long and says nothing has a protocol in which it says nothing, such as
/// syslog, and ends connections that are idle, or with its pod.
const ONE_WAY: Duration = Duration::from_secs(30);

/// How both ways of a tunnel ended.
#[derive(Clone, Copy, Debug)]
pub struct Joined {
    /// Bytes: from the client, from the server.
    pub bytes: (u64, u64),
    /// How the way from the client ended; `None`: it was ended with the other.
    pub from_client: Option<Result<(), PumpError>>,
    /// How the way from the server ended; `None`: it was ended with the other.
    pub from_server: Option<Result<(), PumpError>>,
    /// The server's side ended before the client's, properly or not.
    pub server_first: bool,
}

impl Joined {
    /// Whether the server's side failed the tunnel: it broke off, and its client had neither ended nor broken off before.
    /// `gone`: what it means that the connection itself ended.
    pub fn failure_of_server(&self, gone: Failure) -> Option<Failure> {
        match (self.from_client, self.from_server) {
            (Some(Ok(()) | Err(PumpError::SourceGone)), _) => None,
            (_, Some(Err(PumpError::SourceGone))) => Some(gone),
            (_, Some(Err(PumpError::SourceReset(Code::Denied)))) => Some(Failure::PolicyDenied),
            (_, Some(Err(PumpError::SourceReset(_) | PumpError::SourceMalformed(_)))) => {
                Some(Failure::UpstreamReset)
            }
            _ => None,
        }
    }

    /// Whether the server ended a tunnel of this age without a word, while its client stayed.
    pub fn is_hung_up(&self, age: Duration) -> bool {
        self.server_first && self.bytes.1 == 0 && age < ONE_WAY
    }
}

/// Moves bytes both ways until each way has ended. A way that breaks off ends the other, and both ends see
/// that it was not a proper end, as when `stop` resolves. `admit` sees what the client sends, and may break
/// off. Returns the bytes from the client and from the server.
pub async fn tunnel(
    up: (Source<'_>, Sink<'_>),
    down: (Source<'_>, Sink<'_>),
    admit: impl FnMut(Bytes) -> Option<Bytes>,
    stop: impl Future<Output = ()>,
) -> (u64, u64) {
    join(up, down, admit, || {}, stop).await.bytes
}

/// As [`tunnel`], and returns how it ended. `heard` is called whenever the server sends something.
pub async fn join(
    up: (Source<'_>, Sink<'_>),
    down: (Source<'_>, Sink<'_>),
    admit: impl FnMut(Bytes) -> Option<Bytes>,
    mut heard: impl FnMut(),
    stop: impl Future<Output = ()>,
) -> Joined {
    let (mut sent, mut received) = (0u64, 0u64);
    let ((from_client, mut to_server), (from_server, mut to_client)) = (up, down);
    let (uploaded, downloaded, server_first) = {
        let upload = pin!(pump(from_client, &mut to_server, &mut sent, admit));
        let download = pin!(pump(from_server, &mut to_client, &mut received, |bytes| {
            heard();
            Some(bytes)
        }));
        let both = async {
            match select(upload, download).await {
                // A reader that is gone may still have something to say.
                Either::Left((result @ (Ok(()) | Err(PumpError::SinkGone)), other)) => {
                    (Some(result), Some(other.await), result.is_err())
                }
                Either::Right((result @ (Ok(()) | Err(PumpError::SinkGone)), other)) => {
                    (Some(other.await), Some(result), result.is_ok())
                }
                Either::Left((broken, _)) => (Some(broken), None, false),
                Either::Right((broken, _)) => (None, Some(broken), true),
            }
        };
        // First, so that nothing passes of a connection that was forbidden while it was being opened.
        tokio::select! {
            biased;
            () = stop => (None, None, false),
            ends = both => ends,
        }
    };
    // A way that has ended properly keeps what is still on it.
    if uploaded != Some(Ok(())) {
        to_server.abort();
    }
    if downloaded != Some(Ok(())) {
        to_client.abort();
    }
    Joined { bytes: (sent, received), from_client: uploaded, from_server: downloaded, server_first }
}

/// Resolves when `moved`, which grows with everything that moves, has not grown for this long, give or take a quarter
/// of it. `None`: never.
pub(super) async fn stalled(limit: Option<Duration>, moved: impl Fn() -> u64) {
    const LOOKS: u32 = 4;
    let Some(limit) = limit else { return pending().await };
    let (mut seen, mut quiet) = (moved(), 0);
    while quiet < LOOKS {
        // Few policies say this: the timer is not a part of every request's future.
        Box::pin(sleep(limit / LOOKS)).await;
        let now = moved();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}

/// Joins the halves of two TCP connections, whatever they carried before.
pub async fn proxy_tcp(
    client: (&mut Reader, &mut Writer),
    server: (&mut Reader, &mut Writer),
    admit: impl FnMut(Bytes) -> Option<Bytes>,
    heard: impl FnMut(),
    stop: impl Future<Output = ()>,
) -> Joined {
    let ((from_client, to_client), (from_server, to_server)) = (client, server);
    from_client.unframe();
    from_server.unframe();
    to_client.unframe();
    to_server.unframe();
    let up = (Source::Http1(from_client), Sink::Http1(to_server));
    let down = (Source::Http1(from_server), Sink::Http1(to_client));
    join(up, down, admit, heard, stop).await
}

/// Joins two TCP connections until both ways have ended, or `stop` breaks them off. `admit` sees what the first
/// sends, and may break off.
pub async fn splice(
    (client, read): (TcpStream, BytesMut),
    server: TcpStream,
    admit: impl FnMut(Bytes) -> Option<Bytes>,
    stop: impl Future<Output = ()>,
) -> (u64, u64) {
    let (mut from_client, mut to_client) = split(client, read);
    let (mut from_server, mut to_server) = split(server, BytesMut::new());
    let client = (&mut from_client, &mut to_client);
    proxy_tcp(client, (&mut from_server, &mut to_server), admit, || {}, stop).await.bytes
}

/// What breaks a tunnel off.
pub(super) struct Terms {
    /// HTTP that names a client to the application. A server that answers CONNECT with 200 may not be a proxy, and
    /// read the bytes behind it as more requests.
    pub(super) screens: bool,
    /// The server is a proxy, if it is what its client takes it for: it breaks off when a server behind it does.
    pub(super) is_connect: bool,
    /// So long without a byte in either direction.
    pub(super) idle: Option<Duration>,
}

/// Carries a tunnel that the server has agreed to with this head, after the request's body has been sent to its
/// end. Adds its bytes to the attempt's.
pub(super) async fn upgraded(
    head: &Head,
    body: &mut RequestBody<'_>,
    (mut sink, mut source): (UpSink, UpSource),
    answer: &mut Answer<'_>,
    terms: Terms,
    attempt: &mut Attempt,
) {
    if answer.head_with(head, false, false).is_err() || answer.flush().await.is_err() {
        attempt.end = End::Delivered(Err(Failure::ClientGone));
        return;
    }
    let (Some((first, from_client)), from_server) = (body.take_tunnel(), source.body()) else { return };
    let Ok(to_client) = answer.unframed(head) else { return };
    let mut to_server = sink.unframed(head);
    let mut filter = terms.screens.then(ForgedIdentityFilter::default);
    let pieces = Cell::new(0u64);
    let mut admit = |bytes: Bytes| {
        pieces.set(pieces.get() + 1);
        match &mut filter {
            Some(filter) => filter.admit(bytes),
            None => Some(bytes),
        }
    };
    let early = first.len() as u64;
    if early > 0 {
        let Some(first) = admit(first) else {
            attempt.end = End::Delivered(Err(Failure::ClientBadRequest("bytes that are not admitted")));
            return;
        };
        if to_server.data(first).await.is_err() {
            attempt.end = End::Delivered(Err(Failure::UpstreamReset));
            return;
        }
    }
    let heard = || pieces.set(pieces.get() + 1);
    let ways = ((from_client, to_server), (from_server, to_client));
    let joined = join(ways.0, ways.1, admit, heard, stalled(terms.idle, || pieces.get())).await;
    if joined.from_client.is_none() && joined.from_server.is_none() {
        attempt.end = End::Delivered(Err(Failure::IdleTimeout));
    } else if let Some(failure) = joined.failure_of_server(Failure::UpstreamReset)
        && !(terms.is_connect && failure == Failure::UpstreamReset)
    {
        attempt.end = End::Delivered(Err(failure));
    } else if attempt.head_at.is_some_and(|at| joined.is_hung_up(at.elapsed())) && !terms.is_connect {
        attempt.pace = Pace::HungUp;
    }
    if let Some(Err(PumpError::SourceMalformed(why))) = joined.from_client {
        attempt.end = End::Delivered(Err(Failure::ClientBadRequest(why)));
    }
    attempt.bytes.0 += early + joined.bytes.0;
    attempt.bytes.1 += joined.bytes.1;
}
