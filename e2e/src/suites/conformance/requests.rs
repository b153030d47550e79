//! Requests that a route is about, derived from the route alone: one that each match takes, near misses of it, and some
//! that are about nothing of it.
//!
//! In: a route and the Services, as manifests. Out: requests. What becomes of them is not said here.

#[cfg(test)]
mod tests;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

/// The gRPC method of the suite's application that says which pod has answered.
pub(super) const ECHO: &str = "/proto.EchoTestService/Echo";

/// How often a request is sent that a rule divides among several backends. Of a share of one in five, none of so many
/// requests arrives once in 7,000 times.
pub(super) const SAMPLE: u32 = 40;

/// A request that is sent and explained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Namespace of the Service.
    pub(super) namespace: String,
    /// The Service.
    pub(super) service: String,
    pub(super) port: u16,
    /// A gRPC call; else a request of HTTP/1.1.
    pub(super) grpc: bool,
    pub(super) method: String,
    /// With its query.
    pub(super) path: String,
    /// With `host`.
    pub(super) headers: Vec<(String, String)>,
    /// How often it is sent.
    pub(super) times: u32,
}

impl Request {
    /// A request without anything special.
    pub(super) fn plain(service: &Value, port: u16, grpc: bool) -> Result<Self> {
        let draft = Draft::of(if grpc { ECHO } else { "/" }, grpc);
        Ok(draft.to(&text(service, "/metadata/namespace")?, &text(service, "/metadata/name")?, port, grpc))
    }

    /// The Service and its port, as `tulle explain` names them.
    pub(super) fn destination(&self) -> String {
        format!("{}/{}:{}", self.namespace, self.service, self.port)
    }

    /// The name that a client dials.
    pub(super) fn host(&self) -> String {
        format!("{}.{}", self.service, self.namespace)
    }
}

/// A request to a Service that is not chosen yet.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Draft {
    method: String,
    path: String,
    query: Vec<(String, String)>,
    headers: Vec<(String, String)>,
    times: u32,
}

impl Draft {
    fn of(path: &str, grpc: bool) -> Self {
        let method = if grpc { "POST" } else { "GET" };
        Self {
            method: method.to_owned(),
            path: path.to_owned(),
            query: Vec::new(),
            headers: Vec::new(),
            times: 1,
        }
    }

    /// The same, changed.
    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut draft = Self { times: 1, ..self.clone() };
        change(&mut draft);
        draft
    }

    fn to(&self, namespace: &str, service: &str, port: u16, grpc: bool) -> Request {
        let pairs: Vec<String> =
            self.query.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect();
        let path = match pairs.is_empty() {
            true => self.path.clone(),
            false => format!("{}?{}", self.path, pairs.join("&")),
        };
        let mut headers = self.headers.clone();
        if !headers.iter().any(|(name, _)| name == "host") {
            headers.insert(0, ("host".to_owned(), format!("{service}.{namespace}")));
        }
        if grpc {
            // Clients of gRPC send names in lower case only.
            headers.iter_mut().for_each(|(name, _)| *name = name.to_lowercase());
            headers.push(("content-type".to_owned(), "application/grpc".to_owned()));
        }
        Request {
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            port,
            grpc,
            method: self.method.clone(),
            path,
            headers,
            times: self.times,
        }
    }
}

/// The requests that a route is about. `services`: the manifests of Services, among them the route's parents.
///
/// # Errors
/// Something of the route has a form from which no request can be derived.
pub(super) fn requests(route: &Value, services: &[Value]) -> Result<Vec<Request>> {
    let grpc = match text(route, "/kind")?.as_str() {
        "HTTPRoute" => false,
        "GRPCRoute" => true,
        other => bail!("no request can be derived from a {other}"),
    };
    let drafts = drafts(route, grpc)?;
    let first = drafts.first().context("the route has no rules")?;
    let own = text(route, "/metadata/namespace")?;
    let mut requests = Vec::new();
    let parents = route["spec"]["parentRefs"].as_array().context("the route has no parents")?;
    for parent in parents {
        ensure!(parent["kind"] == "Service", "parent {parent} is no Service");
        let namespace = parent["namespace"].as_str().unwrap_or(&own);
        let name = text(parent, "/name")?;
        let known = services.iter().find(|service| {
            service["metadata"]["namespace"] == namespace && service["metadata"]["name"] == name.as_str()
        });
        let service = known.with_context(|| format!("there is no Service {namespace}/{name}"))?;
        let speaking = ports(service, grpc);
        let port = match port_of(parent, service)? {
            Some(port) => port,
            None => *speaking.first().with_context(|| format!("{namespace}/{name} has no port for it"))?,
        };
        for draft in &drafts {
            add(&mut requests, draft.to(namespace, &name, port, grpc));
        }
        // The route may hold there or not.
        for other in speaking.into_iter().filter(|other| *other != port) {
            add(&mut requests, first.with(|_| ()).to(namespace, &name, other, grpc));
        }
    }
    Ok(requests)
}

