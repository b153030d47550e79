//! Steps that choose requests: insiders first, copies, a switch at once, users that stay with their version. Every
//! response is counted.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{act, canary, condition, deploy, flows, pods_of, reaches, shop, status, watch};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows, deployment};

/// The loads print once a second, so their last line may lack the latest responses.
const PRINTED: Duration = Duration::from_millis(1500);

/// Requests with the header or the cookie reach v2, and no other does.
pub(super) fn insiders(kube: &Kube) -> Result<()> {
    let matches = json!([
        {"header": {"name": "x-group", "exact": "insider"}}, {"cookie": {"name": "group", "exact": "beta"}},
    ]);
    let field = shop(kube, "t-insiders", json!([{"match": matches, "hold": "600s"}]), 30)?;
    load(&field, "insiders", 20, &["--header=X-Group: insider"])?;
    load(&field, "beta", 20, &["--header=cookie: theme=dark; group=beta"])?;
    load(&field, "strangers", 20, &["--header=x-group: outsider", "--header=cookie: group=alpha"])?;
    let all = ["load", "insiders", "beta", "strangers"];
    let before = lost(&field, &all)?;
    deploy(&field, "v2", 0)?;
    flows(&field, "match", 60)?;
    let seen = versions_during(&field, &all, || sent(&field, "insiders", 100))?;
    for (name, versions) in all.iter().zip(&seen) {
        let meant = if ["insiders", "beta"].contains(name) { "v2" } else { "v1" };
        let right = versions.iter().all(|(version, _)| version == meant);
        ensure!(right && !versions.is_empty(), "{name} is to get {meant} only, and got {versions:?}");
    }
    evidence(&field)?;
    act(&field, "abort@1")?;
    reaches(&field, "Failed", 60)?;
    flows(&field, "0%", 60)?;
    let seen = versions_during(&field, &all, || sent(&field, "insiders", 60))?;
    for (name, versions) in all.iter().zip(&seen) {
        ensure!(
            versions.iter().all(|(version, _)| version == "v1"),
            "after the abort {name} got {versions:?}"
        );
    }
    let after = lost(&field, &all)?;
    ensure!(after == before, "requests were lost: {before:?} before and {after:?} after");
    Ok(())
}

/// A fifth of the GETs reach v2 as copies, no POST does, and no client gets an answer of v2. A version that fails its
/// copies is stopped without a lost request.
pub(super) fn copies(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = shop(kube, "t-mirror", json!([{"mirror": 20, "hold": "600s"}]), 30)?;
    field.client("reader")?;
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        flows(&field, "mirror 20%", 60)?;
        let seen = versions_during(&field, &["load"], || {
            let (before, first) = (counted(&field, "v2")?, field.account("load")?.sent);
            sent(&field, "load", 2000)?;
            let (after, last) = (counted(&field, "v2")?, field.account("load")?.sent);
            // Every fourth request is a POST.
            let gets = (last - first) as f64 * 0.75;
            let share = (after.requests - before.requests) as f64 / gets;
            ensure!(
                (0.15..0.25).contains(&share),
                "v2 got copies of {share:.3} of {gets} GETs, expected a fifth"
            );
            ensure!(after.posts == 0, "{} POSTs were copied", after.posts);
            Ok(())
        })?;
        ensure!(seen.iter().flatten().all(|(version, _)| version == "v1"), "clients got {seen:?}");
        evidence(&field)?;
        deploy(&field, "v3", 60)?;
        reaches(&field, "Failed", 120)
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    let versions = field.account("load")?.versions;
    ensure!(versions["v2"].is_null() && versions["v3"].is_null(), "clients got {versions}");
    Ok(())
}

