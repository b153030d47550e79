//! What is removed, and in which order. Pure.

use serde_json::{Value, json};
use tulle_crds::keys;

use crate::manifests::OPERATOR;
use crate::objects::{self, Kind, Tool, full_name, items, managed_by, text};
use crate::tenants;

/// Pods that a refusal names; the others are counted.
const LISTED: usize = 20;
/// How finalizers of Tulle begin.
const OWN: &str = "tulle.dev/";
/// Secrets are deleted by name, and never read.
const SECRET: Kind = Kind { api_version: "v1", kind: "Secret", plural: "secrets", namespaced: true };
/// The authorities of the mesh and of the webhook.
const SECRETS: [&str; 2] = ["tulle-root", "tulle-webhook-authority"];

/// What is there.
pub struct Seen {
    /// The namespace of Tulle.
    pub system: String,
    /// Pods with a sidecar, as `namespace/name`.
    pub injected: Vec<String>,
    /// Pods whose readiness gate is closed.
    pub gated: Vec<Place>,
    pub canaries: Vec<Value>,
    pub policies: Vec<Value>,
    pub configs: Vec<Value>,
    /// ConfigMaps with the trust bundle.
    pub bundles: Vec<Place>,
    /// What another tool than kubectl or this program has installed.
    pub managed: Option<Managed>,
    /// The namespace of Tulle, if it exists.
    pub namespace: Option<Value>,
    /// Workloads in it that are not part of Tulle, as `Kind/name`.
    pub foreign: Vec<String>,
    /// The objects of an installation.
    pub installed: Vec<Value>,
}

/// An object of Tulle that a tool manages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Managed {
    /// `Kind/namespace/name`.
    pub object: String,
    pub tool: Tool,
}

/// The first of these objects that a tool manages.
pub fn managed(objects: &[Value]) -> Option<Managed> {
    objects.iter().find_map(|object| {
        let object_name = format!("{}/{}", text(object, "/kind"), full_name(object));
        managed_by(object).map(|tool| Managed { object: object_name, tool })
    })
}

/// Where an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Empty: the object has none.
    pub namespace: String,
    pub name: String,
}

impl Place {
    /// Where this object is.
    pub fn of(object: &Value) -> Self {
        Self { namespace: objects::namespace(object).to_owned(), name: objects::name(object).to_owned() }
    }

    /// The namespace, if the object has one.
    pub fn namespace(&self) -> Option<&str> {
        Some(self.namespace.as_str()).filter(|namespace| !namespace.is_empty())
    }

    fn flag(&self) -> String {
        self.namespace().map(|namespace| format!(" -n {namespace}")).unwrap_or_default()
    }

    fn full(&self) -> String {
        self.namespace().map_or_else(|| self.name.clone(), |namespace| format!("{namespace}/{}", self.name))
    }
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Delete {
        kind: Kind,
        place: Place,
    },
    /// Leaves a Canary with the finalizers of others only.
    RemoveFinalizers {
        place: Place,
        left: Vec<String>,
    },
    /// Makes a pod of a version on trial ready.
    OpenGate {
        place: Place,
    },
    /// Waits until no object of the kind is left.
    AwaitGone {
        kind: Kind,
    },
    /// Leaves the namespace, which is not Tulle's alone.
    Keep {
        namespace: String,
        why: String,
    },
}

impl Action {
    /// The command of a shell that does it.
    pub fn command(&self) -> String {
        match self {
            Self::Delete { kind, place } => {
                let (resource, name) = (kind.resource(), &place.name);
                format!("kubectl delete {resource}{} {name} --ignore-not-found --wait=false", place.flag())
            }
            Self::RemoveFinalizers { place, left } => {
                let patch = json!({"metadata": {"finalizers": left}});
                let (flag, name) = (place.flag(), &place.name);
                format!("kubectl patch canaries.tulle.dev{flag} {name} --type=merge -p '{patch}'")
            }
            Self::OpenGate { place } => {
                let (flag, name, patch) = (place.flag(), &place.name, open_gate());
                format!("kubectl patch pod{flag} {name} --subresource=status --type=strategic -p '{patch}'")
            }
            Self::AwaitGone { kind } => {
                format!("kubectl wait {} --all -A --for=delete --timeout=30s || true", kind.resource())
            }
            Self::Keep { .. } => format!("# {}", self.done()),
        }
    }

