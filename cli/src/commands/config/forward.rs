//! One HTTP request to the sidecar of a pod, and why it has no answer.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use kube::Client;
use kube::client::UpgradeConnectionError;
use serde_json::Value;

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
    let idle = not_running(&found.data);
    let unanswered = |error: ForwardError| match idle.as_deref().filter(|_| is_of_pod(&error)) {
        Some(why) => CliError::failed(format!("the sidecar of {namespace}/{pod} does not run: {why}"))
            .hint(format!("kubectl -n {namespace} describe pod {pod}")),
        None => unanswered(error, namespace, pod),
    };
    let request = Request::builder().uri(path).header(HOST, "localhost").body(Full::<Bytes>::default());
    let request = request.map_err(|error| CliError::failed(format!("invalid request: {error}")))?;
    let tunnel = forward::open(client, namespace, pod, port).await.map_err(unanswered)?;
    forward::exchange(tunnel, request).await.map_err(unanswered)
}

/// Why the sidecar of a pod cannot answer: the reason of its container, or the phase of a pod that has none yet. `None`: it
/// runs.
fn not_running(pod: &Value) -> Option<String> {
    let containers = objects::items(pod, "/status/initContainerStatuses");
    let proxy = containers.iter().find(|container| objects::text(container, "/name") == "tulle-proxy");
    let Some(proxy) = proxy else {
        let phase = objects::text(pod, "/status/phase");
        return (phase != "Running").then(|| format!("the pod is {phase}"));
    };
    if proxy.pointer("/state/running").is_some() {
        return None;
    }
    let reasons = ["/state/waiting/reason", "/state/terminated/reason"].map(|at| objects::text(proxy, at));
    let reason = reasons.into_iter().find(|reason| !reason.is_empty()).unwrap_or("waiting");
    Some(format!("its container is {reason}"))
}

/// Whether an error may come from the pod's state: the API server answers 500 to a port-forward to a pod that is starting.
fn is_of_pod(error: &ForwardError) -> bool {
    let of_user = |status: u16| matches!(status, 401 | 403 | 404);
    match error {
        ForwardError::Unopened(kube::Error::UpgradeConnection(UpgradeConnectionError::ProtocolSwitch(
            status,
        ))) => !of_user(status.as_u16()),
        ForwardError::Unopened(kube::Error::Api(status)) => !of_user(status.code),
        ForwardError::Unopened(_) => false,
        ForwardError::Refused(_) | ForwardError::Broken(_) | ForwardError::Unreadable(_) => true,
    }
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
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_that_is_an_error_is_quoted() {
        let refused = Answer { status: StatusCode::FORBIDDEN, body: Bytes::from_static(b"not here\n") };
        let error = read(&refused, "shop", "web-1", "/config/resources").unwrap_err().to_string();
        assert!(error.contains("403") && error.ends_with("/config/resources: not here"), "{error}");
    }

    #[test]
    fn a_pod_that_is_starting_is_said_to_be_so_instead_of_the_status_of_its_port_forward() {
        let pod = |state: Value| {
            let proxy = json!({"name": "tulle-proxy", "state": state});
            json!({"status": {"phase": "Pending", "initContainerStatuses": [{"name": "tulle-init"}, proxy]}})
        };
        let why = |state: Value| not_running(&pod(state));
        assert_eq!(why(json!({"running": {}})), None, "a sidecar runs before the pod does");
        let waits = why(json!({"waiting": {"reason": "PodInitializing"}}));
        assert_eq!(waits.as_deref(), Some("its container is PodInitializing"));
        let unscheduled = not_running(&json!({"status": {"phase": "Pending"}}));
        assert_eq!(unscheduled.as_deref(), Some("the pod is Pending"));
        let switch = |status| {
            let refused = UpgradeConnectionError::ProtocolSwitch(status);
            is_of_pod(&ForwardError::Unopened(kube::Error::UpgradeConnection(refused)))
        };
        assert!(switch(StatusCode::INTERNAL_SERVER_ERROR));
        assert!(!switch(StatusCode::FORBIDDEN), "the user may not forward ports");
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
