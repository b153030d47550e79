//! Streams of another sidecar.

use std::future::{pending, poll_fn};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::Instant;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use super::{Client, authorize, no_claims};
use crate::error::Failure;
use crate::forward::{Downstream, Relayed, RequestBody, relay, tunnel};
use crate::http1::Head;
use crate::http1::conn::split;
use crate::http1::head::parse_request;
use crate::message::{Sink, Source};
use crate::outbound::open_plain;
use crate::pool::{APP_TIMEOUT, connect, connect_within};
use crate::telemetry::{ByProtocol, Series};
use crate::wire::{Connection, Receiver, Role, Sender, drive};
use crate::worker::Worker;

/// A connection of another sidecar, and who it is.
struct Peer {
    worker: Rc<Worker>,
    client: Client,
    series: ByProtocol,
}

/// Serves the streams of a connection until it ends.
pub(super) async fn serve<S>(worker: &Rc<Worker>, stream: S, client: Client) -> Result<(), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let peer = Rc::new(Peer { worker: Rc::clone(worker), client, series: ByProtocol::default() });
    let connection = Connection::new(Role::Server);
    worker.opened_by_peer(&connection);
    let accepting = connection.clone();
    let acceptor = async {
        while let Some((head, sender, receiver)) = poll_fn(|cx| accepting.poll_accept(cx)).await {
            let peer = Rc::clone(&peer);
            spawn_local(async move { peer.stream(head, sender, receiver).await });
        }
    };
    let (driven, ()) = tokio::join!(drive(connection, stream), acceptor);
    driven.map_err(|error| {
        tracing::debug!(peer = %peer.client.address, %error, "a connection of a sidecar ended");
        peer.worker.telemetry.event("mesh_connection", "Failed");
        Failure::ClientGone
    })
}

impl Peer {
    /// What is counted of this client's requests or connections.
    fn series(&self, protocol: &'static str) -> Arc<Series> {
        self.series.get(protocol, || {
            let worker = &self.worker;
            let identity = self.client.identity.as_ref();
            let (namespace, account) =
                identity.map_or(("", "_PLAIN"), |id| (id.namespace.as_str(), id.service_account.as_str()));
            let inbound = worker.config.inbound();
            let revision = inbound.as_ref().map_or("", |inbound| inbound.revision.as_str());
            worker.telemetry.inbound(namespace, account, revision, protocol)
        })
    }

    async fn stream(&self, mut block: Bytes, sender: Sender, receiver: Receiver) {
        let fields = match Fields::decode(&mut block) {
            Ok(fields) => fields,
            Err(error) => {
                tracing::warn!(peer = %self.client.address, %error, "refused a stream");
                self.worker.telemetry.event("refused_stream", "BadHead");
                return sender.reset(Code::BadHead);
            }
        };
        match fields.protocol {
            Travels::Opaque => self.opaque(sender, receiver).await,
            travels => match parse_request(&mut BytesMut::from(block)) {
                Ok(Some(head)) => self.request(head, travels, sender, receiver).await,
                _ => {
                    self.worker.telemetry.event("refused_stream", "BadRequest");
                    sender.reset(Code::BadHead);
                }
            },
        }
    }

    async fn opaque(&self, sender: Sender, mut receiver: Receiver) {
        if authorize::check(&self.worker, &self.client, None).is_err() {
            self.series("opaque").connection(Some(&Failure::PolicyDenied), (0, 0));
            return sender.reset(Code::Denied);
        }
        let app = match connect_within(self.client.destination, APP_TIMEOUT).await {
            Ok(app) => app,
            Err(_) => {
                self.worker.telemetry.event("not_processed", "AppRefused");
                return sender.reset(Code::NotProcessed);
            }
        };
        // The head says that the application has taken the connection.
        let mut accepted = BytesMut::new();
        Fields::default().encode(&mut accepted);
        sender.head(&accepted, false);
        let (mut reader, mut writer) = split(app, BytesMut::new());
        reader.unframe();
        writer.unframe();
        let up = (Source::Mesh(&mut receiver), Sink::Http1(&mut writer));
        let down = (Source::Http1(&mut reader), Sink::Mesh(&sender));
        let bytes = tunnel(up, down, no_claims(&self.worker, &self.client), pending()).await;
        self.series("opaque").connection(None, bytes);
    }

    async fn request(&self, mut head: Head, travels: Travels, sender: Sender, mut receiver: Receiver) {
        let since = Instant::now();
        let series = self.series(if travels == Travels::Http2 { "http2" } else { "http1" });
        let load = &self.worker.load;
        if let Err(denied) = authorize::check(&self.worker, &self.client, Some(head.request_line())) {
            series.request(&Err(denied.clone()), None, since.elapsed(), (0, 0));
            Downstream::Mesh(&sender, load.get()).answer(&denied).await;
            return;
        }
        authorize::canonicalise(&self.worker, &mut head);
        self.client.introduce(&mut head);
        load.set(load.get() + 1);
        let mut body = RequestBody::new(Source::Mesh(&mut receiver), head.framing);
        let mut down = Downstream::Mesh(&sender, load.get());
        let relayed =
            to_application(&self.worker, self.client.destination, &head, &mut body, &mut down, travels).await;
        load.set(load.get().saturating_sub(1));
        series.request(&relayed.result, relayed.grpc_status, since.elapsed(), relayed.bytes);
        if relayed.answered {
            return;
        }
        match (relayed.unprocessed, relayed.result) {
            (true, _) => {
                self.worker.telemetry.event("not_processed", "AppRefused");
                sender.reset(Code::NotProcessed);
            }
            (false, Err(Failure::UpstreamReset)) => {
                tracing::info!(client = ?self.client.identity, method = head.request_line().0, "the application closed a connection without an answer");
                sender.reset(Code::UpstreamFailed);
            }
            (false, Err(failure)) => down.answer(&failure).await,
            (false, Ok(_)) => sender.reset(Code::UpstreamFailed),
        }
    }
}

/// One request to the pod's application. A kept connection that turns out to be closed is replaced by
/// a fresh one where the request may be seen twice.
pub(super) async fn to_application(
    worker: &Worker,
    address: SocketAddr,
    head: &Head,
    body: &mut RequestBody<'_>,
    down: &mut Downstream<'_>,
    travels: Travels,
) -> Relayed {
    let mut repeated = false;
    loop {
        let exchange = match open_plain(worker, address, head, travels, repeated).await {
            Ok(exchange) => exchange,
            Err(failure) => return Relayed::unprocessed(failure),
        };
        let reused = exchange.reused;
        let mut relayed = relay(head, body, exchange, down).await;
        if let Some((reader, writer)) = relayed.idle.take() {
            worker.http1.put(address, reader, writer);
        }
        if relayed.answered || !relayed.unanswered || head.upgrade {
            return relayed;
        }
        let idempotent =
            matches!(head.request_line().0, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
        // A kept connection that the application closed just then: whatever the method, if it has not read
        // the request.
        if !repeated && reused && (idempotent || relayed.unread) {
            worker.telemetry.event("repeated_request", "KeptConnectionClosed");
            repeated = true;
            continue;
        }
        // A fresh one, closed unread: an application that ends leaves what it has not accepted yet.
        relayed.unprocessed |= relayed.unread && connect(address).await.is_err();
        return relayed;
    }
}
