//! What the rollout machine wants to know of a workload.

use std::sync::Arc;

use tulle_crds::Canary;

use super::{Key, Model, Pod, WorkloadKey};

/// A workload and its pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkloadSeen {
    /// Pods that it wants.
    pub replicas: u32,
    /// Seconds that a new version may take to become ready.
    pub progress_deadline: u32,
    /// The revision of its newest template, once its controller has seen that.
    pub latest: Option<String>,
    /// Its pods that have not ended.
    pub pods: Vec<PodSeen>,
    /// Names of the Services that select it, in order.
    pub services: Vec<String>,
}

/// A pod of the workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSeen {
    /// Its uid.
    pub uid: Arc<str>,
    /// Its name.
    pub name: String,
    /// Its revision.
    pub revision: String,
    /// All its containers are ready.
    pub containers_ready: bool,
    /// It is ready.
    pub ready: bool,
    /// It carries our gate, and the gate is shut.
    pub parked: bool,
    /// It carries our gate, and the gate is open.
    pub opened: bool,
    /// It is being deleted.
    pub terminating: bool,
}

impl Model {
    /// A workload and its pods; `None`: it does not exist.
    pub fn workload(&self, key: &WorkloadKey) -> Option<WorkloadSeen> {
        let workload = self.workloads.get(key)?;
        let revisions = self.revisions_by_workload.get(key).into_iter().flatten();
        let newest = revisions.filter_map(|key| self.revisions.get(key)).max_by_key(|r| r.number);
        let named = workload.update_revision.as_ref().map(ToString::to_string);
        let latest = named.or_else(|| newest.map(|revision| revision.hash.to_string()));
        let mut pods: Vec<PodSeen> = self
            .pods_of(key)
            .map(|pod| PodSeen {
                uid: Arc::clone(&pod.uid),
                name: pod.name.to_string(),
                revision: pod.revision().to_owned(),
                containers_ready: pod.containers_ready,
                ready: pod.ready,
                parked: pod.gated && !pod.gate_open,
                opened: pod.gated && pod.gate_open,
                terminating: pod.terminating,
            })
            .collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Some(WorkloadSeen {
            replicas: workload.replicas,
            progress_deadline: workload.progress_deadline,
            latest: latest.filter(|_| workload.observed),
            pods,
            services: self.services_of(key).iter().map(|(_, name)| name.to_string()).collect(),
        })
    }

    /// The pods of a workload that have not ended.
    pub(super) fn pods_of(&self, key: &WorkloadKey) -> impl Iterator<Item = &Pod> {
        let uids = self.pods_by_workload.get(key).into_iter().flatten();
        uids.filter_map(|uid| self.pods.get(uid)).filter(|pod| !pod.finished)
    }

    /// The Canary of a workload: of several the oldest.
    pub fn canary_of(&self, workload: &WorkloadKey) -> Option<(&Key, &Canary)> {
        self.canaries.get_key_value(self.canaries_by_workload.get(workload)?.first()?)
    }

    /// Pods that wait behind our gate although no Canary holds their workload any more, or one that has not
    /// begun to: the gate must be opened, or the workload would be stuck for ever.
    pub fn orphaned_gates(&self) -> Vec<(String, String)> {
        let watched = |key: &WorkloadKey| {
            let status = self.canary_of(key).and_then(|(_, canary)| canary.status.as_ref());
            status.is_some_and(|status| !status.approved_revision.is_empty())
        };
        let parked =
            self.pods.values().filter(|pod| pod.gated && !pod.gate_open && !pod.finished && !pod.terminating);
        let may_be_held =
            |pod: &&Pod| self.unreadable_canaries.iter().any(|(namespace, _)| *namespace == pod.namespace);
        let parked = parked.filter(|pod| !may_be_held(pod));
        let orphaned = parked.filter(|pod| !pod.workload.as_ref().is_some_and(watched));
        orphaned.map(|pod| (pod.namespace.to_string(), pod.name.to_string())).collect()
    }
}
