//! The frames of this protocol, as they are appended to the output of a connection.

use bytes::Bytes;
use tulle_mesh::wire::MAX_PAYLOAD;
use tulle_mesh::wire::frame::{self, Header, Kind};

use crate::output::Output;

impl Output {
    /// Appends a frame.
    pub(super) fn frame(&mut self, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
        self.copy(|copied| frame::encode(copied, kind, flags, stream, payload));
    }

    /// Appends a head or trailers.
    pub(super) fn block(&mut self, kind: Kind, flags: u8, stream: u32, block: &[u8]) {
        self.copy(|copied| frame::encode_block(copied, kind, flags, stream, block));
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
        let header = Header { kind: Kind::Data, flags: 0, stream, length: bytes.len() };
        self.copy(|copied| frame::encode_header(copied, header));
        self.piece(bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, IoSlice};
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use bytes::BytesMut;
    use proptest::prelude::*;
    use tokio::io::AsyncWrite;

    use super::*;
    use crate::output::KEPT;

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
        assert_eq!(output.pieces(), 8, "all frames of DATA are full");
        let mut once = Slow(Vec::new(), usize::MAX);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(output.poll_write(Pin::new(&mut once), &mut cx).is_ready());
        assert!(output.is_empty(), "{} bytes are left", output.len());
    }

    #[test]
    fn what_has_been_written_takes_no_memory_though_more_always_waits() {
        let mut output = Output::default();
        let mut slow = Slow(Vec::new(), 10_000);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut queued = 0;
        for number in 0..5_000_u32 {
            while output.len() < 64 * 1024 {
                output.data(number, Bytes::from(vec![0; 1_000]));
                queued += 1_000 + frame::HEADER;
            }
            assert!(output.poll_write(Pin::new(&mut slow), &mut cx).is_ready());
        }
        assert!(output.held() < 512 * 1024, "{} bytes", output.held());
        assert_eq!(slow.0.len() + output.len(), queued, "nothing is lost");
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
        assert!(output.held() > KEPT);
        written(&mut output, usize::MAX);
        assert_eq!(output.held(), 0);
    }
}
