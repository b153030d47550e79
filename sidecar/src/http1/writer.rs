//! The half of an HTTP/1 connection that writes.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tulle_mesh::wire::MAX_PAYLOAD;

use super::body::Encoder;
use super::error::BodyError;
use super::model::{Framing, Head, Start};
use super::out::{MAX_SLICES, Out};

/// An HTTP client or server that takes nothing for this long has hung. The contents of opaque connections may
/// stand still for as long as they like.
const WRITE_TIMEOUT: Duration = Duration::from_secs(300);
/// So many bytes are gathered before they are written, unless nothing more is at hand.
/// Eight full frames of another sidecar: what the driver of its connection hands out in one turn.
const GATHERED: usize = 8 * MAX_PAYLOAD;
/// Room for a head, of which most are shorter.
const HEAD_ROOM: usize = 1024;
/// How often to look behind bytes that nobody reads at the moment.
const LOOK_BEHIND: Duration = Duration::from_secs(1);
/// What every answer begins with, whatever it will be.
const FIRST_BYTES: &[u8] = b"HTTP/1.1 ";
/// When a client that has ended its side is first asked again whether it is still there.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest time between two such questions.
const MAX_PAUSE: Duration = Duration::from_secs(8);
/// Keepalive of a connection whose client has ended its side.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// Writes messages.
#[derive(Debug)]
pub struct Writer {
    /// `None`: it was broken off.
    io: Option<OwnedWriteHalf>,
    out: Out,
    encoder: Encoder,
    closes: bool,
    /// Whether a request was read whose answer has not begun.
    unanswered: Arc<AtomicBool>,
    /// How many of [`FIRST_BYTES`] have been sent ahead of the answer.
    begun: usize,
    half_closed: Option<HalfClosed>,
}

/// A client that has ended its side.
#[derive(Debug)]
struct HalfClosed {
    /// When it is asked next whether it is still there.
    next: Instant,
    pause: Duration,
}

impl Writer {
    pub(super) fn new(io: OwnedWriteHalf, unanswered: Arc<AtomicBool>) -> Self {
        Self {
            io: Some(io),
            out: Out::default(),
            encoder: Encoder::new(Framing::None),
            closes: false,
            unanswered,
            begun: 0,
            half_closed: None,
        }
    }

    /// Buffers a head; the body follows as its framing says.
    pub fn head(&mut self, head: &Head, close: bool) {
        let small = self.out.small();
        small.reserve(HEAD_ROOM);
        head.write(small, close);
        self.encoder = Encoder::new(head.framing);
        if let Start::Response { status, .. } = &head.start {
            // They were sent while nothing waited, so the head stands at the front.
            small.advance(std::mem::take(&mut self.begun));
            if *status >= 200 || *status == 101 {
                self.unanswered.store(false, Ordering::Relaxed);
            }
        }
    }

