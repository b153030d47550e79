//! What tests put on the cluster: namespaces, servers, clients, load.

use std::cell::RefCell;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::Skip;
use crate::kubectl::Kube;

/// Programs of the host that test pods run.
pub const PROGRAMS: &[(&str, &str)] = &[
    ("curl", "curl"),
    ("mariadbd", "mariadb-server-core"),
    ("mariadb", "mariadb-client"),
    ("redis-server", "redis-server"),
    ("redis-cli", "redis-tools"),
    ("pg_ctlcluster", "postgresql"),
    ("psql", "postgresql-client"),
    ("/usr/lib/python3/dist-packages/grpc", "python3-grpcio"),
    ("/usr/lib/python3/dist-packages/websockets", "python3-websockets"),
    ("/usr/lib/python3/dist-packages/prometheus_client", "python3-prometheus-client"),
];

/// A namespace of a test's own; deleted when the test has ended.
pub struct TestNamespace<'a> {
    /// The cluster.
    pub kube: &'a Kube,
    /// The namespace.
    pub namespace: String,
    /// Whether its pods must have sidecars.
    meshed: bool,
}

thread_local! {
    /// Namespaces of the test that this thread runs, to be deleted once it is known whether it failed.
    static ENDED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Skips a test whose pods run programs of their node, unless that node is this machine.
pub fn borrows(kube: &Kube) -> Result<()> {
    match kube {
        Kube::Embedded(_) => Ok(()),
        Kube::Context(_) => bail!(Skip("its pods run programs that the nodes of this cluster may lack")),
    }
}

/// Deletes the namespaces of a test that has ended. If the test failed, returns their objects and events.
pub fn clean_up(kube: &Kube, failed: bool) -> String {
    let mut seen = String::new();
    for namespace in ENDED.take() {
        if failed {
            for what in [
                ["get", "pods,meshpolicies,canaries", "-o", "wide"],
                // Fails where the Gateway API is not installed.
                ["get", "httproutes,grpcroutes", "-o", "yaml"],
                ["get", "events", "--sort-by", ".lastTimestamp"],
            ] {
                seen.push_str(&format!("\n        $ kubectl -n {namespace} {}", what.join(" ")));
                let text = kube.run(&[&["-n", &namespace], &what[..]].concat());
                let text = text.unwrap_or_else(|error| format!("{error:#}"));
                text.lines().for_each(|line| seen.push_str(&format!("\n        {line}")));
            }
            seen.push_str(&sidecars_said(kube, &namespace));
        }
        let _ = kube.run(&["delete", "namespace", &namespace, "--wait=false", "--ignore-not-found"]);
    }
    seen
}

/// The end of the log of each sidecar.
fn sidecars_said(kube: &Kube, namespace: &str) -> String {
    let mut seen = String::new();
    let pods = kube.run(&["-n", namespace, "get", "pods", "-o", "name"]).unwrap_or_default();
    for pod in pods.lines() {
        let log =
            kube.run(&["-n", namespace, "logs", pod, "-c", "tulle-proxy", "--tail=25"]).unwrap_or_default();
        seen.push_str(&format!("\n        {pod}: tulle-proxy has said:"));
        log.lines().for_each(|line| seen.push_str(&format!("\n        {line}")));
    }
    seen
}

/// What load has counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Requests sent.
    pub sent: u64,
    /// Requests that were answered or failed.
    pub ended: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Why requests failed, and when the first of them did.
    pub failures: String,
    /// Answers by version.
    pub versions: Value,
    /// The time of an answer that one in a hundred exceeds.
    pub p99_us: u64,
}

