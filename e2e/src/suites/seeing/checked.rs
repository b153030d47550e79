//! `tulle check`: what is broken, and the command that it names.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{find, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::{TestNamespace, deployment};

pub(super) fn broken(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-check")?;
    field.service("web", 1, &[])?;
    let well = ["T0303", "T0304", "T0602", "T0801"].map(|id| format!("√ ok      {id}"));
    checked(&field, exit::FINE, &[], &well.each_ref().map(String::as_str))?;
    without_sidecar(kube)?;
    policy_without_target(&field)?;
    canary_without_target(&field)
}

/// The findings of a namespace with this number; null where the check is well.
fn finding(field: &TestNamespace<'_>, id: &str) -> Result<Value> {
    let printed = field.kube.tulle_ended(&["-n", &field.namespace, "check", "-o", "json"])?;
    ensure!([exit::FINE, exit::FINDINGS].contains(&printed.code), "{printed:?}");
    let report = printed.json()?;
    let categories = report["categories"].as_array().into_iter().flatten();
    let mut findings = categories.map(|category| {
        find(&category["findings"], |finding| finding["id"] == id && finding["result"] != "ok")
    });
    Ok(findings.find(|finding| !finding.is_null()).unwrap_or(Value::Null))
}

/// Waits until the check ends with an exit code and prints all these parts: other tests may break the control plane for a
/// moment, which is an error of every namespace.
fn checked(field: &TestNamespace<'_>, code: i32, more: &[&str], parts: &[&str]) -> Result<String> {
    let mut printed = String::new();
    field.kube.wait_for(&format!("the check {more:?} to end with {code}"), 60, || {
        let check = ["-n", &field.namespace, "check"];
        printed = field.kube.tulle_expecting(code, &[&check[..], more].concat())?.stdout;
        says(&printed, parts).map(|()| true)
    })?;
    Ok(printed)
}

/// Waits for a finding, and runs the command that it names.
fn found(field: &TestNamespace<'_>, id: &str, result: &str, parts: &[&str]) -> Result<String> {
    let mut last = Value::Null;
    let waited = field.kube.wait_for(&format!("finding {id}"), 60, || {
        last = finding(field, id)?;
        Ok(last["result"] == result && says(last["found"].as_str().unwrap_or(""), parts).is_ok())
    });
    waited.with_context(|| format!("last seen: {last}"))?;
    let fix = last["fix"].as_str().with_context(|| format!("no command is named: {last}"))?;
    let hint = last["hint"].as_str().unwrap_or("");
    ensure!(!hint.is_empty(), "no hint: {last}");
    let words: Vec<&str> = fix.split_whitespace().collect();
    let arguments = words.strip_prefix(&["kubectl"]).with_context(|| format!("not kubectl: {fix}"))?;
    field.kube.run(arguments)
}

/// Pods that are older than the label of their namespace.
fn without_sidecar(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-see-late")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "late"}}))?;
    field.apply(deployment("late", 1, &[]))?;
    kube.rolled_out(&field.namespace, "deployment/late", 60)?;
    kube.run(&["label", "namespace", &field.namespace, "tulle.dev/inject=enabled"])?;
    field.injects()?;
    let pods = field.pods("late")?;
    let pod = pods.first().context("the Deployment has no pod")?;
    // A warning, so that a pipeline chooses whether it counts.
    checked(&field, exit::FINE, &[], &["‼ warning T0602", pod, "fix: kubectl", "rollout restart"])?;
    checked(&field, exit::FINDINGS, &["--fail-on", "warning"], &["‼ warning T0602"])?;
    let names = checked(&field, exit::FINE, &["-o", "name"], &["T0602"])?;
    ensure!(names.lines().any(|line| line == "T0602"), "{names}");
    found(&field, "T0602", "warning", &[pod, &field.namespace])?;
    kube.rolled_out(&field.namespace, "deployment/late", 120)?;
    kube.wait_for("the named command to have repaired it", 60, || Ok(finding(&field, "T0602")?.is_null()))
}

fn policy_without_target(field: &TestNamespace<'_>) -> Result<()> {
    policy(field, "lost", json!({"target": {"kind": "Service", "name": "nobody"}, "mtls": "Strict"}))?;
    let described = found(field, "T0801", "error", &["t-see-check/lost", "TargetNotFound"])?;
    says(&described, &["nobody"])?;
    let parts = ["× error   T0801", "hint:", "fix: kubectl -n t-see-check describe meshpolicy lost"];
    let printed = checked(field, exit::FINDINGS, &["--short"], &parts)?;
    ensure!(!printed.contains("√ ok"), "--short shows what is well: {printed}");
    // Another namespace is none of its business.
    let other = finding(&TestNamespace::plain(field.kube, "t-see-calm")?, "T0801")?;
    ensure!(other.is_null(), "{other}");
    field.kubectl(&["delete", "meshpolicy", "lost"])?;
    field.kube.wait_for("the finding to go", 60, || Ok(finding(field, "T0801")?.is_null()))
}

fn canary_without_target(field: &TestNamespace<'_>) -> Result<()> {
    let target = json!({"kind": "Deployment", "name": "nobody"});
    field
        .apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "lost"},
        "spec": {"target": target, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    found(field, "T0901", "warning", &["t-see-check/lost", "TargetNotFound"]).map(drop)
}
