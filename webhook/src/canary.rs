//! Validates a Canary, and warns about what around it would hinder its rollouts, also when the target changes later.
//!
//! In: a Canary that a user applies or deletes, and what the cluster has around it ([`Facts`]). Out: [`Validation`]. What can never
//! work is rejected; what makes a rollout slow, risky or confusing is a warning. Never reads the cluster and never
//! changes an object.

mod strategy;
#[cfg(test)]
mod tests;

use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use serde_json::Value;
use tulle_crds::{
    Canary, CanaryAction, CanarySpec, Effect, Judge, OnFailure, Step, WorkloadKind, hindrances, keys,
    parse_duration, parse_percent,
};

use crate::validate::Validation;

/// Hold of a step that does not set one.
const DEFAULT_HOLD: Duration = Duration::from_secs(120);
/// Number of steps of a Canary that does not set them.
const DEFAULT_STEPS: u32 = 5;
/// How long Helm and Flux's HelmRelease wait by default.
const DEPLOY_TOOL_TIMEOUT: Duration = Duration::from_secs(300);

/// What the cluster has around a Canary.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts<'a> {
    /// Names of other Canaries with the same target.
    pub siblings: &'a [String],
    /// The target.
    pub target: Target<'a>,
    /// Services of the Canary's namespace; none if they could not be read.
    pub services: &'a [Service],
}

/// The target of a Canary.
#[derive(Clone, Copy, Debug, Default)]
pub enum Target<'a> {
    /// It could not be read.
    #[default]
    Unknown,
    /// It does not exist.
    Absent,
    /// The workload.
    Found(&'a Value),
}

/// Validates a Canary.
pub fn validate(canary: &Canary, facts: &Facts<'_>) -> Validation {
    let mut validation = Validation::default();
    let spec = &canary.spec;
    check_times(spec, &mut validation);
    check_deadline(spec, &mut validation);
    check_judge(&spec.judge, &mut validation);
    check_warm_up(spec, &mut validation);
    let weights: Vec<u8> = spec.steps.iter().filter_map(|step| step.weight).collect();
    if weights.windows(2).any(|pair| pair.first() >= pair.last()) {
        validation.warn("spec.steps: a weight is not higher than the one before it, so the share of the new version does not grow; write increasing weights");
    }
    strategy::check(spec, &mut validation);
    if let Some(sibling) = facts.siblings.first() {
        validation.error(format!(
            "Canary {sibling} already has this target, and a workload can have only one Canary; delete one of the two"
        ));
    }
    if spec.on_failure == OnFailure::Undo {
        validation.warn("onFailure: Undo needs the overlay config/overlays/undo, which gives the operator the right to change Deployments; without it a failed version is kept without traffic, as with onFailure: Hold");
    }
    match facts.target {
        Target::Unknown => {}
        Target::Found(target) => {
            check_target(spec, target, &mut validation);
            check_injection(spec, target, &mut validation);
            check_manager(spec, target, &mut validation);
            check_services(spec, target, facts.services, &mut validation);
            strategy::check_services(spec, target, facts.services, &mut validation);
        }
        Target::Absent => validation.warn(format!(
            "there is no {} yet; the Canary takes effect when that workload is created",
            name_of(spec)
        )),
    }
    validation
}

/// Warns about an invalid action annotation.
pub fn action(object: &Value) -> Validation {
    let mut validation = Validation::default();
    let annotations = object.pointer("/metadata/annotations");
    let action = annotations.and_then(|all| all.get(keys::ACTION)).and_then(Value::as_str);
    if let Some(text) = action.filter(|text| CanaryAction::parse(text).is_none()) {
        validation.warn(format!(
            "{}={text} has no effect because it is invalid; write promote, abort, pause, resume or retry, then @ and an id that was not used before, for example promote@1, or promote:REVISION@1 to act on that revision only",
            keys::ACTION
        ));
    }
    validation
}

/// Warns about the deletion of a Canary whose version has not been approved. Without an error, because a deletion is never
/// refused.
pub fn deletion(canary: &Value) -> Validation {
    let mut validation = Validation::default();
    let text = |path: &str| canary.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let state = match text("/status/phase") {
        "Progressing" | "Paused" => "was on trial",
        "Failed" => "has failed",
        _ => return validation,
    };
    let (kind, target) = (text("/spec/target/kind"), text("/spec/target/name"));
    validation.warn(format!(
        "revision {} of {kind} {target} {state}, and without Canary {} nothing holds its pods back: it gets all traffic unjudged; kubectl -n {} rollout undo {}/{target} restores the version before it",
        text("/status/canaryRevision"),
        text("/metadata/name"),
        text("/metadata/namespace"),
        kind.to_lowercase()
    ));
    validation
}

