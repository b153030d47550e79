//! Requests of the pod's application, each to an endpoint of its own, and to another one where that could not be
//! reached or had gone. This is the one loop of attempts: what may be repeated is [`End::may_repeat`]'s to say.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::Instant;

use super::opaque::Opened;
use super::{ANEW, MAX_ENDPOINTS, count, patience, unserved};
use crate::attempt::answer::Answer;
use crate::attempt::{Attempt, AttemptPolicy, End, Exchange, Opening, open, run};
use crate::backend::{Backend, InFlight, Outcome, Tried, Upstream};
use crate::call::{Call, Ended};
use crate::error::Failure;
use crate::http1::conn::{close, split};
use crate::http2;
use crate::io::Prefixed;
use crate::route::Port;
use crate::telemetry::Series;
use crate::telemetry::attempts::{Attempts, Seen, evidence_of};
use crate::worker::Worker;

/// Serves an HTTP/1 connection until either side closes it. `opened`: a connection to an endpoint that was opened
/// while the client was silent, for its first request.
pub(super) async fn serve_http1(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    read: BytesMut,
    mut opened: Option<Box<Opened>>,
) -> Result<(), Failure> {
    let (mut reader, mut writer) = split(stream, read);
    loop {
        let head = match reader.request().await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(failure) => {
                worker.telemetry.event("refused_request", failure.name());
                Box::pin(Answer::Http1(&mut writer).fail(&failure)).await;
                Box::pin(close(reader, writer)).await;
                return Err(failure);
            }
        };
        let call = Call::http1(head, &mut reader, &mut writer);
        // In a place of its own, which is free again when the request has ended: a connection that waits for its next
        // request occupies a tenth of one that serves it. The allocator hands the same place to one after another.
        if !Box::pin(serve(worker, port, call, opened.take())).await {
            Box::pin(close(reader, writer)).await;
            return Ok(());
        }
    }
}

/// Serves an HTTP/2 connection until either side closes it.
pub(super) async fn serve_http2(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    read: BytesMut,
) -> Result<(), Failure> {
    let handshake = http2::server().handshake::<_, Bytes>(Prefixed::new(stream, read)).await;
    let mut connection = handshake.map_err(|_| Failure::ClientBadRequest("no HTTP/2 handshake"))?;
    while let Some(accepted) = connection.accept().await {
        let Ok((request, respond)) = accepted else { return Err(Failure::ClientGone) };
        let (worker, port) = (Rc::clone(worker), Rc::clone(port));
        spawn_local(async move { serve_stream(&worker, &port, request, respond).await });
    }
    Ok(())
}

async fn serve_stream(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    request: ::http::Request<h2::RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
) {
    let (parts, mut body) = request.into_parts();
    match http2::request_head(&parts, body.is_end_stream()) {
        Ok(head) => {
            serve(worker, port, Call::http2(head, &mut body, &mut respond), None).await;
        }
        Err(failure) => {
            worker.telemetry.event("refused_request", failure.name());
            Answer::Http2(&mut respond, None).fail(&failure).await;
        }
    }
}

/// Serves one request; whether the client's connection may carry another.
async fn serve(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    mut call: Call<'_>,
    opened: Option<Box<Opened>>,
) -> bool {
    let backend = if port.is_gone() {
        // The connection has outlived what was known of its address.
        Box::pin(worker.port(port.address())).await.backend(worker)
    } else {
        port.backend(worker)
    };
    let prepared = call.prepare().await;
    let (ended, series) = match (prepared, &backend) {
        (Ok(()), Some(backend)) => attempts(worker, backend, &mut call, opened).await,
        (prepared, backend) => {
            let failure = prepared.err().unwrap_or(Failure::UpstreamNone);
            (Ended::failed(failure), unserved(worker, backend.as_deref(), call.protocol()))
        }
    };
    call.finish(worker, &series, ended).await
}

