//! A canary that fails on and on beside a stable version that does not, without statistics.
//!
//! The tests count a pod once per block, because a burst must not decide. With few pods and a large weight that is slow:
//! half of all requests may fail for minutes. What is longer than several bursts in a row is none. Three rules say so:
//!
//! - many: a share that is far too large in each of three blocks, and as many failures as ten bursts of fifty;
//! - half: about half of all requests, however few they are. Blocks are put together until the canary has had 56 attempts,
//!   and four such groups in a row decide, which is after 30 s at the earliest;
//! - nearly all: at least 95 % of one such group, if it is more than one block. A pod that stands still for some seconds
//!   fails all that it gets in one block.
//!
//! A burst of fifty makes one group of the second rule and no two, because two need 2 × 0.45 × 56 > 50 failures. Four groups
//! are at least 101 failures, so three bursts that follow each other almost without a success between them, while the stable
//! version fails a tenth as often at most, in these blocks and in the whole rollout. In simulated rollouts of half an hour
//! without the last condition, bursts of fifty made four groups in none of 6000 at 1 % of failures, and in 8 of 6000 at 5 %.
//!
//! The third rule needs 54 failures of 56, so two bursts with three successes between them at most. Groups begin anew, so it
//! finds a version that was good at first.

use tulle_crds::{AttemptTotals, Evidence, EvidenceWindow, TestEvidence};

use super::{ENOUGH_TO_REMEMBER, PodBlock, Rules, Side};

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

/// Attempts at the canary that make a group of blocks.
const GROUP: f64 = 56.0;
/// About half of its attempts, in each of four groups.
const HALF: Rule = Rule { window: 1, share: 0.45, groups: 4, blocks: 1.0, most_of_stable: 1.0 };
/// Nearly all of them, in one group of two blocks or in one each.
const NEARLY_ALL: Rule = Rule { window: 2, share: 0.95, groups: 1, blocks: 2.0, most_of_stable: 0.05 };
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
    half: Row,
    nearly_all: Row,
}

/// Blocks in a row in which the canary was far worse, and what was counted in them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Many {
    blocks: u32,
    canary: Counts,
    stable: Counts,
}

/// How large a share of how much must have failed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rule {
    /// The number under which its row is stored.
    window: u32,
    /// Share of each group that must have failed.
    share: f64,
    /// Groups in a row, and blocks that they must consist of.
    groups: u32,
    blocks: f64,
    /// Share that the stable version may have failed.
    most_of_stable: f64,
}

/// Groups of blocks in a row in which the canary failed as large a share of its attempts as a rule names.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Row {
    groups: u32,
    /// The group that is not full yet.
    group: Sums,
    /// The full ones.
    full: Sums,
}

/// What was counted in some blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    blocks: f64,
    canary: Counts,
    stable: Counts,
}

impl Sums {
    fn plus(self, more: Self) -> Self {
        Self {
            blocks: self.blocks + more.blocks,
            canary: self.canary.plus(more.canary),
            stable: self.stable.plus(more.stable),
        }
    }

    fn numbers(self) -> [f64; 5] {
        let Self { blocks, canary, stable } = self;
        [blocks, canary.attempts, canary.failures, stable.attempts, stable.failures]
    }

    fn of(numbers: [f64; 5]) -> Self {
        let [blocks, attempts, failures, stable, stable_failures] = numbers;
        Self {
            blocks,
            canary: Counts { attempts, failures },
            stable: Counts { attempts: stable, failures: stable_failures },
        }
    }
}

impl Sustained {
    /// As stored.
    pub(super) fn stored(evidence: &Evidence) -> Self {
        let Some(test) = evidence.tests.iter().find(|test| test.name == NAME) else { return Self::default() };
        Self {
            many: test.windows.first().map(Many::stored).unwrap_or_default(),
            half: test.windows.get(1).map(Row::stored).unwrap_or_default(),
            nearly_all: test.windows.get(2).map(Row::stored).unwrap_or_default(),
        }
    }

    /// To be stored.
    pub(super) fn store(self) -> TestEvidence {
        let windows = vec![self.many.store(), self.half.store(HALF), self.nearly_all.store(NEARLY_ALL)];
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
        let reached = Sums { blocks: 1.0, canary: Counts::reached(&canary), stable: Counts::of(&stable) };
        Self {
            many: self.many.fold(Counts::of(&canary), Counts::of(&stable), rules),
            half: self.half.fold(reached, HALF, rules),
            nearly_all: self.nearly_all.fold(reached, NEARLY_ALL, rules),
        }
    }

