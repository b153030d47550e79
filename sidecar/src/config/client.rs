//! The discovery stream: says what is wanted, takes what comes, acknowledges or refuses each
//! resource, reports telemetry, and begins anew with jitter when it breaks.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tulle_mesh::proto::discovery_client::DiscoveryClient;
use tulle_mesh::proto::{
    Ack, Hello, Nack, OperatorMessage, Resource, ResourceName, ResourceType, SidecarMessage, Subscribe,
    Unsubscribe, operator_message, sidecar_message,
};

use super::resource::{self, Refused};
use super::store::{ConfigStore, Wanted};
use crate::settings::Settings;
use crate::telemetry::Telemetry;
use crate::telemetry::report::Reporter;
use crate::tls::{TlsStore, peer_identity};

/// The longest wait before the stream is tried again.
const MAX_BACKOFF: Duration = Duration::from_secs(15);
/// What has not been used for one to two of these is forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(300);

/// An HTTP/2 connection to the operator, as tonic wants it.
#[derive(Clone)]
pub struct Operator(SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Operator {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

impl Operator {
    /// Connects; the operator's certificate must name the operator.
    ///
    /// # Errors
    /// What could not be reached or was not the operator.
    pub async fn connect(settings: &Settings, tls: Arc<rustls::ClientConfig>) -> Result<Self> {
        let connect = async {
            let stream = TcpStream::connect(&settings.operator).await;
            let stream =
                stream.with_context(|| format!("cannot reach the operator at {}", settings.operator))?;
            stream.set_nodelay(true)?;
            let name = ServerName::try_from("operator.tulle").context("a server name")?;
            let stream =
                TlsConnector::from(tls).connect(name, stream).await.context("TLS to the operator")?;
            let peer = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let identity = peer_identity(peer.context("the operator showed no certificate")?)?;
            if identity != settings.operator_identity {
                bail!("{} is not the operator: its certificate names {identity}", settings.operator);
            }
            let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true);
            let (send, connection) = builder.handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            Ok(Self(send))
        };
        timeout(Duration::from_secs(10), connect)
            .await
            .context("connecting to the operator took longer than 10 s")?
    }
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
    let mut reporter = Reporter::new(telemetry);
    let (forgetting, stopped) = (Arc::clone(&store), stop.clone());
    tokio::spawn(async move {
        while timeout(FORGET_EVERY, stopped.cancelled()).await.is_err() {
            // Without an operator, what is known is all there is.
            if forgetting.is_connected() {
                forgetting.forget_idle();
            }
        }
    });
    let mut versions = HashMap::new();
    let mut backoff = Duration::from_millis(200);
    loop {
        tls.ready().await;
        let mut session = Session {
            settings: &settings,
            store: &store,
            reporter: &mut reporter,
            versions: &mut versions,
            wanted: &mut wanted,
            stop: &stop,
            stop_seen: false,
        };
        let started = Instant::now();
        let end = session.run(&tls).await;
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
    versions: &'a mut HashMap<(i32, String), String>,
    wanted: &'a mut mpsc::UnboundedReceiver<Wanted>,
    stop: &'a CancellationToken,
    /// Told to stop: the session ends once everything has been reported.
    stop_seen: bool,
}

impl Session<'_> {
    async fn run(&mut self, tls: &TlsStore) -> Result<()> {
        let configs = tls.current().context("no certificate yet")?;
        let operator = Operator::connect(self.settings, Arc::clone(&configs.operator_client)).await?;
        let origin = http::Uri::from_static("http://operator.tulle");
        let mut client = DiscoveryClient::with_origin(operator, origin).max_decoding_message_size(16 << 20);
        let (up, messages) = mpsc::channel(64);
        self.begin(&up).await?;
        let mut down = client.stream(ReceiverStream::new(messages)).await?.into_inner();
        self.store.set_connected(true);
        tracing::info!("the discovery stream is up");
        // What was asked for while the stream was down is among these.
        while self.wanted.try_recv().is_ok() {}
        for address in self.store.subscribed() {
            self.want(Wanted::Subscribe(address), &up).await?;
        }
        let mut look = Instant::now();
        loop {
            tokio::select! {
                message = down.message() => match message? {
                    Some(message) => self.received(message, &up).await?,
                    None => bail!("the operator closed the stream"),
                },
                Some(wanted) = self.wanted.recv() => self.want(wanted, &up).await?,
                () = sleep_until(look) => {
                    look = Instant::now() + Reporter::pause();
                    self.report(&up).await?;
                }
                () = self.stop.cancelled(), if !self.stop_seen => {
                    self.stop_seen = true;
                    self.report(&up).await?;
                }
            }
            if self.stop_seen && self.reporter.is_idle() {
                self.report(&up).await?;
                if self.reporter.is_idle() {
                    return Ok(());
                }
            }
        }
    }

    async fn report(&mut self, up: &mpsc::Sender<SidecarMessage>) -> Result<()> {
        if self.stop_seen {
            self.reporter.flush();
        }
        match self.reporter.next_report(Instant::now()) {
            Some(report) => send(up, sidecar_message::Message::Telemetry(report)).await,
            None => Ok(()),
        }
    }

    async fn begin(&mut self, up: &mpsc::Sender<SidecarMessage>) -> Result<()> {
        // Only what is really here may be claimed: the operator does not send it again.
        let known: Vec<String> = self.store.known().iter().map(ToString::to_string).collect();
        self.versions
            .retain(|(kind, name), _| *kind != ResourceType::Destination as i32 || known.contains(name));
        let held = self.versions.iter().map(|((kind, name), version)| tulle_mesh::proto::Held {
            name: Some(ResourceName { r#type: *kind, cluster: String::new(), name: name.clone() }),
            version: version.clone(),
        });
        let hello = Hello {
            pod_namespace: self.settings.pod_namespace.clone(),
            pod_name: self.settings.pod_name.clone(),
            pod_uid: self.settings.pod_uid.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: self.settings.features.iter().map(|feature| (*feature).to_owned()).collect(),
            held: held.collect(),
        };
        self.reporter.reconnected();
        send(up, sidecar_message::Message::Hello(hello)).await?;
        let inbound = name(ResourceType::Inbound, self.settings.pod_uid.clone());
        send(up, sidecar_message::Message::Subscribe(Subscribe { name: Some(inbound) })).await?;
        Ok(())
    }

    async fn want(&mut self, wanted: Wanted, up: &mpsc::Sender<SidecarMessage>) -> Result<()> {
        let destination = |address: SocketAddr| name(ResourceType::Destination, address.to_string());
        let message = match wanted {
            Wanted::Subscribe(address) => {
                sidecar_message::Message::Subscribe(Subscribe { name: Some(destination(address)) })
            }
            Wanted::Unsubscribe(address) => {
                self.versions.remove(&(ResourceType::Destination as i32, address.to_string()));
                sidecar_message::Message::Unsubscribe(Unsubscribe { name: Some(destination(address)) })
            }
        };
        send(up, message).await
    }

    async fn received(&mut self, message: OperatorMessage, up: &mpsc::Sender<SidecarMessage>) -> Result<()> {
        match message.message {
            Some(operator_message::Message::Resource(resource)) => {
                let answer = self.apply(&resource);
                send(up, answer).await
            }
            Some(operator_message::Message::TelemetryAck(ack)) => {
                self.reporter.acknowledged(ack.sequence);
                Ok(())
            }
            Some(operator_message::Message::Gone(_)) | None => Ok(()),
        }
    }

    fn apply(&mut self, resource: &Resource) -> sidecar_message::Message {
        let (name, version) = (resource.name.clone(), resource.version.clone());
        match resource::decode(resource, &self.settings.features) {
            Ok(decoded) => {
                match decoded {
                    resource::Resource::Inbound(inbound) => self.store.set_inbound(inbound),
                    resource::Resource::Destination(address, destination) => {
                        self.store.set_destination(address, destination);
                    }
                }
                if let Some(name) = &name {
                    self.versions.insert((name.r#type, name.name.clone()), version.clone());
                }
                sidecar_message::Message::Ack(Ack { name, version })
            }
            Err(Refused(reason)) => {
                tracing::error!(reason, resource = ?name, "refused a resource; the last good one stays");
                sidecar_message::Message::Nack(Nack { name, version, reason })
            }
        }
    }
}

fn name(kind: ResourceType, name: String) -> ResourceName {
    ResourceName { r#type: kind as i32, cluster: String::new(), name }
}

async fn send(up: &mpsc::Sender<SidecarMessage>, message: sidecar_message::Message) -> Result<()> {
    let message = SidecarMessage { message: Some(message) };
    up.send(message).await.map_err(|_| anyhow::anyhow!("the discovery stream is closed"))
}
