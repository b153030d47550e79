//! What this sidecar knows: what it enforces on connections that arrive, and where the addresses lead that its
//! application dials, subscribed on first use and forgotten when nobody has used them for a while.

use std::collections::HashSet;
use std::future::pending;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tulle_mesh::proto::{ResourceName, ResourceType};
use tulle_mesh::resources::Described;
use tulle_mesh::trace::Share;

use super::accepted::AcceptedResources;
use super::endpoints::Endpoints;
use super::entry::{Destination, Entry};
use super::logs::{AccessLog, CurrentAccessLog};
use super::resource::{Inbound, Place, Resource, Route, Workload};
use super::sections::{Section, Sections};
pub use super::table::{Name, Wanted};
use super::table::{Table, Ticket};
use super::traces::Tracing;

/// How long a connection to a new address waits for the operator's answer before it passes through.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// A passthrough connection whose address was forgotten before there was an answer asks again after this long: not at
/// once, because it was forgotten for want of room.
const ASK_AGAIN: Duration = Duration::from_secs(60);
/// How long a route waits for endpoints that it names. The operator sends them first: what has not come by then most
/// likely does not.
const ENDPOINTS_COME_WITHIN: Duration = Duration::from_secs(1);

/// What this sidecar knows.
#[derive(Debug)]
pub struct ConfigStore {
    table: Mutex<Table>,
    sections: Mutex<Sections>,
    inbound: ArcSwapOption<Inbound>,
    inbound_known: watch::Sender<bool>,
    place: ArcSwap<Place>,
    tracing: ArcSwapOption<Tracing>,
    access_log: CurrentAccessLog,
    accepted: AcceptedResources,
    connected: AtomicBool,
    wanted: mpsc::UnboundedSender<Wanted>,
    /// For what ends a wait.
    this: Weak<Self>,
}

/// An address that is used, and what is known of it.
#[derive(Debug)]
pub struct Known {
    /// The address as it was dialled.
    pub address: SocketAddr,
    /// Where it leads; `None`: not known yet.
    pub destination: Option<Arc<Destination>>,
    /// Who serves it, where it is a Service's.
    pub endpoints: Option<Arc<Endpoints>>,
}

