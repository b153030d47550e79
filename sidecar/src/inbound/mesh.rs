//! Streams of another sidecar.
//!
//! In: a TLS connection that offers `tulle/1`. Out: each stream at the application, as a request or as opaque bytes.
//! A stream that its peer resets ends with its task, and the whole connection ends with the peer's certificate.

use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use rustls::pki_types::CertificateDer;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tulle_mesh::counted_event::{MeshConnection, NotProcessed, RefusedStream};
use tulle_mesh::svid::not_after;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use super::{LIMIT, Peer, app, serve_call};
use crate::admit::{Permit, admit_client, admit_connection, deadline_of, would_admit_connection};
use crate::attempt::{Load, tunnel};
use crate::call::Call;
use crate::error::Failure;
use crate::http1::conn::split;
use crate::http1::head::parse_request;
use crate::http1::{Reader, Writer};
use crate::io::{Prefixed, Until};
use crate::message::{Sink, Source};
use crate::task::spawn_boxed;
use crate::tls::peer_identity;
use crate::wire::{Connection, Event, Receiver, Role, Sender, TLS_BUFFER, drive};

/// A handshake that takes longer is abandoned.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// A peer is told to open no more streams this long before its certificate expires. Sidecars renew theirs at half of
/// its life, and open new connections with it.
const DRAIN: Duration = Duration::from_secs(5);
/// No certificate lasts longer, as far as timers are concerned.
const MAX_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);

/// A connection whose peer has shown who it is.
pub(super) struct Greeted {
    peer: Rc<Peer>,
    stream: TlsStream<Prefixed>,
    /// How long the peer's certificate is still valid.
    valid_for: Duration,
}

/// Takes the handshake of another sidecar.
///
/// # Errors
/// [`Failure::ClientBadRequest`] for a peer that is refused, or a time-out.
pub(super) async fn handshake(peer: Rc<Peer>, stream: Prefixed) -> Result<Box<Greeted>, Failure> {
    let configs = peer.worker.tls.current().ok_or(Failure::OursNoCertificate)?;
    let handshake = TlsAcceptor::from(Arc::clone(&configs.mesh_server)).accept(stream);
    let stream = timeout(HANDSHAKE, handshake).await.map_err(|_| Failure::Timeout("the handshake"))?;
    let stream = stream.map_err(|error| {
        if let Some(suppressed) = LIMIT.allow() {
            tracing::info!(peer = %peer.client.address, %error, suppressed, "refused a handshake");
        }
        Failure::ClientBadRequest("a handshake that is refused")
    })?;
    let leaf = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let unnamed = Failure::ClientBadRequest("a certificate that names no workload");
    let Some((identity, valid_for)) =
        leaf.and_then(|leaf| Some((peer_identity(leaf).ok()?, valid_for(leaf)?)))
    else {
        return Err(unnamed);
    };
    let client = peer.client.clone().with_identity(identity);
    Ok(Box::new(Greeted { peer: Peer::new(Rc::clone(&peer.worker), client), stream, valid_for }))
}

fn valid_for(leaf: &CertificateDer<'_>) -> Option<Duration> {
    let end = UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after(leaf).ok()?).ok()?);
    Some(end.duration_since(SystemTime::now()).unwrap_or_default().min(MAX_LIFE))
}

/// Serves the streams of a connection until it ends.
///
/// # Errors
/// [`Failure::ClientGone`] when it broke off.
pub(super) async fn serve(greeted: Box<Greeted>) -> Result<(), Failure> {
    let Greeted { peer, mut stream, valid_for } = *greeted;
    stream.get_mut().1.set_buffer_limit(Some(TLS_BUFFER));
    let expires = Instant::now() + valid_for;
    let connection = Connection::new(Role::Server);
    peer.worker.opened_by_peer(&connection);
    let accepting = connection.clone();
    let acceptor = async {
        let mut drained = pin!(sleep_until(expires - DRAIN.min(valid_for / 4)));
        let mut is_draining = false;
        loop {
            tokio::select! {
                biased;
                accepted = poll_fn(|cx| accepting.poll_accept(cx)) => {
                    let Some((head, sender, receiver)) = accepted else { return };
                    let peer = Rc::clone(&peer);
                    spawn_boxed(|| stream_of(peer, head, sender, receiver));
                }
                () = drained.as_mut(), if !is_draining => {
                    is_draining = true;
                    accepting.drain();
                }
            }
        }
    };
    let (driven, ()) = tokio::join!(drive(connection, Until::new(stream, expires)), acceptor);
    driven.map_err(|error| {
        tracing::debug!(peer = %peer.client.address, %error, "a connection of a sidecar ended");
        peer.worker.telemetry.event(MeshConnection::Failed);
        Failure::ClientGone
    })
}

