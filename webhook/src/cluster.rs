//! What admission needs to know, kept in memory by reflectors: namespaces and their limits, Canaries, the MeshConfig.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::{LimitRange, Namespace, ResourceQuota};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, Config, Event, watcher};
use kube::runtime::{WatchStreamExt as _, reflector::store::Writer};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tulle_crds::{Canary, Exemption, MeshConfig, SidecarDefaults, WorkloadKind, by_age};

use crate::inject::{self, NamespaceLimits};

/// What is known.
pub struct Cluster {
    /// Kinds whose first list has not come.
    missing: AtomicUsize,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    limit_ranges: ByNamespace<LimitRange>,
    quotas: ByNamespace<ResourceQuota>,
    canaries: Store<Canary>,
    configs: Store<MeshConfig>,
    /// The trust domain while there is no MeshConfig: that of the last one, or the argument.
    trust_domain: RwLock<String>,
}

/// Objects of one kind by namespace.
struct ByNamespace<K>(RwLock<HashMap<String, BTreeMap<String, K>>>);

impl<K: Resource + Clone> ByNamespace<K> {
    fn of(&self, namespace: &str) -> Vec<K> {
        let all = self.0.read().unwrap_or_else(PoisonError::into_inner);
        all.get(namespace).into_iter().flat_map(|its| its.values().cloned()).collect()
    }

    fn apply(&self, event: &Event<K>) {
        let mut all = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            // What a broken watch has missed is not in the new list.
            Event::Init => all.clear(),
            Event::Apply(object) | Event::InitApply(object) => {
                let its = all.entry(object.namespace().unwrap_or_default()).or_default();
                its.insert(object.name_any(), object.clone());
            }
            Event::Delete(object) => {
                if let Some(its) = all.get_mut(&object.namespace().unwrap_or_default()) {
                    its.remove(&object.name_any());
                }
            }
            Event::InitDone => {}
        }
    }
}

impl Cluster {
    /// Begins to follow the cluster.
    pub fn follow(client: &Client, trust_domain: String) -> Arc<Self> {
        let (namespaces, namespace_writer) = reflector::store();
        let (canaries, canary_writer) = reflector::store();
        let (configs, config_writer) = reflector::store();
        let cluster = Arc::new(Self {
            missing: AtomicUsize::new(5),
            namespaces,
            limit_ranges: ByNamespace(RwLock::default()),
            quotas: ByNamespace(RwLock::default()),
            canaries,
            configs,
            trust_domain: RwLock::new(trust_domain),
        });
        cluster.reflect(watched(client, "namespaces"), namespace_writer);
        cluster.reflect(readable(watched(client, "Canaries")), canary_writer);
        cluster.reflect(readable(watched(client, "MeshConfigs")), config_writer);
        cluster.keep(watched(client, "LimitRanges"), |cluster, event| cluster.limit_ranges.apply(event));
        cluster.keep(watched(client, "ResourceQuotas"), |cluster, event| cluster.quotas.apply(event));
        cluster
    }

    /// Whether every kind has been listed: before that a pod could miss its gate.
    pub fn is_synced(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }

    /// A namespace, as injection sees it.
    pub fn namespace(&self, name: &str) -> inject::Namespace {
        let known = self.namespaces.get(&ObjectRef::new(name));
        let (labels, annotations) = match &known {
            Some(known) => (known.labels().clone(), known.annotations().clone()),
            None => Default::default(),
        };
        inject::Namespace {
            name: name.to_owned(),
            pod_security: labels.get("pod-security.kubernetes.io/enforce").cloned(),
            annotations,
            limits: NamespaceLimits { ranges: self.limit_ranges.of(name), quotas: self.quotas.of(name) },
        }
    }

    /// The trust domain: the one that the operator reports to be in force, if it has done so.
    pub fn trust_domain(&self) -> String {
        let known = || self.trust_domain.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(config) = self.config() else { return known() };
        let in_force = config.status.as_ref().and_then(|status| status.trust_domain.clone());
        let trust_domain = in_force.unwrap_or_else(|| config.spec.trust_domain.clone());
        if known() != trust_domain {
            // A MeshConfig that is deleted does not move the mesh to another one.
            trust_domain.clone_into(&mut self.trust_domain.write().unwrap_or_else(PoisonError::into_inner));
        }
        trust_domain
    }

    /// Settings of sidecars for the whole mesh.
    pub fn defaults(&self) -> SidecarDefaults {
        self.config().map(|config| config.spec.sidecar.clone()).unwrap_or_default()
    }

