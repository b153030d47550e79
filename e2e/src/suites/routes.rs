//! Routes of the Gateway API on real pods: what the official suite (suite `conformance`) does not look at.
//!
//! Each test applies routes in namespaces of its own and reads what clients get, what applications see, and what the
//! status says.

mod answers;
mod attachment;
mod changes;
mod protocols;
mod status;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::namespace::TestNamespace;
use super::{Skip, Test};
use crate::gateway;
use crate::host;
use crate::install;
use crate::kubectl::Kube;

pub(super) const TESTS: &[Test] = &[
    ("the definitions of the Gateway API may be installed after Tulle", installed_later),
    ("a redirect names scheme, host, port and path by the rules of the Gateway API", answers::redirected),
    ("an application sees the path, query and host that a rewrite says", answers::rewritten),
    (
        "invalid backends answer 500 for their share, and a backend without endpoints answers 503",
        answers::invalid_backends,
    ),
    ("methods, query parameters and regular expressions match", answers::matched),
    ("headers of a backend are edited for that backend only", answers::headers_of_backends),
    ("a mirror gets its share of copies, and its answers go nowhere", answers::mirrored),
    ("preflight requests are answered by the rule's CORS filter", answers::cors),
    ("a route's timeout answers 504 in time", answers::timeouts),
    ("a parent's sectionName or port restricts a route to that port", attachment::ports),
    ("a consumer's route beats the producer's, for that namespace only", attachment::consumer),
    (
        "of two routes with the same match the older decides, and the more specific match first",
        attachment::age,
    ),
    ("a pod that is dialled by its address is not routed", attachment::pod_address),
    ("every reason of a status is written, with the generation that was observed", status::reasons),
    ("GRPCRoute takes a port from HTTPRoute, and the status of the loser says so", status::conflict),
    ("headless Services and external names are not accepted as parents", status::parents),
    ("entries of other controllers stay, and one's own entry ends with its parent", status::foreign),
    ("a filter that is not supported has a status, and its requests are answered 500", status::unsupported),
    ("the status says how many sidecars have acknowledged a route", status::acknowledged),
    ("opaque TCP passes at a Service with an HTTPRoute", protocols::opaque),
    (
        "a gRPC call that no rule matches is UNIMPLEMENTED, and one without backend UNAVAILABLE",
        protocols::grpc,
    ),
    ("a TCPRoute splits connections, and a TLSRoute reads the server name", protocols::tcp_and_tls),
    ("each of a hundred changes of a route takes effect at the client", changes::hundred),
    ("the samples of routes, policies and Canaries are accepted", samples),
];

/// A pod of the operator that started before the definitions came has read the routes of the other tests.
fn installed_later(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-later")?;
    let crd = "crd/httproutes.gateway.networking.k8s.io";
    let since = kube.run(&["get", crd, "-o", "jsonpath={.metadata.creationTimestamp}"])?;
    let operators = ["-n", "tulle-system", "get", "pods", "-l", "app=tulle-operator", "-o"];
    let started = "jsonpath={.items[*].status.startTime}";
    let started = kube.run(&[&operators[..], &[started]].concat())?;
    // Both are in UTC and as long, so that they compare as text.
    if started.split(' ').any(|start| start >= since.as_str()) {
        bail!(Skip("the definitions of the Gateway API were there before Tulle"));
    }
    let restarts = "jsonpath={.items[*].status.containerStatuses[0].restartCount}";
    let restarts = kube.run(&[&operators[..], &[restarts]].concat())?;
    ensure!(restarts.split(' ').all(|count| count == "0"), "the operator was restarted: {restarts}");
    field.service("web", 1, &[])?;
    field.client("client")?;
    field.apply(http(
        "web",
        "web",
        json!([{"filters": [response_header("x-route", "yes")], "backendRefs": [backend("web")]}]),
    ))?;
    settled(&field, "httproute/web")?;
    let answer = head(&field, "client", &["http://web/"])?;
    ensure!(answer.header("x-route") == "yes", "the route has no effect: {answer:?}");
    Ok(())
}

fn samples(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-samples")?;
    let folder = host::workspace().join("config/samples");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let kind = name.split(['-', '.']).next().unwrap_or("");
        let kinds = ["httproute", "grpcroute", "tlsroute", "tcproute", "policy", "shadow", "deny", "canary"];
        if kinds.contains(&kind) {
            names.push(name);
        }
    }
    ensure!(names.len() >= 16, "found only the samples {names:?}");
    for name in names {
        let text =
            install::sample(&name)?.replace("namespace: shop", &format!("namespace: {}", field.namespace));
        // The time at which faults end has passed, until its reader sets another one.
        let text = text.replace("2000-01-01T00:00:00Z", &super::resilience::in_seconds(600)?);
        kube.dry_run(&text).with_context(|| format!("config/samples/{name}"))?;
    }
    Ok(())
}

/// A meshed namespace, on a cluster that has routes.
pub(super) fn meshed<'a>(kube: &'a Kube, namespace: &str) -> Result<TestNamespace<'a>> {
    gateway::install(kube)?;
    TestNamespace::meshed(kube, namespace)
}

/// A route of kind HTTPRoute with a Service of the same namespace as its parent.
pub(super) fn http(name: &str, service: &str, rules: Value) -> Value {
    route("HTTPRoute", name, json!([parent(service)]), rules)
}

