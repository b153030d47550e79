//! Bad versions of every kind: each must be stopped, or held with the reason.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{canary, deploy, deploy_with, flows, patch, reaches, shop, status, watch};
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::admission::sidecar_process;
use crate::suites::namespace::{TestNamespace, borrows, deployment, host_pod};

/// How long a version that fails half of its requests may take to be stopped: a few blocks of ten seconds, with room
/// for a busy machine.
const SOON: u64 = 90;

pub(super) fn closes(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-closes")?;
    field.service("web", 2, &["--version=v1"])?;
    // Only GETs, because sidecars retry no POST that the application may have read.
    gets(&field)?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 20, "hold": "300s"}]), 50))?;
    let (failed, why) = field.failed_during("load", || {
        deploy_with(&field, "v2", &["--closes=50"])?;
        reaches(&field, "Failed", SOON)
    })?;
    // A retry can meet a closed connection again, so that a few may be lost.
    ensure!(failed < 10, "retries did not hide the closed connections, {failed} requests were lost: {why}");
    ensure!(number(&field, ".evidence.canary.failures")? > 0, "no attempt is counted as failed");
    let versions = field.account("load")?.versions;
    ensure!(versions["v2"].as_u64() > Some(0), "no answer came from v2: {versions}");
    Ok(())
}

pub(super) fn slow(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-slow", json!([{"weight": 20, "hold": "300s"}]), 50)?;
    // The comparison needs a stable version that is not slow itself. On a machine that is as busy as that of the tests
    // its p99 is up to half a second, and the comparison takes minutes: it is tried in the judge's own tests.
    patch(&field, &json!({"judge": {"objectives": {"p99": "1s"}}}))?;
    deploy_with(&field, "v2", &["--delay=1500", "--delayed=40"])?;
    reaches(&field, "Failed", SOON)?;
    let because = status(&field, ".evidenceSummary")?;
    ensure!(because.contains("p99"), "the evidence summary does not name the latency: {because}");
    Ok(())
}

pub(super) fn forbids(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-forbids", json!([{"weight": 20, "hold": "40s"}]), 50)?;
    deploy_with(&field, "v2", &["--errors=40", "--status=403"])?;
    kube.wait_for("a reason to hold that names 4xx", SOON, || {
        let because = status(&field, ".evidenceSummary")?;
        Ok(status(&field, ".verdict")? == "Inconclusive" && because.contains("4xx"))
    })?;
    // Longer than what is left of the hold.
    thread::sleep(Duration::from_secs(40));
    let (phase, step) = (status(&field, ".phase")?, status(&field, ".stepSummary")?);
    ensure!(phase == "Progressing", "the rollout is not held: it is {phase} at step {step}");
    Ok(())
}

pub(super) fn both_bad(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-both-bad")?;
    field.service("web", 2, &["--version=v1", "--errors=70"])?;
    field.load("load", "web:80", 100)?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 20, "hold": "2s"}]), 20))?;
    deploy(&field, "v2", 100)?;
    reaches(&field, "Failed", SOON)
}

pub(super) fn objective(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-objective")?;
    field.service("web", 2, &["--version=v1", "--errors=20"])?;
    field.load("load", "web:80", 100)?;
    let mut canary = canary("web", "Deployment", json!([{"weight": 50, "hold": "300s"}]), 50);
    canary["spec"]["judge"]["objectives"] = json!({"successRate": 99});
    watch(&field, canary)?;
    deploy(&field, "v2", 20)?;
    reaches(&field, "Failed", SOON)?;
    let because = status(&field, ".evidenceSummary")?;
    ensure!(
        because.contains("objective of 99% success"),
        "the evidence summary does not name the objective: {because}"
    );
    Ok(())
}

/// A signal stops the sidecar of a client: it keeps its stream, reads nothing and acknowledges nothing.
pub(super) fn silent_client(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("the process of a sidecar is in reach on its node only"))
    };
    let field = shop(kube, "t-silent", json!([{"weight": 20, "hold": "300s"}]), 50)?;
    let ask =
        "while true; do curl -s -m 8 -o /dev/null http://web.t-silent.svc.cluster.local/; sleep 1; done";
    let mut pod = host_pod("silent", "default", &["/bin/sh", "-c", ask]);
    // kubelet restarts a sidecar that is not alive, but not before this time has passed.
    pod["spec"]["terminationGracePeriodSeconds"] = json!(120);
    field.apply(pod)?;
    field.ready("silent")?;
    let answered = field.status("silent", "http://web.t-silent.svc.cluster.local/")?;
    ensure!(answered == "200", "the client got {answered}");
    // Bad enough to be stopped, and not within the second that it takes to stop the client's sidecar.
    deploy(&field, "v2", 50)?;
    flows(&field, "20%", 60)?;
    let process = sidecar_process(cluster, &field, "silent")?;
    let signal = |name: &str| {
        let kill = format!("kill -{name} {process}");
        host::output(cluster.inside("/bin/sh")?.args(["-c", &kill]))
    };
    signal("STOP")?;
    let outcome = (|| {
        reaches(&field, "Failed", SOON)?;
        // The other client has the new weight at once; the silent one may still send to the bad version.
        thread::sleep(Duration::from_secs(3));
        let (weight, flowing) = (number(&field, ".weight")?, number(&field, ".acknowledgedWeight")?);
        ensure!(weight == 0, "the weight is still {weight}");
        ensure!(flowing > 0, "a weight of 0 is shown although one client has not acknowledged it");
        let (failed, why) = field.failed_during("load", || Ok(()))?;
        ensure!(failed == 0, "{failed} requests failed after the bad version was stopped: {why}");
        Ok(())
    })();
    // The process is gone if kubelet has restarted the sidecar meanwhile.
    let resumed = signal("CONT");
    outcome?;
    resumed?;
    flows(&field, "0%", 60)
}

/// Starts a load of GETs on Service web.
fn gets(field: &TestNamespace<'_>) -> Result<()> {
    let mut load = deployment("load", 1, &[]);
    let container = &mut load["spec"]["template"]["spec"]["containers"][0];
    container["args"] = json!(["load", "--target=web:80", "--rate=100", "--post-every=0"]);
    container.as_object_mut().context("the Deployment has no container")?.remove("readinessProbe");
    load["spec"]["template"]["spec"]["serviceAccountName"] = json!("default");
    field.apply(load)?;
    field.kube.rolled_out(&field.namespace, "deployment/load", 60)?;
    field.kube.wait_for("the load to start", 60, || Ok(field.account("load")?.sent > 50))
}

/// A number of the status of Canary web.
fn number(field: &TestNamespace<'_>, path: &str) -> Result<u64> {
    let text = status(field, path)?;
    text.parse().with_context(|| format!("{path} is not a number: {text:?}"))
}
