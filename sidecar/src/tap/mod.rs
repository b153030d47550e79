//! Shows single requests to somebody who looks (`tulle tap`).
//!
//! In: `Tap` and `Untap` of the operator, and each request as it ends, from every data thread. Out: `Tapped`, on the
//! discovery stream. While nobody looks, a request costs one relaxed atomic load. While somebody does, a data thread
//! takes no lock and waits for nothing: what does not fit is counted as lost.
//!
//! ```text
//!   filter    which requests are shown
//!   request   a request that has ended, and what is shown of it: never a credential
//!   collect   the side of the discovery stream: opens taps, gathers what they show into messages
//! ```

mod collect;
mod filter;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tulle_mesh::proto::{self, TapEvent, Tapped};

pub use collect::Collector;
use filter::Filter;
pub use filter::TapRefused;
pub use request::Request;
use request::ShownHeaders;

use crate::telemetry::Limited;

/// Taps of a sidecar that may be open at once.
const MAX_TAPS: usize = 4;
/// Requests in a second that a tap may show at most.
const MAX_RATE: u32 = 100;

/// The taps that are open, for every data thread.
#[derive(Debug, Default)]
pub struct Taps {
    /// Whether there are any: all that a request asks while there are none.
    is_open: AtomicBool,
    open: ArcSwap<Vec<Arc<Tap>>>,
}

impl Taps {
    /// Shows a request that has ended to every tap whose filter it passes. `request` is called only if there are taps.
    #[inline]
    pub fn show<'r>(&self, request: impl FnOnce() -> Request<'r>) {
        if self.is_open.load(Ordering::Relaxed) {
            self.show_to_all(&request());
        }
    }

    #[cold]
    fn show_to_all(&self, request: &Request<'_>) {
        for tap in self.open.load().iter() {
            tap.show(request);
        }
    }

    fn set(&self, open: &[Arc<Tap>]) {
        self.open.store(Arc::new(open.to_vec()));
        self.is_open.store(!open.is_empty(), Ordering::Relaxed);
    }
}

/// A request on its way to the discovery stream.
#[derive(Debug)]
struct Shown {
    /// The tap that shows it.
    tap: u64,
    /// Boxed: a channel that nobody uses keeps room for 32 of these.
    event: Box<TapEvent>,
}

/// One tap.
#[derive(Debug)]
struct Tap {
    id: u64,
    filter: Filter,
    headers: ShownHeaders,
    rate: Limited,
    since: Instant,
    /// Requests that have passed the filter since the last message.
    passed: AtomicU64,
    /// Of these: not shown.
    lost: AtomicU64,
    shown: mpsc::Sender<Shown>,
}

impl Tap {
    /// Compiles what the operator sent.
    fn compile(tap: &proto::Tap, shown: mpsc::Sender<Shown>) -> Result<Self, TapRefused> {
        let filter = tap.filter.as_ref().map(Filter::compile).transpose()?;
        Ok(Self {
            id: tap.id,
            filter: filter.unwrap_or_default(),
            headers: ShownHeaders::of(&tap.headers),
            rate: Limited::new(tap.rate.clamp(1, MAX_RATE)),
            since: Instant::now(),
            passed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            shown,
        })
    }

    /// The number of the second in which a request ended, from 1 on. The clock is not read again for it.
    fn second_of(&self, request: &Request<'_>) -> u32 {
        let since_opened = (request.since + request.took).saturating_duration_since(self.since);
        u32::try_from(since_opened.as_secs()).unwrap_or(u32::MAX).saturating_add(1)
    }

    /// Shows a request that passes the filter, if there is room for it in this second and on the way.
    fn show(&self, request: &Request<'_>) {
        if !self.filter.passes(request) {
            return;
        }
        self.passed.fetch_add(1, Ordering::Relaxed);
        let room = self.rate.allow_in(self.second_of(request)).and_then(|_| self.shown.try_reserve().ok());
        match room {
            Some(room) => {
                room.send(Shown { tap: self.id, event: Box::new(request.event(&self.headers)) });
            }
            None => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// A message with the counts since the last one.
    fn counts(&self) -> Tapped {
        // A request that ends meanwhile may be passed in one message and lost in the next: their sums are right.
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let passed = self.passed.swap(0, Ordering::Relaxed);
        Tapped { id: self.id, passed, lost, ..Tapped::default() }
    }
}
