//! MeshPolicy: how traffic to a target is handled. The sections that keep calls alive are in `traffic.rs`, the one about
//! logs in `telemetry.rs`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{BalanceSpec, BreakerSpec, FaultsSpec, LimitsSpec, RetrySpec, TelemetrySpec, TimeoutSpec};

/// An address range with a prefix length that its family has. `isCIDR` would say it better, but only Kubernetes 1.31
/// and newer know it. What passes here and is no IPv6 range is rejected by the webhook, and never enforced.
const CIDR_RULE: &str = "self.matches('^((25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])[.]){3}(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])/(3[0-2]|[12]?[0-9])$') || self.matches('^[0-9a-fA-F]*:[0-9a-fA-F:.]*/(12[0-8]|1[01][0-9]|[1-9]?[0-9])$')";
const CIDR_MESSAGE: &str = "cidr must be an address range whose prefix length is at most 32 for IPv4 and 128 for IPv6; write for example 10.1.0.0/16 or fd00::/8";

/// The target, and how traffic to it is handled. Every section is optional.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tulle.dev",
    version = "v1alpha1",
    kind = "MeshPolicy",
    doc = "MeshPolicy sets encryption, access rules, limits, timeouts, retries, breakers, balancing, faults and access \
           logs for the traffic to a Service, to pods with given labels, or to all pods or Services of a namespace. Every \
           section is optional. For each section the most specific target wins: Service and Workload over \
           Namespace, Namespace over MeshConfig. Of two equally specific policies the older one wins, and the newer \
           one reports Conflicted.",
    namespaced,
    status = "MeshPolicyStatus",
    shortname = "mp",
    category = "tulle",
    derive = "PartialEq",
    printcolumn(name = "TARGET", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "MODE", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "MTLS", type_ = "string", json_path = ".spec.mtls"),
    printcolumn(name = "ACCESS", type_ = "string", json_path = ".status.access"),
    printcolumn(name = "SECTIONS", type_ = "string", json_path = ".status.sections"),
    printcolumn(name = "WORKLOADS", type_ = "integer", json_path = ".status.workloads"),
    printcolumn(name = "ENFORCED", type_ = "string", json_path = ".status.enforced"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshPolicySpec {
    /// What the policy applies to, in the policy's namespace. `mtls`, `access`, `limits` and `telemetry` apply to pods.
    /// `timeout`, `retry`, `breaker`, `balance` and `faults` apply to calls to Services: to the Service, or with kind
    /// Namespace to every Service of the namespace; a Workload target has no effect on them.
    pub target: PolicyTarget,
    /// Enforce, or Shadow, which evaluates the policy, counts what it would refuse or change, and lets everything pass
    /// as without it. Sections balance and telemetry have no effect in Shadow.
    #[serde(default)]
    pub mode: PolicyMode,
    /// Whether connections must be encrypted and authenticated. Strict refuses plain text, except for kubelet's
    /// probes. Permissive accepts both. Disabled uses plain text, except to pods with access rules, because these
    /// identify callers by their certificates. Absent: as in the less specific policy or in MeshConfig.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtls: Option<MtlsMode>,
    /// Who may call. Absent: every caller may. With `allow`, only matching requests pass. `deny` takes precedence over
    /// `allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<AccessSpec>,
    /// Limits of the load that each selected pod accepts. Absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsSpec>,
    /// How long clients of the Service wait. Absent: as in a policy for the namespace, or else without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<TimeoutSpec>,
    /// Which failed requests to the Service are repeated. Absent: only those that no application has seen, and
    /// idempotent ones that got no response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<RetrySpec>,
    /// When a pod of the Service that fails gets no requests for a time. Absent: only pods that cannot be connected to
    /// are ejected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub breaker: Option<BreakerSpec>,
    /// How a pod of the Service is chosen for each request. Absent: by latency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<BalanceSpec>,
    /// Faults that are added to attempts at requests to the Service on purpose, until a given time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub faults: Option<FaultsSpec>,
    /// What the sidecars of the selected pods log. Absent: as in the less specific policy, or else nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub telemetry: Option<TelemetrySpec>,
}

/// A section of a policy: its name, and whether a policy has it.
pub type PolicySection = (&'static str, fn(&MeshPolicySpec) -> bool);

/// The sections that apply to pods. The others, [`CALL_SECTIONS`], apply to calls to Services.
pub const POD_SECTIONS: [PolicySection; 4] = [
    ("mtls", |spec| spec.mtls.is_some()),
    ("access", |spec| spec.access.is_some()),
    ("limits", |spec| spec.limits.is_some()),
    ("telemetry", |spec| spec.telemetry.is_some()),
];

/// The sections that apply to calls to Services. The others, [`POD_SECTIONS`], apply to pods.
pub const CALL_SECTIONS: [PolicySection; 5] = [
    ("timeout", |spec| spec.timeout.is_some()),
    ("retry", |spec| spec.retry.is_some()),
    ("breaker", |spec| spec.breaker.is_some()),
    ("balance", |spec| spec.balance.is_some()),
    ("faults", |spec| spec.faults.is_some()),
];

impl MeshPolicySpec {
    /// The names of the policy's sections that apply to pods.
    pub fn pod_sections(&self) -> Vec<&'static str> {
        self.sections_of(&POD_SECTIONS)
    }

    /// The names of the policy's sections that apply to calls to Services.
    pub fn call_sections(&self) -> Vec<&'static str> {
        self.sections_of(&CALL_SECTIONS)
    }

    fn sections_of(&self, sections: &[PolicySection]) -> Vec<&'static str> {
        sections.iter().filter_map(|(name, has)| has(self).then_some(*name)).collect()
    }
}

