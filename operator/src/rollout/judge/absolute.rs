//! Compares the canary with a fixed limit, whatever the stable version does.
//!
//! The e-value of a block is that of a Poisson count, f^e · exp(-(f-1)·p0·n), where p0 is the rate that is
//! allowed and f the factor that is bet on. For bounded events its mean is at most 1 at every rate up to p0.
//! Events and attempts are divided as `burst` says. Where events come in bursts, that false alarms stay as rare as
//! promised is known from simulation only.

use super::burst::{Counting, Earlier};
use super::{FACTORS, Pod};

/// Lowest rate that can be told from zero.
const LOWEST: f64 = 1e-6;

/// Logarithms of the e-values of one block, one for each factor. `None` without attempts at the canary.
pub(super) fn increments(pods: &[Pod], allowed: f64, earlier: Earlier) -> Option<Vec<f64>> {
    let canary: Vec<Pod> = pods.iter().copied().filter(|pod| pod.canary).collect();
    let attempts: f64 = canary.iter().map(|pod| pod.attempts).sum();
    if attempts <= 0.0 {
        return None;
    }
    let allowed = allowed.clamp(LOWEST, 1.0);
    let counting = Counting::of(&canary, earlier, allowed);
    let events: f64 = canary.iter().map(|pod| counting.weight(pod)).sum();
    let expected = allowed * attempts / counting.divisor;
    Some(factors(allowed).iter().map(|factor| events * factor.ln() - (factor - 1.0) * expected).collect())
}

/// The factors that lead to a rate of at most 1.
fn factors(allowed: f64) -> Vec<f64> {
    let possible: Vec<f64> = FACTORS.into_iter().filter(|factor| factor * allowed <= 1.0).collect();
    if possible.is_empty() { vec![1.0 / allowed] } else { possible }
}
