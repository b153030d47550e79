//! What reaches the operator of what is counted.

use prost::Message as _;
use tulle_mesh::policy::Reason;
use tulle_mesh::proto::series_key::Direction;

use super::*;
use crate::error::Failure;
use crate::telemetry::KEPT_SERIES;
use crate::telemetry::attempts::{AttemptKey, Attempts, Seen};
use crate::telemetry::rules::SectionCounts;

/// When every count is due, whatever the jitter.
const LATER: Duration = Duration::from_secs(10);

fn attempt_key(epoch: u64) -> AttemptKey {
    AttemptKey {
        namespace: "shop".into(),
        canary: "web".into(),
        epoch,
        revision: "new".into(),
        pod_uid: "pod".into(),
    }
}

fn attempts(telemetry: &Telemetry, epoch: u64) -> Arc<Attempts> {
    telemetry.attempts_of(attempt_key(epoch)).unwrap()
}

fn counted(report: &TelemetryReport) -> TelemetryAck {
    TelemetryAck { sequence: report.sequence, forgotten: false }
}

fn forgotten(report: &TelemetryReport) -> TelemetryAck {
    TelemetryAck { sequence: report.sequence, forgotten: true }
}

fn ids(report: &TelemetryReport) -> Vec<u32> {
    report.keys.iter().map(|key| key.id).collect()
}

/// An operator that counts each report once, as long as it knows its keys.
#[derive(Default)]
struct Leader {
    keys: HashMap<u32, proto::SeriesKey>,
    last: u64,
    /// By namespace and peer: requests.
    requests: HashMap<(String, String), u64>,
}

impl Leader {
    fn takes(&mut self, report: &TelemetryReport) -> TelemetryAck {
        if report.sequence <= self.last {
            return counted(report);
        }
        self.keys.extend(report.keys.iter().map(|key| (key.id, key.clone())));
        if report.series.iter().any(|counts| !self.keys.contains_key(&counts.key)) {
            return forgotten(report);
        }
        self.last = report.sequence;
        for counts in &report.series {
            let key = &self.keys[&counts.key];
            let sum = self.requests.entry((key.namespace.clone(), key.peer.clone())).or_default();
            *sum += counts.classes.iter().sum::<u64>();
        }
        counted(report)
    }
}

#[test]
fn deltas_add_up_to_the_counters_whatever_is_lost_on_the_way() {
    let telemetry = Arc::new(Telemetry::default());
    let series = telemetry.outbound("shop", "web", "a", "http1");
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    let first = reporter.next_report(now).unwrap();
    series.request(&Ok(500), None, Duration::from_millis(1), (0, 0));
    assert!(reporter.next_report(now).is_none(), "one at a time");
    let looks: Vec<_> = (1..=7).map(|second| now + Duration::from_secs(second)).collect();
    let later: Vec<_> = looks.iter().filter_map(|look| reporter.next_report(*look)).collect();
    assert_eq!(later, std::slice::from_ref(&first), "again, in case nobody who leads has seen it");
    reporter.reconnected();
    now += LATER;
    assert_eq!(reporter.next_report(now).unwrap(), first, "the same again, under its number");
    reporter.acknowledged(counted(&first));
    let second = reporter.next_report(now).unwrap();
    assert_eq!(second.series[0].classes, [0, 0, 0, 0, 1]);
    reporter.acknowledged(counted(&second));
    assert!(reporter.next_report(now + LATER).is_none());
}

