//! Heads of messages: parsing, framing, hop-by-hop fields, writing.

use bytes::{Bytes, BytesMut};

use super::{MAX_HEAD, MAX_HEADERS};

/// The first line of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// `GET /path HTTP/1.1`
    Request {
        /// The method.
        method: Bytes,
        /// Origin form, or `*`.
        target: Bytes,
    },
    /// `HTTP/1.1 200 OK`
    Response {
        /// The status code.
        status: u16,
        /// The reason phrase.
        reason: Bytes,
    },
}

/// How the end of a message's body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// That many bytes.
    Length(u64),
    /// Chunks.
    Chunked,
    /// All until the connection closes (responses only).
    UntilClose,
}

/// A message's head: end-to-end fields only, framing and connection handling beside them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The first line.
    pub start: Start,
    /// End-to-end header lines, names as they were written.
    pub headers: Vec<(Bytes, Bytes)>,
    /// Where the body ends.
    pub framing: Framing,
    /// Whether the connection may carry another message.
    pub keep_alive: bool,
    /// `Upgrade: websocket`, asked for or granted.
    pub upgrade: bool,
    /// The client waits for `100 Continue`.
    pub expects_continue: bool,
    /// A request of HTTP/1.0: its client knows neither chunks nor interim answers.
    pub http10: bool,
}

/// Why a head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HeadError(pub &'static str);

/// Takes a request's head off the buffer; `None` until it is whole.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub fn parse_request(buffer: &mut BytesMut) -> Result<Option<Head>, HeadError> {
    skip_empty_lines(buffer);
    let Some(length) = head_length(buffer)? else { return Ok(None) };
    let raw = buffer.split_to(length).freeze();
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut lines);
    parsed.parse(&raw).map_err(explain)?;
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(HeadError("the request line is incomplete"));
    };
    let fields = Fields::read(&raw, parsed.headers)?;
    if minor == 1 && fields.hosts != 1 {
        return Err(HeadError("an HTTP/1.1 request needs exactly one Host"));
    }
    let target = origin_form(&raw, method, target, &fields)?;
    let framing = match (fields.chunked, fields.length) {
        (true, Some(_)) => return Err(HeadError("both Transfer-Encoding and Content-Length")),
        (true, None) if minor == 0 => return Err(HeadError("Transfer-Encoding in HTTP/1.0")),
        (true, None) => Framing::Chunked,
        (false, Some(0) | None) => Framing::None,
        (false, Some(length)) => Framing::Length(length),
    };
    let upgrade = fields.upgrades() && minor == 1;
    if upgrade && framing != Framing::None {
        return Err(HeadError("an upgrade with a body"));
    }
    Ok(Some(Head {
        start: Start::Request { method: raw.slice_ref(method.as_bytes()), target },
        // Of HTTP/1.0 one request per connection: its way to ask for more was never defined for proxies.
        keep_alive: minor == 1 && !fields.close,
        upgrade,
        expects_continue: fields.expects_continue && minor == 1,
        http10: minor == 0,
        framing: if fields.length == Some(0) && framing == Framing::None {
            Framing::Length(0)
        } else {
            framing
        },
        headers: fields.end_to_end(),
    }))
}

