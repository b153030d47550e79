//! Objects and rules in words.

use tulle_crds::{AccessRule, AccessSpec, Caller};
use tulle_mesh::proto;
use tulle_mesh::proto::value_match::Type;

use crate::model::Model;
use crate::model::gateway::RouteKind;

/// An object as stages name it: `MeshPolicy/shop/payments`.
pub(super) fn object(kind: &str, object: &proto::ObjectRef) -> String {
    format!("{kind}/{}/{}", object.namespace, object.name)
}

/// A policy, as stages name it. Empty: there is none.
pub(super) fn policy(policy: Option<&proto::ObjectRef>) -> String {
    policy.map(|policy| object("MeshPolicy", policy)).unwrap_or_default()
}

/// A kind of route, as Kubernetes writes it.
pub(super) fn route_kind(kind: proto::RouteKind) -> &'static str {
    RouteKind::of(kind).map_or("Route", RouteKind::name)
}

/// A time, in the largest unit that it is a whole number of.
pub(super) fn span(ms: u32) -> String {
    match ms {
        0 => "no limit".to_owned(),
        _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms.is_multiple_of(1_000) => format!("{}s", ms / 1_000),
        _ => format!("{ms}ms"),
    }
}

/// A share in permyriad, as a percentage.
pub(super) fn percent(permyriad: u32) -> String {
    let rest = permyriad % 100;
    if rest == 0 { format!("{} %", permyriad / 100) } else { format!("{}.{rest:02} %", permyriad / 100) }
}

/// The access section that a compiled one was made of. `None`: that version of the policy is not there any more.
pub(super) fn written<'a>(model: &'a Model, access: &proto::Access) -> Option<&'a AccessSpec> {
    let from = access.policy.as_ref()?;
    let policy = model.policy(&(from.namespace.as_str().into(), from.name.as_str().into()))?;
    let same = policy.metadata.generation.unwrap_or_default() == from.generation
        && policy.metadata.uid.as_deref().unwrap_or_default() == from.uid;
    policy.spec.access.as_ref().filter(|_| same)
}

/// A rule of a list, as it was written.
pub(super) fn rule_at(rules: Option<&Vec<AccessRule>>, index: usize) -> Option<&AccessRule> {
    rules?.get(index)
}

/// A caller of a rule. Labels of namespaces stay labels: the names that they stand for are those of other people's
/// namespaces. Where the rule as it was written is not known, no namespace is named.
pub(super) fn peer(peer: &proto::Peer, written: Option<&Caller>) -> String {
    if !peer.cidr.is_empty() {
        return peer.cidr.clone();
    }
    let account = peer.service_account.as_str();
    if peer.any_namespace {
        return format!("*/{account}");
    }
    let by_label = |namespaces: String| match account {
        "" => namespaces,
        _ => format!("{account} in {namespaces}"),
    };
    let Some(written) = written else { return by_label("namespaces by label".to_owned()) };
    if let Some(labels) = &written.namespace_labels {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        return by_label(format!("namespaces with {}", labels.join(", ")));
    }
    let name = |namespace: &String| match account {
        "" => format!("namespace {namespace}"),
        _ => format!("{namespace}/{account}"),
    };
    peer.namespaces.iter().map(name).collect::<Vec<_>>().join(", ")
}

/// The callers of a rule, each alone.
pub(super) fn each_caller(rule: &proto::Rule, written: Option<&AccessRule>) -> Vec<String> {
    let written = |index: usize| written.and_then(|written| written.from.get(index));
    rule.from.iter().enumerate().map(|(index, one)| peer(one, written(index))).collect()
}

/// The callers of a rule.
pub(super) fn callers(rule: &proto::Rule, written: Option<&AccessRule>) -> String {
    match rule.from.as_slice() {
        [] => "everybody".to_owned(),
        _ => each_caller(rule, written).join(", "),
    }
}

/// A rule of an access section.
pub(super) fn rule(rule: &proto::Rule, written: Option<&AccessRule>) -> String {
    let operations: Vec<String> = rule.to.iter().map(operation).collect();
    match operations.as_slice() {
        [] => format!("from {}", callers(rule, written)),
        _ => format!("from {} to {}", callers(rule, written), operations.join(" or ")),
    }
}

fn operation(operation: &proto::Operation) -> String {
    let mut parts = Vec::new();
    if !operation.methods.is_empty() {
        parts.push(operation.methods.join(", "));
    }
    if !operation.paths.is_empty() {
        parts.push(operation.paths.join(", "));
    }
    if !operation.ports.is_empty() {
        parts.push(format!("port {}", ports(operation)));
    }
    parts.join(" ")
}

/// Whether a rule looks at requests: one of deny then denies every opaque connection from its callers to its ports, and
/// one of allow allows none.
pub(super) fn needs_http(rule: &proto::Rule) -> bool {
    rule.to.iter().any(looks_at_requests)
}

/// Whether an operation has methods or paths.
pub(super) fn looks_at_requests(operation: &proto::Operation) -> bool {
    !operation.methods.is_empty() || !operation.paths.is_empty()
}

/// The ports of an operation.
pub(super) fn ports(operation: &proto::Operation) -> String {
    operation.ports.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The parts of a match of a route, each alone.
pub(super) fn parts(m: &proto::Match) -> Vec<(proto::Match, String)> {
    let mut parts = Vec::new();
    if !m.method.is_empty() {
        let only = proto::Match { method: m.method.clone(), ..proto::Match::default() };
        parts.push((only, format!("method {}", m.method)));
    }
    if let Some(path) = &m.path {
        let only = proto::Match { path: Some(path.clone()), ..proto::Match::default() };
        parts.push((only, format!("path {}", value(path))));
    }
    for header in &m.headers {
        let only = proto::Match { headers: vec![header.clone()], ..proto::Match::default() };
        parts.push((only, format!("header {} {}", header.name, value(header))));
    }
    for parameter in &m.query {
        let only = proto::Match { query: vec![parameter.clone()], ..proto::Match::default() };
        parts.push((only, format!("query parameter {} {}", parameter.name, value(parameter))));
    }
    if let Some(service) = m.grpc_service.as_ref().filter(|value| !value.value.is_empty()) {
        let only = proto::Match { grpc_service: Some(service.clone()), ..proto::Match::default() };
        parts.push((only, format!("gRPC service {}", value(service))));
    }
    if let Some(method) = m.grpc_method.as_ref().filter(|value| !value.value.is_empty()) {
        let only = proto::Match { grpc_method: Some(method.clone()), ..proto::Match::default() };
        parts.push((only, format!("gRPC method {}", value(method))));
    }
    parts
}

/// A match of a route.
pub(super) fn whole_match(m: &proto::Match) -> String {
    let parts: Vec<String> = parts(m).into_iter().map(|(_, text)| text).collect();
    if parts.is_empty() { "every request".to_owned() } else { parts.join(", ") }
}

fn value(wanted: &proto::ValueMatch) -> String {
    match wanted.r#type() {
        Type::Prefix => format!("below {}", wanted.value),
        Type::Regex => format!("~ {}", wanted.value),
        Type::Exact | Type::Cookie | Type::Unspecified => wanted.value.clone(),
    }
}