/// A route of any kind.
fn route(kind: &str, name: &str, parents: Value, rules: Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": {"name": name},
        "spec": {"parentRefs": parents, "rules": rules},
    })
}

/// A reference to a parent Service.
fn parent(service: &str) -> Value {
    json!({"group": "", "kind": "Service", "name": service})
}

/// A reference to port 80 of a Service.
pub(super) fn backend(service: &str) -> Value {
    json!({"name": service, "port": 80})
}

/// The same with a weight.
fn weighted(service: &str, weight: u32) -> Value {
    json!({"name": service, "port": 80, "weight": weight})
}

/// A match of paths below a prefix.
pub(super) fn below(prefix: &str) -> Value {
    json!([{"path": {"type": "PathPrefix", "value": prefix}}])
}

/// A filter that sets a header of the response.
fn response_header(name: &str, value: &str) -> Value {
    json!({"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [{"name": name, "value": value}]}})
}

/// The entries that Tulle has written into the status of a route.
fn entries(route: &Value) -> Vec<&Value> {
    let all = route["status"]["parents"].as_array().into_iter().flatten();
    all.filter(|entry| entry["controllerName"].as_str().is_some_and(|name| name.starts_with("tulle.dev/")))
        .collect()
}

/// A condition of an entry; null where it is absent.
fn condition<'v>(entry: &'v Value, kind: &str) -> &'v Value {
    static NULL: Value = Value::Null;
    let mut conditions = entry["conditions"].as_array().into_iter().flatten();
    conditions.find(|condition| condition["type"] == kind).unwrap_or(&NULL)
}

/// Status and reason of a condition, such as `False BackendNotFound`.
fn reason(entry: &Value, kind: &str) -> String {
    let condition = condition(entry, kind);
    let text = |name: &str| condition[name].as_str().unwrap_or("").to_owned();
    format!("{} {}", text("status"), text("reason"))
}

/// Reads a route until `holds` for it; `object` is such as `httproute/web`.
fn becomes(
    field: &TestNamespace<'_>,
    object: &str,
    what: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<Value> {
    let mut last = Value::Null;
    let waited = field.kube.wait_for(&format!("{object} {what}"), 60, || {
        last = field.kube.json(&["-n", &field.namespace, "get", object])?;
        Ok(holds(&last))
    });
    waited.with_context(|| format!("the status of {object}: {}", last["status"]))?;
    Ok(last)
}

/// Waits until every sidecar concerned uses a route as it is now, or until none is concerned yet.
pub(super) fn settled(field: &TestNamespace<'_>, object: &str) -> Result<Value> {
    becomes(field, object, "to be acknowledged", |route| {
        let generation = &route["metadata"]["generation"];
        let ours = entries(route);
        let acknowledged = |entry: &&Value| {
            let condition = condition(entry, "tulle.dev/Acknowledged");
            let unused = condition["reason"] == "NotInUse";
            (condition["status"] == "True" || unused) && condition["observedGeneration"] == *generation
        };
        !ours.is_empty() && ours.iter().all(acknowledged)
    })
}

/// The head of an answer.
#[derive(Debug)]
struct Head {
    status: String,
    /// With names in lower case.
    headers: BTreeMap<String, String>,
}

impl Head {
    /// The value of a header, empty where it is absent.
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// The head of the answer that a pod gets; `arguments` are curl's.
fn head(field: &TestNamespace<'_>, pod: &str, arguments: &[&str]) -> Result<Head> {
    let curl = ["/usr/bin/curl", "-s", "-m", "8", "-D", "-", "-o", "/dev/null"];
    let text = field.exec(pod, &[&curl[..], arguments].concat())?;
    let mut lines = text.lines().map(str::trim_end);
    let first = lines.next().unwrap_or("");
    let status = first.split(' ').nth(1).with_context(|| format!("curl printed {text:?}"))?.to_owned();
    let headers = lines.filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
    Ok(Head { status, headers })
}

/// The shop's answer to a pod, with what its application saw; `arguments` are curl's.
pub(super) fn answer(field: &TestNamespace<'_>, pod: &str, arguments: &[&str]) -> Result<Value> {
    let curl = ["/usr/bin/curl", "-s", "-m", "8", "-H", "x-show: yes"];
    let text = field.exec(pod, &[&curl[..], arguments].concat())?;
    serde_json::from_str(&text).with_context(|| format!("{arguments:?} was answered {text:?}"))
}

/// Sends many requests on one connection, and counts what they were answered: the status, and behind a slash the service
/// that answered.
const COUNTS: &str = "import collections, http.client, json, sys
host, path, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
connection, seen = http.client.HTTPConnection(host, timeout=8), collections.Counter()
for _ in range(number):
    connection.request('GET', path)
    answer = connection.getresponse(); body = answer.read()
    try: service = json.loads(body)['service']
    except ValueError: service = ''
    seen[f'{answer.status}/{service}'] += 1
print(json.dumps(seen))";

/// How often a pod's requests to `host` were answered with which status and by which service, such as `200/web`.
fn counts(
    field: &TestNamespace<'_>,
    pod: &str,
    host: &str,
    path: &str,
    number: u32,
) -> Result<BTreeMap<String, u64>> {
    let number = number.to_string();
    let text = field.exec(pod, &["/usr/bin/python3", "-c", COUNTS, host, path, &number])?;
    serde_json::from_str(&text).with_context(|| format!("the client printed {text:?}"))
}