/// Takes a response's head off the buffer; `None` until it is whole. `method` is the request's.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub fn parse_response(buffer: &mut BytesMut, method: &[u8]) -> Result<Option<Head>, HeadError> {
    let Some(length) = head_length(buffer)? else { return Ok(None) };
    let raw = buffer.split_to(length).freeze();
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Response::new(&mut lines);
    parsed.parse(&raw).map_err(explain)?;
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(HeadError("the status line is incomplete"));
    };
    let reason = parsed.reason.unwrap_or("");
    let fields = Fields::read(&raw, parsed.headers)?;
    if fields.chunked && fields.length.is_some() {
        return Err(HeadError("both Transfer-Encoding and Content-Length"));
    }
    let bodiless = method == b"HEAD" || status < 200 || status == 204 || status == 304;
    let framing = match (bodiless, fields.chunked, fields.length) {
        (true, _, _) => Framing::None,
        (false, true, _) => Framing::Chunked,
        (false, false, Some(length)) => Framing::Length(length),
        (false, false, None) => Framing::UntilClose,
    };
    let reusable = if minor == 1 { !fields.close } else { fields.keep_alive };
    let upgrade = status == 101 && fields.upgrades();
    let length = fields.length;
    let mut headers = fields.end_to_end();
    // Of an answer to HEAD, or a 304, the length says what a GET would bring: it is content.
    if let (true, Some(length)) = (bodiless && (method == b"HEAD" || status == 304), length) {
        headers.push((Bytes::from_static(b"content-length"), Bytes::from(length.to_string())));
    }
    Ok(Some(Head {
        start: Start::Response { status, reason: raw.slice_ref(reason.as_bytes()) },
        headers,
        framing,
        keep_alive: reusable && framing != Framing::UntilClose && !upgrade,
        upgrade,
        expects_continue: false,
        http10: false,
    }))
}

/// Reads a block of trailers; fields that would change the message's meaning are dropped.
///
/// # Errors
/// [`HeadError`] when it is no block of header lines.
pub fn parse_trailers(raw: &Bytes) -> Result<Vec<(Bytes, Bytes)>, HeadError> {
    check_line_ends(raw)?;
    let mut lines = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let parsed = httparse::parse_headers(raw, &mut lines).map_err(explain)?;
    let httparse::Status::Complete((_, lines)) = parsed else {
        return Err(HeadError("trailers are cut short"));
    };
    let kept = lines
        .iter()
        .filter(|line| !FORBIDDEN_TRAILERS.iter().any(|name| line.name.eq_ignore_ascii_case(name)));
    Ok(kept.map(|line| (raw.slice_ref(line.name.as_bytes()), raw.slice_ref(line.value))).collect())
}

/// Never merged into a head, never passed on (RFC 9110 §6.5.1).
const FORBIDDEN_TRAILERS: &[&str] = &[
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "tulle-client-id",
    "upgrade",
];

impl Head {
    /// The value of the first line with this name.
    pub fn header(&self, name: &str) -> Option<&Bytes> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name.as_bytes())).map(|(_, value)| value)
    }

    /// Adds a line.
    pub fn push(&mut self, name: &'static str, value: impl Into<Bytes>) {
        self.headers.push((Bytes::from_static(name.as_bytes()), value.into()));
    }

    /// Method and target of a request, as text; empty for a response.
    pub fn request_line(&self) -> (&str, &str) {
        match &self.start {
            Start::Request { method, target } => {
                (std::str::from_utf8(method).unwrap_or(""), std::str::from_utf8(target).unwrap_or(""))
            }
            Start::Response { .. } => ("", ""),
        }
    }

    /// The status of a response; 0 for a request.
    pub fn status(&self) -> u16 {
        match &self.start {
            Start::Response { status, .. } => *status,
            Start::Request { .. } => 0,
        }
    }

    /// Writes the head as HTTP/1.1, except a request that came as HTTP/1.0: it may have no Host, and its
    /// answer must suit its client. `close`: say that the connection closes.
    pub fn write(&self, out: &mut BytesMut, close: bool) {
        match &self.start {
            Start::Request { method, target } => {
                let version: &[u8] = if self.http10 { b" HTTP/1.0\r\n" } else { b" HTTP/1.1\r\n" };
                put(out, &[method, b" ", target, version]);
            }
            Start::Response { status, reason } => {
                let mut digits = [b'0'; 3];
                for (digit, divisor) in digits.iter_mut().zip([100, 10, 1]) {
                    *digit = b'0' + (status / divisor % 10) as u8;
                }
                put(out, &[b"HTTP/1.1 ", &digits, b" ", reason, b"\r\n"]);
            }
        }
        for (name, value) in &self.headers {
            put(out, &[name, b": ", value, b"\r\n"]);
        }
        match self.framing {
            Framing::Length(length) => {
                put(out, &[b"content-length: ", length.to_string().as_bytes(), b"\r\n"]);
            }
            Framing::Chunked => put(out, &[b"transfer-encoding: chunked\r\n"]),
            Framing::None | Framing::UntilClose => {}
        }
        if self.upgrade {
            put(out, &[b"connection: upgrade\r\nupgrade: websocket\r\n"]);
        } else if close {
            put(out, &[b"connection: close\r\n"]);
        }
        if self.expects_continue {
            put(out, &[b"expect: 100-continue\r\n"]);
        }
        put(out, &[b"\r\n"]);
    }

    /// An answer of our own.
    pub fn answer(status: u16, reason: &'static str, body_length: usize) -> Self {
        Self {
            start: Start::Response { status, reason: Bytes::from_static(reason.as_bytes()) },
            headers: vec![(Bytes::from_static(b"content-type"), Bytes::from_static(b"text/plain"))],
            framing: Framing::Length(body_length as u64),
            keep_alive: false,
            upgrade: false,
            expects_continue: false,
            http10: false,
        }
    }
}

