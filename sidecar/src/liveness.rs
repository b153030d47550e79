//! Whether every data thread still serves: each leaves a sign of life with its housekeeping, every five seconds.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A thread that has given no sign of life for this long is stuck. Six times the interval: a node that is short of CPU
/// is no reason to end the pod's connections.
const STUCK: Duration = Duration::from_secs(30);

/// The last sign of life of each data thread.
#[derive(Debug)]
pub struct Heartbeats {
    start: Instant,
    /// Seconds after `start`.
    last: Vec<AtomicU64>,
}

impl Heartbeats {
    /// For so many threads, all alive now.
    pub fn new(threads: usize) -> Self {
        Self { start: Instant::now(), last: (0..threads).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A thread is alive now.
    pub fn beat(&self, thread: usize) {
        if let Some(last) = self.last.get(thread) {
            last.store(self.start.elapsed().as_secs(), Ordering::Relaxed);
        }
    }

    /// The first thread that is stuck, and for how long it has been.
    pub fn stuck(&self) -> Option<(usize, Duration)> {
        self.stuck_at(self.start.elapsed())
    }

    fn stuck_at(&self, now: Duration) -> Option<(usize, Duration)> {
        let silent = |last: &AtomicU64| now.saturating_sub(Duration::from_secs(last.load(Ordering::Relaxed)));
        self.last.iter().map(silent).enumerate().find(|(_, silent)| *silent > STUCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_without_a_sign_of_life_for_half_a_minute_is_stuck() {
        let beats = Heartbeats::new(2);
        assert_eq!(beats.stuck_at(Duration::from_secs(30)), None);
        assert_eq!(beats.stuck_at(Duration::from_secs(31)), Some((0, Duration::from_secs(31))));
        beats.last[0].store(20, Ordering::Relaxed);
        assert_eq!(beats.stuck_at(Duration::from_secs(45)), Some((1, Duration::from_secs(45))));
        beats.last[1].store(20, Ordering::Relaxed);
        assert_eq!(beats.stuck_at(Duration::from_secs(45)), None);
    }
}
