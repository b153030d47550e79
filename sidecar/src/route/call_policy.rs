//! What holds for the requests of one rule: how long they may take, which answers are asked for again, and what is
//! made to fail. Compiled once from the sections of MeshPolicies and the route's own values, which outrank them.
//!
//! Nothing here waits, counts, or knows an endpoint. The breaker and the balancer belong to a backend, not to a rule.

use std::time::Duration;

pub use tulle_mesh::counted_event::Retry as RetryReason;

use crate::config::traffic::{Faults, RetryOn, Traffic};
use crate::config::{RuleRetry, RuleTimes};

/// Retries beside the first attempt, whatever is asked for: n layers of k attempts make kⁿ calls.
const MOST_RETRIES: u8 = 2;
/// The budget of a route whose Service has no policy, in percent of first attempts.
const BUDGET_PERCENT: u32 = 20;
/// The least wait before a retry.
const LEAST_WAIT: Duration = Duration::from_millis(25);
/// The most that chance adds to it.
const JITTER: Duration = Duration::from_millis(225);
/// The most that a server may ask to be waited for: somebody holds the request meanwhile.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// What holds for the requests of one rule. The default is what holds without any policy: nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallPolicy {
    /// Until the head of the answer, all attempts together.
    pub request: Option<Duration>,
    /// The same of one attempt.
    pub attempt: Option<Duration>,
    /// Without a byte in either direction, after the head of the answer.
    pub idle: Option<Duration>,
    /// Which answers are asked for again.
    pub retry: Option<RetryPolicy>,
    /// What is made to fail.
    pub faults: Option<Faults>,
    /// What is only counted; `None`: nothing.
    pub shadow: Option<Box<ShadowPolicy>>,
}

/// What would be done to the requests of one rule, and is only counted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShadowPolicy {
    /// Until the head of the answer.
    pub request: Option<Duration>,
    /// The same of one attempt.
    pub attempt: Option<Duration>,
    /// Which answers would be asked for again.
    pub retry: Option<RetryPolicy>,
    /// What would be made to fail.
    pub faults: Option<Faults>,
}

/// Which answers are asked for again, and how often.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    on: RetryOn,
    /// Of a route: these are retried whatever the method is, because the route's author has named them (GEP-1731).
    codes: Box<[u16]>,
    /// Beside the first attempt.
    pub retries: u8,
    /// Retries for each first attempt.
    pub budget: f64,
    least_wait: Duration,
}

/// What an answer says to whoever might ask again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// The HTTP status.
    pub status: u16,
    /// The `grpc-status` of an answer that consists of nothing else.
    pub grpc_status: Option<u16>,
    /// The endpoint's sidecar has refused it for load: the application has not seen it.
    pub shed: bool,
    /// `Retry-After`, or `grpc-retry-pushback-ms`.
    pub pushback: Option<Pushback>,
}

/// When the server wants to be asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushback {
    /// Not at all.
    Never,
    /// After this time.
    After(Duration),
}

impl CallPolicy {
    /// What holds for a rule of a Service with these sections. `times`: the route's own values, absent for the Service
    /// itself.
    pub fn of(traffic: &Traffic, shadow: &Traffic, times: Option<&RuleTimes>) -> Self {
        let timeout = traffic.timeout.unwrap_or_default();
        let request = times.and_then(|times| times.request).unwrap_or(timeout.request);
        let attempt = times.and_then(|times| times.attempt).unwrap_or(timeout.attempt);
        let budget_percent = traffic.retry.map_or(BUDGET_PERCENT, |retry| retry.budget_percent);
        let own = times.and_then(|times| times.retry.as_ref());
        let retry = match own {
            // The budget is the policy's, also for a route: 0% is none.
            Some(own) => (budget_percent > 0).then(|| RetryPolicy::of_route(own, budget_percent)),
            None => RetryPolicy::of(traffic),
        };
        let tried = shadow.timeout.unwrap_or_default();
        let shadow = ShadowPolicy {
            request: tried.request,
            attempt: tried.attempt,
            retry: RetryPolicy::of(shadow),
            faults: shadow.faults,
        };
        let shadow = Some(shadow).filter(|shadow| *shadow != ShadowPolicy::default()).map(Box::new);
        Self { request, attempt, idle: timeout.idle, retry, faults: traffic.faults, shadow }
    }

    /// Whether answers are looked at before they are delivered.
    pub fn judges_answers(&self) -> bool {
        self.retry.is_some() || self.shadow.as_ref().is_some_and(|shadow| shadow.retry.is_some())
    }
}

