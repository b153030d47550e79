//! Which addresses sidecars have subscribed to, and what that says about where a Canary's shares can apply.
//!
//! Some sidecars never see the address of a Service: Cilium's socket load balancer has replaced it by a pod's before the
//! connection is made. Other clients choose pods themselves: most ingress controllers do. What they send gets no share,
//! and nothing but the addresses that they subscribe to tells so. A rollout is held for it only where all of this is so,
//! because a scraper dials pods by address too:
//!
//! - No sidecar at all has subscribed to an address of a Service that has one and selects the workload. A single one
//!   shows that Services are dialled here, and whoever dials pods does so by choice.
//! - Somebody has subscribed to a pod of the workload at a port that such a Service leads to. A port for metrics alone
//!   does not count.
//! - That client belongs to another workload: members of a cluster find each other by address.
//! - It has never subscribed to a pod of the workload that waited behind its gate, as far as this leader has seen. No
//!   load balancer leads there, so it finds pods by itself.
//!
//! What remains: a scraper of the port that serves, in the first rollout that a leader sees and before it has found the
//! pods on trial; and whoever dials a pod to debug it, until its sidecar forgets the address after ten minutes without
//! use. Both only where no client of the Service is in the mesh or has used it within the last minutes. Such a rollout
//! sends no request through a sidecar that chooses, and `promote@ID` decides it.

use std::collections::{BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tulle_mesh::proto::ResourceType;

use super::{AckTracker, Name, Sidecars, leads_somewhere, lock, name_of};
use crate::discovery::report::resource_name;
use crate::model::{Key, Model, SharedAddress, WorkloadKey};

/// Clients that dial pods where nobody dials the Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDialling {
    /// The name of the Service.
    pub service: String,
    /// How many pods are such clients.
    pub clients: usize,
    /// The first of them, as `namespace/name`.
    pub first: String,
    /// The first dials some Service by its address: nothing replaces those addresses, and it chooses pods itself.
    pub by_choice: bool,
}

impl AckTracker {
    /// Clients that dial the pods of a workload by address, where no client dials a Service of it: see the rules above.
    pub fn dials_pods(&self, model: &Model, workload: &WorkloadKey) -> Option<PodDialling> {
        let dialled = model.dialled(workload);
        let service = dialled.service?;
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let (own, relayed): (&Sidecars, &Sidecars) = (&own, &relayed);
        let clients = |address: &SocketAddr| {
            let mut found = own.clients(model, relayed, *address);
            found.append(&mut relayed.clients(model, own, *address));
            found
        };
        let finders = dialled.parked.iter().flat_map(clients).map(|client| client.uid);
        let finders = self.remember_finders(workload, finders.collect());
        if dialled.services.iter().any(|address| !clients(address).is_empty()) {
            return None;
        }
        let counts = |client: &Client| {
            let is_own = model.pod(&client.uid).is_none_or(|pod| pod.workload.as_ref() == Some(workload));
            !is_own && !finders.contains(&client.uid)
        };
        let found: BTreeSet<Client> = dialled.pods.iter().flat_map(clients).filter(counts).collect();
        let first = found.first()?;
        let by_choice = [own, relayed].iter().any(|all| all.dials_a_service(model, &first.uid));
        Some(PodDialling { service, clients: found.len(), first: first.pod.clone(), by_choice })
    }

    /// Whether any sidecar has subscribed to an address of a Service of the workload or of one of its pods, or to one from
    /// which routes lead there. A sidecar forgets an address that it has not used for ten minutes.
    pub fn has_clients(&self, model: &Model, canary: &Key, workload: &WorkloadKey) -> bool {
        let dialled = model.dialled(workload);
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let (own, relayed): (&Sidecars, &Sidecars) = (&own, &relayed);
        let is_used = |address: &SocketAddr| {
            let is_silent = own.clients(model, relayed, *address).is_empty()
                && relayed.clients(model, own, *address).is_empty();
            !is_silent
        };
        dialled.services.iter().chain(&dialled.pods).any(is_used)
            || model.shared_addresses(canary).iter().any(|shared| is_used(&shared.address))
    }

