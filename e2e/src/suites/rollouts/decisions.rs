//! Newer versions, undo and what users decide.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{act, canary, condition, deploy, flows, pods_of, reaches, reported, shop, status, watch};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows};

/// Four pods, of which a surge of one does not carry 60 %, so that gates of v2 are opened.
pub(super) fn newer(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-newer")?;
    field.service("web", 4, &["--version=v1"])?;
    field.load("load", "web:80", 100)?;
    field.plain_client("outsider")?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 60, "hold": "600s"}]), 30))?;
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        flows(&field, "60%", 90)?;
        ensure!(ready(&field, "v2")? > 0, "no gate of v2 was opened, so the test proves nothing");
        deploy(&field, "v3", 0)?;
        kube.wait_for("the pods of v2 to leave the Service", 60, || Ok(ready(&field, "v2")? == 0))?;
        let ask = "for i in $(seq 40); do curl -s -m 8 http://web.t-newer.svc.cluster.local/; done";
        // The endpoints of kube-proxy follow a moment later.
        kube.wait_for("no answer of v2 for a client outside the mesh", 60, || {
            let answers = field.exec("outsider", &["/bin/sh", "-c", ask])?;
            ensure!(answers.contains("\"version\""), "the client got no answer: {answers}");
            ensure!(!answers.contains("\"v2\""), "a client outside the mesh still gets v2: {answers}");
            Ok(true)
        })?;
        kube.wait_for("v2 to be recorded as superseded", 60, || {
            Ok(status(&field, ".history[0].outcome")? == "Superseded")
        })?;
        flows(&field, "60%", 90)
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    Ok(())
}

/// How many pods of a version are ready, which is when Services have them as endpoints.
fn ready(field: &TestNamespace<'_>, version: &str) -> Result<usize> {
    Ok(pods_of(field, version)?.iter().filter(|pod| condition(pod, "Ready") == "True").count())
}

pub(super) fn scaled_to_zero(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-zero", json!([{"weight": 20, "hold": "60s"}]), 20)?;
    deploy(&field, "v2", 100)?;
    reaches(&field, "Failed", 90)?;
    let (approved, failed) = (status(&field, ".approvedRevision")?, status(&field, ".canaryRevision")?);
    let scale = |replicas: &str| field.kubectl(&["scale", "deployment", "web", "--replicas", replicas]);
    scale("0")?;
    kube.wait_for("the pods to be gone", 60, || {
        Ok(field.kubectl(&["get", "pods", "-l", "app=web", "-o", "name"])?.is_empty())
    })?;
    scale("2")?;
    kube.wait_for("the failed version to serve, and the status to say so", 90, || {
        let (serves, message) = reported(&field, "ServingFailedRevision")?;
        Ok(serves == "True" && message.contains(&failed))
    })?;
    let (phase, now) = (status(&field, ".phase")?, status(&field, ".approvedRevision")?);
    ensure!(phase == "Failed", "the failed version is {phase}");
    ensure!(now == approved, "the approved revision is {now}, although nobody approved it");
    act(&field, "promote@1")?;
    reaches(&field, "Stable", 60)?;
    let now = status(&field, ".approvedRevision")?;
    ensure!(now == failed, "the approved revision is {now} instead of {failed}");
    let serves = reported(&field, "ServingFailedRevision")?.0;
    ensure!(serves != "True", "an approved version is still reported as failed");
    Ok(())
}

/// Of four pods, two of v2 have an opened gate at 75 %, so Kubernetes counts them when two are left.
pub(super) fn scaled_down(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-scaled")?;
    field.service("web", 4, &["--version=v1"])?;
    field.load("load", "web:80", 50)?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 75, "hold": "600s"}]), 100_000))?;
    deploy(&field, "v2", 0)?;
    flows(&field, "75%", 90)?;
    let (approved, trial) = (status(&field, ".approvedRevision")?, status(&field, ".canaryRevision")?);
    field.kubectl(&["scale", "deployment", "web", "--replicas", "2"])?;
    flows(&field, "100%", 90)?;
    let (phase, now) = (status(&field, ".phase")?, status(&field, ".approvedRevision")?);
    ensure!(phase == "Progressing", "a version that nobody has judged is {phase}");
    ensure!(now == approved, "the approved revision is {now}, although nobody approved it");
    act(&field, "promote@1")?;
    reaches(&field, "Stable", 60)?;
    let now = status(&field, ".approvedRevision")?;
    ensure!(now == trial, "the approved revision is {now} instead of {trial}");
    Ok(())
}

