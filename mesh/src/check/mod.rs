//! The checks of `tulle check`: their numbers, and the judgement of those that the command and the operator's page both
//! make.
//!
//! ```text
//!   list       every check with the number that never changes
//!   finding    what a check has found
//!   operator   T0303, T0306, T0401: the leader, the series, the root certificate and the MeshConfig
//!   sidecars   T0602, T07xx: pods without a sidecar, and sidecars
//!   objects    T0801, T0901, T0902: MeshPolicies and Canaries
//!   words      times, versions and lists of names as findings write them
//! ```
//! In: plain facts, with the present time among them. Out: findings, in order of their numbers; a check that finds nothing
//! wrong gives one finding that says so. Which objects are read, and what is reported of those that cannot be, is up to
//! the caller. The sidecar does not use this module.

mod finding;
pub mod list;
mod objects;
mod operator;
mod sidecars;
#[cfg(test)]
mod tests;
mod words;

pub use finding::{Finding, Outcome, or_ok};
pub use list::Check;
pub use objects::{Canary, Condition, Policy, PolicyState, canaries, policies};
pub use operator::{Leadership, config, leader, root, series};
pub use sidecars::{Idle, Pod, SidecarJudge, Uninjected, WithoutSidecar, uninjected};
pub use words::{Version, age, some_of, version};

/// A root certificate that ends within this many seconds is reported, unless the user chooses another time.
pub const ROOT_ENDS_SOON: i64 = 720 * 3_600;
/// Seconds after which what should happen at once is late: the acknowledgement of a sidecar, the enforcement of a policy,
/// the renewal of a Lease (which lasts 8 s; the rest is for clocks that differ), and the connection of a pod that starts.
pub const LATE: i64 = 30;
/// A sidecar may be this many minor versions older than the operator.
pub const OLDER: u32 = 2;

/// Who reads the findings: the next command to type differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// Whoever runs `tulle check`.
    Command,
    /// Whoever looks at the operator's page.
    Page,
}

/// From where, when and for whom is judged.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The namespace of the control plane.
    pub system: &'a str,
    /// The namespace that is looked at; `None`: all.
    pub only: Option<&'a str>,
    /// The present time, in Unix seconds.
    pub now: i64,
    /// Who reads the findings.
    pub reader: Reader,
}

impl View<'_> {
    /// The option of a command that is about what is looked at: ` -n shop` or ` -A`.
    fn scope(&self) -> String {
        self.only.map_or_else(|| " -A".to_owned(), |namespace| format!(" -n {namespace}"))
    }
}
