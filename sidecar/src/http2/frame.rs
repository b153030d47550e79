//! Frames (RFC 9113 §4, §6).

use bytes::{BufMut as _, BytesMut};

/// Bytes of a frame's header.
pub const HEADER: usize = 9;
/// The longest payload that is received, and that is sent: HTTP/2's default.
pub const MAX_PAYLOAD: usize = 16_384;
/// What a client's connection begins with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Kinds of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

/// Flags.
pub const ACK: u8 = 0x1;
pub const END_STREAM: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;
pub const PADDED: u8 = 0x8;
pub const HAS_PRIORITY: u8 = 0x20;

/// Settings.
pub const HEADER_TABLE_SIZE: u16 = 1;
pub const ENABLE_PUSH: u16 = 2;
pub const MAX_CONCURRENT_STREAMS: u16 = 3;
pub const INITIAL_WINDOW_SIZE: u16 = 4;
pub const MAX_FRAME_SIZE: u16 = 5;
pub const MAX_HEADER_LIST_SIZE: u16 = 6;

/// Why a stream or a connection is ended (RFC 9113 §7).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ErrorCode(pub u32);

impl ErrorCode {
    /// No error.
    pub const NO_ERROR: Self = Self(0);
    /// The peer broke the protocol, or sent a message that is malformed.
    pub const PROTOCOL_ERROR: Self = Self(1);
    /// Ours to explain.
    pub const INTERNAL_ERROR: Self = Self(2);
    /// More bytes than were granted, or more granted than fit.
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    /// A frame for a stream whose half has ended.
    pub const STREAM_CLOSED: Self = Self(5);
    /// A frame of a size that its kind cannot have.
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    /// The request was not looked at, and may be sent again.
    pub const REFUSED_STREAM: Self = Self(7);
    /// Nobody needs the stream any more.
    pub const CANCEL: Self = Self(8);
    /// A header block that cannot be decoded.
    pub const COMPRESSION_ERROR: Self = Self(9);
    /// The peer costs more than it may.
    pub const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl std::fmt::Debug for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [&str; 14] = [
            "NO_ERROR",
            "PROTOCOL_ERROR",
            "INTERNAL_ERROR",
            "FLOW_CONTROL_ERROR",
            "SETTINGS_TIMEOUT",
            "STREAM_CLOSED",
            "FRAME_SIZE_ERROR",
            "REFUSED_STREAM",
            "CANCEL",
            "COMPRESSION_ERROR",
            "CONNECT_ERROR",
            "ENHANCE_YOUR_CALM",
            "INADEQUATE_SECURITY",
            "HTTP_1_1_REQUIRED",
        ];
        match NAMES.get(self.0 as usize) {
            Some(name) => f.write_str(name),
            None => write!(f, "error code {}", self.0),
        }
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the payload.
    pub length: usize,
    /// What it is.
    pub kind: u8,
    /// What its kind makes of them.
    pub flags: u8,
    /// Whose it is; 0: the connection's.
    pub stream: u32,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: [u8; HEADER]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        Self {
            length: u32::from_be_bytes([0, l0, l1, l2]) as usize,
            kind,
            flags,
            stream: u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff,
        }
    }

    /// Whether it has a flag.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Writes it.
    pub fn put(self, to: &mut BytesMut) {
        let [_, l0, l1, l2] = (self.length as u32).to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        to.put_slice(&[l0, l1, l2, self.kind, self.flags, s0, s1, s2, s3]);
    }
}

/// Writes a short frame.
pub fn put(to: &mut BytesMut, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    Header { length: payload.len(), kind, flags, stream }.put(to);
    to.put_slice(payload);
}

/// Writes HEADERS, and CONTINUATION where the block needs it. `encode` appends the block.
pub fn put_block(to: &mut BytesMut, stream: u32, end: bool, encode: impl FnOnce(&mut BytesMut)) {
    let at = to.len();
    let flags = if end { END_STREAM } else { 0 };
    put(to, HEADERS, flags | END_HEADERS, stream, &[]);
    encode(to);
    let length = to.len() - at - HEADER;
    if length > MAX_PAYLOAD {
        let block = to.split_off(at + HEADER);
        to.truncate(at);
        for (number, piece) in block.chunks(MAX_PAYLOAD).enumerate() {
            let kind = if number == 0 { HEADERS } else { CONTINUATION };
            let first = if number == 0 { flags } else { 0 };
            let last = if (number + 1) * MAX_PAYLOAD >= length { END_HEADERS } else { 0 };
            put(to, kind, first | last, stream, piece);
        }
        return;
    }
    let [_, l0, l1, l2] = (length as u32).to_be_bytes();
    to.iter_mut().skip(at).zip([l0, l1, l2]).for_each(|(byte, part)| *byte = part);
}

/// What is between the padding of a frame, and the bytes that padding takes. `None`: more padding than payload.
pub fn without_padding(header: Header, payload: &[u8]) -> Option<&[u8]> {
    if !header.has(PADDED) {
        return Some(payload);
    }
    let (length, rest) = payload.split_first()?;
    rest.get(..rest.len().checked_sub(usize::from(*length))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_split_where_a_frame_ends() {
        for (length, kinds) in [
            (0, vec![(HEADERS, 0, END_STREAM | END_HEADERS)]),
            (MAX_PAYLOAD, vec![(HEADERS, MAX_PAYLOAD, END_STREAM | END_HEADERS)]),
            (MAX_PAYLOAD + 1, vec![(HEADERS, MAX_PAYLOAD, END_STREAM), (CONTINUATION, 1, END_HEADERS)]),
            (
                2 * MAX_PAYLOAD,
                vec![(HEADERS, MAX_PAYLOAD, END_STREAM), (CONTINUATION, MAX_PAYLOAD, END_HEADERS)],
            ),
        ] {
            let mut out = BytesMut::from(&b"before"[..]);
            put_block(&mut out, 5, true, |to| to.resize(to.len() + length, 7));
            let mut rest = &out[6..];
            for (kind, length, flags) in kinds {
                let header = Header::parse(rest[..HEADER].try_into().unwrap());
                assert_eq!(header, Header { length, kind, flags, stream: 5 });
                rest = &rest[HEADER + length..];
            }
            assert!(rest.is_empty());
        }
    }

    #[test]
    fn padding_is_left_out() {
        let header = Header { length: 0, kind: DATA, flags: PADDED, stream: 1 };
        assert_eq!(without_padding(header, b"\x02abxx"), Some(&b"ab"[..]));
        assert_eq!(without_padding(header, b"\x00"), Some(&b""[..]));
        assert_eq!(without_padding(header, b"\x01"), None);
        assert_eq!(without_padding(header, b""), None);
        assert_eq!(without_padding(Header { flags: 0, ..header }, b"\x02a"), Some(&b"\x02a"[..]));
    }
}
