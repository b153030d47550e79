//! Validates what JSON schema and CEL in the CRDs cannot, of a MeshPolicy and the MeshConfig (Canaries:
//! [`crate::canary`]).
//!
//! In: an object that a user applies. Out: [`Validation`], which are errors that
//! reject the object and warnings that `kubectl` shows. Never reads the cluster and never changes an object.

use ipnet::IpNet;
use k8s_openapi::jiff::{Timestamp, ToSpan as _};
use tulle_crds::{
    AccessSpec, MeshConfig, MeshPolicy, MeshPolicySpec, MtlsMode, PolicyMode, TargetKind, ZonePolicy,
    parse_duration,
};
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

/// Faults end at most this long after the policy is applied: a forgotten test ends by itself.
const FAULTS_FOR_HOURS: i64 = 24;

/// Validates a MeshPolicy at this time.
pub fn policy(policy: &MeshPolicy, now: Timestamp) -> Validation {
    let mut validation = Validation::default();
    let spec = &policy.spec;
    if let Some(access) = &spec.access {
        check_access(access, &mut validation);
    }
    for invalid in spec.invalid_values() {
        validation.error(invalid.to_string());
    }
    check_calls(spec, now, &mut validation);
    check_limits(spec, &mut validation);
    if spec.telemetry.is_some() && spec.mode == PolicyMode::Shadow {
        validation
            .warn("spec.telemetry has no effect with mode: Shadow; put it into a policy with mode: Enforce");
    }
    validation
}

/// A change of `spec.mtls` that skips `Permissive`, where `before` and `after` are its values. Servers and clients learn of
/// it at different moments, so that requests are lost.
pub fn mtls_change(before: Option<&str>, after: Option<MtlsMode>) -> Option<String> {
    let (from, to) = match (before, after) {
        (Some("Disabled"), Some(MtlsMode::Strict)) => ("Disabled", "Strict"),
        (Some("Strict"), Some(MtlsMode::Disabled)) => ("Strict", "Disabled"),
        _ => return None,
    };
    Some(format!(
        "spec.mtls: from {from} to {to} in one step loses requests while servers and clients learn of it at different moments; apply Permissive first, and {to} once tulle edges shows that the clients have followed"
    ))
}

/// Limits of a whole namespace may be meant for all pods together.
fn check_limits(spec: &MeshPolicySpec, validation: &mut Validation) {
    let limits = spec.limits.as_ref().filter(|_| spec.target.kind == TargetKind::Namespace);
    let Some(limits) = limits else { return };
    let each =
        [("concurrency", limits.concurrency, "requests"), ("connections", limits.connections, "connections")];
    for (name, limit, what) in each {
        if let Some(limit) = limit {
            validation.warn(format!(
                "spec.limits.{name} holds for each pod by itself: {limit} {what} at once in every pod of the namespace, whatever it is; target a Service or Workload to set it for one"
            ));
        }
    }
}

fn check_access(access: &AccessSpec, validation: &mut Validation) {
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
}

/// The sections about calls to Services.
fn check_calls(spec: &MeshPolicySpec, now: Timestamp, validation: &mut Validation) {
    let set = spec.call_sections();
    if spec.target.kind == TargetKind::Workload && !set.is_empty() {
        validation.warn(format!(
            "spec.target: {} {} no effect on a Workload, because calls are made to Services; target a Service instead",
            set.join(", "),
            if set.len() == 1 { "has" } else { "have" }
        ));
    }
    if let Some(attempts) = attempts_that_do_not_fit(spec) {
        validation.warn(attempts);
    }
    if spec.balance.as_ref().is_some_and(|balance| balance.zone == Some(ZonePolicy::Only)) {
        validation.warn(
            "spec.balance.zone: Only fails every request from a zone without a ready pod; write Prefer to use other zones then",
        );
    }
    if let Some(faults) = &spec.faults {
        let latest = now.checked_add(FAULTS_FOR_HOURS.hours()).unwrap_or(Timestamp::MAX);
        if faults.until.0 > latest {
            validation.error(format!(
                "spec.faults.until: {} is more than {FAULTS_FOR_HOURS} hours ahead; write a time up to {latest:.0}",
                faults.until.0
            ));
        } else if faults.until.0 <= now {
            validation.warn(format!(
                "spec.faults.until: {} has passed, so there are no faults; write a time up to {latest:.0}",
                faults.until.0
            ));
        }
    }
}

