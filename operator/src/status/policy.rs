//! Computes the status of a MeshPolicy: which pods it selects, how many enforce it, and its conditions.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};
use tulle_crds::{MeshPolicy, MeshPolicySpec, MeshPolicyStatus, TargetKind, reason, set_condition};

use crate::discovery::{AckTracker, ClientAcknowledgement};
use crate::model::{Key, Model, Verdict, access_summary, target_name};

/// Names of sidecars that a message tells at most.
const NAMED: usize = 3;

/// How many sidecars enforce a policy: those of the pods that it selects, and those of clients that call its Services.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Selected pods with a sidecar.
    pub workloads: usize,
    /// Those of them that have sections of the policy to enforce: none where it is only about calls.
    pub pods: usize,
    /// How many of those pods enforce it.
    pub enforcing: usize,
    /// Name of the first pod that does not enforce it.
    pub awaited: Option<String>,
    /// Which pod refused it, and why.
    pub refusal: Option<String>,
    /// The sidecars of clients; `None` where the policy says nothing about calls.
    pub clients: Option<ClientAcknowledgement>,
    /// Why what the policy says about calls holds for none.
    pub uncalled: Option<String>,
}

impl Progress {
    /// How far the newest version of a policy has come.
    pub fn of(model: &Model, acks: &AckTracker, key: &Key, policy: &MeshPolicy) -> Self {
        let pods = model.policy_pods(key);
        let uid = policy.metadata.uid.as_deref().unwrap_or("");
        let generation = policy.metadata.generation.unwrap_or_default();
        let calls = concerned_sections(&policy.spec);
        let uncalled = model.uncalled(key, &policy.spec);
        let clients = (!calls.is_empty() && uncalled.is_none()).then(|| {
            let addresses = model.called_addresses(key);
            acks.policy_clients(model, (key, uid, generation), &addresses)
        });
        let mut progress = Self { workloads: pods.len(), clients, uncalled, ..Self::default() };
        if progress.clients.is_some() && policy.spec.pod_sections().is_empty() {
            return progress;
        }
        // Where a narrower policy decides, there is no section of this one to acknowledge.
        let deciding: Vec<_> = pods.iter().map(|uid| (Arc::clone(uid), model.sections(key, uid))).collect();
        let seen = acks.policy(model, key, uid, generation, &deciding);
        progress.pods = pods.len();
        progress.enforcing = seen.enforcing;
        (progress.awaited, progress.refusal) = (seen.awaited, seen.refusal);
        progress
    }

    /// Whether all sidecars enforce it, and none has refused it.
    pub fn is_complete(&self) -> bool {
        let clients = self.clients.as_ref();
        self.enforcing >= self.pods
            && self.refusal().is_none()
            && clients.is_none_or(|clients| clients.behind.is_empty())
    }

    /// Which pod refused it, and why.
    fn refusal(&self) -> Option<&String> {
        self.refusal.as_ref().or(self.clients.as_ref().and_then(|clients| clients.refusal.as_ref()))
    }

    /// Sidecars that enforce it, and those that are to.
    fn counts(&self) -> (usize, usize) {
        let clients = self.clients.as_ref();
        let (using, behind) =
            clients.map_or((0, 0), |clients| (clients.using, clients.behind.len().min(clients.using)));
        (self.enforcing.min(self.pods) + using - behind, self.pods + using)
    }
}

/// The sections about calls that have an effect, by name.
fn concerned_sections(spec: &MeshPolicySpec) -> Vec<&'static str> {
    if spec.target.kind == TargetKind::Workload { Vec::new() } else { spec.call_sections() }
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
    let (ready, reason, message) = condition(&policy.spec, verdict, progress);
    let (acknowledging, sidecars) = progress.counts();
    // Sidecars have nothing to acknowledge of a policy that is not in force, and lack nothing of it.
    let enforcing = if reason == reason::INVALID { 0 } else { acknowledging };
    status.observed_generation = Some(generation);
    status.target = Some(target_name(&policy.spec, &key.0));
    status.access = Some(access_summary(&policy.spec));
    status.sections = sections_summary(&policy.spec);
    status.workloads = i32::try_from(progress.workloads).ok();
    status.enforced = Some(format!("{enforcing}/{sidecars}"));
    status.selected_sidecars = i32::try_from(sidecars).ok();
    status.enforcing_sidecars = i32::try_from(enforcing).ok();
    set_condition(&mut status.conditions, ("Ready", ready, reason, &message), generation, now);
    status
}

