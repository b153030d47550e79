//! Where a head ends, in bytes that arrive piece by piece.

use memchr::memchr2;

use super::MAX_HEAD;
use super::error::HeadError;

/// Searches a head's end. It remembers how far it has looked, so a head that arrives in many pieces is
/// still looked at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scan {
    /// The first byte that was not looked at.
    at: usize,
    /// Where the current line begins.
    line: usize,
    /// The longest head allowed, in bytes.
    longest: usize,
}

impl Default for Scan {
    fn default() -> Self {
        Self::up_to(MAX_HEAD)
    }
}

impl Scan {
    /// A search that gives up beyond this many bytes.
    pub(super) fn up_to(longest: usize) -> Self {
        Self { at: 0, line: 0, longest }
    }

    /// The length of the head up to and including its empty line; `None` until that line is here. The
    /// buffer must begin as it did in the call before.
    ///
    /// # Errors
    /// [`HeadError`] for a line feed or a carriage return that stands alone, since a lenient reader would
    /// end the head there, and [`HeadError::TOO_LONG`].
    pub(super) fn end(&mut self, buffer: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(rest) = buffer.get(self.at..) {
            let Some(found) = memchr2(b'\r', b'\n', rest) else {
                self.at = buffer.len();
                break;
            };
            let end = self.at + found;
            if end + 2 > self.longest {
                return Err(HeadError::TOO_LONG);
            }
            self.at = end;
            match (rest.get(found), buffer.get(end + 1)) {
                (Some(b'\r'), None) => return Ok(None),
                (Some(b'\r'), Some(b'\n')) => {}
                (Some(b'\r'), Some(_)) => return Err(HeadError("a bare carriage return")),
                _ => return Err(HeadError("a bare line feed")),
            }
            self.at = end + 2;
            if end == self.line {
                return Ok(Some(self.at));
            }
            self.line = self.at;
        }
        if buffer.len() >= self.longest { Err(HeadError::TOO_LONG) } else { Ok(None) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_found_wherever_it_is_cut() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nbody";
        for cut in 0..head.len() {
            let mut scan = Scan::default();
            let first = scan.end(&head[..cut]).unwrap();
            assert_eq!(first, (cut >= 27).then_some(27), "{cut}");
            if first.is_none() {
                assert_eq!(scan.end(head), Ok(Some(27)), "{cut}");
            }
        }
    }

    #[test]
    fn no_byte_is_looked_at_twice() {
        let mut scan = Scan::default();
        assert_eq!(scan.end(b"GET / HTTP/1.1\r\nX: aaa"), Ok(None));
        // Had the search begun anew, it would have met the bare line feed that stands there now.
        assert_eq!(scan.end(b"GET / HTTP/1.1\r\nX\n aaa\r\n\r\n"), Ok(Some(26)));
    }

    #[test]
    fn line_ends_that_stand_alone_are_refused() {
        for bytes in ["a\n\n", "a\r\n\n", "a\rb", "a\r\r\n\r\n", "\n"] {
            assert!(Scan::default().end(bytes.as_bytes()).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn a_head_is_refused_as_soon_as_it_is_too_long() {
        let mut bytes = vec![b'x'; 63];
        assert_eq!(Scan::up_to(64).end(&bytes), Ok(None));
        bytes.push(b'x');
        assert_eq!(Scan::up_to(64).end(&bytes), Err(HeadError::TOO_LONG));
        bytes.extend_from_slice(b"\r\n\r\n");
        assert_eq!(Scan::up_to(64).end(&bytes), Err(HeadError::TOO_LONG));
    }
}
