//! Work that goes on without whoever has asked for it, and that is done once however often it is asked for meanwhile.
//!
//! A browser ends a request when its tab is closed, when somebody presses Stop, and when a button is pressed twice. What
//! is under way then must not be cut in half.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::{BoxFuture, FutureExt as _, Shared};

/// The answer of some work. `None`: it has panicked.
pub type Answer<T> = Shared<BoxFuture<'static, Option<T>>>;

/// What is under way.
pub struct Running<K, T>(Mutex<HashMap<K, Answer<T>>>);

impl<K, T> Default for Running<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K, T> Running<K, T>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The answer of the work that is under way under this key; begins `work` where there is none. The work goes on even
    /// if nobody waits for the answer.
    pub fn share(self: &Arc<Self>, key: K, work: impl Future<Output = T> + Send + 'static) -> Answer<T> {
        let mut running = self.lock();
        if let Some(answer) = running.get(&key) {
            return answer.clone();
        }
        let ends = Ends { running: Arc::clone(self), key: key.clone() };
        let task = tokio::spawn(async move {
            let _ends = ends;
            work.await
        });
        let answer = task.map(Result::ok).boxed().shared();
        running.insert(key, answer.clone());
        answer
    }
}

impl<K, T> Running<K, T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Answer<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets the work when it ends, by a panic too.
struct Ends<K: Eq + Hash, T> {
    running: Arc<Running<K, T>>,
    key: K,
}

impl<K: Eq + Hash, T> Drop for Ends<K, T> {
    fn drop(&mut self) {
        let ended = self.running.lock().remove(&self.key);
        drop(ended);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn work_goes_on_without_whoever_asked_for_it() {
        let running = Arc::new(Running::<&str, u8>::default());
        let (go, gone) = oneshot::channel::<()>();
        let (tell, told) = oneshot::channel();
        let answer = running.share("pause", async move {
            let _ = gone.await;
            let _ = tell.send(());
            7
        });
        drop(answer);
        go.send(()).unwrap();
        told.await.expect("the work was cut");
    }

    #[tokio::test]
    async fn who_asks_for_the_same_meanwhile_gets_the_same_answer_and_later_another() {
        let running = Arc::new(Running::<&str, usize>::default());
        let count = Arc::new(AtomicUsize::new(0));
        let (go, gone) = oneshot::channel::<()>();
        let begin = |until: Option<oneshot::Receiver<()>>| {
            let count = Arc::clone(&count);
            async move {
                if let Some(until) = until {
                    let _ = until.await;
                }
                count.fetch_add(1, Ordering::SeqCst) + 1
            }
        };
        let first = running.share("pause", begin(Some(gone)));
        let second = running.share("pause", begin(None));
        assert_eq!(running.share("abort", begin(None)).await, Some(1), "another action does not wait");
        go.send(()).unwrap();
        assert_eq!((first.await, second.await), (Some(2), Some(2)));
        assert_eq!(running.share("pause", begin(None)).await, Some(3), "what has ended is done again");
        assert_eq!(running.lock().len(), 0);
    }

    #[tokio::test]
    async fn work_that_panics_has_no_answer_and_does_not_stand_in_the_way() {
        let running = Arc::new(Running::<&str, u8>::default());
        let panics = || -> u8 { panic!("on purpose") };
        assert_eq!(running.share("pause", async move { panics() }).await, None);
        assert_eq!(running.share("pause", async { 7 }).await, Some(7));
    }
}
