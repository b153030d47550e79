//! Whatever happens, in whatever order: random worlds in which pods come and go, sidecars lag, writes are lost and
//! looks are repeated.

use serde_json::json;
use tulle_crds::{AttemptTotals, CanaryAction};

use super::*;
use crate::model::PodSeen;
use crate::rollout::judge::Side;

const RUNS: u64 = 10_000;
const LOOKS: usize = 60;

/// Small, quick, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn spec(random: &mut Random) -> CanarySpec {
    let inconclusive = ["Hold", "Promote", "Rollback"][random.below(3) as usize];
    let insiders = json!([{"header": {"name": "x-group", "exact": "insider"}}]);
    let testers = json!([{"cookie": {"name": "group", "exact": "tester"}}]);
    let steps = match random.below(7) {
        0 => json!([{"weight": 25, "hold": "3s"}, {"weight": 50, "hold": "3s"}]),
        1 => json!([{"weight": 5, "hold": "2s"}, {"pause": {}}, {"weight": 100, "hold": "2s"}]),
        2 => json!([{"match": insiders, "hold": "2s"}, {"weight": 25, "hold": "2s"}]),
        3 => json!([{"mirror": 20, "hold": "2s"}, {"pause": {}}, {"match": testers, "hold": "2s"}]),
        4 => {
            json!([{"match": insiders, "hold": "2s"}, {"mirror": 50, "hold": "2s"}, {"weight": 50, "hold": "2s"}])
        }
        5 => json!([{"weight": 100, "hold": "3s"}]),
        _ => json!([{"weight": 50, "hold": "2s"}]),
    };
    let sticky = if random.one_in(2) { json!({"cookie": "version"}) } else { json!(null) };
    serde_json::from_value(json!({
        "target": {"kind": "Deployment", "name": "web"}, "steps": steps, "deadline": "40s", "sticky": sticky,
        "capacity": {"keepStable": random.one_in(3)},
        "onFailure": if random.one_in(2) { "Undo" } else { "Hold" },
        "judge": {"minRequests": 20, "onInconclusive": inconclusive, "latency": {"worseBy": 0.0}},
    }))
    .unwrap()
}

fn pod(revision: &str, number: u64) -> PodSeen {
    PodSeen {
        name: format!("{revision}-{number}"),
        uid: format!("{revision}-{number}").into(),
        revision: revision.to_owned(),
        containers_ready: true,
        ready: true,
        ..PodSeen::default()
    }
}

fn world() -> Observation {
    Observation {
        now: Timestamp::UNIX_EPOCH,
        namespace: "shop".into(),
        name: "web".into(),
        paused: false,
        generation: 1,
        target: Some(WorkloadSeen {
            replicas: 3,
            progress_deadline: 20,
            latest: Some("r0".to_owned()),
            pods: (0..3).map(|n| pod("r0", n)).collect(),
            ..WorkloadSeen::default()
        }),
        acknowledged: Acknowledgement::Complete,
        block: Vec::new(),
        block_ended: false,
        obstacles: Vec::new(),
        clientless: false,
        failing: None,
        undo_forbidden: false,
        action: None,
        conflict: None,
    }
}

/// Something happens, or nothing.
fn happen(seen: &mut Observation, status: &CanaryStatus, random: &mut Random) {
    seen.now += SignedDuration::from_secs(1 + random.below(4) as i64);
    let target = seen.target.as_mut().unwrap();
    match random.below(13) {
        0 => {
            let revision = format!("r{}", random.below(4));
            let gated = revision != status.approved_revision;
            let parked = PodSeen { parked: gated, ready: !gated, ..pod(&revision, 10 + random.below(3)) };
            target.pods.retain(|pod| pod.name != parked.name);
            target.pods.push(parked);
            target.latest = Some(revision);
        }
        1 if !target.pods.is_empty() => {
            let at = random.below(target.pods.len() as u64) as usize;
            target.pods.remove(at);
        }
        2 => {
            for pod in &mut target.pods {
                pod.containers_ready = !random.one_in(3);
                pod.ready = pod.containers_ready && !pod.parked;
            }
        }
        3 if random.one_in(3) => target.pods.clear(),
        4 => {
            let approved = status.approved_revision.clone();
            target.pods.push(pod(&approved, 20 + random.below(2)));
            target.pods.dedup_by(|a, b| a.name == b.name);
        }
        5 => seen.acknowledged = Acknowledgement::Awaited("pod a".to_owned()),
        6 => seen.acknowledged = Acknowledgement::Refused("pod a".to_owned()),
        7 | 8 => seen.acknowledged = Acknowledgement::Complete,
        9 => {
            use CanaryAction::{Abort, Pause, Promote, Resume, Retry};
            let action = [Promote, Abort, Pause, Resume, Retry][random.below(5) as usize];
            seen.action = Some(Requested { action, revision: None, id: random.below(6).to_string() });
        }
        10 if target.latest.as_deref().is_some_and(|latest| latest != status.approved_revision) => {
            // A full surge.
            let latest = target.latest.clone().unwrap();
            for number in 10..13 {
                let name = format!("{latest}-{number}");
                if !target.pods.iter().any(|pod| pod.name == name) {
                    target.pods.push(PodSeen { parked: true, ready: false, ..pod(&latest, number) });
                }
            }
        }
        _ => {}
    }
}

