//! What a connection speaks, by its client's first bytes.
//!
//! In: the bytes so far. Out: a protocol as soon as it is certain, and nothing before that. HTTP/1 is certain after
//! a whole request line, HTTP/2 after its whole preface; every other beginning is opaque from the first byte that
//! neither of them allows. How long somebody waits for certainty is the caller's decision.

use std::time::Duration;

use crate::config::Protocol;

/// The start of every HTTP/2 connection (RFC 9113 §3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Undecided bytes are passed on as opaque this long after the first of them: their sender may be waiting for an
/// answer (Hazelcast sends `HZC` and waits). A request line of 64 KiB crosses a loopback in less than a millisecond.
pub const UNDECIDED: Duration = Duration::from_millis(5);
/// No protocol but HTTP/2 begins with so much of its preface, so there is nothing to hold back for.
const SURELY_PREFACE: usize = b"PRI * HTTP/".len();
/// The longest request line that is waited for.
const MAX_LINE: usize = 64 * 1024;
/// What a request line ends with, before the minor version. The parser of requests knows 1.0 and 1.1.
const VERSION: &[u8] = b"HTTP/1.";

/// Reads the beginning of a connection byte by byte, each byte once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Detector {
    state: State,
    /// How many bytes have been read.
    read: usize,
}

/// Where in a request line the reader is: `GET /path HTTP/1.1\r\n`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the method, which has had a letter or not.
    Method { letter: bool },
    /// Behind the space that follows the method.
    Target,
    /// In the scheme of an absolute URI.
    Scheme,
    /// Behind `*`, which is a target by itself.
    Asterisk,
    /// In a target that is read to its end.
    Rest,
    /// After this many bytes of the version.
    Version(usize),
    /// Behind the minor version.
    Minor,
    /// Behind the carriage return.
    Return,
}

impl Default for State {
    fn default() -> Self {
        Self::Method { letter: false }
    }
}

impl Detector {
    /// What the bytes say; `None` until it is certain. `bytes` is the whole beginning of the connection: what was
    /// shown before, and what has come since.
    pub fn look(&mut self, bytes: &[u8]) -> Option<Protocol> {
        let compared = bytes.len().min(PREFACE.len());
        if bytes.get(..compared) == PREFACE.get(..compared) {
            return (compared == PREFACE.len()).then_some(Protocol::Http2);
        }
        while let Some(byte) = bytes.get(self.read) {
            match self.next(*byte, bytes) {
                Next::Go(state) if self.read < MAX_LINE => self.state = state,
                Next::Request => return Some(Protocol::Http1),
                Next::Go(_) | Next::Other => return Some(Protocol::Opaque),
            }
            self.read += 1;
        }
        None
    }

    fn next(&self, byte: u8, bytes: &[u8]) -> Next {
        Next::Go(match (self.state, byte) {
            // A source of Icecast: what follows is not HTTP, although the line is.
            (State::Method { letter: true }, b' ') if bytes.starts_with(b"SOURCE ") => return Next::Other,
            (State::Method { letter: true }, b' ') => State::Target,
            (State::Method { letter }, _) if is_token(byte) => {
                State::Method { letter: letter || byte.is_ascii_alphabetic() }
            }
            (State::Target, b'/') => State::Rest,
            (State::Target, b'*') => State::Asterisk,
            // The authority form may begin with a digit or a bracket.
            (State::Target, _) if is_target(byte) && bytes.starts_with(b"CONNECT ") => State::Rest,
            (State::Target, _) if byte.is_ascii_alphabetic() => State::Scheme,
            (State::Scheme, b':') => State::Rest,
            (State::Scheme, b'+' | b'-' | b'.') => State::Scheme,
            (State::Scheme, _) if byte.is_ascii_alphanumeric() => State::Scheme,
            (State::Asterisk | State::Rest, b' ') => State::Version(0),
            (State::Rest, _) if is_target(byte) => State::Rest,
            (State::Version(matched), _) if VERSION.get(matched) == Some(&byte) => {
                State::Version(matched + 1)
            }
            (State::Version(matched), b'0' | b'1') if matched == VERSION.len() => State::Minor,
            (State::Minor, b'\r') => State::Return,
            (State::Return, b'\n') => return Next::Request,
            _ => return Next::Other,
        })
    }
}

/// What a byte means for the line that it is in.
enum Next {
    /// It goes on.
    Go(State),
    /// It was the last of a request line.
    Request,
    /// The line is not a request line.
    Other,
}

/// A character of a token (RFC 9110 §5.6.2), as methods and the names of headers consist of.
pub fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A byte that may stand in a request target. Bytes beyond ASCII are not legal there, and common.
fn is_target(byte: u8) -> bool {
    byte > b' ' && byte != 0x7f
}

/// What the beginning of a connection says; `None` until it is certain.
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    Detector::default().look(bytes)
}

/// Whether bytes of which [`classify`] knows nothing yet may wait for more without harm, because only one protocol
/// begins like them.
pub fn is_surely_http2(bytes: &[u8]) -> bool {
    bytes.len() >= SURELY_PREFACE && PREFACE.starts_with(bytes)
}

