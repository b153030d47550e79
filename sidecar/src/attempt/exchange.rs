//! The server's side of an exchange: another sidecar, an HTTP/1 or an HTTP/2 server.

use std::cell::Cell;
use std::future::pending;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;
use tulle_mesh::reason::Reason;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::Fields;

use super::End;
use crate::app_waiting::Guard;
use crate::error::Failure;
use crate::grpc;
use crate::http1::conn::Reset;
use crate::http1::{Framing, Head, Reader, Start, Writer};
use crate::http2::{self, Answered, RecvStream, SendStream, Unanswered};
use crate::message::{Sink, Source};
use crate::pool::{Place, Server};
use crate::wire::{Event, Receiver, Sender};
use crate::worker::Worker;

/// A request under way to a server.
pub struct Exchange {
    /// Where the request goes.
    pub sink: UpSink,
    /// Where the answer comes from.
    pub source: UpSource,
    /// The connection had been open for a while: it may have been closed meanwhile.
    pub reused: bool,
    /// It is one that its server has just used: see [`Taken::in_use`](crate::pool::Taken::in_use).
    pub in_use: bool,
    /// The place on a connection that several requests share.
    pub place: Option<Place>,
    /// Held until the server answers: it may not have accepted the connection.
    pub waiting: Option<Guard>,
}

/// What the sidecar of an endpoint reports of its pod with an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests in flight there, of all clients together.
    pub load: Option<u32>,
    /// Microseconds that its application takes for the head of an answer, on average.
    pub latency_us: Option<u32>,
    /// The request was refused for load, and the application has not seen it.
    pub shed: bool,
    /// Why that sidecar answered itself; `None`: the application answered.
    pub reason: Option<Reason>,
    /// Attempts at the application that it broke off before this answer.
    pub broken: u8,
}

/// A head that has arrived from a server.
pub(super) struct Arrived {
    pub(super) head: Head,
    /// There is nothing behind it.
    pub(super) end: bool,
    pub(super) report: Report,
}

impl Arrived {
    /// From a server that reports nothing.
    fn of(head: Head, end: bool) -> Self {
        Self { head, end, report: Report::default() }
    }
}

/// Where a request goes.
pub enum UpSink {
    /// To another sidecar.
    Mesh(Sender),
    /// To an HTTP/1 server.
    Http1(Writer),
    /// To an HTTP/2 server.
    Http2(SendStream),
}

/// Where an answer comes from.
pub enum UpSource {
    /// From another sidecar.
    Mesh(Receiver),
    /// From an HTTP/1 server.
    Http1(Reader),
    /// From an HTTP/2 server.
    Http2(RecvStream),
}

/// An exchange on a connection to an HTTP/1 server. The head is buffered, and goes out with what follows it.
/// `reused`: see [`Exchange::reused`].
pub fn http1_exchange(reader: Reader, mut writer: Writer, head: &Head, reused: bool) -> Exchange {
    writer.head(head, false);
    Exchange {
        sink: UpSink::Http1(writer),
        source: UpSource::Http1(reader),
        reused,
        in_use: false,
        place: None,
        waiting: None,
    }
}

/// An exchange on a connection to an HTTP/2 server, which is opened within `limit` if there is none. `grpc_deadline`:
/// what its `grpc-timeout` has to say, when it is sent; `None`: what it says. `waits`: see
/// [`Http2Pool::ready`](crate::pool::Http2Pool::ready).
///
/// # Errors
/// [`Failure`] of connecting, or [`Failure::ClientBadRequest`] for a head that HTTP/2 cannot carry; nothing was
/// sent.
pub async fn http2_exchange(
    worker: &Worker,
    server: Server,
    head: &Head,
    limit: Duration,
    grpc_deadline: Option<Instant>,
    waits: &Cell<bool>,
) -> Result<Exchange, Failure> {
    http2::check_request(head)?;
    let (place, reused) = worker.http2.ready(server, limit, waits).await?;
    let timeout = grpc_deadline
        .and_then(|deadline| grpc::renewed_timeout(head.header(grpc::TIMEOUT)?.as_ref(), deadline));
    let opened = place.open(head, is_bodiless(head), timeout.as_ref().map(AsRef::as_ref));
    let (body, answer) = opened.ok_or(Failure::UpstreamConnect)?;
    Ok(Exchange {
        sink: UpSink::Http2(body),
        source: UpSource::Http2(answer),
        reused,
        // A server closes an idle one with GOAWAY.
        in_use: true,
        place: Some(place),
        waiting: None,
    })
}

