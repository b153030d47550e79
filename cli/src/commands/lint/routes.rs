//! Routes of which one hides the other: both have a rule for the same requests to the same Service.
//!
//! Both are accepted, so that neither the API server nor their status reports it.

use serde_json::{Value, json};

use super::read::Document;
use super::rules::{Finding, HIDDEN_RULE};
use crate::objects::{items, text};

/// The group of routes.
pub(super) const GROUP: &str = "gateway.networking.k8s.io/";
/// Kinds whose rules match requests.
const KINDS: [&str; 2] = ["HTTPRoute", "GRPCRoute"];

/// Looks at all routes at once. Those without a namespace are in `namespace`.
pub(super) fn check(documents: &[Document], namespace: &str) -> Vec<Finding> {
    let routes: Vec<&Document> = documents.iter().filter(|document| is_route(document)).collect();
    let mut findings = Vec::new();
    for (index, route) in routes.iter().enumerate() {
        findings.extend(routes.iter().take(index).filter_map(|other| shared(route, other, namespace)));
    }
    findings
}

/// Looks at the routes among `documents` beside those that the cluster has already.
pub(super) fn beside(documents: &[Document], stored: &[Document], namespace: &str) -> Vec<Finding> {
    let identity = |document: &Document| document.label(namespace);
    let named: Vec<String> = documents.iter().map(identity).collect();
    let others: Vec<&Document> = stored.iter().filter(|stored| !named.contains(&identity(stored))).collect();
    let mut findings = Vec::new();
    for route in documents.iter().filter(|document| is_route(document)) {
        findings.extend(others.iter().filter_map(|other| shared(route, other, namespace)));
    }
    findings
}

fn is_route(document: &Document) -> bool {
    KINDS.contains(&document.kind()) && document.api_version().starts_with(GROUP)
}

/// The first rule of a route that matches the same requests as one of another route. Routes of different namespaces are for
/// different clients.
fn shared(route: &Document, other: &Document, namespace: &str) -> Option<Finding> {
    let is_comparable = route.kind() == other.kind()
        && route.namespace(namespace) == other.namespace(namespace)
        && route.name() != other.name()
        && route.value.pointer("/spec/hostnames") == other.value.pointer("/spec/hostnames");
    if !is_comparable {
        return None;
    }
    let theirs = services(other, namespace);
    let service = services(route, namespace)
        .into_iter()
        .find(|service| theirs.iter().any(|theirs| service.is_also(theirs)))?;
    let theirs = rules(other);
    let (mine, its) = rules(route).into_iter().find_map(|mine| {
        let its = theirs.iter().find(|its| its.matches == mine.matches)?;
        Some((mine.index, its.index))
    })?;
    let message = format!(
        "spec.rules[{mine}] matches the same requests to Service {}/{} as spec.rules[{its}] of {} {}",
        service.namespace,
        service.name,
        other.kind(),
        other.name()
    );
    let hint = "the rule of the older route wins, and at the same age that of the first name: remove one of the two. \
                `tulle explain` names the rule that decides"
        .to_owned();
    Some(Finding::new(HIDDEN_RULE, route, namespace, message, Some(hint)))
}

/// A Service that a route is attached to.
struct Service<'a> {
    namespace: &'a str,
    name: &'a str,
    /// `None`: all ports.
    port: Option<&'a Value>,
    /// The name of the port. `None`: all ports.
    section: Option<&'a Value>,
}

impl Service<'_> {
    /// Whether both surely have a port in common. Only the Service tells whether a number and a name are the same port.
    fn is_also(&self, other: &Service<'_>) -> bool {
        let numbers_alone = |one: &Service<'_>| one.port.is_some() && one.section.is_none();
        let names_alone = |one: &Service<'_>| one.port.is_none() && one.section.is_some();
        if (numbers_alone(self) && names_alone(other)) || (names_alone(self) && numbers_alone(other)) {
            return false;
        }
        let overlap =
            |one: Option<&Value>, other: Option<&Value>| one.is_none() || other.is_none() || one == other;
        (self.namespace, self.name) == (other.namespace, other.name)
            && overlap(self.port, other.port)
            && overlap(self.section, other.section)
    }
}

fn services<'a>(route: &'a Document, namespace: &'a str) -> Vec<Service<'a>> {
    let own = route.namespace(namespace);
    let service = |parent: &'a Value| {
        let is_service =
            text(parent, "/kind") == "Service" && parent.get("group").and_then(Value::as_str) == Some("");
        let named = text(parent, "/namespace");
        is_service.then(|| Service {
            namespace: if named.is_empty() { own } else { named },
            name: text(parent, "/name"),
            port: parent.get("port"),
            section: parent.get("sectionName"),
        })
    };
    items(&route.value, "/spec/parentRefs").iter().filter_map(service).collect()
}

/// One of the matches of a rule.
struct Rule {
    /// The place of the rule in the route.
    index: usize,
    /// The match with the defaults of the Gateway API.
    matches: Value,
}

fn rules(route: &Document) -> Vec<Rule> {
    let mut found = Vec::new();
    for (index, rule) in items(&route.value, "/spec/rules").iter().enumerate() {
        let matches = items(rule, "/matches");
        if matches.is_empty() {
            found.push(Rule { index, matches: with_defaults(route.kind(), &json!({})) });
        }
        let each = |one: &Value| Rule { index, matches: with_defaults(route.kind(), one) };
        found.extend(matches.iter().map(each));
    }
    found
}

/// A match as the API server stores it, with its conditions in order.
fn with_defaults(kind: &str, one: &Value) -> Value {
    let mut one = one.as_object().cloned().unwrap_or_default();
    if kind == "HTTPRoute" {
        let path = one.entry("path").or_insert_with(|| json!({}));
        default(path, "type", "PathPrefix");
        default(path, "value", "/");
    }
    // That of a GRPCRoute is an object.
    if let Some(method) = one.get_mut("method") {
        default(method, "type", "Exact");
    }
    for list in ["headers", "queryParams"] {
        let Some(conditions) = one.get_mut(list).and_then(Value::as_array_mut) else { continue };
        conditions.iter_mut().for_each(|condition| default(condition, "type", "Exact"));
        conditions.sort_by_cached_key(ToString::to_string);
    }
    Value::Object(one)
}

fn default(object: &mut Value, field: &str, value: &str) {
    if let Some(fields) = object.as_object_mut() {
        fields.entry(field).or_insert_with(|| value.into());
    }
}
