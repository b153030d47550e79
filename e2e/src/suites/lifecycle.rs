//! Start and end of the embedded cluster, tested on others beside the tests' own.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::namespace::{TestNamespace, host_pod, service};
use super::{Skip, Test};
use crate::cluster::Cluster;
use crate::images;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("after xtask is killed while it starts a cluster, down leaves nothing behind", killed),
    (
        "on two nodes, pods reach each other across nodes by Service, and exec and logs work on both",
        two_nodes,
    ),
];

/// A cluster beside the tests' own, with files of its own. Its name must not begin with `node`, as the
/// control groups of the tests' own cluster do.
pub(super) fn second(name: &str) -> (PathBuf, Cluster) {
    let state = PathBuf::from(format!("/var/tmp/tulle-cluster-{name}"));
    let cluster = Cluster::at(&state);
    (state, cluster)
}

fn killed(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("it starts embedded clusters")) };
    let (state, cluster) = second("killed");
    cluster.down()?;
    let mut up = Command::new("/proc/self/exe");
    up.args(["cluster", "up"]).env("TULLE_CLUSTER", &state).stdout(Stdio::null()).stderr(Stdio::null());
    let mut up = up.spawn()?;
    // Until the node's first components run; nothing is ready yet.
    let started = wait(120, || state.join("logs/etcd").exists());
    thread::sleep(Duration::from_millis(500));
    up.kill()?;
    up.wait()?;
    let running = cluster.left_behind().iter().any(|left| left.starts_with("process"));
    gone(&cluster)?;
    ensure!(started && running, "no process was started, so the test proves nothing");
    Ok(())
}

fn two_nodes(kube: &Kube) -> Result<()> {
    let Kube::Embedded(_) = kube else { bail!(Skip("it starts embedded clusters")) };
    let (_, cluster) = second("second");
    let outcome = cluster.up(Some(2)).and_then(|()| across(cluster));
    let down = gone(&second("second").1);
    outcome.and(down)
}

fn across(cluster: Cluster) -> Result<()> {
    cluster.load(&images::archive(&images::EMPTY)?)?;
    let kube = Kube::Embedded(cluster);
    let field = TestNamespace::plain(&kube, "t-nodes")?;
    field.apply(service("web", json!({})))?;
    // In a cluster that is seconds old, a namespace has no service account yet.
    kube.wait_for("the service account default", 60, || {
        Ok(field.kubectl(&["get", "serviceaccount", "default"]).is_ok())
    })?;
    let serve = ["/usr/bin/python3", "-m", "http.server", "8080", "--directory", "/etc/apt"];
    for (name, node, command) in [
        ("web", "node-2", &serve[..]),
        ("client", "node", &["/usr/bin/sleep", "1000"]),
        ("far", "node-2", &["/usr/bin/sleep", "1000"]),
    ] {
        let mut pod = host_pod(name, "default", command);
        pod["spec"]["nodeName"] = json!(node);
        pod["metadata"]["labels"] = json!({"app": name});
        field.apply(pod)?;
        field.ready(name)?;
    }
    for client in ["client", "far"] {
        kube.wait_for(&format!("an answer to {client}"), 60, || {
            Ok(field.status(client, "http://web.t-nodes.svc.cluster.local/")? == "200")
        })?;
    }
    let address = field.get("pod/client", ".status.podIP")?;
    let ping = format!("exec 3<>/dev/tcp/{address}/1 || true");
    let refused = field.exec("far", &["/bin/bash", "-c", &format!("timeout 3 bash -c '{ping}' 2>&1")])?;
    ensure!(refused.contains("refused"), "node-2 does not reach pods of the first node: {refused}");
    ensure!(field.kubectl(&["logs", "web"])?.contains("GET /"), "no logs from node-2");
    Ok(())
}

/// Takes a cluster down; fails if anything of it is left.
pub(super) fn gone(cluster: &Cluster) -> Result<()> {
    cluster.down()?;
    let left = cluster.left_behind();
    ensure!(left.is_empty(), "down left behind: {}", left.join(", "));
    Ok(())
}

fn wait(seconds: u64, holds: impl Fn() -> bool) -> bool {
    (0..seconds * 10).any(|_| {
        thread::sleep(Duration::from_millis(100));
        holds()
    })
}
