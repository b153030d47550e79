//! Matches, copies, a switch at once, and users that stay with a version.

use super::*;

fn insiders() -> serde_json::Value {
    json!([{"header": {"name": "x-group", "exact": "insider"}}])
}

/// What the status sends to the sidecars, in a few words.
fn flows(world: &World) -> String {
    crate::rollout::exposure::summary(world.status.weight, world.status.steering.as_ref())
}

/// Every different thing that flows within so many seconds, in order.
fn stages(world: &mut World, seconds: usize) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for _ in 0..seconds {
        world.run(1);
        let now = flows(world);
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    seen
}

/// Blue/green: four pods of the old version, and as many of the new one beside them.
fn blue_green() -> World {
    let mut world = World::new(
        json!({"steps": [{"weight": 100, "hold": "30s"}], "capacity": {"keepStable": true}, "onFailure": "Hold"}),
    );
    world.deploy("new");
    for number in 1..4 {
        let surge = pod(&format!("new-{number}"), "new", true);
        world.target().pods.push(surge);
    }
    world
}

fn ready_of(world: &World, revision: &str) -> usize {
    let target = world.seen.target.as_ref().unwrap();
    target.pods.iter().filter(|pod| pod.revision == revision && pod.ready).count()
}

#[test]
fn insiders_come_first_then_copies_then_a_share_and_insiders_keep_the_new_version() {
    let mut world = World::new(json!({"steps": [
        {"match": insiders(), "hold": "10s"}, {"mirror": 20, "hold": "10s"}, {"weight": 25, "hold": "10s"},
    ]}));
    world.deploy("new");
    let seen = stages(&mut world, 120);
    assert_eq!(seen[..3], ["match", "match, mirror 20%", "25%, match"]);
    assert_eq!(
        (seen.last().map(String::as_str), world.status.approved_revision.as_str()),
        (Some("0%"), "new")
    );
    assert_eq!((world.status.steering.clone(), world.status.acknowledged_steering.clone()), (None, None));
}

#[test]
fn what_is_shown_of_a_match_is_what_is_acknowledged() {
    let mut world = World::new(json!({"steps": [{"match": insiders(), "hold": "10s"}]}));
    world.deploy("new");
    world.seen.acknowledged = awaited();
    world.run(30);
    assert_eq!((flows(&world).as_str(), world.status.weight_summary.as_str()), ("match", "0%"));
    assert!(world.status.evidence.canary.attempts > 0, "what is sent is judged before that");
    world.seen.acknowledged = Acknowledgement::Complete;
    world.run(1);
    assert_eq!((world.status.step_summary.as_str(), world.status.weight_summary.as_str()), ("1/1", "match"));
}

#[test]
fn a_version_that_fails_insiders_is_stopped_and_stays_shown_until_all_have_acknowledged() {
    let mut world = World::new(json!({"steps": [{"match": insiders(), "hold": "600s"}]}));
    world.deploy("bad");
    world.canary_failures = 50;
    world.run(2);
    assert_eq!(world.status.weight_summary, "match");
    while world.status.phase == Phase::Progressing {
        world.seen.acknowledged = Acknowledgement::Complete;
        world.run(1);
        assert!(world.seen.now < Timestamp::UNIX_EPOCH + SignedDuration::from_secs(100));
    }
    world.seen.acknowledged = awaited();
    world.run(5);
    assert_eq!((world.status.phase, flows(&world).as_str()), (Phase::Failed, "0%"));
    assert_eq!(world.status.weight_summary, "match", "some sidecar may still send them there");
    world.seen.acknowledged = Acknowledgement::Complete;
    world.run(1);
    assert_eq!(world.status.weight_summary, "0%");
}

#[test]
fn a_version_that_fails_copies_is_stopped_before_it_answers_anybody() {
    let mut world = World::new(json!({"steps": [{"mirror": 20, "hold": "60s"}, {"weight": 50}]}));
    world.deploy("bad");
    world.canary_failures = 20;
    world.run(60);
    assert_eq!((world.status.phase, world.status.step), (Phase::Failed, 0));
    assert!(world.actions.iter().all(|action| !matches!(action, Action::OpenGate(_))));
}

#[test]
fn a_match_that_is_edited_changes_what_flows_with_an_epoch_of_its_own_only() {
    let mut world = World::new(json!({"steps": [{"match": insiders(), "hold": "600s"}]}));
    world.deploy("new");
    world.run(10);
    let (epoch, before) = (world.status.epoch, world.status.steering.clone());
    world.spec.steps[0].match_[0].header.as_mut().unwrap().exact = "tester".to_owned();
    world.run(1);
    assert_eq!(world.status.epoch, epoch + 1);
    assert_ne!(world.status.steering, before);
    assert_eq!(world.status.step_started, None, "the hold begins anew once it is acknowledged");
}

#[test]
fn a_pause_keeps_what_flows_although_the_spec_is_edited() {
    let mut world =
        World::new(json!({"steps": [{"match": insiders(), "hold": "10s"}, {"pause": {}}, {"weight": 25}]}));
    world.deploy("new");
    world.run(60);
    assert_eq!((world.status.phase, flows(&world).as_str()), (Phase::Paused, "match"));
    let epoch = world.status.epoch;
    world.spec.steps[0].match_.clear();
    world.run(10);
    assert_eq!((world.status.epoch, flows(&world).as_str()), (epoch, "match"));
}