impl<'a> TestNamespace<'a> {
    /// A namespace with labels.
    pub fn new(kube: &'a Kube, namespace: &str, labels: Value) -> Result<Self> {
        kube.run(&["delete", "namespace", namespace, "--ignore-not-found"])?;
        let manifest = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}});
        kube.apply(&manifest.to_string())?;
        let meshed = manifest["metadata"]["labels"]["tulle.dev/inject"].is_string();
        Ok(Self { kube, namespace: namespace.to_owned(), meshed })
    }

    /// A namespace whose pods are injected.
    pub fn meshed(kube: &'a Kube, namespace: &str) -> Result<Self> {
        Self::new(kube, namespace, json!({"tulle.dev/inject": "enabled"}))
    }

    /// A namespace whose pods are not injected.
    pub fn plain(kube: &'a Kube, namespace: &str) -> Result<Self> {
        Self::new(kube, namespace, json!({}))
    }

    /// Applies an object in the namespace.
    pub fn apply(&self, mut object: Value) -> Result<String> {
        object["metadata"]["namespace"] = json!(self.namespace);
        self.kube.apply(&object.to_string())
    }

    /// kubectl in the namespace.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kube.run(&[&["-n", &self.namespace], arguments].concat())
    }

    /// A field of an object.
    pub fn get(&self, object: &str, path: &str) -> Result<String> {
        self.kube.field(&self.namespace, object, path)
    }

    /// Whether a pod that is created now gets a sidecar.
    pub fn injects_now(&self) -> Result<bool> {
        let containers = "jsonpath={.spec.initContainers[*].name}";
        let run = ["run", "probe", "--image=probe", "--dry-run=server", "-o", containers];
        Ok(self.kubectl(&run)?.contains("tulle-proxy"))
    }

    /// Waits until pods that are created get a sidecar.
    pub fn injects(&self) -> Result<()> {
        let what = format!("pods in {} to get a sidecar", self.namespace);
        self.kube.wait_for(&what, 60, || self.injects_now())
    }

    /// Creates a service account, a Deployment of the shop's service and a Service of port 80; waits until
    /// the pods are ready.
    pub fn service(&self, name: &str, replicas: u32, arguments: &[&str]) -> Result<()> {
        self.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}))?;
        self.apply(service(name, json!({})))?;
        self.apply(deployment(name, replicas, arguments))?;
        self.kube.rolled_out(&self.namespace, &format!("deployment/{name}"), 120)
    }

    /// Starts load on a target from a pod of its own.
    pub fn load(&self, name: &str, target: &str, rate: u32) -> Result<()> {
        self.load_with(name, target, rate, &[])
    }

    /// The same with more arguments of the load generator.
    pub fn load_with(&self, name: &str, target: &str, rate: u32, more: &[&str]) -> Result<()> {
        let target = format!("--target={target}");
        let rate = format!("--rate={rate}");
        let mut load = deployment(name, 1, &[]);
        let container = &mut load["spec"]["template"]["spec"]["containers"][0];
        container["args"] = json!([&["load", &target, &rate], more].concat());
        container.as_object_mut().context("the Deployment has no container")?.remove("readinessProbe");
        load["spec"]["template"]["spec"]["serviceAccountName"] = json!("default");
        self.apply(load)?;
        self.kube.rolled_out(&self.namespace, &format!("deployment/{name}"), 60)?;
        self.kube.wait_for("the load to start", 60, || Ok(self.account(name)?.sent > 50))
    }

    /// What load has counted.
    pub fn account(&self, name: &str) -> Result<Account> {
        let text = self.kubectl(&["logs", &format!("deployment/{name}"), "-c", name, "--tail=1"])?;
        let line: Value = serde_json::from_str(text.trim())?;
        Ok(Account {
            sent: line["sent"].as_u64().unwrap_or(0),
            ended: line["ok"].as_u64().unwrap_or(0) + line["failed"].as_u64().unwrap_or(0),
            failed: line["failed"].as_u64().unwrap_or(0),
            failures: format!("{}, the first of them: {}", line["failures"], line["lost"]),
            versions: line["versions"].clone(),
            p99_us: line["p99_us"].as_u64().unwrap_or(0),
        })
    }

    /// Does something under load. Returns how many requests failed meanwhile, and why.
    pub fn failed_during(&self, load: &str, what: impl FnOnce() -> Result<()>) -> Result<(u64, String)> {
        // The load's pod prints once a second, so its last line may lack the latest failures.
        thread::sleep(Duration::from_millis(1200));
        let before = self.account(load)?;
        what()?;
        thread::sleep(Duration::from_millis(2500));
        let after = self.settled(load)?;
        ensure!(after.sent > before.sent, "the load sent no request meanwhile: {after:?}");
        Ok((after.failed - before.failed, after.failures))
    }

    /// What load has counted once every request that is under way now has ended. A request that hangs counts
    /// as failed only after its timeout.
    pub fn settled(&self, load: &str) -> Result<Account> {
        let mut now = self.account(load)?;
        let sent = now.sent;
        self.kube.wait_for("requests under way to end", 60, || {
            now = self.account(load)?;
            Ok(now.ended >= sent)
        })?;
        Ok(now)
    }

    /// A pod that runs programs of the host.
    pub fn host_pod(&self, name: &str, account: &str, command: &[&str]) -> Result<()> {
        self.apply(host_pod(name, account, command))?;
        let ready = self.ready(name);
        if matches!(self.kube, Kube::Context(_)) && self.exec(name, &["/usr/bin/curl", "--version"]).is_err()
        {
            bail!(Skip("the nodes of this cluster have no curl that pods could run"));
        }
        ready
    }

    /// A pod that runs a server of the host; it is ready when its port is open.
    pub fn server_pod(&self, name: &str, port: u16, command: &[&str]) -> Result<()> {
        borrows(self.kube)?;
        let mut pod = host_pod(name, "default", command);
        pod["spec"]["containers"][0]["readinessProbe"] =
            json!({"tcpSocket": {"port": port}, "periodSeconds": 1});
        self.apply(pod)?;
        self.ready(name)
    }

    /// Waits until a pod is ready. In a meshed namespace, fails unless the pod has a sidecar, because without
    /// one the test would prove nothing.
    pub fn ready(&self, pod: &str) -> Result<()> {
        self.kubectl(&["wait", "--for=condition=Ready", "--timeout=90s", &format!("pod/{pod}")])?;
        let json = self.kube.json(&["-n", &self.namespace, "get", "pod", pod])?;
        let out = json["metadata"]["labels"]["tulle.dev/inject"] == "disabled";
        let mirror = json["metadata"]["annotations"]["kubernetes.io/config.mirror"].is_string();
        let mut containers = json["spec"]["initContainers"].as_array().into_iter().flatten();
        let sidecar = containers.any(|container| container["name"] == "tulle-proxy");
        ensure!(sidecar || out || mirror || !self.meshed, "pod {pod} was admitted without a sidecar");
        Ok(())
    }

    /// A pod to call others from.
    pub fn client(&self, name: &str) -> Result<()> {
        self.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}}))?;
        self.host_pod(name, name, &["/usr/bin/sleep", "100000"])
    }

    /// A pod without sidecar to call others from.
    pub fn plain_client(&self, name: &str) -> Result<()> {
        let mut pod = host_pod(name, "default", &["/usr/bin/sleep", "100000"]);
        pod["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
        self.apply(pod)?;
        self.ready(name)
    }

    /// Runs a program in a pod; returns what it prints.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "-c", pod, "--"], command].concat())
    }

    /// The sum of the metrics of a pod's sidecar whose name and labels contain all of `parts`.
    pub fn metric(&self, pod: &str, parts: &[&str]) -> Result<u64> {
        self.kube.metric(&self.namespace, pod, parts)
    }

    /// The names of the pods with a label `app`.
    pub fn pods(&self, app: &str) -> Result<Vec<String>> {
        self.kube.pods(&self.namespace, &format!("app={app}"))
    }

    /// How many requests the pods with a label `app` have received.
    pub fn received(&self, app: &str) -> Result<u64> {
        let requests = ["tulle_requests_total{", "direction=\"inbound\""];
        self.pods(app)?.iter().map(|pod| self.metric(pod, &requests)).sum()
    }

    /// The HTTP status that a pod gets, `000` for no answer.
    pub fn status(&self, pod: &str, url: &str) -> Result<String> {
        // curl's own exit code says only that there was no answer.
        let script = format!("curl -s -m 8 -o /dev/null -w '%{{http_code}}' {url} || true");
        self.exec(pod, &["/bin/sh", "-c", &script])
    }
}

