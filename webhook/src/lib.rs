//! Tulle's admission webhook: injects the sidecar into pods, validates Tulle's objects.
//!
//! ```text
//!   inject        what is added to a pod: pure, JSON in, patch and warnings out
//!   validate      what CEL in the CRDs cannot say: pure, and one look at the target
//!   admission     AdmissionReview in and out
//!   cluster       what admission needs to know: namespaces and Canaries, from memory
//!   drain         serving on until no caller has a stopped replica's address
//!   certificates  the webhook's own certificate, and its authority in the configurations
//! ```
//! A pod's admission needs nothing outside this process's memory: it answers in microseconds, and its
//! absence is bounded by the failure policies in `config/`.

pub mod admission;
pub mod certificates;
pub mod cluster;
pub mod drain;
pub mod inject;
pub mod quantity;
pub mod run;
pub mod settings;
pub mod validate;
