//! One line for each request and each opaque connection at this pod, as far as a MeshPolicy asks for that.
//!
//! In: who called, the [`Call`], and how it ended. Out: a line of the log with the names of OpenTelemetry, or nothing.
//! A line never has a header, a credential or a query string. What is not logged costs one atomic load.

use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::counted_event::AccessLog;
use tulle_mesh::trace::parse_traceparent;

use crate::admit::Client;
use crate::call::{Call, Ended, Statuses};
use crate::error::Failure;
use crate::grpc::is_server_error;
use crate::http1::{known_method, logged_path, version};
use crate::telemetry::{Limited, Telemetry};
use crate::worker::Worker;

/// Lines of this sidecar in a second. At 0.4 KB each that is a fifth of a megabyte per second.
static LIMIT: Limited = Limited::new(500);

/// What is written about a request.
#[derive(Debug, PartialEq)]
struct Line<'a> {
    method: &'static str,
    path: Option<&'a str>,
    version: &'static str,
    status: Option<u16>,
    grpc_status: Option<u16>,
    bytes: (u64, u64),
    duration_ms: f64,
    error: Option<&'static str>,
    trace_id: Option<&'a str>,
}

/// Logs a request, if such requests are logged. To be called before its client is answered, where that is still to be
/// done: whoever has the answer finds the line.
pub(super) fn request(worker: &Worker, client: &Client, call: &Call<'_>, ended: &Ended) {
    let access_log = worker.config.access_log();
    if access_log.takes(is_error(ended), || fastrand::u32(..10_000)) && may_write(&worker.telemetry) {
        write(client, &Line::of(call, ended, call.since.elapsed()));
    }
}

/// Logs a connection whose content is opaque and which has ended, if such connections are logged. `bytes`: from the
/// client, and to it.
pub(super) fn connection(
    worker: &Worker,
    client: &Client,
    since: Instant,
    failure: Option<&Failure>,
    bytes: (u64, u64),
) {
    let access_log = worker.config.access_log();
    if access_log.takes(failure.is_some(), || fastrand::u32(..10_000)) && may_write(&worker.telemetry) {
        write_connection(client, since.elapsed(), failure, bytes);
    }
}

/// Whether the server, the mesh or a policy kept a request from being served. What the application itself refuses its
/// client (4xx) is an answer like any other.
fn is_error(ended: &Ended) -> bool {
    match ended.result {
        Err(_) => true,
        Ok(status) => status >= 500 || ended.grpc_status.is_some_and(is_server_error),
    }
}

/// Whether there is room for a line in this second. Counts it, and says at most once a second how many had none.
fn may_write(telemetry: &Telemetry) -> bool {
    let Some(dropped) = LIMIT.allow() else {
        telemetry.event(AccessLog::Dropped);
        return false;
    };
    if dropped > 0 {
        tracing::warn!(target: "access", dropped, "access log lines were dropped: there were more than 500 in a second");
    }
    telemetry.event(AccessLog::Written);
    true
}

impl<'a> Line<'a> {
    fn of(call: &'a Call<'_>, ended: &Ended, took: Duration) -> Self {
        let (method, target) = call.head.request_line();
        let Statuses { http: status, grpc: grpc_status } = call.statuses(ended);
        Self {
            method: known_method(method).unwrap_or("_OTHER"),
            path: logged_path(target),
            version: version(&call.head, call.travels),
            status,
            grpc_status,
            bytes: ended.bytes,
            duration_ms: millis(took),
            error: ended.result.as_ref().err().map(Failure::name),
            trace_id: call.head.header("traceparent").and_then(|value| trace_id(value)),
        }
    }
}

fn write(client: &Client, line: &Line<'_>) {
    let Origin { id, address, port } = Origin::of(client);
    tracing::info!(
        target: "access",
        {
        "http.request.method" = line.method,
        "url.path" = line.path,
        "network.protocol.name" = "http",
        "network.protocol.version" = line.version,
        "http.response.status_code" = line.status,
        "rpc.grpc.status_code" = line.grpc_status,
        "http.request.body.size" = line.bytes.0,
        "http.response.body.size" = line.bytes.1,
        "duration_ms" = line.duration_ms,
        "error.type" = line.error,
        "client.address" = %address,
        "tulle.client.id" = id,
        "server.port" = port,
        "trace_id" = line.trace_id,
        },
        "request"
    );
}

