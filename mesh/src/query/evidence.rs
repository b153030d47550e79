//! What is answered about the evidence of a Canary.

use serde::{Deserialize, Serialize};

/// What the judge of a Canary decides by, at present.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Evidence {
    /// The Canary's namespace.
    pub namespace: String,
    /// The Canary's name.
    pub name: String,
    /// Whether the replica that answers leads. Only the leader has the block that is running and its pods; another replica
    /// answers with what was last written to the status.
    pub leader: bool,
    /// The version of the shares that sidecars choose pods by. Attempts of another epoch are not evidence.
    pub epoch: u64,
    /// Blocks of ten seconds that have ended in this rollout, or in the last one.
    pub blocks: u64,
    /// When the running block began, in Unix seconds; `None`: none is running.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_start: Option<i64>,
    /// Attempts at the new version in this rollout, the running block included.
    pub canary: VersionAttempts,
    /// The same of the stable version, over the same seconds.
    pub stable: VersionAttempts,
    /// Attempts at each pod in the running block, by version and name.
    pub pods: Vec<PodAttempts>,
    /// The comparisons that may fail or hold the rollout, the running block included.
    pub tests: Vec<EvidenceTest>,
    /// The last verdict: `Undecided`, `Pass`, `Fail`, `Inconclusive` or `FailedBefore`; empty: nothing was judged. It and
    /// its sentence are written to the status every few seconds, so the counts may be newer.
    pub verdict: String,
    /// Why, as a sentence.
    pub because: String,
}

/// Attempts at the pods of one version.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VersionAttempts {
    /// Its revision; empty: no rollout is in progress.
    pub revision: String,
    /// Attempts, without those at pods in their warm-up.
    pub attempts: u64,
    /// Of these: 5xx, gRPC server errors, resets, and those without an answer.
    pub failures: u64,
    /// Of the failures: those that did not reach the application.
    pub unreached: u64,
    /// Attempts that were answered with 4xx. They are not failures.
    pub client_errors: u64,
}

/// Attempts at one pod in the running block.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodAttempts {
    /// The pod's name; of one that has gone, its uid.
    pub name: String,
    /// `canary` or `stable`.
    pub version: String,
    /// Its revision.
    pub revision: String,
    /// As in [`VersionAttempts`].
    pub attempts: u64,
    /// As in [`VersionAttempts`].
    pub failures: u64,
    /// As in [`VersionAttempts`].
    pub unreached: u64,
    /// As in [`VersionAttempts`].
    pub client_errors: u64,
    /// Time to the head of the answer, in milliseconds; `None`: none was answered.
    pub p50_ms: Option<f64>,
    /// The same.
    pub p95_ms: Option<f64>,
    /// The same.
    pub p99_ms: Option<f64>,
}

/// How far a comparison has come.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EvidenceTest {
    /// `errors`, `alone`, `latency`, `latencyP90`, `clientErrors`, `successRate` or `p99`.
    pub name: String,
    /// Odds that the new version is worse, to 1, up to 10^12; `None`: nothing was compared.
    pub odds: Option<f64>,
    /// The odds at which the judge is certain.
    pub certain: f64,
    /// Blocks of ten seconds since the first that was compared.
    pub blocks: u32,
}