/// Whether nothing follows the head of a request.
pub(super) fn is_bodiless(head: &Head) -> bool {
    matches!(head.framing, Framing::None | Framing::Length(0)) && !head.upgrade
}

impl UpSink {
    /// As a sink of the body of a request with this head.
    pub(super) fn sink(&mut self, head: &Head) -> Sink<'_> {
        match self {
            Self::Mesh(sender) => Sink::Mesh(sender),
            Self::Http1(writer) => Sink::Http1(writer),
            Self::Http2(stream) => Sink::Http2(stream, http2::Length::of(head)),
        }
    }

    /// As a sink of the bytes of a tunnel that was granted with this head.
    pub(super) fn unframed(&mut self, head: &Head) -> Sink<'_> {
        if let Self::Http1(writer) = self {
            writer.unframe();
        }
        self.sink(head)
    }
}

impl UpSource {
    /// The next head of an answer to this request, interim or final. May be given up and begun again.
    pub(super) async fn head(&mut self, request: &Head) -> Result<Arrived, End> {
        let method = match &request.start {
            Start::Request { method, .. } => &method[..],
            Start::Response { .. } => b"",
        };
        match self {
            Self::Http1(reader) => match reader.response(method).await {
                Ok(head) => Ok(Arrived::of(head, false)),
                Err(failure @ Failure::UpstreamReset) => Err(match reader.was_reset().await {
                    Some(Reset::BehindEnd) => End::Unread(failure),
                    Some(Reset::AtOnce) => End::Reset(failure),
                    None => End::Unanswered(failure),
                }),
                Err(failure) => Err(End::Final(failure)),
            },
            Self::Mesh(receiver) => mesh_head(receiver, method).await,
            Self::Http2(stream) => http2_head(stream, method).await,
        }
    }

    /// Resolves when an HTTP/1 server has closed its connection, or sends something behind its answer, which has been
    /// read to its end. For a stream it never does: there the request's sink says so.
    pub(super) async fn closed(&mut self) {
        let Self::Http1(reader) = self else { return pending().await };
        // What was read last may have left the socket marked as readable.
        while reader.is_quiet() {
            reader.stirred().await;
        }
    }

    /// An HTTP/1 server's connection carries no other request.
    pub(super) fn retire(&mut self) {
        if let Self::Http1(reader) = self {
            reader.retire();
        }
    }

    /// The answer's body.
    pub(super) fn body(&mut self) -> Source<'_> {
        match self {
            Self::Http1(reader) => Source::Http1(reader),
            Self::Mesh(receiver) => Source::Mesh(receiver),
            Self::Http2(stream) => Source::Http2(stream),
        }
    }
}

/// As [`Head::write`] writes it; older sidecars write it in lower case.
const CLOSES: &[u8] = b"\r\nConnection: close\r\n";