impl ConfigStore {
    /// An empty store, and the requests that its client must see to.
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Wanted>) {
        let (wanted, requests) = mpsc::unbounded_channel();
        let store = Arc::new_cyclic(|this| Self {
            table: Mutex::default(),
            sections: Mutex::default(),
            inbound: ArcSwapOption::empty(),
            inbound_known: watch::channel(false).0,
            place: ArcSwap::default(),
            tracing: ArcSwapOption::empty(),
            access_log: CurrentAccessLog::default(),
            accepted: AcceptedResources::default(),
            connected: AtomicBool::new(false),
            wanted,
            this: Weak::clone(this),
        });
        (store, requests)
    }

    /// Where this pod runs.
    pub fn place(&self) -> Arc<Place> {
        self.place.load_full()
    }

    /// Where spans go; `None`: none are made.
    pub fn tracing(&self) -> Option<Arc<Tracing>> {
        self.tracing.load_full()
    }

    /// How many requests without a parent become traces; `None`: no spans are made. Costs one atomic load where that is
    /// so, and counts no reference.
    pub fn trace_share(&self) -> Option<Share> {
        self.tracing.load().as_ref().map(|tracing| tracing.share)
    }

    /// Which requests at this pod are logged. Costs one atomic load.
    pub fn access_log(&self) -> AccessLog {
        self.access_log.load()
    }

    /// What is enforced on connections that arrive; `None` until the operator has answered every section.
    pub fn inbound(&self) -> Option<Arc<Inbound>> {
        self.inbound.load_full()
    }

    /// Swaps in what is enforced on connections that arrive.
    pub fn set_inbound(&self, inbound: Inbound) {
        self.inbound.store(Some(Arc::new(inbound)));
        self.inbound_known.send_replace(true);
    }

    /// Waits until the operator has answered what is enforced, be it with sections that this sidecar refused.
    pub async fn inbound_known(&self) {
        let mut known = self.inbound_known.subscribe();
        let _ = known.wait_for(|known| *known).await;
    }

    /// Waits until what is enforced is so.
    pub async fn inbound_becomes(&self, so: impl Fn(&Inbound) -> bool) {
        let mut changed = self.inbound_known.subscribe();
        while !self.inbound().is_some_and(|inbound| so(&inbound)) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Takes over a resource.
    pub fn apply(&self, resource: Resource) {
        match resource {
            Resource::Workload(Workload { revision, place, tracing }) => {
                self.place.store(Arc::new(place));
                self.tracing.store(tracing);
                self.section(|all| all.revision = Section::Good(revision));
            }
            Resource::Mtls(mtls) => self.section(|all| all.mtls = Section::Good(mtls)),
            Resource::Access(access) => self.section(|all| all.access = Section::Good(access)),
            Resource::Limits(limits) => self.section(|all| all.limits = Section::Good(limits)),
            Resource::Logs(access_log) => self.access_log.store(access_log),
            Resource::Route(address, route) => self.set_route(address, route),
            Resource::Endpoints(name, endpoints) => self.set_endpoints(&name, endpoints),
        }
    }

    /// A resource of this name was refused: the last good one stays. Without one the sidecar fails closed, or, of where an
    /// address leads, uses what it can (`usable`).
    pub fn refuse(&self, name: &ResourceName, usable: Option<Route>) {
        match name.r#type() {
            ResourceType::Workload => self.section(|all| all.revision.refuse()),
            ResourceType::Mtls => self.section(|all| all.mtls.refuse()),
            ResourceType::Access => self.section(|all| all.access.refuse()),
            ResourceType::Limits => self.section(|all| all.limits.refuse()),
            ResourceType::Route => {
                if let Ok(address) = name.name.parse() {
                    let waits = self.change(|table| table.refuse_route(address, usable));
                    self.end_wait_later(address, waits);
                }
            }
            // The last good one of logs stays, too; without one nothing is logged.
            _ => {}
        }
    }

    fn section(&self, change: impl FnOnce(&mut Sections)) {
        let mut sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut sections);
        if let Some(inbound) = sections.compose() {
            self.set_inbound(inbound);
        }
    }

    /// Whether the discovery stream is up.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Release);
    }

    /// Whether the discovery stream is up.
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Acquire)
    }

    /// The entry of an address; the first use subscribes and waits for the operator's answer. While
    /// the operator is away an address that was never used before has no answer.
    pub async fn resolve(&self, address: SocketAddr) -> Arc<Entry> {
        let entry = self.change(|table| table.entry(address));
        if !entry.is_answered() && self.is_connected() {
            let _ = timeout(ANSWER_TIMEOUT, entry.answered()).await;
        }
        entry
    }

    /// For a connection that passes through because there was no answer yet: resolves when the answer is that a
    /// sidecar listens there. With any other answer it never resolves, because it was right to pass through.
    pub async fn becomes_meshed(&self, address: SocketAddr, entry: Arc<Entry>) {
        let mut entry = entry;
        loop {
            let changed = entry.changed();
            match entry.current().map(|destination| destination.is_meshed()) {
                Some(true) => return,
                Some(false) => pending().await,
                None if entry.is_gone() => {
                    sleep(ASK_AGAIN).await;
                    entry = self.change(|table| table.entry(address));
                }
                None => changed.await,
            }
        }
    }

    /// Swaps in where an address leads; in force once all its endpoints are known, or a second later.
    pub fn set_route(&self, address: SocketAddr, route: Route) {
        let waits = self.change(|table| table.set_route(address, route));
        self.end_wait_later(address, waits);
    }

    fn end_wait_later(&self, address: SocketAddr, waits: Option<Ticket>) {
        let (Some(ticket), Ok(runtime)) = (waits, Handle::try_current()) else { return };
        let store = Weak::clone(&self.this);
        runtime.spawn(async move {
            sleep(ENDPOINTS_COME_WITHIN).await;
            if let Some(store) = store.upgrade() {
                store.change(|table| table.wait_no_longer(address, ticket));
            }
        });
    }

    /// Swaps in who serves what routes name so.
    pub fn set_endpoints(&self, name: &Arc<str>, endpoints: Endpoints) {
        self.change(|table| table.set_endpoints(name, endpoints));
    }

    /// Everything that is subscribed to beside the pod's own sections.
    pub fn subscribed(&self) -> Vec<Name> {
        self.table().subscribed()
    }

    /// Whether a good version of this is here.
    pub fn holds(&self, name: &Name) -> bool {
        self.table().holds(name)
    }

    /// Forgets what has not been used since the last call.
    pub fn forget_idle(&self) {
        self.change(Table::forget_idle);
    }

    /// The versions of the resources that are in force.
    pub fn accepted(&self) -> &AcceptedResources {
        &self.accepted
    }

    /// The resources that are in force, with the contents of those that are `asked` for.
    pub fn described(&self, asked: &HashSet<&str>) -> Vec<Described> {
        self.accepted.described(asked, |name| {
            // The table is not locked while they are copied: connections wait for it.
            let entry = self.table().endpoints(name)?;
            Some(entry.current().to_proto())
        })
    }

    /// Everything that is known, for `/config`.
    pub fn snapshot(&self) -> Vec<Known> {
        let table = self.table();
        let known = table.entries().map(|(address, entry)| {
            let destination = entry.peek();
            let endpoints = destination.as_ref().and_then(|destination| destination.endpoints());
            Known { address, destination, endpoints }
        });
        known.collect()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without a stream nobody takes wishes: the next one begins with everything that is subscribed.
    fn change<T>(&self, change: impl FnOnce(&mut Table) -> T) -> T {
        let mut table = self.table();
        let result = change(&mut table);
        let connected = self.is_connected();
        for wish in table.wishes.drain(..) {
            if connected {
                let _ = self.wanted.send(wish);
            }
        }
        result
    }
}
