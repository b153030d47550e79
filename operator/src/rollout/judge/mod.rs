//! The judge: is the canary worse than the stable version, or worse than what is allowed?
//!
//! In: attempts per pod in blocks of ten seconds. Out: evidence that is stored, a verdict and one sentence.
//! Never looks at the clock, the cluster or a weight.
//!
//! ```text
//!   relative    canary against stable: errors, latency, clientErrors
//!   absolute    canary against a limit: successRate, p99, alone (errors without a stable version)
//!   windows     evidence since several starting points
//!   dispersion  whether events are independent or come in bursts
//!   rank        canary against the slowest stable pod, where latencies come in bursts
//!   gathered    latencies of few requests, over as many blocks as it takes to compare them
//!   slow        slow answers of the canary over the rollout: what holds a version that the tests do not find
//!   burst       how much an event counts when events come in bursts
//!   sustained   a canary that fails on and on beside a stable version that does not
//!   unanswered  what the stable version answers while no request to the canary ends
//!   sentence    verdict and sentence
//!   simulation  rollouts on paper: how often the judge errs and how soon it finds what is bad
//! ```
//! Every test multiplies e-values, so a verdict holds at every look while events are independent. For events that
//! come in bursts that rests on simulation. All tests share the false alarms that are accepted, in equal parts.

mod absolute;
mod burst;
mod dispersion;
mod gathered;
mod latency;
mod rank;
mod relative;
mod sentence;
pub mod simulation;
mod slow;
mod sustained;
#[cfg(test)]
mod tests;
mod unanswered;
mod windows;

use std::time::Duration;

use tulle_crds::{AttemptTotals, CanaryVerdict, Evidence, OnClientErrors, TestEvidence};
use tulle_mesh::histogram::Histogram;

use dispersion::Dispersion;
use gathered::Gathered;
use sustained::Sustained;
pub use unanswered::Unanswered;

/// How many times worse than what is still accepted the canary may be: the alternatives that a test bets on.
const FACTORS: [f64; 9] = [1.3, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0];
/// Error rate of a stable version that gets no request because the new one gets all: what that is compared
/// with then.
const ASSUMED_RATE: f64 = 0.1;
/// Attempts at the stable version after which its error rate is remembered for the time when it gets none, and the least
/// rate that is accepted then.
const ENOUGH_TO_REMEMBER: u64 = 200;
const LEAST_ALONE: f64 = 0.01;
/// This many times the rate at which the stable version exceeds its own quantile is accepted.
const LATENCY_MARGIN: f64 = 1.5;
/// A quantile that is compared beside a higher one. A stable version that is slow now and then has a long p99, and
/// what a new version adds to many requests is short beside it.
const TYPICAL_QUANTILE: f64 = 0.9;
/// Odds that are shown at most. Beyond, it makes no difference to anybody.
const MOST_ODDS: f64 = 1e12;
/// Share of attempts that may exceed `objectives.p99`.
const P99_RATE: f64 = 0.01;

/// Which version a pod belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The new version.
    Canary,
    /// The version that is replaced.
    #[default]
    Stable,
}

/// Attempts at one pod within one block of ten seconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodBlock {
    /// The version of the pod.
    pub side: Side,
    /// What was counted.
    pub totals: AttemptTotals,
    /// Latencies of the attempts that were answered.
    pub latency: Histogram,
}

/// How latencies are compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LatencyRule {
    /// The quantile, 0 to 1.
    pub quantile: f64,
    /// This many times the stable version's quantile is still accepted.
    pub worse_by: f64,
}

/// What makes a version bad.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    /// This many times the stable version's error rate is still accepted.
    pub errors_worse_by: f64,
    /// How latencies are compared; `None` leaves them out.
    pub latency: Option<LatencyRule>,
    /// What surely more client errors lead to.
    pub client_errors: OnClientErrors,
    /// Share of attempts that must succeed, 0 to 1.
    pub success_rate: Option<f64>,
    /// Latency in microseconds that 99 % of the attempts must not exceed.
    pub p99_micros: Option<u64>,
    /// False alarms that are accepted over all tests, 0 to 1: 0.01 for a confidence of 99 %.
    pub alpha: f64,
    /// Attempts that the canary must have received.
    pub min_requests: u64,
}

