//! One match, compiled: what a request or a server name must be like.

use super::pattern::Pattern;
use super::{Found, RouteError, Subject, query};
use crate::proto;
use crate::proto::value_match::Type;

/// A request matches if each part does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Condition {
    pub(super) rule: usize,
    method: Option<Box<str>>,
    path: Option<PathValue>,
    grpc_service: Option<Value>,
    grpc_method: Option<Value>,
    headers: Vec<Named>,
    query: Vec<Named>,
    /// Empty: any.
    server_names: Vec<ServerName>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum PathValue {
    Exact(Box<str>),
    Prefix {
        /// As the route has it.
        written: Box<str>,
        /// Without the slash at its end, which makes no difference. Empty: every path.
        bare: Box<str>,
    },
    Regex(Pattern),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Exact(Box<str>),
    Regex(Pattern),
}

/// A header or query parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    name: Box<str>,
    value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum ServerName {
    Exact(Box<str>),
    /// `.example.com` of `*.example.com`.
    Below(Box<str>),
}

impl Condition {
    pub(super) fn compile(m: &proto::Match, rules: usize) -> Result<Self, RouteError> {
        let no_rule = || RouteError::Rule { rule: m.rule, rules };
        let rule = usize::try_from(m.rule).ok().filter(|rule| *rule < rules).ok_or_else(no_rule)?;
        let grpc = |part: &'static str, value: &Option<proto::ValueMatch>| {
            // The Gateway API: an empty value is any.
            let value = value.as_ref().filter(|value| !value.value.is_empty());
            value.map(|value| Value::compile(part, value)).transpose()
        };
        Ok(Self {
            rule,
            method: (!m.method.is_empty()).then(|| m.method.as_str().into()),
            path: m.path.as_ref().map(PathValue::compile).transpose()?,
            grpc_service: grpc("gRPC service", &m.grpc_service)?,
            grpc_method: grpc("gRPC method", &m.grpc_method)?,
            headers: headers(&m.headers)?,
            query: parameters(&m.query)?,
            server_names: m.server_names.iter().map(|n| ServerName::compile(n)).collect::<Result<_, _>>()?,
        })
    }

    /// The cheapest parts first.
    pub(super) fn find(&self, subject: &impl Subject) -> Option<Found<'_>> {
        if self.method.as_deref().is_some_and(|method| method != subject.method()) {
            return None;
        }
        let prefix = match &self.path {
            None => None,
            Some(path) if !path.matches(subject.path()) => return None,
            Some(PathValue::Prefix { written, .. }) => Some(&**written),
            Some(PathValue::Exact(_) | PathValue::Regex(_)) => None,
        };
        let found = Found { rule: self.rule, prefix };
        (self.grpc_matches(subject.path())
            && self.headers.iter().all(|header| header.matches_header(subject))
            && self.query.iter().all(|parameter| parameter.matches_query(subject.query())))
        .then_some(found)
    }

    fn grpc_matches(&self, path: &str) -> bool {
        if self.grpc_service.is_none() && self.grpc_method.is_none() {
            return true;
        }
        let Some((service, method)) = grpc_names(path) else { return false };
        self.grpc_service.as_ref().is_none_or(|value| value.matches(service.as_bytes()))
            && self.grpc_method.as_ref().is_none_or(|value| value.matches(method.as_bytes()))
    }

    /// How specific the best name is that matches: the highest for an exact one, the length of a wildcard, 0 where
    /// any name will do.
    pub(super) fn server_name_specificity(&self, name: Option<&str>) -> Option<usize> {
        if self.server_names.is_empty() {
            return Some(0);
        }
        let name = name?;
        self.server_names.iter().filter_map(|pattern| pattern.specificity(name)).max()
    }
}

/// Service and method of a gRPC call, whose path is `/package.Service/Method`.
fn grpc_names(path: &str) -> Option<(&str, &str)> {
    let (service, method) = path.strip_prefix('/')?.split_once('/')?;
    (!service.is_empty() && !method.is_empty() && !method.contains('/')).then_some((service, method))
}

