//! MeshPolicy: how traffic to a target is treated.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How traffic to a target is treated. Every section is optional; for each section the narrowest
/// target wins: Workload and Service over Namespace over the mesh's default.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tulle.dev",
    version = "v1alpha1",
    kind = "MeshPolicy",
    doc = "MeshPolicy sets encryption and access rules for the traffic to a Service, to pods with given labels, \
           or to all pods of a namespace. Every section is optional. For each section the most specific target \
           wins: Service and Workload over Namespace, Namespace over MeshConfig. Of two equally specific policies \
           the older one wins, and the newer one reports Conflicted.",
    namespaced,
    status = "MeshPolicyStatus",
    shortname = "mp",
    category = "tulle",
    derive = "PartialEq",
    printcolumn(name = "TARGET", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "MODE", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "MTLS", type_ = "string", json_path = ".spec.mtls"),
    printcolumn(name = "ACCESS", type_ = "string", json_path = ".status.access"),
    printcolumn(name = "WORKLOADS", type_ = "integer", json_path = ".status.workloads"),
    printcolumn(name = "ENFORCED", type_ = "string", json_path = ".status.enforced"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicySpec {
    /// What the policy is for, in its own namespace.
    pub target: PolicyTarget,
    /// Enforce, or Shadow: decide, count and log, but let through.
    #[serde(default)]
    pub mode: PolicyMode,
    /// Whether connections must be encrypted and authenticated. Strict refuses plain text (kubelet's
    /// probes excepted), Permissive accepts both, Disabled uses plain text except to pods with access rules, which
    /// name callers by their certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<MtlsMode>,
    /// Who may call. Absent: everybody. Present: with `allow`, only what matches; `deny` always wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessSpec>,
}

/// What a policy is for.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.kind != 'Service' || has(self.name)", "a Service target needs a name"))]
#[x_kube(validation = ("self.kind != 'Service' || !has(self.selector)", "a Service target uses only name: leave selector out, or write kind: Workload to select pods by labels"))]
#[x_kube(validation = ("self.kind != 'Workload' || !has(self.name)", "a Workload target uses only selector: leave name out, or write kind: Service to target a Service by name"))]
#[x_kube(validation = ("self.kind != 'Workload' || has(self.selector)", "a Workload target needs a selector with matchLabels"))]
#[x_kube(validation = ("self.kind != 'Namespace' || (!has(self.name) && !has(self.selector))", "a Namespace target is the policy's own namespace: leave name and selector out"))]
pub struct PolicyTarget {
    /// Service (by name), Workload (pods by labels) or Namespace (all pods of this one).
    pub kind: TargetKind,
    /// The Service's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub name: Option<String>,
    /// Labels of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelMatch>,
}

/// Pods by their labels.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct LabelMatch {
    /// All of these labels, with these values.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16))]
    pub match_labels: BTreeMap<String, String>,
}

/// How a target is named.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum TargetKind {
    Service,
    Workload,
    Namespace,
}

/// Whether a policy acts or only says what it would do.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum PolicyMode {
    #[default]
    Enforce,
    Shadow,
}

/// Whether connections must be encrypted.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum MtlsMode {
    Strict,
    #[default]
    Permissive,
    Disabled,
}

/// Who may call.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.allow) || has(self.deny)", "access needs allow, deny or both; leave access out to allow everybody"))]
pub struct AccessSpec {
    /// Only requests that match one of these pass. An empty list lets nobody pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub allow: Option<Vec<AccessRule>>,
    /// Requests that match one of these are refused, whatever `allow` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub deny: Option<Vec<AccessRule>>,
}

/// One rule: from any of these callers to any of these operations.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct AccessRule {
    /// Callers; empty: anybody.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub from: Vec<Caller>,
    /// Operations; empty: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub to: Vec<Operation>,
}

/// A caller: by certificate (service account, namespace) or by address.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.serviceAccount) || has(self.namespace) || has(self.namespaceLabels) || has(self.cidr)", "a caller needs serviceAccount, namespace, namespaceLabels or cidr"))]
#[x_kube(validation = ("!has(self.cidr) || (!has(self.serviceAccount) && !has(self.namespace) && !has(self.namespaceLabels))", "cidr stands alone: write a caller of its own for it"))]
#[x_kube(validation = ("!has(self.namespace) || !has(self.namespaceLabels)", "give namespace or namespaceLabels, not both"))]
pub struct Caller {
    /// The caller's service account; in the policy's namespace unless a namespace is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account: Option<String>,
    /// The caller's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
    /// Labels of the caller's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16))]
    pub namespace_labels: Option<BTreeMap<String, String>>,
    /// The caller's address range, such as 10.1.0.0/16: for callers without a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 43))]
    pub cidr: Option<String>,
}

/// What is called.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.methods) || has(self.paths) || has(self.ports)", "an operation needs methods, paths or ports; leave `to` out to mean all"))]
pub struct Operation {
    /// HTTP methods, upper case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(regex(pattern = "^[A-Z]+$"), length(max = 32)))]
    pub methods: Option<Vec<String>>,
    /// Paths from the root: `*` within a segment, `**` across segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(regex(pattern = "^/"), length(max = 1024)))]
    pub paths: Option<Vec<String>>,
    /// Ports of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(range(min = 1, max = 65535)))]
    pub ports: Option<Vec<u16>>,
}

/// What became of a policy.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicyStatus {
    /// The generation that the rest of the status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The target in one word, such as Service/payments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The access section in a few words, such as "2 allow, 1 deny".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<String>,
    /// Pods with a sidecar that the policy selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workloads: Option<i32>,
    /// How many sidecars enforce the policy, of those that it selects, such as 12/12. For people; programs read
    /// selectedSidecars and enforcingSidecars.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforced: Option<String>,
    /// Number of sidecars that the policy selects: those of running pods that have an address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selected_sidecars: Option<i32>,
    /// Number of those sidecars that have acknowledged the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcing_sidecars: Option<i32>,
    /// `Ready`: accepted and acknowledged by every sidecar that it concerns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
