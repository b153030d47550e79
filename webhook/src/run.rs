//! Wires the parts together.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::routing::get;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tulle_mesh::ports;

use crate::admission::{Admission, routes};
use crate::certificates::{Authority, Serving};
use crate::cluster::{self, Cluster};
use crate::settings::Settings;

/// Runs until told to stop.
///
/// # Errors
/// What keeps the webhook from starting: no API server, no Secret, no port.
pub async fn run(settings: Settings) -> Result<()> {
    let settings = Arc::new(settings);
    let client = Client::try_default().await.context("no connection to the API server")?;
    let authority = Arc::new(Authority::shared(&client, &settings).await?);
    let serving = authority.serve()?;
    let cluster = Arc::new(Cluster::default());
    cluster::start(&client, &cluster);
    while !cluster.is_synced() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let namespace = settings.namespace.clone();
    let routes = routes(Admission { settings, cluster, client: client.clone() });
    let listener = bind(ports::WEBHOOK).await?;
    let health = bind(ports::HEALTH).await?;
    tokio::spawn(async move {
        let health_routes = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(|| async { "ready\n" }));
        axum::serve(health, health_routes).await
    });
    // The configurations name this authority only now that the port answers.
    let configured = authority.keep_configured(&client, &namespace);
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        () = serve(listener, serving, routes) => Ok(()),
        () = configured => anyhow::bail!("this replica's authority is no longer the one in the Secret"),
        _ = terminate.recv() => {
            // The API server may still have this address for a moment.
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok(())
        }
    }
}

async fn bind(port: u16) -> Result<TcpListener> {
    match TcpListener::bind(("::", port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => {
            TcpListener::bind(("0.0.0.0", port)).await.with_context(|| format!("cannot bind port {port}"))
        }
    }
}

async fn serve(listener: TcpListener, serving: Serving, routes: Router) {
    loop {
        let (stream, _) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, say: waiting a little lets others close.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let (serving, routes) = (serving.clone(), routes.clone());
        tokio::spawn(async move {
            let acceptor = TlsAcceptor::from(serving.current());
            let Ok(Ok(stream)) = timeout(Duration::from_secs(10), acceptor.accept(stream)).await else {
                return;
            };
            let service = TowerToHyperService::new(routes);
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}
