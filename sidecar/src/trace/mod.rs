//! Spans of requests: which are made, what the next one is told of them, and where they go.
//!
//! In: heads of requests, and how they ended. Out: headers that name a span as the parent, and spans for a collector.
//! Whether a span is made is decided by [`tulle_mesh::trace`]; a request that is not recorded keeps its headers, and
//! costs a look at the names of its header lines. Where the MeshConfig names no collector it costs nothing.
//!
//! - *Inbound*: one server span for a request. Its parent is who has sent it, and the application sees it as its parent.
//!   A trace begins here only for a client without a sidecar: any other client's sidecar has decided already, and to
//!   decide once more would multiply the share.
//! - *Outbound*: one client span for each attempt, children of the span that the application has named. An application
//!   that forwards no trace headers begins a new trace with each request: nothing else tells here which request it serves.
//!
//! ```text
//!   span    what a span says of a request
//!   queue   spans that wait to be sent, and counts of what became of them
//!   export  sends them to the collector
//!   otlp    spans as the collector takes them
//! ```

pub mod export;
mod otlp;
mod queue;
pub mod span;

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::time::Instant;
use tulle_mesh::trace::{Form, Lines, Recorded, Rewritten, Share, SpanId, TraceId, decide};

use crate::attempt::Attempt;
use crate::backend::Upstream;
use crate::call::{Call, Ended, Statuses};
use crate::http1::Head;
use crate::route::RouteTarget;
use crate::worker::Worker;
pub use queue::Queue;
use span::{Kind, Outcome, Span, Value, describe, service_address};

/// A longer `tracestate` is not repeated in spans. It goes on with the request whatever its length.
const MAX_STATE: usize = 512;

/// The span of a request that is recorded.
#[derive(Debug)]
pub struct Trace {
    recorded: Recorded,
    span_id: SpanId,
    /// `tracestate`, for the span.
    state: Box<str>,
}

/// Begins the span of a request if it is recorded, and names it in the head as the parent of what follows. `may_begin`:
/// a request without a parent may begin a trace here.
pub fn begin(worker: &Worker, head: &mut Head, may_begin: bool) -> Option<Box<Trace>> {
    let share = worker.config.trace_share()?;
    Trace::of(head, if may_begin { share } else { Share::NONE }).map(Box::new)
}

impl Trace {
    fn of(head: &mut Head, share: Share) -> Option<Self> {
        let parent = Lines::of(head.headers.iter().map(|(name, value)| (&name[..], &value[..]))).context();
        let recorded = decide(parent.as_ref(), share, random_trace_id)?;
        let state = match (recorded.tracestate(), recorded.form) {
            (Some(own), _) => own,
            (None, Form::W3c) => state_of(head),
            (None, Form::B3Single | Form::B3Multi) => String::new(),
        };
        let trace = Self { recorded, span_id: random_span_id(), state: state.into() };
        trace.write(head);
        Some(trace)
    }

    /// Another attempt at the same request, with a span of its own.
    fn renew(&mut self, head: &mut Head) {
        self.span_id = random_span_id();
        self.write(head);
    }

    fn write(&self, head: &mut Head) {
        let Rewritten { set, removed } = self.recorded.lines(&self.span_id);
        for (name, value) in set {
            replace(head, name, &Bytes::from(value));
        }
        for name in removed {
            head.headers.retain(|(line, _)| !line.eq_ignore_ascii_case(name.as_bytes()));
        }
    }

    /// A request that came to this pod has ended.
    pub fn served(&self, worker: &Worker, call: &Call<'_>, ended: &Ended) {
        let span = server_span(call, ended);
        worker.telemetry.spans.push(self.finish(span, call.since, Instant::now()));
    }

    fn finish(&self, span: Span, began: Instant, ended: Instant) -> Span {
        let Recorded { trace_id, parent_id, .. } = self.recorded;
        let (start_unix_nano, end_unix_nano) = unix_times(began, ended);
        Span {
            trace_id,
            span_id: self.span_id,
            parent_id,
            state: self.state.clone(),
            flags: self.recorded.flags(),
            start_unix_nano,
            end_unix_nano,
            ..span
        }
    }
}

/// What the span of a request to this pod says: the status is that which the client got.
fn server_span(call: &Call<'_>, ended: &Ended) -> Span {
    let Statuses { http: status, grpc: grpc_status } = call.statuses(ended);
    let outcome = Outcome { status, grpc_status, failure: ended.result.as_ref().err() };
    describe(Kind::Server, &call.head, call.travels, None, &outcome)
}

