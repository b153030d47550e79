//! HTTP/2 on the application's side, through the `h2` crate with limits of our own. Between sidecars
//! the message travels as a head in HTTP/1 text and DATA, with trailers.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};

use crate::error::Failure;
use crate::http1::{Framing, Head, MAX_HEADERS, Part, Start};
use crate::message::PumpError;

/// The longest list of headers that a peer may send; h2's own default is 16 MiB.
pub const MAX_HEADER_LIST: u32 = 32 * 1024;
/// Streams that a peer may have open.
pub const MAX_STREAMS: u32 = 100;
/// Bytes under way on a stream.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes under way on a connection.
pub const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// Bytes under way on a stream of a server: many clients share its connection, and one that reads slowly must
/// not use up what the others need.
const SHARED_STREAM_WINDOW: u32 = 64 * 1024;
/// Resets that are remembered or waited for (CVE-2023-44487, CVE-2025-8671).
pub const MAX_RESETS: usize = 50;

/// A server's settings.
pub fn server() -> h2::server::Builder {
    let mut builder = h2::server::Builder::new();
    builder
        .max_header_list_size(MAX_HEADER_LIST)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .max_send_buffer_size(STREAM_WINDOW as usize);
    builder
}

/// A client's settings.
pub fn client() -> h2::client::Builder {
    let mut builder = h2::client::Builder::new();
    builder
        .max_header_list_size(MAX_HEADER_LIST)
        .initial_window_size(SHARED_STREAM_WINDOW)
        .initial_connection_window_size(SHARED_STREAM_WINDOW * MAX_STREAMS)
        .max_concurrent_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(Some(MAX_RESETS))
        .max_send_buffer_size(STREAM_WINDOW as usize)
        .enable_push(false);
    builder
}

/// Ends the answer with this head as broken off. A gRPC client is told that the server is not available, as
/// without a mesh: for it a reset would mean that it had cancelled the call itself.
pub fn break_off(stream: &mut h2::SendStream<Bytes>, head: &Head) {
    let grpc = head.header("content-type").is_some_and(|value| value.starts_with(b"application/grpc"));
    if grpc {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("14"));
        trailers.insert(
            "grpc-message",
            HeaderValue::from_static("tulle: the server ended before its answer was complete"),
        );
        if stream.send_trailers(trailers).is_ok() {
            return;
        }
    }
    stream.send_reset(h2::Reason::INTERNAL_ERROR);
}

/// The next part of a body.
///
/// # Errors
/// [`PumpError`] of the source.
pub async fn next_part(stream: &mut h2::RecvStream) -> Result<Part, PumpError> {
    if let Some(data) = stream.data().await {
        let bytes = data.map_err(|_| PumpError::SourceGone)?;
        stream.flow_control().release_capacity(bytes.len()).map_err(|_| PumpError::SourceGone)?;
        return Ok(Part::Data(bytes));
    }
    match stream.trailers().await.map_err(|_| PumpError::SourceGone)? {
        Some(trailers) => Ok(Part::Trailers(lines(&trailers))),
        None => Ok(Part::End),
    }
}

/// Sends bytes as the peer grants room for them.
///
/// # Errors
/// [`PumpError::SinkGone`].
pub async fn send(stream: &mut h2::SendStream<Bytes>, mut bytes: Bytes) -> Result<(), PumpError> {
    while !bytes.is_empty() {
        stream.reserve_capacity(bytes.len());
        let room = poll_fn(|cx| stream.poll_capacity(cx)).await;
        let room = room.ok_or(PumpError::SinkGone)?.map_err(|_| PumpError::SinkGone)?;
        let piece = bytes.split_to(room.min(bytes.len()));
        stream.send_data(piece, false).map_err(|_| PumpError::SinkGone)?;
    }
    Ok(())
}

/// Ends a body.
///
/// # Errors
/// [`PumpError::SinkGone`].
pub fn finish(
    stream: &mut h2::SendStream<Bytes>,
    trailers: Option<Vec<(Bytes, Bytes)>>,
) -> Result<(), PumpError> {
    let sent = match trailers {
        Some(trailers) => stream.send_trailers(map(&trailers)),
        None => stream.send_data(Bytes::new(), true),
    };
    sent.map_err(|_| PumpError::SinkGone)
}

/// Trailers as they travel between sidecars.
pub fn trailer_block(trailers: &[(Bytes, Bytes)]) -> Bytes {
    let mut block = BytesMut::new();
    for (name, value) in trailers {
        for part in [name.as_ref(), b": ", value.as_ref(), b"\r\n"] {
            block.extend_from_slice(part);
        }
    }
    block.extend_from_slice(b"\r\n");
    block.freeze()
}

