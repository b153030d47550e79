//! What changes around a rollout: gates that are missing, a Service or a target that is deleted, a target that is paused.

use super::*;

fn patient() -> World {
    World::new(json!({"steps": [{"weight": 5, "hold": "10s"}], "judge": {"minRequests": 1_000_000}}))
}

fn events(actions: &[Action], reason: EventReason) -> usize {
    actions.iter().filter(|a| matches!(a, Action::Event { reason: of, .. } if *of == reason)).count()
}

fn message(world: &World, type_: &str) -> String {
    world.status.conditions.iter().find(|found| found.type_ == type_).unwrap().message.clone()
}

/// Kubernetes has put pods without a gate in place of all others.
fn replace_all(world: &mut World) {
    world.target().pods = (0..4).map(|n| pod(&format!("new-{n}"), "new", false)).collect();
}

fn deploy_without_gate(world: &mut World) {
    world.deploy("new");
    *world.target().pods.last_mut().unwrap() = pod("new-0", "new", false);
}

#[test]
fn a_revision_without_gates_holds_its_step_and_serves_as_soon_as_it_is_all_there_is() {
    let mut world = World::quick();
    deploy_without_gate(&mut world);
    let actions = world.run(100);
    assert_eq!((world.status.weight, world.condition("Split")), (0, ("False", "NoGate")));
    assert_eq!(events(&actions, EventReason::NoGate), 1);
    assert!(message(&world, "Split").contains("kubectl -n shop rollout undo deployment/web"));
    assert!(world.status.conditions.iter().all(|condition| condition.type_ != "Capacity"));
    replace_all(&mut world);
    let actions = world.run(1);
    assert_eq!(world.status.approved_revision, "new", "nobody waits, or every request fails meanwhile");
    assert_eq!(events(&actions, EventReason::NothingToCompareWith), 1);
}

#[test]
fn what_stable_pods_cannot_carry_any_more_goes_to_a_revision_without_gates() {
    let mut world = World::quick();
    deploy_without_gate(&mut world);
    world.run(5);
    assert_eq!(world.status.weight, 0, "all four stable pods are left");
    for left in (1..4).rev() {
        let old = world.target().pods.iter().position(|pod| pod.revision != "new").unwrap();
        world.target().pods[old] = pod(&format!("new-{left}"), "new", false);
        let actions = world.run(5);
        assert_eq!(world.status.weight, 100 - 25 * left, "{left} stable pods are left");
        assert_eq!(events(&actions, EventReason::WeightChanged), 1);
        assert_eq!(world.condition("Split"), ("False", "NoGate"));
    }
    assert_ne!(world.status.approved_revision, "new");
}

/// Kubernetes replaces one stable pod by one without a gate.
fn replace_one(world: &mut World) {
    let old = world.target().pods.iter().position(|pod| pod.revision != "new").unwrap();
    world.target().pods[old] = pod(&format!("new-r{old}"), "new", false);
}

#[test]
fn one_failure_of_a_revision_without_gates_is_no_reason_to_fail_it_when_it_is_all_there_is() {
    for (failures, phase) in [(1, Phase::Stable), (30, Phase::Failed)] {
        let mut world = World::quick();
        world.rate = 8;
        deploy_without_gate(&mut world);
        replace_one(&mut world);
        world.run(5);
        assert_eq!(world.status.weight, 25);
        let totals = &mut world.status.evidence.canary;
        (totals.attempts, totals.failures) = (40, failures);
        replace_all(&mut world);
        world.run(1);
        assert_eq!(world.status.phase, phase, "{failures} of 40: {:?}", world.status.history);
    }
}

#[test]
fn a_stable_pod_that_is_unready_for_a_moment_sends_no_requests_to_a_revision_without_gates() {
    let mut world = World::quick();
    deploy_without_gate(&mut world);
    let set = |world: &mut World, ready: &[bool]| {
        let stable = world.target().pods.iter_mut().filter(|pod| pod.revision != "new");
        stable.zip(ready).for_each(|(pod, ready)| pod.containers_ready = *ready);
        world.run(2);
        world.status.weight
    };
    assert_eq!(set(&mut world, &[false, false, false, true]), 0);
    assert_eq!(set(&mut world, &[false; 4]), 100, "nobody else can serve");
    assert_eq!(set(&mut world, &[true; 4]), 5, "no more than its step asks for");
}

#[test]
fn a_target_that_is_scaled_up_gives_a_revision_without_gates_no_more_than_its_pods_can_carry() {
    let mut world = World::new(
        json!({"steps": [{"weight": 5, "hold": "10s"}], "sticky": {"cookie": "version"}, "judge": {"minRequests": 1_000_000}}),
    );
    deploy_without_gate(&mut world);
    world.target().replicas = 8;
    world.run(2);
    assert_eq!(world.status.weight, 20, "five pods share alike until the others are there");
    let steering = world.status.steering.clone().unwrap_or_default();
    assert_eq!(steering.sticky, "version", "a user stays with a version");
    for more in 0..4 {
        world.target().pods.push(pod(&format!("old-more-{more}"), "old", false));
    }
    world.run(2);
    assert_eq!(world.status.weight, 5);
    let epoch = world.status.epoch;
    world.run(20);
    assert_eq!(world.status.epoch, epoch, "and it stays");
}

#[test]
fn a_failed_revision_without_gates_serves_as_soon_as_it_is_all_there_is() {
    let mut world = World::quick();
    deploy_without_gate(&mut world);
    world.run(3);
    world.request(CanaryAction::Abort, "1");
    world.run(3);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    replace_all(&mut world);
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 100));
    assert_eq!(world.condition("ServingFailedRevision").0, "True");
}

