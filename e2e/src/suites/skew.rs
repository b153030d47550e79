//! Versions side by side: sidecars of two earlier wire versions with today's operator and beside today's sidecars, and
//! today's sidecars with an earlier operator.
//!
//! An older sidecar refuses what it cannot enforce, the object's status reports the refusal, and the last good
//! configuration stays in force. The earlier builds have most features of today's policies, so a variable takes some of
//! them away where a refusal is wanted.

mod operator;
mod pods;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, deployment, host_pod};
use crate::earlier::{Build, OLDEST, PREVIOUS};
use crate::kubectl::Kube;
use pods::{load_earlier, older, older_client, older_server};

pub(super) const TESTS: &[Test] = &[
    (
        "sidecars of today and of two earlier builds use mTLS in every direction, and the earlier ones enforce today's policies",
        every_direction,
    ),
    (
        "a policy that a sidecar of the previous build refuses names sidecar and reason; the last good one stays in force",
        refused_by_previous,
    ),
    (
        "a policy that a sidecar of the oldest build refuses names sidecar and reason; the last good one stays in force",
        refused_by_oldest,
    ),
    (
        "a canary waits for an older client's sidecar, reports the wait, and continues without that client",
        refused_split,
    ),
];

/// Tests that set the operator back, and so run alone.
pub(super) const DOWNGRADE: &[Test] = &[(
    "with the operator of the previous build, today's sidecars get their configuration, enforce a deny, and carry a canary",
    operator::newer_sidecars,
)];

fn every_direction(kube: &Kube) -> Result<()> {
    load_earlier(kube)?;
    let field = TestNamespace::meshed(kube, "t-skew-mtls")?;
    field.service("today", 1, &[])?;
    field.client("today-client")?;
    field.plain_client("plain")?;
    let earlier = [("previous", &PREVIOUS), ("oldest", &OLDEST)];
    for (name, build) in earlier {
        older_server(&field, build, name, None)?;
        older_client(&field, build, &format!("{name}-client"))?;
    }
    // What the server saw: the identity in the client's certificate.
    let versions = ["today", "previous", "oldest"];
    for (client, server) in versions.iter().flat_map(|client| versions.map(|server| (*client, server))) {
        let client = format!("{client}-client");
        let url = format!("http://{server}.t-skew-mtls.svc.cluster.local/");
        let answer = field.exec(&client, &["/usr/bin/curl", "-s", "-m", "8", &url])?;
        let identity = format!("spiffe://cluster.local/ns/t-skew-mtls/sa/{client}");
        ensure!(answer.contains(&identity), "{server} did not see the identity of {client}: {answer:?}");
    }
    for (server, _) in earlier {
        enforces(&field, server)?;
    }
    Ok(())
}

/// A server with an older sidecar takes plain text by default, and enforces today's policy.
fn enforces(field: &TestNamespace<'_>, server: &str) -> Result<()> {
    let url = format!("http://{server}.{}.svc.cluster.local/", field.namespace);
    ensure!(field.status("plain", &url)? == "200", "{server}: Permissive, the default, refused plain text");
    let allow = json!({"allow": [{"from": [{"serviceAccount": "today-client"}]}]});
    field.apply(policy(server, json!({"mtls": "Strict", "access": allow})))?;
    let object = format!("meshpolicy/{server}");
    field.kube.wait_for(&format!("the {server} sidecar to enforce today's policy"), 60, || {
        let ready = field.get(&object, ".status.conditions[?(@.type==\"Ready\")].reason")?;
        Ok(field.get(&object, ".status.enforced")? == "1/1" && ready == "Enforced")
    })?;
    let expected =
        [("today-client", "200"), ("previous-client", "403"), ("oldest-client", "403"), ("plain", "000")];
    for (client, wanted) in expected {
        let status = field.status(client, &url)?;
        ensure!(status == wanted, "{client} got {status} from the {server} sidecar, expected {wanted}");
    }
    Ok(())
}

fn refused_by_previous(kube: &Kube) -> Result<()> {
    refused_policy(kube, "t-skew-previous", &PREVIOUS)
}

fn refused_by_oldest(kube: &Kube) -> Result<()> {
    refused_policy(kube, "t-skew-oldest", &OLDEST)
}

