//! Prints how often the judge stops a good version and how soon it finds a bad one.
//!
//! `cargo run --release -p tulle-operator --example judge [RUNS]`

use tulle_crds::Judge;
use tulle_operator::rollout::judge::Rules;
use tulle_operator::rollout::judge::simulation::{Scenario, Summary, first_pass, repeat};

fn main() {
    let runs = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(400);
    let rules = Rules::of(&Judge::default());
    println!("False alarms of good versions at a confidence of 99 % (100 requests/s, 1 % errors, 30 min)");
    println!("{:<44} {:>6} {:>8} {:>8}", "failures", "runs", "stopped", "share");
    let good = Scenario::default();
    let burst = |burst| Scenario { burst, ..good.clone() };
    for (name, scenario) in [
        ("independent", good.clone()),
        ("bursts of 5", burst(5)),
        ("bursts of 10", burst(10)),
        ("bursts of 20", burst(20)),
        ("bursts of 50", burst(50)),
        ("bursts of 50, 20 requests/s", Scenario { requests_per_second: 20.0, ..burst(50) }),
        ("error rate drifts tenfold", Scenario { drifts: true, ..good.clone() }),
        ("ramp 1-5-10-25-50", Scenario { weights: vec![1, 5, 10, 25, 50], ..good.clone() }),
        ("ramp, bursts of 20", Scenario { weights: vec![1, 5, 10, 25, 50], ..burst(20) }),
        ("bursts of 50, 10 requests/s, weight 20 %", quiet(20, &burst(50))),
        ("bursts of 50, 10 requests/s, weight 80 %", quiet(80, &burst(50))),
        ("the same, 5 % errors, weight 20 %", quiet(20, &Scenario { error_rate: 0.05, ..burst(50) })),
        ("both fail every request, weight 5 %", Scenario { error_rate: 1.0, ..good.clone() }),
        ("both fail every request, weight 50 %", quiet(50, &Scenario { error_rate: 1.0, ..good.clone() })),
    ] {
        alarms(name, &repeat(&scenario, &rules, runs));
    }
    let latency = Scenario { slower: Some(1.0), ..good.clone() };
    alarms("independent, latencies judged too", &repeat(&latency, &rules, runs / 20));
    let stalls = Scenario { stalls: 0.05, ..latency };
    alarms("the same, pods stand still at times", &repeat(&stalls, &rules, runs / 20));
    for weight in [20, 50, 95] {
        let name = format!("the same, 10 requests/s, weight {weight} %");
        alarms(&name, &repeat(&quiet(weight, &stalls), &rules, runs / 4));
    }
    let small = Scenario { requests_per_second: 10.0, weights: vec![20], ..stalls };
    alarms("the same, weight 20 %, five stable pods", &repeat(&small, &rules, runs / 4));

    println!();
    println!("Bad versions (100 requests/s, 0.1 % errors): found within 30 min, medians until then");
    println!("{:<24} {:>7} {:>7} {:>9} {:>16}", "canary", "weight", "found", "seconds", "failed attempts");
    for weight in [5, 10, 50] {
        let at = Scenario { weights: vec![weight], error_rate: 0.001, ..good.clone() };
        for worse in [2.0, 3.0, 5.0, 10.0, 100.0] {
            let scenario = Scenario { worse, ..at.clone() };
            power(&format!("fails {worse}x as often"), weight, &repeat(&scenario, &rules, runs / 10));
        }
        for slower in [2.0, 5.0, 10.0] {
            let scenario = Scenario { slower: Some(slower), ..at.clone() };
            power(&format!("{slower}x slower"), weight, &repeat(&scenario, &rules, runs / 40));
        }
    }
    println!("Pods stand still in one of twenty looks:");
    for weight in [5, 20] {
        let stalls = Scenario { slower: Some(1.0), stalls: 0.05, weights: vec![weight], ..good.clone() };
        for delayed in [0.2, 0.4] {
            let scenario = Scenario { delayed, ..stalls.clone() };
            let name = format!("{:.0} % take 1.5 s longer", delayed * 100.0);
            power(&name, weight, &repeat(&scenario, &rules, runs / 40));
        }
    }
    share_of_slow_answers(&good, &rules, runs);
    println!("At 1 % errors, 200 requests/s:");
    for worse in [2.0, 3.0, 10.0] {
        let busy = Scenario { requests_per_second: 200.0, weights: vec![10], worse, ..good.clone() };
        power(&format!("fails {worse}x as often"), 10, &repeat(&busy, &rules, runs / 10));
    }
    println!("10 requests/s, one pod of each version, 0.1 % errors:");
    for weight in [20, 40, 80] {
        for (share, worse) in [(60, 600.0), (50, 500.0), (30, 300.0)] {
            let scenario = quiet(weight, &Scenario { error_rate: 0.001, worse, ..good.clone() });
            power(&format!("fails {share} % of requests"), weight, &repeat(&scenario, &rules, runs / 10));
        }
    }
    nearly_all(&good, &rules, runs / 10);
    slow_with_few_requests(&good, &rules, runs);
    println!("At 0.1 % errors, 100 requests/s:");
    let hours = 10 * 3600;
    let late =
        Scenario { error_rate: 0.001, worse: 100.0, bad_from: hours, seconds: hours + 1800, ..good.clone() };
    power("fails 100x, after 10 h", 5, &repeat(&late, &rules, runs / 40));
}

