//! Connections to the pod's own application.
//!
//! In: a request that was admitted, or leave to connect. Out: the answer, from a connection that was kept or opened
//! for it. Nothing is kept open to an application that does not accept what waits for it: see [`watch`].

use std::cell::Cell;
use std::future::pending;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, sleep_until};
use tulle_mesh::counted_event::{ExpiredRequest, RepeatedRequest};
use tulle_mesh::wire::head::Protocol as Travels;

use super::{Peer, backlog};
use crate::admit::{Client, has_passed};
use crate::attempt::{
    self, Attempt, AttemptPolicy, End, Exchange, http1_exchange, http2_exchange, take_kept,
};
use crate::call::{Call, Ended};
use crate::error::Failure;
use crate::grpc::is_server_error;
use crate::http1::conn::split;
use crate::http1::{Head, Reader, Writer, logged_host};
use crate::pool::{self, PATIENT, Server, Taken};
use crate::settings::SourceAddress;
use crate::telemetry::Limited;
use crate::worker::Worker;

/// An application that is down fails every request: that is logged this often in a second.
static UNCONNECTED: Limited = Limited::new(1);

/// When a request is sent again to the same application, counted from the failure.
const REPEATS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(25)];
/// When it is looked whether an application has stopped listening, each time after the one before. Servers close their
/// listener and what is idle at about the same time.
const STOPS: [Duration; 3] = [Duration::ZERO, Duration::from_millis(10), Duration::from_millis(40)];
/// Who has waited so long for a first byte on a fresh connection may wait for the application to accept it.
const LONG_WAIT: Duration = Duration::from_millis(20);
/// An application that is well accepts within this time: what is in its backlog before and after is not being taken.
const MOMENT: Duration = Duration::from_millis(2);

/// The application as a client reaches it: from whose address.
pub(super) fn server(worker: &Worker, client: &Client) -> Server {
    let address = client.destination;
    let preserves = worker.settings.source_address == SourceAddress::Preserve;
    let source = Some(client.address.ip()).filter(|ip| preserves && is_preservable(worker, *ip, address));
    Server { address, source }
}

/// An answer to loopback or to an own address would not come back to the sidecar.
fn is_preservable(worker: &Worker, source: IpAddr, server: SocketAddr) -> bool {
    !source.is_loopback()
        && !worker.settings.pod_ips.contains(&source)
        && source.is_ipv4() == server.is_ipv4()
}

/// Connects to the application, for as long as the caller waits.
pub(super) async fn connect(peer: &Peer) -> Result<TcpStream, Failure> {
    pool::connect(peer.server, PATIENT).await.inspect_err(|failure| report_unconnected(peer, failure, None))
}

/// Logs that the application could not be connected, at which port, and whether anything listens there: usually the
/// Service's `targetPort` is another one than the application's.
#[cold]
fn report_unconnected(peer: &Peer, failure: &Failure, request: Option<&Head>) {
    if *failure != Failure::UpstreamConnect {
        return;
    }
    let Some(suppressed) = UNCONNECTED.allow() else { return };
    let what = unconnected(peer.server.address.port());
    let host = request.and_then(logged_host);
    tracing::info!(
        reason = failure.name(), application = %peer.server.address, client = %peer.client.name(),
        host = host.as_deref(), suppressed, "{what}"
    );
}

/// What keeps connections from a port of the application, as a sentence.
fn unconnected(port: u16) -> String {
    match backlog::listens(port) {
        Ok(false) => format!(
            "nothing listens at port {port}: compare the targetPort of the Service with the port of the application"
        ),
        Ok(true) => format!(
            "the application could not be connected at port {port}, where something listens: perhaps only at 127.0.0.1, \
             or it takes no connections"
        ),
        Err(_) => format!("the application could not be connected: does it listen at port {port}?"),
    }
}

/// Whether the application has stopped listening, or does within a moment: it shuts down, or its process has ended. What
/// it closes then it does not reset, unless something is there that it has not read (`close(2)` of a TCP socket on Linux):
/// of a short request, all. Only one that resets on purpose (`SO_LINGER` with 0) would say the same of a request that it
/// has read. Asked before a request is answered with 502 that must not be carried out twice.
async fn has_stopped(address: SocketAddr) -> bool {
    for wait in STOPS {
        if !wait.is_zero() {
            sleep(wait).await;
        }
        if matches!(backlog::takes(address), Ok(false)) {
            return true;
        }
    }
    false
}

