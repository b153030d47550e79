//! Pods that are missing: whether the Deployment's deadline runs meanwhile, and what users read of it.

use tulle_mesh::check::{self, Finding, Outcome};

use super::*;

fn is_held_back(world: &World) -> bool {
    on_trial(&world.status, world.seen.target.as_ref().unwrap()).is_some_and(|trial| trial.is_held_back)
}

fn count(world: &World, reason: EventReason) -> usize {
    world.reasons().iter().filter(|name| **name == reason.name()).count()
}

/// Half of the requests need two pods, and the surge makes one.
fn short_of_one_pod() -> World {
    let mut world =
        World::new(json!({"steps": [{"weight": 50, "hold": "1s"}], "capacity": {"keepStable": true}}));
    world.deploy("new");
    world.run(2);
    assert_eq!(world.condition("Capacity"), ("False", "TooFewPods"));
    world
}

/// What `tulle check` finds about the Canary itself.
fn finding(world: &World) -> Finding {
    let conditions = world.status.conditions.iter().map(|condition| check::Condition {
        type_: &condition.type_,
        status: &condition.status,
        reason: &condition.reason,
        message: &condition.message,
        since: None,
    });
    let conditions = conditions.collect();
    let canary = check::Canary { namespace: "shop", name: "web", is_waiting: false, conditions };
    check::canaries(&[canary]).swap_remove(0)
}

#[test]
fn pods_that_are_missing_for_a_minute_are_a_finding_of_tulle_check() {
    let mut world = short_of_one_pod();
    assert_eq!(finding(&world).result, Outcome::Ok, "most come within seconds");
    for pod in &mut world.target().pods {
        pod.containers_ready &= pod.revision != "new";
    }
    world.run(70);
    let found = finding(&world);
    let command = "kubectl -n shop describe pods -l pod-template-hash=new";
    assert_eq!((found.result, found.fix.as_str()), (Outcome::Warning, command), "{}", found.found);
}

#[test]
fn a_rollout_is_held_back_on_purpose_while_every_pod_of_the_new_version_could_serve() {
    let mut world = World::new(json!({"steps": [{"weight": 50, "hold": "10s"}, {"pause": {}}]}));
    assert!(!is_held_back(&world), "nothing is rolled out");
    world.deploy("new");
    world.run(4);
    assert!(is_held_back(&world));
    for pod in &mut world.target().pods {
        pod.containers_ready &= pod.revision != "new";
    }
    assert!(!is_held_back(&world), "the new version has no pod that could serve");
    for pod in &mut world.target().pods {
        pod.containers_ready = true;
    }
    world.run(60);
    assert_eq!(world.status.phase, Phase::Paused);
    assert!(is_held_back(&world));
    world.status.phase = Phase::Failed;
    assert!(!is_held_back(&world), "a version that failed is not waited for");
}

#[test]
fn a_pod_that_cannot_start_is_not_held_back_beside_one_that_has() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(5);
    assert!(is_held_back(&world));
    let unschedulable = PodSeen { containers_ready: false, ..pod("new-1", "new", true) };
    world.target().pods.push(unschedulable);
    assert!(!is_held_back(&world));
    world.target().pods.last_mut().unwrap().terminating = true;
    assert!(is_held_back(&world), "a pod that ends is not waited for");
}

#[test]
fn a_step_whose_pods_do_not_come_is_not_held_back_unless_a_user_has_paused_it() {
    let mut world = short_of_one_pod();
    assert!(!is_held_back(&world), "the surge makes no second pod");
    world.request(CanaryAction::Pause, "1");
    world.run(1);
    assert_eq!(world.status.phase, Phase::Paused);
    assert!(is_held_back(&world));
}

#[test]
fn pods_are_not_missing_while_something_else_holds_the_step() {
    let obstruct = |world: &mut World| {
        let (service, reason) = ("web".to_owned(), "it selects two workloads".to_owned());
        world.seen.obstacles = vec![SplitObstacle { service, code: EventReason::NoSplit, reason }];
    };
    let pause = |world: &mut World| world.request(CanaryAction::Pause, "1");
    let holds: [&dyn Fn(&mut World); 2] = [&obstruct, &pause];
    for hold in holds {
        let mut world = short_of_one_pod();
        hold(&mut world);
        world.run(1);
        world.target().pods.push(pod("new-1", "new", true));
        world.run(100);
        assert!(world.status.conditions.iter().all(|c| c.type_ != "Capacity"), "{:?}", world.status);
        assert!(is_held_back(&world), "every pod could serve, and nobody counts them");
        world.seen.obstacles.clear();
        world.request(CanaryAction::Resume, "2");
        world.run(1);
        assert_eq!((world.status.weight, count(&world, EventReason::TooFewPods)), (50, 0));
    }
}

