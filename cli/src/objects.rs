//! Objects of the cluster as JSON, and which tool manages them.
//!
//! In: a kind, and where its objects are. Out: what the API server returns, or why it could not be read. Secrets are
//! not among the kinds, so no command of this program can read one.

use std::fmt;

use kube::api::{DynamicObject, GroupVersionKind, ListParams};
use kube::core::ApiResource;
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::WorkloadKind;

use crate::cluster::failure;

/// The field manager of what this program writes.
pub const MANAGER: &str = "tulle-cli";
/// Objects per request of a list.
const PAGE: u32 = 500;

/// A kind of the Kubernetes API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// `v1`, or group and version.
    pub api_version: &'static str,
    /// The kind's name in a manifest.
    pub kind: &'static str,
    /// The kind's name in a URL.
    pub plural: &'static str,
    /// Whether its objects are in a namespace.
    pub namespaced: bool,
}

const fn cluster(api_version: &'static str, kind: &'static str, plural: &'static str) -> Kind {
    Kind { api_version, kind, plural, namespaced: false }
}

const fn namespaced(api_version: &'static str, kind: &'static str, plural: &'static str) -> Kind {
    Kind { api_version, kind, plural, namespaced: true }
}

const ADMISSION: &str = "admissionregistration.k8s.io/v1";
const RBAC: &str = "rbac.authorization.k8s.io/v1";
const ROUTES: &str = "gateway.networking.k8s.io/v1";

pub const NAMESPACE: Kind = cluster("v1", "Namespace", "namespaces");
pub const NODE: Kind = cluster("v1", "Node", "nodes");
pub const POD: Kind = namespaced("v1", "Pod", "pods");
pub const CONFIG_MAP: Kind = namespaced("v1", "ConfigMap", "configmaps");
pub const SERVICE: Kind = namespaced("v1", "Service", "services");
pub const SERVICE_ACCOUNT: Kind = namespaced("v1", "ServiceAccount", "serviceaccounts");
pub const RESOURCE_QUOTA: Kind = namespaced("v1", "ResourceQuota", "resourcequotas");
pub const EVENT: Kind = namespaced("events.k8s.io/v1", "Event", "events");
pub const DEPLOYMENT: Kind = namespaced("apps/v1", "Deployment", "deployments");
pub const STATEFUL_SET: Kind = namespaced("apps/v1", "StatefulSet", "statefulsets");
pub const DAEMON_SET: Kind = namespaced("apps/v1", "DaemonSet", "daemonsets");
pub const JOB: Kind = namespaced("batch/v1", "Job", "jobs");
pub const REPLICA_SET: Kind = namespaced("apps/v1", "ReplicaSet", "replicasets");
pub const VOLUME_CLAIM: Kind = namespaced("v1", "PersistentVolumeClaim", "persistentvolumeclaims");
pub const DISRUPTION_BUDGET: Kind = namespaced("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets");
pub const NETWORK_POLICY: Kind = namespaced("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies");
pub const LEASE: Kind = namespaced("coordination.k8s.io/v1", "Lease", "leases");
pub const ENDPOINT_SLICE: Kind = namespaced("discovery.k8s.io/v1", "EndpointSlice", "endpointslices");
pub const DEFINITION: Kind =
    cluster("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions");
pub const CLUSTER_ROLE: Kind = cluster(RBAC, "ClusterRole", "clusterroles");
pub const CLUSTER_ROLE_BINDING: Kind = cluster(RBAC, "ClusterRoleBinding", "clusterrolebindings");
pub const ROLE: Kind = namespaced(RBAC, "Role", "roles");
pub const ROLE_BINDING: Kind = namespaced(RBAC, "RoleBinding", "rolebindings");
pub const MUTATING: Kind =
    cluster(ADMISSION, "MutatingWebhookConfiguration", "mutatingwebhookconfigurations");
pub const VALIDATING: Kind =
    cluster(ADMISSION, "ValidatingWebhookConfiguration", "validatingwebhookconfigurations");