fn name_of(spec: &CanarySpec) -> String {
    format!("{} {}", spec.target.kind.name(), spec.target.name)
}

/// The limits of `weight` and `deadline` are in the schema too. They are repeated because the schema in the cluster
/// may be older than this webhook. The same is true of those in [`check_judge`].
fn check_times(spec: &CanarySpec, validation: &mut Validation) {
    match parse_duration(&spec.deadline) {
        Err(error) => validation.error(format!("spec.deadline: {error}")),
        Ok(deadline) if deadline.is_zero() => validation.error(format!(
            "spec.deadline: {} fails every rollout at once; write for example 24h",
            spec.deadline
        )),
        Ok(_) => {}
    }
    for (index, step) in spec.steps.iter().enumerate() {
        // Insiders keep the new version in a step with a weight of 0.
        let has_match = spec.steps.iter().take(index).any(|step| !step.match_.is_empty());
        if step.weight == Some(0) && !has_match {
            validation.error(format!(
                "spec.steps[{index}].weight must be from 1 to 100, or 0 after a step with match; to keep the new version without traffic, write {{pause: {{}}}} as the first step"
            ));
        }
        if let Some(Err(error)) = step.hold.as_deref().map(parse_duration) {
            validation.error(format!("spec.steps[{index}].hold: {error}"));
        }
    }
}

/// A rollout cannot end before the holds of its steps have.
fn check_deadline(spec: &CanarySpec, validation: &mut Validation) {
    let Ok(deadline) = parse_duration(&spec.deadline) else { return };
    let holds = StepTime::of(spec).holds;
    // A deadline of nothing is an error of its own.
    if deadline.is_zero() || holds < deadline {
        return;
    }
    validation.warn(format!(
        "spec.deadline: the holds of the steps add up to {}, and the deadline is {}, so every rollout is late before its last step has ended, and judge.onInconclusive decides one that has no verdict by then; write a longer deadline or shorter holds",
        written(holds),
        spec.deadline
    ));
}

/// A duration as users write it, such as 1h30m.
fn written(duration: Duration) -> String {
    let mut rest = duration.as_millis();
    let mut text = String::new();
    for (unit, millis) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
        let count = rest / millis;
        rest %= millis;
        if count > 0 {
            text.push_str(&count.to_string());
            text.push_str(unit);
        }
    }
    if text.is_empty() { "0s".to_owned() } else { text }
}

fn check_judge(judge: &Judge, validation: &mut Validation) {
    match parse_percent(&judge.confidence) {
        Err(error) => validation.error(format!("spec.judge.confidence: {error}")),
        Ok(share) if share <= 0.0 || share >= 1.0 => validation.error(format!(
            "spec.judge.confidence: {} must be above 0% and below 100%; write for example 99%",
            judge.confidence
        )),
        Ok(_) => {}
    }
    let worse_by = judge.latency.worse_by;
    if worse_by != 0.0 && worse_by < 1.0 {
        validation.error(format!(
            "spec.judge.latency.worseBy: {worse_by} must be at least 1, or 0 to leave latency out; write for example 3"
        ));
    }
    match judge.objectives.p99.as_deref().map(parse_duration) {
        Some(Err(error)) => validation.error(format!("spec.judge.objectives.p99: {error}")),
        Some(Ok(limit)) if limit.is_zero() => {
            validation.error("spec.judge.objectives.p99: must be longer than 0s; write for example 300ms");
        }
        Some(Ok(_)) | None => {}
    }
    if let Err(error) = parse_duration(&judge.warm_up) {
        validation.error(format!("spec.judge.warmUp: {error}"));
    }
}

fn check_warm_up(spec: &CanarySpec, validation: &mut Validation) {
    let Ok(warm_up) = parse_duration(&spec.judge.warm_up) else { return };
    let shortest = spec.steps.iter().filter_map(hold_of).min();
    let shortest = shortest.or(spec.steps.is_empty().then_some(DEFAULT_HOLD));
    if let Some(shortest) = shortest.filter(|shortest| warm_up > *shortest) {
        validation.warn(format!(
            "spec.judge.warmUp: requests to a new pod are not judged for {}, which is longer than the shortest hold ({}), so nothing may be judged within that step; write a shorter warmUp or a longer hold",
            spec.judge.warm_up,
            written(shortest)
        ));
    }
}

