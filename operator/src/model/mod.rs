//! Kubernetes objects in, what each sidecar must know out. No client, no clock, no I/O: objects come
//! by `apply` and `delete`, views are computed when asked for.
//!
//! ```text
//!   object      objects as they are kept: the few fields that are used
//!   touched     what a change may have altered
//!   address     whose an address is
//!   selection   which pods each policy selects, and the version of it that holds
//!   policy      which policy's section holds for a pod
//!   view        resources for sidecars, versioned by their content
//!   routes      where a dialled address leads, and where the pods behind a Service's port are
//!   gateway     routes of the Gateway API: the rules of a Service's port
//!   traffic     what policies say about traffic to a Service
//!   sections    what a pod enforces, section by section
//!   split       shares of revisions, and what stands in their way
//!   rollout     what the rollout machine wants to know of a workload
//!   uninjected  pods without the sidecar that their namespace asks for
//! ```

mod address;
pub mod gateway;
pub mod object;
mod policy;
mod rollout;
mod routes;
mod sections;
mod selection;
mod split;
mod touched;
mod traffic;
mod uninjected;
mod view;

pub use address::Collision;
pub(crate) use address::Owner;
pub use object::{
    Crashes, Distribution, Endpoint, Namespace, Obstacle, Pod, Revision, Service, Slice, Workload,
    WorkloadKey,
};
pub(crate) use policy::specificity;
pub use policy::{PolicyReport, Verdict};
pub use rollout::{PodSeen, Unselected, WorkloadSeen};
pub use routes::{EndpointsName, NotEndpoints};
pub use sections::Sections;
pub use selection::Unreadable;
pub use split::{Dialled, SharedAddress, Sides, SplitObstacle};
pub use touched::{Compiled, Dependency, Touched, Variant};
pub use uninjected::{Uninjected, UninjectedPod};
pub use view::{access_summary, target_name};

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use tulle_crds::{Canary, CanaryStatus, Exemption, MeshConfig, MeshPolicy, MtlsMode, Tracing, by_age};