    /// Buffers bytes of the body and writes once enough have gathered.
    ///
    /// # Errors
    /// When the peer is gone or slower than allowed, or the bytes exceed what the head declared.
    pub async fn data(&mut self, bytes: &Bytes) -> Result<(), BodyError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let before = self.encoder.before(self.out.small(), bytes.len());
        before.map_err(|error| BodyError::Malformed(error.0))?;
        self.out.push(bytes);
        self.encoder.behind(self.out.small());
        if self.out.len() >= GATHERED { self.write().await } else { Ok(()) }
    }

    /// Buffers the end and writes everything.
    ///
    /// # Errors
    /// When the peer is gone or fewer bytes came than the head declared.
    pub async fn end(&mut self, trailers: &[(Bytes, Bytes)]) -> Result<(), BodyError> {
        let end = self.encoder.end(self.out.small(), trailers);
        end.map_err(|error| BodyError::Malformed(error.0))?;
        self.flush().await?;
        if self.closes {
            let io = self.io.as_mut().ok_or(BodyError::Gone)?;
            io.shutdown().await.map_err(|_| BodyError::Gone)?;
        }
        Ok(())
    }

    /// Writes what is buffered, and gives back the memory that it has needed. When this is given up, a
    /// later call goes on where it was.
    ///
    /// # Errors
    /// When the peer is gone or slower than allowed.
    pub async fn flush(&mut self) -> Result<(), BodyError> {
        self.write().await?;
        self.out.release();
        Ok(())
    }

    async fn write(&mut self) -> Result<(), BodyError> {
        let Self { io, out, closes, .. } = self;
        while !out.is_empty() {
            let io = io.as_mut().ok_or(BodyError::Gone)?;
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            let used = out.slices(&mut slices);
            let write = io.write_vectored(slices.get(..used).unwrap_or(&[]));
            let written = match *closes {
                true => write.await,
                false => timeout(WRITE_TIMEOUT, write).await.map_err(|_| BodyError::Gone)?,
            };
            match written {
                Ok(written) if written > 0 => out.advance(written),
                _ => return Err(BodyError::Gone),
            }
        }
        Ok(())
    }

    /// Resolves when the peer has gone: it has reset the connection or has closed it for good. One that has
    /// only ended its side (RFC 9112 §9.6) is still there, and may wait for its answer as long as it likes.
    ///
    /// The two look alike until something is sent: then the kernel of a peer that has closed answers with a
    /// reset. What is sent is what every answer begins with, byte by byte: a client that is there gets it
    /// a little earlier than the rest. Keepalive alone would notice it too, but late: Linux answers probes
    /// for a closed connection for 60 s (`FIN_WAIT2`; noticed after 67 s on 6.18). It is what remains where
    /// an answer has begun. May be given up and called again.
    pub async fn gone(&mut self) {
        let Self { io, out, unanswered, begun, half_closed, .. } = self;
        let Some(stream) = io.as_ref().map(AsRef::<TcpStream>::as_ref) else { return };
        if half_closed.is_none() {
            if !sends_no_more(stream).await {
                return;
            }
            let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE).with_retries(3);
            let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
        }
        let state =
            half_closed.get_or_insert_with(|| HalfClosed { next: Instant::now(), pause: FIRST_PAUSE });
        loop {
            let now = Instant::now();
            if now >= state.next {
                state.next = now + state.pause;
                state.pause = (state.pause * 2).min(MAX_PAUSE);
                if out.is_empty()
                    && unanswered.load(Ordering::Relaxed)
                    && let Some(byte) = FIRST_BYTES.get(*begun)
                {
                    match stream.try_write(&[*byte]) {
                        Ok(written) => *begun += written,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => return,
                    }
                }
            }
            tokio::select! {
                biased;
                _ = stream.ready(Interest::ERROR) => return,
                () = sleep_until(state.next) => {}
            }
        }
    }

    /// Closes with a reset, so that the peer sees that it broke off. (Dropped as usual, this half would say
    /// that everything has been sent, and a reset that follows comes too late.)
    pub fn abort(&mut self) {
        let Some(io) = self.io.take() else { return };
        let _ = SockRef::from(io.as_ref()).set_linger(Some(Duration::ZERO));
        io.forget();
    }

    /// Whether it was not broken off.
    pub fn is_open(&self) -> bool {
        self.io.is_some()
    }

    /// From here on bytes go as they are, and the end closes this direction.
    pub fn unframe(&mut self) {
        self.encoder = Encoder::new(Framing::UntilClose);
        self.closes = true;
    }

    /// Whether all bytes have been written.
    pub fn is_flushed(&self) -> bool {
        self.out.is_empty()
    }
}

