//! The certificate authority: a root in a Secret, leaf certificates for pods, trust bundles for namespaces.
//!
//! ```text
//!   authority  the root, and signing with it
//!   root       the root's Secret: created once, read by every replica, never silently replaced
//!   lifetime   lifetime of leaf certificates
//!   sign       issues leaf certificates: the reviewed token decides on the identity, never the request
//!   trust      the root certificate in a ConfigMap of each meshed namespace
//! ```

pub mod authority;
pub mod lifetime;
pub mod root;
pub mod sign;
pub mod trust;
