//! Canary: how a new version of a workload earns its traffic.

use std::cmp::Ordering;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::DURATION_PATTERN;

/// A new version of the target gets traffic in steps, is judged against the stable version over the
/// same seconds, and is promoted or stopped. Nothing of the target is renamed, copied or rescaled.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[kube(
    group = "tulle.dev",
    version = "v1alpha1",
    kind = "Canary",
    doc = "Canary rolls out each new version of a workload in steps. The new version gets a growing share of the \
           traffic, is compared with the stable version over the same period, and is promoted or stopped. A Canary \
           never renames, copies or scales the workload.",
    plural = "canaries",
    namespaced,
    status = "CanaryStatus",
    shortname = "cn",
    category = "tulle",
    derive = "PartialEq",
    printcolumn(name = "TARGET", type_ = "string", json_path = ".status.target"),
    printcolumn(name = "PHASE", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "STEP", type_ = "string", json_path = ".status.stepSummary"),
    printcolumn(name = "WEIGHT", type_ = "string", json_path = ".status.weightSummary"),
    printcolumn(name = "VERDICT", type_ = "string", json_path = ".status.verdict"),
    printcolumn(name = "EVIDENCE", type_ = "string", json_path = ".status.evidenceSummary"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.onFailure) || self.onFailure != 'Undo' || self.target.kind == 'Deployment'", "onFailure: Undo is offered for Deployments; write Hold and undo with kubectl rollout undo"))]
pub struct CanarySpec {
    /// The workload whose new versions are tried. Fixed: what is known of one workload's revisions says
    /// nothing about another's.
    #[x_kube(validation = ("self == oldSelf", "the target is fixed: delete this Canary and make one for the other workload"))]
    pub target: CanaryTarget,
    /// What a new version goes through. Default: 1, 5, 10, 25 and 50 % for two minutes each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub steps: Vec<Step>,
    /// When a version is good or bad.
    #[serde(default)]
    pub judge: Judge,
    /// After this long a rollout that is not decided ends as `onFailure` says. Default: 24h.
    #[serde(default = "deadline")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = ("self.matches('[1-9]')", "deadline must be longer than 0s; write for example 24h"))]
    pub deadline: String,
    /// What happens to the pods of a bad version. Hold parks them for a look; Undo restores the
    /// workload's former template.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// How many pods of the new version carry its traffic.
    #[serde(default)]
    pub capacity: Capacity,
}

/// Of several Canaries of one target the first in this order holds it: the oldest.
pub fn by_age(a: &Canary, b: &Canary) -> Ordering {
    let of = |canary: &Canary| (canary.metadata.creation_timestamp.clone(), canary.metadata.name.clone());
    of(a).cmp(&of(b))
}

/// The workload whose new versions are tried.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CanaryTarget {
    /// Deployment, StatefulSet or DaemonSet.
    pub kind: WorkloadKind,
    /// Its name, in the Canary's namespace.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Kinds of workload.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum WorkloadKind {
    Deployment,
    StatefulSet,
    DaemonSet,
}

impl WorkloadKind {
    /// The kind's name in Kubernetes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
        }
    }
}

/// One step: a weight to hold, or a pause until a human goes on.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.weight) != has(self.pause)", "a step is either a weight or a pause: {weight: 5, hold: 2m} or {pause: {}}"))]
#[x_kube(validation = ("!has(self.weight) || self.weight > 0", "weight must be from 1 to 100; to keep the new version without traffic, write {pause: {}} as the first step"))]
#[x_kube(validation = ("!has(self.hold) || has(self.weight)", "hold belongs to a weight"))]
pub struct Step {
    /// Percent of the traffic that the new version gets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub weight: Option<u8>,
    /// For at least this long. Default: 2m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    pub hold: Option<String>,
    /// Until `kubectl annotate canary NAME tulle.dev/action=resume@ID` goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
}

/// A pause has no settings yet: write `{}`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct Pause {}

/// When a version is good or bad.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Judge {
    /// Errors (5xx answers, resets, gRPC server errors) against the stable version.
    pub errors: ErrorJudge,
    /// Requests that the new version must have answered before a step can pass.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_requests: u32,
    /// How sure a verdict must be. At 99% one good version in a hundred is stopped by mistake,
    /// however often the judge looks.
    // Not `x_kube`: KubeSchema cannot be derived for a type with `#[serde(default)]`, whose default would have to
    // be that of the type it generates.
    #[schemars(
        regex(pattern = "^[0-9]+(\\.[0-9]+)?%$"),
        length(max = 16),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('^[0-9]{1,2}([.][0-9]+)?%$') && self.matches('[1-9]')",
            "message": "confidence must be above 0% and below 100%; write for example 99%"
        }])
    )]
    pub confidence: String,
    /// What happens when a step's time is up and the evidence does not decide.
    pub on_inconclusive: OnInconclusive,
}

impl Default for Judge {
    fn default() -> Self {
        Self {
            errors: ErrorJudge::default(),
            min_requests: 200,
            confidence: "99%".to_owned(),
            on_inconclusive: OnInconclusive::Hold,
        }
    }
}

