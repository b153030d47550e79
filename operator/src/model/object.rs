//! Objects as they are kept: the few fields that are used. 10,000 pods as whole Kubernetes objects
//! cost 948 MB, as these 14.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use tulle_crds::{WorkloadKind, keys};
use tulle_mesh::query::Party;

/// A namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// It is being deleted: nothing can be created in it any more.
    pub terminating: bool,
}

/// What a namespace asks of its new pods, by its label `tulle.dev/inject`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// They get a sidecar, unless they opt out or cannot have one.
    Enabled,
    /// They get a sidecar or are rejected.
    Required,
}

impl Namespace {
    /// What its label asks for.
    pub fn injection(&self) -> Option<Injection> {
        match self.labels.get(keys::INJECT).map(String::as_str) {
            Some("enabled") => Some(Injection::Enabled),
            Some("required") => Some(Injection::Required),
            _ => None,
        }
    }
}

/// Kubelet sets the start of a pod and its first conditions in one step, and times have whole seconds.
const STARTS_WITHIN: i64 = 2;

/// What keeps a pod from ever having a sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Obstacle {
    /// It mirrors a static pod, which kubelet started from a file and no webhook has seen.
    Mirror,
    /// It shares the node's network.
    HostNetwork,
    /// It runs on Windows.
    Windows,
    /// It has the sidecar of another mesh.
    OtherMesh,
}

/// The restarts of a container of the application: of several containers the one that crashes, or has crashed most often.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crashes {
    /// The name of the container.
    pub container: Arc<str>,
    /// How often kubelet has restarted it.
    pub restarts: u32,
    /// Kubelet waits before it starts the container again (`CrashLoopBackOff`).
    pub is_looping: bool,
    /// When it last ended, in seconds since 1970; 0: not known.
    pub last_unix: i64,
}

/// A pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its uid.
    pub uid: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its service account.
    pub service_account: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
    /// Its labels.
    pub labels: Box<[(Arc<str>, Arc<str>)]>,
    /// Its addresses.
    pub ips: Box<[IpAddr]>,
    /// The workload that it belongs to.
    pub workload: Option<WorkloadKey>,
    /// It shares the node's network: its address is the node's.
    pub host_network: bool,
    /// It has a sidecar.
    pub injected: bool,
    /// What keeps it from having one, beside `host_network`. One byte, computed when the pod is decoded.
    pub obstacle: Option<Obstacle>,
    /// Ports of it that its sidecar does not see.
    pub skipped_ports: Box<[u16]>,
    /// TCP ports that its containers declare, without those of the sidecar; none if one of them declares none. A container
    /// may listen at others.
    pub declared_ports: Box<[u16]>,
    /// All its containers are ready, whatever its gates say.
    pub containers_ready: bool,
    /// When they became so, or ceased to be, in seconds since 1970; 0: not known.
    pub containers_since_unix: i64,
    /// Restarts of its containers; `None`: there were none. In a box, because most pods have none.
    pub crashes: Option<Box<Crashes>>,
    /// It is ready.
    pub ready: bool,
    /// When it became ready, in seconds since 1970; 0: it is not, or nobody knows.
    pub ready_unix: i64,
    /// When its node took it, or else when it was created, in seconds since 1970; 0: not known.
    pub started_unix: i64,
    /// It is being deleted.
    pub terminating: bool,
    /// It has ended.
    pub finished: bool,
    /// It carries our gate.
    pub gated: bool,
    /// Its gate is open.
    pub gate_open: bool,
    /// So are the readiness gates that others have given it.
    pub other_gates_open: bool,
}

impl Pod {
    /// Whether its addresses are its own: a pod on the node's network, or one that has ended, has none.
    pub fn has_own_addresses(&self) -> bool {
        !self.host_network && !self.finished
    }

    /// Whether it has a sidecar and has not ended.
    pub fn has_running_sidecar(&self) -> bool {
        self.injected && !self.finished
    }

