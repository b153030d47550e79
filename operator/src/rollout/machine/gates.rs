//! Pods behind gates: how many of them a weight needs, which gates are opened and which are shut again.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::SignedDuration;
use tulle_crds::{CanaryStatus, WorkloadKind};
use tulle_mesh::event_reason::EventReason;

use super::steps::Wanted;
use super::{Action, Evaluation, PodName};
use crate::model::{PodSeen, WorkloadSeen};
use crate::rollout::exposure::is_exposed;

/// The condition that tells whether the new revision has the pods that its step needs.
pub(super) const CAPACITY: &str = "Capacity";
/// Pods that are missing for longer are worth an event.
const SHORT_FOR: SignedDuration = SignedDuration::from_secs(60);
/// How the message ends from then on, so that the event is published once.
const LASTING: &str = "; this has lasted for more than a minute";

/// The reason of [`CAPACITY`] where pods that take traffic are too few and the step does not wait for others.
const FEWER: &str = "FewerPods";
/// The reason of [`CAPACITY`] where pods are missing no more.
const ENOUGH: &str = "EnoughPods";
/// What it says then.
const HAS_PODS: &str = "the new revision has the pods that its weight needs";
/// A pod that crashes again and again is ready for a few seconds each time. One that stays so for longer has come back.
pub(super) const STEADY_AFTER: SignedDuration = SignedDuration::from_secs(30);

/// Whether no gate of ours holds a pod back.
pub(super) fn is_ungated(pod: &PodSeen) -> bool {
    !pod.parked && !pod.opened
}

/// Whether a step waits for pods.
pub(super) fn is_short_of_pods(status: &CanaryStatus) -> bool {
    let waits = |condition: &Condition| condition.status == "False" && condition.reason != FEWER;
    status.conditions.iter().any(|condition| condition.type_ == CAPACITY && waits(condition))
}

/// What an action says of a pod.
pub(super) fn name(pod: &PodSeen) -> PodName {
    PodName { name: pod.name.clone(), uid: pod.uid.to_string() }
}

/// Pods that a share of the requests needs.
fn pods_for(percent: u32, replicas: u32, headroom: f64, most: usize) -> usize {
    let pods = f64::from(percent.min(100)) / 100.0 * f64::from(replicas) * headroom;
    (pods.ceil() as usize).min(most).max(usize::from(percent > 0))
}

