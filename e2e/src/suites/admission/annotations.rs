//! Annotations of namespaces and pods, by their effect on real pods.

use std::thread;

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::{INIT, NOTICED, PROXY, annotated, injected, pod, sidecar_process, variable};
use crate::host;
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::{TestNamespace, borrows, host_pod};

pub(super) fn of_a_namespace(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-defaults")?;
    let defaults = [
        "tulle.dev/cpu=30m",
        "tulle.dev/memory=40Mi",
        "tulle.dev/workers=2",
        "tulle.dev/memory-limit=plenty",
    ];
    kube.run(&[&["annotate", "namespace", field.namespace.as_str()], &defaults[..]].concat())?;
    thread::sleep(NOTICED);
    let said = field.apply(annotated("app", json!({"tulle.dev/cpu": "45m"})))?;
    let named = "annotation tulle.dev/memory-limit of namespace t-adm-defaults";
    ensure!(said.contains(named) && said.contains("has no effect"), "no warning: {said}");
    field.ready("app")?;
    let app = pod(&field, "app")?;
    // The pod's own cpu, the namespace's memory and workers, no limit.
    let wanted = json!({"requests": {"cpu": "45m", "memory": "40Mi"}});
    for name in [INIT, PROXY] {
        let resources = &injected(&app, name)?["resources"];
        ensure!(*resources == wanted, "resources of {name}: {resources}, expected {wanted}");
    }
    let workers = variable(&app, "TULLE_WORKERS")?;
    ensure!(workers == "2", "the sidecar has {workers:?} workers");
    Ok(())
}

pub(super) fn skipped_ports_of_a_namespace(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-adm-unseen")?;
    kube.run(&["annotate", "namespace", "t-adm-unseen", "tulle.dev/skip-inbound-ports=8080"])?;
    thread::sleep(NOTICED);
    field.service("web", 1, &[])?;
    field.client("client")?;
    let url = "http://web.t-adm-unseen.svc.cluster.local/";
    let ask = || field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", url]);
    let answer = ask()?;
    ensure!(
        answer.contains("\"client\":null"),
        "the excluded port was reached through the sidecar: {answer:?}"
    );
    // The redirect rules were made when the pod started, and do not follow a later annotation.
    let pod = field.kubectl(&["get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}"])?;
    field.kubectl(&["annotate", "pod", &pod, "tulle.dev/skip-inbound-ports=9999"])?;
    thread::sleep(NOTICED);
    ensure!(ask()?.contains("\"client\":null"), "an annotation of the running pod changed what clients send");
    Ok(())
}

pub(super) fn amounts(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-amounts")?;
    let annotations = json!({"tulle.dev/cpu": "25m", "tulle.dev/memory": "24Mi", "tulle.dev/cpu-limit": "300m",
        "tulle.dev/memory-limit": "96Mi"});
    field.apply(annotated("app", annotations))?;
    field.ready("app")?;
    let app = pod(&field, "app")?;
    let wanted =
        json!({"requests": {"cpu": "25m", "memory": "24Mi"}, "limits": {"cpu": "300m", "memory": "96Mi"}});
    for name in [INIT, PROXY] {
        let resources = &injected(&app, name)?["resources"];
        ensure!(*resources == wanted, "resources of {name}: {resources}, expected {wanted}");
    }
    Ok(())
}

pub(super) fn log_level(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-log")?;
    field.apply(annotated("loud", json!({"tulle.dev/log-level": "debug"})))?;
    field.apply(annotated("usual", json!({})))?;
    field.ready("loud")?;
    field.ready("usual")?;
    let log = |pod: &str| field.kubectl(&["logs", pod, "-c", PROXY]);
    for pod in ["loud", "usual"] {
        ensure!(field.status(pod, "http://10.99.99.99/")? == "000", "an unused address answers");
    }
    kube.wait_for("the failed connection in the log", 60, || {
        let is_it = |line: &str| {
            line.contains("\"level\":\"DEBUG\"") && line.contains("an outbound connection failed")
        };
        Ok(log("loud")?.lines().any(is_it))
    })?;
    let usual = log("usual")?;
    ensure!(
        !usual.is_empty() && !usual.contains("\"level\":\"DEBUG\""),
        "the log without the annotation is empty or has level DEBUG: {usual}"
    );
    Ok(())
}

