//! Rules of the Gateway API's routes, merged for one address and in order of precedence, as they are used.
//!
//! In: the message. Out: [`Rules`], in which every header name and value, path and status can be sent as it is. What
//! cannot be is refused here: a line break in a value would be another header, or another request.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use tulle_mesh::headers;
use tulle_mesh::proto;
use tulle_mesh::route::Matcher;

use super::resource::{Protocol, Refused, ServiceRoute, decode_port, decode_protocol, refuse};
use super::traffic::{decode_traffic, milliseconds};

/// Rules for one address. The first match decides.
pub struct Rules {
    /// What they are about.
    pub kind: RouteKind,
    /// Finds the rule of a request or a connection.
    pub matcher: Matcher,
    /// The rules, as the matcher numbers them.
    pub rules: Vec<Rule>,
    /// The Services that rules name as backends and for copies, each once. They have no rules.
    pub services: Vec<ServiceRoute>,
}

/// What routes are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// HTTP requests.
    Http,
    /// gRPC requests.
    Grpc,
    /// TLS connections, by the name of the server.
    Tls,
    /// Connections.
    Tcp,
}

/// One rule.
#[derive(Debug)]
pub struct Rule {
    /// The route that it is of: `HTTPRoute/namespace/name`.
    pub route: Arc<str>,
    /// Its own name; may be empty.
    pub name: Arc<str>,
    /// What is done with requests.
    pub filters: Vec<Filter>,
    /// Where they go.
    pub backends: Vec<RuleBackend>,
    /// How long they may take, and how often they are repeated.
    pub times: RuleTimes,
    /// Clients that stay with an endpoint.
    pub session: Option<SessionPersistence>,
}

/// Where a share of a rule's requests goes.
#[derive(Debug)]
pub struct RuleBackend {
    /// Its share among the weights of the rule.
    pub weight: u32,
    /// Its number in [`Rules::services`]; `None`: it is invalid, and its share is answered so.
    pub service: Option<usize>,
    /// What is done with requests that go there.
    pub filters: Vec<Filter>,
}

/// How long requests of a rule may take, and how often they are repeated. `None`: as the policy says; `Some(None)`: no
/// limit, whatever it says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleTimes {
    /// To the end of the answer.
    pub request: Option<Option<Duration>>,
    /// For one attempt.
    pub attempt: Option<Option<Duration>>,
    /// How often requests are repeated.
    pub retry: Option<RuleRetry>,
}

/// How often requests of a rule are repeated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleRetry {
    /// After answers with one of these statuses.
    pub codes: Vec<u16>,
    /// Attempts beside the first.
    pub attempts: u8,
    /// The least wait between two.
    pub backoff: Duration,
}

/// How clients stay with an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionPersistence {
    /// What carries the session.
    pub carrier: Carrier,
    /// The name of the cookie or header; empty: one of our choice.
    pub name: Arc<str>,
    /// How long after its beginning it ends; `None`: never.
    pub absolute: Option<Duration>,
    /// How long after its last request it ends; `None`: never.
    pub idle: Option<Duration>,
    /// The cookie outlives the browser's session.
    pub permanent: bool,
}

/// What carries a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// A cookie.
    Cookie,
    /// A header of requests and answers.
    Header,
}

/// What is done with requests and answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// Headers of the request.
    RequestHeaders(HeaderEdits),
    /// Headers of the answer.
    ResponseHeaders(HeaderEdits),
    /// The client is sent elsewhere. Its status is one of the redirects.
    Redirect(proto::Redirect),
    /// Host and path of the request.
    Rewrite(Rewrite),
    /// A copy of the request goes elsewhere.
    Mirror(Mirror),
    /// Cross-origin requests of browsers.
    Cors(Cors),
}

/// Changes of headers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// Instead of all lines of the name.
    pub set: Vec<(Bytes, Bytes)>,
    /// Behind the value that is there.
    pub add: Vec<(Bytes, Bytes)>,
    /// All lines of the name.
    pub remove: Vec<Bytes>,
}

