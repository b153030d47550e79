//! Clients that take no bytes: how it is noticed that a connection stands still.
//!
//! Over HTTP/1 the connection itself cannot be written to. Over HTTP/2 it can, because answers wait for the windows of their
//! streams; there, frames that were taken from the bodies of answers are counted.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use tokio::io::AsyncWrite;
use tokio::time::{Sleep, sleep};

/// Writes to a client, and fails once it has taken nothing for a while.
pub(super) struct Patient<W> {
    writer: W,
    within: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<W> Patient<W> {
    /// A client that may take nothing for so long.
    pub(super) fn new(writer: W, within: Duration) -> Self {
        Self { writer, within, waiting: None }
    }

    /// Notes what became of a write.
    fn note<T>(&mut self, polled: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.waiting = None;
            return polled;
        }
        let within = self.within;
        ready!(self.waiting.get_or_insert_with(|| Box::pin(sleep(within))).as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(ErrorKind::TimedOut, "the client takes no bytes")))
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for Patient<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.writer).poll_write(cx, bytes);
        self.note(polled, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.writer).poll_write_vectored(cx, bytes);
        self.note(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.writer.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.writer).poll_flush(cx);
        self.note(polled, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.writer).poll_shutdown(cx);
        self.note(polled, cx)
    }
}

/// How many frames the answers of a connection have given.
#[derive(Clone, Default)]
pub(super) struct Frames(Arc<AtomicU64>);

impl Frames {
    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The same body, whose frames are counted.
    pub(super) fn of(&self, body: Body) -> Counted {
        Counted { body, frames: self.clone() }
    }
}

/// A body whose frames are counted.
pub(super) struct Counted {
    body: Body,
    frames: Frames,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.frames.0.fetch_add(1, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn a_client_that_takes_no_bytes_is_not_waited_for() {
        let (_client, server) = tokio::io::duplex(16);
        let error = Patient::new(server, Duration::ZERO).write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_client_that_takes_some_bytes_at_a_time_gets_them_all() {
        let (mut client, server) = tokio::io::duplex(16);
        let write = async move {
            let mut server = Patient::new(server, Duration::from_secs(600));
            server.write_all(&[1; 1000]).await
        };
        let mut read = Vec::new();
        let (written, taken) = tokio::join!(write, client.read_to_end(&mut read));
        written.unwrap();
        assert_eq!((taken.unwrap(), read), (1000, vec![1; 1000]));
    }

    #[tokio::test]
    async fn what_is_taken_from_an_answer_is_counted() {
        let frames = Frames::default();
        let body = frames.of(Body::from("abc"));
        assert_eq!((frames.count(), body.size_hint().exact()), (0, Some(3)));
        assert_eq!(to_bytes(Body::new(body), 10).await.unwrap(), "abc");
        assert!(frames.count() > 0, "nothing was counted");
    }
}
