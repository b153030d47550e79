//! Deltas for the operator: numbered, one under way at a time, sent again until acknowledged.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::proto::{RequestCounts, TelemetryReport};

use super::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, Series, SeriesKey, Telemetry};

/// Makes reports of what has changed since the last one.
#[derive(Debug)]
pub struct Reporter {
    telemetry: Arc<Telemetry>,
    process: u64,
    sequence: u64,
    sent: HashMap<SeriesKey, Counts>,
    under_way: Option<TelemetryReport>,
    /// When it was sent.
    sent_at: Option<Instant>,
    resend: bool,
    /// When counts are looked at next; `None`: at once.
    due: Option<Instant>,
    /// When counts were looked at last.
    reported_at: Option<Instant>,
    /// When series were looked at last for those of workloads that are gone.
    evicted_at: Option<Instant>,
}

/// How often it is looked whether there are attempts under a Canary to report, or a report is to go again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often other counts are reported, when there are new ones: nobody decides by them.
const COUNTS_EVERY: Duration = Duration::from_secs(5);
/// How often series of workloads that are gone are looked for.
const EVICT_EVERY: Duration = Duration::from_secs(60);
/// Without an acknowledgement for so long a report goes again: the leader may have changed while it was on its
/// way.
const RESEND_AFTER: Duration = Duration::from_secs(5);

/// A time up to a fifth shorter or longer, so that the sidecars of a cluster do not report all at once.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.8 + 0.4 * fastrand::f64())
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    requests: u64,
    failures: u64,
    sum_micros: u64,
    buckets: Vec<u64>,
}

