//! The two halves of a TCP connection that speaks HTTP/1: [`Reader`] here, [`Writer`] in `writer`.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, timeout};
use tulle_mesh::wire::MAX_PAYLOAD;

use super::MAX_HEADERS;
use super::body::{Decoder, Part};
pub use super::error::BodyError;
use super::model::{Framing, Head};
use super::parse::{next_request, next_response};
use super::scan::Scan;
use super::writer::Writer;
use crate::error::Failure;

/// A head must be whole this long after its first byte (Slowloris). As nginx: `client_header_timeout`.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Room for one read, at first; it doubles while reads fill it.
const READ_ROOM: usize = 8 * 1024;
/// The most room for one read: what fills eight frames between sidecars, and those eight TLS records, to the last
/// byte. A few bytes more would be a record, a packet and a wakeup of their own.
const MAX_READ_ROOM: usize = 8 * MAX_PAYLOAD;
/// What is read and dropped of a head that is too long, so that its client, which is still sending, gets
/// the answer: if we closed with bytes unread, a reset would overtake it (RFC 9112 §9.6).
const MAX_DISCARDED: usize = 1024 * 1024;
/// A client that has sent nothing for this long has sent what there is of its head.
const DISCARD_PAUSE: Duration = Duration::from_millis(50);
/// The longest time that is spent on it.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(1);
/// A client that was answered before it had sent everything may go on sending for this long, and be silent for
/// [`LINGER_PAUSE`] meanwhile. As nginx: `lingering_time`, `lingering_timeout`.
const LINGER: Duration = Duration::from_secs(30);
/// See [`LINGER`].
const LINGER_PAUSE: Duration = Duration::from_secs(5);

/// Reads messages.
#[derive(Debug)]
pub struct Reader {
    io: OwnedReadHalf,
    buffer: BytesMut,
    /// How far the buffer was searched for the end of a head.
    scan: Scan,
    decoder: Decoder,
    reusable: bool,
    /// Whether a response was read.
    answered: bool,
    /// The connection has failed in another way than by a reset of the peer: nobody has answered for too long, say.
    network_failed: bool,
    /// The peer reset the connection without ending its side first.
    reset_at_once: bool,
    room: usize,
    /// Whether a request was read whose answer has not begun; the writer's half looks at it.
    unanswered: Arc<AtomicBool>,
}

/// Splits a connection; `read` are bytes that were read from it before.
pub fn split(stream: TcpStream, read: BytesMut) -> (Reader, Writer) {
    let (input, output) = stream.into_split();
    let unanswered = Arc::new(AtomicBool::new(false));
    let reader = Reader {
        io: input,
        buffer: read,
        scan: Scan::default(),
        decoder: Decoder::new(Framing::None),
        reusable: true,
        answered: false,
        network_failed: false,
        reset_at_once: false,
        room: READ_ROOM,
        unanswered: Arc::clone(&unanswered),
    };
    (reader, Writer::new(output, unanswered))
}

/// Closes the connection of a client after its last answer. One that is still sending may read its answer only
/// when it has sent everything: what it sends is read and dropped, since closing with bytes unread would make
/// the kernel reset the connection and the client lose the answer (RFC 9112 §9.6).
pub async fn close(mut reader: Reader, writer: Writer) {
    if writer.is_open() && !(reader.is_done() && reader.buffer.is_empty()) {
        // Its answer ends here.
        drop(writer);
        reader.discard(usize::MAX, LINGER_PAUSE, LINGER).await;
    }
}

/// How a peer resets a connection that it does not answer on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    /// At once. Linux does so when a connection is closed that has bytes in it which were not read (RFC 2525 §2.17); but one
    /// that has read everything may also break off like this (`SO_LINGER` of 0).
    AtOnce,
    /// Behind its end: it had closed the connection, or closed it then, without reading what came last. So do servers that
    /// shut down, or that find the connection idle for too long.
    BehindEnd,
}

