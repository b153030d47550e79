//! One sidecar's stream: what it subscribes to is sent when its version differs from what it holds, and its
//! answer noted.
//!
//! A route brings the endpoints that it leads to, those of every backend: they are subscribed with the first route that
//! names them, and left with the last. They are sent before the route, so that it is complete when it arrives and the
//! first use of an address costs one round trip. A sidecar may subscribe to endpoints of any Service by name as well, as
//! to any address; what a pod enforces is sent to that pod's sidecar only.

mod in_force;
mod telemetry;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::{Status, Streaming};
use tulle_mesh::proto::{
    OperatorMessage, Resource, ResourceType, SidecarMessage, TelemetryAck, operator_message, sidecar_message,
};

use super::admission::Admission;
use super::bounds;
use super::cache::{Cache, Id, Shared, Wake};
use super::relay::LeaderRelay;
use super::report::{Name, SidecarEvent, Stamps, endpoints_name, name_of, resource_name};
use crate::model::Variant;
use crate::tap::{Registered, Sidecar, Taps};
use crate::telemetry::query::reporter;
use crate::watch::Hub;
use in_force::{Before, Lag};

/// Changes are gathered for this long before they are sent, and longer the more there are: 0 for the
/// first in a while, 50 ms in a burst, 800 ms in a storm.
const GATHER: [Duration; 3] = [Duration::ZERO, Duration::from_millis(50), Duration::from_millis(800)];
/// An end is not gathered for longer: whoever still sends to a pod whose process has been told loses.
const GATHER_ENDS: Duration = Duration::from_millis(5);
/// Sends within a second before gathering steps up.
const CALM: u32 = 5;
const BUSY: u32 = 30;
/// Resources that one sidecar may subscribe to: 10,000 addresses with endpoints of their own, and what it enforces.
/// Endpoints that would exceed it are not followed; the sidecar asks for those that it lacks, and is told once.
pub(super) const MAX_SUBSCRIPTIONS: usize = 20_010;
/// Characters of a resource's name.
const MAX_NAME: usize = 256;
/// A sidecar that reads nothing for this long is dropped: it would not learn of any change, and what is meant
/// for it fills memory.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// What waits to be sent. Boxed, because a message takes more than a kilobyte whatever is in it, and the queue of each
/// stream has room for 32 of them from its first one on.
pub type Down = Result<Box<OperatorMessage>, Status>;

/// What a stream needs.
pub struct Session {
    /// The model.
    pub hub: Arc<Hub>,
    /// What is compiled of it.
    pub cache: Arc<Cache>,
    /// Takes the sidecars' reports to the leader.
    pub relay: Arc<LeaderRelay>,
    /// The queue for new subscriptions.
    pub admission: Arc<Admission>,
    /// Who looks at single requests.
    pub taps: Arc<Taps>,
    /// The pod, as its certificate and hello say.
    pub pod_uid: String,
    /// Of this stream, ascending; set when it is served.
    pub number: u64,
    /// Messages to the sidecar.
    pub down: mpsc::Sender<Down>,
    /// Closes the connection of a sidecar that reads nothing: the stream alone cannot be ended while its
    /// window is full.
    pub hang_up: Arc<Notify>,
}

/// What a sidecar says of its build.
pub struct Build {
    /// Its version.
    pub version: Arc<str>,
    /// Features of this operator's build that it does not have.
    pub lacks: Vec<&'static str>,
    /// It can show single requests.
    pub taps: bool,
}

struct State {
    wake: Arc<Wake>,
    /// What it has seen goes through this. `None`: the model does not know its pod any more.
    tapped: Option<Registered>,
    /// What is subscribed.
    subscribed: HashMap<Name, Subscription>,
    /// How many subscribed routes lead to each Endpoints resource.
    routes: HashMap<Name, usize>,
    /// What it has been sent and has not taken.
    lag: Lag,
    /// What the sidecar said at the start that it holds, until it is compared with what there is.
    held: HashMap<Name, String>,
    sends_in_second: u32,
    second: Instant,
    /// When the next report is taken; `None`: at once.
    next_report: Option<Instant>,
}

#[derive(Default)]
struct Subscription {
    variant: Variant,
    /// What was sent last, or is held from before.
    sent: Option<Arc<Shared>>,
    /// The sidecar enforces `sent`.
    acked: bool,
    /// The last that was reported.
    reported: Option<Reported>,
    /// Nothing is to be reported until it carries a stamp.
    is_silent: bool,
    /// Of a route: the version whose endpoints are subscribed.
    followed: Option<Arc<Shared>>,
}

