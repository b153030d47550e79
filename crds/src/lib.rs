//! The Kubernetes API of Tulle, group `tulle.dev`: one file per kind. The YAML below `manifests/` is
//! generated from these types and checked by a test.
//!
//! ```text
//!   MeshPolicy   how traffic to a target is treated: encryption, who may call
//!   Canary       how a new version of a workload earns its traffic
//!   MeshConfig   the one object of the whole mesh: trust domain, lifetimes, defaults
//! ```
#![deny(missing_docs)]

mod action;
mod canary;
mod condition;
mod config;
mod policy;
mod quantity;

pub use action::CanaryAction;
pub use canary::*;
pub use condition::{reason, set_condition};
pub use config::*;
pub use policy::*;
pub use quantity::{QuantityError, parse_duration, parse_percent};

use kube::CustomResourceExt as _;

/// Labels and annotations that Tulle reads and writes.
pub mod keys {
    /// On a namespace: `enabled` or `required`; on a pod: `disabled` (in `enabled` namespaces).
    pub const INJECT: &str = "tulle.dev/inject";
    /// On an injected pod: the sidecar's version.
    pub const INJECTED: &str = "tulle.dev/sidecar";
    /// The readiness gate of pods whose revision has not been approved.
    pub const GATE: &str = "tulle.dev/approved";
    /// On a Canary: an action with a request id, such as `promote@4711`.
    pub const ACTION: &str = "tulle.dev/action";
    /// Annotation of a pod: ports that its sidecar does not see.
    pub const SKIP_INBOUND_PORTS: &str = "tulle.dev/skip-inbound-ports";
    /// On a ConfigMap: the trust bundle that Tulle keeps there.
    pub const TRUST: &str = "tulle.dev/trust";
}

/// File name and content of every CustomResourceDefinition.
pub fn manifests() -> Vec<(&'static str, String)> {
    let yaml = |definition| serde_yaml::to_string(&definition).unwrap_or_default();
    vec![
        ("canaries.yaml", yaml(Canary::crd())),
        ("meshconfigs.yaml", yaml(MeshConfig::crd())),
        ("meshpolicies.yaml", yaml(MeshPolicy::crd())),
    ]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    #[test]
    fn the_checked_in_manifests_are_what_the_types_generate() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
        for (name, generated) in super::manifests() {
            let path = folder.join(name);
            if std::env::var_os("TULLE_UPDATE").is_some() {
                fs::write(&path, &generated).unwrap();
            }
            let checked_in = fs::read_to_string(&path).unwrap_or_default();
            assert!(checked_in == generated, "{name} is stale: TULLE_UPDATE=1 cargo test -p tulle-crds");
        }
    }
}
