//! One attempt at serving a request: from whatever protocol it came to whatever protocol it goes.
//!
//! In: a [`Call`], and an [`Exchange`] that is open to one server. Out: an [`Attempt`], which says how it
//! ended. First the answer's head is awaited, under an [`AttemptPolicy`], while the body is sent; then the
//! answer is delivered. Until the head has arrived the request may still be sent elsewhere: its body is kept
//! as long as it fits the credit that a peer grants before its application has taken anything
//! ([`STREAM_CREDIT`](tulle_mesh::wire::STREAM_CREDIT)). Nothing here picks an endpoint, counts or logs.
//!
//! ```text
//!   body      the request's body on its way, kept for another attempt
//!   answer    the client's side: where the answer goes
//!   reply     answers of our own that are no failures
//!   copied    a copy of a request, whose answer is dropped
//!   exchange  the server's side: where the request goes and the answer comes from
//!   open      an exchange with an endpoint
//!   progress  how far both bodies have come
//!   tunnel    bytes both ways until each way has ended
//! ```

pub mod answer;
pub mod body;
mod copied;
pub mod exchange;
pub mod open;
mod progress;
mod reply;
#[cfg(test)]
mod tests;
pub mod tunnel;

pub use answer::{Answer, Load};
pub use body::RequestBody;
pub use copied::{Copied, send_copy};
pub use exchange::{Exchange, Report, UpSink, UpSource, http1_exchange, http2_exchange};
pub use open::{Opening, open, take_kept};
pub use progress::Pace;
pub use tunnel::{Joined, join, proxy_tcp, splice, tunnel};

use std::future::{pending, poll_fn};
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{Either, select};
use tokio::time::{Instant, sleep_until};
use tulle_mesh::wire::frame::Code;

use crate::call::{Call, Ended};
use crate::error::{Failure, PumpError};
use crate::http1::{Framing, Head, Reader, Writer};
use crate::message::{self, Progress};
use crate::route::ResponseEdits;
use exchange::Arrived;
use progress::Moved;
use tunnel::{Terms, stalled, upgraded};

/// What an attempt may take, and which answers are accepted. The default takes whatever comes, whenever it comes.
#[derive(Clone, Copy, Default)]
pub struct AttemptPolicy<'a> {
    /// When the answer's head must have arrived: the end of the request's time.
    pub deadline: Option<Instant>,
    /// The same for this attempt alone: another one may follow.
    pub cutoff: Option<Instant>,
    /// How long nothing may move once the head of the answer has come.
    pub idle: Option<Duration>,
    /// What a client sends behind a CONNECT must not name a client to the application.
    pub refuses_claims: bool,
    /// How the attempt ends is compared with others: see [`Attempt::pace`].
    pub compared: bool,
    /// Whether another attempt is made instead of delivering this answer. Only whoever makes it may say so.
    pub refuses: Option<Refuses<'a>>,
}

/// Decides about an answer by its head and by what the endpoint's sidecar reports. Asked once for each answer, and only
/// while the whole of the request can still be sent again.
pub type Refuses<'a> = &'a dyn Fn(&Head, &Report) -> bool;

impl AttemptPolicy<'_> {
    /// When the wait for a head is over, and what that means.
    pub(crate) fn expiry(&self) -> (Option<Instant>, Failure) {
        match (self.cutoff, self.deadline) {
            (Some(cutoff), deadline) if deadline.is_none_or(|deadline| cutoff < deadline) => {
                (Some(cutoff), Failure::UpstreamTimeout)
            }
            (_, deadline) => (deadline, Failure::DeadlineExceeded),
        }
    }
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The head of the server's answer went to the client, with this status. `Err`: the answer broke off later.
    Delivered(Result<u16, Failure>),
    /// The policy refused an answer with this status: another attempt follows. Nothing went to the client.
    Refused(u16),
    /// No byte reached an application.
    NotProcessed(Failure),
    /// The application had closed the connection when the request's last bytes came: see [`Reset::BehindEnd`](crate::http1::conn::Reset::BehindEnd).
    Unread(Failure),
    /// The application's side reset the connection without a byte of an answer: see [`Reset::AtOnce`](crate::http1::conn::Reset::AtOnce).
    Reset(Failure),
    /// Nothing of an answer arrived; the application may have seen the request.
    Unanswered(Failure),
    /// A failure that no other attempt mends: a malformed answer, a policy, the deadline.
    Final(Failure),
    /// The client is at fault, or has gone.
    Client(Failure),
}

