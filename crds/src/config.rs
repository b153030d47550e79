//! MeshConfig: the one object of the whole mesh.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::MtlsMode;
use crate::quantity::DURATION_PATTERN;

/// Settings of the whole mesh. There is one, named `mesh`; the operator makes it with the defaults where
/// it is missing.
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
    validation = ("self.metadata.name == 'mesh'", "there is one MeshConfig: name it mesh"),
    printcolumn(name = "TRUST DOMAIN", type_ = "string", json_path = ".status.trustDomain"),
    printcolumn(name = "MTLS", type_ = "string", json_path = ".spec.mtls"),
    printcolumn(name = "READY", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfigSpec {
    /// The trust domain of every identity. Fixed once certificates have been issued.
    #[serde(default = "trust_domain")]
    #[schemars(length(min = 1, max = 253), regex(pattern = "^[a-z0-9._-]+$"))]
    #[x_kube(validation = ("self == oldSelf", "the trust domain is fixed: every certificate names it"))]
    pub trust_domain: String,
    /// What holds where no MeshPolicy says otherwise.
    #[serde(default)]
    pub mtls: MtlsMode,
    /// Lifetimes of certificates.
    #[serde(default)]
    pub certificates: Certificates,
    /// Pods that may stay without a sidecar in namespaces where one is required.
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
            exemptions: Vec::new(),
        }
    }
}

/// The default trust domain.
pub fn trust_domain() -> String {
    "cluster.local".to_owned()
}

/// Lifetimes of certificates.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Certificates {
    /// How long a sidecar's certificate lives; it is renewed at half of that.
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

/// Pods that may stay without a sidecar.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Exemption {
    /// Their namespace.
    #[schemars(length(min = 1, max = 63))]
    pub namespace: String,
    /// Their service account.
    #[schemars(length(min = 1, max = 253))]
    pub service_account: String,
}

/// What became of the settings.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct MeshConfigStatus {
    /// The generation that the rest of the status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The trust domain that is in force: that of the root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trust_domain: Option<String>,
    /// `Ready`: the settings hold.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
