//! How long the pod's application takes for the head of an answer, averaged over time and over all clients of a data
//! thread. Other sidecars are told, and balance by it: a client that sends one request a second learns from all others.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// What was seen this long ago counts a third of what is seen now. That of the balancers in clients.
const MEMORY: Duration = Duration::from_secs(10);

/// An exponentially weighted moving average.
#[derive(Debug, Default)]
pub struct AppLatency(Cell<Option<Average>>);

#[derive(Clone, Copy, Debug)]
struct Average {
    micros: f64,
    at: Instant,
}

impl AppLatency {
    /// Takes an answer's latency. A failure never lowers the average: a pod that fails fast would look fast.
    pub fn note(&self, latency: Duration, failed: bool, now: Instant) {
        let micros = latency.as_secs_f64() * 1e6;
        let before = self.0.get();
        let next = match before {
            None if failed => return,
            Some(average) if failed && micros < average.micros => return,
            None => micros,
            Some(average) => {
                let elapsed = now.saturating_duration_since(average.at).as_secs_f64();
                let weight = 1.0 - (-elapsed / MEMORY.as_secs_f64()).exp();
                average.micros + (micros - average.micros) * weight
            }
        };
        self.0.set(Some(Average { micros: next, at: now }));
    }

    /// The average in microseconds; `None` before the first answer.
    pub fn micros(&self) -> Option<u32> {
        // A cast of a float saturates.
        self.0.get().map(|average| average.micros as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_what_is_seen_within_its_memory() {
        let (latency, start) = (AppLatency::default(), Instant::now());
        assert_eq!(latency.micros(), None);
        latency.note(Duration::from_millis(10), false, start);
        assert_eq!(latency.micros(), Some(10_000));
        // Many answers at once weigh no more than one.
        for _ in 0..1000 {
            latency.note(Duration::from_millis(100), false, start);
        }
        assert_eq!(latency.micros(), Some(10_000));
        latency.note(Duration::from_millis(100), false, start + MEMORY);
        let after = latency.micros().unwrap();
        assert!((66_000..68_000).contains(&after), "two thirds of the way: {after}");
    }

    #[test]
    fn a_fast_failure_does_not_make_a_pod_fast_and_a_slow_one_makes_it_slow() {
        let (latency, start) = (AppLatency::default(), Instant::now());
        latency.note(Duration::from_micros(5), true, start);
        assert_eq!(latency.micros(), None);
        latency.note(Duration::from_millis(10), false, start);
        latency.note(Duration::from_millis(1), true, start + MEMORY);
        assert_eq!(latency.micros(), Some(10_000));
        latency.note(Duration::from_millis(20), true, start + MEMORY);
        assert!(latency.micros() > Some(15_000));
    }
}