#[test]
fn pods_that_are_missing_for_a_minute_are_one_event_for_each_time() {
    let mut world = short_of_one_pod();
    world.run(50);
    assert_eq!(count(&world, EventReason::TooFewPods), 0, "most come within seconds");
    world.run(200);
    assert_eq!(count(&world, EventReason::TooFewPods), 1);
    world.deploy("newer");
    world.run(30);
    assert_eq!(count(&world, EventReason::TooFewPods), 1, "those of another revision");
    world.run(60);
    assert_eq!(count(&world, EventReason::TooFewPods), 2);
}

#[test]
fn nothing_is_short_of_pods_after_the_end() {
    for (action, phase) in [(CanaryAction::Abort, Phase::Failed), (CanaryAction::Promote, Phase::Promoting)] {
        let mut world = short_of_one_pod();
        world.request(action, "1");
        let (status, _) = next(&world.spec, &world.status, &world.seen);
        assert_eq!(status.phase, phase);
        assert!(status.conditions.iter().all(|condition| condition.type_ != "Capacity"), "{status:?}");
    }
}

#[test]
fn the_history_says_who_promoted() {
    let paused = json!({"steps": [{"weight": 25, "hold": "1s"}, {"pause": {}}], "judge": {"minRequests": 1}});
    let plain = json!({"steps": [{"weight": 25, "hold": "1s"}], "judge": {"minRequests": 1}});
    let silent = json!({"steps": [{"pause": {}}]});
    let cases = [
        (silent, Some(CanaryAction::Resume), "resumed by hand after the last step"),
        (paused.clone(), Some(CanaryAction::Promote), "promoted by hand"),
        (paused, Some(CanaryAction::Resume), "resumed by hand after the last step; canary failed 0 of"),
        (plain, None, "canary failed 0 of"),
    ];
    for (spec, action, because) in cases {
        let mut world = World::new(spec);
        world.deploy("new");
        world.run(30);
        if let Some(action) = action {
            world.request(action, "1");
        }
        world.run(60);
        let last = &world.status.history[0];
        assert_eq!(
            (world.status.phase, last.outcome),
            (Phase::Stable, RolloutOutcome::Promoted),
            "{because}"
        );
        assert!(last.because.starts_with(because), "{}", last.because);
        assert!(!last.because.ends_with("; "), "{}", last.because);
        assert_eq!(world.status.promoted_because, "");
    }
}

/// A revision at its first weight that is not decided about for want of requests.
fn serving() -> World {
    let mut world = World::new(
        json!({"steps": [{"weight": 5, "hold": "10s"}, {"weight": 25}], "judge": {"minRequests": 1_000_000}}),
    );
    world.deploy("new");
    world.run(5);
    assert_eq!((world.status.weight, world.condition("Capacity").0), (5, "True"));
    world
}

fn set_ready(world: &mut World, ready: bool) {
    for pod in world.target().pods.iter_mut().filter(|pod| pod.revision == "new") {
        pod.containers_ready = ready;
    }
}

#[test]
fn a_revision_that_is_not_ready_any_more_is_said_to_be_so() {
    let mut world = serving();
    set_ready(&mut world, false);
    world.run(2);
    assert_eq!(world.condition("Capacity"), ("False", "TooFewPods"));
    let found = world.status.conditions.iter().find(|c| c.type_ == "Capacity").unwrap();
    let command = "kubectl -n shop describe pods -l pod-template-hash=new";
    assert_eq!(found.message, format!("no pod of revision new is ready, see {command}"));
    let evidence = &world.status.evidence_summary;
    assert!(evidence.ends_with("; no pod of revision new is ready"), "{evidence}");
    assert!(!evidence.contains("minRequests"), "{evidence}");
    world.run(100);
    assert_eq!(count(&world, EventReason::TooFewPods), 1, "before it has failed");
}

#[test]
fn a_pod_that_is_ready_for_seconds_between_its_crashes_does_not_keep_a_revision_alive() {
    let mut world = serving();
    let mut seconds = 0;
    while world.status.phase == Phase::Progressing {
        set_ready(&mut world, seconds % 24 >= 20);
        world.run(1);
        seconds += 1;
        assert!(seconds < 150, "{:?}", world.status);
    }
    assert!(count(&world, EventReason::TooFewPods) > 0);
    let because = &world.status.history[0].because;
    assert!(because.contains("stayed ready for 30 s within 121 s"), "{because}");
    assert_eq!(&world.status.evidence_summary, because);
}

#[test]
fn a_pod_that_stays_ready_after_a_crash_is_forgiven() {
    let mut world = serving();
    set_ready(&mut world, false);
    world.run(60);
    set_ready(&mut world, true);
    world.run(25);
    assert!(world.status.unready_since.is_some());
    assert_eq!(world.condition("Capacity"), ("True", "EnoughPods"));
    world.run(10);
    assert_eq!(world.status.unready_since, None);
    set_ready(&mut world, false);
    world.run(100);
    assert_eq!(world.status.phase, Phase::Progressing, "its time begins anew");
}

