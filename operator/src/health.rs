//! `/healthz`, `/readyz` and `/metrics` of the operator.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::sync::watch;

use crate::discovery::Registry;
use crate::lease::Leadership;
use crate::telemetry::Aggregates;
use crate::watch::Hub;

/// What health and metrics are read from.
#[derive(Clone)]
pub struct Health {
    /// The model.
    pub hub: Arc<Hub>,
    /// Who is connected.
    pub registry: Arc<Registry>,
    /// What is counted.
    pub aggregates: Arc<Aggregates>,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
}

/// The routes.
pub fn routes(health: Health) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(health)
}

async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.hub.is_synced() {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "still reading the cluster: is the API server reachable, and are the CRDs installed?\n",
        )
    }
}

async fn metrics(State(health): State<Health>) -> String {
    let mut out = String::new();
    let leads = u8::from(health.leadership.borrow().mine);
    let _ = writeln!(out, "# TYPE tulle_operator_leader gauge\ntulle_operator_leader {leads}");
    let connected = health.registry.connected();
    let _ = writeln!(out, "# TYPE tulle_operator_sidecars gauge\ntulle_operator_sidecars {connected}");
    let uninjected = health.hub.model().uninjected_pods().len();
    let _ = writeln!(
        out,
        "# TYPE tulle_operator_pods_without_sidecar gauge\ntulle_operator_pods_without_sidecar {uninjected}"
    );
    let _ = writeln!(out, "# TYPE tulle_operator_refusals_total counter");
    for ((what, reason), count) in health.aggregates.refusals() {
        let _ = writeln!(out, "tulle_operator_refusals_total{{what=\"{what}\",reason=\"{reason}\"}} {count}");
    }
    let _ = writeln!(out, "# TYPE tulle_operator_requests_total counter");
    for (destination, counts, _) in health.aggregates.all() {
        let (ns, svc, rev) = (destination.namespace, destination.service, destination.revision);
        let labels =
            format!("destination_namespace=\"{ns}\",destination_service=\"{svc}\",revision=\"{rev}\"");
        let _ = writeln!(
            out,
            "tulle_operator_requests_total{{{labels},outcome=\"success\"}} {}",
            counts.requests.saturating_sub(counts.failures)
        );
        let _ = writeln!(
            out,
            "tulle_operator_requests_total{{{labels},outcome=\"failure\"}} {}",
            counts.failures
        );
    }
    out
}
