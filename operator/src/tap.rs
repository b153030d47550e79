//! Single requests, shown to somebody who looks: which sidecars of this replica show theirs, and to whom.
//!
//! In: sidecars that connect and leave, what they have seen ([`Tapped`]), and taps that the API starts. Out: `Tap` and
//! `Untap` to the sidecars that a tap wants, and what they have seen, to its reader. A slow reader holds up nobody:
//! requests that find no room are counted as lost. Filters run in the sidecars.
//!
//! ```text
//!   shown   what a sidecar has seen, as a line for the reader; pure
//! ```
//! Nothing here opens a connection or reads a clock.

pub mod shown;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prost::Message as _;
use tokio::sync::mpsc;
use tulle_mesh::proto::operator_message::Message;
use tulle_mesh::proto::{Tap, TapEvent, Tapped, Untap};
use tulle_mesh::tap::MAX_EVENTS;

use crate::bucket::Bucket;
use crate::telemetry::history::Reporter;

/// The name of the feature in a sidecar's hello.
pub const FEATURE: &str = "tap";
/// Taps at a time at this replica.
pub const MAX_TAPS: usize = 16;
/// Of these: taps of one caller. All who look at one namespace are one caller: its service account.
pub const MAX_OF_CALLER: usize = 8;
/// Sidecars that a tap looks at.
pub const MAX_SIDECARS: usize = 200;
/// Requests that wait for the reader of a tap: a second of 50 sidecars at the usual rate. Typically 500 bytes each, and 8 kB
/// where a sidecar makes all of them as long as it can.
const ROOM: usize = 1_000;
/// Messages about taps that are taken of a sidecar in a second, and at once. One with four taps that are all full sends
/// about 25.
const MESSAGES_PER_SECOND: f64 = 40.0;
/// The same at once.
const MESSAGES_AT_ONCE: f64 = 40.0;

/// Sends a message to a sidecar without waiting; `false`: there is no room for it now.
pub type Deliver = Box<dyn Fn(Message) -> bool + Send + Sync>;

/// The sidecar of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sidecar {
    /// The namespace of its pod.
    pub namespace: Arc<str>,
    /// The name of its pod.
    pub pod: Arc<str>,
    /// The workload of its pod.
    pub reporter: Reporter,
    /// Its build can show requests.
    pub is_able: bool,
}

/// Whose sidecars a tap looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Pods of this namespace; `None`: of all.
    pub namespace: Option<String>,
    /// Pods of this workload; `None`: of all.
    pub workload: Option<String>,
}

impl Wanted {
    fn holds(&self, sidecar: &Sidecar) -> bool {
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        is(&self.namespace, &sidecar.namespace) && is(&self.workload, &sidecar.reporter.workload)
    }
}

/// Why a tap does not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// This replica has enough.
    #[error("{} taps run at this replica of the operator, which is the most that it serves", MAX_TAPS)]
    Replica,
    /// The caller has enough.
    #[error("{} has {} taps at this replica of the operator, which is the most for one caller", .0, MAX_OF_CALLER)]
    Caller(String),
    /// It would look at too many sidecars.
    #[error("this tap would look at {} sidecars of this replica of the operator; the most is {}", .0, MAX_SIDECARS)]
    Sidecars(usize),
}

/// A request that a sidecar has seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Whose sidecar it was.
    pub sidecar: Arc<Sidecar>,
    /// The request.
    pub event: TapEvent,
}

/// How many requests there were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// That passed the filter.
    pub passed: u64,
    /// Of these: not shown.
    pub lost: u64,
}

impl Passed {
    fn add(&mut self, passed: u64, lost: u64) {
        self.passed = self.passed.saturating_add(passed);
        self.lost = self.lost.saturating_add(lost);
    }
}

/// The sidecars of this replica, and the taps that run.
#[derive(Default)]
pub struct Taps(Mutex<State>);

#[derive(Default)]
struct State {
    /// The number of the last stream or tap.
    last: u64,
    /// By the number of their stream: a pod that connects again has two for a while.
    sidecars: HashMap<u64, Connected>,
    taps: HashMap<u64, Running>,
}

