//! Sends spans to the collector: OTLP over gRPC, without TLS.
//!
//! In: the queue of spans, and where the operator says that they go. Out: batches, each tried again as OTLP wants it, and
//! counts of what became of it. A collector that is away or slow costs spans, and never a request: what does not fit the
//! queue meanwhile is dropped. Runs beside discovery, on its thread, as the user whose connections are not redirected.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http::Uri;
use hyper::client::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tulle_mesh::otlp::ExportTraceServiceRequest;
use tulle_mesh::otlp::trace_service_client::TraceServiceClient;

use super::otlp;
use super::span::Span;
use crate::channel::Channel;
use crate::config::ConfigStore;
use crate::settings::Settings;
use crate::telemetry::{Limited, Telemetry};

/// How long a batch may take, connecting included.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Waits before a batch is sent again, each with jitter. Then it is dropped: the queue is full by then where traffic is.
const RETRIES: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(5), Duration::from_secs(10)];

/// A collector that is away fails every batch.
static FAILURES: Limited = Limited::new(1);

/// Sends spans until `stop`, and then what is left, each batch once.
pub async fn run(
    settings: Arc<Settings>,
    config: Arc<ConfigStore>,
    telemetry: Arc<Telemetry>,
    stop: CancellationToken,
) {
    let queue = &telemetry.spans;
    let mut sender = Sender { settings: &settings, config: &config, connection: None };
    while stop.run_until_cancelled(queue.batch()).await.is_some() {
        let spans = queue.take();
        let count = spans.len() as u64;
        let exported = stop.run_until_cancelled(sender.deliver(spans, &RETRIES)).await.unwrap_or(0);
        queue.settle(exported, count.saturating_sub(exported));
    }
    loop {
        let spans = queue.take();
        let count = spans.len() as u64;
        if count == 0 {
            return;
        }
        let exported = sender.deliver(spans, &[]).await;
        queue.settle(exported, count.saturating_sub(exported));
    }
}

/// Connects to `host:port`; the host is looked up as the pod looks up names.
async fn connect(collector: &str) -> Result<Channel> {
    let stream = TcpStream::connect(collector).await;
    let stream = stream.with_context(|| format!("cannot reach {collector}"))?;
    stream.set_nodelay(true)?;
    let handshake = Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await;
    let (send, connection) = handshake.with_context(|| format!("{collector} does not speak HTTP/2"))?;
    tokio::spawn(connection);
    Ok(Channel(send))
}

/// Why a batch was not taken.
struct Failed {
    why: String,
    /// It may be sent once more.
    again: bool,
}

struct Sender<'a> {
    settings: &'a Settings,
    config: &'a ConfigStore,
    /// To this collector.
    connection: Option<(Arc<str>, Channel)>,
}

impl Sender<'_> {
    /// Sends a batch. Returns how many of its spans were taken. `retries`: waits before it is sent again.
    async fn deliver(&mut self, spans: Vec<Span>, retries: &[Duration]) -> u64 {
        // Tracing was turned off meanwhile.
        let Some(tracing) = self.config.tracing() else { return 0 };
        let count = spans.len() as u64;
        let request = otlp::request(self.settings, &tracing, &self.config.place(), spans);
        let mut retries = retries.iter();
        loop {
            let failed = match self.once(&tracing.collector, request.clone()).await {
                Ok(rejected) => return count.saturating_sub(rejected),
                Err(failed) => failed,
            };
            let wait = retries.next().filter(|_| failed.again);
            let Some(wait) = wait else {
                if let Some(suppressed) = FAILURES.allow() {
                    let collector = &*tracing.collector;
                    tracing::warn!(collector, spans = count, suppressed, "dropped spans: {}", failed.why);
                }
                return 0;
            };
            sleep(wait.mul_f64(0.5 + fastrand::f64())).await;
        }
    }

    /// Sends a batch once. Returns how many of its spans the collector has refused.
    async fn once(
        &mut self,
        collector: &Arc<str>,
        request: ExportTraceServiceRequest,
    ) -> Result<u64, Failed> {
        let sent = match timeout(TIMEOUT, self.exchange(collector, request)).await {
            Ok(sent) => sent,
            Err(_) => {
                Err(Failed { why: format!("no answer of {collector} within {TIMEOUT:?}"), again: true })
            }
        };
        if sent.is_err() {
            // The next one may lead to another pod of the collector.
            self.connection = None;
        }
        sent
    }

    async fn exchange(
        &mut self,
        collector: &Arc<str>,
        request: ExportTraceServiceRequest,
    ) -> Result<u64, Failed> {
        let origin: Uri = format!("http://{collector}")
            .parse()
            .map_err(|_| Failed { why: format!("{collector} is no address"), again: false })?;
        let connection = match &self.connection {
            Some((known, connection)) if known == collector && !connection.0.is_closed() => {
                connection.clone()
            }
            _ => {
                let opened = connect(collector).await;
                let opened = opened.map_err(|error| Failed { why: format!("{error:#}"), again: true })?;
                self.connection = Some((Arc::clone(collector), opened.clone()));
                opened
            }
        };
        let answer = TraceServiceClient::with_origin(connection, origin).export(request).await;
        let answer = answer.map_err(|status| Failed {
            why: format!("{collector}: {}: {}", status.code(), status.message()),
            again: may_try_again(&status),
        })?;
        // What was refused is not sent again, as OTLP demands: it would be refused again, and the rest taken twice.
        let Some(partial) = answer.into_inner().partial_success else { return Ok(0) };
        if !partial.error_message.is_empty()
            && let Some(suppressed) = FAILURES.allow()
        {
            let (refused, why) = (partial.rejected_spans, partial.error_message);
            tracing::warn!(%collector, refused, why, suppressed, "the collector says something about spans");
        }
        Ok(u64::try_from(partial.rejected_spans).unwrap_or(0))
    }
}

/// Whether OTLP allows a batch to be sent again: the collector has said so by its code, or the connection broke.
/// RESOURCE_EXHAUSTED only does with details that are not read here.
fn may_try_again(status: &tonic::Status) -> bool {
    let may = matches!(
        status.code(),
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unavailable
            | Code::DataLoss
    );
    may || status.source().is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_be_sent_again_is() {
        for (code, again) in [
            (Code::Unavailable, true),
            (Code::Aborted, true),
            (Code::DataLoss, true),
            (Code::DeadlineExceeded, true),
            (Code::ResourceExhausted, false),
            (Code::InvalidArgument, false),
            (Code::Unauthenticated, false),
            (Code::Unimplemented, false),
            (Code::Internal, false),
        ] {
            assert_eq!(may_try_again(&tonic::Status::new(code, "")), again, "{code:?}");
        }
        let broken = tonic::Status::from_error(std::io::Error::other("broken").into());
        assert!(may_try_again(&broken), "the connection broke");
    }
}
