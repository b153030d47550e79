//! Who is connected, and what each sidecar enforces: of this replica's own sidecars, and, on the leader, of
//! those that other replicas serve.

mod clients;
mod dialled;
mod in_force;
mod route;
mod snapshot;
mod state;
mod subscribed;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tulle_mesh::features::{LIMITS_V1, LOGS_V1};
use tulle_mesh::proto::{Resource, ResourceType, Stamp, stamp};

pub use clients::ClientAcknowledgement;
pub use dialled::PodDialling;
pub use in_force::Behind;
pub use route::RouteAcknowledgement;
pub use state::SidecarState;

use super::report::{Enforced, Name, SidecarEvent, Stamps};
use crate::model::{Key, Model, Pod, Sections, WorkloadKey};

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
pub struct AckTracker {
    started: Instant,
    /// This replica's own.
    own: Mutex<Sidecars>,
    /// Those that other replicas tell the leader about. Apart, because they are not ours to pass on to the
    /// next leader.
    relayed: Mutex<Sidecars>,
    unheard: Mutex<Option<(Instant, Option<String>)>>,
    /// Earlier versions that sidecars enforce whose reports other replicas relay.
    earlier: Mutex<HashMap<(Name, String), Weak<Resource>>>,
    /// Clients that have dialled a pod of a workload behind its gate: they find pods by themselves.
    finders: Mutex<HashMap<WorkloadKey, HashSet<Arc<str>>>>,
}

impl Default for AckTracker {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            own: Mutex::default(),
            relayed: Mutex::default(),
            unheard: Mutex::default(),
            finders: Mutex::default(),
            earlier: Mutex::default(),
        }
    }
}

#[derive(Debug, Default)]
struct Sidecars {
    /// By the uid of their pod.
    by_pod: HashMap<Arc<str>, Sidecar>,
    /// Which resources carry shares of a Canary: as they were sent last, or as the sidecar enforces them.
    by_canary: HashMap<Key, HashSet<(Arc<str>, Name)>>,
    /// Which resources hold rules of a route of the Gateway API, in the same sense. Its kind stands before its name.
    by_route: HashMap<Key, HashSet<(Arc<str>, Name)>>,
    /// Which resources of dialled addresses hold sections of a policy, in the same sense.
    by_policy: HashMap<Key, HashSet<(Arc<str>, Name)>>,
    /// Routes of which a resource was sent, acknowledged, refused or given up since this was last asked.
    changed_routes: HashSet<Key>,
    /// Streams that have begun, also those that have ended since.
    opened: u64,
    /// Which sidecars have subscribed to what is at an address.
    by_address: HashMap<SocketAddr, HashSet<(Arc<str>, Name)>>,
}

#[derive(Debug, Default)]
struct Sidecar {
    /// Streams that are up: a new one may begin before the old one is seen to end. With none, the sidecar may
    /// well be there, and enforce what it had.
    streams: u32,
    /// Since when there is one.
    since: Option<Instant>,
    /// The number of the newest stream, of those of this replica.
    newest: u64,
    /// Features of this build that it does not have, as its newest stream says.
    lacks: Vec<&'static str>,
    /// Of its build, as its newest stream says.
    version: Arc<str>,
    /// When its certificate ends, in Unix seconds; 0: it has not said so.
    certificate_not_after: i64,
    /// Resident memory of its process; 0: it has not said so.
    memory_bytes: u64,
    /// The replica that its newest stream is connected to; `None`: this one.
    replica: Option<Arc<str>>,
    resources: HashMap<Name, Known>,
}

impl Sidecar {
    /// Whether it has had the time to say on its stream what it holds.
    fn has_restated(&self) -> bool {
        self.streams > 0 && self.since.is_some_and(|since| since.elapsed() >= RESTATE_WITHIN)
    }

    /// Whether it has said what it sends to, or sends to nothing.
    fn is_heard(&self) -> bool {
        self.has_restated() || self.streams == 0 || self.resources.keys().any(leads_somewhere)
    }
}