/// Carries one request to the application and its answer back.
pub(super) async fn request(peer: &Peer, call: &mut Call<'_>) -> Ended {
    if let Err(failure) = call.prepare().await {
        return Ended::failed(failure);
    }
    let policy = AttemptPolicy { deadline: call.deadline, refuses_claims: true, ..AttemptPolicy::default() };
    let mut repeats = REPEATS.iter();
    let mut fresh = false;
    loop {
        let (exchange, own) = match open(peer, call, fresh).await {
            Ok(opened) => opened,
            Err(failure) => {
                report_unconnected(peer, &failure, Some(&call.head));
                return Ended::failed(failure);
            }
        };
        let (reused, in_use) = (exchange.reused, exchange.in_use);
        let mut attempt = attempt::run(call, exchange, &policy).await;
        note_latency(&peer.worker, &attempt);
        call.attempts = call.attempts.saturating_add(1);
        if let Some((reader, writer)) = attempt.idle.take() {
            match own || attempt.bound {
                true => peer.keep_own(reader, writer),
                false => keep_after(peer, reader, writer, attempt.head_at, reused),
            }
        }
        if matches!(attempt.end, End::Reset(_))
            && !attempt.end.may_repeat(call)
            && call.body.is_read_at_once()
            && Box::pin(has_stopped(peer.server.address)).await
        {
            attempt.end = End::Unread(Failure::UpstreamReset);
        }
        let repeat = match &attempt.end {
            End::NotProcessed(_) | End::Unread(_) | End::Reset(_) => true,
            // A kept connection that the application closed just then. Of a fresh one it may have seen the request.
            End::Unanswered(_) => reused,
            End::Delivered(_) | End::Refused(_) | End::Final(_) | End::Client(_) => false,
        };
        if !repeat || !attempt.end.may_repeat(call) {
            return attempt.ended();
        }
        let Some(wait) = repeats.next() else { return attempt.ended() };
        let reason = if reused { RepeatedRequest::KeptConnectionClosed } else { RepeatedRequest::Unread };
        peer.worker.telemetry.event(reason);
        if matches!(attempt.end, End::Reset(_) | End::Unanswered(_)) && (in_use || !reused) {
            call.answer.note_broken();
        }
        fresh = true;
        if !wait.is_zero() {
            sleep(*wait).await;
        }
    }
}

/// What other sidecars are told of the application. The time that a client takes to send its request is not the
/// application's.
fn note_latency(worker: &Worker, attempt: &Attempt) {
    let Attempt { sent_at: Some(sent_at), head_at: Some(head_at), status: Some(status), .. } = *attempt
    else {
        return;
    };
    let failed = status >= 500 || attempt.grpc_status.is_some_and(is_server_error);
    worker.app_latency.note(head_at.saturating_duration_since(sent_at), failed, head_at);
}

/// Opens an exchange with the application, unless the client leaves meanwhile or its time is up: nothing is sent then.
/// Whether on the client's own connection.
async fn open(peer: &Peer, call: &mut Call<'_>, fresh: bool) -> Result<(Exchange, bool), Failure> {
    let Call { head, answer, travels, deadline, .. } = call;
    let expired = || {
        peer.worker.telemetry.event(ExpiredRequest::Connect);
        Err(Failure::DeadlineExceeded)
    };
    if has_passed(*deadline) {
        return expired();
    }
    let mut opening = pin!(connect_for(peer, head, *travels, fresh));
    // Most requests find a connection that was kept, and need no timer.
    if let Some(opened) = opening.as_mut().now_or_never() {
        return opened;
    }
    tokio::select! {
        biased;
        // First: a connection that is there at the last moment would send the request with it.
        () = passes(*deadline) => expired(),
        opened = opening => opened,
        () = answer.gone() => Err(Failure::ClientGaveUp),
    }
}

/// Resolves when a deadline passes.
async fn passes(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}

