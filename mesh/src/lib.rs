//! What the operator and the sidecars share. Pure: no I/O, no clock, no randomness of its own.
//!
//! ```text
//!   wire           the tulle/1 protocol between two sidecars: frames and stream heads (see WIRE.md)
//!   identity       SPIFFE IDs
//!   canonical      every reading of a request's path that an application may have; the canonical form of hosts and of
//!                  the paths in rules
//!   svid           verification of a peer's certificate (X509-SVID)
//!   policy         access rules: rules in, one decision out
//!   route          routes of the Gateway API: their order, which of them takes a request, rewritten paths, `Location`
//!   headers        which headers a proxy takes off, and so what a route may do with them
//!   histogram      the latency histogram of sidecars, of the operator and of Prometheus
//!   query          what the operator answers about the mesh
//!   tap            what the operator and sidecars agree on about single requests that are shown
//!   resources      what the operator and sidecars show of single resources, to be compared
//!   page           what `tulle dashboard` and the operator's page agree on
//!   trace          trace context in headers (W3C, B3), and which requests are recorded
//!   reason         why requests and connections fail: the names of metrics, logs and headers, with their explanations
//!   counted_event  what sidecars count beside requests and connections, with explanations
//!   event_reason   why the operator publishes Kubernetes events, with their explanations
//!   ports          TCP ports and the uid of the sidecar, the operator and the webhook
//!   features       names of what a resource may require of a sidecar
//!   proto          messages of the discovery protocol, generated from proto/
//!   check          the checks of `tulle check`, as far as the operator's page makes them too
//!   health         the gRPC health protocol, generated from proto/
//!   otlp           what a collector of traces takes, generated from proto/
//! ```
#![deny(missing_docs)]

pub mod canonical;
pub mod check;
pub mod counted_event;
pub mod denial;
pub mod event_reason;
pub mod headers;
pub mod health;
pub mod histogram;
pub mod identity;
pub mod page;
pub mod policy;
pub mod ports;
pub mod query;
pub mod reason;
pub mod resources;
pub mod route;
pub mod svid;
pub mod tap;
pub mod trace;
pub mod wire;

/// Messages and services of the discovery protocol, generated from `proto/tulle/v1/mesh.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("tulle.v1");
}

/// Messages and the service of OTLP as far as traces need them, generated from `proto/opentelemetry/trace.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]
pub mod otlp {
    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
}

/// Names of what a resource may require of a sidecar (`Resource.requires`).
pub mod features {
    /// Access rules with service accounts, namespaces, CIDRs, methods, paths and ports.
    pub const ACCESS_V1: &str = "access/v1";
    /// Shares of revisions.
    pub const SPLIT_V1: &str = "split/v1";
    /// Shares of revisions, and of all endpoints that are of none of them.
    pub const SPLIT_V2: &str = "split/v2";
    /// Rules that are tried beside those that are enforced.
    pub const SHADOW_V1: &str = "shadow/v1";
    /// Rules of the Gateway API's routes.
    pub const ROUTES_V1: &str = "routes/v1";
    /// Timeouts, retries, breakers, balancing and faults of MeshPolicies.
    pub const TRAFFIC_V1: &str = "traffic/v1";
    /// Limits of concurrency and of connections.
    pub const LIMITS_V1: &str = "limits/v1";
    /// Access logs.
    pub const LOGS_V1: &str = "logs/v1";
    /// All that this build has.
    pub const ALL: &[&str] =
        &[ACCESS_V1, SPLIT_V1, SPLIT_V2, SHADOW_V1, ROUTES_V1, TRAFFIC_V1, LIMITS_V1, LOGS_V1];
}
