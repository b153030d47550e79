//! Bodies: what the framing of the head says, byte for byte.

use bytes::{Bytes, BytesMut};

use super::error::HeadError;
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
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers(Scan),
    UntilClose,
    Done,
}

/// The longest line of a chunk's size: 16 hex digits and an extension that nobody reads.
const MAX_CHUNK_LINE: usize = 16 + 256;

impl Decoder {
    /// A decoder for a message with this framing.
    pub fn new(framing: Framing) -> Self {
        let state = match framing {
            Framing::None | Framing::Length(0) => State::Done,
            Framing::Length(length) => State::Length(length),
            Framing::Chunked => State::ChunkSize,
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
                State::Length(left) | State::Chunk(left) => {
                    if buffer.is_empty() {
                        return Ok(None);
                    }
                    let take = (buffer.len() as u64).min(left);
                    let bytes = buffer.split_to(take as usize).freeze();
                    self.state = match (&self.state, left - take) {
                        (State::Length(_), 0) => State::Done,
                        (State::Length(_), left) => State::Length(left),
                        (_, 0) => State::ChunkEnd,
                        (_, left) => State::Chunk(left),
                    };
                    return Ok(Some(Part::Data(bytes)));
                }
                State::ChunkEnd => match buffer.get(..2) {
                    None => return Ok(None),
                    Some(b"\r\n") => {
                        let _ = buffer.split_to(2);
                        self.state = State::ChunkSize;
                    }
                    Some(_) => return Err(HeadError("a chunk without CRLF after its bytes")),
                },
                State::ChunkSize => {
                    let Some(size) = chunk_size(buffer)? else { return Ok(None) };
                    self.state =
                        if size == 0 { State::Trailers(Scan::default()) } else { State::Chunk(size) };
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

fn chunk_size(buffer: &mut BytesMut) -> Result<Option<u64>, HeadError> {
    let Some(end) = buffer.iter().position(|byte| *byte == b'\n') else {
        let too_long = buffer.len() > MAX_CHUNK_LINE;
        return if too_long { Err(HeadError("a chunk's size is too long")) } else { Ok(None) };
    };
    let line = buffer.split_to(end + 1);
    let line = line.strip_suffix(b"\r\n").ok_or(HeadError("a bare line feed after a chunk's size"))?;
    if line.len() > MAX_CHUNK_LINE || line.contains(&b'\r') {
        return Err(HeadError("a chunk's size is too long or broken"));
    }
    let digits = line.split(|byte| *byte == b';').next().unwrap_or(&[]);
    if digits.is_empty() || digits.len() > 16 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(HeadError("a chunk's size that is not 1 to 16 hex digits"));
    }
    let text = std::str::from_utf8(digits).unwrap_or("");
    u64::from_str_radix(text, 16).map(Some).map_err(|_| HeadError("a chunk's size that does not fit"))
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

    fn decode_all(framing: Framing, bytes: &[u8]) -> Result<(Vec<u8>, bool), HeadError> {
        let mut decoder = Decoder::new(framing);
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

    #[test]
    fn malformed_chunks_are_refused() {
        for bytes in [
            "5;\nAAAAA\r\n",
            "5 \r\nAAAAA\r\n",
            "+5\r\nAAAAA\r\n",
            "0x5\r\nAAAAA\r\n",
            "\r\nAAAAA\r\n",
            "00000000000000005\r\nAAAAA\r\n",
            "5\r\nAAAAAB\r\n",
            "5\r\nAAAAA\n0\r\n\r\n",
            "5\nAAAAA\r\n0\r\n\r\n",
            "0\r\nX: y\n\r\n\r\n",
            "0\r\n\n",
            "0\r\n X: y\r\n\r\n",
            "5;a\rb\r\nAAAAA\r\n",
            "-5\r\nAAAAA\r\n",
        ] {
            assert!(decode_all(Framing::Chunked, bytes.as_bytes()).is_err(), "{bytes:?}");
        }
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
            let _ = decode_all(Framing::Chunked, &bytes);
            let _ = super::super::head::parse_request(&mut BytesMut::from(&bytes[..]));
            let _ = super::super::head::parse_response(&mut BytesMut::from(&bytes[..]), b"GET");
        }
    }
}
