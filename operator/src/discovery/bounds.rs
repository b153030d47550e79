//! What of a sidecar's words is taken: whoever holds one certificate must not fill memory, break a label or
//! give evidence about a rollout that it sends nothing to.

use std::collections::HashSet;

use tulle_mesh::histogram::BUCKETS;
use tulle_mesh::proto::TelemetryReport;

/// Requests or attempts that one report may count of a destination: nobody makes a sum that no other can add
/// to.
const MAX_COUNT: u64 = 100_000_000;
/// Series of one report.
const MAX_SERIES: usize = 2_000;
/// Characters of a reason.
const MAX_REASON: usize = 256;
/// Characters of a revision, as of any label value of Kubernetes.
const MAX_REVISION: usize = 63;
/// Characters of a pod's uid.
const MAX_UID: usize = 64;

/// What a sidecar may speak about.
pub(super) struct Subjects<'a> {
    /// Namespace and name that its requests are counted under.
    pub services: HashSet<(&'a str, &'a str)>,
    /// Namespace and name of the Canaries whose shares it was sent.
    pub canaries: HashSet<(&'a str, &'a str)>,
}

/// A reason for a refusal, as it is shown.
pub(super) fn reason(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_REASON).collect()
}

/// A report without what is not believed. Returns how many series were dropped.
pub(super) fn telemetry(report: &mut TelemetryReport, subjects: &Subjects<'_>) -> usize {
    let before = report.counts.len() + report.attempts.len();
    report.counts.retain(|counts| {
        subjects.services.contains(&(counts.namespace.as_str(), counts.service.as_str()))
            && is_revision(&counts.revision)
            && are_buckets(&counts.buckets)
    });
    report.counts.truncate(MAX_SERIES);
    for counts in &mut report.counts {
        // The two are read one after the other.
        counts.requests = counts.requests.min(MAX_COUNT);
        counts.failures = counts.failures.min(counts.requests);
        bound_buckets(&mut counts.buckets);
    }
    report.attempts.retain(|counts| {
        subjects.canaries.contains(&(counts.namespace.as_str(), counts.canary.as_str()))
            && is_revision(&counts.revision)
            && counts.pod_uid.len() <= MAX_UID
            && are_buckets(&counts.buckets)
    });
    report.attempts.truncate(MAX_SERIES.saturating_sub(report.counts.len()));
    for counts in &mut report.attempts {
        counts.attempts = counts.attempts.min(MAX_COUNT);
        counts.failures = counts.failures.min(counts.attempts);
        counts.unreached = counts.unreached.min(counts.failures);
        counts.client_errors = counts.client_errors.min(counts.attempts);
        bound_buckets(&mut counts.buckets);
    }
    before - report.counts.len() - report.attempts.len()
}

/// A value that a label may have; empty: no revision.
fn is_revision(text: &str) -> bool {
    text.len() <= MAX_REVISION
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-'))
}

fn are_buckets(buckets: &[u64]) -> bool {
    let (pairs, rest) = buckets.as_chunks::<2>();
    let known = |bucket: u64| usize::try_from(bucket).is_ok_and(|bucket| bucket < BUCKETS);
    rest.is_empty() && pairs.len() <= BUCKETS && pairs.iter().all(|[bucket, _]| known(*bucket))
}

fn bound_buckets(buckets: &mut [u64]) {
    let (pairs, _) = buckets.as_chunks_mut::<2>();
    for [_, count] in pairs {
        *count = (*count).min(MAX_COUNT);
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::{AttemptCounts, RequestCounts};

    use super::*;

    fn subjects() -> Subjects<'static> {
        Subjects { services: [("shop", "web")].into(), canaries: [("shop", "web")].into() }
    }

    fn attempts(change: impl FnOnce(&mut AttemptCounts)) -> TelemetryReport {
        let mut counts = AttemptCounts {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch: 3,
            revision: "r1".into(),
            pod_uid: "u".into(),
            attempts: 10,
            failures: 2,
            ..Default::default()
        };
        change(&mut counts);
        TelemetryReport { attempts: vec![counts], ..Default::default() }
    }

    #[test]
    fn what_a_sidecar_may_not_say_is_dropped() {
        let changes: [fn(&mut AttemptCounts); 6] = [
            |counts| counts.canary = "other".into(),
            |counts| counts.revision = "a\"b".into(),
            |counts| counts.revision = "a".repeat(64),
            |counts| counts.pod_uid = "a".repeat(65),
            |counts| counts.buckets = vec![160, 1],
            |counts| counts.buckets = vec![1],
        ];
        for change in changes {
            let mut report = attempts(change);
            assert_eq!(telemetry(&mut report, &subjects()), 1, "{report:?}");
            assert!(report.attempts.is_empty());
        }
        let mut good = attempts(|_| {});
        assert_eq!(telemetry(&mut good, &subjects()), 0);
        assert_eq!(good, attempts(|_| {}));
    }

    #[test]
    fn no_count_exceeds_what_it_is_a_part_of() {
        let mut report = attempts(|counts| {
            counts.attempts = u64::MAX;
            counts.failures = u64::MAX;
            counts.unreached = u64::MAX;
            counts.client_errors = u64::MAX;
        });
        telemetry(&mut report, &subjects());
        let counts = report.attempts.first().unwrap();
        assert_eq!((counts.attempts, counts.failures), (MAX_COUNT, MAX_COUNT));
        assert_eq!((counts.unreached, counts.client_errors), (MAX_COUNT, MAX_COUNT));
    }

    #[test]
    fn a_report_has_a_bounded_number_of_series() {
        let series = RequestCounts { namespace: "shop".into(), service: "web".into(), ..Default::default() };
        let mut report = TelemetryReport { counts: vec![series; 3000], ..attempts(|_| {}) };
        assert_eq!(telemetry(&mut report, &subjects()), 1001);
        assert_eq!(report.counts.len() + report.attempts.len(), MAX_SERIES);
    }

    #[test]
    fn a_reason_is_short_and_on_one_line() {
        assert_eq!(reason("too\nnew\u{1b}[31m"), "toonew[31m");
        assert_eq!(reason(&"ä".repeat(1000)).chars().count(), 256);
    }
}
