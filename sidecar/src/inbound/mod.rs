//! The inbound path: a connection to the pod's application.
//!
//! In: a redirected TCP connection. Out: its requests and bytes at the application, as far as the rules allow.
//!
//! ```text
//!   first     what a connection is, by its first bytes: ours (TLS with ALPN tulle/1), or plain and what is spoken
//!   mesh      streams of another sidecar
//!   plain     connections of clients without one
//!   app       connections to the application, and which of them are kept
//!   backlog   whether the application accepts what waits for it
//!   access_log  a line for each request, where a policy asks for that
//! ```
//!
//! TLS that is not ours belongs to the application, and is opaque. Every request passes [`serve_call`], every opaque
//! connection [`crate::admit::admit_connection`], before anything of it reaches the application.

mod access_log;
pub mod app;
mod backlog;
mod first;
mod mesh;
mod plain;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tulle_mesh::counted_event::{InboundConnection, RefusedConnection};

use crate::admit::{Client, admit, report_denied_connection};
use crate::call::{Call, Ended};
use crate::claim::ForgedIdentityFilter;
use crate::error::Failure;
use crate::http1::{Head, Reader, Start, Writer};
use crate::listen::{canonical, original_destination, reset_on_close};
use crate::pool::Server;
use crate::telemetry::{Limited, PeerSeries, Series};
use crate::trace;
use crate::worker::Worker;

/// What a peer does wrong can be repeated at will: it is logged at this pace.
static LIMIT: Limited = Limited::new(10);

/// How long a connection waits for the rules that it is to be admitted by.
const RULES: Duration = Duration::from_secs(60);
/// How long a client may stay silent whose opaque connection was refused, before the refusal counts: its sidecar
/// waits as long for a request, which may be allowed.
const UNDECIDED: Duration = Duration::from_secs(10);
/// How many refusals of one peer may wait to be counted.
const MAX_UNDECIDED: u32 = 64;

/// Serves one connection to the application.
pub async fn serve(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr) {
    let Some(destination) = original_destination(&stream) else {
        worker.telemetry.event(RefusedConnection::NotRedirected);
        return;
    };
    serve_to(worker, stream, peer, destination).await;
}

/// Serves a connection to the application that a peer has made to this address.
pub async fn serve_to(worker: Rc<Worker>, stream: TcpStream, peer: SocketAddr, destination: SocketAddr) {
    if stream.set_nodelay(true).is_err() {
        return;
    }
    // Nothing is accepted before the rules are known: an allow by ignorance would be a hole. While there is no
    // operator, clients that come again and again must not use up the descriptors, which the way out needs too.
    if timeout(RULES, worker.config.inbound_known()).await.is_err() {
        worker.telemetry.event(RefusedConnection::RulesUnknown);
        return reset_on_close(&stream);
    }
    let client = Client::plain(canonical(peer), destination);
    accept(worker, stream, client).await;
}

/// Each stage is a future of its own size: what only the beginning of a connection needs is given back when it has
/// passed.
async fn accept(worker: Rc<Worker>, stream: TcpStream, client: Client) {
    let peer = Peer::new(worker, client);
    let served = match Box::pin(first::listen(&peer, stream)).await {
        Ok(first::Opening::Mesh(stream)) => match Box::pin(mesh::handshake(peer.clone(), stream)).await {
            Ok(greeted) => Box::pin(mesh::serve(greeted)).await,
            Err(failure) => Err(failure),
        },
        Ok(first::Opening::Plain(opening)) => Box::pin(plain::serve(Rc::clone(&peer), opening)).await,
        Err(failure) => {
            // Beyond the limit of connections. That a client leaves without a word is no news: probes do.
            if failure.is_of_policy() {
                peer.log_connection(peer.since, Some(&failure), (0, 0));
            }
            Err(failure)
        }
    };
    if let Err(failure) = served {
        peer.worker.telemetry.event(InboundConnection(failure.reason()));
        let Client { address, destination, .. } = &peer.client;
        tracing::debug!(%destination, peer = %address, %failure, "an inbound connection ended");
    }
}

/// Who is at the other end of a connection, and what is counted of it.
struct Peer {
    worker: Rc<Worker>,
    client: Client,
    /// The application, as this client reaches it.
    server: Server,
    series: PeerSeries,
    /// When its connection came.
    since: Instant,
    /// A connection to the application that has authenticated this client, and may carry requests of nobody else.
    own: Cell<Option<Box<(Reader, Writer)>>>,
    /// Refusals of opaque connections that may yet turn out to be requests.
    undecided: Cell<u32>,
    requested: Notify,
}

impl Peer {
    fn new(worker: Rc<Worker>, client: Client) -> Rc<Self> {
        let server = app::server(&worker, &client);
        Rc::new(Self {
            worker,
            client,
            server,
            series: PeerSeries::default(),
            since: Instant::now(),
            own: Cell::new(None),
            undecided: Cell::new(0),
            requested: Notify::new(),
        })
    }

