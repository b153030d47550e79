//! Verdict and sentence.

use tulle_crds::{AttemptTotals, Evidence, OnClientErrors};

use super::gathered::Gathered;
use super::sustained::Sustained;
use super::{Judgement, LatencyRule, Rules, Test, Verdict, latency, rank};

/// Attempts from which on a share of failures is looked at without statistics.
const A_FEW: u64 = 20;
/// As likely it may be, at the stable version's failure rate, that every request to the canary fails: what both depend on
/// may be down then, and the canary is not to blame.
const CHANCE: f64 = 0.001;
/// Evidence, as a logarithm, from which on a canary is waited for whatever the counts say: 1 to 20.
const LOOKS_WORSE: f64 = 3.0;
/// One or two failures beside none look like nothing.
const SOME_FAILURES: u64 = 3;
/// A little more than the evidence, as a logarithm, of a test that has seen nothing: half its weight waits for later
/// starting points.
const NO_EVIDENCE: f64 = -0.65;
/// As much for a slower canary.
const LOOKS_SLOWER: f64 = 1.0;
/// Comparisons of latencies after which a canary that was slower in each has as much evidence against it. Before, a
/// canary that was slower more often than not is waited for.
const FIRST_COMPARISONS: u32 = 4;
/// Requests to the canary whose latency must have been compared, where `minRequests` is not less.
const COMPARED: u64 = 200;
/// Latencies that have never been compared are waited for until the canary has had as many times `minRequests`, and until
/// as many blocks have passed: two minutes in which both versions got requests, or five in which they need not. So a
/// stable version that gets next to nothing, or a user for whom fewer requests are enough, does not wait without end.
const PATIENCE: u64 = 5;
const BLOCKS_OF_BOTH: u32 = 12;
const BLOCKS: u64 = 30;
/// Attempts from which on a version that answers nearly all of them with 4xx needs no statistics: more than a burst of
/// fifty, so that one client's bad requests do not decide. What nearly all is, and how many the stable version must have
/// had and may have answered so at most.
const REFUSED: u64 = 56;
const NEARLY_ALL: f64 = 0.95;
/// What such answers are called: the HTTP status of a gRPC call is 200.
const REFUSALS: &str = "4xx or a gRPC error of the client";
const STABLE_ATTEMPTS: u64 = 30;
const HARDLY_ANY: f64 = 0.05;

/// Judges.
pub(super) fn judge(evidence: &Evidence, rules: &Rules, alone: bool) -> Judgement {
    let facts = facts(evidence);
    let canary = &evidence.canary;
    let both = both_fail(evidence, rules, alone);
    if fails_all(canary) && both.is_none() {
        let because = format!("{facts}: canary failed every one of its {} requests", canary.attempts);
        return failed(because);
    }
    if let Some(sustained) = Sustained::stored(evidence).verdict(&evidence.stable, rules, alone) {
        return failed(format!("{facts}: {sustained}"));
    }
    let certain = rules.certain();
    let is_certain = |test: &Test| {
        test.log_evidence(evidence) >= certain
            || (*test == Test::ClientErrors && refuses_nearly_all(evidence))
    };
    let certain: Vec<Test> = rules.tests().into_iter().filter(is_certain).collect();
    let held = |test: &Test| *test == Test::ClientErrors && rules.client_errors == OnClientErrors::Hold;
    if let Some(test) = certain.iter().find(|&test| !held(test)) {
        return failed(format!("{facts}: {}", certainly(*test, evidence, rules)));
    }
    if certain.iter().any(held) {
        let because = format!(
            "{facts}: {}; the rollout is held: tulle canary abort NAME takes its requests away; to go on regardless, set judge.clientErrors: Ignore",
            certainly(Test::ClientErrors, evidence, rules)
        );
        return Judgement { held: true, ..judgement(Verdict::Inconclusive, because) };
    }
    let enough = both.is_some() || canary.attempts >= rules.min_requests.max(1);
    let doubt = both.or_else(|| doubt(evidence, rules, alone));
    let awaited = if doubt.is_none() { awaited(evidence, rules, alone) } else { None };
    let uncompared = awaited.is_some();
    let doubted = doubt.is_some() && enough;
    let (verdict, because) = match doubt.or(awaited) {
        Some(missing) => (Verdict::Inconclusive, missing),
        None => (Verdict::Pass, fine(evidence, rules)),
    };
    Judgement { doubted, uncompared, ..judgement(verdict, format!("{facts}: {because}")) }
}

