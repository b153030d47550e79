//! The side of the discovery stream: opens taps, and gathers what they show into messages.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tulle_mesh::proto::{self, Tapped};
use tulle_mesh::tap::MAX_EVENTS;

use super::{MAX_TAPS, Shown, Tap, TapRefused, Taps};

/// Requests that may wait to be gathered: more than all taps may show in the time between two messages.
pub(super) const CAPACITY: usize = 256;
/// Requests that are sent together at most. Each takes about 300 bytes, and at most 4 KB.
pub(super) const BATCH: usize = MAX_EVENTS;
/// How often they are sent, unless there are as many earlier.
pub(super) const EVERY: Duration = Duration::from_millis(250);

/// The taps of one discovery stream. They end with it.
#[derive(Debug)]
pub struct Collector<'a> {
    taps: &'a Taps,
    open: Vec<Arc<Tap>>,
    sender: mpsc::Sender<Shown>,
    shown: mpsc::Receiver<Shown>,
    waiting: Vec<Shown>,
    due: Instant,
}

impl<'a> Collector<'a> {
    /// The taps of a new stream: none.
    pub fn new(taps: &'a Taps) -> Self {
        let (sender, shown) = mpsc::channel(CAPACITY);
        Self { taps, open: Vec::new(), sender, shown, waiting: Vec::new(), due: Instant::now() }
    }

    /// Opens a tap, in place of one with the same number.
    ///
    /// # Errors
    /// [`TapRefused`], and then requests are shown as before.
    pub fn open(&mut self, tap: &proto::Tap) -> Result<(), TapRefused> {
        let new = Tap::compile(tap, self.sender.clone())?;
        let others = self.open.iter().filter(|open| open.id != new.id);
        if others.clone().count() >= MAX_TAPS {
            return Err(TapRefused::TooMany);
        }
        let mut open: Vec<_> = others.cloned().collect();
        open.push(Arc::new(new));
        if self.open.is_empty() {
            self.due = Instant::now() + EVERY;
        }
        self.set(open);
        Ok(())
    }

    /// Closes a tap. What it has shown and was not sent yet is not sent any more.
    pub fn close(&mut self, id: u64) {
        let open = self.open.iter().filter(|open| open.id != id).cloned().collect();
        self.set(open);
        if self.open.is_empty() {
            // Nobody takes what is left.
            while self.shown.try_recv().is_ok() {}
            self.waiting = Vec::new();
        }
    }

    /// Whether any tap is open.
    pub fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Waits until there are as many requests as are sent together, or until it is time. May be given up and called
    /// again.
    pub async fn ready(&mut self) {
        let due = self.due;
        let full = async {
            while let Some(room) = BATCH.checked_sub(self.waiting.len()).filter(|room| *room > 0) {
                self.shown.recv_many(&mut self.waiting, room).await;
            }
        };
        let _ = timeout_at(due, full).await;
    }

    /// What is to be sent now: a message for each tap whose filter a request has passed since the last one.
    pub fn take(&mut self, now: Instant) -> Vec<Tapped> {
        self.due = now + EVERY;
        let mut messages: Vec<Tapped> = self.open.iter().map(|tap| tap.counts()).collect();
        for shown in self.waiting.drain(..) {
            // There is none for a tap that was closed meanwhile.
            if let Some(message) = messages.iter_mut().find(|message| message.id == shown.tap) {
                message.events.push(shown.event.encode_to_vec());
            }
        }
        messages.retain(|message| *message != Tapped { id: message.id, ..Tapped::default() });
        messages
    }

    fn set(&mut self, open: Vec<Arc<Tap>>) {
        self.taps.set(&open);
        self.open = open;
    }
}

/// Nobody looks any more.
impl Drop for Collector<'_> {
    fn drop(&mut self) {
        self.taps.set(&[]);
    }
}
