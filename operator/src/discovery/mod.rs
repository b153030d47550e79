//! Serves the model to sidecars, and tracks what each has acknowledged.
//!
//! ```text
//!   session   one sidecar's stream
//!   registry  who is connected, what each was sent and has acknowledged
//!   relay     a replica that does not lead passes on what its sidecars report
//!   server    TLS, HTTP/2, who may call what
//! ```

mod registry;
pub mod relay;
pub mod server;
pub mod session;

pub use registry::{Acknowledgement, Registry, Report};
