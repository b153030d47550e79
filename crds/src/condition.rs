//! Conditions of Tulle's objects.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Reasons of conditions; each names what happened or what to fix.
pub mod reason {
    /// Accepted, and every sidecar that it concerns has acknowledged it.
    pub const ENFORCED: &str = "Enforced";
    /// Accepted; some sidecars have not acknowledged it yet.
    pub const PROPAGATING: &str = "Propagating";
    /// The target selects no pod with a sidecar.
    pub const NO_WORKLOADS: &str = "NoWorkloads";
    /// Another, older object of the same breadth has the same section.
    pub const CONFLICTED: &str = "Conflicted";
    /// A value cannot be enforced; the message names it.
    pub const INVALID: &str = "Invalid";
    /// A sidecar has refused it; the message says which and why.
    pub const REFUSED: &str = "RefusedBySidecar";
    /// The workload or Service that is named does not exist.
    pub const TARGET_NOT_FOUND: &str = "TargetNotFound";
    /// The settings hold.
    pub const ACCEPTED: &str = "Accepted";
    /// The root of the mesh names another trust domain than the settings.
    pub const TRUST_DOMAIN_FIXED: &str = "TrustDomainFixed";
    /// The object is accepted and watched.
    pub const WATCHING: &str = "Watching";
}

/// Sets a condition; the transition time moves only when the status changes. Returns whether
/// anything changed.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    new: (&str, bool, &str, &str),
    generation: i64,
    now: &Time,
) -> bool {
    let (type_, holds, reason, message) = new;
    let status = if holds { "True" } else { "False" };
    let fresh = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: Some(generation),
        last_transition_time: now.clone(),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == type_) {
        Some(old) => {
            let since = if old.status == status { old.last_transition_time.clone() } else { now.clone() };
            let fresh = Condition { last_transition_time: since, ..fresh };
            let changed = *old != fresh;
            *old = fresh;
            changed
        }
        None => {
            conditions.push(fresh);
            true
        }
    }
}
