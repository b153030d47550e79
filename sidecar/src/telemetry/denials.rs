//! The last refusals, for whoever asks about one of them by its id, and for the reports to the operator.

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
    /// Refusals so far, which is the number of the next one.
    count: AtomicU32,
    last: Mutex<Last>,
}

#[derive(Debug, Default)]
struct Last {
    requests: VecDeque<Kept>,
    connections: VecDeque<Kept>,
}

/// A refusal that is kept.
#[derive(Debug)]
struct Kept {
    /// Its number among all of this process.
    number: u32,
    denial: Denial,
}

/// Refusals since an earlier look.
#[derive(Debug, Default)]
pub struct Since {
    /// The latest of them: requests before connections, of both the latest first.
    pub latest: Vec<Denial>,
    /// How many there were, whether they are kept or not.
    pub count: u32,
}

impl Denials {
    /// Gives a refusal its id and remembers it. Its id and its time are filled in here.
    pub fn remember(&self, pod_uid: &str, mut denial: Denial) -> DenialId {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let first = *self.first.get_or_init(|| now.subsec_nanos().wrapping_mul(0x9e37_79b9));
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let id = DenialId::new(pod_uid, first.wrapping_add(number));
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
            // What was cut off would stay in memory with the rest.
            text.shrink_to_fit();
        }
        let (kept, most) = match denial.method.is_empty() {
            true => (&mut last.connections, CONNECTIONS),
            false => (&mut last.requests, REQUESTS),
        };
        if kept.len() >= most {
            kept.pop_front();
        }
        kept.push_back(Kept { number, denial });
        id
    }

    /// Those that are kept, the latest last.
    pub fn all(&self) -> Vec<Denial> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = last.connections.iter().chain(&last.requests);
        let mut all: Vec<Denial> = kept.map(|kept| kept.denial.clone()).collect();
        drop(last);
        all.sort_by_key(|denial| denial.at_unix_ms);
        all
    }

    /// The refusals from this number on, of which `most` are copied. The number of the next one is greater by their count.
    ///
    /// One that has its number and is not in the list yet is counted, and in no answer. The lock is held for a few copies
    /// only, because a refusal that finds it taken is not kept.
    pub fn since(&self, number: u32, most: usize) -> Since {
        let count = self.count.load(Ordering::Relaxed).wrapping_sub(number);
        if count == 0 {
            return Since::default();
        }
        let is_new = |kept: &&Kept| kept.number.wrapping_sub(number) < count;
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let requests = last.requests.iter().rev().filter(is_new);
        let connections = last.connections.iter().rev().filter(is_new);
        let latest = requests.chain(connections).take(most).map(|kept| kept.denial.clone()).collect();
        Since { latest, count }
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
    fn what_is_cut_off_takes_no_memory() {
        let denials = Denials::default();
        let long = || "x".repeat(60_000);
        denials.remember("uid", Denial { method: long(), host: long(), path: long(), ..Denial::default() });
        let last = denials.last.lock().unwrap();
        let Denial { method, host, path, .. } = &last.requests[0].denial;
        for text in [method, host, path] {
            assert!(text.capacity() < 2 * LONGEST, "{}", text.capacity());
        }
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
    fn what_is_new_is_found_by_number_requests_before_connections() {
        let denials = Denials::default();
        let request = |path: &str| Denial { method: "GET".into(), path: path.into(), ..Denial::default() };
        denials.remember("uid", request("/old"));
        let old = denials.since(0, 5);
        assert_eq!((old.count, old.latest.len()), (1, 1));
        assert_eq!(denials.since(1, 5).count, 0, "nothing since");
        denials.remember("uid", request("/a"));
        denials.remember("uid", Denial::default());
        denials.remember("uid", request("/b"));
        let paths = |most| -> Vec<String> {
            let since = denials.since(1, most);
            assert_eq!(since.count, 3);
            since.latest.into_iter().map(|denial| denial.path).collect()
        };
        assert_eq!(paths(5), ["/b", "/a", ""]);
        assert_eq!(paths(2), ["/b", "/a"]);
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