/// How long a step lasts at least. None: it is a pause, which lasts until a user resumes the rollout.
fn hold_of(step: &Step) -> Option<Duration> {
    if step.pause.is_some() {
        return None;
    }
    // An invalid hold is an error of its own.
    Some(step.hold.as_deref().map_or(DEFAULT_HOLD, |hold| parse_duration(hold).unwrap_or_default()))
}

/// How long the steps take.
struct StepTime {
    /// The sum of the holds.
    holds: Duration,
    /// Whether there is a pause too, which can take any time.
    has_pause: bool,
}

impl StepTime {
    fn of(spec: &CanarySpec) -> Self {
        if spec.steps.is_empty() {
            return Self { holds: DEFAULT_HOLD * DEFAULT_STEPS, has_pause: false };
        }
        let holds = spec.steps.iter().filter_map(hold_of);
        Self {
            holds: holds.fold(Duration::ZERO, Duration::saturating_add),
            has_pause: spec.steps.iter().any(|step| step.pause.is_some()),
        }
    }
}

fn check_target(spec: &CanarySpec, target: &Value, validation: &mut Validation) {
    let name = name_of(spec);
    for found in hindrances(spec.target.kind, target) {
        let text = format!("{name} {found}");
        match found.effect {
            // An autoscaler may change the number of pods, and no strategy.
            Effect::Unjudged if !found.at_present => validation.error(text),
            _ => validation.warn(text),
        }
    }
    if spec.target.kind == WorkloadKind::Deployment {
        check_surge(spec, target, validation);
    }
}

/// Warnings about a workload that a Canary targets: the Canary may have been applied before it, and has only been
/// compared with what there was. What costs stable pods is said once, and what leaves a version unjudged with each.
pub fn workload(kind: WorkloadKind, workload: &Value, old: Option<&Value>) -> Vec<String> {
    let template = |of: &Value| of.pointer("/spec/template").cloned();
    let is_new_version = old.is_none_or(|old| template(old) != template(workload));
    let before = old.map(|old| hindrances(kind, old)).unwrap_or_default();
    let name = workload.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
    let found = hindrances(kind, workload).into_iter();
    let said =
        found.filter(|found| (is_new_version && found.effect != Effect::Costly) || !before.contains(found));
    said.map(|found| format!("{} {name} has a Canary, and {found}", kind.name())).collect()
}

/// The readiness gate that holds a new version back is injected with the sidecar.
fn check_injection(spec: &CanarySpec, target: &Value, validation: &mut Validation) {
    let label = target.pointer("/spec/template/metadata/labels").and_then(|all| all.get(keys::INJECT));
    let (why, remedy) = if label.and_then(Value::as_str) == Some("disabled") {
        // A namespace that is `required` gives it one all the same.
        (
            format!(
                "its pod template has the label {}: disabled (unless the namespace is required)",
                keys::INJECT
            ),
            "remove the label",
        )
    } else if target.pointer("/spec/template/spec/hostNetwork") == Some(&Value::Bool(true)) {
        ("its pods have hostNetwork: true".to_owned(), "remove hostNetwork")
    } else {
        return;
    };
    validation.warn(format!(
        "{} gets no sidecar because {why}, and without one its pods have no readiness gate: Kubernetes replaces all of them with the new version, whatever the steps say; {remedy}, or delete the Canary",
        name_of(spec)
    ));
}