#[test]
fn counts_that_nobody_decides_by_wait_and_attempts_under_a_canary_do_not() {
    let telemetry = Arc::new(Telemetry::default());
    let series = telemetry.outbound("shop", "web", "a", "http1");
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let now = Instant::now();
    assert!(reporter.next_report(now).is_none(), "nothing has happened");
    series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    assert!(reporter.next_report(now + Duration::from_secs(3)).is_none());
    attempts(&telemetry, 1).count(Seen::Good, None);
    let both = reporter.next_report(now + Duration::from_secs(3)).unwrap();
    assert_eq!((both.series.len(), both.attempts.len()), (1, 1));
    reporter.acknowledged(counted(&both));
    series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    assert!(reporter.next_report(now + Duration::from_secs(6)).is_none());
    let due = reporter.next_report(now + LATER).unwrap();
    assert_eq!((due.series.len(), due.attempts.len()), (1, 0));
    reporter.acknowledged(counted(&due));
    series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    assert!(reporter.next_report(now + LATER).is_none());
    reporter.flush();
    assert!(reporter.next_report(now + LATER).is_some(), "a stop waits for nothing");
}

#[test]
fn deltas_of_attempts_add_up_and_stay_in_their_epoch() {
    let telemetry = Arc::new(Telemetry::default());
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    let old = attempts(&telemetry, 1);
    old.count(Seen::Unreached, None);
    let first = reporter.next_report(now).unwrap();
    let seen = |report: &TelemetryReport| -> Vec<_> {
        report.attempts.iter().map(|a| (a.epoch, a.attempts, a.failures, a.unreached)).collect()
    };
    assert_eq!(seen(&first), [(1, 1, 1, 1)]);
    // One was under way when the next epoch came.
    let new = attempts(&telemetry, 2);
    new.count(Seen::Good, Some(Duration::from_millis(1)));
    old.count(Seen::Failed, None);
    drop(old);
    now += RESEND_AFTER;
    assert_eq!(reporter.next_report(now).unwrap(), first, "the same again, without what came later");
    reporter.acknowledged(counted(&first));
    let second = reporter.next_report(now).unwrap();
    let mut both = seen(&second);
    both.sort_unstable();
    assert_eq!(both, [(1, 1, 1, 0), (2, 1, 0, 0)]);
    reporter.acknowledged(counted(&second));
    assert!(reporter.next_report(now).is_none());
}

#[test]
fn a_series_that_was_dropped_and_comes_back_is_reported_from_zero_under_another_number() {
    let telemetry = Arc::new(Telemetry::default());
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    let request = || {
        let series = telemetry.outbound("shop", "web", "a", "http1");
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    };
    request();
    request();
    let first = reporter.next_report(now).unwrap();
    assert_eq!(first.series[0].classes, [0, 2]);
    reporter.acknowledged(counted(&first));
    // So many that room becomes short.
    for other in 0..KEPT_SERIES {
        telemetry.outbound("shop", &format!("x{other}"), "a", "http1");
    }
    for _ in 0..12 {
        now += EVICT_EVERY;
        assert!(reporter.next_report(now).is_none());
    }
    assert!(telemetry.all().iter().all(|(key, _)| key.peer != "web"), "unused and reported");
    request();
    let report = reporter.next_report(now + LATER).unwrap();
    assert_eq!(report.series[0].classes, [0, 1]);
    assert_ne!(ids(&report), ids(&first));
}

#[test]
fn a_key_is_sent_once_and_its_number_from_then_on() {
    let telemetry = Arc::new(Telemetry::default());
    let web = telemetry.outbound("shop", "web", "a", "http1");
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    web.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    let first = reporter.next_report(now).unwrap();
    let key = first.keys[0].clone();
    assert_eq!((key.namespace.as_str(), key.peer.as_str(), key.revision.as_str()), ("shop", "web", "a"));
    assert_eq!((key.direction(), key.protocol.as_str(), key.mtls), (Direction::Outbound, "http1", false));
    reporter.acknowledged(counted(&first));
    web.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    telemetry.inbound("shop", "front", "a", "http2").request(&Ok(200), None, Duration::ZERO, (0, 0));
    now += LATER;
    let second = reporter.next_report(now).unwrap();
    assert_eq!(second.series.len(), 2);
    assert_eq!(second.keys.len(), 1, "of the one that is new");
    assert_eq!((second.keys[0].direction(), second.keys[0].mtls), (Direction::Inbound, true));
    assert!(second.series.iter().any(|counts| counts.key == key.id));
}

