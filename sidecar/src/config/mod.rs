//! What the operator has sent to this sidecar: the last good version of each resource, and the client that keeps it
//! current.
//!
//! ```text
//!   resource   resources as they are used: decoded, validated, never half
//!   sections   what is enforced on connections that arrive, composed of sections that may be refused one by one
//!   entry      what is known of an address and of a Service's endpoints, read without a lock
//!   table      addresses and endpoints: subscribed on first use, shared, bounded, forgotten when idle
//!   store      all of it together
//!   client     the discovery stream
//!   identity   certificates: asked for with the pod's token, renewed at half life
//! ```

pub mod client;
pub mod entry;
pub mod identity;
pub mod resource;
mod sections;
pub mod store;
mod table;
#[cfg(test)]
mod tests;

pub use entry::{Destination, EndpointsEntry, Entry, Service};
pub use resource::{
    CanaryRef, Endpoint, Endpoints, Inbound, InboundAccess, Mtls, PodRoute, Protocol, Route, ServiceRoute,
};
pub use store::{ConfigStore, Known};
