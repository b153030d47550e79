//! Attempts at the pods of both versions, collected in blocks of ten seconds. No clock, no I/O.
//!
//! A burst of failures at one pod within one block is one event for the judge, so what it gets is a block by pod
//! and not one sum.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{AttemptTotals, CanaryStatus};
use tulle_mesh::proto::AttemptCounts;

use super::judge::{PodBlock, Side};

/// Length of a block.
const BLOCK: SignedDuration = SignedDuration::from_secs(10);
/// A pod that answers nothing but failures for longer than this does not just start.
const AWAKE: SignedDuration = SignedDuration::from_secs(5);
/// A pod with fewer failures than this is not named.
const TELLING: u64 = 5;
/// Pods that a block holds at most.
const MOST_PODS: usize = 10_000;

/// The attempts at one Canary's pods.
#[derive(Debug, Default)]
pub struct Blocks {
    /// When the rollout started that the pods below belong to.
    rollout: Option<Timestamp>,
    /// What is known of each pod since the rollout started.
    pods: HashMap<String, PodHistory>,
    /// The running block by the uid of the pod, and since when it runs.
    running: BTreeMap<String, PodAttempts>,
    since: Option<Timestamp>,
}

/// Attempts at one pod in the running block.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodAttempts {
    /// The uid of the pod.
    pub uid: String,
    /// Its revision.
    pub revision: String,
    /// What the judge gets of it.
    pub block: PodBlock,
}

#[derive(Debug)]
struct PodHistory {
    first_attempt: Timestamp,
    /// No attempt at it has succeeded.
    all_failed: bool,
    /// It is of the version on trial.
    on_trial: bool,
    /// Attempts at it that are evidence, as long as this replica has led.
    attempts: u64,
    /// How many of those attempts failed.
    failures: u64,
}

/// A pod of the version on trial that has nearly all failures of the version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailingPod {
    /// Its uid.
    pub uid: String,
    /// Attempts at it.
    pub attempts: u64,
    /// How many of those attempts failed.
    pub failures: u64,
    /// Attempts at the other pods of the version.
    pub other_attempts: u64,
    /// How many of those attempts failed.
    pub other_failures: u64,
}

impl FailingPod {
    /// Whether it fails most of its own requests, and the others together fail nearly none.
    fn stands_out(&self) -> bool {
        self.failures >= TELLING
            && self.failures.saturating_mul(2) > self.attempts
            && self.other_attempts > 0
            && self.failures / 10 >= self.other_failures
    }
}

impl PodHistory {
    fn new(first_attempt: Timestamp) -> Self {
        Self { first_attempt, all_failed: true, on_trial: false, attempts: 0, failures: 0 }
    }
}

impl Blocks {
    /// Adds what was reported since the last call. `ready`: the canary has a ready pod.
    pub fn add(
        &mut self,
        now: Timestamp,
        status: &CanaryStatus,
        counts: &[AttemptCounts],
        warm_up: SignedDuration,
        ready: bool,
    ) {
        let rollout = status.started.as_ref().map(|started| started.0);
        if rollout != self.rollout {
            *self = Self { rollout, ..Self::default() };
        }
        self.since.get_or_insert(now);
        for count in counts.iter().filter(|count| count.epoch == status.epoch) {
            let Some(side) = side(status, &count.revision) else { continue };
            if !self.pods.contains_key(&count.pod_uid) && self.pods.len() >= MOST_PODS {
                continue;
            }
            let Some(counted) = self.after_warm_up(now, count, warm_up) else { continue };
            // Seconds in which the canary had no endpoint count for neither version. What was attempted at the
            // canary just before it lost its last pod is evidence all the same.
            if side == Side::Stable && !ready {
                continue;
            }
            if let Some(history) = self.pods.get_mut(&count.pod_uid) {
                history.on_trial = side == Side::Canary;
                history.attempts = history.attempts.saturating_add(counted.attempts);
                history.failures = history.failures.saturating_add(counted.failures);
            }
            let pod = self.running.entry(count.pod_uid.clone()).or_default();
            pod.uid.clone_from(&count.pod_uid);
            pod.revision.clone_from(&count.revision);
            pod.block.side = side;
            add(&mut pod.block, &counted);
        }
    }

