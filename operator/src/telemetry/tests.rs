use tulle_mesh::denial::DenialId;
use tulle_mesh::proto::{
    RecentDenial, RecentDenials, RequestCounts, RuleCounts, RuleKey, SeriesCounts, SeriesKey, series_key,
};
use tulle_mesh::query::{By, Party};

use super::history::MAX_SERIES;
use super::keys::MAX_KEYS;
use super::*;
use crate::model::tests::{pod, shop};

const NOW: i64 = 1_800_000_000;

fn web() -> Option<Reporter> {
    Some(Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() })
}

fn key(id: u32) -> SeriesKey {
    SeriesKey {
        id,
        direction: series_key::Direction::Outbound.into(),
        namespace: "shop".into(),
        peer: format!("api-{id}"),
        revision: "r1".into(),
        protocol: "http1".into(),
        mtls: true,
        ..SeriesKey::default()
    }
}

/// Two requests, of which one failed.
fn counts(key: u32) -> SeriesCounts {
    SeriesCounts { key, classes: vec![0, 1, 0, 0, 1], buckets: vec![30, 2], ..SeriesCounts::default() }
}

fn report(sequence: u64, keys: Vec<SeriesKey>, series: Vec<SeriesCounts>) -> TelemetryReport {
    TelemetryReport { sequence, process: 7, keys, series, ..TelemetryReport::default() }
}

/// Name of the peer, and requests.
fn seen(aggregates: &Aggregates) -> Vec<(String, u64)> {
    let sum = aggregates.history().since(600, NOW);
    sum.series.iter().map(|(id, counts)| (id.peer.to_string(), counts.requests())).collect()
}

#[test]
fn a_report_that_comes_twice_counts_once() {
    let aggregates = Aggregates::default();
    let counts = RequestCounts {
        namespace: "shop".into(),
        service: "web".into(),
        revision: "a".into(),
        requests: 5,
        failures: 1,
        buckets: vec![3, 5],
        sum_micros: 9,
    };
    let report = TelemetryReport {
        sequence: 1,
        process: 7,
        counts: vec![counts],
        interval_ms: 1000,
        ..TelemetryReport::default()
    };
    assert_eq!(aggregates.add("pod", None, &report), Taken::Counted);
    assert_eq!(aggregates.add("pod", None, &report), Taken::Replay, "through another replica");
    let restarted = TelemetryReport { process: 8, ..report };
    assert_eq!(aggregates.add("pod", None, &restarted), Taken::Counted);
    let counted: Vec<Counts> = aggregates.all().into_iter().map(|(_, counts, _)| counts).collect();
    assert_eq!(counted, [Counts { requests: 10, failures: 2 }]);
    aggregates.retain(|_| false, |_, _| false);
    assert!(aggregates.all().is_empty(), "sums of a revision that no longer exists are removed");
}

#[test]
fn attempts_are_merged_by_pod_until_they_are_asked_for_once() {
    let aggregates = Aggregates::default();
    let attempts = AttemptCounts {
        namespace: "shop".into(),
        canary: "web".into(),
        epoch: 2,
        revision: "b".into(),
        pod_uid: "b-0".into(),
        attempts: 4,
        failures: 9,
        buckets: vec![3, 4],
        ..AttemptCounts::default()
    };
    for process in [1, 2] {
        let report = TelemetryReport {
            sequence: 1,
            process,
            attempts: vec![attempts.clone()],
            ..TelemetryReport::default()
        };
        aggregates.add("client", None, &report);
    }
    let key: Key = ("shop".into(), "web".into());
    let taken = aggregates.take_attempts(&key);
    let taken: Vec<_> = taken.iter().map(|c| (c.attempts, c.failures, c.buckets.clone())).collect();
    assert_eq!(taken, [(8, 8, vec![3, 8])], "no more can fail than were attempted");
    assert_eq!(aggregates.take_attempts(&key), []);
}

#[test]
fn a_sidecar_cannot_fill_the_memory_with_names() {
    let aggregates = Aggregates::default();
    let attempts = (0..MAX_ATTEMPTS + 50).map(|n| AttemptCounts {
        namespace: "shop".into(),
        canary: "web".into(),
        pod_uid: n.to_string(),
        attempts: 1,
        ..AttemptCounts::default()
    });
    let report = TelemetryReport { sequence: 1, attempts: attempts.collect(), ..TelemetryReport::default() };
    aggregates.add("client", None, &report);
    let key: Key = ("shop".into(), "web".into());
    assert_eq!(aggregates.take_attempts(&key).len(), MAX_ATTEMPTS);
    aggregates.add("client", None, &TelemetryReport { sequence: 2, ..report });
    aggregates.retain_canaries(|_| false);
    assert_eq!(aggregates.take_attempts(&key), []);
}

