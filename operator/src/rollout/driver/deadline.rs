//! Keeps a Deployment from being reported as failed while its new pods wait on purpose.
//!
//! The Deployment's controller counts `progressDeadlineSeconds` from the time of condition `Progressing`
//! (`lastUpdateTime`), which it moves itself whenever a pod comes up. Pods behind their gates do not, so the operator
//! moves it: as long as it does, `kubectl rollout status` waits, and kstatus, Helm, Flux and Argo CD see a rollout that
//! is in progress. Nothing of the spec changes, and when the operator is gone the deadline counts again.
//!
//! While a pod of the new version is not ready or is missing, the operator does not move the time, so a pod that cannot
//! start is reported after the deadline as without a Canary. As there, a pod that becomes ready is progress: it moves the
//! time once. Kubernetes does not see that by itself, because a pod behind its gate is not ready to it.

use std::time::Duration;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::Instant;
use tulle_crds::{Canary, CanaryStatus, WorkloadKind};
use tulle_mesh::event_reason::EventReason;

use super::{Driver, lock};
use crate::model::{Key, WorkloadSeen};
use crate::rollout::machine::{OnTrial, on_trial};

/// The reason of condition `Progressing` while a Canary holds the rollout back.
const HELD: &str = "HeldByCanary";
/// What Kubernetes calls a Deployment whose deadline has passed.
const EXCEEDED: &str = "ProgressDeadlineExceeded";
/// What a Deployment says to have no deadline.
const NO_DEADLINE: u32 = i32::MAX as u32;
/// The time is moved at least so often: a deadline that is lowered meanwhile counts from the last move, and what the
/// Deployment's controller writes has a reason that says nothing of the Canary. Two requests for each Canary on trial.
const SELDOM: Duration = Duration::from_secs(20);
/// The time is moved at most so often, however short the deadline is.
const OFTEN: Duration = Duration::from_secs(1);
/// Failures in a row that are reported, if the API server does not refuse the change itself: within a short deadline there
/// is no time for more.
const FAILURES: u32 = 3;

impl Driver {
    /// Moves the deadline of the target, if the Canary holds it back and it is time to.
    pub(super) async fn hold_deadline(
        &self,
        key: &Key,
        canary: &Canary,
        status: &CanaryStatus,
        target: Option<&WorkloadSeen>,
    ) {
        let Some(target) = target else { return };
        let Some(trial) = on_trial(status, target) else {
            if let Some(known) = lock(&self.known).get_mut(key) {
                known.ready_on_trial = None;
            }
            return;
        };
        let deployment = canary.spec.target.kind == WorkloadKind::Deployment;
        let Some(every) = deployment.then(|| interval(target.progress_deadline)).flatten() else { return };
        let before = {
            let mut known = lock(&self.known);
            let Some(known) = known.get_mut(key) else { return };
            let before = known.ready_on_trial.replace(trial.ready);
            let is_time = known.held.is_none_or(|at| at.elapsed() >= every);
            if !is_moved(trial, before, is_time) {
                return;
            }
            known.held = Some(Instant::now());
            before
        };
        let moved = self.move_deadline(key, canary, status).await;
        let failures = {
            let mut known = lock(&self.known);
            let Some(known) = known.get_mut(key) else { return };
            if moved.as_ref().is_err_and(is_conflict) {
                // The Deployment's controller has written meanwhile: the next look tries again.
                (known.held, known.ready_on_trial) = (None, before);
                return;
            }
            known.not_held = if moved.is_ok() { 0 } else { known.not_held.saturating_add(1) };
            known.not_held
        };
        let Err(error) = moved else { return };
        let name = &canary.spec.target.name;
        tracing::warn!(namespace = %key.0, deployment = name, error = format!("{error:#}"), "cannot hold the deadline");
        if failures < FAILURES && !is_refused(&error) {
            return;
        }
        let message = format!(
            "cannot hold progressDeadlineSeconds of Deployment {name}, which will be reported as failed after {} s: {error:#}",
            target.progress_deadline
        );
        self.tell(canary, status, EventReason::DeadlineNotHeld, &message).await.ok();
    }

