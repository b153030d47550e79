//! Kubelet's probes, which the webhook has moved to a port of the sidecar.
//!
//! In: kubelet's request for `/CONTAINER/KIND`. Out: the result of that probe, carried out from within the pod,
//! where no policy stands between it and the application. Every probe must succeed exactly when kubelet's own
//! would. Never decides how often a probe may fail: that stays with kubelet.
//!
//! ```text
//!   http_get  httpGet: redirects, headers, TLS
//!   grpc      grpc: the health service
//!   report    log lines about results that have changed
//!   url       URLs as Go, and so kubelet, reads them
//! ```

mod grpc;
mod http_get;
mod report;
mod url;

use std::borrow::Cow;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::USER_AGENT;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tulle_mesh::health::health_check_response::ServingStatus;

use self::http_get::HttpGet;
use self::report::{Kind, Pending, Watched};
pub use self::url::UrlError;
use crate::app_waiting::AppWaiting;
use crate::serve;

/// A probe as the webhook found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// The path that kubelet requests here, `/CONTAINER/KIND`.
    pub path: String,
    /// The check that the pod's author wrote.
    pub check: Check,
    /// Seconds after which the probe has failed.
    pub timeout_seconds: u64,
}

/// What a probe checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Check {
    /// An HTTP GET that must be answered with 200 to 399.
    Http {
        /// The application's port.
        port: u16,
        /// Path and query, as the pod's author wrote them.
        path: String,
        /// Additional headers; a name may be repeated.
        headers: Vec<(String, String)>,
        /// TLS. The certificate is not verified, as with kubelet.
        tls: bool,
    },
    /// A TCP connection that must be accepted.
    Tcp {
        /// The application's port.
        port: u16,
    },
    /// A call of the gRPC health service that must be answered with SERVING.
    Grpc {
        /// The application's port.
        port: u16,
        /// The service that is checked; empty: the whole server.
        service: String,
    },
}

impl Check {
    /// The application's port.
    fn port(&self) -> u16 {
        match self {
            Self::Http { port, .. } | Self::Tcp { port } | Self::Grpc { port, .. } => *port,
        }
    }
}

/// Why a probe failed without an HTTP status of the application.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The application does not listen.
    #[error("connect to {address}: {source}")]
    Connect {
        /// The pod and the application's port.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The application does not speak TLS there.
    #[error("TLS handshake with {address}: {source}")]
    Tls {
        /// The pod and the application's port.
        address: SocketAddr,
        /// What rustls says.
        source: io::Error,
    },
    /// TLS could not be configured.
    #[error("TLS configuration: {0}")]
    TlsConfig(rustls::Error),
    /// The application's answer is not HTTP, or broke off.
    #[error("GET {url}: {source}")]
    Http {
        /// What was requested.
        url: String,
        /// What hyper says.
        source: hyper::Error,
    },
    /// The path of the probe, or a redirect, cannot be requested.
    #[error("URL {url:?}: {source}")]
    Url {
        /// As it was written.
        url: String,
        /// What is wrong with it.
        source: UrlError,
    },
    /// A request target that HTTP does not allow.
    #[error("request target {target:?}: {source}")]
    Target {
        /// Path and query.
        target: String,
        /// What is wrong with it.
        source: http::uri::InvalidUri,
    },
    /// The probe has a header that cannot be sent.
    #[error("header {name:?}: {source}")]
    HeaderName {
        /// As it was written.
        name: String,
        /// What is wrong with it.
        source: http::header::InvalidHeaderName,
    },
    /// The probe has a header that cannot be sent.
    #[error("value of header {name}: {source}")]
    HeaderValue {
        /// The header.
        name: String,
        /// What is wrong with its value.
        source: http::header::InvalidHeaderValue,
    },
    /// The application redirects in circles.
    #[error("stopped after {} redirects", http_get::MAX_REQUESTS)]
    TooManyRedirects,
    /// The health service answered with an error.
    #[error("health check: {}: {}", .0.code(), .0.message())]
    Grpc(tonic::Status),
    /// The health service says that the service does not serve.
    #[error("service {service:?} is {}, expected SERVING", .status.as_str_name())]
    NotServing {
        /// The service that was checked.
        service: String,
        /// Its status.
        status: ServingStatus,
    },
}

/// Answers kubelet for as long as the sidecar runs. `pod`: where the application listens. `app_waiting` knows for whom
/// the application has no answer yet.
pub async fn serve(probes: Vec<Probe>, pod: IpAddr, app_waiting: Arc<AppWaiting>, listener: TcpListener) {
    let longest = probes.iter().map(limit_of).max().unwrap_or_default();
    let probes: Arc<[Watched]> = probes.into_iter().map(Watched::new).collect();
    let handler = move |request: Request<Incoming>| {
        let (probes, app_waiting) = (Arc::clone(&probes), Arc::clone(&app_waiting));
        async move { answer(&probes, pod, &app_waiting, &request).await }
    };
    serve::http(listener, serve::IDLE_TIMEOUT + longest, handler).await;
}

