//! Opens an exchange with an endpoint: on a stream to its sidecar where it has one, with itself where not.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use super::exchange::{Exchange, UpSink, UpSource, http1_exchange, http2_exchange, is_bodiless};
use crate::backend::{Backend, Upstream};
use crate::claim::set_client_id;
use crate::error::Failure;
use crate::http1::Head;
use crate::pool::Server;
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
    /// How long the answer may take to begin, which the server's sidecar is told; `None`: as long as it takes.
    pub left: Option<Duration>,
    /// The route that has changed the request; `None`: none has.
    pub route: Option<&'a Arc<str>>,
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
    let server = Server::from(address);
    let Some(identity) = &to.upstream.endpoint.identity else {
        return open_plain(worker, server, head, travels, to.fresh, to.limit).await;
    };
    if worker.is_own(address) {
        // Past our own inbound side: what it would tell the application is told here.
        let mut head = head.clone();
        set_client_id(&mut head, Some(to.upstream.identity_text()));
        return Box::pin(open_plain(worker, server, &head, travels, to.fresh, to.limit)).await;
    }
    let mut block = BytesMut::with_capacity(1024);
    let fields = Fields {
        protocol: travels,
        service: to.backend.service(),
        attempt: to.attempt,
        deadline_ms: to.left.map(milliseconds),
        ..Fields::default()
    };
    fields.encode(&mut block);
    let fields = block.len();
    head.write(&mut block, false);
    if !head.fits_a_stream(block.len() - fields) {
        // Only what a route adds makes a head too long that a client could send.
        let too_long = |route| Failure::RouteHeadTooLong(Arc::clone(route));
        return Err(to.route.map_or(Failure::ClientHeadTooLong, too_long));
    }
    let (sender, receiver) = worker.mesh.open(address, identity, &block, is_bodiless(head), to.limit).await?;
    Ok(Exchange {
        sink: UpSink::Mesh(sender),
        source: UpSource::Mesh(receiver),
        reused: false,
        place: None,
        waiting: None,
    })
}

/// What is left, for the server's sidecar. Nothing once the time is up: what is expired is refused there.
fn milliseconds(left: Duration) -> u32 {
    if left.is_zero() {
        return 0;
    }
    u32::try_from(left.as_millis() + MARGIN_MS).unwrap_or(u32::MAX)
}

/// Opens an exchange with a server that has no sidecar. `fresh`: not on a connection that was kept.
///
/// # Errors
/// [`Failure`] of connecting; nothing of the request was sent.
pub async fn open_plain(
    worker: &Worker,
    server: Server,
    head: &Head,
    travels: Travels,
    fresh: bool,
    limit: Duration,
) -> Result<Exchange, Failure> {
    if travels == Travels::Http2 {
        return http2_exchange(worker, server, head, limit).await;
    }
    let kept = if fresh { None } else { worker.http1.take(server) };
    let reused = kept.is_some();
    let (reader, writer) = match kept {
        Some(kept) => kept,
        None => worker.http1.connect(server, limit).await?,
    };
    Ok(http1_exchange(reader, writer, head, reused))
}

#[cfg(test)]
mod tests {
    use super::*;

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
