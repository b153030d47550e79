//! The one loop of attempts: each request of the pod's application goes to an endpoint, and to another one where that
//! could not be reached, had gone, or gave an answer that a policy does not accept.
//!
//! In: a request, and where it goes. Out: how it ended, after its answer was delivered. Two things are told apart:
//!
//! - What has provably not been served, or may be carried out twice, is *repeated* at once, whatever policies say
//!   ([`End::may_repeat`]). It costs no budget, because no application has had the work.
//! - What a policy wants is *retried* after a back-off, out of a budget ([`Backend::may_retry`]). That is decided before
//!   the answer would be delivered: an answer is refused only if another attempt follows.
//!
//! [`Backend::may_retry`]: crate::backend::Backend::may_retry

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tulle_mesh::counted_event::{RepeatedRequest, Timeout};

use super::opaque::Opened;
use super::retry_state::{Injected, RequestTraits, Retry, RetryState};
use super::{ANEW, MAX_ENDPOINTS, count, observe, patience, unserved};
use crate::attempt::{Attempt, AttemptPolicy, End, Exchange, Opening, Pace, Report, open, run, until};
use crate::backend::{Ask, InFlight, Outcome, Tried, Upstream, Verdict};
use crate::call::{Call, Ended};
use crate::error::Failure;
use crate::http1::Head;
use crate::route::RouteTarget;
use crate::telemetry::Series;
use crate::telemetry::attempts::{Attempts, Seen, evidence_of};
use crate::trace::ClientSpans;
use crate::worker::Worker;

/// An endpoint that was chosen for the next attempt.
struct Chosen {
    upstream: Rc<Upstream>,
    /// Where the attempt is counted: the Canary's epoch is that of the choice.
    evidence: Option<Arc<Attempts>>,
    /// An exchange that is open already.
    ready: Option<Exchange>,
    /// Not on a kept connection.
    fresh: bool,
    /// When it was chosen: the attempt begins then.
    at: Instant,
}

/// An attempt that was made.
struct AttemptResult {
    attempt: Attempt,
    /// On a connection that may have been closed before the request came.
    kept: bool,
    /// `None`: the endpoint has not seen it, because a fault was injected or there was no time left.
    in_flight: Option<InFlight>,
    /// Another attempt is to follow, and is paid for.
    retry: Option<Retry>,
    /// When it ended.
    ended_at: Instant,
}

