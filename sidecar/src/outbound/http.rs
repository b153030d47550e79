//! Requests of the pod's application, each to an endpoint of its own.

use std::net::SocketAddr;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tulle_mesh::wire::head::Protocol as Travels;

use super::send;
use crate::balance::Outcome;
use crate::error::Failure;
use crate::forward::{Downstream, Relayed, RequestBody, relay};
use crate::http1::conn::split;
use crate::http1::{Framing, Head};
use crate::http2;
use crate::io::Prefixed;
use crate::message::Source;
use crate::telemetry::attempts::evidence_of;
use crate::worker::{Route, Worker};

/// Serves an HTTP/1 connection until either side closes it.
pub(super) async fn serve_http1(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    stream: TcpStream,
    read: BytesMut,
) -> Result<(), Failure> {
    let (mut reader, mut writer) = split(stream, read);
    loop {
        let head = match reader.request().await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(failure) => {
                worker.telemetry.event("refused_request", failure.name());
                Downstream::Http1(&mut writer).answer(&failure).await;
                return Err(failure);
            }
        };
        let framing = head.framing;
        let mut body = RequestBody::new(Source::Http1(&mut reader), framing);
        let mut down = Downstream::Http1(&mut writer);
        let served = serve(worker, route, &head, &mut body, &mut down, Travels::Http1).await;
        if !served {
            return Ok(());
        }
    }
}

/// Serves an HTTP/2 connection until either side closes it.
pub(super) async fn serve_http2(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    stream: TcpStream,
    read: BytesMut,
) -> Result<(), Failure> {
    let handshake = http2::server().handshake::<_, Bytes>(Prefixed::new(stream, read)).await;
    let mut connection = handshake.map_err(|_| Failure::ClientBadRequest("no HTTP/2 handshake"))?;
    while let Some(accepted) = connection.accept().await {
        let Ok((request, respond)) = accepted else { return Err(Failure::ClientGone) };
        let (worker, route) = (Rc::clone(worker), Rc::clone(route));
        spawn_local(async move { serve_stream(&worker, &route, request, respond).await });
    }
    Ok(())
}

async fn serve_stream(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    request: http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) {
    let (parts, mut body) = request.into_parts();
    let head = http2::request_head(&parts, body.is_end_stream());
    let mut down = Downstream::Http2(&mut respond, None);
    match head {
        Ok(head) => {
            let framing = head.framing;
            let mut body = RequestBody::new(Source::Http2(&mut body), framing);
            serve(worker, route, &head, &mut body, &mut down, Travels::Http2).await;
        }
        Err(failure) => {
            worker.telemetry.event("refused_request", failure.name());
            down.answer(&failure).await;
        }
    }
}

/// Serves one request; whether the client's connection may carry another.
async fn serve(
    worker: &Rc<Worker>,
    route: &Rc<Route>,
    head: &Head,
    body: &mut RequestBody<'_>,
    down: &mut Downstream<'_>,
    travels: Travels,
) -> bool {
    let protocol = if travels == Travels::Http2 { "http2" } else { "http1" };
    let renewed = if route.is_gone() { Some(worker.route(route.address).await) } else { None };
    let route = renewed.as_ref().unwrap_or(route);
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut failure = Failure::UpstreamNone;
    while tried.len() < send::MAX_ATTEMPTS {
        let Some(upstream) = route.pick(&tried) else { break };
        let evidence = upstream.attempts(&worker.telemetry);
        let in_flight = upstream.begin();
        let attempt = u8::try_from(tried.len()).unwrap_or(u8::MAX);
        let exchange = match send::open(worker, route, &upstream, head, travels, attempt).await {
            Ok(exchange) => exchange,
            Err(error) => {
                // Nothing was sent: whatever the method, the request may go elsewhere.
                send::count(evidence.as_ref(), route, &upstream, evidence_of(Err(&error), None), None);
                failure = error;
                upstream.avoid();
                tried.push(upstream.endpoint.address);
                continue;
            }
        };
        let mut relayed = relay(head, body, exchange, down).await;
        if let Some((reader, writer)) = relayed.idle.take() {
            worker.http1.put(upstream.endpoint.address, reader, writer);
        }
        // Also when another endpoint saves the request.
        // A client that leaves a stream whose answer has begun says that the answer was good as far as it went.
        let seen = match (&relayed.result, relayed.head_status) {
            (Err(Failure::ClientGone), Some(status)) => evidence_of(Ok(status), relayed.grpc_status),
            (result, _) => evidence_of(result.as_ref().copied(), relayed.grpc_status),
        };
        let head_after = relayed.head_at.map(|at| at.duration_since(in_flight.since()));
        send::count(evidence.as_ref(), route, &upstream, seen, head_after);
        if !relayed.answered && may_repeat(head, &relayed) {
            worker
                .telemetry
                .event("repeated_request", if relayed.unprocessed { "NotProcessed" } else { "Unanswered" });
            failure = relayed.result.err().unwrap_or(Failure::UpstreamReset);
            upstream.avoid();
            tried.push(upstream.endpoint.address);
            continue;
        }
        let took = in_flight.end(outcome(&relayed));
        let series = upstream.series(&worker.telemetry, protocol);
        series.request(&relayed.result, relayed.grpc_status, took, relayed.bytes);
        return finish(relayed, down).await;
    }
    report_failure(worker, route, &failure, protocol, &tried);
    down.answer(&failure).await;
    // The request's body may not have been read: only a request without one leaves the connection clean.
    false
}

fn outcome(relayed: &Relayed) -> Option<Outcome> {
    match &relayed.result {
        Ok(status) if *status < 500 => relayed.head_at.map(Outcome::Answered),
        Err(Failure::ClientGaveUp) => Some(Outcome::Abandoned),
        Err(failure) if failure.is_of_client() => None,
        _ => Some(Outcome::Failed),
    }
}

async fn finish(relayed: Relayed, down: &mut Downstream<'_>) -> bool {
    if let (Err(failure), false) = (&relayed.result, relayed.answered) {
        tracing::info!(reason = failure.name(), "a request failed: {failure}");
        down.answer(failure).await;
    }
    relayed.client_reusable
}

/// A request that no application has seen goes elsewhere; one that may have been seen only if its
/// method allows it to be seen twice (RFC 9110 §9.2.2).
fn may_repeat(head: &Head, relayed: &Relayed) -> bool {
    if relayed.unprocessed {
        return true;
    }
    let idempotent = matches!(head.request_line().0, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
    relayed.unanswered && idempotent && !head.upgrade && head.framing == Framing::None
}

fn report_failure(
    worker: &Worker,
    route: &Route,
    failure: &Failure,
    protocol: &'static str,
    tried: &[SocketAddr],
) {
    let service = route.service_name().unwrap_or_else(|| route.address.to_string());
    tracing::warn!(service, ?tried, reason = failure.name(), "no endpoint served a request: {failure}");
    let (namespace, name) = match service.split_once('/') {
        Some((namespace, rest)) => (namespace, rest.split(':').next().unwrap_or(rest)),
        None => ("", "pod"),
    };
    let series = worker.telemetry.outbound(namespace, name, "", protocol);
    series.request(&Err(failure.clone()), None, std::time::Duration::ZERO, (0, 0));
}
