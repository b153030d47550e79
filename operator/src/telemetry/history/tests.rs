use proptest::prelude::*;
use tulle_mesh::histogram::bucket_of;

use super::super::slots::{ENCODED, encode};
use super::*;

/// The start of a slot of every length.
const START: i64 = 1_800_000_000;

fn id(peer: &str) -> SeriesId {
    let reporter = Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() };
    SeriesId {
        direction: Direction::Inbound,
        peer: peer.into(),
        protocol: "http1".into(),
        ..SeriesId::other(reporter, Direction::Inbound, true)
    }
}

fn counts(requests: u64) -> Counts {
    let mut counts = Counts { classes: [0, requests, 0, 0, 0, 0, 0, 0], ..Counts::default() };
    counts.latency.add(40, requests);
    counts
}

fn requests(history: &History, window: u64, now: i64) -> u64 {
    history.since(window, now).series.iter().map(|(_, counts)| counts.requests()).sum()
}

/// A value of each of three distributions below which a share `q` lies, in microseconds.
fn quantiles() -> [fn(f64) -> f64; 3] {
    [
        |q: f64| 1_000.0 + 99_000.0 * q,
        |q: f64| 200.0 - 5_000.0 * (1.0 - q).ln(),
        |q: f64| 2_000.0 / (1.0 - q).sqrt(),
    ]
}

#[test]
fn quantiles_of_a_thousand_merged_parts_are_within_the_promised_error() {
    for quantile in quantiles() {
        let mut history = History::new();
        let (mut whole, parts) = (Counts::default(), 1_000_u64);
        for part in 0..parts {
            let mut counts = Counts::default();
            for n in 0..20 {
                let rank = (n * parts + part) as f64 + 0.5;
                counts.latency.record(quantile(rank / (20.0 * parts as f64)) as u64);
                counts.classes[1] += 1;
            }
            whole.merge(&counts);
            // Over almost six hours, so that they are in slots of every length.
            history.add(id("a"), &counts, START + i64::try_from(part).unwrap() * 21);
        }
        let sum = history.since(21_600, START + 21_000);
        assert_eq!(sum.series, [(id("a"), whole)], "nothing is lost, and nothing counted twice");
        let golden = sum.series[0].1.golden(sum.window);
        for (q, seen) in [(0.5, golden.p50_ms), (0.99, golden.p99_ms)] {
            let error = seen.unwrap() * 1000.0 / quantile(q) - 1.0;
            assert!(error.abs() < 0.045, "p{q}: {error}");
        }
    }
}

#[test]
fn a_window_takes_the_slots_that_start_in_it() {
    for (window, step) in [(60_u64, TEN), (600, TEN), (610, MINUTE), (3_600, MINUTE), (21_600, FIVE)] {
        let mut history = History::new();
        let first = floor(START + 20_000, FIVE);
        history.add(id("a"), &counts(1), first);
        let seconds = i64::try_from(window).unwrap();
        let last = first + seconds + step - 1;
        // Another series keeps time, and makes longer slots of old ones.
        for now in [first + 9, first + seconds - 1, first + seconds, last] {
            history.add(id("b"), &Counts::default(), now);
            assert_eq!(requests(&history, window, now), 1, "{window}: {}", now - first);
        }
        history.sweep(last + 1);
        assert_eq!(requests(&history, window, last + 1), 0, "{window}");
    }
}

#[test]
fn counts_at_every_edge_are_in_one_slot_whenever_one_asks() {
    let mut history = History::new();
    let times: Vec<i64> =
        [0, 9, 10, 59, 60, 299, 300, 599, 600, 3_599, 3_600, 3_601, 21_000].map(|time| START + time).into();
    for (number, time) in times.iter().enumerate() {
        history.add(id("a"), &counts(1), *time);
        assert_eq!(requests(&history, 21_600, *time), number as u64 + 1);
    }
    for now in (START + 21_000..START + 50_000).step_by(7) {
        history.sweep(now);
        for window in [10, 60, 600, 601, 3_600, 3_601, 21_600] {
            let step = step_of(i64::try_from(window).unwrap());
            let from = floor(now - i64::try_from(window).unwrap(), step);
            let expected = times.iter().filter(|time| **time >= from).count() as u64;
            assert_eq!(requests(&history, window, now), expected, "{window} at {}", now - START);
        }
    }
}

