use std::time::Duration;

use super::*;
use crate::query::{Health, Sidecar};

/// 2026-01-02T00:00:00Z.
const NOW: i64 = 1_767_312_000;
const LEAF_LIFETIME: Duration = Duration::from_secs(86_400);

fn view(reader: Reader) -> View<'static> {
    View { system: "mesh", only: None, now: NOW, reader }
}

fn health(leader: bool) -> Health {
    Health { version: "0.3.0".to_owned(), pod: "tulle-operator-0".to_owned(), leader, ..Health::default() }
}

fn sidecar() -> Sidecar {
    Sidecar {
        namespace: "shop".to_owned(),
        pod: "web-1".to_owned(),
        version: "0.3.0".to_owned(),
        connected: true,
        certificate_not_after: Some(NOW + 86_400),
        ..Sidecar::default()
    }
}

fn pod(started: Option<i64>, terminating: bool) -> Pod<'static> {
    Pod { namespace: "shop", name: "web-1", started, terminating, idle: None }
}

/// Findings that are not OK, as `ID found => fix`.
fn faults(findings: Vec<Finding>) -> Vec<String> {
    let bad = findings.into_iter().filter(|finding| finding.result != Outcome::Ok);
    bad.map(|finding| format!("{} {} => {}", finding.id, finding.found, finding.fix)).collect()
}

fn judged(sidecar: &Sidecar, pod: Option<Pod<'_>>) -> Vec<String> {
    let health = health(true);
    let judge = SidecarJudge::new(view(Reader::Command), Some(&health), pod, LEAF_LIFETIME);
    let found = faults(judge.judge(std::slice::from_ref(sidecar)));
    assert_eq!(judge.is_reported(sidecar), !found.is_empty(), "{found:?}");
    found
}

#[test]
fn numbers_are_unique_and_in_order() {
    let ids: Vec<&str> = list::ALL.iter().map(|check| check.id).collect();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(ids, sorted);
}

#[test]
fn a_pod_need_not_be_connected_in_its_first_thirty_seconds_or_once_it_ends() {
    let lost = Sidecar { connected: false, ..sidecar() };
    let reported = [
        "T0703 1 sidecars have waited for over 30 s or are not connected: shop/web-1 (not connected) => tulle pods -A",
    ];
    let none: [&str; 0] = [];
    assert_eq!(judged(&lost, Some(pod(Some(NOW), false))), none);
    assert_eq!(judged(&lost, Some(pod(Some(NOW - 29), false))), none);
    assert_eq!(judged(&lost, Some(pod(Some(NOW - 30), false))), reported);
    assert_eq!(judged(&lost, Some(pod(Some(NOW - 3_600), true))), none);
    assert_eq!(judged(&lost, Some(pod(None, false))), reported);
    assert_eq!(judged(&lost, None), reported);
    let other = Pod { name: "web-2", ..pod(Some(NOW), false) };
    assert_eq!(judged(&lost, Some(other)), reported);
}

#[test]
fn a_sidecar_that_does_not_run_is_not_said_to_enforce_anything() {
    let lost = Sidecar { connected: false, ..sidecar() };
    let failing = |is_logged| {
        let state = if is_logged { "CrashLoopBackOff" } else { "ImagePullBackOff" };
        Pod { idle: Some(Idle { container: "tulle-init", state, is_logged }), ..pod(Some(NOW - 60), false) }
    };
    assert_eq!(
        judged(&lost, Some(failing(true))),
        [
            "T0703 1 sidecars do not run: shop/web-1 (tulle-init: CrashLoopBackOff) => kubectl -n shop logs web-1 -c tulle-init"
        ]
    );
    assert_eq!(
        judged(&lost, Some(failing(false))),
        [
            "T0703 1 sidecars do not run: shop/web-1 (tulle-init: ImagePullBackOff) => kubectl -n shop describe pod web-1"
        ]
    );
    let none: [&str; 0] = [];
    assert_eq!(judged(&sidecar(), Some(failing(true))), none, "it is connected by now");
    let starting = Pod { started: Some(NOW), ..failing(true) };
    assert_eq!(judged(&lost, Some(starting)), none);
    let health = health(true);
    let judge = SidecarJudge::new(view(Reader::Command), Some(&health), [failing(true)], LEAF_LIFETIME);
    let other = Sidecar { pod: "web-2".to_owned(), ..lost.clone() };
    let found = faults(judge.judge(&[other, lost]));
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("T0703 1 sidecars do not run: shop/web-1"), "{found:?}");
    assert!(found[1].contains("are not connected: shop/web-2 (not connected)"), "{found:?}");
}

