//! What is shown, what is refused, and what is written.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};
use tulle_crds::{Canary, CanaryAction, CanarySpec, CanaryStatus, WorkloadKind};
use tulle_mesh::query::Evidence;

use super::absent;
use super::action::{Undone, Verb, annotation, is_refused, is_taken, late, moved_on, patch, refusal};
use super::attempts;
use super::pods::{Gate, PodSeen, Target, is_observed};
use super::status::{Rest, gives_up};
use super::undo::{revision_to_restore, template_of, unmanaged};
use super::view::{End, View, end, on_its_way};
use crate::exit::CliError;
use crate::objects::Unread;
use crate::output::Output;

const VERBS: [Verb; 5] = [Verb::Promote, Verb::Pause, Verb::Resume, Verb::Abort, Verb::Retry];

fn now() -> Timestamp {
    "2026-12-01T12:00:00Z".parse().unwrap()
}

fn canary(status: Value) -> Canary {
    serde_json::from_value(json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "Canary",
        "metadata": {"name": "web", "namespace": "shop", "creationTimestamp": "2026-12-01T10:00:00Z"},
        "spec": {"target": {"kind": "Deployment", "name": "web"}},
        "status": status,
    }))
    .unwrap()
}

fn status(phase: &str) -> CanaryStatus {
    let status = json!({
        "phase": phase, "target": "Deployment/web", "approvedRevision": "old", "canaryRevision": "new", "step": 1,
    });
    serde_json::from_value(status).unwrap()
}

fn in_progress() -> Canary {
    canary(json!({
        "phase": "Progressing", "target": "Deployment/web", "approvedRevision": "7d9f", "canaryRevision": "5d4f",
        "step": 1, "stepSummary": "2/5", "weight": 5, "weightSummary": "1%", "verdict": "Inconclusive",
        "evidenceSummary": "canary 1 of 40 failed: 160 more requests to the canary are needed",
        "started": "2026-12-01T11:55:00Z",
        "evidence": {"tests": [
            {"name": "errors", "windows": [{"number": 0, "blocks": 30, "logEvidence": [0.0, 0.0]}]},
            {"name": "errorsDispersion", "windows": [{"number": 0, "blocks": 30, "logEvidence": [1.0]}]},
            {"name": "latency", "windows": []},
        ]},
        "conditions": [{
            "type": "Acknowledged", "status": "False", "reason": "Propagating", "lastTransitionTime": "2026-12-01T11:58:00Z",
            "message": "5% is not acknowledged by all sidecars; waiting for pod shop/front-1",
        }],
    }))
}

fn pod(name: &str, revision: &str, ready: bool, gate: Option<bool>) -> PodSeen {
    let truth = |is: bool| if is { "True" } else { "False" };
    let gates: Vec<Value> =
        gate.map(|_| json!({"conditionType": "tulle.dev/approved"})).into_iter().collect();
    let mut conditions = vec![json!({"type": "Ready", "status": truth(ready)})];
    conditions.extend(gate.map(|open| json!({"type": "tulle.dev/approved", "status": truth(open)})));
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {
            "name": name, "labels": {"pod-template-hash": revision}, "creationTimestamp": "2026-12-01T11:57:00Z",
        },
        "spec": {"containers": [], "readinessGates": gates},
        "status": {"conditions": conditions, "containerStatuses": [
            {"name": "web", "image": "web", "imageID": "", "ready": ready, "restartCount": 2},
        ]},
    }))
    .unwrap();
    PodSeen::of(&pod, WorkloadKind::Deployment)
}

