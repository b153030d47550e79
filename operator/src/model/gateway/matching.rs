//! Matches of a rule, as sidecars are sent them. One that cannot be decided makes its whole rule invalid.
//!
//! Each rule is compiled here as sidecars compile it: they refuse the rules of an address together, so that one rule
//! that they cannot decide would hold back all others.

use std::collections::HashSet;

use tulle_mesh::headers;
use tulle_mesh::proto;
use tulle_mesh::proto::value_match::Type;
use tulle_mesh::route::Matcher;

use super::check::Flaw;
use super::object::{
    MatchSpec, MatchType, MethodSpec, PathSpec, RouteKind, RouteObject, RuleSpec, ValueSpec,
};

/// Methods that an HTTPRoute can name.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// The matches of a rule; at least one.
///
/// # Errors
/// What cannot be decided.
pub(super) fn matches(route: &RouteObject, rule: &RuleSpec) -> Result<Vec<proto::Match>, Flaw> {
    let one: fn(&MatchSpec) -> Result<proto::Match, Flaw> = match route.kind {
        RouteKind::Tls => return decidable(RouteKind::Tls, vec![by_server_name(route)]),
        RouteKind::Tcp => return Ok(vec![proto::Match::default()]),
        RouteKind::Http => http,
        RouteKind::Grpc => grpc,
    };
    if rule.matches.is_empty() {
        return Ok(vec![one(&MatchSpec::default())?]);
    }
    let all = rule.matches.iter().enumerate();
    let all = all.map(|(index, spec)| one(spec).map_err(|flaw| flaw.at(&format!("matches[{index}]"))));
    decidable(route.kind, all.collect::<Result<_, _>>()?)
}

fn decidable(kind: RouteKind, matches: Vec<proto::Match>) -> Result<Vec<proto::Match>, Flaw> {
    let rules = proto::Rules {
        kind: kind.proto().into(),
        rules: vec![proto::RouteRule::default()],
        matches,
        ..proto::Rules::default()
    };
    Matcher::compile(&rules).map_err(|error| Flaw::unsupported(error.to_string()))?;
    Ok(rules.matches)
}

fn by_server_name(route: &RouteObject) -> proto::Match {
    let server_names = route.hostnames.iter().map(ToString::to_string).collect();
    proto::Match { server_names, ..proto::Match::default() }
}

fn http(spec: &MatchSpec) -> Result<proto::Match, Flaw> {
    let method = match &spec.method {
        None => String::new(),
        Some(MethodSpec::Http(method)) if METHODS.contains(&method.as_str()) => method.clone(),
        Some(MethodSpec::Http(method)) => {
            return Err(Flaw::unsupported(format!("method {method:?} is not one of {}", METHODS.join(", "))));
        }
        Some(MethodSpec::Grpc { .. }) => {
            return Err(Flaw::unsupported("a method of gRPC, which only a GRPCRoute can name"));
        }
    };
    Ok(proto::Match {
        path: Some(path(spec.path.as_ref().unwrap_or(&PathSpec::default()))?),
        headers: headers(&spec.headers)?,
        query: values(&spec.query_params, "query parameter", str::to_owned)?,
        method,
        ..proto::Match::default()
    })
}

fn grpc(spec: &MatchSpec) -> Result<proto::Match, Flaw> {
    let (service, method) = match &spec.method {
        None => (None, None),
        Some(MethodSpec::Grpc { kind, service, method }) => {
            let part = |text: &Option<String>| {
                let text = text.as_deref().filter(|text| !text.is_empty());
                text.map(|text| compared(kind.as_ref(), String::new(), text)).transpose()
            };
            (part(service)?, part(method)?)
        }
        Some(MethodSpec::Http(method)) => {
            return Err(Flaw::unsupported(format!("method {method:?} is of an HTTPRoute")));
        }
    };
    Ok(proto::Match {
        headers: headers(&spec.headers)?,
        grpc_service: service,
        grpc_method: method,
        ..proto::Match::default()
    })
}

fn path(spec: &PathSpec) -> Result<proto::ValueMatch, Flaw> {
    let r#type = match spec.kind.as_ref().unwrap_or(&MatchType::PathPrefix) {
        MatchType::Exact => Type::Exact,
        MatchType::PathPrefix => Type::Prefix,
        MatchType::RegularExpression => Type::Regex,
        MatchType::Unknown(name) => {
            return Err(Flaw::unsupported(format!("path match of type {name} is not supported")));
        }
    };
    let value = spec.value.as_deref().unwrap_or("/").to_owned();
    Ok(proto::ValueMatch { r#type: r#type.into(), name: String::new(), value })
}

fn headers(specs: &[ValueSpec]) -> Result<Vec<proto::ValueMatch>, Flaw> {
    let unseen = |spec: &&ValueSpec| !headers::is_matchable(&spec.name);
    if let Some(spec) = specs.iter().find(unseen) {
        let name = &spec.name;
        return Err(Flaw::unsupported(format!(
            "header {name} concerns a single connection or the framing of a message and cannot be matched"
        )));
    }
    values(specs, "header", str::to_ascii_lowercase)
}

/// Of several with the same name the first counts.
fn values(
    specs: &[ValueSpec],
    what: &str,
    canonical: fn(&str) -> String,
) -> Result<Vec<proto::ValueMatch>, Flaw> {
    let mut seen = HashSet::new();
    let firsts = specs.iter().filter(|spec| seen.insert(canonical(&spec.name)));
    let compared = |spec: &ValueSpec| {
        compared(spec.kind.as_ref(), spec.name.clone(), &spec.value)
            .map_err(|flaw| flaw.at(&format!("{what} {}", spec.name)))
    };
    firsts.map(compared).collect()
}

/// A value that is compared as a whole.
fn compared(kind: Option<&MatchType>, name: String, value: &str) -> Result<proto::ValueMatch, Flaw> {
    let r#type = match kind.unwrap_or(&MatchType::Exact) {
        MatchType::Exact => Type::Exact,
        MatchType::RegularExpression => Type::Regex,
        MatchType::PathPrefix => {
            return Err(Flaw::unsupported("match of type PathPrefix, which is for paths only"));
        }
        MatchType::Unknown(name) => {
            return Err(Flaw::unsupported(format!("match of type {name} is not supported")));
        }
    };
    Ok(proto::ValueMatch { r#type: r#type.into(), name, value: value.to_owned() })
}
