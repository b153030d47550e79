//! The namespace of Tulle, and what else is in it.
//!
//! In: the workloads of a namespace. Out: those that are not part of Tulle. `install` hardens the namespace and `uninstall`
//! deletes it, so both ask first whether it is Tulle's alone.

use kube::Client;
use serde_json::Value;
pub use tulle_mesh::check::some_of;

use crate::manifests::DEPLOYMENTS;
use crate::objects::{self, Kind, Read, label, name, text};

/// The label that the manifests give to every object.
pub const PART_OF: &str = "app.kubernetes.io/part-of";
/// What makes a namespace somebody's.
const WORKLOADS: [Kind; 5] =
    [objects::DEPLOYMENT, objects::STATEFUL_SET, objects::DAEMON_SET, objects::POD, objects::VOLUME_CLAIM];

/// Whether a namespace carries the label of the manifests.
pub fn is_labelled(namespace: &Value) -> bool {
    label(namespace, PART_OF) == Some("tulle")
}

/// The workloads of a namespace, those of Tulle among them.
///
/// # Errors
/// A kind cannot be listed.
pub async fn workloads(client: &Client, namespace: &str) -> Read<Vec<Value>> {
    let mut found = Vec::new();
    for kind in WORKLOADS {
        found.extend(objects::list(client, kind, Some(namespace), None).await?);
    }
    Ok(found)
}

/// The workloads that are not part of Tulle, as `Kind/name`.
pub fn foreign(workloads: &[Value]) -> Vec<String> {
    let is_own = |object: &Value| match text(object, "/kind") {
        "Deployment" => DEPLOYMENTS.contains(&name(object)),
        "Pod" => label(object, "app").is_some_and(|app| DEPLOYMENTS.contains(&app)),
        _ => false,
    };
    let others = workloads.iter().filter(|object| !is_own(object));
    others.map(|object| format!("{}/{}", text(object, "/kind"), name(object))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_workloads_that_are_not_tulles_are_foreign() {
        let object = |kind: &str, name: &str, app: &str| json!({"kind": kind, "metadata": {"name": name, "labels": {"app": app}}});
        let all = [
            object("Deployment", "tulle-operator", ""),
            object("Pod", "tulle-webhook-1", "tulle-webhook"),
            object("Deployment", "web", "tulle-operator"),
            object("StatefulSet", "tulle-operator", ""),
            object("Pod", "web-1", "web"),
            object("PersistentVolumeClaim", "data", ""),
        ];
        let expected =
            ["Deployment/web", "StatefulSet/tulle-operator", "Pod/web-1", "PersistentVolumeClaim/data"];
        assert_eq!(foreign(&all), expected);
        assert_eq!(foreign(&[]), Vec::<String>::new());
    }

    #[test]
    fn a_sentence_lists_five_names_and_counts_the_others() {
        let names: Vec<String> = ('a'..='g').map(String::from).collect();
        assert_eq!(some_of(&names), "a, b, c, d, e and 2 more");
        assert_eq!(some_of(&["a".to_owned()]), "a");
    }

    #[test]
    fn a_namespace_is_tulles_by_its_label() {
        assert!(is_labelled(&json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "tulle"}}})));
        assert!(!is_labelled(&json!({"metadata": {"labels": {"app.kubernetes.io/part-of": "shop"}}})));
        assert!(!is_labelled(&json!({"metadata": {"name": "tulle-system"}})));
    }
}
