//! Tulle's data plane: one static binary, `init` (redirect rules) and `proxy`.
//!
//! The folders follow a connection: `listen → detect → (tls) → authorize → route → balance → connect
//! → forward`, with [`inbound`] and [`outbound`] as the two paths through shared parts, and beside
//! them [`config`] (the discovery client and the last good snapshot), [`telemetry`] and [`admin`].
//!
//! Data runs on single-threaded workers, each with listeners, pools and balancers of its own;
//! configuration, certificates, metrics and probes run on a thread of their own, so that a scrape or
//! a push never delays a request.

pub mod admin;
pub mod balance;
pub mod claim;
pub mod config;
pub mod detect;
pub mod error;
pub mod forward;
pub mod http1;
pub mod http2;
pub mod inbound;
pub mod init;
pub mod io;
pub mod listen;
pub mod liveness;
pub mod memory;
pub mod message;
pub mod outbound;
pub mod pool;
pub mod probe;
pub mod run;
pub mod serve;
pub mod settings;
pub mod telemetry;
pub mod tls;
pub mod transparent;
pub mod wire;
pub mod worker;
