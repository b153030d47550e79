//! The rollout machine: status and what is seen in, new status and actions out. No clock, no I/O.
//!
//! Every invariant is a line here or a test below: the status is what is pushed, so it is written first;
//! acknowledgement decides whether a step may advance, never whether it may fail; missing data holds; a newer
//! revision starts over; every phase that is not an end has a deadline or a condition that says what it waits for.

mod actions;
mod deadline;
mod gates;
mod held;
mod last;
mod outcome;
mod progress;
#[cfg(test)]
mod properties;
mod report;
mod returning;
mod silence;
mod steps;
#[cfg(test)]
mod tests;
mod unhealthy;

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{
    CanarySpec, CanaryStatus, CanarySteering, CanaryVerdict, Evidence, OnFailure, OnUndo, Phase, Requested,
    RolloutOutcome, Step, reason,
};
use tulle_mesh::event_reason::EventReason;

use super::evidence::FailingPod;
use super::exposure::is_exposed;
use super::input::{is_alone, judged};
use super::judge::{Judgement, PodBlock, Rules, Unanswered, judge};
use crate::discovery::Acknowledgement;
use crate::model::{SplitObstacle, WorkloadSeen};
use gates::{CAPACITY, is_short_of_pods};
use held::HELD;
use steps::Wanted;
pub use steps::steps;

/// What is seen of the world at one look.
#[derive(Clone, Debug)]
pub struct Observation {
    /// Now.
    pub now: Timestamp,
    /// The Canary's namespace.
    pub namespace: Arc<str>,
    /// The Canary's name.
    pub name: Arc<str>,
    /// The Canary's generation.
    pub generation: i64,
    /// The target; `None`: it does not exist.
    pub target: Option<WorkloadSeen>,
    /// The target is a Deployment that a user has paused (`spec.paused`). Read only where [`waits_for_pods`].
    pub paused: bool,
    /// Whether every sidecar that sends to the target has acknowledged the present status.
    pub acknowledged: Acknowledgement,
    /// Attempts since the running block began, by pod.
    pub block: Vec<PodBlock>,
    /// The running block is full: it becomes part of the evidence.
    pub block_ended: bool,
    /// Services of the target whose traffic cannot be split.
    pub obstacles: Vec<SplitObstacle>,
    /// No sidecar has subscribed to an address from which requests reach a Service of the target. `false` as well where
    /// sidecars have not reported yet.
    pub clientless: bool,
    /// The pod of the version on trial that has nearly all of its failures.
    pub failing: Option<FailingPod>,
    /// The operator may not restore templates of Deployments.
    pub undo_forbidden: bool,
    /// The action that a user requested.
    pub action: Option<Requested>,
    /// An older Canary with the same target.
    pub conflict: Option<String>,
}

/// A pod: its name and, so that no namesake is taken for it, its uid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// What the driver must do besides writing the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open the gate of this pod.
    OpenGate(PodName),
    /// Shut the gate of this pod again.
    ShutGate(PodName),
    /// Restore the template of this revision.
    Undo {
        /// The revision.
        revision: String,
    },
    /// Publish an event.
    Event {
        /// What has happened; its type follows.
        reason: EventReason,
        /// One sentence.
        message: String,
    },
}

/// One look: the next status and what to do.
pub fn next(spec: &CanarySpec, status: &CanaryStatus, seen: &Observation) -> (CanaryStatus, Vec<Action>) {
    let acknowledged = seen.acknowledged == Acknowledgement::Complete;
    let mut evaluation = Evaluation {
        spec,
        steps: steps(spec),
        seen,
        status: status.clone(),
        actions: Vec::new(),
        acknowledged,
        changed: false,
        closed: false,
        rules: Rules::of(&spec.judge),
    };
    evaluation.status.observed_generation = Some(seen.generation);
    evaluation.status.target = format!("{}/{}", spec.target.kind.name(), spec.target.name);
    evaluation.look();
    evaluation.summarise();
    (evaluation.status, evaluation.actions)
}

