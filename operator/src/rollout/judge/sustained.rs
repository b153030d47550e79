//! A canary that fails on and on beside a stable version that does not, without statistics.
//!
//! The tests count a pod once per block, because a burst must not decide. With few pods and a large weight that is slow:
//! half of all requests may fail for minutes. What is longer than several bursts in a row is none. Two rules say so:
//!
//! - many: a share that is far too large in each of three blocks, and as many failures as ten bursts of fifty;
//! - most: about half of all requests, however few they are. Blocks are put together until the canary has had 56 attempts,
//!   and four such groups in a row decide, which is after 30 s at the earliest.
//!
//! A burst of fifty makes one group of the second rule and no two, because two need 2 × 0.45 × 56 > 50 failures. Four groups
//! are at least 101 failures, so three bursts that follow each other almost without a success between them, while the stable
//! version fails a tenth as often at most, in these blocks and in the whole rollout. In simulated rollouts of half an hour
//! without the last condition, bursts of fifty made four groups in none of 6000 at 1 % of failures, and in 8 of 6000 at 5 %.

use tulle_crds::{AttemptTotals, Evidence, EvidenceWindow, TestEvidence};

use super::{PodBlock, Rules, Side};

/// The name under which it is stored.
pub(super) const NAME: &str = "sustained";
/// Blocks in a row.
const BLOCKS: u32 = 3;
/// Failures in them: ten bursts of fifty.
const FAILURES: f64 = 500.0;
/// Attempts from which on a block says something.
const ENOUGH: f64 = 50.0;
/// Share of failures that is none yet.
const LEAST: f64 = 0.05;
/// How many times what is accepted of the stable version is beyond doubt.
const TIMES: f64 = 4.0;

/// Attempts at the canary that make a group of blocks, the share of them that must have failed, and groups in a row.
const GROUP: f64 = 56.0;
const SHARE: f64 = 0.45;
const GROUPS: u32 = 4;
/// Attempts at the stable version over the same blocks, and how many times less often it fails: whatever both depend on may
/// be gone. Where `errors.worseBy` accepts more than that, it is as many times.
const STABLE: f64 = 30.0;
const TIMES_STABLE: f64 = 10.0;

/// Attempts and how many of them failed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counts {
    attempts: f64,
    failures: f64,
}

impl Counts {
    fn of(totals: &AttemptTotals) -> Self {
        Self { attempts: totals.attempts as f64, failures: totals.failures as f64 }
    }

    /// Without those that did not reach the application: a node that is lost, or a pod that was killed, is not the
    /// version's fault.
    fn reached(totals: &AttemptTotals) -> Self {
        let without = |count: u64| count.saturating_sub(totals.unreached) as f64;
        Self { attempts: without(totals.attempts), failures: without(totals.failures) }
    }

    fn plus(self, more: Self) -> Self {
        Self { attempts: self.attempts + more.attempts, failures: self.failures + more.failures }
    }

    fn rate(self) -> f64 {
        self.failures / self.attempts.max(1.0)
    }
}

/// What has gone on for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Sustained {
    many: Many,
    most: Most,
}

/// Blocks in a row in which the canary was far worse, and what was counted in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Many {
    blocks: u32,
    canary: Counts,
    stable: Counts,
}

/// Groups of blocks in a row in which the canary failed about half of its attempts, and what was counted in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Most {
    groups: u32,
    /// The canary in the group that is not full yet.
    group: Counts,
    /// The canary in the full ones.
    canary: Counts,
    /// The stable version in all of them.
    stable: Counts,
}

impl Sustained {
    /// As stored.
    pub(super) fn stored(evidence: &Evidence) -> Self {
        let Some(test) = evidence.tests.iter().find(|test| test.name == NAME) else { return Self::default() };
        Self {
            many: test.windows.first().map(Many::stored).unwrap_or_default(),
            most: test.windows.get(1).map(Most::stored).unwrap_or_default(),
        }
    }

    /// To be stored.
    pub(super) fn store(self) -> TestEvidence {
        let windows = vec![self.many.store(), self.most.store()];
        TestEvidence { name: NAME.to_owned(), reference: None, windows }
    }

