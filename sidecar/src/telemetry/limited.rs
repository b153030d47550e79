//! Rate limit of log lines: a client that is refused a thousand times a second must not make the data thread
//! write a thousand lines.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// How many events of a kind may be logged, or shown, per second.
///
/// Meant for a `static` beside the log line, shared by all threads; a tap limits so what it shows. It costs two atomic
/// operations and no lock.
#[derive(Debug)]
pub struct Limited {
    per_second: u32,
    /// The current second in the upper half, the lines of that second in the lower.
    window: AtomicU64,
    suppressed: AtomicU64,
}

impl Limited {
    /// At most `per_second` lines in each second.
    pub const fn new(per_second: u32) -> Self {
        Self { per_second, window: AtomicU64::new(0), suppressed: AtomicU64::new(0) }
    }

    /// Whether a line may be written now. `Some` holds how many were suppressed since the last one, to be logged with
    /// it.
    pub fn allow(&self) -> Option<u64> {
        static START: OnceLock<Instant> = OnceLock::new();
        let elapsed = START.get_or_init(Instant::now).elapsed().as_secs();
        // From 1: second 0 is that of a limit that was never asked.
        self.allow_in(u32::try_from(elapsed).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// The same in the second with this number, from 1 on.
    pub(crate) fn allow_in(&self, second: u32) -> Option<u64> {
        let first = (u64::from(second) << 32) | 1;
        let mut seen = self.window.load(Ordering::Relaxed);
        loop {
            let lines = seen & u64::from(u32::MAX);
            // A thread that was held up between the clock and here does not begin an earlier second anew.
            let next = if seen >> 32 < u64::from(second) {
                first
            } else if lines < u64::from(self.per_second) {
                seen + 1
            } else {
                self.suppressed.fetch_add(1, Ordering::Relaxed);
                return None;
            };
            match self.window.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(self.suppressed.swap(0, Ordering::Relaxed)),
                Err(current) => seen = current,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_limit_are_counted_and_reported_with_the_next_one() {
        let limit = Limited::new(2);
        assert_eq!(limit.allow_in(1), Some(0));
        assert_eq!(limit.allow_in(1), Some(0));
        for _ in 0..5 {
            assert_eq!(limit.allow_in(1), None);
        }
        assert_eq!(limit.allow_in(2), Some(5));
        assert_eq!(limit.allow_in(2), Some(0), "each is reported once");
        assert_eq!(limit.allow_in(2), None);
        assert_eq!(limit.allow_in(7), Some(1), "seconds without an event do not matter");
        assert_eq!(limit.allow_in(6), Some(0), "a thread that comes late takes of the second that has begun");
        assert_eq!(limit.allow_in(6), None);
        assert_eq!(limit.allow_in(7), None);
    }

    #[test]
    fn threads_share_one_limit() {
        static LIMIT: Limited = Limited::new(10);
        let threads: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(|| (0..100).filter_map(|_| LIMIT.allow_in(1)).collect::<Vec<u64>>()))
            .collect();
        let allowed: Vec<u64> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        assert_eq!(allowed.len(), 10);
        // Others may be refused between a thread's permission and its look at how many were.
        let told: u64 = allowed.iter().sum();
        assert_eq!(LIMIT.allow_in(2), Some(390 - told));
    }

    #[test]
    fn the_first_line_of_a_process_is_written() {
        assert_eq!(Limited::new(1).allow(), Some(0));
    }
}