/// What was reported of a subscription: what changes none of it is not reported again.
#[derive(PartialEq)]
enum Reported {
    Sent(Stamps),
    Acked(Stamps),
    Refused,
}

impl Session {
    /// Serves the stream of a sidecar of this build, which holds these versions, to its end.
    pub async fn run(mut self, mut up: Streaming<SidecarMessage>, held: HashMap<Name, String>, build: Build) {
        let Build { version, lacks, taps } = build;
        let wake = self.cache.wake(self.namespace());
        self.number = wake.session();
        self.relay.begins(&self.pod_uid, self.number);
        self.relay.report(&self.pod_uid, SidecarEvent::Version(version));
        if !lacks.is_empty() {
            self.relay.report(&self.pod_uid, SidecarEvent::Lacks(lacks));
        }
        let mut state = State::new(wake, held);
        state.tapped = self.register(taps);
        let end = self.serve(&mut up, &mut state).await;
        // No answer will come any more.
        self.tell_late(&mut state, Instant::now() + in_force::LATE);
        for (name, subscription) in state.subscribed.drain() {
            self.cache.unsubscribe(&(name, subscription.variant), &state.wake);
        }
        if let Err(status) = end {
            tracing::debug!(pod = self.pod_uid, %status, "a sidecar's stream ended");
            // It learns why, if it still listens.
            let _ = self.down.try_send(Err(status));
        }
        self.relay.ended(&self.pod_uid);
        self.relay.report(&self.pod_uid, SidecarEvent::Gone);
    }

    /// Makes the sidecar known to those who look at single requests, until the answer is dropped.
    fn register(&self, is_able: bool) -> Option<Registered> {
        let sidecar = {
            let model = self.hub.model();
            let pod = model.pod(&self.pod_uid)?;
            Sidecar {
                namespace: Arc::clone(&pod.namespace),
                pod: Arc::clone(&pod.name),
                reporter: reporter(pod),
                is_able,
            }
        };
        let down = self.down.clone();
        let deliver = move |message| down.try_send(Ok(boxed(message))).is_ok();
        Some(self.taps.register(sidecar, Box::new(deliver), std::time::Instant::now()))
    }

    async fn serve(&self, up: &mut Streaming<SidecarMessage>, state: &mut State) -> Result<(), Status> {
        let wake = Arc::clone(&state.wake);
        let mut send_at: Option<Instant> = None;
        let mut acks = self.relay.telemetry_acks(&self.pod_uid);
        loop {
            tokio::select! {
                message = up.message() => match message? {
                    Some(message) => self.received(message, state).await?,
                    None => return Ok(()),
                },
                Some(ack) = acks.recv() => {
                    self.send(acknowledgement(ack)).await?;
                }
                () = wake.changed() => {
                    let gather = if wake.is_ending() { GATHER_ENDS } else { state.gather() };
                    let soon = Instant::now() + gather;
                    send_at = Some(send_at.map_or(soon, |at| at.min(soon)));
                }
                () = wait(send_at), if send_at.is_some() => {
                    send_at = None;
                    self.send_changed(state).await?;
                }
                () = wait(state.lag.late_at), if state.lag.late_at.is_some() => {
                    // Answers that have come already are not late.
                    for _ in 0..MAX_SUBSCRIPTIONS {
                        match up.message().now_or_never() {
                            None => break,
                            Some(message) => match message? {
                                Some(message) => self.received(message, state).await?,
                                None => return Ok(()),
                            },
                        }
                    }
                    self.tell_late(state, Instant::now());
                }
            }
        }
    }

    /// Sends what has changed since the last time.
    async fn send_changed(&self, state: &mut State) -> Result<(), Status> {
        for name in state.wake.take().names {
            for changed in self.changed(state, &name) {
                self.send_resource(&changed).await?;
            }
        }
        Ok(())
    }

