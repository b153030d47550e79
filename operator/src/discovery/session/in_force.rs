//! What a sidecar enforces while it has not taken what it was sent last. It is reported where that lasts: a sidecar that has
//! refused a version, or does not answer, works with the one before, and questions about it are answered by that.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Session, State};
use crate::discovery::cache::Shared;
use crate::discovery::report::{Name, SidecarEvent};

/// An answer that has not come by then is late. Most come within milliseconds, and nothing is reported of them.
const LATE: Duration = Duration::from_secs(1);

/// When an answer to what is sent now is late.
pub(super) fn late() -> Instant {
    Instant::now() + LATE
}

/// A version that is enforced although a later one was sent.
pub(super) struct Behind {
    enforced: Arc<Shared>,
    /// That was reported.
    is_told: bool,
}

impl Behind {
    pub(super) fn new(enforced: Arc<Shared>) -> Self {
        Self { enforced, is_told: false }
    }

    fn told(&mut self, name: &Name) -> Option<SidecarEvent> {
        if std::mem::replace(&mut self.is_told, true) {
            return None;
        }
        let resource = Arc::new(self.enforced.compiled.resource.clone());
        Some(SidecarEvent::Enforces(name.clone(), Some(resource)))
    }
}

impl Session {
    /// Reports what is enforced in place of versions that have not been answered.
    pub(super) fn tell_late(&self, state: &mut State) {
        state.late_at = None;
        for (name, behind) in &mut state.behind {
            if let Some(event) = behind.told(name) {
                self.relay.report(&self.pod_uid, event);
            }
        }
    }

    /// Reports what is enforced in place of the version that was sent last.
    pub(super) fn tell_enforced(&self, state: &mut State, name: &Name) {
        if let Some(event) = state.behind.get_mut(name).and_then(|behind| behind.told(name)) {
            self.relay.report(&self.pod_uid, event);
        }
    }

    /// The version that was sent last is enforced now.
    pub(super) fn overtaken(&self, state: &mut State, name: &Name) {
        if state.behind.remove(name).is_some_and(|behind| behind.is_told) {
            self.relay.report(&self.pod_uid, SidecarEvent::Enforces(name.clone(), None));
        }
    }
}