async fn mesh_head(receiver: &mut Receiver, method: &[u8]) -> Result<Arrived, End> {
    match receiver.next().await {
        Event::Head(block) => {
            // Of a head without a length nothing else says whether the server's connection goes on.
            let closes = receiver.has_end()
                && block.windows(CLOSES.len()).any(|bytes| bytes.eq_ignore_ascii_case(CLOSES));
            let (mut head, report) = parse(block, method).map_err(End::Final)?;
            if matches!(head.status(), 100 | 102..200) {
                receiver.was_interim();
            }
            // After an upgrade the end is that of the tunnel.
            let end = !head.upgrade && receiver.take_end();
            // No length: gRPC would take it for a trailer of its server's. An HTTP/1 client gets one, see `close_frame`.
            if end && matches!(head.framing, Framing::UntilClose | Framing::Chunked) {
                head.keep_alive = !closes;
                head.framing = Framing::None;
            }
            if end && matches!(head.framing, Framing::Length(1..)) {
                // The client would take the next answer for its body.
                return Err(End::Final(Failure::UpstreamBadResponse("a head whose body is missing")));
            }
            Ok(Arrived { head, end, report })
        }
        Event::Reset(Code::NotProcessed) => Err(End::NotProcessed(Failure::UpstreamNotProcessed)),
        Event::Reset(Code::Denied) => Err(End::Final(Failure::PolicyDenied)),
        Event::Reset(Code::BadHead) => {
            Err(End::Client(Failure::ClientBadRequest("refused by the server's sidecar")))
        }
        // Cancel: the server's sidecar has taken this one for gone, and not the application has failed.
        Event::Lost | Event::Reset(Code::Cancel) => Err(End::Unanswered(Failure::UpstreamLost)),
        Event::Reset(_) => Err(End::Unanswered(Failure::UpstreamReset)),
        _ => Err(End::Final(Failure::UpstreamBadResponse("a body without a head"))),
    }
}

fn parse(mut block: Bytes, method: &[u8]) -> Result<(Head, Report), Failure> {
    const UNREADABLE: Failure =
        Failure::UpstreamBadResponse("a head that cannot be read, from the server's sidecar");
    let Fields { load, latency_us, shed, reason, broken, .. } =
        Fields::decode(&mut block).map_err(|_| UNREADABLE)?;
    // Earlier sidecars say no more than that they shed load.
    let reason = reason.or(shed.then_some(Reason::OursOverloaded));
    let mut text = BytesMut::from(block);
    match crate::http1::head::parse_response(&mut text, method) {
        Ok(Some(head)) => Ok((head, Report { load, latency_us, shed, reason, broken })),
        _ => Err(UNREADABLE),
    }
}