/// An endpoint that was chosen for the next attempt.
struct Chosen {
    upstream: Rc<Upstream>,
    /// Where the attempt is counted: the Canary's epoch is that of the choice.
    evidence: Option<Arc<Attempts>>,
    /// An exchange that is open already.
    ready: Option<Exchange>,
    /// Not on a kept connection.
    fresh: bool,
}

/// An attempt that was made.
struct Made {
    attempt: Attempt,
    /// On a connection that may have been closed before the request came.
    kept: bool,
    in_flight: InFlight,
}

/// Makes attempts until one need not, or cannot, be repeated. Returns how the request ended, and under what it is
/// counted.
async fn attempts(
    worker: &Worker,
    backend: &Backend,
    call: &mut Call<'_>,
    opened: Option<Box<Opened>>,
) -> (Ended, Arc<Series>) {
    let protocol = call.protocol();
    let mut tried = Tried::default();
    let mut anew = ANEW.iter();
    let mut next = match opened.and_then(|opened| ready(*opened, call)) {
        Some(ready) => Some(ready),
        None => backend.pick(&tried).map(|upstream| Chosen::new(worker, upstream, false)),
    };
    let mut failed = Attempt::of(End::NotProcessed(Failure::UpstreamNone));
    while let Some(chosen) = next.take() {
        let (upstream, fresh) = (Rc::clone(&chosen.upstream), chosen.fresh);
        let Made { attempt, kept, in_flight } = make(worker, backend, chosen, call).await;
        call.attempts = call.attempts.saturating_add(1);
        if !attempt.end.may_repeat(call) || is_over(call.deadline) {
            in_flight.end(outcome(&attempt));
            let series = upstream.series(&worker.telemetry, protocol);
            return (attempt.ended(), series);
        }
        drop(in_flight);
        upstream.avoid();
        if !fresh {
            tried.push(upstream.endpoint.address);
        }
        let other = if tried.len() < MAX_ENDPOINTS { backend.pick(&tried) } else { None };
        next = match other {
            Some(other) => Some(Chosen::new(worker, other, false)),
            None if is_mended_by_a_fresh_connection(&attempt.end, kept) => match anew.next() {
                Some(wait) => {
                    if !wait.is_zero() {
                        tokio::time::sleep(*wait).await;
                    }
                    Some(Chosen::new(worker, upstream, true))
                }
                None => None,
            },
            None => None,
        };
        if let Some(next) = &next {
            worker.telemetry.event("repeated_request", why(&attempt.end, next.fresh));
        }
        failed = attempt;
    }
    (failed.ended(), unserved(worker, Some(backend), protocol))
}

/// One attempt at one endpoint, counted as evidence also where another saves the request.
async fn make(worker: &Worker, backend: &Backend, chosen: Chosen, call: &mut Call<'_>) -> Made {
    let Chosen { upstream, evidence, ready, fresh } = chosen;
    let in_flight = upstream.begin();
    let exchange = match ready {
        Some(exchange) => Ok(exchange),
        None => {
            let limit = patience(backend, &upstream);
            let limit = call.deadline.map_or(limit, |at| limit.min(at.duration_since(Instant::now())));
            let to = Opening { backend, upstream: &upstream, attempt: call.attempts, fresh, limit };
            tokio::select! {
                biased;
                opened = open(worker, &to, &call.head, call.travels) => opened.map_err(unopened),
                // Nobody is left to answer. The endpoint has not been reached in that time.
                () = call.answer.gone() => Err(End::Client(Failure::ClientGaveUp)),
            }
        }
    };
    let exchange = match exchange {
        Ok(exchange) => exchange,
        Err(end) => {
            let seen = match &end {
                End::Client(Failure::ClientGaveUp) => Some(Seen::Unreached),
                End::NotProcessed(failure) | End::Client(failure) | End::Final(failure) => {
                    evidence_of(Err(failure), None)
                }
                _ => None,
            };
            count(evidence.as_ref(), backend, &upstream, seen, None);
            return Made { attempt: Attempt::of(end), kept: false, in_flight };
        }
    };
    let kept = exchange.reused;
    let policy = AttemptPolicy { deadline: call.deadline, refuses_claims: false };
    let mut attempt = run(call, exchange, &policy).await;
    if let Some((reader, writer)) = attempt.idle.take().filter(|_| !attempt.bound) {
        worker.http1.put(upstream.endpoint.address.into(), reader, writer);
    }
    let head_after = attempt.head_at.map(|at| at.duration_since(in_flight.since()));
    count(evidence.as_ref(), backend, &upstream, seen(&attempt), head_after);
    Made { attempt, kept, in_flight }
}

