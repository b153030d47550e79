//! A head's bytes to a [`Head`].

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};

use super::error::HeadError;
use super::fields::{Fields, Kind};
use super::model::{Framing, Head, Start};
use super::scan::Scan;
use super::{MAX_LINES, MAX_REWRITTEN_HEAD, target};

/// What each response begins with (RFC 9112 §4).
const BEGINNING: &[u8] = b"HTTP/1.";

/// Takes a request's head off a block that another sidecar has written; `None` when it is cut short.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub fn parse_request(buffer: &mut BytesMut) -> Result<Option<Head>, HeadError> {
    let mut scan = Scan::up_to(MAX_REWRITTEN_HEAD);
    next_request(buffer, &mut scan, MAX_LINES)
}

/// Takes a request's head off the buffer; `None` until it is whole. `scan` remembers how far the buffer
/// was searched, and is new for each head. More than `most` lines are refused.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub(super) fn next_request(
    buffer: &mut BytesMut,
    scan: &mut Scan,
    most: usize,
) -> Result<Option<Head>, HeadError> {
    // RFC 9112 §2.2: empty lines before a request are skipped.
    while buffer.starts_with(b"\r\n") {
        let _ = buffer.split_to(2);
    }
    let Some(length) = scan.end(buffer)? else { return Ok(None) };
    request(&buffer.split_to(length).freeze(), most).map(Some)
}

/// Takes a response's head off a block that another sidecar has written; `None` when it is cut short.
/// `method` is the request's.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub fn parse_response(buffer: &mut BytesMut, method: &[u8]) -> Result<Option<Head>, HeadError> {
    let mut scan = Scan::up_to(MAX_REWRITTEN_HEAD);
    next_response(buffer, &mut scan, MAX_LINES, method)
}

/// Takes a response's head off the buffer, as [`next_request`] does.
///
/// # Errors
/// [`HeadError`]; the connection cannot be used further.
pub(super) fn next_response(
    buffer: &mut BytesMut,
    scan: &mut Scan,
    most: usize,
    method: &[u8],
) -> Result<Option<Head>, HeadError> {
    let Some(length) = scan.end(buffer)? else {
        // What is no HTTP may never have an empty line, and its client would wait for one.
        let is_http = buffer.iter().zip(BEGINNING).all(|(byte, wanted)| byte == wanted);
        return if is_http { Ok(None) } else { Err(HeadError("an answer that is not HTTP/1")) };
    };
    let raw = buffer.split_to(length).freeze();
    let read = response(&raw, most, method);
    // A folded line fails as a name that begins with a blank. Few servers send one, so it is looked for only then.
    if read.as_ref().err() == Some(&BROKEN_NAME)
        && let Some(joined) = unfold(&raw)
    {
        return response(&joined, most, method).map(Some);
    }
    read.map(Some)
}

fn request(raw: &Bytes, most: usize) -> Result<Head, HeadError> {
    let mut lines = [MaybeUninit::uninit(); MAX_LINES];
    let mut parsed = httparse::Request::new(&mut []);
    let whole = parsed.parse_with_uninit_headers(raw, &mut lines).map_err(explain)?;
    let (Some(method), Some(target), Some(minor)) = (parsed.method, parsed.path, parsed.version) else {
        return Err(HeadError("the request line is incomplete"));
    };
    if whole != httparse::Status::Complete(raw.len()) {
        return Err(HeadError("a head that ends in two places"));
    }
    if parsed.headers.len() > most {
        return Err(HeadError::TOO_MANY);
    }
    let fields = Fields::read(raw, parsed.headers, Kind::Request)?;
    let connect = method == "CONNECT";
    // Of a CONNECT the target says everything, and old clients send nothing else.
    if minor == 1 && fields.hosts != 1 && !connect {
        return Err(HeadError("an HTTP/1.1 request needs exactly one Host"));
    }
    target::check(method, target, fields.host.as_deref())?;
    let framing = match (fields.chunked, fields.length) {
        (true, Some(_)) => return Err(HeadError("both Transfer-Encoding and Content-Length")),
        (true, None) if minor == 0 => return Err(HeadError("Transfer-Encoding in HTTP/1.0")),
        // Whether the bytes behind it are a body or the tunnel's first has had two answers.
        (true, None) | (false, Some(1..)) if connect => return Err(HeadError("a CONNECT with a body")),
        (true, None) => Framing::Chunked,
        (false, Some(_)) if connect => Framing::None,
        (false, Some(length)) => Framing::Length(length),
        (false, None) => Framing::None,
    };
    let upgrade = if minor == 1 && !connect { fields.upgrade() } else { None };
    let (close, expects_continue) = (fields.close, fields.expects_continue);
    let mut headers = fields.end_to_end();
    let asks = connect || upgrade.is_some();
    headers.extend(upgrade.map(|value| (Bytes::from_static(b"Upgrade"), value)));
    Ok(Head {
        start: Start::Request {
            method: raw.slice_ref(method.as_bytes()),
            target: raw.slice_ref(target.as_bytes()),
        },
        headers,
        framing,
        // Of HTTP/1.0 one request per connection: its way to ask for more was never defined for proxies.
        keep_alive: minor == 1 && !close,
        upgrade: asks,
        expects_continue: expects_continue && minor == 1,
        http10: minor == 0,
    })
}

