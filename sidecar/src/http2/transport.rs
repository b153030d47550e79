//! A transport that leaves out DATA frames without content.
//!
//! h2 ends a connection after 100 of them, however long it lasts, and has no setting for that: on a connection to an
//! application one client's requests would end all others. Servers send such frames where a flush has nothing to send.
//! They have no effect (RFC 9113 §6.1), unless they end their stream. Those with padding are left to h2: the peer's
//! window has to be given back for them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::io::writes_to_stream;

/// Bytes of the header of a frame (RFC 9113 §4.1).
const HEADER: usize = 9;
/// What a client's connection begins with (RFC 9113 §3.4).
const PREFACE: usize = 24;
/// Room for a read where the reader has hardly any.
const ASIDE: usize = 64;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;

/// A connection whose empty DATA frames are not read.
#[derive(Debug)]
pub struct WithoutEmptyData<S> {
    stream: S,
    /// Bytes that are still to come of a payload, or of the preface.
    payload: usize,
    /// The beginning of the next header, which has not been passed on: what it is the beginning of is not known yet.
    held: [u8; HEADER],
    held_len: usize,
    /// What may be read, and did not fit into the reader's room.
    waiting: BytesMut,
}

impl<S> WithoutEmptyData<S> {
    /// A client's connection, from its preface on.
    pub fn of_client(stream: S) -> Self {
        Self { payload: PREFACE, ..Self::of_server(stream) }
    }

    /// A server's connection.
    pub fn of_server(stream: S) -> Self {
        Self { stream, payload: 0, held: [0; HEADER], held_len: 0, waiting: BytesMut::new() }
    }

    /// Moves together what is passed on of these bytes, which begin with those that were held. Returns how many they are.
    fn sift(&mut self, bytes: &mut [u8]) -> usize {
        let (mut from, mut to) = (0, 0);
        self.held_len = 0;
        while from < bytes.len() {
            let mut pass = self.payload.min(bytes.len() - from);
            if pass > 0 {
                self.payload -= pass;
            } else {
                let rest = bytes.get(from..).unwrap_or_default();
                let Some(header) = rest.first_chunk::<HEADER>() else {
                    self.held_len = rest.len();
                    self.held.iter_mut().zip(rest).for_each(|(held, byte)| *held = *byte);
                    break;
                };
                let [l0, l1, l2, kind, flags, ..] = *header;
                self.payload = u32::from_be_bytes([0, l0, l1, l2]) as usize;
                if kind == DATA && self.payload == 0 && flags & END_STREAM == 0 {
                    from += HEADER;
                    continue;
                }
                pass = HEADER;
            }
            if from > to {
                bytes.copy_within(from..from + pass, to);
            }
            from += pass;
            to += pass;
        }
        to
    }
}

impl<S: AsyncRead + Unpin> WithoutEmptyData<S> {
    /// Reads into this room, which is larger than a header. `false`: nothing of what came is passed on, and more may
    /// follow.
    fn fill(&mut self, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<bool>> {
        let before = room.filled().len();
        room.put_slice(self.held.get(..self.held_len).unwrap_or_default());
        let with_held = room.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, room);
        if !matches!(read, Poll::Ready(Ok(()))) {
            room.set_filled(before);
            return read.map_ok(|()| false);
        }
        if room.filled().len() == with_held {
            // The end, maybe amid a header: h2 sees which of the two.
            self.held_len = 0;
            return Poll::Ready(Ok(true));
        }
        let passed = self.sift(room.filled_mut().get_mut(before..).unwrap_or_default());
        room.set_filled(before + passed);
        Poll::Ready(Ok(passed > 0))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithoutEmptyData<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.waiting.is_empty() {
                let take = this.waiting.len().min(room.remaining());
                room.put_slice(&this.waiting.split_to(take));
                return Poll::Ready(Ok(()));
            }
            if room.remaining() > HEADER {
                if ready!(this.fill(cx, room))? {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let mut aside = [0; ASIDE];
            let mut aside = ReadBuf::new(&mut aside);
            if ready!(this.fill(cx, &mut aside))? && aside.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.waiting.extend_from_slice(aside.filled());
        }
    }
}

writes_to_stream!([S: AsyncWrite + Unpin] WithoutEmptyData<S>);

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// Gives so many bytes at a time.
    struct Pieces {
        bytes: Vec<u8>,
        piece: usize,
    }

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            room: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let take = self.piece.min(self.bytes.len()).min(room.remaining());
            let taken: Vec<u8> = self.bytes.drain(..take).collect();
            room.put_slice(&taken);
            Poll::Ready(Ok(()))
        }
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0, 0, u8::try_from(payload.len()).unwrap(), kind, flags, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    async fn read_all(mut transport: WithoutEmptyData<Pieces>, room: usize) -> Vec<u8> {
        let (mut all, mut some) = (Vec::new(), vec![0; room]);
        loop {
            let read = transport.read(&mut some).await.unwrap();
            if read == 0 {
                return all;
            }
            all.extend_from_slice(&some[..read]);
        }
    }

    #[tokio::test]
    async fn empty_data_is_left_out_and_everything_else_is_passed_on_however_it_comes() {
        let empty = frame(DATA, 0, b"");
        // Content that looks like an empty frame, an end, and a frame of another kind without content.
        let kept = [frame(DATA, 0, &empty), frame(4, 0, b""), frame(DATA, 0, b"x"), frame(DATA, 1, b"")];
        let mut sent = empty.clone();
        for frame in &kept {
            sent.extend_from_slice(frame);
            sent.extend_from_slice(&empty.repeat(3));
        }
        let expected = kept.concat();
        for piece in (1..40).chain([1000]) {
            for room in (1..40).chain([1000]) {
                let server = WithoutEmptyData::of_server(Pieces { bytes: sent.clone(), piece });
                assert_eq!(read_all(server, room).await, expected, "{piece} into {room}");
            }
        }
    }

    #[tokio::test]
    async fn a_preface_is_not_taken_for_frames_and_a_header_that_breaks_off_is_passed_on() {
        let (preface, broken) = (vec![0; PREFACE], vec![0, 0, 1, 0]);
        let sent = [preface.clone(), frame(DATA, 0, b""), broken.clone()].concat();
        let client = WithoutEmptyData::of_client(Pieces { bytes: sent, piece: 7 });
        assert_eq!(read_all(client, 50).await, [preface, broken].concat());
    }
}
