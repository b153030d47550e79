//! `tulle explain` against what real requests get.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{enforced, find, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::{TestNamespace, service};
use crate::suites::routes::{backend, below, http, meshed, settled};

/// A request, and what becomes of it.
struct Case {
    /// The pod that sends it.
    client: &'static str,
    service: &'static str,
    method: &'static str,
    path: &'static str,
    /// `name: value`.
    header: Option<&'static str>,
    /// The status that a real request gets; `000`: its connection is closed.
    status: &'static str,
    /// The stage that ends it, and the kind and name of what decides it; `None`: it reaches the application.
    ends: Option<(&'static str, &'static str)>,
    /// The Service whose application answers.
    answers: &'static str,
}

/// A GET of `/` that the application of the dialled Service answers.
const fn get(client: &'static str, service: &'static str) -> Case {
    Case {
        client,
        service,
        method: "GET",
        path: "/",
        header: None,
        status: "200",
        ends: None,
        answers: service,
    }
}

/// The same, refused by the stage.
const fn refused(case: Case, status: &'static str, stage: &'static str, object: &'static str) -> Case {
    Case { status, ends: Some((stage, object)), answers: "", ..case }
}

const CASES: &[Case] = &[
    get("friend", "open"),
    get("plain", "open"),
    get("friend", "guarded"),
    refused(get("stranger", "guarded"), "403", "access", "MeshPolicy guarded"),
    refused(Case { method: "POST", ..get("friend", "guarded") }, "403", "access", "MeshPolicy guarded"),
    refused(get("plain", "guarded"), "000", "tls", "MeshPolicy guarded"),
    get("friend", "routed"),
    Case { header: Some("x-tester: yes"), answers: "beta", ..get("friend", "routed") },
    Case { header: Some("x-tester: no"), ..get("friend", "routed") },
    refused(Case { path: "/old/7", ..get("friend", "routed") }, "308", "route", "HTTPRoute routed"),
    refused(Case { path: "/nowhere", ..get("friend", "partly") }, "404", "route", "HTTPRoute partly"),
    refused(get("friend", "empty"), "503", "endpoint", "Service empty"),
];

pub(super) fn agree(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-see-explain")?;
    for name in ["open", "guarded", "routed", "beta", "partly"] {
        field.service(name, 1, &[])?;
    }
    field.service("empty", 0, &[])?;
    field.client("friend")?;
    field.client("stranger")?;
    field.plain_client("plain")?;
    let allow = json!([{"from": [{"serviceAccount": "friend"}], "to": [{"methods": ["GET"]}]}]);
    let guard = json!({"target": {"kind": "Service", "name": "guarded"}, "mtls": "Strict", "access": {"allow": allow}});
    policy(&field, "guarded", guard)?;
    enforced(&field, "guarded")?;
    let testers = json!([{"headers": [{"name": "x-tester", "value": "yes"}]}]);
    let redirect =
        json!({"statusCode": 308, "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"}});
    field.apply(http(
        "routed",
        "routed",
        json!([
            {"matches": below("/old"), "filters": [{"type": "RequestRedirect", "requestRedirect": redirect}]},
            {"matches": testers, "backendRefs": [backend("beta")]},
            {"backendRefs": [backend("routed")]},
        ]),
    ))?;
    let part = json!([{"matches": below("/somewhere"), "backendRefs": [backend("partly")]}]);
    field.apply(http("partly", "partly", part))?;
    settled(&field, "httproute/routed")?;
    settled(&field, "httproute/partly")?;
    for case in CASES {
        same(&field, case).with_context(|| {
            let Case { client, service, method, path, .. } = case;
            format!("{method} {path} from {client} to {service}")
        })?;
    }
    replayed(&field)?;
    unknown(&field)
}

