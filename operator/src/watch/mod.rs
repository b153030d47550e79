//! Keeps the model current: one watch per kind, with back-off.
//!
//! In: events of the API server. Out: changes of the [`Model`], and for whoever listens, the keys that each change
//! touches. An object of Tulle's own kinds, or a route, that cannot be decoded is logged, and its last readable version
//! stays in force.
//!
//! ```text
//!   wire     the fields of Kubernetes objects that are decoded
//!   convert  converts them to objects of the model
//!   follow   applies the events of one watch
//!   gateway  routes of the Gateway API, where its CRDs are installed
//!   records  those routes as they are written, for their status
//! ```

mod convert;
mod crashes;
mod follow;
pub mod gateway;
mod records;
mod wire;

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tulle_crds::{Canary, MeshConfig, MeshPolicy, WorkloadKind};

use crate::model::{Key, Model, Pod, Touched, Unreadable};
use convert::key;
use follow::{Handlers, Known, follow};
use gateway::Served;
pub use records::{RouteRecord, RouteRecords};

/// Number of kinds that are watched. One that is not installed counts as listed, and so does one that the rest can do
/// without and this account may not read.
const KINDS: usize = 13 + gateway::KINDS;

/// Called with every change while the model is locked, so it must not lock the model. Returns whether to keep it.
pub type Listener = Box<dyn Fn(&Touched) -> bool + Send + Sync>;

/// The model, and the listeners that are notified of its changes.
pub struct Hub {
    model: RwLock<Model>,
    changed: watch::Sender<u64>,
    listeners: Mutex<Vec<Listener>>,
    followers: Mutex<Vec<Weak<Gathered>>>,
    synced: AtomicUsize,
    routes: RouteRecords,
}

impl Debug for Hub {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Hub").field("synced", &self.synced).finish_non_exhaustive()
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            model: RwLock::default(),
            changed: watch::channel(0).0,
            listeners: Mutex::default(),
            followers: Mutex::default(),
            synced: AtomicUsize::new(0),
            routes: RouteRecords::default(),
        }
    }
}

impl Hub {
    /// A hub whose model the watches fill.
    pub fn new(mut model: Model) -> Self {
        // A follower begins with `everything`, which covers these.
        drop(model.take_touched());
        Self { model: RwLock::new(model), ..Self::default() }
    }

    /// A hub with a complete model, for tools that run without a cluster.
    pub fn complete(model: Model) -> Self {
        Self { synced: AtomicUsize::new(KINDS), ..Self::new(model) }
    }

    /// Locks the model for reading.
    pub fn model(&self) -> RwLockReadGuard<'_, Model> {
        self.model.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Routes as the API server has them. Locked after the model, where both are.
    pub fn routes(&self) -> &RouteRecords {
        &self.routes
    }

    /// A counter that every change increments.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether every kind has been listed once. Before that, an object that is missing in the model may exist.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire) >= KINDS
    }

    /// Adds a listener that is called with the keys that each change touches.
    pub fn listen(&self, listener: Listener) {
        lock(&self.listeners).push(listener);
    }

    /// A follower, which collects the keys that changes touch from now on. It begins with `everything`.
    pub fn follow(&self) -> Follower {
        let everything = Touched { everything: true, ..Touched::default() };
        let gathered = Arc::new(Gathered { touched: Mutex::new(everything), notify: Notify::new() });
        lock(&self.followers).push(Arc::downgrade(&gathered));
        Follower { gathered }
    }

    /// Changes the model.
    pub fn change(&self, change: impl FnOnce(&mut Model)) {
        {
            let mut model = self.model.write().unwrap_or_else(PoisonError::into_inner);
            change(&mut model);
            let touched = model.take_touched();
            if !touched.is_empty() {
                // Before the changed model can be read, so that no stale resource is taken for a current one.
                lock(&self.listeners).retain(|listener| listener(&touched));
                lock(&self.followers).retain(|follower| match follower.upgrade() {
                    Some(gathered) => {
                        gathered.add(&touched);
                        true
                    }
                    None => false,
                });
            }
        }
        self.changed.send_modify(|generation| *generation += 1);
    }
}

