//! What the status of a route says.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    backend, becomes, below, condition, entries, head, http, meshed, parent, reason, response_header, route,
    settled,
};
use crate::kubectl::Kube;
use crate::suites::namespace::service;

/// Whether the only entry of a route has a condition with this status and reason.
fn says(route: &Value, kind: &str, expected: &str) -> bool {
    matches!(entries(route)[..], [entry] if reason(entry, kind) == expected)
}

/// A rule whose regular expression cannot be compiled.
fn unreadable() -> Value {
    json!({"matches": [{"path": {"type": "RegularExpression", "value": "/a(b"}}], "backendRefs": [backend("web")]})
}

pub(super) fn reasons(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-reasons")?;
    field.apply(service("web", json!({})))?;
    let good = || json!([{"backendRefs": [backend("web")]}]);
    let thing = json!({"group": "example.com", "kind": "Thing", "name": "web", "port": 80});
    let opaque = json!({"name": "redis", "port": 80, "targetPort": 6379, "appProtocol": "redis"});
    field.apply(service("redis", json!({"ports": [opaque]})))?;
    let cases = [
        ("good", json!([parent("web")]), good(), "Accepted", "True Accepted"),
        ("resolved", json!([parent("web")]), good(), "ResolvedRefs", "True ResolvedRefs"),
        ("nobody", json!([parent("nobody")]), good(), "Accepted", "False NoMatchingParent"),
        (
            "port",
            json!([{"group": "", "kind": "Service", "name": "web", "port": 99}]),
            good(),
            "Accepted",
            "False NoMatchingParent",
        ),
        (
            "section",
            json!([{"group": "", "kind": "Service", "name": "web", "sectionName": "nobody"}]),
            good(),
            "Accepted",
            "False NoMatchingParent",
        ),
        ("regex", json!([parent("web")]), json!([unreadable()]), "Accepted", "False UnsupportedValue"),
        (
            "missing",
            json!([parent("web")]),
            json!([{"backendRefs": [backend("nobody")]}]),
            "ResolvedRefs",
            "False BackendNotFound",
        ),
        (
            "kind",
            json!([parent("web")]),
            json!([{"backendRefs": [thing]}]),
            "ResolvedRefs",
            "False InvalidKind",
        ),
    ];
    for (name, parents, rules, ..) in &cases {
        field.apply(route("HTTPRoute", name, parents.clone(), rules.clone()))?;
    }
    for (name, parents, _, kind, expected) in &cases {
        let object = format!("httproute/{name}");
        let route = becomes(&field, &object, &format!("to have {kind} {expected}"), |route| {
            says(route, kind, expected)
        })?;
        let entry = entries(&route)[0];
        ensure!(entry["parentRef"] == parents[0], "{object}: the entry is for {}", entry["parentRef"]);
        observed(&route, &object)?;
    }
    // One bad rule of two is left out, and the other one holds.
    let rules = json!([unreadable(), {"backendRefs": [backend("web")]}]);
    field.apply(http("partly", "web", rules))?;
    let route = becomes(&field, "httproute/partly", "to be partially invalid", |route| {
        says(route, "Accepted", "True Accepted")
            && condition(entries(route)[0], "PartiallyInvalid")["status"] == "True"
    })?;
    let message = &condition(entries(&route)[0], "PartiallyInvalid")["message"];
    ensure!(
        message.as_str().is_some_and(|text| text.starts_with("Dropped Rule")),
        "the message is {message}"
    );
    // A change is observed, and what is repaired is reported as such.
    field.apply(http("regex", "web", good()))?;
    let route = becomes(&field, "httproute/regex", "to be accepted", |route| {
        says(route, "Accepted", "True Accepted") && observed(route, "").is_ok()
    })?;
    ensure!(route["metadata"]["generation"] == 2, "generation {}", route["metadata"]["generation"]);
    // A parent of another kind is somebody else's.
    let gateway = json!([{"name": "gateway"}]);
    field.apply(super::route("HTTPRoute", "theirs", gateway, good()))?;
    thread::sleep(Duration::from_secs(2));
    let theirs = kube.json(&["-n", &field.namespace, "get", "httproute/theirs"])?;
    ensure!(entries(&theirs).is_empty(), "a route of a Gateway has an entry of Tulle");
    Ok(())
}

/// Fails unless every condition of a route is about its present generation.
fn observed(route: &Value, object: &str) -> Result<()> {
    let generation = &route["metadata"]["generation"];
    for entry in entries(route) {
        for condition in entry["conditions"].as_array().context("an entry without conditions")? {
            ensure!(
                condition["observedGeneration"] == *generation,
                "{object}: generation {generation}, and the condition {condition}"
            );
        }
    }
    Ok(())
}

pub(super) fn conflict(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-conflict")?;
    field.apply(service("web", json!({})))?;
    field.apply(http("web", "web", json!([{"backendRefs": [backend("web")]}])))?;
    becomes(&field, "httproute/web", "to be accepted", |route| says(route, "Accepted", "True Accepted"))?;
    field.apply(route(
        "GRPCRoute",
        "web",
        json!([parent("web")]),
        json!([{"backendRefs": [backend("web")]}]),
    ))?;
    becomes(&field, "grpcroute/web", "to be accepted", |route| says(route, "Accepted", "True Accepted"))?;
    becomes(&field, "httproute/web", "to lose", |route| {
        says(route, "Accepted", "False RouteReasonConflicted")
    })?;
    field.kubectl(&["delete", "grpcroute", "web"])?;
    becomes(&field, "httproute/web", "to be accepted again", |route| {
        says(route, "Accepted", "True Accepted")
    })?;
    Ok(())
}

