//! The webhook without what it depends on: its authority, a CRD, the API server.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{SYSTEM, copy_of, has_settings, or_reinstalled, pods, restart, rolled_out};
use crate::install;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::TestNamespace;

/// The Secret with the authority that the webhook's replicas share.
const AUTHORITY: &str = "secret/tulle-webhook-authority";
/// The Deployment of a webhook that cannot reach the API server.
const OUT_OF_REACH: &str = "tulle-webhook-out-of-reach";
/// Longer than kubelet waits before it restarts a container whose liveness probe fails: 3 times 10 s.
const LONG_ENOUGH: Duration = Duration::from_secs(45);

pub(super) fn authority_lost(kube: &Kube) -> Result<()> {
    or_reinstalled(kube, new_authority(kube))
}

fn new_authority(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-ops-authority")?;
    field.injects()?;
    let lost = certificate(kube, AUTHORITY)?;
    kube.run(&["-n", SYSTEM, "delete", AUTHORITY])?;
    kube.wait_for("a new authority in the Secret and in the configurations", 90, || {
        let made = certificate(kube, AUTHORITY)?;
        Ok(made != lost && configured(kube, &made)?)
    })?;
    // A replica that still serves with the lost authority would be called now and then.
    rolled_out(kube, "tulle-webhook")?;
    kube.wait_for("ten pods in a row to get a sidecar", 60, || {
        for _ in 0..10 {
            if !field.injects_now()? {
                return Ok(false);
            }
        }
        Ok(true)
    })?;
    let now = certificate(kube, AUTHORITY)?;
    ensure!(configured(kube, &now)?, "the configurations hold another authority than the Secret again");
    Ok(())
}

pub(super) fn bundle_overwritten(kube: &Kube) -> Result<()> {
    or_reinstalled(kube, repaired(kube))
}

fn repaired(kube: &Kube) -> Result<()> {
    has_settings(kube)?;
    let required = TestNamespace::new(kube, "t-ops-bundle", json!({"tulle.dev/inject": "required"}))?;
    required.injects()?;
    let (ours, foreign) = (certificate(kube, AUTHORITY)?, certificate(kube, "secret/tulle-root")?);
    let hooks = ["/webhooks/0", "/webhooks/1", "/webhooks/2"];
    let patch: Vec<_> = hooks
        .iter()
        .map(|hook| json!({"op": "replace", "path": format!("{hook}/clientConfig/caBundle"), "value": foreign}))
        .collect();
    let patched = kube.run(&[
        "patch",
        "mutatingwebhookconfiguration",
        "tulle",
        "--type=json",
        "-p",
        &json!(patch).to_string(),
        "-o",
        "jsonpath={.webhooks[*].clientConfig.caBundle}",
    ])?;
    ensure!(patched == [&*foreign; 3].join(" "), "the bundles were not overwritten: {patched}");
    kube.wait_for("the webhook's own authority in its configurations", 60, || configured(kube, &ours))?;
    required.injects()
}

pub(super) fn definition_missing(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("it would delete the Canaries of this cluster")) };
    // Canaries of tests that have ended go with their namespaces.
    kube.wait_for("all Canaries to be gone", 60, || {
        Ok(kube.run(&["get", "canaries", "--all-namespaces", "-o", "name"])?.is_empty())
    })?;
    let outcome = without_definition(kube);
    let restored = install::tulle(kube).context("installing Tulle again");
    outcome.and(restored)
}

fn without_definition(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-ops-definition")?;
    kube.run(&["delete", "crd", "canaries.tulle.dev", "--timeout=60s"])?;
    restart(kube, "tulle-webhook")?;
    field.injects()?;
    let replicas = pods(kube, "tulle-webhook")?;
    let restarted = replicas.iter().find(|pod| pod["status"]["containerStatuses"][0]["restartCount"] != 0);
    ensure!(restarted.is_none(), "a replica was restarted: {}", json!(restarted));
    Ok(())
}

pub(crate) fn api_server_out_of_reach(kube: &Kube) -> Result<()> {
    let outcome = alive_and_not_ready(kube);
    let removed = kube.run(&["-n", SYSTEM, "delete", "deployment", OUT_OF_REACH, "--ignore-not-found"]);
    outcome.and(removed.map(drop))
}

fn alive_and_not_ready(kube: &Kube) -> Result<()> {
    let mut copy = copy_of(kube, "tulle-webhook", OUT_OF_REACH)?;
    let environment = copy["spec"]["template"]["spec"]["containers"][0]["env"].as_array_mut();
    // An address that is reserved for documentation and unused (RFC 5737).
    let address = json!({"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.1"});
    environment.context("the webhook has no environment")?.push(address);
    kube.apply(&copy.to_string())?;
    kube.wait_for("the container to run", 60, || {
        Ok(pods(kube, OUT_OF_REACH)?.iter().any(|pod| pod["status"]["phase"] == "Running"))
    })?;
    thread::sleep(LONG_ENOUGH);
    let pod = pods(kube, OUT_OF_REACH)?.pop().context("the webhook's pod is gone")?;
    let status = &pod["status"]["containerStatuses"][0];
    ensure!(status["restartCount"] == 0, "the webhook was restarted: {status}");
    ensure!(
        status["state"]["running"].is_object() && status["ready"] == false,
        "expected a running container that is not ready: {status}"
    );
    let name = pod["metadata"]["name"].as_str().context("the pod has no name")?;
    let get = |path: &str| {
        kube.run(&["get", "--raw", &format!("/api/v1/namespaces/{SYSTEM}/pods/{name}:26161/proxy{path}")])
    };
    let alive = get("/healthz")?;
    ensure!(alive.trim() == "ok", "/healthz answers {alive:?}");
    ensure!(get("/readyz").is_err(), "/readyz succeeds although the webhook cannot list namespaces");
    Ok(())
}

/// The certificate of an authority's Secret, in base64.
fn certificate(kube: &Kube, secret: &str) -> Result<String> {
    let certificate = kube.field(SYSTEM, secret, ".data.ca\\.crt")?;
    ensure!(!certificate.is_empty(), "{secret} has no ca.crt");
    Ok(certificate)
}

/// Whether every hook of both configurations has this authority.
fn configured(kube: &Kube, authority: &str) -> Result<bool> {
    for (kind, hooks) in [("mutatingwebhookconfiguration", 3), ("validatingwebhookconfiguration", 4)] {
        let bundles =
            kube.run(&["get", kind, "tulle", "-o", "jsonpath={.webhooks[*].clientConfig.caBundle}"])?;
        let bundles: Vec<&str> = bundles.split_whitespace().collect();
        if bundles != vec![authority; hooks] {
            return Ok(false);
        }
    }
    Ok(true)
}
