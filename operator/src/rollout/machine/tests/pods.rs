//! Pods that break, go and come back, and revisions that return.

use super::*;

#[test]
fn a_missing_target_is_said_and_picked_up_when_it_appears() {
    let mut world = World::quick();
    let target = world.seen.target.take();
    world.status = CanaryStatus::default();
    world.run(1);
    assert_eq!(world.condition("Ready"), ("False", "TargetNotFound"));
    world.seen.target = target;
    world.run(1);
    assert_eq!(world.status.phase, Phase::Stable);
}

#[test]
fn a_replayed_look_changes_nothing() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(5);
    let again = Observation { block_ended: false, ..world.seen.clone() };
    let (first, _) = next(&world.spec, &world.status, &again);
    let (second, actions) = next(&world.spec, &first, &again);
    assert_eq!((first, actions), (second, vec![]));
}

#[test]
fn pods_that_all_break_end_the_rollout() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(5);
    for pod in &mut world.target().pods {
        pod.containers_ready &= pod.revision != "new";
    }
    world.run(40);
    assert_eq!(world.status.phase, Phase::Progressing, "a pod that replaces another needs its time");
    world.run(90);
    assert_eq!(world.status.phase, Phase::Failed);
    assert_eq!(world.reasons().last(), Some(&"Failed"));
}

#[test]
fn a_promotion_that_its_controller_does_not_finish_ends_with_a_name() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}], "deadline": "120s"}));
    world.deploy("new");
    while world.status.phase != Phase::Promoting {
        world.run(1);
        assert!(world.seen.now < Timestamp::UNIX_EPOCH + SignedDuration::from_secs(100));
    }
    // Its controller is stuck: an old pod never goes.
    for _ in 0..130 {
        world.target().pods.push(pod("old-stuck", "old", false));
        world.run(1);
        world.target().pods.retain(|pod| pod.name != "old-stuck");
    }
    assert_eq!(world.status.history[0].outcome, RolloutOutcome::PromotionStalled);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
}

#[test]
fn going_back_after_a_stalled_promotion_needs_no_canary() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}], "deadline": "120s"}));
    world.deploy("new");
    world.run(60);
    world.status.phase = Phase::Stable;
    world.status.approved_revision = "new".to_owned();
    world.status.former_revision = "old".to_owned();
    world.target().pods = vec![pod("new-0", "new", false), pod("old-0", "old", true)];
    world.target().latest = Some("old".into());
    let actions = world.run(1);
    assert!(actions.contains(&Action::OpenGate(named("old-0"))), "what serves is not held back: {actions:?}");
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "old"));
}

#[test]
fn an_abort_is_shown_and_undone_only_once_it_is_acknowledged() {
    let mut world = World::new(json!({"steps": [{"weight": 25, "hold": "600s"}], "onFailure": "Undo"}));
    world.deploy("new");
    world.run(5);
    assert_eq!(world.status.acknowledged_weight, 25);
    world.request(CanaryAction::Abort, "1");
    let first = world.run(1);
    assert_eq!((world.status.weight, world.status.acknowledged_weight), (0, 25));
    assert!(!first.iter().any(|action| matches!(action, Action::Undo { .. })), "{first:?}");
    let second = world.run(1);
    assert_eq!(world.status.acknowledged_weight, 0);
    assert!(second.iter().any(|action| matches!(action, Action::Undo { .. })), "{second:?}");
}

#[test]
fn a_failed_version_serves_only_while_nothing_else_can_and_stays_failed() {
    let mut world = World::quick();
    world.deploy("bad");
    world.canary_failures = 20;
    world.run(60);
    assert_eq!(world.status.phase, Phase::Failed);
    // A downscaler takes every pod away, and Kubernetes brings the newest back.
    world.target().pods = vec![pod("bad-1", "bad", true)];
    world.target().replicas = 1;
    world.run(9);
    assert_eq!(world.status.weight, 0, "the watch may lag");
    let actions = world.run(3);
    assert!(actions.contains(&Action::OpenGate(named("bad-1"))), "{actions:?}");
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 100));
    assert_eq!(world.status.approved_revision, "old");
    assert_eq!(world.condition("ServingFailedRevision").0, "True");
    world.target().pods.push(pod("old-9", "old", false));
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    assert_eq!(world.condition("ServingFailedRevision").0, "False");
}

#[test]
fn a_version_that_is_deployed_while_there_are_no_pods_is_the_stable_one() {
    let mut world = World::quick();
    (world.target().replicas, world.target().pods) = (0, Vec::new());
    world.target().latest = Some("new".into());
    world.run(13);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
}