struct Connected {
    sidecar: Arc<Sidecar>,
    deliver: Deliver,
    /// What it may still say at once.
    messages: Bucket,
}

/// A tap.
struct Running {
    caller: String,
    wanted: Wanted,
    message: Tap,
    /// The streams whose sidecars have been sent `message`, with what each may still show.
    streams: HashMap<u64, Bucket>,
    seen: mpsc::Sender<Seen>,
    passed: Passed,
}

impl Running {
    /// What a sidecar may show at once: one that keeps to the rate and sends every second or two is never cut.
    fn burst(&self) -> f64 {
        3.0 * f64::from(self.message.rate)
    }

    /// Sends the tap to a sidecar that it wants and that has not been sent it yet. One whose queue is full gets it the
    /// next time.
    fn attach(&mut self, stream: u64, connected: &Connected, now: Instant) {
        let sidecar = &connected.sidecar;
        let is_new = sidecar.is_able && self.wanted.holds(sidecar) && !self.streams.contains_key(&stream);
        if is_new
            && self.streams.len() < MAX_SIDECARS
            && (connected.deliver)(Message::Tap(self.message.clone()))
        {
            self.streams.insert(stream, Bucket::new(self.burst(), now));
        }
    }

    /// Takes what a sidecar has seen.
    fn take(&mut self, stream: u64, sidecar: &Arc<Sidecar>, tapped: Tapped, now: Instant) {
        let (rate, burst) = (f64::from(self.message.rate), self.burst());
        let Some(bucket) = self.streams.get_mut(&stream) else { return };
        let headers = &self.message.headers;
        let mut shown = 0;
        for event in tapped.events.iter().take(MAX_EVENTS) {
            // Before anything is done with it.
            if !bucket.take(rate, burst, now) {
                break;
            }
            let Ok(mut event) = TapEvent::decode(event.as_slice()) else { continue };
            shown::bound(&mut event, headers);
            let seen = Seen { sidecar: Arc::clone(sidecar), event };
            shown += usize::from(self.seen.try_send(seen).is_ok());
        }
        self.lose(&tapped, shown);
    }

    /// Counts a message of which so many requests are shown.
    fn lose(&mut self, tapped: &Tapped, shown: usize) {
        let unshown = u64::try_from(tapped.events.len().saturating_sub(shown)).unwrap_or(u64::MAX);
        self.passed.add(tapped.passed, tapped.lost.saturating_add(unshown));
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// The connected sidecars that a tap wants, whether they can show requests or not.
    fn wanted<'a>(&'a self, wanted: &'a Wanted) -> impl Iterator<Item = &'a Arc<Sidecar>> {
        let sidecars = self.sidecars.values().map(|connected| &connected.sidecar);
        sidecars.filter(move |sidecar| wanted.holds(sidecar))
    }
}

impl Taps {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sidecar has connected. It is sent the taps that want it, now and later, until the answer is dropped.
    pub fn register(self: &Arc<Self>, sidecar: Sidecar, deliver: Deliver, now: Instant) -> Registered {
        let mut state = self.state();
        let stream = state.number();
        let messages = Bucket::new(MESSAGES_AT_ONCE, now);
        let connected = Connected { sidecar: Arc::new(sidecar), deliver, messages };
        for tap in state.taps.values_mut() {
            tap.attach(stream, &connected, now);
        }
        state.sidecars.insert(stream, connected);
        drop(state);
        Registered { taps: Arc::clone(self), stream }
    }

