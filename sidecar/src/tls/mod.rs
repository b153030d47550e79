//! Mutual TLS between sidecars and to the operator: TLS 1.3 only, both ends verified as X509-SVIDs.
//!
//! ```text
//!   verify   what a peer's certificate must be
//!   store    the present key, chain and roots; swapped whole, without a restart
//! ```

pub mod store;
pub mod verify;

pub use store::{Credentials, TlsStore};
pub use verify::{PeerCertificateError, peer_identity};
