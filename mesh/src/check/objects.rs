//! MeshPolicies and Canaries, by the conditions in their status.

use super::words::duration;
use super::{Check, Finding, LATE, View, list as checks, or_ok};

/// A condition in the status of an object.
#[derive(Clone, Copy, Debug)]
pub struct Condition<'a> {
    /// Its type.
    pub type_: &'a str,
    /// `True`, `False` or `Unknown`.
    pub status: &'a str,
    /// Its reason.
    pub reason: &'a str,
    /// Its message.
    pub message: &'a str,
    /// Since when it has this status, in Unix seconds; `None`: it does not say.
    pub since: Option<i64>,
}

/// A MeshPolicy.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// How far it has come.
    pub state: PolicyState<'a>,
}

/// How far a MeshPolicy has come.
#[derive(Clone, Copy, Debug)]
pub enum PolicyState<'a> {
    /// Its newest version cannot be decoded.
    Unreadable {
        /// Why.
        error: &'a str,
    },
    /// The object was read.
    Read {
        /// Its generation.
        generation: i64,
        /// The generation that its status is about; `None`: it has no status.
        observed: Option<i64>,
        /// Its condition Ready.
        ready: Option<Condition<'a>>,
    },
}

/// T0801: every MeshPolicy is enforced.
pub fn policies(policies: &[Policy<'_>], view: &View<'_>) -> Vec<Finding> {
    let faults = policies.iter().filter_map(|policy| {
        let Policy { namespace, name, .. } = policy;
        let found = policy_fault(policy, view.now)?;
        Some(found.fix(format!("kubectl -n {namespace} describe meshpolicy {name}")))
    });
    or_ok(faults.collect(), || checks::POLICIES.ok(format!("{} MeshPolicies", policies.len())))
}

fn policy_fault(policy: &Policy<'_>, now: i64) -> Option<Finding> {
    let name = format!("MeshPolicy {}/{}", policy.namespace, policy.name);
    let error = |found: String, hint: &str| Some(checks::POLICIES.error(found).hint(hint));
    let warning = |found: String, hint: &str| Some(checks::POLICIES.warning(found).hint(hint));
    let (generation, observed, ready) = match policy.state {
        PolicyState::Unreadable { error: why } => {
            return error(format!("{name}: Invalid: {why}"), NOT_ENFORCED);
        }
        PolicyState::Read { generation, observed, ready } => (generation, observed, ready),
    };
    let is_observed = observed.is_some_and(|observed| observed >= generation);
    let Some(ready) = ready.filter(|_| is_observed) else {
        let hint = "the leading operator writes it within seconds; see whether one leads";
        return warning(format!("{name}: its present version has no status"), hint);
    };
    let found = format!("{name}: {}: {}", ready.reason, ready.message);
    let since = ready.since.map_or(0, |since| now.saturating_sub(since));
    // The reasons are those of `tulle_crds::reason`, on which this crate does not depend. Both callers have a test which
    // hands them in.
    match ready.reason {
        "Invalid" => error(found, NOT_ENFORCED),
        "Conflicted" => error(found, "the older policy holds: delete one of the two sections"),
        "RefusedBySidecar" => {
            error(found, "restart the pods, which brings a sidecar that has what the policy needs")
        }
        "TargetNotFound" => error(found, "correct the target, or create it"),
        "NoWorkloads" => warning(found, "it selects no pod with a sidecar: compare the labels"),
        "Propagating" if since > LATE => warning(
            format!("{found} (for {})", duration(since)),
            "`tulle pods` lists the sidecars that are behind or not connected",
        ),
        _ => None,
    }
}

/// The hint for a policy with a value that is invalid.
const NOT_ENFORCED: &str = "nothing of it is enforced: correct the value";

/// A Canary.
#[derive(Clone, Debug)]
pub struct Canary<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// It waits for its target.
    pub is_waiting: bool,
    /// Its conditions.
    pub conditions: Vec<Condition<'a>>,
}

impl<'a> Canary<'a> {
    fn with(&self, type_: &str, status: &str) -> Option<&Condition<'a>> {
        self.conditions
            .iter()
            .find(|condition| condition.type_ == type_)
            .filter(|found| found.status == status)
    }

    /// The finding `found` about it: `is_error` or a warning.
    fn finding(&self, check: &Check, is_error: bool, found: &str, hint: &str) -> Finding {
        let Self { namespace, name, .. } = self;
        let found = format!("Canary {namespace}/{name}: {found}");
        let finding = if is_error { check.error(found) } else { check.warning(found) };
        finding.hint(hint).fix(format!("kubectl -n {namespace} describe canary {name}"))
    }

    /// The command that shows its rollout, with the evidence and what to do next.
    fn status_command(&self) -> String {
        format!("tulle canary status {} -n {}", self.name, self.namespace)
    }
}

