//! What counts as slow.
//!
//! The stable version's quantile is estimated from the blocks before the present one, so the estimate is
//! predictable. An attempt at the stable version is slow when it exceeds the estimate, one at the canary when
//! it exceeds the estimate by the accepted factor: when both slow down together, the stable version has at
//! least as many slow attempts.
//!
//! An estimate takes fifty answers, of one block or of as many as it takes: at five requests per second or fewer, no
//! block ever has them.

use tulle_mesh::histogram::{Histogram, upper_bound_micros};

use super::{LatencyRule, PodBlock, Side};

/// Differences below this are never a reason, in microseconds.
const FLOOR: f64 = 10_000.0;
/// Answers of the stable version that change the estimate.
pub(super) const ENOUGH: u64 = 50;
/// More cannot be true, and would overflow the sums of a quantile.
const MOST: u64 = 0xFFFF_FFFF_FFFF;
/// Weight of the newest answers in the estimate.
const NEWEST: f64 = 0.1;

/// Latency in microseconds from which on an attempt at the canary is slow.
pub(super) fn limit(stable: f64, rule: LatencyRule) -> f64 {
    (stable * rule.worse_by).max(stable + FLOOR)
}

/// The stable version's quantile in microseconds after one more block. `gathered`: its answers since the last estimate.
pub(super) fn reference(
    before: Option<f64>,
    gathered: &mut Histogram,
    block: &[PodBlock],
    rule: LatencyRule,
) -> Option<f64> {
    for pod in block.iter().filter(|pod| pod.side == Side::Stable) {
        for (bucket, count) in pod.latency.buckets() {
            gathered.add(bucket, count);
        }
    }
    if count(gathered) < ENOUGH {
        return before;
    }
    let stable = std::mem::take(gathered);
    if count(&stable) > MOST {
        return before;
    }
    let seen = stable.quantile(rule.quantile)?;
    Some(match before.filter(|before| before.is_finite() && *before > 0.0) {
        Some(before) => (before.ln() + NEWEST * (seen.ln() - before.ln())).exp(),
        None => seen,
    })
}

/// How many answers there are.
pub(super) fn count(latency: &Histogram) -> u64 {
    latency.buckets().fold(0_u64, |sum, (_, count)| sum.saturating_add(count))
}

/// Slow attempts at one pod.
pub(super) fn events(pod: &PodBlock, stable: f64, rule: LatencyRule) -> f64 {
    if pod.side == Side::Canary {
        return slower(&pod.latency, limit(stable, rule));
    }
    // The bucket that holds the estimate may hold most attempts, where all take about as long. So many of them
    // count that the share of slow attempts is that of the quantile: a canary whose quantile is the same must
    // not be compared with a rate of zero.
    let surely = slower(&pod.latency, stable);
    let possibly = slower(&pod.latency, stable / 0.125_f64.exp2());
    surely.max(possibly.min((1.0 - rule.quantile) * slower(&pod.latency, 0.0)))
}

/// Attempts in the buckets that begin at or above a threshold in microseconds.
pub(super) fn slower(latency: &Histogram, threshold: f64) -> f64 {
    let lower = |bucket: usize| bucket.checked_sub(1).map_or(0.0, upper_bound_micros);
    latency.buckets().filter(|(bucket, _)| lower(*bucket) >= threshold).map(|(_, count)| count as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: LatencyRule = LatencyRule { quantile: 0.9, worse_by: 3.0 };

    fn stable(count: u64, micros: u64) -> Vec<PodBlock> {
        let mut pod = PodBlock::default();
        (0..count).for_each(|_| pod.latency.record(micros));
        vec![pod]
    }

    #[test]
    fn the_stable_versions_quantile_is_known_after_fifty_answers_however_many_blocks_that_takes() {
        let mut gathered = Histogram::default();
        for _ in 0..4 {
            assert_eq!(reference(None, &mut gathered, &stable(12, 5_000), RULE), None);
        }
        assert_eq!(count(&gathered), 48);
        let known = reference(None, &mut gathered, &stable(12, 5_000), RULE).unwrap();
        assert!((known / 5_000.0 - 1.0).abs() < 0.05, "{known}");
        assert_eq!(count(&gathered), 0, "each answer counts once");
    }

    #[test]
    fn later_answers_change_it_once_they_are_enough_too() {
        let mut gathered = Histogram::default();
        let known = Some(5_000.0);
        assert_eq!(reference(known, &mut gathered, &stable(49, 50_000), RULE), known);
        assert!(reference(known, &mut gathered, &stable(1, 50_000), RULE) > known);
    }

    #[test]
    fn counts_that_cannot_be_true_are_not_kept() {
        let mut block = stable(1, 5_000);
        block[0].latency.add(3, u64::MAX - 1);
        let mut gathered = Histogram::default();
        assert_eq!(reference(None, &mut gathered, &block, RULE), None);
        assert_eq!(count(&gathered), 0);
    }
}