/// An attempt that has ended, and what was seen of it.
#[derive(Debug)]
pub struct Attempt {
    /// How it ended.
    pub end: End,
    /// When the application had all that came of the request before the head of the answer: the end of the request, or of
    /// what a stream had said by then. Before that it may have waited for the client.
    pub sent_at: Option<Instant>,
    /// When the head of the answer arrived.
    pub head_at: Option<Instant>,
    /// The status in that head.
    pub status: Option<u16>,
    /// The `grpc-status` of the answer.
    pub grpc_status: Option<u16>,
    /// What the endpoint's sidecar reports with the answer.
    pub report: Report,
    /// What the server was doing when the client left its answer, or how it ended a tunnel.
    pub pace: Pace,
    /// The client has spoken last: the server has sent nothing of its answer since.
    pub is_unanswered: bool,
    /// Bytes of the bodies: request, answer.
    pub bytes: (u64, u64),
    /// A connection to an HTTP/1 server that has ended its exchange cleanly.
    pub idle: Option<(Reader, Writer)>,
    /// To the server that connection may stand for this client: it carries no request of another one.
    pub bound: bool,
    /// The client's connection has ended its exchange cleanly too, and may carry another request.
    pub client_reusable: bool,
}

impl End {
    /// Whether the request may be sent once more, elsewhere or on a fresh connection. What no application has
    /// read may be, whatever its method; what one may have carried out only if its method allows it to be carried
    /// out twice (RFC 9110 §9.2.2). An application that has read a head may have acted on it before it came to the body.
    /// The body must still be here as a whole.
    pub fn may_repeat(&self, call: &Call<'_>) -> bool {
        call.body.is_replayable()
            && match self {
                Self::NotProcessed(_) => true,
                Self::Unread(_) => call.body.is_read_at_once() || call.is_idempotent(),
                Self::Reset(_) | Self::Unanswered(_) => call.is_idempotent(),
                Self::Delivered(_) | Self::Refused(_) | Self::Final(_) | Self::Client(_) => false,
            }
    }
}

impl Attempt {
    /// What the client of a request gets that ends with this attempt.
    pub fn ended(self) -> Ended {
        let (result, answered) = match self.end {
            End::Delivered(result) => (result, true),
            End::Refused(_) => (Err(Failure::UpstreamBadResponse("a status that is not accepted")), false),
            End::NotProcessed(failure)
            | End::Unread(failure)
            | End::Reset(failure)
            | End::Unanswered(failure)
            | End::Final(failure)
            | End::Client(failure) => (Err(failure), false),
        };
        Ended {
            result,
            answered,
            grpc_status: self.grpc_status,
            sidecar_reason: self.report.reason,
            bytes: self.bytes,
            client_reusable: self.client_reusable,
        }
    }
}