    /// With one more block.
    pub(super) fn fold(self, block: &[PodBlock], rules: &Rules) -> Self {
        let sum = |side| {
            let mut sum = AttemptTotals::default();
            block.iter().filter(|pod| pod.side == side).for_each(|pod| super::add(&mut sum, &pod.totals));
            sum
        };
        let (canary, stable) = (sum(Side::Canary), sum(Side::Stable));
        Self {
            many: self.many.fold(Counts::of(&canary), Counts::of(&stable), rules),
            most: self.most.fold(Counts::reached(&canary), Counts::of(&stable), rules),
        }
    }

    /// Whether that is beyond doubt; one sentence part. `stable`: the stable version since the rollout began.
    pub(super) fn verdict(&self, stable: &AttemptTotals, rules: &Rules) -> Option<String> {
        self.many.verdict().or_else(|| self.most.verdict(Counts::of(stable), rules))
    }
}

impl Many {
    fn stored(window: &EvidenceWindow) -> Self {
        let [canary, failed, stable, stable_failed] = window.log_evidence[..] else { return Self::default() };
        Self {
            blocks: window.blocks,
            canary: Counts { attempts: canary, failures: failed },
            stable: Counts { attempts: stable, failures: stable_failed },
        }
    }

    fn store(self) -> EvidenceWindow {
        let Self { blocks, canary, stable } = self;
        let counts = vec![canary.attempts, canary.failures, stable.attempts, stable.failures];
        EvidenceWindow { number: 0, blocks, log_evidence: counts }
    }

    /// A block with few attempts changes nothing.
    fn fold(self, canary: Counts, stable: Counts, rules: &Rules) -> Self {
        if canary.attempts < ENOUGH || stable.attempts < ENOUGH {
            return self;
        }
        let far_worse = |canary: Counts, stable: Counts| {
            canary.rate() > LEAST && canary.rate() > TIMES * rules.errors_worse_by * stable.rate()
        };
        if !far_worse(canary, stable) {
            return Self::default();
        }
        let all = Self {
            blocks: self.blocks.saturating_add(1),
            canary: self.canary.plus(canary),
            stable: self.stable.plus(stable),
        };
        if far_worse(all.canary, all.stable) { all } else { Self::default() }
    }

    fn verdict(&self) -> Option<String> {
        (self.blocks >= BLOCKS && self.canary.failures >= FAILURES).then(|| {
            format!(
                "{} of its last {} requests failed, in each of {} blocks of ten seconds, and {} of {} of the stable version",
                self.canary.failures,
                self.canary.attempts,
                self.blocks,
                self.stable.failures,
                self.stable.attempts
            )
        })
    }
}

impl Most {
    fn stored(window: &EvidenceWindow) -> Self {
        let [attempts, failures, canary, failed, stable, stable_failed] = window.log_evidence[..] else {
            return Self::default();
        };
        Self {
            groups: window.blocks,
            group: Counts { attempts, failures },
            canary: Counts { attempts: canary, failures: failed },
            stable: Counts { attempts: stable, failures: stable_failed },
        }
    }

    fn store(self) -> EvidenceWindow {
        let Self { groups, group, canary, stable } = self;
        let counts =
            [group, canary, stable].into_iter().flat_map(|counts| [counts.attempts, counts.failures]);
        EvidenceWindow { number: 1, blocks: groups, log_evidence: counts.collect() }
    }

    /// A block in which no attempt reached the canary changes nothing.
    fn fold(self, canary: Counts, stable: Counts, rules: &Rules) -> Self {
        if canary.attempts <= 0.0 {
            return self;
        }
        let (group, stable) = (self.group.plus(canary), self.stable.plus(stable));
        if group.attempts < GROUP {
            return Self { group, stable, ..self };
        }
        let all = Self {
            groups: self.groups.saturating_add(1),
            group: Counts::default(),
            canary: self.canary.plus(group),
            stable,
        };
        let goes_on = group.rate() >= SHARE && is_far_better(stable, all.canary, rules);
        if goes_on { all } else { Self::default() }
    }

    fn verdict(&self, rollout: Counts, rules: &Rules) -> Option<String> {
        let enough = self.groups >= GROUPS && self.stable.attempts >= STABLE;
        (enough && is_far_better(rollout, self.canary, rules)).then(|| {
            format!(
                "{} of its last {} requests failed, about half of them all the time, and {} of {} of the stable version",
                self.canary.failures, self.canary.attempts, self.stable.failures, self.stable.attempts
            )
        })
    }
}