/// Makes attempts until one need not, or cannot, be repeated. Returns how the request ended, and under what it is
/// counted.
pub(super) async fn attempts(
    worker: &Worker,
    way: &RouteTarget,
    ask: &mut Ask,
    call: &mut Call<'_>,
    opened: Option<Opened>,
) -> (Ended, Arc<Series>) {
    let mut spans = ClientSpans::begin(worker, &mut call.head);
    let trying = RetryState::begin(worker, way, call);
    let (protocol, route) = (call.protocol(), way.route.as_ref());
    let mut is_meshed = None;
    let mut anew = ANEW.iter();
    // Endpoints by repeating alone: a retry begins with none that was tried, and must not repeat from the start.
    let mut places = 1;
    let mut next = match opened.and_then(|opened| ready(opened, call)) {
        Some(ready) => Some(ready),
        None => Chosen::choose(worker, way, ask),
    };
    let mut failed = Attempt::of(End::NotProcessed(Failure::UpstreamNone));
    while let Some(chosen) = next.take() {
        let (upstream, fresh, at) = (Rc::clone(&chosen.upstream), chosen.fresh, chosen.at);
        spans.attempt(call);
        is_meshed = Some(upstream.is_meshed());
        let AttemptResult { mut attempt, kept, in_flight, retry, ended_at } =
            make(&trying, chosen, call).await;
        spans.attempted((worker, way, &*call), Some(&upstream), &attempt, (at, ended_at));
        call.attempts = call.attempts.saturating_add(1);
        let retry = retry.or_else(|| trying.after_timeout(&attempt.end, call));
        let repeats = attempt.end.may_repeat(call);
        if repeats && retry.is_none() && is_over(call.deadline) {
            attempt.end = End::Final(Failure::DeadlineExceeded);
        } else if repeats && retry.is_none() {
            drop(in_flight);
            upstream.avoid();
            if !fresh {
                ask.tried.push(upstream.endpoint.address);
            }
            let goes_on = ask.tried.len().max(places) < MAX_ENDPOINTS;
            next = if goes_on { Chosen::choose(worker, way, ask) } else { None };
            places += usize::from(next.is_some());
            if next.is_none() {
                next = on_fresh_connection(worker, upstream, &mut anew, &attempt.end, kept).await;
            }
            if let Some(next) = &next {
                worker.telemetry.event(why(&attempt.end, next.fresh));
            } else if let Some(retry) = trying.after_all(&attempt.end, call) {
                // All have been tried: from the start.
                ask.tried = Tried::default();
                if !backs_off(retry, call).await {
                    failed = Attempt::of(End::Client(Failure::ClientGaveUp));
                    break;
                }
                next = Chosen::choose(worker, way, ask);
            }
            failed = attempt;
            continue;
        }
        if let Some(in_flight) = in_flight {
            in_flight.end_at(outcome(&attempt, &trying), ended_at);
        }
        let Some(retry) = retry else {
            trying.conclude(&attempt, call);
            let series = upstream.series(&worker.telemetry, protocol, route);
            return (attempt.ended(), series);
        };
        if !backs_off(retry, call).await {
            let series = upstream.series(&worker.telemetry, protocol, route);
            return (Ended::failed(Failure::ClientGaveUp), series);
        }
        ask.tried.push(upstream.endpoint.address);
        // Another endpoint, where there is one.
        let other = Chosen::choose(worker, way, ask);
        next = other.or_else(|| Some(Chosen::new(worker, upstream, false, Instant::now())));
    }
    spans.unserved((worker, way, &*call), &failed);
    trying.conclude(&failed, call);
    let is_meshed = is_meshed.unwrap_or_else(|| way.backend.is_meshed());
    (failed.ended(), unserved(worker, Some(&way.backend), protocol, route, is_meshed))
}

