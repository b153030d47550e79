//! What a policy means for one request: how long it may take, whether it is retried, and whether it is made to fail.
//!
//! In: the policy of the request's rule, and what the request asks for itself. Out: decisions, counted here. The loop in
//! `attempts` carries them out.

use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, sleep};
use tulle_mesh::counted_event::{Fault, RetryRefused, Timeout};
use tulle_mesh::wire::head::Protocol as Travels;

use super::overrides::{self, Overrides};
use crate::attempt::{Attempt, AttemptPolicy, End, Report, grpc_status, until};
use crate::backend::Backend;
use crate::call::Call;
use crate::config::traffic::Faults;
use crate::error::Failure;
use crate::grpc;
use crate::http1::Head;
use crate::route::RouteTarget;
use crate::route::call_policy::{Answered, CallPolicy, Pushback, RetryPolicy, RetryReason};
use crate::worker::Worker;

/// The name of [`Failure::OursOverloaded`] in an answer, which a gateway may have passed on.
const OVERLOADED: &[u8] = b"OursOverloaded";
/// A server that knows how much time a request has may be the first to say that it is over: it counts whole
/// milliseconds.
const EARLY: Duration = Duration::from_millis(5);

/// One request, and what holds for it.
pub(super) struct RetryState<'a> {
    pub(super) worker: &'a Worker,
    pub(super) backend: &'a Backend,
    pub(super) policy: &'a CallPolicy,
    /// The route whose rule decided.
    pub(super) route: Option<&'a Arc<str>>,
    /// Retries that there may be. What is repeated without any policy is not counted.
    retries: u8,
    /// Retries that have been decided.
    granted: Cell<u8>,
    /// Its `grpc-timeout`.
    pub(super) grpc_timeout: Option<Duration>,
    /// When the time is over that the client gives; `None`: never, or that of the policy is over before.
    client_deadline: Option<Instant>,
}

/// A retry that has been decided and paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Retry {
    /// How long to wait before it.
    pub(super) wait: Duration,
}

/// Properties of a request on which retrying it depends.
pub(super) struct RequestTraits {
    is_idempotent: bool,
    is_grpc: bool,
    deadline: Option<Instant>,
}

/// What a policy makes of one attempt: how long it waits, and with which status it fails.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn {
    delay: Option<Duration>,
    abort: Option<u16>,
}

/// An attempt that was made to fail.
pub(super) struct Injected {
    pub(super) end: End,
    pub(super) retry: Option<Retry>,
}

impl RequestTraits {
    pub(super) fn of(trying: &RetryState<'_>, call: &Call<'_>) -> Self {
        let judges = trying.policy.judges_answers();
        Self {
            is_idempotent: judges && call.is_idempotent(),
            is_grpc: judges && call.travels == Travels::Http2 && grpc::content_type(&call.head).is_some(),
            deadline: call.deadline,
        }
    }
}

impl<'a> RetryState<'a> {
    /// Reads what a request asks for itself, sets its deadline, and counts it as a first attempt.
    pub(super) fn begin(worker: &'a Worker, way: &'a RouteTarget, call: &mut Call<'_>) -> Self {
        let policy = &*way.policy;
        let Overrides { timeout, retries, grpc_timeout } = overrides::take(&mut call.head);
        let grpc_timeout = grpc_timeout.filter(|_| call.travels == Travels::Http2);
        let own = [timeout, grpc_timeout].into_iter().flatten().min();
        let limit = [own, policy.request].into_iter().flatten().min();
        if let Some(at) = limit.and_then(|limit| call.since.checked_add(limit)) {
            call.deadline = Some(call.deadline.map_or(at, |earlier| earlier.min(at)));
        }
        let allowed = policy.retry.as_ref().map_or(0, |retry| retry.retries);
        if policy.judges_answers() {
            let shadow = policy.shadow.as_ref().and_then(|shadow| shadow.retry.as_ref());
            let share = |retry: &RetryPolicy| retry.budget;
            way.backend.earn_retries(policy.retry.as_ref().map(share), shadow.map(share));
        }
        Self {
            worker,
            backend: &way.backend,
            policy,
            route: way.route.as_ref(),
            retries: retries.map_or(allowed, |wished| wished.min(allowed)),
            granted: Cell::new(0),
            grpc_timeout,
            client_deadline: call.deadline.filter(|_| limit != policy.request),
        }
    }

