//! The discovery stream: subscribes to what is used, takes what comes, acknowledges or refuses each resource, reports
//! telemetry, shows requests to whoever taps, and begins anew with jitter when it breaks.
//!
//! It subscribes to the small resources: the sections of its own pod, a route for each address that is dialled, and the
//! endpoints that a route names. An operator that only has `Inbound` and `Destination` would not answer them: an upgrade
//! begins with the operator.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::future::{Either, select};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tulle_mesh::proto::discovery_client::DiscoveryClient;
use tulle_mesh::proto::{
    Ack, Hello, Nack, OperatorMessage, Resource, ResourceType, SidecarMessage, Subscribe, Tap, Unsubscribe,
    operator_message, sidecar_message,
};

use super::accepted::Key;
use super::resource::{self, Refused};
use super::store::{ConfigStore, Name, Wanted};
use crate::channel::Channel;
use crate::settings::Settings;
use crate::tap::Collector;
use crate::telemetry::Telemetry;
use crate::telemetry::report::Reporter;
use crate::tls::{TlsStore, peer_identity};

/// How long connecting to the operator may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// When its addresses are tried beside its name, and how long an address may take to accept while another is left to try.
const NEXT_AFTER: Duration = Duration::from_secs(2);
/// How long the lookup of its name may take: less than all together, so that the reason is logged.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(8);
/// The longest wait before the stream is tried again.
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// What has not been used for one to two of these is forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(300);
/// Tells the operator that this sidecar subscribes to small resources, whatever `TULLE_FEATURES` holds: it is about the
/// protocol, not about what can be enforced.
const SMALL_RESOURCES: &str = "small-resources";
/// Tells the operator that this sidecar shows requests when it is asked to: about the protocol too.
const TAP: &str = "tap";
/// Messages that the stream takes before the operator reads them.
const MAX_UNREAD: usize = 64;
/// Requests of taps are gathered while fewer messages than this are unread: each may have a quarter of a megabyte, and
/// what an operator does not read must not fill the pod's memory.
const MAX_UNREAD_OF_TAPS: usize = 4;
/// Messages that may wait to be sent before nothing more is read: more than all subscriptions and their answers.
const MAX_OUTBOX: usize = 30_000;
/// The sections of what this pod enforces; their name is the pod's uid.
const SECTIONS: [ResourceType; 5] = [
    ResourceType::Workload,
    ResourceType::Mtls,
    ResourceType::Access,
    ResourceType::Limits,
    ResourceType::Logs,
];

impl Key {
    /// Whether a good version of it is in the store. Sections stay for ever.
    fn is_held(&self, store: &ConfigStore) -> bool {
        match ResourceType::try_from(self.kind) {
            Ok(ResourceType::Route) => {
                self.name.parse().is_ok_and(|address| store.holds(&Name::Route(address)))
            }
            Ok(ResourceType::Endpoints) => store.holds(&Name::Endpoints(self.name.as_str().into())),
            _ => true,
        }
    }
}

impl From<&Name> for Key {
    fn from(name: &Name) -> Self {
        match name {
            Name::Route(address) => Self { kind: ResourceType::Route.into(), name: address.to_string() },
            Name::Endpoints(name) => Self { kind: ResourceType::Endpoints.into(), name: name.to_string() },
        }
    }
}

/// Connects; the operator's certificate must name the operator.
///
/// # Errors
/// What could not be reached or was not the operator.
pub async fn connect(settings: &Settings, tls: Arc<rustls::ClientConfig>) -> Result<Channel> {
    timeout(CONNECT_TIMEOUT, reach(settings, &tls))
        .await
        .context("connecting to the operator took longer than 10 s")?
}

