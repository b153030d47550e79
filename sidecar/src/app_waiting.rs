//! Who waits for the pod's own application on a connection of its own.
//!
//! An application that serves one connection at a time does not take a new one while a kept one lies idle. Whoever
//! opens a fresh connection (a request, a probe) holds a [`Guard`] until it is answered; the data threads look for
//! waits that take long, and close what they keep. Shared by all threads of the process.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Who waits for the pod's own application.
#[derive(Debug, Default)]
pub struct AppWaiting {
    /// Locked when a connection is opened and when it is answered, never by a request on a kept connection.
    waits: Mutex<Waits>,
    begun: Notify,
    /// Whether [`Waits::starved`] holds anything: read after every request.
    is_any_starved: AtomicBool,
}

#[derive(Debug, Default)]
struct Waits {
    next: u64,
    /// Since when, and for which port, if that is known. Numbers ascend, so the first is the oldest.
    since: BTreeMap<u64, (Instant, Option<u16>)>,
    /// Ports whose application does not accept what waits for it.
    starved: Vec<u16>,
}

/// One wait; it ends when this is dropped.
#[derive(Debug)]
pub struct Guard {
    waiting: Arc<AppWaiting>,
    number: u64,
}

impl AppWaiting {
    /// A connection to the application is about to be opened. To be dropped with the first byte of the answer.
    pub fn begin(self: &Arc<Self>) -> Guard {
        self.begin_at(None)
    }

    /// The same, for one port.
    pub fn begin_at(self: &Arc<Self>, port: Option<u16>) -> Guard {
        let mut waits = self.waits();
        let number = waits.next;
        waits.next += 1;
        let is_first = waits.since.is_empty();
        waits.since.insert(number, (Instant::now(), port));
        drop(waits);
        if is_first {
            self.begun.notify_waiters();
        }
        Guard { waiting: Arc::clone(self), number }
    }

    /// Resolves when somebody waits.
    pub async fn begun(&self) {
        loop {
            let mut begun = pin!(self.begun.notified());
            // Asked for before looking, so that nobody who comes in between is missed.
            begun.as_mut().enable();
            if self.longest().is_some() {
                return;
            }
            begun.await;
        }
    }

    /// How long the one who has waited longest has; `None`: nobody waits.
    pub fn longest(&self) -> Option<Duration> {
        self.waits().since.first_key_value().map(|(_, (since, _))| since.elapsed())
    }

    /// The same among those from this number on ([`Self::first_shorter_than`]).
    pub fn longest_from(&self, number: u64) -> Option<Duration> {
        self.waits().since.range(number..).next().map(|(_, (since, _))| since.elapsed())
    }

    /// The number of the first who has waited for less than `long`; if there is none, that of the next to come.
    pub fn first_shorter_than(&self, long: Duration) -> u64 {
        let waits = self.waits();
        let shorter = waits.since.iter().find(|(_, (since, _))| since.elapsed() < long);
        shorter.map_or(waits.next, |(number, _)| *number)
    }

    /// The ports for which somebody has waited for so long, as far as they are known.
    pub fn ports_waited_for(&self, long: Duration) -> Vec<u16> {
        let waits = self.waits();
        let late = waits.since.values().take_while(|(since, _)| since.elapsed() >= long);
        let mut ports: Vec<u16> = late.filter_map(|(_, port)| *port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    }

    /// Whether the application behind a port does not accept what waits for it: nothing is kept open to it.
    pub fn is_starved(&self, port: u16) -> bool {
        self.is_any_starved.load(Ordering::Relaxed) && self.waits().starved.contains(&port)
    }

    /// The ports of which [`Self::is_starved`] is so from now on.
    pub fn set_starved(&self, ports: Vec<u16>) {
        self.is_any_starved.store(!ports.is_empty(), Ordering::Relaxed);
        self.waits().starved = ports;
    }

    fn waits(&self) -> std::sync::MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.waiting.waits().since.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_as_long_as_its_guard() {
        let waiting = Arc::new(AppWaiting::default());
        assert_eq!(waiting.longest(), None);
        let (first, second) = (waiting.begin_at(Some(80)), waiting.begin());
        assert!(waiting.longest().is_some());
        assert_eq!(waiting.ports_waited_for(Duration::ZERO), [80_u16]);
        assert!(waiting.ports_waited_for(Duration::from_secs(60)).is_empty());
        drop(first);
        assert!(waiting.ports_waited_for(Duration::ZERO).is_empty());
        assert!(waiting.longest().is_some());
        drop(second);
        assert_eq!(waiting.longest(), None);
    }

    #[test]
    fn those_who_began_later_are_told_apart_from_those_who_have_waited_long() {
        let waiting = Arc::new(AppWaiting::default());
        let _long = waiting.begin();
        std::thread::sleep(Duration::from_millis(50));
        let later = waiting.first_shorter_than(Duration::from_millis(50));
        assert_eq!(waiting.longest_from(later), None);
        let short = waiting.begin();
        assert_eq!(waiting.first_shorter_than(Duration::from_secs(60)), 0);
        assert!(waiting.longest_from(later) < waiting.longest_from(0));
        drop(short);
        assert_eq!(waiting.longest_from(later), None);
        assert!(waiting.longest().is_some());
    }

    #[test]
    fn only_starved_ports_are_starved() {
        let waiting = AppWaiting::default();
        assert!(!waiting.is_starved(80));
        waiting.set_starved(vec![80]);
        assert!(waiting.is_starved(80));
        assert!(!waiting.is_starved(81));
        waiting.set_starved(Vec::new());
        assert!(!waiting.is_starved(80));
    }

    #[tokio::test]
    async fn a_wait_of_another_thread_is_noticed() {
        let waiting = Arc::new(AppWaiting::default());
        let other = Arc::clone(&waiting);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            other.begin()
        });
        tokio::time::timeout(Duration::from_secs(5), waiting.begun()).await.expect("nobody noticed");
        drop(thread.join().unwrap());
        assert_eq!(waiting.longest(), None);
    }
}
