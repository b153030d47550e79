//! The one task that reads and writes a connection.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_util::io::poll_read_buf;
use tulle_mesh::wire::frame::{Frame, FrameError, HEADER, Header, Kind};

use super::connection::{Connection, MAX_WAITING, PeerError, Role};
use crate::output::Output;

/// A ping goes out when nothing has arrived for this long on a connection without streams; as long again
/// without anything ends the connection.
const IDLE_PING: Duration = Duration::from_secs(15);
/// The same while a stream runs: a request must not wait for a node that has died.
const BUSY_PING: Duration = Duration::from_secs(3);
/// How long the answer to that ping may take. A sidecar that gets no CPU for this long is rare. Where this process got
/// none either, as when a node was paused, that time does not count.
const BUSY_ANSWER: Duration = Duration::from_secs(5);
/// The same for streams whose answer has begun (opaque connections, tunnels, bodies on their way), which nobody can repeat:
/// without sidecars, an outage of the network or a paused node costs them nothing. The kernel sends again what is not
/// acknowledged after 25 and 51 s, so that a connection gets through an outage of 50 s.
const BEGUN_ANSWER: Duration = Duration::from_secs(60);
/// How often a connection that moves something looks at its streams, limits and buffers.
const TICK: Duration = Duration::from_secs(1);

/// What is read before it is the writer's turn, and that of the tasks of the streams: it still is in the
/// second-level cache when they take it.
const READ_BATCH: usize = 128 * 1024;
/// What a frame costs beside its bytes, so that a batch of small ones ends as well.
const FRAME_COST: usize = 64;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The transport failed.
    #[error("the connection between the sidecars failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent bytes that are not frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer broke the protocol.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The peer reads nothing of what it asks for.
    #[error("more than {MAX_WAITING} bytes wait for a peer that does not read")]
    Unread,
    /// The peer did not answer.
    #[error("the peer did not answer a ping")]
    Silent,
}

/// Drives a connection to its end; its streams then see that it is lost.
///
/// # Errors
/// [`DriveError`]; a peer that closes between frames is not an error.
pub async fn drive<S>(connection: Connection, mut io: S) -> Result<(), DriveError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut driver = Driver {
        input: Input::default(),
        outgoing: Output::default(),
        unflushed: 0,
        heard: Instant::now(),
        pinged: None,
        alarm: Box::pin(sleep(TICK)),
        soon: true,
        stirred: false,
    };
    let result = poll_fn(|cx| driver.poll(&connection, &mut io, cx)).await;
    let unseen = connection.shared.borrow_mut().close();
    drop(unseen);
    if result.is_ok() {
        // TLS says goodbye: without that the peer would have to take the end for a failure.
        let _ = timeout(Duration::from_secs(1), io.shutdown()).await;
    }
    result
}

struct Driver {
    input: Input,
    outgoing: Output,
    /// Bytes that TLS has taken, and perhaps not written.
    unflushed: usize,
    /// When something was last received.
    heard: Instant,
    /// Ticks since a ping was sent, if nothing was received since: each is a [`TICK`] that this process could use.
    pinged: Option<u32>,
    alarm: Pin<Box<Sleep>>,
    /// The alarm is less than a [`TICK`] away.
    soon: bool,
    /// Something has moved since the last alarm.
    stirred: bool,
}

impl Driver {
    fn poll<S>(
        &mut self,
        connection: &Connection,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), DriveError>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Reading comes before the alarm: what has arrived while this process stood still counts.
        if self.poll_read(connection, io, cx)?.is_ready() {
            return Poll::Ready(Ok(()));
        }
        self.poll_alarm(connection, cx)?;
        // Writing comes last: what the streams answered to what has just arrived goes out with it.
        let idle = self.poll_write(connection, io, cx)?.is_ready();
        let mut shared = connection.shared.borrow_mut();
        if shared.waiting() > MAX_WAITING {
            return Poll::Ready(Err(DriveError::Unread));
        }
        shared.written();
        // Only the client ends a connection that drains: a server that closed would lose the stream whose
        // opening is under way to it.
        let ends = shared.role == Role::Client;
        if ends && idle && shared.draining && shared.streams.is_empty() && shared.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        shared.driver = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Once a second while something moves, else when the next ping is due.
    fn poll_alarm(&mut self, connection: &Connection, cx: &mut Context<'_>) -> Result<(), DriveError> {
        self.stirred |= connection.shared.borrow().waiting() > 0;
        if self.stirred && !self.soon {
            self.soon = true;
            self.alarm.as_mut().reset(Instant::now() + TICK);
        }
        while self.alarm.as_mut().poll(cx).is_ready() {
            let next = self.tick(connection)?;
            self.alarm.as_mut().reset(Instant::now() + next);
        }
        Ok(())
    }