#[test]
fn a_series_without_a_slot_is_dropped() {
    let mut history = History::new();
    history.add(id("a"), &counts(1), START);
    history.add(id("b"), &counts(1), START + 300);
    history.sweep(START + LONGEST + 299);
    assert_eq!((history.series(), history.reporters.values().sum::<usize>()), (2, 2));
    history.sweep(START + LONGEST + 300);
    assert_eq!((history.series(), history.reporters.values().sum::<usize>()), (1, 1));
    history.sweep(START + LONGEST + 600);
    assert_eq!((history.series(), history.heap()), (0, 0));
    assert!(history.reporters.is_empty(), "there is room for others");
}

#[test]
fn what_is_covered_and_lost_is_known() {
    let mut history = History::new();
    assert_eq!(history.covered(START), 0);
    history.add(id("a"), &counts(1), START);
    history.lost(2, START + 5);
    history.lost(3, START + 30);
    assert_eq!((history.covered(START + 40), history.covered(START + 50_000)), (40, 21_600));
    assert_eq!((history.since(10, START + 45).lost, history.since(60, START + 45).lost), (3, 5));
    assert_eq!(history.since(60, START + 45).window, 45, "no more is known");
    assert_eq!(history.since(60, START + 965).window, 65, "the slot in which the time begins counts whole");
    history.sweep(START + 50_000);
    assert!(history.lost.is_empty());
}

#[test]
fn a_timeline_has_points_of_times_without_requests() {
    let mut history = History::new();
    history.add(id("a"), &counts(20), START);
    history.add(id("a"), &counts(5), START + 25);
    let timeline = history.timeline(600, START + 30, |_| true);
    let points: Vec<_> = timeline.points.iter().map(|point| (point.requests, point.rps)).collect();
    assert_eq!((timeline.step, timeline.start), (10, START));
    assert_eq!(points, [(20, 2.0), (0, 0.0), (5, 0.5), (0, 0.0)]);
    assert!(history.timeline(600, START + 30, |_| false).points.iter().all(|point| point.requests == 0));
    history.sweep(START + 7_000);
    let timeline = history.timeline(21_600, START + 7_000, |_| true);
    assert_eq!((timeline.step, timeline.start, timeline.points.len()), (300, START, 24));
    assert_eq!(timeline.points[0].requests, 25);
}

#[test]
fn too_many_bytes_cost_the_oldest_slots_and_are_not_covered_any_more() {
    let mut history = History::new();
    let now = START + 20_000;
    for time in (START..now).step_by(10) {
        history.add(id("a"), &counts(1), time);
    }
    history.sweep(now);
    let heap = history.heap();
    history.shrink(heap, heap);
    assert_eq!(history.covered(now), 20_000, "there is room");
    history.shrink(heap, heap - 1);
    let covered = history.covered(now);
    assert!(history.heap() < heap && (16_000..20_000).contains(&covered), "{covered}");
    let sum = history.since(21_600, now);
    assert_eq!((sum.window, sum.series[0].1.requests()), (covered, covered.div_ceil(10)));
    history.shrink(heap, 0);
    assert!((600..900).contains(&history.covered(now)), "the last ten minutes stay");
    assert!(requests(&history, 600, now) >= 60);
}

#[test]
fn parts_are_alike_and_everything_together() {
    let mut whole = Counts { bytes_up: 7, retries: 1, ..counts(100) };
    whole.latency.add_sum(1_001);
    whole.add_reason(&"UpstreamReset".into(), 2);
    let mut sum = Counts::default();
    for part in 0..7 {
        let part = whole.part(part, 7);
        assert!((14..=15).contains(&part.requests()));
        sum.merge(&part);
    }
    assert_eq!(sum, whole);
}