fn limit_of(probe: &Probe) -> Duration {
    Duration::from_secs(probe.timeout_seconds.max(1))
}

async fn answer(
    probes: &[Watched],
    pod: IpAddr,
    app_waiting: &Arc<AppWaiting>,
    request: &Request<Incoming>,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    let Some(watched) = probes.iter().find(|watched| watched.probe.path == path) else {
        return text(StatusCode::NOT_FOUND, "no such probe");
    };
    let probe = &watched.probe;
    // Kubelet's own, with its version: an application may tell probes from others by it.
    let user_agent = request.headers().get(USER_AGENT).cloned();
    let user_agent = user_agent.unwrap_or(HeaderValue::from_static("kube-probe/tulle"));
    // A connection of its own: an application that serves one at a time may be busy with one that is kept.
    let _waiting = app_waiting.begin_at(Some(probe.check.port()));
    let pending = Pending::new(watched, limit_of(probe));
    let verdict = judge(timeout(limit_of(probe), carry_out(&probe.check, pod, &user_agent)).await);
    pending.end(verdict.kind, &verdict.reason);
    text(verdict.status, &verdict.reason)
}

/// The status is the application's, where it answered HTTP.
async fn carry_out(check: &Check, pod: IpAddr, user_agent: &HeaderValue) -> Result<StatusCode, ProbeError> {
    match check {
        Check::Http { port, path, headers, tls } => {
            let scheme = if *tls { "https" } else { "http" };
            let address = SocketAddr::new(pod, *port);
            http_get::get(&HttpGet { scheme, address, path, headers, user_agent }).await
        }
        Check::Tcp { port } => {
            let address = SocketAddr::new(pod, *port);
            let connected = connect_from_loopback(address).await;
            connected.map_err(|source| ProbeError::Connect { address, source })?;
            Ok(StatusCode::OK)
        }
        Check::Grpc { port, service } => {
            grpc::check(SocketAddr::new(pod, *port), service, user_agent).await?;
            Ok(StatusCode::OK)
        }
    }
}

/// Connects to an address of the pod from loopback. A server that blocks clients which connect and say nothing (MySQL
/// and MariaDB, after `max_connect_errors`) would block the pod's own address with this probe, and all clients come from
/// that address through the sidecar; loopback it does not block. What is dialled is still the pod's address, so a server
/// that listens on 127.0.0.1 only fails its probe, as with kubelet. A kernel that does not allow this (gVisor's, perhaps)
/// gets a connection from the pod's address.
async fn connect_from_loopback(address: SocketAddr) -> io::Result<TcpStream> {
    let connected = match bound_to_loopback(address) {
        Ok(socket) => socket.connect(address).await,
        Err(error) => Err(error),
    };
    match connected {
        Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => TcpStream::connect(address).await,
        connected => connected,
    }
}

/// A socket whose source is the loopback address of this address's family.
fn bound_to_loopback(address: SocketAddr) -> io::Result<TcpSocket> {
    let (socket, source) = match address {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::from(Ipv4Addr::LOCALHOST)),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::from(Ipv6Addr::LOCALHOST)),
    };
    socket.bind(SocketAddr::new(source, 0))?;
    Ok(socket)
}

/// The reason of a probe that was not answered within its time.
const TIMED_OUT: &str = "the application did not answer in time";

/// A probe's result.
struct Verdict {
    /// What kubelet gets to see.
    status: StatusCode,
    /// The body of the answer, which kubelet does not show.
    reason: Cow<'static, str>,
    /// By which it is compared with the result before.
    kind: Kind,
}

/// What kubelet gets to see. It judges the application's status by itself: the events of the pod then name that
/// status, and warn of a redirect to another host as they do without a sidecar.
fn judge(outcome: Result<Result<StatusCode, ProbeError>, Elapsed>) -> Verdict {
    match outcome {
        Ok(Ok(status)) if status.is_success() => {
            Verdict { status: StatusCode::OK, reason: "ok".into(), kind: Kind::PASSES }
        }
        Ok(Ok(status)) => {
            // kubelet would wait for another answer.
            let seen = if status.is_informational() { StatusCode::BAD_GATEWAY } else { status };
            let reason = format!("the application answered {status}").into();
            Verdict { status: seen, reason, kind: Kind::of_status(status) }
        }
        Ok(Err(error)) => {
            let (status, kind) = (StatusCode::SERVICE_UNAVAILABLE, Kind::of_error(&error));
            Verdict { status, reason: error.to_string().into(), kind }
        }
        Err(_) => {
            Verdict { status: StatusCode::GATEWAY_TIMEOUT, reason: TIMED_OUT.into(), kind: Kind::TIMED_OUT }
        }
    }
}

/// An answer to kubelet. There is no Location, so that kubelet does not follow it.
fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests;