fn refused_policy(kube: &Kube, namespace: &str, build: &Build) -> Result<()> {
    load_earlier(kube)?;
    let field = TestNamespace::meshed(kube, namespace)?;
    older_server(&field, build, "web", Some("split/v1"))?;
    field.client("client")?;
    field.plain_client("plain")?;
    let url = &format!("http://web.{namespace}.svc.cluster.local/");
    field.apply(policy("web", json!({"mtls": "Strict"})))?;
    kube.wait_for("Strict to be enforced", 60, || {
        Ok(field.get("meshpolicy/web", ".status.enforced")? == "1/1")
    })?;

    let deny = json!({"allow": [{"from": [{"serviceAccount": "somebody-else"}]}]});
    field.apply(policy("web", json!({"mtls": "Strict", "access": deny})))?;
    let ready =
        |path: &str| field.get("meshpolicy/web", &format!(".status.conditions[?(@.type==\"Ready\")].{path}"));
    kube.wait_for("the refusal in the condition", 60, || Ok(ready("reason")? == "RefusedBySidecar"))?;
    let message = ready("message")?;
    ensure!(
        message.contains("pod web") && message.contains("access/v1"),
        "the condition does not name pod and feature: {message}"
    );
    ensure!(
        field.get("meshpolicy/web", ".status.enforced")? == "0/1",
        "the refused policy counts as enforced"
    );
    ensure!(
        field.status("client", url)? == "200",
        "the last good policy admits every mTLS client, but one was refused"
    );
    ensure!(
        field.status("plain", url)? == "000",
        "the last good policy is Strict, but plain text was accepted"
    );

    field.apply(policy("web", json!({"mtls": "Strict", "access": null})))?;
    kube.wait_for("the policy that the older sidecar can enforce", 60, || {
        Ok(field.get("meshpolicy/web", ".status.enforced")? == "1/1" && ready("status")? == "True")
    })?;
    unknown_section(&field, "web")
}

/// Asks for access logs, of which the earlier builds know nothing: the policy reports that, and its other section stays
/// in force.
fn unknown_section(field: &TestNamespace<'_>, name: &str) -> Result<()> {
    field.apply(policy(name, json!({"mtls": "Strict", "telemetry": {"accessLog": "Errors"}})))?;
    let object = format!("meshpolicy/{name}");
    let ready = |path: &str| field.get(&object, &format!(".status.conditions[?(@.type==\"Ready\")].{path}"));
    field.kube.wait_for("the section that the older sidecar lacks in the condition", 60, || {
        let message = ready("message")?;
        let says = |part: &str| message.contains(part);
        let names_all = says(&format!("pod {name}")) && says("section telemetry") && says("restart the pod");
        Ok(ready("reason")? == "RefusedBySidecar" && names_all)
    })?;
    let enforced = field.get(&object, ".status.enforced")?;
    ensure!(enforced == "0/1", "with a section that nobody has read, {enforced} sidecars enforce the policy");
    let url = format!("http://{name}.{}.svc.cluster.local/", field.namespace);
    for (client, wanted) in [("client", "200"), ("plain", "000")] {
        let status = field.status(client, &url)?;
        ensure!(status == wanted, "{client} got {status} under the section that is known, expected {wanted}");
    }
    Ok(())
}

fn refused_split(kube: &Kube) -> Result<()> {
    load_earlier(kube)?;
    let field = TestNamespace::meshed(kube, "t-skewed")?;
    field.service("web", 2, &["--version=v1"])?;
    field.load("load", "web:80", 100)?;
    let old = host_pod("old", "default", &["/usr/bin/sleep", "100000"]);
    older(&field, &OLDEST, old, Some("access/v1"))?;
    let url = "http://web.t-skewed.svc.cluster.local/";
    ensure!(field.status("old", url)? == "200", "the older client does not reach the server");
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": {
            "target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 50, "hold": "4s"}],
            "judge": {"minRequests": 30},
        }}),
    )?;
    kube.wait_for("the stable revision", 60, || Ok(field.get("canary/web", ".status.phase")? == "Stable"))?;
    field.apply(deployment("web", 2, &["--version=v2"]))?;
    let condition = |path: &str| {
        field.get("canary/web", &format!(".status.conditions[?(@.type==\"Acknowledged\")].{path}"))
    };
    kube.wait_for("the refusal in the condition", 60, || Ok(condition("reason")? == "RefusedBySidecar"))?;
    let message = condition("message")?;
    ensure!(
        message.contains("t-skewed/old") && message.contains("split/v1"),
        "the condition does not name pod and feature: {message}"
    );
    let events = field.kubectl(&["events", "--for", "canary/web"])?;
    ensure!(events.contains("RefusedBySidecar"), "no event: {events}");
    let held = field.get("canary/web", ".status.stepStarted")?;
    ensure!(held.is_empty(), "the hold began at {held}, before every sidecar had the weight");
    ensure!(field.status("old", url)? == "200", "the older client has lost its last good configuration");
    field.kubectl(&["delete", "pod", "old"])?;
    kube.wait_for("the promotion", 120, || {
        Ok(field.get("canary/web", ".status.history[0].outcome")? == "Promoted")
    })
}

fn policy(name: &str, more: Value) -> Value {
    let mut policy = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": name},
        "spec": {"target": {"kind": "Service", "name": name}}});
    for (key, value) in more.as_object().into_iter().flatten() {
        policy["spec"][key] = value.clone();
    }
    policy
}
