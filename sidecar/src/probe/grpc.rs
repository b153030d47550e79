//! gRPC probes: one call of `grpc.health.v1.Health/Check`, in plain text, as kubelet does.

use std::net::SocketAddr;

use http::header::USER_AGENT;
use http::{HeaderValue, Request, Uri};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tulle_mesh::health::HealthCheckRequest;
use tulle_mesh::health::health_check_response::ServingStatus;
use tulle_mesh::health::health_client::HealthClient;

use super::ProbeError;

/// Asks whether a service is SERVING; the empty name means the whole server.
///
/// # Errors
/// [`ProbeError`] when it is not, or when the server does not say so.
pub(super) async fn check(
    address: SocketAddr,
    service: &str,
    user_agent: &HeaderValue,
) -> Result<(), ProbeError> {
    let url = format!("http://{address}");
    let of_http = |source| ProbeError::Http { url: url.clone(), source };
    let stream =
        TcpStream::connect(address).await.map_err(|source| ProbeError::Connect { address, source })?;
    let (send, connection): (SendRequest<tonic::body::Body>, _) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(of_http)?;
    // The connection ends with this call.
    let mut tasks = JoinSet::new();
    tasks.spawn(connection);
    let user_agent = user_agent.clone();
    let transport = tower::service_fn(move |mut request: Request<tonic::body::Body>| {
        request.headers_mut().insert(USER_AGENT, user_agent.clone());
        let mut send = send.clone();
        async move { send.send_request(request).await }
    });
    let origin: Uri = url.parse().map_err(|source| ProbeError::Target { target: url.clone(), source })?;
    let mut client = HealthClient::with_origin(transport, origin);
    let answer = client.check(HealthCheckRequest { service: service.to_owned() }).await;
    match answer.map_err(ProbeError::Grpc)?.into_inner().status() {
        ServingStatus::Serving => Ok(()),
        status => Err(ProbeError::NotServing { service: service.to_owned(), status }),
    }
}
