use tulle_crds::{AttemptTotals, Evidence, Judge, OnClientErrors};

use super::simulation::{Scenario, first_pass, repeat, simulate};
use super::{LatencyRule, PodBlock, Rules, Side, Verdict, fold, judge};

fn rules() -> Rules {
    Rules::of(&Judge::default())
}

fn pod(side: Side, attempts: u64, failures: u64) -> PodBlock {
    let totals = AttemptTotals { attempts, failures, ..AttemptTotals::default() };
    PodBlock { side, totals, ..PodBlock::default() }
}

fn canary(attempts: u64, failures: u64) -> PodBlock {
    pod(Side::Canary, attempts, failures)
}

fn stable(attempts: u64, failures: u64) -> PodBlock {
    pod(Side::Stable, attempts, failures)
}

/// The same block again and again.
fn after(blocks: usize, block: &[PodBlock], rules: &Rules) -> Evidence {
    (0..blocks).fold(Evidence::default(), |evidence, _| fold(&evidence, block, rules, false))
}

fn slow(mut pod: PodBlock, latencies: &[(u64, u64)]) -> PodBlock {
    for (micros, count) in latencies {
        (0..*count).for_each(|_| pod.latency.record(*micros));
    }
    pod
}

#[test]
fn bursts_of_failures_stop_a_good_version_rarely() {
    for burst in [5, 20, 50] {
        let scenario = Scenario { burst, seconds: 300, ..Scenario::default() };
        let summary = repeat(&scenario, &rules(), 200);
        assert!(summary.stopped <= 6, "bursts of {burst}: {summary:?}");
    }
}

#[test]
fn twice_as_many_independent_failures_are_found_within_half_an_hour() {
    let scenario =
        Scenario { requests_per_second: 200.0, weights: vec![10], worse: 2.0, ..Scenario::default() };
    let summary = repeat(&scenario, &rules(), 20);
    assert!(summary.stopped >= 16, "{summary:?}");
}

#[test]
fn independent_failures_stop_a_good_version_rarely() {
    for error_rate in [0.001, 0.01, 0.05] {
        let scenario = Scenario { error_rate, seconds: 900, ..Scenario::default() };
        let summary = repeat(&scenario, &rules(), 100);
        assert!(summary.stopped <= 3, "{error_rate}: {summary:?}");
    }
}

#[test]
fn an_error_rate_that_rises_for_both_stops_nothing() {
    let scenario = Scenario { drifts: true, seconds: 900, ..Scenario::default() };
    assert!(repeat(&scenario, &rules(), 40).stopped <= 2);
}

#[test]
fn a_version_that_fails_often_is_stopped_soon() {
    let scenario = Scenario { error_rate: 0.001, worse: 100.0, seconds: 600, ..Scenario::default() };
    let summary = repeat(&scenario, &rules(), 20);
    assert_eq!(summary.stopped, 20);
    assert!(summary.seconds.unwrap() <= 120, "{summary:?}");
}

/// 10 requests per second, of which each version's pod gets its share.
fn quiet(weight: u8) -> Scenario {
    Scenario { requests_per_second: 10.0, weights: vec![weight], stable_pods: 1, ..Scenario::default() }
}

#[test]
fn a_version_that_fails_most_of_few_requests_is_stopped_soon_also_at_a_large_weight() {
    for (weight, within) in [(20, 150), (80, 60)] {
        let scenario = Scenario { error_rate: 0.001, worse: 600.0, seconds: 300, ..quiet(weight) };
        let summary = repeat(&scenario, &rules(), 40);
        assert!(summary.stopped >= 39, "{weight} %: {summary:?}");
        assert!(summary.seconds.unwrap() <= within, "{weight} %: {summary:?}");
    }
}

#[test]
fn bursts_of_failures_stop_a_good_version_with_few_requests_rarely() {
    for weight in [20, 80] {
        let scenario = Scenario { burst: 50, seconds: 900, ..quiet(weight) };
        let summary = repeat(&scenario, &rules(), 100);
        assert!(summary.stopped <= 3, "{weight} %: {summary:?}");
    }
}