#[test]
fn pods_of_a_failed_version_leave_the_services_they_were_let_into() {
    let mut world = World::quick();
    world.deploy("new");
    while world.status.weight < 50 {
        world.run(1);
    }
    assert_eq!(world.target().pods.iter().filter(|pod| pod.opened).count(), 1);
    world.canary_failures = 50;
    world.run(60);
    assert_eq!(world.status.phase, Phase::Failed);
    let serves = |pod: &&PodSeen| pod.revision == "new" && pod.ready;
    assert_eq!(world.target().pods.iter().filter(serves).count(), 0, "clients without a sidecar reached it");
}

#[test]
fn the_last_stable_pod_is_not_given_up() {
    let mut world = World::new(json!({"steps": [{"weight": 100, "hold": "600s"}]}));
    world.deploy("new");
    world.run(60);
    assert_eq!(world.status.weight, 100);
    let old = world.target().pods.iter().filter(|pod| pod.revision == "old").count();
    assert!(old > 0, "there is nothing to go back to");
}

#[test]
fn a_version_that_turns_bad_while_a_human_is_waited_for_is_stopped() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}, {"pause": {}}]}));
    world.deploy("new");
    world.run(60);
    assert_eq!(world.status.phase, Phase::Paused);
    world.canary_failures = 20;
    world.run(90);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
}

#[test]
fn a_version_whose_pods_never_become_ready_is_stopped() {
    let mut world = World::quick();
    world.deploy("new");
    world.target().pods.last_mut().unwrap().containers_ready = false;
    world.run(590);
    assert_eq!(
        (world.status.phase, world.condition("Capacity")),
        (Phase::Progressing, ("False", "TooFewPods"))
    );
    world.run(20);
    assert_eq!(world.status.phase, Phase::Failed);
    assert!(world.status.history[0].because.contains("ready for 600 s"), "{:?}", world.status.history);
}

#[test]
fn going_back_late_in_a_promotion_keeps_the_pods_that_serve() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}]}));
    world.deploy("new");
    while world.status.phase != Phase::Promoting {
        world.run(1);
    }
    world.target().pods = (0..4).map(|n| pod(&format!("new-{n}"), "new", false)).collect();
    world.target().pods.push(pod("old-0", "old", false));
    world.target().latest = Some("old".into());
    // One look: nothing has rolled yet.
    let (status, _) = next(&world.spec, &world.status, &world.seen);
    let (approved, former) = (status.approved_revision.as_str(), status.former_revision.as_str());
    assert_eq!((status.phase, approved, former), (Phase::Stable, "old", "new"), "both are stable meanwhile");
    world.run(20);
    assert_eq!(world.status.former_revision, "", "it has no pod any more");
}

#[test]
fn what_nobody_wants_any_more_does_not_block_a_stateful_set() {
    let mut world =
        World::new(json!({"target": {"kind": "StatefulSet", "name": "db"}, "steps": [{"pause": {}}]}));
    world.target().pods.pop();
    world.deploy("v2");
    world.run(3);
    world.target().latest = Some("old".into());
    let actions = world.run(1);
    assert!(actions.contains(&Action::OpenGate(named("v2-0"))), "{actions:?}");
}

#[test]
fn of_two_canaries_of_one_target_the_younger_does_nothing() {
    let mut world = World::quick();
    world.seen.conflict = Some("first".to_owned());
    world.deploy("new");
    world.run(60);
    assert_eq!(world.condition("Ready"), ("False", "Conflicted"));
    assert_eq!((world.status.weight, world.actions.len()), (0, 0));
}

#[test]
fn a_version_that_was_undone_and_comes_back_is_not_tried_again_and_again() {
    let mut world = World::new(json!({"steps": [{"weight": 5, "hold": "10s"}], "onFailure": "Undo"}));
    world.canary_failures = 50;
    world.deploy("bad");
    world.run(30);
    world.target().latest = Some("old".into());
    world.run(5);
    world.deploy("bad");
    let actions = world.run(60);
    assert_eq!((world.status.phase, world.status.verdict), (Phase::Failed, CanaryVerdict::FailedBefore));
    assert!(
        !actions.iter().any(|action| matches!(action, Action::Undo { .. })),
        "whoever brings it would bring it again"
    );
    world.canary_failures = 0;
    world.request(CanaryAction::Retry, "1");
    world.run(3);
    assert_eq!(world.status.weight, 5, "a human may want it so");
}