    /// What holds for the attempt that begins now.
    pub(super) fn limits(&self, call: &Call<'_>, now: Instant) -> AttemptPolicy<'static> {
        AttemptPolicy {
            deadline: call.deadline,
            cutoff: self.policy.attempt.map(|limit| now + limit),
            idle: self.policy.idle,
            refuses_claims: false,
            compared: false,
            refuses: None,
        }
    }

    /// Tells the server what is left of the request's time.
    pub(super) fn pass_deadline_on(&self, call: &mut Call<'_>) {
        if self.grpc_timeout.is_some()
            && let Some(deadline) = call.deadline
        {
            grpc::renew_timeout(&mut call.head, deadline);
        }
    }

    /// Whether another attempt follows an answer, instead of its delivery.
    pub(super) fn judge(&self, head: &Head, report: &Report, asked: &RequestTraits) -> Option<Retry> {
        let status = head.status();
        if status < 400 && !asked.is_grpc {
            return None;
        }
        let grpc = if asked.is_grpc { grpc_status(&head.headers) } else { None };
        let is_marked = head.header("tulle-reason").is_some_and(|reason| **reason == *OVERLOADED);
        // One sidecar asks one more pod, and who calls that sidecar's application asks nobody: else a pod too few would
        // be a multiple of the load for all.
        if (is_marked && !report.shed) || (report.shed && self.granted.get() > 0) {
            return None;
        }
        let pushback = pushback(head);
        self.judge_answer(&Answered { status, grpc_status: grpc, shed: report.shed, pushback }, asked)
    }

    fn judge_answer(&self, answered: &Answered, asked: &RequestTraits) -> Option<Retry> {
        let enforced = self.policy.retry.as_ref();
        if let Some(reason) = enforced.and_then(|retry| retry.of_answer(answered, asked.is_idempotent)) {
            return self.grant(reason, Some(answered), asked.deadline);
        }
        let shadow = self.policy.shadow.as_ref().and_then(|shadow| shadow.retry.as_ref());
        if let Some(reason) = shadow.and_then(|retry| retry.of_answer(answered, asked.is_idempotent))
            && self.backend.might_retry(Instant::now())
        {
            self.worker.telemetry.event(reason.would());
        }
        None
    }

    /// Whether another attempt follows one that took too long.
    pub(super) fn after_timeout(&self, end: &End, call: &Call<'_>) -> Option<Retry> {
        if *end != End::Final(Failure::UpstreamTimeout) {
            return None;
        }
        self.worker.telemetry.event(Timeout::Attempt);
        if !call.body.is_replayable() || !call.is_idempotent() {
            return None;
        }
        let reason = self.policy.retry.as_ref()?.of_timeout()?;
        self.grant(reason, None, call.deadline)
    }

    /// Whether another attempt follows one that could be repeated, but has no endpoint left to go to.
    pub(super) fn after_all(&self, end: &End, call: &Call<'_>) -> Option<Retry> {
        let retry = self.policy.retry.as_ref()?;
        let reason = match end {
            End::NotProcessed(_) => retry.of_connect(),
            _ => retry.of_reset(),
        };
        self.grant(reason?, None, call.deadline)
    }

    /// Pays for a retry, if there may be one.
    fn grant(
        &self,
        reason: RetryReason,
        answered: Option<&Answered>,
        deadline: Option<Instant>,
    ) -> Option<Retry> {
        let granted = self.granted.get();
        if granted >= self.retries {
            return None;
        }
        let wait = self.policy.retry.as_ref()?.wait(answered, fastrand::f64())?;
        let now = Instant::now();
        if deadline.is_some_and(|at| now + wait >= at) {
            return None;
        }
        let telemetry = &self.worker.telemetry;
        if !self.backend.may_retry(now) {
            telemetry.event(RetryRefused::Budget);
            return None;
        }
        self.granted.set(granted + 1);
        telemetry.event(reason);
        Some(Retry { wait })
    }

    /// Whether it is its client who gives it so little time.
    pub(super) fn is_clients_time(&self) -> bool {
        self.client_deadline.is_some()
    }

    /// Whether an attempt ended because the time was over that the client gives, as this sidecar says, that of the
    /// server, or a gRPC server. How short that was says nothing of the endpoint.
    pub(super) fn is_of_impatient_client(&self, attempt: &Attempt) -> bool {
        let Some(deadline) = self.client_deadline else { return false };
        // DEADLINE_EXCEEDED may come behind messages.
        let said_at = match (attempt.status, attempt.grpc_status) {
            (Some(504), _) => attempt.head_at.unwrap_or_else(Instant::now),
            (_, Some(4)) => Instant::now(),
            _ => return attempt.end == End::Final(Failure::DeadlineExceeded),
        };
        said_at + EARLY >= deadline
    }

    /// Whether the time is over at `now` that its gRPC client gives it. gRPC in C rounds what it announces up by less than
    /// one in a hundred, and gives up before that.
    pub(super) fn is_past_grpc_timeout(&self, call: &Call<'_>, now: Instant) -> bool {
        self.grpc_timeout
            .filter(|_| grpc::content_type(&call.head).is_some())
            .is_some_and(|limit| now.saturating_duration_since(call.since) + EARLY.max(limit / 50) >= limit)
    }

    /// Draws whether an attempt is to wait or fail. `None`: neither, as of most. Counts what a policy that is only tried
    /// would do.
    pub(super) fn draw(&self) -> Option<Drawn> {
        let shadow = self.policy.shadow.as_ref().and_then(|shadow| shadow.faults.as_ref());
        if let Some(Drawn { delay, abort }) = shadow.and_then(Drawn::of) {
            for fault in [delay.map(|_| Fault::Delay), abort.map(|_| Fault::Abort)].into_iter().flatten() {
                self.worker.telemetry.event(fault.would());
            }
        }
        self.policy.faults.as_ref().and_then(Drawn::of)
    }

    /// Makes an attempt wait or fail. `None`: it goes on to the endpoint. Nobody learns anything of the endpoint from
    /// that.
    pub(super) async fn inject(
        &self,
        Drawn { delay, abort }: Drawn,
        call: &mut Call<'_>,
        limits: &AttemptPolicy<'_>,
        asked: &RequestTraits,
    ) -> Option<Injected> {
        let telemetry = &self.worker.telemetry;
        let failed = |end| Some(Injected { end, retry: None });
        if let Some(delay) = delay {
            telemetry.event(Fault::Delay);
            let (expires, overdue) = limits.expiry();
            tokio::select! {
                biased;
                () = call.answer.gone() => return failed(End::Client(Failure::ClientGaveUp)),
                () = until(expires) => return failed(End::Final(overdue)),
                () = sleep(delay) => {}
            }
        }
        let status = abort?;
        telemetry.event(Fault::Abort);
        let answered = Answered { status, ..Answered::default() };
        let judged = call.body.is_replayable().then(|| self.judge_answer(&answered, asked)).flatten();
        let end = match judged {
            Some(_) => End::Refused(status),
            None => End::Final(Failure::FaultInjected(status)),
        };
        Some(Injected { end, retry: judged })
    }

    /// Counts what time-outs have done to a request that has ended with this attempt, and would have done.
    pub(super) fn conclude(&self, last: &Attempt, call: &Call<'_>) {
        let telemetry = &self.worker.telemetry;
        match &last.end {
            End::Final(Failure::DeadlineExceeded) => telemetry.event(Timeout::Request),
            End::Delivered(Err(Failure::IdleTimeout)) => telemetry.event(Timeout::Idle),
            _ => {}
        }
        let Some(shadow) = &self.policy.shadow else { return };
        let head_at = last.head_at.unwrap_or_else(Instant::now);
        let exceeds = |limit: Option<Duration>| {
            limit.is_some_and(|limit| head_at.saturating_duration_since(call.since) > limit)
        };
        if exceeds(shadow.request) {
            telemetry.event(Timeout::Request.would());
        }
        // Of several attempts it is not known here which was the slow one.
        if call.attempts == 1 && exceeds(shadow.attempt) {
            telemetry.event(Timeout::Attempt.would());
        }
    }
}

impl Drawn {
    /// What happens to one attempt now. The clock is asked only for those that are hit.
    fn of(faults: &Faults) -> Option<Self> {
        let drawn = Self::by_chance(faults);
        let is_hit = drawn.delay.is_some() || drawn.abort.is_some();
        (is_hit && still_hold(faults)).then_some(drawn)
    }

