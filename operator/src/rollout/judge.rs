//! The judge: is the canary's error rate worse than the stable version's over the same seconds?
//!
//! Sequential and valid at every look (Lindon & Malek, "Anytime-valid inference for multinomial count
//! data", NeurIPS 2022): under the null each failed request is the canary's with the probability that
//! any request is, so a Beta mixture of binomials is an e-process. It is immune to an error rate that
//! drifts for both.

use statrs::function::beta::{beta_reg, ln_beta};
use tulle_crds::CanaryVerdict;

/// Weight of the prior: how many failures it is worth.
const PRIOR: f64 = 10.0;
/// Error rate of a stable version that gets no request because the new one gets all: what that is compared
/// with then.
const ASSUMED_RATE: f64 = 0.1;

/// What was counted in the present step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counted {
    /// Requests to the canary.
    pub canary_requests: u64,
    /// Of them failed.
    pub canary_failures: u64,
    /// Requests to the stable version.
    pub stable_requests: u64,
    /// Of them failed.
    pub stable_failures: u64,
    /// Logarithm of the evidence of former steps.
    pub former_log_evidence: f64,
    /// The canary gets all requests: there is nothing to compare with, and never will be.
    pub alone: bool,
}

/// What makes a version bad.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// This many times the stable version's error rate is still accepted.
    pub worse_by: f64,
    /// False alarms that are accepted, 0 to 1: 0.01 for a confidence of 99 %.
    pub alpha: f64,
    /// Requests that the canary must have answered.
    pub min_requests: u64,
}

/// A verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not surely worse, and enough requests seen.
    Pass,
    /// Surely worse.
    Fail,
    /// Too few requests, or it looks worse without being surely so.
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
    /// Logarithm of the evidence that the canary is worse, over all steps.
    pub log_evidence: f64,
    /// One sentence.
    pub because: String,
}

/// Judges.
pub fn judge(counted: &Counted, rule: &Rule) -> Judgement {
    let alone = counted.alone && counted.stable_requests == 0;
    let step = step_log_evidence(counted, rule.worse_by);
    let log_evidence = counted.former_log_evidence + step;
    let needed = (1.0 / rule.alpha).ln();
    let (canary, stable) = (
        rate(counted.canary_failures, counted.canary_requests),
        rate(counted.stable_failures, counted.stable_requests),
    );
    let facts = format!(
        "canary failed {} of {} ({:.2}%), stable {} of {} ({:.2}%)",
        counted.canary_failures,
        counted.canary_requests,
        canary * 100.0,
        counted.stable_failures,
        counted.stable_requests,
        stable * 100.0
    );
    let (verdict, because) = if log_evidence >= needed {
        let sure = (1.0 - rule.alpha) * 100.0;
        let than = match alone {
            true => format!("{:.1}%", ASSUMED_RATE * rule.worse_by * 100.0),
            false => format!("{}x", rule.worse_by),
        };
        (Verdict::Fail, format!("{facts}: worse than {than}, {sure}% sure at every look"))
    } else if counted.canary_requests < rule.min_requests {
        let missing = rule.min_requests - counted.canary_requests;
        (Verdict::Inconclusive, format!("{facts}: {missing} more requests to the canary are needed"))
    } else if alone && canary <= ASSUMED_RATE * rule.worse_by {
        let most = ASSUMED_RATE * rule.worse_by * 100.0;
        (Verdict::Pass, format!("{facts}: not worse than {most:.1}%, with nothing to compare with"))
    } else if counted.stable_requests == 0 && counted.canary_failures > 0 {
        (Verdict::Inconclusive, format!("{facts}: there is nothing to compare with"))
    } else if counted.canary_failures > 0 && canary > stable * rule.worse_by && step > 0.0 {
        (Verdict::Inconclusive, format!("{facts}: looks worse than {}x, not surely yet", rule.worse_by))
    } else {
        (Verdict::Pass, format!("{facts}: not worse than {}x", rule.worse_by))
    };
    Judgement { verdict, log_evidence, because }
}

fn rate(failures: u64, requests: u64) -> f64 {
    if requests == 0 { 0.0 } else { failures as f64 / requests as f64 }
}

/// Logarithm of the e-value of one step, one-sided: only "the canary is worse" counts.
fn step_log_evidence(counted: &Counted, worse_by: f64) -> f64 {
    let (canary, stable) = (counted.canary_requests as f64, counted.stable_requests as f64);
    if canary < 1.0 {
        return 0.0;
    }
    if stable < 1.0 {
        if !counted.alone {
            return 0.0;
        }
        // Nothing to compare with: each request is a trial of its own, under a rate that is assumed.
        let null = (ASSUMED_RATE * worse_by).min(0.5);
        let failures = counted.canary_failures.min(counted.canary_requests) as f64;
        return log_evidence(null, failures, canary - failures);
    }
    // Bounded, so that counts that cannot be true cannot end the judge either.
    let share = (canary / (canary + stable)).clamp(1e-9, 1.0 - 1e-9);
    // With the margin: at exactly `worse_by` times the rate, this is the canary's share of failures.
    let null = share * worse_by / (1.0 - share + share * worse_by);
    log_evidence(null, counted.canary_failures as f64, counted.stable_failures as f64)
}

/// Logarithm of the evidence of `c` hits and `p` misses that hits are likelier than `null`.
fn log_evidence(null: f64, c: f64, p: f64) -> f64 {
    let (a, b) = (PRIOR * null, PRIOR * (1.0 - null));
    let mixture = ln_beta(a + c, b + p) - ln_beta(a, b) - c * null.ln() - p * (1.0 - null).ln();
    mixture + ln_upper_tail(null, a + c, b + p) - ln_upper_tail(null, a, b)
}

