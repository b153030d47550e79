//! What serves when no pod of the stable revision is left, and what becomes of a rollout without its target.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{CanarySteering, Phase, RolloutOutcome, reason};
use tulle_mesh::event_reason::EventReason;

use super::gates::{CAPACITY, is_ungated};
use super::held::HELD;
use super::report::SPLIT;
use super::steps::sticky;
use super::unhealthy::HEALTHY;
use super::{Action, Evaluation};
use crate::model::WorkloadSeen;
use crate::rollout::exposure::is_exposed;
use crate::rollout::judge::Verdict;

/// What is stable has no pod left for this long, or the target is gone: the watch may lag, and pods and workloads are
/// replaced by name.
const GONE_AFTER: SignedDuration = SignedDuration::from_secs(10);
/// The condition of a failed revision that serves because nothing else can.
pub(super) const SERVING_FAILED: &str = EventReason::ServingFailedRevision.name();

impl Evaluation<'_> {
    /// Where no pod of what is stable is left (scaled to zero and back, made anew, a strategy that replaces all at
    /// once), a trial would be an outage: the newest revision is all there is. One that has failed serves and stays
    /// Failed, and one that was being judged gets all requests and is judged alone.
    pub(super) fn take_what_is_left(&mut self, target: &WorkloadSeen, latest: &str) {
        if self.is_returning() {
            return self.keep_returning(target);
        }
        let serves_failed = self.status.phase == Phase::Failed && self.status.weight > 0;
        if serves_failed {
            return self.keep_serving(target);
        }
        if latest == self.status.approved_revision || self.stable_pods(target).next().is_some() {
            self.status.stable_gone_since = None;
            return;
        }
        let since = self.status.stable_gone_since.get_or_insert(Time(self.seen.now)).clone();
        let replaced = self.pods_of(target, latest).any(|pod| pod.ready && is_ungated(pod));
        // Kubernetes has put pods without a gate in place of all others: as long as anything is waited for, nobody is served.
        if self.elapsed(Some(&since)) < GONE_AFTER && !replaced {
            return;
        }
        if self.failed_before(latest) {
            return self.serve_failed(target, latest);
        }
        if is_exposed(&self.status) {
            if target.replicas == 0 {
                return;
            }
            if !replaced && self.is_left_alone(target) {
                return self.open_failed(target);
            }
            // What was on trial and did not look good is not approved because the other has gone.
            if self.did_not_look_good() {
                let because = self.status.evidence_summary.clone();
                self.fail(format!("no stable pod is left, and it did not pass: {because}"));
                return self.serve_failed(target, latest);
            }
            // An autoscaler has taken the last stable pod: Kubernetes counts pods whose gates were opened, and scales the
            // old ReplicaSet down first.
            if !replaced && self.judge().verdict != Verdict::Pass {
                return self.go_on_alone(target);
            }
        }
        self.status.stable_gone_since = None;
        let mut because =
            format!("no pod of revision {} is left to compare with", self.status.approved_revision);
        if replaced {
            because.push_str(
                ": pods of the new revision have no readiness gate, so Kubernetes has replaced all others",
            );
        }
        self.event(
            EventReason::NothingToCompareWith,
            format!("revision {latest} takes all traffic: {because}"),
        );
        self.status.evidence_summary.clone_from(&because);
        self.promote(&because);
    }

    /// Whether something speaks against what is on trial. Before there were requests enough for a verdict, one failure
    /// says nothing.
    fn did_not_look_good(&self) -> bool {
        if self.status.evidence.canary.failures == 0 {
            return false;
        }
        let judged = self.judge();
        judged.verdict == Verdict::Fail || judged.held || judged.doubted || self.fails_mostly()
    }

    /// Whether what is on trial gets every request because no stable pod is left.
    pub(super) fn is_left_alone(&self, target: &WorkloadSeen) -> bool {
        self.is_on_trial() && self.status.weight >= 100 && self.stable_pods(target).next().is_none()
    }

    /// Whether nothing else than what is on trial could take the requests that it has all of. What is stable may be back
    /// and not be ready.
    pub(super) fn keeps_all_requests(&self, target: &WorkloadSeen) -> bool {
        self.is_on_trial()
            && self.status.weight >= 100
            && !self.stable_pods(target).any(|pod| pod.containers_ready)
    }

    /// Whether what is on trial, or has failed, serves in place of the stable revision, of which no pod could.
    pub(super) fn serves_alone(&self) -> bool {
        let Some(target) = &self.seen.target else { return false };
        let is_sent = (self.is_on_trial() || self.status.phase == Phase::Failed) && is_exposed(&self.status);
        let mut stable = self.stable_pods(target).peekable();
        let is_alone = match self.status.weight {
            // The pods that come may be seen before the template that they are of.
            100.. => !stable.any(|pod| pod.containers_ready),
            _ => stable.peek().is_none(),
        };
        is_sent && is_alone && self.pods_on_trial(target).any(|pod| pod.containers_ready)
    }

    /// Whether the former revision is one that nobody has approved, and serves because no pod of the approved one is left.
    pub(super) fn has_stand_in(&self) -> bool {
        let Some(target) = &self.seen.target else { return false };
        let (approved, former) = (&self.status.approved_revision, &self.status.former_revision);
        let has_pods = |revision: &str| self.pods_of(target, revision).next().is_some();
        !former.is_empty()
            && *former != self.status.canary_revision
            && !self.status.approved_before.contains(former)
            && has_pods(former)
            && !has_pods(approved)
    }

    /// A revision that served in place of the stable one is the newest again: no look may pass without it.
    pub(super) fn go_on_serving(&mut self, latest: &str) {
        self.status.stable_gone_since = Some(Time(self.seen.now - GONE_AFTER));
        // One that has failed is served as such.
        if !self.failed_before(latest) {
            let steering = CanarySteering { sticky: sticky(self.spec), ..CanarySteering::default() };
            self.expose(100, (steering != CanarySteering::default()).then_some(steering));
        }
    }

    /// The trial goes on at a weight of 100, through the steps that are left, until it passes or fails or a user decides. Before
    /// one of its pods could serve, nobody can.
    fn go_on_alone(&mut self, target: &WorkloadSeen) {
        if !self.pods_on_trial(target).any(|pod| pod.containers_ready) {
            return;
        }
        self.open_failed(target);
        let steering = CanarySteering {
            mirror: 0,
            sticky: sticky(self.spec),
            ..self.status.steering.clone().unwrap_or_default()
        };
        self.expose(100, (steering != CanarySteering::default()).then_some(steering));
        let (promote, abort) = (self.action_command("promote"), self.action_command("abort"));
        let message = format!(
            "revision {} takes all traffic and stays on trial: no pod of revision {} is left to compare with (the target was scaled down, or its pods are replaced without a surge); {promote} accepts it, {abort} fails it",
            self.status.canary_revision, self.status.approved_revision
        );
        self.event(EventReason::NothingToCompareWith, message);
    }

    /// A target that is gone ends its rollout. A workload of the same name that comes later has pods of its own.
    pub(super) fn without_target(&mut self) {
        let message =
            format!("{} not found in this namespace; waiting for it to be created", self.status.target);
        self.condition("Ready", false, reason::TARGET_NOT_FOUND, &message);
        let ready = self.status.conditions.iter().find(|condition| condition.type_ == "Ready");
        let since = ready.map(|condition| condition.last_transition_time.clone());
        // A revision that has failed stays so.
        let at_end = matches!(self.status.phase, Phase::Waiting | Phase::Failed);
        if at_end || self.elapsed(since.as_ref()) < GONE_AFTER {
            return;
        }
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting) {
            let because = "the target was deleted";
            self.remember(RolloutOutcome::Superseded, because);
            because.clone_into(&mut self.status.evidence_summary);
            self.resume_clock();
            self.no_longer_late();
            self.change_weight(0);
            self.nothing_acknowledged();
            self.status.canary_revision.clear();
            // It goes through the steps again when the target comes back with it, unless it is approved.
            self.status.decided_revision.clear();
            self.status.unready_since = None;
        }
        self.status.stable_gone_since = None;
        self.status.phase = Phase::Waiting;
        self.drop_condition(CAPACITY);
        self.drop_condition(HELD);
        self.drop_condition(SPLIT);
        self.drop_condition(HEALTHY);
        self.show_paused();
    }

    fn serve_failed(&mut self, target: &WorkloadSeen, latest: &str) {
        if !self.pods_of(target, latest).any(|pod| pod.containers_ready) {
            return;
        }
        let last = self.status.history.iter().find(|entry| entry.revision == latest);
        let why = last.map_or_else(String::new, |entry| entry.because.clone());
        let stable = self.status.approved_revision.clone();
        if self.status.phase != Phase::Failed {
            self.fail(format!("it has failed before ({why})"));
        }
        self.status.canary_revision = latest.to_owned();
        self.status.failed_revision = latest.to_owned();
        let message = format!(
            "revision {latest} failed ({why}) and serves because no pod of revision {stable} is left: deploy a good version, or tulle.dev/action=promote@ID accepts this one"
        );
        self.change_weight(100);
        self.condition(SERVING_FAILED, true, SERVING_FAILED, &message);
        self.condition("Promoted", false, EventReason::Failed.name(), &message);
        self.event(EventReason::ServingFailedRevision, message);
        self.open_failed(target);
    }

    /// Until a stable pod is ready again.
    fn keep_serving(&mut self, target: &WorkloadSeen) {
        if !self.stable_pods(target).any(|pod| pod.ready) {
            return self.open_failed(target);
        }
        self.status.stable_gone_since = None;
        self.change_weight(0);
        self.status.step_started = Some(Time(self.seen.now));
        let (failed, stable) = (self.status.canary_revision.clone(), self.status.approved_revision.clone());
        self.serves_no_more(EventReason::StableIsBack.name());
        let message = format!("revision {failed} gets no traffic: pods of revision {stable} are ready again");
        self.event(EventReason::StableIsBack, message);
    }

    /// Nothing but this revision can serve, also clients without a sidecar.
    pub(super) fn open_failed(&mut self, target: &WorkloadSeen) {
        let revision = self.status.canary_revision.clone();
        let parked = self.pods_of(target, &revision).filter(|pod| pod.parked);
        let opened: Vec<Action> = parked.map(|pod| Action::OpenGate(super::gates::name(pod))).collect();
        self.actions.extend(opened);
    }

    /// Something else serves from now on.
    pub(super) fn serves_no_more(&mut self, reason: &str) {
        if self.has_condition(SERVING_FAILED, true) {
            self.condition(SERVING_FAILED, false, reason, "the failed revision gets no traffic");
        }
    }
}