pub const ADMISSION_POLICY: Kind =
    cluster(ADMISSION, "ValidatingAdmissionPolicy", "validatingadmissionpolicies");
pub const ADMISSION_BINDING: Kind =
    cluster(ADMISSION, "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings");
pub const MESH_POLICY: Kind = namespaced("tulle.dev/v1alpha1", "MeshPolicy", "meshpolicies");
pub const CANARY: Kind = namespaced("tulle.dev/v1alpha1", "Canary", "canaries");
pub const MESH_CONFIG: Kind = cluster("tulle.dev/v1alpha1", "MeshConfig", "meshconfigs");
pub const HTTP_ROUTE: Kind = namespaced(ROUTES, "HTTPRoute", "httproutes");
pub const GRPC_ROUTE: Kind = namespaced(ROUTES, "GRPCRoute", "grpcroutes");

/// The kinds of the objects that are installed.
pub const INSTALLED: [Kind; 17] = [
    NAMESPACE,
    DEFINITION,
    SERVICE_ACCOUNT,
    CLUSTER_ROLE,
    CLUSTER_ROLE_BINDING,
    ROLE,
    ROLE_BINDING,
    DEPLOYMENT,
    SERVICE,
    DISRUPTION_BUDGET,
    MUTATING,
    VALIDATING,
    ADMISSION_POLICY,
    ADMISSION_BINDING,
    NETWORK_POLICY,
    RESOURCE_QUOTA,
    MESH_CONFIG,
];

impl Kind {
    /// The kind of a manifest, if it is one of those that are installed.
    pub fn of(manifest: &Value) -> Option<Self> {
        let (api_version, kind) = (text(manifest, "/apiVersion"), text(manifest, "/kind"));
        INSTALLED.into_iter().find(|known| known.api_version == api_version && known.kind == kind)
    }

    /// The group and the version.
    pub fn group_version(&self) -> (&'static str, &'static str) {
        self.api_version.split_once('/').unwrap_or(("", self.api_version))
    }

    /// As kubectl names it: `deployments.apps`.
    pub fn resource(&self) -> String {
        match self.group_version().0 {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    fn api_resource(&self) -> ApiResource {
        let (group, version) = self.group_version();
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, self.kind), self.plural)
    }

    /// Access to its objects: in a namespace, or in all.
    pub fn api(&self, client: &Client, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => Api::namespaced_with(client.clone(), namespace, &self.api_resource()),
            None => Api::all_with(client.clone(), &self.api_resource()),
        }
    }
}

/// The kind of a Canary's target.
impl From<WorkloadKind> for Kind {
    fn from(kind: WorkloadKind) -> Self {
        match kind {
            WorkloadKind::Deployment => DEPLOYMENT,
            WorkloadKind::StatefulSet => STATEFUL_SET,
            WorkloadKind::DaemonSet => DAEMON_SET,
        }
    }
}

