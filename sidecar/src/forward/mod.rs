//! One request, from whatever protocol it came to whatever protocol it goes: head, body, answer.
//!
//! Request and answer move at the same time. Until the answer's head has arrived the request may
//! still be sent elsewhere: its body is kept as long as it fits the credit that a peer grants before
//! its application has taken anything ([`STREAM_CREDIT`]).

mod downstream;
mod upstream;

pub use downstream::Downstream;
pub use upstream::{Exchange, UpSink, UpSource};

use std::future::pending;
use std::pin::{Pin, pin};

use bytes::{Bytes, BytesMut};
use futures::future::{Either, select};
use tokio::time::Instant;
use tulle_mesh::wire::STREAM_CREDIT;
use upstream::HeadFailure;

use crate::error::Failure;
use crate::http1::{Framing, Head, Part, Reader, Start, Writer};
use crate::message::{PumpError, Sink, Source, deliver, pump};

/// A piece of a body from this size on is held as it was read, with the buffer around it.
const WORTH_HOLDING: usize = 4 * 1024;

/// A request's body, kept while it may have to be sent again.
pub struct RequestBody<'a> {
    source: Option<Source<'a>>,
    kept: Vec<Bytes>,
    /// Small pieces after those: each would hold the whole buffer that it was read into.
    kept_small: BytesMut,
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
    /// Nothing of an answer arrived, and the application has not read the request to its end.
    pub unread: bool,
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
    /// When the answer's head arrived.
    pub head_at: Option<Instant>,
    /// Its status.
    pub head_status: Option<u16>,
}

impl Relayed {
    /// Nothing was sent.
    pub fn unprocessed(failure: Failure) -> Self {
        Self {
            result: Err(failure),
            unprocessed: true,
            unanswered: false,
            unread: false,
            answered: false,
            client_reusable: false,
            grpc_status: None,
            bytes: (0, 0),
            idle: None,
            head_at: None,
            head_status: None,
        }
    }
}

impl<'a> RequestBody<'a> {
    /// The body of a request with this framing.
    pub fn new(source: Source<'a>, framing: Framing) -> Self {
        let ended = matches!(framing, Framing::None | Framing::Length(0));
        Self {
            source: Some(source),
            kept: Vec::new(),
            kept_small: BytesMut::new(),
            kept_bytes: 0,
            trailers: None,
            ended,
        }
    }

    /// Whether the whole of what was read is still here.
    pub fn is_replayable(&self) -> bool {
        self.kept_bytes <= STREAM_CREDIT as usize
    }

    /// Whether the client's side was read to its end.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Keeps a piece for another attempt, as long as the whole fits.
    fn keep(&mut self, bytes: &Bytes) {
        self.kept_bytes += bytes.len();
        if !self.is_replayable() {
            self.kept.clear();
            self.kept_small.clear();
        } else if bytes.len() >= WORTH_HOLDING || self.kept.is_empty() {
            if !self.kept_small.is_empty() {
                self.kept.push(self.kept_small.split().freeze());
            }
            self.kept.push(bytes.clone());
        } else {
            self.kept_small.extend_from_slice(bytes);
        }
    }