pub(super) fn events(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-events", json!([{"pause": {}}]), 10)?;
    let mut revisions = Vec::new();
    for version in ["v2", "v3"] {
        let before = status(&field, ".canaryRevision")?;
        deploy(&field, version, 0)?;
        kube.wait_for("the rollout to pause", 60, || {
            Ok(status(&field, ".phase")? == "Paused" && status(&field, ".canaryRevision")? != before)
        })?;
        revisions.push(status(&field, ".canaryRevision")?);
    }
    kube.wait_for("an event for the start of each rollout", 60, || {
        let selector = "involvedObject.name=web,involvedObject.kind=Canary,reason=Started";
        let notes = "jsonpath={range .items[*]}{.message}{\"\\n\"}{end}";
        let notes = field.kubectl(&["get", "events", "--field-selector", selector, "-o", notes])?;
        let shown = field.kubectl(&["events", "--for", "canary/web"])?;
        let started = |text: &str, revision: &String| text.lines().any(|line| line.contains(revision));
        Ok(revisions.iter().all(|revision| started(&notes, revision) && started(&shown, revision)))
    })
}

/// The step is a pause, which a second trial would never leave.
pub(super) fn undo_approved(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-undo-approved", json!([{"pause": {}}]), 10)?;
    let first = status(&field, ".approvedRevision")?;
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        reaches(&field, "Paused", 60)?;
        act(&field, "promote@1")?;
        kube.wait_for("the promotion of v2", 60, || {
            Ok(status(&field, ".history[0].outcome")? == "Promoted" && status(&field, ".phase")? == "Stable")
        })?;
        field.kubectl(&["rollout", "undo", "deployment/web"])?;
        kube.wait_for("v1 to be approved again", 60, || {
            Ok(status(&field, ".approvedRevision")? == first && status(&field, ".phase")? == "Stable")
        })?;
        field.kube.rolled_out("t-undo-approved", "deployment/web", 60)
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    Ok(())
}

pub(super) fn promote_other(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-promote-other", json!([{"pause": {}}]), 10)?;
    deploy(&field, "v2", 0)?;
    reaches(&field, "Paused", 60)?;
    let revision = status(&field, ".canaryRevision")?;
    act(&field, "promote:another@1")?;
    kube.wait_for("the event that the action is ignored", 60, || {
        Ok(field.kubectl(&["events", "--for", "canary/web"])?.contains("another"))
    })?;
    let phase = status(&field, ".phase")?;
    ensure!(phase == "Paused", "an action for another revision has made the rollout {phase}");
    act(&field, &format!("promote:{revision}@2"))?;
    kube.wait_for("the promotion", 60, || {
        Ok(status(&field, ".approvedRevision")? == revision && status(&field, ".phase")? == "Stable")
    })
}

/// A pod counts as available only after a while, so that the promotion takes longer than this test.
pub(super) fn abort_promotion(kube: &Kube) -> Result<()> {
    let field = shop(kube, "t-abort", json!([{"pause": {}}]), 10)?;
    let slowly = json!({"spec": {"minReadySeconds": 120}}).to_string();
    field.kubectl(&["patch", "deployment", "web", "--type=merge", "-p", &slowly])?;
    let approved = status(&field, ".approvedRevision")?;
    deploy(&field, "v2", 0)?;
    reaches(&field, "Paused", 60)?;
    act(&field, "promote@1")?;
    reaches(&field, "Promoting", 60)?;
    act(&field, "abort@2")?;
    reaches(&field, "Failed", 60)?;
    let now = status(&field, ".approvedRevision")?;
    ensure!(now == approved, "the aborted version is approved: {now} instead of {approved}");
    flows(&field, "0%", 60)
}
