//! Who is connected, and what each sidecar enforces: of this replica's own sidecars, and, on the leader, of
//! those that other replicas serve.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tulle_mesh::proto::{ResourceType, Stamp, stamp};

use super::report::{Name, Report, Stamps};
use crate::model::{Key, Model, Pod};

/// What was said on an earlier stream holds for this long on a new one: until the sidecar has said it anew, or
/// not, because it has forgotten what it does not use any more.
const RESTATE_WITHIN: Duration = Duration::from_secs(30);
/// All pods are looked through at most this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long sidecars come back after a start of the operator.
const STARTING: Duration = Duration::from_secs(60);

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

/// How far a generation of a policy has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyAcknowledgement {
    /// Pods that enforce it.
    pub enforcing: usize,
    /// The first pod that does not.
    pub awaited: Option<String>,
    /// Which pod has refused it, and why.
    pub refusal: Option<String>,
}

/// All sidecars that are connected to any replica, as far as this one knows.
#[derive(Debug)]
pub struct Registry {
    started: Instant,
    /// This replica's own.
    own: Mutex<Sidecars>,
    /// Those that other replicas tell the leader about. Apart, because they are not ours to pass on to the
    /// next leader.
    relayed: Mutex<Sidecars>,
    unheard: Mutex<Option<(Instant, Option<String>)>>,
}

impl Default for Registry {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            own: Mutex::default(),
            relayed: Mutex::default(),
            unheard: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Sidecars {
    /// By the uid of their pod.
    by_pod: HashMap<Arc<str>, Sidecar>,
    /// Which resources carry shares of a Canary: as they were sent last, or as the sidecar enforces them.
    by_canary: HashMap<Key, HashSet<(Arc<str>, Name)>>,
}

#[derive(Debug, Default)]
struct Sidecar {
    /// Streams that are up: a new one may begin before the old one is seen to end. With none, the sidecar may
    /// well be there, and enforce what it had.
    streams: u32,
    /// Since when there is one.
    since: Option<Instant>,
    resources: HashMap<Name, Known>,
}

impl Sidecar {
    /// Whether it has had the time to say on its stream what it holds.
    fn has_restated(&self) -> bool {
        self.streams > 0 && self.since.is_some_and(|since| since.elapsed() >= RESTATE_WITHIN)
    }

    /// Whether it has said what it sends to, or sends to nothing.
    fn is_heard(&self) -> bool {
        let destination = |(kind, _): &Name| *kind == ResourceType::Destination as i32;
        self.has_restated() || self.streams == 0 || self.resources.keys().any(destination)
    }
}

/// What is known of a resource at a sidecar.
#[derive(Debug, Default)]
struct Known {
    /// Of the version that was sent last.
    sent: Option<Stamps>,
    /// Of the version that it enforces.
    acked: Option<Stamps>,
    refused: Option<String>,
    /// It was said on an earlier stream, and holds until then.
    until: Option<Instant>,
}

impl Known {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until < Instant::now())
    }

    fn canaries(&self) -> BTreeSet<Key> {
        let stamps = [&self.sent, &self.acked].into_iter().flatten().flat_map(|stamps| stamps.iter());
        stamps.filter(|stamp| stamp.kind() == stamp::Kind::Canary).map(key).collect()
    }
}

impl Registry {
    /// Takes a report of one of this replica's sidecars. `pass_on` sees it while no snapshot can be taken:
    /// who takes one misses nothing and hears nothing twice.
    pub fn report(&self, pod_uid: &str, report: Report, pass_on: impl FnOnce(Report)) {
        let mut own = lock(&self.own);
        own.take(pod_uid, report.clone());
        pass_on(report);
    }

    /// Takes a report that another replica relays.
    pub fn relayed(&self, pod_uid: &str, report: Report) {
        lock(&self.relayed).take(pod_uid, report);
    }

    /// Everything that is known of those of this replica's own sidecars that are `wanted`, for a leader that
    /// has just begun, with `then` carried out before the next report.
    pub fn snapshot(&self, wanted: impl Fn(&str) -> bool, then: impl FnOnce(Vec<(Arc<str>, Report)>)) {
        let own = lock(&self.own);
        let mut all = Vec::new();
        for (uid, sidecar) in own.by_pod.iter().filter(|(uid, sidecar)| sidecar.streams > 0 && wanted(uid)) {
            all.extend((0..sidecar.streams).map(|_| (Arc::clone(uid), Report::Connected)));
            for (name, known) in sidecar.resources.iter().filter(|(_, known)| !known.is_over()) {
                let acked = known.acked.clone().map(|stamps| Report::Acked(name.clone(), stamps));
                let sent = known.sent.clone().filter(|_| known.sent != known.acked);
                let sent = sent.map(|stamps| Report::Sent(name.clone(), stamps));
                let refused = known.refused.clone().map(|reason| {
                    Report::Refused(
                        name.clone(),
                        known.sent.clone().unwrap_or_else(|| Stamps::from([])),
                        reason,
                    )
                });
                all.extend([acked, sent, refused].into_iter().flatten().map(|r| (Arc::clone(uid), r)));
            }
        }
        then(all);
    }

