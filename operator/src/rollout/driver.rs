//! Carries out what the machine decides, for every Canary, on the replica that leads.

mod deadline;
mod events;
mod paused;
mod undo;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource as _};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tulle_crds::{Canary, CanaryAction, CanaryStatus, Phase, keys};
use tulle_mesh::event_reason::EventReason;

use super::exposure::{is_exposed, may_be_exposed};
use super::input::JudgeInputs;
use super::machine::{self, Action, Observation, PodName};
use crate::discovery::{AckTracker, Acknowledgement, PodDialling};
use crate::lease::Leadership;
use crate::model::{Key, Model, SplitObstacle, WorkloadKey};
use crate::telemetry::Aggregates;
use crate::watch::Hub;

/// How often a Canary with a rollout is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often one at rest is, if nothing about it has changed.
const REST_EVERY: Duration = Duration::from_secs(10);
/// How often pods are looked for that no Canary holds.
const ORPHANS_EVERY: Duration = Duration::from_secs(5);
/// How long a new leader lets a rollout wait for sidecars that it has not heard of. Only advancing waits.
const UNHEARD: Duration = Duration::from_secs(60);
/// One look and what it writes may take this long: an answer that never comes must not stop the others.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// Counts and sentences alone are written this often: each write goes to every replica.
const WRITE_EVIDENCE_EVERY: Duration = Duration::from_secs(3);
/// Canaries that are looked at at the same time.
const AT_ONCE: usize = 8;

/// Drives every Canary.
pub struct Driver {
    client: Client,
    hub: Arc<Hub>,
    acks: Arc<AckTracker>,
    aggregates: Arc<Aggregates>,
    /// What the judge decides by; the query API reads it too.
    inputs: Arc<JudgeInputs>,
    published: Mutex<events::Published>,
    /// Canaries, by their epoch, whose target could not be restored, and when that was.
    undo_failed: Mutex<HashMap<(Key, u64), Instant>>,
    /// Namespaces in which the operator may or may not change Deployments, and when that was asked.
    may_undo: Mutex<HashMap<Arc<str>, (Instant, bool)>>,
    /// What is known of each Canary besides its status.
    known: Mutex<HashMap<Key, Known>>,
}

#[derive(Default)]
struct Known {
    looked: Option<Instant>,
    /// When its status was last written.
    written: Option<Instant>,
    /// When the deadline of its Deployment was last moved.
    held: Option<Instant>,
    /// How many times in a row that has failed.
    not_held: u32,
    /// Ready pods of the new version at the last look, while it is on trial.
    ready_on_trial: Option<usize>,
    /// Whether its Deployment is paused, and when that was asked.
    paused: Option<(Instant, bool)>,
}

impl Driver {
    /// A driver.
    pub fn new(client: Client, hub: Arc<Hub>, acks: Arc<AckTracker>, aggregates: Arc<Aggregates>) -> Self {
        Self {
            client,
            hub,
            acks,
            aggregates,
            inputs: Arc::default(),
            published: Mutex::default(),
            undo_failed: Mutex::default(),
            may_undo: Mutex::default(),
            known: Mutex::default(),
        }
    }

    /// What the judge decides by, as long as this replica leads.
    pub fn inputs(&self) -> Arc<JudgeInputs> {
        Arc::clone(&self.inputs)
    }

