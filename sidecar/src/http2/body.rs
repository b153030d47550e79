//! Bodies of HTTP/2 messages.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue};
use tulle_mesh::wire::frame::Code;

use super::head::{lines, map};
use crate::grpc;
use crate::http1::{Framing, Head, Part};
use crate::message::PumpError;

/// Counts a body against the length that its head declares. h2 does so for what it receives but not for
/// what is sent: a peer would take an end that came too early for a complete message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Bytes that are still to come; `None` where no length was declared.
    left: Option<u64>,
}

impl Length {
    /// What the head of a message declares.
    pub fn of(head: &Head) -> Self {
        let left = if let Framing::Length(length) = head.framing { Some(length) } else { None };
        Self { left }
    }

    /// Counts so many bytes more.
    ///
    /// # Errors
    /// [`PumpError::SinkRefused`] when they are more than was declared; none of them may be sent.
    pub fn take(&mut self, bytes: usize) -> Result<(), PumpError> {
        let Some(left) = &mut self.left else { return Ok(()) };
        *left = left
            .checked_sub(bytes as u64)
            .ok_or(PumpError::SinkRefused("a body longer than its content-length"))?;
        Ok(())
    }

    /// The body has ended.
    ///
    /// # Errors
    /// [`PumpError::SinkRefused`] when bytes are missing; the message must be broken off.
    pub fn end(&self) -> Result<(), PumpError> {
        match self.left {
            None | Some(0) => Ok(()),
            Some(_) => Err(PumpError::SinkRefused("a body shorter than its content-length")),
        }
    }
}

/// Ends the answer with this head as broken off; `code` is what the server reset its own stream with, if it did. A gRPC
/// client gets the status that it would make of that code, in trailers, because a reset may overtake messages that wait
/// to be written; where the server has just gone, that it is not available, as without a mesh.
pub fn break_off(stream: &mut h2::SendStream<Bytes>, head: &Head, code: Option<u8>) {
    if grpc::content_type(head).is_some() {
        let (status, message) = match code {
            Some(code) => (
                grpc::status_of_reset(code),
                format!("tulle: the server reset its stream ({:?})", h2::Reason::from(u32::from(code))),
            ),
            None => (14, "tulle: the server ended before its answer was complete".to_owned()),
        };
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from(status));
        if let Ok(message) = HeaderValue::try_from(message) {
            trailers.insert("grpc-message", message);
        }
        if stream.send_trailers(trailers).is_ok() {
            return;
        }
    }
    stream.send_reset(code.map_or(h2::Reason::INTERNAL_ERROR, |code| u32::from(code).into()));
}

/// How a stream that the peer sends has broken off.
fn broken(error: &h2::Error) -> PumpError {
    let code = error.reason().filter(|_| error.is_reset() && error.is_remote()).map(u32::from);
    match code.map(u8::try_from) {
        Some(Ok(code)) => PumpError::SourceReset(Code::Http2(code)),
        _ => PumpError::SourceGone,
    }
}

/// The next part of a body.
///
/// # Errors
/// [`PumpError`] of the source.
pub async fn next_part(stream: &mut h2::RecvStream) -> Result<Part, PumpError> {
    if let Some(data) = stream.data().await {
        let bytes = data.map_err(|e| broken(&e))?;
        stream.flow_control().release_capacity(bytes.len()).map_err(|_| PumpError::SourceGone)?;
        return Ok(Part::Data(bytes));
    }
    match stream.trailers().await.map_err(|e| broken(&e))? {
        Some(trailers) => Ok(Part::Trailers(lines(&trailers))),
        None => Ok(Part::End),
    }
}

/// Sends bytes as the peer grants room for them.
///
/// # Errors
/// [`PumpError::SinkGone`].
pub async fn send(stream: &mut h2::SendStream<Bytes>, mut bytes: Bytes) -> Result<(), PumpError> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let room = poll_fn(|cx| stream.poll_capacity(cx)).await;
        let room = room.ok_or(PumpError::SinkGone)?.map_err(|_| PumpError::SinkGone)?;
        let piece = bytes.split_to(room.min(bytes.len()));
        stream.send_data(piece, false).map_err(|_| PumpError::SinkGone)?;
    }
    Ok(())
}

/// Ends a body.
///
/// # Errors
/// [`PumpError::SinkGone`].
pub fn finish(
    stream: &mut h2::SendStream<Bytes>,
    trailers: Option<Vec<(Bytes, Bytes)>>,
) -> Result<(), PumpError> {
    let sent = match trailers {
        Some(trailers) => stream.send_trailers(map(&trailers)),
        None => stream.send_data(Bytes::new(), true),
    };
    sent.map_err(|_| PumpError::SinkGone)
}

/// Trailers as they travel between sidecars.
pub fn trailer_block(trailers: &[(Bytes, Bytes)]) -> Bytes {
    let mut block = BytesMut::new();
    for (name, value) in trailers {
        for part in [name.as_ref(), b": ", value.as_ref(), b"\r\n"] {
            block.extend_from_slice(part);
        }
    }
    block.extend_from_slice(b"\r\n");
    block.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declared_length_is_neither_exceeded_nor_missed() {
        let mut length = Length::of(&Head::answer(200, "OK", 5));
        assert_eq!(length.take(2), Ok(()));
        assert!(length.end().is_err());
        assert!(length.take(4).is_err());
        assert_eq!(length.take(3), Ok(()));
        assert_eq!(length.end(), Ok(()));
        let mut open = Length::of(&Head { framing: Framing::Chunked, ..Head::answer(200, "OK", 5) });
        assert_eq!((open.take(1000), open.end()), (Ok(()), Ok(())));
    }
}
