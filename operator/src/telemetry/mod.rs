//! Aggregates of what sidecars report. Each report counts once, whichever replica it came through.
//!
//! In: reports. Out: sums per destination for `/metrics`, attempts per Canary for the rollout driver, which takes them
//! ([`Aggregates::take_attempts`]), and the last six hours of every series ([`Aggregates::history`]). Bounded in
//! memory, because names come from sidecars.
//!
//! ```text
//!   query      tables, edges and timelines out of the history
//!   replicate  a replica that does not lead copies the leader's history
//!   history    what sidecars have counted over the last six hours, by series
//!   slots      slots of time, as bytes
//!   keys       the series that a sidecar's process has named
//!   rules      what rules of policies have refused, or would have
//!   denials    the last single requests that they have refused
//!   counts     counts of a series, and what they say
//! ```

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tulle_mesh::histogram::Histogram;
use tulle_mesh::proto::{AttemptCounts, HistoryDenial, TelemetryReport};
use tulle_mesh::query::Denials;

use crate::model::{Key, Model};
use counts::{OTHER, Verdicts};
use denials::DenialLog;
use history::{Direction, History, Interner, Reporter, SeriesId, Sum};
use keys::Process;
use rules::{RuleId, Rules};

pub mod counts;
pub mod denials;
pub mod history;
mod keys;
pub mod query;
pub mod replicate;
pub mod rules;
mod slots;
#[cfg(test)]
mod tests;

/// Entries that are kept for a Canary until the driver takes them, one per epoch, revision and pod.
const MAX_ATTEMPTS: usize = 4096;
/// Canaries whose attempts are kept. A sidecar may report Canaries that do not exist.
const MAX_CANARIES: usize = 4096;
/// Numbers in the buckets of one entry: pairs of bucket and count.
const MAX_BUCKETS: usize = 2 * tulle_mesh::histogram::BUCKETS;
/// Destinations that are summed for `/metrics`. Beyond, all others are one.
const MAX_DESTINATIONS: usize = 10_000;
/// Processes of a pod's sidecar whose keys are kept: this one and the one before.
const MAX_PROCESSES: usize = 2;
/// Reports that one gap counts as lost: a sidecar may number its reports as it likes.
const MAX_LOST: u64 = 1_000;
/// A report of more seconds is spread over them: its sidecar could not report before. Costs as many slots as it spans.
const LONG: i64 = 20;
/// Series that are summed before others may use the history.
const PORTION: usize = 100;

/// Requests and failures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Number of requests.
    pub requests: u64,
    /// How many of those requests failed.
    pub failures: u64,
}

/// A revision of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub service: String,
    /// Revision of the pods; empty for pods without one.
    pub revision: String,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It was counted.
    Counted,
    /// It was counted before.
    Replay,
    /// It names a key that is not known: nothing of it was counted, and it is to come again with all keys.
    Forgotten,
}

/// Who reports from a pod: its workload, or the pod itself where it has none. `None`: the model does not know the pod.
pub fn reporter_of(model: &Model, pod_uid: &str) -> Option<Reporter> {
    model.pod(pod_uid).map(query::reporter)
}

/// What sidecars have reported since this replica started.
#[derive(Debug, Default)]
pub struct Aggregates {
    // Never locked together with the history: a caller may hold either.
    inner: Mutex<Inner>,
    history: Mutex<History>,
}

#[derive(Debug, Default)]
struct Inner {
    /// By pod uid; the newest process is the last one.
    processes: HashMap<String, Vec<Process>>,
    interner: Interner,
    /// By namespace, Service and revision.
    destinations: HashMap<[Arc<str>; 3], (Counts, Histogram)>,
    rules: Rules,
    denials: DenialLog,
    refused: BTreeMap<(&'static str, &'static str), u64>,
    attempts: HashMap<Key, Attempts>,
    /// In which this replica leads, or has led last.
    term: Option<i32>,
}

/// Attempts at the pods of one Canary, by epoch, revision and pod.
type Attempts = HashMap<(u64, String, String), AttemptCounts>;