/// Serves one stream to its end.
pub(super) async fn stream_of(peer: Rc<Peer>, mut block: Bytes, sender: Sender, mut receiver: Receiver) {
    let refuse = |reason: RefusedStream, error: &dyn std::fmt::Display| {
        peer.worker.telemetry.event(reason);
        if let Some(suppressed) = LIMIT.allow() {
            tracing::warn!(peer = %peer.client.address, %error, suppressed, "refused a stream");
        }
        sender.reset(Code::BadHead);
    };
    // Only what is copied is kept: the other fields hold the block that the head is in.
    let (travels, left_ms) = match Fields::decode(&mut block) {
        Ok(fields) => (fields.protocol, fields.deadline_ms),
        Err(error) => return refuse(RefusedStream::BadHead, &error),
    };
    if travels == Travels::Opaque {
        return opaque(&peer, sender, receiver).await;
    }
    match parse_request(&mut BytesMut::from(block)) {
        Ok(Some(head)) => {
            let worker = &peer.worker;
            let in_flight = worker.load.get().saturating_add(1);
            let load =
                Load { in_flight, latency_us: worker.app_latency.micros(Instant::now()), ..Load::default() };
            let mut call = Call::mesh(head, travels, &sender, &mut receiver, load);
            call.deadline = deadline_of(&call, left_ms);
            serve_call(&peer, call).await;
        }
        Ok(None) => refuse(RefusedStream::BadRequest, &"the request's head is cut short"),
        Err(error) => refuse(RefusedStream::BadRequest, &error),
    }
}

async fn opaque(peer: &Peer, sender: Sender, mut receiver: Receiver) {
    if !would_admit_connection(&peer.worker, &peer.client) {
        sender.reset(Code::Denied);
        drop((sender, receiver));
        return peer.count_refused().await;
    }
    let Ok(permit) = admit_connection(&peer.worker, &peer.client) else { return sender.reset(Code::Denied) };
    // Its sidecar knows of others that may take it.
    let Ok(_slot) = admit_client(&peer.worker) else { return sender.reset(Code::NotProcessed) };
    let connected = tokio::select! {
        biased;
        connected = app::connect(peer) => connected,
        () = sender.gone() => return,
    };
    let Ok(stream) = connected else {
        peer.worker.telemetry.event(NotProcessed::AppRefused);
        return sender.reset(Code::NotProcessed);
    };
    // The head says that the application has taken the connection.
    let mut accepted = BytesMut::new();
    Fields::default().encode(&mut accepted);
    sender.head(&accepted, false);
    let (mut reader, writer) = split(stream, BytesMut::new());
    let first = tokio::select! {
        biased;
        // First, because connecting may have taken long.
        () = permit.withdrawn(&peer.client, None) => return sender.reset(Code::Denied),
        event = receiver.next() => Some(event),
        () = reader.stirred() => None,
    };
    match first {
        // The client turned out to speak HTTP, and its request follows: on this connection.
        Some(Event::Reset(Code::Cancel)) if reader.is_quiet() => app::keep(peer, reader, writer),
        Some(Event::Reset(_) | Event::Lost) => {}
        first => carry(peer, &permit, (&sender, &mut receiver), (reader, writer), first).await,
    }
}

/// Moves bytes both ways. `first`: what has come from the client already.
async fn carry(
    peer: &Peer,
    permit: &Permit,
    (sender, receiver): (&Sender, &mut Receiver),
    (mut reader, mut writer): (Reader, Writer),
    first: Option<Event>,
) {
    let since = Instant::now();
    permit.begun(&peer.client);
    reader.unframe();
    writer.unframe();
    let mut filter = peer.filter();
    let mut early = 0;
    let mut to_app = Sink::Http1(&mut writer);
    let first = match first {
        Some(Event::Data(bytes)) => filter(bytes).map(Event::Data).or(Some(Event::Lost)),
        other => other,
    };
    match first {
        // The application spoke first. An end is seen again below.
        None | Some(Event::End) => {}
        Some(Event::Data(bytes)) => {
            early = bytes.len() as u64;
            // It has gone to a connection that was just opened: there is room for it.
            if to_app.data(bytes).await.is_err() || to_app.flush().await.is_err() {
                return sender.reset(Code::UpstreamFailed);
            }
        }
        Some(_) => {
            to_app.abort();
            peer.series("opaque").connection(None, (0, 0));
            peer.log_connection(since, None, (0, 0));
            return sender.reset(Code::Cancel);
        }
    }
    let stop = async {
        tokio::select! {
            () = sender.gone() => {}
            // Its client's sidecar would take it for a failure of the application.
            () = permit.withdrawn(&peer.client, None) => sender.reset(Code::Denied),
        }
    };
    let up = (Source::Mesh(receiver), to_app);
    let down = (Source::Http1(&mut reader), Sink::Mesh(sender));
    let (sent, received) = tunnel(up, down, filter, stop).await;
    let denied = !would_admit_connection(&peer.worker, &peer.client);
    let failure = denied.then_some(Failure::PolicyDenied);
    let bytes = (early + sent, received);
    peer.series("opaque").connection(failure.as_ref(), bytes);
    peer.log_connection(since, failure.as_ref(), bytes);
}
