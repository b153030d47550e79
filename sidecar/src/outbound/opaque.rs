//! Connections whose content is not looked at, each to one endpoint. Where a port has rules about the names of TLS
//! servers, the name in the client's first message says to whose.

use std::cell::Cell;
use std::future::pending;
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::{Instant, sleep, timeout_at};
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::Fields;

use super::sni::{self, Hello};
use super::{ANEW, MAX_ENDPOINTS, count, observe, patience, reset_on_close, unserved};
use crate::attempt::{Exchange, Joined, http1_exchange, join, proxy_tcp};
use crate::backend::{Ask, Backend, InFlight, Upstream, Verdict};
use crate::claim::set_client_id;
use crate::error::{Failure, PumpError};
use crate::http1::conn::split;
use crate::http1::{Head, Reader, Writer};
use crate::io::unless_reset;
use crate::message::{Sink, Source, pump};
use crate::pool::{self, Server};
use crate::route::{Connection, Port, RouteTarget};
use crate::telemetry::Limited;
use crate::telemetry::attempts::{Attempts, Seen, evidence_of, evidence_of_connection, evidence_of_silence};
use crate::wire::{Event, Receiver, Sender};
use crate::worker::Worker;

/// A server that is down fails every connection: its failures are logged this often in a second.
static FAILURES: Limited = Limited::new(10);

/// How long the rest of a ClientHello may take. Servers wait for the whole handshake for 10 s to a minute.
const HELLO_COMES_WITHIN: Duration = Duration::from_secs(10);

/// How long a connection goes on behind its server's first word until it counts as served. A server that answers with an
/// error and breaks off does it sooner, and a connection that has lasted longer may be reset when its pod ends.
pub(super) const PROVES_ITSELF: Duration = Duration::from_secs(10);

/// A connection that is open to an endpoint.
pub(super) struct Opened {
    backend: Rc<Backend>,
    upstream: Rc<Upstream>,
    transport: Transport,
    /// Where the attempt is counted: see [`Held`].
    evidence: Option<Arc<Attempts>>,
    /// Counts the connection as under way. What it lasts says nothing of the endpoint's latency.
    in_flight: InFlight,
}

/// Why no endpoint took a connection.
#[derive(Debug)]
pub(super) struct Unopened {
    pub(super) failure: Failure,
    /// Whether the endpoint that was tried last has a sidecar; if none was tried, whether any has.
    pub(super) is_meshed: bool,
}

impl From<Unopened> for Failure {
    fn from(unopened: Unopened) -> Self {
        unopened.failure
    }
}

enum Transport {
    /// Through the endpoint's sidecar, and what has arrived already.
    Mesh(Sender, Receiver, Option<Event>),
    /// To the endpoint itself, what has been read already, and whether reading has failed. Linux reports the error of
    /// a connection once: whoever reads next would find a proper end.
    Plain(TcpStream, BytesMut, bool),
}

/// What a server has said before its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// A greeting: its clients wait for it.
    Opaque,
    /// The first frame of an HTTP/2 server, which waits for nobody (RFC 9113 §3.4): not a greeting.
    Settings,
    /// It ended, or it is an HTTP server that has waited for long enough (408): not a greeting.
    None,
}

impl Greeting {
    fn of(bytes: &[u8]) -> Self {
        match bytes {
            [] => Self::None,
            // The length is that of whole settings, six bytes each; the stream is 0.
            [0, 0, length, 4, 0, 0, 0, 0, 0, ..] if length % 6 == 0 => Self::Settings,
            _ if bytes.starts_with(b"HTTP/") || b"HTTP/".starts_with(bytes) => Self::None,
            _ => Self::Opaque,
        }
    }
}

/// The evidence of a connection under a Canary, held back until it is known how it goes on.
pub(super) struct Held(Rc<Pending>);

