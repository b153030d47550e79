//! What a sidecar reports of its traffic: how often it is taken, and what of it is believed.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tonic::Status;
use tulle_mesh::proto::{Stamp, TelemetryReport, stamp};

use super::{Session, State, acknowledgement};
use crate::discovery::bounds::{self, Subjects};
use crate::tap::Registered;

/// Two reports of a sidecar are counted at least this long apart.
const REPORTS_APART: Duration = Duration::from_millis(200);

impl Session {
    /// Attempts at destinations that a sidecar is not subscribed to are not believed: nobody may give evidence about a
    /// rollout that he sends nothing to.
    pub(super) async fn telemetry(
        &self,
        mut report: TelemetryReport,
        state: &mut State,
    ) -> Result<(), Status> {
        // Where nobody taps any more, nothing else says that there may be room again.
        state.tapped.iter().for_each(Registered::send_ends);
        // A sidecar looks for something to report once a second. One that reports all the time waits, with all that it
        // says: each report takes the lock of the history.
        if let Some(next) = state.next_report {
            sleep_until(next).await;
        }
        state.next_report = Some(Instant::now() + REPORTS_APART);
        let dropped = self.bound(&mut report, state);
        if dropped > 0 {
            tracing::debug!(pod = self.pod_uid, dropped, "counts that a sidecar may not report");
        }
        if let Some(ack) = self.relay.telemetry(&self.pod_uid, report) {
            self.send(acknowledgement(ack)).await?;
        }
        Ok(())
    }

    /// Takes out of a report what is not believed. Returns how much that was.
    pub(super) fn bound(&self, report: &mut TelemetryReport, state: &State) -> usize {
        let sent = || state.subscribed.values().filter_map(|subscription| subscription.sent.as_deref());
        let stamps = || sent().flat_map(|shared| shared.stamps.iter());
        let services = sent().filter_map(|shared| shared.counted_as.as_ref());
        let canaries = stamps().filter(|stamp| stamp.kind() == stamp::Kind::Canary);
        let exists = |namespace: &str, name: &str| self.hub.model().has_service(namespace, name);
        // Each is looked for where the report names one: many reports have no keys, and count nothing.
        let subjects = Subjects {
            exists: &exists,
            services: match report.keys.is_empty() && report.counts.is_empty() {
                true => HashSet::new(),
                false => services.map(|(namespace, name)| (namespace.as_str(), name.as_str())).collect(),
            },
            canaries: match report.attempts.is_empty() {
                true => HashSet::new(),
                false => canaries.map(|stamp| (stamp.namespace.as_str(), stamp.name.as_str())).collect(),
            },
            routes: match report.keys.iter().any(|key| !key.route.is_empty()) {
                true => stamps().filter_map(route_of).collect(),
                false => HashSet::new(),
            },
        };
        bounds::telemetry(report, &subjects)
    }
}

/// The route of the Gateway API that a stamp is of, as sidecars name it: `HTTPRoute/namespace/name`.
fn route_of(stamp: &Stamp) -> Option<String> {
    let (kind, name) = stamp.name.split_once('/').filter(|_| stamp.kind() == stamp::Kind::Route)?;
    Some(format!("{kind}/{}/{name}", stamp.namespace))
}
