//! At most so many at once, counted over all data threads, with a short queue for those who come when all places are
//! taken.
//!
//! In: a maximum, which may differ from call to call because policies change. Out: a [`Slot`], which is given back when
//! it is dropped, or nothing. Whoever finds a free place takes no lock: the queue is for the time of overload only.
//!
//! In a queue that has stood for a while, whoever has waited longest is about to be given up by its client: from then on
//! the newest is served first (adaptive LIFO), and makes room for itself at the cost of the oldest.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

/// Nobody waits for a place any longer: an overloaded server's queue is best kept short (DAGOR, SoCC 2018, §4.2: 20 ms).
pub const PATIENCE: Duration = Duration::from_millis(20);
/// A queue that has not been empty for this long stands.
const STANDING: Duration = Duration::from_millis(100);

/// Places, and who waits for one.
#[derive(Debug, Default)]
pub struct Gate {
    taken: AtomicU32,
    /// Length of the queue, read without its lock. Whoever waits writes it before looking at `taken` once more, whoever
    /// leaves reads it after having written `taken`: one of the two sees the other, because both are SeqCst.
    waiting: AtomicU32,
    queue: Mutex<Queue<oneshot::Sender<Slot>>>,
}

/// One place; free again when this is dropped.
#[derive(Debug)]
pub struct Slot {
    /// `None` once the place has been given back by hand.
    gate: Option<Arc<Gate>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.taken.fetch_sub(1, SeqCst);
            if gate.waiting.load(SeqCst) > 0 {
                gate.let_in();
            }
        }
    }
}

impl Gate {
    /// Places that are taken.
    pub fn taken(&self) -> u32 {
        self.taken.load(SeqCst)
    }

    /// Takes a place, however many are taken.
    pub fn count(self: &Arc<Self>) -> Slot {
        self.taken.fetch_add(1, SeqCst);
        Slot { gate: Some(Arc::clone(self)) }
    }

    /// Takes a place if fewer than `max` are taken and nobody waits.
    pub fn enter(self: &Arc<Self>, max: u32) -> Option<Slot> {
        if self.waiting.load(SeqCst) > 0 || !self.take(max) {
            return None;
        }
        Some(Slot { gate: Some(Arc::clone(self)) })
    }

    /// Waits for a place, at most [`PATIENCE`] and not beyond `deadline`. At most `max` wait at once.
    pub async fn wait(self: &Arc<Self>, max: u32, deadline: Option<Instant>) -> Option<Slot> {
        let now = Instant::now();
        let (turn, mine) = oneshot::channel();
        let (number, displaced) = {
            let mut queue = self.queue();
            let pushed = queue.push(turn, max, now)?;
            self.waiting.store(queue.len(), SeqCst);
            pushed
        };
        // It is not served any more, and learns that when its sender goes.
        drop(displaced);
        let _place = Place { gate: self, number };
        // Whoever has left meanwhile may not have seen that somebody waits.
        self.let_in();
        let patience = now + PATIENCE;
        let until = deadline.map_or(patience, |deadline| deadline.min(patience));
        timeout_at(until, mine).await.ok()?.ok()
    }

    /// Gives free places to those who wait.
    fn let_in(self: &Arc<Self>) {
        loop {
            let turn = {
                let mut queue = self.queue();
                if queue.len() == 0 || !self.take(queue.max) {
                    return;
                }
                let turn = queue.next(Instant::now());
                self.waiting.store(queue.len(), SeqCst);
                turn
            };
            let slot = Slot { gate: Some(Arc::clone(self)) };
            // Outside of the lock: what comes back, or is dropped unread, is a place that is free again.
            if let Some(Err(mut unwanted)) = turn.map(|turn| turn.send(slot)) {
                unwanted.gate = None;
                self.taken.fetch_sub(1, SeqCst);
            }
        }
    }

    fn take(&self, max: u32) -> bool {
        self.taken.fetch_update(SeqCst, SeqCst, |taken| (taken < max).then_some(taken + 1)).is_ok()
    }

    fn queue(&self) -> MutexGuard<'_, Queue<oneshot::Sender<Slot>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place in the queue, left when this is dropped: served, too late, or given up by its client.
struct Place<'a> {
    gate: &'a Gate,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut queue = self.gate.queue();
        queue.leave(self.number);
        self.gate.waiting.store(queue.len(), SeqCst);
    }
}

/// Who waits, in the order of arrival. Knows no clock.
#[derive(Debug)]
struct Queue<T> {
    waiting: VecDeque<(u64, T)>,
    next: u64,
    /// Since when it has not been empty.
    since: Option<Instant>,
    /// The maximum as the last to come knows it.
    max: u32,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), next: 0, since: None, max: 0 }
    }
}