/// All requests switch at once to as many new pods, back at an abort, and to them again until the promotion.
pub(super) fn blue_green(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-blue-green")?;
    field.service("web", 3, &["--version=v1"])?;
    let surge = json!({"spec": {"strategy": {"rollingUpdate": {"maxSurge": "100%"}}}}).to_string();
    field.kubectl(&["patch", "deployment", "web", "--type=merge", "-p", &surge])?;
    field.load("load", "web:80", 100)?;
    let mut canary = canary("web", "Deployment", json!([{"weight": 100, "hold": "40s"}]), 30);
    canary["spec"]["capacity"] = json!({"keepStable": true});
    watch(&field, canary)?;
    let only = |version: &'static str, what: &dyn Fn() -> Result<()>| -> Result<()> {
        let seen = versions_during(&field, &["load"], what)?;
        ensure!(seen.iter().flatten().all(|(found, _)| found == version), "expected {version}, got {seen:?}");
        Ok(())
    };
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        flows(&field, "100%", 90)?;
        let containers = ready(&field, "v2")?.containers;
        ensure!(containers == 3, "the switch came with {containers} pods of v2");
        only("v2", &|| sent(&field, "load", 300))?;
        let (old, new) = (ready(&field, "v1")?, ready(&field, "v2")?);
        ensure!(old.pods == 3 && new.pods == 0, "{} old and {} new pods are ready", old.pods, new.pods);
        act(&field, "abort@1")?;
        reaches(&field, "Failed", 60)?;
        flows(&field, "0%", 60)?;
        only("v1", &|| sent(&field, "load", 300))?;
        let old = ready(&field, "v1")?.pods;
        ensure!(old == 3, "{old} old pods are ready after the abort");
        act(&field, "retry@2")?;
        flows(&field, "100%", 60)?;
        // While the old pods go, nobody is sent back to them.
        only("v2", &|| {
            kube.wait_for("the promotion", 120, || {
                Ok(status(&field, ".history[0].outcome")? == "Promoted"
                    && status(&field, ".phase")? == "Stable")
            })
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    Ok(())
}

/// Users with a cookie jar never see v1 after v2, from the first share to the end of the promotion.
pub(super) fn sticky(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-sticky")?;
    field.service("web", 4, &["--version=v1"])?;
    load(&field, "load", 100, &["--users=50"])?;
    let steps = json!([
        {"weight": 20, "hold": "10s"}, {"weight": 40, "hold": "10s"}, {"weight": 60, "hold": "10s"},
    ]);
    let mut canary = canary("web", "Deployment", steps, 30);
    canary["spec"]["sticky"] = json!({"cookie": "tulle-version"});
    watch(&field, canary)?;
    let total = |which: &str| -> Result<u64> { line(&field, "load")?[which].as_u64().context("no count") };
    ensure!(total("cookies")? == 0, "a cookie was set although nothing is rolled out");
    let (failed, why) = field.failed_during("load", || {
        deploy(&field, "v2", 0)?;
        flows(&field, "40%", 120)?;
        thread::sleep(PRINTED);
        let versions = field.account("load")?.versions;
        ensure!(versions["v2"].as_u64() > Some(0), "no user got v2: {versions}");
        let set = total("cookies")?;
        // Far fewer than the thousands of answers. On a busy machine several requests of a user are under way before the first
        // answer, and each of them gets a cookie.
        ensure!((45..=500).contains(&set), "{set} cookies were set for 50 users");
        kube.wait_for("the promotion", 180, || {
            Ok(status(&field, ".history[0].outcome")? == "Promoted" && status(&field, ".phase")? == "Stable")
        })
    })?;
    ensure!(failed == 0, "{failed} requests were lost: {why}");
    let returned = total("returned")?;
    let first = line(&field, "load")?["first_return"].to_string();
    ensure!(returned == 0, "{returned} times a user came back to a version; the first such user: {first}");
    let set = total("cookies")?;
    sent(&field, "load", 200)?;
    ensure!(total("cookies")? == set, "cookies are set although nothing is rolled out");
    Ok(())
}

/// Starts a load on Service web with further arguments.
fn load(field: &TestNamespace<'_>, name: &str, rate: u32, more: &[&str]) -> Result<()> {
    let mut load = deployment(name, 1, &[]);
    let container = &mut load["spec"]["template"]["spec"]["containers"][0];
    let rate = format!("--rate={rate}");
    let arguments: Vec<&str> =
        ["load", "--target=web:80", rate.as_str()].into_iter().chain(more.iter().copied()).collect();
    container["args"] = json!(arguments);
    container.as_object_mut().context("the Deployment has no container")?.remove("readinessProbe");
    load["spec"]["template"]["spec"]["serviceAccountName"] = json!("default");
    field.apply(load)?;
    field.kube.rolled_out(&field.namespace, &format!("deployment/{name}"), 60)?;
    field.kube.wait_for("the load to start", 60, || Ok(field.account(name)?.ended > 20))
}

/// The last line that a load has printed.
fn line(field: &TestNamespace<'_>, name: &str) -> Result<Value> {
    let text = field.kubectl(&["logs", &format!("deployment/{name}"), "-c", name, "--tail=1"])?;
    serde_json::from_str(text.trim()).with_context(|| format!("load {name} printed {text:?}"))
}

/// Waits until a load has sent so many more requests.
fn sent(field: &TestNamespace<'_>, name: &str, more: u64) -> Result<()> {
    let before = field.account(name)?.sent;
    field.kube.wait_for("more requests", 60, || Ok(field.account(name)?.sent >= before + more))
}

/// How many requests of each load have failed.
fn lost(field: &TestNamespace<'_>, loads: &[&str]) -> Result<Vec<u64>> {
    loads.iter().map(|name| Ok(field.settled(name)?.failed)).collect()
}

/// Responses of each load meanwhile, by version.
fn versions_during(
    field: &TestNamespace<'_>,
    loads: &[&str],
    what: impl FnOnce() -> Result<()>,
) -> Result<Vec<Vec<(String, u64)>>> {
    // What was under way before is counted with what was before.
    thread::sleep(PRINTED);
    let before = loads.iter().map(|name| field.settled(name)).collect::<Result<Vec<_>>>()?;
    what()?;
    let mut seen = Vec::new();
    for (name, before) in loads.iter().zip(before) {
        let after = field.account(name)?.versions;
        let versions = after.as_object().into_iter().flatten().map(|(version, count)| {
            let earlier = before.versions[version].as_u64().unwrap_or(0);
            (version.clone(), count.as_u64().unwrap_or(0).saturating_sub(earlier))
        });
        seen.push(versions.filter(|(_, count)| *count > 0).collect());
    }
    Ok(seen)
}

/// Requests that the pods of a version have got.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    requests: u64,
    /// POSTs among them.
    posts: u64,
}