#[test]
fn a_pod_that_starts_is_judged_by_all_else() {
    let refused = Sidecar { refused: vec!["route a: b".to_owned()], ..sidecar() };
    let found = judged(&refused, Some(pod(Some(NOW), false)));
    assert_eq!(
        found,
        [
            "T0702 sidecar of shop/web-1 has refused 1 resources: route a: b => kubectl -n shop delete pod web-1"
        ]
    );
}

#[test]
fn a_replica_that_does_not_lead_is_not_asked_which_sidecars_wait_and_each_reader_is_told_what_to_do() {
    let lost = [Sidecar { connected: false, ..sidecar() }];
    let health = health(false);
    for (reader, fix) in
        [(Reader::Command, "kubectl -n mesh get lease tulle-operator"), (Reader::Page, "tulle dashboard")]
    {
        let judge = SidecarJudge::new(view(reader), Some(&health), None, LEAF_LIFETIME);
        let why = "pod tulle-operator-0 does not lead, and knows only those that are connected to it";
        let expected = format!("T0703 sidecars could not be checked: {why} => {fix}");
        assert_eq!(faults(judge.judge(&lost)), [expected]);
        assert!(!judge.is_reported(&lost[0]));
    }
}

#[test]
fn what_a_sidecar_has_not_reported_is_not_called_well() {
    let silent = Sidecar {
        version: String::new(),
        connected: false,
        certificate_not_after: None,
        pod: "web-2".to_owned(),
        ..sidecar()
    };
    let both = [sidecar(), silent];
    let of = |leader: bool| {
        let health = health(leader);
        let starting = Pod { name: "web-2", ..pod(Some(NOW), false) };
        let judge = SidecarJudge::new(view(Reader::Command), Some(&health), [starting], LEAF_LIFETIME);
        let found = judge.judge(&both).into_iter();
        found.map(|finding| (finding.id, finding.result, finding.found)).collect::<Vec<_>>()
    };
    for (id, result, found) in of(true).into_iter().filter(|(id, ..)| *id != "T0703") {
        let expected = "1 of 2 sidecars; the others have reported nothing, see T0703";
        assert_eq!((result, found.as_str()), (Outcome::Ok, expected), "{id}");
    }
    let found = of(false);
    assert_eq!(found.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), ["T0701", "T0702", "T0703", "T0704"]);
    for (id, result, found) in found {
        assert_eq!(result, Outcome::Warning, "{id}: {found}");
        assert!(found.contains("could not be checked: pod tulle-operator-0 does not lead"), "{id}: {found}");
    }
}

#[test]
fn a_lease_is_renewed_in_thirty_seconds_or_nobody_leads() {
    let of = |leadership: Leadership<'_>| faults(vec![leader(&leadership, &view(Reader::Command))]);
    let lease = |ago: i64| Leadership::Lease { holder: "tulle-operator-1", renewed: Some(NOW - ago) };
    let logs = "kubectl -n mesh logs deployment/tulle-operator";
    let none: [&str; 0] = [];
    assert_eq!(of(lease(30)), none);
    assert_eq!(
        of(lease(31)),
        [format!("T0303 pod tulle-operator-1 has not renewed the Lease for 31s => {logs}")]
    );
    let vacant = [format!("T0303 no replica leads => {logs}")];
    assert_eq!(of(Leadership::Lease { holder: "", renewed: Some(NOW) }), vacant);
    assert_eq!(of(Leadership::Lease { holder: "tulle-operator-1", renewed: None }), vacant);
    assert_eq!(of(Leadership::Replica { knows_leader: true }), none);
    assert_eq!(of(Leadership::Replica { knows_leader: false }).len(), 1);
}

#[test]
fn the_time_left_of_a_root_is_compared_with_the_wanted_one() {
    let of = |left: i64, within: i64| {
        let health = Health { root_not_after: Some(NOW + left), ..health(true) };
        root(&health, within, &view(Reader::Page)).result
    };
    assert_eq!(of(ROOT_ENDS_SOON, ROOT_ENDS_SOON), Outcome::Ok);
    assert_eq!(of(ROOT_ENDS_SOON - 1, ROOT_ENDS_SOON), Outcome::Warning);
    assert_eq!(of(60, 59), Outcome::Ok);
    assert_eq!(of(0, 59), Outcome::Error);
}

