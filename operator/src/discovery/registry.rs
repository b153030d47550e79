//! Who is connected, and what each sidecar has acknowledged: of this replica's own sidecars, and, on
//! the leader, of those that other replicas serve.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tulle_mesh::proto::{ResourceName, ResourceType, destination, resource};

use crate::model::{Key, Model};

/// A sidecar that has not been heard of for this long is taken for dead, whatever its pod says.
const LOST_AFTER: Duration = Duration::from_secs(60);
/// A version that no resource has.
const NEVER: &str = "-";

/// A resource by type and name.
type Name = (i32, String);

/// What a sidecar says about a resource, to be passed on to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// It came.
    Connected,
    /// It is gone.
    Gone,
    /// It was sent this, and has acknowledged no version of it yet.
    Sent(Name),
    /// It enforces this version.
    Acked(Name, String),
    /// It refused this version.
    Refused(Name, String, String),
    /// It wants no more of this.
    Unsubscribed(Name),
}

/// How far the present shares of a Canary have come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acknowledgement {
    /// Every sidecar concerned enforces them.
    Complete,
    /// Some do not; a sentence says who.
    Awaited(String),
    /// One has refused them; a sentence says which and why.
    Refused(String),
}

/// All sidecars that are connected to any replica, as far as this one knows.
#[derive(Debug, Default)]
pub struct Registry {
    /// This replica's own.
    own: Mutex<Sidecars>,
    /// Those that other replicas tell the leader about. Apart, because they are not ours to pass on to the
    /// next leader.
    relayed: Mutex<Sidecars>,
}

/// Sidecars by the uid of their pod.
type Sidecars = HashMap<String, Sidecar>;

#[derive(Debug, Default)]
struct Sidecar {
    /// Streams that are up: a new one may begin before the old one is seen to end.
    streams: u32,
    /// Since when there is none: the sidecar itself may well be there, and enforce what it had.
    unheard: Option<Instant>,
    /// What it has acknowledged; an empty version: it was sent and not acknowledged yet.
    acked: HashMap<Name, String>,
    refused: HashMap<Name, (String, String)>,
}

impl Registry {
    /// Takes a report of one of this replica's sidecars. `pass_on` sees it while no snapshot can be taken:
    /// who takes one misses nothing and hears nothing twice.
    pub fn report(&self, pod_uid: &str, report: Report, pass_on: impl FnOnce(Report)) {
        let mut own = lock(&self.own);
        take(&mut own, pod_uid, report.clone());
        pass_on(report);
    }

    /// Takes a report that another replica relays.
    pub fn relayed(&self, pod_uid: &str, report: Report) {
        take(&mut lock(&self.relayed), pod_uid, report);
    }

    /// Everything that is known of this replica's own sidecars, for a leader that has just begun, with
    /// `then` carried out before the next report.
    pub fn snapshot(&self, then: impl FnOnce(Vec<(String, Report)>)) {
        let own = lock(&self.own);
        let mut all = Vec::new();
        for (uid, sidecar) in own.iter().filter(|(_, sidecar)| sidecar.streams > 0) {
            all.extend((0..sidecar.streams).map(|_| (uid.clone(), Report::Connected)));
            all.extend(sidecar.acked.iter().map(|(name, version)| {
                let report = match version.as_str() {
                    "" => Report::Sent(name.clone()),
                    version => Report::Acked(name.clone(), version.to_owned()),
                };
                (uid.clone(), report)
            }));
            let refused = sidecar.refused.iter();
            all.extend(
                refused.map(|(n, (v, r))| (uid.clone(), Report::Refused(n.clone(), v.clone(), r.clone()))),
            );
        }
        then(all);
    }

    /// How many sidecars are connected.
    pub fn connected(&self) -> usize {
        let live = |sidecars: &Mutex<Sidecars>| lock(sidecars).values().filter(|s| s.streams > 0).count();
        live(&self.own) + live(&self.relayed)
    }