#[test]
fn what_both_versions_lack_fails_neither() {
    let mut world = serving();
    // A database is down on which the readiness of both depends; the pods that come back first are stable ones.
    world.target().pods.iter_mut().for_each(|pod| pod.containers_ready = false);
    world.run(300);
    assert_eq!(world.status.phase, Phase::Progressing);
    let capacity = world.status.conditions.iter().find(|c| c.type_ == "Capacity").unwrap();
    assert!(capacity.message.contains("is ready, and none of revision"), "{}", capacity.message);
    assert_eq!(count(&world, EventReason::TooFewPods), 1);
    for pod in world.target().pods.iter_mut().filter(|pod| pod.revision != "new") {
        pod.containers_ready = true;
    }
    world.run(100);
    assert_eq!(world.status.phase, Phase::Progressing, "its time begins now");
    world.run(30);
    assert_eq!(world.status.phase, Phase::Failed, "its pods alone did not come back");
}

#[test]
fn a_hold_that_is_shorter_than_the_first_comparison_of_latencies_fails_no_good_version() {
    let mut world = World::new(json!({
        "steps": [{"weight": 50, "hold": "1s"}],
        "judge": {"minRequests": 20, "onInconclusive": "Rollback"},
    }));
    world.micros = Some(5_000);
    world.deploy("new");
    let mut waited = false;
    for _ in 0..60 {
        world.run(1);
        waited |= world.status.evidence_summary.contains("latency not compared yet");
        assert_ne!(world.status.phase, Phase::Failed, "{}", world.status.evidence_summary);
    }
    assert!(waited);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_comparison_of_latencies_that_never_comes_is_undecided_at_the_deadline() {
    let mut world = World::new(json!({
        "steps": [{"weight": 50, "hold": "5s"}], "deadline": "20s",
        "judge": {"minRequests": 1, "onInconclusive": "Rollback"},
    }));
    (world.rate, world.micros) = (2, Some(5_000));
    world.deploy("new");
    world.run(15);
    assert_eq!(world.status.phase, Phase::Progressing, "{}", world.status.evidence_summary);
    world.run(15);
    assert_eq!(world.status.phase, Phase::Failed);
    assert!(world.status.history[0].because.contains("deadline of 20s"), "{:?}", world.status.history);
}

#[test]
fn why_a_rollout_has_failed_stays_although_its_step_waited_for_something_else() {
    let mut world = World::new(json!({
        "steps": [{"weight": 5, "hold": "10s"}], "deadline": "60s",
        "judge": {"minRequests": 1_000_000, "onInconclusive": "Rollback"},
    }));
    world.deploy("new");
    world.run(5);
    let (service, reason) = ("web".to_owned(), "why".to_owned());
    world.seen.obstacles = vec![SplitObstacle { service, code: EventReason::NoSplit, reason }];
    set_ready(&mut world, false);
    world.run(70);
    assert_eq!(world.status.phase, Phase::Failed);
    assert_eq!(world.status.evidence_summary, "not decided within the deadline of 60s");
}

#[test]
fn the_evidence_says_that_a_step_waits_for_pods() {
    let mut world = World::quick();
    world.deploy("new");
    set_ready(&mut world, false);
    world.run(3);
    assert_eq!(world.status.evidence_summary, "step 1 waits for pods: 0 of 1 are ready");
    set_ready(&mut world, true);
    world.run(5);
    assert!(world.status.evidence_summary.starts_with("canary failed"), "{:?}", world.status);
    let mut world = short_of_one_pod();
    world.request(CanaryAction::Pause, "1");
    world.run(1);
    assert_eq!(world.status.evidence_summary, "", "a pause waits for a user");
}

#[test]
fn a_revision_whose_pods_never_start_fails_and_the_reason_says_how_to_try_it_again() {
    let mut world = World::quick();
    world.deploy("new");
    set_ready(&mut world, false);
    world.run(700);
    assert_eq!((world.status.phase, world.status.verdict), (Phase::Failed, CanaryVerdict::Fail));
    let because = &world.status.history[0].because;
    assert!(because.contains("has been ready for 600 s"), "{because}");
    assert!(because.ends_with("tulle.dev/action=retry@ID tries the revision again"), "{because}");
}

#[test]
fn a_rollout_without_a_request_says_when_requests_count() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    world.rate = 0;
    world.status.evidence = Evidence::default();
    world.seen.block.clear();
    world.run(5);
    let evidence = &world.status.evidence_summary;
    assert!(evidence.contains("requests, streams and connections count when they end"), "{evidence}");
}
