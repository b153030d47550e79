//! Heads of HTTP/2 messages.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};

use crate::error::Failure;
use crate::grpc;
use crate::http1::{Framing, Head, MAX_HEAD, MAX_HEADERS, Start};
use crate::message::PumpError;

/// A request of an HTTP/2 client as a head. `end`: it has no body.
///
/// # Errors
/// [`Failure::ClientBadRequest`] for what could be read in two ways, [`Failure::ClientHeadTooLong`].
pub fn request_head(parts: &http::request::Parts, end: bool) -> Result<Head, Failure> {
    let connect = parts.method == http::Method::CONNECT;
    let authority = parts.uri.authority().map(|authority| authority.as_str());
    let target = match (connect, authority) {
        (true, Some(authority)) => authority,
        (true, None) => return Err(Failure::ClientBadRequest("a CONNECT without :authority")),
        (false, _) => parts.uri.path_and_query().map_or("/", |path| path.as_str()),
    };
    if connect && parts.uri.port().is_none() {
        return Err(Failure::ClientBadRequest("a CONNECT whose target is not a host and a port"));
    }
    if !connect && !target.starts_with('/') && (target != "*" || parts.method != http::Method::OPTIONS) {
        return Err(Failure::ClientBadRequest("a path without a slash"));
    }
    // RFC 9113 §8.3.1: without user information, which some would take for the host.
    if authority.is_some_and(|authority| authority.contains('@')) {
        return Err(Failure::ClientBadRequest("user information in :authority"));
    }
    if is_too_large(target, authority, &parts.headers) {
        return Err(Failure::ClientHeadTooLong);
    }
    let mut headers = lines(&parts.headers);
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
        target: Bytes::copy_from_slice(target.as_bytes()),
    };
    let framing = framing(&mut headers, end)?;
    if connect && !matches!(framing, Framing::None | Framing::Chunked | Framing::Length(0)) {
        return Err(Failure::ClientBadRequest("a CONNECT with a body"));
    }
    // What follows a CONNECT is the tunnel.
    let framing = if connect { Framing::None } else { framing };
    Ok(Head { upgrade: connect, ..head(start, headers, framing) })
}

/// Whether the head would be longer than HTTP/1 may bring, written as HTTP/1.
fn is_too_large(target: &str, authority: Option<&str>, headers: &HeaderMap) -> bool {
    let start = target.len() + authority.map_or(0, str::len) + 32;
    let length: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    headers.len() > MAX_HEADERS || start + length > MAX_HEAD
}

/// An answer of an HTTP/2 server as a head, to a request that was not CONNECT.
///
/// # Errors
/// [`Failure::UpstreamBadResponse`] for a Content-Length that is not a number.
pub fn response_head(parts: &http::response::Parts, end: bool) -> Result<Head, Failure> {
    let mut headers = lines(&parts.headers);
    let framing =
        framing(&mut headers, end).map_err(|_| Failure::UpstreamBadResponse("a bad content-length"))?;
    let start = Start::Response { status: parts.status.as_u16(), reason: Bytes::new() };
    Ok(head(start, headers, framing))
}

/// An answer of an HTTP/2 server as a head, to a request with this method. Success makes a CONNECT a
/// tunnel, of which the head says nothing (RFC 9110 §9.3.6).
///
/// # Errors
/// As [`response_head`].
pub fn response_head_for(method: &[u8], parts: &http::response::Parts, end: bool) -> Result<Head, Failure> {
    // An answer without a body may say how long another one would be, and its stream may end with a frame of its own.
    let bodiless = method == b"HEAD" || matches!(parts.status.as_u16(), 204 | 304);
    let mut head = response_head(parts, end || bodiless)?;
    if method == b"CONNECT" && parts.status.is_success() {
        head.headers.retain(|(name, _)| &name[..] != b"content-length");
        head.framing = Framing::None;
        head.upgrade = true;
    }
    Ok(head)
}

/// What a server answers.
#[derive(Debug)]
pub enum Answered {
    /// An interim response (1xx); more follows.
    Interim(Head),
    /// The head of the response, and its body.
    Final(http::response::Parts, h2::RecvStream),
}

/// The next head that a server answers with. May be given up and called again, until it has returned
/// [`Answered::Final`] or an error.
///
/// # Errors
/// Those of h2: the stream or its connection has ended.
pub async fn answer(response: &mut h2::client::ResponseFuture) -> Result<Answered, h2::Error> {
    poll_fn(|cx| {
        // First, since the future itself drops the interim ones.
        if let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
            let (parts, ()) = interim?.into_parts();
            return Poll::Ready(Ok(Answered::Interim(interim_head(&parts))));
        }
        Pin::new(&mut *response).poll(cx).map_ok(|response| {
            let (parts, body) = response.into_parts();
            Answered::Final(parts, body)
        })
    })
    .await
}

