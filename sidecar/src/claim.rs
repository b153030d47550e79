//! Who a client is, told to the application in a header of ours, and nobody else's claim of it. What a
//! connection carries that is opaque to us may be HTTP to a lenient server (a line break before the request,
//! a method that we do not know): what looks like it and claims an identity is broken off.

use tulle_mesh::identity::WorkloadId;

use crate::http1::Head;

/// The header that tells the application who calls.
const CLIENT_ID: &str = "tulle-client-id";
/// The same, for the comparison below.
const CLAIM: &[u8] = CLIENT_ID.as_bytes();
/// What the first line of every HTTP/1 request ends with.
const VERSION: &[u8] = b"http/";
/// A first line that is longer is of no HTTP server (Go's reads the longest, 1 MiB).
const MAX_LINE: usize = 1024 * 1024;

/// Tells the application who calls; what the client claims itself is removed.
pub fn introduce(head: &mut Head, identity: Option<&WorkloadId>) {
    head.headers.retain(|(name, _)| !is_claim(name));
    if let Some(identity) = identity {
        head.push(CLIENT_ID, identity.to_string());
    }
}

/// Looks at the bytes of a client as they pass.
#[derive(Debug, Default)]
pub struct Claims {
    state: State,
    /// How much of [`VERSION`] or [`CLAIM`] the last bytes are.
    matched: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the first line, after this many bytes of it.
    Line(usize),
    /// The first line is one of HTTP.
    Http,
    /// It is not.
    Other,
}

impl Default for State {
    fn default() -> Self {
        Self::Line(0)
    }
}

impl Claims {
    /// Whether these bytes may pass.
    pub fn admit(&mut self, bytes: &[u8]) -> bool {
        if self.state == State::Other {
            return true;
        }
        for byte in bytes {
            match self.state {
                State::Other => return true,
                State::Http => {
                    if self.advance(*byte, CLAIM) {
                        return false;
                    }
                }
                State::Line(0) if matches!(byte, b'\r' | b'\n' | b' ' | b'\t') => {}
                State::Line(length) => {
                    if self.advance(*byte, VERSION) {
                        self.state = State::Http;
                    } else if *byte == b'\n' || length >= MAX_LINE {
                        self.state = State::Other;
                    } else {
                        self.state = State::Line(length + 1);
                    }
                }
            }
        }
        true
    }

    /// Takes one byte; whether the pattern is complete. Case does not matter, nor whether a gateway interface
    /// would see `-` or `_` (RFC 3875 §4.1.18 makes one variable of both).
    fn advance(&mut self, byte: u8, pattern: &[u8]) -> bool {
        let byte = if byte == b'_' { b'-' } else { byte.to_ascii_lowercase() };
        loop {
            if pattern.get(self.matched) == Some(&byte) {
                self.matched += 1;
                break;
            }
            if self.matched == 0 {
                break;
            }
            // The longest end of what has matched that the pattern begins with, as Knuth, Morris and Pratt.
            let seen = pattern.get(..self.matched).unwrap_or(&[]);
            let shorter =
                (0..self.matched).rev().find(|length| seen.ends_with(pattern.get(..*length).unwrap_or(&[])));
            self.matched = shorter.unwrap_or(0);
        }
        let complete = self.matched == pattern.len();
        if complete {
            self.matched = 0;
        }
        complete
    }
}

/// Whether a header's name is ours, for a server that makes one variable of `-` and `_`.
fn is_claim(name: &[u8]) -> bool {
    name.len() == CLAIM.len()
        && name.iter().zip(CLAIM).all(|(a, b)| a.eq_ignore_ascii_case(b) || (*a == b'_' && *b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In one piece and byte by byte.
    fn passes(bytes: &[u8]) -> bool {
        let (mut whole, mut single) = (Claims::default(), Claims::default());
        let whole = whole.admit(bytes);
        assert_eq!(
            whole,
            bytes.chunks(1).all(|byte| single.admit(byte)),
            "{:?}",
            String::from_utf8_lossy(bytes)
        );
        whole
    }

    #[test]
    fn a_claim_in_what_a_lenient_server_takes_for_http_does_not_pass() {
        for claim in [
            &b"\r\nGET /x HTTP/1.1\r\nHost: a\r\ntulle-client-id: spiffe://x\r\n\r\n"[..],
            b"get / http/1.1\r\nTULLE_Client-ID: x\r\n\r\n",
            b"ABCDEFGHIJKLMNOPQRS / HTTP/1.0\r\ntulle-client-id: x\r\n\r\n",
            b"GET HTTP://a/ HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\ntttulle-client-tulle-client-id: x\r\n\r\n",
        ] {
            assert!(!passes(claim), "{:?}", String::from_utf8_lossy(claim));
        }
    }

    #[test]
    fn a_name_is_ours_in_every_spelling_that_a_gateway_interface_makes_one_of() {
        for name in ["tulle-client-id", "Tulle-Client-ID", "tulle_client_id", "TULLE_CLIENT-id"] {
            assert!(is_claim(name.as_bytes()), "{name}");
        }
        for name in ["tulle-client", "tulle-client-idx", "xulle-client-id", "tulle.client.id"] {
            assert!(!is_claim(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn everything_else_passes() {
        for other in [
            &b"set key 0 0 15\r\ntulle-client-id\r\n"[..],
            b"*2\r\n$3\r\nGET\r\n$15\r\ntulle-client-id\r\n",
            b"\r\nGET / HTTP/1.1\r\nHost: a\r\nx-client-id: tulle\r\n\r\n",
            b"\x16\x03\x01\x02\x00",
        ] {
            assert!(passes(other), "{:?}", String::from_utf8_lossy(other));
        }
        let mut line = vec![b'x'; MAX_LINE + 1];
        line.extend_from_slice(b" HTTP/1.1\r\ntulle-client-id: x\r\n");
        assert!(passes(&line));
    }
}
