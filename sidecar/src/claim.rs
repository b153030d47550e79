//! The header that names a request's client to the application, and the filter against forged ones.
//!
//! What a connection carries that is opaque to us may be HTTP to a lenient server (a line break before the request, a
//! method that we do not know), or HTTP/2 on a port that was declared as something else. The header need not be forged: an
//! HTTP proxy in a pod with a sidecar gets it with every request, and passes it on, also behind a PROXY preamble. So in
//! HTTP/1 its name is made another one of the same length; HTTP/2, which compresses names, is broken off.

mod http2;

use bytes::Bytes;
use memchr::memchr3;

use crate::detect::{PREFACE, is_token};
use crate::http1::Head;
use http2::Http2Filter;

/// The header that tells the application who calls.
const CLIENT_ID: &str = "tulle-client-id";
/// The same, for the comparison below.
const CLAIM: &[u8] = CLIENT_ID.as_bytes();
/// What the first line of every HTTP/1 request ends with.
const VERSION: &[u8] = b"http/";
/// What may stand in front of the first line: the address of a client, as a load balancer tells it (PROXY protocol, in
/// text and in binary). Some servers take it from whoever sends it.
const PROXY_TEXT: &[u8] = b"PROXY ";
const PROXY_BINARY: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Where in that its first byte is that does not stand in an empty line.
const SIGNATURE_AT: usize = 4;
/// Version, command, family, and the length of what follows.
const PROXY_BINARY_HEADER: usize = 4;
/// What its last byte becomes in an opaque connection.
const MASK: u8 = b'x';
/// A first line that is longer is of no HTTP server (Go's reads the longest, 1 MiB).
const MAX_LINE: usize = 1024 * 1024;
/// What a first line without a version begins with (HTTP/0.9). Python's `http.server` reads headers behind it.
const SIMPLE: &[u8] = b"GET";
/// The first byte of HTTP/2's preface.
const PREFACE_BEGINS: u8 = b'P';
/// A connection that has HTTP/2's preface more often hides something.
const MAX_PREFACES: usize = 4;

/// Names the client of a request to the application: `identity` is its SPIFFE id. A name that the client has sent
/// itself is removed.
pub fn set_client_id(head: &mut Head, identity: Option<Bytes>) {
    head.headers.retain(|(name, _)| !is_claim(name));
    if let Some(identity) = identity {
        head.push(CLIENT_ID, identity);
    }
}

/// Looks at the bytes of an opaque connection's client as they pass.
#[derive(Debug, Default)]
pub struct ForgedIdentityFilter {
    state: State,
    /// How many bytes of [`VERSION`] or [`CLAIM`] have matched.
    matched: usize,
    /// What the first line begins with.
    begins: [u8; PROXY_TEXT.len()],
    /// How many bytes of HTTP/2's preface have matched: it may follow an HTTP/1 request that asks for `h2c`.
    preface: usize,
    /// Whether nothing came before that preface, except a PROXY preamble.
    leads: bool,
    /// What reads the connection behind each preface. One that does not lead may also be in a body, sent so that we take
    /// the requests behind it for frames: so the others read on, and lines of HTTP/1 are still looked for.
    http2: Vec<Http2Filter>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// In front of the first line.
    #[default]
    Start,
    /// After this many bytes of [`PROXY_BINARY`], which nothing else begins with.
    Signature(usize),
    /// In the header behind it: bytes so far, and the number that its last two are.
    Header { read: usize, left: u16 },
    /// In the addresses behind that, with so many bytes left.
    Addresses(u16),
    /// In the first line, after this many bytes of it.
    Line(usize),
    /// Behind its version, if nothing else follows.
    Version(usize),
    /// The first line was not one of HTTP.
    Other,
    /// It was one: at the start of another line, perhaps in our name.
    Name,
    /// In the rest of a line.
    Rest,
}

