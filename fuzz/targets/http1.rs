//! Framing of HTTP/1: heads of requests and responses, and their bodies.
//!
//! The first byte chooses where the input is cut in two, and whether it is a request or a response to GET or HEAD.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tulle_sidecar::http1::head::{parse_request, parse_response};
use tulle_sidecar::http1::{Decoder, Framing, Head, HeadError, Part};

type Parse = fn(&mut BytesMut) -> Result<Option<Head>, HeadError>;

fuzz_target!(|input: &[u8]| {
    let Some((choice, bytes)) = input.split_first() else { return };
    let parse: Parse = match choice % 3 {
        0 => parse_request,
        1 => |buffer| parse_response(buffer, b"GET"),
        _ => |buffer| parse_response(buffer, b"HEAD"),
    };
    let cut = bytes.len() * usize::from(choice / 3) / 86;

    let mut whole = BytesMut::from(bytes);
    let head = parse(&mut whole);
    // What is wrong may be noticed earlier, but what is read is the same.
    let mut pieces = BytesMut::from(&bytes[..cut]);
    let first = parse(&mut pieces);
    match (&first, &head) {
        (Ok(None), _) => {
            pieces.extend_from_slice(&bytes[cut..]);
            assert_eq!(parse(&mut pieces).ok(), head.as_ref().ok().cloned(), "pieces make a difference");
        }
        (Ok(Some(early)), Ok(Some(late))) => {
            assert_eq!(early, late, "later bytes change a head");
            pieces.extend_from_slice(&bytes[cut..]);
        }
        (Ok(Some(_)), _) => panic!("later bytes make a whole head invalid"),
        (Err(_), head) => assert!(head.is_err(), "a beginning that was refused is accepted with more bytes"),
    }
    let Ok(Some(head)) = head else { return };
    assert_eq!(whole, pieces, "pieces change what follows a head");

    // What is written may have a line more than what was read, and lines are limited.
    if head.headers.len() > 90 {
        return;
    }
    let mut written = BytesMut::new();
    head.write(&mut written, !head.keep_alive);
    let again = parse(&mut written).expect("our own head is refused").expect("our own head is not whole");
    assert!(written.is_empty(), "our own head ends early");
    assert_eq!((&again.start, again.framing), (&head.start, head.framing));
    assert_eq!((again.upgrade, again.expects_continue), (head.upgrade, head.expects_continue));
    assert_eq!(again.headers, head.headers);

    let decoder = if choice % 3 == 0 { Decoder::new } else { Decoder::for_response };
    body(|| decoder(head.framing), head.framing, &whole);
});

/// A body is the same whether it arrives at once or byte by byte.
fn body(new: impl Fn() -> Decoder, framing: Framing, bytes: &[u8]) {
    let mut buffer = BytesMut::from(bytes);
    let whole = decode(&mut new(), &mut buffer);
    let (mut decoder, mut buffer) = (new(), BytesMut::new());
    // A body may end before its first byte.
    let mut pieces = decode(&mut decoder, &mut buffer);
    for byte in bytes {
        if pieces.ended || pieces.failed {
            break;
        }
        buffer.extend_from_slice(&[*byte]);
        pieces.add(decode(&mut decoder, &mut buffer));
    }
    if !whole.failed {
        assert_eq!(pieces, whole);
    }
    assert_eq!(pieces.failed, whole.failed, "pieces make a difference to whether a body is refused");
    if let (Framing::Length(length), true) = (framing, whole.ended) {
        assert_eq!(whole.data.len() as u64, length);
    }
}

#[derive(Debug, Default, PartialEq)]
struct Body {
    data: Vec<u8>,
    trailers: usize,
    ended: bool,
    failed: bool,
}

impl Body {
    fn add(&mut self, more: Self) {
        self.data.extend_from_slice(&more.data);
        self.trailers += more.trailers;
        self.ended |= more.ended;
        self.failed |= more.failed;
    }
}

fn decode(decoder: &mut Decoder, buffer: &mut BytesMut) -> Body {
    let mut body = Body::default();
    loop {
        match decoder.decode(buffer) {
            Ok(Some(Part::Data(data))) => {
                assert!(!data.is_empty(), "a part without bytes");
                body.data.extend_from_slice(&data);
            }
            Ok(Some(Part::Trailers(lines))) => body.trailers += lines.len(),
            Ok(Some(Part::End)) => {
                assert!(decoder.is_done());
                body.ended = true;
                return body;
            }
            Ok(None) => return body,
            Err(_) => {
                body.failed = true;
                return body;
            }
        }
    }
}