#[test]
fn a_version_that_turns_bad_after_ten_hours_is_found_within_minutes() {
    let hours = 36_000;
    let scenario = Scenario {
        error_rate: 0.001,
        worse: 100.0,
        bad_from: hours,
        seconds: hours + 600,
        ..Scenario::default()
    };
    let stopped = simulate(&scenario, &rules(), 1).expect("found");
    assert!(stopped.seconds <= 200, "{stopped:?}");
}

#[test]
fn a_version_that_fails_every_request_is_stopped_at_once() {
    let evidence = after(1, &[canary(20, 20), stable(400, 0)], &rules());
    let judged = judge(&evidence, &rules(), false);
    assert_eq!(judged.verdict, Verdict::Fail);
    assert!(judged.because.contains("failed every one of its 20 requests"), "{}", judged.because);
}

#[test]
fn a_dead_version_fails_though_the_stable_one_fails_too() {
    let evidence = after(1, &[canary(244, 244), stable(1000, 720)], &rules());
    assert_eq!(judge(&evidence, &rules(), false).verdict, Verdict::Fail);
    // Not every one, but most: never a Pass.
    let evidence = after(1, &[canary(244, 160), stable(1000, 720)], &rules());
    let judged = judge(&evidence, &rules(), false);
    assert_eq!(judged.verdict, Verdict::Inconclusive, "{}", judged.because);
}

#[test]
fn a_version_does_not_fail_for_what_the_stable_one_fails_by_too() {
    for (canaries, stables, blocks) in [(21, 16, 1), (20, 24, 1), (300, 3, 1), (21, 16, 60), (100, 100, 60)] {
        let evidence = after(blocks, &[canary(canaries, canaries), stable(stables, stables)], &rules());
        let judged = judge(&evidence, &rules(), false);
        assert_eq!((judged.verdict, judged.doubted), (Verdict::Inconclusive, true), "{}", judged.because);
        assert!(
            judged.because.contains("both versions fail, as when something is down"),
            "{}",
            judged.because
        );
    }
    // What was down is up again, and the new version fails on.
    let evidence = after(3, &[canary(21, 21), stable(16, 16)], &rules());
    let evidence = fold(&evidence, &[canary(21, 21), stable(60, 0)], &rules(), false);
    let judged = judge(&evidence, &rules(), false);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
    // One failure of the stable version is no outage once it has answered at all.
    let evidence = after(1, &[canary(30, 30), stable(2, 1)], &rules());
    assert_eq!(judge(&evidence, &rules(), false).verdict, Verdict::Fail);
    // Nothing is compared at a weight of 100.
    let evidence = after(1, &[canary(30, 30), stable(2, 2)], &rules());
    assert_eq!(judge(&evidence, &rules(), true).verdict, Verdict::Fail);
}

#[test]
fn a_version_that_turns_bad_or_fails_nearly_all_is_stopped_within_a_minute() {
    let late = Scenario { error_rate: 0.001, worse: 1000.0, bad_from: 30, seconds: 330, ..quiet(50) };
    let nearly_all = Scenario { error_rate: 0.03, worse: 97.0 / 3.0, seconds: 300, ..quiet(50) };
    for (name, scenario) in [("good for 30 s", late), ("97 % beside 3 %", nearly_all)] {
        let summary = repeat(&scenario, &rules(), 40);
        assert!(summary.stopped >= 39, "{name}: {summary:?}");
        assert!(summary.seconds.unwrap() <= 60, "{name}: {summary:?}");
        assert!(summary.canary_failures.unwrap() <= 220, "{name}: {summary:?}");
    }
    let outage = Scenario { error_rate: 1.0, seconds: 300, ..quiet(50) };
    assert_eq!(repeat(&outage, &rules(), 40).stopped, 0);
}

