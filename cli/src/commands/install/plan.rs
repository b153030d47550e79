//! What an installation may and would do. Pure.

use serde_json::Value;

use crate::objects::{Kind, full_name, items, managed_by, text};
use crate::tenants;

/// `Kind/namespace/name`.
pub fn title(object: &Value) -> String {
    format!("{}/{}", text(object, "/kind"), full_name(object))
}

/// What keeps an object from being written.
pub fn obstacle(live: &Value, new: &Value) -> Option<String> {
    if let Some(tool) = managed_by(live) {
        return Some(format!("{} is managed by {}", title(live), tool.name()));
    }
    elsewhere(live, new).or_else(|| stored_version(live, new))
}

/// A webhook configuration, of which a cluster has one, that calls an installation in another namespace.
fn elsewhere(live: &Value, new: &Value) -> Option<String> {
    const NAMESPACE: &str = "/webhooks/0/clientConfig/service/namespace";
    let (present, wanted) = (text(live, NAMESPACE), text(new, NAMESPACE));
    (present != wanted && !present.is_empty() && !wanted.is_empty()).then(|| {
        format!("{} belongs to Tulle in namespace {present}: write --system-namespace {present}", title(live))
    })
}

/// A version in which objects are stored and that the new CustomResourceDefinition does not serve: the API server could
/// not read them any more.
fn stored_version(live: &Value, new: &Value) -> Option<String> {
    let served: Vec<&str> = items(new, "/spec/versions")
        .iter()
        .filter(|version| version.pointer("/served").and_then(Value::as_bool) == Some(true))
        .map(|version| text(version, "/name"))
        .collect();
    let mut stored = items(live, "/status/storedVersions").iter().filter_map(Value::as_str);
    let lost = stored.find(|stored| !served.contains(stored))?;
    Some(format!("{} has stored objects as {lost}, which the new definition does not serve", title(live)))
}

/// Why the namespace is not taken over: it is hardened by an installation, and deleted with it.
pub fn taken(namespace: &Value, workloads: &[Value]) -> Option<String> {
    let foreign = tenants::foreign(workloads);
    (!tenants::is_labelled(namespace) && !foreign.is_empty()).then(|| {
        format!(
            "{} is not Tulle's: it does not have label {}=tulle, and holds {}",
            title(namespace),
            tenants::PART_OF,
            tenants::some_of(&foreign)
        )
    })
}

/// What to do about a conflict of a server-side apply. `message`: the API server's.
///
/// It names a manager that applies with a colon right after it, and one that updates, such as `kubectl scale`, with the
/// version of the API in between.
pub fn conflict_hint(message: &str) -> &'static str {
    if message.contains("with \"kubectl\":") {
        "these fields were applied with `kubectl apply --server-side`: --force-conflicts takes them over, and so undoes what an overlay has set in them; or apply this version's manifests with kubectl"
    } else {
        "somebody else has set these fields: --force-conflicts takes them over"
    }
}

/// What would become of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Created,
    Changed,
    Unchanged,
}

impl Change {
    /// Compares an object with what the API server would make of it.
    pub fn of(live: Option<&Value>, next: &Value) -> Self {
        match live {
            None => Self::Created,
            Some(live) if settings(live) == settings(next) => Self::Unchanged,
            Some(_) => Self::Changed,
        }
    }

    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Changed => "changed",
            Self::Unchanged => "unchanged",
        }
    }
}

/// The object without what the API server writes into it.
fn settings(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = object.pointer_mut("/metadata").and_then(Value::as_object_mut) {
        for field in
            ["managedFields", "resourceVersion", "generation", "creationTimestamp", "uid", "selfLink"]
        {
            metadata.remove(field);
        }
    }
    object
}

/// The objects in the order in which they are applied: the namespace, the definitions, the rest.
pub fn ordered(objects: &[Value]) -> Vec<&Value> {
    let rank = |object: &&Value| match Kind::of(object).map(|kind| kind.kind) {
        Some("Namespace") => 0,
        Some("CustomResourceDefinition") => 1,
        _ => 2,
    };
    let mut ordered: Vec<&Value> = objects.iter().collect();
    ordered.sort_by_key(rank);
    ordered
}

