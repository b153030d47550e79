//! One sidecar's stream: what it subscribes to is computed, sent when its version differs from what
//! it holds, and its answer noted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::{
    OperatorMessage, Resource, ResourceName, SidecarMessage, TelemetryAck, TelemetryReport, destination,
    operator_message, resource, sidecar_message,
};

use super::registry::Report;
use super::relay::LeaderRelay;
use crate::watch::Hub;

/// Changes are gathered for this long before they are sent, and longer the more there are: 0 for the
/// first in a while, 100 ms in a burst, 800 ms in a storm.
const GATHER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(800)];
/// An end is not gathered for longer: whoever still sends to a pod whose process has been told loses.
const GATHER_ENDS: Duration = Duration::from_millis(5);
/// Sends within a second before gathering steps up.
const CALM: u32 = 5;
const BUSY: u32 = 30;
/// Resources that one sidecar may subscribe to.
const MAX_SUBSCRIPTIONS: usize = 10_000;

/// Requests that one report may count of a destination.
const MAX_COUNT: u64 = 100_000_000;

/// What a stream needs.
pub struct Session {
    /// The model.
    pub hub: Arc<Hub>,
    /// Takes the sidecars' reports to the leader.
    pub relay: Arc<LeaderRelay>,
    /// New subscriptions that are computed at the same time, over all streams: a cluster of sidecars
    /// that come back at once must not starve those that are here.
    pub admission: Arc<Semaphore>,
    /// The pod, as its certificate and hello say.
    pub pod_uid: String,
    /// Messages to the sidecar.
    pub down: mpsc::Sender<Result<OperatorMessage, Status>>,
}

struct State {
    /// What is subscribed.
    subscribed: HashMap<(i32, String), Subscription>,
    /// What the sidecar said at the start that it holds.
    held: HashMap<(i32, String), String>,
    sends_in_second: u32,
    second: Instant,
}

struct Subscription {
    name: ResourceName,
    /// The version that was sent last, or that the sidecar holds from before.
    sent: Option<String>,
    /// The namespace and name that its requests are counted under.
    counted_as: Option<(String, String)>,
}

impl Session {
    /// Serves the stream to its end.
    pub async fn run(self, mut up: Streaming<SidecarMessage>, held: HashMap<(i32, String), String>) {
        self.relay.report(&self.pod_uid, Report::Connected);
        let mut state =
            State { subscribed: HashMap::new(), held, sends_in_second: 0, second: Instant::now() };
        let end = self.serve(&mut up, &mut state).await;
        if let Err(status) = end {
            tracing::debug!(pod = self.pod_uid, %status, "a sidecar's stream ended");
        }
        self.relay.report(&self.pod_uid, Report::Gone);
    }

