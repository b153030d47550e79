//! Compares the canary with the stable version over the same ten seconds.
//!
//! Given that an event (a failure, say) happens, it is the canary's with probability
//! θ(r) = n_c·r / (n_c·r + n_s), where n are attempts and the canary's rate is r times the stable one. The base
//! rate does not occur in it, so it may drift as it likes (Lindon & Malek, "Anytime-valid inference for
//! multinomial count data", NeurIPS 2022; Turner, Ly & Grünwald, "Safe tests for 2×2 contingency tables", 2021).
//! With C events of the canary and P of the stable version, the likelihood ratio of r0·f against the margin r0
//! is a bet of the kind that multiplies to an e-process (Waudby-Smith & Ramdas, 2023). The mean over a grid of
//! factors f is one too.
//!
//! Failures come in bursts, so the busiest pod of a block counts as one event and the others as fractions of
//! it. Dividing the exponent by a number of at least 1 keeps the mean at most 1 (Jensen).

use super::{FACTORS, Pod, burst};

/// Logarithms of the e-values of one block, one for each factor. `None` where there is nothing to compare.
pub(super) fn increments(pods: &[Pod], margin: f64, typical_burst: f64) -> Option<Vec<f64>> {
    let attempts =
        |canary| pods.iter().filter(|pod| pod.canary == canary).map(|pod| pod.attempts).sum::<f64>();
    let (canary, stable) = (attempts(true), attempts(false));
    if canary <= 0.0 || stable <= 0.0 {
        return None;
    }
    let divisor = burst::divisor(pods, typical_burst);
    let events: f64 = pods.iter().map(|pod| burst::weight(pod, divisor)).sum();
    let canary_events: f64 =
        pods.iter().filter(|pod| pod.canary).map(|pod| burst::weight(pod, divisor)).sum();
    // ln θ(r)/θ(r0) = ln f + ln d(r0)/d(r) and ln (1-θ(r))/(1-θ(r0)) = ln d(r0)/d(r), where d is the
    // denominator of θ: no difference of nearly equal numbers.
    let denominator = |ratio: f64| canary * ratio + stable;
    let increment = |factor: &f64| {
        canary_events * factor.ln() + events * (denominator(margin) / denominator(margin * factor)).ln()
    };
    Some(FACTORS.iter().map(increment).collect())
}