fn put(out: &mut BytesMut, parts: &[&[u8]]) {
    for part in parts {
        out.extend_from_slice(part);
    }
}

fn skip_empty_lines(buffer: &mut BytesMut) {
    while buffer.starts_with(b"\r\n") {
        let _ = buffer.split_to(2);
    }
}

/// The length of the head up to its empty line.
fn head_length(buffer: &[u8]) -> Result<Option<usize>, HeadError> {
    let window = buffer.get(..MAX_HEAD).unwrap_or(buffer);
    // A blank line by bare line feeds would end the head for a lenient reader: refuse it, and before
    // the strict end is searched for.
    let strict = find(window, b"\r\n\r\n");
    let seen = strict.map_or(window, |at| window.get(..at + 4).unwrap_or(window));
    check_line_ends(seen)?;
    match strict {
        Some(at) => Ok(Some(at + 4)),
        None if buffer.len() >= MAX_HEAD => Err(HeadError("the head is longer than 32 KiB")),
        None => Ok(None),
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Line feeds only after carriage returns, and carriage returns only before line feeds.
fn check_line_ends(bytes: &[u8]) -> Result<(), HeadError> {
    let mut after_return = false;
    for byte in bytes {
        match (byte, after_return) {
            (b'\n', false) => return Err(HeadError("a bare line feed")),
            (b'\n', true) => after_return = false,
            (_, true) => return Err(HeadError("a bare carriage return")),
            (b'\r', false) => after_return = true,
            _ => {}
        }
    }
    Ok(())
}

fn explain(error: httparse::Error) -> HeadError {
    HeadError(match error {
        httparse::Error::HeaderName => "a header name with an illegal character",
        httparse::Error::HeaderValue => "a header value with an illegal character",
        httparse::Error::NewLine => "a broken line end",
        httparse::Error::Status => "a broken status line",
        httparse::Error::Token => "a broken request line",
        httparse::Error::TooManyHeaders => "more than 100 header lines",
        httparse::Error::Version => "an HTTP version other than 1.0 and 1.1",
    })
}

/// The absolute form is turned into the origin form; its authority must be the Host.
fn origin_form(raw: &Bytes, method: &str, target: &str, fields: &Fields) -> Result<Bytes, HeadError> {
    if method == "CONNECT" {
        return Err(HeadError("CONNECT is not offered"));
    }
    if target.bytes().any(|byte| byte == b'#') {
        return Err(HeadError("a fragment in the request target"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(raw.slice_ref(target.as_bytes()));
    }
    let rest = target.strip_prefix("http://").or_else(|| target.strip_prefix("https://"));
    let rest = rest.ok_or(HeadError("a request target that is no path"))?;
    let path_at = rest.find('/').unwrap_or(rest.len());
    let (authority, path) = rest.split_at(path_at);
    let host = fields.host.as_ref().map(|host| std::str::from_utf8(host).unwrap_or(""));
    if host.is_some_and(|host| !host.eq_ignore_ascii_case(authority)) {
        return Err(HeadError("Host and request target name different hosts"));
    }
    Ok(if path.is_empty() { Bytes::from_static(b"/") } else { raw.slice_ref(path.as_bytes()) })
}

/// What the header lines say about the connection and the body, and the lines that are end-to-end.
#[derive(Default)]
struct Fields {
    lines: Vec<(Bytes, Bytes)>,
    nominated: Vec<Bytes>,
    hosts: usize,
    host: Option<Bytes>,
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
    connection_upgrade: bool,
    websocket: bool,
    expects_continue: bool,
}

/// Fields that concern one connection only (RFC 9110 §7.6.1), and those that we write ourselves.
const HOP_BY_HOP: &[&str] = &[
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "expect",
    "http2-settings",
];

/// A client that nominates one of these in `Connection` wants a proxy to remove what it relies on.
const NEVER_NOMINATED: &[&str] = &[
    "host",
    "content-length",
    "authorization",
    "cookie",
    "forwarded",
    "x-forwarded-for",
    "x-forwarded-client-cert",
    "tulle-client-id",
];

impl Fields {
    fn read(raw: &Bytes, lines: &[httparse::Header<'_>]) -> Result<Self, HeadError> {
        let mut fields = Self { lines: Vec::with_capacity(lines.len()), ..Self::default() };
        for line in lines {
            fields.line(raw, line)?;
        }
        Ok(fields)
    }

    fn line(&mut self, raw: &Bytes, line: &httparse::Header<'_>) -> Result<(), HeadError> {
        if line.name.is_empty() {
            return Err(HeadError("a header without a name"));
        }
        let is = |name: &str| line.name.eq_ignore_ascii_case(name);
        if is("host") {
            self.hosts += 1;
            self.host = Some(raw.slice_ref(line.value));
            if self.hosts > 1 {
                return Err(HeadError("more than one Host"));
            }
        } else if is("content-length") {
            if self.length.is_some() {
                return Err(HeadError("more than one Content-Length"));
            }
            self.length = Some(content_length(line.value)?);
        } else if is("transfer-encoding") {
            if self.chunked || !line.value.eq_ignore_ascii_case(b"chunked") {
                return Err(HeadError("a Transfer-Encoding other than one chunked"));
            }
            self.chunked = true;
        } else if is("connection") {
            self.connection(raw, line.value)?;
        } else if is("upgrade") {
            self.websocket |= line.value.eq_ignore_ascii_case(b"websocket");
        } else if is("expect") {
            if !line.value.eq_ignore_ascii_case(b"100-continue") {
                return Err(HeadError("an Expect other than 100-continue"));
            }
            self.expects_continue = true;
        }
        if !HOP_BY_HOP.iter().any(|name| is(name)) {
            self.lines.push((raw.slice_ref(line.name.as_bytes()), raw.slice_ref(line.value)));
        }
        Ok(())
    }

    fn connection(&mut self, raw: &Bytes, value: &[u8]) -> Result<(), HeadError> {
        for token in value.split(|byte| *byte == b',') {
            let token = token.trim_ascii();
            let is = |name: &str| token.eq_ignore_ascii_case(name.as_bytes());
            if is("close") {
                self.close = true;
            } else if is("keep-alive") {
                self.keep_alive = true;
            } else if is("upgrade") {
                self.connection_upgrade = true;
            } else if NEVER_NOMINATED.iter().any(|name| is(name)) {
                return Err(HeadError("Connection nominates a field that must not be removed"));
            } else if !token.is_empty() {
                self.nominated.push(raw.slice_ref(token));
            }
        }
        Ok(())
    }

    fn upgrades(&self) -> bool {
        self.connection_upgrade && self.websocket
    }

    fn end_to_end(mut self) -> Vec<(Bytes, Bytes)> {
        if !self.nominated.is_empty() {
            let nominated = std::mem::take(&mut self.nominated);
            self.lines.retain(|(name, _)| !nominated.iter().any(|n| n.eq_ignore_ascii_case(name)));
        }
        self.lines
    }
}

/// Digits only, at most 19 of them: `+5`, `5, 5`, `0x5` and an empty value have had two readings.
fn content_length(value: &[u8]) -> Result<u64, HeadError> {
    let refuse = HeadError("a Content-Length that is not a plain number");
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(refuse);
    }
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(text: &str) -> Result<Option<Head>, HeadError> {
        parse_request(&mut BytesMut::from(text.as_bytes()))
    }

    fn response(text: &str, method: &str) -> Result<Head, HeadError> {
        parse_response(&mut BytesMut::from(text.as_bytes()), method.as_bytes()).map(Option::unwrap)
    }

    #[test]
    fn heads_with_two_readings_are_refused() {
        let post = |lines: &str| format!("POST / HTTP/1.1\r\nHost: a\r\n{lines}\r\n\r\n");
        for lines in [
            "Content-Length: 6\r\nTransfer-Encoding: chunked",
            "Content-Length: 6\r\nContent-Length: 6",
            "Content-Length: 6, 6",
            "Content-Length: +6",
            "Content-Length: -0",
            "Content-Length: 0x6",
            "Content-Length: 6 6",
            "Content-Length:",
            "Content-Length: 18446744073709551616",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding: \x0bchunked",
            "Transfer-Encoding: chunked;q=1",
            "Transfer-Encoding: ,chunked",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding : chunked",
            ": x",
            "X: a\rb",
            "X: a\nY: b",
            "X: 1\r\n fold",
            "X: a\0b",
            "X y: a",
            "Host: b",
            "Connection: content-length",
            "Connection: close, x-forwarded-client-cert",
            "Expect: 200-ok",
            "Upgrade: websocket\r\nConnection: upgrade\r\nContent-Length: 5",
        ] {
            assert!(request(&post(lines)).is_err(), "{lines:?}");
        }
        for text in [
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/2.0\r\nHost: a\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET x HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
            "* * HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert!(request(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn hop_by_hop_and_nominated_fields_do_not_travel() {
        let head = request(
            "GET http://a/x HTTP/1.1\r\nHost: a\r\nConnection: X-Mine, keep-alive\r\nX-Mine: 1\r\nTE: trailers\r\nUpgrade: h2c\r\nX-Other: 2\r\n\r\n",
        );
        let head = head.unwrap().unwrap();
        let names: Vec<&[u8]> = head.headers.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, [b"Host".as_slice(), b"X-Other"]);
        assert_eq!(head.request_line(), ("GET", "/x"));
        assert!(!head.upgrade);
    }

    #[test]
    fn a_head_is_read_only_when_it_is_whole_and_never_beyond_its_limit() {
        assert_eq!(request("GET / HTTP/1.1\r\nHost: a\r\n"), Ok(None));
        let long = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(MAX_HEAD));
        assert!(request(&long).is_err());
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(MAX_HEADERS));
        assert!(request(&many).is_err());
    }

    #[test]
    fn the_framing_of_answers_follows_method_and_status() {
        let of = |text: &str, method: &str| response(text, method).unwrap().framing;
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "GET"), Framing::Length(5));
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD"), Framing::None);
        assert_eq!(of("HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET"), Framing::None);
        assert_eq!(of("HTTP/1.1 204 No Content\r\n\r\n", "GET"), Framing::None);
        assert_eq!(of("HTTP/1.0 200 OK\r\n\r\n", "GET"), Framing::UntilClose);
        assert!(
            response("HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "GET")
                .is_err()
        );
        let head = response("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD").unwrap();
        assert_eq!(head.header("content-length").unwrap(), "5");
    }

    #[test]
    fn a_head_that_is_written_reads_back_the_same() {
        let text = "POST /a?b=c HTTP/1.1\r\nHost: a\r\nX-Case: Kept\r\ncontent-length: 3\r\n\r\n";
        let head = request(text).unwrap().unwrap();
        let mut out = BytesMut::new();
        head.write(&mut out, false);
        assert_eq!(&out[..], text.as_bytes());
    }
}
