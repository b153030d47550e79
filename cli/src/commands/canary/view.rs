//! What `canary status` shows of a rollout: first as a value (`-o json`), then as text.
//!
//! Pure: Canary, pods and time come in, and nothing is read or printed here.

use std::collections::BTreeMap;

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use tulle_crds::{Canary, CanaryStatus, CanarySteering, Phase, RolloutOutcome, TestEvidence};

use super::pods::PodSeen;
use super::{dash, next};
use crate::output::{Colour, Output, Table};

/// Conditions that say what a rollout waits for, and the status in which they do.
const OBSTACLES: [(&str, &str); 10] = [
    ("Ready", "False"),
    ("Split", "False"),
    ("Capacity", "False"),
    ("PodsHealthy", "False"),
    ("Acknowledged", "False"),
    ("DeadlineExceeded", "True"),
    ("Stalled", "True"),
    ("ServingFailedRevision", "True"),
    ("Returning", "True"),
    ("HeldByJudge", "True"),
];

/// The operator may not restore the template, which nothing waits for before a version has failed.
const UNDO: (&str, &str) = ("Undo", "False");

/// A rollout.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct View {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) target: String,
    pub(super) phase: Phase,
    /// Such as 2/5; empty: no rollout.
    pub(super) step: String,
    /// Percent, as the step asks for it.
    pub(super) weight: u32,
    /// What the step asks for, with matches and copies, such as `25%, match`.
    pub(super) asked: String,
    /// What every sidecar has acknowledged, such as `25%, match`; empty: no rollout.
    pub(super) acknowledged: String,
    pub(super) verdict: &'static str,
    pub(super) evidence: String,
    /// Why the rollout failed; empty: it has not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) because: String,
    /// What it waits for, as sentences.
    pub(super) waiting: Vec<String>,
    /// What a user can do about a version that has failed; empty: it has not.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) next: String,
    /// Unix seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) started: Option<i64>,
    pub(super) tests: Vec<TestLine>,
    pub(super) revisions: Vec<Revision>,
}

/// A comparison of the judge.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct TestLine {
    pub(super) name: String,
    /// Odds that the new version is worse, to 1; `None`: nothing was compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) odds: Option<f64>,
    /// Blocks of ten seconds since the rollout began.
    pub(super) blocks: u32,
}

/// A revision and its pods.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Revision {
    pub(super) name: String,
    /// `stable`, `canary`, `former` or empty.
    pub(super) role: &'static str,
    /// Whether sidecars send requests to its pods whose gates are shut.
    pub(super) steered: bool,
    pub(super) pods: Vec<PodSeen>,
}

impl View {
    pub(super) fn of(canary: &Canary, pods: &[PodSeen]) -> Self {
        let status = canary.status.clone().unwrap_or_default();
        let target = &canary.spec.target;
        let waits = |(type_, while_it_is): &(&str, &str)| {
            let found = status.conditions.iter().find(|c| c.type_ == *type_ && c.status == *while_it_is);
            found.map(|condition| condition.message.clone())
        };
        let failed = Some(&("Promoted", "False")).filter(|_| status.phase == Phase::Failed);
        let because = failed.and_then(waits).unwrap_or_default();
        let undo = Some(&UNDO).filter(|_| status.phase == Phase::Failed);
        // A failed revision that serves says the same in two conditions.
        let obstacles =
            OBSTACLES.iter().chain(undo).filter_map(waits).filter(|sentence| *sentence != because);
        let waiting = next::after_pause(canary).into_iter().chain(obstacles).collect();
        Self {
            namespace: canary.metadata.namespace.clone().unwrap_or_default(),
            name: canary.metadata.name.clone().unwrap_or_default(),
            target: format!("{}/{}", target.kind.name(), target.name),
            phase: status.phase,
            step: status.step_summary.clone(),
            weight: status.weight,
            asked: asked(status.weight, status.steering.as_ref()),
            acknowledged: status.weight_summary.clone(),
            verdict: super::verdict(status.verdict),
            evidence: status.evidence_summary.clone(),
            because,
            waiting,
            next: next::after_failure(canary).unwrap_or_default(),
            started: status.started.as_ref().map(|started| started.0.as_second()),
            tests: status.evidence.tests.iter().filter_map(TestLine::of).collect(),
            revisions: revisions(&status, pods),
        }
    }

    /// Head, tree and tests.
    pub(super) fn text(&self, now: Timestamp, output: &Output) -> String {
        let mut text = self.head(now, output);
        text.push('\n');
        text.push_str(&self.tree(now).to_string());
        text.push_str(self.about_gates());
        if !self.tests.is_empty() && self.is_in_progress() {
            text.push('\n');
            text.push_str(&self.judged().to_string());
        }
        text
    }

    fn is_in_progress(&self) -> bool {
        !matches!(self.phase, Phase::Waiting | Phase::Stable)
    }