#[test]
fn a_key_is_named_once_and_a_number_from_then_on() {
    let aggregates = Aggregates::default();
    let taken = aggregates.add_at("pod", web(), &report(1, vec![key(1)], vec![counts(1)]), NOW);
    assert_eq!(taken, Taken::Counted);
    let taken = aggregates.add_at("pod", web(), &report(2, vec![], vec![counts(1)]), NOW);
    assert_eq!(taken, Taken::Counted);
    assert_eq!(seen(&aggregates), [("api-1".to_owned(), 4)]);
    let all = aggregates.all();
    let (destination, total, latency) = all.first().unwrap();
    assert_eq!((destination.service.as_str(), destination.revision.as_str()), ("api-1", "r1"));
    assert_eq!((*total, latency.count()), (Counts { requests: 4, failures: 2 }, 4));
}

#[test]
fn nothing_of_a_report_with_an_unknown_key_is_counted_until_it_comes_with_all_keys() {
    let aggregates = Aggregates::default();
    let series = vec![counts(1), counts(2)];
    let taken = aggregates.add_at("pod", web(), &report(5, vec![key(1)], series.clone()), NOW);
    assert_eq!((taken, seen(&aggregates)), (Taken::Forgotten, vec![]));
    let taken = aggregates.add_at("pod", web(), &report(5, vec![key(1), key(2)], series), NOW);
    assert_eq!(taken, Taken::Counted);
    assert_eq!(seen(&aggregates), [("api-1".to_owned(), 2), ("api-2".to_owned(), 2)]);
    assert_eq!(aggregates.history().since(60, NOW).lost, 0, "what another leader has counted is not lost");
}

#[test]
fn a_replay_is_dropped_and_a_gap_is_known() {
    let aggregates = Aggregates::default();
    for (sequence, taken) in
        [(1, Taken::Counted), (1, Taken::Replay), (5, Taken::Counted), (4, Taken::Replay)]
    {
        let report = report(sequence, vec![key(1)], vec![counts(1)]);
        assert_eq!(aggregates.add_at("pod", web(), &report, NOW), taken, "{sequence}");
    }
    assert_eq!(seen(&aggregates), [("api-1".to_owned(), 4)]);
    assert_eq!(aggregates.history().since(60, NOW).lost, 3);
}

#[test]
fn a_pod_with_too_many_keys_is_not_asked_for_them_for_ever() {
    let aggregates = Aggregates::default();
    let most = u32::try_from(MAX_KEYS).unwrap();
    let keys: Vec<SeriesKey> = (0..most + 10).map(key).collect();
    let report = report(1, keys, vec![counts(0), counts(most + 1), counts(most + 9)]);
    assert_eq!(aggregates.add_at("pod", web(), &report, NOW), Taken::Counted);
    assert_eq!(seen(&aggregates), [("_OTHER".to_owned(), 4), ("api-0".to_owned(), 2)]);
}

#[test]
fn a_process_that_names_new_series_for_years_is_asked_for_its_keys_again_and_keeps_their_names() {
    let aggregates = Aggregates::default();
    let mut sequence = 0;
    let mut forgotten = 0;
    for id in 0..3 * u32::try_from(MAX_KEYS).unwrap() {
        sequence += 1;
        // A series of its own, and one that is always there, whose key was sent with the first report.
        let keys = if id == 0 { vec![key(0)] } else { vec![key(id)] };
        let first = report(sequence, keys, vec![counts(0), counts(id)]);
        match aggregates.add_at("pod", web(), &first, NOW) {
            Taken::Counted => {}
            Taken::Forgotten => {
                forgotten += 1;
                let again = report(sequence, vec![key(0), key(id)], first.series);
                assert_eq!(aggregates.add_at("pod", web(), &again, NOW), Taken::Counted, "{id}");
            }
            Taken::Replay => panic!("{id}"),
        }
    }
    assert!((2..4).contains(&forgotten), "{forgotten}");
    let processes = lock(&aggregates.inner).processes.remove("pod").unwrap();
    let last = processes.last().unwrap().series(3 * u32::try_from(MAX_KEYS).unwrap() - 1).unwrap();
    assert_eq!(&*last.peer, format!("api-{}", 3 * MAX_KEYS - 1));
}

