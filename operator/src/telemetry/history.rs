//! What sidecars have counted over the last six hours, by series. No clock inside: times come in as Unix seconds.
//!
//! ```text
//!   now        the open slot, 10 s, as numbers
//!   11 min     slots of 10 s
//!   65 min     slots of a minute
//!   6 h        slots of five minutes
//! ```
//! Counts stand in exactly one slot: when a minute is older than ten minutes, its slots of 10 s become one of a minute,
//! and an hour later that becomes a part of one of five minutes. So nothing is counted twice, and a sum takes the slots
//! that start at or after the begin of its window, of whatever length.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use tulle_mesh::query;

pub use super::counts::Counts;
use super::slots::{Log, Reasons, add_to};
pub(super) use copy::Slot;
pub(super) use id::Interner;
pub use id::{Direction, Reporter, SeriesId};
use late::{Late, Slots, first_kept};

mod copy;
mod id;
mod late;
mod seen;

/// The lengths of slots in seconds.
pub(super) const TEN: i64 = 10;
pub(super) const MINUTE: i64 = 60;
pub(super) const FIVE: i64 = 300;
/// Windows up to this are summed from slots of 10 s.
pub(super) const BY_TEN: i64 = 600;
/// Windows up to this are summed from slots of a minute.
const BY_MINUTE: i64 = 3_600;
/// The longest window: nothing older is kept.
pub const LONGEST: i64 = 21_600;
/// Series that are kept. Beyond, those of a workload are one, named `_OTHER`.
pub const MAX_SERIES: usize = 5_000;
/// Series of one reporter that are kept: a workload whose pods make names up does not take the room of others. Beyond,
/// they are one, too.
pub(super) const MAX_OF_REPORTER: usize = 500;
/// Bytes of all slots that have ended. A typical series takes 10 kB, so that all of them are 50 MB, and one with a
/// latency in each bucket several times as much. Above it the oldest slots are dropped.
const MAX_HEAP: usize = 120 * 1024 * 1024;
/// The protocol of connections whose content is not looked at.
const OPAQUE: &str = "opaque";

/// Everything of some time, summed by series.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// The seconds that are summed. The slot in which the time begins counts whole, and so this may be longer than was
    /// asked for by less than a slot; it is shorter where less is known.
    pub window: u64,
    /// Reports that are known to be lost.
    pub lost: u64,
    /// The series, in order.
    pub series: Vec<(SeriesId, Counts)>,
}

/// The slots of a series.
#[derive(Debug)]
pub(super) struct Series {
    /// Counts up: a later series has a larger number.
    pub(super) number: u32,
    /// [`History::round`] when the open slot has last changed.
    changed: u32,
    /// The slots that got counts after they had ended.
    late: Late,
    /// The slot that has not ended, which starts at [`History::open`].
    now: Counts,
    tens: Log,
    minutes: Log,
    fives: Log,
}

impl Series {
    fn new(number: u32) -> Self {
        Self {
            number,
            changed: 0,
            late: Late::default(),
            now: Counts::default(),
            tens: Log::default(),
            minutes: Log::default(),
            fives: Log::default(),
        }
    }

    fn is_empty(&self) -> bool {
        self.now.is_empty() && self.tens.is_empty() && self.minutes.is_empty() && self.fives.is_empty()
    }

    /// What is in the open slot, if that has changed in this round of copying or a later one.
    pub(super) fn open_since(&self, round: u32) -> Option<&Counts> {
        (self.changed >= round && !self.now.is_empty()).then_some(&self.now)
    }

    /// The slots that got counts after they had ended, in this round of copying or a later one: length, start, counts.
    /// Where one has become a part of a minute since, it is that minute.
    pub(super) fn late_since(&self, round: u32, open: i64) -> impl Iterator<Item = (i64, i64, &[u8])> {
        let from = first_kept(open);
        self.late.since(round).into_iter().flat_map(move |late| {
            let all = slots(&self.minutes, MINUTE, from).chain(slots(&self.tens, TEN, from));
            all.filter(move |(step, start, _)| late.meets(*start, *step))
        })
    }

    /// The slots that have ended: length, start, counts. Those of the longest first.
    pub(super) fn ended(&self) -> impl Iterator<Item = (i64, i64, &[u8])> {
        self.ended_since(i64::MIN)
    }

    /// The same of those that start at or after a time.
    pub(super) fn ended_since(&self, from: i64) -> impl Iterator<Item = (i64, i64, &[u8])> {
        let longer = slots(&self.fives, FIVE, from).chain(slots(&self.minutes, MINUTE, from));
        longer.chain(slots(&self.tens, TEN, from))
    }

