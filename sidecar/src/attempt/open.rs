//! Opens an exchange with an endpoint: on a stream to its sidecar where it has one, with itself where not.

use std::borrow::Cow;
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::Instant;
use tulle_mesh::wire::STREAM_CREDIT;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use super::exchange::{Exchange, UpSink, UpSource, http1_exchange, http2_exchange, is_bodiless};
use crate::backend::{Backend, Upstream};
use crate::claim::set_client_id;
use crate::error::Failure;
use crate::grpc;
use crate::http1::{Framing, Head};
use crate::pool::{Server, Taken};
use crate::worker::Worker;

/// The server's sidecar is told of so much more time than there is left: the client's own sidecar ends a request that
/// takes too long. A 504 of the server's sidecar that came first would count as the server's failure in breaker and
/// balancer, also where only the client was impatient.
const MARGIN_MS: u128 = 5;

/// To which endpoint an exchange is opened, and how.
pub struct Opening<'a> {
    /// The Service's port that the endpoint belongs to.
    pub backend: &'a Backend,
    /// The endpoint.
    pub upstream: &'a Upstream,
    /// Attempts that this request has made before.
    pub attempt: u8,
    /// Not on a connection that was kept: one of those has just turned out to be closed.
    pub fresh: bool,
    /// How long connecting may take.
    pub limit: Duration,
    /// The route that has changed the request; `None`: none has.
    pub route: Option<&'a Arc<str>>,
    /// When the answer must have begun, which the server's sidecar is told; `None`: never.
    pub deadline: Option<Instant>,
    /// The application is told too, by the `grpc-timeout` that the request has.
    pub renews_grpc_timeout: bool,
    /// Another attempt is opening the connection, and this one waits for it: a failure meanwhile is not one more.
    pub waits: Cell<bool>,
}

impl Opening<'_> {
    /// What the request's `grpc-timeout` has to say; `None`: it says nothing, or what it says.
    fn grpc_deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| self.renews_grpc_timeout)
    }
}

/// Opens an exchange with an endpoint.
///
/// # Errors
/// [`Failure`] of connecting, or of a head that the endpoint's sidecar would refuse; nothing of the request was sent.
pub async fn open(
    worker: &Worker,
    to: &Opening<'_>,
    head: &Head,
    travels: Travels,
) -> Result<Exchange, Failure> {
    let address = to.upstream.endpoint.address;
    let Some(identity) = &to.upstream.endpoint.identity else {
        return open_plain(worker, to, head, travels).await;
    };
    if worker.is_own(address) {
        // Past our own inbound side: what it would tell the application is told here.
        let mut head = head.clone();
        set_client_id(&mut head, Some(to.upstream.identity_text()));
        return Box::pin(open_plain(worker, to, &head, travels)).await;
    }
    if !head.fits_a_stream() {
        // Only what a route adds makes a head too long that a client could send.
        let too_long = |route| Failure::RouteHeadTooLong(Arc::clone(route));
        return Err(to.route.map_or(Failure::ClientHeadTooLong, too_long));
    }
    let block = || block(to, head, travels);
    let opened = worker.mesh.open(address, identity, block, is_bodiless(head), to.limit, &to.waits);
    let (sender, receiver) = opened.await?;
    Ok(Exchange {
        sink: UpSink::Mesh(sender),
        source: UpSource::Mesh(receiver),
        reused: false,
        in_use: false,
        place: None,
        waiting: None,
    })
}

/// Opens an exchange with an endpoint itself.
async fn open_plain(
    worker: &Worker,
    to: &Opening<'_>,
    head: &Head,
    travels: Travels,
) -> Result<Exchange, Failure> {
    let server = Server::from(to.upstream.endpoint.address);
    if travels == Travels::Http2 {
        return http2_exchange(worker, server, head, to.limit, to.grpc_deadline(), &to.waits).await;
    }
    let kept = if to.fresh { None } else { take_kept(worker, server, head) };
    let reused = kept.is_some();
    let (reader, writer) = match kept {
        Some(kept) => (kept.reader, kept.writer),
        None => worker.http1.connect(server, to.limit).await?,
    };
    Ok(http1_exchange(reader, writer, head, reused))
}

/// A kept connection to an HTTP/1 server for a request with this head. The server may be closing it at this moment,
/// which can only happen because we keep it: the client has just opened its own. A request that could not be sent again
/// then takes a young one only, which its server is not about to close.
pub fn take_kept(worker: &Worker, server: Server, head: &Head) -> Option<Taken> {
    match survives_closing(head) {
        true => worker.http1.take(server),
        false => worker.http1.take_young(server),
    }
}