impl Evaluation<'_> {
    /// Pods of what is stable: approved, or approved until its successor has taken over.
    pub(super) fn stable_pods<'a>(
        &self,
        target: &'a WorkloadSeen,
    ) -> impl Iterator<Item = &'a PodSeen> + use<'a> {
        let stable = [self.status.approved_revision.clone(), self.status.former_revision.clone()];
        let stable = move |pod: &&PodSeen| {
            !pod.terminating && !pod.revision.is_empty() && stable.contains(&pod.revision)
        };
        target.pods.iter().filter(stable)
    }

    /// Pods of the revision on trial.
    pub(super) fn pods_on_trial<'a>(
        &self,
        target: &'a WorkloadSeen,
    ) -> impl Iterator<Item = &'a PodSeen> + use<'a> {
        self.pods_of(target, &self.status.canary_revision)
    }

    /// Pods of a revision.
    pub(super) fn pods_of<'a>(
        &self,
        target: &'a WorkloadSeen,
        revision: &str,
    ) -> impl Iterator<Item = &'a PodSeen> + use<'a> {
        let revision = revision.to_owned();
        target.pods.iter().filter(move |pod| !pod.terminating && pod.revision == revision)
    }

    /// Pods of revisions that are neither stable nor on trial: a newer version came in the middle.
    fn superseded_pods<'a>(&self, target: &'a WorkloadSeen) -> impl Iterator<Item = &'a PodSeen> + use<'a> {
        let status = &self.status;
        let wanted = [&status.approved_revision, &status.former_revision, &status.canary_revision];
        let wanted = wanted.map(Clone::clone);
        target.pods.iter().filter(move |pod| {
            !pod.terminating && !pod.revision.is_empty() && !wanted.contains(&pod.revision)
        })
    }

    /// Whether the new revision has the pods that a step needs. Where it has not, and stable pods may be given
    /// up, one gate is opened: its workload's controller then replaces one stable pod.
    ///
    /// Copies come on top of the weight. They are no reason to give up a stable pod, because the stable version goes on
    /// answering every request.
    pub(super) fn has_capacity(&mut self, target: &WorkloadSeen, wanted: &Wanted) -> bool {
        let headroom = self.spec.capacity.headroom;
        let mine: Vec<_> = self.pods_on_trial(target).collect();
        let ready = mine.iter().filter(|pod| pod.containers_ready).count();
        let most = self.most_pods(target, mine.len());
        let pods = |percent: u32, headroom: f64| pods_for(percent, target.replicas, headroom, most);
        let needed = self.needed(target, wanted, mine.len());
        if ready >= needed {
            self.no_longer_short();
            self.condition(CAPACITY, true, ENOUGH, HAS_PODS);
            return true;
        }
        let parked = mine.iter().find(|pod| pod.parked && pod.containers_ready);
        if let Some(parked) = parked
            && ready == mine.len()
            && ready < pods(wanted.weight, headroom)
            && self.may_give_up_one(target, wanted.weight, ready < pods(wanted.weight, 1.0))
        {
            self.actions.push(Action::OpenGate(name(parked)));
        }
        let message = self.shortage(wanted, needed, ready, mine.len());
        self.show_shortage(EventReason::TooFewPods.name(), message, None);
        // Where users look first. The judge's sentence was written anew at this look, if there is one.
        let waits = format!("step {} waits for pods: {ready} of {needed} are ready", self.status.step + 1);
        if is_exposed(&self.status) {
            self.status.evidence_summary.push_str("; ");
            self.status.evidence_summary.push_str(&waits);
        } else {
            self.status.evidence_summary = waits;
        }
        false
    }

    /// How many ready pods of the new revision a step needs. `existing`: how many there are.
    fn needed(&self, target: &WorkloadSeen, wanted: &Wanted, existing: usize) -> usize {
        let most = self.most_pods(target, existing);
        let percent = wanted.weight + wanted.mirror();
        let needed = pods_for(percent, target.replicas, self.spec.capacity.headroom, most);
        needed.max(usize::from(wanted.exposes()))
    }

    /// Whether the new revision has the pods for what flows already. That it has lost some, or that the target was scaled up,
    /// is shown, and no reason to give up a stable pod.
    pub(super) fn show_capacity(&mut self, target: &WorkloadSeen, flows: &Wanted) {
        let existing = self.pods_on_trial(target).count();
        let ready = self.pods_on_trial(target).filter(|pod| pod.containers_ready).count();
        let needed = self.needed(target, flows, existing);
        if ready < needed {
            let message = self.shortage(flows, needed, ready, existing);
            return self.show_shortage(FEWER, message, None);
        }
        if self.has_condition(CAPACITY, false) {
            self.condition(CAPACITY, true, ENOUGH, HAS_PODS);
        }
    }

    /// How many pods a step lacks. Where there are pods that are not ready, with the command that says why; otherwise the
    /// controller of the target has not made them yet.
    fn shortage(&self, wanted: &Wanted, needed: usize, ready: usize, existing: usize) -> String {
        let noun = if needed == 1 { "pod" } else { "pods" };
        let verb = if ready == 1 { "is" } else { "are" };
        let look = match ready < existing {
            true => format!("; see {}", self.pods_command("describe")),
            false => String::new(),
        };
        format!(
            "{} needs {needed} ready {noun} of revision {}, and {ready} {verb} ready{look}{}",
            wanted.summary(),
            self.status.canary_revision,
            self.paused_hint()
        )
    }

    /// No pod of a revision that gets requests is ready, for the first time since `since`.
    pub(super) fn show_unready(&mut self, since: &Time) {
        let (revision, pods) = (&self.status.canary_revision, self.pods_command("describe"));
        let message = format!("no pod of revision {revision} is ready, see {pods}{}", self.paused_hint());
        self.show_shortage(EventReason::TooFewPods.name(), message, Some(since));
    }

    /// Whether there are pods of the approved version, and none of them is ready.
    pub(super) fn is_stable_unready(&self, target: &WorkloadSeen) -> bool {
        let mut pods = self.stable_pods(target).peekable();
        pods.peek().is_some() && !pods.any(|pod| pod.containers_ready)
    }

    /// Neither version has a ready pod: the new one gets requests, and its time begins when another could serve.
    pub(super) fn show_nobody_ready(&mut self) {
        let message = format!(
            "no pod of revision {} is ready, and none of revision {} either, see {}{}",
            self.status.canary_revision,
            self.status.approved_revision,
            self.pods_command("describe"),
            self.paused_hint()
        );
        self.show_shortage(EventReason::TooFewPods.name(), message, None);
    }

    /// The target is scaled to zero in the middle of a rollout, as a user wants it.
    pub(super) fn show_scaled_to_zero(&mut self) {
        let message = "the target is scaled to 0 replicas, and the step waits";
        self.condition(CAPACITY, false, EventReason::TooFewPods.name(), message);
    }

    /// Whether a pod of a revision that had none ready has been ready for long enough. Since when is the transition of the
    /// condition, which [`Self::show_unready`] has made false before.
    pub(super) fn is_steady(&mut self) -> bool {
        let ready = self.status.conditions.iter().find(|c| c.type_ == CAPACITY && c.status == "True");
        let since = ready.map(|condition| condition.last_transition_time.clone());
        let steady = self.elapsed(since.as_ref()) >= STEADY_AFTER;
        let message = if steady {
            HAS_PODS.to_owned()
        } else {
            format!(
                "a pod of revision {} is ready again; the step goes on once one has been for {} s",
                self.status.canary_revision,
                STEADY_AFTER.as_secs()
            )
        };
        self.condition(CAPACITY, true, ENOUGH, &message);
        steady
    }

    /// Whether nothing holds the pods of the new revision back: their controller replaces one stable pod after the other,
    /// whatever the weight. Where one of them has a gate, it stops there.
    pub(super) fn is_ungated_revision(&self, target: &WorkloadSeen) -> bool {
        let mut pods = self.pods_on_trial(target).peekable();
        pods.peek().is_some() && pods.all(is_ungated)
    }

    /// Pods are missing. Most come within seconds; that they do not is an event, once until they have come. `since`: where
    /// it is not the condition that says since when.
    fn show_shortage(&mut self, reason: &str, message: String, since: Option<&Time>) {
        let short = self.status.conditions.iter().find(|c| c.type_ == CAPACITY && c.status == "False");
        let known = short.is_some_and(|c| c.message.ends_with(LASTING));
        let lasts = self.elapsed(since.or(short.map(|c| &c.last_transition_time))) >= SHORT_FOR;
        let message = if lasts { message + LASTING } else { message };
        if lasts && !known {
            self.event(EventReason::TooFewPods, message.clone());
        }
        self.condition(CAPACITY, false, reason, &message);
    }

    /// The step waits for no pods: its weight flows, or something else holds it. Nobody counts
    /// them then, and an old count would let the deadline of the Deployment run.
    pub(super) fn no_longer_short(&mut self) {
        if self.has_condition(CAPACITY, false) {
            self.drop_condition(CAPACITY);
            // At this look the rollout may have failed, and why must stay.
            if self.is_on_trial() && !is_exposed(&self.status) {
                // It said how many pods were missing.
                self.status.evidence_summary.clear();
            }
        }
    }

    /// The most pods that a weight needs. Where stable pods stay until the promotion (blue/green), or the surge
    /// provides them, that is all of the workload's: the switch to 100 % must find all of them ready. Otherwise the
    /// last stable pod, which is never given up, leaves one too few.
    fn most_pods(&self, target: &WorkloadSeen, existing: usize) -> usize {
        let replicas = target.replicas as usize;
        let least = replicas.saturating_sub(1).max(1);
        if self.spec.capacity.keep_stable { replicas.max(1) } else { least.max(existing.min(replicas)) }
    }

    /// Whether one stable pod may go. Those that stay must carry what is left to them, unless the weight itself,
    /// without its headroom, needs the pod. The last one is never given up: there would be nothing to compare
    /// with, and nothing to go back to.
    fn may_give_up_one(&self, target: &WorkloadSeen, weight: u32, needed_by_weight: bool) -> bool {
        // Kubernetes would scale the oldest ReplicaSet first: as long as a superseded pod is Ready, opening a gate
        // would not replace a stable pod but end that one's requests.
        if self.superseded_pods(target).any(|pod| pod.ready) {
            return false;
        }
        let stable = self.stable_pods(target).filter(|pod| pod.ready).count();
        let rest = f64::from(100 - weight.min(100)) / 100.0 * f64::from(target.replicas);
        let floor = (rest.ceil() as usize).max(1);
        !self.spec.capacity.keep_stable && stable > 1 && (stable > floor || needed_by_weight)
    }

    /// Nothing of what is stable waits behind a gate. Nor does what nobody wants any more in a StatefulSet: its
    /// controller replaces no other pod before that one is ready (kubernetes/kubernetes#67250).
    pub(super) fn open_gates(&mut self, target: &WorkloadSeen) {
        let in_order = self.spec.target.kind == WorkloadKind::StatefulSet;
        let given_up =
            |pod: &&PodSeen| in_order && !pod.terminating && Some(&pod.revision) != target.latest.as_ref();
        // Nor is a revision let in whose promotion was aborted, although its pods are stable until they are replaced.
        let failed = self.status.failed_revision.as_str();
        let kept_out = if self.has_stand_in() { "" } else { failed };
        let stable = self.stable_pods(target).filter(|pod| pod.parked && pod.revision != kept_out);
        let stale = target.pods.iter().filter(given_up).filter(|pod| pod.parked);
        let mut names: Vec<PodName> = stable.chain(stale).map(name).collect();
        names.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        names.dedup();
        self.actions.extend(names.into_iter().map(Action::OpenGate));
    }

    /// Pods of superseded revisions that were let into their Services leave them again, as long as something
    /// stable is there to serve. Not in a StatefulSet, whose controller waits for such a pod.
    pub(super) fn shut_superseded(&mut self, target: &WorkloadSeen) {
        let in_order = self.spec.target.kind == WorkloadKind::StatefulSet;
        if in_order || !self.stable_pods(target).any(|pod| pod.ready) {
            return;
        }
        let opened = self.superseded_pods(target).filter(|pod| pod.opened);
        let shut: Vec<Action> = opened.map(|pod| Action::ShutGate(name(pod))).collect();
        self.actions.extend(shut);
    }

    /// Takes pods of a failed revision out of every Service again, for clients without a sidecar, as long as
    /// something stable is there to serve them.
    pub(super) fn shut_gates(&mut self, target: &WorkloadSeen) {
        if !self.stable_pods(target).any(|pod| pod.ready) {
            return;
        }
        let opened = self.pods_on_trial(target).filter(|pod| pod.opened);
        let shut: Vec<Action> = opened.map(|pod| Action::ShutGate(name(pod))).collect();
        self.actions.extend(shut);
    }
}
