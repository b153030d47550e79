//! What the page of a workload shows.

use std::collections::BTreeSet;

use tulle_mesh::query::{DenialRow, VersionAttempts};

use super::*;

fn view() -> Workload<'static> {
    let golden =
        Golden { requests: 60, rps: 1.0, success: Some(0.75), p99_ms: Some(12.0), ..Golden::default() };
    Workload {
        me: Party { namespace: "shop".into(), kind: "Deployment".into(), name: "web".into() },
        covered: 60,
        row: StatRow { golden: golden.clone(), ..StatRow::default() },
        timeline: Timeline { step: 10, start: 0, points: vec![golden.clone(), golden] },
        pods: vec![Sidecar {
            namespace: "shop".into(),
            pod: "web-0".into(),
            connected: true,
            ..Sidecar::default()
        }],
        ..Workload::default()
    }
}

#[test]
fn a_chart_ends_with_the_last_point_whose_counts_have_come() {
    let points = vec![Golden::default(); 6];
    let timeline = Timeline { step: 10, start: 100, points };
    let length = |now| whole(timeline.clone(), now).points.len();
    assert_eq!([length(155), length(156), length(150), length(146), length(100)], [4, 5, 4, 4, 0]);
}

#[test]
fn a_page_has_a_table_for_every_chart_and_the_commands() {
    let text = workload(&view()).into_string();
    assert_eq!(text.matches("<figure").count(), 3);
    assert_eq!(text.matches("<details").count(), 3, "no neighbours here, so only the charts have tables");
    assert!(text.contains("tulle stat deployment/web -n shop --window 1m"), "{text}");
    assert!(text.contains("tulle denials web -n shop"), "{text}");
    assert!(text.contains("<h1>Deployment shop/web</h1>"), "{text}");
    assert!(!text.contains(" style=") && !text.contains("<style"), "the CSP forbids it");
}

#[test]
fn a_denial_is_listed_with_its_rule_and_the_command_that_replays_it() {
    let caller = Party { namespace: "pay".into(), kind: "ServiceAccount".into(), name: "cart".into() };
    let denied = DenialRow {
        at_unix_ms: 3_661_500,
        id: "0123456789abcdef".into(),
        caller: Some(caller),
        method: "POST".into(),
        path: "/orders".into(),
        policy: "guarded".into(),
        rule: "DenyRule(0)".into(),
        ..DenialRow::default()
    };
    let opaque = DenialRow { method: String::new(), path: String::new(), caller: None, ..denied.clone() };
    let strict = DenialRow { policy: String::new(), rule: "Plaintext".into(), cut: true, ..denied.clone() };
    let denials = Denials { leader: true, dropped: 1_200, rows: vec![denied, opaque, strict] };
    let text = workload(&Workload { denials, ..view() }).into_string();
    for part in [
        "<th scope=\"row\">01:01:01</th><td>ServiceAccount pay/cart</td><td>POST /orders</td><td>guarded</td>\
         <td>DenyRule(0)</td><td><code>tulle explain --denial 0123456789abcdef -n shop</code></td>",
        "<td>a client of another namespace</td><td>opaque connection</td>",
        "<td>POST /orders (cut)</td><td>\u{2013}</td><td>Plaintext</td>",
        "1,200 more were refused",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(!text.contains("does not lead"), "{text}");
}

#[test]
fn an_empty_list_of_denials_names_its_cause() {
    let says = |view: &Workload<'_>, cause: &str| {
        let text = workload(view).into_string();
        let (_, rest) = text.split_once("<h2 id=\"denials\">").unwrap();
        let (section, _) = rest.split_once("</section>").unwrap();
        assert!(section.contains(cause), "{cause} in {section}");
    };
    let mut view = view();
    view.denials.leader = true;
    view.pods[0].connected = true;
    says(&view, "have refused nothing");
    view.row.golden.denied = 3;
    says(&view, "no single one is known");
    view.pods[0].connected = false;
    says(&view, "No sidecar of this workload is connected to the operator; `tulle check` says why.");
    view.denials.leader = false;
    view.denials.rows = vec![DenialRow::default()];
    says(&view, "does not lead: denials of the last seconds may be missing");
}

/// The ids of a page, in order.
fn ids(text: &str) -> Vec<&str> {
    text.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect()
}

