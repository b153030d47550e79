//! Rolling updates under load: however an application ends, no request may be lost, and none may be carried
//! out twice. The same update without the mesh must lose requests; otherwise the test proves nothing.

use std::thread;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Test;
use super::namespace::{TestNamespace, borrows, deployment, host_pod, service};
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[(
    "a rolling update under load loses no request and repeats no POST; without Tulle it does lose some",
    rolling_update,
)];

/// Applications, by how they end.
const APPLICATIONS: &[&str] = &["graceful", "abrupt", "slow", "counter"];

fn rolling_update(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let (meshed, plain) =
        (TestNamespace::meshed(kube, "t-roll")?, TestNamespace::plain(kube, "t-roll-plain")?);
    // Side by side, both take half the time and run under the same load of the machine.
    let (with, without) = thread::scope(|scope| {
        let without = scope.spawn(|| lost(&plain));
        (lost(&meshed), without.join())
    });
    let (with, without) =
        (with?, without.map_err(|_| anyhow::anyhow!("the update without Tulle panicked"))??);
    println!("        lost with Tulle:    {}", shown(&with));
    println!("        lost without Tulle: {}", shown(&without));
    ensure!(with.iter().all(|lost| lost.failed == 0), "requests were lost: {}", shown(&with));
    ensure!(
        without.iter().any(|lost| lost.failed > 0),
        "no request was lost without Tulle either, so the test proves nothing"
    );
    Ok(())
}

/// Requests that an application's clients have lost.
struct Lost {
    application: &'static str,
    failed: u64,
    of: u64,
    why: String,
}

fn shown(all: &[Lost]) -> String {
    let one = |lost: &Lost| {
        let why = if lost.failed > 0 { format!(" {}", lost.why) } else { String::new() };
        format!("{} {} of {}{why}", lost.application, lost.failed, lost.of)
    };
    all.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// Updates every kind of application at once, under load.
fn lost(field: &TestNamespace<'_>) -> Result<Vec<Lost>> {
    let mut reader = host_pod("ledger", "default", &["/usr/bin/sleep", "100000"]);
    mount_ledger(field, &mut reader["spec"], "");
    field.apply(reader)?;
    field.ready("ledger")?;
    field.exec("ledger", &["/bin/sh", "-c", "rm -rf /ledger/*"])?;
    // `graceful` ends its running requests, `abrupt` exits at once, `slow` takes 20 s to answer; `counter`
    // has gRPC streams of 2 s.
    for (name, arguments) in [("graceful", "--delay=20"), ("abrupt", "--abrupt"), ("slow", "--delay=20000")] {
        field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}))?;
        field.apply(service(name, json!({})))?;
        field.apply(with_ledger(field, deployment(name, 2, &[arguments, "--ledger=/ledger/posts"]), name))?;
    }
    counter(field)?;
    for name in APPLICATIONS {
        field.kube.rolled_out(&field.namespace, &format!("deployment/{name}"), 120)?;
    }
    for (name, rate) in [("graceful", 100), ("abrupt", 100), ("slow", 3)] {
        field.load(&format!("load-{name}"), &format!("{name}:80"), rate)?;
    }
    grpc_load(field)?;
    let before: Vec<_> =
        APPLICATIONS.iter().map(|name| field.account(&format!("load-{name}"))).collect::<Result<_>>()?;
    for name in APPLICATIONS {
        field.kubectl(&["rollout", "restart", &format!("deployment/{name}")])?;
    }
    for name in APPLICATIONS {
        field.kube.rolled_out(&field.namespace, &format!("deployment/{name}"), 180)?;
    }
    // The last old pod is gone only after its last answer.
    field.kube.wait_for("the old pods to end", 60, || {
        Ok(!field.kubectl(&["get", "pods", "--no-headers"])?.contains("Terminating"))
    })?;
    let mut all = Vec::new();
    for (application, before) in APPLICATIONS.iter().zip(before) {
        let after = field.settled(&format!("load-{application}"))?;
        ensure!(after.sent > before.sent, "the load on {application} sent no request meanwhile: {after:?}");
        let (failed, of) = (after.failed - before.failed, after.sent - before.sent);
        all.push(Lost { application, failed, of, why: after.failures });
    }
    for name in ["graceful", "abrupt", "slow"] {
        let posts = format!("/ledger/{name}/posts");
        let count = format!("wc -l < {posts}; sort {posts} | uniq -d | wc -l");
        let counted = field.exec("ledger", &["/bin/sh", "-c", &count])?;
        let numbers: Vec<u64> = counted.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [carried_out, twice] = numbers[..] else {
            anyhow::bail!("expected two counts of the ledger of {name}, found {counted}")
        };
        ensure!(carried_out > 0, "no POST of {name} was carried out");
        ensure!(twice == 0, "{twice} of {carried_out} POSTs of {name} were carried out twice");
    }
    Ok(all)
}

/// Pods of a Deployment share a ledger in a folder of their node's `/run`.
fn with_ledger(field: &TestNamespace<'_>, mut deployment: Value, name: &str) -> Value {
    let spec = &mut deployment["spec"]["template"]["spec"];
    mount_ledger(field, spec, name);
    // The folder on the node belongs to root.
    spec["containers"][0]["securityContext"] = json!({"runAsUser": 0});
    deployment
}

fn mount_ledger(field: &TestNamespace<'_>, spec: &mut Value, sub_path: &str) {
    let folder = format!("/run/tulle-ledger-{}", field.namespace);
    let volume = json!({"name": "ledger", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}});
    let mount = json!({"name": "ledger", "mountPath": "/ledger", "subPath": sub_path});
    push(&mut spec["volumes"], &volume);
    push(&mut spec["containers"][0]["volumeMounts"], &mount);
}

fn push(list: &mut Value, value: &Value) {
    match list.as_array_mut() {
        Some(values) => values.push(value.clone()),
        None => *list = json!([value]),
    }
}

/// A gRPC server as a Deployment.
fn counter(field: &TestNamespace<'_>) -> Result<()> {
    let server = include_str!("../../peers/grpc_server.py");
    field.apply(service("counter", json!({"ports": [{"port": 50051, "targetPort": 50051}]})))?;
    let mut counter = deployment("counter", 2, &[]);
    let mut pod = host_pod("counter", "default", &["/usr/bin/python3", "-c", server, "50051"]);
    pod["spec"]["terminationGracePeriodSeconds"] = json!(30);
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"tcpSocket": {"port": 50051}, "periodSeconds": 1});
    counter["spec"]["template"]["spec"] = pod["spec"].take();
    field.apply(counter).map(drop)
}

fn grpc_load(field: &TestNamespace<'_>) -> Result<()> {
    let client = include_str!("../../peers/grpc_client.py");
    let target = format!("counter.{}.svc.cluster.local:50051", field.namespace);
    let mut load = deployment("load-counter", 1, &[]);
    let mut pod =
        host_pod("load-counter", "default", &["/usr/bin/python3", "-c", client, "load", &target, "5"]);
    load["spec"]["template"]["spec"] = pod["spec"].take();
    field.apply(load)?;
    field.kube.rolled_out(&field.namespace, "deployment/load-counter", 60)?;
    field.kube.wait_for("gRPC load", 60, || Ok(field.account("load-counter")?.sent > 20))
}
