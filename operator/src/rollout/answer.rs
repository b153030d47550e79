//! What the judge decides by, as the query API answers it and the page shows it. No clock, no I/O.

use tulle_crds::{AttemptTotals, Canary, CanaryStatus, CanaryVerdict, Phase};
use tulle_mesh::query;

use super::evidence::PodAttempts;
use super::input::{JudgeInput, judged};
use super::judge::{Progress, Rules, Side, progress};
use crate::model::Key;

/// The answer for a Canary. `name`: of the pod with a uid; `input`: what the judge gets besides the status; `leads`: this
/// replica lets it decide.
pub fn evidence(
    name: impl Fn(&str) -> Option<String>,
    key: &Key,
    canary: &Canary,
    input: &JudgeInput,
    leads: bool,
) -> query::Evidence {
    let initial = CanaryStatus::default();
    let status = canary.status.as_ref().unwrap_or(&initial);
    let rules = Rules::of(&canary.spec.judge);
    let evidence = judged(status, &input.blocks(), &rules);
    let mut pods: Vec<query::PodAttempts> = input.pods.iter().map(|pod| of_pod(&name, pod)).collect();
    pods.sort_by(|a, b| (&a.version, &a.name).cmp(&(&b.version, &b.name)));
    query::Evidence {
        namespace: key.0.to_string(),
        name: key.1.to_string(),
        leader: leads,
        epoch: status.epoch,
        blocks: evidence.blocks,
        block_start: input.since.map(|since| since.as_second()),
        canary: of_version(&status.canary_revision, &evidence.canary),
        stable: of_version(stable_revision(status), &evidence.stable),
        pods,
        tests: progress(&evidence, &rules).into_iter().map(of_test).collect(),
        verdict: match status.verdict {
            CanaryVerdict::NotJudged => String::new(),
            verdict => format!("{verdict:?}"),
        },
        because: status.evidence_summary.clone(),
    }
}

/// The revision that the one on trial is compared with; empty: none.
fn stable_revision(status: &CanaryStatus) -> &str {
    match status.phase {
        Phase::Progressing | Phase::Paused | Phase::Failed => status.approved_revision.as_str(),
        Phase::Promoting => status.former_revision.as_str(),
        // The counts are those of the last rollout, whose revisions the status does not name any more.
        Phase::Waiting | Phase::Stable => "",
    }
}

fn of_version(revision: &str, totals: &AttemptTotals) -> query::VersionAttempts {
    query::VersionAttempts {
        revision: revision.to_owned(),
        attempts: totals.attempts,
        failures: totals.failures,
        unreached: totals.unreached,
        client_errors: totals.client_errors,
    }
}

fn of_pod(name: impl Fn(&str) -> Option<String>, pod: &PodAttempts) -> query::PodAttempts {
    let totals = &pod.block.totals;
    let millis = |q: f64| pod.block.latency.quantile(q).map(|micros| micros / 1000.0);
    query::PodAttempts {
        // A pod that has gone since is still evidence.
        name: name(&pod.uid).unwrap_or_else(|| pod.uid.clone()),
        version: match pod.block.side {
            Side::Canary => "canary",
            Side::Stable => "stable",
        }
        .to_owned(),
        revision: pod.revision.clone(),
        attempts: totals.attempts,
        failures: totals.failures,
        unreached: totals.unreached,
        client_errors: totals.client_errors,
        p50_ms: millis(0.5),
        p95_ms: millis(0.95),
        p99_ms: millis(0.99),
    }
}

