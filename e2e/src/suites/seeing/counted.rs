//! What `tulle stat`, `edges` and `routes` show, against what the load has counted.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{WINDOW, agrees, enforced, find, fresh, requests, row, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::{Account, TestNamespace};
use crate::suites::routes::{backend, http, meshed, settled};

/// Requests that a client without a sidecar sends.
const PLAIN: u64 = 20;
/// Requests that a policy denies.
const DENIED: u64 = 20;

pub(super) fn who_talks(kube: &Kube) -> Result<()> {
    let field = meshed(kube, &fresh("t-see-edges"))?;
    field.service("web", 2, &["--errors=20", "--delay=20"])?;
    field.service("idle", 1, &[])?;
    field.apply(http("web", "web", json!([{"backendRefs": [backend("web")]}])))?;
    settled(&field, "httproute/web")?;
    field.load("load", "web:80", 50)?;

    let (workload, account) = agrees(&field, "load", "workload", "web")?;
    fails_as(&workload, &account)?;
    ensure!(workload["meshed"] == json!({"with": 2, "of": 2}), "meshed: {}", workload["meshed"]);
    let (service, account) = agrees(&field, "load", "service", "web")?;
    fails_as(&service, &account)?;
    // An answer takes the load longer than the sidecar; twice as long is allowed, for the width of a bucket.
    let longest = account.p99_us as f64 / 1_000.0 * 2.0;
    for row in [&workload, &service] {
        let p50 = row["golden"]["p50Ms"].as_f64().context("there is no p50")?;
        ensure!(p50 >= 18.0, "p50 of {p50} ms, although each answer waits for 20 ms");
        ensure!(p50 <= longest, "p50 of {p50} ms, although the load's p99 is {} us", account.p99_us);
        let p99 = row["golden"]["p99Ms"].as_f64().context("there is no p99")?;
        ensure!(p99 >= p50, "p99 {p99} is below p50 {p50}");
    }

    edge_of_the_load(&field)?;
    route(&field)?;
    edge_of_a_plain_client(&field)?;
    tables(&field)
}

/// A fifth of the answers are errors.
fn fails_as(row: &Value, account: &Account) -> Result<()> {
    let success = row["golden"]["success"].as_f64().context("there is no success rate")?;
    let counted = 1.0 - account.failed as f64 / account.ended as f64;
    ensure!((success - counted).abs() < 0.03, "success rate {success}, but the load has counted {counted}");
    let failures = row["golden"]["failures"].as_u64().unwrap_or(0);
    ensure!(failures > 0 && failures < requests(row), "{failures} failures of {} requests", requests(row));
    Ok(())
}

fn edges(field: &TestNamespace<'_>) -> Result<Value> {
    Ok(field.kube.tulle_json(&["-n", &field.namespace, "edges", "--window", WINDOW])?["edges"].clone())
}

fn edge_of_the_load(field: &TestNamespace<'_>) -> Result<()> {
    let all = edges(field)?;
    let edge = find(&all, |edge| edge["source"]["name"] == "load" && edge["destination"]["name"] == "web");
    let source = json!({"namespace": field.namespace, "kind": "Deployment", "name": "load"});
    ensure!(edge["source"] == source, "the load is {}: {all}", edge["source"]);
    ensure!(edge["destination"]["kind"] == "Service", "it sends to {}", edge["destination"]);
    ensure!(edge["mtls"] == true && edge["protocol"] == "http1", "{edge}");
    ensure!(requests(&edge) > 0, "{edge}");
    let strangers = |edge: &Value| {
        [&edge["source"], &edge["destination"]].iter().all(|party| party["namespace"] != *field.namespace)
    };
    ensure!(find(&all, strangers).is_null(), "an edge of other namespaces: {all}");
    Ok(())
}

fn route(field: &TestNamespace<'_>) -> Result<()> {
    let ask = ["-n", &field.namespace, "routes", "web", "--window", WINDOW];
    let name = format!("HTTPRoute/{}/web", field.namespace);
    field.kube.wait_for("the route in tulle routes", 60, || {
        let routes = field.kube.tulle_json(&ask)?;
        let row = find(&routes["rows"], |row| row["route"] == name.as_str());
        Ok(row["party"]["name"] == "web" && requests(&row) > 0)
    })
}

fn edge_of_a_plain_client(field: &TestNamespace<'_>) -> Result<()> {
    field.plain_client("plain")?;
    let ask = format!("for i in $(seq {PLAIN}); do curl -s -m 8 -o /dev/null http://web/; done");
    field.exec("plain", &["/bin/sh", "-c", &ask])?;
    let mut last = Value::Null;
    let waited = field.kube.wait_for("the edge of the client without a sidecar", 60, || {
        last = edges(field)?;
        let edge = find(&last, |edge| edge["source"]["kind"] == "Plain");
        let web = json!({"namespace": field.namespace, "kind": "Deployment", "name": "web"});
        Ok(edge["destination"] == web && edge["mtls"] == false && requests(&edge) == PLAIN)
    });
    waited.with_context(|| format!("edges: {last}"))
}

