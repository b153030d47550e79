//! Rollouts: a new version gets more traffic as evidence about it comes in.
//!
//! ```text
//!   machine   pure: status and what is seen in, new status and actions out
//!   judge     pure: evidence in, verdict and one sentence out
//!   evidence  pure: attempts in, blocks of ten seconds by pod out
//!   exposure  pure: which requests reach the version on trial
//!   gauges    what `/metrics` says about Canaries
//!   driver    reads the model, writes status, opens gates, restores templates
//! ```

pub mod driver;
pub mod evidence;
pub(crate) mod exposure;
pub mod gauges;
pub mod judge;
pub mod machine;
