//! The embedded cluster itself: what Kubernetes does without Tulle.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use super::namespace::TestNamespace;
use super::{Skip, Test};
use crate::host;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("pods find Services by name, and the node reaches pods", services_and_dns),
    ("exec, logs and port-forward work", tools),
    ("up is idempotent", up_twice),
];

fn services_and_dns(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-node")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    ensure!(
        field.status("client", "http://web.t-node.svc.cluster.local/")? == "200",
        "the Service did not answer by its name"
    );
    let unknown = field.status("client", "http://nobody.t-node.svc.cluster.local/")?;
    ensure!(unknown == "000", "a name that does not exist answered {unknown}");
    Ok(())
}

fn tools(kube: &Kube) -> Result<()> {
    let field = TestNamespace::plain(kube, "t-tools")?;
    field.host_pod("shell", "default", &["/bin/sh", "-c", "echo hello from the log; exec sleep 1000"])?;
    ensure!(
        field.exec("shell", &["/bin/echo", "said"])?.trim() == "said",
        "exec did not return what the command printed"
    );
    ensure!(
        field.kubectl(&["logs", "shell"])?.contains("hello from the log"),
        "logs lack what the pod printed"
    );
    field.service("web", 1, &[])?;
    // kubectl chooses the port, because an interrupted run may have left a forwarder on a fixed one.
    let mut forward = kube.command(&["-n", "t-tools", "port-forward", "service/web", ":80"])?;
    let mut forward = forward.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut lines = BufReader::new(forward.stdout.take().context("port-forward has no output")?).lines();
    let first = lines.next().context("port-forward printed nothing")??;
    let port = first.split([':', ' ']).find_map(|word| word.parse::<u16>().ok());
    let url = format!("http://127.0.0.1:{}/", port.with_context(|| format!("no port in {first:?}"))?);
    let answer = match kube {
        Kube::Embedded(cluster) => host::output(cluster.inside("curl")?.args(["-s", "-m", "5", &url])),
        Kube::Context(_) => host::output(Command::new("curl").args(["-s", "-m", "5", &url])),
    };
    // The spawned program enters the node's namespaces and waits for kubectl, its child, which would survive
    // it.
    let pid = forward.id();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    for child in children.split_whitespace() {
        host::output(Command::new("kill").arg(child)).ok();
    }
    forward.kill()?;
    forward.wait()?;
    ensure!(first.contains("Forwarding"), "port-forward printed {first}");
    ensure!(answer?.contains("\"service\":\"web\""), "no answer through port-forward");
    Ok(())
}

fn up_twice(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else { bail!(Skip("up is for the embedded cluster")) };
    let before = kube.field("default", "node/node", ".metadata.uid")?;
    cluster.up(None)?;
    ensure!(
        kube.field("default", "node/node", ".metadata.uid")? == before,
        "the second up has created another cluster"
    );
    Ok(())
}
