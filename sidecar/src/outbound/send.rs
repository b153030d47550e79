//! To an endpoint: its sidecar where it has one, itself where it has none; another one when the
//! first could not be reached or had gone.

use std::future::pending;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use crate::balance::Upstream;
use crate::claim::introduce;
use crate::error::Failure;
use crate::forward::{Exchange, UpSink, UpSource, join};
use crate::http1::conn::split;
use crate::http1::{Framing, Head, Reader, Writer};
use crate::http2;
use crate::message::{Sink, Source, pump};
use crate::pool::{APP_TIMEOUT, CONNECT_TIMEOUT, connect};
use crate::telemetry::attempts::{Attempts, Seen, evidence_of, evidence_of_silence};
use crate::wire::{Event, Receiver, Sender};
use crate::worker::{Route, Worker};

/// Endpoints that are tried for one request or connection.
pub(super) const MAX_ATTEMPTS: usize = 4;

/// Counts an attempt that has ended for the Canary under whose shares its endpoint was chosen. `head`: the
/// time until the head of its answer.
pub(super) fn count(
    evidence: Option<&Arc<Attempts>>,
    route: &Route,
    upstream: &Upstream,
    seen: Option<Seen>,
    head: Option<Duration>,
) {
    let (Some(attempts), Some(seen)) = (evidence, seen) else { return };
    // A pod that ends takes nothing new: every rollout does that, and it says nothing of the version.
    if seen == Seen::Unreached && route.is_ending(&upstream.endpoint) {
        return;
    }
    attempts.count(seen, head);
}

/// Opens an exchange with an endpoint.
pub(super) async fn open(
    worker: &Worker,
    route: &Route,
    upstream: &Rc<Upstream>,
    head: &Head,
    travels: Travels,
    attempt: u8,
) -> Result<Exchange, Failure> {
    let address = upstream.endpoint.address;
    let bodiless = matches!(head.framing, Framing::None | Framing::Length(0)) && !head.upgrade;
    if let Some(identity) = &upstream.endpoint.identity {
        if worker.is_own(address) {
            // Past our own inbound side: what it would tell the application is told here.
            let mut head = head.clone();
            introduce(&mut head, Some(identity));
            return open_plain(worker, address, &head, travels, false).await;
        }
        let mut block = BytesMut::with_capacity(1024);
        let service = route.service_name().map(Bytes::from);
        Fields { protocol: travels, service, attempt, load: None }.encode(&mut block);
        head.write(&mut block, false);
        let (sender, receiver) = worker.mesh.open(address, identity, &block, bodiless).await?;
        return Ok(Exchange {
            sink: UpSink::Mesh(sender),
            source: UpSource::Mesh(receiver),
            reused: false,
            place: None,
        });
    }
    open_plain(worker, address, head, travels, false).await
}

/// Opens an exchange with a server that has no sidecar, or with this pod's own application. `fresh`: on a
/// connection that has served nothing yet.
pub(crate) async fn open_plain(
    worker: &Worker,
    address: SocketAddr,
    head: &Head,
    travels: Travels,
    fresh: bool,
) -> Result<Exchange, Failure> {
    let limit = if worker.is_own(address) { APP_TIMEOUT } else { CONNECT_TIMEOUT };
    if travels == Travels::Http2 {
        let (mut send, place, reused) = worker.http2.ready(address, limit).await?;
        let bodiless = matches!(head.framing, Framing::None | Framing::Length(0));
        let request = http2::to_request(head)?;
        let (answer, body) = send.send_request(request, bodiless).map_err(|_| Failure::UpstreamConnect)?;
        return Ok(Exchange {
            sink: UpSink::Http2(body),
            source: UpSource::Http2(Some(answer), None),
            reused,
            place: Some(place),
        });
    }
    let (reader, mut writer, reused) = match worker.http1.take(address).filter(|_| !fresh) {
        Some((reader, writer)) => (reader, writer, true),
        None => {
            let (reader, writer) = worker.http1.connect(address, limit).await?;
            (reader, writer, false)
        }
    };
    writer.head(head, false);
    Ok(Exchange { sink: UpSink::Http1(writer), source: UpSource::Http1(reader), reused, place: None })
}

/// A connection whose content is opaque, open to an endpoint.
pub(super) struct Opened {
    upstream: Rc<Upstream>,
    way: Way,
    /// What the server has said already.
    first: Option<Event>,
    since: Instant,
    /// Where the attempt is counted, once the server has been heard or has ended.
    evidence: Option<Arc<Attempts>>,
}

enum Way {
    Mesh(Sender, Receiver),
    Plain(Reader, Writer),
}

