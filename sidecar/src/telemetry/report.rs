//! Deltas for the operator: numbered, one under way at a time, sent again until acknowledged.
//!
//! What distinguishes a series is sent once and has a number from then on, by which its counts name it. An operator that
//! does not know a number counts nothing of the report, and says so: the report then goes again with all of its keys,
//! and every other key goes again with the next counts of its series.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tulle_mesh::proto::{self, ReasonCount, SeriesCounts, TelemetryAck, TelemetryReport};

use super::rules::RuleKey;
use super::{Series, SeriesKey, Telemetry};
use denials::ReportedDenials;
use rules::ReportedRules;

mod denials;
mod rules;

/// Makes reports of what has changed since the last one.
#[derive(Debug)]
pub struct Reporter {
    telemetry: Arc<Telemetry>,
    process: u64,
    sequence: u64,
    sent: HashMap<SeriesKey, Sent>,
    rules: ReportedRules,
    denials: ReportedDenials,
    /// The number of the next key, of a series or a rule. None is used twice.
    next_id: u32,
    under_way: Option<TelemetryReport>,
    /// When it was sent.
    sent_at: Option<Instant>,
    resend: bool,
    /// When counts are looked at next; `None`: at once.
    due: Option<Instant>,
    /// When counts were looked at last.
    reported_at: Option<Instant>,
    /// When series were looked at last for those of workloads that are gone.
    evicted_at: Option<Instant>,
    /// When the certificate ends, in Unix seconds; 0: there is none.
    certificate: i64,
    /// What was reported of that.
    reported_certificate: i64,
}

/// How often it is looked whether there are attempts under a Canary to report, or a report is to go again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often other counts are reported, when there are new ones: nobody decides by them.
const COUNTS_EVERY: Duration = Duration::from_secs(5);
/// How often series of workloads that are gone are looked for.
const EVICT_EVERY: Duration = Duration::from_secs(60);
/// Without an acknowledgement for so long a report goes again: the leader may have changed while it was on its
/// way.
const RESEND_AFTER: Duration = Duration::from_secs(5);

/// A time up to a fifth shorter or longer, so that the sidecars of a cluster do not report all at once.
fn jittered(time: Duration) -> Duration {
    time.mul_f64(0.8 + 0.4 * fastrand::f64())
}

/// What has been reported of a series.
#[derive(Debug)]
struct Sent {
    /// The number of its key.
    id: u32,
    /// The operator has the key, or it is in the report that is under way.
    is_introduced: bool,
    /// The last report that the series is in.
    sequence: u64,
    /// [`Series::activity`], read before the counts were.
    activity: u64,
    counts: Counts,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    classes: [u64; 8],
    /// Those that are not empty, ascending, each with its number.
    buckets: Vec<(usize, u64)>,
    sum_micros: u64,
    bytes_up: u64,
    bytes_down: u64,
    connections: u64,
    retries: u64,
    ejections: u64,
    reasons: Vec<(&'static str, u64)>,
}

impl Counts {
    fn of(series: &Series) -> Self {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let buckets = series.latency.iter().map(read).enumerate();
        let mut reasons = series.failures();
        reasons.sort_unstable();
        Self {
            classes: series.by_class.each_ref().map(read),
            buckets: buckets.filter(|(_, count)| *count > 0).collect(),
            sum_micros: read(&series.latency_sum),
            bytes_up: read(&series.bytes_up),
            bytes_down: read(&series.bytes_down),
            connections: read(&series.connections),
            retries: read(&series.retries),
            ejections: read(&series.ejections),
            reasons,
        }
    }