    /// What has been done.
    pub fn done(&self) -> String {
        match self {
            Self::Delete { kind, place } => format!("deleted {}/{}", kind.kind, place.full()),
            Self::RemoveFinalizers { place, .. } => format!("removed finalizers of Canary/{}", place.full()),
            Self::OpenGate { place } => format!("opened the readiness gate of Pod/{}", place.full()),
            Self::AwaitGone { kind } => format!("no {} is left", kind.kind),
            Self::Keep { namespace, why } => format!("kept Namespace/{namespace}: {why}"),
        }
    }

    /// That its object is not there.
    pub fn absent(&self) -> String {
        match self {
            Self::Delete { kind, place } => format!("not there: {}/{}", kind.kind, place.full()),
            Self::RemoveFinalizers { place, .. } => format!("not there: Canary/{}", place.full()),
            Self::OpenGate { place } => format!("not there: Pod/{}", place.full()),
            Self::AwaitGone { .. } | Self::Keep { .. } => self.done(),
        }
    }

    /// What could not be done, as the beginning of a sentence.
    pub fn failed(&self) -> String {
        match self {
            Self::Delete { kind, place } => format!("cannot delete {}/{}", kind.kind, place.full()),
            Self::RemoveFinalizers { place, .. } => {
                format!("cannot remove the finalizers of Canary/{}", place.full())
            }
            Self::OpenGate { place } => format!("cannot open the readiness gate of Pod/{}", place.full()),
            Self::AwaitGone { kind } => format!("cannot wait for the end of every {}", kind.kind),
            Self::Keep { namespace, .. } => format!("cannot keep Namespace/{namespace}"),
        }
    }
}

/// The patch of a pod's status that opens its gate.
pub fn open_gate() -> Value {
    let open = json!({"type": keys::GATE, "status": "True", "reason": "Uninstalled",
        "message": "Tulle was uninstalled"});
    json!({"status": {"conditions": [open]}})
}

/// Why nothing is removed, and what to do first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub what: String,
    pub hint: String,
}

/// What must not be, unless the user insists.
pub fn refusal(seen: &Seen) -> Option<Refusal> {
    if let Some(Managed { object, tool }) = &seen.managed {
        let (system, tool) = (&seen.system, tool.name());
        return Some(Refusal {
            what: format!("Tulle in namespace {system} is managed by {tool}, as {object} shows"),
            hint: "uninstall it with that tool, or insist with --force".to_owned(),
        });
    }
    if seen.injected.is_empty() {
        return None;
    }
    let mut what = format!("{} pods have a sidecar:", seen.injected.len());
    for pod in seen.injected.iter().take(LISTED) {
        what.push_str(&format!("\n  {pod}"));
    }
    let more = seen.injected.len().saturating_sub(LISTED);
    if more > 0 {
        what.push_str(&format!("\n  and {more} more"));
    }
    let hint = format!(
        "remove label {} from their namespaces and restart them, or insist with --force: their certificates would not be renewed, and pods that start would wait for one",
        keys::INJECT
    );
    Some(Refusal { what, hint })
}

