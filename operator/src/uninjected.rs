//! Warns about each pod that lacks the sidecar its namespace requests: one log line and one event.
//!
//! [`Model::uninjected_pods`](crate::model::Model) decides which pods these are, and why.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::Recorder;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::lease::Leadership;
use crate::model::{Uninjected, UninjectedPod};
use crate::status::{event, recorder};
use crate::watch::Hub;

/// Time between two looks at the pods.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Warns once per pod and reason, while this replica leads. Never returns.
pub async fn run(client: Client, hub: Arc<Hub>, leadership: watch::Receiver<Leadership>) {
    let recorder = recorder(client);
    let mut reported: HashSet<(Arc<str>, Uninjected)> = HashSet::new();
    loop {
        sleep(LOOK_EVERY).await;
        if !leadership.borrow().mine || !hub.is_synced() {
            continue;
        }
        let found = hub.model().uninjected_pods();
        let present: HashSet<_> = found.iter().map(|pod| (Arc::clone(&pod.uid), pod.why)).collect();
        reported.retain(|known| present.contains(known));
        for pod in found {
            if reported.insert((Arc::clone(&pod.uid), pod.why)) {
                warn(&recorder, &pod).await;
            }
        }
    }
}

async fn warn(recorder: &Recorder, pod: &UninjectedPod) {
    let message = pod.why.message(&pod.namespace);
    tracing::warn!(namespace = %pod.namespace, pod = %pod.name, reason = pod.why.reason().name(), message);
    let event = event(pod.why.reason(), "Inject", message);
    match timeout(WRITE_TIMEOUT, recorder.publish(&event, &reference(pod))).await {
        Ok(Ok(())) => {}
        failed => {
            tracing::debug!(namespace = %pod.namespace, pod = %pod.name, ?failed, "cannot write the event");
        }
    }
}

/// The pod that the event is about, from the model, so that no pod has to be read from the API server.
fn reference(pod: &UninjectedPod) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.namespace.to_string()),
        name: Some(pod.name.to_string()),
        uid: Some(pod.uid.to_string()),
        ..ObjectReference::default()
    }
}