fn response(raw: &Bytes, most: usize, method: &[u8]) -> Result<Head, HeadError> {
    let mut lines = [MaybeUninit::uninit(); MAX_LINES];
    let mut parsed = httparse::Response::new(&mut []);
    // RFC 9112 §5.1: a proxy removes whitespace before the colon from a response. In a request it is
    // refused.
    let whole = httparse::ParserConfig::default()
        .allow_spaces_after_header_name_in_responses(true)
        .parse_response_with_uninit_headers(&mut parsed, raw, &mut lines)
        .map_err(explain)?;
    let (Some(status), Some(minor)) = (parsed.code, parsed.version) else {
        return Err(HeadError("the status line is incomplete"));
    };
    if whole != httparse::Status::Complete(raw.len()) {
        return Err(HeadError("a head that ends in two places"));
    }
    if parsed.headers.len() > most {
        return Err(HeadError::TOO_MANY);
    }
    let reason = match parsed.reason {
        Some(reason) if !reason.is_empty() => raw.slice_ref(reason.as_bytes()),
        _ => opaque_reason(raw),
    };
    let fields = Fields::read(raw, parsed.headers, Kind::Response)?;
    let tunnel = method == b"CONNECT" && (200..300).contains(&status);
    let granted = if matches!(status, 101 | 426) { fields.upgrade() } else { None };
    if status == 101 && granted.is_none() {
        return Err(HeadError("a 101 that names no protocol"));
    }
    let bodiless = method == b"HEAD" || tunnel || status < 200 || status == 204 || status == 304;
    let framing = match (bodiless, fields.chunked, fields.length) {
        (true, _, _) => Framing::None,
        (false, true, _) => Framing::Chunked,
        (false, false, Some(length)) => Framing::Length(length),
        (false, false, None) => Framing::UntilClose,
    };
    let upgrade = tunnel || status == 101;
    // What a server says of a body that there cannot be, it may send: nothing is read behind it. The
    // same with chunks in HTTP/1.0 (RFC 9112 §6.1).
    let phantom = status == 204 && (fields.chunked || fields.length.is_some_and(|length| length > 0));
    // Transfer-Encoding overrides a length, which is removed (RFC 9112 §6.3). The server may have meant the other one.
    let doubtful = fields.length.is_some() && (fields.chunked || fields.identity);
    let asks_to_keep =
        if minor == 1 { !fields.close } else { fields.keep_alive && !fields.close && !fields.chunked };
    let length = fields.length.filter(|_| !fields.chunked);
    let mut headers = fields.end_to_end();
    // Of an answer to HEAD, or a 304, the length says what a GET would bring: it is content.
    if let (true, Some(length)) = (method == b"HEAD" || status == 304, length) {
        headers.push((Bytes::from_static(b"Content-Length"), Bytes::from(length.to_string())));
    }
    headers.extend(granted.map(|value| (Bytes::from_static(b"Upgrade"), value)));
    Ok(Head {
        start: Start::Response { status, reason },
        headers,
        framing,
        keep_alive: asks_to_keep && framing != Framing::UntilClose && !upgrade && !phantom && !doubtful,
        upgrade,
        expects_continue: false,
        http10: false,
    })
}

/// The reason phrase, whatever its encoding. httparse has checked its characters, and returns it only if it is ASCII.
fn opaque_reason(raw: &Bytes) -> Bytes {
    let line = raw.split(|byte| *byte == b'\r').next().unwrap_or(&[]);
    raw.slice_ref(line.get(b"HTTP/1.1 200 ".len()..).unwrap_or(&[]))
}

/// A response's head in which each folded line is one line, as a proxy may make it (RFC 9112 §5.2). `None`: a line
/// begins with a blank where there is nothing to go on with, or what frames the message is folded. [`Scan`] has seen
/// that each line ends with CRLF.
fn unfold(raw: &[u8]) -> Option<Bytes> {
    let mut lines = raw.split_inclusive(|byte| *byte == b'\n');
    let mut joined = BytesMut::with_capacity(raw.len());
    joined.extend_from_slice(lines.next()?);
    let mut may_go_on = false;
    for line in lines {
        let text =
            line.iter().position(|byte| !matches!(byte, b' ' | b'\t')).and_then(|at| line.get(at..))?;
        if text.len() == line.len() {
            may_go_on = may_be_folded(line);
        } else if may_go_on {
            joined.truncate(joined.len().saturating_sub(b"\r\n".len()));
            joined.extend_from_slice(b" ");
        } else {
            return None;
        }
        joined.extend_from_slice(text);
    }
    Some(joined.freeze())
}

fn may_be_folded(line: &[u8]) -> bool {
    let Some(colon) = line.iter().position(|byte| *byte == b':') else { return false };
    let name = line.get(..colon).unwrap_or(line).trim_ascii_end();
    !FRAMING.iter().any(|framing| name.eq_ignore_ascii_case(framing.as_bytes()))
}

/// What these say decides where the next message begins: they are not repaired.
const FRAMING: &[&str] = &["connection", "content-length", "transfer-encoding"];

/// Reads a block of trailers; fields that would change the message's meaning are dropped.
///
/// # Errors
/// [`HeadError`] when it is not a block of header lines.
pub fn parse_trailers(raw: &Bytes) -> Result<Vec<(Bytes, Bytes)>, HeadError> {
    if Scan::up_to(MAX_REWRITTEN_HEAD).end(raw)? != Some(raw.len()) {
        return Err(HeadError("trailers are cut short"));
    }
    let mut lines = [httparse::EMPTY_HEADER; MAX_LINES];
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

const BROKEN_NAME: HeadError = HeadError("a header name with an illegal character");

fn explain(error: httparse::Error) -> HeadError {
    HeadError(match error {
        httparse::Error::HeaderName => return BROKEN_NAME,
        httparse::Error::HeaderValue => "a header value with an illegal character",
        httparse::Error::NewLine => "a broken line end",
        httparse::Error::Status => "a broken status line",
        httparse::Error::Token => "a broken request line",
        httparse::Error::TooManyHeaders => return HeadError::TOO_MANY,
        httparse::Error::Version => "an HTTP version other than 1.0 and 1.1",
    })
}