    fn head(&self, now: Timestamp, output: &Output) -> String {
        let phase = format!("{:?}", self.phase);
        let phase = match self.phase {
            Phase::Failed => output.paint(Colour::Red, &phase),
            Phase::Paused => output.paint(Colour::Yellow, &phase),
            Phase::Stable => output.paint(Colour::Green, &phase),
            Phase::Waiting | Phase::Progressing | Phase::Promoting => phase,
        };
        let mut lines = vec![
            ("Canary", format!("{}/{}", self.namespace, self.name)),
            ("Target", self.target.clone()),
            ("Phase", phase),
        ];
        if self.is_in_progress() {
            let acknowledged = dash(self.acknowledged.clone());
            lines.push(("Step", dash(self.step.clone())));
            lines.push(("Weight", format!("{} asked for, {acknowledged} acknowledged", self.asked)));
            lines.push(("Verdict", dash(self.verdict.to_owned())));
        }
        if !self.because.is_empty() {
            lines.push(("Reason", self.because.clone()));
        }
        if !self.evidence.is_empty() && self.evidence != self.because {
            lines.push(("Evidence", self.evidence.clone()));
        }
        lines.extend(self.waiting.iter().map(|sentence| ("Waiting", sentence.clone())));
        if !self.next.is_empty() {
            lines.push(("Next", self.next.clone()));
        }
        if let Some(started) = self.started.filter(|_| self.is_in_progress()) {
            let ago = super::age(Some(now.as_second().saturating_sub(started)));
            lines.push(("Started", format!("{ago} ago")));
        }
        let line = |(name, value): (&str, String)| {
            let label = format!("{name}:");
            format!("{label:<10}{value}\n")
        };
        lines.into_iter().map(line).collect()
    }

    fn tree(&self, now: Timestamp) -> Table {
        let mut rows = Vec::new();
        for revision in &self.revisions {
            let name = dash(revision.name.clone());
            let name = match revision.role {
                "" => name,
                role => format!("{name} ({role})"),
            };
            rows.push(vec![name, revision.count(), String::new(), String::new(), String::new()]);
            for (index, pod) in revision.pods.iter().enumerate() {
                let branch = if index + 1 == revision.pods.len() { "└─" } else { "├─" };
                rows.push(vec![
                    format!("{branch} {}", pod.name),
                    revision.state(pod),
                    pod.gate.name().to_owned(),
                    pod.restarts.to_string(),
                    pod.age(now),
                ]);
            }
        }
        Table { headers: vec!["REVISION / POD", "STATE", "GATE", "RESTARTS", "AGE"], rows }
    }

    /// What `serving` means, where it stands: kubectl shows these pods as not ready.
    fn about_gates(&self) -> &'static str {
        let serves = |revision: &Revision| revision.steered && revision.pods.iter().any(PodSeen::is_held);
        if self.revisions.iter().any(serves) {
            "\nserving: sidecars send the pod its share. Kubernetes shows it as not ready until the promotion opens its gate.\n"
        } else {
            ""
        }
    }

    fn judged(&self) -> Table {
        let row = |test: &TestLine| {
            let seconds = i64::from(test.blocks).saturating_mul(10);
            vec![test.name.clone(), dash(test.odds.map(odds).unwrap_or_default()), super::age(Some(seconds))]
        };
        Table { headers: vec!["TEST", "WORSE", "OVER"], rows: self.tests.iter().map(row).collect() }
    }
}

impl Revision {
    /// The state of one of its pods, such as `not ready (web: ImagePullBackOff)`.
    fn state(&self, pod: &PodSeen) -> String {
        let state = match (pod.terminating, pod.ready) {
            (true, _) => "terminating",
            (false, true) => "ready",
            (false, false) if pod.is_held() && self.steered => "serving",
            (false, false) if pod.is_held() => "held back",
            (false, false) => match &pod.why {
                Some(why) => return format!("not ready ({why})"),
                None => "not ready",
            },
        };
        state.to_owned()
    }

    /// How many of its pods are as they should be, such as `1/2 serving`.
    fn count(&self) -> String {
        let well = self.pods.iter().filter(|pod| pod.ready || pod.is_held()).count();
        let state = match (self.pods.iter().any(PodSeen::is_held), self.steered) {
            (true, true) => "serving",
            (true, false) => "held back",
            (false, _) => "ready",
        };
        format!("{well}/{} {state}", self.pods.len())
    }
}

/// What is sent to the new version, in the words in which the operator says what is acknowledged.
fn asked(weight: u32, steering: Option<&CanarySteering>) -> String {
    let mut parts = Vec::new();
    if weight > 0 {
        parts.push(format!("{weight}%"));
    }
    if steering.is_some_and(|steering| !steering.match_.is_empty()) {
        parts.push("match".to_owned());
    }
    if let Some(steering) = steering.filter(|steering| steering.mirror > 0) {
        parts.push(format!("mirror {}%", steering.mirror));
    }
    if parts.is_empty() { "0%".to_owned() } else { parts.join(", ") }
}

