//! Objects that admission depends on, kept in memory by watches: namespaces, LimitRanges, ResourceQuotas, Canaries and
//! the MeshConfig.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use std::time::Duration;

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

/// How long reading from the API server during a review may take: the API server waits 3 s for the webhook.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Watched objects.
pub struct Cluster {
    /// How many kinds have not been listed yet.
    unsynced_kinds: AtomicUsize,
    namespaces: Store<PartialObjectMeta<Namespace>>,
    limit_ranges: ByNamespace<LimitRange>,
    quotas: ByNamespace<ResourceQuota>,
    canaries: Store<Canary>,
    configs: Store<MeshConfig>,
    /// The trust domain while there is no MeshConfig: that of the last MeshConfig, or the command-line argument.
    trust_domain: RwLock<String>,
}

/// Objects of one kind by namespace.
struct ByNamespace<K>(RwLock<Lists<K>>);

/// The present objects, and those of a list that is not complete yet. As with kube's own store, the present ones hold
/// until then: a watch that is restarted must not make limits disappear for a moment.
struct Lists<K> {
    present: HashMap<String, BTreeMap<String, K>>,
    arriving: HashMap<String, BTreeMap<String, K>>,
}

impl<K: Resource + Clone> ByNamespace<K> {
    fn new() -> Self {
        Self(RwLock::new(Lists { present: HashMap::new(), arriving: HashMap::new() }))
    }

    fn of(&self, namespace: &str) -> Vec<K> {
        let lists = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let of_namespace = lists.present.get(namespace);
        of_namespace.into_iter().flat_map(|of_namespace| of_namespace.values().cloned()).collect()
    }

    fn apply(&self, event: &Event<K>) {
        let mut lists = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let place = |object: &K| (object.namespace().unwrap_or_default(), object.name_any());
        match event {
            Event::Init => lists.arriving.clear(),
            Event::InitApply(object) => {
                let (namespace, name) = place(object);
                lists.arriving.entry(namespace).or_default().insert(name, object.clone());
            }
            Event::InitDone => lists.present = std::mem::take(&mut lists.arriving),
            Event::Apply(object) => {
                let (namespace, name) = place(object);
                lists.present.entry(namespace).or_default().insert(name, object.clone());
            }
            Event::Delete(object) => {
                let (namespace, name) = place(object);
                if let Some(of_namespace) = lists.present.get_mut(&namespace) {
                    of_namespace.remove(&name);
                }
            }
        }
    }
}

impl Cluster {
    /// Starts the watches.
    pub fn follow(client: &Client, trust_domain: String) -> Arc<Self> {
        let (namespaces, namespace_writer) = reflector::store();
        let (canaries, canary_writer) = reflector::store();
        let (configs, config_writer) = reflector::store();
        let cluster = Arc::new(Self {
            unsynced_kinds: AtomicUsize::new(5),
            namespaces,
            limit_ranges: ByNamespace::new(),
            quotas: ByNamespace::new(),
            canaries,
            configs,
            trust_domain: RwLock::new(trust_domain),
        });
        cluster.reflect(watch_all(client, "namespaces"), namespace_writer);
        cluster.reflect(parseable(watch_all(client, "Canaries")), canary_writer);
        cluster.reflect(parseable(watch_all(client, "MeshConfigs")), config_writer);
        cluster.watch(watch_all(client, "LimitRanges"), |cluster, event| cluster.limit_ranges.apply(event));
        cluster.watch(watch_all(client, "ResourceQuotas"), |cluster, event| cluster.quotas.apply(event));
        cluster
    }

    /// Whether every kind has been listed. Before that, a pod could miss its readiness gate.
    pub fn is_synced(&self) -> bool {
        self.unsynced_kinds.load(Ordering::Acquire) == 0
    }

    /// A namespace as injection sees it. One that the watch has not delivered yet, because its first pods come with it,
    /// is read: its annotations would be lost on them for good.
    pub async fn namespace(&self, client: &Client, name: &str) -> inject::Namespace {
        let mut known = self.namespaces.get(&ObjectRef::new(name)).map(|known| known.metadata.clone());
        if known.is_none() && !name.is_empty() {
            let api = Api::<Namespace>::all(client.clone());
            let read = tokio::time::timeout(READ_TIMEOUT, api.get_metadata(name)).await;
            known = read.ok().and_then(Result::ok).map(|read| read.metadata);
        }
        let known = known.unwrap_or_default();
        let labels = known.labels.unwrap_or_default();
        inject::Namespace {
            name: name.to_owned(),
            pod_security: labels.get("pod-security.kubernetes.io/enforce").cloned(),
            annotations: known.annotations.unwrap_or_default(),
            limits: NamespaceLimits { ranges: self.limit_ranges.of(name), quotas: self.quotas.of(name) },
        }
    }

