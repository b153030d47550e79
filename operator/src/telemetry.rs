//! What sidecars report, aggregated: each report counts once, whichever replica it came through.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use tulle_mesh::histogram::Histogram;
use tulle_mesh::proto::TelemetryReport;

/// Requests and failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Of them failed.
    pub failures: u64,
}

/// A revision of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Its namespace.
    pub namespace: String,
    /// The Service.
    pub service: String,
    /// The revision.
    pub revision: String,
}

/// What has been reported since this replica started.
#[derive(Debug, Default)]
pub struct Aggregates {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// The last report of each sidecar process.
    last: HashMap<(String, u64), u64>,
    destinations: HashMap<Destination, (Counts, Histogram)>,
    refused: BTreeMap<(&'static str, &'static str), u64>,
}

impl Aggregates {
    /// Counts a report of a pod's sidecar. Returns whether it was new: a replay is dropped.
    pub fn add(&self, pod_uid: &str, report: &TelemetryReport) -> bool {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let last = inner.last.entry((pod_uid.to_owned(), report.process)).or_default();
        if report.sequence <= *last {
            return false;
        }
        *last = report.sequence;
        for counts in &report.counts {
            let destination = Destination {
                namespace: counts.namespace.clone(),
                service: counts.service.clone(),
                revision: counts.revision.clone(),
            };
            let (total, latency) = inner.destinations.entry(destination).or_default();
            total.requests = total.requests.saturating_add(counts.requests);
            total.failures = total.failures.saturating_add(counts.failures);
            for pair in counts.buckets.chunks_exact(2) {
                if let [bucket, count] = pair {
                    latency.add(usize::try_from(*bucket).unwrap_or(usize::MAX), *count);
                }
            }
            latency.add_sum(counts.sum_micros);
        }
        true
    }

    /// Forgets what is about pods and revisions that are no more: `pod` by its uid, `revision` by
    /// namespace and name. Called now and then; what has been asked for was asked for while they were.
    pub fn retain(&self, pod: impl Fn(&str) -> bool, revision: impl Fn(&str, &str) -> bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.last.retain(|(uid, _), _| pod(uid));
        inner.destinations.retain(|d, _| d.revision.is_empty() || revision(&d.namespace, &d.revision));
    }

    /// Counts something that the operator has refused.
    pub fn refused(&self, what: &'static str, reason: &'static str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        *inner.refused.entry((what, reason)).or_default() += 1;
    }

    /// What has been refused, and why, for `/metrics`.
    pub fn refusals(&self) -> Vec<((&'static str, &'static str), u64)> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.refused.iter().map(|(key, count)| (*key, *count)).collect()
    }

    /// Everything counted for a revision, over all Services of its namespace.
    pub fn revision(&self, namespace: &str, revision: &str) -> Counts {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let matching =
            inner.destinations.iter().filter(|(d, _)| d.namespace == namespace && d.revision == revision);
        matching.fold(Counts::default(), |sum, (_, (counts, _))| Counts {
            requests: sum.requests.saturating_add(counts.requests),
            failures: sum.failures.saturating_add(counts.failures),
        })
    }

    /// All destinations, for `/metrics`.
    pub fn all(&self) -> Vec<(Destination, Counts, Histogram)> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner
            .destinations
            .iter()
            .map(|(d, (counts, latency))| (d.clone(), *counts, latency.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tulle_mesh::proto::RequestCounts;

    #[test]
    fn a_report_that_comes_twice_counts_once() {
        let aggregates = Aggregates::default();
        let counts = RequestCounts {
            namespace: "shop".into(),
            service: "web".into(),
            revision: "a".into(),
            requests: 5,
            failures: 1,
            buckets: vec![3, 5],
            sum_micros: 9,
        };
        let report = TelemetryReport { sequence: 1, process: 7, counts: vec![counts], interval_ms: 1000 };
        assert!(aggregates.add("pod", &report));
        assert!(!aggregates.add("pod", &report), "through another replica");
        assert!(
            aggregates.add("pod", &TelemetryReport { process: 8, ..report }),
            "the sidecar was restarted"
        );
        assert_eq!(aggregates.revision("shop", "a"), Counts { requests: 10, failures: 2 });
        assert_eq!(aggregates.revision("shop", "b"), Counts::default());
        aggregates.retain(|_| false, |_, _| false);
        assert!(aggregates.all().is_empty(), "of a revision that is no more nothing is kept");
    }
}
