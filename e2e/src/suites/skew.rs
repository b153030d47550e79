//! Sidecars of an earlier release with today's operator and beside today's sidecars: they work together. An
//! older sidecar refuses what it cannot enforce, the object's status reports the refusal, and the last good
//! configuration stays in force.
//!
//! The older sidecars are built from an earlier commit. That commit has every feature of today's policies, so a
//! variable takes some of them away where a refusal is wanted.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::namespace::{TestNamespace, deployment, host_pod, pod_template, service};
use super::{Skip, Test};
use crate::earlier;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    (
        "an earlier build's sidecar uses mTLS with today's in both directions and enforces today's policies",
        both_directions,
    ),
    (
        "a policy that an older sidecar refuses names sidecar and reason; the last good one stays in force",
        refused_policy,
    ),
    (
        "a canary waits for an older client's sidecar, reports the wait, and continues without that client",
        refused_split,
    ),
];

fn both_directions(kube: &Kube) -> Result<()> {
    load_earlier(kube)?;
    let field = TestNamespace::meshed(kube, "t-skew-mtls")?;
    field.service("today", 1, &[])?;
    field.client("today-client")?;
    field.plain_client("plain")?;
    older_server(&field, "old", None)?;
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "old-client"}});
    field.apply(account)?;
    older(&field, host_pod("old-client", "old-client", &["/usr/bin/sleep", "100000"]), None)?;
    // What the server saw: the identity in the client's certificate.
    for (client, server) in [("old-client", "today"), ("today-client", "old"), ("old-client", "old")] {
        let url = format!("http://{server}.t-skew-mtls.svc.cluster.local/");
        let answer = field.exec(client, &["/usr/bin/curl", "-s", "-m", "8", &url])?;
        let identity = format!("spiffe://cluster.local/ns/t-skew-mtls/sa/{client}");
        ensure!(answer.contains(&identity), "{server} did not see the identity of {client}: {answer:?}");
    }

    let url = "http://old.t-skew-mtls.svc.cluster.local/";
    ensure!(field.status("plain", url)? == "200", "Permissive, the default, refused plain text");
    let allow = json!({"allow": [{"from": [{"serviceAccount": "today-client"}]}]});
    field.apply(policy("old", json!({"mtls": "Strict", "access": allow})))?;
    kube.wait_for("the older sidecar to enforce today's policy", 60, || {
        let ready = field.get("meshpolicy/old", ".status.conditions[?(@.type==\"Ready\")].reason")?;
        Ok(field.get("meshpolicy/old", ".status.enforced")? == "1/1" && ready == "Enforced")
    })?;
    for (client, wanted) in [("today-client", "200"), ("old-client", "403"), ("plain", "000")] {
        let status = field.status(client, url)?;
        ensure!(status == wanted, "{client} got {status} from the older sidecar, expected {wanted}");
    }
    Ok(())
}

fn refused_policy(kube: &Kube) -> Result<()> {
    load_earlier(kube)?;
    let field = TestNamespace::meshed(kube, "t-skew")?;
    older_server(&field, "web", Some("split/v1"))?;
    field.client("client")?;
    field.plain_client("plain")?;
    let url = "http://web.t-skew.svc.cluster.local/";
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

/// Asks for access logs, of which the earlier build knows nothing: the policy reports that, and its other section stays
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
    older(&field, host_pod("old", "default", &["/usr/bin/sleep", "100000"]), Some("access/v1"))?;
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

/// Loads the image of the earlier build, made once per machine.
fn load_earlier(kube: &Kube) -> Result<()> {
    // Tests side by side wait for one build and one import.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(archive) = earlier::sidecar()? else {
        bail!(Skip("this clone lacks the commit of the earlier build; run git fetch --unshallow"));
    };
    install::load(kube, &archive)
}

/// The shop's service in a pod with an older sidecar, and its Service.
fn older_server(field: &TestNamespace<'_>, name: &str, features: Option<&str>) -> Result<()> {
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}))?;
    field.apply(service(name, json!({})))?;
    let mut pod = pod_template(name, &["serve".to_owned(), format!("--name={name}")]);
    pod["apiVersion"] = json!("v1");
    pod["kind"] = json!("Pod");
    pod["metadata"]["name"] = json!(name);
    older(field, pod, features)
}

/// Creates a pod with a sidecar of the earlier build, and waits until it is ready. `features`: those that the
/// sidecar has; `None`: all of that build.
///
/// The pod is as today's webhook makes it, with the earlier webhook's values where the two differ. It becomes
/// ready only if its sidecar answers on that build's port.
fn older(field: &TestNamespace<'_>, mut pod: Value, features: Option<&str>) -> Result<()> {
    pod["metadata"]["namespace"] = json!(field.namespace);
    let injected = field.kube.dry_run(&pod.to_string())?;
    let mut injected: Value = serde_json::from_str(&injected)?;
    let mut sidecars = 0;
    for list in ["initContainers", "containers"] {
        for container in injected["spec"][list].as_array_mut().into_iter().flatten() {
            match container["name"].as_str() {
                Some("tulle-init") => container["image"] = json!(earlier::IMAGE),
                Some("tulle-proxy") => {
                    as_earlier(container, features)?;
                    sidecars += 1;
                }
                _ => move_probes(container),
            }
        }
    }
    ensure!(sidecars == 1, "no sidecar was injected");
    let metadata = injected["metadata"].as_object_mut().context("the pod has no metadata")?;
    metadata.retain(|name, _| ["name", "namespace", "labels", "annotations"].contains(&name.as_str()));
    // The seal of today's injection, which the changed containers do not match.
    metadata["annotations"]
        .as_object_mut()
        .context("the pod has no annotations")?
        .remove("tulle.dev/injection");
    let name = metadata["name"].as_str().context("the pod has no name")?.to_owned();
    field.apply(injected)?;
    field.ready(&name)
}

/// The port on which the earlier build's sidecar answers `/ready` and `/metrics`.
const EARLIER_ADMIN: u16 = 4152;
/// The port on which it carries out probes.
const EARLIER_PROBES: u16 = 4153;
/// The port on which today's sidecar carries out probes.
const PROBES: u16 = 26153;

/// Turns today's sidecar container into the earlier webhook's: another program with other ports, which is not
/// probed once it has started. The operator and its address are today's.
fn as_earlier(proxy: &mut Value, features: Option<&str>) -> Result<()> {
    proxy["image"] = json!(earlier::IMAGE);
    proxy["ports"][0]["containerPort"] = json!(EARLIER_ADMIN);
    proxy["startupProbe"]["httpGet"]["port"] = json!(EARLIER_ADMIN);
    let container = proxy.as_object_mut().context("the sidecar is not an object")?;
    container.remove("readinessProbe");
    container.remove("livenessProbe");
    if let Some(features) = features {
        let variables = proxy["env"].as_array_mut().context("the sidecar has no environment")?;
        variables.push(json!({"name": "TULLE_FEATURES", "value": features}));
    }
    Ok(())
}

/// Points kubelet's probes of a container at the earlier build's port.
fn move_probes(container: &mut Value) {
    for kind in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let port = container.get_mut(kind).and_then(|probe| probe.pointer_mut("/httpGet/port"));
        if let Some(port) = port.filter(|port| **port == PROBES) {
            *port = json!(EARLIER_PROBES);
        }
    }
}