/// ln P(Beta(a, b) > x), without loss where the tail is thin.
fn ln_upper_tail(x: f64, a: f64, b: f64) -> f64 {
    let tail = beta_reg(b, a, 1.0 - x);
    if tail > 1e-290 {
        return tail.ln();
    }
    // So thin that it has underflowed: the first term of its series, the rest bounded by a geometric
    // one. A clamp would turn "surely better" into evidence of being worse.
    let y = 1.0 - x;
    let ratio = ((a + b) / (b + 1.0) * y).min(0.999);
    b * y.ln() + a * x.ln() - ln_beta(a, b) - b.ln() - (1.0 - ratio).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: Rule = Rule { worse_by: 1.5, alpha: 0.01, min_requests: 200 };

    fn counted(canary: (u64, u64), stable: (u64, u64)) -> Counted {
        Counted {
            canary_requests: canary.0,
            canary_failures: canary.1,
            stable_requests: stable.0,
            stable_failures: stable.1,
            former_log_evidence: 0.0,
            alone: false,
        }
    }

    /// A generator of its own, so that the simulations are the same on every run.
    struct Dice(u64);

    impl Dice {
        fn hit(&mut self, probability: f64) -> bool {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            ((self.0 >> 11) as f64 / (1u64 << 53) as f64) < probability
        }
    }

    /// Runs a rollout at one weight, looking after every hundred requests; the request at which it failed.
    fn simulate(
        seed: u64,
        weight: f64,
        canary_rate: f64,
        stable_rate: impl Fn(u64) -> f64,
        requests: u64,
    ) -> Option<u64> {
        let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut seen = Counted::default();
        for number in 1..=requests {
            let base = stable_rate(number);
            if dice.hit(weight) {
                seen.canary_requests += 1;
                seen.canary_failures += u64::from(dice.hit((base * canary_rate).min(1.0)));
            } else {
                seen.stable_requests += 1;
                seen.stable_failures += u64::from(dice.hit(base));
            }
            if number % 100 == 0 && judge(&seen, &RULE).verdict == Verdict::Fail {
                return Some(number);
            }
        }
        None
    }

    #[test]
    fn a_version_that_is_as_good_is_rarely_stopped_however_often_the_judge_looks() {
        let alarms = (1..=300).filter(|seed| simulate(*seed, 0.1, 1.0, |_| 0.02, 20_000).is_some()).count();
        assert!(alarms <= 3, "{alarms} false alarms of 300 at 1 %");
    }

    #[test]
    fn an_error_rate_that_rises_for_both_stops_nothing() {
        let drifting = |number: u64| if number > 5_000 { 0.10 } else { 0.01 };
        let alarms = (1..=100).filter(|seed| simulate(*seed, 0.1, 1.0, drifting, 15_000).is_some()).count();
        assert!(alarms <= 1, "{alarms} false alarms of 100");
    }

    #[test]
    fn a_version_that_fails_often_is_stopped_soon() {
        let mut needed: Vec<u64> =
            (1..=50).filter_map(|seed| simulate(seed, 0.05, 100.0, |_| 0.002, 20_000)).collect();
        assert_eq!(needed.len(), 50, "found every time");
        needed.sort_unstable();
        assert!(needed[25] <= 1_500, "median: after {} requests", needed[25]);
    }

    #[test]
    fn few_requests_decide_nothing_and_many_good_ones_pass() {
        assert_eq!(judge(&counted((10, 0), (100, 0)), &RULE).verdict, Verdict::Inconclusive);
        assert_eq!(judge(&counted((300, 0), (3000, 0)), &RULE).verdict, Verdict::Pass);
        assert_eq!(judge(&counted((300, 3), (3000, 30)), &RULE).verdict, Verdict::Pass);
    }

    #[test]
    fn no_data_is_neither_good_nor_bad() {
        assert_eq!(judge(&Counted::default(), &RULE).verdict, Verdict::Inconclusive);
    }

    #[test]
    fn a_version_that_mends_an_outage_is_not_called_worse() {
        let judged = judge(&counted((2000, 0), (2000, 1000)), &RULE);
        assert_eq!(judged.verdict, Verdict::Pass, "{judged:?}");
        assert!(judged.log_evidence < 0.0, "{judged:?}");
    }

    #[test]
    fn counts_that_cannot_be_true_do_not_end_the_judge() {
        let judged = judge(&counted((u64::MAX / 2, u64::MAX / 2), (1, 0)), &RULE);
        assert!(!judged.log_evidence.is_nan(), "{judged:?}");
    }

    #[test]
    fn the_sentence_names_the_numbers() {
        let judged = judge(&counted((500, 100), (9500, 20)), &RULE);
        assert_eq!(judged.verdict, Verdict::Fail);
        assert_eq!(
            judged.because,
            "canary failed 100 of 500 (20.00%), stable 20 of 9500 (0.21%): worse than 1.5x, 99% sure at every look"
        );
    }

    #[test]
    fn a_version_that_takes_all_requests_is_still_judged() {
        let alone = |requests, failures| Counted {
            canary_requests: requests,
            canary_failures: failures,
            alone: true,
            ..Counted::default()
        };
        assert_eq!(judge(&alone(200, 100), &RULE).verdict, Verdict::Fail);
        assert!(judge(&alone(200, 100), &RULE).because.contains("worse than 15.0%"));
        assert_eq!(judge(&alone(1_000, 50), &RULE).verdict, Verdict::Pass);
        // Before the stable version has been asked for the first time, failures say nothing.
        let early = Counted { alone: false, ..alone(500, 500) };
        assert_eq!(judge(&early, &RULE).verdict, Verdict::Inconclusive);
        assert_eq!(judge(&alone(1_000, 0), &RULE).verdict, Verdict::Pass);
    }
}