fn attempts(seen: &mut Observation, status: &CanaryStatus, random: &mut Random) {
    seen.block.clear();
    seen.block_ended = random.one_in(2);
    if !is_exposed(status) {
        return;
    }
    let bad = random.one_in(6);
    for (side, attempts, failures) in [(Side::Canary, 15, if bad { 12 } else { 0 }), (Side::Stable, 30, 0)] {
        let totals = AttemptTotals { attempts, failures, ..AttemptTotals::default() };
        seen.block.push(PodBlock { side, totals, ..PodBlock::default() });
    }
}

/// Kubernetes does what was asked of it.
fn carry_out(seen: &mut Observation, actions: &[Action]) {
    let target = seen.target.as_mut().unwrap();
    for action in actions {
        let (name, open) = match action {
            Action::OpenGate(pod) => (pod, true),
            Action::ShutGate(pod) => (pod, false),
            _ => continue,
        };
        for pod in target.pods.iter_mut().filter(|pod| *pod.uid == *name.uid) {
            (pod.parked, pod.opened, pod.ready) = (!open, open, open && pod.containers_ready);
        }
    }
}

/// What flows besides the weight, and who may be sent to a version at all.
fn check_steering(spec: &CanarySpec, before: &CanaryStatus, after: &CanaryStatus, seen: &Observation) {
    if after.steering != before.steering && after.phase != Phase::Stable {
        assert!(after.epoch > before.epoch, "another steering is a new epoch");
    }
    let known = [&None, &before.acknowledged_steering, &before.steering];
    assert!(known.contains(&&after.acknowledged_steering), "{:?} was never set", after.acknowledged_steering);
    if matches!(after.phase, Phase::Failed | Phase::Stable | Phase::Waiting) {
        assert_eq!(after.steering, None, "nobody is sent to a version that is not on trial");
    }
    if after.phase == Phase::Promoting {
        assert_eq!(
            after.steering.as_ref().map(|steering| steering.mirror),
            Some(0),
            "an approved version gets no copies"
        );
        let target = seen.target.as_ref().unwrap();
        let of_it = target.pods.iter().filter(|pod| pod.revision == after.approved_revision);
        let ready = of_it.filter(|pod| pod.containers_ready).count();
        let carried = u32::try_from(100 * ready).unwrap() / target.replicas;
        let falls = after.weight < before.weight && carried + 100 / target.replicas < before.weight;
        assert!(
            before.phase != Phase::Promoting
                || before.approved_revision != after.approved_revision
                || after.weight >= before.weight
                || (falls && after.weight >= carried),
            "users were sent back during a promotion although its pods are ready"
        );
    }
    let changes = after.epoch > before.epoch && after.phase == Phase::Progressing && is_exposed(after);
    if changes && before.canary_revision == after.canary_revision {
        let wanted = Wanted::of(spec, &steps(spec), after.step as usize);
        let flows = Wanted { weight: after.weight, steering: after.steering.clone() };
        let target = seen.target.as_ref().unwrap();
        let stable = [&after.approved_revision, &after.former_revision];
        let left_alone =
            after.weight == 100 && !target.pods.iter().any(|pod| stable.contains(&&pod.revision));
        assert!(flows == wanted || left_alone, "{flows:?} flows, and the step asks for {wanted:?}");
        let of_it = target.pods.iter().filter(|pod| pod.revision == after.canary_revision);
        let ready = of_it.filter(|pod| pod.containers_ready).count();
        assert!(ready > 0, "requests are sent to a version without a ready pod");
        if after.weight == 100 && spec.capacity.keep_stable && !left_alone {
            assert!(ready >= target.replicas as usize, "the switch found {ready} ready pods");
        }
    }
}

