//! Slow answers of the canary, summed up over the rollout.
//!
//! `rank` bets once per block and accepts much of a block of few answers, because one block may be slow by chance. A
//! version of which every fifth answer is slow loses most of these bets, however many blocks come. The sum is known
//! better: the canary's quantile exceeds the limit if more of its answers are above it than the quantile leaves. The sum
//! fails nobody, because it is no e-process; a version for which it is too large does not pass.
//!
//! - An answer is slow above the limit that follows from the stable version's quantile before the block. While that
//!   estimate lags behind a slowdown of both versions, as many answers of the stable version are above the limit, and so
//!   many are accepted. They are counted block by block, because the weight may have been another in each.
//! - One block, in which a pod stands still, adds at most what a block may count for elsewhere (`burst`).
//! - Blocks are forgotten over about ten minutes, or over some hundred answers where these take longer: a version that was
//!   slow while its caches were cold passes later. Where no stable version answers, nothing is added, and what there is
//!   fades.

use super::{LATENCY_MARGIN, LatencyRule, PodBlock, Side, burst, latency};

/// What remains of the sums after one more block.
const KEPT: f64 = 1.0 - 1.0 / 60.0;
/// Answers of the canary before which nothing is forgotten.
const MANY: f64 = 500.0;
/// Answers of the canary from which on the sums say something.
const ENOUGH: f64 = 20.0;
/// Standard deviations above what is accepted that may be chance.
const DEVIATIONS: f64 = 1.5;

/// Sums over the earlier blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Slow {
    /// Answers of the canary.
    answers: f64,
    /// How many of them were slow.
    slow: f64,
    /// The same without what one block may not add.
    counted: f64,
    /// How many would have been slow at the stable version's share.
    of_stable: f64,
    /// Answers of the canary, also those that were forgotten.
    compared: f64,
}

impl Slow {
    /// As stored.
    pub(super) fn stored(sums: &[f64]) -> Self {
        match *sums {
            [answers, slow, counted, of_stable, compared]
                if sums.iter().all(|sum| sum.is_finite() && *sum >= 0.0) =>
            {
                Self { answers, slow, counted, of_stable, compared }
            }
            _ => Self::default(),
        }
    }

    /// To be stored.
    pub(super) fn store(self) -> [f64; 5] {
        [self.answers, self.slow, self.counted, self.of_stable, self.compared]
    }

    /// With one more block. `stable`: the stable version's quantile before it, in microseconds.
    pub(super) fn fold(self, block: &[PodBlock], stable: f64, rule: LatencyRule) -> Self {
        let above = |side: Side, threshold: f64| -> f64 {
            let pods = block.iter().filter(|pod| pod.side == side);
            pods.map(|pod| latency::slower(&pod.latency, threshold)).sum()
        };
        let limit = latency::limit(stable, rule);
        let (answers, stable_answers) = (above(Side::Canary, 0.0), above(Side::Stable, 0.0));
        if answers <= 0.0 {
            return self;
        }
        if stable_answers <= 0.0 {
            return self.times(KEPT);
        }
        let slow = above(Side::Canary, limit);
        let block = Self {
            answers,
            slow,
            counted: slow,
            of_stable: answers * above(Side::Stable, limit) / stable_answers,
            compared: answers,
        };
        let most = burst::most(block.accepted(rule));
        let kept = self.times(if self.answers < MANY { 1.0 } else { KEPT });
        Self {
            answers: kept.answers + block.answers,
            slow: kept.slow + block.slow,
            counted: kept.counted + block.counted.min(most),
            of_stable: kept.of_stable + block.of_stable,
            compared: kept.compared + block.compared,
        }
    }

    fn times(self, kept: f64) -> Self {
        Self {
            answers: self.answers * kept,
            slow: self.slow * kept,
            counted: self.counted * kept,
            of_stable: self.of_stable * kept,
            compared: self.compared,
        }
    }

    /// How many slow answers are accepted.
    fn accepted(&self, rule: LatencyRule) -> f64 {
        (self.answers * (1.0 - rule.quantile)).max(LATENCY_MARGIN * self.of_stable)
    }

    /// Answers of the canary that were looked at in this rollout. A step that leaves next to nothing to the stable version
    /// takes back none of them.
    pub(super) fn compared(&self) -> f64 {
        self.compared
    }