impl Reader {
    /// The next request's head; `None` when the client has closed between requests. May be given up and
    /// called again.
    ///
    /// # Errors
    /// [`Failure::ClientBadRequest`], [`Failure::ClientHeadTooLong`], [`Failure::ClientGone`] or a time-out.
    pub async fn request(&mut self) -> Result<Option<Head>, Failure> {
        let head = loop {
            if self.buffer.is_empty() && self.fill().await.unwrap_or(0) == 0 {
                return Ok(None);
            }
            match self.parsed_request() {
                // An empty line, as old clients send behind a body: a head has not begun.
                Ok(None) if self.buffer.is_empty() => {}
                // Few heads arrive in pieces: the others pay for no timer, nor with room for it while they are awaited.
                Ok(None) => match Box::pin(timeout(HEAD_TIMEOUT, self.rest_of_request())).await {
                    Ok(head) => break head,
                    Err(_) => break Err(Failure::Timeout("the request's head")),
                },
                parsed => break parsed,
            }
        };
        if head.is_err() {
            // Whatever follows is not a request.
            self.unframe();
        }
        if matches!(head, Err(Failure::ClientHeadTooLong)) {
            Box::pin(self.discard(MAX_DISCARDED, DISCARD_PAUSE, DISCARD_TIMEOUT)).await;
        }
        let Some(head) = head? else { return Ok(None) };
        self.decoder = Decoder::new(head.framing);
        self.unanswered.store(true, Ordering::Relaxed);
        self.release();
        Ok(Some(head))
    }

    async fn rest_of_request(&mut self) -> Result<Option<Head>, Failure> {
        loop {
            if self.fill().await.map_err(|_| Failure::ClientGone)? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(Failure::ClientGone) };
            }
            if let Some(head) = self.parsed_request()? {
                return Ok(Some(head));
            }
        }
    }

    fn parsed_request(&mut self) -> Result<Option<Head>, Failure> {
        match next_request(&mut self.buffer, &mut self.scan, MAX_HEADERS) {
            Ok(Some(head)) => {
                self.scan = Scan::default();
                Ok(Some(head))
            }
            Ok(None) => Ok(None),
            Err(error) if error.is_too_large() => Err(Failure::ClientHeadTooLong),
            Err(error) => Err(Failure::ClientBadRequest(error.0)),
        }
    }

    /// Reads and drops what a client still sends.
    async fn discard(&mut self, most: usize, pause: Duration, limit: Duration) {
        let until = Instant::now() + limit;
        let mut discarded = self.buffer.len();
        self.buffer.clear();
        while discarded < most && Instant::now() < until {
            match timeout(pause, self.fill()).await {
                Ok(Ok(read)) if read > 0 => discarded += read,
                _ => return,
            }
            self.buffer.clear();
        }
    }

    /// The next response's head, for a request with this method.
    ///
    /// # Errors
    /// [`Failure::UpstreamBadResponse`] or [`Failure::UpstreamReset`].
    pub async fn response(&mut self, method: &[u8]) -> Result<Head, Failure> {
        loop {
            match next_response(&mut self.buffer, &mut self.scan, MAX_HEADERS, method) {
                Ok(Some(head)) => {
                    self.scan = Scan::default();
                    let framing = if head.upgrade { Framing::UntilClose } else { head.framing };
                    self.decoder = Decoder::for_response(framing);
                    self.reusable = head.keep_alive;
                    self.answered = true;
                    if self.decoder.is_done() {
                        self.release();
                    }
                    return Ok(head);
                }
                Ok(None) => {}
                Err(error) => return Err(Failure::UpstreamBadResponse(error.0)),
            }
            match self.fill().await {
                Ok(1..) => {}
                Ok(0) => return Err(Failure::UpstreamReset),
                Err(error) => {
                    self.network_failed = !is_reset(&error);
                    // Behind the peer's end, Linux calls it EPIPE.
                    self.reset_at_once = error.kind() == io::ErrorKind::ConnectionReset;
                    return Err(Failure::UpstreamReset);
                }
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
                Ok(Some(part)) => {
                    if part == Part::End {
                        self.release();
                    }
                    return Ok(part);
                }
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

    /// How the peer has reset the connection without a byte of an answer; `None`: it has not. A connection that our own
    /// kernel has given up (its peer's node is dead) looks the same to `getpeername`, but says nothing of what was read.
    pub async fn was_reset(&self) -> Option<Reset> {
        if self.network_failed {
            return None;
        }
        for wait in [0, 1, 4, 15, 30].map(Duration::from_millis) {
            tokio::time::sleep(wait).await;
            if self.buffer.is_empty() && self.io.peer_addr().is_err() {
                return Some(if self.reset_at_once { Reset::AtOnce } else { Reset::BehindEnd });
            }
        }
        None
    }

    /// From here on all bytes until the connection closes.
    pub fn unframe(&mut self) {
        self.decoder = Decoder::new(Framing::UntilClose);
    }

    /// Whether the last head let the connection be used again.
    pub fn is_reusable(&self) -> bool {
        self.reusable && self.buffer.is_empty()
    }

    /// The connection carries no other request.
    pub fn retire(&mut self) {
        self.reusable = false;
    }

    /// Whether the server has ever answered on this connection. If not, it may not even have accepted it.
    pub fn has_answered(&self) -> bool {
        self.answered
    }

    /// Gives the buffer's memory back if nothing is in it: most connections wait most of the time.
    fn release(&mut self) {
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
    }

    /// Reads what is there, or waits for it, without memory if the buffer is empty. Nothing is lost when
    /// this is given up.
    async fn fill(&mut self) -> io::Result<usize> {
        loop {
            // In a burst the next bytes are usually there: then the buffer is kept.
            if self.buffer.is_empty() && self.room == READ_ROOM {
                self.release();
                self.readable().await?;
            }
            self.buffer.reserve(self.room);
            // Not `try_read_buf`: it does not notice that a short read has emptied the socket, and costs
            // one more system call each time.
            if let Some(read) = self.io.read_buf(&mut self.buffer).now_or_never() {
                return read.inspect(|read| self.adapt(*read));
            }
            self.release();
            // Also nothing is read when the task has used up its turn.
            consume_budget().await;
            self.readable().await?;
        }
    }

    /// Waits until there is something to read. Unlike tokio's function of this name, it is for one waiter only: this half has
    /// no other, and being one of several takes a lock and a place in a list each time.
    async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| self.io.as_ref().poll_read_ready(cx)).await
    }

    /// Adapts the room for the next read to what this one has brought.
    fn adapt(&mut self, read: usize) {
        if read >= self.room {
            self.room = (self.room * 2).min(MAX_READ_ROOM);
        } else if read < self.room / 4 && self.room > READ_ROOM {
            self.room = READ_ROOM;
            // What a burst has needed is given back.
            if self.buffer.len() == read {
                self.buffer = BytesMut::from(&self.buffer[..]);
            }
        }
    }
}

