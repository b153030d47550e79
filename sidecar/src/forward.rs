//! One request, from whatever protocol it came to whatever protocol it goes: head, body, answer.
//!
//! Request and answer move at the same time. Until the answer's head has arrived the request may
//! still be sent elsewhere: its body is kept as long as it fits the credit that a peer grants before
//! its application has taken anything ([`STREAM_CREDIT`]).

use std::pin::pin;

use bytes::{Bytes, BytesMut};
use futures::future::{Either, select};
use tulle_mesh::wire::STREAM_CREDIT;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::Fields;

use crate::error::Failure;
use crate::http1::{Framing, Head, Part, Reader, Start, Writer};
use crate::http2;
use crate::message::{PumpError, Sink, Source, pump};
use crate::wire::{Event, Receiver, Sender};

/// A request under way to a server.
pub struct Exchange {
    /// Where the request goes.
    pub sink: UpSink,
    /// Where the answer comes from.
    pub source: UpSource,
    /// The connection had served a request before: it may have been closed meanwhile.
    pub reused: bool,
}

/// Where a request goes.
pub enum UpSink {
    /// To another sidecar.
    Mesh(Sender),
    /// To an HTTP/1 server.
    Http1(Writer),
    /// To an HTTP/2 server.
    Http2(h2::SendStream<Bytes>),
}

/// Where an answer comes from.
pub enum UpSource {
    /// From another sidecar.
    Mesh(Receiver),
    /// From an HTTP/1 server.
    Http1(Reader),
    /// From an HTTP/2 server.
    Http2(Option<h2::client::ResponseFuture>, Option<h2::RecvStream>),
}

/// Where an answer goes.
pub enum Downstream<'a> {
    /// An HTTP/1 client.
    Http1(&'a mut Writer),
    /// Another sidecar, with the load to tell it.
    Mesh(&'a Sender, u32),
    /// An HTTP/2 client.
    Http2(&'a mut h2::server::SendResponse<Bytes>, Option<h2::SendStream<Bytes>>),
}

/// A request's body, kept while it may have to be sent again.
pub struct RequestBody<'a> {
    source: Option<Source<'a>>,
    kept: Vec<Bytes>,
    kept_bytes: usize,
    trailers: Option<Vec<(Bytes, Bytes)>>,
    ended: bool,
}

/// How an attempt ended.
#[derive(Debug)]
pub struct Relayed {
    /// The status that the client got, or why it got none of the server's.
    pub result: Result<u16, Failure>,
    /// No byte reached an application, and the body can be sent again: try another endpoint.
    pub unprocessed: bool,
    /// Nothing of an answer arrived, but the application may have seen the request.
    pub unanswered: bool,
    /// The answer's head has gone to the client: nothing else can be answered.
    pub answered: bool,
    /// The client's connection ended cleanly and may carry another request.
    pub client_reusable: bool,
    /// The `grpc-status` of the answer.
    pub grpc_status: Option<u16>,
    /// Bytes of bodies: request, answer.
    pub bytes: (u64, u64),
    /// A server's connection that ended cleanly.
    pub idle: Option<(Reader, Writer)>,
}

impl Relayed {
    /// Nothing was sent.
    pub fn unprocessed(failure: Failure) -> Self {
        Self {
            result: Err(failure),
            unprocessed: true,
            unanswered: false,
            answered: false,
            client_reusable: false,
            grpc_status: None,
            bytes: (0, 0),
            idle: None,
        }
    }
}

impl<'a> RequestBody<'a> {
    /// The body of a request with this framing.
    pub fn new(source: Source<'a>, framing: Framing) -> Self {
        let ended = matches!(framing, Framing::None | Framing::Length(0));
        Self { source: Some(source), kept: Vec::new(), kept_bytes: 0, trailers: None, ended }
    }

    /// Whether the whole of what was read is still here.
    pub fn is_replayable(&self) -> bool {
        self.kept_bytes <= STREAM_CREDIT as usize
    }

    /// Whether the client's side was read to its end.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    async fn send(&mut self, sink: &mut Sink<'_>, moved: &mut u64) -> Result<(), PumpError> {
        for bytes in self.kept.clone() {
            *moved += bytes.len() as u64;
            sink.data(bytes).await?;
        }
        while !self.ended {
            let Some(source) = &mut self.source else { break };
            let part = match futures::FutureExt::now_or_never(source.next()) {
                Some(part) => part?,
                None => {
                    sink.flush().await?;
                    source.next().await?
                }
            };
            match part {
                Part::Data(bytes) => {
                    self.kept_bytes += bytes.len();
                    if self.kept_bytes <= STREAM_CREDIT as usize {
                        self.kept.push(bytes.clone());
                    } else {
                        self.kept.clear();
                    }
                    *moved += bytes.len() as u64;
                    sink.data(bytes).await?;
                }
                Part::Trailers(trailers) => self.trailers = Some(trailers),
                Part::End => self.ended = true,
            }
        }
        sink.end(self.trailers.clone()).await
    }
}

