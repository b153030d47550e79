//! Mutual TLS between sidecars and to the operator: TLS 1.3 only, both ends verified as X509-SVIDs.
//!
//! ```text
//!   store    the present key, chain and roots; swapped whole, without a restart
//! ```

pub mod store;

pub use store::{Credentials, TlsStore};
pub use tulle_mesh::svid::{PeerCertificateError, peer_identity};