#[test]
fn a_rollout_is_shown_with_its_evidence_and_the_pods_of_each_revision() {
    let pods = [
        pod("web-5d4f-a", "5d4f", true, Some(true)),
        pod("web-5d4f-b", "5d4f", false, Some(false)),
        pod("web-7d9f-a", "7d9f", true, None),
    ];
    let text = View::of(&in_progress(), &pods).text(now(), &Output::default());
    let expected = "\
Canary:   shop/web
Target:   Deployment/web
Phase:    Progressing
Step:     2/5
Weight:   5% asked for, 1% acknowledged
Verdict:  Inconclusive
Evidence: canary 1 of 40 failed: 160 more requests to the canary are needed
Waiting:  5% is not acknowledged by all sidecars; waiting for pod shop/front-1
Started:  5m ago

REVISION / POD   STATE       GATE   RESTARTS   AGE
7d9f (stable)    1/1 ready
└─ web-7d9f-a    ready       none   2          3m
5d4f (canary)    1/2 ready
├─ web-5d4f-a    ready       open   2          3m
└─ web-5d4f-b    not ready   shut   2          3m

TEST      WORSE       OVER
errors    0.50 to 1   5m
latency   -           0s
";
    assert_eq!(text, expected);
}

#[test]
fn a_pod_that_nothing_but_its_gate_keeps_from_being_ready_serves_or_is_held_back() {
    let held = |name: &str| PodSeen { held: true, ..pod(name, "5d4f", false, Some(false)) };
    let shown =
        |status: Value, pods: &[PodSeen]| View::of(&canary(status), pods).text(now(), &Output::default());
    let with = |asked: u32, acknowledged: &str| {
        json!({"phase": "Progressing", "approvedRevision": "7d9f", "canaryRevision": "5d4f", "weight": asked,
            "weightSummary": acknowledged})
    };
    let crashes = pod("web-5d4f-b", "5d4f", false, Some(false));
    let text = shown(with(60, "60%"), &[held("web-5d4f-a"), crashes]);
    let expected = "\
5d4f (canary)     1/2 serving
├─ web-5d4f-a     serving       shut   2          3m
└─ web-5d4f-b     not ready     shut   2          3m

serving: sidecars send the pod its share. Kubernetes shows it as not ready until the promotion opens its gate.
";
    let squeezed = |text: &str| -> Vec<String> {
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    };
    let (text, expected) = (squeezed(&text), squeezed(expected));
    assert!(text.ends_with(&expected), "{text:?}");
    for (asked, acknowledged, state) in
        [(0, "0%", "held back"), (0, "", "held back"), (5, "0%", "serving"), (0, "5%", "serving")]
    {
        let text = shown(with(asked, acknowledged), &[held("web-5d4f-a")]);
        assert!(text.contains(&format!("1/1 {state}")), "{asked} {acknowledged}: {text}");
        assert_eq!(text.contains("serving: sidecars"), state == "serving", "{text}");
    }
    let ending = PodSeen { terminating: true, ..held("web-5d4f-a") };
    assert!(shown(with(60, "60%"), &[ending]).contains("0/1 ready"));
}

#[test]
fn a_pod_that_is_not_ready_is_shown_with_the_reason_that_kubernetes_has() {
    let container = |name: &str, state: Value| json!({"name": name, "image": "i", "imageID": "", "ready": false, "restartCount": 0, "state": state});
    let waiting = |reason: &str| json!({"waiting": {"reason": reason}});
    let why = |scheduled: Value, init: Value, web: Value| {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web-5d4f-a", "labels": {"pod-template-hash": "5d4f"}},
            "spec": {"containers": []},
            "status": {
                "conditions": [scheduled],
                "initContainerStatuses": [container("tulle-init", init)],
                "containerStatuses": [container("web", web)],
            },
        }))
        .unwrap();
        PodSeen::of(&pod, WorkloadKind::Deployment)
    };
    let (placed, ended) =
        (json!({"type": "PodScheduled", "status": "True"}), json!({"terminated": {"exitCode": 0}}));
    let homeless = json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable"});
    let crashed = json!({"terminated": {"exitCode": 1, "reason": "Error"}});
    let running = json!({"running": {}});
    for (pod, expected) in [
        (why(placed.clone(), ended.clone(), waiting("ImagePullBackOff")), Some("web: ImagePullBackOff")),
        (why(placed.clone(), ended.clone(), crashed.clone()), Some("web: Error")),
        (why(placed.clone(), crashed, waiting("PodInitializing")), Some("tulle-init: Error")),
        (why(homeless, json!({}), json!({})), Some("Unschedulable")),
        (why(placed.clone(), ended.clone(), running), None),
    ] {
        assert_eq!(pod.why.as_deref(), expected);
    }
    let crashes = why(placed, ended, waiting("CrashLoopBackOff"));
    let text = View::of(&in_progress(), &[crashes]).text(now(), &Output::default());
    assert!(text.contains("web-5d4f-a    not ready (web: CrashLoopBackOff)   none"), "{text}");
}

