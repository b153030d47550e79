//! Heads of HTTP/2 messages.

use bytes::{Bytes, BytesMut};

use super::block::Block;
use super::hpack::{encode, is_lower_token, is_value};
use crate::error::Failure;
use crate::grpc;
use crate::http1::{Framing, Head, MAX_HEAD, MAX_HEADERS, Start};

/// A request of an HTTP/2 client as a head. `end`: it has no body.
///
/// # Errors
/// [`Failure::ClientBadRequest`] for what could be read in two ways, [`Failure::ClientHeadTooLong`].
pub fn request_head(block: &mut Block, end: bool) -> Result<Head, Failure> {
    if block.is_too_large {
        return Err(Failure::ClientHeadTooLong);
    }
    let method = block.method.take().unwrap_or_default();
    let connect = &method[..] == b"CONNECT";
    // Read with Host by some, and by others without.
    let authority = block.authority.take().filter(|authority| !authority.is_empty());
    let target = match (connect, block.path.take()) {
        (true, _) => {
            let target = authority.clone();
            target.ok_or(Failure::ClientBadRequest("a CONNECT without :authority"))?
        }
        (false, path) => path.unwrap_or_default(),
    };
    check_target(&method, &target, authority.as_deref())?;
    let headers = &mut block.headers;
    if is_too_large(&target, authority.as_ref(), headers) {
        return Err(Failure::ClientHeadTooLong);
    }
    let mut hosts = headers.iter().filter(|(name, _)| &name[..] == b"host").map(|(_, value)| value);
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Failure::ClientBadRequest("more than one Host"));
    }
    match (authority, host) {
        (Some(authority), Some(host)) if !authority.eq_ignore_ascii_case(host) => {
            return Err(Failure::ClientBadRequest("Host and :authority name different hosts"));
        }
        (Some(authority), None) => headers.insert(0, (Bytes::from_static(b"host"), authority)),
        _ => {}
    }
    let framing = framing(headers, end)?;
    if connect && !matches!(framing, Framing::None | Framing::Chunked | Framing::Length(0)) {
        return Err(Failure::ClientBadRequest("a CONNECT with a body"));
    }
    // What follows a CONNECT is the tunnel.
    let framing = if connect { Framing::None } else { framing };
    let start = Start::Request { method, target };
    Ok(Head { upgrade: connect, ..head(start, std::mem::take(headers), framing) })
}

/// Whether the first line of HTTP/1 can say as much, in one reading.
fn check_target(method: &[u8], target: &[u8], authority: Option<&[u8]>) -> Result<(), Failure> {
    let is_visible = |text: &[u8]| text.iter().all(|byte| *byte > b' ' && *byte != 0x7f);
    if !method.iter().all(|byte| is_lower_token(byte.to_ascii_lowercase())) {
        return Err(Failure::ClientBadRequest("a method that is no token"));
    }
    let authority = authority.unwrap_or_default();
    if !is_visible(target) || !is_visible(authority) {
        return Err(Failure::ClientBadRequest("a path or :authority with spaces"));
    }
    // As in HTTP/1: rules about paths could not judge it.
    if std::str::from_utf8(target).is_err() || std::str::from_utf8(authority).is_err() {
        return Err(Failure::ClientBadRequest("a path or :authority that is not UTF-8"));
    }
    if method != b"CONNECT" && target.contains(&b'#') {
        return Err(Failure::ClientBadRequest("a fragment in a path"));
    }
    // RFC 9113 §8.3.1: without user information, which some would take for the host.
    if authority.contains(&b'@') {
        return Err(Failure::ClientBadRequest("user information in :authority"));
    }
    if method == b"CONNECT" {
        let port = target.rsplit(|byte| *byte == b':').next().filter(|port| port.len() < target.len());
        let is_port = port.is_some_and(|port| !port.is_empty() && port.iter().all(u8::is_ascii_digit));
        if !is_port {
            return Err(Failure::ClientBadRequest("a CONNECT whose target is not a host and a port"));
        }
    } else if !target.starts_with(b"/") && (target != b"*" || method != b"OPTIONS") {
        return Err(Failure::ClientBadRequest("a path without a slash"));
    }
    Ok(())
}