    /// Whether more answers are slow than are accepted, beyond chance.
    pub(super) fn are_too_many(&self, rule: LatencyRule) -> bool {
        let accepted = self.accepted(rule);
        self.answers >= ENOUGH && self.counted > accepted + DEVIATIONS * accepted.sqrt()
    }

    /// Share of the canary's answers that were slow.
    pub(super) fn share(&self) -> f64 {
        self.slow / self.answers.max(1.0)
    }

    /// Share that is accepted.
    pub(super) fn accepted_share(&self, rule: LatencyRule) -> f64 {
        self.accepted(rule) / self.answers.max(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P90: LatencyRule = LatencyRule { quantile: 0.9, worse_by: 3.0 };
    const P99: LatencyRule = LatencyRule { quantile: 0.99, worse_by: 3.0 };

    /// A pod with quick answers and some that take 400 ms more.
    fn pod(side: Side, quick: u64, slow: u64) -> PodBlock {
        let mut pod = PodBlock { side, ..PodBlock::default() };
        (0..quick).for_each(|_| pod.latency.record(20_000));
        (0..slow).for_each(|_| pod.latency.record(420_000));
        pod
    }

    fn after(blocks: usize, block: &[PodBlock], rule: LatencyRule) -> Slow {
        (0..blocks).fold(Slow::default(), |slow, _| slow.fold(block, 20_000.0, rule))
    }

    #[test]
    fn every_fifth_answer_is_too_many_and_what_the_quantile_leaves_is_not() {
        let fifth = [pod(Side::Canary, 20, 5), pod(Side::Stable, 100, 1)];
        assert!(after(8, &fifth, P90).are_too_many(P90));
        assert!((after(8, &fifth, P90).share() - 0.2).abs() < 1e-9);
        let tenth = [pod(Side::Canary, 18, 2), pod(Side::Stable, 100, 1)];
        for blocks in 1..200 {
            assert!(!after(blocks, &tenth, P90).are_too_many(P90), "{blocks}");
        }
    }

    #[test]
    fn a_slowdown_of_both_is_accepted_also_where_the_estimate_lags_behind() {
        let both = [pod(Side::Canary, 0, 50), pod(Side::Stable, 0, 50)];
        assert!(!after(20, &both, P90).are_too_many(P90));
    }

    #[test]
    fn one_block_in_which_a_pod_stands_still_does_not_decide() {
        let calm = [pod(Side::Canary, 25, 0), pod(Side::Stable, 100, 0)];
        let still = [pod(Side::Canary, 5, 20), pod(Side::Stable, 100, 0)];
        for rule in [P90, P99] {
            let slow = after(10, &calm, rule).fold(&still, 20_000.0, rule);
            assert!(!slow.are_too_many(rule), "{slow:?}");
        }
    }

    #[test]
    fn a_version_that_was_slow_at_the_start_is_forgiven() {
        let (slow, quick) = (
            [pod(Side::Canary, 35, 15), pod(Side::Stable, 200, 0)],
            [pod(Side::Canary, 50, 0), pod(Side::Stable, 200, 0)],
        );
        for rule in [P90, P99] {
            let started = after(6, &slow, rule);
            assert!(started.are_too_many(rule));
            let later = (0..60).fold(started, |sums, _| sums.fold(&quick, 20_000.0, rule));
            assert!(!later.are_too_many(rule), "{later:?}");
        }
    }

    #[test]
    fn nothing_is_held_against_a_version_for_ever_that_has_nothing_beside_it() {
        let fifth = [pod(Side::Canary, 20, 5), pod(Side::Stable, 100, 1)];
        let alone = [pod(Side::Canary, 25, 0)];
        let sums = (0..600).fold(after(8, &fifth, P90), |sums, _| sums.fold(&alone, 20_000.0, P90));
        assert!(!sums.are_too_many(P90), "{sums:?}");
        assert!((sums.compared() - 200.0).abs() < 1e-9, "what was compared stays so: {sums:?}");
    }

    #[test]
    fn what_is_stored_is_read_again() {
        let sums = after(3, &[pod(Side::Canary, 20, 5), pod(Side::Stable, 100, 1)], P90);
        assert_eq!(Slow::stored(&sums.store()), sums);
        assert_eq!(Slow::stored(&[]), Slow::default());
        assert_eq!(Slow::stored(&[1.0, f64::NAN, 0.0, 0.0, 1.0]), Slow::default());
    }
}