/// What is known of a resource at a sidecar.
#[derive(Debug, Default)]
struct Known {
    /// Of the version that was sent last.
    sent: Option<Stamps>,
    /// Of the version that it enforces.
    acked: Option<Stamps>,
    /// When it was acknowledged, as far as this replica has heard.
    acked_at: Option<Instant>,
    /// Since when a version has been sent that it has not answered.
    behind_since: Option<Instant>,
    refused: Option<String>,
    /// What it enforces in place of the version that was sent last, where that lasts. Boxed: hardly one has it, and there are
    /// a hundred thousand of these.
    enforces: Option<Box<Enforced>>,
    /// It was said on an earlier stream, and holds until then.
    until: Option<Instant>,
}

impl Known {
    fn is_over(&self) -> bool {
        self.until.is_some_and(|until| until < Instant::now())
    }

    /// Whether this generation of a policy is enforced.
    fn enforces(&self, policy: &Key, uid: &str, generation: i64) -> bool {
        self.generations(policy).any(|found| found == (uid, generation))
    }

    /// Whether another generation of a policy is still enforced, or one of a policy of the same name before it.
    fn enforces_another(&self, policy: &Key, uid: &str, generation: i64) -> bool {
        self.generations(policy).any(|found| found != (uid, generation))
    }

    /// The policy's uid and generation in the enforced version.
    fn generations(&self, policy: &Key) -> impl Iterator<Item = (&str, i64)> {
        let stamps = self.acked.as_deref().unwrap_or_default().iter();
        let its = stamps.filter(move |stamp| is_of(stamp, stamp::Kind::Policy, policy));
        its.map(|stamp| (stamp.uid.as_str(), i64::try_from(stamp.version).unwrap_or(i64::MAX)))
    }

    /// Objects of one kind in the version that was sent last or in the enforced one.
    fn stamped(&self, kind: stamp::Kind) -> BTreeSet<Key> {
        let stamps = [&self.sent, &self.acked].into_iter().flatten().flat_map(|stamps| stamps.iter());
        stamps.filter(|stamp| stamp.kind() == kind).map(key).collect()
    }

    /// Objects of each kind that has an index. Policies have one for what is said of dialled addresses: which pods
    /// enforce the others is known.
    fn indexed(&self, (kind, _): &Name) -> Indexed {
        let is_route = *kind == ResourceType::Route as i32;
        Indexed {
            canaries: self.stamped(stamp::Kind::Canary),
            routes: self.stamped(stamp::Kind::Route),
            policies: if is_route { self.stamped(stamp::Kind::Policy) } else { BTreeSet::new() },
        }
    }
}

/// The objects under which a resource is found.
#[derive(Debug, Default)]
struct Indexed {
    canaries: BTreeSet<Key>,
    routes: BTreeSet<Key>,
    policies: BTreeSet<Key>,
}

impl AckTracker {
    /// Takes a report of one of this replica's sidecars. `pass_on` sees it while no snapshot can be taken:
    /// who takes one misses nothing and hears nothing twice.
    pub fn report(&self, pod_uid: &str, report: SidecarEvent, pass_on: impl FnOnce(SidecarEvent)) {
        let mut own = lock(&self.own);
        own.take(pod_uid, report.clone());
        pass_on(report);
    }

    /// Takes a report that another replica relays.
    pub fn relayed(&self, pod_uid: &str, report: SidecarEvent) {
        let report = self.interned(report);
        lock(&self.relayed).take(pod_uid, report);
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
        lock(&self.finders).retain(|_, uids| {
            uids.retain(|uid| model.pod(uid).is_some());
            !uids.is_empty()
        });
    }