impl ForgedIdentityFilter {
    /// These bytes as they may pass; `None`: they may not, nor may any that follow.
    pub fn admit(&mut self, bytes: Bytes) -> Option<Bytes> {
        if !self.http2.iter_mut().all(|http2| http2.admit(&bytes)) {
            return None;
        }
        let mut named = Vec::new();
        let mut at = 0;
        while let Some(byte) = bytes.get(at).filter(|_| self.state != State::Other) {
            let skipped = self.skip(bytes.get(at..).unwrap_or(&[]));
            if skipped > 0 {
                at += skipped;
                continue;
            }
            let is_first = self.state == State::Start;
            self.state = self.next(*byte);
            if self.state == State::Rest && self.matched == CLAIM.len() {
                self.matched = 0;
                // Where the name goes on, it is another one. Of the last byte at hand nobody knows.
                if bytes.get(at + 1).is_none_or(|next| ends_a_name(*next)) {
                    named.push(at);
                }
            }
            if self.completes_preface(*byte, is_first) {
                let mut http2 = Http2Filter::default();
                if self.http2.len() == MAX_PREFACES || !http2.admit(bytes.get(at + 1..).unwrap_or(&[])) {
                    return None;
                }
                self.http2.push(http2);
                if self.leads {
                    // No server reads it as HTTP/1.
                    self.state = State::Other;
                }
            }
            at += 1;
        }
        Some(if named.is_empty() { bytes } else { masked(&bytes, &named) })
    }

    /// Skips the bytes in front at which nothing can begin or end, and returns how many those are.
    fn skip(&mut self, bytes: &[u8]) -> usize {
        if self.preface > 0 {
            return 0;
        }
        let skipped = match self.state {
            State::Rest => memchr3(b'\r', b'\n', PREFACE_BEGINS, bytes).unwrap_or(bytes.len()),
            State::Line(length) if self.matched == 0 && length >= self.begins.len() => {
                let means = |byte: &u8| matches!(*byte, b'h' | b'H' | b'\r' | b'\n' | PREFACE_BEGINS);
                let skipped =
                    bytes.iter().position(means).unwrap_or(bytes.len()).min(MAX_LINE.saturating_sub(length));
                self.state = State::Line(length + skipped);
                skipped
            }
            _ => 0,
        };
        self.leads &= skipped == 0;
        skipped
    }

    /// Takes a byte; whether HTTP/2's preface ends with it. `is_first`: nothing was in front of it.
    fn completes_preface(&mut self, byte: u8, is_first: bool) -> bool {
        let before = self.preface;
        self.preface = match before {
            at if PREFACE.get(at) == Some(&byte) => at + 1,
            // `PRI * HTTP` ends with what it begins with.
            10 if byte == b'R' => 2,
            _ => usize::from(byte == PREFACE_BEGINS),
        };
        if before == 0 || self.preface != before + 1 {
            // It begins here, or has begun anew.
            self.leads = is_first;
        }
        self.preface == PREFACE.len()
    }

    /// Takes one byte. When it completes our name, [`State::Rest`] with all of [`CLAIM`] matched.
    fn next(&mut self, byte: u8) -> State {
        let blank = matches!(byte, b' ' | b'\t');
        // Python takes a carriage return for the end of a header's line.
        let ends_line = matches!(byte, b'\r' | b'\n');
        let state = self.state;
        match state {
            // Of the signature, what comes before are empty lines.
            State::Start if byte == 0 => State::Signature(SIGNATURE_AT + 1),
            // Python splits the line at more characters than blanks.
            State::Start if !byte.is_ascii_graphic() => State::Start,
            State::Start => self.line(byte, 0),
            State::Signature(at) if PROXY_BINARY.get(at) != Some(&byte) => State::Other,
            State::Signature(at) if at + 1 < PROXY_BINARY.len() => State::Signature(at + 1),
            State::Signature(_) => State::Header { read: 0, left: 0 },
            State::Header { read, left } => {
                let (read, left) = (read + 1, left << 8 | u16::from(byte));
                if read < PROXY_BINARY_HEADER { State::Header { read, left } } else { addresses(left) }
            }
            State::Addresses(left) => addresses(left.saturating_sub(1)),
            State::Line(length) => self.line(byte, length),
            State::Version(_) if ends_line => State::Name,
            State::Version(length) if !byte.is_ascii_graphic() || byte == b'.' || byte.is_ascii_digit() => {
                State::Version(length)
            }
            State::Version(length) => self.line(byte, length),
            State::Other => State::Other,
            State::Name | State::Rest if ends_line => {
                self.matched = 0;
                State::Name
            }
            State::Name if blank && self.matched == 0 => State::Name,
            State::Name if !self.matches(byte, CLAIM) => State::Rest,
            State::Name if self.matched < CLAIM.len() => State::Name,
            State::Name | State::Rest => State::Rest,
        }
    }

