//! The client's side of an exchange: an HTTP/1 client, another sidecar, or an HTTP/2 client.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use tulle_mesh::wire::head::Fields;

use crate::error::Failure;
use crate::http1::{Framing, Head, Writer};
use crate::http2;
use crate::message::{PumpError, Sink};
use crate::wire::Sender;

/// Where an answer goes.
pub enum Downstream<'a> {
    /// An HTTP/1 client.
    Http1(&'a mut Writer),
    /// Another sidecar, with the load to tell it.
    Mesh(&'a Sender, u32),
    /// An HTTP/2 client.
    Http2(&'a mut h2::server::SendResponse<Bytes>, Option<h2::SendStream<Bytes>>),
}

impl Downstream<'_> {
    /// Resolves when the client has gone away.
    pub(super) async fn gone(&mut self) {
        match self {
            Self::Http1(writer) => writer.gone().await,
            Self::Mesh(sender, _) => sender.gone().await,
            Self::Http2(respond, None) => drop(poll_fn(|cx| respond.poll_reset(cx)).await),
            Self::Http2(_, Some(stream)) => drop(poll_fn(|cx| stream.poll_reset(cx)).await),
        }
    }

    /// The answer with this head broke off: its client cannot take what it got for the whole, nor for
    /// something that it has given up itself.
    pub(super) fn abort(&mut self, head: &Head) {
        match self {
            Self::Http1(writer) if head.framing == Framing::UntilClose => writer.abort(),
            Self::Http2(_, Some(stream)) => http2::break_off(stream, head),
            _ => {}
        }
    }

    /// Passes an interim head on.
    pub(super) async fn interim(&mut self, head: &Head) -> Result<(), PumpError> {
        match self {
            Self::Http2(..) => Ok(()),
            _ => {
                self.head_with(head, false, false)?;
                self.flush().await
            }
        }
    }

    pub(super) fn head_with(&mut self, head: &Head, end: bool, close: bool) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.head(head, close),
            Self::Mesh(sender, load) => {
                let mut block = BytesMut::with_capacity(512);
                Fields { load: Some(*load), ..Fields::default() }.encode(&mut block);
                head.write(&mut block, false);
                sender.head(&block, end);
            }
            Self::Http2(respond, stream) => {
                let response = http2::to_response(head).map_err(|_| PumpError::SinkRefused("the head"))?;
                *stream = Some(respond.send_response(response, end).map_err(|_| PumpError::SinkGone)?);
            }
        }
        Ok(())
    }

    pub(super) async fn flush(&mut self) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.flush().await.map_err(|_| PumpError::SinkGone),
            _ => Ok(()),
        }
    }

    pub(super) fn sink(&mut self) -> Result<Sink<'_>, PumpError> {
        match self {
            Self::Http1(writer) => Ok(Sink::Http1(writer)),
            Self::Mesh(sender, _) => Ok(Sink::Mesh(sender)),
            Self::Http2(_, Some(stream)) => Ok(Sink::Http2(stream)),
            Self::Http2(_, None) => Err(PumpError::SinkGone),
        }
    }

    pub(super) fn unframed(&mut self) -> Result<Sink<'_>, PumpError> {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
        self.sink()
    }

    /// How the end of the answer's body is told: one that ends with the server's connection gets an end of
    /// its own, except for a client that knows no chunks (HTTP/1.0).
    pub(super) fn reframe(&self, head: &mut Head, request: &Head) {
        match head.framing {
            Framing::UntilClose if !request.http10 => head.framing = Framing::Chunked,
            Framing::Chunked if request.http10 => head.framing = Framing::UntilClose,
            _ => {}
        }
    }

    /// Answers with a few words of our own.
    pub async fn answer(&mut self, failure: &Failure) {
        let status = failure.status();
        let text = format!("tulle: {failure}\n");
        let mut head = Head::answer(status, reason(status), text.len());
        head.push("tulle-reason", Bytes::from_static(failure.name().as_bytes()));
        if self.head_with(&head, false, true).is_err() {
            return;
        }
        if let Ok(mut sink) = self.sink()
            && sink.data(Bytes::from(text)).await.is_ok()
        {
            sink.end(None).await.ok();
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        403 => "Forbidden",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Error",
    }
}
