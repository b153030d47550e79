//! The page: what the operator knows about the mesh, for a browser. `tulle dashboard` opens it through a port-forward.
//!
//! In: GET requests with the token of a session. Out: HTML that is complete without a script, a style sheet and a small
//! script of our own. It shows what the query API ([`crate::api`]) answers, with the same rights, and next to it the
//! command that shows the same. Nothing is loaded from elsewhere, and no request changes anything.
//!
//! ```text
//!   handlers   who asks, what the model and the history say, and then one of:
//!     ranking  /                              workloads, the worst first
//!     workload /workload/{namespace}/{name}   golden signals, neighbours (graph), pods, policies
//!     canary   /canaries, /canary/{namespace}/{name}
//!     health   /health
//!   layout     what is around them; words and chart, what they are made of
//! ```
//! All but `handlers` and `assets` are pure functions from data to markup. `maud` escapes every text.

mod assets;
mod canary;
mod chart;
mod graph;
mod handlers;
mod health;
mod layout;
mod look;
mod ranking;
mod session;
mod words;
mod workload;

use axum::Router;
use axum::routing::get;

use crate::api::Api;

/// The routes of the page.
pub fn routes(api: Api) -> Router {
    Router::new()
        .route("/", get(handlers::ranking))
        .route("/workload/{namespace}/{name}", get(handlers::workload))
        .route("/canaries", get(handlers::canaries))
        .route("/canary/{namespace}/{name}", get(handlers::canary))
        .route("/health", get(handlers::health))
        .route("/login", get(handlers::login))
        .route("/assets/page.css", get(assets::css))
        .route("/assets/page.js", get(assets::js))
        .with_state(api)
}
