//! The turns of work that answers requests. It runs off the threads that serve sidecars and cannot be stopped: whoever
//! leaves before the answer leaves work behind, which must count as long as it runs.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::sync::Semaphore;

use super::Refused;

/// Answers that are computed at a time. Each holds sums of the history, and locks the model for a part of its time.
const TURNS: usize = 2;

/// The turns of an operator: the API and the page share them.
pub fn turns() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(TURNS))
}

/// Runs work when a turn is free, and frees the turn when the work has ended, whether or not somebody still waits.
///
/// # Errors
/// 500 where the work has panicked.
pub async fn compute<T: Send + 'static>(
    turns: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refused> {
    let failed =
        || Refused::new(StatusCode::INTERNAL_SERVER_ERROR, "the answer failed; see the operator's log");
    let turn = Arc::clone(turns).acquire_owned().await.map_err(|_| failed())?;
    let done = tokio::task::spawn_blocking(move || {
        // Dropped with the work, not with the request.
        let _turn = turn;
        work()
    });
    done.await.map_err(|error| {
        tracing::error!(%error, "an answer failed");
        failed()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_whose_client_has_left_keeps_its_turn_until_it_ends() {
        let turns = Arc::new(Semaphore::new(1));
        let (started, starting) = tokio::sync::oneshot::channel();
        let (end, ending) = mpsc::channel::<()>();
        let asked = {
            let turns = Arc::clone(&turns);
            tokio::spawn(async move {
                compute(&turns, move || {
                    let _ = started.send(());
                    let _ = ending.recv();
                })
                .await
            })
        };
        starting.await.unwrap();
        asked.abort();
        assert!(asked.await.unwrap_err().is_cancelled(), "the client has left");
        assert_eq!(turns.available_permits(), 0, "the work goes on");
        end.send(()).unwrap();
        assert_eq!(compute(&turns, || 7).await, Ok(7), "its turn comes when the first has ended");
    }

    #[tokio::test]
    async fn work_that_panics_is_an_answer_and_frees_its_turn() {
        let turns = Arc::new(Semaphore::new(1));
        let failed = compute(&turns, || assert!(turns_are_lost(), "no")).await.unwrap_err();
        assert_eq!(failed.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(compute(&turns, || 7).await, Ok(7));
    }

    fn turns_are_lost() -> bool {
        false
    }
}
