//! The two halves of a TCP connection that speaks HTTP/1, each with its buffer.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::FutureExt as _;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use super::body::{Decoder, Encoder, Part};
use super::head::{self, Framing, Head};
use crate::error::Failure;

/// A head must be whole this long after its first byte (Slowloris).
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// An HTTP client or server that takes nothing for this long has hung. The contents of opaque connections may
/// stand still for as long as they like.
const WRITE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a peer that sends no more is believed to read on.
const HALF_CLOSED: Duration = Duration::from_secs(1);
/// Room for one read, at first; it doubles while reads fill it.
const READ_ROOM: usize = 8 * 1024;
/// The most room for one read.
const MAX_READ_ROOM: usize = 64 * 1024;

/// Reads messages.
#[derive(Debug)]
pub struct Reader {
    io: OwnedReadHalf,
    buffer: BytesMut,
    decoder: Decoder,
    reusable: bool,
    room: usize,
}

/// Writes messages.
#[derive(Debug)]
pub struct Writer {
    /// `None`: it was broken off.
    io: Option<OwnedWriteHalf>,
    buffer: BytesMut,
    encoder: Encoder,
    closes: bool,
}

/// Splits a connection; `read` are bytes that were read from it before.
pub fn split(stream: TcpStream, read: BytesMut) -> (Reader, Writer) {
    let (input, output) = stream.into_split();
    let decoder = Decoder::new(Framing::None);
    let reader = Reader { io: input, buffer: read, decoder, reusable: true, room: READ_ROOM };
    let writer = Writer {
        io: Some(output),
        buffer: BytesMut::new(),
        encoder: Encoder::new(Framing::None),
        closes: false,
    };
    (reader, writer)
}

impl Reader {
    /// The next request's head; `None` when the client has closed between requests.
    ///
    /// # Errors
    /// [`Failure::ClientBadRequest`], [`Failure::ClientGone`] or a time-out.
    pub async fn request(&mut self) -> Result<Option<Head>, Failure> {
        if self.buffer.is_empty() && self.fill().await.unwrap_or(0) == 0 {
            return Ok(None);
        }
        let read = async {
            loop {
                match head::parse_request(&mut self.buffer) {
                    Ok(Some(head)) => return Ok(Some(head)),
                    Ok(None) => {}
                    Err(error) => return Err(Failure::ClientBadRequest(error.0)),
                }
                if self.fill().await.map_err(|_| Failure::ClientGone)? == 0 {
                    return if self.buffer.is_empty() { Ok(None) } else { Err(Failure::ClientGone) };
                }
            }
        };
        let head =
            timeout(HEAD_TIMEOUT, read).await.map_err(|_| Failure::Timeout("the request's head"))??;
        if let Some(head) = &head {
            self.decoder = Decoder::new(head.framing);
        }
        Ok(head)
    }

    /// The next response's head, for a request with this method.
    ///
    /// # Errors
    /// [`Failure::UpstreamBadResponse`] or [`Failure::UpstreamReset`].
    pub async fn response(&mut self, method: &[u8]) -> Result<Head, Failure> {
        loop {
            match head::parse_response(&mut self.buffer, method) {
                Ok(Some(head)) => {
                    let framing = if head.upgrade { Framing::UntilClose } else { head.framing };
                    self.decoder = Decoder::new(framing);
                    self.reusable = head.keep_alive;
                    return Ok(head);
                }
                Ok(None) => {}
                Err(error) => return Err(Failure::UpstreamBadResponse(error.0)),
            }
            if self.fill().await.map_err(|_| Failure::UpstreamReset)? == 0 {
                return Err(Failure::UpstreamReset);
            }
        }
    }

    /// The next part of the body.
    ///
    /// # Errors
    /// Malformed chunks, or an end before the body's.
    pub async fn part(&mut self) -> Result<Part, BodyError> {
        loop {
            match self.decoder.decode(&mut self.buffer) {
                Ok(Some(part)) => return Ok(part),
                Ok(None) => {}
                Err(error) => return Err(BodyError::Malformed(error.0)),
            }
            if self.fill().await.map_err(|_| BodyError::Gone)? == 0 {
                return if self.decoder.closed() { Ok(Part::End) } else { Err(BodyError::Gone) };
            }
        }
    }

