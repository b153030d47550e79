//! Aggregates of what sidecars report. Each report counts once, whichever replica it came through.
//!
//! In: reports. Out: sums per destination for `/metrics`, and attempts per Canary for the rollout driver, which takes
//! them ([`Aggregates::take_attempts`]). Bounded in memory, because names come from sidecars.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

use tulle_mesh::histogram::Histogram;
use tulle_mesh::proto::{AttemptCounts, TelemetryReport};

use crate::model::Key;

/// Entries that are kept for a Canary until the driver takes them, one per epoch, revision and pod.
const MAX_ATTEMPTS: usize = 4096;
/// Canaries whose attempts are kept. A sidecar may report Canaries that do not exist.
const MAX_CANARIES: usize = 4096;
/// Numbers in the buckets of one entry: pairs of bucket and count.
const MAX_BUCKETS: usize = 2 * tulle_mesh::histogram::BUCKETS;

/// Requests and failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of requests.
    pub requests: u64,
    /// How many of those requests failed.
    pub failures: u64,
}

/// A revision of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Revision of the pods; empty for pods without one.
    pub revision: String,
}

/// Sums since this replica started.
#[derive(Debug, Default)]
pub struct Aggregates {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Sequence number of the last report, by pod uid and sidecar process.
    last: HashMap<(String, u64), u64>,
    destinations: HashMap<Destination, (Counts, Histogram)>,
    refused: BTreeMap<(&'static str, &'static str), u64>,
    attempts: HashMap<Key, Attempts>,
}

/// Attempts at the pods of one Canary, by epoch, revision and pod.
type Attempts = HashMap<(u64, String, String), AttemptCounts>;

impl Inner {
    fn add_attempts(&mut self, counts: &AttemptCounts) {
        let key: Key = (counts.namespace.as_str().into(), counts.canary.as_str().into());
        if !self.attempts.contains_key(&key) && self.attempts.len() >= MAX_CANARIES {
            return;
        }
        let of_canary = self.attempts.entry(key).or_default();
        let full = of_canary.len() >= MAX_ATTEMPTS;
        let id = (counts.epoch, counts.revision.clone(), counts.pod_uid.clone());
        match of_canary.entry(id) {
            Entry::Occupied(mut known) => merge(known.get_mut(), counts),
            Entry::Vacant(free) if !full => {
                let mut first = AttemptCounts {
                    attempts: 0,
                    failures: 0,
                    unreached: 0,
                    client_errors: 0,
                    buckets: Vec::new(),
                    ..counts.clone()
                };
                merge(&mut first, counts);
                free.insert(first);
            }
            Entry::Vacant(_) => {}
        }
    }
}

/// Adds counts to a sum with the same key. Failures and client errors are capped at the number of attempts.
fn merge(sum: &mut AttemptCounts, counts: &AttemptCounts) {
    let failures = counts.failures.min(counts.attempts);
    sum.attempts = sum.attempts.saturating_add(counts.attempts);
    sum.failures = sum.failures.saturating_add(failures);
    sum.unreached = sum.unreached.saturating_add(counts.unreached.min(failures));
    sum.client_errors = sum.client_errors.saturating_add(counts.client_errors.min(counts.attempts));
    for pair in counts.buckets.chunks_exact(2) {
        let [bucket, count] = pair else { continue };
        let full = sum.buckets.len() >= MAX_BUCKETS;
        let known = sum.buckets.chunks_exact_mut(2).find(|known| known.first() == Some(bucket));
        if let Some(total) = known.and_then(|known| known.last_mut()) {
            *total = total.saturating_add(*count);
        } else if !full {
            sum.buckets.extend([*bucket, *count]);
        }
    }
}

