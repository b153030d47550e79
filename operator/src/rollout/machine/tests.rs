//! Rollouts as sentences: a world of pods, looked at every second.

mod around;
mod held;
mod missing;
mod pods;
mod returning;
mod strategies;
mod unhealthy;

use serde_json::json;
use tulle_crds::{AttemptTotals, CanaryAction, CanarySpec, CanaryStatus, Phase};

use super::*;
use crate::model::PodSeen;
use crate::rollout::judge::Side;

struct World {
    spec: CanarySpec,
    status: CanaryStatus,
    seen: Observation,
    actions: Vec<Action>,
    /// Failures per hundred requests of the canary.
    canary_failures: u64,
    /// Answers with 4xx per hundred requests of the canary.
    client_errors: u64,
    /// No request to the canary ends.
    silent: bool,
    /// Requests per second.
    rate: u64,
    /// Microseconds that each answer takes; `None`: nobody measures that.
    micros: Option<u64>,
}

impl World {
    fn new(spec: serde_json::Value) -> Self {
        let mut all = json!({"target": {"kind": "Deployment", "name": "web"}});
        all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let pods = (0..4).map(|n| pod(&format!("old-{n}"), "old", false)).collect();
        let target = WorkloadSeen {
            replicas: 4,
            progress_deadline: 600,
            latest: Some("old".into()),
            pods,
            services: vec!["web".into()],
        };
        let seen = Observation {
            namespace: "shop".into(),
            name: "web".into(),
            target: Some(target),
            paused: false,
            acknowledged: Acknowledgement::Complete,
            now: Timestamp::UNIX_EPOCH,
            generation: 1,
            block: Vec::new(),
            block_ended: false,
            obstacles: Vec::new(),
            clientless: false,
            failing: None,
            undo_forbidden: false,
            action: None,
            conflict: None,
        };
        let mut world = Self {
            spec: serde_json::from_value(all).unwrap(),
            status: CanaryStatus::default(),
            seen,
            actions: Vec::new(),
            canary_failures: 0,
            client_errors: 0,
            silent: false,
            rate: 400,
            micros: None,
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

    /// The requests of one second, shared by weight; a tenth of them match where a step matches, and copies come on
    /// top. A block ends every ten.
    fn send(&mut self) {
        let steering = self.status.steering.clone().unwrap_or_default();
        let insiders = if steering.match_.is_empty() { 0 } else { self.rate / 10 };
        let served = (self.rate * u64::from(self.status.weight) / 100 + insiders).min(self.rate);
        let ending = u64::from(!self.silent);
        let canary = ending * (served + self.rate * u64::from(steering.mirror) / 100);
        let ended = self.seen.now.as_second() % 10 == 0;
        self.seen.block_ended = ended;
        if !is_exposed(&self.status) {
            return self.seen.block.clear();
        }
        let failures = canary * self.canary_failures / 100;
        let refused = canary * self.client_errors / 100;
        for (side, attempts, failures, refused) in
            [(Side::Canary, canary, failures, refused), (Side::Stable, self.rate - served, 0, 0)]
        {
            let block = &mut self.seen.block;
            let index = block.iter().position(|pod| pod.side == side).unwrap_or_else(|| {
                block.push(PodBlock { side, ..PodBlock::default() });
                block.len() - 1
            });
            if let Some(micros) = self.micros {
                (0..attempts).for_each(|_| block[index].latency.record(micros));
            }
            let totals = &mut block[index].totals;
            *totals = AttemptTotals {
                attempts: totals.attempts + attempts,
                failures: totals.failures + failures,
                client_errors: totals.client_errors + refused,
                ..*totals
            };
        }
    }

    fn request(&mut self, action: CanaryAction, id: &str) {
        self.seen.action = Some(Requested { action, revision: None, id: id.to_owned() });
    }

    /// Looks once a second.
    fn run(&mut self, seconds: usize) -> Vec<Action> {
        let mut all = Vec::new();
        for _ in 0..seconds {
            self.seen.now += SignedDuration::from_secs(1);
            self.send();
            let (status, actions) = next(&self.spec, &self.status, &self.seen);
            if self.seen.block_ended || status.epoch != self.status.epoch {
                self.seen.block.clear();
            }
            self.status = status;
            for action in &actions {
                match action {
                    Action::OpenGate(pod) => self.open(&pod.name.clone()),
                    Action::ShutGate(pod) => self.shut(&pod.name.clone()),
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
        let reason = |action: &Action| {
            if let Action::Event { reason, .. } = action { Some(reason.name()) } else { None }
        };
        self.actions.iter().filter_map(reason).collect()
    }
}

fn awaited() -> Acknowledgement {
    Acknowledgement::Awaited("waiting for the sidecar of pod shop/web-0".to_owned())
}

/// What an action says of a pod.
fn named(name: &str) -> PodName {
    PodName { name: name.to_owned(), uid: format!("uid-{name}") }
}

fn pod(name: &str, revision: &str, parked: bool) -> PodSeen {
    PodSeen {
        name: name.into(),
        uid: format!("uid-{name}").into(),
        revision: revision.into(),
        containers_ready: true,
        ready: !parked,
        parked,
        opened: false,
        terminating: false,
        ..PodSeen::default()
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
    assert_eq!(weights, [5, 25, 50, 75, 0], "during the promotion the share follows the pods");
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
    assert!(world.status.evidence.canary.attempts > 0, "what is sent is judged before that");
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
    let told =
        events.iter().filter(|a| matches!(a, Action::Event { reason: EventReason::RefusedBySidecar, .. }));
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
    world.rate = 0;
    world.status.evidence = Evidence::default();
    world.seen.block.clear();
    world.run(200);
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
    assert_eq!(capacity.message, "50% needs 2 ready pods of revision new, and 1 is ready");
}

#[test]
fn a_pause_waits_for_a_human_and_a_verb_works_once() {
    let mut world = World::new(
        json!({"steps": [{"weight": 5, "hold": "10s"}, {"pause": {}}, {"weight": 25, "hold": "10s"}]}),
    );
    world.deploy("new");
    world.run(100);
    assert_eq!(world.status.phase, Phase::Paused);
    world.request(CanaryAction::Resume, "1");
    world.run(3);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 25));
    assert!(world.reasons().ends_with(&["Paused", "Resumed", "WeightChanged"]), "{:?}", world.reasons());
    let step = world.status.step;
    world.run(2);
    assert_eq!(world.status.step, step, "the same request id again does nothing");
}

#[test]
fn a_pause_by_hand_keeps_step_and_weight_until_it_is_resumed() {
    let mut world =
        World::new(json!({"steps": [{"weight": 5, "hold": "10s"}, {"weight": 25, "hold": "10s"}]}));
    world.deploy("new");
    world.run(3);
    world.request(CanaryAction::Pause, "1");
    world.run(500);
    assert_eq!((world.status.phase, world.status.step, world.status.weight), (Phase::Paused, 0, 5));
    assert!(world.status.paused_by_hand);
    world.request(CanaryAction::Resume, "2");
    world.run(1);
    assert_eq!((world.status.phase, world.status.step, world.status.weight), (Phase::Progressing, 0, 5));
    assert!(!world.status.paused_by_hand && world.status.paused_seconds > 400);
}

#[test]
fn abort_and_promote_do_what_they_say() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    world.request(CanaryAction::Abort, "1");
    world.run(1);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    world.request(CanaryAction::Promote, "2");
    world.run(1);
    assert_eq!(world.status.approved_revision, "new");
}

fn undecided(on_inconclusive: &str) -> World {
    let mut world = World::new(json!({
        "steps": [{"weight": 5, "hold": "10m"}], "deadline": "30s",
        "judge": {"minRequests": 1_000_000, "onInconclusive": on_inconclusive},
    }));
    world.deploy("new");
    world.run(60);
    world
}

#[test]
fn on_inconclusive_decides_about_a_rollout_that_is_undecided_at_its_deadline() {
    let world = undecided("Hold");
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 5));
    assert_eq!(world.condition("DeadlineExceeded"), ("True", "DeadlineExceeded"));
    assert_eq!(world.reasons().iter().filter(|reason| **reason == "DeadlineExceeded").count(), 1);
    assert!(
        world.status.evidence_summary.contains("at the present rate"),
        "{}",
        world.status.evidence_summary
    );
    let world = undecided("Rollback");
    assert_eq!(world.status.phase, Phase::Failed);
    assert!(world.status.history[0].because.contains("deadline of 30s"));
    assert_eq!(undecided("Promote").status.approved_revision, "new");
}

#[test]
fn a_pause_does_not_count_against_the_deadline() {
    let mut world = World::new(json!({
        "steps": [{"weight": 5, "hold": "1s"}, {"pause": {}}, {"weight": 25, "hold": "30s"}],
        "deadline": "100s", "judge": {"minRequests": 1, "onInconclusive": "Rollback"},
    }));
    world.deploy("new");
    world.run(500);
    assert_eq!(world.status.phase, Phase::Paused);
    world.request(CanaryAction::Resume, "1");
    world.run(20);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Progressing, 25));
    assert!(world.status.paused_seconds > 400);
}

