//! Who speaks first on a port that nobody has used before: the client's first bytes and the server's
//! race. A server that wins (MySQL, SMTP) makes the port opaque, and that is remembered; nobody waits
//! for a timer.

use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{http, send};
use crate::config::Protocol;
use crate::detect;
use crate::error::Failure;
use crate::http1::conn::split;
use crate::worker::{Learned, Route, Worker};

/// How long a client whose connection nobody took may take to speak before it is reset.
const PATIENCE: Duration = Duration::from_millis(250);
/// The same where a policy refused it: a rule may allow requests and not what is unknown.
const DENIED_PATIENCE: Duration = Duration::from_secs(10);

/// Serves a connection whose protocol is not known yet.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    mut stream: TcpStream,
    mut buffer: BytesMut,
) -> Result<(), Failure> {
    // Bytes that are here already decide without a connection to the server.
    let early = stream.try_read_buf(&mut buffer);
    let decided = if matches!(early, Ok(read) if read > 0) { detect::classify(&buffer) } else { None };
    if let Some(protocol) = decided {
        route.learned.set(Learned::ClientFirst);
        return super::speak(worker, route, protocol, stream, buffer).await;
    }
    let mut opened = match send::open_opaque(worker, route).await {
        Ok(opened) => opened,
        Err(failure) => return unopened(worker, route, stream, buffer, failure).await,
    };
    let first = tokio::select! {
        first = detect::first_bytes(&mut stream, &mut buffer) => Some(first.map_err(|_| Failure::ClientGone)?),
        () = opened.answered() => None,
    };
    match first {
        Some(Protocol::Http1) => {
            route.learned.set(Learned::ClientFirst);
            drop(opened);
            http::serve_http1(worker, route, stream, buffer).await
        }
        Some(Protocol::Http2) => {
            route.learned.set(Learned::ClientFirst);
            drop(opened);
            http::serve_http2(worker, route, stream, buffer).await
        }
        opaque => {
            let learned = match opaque {
                Some(_) => Learned::ClientFirst,
                None if opened.has_greeted() => Learned::ServerFirst,
                None => Learned::Nothing,
            };
            // One client that stays silent must not make the port opaque for the others.
            if route.learned.get() != Learned::ClientFirst {
                route.learned.set(learned);
            }
            let (mut reader, mut writer) = split(stream, buffer);
            reader.unframe();
            writer.unframe();
            send::tunnel_opaque(worker, opened, &mut reader, &mut writer).await
        }
    }
}

/// Nobody took the connection as it is, but a client that turns out to speak HTTP can be told why, and may
/// be allowed what an unknown protocol is not.
async fn unopened(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    mut stream: TcpStream,
    mut buffer: BytesMut,
    failure: Failure,
) -> Result<(), Failure> {
    let patience = if failure == Failure::PolicyDenied { DENIED_PATIENCE } else { PATIENCE };
    match timeout(patience, detect::first_bytes(&mut stream, &mut buffer)).await {
        Ok(Ok(protocol @ (Protocol::Http1 | Protocol::Http2))) => {
            route.learned.set(Learned::ClientFirst);
            super::speak(worker, route, protocol, stream, buffer).await
        }
        _ => {
            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
            Err(failure)
        }
    }
}
