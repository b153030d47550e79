//! What is read from a connection, until it is whole frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

use super::connection::Broken;
use super::frame::{self, HEADER, Header, MAX_PAYLOAD};

/// Room for a read.
const ROOM: usize = 8 * 1024;
/// The same while as much arrives as is read.
const WIDE_ROOM: usize = 64 * 1024;
/// Content from this size on stays where it was read; below it a copy is cheaper than a buffer that it would hold.
const WORTH_HOLDING: usize = 4 * 1024;

/// Frames as they arrive.
pub(super) struct Input {
    buffer: BytesMut,
    /// The preface has to come yet.
    wants_preface: bool,
    /// The last read has filled its room.
    is_busy: bool,
}

/// What could be read.
pub(super) enum Read {
    /// A whole frame, whose payload is in front.
    Frame(Header),
    /// The peer has closed.
    End,
}

impl Input {
    /// `buffer` has been read already.
    pub(super) fn new(buffer: BytesMut, wants_preface: bool) -> Self {
        Self { buffer, wants_preface, is_busy: false }
    }

    /// The next frame. Its payload is to be taken before the next one.
    pub(super) fn poll_frame<S>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Result<Read, Broken>>>
    where
        S: AsyncRead + Unpin,
    {
        loop {
            match self.whole() {
                Err(broken) => return Poll::Ready(Ok(Err(broken))),
                Ok(Some(header)) => return Poll::Ready(Ok(Ok(Read::Frame(header)))),
                Ok(None) => {}
            }
            let room = if self.is_busy { WIDE_ROOM } else { ROOM };
            if self.buffer.capacity() - self.buffer.len() < room / 2 {
                self.buffer.reserve(room);
            }
            let had_room = self.buffer.capacity() - self.buffer.len();
            match poll_read_buf(Pin::new(&mut *io), cx, &mut self.buffer) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(Ok(Read::End))),
                Poll::Ready(Ok(read)) => self.is_busy = read == had_room,
            }
        }
    }

    /// The header of the frame in front, if it is whole.
    fn whole(&mut self) -> Result<Option<Header>, Broken> {
        if self.wants_preface {
            let have = self.buffer.len().min(frame::PREFACE.len());
            if self.buffer.get(..have) != frame::PREFACE.get(..have) {
                return Err(Broken::protocol("no preface"));
            }
            if have < frame::PREFACE.len() {
                return Ok(None);
            }
            self.buffer.advance(have);
            self.wants_preface = false;
        }
        let Some(header) = self.buffer.first_chunk::<HEADER>() else { return Ok(None) };
        let header = Header::parse(*header);
        if header.length > MAX_PAYLOAD {
            return Err(Broken::size("a frame that is too long"));
        }
        if self.buffer.len() < HEADER + header.length {
            return Ok(None);
        }
        self.buffer.advance(HEADER);
        Ok(Some(header))
    }

    /// The payload of the frame in front.
    pub(super) fn payload(&self, header: Header) -> &[u8] {
        self.buffer.get(..header.length).unwrap_or_default()
    }

    /// Takes the payload away.
    pub(super) fn skip(&mut self, header: Header) {
        self.buffer.advance(header.length.min(self.buffer.len()));
    }

    /// Takes the payload of DATA, and gives what is between its padding. `None`: more padding than payload.
    pub(super) fn content(&mut self, header: Header) -> Option<Bytes> {
        let content = frame::without_padding(header, self.payload(header))?;
        if content.len() < WORTH_HOLDING {
            let content = Bytes::copy_from_slice(content);
            self.skip(header);
            return Some(content);
        }
        let (from, length) = (usize::from(header.has(frame::PADDED)), content.len());
        let mut payload = self.buffer.split_to(header.length).freeze();
        payload.advance(from);
        payload.truncate(length);
        Some(payload)
    }

    /// Whether something waits that is no whole frame.
    pub(super) fn is_amid_frame(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Gives memory back while nothing arrives.
    pub(super) fn release(&mut self) {
        if self.buffer.is_empty() && self.buffer.capacity() > 0 {
            self.buffer = BytesMut::new();
        }
    }
}
