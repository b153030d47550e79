use proptest::prelude::*;
use tulle_mesh::proto::{SeriesCounts, TelemetryReport};

use super::*;
use crate::telemetry::Taken;
use crate::telemetry::slots::ENCODED;

const START: i64 = 1_800_000_000;

fn id(number: u32) -> SeriesId {
    let reporter = Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload: "web".into() };
    let id = SeriesId::other(reporter, Direction::Outbound, true);
    SeriesId { peer: format!("api-{number}").into(), revision: "r1".into(), ..id }
}

fn counts(requests: u64) -> Counts {
    let mut counts = Counts { classes: [0, requests, 0, 0, 1, 0, 0, 0], ..Counts::default() };
    (20..90).for_each(|bucket| counts.latency.add(bucket, requests));
    counts.add_reason(&"UpstreamReset".into(), 1);
    counts
}

/// A history of hours.
fn history(series: u32) -> History {
    let mut history = History::new();
    for time in (0..20_000).step_by(50) {
        for number in 0..series {
            history.add(id(number), &counts(u64::from(number) + 100), START + time);
        }
    }
    history
}

fn receive(received: &mut Received, chunks: &[HistoryChunk], follower: &Aggregates, now: i64) {
    for chunk in chunks {
        received.take(chunk, follower, now).unwrap();
    }
}

/// A round.
fn copy(leader: &mut History, cursor: &mut Cursor, received: &mut Received, follower: &Aggregates, now: i64) {
    leader.sweep(now);
    receive(received, &leader.chunks_since(cursor), follower, now);
}

/// All requests of six hours.
fn total(history: &History, now: i64) -> u64 {
    history.since(21_600, now).series.iter().map(|(_, counts)| counts.requests()).sum()
}

#[test]
fn a_follower_that_takes_over_has_everything_that_was_copied_of_ended_slots_and_of_the_open_one() {
    let (mut leader, follower) = (history(3), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut now = START + 20_000;
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    round(&mut leader, now);
    for _ in 0..100 {
        leader.add(id(0), &counts(1), now + 3);
        round(&mut leader, now + 4);
        leader.add(id(0), &counts(3), now + 7);
        leader.add(id(u32::try_from(now - START).unwrap()), &counts(2), now + 9);
        now += 10;
        round(&mut leader, now);
    }
    for window in [10, 600, 3_600, 21_600] {
        let (theirs, ours) = (leader.since(window, now), follower.history().since(window, now));
        assert_eq!(ours.series, theirs.series, "{window}");
    }
    assert_eq!(follower.history().covered(now), leader.covered(now));
    // What comes after the last round is what a new leader does not have.
    leader.add(id(1), &counts(7), now + 5);
    assert_eq!(total(&leader, now + 5) - total(&follower.history(), now + 5), 8);
    for time in [now + 6, now + 6, now + 8] {
        round(&mut leader, time);
        assert_eq!(total(&follower.history(), time), total(&leader, time), "once, and not twice");
    }
    leader.add(id(1), &counts(9), now + 9);
    round(&mut leader, now + 9);
    assert_eq!(total(&follower.history(), now + 9), total(&leader, now + 9), "all of the slot, in its place");
    // And it goes on with what it has.
    leader.add(id(1), &counts(7), now + 12);
    follower.history().add(id(1), &counts(7), now + 12);
    assert_eq!(follower.history().since(21_600, now + 12).series, leader.since(21_600, now + 12).series);
}

#[test]
fn a_slot_that_has_ended_here_before_its_last_counts_have_come_is_replaced() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    round(&mut leader, START);
    leader.add(id(1), &counts(1), START + 1);
    round(&mut leader, START + 2);
    leader.add(id(1), &counts(2), START + 9);
    // This replica's clock is ahead.
    follower.history().sweep(START + 30);
    round(&mut leader, START + 10);
    leader.add(id(1), &counts(4), START + 11);
    round(&mut leader, START + 12);
    round(&mut leader, START + 14);
    assert_eq!(follower.history().since(600, START + 30).series, leader.since(600, START + 30).series);
}

