//! Transports around a TCP connection: one of which some bytes have been read already, and which is read in large
//! pieces while much arrives ([`Prefixed`]), and one that ends at a given time ([`Until`]). And a client's connection
//! while a server is being connected for it ([`unless_reset`]).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_util::io::poll_read_buf;

/// Room for one read of its own: eight full TLS records, as another sidecar writes them at once, with what TLS adds.
const ROOM: usize = 8 * (16 * 1024 + 32);
/// A read of less than this is no burst.
const BURST: usize = 8 * 1024;

/// What a client's first bytes are waited for with: something to read, or a reset, which is left unread.
pub const READABLE_OR_RESET: Interest = Interest::READABLE.add(Interest::ERROR);
/// How long the bytes of a client that has reset its connection wait for a server: one SYN retransmission.
const LAST_BYTES_WAIT: Duration = Duration::from_millis(1_500);
/// Room for what such a client has sent, if nothing has been read yet. The rest is read with it.
const LAST_BYTES: usize = 4 * 1024;

/// Waits for `connecting`; `None`: the client has left before. One that resets the connection right behind its bytes
/// (`SO_LINGER` of 0) has sent them, and without a sidecar the server would get them: they are in `read`, or follow.
/// Its reset is not taken off the connection, because Linux reports it once: whoever reads the bytes has to see that
/// what follows is not a proper end.
pub async fn unless_reset<T>(
    client: &TcpStream,
    read: &mut BytesMut,
    mut connecting: Pin<&mut impl Future<Output = T>>,
) -> Option<T> {
    tokio::select! {
        biased;
        connected = connecting.as_mut() => return Some(connected),
        _ = client.ready(Interest::ERROR) => {}
    }
    if read.is_empty() {
        read.reserve(LAST_BYTES);
        if !matches!(client.try_read_buf(read), Ok(1..)) {
            return None;
        }
    }
    timeout(LAST_BYTES_WAIT, connecting).await.ok()
}

/// Writing to a transport that changes only what is read: what is written goes to its field `stream`.
macro_rules! writes_to_stream {
    ([$($generics:tt)*] $transport:ty) => {
        impl<$($generics)*> AsyncWrite for $transport {
            fn poll_write(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                bytes: &[u8],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write(cx, bytes)
            }

            fn poll_write_vectored(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                pieces: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
            }

            fn is_write_vectored(&self) -> bool {
                self.stream.is_write_vectored()
            }

            fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_flush(cx)
            }

            fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                Pin::new(&mut self.stream).poll_shutdown(cx)
            }
        }
    };
}

/// Gives the bytes that were read first, then those of the connection. rustls asks for 4 KiB at a time:
/// once a read has filled what was asked for, the next ones go through a buffer of 128 KiB, which is given
/// back when less or nothing is there.
#[derive(Debug)]
pub struct Prefixed {
    prefix: BytesMut,
    stream: TcpStream,
    busy: bool,
}

impl Prefixed {
    /// A connection and what was read from it.
    pub fn new(stream: TcpStream, prefix: BytesMut) -> Self {
        Self { prefix, stream, busy: false }
    }
}

impl AsyncRead for Prefixed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.prefix.is_empty() && !this.busy {
            let before = room.filled().len();
            ready!(Pin::new(&mut this.stream).poll_read(cx, room))?;
            this.busy = room.remaining() == 0 && room.filled().len() > before;
            return Poll::Ready(Ok(()));
        }
        if this.prefix.is_empty() {
            this.prefix.reserve(ROOM);
            let Poll::Ready(read) = poll_read_buf(Pin::new(&mut this.stream), cx, &mut this.prefix) else {
                // The burst may go on or not: a connection that waits holds no buffer.
                this.prefix = BytesMut::new();
                return Poll::Pending;
            };
            this.busy = read? > BURST;
        }
        let take = this.prefix.len().min(room.remaining());
        room.put_slice(this.prefix.get(..take).unwrap_or(&[]));
        this.prefix.advance(take);
        if this.prefix.is_empty() && !this.busy {
            this.prefix = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

writes_to_stream!([] Prefixed);

/// So many reads that bring something cost one look at the clock.
const READS_PER_LOOK: u32 = 32;

/// Ends at a given time, as if the peer had closed.
#[derive(Debug)]
pub struct Until<S> {
    stream: S,
    end: Pin<Box<Sleep>>,
    /// Reads since the clock was looked at.
    reads: u32,
}

impl<S> Until<S> {
    /// A transport that ends at this time.
    pub fn new(stream: S, end: Instant) -> Self {
        Self { stream, end: Box::pin(sleep_until(end)), reads: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Until<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, room: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // Now and then before it reads: a peer that sends without a pause has to end too.
        this.reads += 1;
        if this.reads >= READS_PER_LOOK {
            this.reads = 0;
            if this.end.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
        }
        let read = Pin::new(&mut this.stream).poll_read(cx, room);
        if read.is_pending() && this.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        read
    }
}

writes_to_stream!([S: AsyncWrite + Unpin] Until<S>);

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::pin::pin;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::time::sleep;

    use super::*;
    use crate::listen::reset_on_close;

    /// A client that sends this and resets the connection; the other end of it.
    async fn left_behind(sent: &[u8]) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        client.write_all(sent).await.unwrap();
        reset_on_close(&client);
        accepted
    }

    #[tokio::test]
    async fn bytes_before_a_reset_wait_for_the_server_and_the_reset_stays_behind_them() {
        let mut near = left_behind(b"last").await;
        let mut read = BytesMut::new();
        let connecting = pin!(sleep(Duration::from_millis(50)));
        assert!(unless_reset(&near, &mut read, connecting).await.is_some(), "they are lost");
        assert_eq!(read, b"last"[..]);
        assert_eq!(near.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn nothing_is_connected_for_long_for_a_client_that_has_left() {
        let near = left_behind(b"").await;
        let mut read = BytesMut::new();
        let mut never = pin!(pending::<()>());
        let since = Instant::now();
        assert!(unless_reset(&near, &mut read, never.as_mut()).await.is_none());
        assert!(since.elapsed() < LAST_BYTES_WAIT, "it has said nothing");
        let near = left_behind(b"last").await;
        let gone = unless_reset(&near, &mut read, never.as_mut());
        assert!(timeout(LAST_BYTES_WAIT * 4, gone).await.expect("it goes on").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_transport_that_always_brings_something_ends_too() {
        let mut endless = Until::new(tokio::io::repeat(1), Instant::now());
        tokio::time::advance(Duration::from_millis(2)).await;
        let mut reads = 0;
        while endless.read(&mut [0]).await.unwrap() > 0 {
            reads += 1;
            assert!(reads < READS_PER_LOOK, "it goes on");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_transport_ends_at_its_time_and_not_before() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut near = Until::new(near, Instant::now() + Duration::from_secs(10));
        far.write_all(b"hello").await.unwrap();
        let mut seen = [0; 5];
        near.read_exact(&mut seen).await.unwrap();
        let begun = Instant::now();
        assert_eq!(near.read(&mut seen).await.unwrap(), 0);
        assert_eq!(begun.elapsed().as_secs(), 10);
        near.write_all(b"bye").await.unwrap();
    }
}
