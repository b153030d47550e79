//! The rollout machine: status and what is seen in, new status and actions out. No clock, no I/O.
//!
//! Every invariant is a line here or a test below: the status is what is pushed, so it is written
//! first; evidence counts only while the weight is acknowledged; unknown holds; a newer revision
//! starts over; every phase that is not an end has a deadline.

mod gates;
mod report;
#[cfg(test)]
mod tests;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{
    CanaryAction, CanarySpec, CanaryStatus, CanaryVerdict, Evidence, OnFailure, OnInconclusive, Phase,
    RolloutOutcome, Step, parse_duration, parse_percent, reason,
};

use super::judge::{Counted, Judgement, Rule, Verdict, judge};
use crate::discovery::Acknowledgement;
use crate::model::WorkloadSeen;
use crate::telemetry::Counts;

/// A version whose pods take traffic and are all broken for these seconds is bad. Before it has any, it is
/// given what Kubernetes gives it (`progressDeadlineSeconds`).
const BROKEN_AFTER: i64 = 30;
/// What is stable has no pod left for this long: the watch may lag, and pods are replaced by name.
const GONE_AFTER: SignedDuration = SignedDuration::from_secs(10);
/// The reason of the condition and the event of a revision that failed before and came back.
const FAILED_BEFORE: &str = "FailedBefore";

/// What is seen of the world at one look.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Now.
    pub now: Timestamp,
    /// The Canary's generation.
    pub generation: i64,
    /// The target; `None`: it does not exist.
    pub target: Option<WorkloadSeen>,
    /// Whether every sidecar that sends to the target has acknowledged the present status.
    pub acknowledged: Acknowledgement,
    /// Requests since the last look: to the canary, to the approved revision.
    pub counted: (Counts, Counts),
    /// The action that a user requested, and its request id.
    pub action: Option<(CanaryAction, String)>,
    /// An older Canary with the same target.
    pub conflict: Option<String>,
}

/// What the driver must do besides writing the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open the gate of this pod.
    OpenGate(String),
    /// Shut the gate of this pod again.
    ShutGate(String),
    /// Restore the template of this revision.
    Undo {
        /// The revision.
        revision: String,
    },
    /// Tell whoever reads events.
    Event {
        /// A warning, not just news.
        warning: bool,
        /// In PascalCase.
        reason: &'static str,
        /// One sentence.
        message: String,
    },
}

/// The default steps.
fn default_steps() -> Vec<Step> {
    [1, 5, 10, 25, 50].into_iter().map(|weight| Step { weight: Some(weight), ..Step::default() }).collect()
}

/// One look: the next status and what to do.
pub fn next(spec: &CanarySpec, status: &CanaryStatus, seen: &Seen) -> (CanaryStatus, Vec<Action>) {
    let acknowledged = seen.acknowledged == Acknowledgement::Complete;
    let status = status.clone();
    let mut turn =
        Turn { spec, steps: steps(spec), seen, status, actions: Vec::new(), acknowledged, changed: false };
    turn.status.observed_generation = Some(seen.generation);
    turn.status.target = format!("{}/{}", spec.target.kind.name(), spec.target.name);
    turn.look();
    turn.summarise();
    (turn.status, turn.actions)
}

fn steps(spec: &CanarySpec) -> Vec<Step> {
    if spec.steps.is_empty() { default_steps() } else { spec.steps.clone() }
}

struct Turn<'a> {
    spec: &'a CanarySpec,
    steps: Vec<Step>,
    seen: &'a Seen,
    status: CanaryStatus,
    actions: Vec<Action>,
    /// Sidecars have acknowledged the status as it now stands.
    acknowledged: bool,
    /// The weight was changed at this look.
    changed: bool,
}

