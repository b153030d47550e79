//! What the header lines of a message mean for its connection and its body.

use bytes::{Bytes, BytesMut};
use tulle_mesh::headers::PER_CONNECTION;

use super::error::HeadError;

/// Whose head the lines are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A client's. A second reader stands behind us, so nothing is repaired.
    Request,
    /// A server's. Only the client behind us reads what we write anew.
    Response,
}

/// The meaning of the header lines, and the lines that are end-to-end.
#[derive(Debug, Default)]
pub(super) struct Fields {
    lines: Vec<(Bytes, Bytes)>,
    nominated: Vec<Bytes>,
    /// The values of `Upgrade`.
    upgrade: Vec<Bytes>,
    /// How many `Host` lines there are.
    pub(super) hosts: usize,
    /// The value of `Host`.
    pub(super) host: Option<Bytes>,
    /// `Content-Length`.
    pub(super) length: Option<u64>,
    /// How many digits it was written with.
    length_digits: usize,
    /// `Transfer-Encoding: chunked`.
    pub(super) chunked: bool,
    /// `Transfer-Encoding: identity`, in a response.
    pub(super) identity: bool,
    /// `Connection: close`.
    pub(super) close: bool,
    /// `Connection: keep-alive`.
    pub(super) keep_alive: bool,
    /// `Connection: upgrade`.
    connection_upgrade: bool,
    /// `Expect: 100-continue`.
    pub(super) expects_continue: bool,
}

const MIXED_EXPECT: HeadError = HeadError("an Expect that is not plainly 100-continue");

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
    /// Reads header lines that are parts of `raw`.
    ///
    /// # Errors
    /// [`HeadError`] for lines that two readers could read differently.
    pub(super) fn read(raw: &Bytes, lines: &[httparse::Header<'_>], kind: Kind) -> Result<Self, HeadError> {
        let mut fields = Self { lines: Vec::with_capacity(lines.len()), ..Self::default() };
        for line in lines {
            fields.line(raw, line, kind)?;
        }
        if fields.expects_continue
            && fields.lines.iter().any(|(name, _)| name.eq_ignore_ascii_case(b"expect"))
        {
            return Err(MIXED_EXPECT);
        }
        Ok(fields)
    }

    fn line(&mut self, raw: &Bytes, line: &httparse::Header<'_>, kind: Kind) -> Result<(), HeadError> {
        if line.name.is_empty() {
            return Err(HeadError("a header without a name"));
        }
        let is = |name: &str| line.name.eq_ignore_ascii_case(name);
        let mut travels = !PER_CONNECTION.iter().any(|name| is(name));
        if is("host") {
            self.hosts += 1;
            self.host = Some(raw.slice_ref(line.value));
            if self.hosts > 1 && kind == Kind::Request {
                return Err(HeadError("more than one Host"));
            }
        } else if is("content-length") {
            self.content_length(line.value, kind)?;
        } else if is("transfer-encoding") {
            self.transfer_encoding(line.value, kind)?;
        } else if is("connection") {
            self.connection(raw, line.value)?;
        } else if is("upgrade") {
            self.upgrade.push(raw.slice_ref(line.value));
        } else if is("expect") && kind == Kind::Request {
            travels = self.expect(line.value)?;
        }
        if travels {
            self.lines.push((raw.slice_ref(line.name.as_bytes()), raw.slice_ref(line.value)));
        }
        Ok(())
    }

    /// In a response `identity` means that there is no encoding (RFC 2616 §3.6; RFC 7230 has removed it).
    fn transfer_encoding(&mut self, value: &[u8], kind: Kind) -> Result<(), HeadError> {
        if kind == Kind::Response && value.eq_ignore_ascii_case(b"identity") {
            self.identity = true;
            return Ok(());
        }
        if self.chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(HeadError("a Transfer-Encoding other than one chunked"));
        }
        self.chunked = true;
        Ok(())
    }

    /// Whether the line travels on as it is: the server decides about an expectation that we do not know (RFC 9110
    /// §10.1.1), and an empty value expects nothing. Where a lenient server would find `100-continue` and we do not,
    /// the two would differ on whether the body waits.
    fn expect(&mut self, value: &[u8]) -> Result<bool, HeadError> {
        if value.eq_ignore_ascii_case(b"100-continue") {
            self.expects_continue = true;
            return Ok(false);
        }
        let word = b"continue";
        if value.windows(word.len()).any(|part| part.eq_ignore_ascii_case(word)) {
            return Err(MIXED_EXPECT);
        }
        Ok(!value.is_empty())
    }

    /// A length that is stated again in the very same digits has one reading: in a response it is merged
    /// (RFC 9110 §8.6).
    fn content_length(&mut self, value: &[u8], kind: Kind) -> Result<(), HeadError> {
        let length = content_length(value)?;
        let same = self.length == Some(length) && self.length_digits == value.len();
        if self.length.is_some() && !(same && kind == Kind::Response) {
            return Err(HeadError("more than one Content-Length"));
        }
        self.length = Some(length);
        self.length_digits = value.len();
        Ok(())
    }

    fn connection(&mut self, raw: &Bytes, value: &[u8]) -> Result<(), HeadError> {
        for token in tokens(value) {
            let is = |name: &str| token.eq_ignore_ascii_case(name.as_bytes());
            if is("close") {
                self.close = true;
            } else if is("keep-alive") {
                self.keep_alive = true;
            } else if is("upgrade") {
                self.connection_upgrade = true;
            } else if NEVER_NOMINATED.iter().any(|name| is(name)) {
                return Err(HeadError("Connection nominates a field that must not be removed"));
            } else {
                self.nominated.push(raw.slice_ref(token));
            }
        }
        Ok(())
    }

    /// The value of `Upgrade` that is passed on, if the message names a protocol to switch to. HTTP/2 over
    /// a connection that began with HTTP/1.1 is not offered (RFC 9113 §3.1 has removed it): a server that
    /// agreed would speak past us.
    pub(super) fn upgrade(&self) -> Option<Bytes> {
        if !self.connection_upgrade || self.upgrade.is_empty() {
            return None;
        }
        let is_kept = |token: &&[u8]| !token.eq_ignore_ascii_case(b"h2c");
        if let [value] = self.upgrade.as_slice()
            && tokens(value).all(|token| is_kept(&token))
        {
            return Some(value.clone()).filter(|value| tokens(value).next().is_some());
        }
        let mut joined = BytesMut::new();
        for token in self.upgrade.iter().flat_map(|value| tokens(value)).filter(is_kept) {
            if !joined.is_empty() {
                joined.extend_from_slice(b", ");
            }
            joined.extend_from_slice(token);
        }
        (!joined.is_empty()).then(|| joined.freeze())
    }

    /// The lines that travel on.
    pub(super) fn end_to_end(mut self) -> Vec<(Bytes, Bytes)> {
        if !self.nominated.is_empty() {
            let nominated = std::mem::take(&mut self.nominated);
            self.lines.retain(|(name, _)| !nominated.iter().any(|n| n.eq_ignore_ascii_case(name)));
        }
        self.lines
    }
}

/// The elements of a list (RFC 9110 §5.6.1); empty ones are skipped.
fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|token| !token.is_empty())
}

/// Digits only, at most 19 of them: `+5`, `5, 5`, `0x5` and an empty value have had two readings.
fn content_length(value: &[u8]) -> Result<u64, HeadError> {
    let refuse = HeadError("a Content-Length that is not a plain number");
    if value.is_empty() || value.len() > 19 || !value.iter().all(u8::is_ascii_digit) {
        return Err(refuse);
    }
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).ok_or(refuse)
}
