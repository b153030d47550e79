//! What the API server says about objects, by a dry run of each, and whether their targets exist.

use kube::Client;
use kube::api::{ListParams, Patch, PatchParams};
use kube::core::Request;
use serde_json::Value;
use tulle_crds::{CanaryTarget, PolicyTarget, TargetKind};

use super::read::Document;
use super::rules::{ADMISSION_WARNING, Finding, NOT_IN_CLUSTER, REJECTED};
use crate::cluster::failure::cannot;
use crate::commands::inject::admission::{Answer, send};
use crate::exit::CliError;
use crate::objects::{self, Kind};

/// Asks about each of Tulle's objects, and adds what it finds. Nothing is changed.
///
/// # Errors
/// The API server cannot say about an object; what it said about those before is among the findings.
pub(super) async fn check(
    client: &Client,
    documents: &[Document],
    namespace: &str,
    findings: &mut Vec<Finding>,
) -> Result<(), CliError> {
    for document in documents.iter().filter(|document| document.is_tulle() && !document.name().is_empty()) {
        let Some(path) = path(document, namespace) else { continue };
        let mut add = |rule, message| {
            findings.push(Finding::new(rule, document, namespace, message, None));
        };
        match dry_run(client, &path, document).await? {
            Answer::Taken { warnings, .. } => {
                warnings.into_iter().for_each(|warning| add(ADMISSION_WARNING, warning));
            }
            Answer::Refused { message, warnings } => {
                add(REJECTED, message);
                warnings.into_iter().for_each(|warning| add(ADMISSION_WARNING, warning));
            }
        }
        if let Some(absent) = absent_target(client, document, document.namespace(namespace)).await? {
            add(NOT_IN_CLUSTER, absent);
        }
    }
    Ok(())
}

/// The path of a kind's objects.
fn path(document: &Document, namespace: &str) -> Option<String> {
    let group = format!("/apis/{}", document.api_version());
    let namespace = document.namespace(namespace);
    match document.kind() {
        "MeshPolicy" => Some(format!("{group}/namespaces/{namespace}/meshpolicies")),
        "Canary" => Some(format!("{group}/namespaces/{namespace}/canaries")),
        "MeshConfig" => Some(format!("{group}/meshconfigs")),
        _ => None,
    }
}

async fn dry_run(client: &Client, path: &str, document: &Document) -> Result<Answer, CliError> {
    let mut object = document.value.clone();
    if let Some(object) = object.as_object_mut() {
        object.remove("status");
    }
    let params = PatchParams::apply("tulle-lint").force().dry_run().validation_strict();
    let request = Request::new(path).patch(document.name(), &params, &Patch::Apply(&object));
    let request = request.map_err(|error| {
        CliError::failed(format!("cannot ask about {} {}: {error}", document.kind(), document.name()))
    })?;
    send(client, request).await
}

/// A sentence where the target does not exist.
async fn absent_target(
    client: &Client,
    document: &Document,
    namespace: &str,
) -> Result<Option<String>, CliError> {
    let target = document.value.pointer("/spec/target").cloned().unwrap_or(Value::Null);
    match document.kind() {
        "Canary" => match serde_json::from_value::<CanaryTarget>(target) {
            Ok(target) => absent(client, Kind::from(target.kind), namespace, &target.name).await,
            Err(_) => Ok(None),
        },
        "MeshPolicy" => match serde_json::from_value::<PolicyTarget>(target) {
            Ok(target) => absent_policy_target(client, namespace, &target).await,
            Err(_) => Ok(None),
        },
        _ => Ok(None),
    }
}

/// A sentence where an object that `spec.target` names does not exist.
async fn absent(
    client: &Client,
    kind: Kind,
    namespace: &str,
    name: &str,
) -> Result<Option<String>, CliError> {
    let found = kind.api(client, Some(namespace)).get_metadata_opt(name).await;
    let kind = kind.kind;
    let found = found.map_err(|error| cannot(&format!("read {kind} {namespace}/{name}"), &error))?;
    let absent = || format!("spec.target: there is no {kind} {namespace}/{name} in the cluster");
    Ok(found.is_none().then(absent))
}

async fn absent_policy_target(
    client: &Client,
    namespace: &str,
    target: &PolicyTarget,
) -> Result<Option<String>, CliError> {
    match (target.kind, &target.name, &target.selector) {
        (TargetKind::Service, Some(name), _) => absent(client, objects::SERVICE, namespace, name).await,
        (TargetKind::Workload, _, Some(selector)) => {
            let labels: Vec<String> =
                selector.match_labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            let labels = labels.join(",");
            let pods = objects::POD.api(client, Some(namespace));
            let found = pods.list_metadata(&ListParams::default().labels(&labels).limit(1)).await;
            let found = found.map_err(|error| cannot(&format!("list pods in {namespace}"), &error))?;
            let absent = || format!("spec.target: no pod in {namespace} has the labels {labels}");
            Ok(found.items.is_empty().then(absent))
        }
        _ => Ok(None),
    }
}
