//! The query API over gRPC, as a client reads it that is not ours: grpcurl, with `mesh/proto/tulle/v1/query.proto` and the
//! command line of the book, against what the same port answers as JSON.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::leader::leader;
use super::page::UNTIL_CLOSED;
use super::{agrees, find, fresh, says};
use crate::cluster;
use crate::host::{self, Ended};
use crate::kubectl::Kube;
use crate::suites::Skip;
use crate::suites::namespace::TestNamespace;

/// The operator's port for queries.
const PORT: &str = "26162";
/// The time that is summed, in seconds: longer than the test takes.
const WINDOW: u64 = 600;
/// grpcurl ends with this and the code of the status.
const ENDS_WITH: i32 = 64;

pub(super) fn of_grpcurl(kube: &Kube) -> Result<()> {
    if !host::is_installed("curl") {
        bail!(Skip("this machine has no curl"));
    }
    let program = cluster::grpcurl()?.display().to_string();
    let field = TestNamespace::meshed(kube, &fresh("t-see-grpc"))?;
    let other = TestNamespace::plain(kube, "t-see-grpc-other")?;
    field.service("web", 1, &["--errors=20", "--delay=5"])?;
    field.load("load", "web:80", 50)?;
    agrees(&field, "load", "workload", "web")?;
    // What is compared is about the same requests only if there are no more.
    field.kubectl(&["scale", "deployment", "load", "--replicas=0"])?;
    kube.wait_for("the load to end", 60, || Ok(field.pods("load")?.is_empty()))?;

    let forward = Forward::begin(kube)?;
    let api = Api { kube, program, address: format!("127.0.0.1:{}", forward.port) };
    same_answers(&api, &field)?;
    same_refusals(&api, &field, &other)?;
    not_described(&api, &field)
}

fn same_answers(api: &Api<'_>, field: &TestNamespace<'_>) -> Result<()> {
    let (namespace, token) = (field.namespace.as_str(), token(field)?);
    let in_namespace = json!({"namespace": namespace, "window": WINDOW});
    let stat = api.agree(&token, "stat", "Stat", &in_namespace)?;
    let web = find(&stat["rows"], |row| row["party"]["name"] == "web");
    let party = json!({"namespace": namespace, "kind": "Deployment", "name": "web"});
    ensure!(web["party"] == party, "no row of web: {stat}");
    for count in ["requests", "failures", "p50Ms"] {
        ensure!(web["golden"][count].as_f64() > Some(0.0), "{count} of web: {web}");
    }

    let by_service = json!({"namespace": namespace, "window": WINDOW, "by": "BY_SERVICE"});
    let stat = api.agree(&token, "stat", "Stat", &by_service)?;
    let web = find(&stat["rows"], |row| row["party"]["name"] == "web");
    ensure!(web["party"]["kind"] == "Service", "no row of Service web: {stat}");

    let edges = api.agree(&token, "edges", "Edges", &in_namespace)?;
    let edge = find(&edges["edges"], |edge| edge["source"]["name"] == "load");
    ensure!(edge["destination"]["name"] == "web" && edge["mtls"] == true, "no edge of the load: {edges}");
    ensure!(edge["golden"]["requests"].as_f64() > Some(0.0), "{edge}");
    // Nothing was refused here.
    let denials = api.agree(&token, "denials", "Denials", &json!({"namespace": namespace}))?;
    ensure!(denials == json!({"leader": true}), "{denials}");
    Ok(())
}

fn same_refusals(api: &Api<'_>, field: &TestNamespace<'_>, other: &TestNamespace<'_>) -> Result<()> {
    let asked = json!({"namespace": field.namespace});
    for method in ["Stat", "Edges"] {
        let nobody = api.call(None, method, &asked)?;
        refused(&nobody, 16, "Unauthenticated", &["no token", "kubectl create token", "tulle.dev/query"])?;
        let stranger = api.call(Some(&token(other)?), method, &asked)?;
        let rule = "{apiGroups: [tulle.dev], resources: [telemetry], verbs: [get]}";
        refused(&stranger, 7, "PermissionDenied", &["may not see namespace", &field.namespace, rule])?;
    }
    let wrong = json!({"namespace": field.namespace, "window": 1});
    refused(&api.call(Some(&token(field)?), "Stat", &wrong)?, 3, "InvalidArgument", &["window"])
}