/// Tries the operator's name, and the addresses of its Service once the name has failed, or beside it after a while.
///
/// The name alone is not enough: a pod with `dnsPolicy: Default` or `None` may be unable to resolve Services, and its
/// name server may answer with an address outside the cluster. Whoever answers has to prove that it is the operator.
/// Neither are the addresses: a Service that was deleted and created again has others. So a name server that is slow, or an
/// operator that is busy with the handshakes of a whole cluster, keeps its time while the addresses are tried.
async fn reach(settings: &Settings, tls: &Arc<rustls::ClientConfig>) -> Result<Channel> {
    let found = OnceLock::new();
    let mut by_name = pin!(reach_by_name(settings, tls, &found));
    let failed = match timeout(NEXT_AFTER, by_name.as_mut()).await {
        Ok(Ok(channel)) => return Ok(channel),
        Ok(Err(failed)) => Some(failed),
        Err(_) => None,
    };
    let tried = found.get().map(Vec::as_slice).unwrap_or_default();
    let others = settings.operator_addresses.iter().filter(|address| !tried.contains(address));
    let others: Vec<SocketAddr> = others.copied().collect();
    let by_address = pin!(dial_each(&others, settings, tls));
    match failed {
        Some(failed) if others.is_empty() => Err(failed),
        Some(failed) => by_address.await.map_err(|other| both(&failed, &other)),
        None if others.is_empty() => by_name.await,
        None => match select(by_name, by_address).await {
            Either::Left((Ok(channel), _)) | Either::Right((Ok(channel), _)) => Ok(channel),
            Either::Left((Err(failed), rest)) => rest.await.map_err(|other| both(&failed, &other)),
            Either::Right((Err(failed), rest)) => rest.await.map_err(|other| both(&other, &failed)),
        },
    }
}

/// Resolves the operator's name as the pod resolves names, and tries what is `found`.
async fn reach_by_name(
    settings: &Settings,
    tls: &Arc<rustls::ClientConfig>,
    found: &OnceLock<Vec<SocketAddr>>,
) -> Result<Channel> {
    let name = &settings.operator;
    let addresses = timeout(LOOKUP_TIMEOUT, lookup_host(name.as_str())).await;
    let addresses =
        addresses.with_context(|| format!("looking up {name} took longer than {LOOKUP_TIMEOUT:?}"))?;
    let addresses: Vec<SocketAddr> = addresses.with_context(|| format!("cannot resolve {name}"))?.collect();
    dial_each(found.get_or_init(|| addresses), settings, tls).await
}

/// Tries one address after the other.
async fn dial_each(
    addresses: &[SocketAddr],
    settings: &Settings,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<Channel> {
    let mut error = None;
    let mut rest = addresses.iter().peekable();
    while let Some(address) = rest.next() {
        let limit = if rest.peek().is_some() { NEXT_AFTER } else { CONNECT_TIMEOUT };
        match dial(*address, limit, settings, tls).await {
            Ok(channel) => return Ok(channel),
            Err(failed) => {
                error = Some(match error {
                    Some(before) => both(&before, &failed),
                    None => failed,
                });
            }
        }
    }
    Err(error.unwrap_or_else(|| anyhow::anyhow!("{} has no address", settings.operator)))
}

/// Why two ways have failed.
fn both(first: &anyhow::Error, second: &anyhow::Error) -> anyhow::Error {
    anyhow::anyhow!("{first:#}; {second:#}")
}

/// Connects to an address, which has this long to accept, if the operator is there.
async fn dial(
    address: SocketAddr,
    limit: Duration,
    settings: &Settings,
    tls: &Arc<rustls::ClientConfig>,
) -> Result<Channel> {
    let stream = timeout(limit, TcpStream::connect(address)).await;
    let stream = stream.with_context(|| format!("{address} did not accept within {limit:?}"))?;
    let stream = stream.with_context(|| format!("cannot reach the operator at {address}"))?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("operator.tulle").context("a server name")?;
    let stream = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
    let stream = stream.with_context(|| format!("TLS to the operator at {address}"))?;
    let peer = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = peer_identity(peer.context("the operator showed no certificate")?)?;
    if identity != settings.operator_identity {
        bail!("{address} is not the operator: its certificate names {identity}");
    }
    let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true);
    let (send, connection) = builder.handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(Channel(send))
}

/// Keeps the discovery stream up until `stop`, and then reports what has been counted last.
pub async fn run(
    settings: Arc<Settings>,
    store: Arc<ConfigStore>,
    tls: Arc<TlsStore>,
    telemetry: Arc<Telemetry>,
    mut wanted: mpsc::UnboundedReceiver<Wanted>,
    stop: CancellationToken,
) {
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let (forgetting, stopped) = (Arc::clone(&store), stop.clone());
    tokio::spawn(async move {
        while timeout(FORGET_EVERY, stopped.cancelled()).await.is_err() {
            // Without an operator, what is known is all there is.
            if forgetting.is_connected() {
                forgetting.forget_idle();
            }
        }
    });
    let mut backoff = Duration::from_millis(200);
    loop {
        tls.ready().await;
        let mut session = Session {
            settings: &settings,
            store: &store,
            reporter: &mut reporter,
            wanted: &mut wanted,
            stop: &stop,
            stop_seen: false,
            outbox: VecDeque::new(),
            tap: Collector::new(&telemetry.taps),
        };
        let started = Instant::now();
        let end = session.run(&tls).await;
        // Its taps end with it, and not after the next pause.
        drop(session);
        store.set_connected(false);
        if stop.is_cancelled() {
            return;
        }
        if let Err(error) = end {
            tracing::warn!(
                error = format!("{error:#}"),
                "the discovery stream ended; what is known stays in force"
            );
        }
        if started.elapsed() > MAX_BACKOFF {
            backoff = Duration::from_millis(200);
        }
        // Jittered, so that the sidecars of a whole cluster don't come back at once.
        sleep(backoff.mul_f64(0.5 + fastrand::f64())).await;
        backoff = (backoff * 2).min(MAX_BACKOFF);
    }
}

