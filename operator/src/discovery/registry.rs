//! Who is connected, and what each sidecar has acknowledged: of this replica's own sidecars, and, on
//! the leader, of those that other replicas serve.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tulle_mesh::proto::{ResourceName, ResourceType, destination, resource};

use crate::model::{Key, Model};

/// A resource by type and name.
type Name = (i32, String);

/// What a sidecar says about a resource, to be passed on to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// It came.
    Connected,
    /// It is gone.
    Gone,
    /// It enforces this version.
    Acked(Name, String),
    /// It refused this version.
    Refused(Name, String, String),
    /// It wants no more of this.
    Unsubscribed(Name),
}

/// All sidecars that are connected to any replica, as far as this one knows.
#[derive(Debug, Default)]
pub struct Registry {
    sidecars: Mutex<HashMap<String, Sidecar>>,
}

#[derive(Debug, Default)]
struct Sidecar {
    /// Streams that are up: a new one may begin before the old one is seen to end.
    streams: u32,
    acked: HashMap<Name, String>,
    refused: HashMap<Name, (String, String)>,
}

impl Registry {
    /// Takes a sidecar's report.
    pub fn report(&self, pod_uid: &str, report: Report) {
        let mut sidecars = self.lock();
        match report {
            Report::Connected => sidecars.entry(pod_uid.to_owned()).or_default().streams += 1,
            Report::Gone => {
                if let Some(sidecar) = sidecars.get_mut(pod_uid) {
                    sidecar.streams = sidecar.streams.saturating_sub(1);
                    if sidecar.streams == 0 {
                        sidecars.remove(pod_uid);
                    }
                }
            }
            Report::Acked(name, version) => {
                if let Some(sidecar) = sidecars.get_mut(pod_uid) {
                    sidecar.refused.remove(&name);
                    sidecar.acked.insert(name, version);
                }
            }
            Report::Refused(name, version, reason) => {
                if let Some(sidecar) = sidecars.get_mut(pod_uid) {
                    sidecar.refused.insert(name, (version, reason));
                }
            }
            Report::Unsubscribed(name) => {
                if let Some(sidecar) = sidecars.get_mut(pod_uid) {
                    sidecar.acked.remove(&name);
                    sidecar.refused.remove(&name);
                }
            }
        }
    }

    /// Everything that is known of this replica's sidecars, for a leader that has just begun.
    pub fn snapshot(&self) -> Vec<(String, Report)> {
        let sidecars = self.lock();
        let mut all = Vec::new();
        for (uid, sidecar) in sidecars.iter() {
            all.push((uid.clone(), Report::Connected));
            all.extend(sidecar.acked.iter().map(|(n, v)| (uid.clone(), Report::Acked(n.clone(), v.clone()))));
            let refused = sidecar.refused.iter();
            all.extend(
                refused.map(|(n, (v, r))| (uid.clone(), Report::Refused(n.clone(), v.clone(), r.clone()))),
            );
        }
        all
    }

    /// How many sidecars are connected.
    pub fn connected(&self) -> usize {
        self.lock().len()
    }

    /// Whether a pod's sidecar enforces the present version of its inbound resource.
    pub fn enforces(&self, model: &Model, pod_uid: &str) -> bool {
        let name = inbound(pod_uid);
        let Some(wanted) = model.resource(&name, pod_uid) else { return false };
        let sidecars = self.lock();
        let acked = sidecars.get(pod_uid).and_then(|sidecar| sidecar.acked.get(&(name.r#type, name.name)));
        acked == Some(&wanted.version)
    }

    /// Why a pod's sidecar has refused its inbound resource, if it has.
    pub fn refusal(&self, pod_uid: &str) -> Option<String> {
        let name = inbound(pod_uid);
        let sidecars = self.lock();
        let (_, reason) = sidecars.get(pod_uid)?.refused.get(&(name.r#type, name.name))?;
        Some(reason.clone())
    }

    /// Whether every sidecar that sends to the target of a Canary has acknowledged its present shares.
    pub fn acknowledged_canary(&self, model: &Model, canary: &Key, epoch: u64) -> bool {
        let sidecars = self.lock();
        let mut views: HashMap<(String, String), Option<String>> = HashMap::new();
        for (uid, sidecar) in sidecars.iter() {
            let node = model.pod(uid).map_or_else(String::new, |pod| pod.node.to_string());
            for ((kind, name), acked) in &sidecar.acked {
                if *kind != ResourceType::Destination as i32 {
                    continue;
                }
                let view = views.entry((name.clone(), node.clone()));
                let wanted = view.or_insert_with(|| version_for_canary(model, name, uid, canary, epoch));
                if wanted.as_ref().is_some_and(|wanted| wanted != acked) {
                    return false;
                }
            }
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Sidecar>> {
        self.sidecars.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn inbound(pod_uid: &str) -> ResourceName {
    ResourceName { r#type: ResourceType::Inbound as i32, cluster: String::new(), name: pod_uid.to_owned() }
}

/// The version of a destination if it is behind this Canary. Where the model does not show the epoch
/// yet, no version can be the right one.
fn version_for_canary(model: &Model, name: &str, uid: &str, canary: &Key, epoch: u64) -> Option<String> {
    let name = ResourceName {
        r#type: ResourceType::Destination as i32,
        cluster: String::new(),
        name: name.to_owned(),
    };
    let resource = model.resource(&name, uid)?;
    let Some(resource::Body::Destination(view)) = &resource.body else { return None };
    let Some(destination::Kind::Service(service)) = &view.kind else { return None };
    let shown = service.canary.as_ref()?;
    if *shown.namespace != *canary.0 || *shown.name != *canary.1 {
        return None;
    }
    Some(if shown.epoch == epoch { resource.version } else { String::new() })
}