    /// Takes a byte of the first line.
    fn line(&mut self, byte: u8, length: usize) -> State {
        if let Some(room) = self.begins.get_mut(length) {
            *room = byte;
        }
        if byte == b'\n' && self.begins == PROXY_TEXT {
            (self.begins, self.matched) = ([0; PROXY_TEXT.len()], 0);
            return State::Start;
        }
        if matches!(byte, b'\r' | b'\n') && self.begins.starts_with(SIMPLE) {
            self.matched = 0;
            return State::Name;
        }
        if byte == b'\n' || length >= MAX_LINE {
            return State::Other;
        }
        if !self.matches(byte, VERSION) {
            // No other part of it begins as it does.
            self.matches(byte, VERSION);
        }
        if self.matched < VERSION.len() {
            return State::Line(length + 1);
        }
        self.matched = 0;
        State::Version(length + 1)
    }

    /// Whether a byte goes on with a pattern; otherwise the match begins anew. Case does not matter.
    fn matches(&mut self, byte: u8, pattern: &[u8]) -> bool {
        let goes_on = pattern.get(self.matched).is_some_and(|ours| is_same(byte, *ours));
        self.matched = if goes_on { self.matched + 1 } else { 0 };
        goes_on
    }
}

/// Whether a header's name is over with this byte.
fn ends_a_name(byte: u8) -> bool {
    matches!(byte, b':' | b' ' | b'\t' | b'\r')
}

/// A copy in which the bytes at these places are [`MASK`].
fn masked(bytes: &[u8], places: &[usize]) -> Bytes {
    let mut copy = bytes.to_vec();
    for place in places {
        if let Some(byte) = copy.get_mut(*place) {
            *byte = MASK;
        }
    }
    copy.into()
}

/// Behind addresses of which so many bytes are left, the first line begins.
fn addresses(left: u16) -> State {
    if left == 0 { State::Start } else { State::Addresses(left) }
}

/// Whether a header's name is ours for some server.
pub fn is_claim(name: &[u8]) -> bool {
    name.len() == CLAIM.len() && name.iter().zip(CLAIM).all(|(byte, ours)| is_same(*byte, *ours))
}