/// One attempt at one endpoint, counted as evidence also where another saves the request.
async fn make(trying: &RetryState<'_>, chosen: Chosen, call: &mut Call<'_>) -> AttemptResult {
    let RetryState { worker, backend, .. } = *trying;
    let Chosen { upstream, evidence, ready, fresh, mut at } = chosen;
    let evidence = evidence.filter(|_| call.compared);
    if call.deadline.is_some_and(|deadline| deadline <= at) {
        let attempt = Attempt::of(End::Final(Failure::DeadlineExceeded));
        return AttemptResult { attempt, kept: false, in_flight: None, retry: None, ended_at: at };
    }
    let limits = trying.limits(call, at);
    let asked = RequestTraits::of(trying, call);
    if let Some(drawn) = trying.draw() {
        let injected = Box::pin(trying.inject(drawn, call, &limits, &asked)).await;
        at = Instant::now();
        if let Some(Injected { end, retry }) = injected {
            return AttemptResult {
                attempt: Attempt::of(end),
                kept: false,
                in_flight: None,
                retry,
                ended_at: at,
            };
        }
    }
    let in_flight = upstream.begin_at(at);
    let exchange = match ready {
        Some(exchange) => Ok(exchange),
        None => connect(trying, &upstream, fresh, call, &limits).await,
    };
    let exchange = match exchange {
        Ok(exchange) => exchange,
        Err(OpeningFailed { end, waited }) => {
            let seen = seen_in_opening(&end, trying.is_clients_time());
            count(evidence.as_ref(), backend, &upstream, seen, None);
            let attempt = Attempt::of(end);
            let ended_at = Instant::now();
            let span = (in_flight.since(), ended_at);
            let failed = verdict(&attempt, seen, trying).waited(waited);
            observe(worker, backend, &upstream, call.protocol(), trying.route, span, failed);
            return AttemptResult { attempt, kept: false, in_flight: Some(in_flight), retry: None, ended_at };
        }
    };
    let kept = exchange.reused;
    let decided = Cell::new(None);
    let refuses = |head: &Head, report: &Report| {
        // A pod that has too much is not asked once more: another one is, or none.
        if report.shed && !backend.has_other(upstream.endpoint.address) {
            return false;
        }
        decided.set(trying.judge(head, report, &asked));
        decided.get().is_some()
    };
    let policy = AttemptPolicy {
        refuses: if trying.policy.judges_answers() { Some(&refuses) } else { None },
        compared: evidence.is_some(),
        ..limits
    };
    let mut attempt = run(call, exchange, &policy).await;
    if let Some((reader, writer)) = attempt.idle.take().filter(|_| !attempt.bound) {
        let server = upstream.endpoint.address.into();
        worker.http1.put_after(server, reader, writer, attempt.head_at, kept);
    }
    let head_after = attempt.head_at.map(|at| at.duration_since(in_flight.since()));
    let seen = seen(&attempt);
    for _ in 0..attempt.report.broken {
        count(evidence.as_ref(), backend, &upstream, Some(Seen::Failed), None);
    }
    if let Some(at) = attempt.head_at {
        upstream.report(attempt.report.load, attempt.report.latency_us, at);
    }
    let ended_at = Instant::now();
    if evidence.is_some() {
        let is_late = trying.is_past_grpc_timeout(call, ended_at);
        let ends = || backend.is_ending(&upstream.endpoint);
        let said = compared(&attempt, seen, is_late, ends);
        count(evidence.as_ref(), backend, &upstream, said, head_after);
    }
    let span = (in_flight.since(), ended_at);
    observe(worker, backend, &upstream, call.protocol(), trying.route, span, verdict(&attempt, seen, trying));
    AttemptResult { attempt, kept, in_flight: Some(in_flight), retry: decided.get(), ended_at }
}

/// An attempt that ended before its exchange was open.
struct OpeningFailed {
    end: End,
    /// It has waited for a connection that another attempt was opening.
    waited: bool,
}

/// Opens an exchange with an endpoint for an attempt, unless the client leaves or the time is over meanwhile.
async fn connect(
    trying: &RetryState<'_>,
    upstream: &Upstream,
    fresh: bool,
    call: &mut Call<'_>,
    limits: &AttemptPolicy<'_>,
) -> Result<Exchange, OpeningFailed> {
    let RetryState { worker, backend, route, .. } = *trying;
    trying.pass_deadline_on(call);
    let to = Opening {
        backend,
        upstream,
        attempt: call.attempts,
        fresh,
        limit: patience(backend, upstream),
        route,
        deadline: call.deadline,
        renews_grpc_timeout: trying.grpc_timeout.is_some(),
        waits: Cell::new(false),
    };
    let (expires, overdue) = limits.expiry();
    let opened = tokio::select! {
        biased;
        opened = open(worker, &to, &call.head, call.travels) => opened.map_err(end_of_opening),
        // Nobody is left to answer. The endpoint has not been reached in that time.
        () = call.answer.gone() => Err(End::Client(Failure::ClientGaveUp)),
        () = until(expires), if expires.is_some() => Err(match overdue {
            // Nothing was sent: another endpoint may be faster.
            Failure::UpstreamTimeout => {
                worker.telemetry.event(Timeout::Attempt);
                End::NotProcessed(Failure::UpstreamTimeout)
            }
            overdue => End::Final(overdue),
        }),
    };
    opened.map_err(|end| OpeningFailed { end, waited: to.waits.get() })
}

