//! What a MeshPolicy's schema cannot check: values by the validators that webhook and operator use, fields that go
//! together, and sections that change nothing.

use std::net::IpAddr;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tulle_crds::{
    AccessSpec, Caller, FaultsSpec, MeshPolicySpec, Operation, PolicyTarget, TargetKind, ZonePolicy,
};
use tulle_mesh::policy::Glob;

use super::rules::{CONTRADICTION, Found, INVALID_VALUE, NO_EFFECT, RISKY};

/// Faults end at most this long after the policy is applied.
const FAULTS_FOR: SignedDuration = SignedDuration::from_hours(24);

/// What is wrong with a policy.
pub(super) fn check(spec: &MeshPolicySpec, now: Timestamp) -> Vec<Found> {
    let mut found = Vec::new();
    target(&spec.target, &mut found);
    // The message begins with the field, and says what to write.
    let values = spec.invalid_values();
    found.extend(values.iter().map(|invalid| Found::new(INVALID_VALUE, invalid.to_string())));
    if let Some(access) = &spec.access {
        check_access(access, &mut found);
    }
    empty_sections(spec, &mut found);
    calls(spec, &mut found);
    if let Some(faults) = &spec.faults {
        check_faults(faults, now, &mut found);
    }
    found
}

fn target(target: &PolicyTarget, found: &mut Vec<Found>) {
    let mut wrong = |message: &str, hint: &str| found.push(Found::new(CONTRADICTION, message).hint(hint));
    match (target.kind, target.name.is_some(), target.selector.is_some()) {
        (TargetKind::Service, true, false)
        | (TargetKind::Workload, false, true)
        | (TargetKind::Namespace, false, false) => {}
        (TargetKind::Service, false, _) => {
            wrong("spec.target.name is missing: a Service is targeted by name", "add target.name");
        }
        (TargetKind::Service, true, true) => wrong(
            "spec.target.selector: a Service is targeted by name only",
            "leave selector out, or write kind: Workload to select pods by labels",
        ),
        (TargetKind::Workload, true, _) => wrong(
            "spec.target.name: a Workload is targeted by selector only",
            "leave name out, or write kind: Service to target a Service by name",
        ),
        (TargetKind::Workload, false, false) => {
            wrong(
                "spec.target.selector is missing: a Workload is targeted by labels",
                "add selector.matchLabels",
            );
        }
        (TargetKind::Namespace, _, _) => wrong(
            "spec.target: a Namespace target is the policy's own namespace",
            "leave name and selector out",
        ),
    }
}

fn check_access(access: &AccessSpec, found: &mut Vec<Found>) {
    if access.allow.is_none() && access.deny.is_none() {
        let message = "spec.access has neither allow nor deny";
        found.push(Found::new(CONTRADICTION, message).hint("leave access out to allow every caller"));
    }
    for (list, rules) in [("allow", &access.allow), ("deny", &access.deny)] {
        for (index, rule) in rules.iter().flatten().enumerate() {
            let path = format!("spec.access.{list}[{index}]");
            rule.from.iter().for_each(|caller| check_caller(caller, &path, found));
            rule.to.iter().for_each(|operation| check_operation(operation, &path, list, found));
        }
    }
}

fn check_caller(caller: &Caller, path: &str, found: &mut Vec<Found>) {
    let named =
        [caller.service_account.is_some(), caller.namespace.is_some(), caller.namespace_labels.is_some()];
    let has_name = named.contains(&true);
    if !has_name && caller.cidr.is_none() {
        let message =
            format!("{path}.from: a caller needs serviceAccount, namespace, namespaceLabels or cidr");
        found.push(Found::new(CONTRADICTION, message));
    }
    if has_name && caller.cidr.is_some() {
        let message =
            format!("{path}.from: cidr cannot be combined with names, because it is for other callers");
        found.push(Found::new(CONTRADICTION, message).hint("write a separate caller for the cidr"));
    }
    if caller.namespace.is_some() && caller.namespace_labels.is_some() {
        let message = format!("{path}.from: use either namespace or namespaceLabels");
        found.push(Found::new(CONTRADICTION, message));
    }
    if let Some(cidr) = caller.cidr.as_deref().filter(|cidr| !is_range(cidr)) {
        let message =
            format!("{path}.from: invalid CIDR {cidr:?}; write for example 10.1.0.0/16 or fd00::/8");
        found.push(Found::new(INVALID_VALUE, message));
    }
}