#[test]
fn an_empty_list_of_a_namespace_that_does_not_exist_is_an_error() {
    let error = absent(&Ok(None), "nope").unwrap();
    assert_eq!((error.to_string().as_str(), error.code()), ("namespace nope does not exist", 1));
    assert_eq!(absent(&Ok(Some(json!({}))), "shop"), None);
    assert_eq!(absent(&Err(Unread::Forbidden("no".into())), "shop"), None, "it may exist");
}

#[test]
fn a_pod_is_held_by_its_gate_only_where_everything_else_is_ready() {
    let held = |containers: &str, other: &str, approved: &str| {
        let condition = |type_: &str, status: &str| json!({"type": type_, "status": status});
        let gate = |type_: &str| json!({"conditionType": type_});
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "web"},
            "spec": {"containers": [], "readinessGates": [gate("tulle.dev/approved"), gate("example.com/lb")]},
            "status": {"conditions": [
                condition("Ready", "False"), condition("ContainersReady", containers),
                condition("tulle.dev/approved", approved), condition("example.com/lb", other),
            ]},
        }))
        .unwrap();
        PodSeen::of(&pod, WorkloadKind::Deployment).held
    };
    assert!(held("True", "True", "False"));
    assert!(!held("False", "True", "False"), "it crashes");
    assert!(!held("True", "False", "False"), "another gate holds it too");
    assert!(!held("True", "True", "True"), "its gate is open");
}

#[test]
fn why_a_rollout_failed_is_shown_once_and_before_what_is_left_to_say() {
    let failed = |phase: &str, evidence: &str, serves: &str| {
        let condition = |type_: &str, status: &str| {
            json!({"type": type_, "status": status, "reason": "Failed", "lastTransitionTime": "2026-12-01T11:58:00Z",
                "message": "aborted by hand"})
        };
        let canary = canary(json!({
            "phase": phase, "canaryRevision": "5d4f", "evidenceSummary": evidence,
            "conditions": [condition("Promoted", "False"), condition("ServingFailedRevision", serves)],
        }));
        View::of(&canary, &[]).text(now(), &Output::default())
    };
    let text = failed("Failed", "aborted by hand", "True");
    assert!(text.contains("Reason:   aborted by hand\n"), "{text}");
    assert_eq!(text.matches("aborted by hand").count(), 1, "{text}");
    let text = failed("Failed", "canary 1 of 40 failed", "False");
    assert!(text.contains("Reason:   aborted by hand\nEvidence: canary 1 of 40 failed\n"), "{text}");
    // The condition outlives the rollout that it is about.
    assert!(!failed("Progressing", "", "False").contains("aborted"));
}

#[test]
fn what_a_step_asks_for_is_shown_in_the_words_of_what_is_acknowledged() {
    let asked = |weight: u32, steering: Value| {
        View::of(&canary(json!({"phase": "Progressing", "weight": weight, "steering": steering})), &[]).asked
    };
    let matches = json!([{"header": {"name": "x-group", "exact": "insider"}}]);
    assert_eq!(asked(0, json!(null)), "0%");
    assert_eq!(asked(0, json!({"match": matches})), "match");
    assert_eq!(asked(25, json!({"match": matches, "mirror": 10})), "25%, match, mirror 10%");
    assert_eq!(asked(5, json!({"sticky": "version"})), "5%");
}

