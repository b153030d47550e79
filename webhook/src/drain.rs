//! Waits, after SIGTERM, until the API server no longer sends requests to this replica.
//!
//! A pod that is deleted gets SIGTERM at once, while it is still an endpoint of the Service. A failed call creates a pod
//! without a sidecar in `enabled` namespaces, and rejects the pod in `required` ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::http::HeaderValue;
use axum::http::header::CONNECTION;
use axum::middleware::map_response;
use axum::response::Response;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};

use crate::settings::Settings;

/// Interval between two checks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long to wait for the endpoint to disappear, also when the API server does not respond.
const ENDPOINT_TIMEOUT: Duration = Duration::from_secs(15);
/// Time that kube-proxy and other implementations of Services may take to apply a changed EndpointSlice.
const PROPAGATION: Duration = Duration::from_secs(5);

/// Ends each connection after its next answer once `draining` is set. The API server keeps connections of a Service open
/// and goes on using them after their endpoint is gone, and a request that meets the end of an idle one is lost: a POST
/// is not sent again.
pub fn closing(routes: Router, draining: Arc<AtomicBool>) -> Router {
    routes.layer(map_response(move |mut response: Response| {
        let closes = draining.load(Ordering::Relaxed);
        async move {
            if closes {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            response
        }
    }))
}

/// Returns when this pod is no longer a ready endpoint of the webhook's Service and the change has had
/// [`PROPAGATION`] to take effect.
pub async fn endpoint_gone(client: &Client, settings: &Settings) {
    let api = Api::<EndpointSlice>::namespaced(client.clone(), &settings.namespace);
    let slices = ListParams::default().labels(&format!("kubernetes.io/service-name={}", settings.service));
    let deadline = Instant::now() + ENDPOINT_TIMEOUT;
    while Instant::now() < deadline {
        match timeout(LOOK_EVERY * 4, api.list(&slices)).await {
            Ok(Ok(slices)) if !is_ready(&slices.items, &settings.pod_name) => break,
            Ok(Ok(_)) => {}
            failed => tracing::warn!(
                ?failed,
                "cannot list the EndpointSlices of the webhook's Service; trying again"
            ),
        }
        sleep(LOOK_EVERY).await;
    }
    sleep(PROPAGATION).await;
}

/// Whether a pod is among the ready endpoints.
fn is_ready(slices: &[EndpointSlice], pod: &str) -> bool {
    let mut endpoints = slices.iter().flat_map(|slice| &slice.endpoints);
    endpoints.any(|endpoint| {
        let name = endpoint.target_ref.as_ref().and_then(|target| target.name.as_deref());
        let ready = endpoint.conditions.as_ref().and_then(|conditions| conditions.ready);
        // The API defines a missing condition as ready.
        name == Some(pod) && ready.unwrap_or(true)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_ready_endpoint_of_this_pod_is_waited_for() {
        let slices = |conditions: serde_json::Value| -> Vec<EndpointSlice> {
            let endpoint = json!({"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": "me"}, "conditions": conditions});
            serde_json::from_value(json!([{"addressType": "IPv4", "metadata": {}, "endpoints": [endpoint]}]))
                .unwrap()
        };
        assert!(is_ready(&slices(json!({"ready": true})), "me"));
        assert!(is_ready(&slices(json!({})), "me"));
        assert!(!is_ready(&slices(json!({"ready": false, "serving": true, "terminating": true})), "me"));
        assert!(!is_ready(&slices(json!({"ready": true})), "other"));
        assert!(!is_ready(&[], "me"));
    }
}