/// Why something was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unread {
    /// The user may not read it.
    Forbidden(String),
    /// The cluster does not have this kind.
    NotServed,
    /// Something else.
    Failed(String),
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forbidden(why) => write!(f, "not allowed to read: {why}"),
            Self::NotServed => f.write_str("the cluster does not have this kind"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

/// What was read.
pub type Read<T> = Result<T, Unread>;

/// Why a request failed.
pub fn unread(error: kube::Error) -> Unread {
    match error {
        kube::Error::Api(status) => match status.code {
            403 => Unread::Forbidden(status.message.clone()),
            404 => Unread::NotServed,
            _ => Unread::Failed(failure::of(&kube::Error::Api(status)).to_string()),
        },
        other => Unread::Failed(failure::of(&other).to_string()),
    }
}

/// Every object of a kind with the labels. Without a namespace: those of all namespaces.
pub async fn list(
    client: &Client,
    kind: Kind,
    namespace: Option<&str>,
    labels: Option<&str>,
) -> Read<Vec<Value>> {
    let api = kind.api(client, namespace);
    let mut params = ListParams::default().limit(PAGE);
    if let Some(labels) = labels {
        params = params.labels(labels);
    }
    let mut objects = Vec::new();
    loop {
        let page = api.list(&params).await.map_err(unread)?;
        objects.extend(page.items.iter().filter_map(|object| as_json(kind, object)));
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

/// An object, if it exists.
pub async fn get(client: &Client, kind: Kind, namespace: Option<&str>, name: &str) -> Read<Option<Value>> {
    let found = kind.api(client, namespace).get_opt(name).await.map_err(unread)?;
    Ok(found.and_then(|object| as_json(kind, &object)))
}

/// The object with `apiVersion` and `kind`, which items of a list do not have.
fn as_json(kind: Kind, object: &DynamicObject) -> Option<Value> {
    let mut json = serde_json::to_value(object).ok()?;
    let fields = json.as_object_mut()?;
    fields.insert("apiVersion".to_owned(), kind.api_version.into());
    fields.insert("kind".to_owned(), kind.kind.into());
    Some(json)
}

/// A text at a JSON pointer. Empty: there is none.
pub fn text<'a>(of: &'a Value, pointer: &str) -> &'a str {
    of.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// A list at a JSON pointer. Empty: there is none.
pub fn items<'a>(of: &'a Value, pointer: &str) -> &'a [Value] {
    of.pointer(pointer).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// A number at a JSON pointer.
pub fn number(of: &Value, pointer: &str) -> Option<i64> {
    of.pointer(pointer).and_then(Value::as_i64)
}

/// Whether a route's reference to a parent has the kind Service and not its group, so that it names no Service. The API
/// server fills in the group of the Gateway API where there is none.
pub fn is_service_without_group(parent: &Value) -> bool {
    let group = parent.get("group").and_then(Value::as_str);
    text(parent, "/kind") == "Service" && group.is_none_or(|group| group == "gateway.networking.k8s.io")
}

/// The name of an object.
pub fn name(of: &Value) -> &str {
    text(of, "/metadata/name")
}

/// The namespace of an object. Empty: it has none.
pub fn namespace(of: &Value) -> &str {
    text(of, "/metadata/namespace")
}

/// `namespace/name`, or the name alone of an object without a namespace.
pub fn full_name(of: &Value) -> String {
    match namespace(of) {
        "" => name(of).to_owned(),
        namespace => format!("{namespace}/{}", name(of)),
    }
}

/// The value of a label. A key may contain a slash, so that this is not a JSON pointer.
pub fn label<'a>(of: &'a Value, key: &str) -> Option<&'a str> {
    of.pointer("/metadata/labels")?.get(key)?.as_str()
}

/// The value of an annotation.
pub fn annotation<'a>(of: &'a Value, key: &str) -> Option<&'a str> {
    of.pointer("/metadata/annotations")?.get(key)?.as_str()
}

/// A condition in the status of an object.
pub fn condition<'a>(of: &'a Value, type_: &str) -> Option<&'a Value> {
    items(of, "/status/conditions").iter().find(|condition| text(condition, "/type") == type_)
}

/// Whether a pod has the sidecar. By its container, as the operator decides it, because a copy that `kubectl debug` makes
/// of a pod may not have the label.
pub fn has_sidecar(pod: &Value) -> bool {
    // Another webhook may have put a program of its own, or a shell, before the sidecar's.
    let is_proxy =
        |text: &Value| text.as_str().is_some_and(|text| text.split_whitespace().any(|word| word == "proxy"));
    items(pod, "/spec/initContainers").iter().any(|container| {
        text(container, "/name") == "tulle-proxy"
            && text(container, "/restartPolicy") == "Always"
            && ["/command", "/args"].into_iter().flat_map(|list| items(container, list)).any(is_proxy)
    })
}

/// A tool that keeps objects as its own source says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    Helm,
    Flux,
    ArgoCd,
}

impl Tool {
    /// The tool's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Helm => "Helm",
            Self::Flux => "Flux",
            Self::ArgoCd => "Argo CD",
        }
    }
}