impl Rules {
    /// The rules of a Canary. Values that cannot be parsed, which admission rejects, become the defaults.
    pub fn of(judge: &tulle_crds::Judge) -> Self {
        let confidence = tulle_crds::parse_percent(&judge.confidence).unwrap_or(0.99);
        let factor = |value: f64, default: f64| {
            if value.is_finite() && value >= 1.0 { value } else { default }
        };
        let quantile = judge.latency.quantile.strip_prefix('p').and_then(|text| text.parse::<f64>().ok());
        let quantile = quantile.map(|percent| percent / 100.0).filter(|share| *share > 0.0 && *share < 1.0);
        let success_rate = judge.objectives.success_rate.filter(|percent| (0.0..=100.0).contains(percent));
        let p99 = judge.objectives.p99.as_deref().and_then(|text| tulle_crds::parse_duration(text).ok());
        Self {
            errors_worse_by: factor(judge.errors.worse_by, 1.5),
            latency: (judge.latency.worse_by != 0.0).then(|| LatencyRule {
                quantile: quantile.unwrap_or(0.99),
                worse_by: factor(judge.latency.worse_by, 3.0),
            }),
            client_errors: judge.client_errors,
            success_rate: success_rate.map(|percent| percent / 100.0),
            p99_micros: p99.filter(|limit| *limit > Duration::ZERO).map(micros),
            // A confidence of 0 % or 100 % would decide always or never.
            alpha: (1.0 - confidence).clamp(1e-9, 0.999),
            min_requests: u64::from(judge.min_requests),
        }
    }

    /// The tests that can fail or hold a rollout.
    fn tests(&self) -> Vec<Test> {
        let mut tests = vec![Test::Errors, Test::Alone];
        tests.extend(self.latency.map(Test::Latency));
        let typical = self.latency.filter(|rule| rule.quantile > TYPICAL_QUANTILE);
        tests.extend(typical.map(|rule| Test::Typical(LatencyRule { quantile: TYPICAL_QUANTILE, ..rule })));
        if self.client_errors != OnClientErrors::Ignore {
            tests.push(Test::ClientErrors);
        }
        tests.extend(self.success_rate.map(Test::SuccessRate));
        tests.extend(self.p99_micros.map(Test::P99));
        tests
    }

    /// The evidence, as a logarithm, at which a test is certain.
    fn certain(&self) -> f64 {
        (self.tests().len() as f64 / self.alpha.clamp(1e-12, 1.0)).ln()
    }

    /// Error rate that is accepted of a canary that gets every request: what would have been accepted beside the
    /// stable version while that was asked, or else an assumption.
    fn alone_rate(&self, evidence: &Evidence) -> f64 {
        let most = (ASSUMED_RATE * self.errors_worse_by).min(0.5);
        let stable = &evidence.stable;
        if stable.attempts < ENOUGH_TO_REMEMBER {
            return most;
        }
        // A few more, so that a version without a failure so far is not a promise to have none.
        let rate = (stable.failures as f64 + 3.0) / stable.attempts as f64;
        (rate * self.errors_worse_by).clamp(LEAST_ALONE.min(most), most)
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not surely worse, and enough attempts seen.
    Pass,
    /// Surely worse.
    Fail,
    /// Too few attempts, or it looks worse without being surely so.
    Inconclusive,
}

impl From<Verdict> for CanaryVerdict {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => Self::Pass,
            Verdict::Fail => Self::Fail,
            Verdict::Inconclusive => Self::Inconclusive,
        }
    }
}

/// A verdict and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// It is surely something that the rollout is to be held for, whatever `onInconclusive` says.
    pub held: bool,
    /// It has had requests enough, and looks worse without being surely so.
    pub doubted: bool,
    /// Nothing but the first comparison of latencies is missing, which its settings say nothing of.
    pub uncompared: bool,
    /// One sentence.
    pub because: String,
}

/// Judges.
pub fn judge(evidence: &Evidence, rules: &Rules, alone: bool) -> Judgement {
    sentence::judge(evidence, rules, alone)
}

/// How far a test has come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// The name of the test, as in the status.
    pub name: &'static str,
    /// Odds that the canary is worse, to 1; `None`: nothing was compared.
    pub odds: Option<f64>,
    /// The odds at which it is certain.
    pub certain: f64,
    /// Blocks of ten seconds since its first one. Of latencies of few requests: groups of such blocks.
    pub blocks: u32,
}

