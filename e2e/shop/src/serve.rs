//! A service of the shop.

use std::fs::File;
use std::io::{Error, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::body::Incoming;
use hyper::header::HeaderValue;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use hyper_util::server::graceful::GracefulShutdown;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};

/// Serves requests.
#[derive(clap::Parser)]
pub struct Serve {
    /// Name of the service, included in responses.
    #[arg(long)]
    name: String,
    /// Version of the service, included in responses.
    #[arg(long, default_value = "v1")]
    version: String,
    /// Port to listen on.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// `host:port` of a service to call for each request.
    #[arg(long)]
    next: Option<String>,
    /// Percentage of requests that get an error status.
    #[arg(long, default_value_t = 0)]
    errors: u64,
    /// The error status.
    #[arg(long, default_value_t = 500)]
    status: u16,
    /// Percentage of requests whose connection is closed without a response.
    #[arg(long, default_value_t = 0)]
    closes: u64,
    /// Milliseconds to wait before a response.
    #[arg(long, default_value_t = 0)]
    delay: u64,
    /// Percentage of requests whose response is delayed.
    #[arg(long, default_value_t = 100)]
    delayed: u64,
    /// On SIGTERM, exits at once instead of completing open requests.
    #[arg(long)]
    abrupt: bool,
    /// File to which the sequence number of every processed POST is appended.
    #[arg(long)]
    ledger: Option<PathBuf>,
}

struct Service {
    settings: Serve,
    /// Name of the pod, included in responses.
    pod: String,
    requests: AtomicU64,
    /// POSTs among them.
    posts: AtomicU64,
    stopping: AtomicBool,
}

impl Serve {
    /// Serves until SIGTERM, then completes open requests.
    pub async fn run(self) -> anyhow::Result<()> {
        let listener = TcpListener::bind(("::", self.port)).await.or(bind_v4(self.port).await)?;
        let abrupt = self.abrupt;
        let service = Arc::new(Service {
            settings: self,
            pod: pod_name(),
            requests: AtomicU64::new(0),
            posts: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
        });
        let graceful = GracefulShutdown::new();
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted?;
                    stream.set_nodelay(true)?;
                    let service = Arc::clone(&service);
                    let handler = service_fn(move |request| {
                        let service = Arc::clone(&service);
                        // After an error of the handler, hyper closes the connection without a response.
                        async move { service.answer(request).await.ok_or_else(|| Error::other("closed on purpose")) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), handler);
                    let watched = graceful.watch(connection);
                    tokio::spawn(async move { drop(watched.await) });
                }
                _ = terminate.recv() => break,
            }
        }
        service.stopping.store(true, Ordering::Relaxed);
        if abrupt {
            return Ok(());
        }
        drop(listener);
        tokio::select! {
            () = graceful.shutdown() => {}
            () = tokio::time::sleep(Duration::from_secs(25)) => {}
        }
        Ok(())
    }
}

async fn bind_v4(port: u16) -> std::io::Result<TcpListener> {
    TcpListener::bind(("0.0.0.0", port)).await
}

/// The name of the pod, which is its host name.
fn pod_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned()
}

/// Whether this request is one of `percentage`. Spread evenly, so that it holds for exactly that many of 100
/// consecutive requests.
fn is_one_of(percentage: u64, number: u64) -> bool {
    percentage > 0 && number * percentage % 100 + percentage >= 100
}

