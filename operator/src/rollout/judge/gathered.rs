//! Latencies of few requests, gathered over blocks until they are enough to be compared.
//!
//! A block in which the canary got fewer than twenty answers, or no stable pod as many, says too little alone. Such
//! blocks are put together, each version as one pod, until both have twenty; then `rank` bets on them as
//! on one block of two pods. Three things keep that bet honest:
//!
//! - When a group ends depends on the number of attempts only, never on how slow they were, and so does whether a block
//!   is compared alone or joins a group. That is no look ahead.
//! - Each block's slow attempts are counted against the stable version's quantile that was known before it.
//! - The stable version is one pod, however many it has, so the odds are those of two pods. A good canary wins at most
//!   every other group as long as its share of slow attempts exceeds the margin times the stable version's at most every
//!   other time. A share that comes in bursts lies below its mean most of the time; that, the margin, and the two
//!   standard deviations that a share of few attempts is allowed make it rarer. It is not proved where a canary is slow
//!   in most groups and the stable version's pods are not: simulated in `examples/judge.rs`.
//!
//! Where a block of few requests is independent of others, the bet is the same: `relative` counts the events of a quiet
//! canary for so little, because of bursts, that a version of which every answer is slow would never be found.
//!
//! The stable version's own latencies are gathered in the same way until there are enough for an estimate.

use tulle_crds::{Evidence, EvidenceWindow, TestEvidence};
use tulle_mesh::histogram::Histogram;

use super::slow::Slow;
use super::{Pod, rank};

/// Numbers that a stored window may hold.
const MOST_NUMBERS: usize = 16;

/// Numbers of a group.
const SUMS: usize = 4;

/// What a comparison of latencies has gathered: what is not used yet, and what is kept.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Gathered {
    /// Answers of the stable version since its quantile was last estimated, too few for the next estimate.
    pub(super) stable: Histogram,
    /// Attempts and slow ones of both versions since the last comparison.
    pub(super) group: Group,
    /// Slow answers of the canary over the rollout.
    pub(super) slow: Slow,
}

/// Blocks that are put together.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Group {
    pub(super) canary: Pod,
    pub(super) stable: Pod,
}

impl Gathered {
    /// What is stored behind the dispersion of this name.
    pub(super) fn stored(evidence: &Evidence, name: &str) -> Self {
        let test = evidence.tests.iter().find(|test| test.name == name);
        let Some([_, group, rest @ ..]) = test.map(|test| test.windows.as_slice()) else {
            return Self::default();
        };
        let mut stable = Histogram::default();
        for bucket in rest.iter().flat_map(|window| &window.log_evidence) {
            stable.add(*bucket as usize, 1);
        }
        // An operator that had no sums has stored the group alone.
        let slow = group.log_evidence.get(SUMS..).map(Slow::stored).unwrap_or_default();
        Self { stable, group: Group::stored(group), slow }
    }

    /// Behind the dispersion: the sums of the group and of slow answers, then the histogram bucket of each gathered answer.
    /// They are fewer than `latency::ENOUGH`, so they fit into the windows that a test may store.
    pub(super) fn store(&self, dispersion: &mut TestEvidence) {
        if *self == Self::default() {
            return;
        }
        let each = |(bucket, count): (usize, u64)| (0..count).map(move |_| bucket as f64);
        let buckets: Vec<f64> = self.stable.buckets().flat_map(each).collect();
        let windows = buckets.chunks(MOST_NUMBERS).zip(2..);
        let mut group = self.group.store();
        group.log_evidence.extend(self.slow.store());
        dispersion.windows.push(group);
        dispersion.windows.extend(windows.map(|(buckets, number)| EvidenceWindow {
            number,
            blocks: 0,
            log_evidence: buckets.to_vec(),
        }));
    }

    /// Logarithms of the e-values of a block, or of the group that it completes. `None`: nothing can be compared yet.
    pub(super) fn compare(&mut self, pods: &[Pod], margin: f64) -> Option<Vec<f64>> {
        if let Some(increments) = rank::increments(pods, margin) {
            return Some(increments);
        }
        for pod in pods {
            let sum = if pod.canary { &mut self.group.canary } else { &mut self.group.stable };
            sum.attempts += pod.attempts;
            sum.events += pod.events;
        }
        let Group { canary, stable } = self.group;
        let pods = [Pod { canary: true, ..canary }, Pod { canary: false, ..stable }];
        let increments = rank::increments(&pods, margin)?;
        self.group = Group::default();
        Some(increments)
    }
}

