//! What a connection speaks, by its first bytes. Who speaks first is a race, not a timer: see
//! `outbound::race`.

use std::io;

use bytes::BytesMut;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use crate::config::Protocol;

/// The start of every HTTP/2 connection (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest method that is taken for one.
const MAX_METHOD: usize = 16;

/// What the first bytes say; `None` until they say it.
pub fn classify(bytes: &[u8]) -> Option<Protocol> {
    if bytes.is_empty() {
        return None;
    }
    let compared = bytes.len().min(PREFACE.len());
    if bytes.get(..compared) == PREFACE.get(..compared) {
        return (compared == PREFACE.len()).then_some(Protocol::Http2);
    }
    let window = bytes.get(..MAX_METHOD + 2).unwrap_or(bytes);
    let Some(space) = window.iter().position(|byte| *byte == b' ') else {
        let token = window.len() <= MAX_METHOD && window.iter().all(u8::is_ascii_uppercase);
        return if token { None } else { Some(Protocol::Opaque) };
    };
    let method = window.get(..space).unwrap_or(&[]);
    if method.is_empty() || !method.iter().all(|byte| byte.is_ascii_uppercase() || *byte == b'-') {
        return Some(Protocol::Opaque);
    }
    match window.get(space + 1) {
        None => None,
        Some(b'/' | b'*' | b'h') => Some(Protocol::Http1),
        Some(_) => Some(Protocol::Opaque),
    }
}

/// Reads until the first bytes say what they are. An end of the connection counts as opaque.
///
/// # Errors
/// When the connection fails.
pub async fn first_bytes(stream: &mut TcpStream, buffer: &mut BytesMut) -> io::Result<Protocol> {
    loop {
        if let Some(protocol) = classify(buffer) {
            return Ok(protocol);
        }
        buffer.reserve(4 * 1024);
        if stream.read_buf(buffer).await? == 0 {
            return Ok(Protocol::Opaque);
        }
    }
}

/// Whether the first bytes may be a TLS record with a ClientHello.
pub fn is_tls(bytes: &[u8]) -> bool {
    matches!(bytes, [0x16, 0x03, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_say_what_is_spoken() {
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], Some(Protocol::Http1)),
            (b"OPTIONS * HTTP/1.1", Some(Protocol::Http1)),
            (b"M-SEARCH * HTTP/1.1", Some(Protocol::Http1)),
            (PREFACE, Some(Protocol::Http2)),
            (b"PRI * HTTP/2.0\r\n", None),
            (b"G", None),
            (b"GET ", None),
            (b"PUT key value", Some(Protocol::Opaque)),
            (b"*1\r\n$4\r\nPING\r\n", Some(Protocol::Opaque)),
            (b"\x16\x03\x01\x02\x00", Some(Protocol::Opaque)),
            (b"\x00\x00\x00\x08\x04\xd2\x16\x2f", Some(Protocol::Opaque)),
            (b"hello there", Some(Protocol::Opaque)),
            (b"ABCDEFGHIJKLMNOPQRSTUVWX", Some(Protocol::Opaque)),
            (b"", None),
        ] {
            assert_eq!(classify(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
    }
}
