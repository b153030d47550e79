use super::*;

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

#[test]
fn a_follower_that_takes_over_has_everything_but_the_slot_that_was_open() {
    let (mut leader, follower) = (history(3), Aggregates::default());
    let (mut cursor, mut received) = (Cursor::default(), Received::default());
    let mut now = START + 20_000;
    leader.sweep(now);
    receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now);
    for _ in 0..100 {
        leader.add(id(0), &counts(1), now + 3);
        leader.add(id(u32::try_from(now - START).unwrap()), &counts(2), now + 9);
        now += 10;
        leader.sweep(now);
        receive(&mut received, &leader.chunks_since(&mut cursor), &follower, now);
    }
    for window in [10, 600, 3_600, 21_600] {
        let (theirs, ours) = (leader.since(window, now), follower.history().since(window, now));
        assert_eq!(ours.series, theirs.series, "{window}");
    }
    assert_eq!(follower.history().covered(now), leader.covered(now));
    // What comes after the last round is what a new leader does not have.
    leader.add(id(1), &counts(7), now + 9);
    let missing = |history: &History| history.since(21_600, now + 9).series.len();
    assert_eq!(missing(&leader), missing(&follower.history()));
    let total = |history: &History| -> u64 {
        history.since(21_600, now + 9).series.iter().map(|(_, counts)| counts.requests()).sum()
    };
    assert_eq!(total(&leader) - total(&follower.history()), 8);
    // And it goes on with what it has.
    follower.history().add(id(1), &counts(7), now + 9);
    assert_eq!(total(&leader), total(&follower.history()));
}

#[test]
fn a_former_leader_takes_the_history_of_its_successor_once_all_of_it_is_there() {
    let former = Aggregates::default();
    former.history().add(id(77), &counts(1), START);
    let (successor, mut cursor, mut received) = (history(50), Cursor::default(), Received::default());
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
}

#[test]
fn chunks_are_small_and_nothing_is_sent_twice() {
    let (leader, mut cursor) = (history(100), Cursor::default());
    let chunks = leader.chunks_since(&mut cursor);
    assert!(chunks.len() > 2);
    assert!(chunks.iter().all(|chunk| chunk.encoded_len() <= MAX_MESSAGE));
    assert_eq!(chunks.iter().map(|chunk| chunk.series.len()).sum::<usize>(), 100);
    assert_eq!(leader.chunks_since(&mut cursor), []);
}

#[test]
fn an_empty_history_is_complete_at_once() {
    let (leader, follower, mut received) = (History::new(), Aggregates::default(), Received::default());
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
    history.apply(&mut names, &HistoryChunk { series, slots, complete: false }).unwrap();
    assert_eq!(history.since(600, START + 9).series, [(id(1), counts(1))]);
    let many = (0..=u32::try_from(MAX_NAMES).unwrap()).map(|number| describe(number, &id(1))).collect();
    let many = HistoryChunk { series: many, ..HistoryChunk::default() };
    assert!(history.apply(&mut names, &many).is_err());
}

#[tokio::test]
async fn a_stream_begins_with_all_that_there_is() {
    let aggregates = Arc::new(Aggregates::default());
    aggregates.history().add(id(1), &counts(1), now() - 60);
    let chunk = stream(aggregates).next().await.unwrap().unwrap();
    assert_eq!((chunk.series.len(), chunk.slots.len(), chunk.complete), (1, 1, true));
}