    /// What has been counted since `before`, as counts of the key with this number.
    fn since(&self, before: &Self, key: u32) -> SeriesCounts {
        let classes = self.classes.iter().zip(before.classes);
        let mut classes: Vec<u64> = classes.map(|(now, before)| now.saturating_sub(before)).collect();
        while classes.last() == Some(&0) {
            classes.pop();
        }
        let (mut buckets, mut last) = (Vec::new(), 0);
        for (bucket, count) in more(&self.buckets, &before.buckets) {
            // The distance to the one before: most are less than 128, which is a byte.
            buckets.extend([bucket.saturating_sub(last) as u64, count]);
            last = bucket;
        }
        let reasons = more(&self.reasons, &before.reasons);
        SeriesCounts {
            key,
            classes,
            buckets,
            sum_micros: self.sum_micros.saturating_sub(before.sum_micros),
            bytes_up: self.bytes_up.saturating_sub(before.bytes_up),
            bytes_down: self.bytes_down.saturating_sub(before.bytes_down),
            connections: self.connections.saturating_sub(before.connections),
            reasons: reasons
                .map(|(reason, count)| ReasonCount { reason: reason.to_owned(), count })
                .collect(),
            retries: self.retries.saturating_sub(before.retries),
            ejections: self.ejections.saturating_sub(before.ejections),
        }
    }
}

/// What has been added since `before`, where something has been. Both are in order.
fn more<'a, T: Copy + Ord>(now: &'a [(T, u64)], before: &'a [(T, u64)]) -> impl Iterator<Item = (T, u64)> {
    let old = move |of: T| {
        let found = before.binary_search_by_key(&of, |(known, _)| *known).ok();
        found.and_then(|index| before.get(index)).map_or(0, |(_, count)| *count)
    };
    now.iter().map(move |(of, count)| (*of, count.saturating_sub(old(*of)))).filter(|(_, count)| *count > 0)
}

/// What the operator is told of a series, once.
fn introduction(key: &SeriesKey, id: u32) -> proto::SeriesKey {
    proto::SeriesKey {
        id,
        direction: key.wire_direction().into(),
        namespace: key.namespace.clone(),
        peer: key.peer.clone(),
        revision: key.revision.clone(),
        route: key.route.to_string(),
        protocol: key.protocol.to_owned(),
        mtls: key.mtls,
    }
}

impl Reporter {
    /// A reporter for this process.
    pub fn new(telemetry: Arc<Telemetry>) -> Self {
        Self {
            telemetry,
            process: fastrand::u64(1..),
            sequence: 0,
            sent: HashMap::new(),
            rules: ReportedRules::default(),
            denials: ReportedDenials::default(),
            next_id: 1,
            under_way: None,
            sent_at: None,
            resend: false,
            due: None,
            reported_at: None,
            evicted_at: None,
            certificate: 0,
            reported_certificate: 0,
        }
    }

    /// How long to wait before the next look.
    pub fn pause() -> Duration {
        jittered(LOOK_EVERY)
    }

    /// The next look reports whatever there is.
    pub fn flush(&mut self) {
        self.due = None;
        self.denials.flush();
    }

    /// The stream is new: what was under way goes again, under its number. What the sidecar says of itself is said again,
    /// also if it has nothing to count: the operator may have restarted, and keeps that in memory only.
    pub fn reconnected(&mut self) {
        self.resend = true;
        self.reported_certificate = 0;
    }

    /// When the present certificate ends, in Unix seconds.
    pub fn set_certificate(&mut self, not_after: i64) {
        self.certificate = not_after;
    }

    /// The operator has counted a report, or has forgotten what its numbers mean.
    pub fn acknowledged(&mut self, ack: TelemetryAck) {
        let Some(report) = self.under_way.as_mut().filter(|report| report.sequence == ack.sequence) else {
            return;
        };
        if !ack.forgotten {
            self.under_way = None;
            return;
        }
        report.keys.clear();
        for (key, sent) in &mut self.sent {
            sent.is_introduced = sent.sequence == ack.sequence;
            if sent.is_introduced {
                report.keys.push(introduction(key, sent.id));
            }
        }
        report.keys.sort_unstable_by_key(|key| key.id);
        report.rule_keys = self.rules.introduce_again(ack.sequence);
        self.resend = true;
    }

    /// Whether everything that was sent has been counted by the operator.
    pub fn is_idle(&self) -> bool {
        self.under_way.is_none()
    }

