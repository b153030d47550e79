//! The deadline of the rollout. That of the Deployment is held by the driver (`driver/deadline.rs`).

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{OnInconclusive, Phase};
use tulle_mesh::event_reason::EventReason;

use super::Evaluation;
use super::steps::duration;
use crate::model::WorkloadSeen;
use crate::rollout::judge::Verdict;

/// The condition of a rollout that is undecided at its deadline.
pub(super) const LATE: &str = EventReason::DeadlineExceeded.name();

impl Evaluation<'_> {
    /// The clock of the deadline stops.
    pub(super) fn pause_clock(&mut self) {
        self.status.paused_since.get_or_insert(Time(self.seen.now));
    }

    /// The clock of the deadline goes on, and nobody's pause is left.
    pub(super) fn resume_clock(&mut self) {
        self.status.paused_by_hand = false;
        if let Some(since) = self.status.paused_since.take() {
            let paused = self.elapsed(Some(&since)).as_secs();
            self.status.paused_seconds += u64::try_from(paused).unwrap_or(0);
        }
    }

    /// How long the rollout has taken, without its pauses.
    pub(super) fn taken(&self) -> SignedDuration {
        let paused = i64::try_from(self.status.paused_seconds).unwrap_or(i64::MAX);
        let paused =
            SignedDuration::from_secs(paused).saturating_add(self.elapsed(self.status.paused_since.as_ref()));
        self.elapsed(self.status.started.as_ref()).saturating_sub(paused)
    }

    /// What `judge.onInconclusive` says about a rollout that is undecided at its deadline. A version is never
    /// failed just because nobody sent requests: Hold reports it and waits on.
    pub(super) fn check_deadline(&mut self, target: &WorkloadSeen) {
        if self.taken() <= duration(&self.spec.deadline) {
            return self.no_longer_late();
        }
        let judged = self.judge();
        let undecided = judged.verdict != Verdict::Pass && !judged.held;
        let late = format!("not decided within the deadline of {}", self.spec.deadline);
        match self.spec.judge.on_inconclusive {
            OnInconclusive::Rollback if undecided => return self.fail(late),
            OnInconclusive::Promote if undecided && self.may_promote_undecided(target) => {
                self.no_longer_short();
                return self.promote(&format!("{late}, and judge.onInconclusive is Promote"));
            }
            _ => {}
        }
        let message = format!(
            "{late}: the rollout waits on; promote@ID or abort@ID in the annotation tulle.dev/action decides it"
        );
        if !self.has_condition(LATE, true) {
            self.event(EventReason::DeadlineExceeded, message.clone());
        }
        self.condition(LATE, true, LATE, &message);
    }

    fn may_promote_undecided(&self, target: &WorkloadSeen) -> bool {
        !self.is_obstructed(target)
            && !self.unfit()
            && !self.has_unhealthy_pod(target)
            && self.pods_on_trial(target).any(|pod| pod.containers_ready)
    }

    pub(super) fn no_longer_late(&mut self) {
        self.drop_condition(LATE);
    }

    /// A rollout that waits for a user: the clock of its deadline stands.
    pub(super) fn pause(&mut self) {
        self.pause_clock();
        if self.status.phase == Phase::Paused {
            return;
        }
        self.status.phase = Phase::Paused;
        let how = self.action_command("resume");
        let message = format!("step {} waits for a user: {how} goes on", self.status.step + 1);
        self.event(EventReason::Paused, message);
    }
}