#[test]
fn a_bad_version_is_stopped_although_a_client_refuses_and_is_undone_without_it() {
    let mut world = World::new(json!({"steps": [{"weight": 25, "hold": "600s"}], "onFailure": "Undo"}));
    world.deploy("bad");
    world.seen.acknowledged = awaited();
    world.canary_failures = 50;
    world.run(60);
    assert_eq!((world.status.phase, world.status.weight), (Phase::Failed, 0));
    let actions = world.run(31);
    assert!(actions.contains(&Action::Undo { revision: "old".into() }));
    assert_eq!(world.status.acknowledged_weight, 25, "nobody said that it is gone everywhere");
}

#[test]
fn where_requests_cannot_be_split_the_step_is_held_and_the_service_named() {
    for code in [EventReason::NoSplit, EventReason::ClientsDialPods] {
        let mut world = World::quick();
        world.deploy("new");
        let (service, reason) = ("web".to_owned(), "it selects two workloads".to_owned());
        world.seen.obstacles = vec![SplitObstacle { service, code, reason }];
        world.run(100);
        assert_eq!((world.status.weight, world.condition("Split")), (0, ("False", code.name())));
        assert_eq!(world.reasons().iter().filter(|reason| **reason == code.name()).count(), 1);
        world.request(CanaryAction::Promote, "1");
        world.run(1);
        assert_eq!(world.status.approved_revision, "new");
    }
}