/// What of a report goes to the history.
#[derive(Debug, Default)]
struct News {
    lost: u64,
    /// The seconds in which it was counted; 0: not known.
    seconds: i64,
    series: Vec<(Arc<SeriesId>, history::Counts)>,
}

impl Inner {
    fn add(
        &mut self,
        pod_uid: &str,
        reporter: Option<Reporter>,
        report: &TelemetryReport,
        now: i64,
    ) -> (Taken, News) {
        let mut news = News::default();
        if !self.processes.contains_key(pod_uid) {
            self.processes.insert(pod_uid.to_owned(), Vec::new());
        }
        let processes = self.processes.get_mut(pod_uid);
        let process = processes.and_then(|all| keys::process(all, report.process, MAX_PROCESSES));
        let Some(process) = process.filter(|process| report.sequence > process.last) else {
            return (Taken::Replay, news);
        };
        let denials = report.denials.as_ref().zip(reporter.clone());
        process.report_as(reporter, &mut self.interner);
        process.learn(&report.keys, &report.rule_keys, &mut self.interner);
        let mut named = report.series.iter().map(|counts| counts.key);
        let mut rules = report.rules.iter().map(|counts| counts.key);
        if !named.all(|key| process.knows(key)) || !rules.all(|key| process.knows(key)) {
            return (Taken::Forgotten, news);
        }
        if process.last > 0 {
            let interval = i64::try_from(report.interval_ms / 1000).unwrap_or(0);
            news.seconds = process.seconds(interval.min(history::BY_TEN), now);
            // What is missing since another term has come to another leader.
            if process.term == self.term {
                news.lost = (report.sequence - process.last - 1).min(MAX_LOST);
            }
        }
        (process.last, process.term) = (report.sequence, self.term);
        for counts in &report.series {
            if let Some(id) = process.series(counts.key) {
                news.series.push((id, history::Counts::of(counts)));
            }
        }
        for counts in &report.rules {
            if let Some(id) = process.series(counts.key).filter(|id| id.direction == Direction::Policy) {
                let counts = history::Counts::of_rule(counts);
                self.rules.add(&id, counts.verdicts());
                news.series.push((id, counts));
            }
        }
        for (id, counts) in news.series.iter().filter(|(id, _)| id.direction == Direction::Outbound) {
            let destination = [&id.namespace, &id.peer, &id.revision].map(Arc::clone);
            let (total, latency) = destination_of(&mut self.destinations, destination);
            total.requests = total.requests.saturating_add(counts.requests());
            total.failures = total.failures.saturating_add(counts.failures());
            latency.merge(&counts.latency);
        }
        if let Some((denials, reporter)) = denials {
            self.denials.add(pod_uid, &reporter, denials, now);
        }
        self.add_old(report);
        for counts in &report.attempts {
            self.add_attempts(counts);
        }
        (Taken::Counted, news)
    }

    /// Counts of a sidecar of the version before series. It does not say whether mTLS secured them, and so they are in
    /// no history.
    fn add_old(&mut self, report: &TelemetryReport) {
        for counts in &report.counts {
            let destination =
                [&counts.namespace, &counts.service, &counts.revision].map(|name| self.interner.name(name));
            let (total, latency) = destination_of(&mut self.destinations, destination);
            total.requests = total.requests.saturating_add(counts.requests);
            total.failures = total.failures.saturating_add(counts.failures);
            for pair in counts.buckets.chunks_exact(2) {
                if let [bucket, count] = pair {
                    latency.add(usize::try_from(*bucket).unwrap_or(usize::MAX), *count);
                }
            }
            latency.add_sum(counts.sum_micros);
        }
    }

    fn add_attempts(&mut self, counts: &AttemptCounts) {
        let key: Key = (counts.namespace.as_str().into(), counts.canary.as_str().into());
        if !self.attempts.contains_key(&key) && self.attempts.len() >= MAX_CANARIES {
            return;
        }
        let of_canary = self.attempts.entry(key).or_default();
        let full = of_canary.len() >= MAX_ATTEMPTS;
        let id = (counts.epoch, counts.revision.clone(), counts.pod_uid.clone());
        match of_canary.entry(id) {
            Entry::Occupied(mut known) => merge(known.get_mut(), counts),
            Entry::Vacant(free) if !full => {
                let mut first = AttemptCounts {
                    attempts: 0,
                    failures: 0,
                    unreached: 0,
                    client_errors: 0,
                    buckets: Vec::new(),
                    ..counts.clone()
                };
                merge(&mut first, counts);
                free.insert(first);
            }
            Entry::Vacant(_) => {}
        }
    }
}

