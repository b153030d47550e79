//! Resources, compiled once for all who subscribe to them. A change marks what depends on it as stale and wakes
//! its subscribers and nobody else; the first of them that asks compiles it, for all.
//!
//! Locks: the model may be locked when the cache is, never the other way round. Nothing is compiled while the
//! cache is locked.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tulle_mesh::proto::{Resource, ResourceType};

use super::report::{Name, Stamps, endpoints_name, resource_name};
use crate::model::{Compiled, Dependency, EndpointsName, Key, Touched, Variant};
use crate::watch::Hub;

/// A resource for a kind of clients.
pub type Id = (Name, Variant);

/// A compiled resource, as all its subscribers share it.
pub struct Shared {
    /// With its version.
    pub resource: Arc<Resource>,
    /// Its stamps, to be handed on.
    pub stamps: Stamps,
    /// Namespace and name of the Service that requests to it are counted for.
    pub counted_as: Option<(String, String)>,
    depends: Dependency,
    /// Of a route: the endpoints that it leads to, in order and each once. Sessions share the names.
    pub leads_to: Box<[Name]>,
}

impl Shared {
    /// The version of the resource.
    pub fn version(&self) -> &str {
        &self.resource.version
    }
}

/// What the cache indexes by.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Origin {
    Inbound(Arc<str>),
    Service(Key),
    Address(IpAddr),
}

/// All resources that somebody subscribes to.
#[derive(Default)]
pub struct Cache {
    inner: Mutex<Inner>,
    sessions: AtomicU64,
    compilations: AtomicU64,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<Id, Entry>,
    by_origin: HashMap<Origin, HashSet<Id>>,
    /// Counts up with every change of the model.
    touches: u64,
}

#[derive(Default)]
struct Entry {
    compiled: Option<Arc<Shared>>,
    /// Counts up with every change of what it depends on.
    changes: u64,
    /// The change that `compiled` is as of.
    as_of: Option<u64>,
    origins: Vec<Origin>,
    subscribers: HashMap<u64, Arc<Wake>>,
    /// One session compiles the resource; the others wait for the result.
    compile_lock: CompileLock,
}

/// Held while a resource is compiled.
type CompileLock = Arc<Mutex<()>>;

/// What a session has to look at again.
#[derive(Default)]
pub struct Wake {
    session: u64,
    /// Of the sidecar's pod. Empty: it is not known.
    namespace: Arc<str>,
    dirty: Mutex<Dirty>,
    notify: Notify,
}

/// Names that may have changed.
#[derive(Debug, Default)]
pub struct Dirty {
    /// Of resources.
    pub names: HashSet<Name>,
    /// A pod has begun to end: it is not waited for more changes.
    pub ending: bool,
}

impl Wake {
    /// The number of the session: a later one has a higher number.
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Waits until something may have changed.
    pub async fn changed(&self) {
        self.notify.notified().await;
    }

    /// Whether a pod has begun to end since the last [`Self::take`].
    pub fn is_ending(&self) -> bool {
        lock(&self.dirty).ending
    }

    /// What may have changed since the last time.
    pub fn take(&self) -> Dirty {
        std::mem::take(&mut *lock(&self.dirty))
    }

    fn mark(&self, name: &Name, ending: bool) {
        let mut dirty = lock(&self.dirty);
        let wakes = dirty.names.is_empty() || (ending && !dirty.ending);
        dirty.names.insert(name.clone());
        dirty.ending |= ending;
        if wakes {
            self.notify.notify_one();
        }
    }
}

impl Cache {
    /// A cache that follows a hub.
    pub fn following(hub: &Hub) -> Arc<Self> {
        let cache = Arc::new(Self::default());
        let follows = Arc::downgrade(&cache);
        hub.listen(Box::new(move |touched| match follows.upgrade() {
            Some(cache) => {
                cache.touch(touched);
                true
            }
            None => false,
        }));
        cache
    }

    /// What a new session of a sidecar in this namespace is woken by.
    pub fn wake(&self, namespace: Arc<str>) -> Arc<Wake> {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        Arc::new(Wake { session, namespace, ..Wake::default() })
    }

