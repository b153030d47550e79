//! One sidecar's stream: what it subscribes to is computed, sent when its version differs from what
//! it holds, and its answer noted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep_until};
use tonic::{Status, Streaming};
use tulle_mesh::proto::{
    OperatorMessage, Resource, ResourceName, SidecarMessage, TelemetryAck, TelemetryReport, operator_message,
    sidecar_message,
};

use super::registry::Report;
use super::relay::Outlet;
use crate::watch::Hub;

/// Changes are gathered for this long before they are sent, and longer the more there are: 0 for the
/// first in a while, 100 ms in a burst, 800 ms in a storm.
const GATHER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_millis(800)];
/// Sends within a second before gathering steps up.
const CALM: u32 = 5;
const BUSY: u32 = 30;
/// Resources that one sidecar may subscribe to.
const MAX_SUBSCRIPTIONS: usize = 10_000;

/// What a stream needs.
pub struct Session {
    /// The model.
    pub hub: Arc<Hub>,
    /// Where reports go.
    pub outlet: Arc<Outlet>,
    /// New subscriptions that are computed at the same time, over all streams: a cluster of sidecars
    /// that come back at once must not starve those that are here.
    pub admission: Arc<Semaphore>,
    /// The pod, as its certificate and hello say.
    pub pod_uid: String,
    /// Messages to the sidecar.
    pub down: mpsc::Sender<Result<OperatorMessage, Status>>,
}

struct State {
    /// What is subscribed, and the version that was sent last.
    subscribed: HashMap<(i32, String), (ResourceName, Option<String>)>,
    /// What the sidecar said at the start that it holds.
    held: HashMap<(i32, String), String>,
    sends_in_second: u32,
    second: Instant,
}

impl Session {
    /// Serves the stream to its end.
    pub async fn run(self, mut up: Streaming<SidecarMessage>, held: HashMap<(i32, String), String>) {
        self.outlet.report(&self.pod_uid, Report::Connected);
        let mut state =
            State { subscribed: HashMap::new(), held, sends_in_second: 0, second: Instant::now() };
        let end = self.serve(&mut up, &mut state).await;
        if let Err(status) = end {
            tracing::debug!(pod = self.pod_uid, %status, "a sidecar's stream ended");
        }
        self.outlet.report(&self.pod_uid, Report::Gone);
    }

    async fn serve(&self, up: &mut Streaming<SidecarMessage>, state: &mut State) -> Result<(), Status> {
        let mut changes = self.hub.changes();
        let mut send_at: Option<Instant> = None;
        let mut acks = self.outlet.telemetry_acks(&self.pod_uid);
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
                () = wait(send_at), if send_at.is_some() => {
                    send_at = None;
                    changes.mark_unchanged();
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
                let _turn =
                    self.admission.acquire().await.map_err(|_| Status::unavailable("the operator stops"))?;
                let id = (name.r#type, name.name.clone());
                let held = state.held.remove(&id);
                state.subscribed.insert(id.clone(), (name, held));
                self.send_if_changed(state, &id, true).await
            }
            Some(sidecar_message::Message::Unsubscribe(unsubscribe)) => {
                let Some(name) = unsubscribe.name else { return Ok(()) };
                let id = (name.r#type, name.name);
                state.subscribed.remove(&id);
                self.outlet.report(&self.pod_uid, Report::Unsubscribed(id));
                Ok(())
            }
            Some(sidecar_message::Message::Ack(ack)) => {
                let Some(name) = ack.name else { return Ok(()) };
                // An acknowledgement that crossed its unsubscription is about nothing any more.
                if !state.subscribed.contains_key(&(name.r#type, name.name.clone())) {
                    return Ok(());
                }
                self.outlet.report(&self.pod_uid, Report::Acked((name.r#type, name.name), ack.version));
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
                self.outlet.report(&self.pod_uid, report);
                Ok(())
            }
            Some(sidecar_message::Message::Telemetry(report)) => self.telemetry(report).await,
            Some(sidecar_message::Message::Hello(_)) | None => {
                Err(Status::invalid_argument("one hello, at the start"))
            }
        }
    }

    async fn telemetry(&self, report: TelemetryReport) -> Result<(), Status> {
        let sequence = report.sequence;
        if self.outlet.telemetry(&self.pod_uid, report) {
            self.send(operator_message::Message::TelemetryAck(TelemetryAck { sequence })).await?;
        }
        Ok(())
    }

    async fn send_changed(&self, state: &mut State) -> Result<(), Status> {
        let ids: Vec<(i32, String)> = state.subscribed.keys().cloned().collect();
        for id in ids {
            self.send_if_changed(state, &id, false).await?;
        }
        Ok(())
    }

    /// Sends a resource unless the sidecar holds this version of it.
    async fn send_if_changed(
        &self,
        state: &mut State,
        id: &(i32, String),
        fresh: bool,
    ) -> Result<(), Status> {
        let Some((name, sent)) = state.subscribed.get_mut(id) else { return Ok(()) };
        let Some(resource) = self.hub.model().resource(name, &self.pod_uid) else { return Ok(()) };
        if sent.as_ref() == Some(&resource.version) {
            if fresh {
                // Held from before: what it holds, it enforces.
                self.outlet.report(&self.pod_uid, Report::Acked(id.clone(), resource.version));
            }
            return Ok(());
        }
        *sent = Some(resource.version.clone());
        state.sends_in_second += 1;
        self.send_resource(resource).await
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

async fn wait(until: Option<Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}
