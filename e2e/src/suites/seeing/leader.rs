//! What sidecars have counted survives the leader.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{WINDOW, agrees, enforced, find, fresh, requests, row};
use crate::host;
use crate::kubectl::Kube;
use crate::progress::say;
use crate::suites::Skip;
use crate::suites::admission::process_with;
use crate::suites::mesh::policy;
use crate::suites::namespace::{TestNamespace, deployment};

/// Requests in a second.
const RATE: u32 = 50;
/// How many seconds of requests may be missing at a new leader. What it lacks is what the old one has acknowledged since the
/// last copy. That copy is two seconds old at most, and one report may have been acknowledged since, which has up to seven
/// seconds of requests: sidecars report five seconds after the last report, a fifth more at most, and look once in a second
/// whether it is time. The tenth second is for the way of both.
///
/// This is what a leader may lose that dies.
const MISSING: f64 = 10.0;
/// The same of one that is deleted. It sends the rest before it goes; what comes later is reported to its successor. A second
/// is less than one report has.
const MISSING_AFTER_STOP: f64 = 1.0;
/// The load has run for so many seconds before. A leader without the past would miss them.
const PAST: u64 = 45;

/// When a Lease that is not renewed has expired.
const LEASE: Duration = Duration::from_secs(8);
const RESTARTS: &str = ".status.containerStatuses[0].restartCount";

/// How the leader ends.
type End = fn(&Kube, &str) -> Result<()>;

pub(crate) fn survives(kube: &Kube) -> Result<()> {
    lacks_little(kube, MISSING_AFTER_STOP, |kube, leader| {
        kube.run(&["-n", "tulle-system", "delete", "pod", leader, "--wait=false"]).map(drop)
    })
}

/// Its container is restarted before its Lease expires, in the same pod: the new process must not lead with nothing while
/// the other replica has a copy.
pub(crate) fn survives_a_crash(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("the operator's process is in reach on its node only")) };
    lacks_little(kube, MISSING, |kube, leader| {
        let Kube::Embedded(cluster) = kube else { bail!("not the embedded cluster") };
        let process = process_with(cluster, &format!("TULLE_POD_NAME={leader}"))?;
        let restarts = || kube.field("tulle-system", &format!("pod/{leader}"), RESTARTS);
        let (before, kill) = (restarts()?, format!("kill -KILL {process}"));
        host::output(cluster.inside("/bin/sh")?.args(["-c", &kill]))?;
        let killed = Instant::now();
        kube.wait_for("the restart of the leader's container", 60, || Ok(restarts()? != before))?;
        if killed.elapsed() > LEASE {
            say(
                "        the container was restarted after its Lease had expired: another replica led by then anyway",
            );
        }
        Ok(())
    })
}

fn lacks_little(kube: &Kube, most: f64, end: End) -> Result<()> {
    let field = TestNamespace::meshed(kube, &fresh("t-see-leader"))?;
    kube.rolled_out("tulle-system", "deployment/tulle-operator", 120)?;
    field.service("web", 1, &[])?;
    field.load("load", "web:80", RATE)?;
    let denied = denied(&field)?;
    let rate = sends_meanwhile(&field, || {
        has_past(&field)?;
        changes_leader(&field, end)
    })?;
    ensure!(denials(&field)?.contains(&denied), "the new leader does not list denial {denied}");
    field.kubectl(&["scale", "deployment", "load", "--replicas=0"])?;
    kube.wait_for("the load to end", 60, || Ok(field.pods("load")?.is_empty()))?;
    all_is_reported(&field)?;

    let counted = application(&field)?;
    let known = requests(&row(&field, "workload", "web")?);
    ensure!(known <= counted, "{known} requests are known, but the application has got {counted}");
    let missing = counted - known;
    // By the requests themselves: a machine that is busy makes neither of the two more.
    let seconds = missing as f64 / rate;
    say(&format!(
        "        the new leader lacks {missing} of {counted} requests, those of {seconds:.1} s at {rate:.1} in a second (goal: {most} s)"
    ));
    ensure!(
        seconds <= most,
        "the application has counted {counted} requests, the leader knows {known}: those of {seconds:.1} s are missing, at {rate:.1} in a second"
    );
    kube.rolled_out("tulle-system", "deployment/tulle-operator", 120)
}