/// A request of an HTTP/2 client as a head. `end`: it has no body.
///
/// # Errors
/// [`Failure::ClientBadRequest`] for what could be read in two ways.
pub fn request_head(parts: &http::request::Parts, end: bool) -> Result<Head, Failure> {
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    if parts.method == http::Method::CONNECT {
        return Err(Failure::ClientBadRequest("CONNECT is not offered"));
    }
    if !path.starts_with('/') && path != "*" {
        return Err(Failure::ClientBadRequest("a path without a slash"));
    }
    if parts.headers.len() > MAX_HEADERS {
        return Err(Failure::ClientBadRequest("more than 100 header lines"));
    }
    let mut headers = lines(&parts.headers);
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let host = parts.headers.get(http::header::HOST).and_then(|host| host.to_str().ok());
    match (authority, host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(Failure::ClientBadRequest("Host and :authority name different hosts"));
        }
        (Some(authority), None) => {
            headers.insert(0, (Bytes::from_static(b"host"), Bytes::copy_from_slice(authority.as_bytes())));
        }
        _ => {}
    }
    let start = Start::Request {
        method: Bytes::copy_from_slice(parts.method.as_str().as_bytes()),
        target: Bytes::copy_from_slice(path.as_bytes()),
    };
    let framing = framing(&mut headers, end)?;
    Ok(head(start, headers, framing))
}

/// An answer of an HTTP/2 server as a head.
///
/// # Errors
/// [`Failure::UpstreamBadResponse`] for a length that is none.
pub fn response_head(parts: &http::response::Parts, end: bool) -> Result<Head, Failure> {
    let mut headers = lines(&parts.headers);
    let framing =
        framing(&mut headers, end).map_err(|_| Failure::UpstreamBadResponse("a bad content-length"))?;
    let start = Start::Response { status: parts.status.as_u16(), reason: Bytes::new() };
    Ok(head(start, headers, framing))
}

/// HTTP/2 knows no connection handling in heads: each stream ends by itself.
fn head(start: Start, headers: Vec<(Bytes, Bytes)>, framing: Framing) -> Head {
    Head { start, headers, framing, keep_alive: true, upgrade: false, expects_continue: false, http10: false }
}

/// The declared length, taken out of the headers; without one, the end is where the stream's is.
fn framing(headers: &mut Vec<(Bytes, Bytes)>, end: bool) -> Result<Framing, Failure> {
    let mut length = None;
    let mut bad = false;
    headers.retain(|(name, value)| {
        if &name[..] != b"content-length" {
            return true;
        }
        let plain = !value.is_empty() && value.len() <= 19 && value.iter().all(u8::is_ascii_digit);
        let number = std::str::from_utf8(value).ok().and_then(|text| text.parse::<u64>().ok());
        bad |= !plain || (length.is_some() && length != number);
        length = number;
        // An answer to HEAD keeps its length as content.
        end && number != Some(0)
    });
    if bad {
        return Err(Failure::ClientBadRequest("a Content-Length that is not a plain number"));
    }
    Ok(match (end, length) {
        (true, _) => Framing::None,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::Chunked,
    })
}

/// A head as an HTTP/2 request for `authority`.
///
/// # Errors
/// [`Failure::ClientBadRequest`] when a name or value cannot be sent.
pub fn to_request(head: &Head) -> Result<Request<()>, Failure> {
    let bad = |_| Failure::ClientBadRequest("a head that HTTP/2 cannot carry");
    let (method, target) = head.request_line();
    let authority = head.header("host").map_or(&b""[..], |host| &host[..]);
    let uri = http::Uri::builder().scheme("http").authority(authority).path_and_query(target);
    let mut request = Request::builder().version(http::Version::HTTP_2).method(method);
    if let Some(headers) = request.headers_mut() {
        *headers = map(&head.headers);
        headers.remove(http::header::HOST);
        insert_length(headers, head.framing);
        if head.header("grpc-encoding").is_some()
            || head.header("content-type").is_some_and(|t| t.starts_with(b"application/grpc"))
        {
            headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
        }
    }
    request.uri(uri.build().map_err(bad)?).body(()).map_err(bad)
}

/// A head as an HTTP/2 response.
///
/// # Errors
/// [`Failure::UpstreamBadResponse`] when it cannot be sent.
pub fn to_response(head: &Head) -> Result<Response<()>, Failure> {
    let mut response = Response::builder().status(head.status());
    if let Some(headers) = response.headers_mut() {
        *headers = map(&head.headers);
        insert_length(headers, head.framing);
    }
    response.body(()).map_err(|_| Failure::UpstreamBadResponse("a head that HTTP/2 cannot carry"))
}

fn insert_length(headers: &mut HeaderMap, framing: Framing) {
    if let Framing::Length(length) = framing {
        headers.insert(http::header::CONTENT_LENGTH, HeaderValue::from(length));
    }
}

fn lines(headers: &HeaderMap) -> Vec<(Bytes, Bytes)> {
    let hop = |name: &HeaderName| {
        matches!(
            name.as_str(),
            "connection" | "keep-alive" | "proxy-connection" | "te" | "transfer-encoding" | "upgrade"
        )
    };
    let kept = headers.iter().filter(|(name, _)| !hop(name));
    kept.map(|(name, value)| {
        (Bytes::copy_from_slice(name.as_str().as_bytes()), Bytes::copy_from_slice(value.as_bytes()))
    })
    .collect()
}

fn map(lines: &[(Bytes, Bytes)]) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(lines.len());
    for (name, value) in lines {
        let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) else {
            continue;
        };
        headers.append(name, value);
    }
    headers
}
