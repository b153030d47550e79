//! The client's side of an exchange: an HTTP/1 client, another sidecar, or an HTTP/2 client.

use bytes::{Bytes, BytesMut};
use tulle_mesh::denial::DenialId;
use tulle_mesh::reason::Reason;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::Fields;

use crate::error::Failure;
use crate::grpc;
use crate::http1::{Framing, Head, Writer};
use crate::http2::{self, ErrorCode, SendStream};
use crate::message::{PumpError, Sink};
use crate::route::ResponseEdits;
use crate::wire::Sender;

/// Where an answer goes.
pub enum Answer<'a> {
    /// An HTTP/1 client.
    Http1(&'a mut Writer),
    /// Another sidecar, with what is reported to it of this pod.
    Mesh(&'a Sender, Load),
    /// An HTTP/2 client.
    Http2(&'a mut SendStream),
}

/// A request that gets no answer of a server.
#[derive(Clone, Copy)]
pub(crate) struct Refused<'a> {
    /// Why.
    pub(crate) failure: &'a Failure,
    /// Under which id, if rules refuse it.
    pub(crate) denial: Option<DenialId>,
    /// The connection of an HTTP/1 client may carry another request.
    pub(crate) keep: bool,
}

/// What an answer to another sidecar reports of this pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Requests in flight, of all clients together.
    pub in_flight: u32,
    /// Microseconds that the application takes for the head of an answer, on average; `None`: not known yet.
    pub latency_us: Option<u32>,
    /// See [`Fields::broken`].
    pub broken: u8,
}

impl From<u32> for Load {
    fn from(in_flight: u32) -> Self {
        Self { in_flight, ..Self::default() }
    }
}

