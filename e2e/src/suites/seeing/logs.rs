//! Access logs of real pods.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::enforced;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::TestNamespace;

/// Stands in the query and in two headers of every request.
const SECRET: &str = "s3cret";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

pub(super) fn of_policies(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-logs")?;
    field.service("web", 1, &[])?;
    field.service("bad", 1, &["--errors=100", "--status=500"])?;
    field.client("client")?;
    field.plain_client("plain")?;
    of_service(&field, json!({}))?;
    sends(&field, "client", "GET web/before", "200")?;
    errors(&field)?;
    shares(&field)?;
    all(&field)?;
    connection(&field)?;
    switched_off(&field)?;
    // Lines come in the order of their requests, so that these are all.
    let expected = ["/denied", "/refused", "/lucky", "/all", "/plain", "/again"];
    let found = paths(&field, "web")?;
    ensure!(found == expected, "the log of web is of {found:?}, expected {expected:?}");
    let found = paths(&field, "bad")?;
    ensure!(found == ["/broken", "/elsewhere"], "the log of bad is of {found:?}");
    Ok(())
}

fn errors(field: &TestNamespace<'_>) -> Result<()> {
    of_namespace(field, json!({"accessLog": "Errors"}))?;
    sends(field, "client", "GET web/fine", "200")?;
    sends(field, "client", "DELETE web/denied", "403")?;
    has(
        &logged(field, "web", "/denied")?,
        json!({
            "message": "request", "http.request.method": "DELETE", "http.response.status_code": 403,
            "error.type": "PolicyDenied", "tulle.client.id": identity(field), "server.port": 8080,
        }),
    )?;
    sends(field, "client", "GET bad/broken", "500")?;
    let broken = logged(field, "bad", "/broken")?;
    // The application's own answer has no reason of the mesh.
    has(&broken, json!({"http.response.status_code": 500, "error.type": null}))
}

fn shares(field: &TestNamespace<'_>) -> Result<()> {
    of_namespace(field, json!({"accessLog": "Sampled", "sample": "0%"}))?;
    sends(field, "client", "GET web/unlucky", "200")?;
    sends(field, "client", "DELETE web/refused", "403")?;
    logged(field, "web", "/refused").context("errors are logged whatever the share")?;
    of_namespace(field, json!({"accessLog": "Sampled", "sample": "100%"}))?;
    sends(field, "client", "GET web/lucky", "200")?;
    logged(field, "web", "/lucky").map(drop)
}

fn all(field: &TestNamespace<'_>) -> Result<()> {
    of_namespace(field, json!({"accessLog": "All"}))?;
    sends(field, "client", "GET web/all", "200")?;
    let line = logged(field, "web", "/all")?;
    has(
        &line,
        json!({
            "level": "INFO", "message": "request", "http.request.method": "GET",
            "http.response.status_code": 200, "error.type": null, "network.protocol.name": "http",
            "network.protocol.version": "1.1", "http.request.body.size": 0,
            "client.address": field.get("pod/client", ".status.podIP")?,
            "tulle.client.id": identity(field), "server.port": 8080, "trace_id": TRACE,
        }),
    )?;
    ensure!(line["http.response.body.size"].as_u64() > Some(0), "the answer's body has no bytes: {line}");
    ensure!(line["duration_ms"].as_f64() > Some(0.0), "the request took no time: {line}");
    sends(field, "plain", "GET web/plain", "200")?;
    let client = field.get("pod/plain", ".status.podIP")?;
    has(&logged(field, "web", "/plain")?, json!({"client.address": client, "tulle.client.id": null}))
}

/// A connection whose content is opaque has a line of its own, at its end.
fn connection(field: &TestNamespace<'_>) -> Result<()> {
    let sent = "HZC01\r\n";
    // The application takes it for a bad request, and closes.
    let script = format!("printf '{}' | curl -s -m 8 telnet://bad:80 || true", sent.escape_default());
    field.exec("client", &["/bin/sh", "-c", &script])?;
    let mut found = None;
    field.kube.wait_for("a line about the connection in the log of bad", 60, || {
        found = lines(field, "bad")?.into_iter().find(|line| line["message"] == "connection");
        Ok(found.is_some())
    })?;
    let line = found.context("there is no line")?;
    has(
        &line,
        json!({
            "network.transport": "tcp", "tulle.connection.received_bytes": sent.len(), "error.type": null,
            "client.address": field.get("pod/client", ".status.podIP")?, "tulle.client.id": identity(field),
            "server.port": 8080, "url.path": null,
        }),
    )
}

