//! Threads: one for configuration, certificates, metrics, probes and spans that are sent, and one per worker for data.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tulle_mesh::counted_event;
use tulle_mesh::ports;

use crate::admin::Admin;
use crate::app_waiting::AppWaiting;
use crate::backend::SidecarRetries;
use crate::config::store::Wanted;
use crate::config::{ConfigStore, client, identity};
use crate::listen::Descriptors;
use crate::liveness::Heartbeats;
use crate::settings::{Settings, SourceAddress, env};
use crate::telemetry::{Limited, Telemetry};
use crate::tls::TlsStore;
use crate::worker::Worker;
use crate::{inbound, listen, memory, outbound, probe, trace, transparent};

/// What runs when the sidecar is told to stop may take this long to end: the application has exited, so
/// these are answers that are being written.
const DRAIN: Duration = Duration::from_millis(600);
/// How long the last report may take, and the last spans.
const LAST_REPORT: Duration = Duration::from_millis(300);

/// Runs the proxy until it is told to stop. A native sidecar is told so after the application has
/// exited: it ends what it has begun, reports what it has counted, and is gone within a second.
///
/// # Errors
/// A port that cannot be bound.
pub fn proxy(settings: Settings) -> Result<()> {
    let settings = Arc::new(settings);
    let (config, wanted) = ConfigStore::new();
    let stop = CancellationToken::new();
    let count = settings.workers.max(1);
    let heartbeats = Arc::new(Heartbeats::new(count));
    if !settings.telemetry {
        tracing::warn!(
            "{}=off: requests and connections of this pod are not counted, so the operator shows none of them \
             except what access rules refuse, and its attempts are no evidence of a Canary",
            env::TELEMETRY
        );
    }
    let telemetry = Arc::new(Telemetry::new(settings.telemetry));
    // Before there are other threads, which inherit the capability.
    let unable = preserve_source_address(&settings, &telemetry);
    let parts = Parts {
        settings,
        config,
        tls: Arc::default(),
        telemetry,
        heartbeats,
        app_waiting: Arc::default(),
        retries: Arc::new(SidecarRetries::of_workers(count)),
        descriptors: Descriptors::raise(),
        stop,
    };
    let (ended, workers) = mpsc::channel::<()>(count);
    for number in 0..count {
        let (parts, ended) = (parts.clone(), Ended(ended.clone()));
        let thread = thread::Builder::new().name(format!("worker-{number}")).spawn(move || {
            let _ended = ended;
            worker(&parts, number);
        });
        thread.context("cannot start a worker thread")?;
    }
    Builder::new_current_thread().enable_all().build()?.block_on(control(parts, unable, wanted, workers))
}

/// Takes the capability to connect with clients' addresses, where the pod asks for that. Returns why it cannot be had:
/// the sidecar is then never ready, because an application that allows by address would be wrong with another one.
fn preserve_source_address(settings: &Settings, telemetry: &Telemetry) -> Option<String> {
    if settings.source_address != SourceAddress::Preserve {
        return None;
    }
    let error = transparent::allow().err()?;
    telemetry.event(counted_event::SourceAddress::NotPreserved);
    tracing::error!(%error, "not ready, and will not be: the application would not see its clients' addresses");
    Some(error.to_string())
}

/// Tells that a worker has ended, also when it panicked.
struct Ended(mpsc::Sender<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

#[derive(Clone)]
struct Parts {
    settings: Arc<Settings>,
    config: Arc<ConfigStore>,
    tls: Arc<TlsStore>,
    telemetry: Arc<Telemetry>,
    heartbeats: Arc<Heartbeats>,
    app_waiting: Arc<AppWaiting>,
    retries: Arc<SidecarRetries>,
    descriptors: Descriptors,
    stop: CancellationToken,
}

/// `unable`: why this sidecar cannot do what the pod asks of it. `workers` says whenever a worker has ended.
async fn control(
    parts: Parts,
    unable: Option<String>,
    wanted: UnboundedReceiver<Wanted>,
    mut workers: mpsc::Receiver<()>,
) -> Result<()> {
    let Parts { settings, config, tls, telemetry, heartbeats, app_waiting, stop, .. } = parts;
    let count = settings.workers.max(1);
    let admin = Arc::new(Admin {
        settings: Arc::clone(&settings),
        config: Arc::clone(&config),
        tls: Arc::clone(&tls),
        telemetry: Arc::clone(&telemetry),
        heartbeats,
        unable,
    });
    // First, because the pod's start waits for the certificate.
    tokio::spawn(identity::run(Arc::clone(&settings), Arc::clone(&tls)));
    tokio::spawn(admin.serve(bind(ports::ADMIN)?));
    let pod = settings.pod_ips.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    tokio::spawn(probe::serve(settings.probes.clone(), pod, app_waiting, bind(ports::PROBES)?));
    tokio::spawn(memory::give_back());
    let last_report = CancellationToken::new();
    let spans = trace::export::run(
        Arc::clone(&settings),
        Arc::clone(&config),
        Arc::clone(&telemetry),
        last_report.clone(),
    );
    let spans = tokio::spawn(spans);
    let client = client::run(settings, config, tls, telemetry, wanted, last_report.clone());
    let client = tokio::spawn(client);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let signal = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        // A worker that cannot start, or has panicked, takes the sidecar with it: it is started again.
        _ = workers.recv() => anyhow::bail!("a worker has ended"),
    };
    // Who sent it is not known: kubelet does so after the application has exited, and also to start this container again.
    tracing::info!(signal, "received a signal to stop: what runs is completed");
    stop.cancel();
    let all = async {
        for _ in 0..count {
            workers.recv().await;
        }
    };
    let drained = timeout(DRAIN, all).await.is_ok();
    last_report.cancel();
    let last = async { tokio::join!(client, spans) };
    let reported = timeout(LAST_REPORT, last).await.is_ok();
    tracing::info!(drained, reported, "stopped");
    Ok(())
}