/// Gateway interfaces make one variable of `-` and `_` (RFC 3875 §4.1.18), and some (lighttpd) of every character that
/// is neither letter nor digit.
fn is_same(byte: u8, ours: u8) -> bool {
    byte.eq_ignore_ascii_case(&ours) || (ours == b'-' && is_token(byte) && !byte.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt as _;

    use super::*;

    /// What passes of these bytes, in one piece and byte by byte.
    fn passed(bytes: &[u8]) -> [Option<Vec<u8>>; 2] {
        let through = |pieces: &mut dyn Iterator<Item = &[u8]>| {
            let mut filter = ForgedIdentityFilter::default();
            let pieces = pieces.map(|piece| filter.admit(Bytes::copy_from_slice(piece)));
            pieces.collect::<Option<Vec<Bytes>>>().map(|pieces| pieces.concat())
        };
        [through(&mut std::iter::once(bytes)), through(&mut bytes.chunks(1))]
    }

    /// Whether they pass as they are.
    fn passes(bytes: &[u8]) -> bool {
        let [whole, single] = passed(bytes);
        assert_eq!(whole, single, "{:?}", String::from_utf8_lossy(bytes));
        whole.as_deref() == Some(bytes)
    }

    #[test]
    fn a_claim_in_what_a_lenient_server_takes_for_http_does_not_pass() {
        for claim in [
            &b"\r\nGET /x HTTP/1.1\r\nHost: a\r\ntulle-client-id: spiffe://x\r\n\r\n"[..],
            b"get / http/1.1\r\nTULLE_Client-ID: x\r\n\r\n",
            b"get / http/1.1\r\ntulle.client-id: x\r\n\r\n",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4444 80\r\nGET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"PROXY UNKNOWN\r\nGET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\n\n\n\n\n\n\n\n\n\n\n\nGET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"ABCDEFGHIJKLMNOPQRS / HTTP/1.0\r\ntulle-client-id: x\r\n\r\n",
            b"GET HTTP://a/ HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\nx: y\r\n tulle-client-id : x\r\n\r\n",
            b"get /hhttp/1.1/x hHTTP/1.1 \nhost: a\ntulle-client-id:x\n\n",
            b"GET / HTTP/1.1\nx: a\rtulle-client-id: x\r\n\r\n",
            b"GET / HTTP/1.1\rtulle-client-id: x\r\r",
            b"GET / HTTP/1.1\x0c\ntulle-client-id: x\n\n",
            b"GET /h\r\ntulle-client-id: x\r\n\r\n",
            b"\x0bGET\x0c/http\r\ntulle-client-id: x\r\n\r\n",
            b"PROXY UNKNOWN\r\nGET /\r\ntulle-client-id: x\r\n\r\n",
        ] {
            let [whole, single] = passed(claim);
            assert_eq!(whole, single, "{:?}", String::from_utf8_lossy(claim));
            let passed = whole.unwrap();
            let changed: Vec<(u8, u8)> =
                claim.iter().copied().zip(passed.iter().copied()).filter(|(sent, passed)| sent != passed).collect();
            assert_eq!(passed.len(), claim.len());
            assert_eq!(changed.len(), 1, "{:?}", String::from_utf8_lossy(&passed));
            assert!(changed[0].0.eq_ignore_ascii_case(&b'd') && changed[0].1 == MASK);
        }
    }

    #[test]
    fn every_request_of_a_connection_loses_the_name() {
        let request = b"GET / HTTP/1.1\r\nHost: a\r\ntulle-client-id: spiffe://x\r\n\r\n";
        let [whole, single] = passed(&request.repeat(3));
        assert_eq!(whole, single);
        let passed = String::from_utf8(whole.unwrap()).unwrap();
        assert_eq!(passed.matches("\r\ntulle-client-ix: spiffe://x").count(), 3);
        assert!(!passed.contains("tulle-client-id"));
    }

    #[test]
    fn a_name_that_goes_on_is_another_one() {
        let [whole, _] = passed(b"GET / HTTP/1.1\r\ntulle-client-idx: y\r\n\r\n");
        assert_eq!(whole.unwrap(), b"GET / HTTP/1.1\r\ntulle-client-idx: y\r\n\r\n");
    }

    /// What an HTTP/2 client sends for a request with this header.
    async fn http2_request(name: &'static str, value: &str) -> Vec<u8> {
        let (near, mut far) = tokio::io::duplex(64 * 1024);
        let (mut send, connection) = h2::client::handshake(near).await.unwrap();
        let driver = tokio::spawn(connection);
        let request = http::Request::get("http://web/").header("x-first", "a").header(name, value);
        let sent = send.send_request(request.header("x-last", "b").body(()).unwrap(), true).unwrap();
        let mut bytes = vec![0; 16 * 1024];
        let mut length = 0;
        let quiet = std::time::Duration::from_millis(50);
        while let Ok(Ok(read)) = tokio::time::timeout(quiet, far.read(&mut bytes[length..])).await {
            length += read;
        }
        bytes.truncate(length);
        drop((sent, send));
        driver.abort();
        bytes
    }

    #[tokio::test]
    async fn a_claim_in_http_2_does_not_pass_and_other_requests_do() {
        for name in ["tulle-client-id", "tulle_client_id"] {
            let forged = http2_request(name, "spiffe://x").await;
            assert!(forged.starts_with(PREFACE));
            assert_eq!(passed(&forged), [None, None], "{name}");
            let mut upgraded = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\n\r\nPRI * HTT".to_vec();
            upgraded.extend_from_slice(&forged);
            assert_eq!(passed(&upgraded), [None, None], "{name} after an upgrade");
        }
        assert!(passes(&http2_request("x-tulle", "tulle-client-id: x").await));
        assert!(passes(&http2_request("tulle-client-ip", &"v".repeat(300)).await));
    }

    #[tokio::test]
    async fn a_preface_in_a_body_hides_nothing_that_follows() {
        const POST: &[u8] = b"POST / HTTP/1.1\r\nContent-Length: 33\r\n\r\n";
        // A frame that is longer than what follows.
        const DATA: &[u8] = b"\xff\xff\xff\0\0\0\0\0\x01";
        let hiding = [PREFACE, DATA].concat();
        let claim = b"GET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n";
        let [whole, single] = passed(&[POST, &hiding, claim].concat());
        assert_eq!(whole, single);
        assert!(whole.unwrap().ends_with(b"\r\ntulle-client-ix: x\r\n\r\n"));
        for other in ["P", "PRI * HTT"] {
            let [whole, single] = passed(&[other.as_bytes(), &hiding, claim].concat());
            assert_eq!(whole, single);
            assert!(whole.unwrap().ends_with(b"\r\ntulle-client-ix: x\r\n\r\n"), "{other}");
        }
        let forged = http2_request("tulle-client-id", "x").await;
        assert_eq!(passed(&[POST, &hiding, &forged].concat()), [None, None]);
        assert_eq!(passed(&[POST, &PREFACE.repeat(MAX_PREFACES + 1)].concat()), [None, None]);
        // What HTTP/2 carries from the beginning is nobody's HTTP/1.
        for preamble in [&b""[..], b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"] {
            assert!(passes(&[preamble, &hiding, claim, PREFACE].concat()), "{preamble:?}");
        }
    }

    #[test]
    fn a_name_is_ours_in_every_spelling_that_a_gateway_interface_makes_one_of() {
        for name in
            ["tulle-client-id", "Tulle-Client-ID", "tulle_client_id", "TULLE_CLIENT-id", "tulle.client~id"]
        {
            assert!(is_claim(name.as_bytes()), "{name}");
        }
        for name in
            ["tulle-client", "tulle-client-idx", "xulle-client-id", "tulle:client-id", "tullexclient-id"]
        {
            assert!(!is_claim(name.as_bytes()), "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_is_skipped_changes_nothing(
            parts in proptest::collection::vec(
                proptest::sample::select(vec![
                    "GET /", "h", "HTTP/1.1", "http", "/p", "a?b=cdefgh", " ", "\r\n", "\n", "\r", "P", "PRI * HTTP/2.0", "PROXY ",
                    "tulle-client-id", "Tulle_client", ": x", "x: y", "\0", "{}",
                ]),
                0..24,
            ),
        ) {
            let bytes = parts.concat();
            let mut each = ForgedIdentityFilter::default();
            for byte in bytes.bytes() {
                if each.state == State::Other {
                    break;
                }
                let is_first = each.state == State::Start;
                each.state = each.next(byte);
                if each.state == State::Rest && each.matched == CLAIM.len() {
                    each.matched = 0;
                }
                each.completes_preface(byte, is_first);
            }
            let mut filter = ForgedIdentityFilter::default();
            prop_assert!(filter.admit(bytes.into()).is_some());
            let seen = |filter: &ForgedIdentityFilter| {
                (filter.state, filter.matched, filter.begins, filter.preface, filter.leads)
            };
            prop_assert_eq!(seen(&filter), seen(&each));
        }
    }

    #[test]
    fn everything_else_passes() {
        for other in [
            &b"set key 0 0 15\r\ntulle-client-id\r\n"[..],
            b"*2\r\n$3\r\nGET\r\n$15\r\ntulle-client-id\r\n",
            b"\r\nGET / HTTP/1.1\r\nHost: a\r\nx-client-id: tulle\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
            b"get / HTTP/1.1\r\nx: tulle-client-id: y\r\ntulle-client-i: y\r\ntulle-client\r\n-id: x\r\n",
            b"<13>1 - web - - - \"GET / HTTP/1.1\" 200\ntulle-client-id: x\n",
            b"{\"short_message\":\"GET / HTTP/1.1\",\"headers\":\"\\ntulle-client-id: x\"}\0",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4444 80\r\nEHLO http/1.1\r\nx\r\n",
            b"PROXYING x\r\nGET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"\r\n\r\n\0\r\nQUIX\nGET / HTTP/1.1\r\ntulle-client-id: x\r\n\r\n",
            b"agent okhttp/4.12 (linux)\ntulle-client-id: x\n",
            b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n\x16\x03\x01",
        ] {
            assert!(passes(other), "{:?}", String::from_utf8_lossy(other));
        }
        let mut line = vec![b'x'; MAX_LINE + 1];
        line.extend_from_slice(b" HTTP/1.1\r\ntulle-client-id: x\r\n");
        assert!(passes(&line));
    }
}