#[test]
fn a_version_that_its_controller_does_not_roll_out_yet_is_waited_for() {
    // OnDelete, say: whoever replaces the pods by hand has not begun.
    let mut world = World::quick();
    world.target().latest = Some("new".into());
    world.run(2000);
    assert_eq!(world.status.phase, Phase::Progressing);
    world.deploy("new");
    world.run(60);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn what_did_not_look_good_is_not_approved_because_the_workload_is_scaled_to_zero_and_back() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "600s"}]}));
    world.deploy("new");
    world.run(20);
    world.canary_failures = 60;
    world.run(8);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 50));
    let pods = std::mem::take(&mut world.target().pods);
    world.target().replicas = 0;
    world.rate = 0;
    world.run(30);
    assert_eq!(world.status.phase, Phase::Progressing, "nobody is asked anything meanwhile");
    world.target().replicas = 4;
    world.target().pods = pods.into_iter().filter(|pod| pod.revision == "new").collect();
    world.run(15);
    assert_eq!(world.status.phase, Phase::Failed, "{:?} {:?}", world.status.evidence, world.actions);
    assert_eq!(world.status.approved_revision, "old");
}

#[test]
fn a_step_does_not_pass_on_the_requests_of_earlier_ones() {
    let mut world = World::quick();
    world.deploy("new");
    while world.status.weight < 25 {
        world.run(1);
    }
    world.rate = 0;
    world.run(60);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 25));
    let because = &world.status.evidence_summary;
    assert!(because.contains("since this step began"), "{because}");
}

/// Half of the requests go to two new pods, one of them with its gate opened, when an autoscaler takes all pods but one:
/// Kubernetes keeps the one that is ready and new.
fn scaled_down(more: serde_json::Value) -> World {
    let mut spec = json!({"steps": [{"weight": 50, "hold": "60s"}], "judge": {"minRequests": 20_000}});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut world = World::new(spec);
    world.deploy("new");
    while world.status.weight < 50 {
        world.run(1);
    }
    world.run(5);
    world.target().replicas = 1;
    world.target().pods.retain(|pod| pod.opened);
    assert_eq!(world.target().pods.len(), 1);
    world.run(15);
    world
}

fn left_alone(world: &World) -> usize {
    world.reasons().iter().filter(|reason| **reason == EventReason::NothingToCompareWith.name()).count()
}

#[test]
fn a_version_whose_last_stable_pod_is_scaled_away_is_not_promoted_before_it_passes() {
    let mut world = scaled_down(json!({}));
    let shown = |world: &World| (world.status.phase, world.status.weight);
    assert_eq!((shown(&world), left_alone(&world)), ((Phase::Progressing, 100), 1));
    let evidence = &world.status.evidence_summary;
    assert!(evidence.ends_with("; no pod of revision old is left beside it"), "{evidence}");
    assert_eq!(world.status.approved_revision, "old");
    // The autoscaler brings more of them, which wait behind gates: nothing else can serve.
    world.target().replicas = 2;
    let parked = pod("new-9", "new", true);
    world.target().pods.push(parked);
    let actions = world.run(1);
    assert!(actions.contains(&Action::OpenGate(named("new-9"))), "{actions:?}");
    world.run(150);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
    assert_eq!(left_alone(&world), 1);
}

#[test]
fn a_version_that_is_left_alone_can_still_fail_and_serves_without_a_gap_then() {
    let mut world = scaled_down(json!({}));
    world.canary_failures = 60;
    let mut looks = 0;
    while world.status.phase == Phase::Progressing {
        world.run(1);
        assert_eq!(world.status.weight, 100, "nothing else can serve");
        looks += 1;
        assert!(looks < 300, "{:?}", world.status);
    }
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Failed, "old"));
    assert_eq!(world.condition("ServingFailedRevision").0, "True");

    let mut world = scaled_down(json!({"onFailure": "Undo"}));
    world.request(CanaryAction::Abort, "1");
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 100));
    let actions = world.run(1);
    assert!(actions.contains(&Action::Undo { revision: "old".to_owned() }), "{actions:?}");
    world.target().latest = Some("old".into());
    world.run(1);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "old"));
}

