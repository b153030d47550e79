//! The pod that a workload's controller would create, as far as its template says it.

use serde_json::{Map, Value, json};

use crate::commands::lint::read::Document;

/// Where a Pod or a workload has its pod, as a JSON pointer; `None` for other kinds.
pub(crate) fn place(document: &Document) -> Option<&'static str> {
    let group = document.api_version().rsplit_once('/').map_or("", |(group, _)| group);
    Some(match (group, document.kind()) {
        ("", "Pod") => "",
        ("apps", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet")
        | ("batch", "Job")
        | ("", "ReplicationController") => "/spec/template",
        ("batch", "CronJob") => "/spec/jobTemplate/spec/template",
        _ => return None,
    })
}

/// The pod of a Pod or a workload; `None` for other kinds.
pub(super) fn pod(document: &Document, namespace: &str) -> Option<Value> {
    let place = place(document)?;
    let template = document.value.pointer(place)?;
    let mut metadata = Map::new();
    for kept in ["labels", "annotations", "name", "generateName"] {
        // A template has no name of its own.
        let is_kept = place.is_empty() || !kept.to_lowercase().ends_with("name");
        if let Some(value) = template.pointer("/metadata").and_then(|old| old.get(kept)).filter(|_| is_kept) {
            metadata.insert(kept.to_owned(), value.clone());
        }
    }
    metadata.insert("namespace".to_owned(), json!(namespace));
    if !metadata.contains_key("name") && !metadata.contains_key("generateName") {
        let name = if document.name().is_empty() { "pod" } else { document.name() };
        metadata.insert("generateName".to_owned(), json!(format!("{name}-")));
    }
    let spec = template.get("spec").cloned().unwrap_or_else(|| json!({}));
    Some(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
}

/// Without what the API server writes for itself, and what would be different the next time.
pub(super) fn without_bookkeeping(mut pod: Value) -> Value {
    if let Some(metadata) = pod.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        for field in ["managedFields", "uid", "creationTimestamp", "resourceVersion", "generation"] {
            metadata.remove(field);
        }
    }
    if let Some(pod) = pod.as_object_mut() {
        pod.remove("status");
    }
    pod
}