fn check(
    spec: &CanarySpec,
    before: &CanaryStatus,
    after: &CanaryStatus,
    actions: &[Action],
    seen: &Observation,
) {
    check_steering(spec, before, after, seen);
    let target = seen.target.as_ref().unwrap();
    let stable =
        |pod: &&PodSeen| pod.revision == after.approved_revision || pod.revision == after.former_revision;
    let returning = after.conditions.iter().any(|c| c.type_ == "Returning" && c.status == "True");
    assert!(
        !returning || (after.phase == Phase::Failed && after.weight > 0),
        "there is nothing to return from"
    );
    if after.phase == Phase::Failed && after.weight > 0 && !returning {
        let ready = target.pods.iter().filter(stable).any(|pod| pod.ready);
        assert!(!ready, "a failed revision has weight although a stable pod is ready");
    }
    assert!(
        after.approved_revision.is_empty() || after.approved_revision != after.failed_revision,
        "a failed revision is approved: {before:?} became {after:?} by {actions:?}"
    );
    assert!(after.epoch >= before.epoch, "epochs only grow");
    if after.weight != before.weight && after.phase != Phase::Stable {
        assert!(after.epoch > before.epoch, "a new weight is a new epoch");
    }
    let shown = after.acknowledged_weight;
    let known = [0, before.acknowledged_weight, before.weight];
    assert!(known.contains(&shown), "{shown}% was never set");
    if shown != 0
        && shown == before.weight
        && shown != before.acknowledged_weight
        && after.phase != Phase::Failed
    {
        assert_eq!(seen.acknowledged, Acknowledgement::Complete, "the weight shown is acknowledged");
    }
    if !after.approved_revision.is_empty() {
        let latest = target.latest.as_deref().unwrap_or_default();
        assert_eq!(after.decided_revision, latest, "a new revision is noticed in every phase");
    }
    let begins = after.started != before.started && after.phase == Phase::Progressing;
    assert!(!begins || after.evidence == Evidence::default(), "a rollout begins without evidence");
    for action in actions {
        if let Action::OpenGate(pod) = action {
            let pod = target.pods.iter().find(|seen| *seen.uid == *pod.uid).unwrap();
            let of = |s: &CanaryStatus| {
                [s.approved_revision.clone(), s.former_revision.clone(), s.canary_revision.clone()]
            };
            let wanted = of(before).contains(&pod.revision) || of(after).contains(&pod.revision);
            assert!(wanted, "a gate of a superseded revision was opened");
            let on_trial = pod.revision == after.canary_revision && pod.revision != after.former_revision;
            let for_capacity = after.phase == Phase::Progressing && on_trial;
            let given_up = for_capacity && target.pods.iter().any(|pod| stable(&pod));
            assert!(!given_up || !spec.capacity.keep_stable, "a stable pod was given up");
        }
    }
    let promoted = after.phase == Phase::Promoting && before.phase != Phase::Promoting;
    if promoted && after.verdict == CanaryVerdict::Fail {
        let by_hand = after.last_action != before.last_action;
        let nothing_left = actions
            .iter()
            .any(|action| matches!(action, Action::Event { reason: EventReason::NothingToCompareWith, .. }));
        assert!(by_hand || nothing_left, "a failed verdict promotes nothing");
    }
    assert!(after.used_actions.len() <= 32 && after.history.len() <= 10);
}

#[test]
fn the_invariants_hold_whatever_happens() {
    for seed in 1..=RUNS {
        let run = std::panic::catch_unwind(|| one_run(seed));
        assert!(run.is_ok(), "seed {seed} breaks an invariant: see the panic above");
    }
}

fn one_run(seed: u64) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut spec = spec(&mut random);
    let mut seen = world();
    let mut status = CanaryStatus::default();
    let mut acted: Vec<String> = Vec::new();
    for _ in 0..LOOKS {
        if random.one_in(15) {
            // It is edited in the middle.
            spec = self::spec(&mut random);
        }
        happen(&mut seen, &status, &mut random);
        attempts(&mut seen, &status, &mut random);
        let (after, actions) = next(&spec, &status, &seen);
        check(&spec, &status, &after, &actions, &seen);
        if random.one_in(8) {
            // The write was lost, or the operator ended before it: all of it is decided anew.
            continue;
        }
        if after.last_action != status.last_action {
            assert!(!acted.contains(&after.last_action), "request id {} acted twice", after.last_action);
            acted.push(after.last_action.clone());
        }
        if after.epoch != status.epoch {
            seen.acknowledged = Acknowledgement::Awaited("pod a".to_owned());
        }
        if random.one_in(8) {
            // It ended after the write and before it acted: nothing depends on that.
            status = after;
            continue;
        }
        carry_out(&mut seen, &actions);
        if random.one_in(8) {
            carry_out(&mut seen, &actions);
        }
        status = after;
        seen.block.clear();
        seen.block_ended = false;
    }
}
