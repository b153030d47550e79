//! Bodies: what the framing of the head says, byte for byte.

use bytes::{Bytes, BytesMut};
use memchr::memchr;

use super::error::HeadError;
use super::fields::Kind;
use super::model::{Framing, put_number};
use super::parse::parse_trailers;
use super::scan::Scan;

/// A piece of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Bytes.
    Data(Bytes),
    /// Trailers; the end follows.
    Trailers(Vec<(Bytes, Bytes)>),
    /// The body is complete.
    End,
}

/// Finds the parts of a body in the bytes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoder {
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Length(u64),
    ChunkSize(Kind),
    Chunk(u64, Kind),
    ChunkEnd(Kind),
    Trailers(Scan),
    UntilClose,
    Done,
}

/// The longest line of a chunk's size, without its CRLF: digits and an extension that nobody reads.
const MAX_CHUNK_LINE: usize = 4096;

impl Decoder {
    /// A decoder for a request with this framing.
    pub fn new(framing: Framing) -> Self {
        Self::of(framing, Kind::Request)
    }

    /// A decoder for a response with this framing: sizes of chunks may be padded, since we write them anew.
    pub fn for_response(framing: Framing) -> Self {
        Self::of(framing, Kind::Response)
    }

    fn of(framing: Framing, kind: Kind) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize(kind),
            Framing::UntilClose => State::UntilClose,
        };
        Self { state }
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Takes the next part off the buffer; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`HeadError`] when the chunks are malformed; the connection cannot be used further.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Part>, HeadError> {
        loop {
            match self.state {
                State::Done => return Ok(Some(Part::End)),
                State::UntilClose if buffer.is_empty() => return Ok(None),
                State::UntilClose => return Ok(Some(Part::Data(buffer.split().freeze()))),
                State::Length(left) | State::Chunk(left, _) => {
                    if buffer.is_empty() {
                        return Ok(None);
                    }
                    let take = (buffer.len() as u64).min(left);
                    let bytes = buffer.split_to(take as usize).freeze();
                    self.state = match (&self.state, left - take) {
                        (State::Chunk(_, kind), 0) => State::ChunkEnd(*kind),
                        (State::Chunk(_, kind), left) => State::Chunk(left, *kind),
                        (_, 0) => State::Done,
                        (_, left) => State::Length(left),
                    };
                    return Ok(Some(Part::Data(bytes)));
                }
                State::ChunkEnd(kind) => match buffer.get(..2) {
                    None => return Ok(None),
                    Some(b"\r\n") => {
                        let _ = buffer.split_to(2);
                        self.state = State::ChunkSize(kind);
                    }
                    Some(_) => return Err(HeadError("a chunk without CRLF after its bytes")),
                },
                State::ChunkSize(kind) => {
                    let Some(size) = chunk_size(buffer, kind)? else { return Ok(None) };
                    self.state = match size {
                        0 => State::Trailers(Scan::default()),
                        size => State::Chunk(size, kind),
                    };
                }
                State::Trailers(mut scan) => {
                    let end = scan.end(buffer)?;
                    self.state = if end.is_some() { State::Done } else { State::Trailers(scan) };
                    let Some(end) = end else { return Ok(None) };
                    let trailers = parse_trailers(&buffer.split_to(end).freeze())?;
                    if !trailers.is_empty() {
                        return Ok(Some(Part::Trailers(trailers)));
                    }
                }
            }
        }
    }

    /// The connection has closed: whether that completes the body.
    pub fn closed(&mut self) -> bool {
        if self.state == State::UntilClose {
            self.state = State::Done;
        }
        self.is_done()
    }
}

/// RFC 9112 §7.1.1 allows whitespace between a size and its extension. Some servers pad a size that has no extension, or
/// write many zeros before it: that has one reading too, but only what a server sends is repaired.
fn chunk_size(buffer: &mut BytesMut, kind: Kind) -> Result<Option<u64>, HeadError> {
    const LONGEST: usize = MAX_CHUNK_LINE + b"\r\n".len();
    let beginning = buffer.get(..LONGEST).unwrap_or(&buffer[..]);
    let Some(end) = memchr(b'\n', beginning) else {
        let too_long = buffer.len() >= LONGEST;
        return if too_long { Err(HeadError("a chunk's size is too long")) } else { Ok(None) };
    };
    let line = buffer.split_to(end + 1);
    let line = line.strip_suffix(b"\r\n").ok_or(HeadError("a bare line feed after a chunk's size"))?;
    if line.contains(&b'\r') {
        return Err(HeadError("a bare carriage return after a chunk's size"));
    }
    let mut parts = line.splitn(2, |byte| *byte == b';');
    let size = parts.next().unwrap_or(&[]);
    let may_be_padded = parts.next().is_some() || kind == Kind::Response;
    let digits = if may_be_padded { without_padding(size) } else { size };
    let too_many = digits.len() > 16 && kind == Kind::Request;
    if digits.is_empty() || too_many || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(HeadError("a chunk's size that is not 1 to 16 hex digits"));
    }
    let text = std::str::from_utf8(digits).unwrap_or("");
    u64::from_str_radix(text, 16).map(Some).map_err(|_| HeadError("a chunk's size that does not fit"))
}