    /// Ends the open slot.
    fn end(&mut self, start: i64, reasons: &mut Reasons) {
        if !self.now.is_empty() {
            let ended = std::mem::take(&mut self.now);
            self.tens.add(TEN, start, &ended, reasons);
        }
    }

    /// Bytes on the heap of the slots that have ended.
    fn heap(&self) -> usize {
        self.tens.heap() + self.minutes.heap() + self.fives.heap()
    }

    /// Drops the slots that start before a time.
    fn drop_before(&mut self, limit: i64) {
        self.tens.drain_before(TEN, limit, |_, _| {});
        self.minutes.drain_before(MINUTE, limit, |_, _| {});
        self.fives.drain_before(FIVE, limit, |_, _| {});
    }

    /// Makes longer slots of those that are old at a time, and drops what nobody can ask for.
    fn roll(&mut self, now: i64, reasons: &mut Reasons) {
        roll(&mut self.tens, TEN, &mut self.minutes, MINUTE, first_ten(now), reasons);
        roll(&mut self.minutes, MINUTE, &mut self.fives, FIVE, floor(now - BY_MINUTE, FIVE), reasons);
        self.fives.drain_before(FIVE, floor(now - LONGEST, FIVE), |_, _| {});
    }

    /// What it counted since a time that is the start of a slot.
    fn since(&self, from: i64, open: i64, reasons: &Reasons) -> Counts {
        let mut sum = if open >= from { self.now.clone() } else { Counts::default() };
        for (_, _, body) in self.ended_since(from) {
            let _ = add_to(&mut sum, body, reasons);
        }
        sum
    }
}

fn slots(log: &Log, step: i64, from: i64) -> impl Iterator<Item = (i64, i64, &[u8])> {
    log.since(step, from).map(move |(start, body)| (step, start, body))
}

/// When the first slot of ten seconds starts that is not a part of a minute yet.
fn first_ten(open: i64) -> i64 {
    floor(open - BY_TEN, MINUTE)
}

/// Takes the slots that start before `limit`, which is the start of a longer slot, out of one log and adds them to
/// another.
fn roll(from: &mut Log, step: i64, to: &mut Log, longer: i64, limit: i64, reasons: &mut Reasons) {
    let mut sums: Vec<(i64, Counts)> = Vec::new();
    from.drain_before(step, limit, |start, body| {
        let start = floor(start, longer);
        if sums.last().is_none_or(|(last, _)| *last != start) {
            sums.push((start, Counts::default()));
        }
        if let Some((_, sum)) = sums.last_mut() {
            let _ = add_to(sum, body, reasons);
        }
    });
    for (start, sum) in &sums {
        to.add(longer, *start, sum, reasons);
    }
}

/// The start of the slot in which a time lies.
pub(super) fn floor(time: i64, step: i64) -> i64 {
    time - time.rem_euclid(step)
}

/// The length of slots that make up a window.
fn step_of(window: i64) -> i64 {
    if window <= BY_TEN {
        TEN
    } else if window <= BY_MINUTE {
        MINUTE
    } else {
        FIVE
    }
}

/// What sidecars have counted over the last six hours.
#[derive(Debug, Default)]
pub struct History {
    pub(super) series: HashMap<Arc<SeriesId>, Box<Series>>,
    /// How many each reporter has.
    reporters: HashMap<Reporter, usize>,
    /// The number of the next series.
    pub(super) next: u32,
    /// When the open slot starts. It never goes back, whatever the clock does.
    pub(super) open: i64,
    /// Counts up each time that a replica begins to copy what has changed in the open slot.
    pub(super) round: u32,
    /// The time of the first counts.
    pub(super) began: Option<i64>,
    /// Lost reports, by the start of a slot, ascending.
    lost: VecDeque<(i64, u64)>,
    pub(super) reasons: Reasons,
}

impl History {
    /// An empty history.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds counts of a series.
    pub fn add(&mut self, id: SeriesId, counts: &Counts, now: i64) {
        self.add_shared(&Arc::new(id), counts, now);
    }

    /// The same, of a series that others hold too.
    pub(super) fn add_shared(&mut self, id: &Arc<SeriesId>, counts: &Counts, now: i64) {
        self.sweep(now);
        self.begin_at(now);
        if !counts.is_empty() {
            self.open_of(id).merge(counts);
        }
    }

    /// The open slot of a series, which is about to change.
    fn open_of(&mut self, id: &Arc<SeriesId>) -> &mut Counts {
        let round = self.round;
        let series = self.entry(id);
        series.changed = round;
        &mut series.now
    }

