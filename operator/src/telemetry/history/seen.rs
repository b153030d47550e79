//! When series were counted last.

use std::sync::Arc;

use super::{FIVE, History, MINUTE, Series, SeriesId, TEN};

impl Series {
    /// The end of the last slot in which something was counted. Where slots have become a part of a longer one, the end
    /// of that.
    fn last_end(&self, open: i64) -> Option<i64> {
        let ended = [(&self.tens, TEN), (&self.minutes, MINUTE), (&self.fives, FIVE)];
        let ended = ended.into_iter().filter_map(|(log, step)| Some(log.last_start()? + step));
        ended.chain((!self.now.is_empty()).then_some(open + TEN)).max()
    }
}

impl History {
    /// When each series that is wanted was counted last, in Unix seconds: the end of the slot in which that was.
    pub fn last_seen(&self, wanted: impl Fn(&SeriesId) -> bool) -> Vec<(Arc<SeriesId>, i64)> {
        let wanted = self.series.iter().filter(|(id, _)| wanted(id));
        wanted.filter_map(|(id, series)| Some((Arc::clone(id), series.last_end(self.open)?))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Counts, Direction, Reporter};
    use super::*;

    #[test]
    fn a_series_was_seen_up_to_the_end_of_its_last_slot() {
        let start = 1_800_000_000;
        let id = SeriesId::other(Reporter::unknown(), Direction::Outbound, false);
        let inbound = SeriesId::other(Reporter::unknown(), Direction::Inbound, false);
        let counts = Counts { classes: [0, 1, 0, 0, 0, 0, 0, 0], ..Counts::default() };
        let mut history = History::new();
        history.add(id, &counts, start + 3);
        history.add(inbound, &counts, start + 3);
        let outbound = |id: &SeriesId| id.direction == Direction::Outbound;
        let mut seen = |now: i64| {
            history.sweep(now);
            let found = history.last_seen(outbound);
            found.iter().map(|(_, at)| *at).collect::<Vec<_>>()
        };
        assert_eq!(seen(start + 3), [start + 10], "in the open slot");
        assert_eq!(seen(start + 100), [start + 10], "in one that has ended");
        assert_eq!(seen(start + 900), [start + 60], "in a minute");
        assert_eq!(seen(start + 2 * 3_600), [start + 300], "in five minutes");
        assert_eq!(seen(start + 7 * 3_600), [0_i64; 0], "nobody can ask for it any more");
    }
}
