//! What is wrong in the mesh: those checks of `tulle check` for which the operator has the facts, with the same numbers,
//! limits and remedies. Tests compare them with what is generated from the command.
//!
//! In: the operator's own state, the sidecars, and the model. Out: findings, in order of their numbers, and the sidecars
//! that they are about. Pure.

use std::collections::{BTreeMap, HashSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use tulle_crds::{Canary, MeshPolicy, Phase, reason};
use tulle_mesh::query::{Health, Sidecar, Sidecars};

use super::words::{command, duration, scoped};
use crate::identity::lifetime::Lifetime;
use crate::model::{Key, Model};

/// A root certificate that ends within this time is reported, in seconds: the default of `--certs-within`.
const ROOT_ENDS_SOON: i64 = 720 * 3_600;
/// A sidecar or policy that is behind for longer than this many seconds is reported.
const BEHIND: i64 = 30;
/// A sidecar may be this many minor versions older than the operator.
const OLDER: u32 = 2;
/// Names that a finding lists.
const LISTED: usize = 5;

const LEADER: &str = "T0303";
const SERIES: &str = "T0306";
const ROOT: &str = "T0401";
const INJECTED: &str = "T0602";
const SIDECAR_SKEW: &str = "T0701";
const REFUSED: &str = "T0702";
const SIDECAR_BEHIND: &str = "T0703";
const CERTIFICATE: &str = "T0704";
const POLICIES: &str = "T0801";
const CANARIES: &str = "T0901";
const DEADLINES: &str = "T0902";

/// Checks that only the command makes, by what they are about.
pub const COMMAND_ONLY: &[(&str, &[&str])] = &[
    ("the Kubernetes version and the nodes", &["T0101", "T0102"]),
    ("your own rights", &["T0103"]),
    ("Pod Security", &["T0104"]),
    ("the objects of the installation", &["T0201", "T0202", "T0203", "T0204", "T0205"]),
    ("the Deployments of the control plane", &["T0301", "T0302"]),
    ("how the command reaches the operator", &["T0304", "T0305"]),
    ("the webhook", &["T0501", "T0502", "T0503", "T0504"]),
    ("labels of namespaces", &["T0601"]),
    ("tools that undo a rollout", &["T0903"]),
    ("routes", &["T0920"]),
    ("the network plugin", &["T0930"]),
];

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The number of the check.
    pub id: &'static str,
    /// It does not work; otherwise it works, and may not for long or not for all.
    pub is_error: bool,
    /// What was found.
    pub found: String,
    /// What it means, and what to do.
    pub hint: &'static str,
    /// The command that repairs it, or that shows more.
    pub fix: String,
}

/// What is judged besides the model.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The operator.
    pub health: &'a Health,
    /// The sidecars that the token shows.
    pub sidecars: &'a Sidecars,
    /// This replica leads, or knows which one does.
    pub is_led: bool,
    /// The namespace of the control plane.
    pub system: &'a str,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// The present time, in Unix seconds.
    pub now: i64,
}

impl Facts<'_> {
    fn shows(&self, namespace: &str) -> bool {
        self.only.is_none_or(|only| only == namespace)
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// What is not well, by number.
    pub findings: Vec<Finding>,
    /// The sidecars among it.
    pub sidecars: Vec<Sidecar>,
}

/// Judges the facts.
pub fn judge(facts: &Facts<'_>, model: &Model) -> Judged {
    let mut findings: Vec<Finding> =
        [leader(facts), series(facts), root(facts)].into_iter().flatten().collect();
    findings.extend(injected(facts));
    let limits = SidecarLimits::of(facts, model);
    let all = facts.sidecars.sidecars.as_slice();
    findings.extend(skewed(all, &limits, facts));
    findings.extend(all.iter().filter_map(refused));
    findings.extend(behind(all, &limits, facts));
    findings.extend(all.iter().filter_map(|sidecar| certificate(sidecar, &limits)));
    findings.extend(policies(facts, model));
    let canaries = model.canaries().filter(|(key, _)| facts.shows(&key.0));
    let canaries: Vec<&Canary> = canaries.map(|(_, canary)| canary).collect();
    findings.extend(canaries.iter().filter_map(|canary| stuck(canary)));
    findings.extend(canaries.iter().filter_map(|canary| late(canary)));
    let sidecars = all.iter().filter(|sidecar| limits.is_reported(sidecar)).cloned().collect();
    Judged { findings, sidecars }
}

fn leader(facts: &Facts<'_>) -> Option<Finding> {
    (!facts.is_led).then(|| Finding {
        id: LEADER,
        is_error: true,
        found: "no replica leads, as far as this one knows".to_owned(),
        hint: "status and Canaries stand still until one does",
        fix: command(&["kubectl", "-n", facts.system, "logs", "deployment/tulle-operator"]),
    })
}