    async fn received(&self, message: SidecarMessage, state: &mut State) -> Result<(), Status> {
        match message.message {
            Some(sidecar_message::Message::Subscribe(subscribe)) => {
                let Some(name) = subscribe.name else { return Ok(()) };
                self.subscribe(name_of(name), state).await
            }
            Some(sidecar_message::Message::Unsubscribe(unsubscribe)) => {
                if let Some(name) = unsubscribe.name.map(name_of) {
                    self.leave(state, name);
                }
                Ok(())
            }
            Some(sidecar_message::Message::Ack(ack)) => {
                // An answer that crossed its unsubscription, or a newer version, is about nothing any more.
                let name = ack.name.map(name_of);
                if let Some((name, subscription, sent)) = answered(state, name.clone(), &ack.version) {
                    subscription.acked = true;
                    self.report_acked(&name, subscription, &sent);
                    self.caught_up(&mut state.lag, &name);
                } else if let Some(name) = name {
                    self.acked_earlier(&mut state.lag, &name, &ack.version);
                }
                Ok(())
            }
            Some(sidecar_message::Message::Nack(nack)) => {
                let name = nack.name.map(name_of);
                if let Some((name, subscription, sent)) = answered(state, name, &nack.version) {
                    let reason = bounds::reason(&nack.reason);
                    tracing::warn!(
                        pod = self.pod_uid,
                        resource = %name.1,
                        reason,
                        "a sidecar refused a resource"
                    );
                    subscription.acked = false;
                    subscription.reported = Some(Reported::Refused);
                    let report = SidecarEvent::Refused(name.clone(), Arc::clone(&sent.stamps), reason);
                    self.relay.report(&self.pod_uid, report);
                    self.refused(&mut state.lag, &name);
                }
                Ok(())
            }
            Some(sidecar_message::Message::Telemetry(report)) => self.telemetry(report, state).await,
            Some(sidecar_message::Message::Tapped(tapped)) => {
                if let Some(registered) = &state.tapped {
                    registered.tapped(tapped, std::time::Instant::now());
                }
                Ok(())
            }
            Some(sidecar_message::Message::Hello(_)) | None => {
                Err(Status::invalid_argument("one hello, at the start"))
            }
        }
    }

    async fn subscribe(&self, name: Name, state: &mut State) -> Result<(), Status> {
        if name.1.len() > MAX_NAME {
            return Err(Status::invalid_argument("no resource has a name this long"));
        }
        if !self.may_know(&name) {
            tracing::warn!(pod = self.pod_uid, of = %name.1, "a sidecar asked what another pod enforces");
            return Err(Status::permission_denied("what another pod enforces"));
        }
        let is_known = state.subscribed.contains_key(&name);
        if is_known && is_endpoints(&name) {
            // They came with a route.
            return Ok(());
        }
        if !is_known && state.subscribed.len() >= MAX_SUBSCRIPTIONS {
            return self.tell_once(&name, state).await;
        }
        let subscribe = || {
            if is_known {
                // A second subscription to the same is answered like a first one.
                self.leave(state, name.clone());
            }
            self.begin(state, &name);
            self.changed(state, &name)
        };
        // Sending waits for this sidecar only: the others' turn is not spent on it.
        let Some(changed) = self.admission.turn(self.down.closed(), subscribe).await else {
            return Err(gone());
        };
        for resource in changed {
            self.send_resource(&resource).await?;
        }
        Ok(())
    }

    /// Whether this pod's sidecar may know a resource.
    fn may_know(&self, (kind, name): &Name) -> bool {
        use ResourceType::{Access, Inbound, Limits, Logs, Mtls, Workload};
        let is_of_a_pod =
            matches!(ResourceType::try_from(*kind), Ok(Inbound | Workload | Mtls | Access | Limits | Logs));
        !is_of_a_pod || **name == *self.pod_uid
    }

    /// A crawler: what it needs now it is told, and nothing of what changes later.
    async fn tell_once(&self, name: &Name, state: &State) -> Result<(), Status> {
        let Some((endpoints, resource)) = self.compiled(name) else { return Ok(()) };
        for name in &endpoints {
            if state.subscribed.contains_key(name) {
                continue;
            }
            if let Some((_, endpoints)) = self.compiled(name) {
                self.send(endpoints).await?;
            }
        }
        self.send(resource).await
    }

    /// A resource that is not subscribed, as a message behind the endpoints that it leads to.
    fn compiled(&self, name: &Name) -> Option<(Vec<Name>, Box<OperatorMessage>)> {
        // Before the model is locked again: a reader that waits for itself waits for ever.
        let variant = self.variant(name);
        let compiled = self.hub.model().compile(&resource_name(name), &variant)?;
        let endpoints = compiled.endpoints().into_iter().map(endpoints_name).collect();
        Some((endpoints, boxed(operator_message::Message::Resource(compiled.resource))))
    }

