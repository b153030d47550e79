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
