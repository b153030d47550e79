//! What the MeshConfig's schema cannot check.

use std::collections::BTreeMap;

use tulle_crds::{MeshConfig, Tracing, parse_duration};

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
    if !config
        .spec
        .trust_domain
        .bytes()
        .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    {
        let message = format!("spec.trustDomain: invalid trust domain {:?}", config.spec.trust_domain);
        let hint = "write lower-case letters, digits, `.`, `_` and `-`, as cluster.local";
        found.push(Found::new(INVALID_VALUE, message).hint(hint));
    }
    if let Some(tracing) = &config.spec.tracing {
        check_tracing(tracing, &mut found);
    }
    let resources = &config.spec.sidecar.resources;
    amounts("requests", &resources.requests, &mut found);
    amounts("limits", &resources.limits, &mut found);
    found
}

/// The API server checks both by CEL rules (`crds/src/config.rs`).
fn check_tracing(tracing: &Tracing, found: &mut Vec<Found>) {
    if !is_collector(&tracing.endpoint) {
        let message = format!("spec.tracing.endpoint: invalid address {:?}", tracing.endpoint);
        let hint =
            "write the OTLP/gRPC receiver with scheme and port, as http://collector.observability:4317";
        found.push(Found::new(INVALID_VALUE, message).hint(hint));
    }
    if !is_sampling(&tracing.sampling) {
        let message = format!("spec.tracing.sampling: invalid percentage {:?}", tracing.sampling);
        let hint = "write a percentage from 0% to 100% with at most four decimals, as 1%";
        found.push(Found::new(INVALID_VALUE, message).hint(hint));
    }
}

/// `http://HOST:PORT` without a path.
fn is_collector(text: &str) -> bool {
    let Some((host, port)) = text.strip_prefix("http://").and_then(|rest| rest.rsplit_once(':')) else {
        return false;
    };
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(ip) => {
            !ip.is_empty() && ip.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b':' | b'.'))
        }
        None => {
            let is_end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
            let bytes = host.as_bytes();
            is_end(bytes.first())
                && is_end(bytes.last())
                && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'))
        }
    };
    is_host && is_digits(port, 5)
}

/// A percentage with at most four decimals, from 0% to 100%.
fn is_sampling(text: &str) -> bool {
    let Some(number) = text.strip_suffix('%') else { return false };
    let (whole, decimals) = match number.split_once('.') {
        Some((whole, decimals)) => (whole, Some(decimals)),
        None => (number, None),
    };
    let is_fraction = decimals.is_none_or(|decimals| is_digits(decimals, 4));
    match whole {
        "100" => is_fraction && decimals.is_none_or(|decimals| decimals.bytes().all(|byte| byte == b'0')),
        _ => is_fraction && is_digits(whole, 2),
    }
}

/// From one digit to `most`.
fn is_digits(text: &str, most: usize) -> bool {
    (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
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
