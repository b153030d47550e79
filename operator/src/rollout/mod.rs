//! Rollouts: a new version gets more traffic as evidence about it comes in.
//!
//! ```text
//!   machine   pure: status and what is seen in, new status and actions out
//!   judge     pure: evidence in, verdict and one sentence out
//!   evidence  pure: attempts in, blocks of ten seconds by pod out
//!   input     what the judge decides by, for the driver and for the query API
//!   answer    pure: the same as an answer of the query API
//!   exposure  pure: which requests reach the version on trial
//!   gauges    what `/metrics` says about Canaries
//!   driver    reads the model, writes status, opens gates, restores templates
//! ```

pub mod answer;
pub mod driver;
pub mod evidence;
pub(crate) mod exposure;
pub mod gauges;
pub mod input;
pub mod judge;
pub mod machine;