fn series(facts: &Facts<'_>) -> Option<Finding> {
    let Health { series, max_series, .. } = facts.health;
    (*max_series > 0 && series >= max_series).then(|| Finding {
        id: SERIES,
        is_error: false,
        found: format!("the operator holds {series} series, and takes no more"),
        hint: "what is counted beyond them is not shown; Canaries are judged all the same",
        fix: "tulle check --short".to_owned(),
    })
}

fn root(facts: &Facts<'_>) -> Option<Finding> {
    let fix = ["kubectl", "-n", facts.system, "get", "secret", "tulle-root", "-o", "yaml"];
    let finding = |is_error, found| Finding {
        id: ROOT,
        is_error,
        found,
        hint: "Tulle does not rotate its root. Plan the change: save the Secret, allow a new root with annotation \
               tulle.dev/new-root of MeshConfig mesh, delete the Secret and restart the operator; sidecars reject each \
               other until all have a certificate of the new root",
        fix: format!("{} > tulle-root.yaml", command(&fix)),
    };
    let Some(ends) = facts.health.root_not_after else {
        let unread = "the root certificate could not be checked: the operator does not know when it ends";
        return Some(Finding { hint: "", ..finding(false, unread.to_owned()) });
    };
    let left = ends.saturating_sub(facts.now);
    if left <= 0 {
        let ago = duration(left.unsigned_abs());
        let found = format!("the root certificate ended {ago} ago, so sidecars cannot connect to each other");
        return Some(finding(true, found));
    }
    (left < ROOT_ENDS_SOON)
        .then(|| finding(false, format!("the root certificate ends in {}", duration(left.unsigned_abs()))))
}

/// One finding for each namespace.
fn injected(facts: &Facts<'_>) -> Vec<Finding> {
    let mut without: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (namespace, pod) in facts.sidecars.without.iter().filter_map(|pod| pod.split_once('/')) {
        without.entry(namespace).or_default().push(pod);
    }
    let one = |(namespace, pods): (&str, Vec<&str>)| Finding {
        id: INJECTED,
        is_error: false,
        found: format!("{} pods of namespace {namespace} have no sidecar: {}", pods.len(), some_of(&pods)),
        hint: "they were created before the label, or while the webhook was unavailable",
        fix: command(&["kubectl", "-n", namespace, "rollout", "restart", "deployment,statefulset,daemonset"]),
    };
    without.into_iter().map(one).collect()
}