use gateway::Gateway;
use selection::InForce;
use touched::{PodViews, redeclared};

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
    /// Zones of nodes.
    nodes: HashMap<Arc<str>, Arc<str>>,
    pods: HashMap<Arc<str>, Pod>,
    pod_names: HashMap<Key, Arc<str>>,
    pods_by_ip: HashMap<IpAddr, Arc<str>>,
    pods_by_namespace: HashMap<Arc<str>, HashSet<Arc<str>>>,
    /// How many pods with a sidecar, and not finished, each namespace has.
    sidecars: HashMap<Arc<str>, u32>,
    pods_by_workload: HashMap<WorkloadKey, HashSet<Arc<str>>>,
    services: BTreeMap<Key, Service>,
    /// Services by each address that they claim, whether it is theirs or not.
    claims: HashMap<IpAddr, Vec<Key>>,
    slices: HashMap<Key, Slice>,
    slices_by_service: HashMap<Key, Vec<Key>>,
    slices_by_pod: HashMap<Arc<str>, Vec<Key>>,
    /// Slices by the address of each endpoint that names no pod.
    slices_by_address: HashMap<IpAddr, Vec<Key>>,
    gateway: Gateway,
    policies: BTreeMap<Key, MeshPolicy>,
    /// What holds of each policy: its last valid version.
    in_force: HashMap<Key, InForce>,
    /// The policies of a namespace, the oldest first.
    ordered: HashMap<Arc<str>, Vec<Key>>,
    /// Pods that each policy selects, whether or not they have a sidecar.
    selected: HashMap<Key, BTreeSet<Arc<str>>>,
    /// Policies that this build cannot decode.
    unreadable_policies: BTreeMap<Key, Unreadable>,
    /// Policies that hold and name callers by labels of their namespaces.
    by_namespace_labels: HashSet<Key>,
    some_policy_disables_mtls: bool,
    canaries: BTreeMap<Key, Canary>,
    /// The Canaries of a workload, the oldest first.
    canaries_by_workload: HashMap<WorkloadKey, Vec<Key>>,
    /// Canaries that this build cannot decode: it is unknown which workloads they target.
    unreadable_canaries: BTreeSet<Key>,
    workloads: HashMap<WorkloadKey, Workload>,
    revisions: HashMap<Key, Revision>,
    revisions_by_workload: HashMap<WorkloadKey, HashSet<Key>>,
    touched: Touched,
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
    /// Where sidecars send spans, and of how many requests.
    pub tracing: Option<Tracing>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            trust_domain: tulle_crds::trust_domain(),
            mtls: MtlsMode::Permissive,
            leaf_lifetime: tulle_crds::Certificates::default().leaf_lifetime,
            exemptions: Vec::new(),
            tracing: None,
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
        let what = |config: &MeshConfig| (config.spec.clone(), config.metadata.generation);
        let spec_differs = self.config.as_ref().map(what) != config.map(what);
        let before = self.settings.clone();
        self.config = config.cloned();
        let known = self.settings.trust_domain.clone();
        let fixed = self.fixed_trust_domain.clone();
        let deleted = Settings { trust_domain: known, ..Settings::default() };
        self.settings = config.map_or(deleted, |config| Settings {
            trust_domain: fixed.unwrap_or_else(|| config.spec.trust_domain.clone()),
            mtls: config.spec.mtls,
            leaf_lifetime: config.spec.certificates.leaf_lifetime.clone(),
            exemptions: config.spec.exemptions.clone(),
            tracing: config.spec.tracing.clone(),
        });
        self.touched.everything |= spec_differs || self.settings != before;
    }

    /// From here on this is the trust domain: a MeshConfig that was made anew with another one would cut every
    /// connection.
    pub fn fix_trust_domain(&mut self, trust_domain: &str) {
        self.touched.everything |= self.settings.trust_domain != trust_domain;
        self.fixed_trust_domain = Some(trust_domain.to_owned());
        self.settings.trust_domain = trust_domain.to_owned();
    }

    /// The MeshConfig, if there is one.
    pub fn config(&self) -> Option<&MeshConfig> {
        self.config.as_ref()
    }

    /// Takes a namespace over.
    pub fn apply_namespace(&mut self, name: Arc<str>, namespace: Namespace) {
        let labels = namespace.labels.clone();
        let old = self.namespaces.insert(name, namespace);
        if old.is_none_or(|old| old.labels != labels) {
            self.touch_callers_by_label();
        }
    }

    /// Forgets a namespace.
    pub fn delete_namespace(&mut self, name: &str) {
        if self.namespaces.remove(name).is_some() {
            self.touch_callers_by_label();
        }
    }

    /// Takes a node over, with its zone; empty: unknown.
    pub fn apply_node(&mut self, name: Arc<str>, zone: Arc<str>) {
        let known = self.nodes.insert(Arc::clone(&name), Arc::clone(&zone));
        if known.as_deref().unwrap_or_default() != &*zone {
            self.touch_pods_on(&name);
        }
    }

    /// Forgets a node.
    pub fn delete_node(&mut self, name: &str) {
        if self.nodes.remove(name).is_some_and(|zone| !zone.is_empty()) {
            self.touch_pods_on(name);
        }
    }

    /// The zone of a node. Empty: unknown.
    pub fn zone_of(&self, node: &str) -> &str {
        self.nodes.get(node).map_or("", |zone| &**zone)
    }

    /// Takes a pod over.
    pub fn apply_pod(&mut self, pod: Pod) {
        let known = self.pods.get(&pod.uid);
        if known == Some(&pod) {
            return;
        }
        self.touched.ending |= pod.terminating && known.is_some_and(|known| !known.terminating);
        let views = known.map_or(PodViews::ALL, |known| PodViews::between(known, &pod));
        let uid = Arc::clone(&pod.uid);
        self.touch_pod(&uid, views);
        self.take_pod_out(&uid);
        self.put_pod_in(pod);
        self.touch_pod(&uid, views);
    }

    /// Forgets a pod.
    pub fn delete_pod(&mut self, uid: &str) {
        let Some(uid) = self.pods.get(uid).map(|pod| Arc::clone(&pod.uid)) else { return };
        self.touch_pod(&uid, PodViews::ALL);
        self.take_pod_out(&uid);
    }

    fn put_pod_in(&mut self, pod: Pod) {
        let uid = &pod.uid;
        if pod.has_own_addresses() {
            for ip in &pod.ips {
                self.pods_by_ip.insert(*ip, Arc::clone(uid));
            }
        }
        self.pod_names.insert((Arc::clone(&pod.namespace), Arc::clone(&pod.name)), Arc::clone(uid));
        self.pods_by_namespace.entry(Arc::clone(&pod.namespace)).or_default().insert(Arc::clone(uid));
        if pod.has_running_sidecar() {
            *self.sidecars.entry(Arc::clone(&pod.namespace)).or_default() += 1;
        }
        if let Some(workload) = &pod.workload {
            self.pods_by_workload.entry(workload.clone()).or_default().insert(Arc::clone(uid));
        }
        self.select_pod(&pod);
        self.pods.insert(Arc::clone(&pod.uid), pod);
    }

    fn take_pod_out(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else { return };
        for ip in &pod.ips {
            // The address may belong to another pod already.
            if self.pods_by_ip.get(ip).is_some_and(|owner| &**owner == uid) {
                self.pods_by_ip.remove(ip);
            }
        }
        self.deselect_pod(&pod);
        remove_from(&mut self.pods_by_namespace, &pod.namespace, uid);
        if pod.has_running_sidecar()
            && let Some(count) = self.sidecars.get_mut(&pod.namespace)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.sidecars.remove(&pod.namespace);
            }
        }
        if let Some(workload) = &pod.workload {
            remove_from(&mut self.pods_by_workload, workload, uid);
        }
        let name = (pod.namespace, pod.name);
        if self.pod_names.get(&name).is_some_and(|known| &**known == uid) {
            self.pod_names.remove(&name);
        }
    }

    /// A pod.
    pub fn pod(&self, uid: &str) -> Option<&Pod> {
        self.pods.get(uid)
    }

    /// The pod of a name.
    pub fn pod_named(&self, namespace: &str, name: &str) -> Option<&Pod> {
        let key: Key = (namespace.into(), name.into());
        self.pods.get(self.pod_names.get(&key)?)
    }

    /// All pods.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// A Service.
    pub fn service(&self, key: &Key) -> Option<&Service> {
        self.services.get(key)
    }

    /// Takes a Service over.
    pub fn apply_service(&mut self, key: Key, service: Service) {
        let known = self.services.get(&key);
        if known == Some(&service) {
            return;
        }
        // Whom a policy for the Service selects depends on nothing else of it.
        let reselects = known.is_none_or(|known| known.selector != service.selector);
        let redeclares = known.is_none_or(|known| !declare_alike(known, &service));
        self.take_service_out(&key);
        for ip in service.ips() {
            let claims = self.claims.entry(ip).or_insert_with(|| Vec::with_capacity(1));
            if !claims.contains(&key) {
                claims.push(key.clone());
            }
        }
        self.touch_service(&key, &service);
        self.services.insert(key.clone(), service);
        if redeclares {
            self.touch_pods_behind(&key);
        }
        if reselects {
            self.reselect_for_service(&key);
        }
    }

    /// Forgets a Service.
    pub fn delete_service(&mut self, key: &Key) {
        if self.take_service_out(key) {
            self.touch_pods_behind(key);
            self.reselect_for_service(key);
        }
    }

    fn take_service_out(&mut self, key: &Key) -> bool {
        let Some(old) = self.services.remove(key) else { return false };
        self.touch_service(key, &old);
        for ip in old.ips() {
            if let Some(claims) = self.claims.get_mut(&ip) {
                claims.retain(|known| known != key);
                if claims.is_empty() {
                    self.claims.remove(&ip);
                }
            }
        }
        true
    }

    /// Takes an EndpointSlice over.
    pub fn apply_slice(&mut self, key: Key, slice: Slice) {
        let known = self.slices.get(&key);
        if known == Some(&slice) {
            return;
        }
        let redeclared = redeclared(known, Some(&slice));
        self.take_slice_out(&key);
        self.touch_slice(&key, &slice);
        self.touch_addresses_of(redeclared.iter().map(|uid| &**uid));
        let service = (Arc::clone(&key.0), Arc::clone(&slice.service));
        self.slices_by_service.entry(service).or_default().push(key.clone());
        for endpoint in &slice.endpoints {
            match (&endpoint.pod_uid, endpoint.address) {
                (Some(uid), _) => push_once(&mut self.slices_by_pod, Arc::clone(uid), &key),
                (None, Some(ip)) => push_once(&mut self.slices_by_address, ip, &key),
                (None, None) => {}
            }
        }
        self.slices.insert(key, slice);
    }

    /// Forgets an EndpointSlice.
    pub fn delete_slice(&mut self, key: &Key) {
        let redeclared = redeclared(self.slices.get(key), None);
        self.take_slice_out(key);
        self.touch_addresses_of(redeclared.iter().map(|uid| &**uid));
    }

    fn take_slice_out(&mut self, key: &Key) {
        let Some(old) = self.slices.remove(key) else { return };
        self.touch_slice(key, &old);
        for endpoint in &old.endpoints {
            match (&endpoint.pod_uid, endpoint.address) {
                (Some(uid), _) => retain_other(&mut self.slices_by_pod, uid, key),
                (None, Some(ip)) => retain_other(&mut self.slices_by_address, &ip, key),
                (None, None) => {}
            }
        }
        retain_other(&mut self.slices_by_service, &(Arc::clone(&key.0), old.service), key);
    }

    /// A policy, in its newest version.
    pub fn policy(&self, key: &Key) -> Option<&MeshPolicy> {
        self.policies.get(key)
    }

    /// All policies, in their newest versions. Of one that is invalid an earlier version may be in force.
    pub fn policies(&self) -> impl Iterator<Item = (&Key, &MeshPolicy)> {
        self.policies.iter()
    }

    /// Takes a Canary over.
    pub fn apply_canary(&mut self, key: Key, canary: Canary) {
        self.unreadable_canaries.remove(&key);
        self.touched.canaries.insert(key.clone());
        let known = self.canaries.get(&key);
        // Most changes are the evidence, which is written every few seconds and sent to no sidecar.
        if known.is_some_and(|known| decide_alike(known, &canary)) {
            self.canaries.insert(key, canary);
            return;
        }
        self.take_canary_out(&key);
        let workload = target_of(&key.0, &canary);
        self.canaries.insert(key.clone(), canary);
        let mut all = self.canaries_by_workload.remove(&workload).unwrap_or_default();
        all.push(key);
        all.sort_by(|a, b| match (self.canaries.get(a), self.canaries.get(b)) {
            (Some(one), Some(other)) => by_age(one, other),
            _ => a.cmp(b),
        });
        self.canaries_by_workload.insert(workload.clone(), all);
        self.touch_shares_of(&workload);
    }

    /// Notes a Canary that this build cannot decode. The last readable version stays in force, and no gate
    /// of its namespace counts as orphaned.
    pub fn mark_canary_unreadable(&mut self, key: Key) {
        self.touched.canaries.insert(key.clone());
        self.unreadable_canaries.insert(key);
    }

    /// Forgets a Canary.
    pub fn delete_canary(&mut self, key: &Key) {
        self.touched.canaries.insert(key.clone());
        self.unreadable_canaries.remove(key);
        self.take_canary_out(key);
    }

    fn take_canary_out(&mut self, key: &Key) {
        let Some(old) = self.canaries.remove(key) else { return };
        let workload = target_of(&key.0, &old);
        self.touch_shares_of(&workload);
        retain_other(&mut self.canaries_by_workload, &workload, key);
    }

    /// The Canaries of a namespace.
    fn canaries_in(&self, namespace: &Arc<str>) -> impl Iterator<Item = (&Key, &Canary)> {
        let from: Key = (Arc::clone(namespace), "".into());
        let namespace = Arc::clone(namespace);
        self.canaries.range(from..).take_while(move |(key, _)| key.0 == namespace)
    }

    /// The Services of a namespace.
    fn services_in(&self, namespace: &Arc<str>) -> impl Iterator<Item = (&Key, &Service)> {
        let from: Key = (Arc::clone(namespace), "".into());
        let namespace = Arc::clone(namespace);
        self.services.range(from..).take_while(move |(key, _)| key.0 == namespace)
    }

    /// A Canary.
    pub fn canary(&self, key: &Key) -> Option<&Canary> {
        self.canaries.get(key)
    }

    /// All Canaries.
    pub fn canaries(&self) -> impl Iterator<Item = (&Key, &Canary)> {
        self.canaries.iter()
    }

    /// Takes a workload over.
    pub fn apply_workload(&mut self, key: WorkloadKey, workload: Workload) {
        if self.workloads.get(&key) != Some(&workload) {
            self.touch_canaries_of(&key);
            self.workloads.insert(key, workload);
        }
    }

    /// Forgets a workload.
    pub fn delete_workload(&mut self, key: &WorkloadKey) {
        if self.workloads.remove(key).is_some() {
            self.touch_canaries_of(key);
        }
    }

    /// Takes a ReplicaSet or ControllerRevision over: one revision of a workload.
    pub fn apply_revision(&mut self, key: Key, revision: Revision) {
        if self.revisions.get(&key) == Some(&revision) {
            return;
        }
        self.delete_revision(&key);
        self.touch_canaries_of(&revision.owner);
        self.revisions_by_workload.entry(revision.owner.clone()).or_default().insert(key.clone());
        self.revisions.insert(key, revision);
    }

    /// Forgets a revision.
    pub fn delete_revision(&mut self, key: &Key) {
        if let Some(old) = self.revisions.remove(key) {
            self.touch_canaries_of(&old.owner);
            remove_from(&mut self.revisions_by_workload, &old.owner, key);
        }
    }
}