#[test]
fn everything_that_is_counted_of_a_series_is_in_its_delta() {
    let telemetry = Arc::new(Telemetry::default());
    let series = telemetry.outbound("shop", "web", "a", "http1");
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    let bucket = |millis: u64| tulle_mesh::histogram::bucket_of(millis * 1_000) as u64;
    series.request(&Ok(200), None, Duration::from_millis(1), (1, 2));
    let first = reporter.next_report(now).unwrap();
    reporter.acknowledged(counted(&first));
    series.retried(2);
    series.request(&Err(Failure::UpstreamReset), None, Duration::from_millis(2), (10, 20));
    series.request(&Ok(404), None, Duration::from_millis(8), (0, 0));
    series.connection(Some(&Failure::UpstreamReset), (100, 200));
    series.ejected();
    now += LATER;
    let second = reporter.next_report(now).unwrap();
    let reset = ReasonCount { reason: Failure::UpstreamReset.name().to_owned(), count: 2 };
    let expected = SeriesCounts {
        key: first.keys[0].id,
        classes: vec![0, 0, 0, 1, 0, 0, 1],
        buckets: vec![bucket(2), 1, bucket(8) - bucket(2), 1],
        sum_micros: 10_000,
        bytes_up: 110,
        bytes_down: 220,
        connections: 1,
        reasons: vec![reset],
        retries: 2,
        ejections: 1,
    };
    assert_eq!(second.series, [expected]);
}

#[test]
fn a_report_that_is_forgotten_goes_again_whole_and_all_other_keys_when_they_are_used() {
    let telemetry = Arc::new(Telemetry::default());
    let [web, api] = ["web", "api"].map(|name| telemetry.outbound("shop", name, "a", "http1"));
    let request = |series: &Series| series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    request(&web);
    request(&api);
    let first = reporter.next_report(now).unwrap();
    assert_eq!(first.keys.len(), 2);
    reporter.acknowledged(counted(&first));
    request(&web);
    now += LATER;
    let second = reporter.next_report(now).unwrap();
    assert!(second.keys.is_empty());
    reporter.acknowledged(forgotten(&first));
    assert!(reporter.next_report(now).is_none(), "that was about another report");
    reporter.acknowledged(forgotten(&second));
    let again = reporter.next_report(now).unwrap();
    assert_eq!((again.sequence, &again.series), (second.sequence, &second.series));
    assert_eq!(ids(&again), [second.series[0].key], "with the keys of its series, and no others");
    reporter.acknowledged(counted(&again));
    request(&web);
    request(&api);
    now += LATER;
    let third = reporter.next_report(now).unwrap();
    assert_eq!(third.series.len(), 2);
    assert_eq!(third.keys.len(), 1, "the operator has had the other one again");
    assert_eq!(third.keys[0].peer, "api");
}

#[test]
fn nothing_is_lost_and_nothing_counted_twice_over_reconnects_and_changes_of_the_leader() {
    let telemetry = Arc::new(Telemetry::default());
    let names = ["a", "b", "c"];
    let series = names.map(|name| telemetry.outbound("shop", name, "", "http1"));
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut random = fastrand::Rng::with_seed(7);
    let mut now = Instant::now();
    let (mut leader, mut sums) = (Leader::default(), HashMap::new());
    let mut expected = [0_u64; 3];
    for round in 0..500 {
        for (series, expected) in series.iter().zip(&mut expected) {
            let requests = random.u64(0..3);
            *expected += requests;
            (0..requests).for_each(|_| series.request(&Ok(200), None, Duration::from_millis(1), (0, 0)));
        }
        now += Duration::from_secs(1);
        if random.u8(..10) == 0 {
            reporter.reconnected();
        }
        if round % 50 == 49 && reporter.is_idle() {
            // The next leader takes over what was counted, and nothing of what numbers mean.
            for (of, count) in std::mem::take(&mut leader.requests) {
                *sums.entry(of).or_insert(0) += count;
            }
            leader = Leader { last: leader.last, ..Leader::default() };
        }
        let Some(report) = reporter.next_report(now) else { continue };
        let ack = leader.takes(&report);
        // Every third answer is lost on its way.
        if random.u8(..3) > 0 {
            reporter.acknowledged(ack);
        }
    }
    loop {
        now += LATER;
        let Some(report) = reporter.next_report(now) else { break };
        reporter.acknowledged(leader.takes(&report));
    }
    for (of, count) in leader.requests {
        *sums.entry(of).or_insert(0) += count;
    }
    for (name, expected) in names.iter().zip(expected) {
        assert_eq!(sums.get(&("shop".to_owned(), (*name).to_owned())), Some(&expected), "{name}");
    }
}