    /// How many sidecars are connected.
    pub fn connected(&self) -> usize {
        let live = |sidecars: &Mutex<Sidecars>| {
            lock(sidecars).by_pod.values().filter(|sidecar| sidecar.streams > 0).count()
        };
        live(&self.own) + live(&self.relayed)
    }

    /// Forgets sidecars whose pod is gone, or that another replica hears of. Called now and then.
    pub fn forget_lost(&self, model: &Model) {
        let (mut own, mut relayed) = (lock(&self.own), lock(&self.relayed));
        own.forget_lost(model, &relayed);
        relayed.forget_lost(model, &own);
    }

    /// Whether every sidecar that sends to the target of this Canary enforces this epoch. Costs the Canary's
    /// own clients only. A sidecar that is not heard of counts with what it last said: it goes on enforcing
    /// that, as long as its pod is there.
    pub fn acknowledged_canary(&self, model: &Model, canary: &Key, epoch: u64) -> Acknowledgement {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut awaited = BTreeSet::new();
        for (here, other) in [(&*own, &*relayed), (&*relayed, &*own)] {
            for (uid, name) in here.by_canary.get(canary).into_iter().flatten() {
                let Some(pod) = here.concerned(model, uid, other) else { continue };
                let Some(sidecar) = here.by_pod.get(uid) else { continue };
                let anew = other.by_pod.get(uid).and_then(|sidecar| sidecar.resources.get(name));
                if sidecar.streams == 0 && anew.is_some_and(|known| known.acked.is_some()) {
                    // It has said so to another replica since.
                    continue;
                }
                let Some(known) = sidecar.resources.get(name).filter(|known| !known.is_over()) else {
                    continue;
                };
                let enforced = known
                    .acked
                    .as_deref()
                    .and_then(|stamps| stamps.iter().find(|stamp| is_of(stamp, stamp::Kind::Canary, canary)));
                if enforced.is_some_and(|stamp| stamp.version == epoch) {
                    continue;
                }
                let pod = name_of(pod);
                if let Some(reason) = &known.refused {
                    return Acknowledgement::Refused(format!("pod {pod}: {reason}"));
                }
                awaited.insert(pod);
            }
        }
        match (awaited.len(), awaited.first()) {
            (_, None) => Acknowledgement::Complete,
            (1, Some(one)) => {
                Acknowledgement::Awaited(format!("the sidecar of pod {one} has not acknowledged it"))
            }
            (count, Some(first)) => Acknowledgement::Awaited(format!(
                "{count} sidecars have not acknowledged it, that of pod {first} among them"
            )),
        }
    }