/// Whoever asks for the description gets an answer that a client understands.
fn not_described(api: &Api<'_>, field: &TestNamespace<'_>) -> Result<()> {
    let header = authorization(&token(field)?);
    let ended = api.grpcurl(&["-H", &header, &api.address, "list"])?;
    ensure!(ended.status.code() == Some(1), "{ended:?}");
    says(&ended.stderr, &["server does not support the reflection API"])
}

fn refused(ended: &Ended, code: i32, name: &str, parts: &[&str]) -> Result<()> {
    ensure!(ended.status.code() == Some(ENDS_WITH + code), "expected {name}: {ended:?}");
    ensure!(ended.stdout.trim().is_empty(), "it answers all the same: {ended:?}");
    says(&ended.stderr, &[&format!("Code: {name}"), "Message: "])?;
    says(&ended.stderr, parts)
}

/// A token that shows a namespace.
fn token(field: &TestNamespace<'_>) -> Result<String> {
    let token = field.kubectl(&["create", "token", "default", "--audience=tulle.dev/query"])?;
    Ok(token.trim().to_owned())
}

fn authorization(token: &str) -> String {
    format!("authorization: Bearer {token}")
}

/// The query API at a port of this machine.
struct Api<'a> {
    kube: &'a Kube,
    /// grpcurl.
    program: String,
    address: String,
}

impl Api<'_> {
    /// Runs grpcurl with these arguments, however it ends.
    fn grpcurl(&self, arguments: &[&str]) -> Result<Ended> {
        let mut command = self.kube.program(&self.program)?;
        command.args(["-plaintext", "-max-time", "30"]).args(arguments);
        host::ended_within(&mut command, Duration::from_secs(60))
    }

    /// Calls a method.
    fn call(&self, token: Option<&str>, method: &str, asked: &Value) -> Result<Ended> {
        let import = host::workspace().join("mesh/proto").display().to_string();
        let (asked, method) = (asked.to_string(), format!("tulle.v1.Query/{method}"));
        let header = token.map(authorization);
        let mut arguments = vec!["-import-path", &import, "-proto", "tulle/v1/query.proto"];
        if let Some(header) = &header {
            arguments.extend(["-H", header]);
        }
        arguments.extend(["-d", &asked, &self.address, &method]);
        self.grpcurl(&arguments)
    }

    /// What a path answers as JSON.
    fn json(&self, token: &str, path: &str, asked: &Value) -> Result<Value> {
        let parameters: Vec<String> = asked
            .as_object()
            .context("a request is an object")?
            .iter()
            .map(|(name, value)| format!("{name}={}", parameter(value)))
            .collect();
        let url = format!("http://{}/api/v1/{path}?{}", self.address, parameters.join("&"));
        let mut curl = self.kube.program("curl")?;
        curl.args(["-s", "-S", "--fail", "-m", "30", "-H", &authorization(token), &url]);
        Ok(serde_json::from_str(&host::output_within(&mut curl, Duration::from_secs(60))?)?)
    }

    /// Fails unless a method answers in substance what a path does. Returns it.
    fn agree(&self, token: &str, path: &str, method: &str, asked: &Value) -> Result<Value> {
        let mut seen = None;
        // The last counts may be on their way, and counts leave the window: between two equal answers there is no change.
        self.kube.wait_for("two equal answers, and one over gRPC between them", 60, || {
            let before = substance(&self.json(token, path, asked)?);
            let ended = self.call(Some(token), method, asked)?;
            let after = substance(&self.json(token, path, asked)?);
            seen = (before == after).then_some((before, ended));
            Ok(seen.is_some())
        })?;
        let (of_json, ended) = seen.context("there were no answers")?;
        ensure!(ended.status.success(), "{method} {asked}: {ended:?}");
        let answer: Value =
            serde_json::from_str(&ended.stdout).with_context(|| format!("not JSON: {ended:?}"))?;
        let answer = substance(&answer);
        ensure!(answer == of_json, "{method} {asked}: over gRPC {answer}, as JSON {of_json}");
        Ok(answer)
    }
}