    async fn move_deadline(&self, key: &Key, canary: &Canary, status: &CanaryStatus) -> anyhow::Result<()> {
        let api = Api::<Deployment>::namespaced(self.client.clone(), &key.0);
        let deployment = api.get_status(&canary.spec.target.name).await?;
        let message = format!(
            "Canary {} holds back revision {} on purpose: see kubectl describe canary {}",
            key.1, status.canary_revision, key.1
        );
        if let Some(patch) = held(&deployment, &message, Timestamp::now()) {
            // Strategic: conditions are merged by type.
            let params = PatchParams::default();
            api.patch_status(&canary.spec.target.name, &params, &Patch::Strategic(&patch)).await?;
        }
        Ok(())
    }
}

/// The status with which the API server has answered.
fn answered(error: &anyhow::Error) -> Option<u16> {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(answer)) => Some(answer.code),
        _ => None,
    }
}

fn is_conflict(error: &anyhow::Error) -> bool {
    answered(error) == Some(409)
}

/// Whether the next attempt would be answered alike: the operator may not, or a policy rejects what it writes.
fn is_refused(error: &anyhow::Error) -> bool {
    answered(error).is_some_and(|code| matches!(code, 400 | 401 | 403 | 422))
}

/// Whether the time is moved. `before`: how many pods could serve at the last look; `is_time`: the last move is old enough.
fn is_moved(trial: OnTrial, before: Option<usize>, is_time: bool) -> bool {
    let progress = before.is_some_and(|before| trial.ready > before);
    progress || (trial.is_held_back && is_time)
}

/// How often the time is moved: at least three times within the deadline; `None`: there is no deadline.
fn interval(deadline: u32) -> Option<Duration> {
    let deadline = Some(deadline).filter(|deadline| (1..NO_DEADLINE).contains(deadline))?;
    Some((Duration::from_secs(deadline.into()) / 3).clamp(OFTEN, SELDOM))
}

/// The change of a Deployment's status by which its deadline counts from now on; `None` if its controller has not
/// seen the newest template, or has no rollout in progress.
fn held(deployment: &Deployment, message: &str, now: Timestamp) -> Option<Value> {
    let status = deployment.status.as_ref()?;
    let observed = status.observed_generation == deployment.metadata.generation;
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let progressing = conditions.iter().find(|condition| condition.type_ == "Progressing")?;
    let at_rest =
        ["NewReplicaSetAvailable", "DeploymentPaused"].iter().any(|end| has_reason(progressing, end));
    let failed = progressing.status == "False" && !has_reason(progressing, EXCEEDED);
    if !observed || at_rest || failed {
        return None;
    }
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let mut condition = json!({
        "type": "Progressing", "status": "True", "reason": HELD, "message": message, "lastUpdateTime": now,
    });
    if progressing.status != "True"
        && let Some(condition) = condition.as_object_mut()
    {
        condition.insert("lastTransitionTime".to_owned(), json!(now));
    }
    // The version is a precondition: what the controller has written since is not overwritten.
    let version = &deployment.metadata.resource_version;
    Some(json!({"metadata": {"resourceVersion": version}, "status": {"conditions": [condition]}}))
}