#[test]
fn counts_that_came_late_are_copied_into_their_slots() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    round(&mut leader, START);
    for time in (START..START + 60).step_by(10) {
        leader.add(id(1), &counts(1), time + 1);
        leader.add(id(2), &counts(1), time + 1);
        round(&mut leader, time + 2);
        round(&mut leader, time + 10);
    }
    let now = START + 65;
    leader.add_over(&Arc::new(id(1)), &counts(70), START + 15, now);
    for _ in 0..2 {
        round(&mut leader, now);
        for window in [10, 30, 600] {
            let (theirs, ours) = (leader.since(window, now), follower.history().since(window, now));
            assert_eq!(ours.series, theirs.series, "{window}");
        }
    }
    let chunks = leader.chunks_since(&mut Cursor::default());
    assert_eq!(chunks.iter().map(|chunk| chunk.slots.len()).sum::<usize>(), 12);
}

/// The slots that are encoded meanwhile.
fn encoded(work: impl FnOnce()) -> usize {
    let before = ENCODED.get();
    work();
    ENCODED.get() - before
}

#[test]
fn late_counts_cost_the_slots_that_they_are_of_and_a_round_of_copying_each_of_these_once() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    round(&mut leader, START);
    for time in (START..START + 600).step_by(10) {
        (0..4).for_each(|number| leader.add(id(number), &counts(1), time + 1));
        round(&mut leader, time + 10);
    }
    // The follower ends a slot when it gets something of the next one, and encodes it then.
    let now = START + 605;
    (0..4).for_each(|number| leader.add(id(number), &counts(1), now));
    round(&mut leader, now);
    let late = |leader: &mut History, seconds: i64| {
        (0..4).for_each(|number| leader.add_over(&Arc::new(id(number)), &counts(300), now - seconds, now));
    };
    // Two slots that have ended, and the open one, which is not encoded.
    assert_eq!(encoded(|| (0..40).for_each(|_| late(&mut leader, 25))), 40 * 4 * 2);
    assert_eq!(encoded(|| round(&mut leader, now)), 4 * 2, "the follower writes what has changed, and once");
    assert_eq!(encoded(|| round(&mut leader, now)), 0);
    assert_eq!(encoded(|| late(&mut leader, 600)), 4 * 60);
    assert_eq!(encoded(|| round(&mut leader, now)), 4 * 60);
    // What was late before is not copied again.
    late(&mut leader, 25);
    assert_eq!(encoded(|| round(&mut leader, now)), 4 * 2);
    assert_eq!(follower.history().since(600, now).series, leader.since(600, now).series);
}

#[test]
fn late_counts_of_a_slot_that_becomes_a_part_of_a_minute_before_they_are_copied_are_copied_too() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    for time in [START, START + 10, START + 300, START + 650, START + 651] {
        leader.add(id(1), &counts(1), time);
        round(&mut leader, time);
    }
    leader.add_over(&Arc::new(id(1)), &counts(610), START + 59, START + 659);
    let late = leader.since(21_600, START + 659).series;
    for _ in 0..2 {
        round(&mut leader, START + 660);
    }
    for window in [600, 3_600, 21_600] {
        let (theirs, ours) =
            (leader.since(window, START + 660), follower.history().since(window, START + 660));
        assert_eq!(ours.series, theirs.series, "{window}");
    }
    assert_eq!(follower.history().since(21_600, START + 660).series, late);
}

#[test]
fn a_late_minute_of_a_leader_that_began_within_it_takes_nothing_from_a_replica_that_knows_more() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    for time in [START - 400, START + 5, START + 15] {
        follower.history().add(id(1), &counts(10), time);
    }
    let before = total(&follower.history(), START + 20);
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    leader.add(id(1), &counts(1), START + 33);
    round(&mut leader, START + 35);
    leader.add_over(&Arc::new(id(1)), &counts(24), START + 33, START + 57);
    for time in (START + 60..START + 800).step_by(10) {
        leader.add(id(2), &counts(1), time);
        round(&mut leader, time + 1);
    }
    // The open slot comes with a round of its own.
    round(&mut leader, START + 800);
    round(&mut leader, START + 800);
    assert_eq!(total(&follower.history(), START + 800), before + total(&leader, START + 800));
}

