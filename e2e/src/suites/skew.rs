//! Sidecars that are older than the operator: what they cannot enforce they refuse, the object says so,
//! and what they knew before stays in force.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::field::{Field, deployment, host_pod, pod_template, service};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    (
        "a policy that an older sidecar refuses says which and why, and the last good one stays",
        refused_policy,
    ),
    ("a canary waits for an older client's sidecar and says so, and goes on without it", refused_split),
];

fn refused_policy(kube: &Kube) -> Result<()> {
    let field = Field::meshed(kube, "t-skew")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}}))?;
    field.apply(service("web", json!({})))?;
    let mut pod = pod_template("web", &["serve".to_owned(), "--name=web".to_owned()]);
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!("web");
    older(&field, pod, "split/v1")?;
    field.client("client")?;
    field.plain_client("plain")?;
    let url = "http://web.t-skew.svc.cluster.local/";
    field.apply(policy(json!({"mtls": "Strict"})))?;
    kube.wait_for("Strict", 20, || Ok(field.get("meshpolicy/web", ".status.enforced")? == "1/1"))?;

    let deny = json!({"allow": [{"from": [{"serviceAccount": "somebody-else"}]}]});
    field.apply(policy(json!({"mtls": "Strict", "access": deny})))?;
    let ready =
        |path: &str| field.get("meshpolicy/web", &format!(".status.conditions[?(@.type==\"Ready\")].{path}"));
    kube.wait_for("the refusal in the condition", 20, || Ok(ready("reason")? == "RefusedBySidecar"))?;
    let message = ready("message")?;
    ensure!(message.contains("pod web") && message.contains("access/v1"), "the condition says: {message}");
    ensure!(field.get("meshpolicy/web", ".status.enforced")? == "0/1", "it is shown as enforced");
    ensure!(field.status("client", url)? == "200", "the last good policy let everybody in with mTLS");
    ensure!(field.status("plain", url)? == "000", "the last good policy was Strict: plain text got in");

    field.apply(policy(json!({"mtls": "Strict", "access": null})))?;
    kube.wait_for("what it can enforce", 20, || {
        Ok(field.get("meshpolicy/web", ".status.enforced")? == "1/1" && ready("status")? == "True")
    })
}

fn refused_split(kube: &Kube) -> Result<()> {
    let field = Field::meshed(kube, "t-skewed")?;
    field.service("web", 2, &["--version=v1"])?;
    field.load("load", "web:80", 100)?;
    older(&field, host_pod("old", "default", &["/usr/bin/sleep", "100000"]), "access/v1")?;
    let url = "http://web.t-skewed.svc.cluster.local/";
    ensure!(field.status("old", url)? == "200", "the older client reaches nobody");
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"}, "spec": {
            "target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 50, "hold": "4s"}],
            "judge": {"minRequests": 30},
        }}),
    )?;
    kube.wait_for("the stable revision", 20, || Ok(field.get("canary/web", ".status.phase")? == "Stable"))?;
    field.apply(deployment("web", 2, &["--version=v2"]))?;
    let condition = |path: &str| {
        field.get("canary/web", &format!(".status.conditions[?(@.type==\"Acknowledged\")].{path}"))
    };
    kube.wait_for("the refusal in the condition", 60, || Ok(condition("reason")? == "RefusedBySidecar"))?;
    let message = condition("message")?;
    ensure!(
        message.contains("t-skewed/old") && message.contains("split/v1"),
        "the condition says: {message}"
    );
    let events = field.kubectl(&["events", "--for", "canary/web"])?;
    ensure!(events.contains("RefusedBySidecar"), "no event: {events}");
    let evidence = field.get("canary/web", ".status.evidence.canaryRequests")?;
    ensure!(evidence.is_empty() || evidence == "0", "{evidence} requests count before all know the weight");
    ensure!(field.status("old", url)? == "200", "the older client has lost what it knew");
    field.kubectl(&["delete", "pod", "old"])?;
    kube.wait_for("the promotion", 120, || {
        Ok(field.get("canary/web", ".status.history[0].outcome")? == "Promoted")
    })
}

fn policy(more: Value) -> Value {
    let mut policy = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Service", "name": "web"}}});
    for (key, value) in more.as_object().into_iter().flatten() {
        policy["spec"][key] = value.clone();
    }
    policy
}

/// A pod whose sidecar has only some of the features: as the webhook makes it, and one variable more.
fn older(field: &Field<'_>, mut pod: Value, features: &str) -> Result<()> {
    pod["metadata"]["namespace"] = json!(field.namespace);
    let injected = field.kube.dry_run(&pod.to_string())?;
    let mut injected: Value = serde_json::from_str(&injected)?;
    let containers = injected["spec"]["initContainers"].as_array_mut().context("no sidecar was injected")?;
    let proxy = containers.iter_mut().find(|container| container["name"] == "tulle-proxy");
    let environment = proxy.context("no sidecar was injected")?["env"].as_array_mut().context("env")?;
    environment.push(json!({"name": "TULLE_FEATURES", "value": features}));
    let metadata = injected["metadata"].as_object_mut().context("metadata")?;
    metadata.retain(|name, _| ["name", "namespace", "labels", "annotations"].contains(&name.as_str()));
    let name = metadata["name"].as_str().context("a name")?.to_owned();
    field.apply(injected)?;
    field.ready(&name)
}