#[test]
fn beyond_the_bound_the_series_of_a_workload_are_one() {
    let aggregates = Aggregates::default();
    let most = u32::try_from(MAX_SERIES).unwrap();
    for first in (0..most + 500).step_by(500) {
        let ids = first..first + 500;
        let report = report(1, ids.clone().map(key).collect(), ids.map(counts).collect());
        let reporter = Reporter { workload: format!("web-{first}").into(), ..web().unwrap() };
        aggregates.add_at(&format!("pod-{first}"), Some(reporter), &report, NOW);
    }
    let seen = seen(&aggregates);
    assert_eq!(seen.len(), MAX_SERIES + 1);
    assert!(seen.contains(&("_OTHER".to_owned(), 1000)));
}

#[test]
fn a_workload_that_names_many_series_leaves_room_for_others() {
    let aggregates = Aggregates::default();
    let most = u32::try_from(history::MAX_OF_REPORTER).unwrap();
    let many = report(1, (0..most + 100).map(key).collect(), (0..most + 100).map(counts).collect());
    aggregates.add_at("pod", web(), &many, NOW);
    let seen = seen(&aggregates);
    assert_eq!(seen.len(), history::MAX_OF_REPORTER + 1);
    assert!(seen.contains(&("_OTHER".to_owned(), 200)));
}

/// Requests in each slot of the last two minutes.
fn points(aggregates: &Aggregates, now: i64) -> Vec<u64> {
    let timeline = aggregates.history().timeline(120, now, |_| true);
    timeline.points.iter().map(|point| point.requests).collect()
}

#[test]
fn what_a_sidecar_has_counted_in_an_outage_is_spread_over_it() {
    let aggregates = Aggregates::default();
    let of = |sequence, requests, seconds: u64| {
        let counts = SeriesCounts { key: 1, classes: vec![0, requests], ..SeriesCounts::default() };
        let report = report(sequence, vec![key(1)], vec![counts]);
        TelemetryReport { interval_ms: seconds * 1000, ..report }
    };
    aggregates.add_at("pod", web(), &of(1, 7, 5), NOW);
    aggregates.add_at("pod", web(), &of(2, 10, 5), NOW + 5);
    aggregates.add_at("pod", web(), &of(3, 76, 65), NOW + 75);
    assert_eq!(points(&aggregates, NOW + 75), [17, 10, 11, 11, 11, 11, 11, 11]);
    assert_eq!(aggregates.history().since(120, NOW + 75).series[0].1.requests(), 93, "nothing is lost");
    assert_eq!(aggregates.history().covered(NOW + 75), 75, "no more than is known");
}

#[test]
fn long_times_of_one_process_do_not_overlap() {
    let aggregates = Aggregates::default();
    for sequence in 1..=3 {
        let counts = SeriesCounts { key: 1, classes: vec![0, 8], ..SeriesCounts::default() };
        let report = report(sequence, vec![key(1)], vec![counts]);
        let report = TelemetryReport { interval_ms: 75_000, ..report };
        let at = if sequence == 1 { NOW } else { NOW + 75 };
        aggregates.add_at("pod", web(), &report, at);
    }
    assert_eq!(points(&aggregates, NOW + 75), [9, 1, 1, 1, 1, 1, 1, 9]);
}

#[test]
fn the_first_report_of_a_process_says_nothing_about_the_time_before() {
    let aggregates = Aggregates::default();
    let first = TelemetryReport { interval_ms: 600_000, ..report(9, vec![key(1)], vec![counts(1)]) };
    aggregates.add_at("pod", web(), &first, NOW);
    let covered = aggregates.history().covered(NOW);
    assert_eq!((covered, points(&aggregates, NOW)), (0, vec![2]));
}

#[test]
fn a_gap_counts_within_a_term_and_a_replica_that_takes_over_notes_one() {
    let aggregates = Aggregates::default();
    let lost = || aggregates.history().since(60, NOW).lost;
    let count = |sequence| {
        let report = report(sequence, vec![key(1)], vec![counts(1)]);
        assert_eq!(aggregates.add_at("pod", web(), &report, NOW), Taken::Counted);
    };
    aggregates.lead_at(1, NOW);
    count(1);
    assert_eq!(lost(), 0, "there was nothing before");
    // Another replica has led meanwhile, and counted the reports up to 8.
    aggregates.lead_at(3, NOW);
    count(9);
    assert_eq!(lost(), 1, "what the other has counted since its history was copied");
    aggregates.lead_at(3, NOW);
    count(12);
    assert_eq!(lost(), 3, "and what really did not come");
}

