//! Spans of real requests, as the receiver of the OpenTelemetry Collector decodes them.
//!
//! The MeshConfig says for the whole mesh where spans go, so these tests run alone, and restore it.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::find;
use crate::collector;
use crate::install;
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, service};
use crate::suites::resilience::{member, ready_policy};
use crate::suites::routes::answer;

/// Stands in every query and header that no span may have.
const SECRET: &str = "s3cret";
/// Spans of a request from the client through web to checkout, of which checkout's bad pod got the first attempt: three
/// attempts by clients, and three servers.
const RETRIED: usize = 6;

/// A collector in a namespace without sidecars.
struct Collector<'a>(TestNamespace<'a>);

impl<'a> Collector<'a> {
    fn start(kube: &'a Kube, namespace: &str) -> Result<Self> {
        install::load(kube, &collector::image()?)?;
        let field = TestNamespace::plain(kube, namespace)?;
        let port = collector::PORT;
        field.apply(service(
            "collector",
            json!({"ports": [{"name": "otlp", "port": port, "targetPort": port}]}),
        ))?;
        let container = json!({
            "name": "collector", "image": collector::IMAGE, "ports": [{"containerPort": port}],
            "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
        });
        field.apply(json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "collector"},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": {"app": "collector"}},
                "template": {
                    "metadata": {"labels": {"app": "collector"}},
                    "spec": {"terminationGracePeriodSeconds": 2, "containers": [container]},
                },
            },
        }))?;
        let collector = Self(field);
        collector.is_up()?;
        Ok(collector)
    }

    fn is_up(&self) -> Result<()> {
        self.0.kube.rolled_out(&self.0.namespace, "deployment/collector", 60)
    }

    /// The address for the MeshConfig, in the form that its documentation shows.
    fn endpoint(&self) -> String {
        format!("http://collector.{}:{}", self.0.namespace, collector::PORT)
    }

    fn scale(&self, replicas: u32) -> Result<()> {
        self.0.kubectl(&["scale", "deployment", "collector", &format!("--replicas={replicas}")]).map(drop)
    }

    /// All that it has received.
    fn spans(&self) -> Result<Vec<Value>> {
        let printed = self.0.kubectl(&["logs", "deployment/collector"])?;
        ensure!(!printed.contains(SECRET), "a span tells a query or a header");
        let lines = printed.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["traceId"].is_string()).collect())
    }

    /// The spans of a trace.
    fn trace(&self, id: &str) -> Result<Vec<Value>> {
        Ok(self.spans()?.into_iter().filter(|span| span["traceId"] == id).collect())
    }
}

/// Sets the tracing of the MeshConfig; null: none.
fn set_tracing(kube: &Kube, tracing: &Value) -> Result<()> {
    let patch = json!({"spec": {"tracing": tracing}}).to_string();
    kube.run(&["patch", "meshconfig", "mesh", "--type=merge", "-p", &patch]).map(drop)
}

fn begin(kube: &Kube, collector: &Collector<'_>, sampling: &str) -> Result<()> {
    set_tracing(kube, &json!({"endpoint": collector.endpoint(), "sampling": sampling}))
}

/// Runs a test that sets the tracing, and restores it, also when the test fails.
fn restoring(kube: &Kube, test: fn(&Kube) -> Result<()>) -> Result<()> {
    let config = kube.json(&["get", "meshconfig", "mesh"])?;
    let outcome = test(kube);
    let restored = set_tracing(kube, &config["spec"]["tracing"]);
    outcome.and(restored.context("restoring the MeshConfig"))
}

pub(crate) fn shows(kube: &Kube) -> Result<()> {
    restoring(kube, |kube| {
        let collector = Collector::start(kube, "t-see-spans")?;
        let field = TestNamespace::meshed(kube, "t-see-traces")?;
        field.service("web", 1, &["--next=checkout:80"])?;
        member(&field, "checkout", "good", 1, &[])?;
        member(&field, "checkout", "bad", 1, &["--errors=100", "--status=503"])?;
        field.client("client")?;
        let retry = json!({"on": ["5xx"], "attempts": 2, "budget": "100%"});
        ready_policy(&field, "checkout", json!({"retry": retry, "balance": {"by": "RoundRobin"}}))?;
        begin(kube, &collector, "100%")?;
        let (spans, traceparent) = retried(&field, &collector)?;
        is_whole(&field, &spans, &traceparent).with_context(|| format!("the spans are {spans:#?}"))?;
        begin(kube, &collector, "0%")?;
        follows_the_parent(&field, &collector)
    })
}

