//! Rollouts on paper: how often the judge stops a good version, and how soon it finds a bad one.

use tulle_crds::Evidence;

use super::{Judgement, PodBlock, Rules, Side, Verdict, fold, judge};

/// Seconds between two looks.
const LOOK: u32 = 2;
/// Seconds of a block.
const BLOCK: u32 = 10;

/// A rollout that is simulated.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// Requests per second to both versions together.
    pub requests_per_second: f64,
    /// Percentages of the canary, each for the same time.
    pub weights: Vec<u8>,
    /// Pods of the canary.
    pub canary_pods: usize,
    /// Pods of the stable version.
    pub stable_pods: usize,
    /// Share of requests that fail at the stable version.
    pub error_rate: f64,
    /// Whether the error rate rises tenfold for both versions, for a while and again and again.
    pub drifts: bool,
    /// Requests of one pod that fail in a row; 1: each request fails on its own.
    pub burst: u32,
    /// How many times more often the canary fails.
    pub worse: f64,
    /// Second at which the canary turns bad.
    pub bad_from: u32,
    /// Latencies are simulated too: how many times slower the canary is.
    pub slower: Option<f64>,
    /// Share of the canary's requests that take longer, where latencies are simulated.
    pub delayed: f64,
    /// How many microseconds longer these take.
    pub delay: f64,
    /// Share of all looks in which a pod stands still and every third of its requests takes half a second longer,
    /// where latencies are simulated.
    pub stalls: f64,
    /// Length in seconds.
    pub seconds: u32,
}

impl Default for Scenario {
    /// Half an hour of a good version at 5 % of 100 requests a second.
    fn default() -> Self {
        Self {
            requests_per_second: 100.0,
            weights: vec![5],
            canary_pods: 1,
            stable_pods: 5,
            error_rate: 0.01,
            drifts: false,
            burst: 1,
            worse: 1.0,
            bad_from: 0,
            slower: None,
            delayed: 0.0,
            delay: 1_500_000.0,
            stalls: 0.0,
            seconds: 1800,
        }
    }
}

/// How a simulated rollout was stopped.
#[derive(Clone, Debug, PartialEq)]
pub struct Stopped {
    /// Seconds since the canary turned bad.
    pub seconds: u32,
    /// Attempts at the canary that failed since then.
    pub canary_failures: u64,
    /// The judge's sentence.
    pub because: String,
}

/// Simulates one rollout. `None`: it was not stopped.
pub fn simulate(scenario: &Scenario, rules: &Rules, seed: u64) -> Option<Stopped> {
    looks(scenario, rules, seed, |look| {
        (look.judged.verdict == Verdict::Fail).then(|| Stopped {
            seconds: look.second.saturating_sub(scenario.bad_from),
            canary_failures: look.canary_failures,
            because: look.judged.because,
        })
    })
}

/// The second at which a simulated rollout has its first Pass. `None`: it has none.
pub fn first_pass(scenario: &Scenario, rules: &Rules, seed: u64) -> Option<u32> {
    looks(scenario, rules, seed, |look| (look.judged.verdict == Verdict::Pass).then_some(look.second))
}

/// One look at a simulated rollout.
struct Look {
    second: u32,
    /// Attempts at the canary that have failed since it turned bad.
    canary_failures: u64,
    judged: Judgement,
}

/// Simulates one rollout until something is found in a look.
fn looks<T>(
    scenario: &Scenario,
    rules: &Rules,
    seed: u64,
    mut found: impl FnMut(Look) -> Option<T>,
) -> Option<T> {
    let mut dice = Dice::new(seed);
    let mut evidence = Evidence::default();
    let pods = scenario.canary_pods + scenario.stable_pods;
    let mut pending = vec![0_u64; pods];
    let mut canary_failures = 0;
    let mut second = 0;
    while second < scenario.seconds {
        let mut block = vec![PodBlock::default(); pods];
        let mut running = evidence.clone();
        for _ in 0..BLOCK / LOOK {
            for (index, (pod, pending)) in block.iter_mut().zip(&mut pending).enumerate() {
                if index < scenario.canary_pods {
                    pod.side = Side::Canary;
                }
                let failures = scenario.requests(pod, pending, second, &mut dice);
                if pod.side == Side::Canary && second >= scenario.bad_from {
                    canary_failures += failures;
                }
            }
            second += LOOK;
            running = fold(&evidence, &block, rules, false);
            let judged = judge(&running, rules, false);
            let found = found(Look { second, canary_failures, judged });
            if found.is_some() {
                return found;
            }
        }
        evidence = running;
    }
    None
}

