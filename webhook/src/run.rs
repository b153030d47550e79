//! Startup and shutdown of the webhook.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use axum_server::Handle;
use axum_server::tls_rustls::from_tcp_rustls;
use kube::Client;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tulle_mesh::ports;

use crate::admission::{Admission, routes};
use crate::certificates::Authority;
use crate::cluster::Cluster;
use crate::drain;
use crate::operator::OperatorAddresses;
use crate::settings::Settings;

/// Interval between two attempts to read or create the CA's Secret.
const RETRY: Duration = Duration::from_secs(1);
/// How long open requests may take after the endpoint has disappeared.
const OPEN_REQUESTS_TIMEOUT: Duration = Duration::from_secs(5);

/// Runs until SIGTERM.
///
/// # Errors
/// When the client cannot be configured, a port cannot be bound, or the Secret no longer holds this replica's CA.
pub async fn run(settings: Settings) -> Result<()> {
    // Before anything else, because the kernel ignores signals for which process 1 has no handler.
    let mut terminate = signal(SignalKind::terminate())?;
    let ready = Arc::new(AtomicBool::new(false));
    // Alive before the API server responds: restarting this process would not help against a slow API server.
    let health = tokio::net::TcpListener::from_std(bind(ports::HEALTH)?)?;
    tokio::spawn(axum::serve(health, health_routes(Arc::clone(&ready))).into_future());
    let settings = Arc::new(settings);
    let prepared = tokio::select! {
        _ = terminate.recv() => return Ok(()),
        prepared = prepare(&settings) => prepared?,
    };
    serve(prepared, &settings, &ready, terminate).await
}

/// Prerequisites of serving admission requests.
struct Prepared {
    client: Client,
    cluster: Arc<Cluster>,
    authority: Arc<Authority>,
    operator: Arc<OperatorAddresses>,
}

fn health_routes(ready: Arc<AtomicBool>) -> Router {
    let readiness = move || {
        let ready = ready.load(Ordering::Relaxed);
        async move {
            match ready {
                true => (StatusCode::OK, "ready\n"),
                false => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    "waiting for the first lists of namespaces, LimitRanges, ResourceQuotas, Canaries and MeshConfigs, or for Secret tulle-webhook-authority\n",
                ),
            }
        }
    };
    Router::new().route("/healthz", get(|| async { "ok\n" })).route("/readyz", get(readiness))
}

async fn prepare(settings: &Settings) -> Result<Prepared> {
    let client = Client::try_default().await.context("cannot configure the Kubernetes client")?;
    let cluster = Cluster::follow(&client, settings.trust_domain.clone());
    let authority = Arc::new(authority(&client, settings).await);
    while !cluster.is_synced() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let operator = OperatorAddresses::follow(&client, settings).await;
    Ok(Prepared { client, cluster, authority, operator })
}

async fn serve(
    Prepared { client, cluster, authority, operator }: Prepared,
    settings: &Arc<Settings>,
    ready: &AtomicBool,
    mut terminate: Signal,
) -> Result<()> {
    let serving = authority.serve()?;
    let (key, listener) = (authority.seal_key(), bind(ports::WEBHOOK)?);
    let admission =
        Admission { settings: Arc::clone(settings), cluster, operator, client: client.clone(), key };
    let handle = Handle::new();
    let server = from_tcp_rustls(listener, serving)?.handle(handle.clone());
    let draining = Arc::new(AtomicBool::new(false));
    let routes = drain::closing(routes(admission), Arc::clone(&draining));
    let server = tokio::spawn(server.serve(routes.into_make_service()));
    ready.store(true, Ordering::Relaxed);
    tracing::info!("serving admission requests");
    // Only now, because with caBundle written the API server starts to call this port.
    let maintained = authority.maintain_ca_bundles(&client, &settings.namespace);
    tokio::select! {
        ended = server => anyhow::bail!("the HTTPS server stopped: {ended:?}"),
        () = maintained => anyhow::bail!("Secret tulle-webhook-authority no longer holds this replica's CA; a restart reads or creates it"),
        _ = terminate.recv() => {}
    }
    // The API server still sends requests to this pod.
    tracing::info!("received SIGTERM; serving until the Service no longer has this pod as an endpoint");
    draining.store(true, Ordering::Relaxed);
    drain::endpoint_gone(&client, settings).await;
    handle.graceful_shutdown(Some(OPEN_REQUESTS_TIMEOUT));
    while handle.connection_count() > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Reads or creates the CA, and retries until it succeeds.
async fn authority(client: &Client, settings: &Settings) -> Authority {
    loop {
        match Authority::shared(client, settings).await {
            Ok(authority) => return authority,
            Err(error) => tracing::warn!(error = format!("{error:#}"), "cannot load the CA; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// A listener for IPv6 and IPv4, or for IPv4 only on a node without IPv6.
fn bind(port: u16) -> Result<TcpListener> {
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)));
    let listener = listener.with_context(|| format!("cannot bind port {port}"))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}
