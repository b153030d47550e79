//! What a sidecar enforces while it has not taken what it was sent last. It is reported where that lasts: a sidecar that has
//! refused a version, or does not answer, works with the one before, and questions about it are answered by that.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Session, State};
use crate::discovery::cache::Shared;
use crate::discovery::report::{Enforced, Name};

/// An answer that takes longer is late. Most answers take milliseconds, and then nothing is reported.
pub(super) const LATE: Duration = Duration::from_secs(1);
/// Versions of a resource whose answers may still come. Of older ones, answers are not noted.
const UNANSWERED: usize = 4;

/// Room for so many resources is kept.
const KEPT: usize = 16;

/// The resources that a sidecar has been sent and has not taken.
#[derive(Default)]
pub(super) struct Lag {
    behind: HashMap<Name, Behind>,
    /// When an answer is late.
    pub(super) late_at: Option<Instant>,
}

struct Behind {
    enforced: Enforced,
    /// Versions between that and the one that was sent last, from the oldest on.
    unanswered: Vec<Arc<Shared>>,
    /// Since when an answer is waited for.
    since: Instant,
    /// What is enforced was reported.
    is_told: bool,
}

/// What a sidecar had before it was sent another version.
pub(super) enum Before {
    /// This version, which it has acknowledged.
    Acked(Arc<Shared>),
    /// This one, which it has not.
    Sent(Arc<Shared>),
    /// A version from before this stream.
    Held(String),
}

impl Lag {
    fn remove(&mut self, name: &Name) -> Option<Behind> {
        let removed = self.behind.remove(name);
        // What all subscriptions at once have needed is given back.
        if self.behind.is_empty() && self.behind.capacity() > KEPT {
            self.behind = HashMap::new();
        }
        removed
    }

    fn drop_answered(&mut self, name: &Name, version: &str) -> Option<(&mut Behind, Arc<Shared>)> {
        let behind = self.behind.get_mut(name)?;
        let at = behind.unanswered.iter().position(|sent| sent.version() == version)?;
        let answered = behind.unanswered.drain(..=at).next_back()?;
        Some((behind, answered))
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.behind.is_empty()
    }
}

impl Session {
    /// Notes that a sidecar has been sent another version of a resource.
    pub(super) fn sent_another(&self, lag: &mut Lag, name: &Name, before: Before) {
        let since = Instant::now();
        lag.late_at.get_or_insert(since + LATE);
        if let Some(behind) = lag.behind.get_mut(name) {
            if let Before::Acked(sent) | Before::Sent(sent) = before {
                if behind.unanswered.len() >= UNANSWERED {
                    behind.unanswered.remove(0);
                }
                behind.unanswered.push(sent);
            }
            return;
        }
        let (mut unanswered, mut is_told) = (Vec::new(), false);
        let enforced = match before {
            Before::Acked(enforced) => Enforced::Earlier(Arc::clone(&enforced.resource)),
            Before::Sent(sent) => {
                unanswered.push(sent);
                Enforced::Nothing
            }
            Before::Held(version) => {
                let (kept, was_told) = self.relay.kept(&self.pod_uid, name, &version);
                is_told = was_told;
                kept.map_or(Enforced::Unknown, Enforced::Earlier)
            }
        };
        if is_told {
            // What an earlier stream has said may be another version.
            self.tell(name, Some(enforced.clone()));
        }
        lag.behind.insert(name.clone(), Behind { enforced, unanswered, since, is_told });
    }

    /// The version that was sent last is enforced now.
    pub(super) fn caught_up(&self, lag: &mut Lag, name: &Name) {
        if lag.remove(name).is_some_and(|behind| behind.is_told) {
            self.tell(name, None);
        }
    }

    /// A version is enforced that was sent before the last one.
    pub(super) fn acked_earlier(&self, lag: &mut Lag, name: &Name, version: &str) {
        let Some((behind, acked)) = lag.drop_answered(name, version) else { return };
        behind.enforced = Enforced::Earlier(Arc::clone(&acked.resource));
        behind.since = Instant::now();
        if behind.is_told {
            self.tell(name, Some(behind.enforced.clone()));
        }
    }

    /// The version that was sent last is refused.
    pub(super) fn refused(&self, lag: &mut Lag, name: &Name) {
        let nothing = || Behind {
            enforced: Enforced::Nothing,
            unanswered: Vec::new(),
            since: Instant::now(),
            is_told: false,
        };
        let behind = lag.behind.entry(name.clone()).or_insert_with(nothing);
        if !std::mem::replace(&mut behind.is_told, true) {
            self.tell(name, Some(behind.enforced.clone()));
        }
    }

    /// The sidecar wants no more of a resource.
    pub(super) fn left(lag: &mut Lag, name: &Name) {
        lag.remove(name);
    }

    /// Reports what is enforced in place of versions whose answers are late at this time.
    pub(super) fn tell_late(&self, state: &mut State, now: Instant) {
        let mut next: Option<Instant> = None;
        for (name, behind) in state.lag.behind.iter_mut().filter(|(_, behind)| !behind.is_told) {
            let late_at = behind.since + LATE;
            if late_at <= now {
                behind.is_told = true;
                self.tell(name, Some(behind.enforced.clone()));
            } else {
                next = Some(next.map_or(late_at, |next| next.min(late_at)));
            }
        }
        state.lag.late_at = next;
    }

    fn tell(&self, name: &Name, enforced: Option<Enforced>) {
        self.relay.enforces(&self.pod_uid, self.number, name, enforced);
    }
}