    /// Begins a subscription.
    fn begin(&self, state: &mut State, name: &Name) {
        let is_held = state.held.contains_key(name);
        if !is_held {
            // A process that holds nothing enforces nothing, whatever its predecessor said.
            self.relay.report(&self.pod_uid, SidecarEvent::Unsubscribed(name.clone()));
        }
        let variant = self.variant(name);
        self.cache.subscribe(&(name.clone(), variant.clone()), &state.wake);
        let is_silent = !is_held && !is_noted(name);
        let subscription = Subscription { variant, is_silent, ..Subscription::default() };
        state.subscribed.insert(name.clone(), subscription);
    }

    /// Ends a subscription, and with that to the last route the one to its endpoints.
    fn leave(&self, state: &mut State, name: Name) {
        // Also what it claimed to hold from before.
        state.held.remove(&name);
        Self::left(&mut state.lag, &name);
        let Some(subscription) = state.subscribed.remove(&name) else { return };
        self.cache.unsubscribe(&(name.clone(), subscription.variant), &state.wake);
        self.relay.report(&self.pod_uid, SidecarEvent::Unsubscribed(name));
        for endpoints in leads_to(subscription.followed.as_deref()) {
            self.lead_away(state, endpoints);
        }
    }

    /// A route leads to these endpoints no more.
    fn lead_away(&self, state: &mut State, endpoints: &Name) {
        let Some(count) = state.routes.get_mut(endpoints) else { return };
        *count -= 1;
        if *count == 0 {
            state.routes.remove(endpoints);
            self.leave(state, endpoints.clone());
        }
    }

    /// The namespace of the pod. Empty: the pod is gone already.
    fn namespace(&self) -> Arc<str> {
        let model = self.hub.model();
        model.pod(&self.pod_uid).map(|pod| Arc::clone(&pod.namespace)).unwrap_or_default()
    }

    fn variant(&self, name: &Name) -> Variant {
        self.hub.model().variant(&resource_name(name), &self.pod_uid)
    }

    /// What is to be sent now that a resource may have changed: the endpoints that a route has begun to lead to, and the
    /// resource.
    fn changed(&self, state: &mut State, name: &Name) -> Vec<Arc<Shared>> {
        let renewed = self.renewed(state, name);
        let mut changed = match name.0 == ResourceType::Route as i32 {
            true => self.follow(state, name),
            false => Vec::new(),
        };
        changed.extend(renewed);
        changed
    }

    /// Subscribes to the endpoints that a route leads to, and no more to those that it led to. Returns those that the
    /// sidecar does not hold.
    fn follow(&self, state: &mut State, route: &Name) -> Vec<Arc<Shared>> {
        let Some(subscription) = state.subscribed.get_mut(route) else { return Vec::new() };
        let now = subscription.sent.clone();
        let before = std::mem::replace(&mut subscription.followed, now.clone());
        let (now, before) = (leads_to(now.as_deref()), leads_to(before.as_deref()));
        if now == before {
            return Vec::new();
        }
        for endpoints in now {
            *state.routes.entry(endpoints.clone()).or_default() += 1;
        }
        for endpoints in before {
            self.lead_away(state, endpoints);
        }
        let mut changed = Vec::new();
        for endpoints in now {
            if !state.subscribed.contains_key(endpoints) && state.subscribed.len() < MAX_SUBSCRIPTIONS {
                self.begin(state, endpoints);
                changed.extend(self.renewed(state, endpoints));
            }
        }
        changed
    }

