//! A new version earns its traffic by evidence.
//!
//! ```text
//!   machine  pure: status and what is seen in, new status and actions out
//!   judge    pure: counts in, verdict and one sentence out
//!   driver   reads the model, writes status, opens gates, restores templates
//! ```

pub mod driver;
pub mod judge;
pub mod machine;
