//! `/healthz`, `/readyz` and `/metrics` of the operator.
//!
//! In: the [`Stage`] that [`run`](crate::run) has reached, and the counters. Live from the start of the process; ready
//! while sidecars can be served.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::sync::watch;

use crate::discovery::AckTracker;
use crate::lease::Leadership;
use crate::metrics::{self, Metrics};
use crate::rollout::gauges::gauges;
use crate::status::routes::times::AcknowledgeTimes;
use crate::telemetry::Aggregates;
use crate::watch::Hub;

/// Stage in the life of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Lists the cluster's objects, or has no certificate authority yet.
    #[default]
    Starting,
    /// The mesh had a root, and its Secret is missing or invalid. Waits for a person.
    NoRoot,
    /// The discovery port is open.
    Serving,
    /// SIGTERM has been received.
    Stopping,
}

/// Sources of health and metrics.
#[derive(Clone)]
pub struct Health {
    /// The stage that was reached.
    pub stage: watch::Receiver<Stage>,
    /// The model.
    pub hub: Arc<Hub>,
    /// Connected sidecars.
    pub acks: Arc<AckTracker>,
    /// Counters.
    pub aggregates: Arc<Aggregates>,
    /// How long changes of routes took.
    pub times: Arc<AcknowledgeTimes>,
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

/// The body of `/readyz`. `Err` explains why the operator is not ready.
fn readiness(stage: Stage, synced: bool) -> Result<&'static str, &'static str> {
    match (stage, synced) {
        (Stage::Serving, true) => Ok("ready\n"),
        (Stage::NoRoot, _) => Err(
            "no root: Secret tulle-root is missing or invalid, and this mesh had a root before; restore the Secret from its backup, or see the operator's log\n",
        ),
        (Stage::Stopping, _) => Err("stopping: SIGTERM received\n"),
        (_, false) => Err(
            "listing the cluster's objects: is the API server reachable, are Tulle's CRDs installed, and is the ClusterRole tulle-operator of this version applied?\n",
        ),
        (Stage::Starting, true) => Err(
            "loading the certificate authority and opening the discovery port: can Secret tulle-root be read and created?\n",
        ),
    }
}

async fn ready(State(health): State<Health>) -> (StatusCode, &'static str) {
    match readiness(*health.stage.borrow(), health.hub.is_synced()) {
        Ok(text) => (StatusCode::OK, text),
        Err(text) => (StatusCode::SERVICE_UNAVAILABLE, text),
    }
}

fn gather(health: &Health) -> Metrics {
    // Locked once and only here: whoever locks the model a second time waits for a writer that waits for the first.
    let (pods_without_sidecar, canaries, rules) = {
        let model = health.hub.model();
        let rules = health.aggregates.rules(|policy| model.policy(policy).is_some());
        (model.uninjected_pods().len(), gauges(&model), rules)
    };
    Metrics {
        leader: health.leadership.borrow().mine,
        sidecars: health.acks.connected(),
        opened_streams: health.acks.opened_streams(),
        pods_without_sidecar,
        refusals: health.aggregates.refusals(),
        requests: health.aggregates.all().into_iter().map(|(to, counts, _)| (to, counts)).collect(),
        rules,
        canaries,
        routes_acknowledged: health.times.snapshot(),
    }
}

async fn metrics(State(health): State<Health>) -> Response {
    match gather(&health).into_text() {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => {
            tracing::error!(%error, "cannot encode the metrics");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_operator_that_has_read_the_cluster_and_listens_is_ready() {
        assert!(readiness(Stage::Serving, true).is_ok());
        for (stage, synced) in [
            (Stage::Starting, false),
            (Stage::Starting, true),
            (Stage::NoRoot, true),
            (Stage::Serving, false),
            (Stage::Stopping, true),
            (Stage::Stopping, false),
        ] {
            assert!(readiness(stage, synced).is_err(), "{stage:?}, synced: {synced}");
        }
    }

    #[test]
    fn an_operator_that_is_not_ready_names_what_it_waits_for() {
        let listing = readiness(Stage::Starting, false).unwrap_err();
        assert!(listing.contains("CRDs") && listing.contains("ClusterRole tulle-operator"));
        assert!(readiness(Stage::Starting, true).unwrap_err().contains("tulle-root"));
        assert!(readiness(Stage::NoRoot, true).unwrap_err().contains("backup"));
        assert!(readiness(Stage::Stopping, true).unwrap_err().contains("SIGTERM"));
    }
}
