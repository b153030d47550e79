//! What users request with the annotation `tulle.dev/action`.

use tulle_crds::{CanaryAction, CanaryVerdict, Phase};
use tulle_mesh::event_reason::EventReason;

use super::Evaluation;
use crate::model::WorkloadSeen;

/// Request ids that are remembered.
const USED_IDS: usize = 32;

impl Evaluation<'_> {
    /// Carries out the requested action once: its request id is remembered, also when it does nothing.
    pub(super) fn human(&mut self, target: &WorkloadSeen) {
        let Some(requested) = self.seen.action.clone() else { return };
        let id = requested.id;
        if self.status.last_action == id || self.status.used_actions.contains(&id) {
            return;
        }
        self.status.last_action.clone_from(&id);
        self.status.used_actions.insert(0, id.clone());
        self.status.used_actions.truncate(USED_IDS);
        let what = requested.action.name();
        if let Some(named) = requested.revision.filter(|named| *named != self.status.canary_revision) {
            let present = match self.status.canary_revision.as_str() {
                "" => "no revision is rolled out".to_owned(),
                present => format!("revision {present} is rolled out"),
            };
            return self.ignored(format!("{what}@{id} names revision {named}, but {present}"));
        }
        let on_trial = matches!(self.status.phase, Phase::Progressing | Phase::Paused);
        match requested.action {
            CanaryAction::Promote if on_trial || self.status.phase == Phase::Failed => {
                if self.status.phase == Phase::Failed {
                    // Why it had failed is in the history.
                    self.status.verdict = CanaryVerdict::NotJudged;
                    "promoted by hand after it had failed".clone_into(&mut self.status.evidence_summary);
                }
                self.no_longer_short();
                self.promote("promoted by hand");
            }
            CanaryAction::Abort if on_trial => self.fail("aborted by hand".to_owned()),
            CanaryAction::Abort if self.status.phase == Phase::Promoting => self.abort_promotion(target, &id),
            CanaryAction::Pause if self.status.phase == Phase::Progressing => {
                self.status.paused_by_hand = true;
            }
            // The step goes on, and its hold begins again.
            CanaryAction::Resume if self.status.paused_by_hand && self.status.phase == Phase::Paused => {
                self.resumed();
                self.status.phase = Phase::Progressing;
                self.status.step_started = None;
            }
            CanaryAction::Resume if self.status.phase == Phase::Paused => {
                self.resumed();
                self.status.phase = Phase::Progressing;
                self.next_step("resumed by hand after the last step");
            }
            CanaryAction::Retry if self.is_returning() => self.ignored(format!(
                "retry@{id} does nothing while pods of revision {} are missing: promote@ID goes on with revision {}",
                self.status.approved_revision, self.status.canary_revision
            )),
            // Back at the approved revision there is nothing to try: that is noticed at this look too.
            CanaryAction::Retry
                if self.status.phase == Phase::Failed
                    && target.latest.as_deref() != Some(&*self.status.approved_revision) =>
            {
                let latest = target.latest.clone().unwrap_or_default();
                self.begin(&latest);
                self.event(EventReason::Started, format!("revision {latest} is tried again by hand"));
            }
            _ => self.ignored(format!("{what}@{id} does nothing in phase {:?}", self.status.phase)),
        }
    }

    fn resumed(&mut self) {
        self.resume_clock();
        let (step, revision) = (self.status.step + 1, &self.status.canary_revision);
        let message = format!("revision {revision} goes on after its pause in step {step}");
        self.event(EventReason::Resumed, message);
    }

    /// Back to the former revision, as fast as ready pods of it can take the traffic.
    fn abort_promotion(&mut self, target: &WorkloadSeen, id: &str) {
        let former = self.status.former_revision.clone();
        let serves = target.pods.iter().any(|pod| pod.ready && !pod.terminating && pod.revision == former);
        if former.is_empty() || !serves {
            let message = format!(
                "abort@{id} does nothing: no pod of the former revision is ready; kubectl rollout undo brings it back"
            );
            return self.ignored(message);
        }
        self.status.canary_revision = std::mem::replace(&mut self.status.approved_revision, former);
        self.status.former_revision.clear();
        let status = &self.status;
        let kept = self.kept_by_aborted(&status.canary_revision, &status.approved_revision);
        self.fail_with(kept, "aborted by hand during its promotion".to_owned());
        self.begin_return(target);
    }

    fn ignored(&mut self, message: String) {
        self.event(EventReason::ActionIgnored, message);
    }
}
