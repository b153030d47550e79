//! One HTTP request to the sidecar of a pod, and why it has no answer.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use kube::Client;

use crate::cluster::failure::{self, cannot};
use crate::cluster::forward::{self, Answer, ForwardError};
use crate::exit::CliError;
use crate::objects;

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
    let answer = answer(client, namespace, pod, port, path).await?;
    read(&answer, namespace, pod, path)
}

/// As [`get`], but `None` if the pod answers that it has no such path (404).
///
/// # Errors
/// As [`get`].
pub(super) async fn find(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> Result<Option<Vec<u8>>, CliError> {
    let answer = answer(client, namespace, pod, port, path).await?;
    if answer.status == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    read(&answer, namespace, pod, path).map(Some)
}

/// The body of an answer with status 200.
fn read(answer: &Answer, namespace: &str, pod: &str, path: &str) -> Result<Vec<u8>, CliError> {
    let Answer { status, body } = answer;
    if !status.is_success() {
        let said = String::from_utf8_lossy(body);
        let what = format!("the sidecar of {namespace}/{pod} answers {status} to {path}: {}", said.trim());
        return Err(CliError::failed(what).hint(logs(namespace, pod)));
    }
    Ok(body.to_vec())
}

async fn answer(
    client: &Client,
    namespace: &str,
    pod: &str,
    port: u16,
    path: &str,
) -> Result<Answer, CliError> {
    match tokio::time::timeout(TIMEOUT, ask(client, namespace, pod, port, path)).await {
        Ok(answer) => answer,
        Err(_) => {
            let what =
                format!("port {port} of pod {namespace}/{pod} gave no answer within {} s", TIMEOUT.as_secs());
            Err(CliError::failed(what).hint(logs(namespace, pod)))
        }
    }
}

async fn ask(client: &Client, namespace: &str, pod: &str, port: u16, path: &str) -> Result<Answer, CliError> {
    // The error of the upgrade says less: whether there is such a pod, and whether it has a sidecar.
    let found = objects::POD.api(client, Some(namespace)).get_opt(pod).await;
    let found = found.map_err(|error| cannot(&format!("read pod {namespace}/{pod}"), &error))?;
    let Some(found) = found else {
        return Err(CliError::failed(format!("there is no pod {namespace}/{pod}")).hint(listed(namespace)));
    };
    if !objects::has_sidecar(&found.data) {
        return Err(CliError::failed(format!("pod {namespace}/{pod} has no sidecar")).hint(listed(namespace)));
    }
    let unanswered = |error| unanswered(error, namespace, pod);
    let request = Request::builder().uri(path).header(HOST, "localhost").body(Full::<Bytes>::default());
    let request = request.map_err(|error| CliError::failed(format!("invalid request: {error}")))?;
    let tunnel = forward::open(client, namespace, pod, port).await.map_err(unanswered)?;
    forward::exchange(tunnel, request).await.map_err(unanswered)
}

/// What it means that a sidecar gave no answer.
fn unanswered(error: ForwardError, namespace: &str, pod: &str) -> CliError {
    match error {
        ForwardError::Unopened(error) => failure::of_forward(&error, namespace, pod, &listed(namespace)),
        ForwardError::Refused(why) => failure::refused_by(namespace, pod, &why),
        error @ (ForwardError::Broken(_) | ForwardError::Unreadable(_)) => {
            let what = format!("cannot ask the sidecar of {namespace}/{pod}: {error}");
            CliError::failed(what).hint(logs(namespace, pod))
        }
    }
}

fn listed(namespace: &str) -> String {
    format!("tulle pods -n {namespace} lists the pods with a sidecar")
}

fn logs(namespace: &str, pod: &str) -> String {
    format!("kubectl -n {namespace} logs {pod} -c tulle-proxy")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_an_error_is_quoted() {
        let refused = Answer { status: StatusCode::FORBIDDEN, body: Bytes::from_static(b"not here\n") };
        let error = read(&refused, "shop", "web-1", "/config/resources").unwrap_err().to_string();
        assert!(error.contains("403") && error.ends_with("/config/resources: not here"), "{error}");
    }

    #[test]
    fn every_reason_names_the_pod_and_says_what_to_do() {
        let unreadable = ForwardError::Unreadable("too long".into());
        for (error, hint) in [
            (ForwardError::Refused("connection refused".to_owned()), "kubectl -n shop describe pod web-1"),
            (unreadable, "kubectl -n shop logs web-1 -c tulle-proxy"),
        ] {
            let CliError::Failed { what, hint: found } = unanswered(error, "shop", "web-1") else {
                panic!("not a failure");
            };
            assert!(what.contains("shop/web-1"), "{what}");
            assert_eq!(found.as_deref(), Some(hint));
        }
    }
}
