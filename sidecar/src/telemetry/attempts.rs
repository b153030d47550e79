//! Attempts as evidence of a Canary: every try at an endpoint that was chosen under its shares, also one
//! whose request another endpoint saved afterwards.
//!
//! An attempt counts under the epoch that chose its endpoint, whatever comes while it runs: whoever makes
//! it holds the counters from the choice to the end.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tulle_mesh::histogram::{BUCKETS, bucket_of};
use tulle_mesh::proto::AttemptCounts;
use tulle_mesh::wire::frame::Code;

use crate::attempt::Joined;
use crate::error::{Failure, PumpError};
use crate::grpc::is_server_error;

/// Pods and epochs that are counted at once; attempts beyond are no evidence.
const MAX_KEYS: usize = 4_096;

/// Whose evidence an attempt is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AttemptKey {
    /// Namespace of the Canary.
    pub namespace: Arc<str>,
    /// Name of the Canary.
    pub canary: Arc<str>,
    /// The version of its shares.
    pub epoch: u64,
    /// The endpoint's revision.
    pub revision: Arc<str>,
    /// The endpoint's pod.
    pub pod_uid: Arc<str>,
}

/// What an attempt says of the version that it went to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// It was served.
    Good,
    /// It was answered that the client is at fault.
    ClientError,
    /// It failed, and the application may have seen it.
    Failed,
    /// It failed before the application had seen a byte.
    Unreached,
}

/// Counters of attempts. Each attempt counts in one of them, so that a report never has a failure without
/// its attempt.
#[derive(Debug, Default)]
pub struct Attempts {
    good: AtomicU64,
    client_errors: AtomicU64,
    failed: AtomicU64,
    unreached: AtomicU64,
    /// Time to the head of the answer; made with the first answer.
    latency: OnceLock<Box<[AtomicU32]>>,
}

