//! Carries out what the machine decides, for every Canary, on the replica that leads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::core::ApiResource;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource as _};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tulle_crds::{Canary, CanaryAction, CanaryStatus, Phase, WorkloadKind, keys};

use super::machine::{self, Action, Seen};
use crate::discovery::{Acknowledgement, Registry};
use crate::lease::Leadership;
use crate::model::{Key, WorkloadKey};
use crate::telemetry::{Aggregates, Counts};
use crate::watch::Hub;

/// How often each Canary is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a new leader waits for the other replicas, and the sidecars of one that has gone, to say what
/// they enforce: what it has not heard of is unknown, not acknowledged.
const SETTLED: Duration = Duration::from_secs(30);
/// One look and what it writes may take this long: an answer that never comes must not stop the others.
const LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// An action that failed at this look is not tried again before.
const RETRY_UNDO: Duration = Duration::from_secs(30);
/// Counts alone are written this often: each write goes to every replica and every sidecar's view.
const WRITE_EVIDENCE_EVERY: Duration = Duration::from_secs(3);
/// Canaries that are looked at at the same time.
const AT_ONCE: usize = 8;

/// Drives every Canary.
pub struct Driver {
    client: Client,
    hub: Arc<Hub>,
    registry: Arc<Registry>,
    aggregates: Arc<Aggregates>,
    recorder: Recorder,
    /// Canaries, by their epoch, whose target could not be restored, and when that was.
    undo_failed: Mutex<HashMap<(Key, u64), Instant>>,
    /// When the status of a Canary was last written.
    written: Mutex<HashMap<Key, Instant>>,
}

/// What had been counted at the last look: for a Canary, of its two revisions.
type Baselines = HashMap<(Key, String), Counts>;
/// One of them.
type Total = ((Key, String), Counts);

impl Driver {
    /// A driver.
    pub fn new(client: Client, hub: Arc<Hub>, registry: Arc<Registry>, aggregates: Arc<Aggregates>) -> Self {
        let reporter = Reporter { controller: "tulle-operator".to_owned(), instance: None };
        let recorder = Recorder::new(client.clone(), reporter);
        Self {
            recorder,
            client,
            hub,
            registry,
            aggregates,
            undo_failed: Mutex::default(),
            written: Mutex::default(),
        }
    }

