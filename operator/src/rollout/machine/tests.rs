//! Rollouts as sentences: a world of pods, looked at every second.

use serde_json::json;
use tulle_crds::{CanarySpec, CanaryStatus, Phase};

use super::*;
use crate::model::PodSeen;

struct World {
    spec: CanarySpec,
    status: CanaryStatus,
    seen: Seen,
    actions: Vec<Action>,
    /// Failures per hundred requests of the canary.
    canary_failures: u64,
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let mut all = json!({"target": {"kind": "Deployment", "name": "web"}});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let pods = (0..4).map(|n| pod(&format!("old-{n}"), "old", false)).collect();
        let target = WorkloadSeen { replicas: 4, progress_deadline: 600, latest: Some("old".into()), pods };
        let seen = Seen {
            target: Some(target),
            acknowledged: Acknowledgement::Complete,
            now: Timestamp::UNIX_EPOCH,
            generation: 1,
            counted: Default::default(),
            action: None,
            conflict: None,
        };
        let mut world = Self {
            spec: serde_json::from_value(all).unwrap(),
            status: CanaryStatus::default(),
            seen,
            actions: Vec::new(),
            canary_failures: 0,
        };
        world.run(1);
        world
    }

    /// Three steps of ten seconds.
    fn quick() -> Self {
        Self::new(
            json!({"steps": [{"weight": 5, "hold": "10s"}, {"weight": 25, "hold": "10s"}, {"weight": 50, "hold": "10s"}]}),
        )
    }

    fn target(&mut self) -> &mut WorkloadSeen {
        self.seen.target.as_mut().unwrap()
    }

    /// A new version: one surge pod, parked, its containers ready.
    fn deploy(&mut self, revision: &str) {
        let parked = pod(&format!("{revision}-0"), revision, true);
        self.target().latest = Some(revision.into());
        self.target().pods.push(parked);
    }

    /// Looks once a second; 400 requests a second, shared by weight.
    fn run(&mut self, seconds: usize) -> Vec<Action> {
        let mut all = Vec::new();
        for _ in 0..seconds {
            self.seen.now += SignedDuration::from_secs(1);
            let canary = 4 * u64::from(self.status.weight);
            let canary = Counts { requests: canary, failures: canary * self.canary_failures / 100 };
            self.seen.counted = (canary, Counts { requests: 400 - canary.requests, failures: 0 });
            let (status, actions) = next(&self.spec, &self.status, &self.seen);
            self.status = status;
            for action in &actions {
                match action {
                    Action::OpenGate(name) => self.open(&name.clone()),
                    Action::ShutGate(name) => self.shut(&name.clone()),
                    _ => {}
                }
            }
            all.extend(actions);
            self.roll();
        }
        self.actions.extend(all.clone());
        all
    }

    /// What Kubernetes does once the newest revision needs no gate: it replaces the rest by itself.
    fn roll(&mut self) {
        let approved = self.status.approved_revision.clone();
        let Some(target) = &mut self.seen.target else { return };
        if target.latest.as_deref() != Some(&approved) {
            return;
        }
        if let Some(old) = target.pods.iter().position(|pod| pod.revision != approved) {
            target.pods[old] = pod(&format!("{approved}-r{old}"), &approved, false);
        }
    }

    /// What Kubernetes does: the pod becomes ready, one old pod goes, the next surge pod comes, parked
    /// unless its revision is approved.
    fn open(&mut self, name: &str) {
        let approved = self.status.approved_revision.clone();
        let latest = self.target().latest.clone().unwrap();
        let target = self.target();
        if let Some(pod) = target.pods.iter_mut().find(|pod| pod.name == name) {
            (pod.parked, pod.opened, pod.ready) = (false, true, true);
        }
        if let Some(old) = target.pods.iter().position(|pod| pod.revision != latest) {
            target.pods.remove(old);
            let count = target.pods.iter().filter(|pod| pod.revision == latest).count();
            if count < target.replicas as usize {
                let gated = latest != approved;
                let next = pod(&format!("{latest}-{count}"), &latest, gated);
                target.pods.push(next);
            }
        }
        while target.pods.len() < target.replicas as usize {
            let count = target.pods.len();
            target.pods.push(pod(&format!("{latest}-x{count}"), &latest, latest != approved));
        }
    }

    /// What kubelet does with a gate that is shut again.
    fn shut(&mut self, name: &str) {
        let pod = self.target().pods.iter_mut().find(|pod| pod.name == name).unwrap();
        (pod.parked, pod.opened, pod.ready) = (true, false, false);
    }

    fn condition(&self, type_: &str) -> (&str, &str) {
        let found = self.status.conditions.iter().find(|condition| condition.type_ == type_).unwrap();
        (&found.status, &found.reason)
    }

    fn reasons(&self) -> Vec<&'static str> {
        let reason =
            |action: &Action| if let Action::Event { reason, .. } = action { Some(*reason) } else { None };
        self.actions.iter().filter_map(reason).collect()
    }
}

fn awaited() -> Acknowledgement {
    Acknowledgement::Awaited("the sidecar of pod shop/web-0 has not acknowledged it".to_owned())
}