    /// The same of counts that were made since `from`, at most ten minutes before: a part goes to each slot. Slots before
    /// the first counts get none, because nobody can ask for them.
    pub(super) fn add_over(&mut self, id: &Arc<SeriesId>, counts: &Counts, from: i64, now: i64) {
        self.sweep(now);
        self.begin_at(now);
        // By the open slot: it may be ahead of this caller's time, and what is before has become a part of a minute.
        let from = self.began.map_or(from, |began| from.max(began)).max(self.open - BY_TEN);
        let from = floor(from, TEN);
        let slots = seconds((self.open - from) / TEN) + 1;
        if slots == 1 || counts.is_empty() {
            self.add_shared(id, counts, now);
            return;
        }
        let starts = (from..self.open).step_by(usize::try_from(TEN).unwrap_or(1));
        let parts = starts.zip(0_u64..).map(|(start, part)| (start, counts.part(part, slots)));
        let parts: BTreeMap<i64, Counts> = parts.filter(|(_, part)| !part.is_empty()).collect();
        // The table is lent to the encoder, because the series is borrowed too.
        let mut reasons = std::mem::take(&mut self.reasons);
        let round = self.round;
        let series = self.entry(id);
        series.tens.add_all(TEN, &parts, &mut reasons);
        series.late.note(round, parts.keys().map(|start| Slots::of(*start)).collect());
        self.reasons = reasons;
        self.open_of(id).merge(&counts.part(slots - 1, slots));
    }

    /// Notes that reports of a sidecar never came.
    pub fn lost(&mut self, reports: u64, now: i64) {
        self.sweep(now);
        match self.lost.back_mut() {
            Some((start, lost)) if *start == self.open => *lost = lost.saturating_add(reports),
            _ => self.lost.push_back((self.open, reports)),
        }
    }

    /// Everything of the last `window` seconds, summed by series. The window is at least 10 s and at most six hours.
    pub fn since(&self, window: u64, now: i64) -> Sum {
        let (mut sum, from) = self.begin_sum(window, now);
        let mut ids = self.wanted(|_| true);
        ids.sort_unstable();
        sum.series = self.sums(&ids, from);
        sum
    }

    /// A sum without series, and the start of its first slot.
    pub(super) fn begin_sum(&self, window: u64, now: i64) -> (Sum, i64) {
        let (_, from) = self.window(window, now);
        let lost = self.lost.iter().filter(|(start, _)| *start >= from).map(|(_, lost)| lost);
        let sum = Sum {
            window: seconds(now - from).min(self.covered(now)),
            lost: lost.fold(0, |sum: u64, lost| sum.saturating_add(*lost)),
            series: Vec::new(),
        };
        (sum, from)
    }

    /// The series that are wanted, in no order.
    pub(super) fn wanted(&self, wanted: impl Fn(&SeriesId) -> bool) -> Vec<Arc<SeriesId>> {
        self.series.keys().filter(|id| wanted(id)).map(Arc::clone).collect()
    }

    /// What some series have counted in the slots since one that starts at `from`.
    pub(super) fn sums(&self, ids: &[Arc<SeriesId>], from: i64) -> Vec<(SeriesId, Counts)> {
        let known = ids.iter().filter_map(|id| Some((id, self.series.get(id)?)));
        let sums = known.map(|(id, series)| {
            let mut sum = series.since(from, self.open, &self.reasons);
            sum.judge(&*id.protocol == OPAQUE);
            (SeriesId::clone(id), sum)
        });
        sums.filter(|(_, sum)| !sum.is_empty()).collect()
    }

    /// What the series that are wanted have counted over time.
    pub fn timeline(&self, window: u64, now: i64, wanted: impl Fn(&SeriesId) -> bool) -> query::Timeline {
        let (step, from) = self.window(window, now);
        // Before the first counts nothing is known: no points, rather than points without requests.
        let from = self.began.map_or(from, |began| from.max(floor(began, step)));
        let number = usize::try_from((floor(now, step) - from) / step + 1).unwrap_or(0);
        if self.began.is_none() || number == 0 {
            return query::Timeline { step: step.unsigned_abs(), start: from, points: Vec::new() };
        }
        let mut points = vec![Counts::default(); number];
        let index = |start: i64| usize::try_from((start - from).div_euclid(step)).ok();
        for (id, series) in self.series.iter().filter(|(id, _)| wanted(id)) {
            let mut add = |start: i64, mut counts: Counts| {
                counts.judge(&*id.protocol == OPAQUE);
                if let Some(point) = index(start).and_then(|index| points.get_mut(index)) {
                    point.merge(&counts);
                }
            };
            add(self.open, series.now.clone());
            for (_, start, body) in series.ended_since(from) {
                let mut counts = Counts::default();
                let _ = add_to(&mut counts, body, &self.reasons);
                add(start, counts);
            }
        }
        let points = points.iter().zip((from..).step_by(usize::try_from(step).unwrap_or(1)));
        // The last point has not ended, and the first may have begun late.
        let length = |start: i64| {
            let begin = self.began.map_or(start, |began| began.max(start));
            seconds((start + step).min(now) - begin)
        };
        query::Timeline {
            step: step.unsigned_abs(),
            start: from,
            points: points.map(|(counts, start)| counts.golden(length(start))).collect(),
        }
    }