/// Sends requests until all spans of one that was retried are known. Returns them, and the `traceparent` that web's
/// application saw.
fn retried(field: &TestNamespace<'_>, collector: &Collector<'_>) -> Result<(Vec<Value>, String)> {
    let mut seen = Vec::new();
    let mut found = None;
    field.kube.wait_for("all spans of a request that was retried", 60, || {
        if let Some(traceparent) = ask(field, "web/cart", None)?.as_str() {
            seen.push(traceparent.to_owned());
        }
        let spans = collector.spans()?;
        found = seen.iter().find_map(|traceparent| {
            let id = traceparent.split('-').nth(1)?;
            let its: Vec<Value> = spans.iter().filter(|span| span["traceId"] == id).cloned().collect();
            (its.len() == RETRIED).then(|| (its, traceparent.clone()))
        });
        Ok(found.is_some())
    })?;
    found.context("no trace was found")
}

/// Sends a request with secrets; returns the `traceparent` that the application saw, null where it saw none.
fn ask(field: &TestNamespace<'_>, target: &str, traceparent: Option<&str>) -> Result<Value> {
    let url = format!("http://{target}?token={SECRET}");
    let secret = format!("authorization: Bearer {SECRET}");
    let parent = traceparent.map(|parent| format!("traceparent: {parent}"));
    let mut arguments = vec!["-H", &secret];
    if let Some(parent) = &parent {
        arguments.extend(["-H", parent.as_str()]);
    }
    arguments.push(&url);
    let answer = answer(field, "client", &arguments)?;
    Ok(answer["seen"]["headers"]["traceparent"].clone())
}

/// Whether a span is of this kind and service.
fn is_of(span: &Value, kind: &str, service: &str) -> bool {
    span["kind"] == kind && span["resource"]["service.name"] == service
}

/// The spans below another one, in the order in which they began.
fn children(spans: &[Value], parent: &Value) -> Vec<Value> {
    let mut children: Vec<Value> =
        spans.iter().filter(|span| span["parentSpanId"] == parent["spanId"]).cloned().collect();
    children.sort_by_key(|span| span["startUnixNano"].as_u64());
    children
}

/// The only span below another one; null where there is none or more than one.
fn child(spans: &[Value], parent: &Value) -> Value {
    let mut children = children(spans, parent);
    let last = children.pop();
    last.filter(|_| children.is_empty()).unwrap_or(Value::Null)
}

/// The trace: the client's sidecar, web's sidecar, both attempts at checkout and the sidecars of its two pods.
fn is_whole(field: &TestNamespace<'_>, spans: &[Value], traceparent: &str) -> Result<()> {
    let list = json!(spans);
    let first = find(&list, |span| span["parentSpanId"] == "");
    span(&first, ("Client", "client"), 200)?;
    ensure!(first["traceState"] == "ot=th:0", "tracestate {} of a share of 100 %", first["traceState"]);
    says(&first, &[("url.path", json!("/cart")), ("server.port", json!(80))])?;
    says(&first, &[("server.address", json!(format!("web.{}.svc", field.namespace)))])?;

    let web = child(spans, &first);
    span(&web, ("Server", "web"), 200)?;
    says(&web, &[("url.path", json!("/cart"))])?;
    let id = |span: &Value, name: &str| span[name].as_str().unwrap_or("").to_owned();
    let parent = format!("00-{}-{}-", id(&web, "traceId"), id(&web, "spanId"));
    ensure!(traceparent.starts_with(&parent), "the application saw {traceparent}, not the server span");
    let resource = &web["resource"];
    ensure!(resource["k8s.namespace.name"] == *field.namespace, "the resource is {resource}");
    ensure!(resource["k8s.deployment.name"] == "web", "the resource is {resource}");

    let attempts = children(spans, &web);
    let [failed, saved] = attempts.as_slice() else {
        bail!("{} attempts at checkout, expected 2", attempts.len());
    };
    for (attempt, pod, status, resends) in [(failed, "bad", 503, Value::Null), (saved, "good", 200, json!(1))]
    {
        span(attempt, ("Client", "web"), status)?;
        let pods = field.pods(pod)?;
        let name = pods.first().with_context(|| format!("{pod} has no pod"))?;
        let address = field.get(&format!("pod/{name}"), ".status.podIP")?;
        says(
            attempt,
            &[
                ("http.request.resend_count", resends),
                ("network.peer.address", json!(address)),
                ("server.address", json!(format!("checkout.{}.svc", field.namespace))),
            ],
        )?;
        let server = child(spans, attempt);
        span(&server, ("Server", pod), status)?;
        ensure!(server["resource"]["k8s.pod.name"] == name.as_str(), "{} is not {name}", server["resource"]);
    }
    Ok(())
}

