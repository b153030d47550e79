//! `tulle canary`: every action waits until the operator has taken it, and the status ends with the rollout.

use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::json;

use super::says;
use crate::cli::{Printed, exit};
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;

/// How long a watch may last.
const WATCH: &str = "150s";

pub(super) fn actions(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-canary")?;
    rests(&field, 50)?;
    at_rest(&field)?;
    deploy(&field, "v2")?;
    flows(&field, "20%")?;
    paused(&field)?;
    promoted(&field)?;
    deploy(&field, "v3")?;
    flows(&field, "20%")?;
    aborted(&field)?;
    undone(&field)
}

/// A workload under load, with a Canary whose rollouts stay at their first step.
pub(crate) fn rests(field: &TestNamespace<'_>, rate: u32) -> Result<()> {
    field.service("web", 2, &["--version=v1"])?;
    field.load("load", "web:80", rate)?;
    let steps = json!([{"weight": 20, "hold": "600s"}, {"weight": 50, "hold": "600s"}]);
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": {
            "target": {"kind": "Deployment", "name": "web"}, "steps": steps,
            "judge": {"minRequests": 30, "warmUp": "2s"},
        }}),
    )?;
    reaches(field, "Stable")
}

fn canary(field: &TestNamespace<'_>, code: i32, arguments: &[&str]) -> Result<Printed> {
    field.kube.tulle_expecting(code, &[&["-n", &field.namespace, "canary"], arguments].concat())
}

/// Watches the rollout while something is done. Returns how the watch has ended.
fn watched(field: &TestNamespace<'_>, meanwhile: impl FnOnce() -> Result<()>) -> Result<Printed> {
    let watch = ["-n", &field.namespace, "canary", "status", "web", "--watch", "--timeout", WATCH];
    thread::scope(|scope| {
        let watch = scope.spawn(|| field.kube.tulle_ended(&watch));
        let done = meanwhile();
        let ended = watch.join().map_err(|_| anyhow!("watching panicked"))?;
        done.with_context(|| format!("the watch has ended: {ended:?}"))?;
        ended
    })
}

/// Without a rollout, actions are refused with the reason, and nothing is written.
fn at_rest(field: &TestNamespace<'_>) -> Result<()> {
    let ended = canary(field, exit::FINE, &["status", "web", "--watch", "--timeout", "60s"])?;
    says(&ended.stdout, &["no rollout is in progress"])?;
    for action in ["promote", "pause", "resume", "abort", "retry"] {
        let refused = canary(field, exit::FAILED, &[action, "web"])?;
        says(&refused.stderr, &[action, "is Stable"])?;
    }
    let action = field.get("canary/web", ".metadata.annotations.tulle\\.dev/action")?;
    ensure!(action.is_empty(), "an action that does nothing was requested: {action}");
    let missing = canary(field, exit::FAILED, &["status", "nobody"])?;
    says(&missing.stderr, &["there is no Canary t-see-canary/nobody", "hint:"])?;
    let all = field.kube.tulle_expecting(exit::USAGE, &["-A", "canary", "status", "web"])?;
    says(&all.stderr, &["-n NAMESPACE"])
}

fn paused(field: &TestNamespace<'_>) -> Result<()> {
    let status = canary(field, exit::FINE, &["status", "web"])?.stdout;
    says(&status, &["Progressing", "1/2", "20%", "(stable)", "(canary)", "web-"])?;
    let listed = canary(field, exit::FINE, &["list"])?.stdout;
    says(&listed, &["NAME", "EVIDENCE", "Deployment/web", "Progressing"])?;
    let other = canary(field, exit::FAILED, &["promote", "web", "--revision", "other"])?;
    says(&other.stderr, &["not other"])?;
    canary(field, exit::FINE, &["pause", "web"])?;
    ensure!(phase(field)? == "Paused", "the command has not waited for the pause: {}", phase(field)?);
    let late = canary(field, exit::TIMED_OUT, &["status", "web", "--watch", "--timeout", "3s"])?;
    says(&late.stderr, &["has not ended in 3 s"])?;
    let again = canary(field, exit::FAILED, &["pause", "web"])?;
    says(&again.stderr, &["is Paused"])?;
    canary(field, exit::FINE, &["resume", "web"])?;
    ensure!(phase(field)? == "Progressing", "after resume: {}", phase(field)?);
    Ok(())
}