    async fn serve(&self, up: &mut Streaming<SidecarMessage>, state: &mut State) -> Result<(), Status> {
        let (mut changes, mut endings) = (self.hub.changes(), self.hub.endings());
        let mut send_at: Option<Instant> = None;
        let mut acks = self.relay.telemetry_acks(&self.pod_uid);
        loop {
            tokio::select! {
                message = up.message() => match message? {
                    Some(message) => self.received(message, state).await?,
                    None => return Ok(()),
                },
                Some(sequence) = acks.recv() => {
                    let ack = operator_message::Message::TelemetryAck(TelemetryAck { sequence });
                    self.send(ack).await?;
                }
                changed = changes.changed(), if send_at.is_none() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    send_at = Some(Instant::now() + state.gather());
                }
                ending = endings.changed() => {
                    if ending.is_err() {
                        return Ok(());
                    }
                    let soon = Instant::now() + GATHER_ENDS;
                    send_at = Some(send_at.map_or(soon, |at| at.min(soon)));
                }
                () = wait(send_at), if send_at.is_some() => {
                    send_at = None;
                    changes.mark_unchanged();
                    endings.mark_unchanged();
                    self.send_changed(state).await?;
                }
            }
        }
    }

    async fn received(&self, message: SidecarMessage, state: &mut State) -> Result<(), Status> {
        match message.message {
            Some(sidecar_message::Message::Subscribe(subscribe)) => {
                let Some(name) = subscribe.name else { return Ok(()) };
                if state.subscribed.len() >= MAX_SUBSCRIPTIONS {
                    return Err(Status::resource_exhausted("more subscriptions than one sidecar may have"));
                }
                let id = (name.r#type, name.name.clone());
                let sent = state.held.remove(&id);
                state.subscribed.insert(id.clone(), Subscription { name, sent, counted_as: None });
                let resource = {
                    let _turn = self.admission.acquire().await;
                    self.changed(state, &id, true)
                };
                // Sending waits for this sidecar only: the others' turn is not spent on it.
                match resource {
                    Some(resource) => self.send_resource(resource).await,
                    None => Ok(()),
                }
            }
            Some(sidecar_message::Message::Unsubscribe(unsubscribe)) => {
                let Some(name) = unsubscribe.name else { return Ok(()) };
                let id = (name.r#type, name.name);
                state.subscribed.remove(&id);
                self.relay.report(&self.pod_uid, Report::Unsubscribed(id));
                Ok(())
            }
            Some(sidecar_message::Message::Ack(ack)) => {
                let Some(name) = ack.name else { return Ok(()) };
                // An acknowledgement that crossed its unsubscription is about nothing any more.
                if !state.subscribed.contains_key(&(name.r#type, name.name.clone())) {
                    return Ok(());
                }
                self.relay.report(&self.pod_uid, Report::Acked((name.r#type, name.name), ack.version));
                Ok(())
            }
            Some(sidecar_message::Message::Nack(nack)) => {
                let Some(name) = nack.name else { return Ok(()) };
                tracing::warn!(
                    pod = self.pod_uid,
                    resource = name.name,
                    reason = nack.reason,
                    "a sidecar refused a resource"
                );
                let report = Report::Refused((name.r#type, name.name), nack.version, nack.reason);
                self.relay.report(&self.pod_uid, report);
                Ok(())
            }
            Some(sidecar_message::Message::Telemetry(report)) => self.telemetry(report, state).await,
            Some(sidecar_message::Message::Hello(_)) | None => {
                Err(Status::invalid_argument("one hello, at the start"))
            }
        }
    }

    /// What a sidecar counts of destinations that it is not subscribed to is not believed: nobody may give
    /// evidence about a rollout that he sends nothing to.
    async fn telemetry(&self, mut report: TelemetryReport, state: &State) -> Result<(), Status> {
        let known = |namespace: &str, service: &str| {
            state.subscribed.values().filter_map(|subscription| subscription.counted_as.as_ref()).any(
                |(known_namespace, known_service)| known_namespace == namespace && known_service == service,
            )
        };
        let before = report.counts.len();
        report.counts.retain(|counts| known(&counts.namespace, &counts.service));
        for counts in &mut report.counts {
            // The two are read one after the other; and nobody makes a sum that no other can add to.
            counts.requests = counts.requests.min(MAX_COUNT);
            counts.failures = counts.failures.min(counts.requests);
        }
        if report.counts.len() < before {
            let dropped = before - report.counts.len();
            tracing::debug!(
                pod = self.pod_uid,
                dropped,
                "counts of destinations that it is not subscribed to"
            );
        }
        let sequence = report.sequence;
        if self.relay.telemetry(&self.pod_uid, report) {
            self.send(operator_message::Message::TelemetryAck(TelemetryAck { sequence })).await?;
        }
        Ok(())
    }

    async fn send_changed(&self, state: &mut State) -> Result<(), Status> {
        let ids: Vec<(i32, String)> = state.subscribed.keys().cloned().collect();
        for id in ids {
            if let Some(resource) = self.changed(state, &id, false) {
                self.send_resource(resource).await?;
            }
        }
        Ok(())
    }

    /// A resource, unless the sidecar holds this version of it.
    fn changed(&self, state: &mut State, id: &(i32, String), fresh: bool) -> Option<Resource> {
        let subscription = state.subscribed.get_mut(id)?;
        let resource = self.hub.model().resource(&subscription.name, &self.pod_uid)?;
        subscription.counted_as = counted_as(&resource);
        if subscription.sent.as_ref() == Some(&resource.version) {
            if fresh {
                // Held from before: what it holds, it enforces.
                self.relay.report(&self.pod_uid, Report::Acked(id.clone(), resource.version));
            }
            return None;
        }
        if fresh {
            self.relay.report(&self.pod_uid, Report::Sent(id.clone()));
        }
        subscription.sent = Some(resource.version.clone());
        state.sends_in_second += 1;
        Some(resource)
    }

    async fn send_resource(&self, resource: Resource) -> Result<(), Status> {
        self.send(operator_message::Message::Resource(resource)).await
    }

    async fn send(&self, message: operator_message::Message) -> Result<(), Status> {
        let message = OperatorMessage { message: Some(message) };
        self.down.send(Ok(message)).await.map_err(|_| Status::cancelled("the sidecar is gone"))
    }
}

impl State {
    fn gather(&mut self) -> Duration {
        if self.second.elapsed() > Duration::from_secs(1) {
            self.second = Instant::now();
            self.sends_in_second = 0;
        }
        let [none, some, most] = GATHER;
        match self.sends_in_second {
            sends if sends < CALM => none,
            sends if sends < BUSY => some,
            _ => most,
        }
    }
}

/// As sidecars do it: by Service, or by the identity of a single pod.
fn counted_as(resource: &Resource) -> Option<(String, String)> {
    let Some(resource::Body::Destination(destination)) = &resource.body else { return None };
    match destination.kind.as_ref()? {
        destination::Kind::Service(service) => Some((service.namespace.clone(), service.name.clone())),
        destination::Kind::Pod(pod) => {
            let identity: WorkloadId = pod.endpoint.as_ref()?.identity.parse().ok()?;
            Some((identity.namespace, identity.service_account))
        }
        destination::Kind::Unknown(_) => None,
    }
}

async fn wait(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}
