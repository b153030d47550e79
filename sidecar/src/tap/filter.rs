//! Which requests a tap shows: compiled once, when it opens.

use std::ops::RangeInclusive;
use std::time::Duration;

use tulle_mesh::canonical;
use tulle_mesh::policy::{Glob, RuleError};
use tulle_mesh::proto::series_key::Direction;
use tulle_mesh::proto::{TapFilter, Tapped};
use tulle_mesh::reason::Reason;

use super::MAX_TAPS;
use super::request::Request;

/// The largest status.
const MAX_STATUS: u16 = 999;

/// Why a tap was not opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TapRefused {
    /// Not a path glob.
    #[error(transparent)]
    Path(#[from] RuleError),
    /// No status is in this range.
    #[error("invalid range of statuses: {from} to {to}")]
    Status {
        /// Its first status.
        from: u32,
        /// Its last.
        to: u32,
    },
    /// Not a direction that this build knows.
    #[error("unknown direction {0}")]
    Direction(i32),
    /// There are as many as a sidecar serves.
    #[error("{} taps are open already", MAX_TAPS)]
    TooMany,
}

impl TapRefused {
    /// What the operator is answered.
    pub fn answer(&self, id: u64) -> Tapped {
        Tapped { id, refused: self.to_string(), ..Tapped::default() }
    }
}

/// What must hold of a request. What is not set always holds.
#[derive(Debug, Default)]
pub struct Filter {
    namespace: Option<String>,
    peer: Option<String>,
    direction: Option<Direction>,
    method: Option<String>,
    status: Option<RangeInclusive<u16>>,
    is_denied: bool,
    slow: Duration,
    path: Option<Glob>,
}

impl Filter {
    /// Compiles what the operator sent.
    ///
    /// # Errors
    /// [`TapRefused`] names the first value that cannot be used.
    pub fn compile(filter: &TapFilter) -> Result<Self, TapRefused> {
        let set = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        let direction = match Direction::try_from(filter.direction) {
            Ok(Direction::Unspecified) => None,
            Ok(direction) => Some(direction),
            Err(_) => return Err(TapRefused::Direction(filter.direction)),
        };
        Ok(Self {
            namespace: set(&filter.peer_namespace),
            peer: set(&filter.peer),
            direction,
            method: set(&filter.method),
            status: statuses(filter.status_from, filter.status_to)?,
            is_denied: filter.denied,
            slow: Duration::from_micros(filter.slow_micros),
            path: set(&filter.path).map(|path| Glob::compile(&path)).transpose()?,
        })
    }

    /// Whether a request is to be shown.
    pub fn passes(&self, request: &Request<'_>) -> bool {
        let key = request.key;
        let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|wanted| wanted == found);
        is(&self.namespace, &key.namespace)
            && is(&self.peer, &key.peer)
            && self.direction.is_none_or(|direction| direction == key.wire_direction())
            && self.method.as_ref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(request.head.request_line().0))
            && self.status.as_ref().is_none_or(|statuses| statuses.contains(&request.status))
            && (!self.is_denied || request.reason.is_some_and(is_denial))
            && request.took >= self.slow
            // Last: it costs most.
            && self.path.as_ref().is_none_or(|glob| has_path(request.head.request_line().1, glob))
    }
}

/// Whether a policy or a limit of the server refused it. What a route, a fault or a timeout ends was not refused.
fn is_denial(reason: Reason) -> bool {
    matches!(reason, Reason::PolicyDenied | Reason::PolicyPlaintext | Reason::OursOverloaded)
}

/// Whether the path of a target matches in any reading that an application may have, as for a rule that denies.
fn has_path(target: &str, glob: &Glob) -> bool {
    canonical::readings(target).iter().any(|path| glob.may_match(path))
}

/// The statuses from one to another. Without the second it is the first alone.
fn statuses(from: u32, to: u32) -> Result<Option<RangeInclusive<u16>>, TapRefused> {
    if (from, to) == (0, 0) {
        return Ok(None);
    }
    let refused = TapRefused::Status { from, to };
    let last = if to == 0 { from } else { to };
    match (u16::try_from(from), u16::try_from(last)) {
        // 0 stands for requests that got none.
        (Ok(first), Ok(last)) if first <= last && first <= MAX_STATUS => Ok(Some(first.max(1)..=last)),
        _ => Err(refused),
    }
}
