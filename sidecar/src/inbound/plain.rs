//! Plain connections: clients without a sidecar, where the policy lets them.

use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tulle_mesh::counted_event::RefusedRequest;

use super::first::Plain;
use super::{Peer, app, serve_call};
use crate::admit::{admit_connection, admit_plaintext, deadline_of};
use crate::attempt::{Answer, proxy_tcp};
use crate::call::Call;
use crate::config::Protocol;
use crate::error::Failure;
use crate::http1::conn::{close, split};
use crate::http1::{Head, Reader};
use crate::http2::{self, Incoming, RecvStream, SendStream};
use crate::io::unless_reset;
use crate::listen::reset_on_close;
use crate::task::{boxed, spawn_boxed};

/// A connection that carries no request for this long is closed.
const KEEP_ALIVE: Duration = Duration::from_secs(600);
/// The rest of an HTTP/2 handshake: the preface, and the SETTINGS behind it.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Serves a plain connection.
///
/// # Errors
/// Why it was refused or broke off.
pub(super) async fn serve(peer: Rc<Peer>, plain: Plain) -> Result<(), Failure> {
    if let Err(denied) = admit_plaintext(&peer.worker, &peer.client) {
        reset_on_close(&plain.stream);
        peer.series("opaque").connection(Some(&denied.0), (0, 0));
        peer.log_connection(peer.since, Some(&denied.0), (0, 0));
        return Err(denied.0);
    }
    let Plain { stream, read, protocol, app, app_broke_off, slot: _slot, .. } = plain;
    match protocol {
        Protocol::Http1 => {
            // The connection that was opened for this client carries its first request.
            app::keep_untouched(&peer, app);
            Box::pin(http1(&peer, stream, read)).await
        }
        Protocol::Http2 => {
            app::keep_untouched(&peer, app);
            Box::pin(http2(peer, stream, read)).await
        }
        Protocol::Opaque | Protocol::Detect => {
            let app = if app_broke_off { Some(Err(Failure::UpstreamReset)) } else { app.map(Ok) };
            Box::pin(opaque(&peer, stream, read, app)).await
        }
    }
}

/// `app`: what has come of connecting to the application, if that was tried already.
async fn opaque(
    peer: &Peer,
    stream: TcpStream,
    mut read: BytesMut,
    app: Option<Result<TcpStream, Failure>>,
) -> Result<(), Failure> {
    let series = peer.series("opaque");
    let refuse = |failure: Failure, stream: &TcpStream| {
        series.connection(Some(&failure), (0, 0));
        peer.log_connection(peer.since, Some(&failure), (0, 0));
        reset_on_close(stream);
        Err(failure)
    };
    let permit = match admit_connection(&peer.worker, &peer.client) {
        Ok(permit) => permit,
        Err(denied) => return refuse(denied.0, &stream),
    };
    permit.begun(&peer.client);
    let connected = match app {
        Some(connected) => connected,
        None => {
            let connecting = pin!(app::connect(peer));
            unless_reset(&stream, &mut read, connecting).await.unwrap_or(Err(Failure::ClientGone))
        }
    };
    let (mut from_app, mut to_app) = match connected {
        Ok(app) => split(app, BytesMut::new()),
        Err(failure) => return refuse(failure, &stream),
    };
    let (mut reader, mut writer) = split(stream, read);
    let (client, app) = ((&mut reader, &mut writer), (&mut from_app, &mut to_app));
    let withdrawn = permit.withdrawn(&peer.client, None);
    let joined = proxy_tcp(client, app, peer.filter(), || {}, withdrawn).await;
    let stopped = joined.from_client.is_none() && joined.from_server.is_none();
    let failure = stopped.then_some(Failure::PolicyDenied);
    series.connection(failure.as_ref(), joined.bytes);
    peer.log_connection(peer.since, failure.as_ref(), joined.bytes);
    failure.map_or(Ok(()), Err)
}

async fn http1(peer: &Peer, stream: TcpStream, read: BytesMut) -> Result<(), Failure> {
    let (mut reader, mut writer) = split(stream, read);
    let mut idle = pin!(sleep(KEEP_ALIVE));
    loop {
        let head = match next_head(&mut reader, idle.as_mut()).await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(failure) => {
                peer.worker.telemetry.event(RefusedRequest(failure.reason()));
                Answer::Http1(&mut writer).fail(&failure).await;
                Box::pin(close(reader, writer)).await;
                return Err(failure);
            }
        };
        // A future of its own: a connection between requests does not hold what serving one takes.
        if !boxed(|| serve_call(peer, Call::http1(head, &mut reader, &mut writer))).await {
            Box::pin(close(reader, writer)).await;
            return Ok(());
        }
    }
}

/// The next request's head; `None` when the client has closed or is idle for too long.
async fn next_head(reader: &mut Reader, mut idle: Pin<&mut Sleep>) -> Result<Option<Head>, Failure> {
    let until = Instant::now() + KEEP_ALIVE;
    let mut head = pin!(reader.request());
    loop {
        tokio::select! {
            biased;
            head = &mut head => return head,
            () = idle.as_mut() => {
                // One timer for the whole connection: it is set anew when it fires, not with every request.
                if Instant::now() >= until {
                    return Ok(None);
                }
                idle.as_mut().reset(until);
            }
        }
    }
}

async fn http2(peer: Rc<Peer>, stream: TcpStream, read: BytesMut) -> Result<(), Failure> {
    let mut connection = http2::Server::new(stream, read);
    let (mut idle, mut is_settled) = (pin!(sleep(HANDSHAKE)), false);
    loop {
        let accepted = tokio::select! {
            biased;
            accepted = connection.accept() => accepted,
            () = idle.as_mut() => {
                if !is_settled {
                    if !connection.is_settled() {
                        return Err(Failure::Timeout("the handshake"));
                    }
                    is_settled = true;
                    idle.as_mut().reset(Instant::now() + KEEP_ALIVE);
                    continue;
                }
                // Every request that runs holds its peer.
                if Rc::strong_count(&peer) == HELD_BY_CONNECTION {
                    return Ok(());
                }
                idle.as_mut().reset(Instant::now() + KEEP_ALIVE);
                continue;
            }
        };
        let Some(accepted) = accepted else { return Ok(()) };
        let Ok((request, respond, body)) = accepted else { return Err(Failure::ClientGone) };
        idle.as_mut().reset(Instant::now() + KEEP_ALIVE);
        let peer = Rc::clone(&peer);
        spawn_boxed(|| stream_of(peer, request, respond, body));
    }
}

/// How often a peer is held without any request: by the connection's task, and by what serves it.
const HELD_BY_CONNECTION: usize = 2;

async fn stream_of(peer: Rc<Peer>, mut request: Incoming, mut respond: SendStream, mut body: RecvStream) {
    match http2::request_head(&mut request.block, request.end) {
        Ok(head) => {
            let mut call = Call::http2(head, &mut body, &mut respond);
            call.deadline = deadline_of(&call, None);
            // Its answer ends with its stream, whatever becomes of the request.
            let _ = serve_call(&peer, call).await;
        }
        Err(failure) => {
            peer.worker.telemetry.event(RefusedRequest(failure.reason()));
            let content = request.block.content_type();
            Answer::Http2(&mut respond).fail_with(&failure, content).await;
        }
    }
}
