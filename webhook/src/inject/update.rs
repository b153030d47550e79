//! Keeps the injected parts of a pod that is applied again.
//!
//! `kubectl apply` writes the probes of the manifest over those that were moved to the sidecar. Probes of a pod are
//! immutable, so the API server would reject the manifest from which the pod was made.
//!
//! In: a pod before and after an update. Out: operations that put back what injection had made of a value, where the
//! update has the original value again. A value that really differs is left to the API server, which rejects it. Never
//! injects a sidecar and never rejects an update.

use json_patch::Patch;
use serde_json::{Value, json};

use super::probes::{self, KINDS};
use super::{Operations, PROXY, containers_at, name_of, resources};

/// The handlers that a probe can have; it has exactly one.
const HANDLERS: [&str; 4] = ["exec", "httpGet", "tcpSocket", "grpc"];

/// Puts back the injected parts that an update has overwritten with their originals; `None` when there are none.
pub fn restore(old: &Value, new: &Value) -> Option<Patch> {
    let proxy = containers_at(old, "/spec/initContainers").find(|container| name_of(container) == PROXY)?;
    let mut operations = Operations::default();
    restore_probes(old, new, &probes::checks_of(proxy), &mut operations);
    restore_resources(old, new, proxy, &mut operations);
    (!operations.0.is_empty()).then_some(Patch(operations.0))
}

fn restore_probes(old: &Value, new: &Value, checks: &[Value], operations: &mut Operations) {
    for list in ["containers", "initContainers"] {
        let at = format!("/spec/{list}");
        for (index, container) in containers_at(new, &at).enumerate() {
            let name = name_of(container);
            let Some(before) = containers_at(old, &at).find(|before| name_of(before) == name) else {
                continue;
            };
            for kind in KINDS {
                let path = format!("/{name}/{kind}");
                let leads_to =
                    |check: &Value| check.get("path").and_then(Value::as_str) == Some(path.as_str());
                // Moved by whichever version injected the pod, so perhaps to another port.
                let moved = before.pointer(&format!("/{kind}/httpGet")).filter(|moved| leads_to(moved));
                let known = checks.iter().find(|check| leads_to(check));
                let (Some(moved), Some(known), Some(probe)) = (moved, known, container.get(kind)) else {
                    continue;
                };
                if !is_original(container, probe, moved, known) {
                    continue;
                }
                let index = index.to_string();
                for handler in HANDLERS {
                    if probe.get(handler).is_some() {
                        operations.remove(&["spec", list, &index, kind, handler]);
                    }
                }
                operations.add(&["spec", list, &index, kind, "httpGet"], moved.clone());
            }
        }
    }
}

/// Whether a probe of an update is the one that was moved. An apply merges the manifest into the pod, so that parts of
/// the moved handler remain where the manifest has no value.
fn is_original(container: &Value, probe: &Value, moved: &Value, known: &Value) -> bool {
    let is_known = |probe: &Value| {
        let handlers = HANDLERS.into_iter().filter(|handler| probe.get(handler).is_some()).count();
        let found = probes::check(container, probe).ok().flatten();
        handlers == 1 && found.is_some_and(|found| known.get("check") == Some(&found.what))
    };
    // The whole handler, where the original is of another kind.
    let mut without_moved = probe.clone();
    if probe.get("httpGet") == Some(moved)
        && let Some(fields) = without_moved.as_object_mut()
    {
        fields.remove("httpGet");
    }
    // The path, where the original names none, which means the root.
    let mut at_root = probe.clone();
    if let Some(path) = at_root.pointer_mut("/httpGet/path")
        && Some(&*path) == moved.get("path")
    {
        *path = json!("/");
    }
    is_known(probe) || is_known(&without_moved) || is_known(&at_root)
}

/// The pod's own requests and limits, which injection raised by the sidecar's share.
///
/// A limit is one that was raised by the sidecar's limit or by its request. What injection does at present does not tell
/// which: earlier versions raised every limit by the sidecar's limit, and a manifest with a limit alone is merged with the
/// request that the API server made of it, which has been raised.
fn restore_resources(old: &Value, new: &Value, proxy: &Value, operations: &mut Operations) {
    let at = |holder: &Value, path: &str| holder.pointer(path).and_then(resources::amount);
    for kind in ["requests", "limits"] {
        for resource in resources::of_pods() {
            let path = format!("/spec/resources/{kind}/{resource}");
            let (Some(raised), Some(own)) = (old.pointer(&path), at(new, &path)) else { continue };
            let is_raised_by = |kind: &str| {
                let share = at(proxy, &format!("/resources/{kind}/{resource}"));
                share.is_some_and(|share| resources::amount(raised) == Some(own.plus(share)))
            };
            if is_raised_by(kind) || is_raised_by("requests") {
                operations.add(&["spec", "resources", kind, resource], raised.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests;