#[test]
fn one_pod_with_a_gate_is_enough_to_hold_the_others_back() {
    let mut world = World::quick();
    deploy_without_gate(&mut world);
    world.target().pods.push(pod("new-1", "new", true));
    world.run(5);
    assert_eq!((world.status.weight, world.condition("Split").0), (5, "True"));
}

#[test]
fn a_rollout_whose_target_is_deleted_ends_and_begins_again_when_it_is_back() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(5);
    assert_eq!(world.status.weight, 5);
    let target = world.seen.target.take();
    world.run(5);
    assert_eq!(world.status.phase, Phase::Progressing, "the watch may lag");
    world.run(10);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Waiting, 0));
    assert_eq!((world.status.step_summary.as_str(), world.status.weight_summary.as_str()), ("", ""));
    assert!(world.status.conditions.iter().all(|c| !matches!(c.type_.as_str(), "Capacity" | "Split")));
    let last = &world.status.history[0];
    assert_eq!((last.revision.as_str(), last.because.as_str()), ("new", "the target was deleted"));
    let history = world.status.history.len();
    world.run(30);
    assert_eq!(world.status.history.len(), history, "once");
    world.seen.target = target;
    world.run(1);
    assert_eq!((world.status.phase, world.status.canary_revision.as_str()), (Phase::Progressing, "new"));
}

#[test]
fn a_canary_at_rest_waits_for_a_target_that_is_deleted_and_rests_again_when_it_is_back() {
    let mut world = World::quick();
    let target = world.seen.target.take();
    world.run(15);
    assert_eq!(world.status.phase, Phase::Waiting);
    world.seen.target = target;
    let actions = world.run(2);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "old"));
    assert_eq!(actions, []);
}

#[test]
fn a_service_that_is_deleted_in_the_middle_is_named_as_what_is_missing() {
    let mut world = patient();
    world.deploy("new");
    world.run(5);
    assert_eq!(world.condition("Split").0, "True");
    world.target().services.clear();
    world.run(1);
    assert_eq!(world.condition("Split"), ("False", "NoService"));
    let evidence = &world.status.evidence_summary;
    assert!(evidence.ends_with("; no Service selects the target"), "{evidence}");
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 5));
}

#[test]
fn a_promotion_whose_target_is_paused_says_how_it_goes_on() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    world.request(CanaryAction::Promote, "1");
    let mut look = |paused: bool| {
        world.seen.paused = paused;
        let (status, actions) = next(&world.spec, &world.status, &world.seen);
        world.status = status;
        let stalled = world.status.conditions.iter().find(|found| found.type_ == "Stalled").cloned();
        (stalled, events(&actions, EventReason::TargetPaused), world.status.phase)
    };
    assert_eq!(look(false), (None, 0, Phase::Promoting));
    let (stalled, told, _) = look(true);
    let stalled = stalled.unwrap();
    assert_eq!((stalled.status.as_str(), stalled.reason.as_str(), told), ("True", "TargetPaused", 1));
    assert!(stalled.message.contains("kubectl -n shop rollout resume deployment/web"), "{stalled:?}");
    assert_eq!(look(true).1, 0, "once");
    assert_eq!(look(false), (None, 0, Phase::Promoting));
}

#[test]
fn pods_that_do_not_come_because_the_target_is_paused_are_explained() {
    let mut world = World::quick();
    world.target().latest = Some("new".into());
    world.seen.paused = true;
    world.run(3);
    let found = message(&world, "Capacity");
    assert!(found.ends_with("kubectl -n shop rollout resume deployment/web goes on"), "{found}");
}

#[test]
fn commands_name_the_canary_and_its_namespace() {
    let mut world = World::new(json!({"steps": [{"pause": {}}]}));
    world.deploy("new");
    let actions = world.run(3);
    let how = "kubectl -n shop annotate --overwrite canary web tulle.dev/action=resume@ID goes on";
    let told = actions.iter().any(|action| {
        matches!(action, Action::Event { reason: EventReason::Paused, message } if message.ends_with(how))
    });
    assert!(told, "{actions:?}");
}

#[test]
fn the_evidence_says_why_a_rollout_failed_that_the_judge_did_not_fail() {
    let mut world = patient();
    world.deploy("new");
    world.run(5);
    world.request(CanaryAction::Abort, "1");
    world.run(5);
    assert_eq!(world.status.evidence_summary, "aborted by hand");
    world.request(CanaryAction::Promote, "2");
    let (status, _) = next(&world.spec, &world.status, &world.seen);
    assert_eq!(status.evidence_summary, "promoted by hand after it had failed");
    assert_eq!((status.phase, status.verdict), (Phase::Promoting, CanaryVerdict::NotJudged));
}

#[test]
fn what_is_back_at_its_approved_revision_has_no_verdict_of_the_one_that_was_withdrawn() {
    let back = |failures: u64| {
        let mut world = World::quick();
        world.canary_failures = failures;
        world.deploy("new");
        world.run(8);
        assert_ne!(world.status.verdict, CanaryVerdict::NotJudged);
        let because = world.status.evidence_summary.clone();
        world.target().latest = Some("old".into());
        world.run(1);
        assert_eq!((world.status.phase, world.status.verdict), (Phase::Stable, CanaryVerdict::NotJudged));
        (world.status.evidence_summary, because)
    };
    assert_eq!(back(0).0, "revision new was withdrawn");
    let (shown, because) = back(100);
    assert_eq!(shown, format!("revision new was withdrawn: {because}"));
}