/// What the pods of a version have counted themselves.
fn counted(field: &TestNamespace<'_>, version: &str) -> Result<Counted> {
    let mut all = Counted::default();
    for pod in pods_of(field, version)? {
        let address = pod["status"]["podIP"].as_str().context("a pod has no address")?;
        let url = format!("http://{address}:8080/count");
        let text = field.exec("reader", &["/usr/bin/curl", "-s", "-m", "8", &url])?;
        let counts: Value =
            serde_json::from_str(&text).with_context(|| format!("{url} answered {text:?}"))?;
        all.requests += counts["requests"].as_u64().context("no count of requests")?;
        all.posts += counts["posts"].as_u64().context("no count of POSTs")?;
    }
    Ok(all)
}

/// Pods of a version.
#[derive(Clone, Copy, Debug, Default)]
struct Ready {
    /// That are ready, which is when Services have them as endpoints.
    pods: usize,
    /// All of whose containers are ready.
    containers: usize,
}

fn ready(field: &TestNamespace<'_>, version: &str) -> Result<Ready> {
    let pods = pods_of(field, version)?;
    let of = |kind: &str| pods.iter().filter(|pod| condition(pod, kind) == "True").count();
    Ok(Ready { pods: of("Ready"), containers: of("ContainersReady") })
}

/// Waits until attempts at the new version are evidence, which they are in blocks of ten seconds.
fn evidence(field: &TestNamespace<'_>) -> Result<()> {
    field.kube.wait_for("attempts at the new version as evidence", 60, || {
        let attempts = status(field, ".evidence.canary.attempts")?;
        Ok(attempts.parse::<u64>().with_context(|| format!("{attempts:?} attempts"))? > 0)
    })
}
