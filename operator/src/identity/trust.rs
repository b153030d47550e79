//! Trust for namespaces: the roots in a ConfigMap in each one whose pods are injected.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tulle_crds::keys;

use super::authority::Authority;
use crate::lease::Leadership;
use crate::watch::Hub;

/// The ConfigMap's name; the webhook mounts it.
pub const CONFIG_MAP: &str = "tulle-trust";
/// The file in it.
pub const FILE: &str = "roots.pem";
/// Every bundle is written again this often, in case somebody has changed it.
const REFRESH: Duration = Duration::from_secs(30);

/// How long one write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the bundles for ever, while this replica leads.
pub async fn run(
    client: Client,
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    mut leadership: watch::Receiver<Leadership>,
) {
    let mut changes = hub.changes();
    let mut written: BTreeMap<Arc<str>, tokio::time::Instant> = BTreeMap::new();
    loop {
        if leadership.borrow_and_update().mine && hub.is_synced() {
            let namespaces = hub.model().meshed_namespaces();
            for namespace in namespaces {
                if written.get(&namespace).is_some_and(|at| at.elapsed() < REFRESH) {
                    continue;
                }
                match timeout(WRITE_TIMEOUT, write(&client, &namespace, authority.root_pem())).await {
                    Ok(Ok(())) => drop(written.insert(namespace, tokio::time::Instant::now())),
                    failed => tracing::warn!(%namespace, ?failed, "cannot write the trust bundle"),
                }
            }
        }
        tokio::select! {
            _ = changes.changed() => sleep(Duration::from_millis(50)).await,
            _ = leadership.changed() => {}
            () = sleep(REFRESH) => {}
        }
    }
}

async fn write(client: &Client, namespace: &str, roots: &str) -> Result<(), kube::Error> {
    let config_map = ConfigMap {
        metadata: ObjectMeta {
            name: Some(CONFIG_MAP.to_owned()),
            labels: Some([(keys::TRUST.to_owned(), "bundle".to_owned())].into()),
            ..ObjectMeta::default()
        },
        data: Some([(FILE.to_owned(), roots.to_owned())].into()),
        ..ConfigMap::default()
    };
    let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    api.patch(CONFIG_MAP, &PatchParams::apply("tulle-operator").force(), &Patch::Apply(&config_map)).await?;
    Ok(())
}