#[test]
fn a_condition_of_the_mesh_config_that_is_false_is_reported_with_its_message() {
    let of = |type_, status, reason| {
        let found = config([Condition { type_, status, reason, message: "why", since: None }]);
        assert!(found.iter().all(|finding| !finding.hint.is_empty()), "{found:?}");
        found.into_iter().map(|finding| (finding.id, finding.result, finding.found, finding.fix)).next()
    };
    let expected = |result, found: &str, fix: &str| Some(("T0401", result, found.to_owned(), fix.to_owned()));
    for reason in ["RootMissing", "RootMismatch", "RootReplaced"] {
        let found = format!("MeshConfig mesh: {reason}: why");
        let restore = "kubectl replace --force -f tulle-root.yaml";
        assert_eq!(of("RootValid", "False", reason), expected(Outcome::Error, &found, restore));
    }
    let hint = |reason| {
        let found =
            config([Condition { type_: "RootValid", status: "False", reason, message: "", since: None }]);
        found.into_iter().map(|finding| finding.hint).collect::<String>()
    };
    assert!(hint("RootReplaced").contains("if that one is intended"), "it is not deleted unawares");
    assert!(!hint("RootMissing").contains("deletes"));
    let describe = "kubectl describe meshconfig mesh";
    assert_eq!(
        of("Ready", "False", "TrustDomainFixed"),
        expected(Outcome::Error, "MeshConfig mesh: TrustDomainFixed: why", describe)
    );
    assert_eq!(
        of("LeafLifetime", "False", "Clamped"),
        expected(Outcome::Warning, "MeshConfig mesh: Clamped: why", "kubectl edit meshconfig mesh")
    );
    assert_eq!(of("RootValid", "True", "RootInUse"), None);
    assert_eq!(of("RootValid", "Unknown", "Pending"), None);
}

/// What is found of a Canary with these conditions: type, status, reason and message.
fn of_canary(conditions: &[(&str, &str, &str, &str)]) -> Vec<Finding> {
    let condition =
        |&(type_, status, reason, message)| Condition { type_, status, reason, message, since: None };
    let conditions = conditions.iter().map(condition).collect();
    canaries(&[Canary { namespace: "shop", name: "web", is_waiting: false, conditions }])
}

#[test]
fn a_canary_whose_version_has_failed_is_a_warning_with_what_to_do() {
    let found = of_canary(&[
        ("Ready", "True", "Watching", ""),
        ("Progressing", "False", "Failed", "Failed"),
        ("Promoted", "False", "Failed", "aborted by hand"),
    ]);
    let [failed, in_time] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!((failed.id, failed.result, in_time.result), ("T0901", Outcome::Warning, Outcome::Ok));
    assert_eq!(failed.found, "Canary shop/web: Failed: aborted by hand");
    assert_eq!(failed.fix, "tulle canary status web -n shop");
    for part in ["corrected version", "tulle canary retry web -n shop", "tulle canary undo web -n shop"] {
        assert!(failed.hint.contains(part), "{}", failed.hint);
    }
    // The condition outlives the rollout that it is about.
    let again =
        [("Progressing", "True", "Progressing", ""), ("Promoted", "False", "Failed", "aborted by hand")];
    assert_eq!(faults(of_canary(&again)), Vec::<String>::new());
}

#[test]
fn a_canary_whose_traffic_cannot_be_split_is_reported() {
    for (reason, expected) in
        [("NoGate", Outcome::Error), ("NoSplit", Outcome::Error), ("NoService", Outcome::Warning)]
    {
        let found = of_canary(&[("Split", "False", reason, "why")]).remove(0);
        assert_eq!(found.result, expected, "{reason}");
        assert_eq!(found.found, format!("Canary shop/web: {reason}: why"));
        assert!(!found.hint.is_empty() && !found.fix.is_empty(), "{found:?}");
    }
    assert_eq!(faults(of_canary(&[("Split", "True", "SplitApplies", "")])), Vec::<String>::new());
}

#[test]
fn a_version_that_the_judge_holds_is_reported_once_that_lasts() {
    let held = |message: &str| of_canary(&[("HeldByJudge", "True", "HeldByJudge", message)]).remove(0);
    assert_eq!(held("revision new does not pass").result, Outcome::Ok, "most doubts end within a few blocks");
    let lasting = held("revision new does not pass; an event of this rollout says why");
    assert_eq!(lasting.result, Outcome::Warning);
    assert_eq!(lasting.found, "Canary shop/web: HeldByJudge: revision new does not pass");
    assert_eq!(lasting.fix, "tulle canary status web -n shop");
    assert!(lasting.hint.contains("tulle canary promote web -n shop"), "{}", lasting.hint);
    let over = of_canary(&[("HeldByJudge", "False", "NoLongerHeld", "held earlier")]);
    assert_eq!(faults(over), Vec::<String>::new());
    let source = include_str!("../../../operator/src/rollout/machine/held.rs");
    assert!(source.contains(objects::HELD_FOR_LONG), "the operator ends its message in other words");
}