    /// Whether a pod's sidecar enforces the present version of its inbound resource.
    pub fn enforces(&self, model: &Model, pod_uid: &str) -> bool {
        let name = inbound(pod_uid);
        let Some(wanted) = model.resource(&name, pod_uid) else { return false };
        let id = (name.r#type, name.name);
        [&self.own, &self.relayed].into_iter().any(|sidecars| {
            let sidecars = lock(sidecars);
            let sidecar = sidecars.get(pod_uid).filter(|sidecar| sidecar.streams > 0);
            sidecar.and_then(|sidecar| sidecar.acked.get(&id)) == Some(&wanted.version)
        })
    }

    /// Why a pod's sidecar has refused its inbound resource, if it has.
    pub fn refusal(&self, pod_uid: &str) -> Option<String> {
        let name = inbound(pod_uid);
        let id = (name.r#type, name.name);
        [&self.own, &self.relayed].into_iter().find_map(|sidecars| {
            let sidecars = lock(sidecars);
            let (_, reason) = sidecars.get(pod_uid)?.refused.get(&id)?;
            Some(reason.clone())
        })
    }

    /// Forgets sidecars that are not heard of any more: their pod is gone, another replica hears of them, or it
    /// has been too long. Called now and then.
    pub fn forget_lost(&self, model: &Model) {
        let (mut own, mut relayed) = (lock(&self.own), lock(&self.relayed));
        forget_lost(&mut own, model, &relayed);
        forget_lost(&mut relayed, model, &own);
    }

    /// Whether every sidecar that sends to the target of a Canary has acknowledged its present shares. One
    /// that has not been heard of for a moment counts with what it last said: it goes on enforcing that.
    pub fn acknowledged_canary(&self, model: &Model, canary: &Key, epoch: u64) -> Acknowledgement {
        self.forget_lost(model);
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut views: HashMap<(&str, &str), Option<String>> = HashMap::new();
        let mut awaited = Vec::new();
        for (uid, sidecar) in own.iter().chain(relayed.iter()) {
            let pod = model.pod(uid);
            let node = pod.map_or("", |pod| &*pod.node);
            let mut behind = sidecar.acked.iter().filter(|((kind, name), acked)| {
                if *kind != ResourceType::Destination as i32 {
                    return false;
                }
                let view = views.entry((name.as_str(), node));
                let wanted = view.or_insert_with(|| version_for_canary(model, name, uid, canary, epoch));
                wanted.as_ref().is_some_and(|wanted| wanted != *acked)
            });
            let Some((first, _)) = behind.next() else { continue };
            // Any of them that was refused explains more than the others.
            let mut names = std::iter::once(first).chain(behind.map(|(name, _)| name));
            let refused = names.find_map(|name| sidecar.refused.get(name));
            let pod = pod.map_or_else(|| uid.clone(), |pod| format!("{}/{}", pod.namespace, pod.name));
            if let Some((_, reason)) = refused {
                return Acknowledgement::Refused(format!("pod {pod}: {reason}"));
            }
            awaited.push(pod);
        }
        awaited.sort();
        match awaited.as_slice() {
            [] => Acknowledgement::Complete,
            [one] => Acknowledgement::Awaited(format!("the sidecar of pod {one} has not acknowledged it")),
            [first, ..] => Acknowledgement::Awaited(format!(
                "{} sidecars have not acknowledged it, that of pod {first} among them",
                awaited.len()
            )),
        }
    }
}

/// A sidecar that is not heard of any more is forgotten when its pod is gone, when another replica hears of
/// it, and in the end.
fn forget_lost(sidecars: &mut Sidecars, model: &Model, others: &Sidecars) {
    sidecars.retain(|uid, sidecar| {
        let Some(since) = sidecar.unheard else { return true };
        let here = model.pod(uid).is_some_and(|pod| !pod.terminating && !pod.finished);
        let elsewhere = others.get(uid).is_some_and(|other| other.streams > 0);
        here && !elsewhere && since.elapsed() < LOST_AFTER
    });
}

fn take(sidecars: &mut Sidecars, pod_uid: &str, report: Report) {
    if report == Report::Connected {
        let sidecar = sidecars.entry(pod_uid.to_owned()).or_default();
        sidecar.streams += 1;
        sidecar.unheard = None;
        // The new stream says anew what it holds; what the old one said may be about nothing any more.
        sidecar.acked.clear();
        sidecar.refused.clear();
        return;
    }
    let Some(sidecar) = sidecars.get_mut(pod_uid) else { return };
    match report {
        Report::Connected => {}
        Report::Gone => {
            sidecar.streams = sidecar.streams.saturating_sub(1);
            if sidecar.streams == 0 {
                sidecar.unheard = Some(Instant::now());
            }
        }
        Report::Sent(name) => drop(sidecar.acked.entry(name).or_default()),
        Report::Acked(name, version) => {
            sidecar.refused.remove(&name);
            sidecar.acked.insert(name, version);
        }
        Report::Refused(name, version, reason) => {
            sidecar.refused.insert(name, (version, reason));
        }
        Report::Unsubscribed(name) => {
            sidecar.acked.remove(&name);
            sidecar.refused.remove(&name);
        }
    }
}

fn lock(sidecars: &Mutex<Sidecars>) -> MutexGuard<'_, Sidecars> {
    sidecars.lock().unwrap_or_else(PoisonError::into_inner)
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
    Some(if shown.epoch == epoch { resource.version } else { NEVER.to_owned() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::tests::{canary, key, pod, shop};

    #[test]
    fn of_all_that_a_sidecar_has_not_acknowledged_what_it_refused_is_told() {
        let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
        model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1", "phase": "Stable"})));
        let names = ["10.96.0.1:80", "203.0.113.1:80"]
            .map(|name| (ResourceType::Destination as i32, name.to_owned()));
        let acknowledged = |registry: &Registry| registry.acknowledged_canary(&model, &key("shop", "web"), 0);
        // Whichever of the two a walk over them meets first.
        for refused in &names {
            let registry = Registry::default();
            registry.report("uid-a", Report::Connected, |_| {});
            for name in &names {
                registry.report("uid-a", Report::Sent(name.clone()), |_| {});
            }
            let awaited = "the sidecar of pod shop/a has not acknowledged it".to_owned();
            assert_eq!(acknowledged(&registry), Acknowledgement::Awaited(awaited));
            registry.report("uid-a", Report::Refused(refused.clone(), "v".into(), "too new".into()), |_| {});
            assert_eq!(acknowledged(&registry), Acknowledgement::Refused("pod shop/a: too new".to_owned()));
        }
    }

    #[test]
    fn a_sidecar_that_is_not_heard_of_is_kept_while_its_pod_is_there() {
        let registry = Registry::default();
        let mut model = Model::default();
        model.apply_pod(crate::model::Pod { uid: "u".into(), ..Default::default() });
        let kept = |registry: &Registry| lock(&registry.own).contains_key("u");
        registry.report("u", Report::Connected, |_| {});
        registry.report("u", Report::Acked((2, "10.0.0.1:80".into()), "v1".into()), |_| {});
        registry.report("u", Report::Gone, |_| {});
        registry.forget_lost(&model);
        assert!(kept(&registry), "it may well go on enforcing what it had");
        assert_eq!(registry.connected(), 0);
        registry.relayed("u", Report::Connected);
        registry.forget_lost(&model);
        assert!(!kept(&registry), "another replica hears of it now");
        registry.relayed("u", Report::Gone);
        model.delete_pod("u");
        registry.forget_lost(&model);
        assert!(lock(&registry.relayed).is_empty(), "its pod is gone");
    }

    #[test]
    fn a_snapshot_names_every_stream_and_what_was_sent_and_not_acknowledged() {
        let registry = Registry::default();
        let name = (2, "10.0.0.1:80".to_owned());
        registry.report("u", Report::Connected, |_| {});
        registry.report("u", Report::Connected, |_| {});
        registry.report("u", Report::Sent(name.clone()), |_| {});
        registry.relayed("v", Report::Connected);
        let mut seen = Vec::new();
        registry.snapshot(|all| seen = all);
        let of_u = |report| ("u".to_owned(), report);
        assert_eq!(seen, [of_u(Report::Connected), of_u(Report::Connected), of_u(Report::Sent(name))]);
    }
}
