//! Kubernetes objects in, what each sidecar must know out. No client, no clock, no I/O: objects come
//! by `apply` and `delete`, views are computed when asked for.
//!
//! ```text
//!   object      objects as they are kept: the few fields that are used
//!   policy      which policy's section holds for a pod
//!   view        resources for sidecars, versioned by their content
//!   rollout     what the rollout machine wants to know of a workload
//!   uninjected  pods without the sidecar that their namespace asks for
//! ```

pub mod object;
mod policy;
mod rollout;
mod uninjected;
mod view;

pub use object::{Endpoint, Namespace, Obstacle, Pod, Revision, Service, Slice, Workload, WorkloadKey};
pub use policy::{PolicyReport, Verdict};
pub use rollout::{PodSeen, WorkloadSeen};
pub use uninjected::{Uninjected, UninjectedPod};
pub use view::{access_summary, target_name};

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use tulle_crds::{Canary, Exemption, MeshConfig, MeshPolicy, MtlsMode};

/// `namespace`, `name`.
pub type Key = (Arc<str>, Arc<str>);

/// What is known of the cluster.
#[derive(Debug, Default)]
pub struct Model {
    settings: Settings,
    config: Option<MeshConfig>,
    /// The namespace of the control plane, which is never meshed.
    own_namespace: Option<Arc<str>>,
    /// The trust domain of the root.
    fixed_trust_domain: Option<String>,
    namespaces: HashMap<Arc<str>, Namespace>,
    pods: HashMap<Arc<str>, Pod>,
    pod_names: HashMap<Key, Arc<str>>,
    pods_by_ip: HashMap<IpAddr, Arc<str>>,
    services: HashMap<Key, Service>,
    services_by_ip: HashMap<IpAddr, Key>,
    slices: HashMap<Key, Slice>,
    slices_by_service: HashMap<Key, Vec<Key>>,
    policies: BTreeMap<Key, MeshPolicy>,
    some_policy_disables_mtls: bool,
    canaries: BTreeMap<Key, Canary>,
    /// Canaries that this build cannot decode: it is unknown which workloads they target.
    unreadable_canaries: BTreeSet<Key>,
    workloads: HashMap<WorkloadKey, Workload>,
    revisions: HashMap<Key, Revision>,
    /// Pods that have begun to end since this model began.
    endings: u64,
}

/// What the MeshConfig says, or its defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The trust domain.
    pub trust_domain: String,
    /// What holds where no policy says otherwise.
    pub mtls: MtlsMode,
    /// How long a leaf lives.
    pub leaf_lifetime: String,
    /// Service accounts whose pods need no sidecar.
    pub exemptions: Vec<Exemption>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: tulle_crds::trust_domain(),
            mtls: MtlsMode::Permissive,
            leaf_lifetime: tulle_crds::Certificates::default().leaf_lifetime,
            exemptions: Vec::new(),
        }
    }
}

impl Model {
    /// An empty model for the control plane in this namespace. The trust domain holds while there is neither
    /// a root nor a MeshConfig.
    pub fn new(namespace: &str, trust_domain: &str) -> Self {
        Self {
            settings: Settings { trust_domain: trust_domain.to_owned(), ..Settings::default() },
            own_namespace: Some(namespace.into()),
            ..Self::default()
        }
    }

    /// The mesh's settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes the MeshConfig over; `None`: the defaults, and the trust domain that the mesh has: whoever deletes
    /// the object must not move every identity to another one.
    pub fn apply_config(&mut self, config: Option<&MeshConfig>) {
        self.config = config.cloned();
        let known = self.settings.trust_domain.clone();
        let fixed = self.fixed_trust_domain.clone();
        let deleted = Settings { trust_domain: known, ..Settings::default() };
        self.settings = config.map_or(deleted, |config| Settings {
            trust_domain: fixed.unwrap_or_else(|| config.spec.trust_domain.clone()),
            mtls: config.spec.mtls,
            leaf_lifetime: config.spec.certificates.leaf_lifetime.clone(),
            exemptions: config.spec.exemptions.clone(),
        });
    }

    /// From here on this is the trust domain: a MeshConfig that was made anew with another one would cut every
    /// connection.
    pub fn fix_trust_domain(&mut self, trust_domain: &str) {
        self.fixed_trust_domain = Some(trust_domain.to_owned());
        self.settings.trust_domain = trust_domain.to_owned();
    }

    /// The MeshConfig, if there is one.
    pub fn config(&self) -> Option<&MeshConfig> {
        self.config.as_ref()
    }

    /// Takes a namespace over.
    pub fn apply_namespace(&mut self, name: Arc<str>, namespace: Namespace) {
        self.namespaces.insert(name, namespace);
    }

    /// Forgets a namespace.
    pub fn delete_namespace(&mut self, name: &str) {
        self.namespaces.remove(name);
    }

