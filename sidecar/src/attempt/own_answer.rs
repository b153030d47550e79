//! How an answer says to another sidecar that this sidecar gave it, and why.
//!
//! The reason is a field of the answer's head (`mesh/WIRE.md`), in front of all others: an answer of the application
//! costs the comparison of one byte. An application's answer is the text behind the fields, so no application can
//! write the field, whatever its `tulle-reason` header says. A sidecar that does not know the field skips it.

use bytes::{BufMut as _, BytesMut};
use tulle_mesh::reason::Reason;

/// The type of the field. Not critical.
const REASON: u8 = 0x08;

/// Writes the field: before any other one.
pub(super) fn mark(block: &mut BytesMut, reason: Reason) {
    let name = reason.name().as_bytes();
    let Ok(length) = u8::try_from(name.len()) else { return };
    block.put_u8(REASON);
    block.put_u8(length);
    block.put_slice(name);
}

/// The reason of a head that another sidecar has written. `None`: it is an application's answer, or a later version's
/// reason.
pub(super) fn reason(block: &[u8]) -> Option<Reason> {
    let (&[REASON, length], rest) = block.split_first_chunk::<2>()? else { return None };
    let name = rest.get(..usize::from(length))?;
    Reason::from_name(std::str::from_utf8(name).ok()?)
}

#[cfg(test)]
mod tests {
    use tulle_mesh::wire::head::Fields;

    use super::*;

    #[test]
    fn a_reason_is_read_from_the_fields_and_is_skipped_by_whoever_does_not_know_it() {
        for known in Reason::ALL {
            let mut block = BytesMut::new();
            mark(&mut block, *known);
            let fields = Fields { load: Some(7), ..Fields::default() };
            fields.encode(&mut block);
            block.extend_from_slice(b"HTTP/1.1 403 Forbidden\r\n\r\n");
            let mut block = block.freeze();
            assert_eq!(reason(&block), Some(*known));
            assert_eq!(Fields::decode(&mut block), Ok(fields));
            assert_eq!(&block[..], b"HTTP/1.1 403 Forbidden\r\n\r\n");
        }
    }

    #[test]
    fn what_an_application_answers_is_not_a_reason() {
        let mut block = BytesMut::new();
        Fields::default().encode(&mut block);
        block.extend_from_slice(
            b"HTTP/1.1 403 Forbidden\r\ntulle-reason: PolicyDenied\r\n\r\n\x08\x0cPolicyDenied",
        );
        assert_eq!(reason(&block), None);
        for broken in [&b""[..], b"\x08", b"\x08\x0cPolicy", b"\x08\x04Mine", b"\x08\x01\xff"] {
            assert_eq!(reason(broken), None, "{broken:?}");
        }
    }
}