#[test]
fn an_abort_says_what_the_revision_still_gets() {
    let done = |weight: u32, acknowledged: &str| {
        let after = CanaryStatus { weight, weight_summary: acknowledged.into(), ..status("Failed") };
        Verb::Abort.done("new", &after)
    };
    assert!(done(0, "0%").contains("failed and gets no traffic;"));
    assert!(done(0, "30%").contains("acknowledged that (30% until then);"));
    assert!(done(75, "50%").contains("keeps 75% of the traffic"));
    let undone = Verb::Abort.done("new", &status("Stable"));
    assert!(undone.ends_with("is not rolled out any more: the target is back at revision old"), "{undone}");
}

#[test]
fn attempts_are_shown_by_version_and_pod() {
    let evidence: Evidence = serde_json::from_value(json!({
        "leader": true, "blockStart": 1,
        "canary": {"revision": "5d4f", "attempts": 1240, "failures": 13, "unreached": 1, "clientErrors": 2},
        "stable": {"revision": "7d9f", "attempts": 9000, "failures": 4},
        "pods": [
            {"name": "web-5d4f-a", "version": "canary", "revision": "5d4f", "attempts": 40, "failures": 3, "p50Ms": 1.5,
                "p95Ms": 12.0, "p99Ms": 42.0},
            {"name": "web-5d4f-b", "version": "canary", "revision": "5d4f", "attempts": 2, "failures": 2, "unreached": 2},
        ],
    }))
    .unwrap();
    let expected = "\
Attempts in the rollout by version, and in the running block of ten seconds by pod:
VERSION / POD   REVISION   ATTEMPTS   FAILED   UNREACHED   4XX   P50     P95    P99
stable          7d9f       9000       4        0           0     -       -      -
canary          5d4f       1240       13       1           2     -       -      -
├─ web-5d4f-a   5d4f       40         3        0           0     1.5ms   12ms   42ms
└─ web-5d4f-b   5d4f       2          2        2           0     -       -      -
";
    assert_eq!(attempts::text(&evidence), expected);
    let follower = Evidence { leader: false, pods: Vec::new(), block_start: None, ..evidence.clone() };
    let text = attempts::text(&follower);
    assert!(text.contains("1240") && text.ends_with("as the Canary's status has them.\n"), "{text}");
    let silent = attempts::text(&Evidence { pods: Vec::new(), ..evidence });
    assert!(silent.ends_with("No attempt counts in the running block of ten seconds so far.\n"), "{silent}");
}

#[test]
fn a_canary_at_rest_is_shown_without_what_belongs_to_a_rollout() {
    let rest = canary(json!({"phase": "Stable", "approvedRevision": "7d9f", "canaryRevision": "5d4f"}));
    let text = View::of(&rest, &[pod("web-7d9f-a", "7d9f", true, None)]).text(now(), &Output::default());
    let expected = "\
Canary:   shop/web
Target:   Deployment/web
Phase:    Stable

REVISION / POD   STATE       GATE   RESTARTS   AGE
7d9f (stable)    1/1 ready
└─ web-7d9f-a    ready       none   2          3m
";
    assert_eq!(text, expected);
}

#[test]
fn a_list_has_the_columns_of_the_resource_and_no_empty_cell() {
    let rest = canary(json!({"phase": "Stable"}));
    let table = super::table([&in_progress(), &rest], true, now());
    assert_eq!(
        table.to_string(),
        "\
NAMESPACE   NAME   TARGET           PHASE         STEP   WEIGHT   VERDICT        AGE    EVIDENCE
shop        web    Deployment/web   Progressing   2/5    1%       Inconclusive   120m   canary 1 of 40 failed: 160 more requests to the canary are needed
shop        web    Deployment/web   Stable        -      -        -              120m   -
"
    );
}

#[test]
fn the_gate_of_a_pod_is_none_shut_or_open() {
    assert_eq!(pod("a", "r", true, None).gate, Gate::None);
    assert_eq!(pod("a", "r", true, Some(false)).gate, Gate::Shut);
    assert_eq!(pod("a", "r", true, Some(true)).gate, Gate::Open);
}