fn interim_head(parts: &http::response::Parts) -> Head {
    let start = Start::Response { status: parts.status.as_u16(), reason: Bytes::new() };
    let mut headers = lines(&parts.headers);
    headers.retain(|(name, _)| &name[..] != b"content-length");
    head(start, headers, Framing::None)
}

/// Passes an interim response on to a client. 101 has no meaning in HTTP/2 (RFC 9113 §8.6).
///
/// # Errors
/// [`PumpError::SinkRefused`] for a head that HTTP/2 cannot carry, [`PumpError::SinkGone`].
pub fn interim(respond: &mut h2::server::SendResponse<Bytes>, head: &Head) -> Result<(), PumpError> {
    if head.status() == 101 {
        return Ok(());
    }
    let response = to_response(head).map_err(|_| PumpError::SinkRefused("an interim head"))?;
    respond.send_informational(response).map_err(|_| PumpError::SinkGone)
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
        // Said, it arrives: some servers want to know that a POST has no body.
        (true, Some(0)) => Framing::Length(0),
        (true, _) => Framing::None,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::Chunked,
    })
}

/// A head as an HTTP/2 request; an absolute target is taken apart. The stream of one that asks for a tunnel (CONNECT) must not be ended with
/// its head.
///
/// # Errors
/// [`Failure::ClientBadRequest`] when a name or value cannot be sent.
pub fn to_request(head: &Head) -> Result<Request<()>, Failure> {
    let bad = |_| Failure::ClientBadRequest("a head that HTTP/2 cannot carry");
    let (method, target) = head.request_line();
    let uri = if head.is_connect() {
        http::Uri::builder().authority(target)
    } else {
        let authority = head.header("host").map_or(&b""[..], |host| &host[..]);
        http::Uri::builder().scheme("http").authority(authority).path_and_query(head.path())
    };
    let mut request = Request::builder().version(http::Version::HTTP_2).method(method);
    if let Some(headers) = request.headers_mut() {
        *headers = map(&head.headers);
        headers.remove(http::header::HOST);
        insert_length(headers, head.framing);
        if head.expects_continue {
            headers.insert(http::header::EXPECT, HeaderValue::from_static("100-continue"));
        }
        if head.header("grpc-encoding").is_some() || grpc::content_type(head).is_some() {
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

pub(super) fn lines(headers: &HeaderMap) -> Vec<(Bytes, Bytes)> {
    let hop = |name: &HeaderName| {
        matches!(
            name.as_str(),
            "connection" | "keep-alive" | "proxy-connection" | "te" | "transfer-encoding" | "upgrade"
        )
    };
    let kept = || headers.iter().filter(|(name, _)| !hop(name));
    // One allocation for the text of all lines, of which each is a part.
    let length = kept().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let mut text = BytesMut::with_capacity(length);
    let mut lines = Vec::with_capacity(headers.len() + 1);
    for (name, value) in kept() {
        text.extend_from_slice(name.as_str().as_bytes());
        let name = text.split().freeze();
        text.extend_from_slice(value.as_bytes());
        lines.push((name, text.split().freeze()));
    }
    lines
}

pub(super) fn map(lines: &[(Bytes, Bytes)]) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(lines.len());
    for (name, value) in lines {
        // The only field of one connection that a head may hold (see `Head::upgrade`).
        if name.eq_ignore_ascii_case(b"upgrade") {
            continue;
        }
        let value = HeaderValue::from_maybe_shared(value.clone());
        let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), value) else { continue };
        headers.append(name, value);
    }
    headers
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(method: &str, uri: &str, headers: &[(&'static str, &str)]) -> http::request::Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_connect_asks_for_a_tunnel_and_is_carried_like_that_of_http_1() {
        let head = request_head(&parts("CONNECT", "a:443", &[]), false).unwrap();
        assert!(head.is_connect() && head.upgrade && head.framing == Framing::None);
        let mut text = bytes::BytesMut::new();
        head.write(&mut text, false);
        assert_eq!(&text[..], b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n");
        let again = crate::http1::head::parse_request(&mut text).unwrap().unwrap();
        let request = to_request(&again).unwrap();
        assert_eq!((request.method().as_str(), request.uri().to_string()), ("CONNECT", "a:443".to_owned()));

        let success = Response::builder().status(200).header("content-length", "5").body(()).unwrap();
        let (success, ()) = success.into_parts();
        let tunnel = response_head_for(b"CONNECT", &success, false).unwrap();
        assert_eq!((tunnel.framing, tunnel.opens_tunnel(&head)), (Framing::None, Ok(true)));
        assert!(tunnel.header("content-length").is_none());
        assert_eq!(response_head_for(b"GET", &success, false).unwrap().framing, Framing::Length(5));
    }

    #[test]
    fn an_answer_without_a_body_has_none_wherever_its_stream_ends() {
        for (method, status) in [(&b"HEAD"[..], 200), (b"GET", 304), (b"GET", 204)] {
            for end in [false, true] {
                let answer =
                    Response::builder().status(status).header("content-length", "5").body(()).unwrap();
                let head = response_head_for(method, &answer.into_parts().0, end).unwrap();
                assert_eq!(head.framing, Framing::None, "{status}");
                assert_eq!(head.header("content-length").unwrap(), "5", "{status}");
            }
        }
    }

    #[test]
    fn a_client_that_waits_for_100_is_heard_by_the_server_also_behind_two_sidecars() {
        let asked = parts("POST", "http://a/", &[("expect", "100-continue"), ("content-length", "5")]);
        let mut text = bytes::BytesMut::new();
        request_head(&asked, false).unwrap().write(&mut text, false);
        let head = crate::http1::head::parse_request(&mut text).unwrap().unwrap();
        assert_eq!(to_request(&head).unwrap().headers()["expect"], "100-continue");
    }

    #[test]
    fn requests_with_two_readings_are_refused() {
        let refused = [
            parts("CONNECT", "a", &[]),
            parts("CONNECT", "a:443", &[("content-length", "5")]),
            parts("GET", "http://u@a/", &[]),
            parts("GET", "http://a/", &[("host", "b")]),
            parts("GET", "*", &[("host", "a")]),
            parts("POST", "http://a/", &[("content-length", "+5")]),
            parts("POST", "http://a/", &[("content-length", "5"), ("content-length", "6")]),
        ];
        for parts in refused {
            let head = request_head(&parts, false);
            assert!(matches!(head, Err(Failure::ClientBadRequest(_))), "{parts:?}");
        }
    }

    #[test]
    fn heads_beyond_the_limits_are_too_long() {
        let long = "x".repeat(MAX_HEAD);
        assert!(request_head(&parts("GET", "http://a/", &[("x", &long[..MAX_HEAD - 100])]), true).is_ok());
        let too_long = request_head(&parts("GET", "http://a/", &[("x", &long)]), true);
        assert_eq!(too_long, Err(Failure::ClientHeadTooLong));
        let too_many = request_head(&parts("GET", "http://a/", &[("x", "y"); MAX_HEADERS + 1]), true);
        assert_eq!(too_many, Err(Failure::ClientHeadTooLong));
    }

    #[test]
    fn an_upgrade_never_reaches_http_2() {
        let text =
            &b"GET http://a:80/x HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n"[..];
        let head = crate::http1::head::parse_request(&mut text.into()).unwrap().unwrap();
        let request = to_request(&head).unwrap();
        assert!(request.headers().is_empty());
        assert_eq!(request.uri().to_string(), "http://a/x");
    }

    #[tokio::test]
    async fn interim_responses_pass_in_their_order() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let serving = tokio::spawn(async move {
            let mut connection = crate::http2::server().handshake::<_, Bytes>(far).await.unwrap();
            let (_request, mut respond) = connection.accept().await.unwrap().unwrap();
            for status in [100, 103, 101] {
                let mut head = Head::answer(status, "", 0);
                head.framing = Framing::None;
                interim(&mut respond, &head).unwrap();
            }
            respond.send_response(to_response(&Head::answer(200, "OK", 0)).unwrap(), true).unwrap();
            connection.accept().await.is_none()
        });
        let (send, connection) = crate::http2::client().handshake::<_, Bytes>(near).await.unwrap();
        let driving = tokio::spawn(connection);
        let request = Request::builder().uri("http://a/").body(()).unwrap();
        let (mut response, _body) = send.ready().await.unwrap().send_request(request, true).unwrap();
        let mut seen = Vec::new();
        loop {
            match answer(&mut response).await.unwrap() {
                Answered::Interim(head) => {
                    assert_eq!(head.header("content-type").unwrap(), "text/plain");
                    seen.push(head.status());
                }
                Answered::Final(parts, _) => {
                    seen.push(parts.status.as_u16());
                    break;
                }
            }
        }
        assert_eq!(seen, [100, 103, 200]);
        driving.abort();
        serving.await.unwrap();
    }
}
