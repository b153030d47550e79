//! How much an event counts when events come in bursts.

use super::Pod;

/// Attempts that a burst may last. A pod that gets fewer in a block sees one burst in several blocks.
const LONGEST: f64 = 50.0;
/// Weight of the newest block in the running estimate of the size of a burst.
const NEWEST: f64 = 0.1;

/// Dispersion up to which events count one by one. Above it they come in bursts.
const INDEPENDENT: f64 = 3.0;
/// What a canary pod may count for in a block where events are independent: the events at the accepted rate, a
/// few more, and some standard deviations. A burst that is too rare to be learnt does not decide alone then.
const A_FEW: f64 = 2.0;
const DEVIATIONS: f64 = 3.0;

/// What the earlier blocks say about bursts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Earlier {
    /// Size of a typical burst.
    pub(super) typical: f64,
    /// Dispersion of the events, where it is known.
    pub(super) dispersion: Option<f64>,
}

impl Earlier {
    /// Whether events are known to happen on their own.
    pub(super) fn is_independent(&self) -> bool {
        self.dispersion.is_some_and(|dispersion| dispersion <= INDEPENDENT)
    }
}

/// How the events of one block are counted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Counting {
    /// What events are divided by.
    pub(super) divisor: f64,
    /// The rate that is accepted, where events are independent.
    accepted: Option<f64>,
}

impl Counting {
    /// Independent events are divided by their dispersion. Others, and those of which too little is known, by the
    /// largest number of events at one pod, or by the size of the bursts so far where that is larger.
    pub(super) fn of(pods: &[Pod], earlier: Earlier, accepted: f64) -> Self {
        if let Some(dispersion) = earlier.dispersion.filter(|dispersion| *dispersion <= INDEPENDENT) {
            return Self { divisor: dispersion.max(1.0), accepted: Some(accepted) };
        }
        let typical = earlier.typical.clamp(1.0, LONGEST).max(earlier.dispersion.unwrap_or(1.0).min(LONGEST));
        Self { divisor: pods.iter().map(|pod| pod.events).fold(typical, f64::max), accepted: None }
    }

    /// What a pod's events count for.
    ///
    /// A canary pod with little traffic meets the same burst in block after block, in which nearly everything
    /// fails. Its events count for less then, so that the burst as a whole counts about as one event.
    /// The stable version's do not: that errs in favour of the canary.
    pub(super) fn weight(&self, pod: &Pod) -> f64 {
        if pod.events <= 0.0 {
            return 0.0;
        }
        if !pod.canary {
            return pod.events / self.divisor;
        }
        let most = self.accepted.map_or(self.divisor, |rate| most((rate * pod.attempts).max(0.0)));
        let attempts = pod.attempts.max(1.0);
        let blocks = (LONGEST / attempts - 1.0).max(0.0);
        pod.events.min(most) / self.divisor / (1.0 + (pod.events / attempts).min(1.0) * blocks)
    }
}

/// What a canary pod, of which so many events are expected in a block, may count for.
pub(super) fn most(expected: f64) -> f64 {
    expected + A_FEW + DEVIATIONS * expected.sqrt()
}

/// The size of a typical burst after one more block, from pods of one version.
pub(super) fn typical(before: Option<f64>, pods: &[Pod], canary: bool) -> f64 {
    let before = before.filter(|size| size.is_finite()).unwrap_or(1.0).clamp(1.0, LONGEST);
    let events = || pods.iter().filter(move |pod| pod.canary == canary).map(|pod| pod.events);
    let sum: f64 = events().sum();
    if sum <= 0.0 {
        return before;
    }
    let size = events().map(|count| count * count).sum::<f64>() / sum;
    (before + NEWEST * (size - before)).clamp(1.0, LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(canary: bool, attempts: f64, events: f64) -> Pod {
        Pod { canary, attempts, events }
    }

    fn unknown(pod: &Pod) -> Counting {
        Counting::of(&[*pod], Earlier { typical: 1.0, dispersion: None }, 0.01)
    }

    #[test]
    fn independent_events_count_one_by_one_and_a_rare_burst_counts_as_a_few() {
        let counting = |pod| Counting::of(&[pod], Earlier { typical: 5.0, dispersion: Some(1.0) }, 0.015);
        let some = pod(true, 100.0, 5.0);
        assert_eq!(counting(some).weight(&some), 5.0);
        let burst = pod(true, 100.0, 50.0);
        assert!(counting(burst).weight(&burst) < 8.0);
        let stable = pod(false, 100.0, 50.0);
        assert_eq!(counting(stable).weight(&stable), 50.0);
    }

    #[test]
    fn a_large_dispersion_is_a_burst() {
        let burst = pod(true, 100.0, 10.0);
        let counting = Counting::of(&[burst], Earlier { typical: 5.0, dispersion: Some(20.0) }, 0.015);
        assert_eq!(counting.weight(&burst), 0.5);
    }

    #[test]
    fn a_burst_on_one_pod_counts_as_one_event() {
        let burst = pod(true, 100.0, 50.0);
        assert_eq!(unknown(&burst).weight(&burst), 1.0);
    }

    #[test]
    fn a_burst_that_lasts_for_many_blocks_of_a_quiet_canary_counts_as_about_one_event() {
        let block = pod(true, 10.0, 10.0);
        let counted = 5.0 * unknown(&block).weight(&block);
        assert!((0.9..=1.1).contains(&counted), "{counted}");
        let single = pod(true, 10.0, 1.0);
        assert!(unknown(&single).weight(&single) > 0.6);
    }

    #[test]
    fn the_size_of_a_burst_is_learnt() {
        let mut size = None;
        for _ in 0..60 {
            size = Some(typical(size, &[pod(false, 200.0, 20.0), pod(true, 50.0, 50.0)], false));
        }
        assert!((19.0..=20.0).contains(&size.unwrap()), "{size:?}");
    }
}