impl Scenario {
    /// Adds the requests of one look at one pod; how many failed.
    fn requests(&self, pod: &mut PodBlock, pending: &mut u64, second: u32, dice: &mut Dice) -> u64 {
        let canary = pod.side == Side::Canary;
        let bad = canary && second >= self.bad_from;
        let count = dice.poisson(self.requests_per_second * f64::from(LOOK) * self.share(canary, second));
        let drift = if self.drifts && (second / 300) % 2 == 1 { 10.0 } else { 1.0 };
        let rate = (self.error_rate * drift * if bad { self.worse } else { 1.0 }).min(1.0);
        let begins = rate / f64::from(self.burst.max(1));
        let mut failures = 0;
        let mut at = 0;
        while at < count {
            if *pending == 0 {
                // Straight to the request at which the next burst begins.
                at = at.saturating_add(dice.gap(begins));
                if at >= count {
                    break;
                }
                *pending = u64::from(self.burst.max(1));
            }
            let fails = (*pending).min(count - at);
            *pending -= fails;
            failures += fails;
            at += fails;
        }
        pod.totals.attempts += count;
        pod.totals.failures += failures;
        if let Some(slower) = self.slower {
            let factor = if bad { slower } else { 1.0 };
            let stalled = self.stalls > 0.0 && dice.uniform() < self.stalls;
            let delayed = if bad { self.delayed } else { 0.0 };
            for _ in 0..count {
                // Lognormal: median 40 ms, p99 about 130 ms.
                let mut micros = 40_000.0 * factor * (0.5 * dice.normal()).exp();
                if stalled && dice.uniform() < 1.0 / 3.0 {
                    micros += 500_000.0;
                }
                if delayed > 0.0 && dice.uniform() < delayed {
                    micros += self.delay;
                }
                pod.latency.record(micros as u64);
            }
        }
        failures
    }

    /// Share of all requests that one pod of a version gets.
    fn share(&self, canary: bool, second: u32) -> f64 {
        let steps = self.weights.len().max(1);
        let step = (second as usize * steps) / self.seconds.max(1) as usize;
        let weight = f64::from(self.weights.get(step.min(steps - 1)).copied().unwrap_or(5)) / 100.0;
        match canary {
            true => weight / self.canary_pods.max(1) as f64,
            false => (1.0 - weight) / self.stable_pods.max(1) as f64,
        }
    }
}

/// A generator of its own (SplitMix64), so that simulations are the same on every run.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0xD134_2543_DE82_EF95))
    }

    /// Uniform, above 0 and at most 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        ((mixed >> 11) as f64 + 1.0) / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Requests that pass before one to which something happens with this probability.
    fn gap(&mut self, probability: f64) -> u64 {
        if probability <= 0.0 {
            return u64::MAX;
        }
        if probability >= 1.0 {
            return 0;
        }
        (self.uniform().ln() / (1.0 - probability).ln()) as u64
    }

    fn poisson(&mut self, mean: f64) -> u64 {
        if mean > 50.0 {
            return (mean + mean.sqrt() * self.normal()).round().max(0.0) as u64;
        }
        let limit = (-mean).exp();
        let mut product = self.uniform();
        let mut count = 0;
        while product > limit {
            count += 1;
            product *= self.uniform();
        }
        count
    }
}

/// How many of `runs` rollouts were stopped, with the median of seconds and of failed attempts at the canary.
pub fn repeat(scenario: &Scenario, rules: &Rules, runs: u32) -> Summary {
    let mut stopped: Vec<Stopped> =
        (1..=u64::from(runs)).filter_map(|seed| simulate(scenario, rules, seed)).collect();
    let middle = stopped.len() / 2;
    stopped.sort_by_key(|stopped| stopped.seconds);
    let seconds = stopped.get(middle).map(|stopped| stopped.seconds);
    stopped.sort_by_key(|stopped| stopped.canary_failures);
    let canary_failures = stopped.get(middle).map(|stopped| stopped.canary_failures);
    Summary { runs, stopped: stopped.len() as u32, seconds, canary_failures }
}

/// Outcome of many simulated rollouts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// How many rollouts were simulated.
    pub runs: u32,
    /// How many of them were stopped.
    pub stopped: u32,
    /// Median of the seconds until then.
    pub seconds: Option<u32>,
    /// Median of the attempts at the canary that had failed by then.
    pub canary_failures: Option<u64>,
}
