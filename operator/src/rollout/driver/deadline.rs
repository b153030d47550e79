//! Keeps a Deployment from being reported as failed while its new pods wait on purpose.
//!
//! The Deployment's controller counts `progressDeadlineSeconds` from the time of condition `Progressing`
//! (`lastUpdateTime`), which it moves itself whenever a pod comes up. Pods behind their gates do not, so the operator
//! moves it: as long as it does, `kubectl rollout status` waits, and kstatus, Helm, Flux and Argo CD see a rollout that
//! is in progress. Nothing of the spec changes, and when the operator is gone the deadline counts again.

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
use crate::rollout::machine::holds_back;

/// The reason of condition `Progressing` while a Canary holds the rollout back.
const HELD: &str = "HeldByCanary";
/// What Kubernetes calls a Deployment whose deadline has passed.
const EXCEEDED: &str = "ProgressDeadlineExceeded";
/// What a Deployment says to have no deadline.
const NO_DEADLINE: u32 = i32::MAX as u32;
/// The time is moved at least so often, so that the message is fresh and a cut of the API server does no harm.
const SELDOM: Duration = Duration::from_secs(600);
/// The time is moved at most so often, however short the deadline is.
const OFTEN: Duration = Duration::from_secs(1);

impl Driver {
    /// Moves the deadline of the target, if the Canary holds it back and it is time to.
    pub(super) async fn hold_deadline(
        &self,
        key: &Key,
        canary: &Canary,
        status: &CanaryStatus,
        target: Option<&WorkloadSeen>,
    ) {
        let Some(target) = target.filter(|target| holds_back(status, target)) else { return };
        let deployment = canary.spec.target.kind == WorkloadKind::Deployment;
        let Some(every) = deployment.then(|| interval(target.progress_deadline)).flatten() else { return };
        {
            let mut known = lock(&self.known);
            let Some(known) = known.get_mut(key) else { return };
            if known.held.is_some_and(|at| at.elapsed() < every) {
                return;
            }
            known.held = Some(Instant::now());
        }
        let Err(error) = self.move_deadline(key, canary, status).await else { return };
        if let Some(kube::Error::Api(answer)) = error.downcast_ref::<kube::Error>()
            && answer.code == 409
        {
            // The Deployment's controller has written meanwhile: the next look tries again.
            if let Some(known) = lock(&self.known).get_mut(key) {
                known.held = None;
            }
            return;
        }
        let name = &canary.spec.target.name;
        tracing::warn!(namespace = %key.0, deployment = name, error = format!("{error:#}"), "cannot hold the deadline");
        let message = format!(
            "cannot hold progressDeadlineSeconds of Deployment {name}, which will be reported as failed after {} s: {error:#}",
            target.progress_deadline
        );
        self.tell(canary, EventReason::DeadlineNotHeld, &message).await.ok();
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

/// How often the time is moved: three times within the deadline; `None`: there is no deadline.
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
    fn the_time_is_moved_three_times_within_the_deadline() {
        assert_eq!(interval(0), None);
        assert_eq!(interval(NO_DEADLINE), None);
        for (deadline, seconds) in [(1, 1), (25, 8), (600, 200), (86_400, 600)] {
            assert_eq!(interval(deadline).unwrap().as_secs(), seconds, "{deadline}");
        }
    }
}