/// Carries one attempt: sends the body, waits for the answer, passes it on.
pub async fn relay(
    request: &Head,
    body: &mut RequestBody<'_>,
    exchange: Exchange,
    down: &mut Downstream<'_>,
) -> Relayed {
    let Exchange { mut sink, mut source, .. } = exchange;
    let mut relayed = Relayed { unprocessed: false, ..Relayed::unprocessed(Failure::UpstreamReset) };
    let method = method_of(request);
    if request.upgrade {
        upgrade(&method, body, sink, source, down, &mut relayed).await;
        return relayed;
    }
    let mut sent = 0;
    let mut upload_result = None;
    let mut uploaded = false;
    {
        let mut up = sink.sink();
        let mut upload = pin!(body.send(&mut up, &mut sent));
        let head = loop {
            let head = if upload_result.is_none() {
                match select(&mut upload, pin!(source.head(&method))).await {
                    Either::Left((result, _)) => {
                        let failed = matches!(
                            result,
                            Err(PumpError::SourceGone
                                | PumpError::SourceMalformed(_)
                                | PumpError::SourceReset(_)
                                | PumpError::SinkRefused(_))
                        );
                        let gone = result;
                        upload_result = Some(gone);
                        if failed {
                            break Err(HeadFailure::Failed(client_failure(gone)));
                        }
                        continue;
                    }
                    Either::Right((head, _)) => head,
                }
            } else {
                source.head(&method).await
            };
            match head {
                // An interim answer; the final one follows.
                Ok((head, _)) if (100..200).contains(&head.status()) && head.status() != 101 => {
                    if down.head(&head, false).await.is_err() {
                        break Err(HeadFailure::Failed(Failure::ClientGone));
                    }
                }
                other => break other,
            }
        };
        match head {
            Ok((mut head, end)) => {
                relayed.result = Ok(head.status());
                relayed.grpc_status = grpc_status(&head.headers);
                relayed.answered = true;
                let keep = request.keep_alive && head.framing != Framing::UntilClose;
                if head.framing == Framing::UntilClose && !end {
                    down.reframe(&mut head);
                }
                let keep = keep || head.framing == Framing::Chunked && request.keep_alive;
                let close = !keep;
                let upload = async {
                    match upload_result {
                        Some(done) => Some(done),
                        None => Some(upload.await),
                    }
                };
                let download = download(&head, end, close, &mut source, down);
                uploaded = finish(upload, download, &mut relayed).await;
                relayed.client_reusable = uploaded && keep;
            }
            Err(failure) => failure.record(&mut relayed),
        }
    }
    relayed.bytes.0 = sent;
    // A request that was not sent to its end leaves a server that waits for the rest: never reused.
    let clean = uploaded && relayed.answered && relayed.result.is_ok() && body.is_ended();
    relayed.client_reusable &= body.is_ended();
    if !body.is_replayable() {
        relayed.unprocessed = false;
        relayed.unanswered = false;
    }
    relayed.idle = if clean { idle(sink, source) } else { None };
    relayed
}

