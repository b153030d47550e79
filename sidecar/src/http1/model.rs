//! Heads of messages, and how they are written.

use bytes::{Bytes, BytesMut};

use super::error::HeadError;
use super::{MAX_LINES, MAX_REWRITTEN_HEAD, target};

/// The first line of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// `GET /path HTTP/1.1`
    Request {
        /// The method.
        method: Bytes,
        /// In the form in which it was sent: origin, absolute, authority (of CONNECT), or `*`.
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
    /// A request that asks to become a tunnel (CONNECT, or an `Upgrade`), or a response that becomes one
    /// (101, or 2xx to CONNECT). A request's body, if it has one, goes before the tunnel. The value of
    /// `Upgrade` is among the headers; without this flag it is not written.
    pub upgrade: bool,
    /// The client waits for `100 Continue`.
    pub expects_continue: bool,
    /// A request of HTTP/1.0: its client knows neither chunks nor interim answers.
    pub http10: bool,
}

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

    /// Path and query of a request's target, whatever its form: what rules about paths look at. Empty for
    /// CONNECT and for a response.
    pub fn path(&self) -> &str {
        target::path(self.request_line().1)
    }

    /// Whether this is a CONNECT request.
    pub fn is_connect(&self) -> bool {
        matches!(&self.start, Start::Request { method, .. } if &method[..] == b"CONNECT")
    }

    /// Whether this answer makes its `request` a tunnel.
    ///
    /// # Errors
    /// [`HeadError`] for a 101 that the request has not asked for (RFC 9110 §15.2.2): bytes that follow it
    /// belong to nobody.
    pub fn opens_tunnel(&self, request: &Self) -> Result<bool, HeadError> {
        match (self.status() == 101, request.upgrade) {
            (true, asked) if !asked || request.is_connect() => Err(HeadError("a 101 that was not asked for")),
            (_, asked) => Ok(asked && self.upgrade),
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
    /// answer must suit its client. `close`: say that the connection closes. Names of ours have the usual capitals,
    /// because some old clients compare them with case.
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
        // A 426 says which protocols would do (RFC 9110 §15.5.22).
        let may_upgrade = self.upgrade || self.status() == 426;
        let mut upgrades = false;
        for (name, value) in &self.headers {
            if name.eq_ignore_ascii_case(b"upgrade") {
                if !may_upgrade {
                    continue;
                }
                upgrades = true;
            }
            put(out, &[name, b": ", value, b"\r\n"]);
        }
        match self.framing {
            Framing::Length(length) => {
                put(out, &[b"Content-Length: "]);
                put_number(out, length, 10);
                put(out, &[b"\r\n"]);
            }
            Framing::Chunked => put(out, &[b"Transfer-Encoding: chunked\r\n"]),
            Framing::None | Framing::UntilClose => {}
        }
        match (upgrades, close && !self.upgrade) {
            (true, true) => put(out, &[b"Connection: upgrade, close\r\n"]),
            (true, false) => put(out, &[b"Connection: upgrade\r\n"]),
            (false, true) => put(out, &[b"Connection: close\r\n"]),
            (false, false) => {}
        }
        if self.expects_continue {
            put(out, &[b"Expect: 100-continue\r\n"]);
        }
        put(out, &[b"\r\n"]);
    }

    /// The values of the cookies with this name. HTTP/2 may send each in a line of its own (RFC 9113 §8.2.3).
    pub fn cookies<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        let lines = self.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(b"cookie"));
        let pairs = lines.flat_map(|(_, value)| value.split(|byte| *byte == b';'));
        pairs.filter_map(move |pair| {
            let equals = pair.iter().position(|byte| *byte == b'=')?;
            let (found, value) = pair.split_at_checked(equals)?;
            let value = value.strip_prefix(b"=")?.trim_ascii();
            (found.trim_ascii() == name.as_bytes()).then_some(value)
        })
    }

    /// Whether another sidecar reads this head as it is written.
    pub fn fits_a_stream(&self) -> bool {
        // What is written beside the lines and the target: version, framing, connection, expectation.
        const BESIDE: usize = 256;
        let of_framing = usize::from(matches!(self.framing, Framing::Length(_) | Framing::Chunked));
        let of_connection = usize::from(self.upgrade) + usize::from(self.expects_continue);
        if self.headers.len() + of_framing + of_connection > MAX_LINES {
            return false;
        }
        let of_start = match &self.start {
            Start::Request { method, target } => method.len() + target.len(),
            Start::Response { reason, .. } => reason.len(),
        };
        let of_lines: usize = self.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        if of_start + of_lines + BESIDE <= MAX_REWRITTEN_HEAD {
            return true;
        }
        let mut written = BytesMut::new();
        self.write(&mut written, false);
        written.len() <= MAX_REWRITTEN_HEAD
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

/// Appends a number in base 10 or 16.
pub(super) fn put_number(out: &mut BytesMut, number: u64, base: u64) {
    let mut digits = [0; 20];
    let mut left = number;
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        let value = (left % base) as u8;
        *digit = if value < 10 { b'0' + value } else { b'a' + (value - 10) };
        left /= base;
        used += 1;
        if left == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.get(digits.len() - used..).unwrap_or(&[]));
}