/// From which version to which.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The operator did not say its version.
    Unknown,
    /// At most two minor versions, or none.
    Fine,
    /// More: the oldest sidecars would not be supported.
    Far(String),
    /// To an older version.
    Down(String),
}

impl Step {
    /// Why it is not done unless the user insists. An installation exists.
    pub fn refusal(&self) -> Option<String> {
        let own = env!("CARGO_PKG_VERSION");
        match self {
            Self::Fine | Self::Far(_) => None,
            Self::Unknown => Some(format!(
                "an operator is installed that did not say its version, so it may be newer than this program, {own}"
            )),
            Self::Down(installed) => {
                Some(format!("the operator has version {installed}, and this program {own}"))
            }
        }
    }

    /// What to know before.
    pub fn warning(&self) -> Option<String> {
        match self {
            Self::Fine => None,
            Self::Unknown => Some(
                "the operator did not say its version, so whether this is an upgrade was not checked"
                    .to_owned(),
            ),
            Self::Far(installed) => Some(format!(
                "from version {installed}, go two minor versions at a time, and restart meshed pods in between: an operator supports sidecars of the two minor versions before it"
            )),
            Self::Down(installed) => Some(format!(
                "the operator has version {installed}, which is newer: an older one may not know stored fields, and does not support newer sidecars"
            )),
        }
    }
}

/// What a change from the installed version to this program's is.
pub fn step(installed: Option<&str>, own: &str) -> Step {
    let numbers = |text: &str| -> Option<(u32, u32, u32)> {
        let mut parts =
            text.trim_start_matches('v').split(['.', '-', '+']).map(|part| part.parse::<u32>().ok());
        Some((parts.next()??, parts.next()??, parts.next()??))
    };
    let Some(installed) = installed else { return Step::Unknown };
    let (Some(from), Some(to)) = (numbers(installed), numbers(own)) else { return Step::Unknown };
    if to < from {
        Step::Down(installed.to_owned())
    } else if to.0 != from.0 || to.1 > from.1 + 2 {
        Step::Far(installed.to_owned())
    } else {
        Step::Fine
    }
}

/// The pods of a Deployment that are not yet as they should be. `None`: it is rolled out.
pub fn missing(deployment: &Value) -> Option<String> {
    let number = |pointer: &str| crate::objects::number(deployment, pointer).unwrap_or(0);
    let wanted = crate::objects::number(deployment, "/spec/replicas").unwrap_or(1);
    let (updated, available) = (number("/status/updatedReplicas"), number("/status/availableReplicas"));
    let seen = number("/status/observedGeneration") >= number("/metadata/generation");
    let old = number("/status/replicas") > updated;
    (!seen || updated < wanted || available < wanted || old).then(|| {
        format!("{}: {available} of {wanted} pods are available, {updated} are new", title(deployment))
    })
}

