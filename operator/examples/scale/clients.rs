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
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tulle_mesh::proto::{Resource, ResourceType, resource, route};

use crate::client::{Certificate, Stream, name};
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
    Certificate { root: read("root.der"), leaf: read("leaf.der"), key: read("key.der") }.tls()
}

/// Keeps a stream, as a sidecar does.
async fn stay(number: u32, operator: SocketAddr, tls: Arc<ClientConfig>, progress: Arc<Progress>) {
    loop {
        if let Err(error) = stream(number, operator, Arc::clone(&tls), &progress).await {
            eprintln!("stream {number}: {error:#}");
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// Subscribes to what its pod enforces and to a route for each address; to the endpoints that a route leads to when it
/// learns their name, although they are on the way already.
async fn stream(
    number: u32,
    operator: SocketAddr,
    tls: Arc<ClientConfig>,
    progress: &Progress,
) -> anyhow::Result<()> {
    let uid = world::uid(number);
    let sections = [ResourceType::Workload, ResourceType::Mtls, ResourceType::Access];
    let mut names: Vec<_> = sections.map(|kind| name(kind, &*uid)).into();
    names.extend(world::destinations(number).map(|to| name(ResourceType::Route, to.to_string())));
    // Each address leads to endpoints of its own.
    let all = names.len() + world::DESTINATIONS as usize;
    let mut stream = Stream::open(operator, tls, &uid, names).await?;
    let mut known = HashSet::new();
    let mut newest = 0;
    while let Some(resource) = stream.next().await? {
        note_delay(&resource, &mut newest, progress);
        if let Some(endpoints) = leads_to(&resource) {
            stream.subscribe(name(ResourceType::Endpoints, endpoints)).await?;
        }
        let id = resource.name.map(|name| (name.r#type, name.name));
        if known.insert(id) && known.len() == all {
            progress.served.fetch_add(1, Ordering::Relaxed);
        }
    }
    anyhow::bail!("the operator closed the stream")
}

/// The name of the endpoints that a route leads to.
fn leads_to(resource: &Resource) -> Option<&str> {
    let Some(resource::Body::Route(route)) = &resource.body else { return None };
    let Some(route::Kind::Service(service)) = &route.kind else { return None };
    Some(service.endpoints.as_str())
}

/// Restarted pods have the time of their restart as their revision: how late is the newest?
fn note_delay(resource: &Resource, newest: &mut u64, progress: &Progress) {
    let Some(resource::Body::Endpoints(endpoints)) = &resource.body else { return };
    let times = endpoints.endpoints.iter().filter_map(|endpoint| endpoint.revision.parse::<u64>().ok());
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
