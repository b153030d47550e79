//! The page: what the operator knows about the mesh, for a browser. `tulle dashboard` opens it through a port-forward,
//! and adds the token to the requests: the browser never has it.
//!
//! In: GET requests with a token. Out: HTML that is complete without a script, a style sheet and a small
//! script of our own. It shows what the query API ([`crate::api`]) answers, with the same rights, and next to it the
//! command that shows the same. Nothing is loaded from elsewhere, and no request changes anything: the forms of
//! `action` are for `tulle dashboard`, which acts with the rights of its user.
//!
//! ```text
//!   handlers   who asks, what the model and the history say, and then one of:
//!     ranking  /                              workloads, the worst first
//!     workload /workload/{namespace}/{name}   golden signals, neighbours (graph), pods, policies
//!     canary   /canaries, /canary/{namespace}/{name}
//!     action   /canary/{namespace}/{name}/{action}   whether an action is meant
//!     health   /health                        findings, by the checks of `tulle check`
//!   layout     what is around them; words and chart, what they are made of
//! ```
//! All but `handlers` and `assets` are pure functions from data to markup. `maud` escapes every text.

mod action;
mod assets;
mod canary;
mod chart;
mod findings;
mod graph;
mod handlers;
mod health;
mod layout;
mod look;
mod protect;
mod ranking;
mod words;
mod workload;

use axum::Router;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;

use crate::api::{Api, Refused};

/// A request that was refused before it came here, as a page.
pub fn refused(refused: Refused) -> Response {
    handlers::Failed::from(refused).into_response()
}

/// The routes of the page.
pub fn routes(api: Api) -> Router {
    Router::new()
        .route("/", get(handlers::ranking))
        .route("/workload/{namespace}/{name}", get(handlers::workload))
        .route("/canaries", get(handlers::canaries))
        .route("/canary/{namespace}/{name}", get(handlers::canary))
        .route("/canary/{namespace}/{name}/{action}", get(handlers::canary_action))
        .route("/health", get(handlers::health))
        .route("/assets/page.css", get(assets::css))
        .route("/assets/page.js", get(assets::js))
        .with_state(api)
}
