//! What has arrived on a stream and waits to be read: pieces of a body, and what comes between them.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Pieces below this are joined while nobody reads them: a byte in a piece of its own costs fifty.
const SMALL: usize = 2 * 1024;
/// What is joined at most.
const JOINED: usize = 4 * 1024;

/// One thing that has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Arrival<T> {
    /// Bytes of a body.
    Data(Bytes),
    /// Anything else.
    Other(T),
}

/// What has arrived, in order.
#[derive(Debug)]
pub(crate) struct Arrived<T> {
    queue: VecDeque<Arrival<T>>,
    /// Small pieces of a body that came after those.
    joined: BytesMut,
}

impl<T> Default for Arrived<T> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), joined: BytesMut::new() }
    }
}

impl<T> Arrived<T> {
    /// Appends what is not a piece of a body.
    pub(crate) fn push(&mut self, other: T) {
        self.settle();
        self.queue.push_back(Arrival::Other(other));
    }

    /// Appends bytes of a body. A small piece behind another that nobody has read is joined with it.
    pub(crate) fn push_data(&mut self, bytes: Bytes) {
        if bytes.len() < SMALL {
            if self.joined.is_empty()
                && let Some(Arrival::Data(last)) = self.queue.back()
                && last.len() < SMALL
            {
                self.joined.extend_from_slice(last);
                self.queue.pop_back();
            }
            if !self.joined.is_empty() && self.joined.len() + bytes.len() <= JOINED {
                return self.joined.extend_from_slice(&bytes);
            }
        }
        self.settle();
        self.queue.push_back(Arrival::Data(bytes));
    }

    /// What was joined becomes a piece.
    fn settle(&mut self) {
        if !self.joined.is_empty() {
            self.queue.push_back(Arrival::Data(std::mem::take(&mut self.joined).freeze()));
        }
    }

    /// Takes the first.
    pub(crate) fn pop(&mut self) -> Option<Arrival<T>> {
        if self.queue.is_empty() {
            self.settle();
        }
        self.queue.pop_front()
    }

    /// What is first, unless it is of a body.
    pub(crate) fn front(&self) -> Option<&T> {
        match self.queue.front()? {
            Arrival::Other(other) => Some(other),
            Arrival::Data(_) => None,
        }
    }

    /// How many bytes of a body wait; they are dropped with all else.
    pub(crate) fn clear(&mut self) -> usize {
        self.settle();
        let bytes = |arrival| if let Arrival::Data(bytes) = arrival { bytes.len() } else { 0 };
        self.queue.drain(..).map(bytes).sum()
    }

    /// What waits that is not of a body.
    pub(crate) fn others(&self) -> impl Iterator<Item = &T> {
        self.queue.iter().filter_map(|arrival| match arrival {
            Arrival::Other(other) => Some(other),
            Arrival::Data(_) => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_are_joined_and_nothing_changes_its_place() {
        let mut arrived = Arrived::default();
        for number in 0..100_u8 {
            arrived.push_data(Bytes::from(vec![number; 100]));
        }
        arrived.push("head");
        arrived.push_data(Bytes::from_static(&[7; SMALL]));
        arrived.push_data(Bytes::from_static(b"x"));
        let (mut pieces, mut text) = (0, Vec::new());
        while let Some(Arrival::Data(bytes)) = arrived.pop() {
            pieces += 1;
            text.extend_from_slice(&bytes);
        }
        assert_eq!(pieces, 3, "of at most 4 KiB");
        assert_eq!(text, (0..100).flat_map(|number| [number; 100]).collect::<Vec<u8>>());
        assert_eq!(arrived.clear(), SMALL + 1);
        assert_eq!(arrived.pop(), None::<Arrival<&str>>);
    }
}