/// An address and a prefix length that its family has.
fn is_range(cidr: &str) -> bool {
    let Some((address, length)) = cidr.split_once('/') else { return false };
    let longest = match address.parse() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    // `parse` takes a sign too.
    length.bytes().all(|byte| byte.is_ascii_digit())
        && length.parse::<u8>().is_ok_and(|length| length <= longest)
}

fn check_operation(operation: &Operation, path: &str, list: &str, found: &mut Vec<Found>) {
    if operation.methods.is_none() && operation.paths.is_none() && operation.ports.is_none() {
        let message = format!("{path}.to: an operation needs methods, paths or ports");
        found.push(Found::new(CONTRADICTION, message).hint("leave to out to mean every operation"));
    }
    for method in operation.methods.iter().flatten() {
        if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
            let message =
                format!("{path}.to.methods: invalid method {method:?}; write it in upper case, as GET");
            found.push(Found::new(INVALID_VALUE, message));
        }
    }
    for glob in operation.paths.iter().flatten() {
        if let Err(error) = Glob::compile(glob) {
            found.push(Found::new(INVALID_VALUE, format!("{path}.to.paths: {error}")));
        }
        if list == "deny" {
            let message =
                format!("{path}.to.paths denies {glob} and no other path that leads to the same resource");
            found.push(Found::new(RISKY, message).hint("list in allow what may be called"));
        }
    }
}

/// Sections that are written and say nothing.
fn empty_sections(spec: &MeshPolicySpec, found: &mut Vec<Found>) {
    let empty = [
        (
            spec.limits
                .as_ref()
                .is_some_and(|limits| limits.concurrency.is_none() && limits.connections.is_none()),
            "spec.limits needs concurrency or connections; write for example {concurrency: 64}",
        ),
        (
            spec.timeout.as_ref().is_some_and(|timeout| {
                timeout.request.is_none() && timeout.attempt.is_none() && timeout.idle.is_none()
            }),
            "spec.timeout needs request, attempt or idle; write for example {request: 2s}",
        ),
        (
            spec.faults.as_ref().is_some_and(|faults| faults.delay.is_none() && faults.abort.is_none()),
            "spec.faults needs delay or abort; write for example {delay: {by: 200ms, of: 5%}}",
        ),
    ];
    found.extend(
        empty
            .into_iter()
            .filter(|(is_empty, _)| *is_empty)
            .map(|(_, message)| Found::new(CONTRADICTION, message)),
    );
    if spec.pod_sections().is_empty() && spec.call_sections().is_empty() {
        found.push(Found::new(NO_EFFECT, "the policy has no section, so it changes nothing"));
    }
}

fn calls(spec: &MeshPolicySpec, found: &mut Vec<Found>) {
    let sections = spec.call_sections();
    if spec.target.kind == TargetKind::Workload && !sections.is_empty() {
        let message = format!(
            "spec.target: {} {} no effect on a Workload, because calls are made to Services",
            sections.join(", "),
            if sections.len() == 1 { "has" } else { "have" }
        );
        found.push(Found::new(NO_EFFECT, message).hint("target a Service for them"));
    }
    if spec.balance.as_ref().is_some_and(|balance| balance.zone == Some(ZonePolicy::Only)) {
        let message = "spec.balance.zone: Only fails every request from a zone without a ready pod";
        found.push(Found::new(RISKY, message).hint("write Prefer to use other zones then"));
    }
    let is_wide = spec.target.kind == TargetKind::Namespace && spec.limits.is_some();
    if is_wide {
        let message = "spec.limits holds for each pod of the namespace by itself, whatever it is";
        found.push(Found::new(RISKY, message).hint("target a Service or Workload to set it for one"));
    }
}

fn check_faults(faults: &FaultsSpec, now: Timestamp, found: &mut Vec<Found>) {
    let until = faults.until.0;
    let latest = now.checked_add(FAULTS_FOR).unwrap_or(Timestamp::MAX);
    if until > latest {
        let message = format!("spec.faults.until: {until} is more than 24 hours ahead");
        found.push(Found::new(INVALID_VALUE, message).hint(format!("write a time up to {latest:.0}")));
    } else if until <= now {
        let message = format!("spec.faults.until: {until} has passed, so there are no faults");
        found.push(Found::new(NO_EFFECT, message));
    }
}