/// The approved revision first, then the one before it, then the one that is rolled out, then others by name.
fn revisions(status: &CanaryStatus, pods: &[PodSeen]) -> Vec<Revision> {
    let mut found: BTreeMap<(u8, &str), Vec<PodSeen>> = BTreeMap::new();
    let role = |revision: &str| match revision {
        "" => (3, ""),
        it if it == status.approved_revision => (0, "stable"),
        it if it == status.former_revision => (1, "former"),
        it if it == status.canary_revision => (2, "canary"),
        _ => (3, ""),
    };
    for known in [&status.approved_revision, &status.canary_revision] {
        // A revision without a pod is shown too, unless it is one that failed and was restored.
        let is_old = status.phase == Phase::Stable && *known != status.approved_revision;
        if !known.is_empty() && !is_old {
            found.entry((role(known.as_str()).0, known.as_str())).or_default();
        }
    }
    for pod in pods {
        let revision = pod.revision.as_str();
        found.entry((role(revision).0, revision)).or_default().push(pod.clone());
    }
    // Sidecars may send it something from the moment that it is asked for, and until all have acknowledged that it ended.
    let is_given = |sent: &str| !matches!(sent, "" | "0%");
    let asked = asked(status.weight, status.steering.as_ref());
    let gets = is_given(&asked) || is_given(&status.weight_summary);
    let revision = |((_, name), pods): ((u8, &str), Vec<PodSeen>)| {
        let role = role(name).1;
        // The gates of an approved revision open one after the other.
        let steered = matches!(role, "stable" | "former") || (role == "canary" && gets);
        Revision { name: name.to_owned(), role, steered, pods }
    };
    found.into_iter().map(revision).collect()
}

impl TestLine {
    /// `None` for what is not a comparison: a dispersion says how strongly events come in bursts, and sustained failures
    /// and unanswered requests are counts.
    fn of(test: &TestEvidence) -> Option<Self> {
        if test.name.ends_with("Dispersion") || matches!(test.name.as_str(), "sustained" | "unanswered") {
            return None;
        }
        // As the judge adds them up: half for the window that began with the rollout, the other half for later ones.
        let evidence = |window: &tulle_crds::EvidenceWindow| {
            let number = f64::from(window.number);
            let weight = if number < 1.0 { 0.5 } else { 0.5 / (number * (number + 1.0)) };
            let count = window.log_evidence.len().max(1) as f64;
            weight * window.log_evidence.iter().map(|log| log.exp()).sum::<f64>() / count
        };
        let odds = (!test.windows.is_empty()).then(|| test.windows.iter().map(evidence).sum::<f64>());
        let blocks = test.windows.iter().map(|window| window.blocks).max().unwrap_or(0);
        // JSON has no infinity.
        Some(Self { name: test.name.clone(), odds: odds.map(|odds| odds.min(1e12)), blocks })
    }
}

/// Odds to 1, in as few digits as are of use.
fn odds(odds: f64) -> String {
    match odds {
        odds if odds < 0.01 => "under 0.01 to 1".to_owned(),
        odds if odds < 10.0 => format!("{odds:.2} to 1"),
        odds if odds < 1e6 => format!("{odds:.0} to 1"),
        _ => "over a million to 1".to_owned(),
    }
}

/// How a rollout that was watched has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The revision is the stable one, or nothing was rolled out at all.
    Promoted(String),
    /// It failed, was aborted, or was taken back; a sentence.
    Failed(String),
}

/// The revision that is rolled out now.
pub(super) fn on_its_way(status: &CanaryStatus) -> Option<&str> {
    matches!(status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting)
        .then_some(status.canary_revision.as_str())
}

/// Whether the rollout has ended; `watched` is the revision that was on its way last.
pub(super) fn end(watched: Option<&str>, status: &CanaryStatus) -> Option<End> {
    match status.phase {
        Phase::Waiting | Phase::Progressing | Phase::Paused | Phase::Promoting => None,
        Phase::Failed => {
            let revision = &status.canary_revision;
            let last = status.history.iter().find(|entry| entry.revision == *revision);
            let why = last.map_or(status.evidence_summary.as_str(), |entry| entry.because.as_str());
            Some(End::Failed(format!("revision {revision} failed: {why}")))
        }
        Phase::Stable => Some(match watched {
            Some(revision) if is_stalled(status, revision) => End::Failed(format!(
                "revision {revision} is approved and gets the traffic, but its pods have not replaced all others in time"
            )),
            Some(revision) if revision != status.approved_revision => End::Failed(format!(
                "revision {revision} was not promoted: the target is back at revision {}",
                status.approved_revision
            )),
            Some(revision) => End::Promoted(format!("revision {revision} is promoted")),
            None => End::Promoted(format!(
                "no rollout is in progress; revision {} is approved",
                status.approved_revision
            )),
        }),
    }
}

/// Whether the last rollout ended before every pod was replaced.
fn is_stalled(status: &CanaryStatus, revision: &str) -> bool {
    let last = status.history.first().filter(|entry| entry.revision == revision);
    last.is_some_and(|entry| entry.outcome == RolloutOutcome::PromotionStalled)
}