struct Pending {
    /// `None`: it was counted.
    attempts: Cell<Option<Arc<Attempts>>>,
    /// Counts what has lasted. A client may open thousands of connections in that time, so it ends with its connection.
    timer: Cell<Option<AbortHandle>>,
}

impl Held {
    pub(super) fn new(attempts: Arc<Attempts>) -> Self {
        Self(Rc::new(Pending { attempts: Cell::new(Some(attempts)), timer: Cell::new(None) }))
    }

    /// The server has sent its first word: the connection has served, unless something else is seen soon.
    pub(super) fn heard(&self) {
        let held = Rc::clone(&self.0);
        let timer = spawn_local(async move {
            sleep(PROVES_ITSELF).await;
            if let Some(attempts) = held.attempts.take() {
                attempts.count(Seen::Good, None);
            }
        });
        self.0.timer.set(Some(timer.abort_handle()));
    }

    /// The connection has ended, and its end says this.
    pub(super) fn ended(&self, seen: Option<Seen>) {
        if let Some(seen) = seen
            && let Some(attempts) = self.0.attempts.take()
        {
            attempts.count(seen, None);
            if let Some(timer) = self.0.timer.take() {
                timer.abort();
            }
        }
    }
}

/// Opens a connection to an endpoint.
///
/// # Errors
/// That of the last endpoint that was tried, or [`Failure::ClientGaveUp`] when the client has `left` first. Each
/// is evidence, but the connection is not counted as failed: the client may turn out to speak HTTP.
pub(super) async fn open(
    worker: &Worker,
    backend: &Rc<Backend>,
    left: impl Future<Output = ()>,
) -> Result<Opened, Unopened> {
    let mut left = pin!(left);
    let mut ask = Ask::default();
    let mut anew = ANEW.iter();
    let mut last = Failure::UpstreamNone;
    let mut is_meshed = None;
    let mut next = backend.pick(&ask);
    let mut again = false;
    while let Some(upstream) = next.take() {
        // Nothing that is said here is copied: beside copies it would be compared with nothing.
        let evidence = upstream.attempts(&worker.telemetry).filter(|_| !backend.compares_copies());
        let in_flight = upstream.begin();
        is_meshed = Some(upstream.is_meshed());
        let waits = Cell::new(false);
        let connected = tokio::select! {
            biased;
            connected = connect(worker, backend, &upstream, &waits) => connected,
            () = left.as_mut() => {
                // The endpoint has not been reached in that time.
                count(evidence.as_ref(), backend, &upstream, Some(Seen::Unreached), None);
                return Err(Unopened { failure: Failure::ClientGaveUp, is_meshed: upstream.is_meshed() });
            }
        };
        last = match connected {
            Ok(transport) => {
                let backend = Rc::clone(backend);
                return Ok(Opened { backend, upstream, transport, evidence, in_flight });
            }
            Err(failure) => failure,
        };
        let seen = evidence_of(Err(&last), None, false);
        count(evidence.as_ref(), backend, &upstream, seen, None);
        let verdict = verdict(seen).waited(waits.get());
        // Which rule takes it is known when the client has spoken.
        observe(worker, backend, &upstream, "opaque", None, (in_flight.since(), Instant::now()), verdict);
        if matches!(last, Failure::PolicyDenied | Failure::OursNoCertificate) {
            break;
        }
        upstream.avoid();
        if !again {
            ask.tried.push(upstream.endpoint.address);
        }
        next = if ask.tried.len() < MAX_ENDPOINTS { backend.pick(&ask) } else { None };
        // The last endpoint that is left: its application may be back in a moment.
        if next.is_none()
            && last == Failure::UpstreamNotProcessed
            && let Some(wait) = anew.next()
        {
            sleep(*wait).await;
            again = true;
            next = Some(upstream);
        }
    }
    Err(Unopened { failure: last, is_meshed: is_meshed.unwrap_or_else(|| backend.is_meshed()) })
}