    /// Looks at every Canary for ever, while this replica leads.
    pub async fn run(self, leadership: watch::Receiver<Leadership>) {
        let mut baselines = Baselines::new();
        let mut leads_since = None;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !leadership.borrow().mine || !self.hub.is_synced() {
                baselines.clear();
                leads_since = None;
                continue;
            }
            let settled = leads_since.get_or_insert_with(Instant::now).elapsed() > SETTLED;
            let _ = timeout(LOOK_TIMEOUT, self.open_orphaned_gates()).await;
            let canaries: Vec<(Key, Canary)> =
                self.hub.model().canaries().map(|(key, canary)| (key.clone(), canary.clone())).collect();
            for some in canaries.chunks(AT_ONCE) {
                if !leadership.borrow().mine {
                    break;
                }
                let mut looks = Vec::with_capacity(some.len());
                for (key, canary) in some {
                    looks.push(timeout(LOOK_TIMEOUT, self.look(key, canary, &baselines, settled)));
                }
                let looked = futures::future::join_all(looks).await;
                for counted in looked.into_iter().flatten().flatten() {
                    baselines.extend(counted);
                }
            }
        }
    }

    /// One look at one Canary. Returns what had been counted, once the status that holds it is written:
    /// counts that were not written are counted again.
    async fn look(
        &self,
        key: &Key,
        canary: &Canary,
        baselines: &Baselines,
        settled: bool,
    ) -> Option<Vec<Total>> {
        let status = canary.status.clone().unwrap_or_default();
        let (mut seen, totals) = self.see(key, canary, baselines);
        if !settled && seen.acknowledged == Acknowledgement::Complete {
            let why = "this operator leads since a moment ago: not every sidecar may have been heard of";
            seen.acknowledged = Acknowledgement::Awaited(why.to_owned());
        }
        let (next, actions) = machine::next(&canary.spec, &status, &seen);
        // What is decided with and not written is counted again at the next look.
        let waits = next != status && self.may_wait(key, &status, &next);
        if next != status && !waits {
            let api = Api::<Canary>::namespaced(self.client.clone(), &key.0);
            let version = canary.metadata.resource_version.as_deref();
            if let Err(error) = crate::status::write(&api, &key.1, version, &next).await {
                // Somebody else has written, or the API server is away: the next look begins anew.
                tracing::debug!(namespace = %key.0, name = %key.1, %error, "a canary's status was not written");
                return None;
            }
            lock(&self.written).insert(key.clone(), Instant::now());
        }
        for action in &actions {
            if let Err(error) = self.carry_out(key, canary, action).await {
                tracing::warn!(namespace = %key.0, name = %key.1, ?action, %error, "an action failed; it is tried again");
            }
        }
        (!waits).then_some(totals)
    }

    /// Whether only counts have changed, and they were written a moment ago.
    fn may_wait(&self, key: &Key, status: &CanaryStatus, next: &CanaryStatus) -> bool {
        let but_counts = CanaryStatus {
            evidence: next.evidence.clone(),
            evidence_summary: next.evidence_summary.clone(),
            ..status.clone()
        };
        let recently = |at: &Instant| at.elapsed() < WRITE_EVIDENCE_EVERY;
        but_counts == *next && lock(&self.written).get(key).is_some_and(recently)
    }

    fn see(&self, key: &Key, canary: &Canary, baselines: &Baselines) -> (Seen, Vec<Total>) {
        let model = self.hub.model();
        let status = canary.status.clone().unwrap_or_default();
        let workload = WorkloadKey {
            kind: canary.spec.target.kind,
            namespace: Arc::clone(&key.0),
            name: canary.spec.target.name.as_str().into(),
        };
        let mut totals = Vec::new();
        let mut since = |revision: &str| {
            let total = self.aggregates.revision(&key.0, revision);
            let id = (key.clone(), revision.to_owned());
            let before = baselines.get(&id).copied().unwrap_or(total);
            totals.push((id, total));
            Counts {
                requests: total.requests.saturating_sub(before.requests),
                failures: total.failures.saturating_sub(before.failures),
            }
        };
        let mut counted = (since(&status.canary_revision), since(&status.approved_revision));
        // While its successor takes over, what was stable before is stable too.
        if !status.former_revision.is_empty() && status.former_revision != status.canary_revision {
            let former = since(&status.former_revision);
            counted.1.requests += former.requests;
            counted.1.failures += former.failures;
        }
        // Who has acknowledged is asked only where it decides something: the answer costs a view each.
        let matters = match status.phase {
            Phase::Progressing | Phase::Paused => true,
            Phase::Failed => status.acknowledged_weight > 0,
            Phase::Waiting | Phase::Stable | Phase::Promoting => false,
        };
        let annotation = canary.metadata.annotations.as_ref().and_then(|all| all.get(keys::ACTION));
        let seen = Seen {
            now: Timestamp::now(),
            generation: canary.metadata.generation.unwrap_or_default(),
            target: model.workload(&workload),
            conflict: model
                .canary_of(&workload)
                .filter(|(holds, _)| *holds != key)
                .map(|(holds, _)| holds.1.to_string()),
            acknowledged: match (matters, status.phase) {
                (true, _) => self.registry.acknowledged_canary(&model, key, status.epoch),
                // That nothing is sent any more has been acknowledged, and stays so.
                (false, Phase::Failed) => Acknowledgement::Complete,
                (false, _) => Acknowledgement::Awaited(String::new()),
            },
            counted,
            action: annotation.and_then(|text| CanaryAction::parse(text.as_str())),
        };
        (seen, totals)
    }

    async fn carry_out(&self, key: &Key, canary: &Canary, action: &Action) -> anyhow::Result<()> {
        match action {
            Action::OpenGate(pod) => self.set_gate(&key.0, pod, true).await,
            Action::ShutGate(pod) => self.set_gate(&key.0, pod, false).await,
            Action::Undo { revision } => {
                self.try_undo(key, canary, revision).await;
                Ok(())
            }
            Action::Event { warning, reason, message } => {
                tracing::info!(namespace = %key.0, canary = %key.1, reason, message);
                self.tell(canary, *warning, reason, message).await
            }
        }
    }

    async fn tell(&self, canary: &Canary, warning: bool, reason: &str, message: &str) -> anyhow::Result<()> {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.to_owned(),
            note: Some(message.chars().take(1000).collect()),
            action: "Rollout".to_owned(),
            secondary: None,
        };
        self.recorder.publish(&event, &canary.object_ref(&())).await?;
        Ok(())
    }

    async fn set_gate(&self, namespace: &str, pod: &str, open: bool) -> anyhow::Result<()> {
        let status = if open { "True" } else { "False" };
        let condition =
            json!({"type": keys::GATE, "status": status, "lastTransitionTime": Timestamp::now().to_string()});
        let patch = json!({"status": {"conditions": [condition]}});
        let api = Api::<Pod>::namespaced(self.client.clone(), namespace);
        // Strategic: conditions are merged by type, those of kubelet stay.
        api.patch_status(pod, &PatchParams::default(), &Patch::Strategic(&patch)).await?;
        Ok(())
    }

    /// Pods that wait for a Canary that is gone would wait for ever.
    async fn open_orphaned_gates(&self) {
        let orphaned = self.hub.model().orphaned_gates();
        for (namespace, pod) in orphaned {
            if let Err(error) = self.set_gate(&namespace, &pod, true).await {
                tracing::warn!(namespace, pod, %error, "cannot open a gate that no Canary holds");
            }
        }
    }

    /// Restores the template of the approved revision, as `kubectl rollout undo` does, unless the target has
    /// a third one by now.
    async fn undo(&self, key: &Key, canary: &Canary, revision: &str) -> anyhow::Result<()> {
        let target = &canary.spec.target;
        if target.kind != WorkloadKind::Deployment {
            anyhow::bail!(
                "onFailure: Undo is offered for Deployments only; undo by hand: kubectl rollout undo"
            );
        }
        let failed = canary.status.as_ref().map_or("", |status| status.canary_revision.as_str());
        let workloads = self.objects("Deployment", "deployments", &key.0);
        let workload = workloads.get(&target.name).await?;
        let (stable, failed) = (self.template(key, revision).await?, self.template(key, failed).await?);
        let Some(now) = workload.data.pointer("/spec/template") else { anyhow::bail!("no template") };
        if *now == stable {
            return Ok(());
        }
        if *now != failed {
            anyhow::bail!(
                "the template of {} is no longer the one that failed: it is left alone",
                target.name
            );
        }
        let patch = json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": workload.metadata.resource_version},
            {"op": "replace", "path": "/spec/template", "value": stable},
        ]);
        let patch: json_patch::Patch = serde_json::from_value(patch)?;
        workloads.patch(&target.name, &PatchParams::default(), &Patch::Json::<()>(patch)).await?;
        Ok(())
    }

    /// The template of a revision, whole: fields that this build does not know are kept.
    async fn template(&self, key: &Key, revision: &str) -> anyhow::Result<Value> {
        let of_revision = ListParams::default().labels(&format!("pod-template-hash={revision}"));
        let sets = self.objects("ReplicaSet", "replicasets", &key.0).list(&of_revision).await?;
        let found = sets.items.into_iter().find_map(|set| set.data.pointer("/spec/template").cloned());
        let mut template = found.ok_or_else(|| {
            anyhow::anyhow!(
                "there is no ReplicaSet of revision {revision}: is revisionHistoryLimit too small?"
            )
        })?;
        if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
            labels.remove("pod-template-hash");
        }
        Ok(template)
    }

    fn objects(&self, kind: &str, plural: &str, namespace: &str) -> Api<DynamicObject> {
        let resource = ApiResource {
            group: "apps".into(),
            version: "v1".into(),
            api_version: "apps/v1".into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        Api::namespaced_with(self.client.clone(), namespace, &resource)
    }

    /// Tries to undo, and not again at once when it could not: whoever reads events is told why.
    async fn try_undo(&self, key: &Key, canary: &Canary, revision: &str) {
        let recently = |at: &Instant| at.elapsed() < RETRY_UNDO;
        let epoch = canary.status.as_ref().map_or(0, |status| status.epoch);
        let id = (key.clone(), epoch);
        if lock(&self.undo_failed).get(&id).is_some_and(recently) {
            return;
        }
        let Err(error) = self.undo(key, canary, revision).await else { return };
        {
            let mut failed = lock(&self.undo_failed);
            failed.retain(|_, at| recently(at));
            failed.insert(id, Instant::now());
        }
        tracing::warn!(namespace = %key.0, canary = %key.1, error = format!("{error:#}"), "cannot undo");
        let message = format!("cannot restore revision {revision}: {error:#}");
        self.tell(canary, true, "UndoFailed", &message).await.ok();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