#[test]
fn a_sum_in_portions_is_the_sum() {
    let aggregates = Aggregates::default();
    let many = report(1, (0..350).map(key).collect(), (0..350).map(counts).collect());
    aggregates.add_at("pod", web(), &many, NOW);
    let whole = aggregates.history().since(60, NOW + 5);
    assert_eq!(aggregates.sum(60, NOW + 5, |_| true), whole);
    let some = aggregates.sum(60, NOW + 5, |id| id.peer.ends_with("-7"));
    let peers: Vec<_> = some.series.iter().map(|(id, _)| &*id.peer).collect();
    assert_eq!((some.window, peers), (whole.window, vec!["api-7"]));
}

#[test]
fn long_names_are_cut_and_unknown_protocols_are_others() {
    let aggregates = Aggregates::default();
    let long = SeriesKey {
        namespace: "ä".repeat(300),
        peer: "p".repeat(300),
        revision: "r".repeat(300),
        route: "t".repeat(3000),
        protocol: "gopher".into(),
        ..key(1)
    };
    aggregates.add_at("pod", web(), &report(1, vec![long], vec![counts(1)]), NOW);
    let sum = aggregates.history().since(60, NOW);
    let (id, _) = sum.series.first().unwrap();
    let lengths = [&id.namespace, &id.peer, &id.revision, &id.route].map(|name| name.len());
    assert_eq!((lengths, &*id.protocol), ([252, 253, 63, 600], "_OTHER"));
}

#[test]
fn a_direction_of_a_newer_version_is_not_counted_and_not_asked_for() {
    let aggregates = Aggregates::default();
    let newer = SeriesKey { direction: 9, ..key(1) };
    let taken = aggregates.add_at("pod", web(), &report(1, vec![newer], vec![counts(1)]), NOW);
    assert_eq!((taken, seen(&aggregates)), (Taken::Counted, vec![]));
}

#[test]
fn a_pod_that_the_model_learns_of_later_reports_as_its_workload_from_then_on() {
    let aggregates = Aggregates::default();
    let model = shop(&[pod("a", "10.1.0.1", "r1")]);
    assert_eq!(reporter_of(&model, "uid-b"), None);
    assert_eq!(reporter_of(&model, "uid-a"), web());
    aggregates.add_at("uid-a", None, &report(1, vec![key(1)], vec![counts(1)]), NOW);
    aggregates.add_at("uid-a", web(), &report(2, vec![], vec![counts(1)]), NOW);
    aggregates.add_at("uid-a", None, &report(3, vec![], vec![counts(1)]), NOW);
    let sum = aggregates.history().since(60, NOW);
    let seen: Vec<_> =
        sum.series.iter().map(|(id, counts)| (&*id.reporter.workload, counts.requests())).collect();
    assert_eq!(seen, [("", 2), ("web", 4)]);
}

/// A report of a rule of the policy `web`.
fn rule_report(sequence: u64, denied: u64, would_deny: u64) -> TelemetryReport {
    let rule_keys = ["DenyRule(0)", "DenyRule(1)"].into_iter().zip(1..).map(|(rule, id)| RuleKey {
        id,
        namespace: "shop".into(),
        policy: "web".into(),
        rule: rule.into(),
    });
    TelemetryReport {
        rule_keys: rule_keys.collect(),
        rules: vec![
            RuleCounts { key: 1, denied, would_deny },
            RuleCounts { key: 2, denied: 0, would_deny: 1 },
        ],
        ..report(sequence, vec![], vec![])
    }
}

