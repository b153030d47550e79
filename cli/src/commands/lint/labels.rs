//! Labels and annotations of Tulle on namespaces, pods and workloads: a mistyped one is taken by the API server and does
//! nothing.

use serde_json::{Map, Value};
use tulle_crds::keys;

use super::read::Document;
use super::rules::{Found, MISPLACED};
use super::schema::nearest;
use crate::commands::inject::template;

/// What Tulle's labels and annotations begin with.
const PREFIX: &str = "tulle.dev/";

/// What Tulle writes on its own namespace and pods.
const INTERNAL: [&str; 2] = ["control-plane", "sidecar-image"];

/// What of an object's labels and annotations has no effect.
pub(super) fn check(document: &Document) -> Vec<Found> {
    let mut found = Vec::new();
    if document.api_version() == "v1" && document.kind() == "Namespace" {
        labels(&document.value, "metadata", &mut found);
        annotations(&document.value, "metadata", &mut found);
        return found;
    }
    let Some(place) = template::place(document) else { return found };
    let Some(pod) = document.value.pointer(place) else { return found };
    let path = format!("{place}/metadata").replace('/', ".");
    let path = path.trim_start_matches('.');
    labels(pod, path, &mut found);
    annotations(pod, path, &mut found);
    // A Pod is its own template, and only a CronJob has Jobs around it.
    let around = ["", "/spec/jobTemplate"];
    let around = around.into_iter().filter(|around| place != *around && place.starts_with(around));
    for around in around {
        let Some(object) = document.value.pointer(around) else { continue };
        for list in ["labels", "annotations"] {
            misplaced(document, object, around, pod, list, path, &mut found);
        }
    }
    found
}

/// Settings of a workload, or of the Jobs of a CronJob, that its pods do not have. Tools that label everything alike write
/// them in both places.
fn misplaced(
    document: &Document,
    object: &Value,
    around: &str,
    pod: &Value,
    list: &str,
    path: &str,
    found: &mut Vec<Found>,
) {
    let place = format!("{around}/metadata").replace('/', ".");
    let place = place.trim_start_matches('.');
    for (name, value) in own(object, list) {
        let is_setting =
            keys::SIDECAR_SETTINGS.contains(&name) || keys::INJECT.strip_prefix(PREFIX) == Some(name);
        if is_setting && !own(pod, list).any(|of_pod| of_pod == (name, value)) {
            let message = format!("{place}.{list}: {PREFIX}{name} has no effect on a {}", document.kind());
            found.push(Found::new(MISPLACED, message).hint(format!("write it in {path}.{list}")));
        }
    }
}

/// The labels or annotations of Tulle among the metadata: what follows [`PREFIX`], and the value.
fn own<'a>(object: &'a Value, list: &str) -> impl Iterator<Item = (&'a str, &'a Value)> + use<'a> {
    let metadata = object.get("metadata").and_then(|metadata| metadata.get(list));
    let all = metadata.and_then(Value::as_object).into_iter().flat_map(Map::iter);
    all.filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?, value)))
}

fn labels(object: &Value, path: &str, found: &mut Vec<Found>) {
    for (name, value) in own(object, "labels") {
        let key = format!("{PREFIX}{name}");
        match (key.as_str(), value.as_str()) {
            (keys::INJECT, Some("enabled" | "required" | "disabled")) | (keys::INJECTED, _) => {}
            _ if INTERNAL.contains(&name) => {}
            (keys::INJECT, _) => {
                let message = format!("{path}.labels: {key}={} has no effect", shown(value));
                let hint = "write enabled or required for a namespace, disabled for a pod";
                found.push(Found::new(MISPLACED, message).hint(hint));
            }
            _ => {
                let message = format!("{path}.labels: Tulle has no label {key}");
                let is_annotation = keys::SIDECAR_SETTINGS.contains(&name);
                let hint =
                    if is_annotation { "it is an annotation" } else { "did you mean tulle.dev/inject?" };
                found.push(Found::new(MISPLACED, message).hint(hint));
            }
        }
    }
}

fn annotations(object: &Value, path: &str, found: &mut Vec<Found>) {
    for (name, _) in own(object, "annotations") {
        let key = format!("{PREFIX}{name}");
        if keys::SIDECAR_SETTINGS.contains(&name) || INTERNAL.contains(&name) || key == keys::SEAL {
            continue;
        }
        let hint = match nearest(name, keys::SIDECAR_SETTINGS.into_iter()) {
            _ if key == keys::INJECT => "it is a label".to_owned(),
            Some(near) => format!("did you mean {PREFIX}{near}?"),
            None => format!("there are {}", keys::SIDECAR_SETTINGS.join(", ")),
        };
        let message = format!("{path}.annotations: Tulle has no annotation {key}");
        found.push(Found::new(MISPLACED, message).hint(hint));
    }
}

/// A value as a label would be written.
fn shown(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
