//! A token bucket: limits how often something happens on average and in a burst.

use std::time::Instant;

/// State of one limit.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// A full bucket.
    pub fn new(burst: f64, now: Instant) -> Self {
        Self { tokens: burst, at: now }
    }

    /// Takes a token. Returns whether there was one.
    pub fn take(&mut self, per_second: f64, burst: f64, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = elapsed.mul_add(per_second, self.tokens).min(burst);
        self.at = self.at.max(now);
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }

    /// When [`Self::take`] was called last.
    pub fn last_used(&self) -> Instant {
        self.at
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn after_a_burst_the_rate_holds_and_an_unused_bucket_fills_up_to_the_burst_only() {
        let start = Instant::now();
        let mut bucket = Bucket::new(3.0, start);
        let mut granted = |after: Duration, tries: usize| {
            (0..tries).filter(|_| bucket.take(2.0, 3.0, start + after)).count()
        };
        assert_eq!(granted(Duration::ZERO, 10), 3);
        assert_eq!(granted(Duration::from_millis(600), 10), 1);
        assert_eq!(granted(Duration::from_millis(1100), 10), 1);
        assert_eq!(granted(Duration::from_secs(3600), 10), 3);
    }
}
