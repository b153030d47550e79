//! Versions that the judge does not let pass, and what a person on call hears of them.

use super::*;
use crate::rollout::judge::Verdict;

fn held(world: &World) -> usize {
    world.reasons().iter().filter(|name| **name == EventReason::HeldByJudge.name()).count()
}

/// A version that answers everything with 4xx gets 40 % of the requests.
fn refusing() -> World {
    let mut world = World::new(json!({"steps": [{"weight": 40, "hold": "10s"}]}));
    world.client_errors = 100;
    world.deploy("new");
    world
}

#[test]
fn a_version_that_is_held_is_one_warning_per_rollout() {
    let mut world = refusing();
    world.run(20);
    assert_eq!((world.status.phase, world.condition("HeldByJudge").0), (Phase::Progressing, "True"));
    assert_eq!(held(&world), 1, "at once");
    let told = world.actions.iter().find_map(|action| match action {
        Action::Event { reason: EventReason::HeldByJudge, message } => Some(message.clone()),
        _ => None,
    });
    let told = told.unwrap();
    assert!(told.contains("keeps its traffic (40%)") && told.contains("tulle.dev/action=abort@ID"), "{told}");
    assert!(told.contains("with 4xx"), "{told}");
    world.run(1000);
    assert_eq!(held(&world), 1);
    world.request(CanaryAction::Abort, "1");
    world.run(1);
    assert_eq!(world.status.verdict, CanaryVerdict::Fail);
    assert!(world.status.conditions.iter().all(|condition| condition.type_ != "HeldByJudge"));
    world.request(CanaryAction::Retry, "2");
    world.run(30);
    assert_eq!(held(&world), 2, "the next rollout");
}

fn judgement(held: bool, doubted: bool) -> Judgement {
    let verdict = if held || doubted { Verdict::Inconclusive } else { Verdict::Pass };
    Judgement { verdict, held, doubted, uncompared: false, because: "why".to_owned() }
}

#[test]
fn a_doubt_is_reported_once_it_has_lasted_and_only_once() {
    let mut world = World::new(json!({"steps": [{"weight": 40, "hold": "10s"}]}));
    world.deploy("new");
    world.run(3);
    let mut look = |seconds: i64, judged: Judgement| {
        world.seen.now += SignedDuration::from_secs(seconds);
        let mut evaluation = Evaluation {
            spec: &world.spec,
            steps: steps(&world.spec),
            seen: &world.seen,
            status: world.status.clone(),
            actions: Vec::new(),
            acknowledged: true,
            changed: false,
            closed: false,
            rules: Rules::of(&world.spec.judge),
        };
        evaluation.show_held(&judged);
        let (status, events) = (evaluation.status, evaluation.actions.len());
        world.status = status;
        events
    };
    assert_eq!(look(0, judgement(false, true)), 0);
    assert_eq!(look(200, judgement(false, true)), 0, "most doubts end");
    assert_eq!(look(10, judgement(false, false)), 0);
    assert_eq!(look(200, judgement(false, true)), 0, "it begins anew");
    assert_eq!(look(300, judgement(false, true)), 1);
    assert_eq!(look(10, judgement(false, true)), 0);
    assert_eq!(look(10, judgement(false, false)), 0);
    assert_eq!(look(10, judgement(true, false)), 0, "once per rollout");
    assert_eq!(look(400, judgement(false, true)), 0);
}