/// The names of the sections besides mtls and access, which have columns of their own.
fn sections_summary(spec: &MeshPolicySpec) -> Option<String> {
    let limits = spec.limits.is_some().then_some("limits");
    let telemetry = spec.telemetry.is_some().then_some("telemetry");
    let names: Vec<&str> = limits.into_iter().chain(spec.call_sections()).chain(telemetry).collect();
    (!names.is_empty()).then(|| names.join(","))
}

/// Condition Ready: whether it is true, its reason, and its message.
fn condition(spec: &MeshPolicySpec, verdict: &Verdict, progress: &Progress) -> (bool, &'static str, String) {
    match verdict {
        Verdict::Invalid(why) => (false, reason::INVALID, why.clone()),
        Verdict::TargetNotFound(why) => (false, reason::TARGET_NOT_FOUND, why.clone()),
        Verdict::Conflicted { with, section } => {
            let whom = if spec.call_sections().contains(section) { "Services" } else { "pods" };
            let message = format!(
                "MeshPolicy {with} is older and has {section} for the same {whom}: merge them, or narrow a target"
            );
            (false, reason::CONFLICTED, message)
        }
        Verdict::Accepted => {
            let misplaced = misplaced(spec).or_else(|| progress.uncalled.clone());
            let Some(misplaced) = misplaced else { return acknowledged(progress) };
            if spec.pod_sections().is_empty() {
                return (false, reason::INVALID, misplaced);
            }
            let (ready, reason, message) = acknowledged(progress);
            (ready, reason, format!("{message}; {misplaced}"))
        }
    }
}

/// Sections that have no effect, and what to write instead.
fn misplaced(spec: &MeshPolicySpec) -> Option<String> {
    let sections = spec.call_sections();
    if spec.target.kind != TargetKind::Workload || sections.is_empty() {
        return None;
    }
    let sections = sections.join(", ");
    Some(format!(
        "target a Service for {sections}: calls are made to Services, and a Workload target has no effect on them"
    ))
}

/// What the sidecars make of an accepted policy.
fn acknowledged(progress: &Progress) -> (bool, &'static str, String) {
    let Progress { pods, enforcing, awaited, clients, .. } = progress;
    if let Some(refusal) = progress.refusal() {
        return (false, reason::REFUSED, refusal.clone());
    }
    let using = clients.as_ref().map_or(0, |clients| clients.using);
    if enforcing < pods {
        let first = awaited.as_ref().map(|pod| format!("; waiting for pod {pod}")).unwrap_or_default();
        return (
            false,
            reason::PROPAGATING,
            format!("{enforcing} of {pods} sidecars enforce this policy{first}"),
        );
    }
    if let Some(clients) = clients.as_ref().filter(|clients| !clients.behind.is_empty()) {
        let behind = clients.behind.len();
        let message = format!(
            "{} of {using} sidecars of clients enforce this policy; waiting for {}",
            using.saturating_sub(behind),
            names(&clients.behind)
        );
        return (false, reason::PROPAGATING, message);
    }
    match (pods, clients) {
        (0, None) => (true, reason::NO_WORKLOADS, "the target selects no pod with a sidecar".to_owned()),
        (0, Some(_)) if using == 0 => (
            true,
            reason::ENFORCED,
            "no sidecar calls a Service that this policy is for yet; one that begins to enforces the policy from its first call"
                .to_owned(),
        ),
        (0, Some(_)) => (true, reason::ENFORCED, format!("all {using} sidecars of clients enforce this policy")),
        (_, None) => (true, reason::ENFORCED, format!("all {pods} sidecars enforce this policy")),
        (_, Some(_)) if using == 0 => (
            true,
            reason::ENFORCED,
            format!(
                "all {pods} sidecars enforce this policy; no sidecar calls a Service that it is for yet"
            ),
        ),
        (_, Some(_)) => (
            true,
            reason::ENFORCED,
            format!("all {pods} sidecars enforce this policy, and so do all {using} sidecars of clients"),
        ),
    }
}