#[test]
fn added_latency_is_found_and_a_slowdown_of_both_is_not() {
    let quick = [(40_000, 98), (100_000, 2)];
    let block = [
        slow(canary(100, 0), &[(40_000, 60), (1_540_000, 40)]),
        slow(stable(100, 0), &quick),
        slow(stable(100, 0), &quick),
    ];
    let judged = judge(&after(60, &block, &rules()), &rules(), false);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
    assert!(
        judged.because.contains("canary's p99 is more than 3x the stable version's"),
        "{}",
        judged.because
    );

    let before = [slow(canary(100, 0), &quick), slow(stable(100, 0), &quick)];
    let doubled = [(80_000, 98), (200_000, 2)];
    let then = [slow(canary(100, 0), &doubled), slow(stable(100, 0), &doubled)];
    let mut evidence = after(20, &before, &rules());
    for _ in 0..20 {
        evidence = fold(&evidence, &then, &rules(), false);
    }
    let judged = judge(&evidence, &rules(), false);
    assert_eq!(judged.verdict, Verdict::Pass, "{}", judged.because);
}

/// A version that takes 300 ms beside one that takes 5 ms.
fn slow_and_quick(canary_attempts: u64, stable_attempts: u64) -> [PodBlock; 2] {
    [
        slow(canary(canary_attempts, 0), &[(300_000, canary_attempts)]),
        slow(stable(stable_attempts, 0), &[(5_000, stable_attempts)]),
    ]
}

#[test]
fn a_slow_version_never_passes_however_few_requests_there_are() {
    // Requests per block.
    for (canaries, stables) in [(1, 4), (7, 7), (13, 52), (40, 160), (150, 12)] {
        let rules = Rules { min_requests: 20, ..rules() };
        let mut evidence = Evidence::default();
        for number in 0..400 {
            evidence = fold(&evidence, &slow_and_quick(canaries, stables), &rules, false);
            let judged = judge(&evidence, &rules, false);
            let at = format!("{canaries} and {stables}, block {number}: {}", judged.because);
            assert_ne!(judged.verdict, Verdict::Pass, "{at}");
        }
        assert_eq!(judge(&evidence, &rules, false).verdict, Verdict::Fail, "{canaries} and {stables}");
    }
}

#[test]
fn the_sentence_says_what_the_first_comparison_of_latencies_waits_for() {
    let rules = Rules { min_requests: 10, ..rules() };
    let because = |blocks| judge(&after(blocks, &slow_and_quick(12, 40), &rules), &rules, false).because;
    let first = "latency not compared yet: 40 of 50 requests to the stable version that it takes first";
    assert!(because(1).ends_with(first), "{}", because(1));
    let second = "latency not compared yet: 0 of 20 requests to the canary and 0 of 20 to the stable version";
    assert!(because(2).ends_with(second), "{}", because(2));
    assert!(because(3).contains("12 of 20 requests to the canary and 20 of 20"), "{}", because(3));
    let numbers = "canary looks slower than 3x, not surely yet: 100.0% of its answers took longer than 15 ms, 3x the stable version's p99 (";
    assert!(because(4).contains(numbers) && because(4).ends_with(", and 1.0% may"), "{}", because(4));
}

/// 10 requests per second, a fifth of them to the canary, and latencies of which a share is 400 ms longer.
fn delayed(share: f64) -> Scenario {
    let latencies = Scenario { slower: Some(1.0), delayed: share, delay: 400_000.0, ..quiet(20) };
    Scenario { error_rate: 0.0, seconds: 900, ..latencies }
}

#[test]
fn a_version_of_which_every_fifth_answer_is_slow_does_not_pass() {
    let busy = Scenario { requests_per_second: 100.0, stable_pods: 3, seconds: 300, ..delayed(0.2) };
    for (name, scenario) in [("quiet", delayed(0.2)), ("busy", busy)] {
        let passed: Vec<_> = (1..=40).filter_map(|seed| first_pass(&scenario, &rules(), seed)).collect();
        assert!(passed.len() <= 4, "{name}: {passed:?}");
    }
}

#[test]
fn a_version_with_the_latencies_of_the_stable_one_passes_as_soon_as_its_requests_are_enough() {
    let passes = |scenario: &Scenario, within: u32| {
        let first = (1..=40).filter_map(|seed| first_pass(scenario, &rules(), seed));
        first.filter(|second| *second <= within).count()
    };
    // 200 requests at two per second take 100 s.
    assert!(passes(&delayed(0.0), 150) >= 36);
    let stalls = Scenario { stalls: 0.05, ..delayed(0.0) };
    assert!(passes(&stalls, 300) >= 34);
}