    async fn send(&mut self, sink: &mut Sink<'_>, moved: &mut u64) -> Result<(), PumpError> {
        if !self.kept_small.is_empty() {
            self.kept.push(self.kept_small.split().freeze());
        }
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
                    self.keep(&bytes);
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
    if request.upgrade {
        upgrade(request, body, sink, source, down, &mut relayed).await;
        return relayed;
    }
    let mut sent = 0;
    let mut clean = false;
    {
        let mut up = sink.sink();
        let mut upload = pin!(body.send(&mut up, &mut sent));
        let mut uploaded = None;
        match answer_head(request, upload.as_mut(), &mut uploaded, &mut source, down).await {
            Ok((mut head, end)) => {
                relayed.result = Ok(head.status());
                relayed.head_at = Some(Instant::now());
                relayed.head_status = Some(head.status());
                relayed.grpc_status = grpc_status(&head.headers);
                relayed.answered = true;
                if !end {
                    down.reframe(&mut head, request);
                }
                let keep = request.keep_alive && head.framing != Framing::UntilClose;
                let upload = async {
                    match uploaded {
                        Some(done) => done,
                        None => upload.await,
                    }
                };
                let download = download(&head, end, !keep, &mut source, down);
                clean = finish(upload, download, &mut relayed).await;
                relayed.client_reusable = clean && keep;
                if relayed.result.is_err() {
                    down.abort(&head);
                }
            }
            Err(failure) => failure.record(&mut relayed),
        }
    }
    relayed.bytes.0 = sent;
    // A request that was not sent to its end leaves a server that waits for the rest: never reused.
    clean &= relayed.result.is_ok() && body.is_ended();
    relayed.client_reusable &= body.is_ended();
    if !body.is_replayable() {
        relayed.unprocessed = false;
        relayed.unanswered = false;
        relayed.unread = false;
    }
    relayed.idle = if clean { idle(sink, source) } else { None };
    relayed
}

/// Waits for the answer's head while the request is sent. A client that goes away ends the wait: nobody
/// is left to answer.
async fn answer_head(
    request: &Head,
    mut upload: Pin<&mut impl Future<Output = Result<(), PumpError>>>,
    uploaded: &mut Option<Result<(), PumpError>>,
    source: &mut UpSource,
    down: &mut Downstream<'_>,
) -> Result<(Head, bool), HeadFailure> {
    let method = method_of(request);
    loop {
        tokio::select! {
            biased;
            result = upload.as_mut(), if uploaded.is_none() => {
                *uploaded = Some(result);
                // A server that is gone may have answered before.
                if let Err(error) = result && error.is_of_client() {
                    return Err(HeadFailure::Failed(client_failure(error)));
                }
            }
            head = source.head(&method) => match head {
                // An interim answer; the final one follows.
                Ok((head, _)) if (100..200).contains(&head.status()) && head.status() != 101 => {
                    if !request.http10 && down.interim(&head).await.is_err() {
                        return Err(HeadFailure::Failed(Failure::ClientGone));
                    }
                }
                other => return other,
            },
            () = down.gone() => return Err(HeadFailure::Failed(Failure::ClientGaveUp)),
        }
    }
}

/// Upload and download together; the attempt is over when the answer is. Returns whether the
/// client's connection is in a known state.
async fn finish(
    upload: impl Future<Output = Result<(), PumpError>>,
    download: impl Future<Output = Result<(u64, Option<u16>), PumpError>>,
    relayed: &mut Relayed,
) -> bool {
    let (upload, download) = (pin!(upload), pin!(download));
    let (downloaded, uploaded) = match select(upload, download).await {
        Either::Left((Err(error), _)) if error.is_of_client() => {
            // The server would wait for the rest for ever.
            relayed.result = Err(client_failure(error));
            return false;
        }
        Either::Left((uploaded, download)) => (download.await, uploaded.is_ok()),
        // An early answer: what the client still sends has nobody to read it.
        Either::Right((downloaded, mut upload)) => {
            let uploaded = futures::FutureExt::now_or_never(&mut upload);
            (downloaded, matches!(uploaded, Some(Ok(()))))
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
    down.head_with(head, bodiless, close)?;
    if bodiless {
        down.flush().await?;
        return Ok((0, None));
    }
    let Some(from) = source.body() else { return Err(PumpError::SourceGone) };
    let mut grpc = None;
    let moved = deliver(from, down.sink()?, |trailers| grpc = grpc_status(trailers)).await?;
    Ok((moved, grpc))
}

fn grpc_status(lines: &[(Bytes, Bytes)]) -> Option<u16> {
    let (_, value) = lines.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"grpc-status"))?;
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

/// An upgrade: nothing of what the client sends is passed on before the server has agreed, and then
/// everything, in both directions, until each has ended.
async fn upgrade(
    request: &Head,
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
    let answer = tokio::select! {
        answer = source.head(b"GET") => answer,
        () = down.gone() => Err(HeadFailure::Failed(Failure::ClientGaveUp)),
    };
    let (head, end) = match answer {
        Ok(head) => head,
        Err(failure) => return failure.record(relayed),
    };
    relayed.answered = true;
    relayed.head_at = Some(Instant::now());
    relayed.head_status = Some(head.status());
    relayed.result = Ok(head.status());
    if head.status() != 101 || !head.upgrade {
        // Refused or ignored: the answer is an ordinary one, and the connection is not used again.
        let mut refused = Head { upgrade: false, ..head };
        down.reframe(&mut refused, request);
        match download(&refused, end, true, &mut source, down).await {
            Ok((bytes, _)) => relayed.bytes.1 = bytes,
            Err(_) => relayed.result = Err(Failure::UpstreamReset),
        }
        return;
    }
    if down.head_with(&head, false, false).is_err() || down.flush().await.is_err() {
        relayed.result = Err(Failure::ClientGone);
        return;
    }
    let (Some(from_client), Some(from_server)) = (body.source.take(), source.body()) else { return };
    sink.unframe();
    let Ok(to_client) = down.unframed() else { return };
    let (up, down) =
        tunnel((from_client.unframed(), sink.sink()), (from_server, to_client), |_| true, pending()).await;
    relayed.bytes = (up, down);
}

/// Moves bytes both ways until each way has ended. A way that breaks off ends the other, and both ends see
/// that it was no proper end, as when `stop` resolves. `admit` sees what the client sends, and may break off.
pub async fn tunnel(
    up: (Source<'_>, Sink<'_>),
    down: (Source<'_>, Sink<'_>),
    admit: impl FnMut(&[u8]) -> bool,
    stop: impl Future<Output = ()>,
) -> (u64, u64) {
    join(up, down, admit, || {}, stop).await.bytes
}

/// How both ways of a tunnel ended.
#[derive(Clone, Copy, Debug)]
pub struct Joined {
    /// Bytes: from the client, from the server.
    pub bytes: (u64, u64),
    /// How the way from the client ended; `None`: it was ended with the other.
    pub from_client: Option<Result<(), PumpError>>,
    /// How the way from the server ended; `None`: it was ended with the other.
    pub from_server: Option<Result<(), PumpError>>,
}

/// As [`tunnel`], and tells how it ended. `heard` is called whenever the server sends something.
pub async fn join(
    up: (Source<'_>, Sink<'_>),
    down: (Source<'_>, Sink<'_>),
    admit: impl FnMut(&[u8]) -> bool,
    mut heard: impl FnMut(),
    stop: impl Future<Output = ()>,
) -> Joined {
    let (mut sent, mut received) = (0u64, 0u64);
    let ((from_client, mut to_server), (from_server, mut to_client)) = (up, down);
    let (uploaded, downloaded) = {
        let upload = pin!(pump(from_client, &mut to_server, &mut sent, admit));
        let download = pin!(pump(from_server, &mut to_client, &mut received, |_| {
            heard();
            true
        }));
        let both = async {
            match select(upload, download).await {
                // A reader that is gone may still have something to say.
                Either::Left((result @ (Ok(()) | Err(PumpError::SinkGone)), other)) => {
                    (Some(result), Some(other.await))
                }
                Either::Right((result @ (Ok(()) | Err(PumpError::SinkGone)), other)) => {
                    (Some(other.await), Some(result))
                }
                Either::Left((broken, _)) => (Some(broken), None),
                Either::Right((broken, _)) => (None, Some(broken)),
            }
        };
        tokio::select! {
            ends = both => ends,
            () = stop => (None, None),
        }
    };
    // A way that has ended properly keeps what is still on it.
    if uploaded != Some(Ok(())) {
        to_server.abort();
    }
    if downloaded != Some(Ok(())) {
        to_client.abort();
    }
    Joined { bytes: (sent, received), from_client: uploaded, from_server: downloaded }
}

fn method_of(request: &Head) -> Bytes {
    match &request.start {
        Start::Request { method, .. } => method.clone(),
        Start::Response { .. } => Bytes::new(),
    }
}

fn client_failure(error: PumpError) -> Failure {
    match error {
        PumpError::SourceMalformed(why) | PumpError::SinkRefused(why) => Failure::ClientBadRequest(why),
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
