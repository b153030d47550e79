//! What waits to be written to a connection that many streams share, in order.
//!
//! Headers, heads and small pieces are copied into one buffer; large pieces of bodies stay where they were
//! read and are written from there, so that TLS is the first to copy them.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWrite;

/// A payload from this size on is not copied. Below it a copy is cheaper than a slice of its own, and a piece
/// would hold the whole buffer that it was read into.
const WORTH_HOLDING: usize = 4 * 1024;

/// Slices of one write. TLS takes all that may wait at a time: eight full frames or a few more that are not full, each
/// with its header.
const SLICES: usize = 32;

/// What a buffer may keep while its connection is busy; more is given back once it is written.
pub(crate) const KEPT: usize = 128 * 1024;

/// Frames in order, partly by reference.
#[derive(Default)]
pub(crate) struct Output {
    copied: BytesMut,
    /// How much of `copied` has been written.
    written: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of `copied` behind the last piece.
    behind: usize,
    /// Bytes that wait, copied or not.
    length: usize,
}

struct Piece {
    /// Bytes of `copied` that are written before it.
    before: usize,
    bytes: Bytes,
}

impl Output {
    /// Bytes that wait.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends what `write` appends to the copied bytes.
    pub(crate) fn copy<T>(&mut self, write: impl FnOnce(&mut BytesMut) -> T) -> T {
        let had = self.copied.len();
        let result = write(&mut self.copied);
        let added = self.copied.len().saturating_sub(had);
        self.behind += added;
        self.length += added;
        result
    }

    /// Appends a piece of a body, whose frame has been announced.
    pub(crate) fn piece(&mut self, bytes: Bytes) {
        if bytes.len() < WORTH_HOLDING {
            return self.copy(|copied| copied.extend_from_slice(&bytes));
        }
        self.length += bytes.len();
        self.pieces.push_back(Piece { before: std::mem::take(&mut self.behind), bytes });
    }

    /// How many bytes have been copied since it was last empty. The next to be copied is at this place.
    pub(crate) fn copied(&self) -> usize {
        self.copied.len()
    }

    /// The copied byte at a place, to be changed as long as nothing has been written.
    pub(crate) fn copied_mut(&mut self, at: usize) -> Option<&mut u8> {
        self.copied.get_mut(at)
    }

    /// Writes what the other side takes at once, and says how much that was.
    pub(crate) fn poll_write<S>(&mut self, io: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<usize>>
    where
        S: AsyncWrite,
    {
        let copied = self.copied.get(self.written..).unwrap_or(&[]);
        let count = if self.pieces.is_empty() {
            ready!(io.poll_write(cx, copied))?
        } else {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.slices(copied, &mut slices);
            ready!(io.poll_write_vectored(cx, slices.get(..filled).unwrap_or(&[])))?
        };
        self.advance(count);
        Poll::Ready(Ok(count))
    }

    /// Fills `slices` with what comes next, and returns how many it takes.
    fn slices<'a>(&'a self, mut copied: &'a [u8], slices: &mut [IoSlice<'a>; SLICES]) -> usize {
        let mut filled = 0;
        let mut add = |part: &'a [u8]| {
            if !part.is_empty()
                && let Some(slot) = slices.get_mut(filled)
            {
                *slot = IoSlice::new(part);
                filled += 1;
            }
        };
        for piece in self.pieces.iter().take(SLICES) {
            let (before, after) = copied.split_at_checked(piece.before).unwrap_or((copied, &[]));
            add(before);
            add(piece.bytes.as_ref());
            copied = after;
        }
        if self.pieces.len() < SLICES {
            add(copied);
        }
        filled
    }

    fn advance(&mut self, count: usize) {
        self.length = self.length.saturating_sub(count);
        let mut left = count;
        while left > 0 {
            let Some(piece) = self.pieces.front_mut() else {
                self.written += left;
                self.behind = self.behind.saturating_sub(left);
                break;
            };
            let copied = left.min(piece.before);
            piece.before -= copied;
            self.written += copied;
            left -= copied;
            let held = left.min(piece.bytes.len());
            piece.bytes.advance(held);
            left -= held;
            if piece.before == 0 && piece.bytes.is_empty() {
                self.pieces.pop_front();
            }
        }
        if self.length > 0 && self.written >= KEPT {
            // Under way without end, the output is never empty: what is written goes all the same.
            self.copied.advance(self.written);
            self.written = 0;
        }
        if self.length == 0 {
            self.copied.clear();
            self.written = 0;
            if self.copied.capacity() > KEPT {
                self.copied = BytesMut::new();
            }
        }
    }

    /// How many pieces are written from where they were read.
    #[cfg(test)]
    pub(crate) fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// Memory that it holds of its own.
    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.copied.capacity() + self.pieces.capacity()
    }

    /// Gives the memory of an empty output back.
    pub(crate) fn release(&mut self) {
        if self.length == 0 {
            *self = Self::default();
        }
    }
}