fn has_reason(condition: &DeploymentCondition, reason: &str) -> bool {
    condition.reason.as_deref() == Some(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(generation: u64, status: &str, reason: &str) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "generation": 4, "resourceVersion": "77"},
            "status": {"observedGeneration": generation, "conditions": [
                {"type": "Available", "status": "True"},
                {"type": "Progressing", "status": status, "reason": reason, "lastUpdateTime": "2026-01-01T00:00:00Z"},
            ]},
        }))
        .unwrap()
    }

    fn condition(deployment: &Deployment) -> Option<Value> {
        let now: Timestamp = "2026-01-01T00:05:00Z".parse().unwrap();
        let patch = held(deployment, "why", now)?;
        assert_eq!(patch["metadata"], json!({"resourceVersion": "77"}));
        assert_eq!(patch["status"]["conditions"].as_array().unwrap().len(), 1);
        Some(patch["status"]["conditions"][0].clone())
    }

    #[test]
    fn the_deadline_of_a_rollout_in_progress_counts_from_now() {
        for reason in ["ReplicaSetUpdated", "NewReplicaSetCreated", HELD] {
            assert_eq!(
                condition(&deployment(4, "True", reason)),
                Some(json!({
                    "type": "Progressing", "status": "True", "reason": "HeldByCanary", "message": "why",
                    "lastUpdateTime": "2026-01-01T00:05:00Z",
                }))
            );
        }
    }

    #[test]
    fn a_deadline_that_passed_while_no_operator_held_it_is_taken_back() {
        let condition = condition(&deployment(4, "False", "ProgressDeadlineExceeded")).unwrap();
        assert_eq!((&condition["status"], &condition["reason"]), (&json!("True"), &json!("HeldByCanary")));
        assert_eq!(condition["lastTransitionTime"], "2026-01-01T00:05:00Z");
    }

    #[test]
    fn a_deployment_that_was_paused_by_hand_is_held_again_when_it_goes_on() {
        assert!(condition(&deployment(4, "Unknown", "DeploymentPaused")).is_none());
        assert_eq!(condition(&deployment(4, "Unknown", "DeploymentResumed")).unwrap()["status"], "True");
    }

    #[test]
    fn what_has_ended_or_is_not_seen_yet_is_left_alone() {
        for (generation, status, reason) in [
            (4, "True", "NewReplicaSetAvailable"),
            (3, "True", "ReplicaSetUpdated"),
            (4, "False", "ReplicaSetCreateError"),
        ] {
            assert_eq!(condition(&deployment(generation, status, reason)), None, "{status} {reason}");
        }
        assert_eq!(condition(&Deployment::default()), None);
    }

    #[test]
    fn a_pod_that_becomes_ready_moves_the_time_and_one_that_does_not_lets_the_deadline_run() {
        let held = |ready| OnTrial { ready, is_held_back: true };
        let starting = |ready| OnTrial { ready, is_held_back: false };
        assert!(is_moved(held(1), Some(1), true) && !is_moved(held(1), Some(1), false));
        assert!(is_moved(starting(2), Some(1), false), "as where Kubernetes sees it");
        for before in [Some(1), Some(2), None] {
            assert!(!is_moved(starting(1), before, true), "it would never be reported: {before:?}");
        }
    }

    #[test]
    fn an_api_server_that_is_away_for_a_moment_refuses_nothing() {
        let answer = |code: u16| {
            let status = kube::core::Status::failure("why", "Reason").with_code(code);
            anyhow::Error::from(kube::Error::Api(Box::new(status)))
        };
        assert!(is_conflict(&answer(409)) && !is_refused(&answer(409)));
        assert!(is_refused(&answer(403)) && is_refused(&answer(422)));
        for code in [404, 429, 500, 503] {
            assert!(!is_refused(&answer(code)) && !is_conflict(&answer(code)), "{code}");
        }
        assert!(!is_refused(&anyhow::anyhow!("connection refused")));
    }

    #[test]
    fn the_time_is_moved_three_times_within_the_deadline_and_every_twenty_seconds() {
        assert_eq!(interval(0), None);
        assert_eq!(interval(NO_DEADLINE), None);
        for (deadline, seconds) in [(1, 1), (25, 8), (60, 20), (600, 20), (86_400, 20)] {
            assert_eq!(interval(deadline).unwrap().as_secs(), seconds, "{deadline}");
        }
    }
}
