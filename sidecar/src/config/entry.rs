//! What is known of an address, and of the endpoints of a Service's port: swapped whole by the discovery client, read
//! by data threads without a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;

use super::endpoints::Endpoints;
use super::resource::{PodRoute, ServiceRoute};

/// Where an address leads, complete: a Service is here once its endpoints are known.
#[derive(Debug)]
pub enum Destination {
    /// Nobody in the cluster: passed through as it is.
    Unknown,
    /// A port of a Service.
    Service(Service),
    /// A pod's own address.
    Pod(PodRoute),
}

/// A port of a Service, and who serves it.
#[derive(Debug)]
pub struct Service {
    /// The Service and what is spoken there.
    pub route: ServiceRoute,
    /// Its endpoints, shared by all addresses that lead to them.
    pub endpoints: Arc<EndpointsEntry>,
    /// The Services that its rules name, as [`Rules::services`](super::Rules) numbers them.
    pub behind: Box<[Service]>,
}

impl Destination {
    /// Who serves a Service's port, as of now; `None` where it is not a Service's.
    pub fn endpoints(&self) -> Option<Arc<Endpoints>> {
        match self {
            Self::Service(service) => Some(service.endpoints.current()),
            Self::Unknown | Self::Pod(_) => None,
        }
    }

    /// Whether a sidecar listens there: it must not be sent plain text.
    pub fn is_meshed(&self) -> bool {
        match self {
            Self::Unknown => false,
            Self::Pod(pod) => pod.endpoint.identity.is_some(),
            Self::Service(service) => service.is_meshed() || service.behind.iter().any(Service::is_meshed),
        }
    }
}

impl Service {
    fn is_meshed(&self) -> bool {
        self.endpoints.current().endpoints.iter().any(|endpoint| endpoint.identity.is_some())
    }
}

/// Who serves a Service's port.
#[derive(Debug)]
pub struct EndpointsEntry {
    current: ArcSwap<Endpoints>,
}

impl EndpointsEntry {
    pub(super) fn new(endpoints: Endpoints) -> Arc<Self> {
        Arc::new(Self { current: ArcSwap::from_pointee(endpoints) })
    }

    pub(super) fn set(&self, endpoints: Endpoints) {
        self.current.store(Arc::new(endpoints));
    }

    /// The last state.
    pub fn current(&self) -> Arc<Endpoints> {
        self.current.load_full()
    }

    /// The last state, if it is another than this one.
    pub fn newer_than(&self, seen: Option<&Arc<Endpoints>>) -> Option<Arc<Endpoints>> {
        let current = self.current.load();
        if seen.is_some_and(|seen| Arc::ptr_eq(seen, &current)) { None } else { Some(Arc::clone(&current)) }
    }
}

/// An address that somebody uses.
#[derive(Debug)]
pub struct Entry {
    current: ArcSwapOption<Destination>,
    changes: watch::Sender<()>,
    /// Shared by all entries: counts up with time and with new entries.
    clock: Arc<AtomicU64>,
    /// The clock at the last use.
    used: AtomicU64,
    refused: AtomicBool,
    gone: AtomicBool,
}

impl Entry {
    pub(super) fn new(clock: &Arc<AtomicU64>) -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwapOption::empty(),
            changes: watch::channel(()).0,
            clock: Arc::clone(clock),
            used: AtomicU64::new(clock.load(Ordering::Relaxed)),
            refused: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// The last good state; `None` until the operator has answered.
    pub fn current(&self) -> Option<Arc<Destination>> {
        self.mark_used();
        self.current.load_full()
    }

    /// The same, without counting as a use.
    pub(super) fn peek(&self) -> Option<Arc<Destination>> {
        self.current.load_full()
    }

    /// The last good state, if there is one and it is another than this one.
    pub fn newer_than(&self, seen: Option<&Arc<Destination>>) -> Option<Arc<Destination>> {
        self.mark_used();
        let current = self.current.load();
        let current = current.as_ref()?;
        if seen.is_some_and(|seen| Arc::ptr_eq(seen, current)) { None } else { Some(Arc::clone(current)) }
    }

    /// Whether the entry has been forgotten: it is not kept current any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Resolves with the next change of the entry, or when it is forgotten. Changes count from this call on, not from
    /// when the future is first polled: ask first, then look.
    pub fn changed(&self) -> impl Future<Output = ()> + use<> {
        let mut changes = self.changes.subscribe();
        async move {
            // An entry that has been dropped has been forgotten.
            let _ = changes.changed().await;
        }
    }

    /// Resolves when the operator has answered, be it with something that this sidecar refused.
    pub(super) async fn answered(&self) {
        loop {
            let changed = self.changed();
            if self.is_answered() {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn is_answered(&self) -> bool {
        self.current.load().is_some() || self.refused.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, destination: Destination) {
        self.current.store(Some(Arc::new(destination)));
        self.refused.store(false, Ordering::Release);
        self.changes.send_replace(());
    }

    pub(super) fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
        self.changes.send_replace(());
    }

    pub(super) fn forget(&self) {
        self.gone.store(true, Ordering::Release);
        self.changes.send_replace(());
    }

    pub(super) fn last_used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn mark_used(&self) {
        let now = self.clock.load(Ordering::Relaxed);
        // Most requests find it marked, and leave the cache line to the other threads.
        if self.used.load(Ordering::Relaxed) != now {
            self.used.store(now, Ordering::Relaxed);
        }
    }
}
