//! One HTTP request to a port of a pod, through a port-forward of the API server.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};

use crate::commands::canary::cannot;
use crate::exit::CliError;

/// The longest answer that is read.
const LONGEST: usize = 64 << 20;
const TIMEOUT: Duration = Duration::from_secs(15);

/// Asks for a path at a port of a pod; the body of an answer with status 200.
///
/// # Errors
/// The pod does not exist, the user may not forward its ports, nobody listens there, or the answer is an error.
pub(crate) async fn get(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> Result<Vec<u8>, CliError> {
    match tokio::time::timeout(TIMEOUT, ask(client, namespace, pod, port, path)).await {
        Ok(answer) => answer,
        Err(_) => Err(CliError::failed(format!(
            "port {port} of pod {namespace}/{pod} gave no answer within {} s",
            TIMEOUT.as_secs()
        ))),
    }
}

async fn ask(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> Result<Vec<u8>, CliError> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    // The error of the upgrade says less: whether there is such a pod, and whether it has a sidecar.
    let found =
        pods.get_opt(pod).await.map_err(|error| cannot(&format!("read pod {namespace}/{pod}"), &error))?;
    let Some(found) = found else {
        return Err(CliError::failed(format!("there is no pod {namespace}/{pod}")));
    };
    if !found.metadata.labels.unwrap_or_default().contains_key(tulle_crds::keys::INJECTED) {
        return Err(CliError::failed(format!("pod {namespace}/{pod} has no sidecar"))
            .hint("tulle pods lists the sidecars of a namespace"));
    }
    let refused = |why: String| {
        CliError::failed(format!("cannot ask the sidecar of {namespace}/{pod} at port {port}: {why}"))
    };
    let forwarded = pods.portforward(pod, &[port]).await;
    let mut forwarded = forwarded.map_err(|error| {
        refused(error.to_string()).hint("it needs the right to create pods/portforward in the namespace")
    })?;
    let stream =
        forwarded.take_stream(port).ok_or_else(|| refused("the port is not forwarded".to_owned()))?;
    let shaken = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = shaken.map_err(|error| refused(error.to_string()))?;
    let driver = tokio::spawn(connection);
    let request = Request::builder().uri(path).header(HOST, "localhost").body(Empty::<Bytes>::new());
    let request = request.map_err(|error| refused(error.to_string()))?;
    let response = sender.send_request(request).await.map_err(|error| refused(error.to_string()))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), LONGEST).collect().await;
    let body = body.map_err(|error| refused(error.to_string()))?.to_bytes();
    driver.abort();
    if !status.is_success() {
        return Err(refused(format!("{status}: {}", String::from_utf8_lossy(&body).trim())));
    }
    Ok(body.to_vec())
}
