//! What a change may have altered, so that only that is compiled anew.
//!
//! Each `apply` and `delete` of the [`Model`] calls the `touch_*` functions before and after it, because what an
//! object was part of before the change is altered as well as what it is part of afterwards.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use tulle_mesh::proto;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;

use super::gateway::RouteKey;
use super::routes::backends;
use super::{Key, Model, Pod, Service, Slice, WorkloadKey};

/// What the last changes may have altered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Uids of pods of which what they enforce may differ.
    pub inbound: HashSet<Arc<str>>,
    /// Services whose destinations or endpoints may differ.
    pub services: HashSet<Key>,
    /// Addresses that may lead elsewhere.
    pub addresses: HashSet<IpAddr>,
    /// Addresses that may lead elsewhere for clients in this namespace only, which has routes of its own for them.
    pub consumers: HashSet<(IpAddr, Arc<str>)>,
    /// Anything may differ.
    pub everything: bool,
    /// Policies whose object, selection or verdict may differ.
    pub policies: HashSet<Key>,
    /// Canaries whose object, workload, pods or Services may differ.
    pub canaries: HashSet<Key>,
    /// Routes of which the status may differ.
    pub routes: HashSet<RouteKey>,
    /// A pod began to end.
    pub ending: bool,
}

impl Touched {
    /// Whether nothing was altered.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Adds what another change altered.
    pub fn merge(&mut self, other: Self) {
        self.inbound.extend(other.inbound);
        self.services.extend(other.services);
        self.addresses.extend(other.addresses);
        self.consumers.extend(other.consumers);
        self.policies.extend(other.policies);
        self.canaries.extend(other.canaries);
        self.routes.extend(other.routes);
        self.everything |= other.everything;
        self.ending |= other.ending;
    }

    /// Whether a variant of a resource that was made of this may differ.
    pub fn covers(&self, depends: &Dependency, variant: &Variant) -> bool {
        self.everything
            || match depends {
                Dependency::Inbound(uid) => self.inbound.contains(uid),
                Dependency::Service(key) => self.services.contains(key),
                Dependency::Address(ip) => {
                    let is_consumer = match variant {
                        Variant::Namespace(of) => self.consumers.contains(&(*ip, Arc::clone(of))),
                        Variant::Any | Variant::Node(_) => false,
                    };
                    is_consumer || self.addresses.contains(ip)
                }
            }
    }
}

/// What a compiled resource was made of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dependency {
    /// What a pod enforces, or a section of it.
    Inbound(Arc<str>),
    /// A Service, with all that stands behind it.
    Service(Key),
    /// An address, and whose it is.
    Address(IpAddr),
}

/// What distinguishes clients, where anything does.
#[derive(Clone, Default, PartialEq, Eq, Hash, Debug)]
pub enum Variant {
    /// All get the same.
    #[default]
    Any,
    /// Those on this node, of destinations and endpoints where the Service is `internalTrafficPolicy: Local`.
    Node(Arc<str>),
    /// Those in this namespace, of a Service's address where the namespace has routes of its own for it.
    Namespace(Arc<str>),
}

impl Variant {
    /// The node of the clients, where it matters.
    pub(super) fn node(&self) -> &str {
        match self {
            Self::Node(node) => node,
            Self::Any | Self::Namespace(_) => "",
        }
    }

    /// The namespace of the clients, where it matters.
    pub(super) fn namespace(&self) -> &str {
        match self {
            Self::Namespace(namespace) => namespace,
            Self::Any | Self::Node(_) => "",
        }
    }
}

/// A resource that is compiled once for all sidecars with the same variant.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The resource, with its version.
    pub resource: proto::Resource,
    /// Objects whose acknowledgement matters, as they are in the resource.
    pub stamps: Vec<proto::Stamp>,
    /// Namespace and name of the Service that requests to it are counted for.
    pub counted_as: Option<(String, String)>,
    /// What it was made of.
    pub depends: Dependency,
}

