//! Tulle's control plane: watches Kubernetes, decides, serves the sidecars.
//!
//! ```text
//!   watch ──▶ model ──▶ discovery ──▶ sidecars
//!               │           ▲ acks, counts
//!               ├──▶ status │
//!               ├──▶ rollout┴──▶ Canary status ──▶ (watched again) ──▶ model
//!               └──▶ telemetry, explain ──▶ api, dashboard ──▶ whoever may look
//!   sidecars ◀──▶ discovery ◀──▶ tap ◀──▶ api
//! ```
//! [`model`], [`explain`], [`rollout::machine`], [`rollout::judge`] and [`lease::evaluate`] are pure. Every replica
//! serves; only the one that holds the Lease writes to Kubernetes. A Canary's weight reaches the
//! sidecars through its status: it is written before it is pushed, and every replica pushes the same.

pub mod api;
pub mod bucket;
pub mod dashboard;
pub mod defaults;
pub mod discovery;
pub mod explain;
pub mod health;
pub mod identity;
pub mod lease;
pub mod metrics;
pub mod model;
#[cfg(test)]
mod reference;
pub mod rollout;
pub mod run;
pub mod settings;
pub mod status;
pub mod tap;
pub mod telemetry;
pub mod uninjected;
pub mod watch;