/// Upload and download together; the attempt is over when the answer is. Returns whether the
/// client's connection is in a known state.
async fn finish(
    upload: impl Future<Output = Option<Result<(), PumpError>>>,
    download: impl Future<Output = Result<(u64, Option<u16>), PumpError>>,
    relayed: &mut Relayed,
) -> bool {
    let (upload, download) = (pin!(upload), pin!(download));
    let (downloaded, uploaded) = match select(upload, download).await {
        Either::Left((uploaded, download)) => (download.await, uploaded.is_none_or(|result| result.is_ok())),
        // An early answer: what the client still sends has nobody to read it.
        Either::Right((downloaded, mut upload)) => {
            let uploaded = futures::FutureExt::now_or_never(&mut upload);
            (downloaded, matches!(uploaded, Some(None | Some(Ok(())))))
        }
    };
    match downloaded {
        Ok((bytes, grpc)) => {
            relayed.bytes.1 = bytes;
            relayed.grpc_status = grpc.or(relayed.grpc_status);
            uploaded
        }
        Err(PumpError::SinkGone) => {
            relayed.result = Err(Failure::ClientGone);
            false
        }
        Err(PumpError::SourceMalformed(why) | PumpError::SinkRefused(why)) => {
            relayed.result = Err(Failure::UpstreamBadResponse(why));
            false
        }
        Err(PumpError::SourceGone | PumpError::SourceReset(_)) => {
            relayed.result = Err(Failure::UpstreamReset);
            false
        }
    }
}

async fn download(
    head: &Head,
    end: bool,
    close: bool,
    source: &mut UpSource,
    down: &mut Downstream<'_>,
) -> Result<(u64, Option<u16>), PumpError> {
    let bodiless = end || head.framing == Framing::None;
    down.head_with(head, bodiless, close).await?;
    if bodiless {
        down.flush().await?;
        return Ok((0, None));
    }
    let Some(from) = source.body() else { return Err(PumpError::SourceGone) };
    let mut grpc = None;
    let moved = pump_with_trailers(from, down.sink()?, &mut grpc).await?;
    Ok((moved, grpc))
}

async fn pump_with_trailers(
    from: Source<'_>,
    to: Sink<'_>,
    grpc: &mut Option<u16>,
) -> Result<u64, PumpError> {
    pump(from, to, |_| {}, |trailers| *grpc = grpc_status(trailers)).await
}

fn grpc_status(lines: &[(Bytes, Bytes)]) -> Option<u16> {
    let (_, value) = lines.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"grpc-status"))?;
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

/// An upgrade: nothing of what the client sends is passed on before the server has agreed, and then
/// everything, in both directions, until each has ended.
async fn upgrade(
    method: &Bytes,
    body: &mut RequestBody<'_>,
    mut sink: UpSink,
    mut source: UpSource,
    down: &mut Downstream<'_>,
    relayed: &mut Relayed,
) {
    if sink.flush().await.is_err() {
        relayed.unanswered = true;
        return;
    }
    let (head, end) = match source.head(method).await {
        Ok(head) => head,
        Err(failure) => return failure.record(relayed),
    };
    relayed.answered = true;
    relayed.result = Ok(head.status());
    if head.status() != 101 || !head.upgrade {
        // Refused or ignored: the answer is an ordinary one, and the connection is not used again.
        let mut refused = Head { upgrade: false, ..head };
        down.reframe(&mut refused);
        match download(&refused, end, true, &mut source, down).await {
            Ok((bytes, _)) => relayed.bytes.1 = bytes,
            Err(_) => relayed.result = Err(Failure::UpstreamReset),
        }
        return;
    }
    if down.head_with(&head, false, false).await.is_err() || down.flush().await.is_err() {
        relayed.result = Err(Failure::ClientGone);
        return;
    }
    let (Some(from_client), Some(from_server)) = (body.source.take(), source.body()) else { return };
    sink.unframe();
    let Ok(to_client) = down.unframed() else { return };
    let (up, down) = tunnel((from_client.unframed(), sink.sink()), (from_server, to_client)).await;
    relayed.bytes = (up, down);
}

