//! What a user can do about a rollout that does not go on by itself: it is paused, or its version has failed.
//!
//! In: a Canary. Out: a sentence with the commands to type. Never decides whether an action has an effect: `action` does.

use kube::ResourceExt as _;
use tulle_crds::{Canary, Phase, WorkloadKind};

use super::undo::singular;

/// What has paused the rollout, and the command that ends the pause; `None`: it is not paused.
pub(super) fn after_pause(canary: &Canary) -> Option<String> {
    let status = canary.status.as_ref().filter(|status| status.phase == Phase::Paused)?;
    let by = match status.paused_by_hand {
        true => "by hand".to_owned(),
        // More requests, which the evidence may ask for, do not end it.
        false => format!("by step {}, whatever the evidence", status.step.saturating_add(1)),
    };
    Some(format!("paused {by}: {} goes on", command(canary, "resume")))
}

/// What to do about a version that has failed; `None`: it has not.
pub(super) fn after_failure(canary: &Canary) -> Option<String> {
    let status = canary.status.as_ref().filter(|status| status.phase == Phase::Failed)?;
    let retry = command(canary, "retry");
    let mut text =
        format!("apply a corrected version; or {retry} tries revision {} again", status.canary_revision);
    if !status.approved_revision.is_empty() {
        let restore = match canary.spec.target.kind {
            WorkloadKind::Deployment => command(canary, "undo"),
            kind @ (WorkloadKind::StatefulSet | WorkloadKind::DaemonSet) => {
                let namespace = canary.namespace().unwrap_or_default();
                format!(
                    "`kubectl rollout undo {}/{} -n {namespace}`",
                    singular(kind),
                    canary.spec.target.name
                )
            }
        };
        text.push_str(&format!("; or {restore} restores revision {}", status.approved_revision));
    }
    Some(text)
}

fn command(canary: &Canary, action: &str) -> String {
    format!("`tulle canary {action} {} -n {}`", canary.name_any(), canary.namespace().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use serde_json::{Value, json};

    use super::super::view::View;
    use super::*;
    use crate::output::Output;

    fn canary(kind: &str, status: Value) -> Canary {
        serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"target": {"kind": kind, "name": "front"}}, "status": status,
        }))
        .unwrap()
    }

    fn shown(canary: &Canary) -> String {
        let now: Timestamp = "2026-12-01T12:00:00Z".parse().unwrap();
        View::of(canary, &[]).text(now, &Output::default())
    }

    #[test]
    fn a_pause_names_what_has_paused_and_the_command_that_goes_on() {
        let paused = |by_hand: bool| {
            canary(
                "Deployment",
                json!({"phase": "Paused", "step": 1, "pausedByHand": by_hand, "canaryRevision": "5d4f"}),
            )
        };
        let text = shown(&paused(false));
        let line =
            "Waiting:  paused by step 2, whatever the evidence: `tulle canary resume web -n shop` goes on\n";
        assert!(text.contains(line), "{text}");
        let text = shown(&paused(true));
        assert!(
            text.contains("Waiting:  paused by hand: `tulle canary resume web -n shop` goes on\n"),
            "{text}"
        );
        assert_eq!(after_pause(&canary("Deployment", json!({"phase": "Progressing"}))), None);
    }

    #[test]
    fn a_failed_version_is_shown_with_what_to_do_next() {
        let status = |approved: &str| json!({"phase": "Failed", "canaryRevision": "5d4f", "approvedRevision": approved});
        let text = shown(&canary("Deployment", status("7d9f")));
        let line = "Next:     apply a corrected version; or `tulle canary retry web -n shop` tries revision 5d4f again; or `tulle canary undo web -n shop` restores revision 7d9f\n";
        assert!(text.contains(line), "{text}");
        let set = after_failure(&canary("StatefulSet", status("7d9f"))).unwrap();
        assert!(
            set.ends_with("; or `kubectl rollout undo statefulset/front -n shop` restores revision 7d9f"),
            "{set}"
        );
        let first = after_failure(&canary("Deployment", status(""))).unwrap();
        assert!(first.ends_with("tries revision 5d4f again"), "{first}");
        assert!(!shown(&canary("Deployment", json!({"phase": "Progressing"}))).contains("Next:"));
    }

    #[test]
    fn a_rollout_waits_for_the_right_to_undo_only_once_its_version_has_failed() {
        let with_undo = |phase: &str| {
            shown(&canary(
                "Deployment",
                json!({"phase": phase, "canaryRevision": "5d4f", "conditions": [{
                "type": "Undo", "status": "False", "reason": "NotPermitted", "message": "the operator may not",
                "lastTransitionTime": "2026-12-01T11:58:00Z"}]}),
            ))
        };
        for phase in ["Progressing", "Paused"] {
            assert!(!with_undo(phase).contains("the operator may not"), "{phase}");
        }
        assert!(with_undo("Failed").contains("Waiting:  the operator may not\n"));
    }

    #[test]
    fn requests_without_an_answer_are_not_shown_as_a_comparison() {
        let window = json!({"number": 0, "blocks": 3, "logEvidence": [182.0]});
        let text = shown(&canary(
            "Deployment",
            json!({"phase": "Progressing", "canaryRevision": "5d4f",
            "evidence": {"tests": [{"name": "unanswered", "windows": [window]}]}}),
        ));
        assert!(!text.contains("unanswered") && !text.contains("a million"), "{text}");
    }
}