/// T0901: every Canary is valid, and none is stuck, has failed, is held by the judge or lacks ready pods for long. T0902: no
/// rollout has passed its deadline undecided.
pub fn canaries(canaries: &[Canary<'_>]) -> Vec<Finding> {
    let count = format!("{} Canaries", canaries.len());
    let mut findings = or_ok(canaries.iter().filter_map(stuck).collect(), || checks::CANARIES.ok(&*count));
    findings.extend(or_ok(canaries.iter().filter_map(late).collect(), || checks::DEADLINES.ok(&*count)));
    findings
}

/// What keeps a Canary from working.
fn stuck(canary: &Canary<'_>) -> Option<Finding> {
    let finding = |is_error, condition: &Condition<'_>, hint| {
        let found = format!("{}: {}", condition.reason, condition.message);
        Some(canary.finding(&checks::CANARIES, is_error, &found, hint))
    };
    if let Some(stalled) = canary.with("Stalled", "True") {
        let hint = "the workload's controller does not replace the remaining pods: look at its events";
        return finding(true, stalled, hint);
    }
    if let Some(dial) = canary.conditions.iter().find(|condition| condition.reason == "ClientsDialPods") {
        let hint =
            "clients reach pods by their addresses, so no share can be set: let them use a ClusterIP Service";
        return finding(true, dial, hint);
    }
    let Some(not_ready) = canary.with("Ready", "False") else {
        let waits = failed(canary).or_else(|| unsplit(canary)).or_else(|| held(canary));
        return waits.or_else(|| short_of_pods(canary));
    };
    // A target that does not exist yet is what a Canary waits for when both are applied together.
    if canary.is_waiting {
        finding(false, not_ready, "create the target, or correct its name")
    } else {
        finding(true, not_ready, "new versions are not rolled out in steps")
    }
}

/// A version that has failed.
fn failed(canary: &Canary<'_>) -> Option<Finding> {
    canary.with("Progressing", "False").filter(|phase| phase.reason == "Failed")?;
    let found = match canary.with("Promoted", "False") {
        Some(promoted) => format!("Failed: {}", promoted.message),
        None => "Failed".to_owned(),
    };
    let Canary { namespace, name, .. } = canary;
    let hint = format!(
        "apply a corrected version, try this one again (tulle canary retry {name} -n {namespace}), or restore the approved one (tulle canary undo {name} -n {namespace})"
    );
    Some(canary.finding(&checks::CANARIES, false, &found, &hint).fix(canary.status_command()))
}

/// A step whose weight does not apply. The message has the Service, and what to do about it.
fn unsplit(canary: &Canary<'_>) -> Option<Finding> {
    let split = canary.with("Split", "False")?;
    let (is_error, hint) = match split.reason {
        "NoGate" => (true, "nothing holds the new pods back, so the version goes live unjudged"),
        // A target without clients may be meant to have none.
        "NoService" => (false, "the judge gets no requests: correct the Service, or promote by hand"),
        _ => (true, "the step waits: correct the Service, or promote or abort by hand"),
    };
    let found = format!("{}: {}", split.reason, split.message);
    Some(canary.finding(&checks::CANARIES, is_error, &found, hint))
}

/// How the operator ends the message of condition HeldByJudge once the version surely does not pass, or after five minutes.
/// A test compares it with the operator's source.
pub(super) const HELD_FOR_LONG: &str = "; an event of this rollout says why";

/// A version that the judge does not let pass, for longer than most doubts last.
fn held(canary: &Canary<'_>) -> Option<Finding> {
    let held = canary.with("HeldByJudge", "True")?;
    let message = held.message.strip_suffix(HELD_FOR_LONG)?;
    let Canary { namespace, name, .. } = canary;
    let hint = format!(
        "EVIDENCE says why; tulle canary promote {name} -n {namespace} accepts the version as it is, and abort takes its traffic away"
    );
    let found = format!("{}: {message}", held.reason);
    Some(canary.finding(&checks::CANARIES, false, &found, &hint).fix(canary.status_command()))
}

/// How the operator ends the message of condition Capacity after a minute. A test of the operator hands in its condition.
const LASTING: &str = "this has lasted for more than a minute";

/// A step that has waited for ready pods of the new version for a while.
fn short_of_pods(canary: &Canary<'_>) -> Option<Finding> {
    let short = canary.with("Capacity", "False").filter(|short| short.message.ends_with(LASTING))?;
    let found = format!("{}: {}", short.reason, short.message);
    let hint =
        "the step waits: find out why pods of the new version are missing or not ready, or raise maxSurge";
    let finding = canary.finding(&checks::CANARIES, false, &found, hint);
    // Where there are pods that are not ready, the message has the command that describes them.
    let command = short.message.split_once("see ").and_then(|(_, rest)| rest.split(';').next());
    Some(match command.filter(|command| command.starts_with("kubectl ")) {
        Some(command) => finding.fix(command),
        None => finding,
    })
}

/// A deadline that has passed without a decision.
fn late(canary: &Canary<'_>) -> Option<Finding> {
    let exceeded = canary.with("DeadlineExceeded", "True")?;
    let hint = "promote or abort it; more traffic helps only while its verdict is not Pass. If the holds of its steps add up to more than spec.deadline, raise the deadline";
    Some(canary.finding(&checks::DEADLINES, false, exceeded.message, hint))
}
