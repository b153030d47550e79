//! Copies of requests: to the backends of mirror filters, and to the version on trial of a Canary that asks for them.
//!
//! A copy is sent once, to one endpoint, beside the request and without anybody waiting for it; its answer is dropped.
//! Those of mirror filters say nothing: they are counted for no Canary, breaker or average. Those of a Canary are
//! evidence like attempts at its version, as long as that has no share of the requests (see [`steer`]). A copy has the
//! body of its request: so that each can be sent by itself, the body of a request that is to be copied is read before its
//! first attempt, up to 64 KiB ([`STREAM_CREDIT`](tulle_mesh::wire::STREAM_CREDIT)) and for at most
//! [`BODY_COMES_WITHIN`], a gRPC call for [`MESSAGE_COMES_WITHIN`]. No other request waits for its body.
//!
//! [`steer`]: crate::backend::steer

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout, timeout_at};
use tulle_mesh::counted_event::CopiedRequest;
use tulle_mesh::wire::head::Protocol as Travels;

use super::{count, overrides, patience};
use crate::attempt::{Copied, Opening, open, send_copy};
use crate::backend::{Ask, Backend, Cohort, Upstream};
use crate::call::Call;
use crate::config::Protocol;
use crate::error::Failure;
use crate::grpc;
use crate::http1::{Framing, Head};
use crate::route::{CopyTo, spoken_to};
use crate::task::spawn_boxed;
use crate::telemetry::attempts::evidence_of;
use crate::worker::Worker;

/// How long the rest of a body may take that is read before the first attempt. A client that streams, or waits for an
/// answer before it goes on, is not held up for longer.
const BODY_COMES_WITHIN: Duration = Duration::from_millis(100);
/// The same of a gRPC call. A unary one sends its only message at once, and one that streams may stay open for hours: each
/// would wait for the whole of the longer time.
const MESSAGE_COMES_WITHIN: Duration = Duration::from_millis(5);
/// Copies of one worker that are under way. A backend that hangs must not gather bodies here.
const MAX_UNDER_WAY: u32 = 64;
/// How long a copy may take with its answer. One whose answer has begun in time is good as far as it went: streams and
/// long downloads do not end within this.
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Where a copy goes.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) backend: Rc<Backend>,
    /// What is spoken there, as it is declared.
    pub(super) protocol: Protocol,
    /// The version on trial that it goes to, whose evidence it is; `None`: of a mirror filter.
    pub(super) on_trial: Option<Arc<str>>,
    /// What it asks; `None`: as its request.
    pub(super) head: Option<Rc<Head>>,
}

impl Target {
    /// Of a mirror filter, as its request.
    pub(super) fn of(to: CopyTo<'_>) -> Self {
        Self { backend: Rc::clone(to.backend), protocol: to.protocol, on_trial: None, head: None }
    }
}

/// Sends copies of a request. Returns before they have been sent.
///
/// # Errors
/// [`Failure`] of the client, whose body has broken off.
pub(super) async fn send(
    worker: &Rc<Worker>,
    call: &mut Call<'_>,
    targets: Vec<Target>,
) -> Result<(), Failure> {
    let skip = |why: CopiedRequest| targets.iter().for_each(|_| worker.telemetry.event(why));
    // The bytes of a tunnel are a conversation, and a client that waits to be asked for its body is asked by a server.
    if call.head.upgrade || call.head.expects_continue {
        skip(CopiedRequest::SkippedTunnel);
        return Ok(());
    }
    let limit = Patience::of(&call.head);
    match timeout(limit.within, call.body.read_ahead()).await {
        Ok(Ok(true)) => {}
        Ok(Ok(false)) => {
            skip(CopiedRequest::SkippedLong);
            return Ok(());
        }
        Ok(Err(failure)) => return Err(failure),
        Err(_) => {
            skip(limit.exceeded);
            return Ok(());
        }
    }
    let body = call.body.copy();
    for target in targets {
        if worker.copies.get() >= MAX_UNDER_WAY {
            worker.telemetry.event(CopiedRequest::SkippedBusy);
            continue;
        }
        let head = copied(target.head.as_deref().unwrap_or(&call.head), &body);
        let travels = spoken_to(target.protocol, &head, call.travels);
        let under_way = UnderWay::begin(worker);
        spawn_boxed(|| copy(under_way, target, head, body.clone(), travels));
    }
    Ok(())
}