impl Answer<'_> {
    /// Resolves when the client has gone away.
    pub async fn gone(&mut self) {
        match self {
            Self::Http1(writer) => writer.gone().await,
            Self::Mesh(sender, _) => sender.gone().await,
            Self::Http2(stream) => stream.gone().await,
        }
    }

    /// Whether another sidecar gets the answer.
    pub(crate) fn is_mesh(&self) -> bool {
        matches!(self, Self::Mesh(..))
    }

    /// The application has broken the request off, which is sent to it again.
    pub(crate) fn note_broken(&mut self) {
        if let Self::Mesh(_, load) = self {
            load.broken = load.broken.saturating_add(1);
        }
    }

    /// The answer with this head broke off: its client cannot take what it got for the whole, nor for
    /// something that it has given up itself. `code`: with what the server reset its HTTP/2 stream.
    pub(super) async fn abort(&mut self, head: &Head, code: Option<u8>) {
        match (self, code) {
            (Self::Http1(writer), _) if head.framing == Framing::UntilClose => writer.abort(),
            (Self::Http2(stream), code) if stream.has_head() => http2::break_off(stream, head, code),
            (Self::Mesh(sender, _), Some(code)) => sender.reset(Code::Http2(code)),
            _ => {}
        }
    }

    /// Breaks off whatever is under way to a client that a new rule forbids.
    pub(crate) fn break_off(&mut self) {
        match self {
            Self::Http1(writer) => writer.abort(),
            Self::Mesh(sender, _) => sender.reset(Code::Denied),
            Self::Http2(stream) => stream.reset(ErrorCode::INTERNAL_ERROR),
        }
    }

    /// Passes an interim head on.
    pub(super) async fn interim(&mut self, head: &Head) -> Result<(), PumpError> {
        if let Self::Http2(stream) = self {
            return stream.interim(head);
        }
        self.head_with(head, false, false)?;
        if let Self::Mesh(sender, _) = self {
            sender.was_interim();
        }
        self.flush().await
    }

    pub(super) fn head_with(&mut self, head: &Head, end: bool, close: bool) -> Result<(), PumpError> {
        self.marked_head(head, end, close, None)
    }

    /// The same of an answer of this sidecar's own, and why it gives one: its client counts it under that reason.
    fn marked_head(
        &mut self,
        head: &Head,
        end: bool,
        close: bool,
        reason: Option<Reason>,
    ) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.head(head, close),
            Self::Mesh(sender, Load { in_flight, latency_us, broken }) => {
                let mut block = BytesMut::with_capacity(512);
                let (load, latency_us, broken) = (Some(*in_flight), *latency_us, *broken);
                let shed = reason == Some(Reason::OursOverloaded);
                Fields { load, latency_us, shed, reason, broken, ..Fields::default() }.encode(&mut block);
                head.write(&mut block, close);
                sender.head(&block, end);
            }
            Self::Http2(stream) => stream.head(head, end)?,
        }
        Ok(())
    }

    pub(super) async fn flush(&mut self) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.flush().await.map_err(|_| PumpError::SinkGone),
            _ => Ok(()),
        }
    }

    /// Where the body of an answer with this head goes.
    pub(super) fn sink(&mut self, head: &Head) -> Result<Sink<'_>, PumpError> {
        match self {
            Self::Http1(writer) => Ok(Sink::Http1(writer)),
            Self::Mesh(sender, _) => Ok(Sink::Mesh(sender)),
            Self::Http2(stream) if stream.has_head() => Ok(Sink::Http2(stream, http2::Length::of(head))),
            Self::Http2(_) => Err(PumpError::SinkGone),
        }
    }

    /// Where the bytes of a tunnel go that was granted with this head.
    pub(super) fn unframed(&mut self, head: &Head) -> Result<Sink<'_>, PumpError> {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
        self.sink(head)
    }

    /// How the end of the answer's body is found: one that ends with the server's connection gets an end of
    /// its own, except for a client that knows no chunks (HTTP/1.0).
    pub(super) fn reframe(&self, head: &mut Head, request: &Head) {
        match head.framing {
            Framing::UntilClose if !request.http10 => head.framing = Framing::Chunked,
            Framing::Chunked if request.http10 => head.framing = Framing::UntilClose,
            _ => {}
        }
    }

    /// The same of an answer without anything behind its head, as HTTP/2 may end one: to an HTTP/1 client its length is
    /// said, or that would wait for the end of the connection.
    pub(super) fn close_frame(&self, head: &mut Head, request: &Head) {
        let is_empty = matches!(head.status(), ..200 | 204 | 304) || request.request_line().0 == "HEAD";
        if matches!(self, Self::Http1(_)) && head.framing == Framing::None && !is_empty {
            head.framing = Framing::Length(0);
        }
    }

    /// Whether this failure makes another sidecar send the request elsewhere.
    pub(crate) fn sends_elsewhere(&self, failure: &Failure) -> bool {
        self.is_mesh() && reset_code(failure) == Some(Code::NotProcessed)
    }

    /// What [`Self::fail_request`] answers: an HTTP status, and one of gRPC. `None`: the client is gone, or another
    /// sidecar decides what becomes of the request.
    pub(crate) fn statuses_of(&self, request: &Head, failure: &Failure) -> Option<(u16, Option<u16>)> {
        let is_gone = matches!(failure, Failure::ClientGone | Failure::ClientGaveUp);
        if is_gone || (self.is_mesh() && reset_code(failure).is_some()) {
            return None;
        }
        let is_grpc = !matches!(self, Self::Http1(_)) && grpc::content_type(request).is_some();
        Some(if is_grpc { (200, Some(failure.grpc_status())) } else { (failure.status(), None) })
    }

    /// Answers a request whose head could not be read.
    pub async fn fail(&mut self, failure: &Failure) {
        self.words(Refused { failure, denial: None, keep: false }, false, None).await;
    }

    /// Answers a request of HTTP/2 whose head is refused, and is of this
    /// content: a gRPC client with a status that it
    /// understands.
    pub async fn fail_with(&mut self, failure: &Failure, content_type: Option<Bytes>) {
        let refused = Refused { failure, denial: None, keep: false };
        match content_type.filter(|content| content.starts_with(b"application/grpc")) {
            Some(content) => self.grpc(refused, content, None).await,
            None => self.words(refused, false, None).await,
        }
    }

    /// Answers a request that failed: another sidecar with the code that says what it may do about it, a gRPC
    /// client with a status that it understands, everybody else with a few words. `edits`: what the request's route does
    /// to answers.
    pub(crate) async fn fail_request(
        &mut self,
        request: &Head,
        refused: Refused<'_>,
        edits: Option<&ResponseEdits>,
    ) {
        let failure = refused.failure;
        if let (Self::Mesh(sender, _), Some(code)) = (&*self, reset_code(failure)) {
            return sender.reset(code);
        }
        match grpc::content_type(request) {
            Some(content) if !matches!(self, Self::Http1(_)) => {
                self.grpc(refused, content.clone(), edits).await;
            }
            _ => self.words(refused, request.request_line().0 == "HEAD", edits).await,
        }
    }

    async fn words(
        &mut self,
        Refused { failure, denial, keep }: Refused<'_>,
        bodiless: bool,
        edits: Option<&ResponseEdits>,
    ) {
        let status = failure.status();
        let text = format!("tulle: {failure}\n");
        let mut head = Head::answer(status, reason(status), text.len());
        if bodiless {
            head.framing = Framing::None;
        }
        name(&mut head, failure, denial);
        if *failure == Failure::OursOverloaded {
            head.push("retry-after", Bytes::from_static(b"1"));
        }
        if let Some(edits) = edits {
            edits.apply_to_failure(&mut head);
        }
        // What is said here says nothing of the connection between another sidecar and its client.
        let close = !keep && !self.is_mesh();
        if self.marked_head(&head, bodiless, close, Some(failure.reason())).is_err() {
            return;
        }
        if bodiless {
            let _ = self.flush().await;
        } else if let Ok(mut sink) = self.sink(&head)
            && sink.data(Bytes::from(text)).await.is_ok()
        {
            sink.end(None).await.ok();
        }
    }

    /// The answer that gRPC calls Trailers-Only.
    async fn grpc(
        &mut self,
        Refused { failure, denial, .. }: Refused<'_>,
        content: Bytes,
        edits: Option<&ResponseEdits>,
    ) {
        let mut head = Head::answer(200, "OK", 0);
        head.framing = Framing::None;
        head.headers.clear();
        head.push("content-type", content);
        head.push("grpc-status", failure.grpc_status().to_string());
        head.push("grpc-message", format!("tulle: {failure}"));
        if *failure == Failure::OursOverloaded {
            // Milliseconds (gRFC A6).
            head.push("grpc-retry-pushback-ms", Bytes::from_static(b"1000"));
        }
        name(&mut head, failure, denial);
        if let Some(edits) = edits {
            edits.apply_to_failure(&mut head);
        }
        if self.marked_head(&head, true, true, Some(failure.reason())).is_ok() {
            let _ = self.flush().await;
        }
    }
}

/// Says why, and under which id whoever asks finds the rule.
fn name(head: &mut Head, failure: &Failure, denial: Option<DenialId>) {
    head.push("tulle-reason", Bytes::from_static(failure.name().as_bytes()));
    if let Some(id) = denial {
        head.push("tulle-denial", id.to_string());
    }
}

/// What another sidecar is told of a request that failed, where an answer would keep it from sending the
/// request elsewhere.
fn reset_code(failure: &Failure) -> Option<Code> {
    match failure {
        // No byte has reached the application.
        Failure::UpstreamNotProcessed | Failure::UpstreamConnect | Failure::OursResources => {
            Some(Code::NotProcessed)
        }
        Failure::UpstreamReset => Some(Code::UpstreamFailed),
        _ => None,
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        408 => "Request Timeout",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Error",
    }
}