pub(super) fn workers(kube: &Kube) -> Result<()> {
    let Kube::Embedded(cluster) = kube else {
        bail!(Skip("the threads of a sidecar are seen from its node only"))
    };
    let field = TestNamespace::meshed(kube, "t-adm-workers")?;
    field.apply(annotated("three", json!({"tulle.dev/workers": "3"})))?;
    field.apply(annotated("one", json!({})))?;
    for (name, wanted) in [("three", &["worker-0", "worker-1", "worker-2"][..]), ("one", &["worker-0"][..])] {
        field.ready(name)?;
        let process = sidecar_process(cluster, &field, name)?;
        let script = format!("cat /proc/{process}/task/*/comm");
        let threads = host::output(cluster.inside("/bin/sh")?.args(["-c", &script]))?;
        let mut workers: Vec<&str> = threads.lines().filter(|name| name.starts_with("worker-")).collect();
        workers.sort_unstable();
        ensure!(workers == wanted, "threads of pod {name}: {threads}");
    }
    Ok(())
}

pub(super) fn skip_outbound(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-skip")?;
    field.service("web", 1, &[])?;
    field.apply(annotated("client", json!({"tulle.dev/skip-outbound-ports": "80"})))?;
    field.ready("client")?;
    let ask = |url: &str| field.exec("client", &["/usr/bin/curl", "-s", "-m", "8", url]);
    let answer = ask("http://web.t-adm-skip.svc.cluster.local/")?;
    ensure!(answer.contains("\"client\":null"), "over the skipped port 80 the server saw {answer}");
    let address =
        field.kubectl(&["get", "pod", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let answer = ask(&format!("http://{address}:8080/"))?;
    let identity = "spiffe://cluster.local/ns/t-adm-skip/sa/default";
    ensure!(answer.contains(identity), "over port 8080, which is not skipped, the server saw {answer}");
    Ok(())
}

/// An HTTP server that answers with the address that it sees.
const WHO: &str = "import http.server as h
class S(h.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.client_address[0].encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
h.HTTPServer(('', 8080), S).serve_forever()";

pub(super) fn source_address(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let field = TestNamespace::meshed(kube, "t-adm-source")?;
    for (name, annotations) in
        [("keeps", json!({"tulle.dev/source-address": "preserve"})), ("usual", json!({}))]
    {
        let mut pod = host_pod(name, "default", &["/usr/bin/python3", "-c", WHO]);
        pod["metadata"]["annotations"] = annotations;
        pod["spec"]["containers"][0]["readinessProbe"] =
            json!({"tcpSocket": {"port": 8080}, "periodSeconds": 1});
        let said = field.apply(pod)?;
        ensure!(said.contains("capability NET_RAW") == (name == "keeps"), "warnings about {name}: {said}");
    }
    field.client("meshed")?;
    field.plain_client("bare")?;
    field.ready("keeps")?;
    field.ready("usual")?;
    let address = |pod: &str| field.get(&format!("pod/{pod}"), ".status.podIP");
    for client in ["meshed", "bare"] {
        let own = address(client)?;
        for (server, seen) in [("keeps", own.clone()), ("usual", address("usual")?)] {
            let url = format!("http://{}:8080/", address(server)?);
            // Often enough for the client to use a port again.
            let script = format!("for i in $(seq 50); do curl -s -m 8 {url}; echo; done | sort | uniq -c");
            let answers = field.exec(client, &["/bin/sh", "-c", &script])?;
            ensure!(
                answers.split_whitespace().eq(["50", seen.as_str()]),
                "{server} saw other addresses of client {client} than 50 times {seen}: {answers}"
            );
        }
    }
    let Kube::Embedded(cluster) = kube else { return Ok(()) };
    for (name, wanted) in [("keeps", "0000000000002000"), ("usual", "0000000000000000")] {
        let process = sidecar_process(cluster, &field, name)?;
        let script = format!("grep CapEff /proc/{process}/status");
        let has = host::output(cluster.inside("/bin/sh")?.args(["-c", &script]))?;
        ensure!(has.contains(wanted), "capabilities of the sidecar of {name}: {has}, expected {wanted}");
    }
    Ok(())
}