fn is_far_better(stable: Counts, canary: Counts, rules: &Rules) -> bool {
    TIMES_STABLE.max(rules.errors_worse_by) * stable.rate() <= canary.rate()
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

    /// After these blocks of the canary (attempts and failures), each beside the same one of the stable version.
    fn beside(stable: (u64, u64), blocks: &[(u64, u64)]) -> Option<String> {
        let pods = blocks.iter().map(|(attempts, failures)| pod(Side::Canary, *attempts, *failures));
        judged(stable, &pods.collect::<Vec<_>>())
    }

    fn judged(stable: (u64, u64), canary: &[PodBlock]) -> Option<String> {
        judged_by(&Rules::of(&tulle_crds::Judge::default()), stable, canary)
    }

    fn judged_by(rules: &Rules, stable: (u64, u64), canary: &[PodBlock]) -> Option<String> {
        let mut evidence = Evidence::default();
        for canary in canary {
            let block = [canary.clone(), pod(Side::Stable, stable.0, stable.1)];
            let sustained = Sustained::stored(&evidence).fold(&block, rules);
            evidence.tests = vec![sustained.store()];
            super::super::add(&mut evidence.stable, &block[1].totals);
        }
        Sustained::stored(&evidence).verdict(&evidence.stable, rules)
    }

    fn after(blocks: &[(u64, u64)]) -> Option<String> {
        beside((3000, 3), blocks)
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
        assert_eq!(after(&[(100, 40); 6]), None);
    }

    #[test]
    fn a_version_that_fails_more_than_half_of_few_requests_is_stopped_after_some_two_hundred() {
        assert_eq!(beside((20, 0), &[(80, 48); 3]), None);
        let because = beside((20, 0), &[(80, 48); 4]).unwrap();
        assert!(because.contains("192 of its last 320 requests failed"), "{because}");
        // Three blocks are one group.
        assert_eq!(beside((80, 0), &[(20, 12); 11]), None);
        assert!(beside((80, 0), &[(20, 12); 12]).is_some());
    }

    #[test]
    fn two_bursts_of_fifty_do_not_stop_a_version_that_gets_few_requests() {
        for attempts in [10_u64, 20, 50, 100] {
            let mut blocks = vec![(attempts, 0); 6];
            let failed = attempts.min(50);
            blocks.extend(vec![(attempts, failed); usize::try_from(100 / failed).unwrap()]);
            blocks.extend(vec![(attempts, 0); 6]);
            for end in 1..=blocks.len() {
                assert_eq!(beside((100, 0), &blocks[..end]), None, "{attempts} attempts per block");
            }
        }
    }

    #[test]
    fn a_good_group_between_them_begins_anew() {
        let mut blocks = vec![(80, 48); 3];
        blocks.push((80, 10));
        blocks.extend([(80, 48); 3]);
        assert_eq!(beside((20, 0), &blocks), None);
    }

    #[test]
    fn what_both_versions_fail_by_stops_neither() {
        assert_eq!(beside((40, 12), &[(80, 48); 20]), None, "something that both depend on is gone");
        assert_eq!(beside((5, 0), &[(80, 48); 5]), None, "25 attempts at the stable version do not show it");
        assert!(beside((5, 0), &[(80, 48); 6]).is_some());
    }

    #[test]
    fn a_version_that_is_as_bad_as_a_user_accepts_is_not_stopped() {
        let stops_at = |worse_by: f64| {
            let mut settings = tulle_crds::Judge::default();
            settings.errors.worse_by = worse_by;
            judged_by(&Rules::of(&settings), (80, 2), &vec![pod(Side::Canary, 80, 48); 5]).is_some()
        };
        assert!(stops_at(1.5) && stops_at(20.0), "60 % beside 2.5 %");
        assert!(!stops_at(25.0));
    }

    #[test]
    fn attempts_that_did_not_reach_the_application_are_not_its_failures() {
        let mut lost = pod(Side::Canary, 80, 60);
        lost.totals.unreached = 50;
        let eight = |pod: &PodBlock| vec![pod.clone(); 8];
        assert_eq!(judged((80, 0), &eight(&lost)), None, "10 of 30 that reached it failed");
        lost.totals.unreached = 10;
        assert!(judged((80, 0), &eight(&lost)).is_some());
    }
}