    /// Whether the body has been read to its end.
    pub fn is_done(&self) -> bool {
        self.decoder.is_done()
    }

    /// Whether the peer has sent or closed while nothing was expected: such a connection is not
    /// reused.
    pub fn is_quiet(&mut self) -> bool {
        let mut probe = [0u8; 1];
        self.buffer.is_empty()
            && matches!(self.io.try_read(&mut probe), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Waits until the peer closes or sends.
    pub async fn stirred(&mut self) {
        let _ = self.io.readable().await;
    }

    /// Whether a server that has stirred has greeted its client. What it said is still there to be read.
    pub fn has_greeted(&mut self) -> bool {
        let read = self.fill().now_or_never();
        matches!(read, Some(Ok(read)) if read > 0) && !self.buffer.starts_with(b"HTTP/")
    }

    /// Whether the peer has reset the connection without a byte of an answer. A server does so when it
    /// closes a connection with bytes in it that it has not read (RFC 2525 §2.17; Linux does): since bytes
    /// arrive in order, it has not read the end of what was sent. One that has read everything and then
    /// closes ends the connection properly. Many say that they send no more before they close: the reset
    /// then comes a moment after the end.
    pub async fn was_reset(&self) -> bool {
        for wait in [0, 1, 4, 15, 30].map(Duration::from_millis) {
            tokio::time::sleep(wait).await;
            if self.buffer.is_empty() && self.io.peer_addr().is_err() {
                return true;
            }
        }
        false
    }

    /// From here on all bytes until the connection closes.
    pub fn unframe(&mut self) {
        self.decoder = Decoder::new(Framing::UntilClose);
    }

    /// Whether the last head let the connection be used again.
    pub fn is_reusable(&self) -> bool {
        self.reusable && self.buffer.is_empty()
    }

    async fn fill(&mut self) -> io::Result<usize> {
        self.buffer.reserve(self.room);
        let read = self.io.read_buf(&mut self.buffer).await?;
        if read >= self.room {
            self.room = (self.room * 2).min(MAX_READ_ROOM);
        } else if read < self.room / 4 && self.room > READ_ROOM {
            self.room = READ_ROOM;
            // What a burst has needed is given back.
            if self.buffer.len() == read {
                self.buffer = BytesMut::from(&self.buffer[..]);
            }
        }
        Ok(read)
    }
}

/// Why a body broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyError {
    /// Its bytes are malformed.
    Malformed(&'static str),
    /// The connection ended first.
    Gone,
}

impl Writer {
    /// Buffers a head; the body follows as its framing says.
    pub fn head(&mut self, head: &Head, close: bool) {
        head.write(&mut self.buffer, close);
        self.encoder = Encoder::new(head.framing);
    }

    /// Buffers bytes of the body and writes once enough have gathered.
    ///
    /// # Errors
    /// When the peer is gone or slower than allowed, or the bytes exceed what the head declared.
    pub async fn data(&mut self, bytes: &Bytes) -> Result<(), BodyError> {
        self.encoder.data(&mut self.buffer, bytes).map_err(|error| BodyError::Malformed(error.0))?;
        if self.buffer.len() >= 64 * 1024 { self.flush().await } else { Ok(()) }
    }

    /// Buffers the end and writes everything.
    ///
    /// # Errors
    /// When the peer is gone or fewer bytes came than the head declared.
    pub async fn end(&mut self, trailers: &[(Bytes, Bytes)]) -> Result<(), BodyError> {
        self.encoder.end(&mut self.buffer, trailers).map_err(|error| BodyError::Malformed(error.0))?;
        self.flush().await?;
        if self.closes {
            let io = self.io.as_mut().ok_or(BodyError::Gone)?;
            io.shutdown().await.map_err(|_| BodyError::Gone)?;
        }
        Ok(())
    }

    /// Writes what is buffered.
    ///
    /// # Errors
    /// When the peer is gone or slower than allowed.
    pub async fn flush(&mut self) -> Result<(), BodyError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let io = self.io.as_mut().ok_or(BodyError::Gone)?;
        let mut rest = &self.buffer[..];
        while !rest.is_empty() {
            let write = io.write(rest);
            let written = match self.closes {
                true => write.await,
                false => timeout(WRITE_TIMEOUT, write).await.map_err(|_| BodyError::Gone)?,
            };
            match written {
                Ok(written) if written > 0 => rest = rest.get(written..).unwrap_or(&[]),
                _ => return Err(BodyError::Gone),
            }
        }
        self.buffer.clear();
        if self.buffer.capacity() > 128 * 1024 {
            self.buffer = BytesMut::new();
        }
        Ok(())
    }

    /// Resolves when the peer has gone away. One that only sends no more may still read for a moment (`nc`
    /// does so), but nobody knows for how long: it is given [`HALF_CLOSED`].
    pub async fn gone(&mut self) {
        let Some(io) = &self.io else { return };
        let stream: &TcpStream = io.as_ref();
        match stream.peek(&mut [0]).await {
            Ok(0) => tokio::time::sleep(HALF_CLOSED).await,
            // More is here already, which nobody reads at the moment: look behind it now and then.
            Ok(_) => loop {
                tokio::time::sleep(HALF_CLOSED).await;
                if stream.ready(Interest::READABLE).await.map_or(true, |ready| ready.is_read_closed()) {
                    return;
                }
            },
            Err(_) => {}
        }
    }

    /// Closes with a reset, so that the peer sees that it broke off. (Dropped as usual, this half would say
    /// that everything has been sent, and a reset that follows comes too late.)
    pub fn abort(&mut self) {
        let Some(io) = self.io.take() else { return };
        let _ = SockRef::from(io.as_ref()).set_linger(Some(Duration::ZERO));
        io.forget();
    }

    /// From here on bytes go as they are, and the end closes this direction.
    pub fn unframe(&mut self) {
        self.encoder = Encoder::new(Framing::UntilClose);
        self.closes = true;
    }

    /// Whether all bytes have been written.
    pub fn is_flushed(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn what_is_broken_off_does_not_look_like_an_end() {
        let (near, mut far) = pair().await;
        let (reader, mut writer) = split(near, BytesMut::new());
        writer.unframe();
        writer.data(&Bytes::from_static(b"half")).await.unwrap();
        writer.flush().await.unwrap();
        let mut seen = [0; 4];
        far.read_exact(&mut seen).await.unwrap();
        writer.abort();
        drop((reader, writer));
        assert_eq!(far.read(&mut seen).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_server_that_closes_without_reading_is_told_from_one_that_has_read() {
        for (reads, unread) in [(false, true), (true, false)] {
            let (near, mut far) = pair().await;
            let (mut reader, mut writer) = split(near, BytesMut::new());
            writer.unframe();
            writer.data(&Bytes::from_static(b"POST")).await.unwrap();
            writer.flush().await.unwrap();
            if reads {
                far.read_exact(&mut [0; 4]).await.unwrap();
            } else {
                far.readable().await.unwrap();
            }
            far.shutdown().await.unwrap();
            let later = tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(5)).await;
                drop(far);
            });
            assert_eq!(reader.response(b"POST").await.unwrap_err(), Failure::UpstreamReset);
            assert_eq!(reader.was_reset().await, unread);
            later.await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_server_that_closed_before_the_request_came_has_not_read_it() {
        let (near, far) = pair().await;
        let (mut reader, mut writer) = split(near, BytesMut::new());
        drop(far);
        writer.unframe();
        writer.data(&Bytes::from_static(b"POST")).await.unwrap();
        let _ = writer.flush().await;
        assert!(reader.response(b"POST").await.is_err());
        assert!(reader.was_reset().await);
    }

    #[tokio::test]
    async fn a_client_that_has_left_is_noticed_behind_what_it_had_sent() {
        let (near, mut far) = pair().await;
        let (_reader, mut writer) = split(near, BytesMut::new());
        far.write_all(b"GET / HTTP/1.1").await.unwrap();
        assert!(timeout(Duration::from_millis(200), writer.gone()).await.is_err(), "it is still here");
        drop(far);
        timeout(Duration::from_secs(5), writer.gone()).await.expect("nobody noticed");
    }
}