    /// What of these counts is evidence. The first requests to a new pod meet cold caches, so they are left out.
    /// While every attempt at the pod has failed, though, failures that the application itself answered count after
    /// five seconds: a version that is dead on arrival must not be protected by its warm-up. Attempts that did not
    /// reach the application stay out, because a pod that just starts or ends refuses connections.
    fn after_warm_up(
        &mut self,
        now: Timestamp,
        count: &AttemptCounts,
        warm_up: SignedDuration,
    ) -> Option<AttemptCounts> {
        let pod = self.pods.entry(count.pod_uid.clone()).or_insert_with(|| PodHistory::new(now));
        pod.all_failed &= count.failures >= count.attempts;
        if now.duration_since(pod.first_attempt) >= warm_up {
            return Some(count.clone());
        }
        let answered = count.failures.saturating_sub(count.unreached);
        // Not those of its first seconds, in which many a server answers 503.
        let awake = now.duration_since(pod.first_attempt) >= AWAKE;
        (awake && pod.all_failed && answered > 0).then(|| AttemptCounts {
            attempts: answered,
            failures: answered,
            unreached: 0,
            client_errors: 0,
            buckets: Vec::new(),
            ..count.clone()
        })
    }

    /// The pod of the version on trial that has nearly all of its failures since the rollout started.
    pub fn failing(&self) -> Option<FailingPod> {
        let on_trial = || self.pods.iter().filter(|(_, pod)| pod.on_trial);
        let (uid, worst) = on_trial().max_by_key(|(uid, pod)| (pod.failures, *uid))?;
        let (attempts, failures) = on_trial().fold((0_u64, 0_u64), |(attempts, failures), (_, pod)| {
            (attempts.saturating_add(pod.attempts), failures.saturating_add(pod.failures))
        });
        let failing = FailingPod {
            uid: uid.clone(),
            attempts: worst.attempts,
            failures: worst.failures,
            other_attempts: attempts.saturating_sub(worst.attempts),
            other_failures: failures.saturating_sub(worst.failures),
        };
        failing.stands_out().then_some(failing)
    }

    /// All since the running block began, by the uid of the pod.
    pub fn running(&self) -> Vec<PodAttempts> {
        self.running.values().cloned().collect()
    }

    /// When the running block began.
    pub fn since(&self) -> Option<Timestamp> {
        self.since
    }

    /// Whether the running block is full.
    pub fn has_ended(&self, now: Timestamp) -> bool {
        self.since.is_some_and(|since| now.duration_since(since) >= BLOCK)
    }

    /// The running block is part of the written status: the next one begins.
    pub fn close(&mut self, now: Timestamp) {
        self.running.clear();
        self.since = Some(now);
    }
}

/// The version that a revision belongs to; `None`: neither.
fn side(status: &CanaryStatus, revision: &str) -> Option<Side> {
    if revision.is_empty() {
        None
    } else if revision == status.canary_revision {
        Some(Side::Canary)
    } else if revision == status.approved_revision || revision == status.former_revision {
        Some(Side::Stable)
    } else {
        None
    }
}