    /// A session wants to be woken when this changes.
    pub fn subscribe(&self, id: &Id, wake: &Arc<Wake>) {
        let mut inner = lock(&self.inner);
        let is_new = !inner.entries.contains_key(id);
        let entry = inner.entries.entry(id.clone()).or_default();
        entry.subscribers.insert(wake.session, Arc::clone(wake));
        if is_new {
            // Before it is compiled: no change in between is missed.
            inner.set_origins(id, by_name(&id.0).into_iter().collect());
        }
    }

    /// A session does not want this any more. What nobody wants is forgotten.
    pub fn unsubscribe(&self, id: &Id, wake: &Wake) {
        let mut inner = lock(&self.inner);
        let Some(entry) = inner.entries.get_mut(id) else { return };
        entry.subscribers.remove(&wake.session);
        if entry.subscribers.is_empty() {
            inner.set_origins(id, Vec::new());
            inner.entries.remove(id);
        }
    }

    /// A resource that somebody subscribes to, as of now.
    pub fn get(&self, hub: &Hub, id: &Id) -> Option<Arc<Shared>> {
        let compile_lock = match lock(&self.inner).current(id) {
            Ok(current) => return current,
            Err(None) => return None,
            Err(Some(lock)) => lock,
        };
        let _compiling = lock(&compile_lock);
        // Another session may have compiled it meanwhile.
        let (as_of, touches) = {
            let inner = lock(&self.inner);
            match inner.current(id) {
                Ok(current) => return current,
                Err(_) => (inner.entries.get(id)?.changes, inner.touches),
            }
        };
        let compiled = hub.model().compile(&resource_name(&id.0), &id.1);
        self.compilations.fetch_add(1, Ordering::Relaxed);
        let compiled = compiled.map(|compiled| {
            let leads_to = compiled.endpoints().into_iter().map(endpoints_name).collect();
            let Compiled { resource, stamps, counted_as, depends } = compiled;
            let (resource, stamps) = (Arc::new(resource), stamps.into());
            Arc::new(Shared { resource, stamps, counted_as, depends, leads_to })
        });
        let mut inner = lock(&self.inner);
        let mut origins: Vec<_> = by_name(&id.0).into_iter().collect();
        origins.extend(compiled.as_ref().map(|compiled| origin(&compiled.depends)));
        origins.dedup();
        let touched_meanwhile = inner.touches != touches;
        if let Some(entry) = inner.entries.get_mut(id) {
            entry.compiled.clone_from(&compiled);
            entry.as_of = Some(as_of);
            if entry.origins != origins {
                // What it depends on from now on may have changed while it was compiled.
                if touched_meanwhile {
                    entry.stale(id, false);
                }
                inner.set_origins(id, origins);
            }
        }
        compiled
    }

    /// How many resources are kept.
    pub fn len(&self) -> usize {
        lock(&self.inner).entries.len()
    }

    /// Whether nobody subscribes to anything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How often a resource was compiled.
    pub fn compilations(&self) -> u64 {
        self.compilations.load(Ordering::Relaxed)
    }

    /// Marks what depends on this as stale, and wakes who subscribes to it.
    pub fn touch(&self, touched: &Touched) {
        let mut inner = lock(&self.inner);
        let Inner { entries, by_origin, touches } = &mut *inner;
        *touches += 1;
        if touched.everything {
            entries.iter_mut().for_each(|(id, entry)| entry.stale(id, touched.ending));
            return;
        }
        let inbound = touched.inbound.iter().cloned().map(Origin::Inbound);
        let services = touched.services.iter().cloned().map(Origin::Service);
        let addresses = touched.addresses.iter().copied().map(Origin::Address);
        for origin in inbound.chain(services).chain(addresses) {
            for id in by_origin.get(&origin).into_iter().flatten() {
                if let Some(entry) = entries.get_mut(id) {
                    entry.stale(id, touched.ending);
                }
            }
        }
        for (ip, namespace) in &touched.consumers {
            for id in by_origin.get(&Origin::Address(*ip)).into_iter().flatten() {
                let Some(entry) = entries.get_mut(id) else { continue };
                match &id.1 {
                    Variant::Namespace(of) if of == namespace => entry.stale(id, touched.ending),
                    // The same as before, but the clients of that namespace may get a variant of their own now.
                    Variant::Any => entry.wake_those_in(id, namespace, touched.ending),
                    Variant::Namespace(_) | Variant::Node(_) => {}
                }
            }
        }
    }
}