/// The pods that a policy selects.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("self.kind != 'Service' || has(self.name)", "a Service target needs a name"))]
#[x_kube(validation = ("self.kind != 'Service' || !has(self.selector)", "a Service target uses only name: leave selector out, or write kind: Workload to select pods by labels"))]
#[x_kube(validation = ("self.kind != 'Workload' || !has(self.name)", "a Workload target uses only selector: leave name out, or write kind: Service to target a Service by name"))]
#[x_kube(validation = ("self.kind != 'Workload' || has(self.selector)", "a Workload target needs a selector with matchLabels"))]
#[x_kube(validation = ("self.kind != 'Namespace' || (!has(self.name) && !has(self.selector))", "a Namespace target is the policy's own namespace: leave name and selector out"))]
pub struct PolicyTarget {
    /// Service (the pods of a Service, by name), Workload (pods by labels) or Namespace (all pods of the policy's
    /// namespace).
    pub kind: TargetKind,
    /// Name of the Service. Only for kind Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub name: Option<String>,
    /// Labels of the pods. Only for kind Workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelMatch>,
}

/// Selects pods by their labels.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabelMatch {
    /// Labels and values. A pod must have all of them.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16))]
    pub match_labels: BTreeMap<String, String>,
}

/// Kind of a policy target.
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

/// Whether a policy is enforced or only evaluated.
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
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.allow) || has(self.deny)", "access needs allow, deny or both; leave access out to allow every caller"))]
pub struct AccessSpec {
    /// Only requests that match at least one of these rules pass. An empty list refuses every request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub allow: Option<Vec<AccessRule>>,
    /// Requests that match at least one of these rules are refused, even if they match `allow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub deny: Option<Vec<AccessRule>>,
}

/// A rule. It matches requests from any of the callers to any of the operations.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessRule {
    /// Callers. Empty: every caller.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub from: Vec<Caller>,
    /// Operations. Empty: every operation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub to: Vec<Operation>,
}

/// A caller, identified by its certificate (service account and namespace) or by its address.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.serviceAccount) || has(self.namespace) || has(self.namespaceLabels) || has(self.cidr)", "a caller needs serviceAccount, namespace, namespaceLabels or cidr"))]
#[x_kube(validation = ("!has(self.cidr) || (!has(self.serviceAccount) && !has(self.namespace) && !has(self.namespaceLabels))", "cidr cannot be combined with serviceAccount, namespace or namespaceLabels: write a separate caller for it"))]
#[x_kube(validation = ("!has(self.namespace) || !has(self.namespaceLabels)", "use either namespace or namespaceLabels, not both"))]
pub struct Caller {
    /// The caller's service account. It is in the policy's namespace unless `namespace` or `namespaceLabels` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account: Option<String>,
    /// The caller's namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
    /// Labels of the caller's namespace. The namespace must have all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minProperties" = 1, "maxProperties" = 16))]
    pub namespace_labels: Option<BTreeMap<String, String>>,
    /// The caller's address range, such as 10.1.0.0/16. For callers without a certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 43),
        extend("x-kubernetes-validations" = [{"rule": CIDR_RULE, "message": CIDR_MESSAGE}])
    )]
    pub cidr: Option<String>,
}

/// An operation: HTTP methods, paths and ports. A request matches if it matches each list that is present.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.methods) || has(self.paths) || has(self.ports)", "an operation needs methods, paths or ports; leave `to` out to mean all"))]
pub struct Operation {
    /// HTTP methods in upper case, such as GET.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 16), inner(regex(pattern = "^[A-Z]+$"), length(max = 32)))]
    pub methods: Option<Vec<String>>,
    /// Absolute paths, such as /v1/**. `*` matches within a segment, `**` across segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(regex(pattern = "^/"), length(max = 1024)))]
    pub paths: Option<Vec<String>>,
    /// Ports of the pod, which may differ from the ports of its Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), inner(range(min = 1, max = 65535)))]
    pub ports: Option<Vec<u16>>,
}

/// Observed state of the policy.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MeshPolicyStatus {
    /// The generation of the spec that the status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The target as kind and name, such as Service/payments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Summary of the access section, such as "2 allow, 1 deny".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub access: Option<String>,
    /// Names of the other sections that are set, besides mtls and access, such as "timeout,retry".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sections: Option<String>,
    /// Number of pods with a sidecar that the policy selects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workloads: Option<i32>,
    /// How many of the selected sidecars have acknowledged the policy, such as 12/12. Programs should read
    /// enforcingSidecars and selectedSidecars instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforced: Option<String>,
    /// Number of sidecars that the policy selects. Pods without an address and terminating pods do not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selected_sidecars: Option<i32>,
    /// Number of those sidecars that have acknowledged the policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enforcing_sidecars: Option<i32>,
    /// Ready: the policy is valid, and every selected sidecar has acknowledged it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
