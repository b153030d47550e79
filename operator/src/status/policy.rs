//! Computes the status of a MeshPolicy: which pods it selects, how many enforce it, and its conditions.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};
use tulle_crds::{MeshPolicy, MeshPolicyStatus, reason, set_condition};

use crate::model::{Key, Verdict, access_summary, target_name};

/// How many of the pods that a policy selects enforce it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Selected pods with a sidecar.
    pub pods: usize,
    /// How many of those pods enforce it.
    pub enforcing: usize,
    /// Name of the first pod that does not enforce it.
    pub awaited: Option<String>,
    /// Which pod refused it, and why.
    pub refusal: Option<String>,
}

impl Progress {
    /// Whether all pods enforce it, and none has refused it.
    pub fn is_complete(&self) -> bool {
        self.enforcing >= self.pods && self.refusal.is_none()
    }
}

/// Computes the status of a policy.
pub fn status(
    key: &Key,
    policy: &MeshPolicy,
    verdict: &Verdict,
    progress: &Progress,
    now: &Time,
) -> MeshPolicyStatus {
    let mut status = policy.status.clone().unwrap_or_default();
    let generation = policy.metadata.generation.unwrap_or_default();
    let pods = progress.pods;
    let enforcing = progress.enforcing.min(pods);
    status.observed_generation = Some(generation);
    status.target = Some(target_name(&policy.spec, &key.0));
    status.access = Some(access_summary(&policy.spec));
    status.workloads = i32::try_from(pods).ok();
    status.enforced = Some(format!("{enforcing}/{pods}"));
    status.selected_sidecars = i32::try_from(pods).ok();
    status.enforcing_sidecars = i32::try_from(enforcing).ok();
    let (ready, reason, message) = condition(verdict, progress);
    set_condition(&mut status.conditions, ("Ready", ready, reason, &message), generation, now);
    status
}

/// Condition Ready: whether it is true, its reason, and its message.
fn condition(verdict: &Verdict, progress: &Progress) -> (bool, &'static str, String) {
    let Progress { pods, enforcing, awaited, refusal } = progress;
    match (verdict, refusal) {
        (Verdict::Invalid(why), _) => (false, reason::INVALID, why.clone()),
        (Verdict::TargetNotFound(why), _) => (false, reason::TARGET_NOT_FOUND, why.clone()),
        (Verdict::Conflicted { with, section }, _) => {
            let message = format!(
                "MeshPolicy {with} is older and has {section} for the same pods: merge them, or narrow a target"
            );
            (false, reason::CONFLICTED, message)
        }
        (Verdict::Accepted, Some(refusal)) => (false, reason::REFUSED, refusal.clone()),
        (Verdict::Accepted, None) if *pods == 0 => {
            (true, reason::NO_WORKLOADS, "the target selects no pod with a sidecar".to_owned())
        }
        (Verdict::Accepted, None) if enforcing < pods => {
            let first = awaited.as_ref().map(|pod| format!("; waiting for pod {pod}")).unwrap_or_default();
            (false, reason::PROPAGATING, format!("{enforcing} of {pods} sidecars enforce this policy{first}"))
        }
        (Verdict::Accepted, None) => {
            (true, reason::ENFORCED, format!("all {pods} sidecars enforce this policy"))
        }
    }
}

/// The status of a policy that this build cannot decode. It replaces the old status, which cannot be decoded either.
pub fn unreadable(generation: i64, error: &str, now: &Time) -> Value {
    let mut conditions = Vec::new();
    let message = unreadable_message(error);
    set_condition(&mut conditions, ("Ready", false, reason::INVALID, &message), generation, now);
    json!({"observedGeneration": generation, "conditions": conditions})
}