/// Whether the head would be longer than HTTP/1 may bring, written as HTTP/1.
fn is_too_large(target: &[u8], authority: Option<&Bytes>, headers: &[(Bytes, Bytes)]) -> bool {
    let start = target.len() + authority.map_or(0, Bytes::len) + 32;
    let length: usize = headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    headers.len() > MAX_HEADERS || start + length > MAX_HEAD
}

/// What a server answers.
#[derive(Debug)]
pub enum Answered {
    /// An interim response (1xx); more follows.
    Interim(Head),
    /// The head of the response, and whether nothing follows.
    Final(Box<Block>, bool),
}

impl Answered {
    /// What a block says that the server has sent.
    pub(super) fn of(mut block: Box<Block>, end: bool) -> Self {
        let Some(status @ ..200) = block.status else { return Self::Final(block, end) };
        let mut headers = std::mem::take(&mut block.headers);
        headers.retain(|(name, _)| &name[..] != b"content-length");
        Self::Interim(head(Start::Response { status, reason: Bytes::new() }, headers, Framing::None))
    }
}

/// An answer of an HTTP/2 server as a head, to a request with this method. Success makes a CONNECT a
/// tunnel, of which the head says nothing (RFC 9110 §9.3.6).
///
/// # Errors
/// [`Failure::UpstreamBadResponse`] for a Content-Length that is not a number.
pub fn response_head(method: &[u8], block: Block, end: bool) -> Result<Head, Failure> {
    let Block { status, mut headers, .. } = block;
    let status = status.unwrap_or_default();
    // An answer without a body may say how long another one would be, and its stream may end with a frame of its own.
    let bodiless = method == b"HEAD" || matches!(status, 204 | 304);
    let framing = framing(&mut headers, end || bodiless)
        .map_err(|_| Failure::UpstreamBadResponse("a bad content-length"))?;
    let mut head = head(Start::Response { status, reason: Bytes::new() }, headers, framing);
    if method == b"CONNECT" && matches!(status, 200..300) {
        head.headers.retain(|(name, _)| &name[..] != b"content-length");
        head.framing = Framing::None;
        head.upgrade = true;
    }
    Ok(head)
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

/// Whether a head can be sent as an HTTP/2 request.
///
/// # Errors
/// [`Failure::ClientBadRequest`].
pub fn check_request(head: &Head) -> Result<(), Failure> {
    let (method, _) = head.request_line();
    let is_visible = |text: &[u8]| text.iter().all(|byte| *byte > b' ' && *byte != 0x7f);
    let host = head.header("host").map_or(&b""[..], |host| &host[..]);
    let is_path = head.is_connect() || (!head.path().is_empty() && is_visible(head.path().as_bytes()));
    if method.is_empty() || !is_visible(method.as_bytes()) || !is_visible(host) || !is_path {
        return Err(Failure::ClientBadRequest("a head that HTTP/2 cannot carry"));
    }
    Ok(())
}

/// Writes the fields of a request; an absolute target is taken apart. The stream of one that asks for a tunnel (CONNECT)
/// must not be ended with its head. `grpc_timeout` takes the place of its own.
pub(super) fn encode_request(to: &mut BytesMut, head: &Head, grpc_timeout: Option<&[u8]>) {
    let (method, target) = head.request_line();
    match method {
        "GET" => encode::indexed(to, encode::METHOD_GET),
        "POST" => encode::indexed(to, encode::METHOD_POST),
        _ => encode::with_name(to, encode::METHOD, method.as_bytes()),
    }
    if head.is_connect() {
        encode::with_name(to, encode::AUTHORITY, target.as_bytes());
    } else {
        encode::indexed(to, encode::SCHEME_HTTP);
        match head.path() {
            "/" => encode::indexed(to, encode::PATH_ROOT),
            path => encode::with_name(to, encode::PATH, path.as_bytes()),
        }
        if let Some(host) = head.header("host").filter(|host| !host.is_empty()) {
            encode::with_name(to, encode::AUTHORITY, host);
        }
    }
    for (name, value) in &head.headers {
        if name.eq_ignore_ascii_case(b"host") {
            continue;
        }
        match grpc_timeout {
            Some(timeout) if name.eq_ignore_ascii_case(grpc::TIMEOUT.as_bytes()) => {
                encode_field(to, name, timeout)
            }
            _ => encode_field(to, name, value),
        }
    }
    encode_length(to, head.framing);
    if head.expects_continue {
        encode::field(to, b"expect", b"100-continue");
    }
    if head.header("grpc-encoding").is_some() || grpc::content_type(head).is_some() {
        encode::field(to, b"te", b"trailers");
    }
}

/// Whether a status can be sent.
pub(super) fn is_status(status: u16) -> bool {
    (100..1000).contains(&status)
}

/// Writes the fields of an answer.
pub(super) fn encode_response(to: &mut BytesMut, head: &Head) {
    encode::status(to, head.status());
    encode_fields(to, &head.headers);
    encode_length(to, head.framing);
}

fn encode_length(to: &mut BytesMut, framing: Framing) {
    if let Framing::Length(length) = framing {
        encode::content_length(to, length);
    }
}

/// Writes fields without others: trailers.
pub(super) fn encode_fields(to: &mut BytesMut, lines: &[(Bytes, Bytes)]) {
    for (name, value) in lines {
        encode_field(to, name, value);
    }
}

/// Writes a field. One that HTTP/2 cannot carry is left out, and so is the only one of a connection that a head may hold
/// (see [`Head::upgrade`]).
fn encode_field(to: &mut BytesMut, name: &[u8], value: &[u8]) {
    let is_name = !name.is_empty() && name.iter().all(|byte| is_lower_token(byte.to_ascii_lowercase()));
    if is_name && is_value(value) && !name.eq_ignore_ascii_case(b"upgrade") {
        encode::field(to, name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a client sends it: `target` is `authority/path`, or the authority of CONNECT.
    fn request(
        method: &str,
        target: &str,
        headers: &[(&'static str, &str)],
        end: bool,
    ) -> Result<Head, Failure> {
        let text = |text: &str| Some(Bytes::copy_from_slice(text.as_bytes()));
        let (authority, path) = match target.find('/') {
            Some(at) => (text(&target[..at]), text(&target[at..])),
            None if method == "CONNECT" => (text(target), None),
            None => (None, text(target)),
        };
        let headers = headers
            .iter()
            .map(|(name, value)| {
                (Bytes::from_static(name.as_bytes()), Bytes::copy_from_slice(value.as_bytes()))
            })
            .collect();
        request_head(&mut Block { method: text(method), authority, path, headers, ..Block::default() }, end)
    }

    fn answer(status: u16, length: &'static str) -> Block {
        let headers = vec![(Bytes::from_static(b"content-length"), Bytes::from_static(length.as_bytes()))];
        Block { status: Some(status), headers, ..Block::default() }
    }

    /// What a server reads of a head.
    fn sent(head: &Head) -> Block {
        check_request(head).unwrap();
        let (mut bytes, mut block) = (BytesMut::new(), Block::default());
        encode_request(&mut bytes, head, None);
        crate::http2::hpack::Decoder::default().decode(&bytes, |field| block.take(field)).unwrap();
        block
    }

    fn of_http1(text: &[u8]) -> Head {
        crate::http1::head::parse_request(&mut text.into()).unwrap().unwrap()
    }

    #[test]
    fn a_connect_asks_for_a_tunnel_and_is_carried_like_that_of_http_1() {
        let head = request("CONNECT", "a:443", &[], false).unwrap();
        assert!(head.is_connect() && head.upgrade && head.framing == Framing::None);
        let mut text = BytesMut::new();
        head.write(&mut text, false);
        assert_eq!(&text[..], b"CONNECT a:443 HTTP/1.1\r\nhost: a:443\r\n\r\n");
        let block = sent(&of_http1(&text));
        assert_eq!(
            (&block.method.unwrap()[..], &block.authority.unwrap()[..]),
            (&b"CONNECT"[..], &b"a:443"[..])
        );
        assert!(block.path.is_none() && block.scheme.is_none());

        let tunnel = response_head(b"CONNECT", answer(200, "5"), false).unwrap();
        assert_eq!((tunnel.framing, tunnel.opens_tunnel(&head)), (Framing::None, Ok(true)));
        assert!(tunnel.header("content-length").is_none());
        assert_eq!(response_head(b"GET", answer(200, "5"), false).unwrap().framing, Framing::Length(5));
    }

    #[test]
    fn an_answer_without_a_body_has_none_wherever_its_stream_ends() {
        for (method, status) in [(&b"HEAD"[..], 200), (b"GET", 304), (b"GET", 204)] {
            for end in [false, true] {
                let head = response_head(method, answer(status, "5"), end).unwrap();
                assert_eq!(head.framing, Framing::None, "{status}");
                assert_eq!(head.header("content-length").unwrap(), "5", "{status}");
            }
        }
    }

    #[test]
    fn a_client_that_waits_for_100_is_heard_by_the_server_also_behind_two_sidecars() {
        let asked = request("POST", "a/", &[("expect", "100-continue"), ("content-length", "5")], false);
        let mut text = BytesMut::new();
        asked.unwrap().write(&mut text, false);
        let block = sent(&of_http1(&text));
        assert!(
            block.headers.contains(&(Bytes::from_static(b"expect"), Bytes::from_static(b"100-continue")))
        );
    }

    #[test]
    fn requests_with_two_readings_are_refused() {
        for (method, target, headers) in [
            ("CONNECT", "a", &[][..]),
            ("CONNECT", "a:443", &[("content-length", "5")]),
            ("CONNECT", "a:", &[]),
            ("GET", "u@a/", &[]),
            ("GET", "a/", &[("host", "b")]),
            ("GET", "a b/", &[]),
            ("GET", "a/b c", &[]),
            ("GET", "a/b#c", &[]),
            ("GET", "/", &[("host", "a"), ("host", "b")]),
            ("GE T", "a/", &[]),
            ("GET", "*", &[("host", "a")]),
            ("POST", "a/", &[("content-length", "+5")]),
            ("POST", "a/", &[("content-length", "5"), ("content-length", "6")]),
        ] {
            let head = request(method, target, headers, false);
            assert!(matches!(head, Err(Failure::ClientBadRequest(_))), "{method} {target} {headers:?}");
        }
        assert!(request("OPTIONS", "*", &[("host", "a")], true).is_ok());
    }

    #[test]
    fn an_authority_that_is_no_host_passes_as_it_is() {
        // grpc-go for a target `ipv4:A,B`, and etcd's clients.
        for authority in ["10.0.0.1:2379,10.0.0.2:2379", "#initially=[10.0.0.1:2379;10.0.0.2:2379]"] {
            let head = request("POST", &format!("{authority}/a"), &[], false).unwrap();
            let mut text = BytesMut::new();
            head.write(&mut text, false);
            let block = sent(&of_http1(&text));
            assert_eq!(
                (&block.authority.unwrap()[..], &block.path.unwrap()[..]),
                (authority.as_bytes(), &b"/a"[..])
            );
        }
    }

    #[test]
    fn heads_beyond_the_limits_are_too_long() {
        let long = "x".repeat(MAX_HEAD);
        assert!(request("GET", "a/", &[("x", &long[..MAX_HEAD - 100])], true).is_ok());
        assert_eq!(request("GET", "a/", &[("x", &long)], true), Err(Failure::ClientHeadTooLong));
        let too_many = request("GET", "a/", &[("x", "y"); MAX_HEADERS + 1], true);
        assert_eq!(too_many, Err(Failure::ClientHeadTooLong));
    }

    #[test]
    fn an_upgrade_never_reaches_http_2() {
        let text = b"GET http://a:80/x HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n";
        let block = sent(&of_http1(text));
        assert!(block.headers.is_empty());
        assert_eq!((&block.authority.unwrap()[..], &block.path.unwrap()[..]), (&b"a"[..], &b"/x"[..]));
    }

    #[test]
    fn what_http_2_cannot_carry_is_left_out_of_a_head() {
        let mut head = Head::answer(200, "OK", 0);
        head.headers.clear();
        head.push("x-ok", Bytes::from_static(b"y"));
        head.push("x bad", Bytes::from_static(b"y"));
        head.push("x-null", Bytes::from_static(b"a\0b"));
        let (mut bytes, mut block) = (BytesMut::new(), Block::default());
        encode_response(&mut bytes, &head);
        crate::http2::hpack::Decoder::default().decode(&bytes, |field| block.take(field)).unwrap();
        let names: Vec<_> = block.headers.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!((names, block.status), (vec![&b"x-ok"[..], b"content-length"], Some(200)));
    }
}
