//! A TCP connection of which some bytes have been read already, and which is read in large pieces while
//! much arrives.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

/// Room for one read of its own: several TLS records.
const ROOM: usize = 64 * 1024;

/// Gives the bytes that were read first, then those of the connection. rustls asks for 4 KiB at a time:
/// once a read has filled what was asked for, the next ones go through a buffer of 64 KiB, which is given
/// back when less arrives.
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
            let read = ready!(poll_read_buf(Pin::new(&mut this.stream), cx, &mut this.prefix))?;
            this.busy = read > ROOM / 8;
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

impl AsyncWrite for Prefixed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
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
