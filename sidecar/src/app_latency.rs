//! How long the pod's application takes for the head of an answer, averaged over time and over all clients of a data
//! thread. Other sidecars are told, and balance by it: a client that sends one request a second learns from all others.
//! What was seen long ago fades to nothing: a pod that was slow when it started, and that nobody sends anything to since,
//! gets another chance.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// What was seen this long ago counts a third of what is seen now. That of the balancers in clients.
const MEMORY: Duration = Duration::from_secs(10);

/// After this long without an answer nothing is reported.
const GONE: Duration = Duration::from_secs(60);

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

    /// The average in microseconds, less and less of it once no answer has come for [`MEMORY`]. `None`: there has been no
    /// answer for a minute.
    pub fn micros(&self, now: Instant) -> Option<u32> {
        let Average { micros, at } = self.0.get()?;
        let age = now.saturating_duration_since(at);
        let left = GONE.checked_sub(age).filter(|left| !left.is_zero())?;
        let share = left.as_secs_f64() / (GONE - MEMORY).as_secs_f64();
        // A cast of a float saturates.
        Some((micros * share.min(1.0)) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_follows_what_is_seen_within_its_memory() {
        let (latency, start) = (AppLatency::default(), Instant::now());
        assert_eq!(latency.micros(start), None);
        latency.note(Duration::from_millis(10), false, start);
        assert_eq!(latency.micros(start), Some(10_000));
        // Many answers at once weigh no more than one.
        for _ in 0..1000 {
            latency.note(Duration::from_millis(100), false, start);
        }
        assert_eq!(latency.micros(start), Some(10_000));
        latency.note(Duration::from_millis(100), false, start + MEMORY);
        let after = latency.micros(start + MEMORY).unwrap();
        assert!((66_000..68_000).contains(&after), "two thirds of the way: {after}");
    }

    #[test]
    fn a_fast_failure_does_not_make_a_pod_fast_and_a_slow_one_makes_it_slow() {
        let (latency, start) = (AppLatency::default(), Instant::now());
        latency.note(Duration::from_micros(5), true, start);
        assert_eq!(latency.micros(start), None);
        latency.note(Duration::from_millis(10), false, start);
        latency.note(Duration::from_millis(1), true, start + MEMORY);
        assert_eq!(latency.micros(start + MEMORY), Some(10_000));
        latency.note(Duration::from_millis(20), true, start + MEMORY);
        assert!(latency.micros(start + MEMORY) > Some(15_000));
    }

    #[test]
    fn without_requests_the_average_fades_to_nothing_within_a_minute() {
        let (latency, start) = (AppLatency::default(), Instant::now());
        latency.note(Duration::from_secs(2), false, start);
        let after = |seconds: u64| latency.micros(start + Duration::from_secs(seconds));
        assert_eq!([0, 10, 35].map(after), [Some(2_000_000), Some(2_000_000), Some(1_000_000)]);
        assert!(after(59) < Some(50_000));
        assert_eq!([60, 3600].map(after), [None; 2]);
    }
}
