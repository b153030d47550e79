//! The MeshConfig `mesh` with the defaults, where nobody has written one. The API server's own policies
//! refer to it, and `kubectl get meshconfig` shows what holds.

use std::sync::Arc;
use std::time::Duration;

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;
use tulle_crds::MeshConfig;

use crate::lease::Leadership;
use crate::watch::Hub;

/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Makes it for ever, while this replica leads.
pub async fn run(client: Client, hub: Arc<Hub>, mut leadership: watch::Receiver<Leadership>) {
    let api = Api::<MeshConfig>::all(client);
    loop {
        if leadership.borrow_and_update().mine && hub.is_synced() {
            let trust_domain = hub.model().settings().trust_domain.clone();
            match timeout(LOOK_EVERY, make(&api, &trust_domain)).await {
                Ok(Ok(())) => {}
                failed => tracing::warn!(?failed, "cannot make MeshConfig mesh"),
            }
        }
        tokio::select! {
            _ = leadership.changed() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}

/// The defaults are the schema's: applied empty, so that its author owns every field that he writes later. One
/// that was deleted comes back with the trust domain that the mesh has.
async fn make(api: &Api<MeshConfig>, trust_domain: &str) -> Result<(), kube::Error> {
    if api.get_opt("mesh").await?.is_some() {
        return Ok(());
    }
    let spec = match trust_domain == tulle_crds::trust_domain() {
        true => json!({}),
        false => json!({"trustDomain": trust_domain}),
    };
    let object = json!({"apiVersion": "tulle.dev/v1alpha1", "kind": "MeshConfig", "metadata": {"name": "mesh"}, "spec": spec});
    api.patch("mesh", &PatchParams::apply("tulle-operator"), &Patch::Apply(&object)).await?;
    tracing::info!("made MeshConfig mesh with the defaults");
    Ok(())
}