/// The endpoint that is left, if it may serve on a fresh connection what it has not served, and after a wait.
async fn on_fresh_connection(
    worker: &Worker,
    upstream: Rc<Upstream>,
    waits: &mut std::slice::Iter<'_, Duration>,
    end: &End,
    kept: bool,
) -> Option<Chosen> {
    if !is_mended_by_a_fresh_connection(end, kept) {
        return None;
    }
    let wait = waits.next()?;
    if !wait.is_zero() {
        sleep(*wait).await;
    }
    Some(Chosen::new(worker, upstream, true, Instant::now()))
}

/// Waits before a retry; whether the client is still there.
async fn backs_off(retry: Retry, call: &mut Call<'_>) -> bool {
    tokio::select! {
        biased;
        () = call.answer.gone() => false,
        () = sleep(retry.wait) => true,
    }
}

impl Chosen {
    /// An endpoint where the request has not been; `None`: there is no other that may be used.
    fn choose(worker: &Worker, way: &RouteTarget, ask: &Ask) -> Option<Self> {
        let now = Instant::now();
        way.backend.pick_at(ask, now).map(|upstream| Self::new(worker, upstream, false, now))
    }

    fn new(worker: &Worker, upstream: Rc<Upstream>, fresh: bool, at: Instant) -> Self {
        let evidence = upstream.attempts(&worker.telemetry);
        Self { upstream, evidence, ready: None, fresh, at }
    }
}

/// The connection that was opened while the client was silent, as the exchange of its first request; `None`: it
/// cannot carry one.
fn ready(opened: Opened, call: &Call<'_>) -> Option<Chosen> {
    let (upstream, evidence, exchange) = opened.into_exchange(&call.head)?;
    Some(Chosen { upstream, evidence, ready: Some(exchange), fresh: false, at: Instant::now() })
}

/// How an attempt ends whose exchange could not be opened: nothing was sent, whatever the method.
fn end_of_opening(failure: Failure) -> End {
    match failure {
        // No other endpoint could take it either.
        Failure::OursNoCertificate | Failure::RouteHeadTooLong(_) => End::Final(failure),
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
        End::Unread(_) | End::Reset(_) => true,
        // Connections between sidecars are always kept ones.
        End::Unanswered(failure) => kept || *failure == Failure::UpstreamLost,
        End::Delivered(_) | End::Refused(_) | End::Final(_) | End::Client(_) => false,
    }
}

/// Why a request is sent again, as an event.
fn why(end: &End, fresh: bool) -> RepeatedRequest {
    match end {
        _ if fresh => RepeatedRequest::SameEndpoint,
        End::NotProcessed(_) => RepeatedRequest::NotProcessed,
        End::Unread(_) | End::Reset(_) => RepeatedRequest::Unread,
        _ => RepeatedRequest::Unanswered,
    }
}

/// What it says of the version of an endpoint that no exchange could be opened. Time that its client has given says how
/// patient that client is.
fn seen_in_opening(end: &End, is_clients_time: bool) -> Option<Seen> {
    match end {
        End::Final(Failure::DeadlineExceeded) if is_clients_time => None,
        // In that time the endpoint was not reached.
        End::Client(Failure::ClientGaveUp)
        | End::NotProcessed(Failure::UpstreamTimeout)
        | End::Final(Failure::DeadlineExceeded) => Some(Seen::Unreached),
        End::NotProcessed(failure) | End::Client(failure) | End::Final(failure) => {
            evidence_of(Err(failure), None, false)
        }
        _ => None,
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
            | End::Reset(failure)
            | End::Unanswered(failure)
            | End::Final(failure)
            | End::Client(failure),
            _,
        ) => Err(failure),
    };
    evidence_of(result, attempt.grpc_status, attempt.report.shed)
}

