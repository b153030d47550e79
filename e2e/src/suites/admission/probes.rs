//! Probes that the sidecar carries out for kubelet, on pods that refuse plain text.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use rcgen::CertifiedKey;
use serde_json::{Value, json};

use super::{PROXY, injected, pod, requires, reviewed, sleeper, strict, variable};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, borrows, host_pod, service};

/// Time after which a probe that can pass has passed.
const PATIENCE: Duration = Duration::from_secs(8);

/// The same pod with and without a sidecar: kubelet's own results are the expected ones.
pub(super) fn as_without_a_sidecar(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let (meshed, plain) =
        (TestNamespace::meshed(kube, "t-adm-probed")?, TestNamespace::plain(kube, "t-adm-probed-plain")?);
    strict(&meshed)?;
    let service = "s".repeat(240);
    let probes = probes(&service);
    let probed = probed_pod(&service, &probes)?;
    for field in [&plain, &meshed] {
        field.apply(probed.clone())?;
    }
    injected(&pod(&meshed, "probed")?, PROXY)?;
    let expected: BTreeMap<String, bool> =
        probes.iter().map(|probe| (probe.container.to_owned(), probe.passes)).collect();
    for field in [&plain, &meshed] {
        let passing = || expected.iter().filter(|(_, passes)| **passes);
        kube.wait_for(&format!("the probes to pass in {}", field.namespace), 120, || {
            let ready = readiness(field)?;
            Ok(passing().all(|(name, _)| ready.get(name) == Some(&true)))
        })?;
    }
    thread::sleep(PATIENCE);
    for (field, who) in [(&plain, "kubelet"), (&meshed, "the sidecar")] {
        let ready = readiness(field)?;
        ensure!(ready == expected, "ready by {who}: {ready:?}, expected {expected:?}");
    }
    let ready = meshed.get("pod/probed", ".status.conditions[?(@.type==\"ContainersReady\")].status")?;
    ensure!(ready == "False", "the pod is ready although probes fail: {ready}");

    let (by_kubelet, by_sidecar) = (requests(&plain)?, requests(&meshed)?);
    let differ: Vec<_> = by_kubelet.symmetric_difference(&by_sidecar).collect();
    ensure!(differ.is_empty(), "requests that only kubelet or only the sidecar sent: {differ:#?}");
    for part in ["[\"X-Twice\",\"a\"],[\"X-Twice\",\"b\"]", "GET /a%2Fb/%C3%BC?q=1&r=%20x HTTP/1.1"] {
        ensure!(by_sidecar.iter().any(|request| request.contains(part)), "no {part} in {by_sidecar:#?}");
    }
    // kubelet's own plain text would be refused.
    let url = format!("http://{}:8080/ok", meshed.get("pod/probed", ".status.podIP")?);
    ensure!(plain.status("probed", &url)? == "000", "the pod accepts plain text");
    Ok(())
}

/// A readiness probe of a container.
struct Probe {
    container: &'static str,
    /// What is checked.
    handler: Value,
    /// The container's ports.
    ports: Value,
    /// Whether it passes.
    passes: bool,
}

/// Probes of every kind, each of a container of its own. `service`: the gRPC service that is SERVING.
fn probes(service: &str) -> Vec<Probe> {
    let none = json!([]);
    let port = |name: &str, port: u16| json!([{"name": name, "containerPort": port}]);
    let get = |path: &str| json!({"httpGet": {"path": path, "port": 8080}});
    let grpc = |service: &str| json!({"grpc": {"port": 9000, "service": service}});
    let twice = json!([{"name": "X-Twice", "value": "a"}, {"name": "X-Twice", "value": "b"}]);
    let headers = json!({"httpGet": {"path": "/twice", "port": 8080, "httpHeaders": twice}});
    let named = json!({"httpGet": {"path": "/named", "port": "web"}});
    [
        ("probed", get("/ok"), none.clone(), true),
        ("to-ok", get("/to-ok"), none.clone(), true),
        ("to-broken", get("/to-broken"), none.clone(), false),
        ("to-elsewhere", get("/to-elsewhere"), none.clone(), true),
        ("loop", get("/loop"), none.clone(), false),
        ("headers", headers, none.clone(), true),
        ("encoded", get("/a%2Fb/%C3%BC?q=1&r=%20x"), none.clone(), true),
        ("named", named, port("web", 8080), true),
        ("named-tcp", json!({"tcpSocket": {"port": "socket"}}), port("socket", 8080), true),
        ("closed-tcp", json!({"tcpSocket": {"port": "closed"}}), port("closed", 8099), false),
        ("serving", grpc(service), none.clone(), true),
        ("not-serving", grpc("down"), none.clone(), false),
        ("unknown", grpc("nobody"), none, false),
    ]
    .map(|(container, handler, ports, passes)| Probe { container, handler, ports, passes })
    .into()
}

