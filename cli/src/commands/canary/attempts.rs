//! What the judge has at present, by version and pod: `canary status -o wide`.
//!
//! The Canary's status has neither pods nor the block that is running, so the operator is asked. Without an answer the
//! status is shown all the same, and the reason on standard error.

use tulle_mesh::query::{Evidence, Paths, VersionAttempts};

use super::dash;
use crate::cluster::Context;
use crate::exit::{CliError, note};
use crate::human;
use crate::output::{Table, write};

/// Asks the operator and prints the answer below the status.
pub(super) async fn print(context: &Context, namespace: &str, name: &str) -> Result<(), CliError> {
    match ask(context, namespace, name).await {
        Ok(evidence) => write(&format!("\n{}", text(&evidence))),
        Err(error) => {
            note(&format!("attempts by pod are not shown, because the operator gave no answer: {error}"));
            Ok(())
        }
    }
}

async fn ask(context: &Context, namespace: &str, name: &str) -> Result<Evidence, CliError> {
    let operator = context.operator().await?;
    operator.get(Paths::EVIDENCE, &[("namespace", namespace), ("canary", name)]).await
}

/// What is counted, a table, and what it leaves out.
pub(super) fn text(evidence: &Evidence) -> String {
    let caption = "Attempts in the rollout by version, and in the running block of ten seconds by pod:";
    let mut text = format!("{caption}\n{}", table(evidence));
    if !evidence.leader {
        text.push_str(
            "This replica of the operator does not lead: attempts as the Canary's status has them.\n",
        );
    } else if evidence.block_start.is_some() && evidence.pods.is_empty() {
        text.push_str("No attempt counts in the running block of ten seconds so far.\n");
    }
    text
}

/// Versions with the counts of the rollout, and below each its pods with those of the running block.
fn table(evidence: &Evidence) -> Table {
    let mut rows = Vec::new();
    for (version, totals) in [("stable", &evidence.stable), ("canary", &evidence.canary)] {
        rows.push(row_of_version(version, totals));
        let pods: Vec<_> = evidence.pods.iter().filter(|pod| pod.version == version).collect();
        for (index, pod) in pods.iter().enumerate() {
            let branch = if index + 1 == pods.len() { "└─" } else { "├─" };
            let mut row = vec![format!("{branch} {}", pod.name), dash(pod.revision.clone())];
            row.extend([pod.attempts, pod.failures, pod.unreached, pod.client_errors].map(exact));
            row.extend([pod.p50_ms, pod.p95_ms, pod.p99_ms].map(human::millis));
            rows.push(row);
        }
    }
    let headers =
        vec!["VERSION / POD", "REVISION", "ATTEMPTS", "FAILED", "UNREACHED", "4XX", "P50", "P95", "P99"];
    Table { headers, rows }
}

fn row_of_version(version: &str, totals: &VersionAttempts) -> Vec<String> {
    let mut row = vec![version.to_owned(), dash(totals.revision.clone())];
    row.extend([totals.attempts, totals.failures, totals.unreached, totals.client_errors].map(exact));
    // The judge keeps no latencies of blocks that have ended.
    row.extend([None; 3].map(human::millis));
    row
}

/// Not rounded: the judge's sentence above has the same numbers.
fn exact(count: u64) -> String {
    count.to_string()
}