/// Whether the rollout waits for pods that the controller of the target makes or replaces.
pub fn waits_for_pods(status: &CanaryStatus) -> bool {
    status.phase == Phase::Promoting || is_short_of_pods(status)
}

/// Pods of the new version, while it is on trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnTrial {
    /// How many could serve.
    pub ready: usize,
    /// Whether the rollout of the target stands still because of the Canary alone: every pod of the new version could
    /// serve, and none is missing. Where one cannot start or cannot be made, Kubernetes' own deadline says so.
    pub is_held_back: bool,
}

/// What of the target is on trial; `None`: nothing is.
pub fn on_trial(status: &CanaryStatus, target: &WorkloadSeen) -> Option<OnTrial> {
    if !matches!(status.phase, Phase::Progressing | Phase::Paused) {
        return None;
    }
    let pods = target.pods.iter().filter(|pod| pod.revision == status.canary_revision && !pod.terminating);
    let (ready, unready): (Vec<_>, Vec<_>) = pods.partition(|pod| pod.containers_ready);
    // A pause waits for a user, whatever the next step needs.
    let is_short = status.phase == Phase::Progressing && is_short_of_pods(status);
    let is_held_back = !ready.is_empty() && unready.is_empty() && !is_short;
    Some(OnTrial { ready: ready.len(), is_held_back })
}

struct Evaluation<'a> {
    spec: &'a CanarySpec,
    steps: Vec<Step>,
    seen: &'a Observation,
    status: CanaryStatus,
    actions: Vec<Action>,
    /// Sidecars have acknowledged the status as it now stands.
    acknowledged: bool,
    /// What is sent to the version on trial was changed at this look.
    changed: bool,
    /// The running block is part of `status.evidence`.
    closed: bool,
    rules: Rules,
}

