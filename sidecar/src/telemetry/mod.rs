//! What is counted: one table of series, read by `/metrics` and by the reports to the operator.
//!
//! No label comes from the wire: services, revisions and namespaces come from the operator, methods
//! and hosts are no labels. Handles are resolved when a route is built, not per request.

pub mod attempts;
pub mod prometheus;
pub mod report;

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tulle_mesh::histogram::{BUCKETS, bucket_of};

use crate::error::Failure;
use attempts::{AttemptKey, AttemptTable, Attempts};

/// Series beyond this many are counted as one, named `_OTHER`.
const MAX_SERIES: usize = 2_000;

/// What distinguishes a series.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeriesKey {
    /// `outbound` or `inbound`.
    pub direction: &'static str,
    /// Namespace of the peer: the destination's, or the client's.
    pub namespace: String,
    /// The destination Service, or the client's service account.
    pub peer: String,
    /// The destination's revision, or this pod's.
    pub revision: String,
    /// `http1`, `http2` or `opaque`.
    pub protocol: &'static str,
}

/// Counters of one series.
#[derive(Debug)]
pub struct Series {
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
    failures: Mutex<HashMap<&'static str, u64>>,
}

/// The class of what had no answer.
pub const CLASS_NONE: usize = 6;
/// The class of what its client gave up or got wrong: it says nothing about the server.
pub const CLASS_CLIENT: usize = 7;
/// The class of gRPC server errors (`UNKNOWN`, `DEADLINE_EXCEEDED`, `INTERNAL`, `UNAVAILABLE`,
/// `DATA_LOSS`), whose HTTP status is 200.
pub const CLASS_GRPC: usize = 5;

impl Default for Series {
    fn default() -> Self {
        Self {
            by_class: Default::default(),
            latency: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            latency_sum: AtomicU64::new(0),
            bytes_up: AtomicU64::new(0),
            bytes_down: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            failures: Mutex::default(),
        }
    }
}

impl Series {
    /// Counts a request.
    pub fn request(
        &self,
        result: &Result<u16, Failure>,
        grpc: Option<u16>,
        took: Duration,
        bytes: (u64, u64),
    ) {
        let class = match result {
            Ok(_) if matches!(grpc, Some(2 | 4 | 13 | 14 | 15)) => CLASS_GRPC,
            Ok(status) => usize::from(status / 100).clamp(1, 5) - 1,
            Err(failure) => {
                self.failure(failure);
                if failure.is_of_client() { CLASS_CLIENT } else { CLASS_NONE }
            }
        };
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

    /// Counts a connection whose content is opaque.
    pub fn connection(&self, failure: Option<&Failure>, bytes: (u64, u64)) {
        self.connections.fetch_add(1, Ordering::Relaxed);
        if let Some(failure) = failure {
            self.failure(failure);
        }
        self.bytes(bytes);
    }

    /// Counts a failure by its name.
    pub fn failure(&self, failure: &Failure) {
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner).entry(failure.name()).or_default() += 1;
    }

    /// Failures by name.
    pub fn failures(&self) -> Vec<(&'static str, u64)> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.iter().map(|(name, count)| (*name, *count)).collect()
    }

    fn bytes(&self, (up, down): (u64, u64)) {
        self.bytes_up.fetch_add(up, Ordering::Relaxed);
        self.bytes_down.fetch_add(down, Ordering::Relaxed);
    }
}

/// The series of one peer by protocol, made when it is first used: few peers speak more than one.
#[derive(Debug, Default)]
pub struct ByProtocol(RefCell<Vec<(&'static str, Arc<Series>)>>);

impl ByProtocol {
    /// The series of a protocol.
    pub fn get(&self, protocol: &'static str, make: impl FnOnce() -> Arc<Series>) -> Arc<Series> {
        if let Some((_, series)) = self.0.borrow().iter().find(|(of, _)| *of == protocol) {
            return Arc::clone(series);
        }
        let series = make();
        self.0.borrow_mut().push((protocol, Arc::clone(&series)));
        series
    }
}

/// All series of the process, and the counters that have no peer.
#[derive(Debug, Default)]
pub struct Telemetry {
    series: Mutex<HashMap<SeriesKey, Arc<Series>>>,
    events: Mutex<HashMap<(&'static str, &'static str), u64>>,
    /// Attempts under Canaries.
    pub attempts: AttemptTable,
}

impl Telemetry {
    /// The series of requests to a revision of a Service.
    pub fn outbound(
        &self,
        namespace: &str,
        service: &str,
        revision: &str,
        protocol: &'static str,
    ) -> Arc<Series> {
        self.get(SeriesKey {
            direction: "outbound",
            namespace: namespace.to_owned(),
            peer: service.to_owned(),
            revision: revision.to_owned(),
            protocol,
        })
    }

    /// The series of requests from a client.
    pub fn inbound(
        &self,
        namespace: &str,
        account: &str,
        revision: &str,
        protocol: &'static str,
    ) -> Arc<Series> {
        self.get(SeriesKey {
            direction: "inbound",
            namespace: namespace.to_owned(),
            peer: account.to_owned(),
            revision: revision.to_owned(),
            protocol,
        })
    }

    fn get(&self, key: SeriesKey) -> Arc<Series> {
        let mut series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let full = series.len() >= MAX_SERIES && !series.contains_key(&key);
        let key = if full {
            let other = || "_OTHER".to_owned();
            SeriesKey { namespace: other(), peer: other(), revision: other(), ..key }
        } else {
            key
        };
        Arc::clone(series.entry(key).or_default())
    }

    /// Where attempts of a Canary are counted; `None`: too much is counted already, and these are no evidence.
    pub fn attempts_of(&self, key: AttemptKey) -> Option<Arc<Attempts>> {
        let attempts = self.attempts.of(key);
        if attempts.is_none() {
            self.event("evidence_dropped", "TableFull");
        }
        attempts
    }

    /// Counts something that is neither request nor connection: a refused certificate, say.
    pub fn event(&self, kind: &'static str, reason: &'static str) {
        *self.events.lock().unwrap_or_else(PoisonError::into_inner).entry((kind, reason)).or_default() += 1;
    }

    /// Every series, sorted.
    pub fn all(&self) -> Vec<(SeriesKey, Arc<Series>)> {
        let series = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = series.iter().map(|(key, series)| (key.clone(), Arc::clone(series))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }

    /// Every event, sorted.
    pub fn events(&self) -> Vec<((&'static str, &'static str), u64)> {
        let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = events.iter().map(|(key, count)| (*key, *count)).collect();
        all.sort_unstable();
        all
    }
}
