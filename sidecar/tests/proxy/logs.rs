//! Access logs: which requests and connections are logged, and by which sidecar.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tulle_sidecar::config::logs::AccessLog;

use crate::harness::{Application, Cluster, NAMESPACE, Outcome, Pod, http1, within};

/// What all sidecars of this process have written into their access logs since it was first asked for.
#[derive(Clone, Default)]
pub struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    /// Of all tests of this process together: there is one log.
    pub fn capture() -> &'static Self {
        static ALL: OnceLock<Written> = OnceLock::new();
        ALL.get_or_init(|| {
            let all = Self::default();
            let sink = all.clone();
            let lines =
                tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(move || sink.clone());
            let access = Targets::new().with_target("access", LevelFilter::INFO);
            let subscriber = tracing_subscriber::registry().with(access).with(lines);
            tracing::subscriber::set_global_default(subscriber).unwrap();
            all
        })
    }

    /// The line with this text.
    pub fn line(&self, text: &str) -> Value {
        let bytes = self.0.lock().unwrap().clone();
        let all = String::from_utf8(bytes).unwrap();
        let line = all.lines().find(|line| line.contains(text)).expect("it is not logged");
        serde_json::from_str(line).unwrap()
    }
}

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A policy with access logs for all pods.
pub fn log(cluster: &Cluster, telemetry: Value) {
    let policy = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": "logs", "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"target": {"kind": "Namespace"}, "telemetry": telemetry},
    });
    let policy = serde_json::from_value(policy).unwrap();
    cluster.operator.change(|model| model.apply_policy((NAMESPACE.into(), "logs".into()), policy));
}

/// A pod whose sidecar logs so.
pub async fn pod_that_logs(cluster: &Cluster, access_log: AccessLog) -> Pod {
    let pod = cluster.pod(true).await;
    let config = &pod.sidecar.as_ref().unwrap().config;
    within(async {
        while config.access_log() != access_log {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    pod
}

fn lines(pod: &Pod) -> u64 {
    pod.sidecar.as_ref().unwrap().count_of("access_log", "Written")
}

/// Waits for a line that is written when its client may have its answer already.
async fn has_lines(pod: &Pod, count: u64) {
    within(async {
        while lines(pod) < count {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(lines(pod), count);
}

#[tokio::test]
async fn a_denied_request_is_logged_where_errors_are_and_nothing_is_where_the_log_is_off() {
    for (telemetry, access_log, expected) in [
        (json!({"accessLog": "Errors"}), AccessLog::Errors, 1),
        (json!({"accessLog": "Sampled", "sample": "0%"}), AccessLog::Sampled(0), 1),
        (json!({"accessLog": "Disabled"}), AccessLog::Off, 0),
    ] {
        let cluster = Cluster::start().await;
        cluster.policy("Permissive", json!({"allow": [{"to": [{"methods": ["GET"]}]}]}));
        log(&cluster, telemetry);
        let pod = pod_that_logs(&cluster, access_log).await;
        let application = Application::start(&pod, http1::answer_all);
        let service = cluster.service(Some("http"), &[&application.port]).await;
        for (request, outcome) in [(http1::request("GET", 0), 200), (http1::request("POST", 1), 403)] {
            let mut stream = cluster.client.dial(service).await;
            let asked = within(http1::ask(&mut stream, &request, || {})).await;
            assert_eq!(asked, Outcome::Whole(outcome), "{access_log:?}");
        }
        // Its line is written before its client is answered.
        assert_eq!(lines(&pod), expected, "{access_log:?}");
        assert_eq!(cluster.client.count("access_log"), 0, "who calls logs nothing");
    }
}

/// Sends back what comes.
async fn echo(mut stream: TcpStream) {
    let (mut input, mut output) = stream.split();
    let _ = tokio::io::copy(&mut input, &mut output).await;
}

#[tokio::test]
async fn requests_and_opaque_connections_are_logged_once_each_of_clients_with_a_sidecar_and_without() {
    let cluster = Cluster::start().await;
    log(&cluster, json!({"accessLog": "All"}));
    let pod = pod_that_logs(&cluster, AccessLog::All).await;
    let application = Application::start(&pod, http1::answer_all);
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut meshed = cluster.client.dial(service).await;
    assert_eq!(within(http1::ask(&mut meshed, http1::GET, || {})).await, Outcome::Whole(200));
    has_lines(&pod, 1).await;
    let mut plain = TcpStream::connect(application.port.address).await.unwrap();
    assert_eq!(within(http1::ask(&mut plain, http1::GET, || {})).await, Outcome::Whole(200));
    has_lines(&pod, 2).await;
    let echoing = Application::start(&pod, echo);
    let opaque = cluster.service(Some("tcp"), &[&echoing.port]).await;
    let mut stream = cluster.client.dial(opaque).await;
    stream.write_all(b"hello").await.unwrap();
    within(stream.read_exact(&mut [0; 5])).await.unwrap();
    assert_eq!(lines(&pod), 2, "a connection is logged when it has ended");
    drop(stream);
    has_lines(&pod, 3).await;
}