/// A refusal is explained by the id in its answer: as it was, and as the same request would fare now. The client learns
/// nothing of it.
fn replayed(field: &TestNamespace<'_>) -> Result<()> {
    let url = "http://guarded/orders?card=s3cret";
    let ask = format!("curl -s -m 8 -X POST -o /dev/null -D - '{url}'");
    let head = field.exec("friend", &["/bin/sh", "-c", &ask])?;
    let id = head.lines().find_map(|line| line.strip_prefix("tulle-denial: ")).map(str::trim);
    let id = id.with_context(|| format!("the refusal has no id: {head}"))?;
    let explain = |code, output| {
        field.kube.tulle_expecting(code, &["-n", &field.namespace, "explain", "--denial", id, "-o", output])
    };
    let found = explain(exit::FINDINGS, "json")?.json()?;
    let denial = &found["denial"];
    ensure!(denial["id"] == id && denial["method"] == "POST" && denial["path"] == "/orders", "{found}");
    ensure!(denial["policy"] == format!("MeshPolicy/{}/guarded", field.namespace), "{found}");
    says(denial["client"].as_str().unwrap_or(""), &["/sa/friend"])?;
    ensure!(found["now"]["reaches"] == false, "the request is refused as before: {found}");
    listed(field, id)?;
    let text = explain(exit::FINDINGS, "table")?.stdout;
    says(&text, &["refused POST /orders of host guarded", "no rule of allow matches", "× stop"])?;
    ensure!(!text.contains("s3cret") && !found.to_string().contains("s3cret"), "the query is shown: {text}");
    // The client, who is in the same network, is not told.
    let pod = found["pod"].as_str().and_then(|pod| pod.split_once('/')).context("the pod has no name")?.1;
    let address = field.get(&format!("pod/{pod}"), ".status.podIP")?;
    let ask = format!("curl -s -m 8 -o /dev/null -w '%{{http_code}}' http://{address}:26152/denials");
    let status = field.exec("plain", &["/bin/sh", "-c", &ask])?;
    ensure!(status.trim() == "403", "another pod asked for refusals and got {status}");
    // With a rule that allows it, the same request would be let in.
    let allow = json!([{"from": [{"serviceAccount": "friend"}]}]);
    policy(
        field,
        "guarded",
        json!({"target": {"kind": "Service", "name": "guarded"}, "mtls": "Strict", "access": {"allow": allow}}),
    )?;
    enforced(field, "guarded")?;
    let found = explain(exit::FINE, "json")?.json()?;
    ensure!(found["now"]["reaches"] == true && found["denial"]["id"] == id, "{found}");
    let unknown = "0123456789abcdef";
    let refused = field
        .kube
        .tulle_expecting(exit::FAILED, &["-n", &field.namespace, "explain", "--denial", unknown])?;
    says(&refused.stderr, &["error:", unknown, "hint:"])
}

/// The refusal is in the list of the last ones, as soon as the sidecar has reported it.
fn listed(field: &TestNamespace<'_>, id: &str) -> Result<()> {
    let mut found = Value::Null;
    let waited = field.kube.wait_for("the denial to be listed", 60, || {
        found = field.kube.tulle_json(&["-n", &field.namespace, "denials", "guarded"])?;
        let row = find(&found["rows"], |row| row["id"] == id);
        let is_named = row["caller"]["name"] == "friend" && row["workload"]["name"] == "guarded";
        let is_decided = row["policy"] == "guarded" && row["rule"] == "NoAllowMatched";
        Ok(is_named && is_decided && row["method"] == "POST" && row["path"] == "/orders")
    });
    waited.with_context(|| format!("last listed: {found}"))?;
    let printed = field.kube.tulle_expecting(exit::FINE, &["-n", &field.namespace, "denials"])?;
    says(&printed.stdout, &["CALLER", "POST /orders", "NoAllowMatched", id])?;
    says(&printed.stderr, &["tulle explain --denial ID"])?;
    let nobody = field.kube.tulle_expecting(exit::FINE, &["-n", &field.namespace, "denials", "beta"])?;
    says(&nobody.stderr, &["nothing was denied at beta"])
}

/// A real request, and what is said about it.
fn same(field: &TestNamespace<'_>, case: &Case) -> Result<()> {
    let (status, body) = sent(field, case)?;
    ensure!(status == case.status, "the request was answered {status}, expected {}: {body}", case.status);
    let code = if case.ends.is_none() { exit::FINE } else { exit::FINDINGS };
    let printed = field.kube.tulle_expecting(code, &question(field, case, "json"))?;
    let explained = printed.json()?;
    let outcome = explained["outcome"].as_str().unwrap_or("");
    let stages = explained["stages"].as_array().context("there are no stages")?;
    ensure!(explained["reaches"] == case.ends.is_none(), "{outcome}");
    match case.ends {
        None => {
            let answer: Value =
                serde_json::from_str(&body).with_context(|| format!("the answer is {body}"))?;
            ensure!(answer["service"] == case.answers, "{} has answered", answer["service"]);
            says(outcome, &[&format!("reaches {}/{}:80", field.namespace, case.answers)])?;
            let over = if case.client == "plain" { "in plain text" } else { "over mTLS" };
            says(outcome, &[over])?;
        }
        Some((stage, object)) => {
            let last = stages.last().context("there is no stage")?;
            ensure!(last["name"] == stage && last["verdict"] == "stop", "it ends at {last}, not at {stage}");
            let (kind, name) = object.split_once(' ').context("kind and name")?;
            let object = format!("{kind}/{}/{name}", field.namespace);
            ensure!(last["object"] == object.as_str(), "{} decides, expected {object}", last["object"]);
            if status != "000" {
                says(outcome, &[&status])?;
            }
        }
    }
    let table = field.kube.tulle_expecting(code, &question(field, case, "table"))?.stdout;
    says(&table, &[outcome, if code == exit::FINE { "√ pass" } else { "× stop" }])
}