impl Group {
    fn stored(window: &EvidenceWindow) -> Self {
        let [canary, slow, stable, stable_slow, ..] = window.log_evidence[..] else { return Self::default() };
        if [canary, slow, stable, stable_slow].iter().any(|sum| !sum.is_finite() || *sum < 0.0) {
            return Self::default();
        }
        let pod = |attempts, events| Pod { canary: false, attempts, events };
        Self { canary: pod(canary, slow), stable: pod(stable, stable_slow) }
    }

    fn store(self) -> EvidenceWindow {
        let Self { canary, stable } = self;
        let sums = vec![canary.attempts, canary.events, stable.attempts, stable.events];
        EvidenceWindow { number: 1, blocks: 0, log_evidence: sums }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(canary: (f64, f64), stable: (f64, f64)) -> Vec<Pod> {
        let pod = |canary, (attempts, events)| Pod { canary, attempts, events };
        // Two stable pods, each with half.
        let half = (stable.0 / 2.0, stable.1 / 2.0);
        vec![pod(true, canary), pod(false, half), pod(false, half)]
    }

    #[test]
    fn blocks_of_few_requests_are_compared_together() {
        let mut gathered = Gathered::default();
        assert_eq!(gathered.compare(&pods((7.0, 7.0), (30.0, 3.0)), 1.5), None);
        assert_eq!(gathered.compare(&pods((7.0, 7.0), (30.0, 3.0)), 1.5), None);
        let won = gathered.compare(&pods((7.0, 7.0), (30.0, 3.0)), 1.5).unwrap();
        assert!(won.iter().all(|log| *log > 0.0), "{won:?}");
        assert_eq!(gathered, Gathered::default(), "the next group begins");
        let mut good = Gathered::default();
        let lost = (0..3).find_map(|_| good.compare(&pods((7.0, 1.0), (30.0, 3.0)), 1.5)).unwrap();
        assert!(lost.iter().all(|log| *log < 0.0), "{lost:?}");
    }

    #[test]
    fn a_group_waits_for_both_versions() {
        let mut gathered = Gathered::default();
        for _ in 0..9 {
            assert_eq!(gathered.compare(&pods((100.0, 50.0), (2.0, 0.0)), 1.5), None);
        }
        assert!(gathered.compare(&pods((100.0, 50.0), (2.0, 0.0)), 1.5).is_some());
    }

    #[test]
    fn a_block_with_enough_requests_is_compared_alone() {
        let mut gathered = Gathered::default();
        gathered.compare(&pods((7.0, 7.0), (30.0, 3.0)), 1.5);
        let before = gathered.clone();
        let large = pods((70.0, 1.0), (300.0, 30.0));
        assert_eq!(gathered.compare(&large, 1.5), rank::increments(&large, 1.5));
        assert_eq!(gathered, before);
    }

    #[test]
    fn what_is_gathered_is_stored_behind_the_dispersion_and_within_the_bounds_of_the_status() {
        let mut gathered = Gathered::default();
        gathered.compare(&pods((7.0, 5.0), (30.0, 3.0)), 1.5);
        (0..49).for_each(|bucket| gathered.stable.add(bucket, 1));
        gathered.slow = Slow::stored(&[100.0, 20.0, 19.0, 1.5, 130.0]);
        let dispersion = EvidenceWindow { log_evidence: vec![1.0; 6], ..EvidenceWindow::default() };
        let mut test = TestEvidence {
            name: "latencyDispersion".to_owned(),
            windows: vec![dispersion],
            ..TestEvidence::default()
        };
        gathered.store(&mut test);
        assert!(test.windows.len() <= 8, "{}", test.windows.len());
        assert!(test.windows.iter().all(|window| window.log_evidence.len() <= 16));
        let evidence = Evidence { tests: vec![test], ..Evidence::default() };
        assert_eq!(Gathered::stored(&evidence, "latencyDispersion"), gathered);
        assert_eq!(Gathered::stored(&evidence, "latencyP90Dispersion"), Gathered::default());
    }

    #[test]
    fn what_an_operator_without_sums_has_stored_is_read() {
        let mut gathered = Gathered::default();
        gathered.compare(&pods((7.0, 5.0), (30.0, 3.0)), 1.5);
        let windows = vec![EvidenceWindow::default(), gathered.group.store()];
        let test = TestEvidence { name: "latencyDispersion".to_owned(), windows, ..TestEvidence::default() };
        let evidence = Evidence { tests: vec![test], ..Evidence::default() };
        assert_eq!(Gathered::stored(&evidence, "latencyDispersion"), gathered);
    }
}