#[test]
fn an_action_that_would_do_nothing_is_refused_with_the_reason() {
    for (verb, does, phases) in [
        (Verb::Promote, true, vec!["Progressing", "Paused", "Failed"]),
        (Verb::Promote, false, vec!["Waiting", "Stable", "Promoting"]),
        (Verb::Pause, true, vec!["Progressing"]),
        (Verb::Pause, false, vec!["Waiting", "Stable", "Paused", "Promoting", "Failed"]),
        (Verb::Resume, true, vec!["Paused"]),
        (Verb::Resume, false, vec!["Waiting", "Stable", "Progressing", "Promoting", "Failed"]),
        (Verb::Abort, true, vec!["Progressing", "Paused", "Promoting"]),
        (Verb::Abort, false, vec!["Waiting", "Stable", "Failed"]),
        (Verb::Retry, true, vec!["Failed"]),
        (Verb::Retry, false, vec!["Waiting", "Stable", "Progressing", "Paused", "Promoting"]),
    ] {
        for phase in phases {
            let refused = refusal(verb, &status(phase), None);
            assert_eq!(refused.is_none(), does, "{verb:?} while {phase}: {refused:?}");
            assert!(refused.is_none_or(|why| why.contains(phase)), "{verb:?} while {phase}");
        }
    }
}

#[test]
fn an_action_for_another_revision_is_refused_and_names_both() {
    let why = refusal(Verb::Promote, &status("Progressing"), Some("other")).unwrap();
    assert!(why.contains("rolls out revision new, not other"), "{why}");
    assert_eq!(refusal(Verb::Promote, &status("Progressing"), Some("new")), None);
    let none = CanaryStatus { canary_revision: String::new(), ..status("Stable") };
    let why = refusal(Verb::Promote, &none, Some("other")).unwrap();
    assert!(why.contains("no revision"), "{why}");
    let why = refusal(Verb::Abort, &status("Promoting"), Some("")).unwrap();
    assert!(why.contains("rolls out revision new by now"), "the page has shown none: {why}");
}

#[test]
fn a_form_of_another_phase_or_step_is_out_of_date_although_its_action_would_do_something() {
    let paused = CanaryStatus { step_summary: "2/5".into(), ..status("Paused") };
    assert_eq!(moved_on(&paused, "Paused/1"), None);
    // In each of these phases promote would do something.
    for seen in ["Progressing/1", "Failed/1", "Paused/0", "Paused/2", "Paused", ""] {
        let now = moved_on(&paused, seen).unwrap();
        assert!(now.starts_with("is Paused at step 2/5 by now"), "{seen}: {now}");
    }
    let failed = moved_on(&status("Failed"), "Paused/1").unwrap();
    assert!(failed.starts_with("is Failed by now"), "{failed}");
}

#[test]
fn what_is_written_names_the_revision_and_is_what_the_operator_reads() {
    for verb in [Verb::Promote, Verb::Resume, Verb::Abort, Verb::Retry] {
        let requested = CanaryAction::parse(&annotation(verb, "5d4f", "cli-1")).unwrap();
        assert_eq!(requested.action.name(), verb.name());
        assert_eq!(Verb::named(verb.name()), Some(verb));
        assert_eq!((requested.revision.as_deref(), requested.id.as_str()), (Some("5d4f"), "cli-1"));
    }
    assert_eq!(annotation(Verb::Pause, "", "cli-1"), "pause@cli-1");
    let written = json!({
        "metadata": {"resourceVersion": "7", "annotations": {"tulle.dev/action": "abort:5d4f@cli-1"}},
    });
    assert_eq!(patch(Some("7"), "abort:5d4f@cli-1"), written);
}

#[test]
fn an_action_is_taken_once_its_id_is_in_the_status() {
    let canary = canary(json!({"lastAction": "b", "usedActions": ["b", "a"]}));
    assert!(is_taken(&canary, "a") && is_taken(&canary, "b") && !is_taken(&canary, "c"));
}

