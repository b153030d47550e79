//! Bytes that wait to be written: small ones gathered, big ones held as they came.

use std::io::IoSlice;

use bytes::{Bytes, BytesMut};

/// A piece from this size on is written from where it is instead of being copied. Below it the copy costs
/// less than another entry of `writev`.
const BIG: usize = 8 * 1024;
/// The entries of one `writev`: eight full frames of another sidecar, with the lines of their chunks between them.
pub(super) const MAX_SLICES: usize = 24;

/// What waits to be written.
#[derive(Debug, Default)]
pub(super) struct Out {
    small: BytesMut,
    /// Big pieces, each with the place among the small bytes where it belongs.
    big: Vec<(usize, Bytes)>,
    big_bytes: usize,
    /// Bytes that have been written, from the front.
    written: usize,
}

impl Out {
    /// How many bytes wait.
    pub(super) fn len(&self) -> usize {
        (self.small.len() + self.big_bytes).saturating_sub(self.written)
    }

    /// Whether none wait.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where small bytes are appended.
    pub(super) fn small(&mut self) -> &mut BytesMut {
        &mut self.small
    }

    /// Appends a piece.
    pub(super) fn push(&mut self, bytes: &Bytes) {
        if bytes.len() < BIG {
            self.small.extend_from_slice(bytes);
        } else {
            self.big_bytes += bytes.len();
            self.big.push((self.small.len(), bytes.clone()));
        }
    }

    /// The bytes that wait, in order, as far as there is room; returns how many slices were used.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.written;
        let mut used = 0;
        let mut add = |part: &'a [u8]| {
            let rest = part.get(skip..).unwrap_or(&[]);
            skip = skip.saturating_sub(part.len());
            if !rest.is_empty()
                && let Some(slice) = slices.get_mut(used)
            {
                *slice = IoSlice::new(rest);
                used += 1;
            }
        };
        let mut from = 0;
        for (at, bytes) in &self.big {
            add(self.small.get(from..*at).unwrap_or(&[]));
            add(bytes);
            from = *at;
        }
        add(self.small.get(from..).unwrap_or(&[]));
        used
    }

    /// So many more bytes have been written.
    pub(super) fn advance(&mut self, written: usize) {
        self.written += written;
        if self.is_empty() {
            self.small.clear();
            self.big.clear();
            self.big_bytes = 0;
            self.written = 0;
        }
    }

    /// Gives the memory back, if nothing waits: most connections are idle.
    pub(super) fn release(&mut self) {
        if self.is_empty() {
            self.small = BytesMut::new();
            self.big = Vec::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(out: &Out) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let used = out.slices(&mut slices);
        slices[..used].iter().flat_map(|slice| slice.iter().copied()).collect()
    }

    #[test]
    fn bytes_keep_their_order_whatever_their_size_and_wherever_a_write_ends() {
        let mut out = Out::default();
        let mut whole = Vec::new();
        for (fill, length) in [(b'a', 10), (b'b', BIG), (b'c', BIG + 7), (b'd', 3), (b'e', 9000), (b'f', 1)] {
            let piece = vec![fill; length];
            whole.extend_from_slice(&piece);
            out.push(&Bytes::from(piece));
        }
        for step in [0, 1, 9, 1, BIG - 1, 1, 5000, 4000, 8000] {
            out.advance(step);
            whole.drain(..step);
            assert_eq!(out.len(), whole.len());
            assert_eq!(waiting(&out), whole);
        }
        out.advance(whole.len());
        assert!(out.is_empty());
        out.push(&Bytes::from_static(b"next"));
        assert_eq!(waiting(&out), b"next");
    }

    #[test]
    fn a_big_piece_is_not_copied() {
        let mut out = Out::default();
        let piece = Bytes::from(vec![1; BIG]);
        out.push(&piece);
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        out.slices(&mut slices);
        assert_eq!(slices[0].as_ptr(), piece.as_ptr());
    }

    #[test]
    fn memory_is_given_back_when_nothing_waits() {
        let mut out = Out::default();
        out.push(&Bytes::from(vec![1; 4000]));
        out.release();
        assert_eq!(out.len(), 4000);
        out.advance(4000);
        out.release();
        assert_eq!(out.small().capacity(), 0);
    }
}
