//! What became of a MeshPolicy: who is selected, who has acknowledged it, what is wrong with it. And of the
//! MeshConfig.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tulle_crds::{MeshConfig, MeshConfigStatus, MeshPolicy, MeshPolicyStatus, reason, set_condition};

use crate::discovery::Registry;
use crate::lease::Leadership;
use crate::model::{Key, Model, PolicyReport, Verdict, access_summary, target_name};
use crate::watch::Hub;

/// How often statuses are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long one write may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps the statuses for ever, while this replica leads.
pub async fn run(
    client: Client,
    hub: Arc<Hub>,
    registry: Arc<Registry>,
    leadership: watch::Receiver<Leadership>,
) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if !leadership.borrow().mine || !hub.is_synced() {
            continue;
        }
        let config = changed_config(&hub.model());
        if let Some((config, next)) = config {
            let api = Api::<MeshConfig>::all(client.clone());
            let version = config.metadata.resource_version.as_deref();
            let written = timeout(WRITE_TIMEOUT, write(&api, "mesh", version, &next)).await;
            tracing::debug!(?written, "the status of MeshConfig mesh");
        }
        let changed = changed(&hub.model(), &registry);
        for (key, policy, next) in changed {
            let api = Api::<MeshPolicy>::namespaced(client.clone(), &key.0);
            let version = policy.metadata.resource_version.as_deref();
            // An answer that never comes must not stop the others.
            match timeout(WRITE_TIMEOUT, write(&api, &key.1, version, &next)).await {
                Ok(Ok(())) => {}
                failed => {
                    tracing::debug!(namespace = %key.0, name = %key.1, ?failed, "a policy's status was not written");
                }
            }
        }
    }
}

/// Writes a whole status, provided that the object is still the one that was decided about. Whole: a
/// merge would keep fields that the new status no longer has.
///
/// # Errors
/// Somebody else has written, or the API server is away.
pub async fn write<K, S>(api: &Api<K>, name: &str, version: Option<&str>, status: &S) -> anyhow::Result<()>
where
    K: Clone + Debug + DeserializeOwned,
    S: Serialize,
{
    let operations = json!([
        {"op": "test", "path": "/metadata/resourceVersion", "value": version},
        {"op": "add", "path": "/status", "value": status},
    ]);
    let patch: json_patch::Patch = serde_json::from_value(operations)?;
    api.patch_status(name, &PatchParams::default(), &Patch::Json::<()>(patch)).await?;
    Ok(())
}

fn changed_config(model: &Model) -> Option<(MeshConfig, MeshConfigStatus)> {
    let config = model.config()?;
    let next = config_status(config, &model.settings().trust_domain, &Time(Timestamp::now()));
    (config.status.as_ref() != Some(&next)).then(|| (config.clone(), next))
}

/// The status of the MeshConfig of a mesh with this trust domain.
pub fn config_status(config: &MeshConfig, trust_domain: &str, now: &Time) -> MeshConfigStatus {
    let mut status = config.status.clone().unwrap_or_default();
    let generation = config.metadata.generation.unwrap_or_default();
    status.observed_generation = Some(generation);
    status.trust_domain = Some(trust_domain.to_owned());
    let asked = &config.spec.trust_domain;
    let (ready, reason, message) = match asked == trust_domain {
        true => (true, reason::ACCEPTED, format!("identities are spiffe://{trust_domain}/ns/…/sa/…")),
        false => (
            false,
            reason::TRUST_DOMAIN_FIXED,
            format!(
                "the root names {trust_domain}, which stays in force: {asked} needs Tulle removed, with Secret tulle-root, and installed anew; or delete this object and apply it with trustDomain: {trust_domain}"
            ),
        ),
    };
    set_condition(&mut status.conditions, ("Ready", ready, reason, &message), generation, now);
    status
}