#[test]
fn an_action_that_is_late_is_over_only_if_its_request_does_not_stand_any_more() {
    let within = std::time::Duration::from_secs(20);
    let with = |action: &str| {
        let mut canary = canary(json!({"phase": "Progressing"}));
        canary.metadata.annotations = Some([("tulle.dev/action".to_owned(), action.to_owned())].into());
        canary
    };
    let judge = |last: Result<Canary, CliError>| late(&last, Verb::Pause, "cli-1", within);
    let stands = judge(Ok(with("pause:new@cli-1")));
    let Undone::Unconfirmed(CliError::TimedOut(why)) = &stands else { panic!("{stands:?}") };
    assert!(why.contains("within 20 s; the request still stands"), "{why}");
    for gone in [with("abort:new@cli-2"), with("pause:new@cli-11"), canary(json!({}))] {
        let undone = judge(Ok(gone));
        assert!(matches!(&undone, Undone::Not(CliError::Failed { what, .. }) if what.contains("not stand")));
    }
    let unknown = judge(Err(CliError::failed("no answer")));
    let Undone::Unconfirmed(CliError::TimedOut(why)) = &unknown else { panic!("{unknown:?}") };
    assert!(why.contains("is unknown: no answer"), "{why}");
}

#[test]
fn without_a_refusal_of_the_api_server_an_action_may_have_been_written() {
    let answered = |code: u16| {
        let mut status = kube::core::Status::failure("no", "");
        status.code = code;
        kube::Error::Api(Box::new(status))
    };
    for code in [403, 404, 409, 422, 429] {
        assert!(is_refused(&answered(code)), "{code}");
    }
    for code in [500, 503, 504] {
        assert!(!is_refused(&answered(code)), "{code}");
    }
    assert!(!is_refused(&kube::Error::LinesCodecMaxLineLengthExceeded), "no answer");
}

#[test]
fn the_effect_of_an_action_is_read_from_the_status() {
    let before = status("Progressing");
    let promoted = CanaryStatus { approved_revision: "new".into(), ..status("Promoting") };
    let next_step = CanaryStatus { step: 2, ..status("Paused") };
    assert!(Verb::Promote.has_effect(&before, &promoted));
    assert!(Verb::Pause.has_effect(&before, &status("Paused")));
    assert!(Verb::Resume.has_effect(&status("Paused"), &next_step), "the next step may be a pause too");
    assert!(Verb::Abort.has_effect(&before, &status("Failed")));
    assert!(Verb::Abort.has_effect(&before, &status("Stable")), "an undo came first");
    let approved = CanaryStatus { approved_revision: "new".into(), ..status("Stable") };
    assert!(!Verb::Abort.has_effect(&before, &approved), "it was promoted meanwhile");
    assert!(Verb::Retry.has_effect(&status("Failed"), &status("Progressing")));
    for (verb, phase) in
        VERBS.into_iter().zip(["Progressing", "Progressing", "Paused", "Progressing", "Failed"])
    {
        assert!(!verb.has_effect(&status(phase), &status(phase)), "{verb:?}");
    }
}

#[test]
fn a_watched_rollout_ends_well_only_where_its_own_revision_is_approved() {
    assert_eq!(end(Some("new"), &status("Promoting")), None);
    let promoted = CanaryStatus { approved_revision: "new".into(), ..status("Stable") };
    assert!(matches!(end(Some("new"), &promoted), Some(End::Promoted(_))));
    let back = end(Some("new"), &status("Stable"));
    assert!(matches!(&back, Some(End::Failed(why)) if why.contains("back at revision old")), "{back:?}");
    let mut stalled = promoted.clone();
    stalled.history = serde_json::from_value(json!([
        {"revision": "new", "outcome": "PromotionStalled", "because": "1 of 3", "ended": "2026-12-01T11:00:00Z"},
    ]))
    .unwrap();
    assert!(matches!(end(Some("new"), &stalled), Some(End::Failed(_))), "pods of the old revision are left");
    assert!(matches!(end(None, &status("Stable")), Some(End::Promoted(_))), "nothing to wait for");
    let failed = canary(json!({"phase": "Failed", "canaryRevision": "new", "history": [
        {"revision": "new", "outcome": "Failed", "because": "aborted by hand", "ended": "2026-12-01T11:00:00Z"},
    ]}));
    let ended = end(Some("new"), &failed.status.unwrap());
    assert_eq!(ended, Some(End::Failed("revision new failed: aborted by hand".into())));
    assert_eq!(on_its_way(&status("Paused")), Some("new"));
    assert_eq!(on_its_way(&status("Stable")), None);
}