/// The report as the operator decodes it.
fn over_the_wire(report: &TelemetryReport) -> TelemetryReport {
    TelemetryReport::decode(report.encode_to_vec().as_slice()).unwrap()
}

#[test]
fn rules_are_named_once_and_their_counts_are_deltas_by_number() {
    let telemetry = Arc::new(Telemetry::default());
    let section = SectionCounts::new("shop/web", 2);
    let count = |rule, shadow| section.count(&telemetry.rules, Reason::DenyRule(rule), shadow);
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut now = Instant::now();
    telemetry.outbound("shop", "api", "a", "http1").request(&Ok(200), None, Duration::ZERO, (0, 0));
    count(0, true);
    count(1, true);
    count(1, false);
    let first = over_the_wire(&reporter.next_report(now).unwrap());
    let key = |id, rule: &str| {
        let [namespace, policy, rule] = ["shop", "web", rule].map(str::to_owned);
        proto::RuleKey { id, namespace, policy, rule }
    };
    let [one, two] = [first.keys[0].id + 1, first.keys[0].id + 2];
    assert_eq!(
        first.rule_keys,
        [key(one, "DenyRule(0)"), key(two, "DenyRule(1)")],
        "numbers of one sequence"
    );
    let counts = |key, denied, would_deny| proto::RuleCounts { key, denied, would_deny };
    assert_eq!(first.rules, [counts(one, 0, 1), counts(two, 1, 1)]);
    reporter.acknowledged(counted(&first));
    count(1, true);
    now += LATER;
    let second = over_the_wire(&reporter.next_report(now).unwrap());
    assert_eq!((second.rule_keys.len(), second.series.len()), (0, 0));
    assert_eq!(second.rules, [counts(two, 0, 1)]);
    reporter.acknowledged(forgotten(&second));
    let again = reporter.next_report(now).unwrap();
    assert_eq!((&again.rule_keys, &again.rules), (&vec![key(two, "DenyRule(1)")], &second.rules));
    reporter.acknowledged(counted(&again));
    now += LATER;
    assert!(reporter.next_report(now).is_none(), "nothing was refused since");
    count(0, true);
    now += LATER;
    assert_eq!(
        reporter.next_report(now).unwrap().rule_keys,
        [key(one, "DenyRule(0)")],
        "the other key again"
    );
}

#[test]
fn a_new_certificate_is_reported_without_any_request_and_once() {
    let mut reporter = Reporter::new(Arc::default());
    let mut now = Instant::now();
    reporter.set_certificate(1_000);
    let first = reporter.next_report(now).unwrap();
    assert_eq!((first.certificate_not_after_unix, first.series.len()), (1_000, 0));
    assert!(first.memory_bytes > 0, "what the process takes goes along");
    reporter.acknowledged(counted(&first));
    now += LATER;
    assert!(reporter.next_report(now).is_none());
    reporter.set_certificate(2_000);
    now += LATER;
    assert_eq!(reporter.next_report(now).unwrap().certificate_not_after_unix, 2_000);
}