    /// Whether a namespace exists, also one that the watch has not delivered yet. One that cannot be read counts as
    /// existing.
    pub async fn has_namespace(&self, client: &Client, name: &str) -> bool {
        if self.namespaces.get(&ObjectRef::new(name)).is_some() {
            return true;
        }
        let api = Api::<Namespace>::all(client.clone());
        !matches!(api.get_metadata_opt(name).await, Ok(None))
    }

    /// The trust domain: from the status of the MeshConfig, which the operator writes, or else from its spec.
    pub fn trust_domain(&self) -> String {
        let known = || self.trust_domain.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(config) = self.config() else { return known() };
        let in_force = config.status.as_ref().and_then(|status| status.trust_domain.clone());
        let trust_domain = in_force.unwrap_or_else(|| config.spec.trust_domain.clone());
        if known() != trust_domain {
            // Deleting the MeshConfig must not change the trust domain of new pods.
            trust_domain.clone_into(&mut self.trust_domain.write().unwrap_or_else(PoisonError::into_inner));
        }
        trust_domain
    }

    /// Mesh-wide defaults of sidecars, from MeshConfig.
    pub fn defaults(&self) -> SidecarDefaults {
        self.config().map(|config| config.spec.sidecar.clone()).unwrap_or_default()
    }

    /// Whether MeshConfig exempts pods of a service account.
    pub fn is_exempt(&self, namespace: &str, service_account: &str) -> bool {
        let matches = |e: &Exemption| e.namespace == namespace && e.service_account == service_account;
        self.config().is_some_and(|config| config.spec.exemptions.iter().any(matches))
    }

    fn config(&self) -> Option<Arc<MeshConfig>> {
        self.configs.get(&ObjectRef::new("mesh"))
    }

    /// Whether a Canary targets the pod's workload and the pod's revision is not approved yet.
    pub fn needs_approval(&self, namespace: &str, pod: &Value) -> bool {
        needs_approval(&self.canaries.state(), namespace, pod)
    }

    /// Whether a Canary targets this workload.
    pub fn has_canary(&self, namespace: &str, kind: WorkloadKind, name: &str) -> bool {
        self.canaries.state().iter().any(|canary| {
            let target = &canary.spec.target;
            canary.namespace().as_deref() == Some(namespace) && target.kind == kind && target.name == name
        })
    }

    /// Names of other Canaries with the same target.
    pub fn siblings(&self, namespace: &str, canary: &Canary) -> Vec<String> {
        let name = canary.name_any();
        let same = |other: &Arc<Canary>| {
            other.namespace().as_deref() == Some(namespace)
                && other.name_any() != name
                && other.spec.target == canary.spec.target
        };
        self.canaries.state().iter().filter(|other| same(other)).map(|other| other.name_any()).collect()
    }

    /// Fills a store from a watch, as long as the process runs.
    fn reflect<K>(
        self: &Arc<Self>,
        events: impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + 'static,
        writer: Writer<K>,
    ) where
        K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    {
        self.watch(reflector::reflector(writer, events), |_, _| {});
    }

    /// Passes the events of a watch to `apply`, as long as the process runs.
    fn watch<K: Send + 'static>(
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
                    // Kinds of Tulle whose CRD is missing must not keep the webhook from being ready. A denial may end
                    // in a moment, when the API server has seen the webhook's role.
                    Err(error) => is_absent(error),
                };
                if complete && std::mem::take(&mut first) {
                    cluster.unsynced_kinds.fetch_sub(1, Ordering::Release);
                }
            }
        });
    }
}

/// A watch that is restarted when it fails.
fn watch_all<K>(
    client: &Client,
    kind: &'static str,
) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send + use<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = watcher(Api::<K>::all(client.clone()), Config::default()).default_backoff();
    events.inspect(move |event| {
        if let Err(error) = event {
            tracing::warn!(%error, kind, "the watch failed; restarting it");
        }
    })
}

/// Drops objects that this build cannot parse. The last version that it could parse stays until the next list.
fn parseable<K>(
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

/// Whether the API server does not have the kind, because its CRD is missing.
fn is_absent(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error)) = error else {
        return false;
    };
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether one of these Canaries targets the pod's workload and the pod's revision is not approved yet.
fn needs_approval(canaries: &[Arc<Canary>], namespace: &str, pod: &Value) -> bool {
    let Some((kind, name, revision)) = workload_of(pod) else { return false };
    let of_workload = canaries.iter().filter(|canary| {
        let target = &canary.spec.target;
        canary.namespace().as_deref() == Some(namespace) && target.kind == kind && target.name == name
    });
    // The oldest Canary of a target applies, as in the operator.
    let canary = of_workload.min_by(|a, b| by_age(a, b));
    let Some(status) = canary.and_then(|canary| canary.status.as_ref()) else { return false };
    // The former stable revision is approved too, until its successor has been promoted completely.
    let stable = [&status.approved_revision, &status.former_revision];
    !status.approved_revision.is_empty() && !stable.iter().any(|known| **known == revision)
}

/// The workload and the revision of a pod, from its owner reference and labels.
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