/// Whether an error is that of a reset by the peer; Linux reports it as a broken pipe behind the peer's end.
fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (near, listener.accept().await.unwrap().0)
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
            assert_eq!(reader.was_reset().await, unread.then_some(Reset::BehindEnd));
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
        assert_eq!(reader.was_reset().await, Some(Reset::BehindEnd));
    }

    #[tokio::test]
    async fn a_reset_without_an_end_does_not_say_what_was_read() {
        for reads in [false, true] {
            let (near, mut far) = pair().await;
            let (mut reader, mut writer) = split(near, BytesMut::new());
            writer.unframe();
            writer.data(&Bytes::from_static(b"POST")).await.unwrap();
            writer.flush().await.unwrap();
            far.readable().await.unwrap();
            if reads {
                far.read_exact(&mut [0; 4]).await.unwrap();
                socket2::SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
            }
            drop(far);
            assert_eq!(reader.response(b"POST").await.unwrap_err(), Failure::UpstreamReset);
            assert_eq!(reader.was_reset().await, Some(Reset::AtOnce), "{reads}");
        }
    }

    #[test]
    fn a_connection_that_the_network_has_ended_was_not_reset_by_its_peer() {
        // ECONNRESET, EPIPE; ETIMEDOUT, EHOSTUNREACH.
        for (code, reset) in [(104, true), (32, true), (110, false), (113, false)] {
            assert_eq!(is_reset(&io::Error::from_raw_os_error(code)), reset, "{code}");
        }
    }

    #[tokio::test]
    async fn a_head_may_take_almost_a_minute_and_no_longer() {
        let (near, mut far) = pair().await;
        let (mut reader, _writer) = split(near, BytesMut::new());
        far.write_all(b"GET / HTTP/1.1\r\nHo").await.unwrap();
        let mut request = std::pin::pin!(reader.request());
        assert!(timeout(Duration::from_millis(50), request.as_mut()).await.is_err());
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(55)).await;
        assert!(request.as_mut().now_or_never().is_none(), "it was given up");
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(request.await, Err(Failure::Timeout("the request's head")));
    }

    #[tokio::test]
    async fn an_empty_line_does_not_begin_a_head_that_is_waited_for() {
        let (near, mut far) = pair().await;
        let (mut reader, _writer) = split(near, BytesMut::new());
        far.write_all(b"\r\n").await.unwrap();
        let mut request = std::pin::pin!(reader.request());
        assert!(timeout(Duration::from_millis(50), request.as_mut()).await.is_err());
        tokio::time::pause();
        tokio::time::advance(HEAD_TIMEOUT * 2).await;
        assert!(request.as_mut().now_or_never().is_none(), "it was given up");
        tokio::time::resume();
        far.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert!(request.await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_request_whose_client_has_ended_its_side_is_read_whole() {
        let (near, mut far) = pair().await;
        let (mut reader, _writer) = split(near, BytesMut::new());
        far.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        far.shutdown().await.unwrap();
        assert_eq!(reader.request().await.unwrap().unwrap().framing, Framing::Length(2));
        assert_eq!(reader.part().await, Ok(Part::Data(Bytes::from_static(b"ok"))));
        assert_eq!(reader.part().await, Ok(Part::End));
        assert_eq!(reader.request().await, Ok(None), "then the connection ends");
    }

    #[tokio::test]
    async fn a_head_in_pieces_is_read_up_to_the_limit_and_refused_beyond_it() {
        for (length, whole) in [(super::super::MAX_HEAD, true), (super::super::MAX_HEAD + 1, false)] {
            let (near, mut far) = pair().await;
            let (mut reader, _writer) = split(near, BytesMut::new());
            let start = "GET / HTTP/1.1\r\nHost: a\r\nX: ";
            let head = format!("{start}{}\r\n\r\n", "x".repeat(length - start.len() - 4));
            assert_eq!(head.len(), length);
            let sending = tokio::spawn(async move {
                for piece in head.as_bytes().chunks(7001) {
                    far.write_all(piece).await.unwrap();
                }
                far
            });
            let read = reader.request().await;
            assert_eq!(read.is_ok(), whole);
            assert!(whole || read == Err(Failure::ClientHeadTooLong));
            sending.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_a_client_sends_beyond_the_limit_does_not_destroy_the_answer() {
        let (near, mut far) = pair().await;
        let (mut reader, mut writer) = split(near, BytesMut::new());
        let client = tokio::spawn(async move {
            far.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nX: ").await.unwrap();
            far.write_all(&vec![b'x'; 300 * 1024]).await.unwrap();
            far.write_all(b"\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            far.read_to_end(&mut answer).await.map(|_| answer)
        });
        assert_eq!(reader.request().await, Err(Failure::ClientHeadTooLong));
        writer.head(&Head::answer(431, "Too Large", 0), true);
        writer.end(&[]).await.unwrap();
        drop((reader, writer));
        assert!(client.await.unwrap().expect("reset").starts_with(b"HTTP/1.1 431"));
    }

    #[tokio::test]
    async fn a_connection_that_waits_holds_no_buffer() {
        let (near, mut far) = pair().await;
        let (mut reader, _writer) = split(near, BytesMut::new());
        let sending = tokio::spawn(async move {
            far.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n").await.unwrap();
            far.write_all(&vec![0; 200_000]).await.unwrap();
            far
        });
        reader.request().await.unwrap().unwrap();
        while reader.part().await.unwrap() != Part::End {}
        assert!(timeout(Duration::from_millis(50), reader.request()).await.is_err());
        assert_eq!(reader.buffer.capacity(), 0);
        let mut far = sending.await.unwrap();
        far.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        assert!(reader.request().await.unwrap().is_some(), "what was given up loses nothing");
    }
}