/// Keys that were touched since the follower took them last.
#[derive(Debug)]
struct Gathered {
    touched: Mutex<Touched>,
    notify: Notify,
}

impl Gathered {
    fn add(&self, more: &Touched) {
        let mut touched = lock(&self.touched);
        touched.inbound.extend(more.inbound.iter().cloned());
        touched.services.extend(more.services.iter().cloned());
        touched.addresses.extend(more.addresses.iter().copied());
        touched.consumers.extend(more.consumers.iter().cloned());
        touched.policies.extend(more.policies.iter().cloned());
        touched.canaries.extend(more.canaries.iter().cloned());
        touched.routes.extend(more.routes.iter().cloned());
        touched.everything |= more.everything;
        touched.ending |= more.ending;
        self.notify.notify_one();
    }
}

/// Follows the changes of a model at its own pace.
#[derive(Debug)]
pub struct Follower {
    gathered: Arc<Gathered>,
}

impl Follower {
    /// Waits until something is touched, and returns everything since the last call.
    pub async fn next(&mut self) -> Touched {
        loop {
            let touched = std::mem::take(&mut *lock(&self.gathered.touched));
            if !touched.is_empty() {
                return touched;
            }
            self.gathered.notify.notified().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts every watcher. Returns what is installed of the Gateway API; `None` until that is known.
pub fn start(client: &Client, hub: &Arc<Hub>) -> watch::Receiver<Option<Served>> {
    let feed = Feed { client: client.clone(), hub: Arc::clone(hub), without: None };
    let optional = Feed {
        client: client.clone(),
        hub: Arc::clone(hub),
        without: Some("sidecars do not learn their zones"),
    };
    feed.start::<wire::Namespace, _>(
        |object| object.name_any(),
        |model, object| model.apply_namespace(object.name_any().into(), convert::namespace(&object)),
        |model, name| model.delete_namespace(name),
    );
    optional.start::<PartialObjectMeta<wire::Node>, _>(
        |object| object.name_any(),
        |model, object| model.apply_node(object.name_any().into(), convert::zone(&object)),
        |model, name| model.delete_node(name),
    );
    feed.start::<wire::Pod, _>(
        |object| object.uid().unwrap_or_default(),
        |model, object| model.apply_pod(convert::pod(&object)),
        |model, uid| model.delete_pod(uid),
    );
    feed.start::<wire::Service, _>(
        key,
        |model, object| model.apply_service(key(&object), convert::service(&object)),
        |model, key| model.delete_service(key),
    );
    feed.start::<wire::EndpointSlice, _>(
        key,
        |model, object| model.apply_slice(key(&object), convert::slice(&object)),
        |model, key| model.delete_slice(key),
    );
    feed.start_guarded::<MeshPolicy>(
        Model::apply_policy,
        Model::mark_policy_unreadable,
        Model::delete_policy,
    );
    feed.start_guarded::<Canary>(
        Model::apply_canary,
        |model, key, _| model.mark_canary_unreadable(key),
        Model::delete_canary,
    );
    feed.start_guarded::<MeshConfig>(
        |model, key, config| {
            if &*key.1 == "mesh" {
                model.apply_config(Some(&config));
            }
        },
        |_, _, _| {},
        |model, key| {
            if &*key.1 == "mesh" {
                model.apply_config(None);
            }
        },
    );
    start_workloads(&feed);
    gateway::start(client, hub)
}

fn start_workloads(feed: &Feed) {
    macro_rules! workload {
        ($kind:ident) => {
            feed.start::<wire::$kind, _>(
                |object| convert::workload_key(WorkloadKind::$kind, object),
                |model, object| {
                    let key = convert::workload_key(WorkloadKind::$kind, &object);
                    model.apply_workload(
                        key,
                        convert::workload(&object.metadata, &object.spec, &object.status),
                    );
                },
                |model, key| model.delete_workload(key),
            );
        };
    }
    workload!(Deployment);
    workload!(StatefulSet);
    workload!(DaemonSet);
    feed.start::<wire::ReplicaSet, _>(
        key,
        |model, object| match convert::replica_set(&object) {
            Some(revision) => model.apply_revision(key(&object), revision),
            None => model.delete_revision(&key(&object)),
        },
        |model, key| model.delete_revision(key),
    );
    feed.start::<wire::ControllerRevision, _>(
        key,
        |model, object| match convert::controller_revision(&object) {
            Some(revision) => model.apply_revision(key(&object), revision),
            None => model.delete_revision(&key(&object)),
        },
        |model, key| model.delete_revision(key),
    );
}

/// Converts a pod from the API server's JSON to the model's form.
///
/// # Errors
/// The text is not a pod.
pub fn pod_of_json(text: &str) -> serde_json::Result<Pod> {
    serde_json::from_str(text).map(|pod| convert::pod(&pod))
}

struct Feed {
    client: Client,
    hub: Arc<Hub>,
    /// See [`Handlers::without`].
    without: Option<&'static str>,
}

impl Feed {
    fn start<K, Id>(
        &self,
        id: impl Fn(&K) -> Id + Send + Sync + 'static,
        apply: impl Fn(&mut Model, K) + Send + Sync + 'static,
        delete: impl Fn(&mut Model, &Id) + Send + Sync + 'static,
    ) where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
        Id: Hash + Eq + Clone + Send + 'static,
    {
        let (api, hub) = (Api::<K>::all(self.client.clone()), Arc::clone(&self.hub));
        let handlers = Handlers { kind: K::kind(&()).into_owned(), without: self.without, id, apply, delete };
        tokio::spawn(async move {
            let mut known = Known::default();
            loop {
                let events = watcher(api.clone(), Config::default()).default_backoff();
                follow(events, &hub, &mut known, &handlers).await;
            }
        });
    }

    /// Starts a watch of one of Tulle's own kinds. An object that this build cannot decode is logged, and its last
    /// readable version stays in force.
    fn start_guarded<K>(
        &self,
        apply: impl Fn(&mut Model, Key, K) + Send + Sync + 'static,
        unreadable: impl Fn(&mut Model, Key, Unreadable) + Send + Sync + 'static,
        delete: impl Fn(&mut Model, &Key) + Send + Sync + 'static,
    ) where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
    {
        self.start::<DeserializeGuard<K>, Key>(
            key,
            move |model, guarded| {
                let key = key(&guarded);
                match guarded.0 {
                    Ok(object) => apply(model, key, object),
                    Err(error) => {
                        tracing::error!(kind = %K::kind(&()), namespace = %key.0, name = %key.1, %error, "cannot decode this object; its last readable version stays in force");
                        let seen = Unreadable {
                            error: error.error,
                            generation: error.metadata.generation.unwrap_or_default(),
                            resource_version: error.metadata.resource_version,
                        };
                        unreadable(model, key, seen);
                    }
                }
            },
            delete,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{key, pod, shop};

    #[tokio::test]
    async fn who_follows_gets_everything_first_and_then_all_that_was_touched() {
        let hub = Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")]));
        let mut follower = hub.follow();
        assert!(follower.next().await.everything);
        hub.change(|model| model.delete_service(&key("shop", "web")));
        hub.change(|model| model.delete_pod("uid-a"));
        let touched = follower.next().await;
        assert!(touched.services.contains(&key("shop", "web")) && !touched.everything);
        assert!(touched.inbound.iter().any(|uid| &**uid == "uid-a"));
        drop(follower);
        hub.change(|model| model.apply_pod(pod("a", "10.1.0.1", "r1")));
        assert!(lock(&hub.followers).is_empty(), "nobody follows any more");
    }
}
