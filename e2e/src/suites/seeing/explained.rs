//! `tulle explain` against what real requests get.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{enforced, says};
use crate::cli::exit;
use crate::kubectl::Kube;
use crate::suites::mesh::policy;
use crate::suites::namespace::TestNamespace;
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
    unknown(&field)
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