/// The first few pods of many.
fn names(pods: &BTreeSet<String>) -> String {
    let named: Vec<&str> = pods.iter().take(NAMED).map(String::as_str).collect();
    let named = named.join(", ");
    match pods.len().saturating_sub(NAMED) {
        0 => named,
        more => format!("{named} and {more} more"),
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

    fn policy(spec: Value) -> MeshPolicy {
        serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
            "metadata": {"name": "strict", "generation": 3}, "spec": spec,
        }))
        .unwrap()
    }

    fn strict() -> MeshPolicy {
        policy(json!({"target": {"kind": "Namespace"}, "mtls": "Strict"}))
    }

    fn fast() -> MeshPolicy {
        let target = json!({"kind": "Service", "name": "web"});
        policy(json!({"target": target, "timeout": {"request": "2s"}, "retry": {"on": ["5xx"]}}))
    }

    fn at(enforcing: usize, pods: usize) -> Progress {
        let awaited = (enforcing < pods).then(|| "web-a".to_owned());
        Progress { workloads: pods, pods, enforcing, awaited, ..Progress::default() }
    }

    fn calls(using: usize, behind: &[&str]) -> Progress {
        let behind = behind.iter().map(|pod| (*pod).to_owned()).collect();
        let clients = Some(ClientAcknowledgement { using, behind, refusal: None });
        Progress { workloads: 2, clients, ..Progress::default() }
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
            let found = condition(&strict().spec, &Verdict::Accepted, &progress);
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
            let (ready, found, message) = condition(&strict().spec, &verdict, &at(3, 3));
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
    fn a_policy_about_logs_names_its_section_and_is_one_for_pods() {
        let spec = serde_json::json!({"target": {"kind": "Namespace"}, "telemetry": {"accessLog": "Errors"}});
        let spec = serde_json::from_value(spec).unwrap();
        assert_eq!(sections_summary(&spec).as_deref(), Some("telemetry"));
        assert_eq!(spec.pod_sections(), ["telemetry"]);
    }

    #[test]
    fn a_policy_about_calls_counts_the_sidecars_of_clients_and_names_three_that_are_behind() {
        let key: Key = ("shop".into(), "fast".into());
        let now = Time(Timestamp::UNIX_EPOCH);
        let behind = ["shop/a", "shop/b", "shop/c", "shop/d", "shop/e"];
        let progress = calls(7, &behind);
        let status = status(&key, &fast(), &Verdict::Accepted, &progress, &now);
        assert_eq!(status.sections.as_deref(), Some("timeout,retry"));
        assert_eq!((status.workloads, status.enforced.as_deref()), (Some(2), Some("2/7")));
        let ready = &status.conditions[0];
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Propagating"));
        assert_eq!(
            ready.message,
            "2 of 7 sidecars of clients enforce this policy; waiting for shop/a, shop/b, shop/c and 2 more"
        );
        assert!(!progress.is_complete() && calls(7, &[]).is_complete());
        let refusal = Some("pod shop/a: lacks traffic/v1".to_owned());
        let refused =
            ClientAcknowledgement { using: 1, behind: BTreeSet::from(["shop/a".to_owned()]), refusal };
        let refused = Progress { clients: Some(refused), ..Progress::default() };
        let (ready, reason, message) = condition(&fast().spec, &Verdict::Accepted, &refused);
        assert_eq!(
            (ready, reason, message.as_str()),
            (false, "RefusedBySidecar", "pod shop/a: lacks traffic/v1")
        );
    }

    #[test]
    fn a_policy_about_calls_that_nobody_makes_is_ready_and_says_so() {
        let key: Key = ("shop".into(), "fast".into());
        let now = Time(Timestamp::UNIX_EPOCH);
        let status = status(&key, &fast(), &Verdict::Accepted, &calls(0, &[]), &now);
        assert_eq!(status.enforced.as_deref(), Some("0/0"));
        let ready = &status.conditions[0];
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("True", "Enforced"));
        assert!(ready.message.starts_with("no sidecar calls a Service"), "{}", ready.message);
    }

    #[test]
    fn a_policy_about_pods_and_calls_is_ready_when_both_kinds_of_sidecars_enforce_it() {
        let both = |pods: Progress, behind: &[&str]| Progress { clients: calls(2, behind).clients, ..pods };
        let said = |progress: &Progress| {
            let (ready, _, message) = acknowledged(progress);
            (ready, progress.counts(), message)
        };
        let (ready, counts, message) = said(&both(at(1, 3), &[]));
        assert_eq!((ready, counts), (false, (3, 5)));
        assert!(message.contains("waiting for pod web-a"), "{message}");
        assert_eq!(said(&both(at(3, 3), &["shop/a"])).1, (4, 5));
        assert!(!said(&both(at(3, 3), &["shop/a"])).0);
        assert!(said(&both(at(3, 3), &[])).0);
        let (_, _, message) = said(&Progress { clients: calls(0, &[]).clients, ..at(3, 3) });
        assert!(message.ends_with("; no sidecar calls a Service that it is for yet"), "{message}");
    }

    #[test]
    fn sections_about_calls_on_a_workload_target_have_no_effect_and_the_condition_says_what_to_target() {
        let target = json!({"kind": "Workload", "selector": {"matchLabels": {"app": "web"}}});
        let alone = policy(json!({"target": target, "timeout": {"request": "2s"}, "retry": {"on": ["5xx"]}}));
        let (ready, reason, message) = condition(&alone.spec, &Verdict::Accepted, &at(2, 2));
        assert_eq!((ready, reason), (false, "Invalid"));
        assert!(message.starts_with("target a Service for timeout, retry:"), "{message}");
        let mixed = policy(json!({"target": target, "mtls": "Strict", "timeout": {"request": "2s"}}));
        let (ready, reason, message) = condition(&mixed.spec, &Verdict::Accepted, &at(2, 2));
        assert_eq!((ready, reason), (true, "Enforced"));
        assert!(message.contains("target a Service for timeout:"), "{message}");
    }

    #[test]
    fn sections_about_calls_to_a_service_without_an_address_have_no_effect_and_nobody_enforces_them() {
        let uncalled = Some("target a Service with a cluster IP for timeout, retry".to_owned());
        let progress = Progress { uncalled: uncalled.clone(), ..at(2, 2) };
        let (key, now): (Key, _) = (("shop".into(), "fast".into()), Time(Timestamp::UNIX_EPOCH));
        let alone = status(&key, &fast(), &Verdict::Accepted, &progress, &now);
        let ready = &alone.conditions[0];
        assert_eq!((ready.status.as_str(), ready.reason.as_str()), ("False", "Invalid"));
        assert_eq!((Some(&ready.message), alone.enforced.as_deref()), (uncalled.as_ref(), Some("0/2")));
        let (ready, _, message) = condition(&strict().spec, &Verdict::Accepted, &progress);
        assert!(ready && message.starts_with("all 2 sidecars enforce this policy; target a"), "{message}");
    }

    #[test]
    fn an_invalid_policy_is_not_counted_as_enforced() {
        let (key, now): (Key, _) = (("shop".into(), "strict".into()), Time(Timestamp::UNIX_EPOCH));
        let invalid = Verdict::Invalid("nothing of it is in force until it is fixed".to_owned());
        let status = status(&key, &strict(), &invalid, &at(3, 3), &now);
        assert_eq!((status.enforced.as_deref(), status.enforcing_sidecars), (Some("0/3"), Some(0)));
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