async fn connect(
    worker: &Worker,
    backend: &Backend,
    upstream: &Upstream,
    waits: &Cell<bool>,
) -> Result<Transport, Failure> {
    let address = upstream.endpoint.address;
    let limit = patience(backend, upstream);
    let Some(identity) = upstream.endpoint.identity.as_ref().filter(|_| !worker.is_own(address)) else {
        return pool::connect(Server::from(address), limit)
            .await
            .map(|stream| Transport::Plain(stream, BytesMut::new(), false));
    };
    let block = || {
        let mut block = BytesMut::with_capacity(128);
        Fields { service: backend.service(), ..Fields::default() }.encode(&mut block);
        block
    };
    let (sender, mut receiver) = worker.mesh.open(address, identity, block, false, limit, waits).await?;
    // The server's sidecar says when it has reached the application: nothing is sent before, so that a connection
    // to an endpoint that has gone can go elsewhere whole.
    match receiver.next().await {
        Event::Head(_) => Ok(Transport::Mesh(sender, receiver, None)),
        Event::Reset(Code::Denied) => Err(Failure::PolicyDenied),
        Event::Reset(Code::NotProcessed) => Err(Failure::UpstreamNotProcessed),
        Event::Lost => Err(Failure::UpstreamLost),
        _ => Err(Failure::UpstreamReset),
    }
}

impl Opened {
    /// Whether it was opened to an endpoint of this backend.
    pub(super) fn is_to(&self, backend: &Rc<Backend>) -> bool {
        Rc::ptr_eq(&self.backend, backend)
    }

    /// Resolves when the server speaks, or ends. What it says is kept.
    pub(super) async fn answered(&mut self) {
        match &mut self.transport {
            Transport::Mesh(_, receiver, first) => *first = Some(receiver.next().await),
            Transport::Plain(stream, read, broke_off) => {
                while stream.readable().await.is_ok() {
                    read.reserve(1024);
                    match stream.try_read_buf(read) {
                        Ok(_) => return,
                        // There was nothing after all.
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(_) => {
                            *broke_off = true;
                            return;
                        }
                    }
                }
            }
        }
    }

    /// What the server has said.
    pub(super) fn greeting(&self) -> Greeting {
        match &self.transport {
            Transport::Mesh(_, _, Some(Event::Data(bytes))) => Greeting::of(bytes),
            Transport::Mesh(..) => Greeting::None,
            Transport::Plain(_, read, _) => Greeting::of(read),
        }
    }

    /// Its client has reset the connection: the server sees a reset too. A stream to a sidecar is reset when it is dropped.
    pub(super) fn break_off(&self) {
        if let Transport::Plain(stream, ..) = &self.transport {
            reset_on_close(stream);
        }
    }

    /// The connection as the exchange of a request; `None`: through a sidecar, which has been told that the content
    /// is opaque, or no longer fit for one.
    pub(super) fn into_exchange(
        self,
        head: &Head,
    ) -> Option<(Rc<Upstream>, Option<Arc<Attempts>>, Exchange)> {
        let Transport::Plain(stream, read, false) = self.transport else { return None };
        let (mut reader, writer) = split(stream, read);
        if !reader.is_quiet() {
            return None;
        }
        let exchange = match &self.upstream.endpoint.identity {
            None => http1_exchange(reader, writer, head, true),
            // This pod itself, past its own inbound side: what that would tell the application is told here.
            Some(_) => {
                let mut head = head.clone();
                set_client_id(&mut head, Some(self.upstream.identity_text()));
                http1_exchange(reader, writer, &head, true)
            }
        };
        Some((self.upstream, self.evidence, exchange))
    }
}