impl RetryPolicy {
    fn of(traffic: &Traffic) -> Option<Self> {
        let retry = traffic.retry.filter(|retry| retry.attempts > 0 && retry.budget_percent > 0)?;
        Some(Self {
            on: retry.on,
            codes: Box::default(),
            retries: most(retry.attempts),
            budget: f64::from(retry.budget_percent) / 100.0,
            least_wait: LEAST_WAIT,
        })
    }

    /// The API asks implementations to retry failed connections too, once a route has a `retry`.
    fn of_route(retry: &RuleRetry, budget_percent: u32) -> Self {
        Self {
            on: RetryOn { reset: true, connect: true, ..RetryOn::default() },
            codes: retry.codes.as_slice().into(),
            retries: most(u32::from(retry.attempts)),
            budget: f64::from(budget_percent) / 100.0,
            least_wait: retry.backoff.max(LEAST_WAIT),
        }
    }

    /// Why a request with this answer is sent again; `None`: it is not. What an application may have carried out is
    /// carried out twice only if the method allows that, or the route names the status. gRPC has no such methods: there
    /// `unavailable` is its author's word that the calls may be repeated.
    pub fn of_answer(&self, answered: &Answered, is_idempotent: bool) -> Option<RetryReason> {
        let Answered { status, grpc_status, shed, pushback } = *answered;
        if pushback == Some(Pushback::Never) {
            return None;
        }
        let named = self.codes.contains(&status);
        if shed {
            let wanted = self.on.server_error || self.on.unavailable || named;
            return wanted.then_some(RetryReason::Overloaded);
        }
        if grpc_status.is_some() {
            return (grpc_status == Some(14) && self.on.unavailable).then_some(RetryReason::Unavailable);
        }
        match status {
            // Who is asked for less has to say when there may be more.
            429 if named => pushback.map(|_| RetryReason::Code),
            _ if named => Some(RetryReason::Code),
            503 if self.on.unavailable && is_idempotent => Some(RetryReason::Unavailable),
            500..=599 if self.on.server_error && is_idempotent => Some(RetryReason::ServerError),
            _ => None,
        }
    }

    /// Whether a request is sent again whose endpoints could not be reached.
    pub fn of_connect(&self) -> Option<RetryReason> {
        self.on.connect.then_some(RetryReason::Connect)
    }

    /// Whether a request is sent again that had no answer, and may be carried out twice.
    pub fn of_reset(&self) -> Option<RetryReason> {
        (self.on.reset || self.on.server_error).then_some(RetryReason::Reset)
    }

    /// Whether a request is sent again whose attempt took too long, and that may be carried out twice.
    pub fn of_timeout(&self) -> Option<RetryReason> {
        (self.on.reset || self.on.server_error).then_some(RetryReason::Timeout)
    }

    /// How long to wait before the next attempt, `chance` from 0 to 1; `None`: the server asks for more than can be
    /// waited. A pod that sheds load speaks for itself only, and another one is asked.
    pub fn wait(&self, answered: Option<&Answered>, chance: f64) -> Option<Duration> {
        let asked = answered.filter(|answered| !answered.shed).and_then(|answered| answered.pushback);
        let least = match asked {
            Some(Pushback::Never) => return None,
            Some(Pushback::After(wait)) if wait > LONGEST_WAIT.max(self.least_wait) => return None,
            Some(Pushback::After(wait)) => wait.max(self.least_wait),
            None => self.least_wait,
        };
        // Also where the server names a time: it names the same to everybody.
        Some(least + JITTER.mul_f64(chance.clamp(0.0, 1.0)))
    }
}