#[test]
fn gates_of_a_superseded_revision_are_shut_before_its_successor_needs_capacity() {
    let mut world = World::quick();
    world.deploy("v2");
    while world.status.weight < 50 {
        world.run(1);
    }
    world.deploy("v3");
    let actions = world.run(1);
    assert!(
        actions.iter().any(|action| matches!(action, Action::ShutGate(pod) if pod.name.starts_with("v2")))
    );
    let serves = |pod: &&PodSeen| pod.revision == "v2" && pod.ready;
    assert_eq!(world.target().pods.iter().filter(serves).count(), 0);
}

#[test]
fn an_action_for_another_revision_does_nothing_and_its_id_is_used() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    let mut requested =
        Requested { action: CanaryAction::Promote, revision: Some("v9".into()), id: "1".into() };
    world.seen.action = Some(requested.clone());
    world.run(1);
    assert_eq!((world.status.phase, world.reasons().last()), (Phase::Progressing, Some(&"ActionIgnored")));
    world.request(CanaryAction::Abort, "2");
    world.run(1);
    assert_eq!(world.status.phase, Phase::Failed);
    requested.revision = Some("new".to_owned());
    world.seen.action = Some(requested);
    world.run(1);
    assert_eq!(world.status.phase, Phase::Failed, "an id that was used before acts never again");
}

#[test]
fn a_promotion_can_be_aborted_while_the_former_revision_serves() {
    let mut world = World::quick();
    world.deploy("new");
    world.run(3);
    world.request(CanaryAction::Promote, "1");
    let (status, _) = next(&world.spec, &world.status, &world.seen);
    world.status = status;
    world.request(CanaryAction::Abort, "2");
    let (status, _) = next(&world.spec, &world.status, &world.seen);
    assert_eq!((status.phase, status.approved_revision.as_str()), (Phase::Failed, "old"));
    assert_eq!((status.weight, status.failed_revision.as_str()), (0, "new"));
}

#[test]
fn going_back_to_an_approved_revision_needs_no_second_trial() {
    for (undo, phase) in [("Approve", Phase::Promoting), ("Trial", Phase::Progressing)] {
        let mut world =
            World::new(json!({"steps": [{"weight": 50, "hold": "10s"}], "judge": {"undo": undo}}));
        world.deploy("new");
        world.run(60);
        assert_eq!((world.status.phase, world.status.former_revision.as_str()), (Phase::Stable, ""));
        world.deploy("old");
        let (status, _) = next(&world.spec, &world.status, &world.seen);
        assert_eq!(status.phase, phase, "{undo}");
    }
}

#[test]
fn a_condition_that_this_build_does_not_know_is_not_kept() {
    let mut world = World::quick();
    let former = ("ProgressDeadline", false, "TooShort", "set progressDeadlineSeconds: 900");
    tulle_crds::set_condition(&mut world.status.conditions, former, 1, &Time(world.seen.now));
    world.run(1);
    let types: Vec<&str> = world.status.conditions.iter().map(|found| found.type_.as_str()).collect();
    assert_eq!(types, ["Ready", "Progressing"]);
}

#[test]
fn undo_without_the_right_to_undo_is_said_before_anything_fails() {
    let mut world = World::new(json!({"onFailure": "Undo"}));
    world.seen.undo_forbidden = true;
    world.run(1);
    assert_eq!(world.condition("Undo"), ("False", "NotPermitted"));
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
