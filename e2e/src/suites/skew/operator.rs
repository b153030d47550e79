//! Today's sidecars with the operator of an earlier build, as in a mesh whose operator has been set back.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::pods::load_earlier;
use super::policy;
use crate::earlier::PREVIOUS;
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, deployment};

/// Tulle's own namespace.
const SYSTEM: &str = "tulle-system";
/// The operator's label.
const OPERATOR: &str = "app=tulle-operator";
/// The label of pods with a sidecar.
const INJECTED: &str = "tulle.dev/sidecar";

/// How long logs are watched: several reports of each sidecar.
const WINDOW: Duration = Duration::from_secs(20);

pub(super) fn newer_sidecars(kube: &Kube) -> Result<()> {
    load_earlier(kube)?;
    let earlier = PREVIOUS.operator.context("the earlier build has no operator")?;
    let field = TestNamespace::meshed(kube, "t-skew-operator")?;
    field.injects()?;
    // These have a configuration of today's operator, and come to the earlier one with it.
    field.service("before", 1, &[])?;
    field.client("client")?;
    field.plain_client("plain")?;
    let today = kube.field(SYSTEM, "deployment/tulle-operator", ".spec.template.spec.containers[0].image")?;
    let outcome = serve(kube, earlier).and_then(|()| with_earlier(&field));
    let restored = serve(kube, &today).context("setting the operator to today's again");
    outcome.and(restored)?;
    // And back: today's operator has everything to say about the same sidecars.
    denies(&field, "before", "client")?;
    for (client, wanted) in [("client", "403"), ("other", "200"), ("plain", "000")] {
        becomes(&field, client, "before", wanted)?;
    }
    Ok(())
}

/// Sets the operator's image, and waits until every replica has it.
fn serve(kube: &Kube, image: &str) -> Result<()> {
    let container = format!("operator={image}");
    kube.run(&["-n", SYSTEM, "set", "image", "deployment/tulle-operator", &container])?;
    kube.rolled_out(SYSTEM, "deployment/tulle-operator", 120)?;
    let images =
        ["-n", SYSTEM, "get", "pods", "-l", OPERATOR, "-o", "jsonpath={.items[*].spec.containers[0].image}"];
    kube.wait_for(&format!("no operator but {image}"), 60, || {
        let images = kube.run(&images)?;
        Ok(!images.is_empty() && images.split_whitespace().all(|running| running == image))
    })
}

fn with_earlier(field: &TestNamespace<'_>) -> Result<()> {
    // These have everything from the earlier operator, the certificate too.
    field.service("after", 2, &["--version=v1"])?;
    field.client("other")?;
    for client in ["client", "other"] {
        for server in ["before", "after"] {
            let answer = field.exec(client, &["/usr/bin/curl", "-s", "-m", "8", &url(field, server)])?;
            let identity = format!("spiffe://cluster.local/ns/{}/sa/{client}", field.namespace);
            ensure!(answer.contains(&identity), "{server} did not see the identity of {client}: {answer:?}");
        }
    }
    for (server, pods) in [("before", "1/1"), ("after", "2/2")] {
        denies(field, server, "other")?;
        let object = format!("meshpolicy/{server}");
        field.kube.wait_for(&format!("the policy of {server} to be enforced"), 60, || {
            let ready = field.get(&object, ".status.conditions[?(@.type==\"Ready\")].reason")?;
            Ok(field.get(&object, ".status.enforced")? == pods && ready == "Enforced")
        })?;
        for (client, wanted) in [("client", "200"), ("other", "403"), ("plain", "000")] {
            let status = field.status(client, &url(field, server))?;
            ensure!(status == wanted, "{client} got {status} from {server}, expected {wanted}");
        }
    }
    counts(field)?;
    quiet(field)?;
    let count = "jsonpath={.items[*].status.containerStatuses[*].restartCount}";
    let restarts = field.kube.run(&["-n", SYSTEM, "get", "pods", "-l", OPERATOR, "-o", count])?;
    let calm = !restarts.is_empty() && restarts.split_whitespace().all(|count| count == "0");
    ensure!(calm, "restarts of the earlier operator's replicas: {restarts:?}");
    Ok(())
}

/// A Canary goes through its step only with evidence, which the earlier operator has from today's sidecars.
fn counts(field: &TestNamespace<'_>) -> Result<()> {
    field.load("load", "after:80", 100)?;
    field.apply(
        json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "after"}, "spec": {
            "target": {"kind": "Deployment", "name": "after"}, "steps": [{"weight": 50, "hold": "4s"}],
            "judge": {"minRequests": 30},
        }}),
    )?;
    field.kube.wait_for("the stable revision", 60, || {
        Ok(field.get("canary/after", ".status.phase")? == "Stable")
    })?;
    let (failed, why) = field.failed_during("load", || {
        field.apply(deployment("after", 2, &["--version=v2"]))?;
        field.kube.wait_for("the promotion", 120, || {
            Ok(field.get("canary/after", ".status.history[0].outcome")? == "Promoted")
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    Ok(())
}

/// While requests go on, neither the operator nor a sidecar logs an error, or a warning again and again.
fn quiet(field: &TestNamespace<'_>) -> Result<()> {
    // What belongs to the Canary is over, and its former pods are gone.
    thread::sleep(WINDOW * 2);
    let mut loud = BTreeMap::<String, usize>::new();
    let since = format!("--since={}s", WINDOW.as_secs());
    for (namespace, label, container) in
        [(SYSTEM, OPERATOR, "operator"), (field.namespace.as_str(), INJECTED, "tulle-proxy")]
    {
        let pods = field.kube.pods(namespace, label)?;
        ensure!(!pods.is_empty(), "no pod in {namespace} has {label}");
        for pod in pods {
            let logs = field.kube.run(&["-n", namespace, "logs", &pod, "-c", container, &since])?;
            for line in logs.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                // A repeated warning counts as an error, a single one as nothing.
                let weight = match line["level"].as_str() {
                    Some("ERROR") => 2,
                    Some("WARN") => 1,
                    _ => continue,
                };
                *loud.entry(format!("{pod}: {}", line["message"])).or_default() += weight;
            }
        }
    }
    loud.retain(|_, weight| *weight > 1);
    ensure!(loud.is_empty(), "logged within {} s: {loud:?}", WINDOW.as_secs());
    Ok(())
}

/// Applies the policy by which a server denies one client, and whoever has no sidecar.
fn denies(field: &TestNamespace<'_>, server: &str, client: &str) -> Result<()> {
    let deny = json!({"deny": [{"from": [{"serviceAccount": client}]}]});
    field.apply(policy(server, json!({"mtls": "Strict", "access": deny}))).map(drop)
}

/// Waits until a client gets this status from a server.
fn becomes(field: &TestNamespace<'_>, client: &str, server: &str, wanted: &str) -> Result<()> {
    field.kube.wait_for(&format!("{client} to get {wanted} from {server}"), 60, || {
        Ok(field.status(client, &url(field, server))? == wanted)
    })
}

fn url(field: &TestNamespace<'_>, server: &str) -> String {
    format!("http://{server}.{}.svc.cluster.local/", field.namespace)
}