/// `shop/a, shop/b and 3 more`.
fn some_of(names: &[impl AsRef<str>]) -> String {
    let listed: Vec<&str> = names.iter().take(LISTED).map(AsRef::as_ref).collect();
    let listed = listed.join(", ");
    match names.len().saturating_sub(LISTED) {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

/// By what a sidecar is judged.
struct SidecarLimits {
    operator: Option<Version>,
    /// Whether the replica that answers leads: another one knows those that are connected to it.
    leads: bool,
    /// Pods that are being deleted, as `namespace/name`: their sidecars do not connect again. Of pods that have just been
    /// created the model does not know it, so that one may be reported for a few seconds.
    leaving: HashSet<String>,
    /// For how many seconds a certificate must be valid. A sidecar renews it at half of its lifetime, so that one with less
    /// than a quarter left was not renewed when it was due.
    least_left: i64,
    now: i64,
}

/// Major and minor version.
type Version = (u32, u32);

impl SidecarLimits {
    fn of(facts: &Facts<'_>, model: &Model) -> Self {
        let lifetime = Lifetime::of(&model.settings().leaf_lifetime).leaf;
        let leaving = model.pods().filter(|pod| pod.terminating);
        Self {
            operator: version(&facts.health.version),
            leads: facts.health.leader,
            leaving: leaving.map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect(),
            least_left: i64::try_from(lifetime.as_secs() / 4).unwrap_or(i64::MAX),
            now: facts.now,
        }
    }

    fn is_skewed(&self, sidecar: &Sidecar) -> bool {
        let known = self.operator.zip(version(&sidecar.version));
        known.is_some_and(|((major, minor), (its, own))| {
            major != its || own > minor || minor.saturating_sub(own) > OLDER
        })
    }

    /// What a sidecar waits for, if it does so for too long.
    fn waits(&self, sidecar: &Sidecar) -> Option<String> {
        let pod = pod_of(sidecar);
        if !self.leads || self.leaving.contains(&pod) {
            return None;
        }
        if !sidecar.connected {
            return Some(format!("{pod} (not connected)"));
        }
        let waits = sidecar.behind_seconds.is_some_and(|seconds| seconds > BEHIND.unsigned_abs());
        waits.then(|| format!("{pod} ({}/{})", sidecar.acknowledged, sidecar.resources))
    }

    /// The seconds for which its certificate is valid, if they are too few.
    fn ends_in(&self, sidecar: &Sidecar) -> Option<i64> {
        let left = sidecar.certificate_not_after?.saturating_sub(self.now);
        (left < self.least_left).then_some(left)
    }

    fn is_reported(&self, sidecar: &Sidecar) -> bool {
        self.is_skewed(sidecar)
            || !sidecar.refused.is_empty()
            || self.waits(sidecar).is_some()
            || self.ends_in(sidecar).is_some()
    }
}

/// Of a version such as `0.3.0`.
fn version(text: &str) -> Option<Version> {
    let mut parts = text.trim_start_matches('v').splitn(3, '.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn pod_of(sidecar: &Sidecar) -> String {
    format!("{}/{}", sidecar.namespace, sidecar.pod)
}

fn skewed(all: &[Sidecar], limits: &SidecarLimits, facts: &Facts<'_>) -> Option<Finding> {
    let named = |sidecar: &Sidecar| format!("{} ({})", pod_of(sidecar), sidecar.version);
    let pods: Vec<String> = all.iter().filter(|sidecar| limits.is_skewed(sidecar)).map(named).collect();
    (!pods.is_empty()).then(|| Finding {
        id: SIDECAR_SKEW,
        is_error: false,
        found: format!(
            "{} sidecars have a version that this operator does not support: {}",
            pods.len(),
            some_of(&pods)
        ),
        hint: "an operator supports sidecars of its own and the two minor versions before it",
        fix: scoped(&["kubectl", "get", "pods", "-L", "tulle.dev/sidecar"], facts.only),
    })
}

fn refused(sidecar: &Sidecar) -> Option<Finding> {
    let (first, count) = (sidecar.refused.first()?, sidecar.refused.len());
    Some(Finding {
        id: REFUSED,
        is_error: true,
        found: format!("sidecar of {} has refused {count} resources: {first}", pod_of(sidecar)),
        hint: "it enforces the last version that it could; a restart brings the present sidecar",
        fix: delete(sidecar),
    })
}

fn behind(all: &[Sidecar], limits: &SidecarLimits, facts: &Facts<'_>) -> Option<Finding> {
    if !facts.health.leader {
        let pod = &facts.health.pod;
        return Some(Finding {
            id: SIDECAR_BEHIND,
            is_error: false,
            found: format!(
                "sidecars could not be checked: pod {pod} does not lead, and knows only those that are connected to it"
            ),
            hint: "the command opens the page at the leader",
            fix: "tulle dashboard".to_owned(),
        });
    }
    let pods: Vec<String> = all.iter().filter_map(|sidecar| limits.waits(sidecar)).collect();
    (!pods.is_empty()).then(|| Finding {
        id: SIDECAR_BEHIND,
        is_error: false,
        found: format!(
            "{} sidecars have waited for over {BEHIND} s or are not connected: {}",
            pods.len(),
            some_of(&pods)
        ),
        hint: "they enforce the configuration before; look at their logs, and whether they reach port 26160",
        fix: scoped(&["tulle", "pods"], facts.only),
    })
}

fn certificate(sidecar: &Sidecar, limits: &SidecarLimits) -> Option<Finding> {
    let left = limits.ends_in(sidecar)?;
    let (pod, time) = (pod_of(sidecar), duration(left.unsigned_abs()));
    Some(if left <= 0 {
        Finding {
            id: CERTIFICATE,
            is_error: true,
            found: format!("the certificate of {pod} ended {time} ago"),
            hint: "it can neither connect nor be connected to with mTLS",
            fix: delete(sidecar),
        }
    } else {
        Finding {
            id: CERTIFICATE,
            is_error: false,
            found: format!("the certificate of {pod} ends in {time}"),
            hint: "it is renewed at half of its lifetime: look at the logs of its sidecar",
            fix: command(&["kubectl", "-n", &sidecar.namespace, "logs", &sidecar.pod, "-c", "tulle-proxy"]),
        }
    })
}

fn delete(sidecar: &Sidecar) -> String {
    command(&["kubectl", "-n", &sidecar.namespace, "delete", "pod", &sidecar.pod])
}

fn policies(facts: &Facts<'_>, model: &Model) -> Vec<Finding> {
    let mut all: Vec<(&Key, Finding)> = Vec::new();
    let mut unread: HashSet<&Key> = HashSet::new();
    for (key, policy) in model.unreadable_policies().filter(|(key, _)| facts.shows(&key.0)) {
        unread.insert(key);
        let what = format!("{}: {}", reason::INVALID, policy.error);
        all.push((key, of_policy(key, true, &what, NOT_ENFORCED)));
    }
    // Of a policy whose newest version cannot be decoded, the model has the one before, and its status.
    let is_readable = |key: &Key| facts.shows(&key.0) && !unread.contains(key);
    for (key, policy) in model.policies().filter(|(key, _)| is_readable(key)) {
        all.extend(policy_fault(key, policy, facts.now).map(|finding| (key, finding)));
    }
    all.sort_by_key(|(key, _)| *key);
    all.into_iter().map(|(_, finding)| finding).collect()
}

/// The hint for a policy with a value that is invalid.
const NOT_ENFORCED: &str = "nothing of it is enforced: correct the value";

fn of_policy((namespace, name): &Key, is_error: bool, what: &str, hint: &'static str) -> Finding {
    let found = format!("MeshPolicy {namespace}/{name}: {what}");
    let fix = command(&["kubectl", "-n", namespace, "describe", "meshpolicy", name]);
    Finding { id: POLICIES, is_error, found, hint, fix }
}

fn policy_fault(key: &Key, policy: &MeshPolicy, now: i64) -> Option<Finding> {
    let generation = policy.metadata.generation.unwrap_or(0);
    let status =
        policy.status.as_ref().filter(|status| status.observed_generation.is_some_and(|at| at >= generation));
    let Some(ready) = status.and_then(|status| condition(&status.conditions, "Ready")) else {
        let hint = "the leading operator writes it within seconds; see whether one leads";
        return Some(of_policy(key, false, "its present version has no status", hint));
    };
    let what = format!("{}: {}", ready.reason, ready.message);
    let since = now.saturating_sub(ready.last_transition_time.0.as_second());
    let (is_error, hint) = match ready.reason.as_str() {
        reason::INVALID => (true, NOT_ENFORCED),
        reason::CONFLICTED => (true, "the older policy holds: delete one of the two sections"),
        reason::REFUSED => (true, "restart the pods, which brings a sidecar that has what the policy needs"),
        reason::TARGET_NOT_FOUND => (true, "correct the target, or create it"),
        reason::NO_WORKLOADS => (false, "it selects no pod with a sidecar: compare the labels"),
        reason::PROPAGATING if since > BEHIND => {
            let what = format!("{what} (for {})", duration(since.unsigned_abs()));
            let hint =
                "the sidecars that it waits for are among those below, or in the page of their workload";
            return Some(of_policy(key, false, &what, hint));
        }
        _ => return None,
    };
    Some(of_policy(key, is_error, &what, hint))
}

fn condition<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

fn of_canary(canary: &Canary, id: &'static str, is_error: bool, what: &str, hint: &'static str) -> Finding {
    let (namespace, name) = (super::canary::namespace(canary), super::canary::name(canary));
    let found = format!("Canary {namespace}/{name}: {what}");
    let fix = command(&["kubectl", "-n", namespace, "describe", "canary", name]);
    Finding { id, is_error, found, hint, fix }
}

/// What keeps a Canary from working.
fn stuck(canary: &Canary) -> Option<Finding> {
    let status = canary.status.as_ref()?;
    let with = |type_: &str, wanted: &str| {
        condition(&status.conditions, type_).filter(|condition| condition.status == wanted)
    };
    let finding = |is_error, condition: &Condition, hint| {
        let what = format!("{}: {}", condition.reason, condition.message);
        Some(of_canary(canary, CANARIES, is_error, &what, hint))
    };
    if let Some(stalled) = with("Stalled", "True") {
        let hint = "the workload's controller does not replace the remaining pods: look at its events";
        return finding(true, stalled, hint);
    }
    if let Some(dial) = status.conditions.iter().find(|condition| condition.reason == "ClientsDialPods") {
        let hint =
            "clients reach pods by their addresses, so no share can be set: let them use a ClusterIP Service";
        return finding(true, dial, hint);
    }
    let not_ready = with("Ready", "False")?;
    // A target that does not exist yet is what a Canary waits for when both are applied together.
    if status.phase == Phase::Waiting {
        finding(false, not_ready, "create the target, or correct its name")
    } else {
        finding(true, not_ready, "new versions are not rolled out in steps")
    }
}

/// Deadlines that end a rollout that works.
fn late(canary: &Canary) -> Option<Finding> {
    let conditions = &canary.status.as_ref()?.conditions;
    let with = |type_: &str, wanted: &str| {
        condition(conditions, type_).filter(|condition| condition.status == wanted)
    };
    let exceeded = with("DeadlineExceeded", "True")
        .map(|condition| (condition, "promote or abort it, or give it more traffic"));
    let short = with("ProgressDeadline", "False")
        .map(|condition| (condition, "the workload itself goes on; only tools that wait for it fail"));
    let (condition, hint) = exceeded.or(short)?;
    Some(of_canary(canary, DEADLINES, false, &condition.message, hint))
}

#[cfg(test)]
mod tests;
