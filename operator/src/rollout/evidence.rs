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
        let pod = self
            .pods
            .entry(count.pod_uid.clone())
            .or_insert(PodHistory { first_attempt: now, all_failed: true });
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
    fn a_new_rollout_starts_with_an_empty_block_and_cold_pods() {
        let mut blocks = Blocks::default();
        blocks.add(at(0), &status(), &[attempts("a", "old", 50, 1)], SignedDuration::ZERO, true);
        let next = CanaryStatus { started: Some(Time(at(5))), ..status() };
        blocks.add(at(6), &next, &[attempts("a", "old", 50, 1)], WARM_UP, true);
        assert_eq!(blocks.running(), []);
    }
}
