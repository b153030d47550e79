//! Whether a rollout waits because its target is paused.

use std::time::Duration;

use k8s_openapi::api::apps::v1::Deployment;
use kube::Api;
use tokio::time::{Instant, timeout};
use tulle_crds::{Canary, WorkloadKind};

use super::{Driver, lock};
use crate::model::Key;
use crate::rollout::machine::waits_for_pods;

/// It is asked this often, and only while pods are waited for: no watch of the operator has the field.
const ASK_EVERY: Duration = Duration::from_secs(10);
/// An answer that takes longer is not waited for: the rest of the look matters more.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

impl Driver {
    /// Whether a Deployment whose pods are waited for has `spec.paused`. Of one that cannot be read that is unknown: what was
    /// read last holds.
    pub(super) async fn is_paused(&self, key: &Key, canary: &Canary) -> bool {
        let waits = canary.status.as_ref().is_some_and(waits_for_pods);
        if !waits || canary.spec.target.kind != WorkloadKind::Deployment {
            return false;
        }
        let known = lock(&self.known).get(key).and_then(|known| known.paused);
        if let Some((_, paused)) = known.filter(|(asked, _)| asked.elapsed() < ASK_EVERY) {
            return paused;
        }
        // The operator may read a Deployment's status, and its answer has the whole object.
        let api = Api::<Deployment>::namespaced(self.client.clone(), &key.0);
        let read = timeout(ASK_TIMEOUT, api.get_status(&canary.spec.target.name)).await;
        let paused = match read {
            Ok(Ok(deployment)) => deployment.spec.and_then(|spec| spec.paused).unwrap_or(false),
            Ok(Err(_)) | Err(_) => known.is_some_and(|(_, paused)| paused),
        };
        if let Some(known) = lock(&self.known).get_mut(key) {
            known.paused = Some((Instant::now(), paused));
        }
        paused
    }
}
