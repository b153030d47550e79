//! What admission needs to know, kept in memory: labels of namespaces, Canaries, the MeshConfig.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures::StreamExt as _;
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::Value;
use tulle_crds::{Canary, Exemption, MeshConfig, MeshConfigSpec, WorkloadKind, by_age};

/// What is known.
#[derive(Debug, Default)]
pub struct Cluster {
    inner: RwLock<Inner>,
    listed: AtomicUsize,
}

/// Kinds that are watched.
const KINDS: usize = 3;

#[derive(Debug, Default)]
struct Inner {
    pod_security: HashMap<String, String>,
    canaries: HashMap<(String, String), Canary>,
    config: Option<MeshConfig>,
}

impl Cluster {
    /// Whether every kind has been listed: before that a pod could miss its gate.
    pub fn is_synced(&self) -> bool {
        self.listed.load(Ordering::Acquire) >= KINDS
    }

    /// The Pod Security level that a namespace enforces.
    pub fn pod_security(&self, namespace: &str) -> Option<String> {
        self.read().pod_security.get(namespace).cloned()
    }

    /// The trust domain: the one that the operator says is in force, if it has said so.
    pub fn trust_domain(&self) -> String {
        let inner = self.read();
        let Some(config) = &inner.config else { return tulle_crds::trust_domain() };
        let in_force = config.status.as_ref().and_then(|status| status.trust_domain.clone());
        in_force.unwrap_or_else(|| config.spec.trust_domain.clone())
    }

    /// Whether a pod of this account may stay without a sidecar.
    pub fn is_exempt(&self, namespace: &str, service_account: &str) -> bool {
        let inner = self.read();
        let exemptions = inner.config.iter().flat_map(|config| &config.spec.exemptions);
        let matches = |e: &Exemption| e.namespace == namespace && e.service_account == service_account;
        exemptions.into_iter().any(matches)
    }

    /// Whether a Canary holds the pod's workload and its revision has not been approved.
    pub fn is_on_trial(&self, namespace: &str, pod: &Value) -> bool {
        let Some((kind, name, revision)) = workload_of(pod) else { return false };
        let inner = self.read();
        let its = inner.canaries.iter().filter(|((ns, _), canary)| {
            ns == namespace && canary.spec.target.kind == kind && canary.spec.target.name == name
        });
        // Of several the oldest holds it, as with the operator.
        let canary = its.min_by(|a, b| by_age(a.1, b.1));
        let Some(status) = canary.and_then(|(_, canary)| canary.status.as_ref()) else { return false };
        // What was stable until its successor has taken over needs no trial either.
        let stable = [&status.approved_revision, &status.former_revision];
        !status.approved_revision.is_empty() && !stable.iter().any(|known| **known == revision)
    }

