//! The whole proxy in this process: what a client sees, and what an application sees of it.
//!
//! Each test has a cluster of its own ([`harness`]): the operator's own discovery and certificate authority, and pods
//! whose sidecars run on threads of their own. Redirection is the one thing that is not real: the harness hands each
//! connection to a sidecar together with the destination that its client dialled. No test needs root, a network
//! namespace or Kubernetes.
//!
//! ```text
//!   routes      rules of the Gateway API: where requests go, and what is done to them
//!   routes_backends     … what is done for one backend
//!   routes_clients      … sessions, copies, cross-origin requests
//!   routes_connections  … where connections go
//!   resilience  what policies do for a request that goes wrong
//!   retries     method × body × how the server ends × kept or fresh connection × one or two endpoints
//!   clients     clients that end their side, leave, or are slow
//!   connecting  servers that do not take connections
//!   discovery   how a sidecar reaches the operator
//!   detection   what is spoken on a port that declares nothing, and what that costs the application
//!   access      clients that are denied do not reach the application
//!   drains      a sidecar that ends
//!   limits      many streams, long heads, peers that break the rules
//!   traces      trace headers, and the spans that a collector gets
//!   logs        which requests are logged
//!   tap         requests that somebody looks at
//!   series      how many series clients can make
//!   memory      peers that take nothing
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that panics has failed"
)]

mod access;
mod clients;
mod connecting;
mod detection;
mod discovery;
mod drains;
mod harness;
mod limits;
mod logs;
mod memory;
mod resilience;
mod retries;
mod routes;
mod routes_backends;
mod routes_clients;
mod routes_connections;
mod series;
mod tap;
mod traces;
