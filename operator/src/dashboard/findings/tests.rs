use std::collections::BTreeSet;

use serde_json::{Value, json};
use tulle_crds::reason;

use super::*;
use crate::model::tests::{canary, key, pod, policy, shop};
use crate::model::{self, Unreadable};

const DAY: i64 = 86_400;
/// 2026-01-02T00:00:00Z.
const NOW: i64 = 1_767_312_000;

fn health() -> Health {
    Health {
        version: "0.3.0".into(),
        pod: "tulle-operator-0".into(),
        leader: true,
        root_not_after: Some(NOW + 3_650 * DAY),
        max_series: 100,
        ..Health::default()
    }
}

fn sidecar(pod: &str) -> Sidecar {
    Sidecar {
        namespace: "shop".into(),
        pod: pod.into(),
        version: "0.3.0".into(),
        connected: true,
        acknowledged: 4,
        resources: 4,
        certificate_not_after: Some(NOW + DAY),
        ..Sidecar::default()
    }
}

fn model() -> Model {
    shop(&[pod("a", "10.1.0.1", "r1")])
}

fn judged(health: &Health, sidecars: &[Sidecar], model: &Model) -> Judged {
    let sidecars = Sidecars { sidecars: sidecars.to_vec(), without: Vec::new() };
    let facts = Facts { health, sidecars: &sidecars, is_led: true, system: "mesh", only: None, now: NOW };
    judge(&facts, model)
}

/// Findings as `ID result: found => fix`.
fn lines(judged: &Judged) -> Vec<String> {
    let line = |finding: &Finding| {
        let result = if finding.result == Outcome::Error { "error" } else { "warning" };
        format!("{} {result}: {} => {}", finding.id, finding.found, finding.fix)
    };
    judged.findings.iter().map(line).collect()
}

fn of_sidecar(sidecar: &Sidecar) -> Vec<String> {
    lines(&judged(&health(), std::slice::from_ref(sidecar), &model()))
}

#[test]
fn a_healthy_mesh_has_no_finding() {
    assert_eq!(judged(&health(), &[sidecar("a")], &model()), Judged::default());
}

#[test]
fn every_check_of_the_command_is_made_here_or_named_as_made_there() {
    let (health, sidecars, model) = (health(), Sidecars::default(), model());
    let facts =
        Facts { health: &health, sidecars: &sidecars, is_led: true, system: "mesh", only: None, now: NOW };
    let here = made(&facts, &model, &sidecar_judge(&facts, &model));
    let there = COMMAND_ONLY.iter().flat_map(|(_, ids)| ids.iter().copied());
    let named: Vec<&str> = here.iter().map(|finding| finding.id).chain(there).collect();
    let all: BTreeSet<&str> = checks::ALL.iter().map(|check| check.id).collect();
    assert_eq!(named.iter().copied().collect::<BTreeSet<_>>(), all);
    assert_eq!(named.len(), all.len(), "one is named twice: {named:?}");
}

#[test]
fn a_root_is_reported_thirty_days_before_it_ends() {
    let of =
        |left: i64| lines(&judged(&Health { root_not_after: Some(NOW + left), ..health() }, &[], &model()));
    let fix = "kubectl -n mesh get secret tulle-root -o yaml > tulle-root.yaml";
    assert_eq!(of(30 * DAY), Vec::<String>::new());
    assert_eq!(of(30 * DAY - 1), [format!("T0401 warning: the root certificate ends in 29d => {fix}")]);
    assert_eq!(
        of(-60),
        [format!(
            "T0401 error: the root certificate ended 60s ago, so sidecars cannot connect to each other => {fix}"
        )]
    );
}

#[test]
fn the_operators_own_faults_are_reported() {
    let full = Health { series: 100, ..health() };
    let full = lines(&judged(&full, &[], &model()));
    assert_eq!(
        full,
        [
            "T0306 warning: the operator holds 100 series, and takes no more => tulle top -A --once --limit 0 --window 6h"
        ]
    );
    assert!(lines(&judged(&Health { series: 99, ..health() }, &[], &model())).is_empty());
    let sidecars = Sidecars { without: vec!["shop/old".into(), "shop/older".into()], ..Sidecars::default() };
    let health = health();
    let only = Some("shop");
    let facts = Facts { health: &health, sidecars: &sidecars, is_led: false, system: "mesh", only, now: NOW };
    assert_eq!(
        lines(&judge(&facts, &model())),
        [
            "T0303 error: no replica leads, as far as this one knows => kubectl -n mesh logs deployment/tulle-operator",
            "T0602 warning: 2 pods of namespace shop have no sidecar: old, older => kubectl -n shop rollout restart deployment,statefulset,daemonset",
        ]
    );
}

