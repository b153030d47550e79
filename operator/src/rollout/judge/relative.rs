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
//! All that holds for events that are independent. Failures also come in bursts, so events are divided by a number
//! of at least 1 (see `burst`). Where it is known from earlier blocks, that keeps the mean at most 1 for
//! independent events (Jensen), and counting fewer events of the canary only lowers it. Where it is the
//! largest count of the present block, and whenever events come in bursts, there is no proof: that false alarms
//! stay as rare as promised is known from simulation only (`examples/judge.rs`).

use super::burst::{Counting, Earlier};
use super::{FACTORS, Pod};

/// Logarithms of the e-values of one block, one for each factor. `None` where there is nothing to compare.
pub(super) fn increments(pods: &[Pod], margin: f64, earlier: Earlier) -> Option<Vec<f64>> {
    let attempts =
        |canary| pods.iter().filter(|pod| pod.canary == canary).map(|pod| pod.attempts).sum::<f64>();
    let (canary, stable) = (attempts(true), attempts(false));
    if canary <= 0.0 || stable <= 0.0 {
        return None;
    }
    let stable_events: f64 = pods.iter().filter(|pod| !pod.canary).map(|pod| pod.events).sum();
    let counting = Counting::of(pods, earlier, margin * stable_events / stable);
    let events: f64 = pods.iter().map(|pod| counting.weight(pod)).sum();
    let canary_events: f64 = pods.iter().filter(|pod| pod.canary).map(|pod| counting.weight(pod)).sum();
    // ln θ(r)/θ(r0) = ln f + ln d(r0)/d(r) and ln (1-θ(r))/(1-θ(r0)) = ln d(r0)/d(r), where d is the
    // denominator of θ: no difference of nearly equal numbers.
    let denominator = |ratio: f64| canary * ratio + stable;
    let increment = |factor: &f64| {
        canary_events * factor.ln() + events * (denominator(margin) / denominator(margin * factor)).ln()
    };
    Some(FACTORS.iter().map(increment).collect())
}