pub(super) fn parents(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-parents")?;
    field.apply(service("web", json!({})))?;
    field.apply(service("headless", json!({"clusterIP": "None"})))?;
    field.apply(json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "external"},
        "spec": {"type": "ExternalName", "externalName": "example.com"}}))?;
    field.apply(service("node-port", json!({"type": "NodePort"})))?;
    let bare = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "bare"},
        "spec": {"ports": [{"port": 80}]}});
    field.apply(bare)?;
    for (name, expected) in
        [("headless", "False"), ("external", "False"), ("node-port", "True"), ("bare", "True")]
    {
        field.apply(http(name, name, json!([{"backendRefs": [backend("web")]}])))?;
        becomes(
            &field,
            &format!("httproute/{name}"),
            &format!("to have Accepted {expected}"),
            |route| matches!(entries(route)[..], [entry] if condition(entry, "Accepted")["status"] == expected),
        )?;
    }
    Ok(())
}

pub(super) fn foreign(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-foreign")?;
    field.apply(service("web", json!({})))?;
    let gateway = json!({"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "gateway"});
    let rules = json!([{"backendRefs": [backend("web")]}]);
    field.apply(route("HTTPRoute", "web", json!([parent("web"), gateway]), rules.clone()))?;
    becomes(&field, "httproute/web", "to be accepted", |route| says(route, "Accepted", "True Accepted"))?;
    // Another controller writes its entry, and loses ours.
    let condition = |kind: &str| {
        json!({"type": kind, "status": "True", "reason": "Theirs", "message": "",
        "observedGeneration": 1, "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    let entry = json!({"parentRef": gateway, "controllerName": "example.com/controller",
        "conditions": [condition("Zebra"), condition("Accepted")]});
    let status = json!({"status": {"parents": [entry]}}).to_string();
    field.kubectl(&["patch", "httproute", "web", "--subresource=status", "--type=merge", "-p", &status])?;
    let theirs = |route: &Value| -> Vec<Value> {
        let all = route["status"]["parents"].as_array().cloned().unwrap_or_default();
        all.into_iter().filter(|entry| entry["controllerName"] == "example.com/controller").collect()
    };
    let back = becomes(&field, "httproute/web", "to have both entries", |route| {
        says(route, "Accepted", "True Accepted") && theirs(route).len() == 1
    })?;
    ensure!(
        theirs(&back) == [entry.clone()],
        "the entry of another controller was changed: {:?}",
        theirs(&back)
    );
    field.apply(route("HTTPRoute", "web", json!([gateway]), rules))?;
    let without =
        becomes(&field, "httproute/web", "to have no entry of Tulle", |route| entries(route).is_empty())?;
    ensure!(
        theirs(&without) == [entry],
        "the entry of another controller was changed: {:?}",
        theirs(&without)
    );
    Ok(())
}

pub(super) fn unsupported(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-unsupported")?;
    field.service("web", 1, &[])?;
    field.client("client")?;
    let filter = json!({"type": "ExtensionRef", "extensionRef": {"group": "example.com", "kind": "Thing", "name": "x"}});
    field.apply(http(
        "web",
        "web",
        json!([
            {"matches": below("/rule"), "filters": [filter], "backendRefs": [backend("web")]},
            {"matches": below("/backend"), "backendRefs": [{"name": "web", "port": 80, "filters": [filter]}]},
            {"filters": [response_header("x-route", "yes")], "backendRefs": [backend("web")]},
        ]),
    ))?;
    let route = becomes(&field, "httproute/web", "to name the filter", |route| {
        let conditions =
            entries(route).into_iter().flat_map(|entry| entry["conditions"].as_array().into_iter().flatten());
        conditions.into_iter().any(|condition| {
            let bad = if condition["type"] == "PartiallyInvalid" { "True" } else { "False" };
            condition["status"] == bad
                && condition["message"].as_str().is_some_and(|text| text.contains("ExtensionRef"))
        })
    })?;
    observed(&route, "httproute/web")?;
    kube.wait_for("the rule without the filter to hold", 60, || {
        Ok(head(&field, "client", &["http://web/"])?.header("x-route") == "yes")
    })?;
    for (path, status) in [("/rule", "500"), ("/backend", "500"), ("/", "200")] {
        let answer = head(&field, "client", &[&format!("http://web{path}")])?;
        ensure!(answer.status == status, "{path}: expected {status}, found {answer:?}");
    }
    Ok(())
}

pub(super) fn acknowledged(kube: &Kube) -> Result<()> {
    let field = meshed(kube, "t-r-acknowledged")?;
    field.service("web", 1, &[])?;
    for client in ["one", "two"] {
        field.client(client)?;
        ensure!(field.status(client, "http://web/")? == "200", "no answer before there is a route");
    }
    field.apply(http("web", "web", json!([{"backendRefs": [backend("web")]}])))?;
    settled(&field, "httproute/web")?;
    becomes(&field, "httproute/web", "to be acknowledged by both clients", |route| {
        let ours = entries(route);
        let condition = ours.first().map(|entry| condition(entry, "tulle.dev/Acknowledged"));
        condition.is_some_and(|condition| {
            condition["status"] == "True"
                && condition["message"].as_str().is_some_and(|message| message.contains("2 of 2"))
        })
    })
    .map(drop)
}
