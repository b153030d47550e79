//! How rollouts end: promoted, failed.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{CanarySteering, CanaryVerdict, OnFailure, Phase, RolloutOutcome};
use tulle_mesh::event_reason::EventReason;

use super::steps::{duration, sticky};
use super::{Action, Evaluation};
use crate::model::WorkloadSeen;
use crate::rollout::exposure;

/// Pods change this long after traffic was taken away, even though a client has not acknowledged it: one client
/// must not keep a bad version running.
const UNACKNOWLEDGED: SignedDuration = SignedDuration::from_secs(30);
/// Approved revisions that are remembered.
const APPROVED_BEFORE: usize = 10;

impl Evaluation<'_> {
    pub(super) fn promote(&mut self, because: &str) {
        self.approve(EventReason::Promoted, because);
    }

    /// The revision on trial is approved from now on. It keeps the share that it had, or gets more where more of its
    /// pods are ready, and grows from there: nobody who was given it is sent back while pods are replaced, see
    /// [`Self::follow_pods`].
    pub(super) fn approve(&mut self, event: EventReason, because: &str) {
        self.resume_clock();
        self.no_longer_late();
        self.status.phase = Phase::Promoting;
        let has_stand_in = self.has_stand_in();
        let former = std::mem::take(&mut self.status.approved_revision);
        let approved = self.status.canary_revision.clone();
        self.status.approved_before.retain(|before| *before != former && *before != approved);
        if !former.is_empty() {
            self.status.approved_before.insert(0, former.clone());
            self.status.approved_before.truncate(APPROVED_BEFORE);
        }
        // What serves in place of the former revision does so until it is replaced.
        if !has_stand_in {
            self.status.former_revision = former;
        }
        self.status.failed_revision.clear();
        self.serves_no_more(EventReason::Promoted.name());
        self.no_longer_returning(EventReason::Promoted.name(), "the revision is promoted after all");
        let weight = self.carried_by(&approved).max(self.status.weight);
        let kept = self.status.steering.clone().unwrap_or_default();
        self.expose(weight, Some(CanarySteering { mirror: 0, sticky: sticky(self.spec), ..kept }));
        self.status.step_started = Some(Time(self.seen.now));
        because.clone_into(&mut self.status.promoted_because);
        let message = match event {
            EventReason::Approved => because.to_owned(),
            _ => format!("revision {approved} is approved: {because}"),
        };
        self.status.approved_revision = approved;
        self.event(event, message);
    }

    pub(super) fn promoting(&mut self, target: &WorkloadSeen) {
        let approved = self.status.approved_revision.clone();
        // A pod of a node that is lost ends for as long as the node is: that holds nobody up.
        let pods: Vec<_> = target.pods.iter().filter(|pod| !pod.terminating).collect();
        let done = pods.iter().all(|pod| pod.revision == approved && pod.ready);
        if done && pods.len() >= target.replicas as usize {
            let because = match self.status.promoted_because.as_str() {
                // An earlier operator has begun the promotion.
                "" => self.status.evidence_summary.clone(),
                because => because.to_owned(),
            };
            self.remember(RolloutOutcome::Promoted, &because);
            self.at_rest();
            self.status.former_revision.clear();
            self.condition(
                "Promoted",
                true,
                EventReason::Promoted.name(),
                &format!("every pod is of revision {approved}"),
            );
            self.no_longer_stalled(EventReason::Promoted.name(), "every pod has been replaced");
        } else if self.elapsed(self.status.step_started.as_ref()) > duration(&self.spec.deadline) {
            // It is approved, and all traffic may go to it; what is left is its controller's to do.
            let of_it = target.pods.iter().filter(|pod| pod.revision == approved && pod.ready).count();
            let because = format!(
                "{of_it} of {} pods are ready with revision {approved} after {}: see kubectl describe of the target",
                target.replicas, self.spec.deadline
            );
            self.remember(RolloutOutcome::PromotionStalled, &because);
            self.at_rest();
            self.status.step_started = None;
            self.condition("Stalled", true, EventReason::PromotionStalled.name(), &because);
            self.event(EventReason::PromotionStalled, because);
        } else {
            self.follow_pods(target);
        }
    }

    /// While a version is promoted, its share follows its ready pods: users move to it and none back. A pod that restarts
    /// changes nothing. But where more than one of its pods is lost, those that are left would get the requests of all, so
    /// the share falls to what they can carry, at the price that users are sent back.
    fn follow_pods(&mut self, target: &WorkloadSeen) {
        // Without a steering the promotion was begun by an operator that sent no shares during one, and the weight says
        // nothing of pods.
        if self.status.steering.is_none() {
            return;
        }
        let (approved, former) = (self.status.approved_revision.clone(), self.status.former_revision.clone());
        let weight = self.carried_by(&approved);
        if weight > self.status.weight {
            return self.share_of_promoted(weight);
        }
        // A last step may set a share that one pod is missing for.
        let one_pod = 100u32.div_ceil(target.replicas.max(1));
        let fallen = self.carried_beside(&approved, &former);
        let is_served = self.pods_of(target, &former).any(|pod| pod.containers_ready);
        if is_served && self.status.weight > (weight + one_pod).max(fallen) {
            let message = format!(
                "pods of revision {approved} were lost: its share falls from {}% to {fallen}%, and users are sent back to revision {former}",
                self.status.weight
            );
            self.event(EventReason::PodsLost, message);
            self.share_of_promoted(fallen);
        }
    }

    fn share_of_promoted(&mut self, weight: u32) {
        self.status.weight = weight;
        self.status.epoch += 1;
    }

    /// What the ready pods of a revision can carry beside another one, in percent. Where those of both are too few, all
    /// share alike.
    pub(super) fn carried_beside(&self, revision: &str, other: &str) -> u32 {
        let Some(target) = &self.seen.target else { return 0 };
        let ready = |of: &str| self.pods_of(target, of).filter(|pod| pod.containers_ready).count();
        let its = ready(revision);
        let share = (100 * its).checked_div(its + ready(other)).unwrap_or(0);
        self.carried_by(revision).max(u32::try_from(share).unwrap_or(100))
    }

    /// The share of the traffic that the ready pods of a revision can carry, in percent.
    fn carried_by(&self, revision: &str) -> u32 {
        let Some(target) = &self.seen.target else { return 0 };
        let ready = self.pods_of(target, revision).filter(|pod| pod.containers_ready).count();
        let share = (100 * ready).checked_div(target.replicas as usize).unwrap_or(100);
        u32::try_from(share).unwrap_or(100).min(100)
    }

    fn at_rest(&mut self) {
        self.status.phase = Phase::Stable;
        self.status.weight = 0;
        self.status.steering = None;
        self.nothing_acknowledged();
        self.status.canary_revision.clear();
    }

    /// A former revision without pods is nobody's, and one that has failed serves as long as it has some.
    pub(super) fn forget_former(&mut self, target: &WorkloadSeen) {
        if self.status.former_revision.is_empty() {
            return self.serves_no_more(EventReason::Restored.name());
        }
        if !target.pods.iter().any(|pod| pod.revision == self.status.former_revision) {
            self.status.former_revision.clear();
            self.serves_no_more(EventReason::Restored.name());
            self.no_longer_stalled(EventReason::Promoted.name(), "every pod has been replaced");
        }
    }

    pub(super) fn fail(&mut self, because: String) {
        self.fail_with(0, because);
    }

    /// The same with a share that the revision keeps for now.
    pub(super) fn fail_with(&mut self, kept: u32, because: String) {
        self.resume_clock();
        self.no_longer_late();
        self.status.phase = Phase::Failed;
        // Some sidecars may have it already: until all have said otherwise, it counts as there.
        self.status.acknowledged_weight = self.status.acknowledged_weight.max(self.status.weight);
        let steering = self.status.steering.as_ref().filter(|steering| exposure::sends(steering));
        if let Some(steering) = steering {
            self.status.acknowledged_steering = Some(steering.clone());
        }
        self.change_weight(kept);
        self.status.step_started = Some(Time(self.seen.now));
        let failed = self.status.canary_revision.clone();
        self.status.approved_before.retain(|before| *before != failed);
        self.remember(RolloutOutcome::Failed, &because);
        self.condition("Promoted", false, EventReason::Failed.name(), &because);
        // Also where something else than the judge has decided so.
        self.status.verdict = CanaryVerdict::Fail;
        // The column EVIDENCE is where users look first, and what was missing for a verdict is missing no more.
        self.status.evidence_summary.clone_from(&because);
        let what = match kept {
            0 => "gets no traffic".to_owned(),
            kept => format!("keeps {kept}% of the traffic until other pods can carry it"),
        };
        self.event(EventReason::Failed, format!("revision {failed} {what}: {because}"));
        self.status.failed_revision = failed;
    }

    /// Whether a revision failed, and nobody has decided otherwise since.
    pub(super) fn failed_before(&self, revision: &str) -> bool {
        let last = self.status.history.iter().find(|entry| entry.revision == revision);
        self.status.failed_revision == revision
            || last.is_some_and(|entry| entry.outcome == RolloutOutcome::Failed)
    }

    /// Traffic is taken away first and acknowledged, or sidecars have had long enough; only then do pods change.
    pub(super) fn failed(&mut self, target: &WorkloadSeen) {
        let serves = self.status.weight > 0;
        let since = self.status.step_started.as_ref();
        let long_enough = since.is_some() && self.elapsed(since) >= UNACKNOWLEDGED;
        if !self.acknowledged && !long_enough && !serves {
            return;
        }
        if !serves {
            self.shut_gates(target);
        }
        if self.spec.on_failure == OnFailure::Undo && self.status.verdict != CanaryVerdict::FailedBefore {
            self.actions.push(Action::Undo { revision: self.status.approved_revision.clone() });
        }
    }

    /// Whoever asked for Undo is told before anything fails that the operator may not do it.
    pub(super) fn show_undo(&mut self) {
        if self.spec.on_failure != OnFailure::Undo || !self.seen.undo_forbidden {
            return self.drop_condition("Undo");
        }
        let name = &self.spec.target.name;
        let message = format!(
            "the operator may not change Deployments: apply config/overlays/undo, or undo by hand: kubectl rollout undo deployment/{name}"
        );
        self.condition("Undo", false, "NotPermitted", &message);
    }
}