/// The ports of a Service at which it speaks HTTP/1.1, or gRPC.
pub(super) fn ports(service: &Value, grpc: bool) -> Vec<u16> {
    let all = service["spec"]["ports"].as_array().into_iter().flatten();
    let speaking = all.filter(|port| match grpc {
        true => port["name"] == "grpc" || port["appProtocol"] == "kubernetes.io/h2c",
        false => port["appProtocol"] == "http",
    });
    speaking.filter_map(|port| u16::try_from(port["port"].as_u64()?).ok()).collect()
}

/// The port to which a parent restricts its route; `None`: all.
fn port_of(parent: &Value, service: &Value) -> Result<Option<u16>> {
    let number = match (&parent["port"], parent["sectionName"].as_str()) {
        (Value::Null, None) => return Ok(None),
        (Value::Null, Some(name)) => {
            let mut all = service["spec"]["ports"].as_array().into_iter().flatten();
            let named = all.find(|port| port["name"] == name);
            named.and_then(|port| port["port"].as_u64())
        }
        (number, _) => number.as_u64(),
    };
    let port = number.and_then(|number| u16::try_from(number).ok());
    Ok(Some(port.with_context(|| format!("the Service has no port for {parent}"))?))
}

/// Adds a request unless it is there. Of equal ones, the one that is sent more often stays.
fn add(requests: &mut Vec<Request>, request: Request) {
    let same = |other: &&mut Request| Request { times: request.times, ..(**other).clone() } == request;
    match requests.iter_mut().find(same) {
        Some(other) => other.times = other.times.max(request.times),
        None => requests.push(request),
    }
}

/// What is sent to each parent of a route; the first is one that its first match takes.
fn drafts(route: &Value, grpc: bool) -> Result<Vec<Draft>> {
    let mut drafts = Vec::new();
    let everything = [json!({})];
    for rule in route["spec"]["rules"].as_array().into_iter().flatten() {
        let matches = rule["matches"].as_array().filter(|matches| !matches.is_empty());
        for wanted in matches.map_or(&everything[..], Vec::as_slice) {
            let taken = if grpc { taken_call(wanted) } else { taken_request(wanted) };
            let taken = taken.with_context(|| format!("match {wanted}"))?;
            drafts.push(Draft { times: if is_shared(rule) { SAMPLE } else { 1 }, ..taken.clone() });
            drafts.extend(near_misses(wanted, &taken, grpc));
        }
    }
    if let Some(first) = drafts.first().cloned() {
        if grpc {
            drafts.push(Draft::of("/nobody.Nothing/Nothing", grpc));
        } else {
            drafts.push(Draft::of("/nowhere-at-all", grpc));
            // The names of hosts do not choose routes of a mesh; `Location` repeats them.
            drafts.push(first.with(|draft| draft.headers.push(pair("host", "elsewhere.example"))));
            drafts.push(first.with(|draft| draft.method = other_method(&draft.method)));
        }
    }
    Ok(drafts)
}

/// Whether a rule divides requests among several backends.
fn is_shared(rule: &Value) -> bool {
    let backends = rule["backendRefs"].as_array().into_iter().flatten();
    backends.filter(|backend| backend["weight"].as_u64().unwrap_or(1) > 0).count() > 1
}

/// A request that has all that a match of an HTTPRoute wants.
fn taken_request(wanted: &Value) -> Result<Draft> {
    let path = match (wanted["path"]["type"].as_str(), wanted["path"]["value"].as_str()) {
        (_, None) => "/".to_owned(),
        (None | Some("PathPrefix" | "Exact"), Some(path)) => path.to_owned(),
        (Some("RegularExpression"), Some(pattern)) => example(pattern)?,
        (Some(other), _) => bail!("no path can be derived from type {other}"),
    };
    ensure!(path.starts_with('/'), "{path:?} is no path");
    let mut draft = Draft::of(&path, false);
    if let Some(method) = wanted["method"].as_str() {
        method.clone_into(&mut draft.method);
    }
    draft.headers = pairs(&wanted["headers"])?;
    draft.query = pairs(&wanted["queryParams"])?;
    Ok(draft)
}

