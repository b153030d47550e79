//! Judges the facts. Pure: the same facts give the same findings. A check that cannot be made is a warning, and the
//! others go on.

mod control;
mod mesh;
mod setup;

use serde_json::Value;
use tulle_mesh::check::{Finding, Reader, View, or_ok, version};

use super::facts::Facts;
use super::finding::ReadRequest;
use crate::objects::{self, Read};

/// The hint where the operator would know.
const UNANSWERED: &str = "T0304 says why the operator did not answer";

/// What is judged, and how strictly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Before an installation: what an installation has is not looked for.
    pub pre: bool,
    /// A root certificate that ends within this many seconds is a warning.
    pub certs_within: i64,
}

/// Every finding, in the order of the checks.
pub fn judge(facts: &Facts, options: Options) -> Vec<Finding> {
    let mut findings = setup::judge(facts, options);
    if !options.pre {
        findings.extend(control::judge(facts, options));
        findings.extend(mesh::judge(facts));
    }
    findings.extend(setup::network(facts));
    findings
}

/// What the checks need that the operator's page makes too.
fn view(facts: &Facts) -> View<'_> {
    View { system: &facts.system, only: facts.namespace.as_deref(), now: facts.now, reader: Reader::Command }
}

/// What brings the installation to what this program installs, or to what a newer operator's program does.
///
/// Never a pipe: it would not know the registry, the version and the manager of what is installed.
fn repair(facts: &Facts) -> String {
    let installed = facts.deployments.values().chain([&facts.mutating, &facts.validating]);
    let installed: Vec<&Value> = installed.filter_map(existing).collect();
    let definitions = facts.definitions.values().filter_map(existing);
    if let Some(tool) = installed.iter().copied().chain(definitions).find_map(objects::managed_by) {
        return format!("upgrade with {}", tool.name());
    }
    if installed.is_empty() {
        return format!("tulle install --apply --registry REGISTRY --system-namespace {}", facts.system);
    }
    if let Ok(health) = &facts.health
        && operator_is(facts, std::cmp::Ordering::Greater)
    {
        return format!("upgrade with tulle {}", health.version);
    }
    // Of the same version only what is missing or was changed by hand is written. A new one changes fields of kubectl's, the
    // images first.
    let takes_over =
        operator_is(facts, std::cmp::Ordering::Less) && installed.into_iter().any(is_applied_by_kubectl);
    let force = if takes_over { " --force-conflicts" } else { "" };
    format!("tulle upgrade --apply{force} --system-namespace {}", facts.system)
}

/// Whether `kubectl apply --server-side` owns fields of the object.
fn is_applied_by_kubectl(object: &Value) -> bool {
    let is_apply = |entry: &Value| {
        objects::text(entry, "/manager") == "kubectl" && objects::text(entry, "/operation") == "Apply"
    };
    objects::items(object, "/metadata/managedFields").iter().any(is_apply)
}

/// The request that reads the labelled namespaces, or the single namespace that `check` was given.
fn namespaces_request(facts: &Facts) -> ReadRequest {
    match &facts.namespace {
        Some(namespace) => ReadRequest::object(objects::NAMESPACE, None, namespace),
        None => ReadRequest::list(objects::NAMESPACE, None),
    }
}

/// The command that lists the operator's pods.
fn operator_pods(facts: &Facts) -> String {
    format!("kubectl -n {} get pods -l app=tulle-operator", facts.system)
}

/// The findings, or that all is well if there are none: but only where everything was read. Where it was not, the check that
/// names the missing right speaks for this one too, and "all is well" would be a guess.
fn or_ok_if_read(findings: Vec<Finding>, is_read: bool, well: impl FnOnce() -> Finding) -> Vec<Finding> {
    if is_read { or_ok(findings, well) } else { findings }
}

fn existing(read: &Read<Option<Value>>) -> Option<&Value> {
    read.as_ref().ok()?.as_ref()
}

/// How the operator's version compares with this program's, if both are known.
fn operator_is(facts: &Facts, wanted: std::cmp::Ordering) -> bool {
    let operator = facts.health.as_ref().ok().and_then(|health| version(&health.version));
    operator.zip(version(&facts.cli)).is_some_and(|(operator, own)| operator.cmp(&own) == wanted)
}

/// How long something has held, or will hold, in the unit that fits.
fn duration(seconds: i64) -> String {
    crate::human::age(std::time::Duration::from_secs(seconds.unsigned_abs()))
}

/// A time of an object in Unix seconds.
fn time(object: &Value, pointer: &str) -> Option<i64> {
    let text = objects::text(object, pointer);
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second)
}