/// Of several matches of one header, the first counts.
fn headers(matches: &[proto::ValueMatch]) -> Result<Vec<Named>, RouteError> {
    let mut compiled: Vec<Named> = Vec::with_capacity(matches.len());
    for m in matches {
        if m.name.is_empty() || !m.name.bytes().all(is_token) {
            return Err(RouteError::HeaderName(m.name.clone()));
        }
        let value = Value::compile("headers", m)?;
        if !compiled.iter().any(|known| known.name.eq_ignore_ascii_case(&m.name)) {
            compiled.push(Named { name: m.name.to_ascii_lowercase().into(), value });
        }
    }
    Ok(compiled)
}

/// Of several matches of one parameter, the first counts.
fn parameters(matches: &[proto::ValueMatch]) -> Result<Vec<Named>, RouteError> {
    let mut compiled: Vec<Named> = Vec::with_capacity(matches.len());
    for m in matches {
        if m.name.is_empty() {
            return Err(RouteError::QueryName);
        }
        let value = Value::compile("query parameters", m)?;
        if !compiled.iter().any(|known| *known.name == *m.name) {
            compiled.push(Named { name: m.name.as_str().into(), value });
        }
    }
    Ok(compiled)
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

impl PathValue {
    fn compile(m: &proto::ValueMatch) -> Result<Self, RouteError> {
        match Type::try_from(m.r#type) {
            Ok(Type::Exact) => Ok(Self::Exact(from_root(&m.value)?.into())),
            Ok(Type::Prefix) => {
                let written = from_root(&m.value)?;
                Ok(Self::Prefix { written: written.into(), bare: written.trim_end_matches('/').into() })
            }
            Ok(Type::Regex) => Ok(Self::Regex(Pattern::compile(&m.value)?)),
            Ok(Type::Unspecified | Type::Cookie) | Err(_) => {
                Err(RouteError::Comparison { part: "path", way: m.r#type })
            }
        }
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *path,
            // `*` of OPTIONS and the authority of CONNECT are paths too.
            Self::Prefix { bare, .. } if bare.is_empty() => true,
            Self::Prefix { bare, .. } => {
                path.strip_prefix(&**bare).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(pattern) => pattern.matches_str(path),
        }
    }
}

fn from_root(path: &str) -> Result<&str, RouteError> {
    if path.starts_with('/') { Ok(path) } else { Err(RouteError::Path(path.to_owned())) }
}

impl Value {
    fn compile(part: &'static str, m: &proto::ValueMatch) -> Result<Self, RouteError> {
        match Type::try_from(m.r#type) {
            Ok(Type::Exact) => Ok(Self::Exact(m.value.as_str().into())),
            Ok(Type::Regex) => Ok(Self::Regex(Pattern::compile(&m.value)?)),
            Ok(Type::Unspecified | Type::Prefix | Type::Cookie) | Err(_) => {
                Err(RouteError::Comparison { part, way: m.r#type })
            }
        }
    }

    fn matches(&self, value: &[u8]) -> bool {
        match self {
            Self::Exact(exact) => exact.as_bytes() == value,
            Self::Regex(pattern) => pattern.matches(value),
        }
    }
}

impl Named {
    fn matches_header(&self, subject: &impl Subject) -> bool {
        subject.header(&self.name).is_some_and(|value| self.value.matches(&value))
    }

    fn matches_query(&self, query: Option<&str>) -> bool {
        let Some(encoded) = query.and_then(|query| query::value(query, &self.name)) else { return false };
        match &self.value {
            Value::Exact(exact) => query::is(encoded, exact),
            Value::Regex(pattern) => pattern.matches(&query::decoded(encoded)),
        }
    }
}

impl ServerName {
    fn compile(name: &str) -> Result<Self, RouteError> {
        let bare = name.strip_prefix("*.").unwrap_or(name);
        let is_label = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        if !bare.split('.').all(is_label) {
            return Err(RouteError::ServerName(name.to_owned()));
        }
        match name.strip_prefix('*') {
            Some(below) => Ok(Self::Below(below.into())),
            None => Ok(Self::Exact(name.into())),
        }
    }

    fn specificity(&self, name: &str) -> Option<usize> {
        match self {
            Self::Exact(exact) => exact.eq_ignore_ascii_case(name).then_some(usize::MAX),
            Self::Below(below) => {
                let in_front = name.len().checked_sub(below.len()).filter(|length| *length > 0)?;
                let end = name.as_bytes().get(in_front..)?;
                end.eq_ignore_ascii_case(below.as_bytes()).then_some(below.len())
            }
        }
    }
}
