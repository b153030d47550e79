//! What the operator has sent to this sidecar: the last good version of each resource, and the client that keeps it
//! current.
//!
//! ```text
//!   accepted   versions of the resources in force, and contents to be shown
//!   resource   resources as they are used: decoded, validated, never half
//!   endpoints  who serves a Service's port
//!   rules      rules of the Gateway API's routes
//!   traffic    sections of MeshPolicies for clients
//!   limits     sections of MeshPolicies for what reaches the application
//!   traces     where spans go, and how many traces begin here
//!   logs       which requests at this pod are logged
//!   sections   what is enforced on connections that arrive, composed of sections that may be refused one by one
//!   entry      what is known of an address and of a Service's endpoints, read without a lock
//!   table      addresses and endpoints: subscribed on first use, shared, bounded, forgotten when idle
//!   store      all of it together
//!   client     the discovery stream
//!   identity   certificates: asked for with the pod's token, renewed at half life
//! ```

pub mod accepted;
pub mod client;
mod endpoints;
pub mod entry;
pub mod identity;
pub mod limits;
pub mod logs;
pub mod resource;
mod rules;
mod sections;
pub mod store;
mod table;
#[cfg(test)]
mod tests;
mod traces;
pub mod traffic;

pub use endpoints::{CanaryRef, Distribution, Endpoint, Endpoints, Steering, SteeringMatch, TrialShare};
pub use entry::{Destination, EndpointsEntry, Entry, Service};
pub use resource::{Inbound, InboundAccess, Mtls, Place, PodRoute, Protocol, Route, ServiceRoute};
pub use rules::{
    Carrier, Cors, Filter, HeaderEdits, Mirror, Rewrite, RouteKind, Rule, RuleBackend, RuleRetry, RuleTimes,
    Rules, SessionPersistence,
};
pub use store::{ConfigStore, Known};
pub use traces::Tracing;
pub use traffic::{HashKey, Traffic};