    /// Since when all containers of the pod are ready, or are not any more, in seconds since 1970. `None`: it is not known,
    /// or they have never been ready.
    pub fn containers_since(&self) -> Option<i64> {
        let since = self.containers_since_unix;
        // The condition of a pod that starts is as old as its start.
        let was_ready = self.containers_ready || since > self.started_unix.saturating_add(STARTS_WITHIN);
        (since > 0 && was_ready).then_some(since)
    }

    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(key, _)| &**key == name).map(|(_, value)| &**value)
    }

    /// Whether it carries all of these labels.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        labels.iter().all(|(key, value)| self.label(key) == Some(value))
    }

    /// The workload that it belongs to, as answers name it: the pod itself where it has none.
    pub fn party(&self) -> Party {
        let (kind, name) = match &self.workload {
            Some(workload) => (workload.kind.name(), &workload.name),
            None => ("Pod", &self.name),
        };
        Party { namespace: self.namespace.to_string(), kind: kind.to_owned(), name: name.to_string() }
    }

    /// Whether it waits behind our gate.
    pub fn is_parked(&self) -> bool {
        self.gated && !self.gate_open
    }

    /// Whether our gate is all that it has ever waited for: it is ready as soon as that opens, which its EndpointSlices
    /// say only after kubelet and two controllers have noticed.
    pub fn is_let_in(&self) -> bool {
        self.gated && self.gate_open && self.other_gates_open && self.containers_ready && !self.finished
    }

    /// Its revision, as its workload's controller names it.
    pub fn revision(&self) -> &str {
        self.label("pod-template-hash").or_else(|| self.label("controller-revision-hash")).unwrap_or("")
    }
}

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Its uid.
    pub uid: Arc<str>,
    /// When it was created, in seconds since 1970: of two that claim an address the older keeps it.
    pub created: i64,
    /// Its cluster addresses, which no other Service can have.
    pub cluster_ips: Vec<IpAddr>,
    /// Its external and load-balancer addresses, which anybody who may write a Service can claim.
    pub other_ips: Vec<IpAddr>,
    /// `clusterIP: None`: clients dial its pods by their own addresses.
    pub headless: bool,
    /// Its TCP ports.
    pub ports: Vec<ServicePort>,
    /// Labels of the pods that it selects.
    pub selector: BTreeMap<String, String>,
    /// `internalTrafficPolicy: Local`.
    pub local_only: bool,
    /// `sessionAffinity: ClientIP`: for how long; 0: none.
    pub affinity_seconds: u32,
    /// Which endpoints its clients use rather than others.
    pub distribution: Distribution,
}

/// Which endpoints clients use rather than others: `trafficDistribution` of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// All alike.
    #[default]
    Any,
    /// Those in the client's zone.
    SameZone,
    /// Those on the client's node.
    SameNode,
}

impl Distribution {
    /// As a Service has it. A value that this build does not know prefers none.
    pub fn of(text: Option<&str>) -> Self {
        match text {
            Some("PreferClose" | "PreferSameZone") => Self::SameZone,
            Some("PreferSameNode") => Self::SameNode,
            _ => Self::Any,
        }
    }
}

impl Service {
    /// All its addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.cluster_ips.iter().chain(&self.other_ips).copied()
    }

    /// Whether it selects a pod. One without a selector selects none.
    pub fn selects(&self, pod: &Pod) -> bool {
        !self.selector.is_empty() && pod.matches(&self.selector)
    }
}

/// A port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; slices name it the same.
    pub name: String,
    /// Its number.
    pub port: u16,
    /// What is spoken there, if declared.
    pub app_protocol: Option<String>,
}

/// An EndpointSlice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slice {
    /// The Service that it belongs to.
    pub service: Arc<str>,
    /// Port names and numbers.
    pub ports: Vec<(String, u16)>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its first address; the others mean the same (KEP-752).
    pub address: Option<IpAddr>,
    /// Takes traffic.
    pub ready: bool,
    /// Would take traffic were it not terminating.
    pub serving: bool,
    /// Is going.
    pub terminating: bool,
    /// Its node.
    pub node: Arc<str>,
    /// Its zone.
    pub zone: Arc<str>,
    /// Zones whose clients should use it, as the slice's hints say. Empty: no hints.
    pub for_zones: Box<[Arc<str>]>,
    /// Nodes whose clients should use it, as the slice's hints say. Empty: no hints.
    pub for_nodes: Box<[Arc<str>]>,
    /// The uid of the pod that it names (`targetRef`).
    pub pod_uid: Option<Arc<str>>,
}

/// A workload by kind, namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WorkloadKey {
    /// Its kind.
    pub kind: WorkloadKind,
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

/// A workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Pods that it wants.
    pub replicas: u32,
    /// Seconds that a new version may take to become ready.
    pub progress_deadline: u32,
    /// Its controller has seen the newest template.
    pub observed: bool,
    /// The revision that its controller rolls out, where the status names it (StatefulSet).
    pub update_revision: Option<Arc<str>>,
}

/// One revision of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision {
    /// Whose.
    pub owner: WorkloadKey,
    /// As pods are labelled with it.
    pub hash: Arc<str>,
    /// Counts up; a revision that is rolled back to gets a new number.
    pub number: u64,
}