    /// Takes a pod over.
    pub fn apply_pod(&mut self, pod: Pod) {
        if pod.terminating && self.pods.get(&pod.uid).is_some_and(|known| !known.terminating) {
            self.endings += 1;
        }
        self.forget_addresses(&pod.uid);
        if pod.has_own_addresses() {
            for ip in &pod.ips {
                self.pods_by_ip.insert(*ip, Arc::clone(&pod.uid));
            }
        }
        self.pod_names.insert((Arc::clone(&pod.namespace), Arc::clone(&pod.name)), Arc::clone(&pod.uid));
        self.pods.insert(Arc::clone(&pod.uid), pod);
    }

    /// Counts up when a pod begins to end: clients should leave it before its process is told.
    pub fn endings(&self) -> u64 {
        self.endings
    }

    /// Forgets a pod.
    pub fn delete_pod(&mut self, uid: &str) {
        self.forget_addresses(uid);
        if let Some(pod) = self.pods.remove(uid) {
            let name = (pod.namespace, pod.name);
            if self.pod_names.get(&name).is_some_and(|known| &**known == uid) {
                self.pod_names.remove(&name);
            }
        }
    }

    fn forget_addresses(&mut self, uid: &str) {
        let Some(old) = self.pods.get(uid) else { return };
        for ip in &old.ips {
            // The address may belong to another pod already.
            if self.pods_by_ip.get(ip).is_some_and(|owner| &**owner == uid) {
                self.pods_by_ip.remove(ip);
            }
        }
    }

    /// A pod.
    pub fn pod(&self, uid: &str) -> Option<&Pod> {
        self.pods.get(uid)
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// Takes a Service over.
    pub fn apply_service(&mut self, key: Key, service: Service) {
        self.delete_service(&key);
        for ip in &service.ips {
            self.services_by_ip.insert(*ip, key.clone());
        }
        self.services.insert(key, service);
    }

    /// Forgets a Service.
    pub fn delete_service(&mut self, key: &Key) {
        if let Some(old) = self.services.remove(key) {
            for ip in &old.ips {
                if self.services_by_ip.get(ip) == Some(key) {
                    self.services_by_ip.remove(ip);
                }
            }
        }
    }

    /// Takes an EndpointSlice over.
    pub fn apply_slice(&mut self, key: Key, slice: Slice) {
        self.delete_slice(&key);
        let service = (Arc::clone(&key.0), Arc::clone(&slice.service));
        self.slices_by_service.entry(service).or_default().push(key.clone());
        self.slices.insert(key, slice);
    }

    /// Forgets an EndpointSlice.
    pub fn delete_slice(&mut self, key: &Key) {
        let Some(old) = self.slices.remove(key) else { return };
        let service = (Arc::clone(&key.0), old.service);
        if let Some(keys) = self.slices_by_service.get_mut(&service) {
            keys.retain(|known| known != key);
            if keys.is_empty() {
                self.slices_by_service.remove(&service);
            }
        }
    }

    /// Takes a policy over.
    pub fn apply_policy(&mut self, key: Key, policy: MeshPolicy) {
        self.policies.insert(key, policy);
        self.policies_changed();
    }

    /// Forgets a policy.
    pub fn delete_policy(&mut self, key: &Key) {
        self.policies.remove(key);
        self.policies_changed();
    }

    fn policies_changed(&mut self) {
        let disables = |policy: &MeshPolicy| policy.spec.mtls == Some(MtlsMode::Disabled);
        self.some_policy_disables_mtls = self.policies.values().any(disables);
    }

    /// All policies.
    pub fn policies(&self) -> impl Iterator<Item = (&Key, &MeshPolicy)> {
        self.policies.iter()
    }

    /// Takes a Canary over.
    pub fn apply_canary(&mut self, key: Key, canary: Canary) {
        self.unreadable_canaries.remove(&key);
        self.canaries.insert(key, canary);
    }

    /// Notes a Canary that this build cannot decode. The last readable version stays in force, and no gate
    /// of its namespace counts as orphaned.
    pub fn mark_canary_unreadable(&mut self, key: Key) {
        self.unreadable_canaries.insert(key);
    }

    /// Forgets a Canary.
    pub fn delete_canary(&mut self, key: &Key) {
        self.unreadable_canaries.remove(key);
        self.canaries.remove(key);
    }

    /// All Canaries.
    pub fn canaries(&self) -> impl Iterator<Item = (&Key, &Canary)> {
        self.canaries.iter()
    }

    /// Takes a workload over.
    pub fn apply_workload(&mut self, key: WorkloadKey, workload: Workload) {
        self.workloads.insert(key, workload);
    }

    /// Forgets a workload.
    pub fn delete_workload(&mut self, key: &WorkloadKey) {
        self.workloads.remove(key);
    }

    /// Takes a ReplicaSet or ControllerRevision over: one revision of a workload.
    pub fn apply_revision(&mut self, key: Key, revision: Revision) {
        self.revisions.insert(key, revision);
    }

    /// Forgets a revision.
    pub fn delete_revision(&mut self, key: &Key) {
        self.revisions.remove(key);
    }
}

#[cfg(test)]
pub(crate) mod tests;