/// What to do, in order.
pub fn plan(seen: &Seen) -> Vec<Action> {
    let mut actions = Vec::new();
    // What the API server asks for each request: while it is there and its server is not, pods are rejected.
    let admission =
        [objects::MUTATING, objects::VALIDATING, objects::ADMISSION_BINDING, objects::ADMISSION_POLICY];
    actions.extend(admission.into_iter().flat_map(|kind| delete_installed(seen, kind)));
    // A Canary that is gone closes no gate again, so that gates can be opened while the operator still works.
    for canary in &seen.canaries {
        let finalizers: Vec<&str> =
            items(canary, "/metadata/finalizers").iter().filter_map(Value::as_str).collect();
        let left: Vec<String> = finalizers
            .iter()
            .filter(|finalizer| !finalizer.starts_with(OWN))
            .map(|finalizer| (*finalizer).to_owned())
            .collect();
        if left.len() < finalizers.len() {
            actions.push(Action::RemoveFinalizers { place: Place::of(canary), left });
        }
        actions.push(Action::Delete { kind: objects::CANARY, place: Place::of(canary) });
    }
    if !seen.canaries.is_empty() {
        actions.push(Action::AwaitGone { kind: objects::CANARY });
    }
    actions.extend(seen.gated.iter().cloned().map(|place| Action::OpenGate { place }));
    // Before the operator, which still tells sidecars that nothing is denied or encrypted any more.
    for (kind, found) in [(objects::MESH_POLICY, &seen.policies), (objects::MESH_CONFIG, &seen.configs)] {
        actions.extend(found.iter().map(|object| Action::Delete { kind, place: Place::of(object) }));
    }
    let rest = [
        objects::DEPLOYMENT,
        objects::DISRUPTION_BUDGET,
        objects::SERVICE,
        objects::NETWORK_POLICY,
        objects::RESOURCE_QUOTA,
        objects::ROLE_BINDING,
        objects::ROLE,
        objects::CLUSTER_ROLE_BINDING,
        objects::CLUSTER_ROLE,
        objects::SERVICE_ACCOUNT,
        objects::DEFINITION,
    ];
    actions.extend(rest.into_iter().flat_map(|kind| delete_installed(seen, kind)));
    let bundles = seen.bundles.iter().cloned();
    actions.extend(bundles.map(|place| Action::Delete { kind: objects::CONFIG_MAP, place }));
    actions.extend(end_of_namespace(seen));
    actions
}

/// Deletes the namespace if it is Tulle's alone, and with it Secret tulle-root, the root of all identities. Otherwise only
/// what Tulle has put into it is deleted.
fn end_of_namespace(seen: &Seen) -> Vec<Action> {
    let why = match &seen.namespace {
        Some(namespace) if !tenants::is_labelled(namespace) => {
            format!("it does not have label {}=tulle, so somebody else has created it", tenants::PART_OF)
        }
        Some(_) if !seen.foreign.is_empty() => format!(
            "it holds {}; remove Tulle's labels with `kubectl label namespace {} {}- tulle.dev/control-plane- pod-security.kubernetes.io/enforce-`",
            tenants::some_of(&seen.foreign),
            seen.system,
            tenants::PART_OF
        ),
        _ => return delete_installed(seen, objects::NAMESPACE),
    };
    let place = |name: &str| Place { namespace: seen.system.clone(), name: name.to_owned() };
    let secrets = SECRETS.into_iter().map(|name| Action::Delete { kind: SECRET, place: place(name) });
    let lease = Action::Delete { kind: objects::LEASE, place: place(OPERATOR) };
    secrets.chain([lease, Action::Keep { namespace: seen.system.clone(), why }]).collect()
}

