//! The slots of a series that got counts after they had ended, until they have been copied.
//!
//! Another replica is sent these slots again, and no others. Which they are takes 16 bytes for each of the last rounds in
//! which there were any, and nothing for a series that got no late counts.

use super::{MINUTE, TEN, first_ten};

/// Rounds that are told apart. Each replica that copies begins one every two seconds, so that there are about as many
/// between two of the same replica as there are replicas. Of earlier rounds, a slot may be sent once more than needed.
const MAX_ROUNDS: usize = 4;
/// A slot is remembered for so many seconds after it has become a part of a minute, to be copied as that.
const AFTER: i64 = 5 * MINUTE;
/// Slots that a set tells apart. Those since [`first_kept`] are fewer.
const BITS: i64 = 128;

/// When the first slot starts that can be in a set.
pub(super) fn first_kept(open: i64) -> i64 {
    first_ten(open) - AFTER
}

/// A set of slots of ten seconds that lie within 21 minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slots(u128);

impl Slots {
    /// The slot that starts at a time.
    pub(super) fn of(start: i64) -> Self {
        Self::between(start, start + TEN)
    }

    /// Those that start at or after `from` and before `until`.
    fn between(from: i64, until: i64) -> Self {
        let number = until.saturating_sub(from).div_euclid(TEN).clamp(0, BITS);
        let ones = u32::try_from(BITS - number).ok().and_then(|others| u128::MAX.checked_shr(others));
        let place = u32::try_from(from.div_euclid(TEN).rem_euclid(BITS)).unwrap_or(0);
        Self(ones.unwrap_or(0).rotate_left(place))
    }

    fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether any of them is a part of the slot of this start and length, which is not before [`first_kept`].
    pub(super) fn meets(self, start: i64, step: i64) -> bool {
        !self.and(Self::between(start, start + step)).is_empty()
    }
}

impl FromIterator<Slots> for Slots {
    fn from_iter<I: IntoIterator<Item = Slots>>(all: I) -> Self {
        all.into_iter().fold(Self::default(), Self::or)
    }
}

/// Slots and the round of copying in which they got late counts last.
#[derive(Debug)]
struct Round {
    number: u32,
    slots: Slots,
}

/// The slots of a series that got late counts.
#[derive(Debug, Default)]
pub(super) struct Late {
    /// Ascending.
    rounds: Vec<Round>,
}

impl Late {
    /// Slots have got counts in this round.
    pub(super) fn note(&mut self, round: u32, slots: Slots) {
        if slots.is_empty() {
            return;
        }
        if let Some(last) = self.rounds.last_mut()
            && last.number == round
        {
            last.slots = last.slots.or(slots);
            return;
        }
        if self.rounds.len() >= MAX_ROUNDS {
            let first = self.rounds.remove(0);
            if let Some(second) = self.rounds.first_mut() {
                second.slots = second.slots.or(first.slots);
            }
        }
        self.rounds.push(Round { number: round, slots });
    }

    /// The slots that got counts in this round or a later one, if there are any.
    pub(super) fn since(&self, round: u32) -> Option<Slots> {
        let rounds = self.rounds.iter().filter(|known| known.number >= round);
        let slots: Slots = rounds.map(|known| known.slots).collect();
        (!slots.is_empty()).then_some(slots)
    }

    /// The open slot started at `before`, and starts at `open` now. What became a part of a minute by that is to be copied
    /// as that minute: it may not have been copied before, or a replica whose clock is ahead had no such slot any more.
    pub(super) fn roll(&mut self, before: i64, open: i64, round: u32) {
        if self.rounds.is_empty() {
            return;
        }
        let (from, until) = (first_ten(before), first_ten(open));
        if from < until {
            let all = self.since(0).unwrap_or_default();
            self.note(round, all.and(Slots::between(from, until)));
        }
        let kept = Slots::between(first_kept(open), open);
        self.rounds.iter_mut().for_each(|known| known.slots = known.slots.and(kept));
        self.rounds.retain(|known| !known.slots.is_empty());
        if self.rounds.is_empty() {
            // Without its room.
            self.rounds = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The start of a slot of every length.
    const START: i64 = 1_800_000_000;

    #[test]
    fn a_set_of_slots_has_those_that_were_put_into_it_and_no_others() {
        let kept = Slots::between(START, START + 1_280);
        assert_eq!((kept, Slots::between(START, START)), (Slots(u128::MAX), Slots::default()));
        for first in (START..START + 1_280).step_by(10) {
            let set: Slots = [first, first + 30].map(Slots::of).into_iter().collect();
            let found = (first..first + 1_280).step_by(10).filter(|start| set.meets(*start, TEN));
            assert_eq!(found.collect::<Vec<_>>(), [first, first + 30]);
            assert!(set.meets(first - 50, MINUTE) && !set.meets(first - 60, MINUTE));
        }
    }

    #[test]
    fn a_slot_is_copied_in_the_rounds_after_it_got_counts_and_not_in_later_ones() {
        let mut late = Late::default();
        for round in 5..50_u32 {
            late.note(round, Slots::of(START + 10 * i64::from(round)));
            let fresh = Slots::of(START + 10 * i64::from(round));
            assert_eq!((late.since(round), late.since(round + 1)), (Some(fresh), None));
            let two = late.since(round - 1).unwrap();
            assert!(two.meets(START + 10 * i64::from(round), TEN));
            assert!(!two.meets(START + 10 * i64::from(round - 2), TEN));
            assert!(late.rounds.len() <= MAX_ROUNDS);
        }
        let all: Slots = (5..50).map(|round| Slots::of(START + 10 * round)).collect();
        assert_eq!(late.since(0), Some(all), "nothing is forgotten before it is old");
    }

    #[test]
    fn a_slot_that_becomes_a_part_of_a_minute_is_copied_once_more_and_then_forgotten() {
        let mut late = Late::default();
        late.note(1, Slots::of(START + 20));
        let mut copied = Vec::new();
        for round in 4..200_u32 {
            let open = START + 10 * i64::from(round);
            late.roll(open - 10, open, round);
            if late.since(round).is_some_and(|slots| slots.meets(START, MINUTE)) {
                copied.push(open - START);
            }
        }
        assert_eq!(copied, [660], "the first open slot with which the minute is ten minutes old");
        assert_eq!(late.rounds.capacity(), 0);
    }
}