/// Versions that fail nearly every request, some of them not from the beginning on.
fn nearly_all(good: &Scenario, rules: &Rules, runs: u32) {
    println!("10 requests/s, one pod of each version, nearly all requests fail:");
    for weight in [20, 50, 80] {
        let late = Scenario { error_rate: 0.001, worse: 1000.0, bad_from: 30, ..good.clone() };
        power("all, after 30 s", weight, &repeat(&quiet(weight, &late), rules, runs));
        let beside = Scenario { error_rate: 0.03, worse: 97.0 / 3.0, ..good.clone() };
        power("97 %, the stable 3 %", weight, &repeat(&quiet(weight, &beside), rules, runs));
    }
}

/// Of which versions a share of the answers is slow, and how many of them get a Pass all the same.
fn share_of_slow_answers(good: &Scenario, rules: &Rules, runs: u32) {
    let runs = (runs / 40).max(1);
    println!(
        "A share of the answers takes 400 ms longer, no errors: rollouts of 30 min with a Pass, median until then"
    );
    let latencies = Scenario { slower: Some(1.0), delay: 400_000.0, error_rate: 0.0, ..good.clone() };
    for (name, scenario) in [
        ("10 requests/s, weight 20 %", quiet(20, &latencies)),
        ("100 requests/s, weight 5 %", latencies.clone()),
        ("the same, pods stand still at times", Scenario { stalls: 0.05, ..latencies.clone() }),
    ] {
        for share in [0.0, 0.02, 0.05, 0.1, 0.2, 0.5] {
            let scenario = Scenario { delayed: share, ..scenario.clone() };
            let seeds = 1..=u64::from(runs);
            let mut passed: Vec<u32> = seeds.filter_map(|seed| first_pass(&scenario, rules, seed)).collect();
            passed.sort_unstable();
            let seconds = passed.get(passed.len() / 2).map_or("-".to_owned(), |second| format!("{second} s"));
            println!("{name:<38} {:>4.0} % {:>4} of {runs} {seconds:>8}", share * 100.0, passed.len());
        }
    }
}

fn slow_with_few_requests(good: &Scenario, rules: &Rules, runs: u32) {
    println!("10 requests/s, one pod of each version, latencies of few requests:");
    for weight in [10, 20, 50] {
        for slower in [5.0, 10.0] {
            let scenario = quiet(weight, &Scenario { slower: Some(slower), ..good.clone() });
            power(&format!("{slower}x slower"), weight, &repeat(&scenario, rules, runs / 40));
        }
    }
}

/// The same with 10 requests per second and one pod of each version.
fn quiet(weight: u8, like: &Scenario) -> Scenario {
    Scenario { requests_per_second: 10.0, weights: vec![weight], stable_pods: 1, ..like.clone() }
}

fn alarms(name: &str, summary: &Summary) {
    let share = f64::from(summary.stopped) / f64::from(summary.runs.max(1)) * 100.0;
    println!("{name:<44} {:>6} {:>8} {share:>7.2}%", summary.runs, summary.stopped);
}

fn power(name: &str, weight: u8, summary: &Summary) {
    let share = f64::from(summary.stopped) / f64::from(summary.runs.max(1)) * 100.0;
    let or_dash = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
    println!(
        "{name:<24} {weight:>6}% {share:>6.0}% {:>9} {:>16}",
        or_dash(summary.seconds.map(u64::from)),
        or_dash(summary.canary_failures)
    );
}