/// Waits until the peer has ended its side; `false` when it has reset the connection.
async fn sends_no_more(stream: &TcpStream) -> bool {
    match stream.peek(&mut [0]).await {
        Ok(0) => true,
        // More is here already, which nobody reads at the moment: look behind it now and then.
        Ok(_) => loop {
            sleep(LOOK_BEHIND).await;
            match stream.ready(Interest::READABLE).await {
                Ok(ready) if ready.is_read_closed() => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        },
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;
    use crate::http1::Reader;
    use crate::http1::conn::split;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
    }

    /// A client that has sent its request, and the halves of the side that has read it.
    async fn asked() -> (Reader, Writer, TcpStream) {
        let (near, mut far) = pair().await;
        let (mut reader, writer) = split(near, BytesMut::new());
        far.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        reader.request().await.unwrap().unwrap();
        (reader, writer, far)
    }

    async fn is_gone(writer: &mut Writer, within: Duration) -> bool {
        timeout(within, writer.gone()).await.is_ok()
    }

    const SOON: Duration = Duration::from_millis(300);
    const LATER: Duration = Duration::from_secs(5);

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
    async fn a_client_that_has_closed_or_reset_is_noticed_at_once() {
        for reset in [false, true] {
            let (_reader, mut writer, far) = asked().await;
            assert!(!is_gone(&mut writer, SOON).await, "it is still here");
            if reset {
                SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(far);
            assert!(is_gone(&mut writer, SOON).await, "nobody noticed");
        }
    }

    #[tokio::test]
    async fn a_client_that_has_only_ended_its_side_is_waited_for_and_gets_the_whole_answer() {
        let (reader, mut writer, mut far) = asked().await;
        far.shutdown().await.unwrap();
        assert!(!is_gone(&mut writer, SOON).await);
        assert!(!is_gone(&mut writer, Duration::from_millis(2500)).await);
        assert!(writer.begun > 0, "it was asked");
        writer.head(&Head::answer(200, "OK", 2), true);
        writer.data(&Bytes::from_static(b"ok")).await.unwrap();
        writer.end(&[]).await.unwrap();
        assert!(!is_gone(&mut writer, Duration::from_millis(1500)).await);
        drop((reader, writer));
        let mut answer = String::new();
        far.read_to_string(&mut answer).await.unwrap();
        let expected =
            "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
        assert_eq!(answer, expected);
    }

    #[tokio::test]
    async fn a_client_that_ends_its_side_and_closes_later_is_noticed() {
        let (_reader, mut writer, mut far) = asked().await;
        far.shutdown().await.unwrap();
        assert!(!is_gone(&mut writer, SOON).await);
        far.read_exact(&mut [0; 1]).await.unwrap();
        drop(far);
        assert!(is_gone(&mut writer, LATER).await, "nobody noticed");
    }

    #[tokio::test]
    async fn a_client_that_has_left_is_noticed_behind_what_it_had_sent() {
        let (_reader, mut writer, mut far) = asked().await;
        far.write_all(b"GET /next HTTP/1.1").await.unwrap();
        assert!(!is_gone(&mut writer, SOON).await, "it is still here");
        drop(far);
        assert!(is_gone(&mut writer, LATER).await, "nobody noticed");
    }

    #[tokio::test]
    async fn nothing_is_sent_ahead_to_a_peer_that_has_not_asked() {
        let (near, mut far) = pair().await;
        let (reader, mut writer) = split(near, BytesMut::new());
        far.shutdown().await.unwrap();
        assert!(!is_gone(&mut writer, SOON).await);
        drop((reader, writer));
        let mut seen = Vec::new();
        far.read_to_end(&mut seen).await.unwrap();
        assert!(seen.is_empty(), "{seen:?}");
    }

    #[tokio::test]
    async fn big_pieces_arrive_framed_and_whole_and_no_memory_stays() {
        let (reader, mut writer, mut far) = asked().await;
        let reading = tokio::spawn(async move {
            let mut answer = Vec::new();
            far.read_to_end(&mut answer).await.unwrap();
            answer
        });
        let mut head = Head::answer(200, "OK", 0);
        head.framing = Framing::Chunked;
        writer.head(&head, true);
        let pieces = [100_000, 5, 9000, 1, 20_000].map(|length| Bytes::from(vec![b'x'; length]));
        let mut expected = BytesMut::new();
        head.write(&mut expected, true);
        for piece in &pieces {
            writer.data(piece).await.unwrap();
            expected.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            expected.extend_from_slice(piece);
            expected.extend_from_slice(b"\r\n");
        }
        writer.end(&[]).await.unwrap();
        expected.extend_from_slice(b"0\r\n\r\n");
        assert_eq!(writer.out.small().capacity(), 0);
        drop((reader, writer));
        assert!(reading.await.unwrap() == expected, "the answer differs");
    }
}