#[test]
fn the_canary_shows_its_evidence_as_a_picture_with_a_table() {
    let of = |attempts, failures| VersionAttempts { attempts, failures, ..VersionAttempts::default() };
    let evidence =
        Evidence { leader: true, canary: of(400, 12), stable: of(8_000, 8), ..Evidence::default() };
    let canary = CanaryLine {
        name: "web".into(),
        sentence: "12 of 400 failed".into(),
        evidence: Some(evidence),
        ..CanaryLine::default()
    };
    let text = workload(&Workload { canary: Some(canary), ..view() }).into_string();
    let places = ["12 of 400 failed", "400, failed 12", ">8,000</td>", "3.00 %"].map(|part| text.find(part));
    assert!(places.iter().all(Option::is_some), "{places:?} in {text}");
    assert!(places[0] < places[1] && places[1] < places[2], "{places:?} in {text}");
    assert_eq!(text.matches("<figure").count(), 4, "three charts, and the evidence");
    let ids = ids(&text);
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert!(unique.contains("evidence-title") && unique.contains("rps-title"), "{ids:?}");
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
    assert!(!text.contains(" style="), "the CSP forbids it");
}

#[test]
fn a_canary_without_attempts_says_why_it_has_no_picture() {
    let evidence = Some(Evidence { leader: true, ..Evidence::default() });
    let canary = CanaryLine { name: "web".into(), evidence, ..CanaryLine::default() };
    let text = workload(&Workload { canary: Some(canary), ..view() }).into_string();
    assert!(text.contains("No attempt has been counted") && !text.contains("evidence-title"), "{text}");
}

#[test]
fn a_denial_is_listed_by_caller_and_the_way_to_its_rule_is_shown() {
    let caller = Party { namespace: "shop".into(), kind: "ServiceAccount".into(), name: "cart".into() };
    let row = |count| FailureRow { reason: "PolicyDenied".into(), caller: caller.clone(), count };
    let mut view = Workload { covered: 120, failures: vec![row(30)], ..view() };
    view.row.golden.denied = 30;
    let text = workload(&view).into_string();
    for part in [
        "<th scope=\"row\">PolicyDenied</th><td>ServiceAccount shop/cart</td>",
        "data-v=\"30\">30</td>",
        "data-v=\"15\">15.0</td>",
        "tulle explain --denial ID",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    view.row.golden.denied = 0;
    assert!(!workload(&view).into_string().contains("--denial"), "only where something was denied");
    view.failures = (1..=60).map(row).collect();
    assert!(workload(&view).into_string().contains("and 10 more rows with lower counts"));
}

#[test]
fn an_empty_page_names_its_cause() {
    let quiet = Workload { timeline: Timeline::default(), row: StatRow::default(), ..view() };
    assert!(workload(&quiet).into_string().contains("No traffic in the last 1m."));
    let young = Workload { covered: 20, ..quiet.clone() };
    assert!(workload(&young).into_string().contains("began 20s ago"));
    let lost = Workload { pods: vec![Sidecar { connected: false, ..Sidecar::default() }], ..quiet.clone() };
    assert!(workload(&lost).into_string().contains("No sidecar of this workload is connected"));
    let none = Workload { pods: Vec::new(), ..quiet };
    assert!(workload(&none).into_string().contains("none of its pods has one"));
}

#[test]
fn names_from_the_cluster_are_escaped_wherever_they_stand() {
    let evil = "<img src=x onerror=alert(1)>";
    let mut view = view();
    let caller = Party { kind: "ServiceAccount".into(), namespace: evil.into(), name: evil.into() };
    view.failures = vec![FailureRow { reason: evil.into(), caller, count: 1 }];
    view.policies = vec![PolicyRow { name: evil.into(), problem: Some(evil.into()), ..PolicyRow::default() }];
    view.canary = Some(CanaryLine { name: evil.into(), sentence: evil.into(), ..CanaryLine::default() });
    view.routes = vec![StatRow { route: Some(evil.into()), ..StatRow::default() }];
    view.without = vec![evil.into()];
    view.denials.rows = vec![DenialRow { path: evil.into(), rule: evil.into(), ..DenialRow::default() }];
    view.me.name = evil.into();
    let text = workload(&view).into_string();
    assert!(!text.contains("<img") && text.contains("&lt;img"), "{text}");
    assert!(text.contains("'deployment/&lt;img"), "quoted for the shell: {text}");
}

#[test]
fn a_sidecar_that_is_behind_says_so_in_words() {
    let pod = Sidecar {
        behind_seconds: Some(65),
        refused: vec!["MeshPolicy/shop/web: invalid cidr".into()],
        certificate_not_after: Some(3_700),
        ..Sidecar::default()
    };
    let text = sidecars("Pods", &[pod], 100).into_string();
    for part in ["behind for 1m 5s", "invalid cidr", "1h 0m left", ">no</strong>"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}