    /// Series that it holds.
    pub fn series(&self) -> usize {
        self.series.len()
    }

    /// Whether anything has been counted yet.
    pub(super) fn has_begun(&self) -> bool {
        self.began.is_some()
    }

    /// The seconds of history that there are.
    pub fn covered(&self, now: i64) -> u64 {
        self.began.map_or(0, |began| seconds((now - began).min(LONGEST)))
    }

    /// Bytes on the heap of the slots that have ended.
    pub fn heap(&self) -> usize {
        self.series.values().map(|series| series.heap()).sum()
    }

    /// Ends the open slot once its time is over, makes longer slots of old ones, and drops series without a slot. The
    /// first counts of each slot do it by themselves.
    pub fn sweep(&mut self, now: i64) {
        let start = floor(now, TEN);
        if start <= self.open {
            return;
        }
        let ended = std::mem::replace(&mut self.open, start);
        let (reasons, mut heap, round) = (&mut self.reasons, 0, self.round);
        let before = self.series.len();
        self.series.retain(|_, series| {
            series.end(ended, reasons);
            series.roll(start, reasons);
            series.late.roll(ended, start, round);
            heap += series.heap();
            !series.is_empty()
        });
        self.shrink(heap, MAX_HEAP);
        // Not each time: it is a copy of every reporter's name, and reports wait for it.
        if self.series.len() < before {
            self.reporters.clear();
            for id in self.series.keys() {
                *self.reporters.entry(id.reporter.clone()).or_default() += 1;
            }
        }
        let limit = floor(start - LONGEST, FIVE);
        while self.lost.front().is_some_and(|(start, _)| *start < limit) {
            self.lost.pop_front();
        }
    }

    /// Drops the oldest slots, half an hour after the other, until those that are left have at most so many bytes. Those of
    /// the last ten minutes stay. What is dropped is not covered any more.
    fn shrink(&mut self, mut heap: usize, most: usize) {
        let mut limit = floor(self.open - LONGEST, FIVE);
        let last = floor(self.open - BY_TEN, FIVE);
        while heap > most && limit < last {
            limit = (limit + 6 * FIVE).min(last);
            heap = 0;
            self.series.retain(|_, series| {
                series.drop_before(limit);
                heap += series.heap();
                !series.is_empty()
            });
            self.began = self.began.map(|began| began.max(limit));
        }
    }

    /// The length of a window's slots, and when the first of them starts.
    fn window(&self, window: u64, now: i64) -> (i64, i64) {
        let window = i64::try_from(window).unwrap_or(LONGEST).clamp(TEN, LONGEST);
        let step = step_of(window);
        (step, floor(now - window, step))
    }

    /// Something is known since a time.
    pub(super) fn begin_at(&mut self, time: i64) {
        self.began = Some(self.began.map_or(time, |began| began.min(time)));
    }

    fn entry(&mut self, id: &Arc<SeriesId>) -> &mut Series {
        let mut id = Arc::clone(id);
        if !self.series.contains_key(&*id) {
            let of_reporter = self.reporters.get(&id.reporter).copied().unwrap_or(0);
            if of_reporter >= MAX_OF_REPORTER || self.series.len() >= MAX_SERIES {
                id = Arc::new(SeriesId::other(id.reporter.clone(), id.direction, id.mtls));
            }
            // Reporters are workloads of the model; but there may be more of them, too.
            if self.series.len() >= 2 * MAX_SERIES && !self.series.contains_key(&*id) {
                id = Arc::new(SeriesId::other(Reporter::unknown(), id.direction, id.mtls));
            }
        }
        self.known(id)
    }

    /// A series under its own name.
    fn known(&mut self, id: Arc<SeriesId>) -> &mut Series {
        let (next, reporters) = (&mut self.next, &mut self.reporters);
        self.series.entry(id).or_insert_with_key(|id| {
            *reporters.entry(id.reporter.clone()).or_default() += 1;
            *next = next.wrapping_add(1);
            Box::new(Series::new(*next))
        })
    }
}

fn seconds(time: i64) -> u64 {
    u64::try_from(time).unwrap_or(0)
}

#[cfg(test)]
mod tests;
