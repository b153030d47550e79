//! Routes as the API server has them, for whoever writes their status.
//!
//! In: each version of a route that is watched. Out: what a status is computed from beside the model: references as they
//! are written, the entries of other controllers, and the version of the object. Decides nothing.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde_json::Value;

use super::wire;
use crate::model::gateway::RouteKey;

/// A route as it was seen last.
#[derive(Clone, Debug, Default)]
pub struct RouteRecord {
    /// Its uid.
    pub uid: Arc<str>,
    /// Its generation.
    pub generation: i64,
    /// Its resourceVersion.
    pub resource_version: Option<String>,
    /// The version of its kind in which it is read.
    pub version: &'static str,
    /// What it is attached to, exactly as written.
    pub parent_refs: Vec<Value>,
    /// Its status, with the entries of all controllers.
    pub status: Value,
    /// Why this build cannot read it.
    pub unreadable: Option<String>,
    /// When this generation was seen first. `None`: the operator found it when it started.
    pub seen: Option<Instant>,
}

impl RouteRecord {
    pub(super) fn new(object: wire::Route, version: &'static str, unreadable: Option<String>) -> Self {
        let wire::Route { metadata, mut spec, status } = object;
        let parent_refs = match spec.get_mut("parentRefs").map(Value::take) {
            Some(Value::Array(references)) => references,
            _ => Vec::new(),
        };
        Self {
            uid: metadata.uid.unwrap_or_default().into(),
            generation: metadata.generation.unwrap_or_default(),
            resource_version: metadata.resource_version,
            version,
            parent_refs,
            status,
            unreadable,
            seen: None,
        }
    }
}

/// All routes, and those that have changed since the last look.
#[derive(Debug, Default)]
pub struct RouteRecords {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    records: HashMap<RouteKey, Arc<RouteRecord>>,
    changed: HashSet<RouteKey>,
}

impl RouteRecords {
    /// A route.
    pub fn get(&self, key: &RouteKey) -> Option<Arc<RouteRecord>> {
        self.inner().records.get(key).cloned()
    }

    /// All routes.
    pub fn keys(&self) -> Vec<RouteKey> {
        self.inner().records.keys().cloned().collect()
    }

    /// Routes that have come, gone or changed in anything, their status too, since the last call.
    pub fn take_changed(&self) -> HashSet<RouteKey> {
        std::mem::take(&mut self.inner().changed)
    }

    /// Takes a version over. `live`: it was changed while this operator watched.
    pub(super) fn put(&self, key: RouteKey, mut record: RouteRecord, live: bool) {
        let mut inner = self.inner();
        let known = inner.records.get(&key);
        let same = known.filter(|known| known.uid == record.uid && known.generation == record.generation);
        record.seen = match same {
            Some(known) => known.seen,
            None => live.then(Instant::now),
        };
        inner.changed.insert(key.clone());
        inner.records.insert(key, Arc::new(record));
    }

    pub(super) fn remove(&self, key: &RouteKey) {
        let mut inner = self.inner();
        if inner.records.remove(key).is_some() {
            inner.changed.insert(key.clone());
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::gateway::RouteKind;

    fn key() -> RouteKey {
        RouteKey { kind: RouteKind::Http, namespace: "shop".into(), name: "web".into() }
    }

    fn record(generation: i64, status: Value) -> RouteRecord {
        let object = json!({
            "metadata": {"uid": "u", "generation": generation, "resourceVersion": "7"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web", "future": 1}]},
            "status": status,
        });
        RouteRecord::new(serde_json::from_value(object).unwrap(), "v1", None)
    }

    #[test]
    fn references_are_kept_exactly_as_they_are_written() {
        let found = record(1, json!({}));
        assert_eq!(found.parent_refs, [json!({"group": "", "kind": "Service", "name": "web", "future": 1})]);
        assert_eq!((found.generation, found.resource_version.as_deref()), (1, Some("7")));
    }

    #[test]
    fn the_time_of_a_change_is_that_of_its_generation_and_not_of_its_status() {
        let records = RouteRecords::default();
        let seen = || records.get(&key()).unwrap().seen;
        records.put(key(), record(1, json!({})), false);
        assert_eq!(seen(), None, "it was there when the operator started");
        records.put(key(), record(2, json!({})), true);
        let first = seen();
        assert!(first.is_some());
        records.put(key(), record(2, json!({"parents": []})), true);
        assert_eq!(seen(), first);
        assert_eq!(records.take_changed(), HashSet::from([key()]));
        assert!(records.take_changed().is_empty());
        records.remove(&key());
        records.remove(&key());
        assert_eq!((records.take_changed().len(), records.keys().len()), (1, 0));
    }
}