async fn http2_head(stream: &mut RecvStream, method: &[u8]) -> Result<Arrived, End> {
    match stream.answer().await {
        Ok(Answered::Interim(head)) => Ok(Arrived::of(head, false)),
        Ok(Answered::Final(block, end)) => {
            let head = http2::response_head(method, *block, end).map_err(End::Final)?;
            Ok(Arrived::of(head, end))
        }
        Err(Unanswered::Unprocessed) => Err(End::NotProcessed(Failure::UpstreamNotProcessed)),
        Err(Unanswered::Lost) => Err(End::Unanswered(Failure::UpstreamReset)),
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncWriteExt as _;
    use tokio::task::{LocalSet, spawn_local};

    use super::super::tests::{ANY, client, read_until, server};
    use super::*;
    use crate::attempt::run;
    use crate::call::Call;
    use crate::wire::{Connection, Role, drive};

    #[tokio::test]
    async fn a_server_that_may_take_the_body_for_a_request_gets_no_other_request() {
        const ASKS: &str = "Expect: 100-continue\r\n";
        const OTHER: &str = "Expect: 200-ok\r\n";
        for (lines, interim, status, kept) in [
            ("", "", "404 Not Found", true),
            (ASKS, "HTTP/1.1 100 Continue\r\n\r\n", "404 Not Found", true),
            (ASKS, "", "404 Not Found", false),
            (ASKS, "", "200 OK", false),
            (OTHER, "", "417 Expectation Failed", false),
            (OTHER, "", "200 OK", true),
            ("Expect: 100-continue\r\nAuthorization: NTLM x\r\n", "", "401 Unauthorized", true),
        ] {
            let sent = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n{lines}\r\nhello");
            let (_asking, mut reader, mut writer, head) = client(sent.as_bytes()).await;
            let mut call = Call::http1(head, &mut reader, &mut writer);
            let (mut far, exchange) = server(&call).await;
            let talks = async {
                read_until(&mut far, b"hello").await;
                let answer = format!("{interim}HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nok");
                far.write_all(answer.as_bytes()).await.unwrap();
            };
            let (attempt, ()) = tokio::join!(run(&mut call, exchange, &ANY), talks);
            assert!(attempt.client_reusable, "{lines}{status}");
            assert_eq!(attempt.idle.is_some(), kept, "{lines}{status}");
        }
    }

    fn block(text: &str) -> Bytes {
        let mut block = BytesMut::new();
        Fields::default().encode(&mut block);
        block.extend_from_slice(text.as_bytes());
        block.freeze()
    }

    #[test]
    fn a_sidecars_answer_is_read_as_strictly_as_a_servers() {
        let (head, report) = parse(block("HTTP/1.1 204 No Content\r\nx: y\r\n\r\n"), b"GET").unwrap();
        assert_eq!((head.status(), head.framing, report), (204, Framing::None, Report::default()));
        for bad in ["HTTP/1.1 200 OK\nx: y\n\n", "HTTP/1.1 200 OK\r\nx: y\r\n", ""] {
            let failure = parse(block(bad), b"GET").unwrap_err();
            assert!(matches!(failure, Failure::UpstreamBadResponse(_)), "{bad:?}");
        }
        assert!(parse(Bytes::new(), b"GET").is_err(), "not even its fields have an end");
    }

    #[tokio::test]
    async fn a_stream_that_its_server_takes_for_gone_is_lost_and_not_failed() {
        let test = async {
            let (near, far) = tokio::io::duplex(1 << 16);
            let (client, server) = (Connection::new(Role::Client), Connection::new(Role::Server));
            spawn_local(drive(client.clone(), near));
            spawn_local(drive(server.clone(), far));
            for (code, failure) in
                [(Code::Cancel, Failure::UpstreamLost), (Code::UpstreamFailed, Failure::UpstreamReset)]
            {
                let (_sender, mut receiver) = client.open(b"", true).unwrap();
                let (_, answer, _request) = poll_fn(|cx| server.poll_accept(cx)).await.unwrap();
                answer.reset(code);
                match mesh_head(&mut receiver, b"GET").await {
                    Err(End::Unanswered(seen)) => assert_eq!(seen, failure),
                    _ => panic!("{code:?}"),
                }
            }
        };
        LocalSet::new().run_until(test).await;
    }

    #[test]
    fn what_a_sidecar_reports_of_its_pod_is_read_with_the_answer() {
        let mut block = BytesMut::new();
        let fields =
            Fields { load: Some(7), latency_us: Some(1_500), shed: true, broken: 2, ..Fields::default() };
        fields.encode(&mut block);
        block.extend_from_slice(b"HTTP/1.1 503 Service Unavailable\r\n\r\n");
        let (_, report) = parse(block.freeze(), b"GET").unwrap();
        let reason = Some(Reason::OursOverloaded);
        assert_eq!(report, Report { load: Some(7), latency_us: Some(1_500), shed: true, reason, broken: 2 });
    }

    #[test]
    fn only_the_servers_sidecar_says_why_it_answered_itself() {
        let text = "HTTP/1.1 403 Forbidden\r\ntulle-reason: PolicyDenied\r\n\r\n";
        let (_, report) = parse(block(text), b"GET").unwrap();
        assert_eq!(report.reason, None, "an application writes what it likes behind the fields");
        let mut marked = BytesMut::new();
        Fields { reason: Some(Reason::PolicyDenied), ..Fields::default() }.encode(&mut marked);
        marked.extend_from_slice(text.as_bytes());
        let (head, report) = parse(marked.freeze(), b"GET").unwrap();
        assert_eq!((head.status(), report.reason, report.shed), (403, Some(Reason::PolicyDenied), false));
    }
}