/// A change of host and path.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rewrite {
    /// The value of Host; `None`: as it is.
    pub host: Option<Bytes>,
    /// How the path changes.
    pub path: Option<proto::PathModifier>,
}

/// Copies of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// The number of the Service in [`Rules::services`]; `None`: it is invalid.
    pub service: Option<usize>,
    /// Copies are made of so many requests…
    pub numerator: u32,
    /// …out of so many.
    pub denominator: u32,
}

/// Which cross-origin requests browsers may make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    /// Origins, each with at most one `*`.
    pub allow_origins: Vec<String>,
    /// Requests may carry cookies and the like.
    pub allow_credentials: bool,
    /// Methods, or `*`.
    pub allow_methods: Vec<String>,
    /// Names of request headers, or `*`.
    pub allow_headers: Vec<String>,
    /// Names of answer headers that scripts may see, or `*`.
    pub expose_headers: Vec<String>,
    /// How long a browser may remember all this, in seconds.
    pub max_age_seconds: u32,
}

impl fmt::Debug for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rules").field("kind", &self.kind).field("rules", &self.rules).finish_non_exhaustive()
    }
}

/// Decodes rules.
///
/// # Errors
/// [`Refused`] for whatever this build does not know or could not send.
pub(super) fn decode_rules(rules: &proto::Rules) -> Result<Rules, Refused> {
    let kind = match rules.kind() {
        proto::RouteKind::Http => RouteKind::Http,
        proto::RouteKind::Grpc => RouteKind::Grpc,
        proto::RouteKind::Tls => RouteKind::Tls,
        proto::RouteKind::Tcp => RouteKind::Tcp,
        proto::RouteKind::Unspecified => return refuse(format!("unknown kind of routes {}", rules.kind)),
    };
    let matcher = Matcher::compile(rules).map_err(|error| Refused(error.to_string()))?;
    let mut decoder = Decoder { routes: &rules.routes, services: Vec::new() };
    let decoded = rules.rules.iter().map(|rule| decoder.rule(rule)).collect::<Result<_, _>>()?;
    Ok(Rules { kind, matcher, rules: decoded, services: decoder.services })
}

struct Decoder<'a> {
    routes: &'a [proto::RouteRef],
    services: Vec<ServiceRoute>,
}

impl Decoder<'_> {
    fn rule(&mut self, rule: &proto::RouteRule) -> Result<Rule, Refused> {
        let route = usize::try_from(rule.route).ok().and_then(|index| self.routes.get(index));
        let route =
            route.ok_or_else(|| Refused(format!("a rule of route {}, which is not there", rule.route)))?;
        let backends = rule.backends.iter().map(|backend| {
            Ok::<_, Refused>(RuleBackend {
                weight: backend.weight,
                service: self.service(backend)?,
                filters: self.filters(&backend.filters)?,
            })
        });
        let backends = backends.collect::<Result<_, _>>()?;
        Ok(Rule {
            route: named(route).into(),
            name: rule.name.as_str().into(),
            filters: self.filters(&rule.filters)?,
            backends,
            times: RuleTimes {
                request: rule.request_timeout_ms.map(milliseconds),
                attempt: rule.attempt_timeout_ms.map(milliseconds),
                retry: rule.retry.as_ref().map(decode_retry),
            },
            session: rule.session.as_ref().map(decode_session).transpose()?,
        })
    }

    /// The number of a backend's Service; `None`: it is invalid.
    fn service(&mut self, backend: &proto::Backend) -> Result<Option<usize>, Refused> {
        if backend.endpoints.is_empty() {
            return Ok(None);
        }
        if let Some(known) = self.services.iter().position(|known| *known.endpoints == *backend.endpoints) {
            return Ok(Some(known));
        }
        self.services.push(ServiceRoute {
            namespace: backend.namespace.clone(),
            name: backend.name.clone(),
            port: decode_port(backend.port)?,
            protocol: decode_protocol(backend.protocol)?,
            endpoints: backend.endpoints.as_str().into(),
            traffic: decode_traffic(backend.traffic.as_ref())?,
            shadow: decode_traffic(backend.shadow.as_ref())?,
            ..ServiceRoute::default()
        });
        Ok(Some(self.services.len() - 1))
    }

    fn filters(&mut self, filters: &[proto::Filter]) -> Result<Vec<Filter>, Refused> {
        filters.iter().map(|filter| self.filter(filter)).collect()
    }

    fn filter(&mut self, filter: &proto::Filter) -> Result<Filter, Refused> {
        use proto::filter::Kind;
        Ok(match &filter.kind {
            None => return refuse("a filter that this sidecar does not know".to_owned()),
            Some(Kind::RequestHeaders(edits)) => Filter::RequestHeaders(decode_edits(edits)?),
            Some(Kind::ResponseHeaders(edits)) => Filter::ResponseHeaders(decode_edits(edits)?),
            Some(Kind::Redirect(redirect)) => Filter::Redirect(decode_redirect(redirect)?),
            Some(Kind::Rewrite(rewrite)) => {
                check_path(rewrite.path.as_ref())?;
                let host = match rewrite.hostname.as_str() {
                    "" => None,
                    host => Some(value("host", host)?),
                };
                Filter::Rewrite(Rewrite { host, path: rewrite.path.clone() })
            }
            Some(Kind::Mirror(mirror)) => {
                let Some(backend) = &mirror.backend else {
                    return refuse("a mirror without backend".to_owned());
                };
                if mirror.denominator == 0 {
                    return refuse("a mirror of a fraction of nought".to_owned());
                }
                let service = self.service(backend)?;
                let (numerator, denominator) = (mirror.numerator, mirror.denominator);
                Filter::Mirror(Mirror { service, numerator, denominator })
            }
            Some(Kind::Cors(cors)) => Filter::Cors(decode_cors(cors)?),
        })
    }
}

