//! What the judge decides by, as the query API answers it and the page shows it. No clock, no I/O.

use tulle_crds::{AttemptTotals, Canary, CanaryStatus, CanaryVerdict, Phase};
use tulle_mesh::query;

use super::evidence::PodAttempts;
use super::input::{JudgeInput, judged};
use super::judge::{Progress, Rules, Side, progress};
use crate::model::{Key, Model};

/// The answer for a Canary. `input`: what the judge gets besides the status; `leads`: this replica lets it decide.
pub fn evidence(
    model: &Model,
    key: &Key,
    canary: &Canary,
    input: &JudgeInput,
    leads: bool,
) -> query::Evidence {
    let initial = CanaryStatus::default();
    let status = canary.status.as_ref().unwrap_or(&initial);
    let rules = Rules::of(&canary.spec.judge);
    let evidence = judged(status, &input.blocks(), &rules);
    let mut pods: Vec<query::PodAttempts> = input.pods.iter().map(|pod| of_pod(model, pod)).collect();
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

fn of_pod(model: &Model, pod: &PodAttempts) -> query::PodAttempts {
    let totals = &pod.block.totals;
    let millis = |q: f64| pod.block.latency.quantile(q).map(|micros| micros / 1000.0);
    query::PodAttempts {
        // A pod that has gone since is still evidence.
        name: model.pod(&pod.uid).map_or_else(|| pod.uid.clone(), |known| known.name.to_string()),
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
