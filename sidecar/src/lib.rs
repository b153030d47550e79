//! Tulle's data plane: one static binary, `init` (redirect rules) and `proxy`.
//!
//! The folders follow a connection. What the pod's application opens: `listen → outbound → route → backend →
//! attempt → pool`. What comes to it: `listen → inbound → admit → attempt → pool`. [`inbound`] and [`outbound`]
//! know nothing of each other; what both need is beside them: [`call`] (one request as a value), [`attempt`]
//! (one try at serving it), the protocols ([`http1`], [`http2`], [`wire`], fields of [`grpc`]) and [`message`] (bodies
//! from one to another). [`gate`] and [`app_latency`] serve the limits and the reports of the inbound side.
//! [`config`] is the discovery client and the last good snapshot; [`telemetry`], [`tap`], [`trace`],
//! [`admin`] and [`probe`] are what others see.
//!
//! Data runs on single-threaded workers, each with listeners, pools and balancers of its own;
//! configuration, certificates, metrics, probes and the sending of spans run on a thread of their own, so that a scrape
//! or a push never delays a request. [`arguments`], [`settings`] and [`log`] are what the start reads.

pub mod admin;
pub mod admit;
pub mod app_latency;
pub mod app_waiting;
pub mod arguments;
mod arrived;
pub mod attempt;
pub mod backend;
pub mod call;
mod channel;
pub mod claim;
pub mod config;
pub mod detect;
pub mod error;
pub mod gate;
pub mod grpc;
pub mod http1;
pub mod http2;
pub mod inbound;
pub mod init;
pub mod io;
pub mod listen;
pub mod liveness;
pub mod log;
pub mod memory;
pub mod message;
pub mod outbound;
mod output;
pub mod pool;
pub mod probe;
pub mod route;
pub mod run;
pub mod serve;
pub mod settings;
pub mod tap;
pub mod task;
pub mod telemetry;
pub mod tls;
pub mod trace;
pub mod transparent;
mod turns;
pub mod wire;
pub mod worker;
