//! What another replica has counted, and a copy of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::super::slots::{Log, Reasons, add_to};
use super::{Counts, History, MAX_SERIES, MINUTE, SeriesId, TEN, first_ten};

/// What a series has in a slot.
#[derive(Debug)]
pub(in crate::telemetry) struct Slot {
    /// Its length in seconds.
    pub step: i64,
    /// When it starts.
    pub start: i64,
    /// All that was counted in it.
    pub counts: Counts,
}

impl History {
    /// Makes counts those of slots of a series, as another replica has counted them: all at once, because each call writes
    /// the series' slots from the first of these on. The slot that is open here may have ended there.
    pub(in crate::telemetry) fn set(&mut self, id: &Arc<SeriesId>, slots: impl Iterator<Item = Slot>) {
        let mut ended: BTreeMap<i64, BTreeMap<i64, Counts>> = BTreeMap::new();
        for Slot { step, start, counts } in slots {
            if step == TEN && start < first_ten(self.open) {
                // It is part of a longer slot here. If it got counts late, it comes again as a part of that.
                continue;
            }
            self.begin_at(start);
            // It is within the bounds of the other replica. Together with others here, it would replace their counts.
            if self.series.len() < 2 * MAX_SERIES {
                self.known(Arc::clone(id));
            }
            if step == TEN && start == self.open {
                *self.open_of(id) = counts;
                continue;
            }
            if step == MINUTE {
                // Those that are not a part of it here yet would be added to it.
                self.entry(id).tens.remove(TEN, start, start + MINUTE);
            }
            ended.entry(step).or_default().insert(start, counts);
        }
        for (step, slots) in &ended {
            self.change_ended(id, *step, |log, reasons| log.set_all(*step, slots, reasons));
        }
    }

    /// Adds counts of a slot that has ended elsewhere.
    fn add_ended(&mut self, id: &Arc<SeriesId>, step: i64, start: i64, counts: &Counts) {
        self.begin_at(start);
        self.change_ended(id, step, |log, reasons| log.add(step, start, counts, reasons));
    }

    fn change_ended(&mut self, id: &Arc<SeriesId>, step: i64, change: impl FnOnce(&mut Log, &mut Reasons)) {
        // The table is lent to the encoder, because the series is borrowed too.
        let mut reasons = std::mem::take(&mut self.reasons);
        let series = self.entry(id);
        let log = match step {
            TEN => &mut series.tens,
            MINUTE => &mut series.minutes,
            _ => &mut series.fives,
        };
        change(log, &mut reasons);
        self.reasons = reasons;
    }

    /// Lost reports by the start of a slot, of the slots that are wanted.
    pub(in crate::telemetry) fn lost_in(
        &self,
        wanted: impl Fn(i64) -> bool,
    ) -> impl Iterator<Item = (i64, u64)> {
        self.lost.iter().copied().filter(move |(start, _)| wanted(*start))
    }

    /// Makes a number that of the lost reports of a slot.
    pub(in crate::telemetry) fn set_lost(&mut self, start: i64, reports: u64) {
        match self.lost.binary_search_by_key(&start, |(start, _)| *start) {
            Ok(known) => {
                if let Some((_, lost)) = self.lost.get_mut(known) {
                    *lost = reports;
                }
            }
            Err(place) => self.lost.insert(place, (start, reports)),
        }
    }

    /// Adds what another history knows of the time after this one has last been kept.
    pub(in crate::telemetry) fn append(&mut self, newer: &Self, now: i64) {
        // The slot that was open here has what it has until this replica was told no more.
        let (until, began) = (self.open, newer.began.unwrap_or(i64::MAX));
        if began < until {
            // The other one has counted from the start of that slot: what is here of it is a copy.
            self.series.values_mut().for_each(|series| series.now = Counts::default());
            self.lost.retain(|(start, _)| *start != until);
        }
        self.sweep(now);
        // If it is open still, what the other one counts in it comes beside that, and not in its place.
        let (open, reasons) = (self.open, &mut self.reasons);
        self.series.values_mut().for_each(|series| series.end(open, reasons));
        for (id, series) in &newer.series {
            // A slot that starts before may yet have only what came after, where the other one has begun after.
            let slots = series.ended().filter(|(_, start, _)| (*start).max(began) >= until);
            for (step, start, body) in slots {
                let mut counts = Counts::default();
                let _ = add_to(&mut counts, body, &newer.reasons);
                self.add_ended(id, step, start, &counts);
            }
        }
        for (start, reports) in newer.lost_in(|start| start.max(began) >= until) {
            let known = self.lost_in(|known| known == start).map(|(_, lost)| lost).sum::<u64>();
            self.set_lost(start, known.saturating_add(reports));
        }
    }
}
