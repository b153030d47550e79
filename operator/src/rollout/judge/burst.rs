//! How much an event counts when events come in bursts.

use super::Pod;

/// Attempts that a burst may last. A pod that gets fewer in a block sees one burst in several blocks.
const LONGEST: f64 = 50.0;
/// Weight of the newest block in the running estimate of the size of a burst.
const NEWEST: f64 = 0.1;

/// What the events of each pod of a block are divided by: the largest number of events at one pod, or the
/// size of the bursts so far where that is larger.
pub(super) fn divisor(pods: &[Pod], typical: f64) -> f64 {
    pods.iter().map(|pod| pod.events).fold(typical.clamp(1.0, LONGEST), f64::max)
}

/// What a pod's events count for: 1 at most.
///
/// A canary pod with little traffic meets the same burst in block after block, in which nearly everything
/// fails. Its events count for less then, so that the burst as a whole counts about as one event.
/// The stable version's do not: that errs in favour of the canary.
pub(super) fn weight(pod: &Pod, divisor: f64) -> f64 {
    if pod.events <= 0.0 {
        return 0.0;
    }
    let attempts = pod.attempts.max(1.0);
    let blocks = if pod.canary { (LONGEST / attempts - 1.0).max(0.0) } else { 0.0 };
    (pod.events / divisor).min(1.0) / (1.0 + (pod.events / attempts).min(1.0) * blocks)
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

    #[test]
    fn a_burst_on_one_pod_counts_as_one_event() {
        let burst = pod(true, 100.0, 50.0);
        assert_eq!(weight(&burst, divisor(&[burst], 1.0)), 1.0);
    }

    #[test]
    fn a_burst_that_lasts_for_many_blocks_of_a_quiet_canary_counts_as_about_one_event() {
        let block = pod(true, 10.0, 10.0);
        let counted = 5.0 * weight(&block, divisor(&[block], 1.0));
        assert!((0.9..=1.1).contains(&counted), "{counted}");
        let single = pod(true, 10.0, 1.0);
        assert!(weight(&single, divisor(&[single], 1.0)) > 0.6);
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
