//! The listeners of the query API, and what a connection may take: a client that sends nothing, sends without end, or comes
//! a thousand times must not reach what sidecars need.

use std::io::{self, Cursor, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::http::Request;
use axum::response::Response;
use futures::future::join_all;
use hyper::body::Incoming;
use hyper::rt::{Read, Write};
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use tower::ServiceExt;

use super::stalled::{Frames, Patient};
use super::{Api, routes};

/// What HTTP/2 begins with (RFC 9113, section 3.4). Clients of gRPC know beforehand that it is spoken here.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How long the head of a request may take, from the end of the request before it; how long a connection may take to show
/// its version, and how long one of HTTP/2 may be silent.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// What a head has left at least, whose first bytes took long.
const HEAD_LEFT: Duration = Duration::from_secs(1);
/// How long a client may take no byte of what it has asked for. A tap has a line every second.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);
/// What is buffered of a connection, in bytes: the longest head.
const MAX_BUFFER: usize = 64 * 1024;
/// The same of HTTP/2, and what a stream may send before it is read.
const MAX_WINDOW: u32 = 64 * 1024;
/// Streams of a connection at a time: as many as requests of one user.
const MAX_STREAMS: u32 = 4;
/// After this time a connection of HTTP/2 takes no more requests, and ends with those that it has, or once nothing is taken
/// of their answers for [`TAKEN_WITHIN`]. Its client connects again, so that nobody keeps a place for ever without a request.
const MAX_AGE: Duration = Duration::from_secs(300);
/// Connections at a time, of all listeners together. Others wait in the backlog.
const MAX_CONNECTIONS: usize = 128;

/// Listens on the loopback addresses. The pod may have one of the two families only.
///
/// # Errors
/// The port is taken on both.
pub async fn bind(port: u16) -> Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    let mut failure = None;
    for address in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        match TcpListener::bind((address, port)).await {
            Ok(listener) => listeners.push(listener),
            Err(error) => {
                tracing::warn!(%address, port, %error, "cannot listen for queries on this address");
                failure = Some(error);
            }
        }
    }
    match failure {
        Some(error) if listeners.is_empty() => {
            Err(error).with_context(|| format!("cannot listen on port {port} of the loopback addresses"))
        }
        _ => Ok(listeners),
    }
}

/// Serves the API on these listeners. Does not end.
pub async fn serve(listeners: Vec<TcpListener>, api: Api) {
    let routes = routes(api);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accept = |listener| accept(listener, routes.clone(), Arc::clone(&connections));
    join_all(listeners.into_iter().map(accept)).await;
}

async fn accept(listener: TcpListener, routes: Router, connections: Arc<Semaphore>) {
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&connections).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, say: waiting a little lets others close.
                tracing::warn!(%error, "cannot accept a connection for queries");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let routes = routes.clone();
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection(stream, routes).await {
                tracing::debug!(%error, "a connection for queries ended");
            }
        });
    }
}

/// Serves HTTP/2 on a connection that begins as it does, and HTTP/1 on others.
async fn connection(
    mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    routes: Router,
) -> Result<()> {
    let since = Instant::now();
    let begun = beginning(&mut stream, HEAD_WITHIN).await?;
    let is_http2 = begun.starts_with(PREFACE);
    let (reader, writer) = tokio::io::split(stream);
    let writer = Patient::new(writer, TAKEN_WITHIN);
    // What was read belongs to the connection.
    let stream = TokioIo::new(tokio::io::join(Cursor::new(begun).chain(reader), writer));
    match is_http2 {
        true => serve_http2(stream, routes, sleep(MAX_AGE), TAKEN_WITHIN).await?,
        false => serve_http1(stream, routes, head_within(since.elapsed())).await?,
    }
    Ok(())
}

/// The first bytes of a connection: as many as show whether they are those of HTTP/2.
async fn beginning(stream: &mut (impl AsyncRead + Unpin), within: Duration) -> io::Result<Vec<u8>> {
    let read = async {
        let mut begun = Vec::with_capacity(PREFACE.len());
        while begun.len() < PREFACE.len() && PREFACE.starts_with(&begun) {
            if stream.read_buf(&mut begun).await? == 0 {
                break;
            }
        }
        Ok::<_, io::Error>(begun)
    };
    match timeout(within, read).await {
        Ok(begun) => begun,
        Err(_) => {
            Err(io::Error::new(ErrorKind::TimedOut, "the client does not show the version of HTTP in time"))
        }
    }
}

/// How long the head of the first request may take yet, after its first bytes have taken so long. Requests after it have no
/// longer: a slow client connects again.
fn head_within(taken: Duration) -> Duration {
    HEAD_WITHIN.saturating_sub(taken).max(HEAD_LEFT)
}

async fn serve_http1(
    stream: impl Read + Write + Unpin + Send + 'static,
    routes: Router,
    head_within: Duration,
) -> Result<(), hyper::Error> {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(head_within).max_buf_size(MAX_BUFFER);
    server.serve_connection(stream, TowerToHyperService::new(routes)).await
}