/// A call that has all that a match of a GRPCRoute wants.
fn taken_call(wanted: &Value) -> Result<Draft> {
    let exact = wanted["method"]["type"].as_str().unwrap_or("Exact") == "Exact";
    let part = |name: &str, otherwise: &str| match wanted["method"][name].as_str() {
        None => Ok(otherwise.to_owned()),
        Some(value) if exact => Ok(value.to_owned()),
        Some(pattern) => example(pattern),
    };
    let path = format!("/{}/{}", part("service", "proto.EchoTestService")?, part("method", "Echo")?);
    let mut draft = Draft::of(&path, true);
    draft.headers = pairs(&wanted["headers"])?;
    Ok(draft)
}

/// Requests that lack one thing that a match wants, or have another one in its place.
fn near_misses(wanted: &Value, taken: &Draft, grpc: bool) -> Vec<Draft> {
    let mut misses = Vec::new();
    if grpc {
        misses.push(taken.with(|draft| draft.path.push_str("More")));
        misses.push(taken.with(|draft| {
            let method = draft.path.rsplit('/').next().unwrap_or_default();
            draft.path = format!("/another.Service/{method}");
        }));
    } else {
        misses.push(taken.with(|draft| draft.path.push_str("-more")));
        misses.push(taken.with(|draft| draft.path = format!("{}/more", draft.path.trim_end_matches('/'))));
        if wanted["method"].is_string() {
            misses.push(taken.with(|draft| draft.method = other_method(&draft.method)));
        }
        if !taken.headers.is_empty() {
            misses.push(taken.with(|draft| {
                draft.headers.iter_mut().for_each(|(name, _)| *name = name.to_uppercase());
            }));
        }
    }
    for index in 0..taken.headers.len() {
        misses.push(taken.with(|draft| drop(draft.headers.remove(index))));
        misses.push(taken.with(|draft| draft.headers[index].1.push_str("-other")));
    }
    for index in 0..taken.query.len() {
        misses.push(taken.with(|draft| drop(draft.query.remove(index))));
        misses.push(taken.with(|draft| draft.query[index].1.push_str("-other")));
    }
    misses
}

fn other_method(method: &str) -> String {
    if method == "POST" { "GET" } else { "POST" }.to_owned()
}

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// Names and values that conditions of a match want.
fn pairs(conditions: &Value) -> Result<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    for condition in conditions.as_array().into_iter().flatten() {
        let value = text(condition, "/value")?;
        let value = match condition["type"].as_str() {
            None | Some("Exact") => value,
            Some("RegularExpression") => example(&value)?,
            Some(other) => bail!("no value can be derived from type {other}"),
        };
        pairs.push((text(condition, "/name")?, value));
    }
    Ok(pairs)
}

/// A string that a simple regular expression matches: of characters, `.`, escapes, classes, and `*`, `+` and `?` behind
/// them.
fn example(pattern: &str) -> Result<String> {
    let unknown = || format!("no example can be derived from the regular expression {pattern:?}");
    let inner = pattern.strip_prefix('^').unwrap_or(pattern);
    let inner = inner.strip_suffix('$').unwrap_or(inner);
    let mut rest = inner.chars();
    let mut found = String::new();
    while let Some(next) = rest.next() {
        match next {
            '.' => found.push('x'),
            '\\' => match rest.next().with_context(unknown)? {
                'd' => found.push('1'),
                'w' => found.push('x'),
                literal if !literal.is_alphanumeric() => found.push(literal),
                _ => bail!(unknown()),
            },
            '[' => {
                let first = rest.next().filter(|first| !['^', ']', '\\', '['].contains(first));
                found.push(first.with_context(unknown)?);
                rest.by_ref().find(|end| *end == ']').with_context(unknown)?;
            }
            // Once is among the numbers of times that all of these allow.
            '*' | '+' | '?' if !found.is_empty() => {}
            '(' | ')' | '{' | '}' | '|' | '^' | '$' | ']' | '*' | '+' | '?' => bail!(unknown()),
            literal => found.push(literal),
        }
    }
    Ok(found)
}

/// A part of a query, with all but letters, digits and `-._~` escaped.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

/// A text of an object.
pub(super) fn text(object: &Value, pointer: &str) -> Result<String> {
    let found = object.pointer(pointer).and_then(Value::as_str);
    Ok(found.with_context(|| format!("no {pointer} in {object}"))?.to_owned())
}
