//! What the API server says about objects, by a dry run of each, and whether their targets and callers exist.

use std::collections::{BTreeMap, BTreeSet};

use kube::Client;
use kube::api::{ListParams, Patch, PatchParams};
use kube::core::Request;
use serde_json::Value;
use tulle_crds::{CanaryTarget, PolicyTarget, TargetKind};

use super::read::Document;
use super::routes;
use super::rules::{ADMISSION_WARNING, Finding, NO_CALLER, NOT_IN_CLUSTER, REJECTED};
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
        let own = document.namespace(namespace);
        let target = |field: &str| objects::text(&document.value, &format!("/spec/target/{field}"));
        let is_made = has(documents, namespace, target("kind"), own, target("name"));
        if !is_made && let Some(absent) = absent_target(client, document, own).await? {
            add(NOT_IN_CLUSTER, absent);
        }
        let mut callers = callers(document, own);
        callers.retain(|caller, _| {
            !has(documents, namespace, objects::SERVICE_ACCOUNT.kind, &caller.namespace, &caller.account)
        });
        for absent in absent_callers(client, callers).await {
            add(NO_CALLER, absent);
        }
    }
    findings.extend(shared_rules(client, documents, namespace).await);
    Ok(())
}

/// Rules that a route of the cluster has too. Without a kind of route in the cluster, or without the right to list it,
/// nothing is found.
async fn shared_rules(client: &Client, documents: &[Document], namespace: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for kind in [objects::HTTP_ROUTE, objects::GRPC_ROUTE] {
        let of_kind = documents.iter().filter(|document| {
            document.kind() == kind.kind && document.api_version().starts_with(routes::GROUP)
        });
        let namespaces: BTreeSet<&str> = of_kind.map(|route| route.namespace(namespace)).collect();
        for place in namespaces {
            let Ok(stored) = objects::list(client, kind, Some(place), None).await else { continue };
            let stored = stored.into_iter().map(|value| Document { file: String::new(), value });
            let stored: Vec<Document> = stored.collect();
            findings.extend(routes::beside(documents, &stored, namespace));
        }
    }
    findings
}

/// Whether the files have an object, which exists in the cluster as soon as they are applied. Documents without a namespace
/// are in `default`.
pub(super) fn has(documents: &[Document], default: &str, kind: &str, namespace: &str, name: &str) -> bool {
    documents.iter().any(|document| {
        (document.kind(), document.namespace(default), document.name()) == (kind, namespace, name)
    })
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

/// A sentence for each service account that a rule names and that does not exist. One that the user may not read is taken to
/// exist.
async fn absent_callers(client: &Client, callers: BTreeMap<Caller, String>) -> Vec<String> {
    let mut sentences = Vec::new();
    for (caller, place) in callers {
        let Caller { namespace, account } = &caller;
        let found = objects::get(client, objects::SERVICE_ACCOUNT, Some(namespace.as_str()), account).await;
        if matches!(found, Ok(None)) {
            sentences.push(format!(
                "{place}.serviceAccount: ServiceAccount {namespace}/{account} does not exist in the cluster"
            ));
        }
    }
    sentences
}

/// A service account that rules name.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Caller {
    pub(super) namespace: String,
    pub(super) account: String,
}

/// The service accounts that the rules of a policy name, each with the first place. Where a rule has labels of namespaces,
/// the account may be in any of these namespaces.
pub(super) fn callers(document: &Document, namespace: &str) -> BTreeMap<Caller, String> {
    let mut found = BTreeMap::new();
    if document.kind() != "MeshPolicy" {
        return found;
    }
    for list in ["allow", "deny"] {
        let rules = objects::items(&document.value, &format!("/spec/access/{list}")).iter().enumerate();
        for (rule, from) in rules.map(|(rule, value)| (rule, objects::items(value, "/from"))) {
            for (index, caller) in from.iter().enumerate() {
                let account = objects::text(caller, "/serviceAccount");
                if account.is_empty() || caller.get("namespaceLabels").is_some() {
                    continue;
                }
                let namespace = match objects::text(caller, "/namespace") {
                    "" => namespace,
                    named => named,
                };
                let caller = Caller { namespace: namespace.to_owned(), account: account.to_owned() };
                let place = format!("spec.access.{list}[{rule}].from[{index}]");
                found.entry(caller).or_insert(place);
            }
        }
    }
    found
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