impl Drop for TestNamespace<'_> {
    fn drop(&mut self) {
        ENDED.with_borrow_mut(|ended| ended.push(std::mem::take(&mut self.namespace)));
    }
}

/// A Deployment of the shop's service.
pub fn deployment(name: &str, replicas: u32, arguments: &[&str]) -> Value {
    let arguments: Vec<String> = ["serve", &format!("--name={name}")]
        .iter()
        .map(|a| (*a).to_owned())
        .chain(arguments.iter().map(|a| (*a).to_owned()))
        .collect();
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": {"app": name}},
            "template": pod_template(name, &arguments),
        },
    })
}

/// The pod template of such a Deployment.
pub fn pod_template(name: &str, arguments: &[String]) -> Value {
    json!({
        "metadata": {"labels": {"app": name}},
        "spec": {
            "serviceAccountName": name,
            "containers": [{
                "name": name, "image": "tulle.local/shop:dev", "args": arguments,
                "ports": [{"containerPort": 8080}],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1},
            }],
        },
    })
}

/// A Service of port 80; `more` is merged into its spec.
pub fn service(name: &str, more: Value) -> Value {
    let mut spec =
        json!({"selector": {"app": name}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]});
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

/// A pod with the host's programs, and a writable /tmp and /run.
pub fn host_pod(name: &str, account: &str, command: &[&str]) -> Value {
    let host = ["usr", "lib", "lib64", "etc", "bin"];
    let mut mounts: Vec<Value> = host
        .iter()
        .map(|folder| json!({"name": folder, "mountPath": format!("/{folder}"), "readOnly": true}))
        .collect();
    let mut volumes: Vec<Value> = host
        .iter()
        .map(|folder| json!({"name": folder, "hostPath": {"path": format!("/{folder}")}}))
        .collect();
    for (volume, path) in [("tmp", "/tmp"), ("run", "/run"), ("data", "/data")] {
        mounts.push(json!({"name": volume, "mountPath": path}));
        volumes.push(json!({"name": volume, "emptyDir": {}}));
    }
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "serviceAccountName": account, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": name, "image": "tulle.local/empty:1", "command": command, "volumeMounts": mounts}],
            "volumes": volumes,
        },
    })
}