    /// Other Canaries with the same target.
    pub fn siblings(&self, namespace: &str, canary: &Canary) -> Vec<String> {
        let name = canary.name_any();
        let inner = self.read();
        let same = |((ns, other), candidate): &(&(String, String), &Canary)| {
            ns == namespace && *other != name && candidate.spec.target == canary.spec.target
        };
        inner.canaries.iter().filter(same).map(|((_, other), _)| other.clone()).collect()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// A list is complete; the first of its kind counts.
    fn first_list(&self, first: &mut bool) {
        if std::mem::take(first) {
            self.listed.fetch_add(1, Ordering::Release);
        }
    }

    /// Takes a Canary over; `None`: it is gone.
    pub fn set_canary(&self, namespace: String, name: String, canary: Option<Canary>) {
        self.change(|inner| match canary {
            Some(canary) => drop(inner.canaries.insert((namespace, name), canary)),
            None => drop(inner.canaries.remove(&(namespace, name))),
        });
    }
}

/// The workload of a pod and the pod's revision, by its owner and labels.
fn workload_of(pod: &Value) -> Option<(WorkloadKind, String, String)> {
    let owners = pod.pointer("/metadata/ownerReferences")?.as_array()?;
    let owner = owners.iter().find(|owner| owner.get("controller") == Some(&Value::Bool(true)))?;
    let (kind, name) = (owner.get("kind")?.as_str()?, owner.get("name")?.as_str()?);
    let label = |key: &str| pod.pointer("/metadata/labels")?.get(key)?.as_str().map(str::to_owned);
    match kind {
        "ReplicaSet" => {
            let hash = label("pod-template-hash")?;
            let name = name.strip_suffix(&hash)?.strip_suffix('-')?;
            Some((WorkloadKind::Deployment, name.to_owned(), hash))
        }
        "StatefulSet" => {
            Some((WorkloadKind::StatefulSet, name.to_owned(), label("controller-revision-hash")?))
        }
        "DaemonSet" => Some((WorkloadKind::DaemonSet, name.to_owned(), label("controller-revision-hash")?)),
        _ => None,
    }
}

/// Keeps what is known current.
pub fn start(client: &Client, cluster: &Arc<Cluster>) {
    let namespaces = Api::<PartialObjectMeta<k8s_openapi::api::core::v1::Namespace>>::all(client.clone());
    let known = Arc::clone(cluster);
    tokio::spawn(async move {
        let mut first = true;
        let mut events = std::pin::pin!(watcher(namespaces, Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(namespace) | Event::InitApply(namespace)) => {
                    let level = namespace.labels().get("pod-security.kubernetes.io/enforce").cloned();
                    known.change(|inner| match level {
                        Some(level) => drop(inner.pod_security.insert(namespace.name_any(), level)),
                        None => drop(inner.pod_security.remove(&namespace.name_any())),
                    });
                }
                Ok(Event::InitDone) => known.first_list(&mut first),
                Ok(Event::Delete(namespace)) => {
                    known.change(|i| drop(i.pod_security.remove(&namespace.name_any())))
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "the watch of namespaces broke; it is taken up again"),
            }
        }
    });
    start_ours(client, cluster);
}

fn start_ours(client: &Client, cluster: &Arc<Cluster>) {
    let (canaries, known) = (Api::<DeserializeGuard<Canary>>::all(client.clone()), Arc::clone(cluster));
    tokio::spawn(async move {
        let mut listed: HashSet<(String, String)> = HashSet::new();
        let mut first = true;
        let mut events = std::pin::pin!(watcher(canaries, Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed.clear(),
                Ok(Event::Apply(object) | Event::InitApply(object)) => {
                    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
                    listed.insert((namespace.clone(), name.clone()));
                    if let Ok(canary) = object.0 {
                        known.set_canary(namespace, name, Some(canary));
                    }
                }
                Ok(Event::InitDone) => {
                    // One that was deleted while the watch was broken is not in the list.
                    known.change(|inner| inner.canaries.retain(|key, _| listed.contains(key)));
                    known.first_list(&mut first);
                }
                Ok(Event::Delete(object)) => {
                    known.set_canary(object.namespace().unwrap_or_default(), object.name_any(), None);
                }
                Err(error) => tracing::warn!(%error, "the watch of Canaries broke; it is taken up again"),
            }
        }
    });
    let (configs, known) = (Api::<DeserializeGuard<MeshConfig>>::all(client.clone()), Arc::clone(cluster));
    tokio::spawn(async move {
        let mut first = true;
        let mut events = std::pin::pin!(watcher(configs, Config::default()).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object) | Event::InitApply(object)) => {
                    if let Ok(config) = object.0 {
                        known.change(|inner| inner.config = Some(config));
                    }
                }
                Ok(Event::InitDone) => known.first_list(&mut first),
                // The defaults hold then, in the trust domain that the mesh has.
                Ok(Event::Delete(_)) => known.change(|inner| {
                    if let Some(config) = &mut inner.config {
                        let trust_domain = std::mem::take(&mut config.spec.trust_domain);
                        config.spec = MeshConfigSpec { trust_domain, ..MeshConfigSpec::default() };
                    }
                }),
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "the watch of the MeshConfig broke; it is taken up again")
                }
            }
        }
    });
}
