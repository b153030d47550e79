//! The MeshConfig `mesh` with the defaults, where nobody has written one. The API server's own policies
//! refer to it, and `kubectl get meshconfig` shows what holds.

use std::time::Duration;

use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tulle_crds::{MeshConfig, MeshConfigSpec};

use crate::lease::Leadership;

/// How often it is looked for.
const LOOK_EVERY: Duration = Duration::from_secs(15);

/// Makes it for ever, while this replica leads.
pub async fn run(client: Client, mut leadership: watch::Receiver<Leadership>) {
    let api = Api::<MeshConfig>::all(client);
    let manager = PostParams { field_manager: Some("tulle-operator".to_owned()), ..PostParams::default() };
    loop {
        if leadership.borrow_and_update().mine
            && let Ok(None) = api.get_opt("mesh").await
        {
            match api.create(&manager, &MeshConfig::new("mesh", MeshConfigSpec::default())).await {
                Ok(_) => tracing::info!("made MeshConfig mesh with the defaults"),
                Err(error) => tracing::warn!(%error, "cannot make MeshConfig mesh"),
            }
        }
        tokio::select! {
            _ = leadership.changed() => {}
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
}
