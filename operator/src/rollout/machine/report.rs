//! What users read of a rollout: conditions, events, columns, history.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use tulle_crds::{HistoryEntry, Phase, RolloutOutcome, WorkloadKind, reason, set_condition};
use tulle_mesh::event_reason::EventReason;

use super::deadline::LATE;
use super::gates::CAPACITY;
use super::held::HELD;
use super::last::SERVING_FAILED;
use super::progress::{CLIENTLESS, has_no_service};
use super::returning::RETURNING;
use super::unhealthy::HEALTHY;
use super::{Action, Evaluation};
use crate::discovery::Acknowledgement;
use crate::model::WorkloadSeen;
use crate::rollout::exposure;

/// The condition that tells whom a rollout waits for.
const ACKNOWLEDGED: &str = "Acknowledged";
/// The condition of a promotion that its workload's controller does not finish.
const STALLED: &str = "Stalled";
/// The condition that tells whether the traffic can be split.
pub(super) const SPLIT: &str = "Split";
/// Every condition that this build writes. One that an operator of another version has left would stay for ever, with
/// advice that is no longer right.
const CONDITIONS: [&str; 13] = [
    "Ready",
    "Progressing",
    ACKNOWLEDGED,
    CAPACITY,
    HEALTHY,
    SPLIT,
    HELD,
    LATE,
    "Promoted",
    STALLED,
    SERVING_FAILED,
    RETURNING,
    "Undo",
];