#[test]
fn reports_of_two_pods_merge_to_counts_per_rule_in_metrics_and_in_the_window_of_the_workload() {
    let aggregates = Aggregates::default();
    for pod in ["a", "b"] {
        assert_eq!(aggregates.add_at(pod, web(), &rule_report(1, 3, 4), NOW), Taken::Counted);
        assert_eq!(aggregates.add_at(pod, web(), &rule_report(1, 3, 4), NOW), Taken::Replay);
        let numbers = TelemetryReport { rule_keys: vec![], ..rule_report(2, 0, 2) };
        assert_eq!(aggregates.add_at(pod, web(), &numbers, NOW), Taken::Counted);
    }
    let rule = |rule: &str| RuleId { policy: ("shop".into(), "web".into()), rule: rule.into() };
    let expected = [
        (rule("DenyRule(0)"), Verdicts { denied: 6, would_deny: 12 }),
        (rule("DenyRule(1)"), Verdicts { denied: 0, would_deny: 4 }),
    ];
    assert_eq!(aggregates.rules(|_| true), expected);
    let me = web().unwrap().party();
    let sum = aggregates.history().since(60, NOW + 20);
    assert_eq!(rules::of_workload(&sum, &me).into_iter().collect::<Vec<_>>(), expected);
    assert!(rules::of_workload(&sum, &Party::default()).is_empty(), "of another workload");
    let model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let rows = query::stat(&sum, &model, &query::StatQuery::default()).rows;
    assert!(rows.iter().all(|row| row.golden.requests == 0), "they are not requests: {rows:?}");
    assert!(query::edges(&sum, &model, None).edges.is_empty());
    assert!(aggregates.rules(|_| false).is_empty(), "the policy was deleted");
}

#[test]
fn a_rule_that_the_leader_does_not_know_is_asked_for_and_then_counted_once() {
    let aggregates = Aggregates::default();
    let numbers = TelemetryReport { rule_keys: vec![], ..rule_report(5, 1, 0) };
    assert_eq!(aggregates.add_at("pod", web(), &numbers, NOW), Taken::Forgotten);
    assert!(aggregates.rules(|_| true).is_empty());
    assert_eq!(aggregates.add_at("pod", web(), &rule_report(5, 1, 0), NOW), Taken::Counted);
    assert_eq!(aggregates.rules(|_| true).len(), 2);
}

#[test]
fn a_pod_counts_for_no_policy_of_another_namespace() {
    let aggregates = Aggregates::default();
    let elsewhere = Reporter { namespace: "payments".into(), ..web().unwrap() };
    aggregates.add_at("pod", Some(elsewhere.clone()), &rule_report(1, 3, 4), NOW);
    let sum = aggregates.history().since(60, NOW);
    assert!(aggregates.rules(|_| true).is_empty());
    assert!(rules::of_workload(&sum, &elsewhere.party()).is_empty());
}

#[test]
fn ejections_are_counted_by_destination() {
    let aggregates = Aggregates::default();
    let ejected = SeriesCounts { ejections: 2, ..counts(1) };
    aggregates.add_at("pod", web(), &report(1, vec![key(1)], vec![ejected.clone()]), NOW);
    aggregates.add_at("pod", web(), &report(2, vec![], vec![ejected]), NOW + 20);
    let sum = aggregates.history().since(60, NOW + 40);
    let by_service = query::StatQuery { by: By::Service, ..query::StatQuery::default() };
    let rows = query::stat(&sum, &shop(&[]), &by_service).rows;
    let seen: Vec<_> = rows.iter().map(|row| (row.party.name.as_str(), row.golden.ejections)).collect();
    assert_eq!(seen, [("api-1", 4)]);
}

#[test]
fn the_denials_of_a_report_are_kept_once_and_only_when_it_is_counted() {
    let aggregates = Aggregates::default();
    let now = now();
    let denial = RecentDenial {
        id: DenialId::new("pod", 1).to_string(),
        at_unix_ms: now * 1_000,
        policy: "shop/web".into(),
        rule: "DenyRule(0)".into(),
        ..RecentDenial::default()
    };
    let denials = Some(RecentDenials { denials: vec![denial], dropped: 0 });
    let unknown = TelemetryReport { denials: denials.clone(), ..report(1, vec![], vec![counts(1)]) };
    assert_eq!(aggregates.add_at("pod", web(), &unknown, now), Taken::Forgotten);
    let of_web = |by: &Reporter| Some(by) == web().as_ref();
    assert!(aggregates.denials(of_web).rows.is_empty(), "they come again with the keys");
    let whole = TelemetryReport { denials, ..report(1, vec![key(1)], vec![counts(1)]) };
    assert_eq!(aggregates.add_at("pod", web(), &whole, now), Taken::Counted);
    assert_eq!(aggregates.add_at("pod", web(), &whole, now), Taken::Replay);
    assert_eq!(aggregates.denials(of_web).rows.len(), 1);
    assert!(aggregates.denials(|by| !of_web(by)).rows.is_empty(), "of another workload");
}
