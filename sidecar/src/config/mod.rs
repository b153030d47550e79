//! What the operator has told this sidecar: the last good snapshot of each resource, and the client
//! that keeps it current.
//!
//! ```text
//!   resource   resources as they are used: decoded, validated, never half
//!   store      destinations by address, subscribed on first use, forgotten when idle
//!   client     the discovery stream
//!   identity   certificates: asked for with the pod's token, renewed at half life
//! ```

pub mod client;
pub mod identity;
pub mod resource;
pub mod store;

pub use resource::{CanaryRef, Destination, Endpoint, Inbound, InboundAccess, Mtls, Protocol, Service};
pub use store::{ConfigStore, Entry};
