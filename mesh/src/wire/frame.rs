//! Frames: an eight-byte header (payload length, kind, flags, stream) and at most 16 KiB in all.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::MAX_PAYLOAD;

/// Bytes of a frame's header.
pub const HEADER: usize = 8;
/// Flag: no more DATA follows in this direction.
pub const END: u8 = 0x1;
/// Flag: the head or the trailers go on in the next frame of the same kind and stream.
pub const MORE: u8 = 0x2;
/// Flag on PING: the answer.
pub const ACK: u8 = 0x1;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Opens a stream: its head.
    Open = 1,
    /// The head of the answer.
    Head = 2,
    /// Bytes of a body or of an opaque connection.
    Data = 3,
    /// Trailers of an HTTP message; ends the direction.
    Trailers = 4,
    /// Ends a stream at once; payload: [`Code`] as u32.
    Reset = 5,
    /// Grants more DATA; payload: u32. Stream 0: the connection.
    Credit = 6,
    /// Stream 0, eight opaque bytes; answered with [`ACK`].
    Ping = 7,
    /// Stream 0: no new streams, running ones end as they do.
    GoAway = 8,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Open,
            2 => Self::Head,
            3 => Self::Data,
            4 => Self::Trailers,
            5 => Self::Reset,
            6 => Self::Credit,
            7 => Self::Ping,
            8 => Self::GoAway,
            _ => return None,
        })
    }
}

/// On the wire, codes from here on are [`Code::Http2`].
const HTTP2: u32 = 0x100;

/// Why a stream was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The sender is no longer interested.
    Cancel,
    /// No byte reached the application: the request may be sent elsewhere, whatever its method.
    NotProcessed,
    /// The application's side failed while the request was under way.
    UpstreamFailed,
    /// Refused by a policy.
    Denied,
    /// The head could not be read or holds an unknown critical field.
    BadHead,
    /// More streams or bytes than were granted.
    FlowControl,
    /// The application reset its HTTP/2 stream with this error code (RFC 9113 §7), behind the head of its answer.
    Http2(u8),
    /// A code that this build does not know.
    Unknown,
}

impl Code {
    /// Reads a code from the wire; an unknown one is [`Code::Unknown`].
    pub fn from_u32(code: u32) -> Self {
        match code {
            1 => Self::Cancel,
            2 => Self::NotProcessed,
            3 => Self::UpstreamFailed,
            4 => Self::Denied,
            5 => Self::BadHead,
            6 => Self::FlowControl,
            _ => match code.checked_sub(HTTP2).map(u8::try_from) {
                Some(Ok(http2)) => Self::Http2(http2),
                _ => Self::Unknown,
            },
        }
    }

    /// The code as it is on the wire.
    pub fn to_u32(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::Cancel => 1,
            Self::NotProcessed => 2,
            Self::UpstreamFailed => 3,
            Self::Denied => 4,
            Self::BadHead => 5,
            Self::FlowControl => 6,
            Self::Http2(code) => HTTP2 + u32::from(code),
        }
    }
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub kind: Kind,
    /// [`END`], [`MORE`], [`ACK`].
    pub flags: u8,
    /// The stream; 0 for the connection. Clients open odd streams, ascending.
    pub stream: u32,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: Bytes,
}

/// How a peer broke the protocol; the connection is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A length over [`MAX_PAYLOAD`].
    #[error("the peer announced a frame of {0} bytes")]
    TooLong(usize),
    /// A kind that this version does not know.
    #[error("the peer sent an unknown kind of frame: {0}")]
    UnknownKind(u8),
    /// A payload whose length does not fit its kind.
    #[error("the peer sent a {0:?} frame with a payload of {1} bytes")]
    PayloadLength(Kind, usize),
    /// A connection frame on a stream, or a stream frame on the connection.
    #[error("the peer sent a {0:?} frame on stream {1}")]
    WrongStream(Kind, u32),
}

/// The header of a frame, checked as far as it can be without the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame carries.
    pub kind: Kind,
    /// [`END`], [`MORE`], [`ACK`].
    pub flags: u8,
    /// The stream; 0 for the connection.
    pub stream: u32,
    /// Bytes of payload that follow, at most [`MAX_PAYLOAD`].
    pub length: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// [`FrameError`]; the connection is then useless.
    pub fn parse(bytes: [u8; HEADER]) -> Result<Self, FrameError> {
        let [l0, l1, kind, flags, s0, s1, s2, s3] = bytes;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        let stream = u32::from_be_bytes([s0, s1, s2, s3]);
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        let kind = Kind::from_byte(kind).ok_or(FrameError::UnknownKind(kind))?;
        let fits = match kind {
            Kind::Reset | Kind::Credit => length == 4,
            Kind::Ping => length == 8,
            Kind::GoAway => length == 0,
            Kind::Open | Kind::Head | Kind::Data | Kind::Trailers => true,
        };
        if !fits {
            return Err(FrameError::PayloadLength(kind, length));
        }
        let on_connection =
            matches!(kind, Kind::Ping | Kind::GoAway) || (kind == Kind::Credit && stream == 0);
        if on_connection != (stream == 0) {
            return Err(FrameError::WrongStream(kind, stream));
        }
        Ok(Self { kind, flags, stream, length })
    }

    /// The frame with this payload.
    pub fn with(self, payload: Bytes) -> Frame {
        Frame { kind: self.kind, flags: self.flags, stream: self.stream, payload }
    }
}