#[test]
fn a_rollout_that_has_passed_its_deadline_need_not_be_short_of_traffic() {
    let late = of_canary(&[("DeadlineExceeded", "True", "DeadlineExceeded", "not decided")]).remove(1);
    assert_eq!((late.id, late.result), ("T0902", Outcome::Warning));
    assert!(late.hint.contains("not Pass") && late.hint.contains("raise the deadline"), "{}", late.hint);
}

#[test]
fn every_finding_that_is_not_ok_has_a_hint_and_a_command() {
    let unknown = Health { series: 1, max_series: 1, ..health(false) };
    let view = view(Reader::Page);
    let old = Sidecar {
        version: "0.9.0".to_owned(),
        refused: vec!["no".to_owned()],
        certificate_not_after: Some(NOW),
        ..sidecar()
    };
    let mut findings = vec![
        leader(&Leadership::NoLease, &view),
        leader(&Leadership::Replica { knows_leader: false }, &view),
        series(&unknown),
        root(&unknown, 1, &view),
    ];
    findings.extend(injected([WithoutSidecar { namespace: "shop", name: "old", is_restartable: true }]));
    findings.extend(SidecarJudge::new(view, Some(&unknown), None, LEAF_LIFETIME).judge(&[old]));
    let unreadable =
        Policy { namespace: "shop", name: "deny", state: PolicyState::Unreadable { error: "why" } };
    findings.extend(policies(&[unreadable], &view));
    assert_eq!(findings.len(), 10, "{findings:#?}");
    for finding in findings {
        assert!(finding.result != Outcome::Ok, "{finding:?}");
        assert!(!finding.hint.is_empty() && !finding.fix.is_empty(), "{finding:?}");
    }
}

/// Pods without a sidecar, of workloads that are not known.
fn injected<'a>(without: impl IntoIterator<Item = WithoutSidecar<'a>>) -> Vec<Finding> {
    uninjected(without.into_iter().map(|pod| Uninjected { pod, workload: None }))
}

#[test]
fn a_pod_that_no_restart_replaces_is_not_to_be_restarted() {
    let pod = |name, is_restartable| WithoutSidecar { namespace: "shop", name, is_restartable };
    let judged = |pods: Vec<WithoutSidecar<'static>>| injected(pods).remove(0);
    let alone = judged(vec![pod("a", false)]);
    assert_eq!(alone.fix, "kubectl -n shop replace --force -f MANIFEST");
    assert!(alone.hint.ends_with("must be created again"), "{}", alone.hint);
    let mixed = judged(vec![pod("a", false), pod("b", true)]);
    assert!(mixed.fix.ends_with("rollout restart deployment,statefulset,daemonset"), "{}", mixed.fix);
    assert!(mixed.hint.contains("must be created again"), "{}", mixed.hint);
    assert!(mixed.hint.contains("restarts every workload of the namespace"), "{}", mixed.hint);
    let all = judged(vec![pod("b", true)]);
    assert!(!all.hint.contains("must be created again"), "{}", all.hint);
}

#[test]
fn only_the_workloads_of_pods_without_a_sidecar_are_restarted_unless_they_are_many() {
    let of = |name, workload: Option<String>| {
        let is_restartable = workload.is_some();
        Uninjected { pod: WithoutSidecar { namespace: "shop", name, is_restartable }, workload }
    };
    let judged = |pods: Vec<Uninjected<'static>>| uninjected(pods).remove(0);
    let known = |name, workload: &str| of(name, Some(workload.to_owned()));
    let few = judged(vec![
        known("db-0", "statefulset/db"),
        known("web-1", "deployment/web"),
        known("web-2", "deployment/web"),
        of("alone", None),
    ]);
    assert_eq!(few.fix, "kubectl -n shop rollout restart deployment/web statefulset/db");
    assert!(few.hint.ends_with("must be created again"), "{}", few.hint);
    let numbered =
        |count: usize| judged((0..count).map(|number| known("a", &format!("deployment/{number}"))).collect());
    assert!(numbered(10).fix.contains(" deployment/9"), "{}", numbered(10).fix);
    let many = numbered(11);
    assert_eq!(many.fix, "kubectl -n shop rollout restart deployment,statefulset,daemonset");
    assert!(many.hint.contains("every workload") && many.hint.contains("Canary"), "{}", many.hint);
}

#[test]
fn a_version_may_have_a_prefix_and_a_suffix() {
    assert_eq!(version("v1.31.2+k3s1"), Some((1, 31, 2)));
    assert_eq!(version("0.3"), Some((0, 3, 0)));
    assert_eq!(version("unknown"), None);
}