/// The sums of a destination; of those that are too many, of all others.
fn destination_of(
    sums: &mut HashMap<[Arc<str>; 3], (Counts, Histogram)>,
    mut destination: [Arc<str>; 3],
) -> &mut (Counts, Histogram) {
    if sums.len() >= MAX_DESTINATIONS && !sums.contains_key(&destination) {
        destination = [Arc::default(), OTHER.into(), Arc::default()];
    }
    sums.entry(destination).or_default()
}

/// Adds counts to a sum with the same key. Failures and client errors are capped at the number of attempts.
fn merge(sum: &mut AttemptCounts, counts: &AttemptCounts) {
    let failures = counts.failures.min(counts.attempts);
    sum.attempts = sum.attempts.saturating_add(counts.attempts);
    sum.failures = sum.failures.saturating_add(failures);
    sum.unreached = sum.unreached.saturating_add(counts.unreached.min(failures));
    sum.client_errors = sum.client_errors.saturating_add(counts.client_errors.min(counts.attempts));
    for pair in counts.buckets.chunks_exact(2) {
        let [bucket, count] = pair else { continue };
        let full = sum.buckets.len() >= MAX_BUCKETS;
        let known = sum.buckets.chunks_exact_mut(2).find(|known| known.first() == Some(bucket));
        if let Some(total) = known.and_then(|known| known.last_mut()) {
            *total = total.saturating_add(*count);
        } else if !full {
            sum.buckets.extend([*bucket, *count]);
        }
    }
}

impl Aggregates {
    /// Adds a report of a pod's sidecar.
    pub fn add(&self, pod_uid: &str, reporter: Option<Reporter>, report: &TelemetryReport) -> Taken {
        self.add_at(pod_uid, reporter, report, now())
    }

    /// The same, at a time in Unix seconds.
    pub fn add_at(
        &self,
        pod_uid: &str,
        reporter: Option<Reporter>,
        report: &TelemetryReport,
        now: i64,
    ) -> Taken {
        let (taken, news) = lock(&self.inner).add(pod_uid, reporter, report, now);
        if taken != Taken::Counted {
            return taken;
        }
        let mut history = self.history();
        if news.lost > 0 {
            history.lost(news.lost, now);
        }
        if !news.series.is_empty() && news.seconds > 0 {
            history.begin_at(now - news.seconds);
        }
        if news.seconds <= LONG {
            news.series.iter().for_each(|(id, counts)| history.add_shared(id, counts, now));
            return Taken::Counted;
        }
        drop(history);
        // A series may write sixty slots, and a report may have two thousand series: the lock is released in between.
        for (id, counts) in &news.series {
            self.history().add_over(id, counts, now - news.seconds, now);
        }
        Taken::Counted
    }

    /// This replica leads, in this term ([`crate::lease::Leadership::epoch`]). What the leader before has counted after its
    /// history was last copied is missing here: that is noted as one report that is lost.
    pub fn lead(&self, term: i32) {
        self.lead_at(term, now());
    }

    /// The same, at a time in Unix seconds.
    pub fn lead_at(&self, term: i32, now: i64) {
        if lock(&self.inner).term.replace(term) == Some(term) {
            return;
        }
        let mut history = self.history();
        if history.has_begun() {
            history.lost(1, now);
        }
    }

    /// Everything of the last `window` seconds about the series that are wanted, as [`History::since`] sums it. The
    /// history is locked for some series at a time: reports do not wait for all of them.
    pub fn sum(&self, window: u64, now: i64, wanted: impl Fn(&SeriesId) -> bool) -> Sum {
        let (mut sum, from, mut ids) = {
            let history = self.history();
            let (sum, from) = history.begin_sum(window, now);
            (sum, from, history.wanted(wanted))
        };
        ids.sort_unstable();
        for portion in ids.chunks(PORTION) {
            let sums = self.history().sums(portion, from);
            sum.series.extend(sums);
        }
        sum
    }

