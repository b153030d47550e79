//! How many retries there may be. A retry is paid for when it is decided, before its back-off: what waits counts
//! already, so that a hundred requests that fail at once do not all come back together.
//!
//! A backend earns a share of each first attempt, in each data thread by itself, so that the sum over threads is that
//! of the sidecar. What nobody has earned is [`SidecarRetries`], once for all backends and threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

/// What a sidecar may spend before it has earned anything: both retries of one request.
const START: u32 = 2;
/// The most that a sidecar saves for a backend.
const CAP: f64 = 10.0;
/// A client that sends little has a retry at least so often, in the whole sidecar: one per second and sidecar would be
/// more than all first attempts, where many sidecars send little.
const FLOOR: Duration = Duration::from_secs(10);

/// The retries of one backend: a share of each first attempt.
#[derive(Debug, Default)]
pub(super) struct Budget {
    tokens: Cell<f64>,
}

/// Retries that nobody has earned, of a whole sidecar: all its data threads have the same one.
#[derive(Debug)]
pub struct SidecarRetries {
    /// The most that one data thread saves for a backend.
    cap: f64,
    enforced: Unearned,
    /// The same for policies that are only tried: they spend nothing of the others.
    shadow: Unearned,
}

impl Default for SidecarRetries {
    fn default() -> Self {
        Self::of_workers(1)
    }
}

impl SidecarRetries {
    /// Of a sidecar with so many data threads.
    pub fn of_workers(workers: usize) -> Self {
        // One retry is the least that can be spent.
        let cap = (CAP / workers.max(1) as f64).max(1.0);
        Self { cap, enforced: Unearned::default(), shadow: Unearned::default() }
    }

    pub(super) fn cap(&self) -> f64 {
        self.cap
    }

    pub(super) fn enforced(&self) -> &Unearned {
        &self.enforced
    }

    pub(super) fn shadow(&self) -> &Unearned {
        &self.shadow
    }
}

/// Retries without a first attempt that pays for them.
#[derive(Debug)]
pub(super) struct Unearned {
    /// What is left of the start.
    start: AtomicU32,
    /// Since when `last` counts.
    since: Instant,
    /// When any retry was made last, in milliseconds; 0: never.
    last: AtomicU64,
}

impl Default for Unearned {
    fn default() -> Self {
        Self { start: AtomicU32::new(START), since: Instant::now(), last: AtomicU64::new(0) }
    }
}

impl Unearned {
    /// Whether a retry may be made that was not earned; it is taken then.
    fn take(&self, now: Instant) -> bool {
        let one_less = |left: u32| left.checked_sub(1);
        if self.start.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            self.note(now);
            return true;
        }
        let now = self.milliseconds(now);
        let has_waited = |last: u64| u128::from(now.saturating_sub(last)) >= FLOOR.as_millis();
        // Threads that ask at the same time get one together.
        let next = |last: u64| (last == 0 || has_waited(last)).then_some(now);
        self.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }

    /// A retry is made.
    fn note(&self, now: Instant) {
        self.last.fetch_max(self.milliseconds(now), Ordering::Relaxed);
    }

    fn milliseconds(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.since).as_millis();
        u64::try_from(passed).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl Budget {
    /// A first attempt is made that earns so much of a retry, up to this many.
    pub(super) fn deposit(&self, share: f64, cap: f64) {
        self.tokens.set((self.tokens.get() + share).min(cap));
    }

    /// Whether a retry may be made; it is paid for.
    pub(super) fn withdraw(&self, unearned: &Unearned, now: Instant) -> bool {
        let tokens = self.tokens.get();
        // Sums of 0.2 are not exact.
        if tokens <= 1.0 - 1e-9 {
            return unearned.take(now);
        }
        self.tokens.set((tokens - 1.0).max(0.0));
        unearned.note(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_is_down_gets_a_quarter_more_requests_at_most() {
        for per_second in [1u32, 4, 100] {
            let (budget, unearned, start) = (Budget::default(), Unearned::default(), Instant::now());
            let (mut first, mut retries) = (0u32, 0u32);
            for number in 0..per_second * 60 {
                first += 1;
                budget.deposit(0.2, CAP);
                let now = start + Duration::from_secs_f64(f64::from(number) / f64::from(per_second));
                // As often as the attempts of one request allow.
                retries +=
                    u32::from(budget.withdraw(&unearned, now)) + u32::from(budget.withdraw(&unearned, now));
            }
            assert!(retries * 4 <= first, "{retries} of {first}");
            assert!(retries * 6 >= first, "{retries} of {first}: nothing is retried");
        }
    }

    #[test]
    fn who_sends_little_has_one_retry_in_ten_seconds_and_no_more() {
        let (budget, unearned, start) = (Budget::default(), Unearned::default(), Instant::now());
        let spend = |budget: &Budget, at| budget.withdraw(&unearned, start + Duration::from_secs(at));
        assert!(spend(&budget, 0) && spend(&budget, 0), "what it starts with");
        assert_eq!(
            [1, 9, 10, 11, 19, 20].map(|at| spend(&budget, at)),
            [false, false, true, false, false, true]
        );
        assert!(!spend(&Budget::default(), 21), "it is that of all backends together, as is the start");
    }

    #[test]
    fn what_is_saved_in_good_times_is_bounded() {
        let (budget, unearned, now) = (Budget::default(), Unearned::default(), Instant::now());
        (0..10_000).for_each(|_| budget.deposit(0.2, CAP));
        let spent = (0..100).filter(|_| budget.withdraw(&unearned, now)).count();
        assert_eq!(spent, 12, "ten that were saved, and what a sidecar starts with");
    }

    #[test]
    fn all_threads_of_a_sidecar_together_have_what_one_has() {
        let (all, start) = (SidecarRetries::of_workers(4), Instant::now());
        let threads: Vec<Budget> = (0..4).map(|_| Budget::default()).collect();
        let spent = |at| {
            let now = start + Duration::from_secs(at);
            threads.iter().filter(|budget| budget.withdraw(all.enforced(), now)).count()
        };
        assert_eq!([0, 5, 11, 12, 22].map(spent), [2, 0, 1, 0, 1]);
        for budget in &threads {
            (0..1_000).for_each(|_| budget.deposit(0.2, all.cap()));
        }
        let saved: f64 = threads.iter().map(|budget| budget.tokens.get()).sum();
        assert!((saved - CAP).abs() < 1e-6, "{saved}");
        assert!(all.shadow().take(start), "what is only tried spends nothing of it, and has its own");
    }
}
