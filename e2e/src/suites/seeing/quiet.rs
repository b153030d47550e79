//! Commands that only look leave everything as it is, and open no stream in a sidecar's name.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Scratch, enforced};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::{TestNamespace, deployment};

/// Kinds whose objects are compared, besides the namespace. Not Leases and events, which others write.
const KINDS: &str = "pods,services,endpointslices,serviceaccounts,configmaps,deployments,replicasets,\
    meshpolicies,canaries,roles,rolebindings";

pub(crate) fn changes_nothing(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-quiet")?;
    let scratch = Scratch::new("quiet")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    ensure!(field.status("client", "http://web/")? == "200", "no answer");
    let deny = json!({"target": {"kind": "Service", "name": "web"}, "access": {"deny": [{"from": [{"serviceAccount": "nobody"}]}]}});
    policy(&field, "web", deny)?;
    enforced(&field, "web")?;
    field.apply(json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "Canary", "metadata": {"name": "web"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}, "steps": [{"weight": 50, "hold": "5s"}]}}))?;
    kube.wait_for("the Canary", 60, || Ok(field.get("canary/web", ".status.phase")? == "Stable"))?;
    let before = calm(&field)?;
    let streams = streams(kube)?;
    let pods = field.pods("web")?;
    let pod = pods.first().context("web has no pod")?;
    look(&field, &scratch, pod)?;
    let after = versions(&field)?;
    let changed: Vec<&String> =
        before.keys().chain(after.keys()).filter(|name| before.get(*name) != after.get(*name)).collect();
    ensure!(changed.is_empty(), "the commands have changed {changed:?}");
    let now = self::streams(kube)?;
    // Fewer, where pods of an earlier test end meanwhile.
    ensure!(now <= streams, "{streams} sidecars were connected, now {now}");
    Ok(())
}

/// Runs every command that only looks.
fn look(field: &TestNamespace<'_>, scratch: &Scratch, pod: &str) -> Result<()> {
    let manifests = scratch.file(
        "all.yaml",
        &format!(
            "{}\n---\n{}\n",
            deployment("web", 1, &[]),
            json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "new"},
                "spec": {"target": {"kind": "Service", "name": "web"}, "mtls": "Strict"}})
        ),
    )?;
    let report = scratch.path("report")?;
    let commands: &[&[&str]] = &[
        &["check"],
        &["stat"],
        &["stat", "svc", "--window", "10m"],
        &["edges"],
        &["routes"],
        &["tap", "web", "--timeout", "3s"],
        &["pods", "-o", "wide"],
        &["config", pod],
        &["config", pod, "--diff"],
        &["explain", "client", "web"],
        &["access", "who-can", "web"],
        &["access", "suggest"],
        &["diff", "-f", &manifests],
        &["lint", "--with-cluster", "-f", &manifests],
        &["inject", "-f", &manifests],
        &["canary", "list"],
        &["canary", "get", "web"],
        &["canary", "status", "web", "--watch", "--timeout", "60s"],
        &["report", &report],
        &["version"],
        &["completion", "bash"],
        &["install"],
    ];
    for &command in commands {
        let scope: &[&str] = if command == ["install"] { &[] } else { &["-n", &field.namespace] };
        let printed = field.kube.tulle_ended(&[scope, command].concat())?;
        ensure!(
            [exit::FINE, exit::FINDINGS].contains(&printed.code),
            "{}: exit code {}\n{}{}",
            command.join(" "),
            printed.code,
            printed.stdout,
            printed.stderr
        );
        let silent = printed.stdout.is_empty()
            && !["lint", "access", "report"].iter().any(|name| command.contains(name));
        ensure!(!silent, "{} prints nothing", command.join(" "));
    }
    Ok(())
}

/// The versions of the namespace's objects, once nobody changes them any more.
fn calm(field: &TestNamespace<'_>) -> Result<BTreeMap<String, String>> {
    let mut last = versions(field)?;
    let mut same = 0;
    field.kube.wait_for("the namespace to become calm", 90, || {
        let now = versions(field)?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        // Five seconds: statuses are written within two.
        Ok(same >= 10)
    })?;
    Ok(last)
}

/// Kind and name of each object, and its version.
fn versions(field: &TestNamespace<'_>) -> Result<BTreeMap<String, String>> {
    let line = "{range .items[*]}{.kind}/{.metadata.name} {.metadata.resourceVersion}{\"\\n\"}{end}";
    let mut text = field.kubectl(&["get", KINDS, "-o", &format!("jsonpath={line}")])?;
    let namespace = "jsonpath=Namespace/{.metadata.name} {.metadata.resourceVersion}";
    let version = field.kube.run(&["get", "namespace", &field.namespace, "-o", namespace])?;
    text.push_str(&version);
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    Ok(lines.map(|(name, version)| (name.to_owned(), version.to_owned())).collect())
}

/// How many sidecars the leader counts as connected.
fn streams(kube: &Kube) -> Result<u64> {
    let lease = kube.json(&["-n", "tulle-system", "get", "lease", "tulle-operator"])?;
    let holder = lease["spec"]["holderIdentity"].as_str().unwrap_or("");
    let pod = holder.split('/').next().unwrap_or("");
    let path = format!("/api/v1/namespaces/tulle-system/pods/{pod}:26161/proxy/metrics");
    let metrics = kube.run(&["get", "--raw", &path])?;
    let line = metrics.lines().find(|line| line.starts_with("tulle_operator_sidecars "));
    let count = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    count.with_context(|| format!("the leader does not say how many sidecars there are: {metrics}"))
}
