//! The name of the server that a TLS client asks for, from its first bytes (RFC 8446 §4.1.2, RFC 6066 §3). They are
//! read and not taken: the handshake is between the client and the server.

/// The longest ClientHello that is waited for. With post-quantum key shares they have 2 KiB.
const MAX_HELLO: usize = 64 * 1024;
/// Bytes in front of each record: type, version, length.
const RECORD_HEADER: usize = 5;
/// The type of records with a handshake.
const HANDSHAKE: u8 = 22;
/// The type of a handshake that is a ClientHello.
const CLIENT_HELLO: u8 = 1;
/// The extension with the server's name.
const SERVER_NAME: u16 = 0;
/// The kind of such a name that is a host's.
const HOST_NAME: u8 = 0;

/// What the first bytes of a connection are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hello {
    /// The beginning of a ClientHello; more must come.
    Incomplete,
    /// A ClientHello, and the name that it asks for in lower case.
    Tls(Option<String>),
    /// Not a ClientHello.
    Other,
}

/// Reads the beginning of a connection.
pub(super) fn read(bytes: &[u8]) -> Hello {
    let mut handshake = Vec::new();
    let mut rest = bytes;
    loop {
        let Some((&[kind, major, _, high, low], behind)) = rest.split_first_chunk::<RECORD_HEADER>() else {
            return if begins_record(rest) { Hello::Incomplete } else { Hello::Other };
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != HANDSHAKE || major != 3 || length == 0 {
            return Hello::Other;
        }
        let whole = behind.len() >= length;
        let (fragment, next) = behind.split_at_checked(length).unwrap_or((behind, &[]));
        handshake.extend_from_slice(fragment);
        match hello(&handshake) {
            Parsed::Short if handshake.len() > MAX_HELLO => return Hello::Other,
            Parsed::Short if whole => rest = next,
            Parsed::Short => return Hello::Incomplete,
            Parsed::Bad => return Hello::Other,
            Parsed::Name(name) => return Hello::Tls(name),
        }
    }
}

/// Whether a record of a handshake may begin with these few bytes.
fn begins_record(bytes: &[u8]) -> bool {
    bytes.iter().zip([HANDSHAKE, 3]).all(|(byte, expected)| *byte == expected)
}

enum Parsed {
    Short,
    Bad,
    Name(Option<String>),
}

/// Reads a handshake message, as far as it is there.
fn hello(bytes: &[u8]) -> Parsed {
    match bytes.first() {
        None => return Parsed::Short,
        Some(&CLIENT_HELLO) => {}
        Some(_) => return Parsed::Bad,
    }
    let Some((&[_, a, b, c], body)) = bytes.split_first_chunk::<4>() else { return Parsed::Short };
    let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX);
    if length > MAX_HELLO {
        return Parsed::Bad;
    }
    let Some(body) = body.get(..length) else { return Parsed::Short };
    match name(&mut Input(body)) {
        Some(name) => Parsed::Name(name),
        None => Parsed::Bad,
    }
}

/// The name in the body of a ClientHello; `None`: it is malformed.
fn name(input: &mut Input<'_>) -> Option<Option<String>> {
    // Version and random.
    input.take(2 + 32)?;
    let session = usize::from(input.u8()?);
    input.take(session)?;
    let suites = usize::from(input.u16()?);
    input.take(suites)?;
    let compressions = usize::from(input.u8()?);
    input.take(compressions)?;
    if input.0.is_empty() {
        return Some(None);
    }
    let length = usize::from(input.u16()?);
    let mut extensions = Input(input.take(length)?);
    while !extensions.0.is_empty() {
        let kind = extensions.u16()?;
        let length = usize::from(extensions.u16()?);
        let content = extensions.take(length)?;
        if kind == SERVER_NAME {
            let mut content = Input(content);
            let length = usize::from(content.u16()?);
            let mut names = Input(content.take(length)?);
            let kind = names.u8()?;
            let length = usize::from(names.u16()?);
            let name = names.take(length)?;
            let text = std::str::from_utf8(name).ok().filter(|text| text.is_ascii() && kind == HOST_NAME)?;
            return Some(Some(text.to_ascii_lowercase()));
        }
    }
    Some(None)
}

/// Bytes that are read from the front.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A ClientHello that asks for this name, in records of at most `record` bytes.
    pub(in crate::outbound) fn client_hello(name: Option<&str>, record: usize) -> Vec<u8> {
        let sized = |content: &[u8]| {
            let length = u16::try_from(content.len()).unwrap().to_be_bytes();
            [&length[..], content].concat()
        };
        let names = name.map_or_else(Vec::new, |name| {
            let entry = [&[HOST_NAME][..], &sized(name.as_bytes())].concat();
            [&[0, 0][..], &sized(&sized(&entry))].concat()
        });
        // Another one stands in front of it.
        let extensions = [&[0, 43, 0, 3, 2, 3, 4][..], &names].concat();
        let body = [&[3, 3][..], &[7; 32], &[0], &sized(&[0x13, 1]), &[1, 0], &sized(&extensions)].concat();
        let length = u32::try_from(body.len()).unwrap().to_be_bytes();
        let message = [&[CLIENT_HELLO][..], &length[1..], &body].concat();
        message.chunks(record).flat_map(|part| [&[HANDSHAKE, 3, 1][..], &sized(part)].concat()).collect()
    }

    #[test]
    fn the_name_is_found_also_in_several_records() {
        for record in [1, 7, 16_384] {
            assert_eq!(read(&client_hello(Some("Web.Shop"), record)), Hello::Tls(Some("web.shop".into())));
            assert_eq!(read(&client_hello(None, record)), Hello::Tls(None));
        }
    }

    #[test]
    fn what_is_not_a_client_hello_is_known_by_its_first_bytes() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x16\x02",
            b"\x16\x03\x01\x00\x00",
            b"\x15\x03\x03\x00\x02\x01\x00",
        ] {
            assert_eq!(read(bytes), Hello::Other, "{bytes:?}");
        }
        // A ServerHello.
        assert_eq!(read(b"\x16\x03\x03\x00\x04\x02\x00\x00\x00"), Hello::Other);
        // One that would be longer than any.
        assert_eq!(read(b"\x16\x03\x03\x00\x04\x01\xff\xff\xff"), Hello::Other);
        for bytes in [&b""[..], b"\x16", b"\x16\x03\x01\x02"] {
            assert_eq!(read(bytes), Hello::Incomplete, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn every_beginning_is_incomplete_and_what_follows_changes_nothing(
            record in 1usize..300,
            cut in 0usize..200,
            more in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let whole = client_hello(Some("a.b"), record);
            let cut = cut % whole.len();
            prop_assert_eq!(read(&whole[..cut]), Hello::Incomplete);
            prop_assert_eq!(read(&[&whole[..], &more].concat()), Hello::Tls(Some("a.b".into())));
        }

        #[test]
        fn no_bytes_make_it_fail(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            read(&bytes);
            let framed = [&[HANDSHAKE, 3, 3, 0, bytes.len() as u8, CLIENT_HELLO, 0, 0, 90][..], &bytes].concat();
            read(&framed);
        }
    }
}
