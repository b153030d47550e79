//! Which addresses sidecars have subscribed to, and what that says about where a Canary's shares can apply.
//!
//! Some sidecars never see the address of a Service: Cilium's socket load balancer has replaced it by a pod's before the
//! connection is made. What they send gets no share, and nothing but the addresses that they subscribe to tells so.
//! A rollout is held for it only where all of this is so, because a scraper dials pods by address too:
//!
//! - No sidecar at all has subscribed to an address of a Service that has one and selects the workload. A single one
//!   shows that Services are dialled here, and whoever dials pods does so by choice.
//! - Somebody has subscribed to a pod of the workload at a port that such a Service leads to. A port for metrics alone
//!   is none.
//! - Whoever it is belongs to another workload: members of a cluster find each other by address.
//! - It has not subscribed to a pod that waits behind its gate as well. No load balancer leads there, so it finds pods
//!   by itself.
//!
//! What remains: a scraper of the port that serves, in the first seconds of a rollout, before it has found the pods on
//! trial, where no client of the Service is in the mesh or has used it within the last minutes. Such a rollout sends no
//! request through a sidecar that chooses, and `promote@ID` decides it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use super::{Name, Registry, Sidecars, leads_somewhere, lock, name_of};
use crate::model::{Model, WorkloadKey};

/// Clients that dial pods where nobody dials the Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodDialling {
    /// The name of the Service.
    pub service: String,
    /// How many pods are such clients.
    pub clients: usize,
    /// The first of them, as `namespace/name`.
    pub first: String,
}

impl Registry {
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
        if dialled.services.iter().any(|address| !clients(address).is_empty()) {
            return None;
        }
        let scrapers: BTreeSet<Client> = dialled.parked.iter().flat_map(clients).collect();
        let found: BTreeSet<Client> = dialled.pods.iter().flat_map(clients).collect();
        let is_own = |client: &Client| {
            model.pod(&client.uid).is_none_or(|pod| pod.workload.as_ref() == Some(workload))
        };
        let mut found = found.difference(&scrapers).filter(|client| !is_own(client));
        let first = found.next()?.pod.clone();
        Some(PodDialling { service, clients: 1 + found.count(), first })
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