fn bind(port: u16) -> Result<TcpListener> {
    listen::bind(port).with_context(|| format!("cannot bind port {port}"))
}

/// A data thread; it ends when the sidecar is told to stop.
fn worker(parts: &Parts, number: usize) {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "cannot start a worker"),
    };
    let local = LocalSet::new();
    let result = local.block_on(&runtime, data(parts, number));
    if let Err(error) = result {
        tracing::error!(error = format!("{error:#}"), "a worker ended");
        std::process::exit(1);
    }
}

async fn data(parts: &Parts, number: usize) -> Result<()> {
    let Parts { settings, config, tls, telemetry, heartbeats, app_waiting, retries, descriptors, stop } =
        parts.clone();
    let worker = Worker::new(settings, config, tls, telemetry, app_waiting, retries);
    spawn_local(inbound::app::watch(Rc::clone(&worker)));
    let (inbound, outbound) = (bind(ports::INBOUND)?, bind(ports::OUTBOUND)?);
    let sweeping = Rc::clone(&worker);
    spawn_local(async move {
        let mut ticks = interval(Duration::from_secs(5));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            heartbeats.beat(number);
            sweeping.sweep();
        }
    });
    let tasks = Rc::new(());
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = inbound.accept() => match accepted {
                Ok((stream, peer)) => {
                    let Some(stream) = admitted(stream, descriptors, &worker.telemetry) else { continue };
                    let (worker, task) = (Rc::clone(&worker), Rc::clone(&tasks));
                    spawn_local(async move {
                        inbound::serve(worker, stream, peer).await;
                        drop(task);
                    });
                }
                Err(error) => accept_failed(&error).await,
            },
            accepted = outbound.accept() => match accepted {
                Ok((stream, _)) => {
                    let Some(stream) = admitted(stream, descriptors, &worker.telemetry) else { continue };
                    let (worker, task) = (Rc::clone(&worker), Rc::clone(&tasks));
                    spawn_local(async move {
                        outbound::serve(worker, stream).await;
                        drop(task);
                    });
                }
                Err(error) => accept_failed(&error).await,
            },
        }
    }
    drop((inbound, outbound));
    worker.drain(&tasks).await;
    Ok(())
}

/// The connection, or `None` where descriptors run short: it is reset then.
fn admitted(stream: TcpStream, descriptors: Descriptors, telemetry: &Telemetry) -> Option<TcpStream> {
    static LINES: Limited = Limited::new(1);
    if !descriptors.are_short(&stream) {
        return Some(stream);
    }
    telemetry.event(counted_event::RefusedConnection::TooMany);
    if let Some(suppressed) = LINES.allow() {
        let limit = descriptors.limit;
        tracing::warn!(
            limit,
            suppressed,
            "refused a connection: nine tenths of the file descriptors are in use"
        );
    }
    listen::reset_on_close(&stream);
    None
}

/// Out of file descriptors, say: waiting a little lets others close.
async fn accept_failed(error: &io::Error) {
    static LINES: Limited = Limited::new(1);
    if let Some(suppressed) = LINES.allow() {
        tracing::warn!(%error, suppressed, "cannot accept a connection");
    }
    tokio::time::sleep(Duration::from_millis(10)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_refused_and_counted_when_descriptors_run_short() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let telemetry = Telemetry::default();
        let few = Descriptors { limit: 1 };
        let enough = Descriptors { limit: u64::MAX };
        for (descriptors, refused) in [(few, true), (enough, false)] {
            let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            let stream = accepted.unwrap().0;
            assert_eq!(admitted(stream, descriptors, &telemetry).is_none(), refused);
            drop(client);
        }
        assert_eq!(telemetry.events(), [(("refused_connection", "TooMany"), 1)]);
    }
}