impl Counts {
    fn of(series: &Series) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let class = |index: usize| series.by_class.get(index).map_or(0, read);
        Self {
            requests: (0..CLASS_CLIENT).map(class).sum(),
            failures: class(4) + class(CLASS_GRPC) + class(CLASS_NONE),
            sum_micros: read(&series.latency_sum),
            buckets: series.latency.iter().map(read).collect(),
        }
    }
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
            sent_at: None,
            resend: false,
            due: None,
            reported_at: None,
            evicted_at: None,
        }
    }

    /// How long to wait before the next look.
    pub fn pause() -> Duration {
        jittered(LOOK_EVERY)
    }

    /// The next look reports whatever there is.
    pub fn flush(&mut self) {
        self.due = None;
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

    /// The next report, if there is anything to say and nothing is under way. Attempts under a Canary are said at
    /// once, and all else with them; without any, the rest waits until it is due.
    pub fn next_report(&mut self, now: Instant) -> Option<TelemetryReport> {
        if let Some(report) = &self.under_way {
            let late = self.sent_at.is_none_or(|at| now.duration_since(at) >= RESEND_AFTER);
            if !std::mem::take(&mut self.resend) && !late {
                return None;
            }
            self.sent_at = Some(now);
            return Some(report.clone());
        }
        self.resend = false;
        let attempts = self.telemetry.attempts.take();
        if attempts.is_empty() && self.due.is_some_and(|due| now < due) {
            return None;
        }
        self.due = Some(now + jittered(COUNTS_EVERY));
        let counts = self.counts();
        self.evict(now);
        let since = self.reported_at.replace(now).map_or(LOOK_EVERY, |before| now.duration_since(before));
        if counts.is_empty() && attempts.is_empty() {
            return None;
        }
        self.sequence += 1;
        let report = TelemetryReport {
            sequence: self.sequence,
            process: self.process,
            counts,
            interval_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            attempts,
        };
        self.sent_at = Some(now);
        self.under_way = Some(report.clone());
        Some(report)
    }

    /// Drops the series of workloads that are gone, once the operator has their counts, or they are in the report that
    /// is being made.
    fn evict(&mut self, now: Instant) {
        if self.evicted_at.is_some_and(|at| now.duration_since(at) < EVICT_EVERY) {
            return;
        }
        self.evicted_at = Some(now);
        let sent = &self.sent;
        let is_reported = |key: &SeriesKey, series: &Series| {
            let reported = sent.get(key).map_or(0, |counts| counts.requests);
            key.direction != "outbound" || Counts::of(series).requests == reported
        };
        for key in self.telemetry.evict(now, is_reported) {
            // One that comes back begins at zero.
            self.sent.remove(&key);
        }
    }

    /// What has changed in the series since the last report.
    fn counts(&mut self) -> Vec<RequestCounts> {
        let mut counts = Vec::new();
        for (key, series) in self.telemetry.all() {
            // Each request is reported once: by the side that sent it.
            if key.direction != "outbound" {
                continue;
            }
            let now = Counts::of(&series);
            let before = self.sent.entry(key.clone()).or_default();
            if now.requests != before.requests {
                counts.push(delta(&key, before, &now));
                *before = now;
            }
        }
        counts
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
    use crate::telemetry::attempts::{AttemptKey, Attempts, Seen};

    /// When every count is due, whatever the jitter.
    const LATER: Duration = Duration::from_secs(10);

    fn attempts(telemetry: &Telemetry, epoch: u64) -> Arc<Attempts> {
        let key = AttemptKey {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch,
            revision: "new".into(),
            pod_uid: "pod".into(),
        };
        telemetry.attempts_of(key).unwrap()
    }

    #[test]
    fn deltas_add_up_to_the_counters_whatever_is_lost_on_the_way() {
        let telemetry = Arc::new(Telemetry::default());
        let series = telemetry.outbound("shop", "web", "a", "http1");
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        let mut now = Instant::now();
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        let first = reporter.next_report(now).unwrap();
        series.request(&Ok(500), None, Duration::from_millis(1), (0, 0));
        assert!(reporter.next_report(now).is_none(), "one at a time");
        let looks: Vec<_> = (1..=7).map(|second| now + Duration::from_secs(second)).collect();
        let later: Vec<_> = looks.iter().filter_map(|look| reporter.next_report(*look)).collect();
        assert_eq!(later, std::slice::from_ref(&first), "again, in case nobody who leads has seen it");
        reporter.reconnected();
        now += LATER;
        assert_eq!(reporter.next_report(now).unwrap(), first, "the same again, under its number");
        reporter.acknowledged(first.sequence);
        let second = reporter.next_report(now).unwrap();
        assert_eq!((second.counts[0].requests, second.counts[0].failures), (1, 1));
        reporter.acknowledged(second.sequence);
        assert!(reporter.next_report(now + LATER).is_none());
    }

    #[test]
    fn counts_that_nobody_decides_by_wait_and_attempts_under_a_canary_do_not() {
        let telemetry = Arc::new(Telemetry::default());
        let series = telemetry.outbound("shop", "web", "a", "http1");
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        let now = Instant::now();
        assert!(reporter.next_report(now).is_none(), "nothing has happened");
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        assert!(reporter.next_report(now + Duration::from_secs(3)).is_none());
        attempts(&telemetry, 1).count(Seen::Good, None);
        let both = reporter.next_report(now + Duration::from_secs(3)).unwrap();
        assert_eq!((both.counts.len(), both.attempts.len()), (1, 1));
        reporter.acknowledged(both.sequence);
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        assert!(reporter.next_report(now + Duration::from_secs(6)).is_none());
        let due = reporter.next_report(now + LATER).unwrap();
        assert_eq!((due.counts.len(), due.attempts.len()), (1, 0));
        reporter.acknowledged(due.sequence);
        series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        assert!(reporter.next_report(now + LATER).is_none());
        reporter.flush();
        assert!(reporter.next_report(now + LATER).is_some(), "a stop waits for nothing");
    }

    #[test]
    fn deltas_of_attempts_add_up_and_stay_in_their_epoch() {
        let telemetry = Arc::new(Telemetry::default());
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        let mut now = Instant::now();
        let old = attempts(&telemetry, 1);
        old.count(Seen::Unreached, None);
        let first = reporter.next_report(now).unwrap();
        let seen = |report: &TelemetryReport| -> Vec<_> {
            report.attempts.iter().map(|a| (a.epoch, a.attempts, a.failures, a.unreached)).collect()
        };
        assert_eq!(seen(&first), [(1, 1, 1, 1)]);
        // One was under way when the next epoch came.
        let new = attempts(&telemetry, 2);
        new.count(Seen::Good, Some(Duration::from_millis(1)));
        old.count(Seen::Failed, None);
        drop(old);
        now += RESEND_AFTER;
        assert_eq!(reporter.next_report(now).unwrap(), first, "the same again, without what came later");
        reporter.acknowledged(first.sequence);
        let second = reporter.next_report(now).unwrap();
        let mut both = seen(&second);
        both.sort_unstable();
        assert_eq!(both, [(1, 1, 1, 0), (2, 1, 0, 0)]);
        reporter.acknowledged(second.sequence);
        assert!(reporter.next_report(now).is_none());
    }

    #[test]
    fn a_series_that_was_dropped_and_comes_back_is_reported_from_zero() {
        let telemetry = Arc::new(Telemetry::default());
        let mut reporter = Reporter::new(Arc::clone(&telemetry));
        let mut now = Instant::now();
        let request = || {
            let series = telemetry.outbound("shop", "web", "a", "http1");
            series.request(&Ok(200), None, Duration::from_millis(1), (0, 0));
        };
        request();
        request();
        let report = reporter.next_report(now).unwrap();
        assert_eq!(report.counts[0].requests, 2);
        reporter.acknowledged(report.sequence);
        for _ in 0..12 {
            now += EVICT_EVERY;
            assert!(reporter.next_report(now).is_none());
        }
        assert!(telemetry.all().is_empty(), "unused and reported");
        request();
        let report = reporter.next_report(now + LATER).unwrap();
        assert_eq!(report.counts[0].requests, 1);
    }
}