/// A warning where the last attempts would begin after the request has ended.
fn attempts_that_do_not_fit(spec: &MeshPolicySpec) -> Option<String> {
    let (retry, timeout) = (spec.retry.as_ref()?, spec.timeout.as_ref()?);
    let values = timeout.values().ok()?;
    let (request, attempt) = (u64::from(values.request_ms), u64::from(values.attempt_ms));
    let attempts = u64::from(retry.attempts) + 1;
    if request == 0 || attempt == 0 || attempts * attempt <= request {
        return None;
    }
    let fitting = request.div_ceil(attempt);
    Some(format!(
        "spec.timeout.request ({request} ms) ends before {attempts} attempts of {attempt} ms each: when all of them time out, only {fitting} begin; write a shorter timeout.attempt or fewer retry.attempts"
    ))
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
        let validation = super::policy(&policy, now());
        assert_eq!(
            validation.errors,
            [
                "spec.access.deny[0]: invalid CIDR \"10.1\"; write for example 10.1.0.0/16",
                "spec.access.deny[1]: invalid path \"/a//b\"; write it from the root, for example /v1/**",
            ]
        );
    }

    fn now() -> Timestamp {
        "2026-12-01T12:00:00Z".parse().unwrap()
    }

    fn of(spec: serde_json::Value) -> Validation {
        let policy = json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "p"}, "spec": spec,
        });
        super::policy(&serde_json::from_value(policy).unwrap(), now())
    }

    fn web() -> serde_json::Value {
        json!({"kind": "Service", "name": "web"})
    }

    #[test]
    fn a_policy_with_every_section_and_valid_values_has_neither_errors_nor_warnings() {
        let spec = json!({
            "target": web(), "limits": {"concurrency": 64, "connections": 1000},
            "timeout": {"request": "2s", "attempt": "500ms", "idle": "60s"}, "retry": {"on": ["5xx"], "attempts": 2},
            "breaker": {}, "balance": {"by": "Latency", "zone": "Prefer", "warmUp": "30s"},
            "faults": {"abort": {"status": 503, "of": "1%"}, "until": "2026-12-02T12:00:00Z"},
            "telemetry": {"accessLog": "Sampled", "sample": "1%"},
        });
        assert_eq!(of(spec), Validation::default());
    }

    #[test]
    fn values_that_no_sidecar_is_sent_are_rejected() {
        let spec = json!({"target": web(), "timeout": {"request": "1s", "attempt": "2s"}, "retry": {"on": ["5xx"], "attempts": 9}});
        let Validation { errors, .. } = of(spec);
        let [timeout, retry] = errors.as_slice() else { panic!("{errors:?}") };
        assert!(timeout.starts_with("spec.timeout.attempt: 2s is longer"), "{timeout}");
        assert!(retry.starts_with("spec.retry.attempts: 9 attempts"), "{retry}");
    }

    #[test]
    fn faults_end_within_a_day() {
        let faults = |until: &str| {
            of(json!({"target": web(), "faults": {"abort": {"status": 503, "of": "1%"}, "until": until}}))
        };
        assert_eq!(faults("2026-12-02T12:00:00Z"), Validation::default());
        let forgotten = faults("2026-12-02T12:00:01Z");
        assert_eq!(
            forgotten.errors,
            [
                "spec.faults.until: 2026-12-02T12:00:01Z is more than 24 hours ahead; write a time up to 2026-12-02T12:00:00Z"
            ]
        );
        let over = faults("2026-12-01T11:59:59Z");
        assert!(over.errors.is_empty() && over.warnings[0].contains("has passed"), "{over:?}");
    }

    #[test]
    fn the_samples_of_policies_are_valid_on_every_day() {
        let folder = format!("{}/../config/samples", env!("CARGO_MANIFEST_DIR"));
        let policies = ["breaker-balance", "faults", "limits", "telemetry", "timeout-retry"]
            .map(|name| format!("policy-{name}"));
        for name in policies.iter().map(String::as_str).chain(["deny", "shadow"]) {
            let text = std::fs::read_to_string(format!("{folder}/{name}.yaml")).unwrap();
            let policy: MeshPolicy = serde_yaml::from_str(&text).unwrap();
            for day in ["2026-01-01T00:00:00Z", "2126-01-01T00:00:00Z"] {
                let Validation { errors, .. } = super::policy(&policy, day.parse().unwrap());
                assert_eq!(errors, Vec::<String>::new(), "{name} on {day}");
            }
        }
    }

    #[test]
    fn a_mode_that_skips_permissive_is_warned_of() {
        let change = |before, after| mtls_change(before, Some(after)).is_some();
        assert!(change(Some("Disabled"), MtlsMode::Strict) && change(Some("Strict"), MtlsMode::Disabled));
        for (before, after) in [
            (Some("Disabled"), MtlsMode::Permissive),
            (Some("Permissive"), MtlsMode::Strict),
            (Some("Strict"), MtlsMode::Strict),
            (None, MtlsMode::Strict),
        ] {
            assert!(!change(before, after), "{before:?} {after:?}");
        }
        assert_eq!(mtls_change(Some("Disabled"), None), None);
    }

    #[test]
    fn what_is_valid_and_probably_not_meant_is_warned_of() {
        let timeout = json!({"request": "2s", "attempt": "1s"});
        let workload = json!({"kind": "Workload", "selector": {"matchLabels": {"app": "web"}}});
        for (spec, expected) in [
            (json!({"target": web(), "timeout": timeout, "retry": {"on": ["5xx"]}}), "only 2 begin"),
            (
                json!({"target": {"kind": "Namespace"}, "limits": {"concurrency": 8}}),
                "in every pod of the namespace",
            ),
            (
                json!({"target": {"kind": "Namespace"}, "limits": {"connections": 100}}),
                "spec.limits.connections holds for each pod by itself: 100 connections at once",
            ),
            (json!({"target": web(), "balance": {"zone": "Only"}}), "write Prefer"),
            (
                json!({"target": web(), "mode": "Shadow", "telemetry": {"accessLog": "All"}}),
                "spec.telemetry has no effect with mode: Shadow",
            ),
            (
                json!({"target": workload, "timeout": timeout, "breaker": {}}),
                "timeout, breaker have no effect",
            ),
            (json!({"target": workload, "timeout": timeout}), "spec.target: timeout has no effect"),
        ] {
            let validation = of(spec);
            assert!(validation.errors.is_empty(), "{validation:?}");
            let [warning] = validation.warnings.as_slice() else { panic!("{validation:?}") };
            assert!(warning.contains(expected), "{warning}");
        }
    }
}