    /// Looks at every Canary for ever, while this replica leads.
    pub async fn run(self, leadership: watch::Receiver<Leadership>) {
        let mut follower = self.hub.follow();
        let mut leads_since = None;
        let mut orphans_at: Option<Instant> = None;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let touched = follower.next().now_or_never();
            if !leadership.borrow().mine || !self.hub.is_synced() {
                lock(&self.known).clear();
                self.inputs.clear();
                leads_since = None;
                continue;
            }
            let led = leads_since.get_or_insert_with(Instant::now).elapsed();
            let (everything, named) = touched.map_or_else(Default::default, |t| (t.everything, t.canaries));
            if orphans_at.is_none_or(|at| at.elapsed() >= ORPHANS_EVERY) {
                orphans_at = Some(Instant::now());
                let _ = timeout(LOOK_TIMEOUT, self.open_orphaned_gates(&leadership)).await;
            }
            let due = self.due(everything, &named);
            for some in due.chunks(AT_ONCE) {
                if !leadership.borrow().mine {
                    break;
                }
                let mut looks = Vec::with_capacity(some.len());
                for (key, canary) in some {
                    looks.push(timeout(LOOK_TIMEOUT, self.look(key, canary, led, &leadership)));
                }
                futures::future::join_all(looks).await;
            }
        }
    }

    /// Canaries that there is something to do for.
    fn due(&self, everything: bool, named: &HashSet<Key>) -> Vec<(Key, Canary)> {
        let model = self.hub.model();
        let mut known = lock(&self.known);
        let mut due = Vec::new();
        let mut all = HashSet::new();
        for (key, canary) in model.canaries() {
            all.insert(key.clone());
            let its = known.entry(key.clone()).or_default();
            let rested = its.looked.is_none_or(|at| at.elapsed() >= REST_EVERY);
            if everything || rested || named.contains(key) || is_moving(canary.status.as_ref()) {
                its.looked = Some(Instant::now());
                due.push((key.clone(), canary.clone()));
            }
        }
        if known.len() > all.len() {
            known.retain(|key, _| all.contains(key));
        }
        self.inputs.retain(|key| all.contains(key));
        self.aggregates.retain_canaries(|key| all.contains(key));
        due
    }

    /// One look at one Canary.
    async fn look(
        &self,
        key: &Key,
        canary: &Canary,
        led: Duration,
        leadership: &watch::Receiver<Leadership>,
    ) {
        let status = canary.status.clone().unwrap_or_default();
        let undo_forbidden = self.undo_forbidden(key, canary).await;
        let paused = self.is_paused(key, canary).await;
        let seen = Observation { undo_forbidden, paused, ..self.see(key, canary, led) };
        let (next, actions) = machine::next(&canary.spec, &status, &seen);
        if !leadership.borrow().mine {
            return;
        }
        // What an event reports must be in the status at the next look, or the event is published again.
        let publishes = actions.iter().any(|action| matches!(action, Action::Event { .. }));
        if next != status && (publishes || !self.may_wait(key, &status, &next)) {
            let closes = next.epoch != status.epoch || (seen.block_ended && is_exposed(&status));
            if let Some(known) = lock(&self.known).get_mut(key) {
                known.written = Some(Instant::now());
            }
            self.inputs.write(key, closes.then_some(&next));
            let api = Api::<Canary>::namespaced(self.client.clone(), &key.0);
            let version = canary.metadata.resource_version.as_deref();
            if let Err(error) = crate::status::write(&api, &key.1, version, &next).await {
                // Somebody else has written, or the API server is away: the next look begins anew.
                tracing::debug!(namespace = %key.0, name = %key.1, %error, "a canary's status was not written");
                return;
            }
        }
        for action in &actions {
            // Another replica may lead by now: what it does must not be undone here.
            if !leadership.borrow().mine {
                return;
            }
            if let Err(error) = self.carry_out(key, canary, &next, action).await {
                tracing::warn!(namespace = %key.0, name = %key.1, ?action, %error, "an action failed; it is tried again");
            }
        }
        // The older one of two Canaries holds the target back, if any does.
        let target = seen.target.as_ref().filter(|_| seen.conflict.is_none());
        self.hold_deadline(key, canary, &next, target).await;
    }

    /// Whether only counts and sentences have changed, and the status was written a moment ago.
    fn may_wait(&self, key: &Key, status: &CanaryStatus, next: &CanaryStatus) -> bool {
        let recently = |known: &Known| known.written.is_some_and(|at| at.elapsed() < WRITE_EVIDENCE_EVERY);
        without_sentences(status) == without_sentences(next)
            && lock(&self.known).get(key).is_some_and(recently)
    }

    /// What is seen in the model. What only the API server knows is added.
    fn see(&self, key: &Key, canary: &Canary, led: Duration) -> Observation {
        let model = self.hub.model();
        let status = canary.status.clone().unwrap_or_default();
        let workload = WorkloadKey {
            kind: canary.spec.target.kind,
            namespace: Arc::clone(&key.0),
            name: canary.spec.target.name.as_str().into(),
        };
        let now = Timestamp::now();
        let target = model.workload(&workload);
        let ready = target.as_ref().is_some_and(|target| {
            let mut pods = target.pods.iter();
            pods.any(|pod| pod.containers_ready && pod.revision == status.canary_revision)
        });
        let input = self.inputs.take(&self.aggregates, key, canary, now, ready);
        let on_trial = matches!(status.phase, Phase::Progressing | Phase::Paused);
        let annotation = canary.metadata.annotations.as_ref().and_then(|all| all.get(keys::ACTION));
        Observation {
            now,
            namespace: Arc::clone(&key.0),
            name: Arc::clone(&key.1),
            generation: canary.metadata.generation.unwrap_or_default(),
            target,
            paused: false,
            conflict: model
                .canary_of(&workload)
                .filter(|(holds, _)| *holds != key)
                .map(|(holds, _)| holds.1.to_string()),
            acknowledged: self.acknowledged(&model, key, &status, led),
            block: input.pods.into_iter().map(|pod| pod.block).collect(),
            block_ended: input.block_ended,
            failing: input.failing,
            obstacles: if on_trial { self.obstacles(&model, &workload, led) } else { Vec::new() },
            clientless: on_trial && self.is_clientless(&model, key, &workload, led),
            undo_forbidden: false,
            action: annotation.and_then(|text| CanaryAction::parse(text.as_str())),
        }
    }

    /// What keeps sidecars from choosing the version: the Services, or clients that never see a Service's address.
    fn obstacles(&self, model: &Model, workload: &WorkloadKey, led: Duration) -> Vec<SplitObstacle> {
        let mut obstacles = model.split_obstacles(workload);
        // While sidecars come back, whoever dials the Service may not have been heard of.
        if led >= UNHEARD || self.acks.unheard(model).is_none() {
            obstacles.extend(self.acks.dials_pods(model, workload).map(clients_dial_pods));
        }
        obstacles
    }

    /// Whether no sidecar sends to the workload, as far as all have reported.
    fn is_clientless(&self, model: &Model, key: &Key, workload: &WorkloadKey, led: Duration) -> bool {
        let all_reported = led >= UNHEARD || self.acks.unheard(model).is_none();
        all_reported && !self.acks.has_clients(model, key, workload)
    }

    /// Who has acknowledged is asked only where it decides something.
    fn acknowledged(
        &self,
        model: &Model,
        key: &Key,
        status: &CanaryStatus,
        led: Duration,
    ) -> Acknowledgement {
        let zero = status.weight == 0;
        match status.phase {
            Phase::Progressing | Phase::Paused => {}
            Phase::Failed if !zero || may_be_exposed(status) => {}
            // That nothing is sent any more has been acknowledged, and stays so.
            Phase::Failed => return Acknowledgement::Complete,
            Phase::Waiting | Phase::Stable | Phase::Promoting => {
                return Acknowledgement::Awaited(String::new());
            }
        }
        let answer = self.acks.acknowledged_canary(model, key, status.epoch);
        if answer != Acknowledgement::Complete {
            return answer;
        }
        // Sidecars that nobody has heard of are unknown, not absent. They may hold up a step for a minute; that
        // nothing is sent any more is not said before all are heard of.
        match self.acks.unheard(model) {
            Some(unheard) if led < UNHEARD || (zero && status.phase == Phase::Failed) => {
                Acknowledgement::Awaited(unheard)
            }
            _ => Acknowledgement::Complete,
        }
    }

    /// `status`: the one that was decided with the action.
    async fn carry_out(
        &self,
        key: &Key,
        canary: &Canary,
        status: &CanaryStatus,
        action: &Action,
    ) -> anyhow::Result<()> {
        match action {
            Action::OpenGate(pod) => self.set_gate(&key.0, pod, true).await,
            Action::ShutGate(pod) => self.set_gate(&key.0, pod, false).await,
            Action::Undo { revision } => {
                self.try_undo(key, canary, status, revision).await;
                Ok(())
            }
            Action::Event { reason, message } => {
                tracing::info!(namespace = %key.0, canary = %key.1, reason = reason.name(), message);
                self.tell(canary, status, *reason, message).await
            }
        }
    }

    async fn tell(
        &self,
        canary: &Canary,
        status: &CanaryStatus,
        reason: EventReason,
        message: &str,
    ) -> anyhow::Result<()> {
        let regarding = canary.object_ref(&());
        let hash = events::hash(&regarding, status, reason, message);
        if !lock(&self.published).is_new(hash) {
            return Ok(());
        }
        let namespace = regarding.namespace.clone().unwrap_or_default();
        let event = events::event(regarding, hash, reason, message, Timestamp::now());
        let api = Api::<Event>::namespaced(self.client.clone(), &namespace);
        api.create(&PostParams::default(), &event).await?;
        lock(&self.published).remember(hash);
        Ok(())
    }

    async fn set_gate(&self, namespace: &str, pod: &PodName, open: bool) -> anyhow::Result<()> {
        let status = if open { "True" } else { "False" };
        let condition =
            json!({"type": keys::GATE, "status": status, "lastTransitionTime": Timestamp::now().to_string()});
        let mut patch = json!({"status": {"conditions": [condition]}});
        if !pod.uid.is_empty()
            && let Some(whole) = patch.as_object_mut()
        {
            // A precondition: a pod of the same name that has come since is left alone.
            whole.insert("metadata".to_owned(), json!({"uid": pod.uid}));
        }
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        // Strategic: conditions are merged by type, those of kubelet stay.
        api.patch_status(&pod.name, &PatchParams::default(), &Patch::Strategic(&patch)).await?;
        Ok(())
    }

    /// Pods that wait for a Canary that is gone would wait for ever.
    async fn open_orphaned_gates(&self, leadership: &watch::Receiver<Leadership>) {
        let orphaned = self.hub.model().orphaned_gates();
        for (namespace, name) in orphaned {
            if !leadership.borrow().mine {
                return;
            }
            let pod = PodName { name, uid: String::new() };
            if let Err(error) = self.set_gate(&namespace, &pod, true).await {
                tracing::warn!(namespace, pod = pod.name, %error, "cannot open a gate that no Canary holds");
            }
        }
    }
}