/// Moves bytes both ways until each way has ended; a way that fails ends the other.
pub async fn tunnel(up: (Source<'_>, Sink<'_>), down: (Source<'_>, Sink<'_>)) -> (u64, u64) {
    let (mut sent, mut received) = (0u64, 0u64);
    {
        let upload = pin!(pump(up.0, up.1, |bytes| sent += bytes.len() as u64, |_| {}));
        let download = pin!(pump(down.0, down.1, |bytes| received += bytes.len() as u64, |_| {}));
        match select(upload, download).await {
            // A reader that is gone may still have something to say.
            Either::Left((Ok(_) | Err(PumpError::SinkGone), other)) => drop(other.await),
            Either::Right((Ok(_) | Err(PumpError::SinkGone), other)) => drop(other.await),
            _ => {}
        }
    }
    (sent, received)
}

fn method_of(request: &Head) -> Bytes {
    match &request.start {
        Start::Request { method, .. } => method.clone(),
        Start::Response { .. } => Bytes::new(),
    }
}

fn client_failure(result: Result<(), PumpError>) -> Failure {
    match result {
        Err(PumpError::SourceMalformed(why) | PumpError::SinkRefused(why)) => Failure::ClientBadRequest(why),
        _ => Failure::ClientGone,
    }
}

fn idle(sink: UpSink, source: UpSource) -> Option<(Reader, Writer)> {
    match (sink, source) {
        (UpSink::Http1(writer), UpSource::Http1(reader))
            if reader.is_done() && writer.is_flushed() && reader.is_reusable() =>
        {
            Some((reader, writer))
        }
        _ => None,
    }
}

/// Why no head of an answer arrived.
enum HeadFailure {
    NotProcessed,
    Gone,
    Failed(Failure),
}

impl HeadFailure {
    fn record(self, relayed: &mut Relayed) {
        match self {
            Self::NotProcessed => {
                relayed.unprocessed = true;
                relayed.result = Err(Failure::UpstreamNotProcessed);
            }
            Self::Gone => {
                relayed.unanswered = true;
                relayed.result = Err(Failure::UpstreamReset);
            }
            Self::Failed(failure) => relayed.result = Err(failure),
        }
    }
}

impl UpSink {
    /// As a sink of bodies.
    pub fn sink(&mut self) -> Sink<'_> {
        match self {
            Self::Mesh(sender) => Sink::Mesh(sender),
            Self::Http1(writer) => Sink::Http1(writer),
            Self::Http2(stream) => Sink::Http2(stream),
        }
    }

    async fn flush(&mut self) -> Result<(), PumpError> {
        self.sink().flush().await
    }

    fn unframe(&mut self) {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
    }
}