#[test]
fn a_minute_takes_the_place_of_its_slots_of_ten_seconds_where_it_has_not_ended_yet() {
    let (mut history, mut names) = (History::new(), Names::default());
    let slot = |seconds, start_unix, requests| HistorySlot {
        series: 1,
        seconds,
        start_unix,
        counts: Some(counts(requests).to_proto()),
    };
    let slots = vec![slot(10, START + 50, 1), slot(10, START + 60, 2), slot(10, START + 120, 4)];
    let series = vec![describe(1, &id(1))];
    let first = HistoryChunk { series, slots, open_unix: START + 650, ..HistoryChunk::default() };
    history.apply(&mut names, &first).unwrap();
    let late = HistoryChunk { changed: vec![slot(60, START + 60, 8)], ..HistoryChunk::default() };
    for now in [START + 650, START + 660, START + 720, START + 780] {
        history.sweep(now);
        history.apply(&mut names, &late).unwrap();
        assert_eq!(total(&history, now), 2 + 9 + 5, "at {}", now - START);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn late_counts_are_in_their_slots_on_both_replicas_whenever_they_come_and_are_copied(
        events in proptest::collection::vec(
            (0..45_i64, 0..3_u32, 0..640_i64, 1..300_u64, 0..4_u8, any::<bool>()),
            1..50,
        ),
    ) {
        let (mut leader, follower) = (History::new(), Aggregates::default());
        let (mut cursor, mut received) = (Cursor::default(), Received::default());
        let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
        let (mut now, mut all) = (START, 0);
        round(&mut leader, now);
        for (index, (wait, number, late, requests, rounds, is_ahead)) in events.into_iter().enumerate() {
            now += wait;
            // Few of them are in some of sixty slots only.
            let mut counts = Counts { classes: [0, requests, 0, 0, 0, 0, 0, 0], ..Counts::default() };
            counts.latency.add(40, requests);
            leader.add_over(&Arc::new(id(number)), &counts, now - late, now);
            all += requests;
            // The stream of a reader that is too far behind ends: now and then it copies what has ended, and what is late.
            let rounds = if index % 5 == 0 { rounds.max(2) } else { rounds };
            (0..rounds).for_each(|_| round(&mut leader, now));
            if is_ahead {
                follower.history().sweep(now + 15);
            }
        }
        // The follower's clock may be ahead: a late slot comes as a part of a minute when it is that at the leader too.
        for _ in 0..3 {
            now += 70;
            (0..2).for_each(|_| round(&mut leader, now));
        }
        prop_assert_eq!(total(&leader, now), all);
        for window in [60, 600, 3_600, 21_600] {
            let (theirs, ours) = (leader.since(window, now), follower.history().since(window, now));
            prop_assert_eq!(ours.series, theirs.series, "{} s", window);
        }
    }
}

#[test]
fn series_beyond_the_bound_replace_none_of_those_that_are_taken_together() {
    let (mut leader, follower) = (History::new(), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let most = u32::try_from(crate::telemetry::history::MAX_OF_REPORTER).unwrap();
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    round(&mut leader, START);
    (0..most + 20).for_each(|number| leader.add(id(number), &counts(1), START + 1));
    round(&mut leader, START + 2);
    round(&mut leader, START + 10);
    assert_eq!(follower.history().since(600, START + 10).series, leader.since(600, START + 10).series);
}

/// A report of seven seconds, with a request in each.
fn report(sequence: u64) -> TelemetryReport {
    let direction = series_key::Direction::Outbound.into();
    let key = SeriesKey { id: 1, direction, protocol: "http1".into(), ..SeriesKey::default() };
    let counts = SeriesCounts { key: 1, classes: vec![0, 7], ..SeriesCounts::default() };
    TelemetryReport {
        sequence,
        process: 1,
        interval_ms: 7_000,
        keys: vec![key],
        series: vec![counts],
        ..TelemetryReport::default()
    }
}

#[test]
fn whenever_a_leader_dies_its_successor_lacks_at_most_ten_seconds_and_counts_nothing_twice() {
    for death in 1..=70 {
        let (leader, follower) = (Aggregates::default(), Aggregates::default());
        let (mut cursor, mut received) = (Cursor::default(), Received::default());
        let mut acknowledged = 0;
        for second in 0..=death {
            let now = START + second;
            // Before a report of the same second.
            if second % i64::try_from(ROUND.as_secs()).unwrap() == 0 {
                copy(&mut leader.history(), &mut cursor, &mut received, &follower, now);
            }
            if second > 0 && second % 7 == 0 {
                acknowledged += 1;
                assert_eq!(leader.add_at("pod", None, &report(acknowledged), now), Taken::Counted);
            }
        }
        let now = START + death;
        let known = total(&follower.history(), now);
        assert!(known <= 7 * acknowledged, "{death}: {known} of {}", 7 * acknowledged);
        assert!(7 * acknowledged - known <= 10, "{death}: {known} of {}", 7 * acknowledged);
        // The sidecar goes on with what it has not reported yet.
        follower.lead_at(2, now);
        assert_eq!(follower.add_at("pod", None, &report(acknowledged + 1), now), Taken::Counted);
        assert_eq!(total(&follower.history(), now), known + 7, "{death}");
    }
}

#[test]
fn reports_that_are_lost_are_known_to_the_successor_too() {
    let (mut leader, follower) = (history(1), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut round = |leader: &mut History, now| copy(leader, &mut cursor, &mut received, &follower, now);
    let now = START + 20_000;
    leader.lost(2, now - 5);
    round(&mut leader, now);
    for time in [now + 1, now + 3, now + 11] {
        leader.lost(3, time);
        round(&mut leader, time + 1);
        round(&mut leader, time + 1);
    }
    for window in [10, 600] {
        let (theirs, ours) = (leader.since(window, now + 12), follower.history().since(window, now + 12));
        assert_eq!(ours.lost, theirs.lost, "{window}");
    }
    assert_eq!(follower.history().since(600, now + 12).lost, 11);
}

#[test]
fn a_former_leader_takes_the_history_of_its_successor_once_all_of_it_is_there() {
    let former = Aggregates::default();
    former.history().add(id(77), &counts(1), START);
    let (mut successor, mut cursor, mut received) = (history(50), Cursor::default(), Received::default());
    let chunks = successor.chunks_since(&mut cursor);
    let (last, first) = chunks.split_last().unwrap();
    assert!(last.complete && first.iter().all(|chunk| !chunk.complete));
    receive(&mut received, first, &former, START + 20_000);
    assert_eq!(former.history().series(), 1, "a stream that breaks off here costs nothing");
    receive(&mut received, std::slice::from_ref(last), &former, START + 20_000);
    assert_eq!(former.history().series(), 50);
}

#[test]
fn a_longer_past_is_kept_and_gets_what_a_leader_that_began_anew_has_counted() {
    let follower = Aggregates::default();
    *follower.history() = history(3);
    let mut leader = History::new();
    let now = START + 21_000;
    for time in [START + 20_100, START + 20_960] {
        leader.add(id(0), &counts(7), time);
    }
    leader.sweep(now);
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let before = follower.history().since(21_600, now);
    receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now);
    let after = follower.history().since(21_600, now);
    assert_eq!((after.window, after.series.len()), (before.window, 3));
    let requests = |sum: &crate::telemetry::history::Sum| sum.series[0].1.requests();
    assert_eq!(requests(&after), requests(&before) + 16);
    // From then on it follows.
    leader.add(id(0), &counts(7), now + 5);
    leader.sweep(now + 10);
    receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now + 10);
    assert_eq!(requests(&follower.history().since(21_600, now + 10)), requests(&after) + 8);
    // What it has of the open slot is a copy: a stream that begins anew does not add it a second time.
    leader.add(id(0), &counts(7), now + 12);
    leader.lost(3, now + 12);
    receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now + 12);
    let seen = follower.history().since(21_600, now + 12);
    assert_eq!((requests(&seen), seen.lost), (requests(&after) + 16, 3));
    for later in [13, 15, 21, 31] {
        let (mut cursor, mut received) = (Cursor::default(), Received::default());
        leader.sweep(now + later);
        for _ in 0..3 {
            receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now + later);
        }
        let seen = follower.history().since(21_600, now + later);
        assert_eq!((requests(&seen), seen.lost), (requests(&after) + 16, 3), "{later} s later");
    }
}