#[test]
fn a_good_version_with_few_requests_passes_once_its_latency_was_compared() {
    let quick = |pod: PodBlock| {
        let count = pod.totals.attempts;
        slow(pod, &[(5_000, count)])
    };
    let block = [quick(canary(13, 0)), quick(stable(52, 0))];
    let rules = Rules { min_requests: 13, ..rules() };
    let judged = |blocks| judge(&after(blocks, &block, &rules), &rules, false);
    assert_eq!(judged(2).verdict, Verdict::Inconclusive);
    for blocks in 3..60 {
        assert_eq!(judged(blocks).verdict, Verdict::Pass, "{blocks}: {}", judged(blocks).because);
    }
    assert!(judged(3).because.ends_with("not worse than 1.5x"), "{}", judged(3).because);
}

#[test]
fn nobody_waits_without_end_for_latencies_that_cannot_be_compared() {
    let passes = |stables: u64, blocks, rules: &Rules, alone| {
        let quick = [slow(canary(100, 0), &[(5_000, 100)]), slow(stable(stables, 0), &[(5_000, stables)])];
        // The stable version gets nothing after the first block.
        let mut evidence = fold(&Evidence::default(), &quick, rules, alone);
        for _ in 1..blocks {
            evidence = fold(&evidence, &quick[..1], rules, alone);
            evidence.blocks += 1;
        }
        let judged = judge(&evidence, rules, alone);
        (judged.verdict == Verdict::Pass, judged.because)
    };
    let of = rules();
    assert!(!passes(12, 20, &of, false).0, "for minutes");
    let (passed, because) = passes(12, 40, &of, false);
    assert!(passed && because.contains("latency not compared: 12 of 50 requests"), "{because}");
    let (passed, because) = passes(0, 3, &of, false);
    assert!(passed && because.ends_with("latency not compared: the stable version has answered no request"));
    assert!(passes(12, 3, &of, true).0, "it is meant to get all requests");
    let (passed, because) = passes(12, 3, &Rules { latency: None, ..rules() }, false);
    assert!(passed && !because.contains("latency"), "{because}");
}

#[test]
fn connections_without_a_latency_are_not_called_unanswered() {
    let judged = judge(&after(3, &[canary(100, 0), stable(100, 0)], &rules()), &rules(), false);
    assert_eq!(judged.verdict, Verdict::Pass, "{}", judged.because);
    let end = "latency not compared: no latency was measured, as with opaque connections";
    assert!(judged.because.ends_with(end), "{}", judged.because);
}

#[test]
fn stalls_stop_a_good_version_with_few_requests_rarely() {
    for weight in [20, 80] {
        let scenario = Scenario { slower: Some(1.0), stalls: 0.05, seconds: 900, ..quiet(weight) };
        let summary = repeat(&scenario, &rules(), 100);
        assert!(summary.stopped <= 3, "{weight} %: {summary:?}");
    }
}

#[test]
fn added_latency_is_found_beside_a_stable_version_that_is_slow_at_times() {
    // A machine that stands still at times: the stable p99 is 700 ms, and three times that is more than is added.
    let block = [
        slow(canary(100, 0), &[(40_000, 60), (1_540_000, 40)]),
        slow(stable(200, 0), &[(40_000, 190), (700_000, 10)]),
        slow(stable(200, 0), &[(40_000, 192), (700_000, 8)]),
    ];
    let judged = judge(&after(12, &block, &rules()), &rules(), false);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
    assert!(judged.because.contains("canary's p90 is more than 3x"), "{}", judged.because);
}