    /// What sidecars have counted over the last six hours.
    pub fn history(&self) -> MutexGuard<'_, History> {
        lock(&self.history)
    }

    /// Takes the attempts at the pods of a Canary that were reported since the last call.
    pub fn take_attempts(&self, canary: &Key) -> Vec<AttemptCounts> {
        let mut inner = lock(&self.inner);
        inner.attempts.remove(canary).map(|counts| counts.into_values().collect()).unwrap_or_default()
    }

    /// Removes the attempts of Canaries that are not `known`.
    pub fn retain_canaries(&self, known: impl Fn(&Key) -> bool) {
        let mut inner = lock(&self.inner);
        inner.attempts.retain(|key, _| known(key));
    }

    /// Removes the sums of pods and revisions that no longer exist: `pod` is given a uid, `revision` a namespace and a
    /// name. Called every few minutes; the driver has taken what it needs by then.
    pub fn retain(&self, pod: impl Fn(&str) -> bool, revision: impl Fn(&str, &str) -> bool) {
        let mut inner = lock(&self.inner);
        inner.processes.retain(|uid, _| pod(uid));
        inner.destinations.retain(|[namespace, _, of], _| of.is_empty() || revision(namespace, of));
        inner.interner.clean();
        inner.denials.sweep(now());
        drop(inner);
        self.history().sweep(now());
    }

    /// Counts a call that the operator has refused.
    pub fn refused(&self, what: &'static str, reason: &'static str) {
        let mut inner = lock(&self.inner);
        *inner.refused.entry((what, reason)).or_default() += 1;
    }

    /// Refused calls by kind of call and reason, for `/metrics`.
    pub fn refusals(&self) -> Vec<((&'static str, &'static str), u64)> {
        let inner = lock(&self.inner);
        inner.refused.iter().map(|(key, count)| (*key, *count)).collect()
    }

    /// What each rule of the policies that `exists` knows has decided, for `/metrics`. The sums of other policies are
    /// removed.
    pub fn rules(&self, exists: impl Fn(&Key) -> bool) -> Vec<(RuleId, Verdicts)> {
        let mut inner = lock(&self.inner);
        inner.rules.retain(exists);
        inner.rules.all()
    }

    /// Denials for another replica, at most `most` of those that have come since this was last called with `number`.
    fn denials_since(&self, number: &mut u64, most: usize) -> Vec<HistoryDenial> {
        let (found, next) = lock(&self.inner).denials.since(*number, most);
        *number = next;
        found
    }

    /// Takes denials that the leader has.
    fn copy_denials(&self, copied: &[HistoryDenial], now: i64) {
        if copied.is_empty() {
            return;
        }
        let mut inner = lock(&self.inner);
        copied.iter().for_each(|copied| inner.denials.copy(copied, now));
    }

    /// The last denials at the workloads that are wanted. On a replica that does not lead, as far as they are copied.
    pub fn denials(&self, wanted: impl Fn(&Reporter) -> bool) -> Denials {
        lock(&self.inner).denials.last(wanted, now())
    }

    /// All destinations, for `/metrics`.
    pub fn all(&self) -> Vec<(Destination, Counts, Histogram)> {
        let inner = lock(&self.inner);
        let all = inner.destinations.iter().map(|([namespace, service, revision], (counts, latency))| {
            let destination = Destination {
                namespace: namespace.to_string(),
                service: service.to_string(),
                revision: revision.to_string(),
            };
            (destination, *counts, latency.clone())
        });
        all.collect()
    }
}

/// Unix seconds, by the clock of the history.
pub(crate) fn now() -> i64 {
    i64::try_from(clock().as_secs()).unwrap_or(i64::MAX)
}

/// The Unix time at which this process first asked for it, and what has passed since. It never goes back: what was
/// counted in the future of a clock that is set back would be in no window, and nothing after it either.
fn clock() -> Duration {
    static START: OnceLock<(Duration, Instant)> = OnceLock::new();
    let start = || (SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), Instant::now());
    let (unix, at) = START.get_or_init(start);
    *unix + at.elapsed()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
