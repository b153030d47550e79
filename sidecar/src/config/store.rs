//! Destinations by address: subscribed on first use, forgotten when nobody has used them for a while.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{mpsc, watch};

use super::{Destination, Inbound};

/// How long a connection to a new address waits for the operator's word before it passes through.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// A destination that somebody uses.
#[derive(Debug)]
pub struct Entry {
    current: ArcSwapOption<Destination>,
    answered: watch::Sender<bool>,
    used: AtomicBool,
    gone: AtomicBool,
}

impl Entry {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            current: ArcSwapOption::empty(),
            answered: watch::channel(false).0,
            used: AtomicBool::new(true),
            gone: AtomicBool::new(false),
        })
    }

    /// The last good state; `None` until the operator has answered.
    pub fn current(&self) -> Option<Arc<Destination>> {
        self.used.store(true, Ordering::Relaxed);
        self.current.load_full()
    }

    /// Whether the entry has been forgotten: it is not kept current any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

/// What the client is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Subscribe to an address.
    Subscribe(SocketAddr),
    /// Unsubscribe from it.
    Unsubscribe(SocketAddr),
}

/// What this sidecar knows.
#[derive(Debug)]
pub struct ConfigStore {
    destinations: Mutex<HashMap<SocketAddr, Arc<Entry>>>,
    inbound: ArcSwapOption<Inbound>,
    inbound_known: watch::Sender<bool>,
    connected: ArcSwap<bool>,
    wanted: mpsc::UnboundedSender<Wanted>,
}

impl ConfigStore {
    /// An empty store, and the requests that its client must see to.
    pub fn new() -> (Arc<Self>, mpsc::UnboundedReceiver<Wanted>) {
        let (wanted, requests) = mpsc::unbounded_channel();
        let store = Self {
            destinations: Mutex::default(),
            inbound: ArcSwapOption::empty(),
            inbound_known: watch::channel(false).0,
            connected: ArcSwap::from_pointee(false),
            wanted,
        };
        (Arc::new(store), requests)
    }

    /// What is enforced on connections that arrive.
    pub fn inbound(&self) -> Option<Arc<Inbound>> {
        self.inbound.load_full()
    }

    /// Swaps in what is enforced on connections that arrive.
    pub fn set_inbound(&self, inbound: Inbound) {
        self.inbound.store(Some(Arc::new(inbound)));
        self.inbound_known.send_replace(true);
    }

    /// Waits until the operator has said what is enforced.
    pub async fn inbound_known(&self) {
        let mut known = self.inbound_known.subscribe();
        let _ = known.wait_for(|known| *known).await;
    }

    /// Waits until what the operator says is so.
    pub async fn inbound_becomes(&self, so: impl Fn(&Inbound) -> bool) {
        let mut changed = self.inbound_known.subscribe();
        while !self.inbound().is_some_and(|inbound| so(&inbound)) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether the discovery stream is up.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(Arc::new(connected));
    }

    /// Whether the discovery stream is up.
    pub fn is_connected(&self) -> bool {
        **self.connected.load()
    }

    /// The entry of an address; the first use subscribes and waits for the operator's answer. While
    /// the operator is away an address that was never used before has no answer.
    pub async fn resolve(&self, address: SocketAddr) -> Arc<Entry> {
        let entry = {
            let mut destinations = self.destinations.lock().unwrap_or_else(PoisonError::into_inner);
            match destinations.get(&address) {
                Some(entry) => Arc::clone(entry),
                None => {
                    let entry = Entry::new();
                    destinations.insert(address, Arc::clone(&entry));
                    self.want(Wanted::Subscribe(address));
                    entry
                }
            }
        };
        if entry.current.load().is_none() && self.is_connected() {
            let mut answered = entry.answered.subscribe();
            let _ = tokio::time::timeout(ANSWER_TIMEOUT, answered.wait_for(|answered| *answered)).await;
        }
        entry
    }

    /// Without a stream nobody takes wishes: the next one begins with everything that is subscribed.
    fn want(&self, wanted: Wanted) {
        if self.is_connected() {
            let _ = self.wanted.send(wanted);
        }
    }

    /// Swaps in what the operator says of an address.
    pub fn set_destination(&self, address: SocketAddr, destination: Destination) {
        let destinations = self.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = destinations.get(&address) {
            entry.current.store(Some(Arc::new(destination)));
            entry.answered.send_replace(true);
        }
    }

    /// The addresses that are subscribed.
    pub fn subscribed(&self) -> Vec<SocketAddr> {
        self.destinations.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
    }

    /// The addresses of which something is known.
    pub fn known(&self) -> Vec<SocketAddr> {
        let destinations = self.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        let known = destinations.iter().filter(|(_, entry)| entry.current.load().is_some());
        known.map(|(address, _)| *address).collect()
    }

    /// Forgets what has not been used since the last call.
    pub fn forget_idle(&self) {
        let mut destinations = self.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        destinations.retain(|address, entry| {
            let used = entry.used.swap(false, Ordering::Relaxed);
            if !used {
                entry.gone.store(true, Ordering::Release);
                self.want(Wanted::Unsubscribe(*address));
            }
            used
        });
    }

    /// Everything that is known, for `/config`.
    pub fn snapshot(&self) -> Vec<(SocketAddr, Option<Arc<Destination>>)> {
        let destinations = self.destinations.lock().unwrap_or_else(PoisonError::into_inner);
        destinations.iter().map(|(address, entry)| (*address, entry.current.load_full())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_is_asked_for_once_and_forgotten_when_idle() {
        let (store, mut wanted) = ConfigStore::new();
        store.set_connected(true);
        let address = "10.96.0.1:80".parse().unwrap();
        let entry = store.resolve(address).await;
        store.resolve(address).await;
        assert_eq!(wanted.try_recv(), Ok(Wanted::Subscribe(address)));
        assert!(wanted.try_recv().is_err());
        store.forget_idle();
        assert!(!entry.is_gone());
        store.forget_idle();
        assert!(entry.is_gone());
        assert_eq!(wanted.try_recv(), Ok(Wanted::Unsubscribe(address)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_address_does_not_wait_while_the_operator_is_away() {
        let (store, _wanted) = ConfigStore::new();
        let before = tokio::time::Instant::now();
        assert!(store.resolve("10.96.0.1:80".parse().unwrap()).await.current().is_none());
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