    /// How many of these pods enforce this generation of the policy, the first that does not, and a refusal.
    pub fn policy(
        &self,
        model: &Model,
        key: &Key,
        uid: &str,
        generation: i64,
        pods: &[Arc<str>],
    ) -> PolicyAcknowledgement {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut result = PolicyAcknowledgement::default();
        for pod_uid in pods {
            let name: Name = (ResourceType::Inbound as i32, Arc::clone(pod_uid));
            let known = |sidecars: &'_ Sidecars| {
                let known = sidecars.by_pod.get(pod_uid)?.resources.get(&name)?;
                if known.is_over() {
                    return None;
                }
                let enforces = known.acked.as_deref().is_some_and(|stamps| {
                    stamps.iter().any(|stamp| {
                        is_of(stamp, stamp::Kind::Policy, key)
                            && stamp.uid == uid
                            && i64::try_from(stamp.version) == Ok(generation)
                    })
                });
                Some((enforces, known.refused.clone()))
            };
            let known: Vec<_> = [known(&own), known(&relayed)].into_iter().flatten().collect();
            if known.iter().any(|(enforces, _)| *enforces) {
                result.enforcing += 1;
                continue;
            }
            let pod = model.pod(pod_uid).map_or_else(|| pod_uid.to_string(), |pod| pod.name.to_string());
            if result.refusal.is_none() {
                let reason = known.into_iter().find_map(|(_, refused)| refused);
                result.refusal = reason.map(|reason| format!("pod {pod}: {reason}"));
            }
            result.awaited.get_or_insert(pod);
        }
        result
    }

    /// Pods that run a sidecar and have not been heard of since this replica started: they may send with old
    /// shares. Looked for at most once per second.
    pub fn unheard(&self, model: &Model) -> Option<String> {
        let mut last = lock(&self.unheard);
        if let Some((at, result)) = &*last
            && at.elapsed() < LOOK_EVERY
        {
            return result.clone();
        }
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut count = 0_usize;
        let mut first: Option<&Pod> = None;
        for pod in model.pods() {
            let runs = pod.injected && pod.containers_ready && !pod.finished;
            // Just after a start, sidecars come back and have yet to say what they send to; later, one that comes
            // is new.
            let strict = self.started.elapsed() < STARTING;
            let is_heard = |sidecar: &Sidecar| !strict || sidecar.is_heard();
            let heard = || [&own, &relayed].iter().any(|all| all.by_pod.get(&pod.uid).is_some_and(is_heard));
            if !runs || pod.terminating || pod.host_network || heard() {
                continue;
            }
            count += 1;
            let order = |pod: &Pod| (Arc::clone(&pod.namespace), Arc::clone(&pod.name));
            if first.is_none_or(|first| order(pod) < order(first)) {
                first = Some(pod);
            }
        }
        let result = first.map(|pod| match count {
            1 => format!("pod {} has not been heard of", name_of(pod)),
            _ => format!("pod {} and {} more have not been heard of", name_of(pod), count - 1),
        });
        *last = Some((Instant::now(), result.clone()));
        result
    }
}