/// Fails unless a span is of this kind and service, and has the status of its answer.
fn span(span: &Value, (kind, service): (&str, &str), status: u16) -> Result<()> {
    ensure!(is_of(span, kind, service), "expected a span of kind {kind} of {service}, found {span}");
    ensure!(span["name"] == "GET", "the span is called {}", span["name"]);
    let (expected, error) =
        if status < 400 { ("Unset", Value::Null) } else { ("Error", json!(status.to_string())) };
    ensure!(span["status"] == expected, "status {} of {kind} {service}", span["status"]);
    let method = ("http.request.method", json!("GET"));
    says(span, &[method, ("http.response.status_code", json!(status)), ("error.type", error)])
}

/// Fails unless a span has these attributes; null: it has none of this name.
fn says(span: &Value, expected: &[(&str, Value)]) -> Result<()> {
    for (name, value) in expected {
        let found = &span["attributes"][*name];
        ensure!(found == value, "{name} is {found}, expected {value}: {span}");
    }
    Ok(())
}

/// Where no trace begins, what the parent of a request has decided holds, and the headers of others stay as they are.
fn follows_the_parent(field: &TestNamespace<'_>, collector: &Collector<'_>) -> Result<()> {
    let trace = |digit: &str, flags: &str| {
        let (id, parent) = (digit.repeat(32), digit.repeat(16));
        (format!("00-{id}-{parent}-{flags}"), id, parent)
    };
    let (unsampled, unsampled_id, _) = trace("7", "00");
    let (sampled, id, parent) = trace("9", "01");
    field.kube.wait_for("requests to begin no trace", 60, || {
        Ok(ask(field, "checkout/settling", None)?.is_null())
    })?;
    let seen = ask(field, "checkout/none", None)?;
    ensure!(seen.is_null(), "a request without a parent got {seen}");
    let seen = ask(field, "checkout/unsampled", Some(&unsampled))?;
    ensure!(seen == unsampled.as_str(), "{unsampled} became {seen}");

    let seen = ask(field, "checkout/sampled", Some(&sampled))?;
    let mut spans = Vec::new();
    field.kube.wait_for("the spans of the request that is sampled", 60, || {
        spans = collector.trace(&id)?;
        let answered = spans.iter().filter(|span| span["attributes"]["http.response.status_code"] == 200);
        // The client's, and that of the pod that answered.
        Ok(answered.count() == 2)
    })?;
    let list = json!(spans);
    let served = find(&list, |span| is_of(span, "Server", "good"));
    let sent = find(&list, |span| span["spanId"] == served["parentSpanId"]);
    ensure!(is_of(&sent, "Client", "client"), "the server's span is below {sent}");
    ensure!(sent["parentSpanId"] == parent.as_str(), "the client's span is below {}", sent["parentSpanId"]);
    let expected = format!("00-{id}-{}-01", served["spanId"].as_str().unwrap_or(""));
    ensure!(seen == expected.as_str(), "the application saw {seen}, expected {expected}");
    // Each sidecar sends its spans in their order, so that those of the requests before have come too, if there are any.
    let all = collector.spans()?;
    let recorded = all.iter().find(|span| {
        let path = &span["attributes"]["url.path"];
        path == "/none" || path == "/unsampled" || span["traceId"] == unsampled_id.as_str()
    });
    ensure!(recorded.is_none(), "a request that is not sampled was recorded: {recorded:?}");
    Ok(())
}

pub(crate) fn absent(kube: &Kube) -> Result<()> {
    restoring(kube, |kube| {
        let collector = Collector::start(kube, "t-see-away")?;
        let field = TestNamespace::meshed(kube, "t-see-dropped")?;
        field.service("web", 1, &[])?;
        field.load("load", "web:80", 100)?;
        let pods = field.pods("load")?;
        let pod = pods.first().context("the load has no pod")?;
        let spans =
            |outcome: &str| field.metric(pod, &["tulle_spans_total{", &format!("outcome=\"{outcome}\"")]);
        begin(kube, &collector, "100%")?;
        kube.wait_for("spans at the collector", 60, || Ok(spans("exported")? > 200))?;
        let before = spans("dropped")?;
        let (failed, why) = field.failed_during("load", || {
            collector.scale(0)?;
            // More than the queue holds, and more than one batch that is given up.
            kube.wait_for("spans to be dropped", 90, || Ok(spans("dropped")? > before + 600))
        })?;
        ensure!(failed == 0, "{failed} requests failed while the collector was away: {why}");
        collector.scale(1)?;
        collector.is_up()?;
        let exported = spans("exported")?;
        kube.wait_for("spans at the collector that is back", 60, || Ok(spans("exported")? > exported + 200))
    })
}