#[test]
fn only_the_workload_of_a_pod_without_a_sidecar_is_restarted() {
    let sidecars = Sidecars { without: vec!["shop/a".into()], ..Sidecars::default() };
    let health = health();
    let facts =
        Facts { health: &health, sidecars: &sidecars, is_led: true, system: "mesh", only: None, now: NOW };
    let of = |pod: model::Pod| lines(&judge(&facts, &shop(&[pod]))).remove(0);
    let plain = || model::Pod { injected: false, ..pod("a", "10.1.0.1", "r1") };
    let found = "T0602 warning: 1 pods of namespace shop have no sidecar: a => kubectl -n shop";
    assert_eq!(of(plain()), format!("{found} rollout restart deployment/web"));
    assert_eq!(of(model::Pod { workload: None, ..plain() }), format!("{found} replace --force -f MANIFEST"));
}

#[test]
fn a_root_secret_that_is_lost_is_reported_while_the_operators_have_the_root_in_memory() {
    let mut model = model();
    let config = |status: &str| -> tulle_crds::MeshConfig {
        let condition = json!({"type": "RootValid", "status": status, "reason": "RootMissing", "message": "why",
            "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let object = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"},
            "spec": {}, "status": {"conditions": [condition]}});
        serde_json::from_value(object).unwrap()
    };
    model.apply_config(Some(&config("False")));
    assert_eq!(
        lines(&judged(&health(), &[sidecar("a")], &model)),
        ["T0401 error: MeshConfig mesh: RootMissing: why => kubectl replace --force -f tulle-root.yaml"]
    );
    model.apply_config(Some(&config("True")));
    assert_eq!(judged(&health(), &[sidecar("a")], &model), Judged::default());
}

#[test]
fn a_sidecar_is_judged_as_the_command_judges_it() {
    for (sidecar, expected) in [
        (
            Sidecar { version: "0.4.0".into(), ..sidecar("a") },
            "T0701 warning: 1 sidecars have a version that this operator does not support: shop/a (0.4.0) => kubectl get pods -A -L tulle.dev/sidecar",
        ),
        (
            Sidecar { refused: vec!["Access: invalid cidr".into()], ..sidecar("a") },
            "T0702 error: sidecar of shop/a has refused 1 resources: Access: invalid cidr => kubectl -n shop delete pod a",
        ),
        (
            Sidecar { behind_seconds: Some(31), acknowledged: 3, ..sidecar("a") },
            "T0703 warning: 1 sidecars have waited for over 30 s or are not connected: shop/a (3/4) => tulle pods -A",
        ),
        (
            Sidecar { connected: false, ..sidecar("a") },
            "T0703 warning: 1 sidecars have waited for over 30 s or are not connected: shop/a (not connected) => tulle pods -A",
        ),
        (
            Sidecar { certificate_not_after: Some(NOW + DAY / 4 - 1), ..sidecar("a") },
            "T0704 warning: the certificate of shop/a ends in 5h59m => kubectl -n shop logs a -c tulle-proxy",
        ),
        (
            Sidecar { certificate_not_after: Some(NOW - 9), ..sidecar("a") },
            "T0704 error: the certificate of shop/a ended 9s ago => kubectl -n shop delete pod a",
        ),
    ] {
        assert_eq!(of_sidecar(&sidecar), [expected]);
        let listed = judged(&health(), std::slice::from_ref(&sidecar), &model()).sidecars;
        assert_eq!(listed, [sidecar]);
    }
    assert!(of_sidecar(&Sidecar { version: "0.1.9".into(), ..sidecar("a") }).is_empty());
    assert!(of_sidecar(&Sidecar { behind_seconds: Some(30), ..sidecar("a") }).is_empty());
    assert!(of_sidecar(&Sidecar { certificate_not_after: Some(NOW + DAY / 4), ..sidecar("a") }).is_empty());
}

fn unconnected(pod: crate::model::Pod) -> Judged {
    let lost = Sidecar { connected: false, ..sidecar("a") };
    judged(&health(), &[lost], &shop(&[pod]))
}

#[test]
fn a_pod_that_is_being_deleted_need_not_be_connected() {
    let leaving = crate::model::Pod { terminating: true, ..pod("a", "10.1.0.1", "r1") };
    assert_eq!(unconnected(leaving), Judged::default());
}

#[test]
fn a_pod_has_thirty_seconds_from_its_start_to_connect() {
    let started = |ago: i64| crate::model::Pod { started_unix: NOW - ago, ..pod("a", "10.1.0.1", "r1") };
    assert_eq!(unconnected(started(29)), Judged::default());
    let late = unconnected(started(30));
    assert_eq!(late.findings.iter().map(|finding| finding.id).collect::<Vec<_>>(), ["T0703"]);
    assert_eq!(late.sidecars.len(), 1);
}