/// Opens an opaque connection to an endpoint of the route.
pub(super) async fn open_opaque(worker: &Worker, route: &Route) -> Result<Opened, Failure> {
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut last = Failure::UpstreamNone;
    while tried.len() < MAX_ATTEMPTS {
        let Some(upstream) = route.pick(&tried) else { break };
        let evidence = upstream.attempts(&worker.telemetry);
        let address = upstream.endpoint.address;
        let way = match upstream.endpoint.identity.as_ref().filter(|_| !worker.is_own(address)) {
            Some(identity) => {
                let mut block = BytesMut::with_capacity(128);
                let service = route.service_name().map(Bytes::from);
                Fields { service, ..Fields::default() }.encode(&mut block);
                worker.mesh.open(address, identity, &block, false).await.map(|(s, r)| Way::Mesh(s, r))
            }
            None => connect(address).await.map(|stream| {
                let (mut reader, mut writer) = split(stream, BytesMut::new());
                reader.unframe();
                writer.unframe();
                Way::Plain(reader, writer)
            }),
        };
        match way {
            Ok(mut way) => match accepted(&mut way).await {
                Ok(()) => {
                    return Ok(Opened { upstream, way, first: None, since: Instant::now(), evidence });
                }
                Err(failure) => last = failure,
            },
            Err(failure) => last = failure,
        }
        count(evidence.as_ref(), route, &upstream, evidence_of(Err(&last), None), None);
        upstream.avoid();
        tried.push(address);
    }
    Err(last)
}

/// The server's sidecar says when it has reached the application: nothing is sent before, so that a
/// connection to an endpoint that has gone can go elsewhere whole.
async fn accepted(way: &mut Way) -> Result<(), Failure> {
    let Way::Mesh(_, receiver) = way else { return Ok(()) };
    match receiver.next().await {
        Event::Head(_) => Ok(()),
        Event::Reset(Code::Denied) => Err(Failure::PolicyDenied),
        Event::Reset(Code::NotProcessed) => Err(Failure::UpstreamNotProcessed),
        _ => Err(Failure::UpstreamReset),
    }
}

impl Opened {
    /// Whether the server has greeted its client: an end is no greeting, nor is what an HTTP server says to
    /// clients that take too long (408).
    pub(super) fn has_greeted(&mut self) -> bool {
        match &mut self.way {
            Way::Mesh(..) => {
                matches!(&self.first, Some(Event::Data(bytes)) if !bytes.starts_with(b"HTTP/"))
            }
            Way::Plain(reader, _) => reader.has_greeted(),
        }
    }

    /// Resolves when the server speaks, or ends.
    pub(super) async fn answered(&mut self) {
        match &mut self.way {
            Way::Mesh(_, receiver) => {
                self.first = Some(receiver.next().await);
            }
            Way::Plain(reader, _) => reader.stirred().await,
        }
    }
}

/// Moves bytes both ways until each way has ended.
pub(super) async fn tunnel_opaque(
    worker: &Worker,
    opened: Opened,
    reader: &mut Reader,
    writer: &mut Writer,
) -> Result<(), Failure> {
    let Opened { upstream, mut way, first, since, mut evidence } = opened;
    let mut early = 0;
    // Counted once, with the server's first word or at the end.
    let mut heard = |seen: Seen| {
        if let Some(attempts) = evidence.take() {
            attempts.count(seen, None);
        }
    };
    match first {
        // The server will say nothing; it may still listen.
        Some(Event::End) => {
            heard(Seen::Good);
            writer.end(&[]).await.map_err(|_| Failure::ClientGone)?;
            let mut up = 0;
            if let Way::Mesh(sender, _) = &way {
                let _ = pump(Source::Http1(reader), &mut Sink::Mesh(sender), &mut up, |_| true).await;
            }
            upstream.series(&worker.telemetry, "opaque").connection(None, (up, 0));
            return Ok(());
        }
        Some(Event::Reset(_) | Event::Lost) => {
            heard(Seen::Failed);
            writer.abort();
            return Ok(());
        }
        _ => {}
    }
    if let Some(Event::Data(bytes)) = first {
        heard(Seen::Good);
        early = bytes.len() as u64;
        writer.data(&bytes).await.map_err(|_| Failure::ClientGone)?;
        writer.flush().await.map_err(|_| Failure::ClientGone)?;
    }
    let (from_client, to_client) = (Source::Http1(reader), Sink::Http1(writer));
    let joined = match &mut way {
        Way::Mesh(sender, receiver) => {
            let (up, down) = ((from_client, Sink::Mesh(sender)), (Source::Mesh(receiver), to_client));
            join(up, down, |_| true, || heard(Seen::Good), pending()).await
        }
        Way::Plain(input, output) => {
            let (up, down) = ((from_client, Sink::Http1(output)), (Source::Http1(input), to_client));
            join(up, down, |_| true, || heard(Seen::Good), pending()).await
        }
    };
    if let Some(seen) = evidence_of_silence(joined.from_client, joined.from_server) {
        heard(seen);
    }
    let (up, down) = joined.bytes;
    let took: Duration = since.elapsed();
    tracing::debug!(endpoint = %upstream.endpoint.address, ?took, up, down, "an opaque connection ended");
    upstream.series(&worker.telemetry, "opaque").connection(None, (up, down + early));
    Ok(())
}