/// Serves a connection of which it is known that its content is opaque.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    port: &Port,
    stream: TcpStream,
    mut buffer: BytesMut,
) -> Result<(), Failure> {
    let by_name = port.plan(worker).is_some_and(|plan| plan.is_by_server_name());
    let hello = if by_name { Box::pin(hello(&stream, &mut buffer)).await? } else { Hello::Other };
    // A client may have been silent for hours: what holds now decides.
    let Some(plan) = port.plan(worker) else {
        reset_on_close(&stream);
        return Err(Failure::UpstreamNone);
    };
    let way = plan.connection(match &hello {
        Hello::Tls(name) => Connection::Tls(name.as_deref()),
        Hello::Incomplete | Hello::Other => Connection::Other,
    });
    let way = way.inspect_err(|failure| {
        reset_on_close(&stream);
        count_unopened(worker, &plan.default, failure, plan.default.backend.is_meshed());
    })?;
    drop(plan);
    // Opening takes a moment and much room, carrying takes hours: neither is a part of the other's future.
    let (opened, reader, writer) = Box::pin(open_for(worker, &way.backend, stream, buffer)).await;
    Box::pin(carry(worker, &way, opened, reader, writer)).await
}

async fn open_for(
    worker: &Worker,
    backend: &Rc<Backend>,
    stream: TcpStream,
    buffer: BytesMut,
) -> (Result<Opened, Unopened>, Reader, Writer) {
    let left = Notify::new();
    let opening = pin!(open(worker, backend, left.notified()));
    await_open(opening, &left, stream, buffer).await
}

/// Waits for what `opening` opens for a client, which may leave meanwhile, and splits the client's connection. `left`
/// gives the opening up.
pub(super) async fn await_open(
    mut opening: Pin<&mut impl Future<Output = Result<Opened, Unopened>>>,
    left: &Notify,
    stream: TcpStream,
    mut buffer: BytesMut,
) -> (Result<Opened, Unopened>, Reader, Writer) {
    let opened = match unless_reset(&stream, &mut buffer, opening.as_mut()).await {
        Some(opened) => opened,
        None => {
            left.notify_one();
            opening.await
        }
    };
    let (reader, writer) = split(stream, buffer);
    (opened, reader, writer)
}

/// Reads until the first bytes are a whole ClientHello, or cannot be one. They stay in the buffer. A client that has
/// begun one is waited for, because nothing but its end can follow.
async fn hello(stream: &TcpStream, buffer: &mut BytesMut) -> Result<Hello, Failure> {
    let mut by = None;
    loop {
        match sni::read(buffer) {
            Hello::Incomplete => {}
            known => return Ok(known),
        }
        // Waited for without memory: a silent connection may stay so for hours.
        if buffer.is_empty() {
            stream.readable().await.map_err(|_| Failure::ClientGone)?;
        } else {
            let by = *by.get_or_insert_with(|| Instant::now() + HELLO_COMES_WITHIN);
            match timeout_at(by, stream.readable()).await {
                Ok(readable) => readable.map_err(|_| Failure::ClientGone)?,
                Err(_) => return Ok(Hello::Incomplete),
            }
        }
        buffer.reserve(4 * 1024);
        match stream.try_read_buf(buffer) {
            Ok(0) => return Ok(Hello::Incomplete),
            Ok(_) => {}
            // There was nothing after all.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if buffer.is_empty() {
                    *buffer = BytesMut::new();
                }
            }
            Err(_) => return Err(Failure::ClientGone),
        }
    }
}