/// Has a request refused, by a Service that counts for nothing else. Returns the id of the denial, as soon as the leader lists
/// it: by the end of that leader, it has been copied.
fn denied(field: &TestNamespace<'_>) -> Result<String> {
    field.service("closed", 1, &[])?;
    let spec = json!({"target": {"kind": "Service", "name": "closed"}, "access": {"allow": []}});
    policy(field, "closed", spec)?;
    enforced(field, "closed")?;
    let ask = ["exec", "deployment/load", "-c", "load", "--", "/program", "get", "closed:80"];
    let answer = field.kubectl(&ask)?;
    ensure!(answer.starts_with("403 "), "closed answers {answer:?} to what is denied");
    let mut found = Vec::new();
    field.kube.wait_for("the denial to be listed", 60, || {
        found = denials(field)?;
        Ok(!found.is_empty())
    })?;
    found.pop().context("no denial is listed")
}

/// The ids of the denials at `closed`.
fn denials(field: &TestNamespace<'_>) -> Result<Vec<String>> {
    let found = field.kube.tulle_json(&["-n", &field.namespace, "denials", "closed"])?;
    let rows = found["rows"].as_array().context("the answer has no rows")?;
    Ok(rows.iter().filter_map(|row| row["id"].as_str().map(str::to_owned)).collect())
}

/// Does something under the load. Returns how many requests it really sent in a second meanwhile.
fn sends_meanwhile(field: &TestNamespace<'_>, what: impl FnOnce() -> Result<()>) -> Result<f64> {
    let now = || Ok::<_, anyhow::Error>((field.account("load")?.sent, Instant::now()));
    let (sent, since) = now()?;
    what()?;
    let (sent_then, then) = now()?;
    ensure!(sent_then > sent, "the load has sent nothing since its {sent} requests");
    Ok((sent_then - sent) as f64 / then.duration_since(since).as_secs_f64())
}

/// Waits for requests that a leader which begins with nothing would not know.
fn has_past(field: &TestNamespace<'_>) -> Result<()> {
    let past = u64::from(RATE) * PAST;
    field.kube.wait_for("a past that a new leader could lack", PAST + 60, || {
        Ok(field.account("load")?.ended > past)
    })?;
    agrees(field, "load", "workload", "web").map(drop)
}

/// Ends the leader, and waits until another has led for a while.
fn changes_leader(field: &TestNamespace<'_>, end: End) -> Result<()> {
    let kube = field.kube;
    let before = leader(kube)?;
    end(kube, &before)?;
    kube.wait_for("another leader to answer", 60, || {
        // Not the one that has ended.
        let version = kube.tulle_json(&["-n", &field.namespace, "version"])?;
        Ok(version["operator"]["leader"] == true && version["operator"]["pod"] != before.as_str())
    })?;
    let then = field.account("load")?.ended;
    kube.wait_for("requests under the new leader", 60, || {
        Ok(field.account("load")?.ended > then + u64::from(RATE) * 10)
    })
}

/// Sends a last request, from a pod without a sidecar, and waits until it is known. A report has all that a sidecar has
/// counted by then, and the next one is sent only when it has been acknowledged: of what `web` has served, nothing is under
/// way any more.
fn all_is_reported(field: &TestNamespace<'_>) -> Result<()> {
    let mut stranger = deployment("stranger", 1, &[]);
    let template = &mut stranger["spec"]["template"];
    template["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
    template["spec"]["serviceAccountName"] = json!("default");
    field.apply(stranger)?;
    field.kube.rolled_out(&field.namespace, "deployment/stranger", 60)?;
    let ask = ["exec", "deployment/stranger", "-c", "stranger", "--", "/program", "get", "web:80"];
    let answer = field.kubectl(&ask)?;
    ensure!(answer.starts_with("200 "), "web answers the last request {answer:?}");
    field.kube.wait_for("the last request to be known", 60, || {
        let all = field.kube.tulle_json(&["-n", &field.namespace, "edges", "--window", WINDOW])?;
        let edge = find(&all["edges"], |edge| edge["source"]["kind"] == "Plain");
        Ok(edge["destination"]["name"] == "web" && requests(&edge) > 0)
    })
}

/// The pod of the leading replica; empty where none leads.
pub(super) fn leader(kube: &Kube) -> Result<String> {
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