/// How long the rest of a body may take, and why there is no copy of one that takes longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Patience {
    within: Duration,
    exceeded: CopiedRequest,
}

impl Patience {
    /// With the body of a request with this head.
    fn of(head: &Head) -> Self {
        match grpc::content_type(head) {
            Some(_) => Self { within: MESSAGE_COMES_WITHIN, exceeded: CopiedRequest::SkippedStream },
            None => Self { within: BODY_COMES_WITHIN, exceeded: CopiedRequest::SkippedSlow },
        }
    }
}

/// The head of a copy: as that of its request, with the length that the body has turned out to have, and without what
/// the request asks of this sidecar.
fn copied(head: &Head, body: &Bytes) -> Head {
    let framing = match head.framing {
        Framing::Chunked | Framing::UntilClose => Framing::Length(body.len() as u64),
        known => known,
    };
    let mut head = Head { framing, ..head.clone() };
    overrides::take(&mut head);
    head
}

async fn copy(under_way: UnderWay, target: Target, head: Head, body: Bytes, travels: Travels) {
    let worker = &under_way.0;
    let cohort = if target.on_trial.is_some() { Cohort::OnTrial } else { Cohort::ByShare };
    let chosen = target.backend.pick(&Ask { cohort, no_probe: true, ..Ask::default() });
    // Without a ready pod of the version on trial, another one would be chosen.
    let is_meant =
        |upstream: &Rc<Upstream>| target.on_trial.as_ref().is_none_or(|on| *on == upstream.endpoint.revision);
    let Some(upstream) = chosen.filter(is_meant) else {
        worker.telemetry.event(CopiedRequest::SkippedNoEndpoint);
        return;
    };
    let compared = target.on_trial.is_some() && target.backend.compares_copies();
    let attempts = if compared { upstream.attempts(&worker.telemetry) } else { None };
    let in_flight = upstream.begin();
    let to = Opening {
        backend: &target.backend,
        upstream: &upstream,
        attempt: 0,
        fresh: false,
        limit: patience(&target.backend, &upstream),
        route: None,
        deadline: None,
        renews_grpc_timeout: false,
        waits: Cell::new(false),
    };
    let ends_by = Instant::now() + ENDS_WITHIN;
    let copied = match timeout_at(ends_by, open(worker, &to, &head, travels)).await {
        Ok(Ok(exchange)) => send_copy(exchange, &head, body, ends_by).await,
        Ok(Err(failure)) => Copied::failed(failure),
        // In that time the endpoint was not reached.
        Err(_) => Copied::failed(Failure::UpstreamConnect),
    };
    let head_after = copied.head_at.map(|at| at.duration_since(in_flight.since()));
    // Nothing is learned of the endpoint.
    drop(in_flight);
    let result = copied.result.as_ref().copied();
    let seen = evidence_of(result, copied.grpc_status, copied.shed);
    count(attempts.as_ref(), &target.backend, &upstream, seen, head_after);
    if let Some((reader, writer)) = copied.idle {
        worker.http1.put(upstream.endpoint.address.into(), reader, writer);
    }
    worker.telemetry.event(if result.is_ok() { CopiedRequest::Sent } else { CopiedRequest::Failed });
}

/// A copy that is under way. It is counted until this is dropped.
struct UnderWay(Rc<Worker>);

impl UnderWay {
    fn begin(worker: &Rc<Worker>) -> Self {
        worker.copies.set(worker.copies.get() + 1);
        Self(Rc::clone(worker))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.copies.set(self.0.copies.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_may_stream_waits_for_its_body_for_a_moment_only() {
        let of = |content: &'static str| {
            let mut head = Head::answer(200, "", 0);
            head.headers.clear();
            head.push("content-type", content);
            Patience::of(&head)
        };
        let short = Patience { within: Duration::from_millis(5), exceeded: CopiedRequest::SkippedStream };
        assert_eq!((of("application/grpc"), of("application/grpc+proto")), (short, short));
        let long = Patience { within: BODY_COMES_WITHIN, exceeded: CopiedRequest::SkippedSlow };
        assert_eq!(of("application/json"), long);
    }
}
