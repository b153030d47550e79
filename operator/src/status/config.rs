//! Computes the status of the MeshConfig: whether its settings are in use, and the state of the root.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tulle_crds::{MeshConfig, MeshConfigStatus, reason, set_condition};

use crate::identity::lifetime::Lifetime;
use crate::identity::root::RootState;

/// Reason of condition LeafLifetime: the setting is in use.
const IN_USE: &str = "InUse";
/// Reason of condition LeafLifetime: a different lifetime is in use.
const CLAMPED: &str = "Clamped";

/// Computes the status of the MeshConfig in a mesh with this trust domain and root.
pub fn config_status(
    config: &MeshConfig,
    trust_domain: &str,
    root: Option<&RootState>,
    now: &Time,
) -> MeshConfigStatus {
    let mut status = config.status.clone().unwrap_or_default();
    let generation = config.metadata.generation.unwrap_or_default();
    status.observed_generation = Some(generation);
    status.trust_domain = Some(trust_domain.to_owned());
    let asked = &config.spec.trust_domain;
    let (ready, reason, message) = match asked == trust_domain {
        true => (true, reason::ACCEPTED, format!("identities are spiffe://{trust_domain}/ns/…/sa/…")),
        false => (
            false,
            reason::TRUST_DOMAIN_FIXED,
            format!(
                "the root has trust domain {trust_domain}, which stays in force. To change it to {asked}, uninstall Tulle with Secret tulle-root and install it again. To keep it, delete this object and apply it with trustDomain: {trust_domain}"
            ),
        ),
    };
    set_condition(&mut status.conditions, ("Ready", ready, reason, &message), generation, now);
    let lifetime = Lifetime::of(&config.spec.certificates.leaf_lifetime);
    let (unchanged, reason) = if lifetime.clamped.is_none() { (true, IN_USE) } else { (false, CLAMPED) };
    let message = lifetime.message();
    set_condition(&mut status.conditions, ("LeafLifetime", unchanged, reason, &message), generation, now);
    if let Some(root) = root {
        let (valid, reason, mut message) = (root.is_valid(), root.reason(), root.message());
        if valid && crate::identity::root::new_root(config).is_some() {
            message.push_str("; remove annotation tulle.dev/new-root: while it is set, an operator that starts creates a new root if the Secret is missing");
        }
        set_condition(&mut status.conditions, ("RootValid", valid, reason, &message), generation, now);
    }
    status
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::json;

    use super::*;

    fn config(lifetime: &str, annotations: serde_json::Value) -> MeshConfig {
        serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig",
            "metadata": {"name": "mesh", "annotations": annotations},
            "spec": {"certificates": {"leafLifetime": lifetime}},
        }))
        .unwrap()
    }

    fn said(status: &MeshConfigStatus, of: &str) -> (String, String, String) {
        let found = status.conditions.iter().find(|condition| condition.type_ == of).unwrap();
        (found.status.clone(), found.reason.clone(), found.message.clone())
    }

    #[test]
    fn a_root_that_is_lost_and_a_lifetime_that_is_clamped_are_conditions_of_their_own() {
        let now = Time(Timestamp::UNIX_EPOCH);
        let config = config("2400h", json!({}));
        let status = config_status(&config, "cluster.local", Some(&RootState::Missing), &now);
        assert_eq!(said(&status, "Ready").0, "True");
        let (holds, reason, message) = said(&status, "LeafLifetime");
        assert_eq!((holds.as_str(), reason.as_str()), ("False", "Clamped"));
        assert!(message.contains("2400h"), "{message}");
        let (holds, reason, message) = said(&status, "RootValid");
        assert_eq!((holds.as_str(), reason.as_str()), ("False", "RootMissing"));
        assert!(message.contains("backup") && message.contains("tulle.dev/new-root"), "{message}");
    }

    #[test]
    fn an_annotation_that_allows_a_new_root_is_not_forgotten() {
        let now = Time(Timestamp::UNIX_EPOCH);
        let set = config("24h", json!({"tulle.dev/new-root": "1"}));
        let status = config_status(&set, "cluster.local", Some(&RootState::Valid), &now);
        let (holds, _, message) = said(&status, "RootValid");
        assert!(holds == "True" && message.contains("remove annotation"), "{message}");
        let plain = config_status(&config("24h", json!({})), "cluster.local", Some(&RootState::Valid), &now);
        assert!(!said(&plain, "RootValid").2.contains("annotation"));
        assert_eq!(said(&plain, "LeafLifetime").1, "InUse");
    }
}