/// Steps that need more pods than the surge, which are not set or cost stable pods.
fn check_surge(spec: &CanarySpec, target: &Value, validation: &mut Validation) {
    let name = name_of(spec);
    let most = surge_weight(spec, target);
    let weight = spec.steps.iter().filter_map(|step| step.weight).max().unwrap_or(0);
    if spec.capacity.keep_stable && weight > most {
        validation.warn(format!(
            "spec.capacity.keepStable: the surge pods of {name} can carry {most}%, but a step has a higher weight, which will not be set; increase its maxSurge (to 100% for a step with weight 100) or lower the weights"
        ));
    } else if weight == 100 && most < 100 {
        validation.warn(format!(
            "spec.steps: before the weight of 100 all stable pods of {name} but one are replaced, because its surge pods can carry {most}%; for blue/green, which keeps the old pods, set its maxSurge to 100% and spec.capacity.keepStable to true"
        ));
    }
    if let Some(needed) = strategy::most_with_copies(&spec.steps).filter(|needed| *needed > u32::from(most)) {
        validation.warn(format!(
            "spec.steps: the copies of a mirror step come on top of the weight, which needs pods for {needed}% of the traffic, and the surge pods of {name} can carry {most}%; the step is not set with fewer, because no stable pod is given up for copies; increase its maxSurge or lower mirror"
        ));
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

/// The tool that applies the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manager {
    Helm,
    Flux,
    ArgoCd,
}

impl Manager {
    /// Flux before Helm: what Flux installs from a chart has the labels of both.
    fn of(target: &Value) -> Option<Self> {
        let label = |key: &str| target.pointer("/metadata/labels")?.get(key)?.as_str();
        let annotation = |key: &str| target.pointer("/metadata/annotations")?.get(key)?.as_str();
        if label("kustomize.toolkit.fluxcd.io/name").or(label("helm.toolkit.fluxcd.io/name")).is_some() {
            Some(Self::Flux)
        } else if annotation("argocd.argoproj.io/tracking-id").is_some()
            || label("argocd.argoproj.io/instance").is_some()
        {
            Some(Self::ArgoCd)
        } else if label("app.kubernetes.io/managed-by") == Some("Helm")
            || annotation("meta.helm.sh/release-name").is_some()
        {
            Some(Self::Helm)
        } else {
            None
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Helm => "Helm",
            Self::Flux => "Flux",
            Self::ArgoCd => "Argo CD",
        }
    }

    /// What to do so that the tool does not take a rollout in progress for a failed one.
    fn advice(self) -> &'static str {
        match self {
            Self::Helm => {
                "which waits for 5 minutes by default when it waits: set helm --timeout to more than the steps take, and use neither --atomic nor --rollback-on-failure, which restore the old version"
            }
            Self::Flux => {
                "which waits for 5 minutes by default: set spec.timeout of its Kustomization or HelmRelease to more than the steps take, and use no spec.upgrade.remediation, which restores the old version"
            }
            Self::ArgoCd => {
                "which reports the application as Progressing until the promotion: let no sync wave and no `argocd app wait` with a shorter --timeout depend on it"
            }
        }
    }
}

fn check_manager(spec: &CanarySpec, target: &Value, validation: &mut Validation) {
    let Some(manager) = Manager::of(target) else { return };
    let (name, tool) = (name_of(spec), manager.name());
    if manager != Manager::Helm && spec.on_failure == OnFailure::Undo {
        validation.warn(format!("{name} is managed by {tool}, which re-applies the version that onFailure: Undo removes; that revision then gets no traffic until tulle.dev/action=retry@ID; use onFailure: Hold and revert in the repository"));
    }
    let steps = StepTime::of(spec);
    if steps.has_pause || steps.holds > DEPLOY_TOOL_TIMEOUT {
        validation.warn(format!(
            "the steps take more than 5 minutes, and {name} is managed by {tool}, {}",
            manager.advice()
        ));
    }
}

/// A Service can be split where clients dial its own address. Clients of a headless Service dial pods.
fn check_services(spec: &CanarySpec, target: &Value, services: &[Service], validation: &mut Validation) {
    let selecting: Vec<&Service> = services.iter().filter(|service| selects(service, target)).collect();
    let is_headless = |service: &&Service| {
        let address = service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref());
        address == Some("None")
    };
    if selecting.is_empty() || !selecting.iter().all(is_headless) {
        return;
    }
    let names: Vec<&str> = selecting.iter().filter_map(|service| service.metadata.name.as_deref()).collect();
    validation.warn(format!(
        "{} is selected by headless Services only ({}), so clients dial pods by address: the weight cannot be applied and the rollout holds at its first step; add a Service with a cluster address for the clients",
        name_of(spec),
        names.join(", ")
    ));
}

fn selects(service: &Service, target: &Value) -> bool {
    let Some(spec) = service.spec.as_ref() else { return false };
    let label = |key: &str| target.pointer("/spec/template/metadata/labels")?.get(key)?.as_str();
    // Kubernetes ignores the selector of an ExternalName Service, and one without a selector selects nothing.
    let mut selector = spec.selector.iter().flatten().peekable();
    spec.type_.as_deref() != Some("ExternalName")
        && selector.peek().is_some()
        && selector.all(|(key, value)| label(key) == Some(value.as_str()))
}