/// It may take as long as the client waits: there is no other endpoint, and an application that is busy accepts late.
async fn connect_for(
    peer: &Peer,
    head: &Head,
    travels: Travels,
    fresh: bool,
) -> Result<(Exchange, bool), Failure> {
    let (worker, server) = (&peer.worker, peer.server);
    if travels == Travels::Http2 {
        let opened = http2_exchange(worker, server, head, PATIENT, None, &Cell::new(false)).await?;
        return Ok((opened, false));
    }
    let begin = || worker.app_waiting.begin_at(Some(server.address.port()));
    let own = if fresh { None } else { peer.take_own() };
    let is_own = own.is_some();
    let own = own.map(|(reader, writer)| Taken { reader, writer, in_use: false });
    let kept = own.or_else(|| if fresh { None } else { take_kept(worker, server, head) });
    if let Some(Taken { reader, writer, in_use }) = kept {
        // One that was opened for a silent client may still wait in the application's backlog.
        let waiting = (!reader.has_answered()).then(begin);
        return Ok((Exchange { waiting, in_use, ..http1_exchange(reader, writer, head, true) }, is_own));
    }
    let waiting = Some(begin());
    let (reader, writer) = worker.http1.connect(server, PATIENT).await?;
    Ok((Exchange { waiting, ..http1_exchange(reader, writer, head, false) }, false))
}

/// Keeps a connection on which nothing has passed yet.
pub(super) fn keep(peer: &Peer, reader: Reader, writer: Writer) {
    keep_after(peer, reader, writer, None, true);
}

/// Keeps a connection for another request; `answered` and `reused` as
/// [`Http1Pool::put_after`](crate::pool::Http1Pool::put_after) has them.
fn keep_after(peer: &Peer, reader: Reader, writer: Writer, answered: Option<Instant>, reused: bool) {
    if !peer.worker.app_waiting.is_starved(peer.server.address.port()) {
        peer.worker.http1.put_after(peer.server, reader, writer, answered, reused);
    }
}

/// Keeps a connection on which not a byte has passed either way.
pub(super) fn keep_untouched(peer: &Peer, app: Option<TcpStream>) {
    if let Some(app) = app {
        let (mut reader, writer) = split(app, BytesMut::new());
        if reader.is_quiet() {
            keep(peer, reader, writer);
        }
    }
}

/// Looks after those who wait for the application, as long as the worker runs. An application that serves one
/// connection at a time accepts nothing while a kept one lies idle: those of a port whose backlog is not taken are
/// closed, and none is kept until it is. Who was accepted may wait for an answer for as long as it takes (a long poll),
/// and is not looked at again.
pub async fn watch(worker: Rc<Worker>) {
    let waiting = &worker.app_waiting;
    loop {
        waiting.begun().await;
        let mut accepted = 0;
        while waiting.longest().is_some() {
            match waiting.longest_from(accepted) {
                Some(waited) if waited < LONG_WAIT => {
                    sleep(LONG_WAIT - waited).await;
                    continue;
                }
                Some(_) => {
                    // A younger one may not be in the backlog yet.
                    let younger = waiting.first_shorter_than(LONG_WAIT);
                    if relieve(&worker).await {
                        accepted = younger;
                    }
                }
                None => {}
            }
            sleep(LONG_WAIT).await;
        }
        waiting.set_starved(Vec::new());
    }
}

/// Whether the application has accepted everything.
async fn relieve(worker: &Worker) -> bool {
    let before = unaccepted(worker);
    if before.is_empty() {
        worker.app_waiting.set_starved(before);
        return true;
    }
    sleep(MOMENT).await;
    let mut starved = unaccepted(worker);
    starved.retain(|port| before.contains(port));
    for port in &starved {
        for ip in &worker.settings.pod_ips {
            worker.http1.close_idle(SocketAddr::new(*ip, *port));
        }
    }
    worker.app_waiting.set_starved(starved);
    false
}

/// The ports with connections that the application has not accepted. Where the kernel does not tell (gVisor), those
/// for which somebody waits.
fn unaccepted(worker: &Worker) -> Vec<u16> {
    backlog::unaccepted().unwrap_or_else(|error| {
        tracing::debug!(%error, "the kernel does not tell what is in the application's backlog");
        worker.app_waiting.ports_waited_for(LONG_WAIT)
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_at_which_nobody_listens_is_named_with_what_to_compare() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let here = unconnected(port);
        assert!(here.contains(&format!("port {port}, where something listens")), "{here}");
        drop(listener);
        let gone = unconnected(port);
        assert!(gone.starts_with(&format!("nothing listens at port {port}: ")), "{gone}");
        assert!(gone.contains("targetPort"), "{gone}");
    }
}