impl Attempts {
    /// Counts an attempt that has ended. `head`: the time until the head of its answer, if it had one.
    pub fn count(&self, seen: Seen, head: Option<Duration>) {
        if let Some(head) = head {
            let latency = self.latency.get_or_init(|| (0..BUCKETS).map(|_| AtomicU32::new(0)).collect());
            let micros = u64::try_from(head.as_micros()).unwrap_or(u64::MAX);
            if let Some(bucket) = latency.get(bucket_of(micros)) {
                bucket.fetch_add(1, Ordering::Relaxed);
            }
        }
        let counter = match seen {
            Seen::Good => &self.good,
            Seen::ClientError => &self.client_errors,
            Seen::Failed => &self.failed,
            Seen::Unreached => &self.unreached,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What has been counted since the last call.
    fn take(&self, key: &AttemptKey) -> Option<AttemptCounts> {
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let (good, client_errors) = (take(&self.good), take(&self.client_errors));
        let (failed, unreached) = (take(&self.failed), take(&self.unreached));
        let attempts = good + client_errors + failed + unreached;
        if attempts == 0 {
            return None;
        }
        let latency = self.latency.get().map(|latency| latency.iter()).into_iter().flatten();
        let counted = latency.map(|bucket| u64::from(bucket.swap(0, Ordering::Relaxed))).enumerate();
        let buckets = counted.filter(|(_, count)| *count > 0);
        Some(AttemptCounts {
            namespace: key.namespace.to_string(),
            canary: key.canary.to_string(),
            epoch: key.epoch,
            revision: key.revision.to_string(),
            pod_uid: key.pod_uid.to_string(),
            attempts,
            failures: failed + unreached,
            unreached,
            client_errors,
            buckets: buckets.flat_map(|(bucket, count)| [bucket as u64, count]).collect(),
        })
    }
}

/// The counters of all attempts under Canaries.
#[derive(Debug, Default)]
pub struct AttemptTable(Mutex<HashMap<AttemptKey, Arc<Attempts>>>);

impl AttemptTable {
    /// The counters of a key; `None`: there are too many.
    pub fn of(&self, key: AttemptKey) -> Option<Arc<Attempts>> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= MAX_KEYS && !table.contains_key(&key) {
            return None;
        }
        Some(Arc::clone(table.entry(key).or_default()))
    }

    /// What has been counted since the last call. Counters that nobody holds any more are forgotten.
    pub fn take(&self) -> Vec<AttemptCounts> {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counts = Vec::new();
        table.retain(|key, attempts| {
            // Asked first: what its last holder has counted is seen by what follows.
            let held = Arc::get_mut(attempts).is_none();
            counts.extend(attempts.take(key));
            held
        });
        if table.is_empty() {
            table.shrink_to_fit();
        }
        counts
    }
}

/// What the end of a request says of the version of its endpoint. `None`: nothing, because the client went away, was too
/// slow or sent what no server would take, because this sidecar lacked something itself, or because a policy ended it:
/// also one that limits what its pod takes (`shed`), so that no application has seen it. A version that is too slow for
/// its load shows that by what it takes.
pub fn evidence_of(result: Result<u16, &Failure>, grpc: Option<u16>, shed: bool) -> Option<Seen> {
    if shed {
        return None;
    }
    let failure = match (result, grpc) {
        (Ok(500..), _) => return Some(Seen::Failed),
        (Ok(_), Some(status)) if is_server_error(status) => return Some(Seen::Failed),
        (Ok(400..), _) | (Ok(_), Some(1..)) => return Some(Seen::ClientError),
        (Ok(_), _) => return Some(Seen::Good),
        (Err(failure), _) => failure,
    };
    match failure {
        Failure::ClientBadRequest(_)
        | Failure::ClientHeadTooLong
        | Failure::ClientGone
        | Failure::OursNoCertificate
        | Failure::OursResources
        | Failure::OursOverloaded
        | Failure::RouteNone
        | Failure::RouteNoBackend
        | Failure::RouteHeadTooLong(_)
        | Failure::FaultInjected(_)
        | Failure::IdleTimeout => None,
        Failure::Timeout(_) if failure.is_of_client() => None,
        // As a 403, which is what its sidecar answers a request.
        Failure::PolicyDenied | Failure::PolicyPlaintext => Some(Seen::ClientError),
        Failure::UpstreamNone
        | Failure::UpstreamConnect
        | Failure::UpstreamIdentity
        | Failure::UpstreamNotProcessed => Some(Seen::Unreached),
        Failure::ClientGaveUp
        | Failure::UpstreamReset
        | Failure::UpstreamLost
        | Failure::UpstreamBadResponse(_)
        | Failure::DeadlineExceeded
        | Failure::UpstreamTimeout
        | Failure::Timeout(_) => Some(Seen::Failed),
    }
}

/// What the end of an opaque connection of this age says of the version of its endpoint. A server that has sent something
/// and does not break off has served. One that ends first without a word, behind what its client has sent, has failed: a
/// client that has said all it wants to say ends first.
pub fn evidence_of_connection(joined: &Joined, age: Duration) -> Option<Seen> {
    let (sent, received) = joined.bytes;
    if received > 0 {
        return match joined.failure_of_server(Failure::UpstreamReset) {
            // A rule that came meanwhile.
            None | Some(Failure::PolicyDenied) => Some(Seen::Good),
            Some(_) => Some(Seen::Failed),
        };
    }
    match evidence_of_silence(joined.from_client, joined.from_server) {
        Some(Seen::Good) if sent > 0 && joined.is_hung_up(age) => Some(Seen::Failed),
        // Nobody has used it, or only in one direction.
        Some(Seen::Good) if joined.server_first => None,
        seen => seen,
    }
}

/// What the end of an opaque connection says to the breaker of its endpoint when the server has sent no byte: how the way
/// from the client ended, and the way from the server.
pub fn evidence_of_silence(
    from_client: Option<Result<(), PumpError>>,
    from_server: Option<Result<(), PumpError>>,
) -> Option<Seen> {
    match (from_client, from_server) {
        (_, Some(Ok(()))) => Some(Seen::Good),
        (Some(Ok(())), _) => None,
        // A rule that came meanwhile. As when it is refused at once.
        (_, Some(Err(PumpError::SourceReset(Code::Denied)))) => Some(Seen::ClientError),
        (_, Some(Err(PumpError::SourceGone | PumpError::SourceReset(_) | PumpError::SourceMalformed(_)))) => {
            Some(Seen::Failed)
        }
        // The client broke off.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::REQUEST_HEAD;

    fn key(epoch: u64, pod: &str) -> AttemptKey {
        AttemptKey {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch,
            revision: "new".into(),
            pod_uid: pod.into(),
        }
    }

    #[test]
    fn what_an_end_says_of_the_version() {
        let table = [
            (Ok(200), None, Some(Seen::Good)),
            (Ok(101), None, Some(Seen::Good)),
            (Ok(304), None, Some(Seen::Good)),
            (Ok(200), Some(0), Some(Seen::Good)),
            (Ok(404), None, Some(Seen::ClientError)),
            (Ok(403), None, Some(Seen::ClientError)),
            (Ok(200), Some(5), Some(Seen::ClientError)),
            (Ok(200), Some(16), Some(Seen::ClientError)),
            (Ok(500), None, Some(Seen::Failed)),
            (Ok(503), None, Some(Seen::Failed)),
            (Ok(200), Some(2), Some(Seen::Failed)),
            (Ok(200), Some(14), Some(Seen::Failed)),
            (Err(Failure::UpstreamReset), None, Some(Seen::Failed)),
            (Err(Failure::UpstreamReset), Some(0), Some(Seen::Failed)),
            (Err(Failure::UpstreamLost), None, Some(Seen::Failed)),
            (Err(Failure::UpstreamBadResponse("a head")), None, Some(Seen::Failed)),
            (Err(Failure::Timeout("a head")), None, Some(Seen::Failed)),
            (Err(Failure::ClientGaveUp), None, Some(Seen::Failed)),
            (Err(Failure::UpstreamConnect), None, Some(Seen::Unreached)),
            (Err(Failure::UpstreamIdentity), None, Some(Seen::Unreached)),
            (Err(Failure::UpstreamNotProcessed), None, Some(Seen::Unreached)),
            (Err(Failure::PolicyDenied), None, Some(Seen::ClientError)),
            (Err(Failure::ClientGone), None, None),
            (Err(Failure::ClientBadRequest("a head")), None, None),
            (Err(Failure::ClientHeadTooLong), None, None),
            (Err(Failure::Timeout(REQUEST_HEAD)), None, None),
            (Err(Failure::OursNoCertificate), None, None),
            (Err(Failure::OursResources), None, None),
            (Err(Failure::FaultInjected(503)), None, None),
            (Err(Failure::IdleTimeout), None, None),
            (Err(Failure::UpstreamTimeout), None, Some(Seen::Failed)),
            (Err(Failure::DeadlineExceeded), None, Some(Seen::Failed)),
        ];
        for (result, grpc, expected) in table {
            assert_eq!(evidence_of(result.as_ref().copied(), grpc, false), expected, "{result:?} {grpc:?}");
        }
    }

    #[test]
    fn what_a_limit_refuses_is_not_evidence() {
        for (result, grpc) in [(Ok(503), None), (Ok(200), Some(14))] {
            assert_eq!(evidence_of(result, grpc, true), None, "{result:?} {grpc:?}");
        }
        assert_eq!(evidence_of(Err(&Failure::OursOverloaded), None, false), None);
    }

    #[test]
    fn what_a_connection_without_a_byte_from_the_server_says() {
        let table = [
            // Ended by the server, properly.
            (Some(Ok(())), Some(Ok(())), Some(Seen::Good)),
            // Reset by the server.
            (None, Some(Err(PumpError::SourceGone)), Some(Seen::Failed)),
            (Some(Err(PumpError::SinkGone)), Some(Err(PumpError::SourceGone)), Some(Seen::Failed)),
            // Forbidden meanwhile.
            (None, Some(Err(PumpError::SourceReset(Code::Denied))), Some(Seen::ClientError)),
            (None, Some(Err(PumpError::SourceReset(Code::UpstreamFailed))), Some(Seen::Failed)),
            // The client had ended, or broke off.
            (Some(Ok(())), Some(Err(PumpError::SourceGone)), None),
            (Some(Err(PumpError::SourceGone)), None, None),
            (None, None, None),
        ];
        for (from_client, from_server, expected) in table {
            assert_eq!(evidence_of_silence(from_client, from_server), expected);
        }
    }

    #[test]
    fn what_the_end_of_a_connection_says_of_the_version() {
        const GONE: Option<Result<(), PumpError>> = Some(Err(PumpError::SourceGone));
        const ENDED: Option<Result<(), PumpError>> = Some(Ok(()));
        const YOUNG: u64 = 1;
        let table = [
            // Ended by the server without a word: behind a question, unasked, and after hours of one direction.
            ((9, 0), ENDED, ENDED, true, YOUNG, Some(Seen::Failed)),
            ((9, 0), Some(Err(PumpError::SinkGone)), ENDED, true, YOUNG, Some(Seen::Failed)),
            ((0, 0), ENDED, ENDED, true, YOUNG, None),
            ((9, 0), ENDED, ENDED, true, 7_200, None),
            // Ended by the client: one direction, a health check, and a client that does not wait.
            ((9, 0), ENDED, ENDED, false, YOUNG, Some(Seen::Good)),
            ((0, 0), ENDED, ENDED, false, YOUNG, Some(Seen::Good)),
            ((9, 0), GONE, None, false, YOUNG, None),
            // It has answered, and ends properly, also behind a farewell that is not answered.
            ((9, 5), ENDED, ENDED, true, YOUNG, Some(Seen::Good)),
            ((9, 5), ENDED, ENDED, false, YOUNG, Some(Seen::Good)),
            ((9, 5), GONE, None, false, YOUNG, Some(Seen::Good)),
            ((9, 5), ENDED, GONE, false, YOUNG, Some(Seen::Good)),
            // Or breaks off.
            ((9, 5), None, GONE, true, YOUNG, Some(Seen::Failed)),
            ((9, 0), None, GONE, true, YOUNG, Some(Seen::Failed)),
            // Forbidden meanwhile.
            ((9, 5), None, Some(Err(PumpError::SourceReset(Code::Denied))), true, YOUNG, Some(Seen::Good)),
            (
                (9, 0),
                None,
                Some(Err(PumpError::SourceReset(Code::Denied))),
                true,
                YOUNG,
                Some(Seen::ClientError),
            ),
        ];
        for (bytes, from_client, from_server, server_first, age_s, expected) in table {
            let joined = Joined { bytes, from_client, from_server, server_first };
            let seen = evidence_of_connection(&joined, Duration::from_secs(age_s));
            assert_eq!(seen, expected, "{joined:?} after {age_s} s");
        }
    }

    #[test]
    fn what_was_taken_is_not_taken_again() {
        let table = AttemptTable::default();
        let attempts = table.of(key(1, "a")).unwrap();
        attempts.count(Seen::Good, Some(Duration::from_millis(1)));
        attempts.count(Seen::ClientError, Some(Duration::from_millis(1)));
        attempts.count(Seen::Failed, None);
        attempts.count(Seen::Unreached, None);
        let taken = table.take();
        assert_eq!(taken.len(), 1);
        let counts = &taken[0];
        assert_eq!((counts.attempts, counts.failures, counts.unreached, counts.client_errors), (4, 2, 1, 1));
        assert_eq!(counts.buckets, [bucket_of(1_000) as u64, 2]);
        assert!(table.take().is_empty());
        attempts.count(Seen::Good, None);
        assert_eq!(table.take()[0].attempts, 1);
    }

    #[test]
    fn counters_live_as_long_as_somebody_may_count_in_them() {
        let table = AttemptTable::default();
        let under_way = table.of(key(1, "a")).unwrap();
        assert!(table.take().is_empty());
        let next = table.of(key(2, "a")).unwrap();
        next.count(Seen::Good, None);
        under_way.count(Seen::Failed, None);
        drop(under_way);
        let mut taken = table.take();
        taken.sort_by_key(|counts| counts.epoch);
        let seen: Vec<_> = taken.iter().map(|counts| (counts.epoch, counts.failures)).collect();
        assert_eq!(seen, [(1, 1), (2, 0)], "the attempt counts in the epoch that chose its endpoint");
        assert_eq!(table.0.lock().unwrap().len(), 1, "the old epoch is forgotten");
    }

    #[test]
    fn the_table_is_bounded() {
        let table = AttemptTable::default();
        let held: Vec<_> = (0..MAX_KEYS).map(|pod| table.of(key(1, &pod.to_string())).unwrap()).collect();
        assert!(table.of(key(2, "0")).is_none());
        assert!(table.of(key(1, "0")).is_some(), "one that is there is found");
        drop(held);
        assert!(table.take().is_empty());
        assert!(table.of(key(2, "0")).is_some(), "what nobody holds makes room");
    }
}