impl Aggregates {
    /// Adds a report of a pod's sidecar. Returns whether it was new: a replay is dropped.
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
        for counts in &report.attempts {
            inner.add_attempts(counts);
        }
        true
    }

    /// Takes the attempts at the pods of a Canary that were reported since the last call.
    pub fn take_attempts(&self, canary: &Key) -> Vec<AttemptCounts> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.attempts.remove(canary).map(|counts| counts.into_values().collect()).unwrap_or_default()
    }

    /// Removes the attempts of Canaries that are not `known`.
    pub fn retain_canaries(&self, known: impl Fn(&Key) -> bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.attempts.retain(|key, _| known(key));
    }

    /// Removes the sums of pods and revisions that no longer exist: `pod` is given a uid, `revision` a namespace and a
    /// name. Called every few minutes; the driver has taken what it needs by then.
    pub fn retain(&self, pod: impl Fn(&str) -> bool, revision: impl Fn(&str, &str) -> bool) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.last.retain(|(uid, _), _| pod(uid));
        inner.destinations.retain(|d, _| d.revision.is_empty() || revision(&d.namespace, &d.revision));
    }

    /// Counts a call that the operator has refused.
    pub fn refused(&self, what: &'static str, reason: &'static str) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        *inner.refused.entry((what, reason)).or_default() += 1;
    }

    /// Refused calls by kind of call and reason, for `/metrics`.
    pub fn refusals(&self) -> Vec<((&'static str, &'static str), u64)> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.refused.iter().map(|(key, count)| (*key, *count)).collect()
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
        let report = TelemetryReport {
            sequence: 1,
            process: 7,
            counts: vec![counts],
            interval_ms: 1000,
            attempts: Vec::new(),
        };
        assert!(aggregates.add("pod", &report));
        assert!(!aggregates.add("pod", &report), "through another replica");
        assert!(
            aggregates.add("pod", &TelemetryReport { process: 8, ..report }),
            "the sidecar was restarted"
        );
        let counted: Vec<Counts> = aggregates.all().into_iter().map(|(_, counts, _)| counts).collect();
        assert_eq!(counted, [Counts { requests: 10, failures: 2 }]);
        aggregates.retain(|_| false, |_, _| false);
        assert!(aggregates.all().is_empty(), "sums of a revision that no longer exists are removed");
    }

    #[test]
    fn attempts_are_merged_by_pod_until_they_are_asked_for_once() {
        let aggregates = Aggregates::default();
        let attempts = AttemptCounts {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch: 2,
            revision: "b".into(),
            pod_uid: "b-0".into(),
            attempts: 4,
            failures: 9,
            buckets: vec![3, 4],
            ..AttemptCounts::default()
        };
        for process in [1, 2] {
            let report = TelemetryReport {
                sequence: 1,
                process,
                attempts: vec![attempts.clone()],
                ..TelemetryReport::default()
            };
            aggregates.add("client", &report);
        }
        let key: Key = ("shop".into(), "web".into());
        let taken = aggregates.take_attempts(&key);
        let taken: Vec<_> = taken.iter().map(|c| (c.attempts, c.failures, c.buckets.clone())).collect();
        assert_eq!(taken, [(8, 8, vec![3, 8])], "no more can fail than were attempted");
        assert_eq!(aggregates.take_attempts(&key), []);
    }

    #[test]
    fn a_sidecar_cannot_fill_the_memory_with_names() {
        let aggregates = Aggregates::default();
        let attempts = (0..MAX_ATTEMPTS + 50).map(|n| AttemptCounts {
            namespace: "shop".into(),
            canary: "web".into(),
            pod_uid: n.to_string(),
            attempts: 1,
            ..AttemptCounts::default()
        });
        let report =
            TelemetryReport { sequence: 1, attempts: attempts.collect(), ..TelemetryReport::default() };
        aggregates.add("client", &report);
        let key: Key = ("shop".into(), "web".into());
        assert_eq!(aggregates.take_attempts(&key).len(), MAX_ATTEMPTS);
        aggregates.add("client", &TelemetryReport { sequence: 2, ..report });
        aggregates.retain_canaries(|_| false);
        assert_eq!(aggregates.take_attempts(&key), []);
    }
}