#[test]
fn connections_that_failed_and_those_that_were_denied_are_told_apart() {
    let mut history = History::new();
    let mut opaque = Counts { connections: 20, ..Counts::default() };
    let mut http = counts(10);
    for (reason, count) in [("UpstreamConnect", 3), ("PolicyDenied", 4), ("ClientGone", 5), ("_OTHER", 1)] {
        opaque.add_reason(&reason.into(), count);
    }
    for (reason, count) in [("UpstreamConnect", 1), ("PolicyDenied", 2), ("OursOverloaded", 4)] {
        http.add_reason(&reason.into(), count);
    }
    http.classes[6] = 7;
    history.add(SeriesId { protocol: "opaque".into(), ..id("a") }, &opaque, START);
    history.add(id("a"), &http, START);
    let mut sum = Counts::default();
    history.since(60, START + 5).series.iter().for_each(|(_, counts)| sum.merge(counts));
    let timeline = history.timeline(60, START + 5, |_| true);
    for golden in [&sum.golden(10), timeline.points.first().unwrap()] {
        assert_eq!((golden.requests, golden.failures, golden.denied), (17, 1, 10));
        assert_eq!((golden.connections, golden.failed_connections), (20, 4));
        assert_eq!(golden.success, Some(1.0 - 1.0 / 11.0), "what was denied is nobody's failure");
    }
}

#[test]
fn what_a_client_was_denied_hides_neither_its_failures_nor_what_it_gave_up() {
    let mut history = History::new();
    let mut http = counts(10);
    for (reason, count) in
        [("PolicyDenied", 5), ("OursOverloaded", 2), ("UpstreamReset", 3), ("ClientGone", 1)]
    {
        http.add_reason(&reason.into(), count);
    }
    (http.classes[6], http.classes[7]) = (2 + 3, 5 + 1);
    history.add(id("a"), &http, START);
    let mut sum = Counts::default();
    history.since(60, START + 5).series.iter().for_each(|(_, counts)| sum.merge(counts));
    let timeline = history.timeline(60, START + 5, |_| true);
    for golden in [&sum.golden(10), timeline.points.first().unwrap()] {
        assert_eq!((golden.requests, golden.failures, golden.denied, golden.abandoned), (21, 3, 7, 1));
        assert_eq!(golden.success, Some(1.0 - 3.0 / 13.0));
    }
}

#[test]
fn a_clock_that_goes_back_loses_nothing() {
    let mut history = History::new();
    history.add(id("a"), &counts(1), START + 100);
    history.add(id("a"), &counts(1), START);
    assert_eq!(requests(&history, 60, START + 100), 2);
}

#[test]
fn late_counts_of_a_caller_whose_time_is_behind_the_open_slot_are_not_in_a_minute_that_has_ended() {
    let mut history = History::new();
    history.add(id("a"), &counts(1), START);
    history.sweep(START + 660);
    history.add_over(&Arc::new(id("a")), &counts(600), START + 59, START + 659);
    let series = history.series.values().next().unwrap();
    assert_eq!(series.tens.iter(TEN).next().unwrap().0, START + 60);
    assert_eq!(requests(&history, 21_600, START + 660), 601);
}

#[test]
fn a_typical_series_takes_less_than_eleven_kilobytes() {
    let mut history = History::new();
    // 20 requests a second, log-normal as a sum of twelve uniform values makes it: p99 is four times p50.
    let mut seed = 1_u64;
    let mut uniform = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 11) as f64 / (1_u64 << 53) as f64
    };
    for step in 0..LONGEST / TEN {
        let mut counts = Counts { bytes_up: 40_000, bytes_down: 400_000, ..Counts::default() };
        for _ in 0..200 {
            let normal = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
            counts.latency.add(bucket_of((5_000.0 * (0.6 * normal).exp()) as u64), 1);
            counts.latency.add_sum(6_000);
        }
        counts.classes = [0, 198, 0, 1, 1, 0, 0, 0];
        history.add(id("a"), &counts, START + step * TEN);
    }
    let bytes = history.heap();
    assert!(bytes < 11_000, "{bytes}");
    let slots = history.series.values().map(|series| series.ended().count()).sum::<usize>();
    assert!((170..200).contains(&slots), "{slots}");
}

