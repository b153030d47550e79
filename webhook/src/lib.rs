//! Tulle's admission webhook: injects the sidecar into pods, and validates Tulle's objects.
//!
//! ```text
//!   inject        injection of a pod: JSON in, patch and warnings out; pure
//!   validate      rules that CEL in the CRDs cannot express; pure
//!   canary        the same for Canaries, with warnings about their targets; pure
//!   access        warnings about access rules that match nothing in the cluster; pure
//!   admission     HTTP handlers: AdmissionReview in and out
//!   cluster       watched objects: namespaces, limits, Canaries, MeshConfig
//!   operator      the addresses of the operator's Service
//!   drain         shutdown without failed admission requests
//!   certificates  the serving certificate, and caBundle of the webhook configurations
//! ```
//! The review of a pod uses only this process's memory, so it takes microseconds. The failure policies in `config/`
//! define what happens while no replica responds.

pub mod access;
pub mod admission;
pub mod canary;
pub mod certificates;
pub mod cluster;
pub mod drain;
pub mod inject;
pub mod operator;
pub mod quantity;
pub mod run;
pub mod settings;
pub mod validate;