/// Makes one attempt: waits for the answer's head while the body is sent, then delivers the answer.
pub async fn run(call: &mut Call<'_>, exchange: Exchange, policy: &AttemptPolicy<'_>) -> Attempt {
    let Exchange { mut sink, mut source, place: _place, waiting, .. } = exchange;
    let Call { head: request, body, answer, edits, set_cookie, .. } = call;
    let mut attempt = Attempt::of(End::Unanswered(Failure::UpstreamReset));
    attempt.bound = binds(request);
    attempt.sent_at = Some(Instant::now());
    let moved = Moved::default();
    let mut clean = false;
    let mut granted = None;
    {
        let ends_with_head = matches!(sink, UpSink::Http2(_)) && exchange::is_bodiless(request);
        let mut up = sink.sink(request);
        let mut upload = pin!(body.send(&mut up, &moved, !request.upgrade));
        let mut uploaded = None;
        let heard = {
            let (mut seen, mut has_waited) = (0, false);
            let mut sending = pin!(poll_fn(|cx| {
                let polled = upload.as_mut().poll(cx);
                let is_late_end = has_waited && polled.is_ready();
                if seen != moved.up.get() || is_late_end {
                    seen = moved.up.get();
                    attempt.sent_at = Some(Instant::now());
                }
                has_waited |= polled.is_pending();
                polled
            }));
            await_head(request, sending.as_mut(), &mut uploaded, &mut source, answer, policy).await
        };
        // The answer itself may take for ever, and says that the connection was accepted.
        drop(waiting);
        let upload = async {
            match uploaded {
                // Its head was its end, and its stream may have ended since.
                _ if ends_with_head => Ok(()),
                Some(done) => done,
                None => upload.await,
            }
        };
        match heard {
            Err(end) => attempt.end = end,
            Ok(Heard { mut head, report, tunnel: true, .. }) => {
                attempt.heard(&head, report);
                complete(&mut head, edits.as_deref(), set_cookie.as_ref());
                match upload.await {
                    Ok(()) => granted = Some(head),
                    Err(PumpError::SinkGone) => attempt.end = End::Final(Failure::UpstreamReset),
                    Err(error) => attempt.end = End::Client(error.of_client()),
                }
            }
            Ok(mut heard) => {
                attempt.heard(&heard.head, heard.report);
                let whole = RequestBody::is_replayable_after(moved.up.get());
                if policy.refuses.is_some_and(|refuses| whole && refuses(&heard.head, &heard.report)) {
                    attempt.end = End::Refused(heard.head.status());
                } else {
                    complete(&mut heard.head, edits.as_deref(), set_cookie.as_ref());
                    let has_length = matches!(heard.head.framing, Framing::Length(_));
                    moved.down.is_timed.set(policy.compared && has_length);
                    let way = Passage { request, moved: &moved, idle: policy.idle };
                    clean = deliver(&way, heard, upload, &mut source, answer, &mut attempt).await;
                }
            }
        }
    }
    attempt.bytes = (moved.up.get(), moved.down.bytes.get());
    attempt.is_unanswered = moved.down.is_unanswered.get();
    if let Some(head) = granted {
        // Few requests become tunnels: theirs is not a part of every request's future.
        let is_connect = request.is_connect();
        let terms = Terms { screens: policy.refuses_claims && is_connect, is_connect, idle: policy.idle };
        Box::pin(upgraded(&head, body, (sink, source), answer, terms, &mut attempt)).await;
        return attempt;
    }
    // A request that was not sent to its end leaves a server that waits for the rest: never reused.
    clean &= matches!(attempt.end, End::Delivered(Ok(_))) && body.is_ended();
    attempt.client_reusable &= body.is_ended();
    // A server that has declined a tunnel is not trusted with another client's request either.
    if clean && !request.upgrade {
        attempt.idle = idle(sink, source);
    } else if clean && let UpSink::Mesh(sender) = &sink {
        // Of a tunnel that was declined the request's end has not been sent.
        sender.end();
    }
    attempt
}

/// Does to the head of the answer what the route says.
fn complete(head: &mut Head, edits: Option<&ResponseEdits>, set_cookie: Option<&Bytes>) {
    if let Some(edits) = edits {
        edits.apply(head);
    }
    if let Some(cookie) = set_cookie
        && !is_shared(head)
    {
        head.push("set-cookie", cookie.clone());
    }
}

/// Whether a cache may keep this answer for everybody (RFC 9111 §5.2.2). A user's cookie in it would make one user of all.
fn is_shared(head: &Head) -> bool {
    let lines = head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case(b"cache-control"));
    let mut directives = lines.flat_map(|(_, value)| value.split(|byte| *byte == b','));
    directives.any(|directive| {
        let name = directive.split(|byte| *byte == b'=').next().unwrap_or_default().trim_ascii();
        name.eq_ignore_ascii_case(b"public") || name.eq_ignore_ascii_case(b"s-maxage")
    })
}

impl Attempt {
    /// An attempt that ended like this, and of which nothing else was seen.
    pub fn of(end: End) -> Self {
        Self {
            end,
            sent_at: None,
            head_at: None,
            status: None,
            grpc_status: None,
            report: Report::default(),
            pace: Pace::InTime,
            is_unanswered: false,
            bytes: (0, 0),
            idle: None,
            bound: false,
            client_reusable: false,
        }
    }

    /// The head of the answer has arrived.
    fn heard(&mut self, head: &Head, report: Report) {
        self.report = report;
        self.end = End::Delivered(Ok(head.status()));
        self.head_at = Some(Instant::now());
        self.status = Some(head.status());
        self.grpc_status = grpc_status(&head.headers);
        self.bound |= matches!(head.status(), 401 | 407) && binds(head);
    }
}

/// The head of an answer.
struct Heard {
    head: Head,
    report: Report,
    /// There is nothing behind it.
    end: bool,
    /// It has come before the whole request was sent, and says that the rest is not wanted.
    early: bool,
    /// A tunnel is behind it.
    tunnel: bool,
}