fn pod(name: &str, revision: &str, parked: bool) -> PodSeen {
    PodSeen {
        name: name.into(),
        revision: revision.into(),
        containers_ready: true,
        ready: !parked,
        parked,
        opened: false,
        terminating: false,
    }
}

#[test]
fn watching_a_workload_starts_nothing() {
    let mut world = World::quick();
    world.run(100);
    assert_eq!((world.status.phase, world.status.epoch), (Phase::Stable, 0));
    assert_eq!(world.actions, []);
}

#[test]
fn a_good_version_goes_through_every_step_and_is_promoted() {
    let mut world = World::quick();
    world.deploy("new");
    let mut weights = Vec::new();
    for _ in 0..80 {
        world.run(1);
        if weights.last() != Some(&world.status.weight) {
            weights.push(world.status.weight);
        }
    }
    assert_eq!(weights, [5, 25, 50, 100, 0]);
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "new"));
    assert_eq!(world.status.history[0].outcome, RolloutOutcome::Promoted);
    assert!(world.seen.target.unwrap().pods.iter().all(|pod| pod.revision == "new" && pod.ready));
}

#[test]
fn a_bad_version_is_stopped_and_stays_stopped() {
    let mut world = World::quick();
    world.deploy("bad");
    world.canary_failures = 20;
    world.run(60);
    assert_eq!((world.status.phase, world.status.weight, world.status.step), (Phase::Failed, 0, 0));
    assert_eq!(world.status.approved_revision, "old");
    assert!(world.status.evidence_summary.contains("20.00%"), "{}", world.status.evidence_summary);
    let at = world.status.epoch;
    world.run(100);
    assert_eq!(world.status.epoch, at, "nothing happens after that");
}

#[test]
fn the_weight_that_is_shown_is_the_weight_that_is_acknowledged() {
    let mut world = World::quick();
    world.deploy("new");
    world.seen.acknowledged = awaited();
    world.run(30);
    assert_eq!((world.status.weight, world.status.weight_summary.as_str()), (5, "0%"));
    assert_eq!(world.status.evidence, Evidence::default(), "nothing counts before");
    world.seen.acknowledged = Acknowledgement::Complete;
    world.run(2);
    assert_eq!(world.status.weight_summary, "5%");
}

#[test]
fn whoever_asks_is_told_whom_the_rollout_waits_for() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(1);
    let refused = "pod shop/web-1: this sidecar (0.0.1) has no split/v1";
    world.seen.acknowledged = Acknowledgement::Refused(refused.to_owned());
    let events = world.run(30);
    let shown = |world: &World| {
        let all = &world.status.conditions;
        let found = all.iter().find(|condition| condition.type_ == "Acknowledged").unwrap();
        (found.status.clone(), found.reason.clone(), found.message.clone())
    };
    assert_eq!(shown(&world), ("False".into(), "RefusedBySidecar".into(), refused.into()));
    let told = events.iter().filter(|a| matches!(a, Action::Event { reason: "RefusedBySidecar", .. }));
    assert_eq!(told.count(), 1, "once, not at every look");
    world.seen.acknowledged = Acknowledgement::Complete;
    world.run(2);
    assert_eq!(shown(&world).0, "True");
    world.run(60);
    assert_eq!(world.status.phase, Phase::Stable);
    assert!(world.status.conditions.iter().all(|condition| condition.type_ != "Acknowledged"));
}

#[test]
fn missing_data_holds_and_neither_fails_nor_passes() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    for _ in 0..200 {
        world.seen.counted = Default::default();
        world.seen.now += SignedDuration::from_secs(1);
        let counted = world.seen.counted;
        let (status, _) = next(&world.spec, &world.status, &Seen { counted, ..world.seen.clone() });
        world.status = status;
    }
    assert_eq!((world.status.phase, world.status.step), (Phase::Progressing, 0));
    assert_eq!(world.status.verdict, CanaryVerdict::Inconclusive);
}

#[test]
fn a_newer_version_discards_the_evidence_and_starts_over_against_the_stable_one() {
    let mut world = World::quick();
    world.deploy("v2");
    world.run(20);
    assert_eq!(world.status.step, 1);
    world.deploy("v3");
    world.run(1);
    assert_eq!((world.status.step, world.status.canary_revision.as_str()), (0, "v3"));
    assert_eq!(world.status.evidence, Evidence::default());
    assert_eq!(
        (world.status.approved_revision.as_str(), world.status.history[0].outcome),
        ("old", RolloutOutcome::Superseded)
    );
}

#[test]
fn undoing_the_rollout_in_the_middle_restores_the_stable_version_at_once() {
    let mut world = World::quick();
    world.deploy("v2");
    world.run(20);
    world.target().latest = Some("old".into());
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Stable, 0));
    assert_eq!(world.status.canary_revision, "");
}