#[test]
fn a_trial_without_a_stable_pod_ends_at_its_deadline_and_by_stable_pods_that_come_back() {
    let judge = json!({"minRequests": 1_000_000, "onInconclusive": "Promote"});
    let mut world =
        scaled_down(json!({"judge": judge, "steps": [{"weight": 50, "hold": "1h"}], "deadline": "60s"}));
    assert_eq!(world.status.phase, Phase::Progressing);
    world.run(60);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));

    let mut world = scaled_down(json!({}));
    world.target().pods.push(pod("old-9", "old", false));
    world.run(3);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 50));

    // A pause has nothing else to end it than a user.
    let mut world = scaled_down(json!({"steps": [{"weight": 50, "hold": "60s"}, {"pause": {}}]}));
    world.run(150);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Paused, 100));
    world.request(CanaryAction::Promote, "1");
    world.run(5);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
}

/// One look, in which nothing is rolled.
fn look(world: &mut World) {
    world.seen.now += SignedDuration::from_secs(1);
    world.status = next(&world.spec, &world.status, &world.seen).0;
}

fn revisions(world: &World) -> (&str, &str, &str) {
    let status = &world.status;
    (&status.approved_revision, &status.former_revision, &status.canary_revision)
}

#[test]
fn what_serves_alone_does_so_until_pods_of_the_restored_template_are_ready() {
    for (fails, is_seen_before) in [(true, false), (true, true), (false, false), (false, true)] {
        let mut world = scaled_down(json!({}));
        if fails {
            world.request(CanaryAction::Abort, "1");
            look(&mut world);
        }
        assert_eq!(world.status.weight, 100);
        let starting = PodSeen { containers_ready: false, ready: false, ..pod("old-9", "old", false) };
        if is_seen_before {
            world.target().pods.push(starting);
            look(&mut world);
            assert_eq!(world.status.weight, 100, "nothing else is ready");
        }
        world.target().latest = Some("old".into());
        look(&mut world);
        assert_eq!((world.status.phase, revisions(&world)), (Phase::Stable, ("old", "new", "")));
        if fails {
            assert_eq!(
                world.condition("ServingFailedRevision").0,
                "True",
                "its pod serves until it is replaced"
            );
        }
        world.target().pods = vec![pod("old-9", "old", false)];
        look(&mut world);
        look(&mut world);
        assert_eq!(revisions(&world), ("old", "", ""));
        if fails {
            assert_eq!(world.condition("ServingFailedRevision"), ("False", "Restored"));
        }
    }
}

#[test]
fn a_newer_version_is_tried_beside_the_one_that_serves_alone() {
    let mut world = scaled_down(json!({}));
    world.deploy("newest");
    look(&mut world);
    assert_eq!(revisions(&world), ("old", "new", "newest"), "nobody would serve until it can");
    world.run(20);
    let shown = (world.status.phase, world.status.weight, left_alone(&world));
    assert_eq!(shown, (Phase::Progressing, 50, 1), "it is not promoted unjudged");
    world.request(CanaryAction::Promote, "1");
    look(&mut world);
    assert_eq!(world.status.phase, Phase::Promoting);
    assert_eq!(revisions(&world), ("newest", "new", "newest"), "its share grows as pods are replaced");
    world.run(5);
    assert_eq!((world.status.phase, revisions(&world)), (Phase::Stable, ("newest", "", "")));
}

#[test]
fn what_served_alone_and_comes_back_is_tried_again_and_serves_without_a_gap() {
    for fails in [false, true] {
        let mut world = scaled_down(json!({}));
        if fails {
            world.request(CanaryAction::Abort, "1");
            look(&mut world);
        }
        world.deploy("newest");
        world.run(3);
        assert_eq!(revisions(&world), ("old", "new", "newest"));
        world.target().latest = Some("new".into());
        look(&mut world);
        let phase = if fails { Phase::Failed } else { Phase::Progressing };
        assert_eq!((world.status.phase, world.status.weight), (phase, 100));
        assert_eq!(revisions(&world), ("old", "", "new"), "nobody has approved it");
    }
}

#[test]
fn pods_of_a_failed_version_that_serves_alone_are_let_in_also_while_a_newer_one_is_tried() {
    let mut world = scaled_down(json!({}));
    world.request(CanaryAction::Abort, "1");
    look(&mut world);
    world.deploy("newest");
    world.run(1);
    assert_eq!(world.status.failed_revision, "new");
    // Its pod was on a node that is drained.
    world.target().pods.retain(|pod| pod.revision != "new");
    world.target().pods.push(pod("new-9", "new", true));
    let actions = world.run(1);
    assert!(actions.contains(&Action::OpenGate(named("new-9"))), "{actions:?}");
}
