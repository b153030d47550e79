//! What the judge decides by: the evidence in a Canary's status, and the block that is running.
//!
//! In: attempts that sidecars have reported, and the Canary. Out: a [`JudgeInput`], and by [`judged`] the evidence with
//! it. The driver lets the machine decide by these two, and the query API and the page show the same two
//! ([`super::answer`]): nobody shows other evidence than what is judged. No clock.
//!
//! Only the replica that leads takes attempts. Another one has no running block, and what it knows of a Canary's evidence is
//! its status.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{Canary, CanaryStatus, Evidence, Phase, parse_duration};

use super::evidence::{Blocks, FailingPod, PodAttempts};
use super::exposure::is_exposed;
use super::judge::{PodBlock, Rules, fold};
use crate::model::Key;
use crate::telemetry::Aggregates;

/// What the judge gets besides the evidence in the status.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JudgeInput {
    /// Attempts since the running block began, by the uid of the pod.
    pub pods: Vec<PodAttempts>,
    /// When the running block began; `None`: none is running.
    pub since: Option<Timestamp>,
    /// The running block is full: it becomes part of the evidence.
    pub block_ended: bool,
    /// The pod of the version on trial that has nearly all of its failures.
    pub failing: Option<FailingPod>,
}

impl JudgeInput {
    /// What has been gathered and is not part of this status yet.
    fn of(gathered: &Gathered, status: &CanaryStatus, now: Timestamp) -> Self {
        if gathered.is_part_of(status) || !is_on_trial(status) {
            return Self::default();
        }
        Self {
            pods: gathered.blocks.running(),
            since: gathered.blocks.since(),
            block_ended: gathered.closing.is_some() || gathered.blocks.has_ended(now),
            failing: gathered.blocks.failing(),
        }
    }

    /// The running block without the names of its pods, as the judge takes it.
    pub fn blocks(&self) -> Vec<PodBlock> {
        self.pods.iter().map(|pod| pod.block.clone()).collect()
    }
}

/// The evidence of a status together with the running block: what the judge decides by.
pub fn judged(status: &CanaryStatus, block: &[PodBlock], rules: &Rules) -> Evidence {
    if !is_exposed(status) {
        return status.evidence.clone();
    }
    fold(&status.evidence, block, rules, is_alone(status))
}

/// Whether the canary is meant to get all requests: there is nothing to compare it with.
pub fn is_alone(status: &CanaryStatus) -> bool {
    status.weight >= 100
}

/// Whether attempts are evidence.
fn is_on_trial(status: &CanaryStatus) -> bool {
    matches!(status.phase, Phase::Progressing | Phase::Paused) && is_exposed(status)
}

/// What was gathered for one Canary.
#[derive(Debug, Default)]
struct Gathered {
    blocks: Blocks,
    /// Epoch and number of blocks of a status that holds the running block and is being written. Until that status is seen, the
    /// block neither grows nor ends: whether a write whose answer was lost has happened is not known before.
    closing: Option<(u64, u64)>,
}

impl Gathered {
    /// Whether the running block is part of the evidence in this status.
    fn is_part_of(&self, status: &CanaryStatus) -> bool {
        self.closing == Some((status.epoch, status.evidence.blocks))
    }
}

/// What the judge gets of each Canary. Filled by the driver, and read by whoever shows it.
#[derive(Debug, Default)]
pub struct JudgeInputs {
    // Locked after the model, where both are.
    gathered: Mutex<HashMap<Key, Gathered>>,
}

impl JudgeInputs {
    /// Takes what was reported for a Canary since the last call, and returns what the judge gets. `ready`: the canary has a
    /// ready pod.
    pub fn take(
        &self,
        aggregates: &Aggregates,
        key: &Key,
        canary: &Canary,
        now: Timestamp,
        ready: bool,
    ) -> JudgeInput {
        let initial = CanaryStatus::default();
        let status = canary.status.as_ref().unwrap_or(&initial);
        let mut all = self.lock();
        let gathered = all.entry(key.clone()).or_default();
        let on_trial = is_on_trial(status);
        if gathered.is_part_of(status) || !on_trial {
            gathered.closing = None;
            gathered.blocks.close(now);
        }
        if gathered.closing.is_none() {
            let counts = aggregates.take_attempts(key);
            if on_trial {
                gathered.blocks.add(now, status, &counts, warm_up(canary), ready);
            }
        }
        JudgeInput::of(gathered, status, now)
    }

    /// The same without taking anything: what the judge got at the last look, unless it is part of the status by now.
    pub fn read(&self, key: &Key, canary: &Canary, now: Timestamp) -> JudgeInput {
        let initial = CanaryStatus::default();
        let status = canary.status.as_ref().unwrap_or(&initial);
        let all = self.lock();
        all.get(key).map_or_else(JudgeInput::default, |gathered| JudgeInput::of(gathered, status, now))
    }

    /// A status is about to be written; `closes`: it is the one that the running block becomes part of.
    pub fn write(&self, key: &Key, closes: Option<&CanaryStatus>) {
        if let Some(gathered) = self.lock().get_mut(key) {
            gathered.closing = closes.map(|status| (status.epoch, status.evidence.blocks));
        }
    }

    /// Forgets Canaries that are not `known`.
    pub fn retain(&self, known: impl Fn(&Key) -> bool) {
        self.lock().retain(|key, _| known(key));
    }