#[test]
fn more_weight_than_the_surge_carries_opens_gates_one_at_a_time() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(16);
    assert_eq!(world.status.weight, 25, "one pod of four carries a quarter");
    let mut most = 0;
    while world.status.weight < 50 {
        let opened = world.run(1).iter().filter(|a| matches!(a, Action::OpenGate(_))).count();
        most = most.max(opened);
    }
    assert_eq!(most, 1);
    let old = world.seen.target.unwrap().pods.iter().filter(|pod| pod.revision == "old").count();
    assert_eq!(old, 3, "exactly one stable pod was given up");
}

#[test]
fn keep_stable_never_gives_a_stable_pod_up() {
    let mut world =
        World::new(json!({"steps": [{"weight": 50, "hold": "1s"}], "capacity": {"keepStable": true}}));
    world.deploy("new");
    world.run(60);
    assert_eq!(world.status.weight, 0);
    let capacity = world.status.conditions.iter().find(|c| c.type_ == "Capacity").unwrap();
    assert_eq!(capacity.message, "50% needs 2 ready pods of revision new, 1 are");
}

#[test]
fn a_pause_waits_for_a_human_and_a_verb_works_once() {
    let mut world = World::new(
        json!({"steps": [{"weight": 5, "hold": "10s"}, {"pause": {}}, {"weight": 25, "hold": "10s"}]}),
    );
    world.deploy("new");
    world.run(100);
    assert_eq!(world.status.phase, Phase::Paused);
    world.seen.action = Some((CanaryAction::Resume, "1".into()));
    world.run(3);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 25));
    let step = world.status.step;
    world.run(2);
    assert_eq!(world.status.step, step, "the same request id again does nothing");
}

#[test]
fn abort_and_promote_do_what_they_say() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    world.seen.action = Some((CanaryAction::Abort, "1".into()));
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    world.seen.action = Some((CanaryAction::Promote, "2".into()));
    world.run(1);
    assert_eq!(world.status.approved_revision, "new");
}

#[test]
fn a_rollout_that_is_not_decided_ends_at_its_deadline() {
    let mut world = World::new(
        json!({"steps": [{"weight": 5, "hold": "10s"}], "judge": {"minRequests": 1_000_000}, "deadline": "30s"}),
    );
    world.deploy("new");
    world.run(40);
    assert_eq!(world.status.phase, Phase::Failed);
    assert!(world.status.history[0].because.contains("deadline of 30s"));
}

#[test]
fn traffic_is_taken_away_and_acknowledged_before_the_template_is_restored() {
    let mut world = World::new(json!({"steps": [{"weight": 5, "hold": "10s"}], "onFailure": "Undo"}));
    world.deploy("bad");
    world.run(4);
    world.canary_failures = 100;
    while world.status.phase != Phase::Failed {
        world.run(1);
    }
    world.seen.acknowledged = awaited();
    assert!(!world.run(5).iter().any(|action| matches!(action, Action::Undo { .. })));
    world.seen.acknowledged = Acknowledgement::Complete;
    assert!(world.run(1).contains(&Action::Undo { revision: "old".into() }));
}

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
    let again = Seen { counted: Default::default(), ..world.seen.clone() };
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
    assert!(actions.contains(&Action::OpenGate("old-0".into())), "what serves is not held back: {actions:?}");
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "old"));
}

#[test]
fn an_abort_is_shown_and_undone_only_once_it_is_acknowledged() {
    let mut world = World::new(json!({"steps": [{"weight": 25, "hold": "600s"}], "onFailure": "Undo"}));
    world.deploy("new");
    world.run(5);
    assert_eq!(world.status.acknowledged_weight, 25);
    world.seen.action = Some((CanaryAction::Abort, "1".into()));
    let first = world.run(1);
    assert_eq!((world.status.weight, world.status.acknowledged_weight), (0, 25));
    assert!(!first.iter().any(|action| matches!(action, Action::Undo { .. })), "{first:?}");
    let second = world.run(1);
    assert_eq!(world.status.acknowledged_weight, 0);
    assert!(second.iter().any(|action| matches!(action, Action::Undo { .. })), "{second:?}");
}

#[test]
fn a_workload_without_a_stable_pod_takes_what_is_left_instead_of_an_outage() {
    // Stopped and parked; a downscaler then takes every pod away, and Kubernetes brings the newest back.
    let mut world = World::quick();
    world.deploy("bad");
    world.canary_failures = 20;
    world.run(60);
    assert_eq!(world.status.phase, Phase::Failed);
    world.target().pods = vec![pod("bad-1", "bad", true)];
    world.target().replicas = 1;
    world.run(9);
    assert_eq!(world.status.approved_revision, "old", "the watch may lag");
    let actions = world.run(3);
    assert!(actions.contains(&Action::OpenGate("bad-1".into())), "{actions:?}");
    assert_eq!((world.status.phase, world.status.approved_revision.as_str()), (Phase::Stable, "bad"));
    assert!(world.reasons().contains(&"NothingToCompareWith"));
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
    world.run(10);
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
    world.run(30);
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
    assert!(actions.contains(&Action::OpenGate("v2-0".into())), "{actions:?}");
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
    world.seen.action = Some((CanaryAction::Retry, "1".into()));
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