fn named(route: &proto::RouteRef) -> String {
    let kind = match route.kind() {
        proto::RouteKind::Unspecified => "Route",
        proto::RouteKind::Http => "HTTPRoute",
        proto::RouteKind::Grpc => "GRPCRoute",
        proto::RouteKind::Tls => "TLSRoute",
        proto::RouteKind::Tcp => "TCPRoute",
    };
    let object = route.object.as_ref();
    let (namespace, name) =
        object.map_or(("", ""), |object| (object.namespace.as_str(), object.name.as_str()));
    format!("{kind}/{namespace}/{name}")
}

fn decode_retry(retry: &proto::RouteRetry) -> RuleRetry {
    RuleRetry {
        // Others are never answered.
        codes: retry.codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect(),
        attempts: u8::try_from(retry.attempts).unwrap_or(u8::MAX),
        backoff: Duration::from_millis(u64::from(retry.backoff_ms)),
    }
}

fn decode_session(session: &proto::SessionPersistence) -> Result<SessionPersistence, Refused> {
    use proto::session_persistence::Type;
    let carrier = match session.r#type() {
        Type::Cookie => Carrier::Cookie,
        Type::Header => Carrier::Header,
        Type::Unspecified => return refuse(format!("unknown session persistence {}", session.r#type)),
    };
    if !session.name.is_empty() {
        editable(&session.name)?;
    }
    let seconds = |seconds: u32| (seconds > 0).then(|| Duration::from_secs(u64::from(seconds)));
    Ok(SessionPersistence {
        carrier,
        name: session.name.as_str().into(),
        absolute: seconds(session.absolute_seconds),
        idle: seconds(session.idle_seconds),
        permanent: session.permanent,
    })
}

fn decode_edits(edits: &proto::HeaderEdits) -> Result<HeaderEdits, Refused> {
    let lines = |headers: &[proto::Header]| -> Result<Vec<_>, Refused> {
        headers.iter().map(|line| Ok((editable(&line.name)?, value(&line.name, &line.value)?))).collect()
    };
    let removed = |name: &String| {
        if name.eq_ignore_ascii_case("host") {
            return refuse("a request without Host cannot be sent: set another one instead".to_owned());
        }
        editable(name)
    };
    Ok(HeaderEdits {
        set: lines(&edits.set)?,
        add: lines(&edits.add)?,
        remove: edits.remove.iter().map(removed).collect::<Result<_, _>>()?,
    })
}

/// The name of a header that a route may change.
fn editable(name: &str) -> Result<Bytes, Refused> {
    if HeaderName::from_bytes(name.as_bytes()).is_err() {
        return refuse(format!("{name:?} is not the name of a header"));
    }
    if !headers::is_editable(name) {
        return refuse(format!("a route cannot change the header {name}"));
    }
    Ok(Bytes::copy_from_slice(name.as_bytes()))
}

fn value(name: &str, value: &str) -> Result<Bytes, Refused> {
    match HeaderValue::from_str(value) {
        Ok(_) => Ok(Bytes::copy_from_slice(value.trim_ascii().as_bytes())),
        Err(_) => refuse(format!("{value:?} cannot be the value of the header {name}")),
    }
}

fn decode_redirect(redirect: &proto::Redirect) -> Result<proto::Redirect, Refused> {
    check_path(redirect.path.as_ref())?;
    let status = match redirect.status {
        0 => 302,
        known @ (301 | 302 | 303 | 307 | 308) => known,
        other => return refuse(format!("{other} is not the status of a redirect")),
    };
    // Both go into Location, which has no room for blanks.
    for part in [&redirect.scheme, &redirect.hostname] {
        if !part.bytes().all(|byte| byte.is_ascii_graphic()) {
            return refuse(format!("{part:?} cannot be a part of Location"));
        }
    }
    decode_port(redirect.port)?;
    Ok(proto::Redirect { status, ..redirect.clone() })
}

/// A path that can stand in the first line of a request, and ends where the query begins.
fn check_path(path: Option<&proto::PathModifier>) -> Result<(), Refused> {
    use proto::path_modifier::Kind;
    let (Kind::Full(text) | Kind::Prefix(text)) = match path {
        None => return Ok(()),
        Some(proto::PathModifier { kind: None }) => {
            return refuse("a change of the path that this sidecar does not know".to_owned());
        }
        Some(proto::PathModifier { kind: Some(kind) }) => kind,
    };
    if text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#')) {
        return Ok(());
    }
    refuse(format!("{text:?} is not a path: what does not stand for itself must be escaped (%20)"))
}