/// The obstacle that clients' connections lead past the Service.
fn clients_dial_pods(found: PodDialling) -> SplitObstacle {
    let PodDialling { service, clients, first, by_choice } = found;
    let who = match clients {
        1 => format!("pod {first} dials"),
        more => format!("{more} pods, {first} among them, dial"),
    };
    let remedy = match by_choice {
        true => {
            "it dials other Services by their address, so it chooses pods itself: configure it to use the Service (ingress-nginx: annotation nginx.ingress.kubernetes.io/service-upstream: \"true\")"
        }
        false => {
            "with Cilium's socket load balancer, set socketLB.hostNamespaceOnly: true; a client that looks pods up itself must use the Service"
        }
    };
    let reason = format!(
        "{who} its pods by address and no sidecar has seen a connection to the Service itself, so the sidecars cannot choose the version; {remedy}"
    );
    SplitObstacle { service, code: EventReason::ClientsDialPods, reason }
}

/// Whether a rollout is in progress, or its end is not acknowledged yet.
fn is_moving(status: Option<&CanaryStatus>) -> bool {
    status.is_some_and(|status| match status.phase {
        Phase::Progressing | Phase::Paused | Phase::Promoting => true,
        Phase::Failed => may_be_exposed(status) || status.weight > 0,
        Phase::Waiting | Phase::Stable => false,
    })
}

/// A status without what changes at every look.
fn without_sentences(status: &CanaryStatus) -> CanaryStatus {
    let mut status =
        CanaryStatus { evidence: Default::default(), evidence_summary: String::new(), ..status.clone() };
    for condition in &mut status.conditions {
        condition.message.clear();
    }
    status
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
