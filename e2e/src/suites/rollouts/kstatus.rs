//! What kstatus computes of Tulle's objects. Flux, and whatever else waits with this library, gives a delivery up if an
//! object is not Current in time: a rollout that holds for an hour must be Current all the while.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{act, canary, deploy, flows, patch, reaches, shop, status};
use crate::cluster;
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;

/// It is as its author wants it.
const CURRENT: &str = "Current";
/// It may become so.
const IN_PROGRESS: &str = "InProgress";
/// What a Deployment says that has not become ready within its deadline.
const EXCEEDED: &str = "ProgressDeadlineExceeded";
/// `progressDeadlineSeconds`: longer than `minReadySeconds`, and than a pod takes to start.
const DEADLINE: u64 = 15;

pub(super) fn while_it_holds(kube: &Kube) -> Result<()> {
    let program = cluster::kstatus()?;
    let field = shop(kube, "t-kstatus", json!([{"weight": 20, "hold": "600s"}]), 30)?;
    let objects = Objects { program, field: &field };
    objects.reach("canary/web", CURRENT)?;
    policy(&field, "strict", "web")?;
    objects.reach("meshpolicy/strict", CURRENT)?;
    objects.reach("meshconfig/mesh", CURRENT)?;

    deploy(&field, "v2", 0)?;
    flows(&field, "20%", 60)?;
    objects.hold("Progressing")?;
    // Another generation, of which the operator takes note.
    patch(&field, &json!({"judge": {"minRequests": 40}}))?;
    objects.reach("canary/web", CURRENT)?;
    act(&field, "pause@1")?;
    reaches(&field, "Paused", 60)?;
    objects.hold("Paused")?;

    // As the API server would store it, before any operator has seen it.
    let mut unseen = canary("unseen", "Deployment", json!([{"weight": 20, "hold": "5s"}]), 30);
    unseen["metadata"]["namespace"] = json!("t-kstatus");
    let stored = kube.dry_run(&unseen.to_string())?;
    let (computed, message) = objects.computed_of(&stored)?;
    ensure!(computed == IN_PROGRESS, "a Canary that no operator has seen is {computed}: {message}");

    // Neither has a target, so that the library does see a difference.
    policy(&field, "lost", "nobody")?;
    field.apply(canary("nobody", "Deployment", json!([{"weight": 20, "hold": "5s"}]), 30))?;
    for object in ["meshpolicy/lost", "canary/nobody"] {
        let message = objects.reach(object, IN_PROGRESS)?;
        ensure!(message.contains("nobody"), "{object}: the message does not name its target: {message}");
    }
    Ok(())
}

/// A Deployment that is held back past its deadline is in progress, and one whose version has failed is failed.
pub(super) fn past_the_deadline(kube: &Kube) -> Result<()> {
    let program = cluster::kstatus()?;
    let field = shop(kube, "t-deadline", json!([{"weight": 20, "hold": "600s"}]), 30)?;
    let objects = Objects { program, field: &field };
    let short = json!({"spec": {"progressDeadlineSeconds": DEADLINE}}).to_string();
    field.kubectl(&["patch", "deployment", "web", "--type=merge", "-p", &short])?;
    deploy(&field, "v2", 0)?;
    flows(&field, "20%", 60)?;
    sleep(Duration::from_secs(2 * DEADLINE + 2));
    let reason = ".status.conditions[?(@.type==\"Progressing\")].reason";
    let held = || field.get("deployment/web", reason);
    ensure!(held()? == "HeldByCanary", "after twice its deadline the Deployment is {}", held()?);
    let (computed, message) = objects.computed("deployment/web")?;
    ensure!(computed == IN_PROGRESS, "a Deployment that is held back is {computed}: {message}");

    // As while no operator was there.
    let failed = json!({"status": {"conditions": [
        {"type": "Progressing", "status": "False", "reason": EXCEEDED, "message": "as if no operator were there"},
    ]}});
    field.kubectl(&["patch", "deployment", "web", "--subresource=status", "-p", &failed.to_string()])?;
    kube.wait_for("the deadline to be taken back", 30, || Ok(held()? == "HeldByCanary"))?;

    act(&field, "abort@1")?;
    reaches(&field, "Failed", 60)?;
    kube.wait_for("the Deployment to have failed as its version has", 60, || Ok(held()? == EXCEEDED))
}

fn policy(field: &TestNamespace<'_>, name: &str, service: &str) -> Result<()> {
    let spec = json!({"target": {"kind": "Service", "name": service}, "mtls": "Strict"});
    let policy = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": name}, "spec": spec});
    field.apply(policy).map(drop)
}

/// Objects as kstatus sees them.
struct Objects<'a> {
    program: PathBuf,
    field: &'a TestNamespace<'a>,
}

impl Objects<'_> {
    /// Canary web is in this phase, and Current.
    fn hold(&self, phase: &str) -> Result<()> {
        let (computed, message) = self.computed("canary/web")?;
        let now = status(self.field, ".phase")?;
        ensure!(now == phase, "the rollout is {now} instead of {phase}, so the test proves nothing");
        ensure!(computed == CURRENT, "a Canary that is {phase} is {computed}: {message}");
        Ok(())
    }

    /// Waits until kstatus computes this of an object whose last generation the operator has seen; returns the message.
    fn reach(&self, object: &str, expected: &str) -> Result<String> {
        let mut last = String::new();
        self.field.kube.wait_for(&format!("{object} to be {expected}"), 60, || {
            // Or what was computed is of the generation before.
            let of = |path: &str| self.field.get(object, path);
            let (generation, observed) = (of(".metadata.generation")?, of(".status.observedGeneration")?);
            if observed != generation {
                bail!("generation {generation}, observed {observed:?}");
            }
            let (computed, message) = self.computed(object)?;
            ensure!(computed == expected, "it is {computed}: {message}");
            last = message;
            Ok(true)
        })?;
        Ok(last)
    }

    /// What kstatus computes of an object: status and message.
    fn computed(&self, object: &str) -> Result<(String, String)> {
        self.computed_of(&self.field.kubectl(&["get", object, "-o", "json"])?)
    }

    /// The same of an object's JSON.
    fn computed_of(&self, json: &str) -> Result<(String, String)> {
        let line: Value = serde_json::from_str(&piped(&self.program, json)?)?;
        let text = |key: &str| line[key].as_str().unwrap_or("").to_owned();
        Ok((text("status"), text("message")))
    }
}

/// Runs a program with this standard input; returns its standard output.
fn piped(program: &Path, input: &str) -> Result<String> {
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    child.stdin.take().context("it has no standard input")?.write_all(input.as_bytes())?;
    let ended = child.wait_with_output()?;
    ensure!(ended.status.success(), "kstatus: {}", String::from_utf8_lossy(&ended.stderr));
    Ok(String::from_utf8_lossy(&ended.stdout).into_owned())
}