#[test]
fn a_slot_says_numbers_of_any_size_and_a_success_for_each_latency_without_another_class() {
    let mut table = Reasons::default();
    for count in [0, 1, 2, 1 << 23, 1 << 25, 1 << 33, 1 << 60] {
        for classes in [[0; 8], [0, count + 3, 0, 0, 0, 0, 0, 0], [0, count, 0, 0, 2, 1, 0, 0]] {
            let mut counts = Counts { classes, ..Counts::default() };
            counts.latency.add(3, 1);
            counts.latency.add(159, 2);
            if count > 0 {
                counts.latency.add(158, count);
            }
            let mut read = Counts::default();
            add_to(&mut read, &encode(&counts, &mut table), &table).unwrap();
            assert_eq!(read, counts);
        }
    }
}

proptest! {
    #[test]
    fn a_log_is_what_was_put_into_its_slots_in_any_order_and_writes_only_these(
        changes in proptest::collection::vec(
            (any::<bool>(), proptest::collection::btree_map(0..70_i64, 1..1_000_u64, 0..8)),
            1..20,
        ),
        removed in (0..70_i64, 0..70_i64),
    ) {
        let (mut log, mut table) = (Log::default(), Reasons::default());
        let mut expected: BTreeMap<i64, Counts> = BTreeMap::new();
        let read = |log: &Log, table: &Reasons| -> Vec<(i64, Counts)> {
            let slot = |(start, body): (i64, &[u8])| {
                let mut counts = Counts::default();
                add_to(&mut counts, body, table).unwrap();
                (start, counts)
            };
            log.iter(TEN).map(slot).collect()
        };
        for (is_added, changed) in changes {
            let slot = |(number, requests): (i64, u64)| (START + number * TEN, counts(requests));
            let slots: BTreeMap<i64, Counts> = changed.into_iter().map(slot).collect();
            let before = ENCODED.get();
            if is_added {
                log.add_all(TEN, &slots, &mut table);
            } else {
                log.set_all(TEN, &slots, &mut table);
            }
            prop_assert_eq!(ENCODED.get() - before, slots.len());
            for (start, counts) in slots {
                let known = expected.entry(start).or_default();
                if is_added {
                    known.merge(&counts);
                } else {
                    *known = counts;
                }
            }
            prop_assert_eq!(read(&log, &table), expected.clone().into_iter().collect::<Vec<_>>());
        }
        let (from, until) = (START + removed.0 * TEN, START + removed.1 * TEN);
        log.remove(TEN, from, until);
        expected.retain(|start, _| !(from..until).contains(start));
        prop_assert_eq!(read(&log, &table), expected.clone().into_iter().collect::<Vec<_>>());
        let later: Vec<i64> = log.since(TEN, from).map(|(start, _)| start).collect();
        prop_assert_eq!(later, expected.range(from..).map(|(start, _)| *start).collect::<Vec<_>>());
    }

    #[test]
    fn a_slot_says_what_was_counted(
        classes in proptest::array::uniform8(0_u64..1_000_000),
        buckets in proptest::collection::btree_map(0_usize..160, 1_u64..100_000, 0..160),
        numbers in proptest::array::uniform6(any::<u32>()),
        reasons in proptest::collection::btree_map("[a-z]{1,9}", 1_u64..1_000, 0..5),
    ) {
        let [sum, up, down, connections, retries, ejections] = numbers.map(u64::from);
        let mut counts = Counts { classes, bytes_up: up, bytes_down: down, connections, ..Counts::default() };
        (counts.retries, counts.ejections) = (retries, ejections);
        buckets.iter().for_each(|(bucket, count)| counts.latency.add(*bucket, *count));
        counts.latency.add_sum(sum);
        reasons.iter().for_each(|(name, count)| counts.add_reason(&name.as_str().into(), *count));
        let mut table = Reasons::default();
        let bytes = encode(&counts, &mut table);
        let mut read = Counts::default();
        add_to(&mut read, &bytes, &table).unwrap();
        prop_assert_eq!(&read, &counts);
        prop_assert_eq!(Counts::of(&counts.to_proto()), counts, "and so does a report");
    }
}