fn promoted(field: &TestNamespace<'_>) -> Result<()> {
    let revision = field.get("canary/web", ".status.canaryRevision")?;
    let ended = watched(field, || canary(field, exit::FINE, &["promote", "web"]).map(drop))?;
    ensure!(ended.code == exit::FINE, "{ended:?}");
    says(&ended.stdout, &[&format!("revision {revision} is promoted")])?;
    reaches(field, "Stable")?;
    field.kube.rolled_out(&field.namespace, "deployment/web", 60)?;
    let approved = field.get("canary/web", ".status.approvedRevision")?;
    ensure!(approved == revision, "{approved} is approved instead of {revision}");
    Ok(())
}

fn aborted(field: &TestNamespace<'_>) -> Result<()> {
    let revision = field.get("canary/web", ".status.canaryRevision")?;
    let ended = watched(field, || canary(field, exit::FINE, &["abort", "web"]).map(drop))?;
    ensure!(ended.code == exit::FINDINGS, "the rollout was aborted: {ended:?}");
    says(&ended.stdout, &[&format!("revision {revision} failed"), "aborted by hand"])?;
    ensure!(phase(field)? == "Failed", "after abort: {}", phase(field)?);
    let again = canary(field, exit::FAILED, &["abort", "web"])?;
    says(&again.stderr, &["is Failed"])?;
    flows(field, "0%")?;
    let before = field.account("load")?;
    field.kube.wait_for("more requests", 60, || Ok(field.account("load")?.ended > before.ended + 100))?;
    let after = field.account("load")?;
    ensure!(after.failed == before.failed, "requests fail after abort: {}", after.failures);
    Ok(())
}

fn undone(field: &TestNamespace<'_>) -> Result<()> {
    let template = || field.get("deployment/web", ".spec.template.spec.containers[0].args");
    let failed = template()?;
    canary(field, exit::FINE, &["undo", "web", "--dry-run"])?;
    ensure!(template()? == failed, "--dry-run has changed the template");
    let done = canary(field, exit::FINE, &["undo", "web"])?;
    says(&done.stdout, &["Deployment/web", "yes"])?;
    says(&template()?, &["--version=v2"])?;
    reaches(field, "Stable")?;
    field.kube.rolled_out(&field.namespace, "deployment/web", 90)
}

pub(in crate::suites) fn phase(field: &TestNamespace<'_>) -> Result<String> {
    field.get("canary/web", ".status.phase")
}

pub(in crate::suites) fn reaches(field: &TestNamespace<'_>, phase: &str) -> Result<()> {
    let what = format!("phase {phase}");
    field.kube.wait_for(&what, 90, || Ok(field.get("canary/web", ".status.phase")? == phase))
}

/// Waits until every client uses this weight.
pub(in crate::suites) fn flows(field: &TestNamespace<'_>, weight: &str) -> Result<()> {
    let what = format!("{weight} of the traffic on the new version");
    field.kube.wait_for(&what, 90, || Ok(field.get("canary/web", ".status.weightSummary")? == weight))
}

pub(in crate::suites) fn deploy(field: &TestNamespace<'_>, version: &str) -> Result<()> {
    let version = format!("--version={version}");
    let arguments = ["serve", "--name=web", version.as_str()];
    let patch =
        json!([{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": arguments}]);
    field.kubectl(&["patch", "deployment", "web", "--type=json", "-p", &patch.to_string()]).map(drop)
}