/// The client spans of one request of the pod's application.
pub struct ClientSpans(Option<Box<Trace>>);

impl ClientSpans {
    /// To be called before anything of the request is written.
    pub fn begin(worker: &Worker, head: &mut Head) -> Self {
        Self(begin(worker, head, true))
    }

    /// An attempt begins.
    pub fn attempt(&mut self, call: &mut Call<'_>) {
        if let Some(trace) = &mut self.0
            && call.attempts > 0
        {
            trace.renew(&mut call.head);
        }
    }

    /// An attempt has ended that is not among the call's attempts yet. `upstream`: `None`, there was no endpoint.
    pub fn attempted(
        &self,
        (worker, way, call): (&Worker, &RouteTarget, &Call<'_>),
        upstream: Option<&Upstream>,
        attempt: &Attempt,
        (began, ended): (Instant, Instant),
    ) {
        let Some(trace) = &self.0 else { return };
        let outcome = Outcome::of_attempt(attempt);
        let mut span = describe(Kind::Client, &call.head, call.travels, way.route.as_deref(), &outcome);
        let peer = upstream.map(|upstream| upstream.endpoint.address);
        let service = way.backend.service();
        let dialled = service.as_deref().and_then(service_address);
        if let Some((address, port)) =
            dialled.or_else(|| peer.map(|peer| (peer.ip().to_string(), peer.port())))
        {
            span.push("server.address", Value::Text(address.into()));
            span.push("server.port", Value::Number(port.into()));
        }
        if let Some(peer) = peer {
            span.push("network.peer.address", Value::Text(peer.ip().to_string().into()));
            span.push("network.peer.port", Value::Number(peer.port().into()));
        }
        if let Some(upstream) = upstream.filter(|upstream| !upstream.endpoint.revision.is_empty()) {
            span.push("tulle.revision", Value::Text((&*upstream.endpoint.revision).into()));
        }
        if call.attempts > 0 {
            span.push("http.request.resend_count", Value::Number(call.attempts.into()));
        }
        worker.telemetry.spans.push(trace.finish(span, began, ended));
    }

    /// The request has ended. Without an endpoint there was no attempt: one span says so.
    pub fn unserved(&self, of: (&Worker, &RouteTarget, &Call<'_>), failed: &Attempt) {
        if of.2.attempts == 0 {
            self.attempted(of, None, failed, (of.2.since, Instant::now()));
        }
    }
}

/// Not zero, and random to the last bit.
fn random_trace_id() -> TraceId {
    fastrand::u128(1..).to_be_bytes()
}

fn random_span_id() -> SpanId {
    fastrand::u64(1..).to_be_bytes()
}

/// Nanoseconds of Unix time.
fn unix_times(began: Instant, ended: Instant) -> (u64, u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let end = now.saturating_sub(ended.elapsed());
    let start = end.saturating_sub(ended.saturating_duration_since(began));
    let nanos = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    (nanos(start), nanos(end))
}

/// The value of `tracestate`, whose lines are one list.
fn state_of(head: &Head) -> String {
    let lines = head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(b"tracestate"));
    let values: Vec<&str> = lines.filter_map(|(_, value)| std::str::from_utf8(value).ok()).collect();
    let state = values.join(",");
    if state.len() > MAX_STATE { String::new() } else { state }
}

/// Sets a header, at the place where it stands.
fn replace(head: &mut Head, name: &'static str, value: &Bytes) {
    let mut is_set = false;
    head.headers.retain_mut(|(line, old)| {
        if !line.eq_ignore_ascii_case(name.as_bytes()) {
            return true;
        }
        let is_first = !is_set;
        *old = value.clone();
        is_set = true;
        is_first
    });
    if !is_set {
        head.push(name, value.clone());
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::error::Failure;
    use crate::http1::conn::split;
    use crate::http1::head::parse_request;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    fn head(lines: &[(&'static str, &str)]) -> Head {
        let mut head = Head::answer(200, "", 0);
        head.headers.clear();
        lines.iter().for_each(|(name, value)| head.push(name, Bytes::from((*value).to_owned())));
        head
    }

    #[test]
    fn a_request_that_is_not_recorded_keeps_its_head_as_it_is() {
        let unsampled = format!("00-{TRACE}-b7ad6b7169203331-00");
        for lines in [
            vec![("host", "shop")],
            vec![("traceparent", unsampled.as_str()), ("tracestate", "a=1")],
            vec![("traceparent", "nonsense"), ("tracestate", "a=1")],
            vec![("b3", "0")],
        ] {
            let before = head(&lines);
            let mut after = before.clone();
            assert!(Trace::of(&mut after, Share::NONE).is_none());
            assert_eq!(after, before, "{lines:?}");
        }
    }

    #[test]
    fn the_span_takes_the_place_of_its_parent_and_tracestate_stays() {
        let sampled = format!("00-{TRACE}-b7ad6b7169203331-01");
        let mut head =
            head(&[("TraceParent", sampled.as_str()), ("host", "shop"), ("tracestate", "a=1,b=2")]);
        let mut trace = Trace::of(&mut head, Share::NONE).unwrap();
        let first = head.header("traceparent").cloned().unwrap();
        assert_eq!(head.headers.len(), 3);
        assert_eq!(head.headers[0].0, "TraceParent", "at the same place, under the same name");
        assert!(first.starts_with(format!("00-{TRACE}-").as_bytes()) && first.ends_with(b"-01"));
        assert_ne!(&first[..], sampled.as_bytes());
        assert_eq!(&head.header("tracestate").unwrap()[..], b"a=1,b=2");
        assert_eq!(&*trace.state, "a=1,b=2");
        trace.renew(&mut head);
        assert_ne!(head.header("traceparent"), Some(&first), "each attempt is a span of its own");
    }

    /// The statuses in the span of a POST of an HTTP/1 client that ended so: of HTTP and of gRPC.
    async fn statuses_of(content: &str, ended: &Ended) -> (Option<Value>, Option<Value>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut reader, mut writer) = split(stream, BytesMut::new());
        let head = format!(
            "POST /shop.Cart/Get HTTP/1.1\r\nhost: shop\r\ncontent-type: {content}\r\ncontent-length: 0\r\n\r\n"
        );
        let head = parse_request(&mut BytesMut::from(head.as_bytes())).unwrap().unwrap();
        let span = server_span(&Call::http1(head, &mut reader, &mut writer), ended);
        let value = |name: &str| {
            let found = span.attributes.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.clone())
        };
        (value("http.response.status_code"), value("rpc.response.status_code"))
    }

    #[tokio::test]
    async fn a_failure_that_is_answered_here_has_the_status_that_its_client_got() {
        let denied = Ended::failed(Failure::PolicyDenied);
        let down = Ended::failed(Failure::UpstreamConnect);
        let left = Ended::failed(Failure::ClientGaveUp);
        let broken = Ended { answered: true, ..Ended::failed(Failure::UpstreamReset) };
        for (content, ended, status) in [
            ("text/plain", &denied, Some(403)),
            ("text/plain", &down, Some(503)),
            // On HTTP/1 nobody is answered in gRPC.
            ("application/grpc", &denied, Some(403)),
            ("application/grpc", &down, Some(503)),
            // Nobody got an answer, or the head of one that is not kept.
            ("text/plain", &left, None),
            ("text/plain", &broken, None),
        ] {
            let found = statuses_of(content, ended).await;
            assert_eq!(found, (status.map(Value::Number), None), "{content} {ended:?}");
        }
    }

    #[test]
    fn a_trace_that_begins_here_replaces_what_nobody_could_read() {
        let mut head = head(&[("traceparent", "x"), ("traceparent", "y"), ("tracestate", "a=1")]);
        let trace = Trace::of(&mut head, Share::ALL).unwrap();
        assert_eq!(trace.recorded.parent_id, None);
        assert_eq!(head.headers.len(), 2);
        assert!(head.header("traceparent").unwrap().ends_with(b"-03"));
        assert_eq!(&head.header("tracestate").unwrap()[..], b"ot=th:0");
    }

    #[test]
    fn b3_in_many_lines_loses_the_parent_of_the_parent() {
        let mut head = head(&[
            ("x-b3-traceid", TRACE),
            ("x-b3-spanid", "b7ad6b7169203331"),
            ("x-b3-parentspanid", "b7ad6b7169203332"),
            ("x-b3-sampled", "1"),
        ]);
        assert!(Trace::of(&mut head, Share::NONE).is_some());
        assert_eq!(&head.header("x-b3-traceid").unwrap()[..], TRACE.as_bytes());
        assert_ne!(&head.header("x-b3-spanid").unwrap()[..], b"b7ad6b7169203331");
        assert_eq!((head.header("x-b3-parentspanid"), head.header("traceparent")), (None, None));
    }
}
