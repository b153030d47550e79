//! The manifests of Tulle: the files of `config/base` and `crds/manifests`, as they are in this binary.
//!
//! In: namespace, images and whether `onFailure: Undo` gets its rights. Out: the objects, in the order of
//! `config/base/kustomization.yaml`, with what that kustomization changes. Never reads a file when it runs.

use serde::Deserialize as _;
use serde_json::{Map, Value, json};

use crate::objects::{Kind, text};

/// The namespace of the manifests, which Tulle is installed into unless the user names another.
pub const NAMESPACE: &str = "tulle-system";
/// The operator's Deployment. Its Service, Lease, ClusterRole and ClusterRoleBinding and the label `app` of its pods have
/// the same name.
pub const OPERATOR: &str = "tulle-operator";
/// The webhook's Deployment, its Service and the label `app` of its pods.
pub const WEBHOOK: &str = "tulle-webhook";
/// The Deployments of Tulle.
pub const DEPLOYMENTS: [&str; 2] = [OPERATOR, WEBHOOK];
/// The CustomResourceDefinitions of Tulle.
pub const DEFINITIONS: [&str; 3] = ["canaries.tulle.dev", "meshconfigs.tulle.dev", "meshpolicies.tulle.dev"];

/// A file of manifests.
pub struct File {
    /// As `kustomization.yaml` names it.
    pub name: &'static str,
    /// What it holds.
    pub text: &'static str,
}

/// The files that `config/base/kustomization.yaml` lists, in its order.
pub const BASE: [File; 12] = [
    File { name: "namespace.yaml", text: include_str!("../../config/base/namespace.yaml") },
    File { name: "canaries.yaml", text: include_str!("../../crds/manifests/canaries.yaml") },
    File { name: "meshconfigs.yaml", text: include_str!("../../crds/manifests/meshconfigs.yaml") },
    File { name: "meshpolicies.yaml", text: include_str!("../../crds/manifests/meshpolicies.yaml") },
    File { name: "operator.yaml", text: include_str!("../../config/base/operator.yaml") },
    File { name: "operator-rbac.yaml", text: include_str!("../../config/base/operator-rbac.yaml") },
    File { name: "viewer-rbac.yaml", text: include_str!("../../config/base/viewer-rbac.yaml") },
    File { name: "webhook.yaml", text: include_str!("../../config/base/webhook.yaml") },
    File { name: "webhook-rbac.yaml", text: include_str!("../../config/base/webhook-rbac.yaml") },
    File { name: "admission.yaml", text: include_str!("../../config/base/admission.yaml") },
    File { name: "network-policy.yaml", text: include_str!("../../config/base/network-policy.yaml") },
    File { name: "quota.yaml", text: include_str!("../../config/base/quota.yaml") },
];

/// The rights of `onFailure: Undo`.
pub const UNDO: File = File { name: "rbac.yaml", text: include_str!("../../config/overlays/undo/rbac.yaml") };

/// What may differ between two installations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Where Tulle is installed.
    pub namespace: String,
    /// The registry of the three images, with the folder in it.
    pub registry: Option<String>,
    /// The tag of the three images.
    pub tag: Option<String>,
    /// Whether the operator may restore the template of a Deployment.
    pub undo: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { namespace: NAMESPACE.to_owned(), registry: None, tag: None, undo: false }
    }
}

/// The objects of an installation, in the order in which they can be created.
///
/// # Errors
/// A file is not YAML, which a test excludes.
pub fn objects(settings: &Settings) -> Result<Vec<Value>, serde_yaml::Error> {
    let mut objects = Vec::new();
    let undo = settings.undo.then_some(&UNDO);
    for file in BASE.iter().chain(undo) {
        for document in serde_yaml::Deserializer::from_str(file.text) {
            let object = Value::deserialize(document)?;
            if !object.is_null() {
                objects.push(adapted(object, settings));
            }
        }
    }
    Ok(objects)
}

/// What kustomize makes of an object: its label, namespace, references to the namespace, and images.
fn adapted(mut object: Value, settings: &Settings) -> Value {
    let namespaced = Kind::of(&object).is_some_and(|kind| kind.namespaced);
    let is_namespace = text(&object, "/kind") == "Namespace";
    if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        let labels = metadata.entry("labels").or_insert_with(|| Value::Object(Map::new()));
        if let Some(labels) = labels.as_object_mut() {
            labels.insert("app.kubernetes.io/part-of".to_owned(), json!("tulle"));
        }
        if namespaced {
            metadata.insert("namespace".to_owned(), json!(settings.namespace));
        }
        if is_namespace {
            metadata.insert("name".to_owned(), json!(settings.namespace));
        }
    }
    for subject in list_mut(&mut object, "/subjects") {
        set(subject, "/namespace", &settings.namespace);
    }
    for webhook in list_mut(&mut object, "/webhooks") {
        set(webhook, "/clientConfig/service/namespace", &settings.namespace);
    }
    for container in list_mut(&mut object, "/spec/template/spec/containers") {
        set_image(container.pointer_mut("/image"), settings);
    }
    let sidecar = "/spec/template/metadata/annotations/tulle.dev~1sidecar-image";
    set_image(object.pointer_mut(sidecar), settings);
    object
}

fn list_mut<'a>(object: &'a mut Value, pointer: &str) -> &'a mut [Value] {
    object.pointer_mut(pointer).and_then(Value::as_array_mut).map(Vec::as_mut_slice).unwrap_or_default()
}

/// Replaces a text that there is.
fn set(object: &mut Value, pointer: &str, new: &str) {
    if let Some(value) = object.pointer_mut(pointer) {
        *value = json!(new);
    }
}

