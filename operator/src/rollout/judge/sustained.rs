//! A canary that fails on and on beside a stable version that does not, without statistics.
//!
//! The tests count a pod once per block, because a burst must not decide. With few pods and a large weight that is slow:
//! half of all requests may fail for minutes. What goes on for several blocks and is longer than ten bursts is none.

use tulle_crds::{AttemptTotals, Evidence, EvidenceWindow, TestEvidence};

use super::{PodBlock, Rules, Side};

/// The name under which it is stored.
pub(super) const NAME: &str = "sustained";
/// Blocks in a row.
const BLOCKS: u32 = 3;
/// Failures in them: ten bursts of fifty.
const FAILURES: f64 = 500.0;
/// Attempts from which on a block says something.
const ENOUGH: u64 = 50;
/// Share of failures that is none yet.
const LEAST: f64 = 0.05;
/// How many times what is accepted of the stable version is beyond doubt.
const TIMES: f64 = 4.0;

/// Blocks in a row in which the canary was far worse, and what was counted in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sustained {
    blocks: u32,
    canary: (f64, f64),
    stable: (f64, f64),
}

impl Sustained {
    /// As stored.
    pub(super) fn stored(evidence: &Evidence) -> Self {
        let test = evidence.tests.iter().find(|test| test.name == NAME);
        let Some(window) = test.and_then(|test| test.windows.first()) else { return Self::default() };
        let [canary, failed, stable, stable_failed] = window.log_evidence[..] else { return Self::default() };
        Self { blocks: window.blocks, canary: (canary, failed), stable: (stable, stable_failed) }
    }

    /// To be stored.
    pub(super) fn store(self) -> TestEvidence {
        let counts = vec![self.canary.0, self.canary.1, self.stable.0, self.stable.1];
        let window = EvidenceWindow { number: 0, blocks: self.blocks, log_evidence: counts };
        TestEvidence { name: NAME.to_owned(), reference: None, windows: vec![window] }
    }

    /// With one more block. One with few attempts changes nothing.
    pub(super) fn fold(self, block: &[PodBlock], rules: &Rules) -> Self {
        let sum = |side| {
            let mut sum = AttemptTotals::default();
            block.iter().filter(|pod| pod.side == side).for_each(|pod| super::add(&mut sum, &pod.totals));
            sum
        };
        let (canary, stable) = (sum(Side::Canary), sum(Side::Stable));
        if canary.attempts < ENOUGH || stable.attempts < ENOUGH {
            return self;
        }
        let add = |before: (f64, f64), more: AttemptTotals| {
            (before.0 + more.attempts as f64, before.1 + more.failures as f64)
        };
        let rate = |counts: (f64, f64)| counts.1 / counts.0;
        let far_worse = |canary: (f64, f64), stable: (f64, f64)| {
            rate(canary) > LEAST && rate(canary) > TIMES * rules.errors_worse_by * rate(stable)
        };
        if !far_worse(add((0.0, 0.0), canary), add((0.0, 0.0), stable)) {
            return Self::default();
        }
        let all = Self {
            blocks: self.blocks.saturating_add(1),
            canary: add(self.canary, canary),
            stable: add(self.stable, stable),
        };
        if far_worse(all.canary, all.stable) { all } else { Self::default() }
    }

    /// Whether that is beyond doubt; one sentence part.
    pub(super) fn verdict(&self) -> Option<String> {
        (self.blocks >= BLOCKS && self.canary.1 >= FAILURES).then(|| {
            format!(
                "{} of its last {} requests failed, in each of {} blocks of ten seconds, and {} of {} of the stable version",
                self.canary.1, self.canary.0, self.blocks, self.stable.1, self.stable.0
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(side: Side, attempts: u64, failures: u64) -> PodBlock {
        PodBlock {
            side,
            totals: AttemptTotals { attempts, failures, ..Default::default() },
            ..Default::default()
        }
    }

    fn after(blocks: &[(u64, u64)]) -> Option<String> {
        let rules = Rules::of(&tulle_crds::Judge::default());
        let mut evidence = Evidence::default();
        for (attempts, failures) in blocks {
            let block = [pod(Side::Canary, *attempts, *failures), pod(Side::Stable, 3000, 3)];
            let sustained = Sustained::stored(&evidence).fold(&block, &rules);
            evidence.tests = vec![sustained.store()];
        }
        Sustained::stored(&evidence).verdict()
    }

    #[test]
    fn three_blocks_of_many_failures_are_no_burst() {
        assert_eq!(after(&[(1000, 300), (1000, 300)]), None);
        assert!(after(&[(1000, 300), (1000, 300), (1000, 300)]).unwrap().contains("900 of its last 3000"));
    }

    #[test]
    fn a_good_block_between_them_begins_anew_and_one_with_few_attempts_does_not() {
        assert_eq!(after(&[(1000, 300), (1000, 300), (1000, 3), (1000, 300)]), None);
        assert!(after(&[(1000, 300), (1000, 300), (10, 0), (1000, 300)]).is_some());
    }

    #[test]
    fn few_failures_are_left_to_the_tests() {
        assert_eq!(after(&[(100, 50); 6]), None);
    }
}
