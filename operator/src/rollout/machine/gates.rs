//! Pods behind gates: how many of them a weight needs, which gates are opened and which are shut again.

use tulle_crds::WorkloadKind;

use super::{Action, Turn};
use crate::model::{PodSeen, WorkloadSeen};

impl Turn<'_> {
    /// Pods of what is stable: approved, or approved until its successor has taken over.
    pub(super) fn stable_pods<'a>(&self, target: &'a WorkloadSeen) -> impl Iterator<Item = &'a PodSeen> {
        let stable = [self.status.approved_revision.clone(), self.status.former_revision.clone()];
        let stable = move |pod: &&PodSeen| {
            !pod.terminating && !pod.revision.is_empty() && stable.contains(&pod.revision)
        };
        target.pods.iter().filter(stable)
    }

    /// Pods of the revision on trial.
    pub(super) fn pods_on_trial<'a>(&self, target: &'a WorkloadSeen) -> impl Iterator<Item = &'a PodSeen> {
        let revision = self.status.canary_revision.clone();
        target.pods.iter().filter(move |pod| !pod.terminating && pod.revision == revision)
    }

    /// Whether the new revision has the pods that a weight needs. Where it has not, and stable pods
    /// may be given up, one gate is opened: its workload's controller then replaces one stable pod. The last
    /// stable pod is never given up: there would be nothing to compare with, and nothing to go back to.
    pub(super) fn has_capacity(&mut self, target: &WorkloadSeen, weight: u8) -> bool {
        let replicas = target.replicas as usize;
        let wanted = f64::from(weight) / 100.0 * f64::from(target.replicas) * self.spec.capacity.headroom;
        let most = replicas.saturating_sub(1).max(1);
        let needed = (wanted.ceil() as usize).min(most).max(usize::from(weight > 0));
        let mine: Vec<_> = self.pods_on_trial(target).collect();
        let ready = mine.iter().filter(|pod| pod.containers_ready).count();
        if ready >= needed {
            let message = "the new revision has the pods that its weight needs";
            self.condition("Capacity", true, "EnoughPods", message);
            return true;
        }
        let parked = mine.iter().find(|pod| pod.parked && pod.containers_ready);
        let may_give_up = !self.spec.capacity.keep_stable && self.stable_pods(target).count() > 1;
        if let (Some(parked), true, true) = (parked, ready == mine.len(), may_give_up) {
            self.actions.push(Action::OpenGate(parked.name.clone()));
        }
        let message = format!(
            "{weight}% needs {needed} ready pods of revision {}, {ready} are",
            self.status.canary_revision
        );
        self.condition("Capacity", false, "TooFewPods", &message);
        false
    }

    /// Nothing of what is stable waits behind a gate. Nor does what nobody wants any more in a StatefulSet: its
    /// controller replaces no other pod before that one is ready (kubernetes/kubernetes#67250).
    pub(super) fn open_gates(&mut self, target: &WorkloadSeen) {
        let in_order = self.spec.target.kind == WorkloadKind::StatefulSet;
        let given_up =
            |pod: &&PodSeen| in_order && !pod.terminating && Some(&pod.revision) != target.latest.as_ref();
        let stable = self.stable_pods(target).filter(|pod| pod.parked);
        let stale = target.pods.iter().filter(given_up).filter(|pod| pod.parked);
        let mut names: Vec<String> = stable.chain(stale).map(|pod| pod.name.clone()).collect();
        names.sort_unstable();
        names.dedup();
        self.actions.extend(names.into_iter().map(Action::OpenGate));
    }

    /// Takes pods of a failed revision out of every Service again, for clients without a sidecar, as long as
    /// something stable is there to serve them.
    pub(super) fn shut_gates(&mut self, target: &WorkloadSeen) {
        if !self.stable_pods(target).any(|pod| pod.ready) {
            return;
        }
        let opened = self.pods_on_trial(target).filter(|pod| pod.opened);
        let shut: Vec<Action> = opened.map(|pod| Action::ShutGate(pod.name.clone())).collect();
        self.actions.extend(shut);
    }
}
