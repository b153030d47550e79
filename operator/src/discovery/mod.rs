//! Serves the model to sidecars, and tracks what each has acknowledged.
//!
//! ```text
//!   server    HTTP/2, who may call what
//!   session   one sidecar's stream
//!   cache     resources, compiled once for all who subscribe to them
//!   admission whose new subscription is computed next
//!   bounds    what of a sidecar's words is taken
//!   relay     a replica that does not lead passes on what its sidecars report
//!   acks      who is connected, and what each enforces
//!   report    what is said about a sidecar, and how it travels
//!   peer      the operator's own TLS, and connections to other replicas
//! ```
//!
//! Each uses those below it only.

pub mod acks;
pub mod admission;
mod bounds;
pub mod cache;
pub mod peer;
pub mod relay;
pub mod report;
pub mod server;
pub mod session;

pub use acks::{
    AckTracker, Acknowledgement, Behind, ClientAcknowledgement, PodDialling, PolicyAcknowledgement,
    RouteAcknowledgement, SidecarState,
};
pub use report::{Enforced, Name, SidecarEvent, Stamps};