/// How far each test has come that can fail or hold a rollout.
pub fn progress(evidence: &Evidence, rules: &Rules) -> Vec<Progress> {
    let of = |test: Test| {
        let windows = test.stored(evidence).map(|stored| stored.windows.as_slice()).unwrap_or_default();
        Progress {
            name: test.name(),
            // JSON has no infinity.
            odds: (!windows.is_empty()).then(|| test.log_evidence(evidence).exp().min(MOST_ODDS)),
            certain: rules.certain().exp(),
            blocks: test.blocks(evidence),
        }
    };
    rules.tests().into_iter().map(of).collect()
}

/// One test.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Test {
    Errors,
    /// Failures of a canary that is meant to get every request.
    Alone,
    Latency(LatencyRule),
    /// The same of [`TYPICAL_QUANTILE`].
    Typical(LatencyRule),
    ClientErrors,
    SuccessRate(f64),
    P99(u64),
}

impl Test {
    /// The name under which its evidence is stored.
    fn name(self) -> &'static str {
        match self {
            Self::Errors => "errors",
            Self::Alone => "alone",
            Self::Latency(_) => "latency",
            Self::Typical(_) => "latencyP90",
            Self::ClientErrors => "clientErrors",
            Self::SuccessRate(_) => "successRate",
            Self::P99(_) => "p99",
        }
    }

    /// How it compares latencies; `None`: it does not.
    fn latency_rule(self) -> Option<LatencyRule> {
        match self {
            Self::Latency(rule) | Self::Typical(rule) => Some(rule),
            _ => None,
        }
    }

    fn is_latency(self) -> bool {
        self.latency_rule().is_some()
    }

    /// Its stored evidence.
    fn stored(self, evidence: &Evidence) -> Option<&TestEvidence> {
        evidence.tests.iter().find(|test| test.name == self.name())
    }

    /// Blocks that it has compared.
    fn blocks(self, evidence: &Evidence) -> u32 {
        let windows = self.stored(evidence).map(|stored| stored.windows.as_slice()).unwrap_or_default();
        windows.iter().map(|window| window.blocks).max().unwrap_or(0)
    }

    /// The name under which the dispersion of its events is stored, and what was gathered and not compared yet.
    fn dispersion(self) -> String {
        format!("{}Dispersion", self.name())
    }

    /// Logarithm of its evidence.
    fn log_evidence(self, evidence: &Evidence) -> f64 {
        self.stored(evidence).map_or(f64::NEG_INFINITY, windows::log_evidence)
    }

    /// What it compares the canary with.
    fn against(self, rules: &Rules, evidence: &Evidence) -> Against {
        match self {
            Self::Errors | Self::ClientErrors => Against::Stable(rules.errors_worse_by),
            Self::Latency(_) | Self::Typical(_) => Against::Stable(LATENCY_MARGIN),
            Self::Alone => Against::Limit(rules.alone_rate(evidence)),
            Self::SuccessRate(rate) => Against::Limit(1.0 - rate),
            Self::P99(_) => Against::Limit(P99_RATE),
        }
    }

    /// What it counts. Nothing as long as the stable version's quantile is needed and not known.
    fn pods(self, block: &[PodBlock], reference: Option<f64>) -> Vec<Pod> {
        match self {
            Self::Errors | Self::Alone | Self::SuccessRate(_) => Pod::all(block, answered_or_not, failures),
            Self::ClientErrors => Pod::all(block, answered_or_not, client_errors),
            Self::P99(limit) => Pod::all(block, answered, |pod| latency::slower(&pod.latency, limit as f64)),
            Self::Latency(rule) | Self::Typical(rule) => reference.map_or_else(Vec::new, |stable| {
                Pod::all(block, answered, |pod| latency::events(pod, stable, rule))
            }),
        }
    }

    /// Its evidence after one more block, and the dispersion of the events that it counts.
    fn fold(self, evidence: &Evidence, block: &[PodBlock], rules: &Rules, alone: bool) -> [TestEvidence; 2] {
        let mut test = self.stored(evidence).cloned().unwrap_or_default();
        self.name().clone_into(&mut test.name);
        let name = self.dispersion();
        let mut dispersion = Dispersion::stored(evidence, &name);
        let mut gathered = Gathered::stored(evidence, &name);
        let before = test.reference;
        let pods = self.pods(block, before);
        let compared = pods.iter().any(|pod| !pod.canary && pod.attempts > 0.0);
        if self == Self::Alone && (!alone || compared) {
            return [test, dispersion.store(name)];
        }
        let typical = if self.is_latency() { 1.0 } else { before.unwrap_or(1.0) };
        let earlier = burst::Earlier { typical, dispersion: dispersion.upper() };
        // The version whose events show how large bursts are.
        let (increments, canary) = match self.against(rules, evidence) {
            // Known from earlier blocks and the number of attempts, so choosing between the two bets is no look ahead.
            Against::Stable(margin)
                if self.is_latency() && !(earlier.is_independent() && rank::has_enough(&pods)) =>
            {
                (gathered.compare(&pods, margin), false)
            }
            Against::Stable(margin) => (relative::increments(&pods, margin, earlier), false),
            Against::Limit(allowed) => (absolute::increments(&pods, allowed, earlier), true),
        };
        dispersion.add(&pods, canary);
        let known = before.filter(|stable| stable.is_finite() && *stable > 0.0);
        if let (Some(rule), Some(stable)) = (self.latency_rule(), known) {
            gathered.slow = gathered.slow.fold(block, stable, rule);
        }
        test.reference = match self {
            Self::Latency(rule) | Self::Typical(rule) => {
                latency::reference(before, &mut gathered.stable, block, rule)
            }
            _ => Some(burst::typical(before, &pods, canary)),
        };
        if let Some(increments) = increments {
            windows::add(&mut test, &increments);
        }
        let mut sums = dispersion.store(name);
        gathered.store(&mut sums);
        [test, sums]
    }
}

