//! The certificate authority: one root in a Secret, leaves for pods, trust for namespaces.
//!
//! ```text
//!   authority  a root and what it signs
//!   root       the root's Secret: made once, read by every replica, never silently replaced
//!   lifetime   how long a leaf lives
//!   sign       who may have which leaf: the reviewed token decides, never the request
//!   trust      the roots in a ConfigMap in each meshed namespace
//! ```

pub mod authority;
pub mod lifetime;
pub mod root;
pub mod sign;
pub mod trust;
