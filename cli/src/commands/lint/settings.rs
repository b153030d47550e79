//! What the MeshConfig's schema cannot check.

use std::collections::BTreeMap;

use tulle_crds::{MeshConfig, parse_duration};

use super::rules::{CONTRADICTION, Found, INVALID_VALUE, RISKY};

/// The operator refuses to issue shorter certificates.
const SHORTEST: u64 = 20;
const SEVEN_DAYS: u64 = 7 * 86_400;
/// Suffixes of quantities: resource.Quantity of Kubernetes.
const SUFFIXES: [&str; 16] =
    ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];

/// What is wrong with the settings.
pub(super) fn check(config: &MeshConfig) -> Vec<Found> {
    let mut found = Vec::new();
    if config.metadata.name.as_deref() != Some("mesh") {
        let message = "metadata.name: a cluster has one MeshConfig, and only the one named mesh is used";
        found.push(Found::new(CONTRADICTION, message).hint("name it mesh"));
    }
    let path = "spec.certificates.leafLifetime";
    match parse_duration(&config.spec.certificates.leaf_lifetime) {
        Err(error) => found.push(Found::new(INVALID_VALUE, format!("{path}: {error}"))),
        Ok(lifetime) if lifetime.as_secs() < SHORTEST => {
            let message = format!("{path} must be at least {SHORTEST}s; write for example 24h");
            found.push(Found::new(INVALID_VALUE, message));
        }
        Ok(lifetime) if lifetime.as_secs() > SEVEN_DAYS => {
            let message = format!("{path} is more than 7 days, and a stolen key can be used that long");
            found.push(Found::new(RISKY, message).hint("write for example 24h"));
        }
        Ok(_) => {}
    }
    let resources = &config.spec.sidecar.resources;
    amounts("requests", &resources.requests, &mut found);
    amounts("limits", &resources.limits, &mut found);
    found
}

fn amounts(list: &str, amounts: &BTreeMap<String, String>, found: &mut Vec<Found>) {
    for (resource, amount) in amounts {
        let path = format!("spec.sidecar.resources.{list}.{resource}");
        if !matches!(resource.as_str(), "cpu" | "memory") {
            let message = format!("{path}: only cpu and memory can be set");
            found.push(Found::new(INVALID_VALUE, message));
        }
        if !is_quantity(amount) {
            let message = format!("{path}: invalid quantity {amount:?}; write for example 20m or 32Mi");
            found.push(Found::new(INVALID_VALUE, message));
        }
    }
}

/// Whether it is an amount of Kubernetes that is not negative: `20m`, `0.5`, `32Mi`, `1e3`.
pub(super) fn is_quantity(text: &str) -> bool {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let Some((number, suffix)) = text.split_at_checked(end) else { return false };
    let is_exponent = suffix.strip_prefix(['e', 'E']).is_some_and(|exponent| exponent.parse::<i8>().is_ok());
    number.parse::<f64>().is_ok() && (is_exponent || SUFFIXES.contains(&suffix))
}
