//! `tulle check`: what is broken, and the command that it names.
//!
//! Other tests run meanwhile, so that no fault here reaches beyond a namespace, but for the replica that the webhook can
//! spare. What stops the webhook or its configuration is among the faults of the suites that run alone.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{find, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::{TestNamespace, deployment};

/// The namespace of Tulle.
const SYSTEM: &str = "tulle-system";

pub(super) fn broken(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-check")?;
    field.service("web", 1, &[])?;
    let well = ["T0303", "T0304", "T0602", "T0801"].map(|id| format!("√ ok      {id}"));
    checked(&field, exit::FINE, &[], &well.each_ref().map(String::as_str))?;
    without_sidecar(kube)?;
    wrong_labels(kube)?;
    policy_without_target(&field)?;
    policies_in_conflict(&field)?;
    policy_without_pods(kube)?;
    canary_without_target(&field)?;
    canary_of_helm(&field)?;
    one_replica(&field)
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

/// Waits until a finding is gone.
fn gone(field: &TestNamespace<'_>, id: &str) -> Result<()> {
    let mut last = Value::Null;
    let waited = field.kube.wait_for(&format!("finding {id} to go"), 60, || {
        last = finding(field, id)?;
        Ok(last.is_null())
    });
    waited.with_context(|| format!("last seen: {last}"))
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
    checked(
        &field,
        exit::FINE,
        &[],
        &["‼ warning T0602", pod, "fix: kubectl", "rollout restart deployment/late"],
    )?;
    checked(&field, exit::FINDINGS, &["--fail-on", "warning"], &["‼ warning T0602"])?;
    let names = checked(&field, exit::FINE, &["-o", "name"], &["T0602"])?;
    ensure!(names.lines().any(|line| line == "T0602"), "{names}");
    found(&field, "T0602", "warning", &[pod, &field.namespace])?;
    kube.rolled_out(&field.namespace, "deployment/late", 120)?;
    gone(&field, "T0602")
}

/// A label of which the value is misspelled, and a Pod Security level that rejects the init container, which matters as
/// soon as the label is right. The commands that are named repair both.
fn wrong_labels(kube: &Kube) -> Result<()> {
    let labels = json!({"tulle.dev/inject": "enable", "pod-security.kubernetes.io/enforce": "baseline"});
    let field = TestNamespace::new(kube, "t-see-label", labels)?;
    let early = finding(&field, "T0104")?;
    ensure!(early.is_null(), "a namespace whose label has no effect must admit the init container: {early}");
    let parts = ["namespace t-see-label has label tulle.dev/inject=enable", "no effect"];
    found(&field, "T0601", "warning", &parts)?;
    gone(&field, "T0601")?;
    found(&field, "T0104", "error", &["namespace t-see-label", "level baseline", "tulle-init"])?;
    gone(&field, "T0104")
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
    gone(field, "T0801")
}

/// Two policies with the same section and target, of which the younger one has no effect.
fn policies_in_conflict(field: &TestNamespace<'_>) -> Result<()> {
    for name in ["one", "other"] {
        policy(field, name, json!({"target": {"kind": "Service", "name": "web"}, "mtls": "Permissive"}))?;
    }
    let outcome = found(field, "T0801", "error", &["MeshPolicy t-see-check/", "Conflicted"]);
    field.kubectl(&["delete", "meshpolicy", "one", "other"])?;
    says(&outcome?, &["Conflicted"])?;
    gone(field, "T0801")
}

/// A policy for a namespace without pods.
fn policy_without_pods(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-empty")?;
    policy(&field, "idle", json!({"target": {"kind": "Namespace"}, "mtls": "Permissive"}))?;
    found(&field, "T0801", "warning", &["MeshPolicy t-see-empty/idle", "NoWorkloads"])?;
    field.kubectl(&["delete", "meshpolicy", "idle"])?;
    gone(&field, "T0801")
}

fn canary_without_target(field: &TestNamespace<'_>) -> Result<()> {
    let target = json!({"kind": "Deployment", "name": "nobody"});
    field
        .apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "lost"},
        "spec": {"target": target, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    found(field, "T0901", "warning", &["t-see-check/lost", "TargetNotFound"])?;
    field.kubectl(&["delete", "canary", "lost"])?;
    gone(field, "T0901")
}

/// A Canary with steps that take longer than Helm, which manages its target, waits by default.
fn canary_of_helm(field: &TestNamespace<'_>) -> Result<()> {
    field.kubectl(&["label", "deployment", "web", "app.kubernetes.io/managed-by=Helm"])?;
    let target = json!({"kind": "Deployment", "name": "web"});
    field
        .apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "slow"},
        "spec": {"target": target, "steps": [{"weight": 50, "hold": "10m"}]}}))?;
    let parts = ["Canary t-see-check/slow", "managed by Helm", "at least 600 s"];
    found(field, "T0903", "warning", &parts)?;
    field.kubectl(&["label", "deployment", "web", "app.kubernetes.io/managed-by-"])?;
    gone(field, "T0903")?;
    field.kubectl(&["delete", "canary", "slow"]).map(drop)
}

/// Gives a Deployment of Tulle its replicas back.
struct Replicas<'a> {
    kube: &'a Kube,
    deployment: &'static str,
    count: String,
}

impl Replicas<'_> {
    fn set(&self, count: &str) -> Result<()> {
        let replicas = format!("--replicas={count}");
        self.kube.run(&["-n", SYSTEM, "scale", "deployment", self.deployment, &replicas]).map(drop)
    }
}

impl Drop for Replicas<'_> {
    fn drop(&mut self) {
        let _ = self.set(&self.count);
        let _ = self.kube.rolled_out(SYSTEM, &format!("deployment/{}", self.deployment), 120);
    }
}

/// A webhook without a spare replica. The command that is named gives it one.
fn one_replica(field: &TestNamespace<'_>) -> Result<()> {
    let kube = field.kube;
    // The replicas of another cluster are its owner's.
    if matches!(kube, Kube::Context(_)) {
        return Ok(());
    }
    let count = kube.field(SYSTEM, "deployment/tulle-webhook", ".spec.replicas")?;
    let webhook = Replicas { kube, deployment: "tulle-webhook", count };
    webhook.set("1")?;
    found(field, "T0302", "warning", &["tulle-system/tulle-webhook has only 1 replica"])?;
    gone(field, "T0302")
}