fn changed(model: &Model, registry: &Registry) -> Vec<(Key, MeshPolicy, MeshPolicyStatus)> {
    let mut all = Vec::new();
    for (key, policy) in model.policies() {
        let report = model.report(key, policy);
        let awaited: Vec<_> = report.pods.iter().filter(|uid| !registry.enforces(model, uid)).collect();
        let awaited = Awaited {
            pods: awaited.len(),
            first: awaited.first().and_then(|uid| Some(model.pod(uid)?.name.to_string())).unwrap_or_default(),
        };
        let refusal = report.pods.iter().find_map(|uid| {
            let pod = model.pod(uid)?;
            Some(format!("pod {}: {}", pod.name, registry.refusal(uid)?))
        });
        let next = status(key, policy, &report, &awaited, refusal, &Time(Timestamp::now()));
        if policy.status.as_ref() != Some(&next) {
            all.push((key.clone(), policy.clone(), next));
        }
    }
    all
}

/// Pods whose sidecars have not acknowledged a policy.
#[derive(Clone, Debug, Default)]
pub struct Awaited {
    /// How many.
    pub pods: usize,
    /// The name of one of them.
    pub first: String,
}

/// The status of a policy.
pub fn status(
    key: &Key,
    policy: &MeshPolicy,
    report: &PolicyReport,
    awaited: &Awaited,
    refusal: Option<String>,
    now: &Time,
) -> MeshPolicyStatus {
    let mut status = policy.status.clone().unwrap_or_default();
    let generation = policy.metadata.generation.unwrap_or_default();
    let pods = report.pods.len();
    let enforced = pods.saturating_sub(awaited.pods);
    status.observed_generation = Some(generation);
    status.target = Some(target_name(&policy.spec, &key.0));
    status.access = Some(access_summary(&policy.spec));
    status.workloads = i32::try_from(pods).ok();
    status.enforced = Some(format!("{enforced}/{pods}"));
    status.selected_sidecars = i32::try_from(pods).ok();
    status.enforcing_sidecars = i32::try_from(enforced).ok();
    let (ready, reason, message) = match (&report.verdict, refusal) {
        (Verdict::Invalid(why), _) => (false, reason::INVALID, why.clone()),
        (Verdict::TargetNotFound(why), _) => (false, reason::TARGET_NOT_FOUND, why.clone()),
        (Verdict::Conflicted { with, section }, _) => {
            let message = format!(
                "MeshPolicy {with} is older and has {section} for the same pods: merge them, or narrow a target"
            );
            (false, reason::CONFLICTED, message)
        }
        (Verdict::Accepted, Some(refusal)) => (false, reason::REFUSED, refusal),
        (Verdict::Accepted, None) if pods == 0 => {
            (true, reason::NO_WORKLOADS, "the target selects no pod with a sidecar".to_owned())
        }
        (Verdict::Accepted, None) if enforced < pods => {
            let first = &awaited.first;
            (
                false,
                reason::PROPAGATING,
                format!("{enforced} of {pods} sidecars have acknowledged it, not that of pod {first}"),
            )
        }
        (Verdict::Accepted, None) => {
            (true, reason::ENFORCED, format!("all {pods} sidecars have acknowledged it"))
        }
    };
    set_condition(&mut status.conditions, ("Ready", ready, reason, &message), generation, now);
    status
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_integers_beside_enforced_say_the_same_as_the_string() {
        let policy: MeshPolicy = serde_json::from_value(json!({
            "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy", "metadata": {"name": "strict"},
            "spec": {"target": {"kind": "Namespace"}, "mtls": "Strict"},
        }))
        .unwrap();
        let key: Key = ("shop".into(), "strict".into());
        let pods = vec!["uid-a".to_owned(), "uid-b".to_owned(), "uid-c".to_owned()];
        let report = PolicyReport { pods, verdict: Verdict::Accepted };
        for (awaited, enforced, enforcing) in [(1, "2/3", 2), (0, "3/3", 3)] {
            let awaited = Awaited { pods: awaited, first: "web-a".to_owned() };
            let status = status(&key, &policy, &report, &awaited, None, &Time(Timestamp::UNIX_EPOCH));
            assert_eq!(status.enforced.as_deref(), Some(enforced));
            assert_eq!((status.selected_sidecars, status.enforcing_sidecars), (Some(3), Some(enforcing)));
        }
    }
}