    /// What is counted of this client's requests or connections.
    fn series(&self, protocol: &'static str) -> Arc<Series> {
        self.series.get(protocol, None, || {
            let worker = &self.worker;
            let inbound = worker.config.inbound();
            let revision = inbound.as_ref().map_or("", |inbound| inbound.revision.as_str());
            let Some(identity) = &self.client.identity else {
                return worker.telemetry.inbound_plain(revision, protocol);
            };
            worker.telemetry.inbound(&identity.namespace, &identity.service_account, revision, protocol)
        })
    }

    /// Logs a connection whose content is opaque, where a policy asks for that.
    fn log_connection(&self, since: Instant, failure: Option<&Failure>, bytes: (u64, u64)) {
        access_log::connection(&self.worker, &self.client, since, failure, bytes);
    }

    /// Lets through what a client sends, without a header that names its client (see [`crate::claim`]).
    fn filter(&self) -> impl FnMut(Bytes) -> Option<Bytes> + '_ {
        let mut filter = ForgedIdentityFilter::default();
        move |bytes| {
            let admitted = filter.admit(bytes);
            if admitted.is_none() {
                self.worker.telemetry.event(RefusedConnection::ClaimedIdentity);
                if let Some(suppressed) = LIMIT.allow() {
                    tracing::warn!(
                        client = %self.client.address, identity = %self.client.name(),
                        port = self.client.destination.port(), suppressed,
                        "broken off: an opaque connection carries HTTP/2 with a tulle-client-id header"
                    );
                }
            }
            admitted
        }
    }

    /// Keeps a connection that has authenticated a client (NTLM). Of a client with a sidecar it is closed: its sidecar
    /// speaks for all clients of the pod.
    fn keep_own(&self, reader: Reader, writer: Writer) {
        if self.client.identity.is_none() {
            self.own.set(Some(Box::new((reader, writer))));
        }
    }

    /// The connection that [`Self::keep_own`] has kept, if the application has not closed it.
    fn take_own(&self) -> Option<(Reader, Writer)> {
        let (mut reader, writer) = *self.own.take()?;
        reader.is_quiet().then_some((reader, writer))
    }

    /// A request was allowed: perhaps of a client whose connection was refused while it was silent.
    fn has_requested(&self) {
        if let Some(rest) = self.undecided.get().checked_sub(1) {
            self.undecided.set(rest);
            self.requested.notify_one();
        }
    }

    /// Counts that an opaque connection was refused, unless its client turns out to send a request that is allowed.
    async fn count_refused(&self) {
        let waiting = self.undecided.get();
        if waiting < MAX_UNDECIDED && crate::admit::might_admit_request(&self.worker, &self.client) {
            self.undecided.set(waiting + 1);
            if timeout(UNDECIDED, self.requested.notified()).await.is_ok() {
                return;
            }
            self.undecided.set(self.undecided.get().saturating_sub(1));
        }
        report_denied_connection(&self.worker, &self.client);
        self.series("opaque").connection(Some(&Failure::PolicyDenied), (0, 0));
        self.log_connection(Instant::now(), Some(&Failure::PolicyDenied), (0, 0));
    }
}

/// Serves one request; whether the client's connection may carry another.
async fn serve_call(peer: &Peer, mut call: Call<'_>) -> bool {
    let series = peer.series(call.protocol());
    call.trace = trace::begin(&peer.worker, &mut call.head, peer.client.identity.is_none());
    let permit = match admit(&mut call, &peer.worker, &peer.client).await {
        Ok(permit) => permit,
        Err(denied) => {
            let ended = Ended::failed(denied.0);
            access_log::request(&peer.worker, &peer.client, &call, &ended);
            return call.finish(&peer.worker, &series, ended).await;
        }
    };
    peer.has_requested();
    peer.client.introduce(&mut call.head);
    let line = request_line(&call.head);
    let ended = tokio::select! {
        biased;
        ended = app::request(peer, &mut call) => ended,
        () = permit.withdrawn(&peer.client, line) => {
            // Whether something was answered is not known here: what is under way is broken off, so that nobody takes
            // it for the whole.
            call.answer.break_off();
            Ended { answered: true, ..Ended::failed(Failure::PolicyDenied) }
        }
    };
    drop(permit);
    access_log::request(&peer.worker, &peer.client, &call, &ended);
    call.finish(&peer.worker, &series, ended).await
}

/// Method and target, for rules that come while the request runs.
fn request_line(head: &Head) -> Option<(bytes::Bytes, bytes::Bytes)> {
    match &head.start {
        Start::Request { method, target } => Some((method.clone(), target.clone())),
        Start::Response { .. } => None,
    }
}
