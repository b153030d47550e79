//! Back from a promotion that was aborted, while few pods of the former revision are left.
//!
//! The former revision gets what its ready pods can carry, and the aborted one keeps the rest until pods of the former one
//! are back: all requests at once would be too many for the pod or two that a late promotion has left. The share follows
//! the pods in both directions. Until the aborted revision gets nothing, the condition says how much that is and why.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tulle_mesh::event_reason::EventReason;

use super::gates::name;
use super::{Action, Evaluation};
use crate::model::WorkloadSeen;

/// The condition of an aborted promotion whose revision still gets requests.
pub(super) const RETURNING: &str = "Returning";

impl Evaluation<'_> {
    /// What the aborted revision keeps for now, in percent.
    pub(super) fn kept_by_aborted(&self, aborted: &str, former: &str) -> u32 {
        100 - self.carried_beside(former, aborted)
    }

    /// Whether an aborted revision still gets requests.
    pub(super) fn is_returning(&self) -> bool {
        self.has_condition(RETURNING, true)
    }

    /// From now on, and until nothing is left with it.
    pub(super) fn begin_return(&mut self, target: &WorkloadSeen) {
        if self.status.weight > 0 {
            self.show_return(target);
            self.shut_spare_gates(target);
        }
    }

    /// The next look at pods that come back.
    pub(super) fn keep_returning(&mut self, target: &WorkloadSeen) {
        let (aborted, former) = (self.status.canary_revision.clone(), self.status.approved_revision.clone());
        let kept = self.kept_by_aborted(&aborted, &former);
        if kept != self.status.weight {
            self.change_weight(kept);
            self.status.step_started = Some(Time(self.seen.now));
        }
        if kept == 0 {
            let message =
                format!("pods of revision {former} carry all requests; revision {aborted} gets none");
            self.event(EventReason::Returned, message.clone());
            return self.condition(RETURNING, false, EventReason::Returned.name(), &message);
        }
        self.show_return(target);
        if self.stable_pods(target).any(|pod| pod.ready) {
            self.shut_spare_gates(target);
        } else {
            self.open_failed(target);
        }
    }

    /// Something else is decided about the revision.
    pub(super) fn no_longer_returning(&mut self, reason: &str, message: &str) {
        if self.is_returning() {
            self.condition(RETURNING, false, reason, message);
        }
    }

    fn show_return(&mut self, target: &WorkloadSeen) {
        let (aborted, former) = (&self.status.canary_revision, &self.status.approved_revision);
        let ready = self.pods_of(target, former).filter(|pod| pod.containers_ready).count();
        let message = format!(
            "revision {aborted} keeps {}% of the requests: {ready} of {} pods of revision {former} are ready; restore its template (kubectl rollout undo) to bring the others back",
            self.status.weight, target.replicas
        );
        self.condition(RETURNING, true, EventReason::TooFewPods.name(), &message);
    }

    /// Clients without a sidecar go to whatever is ready: pods of the aborted revision leave the Services one by one, as
    /// far as so many pods stay ready as the workload wants.
    fn shut_spare_gates(&mut self, target: &WorkloadSeen) {
        let ready =
            self.stable_pods(target).chain(self.pods_on_trial(target)).filter(|pod| pod.ready).count();
        let spare = ready.saturating_sub(target.replicas as usize);
        let opened = self.pods_on_trial(target).filter(|pod| pod.opened && pod.ready).take(spare);
        let shut: Vec<Action> = opened.map(|pod| Action::ShutGate(name(pod))).collect();
        self.actions.extend(shut);
    }
}
