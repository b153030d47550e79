//! What counts as slow.
//!
//! The stable version's quantile is estimated from the blocks before the present one, so the estimate is
//! predictable. An attempt at the stable version is slow when it exceeds the estimate, one at the canary when
//! it exceeds the estimate by the accepted factor: when both slow down together, the stable version has at
//! least as many slow attempts.

use tulle_mesh::histogram::{Histogram, upper_bound_micros};

use super::{LatencyRule, PodBlock, Side};

/// Differences below this are never a reason, in microseconds.
const FLOOR: f64 = 10_000.0;
/// Attempts at the stable version that a block must have to change the estimate.
const ENOUGH: u64 = 50;
/// Weight of the newest block in the estimate.
const NEWEST: f64 = 0.1;

/// Latency in microseconds from which on an attempt at the canary is slow.
pub(super) fn limit(stable: f64, rule: LatencyRule) -> f64 {
    (stable * rule.worse_by).max(stable + FLOOR)
}

/// The stable version's quantile in microseconds after one more block.
pub(super) fn reference(before: Option<f64>, block: &[PodBlock], rule: LatencyRule) -> Option<f64> {
    let mut stable = Histogram::default();
    for pod in block.iter().filter(|pod| pod.side == Side::Stable) {
        for (bucket, count) in pod.latency.buckets() {
            stable.add(bucket, count);
        }
    }
    let count = stable.buckets().fold(0_u64, |sum, (_, count)| sum.saturating_add(count));
    let seen = match count {
        // More cannot be true, and would overflow the sums below.
        ENOUGH..=0xFFFF_FFFF_FFFF => stable.quantile(rule.quantile)?,
        _ => return before,
    };
    Some(match before.filter(|before| before.is_finite() && *before > 0.0) {
        Some(before) => (before.ln() + NEWEST * (seen.ln() - before.ln())).exp(),
        None => seen,
    })
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