/// Whether the first bytes may be a TLS record with a ClientHello.
pub fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x16, 0x03, ..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// In one piece, and byte by byte: the decision, and after how many bytes it was certain.
    fn read(bytes: &[u8]) -> (Option<Protocol>, usize) {
        let mut single = Detector::default();
        let mut certain = (None, bytes.len());
        for length in 0..=bytes.len() {
            if let Some(protocol) = single.look(&bytes[..length]) {
                certain = (Some(protocol), length);
                break;
            }
        }
        assert_eq!(classify(bytes), certain.0, "{:?}", String::from_utf8_lossy(bytes));
        certain
    }

    #[test]
    fn a_request_line_is_http_1_once_it_is_whole() {
        for line in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"GET / HTTP/1.0\r\n",
            b"OPTIONS * HTTP/1.1\r\n",
            b"M-SEARCH * HTTP/1.1\r\n",
            b"delete /x HTTP/1.1\r\n",
            b"X!#$%&'*+.^_`|~9 /a?b=c HTTP/1.1\r\n",
            b"GET http://web.shop:80/x HTTP/1.1\r\n",
            b"GET ftp+x-1.0://web/x HTTP/1.1\r\n",
            b"CONNECT web.shop:443 HTTP/1.1\r\n",
            b"CONNECT 10.0.0.1:443 HTTP/1.1\r\n",
            b"CONNECT [::1]:443 HTTP/1.1\r\n",
            b"GET /caf\xc3\xa9 HTTP/1.1\r\n",
            b"PRI * HTTP/1.1\r\n",
            b"SOURCES / HTTP/1.1\r\n",
            b"GET /SOURCE HTTP/1.1\r\n",
        ] {
            assert_eq!(
                read(line),
                (Some(Protocol::Http1), line.len()),
                "{:?}",
                String::from_utf8_lossy(line)
            );
            assert_eq!(classify(&line[..line.len() - 1]), None);
        }
    }

    #[test]
    fn http_2_is_known_by_its_whole_preface() {
        assert_eq!(read(PREFACE), (Some(Protocol::Http2), PREFACE.len()));
        assert_eq!(read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX"), (Some(Protocol::Opaque), PREFACE.len()));
        assert!(!is_surely_http2(b"PRI"));
        assert!(is_surely_http2(b"PRI * HTTP/2.0\r\n"));
        assert!(!is_surely_http2(b"PRI * HTTP/1.1\r\n"));
    }

    #[test]
    fn everything_else_is_opaque_from_the_first_byte_that_says_so() {
        for (bytes, certain) in [
            (&b"*1\r\n$4\r\nPING\r\n"[..], 3),
            (b"+PING\r\n", 6),
            (b"PING\r\n", 5),
            (b"KEYS *\r\n", 7),
            (b"GET hello\r\n", 10),
            (b"GET hello world\r\n", 10),
            (b"SET a b\r\n", 6),
            (b"get /x\r\n", 7),
            (b"GET  / HTTP/1.1\r\n", 5),
            (b"GET / HTTP/1.1\n", 15),
            (b"GET / HTTP/1.2\r\n", 14),
            (b"GET / HTTP/2.0\r\n", 12),
            (b"GET /a b HTTP/1.1\r\n", 8),
            (b"GET *x HTTP/1.1\r\n", 6),
            (b"GET ?x HTTP/1.1\r\n", 5),
            (b"123 / HTTP/1.1\r\n", 4),
            (b"\r\nGET / HTTP/1.1\r\n", 1),
            (b"\x16\x03\x01\x02\x00", 1),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", 1),
            (b"SOURCE /live HTTP/1.0\r\n", 7),
            (b"hello there", 11),
        ] {
            let (protocol, at) = read(bytes);
            let text = String::from_utf8_lossy(bytes);
            if bytes == b"hello there" {
                // A scheme could still follow.
                assert_eq!(protocol, None, "{text:?}");
            } else {
                assert_eq!((protocol, at), (Some(Protocol::Opaque), certain), "{text:?}");
            }
        }
    }

    #[test]
    fn a_few_letters_are_undecided() {
        for bytes in [&b""[..], b"HZC", b"G", b"GET ", b"GET /", b"GET / HTTP/1.", b"PRI * HTTP/2.0\r\n"] {
            assert_eq!(read(bytes).0, None, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_line_without_an_end_is_given_up() {
        let mut line = b"GET /".to_vec();
        line.resize(MAX_LINE, b'a');
        assert_eq!(classify(&line), None);
        line.extend_from_slice(b"a");
        assert_eq!(classify(&line), Some(Protocol::Opaque));
    }

    proptest! {
        #[test]
        fn any_split_gives_the_same_answer(bytes in "[GETPRI]{0,5}[ -~\\r\\n]{0,20}( HTTP/1\\.1\r\n)?", cuts in proptest::collection::vec(1usize..6, 1..30)) {
            let bytes = bytes.as_bytes();
            let (mut detector, mut seen, mut answer) = (Detector::default(), 0, None);
            for cut in cuts {
                seen = (seen + cut).min(bytes.len());
                answer = detector.look(&bytes[..seen]);
                if answer.is_some() { break; }
            }
            let whole = classify(&bytes[..seen]);
            prop_assert_eq!(answer, whole);
        }
    }
}
