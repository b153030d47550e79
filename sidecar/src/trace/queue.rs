//! Spans that wait to be sent, in a bounded queue that never holds a request up.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use super::span::Span;

/// Spans that wait at most. Each takes about 600 bytes.
const CAPACITY: usize = 2_048;
/// Spans that are sent together at most.
const BATCH: usize = 512;
/// How long a span waits for others before it is sent.
const INTERVAL: Duration = Duration::from_secs(2);

/// Spans of all data threads, and what became of them.
#[derive(Debug, Default)]
pub struct Queue {
    spans: Mutex<VecDeque<Span>>,
    filled: Notify,
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl Queue {
    /// Adds a span. Where the queue is full it is dropped, and counted.
    pub fn push(&self, span: Span) {
        let mut spans = self.spans();
        if spans.len() >= CAPACITY {
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        spans.push_back(span);
        let is_worth_a_look = spans.len() == 1 || spans.len() >= BATCH;
        drop(spans);
        if is_worth_a_look {
            self.filled.notify_one();
        }
    }

    /// How many spans a collector has taken, and how many were dropped.
    pub fn counts(&self) -> (u64, u64) {
        (self.exported.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }

    /// Waits until a batch is full, or until what is there has waited for long enough.
    pub(super) async fn batch(&self) {
        while self.spans().is_empty() {
            self.filled.notified().await;
        }
        let full = async {
            while self.spans().len() < BATCH {
                self.filled.notified().await;
            }
        };
        let _ = timeout(INTERVAL, full).await;
    }

    /// Takes the oldest spans, a batch at most.
    pub(super) fn take(&self) -> Vec<Span> {
        let mut spans = self.spans();
        let count = spans.len().min(BATCH);
        let batch = spans.drain(..count).collect();
        if spans.is_empty() {
            // What one burst has needed is not kept for ever.
            spans.shrink_to(BATCH);
        }
        batch
    }

    /// Counts what became of spans that were taken.
    pub(super) fn settle(&self, exported: u64, dropped: u64) {
        self.exported.fetch_add(exported, Ordering::Relaxed);
        self.dropped.fetch_add(dropped, Ordering::Relaxed);
    }

    fn spans(&self) -> MutexGuard<'_, VecDeque<Span>> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    fn push(queue: &Queue, count: usize) {
        for _ in 0..count {
            queue.push(Span::default());
        }
    }

    #[test]
    fn a_queue_that_is_full_drops_what_comes_and_counts_it() {
        let queue = Queue::default();
        push(&queue, CAPACITY + 7);
        assert_eq!(queue.counts(), (0, 7));
        assert_eq!(queue.take().len(), BATCH);
        push(&queue, 1);
        assert_eq!(queue.counts(), (0, 7), "there is room again");
        queue.settle(500, 12);
        assert_eq!(queue.counts(), (500, 19));
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_sent_when_it_is_full_or_after_two_seconds() {
        let queue = Queue::default();
        push(&queue, BATCH);
        let before = Instant::now();
        queue.batch().await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        assert_eq!(queue.take().len(), BATCH);
        assert!(timeout(Duration::from_secs(60), queue.batch()).await.is_err(), "nothing is there");
        push(&queue, 3);
        let before = Instant::now();
        queue.batch().await;
        assert!(before.elapsed() >= INTERVAL);
        assert_eq!(queue.take().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_that_fills_while_it_waits_is_sent_at_once() {
        let queue = Queue::default();
        push(&queue, 1);
        let before = Instant::now();
        let filling = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            push(&queue, BATCH);
        };
        tokio::join!(queue.batch(), filling);
        assert!(before.elapsed() < INTERVAL);
    }
}
