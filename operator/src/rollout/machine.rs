//! The rollout machine: status and what is seen in, new status and actions out. No clock, no I/O.
//!
//! Every invariant is a line here or a test below: the status is what is pushed, so it is written
//! first; evidence counts only while the weight is acknowledged; unknown holds; a newer revision
//! starts over; every phase that is not an end has a deadline.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{
    CanarySpec, CanaryStatus, Evidence, HistoryEntry, OnFailure, OnInconclusive, Percent, Phase, Span, Step,
    reason, set_condition,
};

use super::judge::{Counted, Judgement, Rule, Verdict, judge};
use crate::discovery::Acknowledgement;
use crate::model::WorkloadSeen;
use crate::telemetry::Counts;

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
    /// A human's verb and its request id.
    pub action: Option<(Verb, String)>,
}

/// A human's verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Approve the canary now.
    Promote,
    /// Give it up now.
    Abort,
    /// Go on after a pause.
    Resume,
    /// Try the same revision again after a failure.
    Retry,
}

impl Verb {
    /// Reads `promote@4711`.
    pub fn parse(annotation: &str) -> Option<(Self, String)> {
        let (verb, id) = annotation.split_once('@').filter(|(_, id)| !id.is_empty())?;
        let verb = match verb {
            "promote" => Self::Promote,
            "abort" => Self::Abort,
            "resume" => Self::Resume,
            "retry" => Self::Retry,
            _ => return None,
        };
        Some((verb, id.to_owned()))
    }
}

/// What the driver must do besides writing the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Open the gate of this pod.
    OpenGate(String),
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

/// The condition that tells whom a rollout waits for.
const ACKNOWLEDGED: &str = "Acknowledged";

