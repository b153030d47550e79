//! Compares the canary with the slowest stable pod of the same ten seconds, where latencies come in bursts.
//!
//! While a machine stands still for a moment, many attempts are slow together, so their number says little. What can
//! be said whatever happens within a block: if the canary's pod is like the others, it is the slowest of `k + 1` pods
//! at most once in `k + 1` blocks. A bet on that, at these odds, multiplies to an e-process (Waudby-Smith & Ramdas,
//! "Estimating means of bounded random variables by betting", 2023), for blocks that are exchangeable among pods.

use super::Pod;

/// Parts of the evidence that are staked in a block, one for each of the factors of the other comparison.
const STAKES: [f64; super::FACTORS.len()] = [0.3, 0.6, 0.9, 0.3, 0.6, 0.9, 0.3, 0.6, 0.9];
/// Attempts that a pod must have had in a block.
pub(super) const ENOUGH_ATTEMPTS: f64 = 20.0;
/// Stable pods that are believed to be independent of each other.
const MOST_PODS: f64 = 3.0;
/// Standard deviations of the canary's share, which is of fewer attempts, that are not counted against it.
const DEVIATIONS: f64 = 2.0;

/// Logarithms of the e-values of one block, one for each stake. `None` where there is nothing to compare.
pub(super) fn increments(pods: &[Pod], margin: f64) -> Option<Vec<f64>> {
    let stable = pods.iter().filter(|pod| !pod.canary && pod.attempts >= ENOUGH_ATTEMPTS);
    let shares: Vec<f64> = stable.map(|pod| pod.events / pod.attempts).collect();
    let slowest = shares.iter().copied().reduce(f64::max)?;
    if !has_enough(pods) {
        return None;
    }
    let (attempts, events) = (canary(pods, |pod| pod.attempts), canary(pods, |pod| pod.events));
    let accepted = (margin * slowest).max(1.0 / attempts);
    let noise = DEVIATIONS * (accepted * (1.0 - accepted).max(0.0) / attempts).sqrt();
    let is_slowest = events / attempts > accepted + noise;
    let pods = (shares.len() as f64).min(MOST_PODS) + 1.0;
    let pays = if is_slowest { pods } else { 0.0 };
    Some(STAKES.iter().map(|stake| (1.0 - stake + stake * pays).ln()).collect())
}

/// Whether the canary has had enough attempts for a bet.
pub(super) fn has_enough(pods: &[Pod]) -> bool {
    canary(pods, |pod| pod.attempts) >= ENOUGH_ATTEMPTS
}

fn canary(pods: &[Pod], part: fn(&Pod) -> f64) -> f64 {
    pods.iter().filter(|pod| pod.canary).map(part).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(canary: bool, attempts: f64, events: f64) -> Pod {
        Pod { canary, attempts, events }
    }

    #[test]
    fn the_bet_is_fair_for_a_pod_that_is_like_the_others() {
        let wins =
            increments(&[pod(true, 100.0, 60.0), pod(false, 200.0, 20.0), pod(false, 200.0, 10.0)], 1.5);
        let loses =
            increments(&[pod(true, 100.0, 10.0), pod(false, 200.0, 20.0), pod(false, 200.0, 10.0)], 1.5);
        for (win, loss) in wins.unwrap().iter().zip(loses.unwrap()) {
            assert!((win.exp() / 3.0 + loss.exp() * 2.0 / 3.0 - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn a_share_of_few_attempts_wins_nothing_by_chance() {
        let few = increments(&[pod(true, 20.0, 5.0), pod(false, 200.0, 20.0)], 1.5).unwrap();
        assert!(few.iter().all(|log| *log < 0.0), "{few:?}");
        assert_eq!(increments(&[pod(true, 19.0, 19.0), pod(false, 200.0, 2.0)], 1.5), None);
        assert_eq!(increments(&[pod(true, 100.0, 50.0), pod(false, 5.0, 0.0)], 1.5), None);
    }
}