#[test]
fn copies_end_with_their_step_also_before_a_pause() {
    for (first, expected) in [
        (json!({"weight": 5, "hold": "10s"}), "5%"),
        (json!({"match": insiders(), "hold": "10s"}), "match"),
        (json!({"mirror": 10, "hold": "10s"}), "0%"),
    ] {
        let steps = json!([first, {"mirror": 20, "hold": "10s"}, {"pause": {}}, {"weight": 25}]);
        let mut world = World::new(json!({"steps": steps}));
        world.deploy("new");
        world.run(90);
        assert_eq!((world.status.phase, flows(&world).as_str()), (Phase::Paused, expected));
        assert_eq!(world.status.weight_summary, expected);
        let epoch = world.status.epoch;
        world.run(10);
        assert_eq!(world.status.epoch, epoch, "once");
    }
}

#[test]
fn a_match_needs_one_pod_and_copies_never_cost_a_stable_one() {
    let mut world =
        World::new(json!({"steps": [{"match": insiders(), "hold": "5s"}, {"mirror": 50, "hold": "5s"}]}));
    world.deploy("new");
    world.run(100);
    assert_eq!(flows(&world), "match", "half of the requests need two pods, and the surge is one");
    assert_eq!(world.condition("Capacity"), ("False", "TooFewPods"));
    let found = world.status.conditions.iter().find(|c| c.type_ == "Capacity").unwrap();
    let missing = "match, mirror 50% needs 2 ready pods of revision new, and 1 is ready";
    assert!(found.message.starts_with(missing), "{}", found.message);
    assert_eq!(ready_of(&world, "old"), 4);
}

#[test]
fn blue_green_switches_at_once_when_every_pod_is_ready_and_keeps_the_old_ones_for_the_hold() {
    let mut world = blue_green();
    for pod in &mut world.target().pods {
        pod.containers_ready &= pod.name != "new-3";
    }
    world.run(20);
    assert_eq!((world.status.weight, world.condition("Capacity").0), (0, "False"), "a pod is missing");
    let found = world.status.conditions.iter().find(|c| c.type_ == "Capacity").unwrap();
    let missing = "100% needs 4 ready pods of revision new, and 3 are ready; see kubectl -n shop describe pods -l \
                   pod-template-hash=new";
    assert_eq!(found.message, missing, "why one is not ready is in its description");
    for pod in &mut world.target().pods {
        pod.containers_ready = true;
    }
    assert_eq!(stages(&mut world, 25), ["100%"], "no share in between");
    assert_eq!(
        (ready_of(&world, "old"), ready_of(&world, "new")),
        (4, 0),
        "the old pods stay, the new ones wait"
    );
    world.run(60);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
    assert_eq!(ready_of(&world, "old"), 0);
}

#[test]
fn an_abort_of_blue_green_switches_back_at_once_to_the_old_pods() {
    let mut world = blue_green();
    world.run(10);
    assert_eq!(world.status.weight, 100);
    world.request(CanaryAction::Abort, "1");
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    assert_eq!((ready_of(&world, "old"), ready_of(&world, "new")), (4, 0));
}

#[test]
fn a_dead_version_of_blue_green_is_stopped_and_the_old_pods_serve() {
    let mut world = blue_green();
    world.canary_failures = 100;
    world.run(10);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    assert_eq!((ready_of(&world, "old"), ready_of(&world, "new")), (4, 0));
}

#[test]
fn the_switch_of_blue_green_is_not_taken_back_while_the_old_pods_are_replaced() {
    let mut world = blue_green();
    while world.status.phase != Phase::Promoting {
        world.run(1);
        assert!(world.seen.now < Timestamp::UNIX_EPOCH + SignedDuration::from_secs(100));
    }
    while world.status.phase == Phase::Promoting {
        assert_eq!(world.status.weight, 100);
        world.run(1);
    }
}

#[test]
fn the_cookie_is_in_force_with_a_share_until_every_pod_is_replaced_and_not_afterwards() {
    let mut world = World::new(json!({"sticky": {"cookie": "version"}, "steps": [
        {"match": insiders(), "hold": "5s"}, {"weight": 25, "hold": "5s"}, {"weight": 50, "hold": "5s"},
    ]}));
    world.deploy("new");
    let cookie = |world: &World| world.status.steering.clone().unwrap_or_default().sticky;
    let mut shares = Vec::new();
    for _ in 0..150 {
        world.run(1);
        let flows = world.status.weight > 0 || world.status.phase == Phase::Promoting;
        assert_eq!(cookie(&world), if flows { "version" } else { "" }, "{:?}", world.status.phase);
        shares.push(world.status.weight);
    }
    assert_eq!(world.status.phase, Phase::Stable);
    let last = shares.iter().rposition(|weight| *weight > 0).unwrap();
    assert!(shares[..=last].is_sorted(), "users are moved to the new version only: {shares:?}");
}

#[test]
fn a_promotion_that_an_earlier_operator_began_goes_on_as_it_was() {
    let mut world = World::quick();
    world.deploy("new");
    while world.status.phase != Phase::Promoting {
        world.run(1);
    }
    (world.status.weight, world.status.steering) = (100, None);
    let epoch = world.status.epoch;
    world.run(1);
    assert_eq!((world.status.epoch, world.status.steering.clone()), (epoch, None));
}
