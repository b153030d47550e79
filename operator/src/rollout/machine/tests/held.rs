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

/// A version that accepts connections and never answers gets 40 % of the requests.
fn silent(min_requests: u64) -> World {
    let mut world =
        World::new(json!({"steps": [{"weight": 40, "hold": "10s"}], "judge": {"minRequests": min_requests}}));
    world.silent = true;
    world.deploy("new");
    while world.status.weight < 40 {
        world.run(1);
    }
    world
}

#[test]
fn a_version_of_which_no_request_ends_is_one_warning() {
    let mut world = silent(200);
    world.run(5);
    let evidence = &world.status.evidence_summary;
    assert!(evidence.starts_with("no request to the new version has ended yet, and "), "{evidence}");
    assert_eq!(held(&world), 0, "its warm-up");
    world.run(30);
    assert_eq!((held(&world), world.condition("HeldByJudge").0), (1, "True"));
    world.run(400);
    assert_eq!((held(&world), world.status.phase), (1, Phase::Progressing));
    world.silent = false;
    world.run(80);
    assert_eq!(world.status.phase, Phase::Stable, "{}", world.status.evidence_summary);

    let mut world = silent(1_000_000);
    world.run(200);
    assert_eq!((held(&world), world.condition("HeldByJudge").0), (0, "True"), "it may take so long");
    world.run(200);
    assert_eq!(held(&world), 1);
}

#[test]
fn a_version_that_falls_silent_later_is_reported_as_well() {
    let mut world =
        World::new(json!({"steps": [{"weight": 40, "hold": "10s"}], "judge": {"minRequests": 10_000}}));
    world.deploy("new");
    world.run(20);
    assert_eq!(held(&world), 0);
    world.silent = true;
    world.run(100);
    let evidence = &world.status.evidence_summary;
    assert!(evidence.contains("; no request to the new version has ended for "), "{evidence}");
    assert_eq!(held(&world), 1);

    let mut world = World::new(json!({"steps": [{"weight": 40, "hold": "60s"}]}));
    world.deploy("new");
    world.run(20);
    assert_eq!(world.status.verdict, CanaryVerdict::Pass);
    world.silent = true;
    world.run(100);
    assert_eq!((world.status.phase, world.status.verdict), (Phase::Progressing, CanaryVerdict::Inconclusive));
}

#[test]
fn a_version_that_gets_only_what_matches_is_not_called_silent() {
    let matches = json!([{"header": {"name": "x-group", "exact": "insider"}}]);
    let mut world = World::new(json!({"steps": [{"match": matches, "hold": "10s"}]}));
    world.silent = true;
    world.deploy("new");
    world.run(400);
    assert_eq!(held(&world), 0);
    let evidence = &world.status.evidence_summary;
    assert!(evidence.contains("only HTTP requests that match"), "{evidence}");
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