    /// Starts a tap, whose `id` is set here. It runs until the answer is dropped.
    ///
    /// # Errors
    /// There are too many, or it would look at too many sidecars.
    pub fn start(
        self: &Arc<Self>,
        caller: &str,
        wanted: Wanted,
        message: Tap,
        now: Instant,
    ) -> Result<Tapping, Denied> {
        let mut state = self.state();
        if state.taps.len() >= MAX_TAPS {
            return Err(Denied::Replica);
        }
        if state.taps.values().filter(|tap| tap.caller == caller).count() >= MAX_OF_CALLER {
            return Err(Denied::Caller(caller.to_owned()));
        }
        let sidecars = state.wanted(&wanted).filter(|sidecar| sidecar.is_able).count();
        if sidecars > MAX_SIDECARS {
            return Err(Denied::Sidecars(sidecars));
        }
        let unable = state.wanted(&wanted).filter(|sidecar| !sidecar.is_able);
        let mut unable: Vec<String> = unable
            .take(MAX_SIDECARS)
            .map(|sidecar| format!("{}/{}", sidecar.namespace, sidecar.pod))
            .collect();
        unable.sort();
        unable.dedup();
        let id = state.number();
        let (seen, events) = mpsc::channel(ROOM);
        let headers = message.headers.clone();
        let mut running = Running {
            caller: caller.to_owned(),
            wanted,
            message: Tap { id, ..message },
            streams: HashMap::new(),
            seen,
            passed: Passed::default(),
        };
        for (stream, connected) in &state.sidecars {
            running.attach(*stream, connected, now);
        }
        state.taps.insert(id, running);
        drop(state);
        Ok(Tapping { taps: Arc::clone(self), id, sidecars, unable, headers, events })
    }
}

/// A connected sidecar, until this is dropped.
pub struct Registered {
    taps: Arc<Taps>,
    stream: u64,
}

impl Registered {
    /// The sidecar has seen requests. What it says of a tap that it was not sent, or that has ended, is dropped.
    pub fn tapped(&self, tapped: Tapped, now: Instant) {
        let mut state = self.taps.state();
        let State { sidecars, taps, .. } = &mut *state;
        let Some(connected) = sidecars.get_mut(&self.stream) else { return };
        let may_speak = connected.messages.take(MESSAGES_PER_SECOND, MESSAGES_AT_ONCE, now);
        match taps.get_mut(&tapped.id).filter(|tap| tap.streams.contains_key(&self.stream)) {
            Some(tap) if may_speak => tap.take(self.stream, &connected.sidecar, tapped, now),
            Some(tap) => tap.lose(&tapped, 0),
            None if !may_speak => {}
            // There was no room for the first, or it crosses this message: a second one does no harm.
            None => {
                (connected.deliver)(Message::Untap(Untap { id: tapped.id }));
            }
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut state = self.taps.state();
        for tap in state.taps.values_mut() {
            tap.streams.remove(&self.stream);
        }
        let gone = state.sidecars.remove(&self.stream);
        drop(state);
        drop(gone);
    }
}

/// A running tap, until this is dropped.
pub struct Tapping {
    taps: Arc<Taps>,
    id: u64,
    /// How many sidecars are to show their requests.
    pub sidecars: usize,
    /// Pods whose sidecars cannot, as `namespace/name`.
    pub unable: Vec<String>,
    /// Names of the headers that are shown.
    pub headers: Vec<String>,
    /// What they have seen.
    pub events: mpsc::Receiver<Seen>,
}

impl Tapping {
    /// Sends the tap to sidecars that had no room for it before.
    pub fn attach(&self, now: Instant) {
        let mut state = self.taps.state();
        let State { sidecars, taps, .. } = &mut *state;
        if let Some(tap) = taps.get_mut(&self.id) {
            for (stream, connected) in sidecars.iter() {
                tap.attach(*stream, connected, now);
            }
        }
    }

    /// How many requests there were since this was asked last.
    pub fn passed(&self) -> Passed {
        let mut state = self.taps.state();
        state.taps.get_mut(&self.id).map(|tap| std::mem::take(&mut tap.passed)).unwrap_or_default()
    }
}

impl Drop for Tapping {
    fn drop(&mut self) {
        let mut state = self.taps.state();
        let State { sidecars, taps, .. } = &mut *state;
        let Some(tap) = taps.remove(&self.id) else { return };
        for connected in tap.streams.keys().filter_map(|stream| sidecars.get(stream)) {
            (connected.deliver)(Message::Untap(Untap { id: self.id }));
        }
    }
}