impl Turn<'_> {
    fn look(&mut self) {
        let Some(target) = self.seen.target.clone() else {
            let message = format!(
                "there is no {} in this namespace; it is picked up when it appears",
                self.status.target
            );
            self.condition("Ready", false, reason::TARGET_NOT_FOUND, &message);
            return;
        };
        self.condition("Ready", true, reason::WATCHING, "new versions of the target go through the steps");
        let Some(latest) = target.latest.clone() else { return };
        if self.status.approved_revision.is_empty() {
            // While two revisions serve, neither is the stable one: a Canary that comes in the middle of a
            // rollout waits for its end.
            if target.pods.iter().any(|pod| pod.ready && !pod.terminating && pod.revision != latest) {
                return;
            }
            // The first revision that is seen is the stable one: watching a workload starts nothing.
            self.status.approved_revision.clone_from(&latest);
            self.status.decided_revision.clone_from(&latest);
            self.status.phase = Phase::Stable;
        }
        if self.status.phase == Phase::Progressing && self.acknowledged {
            self.status.acknowledged_weight = self.status.weight;
        }
        self.human(&target);
        if latest != self.status.decided_revision {
            self.new_revision(&latest);
        }
        self.open_gates(&target);
        match self.status.phase {
            Phase::Waiting => self.status.phase = Phase::Stable,
            Phase::Stable => self.forget_former(&target),
            Phase::Failed => self.failed(),
            Phase::Progressing | Phase::Paused => self.progress(&target),
            Phase::Promoting => self.promoting(&target),
        }
    }

    /// A verb is carried out once: its request id is remembered.
    fn human(&mut self, target: &WorkloadSeen) {
        let Some((verb, id)) = self.seen.action.clone() else { return };
        if self.status.last_action == id {
            return;
        }
        self.status.last_action.clone_from(&id);
        let on_trial = matches!(self.status.phase, Phase::Progressing | Phase::Paused);
        match verb {
            Verb::Promote if on_trial || self.status.phase == Phase::Failed => {
                self.promote("promoted by hand")
            }
            Verb::Abort if on_trial => self.fail("aborted by hand".to_owned()),
            Verb::Resume if self.status.phase == Phase::Paused => {
                self.status.phase = Phase::Progressing;
                self.next_step();
            }
            Verb::Retry if self.status.phase == Phase::Failed => {
                if let Some(latest) = &target.latest {
                    self.begin(&latest.clone());
                }
            }
            _ => {
                let message = format!("{verb:?}@{id} does nothing in phase {:?}", self.status.phase);
                self.event(true, "ActionIgnored", message);
            }
        }
    }

    fn new_revision(&mut self, latest: &str) {
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting) {
            let because = format!("revision {latest} came");
            self.remember("Superseded", &because);
        }
        // Back to what was stable until a moment ago, while most of its pods are still here.
        if !latest.is_empty() && latest == self.status.former_revision {
            self.status.approved_revision = latest.to_owned();
            self.status.former_revision.clear();
        }
        if latest == self.status.approved_revision {
            self.change_weight(0);
            self.status.phase = Phase::Stable;
            self.status.decided_revision = latest.to_owned();
            self.status.canary_revision.clear();
            self.event(false, "Restored", format!("the target is back at the approved revision {latest}"));
        } else {
            self.begin(latest);
        }
    }

    fn begin(&mut self, latest: &str) {
        self.status.phase = Phase::Progressing;
        self.status.decided_revision = latest.to_owned();
        self.status.canary_revision = latest.to_owned();
        self.status.step = 0;
        self.status.evidence = Evidence::default();
        self.status.verdict = "Undecided".to_owned();
        self.status.evidence_summary.clear();
        self.status.unready_since = None;
        self.status.started = Some(Time(self.seen.now));
        self.change_weight(0);
        self.event(false, "Started", format!("revision {latest} goes through {} steps", self.steps.len()));
    }

    fn progress(&mut self, target: &WorkloadSeen) {
        if self.elapsed(self.status.started.as_ref()) > span(&self.spec.deadline) {
            return self.fail(format!("not decided within the deadline of {}", self.spec.deadline));
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
                self.event(
                    false,
                    "Paused",
                    format!("step {} waits for a human: {how}", self.status.step + 1),
                );
            }
            return self.weigh();
        };
        self.status.phase = Phase::Progressing;
        if self.status.weight != u32::from(weight) {
            if self.has_capacity(target, weight) {
                self.fold_evidence();
                self.change_weight(u32::from(weight));
                let message = format!(
                    "step {}: {weight}% to revision {}",
                    self.status.step + 1,
                    self.status.canary_revision
                );
                self.event(false, "WeightChanged", message);
            }
            return;
        }
        if !self.acknowledged {
            return;
        }
        if self.status.step_started.is_none() {
            self.status.step_started = Some(Time(self.seen.now));
            return;
        }
        if !target.pods.iter().any(|pod| pod.revision == self.status.canary_revision && pod.containers_ready)
        {
            let now = Time(self.seen.now);
            let since = self.status.unready_since.get_or_insert(now).clone();
            if self.elapsed(Some(&since)) > SignedDuration::from_secs(30) {
                self.fail("no pod of the new revision has been ready for 30 s".to_owned());
            }
            return;
        }
        self.status.unready_since = None;
        self.weigh();
        self.decide(&step);
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
        self.status.verdict = judged.verdict.name().to_owned();
        self.status.evidence_summary.clone_from(&judged.because);
        if judged.verdict == Verdict::Fail {
            self.fail(judged.because);
        }
    }

    fn decide(&mut self, step: &Step) {
        let hold = step.hold.as_deref().map_or(SignedDuration::from_secs(120), span);
        if self.status.phase != Phase::Progressing || self.elapsed(self.status.step_started.as_ref()) < hold {
            return;
        }
        match (self.judge().verdict, self.spec.judge.on_inconclusive) {
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
        };
        let confidence = Percent::parse(&self.spec.judge.confidence).unwrap_or(0.99);
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

    /// Whether the new revision has the pods that a weight needs. Where it has not, and stable pods
    /// may be given up, one gate is opened: its workload's controller then replaces one stable pod.
    fn has_capacity(&mut self, target: &WorkloadSeen, weight: u8) -> bool {
        let wanted = f64::from(weight) / 100.0 * f64::from(target.replicas) * self.spec.capacity.headroom;
        let needed = (wanted.ceil() as usize).min(target.replicas as usize).max(usize::from(weight > 0));
        let mine: Vec<_> = target
            .pods
            .iter()
            .filter(|p| p.revision == self.status.canary_revision && !p.terminating)
            .collect();
        let ready = mine.iter().filter(|pod| pod.containers_ready).count();
        if ready >= needed {
            self.condition(
                "Capacity",
                true,
                "EnoughPods",
                "the new revision has the pods that its weight needs",
            );
            return true;
        }
        let parked = mine.iter().find(|pod| pod.parked && pod.containers_ready);
        if let (Some(parked), true, false) = (parked, ready == mine.len(), self.spec.capacity.keep_stable) {
            self.actions.push(Action::OpenGate(parked.name.clone()));
        }
        let message = format!(
            "{weight}% needs {needed} ready pods of revision {}, {ready} are",
            self.status.canary_revision
        );
        self.condition("Capacity", false, "TooFewPods", &message);
        false
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
        let done = target.pods.iter().all(|pod| pod.revision == approved && pod.ready && !pod.terminating);
        if done && target.pods.len() >= target.replicas as usize {
            let because = self.status.evidence_summary.clone();
            self.remember("Promoted", &because);
            self.status.phase = Phase::Stable;
            self.status.weight = 0;
            self.status.acknowledged_weight = 0;
            self.status.canary_revision.clear();
            self.status.former_revision.clear();
            self.condition("Promoted", true, "Promoted", &format!("every pod is of revision {approved}"));
            self.condition("Stalled", false, "Promoted", "every pod has been replaced");
        } else if self.elapsed(self.status.step_started.as_ref()) > span(&self.spec.deadline) {
            // It is approved, and all traffic may go to it; what is left is its controller's to do.
            let of_it = target.pods.iter().filter(|pod| pod.revision == approved && pod.ready).count();
            let because = format!(
                "{of_it} of {} pods are ready with revision {approved} after {}: see kubectl describe of the target",
                target.replicas, self.spec.deadline
            );
            self.remember("PromotionStalled", &because);
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
            self.condition("Stalled", false, "Promoted", "every pod has been replaced");
        }
    }

    /// Nothing of what is approved, or was until its successor has taken over, waits behind a gate.
    fn open_gates(&mut self, target: &WorkloadSeen) {
        let stable = [&self.status.approved_revision, &self.status.former_revision];
        let parked = target
            .pods
            .iter()
            .filter(|pod| pod.parked && stable.contains(&&pod.revision) && !pod.terminating);
        self.actions.extend(parked.map(|pod| Action::OpenGate(pod.name.clone())));
    }

    fn fail(&mut self, because: String) {
        self.status.phase = Phase::Failed;
        self.change_weight(0);
        self.remember("Failed", &because);
        self.condition("Promoted", false, "Failed", &because);
        self.event(
            true,
            "Failed",
            format!("revision {} gets no traffic: {because}", self.status.canary_revision),
        );
    }

    /// Traffic is taken away first, acknowledged; only then do pods change.
    fn failed(&mut self) {
        if !self.acknowledged {
            return;
        }
        self.status.acknowledged_weight = 0;
        if self.spec.on_failure == OnFailure::Undo && self.status.verdict != "Undone" {
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

    fn remember(&mut self, outcome: &str, because: &str) {
        let entry = HistoryEntry {
            revision: self.status.canary_revision.clone(),
            outcome: outcome.to_owned(),
            because: because.to_owned(),
            ended: Time(self.seen.now),
        };
        self.status.history.insert(0, entry);
        self.status.history.truncate(10);
    }

    fn event(&mut self, warning: bool, reason: &'static str, message: String) {
        self.actions.push(Action::Event { warning, reason, message });
    }

    fn condition(&mut self, type_: &str, holds: bool, reason: &str, message: &str) {
        let now = Time(self.seen.now);
        set_condition(
            &mut self.status.conditions,
            (type_, holds, reason, message),
            self.seen.generation,
            &now,
        );
    }

    fn summarise(&mut self) {
        let steps = self.steps.len();
        let on_trial = matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Failed);
        let step = (self.status.step as usize + 1).min(steps);
        self.status.step_summary = if on_trial { format!("{step}/{steps}") } else { String::new() };
        let weight = self.status.acknowledged_weight;
        self.status.weight_summary = if on_trial { format!("{weight}%") } else { String::new() };
        let progressing = matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting);
        let message = format!("{:?}", self.status.phase);
        self.condition("Progressing", progressing, &message.clone(), &message);
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Failed) {
            self.show_acknowledgement();
        } else {
            self.status.conditions.retain(|condition| condition.type_ != ACKNOWLEDGED);
        }
    }

    /// Whoever asks why a rollout stands still is told whom it waits for.
    fn show_acknowledgement(&mut self) {
        let weight = self.status.weight;
        match &self.seen.acknowledged {
            Acknowledgement::Refused(why) if !self.changed => {
                let known = |c: &Condition| c.type_ == ACKNOWLEDGED && c.reason == reason::REFUSED;
                if !self.status.conditions.iter().any(known) {
                    self.event(
                        true,
                        reason::REFUSED,
                        format!("the weight of {weight}% is not everywhere: {why}"),
                    );
                }
                self.condition(ACKNOWLEDGED, false, reason::REFUSED, why);
            }
            Acknowledgement::Awaited(who) if !self.changed => {
                self.condition(ACKNOWLEDGED, false, reason::PROPAGATING, &format!("{weight}%: {who}"));
            }
            Acknowledgement::Complete if !self.changed => {
                let message = format!("every sidecar that sends to the target has acknowledged {weight}%");
                self.condition(ACKNOWLEDGED, true, ACKNOWLEDGED, &message);
            }
            _ => self.condition(ACKNOWLEDGED, false, reason::PROPAGATING, &format!("{weight}% was just set")),
        }
    }
}

/// Spans are validated at admission; one that cannot be read is a day.
fn span(text: &str) -> SignedDuration {
    let span = Span::parse(text).ok().and_then(|span| SignedDuration::try_from(span).ok());
    span.unwrap_or(SignedDuration::from_hours(24))
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