    /// Adds clients that find the pods of a workload by themselves. Returns all that are known: a gate that opens does
    /// not make a load balancer of a scraper.
    fn remember_finders(&self, workload: &WorkloadKey, found: HashSet<Arc<str>>) -> HashSet<Arc<str>> {
        let mut all = lock(&self.finders);
        if found.is_empty() {
            return all.get(workload).cloned().unwrap_or_default();
        }
        let its = all.entry(workload.clone()).or_default();
        its.extend(found);
        its.clone()
    }
}

/// A pod whose sidecar has subscribed to an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Client {
    /// As `namespace/name`.
    pod: String,
    uid: Arc<str>,
}

impl Sidecars {
    /// Who has subscribed to an address.
    fn clients(&self, model: &Model, other: &Self, address: SocketAddr) -> BTreeSet<Client> {
        let its = self.by_address.get(&address).into_iter().flatten();
        let holds = its.filter(|(uid, name)| {
            let known = self.by_pod.get(uid).and_then(|sidecar| sidecar.resources.get(name));
            known.is_some_and(|known| !known.is_over())
        });
        let client = |(uid, _): &(Arc<str>, Name)| {
            let pod = name_of(self.concerned(model, uid, other)?);
            Some(Client { pod, uid: Arc::clone(uid) })
        };
        holds.filter_map(client).collect()
    }

    /// Whether a pod's sidecar has subscribed to an address of any Service.
    fn dials_a_service(&self, model: &Model, uid: &str) -> bool {
        let resources = self.by_pod.get(uid).into_iter().flat_map(|sidecar| sidecar.resources.keys());
        resources.filter_map(address).any(|address| model.is_a_service(address))
    }

    /// Pods that dial an address from which they reach endpoints with shares of the Canary, and that none have been sent
    /// to. Where the address was refused, it is not used. Where routes lead there, only sidecars that follow routes are
    /// concerned.
    pub(super) fn without_shares(
        &self,
        model: &Model,
        other: &Self,
        canary: &Key,
        SharedAddress { address, endpoints, via }: &SharedAddress,
    ) -> BTreeSet<String> {
        let shared = self.by_canary.get(canary);
        let follows = |uid: &str, name: &Name| match via {
            None => true,
            Some(variant) => {
                name.0 == ResourceType::Route as i32 && model.variant(&resource_name(name), uid) == *variant
            }
        };
        let lacks = |(uid, name): &&(Arc<str>, Name)| {
            let known = self.by_pod.get(uid).and_then(|sidecar| sidecar.resources.get(name));
            let is_route = name.0 == ResourceType::Route as i32;
            let carrier =
                if is_route { (ResourceType::Endpoints as i32, Arc::clone(endpoints)) } else { name.clone() };
            let has_shares = shared.is_some_and(|shared| shared.contains(&(Arc::clone(uid), carrier)));
            !has_shares
                && known.is_some_and(|known| !known.is_over() && known.refused.is_none())
                && follows(uid, name)
        };
        let clients = self.by_address.get(address).into_iter().flatten().filter(lacks);
        clients.filter_map(|(uid, _)| self.concerned(model, uid, other).map(name_of)).collect()
    }

    /// A sidecar has subscribed to something.
    pub(super) fn dials(&mut self, uid: &Arc<str>, name: &Name) {
        if let Some(address) = address(name) {
            self.by_address.entry(address).or_default().insert((Arc::clone(uid), name.clone()));
        }
    }

    /// It is subscribed to that no more.
    pub(super) fn dials_no_more(&mut self, uid: &Arc<str>, name: &Name) {
        let Some(address) = address(name) else { return };
        if let Some(clients) = self.by_address.get_mut(&address) {
            clients.remove(&(Arc::clone(uid), name.clone()));
            if clients.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }
}

fn address(name: &Name) -> Option<SocketAddr> {
    if leads_somewhere(name) { name.1.parse().ok() } else { None }
}