/// A pod with a server, and a container for each of the other probes.
fn probed_pod(service: &str, probes: &[Probe]) -> Result<Value> {
    let server = include_str!("../../../peers/probe_server.py");
    let command = ["/usr/bin/python3", "-c", server, "8080", "9000", service];
    let mut pod = host_pod("probed", "default", &command);
    let containers = pod["spec"]["containers"].as_array_mut().context("the pod has no containers")?;
    let first = containers.pop().context("the pod has no container")?;
    for probe in probes {
        let mut container = first.clone();
        if probe.container != "probed" {
            container["name"] = json!(probe.container);
            container["command"] = json!(["/usr/bin/sleep", "100000"]);
        }
        container["ports"] = probe.ports.clone();
        container["readinessProbe"] = probe.handler.clone();
        // A busy machine must not make a probe fail.
        for (field, value) in [("periodSeconds", 2), ("timeoutSeconds", 5), ("failureThreshold", 3)] {
            container["readinessProbe"][field] = json!(value);
        }
        containers.push(container);
    }
    Ok(pod)
}

/// Whether each container of the pod is ready.
fn readiness(field: &TestNamespace<'_>) -> Result<BTreeMap<String, bool>> {
    let probed = pod(field, "probed")?;
    let statuses = probed["status"]["containerStatuses"].as_array().into_iter().flatten();
    let ready = statuses.map(|status| -> Result<(String, bool)> {
        let name = status["name"].as_str().context("a container has no name")?;
        Ok((name.to_owned(), status["ready"] == true))
    });
    ready.collect()
}

/// Request lines and headers that the server has seen, whatever the pod's address is.
fn requests(field: &TestNamespace<'_>) -> Result<BTreeSet<String>> {
    let address = field.get("pod/probed", ".status.podIP")?;
    let seen = field.exec("probed", &["/usr/bin/curl", "-s", "-m", "8", "http://127.0.0.1:8080/seen"])?;
    let seen: Vec<Value> = serde_json::from_str(&seen.replace(&address, "POD"))?;
    ensure!(!seen.is_empty(), "the server has seen no request");
    Ok(seen.iter().map(Value::to_string).collect())
}

/// The name sorts after `tulle`, so that this webhook is called when the pod already has its sidecar.
const LATER: &str = "zz-tulle-test-adds-a-container";

/// Removes the configuration of the webhook when dropped, also if the test fails.
struct Configuration<'a>(&'a Kube);

impl Drop for Configuration<'_> {
    fn drop(&mut self) {
        let _ = self.0.run(&["delete", "mutatingwebhookconfiguration", LATER, "--ignore-not-found"]);
    }
}

pub(super) fn of_a_later_webhook(kube: &Kube) -> Result<()> {
    borrows(kube)?;
    let hook = TestNamespace::plain(kube, "t-adm-hook")?;
    let fields = [TestNamespace::meshed(kube, "t-adm-later")?, requires(kube, "t-adm-later-required")?];
    let container = |name: &str| serves(name, 8090)["spec"]["containers"][0].take();
    let mut first = container("first");
    first["restartPolicy"] = json!("Always");
    first["command"] = json!(["/bin/sleep", "3600"]);
    first.as_object_mut().context("no container")?.remove("readinessProbe");
    let authority = serve(&hook, [&container("added"), &first])?;
    let _configuration = Configuration(kube);
    kube.apply(&configure(&hook, &authority, &fields).to_string())?;
    for field in &fields {
        strict(field)?;
        kube.wait_for("the later webhook to be called", 60, || {
            let seen = reviewed(field, sleeper("seen"))?;
            Ok(seen["spec"]["containers"].as_array().is_some_and(|containers| containers.len() == 2))
        })?;
        field.apply(serves("app", 8080))?;
        field.ready("app")?;
        let app = pod(field, "app")?;
        is_moved(&app).with_context(|| format!("in {}", field.namespace))?;
        // kubelet ends native sidecars in the reverse order: one before the sidecar would lose its connections first.
        let order = field.get("pod/app", ".spec.initContainers[*].name")?;
        ensure!(order == "tulle-init tulle-proxy first", "init containers in {}: {order}", field.namespace);
        kube.wait_for("Strict to be enforced", 60, || {
            Ok(field.get("meshpolicy/strict", ".status.enforced")? == "1/1")
        })?;
        let address = field.get("pod/app", ".status.podIP")?;
        for port in [8080, 8090] {
            let status = hook.status("hook", &format!("http://{address}:{port}/"))?;
            ensure!(status == "000", "plain text to port {port} is answered with {status}");
        }
        // The containers must stay ready, because kubelet continues to probe under Strict.
        thread::sleep(PATIENCE);
        let ready = field.get("pod/app", ".status.containerStatuses[*].ready")?;
        ensure!(ready == "true true", "containers ready under Strict: {ready}");
    }
    Ok(())
}

