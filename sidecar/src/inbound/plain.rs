//! Plain connections: clients without a sidecar, where the policy lets them.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::spawn_local;
use tokio::time::Instant;
use tulle_mesh::wire::head::Protocol as Travels;

use super::mesh::to_application;
use super::{Client, authorize, no_claims};
use crate::config::{Mtls, Protocol};
use crate::detect;
use crate::error::Failure;
use crate::forward::{Downstream, RequestBody};
use crate::http1::Head;
use crate::http1::conn::split;
use crate::http2;
use crate::io::Prefixed;
use crate::message::Source;
use crate::outbound::splice;
use crate::pool::{APP_TIMEOUT, connect, connect_within};
use crate::worker::Worker;

/// Reads the client's first bytes. Where plain text is accepted, the application may speak first: the
/// connection to it is then returned, with nothing read from it.
pub(super) async fn first_of_client(
    worker: &Rc<Worker>,
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    client: &Client,
) -> Result<Option<TcpStream>, Failure> {
    let gone = |_| Failure::ClientGone;
    buffer.reserve(4 * 1024);
    // A sidecar speaks at once; only who stays silent can be waiting for the application.
    let quick = tokio::time::timeout(std::time::Duration::from_millis(20), stream.read_buf(buffer)).await;
    if let Ok(read) = quick {
        return if read.map_err(gone)? == 0 { Err(Failure::ClientGone) } else { Ok(None) };
    }
    if worker.config.inbound().is_none_or(|inbound| inbound.mtls == Mtls::Strict) {
        return if stream.read_buf(buffer).await.map_err(gone)? == 0 {
            Err(Failure::ClientGone)
        } else {
            Ok(None)
        };
    }
    let Ok(app) = connect(client.destination).await else {
        reset_on_close(stream);
        return Err(Failure::UpstreamConnect);
    };
    tokio::select! {
        read = stream.read_buf(buffer) => {
            if read.map_err(gone)? == 0 { Err(Failure::ClientGone) } else { Ok(None) }
        }
        _ = app.readable() => Ok(Some(app)),
    }
}

/// Serves a plain connection. `app`: the application spoke first.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    mut stream: TcpStream,
    mut buffer: BytesMut,
    client: Client,
    app: Option<TcpStream>,
) -> Result<(), Failure> {
    if let Err(refused) = authorize::plaintext(worker) {
        reset_on_close(&stream);
        return Err(refuse_plaintext(worker, &client, refused));
    }
    if let Some(app) = app {
        return opaque(worker, stream, buffer, &client, Some(app)).await;
    }
    match detect::first_bytes(&mut stream, &mut buffer).await.map_err(|_| Failure::ClientGone)? {
        Protocol::Http1 => http1(worker, stream, buffer, &client).await,
        Protocol::Http2 => http2(worker, stream, buffer, client).await,
        Protocol::Opaque | Protocol::Detect => opaque(worker, stream, buffer, &client, None).await,
    }
}

fn refuse_plaintext(worker: &Worker, client: &Client, refused: Failure) -> Failure {
    worker.telemetry.event("policy_denied", "Plaintext");
    tracing::info!(client = %client.address, port = client.destination.port(), "refused plain text: mTLS is Strict");
    refused
}

async fn opaque(
    worker: &Rc<Worker>,
    stream: TcpStream,
    read: BytesMut,
    client: &Client,
    app: Option<TcpStream>,
) -> Result<(), Failure> {
    let series = worker.telemetry.inbound("", "_PLAIN", "", "opaque");
    if let Err(denied) = authorize::check(worker, client, None) {
        series.connection(Some(&denied), (0, 0));
        reset_on_close(&stream);
        return Err(denied);
    }
    let app = match app {
        Some(app) => app,
        None => {
            connect_within(client.destination, APP_TIMEOUT).await.inspect_err(|_| reset_on_close(&stream))?
        }
    };
    let stop = worker.config.inbound_becomes(|inbound| inbound.mtls == Mtls::Strict);
    let bytes = splice((stream, read), app, no_claims(worker, client), stop).await;
    let allowed = authorize::plaintext(worker).map_err(|failure| refuse_plaintext(worker, client, failure));
    series.connection(allowed.as_ref().err(), bytes);
    allowed
}

async fn http1(
    worker: &Rc<Worker>,
    stream: TcpStream,
    read: BytesMut,
    client: &Client,
) -> Result<(), Failure> {
    let (mut reader, mut writer) = split(stream, read);
    loop {
        let mut head = match reader.request().await {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(failure) => {
                Downstream::Http1(&mut writer).answer(&failure).await;
                return Err(failure);
            }
        };
        let framing = head.framing;
        let mut body = RequestBody::new(Source::Http1(&mut reader), framing);
        let mut down = Downstream::Http1(&mut writer);
        if !request(worker, client, &mut head, &mut body, &mut down, Travels::Http1).await {
            return Ok(());
        }
    }
}

async fn http2(
    worker: &Rc<Worker>,
    stream: TcpStream,
    read: BytesMut,
    client: Client,
) -> Result<(), Failure> {
    let handshake = http2::server().handshake::<_, Bytes>(Prefixed::new(stream, read)).await;
    let mut connection = handshake.map_err(|_| Failure::ClientBadRequest("no HTTP/2 handshake"))?;
    let client = Rc::new(client);
    while let Some(accepted) = connection.accept().await {
        let Ok((asked, mut respond)) = accepted else { return Err(Failure::ClientGone) };
        let (worker, client) = (Rc::clone(worker), Rc::clone(&client));
        spawn_local(async move {
            let (parts, mut body) = asked.into_parts();
            let head = http2::request_head(&parts, body.is_end_stream());
            let mut down = Downstream::Http2(&mut respond, None);
            match head {
                Ok(mut head) => {
                    let framing = head.framing;
                    let mut body = RequestBody::new(Source::Http2(&mut body), framing);
                    request(&worker, &client, &mut head, &mut body, &mut down, Travels::Http2).await;
                }
                Err(failure) => down.answer(&failure).await,
            }
        });
    }
    Ok(())
}

/// Serves one request; whether the client's connection may carry another.
async fn request(
    worker: &Rc<Worker>,
    client: &Client,
    head: &mut Head,
    body: &mut RequestBody<'_>,
    down: &mut Downstream<'_>,
    travels: Travels,
) -> bool {
    let since = Instant::now();
    let protocol = if travels == Travels::Http2 { "http2" } else { "http1" };
    let series = worker.telemetry.inbound("", "_PLAIN", "", protocol);
    // A connection that was let in may have been there before the policy.
    let plaintext = authorize::plaintext(worker).map_err(|failure| refuse_plaintext(worker, client, failure));
    let allowed = plaintext.and_then(|()| authorize::check(worker, client, Some(head.request_line())));
    if let Err(denied) = allowed {
        series.request(&Err(denied.clone()), None, since.elapsed(), (0, 0));
        down.answer(&denied).await;
        return false;
    }
    authorize::canonicalise(worker, head);
    client.introduce(head);
    worker.load.set(worker.load.get() + 1);
    let relayed = to_application(worker, client.destination, head, body, down, travels).await;
    worker.load.set(worker.load.get().saturating_sub(1));
    series.request(&relayed.result, relayed.grpc_status, since.elapsed(), relayed.bytes);
    if let (Err(failure), false) = (&relayed.result, relayed.answered) {
        down.answer(failure).await;
    }
    relayed.client_reusable
}

/// A connection that is refused is reset, so that the client sees it at once.
fn reset_on_close(stream: &TcpStream) {
    let _ = socket2::SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO));
}