fn most(retries: u32) -> u8 {
    u8::try_from(retries).unwrap_or(u8::MAX).min(MOST_RETRIES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::traffic::{Retries, Timeouts};

    fn retry(on: RetryOn) -> RetryPolicy {
        let retry = Some(Retries { on, attempts: 9, budget_percent: 20 });
        CallPolicy::of(&Traffic { retry, ..Traffic::default() }, &Traffic::default(), None).retry.unwrap()
    }

    fn status(status: u16) -> Answered {
        Answered { status, ..Answered::default() }
    }

    #[test]
    fn what_a_route_says_outranks_a_policy_and_nothing_is_something_to_say() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let timeout = Some(Timeouts { request: seconds(9), attempt: seconds(3), idle: seconds(60) });
        let traffic = Traffic { timeout, ..Traffic::default() };
        let none = Traffic::default();
        let of = |times: Option<&RuleTimes>| {
            let policy = CallPolicy::of(&traffic, &none, times);
            (policy.request, policy.attempt, policy.idle)
        };
        assert_eq!(of(None), (seconds(9), seconds(3), seconds(60)));
        let times = RuleTimes { request: Some(seconds(1)), attempt: None, retry: None };
        assert_eq!(of(Some(&times)), (seconds(1), seconds(3), seconds(60)));
        let times = RuleTimes { request: Some(None), attempt: Some(None), retry: None };
        assert_eq!(of(Some(&times)), (None, None, seconds(60)));
        assert_eq!(CallPolicy::of(&none, &none, None), CallPolicy::default());
        assert_eq!(CallPolicy::of(&none, &traffic, None).shadow.unwrap().request, seconds(9));
    }

    #[test]
    fn a_request_that_must_not_be_carried_out_twice_is_not_retried_for_its_status() {
        let on = RetryOn { server_error: true, unavailable: true, ..RetryOn::default() };
        let policy = retry(on);
        for (code, expected) in [
            (500, Some(RetryReason::ServerError)),
            (503, Some(RetryReason::Unavailable)),
            (404, None),
            (429, None),
            (200, None),
        ] {
            assert_eq!(policy.of_answer(&status(code), true), expected, "{code}");
            assert_eq!(policy.of_answer(&status(code), false), None, "{code}");
        }
        let shed = Answered { shed: true, ..status(503) };
        assert_eq!(policy.of_answer(&shed, false), Some(RetryReason::Overloaded), "nobody has read it");
        let grpc = |code| Answered { grpc_status: Some(code), ..status(200) };
        assert_eq!(policy.of_answer(&grpc(14), false), Some(RetryReason::Unavailable));
        assert_eq!(policy.of_answer(&grpc(13), false), None);
        assert_eq!(policy.retries, MOST_RETRIES);
    }

    #[test]
    fn a_budget_of_nothing_means_no_retries_not_even_the_one_in_ten_seconds() {
        let on = RetryOn { server_error: true, ..RetryOn::default() };
        let own = RuleRetry { codes: vec![500], attempts: 1, backoff: Duration::from_millis(100) };
        let times = RuleTimes { request: None, attempt: None, retry: Some(own) };
        for (budget_percent, expected) in [(0, false), (1, true)] {
            let retry = Some(Retries { on, attempts: 2, budget_percent });
            let (traffic, none) = (Traffic { retry, ..Traffic::default() }, Traffic::default());
            for times in [None, Some(&times)] {
                let policy = CallPolicy::of(&traffic, &none, times);
                assert_eq!((policy.retry.is_some(), policy.judges_answers()), (expected, expected));
            }
            assert_eq!(CallPolicy::of(&none, &traffic, None).judges_answers(), expected);
        }
    }

    #[test]
    fn codes_of_a_route_are_retried_whatever_the_method_and_429_only_with_a_time() {
        let own = RuleRetry { codes: vec![500, 429], attempts: 1, backoff: Duration::from_millis(100) };
        let times = RuleTimes { request: None, attempt: None, retry: Some(own) };
        let none = Traffic::default();
        let policy = CallPolicy::of(&none, &none, Some(&times)).retry.unwrap();
        assert_eq!(policy.of_answer(&status(500), false), Some(RetryReason::Code));
        assert_eq!(policy.of_answer(&status(503), true), None);
        assert_eq!(policy.of_answer(&status(429), true), None);
        let pushback = Some(Pushback::After(Duration::from_secs(1)));
        let later = Answered { pushback, ..status(429) };
        assert_eq!(policy.of_answer(&later, true), Some(RetryReason::Code));
        assert_eq!((policy.wait(Some(&later), 0.0), policy.retries), (Some(Duration::from_secs(1)), 1));
        assert_eq!(policy.wait(None, 0.0), Some(Duration::from_millis(100)));
        assert!((policy.budget - 0.2).abs() < f64::EPSILON);
        assert!(policy.of_connect().is_some() && policy.of_reset().is_some());
    }

    #[test]
    fn a_wait_is_drawn_from_25_to_250_ms_and_a_server_that_says_never_is_believed() {
        let policy = retry(RetryOn { server_error: true, unavailable: true, ..RetryOn::default() });
        assert_eq!(policy.wait(None, 0.0), Some(Duration::from_millis(25)));
        assert_eq!(policy.wait(None, 1.0), Some(Duration::from_millis(250)));
        let says = |pushback| Answered { pushback: Some(pushback), ..status(503) };
        assert_eq!(policy.of_answer(&says(Pushback::Never), true), None);
        let soon = says(Pushback::After(Duration::from_secs(1)));
        assert_eq!(policy.wait(Some(&soon), 1.0), Some(Duration::from_millis(1_225)), "not all at once");
        let hour = says(Pushback::After(Duration::from_secs(3600)));
        assert_eq!(policy.wait(Some(&hour), 0.5), None);
        let shed = Answered { shed: true, ..hour };
        assert_eq!(policy.wait(Some(&shed), 0.0), Some(Duration::from_millis(25)));
    }
}
