//! Counters of one peer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tulle_mesh::histogram::{BUCKETS, bucket_of};
use tulle_mesh::reason::Reason;

use super::SeriesKey;
use crate::error::Failure;
use crate::grpc::is_server_error;

/// Counters of one series.
#[derive(Debug)]
pub struct Series {
    /// What distinguishes it.
    pub key: Arc<SeriesKey>,
    /// By class of status: 1xx to 5xx, then gRPC server errors, no answer, and given up by the client.
    pub by_class: [AtomicU64; 8],
    /// Latencies, exponential buckets.
    pub latency: Box<[AtomicU64]>,
    /// Their sum in microseconds.
    pub latency_sum: AtomicU64,
    /// Bytes of requests.
    pub bytes_up: AtomicU64,
    /// Bytes of answers.
    pub bytes_down: AtomicU64,
    /// Connections, where the content is opaque.
    pub connections: AtomicU64,
    /// Attempts beyond the first of each request.
    pub retries: AtomicU64,
    /// Ejections of endpoints by the breaker.
    pub ejections: AtomicU64,
    failures: Mutex<HashMap<&'static str, u64>>,
    /// Whether this counts the peers for which the table has no room.
    pub(super) is_overflow: bool,
    /// Whether this counts nothing.
    is_off: bool,
}

/// The class of what had no answer.
pub const CLASS_NONE: usize = 6;
/// The class of what its client gave up or got wrong, or what the server's sidecar denied it: it says nothing about the
/// server.
pub const CLASS_CLIENT: usize = 7;
/// The class of gRPC server errors (`UNKNOWN`, `DEADLINE_EXCEEDED`, `INTERNAL`, `UNAVAILABLE`,
/// `DATA_LOSS`), whose HTTP status is 200.
pub const CLASS_GRPC: usize = 5;

impl Series {
    /// A series that has counted nothing.
    pub fn new(key: Arc<SeriesKey>) -> Self {
        Self {
            key,
            by_class: Default::default(),
            latency: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            latency_sum: AtomicU64::new(0),
            bytes_up: AtomicU64::new(0),
            bytes_down: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            ejections: AtomicU64::new(0),
            failures: Mutex::default(),
            is_overflow: false,
            is_off: false,
        }
    }

    /// The series of peers for which the table has no room.
    pub(super) fn overflow(key: Arc<SeriesKey>) -> Self {
        Self { is_overflow: true, ..Self::new(key) }
    }

    /// A series that counts nothing: its key still names the peer of a request to a tap.
    pub(super) fn off(key: Arc<SeriesKey>) -> Self {
        Self { is_off: true, ..Self::new(key) }
    }

    /// Counts a request.
    pub fn request(
        &self,
        result: &Result<u16, Failure>,
        grpc: Option<u16>,
        took: Duration,
        bytes: (u64, u64),
    ) {
        if self.is_off {
            return;
        }
        let class = match result {
            Ok(_) if grpc.is_some_and(is_server_error) => CLASS_GRPC,
            Ok(status) => usize::from(status / 100).clamp(1, 5) - 1,
            Err(failure) => {
                self.failure(failure);
                if failure.is_of_client() { CLASS_CLIENT } else { CLASS_NONE }
            }
        };
        self.ended(class, took, bytes);
    }

    /// Counts a request that the server's sidecar answered itself. What was a failure of the server by its status is one
    /// without it; a denial is not one, because alerts on failures would name a server that was not asked.
    pub fn refused(&self, reason: Reason, took: Duration, bytes: (u64, u64)) {
        if self.is_off {
            return;
        }
        self.reason(reason);
        let says_nothing_of_server = matches!(
            reason,
            Reason::ClientBadRequest
                | Reason::ClientHeadTooLong
                | Reason::ClientGone
                | Reason::PolicyDenied
                | Reason::PolicyPlaintext
        );
        self.ended(if says_nothing_of_server { CLASS_CLIENT } else { CLASS_NONE }, took, bytes);
    }

    fn ended(&self, class: usize, took: Duration, bytes: (u64, u64)) {
        if let Some(counter) = self.by_class.get(class) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.latency.get(bucket_of(micros)) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        self.latency_sum.fetch_add(micros, Ordering::Relaxed);
        self.bytes(bytes);
    }

