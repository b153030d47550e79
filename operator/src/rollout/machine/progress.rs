//! A rollout on its way through the steps.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{CanarySteering, OnFailure, OnInconclusive, Phase, Step};
use tulle_mesh::event_reason::EventReason;

use super::gates::STEADY_AFTER;
use super::steps::{hold, is_pause, sticky};
use super::{Evaluation, is_exposed};
use crate::model::WorkloadSeen;
use crate::rollout::judge::{Unanswered, Verdict};

/// A version whose pods take traffic and are all broken for these seconds is bad. That includes the time that a pod
/// needs which replaces one of a drained node: the stable version serves meanwhile. Before it has any, and while it
/// has no pod at all, it is given what Kubernetes gives it (`progressDeadlineSeconds`).
const BROKEN_AFTER: i64 = 120;
/// A canary that fails more than half of so many requests is not promoted for want of evidence.
const UNFIT_AFTER: u64 = 20;
/// Requests to the canary that each step needs, also where earlier steps have had enough.
const ENOUGH_IN_A_STEP: u64 = 20;
/// Waiting longer than this for requests is worth a sentence.
const LONG_WAIT: f64 = 600.0;

impl Evaluation<'_> {
    /// First what may fail the rollout, which needs nobody's acknowledgement; then what may advance it.
    pub(super) fn progress(&mut self, target: &WorkloadSeen) {
        if is_exposed(&self.status) {
            self.weigh(target);
        } else {
            self.no_longer_held();
        }
        let broken = self.status.phase != Phase::Failed && self.is_broken(target);
        if self.is_on_trial() {
            self.check_deadline(target);
        }
        let obstructed = self.is_obstructed(target);
        if obstructed {
            self.no_longer_short();
            if self.is_on_trial() && self.is_ungated_revision(target) {
                self.carry_what_stable_cannot(target);
            }
        }
        let waits = broken && is_exposed(&self.status);
        if !self.is_on_trial() || waits || obstructed {
            return;
        }
        if self.step().is_none() {
            // The steps were shortened meanwhile: nothing is promoted that has not passed its last one.
            self.status.step = u32::try_from(self.steps.len().saturating_sub(1)).unwrap_or(0);
        }
        let Some(step) = self.step().cloned() else { return };
        if is_pause(&step) || self.status.paused_by_hand {
            self.end_copies();
            self.no_longer_short();
            return self.pause();
        }
        self.resume_clock();
        self.status.phase = Phase::Progressing;
        let wanted = self.wanted();
        // Also where the spec was edited meanwhile: what flows changes with an epoch of its own only.
        let differs = self.status.weight != wanted.weight || self.status.steering != wanted.steering;
        if differs && !self.keeps_all_requests(target) {
            if self.has_capacity(target, &wanted) {
                let (revision, what) = (&self.status.canary_revision, wanted.summary());
                let message = format!("step {}: {what} to revision {revision}", self.status.step + 1);
                self.expose(wanted.weight, wanted.steering);
                self.event(EventReason::WeightChanged, message);
            }
            return;
        }
        if differs {
            self.no_longer_short();
        } else {
            self.show_capacity(target, &wanted);
        }
        if self.acknowledged {
            match self.status.step_started {
                None => self.status.step_started = Some(Time(self.seen.now)),
                Some(_) => self.decide(&step, target),
            }
        }
    }

    /// Where no gate holds the new pods back, Kubernetes replaces the stable ones whatever the weight. What those that are
    /// left cannot carry goes to the new ones: a few pods would get the requests of all. It goes back once the stable ones
    /// are there again.
    fn carry_what_stable_cannot(&mut self, target: &WorkloadSeen) {
        // A pod that is unready for a moment was not replaced. Where none is ready, no other one can serve.
        let any = self.stable_pods(target).any(|pod| pod.containers_ready);
        let stable = if any { self.stable_pods(target).count() } else { 0 };
        let Some(carried) = (100 * stable).checked_div(target.replicas as usize) else { return };
        let lacking = 100u32.saturating_sub(u32::try_from(carried).unwrap_or(100));
        // After the target was scaled up, pods of both are missing, and a few new ones must not get the requests of all.
        let approved = self.status.approved_revision.clone();
        let can_carry = self.carried_beside(&self.status.canary_revision, &approved);
        let kept = lacking.max(self.wanted().weight);
        let weight = self.status.weight;
        let share = match lacking.min(can_carry) {
            more if more > weight => more,
            _ if weight > kept => kept,
            _ => return,
        };
        let message = format!(
            "{share}% to revision {}: {stable} of {} stable pods are left, and its pods have no readiness gate that would hold Kubernetes back",
            self.status.canary_revision, target.replicas
        );
        let steering = CanarySteering {
            sticky: if share > 0 { sticky(self.spec) } else { String::new() },
            ..self.status.steering.clone().unwrap_or_default()
        };
        self.expose(share, (steering != CanarySteering::default()).then_some(steering));
        self.event(EventReason::WeightChanged, message);
    }

    /// Copies end with their step. A pause may last for days, and the new version carries every copy out.
    fn end_copies(&mut self) {
        let Some(steering) = self.status.steering.clone().filter(|steering| steering.mirror > 0) else {
            return;
        };
        let kept = CanarySteering { mirror: 0, ..steering };
        self.expose(self.status.weight, (kept != CanarySteering::default()).then_some(kept));
    }

    pub(super) fn is_on_trial(&self) -> bool {
        matches!(self.status.phase, Phase::Progressing | Phase::Paused)
    }

    /// Whether no pod of the new revision is ready, or none has stayed so; for too long, it has failed. One that crashes
    /// again and again while it gets requests counts as unready in between.
    fn is_broken(&mut self, target: &WorkloadSeen) -> bool {
        let exposed = is_exposed(&self.status);
        if self.pods_on_trial(target).any(|pod| pod.containers_ready) {
            if exposed && self.status.unready_since.is_some() && !self.is_steady() {
                return true;
            }
            self.status.unready_since = None;
            return false;
        }
        let none = self.pods_on_trial(target).next().is_none();
        if !exposed && none {
            // Its controller, or who replaces pods by hand, has made none yet.
            self.status.unready_since = None;
            return true;
        }
        let since = self.status.unready_since.get_or_insert(Time(self.seen.now)).clone();
        if target.replicas == 0 {
            self.status.unready_since = None;
            if exposed {
                self.show_scaled_to_zero();
            }
            return true;
        }
        if exposed && self.is_stable_unready(target) {
            // What both versions lack, the new one is not to blame for, and to fail it would send all requests to nobody.
            self.status.unready_since = Some(Time(self.seen.now));
            self.show_nobody_ready();
            return true;
        }
        let patience = match exposed {
            false => i64::from(target.progress_deadline),
            true if none => i64::from(target.progress_deadline).max(BROKEN_AFTER),
            true => BROKEN_AFTER,
        };
        let unready = self.elapsed(Some(&since));
        if unready > SignedDuration::from_secs(patience) {
            let pods = self.pods_command("describe");
            let what = match exposed {
                false => format!("been ready for {patience} s"),
                true => {
                    format!("stayed ready for {} s within {} s", STEADY_AFTER.as_secs(), unready.as_secs())
                }
            };
            let retry = match self.spec.on_failure {
                OnFailure::Hold => {
                    format!(
                        "; once they can start, {} tries the revision again",
                        self.action_command("retry")
                    )
                }
                // Its pods are gone by then.
                OnFailure::Undo => String::new(),
            };
            self.fail(format!("no pod of the new revision has {what}: see {pods}{retry}"));
        } else if exposed {
            self.show_unready(&since);
        }
        true
    }

    /// Judges with the running block: a bad version is stopped before its block is full.
    fn weigh(&mut self, target: &WorkloadSeen) {
        if self.seen.block_ended {
            self.close_block();
        }
        if !self.pods_on_trial(target).any(|pod| pod.containers_ready) {
            // Its requests go to the stable version meanwhile, and the first ones to the pod that comes are a warm-up.
            Unanswered::forget(&mut self.status.evidence);
        }
        let judged = self.judge_unless_silent();
        self.status.verdict = judged.verdict.into();
        self.status.evidence_summary.clone_from(&judged.because);
        match judged.verdict {
            Verdict::Fail => return self.fail(judged.because),
            Verdict::Inconclusive => self.say_what_is_missing(target),
            Verdict::Pass => {}
        }
        if self.is_left_alone(target) {
            let alone = format!("; no pod of revision {} is left beside it", self.status.approved_revision);
            self.status.evidence_summary.push_str(&alone);
        }
        self.say_which_pod(target);
        let silent = self.of_silence(&judged);
        self.show_held(silent.as_ref().unwrap_or(&judged));
    }

    /// Requests that are missing, and how long they take to come.
    fn say_what_is_missing(&mut self, target: &WorkloadSeen) {
        let evidence = self.evidence();
        let attempts = evidence.canary.attempts;
        let missing = self.rules.min_requests.saturating_sub(attempts);
        if !self.pods_on_trial(target).any(|pod| pod.containers_ready) {
            let none_ready = format!("; no pod of revision {} is ready", self.status.canary_revision);
            self.status.evidence_summary.push_str(&none_ready);
        } else if has_no_service(target) {
            let none = match attempts {
                0 => "; no meshed client has sent it a request, and no Service selects the target",
                _ => "; no Service selects the target",
            };
            self.status.evidence_summary.push_str(none);
        } else if let Some(unselected) = self.unselected(target) {
            self.status.evidence_summary.push_str("; ");
            self.status.evidence_summary.push_str(&unselected);
        } else if self.is_without_clients() {
            CLIENTLESS.clone_into(&mut self.status.evidence_summary);
        } else if let Some(silence) = self.silence().filter(|silence| attempts == 0 || silence.is_long) {
            let sentence = silence.sentence(attempts > 0);
            self.status.evidence_summary = match attempts {
                0 => sentence,
                _ => format!("{}; {sentence}", self.status.evidence_summary),
            };
        } else if attempts == 0 {
            let none = match self.status.weight {
                0 => {
                    "no request of a meshed client counts yet: only HTTP requests that match, or copies of GET, HEAD and OPTIONS, go to the new version in this step"
                }
                _ => {
                    "no request of a meshed client counts yet: requests, streams and connections count when they end, the first to each pod are its warm-up, those from outside the mesh are no evidence, and sidecars of an earlier version report none until their pods are restarted"
                }
            };
            self.status.evidence_summary = none.to_owned();
        } else if missing > 0 {
            let seconds = missing as f64 * self.taken().as_secs_f64() / attempts as f64;
            if seconds > LONG_WAIT {
                let how_long = roughly(seconds);
                let hint = format!(
                    "; at the present rate that takes about {how_long}: lower judge.minRequests or raise the step's weight"
                );
                self.status.evidence_summary.push_str(&hint);
            }
        }
    }

    /// It has failures with nothing to compare them with, or fails more often than not: nothing to promote on
    /// for want of evidence.
    pub(super) fn unfit(&self) -> bool {
        let evidence = self.evidence();
        self.fails_mostly() || (evidence.stable.attempts == 0 && evidence.canary.failures > 0)
    }

    /// Whether it fails more often than not.
    pub(super) fn fails_mostly(&self) -> bool {
        let canary = self.evidence().canary;
        canary.attempts >= UNFIT_AFTER && canary.failures.saturating_mul(2) > canary.attempts
    }

    fn decide(&mut self, step: &Step, target: &WorkloadSeen) {
        let held = self.elapsed(self.status.step_started.as_ref());
        if hold(step).is_none_or(|hold| held < hold) || self.has_unhealthy_pod(target) {
            return;
        }
        let judged = self.judge_unless_silent();
        if judged.held {
            return;
        }
        // Requests of earlier steps say nothing about a larger weight.
        let since = self.evidence().canary.attempts.saturating_sub(self.status.evidence.before_step);
        let silent = since < self.rules.min_requests.min(ENOUGH_IN_A_STEP);
        let verdict = match judged.verdict {
            Verdict::Pass if silent => Verdict::Inconclusive,
            verdict => verdict,
        };
        if silent {
            self.status.evidence_summary.push_str(&few_requests(since));
        }
        match (verdict, self.spec.judge.on_inconclusive) {
            (Verdict::Inconclusive, OnInconclusive::Promote) if self.unfit() => {}
            // A hold may be shorter than the first comparison takes at any rate of requests. It comes, or the deadline does.
            (Verdict::Inconclusive, OnInconclusive::Rollback) if judged.uncompared && !silent => {}
            (Verdict::Pass, _) => self.next_step(""),
            (Verdict::Inconclusive, OnInconclusive::Promote) => {
                self.next_step("undecided, and judge.onInconclusive is Promote");
            }
            (Verdict::Inconclusive, OnInconclusive::Rollback) => {
                let because =
                    format!("the evidence did not decide in time: {}", self.status.evidence_summary);
                self.fail(because);
            }
            (Verdict::Inconclusive, OnInconclusive::Hold) | (Verdict::Fail, _) => {}
        }
    }

    /// `decided`: who decided so, where the judge did not.
    pub(super) fn next_step(&mut self, decided: &str) {
        self.status.step += 1;
        self.status.step_started = None;
        if self.step().is_none() {
            self.promote("passed every step");
            // Empty where no step has sent the version anything.
            let evidence = self.status.evidence_summary.as_str();
            self.status.promoted_because = match (decided, evidence) {
                ("", only) | (only, "") => only.to_owned(),
                (decided, evidence) => format!("{decided}; {evidence}"),
            };
        }
    }
}

