//! One bad pod of several, and requests that cannot come: what holds a step and what users read of it.

use super::*;
use crate::model::{Crashes, Unselected};
use crate::rollout::evidence::FailingPod;

/// Half of the requests go to the pods `new-0` and `new-1`.
fn half(more: serde_json::Value) -> World {
    let mut spec = json!({"steps": [{"weight": 50, "hold": "10s"}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let mut world = World::new(spec);
    world.deploy("new");
    while world.status.weight < 50 {
        world.run(1);
    }
    world.run(1);
    assert_eq!(pods(&mut world).count(), 2);
    world
}

fn pods(world: &mut World) -> impl Iterator<Item = &mut PodSeen> {
    world.target().pods.iter_mut().filter(|pod| pod.revision == "new")
}

fn second(world: &mut World) -> &mut PodSeen {
    pods(world).find(|pod| pod.name == "new-1").unwrap()
}

/// Its container ends now, and is restarted at once unless kubelet waits before that.
fn crash(world: &mut World, restarts: u32, is_looping: bool) {
    let now = world.seen.now.as_second();
    let pod = second(world);
    pod.crashes = Some(Box::new(Crashes { container: "app".into(), restarts, is_looping, last_unix: now }));
    pod.containers_ready = !is_looping;
    pod.containers_since = Some(now);
}

fn has(world: &World, type_: &str) -> bool {
    world.status.conditions.iter().any(|condition| condition.type_ == type_)
}

fn message_of(world: &World, type_: &str) -> String {
    world.status.conditions.iter().find(|found| found.type_ == type_).unwrap().message.clone()
}

#[test]
fn a_version_is_not_promoted_while_one_of_its_pods_crashes_again_and_again() {
    let mut world = half(json!({}));
    for restarts in 1..10 {
        // Between its crashes it is ready for a while.
        crash(&mut world, restarts, false);
        world.run(20);
        crash(&mut world, restarts, true);
        world.run(5);
        assert_eq!((world.status.phase, world.status.step), (Phase::Progressing, 0), "{restarts}");
        assert_eq!(world.condition("PodsHealthy"), ("False", "PodCrashes"));
    }
    let sentence = "pod new-1 of revision new crashes again and again (9 restarts): kubectl -n shop logs new-1 -c app --previous";
    let message = message_of(&world, "PodsHealthy");
    assert_eq!(message, format!("{sentence}; the step goes on once it has been ready for 30 s, or is gone"));
    let evidence = &world.status.evidence_summary;
    assert!(evidence.ends_with(&format!("; {sentence}")), "{evidence}");
    pods(&mut world).for_each(|pod| pod.terminating = pod.name == "new-1");
    world.run(2);
    assert_eq!(world.status.approved_revision, "new", "the pod is replaced");
    assert!(!has(&world, "PodsHealthy"));
}

#[test]
fn a_pod_that_crashed_once_and_is_ready_again_for_a_while_holds_nothing() {
    let mut world = half(json!({}));
    crash(&mut world, 1, false);
    world.run(25);
    assert_eq!((world.status.phase, world.status.step), (Phase::Progressing, 0));
    let message = message_of(&world, "PodsHealthy");
    assert!(message.starts_with("pod new-1 of revision new has crashed (1 restart): kubectl"), "{message}");
    world.run(10);
    assert_eq!(world.status.approved_revision, "new");
    assert!(!has(&world, "PodsHealthy"));

    // However long the step is held.
    let mut world = half(json!({"steps": [{"weight": 50, "hold": "24h"}]}));
    crash(&mut world, 1, false);
    world.run(595);
    assert!(has(&world, "PodsHealthy"));
    world.run(10);
    assert!(!has(&world, "PodsHealthy"));
}

#[test]
fn a_crash_before_the_trial_holds_nothing() {
    let mut world = half(json!({}));
    crash(&mut world, 7, false);
    second(&mut world).crashes.as_mut().unwrap().last_unix = 1;
    second(&mut world).containers_since = Some(1);
    world.run(15);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_pod_that_starts_or_ends_is_not_unhealthy() {
    let mut world = half(json!({}));
    let starting = PodSeen { containers_ready: false, ..pod("new-8", "new", true) };
    let crashes = Crashes { container: "app".into(), restarts: 3, is_looping: true, last_unix: 5 };
    let ending = PodSeen {
        containers_ready: false,
        containers_since: Some(5),
        terminating: true,
        crashes: Some(Box::new(crashes)),
        ..pod("new-9", "new", true)
    };
    world.target().pods.extend([starting, ending]);
    world.run(5);
    assert!(!has(&world, "PodsHealthy"), "as while a node is drained");
    world.run(10);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_pod_that_stays_unready_holds_the_step_and_one_that_misses_a_probe_does_not() {
    let mut world = half(json!({"steps": [{"weight": 50, "hold": "30s"}]}));
    let now = world.seen.now.as_second();
    (second(&mut world).containers_ready, second(&mut world).containers_since) = (false, Some(now));
    world.run(8);
    assert!(!has(&world, "PodsHealthy"));
    assert_eq!(world.condition("Capacity"), ("False", "FewerPods"));
    world.run(60);
    assert_eq!((world.status.phase, world.status.step), (Phase::Progressing, 0));
    assert_eq!(world.condition("PodsHealthy"), ("False", "PodUnready"));
    let message = message_of(&world, "PodsHealthy");
    assert!(message.contains("kubectl -n shop describe pod new-1"), "{message}");
    let now = world.seen.now.as_second();
    (second(&mut world).containers_ready, second(&mut world).containers_since) = (true, Some(now));
    world.run(2);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_version_with_a_crashing_pod_is_not_promoted_for_want_of_evidence_at_its_deadline() {
    let judge = json!({"minRequests": 1_000_000, "onInconclusive": "Promote"});
    let mut world = half(json!({"deadline": "60s", "judge": judge}));
    crash(&mut world, 4, true);
    world.run(100);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Progressing, "old"));
    world.request(CanaryAction::Promote, "1");
    world.run(1);
    assert_eq!(world.status.approved_revision, "new", "a user may");
    assert!(!has(&world, "PodsHealthy"));
}

#[test]
fn a_pod_with_nearly_all_failures_is_named() {
    let mut world = half(json!({"steps": [{"weight": 50, "hold": "600s"}]}));
    let failing = FailingPod {
        uid: "uid-new-1".to_owned(),
        attempts: 12,
        failures: 12,
        other_attempts: 1240,
        other_failures: 0,
    };
    world.seen.failing = Some(failing);
    world.run(1);
    let sentence = "; pod new-1 failed 12 of its 12 requests, the other pods of its revision 0 of 1240";
    let evidence = world.status.evidence_summary.clone();
    assert!(evidence.ends_with(sentence), "{evidence}");
    world.target().pods.retain(|pod| pod.name != "new-1");
    world.run(1);
    let evidence = &world.status.evidence_summary;
    assert!(!evidence.contains("new-1"), "it is gone: {evidence}");
}

#[test]
fn crashes_that_the_stable_version_has_too_hold_nothing() {
    let mut world = half(json!({}));
    crash(&mut world, 3, true);
    world.run(1);
    assert_eq!(world.condition("PodsHealthy"), ("False", "PodCrashes"));
    let crashes = second(&mut world).crashes.clone();
    let stable = world.target().pods.iter_mut().find(|pod| pod.revision != "new").unwrap();
    stable.crashes = crashes;
    world.run(1);
    assert!(!has(&world, "PodsHealthy"), "what both need may be down");
}

#[test]
fn a_target_that_is_scaled_up_has_fewer_pods_than_its_weight_needs_and_waits_for_none() {
    let mut world = half(json!({"steps": [{"weight": 50, "hold": "30s"}]}));
    assert_eq!(world.condition("Capacity"), ("True", "EnoughPods"));
    world.target().replicas = 8;
    let actions = world.run(3);
    assert_eq!(world.condition("Capacity"), ("False", "FewerPods"));
    let message = message_of(&world, "Capacity");
    assert_eq!(message, "50% needs 4 ready pods of revision new, and 2 are ready");
    assert!(actions.iter().all(|action| !matches!(action, Action::OpenGate(_))), "no stable pod is given up");
    assert!(!waits_for_pods(&world.status));
    assert!(on_trial(&world.status, world.seen.target.as_ref().unwrap()).unwrap().is_held_back);
    world.target().replicas = 4;
    world.run(1);
    assert_eq!(world.condition("Capacity"), ("True", "EnoughPods"));
    world.target().replicas = 8;
    world.run(40);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_service_that_does_not_select_the_new_pods_is_named() {
    let mut world = World::quick();
    world.deploy("new");
    world.rate = 0;
    let unselected = Unselected { service: "web".to_owned(), label: "track=stable".to_owned() };
    pods(&mut world).for_each(|pod| pod.unselected = Some(unselected.clone()));
    world.run(5);
    assert_eq!(world.condition("Split"), ("False", "NoService"));
    let sentence = "Service web does not select the pods of revision new, which lack the label track=stable";
    assert!(message_of(&world, "Split").starts_with(sentence), "{}", message_of(&world, "Split"));
    assert!(world.status.evidence_summary.contains(sentence), "{}", world.status.evidence_summary);
    pods(&mut world).for_each(|pod| pod.unselected = None);
    world.run(1);
    assert_eq!(world.condition("Split"), ("True", "SplitApplies"));
}

#[test]
fn a_target_whose_clients_have_no_sidecars_is_said_to_have_none() {
    let mut world = World::quick();
    world.deploy("new");
    (world.rate, world.seen.clientless) = (0, true);
    world.run(5);
    assert_eq!(world.condition("Split"), ("False", "NoMeshedClient"));
    let evidence = &world.status.evidence_summary;
    assert!(evidence.starts_with("no client with a sidecar sends requests"), "{evidence}");
    world.rate = 400;
    world.run(5);
    assert_eq!(world.condition("Split"), ("True", "SplitApplies"), "it may just have nothing to send");
}

#[test]
fn events_and_conditions_count_in_plain_english() {
    let mut world = half(json!({}));
    let started = |action: &Action| {
        let Action::Event { reason: EventReason::Started, message } = action else { return false };
        message == "revision new goes through 1 step"
    };
    assert!(world.actions.iter().any(started), "{:?}", world.actions);
    world.run(60);
    assert_eq!(message_of(&world, "Promoted"), "every pod is of revision new");
    world.deploy("newer");
    world.run(2);
    assert_eq!(world.condition("Promoted"), ("True", "Promoted"));
    assert_eq!(message_of(&world, "Promoted"), "revision new was promoted");
}