#[test]
fn a_leader_whose_clock_is_far_ahead_is_not_followed() {
    let follower = Aggregates::default();
    follower.history().add(id(0), &counts(7), START);
    let mut leader = History::new();
    leader.add(id(0), &counts(7), START + 3_600);
    let chunks = leader.chunks_since(&mut Cursor::default());
    let mut received = Received::default();
    let ends = chunks.iter().map(|chunk| received.take(chunk, &follower, START)).collect::<Result<Vec<()>>>();
    let error = ends.unwrap_err().to_string();
    assert!(error.contains("clock"), "{error}");
    follower.history().add(id(0), &counts(7), START + 120);
    let minute = follower.history().since(60, START + 120);
    assert_eq!(minute.series[0].1.requests(), counts(7).requests(), "the minute has its own counts only");
}

#[test]
fn chunks_are_small_and_nothing_is_sent_twice() {
    let (mut leader, mut cursor) = (history(100), Cursor::default());
    let chunks = leader.chunks_since(&mut cursor);
    assert!(chunks.len() > 2);
    assert!(chunks.iter().all(|chunk| chunk.encoded_len() <= MAX_MESSAGE));
    assert_eq!(chunks.iter().map(|chunk| chunk.series.len()).sum::<usize>(), 100);
    let open: usize = leader.chunks_since(&mut cursor).iter().map(|chunk| chunk.changed.len()).sum();
    assert_eq!(open, 100);
    assert_eq!(leader.chunks_since(&mut cursor), []);
    leader.add(id(7), &counts(1), START + 19_951);
    let chunks = leader.chunks_since(&mut cursor);
    assert_eq!(
        chunks.iter().map(|chunk| (chunk.series.len(), chunk.changed.len())).collect::<Vec<_>>(),
        [(0, 1)]
    );
}

