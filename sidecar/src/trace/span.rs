//! What a span says of a request, in the names of OpenTelemetry's semantic conventions (1.44).
//!
//! In: the head of a request, and how it ended. Out: name, attributes and whether it failed. Pure. Of what a client
//! sends, method and path are told and nothing else: no query, which may hold secrets, no other header, no body.

use tulle_mesh::trace::{SpanId, TraceId};
use tulle_mesh::wire::head::Protocol as Travels;

use crate::attempt::{Attempt, End};
use crate::error::Failure;
use crate::grpc;
use crate::http1::{Head, cut, known_method, logged_path, version};

/// Bytes of a method of gRPC; a longer one is none.
const MAX_RPC: usize = 256;
/// Bytes of a method that nobody knows.
const MAX_METHOD: usize = 32;
/// By number.
const GRPC_CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// On which side of a call a span is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A request that comes to this pod.
    #[default]
    Server,
    /// One attempt at a request of this pod.
    Client,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// One of a few words.
    Word(&'static str),
    /// Any text.
    Text(Box<str>),
    /// A number.
    Number(i64),
}

/// A span that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Its trace.
    pub trace_id: TraceId,
    /// Its own id.
    pub span_id: SpanId,
    /// Its parent; `None`: the trace begins with it.
    pub parent_id: Option<SpanId>,
    /// `tracestate`.
    pub state: Box<str>,
    /// Trace flags of W3C.
    pub flags: u8,
    /// On which side of a call it is.
    pub kind: Kind,
    /// What it is called.
    pub name: Box<str>,
    /// When it began, in nanoseconds of Unix time.
    pub start_unix_nano: u64,
    /// When it ended.
    pub end_unix_nano: u64,
    /// What else it says.
    pub attributes: Vec<(&'static str, Value)>,
    /// Whether its status is an error.
    pub failed: bool,
}

impl Span {
    /// Adds an attribute.
    pub fn push(&mut self, name: &'static str, value: Value) {
        self.attributes.push((name, value));
    }
}

/// How a request or an attempt ended: the statuses of a request are those of [`Call::statuses`].
///
/// [`Call::statuses`]: crate::call::Call::statuses
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome<'a> {
    /// The status that the client got, or the server has answered.
    pub status: Option<u16>,
    /// The same of gRPC.
    pub grpc_status: Option<u16>,
    /// What went wrong.
    pub failure: Option<&'a Failure>,
}

impl<'a> Outcome<'a> {
    /// Of an attempt.
    pub fn of_attempt(attempt: &'a Attempt) -> Self {
        let (status, failure) = match &attempt.end {
            End::Delivered(Ok(status)) | End::Refused(status) => (Some(*status), None),
            End::Delivered(Err(failure))
            | End::NotProcessed(failure)
            | End::Unread(failure)
            | End::Reset(failure)
            | End::Unanswered(failure)
            | End::Final(failure)
            | End::Client(failure) => (attempt.status, Some(failure)),
        };
        Self { status, grpc_status: attempt.grpc_status, failure }
    }
}

/// The client has left, which is no error of anybody.
fn is_cancel(failure: &Failure) -> bool {
    matches!(failure, Failure::ClientGone | Failure::ClientGaveUp)
}

/// What a span says of a request. Ids and times are the caller's. `route`: as it is counted, `HTTPRoute/namespace/name`.
pub fn describe(
    kind: Kind,
    head: &Head,
    travels: Travels,
    route: Option<&str>,
    outcome: &Outcome<'_>,
) -> Span {
    let mut span = Span { kind, attributes: Vec::with_capacity(12), ..Span::default() };
    let (method, target) = head.request_line();
    let path = logged_path(target);
    let rpc = path.filter(|_| grpc::content_type(head).is_some()).and_then(rpc_method);
    if let Some(rpc) = rpc {
        span.name = rpc.into();
        span.push("rpc.system.name", Value::Word("grpc"));
        span.push("rpc.method", Value::Text(rpc.into()));
        if let Some(status) = outcome.grpc_status {
            span.push("rpc.response.status_code", grpc_code(status));
        }
    } else {
        let known = known_method(method);
        let verb = known.unwrap_or("HTTP");
        span.name = match route.and_then(|route| route.rsplit('/').next()) {
            Some(route) => format!("{verb} {route}").into(),
            None => verb.into(),
        };
        span.push("http.request.method", Value::Word(known.unwrap_or("_OTHER")));
        if known.is_none() {
            span.push("http.request.method_original", Value::Text(cut(method, MAX_METHOD).into()));
        }
        span.push("url.scheme", Value::Word("http"));
        if let Some(path) = path {
            span.push("url.path", Value::Text(path.into()));
        }
    }
    // Of a call of gRPC only where its answer is not one of gRPC: 200 says nothing beside a status of gRPC.
    if let Some(status) = outcome.status.filter(|_| rpc.is_none() || outcome.grpc_status.is_none()) {
        span.push("http.response.status_code", Value::Number(status.into()));
    }
    span.push("network.protocol.version", Value::Word(version(head, travels)));
    if let Some(error) = error_type(kind, rpc.is_some(), outcome) {
        span.failed = true;
        span.push("error.type", error);
    }
    if let Some(failure) = outcome.failure {
        span.push("tulle.reason", Value::Word(failure.name()));
    }
    if let Some(route) = route {
        span.push("tulle.route", Value::Text(route.into()));
    }
    span
}