    /// Each is drawn by itself, of all attempts.
    fn by_chance(faults: &Faults) -> Self {
        let hits = |permyriad: u32| permyriad > 0 && fastrand::u32(..10_000) < permyriad;
        Self {
            delay: faults.delay.filter(|delay| hits(delay.permyriad)).map(|delay| delay.by),
            abort: faults.abort.filter(|abort| hits(abort.permyriad)).map(|abort| abort.status),
        }
    }
}

/// Whether faults have not ended yet.
fn still_hold(faults: &Faults) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    u64::try_from(faults.until_unix).is_ok_and(|until| now < until)
}

/// When the server wants to be asked again. A date is not read, because clocks differ by more than anybody waits here.
/// Who names one does not want to be asked at once.
fn pushback(head: &Head) -> Option<Pushback> {
    let text = |name| head.header(name).and_then(|value| std::str::from_utf8(value).ok()).map(str::trim);
    if let Some(grpc) = text("grpc-retry-pushback-ms") {
        // What cannot be read counts as a no (gRFC A6).
        let ms = grpc.parse::<i64>().ok().and_then(|ms| u64::try_from(ms).ok());
        return Some(ms.map_or(Pushback::Never, |ms| Pushback::After(Duration::from_millis(ms))));
    }
    let seconds = text("retry-after")?.parse().ok();
    Some(seconds.map_or(Pushback::Never, |seconds| Pushback::After(Duration::from_secs(seconds))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::traffic::{Abort, Delay};

    fn answer(lines: &[(&'static str, &'static str)]) -> Head {
        let mut head = Head::answer(503, "x", 0);
        lines.iter().for_each(|(name, value)| head.push(name, *value));
        head
    }

    #[test]
    fn when_to_ask_again_is_read_from_either_header() {
        for (lines, expected) in [
            (&[][..], None),
            (&[("retry-after", "2")], Some(Pushback::After(Duration::from_secs(2)))),
            (&[("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")], Some(Pushback::Never)),
            (&[("retry-after", "99999999999999999999")], Some(Pushback::Never)),
            (&[("grpc-retry-pushback-ms", "30")], Some(Pushback::After(Duration::from_millis(30)))),
            (&[("grpc-retry-pushback-ms", "-1")], Some(Pushback::Never)),
            (&[("grpc-retry-pushback-ms", "soon")], Some(Pushback::Never)),
        ] {
            assert_eq!(pushback(&answer(lines)), expected, "{lines:?}");
        }
    }

    #[test]
    fn faults_are_drawn_by_themselves_of_all_attempts_and_end() {
        let delay = Some(Delay { by: Duration::from_secs(1), permyriad: 5_000 });
        let abort = Some(Abort { status: 503, permyriad: 2_000 });
        let faults = Faults { delay, abort, until_unix: i64::MAX };
        let drawn: Vec<Drawn> = (0..20_000).map(|_| Drawn::by_chance(&faults)).collect();
        let share = |of: fn(&Drawn) -> bool| {
            drawn.iter().filter(|drawn| of(drawn)).count() as f64 / drawn.len() as f64
        };
        let (delays, aborts) = (share(|drawn| drawn.delay.is_some()), share(|drawn| drawn.abort.is_some()));
        let both = share(|drawn| drawn.delay.is_some() && drawn.abort.is_some());
        for (seen, expected) in [(delays, 0.5), (aborts, 0.2), (both, 0.1)] {
            assert!((seen - expected).abs() < 0.02, "{seen} for {expected}");
        }
        assert!((0..100).any(|_| Drawn::of(&faults).is_some()));
        let ended = Faults { until_unix: 1, ..faults };
        assert!((0..100).all(|_| Drawn::of(&ended).is_none()));
    }
}