/// `aged`: when the connection takes no more requests. `taken_within`: how long nothing may be taken of answers after that.
async fn serve_http2(
    stream: impl Read + Write + Unpin + Send + 'static,
    routes: Router,
    aged: impl Future<Output = ()>,
    taken_within: Duration,
) -> Result<(), hyper::Error> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_WINDOW)
        .initial_stream_window_size(MAX_WINDOW)
        .initial_connection_window_size(MAX_STREAMS * MAX_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(HEAD_WITHIN)
        .keep_alive_timeout(HEAD_WITHIN);
    let frames = Frames::default();
    let counted = frames.clone();
    let counting = move |response: Response| response.map(|body| counted.of(body));
    let service = ServiceExt::<Request<Incoming>>::map_response(routes, counting);
    let mut connection = pin!(server.serve_connection(stream, TowerToHyperService::new(service)));
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = aged => {}
    }
    connection.as_mut().graceful_shutdown();
    loop {
        let before = frames.count();
        match timeout(taken_within, connection.as_mut()).await {
            Ok(ended) => return ended,
            // A tap goes on, for one.
            Err(_) if frames.count() > before => {}
            Err(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use hyper::client::conn::http2 as http2_client;
    use tokio::io::AsyncWriteExt as _;
    use tokio::sync::oneshot;

    use super::*;
    use crate::api::tests::api;

    #[tokio::test]
    async fn a_head_that_is_too_long_is_refused_before_it_ends() {
        let (mut client, server) = tokio::io::duplex(16 * 1024);
        let served = tokio::spawn(connection(server, routes(api())));
        let (mut answer, mut head) = (Vec::new(), b"GET /api/v1/health HTTP/1.1\r\nx: ".to_vec());
        head.resize(4 * MAX_BUFFER, b'a');
        let (mut reader, mut writer) = tokio::io::split(&mut client);
        // It does not end: without a limit, the server would wait for more.
        let write = async { writer.write_all(&head).await };
        let (_, read) = tokio::join!(write, reader.read_to_end(&mut answer));
        read.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(served.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_request_is_answered_on_its_connection() {
        let (mut client, server) = tokio::io::duplex(16 * 1024);
        tokio::spawn(connection(server, routes(api())));
        client.write_all(b"GET /api/v1/health HTTP/1.1\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    }

    #[tokio::test]
    async fn a_connection_that_begins_as_http2_is_known_by_its_whole_preface() {
        let (mut client, mut server) = tokio::io::duplex(16);
        let write = async {
            // In pieces: no more than 16 bytes fit.
            client.write_all(PREFACE).await.unwrap();
            client
        };
        let (_client, begun) = tokio::join!(write, beginning(&mut server, HEAD_WITHIN));
        assert_eq!(begun.unwrap(), PREFACE);
    }

    #[tokio::test]
    async fn a_request_of_http1_shows_itself_by_its_first_bytes() {
        for request in ["GET / HTTP/1.1\r\n\r\n", "POST", "PRI * HTTP/1.1\r\n"] {
            // The client does not end: whoever waited for more bytes would not be answered.
            let (mut client, mut server) = tokio::io::duplex(1024);
            client.write_all(request.as_bytes()).await.unwrap();
            let begun = beginning(&mut server, HEAD_WITHIN).await.unwrap();
            assert_eq!(begun, request.as_bytes());
            assert!(!begun.starts_with(PREFACE));
        }
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_is_not_waited_for() {
        for begun in [&b""[..], b"PRI"] {
            let (mut client, mut server) = tokio::io::duplex(1024);
            client.write_all(begun).await.unwrap();
            let error = beginning(&mut server, Duration::ZERO).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::TimedOut);
        }
    }

    #[tokio::test]
    async fn an_answer_that_is_not_taken_does_not_keep_a_connection_that_takes_no_more_requests() {
        let (client, server) = tokio::io::duplex(16 * 1024);
        let (end, ended) = oneshot::channel::<()>();
        let aged = async move {
            let _ = ended.await;
        };
        let served = tokio::spawn(serve_http2(TokioIo::new(server), routes(api()), aged, Duration::ZERO));
        let mut builder = http2_client::Builder::new(TokioExecutor::new());
        // The head of an answer arrives, and nothing of its body.
        builder.initial_stream_window_size(0);
        let (mut sender, connection) = builder.handshake::<_, Body>(TokioIo::new(client)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get("http://localhost/api/v1/health").body(Body::empty()).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 401);
        end.send(()).unwrap();
        let served = timeout(Duration::from_secs(60), served).await;
        served.expect("the connection is served on").unwrap().unwrap();
        drop((answer, sender));
    }

    #[test]
    fn the_head_of_a_request_gets_what_its_first_bytes_have_left() {
        assert_eq!(head_within(Duration::ZERO), HEAD_WITHIN);
        assert_eq!(head_within(Duration::from_secs(6)), Duration::from_secs(4));
        // The rest may have arrived with the last of them.
        assert_eq!(head_within(HEAD_WITHIN), HEAD_LEFT);
    }
}
