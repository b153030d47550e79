//! Streams that wait for something of their connection, in the order in which they came.

use std::collections::VecDeque;
use std::task::Waker;

/// A queue of streams. Each is in it at most once.
#[derive(Default)]
pub(crate) struct Turns {
    waiting: VecDeque<Turn>,
}

struct Turn {
    stream: u32,
    waker: Waker,
    /// It may go on, whoever else waits.
    called: bool,
}

impl Turns {
    /// Joins the end, or stays where it is; it waits to be called, again if need be.
    pub(crate) fn join(&mut self, stream: u32, waker: &Waker) {
        match self.waiting.iter_mut().find(|turn| turn.stream == stream) {
            Some(turn) => {
                turn.waker.clone_from(waker);
                turn.called = false;
            }
            None => self.waiting.push_back(Turn { stream, waker: waker.clone(), called: false }),
        }
    }

    /// Leaves; whether it was here.
    pub(crate) fn leave(&mut self, stream: u32) -> bool {
        let had = self.waiting.len();
        if had > 0 {
            self.waiting.retain(|turn| turn.stream != stream);
        }
        self.waiting.len() < had
    }

    /// Whether nobody has to go on before this stream. One that was called keeps its right, and does not hold
    /// up those behind it: its task may be busy with something else.
    pub(crate) fn is_turn_of(&self, stream: u32) -> bool {
        self.waiting.iter().find(|turn| turn.stream == stream || !turn.called).is_none_or(|turn| turn.called)
    }

    /// Calls the first `count` that have not been called.
    pub(crate) fn call(&mut self, count: usize) {
        for turn in self.waiting.iter_mut().filter(|turn| !turn.called).take(count) {
            turn.called = true;
            turn.waker.wake_by_ref();
        }
    }

    /// Lets everybody go on.
    pub(crate) fn call_all(&mut self) {
        self.waiting.drain(..).for_each(|turn| turn.waker.wake());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_go_on_in_the_order_in_which_they_came() {
        let mut turns = Turns::default();
        assert!(turns.is_turn_of(1), "nobody waits");
        (1..=3).for_each(|stream| turns.join(stream, Waker::noop()));
        turns.join(1, Waker::noop());
        assert!(!turns.is_turn_of(1), "nobody was called");
        turns.call(1);
        assert!(turns.is_turn_of(1) && !turns.is_turn_of(2) && !turns.is_turn_of(9));
        assert!(turns.leave(1) && !turns.leave(1));
        turns.join(1, Waker::noop());
        turns.call(1);
        assert!(turns.is_turn_of(2) && !turns.is_turn_of(3) && !turns.is_turn_of(1));
    }

    #[test]
    fn one_that_was_called_in_vain_keeps_its_place() {
        let mut turns = Turns::default();
        (1..=2).for_each(|stream| turns.join(stream, Waker::noop()));
        turns.call(1);
        turns.join(1, Waker::noop());
        assert!(!turns.is_turn_of(1));
        turns.call(1);
        assert!(turns.is_turn_of(1) && !turns.is_turn_of(2));
    }

    #[test]
    fn one_that_was_called_and_does_not_come_holds_nobody_up() {
        let mut turns = Turns::default();
        (1..=2).for_each(|stream| turns.join(stream, Waker::noop()));
        turns.call(2);
        assert!(turns.is_turn_of(2) && turns.is_turn_of(9));
    }
}
