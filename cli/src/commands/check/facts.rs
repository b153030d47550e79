//! What was observed of a cluster, before anybody judges it.

use std::collections::BTreeMap;

use serde_json::Value;
use tulle_mesh::query;

use crate::objects::Read;

/// A right that an installation needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    /// Verb and resource, as `kubectl auth can-i` takes them.
    pub right: String,
    /// Whether the user has it.
    pub allowed: Read<bool>,
}

/// An object of an installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// `Kind/namespace/name`.
    pub object: String,
    /// Whether it exists.
    pub exists: Read<bool>,
}

/// What was observed. Nothing here is an error of this program: what could not be read is a fact, too.
#[derive(Clone, Debug)]
pub struct Facts {
    /// When, in Unix seconds.
    pub now: i64,
    /// The version of this program.
    pub cli: String,
    /// The namespace of Tulle.
    pub system: String,
    /// The namespace that is looked at. `None`: all.
    pub namespace: Option<String>,
    /// The API server's version, such as `v1.31.2`.
    pub server: Read<String>,
    pub nodes: Read<Vec<Value>>,
    /// Asked for before an installation only.
    pub permissions: Vec<Permission>,
    /// Namespaces with the label `tulle.dev/inject`.
    pub namespaces: Read<Vec<Value>>,
    /// Pods of these namespaces without the label of a sidecar.
    pub uninjected: Read<Vec<Value>>,
    /// CustomResourceDefinitions of Tulle, by name. `None`: it does not exist.
    pub definitions: BTreeMap<&'static str, Read<Option<Value>>>,
    /// The objects that this program installs, without those that other facts have: definitions, Deployments and webhook
    /// configurations.
    pub parts: Vec<Part>,
    /// Deployments of Tulle, by name.
    pub deployments: BTreeMap<&'static str, Read<Option<Value>>>,
    /// The Lease of the leader.
    pub lease: Read<Option<Value>>,
    /// EndpointSlices of Tulle's namespace.
    pub slices: Read<Vec<Value>>,
    /// The operator's own state, or why it did not answer.
    pub health: Result<query::Health, String>,
    /// Sidecars, or why the operator did not answer.
    pub sidecars: Result<query::Sidecars, String>,
    /// Pods with the label of a sidecar.
    pub injected: Read<Vec<Value>>,
    pub mutating: Read<Option<Value>>,
    pub validating: Read<Option<Value>>,
    /// MeshConfig `mesh`.
    pub config: Read<Option<Value>>,
    pub policies: Read<Vec<Value>>,
    pub canaries: Read<Vec<Value>>,
    /// The targets of the Canaries, as `Kind/namespace/name`.
    pub targets: BTreeMap<String, Value>,
    pub routes: Read<Vec<Value>>,
    /// ConfigMap `cilium-config` of `kube-system`.
    pub cilium: Read<Option<Value>>,
}

/// The name of a target of a Canary in [`Facts::targets`].
pub fn target_name(kind: &str, namespace: &str, name: &str) -> String {
    format!("{kind}/{namespace}/{name}")
}
