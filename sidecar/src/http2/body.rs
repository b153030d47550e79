//! Bodies of HTTP/2 messages.

use bytes::{Bytes, BytesMut};

use super::frame::ErrorCode;
use super::stream::SendStream;
use crate::grpc;
use crate::http1::{Framing, Head};
use crate::message::PumpError;

/// Counts a body that is sent against the length that its head declares: a peer would take an end that came too early for a complete message.
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
pub fn break_off(stream: &mut SendStream, head: &Head, code: Option<u8>) {
    let code = code.map(|code| (code, ErrorCode(code.into())));
    if grpc::content_type(head).is_some() {
        let (status, message) = match code {
            Some((byte, code)) => {
                (grpc::status_of_reset(byte), format!("tulle: the server reset its stream ({code:?})"))
            }
            None => (14, "tulle: the server ended before its answer was complete".to_owned()),
        };
        let trailers = [
            (Bytes::from_static(b"grpc-status"), Bytes::from(status.to_string())),
            (Bytes::from_static(b"grpc-message"), Bytes::from(message)),
        ];
        if stream.end(Some(&trailers)).is_ok() {
            return;
        }
    }
    stream.reset(code.map_or(ErrorCode::INTERNAL_ERROR, |(_, code)| code));
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
