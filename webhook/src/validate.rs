//! Validates what JSON schema and CEL in the CRDs cannot.
//!
//! In: an object that a user applies, and the workload that it targets. Out: [`Validation`], which are errors that
//! reject the object and warnings that `kubectl` shows. Never reads the cluster and never changes an object.

use ipnet::IpNet;
use serde_json::Value;
use tulle_crds::{
    Canary, CanaryAction, CanarySpec, MeshConfig, MeshPolicy, MeshPolicySpec, OnFailure, WorkloadKind, keys,
    parse_duration, parse_percent,
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
    fn error(&mut self, text: impl Into<String>) {
        self.errors.push(text.into());
    }

    fn warn(&mut self, text: impl Into<String>) {
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

/// Validates a Canary, given the names of other Canaries with the same target, and the target if it exists.
pub fn canary(canary: &Canary, siblings: &[String], target: Option<&Value>) -> Validation {
    let mut validation = Validation::default();
    let spec = &canary.spec;
    check_judge_and_times(spec, &mut validation);
    let weights: Vec<u8> = spec.steps.iter().filter_map(|step| step.weight).collect();
    if weights.windows(2).any(|pair| pair.first() >= pair.last()) {
        validation.warn("spec.steps: a weight is not higher than the one before it, so the share of the new version does not grow; write increasing weights");
    }
    if let Some(sibling) = siblings.first() {
        validation.error(format!(
            "Canary {sibling} already has this target, and a workload can have only one Canary; delete one of the two"
        ));
    }
    match target {
        Some(target) => check_target(spec, target, &mut validation),
        None => validation.warn(format!(
            "there is no {} {} yet; the Canary takes effect when that workload is created",
            spec.target.kind.name(),
            spec.target.name
        )),
    }
    validation
}

/// The limits of 0 and 100 % are in the schema too. They are repeated because Helm does not upgrade CRDs, so the
/// schema in the cluster may be older than this webhook.
fn check_judge_and_times(spec: &CanarySpec, validation: &mut Validation) {
    match parse_percent(&spec.judge.confidence) {
        Err(error) => validation.error(format!("spec.judge.confidence: {error}")),
        Ok(share) if share <= 0.0 || share >= 1.0 => validation.error(format!(
            "spec.judge.confidence: {} must be above 0% and below 100%; write for example 99%",
            spec.judge.confidence
        )),
        Ok(_) => {}
    }
    match parse_duration(&spec.deadline) {
        Err(error) => validation.error(format!("spec.deadline: {error}")),
        Ok(deadline) if deadline.is_zero() => validation.error(format!(
            "spec.deadline: {} fails every rollout at once; write for example 24h",
            spec.deadline
        )),
        Ok(_) => {}
    }
    for (index, step) in spec.steps.iter().enumerate() {
        if step.weight == Some(0) {
            validation.error(format!(
                "spec.steps[{index}].weight: must be from 1 to 100; to keep the new version without traffic, write {{pause: {{}}}} as the first step"
            ));
        }
        if let Some(Err(error)) = step.hold.as_deref().map(parse_duration) {
            validation.error(format!("spec.steps[{index}].hold: {error}"));
        }
    }
}

/// Warns about an invalid action annotation.
pub fn action(object: &Value) -> Validation {
    let mut validation = Validation::default();
    let annotations = object.pointer("/metadata/annotations");
    let action = annotations.and_then(|all| all.get(keys::ACTION)).and_then(Value::as_str);
    if let Some(text) = action.filter(|text| CanaryAction::parse(text).is_none()) {
        validation.warn(format!(
            "{}={text} has no effect because it is invalid; write promote, abort, resume or retry, then @ and an id that was not used before, for example promote@1",
            keys::ACTION
        ));
    }
    validation
}

fn check_target(spec: &CanarySpec, target: &Value, validation: &mut Validation) {
    let at = |path: &str| target.pointer(path);
    let name = format!("{} {}", spec.target.kind.name(), spec.target.name);
    match spec.target.kind {
        WorkloadKind::Deployment => {
            let deadline = at("/spec/progressDeadlineSeconds").and_then(Value::as_u64).unwrap_or(600);
            let held = seconds(spec);
            if held > deadline {
                validation.warn(format!(
                    "the steps take about {held}s, but {name} reports ProgressDeadlineExceeded after {deadline}s, and `kubectl rollout status` then fails; set its spec.progressDeadlineSeconds to {} or more",
                    held + 60
                ));
            }
            if at("/spec/strategy/type") == Some(&Value::from("Recreate")) {
                validation.error(format!("{name} has strategy Recreate, which deletes all stable pods before the new version starts; set its spec.strategy.type to RollingUpdate, with maxSurge 1 and maxUnavailable 0"));
            }
            let surge = at("/spec/strategy/rollingUpdate/maxSurge");
            if surge == Some(&Value::from(0)) || surge == Some(&Value::from("0%")) {
                validation.warn(format!("{name} has maxSurge 0, so the first pod of the new version replaces a stable pod; set maxSurge to 1 or more"));
            }
            let most = surge_weight(spec, target);
            if spec.capacity.keep_stable && spec.steps.iter().any(|step| step.weight.unwrap_or(0) > most) {
                validation.warn(format!(
                    "spec.capacity.keepStable: the surge pods of {name} can carry {most}%, but a step has a higher weight, which will not be set; increase its maxSurge or lower the weights"
                ));
            }
            let unavailable = at("/spec/strategy/rollingUpdate/maxUnavailable");
            if unavailable != Some(&Value::from(0)) && unavailable != Some(&Value::from("0%")) && unavailable.is_some() {
                validation.warn(format!("{name} has maxUnavailable above 0, so stable pods may be deleted while pods of the new version are not ready yet; set maxUnavailable to 0"));
            }
        }
        WorkloadKind::StatefulSet if at("/spec/replicas").and_then(Value::as_u64).unwrap_or(1) <= 1 => {
            validation.warn(format!(
                "{name} has one replica, so the new version replaces the only stable pod and cannot be compared with it; use 2 replicas or more"
            ));
        }
        WorkloadKind::StatefulSet => validation.warn(format!(
            "{name} has no surge because it is a StatefulSet, so the pod with the highest ordinal is replaced, and stays unready until the rollout gives it traffic"
        )),
        WorkloadKind::DaemonSet => {
            let surge = at("/spec/updateStrategy/rollingUpdate/maxSurge");
            if surge.is_none() || surge == Some(&Value::from(0)) {
                validation.warn(format!("{name} has no maxSurge, so each pod of the new version replaces the stable pod of its node; set spec.updateStrategy.rollingUpdate.maxSurge to 1"));
            }
        }
    }
    let managed = at("/metadata/labels/app.kubernetes.io~1managed-by").and_then(Value::as_str);
    let by_helm = managed == Some("Helm");
    let by_flux = at("/metadata/labels/kustomize.toolkit.fluxcd.io~1name").is_some()
        || at("/metadata/labels/helm.toolkit.fluxcd.io~1name").is_some();
    let by_argo = at("/metadata/annotations/argocd.argoproj.io~1tracking-id").is_some();
    for (owner, owns) in [("Helm", by_helm), ("Flux", by_flux), ("Argo CD", by_argo)] {
        if owns && owner != "Helm" && spec.on_failure == OnFailure::Undo {
            validation.warn(format!("{name} is managed by {owner}, which re-applies the version that onFailure: Undo removes; that revision then gets no traffic until tulle.dev/action=retry@ID; use onFailure: Hold and revert in the repository"));
        }
        if owns && seconds(spec) > 300 {
            validation.warn(format!("{name} is managed by {owner}, and the steps take more than 5 minutes, so a shorter wait (--atomic, --rollback-on-failure, health checks) restores the old version; set a longer timeout or do not wait"));
        }
    }
}

/// The highest weight that the surge pods of a Deployment can carry, in percent.
fn surge_weight(spec: &CanarySpec, target: &Value) -> u8 {
    let replicas = target.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1).max(1) as f64;
    let surge = match target.pointer("/spec/strategy/rollingUpdate/maxSurge") {
        Some(Value::Number(pods)) => pods.as_f64().unwrap_or(0.0),
        Some(Value::String(text)) => {
            let percent: f64 = text.trim_end_matches('%').parse().unwrap_or(25.0);
            (replicas * percent / 100.0).ceil()
        }
        _ => (replicas * 0.25).ceil(),
    };
    (surge / (replicas * spec.capacity.headroom) * 100.0).clamp(0.0, 100.0) as u8
}

/// Total duration of the steps. A pause counts as one hour, the time that a user may take.
fn seconds(spec: &CanarySpec) -> u64 {
    if spec.steps.is_empty() {
        return 5 * 120;
    }
    let hold = |step: &tulle_crds::Step| match (&step.pause, &step.hold) {
        (Some(_), _) => 3600,
        (None, Some(hold)) => parse_duration(hold).map_or(0, |hold| hold.as_secs()),
        (None, None) => 120,
    };
    spec.steps.iter().map(hold).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn canary_of(spec: Value) -> Canary {
        serde_json::from_value(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": spec})).unwrap()
    }

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

    #[test]
    fn holds_longer_than_the_progress_deadline_are_warned_about_with_the_value_to_set() {
        let canary = canary_of(
            json!({"target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 5, "hold": "20m"}]}),
        );
        let target = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}, "spec": {"strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}}});
        let validation = super::canary(&canary, &[], Some(&target));
        assert!(validation.errors.is_empty());
        assert!(
            validation.warnings[0].contains("progressDeadlineSeconds to 1260 or more"),
            "{:?}",
            validation.warnings
        );
        assert!(validation.warnings[1].contains("managed by Helm"), "{:?}", validation.warnings);
    }

    #[test]
    fn times_and_limits_that_cannot_work_are_rejected_with_what_to_write() {
        let target = json!({"kind": "Deployment", "name": "web"});
        for (field, spec, expected) in [
            ("spec.deadline", json!({"deadline": "0s"}), "write for example 24h"),
            ("spec.deadline", json!({"deadline": "0h0m"}), "write for example 24h"),
            ("spec.deadline", json!({"deadline": "30m1h"}), "for example 90s, 5m or 1h30m"),
            ("spec.judge.confidence", json!({"judge": {"confidence": "0%"}}), "write for example 99%"),
            ("spec.judge.confidence", json!({"judge": {"confidence": "100%"}}), "write for example 99%"),
            ("spec.judge.confidence", json!({"judge": {"confidence": "101%"}}), "for example 99% or 99.5%"),
            ("spec.steps[0].weight", json!({"steps": [{"weight": 0}]}), "from 1 to 100"),
            ("spec.steps[0].hold", json!({"steps": [{"weight": 5, "hold": "5 minutes"}]}), "1h30m"),
        ] {
            let mut all = json!({"target": target});
            all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            let errors = canary(&canary_of(all), &[], None).errors;
            assert_eq!(errors.len(), 1, "{spec}: {errors:?}");
            assert!(errors[0].starts_with(field) && errors[0].contains(expected), "{spec}: {errors:?}");
        }
        let accepted = json!({"target": target, "deadline": "1h30m", "judge": {"confidence": "99.9%"},
            "steps": [{"weight": 1, "hold": "0s"}, {"weight": 100, "hold": "1d12h"}]});
        assert_eq!(canary(&canary_of(accepted), &[], None).errors, Vec::<String>::new());
    }

    #[test]
    fn a_deployment_with_strategy_recreate_cannot_have_a_canary() {
        let canary = canary_of(json!({"target": {"kind": "Deployment", "name": "web"}}));
        let target = json!({"spec": {"strategy": {"type": "Recreate"}}});
        let validation = super::canary(&canary, &[], Some(&target));
        assert!(validation.errors[0].contains("RollingUpdate"), "{:?}", validation.errors);
    }

    #[test]
    fn a_second_canary_for_a_workload_is_rejected() {
        let canary = canary_of(json!({"target": {"kind": "Deployment", "name": "web"}}));
        let validation = super::canary(&canary, &["other".to_owned()], None);
        assert_eq!(
            validation.errors,
            [
                "Canary other already has this target, and a workload can have only one Canary; delete one of the two"
            ]
        );
    }

    #[test]
    fn a_canary_whose_target_hinders_it_is_accepted_with_a_warning() {
        let set = canary_of(json!({"target": {"kind": "StatefulSet", "name": "db"}}));
        let warnings = canary(&set, &[], Some(&json!({"spec": {"replicas": 1}}))).warnings;
        assert!(warnings.iter().any(|warning| warning.contains("has one replica")), "{warnings:?}");
        let kept = json!({"target": {"kind": "Deployment", "name": "web"}, "capacity": {"keepStable": true},
            "steps": [{"weight": 20}, {"weight": 50}]});
        for (surge, warned) in
            [(json!(2), true), (json!("25%"), true), (json!(5), false), (json!("50%"), false)]
        {
            let web = json!({"spec": {"replicas": 10, "strategy": {"rollingUpdate": {"maxSurge": surge}}}});
            let warnings = canary(&canary_of(kept.clone()), &[], Some(&web)).warnings;
            assert_eq!(
                warnings.iter().any(|warning| warning.contains("surge pods of")),
                warned,
                "{surge}: {warnings:?}"
            );
        }
        let undone = canary_of(json!({"target": {"kind": "Deployment", "name": "web"}, "onFailure": "Undo"}));
        let flux = json!({"metadata": {"labels": {"kustomize.toolkit.fluxcd.io/name": "apps"}}, "spec": {}});
        let warnings = canary(&undone, &[], Some(&flux)).warnings;
        assert!(warnings.iter().any(|warning| warning.contains("re-applies")), "{warnings:?}");
        for (text, warned) in
            [("promote@7", false), ("promote", true), ("promotes@7", true), ("retry@", true)]
        {
            let object = json!({"metadata": {"annotations": {"tulle.dev/action": text}}});
            assert_eq!(action(&object).warnings.len(), usize::from(warned), "{text}");
        }
    }
}
