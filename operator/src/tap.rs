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

use std::collections::{HashMap, HashSet};
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

/// How many requests there were, and whose are missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// That passed the filter.
    pub passed: u64,
    /// Of these: not shown.
    pub lost: u64,
    /// Sidecars that the tap wants and does not look at, because there are more than it may look at.
    pub not_shown: usize,
    /// Pods whose sidecars have refused the tap, as `namespace/name: why`.
    pub refused: Vec<String>,
}

impl Passed {
    fn count(&mut self, passed: u64, lost: u64) {
        self.passed = self.passed.saturating_add(passed);
        self.lost = self.lost.saturating_add(lost);
    }

    /// Adds what came later.
    pub fn add(&mut self, later: Self) {
        self.count(later.passed, later.lost);
        self.not_shown = later.not_shown;
        let room = MAX_SIDECARS.saturating_sub(self.refused.len());
        self.refused.extend(later.refused.into_iter().take(room));
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
    /// Taps that have ended, of which its sidecar could not be told: its queue was full.
    ended: Vec<u64>,
}

impl Connected {
    /// A tap that the sidecar was sent has ended.
    fn end(&mut self, id: u64) {
        self.ended.push(id);
        self.send_ends();
    }

    /// Sends the ends of taps that found no room before. Returns whether none is left. Until then the sidecar is sent no
    /// tap, so that there are never more of them than it has taps.
    fn send_ends(&mut self) -> bool {
        while let Some(id) = self.ended.last() {
            if !(self.deliver)(Message::Untap(Untap { id: *id })) {
                return false;
            }
            self.ended.pop();
        }
        true
    }
}

/// A tap.
struct Running {
    caller: String,
    wanted: Wanted,
    message: Tap,
    /// The streams whose sidecars have been sent `message`, with what each may still show.
    streams: HashMap<u64, Bucket>,
    /// The streams whose sidecars have refused it. They are not asked again.
    refused: HashSet<u64>,
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
    fn attach(&mut self, stream: u64, connected: &mut Connected, now: Instant) {
        let has_no_ends = connected.send_ends();
        let sidecar = &connected.sidecar;
        let is_known = self.streams.contains_key(&stream) || self.refused.contains(&stream);
        if is_known || !sidecar.is_able || !self.wanted.holds(sidecar) {
            return;
        }
        if self.streams.len() >= MAX_SIDECARS {
            self.passed.not_shown = self.passed.not_shown.saturating_add(1);
        } else if has_no_ends && (connected.deliver)(Message::Tap(self.message.clone())) {
            self.streams.insert(stream, Bucket::new(self.burst(), now));
        }
    }

    /// Sends the tap to all that have not been sent it yet, and counts those beyond what a tap looks at.
    fn attach_all(&mut self, sidecars: &mut HashMap<u64, Connected>, now: Instant) {
        self.passed.not_shown = 0;
        // Those that came first, where there are more than a tap looks at.
        let mut streams: Vec<u64> = sidecars.keys().copied().collect();
        streams.sort_unstable();
        for stream in streams {
            if let Some(connected) = sidecars.get_mut(&stream) {
                self.attach(stream, connected, now);
            }
        }
    }

    /// A sidecar does not show its requests for this tap.
    fn refuse(&mut self, stream: u64, sidecar: &Sidecar, mut why: String) {
        self.streams.remove(&stream);
        self.refused.insert(stream);
        if self.passed.refused.len() < MAX_SIDECARS {
            shown::cut_reason(&mut why);
            self.passed.refused.push(format!("{}/{}: {why}", sidecar.namespace, sidecar.pod));
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
        self.passed.count(tapped.passed, tapped.lost.saturating_add(unshown));
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
        let mut connected = Connected { sidecar: Arc::new(sidecar), deliver, messages, ended: Vec::new() };
        for tap in state.taps.values_mut() {
            tap.attach(stream, &mut connected, now);
        }
        state.sidecars.insert(stream, connected);
        drop(state);
        Registered { taps: Arc::clone(self), stream }
    }

    /// Starts a tap, whose `id` is set here. It runs until the answer is dropped.
    ///
    /// # Errors
    /// There are too many, or it would look at too many sidecars and names no workload. Of a workload with more pods than a
    /// tap looks at, those whose sidecars connected first are shown.
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
        if sidecars > MAX_SIDECARS && wanted.workload.is_none() {
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
            refused: HashSet::new(),
            seen,
            passed: Passed::default(),
        };
        running.attach_all(&mut state.sidecars, now);
        let sidecars = sidecars.min(MAX_SIDECARS);
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
            // Whatever it has said before: it says this once.
            Some(tap) if !tapped.refused.is_empty() => {
                tap.refuse(self.stream, &connected.sidecar, tapped.refused);
            }
            Some(tap) if may_speak => tap.take(self.stream, &connected.sidecar, tapped, now),
            Some(tap) => tap.lose(&tapped, 0),
            None if !may_speak => {}
            // It is sent below.
            None if connected.ended.contains(&tapped.id) => {}
            // It crosses this message: a second one does no harm.
            None => {
                (connected.deliver)(Message::Untap(Untap { id: tapped.id }));
            }
        }
        connected.send_ends();
    }

    /// Sends the ends of taps that found no room before.
    pub fn send_ends(&self) {
        if let Some(connected) = self.taps.state().sidecars.get_mut(&self.stream) {
            connected.send_ends();
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut state = self.taps.state();
        for tap in state.taps.values_mut() {
            tap.streams.remove(&self.stream);
            tap.refused.remove(&self.stream);
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
            tap.attach_all(sidecars, now);
        }
    }

    /// How many requests there were since this was asked last, and whose are missing.
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
        for stream in tap.streams.keys() {
            if let Some(connected) = sidecars.get_mut(stream) {
                connected.end(self.id);
            }
        }
    }
}
