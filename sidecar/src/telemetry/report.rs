//! Deltas for the operator: numbered, one under way at a time, sent again until acknowledged.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tulle_mesh::proto::{RequestCounts, TelemetryReport};

use super::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, SeriesKey, Telemetry};

/// Makes reports of what has changed since the last one.
#[derive(Debug)]
pub struct Reporter {
    telemetry: Arc<Telemetry>,
    process: u64,
    sequence: u64,
    sent: HashMap<SeriesKey, Counts>,
    under_way: Option<TelemetryReport>,
    /// Looks since it was sent.
    looks: u32,
    resend: bool,
}

/// Looks without an acknowledgement after which a report goes again: the leader may have changed while it
/// was on its way.
const RESEND_AFTER: u32 = 5;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    requests: u64,
    failures: u64,
    sum_micros: u64,
    buckets: Vec<u64>,
}

impl Reporter {
    /// A reporter for this process.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        Self {
            telemetry,
            process: fastrand::u64(1..),
            sequence: 0,
            sent: HashMap::new(),
            under_way: None,
            looks: 0,
            resend: false,
        }
    }

    /// The stream is new: what was under way goes again, under its number.
    pub fn reconnected(&mut self) {
        self.resend = true;
    }

    /// The operator has counted a report.
    pub fn acknowledged(&mut self, sequence: u64) {
        if self.under_way.as_ref().is_some_and(|report| report.sequence == sequence) {
            self.under_way = None;
        }
    }

    /// Whether everything that was sent has been counted by the operator.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_none()
    }

    /// The next report, if there is anything to say and nothing is under way.
    pub fn next_report(&mut self) -> Option<TelemetryReport> {
        if let Some(report) = &self.under_way {
            self.looks += 1;
            let again = std::mem::take(&mut self.resend) || self.looks.is_multiple_of(RESEND_AFTER);
            return again.then(|| report.clone());
        }
        self.looks = 0;
        self.resend = false;
        let mut counts = Vec::new();
        for (key, series) in self.telemetry.all() {
            // Each request is reported once: by the side that sent it.
            if key.direction != "outbound" {
                continue;
            }
            let read = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
            let class = |index: usize| series.by_class.get(index).map_or(0, read);
            let now = Counts {
                requests: (0..CLASS_CLIENT).map(class).sum(),
                failures: class(4) + class(CLASS_GRPC) + class(CLASS_NONE),
                sum_micros: read(&series.latency_sum),
                buckets: series.latency.iter().map(read).collect(),
            };
            let before = self.sent.entry(key.clone()).or_default();
            if now.requests != before.requests {
                counts.push(delta(&key, before, &now));
                *before = now;
            }
        }
        if counts.is_empty() {
            return None;
        }
        self.sequence += 1;
        let report =
            TelemetryReport { sequence: self.sequence, process: self.process, counts, interval_ms: 1_000 };
        self.under_way = Some(report.clone());
        Some(report)
    }
}

fn delta(key: &SeriesKey, before: &Counts, now: &Counts) -> RequestCounts {
    let old = before.buckets.iter().chain(std::iter::repeat(&0));
    let changed = now.buckets.iter().zip(old).enumerate().filter(|(_, (now, old))| now > old);
    RequestCounts {
        namespace: key.namespace.clone(),
        service: key.peer.clone(),
        revision: key.revision.clone(),
        requests: now.requests.saturating_sub(before.requests),
        failures: now.failures.saturating_sub(before.failures),
        buckets: changed.flat_map(|(bucket, (now, old))| [bucket as u64, now - old]).collect(),
        sum_micros: now.sum_micros.saturating_sub(before.sum_micros),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn deltas_add_up_to_the_counters_whatever_is_lost_on_the_way() {
        let telemetry = Arc::new(Telemetry::default());
        let series = telemetry.outbound("shop", "web", "a", "http1");
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        let first = reporter.next_report().unwrap();
        series.request(&Ok(500), None, Duration::from_millis(1), (0, 0));
        assert!(reporter.next_report().is_none(), "one at a time");
        let later: Vec<_> = (0..RESEND_AFTER).filter_map(|_| reporter.next_report()).collect();
        assert_eq!(later, std::slice::from_ref(&first), "again, in case nobody who leads has seen it");
        reporter.reconnected();
        assert_eq!(reporter.next_report().unwrap(), first, "the same again, under its number");
        reporter.acknowledged(first.sequence);
        let second = reporter.next_report().unwrap();
        assert_eq!((second.counts[0].requests, second.counts[0].failures), (1, 1));
        reporter.acknowledged(second.sequence);
        assert!(reporter.next_report().is_none());
    }
}
