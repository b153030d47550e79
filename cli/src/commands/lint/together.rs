//! What is wrong with objects only beside others: two that contradict each other, and targets that are not there.

use serde_json::Value;
use tulle_crds::{Effect, Hindrance, WorkloadKind, hindrances};

use super::read::Document;
use super::rules::{CONFLICT, Finding, HINDERED, NO_TARGET, RISKY, SECOND_CANARY, UNJUDGED};
use crate::objects;

/// Kinds whose templates have pods.
const WORKLOADS: [&str; 6] = ["Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "Pod"];
/// The parts of a policy's spec that say what it applies to and how, not what it sets.
const NOT_SECTIONS: [&str; 2] = ["target", "mode"];

/// Looks at all objects at once. Those without a namespace are in `namespace`.
pub(super) fn check(documents: &[Document], namespace: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, document) in documents.iter().enumerate().filter(|(_, document)| document.is_tulle()) {
        let before = documents.iter().take(index).filter(|other| {
            other.is_tulle()
                && other.kind() == document.kind()
                && other.namespace(namespace) == document.namespace(namespace)
                && other.name() != document.name()
                && target(other).is_some()
                && target(other) == target(document)
        });
        match document.kind() {
            "MeshPolicy" => findings.extend(before.filter_map(|other| conflict(document, other, namespace))),
            "Canary" => findings.extend(before.map(|other| {
                let message = format!("spec.target: Canary {} has the same target", other.name());
                let hint = "a workload can have one Canary: delete one of the two".to_owned();
                Finding::new(SECOND_CANARY, document, namespace, message, Some(hint))
            })),
            _ => {}
        }
        findings.extend(hindered(document, documents, namespace));
        findings.extend(absent(document, documents, namespace).map(|message| {
            let hint = "if it is applied from elsewhere, --with-cluster looks for it".to_owned();
            Finding::new(NO_TARGET, document, namespace, message, Some(hint))
        }));
    }
    findings.extend(documents.iter().filter_map(|document| groupless(document, namespace)));
    findings
}

/// What in the target of a Canary hinders its rollouts.
fn hindered(document: &Document, documents: &[Document], namespace: &str) -> Vec<Finding> {
    let target = target(document).filter(|_| document.kind() == "Canary");
    let field = |name: &str| target.and_then(|target| target.get(name)).and_then(Value::as_str);
    let (Some(kind), Some(name)) = (field("kind").and_then(WorkloadKind::named), field("name")) else {
        return Vec::new();
    };
    let is_target = |other: &&Document| {
        other.api_version().starts_with("apps/")
            && (other.kind(), other.name()) == (kind.name(), name)
            && other.namespace(namespace) == document.namespace(namespace)
    };
    let Some(workload) = documents.iter().find(is_target) else { return Vec::new() };
    let finding = |found: Hindrance| {
        // As at admission: another number of pods may mend what is so at present.
        let is_error = found.effect == Effect::Unjudged && !found.at_present;
        let rule = if is_error { UNJUDGED } else { HINDERED };
        let message = format!("Canary {} targets it, and it {}", document.name(), found.what);
        Finding::new(rule, workload, namespace, message, Some(found.remedy.to_owned()))
    };
    hindrances(kind, &workload.value).into_iter().map(finding).collect()
}

/// A route with a parent that is meant to be a Service, and is none.
fn groupless(document: &Document, namespace: &str) -> Option<Finding> {
    if !matches!(document.kind(), "HTTPRoute" | "GRPCRoute" | "TLSRoute" | "TCPRoute") {
        return None;
    }
    let mut parents = objects::items(&document.value, "/spec/parentRefs").iter();
    let index = parents.position(objects::is_service_without_group)?;
    let message = format!("spec.parentRefs[{index}]: kind Service without group \"\" names no Service");
    let hint = "write group: \"\"; without it the route has no effect".to_owned();
    Some(Finding::new(RISKY, document, namespace, message, Some(hint)))
}

fn target(document: &Document) -> Option<&Value> {
    document.value.pointer("/spec/target")
}

fn conflict(document: &Document, other: &Document, namespace: &str) -> Option<Finding> {
    let sections = |document: &'_ Document| -> Vec<String> {
        let spec = document.value.get("spec").and_then(Value::as_object);
        let names = spec.into_iter().flat_map(serde_json::Map::keys);
        names.filter(|name| !NOT_SECTIONS.contains(&name.as_str())).cloned().collect()
    };
    // A policy in Shadow is meant to stand beside the one that is enforced.
    if mode(document) != mode(other) {
        return None;
    }
    let theirs = sections(other);
    let both: Vec<String> = sections(document).into_iter().filter(|name| theirs.contains(name)).collect();
    if both.is_empty() {
        return None;
    }
    let message =
        format!("MeshPolicy {} has the same target, and sets {} too", other.name(), both.join(", "));
    let hint = "put them into one policy".to_owned();
    Some(Finding::new(CONFLICT, document, namespace, message, Some(hint)))
}

fn mode(document: &Document) -> &str {
    document.value.pointer("/spec/mode").and_then(Value::as_str).unwrap_or("Enforce")
}

/// A sentence where the files have objects of the target's kind in the namespace, and not the target.
fn absent(document: &Document, documents: &[Document], namespace: &str) -> Option<String> {
    let place = document.namespace(namespace);
    let target = target(document)?;
    let kind = target.get("kind").and_then(Value::as_str)?;
    let name = target.get("name").and_then(Value::as_str);
    let here = documents.iter().filter(|other| other.namespace(namespace) == place);
    match (document.kind(), kind) {
        ("MeshPolicy", "Workload") => {
            let wanted = target.pointer("/selector/matchLabels").and_then(Value::as_object)?;
            let workloads: Vec<&Document> = here.filter(|other| WORKLOADS.contains(&other.kind())).collect();
            let is_selected = |other: &Document| {
                let labels = labels(other).and_then(Value::as_object);
                wanted.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
            };
            let is_absent = !workloads.is_empty() && !workloads.iter().any(|other| is_selected(other));
            is_absent.then(|| "spec.target.selector selects the pods of no workload".to_owned())
        }
        ("MeshPolicy", "Service") | ("Canary", "Deployment" | "StatefulSet" | "DaemonSet") => {
            let name = name?;
            let others: Vec<&Document> = here.filter(|other| other.kind() == kind).collect();
            let is_absent = !others.is_empty() && !others.iter().any(|other| other.name() == name);
            is_absent.then(|| format!("spec.target: there is no {kind} {place}/{name}"))
        }
        _ => None,
    }
}

/// The labels of the pods of a workload.
fn labels(workload: &Document) -> Option<&Value> {
    let place = match workload.kind() {
        "Pod" => "/metadata/labels",
        "CronJob" => "/spec/jobTemplate/spec/template/metadata/labels",
        _ => "/spec/template/metadata/labels",
    };
    workload.value.pointer(place)
}
