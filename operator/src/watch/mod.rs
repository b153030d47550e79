//! Feeds the model: one watch per kind, with back-off. An object of Tulle's own kinds that cannot be
//! decoded is logged and skipped.
//!
//! ```text
//!   wire     the parts of Kubernetes objects that are decoded
//!   convert  from these to what the model keeps
//!   follow   the events of one watch
//! ```

mod convert;
mod follow;
mod wire;

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tulle_crds::{Canary, MeshConfig, MeshPolicy, WorkloadKind};

use crate::model::{Key, Model, Pod, Unreadable};
use convert::key;
use follow::{Handlers, Known, follow};

/// Kinds that are watched.
const KINDS: usize = 12;

/// The model, and who wants to know that it has changed.
#[derive(Debug)]
pub struct Hub {
    model: RwLock<Model>,
    changed: watch::Sender<u64>,
    ending: watch::Sender<u64>,
    synced: AtomicUsize,
}

impl Default for Hub {
    fn default() -> Self {
        Self {
            model: RwLock::default(),
            changed: watch::channel(0).0,
            ending: watch::channel(0).0,
            synced: AtomicUsize::new(0),
        }
    }
}

impl Hub {
    /// A hub whose model the watches fill.
    pub fn new(model: Model) -> Self {
        Self { model: RwLock::new(model), ..Self::default() }
    }

    /// A hub whose model is complete: for tools that need no cluster.
    pub fn complete(model: Model) -> Self {
        Self { synced: AtomicUsize::new(KINDS), ..Self::new(model) }
    }

    /// The model, to be read.
    pub fn model(&self) -> RwLockReadGuard<'_, Model> {
        self.model.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts up with every change.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Counts up with every pod that begins to end.
    pub fn endings(&self) -> watch::Receiver<u64> {
        self.ending.subscribe()
    }

    /// Whether every kind has been listed once: before that an absent object means nothing.
    pub fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire) >= KINDS
    }

    /// Changes the model.
    pub fn change(&self, change: impl FnOnce(&mut Model)) {
        let endings = {
            let mut model = self.model.write().unwrap_or_else(PoisonError::into_inner);
            change(&mut model);
            model.endings()
        };
        self.changed.send_modify(|generation| *generation += 1);
        self.ending.send_if_modified(|known| std::mem::replace(known, endings) != endings);
    }
}

/// Starts every watcher.
pub fn start(client: &Client, hub: &Arc<Hub>) {
    let feed = Feed { client: client.clone(), hub: Arc::clone(hub) };
    feed.start::<wire::Namespace, _>(
        |object| object.name_any(),
        |model, object| model.apply_namespace(object.name_any().into(), convert::namespace(&object)),
        |model, name| model.delete_namespace(name),
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

/// A pod as the API server writes it, as it is kept.
///
/// # Errors
/// When it is no pod.
pub fn pod_of_json(text: &str) -> serde_json::Result<Pod> {
    serde_json::from_str(text).map(|pod| convert::pod(&pod))
}

struct Feed {
    client: Client,
    hub: Arc<Hub>,
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
        let handlers = Handlers { id, apply, delete };
        tokio::spawn(async move {
            let mut known = Known::default();
            loop {
                let events = watcher(api.clone(), Config::default()).default_backoff();
                follow(events, &hub, &mut known, &handlers).await;
            }
        });
    }

    /// For Tulle's own kinds: an object that this build cannot decode is logged, and its last readable
    /// version stays in force.
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