fn fails_all(canary: &AttemptTotals) -> bool {
    canary.attempts >= A_FEW && canary.failures >= canary.attempts
}

/// A sentence where the stable version fails about as often as a canary that fails most of its requests. `None`: it does not,
/// or it gets no request to compare with.
fn both_fail(evidence: &Evidence, rules: &Rules, alone: bool) -> Option<String> {
    let (canary, stable) = (&evidence.canary, &evidence.stable);
    if alone || stable.attempts == 0 || canary.attempts < A_FEW {
        return None;
    }
    let (rate, stable_rate) = (share(canary.failures, canary), share(stable.failures, stable));
    let alike = if fails_all(canary) {
        // One more failure, so that one success of the stable version is enough to tell the two apart.
        let likely = (stable.failures as f64 + 1.0) / (stable.attempts as f64 + 1.0);
        likely.min(1.0).powf(canary.attempts as f64) >= CHANCE
    } else {
        rate > 0.5 && rate <= rules.errors_worse_by * stable_rate
    };
    alike.then(|| {
        "both versions fail, as when something is down that both depend on: no verdict before one of them recovers; if this revision is the cure, tulle canary promote NAME accepts it".to_owned()
    })
}

fn failed(because: String) -> Judgement {
    judgement(Verdict::Fail, because)
}

fn judgement(verdict: Verdict, because: String) -> Judgement {
    Judgement { verdict, held: false, doubted: false, uncompared: false, because }
}

/// Why a canary that is not surely worse does not pass either.
fn doubt(evidence: &Evidence, rules: &Rules, alone: bool) -> Option<String> {
    let (canary, stable) = (&evidence.canary, &evidence.stable);
    if canary.attempts < rules.min_requests.max(1) {
        let missing = rules.min_requests.max(1) - canary.attempts;
        return Some(format!("{missing} more requests to the canary are needed"));
    }
    let (rate, stable_rate) = (share(canary.failures, canary), share(stable.failures, stable));
    if canary.attempts >= A_FEW && rate > 0.5 {
        return Some("a canary that fails more than half of its requests does not pass".to_owned());
    }
    if let Some(objective) = rules.success_rate
        && 1.0 - rate < objective
    {
        return Some(format!("below the objective of {}% success, not surely yet", percent(objective)));
    }
    if let Some(limit) = rules.p99_micros
        && Test::P99(limit).log_evidence(evidence) > 0.0
    {
        return Some(format!(
            "p99 looks longer than the objective of {}, not surely yet",
            time(limit as f64)
        ));
    }
    let worse_by = rules.errors_worse_by;
    if stable.attempts == 0 && canary.failures > 0 && !alone {
        return Some("there is nothing to compare with".to_owned());
    }
    let fails_alone = alone && Test::Alone.log_evidence(evidence) > 0.0;
    if fails_alone || (stable.attempts == 0 && rate > rules.alone_rate(evidence)) {
        return Some(format!("looks worse than {:.1}%, not surely yet", rules.alone_rate(evidence) * 100.0));
    }
    // The counts are those of the whole rollout: a version that has turned bad late shows in the evidence alone.
    let log_evidence = Test::Errors.log_evidence(evidence);
    let more = canary.failures >= SOME_FAILURES && rate > worse_by * stable_rate;
    let looks_worse = more && log_evidence > NO_EVIDENCE || log_evidence > LOOKS_WORSE;
    if stable.attempts > 0 && canary.failures > 0 && looks_worse {
        return Some(format!("looks worse than {worse_by}x, not surely yet"));
    }
    let forbidden = (share(canary.client_errors, canary), share(stable.client_errors, stable));
    if rules.client_errors != OnClientErrors::Ignore
        && canary.client_errors >= SOME_FAILURES
        && forbidden.0 > worse_by * forbidden.1
        && Test::ClientErrors.log_evidence(evidence) > NO_EVIDENCE
    {
        return Some(format!(
            "answers {:.2}% with {REFUSALS}, the stable version {:.2}%, not surely worse yet",
            forbidden.0 * 100.0,
            forbidden.1 * 100.0
        ));
    }
    looks_slower(evidence, rules, alone)
}

