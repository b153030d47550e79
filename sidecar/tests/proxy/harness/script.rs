//! How a server ends what it is asked, once or always, and what it has seen of it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// How a server ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With an answer.
    Answers,
    /// It closes the connection without reading the request: the kernel resets it.
    ClosesUnread,
    /// It ends its side and then closes the connection, without reading the request, as servers do that shut down.
    EndsUnread,
    /// It resets the connection with the request half read.
    ResetsHalfRead,
    /// It reads the request and resets the connection, as `SO_LINGER` of 0 does.
    ResetsRead,
    /// It reads the request and closes the connection.
    ClosesRead,
    /// It reads the request, sends half a head and closes the connection.
    HalfHead,
    /// It reads the request, sends a head and half a body and breaks off.
    HalfAnswer,
    /// HTTP/2: REFUSED_STREAM.
    RefusesStream,
    /// HTTP/2: GOAWAY, which names an earlier stream as the last.
    GoesAway,
    /// HTTP/2: it reads the request and resets the stream for another reason.
    ResetsStream,
}

impl Ending {
    /// Whether the server resets the connection, so that nobody can tell whether it has read the request.
    pub fn is_reset(self) -> bool {
        matches!(self, Self::ClosesUnread | Self::ResetsHalfRead | Self::ResetsRead)
    }

    /// Whether the server has not read the request to its end.
    pub fn is_unread(self) -> bool {
        matches!(
            self,
            Self::ClosesUnread
                | Self::EndsUnread
                | Self::ResetsHalfRead
                | Self::RefusesStream
                | Self::GoesAway
        )
    }
}

/// What the servers of a Service do with the request that matters. Those before it are answered.
pub struct Script {
    ending: Ending,
    /// Whether the ending comes to one request only. All others are answered.
    once: bool,
    armed: AtomicBool,
    met: AtomicBool,
    met_on_kept: AtomicBool,
    whole: AtomicUsize,
    /// The client has the head of the answer: what follows may break off.
    pub head_arrived: Notify,
}

impl Script {
    /// A script that has not begun.
    pub fn new(ending: Ending, once: bool) -> Self {
        Self {
            ending,
            once,
            armed: AtomicBool::new(false),
            met: AtomicBool::new(false),
            met_on_kept: AtomicBool::new(false),
            whole: AtomicUsize::new(0),
            head_arrived: Notify::new(),
        }
    }

    /// The next request is the one that matters.
    pub fn arm(&self) {
        self.whole.store(0, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
    }

    /// How a request ends that arrives now. `kept`: its connection has carried one before.
    pub fn next(&self, kept: bool) -> Ending {
        let armed = self.armed.fetch_and(!self.once, Ordering::SeqCst);
        if !armed {
            return Ending::Answers;
        }
        if !self.met.swap(true, Ordering::SeqCst) {
            self.met_on_kept.store(kept, Ordering::SeqCst);
        }
        self.ending
    }

    /// A request was read to its end.
    pub fn read_whole(&self) {
        self.whole.fetch_add(1, Ordering::SeqCst);
    }

    /// Requests that were read to their end since the script began.
    pub fn whole(&self) -> usize {
        self.whole.load(Ordering::SeqCst)
    }

    /// Whether the ending was first met on a connection that had carried a request before.
    pub fn was_met_on_kept(&self) -> bool {
        self.met_on_kept.load(Ordering::SeqCst)
    }
}
