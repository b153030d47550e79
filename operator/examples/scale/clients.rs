//! Simulated sidecars: each a TLS connection with a discovery stream that acknowledges what it is sent.
//!
//! Commands come on standard input, one a line; each is answered with a number.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tulle_mesh::proto::discovery_client::DiscoveryClient;
use tulle_mesh::proto::{
    Ack, Hello, Resource, ResourceName, ResourceType, SidecarMessage, Subscribe, destination,
    operator_message, resource, sidecar_message,
};
use tulle_mesh::svid::SvidVerifier;
use tulle_sidecar::config::client::Operator;
use tulle_sidecar::settings::Settings;

use crate::world;

#[derive(Default)]
struct Progress {
    /// Streams that have everything.
    served: AtomicU64,
    /// The longest that a change took to arrive, in milliseconds.
    worst: AtomicU64,
}

/// Runs until standard input ends.
pub fn run(operator: SocketAddr, folder: &Path) {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let tls = Arc::new(tls(folder));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let progress = Arc::new(Progress::default());
        let mut streams = JoinSet::new();
        let (sender, mut commands) = mpsc::channel(1);
        std::thread::spawn(move || {
            std::io::stdin().lines().map_while(Result::ok).try_for_each(|line| sender.blocking_send(line))
        });
        while let Some(command) = commands.recv().await {
            let answer = match command.as_str() {
                "connect" => {
                    streams.shutdown().await;
                    progress.served.store(0, Ordering::Relaxed);
                    let started = Instant::now();
                    for number in 0..world::STREAMS {
                        let (tls, progress) = (Arc::clone(&tls), Arc::clone(&progress));
                        streams.spawn(stay(number, operator, tls, progress));
                    }
                    served(&progress).await;
                    started.elapsed().as_secs_f64()
                }
                _ => progress.worst.swap(0, Ordering::Relaxed) as f64 / 1000.0,
            };
            println!("{answer}");
        }
    });
}

async fn served(progress: &Progress) {
    let everybody = async {
        while progress.served.load(Ordering::Relaxed) < u64::from(world::STREAMS) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    // The answer says how long it took: the bound is the answer of those that were not served.
    let _ = timeout(Duration::from_secs(50), everybody).await;
}

fn tls(folder: &Path) -> ClientConfig {
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    let verifier = SvidVerifier::new("cluster.local", &[CertificateDer::from(read("root.der"))]);
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(read("key.der")));
    let mut config = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![CertificateDer::from(read("leaf.der"))], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    config
}

/// Keeps a stream, as a sidecar does.
async fn stay(number: u32, operator: SocketAddr, tls: Arc<ClientConfig>, progress: Arc<Progress>) {
    let settings = Settings {
        pod_name: world::uid(number).to_string(),
        pod_namespace: "shop".into(),
        pod_uid: world::uid(number).to_string(),
        pod_ips: Vec::new(),
        trust_domain: "cluster.local".into(),
        operator: operator.to_string(),
        operator_identity: world::id("operator"),
        token_file: String::new(),
        trust_file: String::new(),
        probes: Vec::new(),
        workers: 1,
        features: tulle_mesh::features::ALL.to_vec(),
    };
    loop {
        if let Err(error) = stream(number, &settings, Arc::clone(&tls), &progress).await {
            eprintln!("stream {number}: {error:#}");
        }
        sleep(Duration::from_millis(200)).await;
    }
}

async fn stream(
    number: u32,
    settings: &Settings,
    tls: Arc<ClientConfig>,
    progress: &Progress,
) -> anyhow::Result<()> {
    let operator = Operator::connect(settings, tls).await?;
    let mut client = DiscoveryClient::with_origin(operator, http::Uri::from_static("http://operator.tulle"));
    let (up, messages) = mpsc::channel(64);
    let say = |message| SidecarMessage { message: Some(message) };
    let hello = Hello { pod_uid: settings.pod_uid.clone(), ..Hello::default() };
    up.send(say(sidecar_message::Message::Hello(hello))).await?;
    let name = |kind: ResourceType, name| ResourceName { r#type: kind.into(), cluster: String::new(), name };
    let mut names = vec![name(ResourceType::Inbound, settings.pod_uid.clone())];
    names.extend(world::destinations(number).map(|to| name(ResourceType::Destination, to.to_string())));
    let all = names.len();
    for name in names {
        up.send(say(sidecar_message::Message::Subscribe(Subscribe { name: Some(name) }))).await?;
    }
    let mut down = client.stream(ReceiverStream::new(messages)).await?.into_inner();
    let mut known = HashSet::new();
    let mut newest = 0;
    while let Some(message) = down.message().await? {
        let Some(operator_message::Message::Resource(resource)) = message.message else { continue };
        note_delay(&resource, &mut newest, progress);
        let name = resource.name.clone();
        let id = name.clone().map(|name| (name.r#type, name.name));
        let ack = Ack { name, version: resource.version };
        up.send(say(sidecar_message::Message::Ack(ack))).await?;
        if known.insert(id) && known.len() == all {
            progress.served.fetch_add(1, Ordering::Relaxed);
        }
    }
    anyhow::bail!("the operator closed the stream")
}

/// Restarted pods have the time of their restart as their revision: how late is the newest?
fn note_delay(resource: &Resource, newest: &mut u64, progress: &Progress) {
    let Some(resource::Body::Destination(destination)) = &resource.body else { return };
    let Some(destination::Kind::Service(service)) = &destination.kind else { return };
    let times = service.endpoints.iter().filter_map(|endpoint| endpoint.revision.parse::<u64>().ok());
    let latest = times.max().unwrap_or(0);
    if latest > *newest && latest > 1_000_000 {
        *newest = latest;
        progress.worst.fetch_max(now_millis().saturating_sub(latest), Ordering::Relaxed);
    }
}

/// Milliseconds since 1970.
pub fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