fn question<'a>(field: &'a TestNamespace<'_>, case: &'a Case, output: &'a str) -> Vec<&'a str> {
    let mut question = vec!["-n", &field.namespace, "explain", case.client, case.service];
    question.extend(["--method", case.method, "--path", case.path, "-o", output]);
    if let Some(header) = case.header {
        question.extend(["--header", header]);
    }
    question
}

/// Sends the request; status and body.
fn sent(field: &TestNamespace<'_>, case: &Case) -> Result<(String, String)> {
    let header = case.header.map(|header| format!("-H '{header}'")).unwrap_or_default();
    let url = format!("http://{}{}", case.service, case.path);
    let script = format!("curl -s -m 8 -X {} {header} -w '\\n%{{http_code}}' {url} || true", case.method);
    let printed = field.exec(case.client, &["/bin/sh", "-c", &script])?;
    let (body, status) = printed.trim_end().rsplit_once('\n').unwrap_or(("", printed.trim()));
    Ok((status.to_owned(), body.to_owned()))
}

/// What does not exist is said, and is no finding about a request.
fn unknown(field: &TestNamespace<'_>) -> Result<()> {
    ensure!(field.status("friend", "http://nobody/")? == "000", "somebody answers as Service nobody");
    let ask = |client, service| {
        field.kube.tulle_expecting(exit::FAILED, &["-n", &field.namespace, "explain", client, service])
    };
    says(&ask("friend", "nobody")?.stderr, &["error:", "no Service nobody", &field.namespace])?;
    says(&ask("nobody", "open")?.stderr, &["error:", "nobody", &field.namespace])?;
    says(&ask("friend", "open:81")?.stderr, &["error:", "80"])
}

/// The containers behind Service `astray` declare another port than its targetPort, and nothing listens there.
pub(super) fn doubts(kube: &Kube) -> Result<()> {
    let field = TestNamespace::meshed(kube, "t-see-doubts")?;
    field.service("web", 1, &[])?;
    let ports = json!([{"name": "http", "port": 80, "targetPort": 9999}]);
    field.apply(service("astray", json!({"selector": {"app": "web"}, "ports": ports})))?;
    field.client("client")?;
    let explain = |code, destination: &str, output: &str| {
        let ask = ["-n", &field.namespace, "explain", "client", destination, "-o", output];
        kube.tulle_expecting(code, &ask)
    };
    let mut explained = Value::Null;
    let waited = kube.wait_for("the targetPort to be doubted", 30, || {
        explained = explain(exit::FINE, "astray", "json")?.json()?;
        Ok(find(&explained["stages"], |stage| stage["name"] == "endpoint")["verdict"] == "depends")
    });
    waited.with_context(|| format!("last explained: {explained}"))?;
    let doubt =
        ["? depends", ":9999", "declare port 8080 and not 9999", "targetPort of Service t-see-doubts/astray"];
    says(&explain(exit::FINE, "astray", "table")?.stdout, &doubt)?;
    let (status, body) = sent(&field, &get("client", "astray"))?;
    ensure!(status == "503" && body.contains("targetPort"), "the client got {status}: {body}");
    kube.wait_for("the server's sidecar to log the port", 10, || {
        let logs = field.kubectl(&["logs", "deployment/web", "-c", "tulle-proxy"])?;
        Ok(logs.contains("nothing listens at port 9999"))
    })?;

    for outside in ["8.8.8.8:53", "8.8.8.8"] {
        says(&explain(exit::FAILED, outside, "table")?.stderr, &["error:", "8.8.8.8", "outside the mesh"])?;
    }
    let address = field.get("service/web", ".spec.clusterIP")?;
    let reached = explain(exit::FINE, &format!("{address}:80"), "table")?.stdout;
    says(&reached, &["reaches t-see-doubts/web:80", "over mTLS"])
}