/// Takes the next whole frame off `buffer`; `None` until there is one.
///
/// # Errors
/// [`FrameError`] as soon as the header shows it; the buffer is then useless.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    let Some(header) = buffer.first_chunk::<HEADER>() else { return Ok(None) };
    let header = Header::parse(*header)?;
    if buffer.len() < HEADER + header.length {
        return Ok(None);
    }
    buffer.advance(HEADER);
    Ok(Some(header.with(buffer.split_to(header.length).freeze())))
}

/// Appends a frame. The payload must be at most [`MAX_PAYLOAD`] bytes; longer ones are cut, so
/// callers split before.
pub fn encode(out: &mut BytesMut, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
    let payload = payload.get(..MAX_PAYLOAD).unwrap_or(payload);
    out.reserve(HEADER + payload.len());
    encode_header(out, Header { kind, flags, stream, length: payload.len() });
    out.put_slice(payload);
}

/// Appends the header of a frame whose payload is written from elsewhere.
pub fn encode_header(out: &mut BytesMut, header: Header) {
    out.put_u16(header.length as u16);
    out.put_u8(header.kind as u8);
    out.put_u8(header.flags);
    out.put_u32(header.stream);
}

/// Appends a head or trailers, in as many frames as it takes.
pub fn encode_block(out: &mut BytesMut, kind: Kind, flags: u8, stream: u32, block: &[u8]) {
    let mut rest = block;
    while let Some((now, later)) = rest.split_at_checked(MAX_PAYLOAD).filter(|(_, later)| !later.is_empty()) {
        encode(out, kind, MORE, stream, now);
        rest = later;
    }
    encode(out, kind, flags, stream, rest);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_split_of_the_bytes(
            stream in 1u32.., flags in 0u8..4, payload in proptest::collection::vec(any::<u8>(), 0..600), cut in 0usize..700,
        ) {
            let mut bytes = BytesMut::new();
            encode(&mut bytes, Kind::Data, flags, stream, &payload);
            encode(&mut bytes, Kind::Ping, 0, 0, b"12345678");
            let cut = cut.min(bytes.len());
            let mut early = BytesMut::from(&bytes[..cut]);
            let mut seen = Vec::new();
            while let Some(frame) = decode(&mut early).unwrap() { seen.push(frame); }
            early.extend_from_slice(&bytes[cut..]);
            while let Some(frame) = decode(&mut early).unwrap() { seen.push(frame); }
            prop_assert_eq!(seen.len(), 2);
            prop_assert_eq!(&seen[0], &Frame { kind: Kind::Data, flags, stream, payload: payload.into() });
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = decode(&mut buffer) {}
        }

        #[test]
        fn blocks_of_any_length_come_together_again(length in 0usize..70_000) {
            let block = vec![7u8; length];
            let mut bytes = BytesMut::new();
            encode_block(&mut bytes, Kind::Open, END, 1, &block);
            let (mut joined, mut last) = (Vec::new(), 0);
            while let Some(frame) = decode(&mut bytes).unwrap() {
                joined.extend_from_slice(&frame.payload);
                last = frame.flags;
            }
            prop_assert_eq!(joined, block);
            prop_assert_eq!(last, END);
        }
    }

    #[test]
    fn broken_headers_are_refused_before_their_payload_arrives() {
        let refuse = |bytes: &[u8]| decode(&mut BytesMut::from(bytes)).unwrap_err();
        assert_eq!(refuse(&[0xff, 0xff, 3, 0, 0, 0, 0, 1]), FrameError::TooLong(65535));
        assert_eq!(refuse(&[0, 0, 99, 0, 0, 0, 0, 1]), FrameError::UnknownKind(99));
        assert_eq!(refuse(&[0, 3, 6, 0, 0, 0, 0, 1]), FrameError::PayloadLength(Kind::Credit, 3));
        assert_eq!(refuse(&[0, 0, 3, 0, 0, 0, 0, 0]), FrameError::WrongStream(Kind::Data, 0));
        assert_eq!(refuse(&[0, 8, 7, 0, 0, 0, 0, 1]), FrameError::WrongStream(Kind::Ping, 1));
    }
}