/// Whether a request with this head may be sent again that a server has not answered, and its body is surely short
/// enough to be kept for that (see [`End::may_repeat`](super::End::may_repeat)).
fn survives_closing(head: &Head) -> bool {
    let method = head.request_line().0;
    let fits = match head.framing {
        Framing::None => true,
        Framing::Length(length) => length <= u64::from(STREAM_CREDIT),
        Framing::Chunked | Framing::UntilClose => false,
    };
    fits && matches!(method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE") && !head.upgrade
}

/// The head of a stream, with what is left of the request's time now.
fn block(to: &Opening<'_>, head: &Head, travels: Travels) -> BytesMut {
    let mut block = BytesMut::with_capacity(1024);
    let left = to.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let fields = Fields {
        protocol: travels,
        service: to.backend.service(),
        attempt: to.attempt,
        deadline_ms: left.map(milliseconds),
        ..Fields::default()
    };
    fields.encode(&mut block);
    renewed(head, to.grpc_deadline()).write(&mut block, false);
    block
}

/// A head whose `grpc-timeout` says what is left. Copied only where it says something else, as after connecting.
fn renewed(head: &Head, grpc_deadline: Option<Instant>) -> Cow<'_, Head> {
    let is_outdated = |deadline| {
        let value = head.header(grpc::TIMEOUT);
        value.is_some_and(|value| grpc::renewed_timeout(value, deadline).is_some())
    };
    match grpc_deadline {
        Some(deadline) if is_outdated(deadline) => {
            let mut head = head.clone();
            grpc::renew_timeout(&mut head, deadline);
            Cow::Owned(head)
        }
        _ => Cow::Borrowed(head),
    }
}

/// What is left, for the server's sidecar. Nothing once the time is up: what is expired is refused there.
fn milliseconds(left: Duration) -> u32 {
    if left.is_zero() {
        return 0;
    }
    u32::try_from(left.as_millis() + MARGIN_MS).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::backend::{Ask, Backends};
    use crate::call::Call;
    use crate::config::{Destination, Endpoint, PodRoute, Protocol};
    use crate::http1::conn::split;
    use crate::http1::head::parse_request;

    /// What the head of a stream says of the time that is left: the field, and `grpc-timeout`.
    fn told(mut block: bytes::Bytes) -> (Option<u32>, String) {
        let fields = Fields::decode(&mut block).unwrap();
        let text = String::from_utf8(block.to_vec()).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("grpc-timeout: ")).unwrap();
        (fields.deadline_ms, line.to_owned())
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_is_written_after_connecting_does_not_promise_the_time_that_connecting_took() {
        let endpoint = Endpoint::at(SocketAddr::from(([192, 0, 2, 1], 80)));
        let pod = Destination::Pod(PodRoute { endpoint, protocol: Protocol::Http2 });
        let backend = Backends::of_client("client").of(&pod).unwrap();
        let upstream = backend.pick(&Ask::default()).unwrap();
        let to = Opening {
            route: None,
            backend: &backend,
            upstream: &upstream,
            attempt: 0,
            fresh: false,
            limit: Duration::from_secs(3),
            deadline: Some(Instant::now() + Duration::from_secs(5)),
            renews_grpc_timeout: true,
            waits: Cell::new(false),
        };
        let mut head = Head::answer(200, "", 0);
        head.push("grpc-timeout", "5S");
        let write = |to: &Opening<'_>| told(block(to, &head, Travels::Http2).freeze());
        assert_eq!(write(&to), (Some(5_005), "5S".to_owned()));
        tokio::time::advance(Duration::from_millis(1_200)).await;
        assert_eq!(write(&to), (Some(3_805), "3800m".to_owned()));
        let of_policy = Opening { renews_grpc_timeout: false, ..to };
        assert_eq!(write(&of_policy), (Some(3_805), "5S".to_owned()));
    }

    #[tokio::test]
    async fn what_survives_a_kept_connection_that_closes_is_what_may_be_sent_again() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut reader, mut writer) = split(stream, BytesMut::new());
        let mut of = |method: &str, framing, upgrade| {
            let line = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
            let head = parse_request(&mut BytesMut::from(line.as_bytes())).unwrap().unwrap();
            let call = Call::http1(Head { framing, upgrade, ..head }, &mut reader, &mut writer);
            (survives_closing(&call.head), call.is_idempotent())
        };
        for method in ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "POST", "PATCH", "get", "PURGE"] {
            for upgrade in [false, true] {
                let (survives, is_idempotent) = of(method, Framing::None, upgrade);
                assert_eq!(survives, is_idempotent, "{method}, {upgrade}");
            }
        }
        let most = u64::from(STREAM_CREDIT);
        let framings = [Framing::Length(most), Framing::Length(most + 1), Framing::Chunked];
        assert_eq!(framings.map(|framing| of("PUT", framing, false).0), [true, false, false]);
        assert!(!of("POST", Framing::Length(2), false).0);
    }

    #[test]
    fn the_servers_sidecar_never_ends_a_request_before_its_clients_does() {
        for left in [Duration::from_micros(1), Duration::from_micros(4_999), Duration::from_secs(2)] {
            let told = Duration::from_millis(milliseconds(left).into());
            // Timers have a grain of one millisecond, at both ends.
            assert!(told >= left + Duration::from_millis(2), "{left:?}: {told:?}");
        }
        assert_eq!(milliseconds(Duration::ZERO), 0, "what is expired stays expired");
        assert_eq!(milliseconds(Duration::from_secs(u32::MAX.into())), u32::MAX);
    }
}
