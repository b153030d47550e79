//! Conditions in the status of Tulle's objects, and their reasons.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Reasons of conditions. Each names what was observed or what to fix.
pub mod reason {
    /// The policy is valid, and every selected sidecar has acknowledged it.
    pub const ENFORCED: &str = "Enforced";
    /// Some sidecars have not acknowledged the policy or the weight yet; the message names one.
    pub const PROPAGATING: &str = "Propagating";
    /// The target selects no pod with a sidecar.
    pub const NO_WORKLOADS: &str = "NoWorkloads";
    /// An older, equally specific policy has the same section, or an older Canary has the same target.
    pub const CONFLICTED: &str = "Conflicted";
    /// A value is invalid; the message names it.
    pub const INVALID: &str = "Invalid";
    /// A sidecar rejected the policy or the weight; the message contains the pod and the cause.
    pub const REFUSED: &str = "RefusedBySidecar";
    /// The Service or workload that the target names does not exist.
    pub const TARGET_NOT_FOUND: &str = "TargetNotFound";
    /// The settings are in use.
    pub const ACCEPTED: &str = "Accepted";
    /// The root certificate has another trust domain than the settings.
    pub const TRUST_DOMAIN_FIXED: &str = "TrustDomainFixed";
    /// The Canary is valid, and its target is watched.
    pub const WATCHING: &str = "Watching";
}

/// Sets a condition and returns whether anything changed. The transition time changes only with the status.
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
