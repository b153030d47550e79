//! Canary: stepwise rollout of a workload's new versions.
//!
//! A version of the user's application is a *revision* of the workload in the status, as in Kubernetes. The
//! *stable* revision is the approved one.

use std::cmp::Ordering;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::DURATION_PATTERN;
use crate::{Step, StepMatch, Sticky};

/// Which workload to watch, the steps of a rollout, and how to judge the new version.
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
#[x_kube(validation = ("!has(self.onFailure) || self.onFailure != 'Undo' || self.target.kind == 'Deployment'", "onFailure: Undo works only for Deployments; write onFailure: Hold and undo by hand with kubectl rollout undo"))]
pub struct CanarySpec {
    /// The workload whose new versions are rolled out. Immutable, because the status describes revisions of this
    /// workload.
    #[x_kube(validation = ("self == oldSelf", "target is immutable: delete this Canary and create one for the other workload"))]
    pub target: CanaryTarget,
    /// The steps of a rollout, in order. Default: weights of 1, 5, 10, 25 and 50, for two minutes each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub steps: Vec<Step>,
    /// Keeps users with their version during a rollout, by a cookie that sidecars set: who got the new version once
    /// keeps it. Absent: each request may go to another version than the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Sticky>,
    /// How the new version is judged.
    #[serde(default)]
    pub judge: Judge,
    /// How long a rollout may take, such as 2h or 1h30m, without its pauses. `judge.onInconclusive` says what happens
    /// to a rollout that is still undecided then; Hold reports it and waits on. A promotion that takes longer is
    /// reported as stalled. Default: 24h.
    #[serde(default = "deadline")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = ("self.matches('[1-9]')", "deadline must be longer than 0s; write for example 24h"))]
    pub deadline: String,
    /// What happens to the pods of a failed version, which get no traffic in either case. Hold keeps them for
    /// debugging. Undo restores the previous pod template and works only for Deployments.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// How many pods the new version needs for its share of the traffic.
    #[serde(default)]
    pub capacity: Capacity,
}

/// Orders Canaries by age, then by name. Of several Canaries with the same target, only the first in this order is
/// active.
pub fn by_age(a: &Canary, b: &Canary) -> Ordering {
    let of = |canary: &Canary| (canary.metadata.creation_timestamp.clone(), canary.metadata.name.clone());
    of(a).cmp(&of(b))
}

/// The workload whose new versions are rolled out.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct CanaryTarget {
    /// Kind of the workload: Deployment, StatefulSet or DaemonSet.
    pub kind: WorkloadKind,
    /// Name of the workload, in the Canary's namespace.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Kind of a workload.
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
    /// The name of the kind, as in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deployment => "Deployment",
            Self::StatefulSet => "StatefulSet",
            Self::DaemonSet => "DaemonSet",
        }
    }

    /// The kind of this name, if a Canary can target it.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Deployment, Self::StatefulSet, Self::DaemonSet].into_iter().find(|kind| kind.name() == name)
    }
}

/// How the new version is judged.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Judge {
    /// Compares the error rates of the new and the stable version. Errors are HTTP 5xx responses, resets and gRPC
    /// server errors.
    pub errors: ErrorJudge,
    /// Compares the latency of the new and the stable version.
    pub latency: LatencyJudge,
    /// What happens when the share of HTTP 4xx responses of the new version is surely larger than `errors.worseBy`
    /// times that of the stable version: Hold keeps the verdict at Inconclusive, Fail fails the rollout, Ignore does
    /// not look at them.
    pub client_errors: OnClientErrors,
    /// Limits that the new version must meet whatever the stable version does.
    #[serde(skip_serializing_if = "Objectives::is_empty")]
    pub objectives: Objectives,
    /// Number of requests that the new version must have received during the rollout before a step can pass.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_requests: u32,
    /// Time after the first request to a new pod during which its requests are not compared, such as 10s or 1m. With 0s
    /// they are compared from the start.
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    pub warm_up: String,
    /// What happens when the target returns to a revision that was approved before, as with `kubectl rollout undo`:
    /// Approve approves it at once, Trial lets it go through the steps again.
    pub undo: OnUndo,
    /// Confidence that a verdict of Fail needs, above 0% and below 100%. At 99%, at most one good version in a
    /// hundred is stopped by mistake, however often the judge evaluates it. All comparisons share the remaining
    /// 1%.
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
    /// What happens when a step's hold has passed and the verdict is still Inconclusive. Hold waits for more
    /// requests, Promote continues with the next step, Rollback fails the rollout.
    pub on_inconclusive: OnInconclusive,
}

impl Default for Judge {
    fn default() -> Self {
        Self {
            errors: ErrorJudge::default(),
            latency: LatencyJudge::default(),
            client_errors: OnClientErrors::default(),
            objectives: Objectives::default(),
            min_requests: 200,
            warm_up: "10s".to_owned(),
            undo: OnUndo::default(),
            confidence: "99%".to_owned(),
            on_inconclusive: OnInconclusive::Hold,
        }
    }
}

