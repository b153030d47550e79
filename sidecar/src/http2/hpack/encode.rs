//! Fields to header blocks (RFC 7541 §6), each by itself.

use bytes::{BufMut as _, BytesMut};

use super::tables::index_of;

/// Indexes of the static table.
pub const METHOD: usize = 2;
pub const METHOD_GET: usize = 2;
pub const METHOD_POST: usize = 3;
pub const PATH: usize = 4;
pub const PATH_ROOT: usize = 4;
pub const SCHEME_HTTP: usize = 6;
pub const AUTHORITY: usize = 1;
const STATUS: usize = 8;
const CONTENT_LENGTH: usize = 28;

/// Literal fields: not to be indexed, and never to be, not by those behind either (RFC 7541 §7.1.3).
const WITHOUT_INDEXING: u8 = 0;
const NEVER_INDEXED: u8 = 0x10;

/// The table of the encoder has no entries. Said where the peer makes it smaller than it is by default (RFC 7541 §4.2).
pub fn no_table(to: &mut BytesMut) {
    to.put_u8(0x20);
}

/// A field of the static table.
pub fn indexed(to: &mut BytesMut, index: usize) {
    number(to, 0x80, 7, index);
}

/// A field whose name has this index.
pub fn with_name(to: &mut BytesMut, index: usize, value: &[u8]) {
    // authorization, cookie, proxy-authorization, set-cookie
    let kind = if matches!(index, 23 | 32 | 49 | 55) { NEVER_INDEXED } else { WITHOUT_INDEXING };
    number(to, kind, 4, index);
    string(to, value);
}

/// `:status`
pub fn status(to: &mut BytesMut, status: u16) {
    match status {
        200 => indexed(to, 8),
        204 => indexed(to, 9),
        206 => indexed(to, 10),
        304 => indexed(to, 11),
        400 => indexed(to, 12),
        404 => indexed(to, 13),
        500 => indexed(to, 14),
        other => decimal(to, STATUS, other.into()),
    }
}

/// `content-length`
pub fn content_length(to: &mut BytesMut, length: u64) {
    decimal(to, CONTENT_LENGTH, length);
}

fn decimal(to: &mut BytesMut, index: usize, value: u64) {
    let (mut digits, mut from, mut left) = ([0_u8; 20], 20, value);
    loop {
        from -= 1;
        if let Some(digit) = digits.get_mut(from) {
            *digit = b'0' + (left % 10) as u8;
        }
        left /= 10;
        if left == 0 {
            break;
        }
    }
    with_name(to, index, digits.get(from..).unwrap_or_default());
}

/// An end-to-end field, whose name is written in small letters.
pub fn field(to: &mut BytesMut, name: &[u8], value: &[u8]) {
    if let Some(index) = index_of(name) {
        return with_name(to, index, value);
    }
    to.put_u8(WITHOUT_INDEXING);
    number(to, 0, 7, name.len());
    let at = to.len();
    to.put_slice(name);
    if let Some(name) = to.get_mut(at..) {
        name.make_ascii_lowercase();
    }
    string(to, value);
}

fn string(to: &mut BytesMut, string: &[u8]) {
    number(to, 0, 7, string.len());
    to.put_slice(string);
}

/// A number in so many bits of a byte whose other bits are these, and in bytes behind it.
fn number(to: &mut BytesMut, byte: u8, bits: u32, value: usize) {
    let most = (1_usize << bits) - 1;
    if value < most {
        return to.put_u8(byte | value as u8);
    }
    to.put_u8(byte | most as u8);
    let mut left = value - most;
    while left >= 0x80 {
        to.put_u8(left as u8 | 0x80);
        left >>= 7;
    }
    to.put_u8(left as u8);
}

#[cfg(test)]
mod tests {
    use super::super::Decoder;
    use super::*;

    fn read(block: &[u8]) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Decoder::default()
            .decode(block, |field| fields.push((text(&field.name), text(&field.value))))
            .unwrap();
        fields
    }

    #[test]
    fn what_is_written_is_read_back() {
        let long = "x".repeat(20_000);
        let mut block = BytesMut::new();
        no_table(&mut block);
        for code in [200, 204, 206, 304, 400, 404, 500, 503, 101] {
            status(&mut block, code);
        }
        for length in [0, 9, 10, u64::MAX] {
            content_length(&mut block, length);
        }
        indexed(&mut block, METHOD_POST);
        with_name(&mut block, PATH, b"/a");
        field(&mut block, b"X-Long", long.as_bytes());
        field(&mut block, b"Content-Type", b"text/plain");
        let mut read = read(&block).into_iter();
        for code in ["200", "204", "206", "304", "400", "404", "500", "503", "101"] {
            assert_eq!(read.next().unwrap(), (":status".to_owned(), code.to_owned()));
        }
        for length in ["0", "9", "10", "18446744073709551615"] {
            assert_eq!(read.next().unwrap(), ("content-length".to_owned(), length.to_owned()));
        }
        let pairs = [(":method", "POST"), (":path", "/a"), ("x-long", &long), ("content-type", "text/plain")];
        for (name, value) in pairs {
            assert_eq!(read.next().unwrap(), (name.to_owned(), value.to_owned()));
        }
        assert_eq!(read.next(), None);
    }

    #[test]
    fn secrets_are_marked() {
        for name in ["Authorization", "Cookie", "Proxy-Authorization", "Set-Cookie"] {
            let mut block = BytesMut::new();
            field(&mut block, name.as_bytes(), b"x");
            assert_eq!(block[0] & 0xf0, NEVER_INDEXED, "{name}");
        }
    }
}