impl Inner {
    /// The resource if it is current, or else the lock under which it is compiled. `Err(None)`: it has no subscribers.
    fn current(&self, id: &Id) -> Result<Option<Arc<Shared>>, Option<CompileLock>> {
        match self.entries.get(id) {
            Some(entry) if entry.as_of == Some(entry.changes) => Ok(entry.compiled.clone()),
            Some(entry) => Err(Some(Arc::clone(&entry.compile_lock))),
            None => Err(None),
        }
    }

    fn set_origins(&mut self, id: &Id, origins: Vec<Origin>) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        for origin in std::mem::replace(&mut entry.origins, origins.clone()) {
            if let Some(ids) = self.by_origin.get_mut(&origin) {
                ids.remove(id);
                if ids.is_empty() {
                    self.by_origin.remove(&origin);
                }
            }
        }
        for origin in origins {
            self.by_origin.entry(origin).or_default().insert(id.clone());
        }
    }
}

impl Entry {
    fn stale(&mut self, (name, _): &Id, ending: bool) {
        self.changes += 1;
        self.subscribers.values().for_each(|wake| wake.mark(name, ending));
    }

    fn wake_those_in(&self, (name, _): &Id, namespace: &Arc<str>, ending: bool) {
        let is_there = |wake: &&Arc<Wake>| wake.namespace.is_empty() || wake.namespace == *namespace;
        self.subscribers.values().filter(is_there).for_each(|wake| wake.mark(name, ending));
    }
}

/// What a resource depends on by its name alone: a Service may come to an address that had none.
fn by_name((kind, name): &Name) -> Option<Origin> {
    match ResourceType::try_from(*kind).ok()? {
        ResourceType::Inbound
        | ResourceType::Workload
        | ResourceType::Mtls
        | ResourceType::Access
        | ResourceType::Limits
        | ResourceType::Logs => Some(Origin::Inbound(Arc::clone(name))),
        ResourceType::Destination | ResourceType::Route => {
            let address: SocketAddr = name.parse().ok()?;
            Some(Origin::Address(address.ip()))
        }
        ResourceType::Endpoints => {
            let endpoints: EndpointsName = name.parse().ok()?;
            Some(Origin::Service(endpoints.service))
        }
        ResourceType::Unspecified => None,
    }
}

