//! Traces: what goes on in headers, and which spans a collector gets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::sleep;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tulle_mesh::otlp::any_value::Value;
use tulle_mesh::otlp::span::SpanKind;
use tulle_mesh::otlp::trace_service_server::{TraceService, TraceServiceServer};
use tulle_mesh::otlp::{ExportTraceServiceRequest, ExportTraceServiceResponse, KeyValue, Span};
use tulle_sidecar::config::logs::AccessLog;

use crate::harness::echo::{Echo, Reply, ask, get};
use crate::harness::{Application, Cluster, NAMESPACE, Pod, within};
use crate::logs;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
/// The parent of a request that comes after others.
const LAST: &str = "00f067aa0ba902b7";

/// A collector on loopback: every span that it gets, with what its pod says of itself.
struct Collector {
    address: SocketAddr,
    spans: UnboundedReceiver<(String, Span)>,
}

struct Receiver(UnboundedSender<(String, Span)>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for of_pod in request.into_inner().resource_spans {
            let pod = text(&of_pod.resource.unwrap().attributes, "k8s.pod.name");
            for span in of_pod.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let _ = self.0.send((pod.clone(), span));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// One that takes nothing.
struct Refuser;

#[tonic::async_trait]
impl TraceService for Refuser {
    async fn export(
        &self,
        _: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        Err(Status::invalid_argument("no"))
    }
}

async fn listen(service: impl TraceService) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(service));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

impl Collector {
    async fn start() -> Self {
        let (sender, spans) = unbounded_channel();
        Self { address: listen(Receiver(sender)).await, spans }
    }

    /// So many spans, by when they began.
    async fn take(&mut self, count: usize) -> Vec<(String, Span)> {
        let mut spans = Vec::new();
        while spans.len() < count {
            spans.push(within(self.spans.recv()).await.unwrap());
        }
        spans.sort_by_key(|(_, span)| span.start_time_unix_nano);
        spans
    }
}

/// An attribute as text; empty: there is none.
fn text(attributes: &[KeyValue], name: &str) -> String {
    let found = attributes.iter().find(|attribute| attribute.key == name);
    match found.and_then(|found| found.value.clone()).and_then(|value| value.value) {
        None => String::new(),
        Some(Value::StringValue(text)) => text,
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::BoolValue(is)) => is.to_string(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn of_kind(spans: &[(String, Span)], kind: SpanKind) -> Vec<&Span> {
    spans.iter().map(|(_, span)| span).filter(|span| span.kind == i32::from(kind)).collect()
}

/// Names a collector in the MeshConfig, and waits until these pods and the client know it.
async fn trace(cluster: &Cluster, pods: &[&Pod], collector: SocketAddr, sampling: &str) {
    let config = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
        "spec": {"tracing": {"endpoint": format!("http://{collector}"), "sampling": sampling}},
    });
    let config = serde_json::from_value(config).unwrap();
    cluster.operator.change(|model| model.apply_config(Some(&config)));
    let sidecars = pods.iter().filter_map(|pod| pod.sidecar.as_ref()).chain([&cluster.client]);
    for sidecar in sidecars {
        within(async {
            while sidecar.config.tracing().is_none() {
                sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

async fn send(cluster: &Cluster, service: SocketAddr, lines: &str) -> Reply {
    ask(&mut cluster.client.dial(service).await, &get("/cart?token=secret", lines)).await
}

/// Answers 503 to the first request and 200 to all others, each with the head that it has read.
async fn fails_once(mut stream: TcpStream, asked: Arc<AtomicUsize>) {
    let mut buffer = Vec::new();
    while matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
        if !buffer.ends_with(b"\r\n\r\n") {
            continue;
        }
        let body = String::from_utf8(std::mem::take(&mut buffer)).unwrap();
        let is_first = asked.fetch_add(1, Ordering::SeqCst) == 0;
        let status = if is_first { "503 Service Unavailable" } else { "200 OK" };
        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_request_that_is_retried_has_a_client_span_for_each_attempt_and_each_is_a_parent() {
    let cluster = Cluster::start().await;
    let policy = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": "traffic", "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"target": {"kind": "Namespace"}, "retry": {"on": ["5xx"], "attempts": 2}},
    });
    let policy = serde_json::from_value(policy).unwrap();
    cluster.operator.change(|model| model.apply_policy((NAMESPACE.into(), "traffic".into()), policy));
    let pod = cluster.pod(true).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let application = Application::start(&pod, move |stream| fails_once(stream, Arc::clone(&asked)));
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut collector = Collector::start().await;
    trace(&cluster, &[&pod], collector.address, "0%").await;

    let lines = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1\r\n");
    let reply = send(&cluster, service, &lines).await;
    assert_eq!((reply.status, reply.asked("tracestate")), (200, vec!["a=1"]));
    let spans = collector.take(4).await;
    assert!(spans.iter().all(|(_, span)| hex(&span.trace_id) == TRACE && span.trace_state == "a=1"));
    let (client, server) = (of_kind(&spans, SpanKind::Client), of_kind(&spans, SpanKind::Server));
    assert_eq!((client.len(), server.len()), (2, 2));
    for (number, (client, server)) in client.iter().zip(&server).enumerate() {
        assert_eq!(hex(&client.parent_span_id), PARENT, "the application has sent it");
        assert_eq!(server.parent_span_id, client.span_id);
        let (status, resent) = [("503", ""), ("200", "1")][number];
        assert_eq!(text(&client.attributes, "http.response.status_code"), status);
        assert_eq!(text(&server.attributes, "http.response.status_code"), status);
        assert_eq!(text(&client.attributes, "http.request.resend_count"), resent);
        assert_eq!(text(&client.attributes, "server.port"), "80");
        assert_eq!(client.status.is_some(), number == 0, "503 is an error");
        assert_eq!((client.name.as_str(), text(&server.attributes, "url.path").as_str()), ("GET", "/cart"));
    }
    let seen = format!("00-{TRACE}-{}-01", hex(&server[1].span_id));
    assert_eq!(reply.asked("traceparent"), [seen], "the application sees the server span as its parent");
    assert!(!format!("{spans:?}").contains("secret"));
    assert!(
        spans.iter().all(|(name, span)| (*name == pod.uid) == (span.kind == i32::from(SpanKind::Server)))
    );
}

#[tokio::test]
async fn a_request_without_a_parent_begins_a_trace_once_at_its_clients_sidecar() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let echo = Echo::start(&pod, "a");
    let service = cluster.service(Some("http"), &[echo.port()]).await;
    let mut collector = Collector::start().await;
    trace(&cluster, &[&pod], collector.address, "100%").await;
    let reply = send(&cluster, service, "").await;
    let spans = collector.take(2).await;
    let (client, server) = (of_kind(&spans, SpanKind::Client), of_kind(&spans, SpanKind::Server));
    assert!(client[0].parent_span_id.is_empty());
    assert_eq!(server[0].parent_span_id, client[0].span_id);
    assert_eq!(server[0].trace_id, client[0].trace_id);
    let seen = format!("00-{}-{}-03", hex(&server[0].trace_id), hex(&server[0].span_id));
    assert_eq!(
        (reply.asked("traceparent"), reply.asked("tracestate")),
        (vec![seen.as_str()], vec!["ot=th:0"])
    );
}

#[tokio::test]
async fn a_collector_that_refuses_spans_costs_the_spans_and_no_request() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(false).await;
    let echo = Echo::start(&pod, "a");
    let service = cluster.service(Some("http"), &[echo.port()]).await;
    trace(&cluster, &[], listen(Refuser).await, "100%").await;
    assert_eq!(send(&cluster, service, "").await.status, 200);
    within(async {
        while cluster.client.telemetry.spans.counts() != (0, 1) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn b3_goes_out_as_it_came_in_and_names_the_server_span() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let echo = Echo::start(&pod, "a");
    let service = cluster.service(Some("http"), &[echo.port()]).await;
    let mut collector = Collector::start().await;
    trace(&cluster, &[&pod], collector.address, "0%").await;

    let reply = send(&cluster, service, &format!("b3: {TRACE}-{PARENT}-1\r\n")).await;
    let spans = collector.take(2).await;
    let server = hex(&of_kind(&spans, SpanKind::Server)[0].span_id);
    assert_eq!(reply.asked("b3"), [format!("{TRACE}-{server}-1")]);
    assert!(reply.asked("traceparent").is_empty());

    let lines = format!("X-B3-TraceId: {TRACE}\r\nX-B3-SpanId: {PARENT}\r\nX-B3-Sampled: 1\r\n");
    let reply = send(&cluster, service, &lines).await;
    let spans = collector.take(2).await;
    let server = hex(&of_kind(&spans, SpanKind::Server)[0].span_id);
    assert_eq!(
        (reply.asked("x-b3-traceid"), reply.asked("x-b3-spanid")),
        (vec![TRACE], vec![server.as_str()])
    );
    assert_eq!((reply.asked("x-b3-sampled"), reply.asked("b3")), (vec!["1"], vec![]));
}

#[tokio::test]
async fn headers_go_on_untouched_without_a_collector_and_where_a_parent_is_not_recorded() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let echo = Echo::start(&pod, "a");
    let service = cluster.service(Some("http"), &[echo.port()]).await;
    let names = ["traceparent", "tracestate", "b3", "x-b3-sampled"];
    let all = |reply: &Reply| names.map(|name| reply.asked(name).join("|"));
    let unrecorded = [
        [format!("00-{TRACE}-{PARENT}-00").as_str(), "a=1", "", ""].map(str::to_owned),
        ["nonsense", "a=1", "0", ""].map(str::to_owned),
        ["", "", "", "0"].map(str::to_owned),
    ];
    let recorded = [format!("00-{TRACE}-{PARENT}-01").as_str(), "a=1", "", ""].map(str::to_owned);
    let lines = |values: &[String; 4]| {
        let lines = names.iter().zip(values).filter(|(_, value)| !value.is_empty());
        lines.map(|(name, value)| format!("{name}: {value}\r\n")).collect::<String>()
    };
    for values in unrecorded.iter().chain([&recorded]) {
        assert_eq!(&all(&send(&cluster, service, &lines(values)).await), values, "no collector");
    }
    assert_eq!(all(&send(&cluster, service, "").await), [""; 4]);
    let mut collector = Collector::start().await;
    trace(&cluster, &[&pod], collector.address, "100%").await;
    for values in &unrecorded {
        assert_eq!(&all(&send(&cluster, service, &lines(values)).await), values, "not recorded");
    }
    // Each sidecar sends its spans in the order in which requests have ended: those of the others would come first.
    send(&cluster, service, &format!("traceparent: 00-{TRACE}-{LAST}-01\r\n")).await;
    let spans = collector.take(2).await;
    let (client, server) = (of_kind(&spans, SpanKind::Client), of_kind(&spans, SpanKind::Server));
    assert_eq!((client.len(), server.len()), (1, 1));
    assert_eq!(hex(&client[0].parent_span_id), LAST);
    assert_eq!(server[0].parent_span_id, client[0].span_id);
}

/// Answers each request with what is not HTTP.
async fn babbles(mut stream: TcpStream) {
    let mut buffer = Vec::new();
    while matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
        if buffer.ends_with(b"\r\n\r\n") {
            let _ = stream.write_all(b"what?\r\n\r\n").await;
            return;
        }
    }
}

#[tokio::test]
async fn counts_the_access_log_and_the_span_give_one_failure_the_same_reason_and_status() {
    let written = logs::Written::capture();
    let cluster = Cluster::start().await;
    logs::log(&cluster, json!({"accessLog": "Errors"}));
    let pod = logs::pod_that_logs(&cluster, AccessLog::Errors).await;
    let application = Application::start(&pod, babbles);
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut collector = Collector::start().await;
    trace(&cluster, &[&pod], collector.address, "0%").await;
    // Of this test alone: all tests of the process write into one log.
    let id = "1f2e3d4c5b6a79880102030405060708";
    let reply = send(&cluster, service, &format!("traceparent: 00-{id}-{PARENT}-01\r\n")).await;

    let spans = collector.take(2).await;
    let span = of_kind(&spans, SpanKind::Server)[0];
    let of_span = |name: &str| text(&span.attributes, name);
    let line = written.line(id);
    let series = pod.sidecar.as_ref().unwrap().telemetry.all();
    let counted: Vec<_> = series.iter().flat_map(|(_, series)| series.failures()).collect();
    let reason = "UpstreamBadResponse";
    assert_eq!(reply.all("tulle-reason"), [reason]);
    assert_eq!(counted, [(reason, 1)]);
    assert_eq!(line["error.type"], reason);
    assert_eq!((of_span("error.type").as_str(), of_span("tulle.reason").as_str()), (reason, reason));
    assert_eq!(line["http.response.status_code"], reply.status);
    assert_eq!(of_span("http.response.status_code"), reply.status.to_string());
}