/// Carries a connection to its end on what was opened for it, or fails it. Not an `async fn`, whose future would hold
/// its arguments twice.
pub(super) fn carry<'a>(
    worker: &'a Worker,
    way: &'a RouteTarget,
    opened: Result<Opened, Unopened>,
    mut reader: Reader,
    mut writer: Writer,
) -> impl Future<Output = Result<(), Failure>> + 'a {
    let opened = opened.inspect_err(|Unopened { failure, is_meshed }| {
        // The client sees a connection that fails, not one that was served and closed.
        writer.abort();
        count_unopened(worker, way, failure, *is_meshed);
    });
    let backend = &*way.backend;
    async move {
        let Opened { upstream, transport, evidence, in_flight, .. } = opened?;
        let held = evidence.map(Held::new);
        // The breaker learns once, with the server's first word or at the end.
        let mut is_silent = true;
        let mut tell = |seen: Seen| {
            if !std::mem::take(&mut is_silent) {
                return false;
            }
            let span = (in_flight.since(), Instant::now());
            observe(worker, backend, &upstream, "opaque", way.route.as_ref(), span, verdict(Some(seen)));
            true
        };
        let mut heard = || {
            if tell(Seen::Good)
                && let Some(held) = &held
            {
                held.heard();
            }
        };
        let (joined, failure) = match transport {
            Transport::Plain(_, _, true) => {
                writer.abort();
                let from_server = Some(Err(PumpError::SourceGone));
                let joined = Joined { bytes: (0, 0), from_client: None, from_server, server_first: true };
                (joined, joined.failure_of_server(Failure::UpstreamReset))
            }
            Transport::Plain(stream, read, false) => {
                let (mut input, mut output) = split(stream, read);
                let ways = ((&mut reader, &mut writer), (&mut input, &mut output));
                let joined = proxy_tcp(ways.0, ways.1, Some, &mut heard, pending()).await;
                (joined, joined.failure_of_server(Failure::UpstreamReset))
            }
            Transport::Mesh(sender, receiver, first) => {
                let stream = (sender, receiver, first);
                let joined = through_sidecar(stream, &mut reader, &mut writer, &mut heard).await;
                (joined, joined.failure_of_server(Failure::UpstreamLost))
            }
        };
        if let Some(seen) = evidence_of_silence(joined.from_client, joined.from_server) {
            tell(seen);
        }
        let took = in_flight.since().elapsed();
        if let Some(held) = &held {
            let seen = evidence_of_connection(&joined, took);
            // A pod that ends breaks off what is open: every rollout does that.
            let ends = || backend.is_ending(&upstream.endpoint);
            held.ended(seen.filter(|seen| *seen != Seen::Failed || !ends()));
        }
        let (up, down) = joined.bytes;
        tracing::debug!(endpoint = %upstream.endpoint.address, ?took, up, down, "an opaque connection ended");
        let series = upstream.series(&worker.telemetry, "opaque", way.route.as_ref());
        series.connection(failure.as_ref(), joined.bytes);
        if let Some(failure) = &failure {
            log(backend, failure, "an opaque connection broke off");
        }
        Ok(())
    }
}

/// What a connection says to the breaker.
fn verdict(seen: Option<Seen>) -> Verdict {
    match seen {
        Some(Seen::Good) => Verdict::Good,
        Some(Seen::Failed) => Verdict::Failed,
        Some(Seen::Unreached) => Verdict::Unreached,
        Some(Seen::ClientError) => Verdict::ClientError,
        None => Verdict::Neutral,
    }
}

/// Counts and logs a connection that no endpoint took.
pub(super) fn count_unopened(worker: &Worker, way: &RouteTarget, failure: &Failure, is_meshed: bool) {
    let series = unserved(worker, Some(&way.backend), "opaque", way.route.as_ref(), is_meshed);
    series.connection(Some(failure), (0, 0));
    log(&way.backend, failure, "no endpoint took an opaque connection");
}

fn log(backend: &Backend, failure: &Failure, what: &'static str) {
    if let Some(suppressed) = FAILURES.allow() {
        let (namespace, service) = backend.counted_as();
        tracing::info!(namespace, service, reason = failure.name(), suppressed, "{what}: {failure}");
    }
}