fn add(block: &mut PodBlock, count: &AttemptCounts) {
    let totals = &mut block.totals;
    *totals = AttemptTotals {
        attempts: totals.attempts.saturating_add(count.attempts),
        failures: totals.failures.saturating_add(count.failures),
        unreached: totals.unreached.saturating_add(count.unreached),
        client_errors: totals.client_errors.saturating_add(count.client_errors),
    };
    for pair in count.buckets.chunks_exact(2) {
        if let [bucket, count] = pair {
            block.latency.add(usize::try_from(*bucket).unwrap_or(usize::MAX), *count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    const WARM_UP: SignedDuration = SignedDuration::from_secs(10);

    fn status() -> CanaryStatus {
        CanaryStatus {
            epoch: 3,
            canary_revision: "new".to_owned(),
            approved_revision: "old".to_owned(),
            started: Some(Time(Timestamp::UNIX_EPOCH)),
            ..CanaryStatus::default()
        }
    }

    fn attempts(pod: &str, revision: &str, attempts: u64, failures: u64) -> AttemptCounts {
        AttemptCounts {
            epoch: 3,
            revision: revision.to_owned(),
            pod_uid: pod.to_owned(),
            attempts,
            failures,
            ..AttemptCounts::default()
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
    }

    fn counted(blocks: &Blocks, side: Side) -> (u64, u64) {
        let running = blocks.running();
        let of = running.iter().map(|pod| &pod.block).filter(|block| block.side == side);
        of.fold((0, 0), |sum, block| (sum.0 + block.totals.attempts, sum.1 + block.totals.failures))
    }

    #[test]
    fn counts_of_another_epoch_or_another_revision_are_no_evidence() {
        let mut blocks = Blocks::default();
        let counts = [
            AttemptCounts { epoch: 2, ..attempts("a", "new", 5, 5) },
            attempts("b", "older", 5, 5),
            attempts("c", "", 5, 5),
            attempts("d", "old", 7, 0),
            attempts("e", "new", 1, 0),
        ];
        blocks.add(at(0), &status(), &counts, SignedDuration::ZERO, true);
        assert_eq!(counted(&blocks, Side::Canary), (1, 0));
        assert_eq!(counted(&blocks, Side::Stable), (7, 0));
    }

    #[test]
    fn a_new_pod_is_warm_after_its_warm_up_and_a_dead_one_counts_after_five_seconds() {
        let mut blocks = Blocks::default();
        let counts = [attempts("cold", "new", 10, 4), attempts("dead", "new", 10, 10)];
        blocks.add(at(0), &status(), &counts, WARM_UP, true);
        assert_eq!(counted(&blocks, Side::Canary), (0, 0), "many a server answers 503 while it starts");
        blocks.add(at(5), &status(), &counts, WARM_UP, true);
        assert_eq!(
            counted(&blocks, Side::Canary),
            (10, 10),
            "only those of the pod that answers nothing else"
        );
        blocks.add(at(10), &status(), &counts, WARM_UP, true);
        assert_eq!(counted(&blocks, Side::Canary), (30, 24));
    }

    #[test]
    fn connections_that_a_starting_pod_refuses_are_part_of_its_warm_up() {
        let mut blocks = Blocks::default();
        let refused = AttemptCounts { unreached: 10, ..attempts("a", "new", 10, 10) };
        blocks.add(at(0), &status(), &[refused], WARM_UP, true);
        assert_eq!(counted(&blocks, Side::Canary), (0, 0));
    }

    #[test]
    fn seconds_without_an_endpoint_of_the_canary_count_for_neither_version() {
        let mut blocks = Blocks::default();
        blocks.add(at(0), &status(), &[attempts("a", "old", 50, 1)], SignedDuration::ZERO, false);
        assert_eq!(counted(&blocks, Side::Stable), (0, 0));
    }

    #[test]
    fn a_block_ends_after_ten_seconds_and_only_once_it_is_written() {
        let mut blocks = Blocks::default();
        blocks.add(at(0), &status(), &[attempts("a", "old", 50, 1)], SignedDuration::ZERO, true);
        assert!(!blocks.has_ended(at(9)));
        assert!(blocks.has_ended(at(10)));
        blocks.add(at(11), &status(), &[attempts("a", "old", 50, 1)], SignedDuration::ZERO, true);
        assert_eq!(counted(&blocks, Side::Stable), (100, 2));
        blocks.close(at(11));
        assert_eq!(blocks.running(), []);
        assert!(!blocks.has_ended(at(12)));
    }

    #[test]
    fn a_pod_with_nearly_all_failures_of_the_version_is_named() {
        let failing = |pods: &[(&str, &str, u64, u64)]| {
            let mut blocks = Blocks::default();
            let counts = pods.iter().map(|(uid, of, all, bad)| attempts(uid, of, *all, *bad));
            let counts: Vec<AttemptCounts> = counts.collect();
            blocks.add(at(0), &status(), &counts, SignedDuration::ZERO, true);
            blocks.close(at(10));
            blocks.failing()
        };
        let good = ("a", "new", 1240, 0);
        let bad = FailingPod {
            uid: "b".to_owned(),
            attempts: 12,
            failures: 12,
            other_attempts: 1240,
            other_failures: 0,
        };
        assert_eq!(failing(&[good, ("b", "new", 12, 12), ("c", "old", 1000, 0)]), Some(bad));
        assert_eq!(failing(&[good, ("b", "new", 4, 4)]), None, "too few to name it");
        assert_eq!(
            failing(&[("b", "new", 12, 12), ("c", "old", 1000, 0)]),
            None,
            "one pod alone is not compared"
        );
        assert_eq!(failing(&[("a", "new", 1240, 9), ("b", "new", 12, 12)]), None, "the others fail too");
        assert_eq!(failing(&[good, ("b", "new", 1000, 12)]), None, "most of its requests succeed");
        assert_eq!(failing(&[good, ("c", "old", 12, 12)]), None, "it is of the stable version");
    }

    #[test]
    fn a_new_rollout_starts_with_an_empty_block_and_cold_pods() {
        let mut blocks = Blocks::default();
        blocks.add(at(0), &status(), &[attempts("a", "old", 50, 1)], SignedDuration::ZERO, true);
        let next = CanaryStatus { started: Some(Time(at(5))), ..status() };
        blocks.add(at(6), &next, &[attempts("a", "old", 50, 1)], WARM_UP, true);
        assert_eq!(blocks.running(), []);
    }
}
