//! Which requests a route concerns: ports, clients, and what it shares with other routes.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{backend, below, head, http, meshed, response_header, route, settled};
use crate::kubectl::Kube;
use crate::suites::namespace::{TestNamespace, service};

/// A rule that marks its answers.
fn marks(mark: &str, matches: Value) -> Value {
    json!({"matches": matches, "filters": [response_header("x-route", mark)], "backendRefs": [backend("web")]})
}

/// The mark of the answer that a pod gets; empty without a route.
fn mark(field: &TestNamespace<'_>, pod: &str, url: &str) -> Result<String> {
    let answer = head(field, pod, &[url])?;
    ensure!(answer.status == "200", "{url} was answered {answer:?}");
    Ok(answer.header("x-route").to_owned())
}

/// Waits until a pod's answers have a mark, because an address that was not dialled before is asked for first.
fn marked(field: &TestNamespace<'_>, pod: &str, url: &str, expected: &str) -> Result<()> {
    let mut last = String::new();
    let waited = field.kube.wait_for(&format!("{url} to be marked {expected:?}"), 60, || {
        last = mark(field, pod, url)?;
        Ok(last == expected)
    });
    waited.map_err(|error| error.context(format!("the last mark was {last:?}")))
}

pub(super) fn ports(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-ports")?;
    field.service("web", 1, &[])?;
    let ports = json!({"ports": [{"name": "http", "port": 80, "targetPort": 8080},
        {"name": "second", "port": 81, "targetPort": 8080}, {"name": "third", "port": 82, "targetPort": 8080}]});
    field.apply(service("web", ports))?;
    field.client("client")?;
    let anywhere = || json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
    for (name, parent) in [
        ("named", json!({"group": "", "kind": "Service", "name": "web", "sectionName": "second"})),
        ("numbered", json!({"group": "", "kind": "Service", "name": "web", "port": 82})),
    ] {
        field.apply(route("HTTPRoute", name, json!([parent]), json!([marks(name, anywhere())])))?;
        settled(&field, &format!("httproute/{name}"))?;
    }
    for (url, expected) in [("http://web/", ""), ("http://web:81/", "named"), ("http://web:82/", "numbered")]
    {
        marked(&field, "client", url, expected)?;
    }
    // Without a port it concerns every one, and where both match alike the older decides.
    field.apply(http("all", "web", json!([marks("all", anywhere())])))?;
    settled(&field, "httproute/all")?;
    for (url, expected) in [("http://web/", "all"), ("http://web:81/", "named")] {
        marked(&field, "client", url, expected)?;
    }
    Ok(())
}

pub(super) fn consumer(kube: &Kube) -> Result<()> {
    let (owner, user) = (meshed(kube, "t-r-producer")?, meshed(kube, "t-r-consumer")?);
    owner.service("web", 1, &[])?;
    owner.client("client")?;
    user.client("client")?;
    let url = "http://web.t-r-producer.svc.cluster.local/";
    let anywhere = || json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
    owner.apply(http("web", "web", json!([marks("producer", anywhere())])))?;
    settled(&owner, "httproute/web")?;
    marked(&owner, "client", url, "producer")?;
    marked(&user, "client", url, "producer")?;
    // It needs no ReferenceGrant. Its rules replace those of the producer, also where they match nothing.
    let parent = json!({"group": "", "kind": "Service", "name": "web", "namespace": "t-r-producer"});
    let rule = json!({"matches": below("/mine"), "filters": [response_header("x-route", "consumer")],
        "backendRefs": [{"name": "web", "namespace": "t-r-producer", "port": 80}]});
    user.apply(route("HTTPRoute", "mine", json!([parent]), json!([rule])))?;
    settled(&user, "httproute/mine")?;
    marked(&user, "client", &format!("{url}mine"), "consumer")?;
    let other = head(&user, "client", &[url])?;
    ensure!(other.status == "404", "the producer's rules still hold for the consumer: {other:?}");
    marked(&owner, "client", &format!("{url}mine"), "producer")?;
    user.kubectl(&["delete", "httproute", "mine"])?;
    kube.wait_for("the producer's route to hold again", 60, || {
        let answer = head(&user, "client", &[url])?;
        Ok(answer.header("x-route") == "producer")
    })
}

pub(super) fn age(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-age")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    // The younger has the name that comes first.
    field.apply(http("older", "web", json!([marks("older", below("/a")), marks("short", below("/c"))])))?;
    thread::sleep(Duration::from_millis(1100));
    let rules =
        json!([marks("younger", below("/a")), marks("long", below("/c/d")), marks("only", below("/b"))]);
    field.apply(http("a-younger", "web", rules))?;
    settled(&field, "httproute/older")?;
    settled(&field, "httproute/a-younger")?;
    for (path, expected) in [("/a", "older"), ("/b", "only"), ("/c", "short"), ("/c/d/e", "long")] {
        marked(&field, "client", &format!("http://web{path}"), expected)?;
    }
    field.kubectl(&["delete", "httproute", "older"])?;
    marked(&field, "client", "http://web/a", "younger")
}

pub(super) fn pod_address(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-pod")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let anywhere = json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
    field.apply(http("web", "web", json!([marks("route", anywhere)])))?;
    settled(&field, "httproute/web")?;
    marked(&field, "client", "http://web/", "route")?;
    let address =
        field.kubectl(&["get", "pod", "-l", "app=web", "-o", "jsonpath={.items[0].status.podIP}"])?;
    let direct = mark(&field, "client", &format!("http://{address}:8080/"))?;
    ensure!(direct.is_empty(), "the pod's own address was routed: {direct}");
    // It is the address that decides, not what the Host header says.
    field.service("other", 1, &[])?;
    let other = head(&field, "client", &["-H", "host: web", "http://other/"])?;
    ensure!(other.header("x-route").is_empty(), "a Host header was routed: {other:?}");
    let named = head(&field, "client", &["-H", "host: other", "http://web/"])?;
    ensure!(named.header("x-route") == "route", "a Host header evaded a route: {named:?}");
    Ok(())
}
