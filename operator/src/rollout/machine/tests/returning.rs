//! Promotions that are aborted, or lose their pods.

use super::*;

/// A promotion of `new` with so many pods of each revision, four in all.
fn promoting(old: usize) -> World {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}]}));
    world.deploy("new");
    while world.status.phase != Phase::Promoting {
        world.run(1);
        assert!(world.seen.now < Timestamp::UNIX_EPOCH + SignedDuration::from_secs(100));
    }
    let opened = |n| PodSeen { opened: true, ..pod(&format!("new-{n}"), "new", false) };
    let olds = (0..old).map(|n| pod(&format!("old-{n}"), "old", false));
    world.target().pods = olds.chain((old..4).map(opened)).collect();
    look(&mut world);
    world
}

/// One look, in which nothing is rolled.
fn look(world: &mut World) -> Vec<Action> {
    world.seen.now += SignedDuration::from_secs(1);
    let (status, actions) = next(&world.spec, &world.status, &world.seen);
    world.status = status;
    actions
}

fn opened(world: &World) -> usize {
    let target = world.seen.target.as_ref().unwrap();
    target.pods.iter().filter(|pod| pod.revision == "new" && pod.ready).count()
}

#[test]
fn an_abort_late_in_a_promotion_leaves_with_the_new_version_what_the_old_pods_cannot_carry() {
    let mut world = promoting(1);
    assert_eq!(world.status.weight, 75);
    world.request(CanaryAction::Abort, "1");
    let actions = look(&mut world);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 75));
    assert_eq!(world.condition("Returning"), ("True", "TooFewPods"));
    assert!(actions.iter().all(|action| !matches!(action, Action::ShutGate(_))), "nobody else is ready");
    // One comes back, beside the others.
    world.target().pods.push(pod("old-8", "old", false));
    let actions = look(&mut world);
    assert_eq!(world.status.weight, 50);
    assert_eq!(actions.iter().filter(|action| matches!(action, Action::ShutGate(_))).count(), 1);
    // It is lost again.
    world.target().pods.pop();
    look(&mut world);
    assert_eq!(world.status.weight, 75);
    for n in 0..3 {
        world.target().pods.push(pod(&format!("old-{}", 8 + n), "old", false));
    }
    look(&mut world);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    assert_eq!(world.condition("Returning"), ("False", "Returned"));
    world.run(1);
    assert_eq!(opened(&world), 0, "clients without a sidecar leave it too");
}

#[test]
fn a_template_that_is_restored_during_a_return_lets_both_versions_serve_until_the_pods_are_replaced() {
    let mut world = promoting(1);
    world.request(CanaryAction::Abort, "1");
    look(&mut world);
    world.target().latest = Some("old".into());
    look(&mut world);
    let status = &world.status;
    assert_eq!((status.phase, status.approved_revision.as_str()), (Phase::Stable, "old"));
    assert_eq!(status.former_revision, "new", "three pods of four are of it");
    assert_eq!(world.condition("Returning").0, "False");
    // Whoever deploys the aborted version once more gets another trial, not a promotion.
    world.target().latest = Some("new".into());
    look(&mut world);
    let status = &world.status;
    assert_eq!((status.phase, status.approved_revision.as_str()), (Phase::Progressing, "old"));
    assert_eq!(status.former_revision, "");
}

#[test]
fn what_is_done_during_a_return_ends_it_or_is_refused() {
    let mut world = promoting(1);
    world.request(CanaryAction::Abort, "1");
    look(&mut world);
    world.request(CanaryAction::Retry, "2");
    let actions = look(&mut world);
    let ignored =
        |action: &Action| matches!(action, Action::Event { reason: EventReason::ActionIgnored, .. });
    assert!(actions.iter().any(ignored), "{actions:?}");
    assert_eq!(world.status.weight, 75, "a trial from nought would leave one pod with everything");
    world.request(CanaryAction::Promote, "3");
    look(&mut world);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Promoting, 75));
    assert_eq!(world.condition("Returning"), ("False", "Promoted"));
}

#[test]
fn a_promotion_that_loses_its_pods_gives_back_what_the_others_cannot_carry() {
    let mut world = promoting(1);
    let fail = |world: &mut World, count: usize| {
        let pods = world.target().pods.iter_mut().filter(|pod| pod.revision == "new");
        pods.take(count).for_each(|pod| pod.containers_ready = false);
        look(world)
    };
    fail(&mut world, 1);
    assert_eq!(world.status.weight, 75, "a pod that restarts sends nobody back");
    let actions = fail(&mut world, 2);
    assert_eq!(world.status.weight, 50, "one pod of each is left");
    let lost = |action: &Action| matches!(action, Action::Event { reason: EventReason::PodsLost, .. });
    assert!(actions.iter().any(lost), "{actions:?}");
    for pod in &mut world.target().pods {
        pod.containers_ready = true;
    }
    look(&mut world);
    assert_eq!(world.status.weight, 75);
}