#[test]
fn a_replica_that_does_not_lead_does_not_call_other_sidecars_lost() {
    let health = Health { leader: false, ..health() };
    let found = judged(&health, &[Sidecar { connected: false, ..sidecar("a") }], &model());
    assert_eq!(
        lines(&found),
        [
            "T0703 warning: sidecars could not be checked: pod tulle-operator-0 does not lead, and knows only those that are connected to it => tulle dashboard"
        ]
    );
    assert!(found.sidecars.is_empty());
}

fn with_policy(reason: &str, observed: i64) -> Vec<String> {
    let mut object = policy("deny", 1, json!({"target": {"kind": "Namespace"}, "mtls": "Strict"}));
    object.metadata.generation = Some(2);
    let status = json!({"observedGeneration": observed, "conditions": [{"type": "Ready", "status": "False",
        "reason": reason, "message": "why", "lastTransitionTime": "2026-01-01T23:50:00Z"}]});
    object.status = Some(serde_json::from_value(status).unwrap());
    let mut model = model();
    model.apply_policy(key("shop", "deny"), object);
    lines(&judged(&health(), &[], &model))
}

#[test]
fn policies_that_are_not_enforced_are_reported_with_their_reason() {
    let fix = "kubectl -n shop describe meshpolicy deny";
    for (reason, result, rest) in [
        (reason::INVALID, "error", ""),
        (reason::CONFLICTED, "error", ""),
        (reason::REFUSED, "error", ""),
        (reason::TARGET_NOT_FOUND, "error", ""),
        (reason::NO_WORKLOADS, "warning", ""),
        (reason::PROPAGATING, "warning", " (for 10m)"),
    ] {
        let expected = format!("T0801 {result}: MeshPolicy shop/deny: {reason}: why{rest} => {fix}");
        assert_eq!(with_policy(reason, 2), [expected]);
    }
    assert!(with_policy(reason::ENFORCED, 2).is_empty());
    assert_eq!(
        with_policy(reason::ENFORCED, 1),
        [format!("T0801 warning: MeshPolicy shop/deny: its present version has no status => {fix}")]
    );
}

#[test]
fn a_policy_that_cannot_be_decoded_is_reported_once_and_in_its_namespace_only() {
    let mut model = model();
    let spec = json!({"target": {"kind": "Namespace"}, "mtls": "Strict"});
    model.apply_policy(key("shop", "deny"), policy("deny", 1, spec));
    let unreadable = Unreadable { error: "unknown field".into(), generation: 2, resource_version: None };
    model.mark_policy_unreadable(key("shop", "deny"), unreadable);
    let expected = "T0801 error: MeshPolicy shop/deny: Invalid: unknown field => kubectl -n shop describe meshpolicy deny";
    assert_eq!(lines(&judged(&health(), &[], &model)), [expected]);
    let (health, sidecars, only) = (health(), Sidecars::default(), Some("payments"));
    let facts = Facts { health: &health, sidecars: &sidecars, is_led: true, system: "mesh", only, now: NOW };
    assert!(judge(&facts, &model).findings.is_empty());
}

fn with_canary(phase: &str, type_: &str, status: &str, reason: &str) -> Vec<String> {
    let condition: Value = json!({"type": type_, "status": status, "reason": reason, "message": "why",
        "lastTransitionTime": "2026-01-01T23:50:00Z"});
    let mut model = model();
    model.apply_canary(key("shop", "web"), canary(json!({"phase": phase, "conditions": [condition]})));
    lines(&judged(&health(), &[], &model))
}

#[test]
fn canaries_that_cannot_go_on_are_reported() {
    let fix = "kubectl -n shop describe canary web";
    for (phase, type_, status, reason, expected) in [
        (
            "Promoting",
            "Stalled",
            "True",
            "PromotionStalled",
            "T0901 error: Canary shop/web: PromotionStalled: why",
        ),
        (
            "Progressing",
            "Acknowledged",
            "False",
            "ClientsDialPods",
            "T0901 error: Canary shop/web: ClientsDialPods: why",
        ),
        ("Progressing", "Ready", "False", "Conflicted", "T0901 error: Canary shop/web: Conflicted: why"),
        (
            "Waiting",
            "Ready",
            "False",
            "TargetNotFound",
            "T0901 warning: Canary shop/web: TargetNotFound: why",
        ),
        ("Progressing", "DeadlineExceeded", "True", "Exceeded", "T0902 warning: Canary shop/web: why"),
    ] {
        assert_eq!(with_canary(phase, type_, status, reason), [format!("{expected} => {fix}")]);
    }
    assert!(with_canary("Progressing", "Stalled", "False", "No").is_empty());
}
