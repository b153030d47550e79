//! How many retries a backend has coming to it. A retry is paid for when it is decided, before its back-off: what waits
//! counts already, so that a hundred requests that fail at once do not all come back together.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// What a backend may spend before it has earned anything.
const START: f64 = 2.0;
/// The most that is saved.
const CAP: f64 = 10.0;
/// A client that sends little has a retry at least so often, in the whole sidecar: one per second and sidecar would be
/// more than all first attempts, where many sidecars send little.
const FLOOR: Duration = Duration::from_secs(10);

/// The retries of one backend: a share of each first attempt.
#[derive(Debug)]
pub(super) struct Budget {
    tokens: Cell<f64>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { tokens: Cell::new(START) }
    }
}

/// When this worker has made a retry last, to whatever backend.
#[derive(Debug, Default)]
pub(super) struct LastRetry(Cell<Option<Instant>>);

impl LastRetry {
    /// The last one was made then.
    pub(super) fn at(at: Instant) -> Self {
        Self(Cell::new(Some(at)))
    }
}

impl Budget {
    /// A first attempt is made that earns so much of a retry.
    pub(super) fn deposit(&self, share: f64) {
        self.tokens.set((self.tokens.get() + share).min(CAP));
    }

    /// Whether a retry may be made; it is paid for.
    pub(super) fn withdraw(&self, last: &LastRetry, now: Instant) -> bool {
        let tokens = self.tokens.get();
        // Sums of 0.2 are not exact.
        let pays = tokens > 1.0 - 1e-9;
        let has_waited = || last.0.get().is_none_or(|at| now.duration_since(at) >= FLOOR);
        if pays {
            self.tokens.set((tokens - 1.0).max(0.0));
        } else if !has_waited() {
            return false;
        }
        last.0.set(Some(now));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_down_gets_a_quarter_more_requests_at_most() {
        let start = Instant::now();
        for per_second in [1u32, 4, 100] {
            let (budget, last) = (Budget::default(), LastRetry::default());
            let (mut first, mut retries) = (0u32, 0u32);
            for number in 0..per_second * 60 {
                first += 1;
                budget.deposit(0.2);
                let now = start + Duration::from_secs_f64(f64::from(number) / f64::from(per_second));
                // As often as the attempts of one request allow.
                retries += u32::from(budget.withdraw(&last, now)) + u32::from(budget.withdraw(&last, now));
            }
            assert!(retries * 4 <= first, "{retries} of {first}");
            assert!(retries * 6 >= first, "{retries} of {first}: nothing is retried");
        }
    }

    #[test]
    fn who_sends_little_has_one_retry_in_ten_seconds_and_no_more() {
        let (budget, last, start) = (Budget::default(), LastRetry::default(), Instant::now());
        let spend = |budget: &Budget, at| budget.withdraw(&last, start + Duration::from_secs(at));
        assert!(spend(&budget, 0) && spend(&budget, 0), "what it starts with");
        assert_eq!(
            [1, 9, 10, 11, 19, 20].map(|at| spend(&budget, at)),
            [false, false, true, false, false, true]
        );
        let other = Budget { tokens: Cell::new(0.0) };
        assert!(!spend(&other, 21), "the floor is that of all backends together");
    }

    #[test]
    fn what_is_saved_in_good_times_is_bounded() {
        let (budget, last, now) = (Budget::default(), LastRetry::default(), Instant::now());
        (0..10_000).for_each(|_| budget.deposit(0.2));
        let spent = (0..100).filter(|_| budget.withdraw(&last, now)).count();
        assert_eq!(spent, 10);
    }
}