#[test]
fn undo_restores_the_approved_revision_of_a_deployment_and_says_the_command_for_others() {
    let spec = |kind: &str| -> CanarySpec {
        serde_json::from_value(json!({"target": {"kind": kind, "name": "web"}})).unwrap()
    };
    let deployment = spec("Deployment");
    assert_eq!(revision_to_restore(&deployment, &status("Failed"), "shop"), Ok("old"));
    let set = revision_to_restore(&spec("StatefulSet"), &status("Failed"), "shop").unwrap_err();
    let printed = set.message(&Output::default());
    assert!(printed.contains("hint: kubectl rollout undo statefulset/web -n shop"), "{printed}");
    let none = CanaryStatus { approved_revision: String::new(), ..status("Failed") };
    for (status, why) in [
        (status("Stable"), "no rollout is in progress"),
        (status("Promoting"), "is approved already"),
        (status("Waiting"), "no revision is approved yet"),
        (none, "no revision is approved yet"),
    ] {
        let error = revision_to_restore(&deployment, &status, "shop").unwrap_err();
        assert!(error.to_string().contains(why), "{:?}: {error}", status.phase);
    }
}

#[test]
fn a_restored_template_has_no_hash_and_keeps_fields_that_nobody_here_knows() {
    let set = json!({"spec": {"template": {
        "metadata": {"labels": {"app": "web", "pod-template-hash": "5d4f"}}, "spec": {"newField": 1},
    }}});
    let template = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"newField": 1}});
    assert_eq!(template_of(&set), Some(template));
    assert_eq!(template_of(&json!({})), None);
}

#[test]
fn a_deployment_that_a_tool_would_write_again_is_not_restored() {
    let annotations = json!({"argocd.argoproj.io/tracking-id": "shop:apps/Deployment:shop/web"});
    let managed = json!({"metadata": {"name": "web", "annotations": annotations}});
    let error = unmanaged(&managed, "shop", "web", false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Deployment shop/web is managed by Argo CD: revert the commit, or use --force"
    );
    assert_eq!(unmanaged(&managed, "shop", "web", true), Ok(()));
    assert_eq!(unmanaged(&json!({"metadata": {"name": "web"}}), "shop", "web", false), Ok(()));
}

#[test]
fn a_target_is_at_rest_only_after_two_looks_that_are_five_seconds_apart() {
    let start = tokio::time::Instant::now();
    let after = |seconds: u64| start + std::time::Duration::from_secs(seconds);
    let mut rest = Rest::default();
    assert!(!rest.is_over(true, start), "one look");
    assert!(!rest.is_over(true, after(4)));
    assert!(!rest.is_over(false, after(5)), "a pod of a new revision");
    assert!(!rest.is_over(true, after(6)));
    assert!(rest.is_over(true, after(11)));
}

#[test]
fn a_target_with_a_new_template_or_pods_of_another_revision_is_not_at_rest() {
    let target = |pods: Vec<PodSeen>, observed| Target { pods, observed };
    assert!(target(vec![pod("a", "old", true, None)], true).has_only("old"));
    assert!(!target(vec![pod("a", "old", true, None)], false).has_only("old"));
    assert!(!target(vec![pod("a", "old", true, None), pod("b", "new", false, None)], true).has_only("old"));
    let ending = PodSeen { terminating: true, ..pod("b", "new", false, None) };
    assert!(target(vec![ending], true).has_only("old"));
    assert!(is_observed(Some(2), &json!({"status": {"observedGeneration": 2}})));
    assert!(!is_observed(Some(3), &json!({"status": {"observedGeneration": 2}})));
    assert!(!is_observed(Some(1), &json!({})));
}

#[test]
fn with_a_time_limit_only_the_first_look_must_succeed() {
    assert!(gives_up(false, 1, true) && gives_up(false, 1, false));
    assert!(!gives_up(true, 100, true));
    assert!(!gives_up(true, 6, false) && gives_up(true, 7, false));
}