    /// The next report, if there is anything to say and nothing is under way. Attempts under a Canary are said at
    /// once, and all else with them; without any, the rest waits until it is due.
    pub fn next_report(&mut self, now: Instant) -> Option<TelemetryReport> {
        if let Some(report) = &self.under_way {
            let late = self.sent_at.is_none_or(|at| now.duration_since(at) >= RESEND_AFTER);
            if !std::mem::take(&mut self.resend) && !late {
                return None;
            }
            self.sent_at = Some(now);
            return Some(report.clone());
        }
        self.resend = false;
        let attempts = self.telemetry.attempts.take();
        if attempts.is_empty() && self.due.is_some_and(|due| now < due) {
            return None;
        }
        self.due = Some(now + jittered(COUNTS_EVERY));
        let sequence = self.sequence + 1;
        let (keys, series) = self.series(sequence);
        let (rule_keys, rules) = self.rules.changed(&self.telemetry.rules, sequence, &mut self.next_id);
        let denials = self.denials.changed(&self.telemetry.denials, now);
        self.evict(now, sequence);
        let since = self.reported_at.replace(now).map_or(LOOK_EVERY, |before| now.duration_since(before));
        let is_empty = series.is_empty() && rules.is_empty() && attempts.is_empty() && denials.is_none();
        if is_empty && self.certificate == self.reported_certificate {
            return None;
        }
        self.sequence = sequence;
        self.reported_certificate = self.certificate;
        let report = TelemetryReport {
            sequence,
            process: self.process,
            counts: Vec::new(),
            interval_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            attempts,
            keys,
            series,
            certificate_not_after_unix: self.certificate,
            memory_bytes: crate::memory::resident().unwrap_or(0),
            rule_keys,
            rules,
            denials,
        };
        self.sent_at = Some(now);
        self.under_way = Some(report.clone());
        Some(report)
    }

    /// Drops the series of workloads that are gone, once the operator has their counts: not those of the report that is
    /// being made, whose keys may have to go again.
    fn evict(&mut self, now: Instant, sequence: u64) {
        if self.evicted_at.is_some_and(|at| now.duration_since(at) < EVICT_EVERY) {
            return;
        }
        self.evicted_at = Some(now);
        let sent = &self.sent;
        let is_reported = |key: &SeriesKey, series: &Series| match sent.get(key) {
            Some(sent) => sent.sequence != sequence && sent.activity == series.activity(),
            None => series.activity() == 0,
        };
        for key in self.telemetry.evict(now, is_reported) {
            // One that comes back begins at zero, with another number.
            self.sent.remove(&key);
        }
        let rules = &self.rules;
        let is_reported = |key: &RuleKey, totals| rules.is_reported(key, totals, sequence);
        for key in self.telemetry.rules.evict(now, is_reported) {
            self.rules.forget(&key);
        }
    }

    /// What has changed in the series since the last report, and the keys that the operator does not have.
    fn series(&mut self, sequence: u64) -> (Vec<proto::SeriesKey>, Vec<SeriesCounts>) {
        let (mut keys, mut changed) = (Vec::new(), Vec::new());
        for (key, series) in self.telemetry.all() {
            // Read first: what is counted meanwhile changes it, and is found at the next look.
            let activity = series.activity();
            if self.sent.get(&key).map_or(0, |sent| sent.activity) == activity {
                continue;
            }
            let counts = Counts::of(&series);
            let next_id = &mut self.next_id;
            let sent = self.sent.entry(key.clone()).or_insert_with(|| {
                let id = *next_id;
                *next_id = next_id.wrapping_add(1);
                Sent { id, is_introduced: false, sequence: 0, activity: 0, counts: Counts::default() }
            });
            if !std::mem::replace(&mut sent.is_introduced, true) {
                keys.push(introduction(&key, sent.id));
            }
            changed.push(counts.since(&sent.counts, sent.id));
            (sent.sequence, sent.activity, sent.counts) = (sequence, activity, counts);
        }
        (keys, changed)
    }
}

#[cfg(test)]
mod tests;
