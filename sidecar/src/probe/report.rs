//! Log lines about probes whose result has changed.
//!
//! Kubelet's events name the status of a failed probe, and not the body of the answer with the reason, so that reason is
//! logged here. In: the results of each probe. Out: a line for each result of another kind than the one logged before,
//! at most one per probe and second. Takes no lock.

use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use http::StatusCode;

use super::{Probe, ProbeError, TIMED_OUT};
use crate::telemetry::Limited;

/// Characters of a reason that are logged: the application may have written it (the message of a gRPC status).
const MAX_REASON: usize = 300;

/// What kind of result a probe has. Failures for different reasons are of different kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind(u16);

impl Kind {
    /// The probe passes.
    pub(super) const PASSES: Self = Self(0);
    /// The application has not answered within the probe's time.
    pub(super) const TIMED_OUT: Self = Self(1);

    /// By the application's HTTP status, as kubelet judges it.
    pub(super) fn of_status(status: StatusCode) -> Self {
        let passes = status.is_success() || status.is_redirection();
        if passes { Self::PASSES } else { Self(status.as_u16()) }
    }

    /// By what went wrong.
    pub(super) fn of_error(error: &ProbeError) -> Self {
        // Below the numbers of HTTP statuses.
        Self(match error {
            ProbeError::Connect { .. } => 10,
            ProbeError::Tls { .. } => 11,
            ProbeError::TlsConfig(_) => 12,
            ProbeError::Http { .. } => 13,
            ProbeError::Url { .. } => 14,
            ProbeError::Target { .. } => 15,
            ProbeError::HeaderName { .. } => 16,
            ProbeError::HeaderValue { .. } => 17,
            ProbeError::TooManyRedirects => 18,
            ProbeError::NotServing { .. } => 19,
            ProbeError::Grpc(status) => {
                20_u16.saturating_add(u16::try_from(i32::from(status.code())).unwrap_or(0))
            }
        })
    }
}

/// A probe, and what the log says about it.
pub(super) struct Watched {
    pub(super) probe: Probe,
    /// The [`Kind`] that was logged last; at first that of a success, which is not worth a line.
    logged: AtomicU16,
    lines: Limited,
}

impl Watched {
    pub(super) fn new(probe: Probe) -> Self {
        Self { probe, logged: AtomicU16::new(Kind::PASSES.0), lines: Limited::new(1) }
    }

    /// Logs a result that is of another kind than the one before.
    fn report(&self, kind: Kind, reason: &str) {
        if !self.is_news(kind, || self.lines.allow().is_some()) {
            return;
        }
        let probe = self.probe.path.as_str();
        if kind == Kind::PASSES {
            tracing::info!(probe, "a probe of the application passes again");
        } else {
            let reason: String = reason.chars().take(MAX_REASON).collect();
            tracing::info!(probe, reason, "a probe of the application fails");
        }
    }

    /// Whether a result is to be logged, now that it is known. One that comes when no line is allowed stays unlogged, so
    /// that the next result is compared with what the log says.
    fn is_news(&self, kind: Kind, allow: impl FnOnce() -> bool) -> bool {
        let logged = self.logged.load(Ordering::Relaxed);
        let replace = || self.logged.compare_exchange(logged, kind.0, Ordering::Relaxed, Ordering::Relaxed);
        logged != kind.0 && allow() && replace().is_ok()
    }
}

/// A probe that is being carried out. Kubelet's own time ends a little earlier than the sidecar's: it closes the
/// connection, and the probe is dropped before it has a result.
pub(super) struct Pending<'a> {
    watched: &'a Watched,
    limit: Duration,
    began: Instant,
    has_ended: bool,
}

impl<'a> Pending<'a> {
    pub(super) fn new(watched: &'a Watched, limit: Duration) -> Self {
        Self { watched, limit, began: Instant::now(), has_ended: false }
    }

    /// The probe has a result.
    pub(super) fn end(mut self, kind: Kind, reason: &str) {
        self.has_ended = true;
        self.watched.report(kind, reason);
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        // A caller that leaves much earlier says nothing about the application.
        if !self.has_ended && self.began.elapsed() >= self.limit * 9 / 10 {
            self.watched.report(Kind::TIMED_OUT, TIMED_OUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Check;
    use super::*;

    fn watched() -> Watched {
        let (path, check) = ("/app/readinessProbe".to_owned(), Check::Tcp { port: 8080 });
        Watched::new(Probe { path, check, timeout_seconds: 1 })
    }

    fn status(code: u16) -> Kind {
        Kind::of_status(StatusCode::from_u16(code).unwrap())
    }

    fn grpc(code: tonic::Code) -> Kind {
        Kind::of_error(&ProbeError::Grpc(tonic::Status::new(code, "")))
    }

    #[test]
    fn a_result_is_logged_once_and_again_when_its_kind_changes() {
        let watched = watched();
        let redirects = Kind::of_error(&ProbeError::TooManyRedirects);
        for (kind, logged) in [
            (Kind::PASSES, false),
            (status(200), false),
            (status(503), true),
            (status(503), false),
            (status(500), true),
            (redirects, true),
            (redirects, false),
            (Kind::TIMED_OUT, true),
            (grpc(tonic::Code::NotFound), true),
            (grpc(tonic::Code::Unavailable), true),
            (grpc(tonic::Code::Unavailable), false),
            (status(302), true),
            (status(204), false),
        ] {
            assert_eq!(watched.is_news(kind, || true), logged, "{kind:?}");
        }
    }

    #[test]
    fn a_change_beyond_the_limit_of_lines_is_logged_with_the_next_result() {
        let watched = watched();
        assert!(watched.is_news(status(503), || true));
        assert!(!watched.is_news(Kind::PASSES, || false));
        assert!(watched.is_news(Kind::PASSES, || true), "the log still says that it fails");
        assert!(watched.is_news(status(503), || true));
        assert!(!watched.is_news(Kind::PASSES, || false));
        assert!(!watched.is_news(status(503), || true), "the log says so already");
    }

    #[test]
    fn a_probe_for_which_kubelet_did_not_wait_longer_has_failed() {
        let (hour, watched) = (Duration::from_secs(3600), watched());
        drop(Pending::new(&watched, hour));
        assert_eq!(watched.logged.load(Ordering::Relaxed), Kind::PASSES.0, "the caller left at once");
        Pending::new(&watched, Duration::ZERO).end(Kind::PASSES, "ok");
        assert_eq!(watched.logged.load(Ordering::Relaxed), Kind::PASSES.0, "it has a result");
        drop(Pending::new(&watched, Duration::ZERO));
        assert_eq!(watched.logged.load(Ordering::Relaxed), Kind::TIMED_OUT.0);
    }
}