/// What went wrong, in one word; `None`: nothing that this side of the call calls an error.
fn error_type(kind: Kind, is_grpc: bool, outcome: &Outcome<'_>) -> Option<Value> {
    if let Some(failure) = outcome.failure {
        // A client that sends nonsense, or is refused by a rule, is the client's error and not the server's.
        let is_ours = kind == Kind::Client || failure.status() >= 500;
        return (is_ours && !is_cancel(failure)).then(|| Value::Word(failure.name()));
    }
    if is_grpc && let Some(status) = outcome.grpc_status {
        // UNIMPLEMENTED too: a client that calls what there is not was built for another server.
        let fails = match kind {
            Kind::Server => grpc::is_server_error(status) || status == 12,
            Kind::Client => status != 0,
        };
        return fails.then(|| grpc_code(status));
    }
    let least = if kind == Kind::Server { 500 } else { 400 };
    let status = outcome.status.filter(|status| *status >= least)?;
    Some(Value::Text(status.to_string().into()))
}

fn grpc_code(status: u16) -> Value {
    match GRPC_CODES.get(usize::from(status)).copied() {
        Some(name) => Value::Word(name),
        None => Value::Text(status.to_string().into()),
    }
}

/// `package.Service/Method` of a path; `None`: it is no such path. Names of protobuf have letters, digits and `_`.
fn rpc_method(path: &str) -> Option<&str> {
    let rpc = path.strip_prefix('/').filter(|rpc| rpc.len() <= MAX_RPC)?;
    let (service, method) = rpc.split_once('/')?;
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._".contains(&byte))
    };
    (is_name(service) && is_name(method)).then_some(rpc)
}