/// That a canary looks slower: by the sum of its slow answers, or by how its comparisons went.
fn looks_slower(evidence: &Evidence, rules: &Rules, alone: bool) -> Option<String> {
    let sentence = format!("canary looks slower than {}x, not surely yet", rules.latency?.worse_by);
    let tests = rules.tests();
    // What was counted beside a stable version says nothing of a canary that gets every request now.
    if !alone && let Some(counted) = tests.iter().find_map(|test| too_many_slow(*test, evidence)) {
        return Some(format!("{sentence}: {counted}"));
    }
    let slower = |test: &Test| {
        let early = test.blocks(evidence) < FIRST_COMPARISONS;
        test.is_latency() && test.log_evidence(evidence) > if early { NO_EVIDENCE } else { LOOKS_SLOWER }
    };
    tests.iter().any(slower).then_some(sentence)
}

/// How many answers of the canary are slow, where that is more than is accepted.
fn too_many_slow(test: Test, evidence: &Evidence) -> Option<String> {
    let rule = test.latency_rule()?;
    let stable = test.stored(evidence)?.reference?;
    let slow = Gathered::stored(evidence, &test.dispersion()).slow;
    slow.are_too_many(rule).then(|| {
        format!(
            "{:.1}% of its answers took longer than {}, {} the stable version's p{} ({}), and {:.1}% may",
            slow.share() * 100.0,
            time(latency::limit(stable, rule)),
            than(stable, rule),
            percent(rule.quantile),
            time(stable),
            slow.accepted_share(rule) * 100.0
        )
    })
}

/// What a canary without any doubt waits for.
fn awaited(evidence: &Evidence, rules: &Rules, alone: bool) -> Option<String> {
    if alone || is_long_enough(evidence, rules) {
        return None;
    }
    match uncompared(evidence, rules) {
        Some(Uncompared { because, will_be }) => {
            will_be.then(|| format!("latency not compared yet: {because}"))
        }
        None => few_compared(evidence, rules),
    }
}

/// A share of slow answers is known from many answers only. Those that came before the stable version's quantile was known
/// are not among them.
fn few_compared(evidence: &Evidence, rules: &Rules) -> Option<String> {
    let enough = rules.min_requests.min(COMPARED) as f64;
    let compared = |test: &Test| Gathered::stored(evidence, &test.dispersion()).slow.compared();
    let fewest = rules.tests().iter().filter(|test| test.is_latency()).map(compared).reduce(f64::min)?;
    (fewest < enough).then(|| {
        format!("latency compared in {:.0} of {enough:.0} requests to the canary so far", fewest.floor())
    })
}

/// Whether a version answers nearly every request with 4xx beside a stable version that answers hardly any so.
fn refuses_nearly_all(evidence: &Evidence) -> bool {
    let (canary, stable) = (&evidence.canary, &evidence.stable);
    canary.attempts >= REFUSED
        && share(canary.client_errors, canary) >= NEARLY_ALL
        && stable.attempts >= STABLE_ATTEMPTS
        && share(stable.client_errors, stable) <= HARDLY_ANY
}

/// Why latencies have never been compared in this rollout, and whether they will be if requests go on as they do.
#[derive(Clone, Debug, PartialEq)]
struct Uncompared {
    because: String,
    will_be: bool,
}

/// `None`: they have been compared, or are not to be.
fn uncompared(evidence: &Evidence, rules: &Rules) -> Option<Uncompared> {
    let uncompared = |test: &Test| test.is_latency() && test.blocks(evidence) == 0;
    let test = rules.tests().into_iter().find(uncompared)?;
    let Gathered { stable, group, .. } = Gathered::stored(evidence, &test.dispersion());
    let known = test.stored(evidence).is_some_and(|test| test.reference.is_some());
    let answers = latency::count(&stable);
    let enough = rank::ENOUGH_ATTEMPTS;
    let because = match (known, answers) {
        (false, 0) if evidence.stable.attempts > 0 => {
            "no latency was measured, as with opaque connections".to_owned()
        }
        (false, 0) => "the stable version has answered no request".to_owned(),
        (false, _) => {
            format!("{answers} of {} requests to the stable version that it takes first", latency::ENOUGH)
        }
        (true, _) => format!(
            "{:.0} of {enough:.0} requests to the canary and {:.0} of {enough:.0} to the stable version",
            group.canary.attempts.min(enough),
            group.stable.attempts.min(enough)
        ),
    };
    Some(Uncompared { because, will_be: known || answers > 0 })
}

