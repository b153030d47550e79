//! The certificate authority: one root in a Secret, leaves for pods, trust for namespaces.
//!
//! ```text
//!   authority  the root: made once, read by every replica; signs leaves
//!   sign       who may have which leaf: the reviewed token decides, never the request
//!   trust      the roots in a ConfigMap in each meshed namespace
//! ```

pub mod authority;
pub mod sign;
pub mod trust;