    /// A resource, unless the sidecar holds this version of it.
    fn renewed(&self, state: &mut State, name: &Name) -> Option<Arc<Shared>> {
        let subscription = state.subscribed.get_mut(name)?;
        let variant = self.variant(name);
        if variant != subscription.variant {
            let old = std::mem::replace(&mut subscription.variant, variant.clone());
            self.cache.subscribe(&(name.clone(), variant), &state.wake);
            self.cache.unsubscribe(&(name.clone(), old), &state.wake);
        }
        let id: Id = (name.clone(), subscription.variant.clone());
        let resource = self.cache.get(&self.hub, &id)?;
        let held = state.held.remove(name);
        let known = subscription.sent.as_deref().map(Shared::version);
        let same = known.or(held.as_deref()) == Some(resource.version());
        let first = subscription.sent.is_none();
        let before = subscription.sent.replace(Arc::clone(&resource));
        if same {
            // What it holds from before, it enforces.
            subscription.acked |= first;
            if subscription.acked {
                self.report_acked(name, subscription, &resource);
            }
            return None;
        }
        let before = match (before, std::mem::take(&mut subscription.acked)) {
            (Some(before), true) => Some(Before::Acked(before)),
            (Some(before), false) => Some(Before::Sent(before)),
            (None, _) => held.map(Before::Held),
        };
        if let Some(before) = before {
            self.sent_another(&mut state.lag, name, before);
        }
        // That it enforces another version with the same stamps makes no difference to anybody.
        let reported = match &subscription.reported {
            Some(Reported::Sent(stamps) | Reported::Acked(stamps)) => *stamps == resource.stamps,
            Some(Reported::Refused) => false,
            None => subscription.is_silent && resource.stamps.is_empty(),
        };
        if !reported {
            subscription.reported = Some(Reported::Sent(Arc::clone(&resource.stamps)));
            self.relay.report(&self.pod_uid, SidecarEvent::Sent(name.clone(), Arc::clone(&resource.stamps)));
        }
        state.sends_in_second += 1;
        Some(resource)
    }

    fn report_acked(&self, name: &Name, subscription: &mut Subscription, sent: &Shared) {
        if subscription.is_silent && subscription.reported.is_none() && sent.stamps.is_empty() {
            return;
        }
        let reported = Some(Reported::Acked(Arc::clone(&sent.stamps)));
        if subscription.reported != reported {
            subscription.reported = reported;
            self.relay.report(&self.pod_uid, SidecarEvent::Acked(name.clone(), Arc::clone(&sent.stamps)));
        }
    }

    async fn send_resource(&self, resource: &Shared) -> Result<(), Status> {
        self.send(boxed(operator_message::Message::Resource(Resource::clone(&resource.resource)))).await
    }

    async fn send(&self, message: Box<OperatorMessage>) -> Result<(), Status> {
        match timeout(READ_WITHIN, self.down.send(Ok(message))).await {
            Ok(sent) => sent.map_err(|_| gone()),
            Err(_) => {
                tracing::warn!(pod = self.pod_uid, "a sidecar reads nothing: its connection is closed");
                self.hang_up.notify_one();
                Err(Status::deadline_exceeded("the sidecar reads nothing"))
            }
        }
    }
}

/// The subscription that an answer is about: to the version that was sent last.
fn answered<'a>(
    state: &'a mut State,
    name: Option<Name>,
    version: &str,
) -> Option<(Name, &'a mut Subscription, Arc<Shared>)> {
    let name = name?;
    let subscription = state.subscribed.get_mut(&name)?;
    let sent = subscription.sent.clone().filter(|sent| sent.version() == version)?;
    Some((name, subscription, sent))
}

/// Boxed before it is sent: the future of every session would have room for it.
fn boxed(message: operator_message::Message) -> Box<OperatorMessage> {
    Box::new(OperatorMessage { message: Some(message) })
}

fn acknowledgement(ack: TelemetryAck) -> Box<OperatorMessage> {
    boxed(operator_message::Message::TelemetryAck(ack))
}

/// The endpoints that a version of a route leads to.
fn leads_to(shared: Option<&Shared>) -> &[Name] {
    match shared {
        Some(shared) => &shared.leads_to,
        None => &[],
    }
}

fn is_endpoints((kind, _): &Name) -> bool {
    *kind == ResourceType::Endpoints as i32
}

/// Whether the tracker has to know of a subscription even where it carries no stamp: what a sidecar sends to is
/// asked for.
fn is_noted((kind, _): &Name) -> bool {
    use ResourceType::{Destination, Inbound, Route};
    matches!(ResourceType::try_from(*kind), Ok(Destination | Inbound | Route))
}

fn gone() -> Status {
    Status::cancelled("the sidecar is gone")
}

impl State {
    fn new(wake: Arc<Wake>, held: HashMap<Name, String>) -> Self {
        Self {
            wake,
            tapped: None,
            subscribed: HashMap::new(),
            lag: Lag::default(),
            routes: HashMap::new(),
            held,
            sends_in_second: 0,
            second: Instant::now(),
            next_report: None,
        }
    }

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

#[cfg(test)]
mod tests;
