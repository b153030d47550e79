//! Pods of every kind: containers of the user that start early, ports, Windows, and the sidecar itself.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    INIT, PROXY, injected, pod, rejection, requires, reviewed, sidecar_process, sleeper, strict, variable,
};
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::{TestNamespace, borrows, deployment, host_pod, service};

/// Calls a meshed service once, without a retry, and logs the answer.
const CALLS: &str = "curl -sf -m 20 http://web.t-adm-early.svc.cluster.local/ && echo";

pub(super) fn early_containers(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-early")?;
    strict(&field)?;
    field.service("web", 1, &[])?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "client"}}))?;
    let mut caller = host_pod("caller", "client", &["/usr/bin/sleep", "100000"]);
    let container = |name: &str, script: &str| {
        let mut container = caller["spec"]["containers"][0].clone();
        container["name"] = json!(name);
        container["command"] = json!(["/bin/sh", "-c", script]);
        container
    };
    let init = container("migrate", CALLS);
    let serves = format!("{CALLS} && exec /usr/bin/python3 -m http.server 8090 --directory /data");
    let mut native = container("native", &serves);
    native["restartPolicy"] = json!("Always");
    // Under Strict this probe passes only if the sidecar carries it out.
    native["startupProbe"] =
        json!({"httpGet": {"path": "/", "port": 8090}, "periodSeconds": 1, "failureThreshold": 60});
    caller["spec"]["initContainers"] = json!([init, native]);
    field.apply(caller)?;
    field.ready("caller")?;
    let names = field.get("pod/caller", ".spec.initContainers[*].name")?;
    ensure!(names == "tulle-init tulle-proxy migrate native", "init containers: {names}");
    for name in ["migrate", "native"] {
        let answer = field.kubectl(&["logs", "caller", "-c", name])?;
        let identity = "spiffe://cluster.local/ns/t-adm-early/sa/client";
        ensure!(answer.contains(identity), "to {name} the server answered {answer}");
    }
    let restarts = field.get("pod/caller", ".status.initContainerStatuses[*].restartCount")?;
    ensure!(restarts == "0 0 0 0", "a container failed at its first attempt; restarts: {restarts}");
    Ok(())
}

pub(super) fn taken_ports(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-ports")?;
    let mut declares = sleeper("declares");
    declares["spec"]["containers"][0]["ports"] = json!([{"containerPort": 26150}]);
    let mut probes = sleeper("probes");
    probes["spec"]["containers"][0]["livenessProbe"] = json!({"tcpSocket": {"port": 26152}});
    for (pod, port) in [(declares, "26150"), (probes, "26152")] {
        let said = field.apply(pod)?;
        ensure!(
            said.contains(&format!("uses port {port}, on which the sidecar listens")),
            "no warning: {said}"
        );
    }
    let mut others = sleeper("others");
    others["spec"]["containers"][0]["ports"] = json!([{"containerPort": 26149}, {"containerPort": 26154}]);
    let said = field.apply(others)?;
    ensure!(!said.contains("uses port"), "a warning about a port that is free: {said}");
    Ok(())
}

pub(super) fn foreign_name_servers(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-dns")?;
    let mut of_node = sleeper("of-node");
    of_node["spec"]["dnsPolicy"] = json!("Default");
    let mut silent = sleeper("silent");
    silent["spec"]["dnsPolicy"] = json!("None");
    // An address of a documentation network, where nothing answers.
    silent["spec"]["dnsConfig"] = json!({"nameservers": ["192.0.2.53"]});
    for pod in [of_node, silent] {
        let said = field.apply(pod)?;
        ensure!(!said.contains("dnsPolicy"), "a warning about pods that do start: {said}");
    }
    for name in ["of-node", "silent"] {
        field.ready(name)?;
        let app = pod(&field, name)?;
        let addresses = variable(&app, "TULLE_OPERATOR_ADDRESSES")?;
        ensure!(addresses.contains(":26160"), "addresses of the operator in pod {name}: {addresses:?}");
    }
    Ok(())
}

pub(super) fn injected_names(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-names")?;
    field.injects()?;
    let container = |name: &str| {
        let mut container = sleeper("app")["spec"]["containers"][0].clone();
        container["name"] = json!(name);
        container
    };
    for (what, list, entry) in [
        ("container tulle-init", "initContainers", container(INIT)),
        ("container tulle-proxy", "containers", container(PROXY)),
        ("volume tulle-token", "volumes", json!({"name": "tulle-token", "emptyDir": {}})),
    ] {
        let mut own = sleeper("app");
        let mut all = own["spec"][list].as_array().cloned().unwrap_or_default();
        all.push(entry);
        own["spec"][list] = json!(all);
        let why = rejection(reviewed(&field, own.clone())).context(what)?;
        ensure!(why.contains(&format!("the name of {what} is reserved for the sidecar; rename it")), "{why}");
        own["metadata"]["labels"]["tulle.dev/inject"] = json!("disabled");
        reviewed(&field, own).with_context(|| format!("{what} of a pod that opts out"))?;
    }
    let mut workload = deployment("web", 0, &[]);
    workload["spec"]["template"]["spec"]["containers"][0]["name"] = json!(PROXY);
    let said = field.apply(workload)?;
    ensure!(
        said.contains("pods of this Deployment will be rejected: the name of container tulle-proxy"),
        "no warning about a Deployment's pods: {said}"
    );
    Ok(())
}

/// Answers with the client identity that the sidecar has added, on all ports of nsqd and nsqlookupd.
const QUEUE: &str = "import http.server, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(str(self.headers.get('tulle-client-id')).encode())
for port in (4150, 4151, 4160, 4161):
    threading.Thread(target=http.server.HTTPServer(('0.0.0.0', port), Handler).serve_forever).start()";

