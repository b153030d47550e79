//! Restores the template of the approved revision, where the operator may.

use std::time::Duration;

use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::Api;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use serde_json::{Value, json};
use tokio::time::Instant;
use tulle_crds::{Canary, CanaryStatus, OnFailure, WorkloadKind};
use tulle_mesh::event_reason::EventReason;

use super::{Driver, lock};
use crate::model::Key;

/// A template that could not be restored is not tried again before.
const RETRY_UNDO: Duration = Duration::from_secs(30);
/// How often the API server is asked whether the operator may change Deployments.
const ASK_EVERY: Duration = Duration::from_secs(60);

impl Driver {
    /// Whether a Canary asks for Undo and the operator may not do it; asked once a minute for each namespace, so that
    /// it is known before anything fails.
    pub(super) async fn undo_forbidden(&self, key: &Key, canary: &Canary) -> bool {
        if canary.spec.on_failure != OnFailure::Undo {
            return false;
        }
        let known = lock(&self.may_undo).get(&key.0).copied();
        if let Some((at, allowed)) = known
            && at.elapsed() < ASK_EVERY
        {
            return !allowed;
        }
        let attributes = ResourceAttributes {
            namespace: Some(key.0.to_string()),
            group: Some("apps".to_owned()),
            resource: Some("deployments".to_owned()),
            verb: Some("patch".to_owned()),
            ..ResourceAttributes::default()
        };
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(attributes),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let api = Api::<SelfSubjectAccessReview>::all(self.client.clone());
        // Without an answer nothing new is known.
        let answer = api.create(&PostParams::default(), &review).await.ok().and_then(|review| review.status);
        let allowed = answer.map_or_else(|| known.is_none_or(|known| known.1), |status| status.allowed);
        let mut all = lock(&self.may_undo);
        all.retain(|_, (at, _)| at.elapsed() < ASK_EVERY);
        all.insert(key.0.clone(), (Instant::now(), allowed));
        !allowed
    }

    /// Restores the template of the approved revision, as `kubectl rollout undo` does, unless the target has
    /// a third one by now.
    pub(super) async fn undo(&self, key: &Key, canary: &Canary, revision: &str) -> anyhow::Result<()> {
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

    /// Tries to undo, and not again at once when it could not: an event tells why.
    pub(super) async fn try_undo(&self, key: &Key, canary: &Canary, status: &CanaryStatus, revision: &str) {
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
        self.tell(canary, status, EventReason::UndoFailed, &message).await.ok();
    }
}