/// A pod with a file server that kubelet probes over HTTP.
fn serves(name: &str, port: u16) -> Value {
    let number = port.to_string();
    let command = ["/usr/bin/python3", "-m", "http.server", number.as_str(), "--directory", "/data"];
    let mut pod = host_pod(name, "default", &command);
    pod["spec"]["containers"][0]["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": port}, "periodSeconds": 1, "timeoutSeconds": 5});
    pod
}

/// Fails unless the sidecar carries out both readiness probes.
fn is_moved(pod: &Value) -> Result<()> {
    for container in pod["spec"]["containers"].as_array().into_iter().flatten() {
        let get = &container["readinessProbe"]["httpGet"];
        let path = format!("/{}/readinessProbe", container["name"].as_str().unwrap_or(""));
        ensure!(get["port"] == 26153 && get["path"] == path, "probe of {}: {get}", container["name"]);
    }
    let checks: Vec<Value> = serde_json::from_str(variable(pod, "TULLE_PROBES")?)?;
    let mut paths: Vec<&str> = checks.iter().filter_map(|check| check["path"].as_str()).collect();
    paths.sort_unstable();
    ensure!(paths == ["/added/readinessProbe", "/app/readinessProbe"], "TULLE_PROBES: {checks:?}");
    Ok(())
}

/// Runs the webhook that adds a container and a native sidecar; returns the certificate to trust, in Base64.
fn serve(hook: &TestNamespace<'_>, added: [&Value; 2]) -> Result<String> {
    let name = format!("hook.{}.svc", hook.namespace);
    let CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(vec![name])?;
    let files = json!({"tls.crt": cert.pem(), "tls.key": signing_key.serialize_pem()});
    hook.apply(
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hook"}, "stringData": files}),
    )?;
    let server = include_str!("../../../peers/adding_webhook.py");
    let [added, first] = added.map(Value::to_string);
    let mut pod = host_pod("hook", "default", &["/usr/bin/python3", "-c", server, "8443", &added, &first]);
    let volumes = pod["spec"]["volumes"].as_array_mut().context("the pod has no volumes")?;
    volumes.push(json!({"name": "tls", "secret": {"secretName": "hook"}}));
    let container = &mut pod["spec"]["containers"][0];
    let mounts = container["volumeMounts"].as_array_mut().context("the container has no mounts")?;
    mounts.push(json!({"name": "tls", "mountPath": "/tls"}));
    container["readinessProbe"] = json!({"tcpSocket": {"port": 8443}, "periodSeconds": 1});
    hook.apply(service("hook", json!({"ports": [{"port": 443, "targetPort": 8443}]})))?;
    hook.apply(pod)?;
    hook.ready("hook")?;
    hook.get("secret/hook", ".data.tls\\.crt")
}

/// The configuration of the webhook, for pods of these namespaces only.
fn configure(hook: &TestNamespace<'_>, authority: &str, fields: &[TestNamespace<'_>]) -> Value {
    let namespaces: Vec<&str> = fields.iter().map(|field| field.namespace.as_str()).collect();
    let only = json!({"key": "kubernetes.io/metadata.name", "operator": "In", "values": namespaces});
    json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": LATER},
        "webhooks": [{
            "name": "adds.tulle.test", "admissionReviewVersions": ["v1"], "sideEffects": "None", "timeoutSeconds": 5,
            "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "clientConfig": {"service": {"name": "hook", "namespace": hook.namespace}, "caBundle": authority},
            "namespaceSelector": {"matchExpressions": [only]},
            "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"], "operations": ["CREATE"],
                "scope": "Namespaced"}],
        }],
    })
}
