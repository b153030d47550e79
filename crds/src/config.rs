//! MeshConfig: settings of the whole mesh.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::MtlsMode;
use crate::quantity::DURATION_PATTERN;

/// Where a collector listens.
const ENDPOINT: &str =
    r"self.matches('^http://([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?|\\[[0-9a-fA-F:.]+\\]):[0-9]{1,5}$')";
/// A percentage with at most four decimals, from 0% to 100%.
const SAMPLING: &str = "self.matches('^(100([.]0{1,4})?|[0-9]{1,2}([.][0-9]{1,4})?)%$')";

/// Settings of the whole mesh.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tulle.dev",
    version = "v1alpha1",
    kind = "MeshConfig",
    doc = "MeshConfig holds the settings of the whole mesh. A cluster has one, named mesh; the operator creates \
           it with the defaults if it is missing.",
    status = "MeshConfigStatus",
    category = "tulle",
    derive = "PartialEq",
    derive = "Default",
    validation = ("self.metadata.name == 'mesh'", "a cluster has one MeshConfig: name it mesh"),
    printcolumn(name = "TRUST DOMAIN", type_ = "string", json_path = ".status.trustDomain"),
    printcolumn(name = "MTLS", type_ = "string", json_path = ".spec.mtls"),
    printcolumn(name = "READY", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfigSpec {
    /// The trust domain of all workload identities, as in spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT. Immutable,
    /// because every certificate contains it.
    #[serde(default = "trust_domain")]
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[a-z0-9._-]+$"))]
    #[x_kube(validation = ("self == oldSelf", "trustDomain is immutable, because every certificate contains it"))]
    pub trust_domain: String,
    /// The mTLS mode of pods for which no MeshPolicy sets one: Strict, Permissive or Disabled.
    #[serde(default)]
    pub mtls: MtlsMode,
    /// Settings of workload certificates.
    #[serde(default)]
    pub certificates: Certificates,
    /// Defaults of injected sidecars. Annotations of a namespace or a pod override them.
    #[serde(default, skip_serializing_if = "SidecarDefaults::is_empty")]
    pub sidecar: SidecarDefaults,
    /// Distributed tracing. Default: sidecars create no spans, and forward trace headers unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracing: Option<Tracing>,
    /// Pods that may run without a sidecar in namespaces with the label tulle.dev/inject=required.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub exemptions: Vec<Exemption>,
}

impl Default for MeshConfigSpec {
    fn default() -> Self {
        Self {
            trust_domain: trust_domain(),
            mtls: MtlsMode::default(),
            certificates: Certificates::default(),
            sidecar: SidecarDefaults::default(),
            tracing: None,
            exemptions: Vec::new(),
        }
    }
}

/// The default trust domain.
pub fn trust_domain() -> String {
    "cluster.local".to_owned()
}

/// Defaults of injected sidecars.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarDefaults {
    /// Resources of each injected container. They are adapted to the LimitRanges and ResourceQuotas of a namespace, and
    /// to pods whose QoS class is Guaranteed.
    #[serde(skip_serializing_if = "SidecarResources::is_empty")]
    pub resources: SidecarResources,
}

/// Resources of an injected container.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct SidecarResources {
    /// Requests of cpu and memory, such as {cpu: 20m, memory: 32Mi}. Default: 10m and 16Mi.
    #[schemars(extend("maxProperties" = 2))]
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, String>,
    /// Limits of cpu and memory. Default: none.
    #[schemars(extend("maxProperties" = 2))]
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, String>,
}

impl SidecarDefaults {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.resources.is_empty()
    }
}

impl SidecarResources {
    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty() && self.limits.is_empty()
    }
}

/// Settings of workload certificates.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Certificates {
    /// Lifetime of a workload certificate, such as 24h or 1h30m; at least 20s. The sidecar renews it at half of its
    /// lifetime.
    #[serde(default = "leaf_lifetime")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    pub leaf_lifetime: String,
}

impl Default for Certificates {
    fn default() -> Self {
        Self { leaf_lifetime: leaf_lifetime() }
    }
}

fn leaf_lifetime() -> String {
    "24h".to_owned()
}

/// Distributed tracing: where sidecars send spans, and of how many requests.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Tracing {
    /// The collector that receives the spans, as http://HOST:PORT of an OTLP/gRPC receiver, such as
    /// http://collector.observability:4317. Each sidecar connects to it directly and without TLS. If the collector cannot
    /// be reached, spans are dropped and counted, and requests are not affected.
    #[schemars(length(min = 10, max = 300))]
    #[x_kube(validation = (ENDPOINT, "tracing.endpoint must be the address of an OTLP/gRPC receiver without TLS, with its port; write for example http://collector.observability:4317"))]
    pub endpoint: String,
    /// How many of the requests without a trace header start a new trace, as a percentage such as 1% or 0.1%. A request
    /// with a trace header follows the decision in that header. Default: 0%, so that sidecars only add spans to traces
    /// that applications or gateways have started.
    #[serde(default = "trace_sampling")]
    #[schemars(length(min = 2, max = 9))]
    #[x_kube(validation = (SAMPLING, "tracing.sampling must be a percentage from 0% to 100% with at most four decimals; write for example 1%"))]
    pub sampling: String,
}

fn trace_sampling() -> String {
    "0%".to_owned()
}

/// Pods that may run without a sidecar.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Exemption {
    /// Namespace of the pods.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Service account of the pods.
    #[schemars(length(min = 1, max = 253))]
    pub service_account: String,
}

/// Observed state of the settings.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfigStatus {
    /// The generation of the spec that the status describes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The trust domain in use, which is that of the root certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// Ready: the settings are in use. If not, the message explains what to change.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