#[test]
fn an_idle_sidecar_says_anew_to_a_new_stream_how_much_memory_it_has_and_when_its_certificate_ends() {
    let mut reporter = Reporter::new(Arc::default());
    let mut now = Instant::now();
    reporter.set_certificate(1_000);
    let first = reporter.next_report(now).unwrap();
    reporter.acknowledged(counted(&first));
    reporter.reconnected();
    now += LATER;
    let again = reporter.next_report(now).unwrap();
    assert_eq!((again.sequence, again.certificate_not_after_unix), (first.sequence + 1, 1_000));
    assert!(again.memory_bytes > 0);
    reporter.acknowledged(counted(&again));
    now += LATER;
    assert!(reporter.next_report(now).is_none(), "once");
}

/// A latency of around 5 ms whose logarithm is normally distributed.
fn latency(random: &mut fastrand::Rng) -> Duration {
    let (one, two) = (1.0 - random.f64(), random.f64());
    let normal = (-2.0 * one.ln()).sqrt() * (2.0 * std::f64::consts::PI * two).cos();
    Duration::from_secs_f64(0.005 * (0.5 * normal).exp())
}

#[test]
fn a_series_of_twenty_requests_in_a_second_takes_at_most_a_hundred_bytes() {
    let telemetry = Arc::new(Telemetry::default());
    let all: Vec<_> =
        (0..100).map(|number| telemetry.outbound("shop", &format!("web-{number}"), "", "http1")).collect();
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let mut random = fastrand::Rng::with_seed(26_162);
    let mut now = Instant::now();
    for report in 0..3 {
        for series in &all {
            (0..100).for_each(|_| series.request(&Ok(200), None, latency(&mut random), (400, 2_000)));
        }
        now += LATER;
        let made = reporter.next_report(now).unwrap();
        assert_eq!(made.keys.len(), if report == 0 { all.len() } else { 0 });
        assert_eq!(made.series.len(), all.len());
        let without_keys = TelemetryReport { keys: Vec::new(), ..made.clone() };
        let bytes = without_keys.encoded_len();
        assert!(bytes <= 100 * all.len(), "{bytes} bytes for {} series", all.len());
        reporter.acknowledged(counted(&made));
    }
}

#[test]
fn without_telemetry_no_request_is_counted_and_the_certificate_and_refusals_are_reported() {
    let telemetry = Arc::new(Telemetry::new(false));
    let all = [
        telemetry.outbound("shop", "web", "a", "http1"),
        telemetry.inbound("shop", "web", "a", "http2"),
        telemetry.inbound_plain("a", "opaque"),
    ];
    for series in &all {
        series.retried(1);
        series.request(&Err(Failure::UpstreamNone), None, Duration::from_millis(1), (1, 1));
        series.connection(Some(&Failure::UpstreamNone), (1, 1));
        assert_eq!(Counts::of(series), Counts::default(), "{:?}", series.key);
    }
    assert!(telemetry.all().is_empty(), "/metrics has no series either");
    assert!(telemetry.attempts_of(attempt_key(1)).is_none());
    assert!(telemetry.events().is_empty(), "the table of attempts is not full");
    let mut reporter = Reporter::new(Arc::clone(&telemetry));
    let now = Instant::now();
    assert!(reporter.next_report(now).is_none());
    reporter.set_certificate(7);
    let report = reporter.next_report(now + LATER).unwrap();
    assert_eq!(report.certificate_not_after_unix, 7);
    assert!(report.keys.is_empty() && report.series.is_empty() && report.attempts.is_empty(), "{report:?}");
    reporter.acknowledged(counted(&report));
    SectionCounts::new("shop/web", 1).count(&telemetry.rules, Reason::DenyRule(0), false);
    let report = reporter.next_report(now + LATER * 2).unwrap();
    assert_eq!((report.series.len(), report.rules.len()), (0, 1));
}
