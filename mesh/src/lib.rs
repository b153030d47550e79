//! What the operator and the sidecars share. Pure: no I/O, no clock, no randomness of its own.
//!
//! ```text
//!   wire       the tulle/1 protocol between two sidecars: frames and stream heads (see WIRE.md)
//!   identity   SPIFFE ids
//!   canonical  the one form of a path and a host that routes, policies and logs agree on
//!   svid       what a peer's certificate must be (X509-SVID)
//!   policy     who may call what: rules in, one decision out
//!   histogram  the one latency histogram, of sidecars, of the operator and of Prometheus
//!   proto      messages of the discovery protocol, generated from proto/
//!   health     the gRPC health protocol, generated from proto/
//! ```
#![deny(missing_docs)]

pub mod canonical;
pub mod health;
pub mod histogram;
pub mod identity;
pub mod policy;
pub mod svid;
pub mod wire;

/// Messages and services of the discovery protocol, generated from `proto/tulle/v1/mesh.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]
pub mod proto {
    tonic::include_proto!("tulle.v1");
}

/// TCP ports and the uid that sidecar, webhook and redirect rules agree on.
pub mod ports {
    /// Where redirected outbound connections arrive.
    pub const OUTBOUND: u16 = 4150;
    /// Where redirected inbound connections arrive.
    pub const INBOUND: u16 = 4151;
    /// The sidecar's `/metrics`, `/ready`, `/config`.
    pub const ADMIN: u16 = 4152;
    /// Rewritten kubelet probes.
    pub const PROBES: u16 = 4153;
    /// All ports of a sidecar.
    pub const SIDECAR: [u16; 4] = [OUTBOUND, INBOUND, ADMIN, PROBES];
    /// The operator's gRPC port.
    pub const DISCOVERY: u16 = 4160;
    /// Health and metrics of operator and webhook.
    pub const HEALTH: u16 = 4161;
    /// The webhook's HTTPS port.
    pub const WEBHOOK: u16 = 4170;
    /// The user that the sidecar runs as; its connections are not redirected.
    pub const PROXY_UID: u32 = 4150;
}

/// Names of what a resource may require of a sidecar (`Resource.requires`).
pub mod features {
    /// Access rules with service accounts, namespaces, CIDRs, methods, paths and ports.
    pub const ACCESS_V1: &str = "access/v1";
    /// Shares of revisions.
    pub const SPLIT_V1: &str = "split/v1";
    /// Rules that are tried beside those that are enforced.
    pub const SHADOW_V1: &str = "shadow/v1";
    /// All that this build has.
    pub const ALL: &[&str] = &[ACCESS_V1, SPLIT_V1, SHADOW_V1];
}