fn origin(depends: &Dependency) -> Origin {
    match depends {
        Dependency::Inbound(uid) => Origin::Inbound(Arc::clone(uid)),
        Dependency::Service(key) => Origin::Service(key.clone()),
        Dependency::Address(ip) => Origin::Address(*ip),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{key, pod, shop};

    const WEB: &str = "10.96.0.1:80";

    fn id(name: &str) -> Id {
        ((ResourceType::Destination as i32, name.into()), Variant::default())
    }

    fn hub() -> Hub {
        Hub::complete(shop(&[pod("a", "10.1.0.1", "r1")]))
    }

    fn touched(service: &str) -> Touched {
        Touched { services: [key("shop", service)].into(), ..Touched::default() }
    }

    #[test]
    fn a_resource_is_compiled_once_for_a_hundred_subscribers() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let wakes: Vec<_> = (0..100).map(|_| cache.wake("shop".into())).collect();
        for round in 1..=2 {
            for wake in &wakes {
                cache.subscribe(&id(WEB), wake);
                assert!(cache.get(&hub, &id(WEB)).is_some());
            }
            assert_eq!(cache.compilations(), round);
            cache.touch(&touched("web"));
        }
        for wake in &wakes {
            cache.unsubscribe(&id(WEB), wake);
        }
        assert!(cache.is_empty() && lock(&cache.inner).by_origin.is_empty(), "nobody subscribes any more");
    }

    #[test]
    fn a_change_wakes_those_who_subscribe_to_what_it_touches_and_nobody_else() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let (user, other) = (cache.wake("shop".into()), cache.wake("shop".into()));
        for (wake, name) in [(&user, WEB), (&other, "10.9.9.9:80")] {
            cache.subscribe(&id(name), wake);
            cache.get(&hub, &id(name));
        }
        cache.touch(&touched("web"));
        assert_eq!(user.take().names, [id(WEB).0].into());
        assert!(other.take().names.is_empty());
        cache.touch(&touched("else"));
        assert!(user.take().names.is_empty());
        cache.touch(&Touched { addresses: ["10.9.9.9".parse().unwrap()].into(), ..Touched::default() });
        assert!(user.take().names.is_empty());
        assert_eq!(other.take().names, [id("10.9.9.9:80").0].into());
        cache.touch(&Touched { everything: true, ..Touched::default() });
        assert!(!user.take().names.is_empty() && !other.take().names.is_empty());
    }

    #[test]
    fn a_route_of_one_namespace_compiles_and_wakes_nothing_of_others() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let of = |variant| -> Id { ((ResourceType::Route as i32, WEB.into()), variant) };
        let subscribe = |namespace: &str, variant: Variant| {
            let (wake, id) = (cache.wake(namespace.into()), of(variant));
            cache.subscribe(&id, &wake);
            cache.get(&hub, &id);
            wake
        };
        let (other, new) = (subscribe("shop", Variant::Any), subscribe("team", Variant::Any));
        let known = subscribe("team", Variant::Namespace("team".into()));
        let apart = subscribe("far", Variant::Namespace("far".into()));
        let compiled = cache.compilations();
        let consumers = [("10.96.0.1".parse().unwrap(), "team".into())].into();
        cache.touch(&Touched { consumers, ..Touched::default() });
        let woken = [&other, &new, &known, &apart].map(|wake| !wake.take().names.is_empty());
        assert_eq!(woken, [false, true, true, false]);
        for variant in [Variant::Any, Variant::Namespace("far".into())] {
            cache.get(&hub, &of(variant));
        }
        assert_eq!(cache.compilations(), compiled, "these are as they were");
        cache.get(&hub, &of(Variant::Namespace("team".into())));
        assert_eq!(cache.compilations(), compiled + 1);
    }

    #[test]
    fn an_end_is_told_apart() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let wake = cache.wake("shop".into());
        cache.subscribe(&id(WEB), &wake);
        cache.get(&hub, &id(WEB));
        cache.touch(&touched("web"));
        assert!(!wake.is_ending());
        cache.touch(&Touched { ending: true, ..touched("web") });
        assert!(wake.is_ending());
        assert!(wake.take().ending && !wake.is_ending());
    }

    #[test]
    fn a_change_of_endpoints_wakes_nobody_for_a_route_and_a_change_of_the_service_both() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let wake = cache.wake("shop".into());
        let route: Id = ((ResourceType::Route as i32, WEB.into()), Variant::default());
        let endpoints: Id = ((ResourceType::Endpoints as i32, "shop/web:80".into()), Variant::default());
        for id in [&route, &endpoints] {
            cache.subscribe(id, &wake);
            assert!(cache.get(&hub, id).is_some());
        }
        hub.change(|model| model.delete_slice(&key("shop", "web-1")));
        assert_eq!(wake.take().names, [endpoints.0.clone()].into());
        hub.change(|model| model.delete_service(&key("shop", "web")));
        assert_eq!(wake.take().names, [route.0, endpoints.0].into());
    }

    #[test]
    fn endpoints_of_a_service_that_comes_later_reach_who_subscribed_before() {
        let hub = Hub::complete(crate::model::Model::default());
        let cache = Cache::following(&hub);
        let wake = cache.wake("shop".into());
        let id: Id = ((ResourceType::Endpoints as i32, "shop/web:80".into()), Variant::default());
        cache.subscribe(&id, &wake);
        let before = cache.get(&hub, &id).unwrap();
        hub.change(|model| *model = shop(&[pod("a", "10.1.0.1", "r1")]));
        assert_eq!(wake.take().names, [id.0.clone()].into());
        assert_ne!(cache.get(&hub, &id).unwrap().version(), before.version());
    }

    #[test]
    fn a_change_of_the_model_reaches_who_subscribes() {
        let hub = hub();
        let cache = Cache::following(&hub);
        let wake = cache.wake("shop".into());
        cache.subscribe(&id(WEB), &wake);
        let before = cache.get(&hub, &id(WEB)).unwrap();
        hub.change(|model| model.delete_service(&key("shop", "web")));
        assert_eq!(wake.take().names, [id(WEB).0].into());
        assert_ne!(cache.get(&hub, &id(WEB)).unwrap().version(), before.version());
    }
}
