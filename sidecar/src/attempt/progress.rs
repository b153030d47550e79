//! How far request and answer have come, and whether the server kept up.

use std::cell::Cell;
use std::time::Duration;

use crate::http1::Framing;
use crate::message::Progress;

/// A server that sends nothing for so long in the middle of an answer, whose length it knows, has stopped. Clients that wait
/// for two seconds in all leave behind that.
pub(super) const STALLED: Duration = Duration::from_millis(1_500);

/// What has moved of the bodies so far.
#[derive(Default)]
pub(super) struct Moved {
    pub(super) up: Cell<u64>,
    pub(super) down: Progress,
    /// The answer is complete.
    pub(super) answered: Cell<bool>,
}

impl Moved {
    /// So much more of the request's body goes to the server.
    pub(super) fn sent(&self, bytes: usize) {
        self.up.set(self.up.get() + bytes as u64);
        self.down.is_unanswered.set(true);
    }
}

/// How a server kept up with its answer, up to the moment when the client left that, or what became of its tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// Nothing was missing, as far as can be seen: the answer has no length, all of it had come, or the client did not take
    /// what had come. Or nobody measured.
    #[default]
    InTime,
    /// Some of its length was missing, and the server was waited for, for less than 1.5 s.
    Slow,
    /// The same for longer.
    Stalled,
    /// It granted a tunnel, and ended it soon after without a word.
    HungUp,
}

impl Pace {
    /// Of an answer with this framing, which its client has left now.
    pub(super) fn of(framing: Framing, progress: &Progress) -> Self {
        let Framing::Length(length) = framing else { return Self::InTime };
        match progress.waits_since.get() {
            Some(since) if progress.bytes.get() < length && since.elapsed() >= STALLED => Self::Stalled,
            Some(_) if progress.bytes.get() < length => Self::Slow,
            _ => Self::InTime,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_server_that_owes_the_rest_of_a_length_is_slow_or_has_stalled() {
        let begun = Instant::now();
        let waiting = |bytes| Progress {
            bytes: Cell::new(bytes),
            waits_since: Cell::new(Some(begun)),
            ..Progress::default()
        };
        advance(Duration::from_millis(1_400)).await;
        assert_eq!(Pace::of(Framing::Length(1_000), &waiting(300)), Pace::Slow);
        advance(Duration::from_millis(200)).await;
        assert_eq!(Pace::of(Framing::Length(1_000), &waiting(300)), Pace::Stalled);
        assert_eq!(Pace::of(Framing::Length(1_000), &waiting(1_000)), Pace::InTime, "all of it has come");
        assert_eq!(Pace::of(Framing::Chunked, &waiting(300)), Pace::InTime, "an endless stream");
        let untaken = Progress { bytes: Cell::new(300), ..Progress::default() };
        assert_eq!(Pace::of(Framing::Length(1_000), &untaken), Pace::InTime, "a player that is paused");
    }
}