impl UpSource {
    /// The answer's head, and whether it is all.
    async fn head(&mut self, method: &[u8]) -> Result<(Head, bool), HeadFailure> {
        match self {
            Self::Http1(reader) => match reader.response(method).await {
                Ok(head) => Ok((head, false)),
                Err(Failure::UpstreamReset) => Err(HeadFailure::Gone),
                Err(failure) => Err(HeadFailure::Failed(failure)),
            },
            Self::Mesh(receiver) => match receiver.next().await {
                Event::Head(block) => {
                    let mut head = mesh_head(block, method).map_err(HeadFailure::Failed)?;
                    let end = receiver.take_end();
                    if end && head.framing == Framing::UntilClose {
                        head.framing = Framing::None;
                    }
                    Ok((head, end))
                }

                Event::Reset(Code::NotProcessed) => Err(HeadFailure::NotProcessed),
                Event::Reset(Code::Denied) => Err(HeadFailure::Failed(Failure::PolicyDenied)),
                Event::Reset(Code::BadHead) => {
                    Err(HeadFailure::Failed(Failure::ClientBadRequest("refused by the server's sidecar")))
                }
                Event::Reset(_) | Event::Lost => Err(HeadFailure::Gone),
                _ => Err(HeadFailure::Failed(Failure::UpstreamBadResponse("a body without a head"))),
            },
            Self::Http2(future, body) => {
                let Some(answer) = future.as_mut() else { return Err(HeadFailure::Gone) };
                // Taken only when it has answered: this wait may be given up and begun again.
                let result = answer.await;
                *future = None;
                match result {
                    Ok(response) => {
                        let (parts, stream) = response.into_parts();
                        let end = stream.is_end_stream();
                        *body = Some(stream);
                        http2::response_head(&parts, end).map(|head| (head, end)).map_err(HeadFailure::Failed)
                    }
                    Err(error) if error.reason() == Some(h2::Reason::REFUSED_STREAM) => {
                        Err(HeadFailure::NotProcessed)
                    }
                    Err(_) => Err(HeadFailure::Gone),
                }
            }
        }
    }

    /// The answer's body.
    fn body(&mut self) -> Option<Source<'_>> {
        match self {
            Self::Http1(reader) => Some(Source::Http1(reader)),
            Self::Mesh(receiver) => Some(Source::Mesh(receiver)),
            Self::Http2(_, stream) => stream.as_mut().map(Source::Http2),
        }
    }
}

fn mesh_head(mut block: Bytes, method: &[u8]) -> Result<Head, Failure> {
    let bad = |_| Failure::UpstreamBadResponse("a head that cannot be read, from the server's sidecar");
    Fields::decode(&mut block).map_err(bad)?;
    let mut text = BytesMut::from(block);
    match crate::http1::head::parse_response(&mut text, method) {
        Ok(Some(head)) => Ok(head),
        _ => Err(Failure::UpstreamBadResponse("a head that cannot be read, from the server's sidecar")),
    }
}

impl Downstream<'_> {
    /// Passes an interim head on.
    async fn head(&mut self, head: &Head, close: bool) -> Result<(), PumpError> {
        match self {
            Self::Http2(..) => Ok(()),
            _ => {
                self.head_with(head, false, close).await?;
                self.flush().await
            }
        }
    }

    async fn head_with(&mut self, head: &Head, end: bool, close: bool) -> Result<(), PumpError> {
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

    async fn flush(&mut self) -> Result<(), PumpError> {
        match self {
            Self::Http1(writer) => writer.flush().await.map_err(|_| PumpError::SinkGone),
            _ => Ok(()),
        }
    }

    fn sink(&mut self) -> Result<Sink<'_>, PumpError> {
        match self {
            Self::Http1(writer) => Ok(Sink::Http1(writer)),
            Self::Mesh(sender, _) => Ok(Sink::Mesh(sender)),
            Self::Http2(_, Some(stream)) => Ok(Sink::Http2(stream)),
            Self::Http2(_, None) => Err(PumpError::SinkGone),
        }
    }

    fn unframed(&mut self) -> Result<Sink<'_>, PumpError> {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
        self.sink()
    }

    /// A body that ends with the server's connection gets an end of its own on ours.
    fn reframe(&self, head: &mut Head) {
        if head.framing == Framing::UntilClose {
            head.framing = Framing::Chunked;
        }
    }

    /// Answers with a few words of our own.
    pub async fn answer(&mut self, failure: &Failure) {
        let status = failure.status();
        let text = format!("tulle: {failure}\n");
        let mut head = Head::answer(status, reason(status), text.len());
        head.push("tulle-reason", Bytes::from_static(failure.name().as_bytes()));
        if self.head_with(&head, false, true).await.is_err() {
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