fn set_image(image: Option<&mut Value>, settings: &Settings) {
    let Some(value) = image else { return };
    let Some(new) = value.as_str().and_then(|old| image_of(old, settings)) else { return };
    *value = json!(new);
}

/// The image to use in place of `tulle.local/PART:dev`. `None`: another image, or nothing is set.
fn image_of(old: &str, settings: &Settings) -> Option<String> {
    let part = old.strip_prefix("tulle.local/")?.split(':').next()?;
    let tag = settings.tag.as_deref();
    match (&settings.registry, tag) {
        (None, None) => None,
        (None, Some(tag)) => Some(format!("tulle.local/{part}:{tag}")),
        (Some(registry), tag) => {
            let registry = registry.trim_end_matches('/');
            Some(format!("{registry}/tulle-{part}:{}", tag.unwrap_or(env!("CARGO_PKG_VERSION"))))
        }
    }
}

/// The objects as YAML, one document each.
///
/// # Errors
/// An object cannot be written as YAML.
pub fn yaml(objects: &[Value]) -> Result<String, serde_yaml::Error> {
    let mut text = String::new();
    for object in objects {
        text.push_str("---\n");
        text.push_str(&crate::yaml::to_string(object)?);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{items, name, namespace};

    fn settings() -> Settings {
        Settings {
            namespace: "mesh".to_owned(),
            registry: Some("registry.example/team/".to_owned()),
            tag: Some("1.2.3".to_owned()),
            undo: true,
        }
    }

    /// The resources of a kustomization, with those of the folder `crds/manifests` in place of the folder.
    fn listed() -> Vec<String> {
        let resources = |text: &str| {
            let read: Value = serde_yaml::from_str(text).unwrap();
            items(&read, "/resources")
                .iter()
                .map(|file| file.as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        let definitions = resources(include_str!("../../crds/manifests/kustomization.yaml"));
        let mut listed = Vec::new();
        for file in resources(include_str!("../../config/base/kustomization.yaml")) {
            match file.as_str() {
                "../../crds/manifests" => listed.extend(definitions.clone()),
                _ => listed.push(file),
            }
        }
        listed
    }

    #[test]
    fn every_file_that_the_kustomization_lists_is_in_the_binary_in_its_order() {
        let embedded: Vec<&str> = BASE.iter().map(|file| file.name).collect();
        assert_eq!(embedded, listed());
        let overlay: Value =
            serde_yaml::from_str(include_str!("../../config/overlays/undo/kustomization.yaml")).unwrap();
        assert_eq!(overlay["resources"], json!(["../../base", UNDO.name]));
    }

    #[test]
    fn every_object_is_of_a_kind_that_is_known() {
        for object in objects(&settings()).unwrap() {
            assert!(Kind::of(&object).is_some(), "{} {}", object["apiVersion"], object["kind"]);
            assert!(!name(&object).is_empty());
            assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/part-of"], "tulle");
        }
    }

    #[test]
    fn the_lists_of_names_are_those_of_the_manifests() {
        let objects = objects(&Settings::default()).unwrap();
        let named = |kind: &str| {
            let of_kind = objects.iter().filter(|object| text(object, "/kind") == kind);
            let mut names: Vec<&str> = of_kind.map(name).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(named("Deployment"), DEPLOYMENTS);
        assert_eq!(named("CustomResourceDefinition"), DEFINITIONS);
        assert_eq!(named("Namespace"), [NAMESPACE]);
        let mut deployments = objects.iter().filter(|object| text(object, "/kind") == "Deployment");
        assert!(deployments.all(|object| text(object, "/spec/selector/matchLabels/app") == name(object)));
        for kind in ["Service", "ClusterRole", "ClusterRoleBinding"] {
            assert!(named(kind).contains(&OPERATOR), "{kind}");
        }
    }

    #[test]
    fn nothing_names_the_former_namespace_or_registry_any_more() {
        let objects = objects(&settings()).unwrap();
        let text = yaml(&objects).unwrap();
        for left in ["tulle.local", "namespace: tulle-system", "name: tulle-system"] {
            assert!(!text.contains(left), "{left}");
        }
        for image in ["tulle-operator", "tulle-webhook", "tulle-sidecar"] {
            assert!(text.contains(&format!("registry.example/team/{image}:1.2.3")), "{image}");
        }
        let mut in_a_namespace = objects.iter().filter(|object| Kind::of(object).unwrap().namespaced);
        assert!(in_a_namespace.clone().count() > 8);
        assert!(in_a_namespace.all(|object| namespace(object) == "mesh"));
    }

    #[test]
    fn the_rights_to_undo_are_granted_only_where_they_are_asked_for() {
        let has = |undo| {
            let objects = objects(&Settings { undo, ..Settings::default() }).unwrap();
            objects.iter().any(|object| name(object) == "tulle-operator-undo")
        };
        assert!(has(true) && !has(false));
    }

    #[test]
    fn the_tag_is_this_version_where_only_a_registry_is_named() {
        let registry = Settings { registry: Some("r.example".to_owned()), ..Settings::default() };
        let expected = format!("r.example/tulle-sidecar:{}", env!("CARGO_PKG_VERSION"));
        assert_eq!(image_of("tulle.local/sidecar:dev", &registry), Some(expected));
        assert_eq!(image_of("tulle.local/sidecar:dev", &Settings::default()), None);
        assert_eq!(image_of("other.example/proxy:1", &registry), None);
        let tag = Settings { tag: Some("2".to_owned()), ..Settings::default() };
        assert_eq!(image_of("tulle.local/webhook:dev", &tag), Some("tulle.local/webhook:2".to_owned()));
    }
}
