//! What sidecars have counted survives the leader.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{agrees, fresh, requests, row};
use crate::kubectl::Kube;
use crate::suites::namespace::TestNamespace;

/// Requests in a second.
const RATE: u32 = 50;
/// How many seconds of requests may be missing at a new leader. Its copy is two seconds old at most, and a report has up to
/// seven seconds of requests; the rest is for a busy machine, on which both are late.
const MISSING: u64 = 15;
/// The load has run for so many seconds before. A leader without the past would miss them.
const PAST: u64 = 45;

pub(crate) fn survives(kube: &Kube) -> Result<()> {
    let rate = u64::from(RATE);
    let field = TestNamespace::meshed(kube, &fresh("t-see-leader"))?;
    kube.rolled_out("tulle-system", "deployment/tulle-operator", 120)?;
    field.service("web", 1, &[])?;
    field.load("load", "web:80", RATE)?;
    let sent = || Ok::<_, anyhow::Error>(field.account("load")?.ended);
    kube.wait_for("a past that a new leader could lack", PAST + 60, || Ok(sent()? > rate * PAST))?;
    agrees(&field, "load", "workload", "web")?;
    let before = leader(kube)?;
    kube.run(&["-n", "tulle-system", "delete", "pod", &before, "--wait=false"])?;
    kube.wait_for("another leader to answer", 60, || {
        // Not the one that was deleted.
        let version = kube.tulle_json(&["-n", &field.namespace, "version"])?;
        Ok(version["operator"]["leader"] == true && version["operator"]["pod"] != before.as_str())
    })?;
    let then = sent()?;
    kube.wait_for("requests under the new leader", 60, || Ok(sent()? > then + rate * 10))?;
    field.kubectl(&["scale", "deployment", "load", "--replicas=0"])?;
    kube.wait_for("the load to end", 60, || Ok(field.pods("load")?.is_empty()))?;
    let counted = application(&field)?;
    let mut known = 0;
    let waited = kube.wait_for("the counts of before at the new leader", 60, || {
        known = requests(&row(&field, "workload", "web")?);
        Ok(known + rate * MISSING >= counted)
    });
    waited.with_context(|| format!("the application has counted {counted}, the leader knows {known}"))?;
    ensure!(known <= counted, "{known} requests are known, but the application has got {counted}");
    kube.rolled_out("tulle-system", "deployment/tulle-operator", 120)
}

/// The pod of the leading replica; empty where none leads.
fn leader(kube: &Kube) -> Result<String> {
    let holder = kube.field("tulle-system", "lease/tulle-operator", ".spec.holderIdentity")?;
    Ok(holder.split('/').next().unwrap_or("").to_owned())
}

/// The requests that the application itself has counted.
fn application(field: &TestNamespace<'_>) -> Result<u64> {
    let ask =
        ["exec", "deployment/web", "-c", "web", "--", "/program", "get", "127.0.0.1:8080", "--path=/count"];
    let printed = field.kubectl(&ask)?;
    let counts = printed.trim().strip_prefix("200 ").with_context(|| format!("it answers {printed:?}"))?;
    let counts: Value = serde_json::from_str(counts)?;
    counts["requests"].as_u64().context("it has not counted its requests")
}
