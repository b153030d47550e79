//! Carries out what the machine decides, for every Canary, on the replica that leads.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::core::ApiResource;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource as _};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tulle_crds::{Canary, WorkloadKind, keys};

use super::machine::{self, Action, Seen, Verb};
use crate::discovery::Registry;
use crate::lease::Leadership;
use crate::model::{Key, WorkloadKey};
use crate::telemetry::{Aggregates, Counts};
use crate::watch::Hub;

/// How often each Canary is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Canaries that are looked at at the same time.
const AT_ONCE: usize = 8;

/// Drives every Canary.
pub struct Driver {
    client: Client,
    hub: Arc<Hub>,
    registry: Arc<Registry>,
    aggregates: Arc<Aggregates>,
    recorder: Recorder,
}

/// What had been counted at the last look: for a Canary, of its two revisions.
type Baselines = HashMap<(Key, String), Counts>;
/// One of them.
type Total = ((Key, String), Counts);

impl Driver {
    /// A driver.
    pub fn new(client: Client, hub: Arc<Hub>, registry: Arc<Registry>, aggregates: Arc<Aggregates>) -> Self {
        let reporter = Reporter { controller: "tulle-operator".to_owned(), instance: None };
        Self { recorder: Recorder::new(client.clone(), reporter), client, hub, registry, aggregates }
    }

    /// Looks at every Canary for ever, while this replica leads.
    pub async fn run(self, leadership: watch::Receiver<Leadership>) {
        let mut baselines = Baselines::new();
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            if !leadership.borrow().mine || !self.hub.is_synced() {
                baselines.clear();
                continue;
            }
            self.open_orphaned_gates().await;
            let canaries: Vec<(Key, Canary)> =
                self.hub.model().canaries().map(|(key, canary)| (key.clone(), canary.clone())).collect();
            for some in canaries.chunks(AT_ONCE) {
                let mut looks = Vec::with_capacity(some.len());
                for (key, canary) in some {
                    looks.push(self.look(key, canary, &baselines));
                }
                let looked = futures::future::join_all(looks).await;
                for counted in looked.into_iter().flatten() {
                    baselines.extend(counted);
                }
            }
        }
    }

    /// One look at one Canary. Returns what had been counted, once the status that holds it is written:
    /// counts that were not written are counted again.
    async fn look(&self, key: &Key, canary: &Canary, baselines: &Baselines) -> Option<Vec<Total>> {
        let status = canary.status.clone().unwrap_or_default();
        let (seen, totals) = self.see(key, canary, baselines);
        let (next, actions) = machine::next(&canary.spec, &status, &seen);
        if next != status {
            let api = Api::<Canary>::namespaced(self.client.clone(), &key.0);
            let version = canary.metadata.resource_version.as_deref();
            if let Err(error) = crate::status::write(&api, &key.1, version, &next).await {
                // Somebody else has written, or the API server is away: the next look begins anew.
                tracing::debug!(namespace = %key.0, name = %key.1, %error, "a canary's status was not written");
                return None;
            }
        }
        for action in &actions {
            if let Err(error) = self.carry_out(key, canary, action).await {
                tracing::warn!(namespace = %key.0, name = %key.1, ?action, %error, "an action failed; it is tried again");
            }
        }
        Some(totals)
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
        let counted = (since(&status.canary_revision), since(&status.approved_revision));
        let annotation = canary.metadata.annotations.as_ref().and_then(|all| all.get(keys::ACTION));
        let seen = Seen {
            now: Timestamp::now(),
            generation: canary.metadata.generation.unwrap_or_default(),
            target: model.workload(&workload),
            acknowledged: self.registry.acknowledged_canary(&model, key, status.epoch),
            counted,
            action: annotation.and_then(|text| Verb::parse(text.as_str())),
        };
        (seen, totals)
    }

    async fn carry_out(&self, key: &Key, canary: &Canary, action: &Action) -> anyhow::Result<()> {
        match action {
            Action::OpenGate(pod) => self.open_gate(&key.0, pod).await,
            Action::Undo { revision } => self.undo(key, canary, revision).await,
            Action::Event { warning, reason, message } => {
                let event = Event {
                    type_: if *warning { EventType::Warning } else { EventType::Normal },
                    reason: (*reason).to_owned(),
                    note: Some(message.chars().take(1000).collect()),
                    action: "Rollout".to_owned(),
                    secondary: None,
                };
                tracing::info!(namespace = %key.0, canary = %key.1, reason, message);
                self.recorder.publish(&event, &canary.object_ref(&())).await?;
                Ok(())
            }
        }
    }

    async fn open_gate(&self, namespace: &str, pod: &str) -> anyhow::Result<()> {
        let condition =
            json!({"type": keys::GATE, "status": "True", "lastTransitionTime": Timestamp::now().to_string()});
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
            if let Err(error) = self.open_gate(&namespace, &pod).await {
                tracing::warn!(namespace, pod, %error, "cannot open a gate that no Canary holds");
            }
        }
    }

    /// Restores the template of the approved revision, as `kubectl rollout undo` does.
    async fn undo(&self, key: &Key, canary: &Canary, revision: &str) -> anyhow::Result<()> {
        if canary.spec.target.kind != WorkloadKind::Deployment {
            anyhow::bail!(
                "onFailure: Undo is offered for Deployments only; undo by hand: kubectl rollout undo"
            );
        }
        let sets = Api::<ReplicaSet>::namespaced(self.client.clone(), &key.0);
        let of_revision = ListParams::default().labels(&format!("pod-template-hash={revision}"));
        let sets = sets.list(&of_revision).await?;
        let template = sets.items.into_iter().find_map(|set| set.spec?.template);
        let mut template =
            template.ok_or_else(|| anyhow::anyhow!("there is no ReplicaSet of revision {revision}"))?;
        if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
            labels.remove("pod-template-hash");
        }
        let resource = ApiResource {
            group: "apps".into(),
            version: "v1".into(),
            api_version: "apps/v1".into(),
            kind: "Deployment".into(),
            plural: "deployments".into(),
        };
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &key.0, &resource);
        let patch = json!([{"op": "replace", "path": "/spec/template", "value": template}]);
        let patch: json_patch::Patch = serde_json::from_value(patch)?;
        api.patch(&canary.spec.target.name, &PatchParams::default(), &Patch::Json::<()>(patch)).await?;
        Ok(())
    }
}