/// The same as tables, and what the commands refuse.
fn tables(field: &TestNamespace<'_>) -> Result<()> {
    let (kube, namespace) = (field.kube, field.namespace.as_str());
    let table = kube.tulle(&["-n", namespace, "edges", "--window", WINDOW])?;
    let line = |from: &str| table.lines().find(|line| line.starts_with(from)).unwrap_or("").to_owned();
    let words = |line: &str| line.split_whitespace().take(5).map(str::to_owned).collect::<Vec<_>>();
    ensure!(words(&line("load")) == ["load", "svc/web", "80", "http1", "yes"], "{table}");
    ensure!(words(&line("plain")) == ["plain", "web", "-", "http1", "no"], "{table}");
    let stat = kube.tulle(&["-n", namespace, "stat", "deploy", "--window", WINDOW])?;
    says(&stat, &["NAME", "MESHED", "SUCCESS", "P99", "2/2"])?;
    // The worst first, and those that nobody calls too.
    let place = |name: &str| stat.lines().position(|line| line.starts_with(name));
    ensure!(place("web") == Some(1) && place("idle") > Some(1), "{stat}");
    let everything = kube.tulle(&["-A", "stat", "--window", WINDOW, "--no-headers"])?;
    ensure!(everything.lines().any(|line| line.starts_with(namespace)), "{everything}");
    let usage = kube.tulle_expecting(exit::USAGE, &["-n", namespace, "stat", "--window", "1s"])?;
    says(&usage.stderr, &["--window"])?;
    let unknown = kube.tulle_expecting(exit::USAGE, &["-n", namespace, "stat", "web"])?;
    says(&unknown.stderr, &["workload/web"])?;
    let from = kube.tulle_json(&["-n", namespace, "stat", "svc", "--from", "idle", "--window", WINDOW])?;
    ensure!(from["rows"] == json!([]), "idle has sent nothing, but: {from}");
    Ok(())
}

pub(super) fn denials(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, &fresh("t-see-denied"))?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let allow = json!([{"from": [{"serviceAccount": "nobody"}]}]);
    let closed = json!({"target": {"kind": "Service", "name": "web"}, "access": {"allow": allow}});
    policy(&field, "closed", closed)?;
    enforced(&field, "closed")?;
    let ask = format!(
        "for i in $(seq {DENIED}); do curl -s -m 8 -o /dev/null -w '%{{http_code}} ' http://web/; done"
    );
    let answers = field.exec("client", &["/bin/sh", "-c", &ask])?;
    ensure!(
        answers.split_whitespace().filter(|status| *status == "403").count() as u64 == DENIED,
        "{answers}"
    );
    let (mut service, mut edge) = (Value::Null, Value::Null);
    let waited = kube.wait_for("the denials in tulle stat and edges", 60, || {
        service = row(&field, "service", "web")?;
        edge = find(&edges(&field)?, |edge| edge["source"]["name"] == "client");
        Ok(requests(&service) == DENIED && requests(&edge) == DENIED)
    });
    waited.with_context(|| format!("last seen: {service} and {edge}"))?;
    for seen in [&service, &edge] {
        let golden = &seen["golden"];
        ensure!(golden["denied"] == DENIED && golden["success"].is_null(), "{seen}");
        for none in ["failures", "clientErrors", "abandoned"] {
            ensure!(golden[none] == 0, "{none}: {seen}");
        }
        ensure!(golden["reasons"] == json!([{"name": "PolicyDenied", "count": DENIED}]), "{seen}");
    }
    let ask = ["-n", field.namespace.as_str(), "stat", "svc", "--window", WINDOW, "-o", "wide"];
    let table = kube.tulle(&ask)?;
    for (column, expected) in [("DENIED", "20"), ("SUCCESS", "-"), ("WORST", "PolicyDenied")] {
        ensure!(cell(&table, "web", column) == Some(expected), "{column} is not {expected}:\n{table}");
    }
    Ok(())
}

/// The cell of a table in this column, and in the row that begins with this name.
fn cell<'t>(table: &'t str, name: &str, column: &str) -> Option<&'t str> {
    let mut lines = table.lines();
    let at = lines.next()?.split_whitespace().position(|header| header == column)?;
    lines.find(|line| line.starts_with(name))?.split_whitespace().nth(at)
}