fn without_padding(size: &[u8]) -> &[u8] {
    let last = size.iter().rposition(|byte| !matches!(byte, b' ' | b'\t'));
    size.get(..last.map_or(0, |last| last + 1)).unwrap_or(&[])
}

/// Writes bytes of a body as its framing says, and counts them against a declared length.
#[derive(Debug)]
pub struct Encoder {
    framing: Framing,
    left: u64,
    ended: bool,
}

impl Encoder {
    /// An encoder for a message with this framing.
    pub fn new(framing: Framing) -> Self {
        let left = if let Framing::Length(length) = framing { length } else { 0 };
        let ended = matches!(framing, Framing::None | Framing::Length(0));
        Self { framing, left, ended }
    }

    /// Whether the whole message has been appended.
    pub fn is_done(&self) -> bool {
        self.ended
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`HeadError`] when they are more than the head declared.
    pub fn data(&mut self, out: &mut BytesMut, bytes: &[u8]) -> Result<(), HeadError> {
        if !bytes.is_empty() {
            self.before(out, bytes.len())?;
            out.extend_from_slice(bytes);
            self.behind(out);
        }
        Ok(())
    }

    /// Appends what goes before a piece of this length, which is not 0. A chunk is announced only for
    /// bytes in hand.
    ///
    /// # Errors
    /// [`HeadError`] when they are more than the head declared.
    pub fn before(&mut self, out: &mut BytesMut, length: usize) -> Result<(), HeadError> {
        match self.framing {
            Framing::None => return Err(HeadError("a body where none was declared")),
            Framing::Length(_) => {
                self.left = self
                    .left
                    .checked_sub(length as u64)
                    .ok_or(HeadError("a body longer than its Content-Length"))?;
                self.ended = self.left == 0;
            }
            Framing::Chunked => {
                put_number(out, length as u64, 16);
                out.extend_from_slice(b"\r\n");
            }
            Framing::UntilClose => {}
        }
        Ok(())
    }

    /// Appends what goes behind a piece.
    pub fn behind(&self, out: &mut BytesMut) {
        if self.framing == Framing::Chunked {
            out.extend_from_slice(b"\r\n");
        }
    }