/// What users read where no sidecar could share out requests.
pub(super) const CLIENTLESS: &str = "no client with a sidecar sends requests to the target's Services, so there is nothing to share out and nothing to judge: give its clients, such as the ingress, a sidecar, or decide with promote@ID or abort@ID in the annotation tulle.dev/action";

/// Whether no Service selects the pods of the target. Without pods that is unknown.
pub(super) fn has_no_service(target: &WorkloadSeen) -> bool {
    target.services.is_empty() && !target.pods.is_empty()
}

/// What holds a step whose requests are too few to say anything about its weight.
fn few_requests(since: u64) -> String {
    match since {
        0 => "; no request to it since this step began".to_owned(),
        1 => "; only 1 request to it since this step began".to_owned(),
        some => format!("; only {some} requests to it since this step began"),
    }
}

/// A duration as people say it.
fn roughly(seconds: f64) -> String {
    match seconds {
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.0} h", s / 3600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::few_requests;

    #[test]
    fn the_requests_of_a_step_are_counted_and_not_called_hardly_any() {
        assert_eq!(few_requests(19), "; only 19 requests to it since this step began");
        assert_eq!(few_requests(1), "; only 1 request to it since this step began");
        assert_eq!(few_requests(0), "; no request to it since this step began");
    }
}
