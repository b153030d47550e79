//! The trust bundle: the root certificate in a ConfigMap of each namespace that is meshed or has pods with a sidecar.
//!
//! In: these namespaces of the model. Out: one write per namespace when it becomes one of them, then one per
//! [`REFRESH`]. A failed write is repeated with a growing delay, so that a change of the model never repeats it, and is
//! reported by an event in the namespace, whose pods wait for the ConfigMap.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Patch, PatchParams};
use kube::runtime::events::Recorder;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tulle_crds::keys;
use tulle_mesh::event_reason::EventReason;

use super::authority::Authority;
use crate::lease::Leadership;
use crate::status::{event, recorder};
use crate::watch::Hub;

/// Name of the ConfigMap, which the webhook mounts.
pub const CONFIG_MAP: &str = "tulle-trust";
/// The key in it, and the name of the file in the pod.
pub const FILE: &str = "roots.pem";
/// Time between two writes of a bundle, in case somebody has changed it.
const REFRESH: Duration = Duration::from_secs(30);
/// Delay after the first failed write; it doubles with each further failure, up to [`REFRESH`].
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// Failed writes between two events: with the longest delay, five minutes.
const EVENT_EVERY: u32 = 10;
/// Timeout of one write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Changes of the model within this time cause one look.
const GATHER: Duration = Duration::from_millis(50);

/// The last write to one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    at: Instant,
    /// Failed writes since the last one that succeeded.
    failures: u32,
}

impl Record {
    /// When the bundle is written next.
    fn due(&self) -> Instant {
        self.at + if self.failures == 0 { REFRESH } else { retry_delay(self.failures) }
    }
}

/// Delay after this many failures in a row.
fn retry_delay(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(8);
    (FIRST_RETRY * 2_u32.pow(doublings)).min(REFRESH)
}

/// Whether a namespace is due for a write.
fn due(record: Option<&Record>, now: Instant) -> bool {
    record.is_none_or(|record| record.due() <= now)
}

/// Whether an event reports a failed write: the first one at once.
fn is_reported(failures: u32) -> bool {
    failures.saturating_sub(1).is_multiple_of(EVENT_EVERY)
}

/// Keeps the bundles current while this replica leads. Never returns.
pub async fn run(
    client: Client,
    hub: Arc<Hub>,
    authority: Arc<Authority>,
    mut leadership: watch::Receiver<Leadership>,
) {
    let recorder = recorder(client.clone());
    let mut changes = hub.changes();
    let mut records: BTreeMap<Arc<str>, Record> = BTreeMap::new();
    loop {
        if leadership.borrow_and_update().mine && hub.is_synced() {
            let namespaces: BTreeSet<_> = hub.model().trusting_namespaces().into_iter().collect();
            // A namespace that is deleted and created again under the same name has no bundle.
            records.retain(|known, _| namespaces.contains(known));
            for namespace in namespaces {
                let record = records.get(&namespace).copied();
                if due(record.as_ref(), Instant::now()) && leadership.borrow().mine {
                    let failures = record.map_or(0, |record| record.failures);
                    let written = keep(&client, &namespace, authority.root_pem()).await;
                    let failures = match written {
                        Ok(()) => 0,
                        Err(why) => {
                            let failures = failures.saturating_add(1);
                            warn(&recorder, &namespace, &why, failures).await;
                            failures
                        }
                    };
                    records.insert(namespace, Record { at: Instant::now(), failures });
                }
            }
        } else {
            // The next leader begins with a write to every namespace.
            records.clear();
        }
        let next = records.values().map(Record::due).min();
        let pause = next.map_or(REFRESH, |next| next.saturating_duration_since(Instant::now()));
        tokio::select! {
            _ = changes.changed() => sleep(GATHER).await,
            _ = leadership.changed() => {}
            () = sleep(pause.max(GATHER)) => {}
        }
    }
}

/// Writes one bundle. The error is the answer of the API server, which names an exhausted quota.
async fn keep(client: &Client, namespace: &str, roots: &str) -> Result<(), String> {
    match timeout(WRITE_TIMEOUT, write(client, namespace, roots)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(kube::Error::Api(status))) if !status.message.is_empty() => Err(status.message.clone()),
        Ok(Err(error)) => Err(format!("{:#}", anyhow::Error::from(error))),
        Err(_) => Err(format!("the API server did not answer within {} s", WRITE_TIMEOUT.as_secs())),
    }
}

async fn warn(recorder: &Recorder, namespace: &str, why: &str, failures: u32) {
    tracing::warn!(
        namespace,
        failures,
        retry_in_seconds = retry_delay(failures).as_secs(),
        error = why,
        reason = EventReason::TrustNotWritten.name(),
        "cannot write ConfigMap tulle-trust; new pods in this namespace do not start without it"
    );
    if !is_reported(failures) {
        return;
    }
    let event = event(EventReason::TrustNotWritten, "Write", message(why));
    match timeout(WRITE_TIMEOUT, recorder.publish(&event, &reference(namespace))).await {
        Ok(Ok(())) => {}
        failed => tracing::debug!(namespace, ?failed, "cannot write the event"),
    }
}

/// At most as long as the API server accepts.
fn message(why: &str) -> String {
    let message = format!(
        "cannot write ConfigMap {CONFIG_MAP}, without which new pods of this namespace stay in Init: {why}"
    );
    message.chars().take(1000).collect()
}

/// The namespace, with its own name as the namespace of the event: its users look there, and may see no other.
fn reference(namespace: &str) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Namespace".to_owned()),
        namespace: Some(namespace.to_owned()),
        name: Some(namespace.to_owned()),
        ..ObjectReference::default()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn after(failures: u32, elapsed: Duration) -> bool {
        let at = Instant::now();
        due(Some(&Record { at, failures }), at + elapsed)
    }

    #[test]
    fn a_namespace_without_a_bundle_is_written_at_once() {
        assert!(due(None, Instant::now()));
    }

    #[test]
    fn a_written_bundle_is_left_alone_until_its_refresh() {
        assert!(!after(0, Duration::ZERO));
        assert!(!after(0, REFRESH - Duration::from_millis(1)));
        assert!(after(0, REFRESH));
    }

    #[test]
    fn a_failed_write_is_not_repeated_at_the_next_change_but_with_a_doubling_delay() {
        assert!(!after(1, Duration::from_millis(999)));
        assert!(after(1, Duration::from_secs(1)));
        assert!(!after(2, Duration::from_millis(1999)));
        assert!(after(2, Duration::from_secs(2)));
        let delays = [1, 2, 3, 4, 5, 6, 7, u32::MAX].map(|failures| retry_delay(failures).as_secs());
        assert_eq!(delays, [1, 2, 4, 8, 16, 30, 30, 30]);
    }

    #[test]
    fn the_first_failure_is_reported_at_once_and_then_every_tenth() {
        let reported: Vec<u32> = (1..=21).filter(|failures| is_reported(*failures)).collect();
        assert_eq!(reported, [1, 11, 21]);
    }

    #[test]
    fn the_event_is_in_the_namespace_and_has_the_answer_of_the_api_server() {
        let about = reference("shop");
        assert_eq!((about.kind.as_deref(), about.name.as_deref()), (Some("Namespace"), Some("shop")));
        assert_eq!(about.namespace.as_deref(), Some("shop"));
        let quota =
            "configmaps \"tulle-trust\" is forbidden: exceeded quota: few, requested: count/configmaps=1";
        assert!(
            message(quota).contains("stay in Init: configmaps \"tulle-trust\" is forbidden: exceeded quota")
        );
        assert_eq!(message(&"x".repeat(2000)).len(), 1000);
    }
}
