//! Creates MeshConfig `mesh` with the defaults if nobody else does.
//!
//! In: whether the model contains one. Out: one that is created after [`GRACE`], because ValidatingAdmissionPolicies
//! refer to it and `kubectl get meshconfig` shows the settings in force. It belongs to whoever creates it: the operator
//! never changes an existing one, except for its status.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tulle_crds::MeshConfig;

use crate::lease::Leadership;
use crate::watch::Hub;

/// How long it must be missing under one leader before it is created. `kubectl apply` and `helm install` create the
/// user's own MeshConfig last, some seconds after CRDs and operator. `helm install` fails if another owner has created
/// it.
const GRACE: Duration = Duration::from_secs(15);
/// Time between two looks at the model.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Since when MeshConfig mesh has been missing under this leader.
#[derive(Debug, Default)]
struct Absence(Option<Instant>);

impl Absence {
    /// Records whether it is missing now. Returns whether to create it. The grace period then begins again, so that a
    /// failed creation is repeated after it.
    fn note(&mut self, missing: bool, now: Instant) -> bool {
        let since = *self.0.get_or_insert(now);
        let over = missing && now.saturating_duration_since(since) >= GRACE;
        if !missing || over {
            self.0 = None;
        }
        over
    }
}

/// Creates it when it is missing, while this replica leads. Never returns.
pub async fn run(client: Client, hub: Arc<Hub>, leadership: watch::Receiver<Leadership>) {
    let api = Api::<MeshConfig>::all(client);
    let mut absence = Absence::default();
    loop {
        sleep(LOOK_EVERY).await;
        let leads = leadership.borrow().mine && hub.is_synced();
        let missing = leads && hub.model().config().is_none();
        if !absence.note(missing, Instant::now()) {
            continue;
        }
        let trust_domain = hub.model().settings().trust_domain.clone();
        match timeout(WRITE_TIMEOUT, create(&api, &trust_domain)).await {
            Ok(Ok(())) => {}
            failed => tracing::warn!(?failed, "cannot create MeshConfig mesh"),
        }
    }
}

/// Creates it, unless the API server has one that the watch has not returned yet.
///
/// By server-side apply of an empty `spec`, so that the operator owns no field that a user writes later. A
/// plain create would own every default that the schema fills in, and `kubectl apply --server-side` and
/// Helm 4 would report conflicts with it.
async fn create(api: &Api<MeshConfig>, trust_domain: &str) -> Result<(), kube::Error> {
    if api.get_opt("mesh").await?.is_some() {
        return Ok(());
    }
    let object = json!({
        "apiVersion": "tulle.dev/v1alpha1",
        "kind": "MeshConfig",
        "metadata": {"name": "mesh"},
        "spec": spec(trust_domain),
    });
    // Not forced, so that it conflicts with an object that somebody has created meanwhile with another trust domain.
    match api.patch("mesh", &PatchParams::apply("tulle-operator"), &Patch::Apply(&object)).await {
        Ok(_) => tracing::info!(trust_domain, "created MeshConfig mesh with the defaults"),
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(error),
    }
    Ok(())
}

/// The `spec` that the operator writes. It contains no value that is a default of the schema. The trust domain is
/// immutable, so no user needs to own that field.
fn spec(trust_domain: &str) -> Value {
    if trust_domain == tulle_crds::trust_domain() { json!({}) } else { json!({"trustDomain": trust_domain}) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_meshconfig_that_comes_within_the_grace_wins() {
        let (mut absence, start) = (Absence::default(), Instant::now());
        assert!(!absence.note(true, start));
        assert!(!absence.note(true, start + GRACE - Duration::from_millis(1)));
        assert!(!absence.note(false, start + GRACE), "it is there");
        assert!(!absence.note(true, start + GRACE * 2), "deleted: the grace begins anew");
        assert!(absence.note(true, start + GRACE * 3));
    }

    #[test]
    fn a_creation_that_failed_is_repeated_after_another_grace() {
        let (mut absence, start) = (Absence::default(), Instant::now());
        absence.note(true, start);
        assert!(absence.note(true, start + GRACE));
        assert!(!absence.note(true, start + GRACE + LOOK_EVERY));
        assert!(absence.note(true, start + GRACE * 2 + LOOK_EVERY));
    }

    #[test]
    fn the_operator_owns_no_field_that_a_user_writes() {
        assert_eq!(spec("cluster.local"), json!({}));
        assert_eq!(spec("corp.example"), json!({"trustDomain": "corp.example"}));
    }
}