/// Message for a policy that this build cannot decode: what is wrong and what to do.
fn unreadable_message(error: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let what = match error.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`')) {
        Some((field, _)) => format!("does not know field {field}: upgrade the operator, or remove the field"),
        // A condition's message has a length limit, and an error may quote a value.
        None => {
            let error: String = error.chars().take(1000).collect();
            format!("cannot read this policy: {error}; upgrade the operator, or correct the field")
        }
    };
    format!("this operator ({version}) {what}; the last readable version stays in force")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn strict() -> MeshPolicy {
        serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
            "metadata": {"name": "strict", "generation": 3},
            "spec": {"target": {"kind": "Namespace"}, "mtls": "Strict"},
        }))
        .unwrap()
    }

    fn at(enforcing: usize, pods: usize) -> Progress {
        let awaited = (enforcing < pods).then(|| "web-a".to_owned());
        Progress { pods, enforcing, awaited, refusal: None }
    }

    #[test]
    fn the_integers_beside_enforced_say_the_same_as_the_string() {
        let key: Key = ("shop".into(), "strict".into());
        for (enforcing, text) in [(2, "2/3"), (3, "3/3")] {
            let now = Time(Timestamp::UNIX_EPOCH);
            let status = status(&key, &strict(), &Verdict::Accepted, &at(enforcing, 3), &now);
            assert_eq!(status.enforced.as_deref(), Some(text));
            let integers = (status.selected_sidecars, status.enforcing_sidecars);
            assert_eq!(integers, (Some(3), i32::try_from(enforcing).ok()));
            assert_eq!(status.observed_generation, Some(3));
        }
    }

    #[test]
    fn the_condition_says_what_is_awaited_and_of_whom() {
        let refused = Progress { refusal: Some("pod web-b: requires split/v2".into()), ..at(2, 3) };
        for (progress, ready, reason, message) in [
            (at(0, 0), true, "NoWorkloads", "the target selects no pod with a sidecar"),
            (at(1, 3), false, "Propagating", "1 of 3 sidecars enforce this policy; waiting for pod web-a"),
            (at(3, 3), true, "Enforced", "all 3 sidecars enforce this policy"),
            (refused, false, "RefusedBySidecar", "pod web-b: requires split/v2"),
        ] {
            let found = condition(&Verdict::Accepted, &progress);
            assert_eq!(found, (ready, reason, message.to_owned()));
        }
    }

    #[test]
    fn a_policy_that_is_not_accepted_is_not_ready_whatever_sidecars_say() {
        let conflicted = Verdict::Conflicted { with: "older".into(), section: "mtls" };
        for (verdict, reason) in [
            (Verdict::Invalid("a".into()), "Invalid"),
            (Verdict::TargetNotFound("b".into()), "TargetNotFound"),
            (conflicted, "Conflicted"),
        ] {
            let (ready, found, message) = condition(&verdict, &at(3, 3));
            assert_eq!((ready, found), (false, reason));
            assert!(!message.is_empty());
        }
    }

    #[test]
    fn a_policy_is_complete_when_all_enforce_it_and_none_refuses() {
        assert!(at(0, 0).is_complete() && at(3, 3).is_complete());
        assert!(!at(2, 3).is_complete());
        assert!(!Progress { refusal: Some("pod a: no".into()), ..at(3, 3) }.is_complete());
    }

    #[test]
    fn an_unreadable_policy_names_the_field_and_what_to_do() {
        let status = unreadable(7, "unknown field `jwt`, expected `from`", &Time(Timestamp::UNIX_EPOCH));
        assert_eq!(status["observedGeneration"], 7);
        let ready = &status["conditions"][0];
        assert_eq!((ready["status"].as_str(), ready["reason"].as_str()), (Some("False"), Some("Invalid")));
        let message = ready["message"].as_str().unwrap();
        assert!(message.contains("does not know field jwt: upgrade the operator, or remove"), "{message}");
        assert!(message.ends_with("the last readable version stays in force"), "{message}");
        let other = unreadable_message("invalid type: integer");
        assert!(other.contains("invalid type: integer"), "{other}");
    }
}