impl<T> Queue<T> {
    fn len(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    fn stands(&self, now: Instant) -> bool {
        self.since.is_some_and(|since| now.saturating_duration_since(since) >= STANDING)
    }

    /// Adds one at the end; its number, and who had to go for it. `None`: the queue is full.
    fn push(&mut self, waits: T, max: u32, now: Instant) -> Option<(u64, Option<T>)> {
        self.max = max;
        let mut displaced = None;
        if self.len() >= max {
            if !self.stands(now) {
                return None;
            }
            displaced = self.waiting.pop_front().map(|(_, oldest)| oldest);
        }
        self.since.get_or_insert(now);
        self.next += 1;
        self.waiting.push_back((self.next, waits));
        Some((self.next, displaced))
    }

    /// Takes out whose turn it is.
    fn next(&mut self, now: Instant) -> Option<T> {
        let next = if self.stands(now) { self.waiting.pop_back() } else { self.waiting.pop_front() };
        self.note_end();
        next.map(|(_, waits)| waits)
    }

    /// Takes one out that does not wait any more.
    fn leave(&mut self, number: u64) {
        if let Ok(at) = self.waiting.binary_search_by_key(&number, |(number, _)| *number) {
            self.waiting.remove(at);
        }
        self.note_end();
    }

    fn note_end(&mut self) {
        if self.waiting.is_empty() {
            self.since = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use tokio::time::advance;

    use super::*;

    #[test]
    fn a_place_is_free_again_when_its_slot_is_dropped_and_the_count_never_exceeds_the_maximum() {
        let gate = Arc::new(Gate::default());
        let slots: Vec<_> = (0..5).map_while(|_| gate.enter(3)).collect();
        assert_eq!((slots.len(), gate.taken()), (3, 3));
        let beyond = gate.count();
        assert_eq!(gate.taken(), 4, "what is only counted is always let in");
        drop((slots, beyond));
        assert_eq!(gate.taken(), 0);
        assert!(gate.enter(0).is_none());
    }

    #[test]
    fn the_oldest_is_served_first_until_the_queue_has_stood_and_the_newest_from_then_on() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        for name in ["a", "b", "c", "d"] {
            assert!(queue.push(name, 4, now).is_some());
        }
        assert_eq!(queue.push("e", 4, now), None, "full");
        assert_eq!(queue.next(now + STANDING / 2), Some("a"));
        assert_eq!(queue.next(now + STANDING), Some("d"));
        assert_eq!(queue.next(now + STANDING), Some("c"));
        assert_eq!(queue.next(now + STANDING), Some("b"));
        queue.push("f", 4, now + STANDING);
        queue.push("g", 4, now + STANDING);
        assert_eq!(queue.next(now + STANDING), Some("f"), "it was empty, and stands no more");
    }

    #[test]
    fn in_a_full_queue_that_stands_the_newest_takes_the_place_of_the_oldest() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.push("a", 2, now);
        queue.push("b", 2, now);
        let (number, displaced) = queue.push("c", 2, now + STANDING).unwrap();
        assert_eq!((displaced, queue.len()), (Some("a"), 2));
        queue.leave(number);
        assert_eq!(queue.next(now + STANDING), Some("b"), "who has left is not served");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_gets_the_next_free_place_and_nobody_overtakes() {
        let gate = Arc::new(Gate::default());
        let slot = gate.enter(1).unwrap();
        let mut waits = Box::pin(gate.wait(1, None));
        assert!((&mut waits).now_or_never().is_none());
        assert!(gate.wait(1, None).now_or_never().unwrap().is_none(), "as many wait as there are places");
        drop(slot);
        assert!(gate.enter(1).is_none(), "the place is taken already");
        let slot = waits.await.expect("a place");
        assert_eq!(gate.taken(), 1);
        drop(slot);
        assert_eq!((gate.taken(), gate.waiting.load(SeqCst)), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_longer_than_20_ms_or_beyond_its_deadline() {
        let gate = Arc::new(Gate::default());
        let _slot = gate.enter(1).unwrap();
        let began = Instant::now();
        assert!(gate.wait(1, None).await.is_none());
        assert!((PATIENCE..PATIENCE * 2).contains(&began.elapsed()));
        let began = Instant::now();
        assert!(gate.wait(1, Some(began + PATIENCE / 4)).await.is_none());
        assert!((PATIENCE / 4..PATIENCE).contains(&began.elapsed()));
        assert_eq!(gate.waiting.load(SeqCst), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_its_client_gave_up_goes_to_the_next_one() {
        let gate = Arc::new(Gate::default());
        let (one, _other) = (gate.enter(2).unwrap(), gate.enter(2).unwrap());
        let mut first = Box::pin(gate.wait(2, None));
        let mut second = Box::pin(gate.wait(2, None));
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        // The first has been let in, and goes before it learns of it.
        drop(one);
        drop(first);
        let second = second.await.expect("the place that was given up");
        assert_eq!(gate.taken(), 2);
        drop(second);
        assert_eq!(gate.taken(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn after_100_ms_of_waiting_the_newest_is_served_first() {
        let gate = Arc::new(Gate::default());
        let mut slots: Vec<_> = (0..3).filter_map(|_| gate.enter(3)).collect();
        let mut kept = Vec::new();
        // Somebody always waits.
        for _ in 0..11 {
            let mut waits = Box::pin(gate.wait(3, None));
            assert!((&mut waits).now_or_never().is_none());
            kept.push(waits);
            advance(Duration::from_millis(10)).await;
            kept.retain_mut(|waits| waits.now_or_never().is_none());
        }
        let mut newest = Box::pin(gate.wait(3, None));
        assert!((&mut newest).now_or_never().is_none());
        drop(slots.pop());
        let served = newest.now_or_never().flatten();
        assert!(served.is_some());
        assert!(kept.iter_mut().all(|waits| waits.now_or_never().flatten().is_none()));
    }

    #[test]
    fn threads_never_take_more_places_than_there_are() {
        let gate = Arc::new(Gate::default());
        let most = Arc::new(AtomicU32::new(0));
        let threads = (0..4).map(|_| {
            let (gate, most) = (Arc::clone(&gate), Arc::clone(&most));
            std::thread::spawn(move || {
                for _ in 0..10_000 {
                    if let Some(_slot) = gate.enter(2) {
                        most.fetch_max(gate.taken(), SeqCst);
                    }
                }
            })
        });
        threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!((gate.taken(), most.load(SeqCst) <= 2), (0, true));
    }
}
