//! Bodies: what the framing of the head says, byte for byte.

use bytes::{Bytes, BytesMut};

use super::MAX_HEAD;
use super::head::{Framing, HeadError, parse_trailers};

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
    Trailers,
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
                    self.state = if size == 0 { State::Trailers } else { State::Chunk(size) };
                }
                State::Trailers => {
                    let Some(trailers) = trailers(buffer)? else { return Ok(None) };
                    self.state = State::Done;
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

fn trailers(buffer: &mut BytesMut) -> Result<Option<Vec<(Bytes, Bytes)>>, HeadError> {
    if buffer.starts_with(b"\r\n") {
        let _ = buffer.split_to(2);
        return Ok(Some(Vec::new()));
    }
    match buffer.windows(4).position(|window| window == b"\r\n\r\n") {
        Some(at) => parse_trailers(&buffer.split_to(at + 4).freeze()).map(Some),
        None if buffer.len() > MAX_HEAD => Err(HeadError("trailers of more than 32 KiB")),
        // A lenient reader would end here; ours must not wait for bytes that never come.
        None if buffer.windows(2).any(|window| window == b"\n\n") || buffer.first() == Some(&b'\n') => {
            Err(HeadError("a bare line feed in trailers"))
        }
        None => Ok(None),
    }
}

/// Writes bytes of a body as its framing says, and counts them against a declared length.
#[derive(Debug)]
pub struct Encoder {
    framing: Framing,
    left: u64,
}

impl Encoder {
    /// An encoder for a message with this framing.
    pub fn new(framing: Framing) -> Self {
        let left = if let Framing::Length(length) = framing { length } else { 0 };
        Self { framing, left }
    }

    /// Appends bytes. A chunk is announced only for bytes in hand.
    ///
    /// # Errors
    /// [`HeadError`] when they are more than the head declared.
    pub fn data(&mut self, out: &mut BytesMut, bytes: &[u8]) -> Result<(), HeadError> {
        if bytes.is_empty() {
            return Ok(());
        }
        match self.framing {
            Framing::None => return Err(HeadError("a body where none was declared")),
            Framing::Length(_) => {
                self.left = self
                    .left
                    .checked_sub(bytes.len() as u64)
                    .ok_or(HeadError("a body longer than its Content-Length"))?;
                out.extend_from_slice(bytes);
            }
            Framing::Chunked => {
                out.extend_from_slice(format!("{:x}\r\n", bytes.len()).as_bytes());
                out.extend_from_slice(bytes);
                out.extend_from_slice(b"\r\n");
            }
            Framing::UntilClose => out.extend_from_slice(bytes),
        }
        Ok(())
    }

    /// Appends the end.
    ///
    /// # Errors
    /// [`HeadError`] when fewer bytes came than the head declared; the connection must be closed.
    pub fn end(&mut self, out: &mut BytesMut, trailers: &[(Bytes, Bytes)]) -> Result<(), HeadError> {
        match self.framing {
            Framing::Length(_) if self.left > 0 => Err(HeadError("a body shorter than its Content-Length")),
            Framing::Chunked => {
                out.extend_from_slice(b"0\r\n");
                for (name, value) in trailers {
                    for part in [name.as_ref(), b": ", value.as_ref(), b"\r\n"] {
                        out.extend_from_slice(part);
                    }
                }
                out.extend_from_slice(b"\r\n");
                Ok(())
            }
            _ => Ok(()),
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

    proptest! {
        #[test]
        fn chunks_survive_any_split(body in proptest::collection::vec(any::<u8>(), 0..300), cuts in proptest::collection::vec(1usize..40, 1..20)) {
            let mut out = BytesMut::new();
            let mut encoder = Encoder::new(Framing::Chunked);
            for piece in body.chunks(17) { encoder.data(&mut out, piece).unwrap(); }
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