    /// Forgets everything: this replica does not lead.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Gathered>> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long attempts at a new pod are left out.
fn warm_up(canary: &Canary) -> SignedDuration {
    let warm_up = parse_duration(&canary.spec.judge.warm_up).ok();
    let warm_up = warm_up.and_then(|warm_up| SignedDuration::try_from(warm_up).ok());
    warm_up.unwrap_or(SignedDuration::from_secs(10))
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;
    use tulle_mesh::proto::{AttemptCounts, TelemetryReport};

    use super::*;
    use crate::model::tests::canary;
    use crate::rollout::judge::Side;
    use crate::telemetry::Taken;

    /// Canary `shop/web` at 5 %: revision `r2` beside `r1`, with four blocks of evidence and without a warm-up.
    pub(crate) fn in_progress() -> Canary {
        let mut canary = canary(json!({
            "phase": "Progressing", "epoch": 3, "step": 1, "weight": 5, "started": "1970-01-01T00:00:00Z",
            "approvedRevision": "r1", "canaryRevision": "r2", "decidedRevision": "r2",
            "verdict": "Inconclusive", "evidenceSummary": "99 more requests to the canary are needed",
            "evidence": {
                "canary": {"attempts": 100, "failures": 1}, "stable": {"attempts": 900, "failures": 2}, "blocks": 4,
            },
        }));
        canary.spec.judge.warm_up = "0s".to_owned();
        canary
    }

    /// A sidecar reports attempts at pods of `shop/web`: uid and revision of the pod, attempts and failures.
    pub(crate) fn report(aggregates: &Aggregates, sequence: u64, pods: &[(&str, &str, u64, u64)]) {
        let attempts = pods.iter().map(|(uid, revision, attempts, failures)| AttemptCounts {
            namespace: "shop".to_owned(),
            canary: "web".to_owned(),
            epoch: 3,
            revision: (*revision).to_owned(),
            pod_uid: (*uid).to_owned(),
            attempts: *attempts,
            failures: *failures,
            buckets: vec![40, attempts - failures],
            ..AttemptCounts::default()
        });
        let report = TelemetryReport {
            sequence,
            process: 1,
            attempts: attempts.collect(),
            ..TelemetryReport::default()
        };
        assert_eq!(aggregates.add("client", None, &report), Taken::Counted);
    }

    pub(crate) fn key() -> Key {
        ("shop".into(), "web".into())
    }

    pub(crate) fn at(seconds: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_secs(seconds)
    }

    #[test]
    fn reading_takes_nothing_from_the_judge() {
        let (aggregates, inputs, canary) = (Aggregates::default(), JudgeInputs::default(), in_progress());
        assert_eq!(inputs.read(&key(), &canary, at(0)), JudgeInput::default(), "nobody has looked yet");
        report(&aggregates, 1, &[("uid-new", "r2", 20, 3)]);
        let taken = inputs.take(&aggregates, &key(), &canary, at(0), true);
        assert_eq!((taken.since, taken.block_ended), (Some(at(0)), false));
        report(&aggregates, 2, &[("uid-new", "r2", 10, 0), ("uid-old", "r1", 400, 1)]);
        for _ in 0..2 {
            assert_eq!(inputs.read(&key(), &canary, at(1)), taken);
        }
        let taken = inputs.take(&aggregates, &key(), &canary, at(2), true);
        let counts: Vec<_> = taken
            .pods
            .iter()
            .map(|pod| {
                (pod.uid.as_str(), pod.block.side, pod.block.totals.attempts, pod.block.totals.failures)
            })
            .collect();
        assert_eq!(counts, [("uid-new", Side::Canary, 30, 3), ("uid-old", Side::Stable, 400, 1)]);
    }

    #[test]
    fn a_block_that_is_part_of_a_written_status_is_not_counted_again() {
        let (aggregates, inputs, canary) = (Aggregates::default(), JudgeInputs::default(), in_progress());
        report(&aggregates, 1, &[("uid-new", "r2", 20, 3), ("uid-old", "r1", 400, 1)]);
        inputs.take(&aggregates, &key(), &canary, at(0), true);
        let ended = inputs.take(&aggregates, &key(), &canary, at(10), true);
        assert!(ended.block_ended);
        let status = canary.status.as_ref().unwrap();
        let mut evidence = judged(status, &ended.blocks(), &Rules::of(&canary.spec.judge));
        assert_eq!((evidence.canary.attempts, evidence.stable.attempts), (120, 1300));
        evidence.blocks += 1;
        let written = Canary { status: Some(CanaryStatus { evidence, ..status.clone() }), ..canary.clone() };
        inputs.write(&key(), written.status.as_ref());
        assert_eq!(inputs.read(&key(), &canary, at(11)), ended, "the write may fail");
        assert_eq!(inputs.read(&key(), &written, at(11)), JudgeInput::default());
        let next = inputs.take(&aggregates, &key(), &written, at(11), true);
        assert_eq!((next.pods, next.since, next.block_ended), (Vec::new(), Some(at(11)), false));
    }

    #[test]
    fn without_a_rollout_attempts_are_dropped() {
        let (aggregates, inputs) = (Aggregates::default(), JudgeInputs::default());
        let stable = canary(json!({"phase": "Stable", "approvedRevision": "r2", "epoch": 3}));
        report(&aggregates, 1, &[("uid-new", "r2", 20, 3)]);
        assert_eq!(inputs.take(&aggregates, &key(), &stable, at(0), true), JudgeInput::default());
        assert_eq!(aggregates.take_attempts(&key()), []);
    }

    #[test]
    fn a_replica_that_no_longer_leads_forgets_its_blocks() {
        let (aggregates, inputs, canary) = (Aggregates::default(), JudgeInputs::default(), in_progress());
        report(&aggregates, 1, &[("uid-new", "r2", 20, 3)]);
        assert_ne!(inputs.take(&aggregates, &key(), &canary, at(0), true), JudgeInput::default());
        inputs.clear();
        assert_eq!(inputs.read(&key(), &canary, at(0)), JudgeInput::default());
    }
}