pub(super) fn nsq_ports(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-queue")?;
    let mut queue = host_pod("queue", "default", &["/usr/bin/python3", "-c", QUEUE]);
    let container = &mut queue["spec"]["containers"][0];
    container["ports"] = json!([{"containerPort": 4150}, {"containerPort": 4151}, {"containerPort": 4160}, {"containerPort": 4161}]);
    container["readinessProbe"] = json!({"tcpSocket": {"port": 4161}, "periodSeconds": 1});
    field.apply(service("queue", json!({"ports": [{"port": 4150, "targetPort": 4150}]})))?;
    let said = field.apply(queue)?;
    ensure!(!said.contains("uses port"), "a warning about a port of NSQ: {said}");
    field.ready("queue")?;
    field.client("client")?;
    let address = field.get("pod/queue", ".status.podIP")?;
    let mut urls = vec!["http://queue.t-adm-queue.svc.cluster.local:4150/".to_owned()];
    urls.extend([4150, 4151, 4160, 4161].map(|port| format!("http://{address}:{port}/")));
    for url in urls {
        let answer = field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", &url])?;
        ensure!(
            answer == "spiffe://cluster.local/ns/t-adm-queue/sa/client",
            "{url}: the server saw {answer}"
        );
    }
    Ok(())
}

/// A pod for a node with Windows, which this cluster does not have.
fn windows_pod(name: &str) -> Value {
    let mut pod = sleeper(name);
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/os": "windows"});
    pod
}

pub(super) fn windows(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-windows")?;
    let said = field.apply(windows_pod("app"))?;
    ensure!(said.contains("gets no sidecar because it is a Windows pod"), "no warning: {said}");
    let app = pod(&field, "app")?;
    ensure!(
        app["spec"]["initContainers"].is_null(),
        "the pod was injected: {}",
        app["spec"]["initContainers"]
    );
    let label = &app["metadata"]["labels"]["tulle.dev/sidecar"];
    ensure!(label.is_null(), "the pod is labelled as injected: {label}");
    ensure!(app["status"]["phase"] == "Pending", "expected phase Pending, found {}", app["status"]["phase"]);
    let required = requires(kube, "t-adm-windows-required")?;
    let why = rejection(reviewed(&required, windows_pod("app"))).context("where the sidecar is required")?;
    ensure!(why.contains("because it is a Windows pod; move it to another namespace"), "{why}");
    Ok(())
}

pub(super) fn not_reported(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::plain(kube, "t-adm-reports")?;
    // This pod must be reported; otherwise the silence about the others would prove nothing.
    field.apply(sleeper("bare"))?;
    field.apply(windows_pod("windows"))?;
    let mut foreign = sleeper("foreign");
    let mut other = foreign["spec"]["containers"][0].clone();
    other["name"] = json!("istio-proxy");
    foreign["spec"]["containers"].as_array_mut().context("the pod has no containers")?.push(other);
    field.apply(foreign)?;
    field.ready("bare")?;
    field.ready("foreign")?;
    kube.run(&["label", "namespace", &field.namespace, "tulle.dev/inject=enabled"])?;
    let events = |name: &str| field.kubectl(&["events", "--for", &format!("pod/{name}")]);
    kube.wait_for("the event on the bare pod", 60, || Ok(events("bare")?.contains("NoSidecar")))?;
    thread::sleep(Duration::from_secs(10));
    for name in ["windows", "foreign"] {
        let events = events(name)?;
        let reported = ["NoSidecar", "SidecarImpossible", "OptOutIgnored"].iter().any(|r| events.contains(r));
        ensure!(!reported, "pod {name} is reported: {events}");
    }
    Ok(())
}

pub(super) fn probed_sidecar(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-live")?;
    field.client("client")?;
    let client = pod(&field, "client")?;
    let proxy = injected(&client, PROXY)?;
    for (probe, path) in
        [("startupProbe", "/ready"), ("readinessProbe", "/ready"), ("livenessProbe", "/live")]
    {
        let get = &proxy[probe]["httpGet"];
        ensure!(get["path"] == path && get["port"] == 26152, "{probe} of the sidecar: {get}");
    }
    for (path, answer) in [("ready", "ready"), ("live", "alive")] {
        // kubectl fails unless the status is 200.
        let url = format!("/api/v1/namespaces/{}/pods/client:26152/proxy/{path}", field.namespace);
        let said = kube.run(&["get", "--raw", &url])?;
        ensure!(said.trim() == answer, "/{path} answers {said}");
    }
    Ok(())
}

/// A signal stops the process: its ports accept connections, and no answer comes.
pub(super) fn stuck_sidecar(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("the process of a sidecar is in reach on its node only"))
    };
    let field = TestNamespace::meshed(kube, "t-adm-stuck")?;
    field.apply(sleeper("app"))?;
    field.ready("app")?;
    let process = sidecar_process(cluster, &field, "app")?;
    let stop = format!("kill -STOP {process}");
    host::output(cluster.inside("/bin/sh")?.args(["-c", &stop]))?;
    kube.wait_for("the pod to become unready", 60, || {
        Ok(field.get("pod/app", ".status.conditions[?(@.type==\"Ready\")].status")? == "False")
    })?;
    let restarts = |list: &str, name: &str| {
        field.get("pod/app", &format!(".status.{list}[?(@.name==\"{name}\")].restartCount"))
    };
    kube.wait_for("the sidecar's restart", 120, || Ok(restarts("initContainerStatuses", PROXY)? == "1"))?;
    field.ready("app")?;
    let app = restarts("containerStatuses", "app")?;
    ensure!(app == "0", "the application was restarted {app} times");
    Ok(())
}
