//! The end of a replica: it serves until nobody calls it any more.
//!
//! A pod that is deleted gets SIGTERM at once, while the API server still sends it admission requests. In `enabled`
//! namespaces a call that fails gives a pod without a sidecar, in `required` ones none at all.

use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::time::{Instant, sleep, timeout};

use crate::settings::Settings;

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long to wait for the endpoint to go; without an answer of the API server, how long to go on serving.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long kube-proxy and other implementations of Services may take to follow an EndpointSlice.
const PROPAGATION: Duration = Duration::from_secs(3);

/// Returns when this pod is not a ready endpoint of the webhook's Service any more, and callers have had the time to
/// notice.
pub async fn endpoint_gone(client: &Client, settings: &Settings) {
    let api = Api::<EndpointSlice>::namespaced(client.clone(), &settings.namespace);
    let slices = ListParams::default().labels(&format!("kubernetes.io/service-name={}", settings.service));
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        match timeout(LOOK_EVERY * 4, api.list(&slices)).await {
            Ok(Ok(slices)) if !is_ready(&slices.items, &settings.pod_name) => break,
            Ok(Ok(_)) => {}
            failed => tracing::warn!(?failed, "cannot read the webhook's EndpointSlices"),
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
        // Not known means ready, says the API.
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