/// Comparison of error rates.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct ErrorJudge {
    /// The new version fails when its error rate exceeds the stable version's error rate over the same period by
    /// this factor, with the required confidence. At a weight of 100 the stable version gets no requests, and its
    /// error rate is taken as 10 percent.
    #[schemars(range(min = 1.0, max = 100.0))]
    pub worse_by: f64,
}

impl Default for ErrorJudge {
    fn default() -> Self {
        Self { worse_by: 1.5 }
    }
}

/// Comparison of latencies.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct LatencyJudge {
    /// The quantile that is compared, such as p90, p99 or p99.9.
    #[schemars(
        regex(pattern = "^p[0-9]{1,2}([.][0-9]{1,2})?$"),
        length(max = 16),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('[1-9]')",
            "message": "quantile must be above p0; write for example p99"
        }])
    )]
    pub quantile: String,
    /// The new version fails when its quantile exceeds the stable version's quantile over the same period by this
    /// factor, with the required confidence. Where the quantile is above p90, p90 is compared in the same way.
    /// Differences below 10 ms are never a reason. 0 turns the comparison off.
    #[schemars(
        range(min = 0.0, max = 1000.0),
        extend("x-kubernetes-validations" = [{
            "rule": "self == 0.0 || self >= 1.0",
            "message": "worseBy must be at least 1, or 0 to leave latency out; write for example 3"
        }])
    )]
    pub worse_by: f64,
}

impl Default for LatencyJudge {
    fn default() -> Self {
        Self { quantile: "p99".to_owned(), worse_by: 3.0 }
    }
}

/// What happens when the new version answers with more client errors.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum OnClientErrors {
    #[default]
    Hold,
    Fail,
    Ignore,
}

/// Limits that the new version must meet whatever the stable version does.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Objectives {
    /// Percentage of requests that must succeed, such as 99.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        range(min = 1.0, max = 99.9999),
        extend("x-kubernetes-validations" = [{
            "rule": "self > 1.0",
            "message": "successRate is a percentage; write for example 99.5"
        }])
    )]
    pub success_rate: Option<f64>,
    /// Latency that 99 percent of the requests must not exceed, such as 300ms or 2s.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        regex(pattern = DURATION_PATTERN),
        length(min = 2, max = 32),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('[1-9]')",
            "message": "p99 must be longer than 0s; write for example 300ms"
        }])
    )]
    pub p99: Option<String>,
}

impl Objectives {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What happens when the target returns to a revision that was approved before.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the names say it; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum OnUndo {
    #[default]
    Approve,
    Trial,
}

/// What happens when the verdict is Inconclusive.
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

/// What happens to the pods of a failed version.
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

/// How many pods the new version needs for its share of the traffic.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Capacity {
    /// Factor for the number of pods. Before a weight is set, the new version must have `ceil(weight / 100 ×
    /// replicas × headroom)` ready pods, but never more than all replicas, and except with `keepStable` and enough
    /// surge never more than all except one.
    #[schemars(range(min = 0.1, max = 10.0))]
    pub headroom: f64,
    /// Keeps all stable pods until the new version is promoted. A weight that needs more pods than the workload's
    /// surge provides is then not set. With a surge of 100% and a step with weight 100 this is blue/green: all traffic
    /// switches at once when every new pod is ready, and back at once if the new version fails within the hold.
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

/// Phase of a rollout.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// The target does not exist or has no revision yet.
    #[default]
    Waiting,
    /// No rollout; the target runs the approved revision.
    Stable,
    /// A new revision goes through the steps.
    Progressing,
    /// A pause step waits for a user.
    Paused,
    /// The new revision is approved; the workload's controller replaces the remaining pods.
    Promoting,
    /// The new revision was judged worse, aborted, or ran out of time. It gets no traffic.
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

/// Observed state of the Canary and its current or last rollout.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct CanaryStatus {
    /// The generation of the spec that the status describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The target as kind and name, such as Deployment/checkout.
    pub target: String,
    /// Phase of the rollout.
    pub phase: Phase,
    /// The approved revision. Pods of every other revision stay unready until the rollout admits them.
    pub approved_revision: String,
    /// The previously approved revision, while its pods are being replaced. They still count as stable.
    pub former_revision: String,
    /// The revision that is being rolled out, or the last one that was.
    pub canary_revision: String,
    /// The newest revision that was handled. Any other revision of the target starts a rollout.
    pub decided_revision: String,
    /// Index of the current step, starting at 0.
    pub step: u32,
    /// The current step and the number of steps, such as 2/3.
    pub step_summary: String,
    /// The weight that is sent to the sidecars, in percent.
    pub weight: u32,
    /// The weight that every sidecar that sends to the target has acknowledged, in percent.
    pub acknowledged_weight: u32,
    /// Requests that are sent to the new version beside its weight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steering: Option<CanarySteering>,
    /// The steering that every sidecar that sends to the target has acknowledged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acknowledged_steering: Option<CanarySteering>,
    /// What sidecars have acknowledged: the weight, matches and copies, such as 25%, match or mirror 10%.
    pub weight_summary: String,
    /// Version of weight and steering: increases with every change. Sidecars acknowledge it.
    pub epoch: u64,
    /// The judge's verdict on the new revision: Pass, Fail or Inconclusive; Undecided while it has no traffic to
    /// judge; FailedBefore for a revision that failed, was undone and came back; empty before the first rollout.
    pub verdict: CanaryVerdict,
    /// The evidence behind the verdict, in one sentence.
    pub evidence_summary: String,
    /// The counts that the verdict is based on. A restarted operator continues with them.
    pub evidence: Evidence,
    /// When the rollout started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When every sidecar had acknowledged the weight of the current step, which starts its hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_started: Option<Time>,
    /// Since when the new revision has had no ready pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unready_since: Option<Time>,
    /// Since when the stable revision has had no pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_gone_since: Option<Time>,
    /// The request id of the last action that a user requested with the annotation tulle.dev/action.
    pub last_action: String,
    /// Ids of the actions that users have requested, newest first. An id has an effect only once.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub used_actions: Vec<String>,
    /// Revisions that were approved before, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10))]
    pub approved_before: Vec<String>,
    /// Why the revision was approved, while its pods are being replaced; the history gets it at the end.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub promoted_because: String,
    /// The newest revision that failed, was aborted or is held although nothing else can serve; empty once a newer
    /// one is approved.
    pub failed_revision: String,
    /// How many seconds of the rollout were pauses; they do not count against the deadline.
    pub paused_seconds: u64,
    /// Whether a user has paused the rollout with the annotation tulle.dev/action, within a step that is not a pause.
    pub paused_by_hand: bool,
    /// Since when the rollout has paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paused_since: Option<Time>,
    /// Ready: the target exists and is watched. Progressing: a rollout is in progress. Acknowledged: every sidecar
    /// that sends to the target uses the current weight; the message names the first one that does not. Capacity:
    /// the new version has enough pods for its weight. Promoted: how the last rollout ended. Stalled: the
    /// promotion was not completed before the deadline.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// The last ten rollouts, newest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<HistoryEntry>,
}