impl Evaluation<'_> {
    pub(super) fn remember(&mut self, outcome: RolloutOutcome, because: &str) {
        let entry = HistoryEntry {
            revision: self.status.canary_revision.clone(),
            outcome,
            because: because.to_owned(),
            ended: Time(self.seen.now),
        };
        self.status.history.insert(0, entry);
        self.status.history.truncate(10);
    }

    pub(super) fn event(&mut self, reason: EventReason, message: String) {
        self.actions.push(Action::Event { reason, message });
    }

    pub(super) fn condition(&mut self, type_: &str, holds: bool, reason: &str, message: &str) {
        let now = Time(self.seen.now);
        set_condition(
            &mut self.status.conditions,
            (type_, holds, reason, message),
            self.seen.generation,
            &now,
        );
    }

    pub(super) fn has_condition(&self, type_: &str, holds: bool) -> bool {
        let status = if holds { "True" } else { "False" };
        self.status.conditions.iter().any(|c| c.type_ == type_ && c.status == status)
    }

    pub(super) fn drop_condition(&mut self, type_: &str) {
        self.status.conditions.retain(|condition| condition.type_ != type_);
    }

    /// While a Service gets no split, the weight that is shown would not be the weight that flows: the step is held.
    pub(super) fn show_obstacles(&mut self, target: &WorkloadSeen) {
        if !self.is_on_trial() {
            self.drop_condition(CAPACITY);
            self.drop_condition(HELD);
            return self.drop_condition(SPLIT);
        }
        if self.is_ungated_revision(target) {
            let message = format!(
                "pods of revision {} have no readiness gate, usually because they have no sidecar, so Kubernetes replaces the stable pods whatever the weight; {} stops it; remove the label tulle.dev/inject: disabled from the pod template, or label the namespace tulle.dev/inject=enabled, and deploy again. The step is held, and promote@ID in the annotation tulle.dev/action accepts the revision",
                self.status.canary_revision,
                self.target_command("undo")
            );
            return self.show_obstacle(EventReason::NoGate, &message);
        }
        let Some(first) = self.seen.obstacles.first() else {
            if has_no_service(target) {
                let message = "no Service selects the target, so no request reaches the new revision by its weight: create one, or correct the labels of the pod template";
                return self.condition(SPLIT, false, "NoService", message);
            }
            if let Some(unselected) = self.unselected(target) {
                return self.condition(SPLIT, false, "NoService", &unselected);
            }
            if self.is_without_clients() {
                return self.condition(SPLIT, false, "NoMeshedClient", CLIENTLESS);
            }
            let message = "every Service of the target can be split";
            return self.condition(SPLIT, true, "SplitApplies", message);
        };
        let more = match self.seen.obstacles.len() {
            1 => String::new(),
            all => format!(" (and {} more)", all - 1),
        };
        let message = format!(
            "requests to Service {} are not split: {}{more}; the step is held, and promote@ID or abort@ID in the annotation tulle.dev/action decides the rollout",
            first.service, first.reason
        );
        self.show_obstacle(first.code, &message);
    }

    /// The Service that does not select the pods on trial, although it selects others of the target.
    pub(super) fn unselected(&self, target: &WorkloadSeen) -> Option<String> {
        let mut pods = self.pods_on_trial(target);
        let first = pods.next()?.unselected.as_ref()?;
        pods.all(|pod| pod.unselected.is_some()).then(|| {
            format!(
                "Service {} does not select the pods of revision {}, which lack the label {}, so no request reaches them by its weight: correct the labels of the pod template, or the selector",
                first.service, self.status.canary_revision, first.label
            )
        })
    }

    /// Whether no sidecar sends to the target. One that did in this rollout may just have nothing to send.
    pub(super) fn is_without_clients(&self) -> bool {
        let evidence = self.evidence();
        self.seen.clientless && evidence.canary.attempts == 0 && evidence.stable.attempts == 0
    }

    fn show_obstacle(&mut self, code: EventReason, message: &str) {
        let known = |c: &Condition| c.type_ == SPLIT && c.reason == code.name();
        if !self.status.conditions.iter().any(known) {
            self.event(code, message.to_owned());
        }
        self.condition(SPLIT, false, code.name(), message);
    }

    /// Whether the step is held because the weight would not be what flows.
    pub(super) fn is_obstructed(&self, target: &WorkloadSeen) -> bool {
        !self.seen.obstacles.is_empty() || self.is_ungated_revision(target)
    }

    /// While a Deployment is paused, its controller replaces no pod, and a promotion never ends.
    pub(super) fn show_paused(&mut self) {
        let reason = EventReason::TargetPaused.name();
        let known = self.status.conditions.iter().any(|c| c.type_ == STALLED && c.reason == reason);
        if self.status.phase != Phase::Promoting || !self.seen.paused {
            if known {
                self.drop_condition(STALLED);
            }
            return;
        }
        let message = format!(
            "{} is paused (spec.paused), so its controller replaces no pod: {} goes on",
            self.status.target,
            self.target_command("resume")
        );
        if !known {
            self.event(EventReason::TargetPaused, message.clone());
        }
        self.condition(STALLED, true, reason, &message);
    }

    /// What is added to a sentence about missing pods.
    pub(super) fn paused_hint(&self) -> String {
        if !self.seen.paused {
            return String::new();
        }
        format!("; {} is paused, and {} goes on", self.status.target, self.target_command("resume"))
    }

    /// The command with which a user requests an action.
    pub(super) fn action_command(&self, action: &str) -> String {
        let (namespace, name) = (&self.seen.namespace, &self.seen.name);
        format!("kubectl -n {namespace} annotate --overwrite canary {name} tulle.dev/action={action}@ID")
    }

    /// The command that tells of the pods of the revision on trial.
    pub(super) fn pods_command(&self, verb: &str) -> String {
        let label = match self.spec.target.kind {
            WorkloadKind::Deployment => "pod-template-hash",
            WorkloadKind::StatefulSet | WorkloadKind::DaemonSet => "controller-revision-hash",
        };
        format!("kubectl -n {} {verb} pods -l {label}={}", self.seen.namespace, self.status.canary_revision)
    }

    /// The command that changes the rollout of the target.
    fn target_command(&self, verb: &str) -> String {
        let kind = self.spec.target.kind.name().to_lowercase();
        format!("kubectl -n {} rollout {verb} {kind}/{}", self.seen.namespace, self.spec.target.name)
    }

    pub(super) fn summarise(&mut self) {
        let steps = self.steps.len();
        let on_trial = matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Failed);
        let step = (self.status.step as usize + 1).min(steps);
        self.status.step_summary = if on_trial { format!("{step}/{steps}") } else { String::new() };
        let steering = self.status.acknowledged_steering.as_ref();
        let weight = exposure::summary(self.status.acknowledged_weight, steering);
        self.status.weight_summary = if on_trial { weight } else { String::new() };
        let progressing = matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Promoting);
        if self.status.phase != Phase::Promoting {
            self.status.promoted_because.clear();
        }
        self.status.conditions.retain(|condition| CONDITIONS.contains(&condition.type_.as_str()));
        let message = format!("{:?}", self.status.phase);
        self.condition("Progressing", progressing, &message.clone(), &message);
        if matches!(self.status.phase, Phase::Progressing | Phase::Paused | Phase::Failed) {
            self.show_acknowledgement();
        } else {
            self.status.conditions.retain(|condition| condition.type_ != ACKNOWLEDGED);
        }
    }

    /// Whoever asks why a rollout stands still is told whom it waits for.
    fn show_acknowledgement(&mut self) {
        let weight = exposure::summary(self.status.weight, self.status.steering.as_ref());
        match &self.seen.acknowledged {
            Acknowledgement::Refused(why) if !self.changed => {
                let known = |c: &Condition| c.type_ == ACKNOWLEDGED && c.reason == reason::REFUSED;
                if !self.status.conditions.iter().any(known) {
                    self.event(
                        EventReason::RefusedBySidecar,
                        format!("a sidecar refused the weight of {weight}: {why}"),
                    );
                }
                self.condition(ACKNOWLEDGED, false, reason::REFUSED, why);
            }
            Acknowledgement::Awaited(who) if !self.changed => {
                self.condition(
                    ACKNOWLEDGED,
                    false,
                    reason::PROPAGATING,
                    &format!("{weight} is not acknowledged by all sidecars; {who}"),
                );
            }
            Acknowledgement::Complete if !self.changed => {
                let message = format!("every sidecar that sends to the target has acknowledged {weight}");
                self.condition(ACKNOWLEDGED, true, ACKNOWLEDGED, &message);
            }
            _ => self.condition(
                ACKNOWLEDGED,
                false,
                reason::PROPAGATING,
                &format!("{weight} was set just now; waiting for sidecars"),
            ),
        }
    }

    /// A promotion that had stalled has ended, if there was one.
    pub(super) fn no_longer_stalled(&mut self, reason: &str, message: &str) {
        if self.status.conditions.iter().any(|condition| condition.type_ == STALLED) {
            self.condition(STALLED, false, reason, message);
        }
    }
}
