//! The one latency histogram: exponential, base 2^(1/8) (OpenTelemetry scale 3, Prometheus native
//! schema 3), at most 160 buckets, relative error at most 4.4 %. Mergeable by addition, so deltas of
//! many sidecars become one truth.

/// Buckets that are kept: from 2^6 = 64 µs up by factors of 2^(1/8), so 160 reach 2^26 µs ≈ 67 s.
/// What is quicker counts in the first, what is slower in the last.
pub const BUCKETS: usize = 160;

/// The octave of the first bucket.
const FIRST_OCTAVE: u32 = 6;

/// Upper bound of a bucket in microseconds.
pub fn upper_bound_micros(bucket: usize) -> f64 {
    ((bucket as f64 + 1.0) / 8.0 + f64::from(FIRST_OCTAVE)).exp2()
}

/// The bucket of a latency in microseconds.
pub fn bucket_of(micros: u64) -> usize {
    if micros <= 1 << FIRST_OCTAVE {
        return 0;
    }
    // Integer part by leading zeros, the eighth by comparing with the seven inner bounds: no libm
    // call on the request path.
    let octave = 63 - micros.leading_zeros();
    let scaled = if octave >= 16 { micros >> (octave - 16) } else { micros << (16 - octave) };
    let eighth = BOUNDS.iter().filter(|bound| scaled > **bound).count();
    // Buckets are (lower, upper]: an exact power of two belongs to the bucket that it closes.
    let exact = scaled == 1 << 16 && micros.is_power_of_two();
    let index = (octave - FIRST_OCTAVE) as usize * 8 + eighth;
    (if exact { index.saturating_sub(1) } else { index }).min(BUCKETS - 1)
}

/// 2^16 · 2^(k/8) for k in 1..8.
const BOUNDS: [u64; 7] = [71_468, 77_936, 84_990, 92_682, 101_070, 110_217, 120_193];

/// A histogram of latencies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    sum_micros: u64,
}

impl Histogram {
    /// Counts one latency.
    pub fn record(&mut self, micros: u64) {
        self.add(bucket_of(micros), 1);
        self.sum_micros = self.sum_micros.saturating_add(micros);
    }

    /// Adds `count` observations to a bucket; buckets past the last count as the last.
    pub fn add(&mut self, bucket: usize, count: u64) {
        let bucket = bucket.min(BUCKETS - 1);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        if let Some(slot) = self.counts.get_mut(bucket) {
            *slot = slot.saturating_add(count);
        }
    }

    /// Adds to the sum of all latencies.
    pub fn add_sum(&mut self, micros: u64) {
        self.sum_micros = self.sum_micros.saturating_add(micros);
    }

    /// Adds another histogram to this one.
    pub fn merge(&mut self, other: &Self) {
        // Exactly as much room as is needed: the operator keeps thousands of them.
        let length = other.counts.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        if let Some(more) = length.checked_sub(self.counts.len()) {
            self.counts.reserve_exact(more);
        }
        for (bucket, count) in other.buckets() {
            self.add(bucket, count);
        }
        self.add_sum(other.sum_micros);
    }

    /// How many latencies were counted.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The sum of all latencies in microseconds.
    pub fn sum_micros(&self) -> u64 {
        self.sum_micros
    }

    /// The non-empty buckets, ascending.
    pub fn buckets(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.counts.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    /// The latency in microseconds that a fraction `q` (0..=1) of observations does not exceed: the
    /// geometric middle of its bucket. `None` while empty.
    pub fn quantile(&self, q: f64) -> Option<f64> {
        let total = self.count();
        if total == 0 {
            return None;
        }
        let rank = ((total as f64) * q.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        self.buckets().find_map(|(bucket, count)| {
            seen += count;
            (seen >= rank).then(|| ((bucket as f64 + 0.5) / 8.0 + f64::from(FIRST_OCTAVE)).exp2())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_latency_lies_within_its_bucket(micros in 65u64..60_000_000) {
            let bucket = bucket_of(micros);
            if bucket < BUCKETS - 1 {
                let upper = upper_bound_micros(bucket);
                let lower = upper_bound_micros(bucket) / 0.125f64.exp2();
                // The integer bounds are rounded: one part in 65,536.
                prop_assert!(micros as f64 <= upper * 1.0001, "{micros} > {upper}");
                prop_assert!(micros as f64 >= lower * 0.9999, "{micros} < {lower}");
            }
        }

        #[test]
        fn a_thousand_merged_parts_equal_the_whole(values in proptest::collection::vec(0u64..10_000_000, 1..1000)) {
            let (mut whole, mut merged) = (Histogram::default(), Histogram::default());
            for value in &values {
                whole.record(*value);
                let mut part = Histogram::default();
                part.record(*value);
                merged.merge(&part);
            }
            prop_assert_eq!(whole, merged);
        }
    }

    #[test]
    fn quantiles_are_within_the_promised_error() {
        let mut histogram = Histogram::default();
        (1..=100_000u64).for_each(|v| histogram.record(v));
        for q in [0.5, 0.9, 0.99] {
            let seen = histogram.quantile(q).unwrap();
            let exact = 100_000.0 * q;
            assert!((seen / exact - 1.0).abs() < 0.045, "p{q}: {seen} for {exact}");
        }
    }
}