/// The workload that a Canary watches.
fn target_of(namespace: &Arc<str>, canary: &Canary) -> WorkloadKey {
    let target = &canary.spec.target;
    WorkloadKey { kind: target.kind, namespace: Arc::clone(namespace), name: target.name.as_str().into() }
}

/// Whether two versions of a Service declare the same about what is spoken at its ports.
fn declare_alike(one: &Service, other: &Service) -> bool {
    let mut pairs = one.ports.iter().zip(&other.ports);
    one.ports.len() == other.ports.len()
        && pairs.all(|(a, b)| a.name == b.name && a.app_protocol == b.app_protocol)
}

/// Whether two versions of a Canary say the same about who holds a workload and about the shares.
fn decide_alike(one: &Canary, other: &Canary) -> bool {
    let of = |status: &CanaryStatus| {
        let revisions =
            [&status.approved_revision, &status.former_revision, &status.canary_revision].map(String::clone);
        (revisions, status.phase, status.weight, status.epoch)
    };
    one.spec.target == other.spec.target
        && one.metadata.creation_timestamp == other.metadata.creation_timestamp
        && one.status.as_ref().map(of) == other.status.as_ref().map(of)
}

/// Removes one entry of an index, and the index's key with the last one.
fn remove_from<K, V, Q>(index: &mut HashMap<K, HashSet<V>>, key: &K, value: &Q)
where
    K: Hash + Eq,
    V: Hash + Eq + Borrow<Q>,
    Q: Hash + Eq + ?Sized,
{
    if let Some(values) = index.get_mut(key) {
        values.remove(value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

/// Adds an entry to an index, once.
fn push_once<K: Hash + Eq>(index: &mut HashMap<K, Vec<Key>>, of: K, entry: &Key) {
    let known = index.entry(of).or_insert_with(|| Vec::with_capacity(1));
    if !known.contains(entry) {
        known.push(entry.clone());
    }
}

/// [`remove_from`] for an index with an order.
fn retain_other<K: Hash + Eq, V: PartialEq>(index: &mut HashMap<K, Vec<V>>, key: &K, value: &V) {
    if let Some(values) = index.get_mut(key) {
        values.retain(|known| known != value);
        if values.is_empty() {
            index.remove(key);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
