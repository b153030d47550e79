//! Validates what JSON schema and CEL in the CRDs cannot, of a MeshPolicy and the MeshConfig (Canaries:
//! [`crate::canary`]).
//!
//! In: an object that a user applies. Out: [`Validation`], which are errors that
//! reject the object and warnings that `kubectl` shows. Never reads the cluster and never changes an object.

use ipnet::IpNet;
use tulle_crds::{MeshConfig, MeshPolicy, MeshPolicySpec, parse_duration};
use tulle_mesh::policy::Glob;

/// Errors and warnings about an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validation {
    /// Reasons to reject the object. Each says what to write instead.
    pub errors: Vec<String>,
    /// Warnings for the author. They do not reject the object.
    pub warnings: Vec<String>,
}

impl Validation {
    pub(crate) fn error(&mut self, text: impl Into<String>) {
        self.errors.push(text.into());
    }

    pub(crate) fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }
}

/// Validates a MeshPolicy.
pub fn policy(policy: &MeshPolicy) -> Validation {
    let mut validation = Validation::default();
    let MeshPolicySpec { access, .. } = &policy.spec;
    let Some(access) = access else { return validation };
    let lists = [("allow", &access.allow), ("deny", &access.deny)];
    for (list, rules) in lists {
        for (index, rule) in rules.iter().flatten().enumerate() {
            for cidr in rule.from.iter().filter_map(|caller| caller.cidr.as_ref()) {
                if cidr.parse::<IpNet>().is_err() {
                    validation.error(format!(
                        "spec.access.{list}[{index}]: invalid CIDR {cidr:?}; write for example 10.1.0.0/16"
                    ));
                }
            }
            for path in rule.to.iter().flat_map(|operation| operation.paths.iter().flatten()) {
                if let Err(error) = Glob::compile(path) {
                    validation.error(format!("spec.access.{list}[{index}]: {error}"));
                }
                if list == "deny" {
                    validation.warn(format!(
                        "spec.access.deny[{index}] denies path {path} but no other path that leads to the same resource; prefer an allow list"
                    ));
                }
            }
        }
    }
    validation
}

/// Validates the MeshConfig.
pub fn config(config: &MeshConfig) -> Validation {
    let mut validation = Validation::default();
    match parse_duration(&config.spec.certificates.leaf_lifetime) {
        Err(error) => validation.error(format!("spec.certificates.leafLifetime: {error}")),
        Ok(lifetime) if lifetime.as_secs() < 20 => {
            validation.error("spec.certificates.leafLifetime: must be at least 20s; write for example 24h")
        }
        Ok(lifetime) if lifetime.as_secs() > 7 * 86_400 => {
            validation.warn(
                "spec.certificates.leafLifetime is more than 7 days, and a stolen key can be used that long; write for example 24h",
            );
        }
        Ok(_) => {}
    }
    validation
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_policy_with_invalid_values_is_rejected_with_what_to_write() {
        let policy: MeshPolicy = serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "p"},
            "spec": {"target": {"kind": "Namespace"}, "access": {"deny": [
                {"from": [{"cidr": "10.1"}]}, {"to": [{"paths": ["/a//b"]}]},
            ]}},
        }))
        .unwrap();
        let validation = super::policy(&policy);
        assert_eq!(
            validation.errors,
            [
                "spec.access.deny[0]: invalid CIDR \"10.1\"; write for example 10.1.0.0/16",
                "spec.access.deny[1]: invalid path \"/a//b\"; write it from the root, for example /v1/**",
            ]
        );
    }
}