/// Host name and port of a Service, of `namespace/name:port`.
pub fn service_address(service: &[u8]) -> Option<(String, u16)> {
    let (namespace, rest) = std::str::from_utf8(service).ok()?.split_once('/')?;
    let (name, port) = rest.rsplit_once(':')?;
    Some((format!("{name}.{namespace}.svc"), port.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::http1::{MAX_PATH, Start};

    fn request(method: &str, target: &str) -> Head {
        let (method, target) = (Bytes::from(method.to_owned()), Bytes::from(target.to_owned()));
        let mut head = Head { start: Start::Request { method, target }, ..Head::answer(200, "", 0) };
        head.headers.clear();
        head
    }

    fn grpc_request(target: &str) -> Head {
        let mut head = request("POST", target);
        head.push("content-type", "application/grpc+proto");
        head
    }

    fn value<'a>(span: &'a Span, name: &str) -> Option<&'a Value> {
        span.attributes.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    fn text(span: &Span, name: &str) -> String {
        match value(span, name) {
            None => String::new(),
            Some(Value::Word(word)) => (*word).to_owned(),
            Some(Value::Text(text)) => text.to_string(),
            Some(Value::Number(number)) => number.to_string(),
        }
    }

    fn answered(status: u16) -> Outcome<'static> {
        Outcome { status: Some(status), ..Outcome::default() }
    }

    #[test]
    fn a_span_tells_the_path_and_never_the_query_or_who_asks() {
        for target in ["/cart/7?token=secret", "http://me:secret@shop/cart/7?token=secret"] {
            let mut head = request("GET", target);
            head.push("authorization", "Bearer secret");
            head.push("cookie", "secret");
            let span = describe(Kind::Server, &head, Travels::Http1, None, &answered(200));
            assert_eq!((&*span.name, text(&span, "url.path").as_str()), ("GET", "/cart/7"));
            assert!(!format!("{span:?}").contains("secret"), "{span:?}");
        }
        let long = describe(
            Kind::Server,
            &request("GET", &format!("/{}", "é".repeat(2_000))),
            Travels::Http1,
            None,
            &answered(200),
        );
        assert!(text(&long, "url.path").len() <= MAX_PATH);
    }

    #[test]
    fn a_span_is_called_after_its_method_and_route_and_not_after_what_a_client_invents() {
        let name = |method, route| {
            let span = describe(Kind::Client, &request(method, "/a"), Travels::Http1, route, &answered(200));
            (span.name.to_string(), text(&span, "http.request.method"))
        };
        assert_eq!(name("GET", None), ("GET".to_owned(), "GET".to_owned()));
        let routed = name("POST", Some("HTTPRoute/shop/checkout"));
        assert_eq!(routed, ("POST checkout".to_owned(), "POST".to_owned()));
        assert_eq!(name("BREW", None), ("HTTP".to_owned(), "_OTHER".to_owned()));
        assert_eq!(name("get", None), ("HTTP".to_owned(), "_OTHER".to_owned()), "methods have case");
    }

    #[test]
    fn a_call_of_grpc_is_called_after_its_method() {
        let outcome = Outcome { status: Some(200), grpc_status: Some(5), failure: None };
        let head = grpc_request("/shop.v1.Cart/Get");
        let span = describe(Kind::Client, &head, Travels::Http2, Some("GRPCRoute/shop/cart"), &outcome);
        assert_eq!((&*span.name, text(&span, "rpc.system.name").as_str()), ("shop.v1.Cart/Get", "grpc"));
        assert_eq!(text(&span, "rpc.response.status_code"), "NOT_FOUND");
        assert_eq!(text(&span, "error.type"), "NOT_FOUND");
        assert_eq!(text(&span, "network.protocol.version"), "2");
        for target in ["/only", "/a/b/c", "/a/b%20c", "/a/", "//b", "/a/b?c"] {
            let span = describe(Kind::Server, &grpc_request(target), Travels::Http2, None, &outcome);
            assert_eq!(&*span.name == "POST", target != "/a/b?c", "{target}");
        }
    }

    #[test]
    fn an_answer_is_an_error_of_the_client_from_400_and_of_the_server_from_500() {
        for (status, client, server) in [(200, "", ""), (302, "", ""), (404, "404", ""), (503, "503", "503")]
        {
            for (kind, expected) in [(Kind::Client, client), (Kind::Server, server)] {
                let span = describe(kind, &request("GET", "/"), Travels::Http1, None, &answered(status));
                assert_eq!(text(&span, "error.type"), expected, "{status} {kind:?}");
                assert_eq!(span.failed, !expected.is_empty());
            }
        }
        for (status, client, server) in
            [(0, "", ""), (5, "NOT_FOUND", ""), (12, "UNIMPLEMENTED", "UNIMPLEMENTED"), (99, "99", "")]
        {
            let outcome = Outcome { status: Some(200), grpc_status: Some(status), failure: None };
            for (kind, expected) in [(Kind::Client, client), (Kind::Server, server)] {
                let span = describe(kind, &grpc_request("/a/b"), Travels::Http2, None, &outcome);
                assert_eq!(text(&span, "error.type"), expected, "{status} {kind:?}");
            }
        }
    }

    #[test]
    fn a_failure_is_told_by_its_reason_and_a_client_that_leaves_is_no_error() {
        let of = |kind, failure: &Failure| {
            let outcome = Outcome { failure: Some(failure), ..Outcome::default() };
            let span = describe(kind, &request("GET", "/"), Travels::Http1, None, &outcome);
            (span.failed, text(&span, "error.type"), text(&span, "tulle.reason"))
        };
        let named = |failed, error: &str, reason: &str| (failed, error.to_owned(), reason.to_owned());
        for kind in [Kind::Client, Kind::Server] {
            let expected = named(true, "UpstreamReset", "UpstreamReset");
            assert_eq!(of(kind, &Failure::UpstreamReset), expected);
            assert_eq!(of(kind, &Failure::ClientGaveUp), named(false, "", "ClientGaveUp"));
        }
        assert_eq!(of(Kind::Server, &Failure::PolicyDenied), named(false, "", "PolicyDenied"));
        assert_eq!(of(Kind::Client, &Failure::PolicyDenied), named(true, "PolicyDenied", "PolicyDenied"));
    }

    #[test]
    fn an_attempt_whose_answer_was_refused_has_the_status_of_that_answer() {
        let attempt = Attempt { status: Some(503), ..Attempt::of(End::Refused(503)) };
        let outcome = Outcome::of_attempt(&attempt);
        assert_eq!((outcome.status, outcome.failure), (Some(503), None));
        let attempt = Attempt::of(End::Unanswered(Failure::UpstreamReset));
        assert_eq!(Outcome::of_attempt(&attempt).failure, Some(&Failure::UpstreamReset));
    }

    #[test]
    fn a_service_is_named_as_it_is_dialled() {
        assert_eq!(service_address(b"shop/web:80"), Some(("web.shop.svc".to_owned(), 80)));
        assert_eq!(service_address(b"web:80"), None);
    }
}
