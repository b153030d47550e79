//! What the rollout machine wants to know of a workload.

use std::sync::Arc;

use tulle_crds::Canary;

use super::{Crashes, Key, Model, Pod, Service, WorkloadKey};

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
    /// Since when all its containers are ready, or are not any more, in seconds since 1970. `None`: it is not known, or
    /// they have never been ready.
    pub containers_since: Option<i64>,
    /// Restarts of its containers.
    pub crashes: Option<Box<Crashes>>,
    /// No Service that selects the workload selects it.
    pub unselected: Option<Unselected>,
}

/// Why a Service does not select a pod of a workload that it selects otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unselected {
    /// The name of the Service: of several the first.
    pub service: String,
    /// The first label of its selector that the pod does not have, as `key=value`.
    pub label: String,
}

impl Model {
    /// A workload and its pods; `None`: it does not exist.
    pub fn workload(&self, key: &WorkloadKey) -> Option<WorkloadSeen> {
        let workload = self.workloads.get(key)?;
        let revisions = self.revisions_by_workload.get(key).into_iter().flatten();
        let newest = revisions.filter_map(|key| self.revisions.get(key)).max_by_key(|r| r.number);
        let named = workload.update_revision.as_ref().map(ToString::to_string);
        let latest = named.or_else(|| newest.map(|revision| revision.hash.to_string()));
        let services: Vec<(&Key, &Service)> = self
            .services_of(key)
            .into_iter()
            .filter_map(|key| self.services.get(key).map(|service| (key, service)))
            .collect();
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
                containers_since: pod.containers_since(),
                crashes: pod.crashes.clone(),
                unselected: unselected(&services, pod),
            })
            .collect();
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Some(WorkloadSeen {
            replicas: workload.replicas,
            progress_deadline: workload.progress_deadline,
            latest: latest.filter(|_| workload.observed),
            pods,
            services: services.iter().map(|((_, name), _)| name.to_string()).collect(),
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

/// The Service that should select a pod, if no Service of the workload does. A Service without a selector is left out of
/// this, because somebody else makes its endpoints.
fn unselected(services: &[(&Key, &Service)], pod: &Pod) -> Option<Unselected> {
    let is_open = |service: &Service| service.selector.is_empty() || pod.matches(&service.selector);
    if services.iter().any(|(_, service)| is_open(service)) {
        return None;
    }
    let ((_, name), service) = services.first()?;
    let (key, value) = service.selector.iter().find(|(key, value)| pod.label(key) != Some(value.as_str()))?;
    Some(Unselected { service: name.to_string(), label: format!("{key}={value}") })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn service(selector: &[(&str, &str)]) -> Service {
        let selector: BTreeMap<String, String> =
            selector.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Service { selector, ..Service::default() }
    }

    #[test]
    fn a_pod_that_no_service_of_its_workload_selects_is_known_with_the_label_that_it_lacks() {
        let pod = Pod {
            labels: Box::new([("app".into(), "web".into()), ("track".into(), "canary".into())]),
            ..Pod::default()
        };
        let names: [Key; 2] = [("shop".into(), "web".into()), ("shop".into(), "web-all".into())];
        let stable = service(&[("app", "web"), ("track", "stable")]);
        let all = service(&[("app", "web")]);
        let found = unselected(&[(&names[0], &stable)], &pod);
        let lacking = Unselected { service: "web".to_owned(), label: "track=stable".to_owned() };
        assert_eq!(found, Some(lacking));
        assert_eq!(unselected(&[(&names[0], &stable), (&names[1], &all)], &pod), None);
        assert_eq!(unselected(&[(&names[0], &service(&[]))], &pod), None, "its endpoints are made by hand");
        assert_eq!(unselected(&[], &pod), None);
    }

    #[test]
    fn a_pod_that_starts_has_not_ceased_to_be_ready() {
        let pod = Pod { started_unix: 100, containers_since_unix: 101, ..Pod::default() };
        assert_eq!(pod.containers_since(), None);
        let fallen = Pod { containers_since_unix: 160, ..pod.clone() };
        assert_eq!(fallen.containers_since(), Some(160));
        let ready = Pod { containers_ready: true, ..pod };
        assert_eq!(ready.containers_since(), Some(101));
    }
}
