//! The outbound path: a connection that the pod's application makes.
//!
//! original destination → the [`Port`] that it leads to → what is spoken → the way of each request, or of the
//! connection, by the rules of routes → an endpoint → its sidecar, or the endpoint itself where it has none.
//!
//! ```text
//!   race      what is spoken: the client's first bytes against the server's
//!   http      requests: where each goes, and what is done to it on the way
//!   attempts  the attempts at one request
//!   retry_state  … what its policy decides about them: deadline, retries, faults, breaker
//!   overrides  … what the request itself asks for, by headers: tulle-timeout, tulle-retries, grpc-timeout
//!   mirror    copies of requests
//!   opaque    connections whose content is not looked at
//!   sni       the server that a TLS client asks for
//! ```

mod attempts;
mod http;
mod mirror;
mod opaque;
mod overrides;
mod passthrough;
mod race;
mod retry_state;
mod sni;
#[cfg(test)]
mod tests;

use std::future::pending;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tulle_mesh::counted_event;
use tulle_mesh::ports;

use crate::backend::{Backend, Change, Upstream, Verdict};
use crate::config::Protocol;
use crate::error::Failure;
use crate::listen::original_destination;
use crate::pool::{IMPATIENT, PATIENT};
use crate::route::{Port, Target};
use crate::telemetry::attempts::{Attempts, Seen};
use crate::telemetry::{Series, SeriesKey};
use crate::worker::Worker;

/// Waits before the last endpoint that is left is tried anew, on a fresh connection, after an attempt that it has
/// provably not served. At once: most such connections were closed for being idle. Then 25 ms: an application
/// that restarts a worker is often back by then.
const ANEW: [Duration; 2] = [Duration::ZERO, Duration::from_millis(25)];

/// Endpoints that are tried for one request or connection.
const MAX_ENDPOINTS: usize = 4;

/// Serves one connection of the application.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream) {
    let Some(destination) = original_destination(&stream) else {
        worker.telemetry.event(counted_event::RefusedConnection::NotRedirected);
        return;
    };
    serve_to(worker, stream, destination).await;
}

/// Serves a connection of the application to the address that it dialled.
pub async fn serve_to(worker: Rc<Worker>, stream: TcpStream, destination: SocketAddr) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    if let Err(failure) = route(&worker, stream, destination).await {
        tracing::debug!(%destination, %failure, "an outbound connection failed");
    }
}

async fn route(worker: &Rc<Worker>, stream: TcpStream, destination: SocketAddr) -> Result<(), Failure> {
    // Ports of sidecars are not redirected where they are, and nobody else's sidecar speaks for them.
    if worker.is_own(destination) || ports::SIDECAR.contains(&destination.port()) {
        return Box::pin(passthrough::serve(worker, stream, destination, pending())).await;
    }
    let port = worker.port(destination).await;
    match port.target(worker) {
        Target::Passthrough => {
            let meshed = port.becomes_meshed(worker);
            Box::pin(passthrough::serve(worker, stream, destination, meshed)).await
        }
        Target::Endpoints(Protocol::Opaque) => {
            speak(worker, &port, Protocol::Opaque, stream, BytesMut::new()).await
        }
        Target::Endpoints(Protocol::Detect) => race::serve(worker, &port, stream).await,
        Target::Endpoints(declared) => race::serve_declared(worker, &port, declared, stream).await,
    }
}

/// Serves a connection whose protocol is known. Each has a future of its own: most of what a connection occupies
/// while it is idle is its future.
async fn speak(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    protocol: Protocol,
    stream: TcpStream,
    buffer: BytesMut,
) -> Result<(), Failure> {
    match protocol {
        Protocol::Http1 => Box::pin(http::serve_http1(worker, port, stream, buffer, None)).await,
        Protocol::Http2 => Box::pin(http::serve_http2(worker, port, stream, buffer)).await,
        Protocol::Opaque | Protocol::Detect => Box::pin(opaque::serve(worker, port, stream, buffer)).await,
    }
}

/// How long connecting to an endpoint may take: where there is no other, as long as without a mesh.
fn patience(backend: &Backend, upstream: &Upstream) -> Duration {
    if backend.has_other(upstream.endpoint.address) { IMPATIENT } else { PATIENT }
}

/// Counts an attempt that has ended for the Canary under whose shares its endpoint was chosen. `head`: the
/// time until the head of its answer.
fn count(
    evidence: Option<&Arc<Attempts>>,
    backend: &Backend,
    upstream: &Upstream,
    seen: Option<Seen>,
    head: Option<Duration>,
) {
    let (Some(attempts), Some(seen)) = (evidence, seen) else { return };
    // A pod that ends takes nothing new: every rollout does that, and it says nothing of the version.
    if seen == Seen::Unreached && backend.is_ending(&upstream.endpoint) {
        return;
    }
    attempts.count(seen, head);
}

/// Tells the breaker how an attempt or a connection ended that began `since`. `protocol` and `route` are those that its
/// request is counted under: so is an ejection, because another series would be another edge, without requests.
fn observe(
    worker: &Worker,
    backend: &Backend,
    upstream: &Upstream,
    protocol: &'static str,
    route: Option<&Arc<str>>,
    (since, now): (Instant, Instant),
    verdict: Verdict,
) {
    // A pod that ends takes nothing new: every rollout does that.
    let is_unreached = matches!(verdict, Verdict::Unreached | Verdict::UnreachedWithAnother);
    if is_unreached && backend.is_ending(&upstream.endpoint) {
        return;
    }
    let Some(change) = backend.observe(upstream, since, verdict, now) else { return };
    let telemetry = &worker.telemetry;
    let (namespace, service) = backend.counted_as();
    let endpoint = upstream.endpoint.address;
    match change {
        Change::Ejected => {
            backend.show(|| telemetry.breakers.of(namespace, service));
            upstream.series(telemetry, protocol, route).ejected();
            telemetry.event(counted_event::Breaker::Ejected);
            tracing::info!(namespace, service, %endpoint, "ejected an endpoint: it fails");
            if backend.is_panicking() {
                telemetry.event(counted_event::Breaker::Panic);
                tracing::warn!(namespace, service, "panic: so many endpoints are ejected that all are used");
            }
        }
        Change::Restored => {
            telemetry.event(counted_event::Breaker::Restored);
            tracing::info!(namespace, service, %endpoint, "an ejected endpoint serves again");
        }
        Change::Capped => telemetry.event(counted_event::Breaker::Capped),
        Change::WouldEject => telemetry.event(counted_event::WouldEject::Failures),
    }
}

/// What is counted where no endpoint has served. `mtls`: of the endpoint that was tried last, or, if none was, of any that
/// there is.
fn unserved(
    worker: &Worker,
    backend: Option<&Backend>,
    protocol: &'static str,
    route: Option<&Arc<str>>,
    mtls: bool,
) -> Arc<Series> {
    let (namespace, name) = backend.map_or(("", "pod"), Backend::counted_as);
    let key = SeriesKey::outbound(namespace, name, "", protocol);
    worker.telemetry.series(key.of_route(route).with_mtls(mtls))
}

/// A connection that is closed now is reset, so that its client does not take it for one that was served.
fn reset_on_close(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