fn of_test(test: Progress) -> query::EvidenceTest {
    query::EvidenceTest {
        name: test.name.to_owned(),
        odds: test.odds,
        certain: test.certain,
        blocks: test.blocks,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tulle_crds::Evidence;

    use super::*;
    use crate::discovery::Acknowledgement;
    use crate::model::tests::{canary, pod, shop};
    use crate::model::{Model, PodSeen, WorkloadSeen};
    use crate::rollout::input::JudgeInputs;
    use crate::rollout::input::tests::{at, in_progress, key, report};
    use crate::rollout::machine::{self, Observation};
    use crate::telemetry::Aggregates;

    fn named(model: &Model) -> impl Fn(&str) -> Option<String> {
        move |uid| model.pod(uid).map(|pod| pod.name.to_string())
    }

    /// What the driver gives to the machine.
    fn observation(input: &JudgeInput) -> Observation {
        let ready = |name: &str, revision: &str| PodSeen {
            uid: format!("uid-{name}").into(),
            name: name.to_owned(),
            revision: revision.to_owned(),
            containers_ready: true,
            ready: true,
            ..PodSeen::default()
        };
        let target = WorkloadSeen {
            replicas: 2,
            progress_deadline: 600,
            latest: Some("r2".to_owned()),
            pods: vec![ready("old", "r1"), ready("new", "r2")],
            services: vec!["web".to_owned()],
        };
        Observation {
            now: at(10),
            generation: 1,
            namespace: "shop".into(),
            name: "web".into(),
            target: Some(target),
            paused: false,
            acknowledged: Acknowledgement::Complete,
            block: input.blocks(),
            block_ended: input.block_ended,
            obstacles: Vec::new(),
            clientless: false,
            failing: None,
            undo_forbidden: false,
            action: None,
            conflict: None,
        }
    }

    #[test]
    fn what_is_answered_is_what_the_machine_decides_by() {
        let model = shop(&[pod("old", "10.1.0.1", "r1"), pod("new", "10.1.0.2", "r2")]);
        let (aggregates, inputs) = (Aggregates::default(), JudgeInputs::default());
        let mut canary = in_progress();
        let before = CanaryStatus { evidence: Evidence::default(), ..canary.status.take().unwrap() };
        canary.status = Some(before.clone());
        report(&aggregates, 1, &[("uid-new", "r2", 25, 25), ("uid-old", "r1", 400, 1)]);
        inputs.take(&aggregates, &key(), &canary, at(0), true);
        let taken = inputs.take(&aggregates, &key(), &canary, at(10), true);

        let answered = evidence(named(&model), &key(), &canary, &inputs.read(&key(), &canary, at(10)), true);
        let (decided, _) = machine::next(&canary.spec, &before, &observation(&taken));

        assert_eq!((before.phase, decided.phase), (Phase::Progressing, Phase::Failed));
        assert!(decided.evidence_summary.contains("failed every one of its 25"), "{decided:?}");
        // The status has the evidence by which it was decided, the block included.
        let version = |version: &query::VersionAttempts| (version.attempts, version.failures);
        assert_eq!(version(&answered.canary), (25, 25));
        assert_eq!(answered.canary, of_version("r2", &decided.evidence.canary));
        assert_eq!(answered.stable, of_version("r1", &decided.evidence.stable));
        let rules = Rules::of(&canary.spec.judge);
        let tests: Vec<_> = progress(&decided.evidence, &rules).into_iter().map(of_test).collect();
        assert_eq!(answered.tests, tests);
        assert_ne!(tests, progress(&before.evidence, &rules).into_iter().map(of_test).collect::<Vec<_>>());
    }

    #[test]
    fn pods_are_named_and_those_of_the_new_version_come_first() {
        let model = shop(&[pod("b", "10.1.0.2", "r2"), pod("a", "10.1.0.1", "r2")]);
        let (aggregates, inputs, canary) = (Aggregates::default(), JudgeInputs::default(), in_progress());
        report(
            &aggregates,
            1,
            &[
                ("uid-gone", "r1", 400, 1),
                ("uid-b", "r2", 7, 2),
                ("uid-a", "r2", 9, 9),
                ("uid-c", "r0", 5, 0),
            ],
        );
        let input = inputs.take(&aggregates, &key(), &canary, at(7), true);
        let answered = evidence(named(&model), &key(), &canary, &input, true);
        let pods = answered.pods.iter().map(|pod| {
            (pod.name.as_str(), pod.version.as_str(), pod.revision.as_str(), pod.attempts, pod.failures)
        });
        let wanted =
            [("a", "canary", "r2", 9, 9), ("b", "canary", "r2", 7, 2), ("uid-gone", "stable", "r1", 400, 1)];
        assert_eq!(pods.collect::<Vec<_>>(), wanted, "a revision of neither version is no evidence");
        let latencies: Vec<_> = answered.pods.iter().map(|pod| pod.p99_ms.is_some()).collect();
        assert_eq!(latencies, [false, true, true], "nothing answered has no latency");
        assert_eq!((answered.epoch, answered.blocks, answered.block_start), (3, 4, Some(7)));
        assert_eq!((answered.canary.attempts, answered.stable.attempts), (116, 1300));
        assert_eq!(answered.verdict, "Inconclusive");
        assert_eq!(answered.because, "99 more requests to the canary are needed");
    }

    #[test]
    fn a_canary_that_was_never_judged_has_no_verdict_and_no_revision() {
        let never = evidence(|_| None, &key(), &canary(json!(null)), &JudgeInput::default(), false);
        assert_eq!((never.verdict.as_str(), never.canary.revision.as_str(), never.leader), ("", "", false));
        assert!(never.tests.iter().all(|test| test.odds.is_none() && test.certain > 1.0), "{never:?}");
    }
}