/// A narrower policy switches off what the namespace asks for.
fn switched_off(field: &TestNamespace<'_>) -> Result<()> {
    of_service(field, json!({"telemetry": {"accessLog": "Disabled"}}))?;
    sends(field, "client", "DELETE web/off", "403")?;
    sends(field, "client", "GET bad/elsewhere", "500")?;
    logged(field, "bad", "/elsewhere")?;
    of_service(field, json!({}))?;
    sends(field, "client", "GET web/again", "200")?;
    logged(field, "web", "/again").map(drop)
}

/// What the pods of the namespace log.
fn of_namespace(field: &TestNamespace<'_>, telemetry: Value) -> Result<()> {
    policy(field, "all", json!({"target": {"kind": "Namespace"}, "telemetry": telemetry}))?;
    enforced(field, "all")
}

/// Service web denies DELETE; `more` is merged into that policy.
fn of_service(field: &TestNamespace<'_>, more: Value) -> Result<()> {
    let deny = json!({"deny": [{"to": [{"methods": ["DELETE"]}]}]});
    let mut spec = json!({"target": {"kind": "Service", "name": "web"}, "access": deny});
    for (name, section) in more.as_object().into_iter().flatten() {
        spec[name] = section.clone();
    }
    policy(field, "web", spec)?;
    enforced(field, "web")
}

fn identity(field: &TestNamespace<'_>) -> String {
    format!("spiffe://cluster.local/ns/{}/sa/client", field.namespace)
}

/// Sends a request with secrets from a pod, such as `GET web/path`; fails unless its answer has this status.
fn sends(field: &TestNamespace<'_>, pod: &str, request: &str, expected: &str) -> Result<()> {
    let (method, target) = request.split_once(' ').context("method and target")?;
    let url = format!("http://{target}?token={SECRET}");
    let headers = [
        format!("authorization: Bearer {SECRET}"),
        format!("cookie: session={SECRET}"),
        format!("traceparent: 00-{TRACE}-00f067aa0ba902b7-01"),
    ];
    let mut command = vec!["/usr/bin/curl", "-s", "-m", "8", "-o", "/dev/null", "-w", "%{http_code}"];
    command.extend(["-X", method]);
    headers.iter().for_each(|header| command.extend(["-H", header.as_str()]));
    command.push(&url);
    let status = field.exec(pod, &command)?;
    ensure!(status == expected, "{request} from {pod} was answered {status}, expected {expected}");
    Ok(())
}

/// The access log of a service's pod. Nothing else that its sidecar logs has a secret either.
fn lines(field: &TestNamespace<'_>, service: &str) -> Result<Vec<Value>> {
    let log = field.kubectl(&["logs", &format!("deployment/{service}"), "-c", "tulle-proxy"])?;
    let secret = log.lines().find(|line| line.contains(SECRET));
    ensure!(secret.is_none(), "the sidecar of {service} has logged a secret: {secret:?}");
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line["target"] == "access").collect())
}

/// The paths of the requests in such a log.
fn paths(field: &TestNamespace<'_>, service: &str) -> Result<Vec<String>> {
    let lines = lines(field, service)?;
    let requests = lines.iter().filter(|line| line["message"] == "request");
    Ok(requests.map(|line| line["url.path"].as_str().unwrap_or("").to_owned()).collect())
}

/// Waits for the line about a request.
fn logged(field: &TestNamespace<'_>, service: &str, path: &str) -> Result<Value> {
    let mut found = None;
    field.kube.wait_for(&format!("a line about {path} in the log of {service}"), 60, || {
        found = lines(field, service)?.into_iter().find(|line| line["url.path"] == path);
        Ok(found.is_some())
    })?;
    found.context("there is no line")
}

/// Fails unless a line has these fields; null: it has none of this name.
pub(super) fn has(line: &Value, expected: Value) -> Result<()> {
    for (name, value) in expected.as_object().into_iter().flatten() {
        ensure!(&line[name] == value, "{name} is {}, expected {value}: {line}", line[name]);
    }
    Ok(())
}