impl Evaluation<'_> {
    fn look(&mut self) {
        if let Some(older) = &self.seen.conflict {
            let message = format!("Canary {older} is older and has the same target: delete one of the two");
            self.condition("Ready", false, reason::CONFLICTED, &message);
            return;
        }
        let Some(mut target) = self.seen.target.clone() else { return self.without_target() };
        // While its controller has not seen the newest template, the rollout goes on with the last one: a bad
        // version must be stopped meanwhile too.
        let known = Some(self.status.decided_revision.clone()).filter(|known| !known.is_empty());
        let Some(latest) = target.latest.clone().or(known) else {
            let message = "waiting for the target's controller to report a revision";
            self.condition("Ready", false, "NoRevision", message);
            return;
        };
        target.latest = Some(latest.clone());
        if self.status.approved_revision.is_empty() && !self.adopt(&target, &latest) {
            return;
        }
        self.condition("Ready", true, reason::WATCHING, "new revisions of the target go through the steps");
        self.show_undo();
        // Before anything changes the weight: what was acknowledged is the weight as it stands in the status.
        let shown = matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Failed);
        if shown && self.acknowledged {
            self.status.acknowledged_weight = self.status.weight;
            self.status.acknowledged_steering.clone_from(&self.status.steering);
        }
        self.human(&target);
        if latest != self.status.decided_revision {
            self.new_revision(&latest);
        }
        self.take_what_is_left(&target, &latest);
        self.open_gates(&target);
        self.shut_superseded(&target);
        match self.status.phase {
            Phase::Waiting => self.status.phase = Phase::Stable,
            Phase::Stable => self.forget_former(&target),
            Phase::Failed => self.failed(&target),
            // Nobody has seen the weight of this look yet, and the judge compares nothing from now on.
            Phase::Progressing | Phase::Paused if self.changed && self.is_left_alone(&target) => {}
            Phase::Progressing | Phase::Paused => self.progress(&target),
            Phase::Promoting => self.promoting(&target),
        }
        // It failed at this look: where nothing else can serve, no look may pass without it.
        if self.status.phase == Phase::Failed && self.status.weight == 0 {
            self.take_what_is_left(&target, &latest);
        }
        self.show_obstacles(&target);
        self.show_unhealthy(&target);
        self.show_paused();
    }

    /// The first revision that is seen is the stable one: watching a workload starts nothing. While two
    /// revisions serve, neither is: a Canary that comes in the middle of a rollout waits for its end.
    fn adopt(&mut self, target: &WorkloadSeen, latest: &str) -> bool {
        if target.pods.iter().any(|pod| pod.ready && !pod.terminating && pod.revision != latest) {
            let message = "a rollout is already in progress; the next one will be stepped";
            self.condition("Ready", true, reason::WATCHING, message);
            return false;
        }
        self.status.approved_revision = latest.to_owned();
        self.status.decided_revision = latest.to_owned();
        self.status.phase = Phase::Stable;
        true
    }

    fn new_revision(&mut self, latest: &str) {
        self.no_longer_short();
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting) {
            let because = format!("revision {latest} came");
            self.remember(RolloutOutcome::Superseded, &because);
        }
        self.resume_clock();
        if self.is_returning() {
            // Pods of the revision whose promotion was aborted serve until they are replaced, or too few would be left.
            self.status.former_revision.clone_from(&self.status.canary_revision);
            self.no_longer_returning(
                "Replaced",
                "pods of the aborted revision serve until they are replaced",
            );
        } else if self.serves_alone() && latest != self.status.canary_revision {
            // The same of what served because no stable pod is left, or nobody would until others are ready.
            self.status.former_revision.clone_from(&self.status.canary_revision);
        }
        let is_back = !latest.is_empty() && latest == self.status.former_revision;
        let stood_in = is_back && self.has_stand_in();
        if is_back && (stood_in || self.failed_before(latest)) {
            // It comes again after it was aborted, or served unjudged: for another trial, not because it was stable.
            self.status.former_revision.clear();
        }
        // Back to what was stable until a moment ago, while pods of both are here: they share as many are.
        if !latest.is_empty() && latest == self.status.former_revision {
            std::mem::swap(&mut self.status.approved_revision, &mut self.status.former_revision);
            self.no_longer_stalled(EventReason::Restored.name(), "the target is back at its former revision");
        }
        if latest == self.status.approved_revision {
            self.forget_verdict();
            self.change_weight(0);
            self.status.phase = Phase::Stable;
            self.nothing_acknowledged();
            self.status.decided_revision = latest.to_owned();
            self.status.canary_revision.clear();
            self.event(
                EventReason::Restored,
                format!("the target is back at the approved revision {latest}"),
            );
        } else if self.spec.judge.undo == OnUndo::Approve
            && self.status.approved_before.iter().any(|before| before == latest)
            && !self.failed_before(latest)
        {
            self.begin(latest);
            let because = format!("revision {latest} was approved before");
            self.status.verdict = CanaryVerdict::NotJudged;
            self.status.evidence_summary.clone_from(&because);
            self.approve(EventReason::Approved, &because);
        } else {
            self.begin(latest);
            let steps = self.steps.len();
            let noun = if steps == 1 { "step" } else { "steps" };
            self.event(EventReason::Started, format!("revision {latest} goes through {steps} {noun}"));
            self.refuse_again(latest);
            if stood_in {
                self.go_on_serving(latest);
            }
        }
    }

    /// The verdict was that of the revision that is withdrawn; what is stable is not judged. Why it had failed stays readable.
    fn forget_verdict(&mut self) {
        let withdrawn = &self.status.canary_revision;
        let failed = self.status.phase == Phase::Failed;
        let last = self.status.history.iter().find(|entry| failed && entry.revision == *withdrawn);
        self.status.evidence_summary = match (withdrawn.as_str(), last) {
            ("", _) => String::new(),
            (_, None) => format!("revision {withdrawn} was withdrawn"),
            (_, Some(last)) => format!("revision {withdrawn} was withdrawn: {}", last.because),
        };
        self.status.verdict = CanaryVerdict::NotJudged;
    }

    /// A revision that was undone and comes back, as a GitOps controller brings it, is not tried again and
    /// again: users would pay for every round.
    fn refuse_again(&mut self, latest: &str) {
        let before = self.status.history.iter().find(|entry| entry.revision == latest);
        let Some(failed) = before.filter(|entry| entry.outcome == RolloutOutcome::Failed) else { return };
        if self.spec.on_failure != OnFailure::Undo {
            return;
        }
        let because = format!("it has failed before ({})", failed.because);
        let how = self.action_command("retry");
        let message =
            format!("revision {latest} has failed before ({}): {how} tries it again", failed.because);
        self.status.phase = Phase::Failed;
        self.status.failed_revision = latest.to_owned();
        self.status.step_started = Some(Time(self.seen.now));
        self.status.verdict = CanaryVerdict::FailedBefore;
        self.status.evidence_summary = because;
        self.condition("Promoted", false, EventReason::FailedBefore.name(), &message);
        self.event(EventReason::FailedBefore, message);
    }

    /// A rollout begins, without evidence and without traffic.
    fn begin(&mut self, latest: &str) {
        self.status.phase = Phase::Progressing;
        self.status.decided_revision = latest.to_owned();
        self.status.canary_revision = latest.to_owned();
        self.status.step = 0;
        self.change_weight(0);
        self.nothing_acknowledged();
        self.status.evidence = Evidence::default();
        self.status.verdict = CanaryVerdict::Undecided;
        self.status.evidence_summary.clear();
        self.status.unready_since = None;
        self.status.paused_seconds = 0;
        self.status.paused_since = None;
        self.status.started = Some(Time(self.seen.now));
        if self.status.failed_revision == latest {
            self.status.failed_revision.clear();
        }
        self.no_longer_late();
        self.drop_condition(HELD);
        if self.has_condition("Promoted", true) {
            // From now on its pods are replaced, and not all are of it.
            let message = format!("revision {} was promoted", self.status.approved_revision);
            self.condition("Promoted", true, EventReason::Promoted.name(), &message);
        }
        // Pods that were missing were those of another revision.
        self.drop_condition(CAPACITY);
    }

    /// From now on the version on trial gets its share only.
    fn change_weight(&mut self, weight: u32) {
        self.expose(weight, None);
    }

    /// A new weight or another steering is a new epoch. The running block belongs to the former one, so it ends here.
    fn expose(&mut self, weight: u32, steering: Option<CanarySteering>) {
        self.close_block();
        self.status.evidence.before_step = self.status.evidence.canary.attempts;
        // As many as another weight sends were not sent before.
        Unanswered::forget(&mut self.status.evidence);
        self.status.weight = weight;
        self.status.steering = steering;
        self.status.epoch += 1;
        self.status.step_started = None;
        // Nobody has seen this yet.
        self.acknowledged = false;
        self.changed = true;
    }

    /// Sidecars send nothing to the version on trial, as far as the status shows it.
    fn nothing_acknowledged(&mut self) {
        self.status.acknowledged_weight = 0;
        self.status.acknowledged_steering = None;
    }

    /// The evidence with the running block.
    fn evidence(&self) -> Evidence {
        if self.closed {
            return self.status.evidence.clone();
        }
        judged(&self.status, &self.seen.block, &self.rules)
    }

    /// Makes the running block part of the evidence, once.
    fn close_block(&mut self) {
        if !self.closed && is_exposed(&self.status) {
            self.status.evidence = self.evidence();
            self.status.evidence.blocks += 1;
        }
        self.closed = true;
    }

    fn judge(&self) -> Judgement {
        judge(&self.evidence(), &self.rules, is_alone(&self.status))
    }

    fn step(&self) -> Option<&Step> {
        self.steps.get(self.status.step as usize)
    }

    /// What the current step asks for.
    fn wanted(&self) -> Wanted {
        Wanted::of(self.spec, &self.steps, self.status.step as usize)
    }

    fn elapsed(&self, since: Option<&Time>) -> SignedDuration {
        since.map_or(SignedDuration::ZERO, |since| self.seen.now.duration_since(since.0))
    }
}
