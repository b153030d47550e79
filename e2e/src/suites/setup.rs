//! `tulle install`, `tulle upgrade` and `tulle uninstall` on a cluster without a way out: the embedded cluster's network
//! namespace has no default route, so that an installation that needed anything but its images would fail here.
//!
//! Runs alone: it removes the Tulle that the other suites use, and installs it again.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::faults::{left_of_tulle, scale};
use super::namespace::TestNamespace;
use super::{Skip, Test};
use crate::cli::exit;
use crate::host;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[(
    "tulle uninstall spares pods with a sidecar, works while the operator is dead, and what tulle install applies without any egress is what it prints",
    lifecycle,
)];

/// The images of the tests are on the node, and in no registry.
const DEVELOPMENT: &str = "--allow-development-images";

fn lifecycle(kube: &Kube) -> Result<()> {
    if matches!(kube, Kube::Context(_)) {
        bail!(Skip("the test would remove Tulle and its objects from this cluster"));
    }
    let outcome = removed(kube).and_then(|()| installed(kube));
    // Their sidecars have certificates of a root that is gone.
    let cleared = kube.run(&["delete", "namespace", "t-setup", "t-setup-new", "--ignore-not-found"]);
    let restored =
        cleared.and_then(|_| install::tulle(kube)).context("installing Tulle again with kustomize");
    outcome.and(restored)
}

/// Uninstalls while pods have a sidecar, one is held by a Canary, and nobody answers for the operator.
fn removed(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-setup")?;
    field.injects()?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let canary = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}, "steps": [{"pause": {}}]}});
    field.apply(canary)?;
    kube.wait_for("the Canary to know its version", 60, || {
        Ok(!field.get("canary/web", ".status.approvedRevision")?.is_empty())
    })?;

    let refused = kube.tulle_expecting(exit::FAILED, &["uninstall", "--apply"])?;
    for part in ["pods have a sidecar", "t-setup/web-", "t-setup/client", "would wait for one", "--force"] {
        ensure!(refused.stderr.contains(part), "tulle uninstall does not say {part:?}: {}", refused.stderr);
    }
    field.injects().context("the uninstall that was refused has changed something")?;

    scale(kube, "tulle-operator", 0)?;
    // Nobody opens the gate of the new version's pod.
    let template = r#"{"spec":{"template":{"metadata":{"annotations":{"setup":"second"}}}}}"#;
    field.kubectl(&["patch", "deployment", "web", "--type=merge", "-p", template])?;
    kube.wait_for("the pod of the new version", 60, || Ok(field.pods("web")?.len() == 2))?;
    let printed = kube.tulle(&["uninstall", "--force"])?;
    for part in
        ["kubectl delete mutatingwebhookconfiguration", "kubectl patch pod", "kubectl delete namespace"]
    {
        ensure!(printed.contains(part), "tulle uninstall does not print {part:?}:\n{printed}");
    }
    let done = kube.tulle(&["uninstall", "--apply", "--force"])?;
    ensure!(done.contains("opened the readiness gate"), "no gate was opened:\n{done}");
    is_gone(kube)?;
    // The pod itself waits for a certificate, as the refusal says of pods that start now.
    let gates = "jsonpath={.items[*].status.conditions[?(@.type==\"tulle.dev/approved\")].status}";
    let gates = field.kubectl(&["get", "pods", "-l", "app=web", "-o", gates])?;
    ensure!(gates == "True", "the gate of the new version's pod: {gates:?}");
    let status = field.status("client", "http://web.t-setup.svc.cluster.local/")?;
    ensure!(status == "200", "without a control plane the client gets {status:?}");
    let again = kube.tulle(&["uninstall", "--apply", "--force"])?;
    ensure!(!again.contains("deleted "), "the second time tulle uninstall deletes:\n{again}");
    kube.run(&["delete", "namespace", "t-setup"]).map(drop)
}

/// Installs, upgrades and uninstalls.
fn installed(kube: &Kube) -> Result<()> {
    without_egress(kube).context("before tulle install")?;
    let refused = kube.tulle_expecting(exit::FAILED, &["install", "--apply"])?;
    ensure!(refused.stderr.contains("--registry"), "images of a development build: {}", refused.stderr);
    let report = kube.tulle(&["install", "--apply", DEVELOPMENT])?;
    let field = TestNamespace::meshed(kube, "t-setup-new")?;
    field.injects().with_context(|| format!("after tulle install, which printed:\n{report}"))?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    called(&field)?;
    without_egress(kube).context("after tulle install")?;
    unchanged(kube)?;

    kube.tulle(&["upgrade", "--apply", DEVELOPMENT])?;
    unchanged(kube)?;
    field.injects()?;
    called(&field)?;
    let seen = kube.tulle(&["stat", "-n", "t-setup-new"])?;
    ensure!(seen.contains("web"), "tulle stat after the upgrade:\n{seen}");

    kube.run(&["delete", "namespace", "t-setup-new"])?;
    kube.tulle(&["uninstall", "--apply"])?;
    is_gone(kube)
}

/// Fails if the node could reach an address outside the cluster: one that is reserved for documentation, like every other.
fn without_egress(kube: &Kube) -> Result<()> {
    for (family, outside) in [("-4", "192.0.2.1"), ("-6", "2001:db8::1")] {
        let routes = host::output(kube.program("ip")?.args([family, "route", "show"]))?;
        let ways: Vec<&str> = routes.lines().filter(|route| route.starts_with("default")).collect();
        ensure!(ways.is_empty(), "the node has a default route: {ways:?}");
        // `ip` ends with an error where there is no route, and would also if it had not found the node.
        ensure!(family == "-6" || routes.contains("dev node0"), "these are not the node's routes: {routes}");
        let found = host::output(kube.program("ip")?.args([family, "route", "get", outside]));
        ensure!(found.is_err(), "the node has a route to {outside}: {found:?}");
    }
    Ok(())
}

/// Fails unless what runs is what `tulle install` prints: no controller has changed a field of it.
fn unchanged(kube: &Kube) -> Result<()> {
    let manifests = kube.tulle(&["install", DEVELOPMENT])?;
    let differences = kube.differences(&manifests)?;
    ensure!(differences.is_empty(), "what is installed differs from what is printed:\n{differences}");
    let preview = kube.tulle(&["upgrade", DEVELOPMENT, "--no-headers"])?;
    let changed: Vec<&str> = preview.lines().filter(|line| !line.ends_with("unchanged")).collect();
    ensure!(changed.is_empty(), "tulle upgrade would change {changed:?}");
    Ok(())
}

/// Fails unless the client reaches the server over mTLS: the identity in the answer is from its certificate.
fn called(field: &TestNamespace<'_>) -> Result<()> {
    let url = "http://web.t-setup-new.svc.cluster.local/";
    let answer = field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", url])?;
    let client = "spiffe://cluster.local/ns/t-setup-new/sa/client";
    ensure!(answer.contains(client), "expected an answer to {client}, found {answer:?}");
    Ok(())
}

/// Waits until nothing of Tulle is left.
fn is_gone(kube: &Kube) -> Result<()> {
    let mut left = Vec::new();
    let gone = kube.wait_for("nothing of Tulle to be left", 120, || {
        left = left_of_tulle(kube)?;
        Ok(left.is_empty())
    });
    gone.with_context(|| format!("objects left: {left:?}"))
}
