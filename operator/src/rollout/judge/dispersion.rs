//! Whether events happen on their own or in bursts.
//!
//! The dispersion is the variance of the events of a pod and a block over their mean, given the attempts: 1 for
//! events that are independent, however many they are, and about B where they come in bursts of B. It is
//! estimated from the differences between pods of one version within a block, or between neighbouring blocks
//! where there is one pod only, so it does not matter when the rate drifts. A jump of the rate makes it larger,
//! which is the careful side.
//!
//! The sums are those of earlier blocks, so the estimate is known before the block that it is used for.

use tulle_crds::{Evidence, EvidenceWindow, TestEvidence};

use super::Pod;

/// Attempts that a pod must get in a block to be looked at. With fewer, a long burst looks like a rate.
const ENOUGH_ATTEMPTS: f64 = 20.0;
/// Differences, and events in them, from which on the estimate is used. Chosen by simulation.
const ENOUGH_DIFFERENCES: f64 = 6.0;
const ENOUGH_EVENTS: f64 = 8.0;
/// What remains of the sums after one more block: the memory is about an hour.
const KEPT: f64 = 1.0 - 1.0 / 360.0;

/// Running sums over the earlier blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Dispersion {
    /// Squared differences between events and expected events.
    squares: f64,
    /// What they would be if events were independent.
    expected: f64,
    /// The squares of what each block added to `squares`.
    scatter: f64,
    /// How many differences that are.
    differences: f64,
    /// The newest block, where one pod only was looked at.
    attempts: f64,
    events: f64,
}

impl Dispersion {
    /// The sums that are stored under a name.
    pub(super) fn stored(evidence: &Evidence, name: &str) -> Self {
        let test = evidence.tests.iter().find(|test| test.name == name);
        let sums = test.and_then(|test| test.windows.first()).map(|window| window.log_evidence.as_slice());
        match sums {
            Some(&[squares, expected, scatter, differences, attempts, events])
                if [squares, expected, scatter, differences, attempts, events]
                    .iter()
                    .all(|sum| sum.is_finite() && *sum >= 0.0) =>
            {
                Self { squares, expected, scatter, differences, attempts, events }
            }
            _ => Self::default(),
        }
    }

    /// The sums as they are stored: beside the evidence of the tests, in the place of logarithms.
    pub(super) fn store(&self, name: String) -> TestEvidence {
        let sums =
            vec![self.squares, self.expected, self.scatter, self.differences, self.attempts, self.events];
        let window = EvidenceWindow { number: 0, blocks: 0, log_evidence: sums };
        TestEvidence { name, windows: vec![window], ..TestEvidence::default() }
    }

    /// The dispersion with one standard error on top, at least 1. `None` as long as too little was seen.
    pub(super) fn upper(&self) -> Option<f64> {
        (self.differences >= ENOUGH_DIFFERENCES && self.expected >= ENOUGH_EVENTS)
            .then(|| ((self.squares + self.scatter.sqrt()) / self.expected).max(1.0))
    }

    /// Adds the pods of one version in one block.
    pub(super) fn add(&mut self, pods: &[Pod], canary: bool) {
        let looked_at = pods.iter().filter(|pod| pod.canary == canary && pod.attempts >= ENOUGH_ATTEMPTS);
        let mut cells: Vec<(f64, f64)> = looked_at.map(|pod| (pod.attempts, pod.events)).collect();
        if let [only] = *cells.as_slice() {
            let before = (self.attempts, self.events);
            (self.attempts, self.events) = only;
            if before.0 <= 0.0 {
                return;
            }
            cells.push(before);
        } else {
            (self.attempts, self.events) = (0.0, 0.0);
        }
        let attempts: f64 = cells.iter().map(|cell| cell.0).sum();
        let events: f64 = cells.iter().map(|cell| cell.1).sum();
        if cells.len() < 2 || events <= 0.0 {
            return;
        }
        let (mut squares, mut expected) = (0.0, 0.0);
        for (cell_attempts, cell_events) in &cells {
            let share = cell_attempts / attempts;
            squares += (cell_events - events * share).powi(2);
            expected += events * share * (1.0 - share);
        }
        self.squares = self.squares * KEPT + squares;
        self.expected = self.expected * KEPT + expected;
        self.scatter = self.scatter * KEPT + squares * squares;
        self.differences = self.differences * KEPT + (cells.len() - 1) as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(attempts: f64, events: f64) -> Pod {
        Pod { canary: false, attempts, events }
    }

    fn after(blocks: &[Vec<Pod>]) -> Option<f64> {
        let mut dispersion = Dispersion::default();
        for block in blocks.iter().cycle().take(60) {
            dispersion.add(block, false);
        }
        dispersion.upper()
    }

    #[test]
    fn a_burst_on_one_of_several_pods_is_seen() {
        let burst = vec![pod(200.0, 20.0), pod(200.0, 0.0), pod(200.0, 0.0)];
        let size = after(&[burst]).unwrap();
        assert!((20.0..=25.0).contains(&size), "{size}");
    }

    #[test]
    fn many_events_that_are_spread_evenly_are_no_burst() {
        let block = vec![pod(200.0, 18.0), pod(200.0, 20.0), pod(200.0, 22.0)];
        assert_eq!(after(&[block]), Some(1.0));
    }

    #[test]
    fn one_pod_is_compared_with_itself_a_block_before() {
        let size = after(&[vec![pod(200.0, 20.0)], vec![pod(200.0, 0.0)]]).unwrap();
        assert!((20.0..=25.0).contains(&size), "{size}");
        assert_eq!(after(&[vec![pod(200.0, 20.0)]]), Some(1.0));
    }

    #[test]
    fn little_is_not_enough_to_say_anything() {
        assert_eq!(after(&[vec![pod(10.0, 5.0), pod(10.0, 5.0)]]), None);
        assert_eq!(after(&[vec![pod(200.0, 0.0), pod(200.0, 0.0)]]), None);
    }

    #[test]
    fn stored_sums_are_read_again() {
        let mut dispersion = Dispersion::default();
        dispersion.add(&[pod(200.0, 3.0), pod(180.0, 5.0)], false);
        let stored = dispersion.store("errorsDispersion".to_owned());
        let evidence = Evidence { tests: vec![stored], ..Evidence::default() };
        assert_eq!(Dispersion::stored(&evidence, "errorsDispersion"), dispersion);
    }
}
