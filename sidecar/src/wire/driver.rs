//! The one task that reads and writes a connection.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::time::{Instant, Interval, interval_at, timeout};
use tokio_util::io::poll_read_buf;
use tulle_mesh::wire::frame::{self, FrameError, Kind};

use super::connection::{Connection, PeerError, Role};

/// A ping goes out when nothing has arrived for this long; twice as long ends the connection.
const PING_AFTER: Duration = Duration::from_secs(15);

/// Bytes that wait for the peer beyond what it has granted: answers to pings, heads. More is no accident.
const MAX_WAITING: usize = 8 * 1024 * 1024;

/// Room for one read: a TLS record and some.
const READ_ROOM: usize = 20 * 1024;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// The transport failed.
    #[error("the connection between the sidecars failed: {0}")]
    Io(#[from] std::io::Error),
    /// The peer sent bytes that are no frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer broke the protocol.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The peer reads nothing of what it asks for.
    #[error("more than {MAX_WAITING} bytes wait for a peer that does not read")]
    Unread,
    /// The peer did not answer.
    #[error("the peer sent nothing for {} s", PING_AFTER.as_secs() * 2)]
    Silent,
}

/// Drives a connection to its end; its streams then see that it is lost.
///
/// # Errors
/// [`DriveError`]; a peer that closes between frames is no error.
pub async fn drive<S>(connection: Connection, mut io: S) -> Result<(), DriveError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut driver = Driver {
        incoming: BytesMut::new(),
        outgoing: BytesMut::new(),
        flushed: true,
        heard: Instant::now(),
        ticks: interval_at(Instant::now() + Duration::from_secs(1), Duration::from_secs(1)),
    };
    let result = poll_fn(|cx| driver.poll(&connection, &mut io, cx)).await;
    connection.shared.borrow_mut().close();
    if result.is_ok() {
        // TLS says goodbye: without that the peer would have to take the end for a failure.
        let _ = timeout(Duration::from_secs(1), io.shutdown()).await;
    }
    result
}

struct Driver {
    incoming: BytesMut,
    outgoing: BytesMut,
    flushed: bool,
    heard: Instant,
    ticks: Interval,
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
        while self.ticks.poll_tick(cx).is_ready() {
            self.tick(connection)?;
        }
        if let Poll::Ready(end) = self.poll_read(connection, io, cx)? {
            return Poll::Ready(Ok(end));
        }
        // Writing comes last: what the streams answered to what has just arrived goes out with it.
        let idle = self.poll_write(connection, io, cx)?.is_ready();
        let mut shared = connection.shared.borrow_mut();
        // Only the client ends a connection that drains: a server that closed would lose the stream whose
        // opening is under way to it.
        let ends = shared.role == Role::Client;
        if ends && idle && shared.draining && shared.streams.is_empty() && shared.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        shared.driver = Some(cx.waker().clone());
        Poll::Pending
    }

    fn tick(&mut self, connection: &Connection) -> Result<(), DriveError> {
        let silent = self.heard.elapsed();
        if silent > PING_AFTER * 2 {
            return Err(DriveError::Silent);
        }
        let mut shared = connection.shared.borrow_mut();
        shared.control_frames = 0;
        if shared.out.len() > MAX_WAITING {
            return Err(DriveError::Unread);
        }
        if silent > PING_AFTER {
            frame::encode(&mut shared.out, Kind::Ping, 0, 0, b"tulle/1?");
        }
        Ok(())
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
        // Bounded, so that a peer that sends without end does not keep the writer waiting.
        for _ in 0..16 {
            self.incoming.reserve(READ_ROOM);
            let Poll::Ready(read) = poll_read_buf(Pin::new(&mut *io), cx, &mut self.incoming) else {
                return Ok(Poll::Pending);
            };
            if read? == 0 {
                return if self.incoming.is_empty() {
                    Ok(Poll::Ready(()))
                } else {
                    Err(DriveError::Io(std::io::ErrorKind::UnexpectedEof.into()))
                };
            }
            self.heard = Instant::now();
            while let Some(frame) = frame::decode(&mut self.incoming)? {
                connection.dispatch(frame)?;
            }
        }
        cx.waker().wake_by_ref();
        Ok(Poll::Pending)
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
            if self.outgoing.is_empty() {
                std::mem::swap(&mut self.outgoing, &mut connection.shared.borrow_mut().out);
            }
            if self.outgoing.is_empty() {
                break;
            }
            self.flushed = false;
            let Poll::Ready(written) = Pin::new(&mut *io).poll_write(cx, &self.outgoing) else {
                return Ok(Poll::Pending);
            };
            match written? {
                0 => return Err(DriveError::Io(std::io::ErrorKind::WriteZero.into())),
                count => self.outgoing.advance(count),
            }
        }
        if !self.flushed {
            let Poll::Ready(flushed) = Pin::new(io).poll_flush(cx) else { return Ok(Poll::Pending) };
            flushed?;
            self.flushed = true;
            // A burst must not leave its buffer behind for ever.
            if self.outgoing.capacity() > 64 * 1024 {
                self.outgoing = BytesMut::new();
            }
        }
        Ok(Poll::Ready(()))
    }
}