    /// Appends the end.
    ///
    /// # Errors
    /// [`HeadError`] when fewer bytes came than the head declared; the connection must be closed.
    pub fn end(&mut self, out: &mut BytesMut, trailers: &[(Bytes, Bytes)]) -> Result<(), HeadError> {
        match self.framing {
            Framing::Length(_) if self.left > 0 => Err(HeadError("a body shorter than its Content-Length")),
            Framing::Chunked => {
                self.ended = true;
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers {
                    for part in [name.as_ref(), b": ", value.as_ref(), b"\r\n"] {
                        out.extend_from_slice(part);
                    }
                }
                out.extend_from_slice(b"\r\n");
                Ok(())
            }
            _ => {
                self.ended = true;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode_all(mut decoder: Decoder, bytes: &[u8]) -> Result<(Vec<u8>, bool), HeadError> {
        let mut buffer = BytesMut::from(bytes);
        let mut body = Vec::new();
        loop {
            match decoder.decode(&mut buffer)? {
                None => return Ok((body, false)),
                Some(Part::Data(bytes)) => body.extend_from_slice(&bytes),
                Some(Part::Trailers(_)) => {}
                Some(Part::End) => return Ok((body, true)),
            }
        }
    }

    fn of_request(bytes: &str) -> Result<(Vec<u8>, bool), HeadError> {
        decode_all(Decoder::new(Framing::Chunked), bytes.as_bytes())
    }

    fn of_response(bytes: &str) -> Result<(Vec<u8>, bool), HeadError> {
        decode_all(Decoder::for_response(Framing::Chunked), bytes.as_bytes())
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for bytes in [
            "5;\nAAAAA\r\n",
            " 5\r\nAAAAA\r\n",
            "5 5\r\nAAAAA\r\n",
            "5\x0b\r\nAAAAA\r\n",
            "5\x0c;a\r\nAAAAA\r\n",
            "+5\r\nAAAAA\r\n",
            "0x5\r\nAAAAA\r\n",
            "\r\nAAAAA\r\n",
            " \r\nAAAAA\r\n",
            " ;a=b\r\nAAAAA\r\n",
            "10000000000000005\r\nAAAAA\r\n",
            "5\r\nAAAAAB\r\n",
            "5\r\nAAAAA\n0\r\n\r\n",
            "5\nAAAAA\r\n0\r\n\r\n",
            "5 \nAAAAA\r\n0\r\n\r\n",
            "0\r\nX: y\n\r\n\r\n",
            "0\r\n\n",
            "0\r\n X: y\r\n\r\n",
            "5;a\rb\r\nAAAAA\r\n",
            "5 \r\r\nAAAAA\r\n",
            "-5\r\nAAAAA\r\n",
        ] {
            assert!(of_request(bytes).is_err(), "{bytes:?}");
            assert!(of_response(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_padded_size_is_repaired_in_a_response_and_refused_in_a_request() {
        for size in ["5 ", "5     ", "5\t", "00000000000000000005", "000000000000000000005  "] {
            let bytes = format!("{size}\r\nAAAAA\r\n0\r\n\r\n");
            assert!(of_request(&bytes).is_err(), "{size:?}");
            assert_eq!(of_response(&bytes), Ok((b"AAAAA".to_vec(), true)), "{size:?}");
        }
    }

    #[test]
    fn extensions_are_skipped_also_behind_whitespace_and_long_ones() {
        let longest = format!("5;a={}", "b".repeat(MAX_CHUNK_LINE - "5;a=".len()));
        for size in ["5;a", "5 ; a = b", "5\t;a=\"b;c\"", "0000000000000005 ;a", longest.as_str()] {
            let bytes = format!("{size}\r\nAAAAA\r\n0\r\n\r\n");
            assert_eq!(of_request(&bytes), Ok((b"AAAAA".to_vec(), true)), "{size:?}");
            assert_eq!(of_response(&bytes), Ok((b"AAAAA".to_vec(), true)), "{size:?}");
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_refused_whatever_the_pieces() {
        let too_long = format!("5;{}", "a".repeat(MAX_CHUNK_LINE - 1));
        assert!(of_response(&format!("{too_long}\r\nAAAAA\r\n")).is_err());
        assert!(of_response(&format!("{too_long}\r")).is_err());
        // The line of the longest kind waits for its line feed.
        let longest = &too_long[..MAX_CHUNK_LINE];
        assert_eq!(of_response(&format!("{longest}\r")), Ok((Vec::new(), false)));
    }

    #[test]
    fn trailers_that_would_change_the_message_are_dropped() {
        let mut decoder = Decoder::new(Framing::Chunked);
        let mut buffer = BytesMut::from(&b"0\r\nAuthorization: x\r\nHost: b\r\nX-Sum: 1\r\n\r\n"[..]);
        let part = decoder.decode(&mut buffer).unwrap().unwrap();
        assert_eq!(part, Part::Trailers(vec![(Bytes::from("X-Sum"), Bytes::from("1"))]));
    }

    #[test]
    fn a_declared_length_is_neither_exceeded_nor_missed() {
        let mut out = BytesMut::new();
        let mut encoder = Encoder::new(Framing::Length(3));
        encoder.data(&mut out, b"ab").unwrap();
        assert!(encoder.end(&mut out, &[]).is_err());
        assert!(encoder.data(&mut out, b"cd").is_err());
    }

    #[test]
    fn trailers_that_arrive_in_pieces_are_read_once_whole() {
        let (mut decoder, mut buffer) = (Decoder::new(Framing::Chunked), BytesMut::new());
        for byte in b"0\r\nX-Sum: 1\r\n\r" {
            buffer.extend_from_slice(&[*byte]);
            assert_eq!(decoder.decode(&mut buffer), Ok(None));
        }
        buffer.extend_from_slice(b"\nGET");
        assert!(matches!(decoder.decode(&mut buffer), Ok(Some(Part::Trailers(_)))));
        assert_eq!(decoder.decode(&mut buffer), Ok(Some(Part::End)));
        assert_eq!(&buffer[..], b"GET");
    }

    proptest! {
        #[test]
        fn chunks_survive_any_split(body in proptest::collection::vec(any::<u8>(), 0..300), cuts in proptest::collection::vec(1usize..40, 1..20)) {
            let mut out = BytesMut::new();
            let mut encoder = Encoder::new(Framing::Chunked);
            for bytes in body.chunks(17) { encoder.data(&mut out, bytes).unwrap(); }
            encoder.end(&mut out, &[]).unwrap();
            let (mut decoder, mut buffer, mut seen, mut done) = (Decoder::new(Framing::Chunked), BytesMut::new(), Vec::new(), false);
            let mut rest = &out[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                buffer.extend_from_slice(now);
                rest = later;
                while let Some(part) = decoder.decode(&mut buffer).unwrap() {
                    match part { Part::Data(bytes) => seen.extend_from_slice(&bytes), Part::End => { done = true; break } Part::Trailers(_) => {} }
                }
                if rest.is_empty() { break; }
            }
            prop_assert!(done);
            prop_assert_eq!(seen, body);
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_all(Decoder::new(Framing::Chunked), &bytes);
            let _ = decode_all(Decoder::for_response(Framing::Chunked), &bytes);
            let _ = super::super::head::parse_request(&mut BytesMut::from(&bytes[..]));
            let _ = super::super::head::parse_response(&mut BytesMut::from(&bytes[..]), b"GET");
        }
    }
}
