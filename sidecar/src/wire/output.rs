//! The frames that wait to be written to a connection, in order.
//!
//! Headers, heads and small pieces are copied into one buffer; large pieces of bodies stay where they were
//! read and are written from there, so that TLS is the first to copy them.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tulle_mesh::wire::MAX_PAYLOAD;
use tulle_mesh::wire::frame::{self, Header, Kind};

/// A payload from this size on is not copied. Below it a copy is cheaper than a slice of its own, and a piece
/// would hold the whole buffer that it was read into.
const WORTH_HOLDING: usize = 4 * 1024;

/// Slices of one write. TLS takes all that may wait at a time: eight full frames or a few more that are not full, each
/// with its header.
const SLICES: usize = 32;

/// What a buffer may keep while its connection is busy; more is given back once it is written.
const KEPT: usize = 128 * 1024;

/// Frames in order, partly by reference.
#[derive(Default)]
pub(super) struct Output {
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
    pub(super) fn len(&self) -> usize {
        self.length
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends a frame.
    pub(super) fn frame(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        let had = self.copied.len();
        frame::encode(&mut self.copied, kind, flags, stream, payload);
        self.grown(had);
    }

    /// Appends a head or trailers.
    pub(super) fn block(&mut self, kind: Kind, flags: u8, stream: u32, block: &[u8]) {
        let had = self.copied.len();
        frame::encode_block(&mut self.copied, kind, flags, stream, block);
        self.grown(had);
    }

    /// Appends DATA, in as few frames as it takes and all of about the same size: a last frame of a few bytes
    /// costs as much as a full one.
    pub(super) fn data(&mut self, stream: u32, mut bytes: Bytes) {
        let frames = bytes.len().div_ceil(MAX_PAYLOAD).max(1);
        let size = bytes.len().div_ceil(frames);
        while bytes.len() > size {
            self.data_frame(stream, bytes.split_to(size));
        }
        self.data_frame(stream, bytes);
    }

    fn data_frame(&mut self, stream: u32, bytes: Bytes) {
        if bytes.len() < WORTH_HOLDING {
            return self.frame(Kind::Data, 0, stream, &bytes);
        }
        let had = self.copied.len();
        frame::encode_header(
            &mut self.copied,
            Header { kind: Kind::Data, flags: 0, stream, length: bytes.len() },
        );
        self.grown(had);
        self.length += bytes.len();
        self.pieces.push_back(Piece { before: std::mem::take(&mut self.behind), bytes });
    }

    fn grown(&mut self, had: usize) {
        let added = self.copied.len() - had;
        self.behind += added;
        self.length += added;
    }

    /// Writes what the other side takes at once, and says how much that was.
    pub(super) fn poll_write<S>(&mut self, io: Pin<&mut S>, cx: &mut Context<'_>) -> Poll<io::Result<usize>>
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
        if self.length == 0 {
            self.copied.clear();
            self.written = 0;
            if self.copied.capacity() > KEPT {
                self.copied = BytesMut::new();
            }
        }
    }

    /// Memory that it holds of its own.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.copied.capacity() + self.pieces.capacity()
    }

    /// Gives the memory of an empty output back.
    pub(super) fn release(&mut self) {
        if self.length == 0 {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Takes a few bytes at a time, from as many slices as they come in.
    struct Slow(Vec<u8>, usize);

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let taken = bytes.len().min(self.1);
            self.0.extend_from_slice(&bytes[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            slices: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let all: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let taken = all.len().min(self.1);
            self.0.extend_from_slice(&all[..taken]);
            Poll::Ready(Ok(taken))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn written(output: &mut Output, step: usize) -> Vec<u8> {
        let mut slow = Slow(Vec::new(), step);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while !output.is_empty() {
            assert!(output.poll_write(Pin::new(&mut slow), &mut cx).is_ready());
        }
        slow.0
    }

    proptest! {
        #[test]
        fn large_and_small_pieces_are_written_in_the_order_in_which_they_were_queued(
            sizes in proptest::collection::vec(prop_oneof![1usize..100, 3_000usize..70_000], 0..12), step in 1usize..100_000,
        ) {
            let mut output = Output::default();
            let mut expected = Vec::new();
            for (number, size) in (1u32..).zip(&sizes) {
                let payload = vec![number as u8; *size];
                output.frame(Kind::Credit, 0, number, &[1, 2, 3, 4]);
                output.data(number, Bytes::from(payload.clone()));
                expected.push((number, payload));
            }
            let total = output.len();
            let bytes = written(&mut output, step);
            prop_assert_eq!(bytes.len(), total);
            let mut bytes = BytesMut::from(&bytes[..]);
            for (stream, payload) in expected {
                prop_assert_eq!(frame::decode(&mut bytes).unwrap().unwrap().kind, Kind::Credit);
                let mut joined = Vec::new();
                while joined.len() < payload.len() {
                    let frame = frame::decode(&mut bytes).unwrap().unwrap();
                    prop_assert_eq!((frame.kind, frame.stream), (Kind::Data, stream));
                    joined.extend_from_slice(&frame.payload);
                }
                prop_assert_eq!(joined, payload);
            }
            prop_assert!(bytes.is_empty());
        }
    }

    #[test]
    fn full_frames_and_small_ones_among_them_are_one_write() {
        let mut output = Output::default();
        for stream in [1, 3] {
            output.data(stream, Bytes::from(vec![0; 4 * MAX_PAYLOAD]));
            output.frame(Kind::Credit, 0, stream, &[1, 2, 3, 4]);
        }
        assert_eq!(output.pieces.len(), 8, "all frames of DATA are full");
        let mut once = Slow(Vec::new(), usize::MAX);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(output.poll_write(Pin::new(&mut once), &mut cx).is_ready());
        assert!(output.is_empty(), "{} bytes are left", output.len());
    }

    #[test]
    fn a_read_of_64_kib_is_split_evenly() {
        let mut output = Output::default();
        output.data(1, Bytes::from(vec![0; 65_536]));
        let mut bytes = BytesMut::from(&written(&mut output, usize::MAX)[..]);
        let sizes: Vec<usize> = std::iter::from_fn(|| frame::decode(&mut bytes).unwrap())
            .map(|frame| frame.payload.len())
            .collect();
        assert_eq!(sizes, [13_108, 13_108, 13_108, 13_108, 13_104]);
    }

    #[test]
    fn a_large_buffer_is_given_back_once_it_is_written() {
        let mut output = Output::default();
        (0..100).for_each(|_| output.block(Kind::Head, 0, 1, &[0; 4_000]));
        assert!(output.copied.capacity() > KEPT);
        written(&mut output, usize::MAX);
        assert_eq!(output.copied.capacity(), 0);
    }
}
