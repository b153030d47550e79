//! Evidence that is gathered from several starting points.
//!
//! Each window multiplies e-values since its own start. Their weighted sum is an e-process again (Vovk & Wang,
//! "E-values: calibration, combination and applications", 2021): the weights add up to 1, and a window that has
//! not begun, or that is forgotten, counts as 0. A version that turns bad after a long pause is found by the
//! newest windows, which hold nothing of the good time before.

use tulle_crds::{EvidenceWindow, TestEvidence};

/// Blocks after which a new window begins: ten minutes.
const BLOCKS_PER_WINDOW: u32 = 60;
/// Windows that are kept besides the one that began with the rollout.
const RECENT: usize = 2;
/// Bound of a stored logarithm. Far beyond every threshold, and safe to add to.
const MOST: f64 = 1e12;

/// Adds the logarithms of one block's e-values, one for each factor, to a test.
pub(super) fn add(test: &mut TestEvidence, increments: &[f64]) {
    // The factors depend on the settings. Evidence that was collected under others cannot be continued.
    if test.windows.iter().any(|window| window.log_evidence.len() != increments.len()) {
        test.windows.clear();
    }
    let age = test.windows.iter().find(|window| window.number == 0).map_or(0, |window| window.blocks);
    if test.windows.is_empty() || (age > 0 && age.is_multiple_of(BLOCKS_PER_WINDOW)) {
        let number = age / BLOCKS_PER_WINDOW;
        test.windows.push(EvidenceWindow { number, blocks: 0, log_evidence: vec![0.0; increments.len()] });
        let oldest_kept = number.saturating_sub(RECENT as u32 - 1);
        test.windows.retain(|window| window.number == 0 || window.number >= oldest_kept);
    }
    for window in &mut test.windows {
        window.blocks = window.blocks.saturating_add(1);
        for (sum, increment) in window.log_evidence.iter_mut().zip(increments) {
            let next = *sum + increment;
            *sum = if next.is_nan() { 0.0 } else { next.clamp(-MOST, MOST) };
        }
    }
}

/// Logarithm of the evidence of a test over all its windows. Negative infinity before the first block.
pub(super) fn log_evidence(test: &TestEvidence) -> f64 {
    let weighted: Vec<f64> = test
        .windows
        .iter()
        .map(|window| log_weight(window.number) + log_mean(&window.log_evidence))
        .collect();
    log_sum(&weighted)
}

/// Half for the window that begins with the rollout; the other half is shared by all that follow, as the sum
/// of 1/(k(k+1)) over k = 1, 2, … is 1.
fn log_weight(number: u32) -> f64 {
    let number = f64::from(number);
    if number < 1.0 { 0.5_f64.ln() } else { 0.5_f64.ln() - (number * (number + 1.0)).ln() }
}

/// Logarithm of the mean, without overflow.
fn log_mean(logs: &[f64]) -> f64 {
    log_sum(logs) - (logs.len().max(1) as f64).ln()
}

/// Logarithm of the sum, without overflow.
fn log_sum(logs: &[f64]) -> f64 {
    let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() {
        return largest;
    }
    largest + logs.iter().map(|log| (log - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_window_and_the_newest_two_are_kept() {
        let mut test = TestEvidence::default();
        for _ in 0..301 {
            add(&mut test, &[0.0, 0.0]);
        }
        let windows: Vec<_> = test.windows.iter().map(|window| (window.number, window.blocks)).collect();
        assert_eq!(windows, [(0, 301), (4, 61), (5, 1)]);
    }

    #[test]
    fn the_weights_of_all_windows_add_up_to_one_at_most() {
        let sum: f64 = (0..100_000).map(|number| log_weight(number).exp()).sum();
        assert!(sum <= 1.0 && sum > 0.999, "{sum}");
    }

    #[test]
    fn large_logarithms_neither_overflow_nor_underflow() {
        assert!((log_mean(&[1e9, 1e9]) - 1e9).abs() < 1e-3);
        assert!((log_mean(&[-1e9, -1e9]) + 1e9).abs() < 1e-3);
        assert_eq!(log_evidence(&TestEvidence::default()), f64::NEG_INFINITY);
    }

    #[test]
    fn evidence_that_was_collected_under_other_factors_is_dropped() {
        let mut test = TestEvidence::default();
        add(&mut test, &[5.0, 5.0]);
        add(&mut test, &[1.0]);
        assert_eq!(test.windows.len(), 1);
        assert_eq!(test.windows.first().unwrap().log_evidence, [1.0]);
    }
}