#[test]
fn an_empty_history_is_complete_at_once() {
    let (mut leader, follower, mut received) = (History::new(), Aggregates::default(), Received::default());
    let chunks = leader.chunks_since(&mut Cursor::default());
    assert_eq!(chunks, [HistoryChunk { complete: true, ..HistoryChunk::default() }]);
    receive(&mut received, &chunks, &follower, START);
    assert!(received.is_in_use);
}

#[test]
fn a_reader_that_is_too_far_behind_is_to_begin_anew() {
    let (mut leader, mut cursor) = (history(1), Cursor::default());
    assert!(leader.begin(&mut cursor));
    leader.sweep(START + 20_400);
    assert!(leader.begin(&mut cursor));
    leader.sweep(START + 21_100);
    assert!(!leader.begin(&mut cursor));
}

#[test]
fn slots_that_make_no_sense_are_skipped_and_names_are_bounded() {
    let (mut history, mut names) = (History::new(), Names::default());
    let slot = |seconds, start_unix| HistorySlot {
        series: 1,
        seconds,
        start_unix,
        counts: Some(counts(1).to_proto()),
    };
    let series = vec![describe(1, &id(1))];
    let slots = vec![slot(10, START + 1), slot(7, START), slot(0, START), slot(60, START)];
    history.apply(&mut names, &HistoryChunk { series, slots, ..HistoryChunk::default() }).unwrap();
    assert_eq!(history.since(600, START + 9).series, [(id(1), counts(1))]);
    let many = (0..=u32::try_from(MAX_NAMES).unwrap()).map(|number| describe(number, &id(1))).collect();
    let many = HistoryChunk { series: many, ..HistoryChunk::default() };
    assert!(history.apply(&mut names, &many).is_err());
}

fn leads(mine: bool) -> Leadership {
    Leadership { mine, ..Leadership::default() }
}

#[tokio::test]
async fn a_stream_begins_with_all_that_there_is() {
    let aggregates = Arc::new(Aggregates::default());
    aggregates.history().add(id(1), &counts(1), now() - 60);
    let (_leading, leadership) = watch::channel(leads(true));
    let chunk = stream(aggregates, leadership).next().await.unwrap().unwrap();
    assert_eq!((chunk.series.len(), chunk.slots.len(), chunk.complete), (1, 1, true));
}

#[tokio::test]
async fn a_leader_that_gives_up_the_lease_sends_what_it_has_counted_last() {
    let aggregates = Arc::new(Aggregates::default());
    let (leading, leadership) = watch::channel(leads(true));
    let mut chunks = stream(Arc::clone(&aggregates), leadership);
    assert!(chunks.next().await.unwrap().unwrap().complete);
    // Nothing is new: the stream waits for the next round.
    assert!(futures::poll!(chunks.next()).is_pending());
    aggregates.history().add(id(1), &counts(1), now());
    leading.send_replace(leads(false));
    let mut sent = 0;
    let end = loop {
        match chunks.next().await.unwrap() {
            Ok(chunk) => sent += chunk.changed.len() + chunk.slots.len(),
            Err(status) => break status,
        }
    };
    assert!(sent > 0);
    assert_eq!(end.code(), tonic::Code::Unavailable);
    assert!(chunks.next().await.is_none());
}