/// The tool that manages an object, by its labels and annotations, and else by who has written its fields. Flux comes
/// before Helm, because what Flux installs from a chart has the labels of both.
pub fn managed_by(object: &Value) -> Option<Tool> {
    let has_label = |key| label(object, key).is_some();
    if has_label("kustomize.toolkit.fluxcd.io/name") || has_label("helm.toolkit.fluxcd.io/name") {
        return Some(Tool::Flux);
    }
    if has_label("argocd.argoproj.io/instance")
        || annotation(object, "argocd.argoproj.io/tracking-id").is_some()
    {
        return Some(Tool::ArgoCd);
    }
    if label(object, "app.kubernetes.io/managed-by") == Some("Helm")
        || annotation(object, "meta.helm.sh/release-name").is_some()
    {
        return Some(Tool::Helm);
    }
    let of_fields = |entry: &Value| match text(entry, "/manager") {
        "kustomize-controller" | "helm-controller" => Some(Tool::Flux),
        "argocd-controller" | "argocd-application-controller" => Some(Tool::ArgoCd),
        "helm" => Some(Tool::Helm),
        _ => None,
    };
    let fields = items(object, "/metadata/managedFields").iter();
    fields.filter(|entry| text(entry, "/subresource").is_empty()).find_map(of_fields)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_tool_that_manages_an_object_is_found_by_labels_annotations_and_fields() {
        for (metadata, tool) in [
            (json!({"labels": {"app.kubernetes.io/managed-by": "Helm"}}), Some(Tool::Helm)),
            (json!({"annotations": {"meta.helm.sh/release-name": "tulle"}}), Some(Tool::Helm)),
            (json!({"managedFields": [{"manager": "helm", "operation": "Apply"}]}), Some(Tool::Helm)),
            (json!({"annotations": {"argocd.argoproj.io/tracking-id": "a"}}), Some(Tool::ArgoCd)),
            (json!({"managedFields": [{"manager": "argocd-controller"}]}), Some(Tool::ArgoCd)),
            (
                json!({"labels": {"helm.toolkit.fluxcd.io/name": "a", "app.kubernetes.io/managed-by": "Helm"}}),
                Some(Tool::Flux),
            ),
            (json!({"labels": {"app.kubernetes.io/managed-by": "me"}}), None),
            (json!({"managedFields": [{"manager": "kubectl"}, {"manager": MANAGER}]}), None),
            (json!({"managedFields": [{"manager": "helm", "subresource": "status"}]}), None),
        ] {
            assert_eq!(managed_by(&json!({"metadata": metadata})), tool, "{metadata}");
        }
    }

    #[test]
    fn no_kind_of_this_module_is_a_secret() {
        let (code, _) = include_str!("objects.rs").split_once("#[cfg(test)]").unwrap();
        assert!(code.contains("\"Pod\"") && !code.contains("\"Secret\""));
    }

    #[test]
    fn a_manifest_is_of_an_installed_kind_by_its_name_and_version() {
        let of = |api_version: &str, kind: &str| Kind::of(&json!({"apiVersion": api_version, "kind": kind}));
        assert_eq!(of("apps/v1", "Deployment"), Some(DEPLOYMENT));
        assert_eq!(of("extensions/v1beta1", "Deployment"), None);
        assert_eq!(of("v1", "Secret"), None);
    }

    #[test]
    fn the_target_of_a_canary_has_the_kind_that_it_names() {
        for kind in [WorkloadKind::Deployment, WorkloadKind::StatefulSet, WorkloadKind::DaemonSet] {
            assert_eq!(Kind::from(kind).kind, kind.name());
        }
    }

    #[test]
    fn a_kind_is_written_as_kubectl_writes_it() {
        assert_eq!(DEPLOYMENT.resource(), "deployments.apps");
        assert_eq!(POD.resource(), "pods");
        assert_eq!(MESH_POLICY.group_version(), ("tulle.dev", "v1alpha1"));
    }
}
