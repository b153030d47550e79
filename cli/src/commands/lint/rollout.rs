//! What a Canary's schema cannot check.

use tulle_crds::{Canary, CanarySpec, Judge, OnFailure, Step, WorkloadKind, parse_duration, parse_percent};

use super::rules::{CONTRADICTION, Found, INVALID_VALUE, STEPS};

/// What is wrong with a Canary.
pub(super) fn check(canary: &Canary) -> Vec<Found> {
    let spec = &canary.spec;
    let mut found = Vec::new();
    match parse_duration(&spec.deadline) {
        Err(error) => invalid(&mut found, "spec.deadline", &error.to_string()),
        Ok(deadline) if deadline.is_zero() => {
            invalid(&mut found, "spec.deadline", "0s fails every rollout at once; write for example 24h");
        }
        Ok(_) => {}
    }
    check_judge(&spec.judge, &mut found);
    for (index, step) in spec.steps.iter().enumerate() {
        let has_match = spec.steps.iter().take(index).any(|step| !step.match_.is_empty());
        check_step(step, &format!("spec.steps[{index}]"), has_match, &mut found);
    }
    let weights: Vec<u8> = spec.steps.iter().filter_map(|step| step.weight).collect();
    if weights.windows(2).any(|pair| pair.first() >= pair.last()) {
        let message = "spec.steps: a weight is not higher than the one before it, so the share does not grow";
        found.push(Found::new(STEPS, message).hint("write increasing weights"));
    }
    if spec.on_failure == OnFailure::Undo && spec.target.kind != WorkloadKind::Deployment {
        let message =
            format!("spec.onFailure: Undo works for Deployments only, not for a {}", spec.target.kind.name());
        found.push(Found::new(CONTRADICTION, message).hint("write onFailure: Hold"));
    }
    check_sticky(spec, &mut found);
    found
}

fn invalid(found: &mut Vec<Found>, path: &str, why: &str) {
    found.push(Found::new(INVALID_VALUE, format!("{path}: {why}")));
}

fn check_judge(judge: &Judge, found: &mut Vec<Found>) {
    match parse_percent(&judge.confidence) {
        Err(error) => invalid(found, "spec.judge.confidence", &error.to_string()),
        Ok(share) if share <= 0.0 || share >= 1.0 => {
            invalid(found, "spec.judge.confidence", "must be above 0% and below 100%; write for example 99%");
        }
        Ok(_) => {}
    }
    if let Err(error) = parse_duration(&judge.warm_up) {
        invalid(found, "spec.judge.warmUp", &error.to_string());
    }
    match judge.objectives.p99.as_deref().map(parse_duration) {
        Some(Err(error)) => invalid(found, "spec.judge.objectives.p99", &error.to_string()),
        Some(Ok(limit)) if limit.is_zero() => {
            invalid(found, "spec.judge.objectives.p99", "must be longer than 0s; write for example 300ms");
        }
        Some(Ok(_)) | None => {}
    }
    let worse_by = judge.latency.worse_by;
    if worse_by != 0.0 && worse_by < 1.0 {
        invalid(found, "spec.judge.latency.worseBy", "must be at least 1, or 0 to leave latency out");
    }
    let quantile = judge.latency.quantile.strip_prefix('p').and_then(|number| number.parse::<f64>().ok());
    if !quantile.is_some_and(|quantile| quantile > 0.0 && quantile < 100.0) {
        let why = format!("invalid quantile {:?}; write for example p99", judge.latency.quantile);
        invalid(found, "spec.judge.latency.quantile", &why);
    }
}

fn check_step(step: &Step, path: &str, has_match: bool, found: &mut Vec<Found>) {
    let kinds = [!step.match_.is_empty(), step.mirror.is_some(), step.weight.is_some(), step.pause.is_some()];
    if kinds.into_iter().filter(|is_set| *is_set).count() != 1 {
        let message = format!("{path}: a step has exactly one of match, mirror, weight and pause");
        found.push(Found::new(CONTRADICTION, message).hint("write for example {weight: 5, hold: 2m}"));
    }
    if step.pause.is_some() && step.hold.is_some() {
        let message = format!("{path}: a pause has no hold, because it lasts until it is resumed");
        found.push(Found::new(CONTRADICTION, message).hint("for a step that ends by itself, write a weight"));
    }
    if let Some(Err(error)) = step.hold.as_deref().map(parse_duration) {
        invalid(found, &format!("{path}.hold"), &error.to_string());
    }
    if step.weight == Some(0) && !has_match {
        let message =
            format!("{path}.weight: 0 gives the new version nothing, unless a step before has a match");
        found.push(Found::new(INVALID_VALUE, message).hint("to wait without traffic, write {pause: {}}"));
    }
    for (index, entry) in step.match_.iter().enumerate() {
        if entry.header.is_some() == entry.cookie.is_some() {
            let message = format!("{path}.match[{index}]: write either header or cookie");
            let hint = "write for example {header: {name: x-group, exact: insider}}";
            found.push(Found::new(CONTRADICTION, message).hint(hint));
        }
        for named in [&entry.header, &entry.cookie].into_iter().flatten() {
            if !is_token(&named.name) {
                let why = format!("{:?} cannot be the name of a header or cookie", named.name);
                invalid(found, &format!("{path}.match[{index}]"), &why);
            }
        }
    }
}

fn check_sticky(spec: &CanarySpec, found: &mut Vec<Found>) {
    let Some(sticky) = &spec.sticky else { return };
    if !is_token(&sticky.cookie) {
        let why =
            format!("{:?} cannot be the name of a cookie; write for example tulle-version", sticky.cookie);
        invalid(found, "spec.sticky.cookie", &why);
    }
    let mut matched =
        spec.steps.iter().flat_map(|step| &step.match_).filter_map(|entry| entry.cookie.as_ref());
    if matched.any(|cookie| cookie.name == sticky.cookie) {
        let message =
            format!("spec.sticky.cookie: a match uses {} too, and sticky overwrites it", sticky.cookie);
        found.push(Found::new(CONTRADICTION, message).hint("choose another name"));
    }
}

/// A name as HTTP allows it for headers and cookies (RFC 9110 §5.6.2).
fn is_token(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
    !name.is_empty() && name.chars().all(allowed)
}
