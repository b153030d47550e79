//! The outbound path: a connection that the pod's application makes.
//!
//! original destination → what the operator says of it → what is spoken → an endpoint for each
//! request → its sidecar, or the endpoint itself where it has none.

mod http;
mod race;
mod send;
#[cfg(test)]
mod tests;

pub(crate) use send::open_plain;

use std::future::pending;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::net::TcpStream;
use tulle_mesh::ports;

use crate::config::Protocol;
use crate::detect;
use crate::error::Failure;
use crate::forward::tunnel;
use crate::http1::conn::split;
use crate::http1::{Reader, Writer};
use crate::listen::original_destination;
use crate::message::{Sink, Source};
use crate::pool::connect_within;
use crate::worker::{Learned, Route, Target, Worker};

/// A client of a port whose clients speak first is believed to wait for the server after this long.
const SILENCE: Duration = Duration::from_secs(1);

/// A connection to somewhere that the mesh does not know may take as long as it would without a mesh.
const PASSTHROUGH_TIMEOUT: Duration = Duration::from_secs(60);

/// Serves one connection of the application.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream) {
    let Some(destination) = original_destination(&stream) else {
        worker.telemetry.event("refused_connection", "NotRedirected");
        return;
    };
    if stream.set_nodelay(true).is_err() {
        return;
    }
    if let Err(failure) = route(&worker, stream, destination).await {
        tracing::debug!(%destination, %failure, "an outbound connection failed");
    }
}

async fn route(worker: &Rc<Worker>, mut stream: TcpStream, destination: SocketAddr) -> Result<(), Failure> {
    // Ports of sidecars are not redirected where they are, and nobody else's sidecar speaks for them.
    if worker.is_own(destination) || ports::SIDECAR.contains(&destination.port()) {
        return passthrough(worker, stream, BytesMut::new(), destination).await;
    }
    let route = worker.route(destination).await;
    let protocol = match route.target(worker) {
        Target::Passthrough => return passthrough(worker, stream, BytesMut::new(), destination).await,
        Target::Endpoints(protocol) => protocol,
    };
    let mut buffer = BytesMut::new();
    let protocol = match (protocol, route.learned.get()) {
        (Protocol::Detect, Learned::Nothing) => {
            return race::serve(worker, &route, stream, buffer).await;
        }
        (Protocol::Detect, Learned::ServerFirst) => Protocol::Opaque,
        (Protocol::Detect, Learned::ClientFirst) => {
            let first = tokio::time::timeout(SILENCE, detect::first_bytes(&mut stream, &mut buffer)).await;
            match first {
                Ok(protocol) => protocol.map_err(|_| Failure::ClientGone)?,
                // A connection that its client keeps for later, or a server that speaks first after all.
                Err(_) => return race::serve(worker, &route, stream, buffer).await,
            }
        }
        (known, _) => known,
    };
    speak(worker, &route, protocol, stream, buffer).await
}

async fn speak(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    protocol: Protocol,
    stream: TcpStream,
    buffer: BytesMut,
) -> Result<(), Failure> {
    match protocol {
        Protocol::Http1 => http::serve_http1(worker, route, stream, buffer).await,
        Protocol::Http2 => http::serve_http2(worker, route, stream, buffer).await,
        Protocol::Opaque | Protocol::Detect => {
            let (mut reader, writer) = split(stream, buffer);
            reader.unframe();
            opaque(worker, route, reader, writer).await
        }
    }
}

/// A connection whose content is not looked at, to one endpoint of the route.
async fn opaque(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    mut reader: Reader,
    mut writer: Writer,
) -> Result<(), Failure> {
    // The client sees a connection that fails, not one that was served and closed.
    let opened = send::open_opaque(worker, route).await.inspect_err(|_| writer.abort())?;
    writer.unframe();
    send::tunnel_opaque(worker, opened, &mut reader, &mut writer).await
}

/// Bytes as they are to the address as it was dialled.
async fn passthrough(
    worker: &Rc<Worker>,
    client: TcpStream,
    read: BytesMut,
    destination: SocketAddr,
) -> Result<(), Failure> {
    let series = worker.telemetry.outbound("", "_PASSTHROUGH", "", "opaque");
    let server = match connect_within(destination, PASSTHROUGH_TIMEOUT).await {
        Ok(server) => server,
        Err(failure) => {
            series.connection(Some(&failure), (0, 0));
            // The client sees what it would have seen: a connection that fails, not one that closes.
            let _ = socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO));
            return Err(failure);
        }
    };
    let bytes = splice((client, read), server, |_| true, pending()).await;
    series.connection(None, bytes);
    Ok(())
}

/// Joins two TCP connections until both ways have ended, or `stop` breaks them off. `admit` sees what the first
/// sends, and may break off.
pub async fn splice(
    (a, from_a): (TcpStream, BytesMut),
    b: TcpStream,
    admit: impl FnMut(&[u8]) -> bool,
    stop: impl Future<Output = ()>,
) -> (u64, u64) {
    let ((mut a_in, mut a_out), (mut b_in, mut b_out)) = (split(a, from_a), split(b, BytesMut::new()));
    for reader in [&mut a_in, &mut b_in] {
        reader.unframe();
    }
    for writer in [&mut a_out, &mut b_out] {
        writer.unframe();
    }
    let up = (Source::Http1(&mut a_in), Sink::Http1(&mut b_out));
    let down = (Source::Http1(&mut b_in), Sink::Http1(&mut a_out));
    tunnel(up, down, admit, stop).await
}
