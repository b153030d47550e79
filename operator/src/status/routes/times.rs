//! Time from a change of a route to the last acknowledgement of it, as a histogram.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Upper bounds of the buckets, in seconds. The aim is 0.2 s at p99.
const BOUNDS: [f64; 11] = [0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, f64::INFINITY];

/// Counts changes of routes by the time that they took to reach all sidecars.
#[derive(Debug, Default)]
pub struct AcknowledgeTimes {
    counted: Mutex<Times>,
}

/// A snapshot of a histogram.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Times {
    /// Sum of all times in seconds.
    pub sum: f64,
    /// Number of changes.
    pub count: u64,
    counts: [u64; BOUNDS.len()],
}

impl AcknowledgeTimes {
    /// Counts one change.
    pub fn observe(&self, took: Duration) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = took.as_secs_f64();
        counted.sum += seconds;
        counted.count += 1;
        let bucket = BOUNDS.iter().position(|bound| seconds <= *bound);
        if let Some(count) = bucket.and_then(|bucket| counted.counts.get_mut(bucket)) {
            *count += 1;
        }
    }

    /// What was counted so far.
    pub fn snapshot(&self) -> Times {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Times {
    /// Upper bound of each bucket in seconds, and the number of changes in it alone.
    pub fn buckets(&self) -> Vec<(f64, u64)> {
        BOUNDS.into_iter().zip(self.counts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_the_bucket_that_it_fits() {
        let times = AcknowledgeTimes::default();
        for millis in [5, 10, 150, 60_000] {
            times.observe(Duration::from_millis(millis));
        }
        let seen = times.snapshot();
        assert_eq!(seen.count, 4);
        assert!((seen.sum - 60.165).abs() < 1e-9);
        let buckets = seen.buckets();
        let counts: Vec<u64> = buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        assert!(buckets[10].0.is_infinite());
    }
}