#[test]
fn added_latency_is_found_also_where_latencies_come_in_bursts() {
    // Now and then one of the stable pods stands still: most of what is slow is slow together.
    let calm = [(40_000, 190), (60_000, 10)];
    let stalled = [(40_000, 100), (700_000, 100)];
    let slowed = [(40_000, 60), (1_540_000, 40)];
    let mut evidence = Evidence::default();
    for number in 0..18 {
        let first = if number % 6 == 1 { stalled } else { calm };
        let block =
            [slow(canary(100, 0), &slowed), slow(stable(200, 0), &first), slow(stable(200, 0), &calm)];
        evidence = fold(&evidence, &block, &rules(), false);
    }
    let judged = judge(&evidence, &rules(), false);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
}

#[test]
fn more_client_errors_hold_the_rollout_unless_the_settings_say_otherwise() {
    let mut refused = canary(100, 0);
    refused.totals.client_errors = 40;
    let block = [refused, stable(500, 0), stable(500, 0)];
    let mut rules = rules();
    let judged = judge(&after(30, &block, &rules), &rules, false);
    assert_eq!(judged.verdict, Verdict::Inconclusive, "{}", judged.because);
    assert!(judged.because.contains("judge.clientErrors: Ignore"), "{}", judged.because);
    rules.client_errors = OnClientErrors::Fail;
    assert_eq!(judge(&after(30, &block, &rules), &rules, false).verdict, Verdict::Fail);
    rules.client_errors = OnClientErrors::Ignore;
    assert_eq!(judge(&after(30, &block, &rules), &rules, false).verdict, Verdict::Pass);
}

#[test]
fn a_version_that_answers_nearly_everything_with_4xx_needs_no_statistics() {
    let refused = |attempts: u64, client_errors: u64, of_stable: u64| {
        let (mut canary, mut stable) = (canary(attempts, 0), stable(200, 0));
        canary.totals.client_errors = client_errors;
        stable.totals.client_errors = of_stable;
        [canary, stable]
    };
    let judged = |block: &[PodBlock], rules: &Rules| judge(&after(1, block, rules), rules, false);
    let all = judged(&refused(60, 59, 0), &rules());
    assert!(all.held && all.verdict == Verdict::Inconclusive, "{}", all.because);
    let sentence = "canary answered 59 of 60 (98.33%) with 4xx or a gRPC error of the client, stable 0 of 200 (0.00%): nearly every one of its requests; the rollout is held: tulle canary abort NAME takes its requests away; to go on regardless, set judge.clientErrors: Ignore";
    assert!(all.because.ends_with(sentence), "{}", all.because);
    let fail = Rules { client_errors: OnClientErrors::Fail, ..rules() };
    assert_eq!(judged(&refused(60, 60, 10), &fail).verdict, Verdict::Fail);
    for (why, block) in [
        ("one burst of fifty", refused(55, 55, 0)),
        ("some are answered", refused(60, 50, 0)),
        ("the stable version has some too", refused(60, 60, 20)),
    ] {
        assert!(!judged(&block, &rules()).held, "{why}");
        assert_eq!(judged(&block, &fail).verdict, Verdict::Inconclusive, "{why}");
    }
    let ignore = Rules { client_errors: OnClientErrors::Ignore, min_requests: 60, ..rules() };
    assert_eq!(judged(&refused(60, 60, 0), &ignore).verdict, Verdict::Pass);
}

#[test]
fn objectives_hold_whatever_the_stable_version_does() {
    let objective = Rules { success_rate: Some(0.99), ..rules() };
    let bad = [canary(500, 100), stable(500, 100)];
    assert_eq!(judge(&after(1, &bad, &objective), &objective, false).verdict, Verdict::Inconclusive);
    let judged = judge(&after(60, &bad, &objective), &objective, false);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
    assert!(judged.because.contains("below the objective of 99% success"), "{}", judged.because);

    let objective = Rules { p99_micros: Some(300_000), ..rules() };
    let slowly = [(50_000, 80), (900_000, 20)];
    let block = [slow(canary(100, 0), &slowly), slow(stable(100, 0), &slowly)];
    assert_eq!(judge(&after(60, &block, &objective), &objective, false).verdict, Verdict::Fail);
}

#[test]
fn no_data_is_neither_good_nor_bad() {
    let judged = judge(&Evidence::default(), &rules(), false);
    assert_eq!(judged.verdict, Verdict::Inconclusive);
    assert!(judged.because.contains("200 more requests to the canary are needed"), "{}", judged.because);
}