impl Service {
    /// The response, or none where the connection is to be closed instead.
    async fn answer(&self, request: Request<Incoming>) -> Option<Response<Full<Bytes>>> {
        if request.uri().path() == "/ready" {
            let ok = !self.stopping.load(Ordering::Relaxed);
            let status = if ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            return Some(respond(status, "ready".into()));
        }
        if request.uri().path() == "/count" {
            let counted = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let counts = json!({"requests": counted(&self.requests), "posts": counted(&self.posts)});
            return Some(respond(StatusCode::OK, counts.to_string()));
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        self.posts.fetch_add(u64::from(request.method() == Method::POST), Ordering::Relaxed);
        if is_one_of(self.settings.closes, number) {
            return None;
        }
        Some(self.carry_out(request, number).await)
    }

    async fn carry_out(&self, request: Request<Incoming>, number: u64) -> Response<Full<Bytes>> {
        let seen = request.headers().contains_key("x-show").then(|| seen(&request));
        let client =
            request.headers().get("tulle-client-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
        let carried_out =
            (request.method() == Method::POST).then(|| request.uri().query().unwrap_or("").to_owned());
        let trace = trace_of(&request);
        let body = request.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or(0);
        if self.settings.delay > 0 && is_one_of(self.settings.delayed, number) {
            tokio::time::sleep(Duration::from_millis(self.settings.delay)).await;
        }
        if let (Some(ledger), Some(sequence)) = (&self.settings.ledger, carried_out)
            && let Err(error) = append_line(ledger, &sequence)
        {
            return respond(StatusCode::INTERNAL_SERVER_ERROR, format!("{}: {error}", ledger.display()));
        }
        if is_one_of(self.settings.errors, number) {
            let status =
                StatusCode::from_u16(self.settings.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return respond(status, "broken on purpose".into());
        }
        let next = match &self.settings.next {
            Some(next) => match self.next(next, &trace).await {
                Ok(next) => next,
                Err(error) => return respond(StatusCode::BAD_GATEWAY, format!("{next}: {error:#}")),
            },
            None => serde_json::Value::Null,
        };
        let answer = json!({
            "service": self.settings.name, "version": self.settings.version, "pod": self.pod, "client": client,
            "bytes": body, "next": next, "seen": seen,
        });
        respond(StatusCode::OK, answer.to_string())
    }

    async fn next(&self, address: &str, trace: &[(&str, HeaderValue)]) -> anyhow::Result<serde_json::Value> {
        let Answer { status, body, .. } = get(address, "/", trace).await?;
        anyhow::ensure!(status.is_success(), "{status} {}", String::from_utf8_lossy(&body).trim());
        Ok(serde_json::from_slice(&body)?)
    }
}

/// The headers that say to which trace a request belongs. Whoever serves it forwards them with the requests that it makes
/// for it: a sidecar cannot know which belong together.
fn trace_of(request: &Request<Incoming>) -> Vec<(&'static str, HeaderValue)> {
    let values =
        |name: &'static str| request.headers().get_all(name).iter().map(move |value| (name, value.clone()));
    ["traceparent", "tracestate"].into_iter().flat_map(values).collect()
}

/// A request as it arrived, for clients that ask with the header `x-show`. Values of repeated headers are joined.
fn seen(request: &Request<Incoming>) -> serde_json::Value {
    let mut headers = serde_json::Map::new();
    for name in request.headers().keys() {
        let values = request.headers().get_all(name).iter();
        let values: Vec<_> = values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
        headers.insert(name.to_string(), values.join(",").into());
    }
    json!({"method": request.method().as_str(), "target": request.uri().to_string(), "headers": headers})
}

/// Appends a line in one write, so that lines of several pods do not interleave.
fn append_line(ledger: &Path, line: &str) -> std::io::Result<()> {
    File::options().create(true).append(true).open(ledger)?.write_all(format!("{line}\n").as_bytes())
}

/// A response to [`get`].
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The header `location`.
    pub location: Option<String>,
    /// The body.
    pub body: Bytes,
}

/// Sends a GET request to `host:port`, with headers as names and values.
///
/// # Errors
/// When there is no response.
pub async fn get(address: &str, path: &str, headers: &[(&str, HeaderValue)]) -> anyhow::Result<Answer> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::get(path).header("host", address);
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let response = send.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let location = response.headers().get("location").and_then(|to| to.to_str().ok()).map(str::to_owned);
    Ok(Answer { status: response.status(), location, body: response.into_body().collect().await?.to_bytes() })
}

fn respond(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}