/// Errors against the stable version.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ErrorJudge {
    /// The new version is bad when its error rate is surely more than this many times the stable
    /// version's over the same seconds; at a weight of 100, which leaves nothing to compare with, this many
    /// times 10 percent.
    #[schemars(range(min = 1.0, max = 100.0))]
    pub worse_by: f64,
}

impl Default for ErrorJudge {
    fn default() -> Self {
        Self { worse_by: 1.5 }
    }
}

/// What happens when the evidence does not decide.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum OnInconclusive {
    #[default]
    Hold,
    Promote,
    Rollback,
}

/// What happens to the pods of a bad version.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum OnFailure {
    #[default]
    Hold,
    Undo,
}

/// How many pods of the new version carry its traffic.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Capacity {
    /// A weight needs `ceil(weight × replicas × headroom)` pods of the new version.
    #[schemars(range(min = 0.1, max = 10.0))]
    pub headroom: f64,
    /// Never give up a stable pod: the weight stops at what the surge carries.
    pub keep_stable: bool,
}

impl Default for Capacity {
    fn default() -> Self {
        Self { headroom: 1.0, keep_stable: false }
    }
}

fn deadline() -> String {
    "24h".to_owned()
}

/// Where a rollout stands.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// The target is missing or has no revision yet.
    #[default]
    Waiting,
    /// One revision, approved.
    Stable,
    /// A new revision goes through the steps.
    Progressing,
    /// A step waits for a human.
    Paused,
    /// The new revision is approved; the workload's controller completes the update.
    Promoting,
    /// The new revision was judged bad, aborted or ran out of time; it gets no traffic.
    Failed,
}

/// The judge's verdict on the new revision.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CanaryVerdict {
    /// No rollout has been judged yet. Empty, so that its column is empty.
    #[default]
    #[serde(rename = "")]
    NotJudged,
    /// A rollout has begun; the new revision has no traffic to judge yet.
    Undecided,
    /// Not worse than the stable revision, on enough requests.
    Pass,
    /// Worse than the stable revision.
    Fail,
    /// Too few requests, or worse without enough confidence.
    Inconclusive,
    /// This revision failed before, was undone and came back.
    FailedBefore,
}

/// How a rollout ended.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
pub enum RolloutOutcome {
    /// Every pod has the new revision.
    Promoted,
    /// The new revision was promoted, and its workload's controller did not replace every pod before the deadline.
    PromotionStalled,
    /// The new revision was judged worse, aborted, or ran out of time.
    Failed,
    /// A newer revision came first.
    Superseded,
}

/// What became of a Canary.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct CanaryStatus {
    /// The generation that the rest of the status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The target in one word, such as Deployment/checkout.
    pub target: String,
    /// Where the rollout stands.
    pub phase: Phase,
    /// The revision that carries no gate: everything else is on trial.
    pub approved_revision: String,
    /// The revision that was approved before, while its pods are being replaced: still stable.
    pub former_revision: String,
    /// The revision on trial, or the last that was.
    pub canary_revision: String,
    /// The revision that the last decision was about; another one starts a rollout.
    pub decided_revision: String,
    /// The present step, from 0.
    pub step: u32,
    /// The present step for a column, such as 2/3.
    pub step_summary: String,
    /// The weight that sidecars are told, in percent.
    pub weight: u32,
    /// The weight that every sidecar concerned has acknowledged, in percent.
    pub acknowledged_weight: u32,
    /// The acknowledged weight for a column, such as 25%.
    pub weight_summary: String,
    /// Counts up with every change of a weight; sidecars acknowledge it.
    pub epoch: u64,
    /// Pass, Fail or Inconclusive, Undecided while there is nothing to judge, and FailedBefore for a revision
    /// that was undone and came back.
    pub verdict: CanaryVerdict,
    /// The evidence in one sentence.
    pub evidence_summary: String,
    /// The evidence, so that an operator that starts anew resumes the same test.
    pub evidence: Evidence,
    /// When the rollout began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When the present step began to get its weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_started: Option<Time>,
    /// Since when the revision on trial has no ready pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unready_since: Option<Time>,
    /// Since when what is stable has no pod at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_gone_since: Option<Time>,
    /// The last action that was carried out, by its request id.
    pub last_action: String,
    /// `Ready`: the target exists and its rollouts are watched. `Acknowledged`: every sidecar concerned
    /// enforces the present weight; if not, who is waited for. `Capacity`, `Progressing`, `Promoted`, `Stalled`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The last rollouts, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<HistoryEntry>,
}

/// What the judge has seen of the present rollout.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Evidence {
    /// Requests to the new version in this step.
    pub canary_requests: u64,
    /// Of them failed.
    pub canary_failures: u64,
    /// Requests to the stable version in this step.
    pub stable_requests: u64,
    /// Of them failed.
    pub stable_failures: u64,
    /// Logarithm of the evidence of former steps; evidence multiplies over steps.
    pub former_log_evidence: f64,
}

/// A former rollout.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// The revision that was tried.
    pub revision: String,
    /// Promoted, PromotionStalled, Failed or Superseded.
    pub outcome: RolloutOutcome,
    /// Why, in one sentence.
    pub because: String,
    /// When it ended.
    pub ended: Time,
}