impl Chosen {
    fn new(worker: &Worker, upstream: Rc<Upstream>, fresh: bool) -> Self {
        let evidence = upstream.attempts(&worker.telemetry);
        Self { upstream, evidence, ready: None, fresh }
    }
}

/// The connection that was opened while the client was silent, as the exchange of its first request; `None`: it
/// cannot carry one.
fn ready(opened: Opened, call: &Call<'_>) -> Option<Chosen> {
    let (upstream, evidence, exchange) = opened.into_exchange(&call.head)?;
    Some(Chosen { upstream, evidence, ready: Some(exchange), fresh: false })
}

/// How an attempt ends whose exchange could not be opened: nothing was sent, whatever the method.
fn unopened(failure: Failure) -> End {
    match failure {
        // No other endpoint could take it either.
        Failure::OursNoCertificate => End::Final(failure),
        failure if failure.is_of_client() => End::Client(failure),
        failure => End::NotProcessed(failure),
    }
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|at| at <= Instant::now())
}

/// Whether the endpoint itself may serve on a fresh connection what it has not served on this one. An endpoint
/// that could not be connected at all is not asked again.
fn is_mended_by_a_fresh_connection(end: &End, kept: bool) -> bool {
    match end {
        End::NotProcessed(failure) => *failure == Failure::UpstreamNotProcessed,
        End::Unread(_) => true,
        // Connections between sidecars are always kept ones.
        End::Unanswered(failure) => kept || *failure == Failure::UpstreamLost,
        End::Delivered(_) | End::Refused(_) | End::Final(_) | End::Client(_) => false,
    }
}

/// Why a request is sent again, as an event.
fn why(end: &End, fresh: bool) -> &'static str {
    match end {
        _ if fresh => "SameEndpoint",
        End::NotProcessed(_) => "NotProcessed",
        End::Unread(_) => "Unread",
        _ => "Unanswered",
    }
}

/// What an attempt says of the version of its endpoint. A client that leaves a stream whose answer has begun says
/// that the answer was good as far as it went.
fn seen(attempt: &Attempt) -> Option<Seen> {
    let result = match (&attempt.end, attempt.status) {
        (End::Delivered(Err(Failure::ClientGone)) | End::Client(Failure::ClientGone), Some(status)) => {
            Ok(status)
        }
        (End::Delivered(Ok(status)) | End::Refused(status), _) => Ok(*status),
        (
            End::Delivered(Err(failure))
            | End::NotProcessed(failure)
            | End::Unread(failure)
            | End::Unanswered(failure)
            | End::Final(failure)
            | End::Client(failure),
            _,
        ) => Err(failure),
    };
    evidence_of(result, attempt.grpc_status)
}

/// What an attempt teaches of the latency of its endpoint.
fn outcome(attempt: &Attempt) -> Option<Outcome> {
    match &attempt.end {
        End::Delivered(Ok(status)) if *status < 500 => attempt.head_at.map(Outcome::Answered),
        End::Client(Failure::ClientGaveUp) => Some(Outcome::Abandoned),
        End::Final(Failure::OursNoCertificate) | End::Client(_) => None,
        End::Delivered(Err(failure)) if failure.is_of_client() => None,
        _ => Some(Outcome::Failed),
    }
}