/// What an attempt says of the version when versions are compared. What it has left open says nothing if its pod `ends`:
/// every rollout does that.
fn compared(
    attempt: &Attempt,
    seen: Option<Seen>,
    is_late: bool,
    ends: impl FnOnce() -> bool,
) -> Option<Seen> {
    let said = match (seen, &attempt.end) {
        (Some(Seen::Good), _) => behind_head(attempt, is_late),
        // The policy has ended what its server had left unfinished.
        (None, End::Delivered(Err(Failure::IdleTimeout))) if attempt.pace == Pace::Stalled => {
            Some(Seen::Failed)
        }
        _ => seen,
    };
    let was_open = seen == Some(Seen::Good) || attempt.status == Some(101);
    said.filter(|said| *said != Seen::Failed || !was_open || !ends())
}

/// The same of one whose head was good. The breaker takes that for the answer, as clients of endless streams do. Here a
/// server that has stopped behind it has failed, if it owes something: a part of a length, the tunnel that it granted, or
/// (`is_late`) what its gRPC client has waited for until its own deadline. One that had sent messages by then may have had
/// nothing more to say.
fn behind_head(attempt: &Attempt, is_late: bool) -> Option<Seen> {
    let was_left = attempt.end == End::Delivered(Err(Failure::ClientGone));
    if was_left && is_late && attempt.grpc_status.is_none() {
        return match attempt.bytes.1 {
            0 => Some(Seen::Failed),
            // Its last word may have wanted an answer, or acknowledged one.
            _ if attempt.is_unanswered => None,
            _ => Some(Seen::Good),
        };
    }
    match attempt.pace {
        Pace::InTime => Some(Seen::Good),
        Pace::Slow => None,
        Pace::Stalled | Pace::HungUp => Some(Seen::Failed),
    }
}

/// What an attempt says to the breaker. A client that is impatient says nothing of the endpoint, and a pod that sheds
/// load is not ejected: the others would get its load too.
fn verdict(attempt: &Attempt, seen: Option<Seen>, trying: &RetryState<'_>) -> Verdict {
    // RESOURCE_EXHAUSTED is what gRPC calls it.
    if attempt.status == Some(429) || attempt.grpc_status == Some(8) {
        return Verdict::Throttled;
    }
    match (&attempt.end, seen) {
        _ if attempt.report.shed => Verdict::Neutral,
        _ if trying.is_of_impatient_client(attempt) => Verdict::Abandoned,
        (End::Client(Failure::ClientGaveUp), _) => Verdict::Abandoned,
        (End::Client(_), _) => Verdict::Neutral,
        (_, Some(Seen::Good)) => Verdict::Good,
        (_, Some(Seen::Failed)) => Verdict::Failed,
        (_, Some(Seen::Unreached)) => Verdict::Unreached,
        (_, Some(Seen::ClientError)) => Verdict::ClientError,
        (_, None) => Verdict::Neutral,
    }
}