    /// Returns when the next one is due.
    fn tick(&mut self, connection: &Connection) -> Result<Duration, DriveError> {
        let silent = self.heard.elapsed();
        let mut shared = connection.shared.borrow_mut();
        shared.tick();
        let (patience, answer) =
            if shared.streams.is_empty() { (IDLE_PING, IDLE_PING) } else { (BUSY_PING, BUSY_ANSWER) };
        match &mut self.pinged {
            Some(ticks) => {
                *ticks += 1;
                let waited = TICK * *ticks;
                if waited >= answer && (waited >= BEGUN_ANSWER || !shared.suspect()) {
                    return Err(DriveError::Silent);
                }
            }
            None if silent >= patience => {
                shared.out.frame(Kind::Ping, 0, 0, b"tulle/1?");
                self.pinged = Some(0);
            }
            None => {}
        }
        let stirred = std::mem::take(&mut self.stirred);
        if !stirred {
            shared.release();
            self.outgoing.release();
        }
        self.soon = stirred || self.pinged.is_some();
        Ok(if self.soon { TICK } else { patience.saturating_sub(silent).max(TICK) })
    }

    /// Ready when the peer has closed.
    fn poll_read<S>(
        &mut self,
        connection: &Connection,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Result<Poll<()>, DriveError>
    where
        S: AsyncRead + Unpin,
    {
        let mut read = 0;
        let closed = loop {
            // Bounded, so that a peer that sends without end does not keep the writer waiting.
            if read >= READ_BATCH {
                cx.waker().wake_by_ref();
                break false;
            }
            match self.input.poll_frame(io, cx)? {
                Poll::Pending => break false,
                Poll::Ready(None) => break true,
                Poll::Ready(Some(frame)) => {
                    read += frame.payload.len() + FRAME_COST;
                    connection.dispatch(frame)?;
                }
            }
        };
        if std::mem::take(&mut self.input.heard) {
            self.heard = Instant::now();
            if self.pinged.take().is_some() {
                connection.shared.borrow_mut().suspect = false;
            }
            self.stirred = true;
        }
        Ok(if closed { Poll::Ready(()) } else { Poll::Pending })
    }

    /// Ready when everything is written and flushed.
    fn poll_write<S>(
        &mut self,
        connection: &Connection,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Result<Poll<()>, DriveError>
    where
        S: AsyncWrite + Unpin,
    {
        loop {
            if self.unflushed > 0 {
                // TLS has sent what it had before it gets more: it then makes whole records, and keeps no more
                // than one write of them.
                let Poll::Ready(flushed) = Pin::new(&mut *io).poll_flush(cx) else {
                    return Ok(Poll::Pending);
                };
                flushed?;
                self.unflushed = 0;
            }
            let mut shared = connection.shared.borrow_mut();
            shared.writing = self.outgoing.len();
            if self.outgoing.is_empty() {
                std::mem::swap(&mut self.outgoing, &mut shared.out);
                shared.writing = self.outgoing.len();
            }
            if self.outgoing.is_empty() {
                return Ok(Poll::Ready(()));
            }
            let Poll::Ready(written) = self.outgoing.poll_write(Pin::new(&mut *io), cx) else {
                return Ok(Poll::Pending);
            };
            let written = written?;
            if written == 0 {
                return Err(DriveError::Io(std::io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = written;
            shared.writing = self.outgoing.len() + written;
        }
    }
}

/// The frame that is being read. Its payload is read into a buffer of its own, of just its size: it is copied
/// once, pins nothing else, and a connection that is idle has no buffer at all.
#[derive(Default)]
struct Input {
    header: [u8; HEADER],
    /// Bytes of the header that have arrived.
    have: usize,
    /// The payload that belongs to a whole header.
    begun: Option<(Header, BytesMut)>,
    /// Something has arrived.
    heard: bool,
}

impl Input {
    /// The next frame; `None` when the peer has closed between frames.
    fn poll_frame<S>(&mut self, io: &mut S, cx: &mut Context<'_>) -> Result<Poll<Option<Frame>>, DriveError>
    where
        S: AsyncRead + Unpin,
    {
        let (header, mut payload) = match self.begun.take() {
            Some(begun) => begun,
            None => match self.poll_header(io, cx)? {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(None) => return Ok(Poll::Ready(None)),
                Poll::Ready(Some(header)) => (header, BytesMut::with_capacity(header.length)),
            },
        };
        while payload.len() < header.length {
            let missing = header.length - payload.len();
            let Poll::Ready(read) = poll_read_buf(Pin::new(&mut *io), cx, &mut (&mut payload).limit(missing))
            else {
                self.begun = Some((header, payload));
                return Ok(Poll::Pending);
            };
            if read? == 0 {
                return Err(cut_short());
            }
            self.heard = true;
        }
        Ok(Poll::Ready(Some(header.with(payload.freeze()))))
    }

    fn poll_header<S>(&mut self, io: &mut S, cx: &mut Context<'_>) -> Result<Poll<Option<Header>>, DriveError>
    where
        S: AsyncRead + Unpin,
    {
        while self.have < HEADER {
            let mut room = ReadBuf::new(self.header.get_mut(self.have..).unwrap_or(&mut []));
            match Pin::new(&mut *io).poll_read(cx, &mut room) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(read) => read?,
            }
            match room.filled().len() {
                0 if self.have == 0 => return Ok(Poll::Ready(None)),
                0 => return Err(cut_short()),
                read => self.have += read,
            }
            self.heard = true;
        }
        self.have = 0;
        Ok(Poll::Ready(Some(Header::parse(self.header)?)))
    }
}

/// The peer has closed within a frame.
fn cut_short() -> DriveError {
    DriveError::Io(std::io::ErrorKind::UnexpectedEof.into())
}
