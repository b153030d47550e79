//! Single requests, as `tulle tap` shows them while pods run on.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::logs::has;
use super::{enforced, says};
use crate::cli::{Printed, exit};
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::TestNamespace;

/// Stands in the query and in two headers of the client's requests.
const SECRET: &str = "s3cret";
/// The client sends a request with secrets, and one that a policy denies, again and again.
const CLIENT: &str = "while :; do \
    curl -s -m 8 -o /dev/null -H 'authorization: Bearer s3cret' -H 'cookie: session=s3cret' 'http://web/secret?token=s3cret'; \
    curl -s -m 8 -o /dev/null -X DELETE http://web/forbidden; \
    sleep 0.2; done";

pub(super) fn requests(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-tap")?;
    field.service("web", 1, &[])?;
    let deny = json!({"target": {"kind": "Service", "name": "web"}, "access": {"deny": [{"to": [{"methods": ["DELETE"]}]}]}});
    policy(&field, "web", deny)?;
    enforced(&field, "web")?;
    field.load_with("load", "web:80", 20, &["--post-every=0", "--header=user-agent: probe/1"])?;
    field.apply(json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "client"}}))?;
    field.host_pod("client", "client", &["/bin/sh", "-c", CLIENT])?;
    let before = processes(&field)?;
    of_the_load(&field)?;
    denied(&field)?;
    outbound(&field)?;
    without_secrets(&field)?;
    nothing(&field)?;
    let after = processes(&field)?;
    ensure!(before == after, "a tap has restarted something:\n{before}\nbecame\n{after}");
    Ok(())
}

/// Runs `tulle tap` with these arguments.
fn tap(field: &TestNamespace<'_>, arguments: &[&str]) -> Result<Printed> {
    let command = ["-n", &field.namespace, "tap"];
    field.kube.tulle_expecting(exit::FINE, &[&command[..], arguments, &["--timeout", "60s"]].concat())
}

/// So many requests that it shows.
fn shown(field: &TestNamespace<'_>, count: usize, arguments: &[&str]) -> Result<Vec<Value>> {
    let max = count.to_string();
    let printed = tap(field, &[arguments, &["--max", &max, "-o", "json"]].concat())?;
    let lines: Vec<Value> = printed.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(lines.len() == count, "{} requests were shown, expected {count}: {printed:?}", lines.len());
    says(&printed.stderr, &["passed the filter, ", &format!("{count} shown, ")])?;
    ensure!(!format!("{printed:?}").contains(SECRET), "a secret is shown: {printed:?}");
    Ok(lines)
}

fn party(field: &TestNamespace<'_>, kind: &str, name: &str) -> Value {
    json!({"namespace": field.namespace, "kind": kind, "name": name})
}

fn of_the_load(field: &TestNamespace<'_>) -> Result<()> {
    for line in shown(field, 5, &["web", "--path", "/", "--status", "2xx", "--header", "user-agent"])? {
        has(&line, json!({"direction": "inbound", "status": 200, "mtls": true, "method": "GET"}))?;
        has(&line, json!({"destination": party(field, "Deployment", "web")}))?;
        ensure!(line["headers"][0][0] == "user-agent", "the header is not shown: {line}");
    }
    for line in shown(field, 3, &["web", "--from", "default", "--header", "user-agent"])? {
        has(&line, json!({"source": party(field, "ServiceAccount", "default"), "path": "/"}))?;
        has(&line, json!({"headers": [["user-agent", "probe/1"]]}))?;
    }
    let table = tap(field, &["web", "--max", "1"])?.stdout;
    let head: Vec<&str> = table.lines().next().unwrap_or("").split_whitespace().collect();
    let expected =
        ["TIME", "DIR", "SRC", "DST", "METHOD", "HOST", "PATH", "STATUS", "LATENCY", "MTLS", "WHY"];
    ensure!(head == expected && table.lines().count() == 2, "the table is\n{table}");
    let row = tap(field, &["web", "--max", "1", "--no-headers"])?.stdout;
    ensure!(row.lines().count() == 1 && row.contains("   in "), "the row is\n{row}");
    Ok(())
}

fn denied(field: &TestNamespace<'_>) -> Result<()> {
    for line in shown(field, 3, &["web", "--denied"])? {
        has(
            &line,
            json!({"method": "DELETE", "path": "/forbidden", "status": 403, "reason": "PolicyDenied"}),
        )?;
        has(&line, json!({"source": party(field, "ServiceAccount", "client")}))?;
    }
    says(&tap(field, &["web", "--denied", "--max", "1"])?.stdout, &["PolicyDenied"])
}

/// The same requests, as the client's sidecar has seen them.
fn outbound(field: &TestNamespace<'_>) -> Result<()> {
    for line in shown(field, 2, &["client", "--to", "web", "--method", "get"])? {
        has(&line, json!({"direction": "outbound", "source": party(field, "Pod", "client")}))?;
        has(&line, json!({"destination": party(field, "Service", "web"), "path": "/secret"}))?;
    }
    Ok(())
}

/// A query is never shown, and headers with credentials are refused.
fn without_secrets(field: &TestNamespace<'_>) -> Result<()> {
    for line in shown(field, 3, &["web", "--path", "/secret", "--header", "user-agent"])? {
        has(&line, json!({"path": "/secret"}))?;
    }
    for header in ["authorization", "Cookie"] {
        let command = ["-n", &field.namespace, "tap", "web", "--header", header, "--timeout", "60s"];
        let refused = field.kube.tulle_expecting(exit::USAGE, &command)?;
        says(&refused.stderr, &["credentials"])?;
        ensure!(!format!("{refused:?}").contains(SECRET), "a secret is shown: {refused:?}");
    }
    Ok(())
}

/// That nothing has passed is not a failure, and the last line says it.
fn nothing(field: &TestNamespace<'_>) -> Result<()> {
    let command = ["-n", &field.namespace, "tap", "web", "--path", "/nobody/asks", "--timeout", "5s"];
    let printed = field.kube.tulle_expecting(exit::FINE, &command)?;
    says(&printed.stderr, &["0 shown, 0 passed the filter, 0 lost", "tulle pods"])
}

/// The pods, and how often their containers were restarted.
fn processes(field: &TestNamespace<'_>) -> Result<String> {
    let restarts =
        "{.status.initContainerStatuses[*].restartCount} {.status.containerStatuses[*].restartCount}";
    let path = format!("jsonpath={{range .items[*]}}{{.metadata.uid}} {restarts}{{\"\\n\"}}{{end}}");
    field.kubectl(&["get", "pods", "-o", &path])
}