impl Sidecars {
    /// The pod of a sidecar that counts: it is there, and no other replica hears of it instead.
    fn concerned<'a>(&self, model: &'a Model, uid: &str, other: &Self) -> Option<&'a Pod> {
        let pod = model.pod(uid).filter(|pod| !pod.finished)?;
        let lost = self.by_pod.get(uid).is_none_or(|sidecar| sidecar.streams == 0);
        let elsewhere = other.by_pod.get(uid).is_some_and(Sidecar::has_restated);
        (!lost || !(elsewhere || pod.terminating)).then_some(pod)
    }

    fn forget_lost(&mut self, model: &Model, other: &Self) {
        let lost = |(uid, sidecar): (&Arc<str>, &Sidecar)| {
            (sidecar.streams == 0 && self.concerned(model, uid, other).is_none()).then(|| Arc::clone(uid))
        };
        let lost: Vec<_> = self.by_pod.iter().filter_map(lost).collect();
        for uid in lost {
            let sidecar = self.by_pod.remove(&uid).unwrap_or_default();
            for (name, known) in sidecar.resources {
                self.unindex(&uid, &name, known.canaries());
            }
        }
        let over = self.by_pod.iter().flat_map(|(uid, sidecar)| {
            let over = sidecar.resources.iter().filter(|(_, known)| known.is_over());
            over.map(|(name, _)| (Arc::clone(uid), name.clone()))
        });
        let over: Vec<_> = over.collect();
        for (uid, name) in over {
            self.change(&uid, name, |_| None);
        }
    }

    fn take(&mut self, pod_uid: &str, report: Report) {
        if report == Report::Connected {
            let sidecar = self.by_pod.entry(pod_uid.into()).or_default();
            sidecar.streams += 1;
            if sidecar.streams == 1 {
                sidecar.since = Some(Instant::now());
            }
            // The new stream says anew what it holds; until then the sidecar enforces what it had.
            let until = Some(Instant::now() + RESTATE_WITHIN);
            sidecar.resources.values_mut().for_each(|known| known.until = known.until.or(until));
            return;
        }
        let Some((uid, sidecar)) = self.by_pod.get_key_value(pod_uid) else { return };
        let (uid, streams) = (Arc::clone(uid), sidecar.streams);
        match report {
            Report::Connected => {}
            Report::Gone => {
                if let Some(sidecar) = self.by_pod.get_mut(&uid) {
                    sidecar.streams = streams.saturating_sub(1);
                    if sidecar.streams == 0 {
                        // Nobody says it anew for now.
                        sidecar.resources.values_mut().for_each(|known| known.until = None);
                    }
                }
            }
            Report::Sent(name, stamps) => {
                self.change(&uid, name, |known| Some(Known { sent: Some(stamps), until: None, ..known }))
            }
            Report::Acked(name, stamps) => self.change(&uid, name, |_| {
                Some(Known { sent: Some(Arc::clone(&stamps)), acked: Some(stamps), ..Known::default() })
            }),
            Report::Refused(name, stamps, reason) => self.change(&uid, name, |known| {
                Some(Known { sent: Some(stamps), refused: Some(reason), until: None, ..known })
            }),
            Report::Unsubscribed(name) => self.change(&uid, name, |_| None),
        }
    }

    /// Changes what is known of a resource, and the index with it.
    fn change(&mut self, uid: &Arc<str>, name: Name, change: impl FnOnce(Known) -> Option<Known>) {
        let Some(sidecar) = self.by_pod.get_mut(uid) else { return };
        let known = sidecar.resources.remove(&name).unwrap_or_default();
        let before = known.canaries();
        let known = change(known);
        let after = known.as_ref().map(Known::canaries).unwrap_or_default();
        if let Some(known) = known {
            sidecar.resources.insert(name.clone(), known);
        }
        for canary in after.difference(&before) {
            self.by_canary.entry(canary.clone()).or_default().insert((Arc::clone(uid), name.clone()));
        }
        self.unindex(uid, &name, before.difference(&after).cloned());
    }

    fn unindex(&mut self, uid: &Arc<str>, name: &Name, canaries: impl IntoIterator<Item = Key>) {
        for canary in canaries {
            if let Some(clients) = self.by_canary.get_mut(&canary) {
                clients.remove(&(Arc::clone(uid), name.clone()));
                if clients.is_empty() {
                    self.by_canary.remove(&canary);
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(stamp: &Stamp) -> Key {
    (stamp.namespace.as_str().into(), stamp.name.as_str().into())
}

fn is_of(stamp: &Stamp, kind: stamp::Kind, key: &Key) -> bool {
    stamp.kind() == kind && *stamp.namespace == *key.0 && *stamp.name == *key.1
}

fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{key, pod, shop};

    fn name(text: &str) -> Name {
        (ResourceType::Destination as i32, text.into())
    }

    fn stamps(kind: stamp::Kind, name: &str, version: u64) -> Stamps {
        let (namespace, name) = ("shop".into(), name.into());
        Stamps::from([Stamp { kind: kind.into(), namespace, name, uid: "p".into(), version }])
    }

    fn epoch(version: u64) -> Stamps {
        stamps(stamp::Kind::Canary, "web", version)
    }

    fn none() -> Stamps {
        Stamps::from([])
    }

    fn with(reports: impl IntoIterator<Item = Report>) -> Registry {
        let registry = Registry::default();
        registry.report("uid-a", Report::Connected, |_| {});
        reports.into_iter().for_each(|report| registry.report("uid-a", report, |_| {}));
        registry
    }

    fn model() -> Model {
        shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])
    }

    fn acknowledged(registry: &Registry, epoch: u64) -> Acknowledgement {
        registry.acknowledged_canary(&model(), &key("shop", "web"), epoch)
    }

    fn awaited() -> Acknowledgement {
        Acknowledgement::Awaited("the sidecar of pod shop/a has not acknowledged it".to_owned())
    }

    #[test]
    fn of_all_that_a_sidecar_has_not_acknowledged_what_it_refused_is_told() {
        let names = ["10.96.0.1:80", "203.0.113.1:80"].map(name);
        for refused in &names {
            let registry = with(names.clone().map(|name| Report::Sent(name, epoch(1))));
            assert_eq!(acknowledged(&registry, 1), awaited());
            let report = Report::Refused(refused.clone(), epoch(1), "too new".into());
            registry.report("uid-a", report, |_| {});
            // Whichever of the two a walk over them meets first.
            assert_eq!(
                acknowledged(&registry, 1),
                Acknowledgement::Refused("pod shop/a: too new".to_owned())
            );
        }
    }

    #[test]
    fn a_canary_waits_for_its_own_clients_only() {
        let other = stamps(stamp::Kind::Canary, "other", 1);
        let web = name("10.96.0.1:80");
        let registry = with([Report::Sent(name("10.96.0.2:80"), other), Report::Sent(web.clone(), epoch(1))]);
        assert_eq!(acknowledged(&registry, 1), awaited());
        registry.report("uid-a", Report::Acked(web.clone(), epoch(1)), |_| {});
        assert_eq!(acknowledged(&registry, 1), Acknowledgement::Complete);
        assert_eq!(acknowledged(&registry, 2), awaited(), "its resource is not even compiled yet");
        registry.report("uid-a", Report::Sent(web.clone(), none()), |_| {});
        assert_eq!(acknowledged(&registry, 2), awaited(), "it still enforces old shares");
        registry.report("uid-a", Report::Acked(web, none()), |_| {});
        assert_eq!(acknowledged(&registry, 2), Acknowledgement::Complete, "it has no shares any more");
    }

    #[test]
    fn a_new_stream_must_say_anew_what_the_sidecar_enforces() {
        let web = name("10.96.0.1:80");
        let registry = with([Report::Acked(web.clone(), epoch(1)), Report::Gone, Report::Connected]);
        assert_eq!(acknowledged(&registry, 2), awaited(), "meanwhile it enforces what it had");
        registry.report("uid-a", Report::Acked(web, epoch(2)), |_| {});
        assert_eq!(acknowledged(&registry, 2), Acknowledgement::Complete);
    }

    #[test]
    fn a_sidecar_that_is_not_heard_of_is_kept_while_its_pod_is_there() {
        let mut model = model();
        let registry = with([Report::Acked(name("10.96.0.1:80"), epoch(1)), Report::Gone]);
        let kept = |registry: &Registry| lock(&registry.own).by_pod.contains_key("uid-a");
        registry.forget_lost(&model);
        assert!(kept(&registry), "it may well go on enforcing what it had");
        assert_eq!(registry.connected(), 0);
        registry.relayed("uid-a", Report::Connected);
        registry.forget_lost(&model);
        assert!(kept(&registry), "it may not have told the other replica everything yet");
        let long_ago = Instant::now().checked_sub(RESTATE_WITHIN);
        lock(&registry.relayed).by_pod.get_mut("uid-a").unwrap().since = long_ago;
        registry.forget_lost(&model);
        assert!(!kept(&registry), "another replica hears of it now");
        assert!(lock(&registry.own).by_canary.is_empty(), "the index forgets it too");
        registry.relayed("uid-a", Report::Gone);
        model.delete_pod("uid-a");
        registry.forget_lost(&model);
        assert!(lock(&registry.relayed).by_pod.is_empty(), "its pod is gone");
    }

    #[test]
    fn a_policy_counts_the_pods_that_enforce_its_generation() {
        let inbound: Name = (ResourceType::Inbound as i32, "uid-a".into());
        let of = |generation| stamps(stamp::Kind::Policy, "strict", generation);
        let registry = with([Report::Acked(inbound.clone(), of(3)), Report::Sent(inbound.clone(), of(4))]);
        let pods: [Arc<str>; 2] = ["uid-a".into(), "uid-b".into()];
        let policy = |generation| registry.policy(&model(), &key("shop", "strict"), "p", generation, &pods);
        assert_eq!((policy(3).enforcing, policy(3).awaited), (1, Some("b".to_owned())));
        assert_eq!((policy(4).enforcing, policy(4).awaited), (0, Some("a".to_owned())));
        registry.report("uid-a", Report::Refused(inbound, of(4), "too new".into()), |_| {});
        assert_eq!(policy(4).refusal, Some("pod a: too new".to_owned()));
    }

    #[test]
    fn pods_that_were_never_heard_of_are_named() {
        assert_eq!(
            Registry::default().unheard(&model()),
            Some("pod shop/a and 1 more have not been heard of".to_owned())
        );
        let sent = || Report::Sent(name("10.96.0.1:80"), epoch(1));
        let registry = with([sent()]);
        assert_eq!(registry.unheard(&model()), Some("pod shop/b has not been heard of".to_owned()));
        let registry = with([sent(), Report::Gone]);
        registry.relayed("uid-b", Report::Connected);
        registry.relayed("uid-b", sent());
        assert_eq!(registry.unheard(&model()), None);
    }

    #[test]
    fn a_snapshot_names_every_stream_and_what_was_sent_and_not_acknowledged() {
        let web = name("10.0.0.1:80");
        let registry = with([Report::Connected, Report::Sent(web.clone(), epoch(1))]);
        registry.relayed("v", Report::Connected);
        let mut seen = Vec::new();
        registry.snapshot(|_| true, |all| seen = all);
        let of_a = |report| (Arc::<str>::from("uid-a"), report);
        let sent = of_a(Report::Sent(web, epoch(1)));
        assert_eq!(seen, [of_a(Report::Connected), of_a(Report::Connected), sent]);
        registry.snapshot(|_| false, |all| seen = all);
        assert!(seen.is_empty(), "of another shard");
    }
}