struct Session<'a> {
    settings: &'a Settings,
    store: &'a ConfigStore,
    reporter: &'a mut Reporter,
    wanted: &'a mut mpsc::UnboundedReceiver<Wanted>,
    stop: &'a CancellationToken,
    /// Told to stop: the session ends once everything has been reported.
    stop_seen: bool,
    /// What is to be sent: subscriptions, answers, reports.
    outbox: VecDeque<SidecarMessage>,
    /// Requests that the operator has asked to see.
    tap: Collector<'a>,
}

impl Session<'_> {
    async fn run(&mut self, tls: &TlsStore) -> Result<()> {
        let configs = tls.current().context("no certificate yet")?;
        let operator = connect(self.settings, Arc::clone(&configs.operator_client)).await?;
        let origin = http::Uri::from_static("http://operator.tulle");
        let mut client = DiscoveryClient::with_origin(operator, origin).max_decoding_message_size(16 << 20);
        let (up, messages) = mpsc::channel(MAX_UNREAD);
        self.begin();
        while let Some(message) = self.outbox.pop_front() {
            up.send(message).await.map_err(|_| closed())?;
        }
        let mut down = client.stream(ReceiverStream::new(messages)).await?.into_inner();
        self.store.set_connected(true);
        tracing::info!("the discovery stream is up");
        // What was asked for while the stream was down is among these.
        while self.wanted.try_recv().is_ok() {}
        // What was forgotten since it was claimed as held, and may have been dialled again, is sent anew.
        for key in self.not_held() {
            self.forget(&key);
            let name = Some(key.on_the_wire());
            self.send(sidecar_message::Message::Unsubscribe(Unsubscribe { name }));
        }
        for name in self.store.subscribed() {
            self.want(Wanted::Subscribe(name));
        }
        let mut look = Instant::now();
        loop {
            tokio::select! {
                // Both ways at once: an operator that waits until it is read does not read.
                permit = up.reserve(), if !self.outbox.is_empty() => {
                    let permit = permit.map_err(|_| closed())?;
                    if let Some(message) = self.outbox.pop_front() {
                        permit.send(message);
                    }
                }
                message = down.message(), if self.outbox.len() < MAX_OUTBOX => match message? {
                    Some(message) => self.received(message),
                    None => bail!("the operator closed the stream"),
                },
                Some(wanted) = self.wanted.recv(), if self.outbox.len() < MAX_OUTBOX => self.want(wanted),
                () = self.tap.ready(), if self.may_show(&up) => self.show(),
                () = sleep_until(look) => {
                    look = Instant::now() + Reporter::pause();
                    self.report(tls);
                }
                () = self.stop.cancelled(), if !self.stop_seen => {
                    self.stop_seen = true;
                    self.report(tls);
                }
            }
            if self.stop_seen && self.reporter.is_idle() {
                self.report(tls);
                if self.reporter.is_idle() {
                    return Ok(());
                }
            }
        }
    }

    /// Whether requests of taps may be gathered into messages now.
    fn may_show(&self, up: &mpsc::Sender<SidecarMessage>) -> bool {
        let unread = up.max_capacity().saturating_sub(up.capacity());
        self.tap.is_open() && self.outbox.is_empty() && unread < MAX_UNREAD_OF_TAPS
    }

    fn show(&mut self) {
        for tapped in self.tap.take(Instant::now()) {
            self.send(sidecar_message::Message::Tapped(tapped));
        }
    }

    /// A tap that cannot be served is answered with the reason.
    fn open_tap(&mut self, tap: &Tap) {
        if let Err(why) = self.tap.open(tap) {
            tracing::warn!(tap = tap.id, "cannot show the requests that the operator asks for: {why}");
            self.send(sidecar_message::Message::Tapped(why.answer(tap.id)));
        }
    }

    fn report(&mut self, tls: &TlsStore) {
        if self.stop_seen {
            self.reporter.flush();
        }
        if let Some(configs) = tls.current() {
            self.reporter.set_certificate(configs.not_after);
        }
        if let Some(report) = self.reporter.next_report(Instant::now()) {
            self.send(sidecar_message::Message::Telemetry(report));
        }
    }

    fn begin(&mut self) {
        // Only what is really here may be claimed: the operator does not send it again.
        for key in self.not_held() {
            self.forget(&key);
        }
        let hello = Hello {
            pod_namespace: self.settings.pod_namespace.clone(),
            pod_name: self.settings.pod_name.clone(),
            pod_uid: self.settings.pod_uid.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: features(&self.settings.features),
            held: self.store.accepted().held(),
        };
        self.reporter.reconnected();
        self.send(sidecar_message::Message::Hello(hello));
        for kind in SECTIONS {
            self.subscribe(&Key { kind: kind.into(), name: self.settings.pod_uid.clone() });
        }
    }

    /// Resources with a version that are not in the store any more.
    fn not_held(&self) -> Vec<Key> {
        let keys = self.store.accepted().keys().into_iter();
        keys.filter(|key| !key.is_held(self.store)).collect()
    }

    /// Its version is not claimed as held any more.
    fn forget(&self, key: &Key) {
        self.store.accepted().forget(key);
    }

    fn subscribe(&mut self, key: &Key) {
        self.send(sidecar_message::Message::Subscribe(Subscribe { name: Some(key.on_the_wire()) }));
    }

    fn send(&mut self, message: sidecar_message::Message) {
        self.outbox.push_back(SidecarMessage { message: Some(message) });
    }

    fn want(&mut self, wanted: Wanted) {
        match wanted {
            Wanted::Subscribe(name) => self.subscribe(&Key::from(&name)),
            Wanted::Unsubscribe(name) => {
                let key = Key::from(&name);
                self.forget(&key);
                let name = Some(key.on_the_wire());
                self.send(sidecar_message::Message::Unsubscribe(Unsubscribe { name }));
            }
        }
    }

    fn received(&mut self, message: OperatorMessage) {
        match message.message {
            Some(operator_message::Message::Resource(resource)) => {
                let answer = self.apply(&resource);
                self.send(answer);
            }
            Some(operator_message::Message::TelemetryAck(ack)) => self.reporter.acknowledged(ack),
            Some(operator_message::Message::Tap(tap)) => self.open_tap(&tap),
            Some(operator_message::Message::Untap(untap)) => self.tap.close(untap.id),
            Some(operator_message::Message::Gone(_)) | None => {}
        }
    }

    fn apply(&mut self, resource: &Resource) -> sidecar_message::Message {
        let (name, version) = (resource.name.clone(), resource.version.clone());
        match resource::decode(resource, &self.settings.features) {
            Ok(decoded) => {
                self.store.apply(decoded);
                // Of what was forgotten meanwhile nothing is kept.
                if name.as_ref().is_some_and(|name| Key::of(name).is_held(self.store)) {
                    self.store.accepted().accept(resource);
                }
                sidecar_message::Message::Ack(Ack { name, version })
            }
            Err(Refused(reason)) => {
                tracing::error!(reason, resource = ?name, "refused a resource; the last good one stays");
                if let Some(name) = &name {
                    self.store.refuse(name, resource::usable(resource).map(|(_, route)| route));
                }
                sidecar_message::Message::Nack(Nack { name, version, reason })
            }
        }
    }
}

/// What the operator is told that this sidecar can do: what it enforces, and what its protocol has.
fn features(enforced: &[&'static str]) -> Vec<String> {
    let mut features = enforced.to_vec();
    for always in [SMALL_RESOURCES, TAP] {
        if !features.contains(&always) {
            features.push(always);
        }
    }
    features.into_iter().map(str::to_owned).collect()
}

fn closed() -> anyhow::Error {
    anyhow::anyhow!("the discovery stream is closed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_is_told_what_the_protocol_has_whatever_is_enforced() {
        assert_eq!(features(&[]), ["small-resources", "tap"]);
        assert_eq!(features(&["access-v1", "tap"]), ["access-v1", "tap", "small-resources"]);
    }
}
