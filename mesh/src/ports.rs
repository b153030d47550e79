//! TCP ports and the uid that sidecar, webhook, operator and redirect rules agree on.
//!
//! A sidecar shares its pod's network, so a port of its own is one that no application may use: these are
//! unassigned at IANA, are nobody's default that we know of, and lie below the NodePort range (30000) and Linux's
//! ephemeral ports (32768). A test of the webhook compares them with `config/base`.

/// Redirected outbound connections arrive here.
pub const OUTBOUND: u16 = 26150;
/// Redirected inbound connections arrive here.
pub const INBOUND: u16 = 26151;
/// The sidecar's `/metrics`, `/ready`, `/live`, `/config`.
pub const ADMIN: u16 = 26152;
/// Rewritten kubelet probes.
pub const PROBES: u16 = 26153;
/// All ports of a sidecar.
pub const SIDECAR: [u16; 4] = [OUTBOUND, INBOUND, ADMIN, PROBES];
/// The operator's gRPC port.
pub const DISCOVERY: u16 = 26160;
/// Health and metrics of operator and webhook.
pub const HEALTH: u16 = 26161;
/// The operator's query API and page, on the loopback address of its pod.
pub const QUERY: u16 = 26162;
/// The webhook's HTTPS port.
pub const WEBHOOK: u16 = 26170;
/// The user that the sidecar runs as; its connections are not redirected.
pub const PROXY_UID: u32 = 4150;
