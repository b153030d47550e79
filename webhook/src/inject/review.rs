//! Reviews a pod that has the sidecar already.
//!
//! In: a pod that another webhook may have changed after its injection, or a copy of a pod. Out: operations that restore
//! what injection had made and others have changed, and warnings about what cannot be restored. In `required` namespaces
//! a sidecar that is not genuine is rejected. Never injects a second sidecar.

use json_patch::Patch;
use serde_json::{Value, json};

use super::{
    Context, INIT, Mode, Namespace, Operations, Outcome, PROXY, PodSettings, containers, containers_at,
    label_version, name_of, probes, proxy_of, reserved, seal,
};

/// Decides about a pod that has the sidecar.
pub(super) fn review(pod: &Value, context: &Context, warnings: &mut Vec<String>) -> Outcome {
    if pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return Outcome::Refuse(format!(
            "the pod has hostNetwork and the containers {INIT} and {PROXY}, whose redirect rules would apply to the whole node; remove one of the two"
        ));
    }
    if context.mode == Mode::Required
        && let Some(difference) = forged_sidecar(pod, context)
    {
        return Outcome::Refuse(format!(
            "{difference}, but namespace {} requires the sidecar as Tulle injects it. Remove {INIT} and {PROXY} from the pod, because the webhook adds them. If another webhook changed them, exclude them there; if it rewrites images, install Tulle with the rewritten image name",
            context.namespace.name
        ));
    }
    if !proxy_of(pod).is_some_and(reserved::restarts) {
        warnings.push(format!(
            "container {PROXY} has lost restartPolicy: Always, so the pod stays in Init; another webhook drops fields that its libraries do not know, such as those older than Kubernetes 1.28: update it, or exclude the pod there"
        ));
    }
    warn_about_lost_rights(pod, warnings);
    let mut operations = Operations::default();
    if let Some(Patch(moved)) = probes::move_added(pod, warnings) {
        operations.0.extend(moved);
    }
    // `kubectl debug --copy-to` drops the labels.
    if pod.pointer("/metadata/labels/tulle.dev~1sidecar").is_none() {
        label_version(pod, injected_version(pod, context), &mut operations);
    }
    // Last, because the other operations name containers by the places that they have now.
    restore_order(pod, &mut operations);
    if operations.0.is_empty() { Outcome::Skip } else { Outcome::Inject(Patch(operations.0)) }
}

/// The version of a sidecar that the pod has brought along; only that of the installed image is known.
fn injected_version(pod: &Value, context: &Context) -> &'static str {
    let image = proxy_of(pod).and_then(|proxy| proxy.get("image")).and_then(Value::as_str);
    let is_installed = image.is_some_and(|image| seal::is_same_image(image, &context.image));
    if is_installed { env!("CARGO_PKG_VERSION") } else { "unknown" }
}

/// Moves the injected containers to the front again, where injection puts them whatever the pod has of its own.
///
/// Kubelet starts init containers in their order, and stops native sidecars in the reverse order after the application:
/// one that stands before the proxy loses the network while it still sends what it has. Any container that stands before
/// `tulle-init` runs without the redirect rules.
fn restore_order(pod: &Value, operations: &mut Operations) {
    let mut names: Vec<&str> = containers_at(pod, "/spec/initContainers").map(name_of).collect();
    let first: Vec<&str> = [INIT, PROXY].into_iter().filter(|name| names.contains(name)).collect();
    if names.starts_with(&first) {
        return;
    }
    for name in first.into_iter().rev() {
        let Some(index) = names.iter().position(|other| *other == name) else { continue };
        if index > 0 {
            operations.move_to_front("initContainers", index);
            names.remove(index);
            names.insert(0, name);
        }
    }
}

/// Warns about rights that the injected containers have lost and cannot do without.
fn warn_about_lost_rights(pod: &Value, warnings: &mut Vec<String>) {
    for name in [INIT, PROXY] {
        let found = containers_at(pod, "/spec/initContainers").find(|container| name_of(container) == name);
        let Some(container) = found else {
            warnings.push(format!(
                "container {name} is missing, so the pod's traffic is not redirected to the sidecar; remove {INIT} and {PROXY} from the pod, because the webhook adds them, or exclude them in the webhook that removes it"
            ));
            continue;
        };
        let lost = containers::lost_rights(container, pod);
        if !lost.is_empty() {
            warnings.push(format!(
                "container {name} {}, so the pod stays in Init; another webhook has changed it: exclude {INIT} and {PROXY} there",
                lost.join(" and ")
            ));
        }
    }
}

/// How a pod's sidecar differs from the one that Tulle injects, if it does: a pod must not pass as meshed with a
/// container or volume that only has the injected name. Fields that the API server adds are ignored.
fn forged_sidecar(pod: &Value, context: &Context) -> Option<String> {
    let tampered = |container: &Value| {
        let why = containers::tampered(container)?;
        Some(format!("container {} {why}", name_of(container)))
    };
    let ours = containers_at(pod, "/spec/initContainers").filter(|c| [INIT, PROXY].contains(&name_of(c)));
    if let Some(difference) = ours.into_iter().find_map(tampered) {
        return Some(difference);
    }
    let seal = pod.pointer("/metadata/annotations/tulle.dev~1injection").and_then(Value::as_str);
    let Namespace { name, .. } = &context.namespace;
    if seal.is_some_and(|seal| context.key.verify(seal, pod, name, context.mode)) {
        return None;
    }
    let (settings, none) = (PodSettings::default(), Value::Null);
    let ours = [
        (INIT, containers::init(context, &settings, &none)),
        (PROXY, containers::proxy(context, &settings, &none, &json!([]))),
    ];
    for (name, wanted) in ours {
        let found = containers_at(pod, "/spec/initContainers").find(|container| name_of(container) == name);
        let difference = match found {
            Some(found) => containers::difference(found, &wanted),
            None => Some("is missing".to_owned()),
        };
        if let Some(difference) = difference {
            return Some(format!("container {name} {difference}"));
        }
    }
    containers::volumes().into_iter().find_map(|wanted| {
        let name = name_of(&wanted).to_owned();
        let found = containers_at(pod, "/spec/volumes").find(|volume| name_of(volume) == name);
        let same = |found: &Value| containers::volume_source(found) == containers::volume_source(&wanted);
        (!found.is_some_and(same))
            .then(|| format!("volume {name} is missing or differs from the injected one"))
    })
}

#[cfg(test)]
mod tests;