/// Waits for the answer's head while the request is sent. A client that goes away ends the wait: nobody is left
/// to answer. So does the deadline, and nothing is lost by it: the caller still has everything that was sent.
async fn await_head(
    request: &Head,
    mut upload: Pin<&mut impl Future<Output = Result<(), PumpError>>>,
    uploaded: &mut Option<Result<(), PumpError>>,
    source: &mut UpSource,
    answer: &mut Answer<'_>,
    policy: &AttemptPolicy<'_>,
) -> Result<Heard, End> {
    let (expires, overdue) = policy.expiry();
    let mut expired = pin!(until(expires));
    // Whether the client sends its body unasked, or has been asked for it.
    let mut wanted = !request.expects_continue;
    loop {
        tokio::select! {
            biased;
            result = upload.as_mut(), if uploaded.is_none() => {
                *uploaded = Some(result);
                // A server that is gone may have answered before.
                if let Err(error) = result && error.is_of_client() {
                    return Err(End::Client(error.of_client()));
                }
            }
            arrived = source.head(request) => {
                let Arrived { head, end, report } = arrived?;
                if !matches!(head.status(), 100 | 102..200) {
                    if may_leave_body(request, head.status(), wanted) {
                        source.retire();
                    }
                    let opens_tunnel = head.opens_tunnel(request);
                    return match opens_tunnel {
                        Ok(tunnel) => {
                            let early = uploaded.is_none() && (!wanted || head.status() >= 300);
                            Ok(Heard { head, report, end, early, tunnel })
                        }
                        Err(error) => Err(End::Final(Failure::UpstreamBadResponse(error.0))),
                    };
                }
                // An interim answer; the final one follows.
                wanted |= head.status() == 100;
                if !request.http10 && answer.interim(&head).await.is_err() {
                    return Err(End::Client(Failure::ClientGone));
                }
            }
            () = answer.gone() => return Err(End::Client(Failure::ClientGaveUp)),
            () = expired.as_mut() => return Err(End::Final(overdue)),
        }
    }
}

/// Whether an HTTP/1 server may take the body that it gets for its next request: it has answered without asking for a body
/// that it was expected to ask for, or refuses another expectation, and has perhaps read none (RFC 9110 §10.1.1).
fn may_leave_body(request: &Head, status: u16, wanted: bool) -> bool {
    let refuses = status >= 300 && request.header("expect").is_some();
    (refuses || !wanted) && !exchange::is_bodiless(request) && !binds(request)
}

/// Resolves at this time; `None`: never.
pub(crate) async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

/// What the delivery of an answer is about.
struct Passage<'a> {
    request: &'a Head,
    moved: &'a Moved,
    /// How long nothing may move.
    idle: Option<Duration>,
}

/// Passes the answer on to the client, and returns whether everything ended cleanly, the upload too.
async fn deliver(
    way: &Passage<'_>,
    heard: Heard,
    upload: impl Future<Output = Result<(), PumpError>>,
    source: &mut UpSource,
    answer: &mut Answer<'_>,
    attempt: &mut Attempt,
) -> bool {
    let Heard { mut head, end, early, .. } = heard;
    let Passage { request, moved, idle } = *way;
    match end {
        false => answer.reframe(&mut head, request),
        true => answer.close_frame(&mut head, request),
    }
    // After an early answer nobody can say whether the client's next bytes are the rest of the body or another
    // request (RFC 9110 §10.1.1): the client is told that there is no next request.
    // A server that closes its connection closes the client's: some clients read until then.
    let closes = !head.keep_alive && !head.upgrade;
    let keep = request.keep_alive && head.framing != Framing::UntilClose && !early && !closes;
    let bodiless = end || head.framing == Framing::None;
    match answer.head_with(&head, bodiless, !keep) {
        Ok(()) => {}
        Err(PumpError::SinkGone) => {
            attempt.end = End::Delivered(Err(Failure::ClientGone));
            return false;
        }
        // Nothing went to the client.
        Err(_) => {
            attempt.end =
                End::Final(Failure::UpstreamBadResponse("a head that the client's protocol cannot carry"));
            return false;
        }
    }
    let mut upload = pin!(upload);
    let download = download(&head, bodiless, source, answer, &moved.down);
    let ended = tokio::select! {
        biased;
        ended = finish(upload.as_mut(), download, attempt) => ended,
        () = stalled(idle, || moved.up.get().wrapping_add(moved.down.bytes.get())) => {
            attempt.end = End::Delivered(Err(Failure::IdleTimeout));
            Finished::Broken
        }
    };
    let mut reset = None;
    let clean = match ended {
        Finished::Clean => true,
        Finished::Broken => false,
        Finished::Reset(code) => {
            reset = Some(code);
            false
        }
        Finished::Uploading => match upload.as_mut().now_or_never() {
            Some(uploaded) => uploaded.is_ok(),
            // What the client still sends has nobody to read it.
            None if early => false,
            // Few answers come before their requests have ended: not a part of every request's future. A server that does
            // not read the rest as a body would take it for requests: nobody else's answer may come from there.
            None => {
                source.retire();
                Box::pin(rest_of_upload(way, upload, source, answer)).await
            }
        },
    };
    attempt.client_reusable = clean && keep;
    if matches!(attempt.end, End::Delivered(Err(_))) {
        attempt.pace = Pace::of(head.framing, &moved.down);
        Box::pin(answer.abort(&head, reset)).await;
    }
    clean
}

