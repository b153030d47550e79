//! Tulle's own workloads, changed while they are in use: restarts, drains, lost Secrets, settings.
//!
//! Runs alone: each test changes the installation that the others use, and restores it, also when it fails.
//!
//! ```text
//!   admission  pods are created while the webhook restarts, or its node is drained
//!   webhook    its authority, the CRDs that it watches, its API server
//!   operator   the Lease, readiness, MeshConfig
//! ```

pub(super) mod admission;
pub(super) mod operator;
pub(super) mod webhook;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Test;
use super::seeing;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("while the webhook restarts, every new pod is admitted with a sidecar", admission::restarted),
    (
        "when the authority's Secret is lost, the configurations get a new authority and pods are injected",
        webhook::authority_lost,
    ),
    ("a caBundle that somebody else has overwritten is repaired", webhook::bundle_overwritten),
    (
        "without the CRD canaries.tulle.dev the webhook starts, becomes ready and injects",
        webhook::definition_missing,
    ),
    (
        "when the leader's pod is deleted, it releases the Lease, which another replica takes",
        operator::leader_deleted,
    ),
    (
        "a user's MeshConfig takes effect over the default without a conflict; deletion restores the default",
        operator::users_settings,
    ),
    ("history survives a change of leader", seeing::leader::survives),
    (
        "history survives a leader that crashes and is restarted in its place",
        seeing::leader::survives_a_crash,
    ),
    ("the commands change nothing", seeing::quiet::changes_nothing),
    (
        "a trace shows the client, both sidecars and every attempt; with a share of 0% only sampled parents are followed",
        seeing::traces::shows,
    ),
    ("while the collector is away no request fails, and dropped spans are counted", seeing::traces::absent),
];

/// Tulle's own namespace.
const SYSTEM: &str = "tulle-system";

/// The pods of a workload of Tulle that have not been deleted.
fn pods(kube: &Kube, app: &str) -> Result<Vec<Value>> {
    let pods = kube.json(&["-n", SYSTEM, "get", "pods", "-l", &format!("app={app}")])?;
    let pods = pods["items"].as_array().context("kubectl returned no list of pods")?;
    Ok(pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null()).cloned().collect())
}

fn rolled_out(kube: &Kube, deployment: &str) -> Result<()> {
    kube.rolled_out(SYSTEM, &format!("deployment/{deployment}"), 120)
}

fn restart(kube: &Kube, deployment: &str) -> Result<()> {
    kube.run(&["-n", SYSTEM, "rollout", "restart", &format!("deployment/{deployment}")])?;
    rolled_out(kube, deployment)
}

/// Waits for the MeshConfig, without which `required` namespaces admit no pod: where there is none, the operator creates
/// one after a while.
fn has_settings(kube: &Kube) -> Result<()> {
    kube.wait_for("MeshConfig mesh to be ready", 60, || {
        Ok(kube.run(&["wait", "--for=condition=Ready", "--timeout=1s", "meshconfig/mesh"]).is_ok())
    })
}

/// A Deployment of Tulle under another name: one replica, behind no Service.
fn copy_of(kube: &Kube, deployment: &str, name: &str) -> Result<Value> {
    let original = kube.json(&["-n", SYSTEM, "get", "deployment", deployment])?;
    let mut template = original["spec"]["template"].clone();
    template["metadata"]["labels"] = json!({"app": name});
    template["spec"].as_object_mut().context("the template has no spec")?.remove("affinity");
    Ok(json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": SYSTEM},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template},
    }))
}

/// Installs Tulle again if a test has failed, because it may have left Tulle in any state.
fn or_reinstalled(kube: &Kube, outcome: Result<()>) -> Result<()> {
    outcome.or_else(|error| {
        install::tulle(kube).with_context(|| format!("installing Tulle again after: {error:#}"))?;
        Err(error)
    })
}