impl Turn<'_> {
    fn look(&mut self) {
        if let Some(older) = &self.seen.conflict {
            let message = format!("Canary {older} is older and has the same target: delete one of the two");
            self.condition("Ready", false, reason::CONFLICTED, &message);
            return;
        }
        let Some(target) = self.seen.target.clone() else {
            let message = format!(
                "there is no {} in this namespace; it is picked up when it appears",
                self.status.target
            );
            self.condition("Ready", false, reason::TARGET_NOT_FOUND, &message);
            return;
        };
        let Some(latest) = target.latest.clone() else { return };
        if self.status.approved_revision.is_empty() && !self.adopt(&target, &latest) {
            return;
        }
        self.condition("Ready", true, reason::WATCHING, "new versions of the target go through the steps");
        if self.status.phase == Phase::Progressing && self.acknowledged {
            self.status.acknowledged_weight = self.status.weight;
        }
        self.human(&target);
        if latest != self.status.decided_revision {
            self.new_revision(&latest);
        }
        self.take_what_is_left(&target, &latest);
        self.open_gates(&target);
        match self.status.phase {
            Phase::Waiting => self.status.phase = Phase::Stable,
            Phase::Stable => self.forget_former(&target),
            Phase::Failed => self.failed(&target),
            Phase::Progressing | Phase::Paused => self.progress(&target),
            Phase::Promoting => self.promoting(&target),
        }
    }

    /// The first revision that is seen is the stable one: watching a workload starts nothing. While two
    /// revisions serve, neither is: a Canary that comes in the middle of a rollout waits for its end.
    fn adopt(&mut self, target: &WorkloadSeen, latest: &str) -> bool {
        if target.pods.iter().any(|pod| pod.ready && !pod.terminating && pod.revision != latest) {
            let message =
                "pods of two revisions serve: new versions go through the steps once that has ended";
            self.condition("Ready", true, reason::WATCHING, message);
            return false;
        }
        self.status.approved_revision = latest.to_owned();
        self.status.decided_revision = latest.to_owned();
        self.status.phase = Phase::Stable;
        true
    }

    /// Where no pod of what is stable is left (scaled to zero and back, made anew, a strategy that replaces
    /// all at once), a trial would be an outage: the newest revision is all there is.
    fn take_what_is_left(&mut self, target: &WorkloadSeen, latest: &str) {
        if latest == self.status.approved_revision || self.stable_pods(target).next().is_some() {
            self.status.stable_gone_since = None;
            return;
        }
        let since = self.status.stable_gone_since.get_or_insert(Time(self.seen.now)).clone();
        if self.elapsed(Some(&since)) < GONE_AFTER {
            return;
        }
        self.status.stable_gone_since = None;
        let because = format!("no pod of revision {} is left to compare with", self.status.approved_revision);
        self.event(true, "NothingToCompareWith", format!("revision {latest} takes all traffic: {because}"));
        self.status.evidence_summary.clone_from(&because);
        self.promote(&because);
    }

    /// Carries out the requested action once: its request id is remembered.
    fn human(&mut self, target: &WorkloadSeen) {
        let Some((action, id)) = self.seen.action.clone() else { return };
        if self.status.last_action == id {
            return;
        }
        self.status.last_action.clone_from(&id);
        let on_trial = matches!(self.status.phase, Phase::Progressing | Phase::Paused);
        match action {
            CanaryAction::Promote if on_trial || self.status.phase == Phase::Failed => {
                self.promote("promoted by hand")
            }
            CanaryAction::Abort if on_trial => self.fail("aborted by hand".to_owned()),
            CanaryAction::Resume if self.status.phase == Phase::Paused => {
                self.status.phase = Phase::Progressing;
                self.next_step();
            }
            CanaryAction::Retry if self.status.phase == Phase::Failed => {
                if let Some(latest) = &target.latest {
                    self.begin(&latest.clone());
                }
            }
            _ => {
                let message = format!("{action:?}@{id} does nothing in phase {:?}", self.status.phase);
                self.event(true, "ActionIgnored", message);
            }
        }
    }

    fn new_revision(&mut self, latest: &str) {
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting) {
            let because = format!("revision {latest} came");
            self.remember(RolloutOutcome::Superseded, &because);
        }
        // Back to what was stable until a moment ago, while pods of both are here: they share as many are.
        if !latest.is_empty() && latest == self.status.former_revision {
            std::mem::swap(&mut self.status.approved_revision, &mut self.status.former_revision);
            self.no_longer_stalled("Restored", "the target is back at its former revision");
        }
        if latest == self.status.approved_revision {
            self.change_weight(0);
            self.status.phase = Phase::Stable;
            self.status.decided_revision = latest.to_owned();
            self.status.canary_revision.clear();
            self.event(false, "Restored", format!("the target is back at the approved revision {latest}"));
        } else {
            self.begin(latest);
            self.refuse_again(latest);
        }
    }

    /// A revision that was undone and comes back, as a GitOps controller brings it, is not tried again and
    /// again: users would pay for every round.
    fn refuse_again(&mut self, latest: &str) {
        let before = self.status.history.iter().find(|entry| entry.revision == latest);
        let Some(failed) = before.filter(|entry| entry.outcome == RolloutOutcome::Failed) else { return };
        if self.spec.on_failure != OnFailure::Undo {
            return;
        }
        let how = "kubectl annotate --overwrite canary NAME tulle.dev/action=retry@ID tries it again";
        let message = format!("revision {latest} has failed before ({}): {how}", failed.because);
        self.status.phase = Phase::Failed;
        self.status.verdict = CanaryVerdict::FailedBefore;
        self.condition("Promoted", false, FAILED_BEFORE, &message);
        self.event(true, FAILED_BEFORE, message);
    }

    fn begin(&mut self, latest: &str) {
        self.status.phase = Phase::Progressing;
        self.status.decided_revision = latest.to_owned();
        self.status.canary_revision = latest.to_owned();
        self.status.step = 0;
        self.status.evidence = Evidence::default();
        self.status.verdict = CanaryVerdict::Undecided;
        self.status.evidence_summary.clear();
        self.status.unready_since = None;
        self.status.started = Some(Time(self.seen.now));
        self.change_weight(0);
        self.event(false, "Started", format!("revision {latest} goes through {} steps", self.steps.len()));
    }

    fn progress(&mut self, target: &WorkloadSeen) {
        if self.elapsed(self.status.started.as_ref()) > duration(&self.spec.deadline) {
            return self.fail(format!("not decided within the deadline of {}", self.spec.deadline));
        }
        let broken = self.is_broken(target);
        if self.status.phase == Phase::Failed {
            return;
        }
        if broken && self.status.weight > 0 {
            return self.keep_watch();
        }
        if self.step().is_none() {
            // The steps were shortened meanwhile: nothing is promoted that has not passed its last one.
            self.status.step = u32::try_from(self.steps.len().saturating_sub(1)).unwrap_or(0);
        }
        let Some(step) = self.step().cloned() else { return };
        let Some(weight) = step.weight else {
            if self.status.phase != Phase::Paused {
                self.status.phase = Phase::Paused;
                let how = "kubectl annotate --overwrite canary NAME tulle.dev/action=resume@ID goes on";
                let message = format!("step {} waits for a human: {how}", self.status.step + 1);
                self.event(false, "Paused", message);
            }
            return self.keep_watch();
        };
        self.status.phase = Phase::Progressing;
        if self.status.weight != u32::from(weight) {
            if !self.has_capacity(target, weight) {
                return self.keep_watch();
            }
            self.fold_evidence();
            self.change_weight(u32::from(weight));
            let revision = &self.status.canary_revision;
            let message = format!("step {}: {weight}% to revision {revision}", self.status.step + 1);
            self.event(false, "WeightChanged", message);
            return;
        }
        if !self.acknowledged {
            return;
        }
        if self.status.step_started.is_none() {
            self.status.step_started = Some(Time(self.seen.now));
            return;
        }
        self.weigh();
        self.decide(&step);
    }

    /// Whether no pod of the new revision is ready; for too long, it has failed.
    fn is_broken(&mut self, target: &WorkloadSeen) -> bool {
        if self.pods_on_trial(target).any(|pod| pod.containers_ready) {
            self.status.unready_since = None;
            return false;
        }
        if self.status.weight == 0 && self.pods_on_trial(target).next().is_none() {
            // Its controller, or who replaces pods by hand, has made none yet.
            self.status.unready_since = None;
            return true;
        }
        let since = self.status.unready_since.get_or_insert(Time(self.seen.now)).clone();
        let patience = match self.status.weight {
            0 => i64::from(target.progress_deadline),
            _ => BROKEN_AFTER,
        };
        if self.elapsed(Some(&since)) > SignedDuration::from_secs(patience) {
            self.fail(format!(
                "no pod of the new revision has been ready for {patience} s: see kubectl describe of its pods"
            ));
        }
        true
    }

    /// Judges what already has traffic while the rollout waits for something else.
    fn keep_watch(&mut self) {
        if self.status.weight > 0 && self.acknowledged {
            self.status.step_started.get_or_insert(Time(self.seen.now));
            self.weigh();
        }
    }

    /// Adds what was counted, and judges.
    fn weigh(&mut self) {
        if self.status.step_started.is_some() {
            let (canary, stable) = self.seen.counted;
            let evidence = &mut self.status.evidence;
            evidence.canary_requests += canary.requests;
            evidence.canary_failures += canary.failures;
            evidence.stable_requests += stable.requests;
            evidence.stable_failures += stable.failures;
        }
        let judged = self.judge();
        self.status.verdict = judged.verdict.into();
        self.status.evidence_summary.clone_from(&judged.because);
        if judged.verdict == Verdict::Fail {
            self.fail(judged.because);
        }
    }

    fn decide(&mut self, step: &Step) {
        let hold = step.hold.as_deref().map_or(SignedDuration::from_secs(120), duration);
        if self.status.phase != Phase::Progressing || self.elapsed(self.status.step_started.as_ref()) < hold {
            return;
        }
        let evidence = &self.status.evidence;
        let incomparable = evidence.stable_requests == 0 && evidence.canary_failures > 0;
        match (self.judge().verdict, self.spec.judge.on_inconclusive) {
            // Failures that nothing can be compared with are nothing to promote on.
            (Verdict::Inconclusive, OnInconclusive::Promote) if incomparable => {}
            (Verdict::Pass, _) | (Verdict::Inconclusive, OnInconclusive::Promote) => self.next_step(),
            (Verdict::Inconclusive, OnInconclusive::Rollback) => {
                let because =
                    format!("the evidence did not decide in time: {}", self.status.evidence_summary);
                self.fail(because);
            }
            (Verdict::Inconclusive, OnInconclusive::Hold) | (Verdict::Fail, _) => {}
        }
    }

    fn next_step(&mut self) {
        self.status.step += 1;
        self.status.step_started = None;
        if self.step().is_none() {
            self.promote("passed every step");
        }
    }

    fn judge(&self) -> Judgement {
        let evidence = &self.status.evidence;
        let counted = Counted {
            canary_requests: evidence.canary_requests,
            canary_failures: evidence.canary_failures,
            stable_requests: evidence.stable_requests,
            stable_failures: evidence.stable_failures,
            former_log_evidence: evidence.former_log_evidence,
            alone: self.status.weight >= 100,
        };
        let confidence = parse_percent(&self.spec.judge.confidence).unwrap_or(0.99);
        let rule = Rule {
            worse_by: self.spec.judge.errors.worse_by,
            alpha: (1.0 - confidence).max(1e-9),
            min_requests: u64::from(self.spec.judge.min_requests),
        };
        judge(&counted, &rule)
    }

    /// Evidence multiplies over steps; each step counts its own requests.
    fn fold_evidence(&mut self) {
        let former = self.judge().log_evidence;
        self.status.evidence = Evidence { former_log_evidence: former, ..Evidence::default() };
    }

    fn promote(&mut self, because: &str) {
        self.status.phase = Phase::Promoting;
        self.status.former_revision = std::mem::take(&mut self.status.approved_revision);
        self.status.approved_revision.clone_from(&self.status.canary_revision);
        self.change_weight(100);
        self.status.step_started = Some(Time(self.seen.now));
        self.event(
            false,
            "Promoted",
            format!("revision {} is approved: {because}", self.status.canary_revision),
        );
    }

    fn promoting(&mut self, target: &WorkloadSeen) {
        let approved = self.status.approved_revision.clone();
        // A pod of a node that is lost ends for as long as the node is: that holds nobody up.
        let pods: Vec<_> = target.pods.iter().filter(|pod| !pod.terminating).collect();
        let done = pods.iter().all(|pod| pod.revision == approved && pod.ready);
        if done && pods.len() >= target.replicas as usize {
            let because = self.status.evidence_summary.clone();
            self.remember(RolloutOutcome::Promoted, &because);
            self.status.phase = Phase::Stable;
            self.status.weight = 0;
            self.status.acknowledged_weight = 0;
            self.status.canary_revision.clear();
            self.status.former_revision.clear();
            self.condition("Promoted", true, "Promoted", &format!("every pod is of revision {approved}"));
            self.no_longer_stalled("Promoted", "every pod has been replaced");
        } else if self.elapsed(self.status.step_started.as_ref()) > duration(&self.spec.deadline) {
            // It is approved, and all traffic may go to it; what is left is its controller's to do.
            let of_it = target.pods.iter().filter(|pod| pod.revision == approved && pod.ready).count();
            let because = format!(
                "{of_it} of {} pods are ready with revision {approved} after {}: see kubectl describe of the target",
                target.replicas, self.spec.deadline
            );
            self.remember(RolloutOutcome::PromotionStalled, &because);
            self.status.phase = Phase::Stable;
            self.status.weight = 0;
            self.status.acknowledged_weight = 0;
            self.status.canary_revision.clear();
            self.status.step_started = None;
            self.condition("Stalled", true, "PromotionStalled", &because);
            self.event(true, "PromotionStalled", because);
        }
    }

    /// A former revision without pods is nobody's.
    fn forget_former(&mut self, target: &WorkloadSeen) {
        if self.status.former_revision.is_empty() {
            return;
        }
        if !target.pods.iter().any(|pod| pod.revision == self.status.former_revision) {
            self.status.former_revision.clear();
            self.no_longer_stalled("Promoted", "every pod has been replaced");
        }
    }

    fn fail(&mut self, because: String) {
        self.status.phase = Phase::Failed;
        // Some sidecars may have it already: until all have said otherwise, it counts as there.
        self.status.acknowledged_weight = self.status.acknowledged_weight.max(self.status.weight);
        self.change_weight(0);
        self.remember(RolloutOutcome::Failed, &because);
        self.condition("Promoted", false, "Failed", &because);
        self.event(
            true,
            "Failed",
            format!("revision {} gets no traffic: {because}", self.status.canary_revision),
        );
    }

    /// Traffic is taken away first, acknowledged; only then do pods change.
    fn failed(&mut self, target: &WorkloadSeen) {
        if !self.acknowledged {
            return;
        }
        self.status.acknowledged_weight = 0;
        self.shut_gates(target);
        if self.spec.on_failure == OnFailure::Undo && self.status.verdict != CanaryVerdict::FailedBefore {
            self.actions.push(Action::Undo { revision: self.status.approved_revision.clone() });
        }
    }

    fn change_weight(&mut self, weight: u32) {
        self.status.weight = weight;
        self.status.epoch += 1;
        self.status.step_started = None;
        // Nobody has seen this yet.
        self.acknowledged = false;
        self.changed = true;
    }

    fn step(&self) -> Option<&Step> {
        self.steps.get(self.status.step as usize)
    }

    fn elapsed(&self, since: Option<&Time>) -> SignedDuration {
        since.map_or(SignedDuration::ZERO, |since| self.seen.now.duration_since(since.0))
    }
}

/// Durations are validated at admission; an invalid one counts as a day.
fn duration(text: &str) -> SignedDuration {
    let duration = parse_duration(text).ok().and_then(|duration| SignedDuration::try_from(duration).ok());
    duration.unwrap_or(SignedDuration::from_hours(24))
}
