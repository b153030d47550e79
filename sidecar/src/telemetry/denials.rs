//! The last refusals, for whoever asks about one of them by its id.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{SystemTime, UNIX_EPOCH};

use tulle_mesh::denial::DenialId;
use tulle_mesh::query::Denial;

/// Refused requests that are kept, of about 300 bytes each. Those before are in the log, if at all.
const REQUESTS: usize = 128;
/// Refused connections that are kept. No client has their ids: they are found in the log, so that fewer are enough, and
/// however many there are, they push out no request.
const CONNECTIONS: usize = 32;
/// What is kept of a text that comes from a client.
const LONGEST: usize = 256;

/// The last refusals of this pod.
#[derive(Debug, Default)]
pub struct Denials {
    /// Where the numbers of this process begin, so that those of an earlier one are not taken for them.
    first: OnceLock<u32>,
    count: AtomicU32,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    requests: VecDeque<Denial>,
    connections: VecDeque<Denial>,
}

impl Denials {
    /// Gives a refusal its id and remembers it. Its id and its time are filled in here.
    pub fn remember(&self, pod_uid: &str, mut denial: Denial) -> DenialId {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let first = *self.first.get_or_init(|| now.subsec_nanos().wrapping_mul(0x9e37_79b9));
        let id = DenialId::new(pod_uid, first.wrapping_add(self.count.fetch_add(1, Ordering::Relaxed)));
        // A flood of refusals must not make the threads wait for each other: one that finds the list in use is not kept.
        let mut last = match self.last.try_lock() {
            Ok(last) => last,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return id,
        };
        denial.id = id.to_string();
        denial.at_unix_ms = i64::try_from(now.as_millis()).unwrap_or(i64::MAX);
        for text in [&mut denial.method, &mut denial.host, &mut denial.path] {
            let end = text.floor_char_boundary(LONGEST);
            denial.cut |= end < text.len();
            text.truncate(end);
        }
        let (kept, most) = match denial.method.is_empty() {
            true => (&mut last.connections, CONNECTIONS),
            false => (&mut last.requests, REQUESTS),
        };
        if kept.len() >= most {
            kept.pop_front();
        }
        kept.push_back(denial);
        id
    }

    /// Those that are kept, the latest last.
    pub fn all(&self) -> Vec<Denial> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<Denial> = last.connections.iter().chain(&last.requests).cloned().collect();
        drop(last);
        all.sort_by_key(|denial| denial.at_unix_ms);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_under_ids_of_their_own_and_long_texts_are_cut() {
        let denials = Denials::default();
        let path = format!("/{}", "\u{e9}".repeat(400));
        let denial = Denial { method: "GET".into(), path, ..Denial::default() };
        let ids: Vec<String> =
            (0..REQUESTS + 3).map(|_| denials.remember("uid", denial.clone()).to_string()).collect();
        let kept = denials.all();
        let of_kept: Vec<&str> = kept.iter().map(|denial| denial.id.as_str()).collect();
        assert_eq!(of_kept, ids[3..], "the first three have gone");
        assert!(kept.iter().all(|denial| denial.path.len() <= LONGEST && denial.path.ends_with('\u{e9}')));
        assert!(kept.iter().all(|denial| denial.cut));
        assert!(kept.iter().all(|denial| denial.id.parse::<DenialId>().unwrap().may_be_of("uid")));
    }

    #[test]
    fn refused_connections_push_out_no_refused_request() {
        let denials = Denials::default();
        let request = Denial { method: "GET".into(), path: "/".into(), ..Denial::default() };
        let id = denials.remember("uid", request).to_string();
        let ids: Vec<String> =
            (0..1_000).map(|_| denials.remember("uid", Denial::default()).to_string()).collect();
        let (requests, connections): (Vec<Denial>, Vec<Denial>) =
            denials.all().into_iter().partition(|denial| !denial.method.is_empty());
        assert_eq!((requests.len(), requests[0].id.as_str(), requests[0].cut), (1, id.as_str(), false));
        let connections: Vec<&str> = connections.iter().map(|denial| denial.id.as_str()).collect();
        assert_eq!(connections, ids[1_000 - CONNECTIONS..]);
    }

    #[test]
    fn a_list_in_use_holds_nobody_up() {
        let denials = Denials::default();
        let last = denials.last.lock().unwrap();
        let first = denials.remember("uid", Denial::default());
        drop(last);
        assert_ne!(denials.remember("uid", Denial::default()), first);
        assert_eq!(denials.all().len(), 1);
    }
}