/// Carries a connection on a stream to the endpoint's sidecar. `first`: what has arrived on it already.
async fn through_sidecar(
    (sender, mut receiver, first): (Sender, Receiver, Option<Event>),
    reader: &mut Reader,
    writer: &mut Writer,
    mut heard: impl FnMut(),
) -> Joined {
    let ended = |from_client, from_server: Result<(), PumpError>, up| {
        let server_first = from_server != Err(PumpError::SinkGone);
        Joined { bytes: (up, 0), from_client, from_server: Some(from_server), server_first }
    };
    reader.unframe();
    writer.unframe();
    let mut early = Bytes::new();
    match first {
        // The server will say nothing; it may still listen.
        Some(Event::End) => {
            if writer.end(&[]).await.is_err() {
                return ended(None, Err(PumpError::SinkGone), 0);
            }
            let mut up = 0;
            let mut to_server = Sink::Mesh(&sender);
            let uploaded = pump(Source::Http1(reader), &mut to_server, &mut up, Some).await;
            return ended(Some(uploaded), Ok(()), up);
        }
        Some(Event::Reset(code)) => {
            writer.abort();
            return ended(None, Err(PumpError::SourceReset(code)), 0);
        }
        Some(Event::Lost) => {
            writer.abort();
            return ended(None, Err(PumpError::SourceGone), 0);
        }
        Some(Event::Data(bytes)) => early = bytes,
        Some(Event::Head(_) | Event::Trailers(_)) | None => {}
    }
    if !early.is_empty() {
        heard();
        if writer.data(&early).await.is_err() || writer.flush().await.is_err() {
            return ended(None, Err(PumpError::SinkGone), 0);
        }
    }
    let up = (Source::Http1(reader), Sink::Mesh(&sender));
    let down = (Source::Mesh(&mut receiver), Sink::Http1(writer));
    let mut joined = join(up, down, Some, heard, pending()).await;
    joined.bytes.1 += early.len() as u64;
    joined
}

#[cfg(test)]
mod tests {
    use tokio::task::{LocalSet, yield_now};

    use super::*;

    #[tokio::test]
    async fn a_connection_that_has_ended_leaves_no_timer() {
        let test = async {
            let held = Held::new(Arc::new(Attempts::default()));
            held.heard();
            assert_eq!(Rc::strong_count(&held.0), 2);
            held.ended(Some(Seen::Good));
            yield_now().await;
            assert_eq!(Rc::strong_count(&held.0), 1);
        };
        LocalSet::new().run_until(test).await;
    }

    #[test]
    fn what_an_http_server_says_unasked_is_not_a_greeting() {
        for (bytes, expected) in [
            (&b"220 mail ESMTP\r\n"[..], Greeting::Opaque),
            (b"\x4a\x00\x00\x00\x0a8.0.36\0", Greeting::Opaque),
            (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x64", Greeting::Settings),
            (b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", Greeting::Settings),
            // An acknowledgement, and lengths that settings never have.
            (b"\x00\x00\x00\x04\x01\x00\x00\x00\x00", Greeting::Opaque),
            (b"\x00\x00\x07\x04\x00\x00\x00\x00\x00", Greeting::Opaque),
            (b"HTTP/1.1 408 Request Timeout\r\n", Greeting::None),
            (b"HT", Greeting::None),
            (b"", Greeting::None),
        ] {
            assert_eq!(Greeting::of(bytes), expected, "{bytes:?}");
        }
    }

    #[test]
    fn only_a_server_that_breaks_off_unasked_fails_a_connection() {
        let joined =
            |from_client, from_server| Joined { bytes: (0, 0), from_client, from_server, server_first: true };
        let gone = Some(Err(PumpError::SourceGone));
        for (ends, expected) in [
            (joined(None, gone), Some(Failure::UpstreamReset)),
            (joined(Some(Err(PumpError::SinkGone)), gone), Some(Failure::UpstreamReset)),
            (joined(None, Some(Err(PumpError::SourceReset(Code::Denied)))), Some(Failure::PolicyDenied)),
            (joined(Some(Ok(())), gone), None),
            (joined(gone, None), None),
            (joined(Some(Ok(())), Some(Ok(()))), None),
            (joined(Some(Err(PumpError::SinkGone)), Some(Ok(()))), None),
        ] {
            assert_eq!(ends.failure_of_server(Failure::UpstreamReset), expected, "{ends:?}");
        }
    }
}