impl Compiled {
    /// The names of all endpoints that a route leads to, those of backends and mirrors too, in order and each once.
    pub fn endpoints(&self) -> Vec<&str> {
        let Some(Body::Route(route)) = &self.resource.body else { return Vec::new() };
        let Some(Kind::Service(service)) = &route.kind else { return Vec::new() };
        let mut names = vec![service.endpoints.as_str()];
        names.extend(backends(service).map(|backend| backend.endpoints.as_str()));
        // A backend that cannot be used has no name.
        names.retain(|name| !name.is_empty());
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// Which views of a pod a change alters.
#[derive(Clone, Copy, Debug)]
pub(super) struct PodViews {
    /// What it enforces itself.
    inbound: bool,
    /// Who is asked to enforce a policy.
    policies: bool,
    /// How clients reach it.
    outbound: bool,
}

impl PodViews {
    /// All of them, for a pod that comes or goes.
    pub(super) const ALL: Self = Self { inbound: true, policies: true, outbound: true };

    /// Those that differ between two versions of a pod.
    pub(super) fn between(old: &Pod, new: &Pod) -> Self {
        let inbound = (&old.labels, &old.namespace, &old.workload, old.finished)
            != (&new.labels, &new.namespace, &new.workload, new.finished);
        let serving = |pod: &Pod| (pod.injected, pod.terminating, pod.ips.is_empty());
        let identity = |pod: &Pod| {
            (Arc::clone(&pod.service_account), pod.injected, pod.host_network, pod.skipped_ports.clone())
        };
        let state = |pod: &Pod| {
            let gates = (pod.gated, pod.gate_open, pod.other_gates_open);
            (pod.containers_ready, pod.ready_unix, pod.terminating, gates)
        };
        let outbound =
            inbound || old.ips != new.ips || identity(old) != identity(new) || state(old) != state(new);
        Self { inbound, policies: inbound || serving(old) != serving(new), outbound }
    }
}

impl Model {
    /// Takes what the changes since the last call may have altered.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// A pod, in the views that a change alters. Its workload's Canaries are touched by any change.
    pub(super) fn touch_pod(&mut self, uid: &Arc<str>, views: PodViews) {
        let Some(pod) = self.pods.get(uid) else { return };
        let workload = pod.workload.clone();
        if views.policies {
            let its = self.ordered.get(&pod.namespace).into_iter().flatten();
            let selecting: Vec<Key> = its.filter(|key| self.is_selected(key, uid)).cloned().collect();
            self.touched.policies.extend(selecting);
        }
        if views.inbound {
            self.touched.inbound.insert(Arc::clone(uid));
        }
        if views.outbound {
            self.touch_endpoints_of(uid);
        }
        if let Some(workload) = &workload {
            self.touch_canaries_of(workload);
        }
    }

    /// The Services that a pod is an endpoint of, and its addresses.
    pub(super) fn touch_endpoints_of(&mut self, uid: &str) {
        let slices = self.slices_by_pod.get(uid).into_iter().flatten();
        let services = slices.filter_map(|key| service_of(key, self.slices.get(key)?));
        self.touched.services.extend(services);
        self.touch_addresses_of([uid]);
    }

    /// The addresses of pods.
    pub(super) fn touch_addresses_of<'a>(&mut self, uids: impl IntoIterator<Item = &'a str>) {
        let pods = uids.into_iter().filter_map(|uid| self.pods.get(uid));
        let ips: Vec<_> = pods.flat_map(|pod| pod.ips.iter().copied()).collect();
        for ip in ips {
            self.touch_address(ip);
        }
    }

    /// The addresses of the pods behind a Service, which declares what is spoken there.
    pub(super) fn touch_pods_behind(&mut self, service: &Key) {
        let slices = self.slices_by_service.get(service).into_iter().flatten();
        let pods: Vec<Arc<str>> =
            slices.filter_map(|key| self.slices.get(key)).flat_map(uids).cloned().collect();
        self.touch_addresses_of(pods.iter().map(|uid| &**uid));
    }

    /// An address, the Services that claim it, because their destinations were made for it, and those with an endpoint
    /// there that names no pod: whose pod that is has changed.
    pub(super) fn touch_address(&mut self, ip: IpAddr) {
        self.touched.addresses.insert(ip);
        self.touched.services.extend(self.claims.get(&ip).into_iter().flatten().cloned());
        let listing = self.slices_by_address.get(&ip).into_iter().flatten();
        let services = listing.filter_map(|key| service_of(key, self.slices.get(key)?));
        self.touched.services.extend(services);
    }

    /// The pods on a node, which are told its zone.
    pub(super) fn touch_pods_on(&mut self, node: &str) {
        let pods = self.pods.values().filter(|pod| &*pod.node == node);
        self.touched.inbound.extend(pods.map(|pod| Arc::clone(&pod.uid)));
    }

    /// A Service as it is now, its addresses, the routes that name it, and the Canaries whose pods it selects.
    pub(super) fn touch_service(&mut self, key: &Key, service: &Service) {
        self.touched.services.insert(key.clone());
        for ip in service.ips() {
            self.touch_address(ip);
        }
        let selected: Vec<Key> = self
            .canaries_in(&key.0)
            .filter(|(_, canary)| self.selects_workload(service, &super::target_of(&key.0, canary)))
            .map(|(canary, _)| canary.clone())
            .collect();
        self.touched.canaries.extend(selected);
        self.touch_canaries_behind(key);
        self.touch_routes_naming(key);
    }

    /// The Service of a slice, and the Canaries of its pods.
    pub(super) fn touch_slice(&mut self, key: &Key, slice: &Slice) {
        self.touched.services.extend(service_of(key, slice));
        let workloads: HashSet<WorkloadKey> =
            slice.endpoints.iter().filter_map(|one| self.pod_of_endpoint(one)?.workload.clone()).collect();
        for workload in &workloads {
            self.touch_canaries_of(workload);
        }
    }

    /// Pods for which a policy's section may hold or no longer hold. How clients reach them depends on policies
    /// only where plain text is possible at all.
    pub(super) fn touch_selected(&mut self, uids: &BTreeSet<Arc<str>>, plain_text_possible: bool) {
        self.touched.inbound.extend(uids.iter().cloned());
        if plain_text_possible {
            for uid in uids {
                self.touch_endpoints_of(uid);
            }
        }
    }

    /// The Canaries that watch a workload.
    pub(super) fn touch_canaries_of(&mut self, workload: &WorkloadKey) {
        let its = self.canaries_by_workload.get(workload).into_iter().flatten();
        self.touched.canaries.extend(its.cloned());
    }

    /// The Canaries of the workloads whose pods are endpoints of a Service.
    fn touch_canaries_behind(&mut self, service: &Key) {
        for workload in self.workloads_behind(service) {
            self.touch_canaries_of(&workload);
        }
    }

    /// A Canary; where it decides about shares, also the Services of its workload's pods.
    pub(super) fn touch_shares_of(&mut self, workload: &WorkloadKey) {
        let pods = self.pods_by_workload.get(workload).into_iter().flatten();
        let slices = pods.filter_map(|uid| self.pods.get(uid)).flat_map(|pod| self.slices_of(pod));
        let services: Vec<Key> = slices.filter_map(|key| service_of(key, self.slices.get(key)?)).collect();
        // Another Canary of the same workload, or of another one behind the same Service, may hold it now.
        for service in &services {
            self.touch_canaries_behind(service);
        }
        self.touched.services.extend(services);
        self.touch_canaries_of(workload);
    }
}

/// Pods for which two versions of a slice may declare something else: those that come or go, or all of them where its
/// ports or its Service differ.
pub(super) fn redeclared(old: Option<&Slice>, new: Option<&Slice>) -> Vec<Arc<str>> {
    let of =
        |slice: Option<&Slice>| -> HashSet<Arc<str>> { slice.into_iter().flat_map(uids).cloned().collect() };
    if let (Some(old), Some(new)) = (old, new)
        && old.ports == new.ports
        && old.service == new.service
    {
        // Most changes are of an endpoint's state.
        if uids(old).eq(uids(new)) {
            return Vec::new();
        }
        return of(Some(old)).symmetric_difference(&of(Some(new))).cloned().collect();
    }
    of(old).union(&of(new)).cloned().collect()
}

/// The pods of a slice.
fn uids(slice: &Slice) -> impl Iterator<Item = &Arc<str>> {
    slice.endpoints.iter().filter_map(|endpoint| endpoint.pod_uid.as_ref())
}

/// The Service that a slice belongs to.
fn service_of(key: &Key, slice: &Slice) -> Option<Key> {
    (!slice.service.is_empty()).then(|| (Arc::clone(&key.0), Arc::clone(&slice.service)))
}

#[cfg(test)]
mod tests;