fn write_connection(client: &Client, took: Duration, failure: Option<&Failure>, bytes: (u64, u64)) {
    let Origin { id, address, port } = Origin::of(client);
    tracing::info!(
        target: "access",
        {
        "network.transport" = "tcp",
        "tulle.connection.received_bytes" = bytes.0,
        "tulle.connection.sent_bytes" = bytes.1,
        "duration_ms" = millis(took),
        "error.type" = failure.map(Failure::name),
        "client.address" = %address,
        "tulle.client.id" = id,
        "server.port" = port,
        },
        "connection"
    );
}

/// Who called, and which port of the pod.
struct Origin<'a> {
    /// Whom its certificate names; `None` for plain connections.
    id: Option<&'a str>,
    address: IpAddr,
    port: u16,
}

impl<'a> Origin<'a> {
    fn of(client: &'a Client) -> Self {
        let (address, port) = (client.address.ip(), client.destination.port());
        Self { id: client.identity_text(), address, port }
    }
}

/// The trace of a `traceparent`, if that is valid.
fn trace_id(value: &[u8]) -> Option<&str> {
    let value = value.trim_ascii();
    parse_traceparent(value)?;
    // Its place is the same in every version.
    std::str::from_utf8(value.get(3..35)?).ok()
}

/// To a microsecond.
fn millis(took: Duration) -> f64 {
    (took.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::SocketAddr;
    use std::sync::{Arc, Mutex};

    use bytes::BytesMut;
    use serde_json::{Value, json};
    use tokio::net::{TcpListener, TcpStream};
    use tulle_mesh::identity::WorkloadId;

    use super::*;
    use crate::http1::conn::split;
    use crate::http1::head::parse_request;
    use crate::http1::{Reader, Writer};

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    /// What is logged, as bytes.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The text of what is logged meanwhile, as the sidecar's log has it.
    fn logged(log: impl FnOnce()) -> String {
        let written = Written::default();
        let sink = written.clone();
        let subscriber =
            tracing_subscriber::fmt().json().flatten_event(true).with_writer(move || sink.clone()).finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn read(line: &str) -> Value {
        let mut value: Value = serde_json::from_str(line).unwrap();
        value.as_object_mut().unwrap().remove("timestamp").unwrap();
        value
    }

    async fn halves() -> (Reader, Writer) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        split(stream, BytesMut::new())
    }

    fn client() -> Client {
        Client::plain(SocketAddr::from(([10, 1, 2, 3], 4444)), SocketAddr::from(([10, 1, 0, 9], 8080)))
    }

    fn meshed() -> Client {
        client().with_identity(WorkloadId::new("cluster.local", "shop", "web"))
    }

    fn answered(status: u16, grpc_status: Option<u16>) -> Ended {
        Ended {
            result: Ok(status),
            grpc_status,
            bytes: (7, 42),
            answered: true,
            client_reusable: true,
            ..Ended::failed(Failure::ClientGone)
        }
    }

    /// The line of a request with this head that ended so, after 1.5 ms.
    async fn line_of(client: &Client, head: &str, ended: &Ended) -> String {
        let (mut reader, mut writer) = halves().await;
        let head = parse_request(&mut BytesMut::from(head.as_bytes())).unwrap().unwrap();
        let call = Call::http1(head, &mut reader, &mut writer);
        logged(|| write(client, &Line::of(&call, ended, Duration::from_micros(1_500))))
    }

    #[tokio::test]
    async fn a_request_is_logged_under_the_names_of_opentelemetry() {
        let head = format!(
            "GET /cart/7?token=s3cret HTTP/1.1\r\nhost: web\r\ntraceparent: 00-{TRACE}-00f067aa0ba902b7-01\r\n\r\n"
        );
        let line = line_of(&meshed(), &head, &answered(200, None)).await;
        let expected = json!({
            "level": "INFO", "target": "access", "message": "request",
            "http.request.method": "GET", "url.path": "/cart/7",
            "network.protocol.name": "http", "network.protocol.version": "1.1",
            "http.response.status_code": 200, "http.request.body.size": 7, "http.response.body.size": 42,
            "duration_ms": 1.5, "client.address": "10.1.2.3", "server.port": 8080, "trace_id": TRACE,
            "tulle.client.id": "spiffe://cluster.local/ns/shop/sa/web",
        });
        assert_eq!(read(&line), expected);
    }

    #[tokio::test]
    async fn a_request_that_was_denied_is_logged_with_its_reason_and_the_status_that_its_client_gets() {
        let head = "DELETE / HTTP/1.1\r\nhost: web\r\n\r\n";
        let line = read(&line_of(&client(), head, &Ended::failed(Failure::PolicyDenied)).await);
        assert_eq!(
            (&line["error.type"], &line["http.response.status_code"]),
            (&json!("PolicyDenied"), &json!(403))
        );
        assert_eq!(line.get("tulle.client.id"), None, "nobody knows who it is");
        let gone = read(&line_of(&client(), head, &Ended::failed(Failure::ClientGone)).await);
        assert_eq!(gone["error.type"], "ClientGone");
        assert_eq!(gone.get("http.response.status_code"), None, "nobody was answered");
    }

    #[tokio::test]
    async fn queries_headers_and_credentials_are_never_written() {
        let secrets = "authorization: Bearer s3cret\r\ncookie: s=s3cret\r\nx-api-key: s3cret\r\n";
        for (method, target, path) in [
            ("GET", "/a?token=s3cret", "/a"),
            ("GET", "/a?x=/s3cret", "/a"),
            ("GET", "http://web/a?token=s3cret", "/a"),
            ("OPTIONS", "*", "*"),
        ] {
            let head = format!("{method} {target} HTTP/1.1\r\nhost: web\r\n{secrets}\r\n");
            let line = line_of(&client(), &head, &answered(200, None)).await;
            assert!(!line.contains("s3cret"), "{line}");
            assert_eq!(read(&line)["url.path"], path, "{target}");
        }
    }

    #[tokio::test]
    async fn a_method_that_nobody_knows_is_not_written() {
        let line = line_of(&client(), "S3CRET / HTTP/1.1\r\nhost: web\r\n\r\n", &answered(405, None)).await;
        assert_eq!(read(&line)["http.request.method"], "_OTHER");
        assert!(!line.contains("S3CRET"));
    }

    #[test]
    fn failures_and_errors_of_the_server_are_errors_and_answers_to_the_client_are_not() {
        for (ended, expected) in [
            (answered(200, None), false),
            (answered(404, None), false),
            (answered(503, None), true),
            (answered(200, Some(0)), false),
            // NOT_FOUND, UNAVAILABLE.
            (answered(200, Some(5)), false),
            (answered(200, Some(14)), true),
            (Ended::failed(Failure::PolicyDenied), true),
            (Ended::failed(Failure::ClientGone), true),
        ] {
            assert_eq!(is_error(&ended), expected, "{ended:?}");
        }
    }

    #[test]
    fn a_connection_is_logged_with_its_bytes_and_how_long_it_lasted() {
        let log = |failure: Option<&Failure>| {
            logged(|| write_connection(&meshed(), Duration::from_secs(2), failure, (10, 20)))
        };
        let expected = json!({
            "level": "INFO", "target": "access", "message": "connection", "network.transport": "tcp",
            "tulle.connection.received_bytes": 10, "tulle.connection.sent_bytes": 20, "duration_ms": 2000.0,
            "client.address": "10.1.2.3", "server.port": 8080,
            "tulle.client.id": "spiffe://cluster.local/ns/shop/sa/web",
        });
        assert_eq!(read(&log(None)), expected);
        assert_eq!(read(&log(Some(&Failure::PolicyDenied)))["error.type"], "PolicyDenied");
    }

    #[test]
    fn a_trace_is_named_only_by_a_valid_traceparent() {
        let parent = "00f067aa0ba902b7";
        for valid in [
            format!("00-{TRACE}-{parent}-01"),
            format!(" 00-{TRACE}-{parent}-00 "),
            format!("cc-{TRACE}-{parent}-01-what-comes-later"),
        ] {
            assert_eq!(trace_id(valid.as_bytes()), Some(TRACE), "{valid}");
        }
        for invalid in [
            String::new(),
            TRACE.to_owned(),
            format!("ff-{TRACE}-{parent}-01"),
            format!("00-{TRACE}-{parent}"),
            format!("00-{TRACE}-{parent}-01-more"),
            format!("00-{}-{parent}-01", TRACE.to_uppercase()),
            format!("00-{}-{parent}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}x-{parent}-01", &TRACE[1..]),
        ] {
            assert_eq!(trace_id(invalid.as_bytes()), None, "{invalid}");
        }
    }
}