    /// Whether a pod of this account may stay without a sidecar.
    pub fn is_exempt(&self, namespace: &str, service_account: &str) -> bool {
        let matches = |e: &Exemption| e.namespace == namespace && e.service_account == service_account;
        self.config().is_some_and(|config| config.spec.exemptions.iter().any(matches))
    }

    fn config(&self) -> Option<Arc<MeshConfig>> {
        self.configs.get(&ObjectRef::new("mesh"))
    }

    /// Whether a Canary holds the pod's workload and its revision has not been approved.
    pub fn is_on_trial(&self, namespace: &str, pod: &Value) -> bool {
        is_on_trial(&self.canaries.state(), namespace, pod)
    }

    /// Other Canaries with the same target.
    pub fn siblings(&self, namespace: &str, canary: &Canary) -> Vec<String> {
        let name = canary.name_any();
        let same = |other: &Arc<Canary>| {
            other.namespace().as_deref() == Some(namespace)
                && other.name_any() != name
                && other.spec.target == canary.spec.target
        };
        self.canaries.state().iter().filter(|other| same(other)).map(|other| other.name_any()).collect()
    }

    /// Fills a store for ever.
    fn reflect<K>(
        self: &Arc<Self>,
        events: impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + 'static,
        writer: Writer<K>,
    ) where
        K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    {
        self.keep(reflector::reflector(writer, events), |_, _| {});
    }

    /// Follows a kind for ever.
    fn keep<K: Send + 'static>(
        self: &Arc<Self>,
        events: impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + 'static,
        apply: impl Fn(&Self, &Event<K>) + Send + 'static,
    ) {
        let cluster = Arc::clone(self);
        tokio::spawn(async move {
            let mut first = true;
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                let complete = match &event {
                    Ok(event) => {
                        apply(&cluster, event);
                        matches!(event, Event::InitDone)
                    }
                    // A kind that this cluster does not have, or does not let us read, has no objects to wait for.
                    Err(error) => is_absent(error),
                };
                if complete && std::mem::take(&mut first) {
                    cluster.missing.fetch_sub(1, Ordering::Release);
                }
            }
        });
    }
}

/// A watch that is taken up again when it breaks.
fn watched<K>(
    client: &Client,
    kind: &'static str,
) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + use<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = watcher(Api::<K>::all(client.clone()), Config::default()).default_backoff();
    events.inspect(move |event| {
        if let Err(error) = event {
            tracing::warn!(%error, kind, "the watch broke; it is taken up again");
        }
    })
}

/// Only objects that this build can read; of one that it cannot, the last readable version stays until the next list.
fn readable<K>(
    events: impl Stream<Item = Result<Event<DeserializeGuard<K>>, watcher::Error>> + Send,
) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send
where
    K: Resource + Send + 'static,
{
    events.filter_map(|event| {
        let event = match event {
            Ok(Event::Apply(object)) => object.0.ok().map(Event::Apply).map(Ok),
            Ok(Event::InitApply(object)) => object.0.ok().map(Event::InitApply).map(Ok),
            Ok(Event::Delete(object)) => object.0.ok().map(Event::Delete).map(Ok),
            Ok(Event::Init) => Some(Ok(Event::Init)),
            Ok(Event::InitDone) => Some(Ok(Event::InitDone)),
            Err(error) => Some(Err(error)),
        };
        futures::future::ready(event)
    })
}

/// Whether the API server does not have the kind (its CRD is missing) or does not let us read it.
fn is_absent(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) = error else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if [403, 404].contains(&status.code))
}

/// Whether one of these Canaries holds the pod's workload and the pod's revision has not been approved.
fn is_on_trial(canaries: &[Arc<Canary>], namespace: &str, pod: &Value) -> bool {
    let Some((kind, name, revision)) = workload_of(pod) else { return false };
    let its = canaries.iter().filter(|canary| {
        let target = &canary.spec.target;
        canary.namespace().as_deref() == Some(namespace) && target.kind == kind && target.name == name
    });
    // Of several the oldest holds it, as with the operator.
    let canary = its.min_by(|a, b| by_age(a, b));
    let Some(status) = canary.and_then(|canary| canary.status.as_ref()) else { return false };
    // What was stable until its successor has taken over needs no trial either.
    let stable = [&status.approved_revision, &status.former_revision];
    !status.approved_revision.is_empty() && !stable.iter().any(|known| **known == revision)
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
