//! The pods of a Canary's target, as the tree shows them.

use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::core::Selector;
use kube::{Api, Client};
use serde::Serialize;
use serde_json::Value;
use tulle_crds::{CanaryTarget, WorkloadKind, keys};

use crate::cluster::failure::cannot;
use crate::exit::CliError;
use crate::objects::Kind;

/// A pod of the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSeen {
    pub(super) name: String,
    /// As in the Canary's status.
    pub(super) revision: String,
    pub(super) ready: bool,
    /// Whether it would be ready but for its shut gate: its containers are ready, and other readiness gates open.
    pub(super) held: bool,
    pub(super) terminating: bool,
    /// Why it is not ready, where Kubernetes says so: `web: ImagePullBackOff`, `Unschedulable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) why: Option<String>,
    pub(super) gate: Gate,
    /// Of its container with the most.
    pub(super) restarts: i32,
    /// Unix seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) created: Option<i64>,
}

/// The readiness gate that keeps a revision without traffic until the rollout admits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Gate {
    /// The pod has none: its revision was approved when it was made.
    None,
    Shut,
    Open,
}

impl Gate {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Shut => "shut",
            Self::Open => "open",
        }
    }
}

impl PodSeen {
    pub(super) fn of(pod: &Pod, kind: WorkloadKind) -> Self {
        let label = match kind {
            WorkloadKind::Deployment => "pod-template-hash",
            WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => "controller-revision-hash",
        };
        let status = pod.status.as_ref();
        let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
        let holds = |type_: &str| conditions.iter().any(|c| c.type_ == type_ && c.status == "True");
        let gates = pod.spec.as_ref().and_then(|spec| spec.readiness_gates.as_deref()).unwrap_or_default();
        let gate = match gates.iter().any(|gate| gate.condition_type == keys::GATE) {
            false => Gate::None,
            true if holds(keys::GATE) => Gate::Open,
            true => Gate::Shut,
        };
        let others_open =
            gates.iter().all(|gate| gate.condition_type == keys::GATE || holds(&gate.condition_type));
        let ready = holds("Ready");
        let containers = status.and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
        let meta = &pod.metadata;
        Self {
            name: meta.name.clone().unwrap_or_default(),
            revision: meta.labels.as_ref().and_then(|labels| labels.get(label)).cloned().unwrap_or_default(),
            ready,
            held: !ready && gate == Gate::Shut && holds("ContainersReady") && others_open,
            terminating: meta.deletion_timestamp.is_some(),
            why: status.filter(|_| !ready).and_then(why),
            gate,
            restarts: containers.iter().map(|container| container.restart_count).max().unwrap_or(0),
            created: meta.creation_timestamp.as_ref().map(|created| created.0.as_second()),
        }
    }

    /// Whether it would be ready but for its shut gate, and stays.
    pub(super) fn is_held(&self) -> bool {
        self.held && !self.terminating
    }

    /// Its age.
    pub(super) fn age(&self, now: Timestamp) -> String {
        super::age(self.created.map(|created| now.as_second().saturating_sub(created)))
    }
}

/// Why a pod is not ready: it has no node, or the first of its containers that does not run.
fn why(status: &PodStatus) -> Option<String> {
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let without_node = conditions.iter().find(|c| c.type_ == "PodScheduled" && c.status == "False");
    if let Some(reason) = without_node.and_then(|condition| condition.reason.clone()) {
        return Some(reason);
    }
    let containers = [&status.init_container_statuses, &status.container_statuses].into_iter();
    let stuck = |container: &ContainerStatus| Some(format!("{}: {}", container.name, stopped(container)?));
    containers.flatten().flatten().find_map(stuck)
}

/// Why a container does not run.
fn stopped(container: &ContainerStatus) -> Option<&str> {
    let state = container.state.as_ref()?;
    // It waits for an init container, which says more.
    let waiting = state.waiting.as_ref().and_then(|waiting| waiting.reason.as_deref());
    let waiting = waiting.filter(|reason| *reason != "PodInitializing");
    let failed = state.terminated.as_ref().filter(|ended| ended.exit_code != 0);
    waiting.or_else(|| failed.and_then(|ended| ended.reason.as_deref()))
}

/// What a Canary's target is at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Target {
    /// Its pods, by name.
    pub(super) pods: Vec<PodSeen>,
    /// Whether its controller has seen its present template.
    pub(super) observed: bool,
}

impl Target {
    /// Whether nothing but this revision is there or about to come.
    pub(super) fn has_only(&self, revision: &str) -> bool {
        let is_other = |pod: &PodSeen| !pod.terminating && pod.revision != revision;
        self.observed && !self.pods.iter().any(is_other)
    }
}

/// The target and its pods. None of them where the target does not exist.
pub(super) async fn look(
    client: &Client,
    namespace: &str,
    target: &CanaryTarget,
) -> Result<Target, CliError> {
    let what = format!("read {} {namespace}/{}", target.kind.name(), target.name);
    let workloads = Kind::from(target.kind).api(client, Some(namespace));
    let workload = workloads.get_opt(&target.name).await;
    let Some(workload) = workload.map_err(|error| cannot(&what, &error))? else {
        return Ok(Target { pods: Vec::new(), observed: true });
    };
    let Some(selector) = workload.data.pointer("/spec/selector").and_then(selector) else {
        return Err(CliError::failed(format!("cannot {what}: it has no selector")));
    };
    let observed = is_observed(workload.metadata.generation, &workload.data);
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let found = api.list(&ListParams::default().labels_from(&selector)).await;
    let found = found.map_err(|error| cannot(&format!("list pods in {namespace}"), &error))?;
    let mut pods: Vec<PodSeen> = found.items.iter().map(|pod| PodSeen::of(pod, target.kind)).collect();
    pods.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Target { pods, observed })
}

/// Whether the controller of a workload has seen this generation of it.
pub(super) fn is_observed(generation: Option<i64>, workload: &Value) -> bool {
    let observed = workload.pointer("/status/observedGeneration").and_then(Value::as_i64);
    observed.unwrap_or(0) >= generation.unwrap_or(0)
}

fn selector(value: &Value) -> Option<Selector> {
    let selector: LabelSelector = serde_json::from_value(value.clone()).ok()?;
    selector.try_into().ok()
}