    /// Whether that is beyond doubt; one sentence part. `stable`: the stable version since the rollout began. `alone`: the
    /// canary gets all requests, so that what is known of the stable version is from earlier.
    pub(super) fn verdict(&self, stable: &AttemptTotals, rules: &Rules, alone: bool) -> Option<String> {
        let stable = Counts::of(stable);
        let remembered = (alone && stable.attempts >= ENOUGH_TO_REMEMBER as f64).then_some(stable);
        let (half, nearly_all) = (&self.half, &self.nearly_all);
        let groups =
            || format!("at least {:.0}% in each of {} groups in a row", HALF.share * 100.0, half.groups);
        self.many
            .verdict()
            .or_else(|| nearly_all.finding(stable, remembered, NEARLY_ALL, rules, "nearly every one"))
            .or_else(|| half.finding(stable, remembered, HALF, rules, &groups()))
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

impl Row {
    fn stored(window: &EvidenceWindow) -> Self {
        let [b, c, f, s, t, blocks, canary, failed, stable, stable_failed] = window.log_evidence[..] else {
            return Self::default();
        };
        Self {
            groups: window.blocks,
            group: Sums::of([b, c, f, s, t]),
            full: Sums::of([blocks, canary, failed, stable, stable_failed]),
        }
    }

    fn store(self, rule: Rule) -> EvidenceWindow {
        let Self { groups, group, full } = self;
        let log_evidence = [group, full].into_iter().flat_map(Sums::numbers).collect();
        EvidenceWindow { number: rule.window, blocks: groups, log_evidence }
    }

    /// A block in which no attempt reached the canary changes nothing.
    fn fold(self, block: Sums, rule: Rule, rules: &Rules) -> Self {
        if block.canary.attempts <= 0.0 {
            return self;
        }
        let group = self.group.plus(block);
        if group.canary.attempts < GROUP {
            return Self { group, ..self };
        }
        let full = self.full.plus(group);
        if group.canary.rate() < rule.share || !is_far_better(full.stable, full.canary, rules) {
            return Self::default();
        }
        Self { groups: self.groups.saturating_add(1), group: Sums::default(), full }
    }

    /// `stable`: the stable version since the rollout began. `remembered`: what stands for its requests over the same blocks,
    /// where it got none. `how`: how the canary's requests failed.
    fn finding(
        &self,
        stable: Counts,
        remembered: Option<Counts>,
        rule: Rule,
        rules: &Rules,
        how: &str,
    ) -> Option<String> {
        let mut full = self.full;
        if full.stable.attempts < STABLE {
            full.stable = remembered?;
        }
        let is_long = self.groups >= rule.groups && full.blocks >= rule.blocks;
        let is_good = full.stable.rate().max(stable.rate()) <= rule.most_of_stable
            && is_far_better(stable, full.canary, rules);
        (is_long && is_good).then(|| {
            format!(
                "{} of its last {} requests failed ({:.0}%), {how}, and {} of {} of the stable version",
                full.canary.failures,
                full.canary.attempts,
                full.canary.rate() * 100.0,
                full.stable.failures,
                full.stable.attempts
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

    #[test]
    fn a_canary_that_gets_all_requests_is_compared_with_what_is_remembered() {
        let rules = Rules::of(&tulle_crds::Judge::default());
        let found = |attempts, failures, alone| {
            let block = [pod(Side::Canary, 400, 240), pod(Side::Stable, 0, 0)];
            let all = (0..4).fold(Sustained::default(), |all, _| all.fold(&block, &rules));
            all.verdict(&AttemptTotals { attempts, failures, ..Default::default() }, &rules, alone)
        };
        let because = found(3_200, 10, true).unwrap();
        assert!(because.starts_with("960 of its last 1600 requests failed (60%)"), "{because}");
        assert!(because.ends_with("10 of 3200 of the stable version"), "{because}");
        assert_eq!(found(3_200, 400, true), None, "the stable version failed often too");
        assert_eq!(found(100, 0, true), None, "too little is known of it");
        assert_eq!(found(3_200, 10, false), None, "it could be compared, and got nothing");
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
        Sustained::stored(&evidence).verdict(&evidence.stable, rules, false)
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
        let sentence = "192 of its last 320 requests failed (60%), at least 45% in each of 4 groups in a row";
        assert!(because.contains(sentence), "{because}");
        // Three blocks are one group.
        assert_eq!(beside((80, 0), &[(20, 12); 11]), None);
        assert!(beside((80, 0), &[(20, 12); 12]).is_some());
    }

    #[test]
    fn two_bursts_of_fifty_do_not_stop_a_version_that_gets_few_requests() {
        for attempts in [10_u64, 20, 50, 100] {
            let mut blocks = vec![(attempts, 0); 6];
            for _ in 0..2 {
                let mut left = 50;
                while left > 0 {
                    let failed = attempts.min(left);
                    blocks.push((attempts, failed));
                    left -= failed;
                }
                blocks.push((attempts, 0));
            }
            blocks.extend(vec![(attempts, 0); 6]);
            for start in 0..6 {
                for end in start..=blocks.len() {
                    assert_eq!(beside((100, 0), &blocks[start..end]), None, "{attempts} attempts per block");
                }
            }
        }
    }

    #[test]
    fn a_version_that_turns_bad_and_fails_nearly_all_is_stopped_by_its_next_group() {
        let mut blocks = vec![(30, 0); 3];
        blocks.extend([(30, 30), (30, 29)]);
        assert_eq!(beside((30, 0), &blocks), None, "the fourth block belongs to the group of the third");
        blocks.push((30, 29));
        let sentence =
            "58 of its last 60 requests failed (97%), nearly every one, and 0 of 60 of the stable version";
        assert_eq!(beside((30, 0), &blocks).as_deref(), Some(sentence));
        assert_eq!(beside((30, 2), &blocks), None, "7 % of the stable version fail too");
        assert_eq!(beside((14, 0), &blocks), None, "28 attempts at the stable version do not show it");
        blocks.extend([(30, 30); 2]);
        assert!(beside((14, 0), &blocks).is_some());
    }

    #[test]
    fn some_seconds_in_which_a_pod_stands_still_do_not_stop_a_busy_version() {
        assert_eq!(after(&[(1000, 0), (1000, 1000)]), None);
        assert_eq!(after(&[(1000, 0), (1000, 1000), (1000, 200)]), None);
        assert!(after(&[(1000, 0), (1000, 1000), (100, 100)]).is_some());
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