/// Whether latencies that have not been compared have been waited for long enough.
fn is_long_enough(evidence: &Evidence, rules: &Rules) -> bool {
    let attempts = rules.min_requests.max(1).saturating_mul(PATIENCE);
    let blocks = Test::Errors.blocks(evidence) >= BLOCKS_OF_BOTH || evidence.blocks >= BLOCKS;
    evidence.canary.attempts >= attempts && blocks
}

/// What a test has found.
fn certainly(test: Test, evidence: &Evidence, rules: &Rules) -> String {
    let sure = percent(1.0 - rules.alpha);
    let finding = match test {
        Test::Errors => format!("worse than {}x", rules.errors_worse_by),
        Test::Alone => format!("worse than {:.1}%", rules.alone_rate(evidence) * 100.0),
        Test::Latency(rule) | Test::Typical(rule) => slower_than(test, rule, evidence),
        Test::ClientErrors => {
            let answered = |totals: &AttemptTotals| {
                let share = share(totals.client_errors, totals) * 100.0;
                format!("{} of {} ({share:.2}%)", totals.client_errors, totals.attempts)
            };
            let both = format!(
                "canary answered {} with {REFUSALS}, stable {}",
                answered(&evidence.canary),
                answered(&evidence.stable)
            );
            if refuses_nearly_all(evidence) {
                return format!("{both}: nearly every one of its requests");
            }
            format!("{both}: more than {}x", rules.errors_worse_by)
        }
        Test::SuccessRate(objective) => format!("below the objective of {}% success", percent(objective)),
        Test::P99(limit) => format!("canary's p99 is longer than the objective of {}", time(limit as f64)),
    };
    format!("{finding}, {sure}% sure at every look")
}

fn slower_than(test: Test, rule: LatencyRule, evidence: &Evidence) -> String {
    let quantile = percent(rule.quantile);
    let Some(stable) = test.stored(evidence).and_then(|test| test.reference) else {
        return format!("canary's p{quantile} is more than {}x the stable version's", rule.worse_by);
    };
    let than = than(stable, rule);
    format!("canary's p{quantile} is more than {than} the stable version's ({})", time(stable))
}

/// How far the limit of slow answers lies above the stable version's quantile.
fn than(stable: f64, rule: LatencyRule) -> String {
    if latency::limit(stable, rule) > stable * rule.worse_by {
        "10 ms above".to_owned()
    } else {
        format!("{}x", rule.worse_by)
    }
}

/// Why a canary passes, and what was not compared.
fn fine(evidence: &Evidence, rules: &Rules) -> String {
    let errors = if evidence.stable.attempts > 0 {
        format!("not worse than {}x", rules.errors_worse_by)
    } else {
        format!("not worse than {:.1}%, with nothing to compare with", rules.alone_rate(evidence) * 100.0)
    };
    match uncompared(evidence, rules) {
        Some(uncompared) => format!("{errors}; latency not compared: {}", uncompared.because),
        None => errors,
    }
}

/// What was counted.
fn facts(evidence: &Evidence) -> String {
    let failed = |totals: &AttemptTotals| {
        let share = share(totals.failures, totals) * 100.0;
        let unreached = match totals.unreached {
            0 => String::new(),
            1 => "; 1 of them was never reached".to_owned(),
            unreached => format!("; {unreached} of them were never reached"),
        };
        format!("{} of {} ({share:.2}%{unreached})", totals.failures, totals.attempts)
    };
    format!("canary failed {}, stable {}", failed(&evidence.canary), failed(&evidence.stable))
}

fn share(part: u64, totals: &AttemptTotals) -> f64 {
    if totals.attempts == 0 { 0.0 } else { part as f64 / totals.attempts as f64 }
}

/// A share in percent, without the digits that binary fractions add.
fn percent(share: f64) -> f64 {
    (share * 100.0 * 1e6).round() / 1e6
}

fn time(micros: f64) -> String {
    match micros / 1000.0 {
        ms if ms >= 10_000.0 => format!("{:.1} s", ms / 1000.0),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms => format!("{ms:.1} ms"),
    }
}