/// What an attempt teaches of the latency of its endpoint.
fn outcome(attempt: &Attempt, trying: &RetryState<'_>) -> Option<Outcome> {
    match &attempt.end {
        _ if trying.is_of_impatient_client(attempt) => Some(Outcome::Abandoned),
        // A pod that refuses fast must not look fast either.
        _ if attempt.report.shed => Some(Outcome::Failed),
        // A gRPC call that fails has the status 200: an endpoint that fails fast must not look fast.
        End::Delivered(Ok(_)) if seen(attempt) != Some(Seen::Failed) => {
            attempt.head_at.map(Outcome::Answered)
        }
        End::Delivered(Err(Failure::IdleTimeout)) => attempt.head_at.map(Outcome::Answered),
        End::Client(Failure::ClientGaveUp) | End::Final(Failure::DeadlineExceeded) => {
            Some(Outcome::Abandoned)
        }
        End::Final(Failure::OursNoCertificate | Failure::RouteHeadTooLong(_)) | End::Client(_) => None,
        End::Delivered(Err(failure)) if failure.is_of_client() => None,
        _ => Some(Outcome::Failed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_a_pod_refused_for_load_is_not_evidence_against_its_version() {
        for (status, grpc_status) in [(503, None), (200, Some(14))] {
            for end in [End::Delivered(Ok(status)), End::Refused(status)] {
                let answered = Attempt { status: Some(status), grpc_status, ..Attempt::of(end) };
                assert_eq!(seen(&answered), Some(Seen::Failed));
                let report = Report { shed: true, ..Report::default() };
                assert_eq!(seen(&Attempt { report, ..answered }), None);
            }
        }
    }

    #[test]
    fn a_server_that_stops_behind_the_head_has_failed_if_it_owes_something() {
        let left = |pace, bytes, is_unanswered| Attempt {
            status: Some(200),
            pace,
            bytes: (5, bytes),
            is_unanswered,
            ..Attempt::of(End::Delivered(Err(Failure::ClientGone)))
        };
        for (attempt, is_late, expected) in [
            (left(Pace::Stalled, 300, true), false, Some(Seen::Failed)),
            (left(Pace::Slow, 300, true), false, None),
            (left(Pace::InTime, 300, true), false, Some(Seen::Good)),
            // gRPC: a call without a message, a client that has spoken last, and a watch.
            (left(Pace::InTime, 0, true), true, Some(Seen::Failed)),
            (left(Pace::InTime, 300, true), true, None),
            (left(Pace::InTime, 300, false), true, Some(Seen::Good)),
            (left(Pace::InTime, 0, true), false, Some(Seen::Good)),
        ] {
            let said = seen(&attempt);
            assert_eq!(said, Some(Seen::Good), "what breakers learn stays as it is");
            assert_eq!(compared(&attempt, said, is_late, || false), expected, "{attempt:?} {is_late}");
        }
        let refused = Attempt { status: Some(404), ..left(Pace::Stalled, 1, true) };
        assert_eq!(compared(&refused, seen(&refused), false, || false), Some(Seen::ClientError));
        for (pace, expected) in [(Pace::Stalled, Some(Seen::Failed)), (Pace::InTime, None)] {
            let end = End::Delivered(Err(Failure::IdleTimeout));
            let idle = Attempt { end, ..left(pace, 300, true) };
            assert_eq!(compared(&idle, seen(&idle), false, || false), expected);
        }
        let ended = Attempt { grpc_status: Some(0), ..left(Pace::InTime, 0, true) };
        assert_eq!(compared(&ended, seen(&ended), true, || false), Some(Seen::Good));
    }

    #[test]
    fn what_a_pod_leaves_open_at_its_end_is_not_evidence_and_what_it_fails_is() {
        let tunnel = |end| Attempt { status: Some(101), ..Attempt::of(end) };
        let hung_up = Attempt { pace: Pace::HungUp, ..tunnel(End::Delivered(Ok(101))) };
        let reset = tunnel(End::Delivered(Err(Failure::UpstreamReset)));
        let failed = Attempt { status: Some(500), ..Attempt::of(End::Delivered(Ok(500))) };
        for (attempt, ends, expected) in [
            (&hung_up, true, None),
            (&hung_up, false, Some(Seen::Failed)),
            (&reset, true, None),
            (&reset, false, Some(Seen::Failed)),
            (&failed, true, Some(Seen::Failed)),
        ] {
            let said = compared(attempt, seen(attempt), false, || ends);
            assert_eq!(said, expected, "{attempt:?} {ends}");
        }
    }

    #[test]
    fn a_client_that_does_not_wait_for_a_connection_is_not_evidence_and_the_time_of_a_policy_is() {
        let late = End::Final(Failure::DeadlineExceeded);
        assert_eq!(seen_in_opening(&late, true), None);
        assert_eq!(seen_in_opening(&late, false), Some(Seen::Unreached));
        let slow = End::NotProcessed(Failure::UpstreamTimeout);
        assert_eq!(
            seen_in_opening(&slow, true),
            Some(Seen::Unreached),
            "one attempt has no time of the client"
        );
    }
}