/// Whether the webhook has written its certificate into every entry of a configuration.
pub fn is_called(configuration: &Value) -> bool {
    let webhooks = items(configuration, "/webhooks");
    !webhooks.is_empty() && webhooks.iter().all(|webhook| !text(webhook, "/clientConfig/caBundle").is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_of_another_tool_is_never_written_and_the_tool_is_named() {
        let live = json!({"kind": "CustomResourceDefinition", "metadata": {"name": "canaries.tulle.dev",
            "labels": {"app.kubernetes.io/managed-by": "Helm"}}});
        assert_eq!(
            obstacle(&live, &json!({})).unwrap(),
            "CustomResourceDefinition/canaries.tulle.dev is managed by Helm"
        );
        let own =
            json!({"kind": "Service", "metadata": {"name": "a", "managedFields": [{"manager": "kubectl"}]}});
        assert_eq!(obstacle(&own, &own), None);
    }

    /// Appends the fields that the API server replaces only as a whole and into which it fills a default that is missing here.
    fn incomplete(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (key, inner) in fields {
                    let defaulted: &[&str] = match key.as_str() {
                        "fieldRef" => &["apiVersion"],
                        "matchConstraints" => &["matchPolicy", "namespaceSelector", "objectSelector"],
                        "roleRef" => &["apiGroup"],
                        _ => &[],
                    };
                    if defaulted.iter().any(|field| inner.get(field).is_none()) {
                        found.push(format!("{key}: {inner}"));
                    }
                    incomplete(inner, found);
                }
                // A rule of a webhook, or of an admission policy.
                if fields.contains_key("operations") && !fields.contains_key("scope") {
                    found.push(value.to_string());
                }
            }
            Value::Array(items) => {
                for item in items {
                    incomplete(item, found);
                }
            }
            _ => {}
        }
    }

    #[test]
    fn the_manifests_conflict_with_themselves_under_no_other_field_manager() {
        let settings = crate::manifests::Settings { undo: true, ..crate::manifests::Settings::default() };
        let objects = crate::manifests::objects(&settings).unwrap();
        let mut found = Vec::new();
        for object in objects.iter().filter(|object| text(object, "/kind") != "CustomResourceDefinition") {
            incomplete(object, &mut found);
        }
        assert_eq!(found, Vec::<String>::new());
        let field = json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}});
        let rule = json!({"rules": [{"operations": ["CREATE"], "resources": ["pods"]}]});
        incomplete(&json!([field, rule]), &mut found);
        assert_eq!(found.len(), 2, "{found:?}");
    }

    #[test]
    fn a_conflict_with_an_applying_kubectl_is_told_from_one_with_another_manager() {
        let of_kubectl =
            "Apply failed with 2 conflicts: conflicts with \"kubectl\":\n- .spec.replicas\n- .spec.paused";
        assert!(conflict_hint(of_kubectl).contains("overlay"));
        assert!(
            conflict_hint("Apply failed with 1 conflict: conflict with \"kubectl\": .spec.replicas")
                .contains("overlay")
        );
        let scaled = "Apply failed with 1 conflict: conflict with \"kubectl\" with subresource \"scale\" using apps/v1: .spec.replicas";
        for other in [
            scaled,
            "Apply failed with 1 conflict: conflict with \"kubectl-edit\" using apps/v1: .spec.replicas",
        ] {
            assert!(conflict_hint(other).starts_with("somebody else"), "{other}");
        }
    }

    #[test]
    fn a_second_control_plane_in_another_namespace_is_refused() {
        let calls = |namespace: &str| {
            json!({"kind": "MutatingWebhookConfiguration", "metadata": {"name": "tulle"},
                "webhooks": [{"clientConfig": {"service": {"namespace": namespace}}}]})
        };
        assert_eq!(obstacle(&calls("mesh"), &calls("mesh")), None);
        assert_eq!(
            obstacle(&calls("mesh"), &calls("tulle-system")).unwrap(),
            "MutatingWebhookConfiguration/tulle belongs to Tulle in namespace mesh: write --system-namespace mesh"
        );
    }

    #[test]
    fn a_definition_that_does_not_serve_a_stored_version_is_not_applied() {
        let live = json!({"kind": "CustomResourceDefinition", "metadata": {"name": "canaries.tulle.dev"},
            "status": {"storedVersions": ["v1alpha1", "v1"]}});
        let version = |name: &str, served: bool| json!({"name": name, "served": served});
        let new = |versions: Value| json!({"spec": {"versions": versions}});
        let both = new(json!([version("v1alpha1", true), version("v1", true)]));
        assert_eq!(obstacle(&live, &both), None);
        let older = new(json!([version("v1alpha1", true), version("v1", false)]));
        assert_eq!(
            obstacle(&live, &older).unwrap(),
            "CustomResourceDefinition/canaries.tulle.dev has stored objects as v1, which the new definition does not serve"
        );
    }

    #[test]
    fn a_namespace_in_which_others_run_is_not_taken_over() {
        let namespace =
            |labels: Value| json!({"kind": "Namespace", "metadata": {"name": "shop", "labels": labels}});
        let web = json!({"kind": "Deployment", "metadata": {"name": "web"}});
        let own = json!({"kind": "Deployment", "metadata": {"name": "tulle-operator"}});
        let ours = namespace(json!({"app.kubernetes.io/part-of": "tulle"}));
        assert_eq!(taken(&ours, std::slice::from_ref(&web)), None);
        assert_eq!(taken(&namespace(json!({})), &[]), None);
        assert_eq!(taken(&namespace(json!({})), std::slice::from_ref(&own)), None);
        assert_eq!(
            taken(&namespace(json!({})), &[own, web]).unwrap(),
            "Namespace/shop is not Tulle's: it does not have label app.kubernetes.io/part-of=tulle, and holds Deployment/web"
        );
    }

    #[test]
    fn what_the_api_server_writes_is_not_a_change() {
        let live = json!({"metadata": {"name": "a", "resourceVersion": "1", "generation": 1}, "spec": {"replicas": 2},
            "status": {"replicas": 2}});
        let mut next = live.clone();
        next["metadata"]["resourceVersion"] = json!("2");
        next["status"] = json!({});
        assert_eq!(Change::of(Some(&live), &next), Change::Unchanged);
        next["spec"]["replicas"] = json!(3);
        assert_eq!(Change::of(Some(&live), &next), Change::Changed);
        assert_eq!(Change::of(None, &next), Change::Created);
    }

    #[test]
    fn the_namespace_and_the_definitions_come_first_and_the_rest_keeps_its_order() {
        let objects = crate::manifests::objects(&crate::manifests::Settings::default()).unwrap();
        let kinds: Vec<&str> = ordered(&objects).iter().map(|object| text(object, "/kind")).collect();
        assert_eq!(kinds[0], "Namespace");
        assert!(kinds[1..4].iter().all(|kind| *kind == "CustomResourceDefinition"), "{kinds:?}");
        let rest: Vec<&Value> = objects
            .iter()
            .filter(|object| !matches!(text(object, "/kind"), "Namespace" | "CustomResourceDefinition"))
            .collect();
        assert_eq!(ordered(&objects)[4..], rest);
        let mut reversed = objects.clone();
        reversed.reverse();
        assert_eq!(text(ordered(&reversed)[0], "/kind"), "Namespace");
        assert_eq!(ordered(&reversed)[4], *rest.last().unwrap());
    }

    #[test]
    fn an_upgrade_is_warned_of_where_it_goes_down_or_too_far() {
        assert_eq!(step(Some("0.3.1"), "0.3.2"), Step::Fine);
        assert_eq!(step(Some("0.3.1"), "0.5.0"), Step::Fine);
        assert_eq!(step(Some("0.3.1"), "0.3.1"), Step::Fine);
        assert_eq!(step(Some("0.3.1"), "0.6.0"), Step::Far("0.3.1".to_owned()));
        assert_eq!(step(Some("0.3.1"), "1.0.0"), Step::Far("0.3.1".to_owned()));
        assert_eq!(step(Some("0.3.1"), "0.3.0"), Step::Down("0.3.1".to_owned()));
        assert_eq!(step(Some("dev"), "0.3.0"), Step::Unknown);
        assert_eq!(step(None, "0.3.0"), Step::Unknown);
        assert!(Step::Fine.warning().is_none() && Step::Unknown.warning().is_some());
        assert!(Step::Fine.refusal().is_none() && Step::Far("0.1.0".to_owned()).refusal().is_none());
        assert!(Step::Down("9.0.0".to_owned()).refusal().unwrap().contains("9.0.0"));
        assert!(Step::Unknown.refusal().unwrap().contains("did not say its version"));
    }

    #[test]
    fn a_deployment_is_rolled_out_when_every_pod_is_new_and_available() {
        let deployment = |generation: u32, replicas: u32, updated: u32, available: u32| {
            json!({"kind": "Deployment", "metadata": {"name": "a", "namespace": "b", "generation": generation},
                "spec": {"replicas": 2}, "status": {"observedGeneration": 1, "replicas": replicas,
                    "updatedReplicas": updated, "availableReplicas": available}})
        };
        assert_eq!(missing(&deployment(1, 2, 2, 2)), None);
        for other in [(2, 2, 2, 2), (1, 3, 2, 2), (1, 2, 1, 2), (1, 2, 2, 1)] {
            assert!(missing(&deployment(other.0, other.1, other.2, other.3)).is_some(), "{other:?}");
        }
        assert_eq!(
            missing(&deployment(1, 2, 2, 1)).unwrap(),
            "Deployment/b/a: 1 of 2 pods are available, 2 are new"
        );
    }

    #[test]
    fn a_configuration_is_called_once_each_entry_has_a_bundle() {
        let with = |bundle: &str| {
            json!({"webhooks": [{"clientConfig": {"caBundle": "YQ=="}},
            {"clientConfig": {"caBundle": bundle}}]})
        };
        assert!(is_called(&with("YQ==")));
        assert!(!is_called(&with("")));
        assert!(!is_called(&json!({})));
    }
}
