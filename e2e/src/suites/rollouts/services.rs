//! Rollouts behind every kind of Service.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{canary, deploy, flows, reaches, reported, status, watch};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows, deployment, host_pod, service};

/// A server that speaks first and then closes; with argument `reset` it resets every connection instead.
const GREETS: &str = "import socket, struct, sys
server = socket.create_server(('0.0.0.0', 8080), backlog=128)
while True:
    connection, _ = server.accept()
    if sys.argv[1] == 'reset':
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    else:
        connection.sendall(sys.argv[1].encode())
    connection.close()";

/// Connects to the server, some fifty times per second.
const CONNECTS: &str = "import socket, time
while True:
    try:
        with socket.create_connection(('web', 80), timeout=5) as connection:
            connection.recv(100)
    except OSError:
        pass
    time.sleep(0.02)";

pub(super) fn tcp(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-tcp")?;
    let port = json!({"name": "greeting", "port": 80, "targetPort": 8080, "appProtocol": "tcp"});
    field.apply(service("web", json!({"ports": [port]})))?;
    field.apply(greeter("v1"))?;
    kube.rolled_out("t-tcp", "deployment/web", 120)?;
    field.host_pod("client", "default", &["/usr/bin/python3", "-c", CONNECTS])?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 50, "hold": "5s"}]), 30))?;
    field.apply(greeter("v2"))?;
    kube.wait_for("the promotion of v2", 90, || {
        Ok(status(&field, ".history[0].outcome")? == "Promoted" && status(&field, ".phase")? == "Stable")
    })?;
    field.apply(greeter("reset"))?;
    reaches(&field, "Failed", 90)
}

/// Deployment web of servers that speak first.
fn greeter(version: &str) -> Value {
    let pod = host_pod("web", "default", &["/usr/bin/python3", "-c", GREETS, version]);
    let mut web = deployment("web", 2, &[]);
    let template = &mut web["spec"]["template"];
    template["spec"] = pod["spec"].clone();
    template["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
    web
}

pub(super) fn affinity(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-affinity")?;
    field.service("web", 4, &["--version=v1"])?;
    field.apply(service("web", json!({"sessionAffinity": "ClientIP"})))?;
    field.client("client")?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 50, "hold": "600s"}]), 10))?;
    kube.wait_for("a client at rest to stay with its pod", 60, || {
        let pods = distinct(&field, "pod")?;
        Ok(pods.len() == 1)
    })?;
    deploy(&field, "v2", 0)?;
    flows(&field, "50%", 90)?;
    let versions = distinct(&field, "version")?;
    ensure!(versions.len() == 1, "one client got several versions: {versions:?}");
    Ok(())
}

/// The different values of a field in thirty answers to the client, each over a connection of its own.
fn distinct(field: &TestNamespace<'_>, name: &str) -> Result<BTreeSet<String>> {
    let url = format!("http://web.{}.svc.cluster.local/", field.namespace);
    let ask = format!("for i in $(seq 30); do curl -s -m 8 {url}; echo; done");
    let answers = field.exec("client", &["/bin/sh", "-c", &ask])?;
    let mut seen = BTreeSet::new();
    for line in answers.lines().filter(|line| !line.trim().is_empty()) {
        let answer: Value = serde_json::from_str(line).with_context(|| format!("the client got {line:?}"))?;
        seen.insert(answer[name].to_string());
    }
    ensure!(!seen.is_empty(), "the client got no answer");
    Ok(seen)
}

pub(super) fn headless(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-split-headless")?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "web"}}))?;
    field.apply(service("web-by-pod", json!({"clusterIP": "None", "selector": {"app": "web"}})))?;
    field.apply(deployment("web", 2, &["--version=v1"]))?;
    kube.rolled_out("t-split-headless", "deployment/web", 120)?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 50, "hold": "2s"}]), 10))?;
    deploy(&field, "v2", 0)?;
    kube.wait_for("the condition that names the Service", 60, || {
        let (split, message) = reported(&field, "Split")?;
        Ok(split == "False" && message.contains("web-by-pod"))
    })?;
    let reason = status(&field, ".conditions[?(@.type==\"Split\")].reason")?;
    ensure!(reason == "NoSplit", "the reason is {reason}");
    let (phase, shown) = (status(&field, ".phase")?, status(&field, ".weightSummary")?);
    ensure!(phase == "Progressing", "the rollout is not held: it is {phase}");
    ensure!(shown == "0%", "the weight shown is {shown}, and nothing is split");
    Ok(())
}

pub(super) fn two_workloads(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-two")?;
    for (name, version) in [("web", "--version=v1"), ("other", "--version=other")] {
        field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}))?;
        let mut workload = deployment(name, 2, &[version]);
        workload["spec"]["template"]["metadata"]["labels"]["group"] = json!("both");
        field.apply(workload)?;
    }
    field.apply(service("both", json!({"selector": {"group": "both"}})))?;
    kube.rolled_out("t-two", "deployment/web", 120)?;
    kube.rolled_out("t-two", "deployment/other", 120)?;
    field.load("load", "both:80", 100)?;
    watch(&field, canary("web", "Deployment", json!([{"weight": 50, "hold": "600s"}]), 10))?;
    deploy(&field, "v2", 0)?;
    flows(&field, "50%", 60)?;
    let before = field.account("load")?;
    let mut after = before.clone();
    kube.wait_for("800 answers", 60, || {
        after = field.account("load")?;
        Ok(after.ended >= before.ended + 800)
    })?;
    let counted = |version: &str| {
        let of = |versions: &Value| versions[version].as_u64().unwrap_or(0);
        of(&after.versions).saturating_sub(of(&before.versions))
    };
    let (v1, v2, other) = (counted("v1"), counted("v2"), counted("other"));
    // Half of the Service's requests are the other workload's, whose version is none of the Canary's business.
    let all = (v1 + v2 + other) as f64;
    let (of_web, of_other) = (v2 as f64 / (v1 + v2).max(1) as f64, other as f64 / all.max(1.0));
    ensure!((0.38..0.62).contains(&of_web), "v2 got {v2} and v1 {v1} requests, expected one half each");
    ensure!((0.30..0.62).contains(&of_other), "the other workload got {other} of {all} requests");
    Ok(())
}