/// Deletes the installed objects of a kind.
fn delete_installed(seen: &Seen, kind: Kind) -> Vec<Action> {
    let of_kind = seen.installed.iter().filter(|object| Kind::of(object) == Some(kind));
    of_kind.map(|object| Action::Delete { kind, place: Place::of(object) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::{self, Settings};

    fn seen() -> Seen {
        Seen {
            system: "tulle-system".to_owned(),
            injected: Vec::new(),
            gated: Vec::new(),
            canaries: Vec::new(),
            policies: Vec::new(),
            configs: Vec::new(),
            bundles: Vec::new(),
            managed: None,
            namespace: Some(labelled()),
            foreign: Vec::new(),
            installed: manifests::objects(&Settings { undo: true, ..Settings::default() }).unwrap(),
        }
    }

    fn labelled() -> Value {
        json!({"metadata": {"name": "tulle-system", "labels": {"app.kubernetes.io/part-of": "tulle"}}})
    }

    fn place(namespace: &str, name: &str) -> Place {
        Place { namespace: namespace.to_owned(), name: name.to_owned() }
    }

    #[test]
    fn pods_with_a_sidecar_are_listed_up_to_twenty_and_counted() {
        assert_eq!(refusal(&seen()), None);
        let injected: Vec<String> = (0..23).map(|number| format!("shop/web-{number}")).collect();
        let refusal = refusal(&Seen { injected, ..seen() }).unwrap();
        assert!(refusal.what.starts_with("23 pods have a sidecar:\n  shop/web-0\n"), "{}", refusal.what);
        assert!(refusal.what.ends_with("\n  shop/web-19\n  and 3 more"), "{}", refusal.what);
        assert!(refusal.hint.contains("--force"));
    }

    #[test]
    fn an_installation_of_another_tool_is_left_to_it() {
        let helm = json!({"kind": "CustomResourceDefinition", "metadata": {"name": "canaries.tulle.dev",
            "labels": {"app.kubernetes.io/managed-by": "Helm"}}});
        let own = json!({"kind": "Deployment", "metadata": {"name": "tulle-operator"}});
        assert_eq!(managed(std::slice::from_ref(&own)), None);
        let refusal = refusal(&Seen { managed: managed(&[own, helm]), ..seen() }).unwrap();
        assert_eq!(
            refusal.what,
            "Tulle in namespace tulle-system is managed by Helm, as CustomResourceDefinition/canaries.tulle.dev shows"
        );
    }

    #[test]
    fn a_namespace_that_is_not_tulles_alone_is_kept_without_tulles_secrets() {
        let end = |seen: Seen| -> Vec<String> {
            let actions = plan(&seen);
            actions.iter().rev().take(4).rev().map(Action::done).collect()
        };
        let secrets = [
            "deleted Secret/tulle-system/tulle-root",
            "deleted Secret/tulle-system/tulle-webhook-authority",
            "deleted Lease/tulle-system/tulle-operator",
        ];
        let unlabelled = Some(json!({"metadata": {"name": "tulle-system"}}));
        let kept = end(Seen { namespace: unlabelled, ..seen() });
        assert_eq!(kept[..3], secrets);
        assert!(kept[3].starts_with("kept Namespace/tulle-system: it does not have label"), "{}", kept[3]);
        let shared = end(Seen { foreign: vec!["Deployment/web".to_owned()], ..seen() });
        assert_eq!(shared[..3], secrets);
        assert!(
            shared[3].starts_with("kept Namespace/tulle-system: it holds Deployment/web"),
            "{}",
            shared[3]
        );
        let command = plan(&Seen { foreign: vec!["Pod/a".to_owned()], ..seen() }).pop().unwrap().command();
        assert!(command.starts_with("# kept Namespace/tulle-system"), "{command}");
    }

    #[test]
    fn what_was_already_gone_is_not_reported_as_deleted() {
        let delete = Action::Delete { kind: objects::ROLE, place: place("mesh", "tulle-operator") };
        assert_eq!(delete.absent(), "not there: Role/mesh/tulle-operator");
        assert_eq!(delete.failed(), "cannot delete Role/mesh/tulle-operator");
    }

    #[test]
    fn admission_goes_first_and_the_namespace_last() {
        let actions: Vec<String> = plan(&seen()).iter().map(Action::done).collect();
        assert_eq!(
            actions[..3],
            [
                "deleted MutatingWebhookConfiguration/tulle",
                "deleted ValidatingWebhookConfiguration/tulle",
                "deleted ValidatingAdmissionPolicyBinding/tulle-required",
            ]
        );
        let at = |what: &str| actions.iter().position(|action| action == what).unwrap();
        assert!(
            at("deleted ValidatingAdmissionPolicyBinding/tulle-pod-status")
                < at("deleted ValidatingAdmissionPolicy/tulle-required")
        );
        assert!(
            at("deleted ValidatingAdmissionPolicy/tulle-pod-status")
                < at("deleted Deployment/tulle-system/tulle-operator")
        );
        assert_eq!(actions.last().unwrap(), "deleted Namespace/tulle-system");
    }

    #[test]
    fn everything_that_is_installed_is_deleted_once() {
        let seen = seen();
        let actions = plan(&seen);
        assert_eq!(actions.len(), seen.installed.len());
        for object in &seen.installed {
            let delete = Action::Delete { kind: Kind::of(object).unwrap(), place: Place::of(object) };
            assert_eq!(
                actions.iter().filter(|action| **action == delete).count(),
                1,
                "{}",
                full_name(object)
            );
        }
    }

    #[test]
    fn canaries_go_before_gates_are_opened_and_policies_before_the_operator() {
        let object = |name: &str, finalizers: Value| json!({"metadata": {"name": name, "namespace": "shop", "finalizers": finalizers}});
        let actions = plan(&Seen {
            canaries: vec![
                object("web", json!(["tulle.dev/gates", "example.com/keep"])),
                object("api", json!([])),
            ],
            gated: vec![place("shop", "web-1")],
            policies: vec![object("deny", json!([]))],
            configs: vec![json!({"metadata": {"name": "mesh"}})],
            bundles: vec![place("shop", "tulle-trust")],
            ..seen()
        });
        let own: Vec<String> = actions
            .iter()
            .map(Action::done)
            .filter(|done| {
                [
                    "Canary",
                    "gate",
                    "Mesh",
                    "Deployment/tulle-system/tulle-operator",
                    "ConfigMap",
                    "CustomResource",
                ]
                .iter()
                .any(|part| done.contains(part))
            })
            .collect();
        assert_eq!(
            own,
            [
                "removed finalizers of Canary/shop/web",
                "deleted Canary/shop/web",
                "deleted Canary/shop/api",
                "no Canary is left",
                "opened the readiness gate of Pod/shop/web-1",
                "deleted MeshPolicy/shop/deny",
                "deleted MeshConfig/mesh",
                "deleted Deployment/tulle-system/tulle-operator",
                "deleted CustomResourceDefinition/canaries.tulle.dev",
                "deleted CustomResourceDefinition/meshconfigs.tulle.dev",
                "deleted CustomResourceDefinition/meshpolicies.tulle.dev",
                "deleted ConfigMap/shop/tulle-trust",
            ]
        );
        let left = vec!["example.com/keep".to_owned()];
        assert!(actions.contains(&Action::RemoveFinalizers { place: place("shop", "web"), left }));
    }

    #[test]
    fn commands_can_be_given_to_a_shell() {
        let delete = Action::Delete { kind: objects::ROLE, place: place("tulle-system", "tulle-operator") };
        assert_eq!(
            delete.command(),
            "kubectl delete roles.rbac.authorization.k8s.io -n tulle-system tulle-operator --ignore-not-found --wait=false"
        );
        let finalizers = Action::RemoveFinalizers { place: place("shop", "web"), left: Vec::new() };
        assert_eq!(
            finalizers.command(),
            "kubectl patch canaries.tulle.dev -n shop web --type=merge -p '{\"metadata\":{\"finalizers\":[]}}'"
        );
        let gate = Action::OpenGate { place: place("shop", "web-1") }.command();
        assert!(
            gate.starts_with("kubectl patch pod -n shop web-1 --subresource=status --type=strategic -p '{"),
            "{gate}"
        );
        assert!(
            gate.contains("\"type\":\"tulle.dev/approved\"") && gate.matches('\'').count() == 2,
            "{gate}"
        );
    }
}