/// Requests that are sent to the new version beside its weight, as the sidecars are sent it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct CanarySteering {
    /// Requests with one of these headers or cookies go to the new version.
    #[serde(rename = "match", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub match_: Vec<StepMatch>,
    /// Percentage of the other requests of which a copy goes to the new version.
    #[serde(skip_serializing_if = "is_zero")]
    pub mirror: u32,
    /// Name of the cookie that keeps a user with a version. Empty: none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sticky: String,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What the judge knows. A restarted operator continues with it.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct Evidence {
    /// Attempts at the new version in this rollout.
    pub canary: AttemptTotals,
    /// Attempts at the stable version over the same seconds.
    pub stable: AttemptTotals,
    /// Attempts at the new version before the present weight was set.
    pub before_step: u64,
    /// Number of blocks of ten seconds in it.
    pub blocks: u64,
    /// The comparisons and how far each has come.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub tests: Vec<TestEvidence>,
}

/// Attempts at one version.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", default)]
pub struct AttemptTotals {
    /// Number of attempts.
    pub attempts: u64,
    /// Number of attempts that failed.
    pub failures: u64,
    /// Number of failed attempts that did not reach the application.
    pub unreached: u64,
    /// Number of attempts that were answered with HTTP 4xx.
    pub client_errors: u64,
}

/// The evidence of one comparison.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct TestEvidence {
    /// Name of the comparison: errors, latency, latencyP90, clientErrors, successRate, p99, alone, sustained, or
    /// unanswered (attempts at the stable version since the last one at the new version has ended). A name that ends in
    /// Dispersion stands for how strongly the events of that comparison come in bursts.
    pub name: String,
    /// What the comparison remembers of the past: the stable version's quantile in microseconds, or the size of a
    /// typical burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<f64>,
    /// Evidence since the beginning, and since later starting points: a version that turns bad after a long pause is
    /// found as quickly as at the start.
    #[schemars(length(max = 8))]
    pub windows: Vec<EvidenceWindow>,
}

/// Evidence since one starting point.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase", default)]
pub struct EvidenceWindow {
    /// Which starting point it is, counted from 0.
    pub number: u32,
    /// Blocks of ten seconds since then.
    pub blocks: u32,
    /// Logarithm of the evidence for each factor that the new version may be worse by; of a dispersion, of sustained
    /// failures or of unanswered requests, sums.
    #[schemars(length(max = 16))]
    pub log_evidence: Vec<f64>,
}

/// A rollout that has ended.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct HistoryEntry {
    /// The revision that was rolled out.
    pub revision: String,
    /// How it ended: Promoted, PromotionStalled, Failed or Superseded.
    pub outcome: RolloutOutcome,
    /// Why it ended, in one sentence.
    pub because: String,
    /// When it ended.
    pub ended: Time,
}