fn decode_cors(cors: &proto::Cors) -> Result<Cors, Refused> {
    let all = [&cors.allow_origins, &cors.allow_methods, &cors.allow_headers, &cors.expose_headers];
    for text in all.into_iter().flatten() {
        value("access-control-allow", text)?;
    }
    Ok(Cors {
        allow_origins: cors.allow_origins.clone(),
        allow_credentials: cors.allow_credentials,
        allow_methods: cors.allow_methods.clone(),
        allow_headers: cors.allow_headers.clone(),
        expose_headers: cors.expose_headers.clone(),
        max_age_seconds: cors.max_age_seconds,
    })
}

impl ServiceRoute {
    /// What is spoken at the address, as far as it was declared, by its port or by the kind of its routes.
    pub fn spoken(&self) -> Protocol {
        match (self.rules.as_ref().map(|rules| rules.kind), self.protocol) {
            // Where a connection goes, its first bytes say; the rest is not looked at.
            (Some(RouteKind::Tls), _) => Protocol::Opaque,
            (Some(RouteKind::Grpc), Protocol::Detect) => Protocol::Http2,
            (_, declared) => declared,
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::filter::Kind;

    use super::*;

    fn rules(filters: Vec<Kind>) -> proto::Rules {
        let filters = filters.into_iter().map(|kind| proto::Filter { kind: Some(kind) }).collect();
        let backend = |endpoints: &str, weight| proto::Backend {
            endpoints: endpoints.into(),
            weight,
            port: 80,
            ..Default::default()
        };
        let object = proto::ObjectRef { namespace: "shop".into(), name: "web".into(), ..Default::default() };
        let rule = proto::RouteRule {
            filters,
            backends: vec![backend("shop/a:80", 7), backend("", 3), backend("shop/a:80", 1)],
            request_timeout_ms: Some(0),
            attempt_timeout_ms: Some(250),
            ..Default::default()
        };
        proto::Rules {
            kind: proto::RouteKind::Http.into(),
            routes: vec![proto::RouteRef { kind: proto::RouteKind::Http.into(), object: Some(object) }],
            rules: vec![rule],
            matches: vec![proto::Match::default()],
        }
    }

    fn edits(name: &str, value: &str) -> proto::HeaderEdits {
        let line = proto::Header { name: name.into(), value: value.into() };
        proto::HeaderEdits { set: vec![line], ..Default::default() }
    }

    fn path(text: &str) -> Option<proto::PathModifier> {
        Some(proto::PathModifier { kind: Some(proto::path_modifier::Kind::Full(text.into())) })
    }

    #[test]
    fn a_backend_that_several_name_is_one_and_an_invalid_one_keeps_its_share() {
        let decoded = decode_rules(&rules(vec![])).unwrap();
        let [rule] = decoded.rules.as_slice() else { panic!("{decoded:?}") };
        assert_eq!(&*rule.route, "HTTPRoute/shop/web");
        let backends: Vec<_> =
            rule.backends.iter().map(|backend| (backend.weight, backend.service)).collect();
        assert_eq!(backends, [(7, Some(0)), (3, None), (1, Some(0))]);
        assert_eq!(decoded.services.len(), 1);
        assert_eq!(rule.times.request, Some(None), "none, whatever a policy says");
        assert_eq!(rule.times.attempt, Some(Some(Duration::from_millis(250))));
    }

    #[test]
    fn what_could_not_be_sent_or_would_break_a_message_is_refused() {
        let full = |text: &str| proto::Rewrite { path: path(text), ..Default::default() };
        let bad = [
            Kind::RequestHeaders(edits("x", "a\r\nhost: b")),
            Kind::RequestHeaders(edits("a b", "c")),
            Kind::RequestHeaders(edits("Content-Length", "5")),
            Kind::ResponseHeaders(edits("transfer-encoding", "chunked")),
            Kind::RequestHeaders(edits("tulle-client-id", "spiffe://cluster.local/ns/a/sa/b")),
            Kind::RequestHeaders(proto::HeaderEdits { remove: vec!["Host".into()], ..Default::default() }),
            Kind::Rewrite(full("/a b")),
            Kind::Rewrite(full("/a?b")),
            Kind::Rewrite(proto::Rewrite { hostname: "a\nb".into(), ..Default::default() }),
            Kind::Redirect(proto::Redirect { status: 200, ..Default::default() }),
            Kind::Redirect(proto::Redirect { hostname: "a b".into(), ..Default::default() }),
            Kind::Mirror(proto::Mirror { backend: Some(proto::Backend::default()), ..Default::default() }),
            Kind::Cors(proto::Cors { allow_origins: vec!["a\r\nb".into()], ..Default::default() }),
        ];
        for filter in bad {
            assert!(decode_rules(&rules(vec![filter.clone()])).is_err(), "{filter:?}");
        }
        let unknown = proto::Rules { kind: 99, ..rules(vec![]) };
        assert!(decode_rules(&unknown).unwrap_err().0.contains("99"));
        let mut nobodys = rules(vec![]);
        nobodys.routes.clear();
        assert!(decode_rules(&nobodys).is_err());
    }

    #[test]
    fn filters_are_taken_over() {
        let good = vec![
            Kind::RequestHeaders(edits("X-A", "b ")),
            Kind::Redirect(proto::Redirect { path: path("/x"), ..Default::default() }),
        ];
        let decoded = decode_rules(&rules(good)).unwrap();
        let set = vec![(Bytes::from_static(b"X-A"), Bytes::from_static(b"b"))];
        let expected = Filter::RequestHeaders(HeaderEdits { set, ..HeaderEdits::default() });
        assert_eq!(decoded.rules[0].filters[0], expected);
        let Filter::Redirect(redirect) = &decoded.rules[0].filters[1] else { panic!("{decoded:?}") };
        assert_eq!(redirect.status, 302, "the default");
    }
}
