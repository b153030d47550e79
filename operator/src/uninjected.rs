//! Warns about each pod without the sidecar that its namespace asks for: one log line and one event.
//!
//! Which pods these are, and why, is decided by [`Model::uninjected_pods`](crate::model::Model).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::lease::Leadership;
use crate::model::{Uninjected, UninjectedPod};
use crate::watch::Hub;

/// How often pods are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// How long one write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Warns for ever, while this replica leads: once per pod and reason.
pub async fn run(client: Client, hub: Arc<Hub>, leadership: watch::Receiver<Leadership>) {
    let reporter = Reporter { controller: "tulle-operator".to_owned(), instance: None };
    let recorder = Recorder::new(client, reporter);
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
    tracing::warn!(namespace = %pod.namespace, pod = %pod.name, reason = pod.why.reason(), message);
    let event = Event {
        type_: EventType::Warning,
        reason: pod.why.reason().to_owned(),
        note: Some(message),
        action: "Inject".to_owned(),
        secondary: None,
    };
    match timeout(WRITE_TIMEOUT, recorder.publish(&event, &reference(pod))).await {
        Ok(Ok(())) => {}
        failed => {
            tracing::debug!(namespace = %pod.namespace, pod = %pod.name, ?failed, "cannot write the event");
        }
    }
}

/// The pod that the event is about: what the watch has shown is enough, so that no pod has to be read.
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
