//! Whose new subscription is computed next: a cluster of sidecars that come back at once must not starve
//! those that are here.
//!
//! A stream has at most one subscription in the queue, and the queue is first come, first served. So each
//! stream gets one turn after another, round robin: who subscribes to thousands waits as often as it asks, and
//! who subscribes to one waits once.

use tokio::sync::Semaphore;

/// New subscriptions that are computed at the same time.
const ADMITTED: usize = 16;

/// The queue for new subscriptions of all streams of this replica.
#[derive(Debug)]
pub struct Admission(Semaphore);

impl Default for Admission {
    fn default() -> Self {
        Self(Semaphore::new(ADMITTED))
    }
}

impl Admission {
    /// Does `work` when it is this stream's turn. `None`: the stream was `gone` before that, and nothing was
    /// computed for it.
    pub async fn turn<T>(&self, gone: impl Future<Output = ()>, work: impl FnOnce() -> T) -> Option<T> {
        let turn = tokio::select! {
            biased;
            () = gone => return None,
            turn = self.0.acquire() => turn,
        };
        let done = work();
        drop(turn);
        // Whoever has just had a turn lets the next run, also on a single core.
        tokio::task::yield_now().await;
        Some(done)
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn whoever_asks_for_one_waits_for_one_turn_of_whoever_asks_for_many() {
        let admission = Arc::new(Admission(Semaphore::new(1)));
        let order = Arc::new(Mutex::new(Vec::new()));
        let ask = |who: &'static str, times: usize| {
            let (admission, order) = (Arc::clone(&admission), Arc::clone(&order));
            tokio::spawn(async move {
                for _ in 0..times {
                    admission.turn(pending(), || order.lock().unwrap().push(who)).await;
                }
            })
        };
        let held = admission.0.acquire().await.unwrap();
        let (many, one) = (ask("many", 100), ask("one", 1));
        tokio::task::yield_now().await;
        drop(held);
        many.await.unwrap();
        one.await.unwrap();
        let place = order.lock().unwrap().iter().position(|who| *who == "one").unwrap();
        assert!(place <= 2, "it came after {place} turns of the other");
    }

    #[tokio::test]
    async fn nothing_is_computed_for_a_stream_that_is_gone() {
        let admission = Admission::default();
        assert_eq!(admission.turn(ready(()), || unreachable!("computed")).await, None::<()>);
    }
}
