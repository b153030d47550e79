//! Kubelet's probes, rewritten by the webhook: kubelet asks this port, and the probe is carried out
//! from within the pod, where no policy stands between it and the application.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Uri};
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::settings::Settings;

/// A probe as the webhook found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// The path that kubelet asks here, `/CONTAINER/KIND`.
    pub path: String,
    /// What it stands for.
    pub check: Check,
    /// Seconds after which it has failed.
    pub timeout_seconds: u64,
}

/// What a probe checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Check {
    /// An HTTP GET; 200 to 399 is well.
    Http {
        /// The application's port.
        port: u16,
        /// Path and query.
        path: String,
        /// Additional headers.
        headers: Vec<(String, String)>,
        /// TLS, whose certificate is not verified (as kubelet does).
        tls: bool,
    },
    /// A connection.
    Tcp {
        /// The application's port.
        port: u16,
    },
    /// The gRPC health protocol.
    Grpc {
        /// The application's port.
        port: u16,
        /// The service that is asked for.
        service: String,
    },
}

/// Serves for ever.
pub async fn serve(settings: Arc<Settings>, listener: TcpListener) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of file descriptors, say: waiting a little lets others close.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let settings = Arc::clone(&settings);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let settings = Arc::clone(&settings);
                async move { Ok::<_, Infallible>(answer(&settings, &request).await) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(settings: &Settings, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let Some(probe) = settings.probes.iter().find(|probe| probe.path == path) else {
        return text(StatusCode::NOT_FOUND, "no such probe");
    };
    let host = settings.pod_ips.first().map_or_else(|| "127.0.0.1".to_owned(), ToString::to_string);
    let limit = Duration::from_secs(probe.timeout_seconds.max(1));
    match timeout(limit, carry_out(&probe.check, &host)).await {
        Ok(Ok(())) => text(StatusCode::OK, "ok"),
        Ok(Err(error)) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
        Err(_) => text(StatusCode::GATEWAY_TIMEOUT, "the application did not answer in time"),
    }
}

async fn carry_out(check: &Check, host: &str) -> anyhow::Result<()> {
    match check {
        Check::Tcp { port } => {
            TcpStream::connect((host, *port)).await?;
            Ok(())
        }
        Check::Http { port, path, headers, tls } => http_get(host, *port, path, headers, *tls).await,
        Check::Grpc { port, service } => grpc_health(host, *port, service).await,
    }
}

async fn http_get(
    host: &str,
    port: u16,
    path: &str,
    headers: &[(String, String)],
    tls: bool,
) -> anyhow::Result<()> {
    anyhow::ensure!(!tls, "HTTPS probes are carried out by kubelet itself");
    let stream = TcpStream::connect((host, port)).await?;
    let (mut send, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let mut request = Request::get(path).body(Empty::<Bytes>::new())?;
    request.headers_mut().insert(http::header::HOST, HeaderValue::try_from(authority(host, port))?);
    request.headers_mut().insert(http::header::USER_AGENT, HeaderValue::from_static("kube-probe/tulle"));
    for (name, value) in headers {
        request.headers_mut().insert(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    let status = send.send_request(request).await?.status();
    anyhow::ensure!(status.is_success() || status.is_redirection(), "the application answered {status}");
    Ok(())
}

/// An address as it stands in a URI.
fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// `grpc.health.v1.Health/Check`: the request is one string field, the answer one enum.
async fn grpc_health(host: &str, port: u16, service: &str) -> anyhow::Result<()> {
    use http_body_util::BodyExt as _;
    let stream = TcpStream::connect((host, port)).await?;
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    // One byte of length is enough for less than 128.
    let length = u8::try_from(service.len()).ok().filter(|length| *length < 126);
    let length = length.ok_or_else(|| anyhow::anyhow!("the service's name is too long"))?;
    let mut message = Vec::from([0, 0, 0, 0, 0]);
    if length > 0 {
        message = Vec::from([0, 0, 0, 0, length.saturating_add(2), 0x0a, length]);
        message.extend_from_slice(service.as_bytes());
    }
    let uri: Uri = format!("http://{}/grpc.health.v1.Health/Check", authority(host, port)).parse()?;
    let request = Request::post(uri)
        .header(http::header::CONTENT_TYPE, "application/grpc")
        .header(http::header::TE, "trailers")
        .body(Full::new(Bytes::from(message)))?;
    let answer = send.send_request(request).await?.into_body().collect().await?;
    let status = answer.trailers().and_then(|t| t.get("grpc-status")).map(|v| v.as_bytes().to_vec());
    anyhow::ensure!(status.as_deref() == Some(b"0"), "the application answered grpc-status {status:?}");
    // Five bytes of prefix, then field 1 (status) = 1 (SERVING).
    anyhow::ensure!(answer.to_bytes().get(5..7) == Some(&[0x08, 0x01]), "the application is not SERVING");
    Ok(())
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = status;
    response
}
