//! Warns about each Service that claims an address of another Service: one log line and one event per collision.
//!
//! [`Model::colliding_claims`](crate::model::Model) decides which Services these are.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::Recorder;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tulle_mesh::event_reason::EventReason;

use super::{event, recorder};
use crate::lease::Leadership;
use crate::model::Key;
use crate::watch::Hub;

/// Time between two looks at the Services.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Reason of the event.
const REASON: EventReason = EventReason::AddressConflict;

/// A claim without effect.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Collision {
    claimant: Key,
    holder: Key,
    address: IpAddr,
}

/// Warns once per collision, while this replica leads. Never returns.
pub async fn run(client: Client, hub: Arc<Hub>, leadership: watch::Receiver<Leadership>) {
    let recorder = recorder(client);
    let mut reported = HashSet::new();
    loop {
        sleep(LOOK_EVERY).await;
        if !leadership.borrow().mine || !hub.is_synced() {
            continue;
        }
        for collision in news(&mut reported, found(&hub)) {
            warn(&recorder, &collision).await;
        }
    }
}

fn found(hub: &Hub) -> HashSet<Collision> {
    let model = hub.model();
    let claims = model.colliding_claims().into_iter();
    claims
        .map(|claim| Collision { claimant: claim.claimant, holder: claim.holder, address: claim.ip })
        .collect()
}

/// Collisions that have not been reported yet. One that has ended is reported again when it returns.
fn news(reported: &mut HashSet<Collision>, found: HashSet<Collision>) -> Vec<Collision> {
    reported.retain(|known| found.contains(known));
    found.into_iter().filter(|collision| reported.insert(collision.clone())).collect()
}

fn message(collision: &Collision) -> String {
    let (namespace, name) = &collision.holder;
    format!(
        "{} belongs to Service {namespace}/{name}: sidecars send requests for this address to that Service, and the claim of this Service has no effect; remove the address from this Service",
        collision.address
    )
}

async fn warn(recorder: &Recorder, collision: &Collision) {
    let (namespace, name) = &collision.claimant;
    let message = message(collision);
    tracing::warn!(%namespace, service = %name, reason = REASON.name(), message);
    let event = event(REASON, "Resolve", message);
    let about = ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Service".to_owned()),
        namespace: Some(namespace.to_string()),
        name: Some(name.to_string()),
        ..ObjectReference::default()
    };
    match timeout(WRITE_TIMEOUT, recorder.publish(&event, &about)).await {
        Ok(Ok(())) => {}
        failed => tracing::debug!(%namespace, service = %name, ?failed, "cannot write the event"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collision_is_reported_once_and_again_when_it_returns() {
        let collision = Collision {
            claimant: ("evil".into(), "hijack".into()),
            holder: ("shop".into(), "payments".into()),
            address: IpAddr::from([10, 96, 0, 7]),
        };
        let now = || HashSet::from([collision.clone()]);
        let mut reported = HashSet::new();
        assert_eq!(news(&mut reported, now()), std::slice::from_ref(&collision));
        assert!(news(&mut reported, now()).is_empty());
        assert!(news(&mut reported, HashSet::new()).is_empty());
        assert_eq!(news(&mut reported, now()).len(), 1);
        let message = message(&collision);
        assert!(message.contains("10.96.0.7 belongs to Service shop/payments"), "{message}");
    }
}