/// A field of a request as a parameter of a URL: enumerations are in lower case there, without their type.
fn parameter(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.strip_prefix("BY_").map_or_else(|| text.to_owned(), str::to_lowercase),
        None => value.to_string(),
    }
}

/// Counts: JSON that is made of messages has numbers of 64 bits as text.
const COUNTS: [&str; 13] = [
    "requests",
    "failures",
    "clientErrors",
    "abandoned",
    "denied",
    "retries",
    "connections",
    "failedConnections",
    "bytesUp",
    "bytesDown",
    "ejections",
    "count",
    "lost",
];

/// What two answers must have in common: every number as one of floating point, no zeros and nothing empty, which messages
/// leave out, and nothing that changes with the time alone. While the operator knows less than the window, that is its
/// length and what is divided by it.
fn substance(answer: &Value) -> Value {
    match answer {
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(name, _)| !["window", "rps"].contains(&name.as_str()));
            let fields = fields.map(|(name, value)| (name.clone(), of_field(name, value)));
            Value::Object(fields.filter(|(_, value)| !is_left_out(value)).collect())
        }
        Value::Array(entries) => Value::Array(entries.iter().map(substance).collect()),
        Value::Number(number) => json!(number.as_f64()),
        other => other.clone(),
    }
}

fn of_field(name: &str, value: &Value) -> Value {
    let written = value.as_str().filter(|_| COUNTS.contains(&name));
    match written.and_then(|text| text.parse::<f64>().ok()) {
        Some(count) => json!(count),
        None => substance(value),
    }
}

fn is_left_out(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(entries) => entries.is_empty(),
        // A message that is there is written, whatever is in it.
        Value::Object(_) => false,
    }
}

/// A port of this machine that is forwarded to the operator that leads, until this is dropped.
struct Forward {
    command: Child,
    port: u16,
    /// kubectl prints a line for each connection, and would end if nobody could read it.
    _output: Option<BufReader<ChildStdout>>,
}

impl Forward {
    fn begin(kube: &Kube) -> Result<Self> {
        let (pod, port) = (format!("pod/{}", leader(kube)?), format!(":{PORT}"));
        // kubectl chooses the port, because another test or run may have one.
        let forward = ["-n", "tulle-system", "port-forward", "--address=127.0.0.1", &pod, &port];
        let mut command = kube.program("bash")?;
        command.args(["-c", UNTIL_CLOSED, "bash"]).args(kube.words(&forward)?);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let command = command.spawn().context("cannot run bash")?;
        let mut forward = Self { command, port: 0, _output: None };
        let output = forward.command.stdout.take().context("the command has no standard output")?;
        let (mut output, mut line) = (BufReader::new(output), String::new());
        output.read_line(&mut line)?;
        // Forwarding from 127.0.0.1:PORT -> 26162
        let port = line.split([':', ' ']).find_map(|word| word.parse::<u16>().ok());
        forward.port = port.with_context(|| format!("kubectl port-forward has printed {line:?}"))?;
        forward._output = Some(output);
        Ok(forward)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        drop(self.command.stdin.take());
        let _ = self.command.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_over_grpc_has_the_substance_of_the_same_as_json() {
        let of_json = json!({"window": 60, "lost": 0, "rows": [{
            "party": {"namespace": "shop", "kind": "Deployment", "name": "1"}, "meshed": {"with": 0, "of": 1},
            "golden": {"requests": 12, "success": 1.0, "p50Ms": null, "rps": 0.2},
        }]});
        let of_grpc = json!({"window": "61", "rows": [{
            "party": {"namespace": "shop", "kind": "Deployment", "name": "1"}, "meshed": {"of": 1},
            "golden": {"requests": "12", "success": 1, "rps": 0.19},
        }]});
        assert_eq!(substance(&of_json), substance(&of_grpc));
        let mut fewer = of_grpc.clone();
        fewer["rows"][0]["golden"]["requests"] = json!("11");
        assert_ne!(substance(&of_json), substance(&fewer));
        let mut renamed = of_grpc;
        renamed["rows"][0]["party"]["name"] = json!(1);
        assert_ne!(substance(&of_json), substance(&renamed));
    }
}