    /// Counts the attempts beyond the first of a request that is counted next.
    pub fn retried(&self, attempts: u64) {
        if attempts > 0 && !self.is_off {
            self.retries.fetch_add(attempts, Ordering::Relaxed);
        }
    }

    /// Counts that the breaker ejected one of the endpoints.
    pub fn ejected(&self) {
        self.ejections.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a connection whose content is opaque.
    pub fn connection(&self, failure: Option<&Failure>, bytes: (u64, u64)) {
        if self.is_off {
            return;
        }
        if let Some(failure) = failure {
            self.failure(failure);
        }
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.bytes(bytes);
    }

    /// Counts a failure by its name.
    pub fn failure(&self, failure: &Failure) {
        self.reason(failure.reason());
    }

    fn reason(&self, reason: Reason) {
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner).entry(reason.name()).or_default() += 1;
    }

    /// Failures by name.
    pub fn failures(&self) -> Vec<(&'static str, u64)> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.iter().map(|(name, count)| (*name, *count)).collect()
    }

    /// A number that changes with every request, connection and ejection, after their reasons and retries are counted.
    pub(super) fn activity(&self) -> u64 {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Self { connections, latency_sum, bytes_up, bytes_down, ejections, .. } = self;
        let others = [connections, latency_sum, bytes_up, bytes_down, ejections];
        self.by_class.iter().chain(others).map(read).fold(0, u64::wrapping_add)
    }

    fn bytes(&self, (up, down): (u64, u64)) {
        self.bytes_up.fetch_add(up, Ordering::Relaxed);
        self.bytes_down.fetch_add(down, Ordering::Relaxed);
    }
}

/// The series of one peer by protocol and route, each made when it is first used: few peers have more than one.
#[derive(Debug, Default)]
pub struct PeerSeries(RefCell<Vec<Used>>);

#[derive(Debug)]
struct Used {
    protocol: &'static str,
    route: Option<Arc<str>>,
    series: Arc<Series>,
}

/// Series of one peer that are kept at hand. What is kept at hand is never dropped from the table, and routes come and
/// go: beyond, all are looked up anew.
const MAX_USED: usize = 16;

impl PeerSeries {
    /// The series of a protocol and of the route whose rule took the request; `None`: no rule did.
    pub fn get(
        &self,
        protocol: &'static str,
        route: Option<&Arc<str>>,
        make: impl FnOnce() -> Arc<Series>,
    ) -> Arc<Series> {
        let is_wanted = |used: &&Used| used.protocol == protocol && used.route.as_ref() == route;
        if let Some(used) = self.0.borrow().iter().find(is_wanted) {
            return Arc::clone(&used.series);
        }
        let series = make();
        // There may be room for a series of its own by the next request.
        if series.is_overflow {
            return series;
        }
        let mut all = self.0.borrow_mut();
        if all.len() >= MAX_USED {
            all.clear();
        }
        all.push(Used { protocol, route: route.cloned(), series: Arc::clone(&series) });
        series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_servers_sidecar_refuses_is_counted_at_the_client_under_its_reason() {
        for (failure, class) in [
            (Failure::PolicyDenied, CLASS_CLIENT),
            (Failure::PolicyPlaintext, CLASS_CLIENT),
            (Failure::OursOverloaded, CLASS_NONE),
            (Failure::DeadlineExceeded, CLASS_NONE),
            (Failure::UpstreamBadResponse("a length"), CLASS_NONE),
            (Failure::ClientBadRequest("a header"), CLASS_CLIENT),
        ] {
            let series = Series::new(Arc::new(SeriesKey::outbound("shop", "web", "", "http1")));
            series.refused(failure.reason(), Duration::ZERO, (1, 2));
            let mut classes = [0; 8];
            classes[class] = 1;
            let counted = series.by_class.each_ref().map(|count| count.load(Ordering::Relaxed));
            assert_eq!((counted, series.failures()), (classes, vec![(failure.name(), 1)]));
            // 5xx, or no answer: what alerts take for a failure of the server is what they took for one.
            assert_eq!(class == CLASS_NONE, failure.status() >= 500, "{failure:?}");
        }
        let off = Series::off(Arc::new(SeriesKey::outbound("shop", "web", "", "http1")));
        off.refused(Reason::PolicyDenied, Duration::ZERO, (1, 2));
        assert_eq!((off.activity(), off.failures()), (0, Vec::new()));
    }
}