/// How request and answer stand when the answer has ended.
#[derive(Clone, Copy)]
enum Finished {
    /// Both ended cleanly.
    Clean,
    /// One of them broke off.
    Broken,
    /// The server reset its HTTP/2 stream with this error code (RFC 9113 §7).
    Reset(u8),
    /// The answer is complete, and the request is still being sent.
    Uploading,
}

/// Upload and download together, until the answer has ended.
async fn finish(
    upload: Pin<&mut impl Future<Output = Result<(), PumpError>>>,
    download: impl Future<Output = Result<Option<u16>, PumpError>>,
    attempt: &mut Attempt,
) -> Finished {
    let download = pin!(download);
    let (downloaded, finished) = match select(upload, download).await {
        Either::Left((Err(error), _)) if error.is_of_client() => {
            // The server would wait for the rest for ever.
            attempt.end = End::Delivered(Err(error.of_client()));
            return Finished::Broken;
        }
        Either::Left((Ok(()), download)) => (download.await, Finished::Clean),
        Either::Left((Err(_), download)) => (download.await, Finished::Broken),
        Either::Right((downloaded, _)) => (downloaded, Finished::Uploading),
    };
    let failure = match downloaded {
        Ok(grpc) => {
            attempt.grpc_status = grpc.or(attempt.grpc_status);
            return finished;
        }
        Err(PumpError::SinkGone) => Failure::ClientGone,
        // A rule that came meanwhile: it says nothing of the server.
        Err(PumpError::SourceReset(Code::Denied)) => Failure::PolicyDenied,
        Err(PumpError::SourceMalformed(why) | PumpError::SinkRefused(why)) => {
            Failure::UpstreamBadResponse(why)
        }
        Err(PumpError::SourceGone | PumpError::SourceReset(_)) => Failure::UpstreamReset,
    };
    attempt.end = End::Delivered(Err(failure));
    match downloaded {
        Err(PumpError::SourceReset(Code::Http2(code))) => Finished::Reset(code),
        _ => Finished::Broken,
    }
}

/// Sends what the client still has to send behind a complete answer that wants it: whether the server has got all of
/// it. As without a mesh the server decides for how long it reads on, and ends the upload by closing its connection or
/// resetting its stream. However that ends, the client has its answer.
async fn rest_of_upload(
    way: &Passage<'_>,
    upload: Pin<&mut impl Future<Output = Result<(), PumpError>>>,
    source: &mut UpSource,
    answer: &mut Answer<'_>,
) -> bool {
    let Passage { moved, idle, .. } = *way;
    moved.answered.set(true);
    tokio::select! {
        biased;
        uploaded = upload => uploaded.is_ok(),
        () = source.closed() => false,
        // A server that takes nothing at the moment would keep the client from being read, and missed.
        () = answer.gone() => false,
        () = stalled(idle, || moved.up.get()) => false,
    }
}

async fn download(
    head: &Head,
    bodiless: bool,
    source: &mut UpSource,
    answer: &mut Answer<'_>,
    progress: &Progress,
) -> Result<Option<u16>, PumpError> {
    if bodiless {
        answer.flush().await?;
        return Ok(None);
    }
    let from = source.body();
    let mut grpc = None;
    let to = answer.sink(head)?;
    message::deliver(from, to, progress, |trailers| grpc = grpc_status(trailers)).await?;
    Ok(grpc)
}

/// Whether a head belongs to an authentication that holds for a connection instead of a request (NTLM, and Negotiate as
/// many servers implement it; RFC 4559 §6).
fn binds(head: &Head) -> bool {
    const FIELDS: [&str; 4] =
        ["authorization", "www-authenticate", "proxy-authorization", "proxy-authenticate"];
    let begins = |value: &[u8], scheme: &[u8]| {
        value.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    head.headers.iter().any(|(name, value)| {
        (begins(value, b"NTLM") || begins(value, b"Negotiate"))
            && FIELDS.iter().any(|field| name.eq_ignore_ascii_case(field.as_bytes()))
    })
}

/// The `grpc-status` among these lines.
pub(crate) fn grpc_status(lines: &[(Bytes, Bytes)]) -> Option<u16> {
    let (_, value) = lines.iter().find(|(name, _)| name.eq_ignore_ascii_case(b"grpc-status"))?;
    std::str::from_utf8(value).ok()?.trim().parse().ok()
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