    /// Whether every sidecar that sends to the target of this Canary enforces this epoch. Costs the Canary's
    /// own clients only. A sidecar that is not heard of counts with what it last said: it goes on enforcing
    /// that, as long as its pod is there. One that dials a Service of the target, or an address from which routes lead
    /// there, is waited for also where no shares have been sent to it yet: the replica that serves it may be behind.
    pub fn acknowledged_canary(&self, model: &Model, canary: &Key, epoch: u64) -> Acknowledgement {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut awaited = BTreeSet::new();
        for (here, other) in [(&*own, &*relayed), (&*relayed, &*own)] {
            for (uid, name) in here.by_canary.get(canary).into_iter().flatten() {
                let Some((pod, known)) = here.reported(model, other, (uid, name)) else { continue };
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
        if awaited.is_empty() {
            for shared in model.shared_addresses(canary) {
                awaited.append(&mut own.without_shares(model, &relayed, canary, &shared));
                awaited.append(&mut relayed.without_shares(model, &own, canary, &shared));
            }
        }
        match (awaited.len(), awaited.first()) {
            (_, None) => Acknowledgement::Complete,
            (1, Some(one)) => Acknowledgement::Awaited(format!("waiting for the sidecar of pod {one}")),
            (count, Some(first)) => Acknowledgement::Awaited(format!(
                "waiting for {count} sidecars, among them that of pod {first}"
            )),
        }
    }

    /// How many of these pods enforce this generation of the policy, the first that does not, and a refusal. A pod
    /// enforces it when its sidecar does in all sections of it that decide something there, and enforces no other
    /// generation of it in the rest. What the sidecar refuses of other policies' sections is theirs. One that does not
    /// know a section does not subscribe to it, and counts as having refused it.
    pub fn policy(
        &self,
        model: &Model,
        key: &Key,
        uid: &str,
        generation: i64,
        pods: &[(Arc<str>, Sections)],
    ) -> PolicyAcknowledgement {
        use ResourceType::Inbound;
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut result = PolicyAcknowledgement::default();
        for (pod_uid, sections) in pods {
            // A replica that has lost it holds what an earlier process may have said.
            let heard = [(&*own, &*relayed), (&*relayed, &*own)].map(|(here, other)| {
                let concerned = here.concerned(model, pod_uid, other);
                concerned.and_then(|_| here.by_pod.get(pod_uid))
            });
            let known = |kind: ResourceType| {
                let name: Name = (kind as i32, Arc::clone(pod_uid));
                let all = heard.into_iter().flatten();
                all.filter_map(move |sidecar| sidecar.resources.get(&name)).filter(|known| !known.is_over())
            };
            let enforced = |kind| known(kind).any(|known| known.enforces(key, uid, generation));
            // What it has told one replica since counts, whatever it told another one before.
            let is_behind = |kind| {
                known(kind).next().is_some()
                    && known(kind).all(|known| known.enforces_another(key, uid, generation))
            };
            let all = || Sections::ALL.resources();
            // An old sidecar has all sections in one, except for those that it does not know.
            let is_enforced = (enforced(Inbound) && !sections.limits && !sections.telemetry)
                || sections.resources().all(|(kind, _)| enforced(kind));
            if is_enforced && !is_behind(Inbound) && !all().any(|(kind, _)| is_behind(kind)) {
                result.enforcing += 1;
                continue;
            }
            let pod = model.pod(pod_uid).map_or_else(|| pod_uid.to_string(), |pod| pod.name.to_string());
            if result.refusal.is_none() {
                let refused = |kind| known(kind).find_map(|known| known.refused.clone());
                let decides = |kind: ResourceType| sections.resources().any(|(deciding, _)| deciding == kind);
                let mut lacking =
                    all().filter(|(kind, _)| is_behind(*kind) || (decides(*kind) && !enforced(*kind)));
                let of_section = lacking.find_map(|(kind, section)| {
                    Some(format!("pod {pod} refused section {section}: {}", refused(kind)?))
                });
                let of_all = || refused(Inbound).map(|reason| format!("pod {pod}: {reason}"));
                let lacks =
                    |feature| heard.into_iter().flatten().any(|sidecar| sidecar.lacks.contains(&feature));
                let of_version = || {
                    let (_, section) = sections.resources().find(|(kind, _)| {
                        let feature = feature_of(*kind);
                        feature.is_some_and(|feature| known(*kind).next().is_none() && lacks(feature))
                    })?;
                    Some(format!("pod {pod}: {}", unaware_of(section)))
                };
                result.refusal = of_section.or_else(of_all).or_else(of_version);
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
            1 => format!("the sidecar of pod {} has not reported yet", name_of(pod)),
            _ => format!("{count} sidecars have not reported yet, among them that of pod {}", name_of(pod)),
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

    /// What a sidecar that counts has reported of a resource, and its pod. `None`: nothing, nothing that still counts, or
    /// another replica has had its acknowledgement since.
    fn reported<'a>(
        &'a self,
        model: &'a Model,
        other: &Self,
        (uid, name): (&str, &Name),
    ) -> Option<(&'a Pod, &'a Known)> {
        let pod = self.concerned(model, uid, other)?;
        let sidecar = self.by_pod.get(uid)?;
        let anew = other.by_pod.get(uid).and_then(|sidecar| sidecar.resources.get(name));
        if sidecar.streams == 0 && anew.is_some_and(|known| known.acked.is_some()) {
            return None;
        }
        let known = sidecar.resources.get(name).filter(|known| !known.is_over())?;
        Some((pod, known))
    }

    fn forget_lost(&mut self, model: &Model, other: &Self) {
        let lost = |(uid, sidecar): (&Arc<str>, &Sidecar)| {
            (sidecar.streams == 0 && self.concerned(model, uid, other).is_none()).then(|| Arc::clone(uid))
        };
        let lost: Vec<_> = self.by_pod.iter().filter_map(lost).collect();
        for uid in lost {
            let sidecar = self.by_pod.remove(&uid).unwrap_or_default();
            for (name, known) in sidecar.resources {
                self.unindex(&uid, &name, &known.indexed(&name), &Indexed::default());
                self.dials_no_more(&uid, &name);
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

    fn take(&mut self, pod_uid: &str, report: SidecarEvent) {
        if report == SidecarEvent::Connected {
            let sidecar = self.by_pod.entry(pod_uid.into()).or_default();
            sidecar.streams += 1;
            self.opened += 1;
            // Another version may run now.
            sidecar.lacks = Vec::new();
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
            SidecarEvent::Connected => {}
            SidecarEvent::Lacks(_)
            | SidecarEvent::Version(_)
            | SidecarEvent::CertificateEnds(_)
            | SidecarEvent::Memory(_) => {
                if let Some(sidecar) = self.by_pod.get_mut(&uid) {
                    sidecar.describe(report);
                }
            }
            SidecarEvent::Gone => {
                if let Some(sidecar) = self.by_pod.get_mut(&uid) {
                    sidecar.streams = streams.saturating_sub(1);
                    if sidecar.streams == 0 {
                        // Nobody says it anew for now.
                        sidecar.resources.values_mut().for_each(|known| known.until = None);
                    }
                }
            }
            SidecarEvent::Sent(name, stamps) => self.change(&uid, name, |known| {
                let behind_since = known.behind_since.or(Some(Instant::now()));
                Some(Known { sent: Some(stamps), behind_since, until: None, ..known })
            }),
            SidecarEvent::Acked(name, stamps) => self.change(&uid, name, |_| {
                let (sent, acked) = (Some(Arc::clone(&stamps)), Some(stamps));
                Some(Known { sent, acked, acked_at: Some(Instant::now()), ..Known::default() })
            }),
            SidecarEvent::Refused(name, stamps, reason) => self.change(&uid, name, |known| {
                let (sent, refused) = (Some(stamps), Some(reason));
                Some(Known { sent, refused, behind_since: None, until: None, ..known })
            }),
            SidecarEvent::Enforces(name, enforces) => self.change(&uid, name, |known| {
                // Of some resources nothing else is reported.
                let is_known = enforces.is_some() || known.sent.is_some() || known.acked.is_some();
                is_known.then_some(Known { enforces: enforces.map(Box::new), ..known })
            }),
            SidecarEvent::Unsubscribed(name) => self.change(&uid, name, |_| None),
        }
    }

    /// Changes what is known of a resource, and the indices with it.
    fn change(&mut self, uid: &Arc<str>, name: Name, change: impl FnOnce(Known) -> Option<Known>) {
        let Some(sidecar) = self.by_pod.get_mut(uid) else { return };
        let known = sidecar.resources.remove(&name);
        let was_known = known.is_some();
        let known = known.unwrap_or_default();
        let before = known.indexed(&name);
        let known = change(known);
        let after = known.as_ref().map(|known| known.indexed(&name)).unwrap_or_default();
        let is_known = known.is_some();
        if let Some(known) = known {
            sidecar.resources.insert(name.clone(), known);
        }
        match (was_known, is_known) {
            (false, true) => self.dials(uid, &name),
            (true, false) => self.dials_no_more(uid, &name),
            _ => {}
        }
        for canary in after.canaries.difference(&before.canaries) {
            self.by_canary.entry(canary.clone()).or_default().insert((Arc::clone(uid), name.clone()));
        }
        for route in after.routes.difference(&before.routes) {
            self.by_route.entry(route.clone()).or_default().insert((Arc::clone(uid), name.clone()));
        }
        for policy in after.policies.difference(&before.policies) {
            self.by_policy.entry(policy.clone()).or_default().insert((Arc::clone(uid), name.clone()));
        }
        self.unindex(uid, &name, &before, &after);
        self.changed_routes.extend(before.routes);
        self.changed_routes.extend(after.routes);
    }

    /// Removes a resource from the indices of objects that it has no stamp of any more.
    fn unindex(&mut self, uid: &Arc<str>, name: &Name, before: &Indexed, after: &Indexed) {
        let of = (Arc::clone(uid), name.clone());
        remove(&mut self.by_canary, before.canaries.difference(&after.canaries), &of);
        remove(&mut self.by_route, before.routes.difference(&after.routes), &of);
        remove(&mut self.by_policy, before.policies.difference(&after.policies), &of);
    }
}

/// Removes one entry from an index under each of these objects, and an object with its last entry.
fn remove<'a>(
    index: &mut HashMap<Key, HashSet<(Arc<str>, Name)>>,
    objects: impl Iterator<Item = &'a Key>,
    entry: &(Arc<str>, Name),
) {
    for object in objects {
        if let Some(entries) = index.get_mut(object) {
            entries.remove(entry);
            if entries.is_empty() {
                index.remove(object);
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

/// Whether a resource says where an address leads.
fn leads_somewhere((kind, _): &Name) -> bool {
    matches!(ResourceType::try_from(*kind), Ok(ResourceType::Destination | ResourceType::Route))
}

fn is_of(stamp: &Stamp, kind: stamp::Kind, key: &Key) -> bool {
    stamp.kind() == kind && *stamp.namespace == *key.0 && *stamp.name == *key.1
}

/// The feature that a sidecar of an earlier version lacks which does not subscribe to a section.
fn feature_of(section: ResourceType) -> Option<&'static str> {
    match section {
        ResourceType::Limits => Some(LIMITS_V1),
        ResourceType::Logs => Some(LOGS_V1),
        _ => None,
    }
}

/// What there is to do about such a sidecar.
fn unaware_of(section: &str) -> String {
    format!(
        "its sidecar is of an earlier version, which does not know section {section}: restart the pod to update its sidecar"
    )
}

fn name_of(pod: &Pod) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

#[cfg(test)]
mod tests;
