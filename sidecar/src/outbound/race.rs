//! Who speaks first on a port that nobody has used before: the client's first bytes and the server's
//! race. A server that wins (MySQL, SMTP) makes the port opaque, and that is remembered; nobody waits
//! for a timer.

use std::rc::Rc;

use bytes::BytesMut;
use tokio::net::TcpStream;

use super::{http, send};
use crate::config::Protocol;
use crate::detect;
use crate::error::Failure;
use crate::http1::conn::split;
use crate::worker::{Learned, Route, Worker};

/// Serves a connection whose protocol is not known yet.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    mut stream: TcpStream,
) -> Result<(), Failure> {
    let mut buffer = BytesMut::new();
    // Bytes that are here already decide without a connection to the server.
    let early = stream.try_read_buf(&mut buffer);
    let decided = if matches!(early, Ok(read) if read > 0) { detect::classify(&buffer) } else { None };
    if let Some(protocol) = decided {
        route.learned.set(Learned::ClientFirst);
        return super::speak(worker, route, protocol, stream, buffer).await;
    }
    let mut opened = send::open_opaque(worker, route).await?;
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
                None if opened.has_spoken() => Learned::ServerFirst,
                None => Learned::Nothing,
            };
            route.learned.set(learned);
            let (mut reader, mut writer) = split(stream, buffer);
            reader.unframe();
            writer.unframe();
            send::tunnel_opaque(opened, &mut reader, &mut writer).await
        }
    }
}