/// What the canary is compared with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Against {
    /// The stable version's rate, as many times higher as is accepted.
    Stable(f64),
    /// A rate.
    Limit(f64),
}

/// Attempts at one pod and the events that a test counts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Pod {
    canary: bool,
    attempts: f64,
    events: f64,
}

impl Pod {
    /// The pods of a block, in an order that depends on their counts only: sums of fractions depend on it.
    fn all(
        block: &[PodBlock],
        attempts: impl Fn(&PodBlock) -> f64,
        events: impl Fn(&PodBlock) -> f64,
    ) -> Vec<Self> {
        let mut pods: Vec<Self> = block
            .iter()
            .map(|pod| {
                let attempts = attempts(pod);
                let events = events(pod).min(attempts);
                Self { canary: pod.side == Side::Canary, attempts, events }
            })
            .collect();
        pods.sort_by(|a, b| {
            a.canary
                .cmp(&b.canary)
                .then(a.attempts.total_cmp(&b.attempts))
                .then(a.events.total_cmp(&b.events))
        });
        pods
    }
}

fn answered_or_not(pod: &PodBlock) -> f64 {
    pod.totals.attempts as f64
}

fn failures(pod: &PodBlock) -> f64 {
    pod.totals.failures as f64
}

fn client_errors(pod: &PodBlock) -> f64 {
    pod.totals.client_errors as f64
}

fn answered(pod: &PodBlock) -> f64 {
    latency::slower(&pod.latency, 0.0)
}

/// Adds one block (also a running one, provisionally) to the evidence. `alone`: the canary is meant to get all
/// requests.
///
/// A block in which the canary got no attempt counts for neither version, but see [`Unanswered`].
pub fn fold(evidence: &Evidence, block: &[PodBlock], rules: &Rules, alone: bool) -> Evidence {
    let (mut canary, mut stable) = (evidence.canary, evidence.stable);
    let heard = block.iter().any(|pod| pod.side == Side::Canary && pod.totals.attempts > 0);
    for pod in block.iter().filter(|_| heard) {
        add(if pod.side == Side::Canary { &mut canary } else { &mut stable }, &pod.totals);
    }
    let tests = rules.tests().into_iter().flat_map(|test| test.fold(evidence, block, rules, alone));
    let sustained = Sustained::stored(evidence).fold(block, rules).store();
    let unanswered = Unanswered::stored(evidence).fold(block).store();
    let tests = tests.chain([sustained]).chain(unanswered).collect();
    Evidence { canary, stable, tests, ..*evidence }
}

fn add(sum: &mut AttemptTotals, part: &AttemptTotals) {
    sum.attempts = sum.attempts.saturating_add(part.attempts);
    sum.failures = sum.failures.saturating_add(part.failures);
    sum.unreached = sum.unreached.saturating_add(part.unreached);
    sum.client_errors = sum.client_errors.saturating_add(part.client_errors);
}