#[test]
fn seconds_without_a_canary_count_for_neither_version() {
    let evidence = fold(&Evidence::default(), &[stable(1000, 500)], &rules(), false);
    assert_eq!(evidence.stable, AttemptTotals::default());
}

#[test]
fn a_restarted_operator_continues_with_the_stored_evidence() {
    let block = [canary(50, 2), stable(500, 1), stable(500, 2)];
    let evidence = after(3, &block, &rules());
    let text = serde_json::to_string(&evidence).unwrap();
    let stored: Evidence = serde_json::from_str(&text).unwrap();
    let (mut a, mut b) = (evidence, stored);
    for _ in 0..5 {
        a = fold(&a, &block, &rules(), false);
        b = fold(&b, &block, &rules(), false);
        assert_eq!(judge(&a, &rules(), false), judge(&b, &rules(), false));
    }
}

#[test]
fn the_order_of_pods_does_not_matter() {
    let pods = [canary(50, 3), canary(51, 7), stable(500, 11), stable(499, 13), stable(501, 17)];
    let reversed: Vec<_> = pods.iter().rev().cloned().collect();
    assert_eq!(after(3, &pods, &rules()), after(3, &reversed, &rules()));
}

#[test]
fn a_version_that_takes_all_requests_is_still_judged() {
    let run = |block: PodBlock, blocks, alone| {
        let mut evidence = Evidence::default();
        for _ in 0..blocks {
            evidence = fold(&evidence, std::slice::from_ref(&block), &rules(), alone);
        }
        judge(&evidence, &rules(), alone)
    };
    let judged = run(canary(100, 50), 60, true);
    assert_eq!(judged.verdict, Verdict::Fail, "{}", judged.because);
    assert!(judged.because.contains("worse than 15.0%"), "{}", judged.because);
    assert_eq!(run(canary(1000, 50), 3, true).verdict, Verdict::Pass);
    let early = run(canary(500, 50), 1, false);
    assert!(early.because.contains("there is nothing to compare with"), "{}", early.because);
}

#[test]
fn counts_that_cannot_be_true_do_not_end_the_judge() {
    let most = u64::MAX / 2;
    let rules = Rules { success_rate: Some(0.99), p99_micros: Some(1_000_000), ..rules() };
    let mut pod = canary(most, most);
    pod.latency.add(159, u64::MAX);
    let evidence = after(3, &[pod.clone(), stable(1, 0), pod], &rules);
    let all = evidence.tests.iter().flat_map(|test| &test.windows).flat_map(|window| &window.log_evidence);
    assert!(all.clone().all(|log| log.is_finite()), "{:?}", all.collect::<Vec<_>>());
}

#[test]
fn the_sentence_names_the_numbers() {
    let rules = rules();
    let block = [canary(25, 5), stable(475, 1)];
    let mut evidence = after(20, &block, &rules);
    let judged = judge(&evidence, &rules, false);
    assert_eq!(
        judged.because,
        "canary failed 100 of 500 (20.00%), stable 20 of 9500 (0.21%): worse than 1.5x, 99% sure at every look"
    );
    evidence.canary.unreached = 12;
    assert!(judge(&evidence, &rules, false).because.contains("(20.00%; 12 of them were never reached)"));
    evidence.canary.unreached = 1;
    assert!(judge(&evidence, &rules, false).because.contains("(20.00%; 1 of them was never reached)"));
}

#[test]
fn settings_that_cannot_be_parsed_become_the_defaults() {
    let mut settings = Judge { confidence: "sure".to_owned(), ..Judge::default() };
    settings.latency.quantile = "median".to_owned();
    let rules = Rules::of(&settings);
    assert!((rules.alpha - 0.01).abs() < 1e-9);
    assert_eq!(rules.latency, Some(LatencyRule { quantile: 0.99, worse_by: 3.0 }));
    settings.latency.worse_by = 0.0;
    assert_eq!(Rules::of(&settings).latency, None);
}
