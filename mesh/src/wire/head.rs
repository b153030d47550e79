//! The head of a stream: typed fields, each with a *critical* bit, then the message head as HTTP/1
//! text. A receiver refuses a stream with a critical field that it does not know and skips others,
//! so new fields need no new version.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::reason::Reason;

/// Set in a field's type when a receiver that does not know the field must refuse the stream.
pub const CRITICAL: u8 = 0x80;

const PROTOCOL: u8 = 0x01 | CRITICAL;
const SERVICE: u8 = 0x02;
const ATTEMPT: u8 = 0x03;
const LOAD: u8 = 0x04;
const DEADLINE: u8 = 0x05;
const LATENCY: u8 = 0x06;
const SHED: u8 = 0x07;
const REASON: u8 = 0x08;
const BROKEN: u8 = 0x09;
const END_OF_FIELDS: u8 = 0x00;

/// What travels on a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// Bytes of a TCP connection.
    #[default]
    Opaque,
    /// One HTTP/1.1 message and its answer.
    Http1,
    /// One HTTP/2 message and its answer.
    Http2,
}

impl Protocol {
    fn to_byte(self) -> u8 {
        match self {
            Self::Opaque => 0,
            Self::Http1 => 1,
            Self::Http2 => 2,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Opaque),
            1 => Some(Self::Http1),
            2 => Some(Self::Http2),
            _ => None,
        }
    }
}

/// The fields of a stream's head.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// What travels. Critical.
    pub protocol: Protocol,
    /// The Service that the application dialled, `namespace/name:port`.
    pub service: Option<Bytes>,
    /// 0 for a first attempt; a retry counts up.
    pub attempt: u8,
    /// In an answer: requests in flight at the pod, all clients together.
    pub load: Option<u32>,
    /// In a request: milliseconds that its client still waits. What comes later is not worth an application's time.
    pub deadline_ms: Option<u32>,
    /// In an answer: microseconds that the pod's application takes for the head of an answer, on average and for all
    /// clients together.
    pub latency_us: Option<u32>,
    /// In an answer: the pod has more requests than it takes. Whoever repeats the request adds to the overload.
    pub shed: bool,
    /// In an answer that the server's sidecar gives itself: why. An application's answer is the text behind the fields, so
    /// no application can say this.
    pub reason: Option<Reason>,
    /// In an answer: how often the application has broken the request off before, on a connection that it had not just
    /// been idle on. Each was an attempt that failed.
    pub broken: u8,
}

/// Why a head was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// It ends within a field.
    #[error("the stream's head is cut short")]
    Truncated,
    /// A critical field that this build does not know.
    #[error("the stream's head holds the unknown critical field {0:#x}")]
    UnknownCritical(u8),
    /// A value outside its set.
    #[error("field {0:#x} of the stream's head has a value that is not in its set")]
    BadValue(u8),
}

impl Fields {
    /// Appends the fields; the message head follows in the same block.
    pub fn encode(&self, out: &mut BytesMut) {
        put(out, PROTOCOL, &[self.protocol.to_byte()]);
        if let Some(service) = &self.service {
            put(out, SERVICE, service);
        }
        if self.attempt > 0 {
            put(out, ATTEMPT, &[self.attempt]);
        }
        if let Some(load) = self.load {
            put(out, LOAD, &load.to_be_bytes());
        }
        if let Some(deadline) = self.deadline_ms {
            put(out, DEADLINE, &deadline.to_be_bytes());
        }
        if let Some(latency) = self.latency_us {
            put(out, LATENCY, &latency.to_be_bytes());
        }
        if self.shed {
            put(out, SHED, &[]);
        }
        if let Some(reason) = self.reason {
            put(out, REASON, reason.name().as_bytes());
        }
        if self.broken > 0 {
            put(out, BROKEN, &[self.broken]);
        }
        out.put_u8(END_OF_FIELDS);
    }

    /// Takes the fields off a block; what remains is the message head.
    ///
    /// # Errors
    /// [`HeadError`]; the stream is then reset with `BadHead`.
    pub fn decode(block: &mut Bytes) -> Result<Self, HeadError> {
        let mut fields = Self::default();
        loop {
            let kind = block.try_get_u8().map_err(|_| HeadError::Truncated)?;
            if kind == END_OF_FIELDS {
                return Ok(fields);
            }
            let length = usize::from(block.try_get_u8().map_err(|_| HeadError::Truncated)?);
            if block.len() < length {
                return Err(HeadError::Truncated);
            }
            let value = block.split_to(length);
            match (kind, value.as_ref()) {
                (PROTOCOL, [byte]) => {
                    fields.protocol = Protocol::from_byte(*byte).ok_or(HeadError::BadValue(kind))?;
                }
                (SERVICE, _) => fields.service = Some(value),
                (ATTEMPT, [byte]) => fields.attempt = *byte,
                (LOAD, [a, b, c, d]) => fields.load = Some(u32::from_be_bytes([*a, *b, *c, *d])),
                (DEADLINE, [a, b, c, d]) => fields.deadline_ms = Some(u32::from_be_bytes([*a, *b, *c, *d])),
                (LATENCY, [a, b, c, d]) => fields.latency_us = Some(u32::from_be_bytes([*a, *b, *c, *d])),
                (SHED, []) => fields.shed = true,
                // That of a later version says no more than that its sidecar answers.
                (REASON, name) => {
                    fields.reason = std::str::from_utf8(name).ok().and_then(Reason::from_name);
                }
                (BROKEN, [byte]) => fields.broken = *byte,
                (PROTOCOL | ATTEMPT | LOAD | DEADLINE | LATENCY | SHED | BROKEN, _) => {
                    return Err(HeadError::BadValue(kind));
                }
                _ if kind & CRITICAL != 0 => return Err(HeadError::UnknownCritical(kind)),
                _ => {}
            }
        }
    }
}

fn put(out: &mut BytesMut, kind: u8, value: &[u8]) {
    let value = value.get(..255).unwrap_or(value);
    out.put_u8(kind);
    out.put_u8(value.len() as u8);
    out.put_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn unknown_fields_are_skipped_unless_they_are_critical() {
        let mut skipped = Bytes::from_static(&[0x31, 2, 9, 9, 0x81, 1, 1, 0, b'x']);
        assert_eq!(Fields::decode(&mut skipped).unwrap().protocol, Protocol::Http1);
        assert_eq!(&skipped[..], b"x");
        let mut refused = Bytes::from_static(&[0xb1, 0, 0]);
        assert_eq!(Fields::decode(&mut refused), Err(HeadError::UnknownCritical(0xb1)));
    }

    #[test]
    fn a_field_of_the_wrong_length_is_refused_and_not_skipped() {
        for (kind, length) in
            [(PROTOCOL, 2), (ATTEMPT, 0), (LOAD, 3), (DEADLINE, 8), (LATENCY, 2), (SHED, 1), (BROKEN, 2)]
        {
            let mut block = BytesMut::new();
            put(&mut block, kind, &vec![0; length]);
            block.put_u8(END_OF_FIELDS);
            assert_eq!(Fields::decode(&mut block.freeze()), Err(HeadError::BadValue(kind)));
        }
    }

    prop_compose! {
        fn fields()(
            protocol in 0u8..3,
            service in proptest::option::of("[a-z/:0-9]{0,60}"),
            attempt in any::<u8>(),
            load in any::<Option<u32>>(),
            deadline_ms in any::<Option<u32>>(),
            latency_us in any::<Option<u32>>(),
            shed in any::<bool>(),
            reason in proptest::option::of(proptest::sample::select(Reason::ALL)),
            broken in any::<u8>(),
        ) -> Fields {
            let protocol = Protocol::from_byte(protocol).unwrap();
            Fields { protocol, service: service.map(Bytes::from), attempt, load, deadline_ms, latency_us, shed, reason, broken }
        }
    }

    proptest! {
        #[test]
        fn fields_survive_the_round_trip(fields in fields()) {
            let mut block = BytesMut::new();
            fields.encode(&mut block);
            block.extend_from_slice(b"GET / HTTP/1.1\r\n\r\n");
            let mut block = block.freeze();
            prop_assert_eq!(Fields::decode(&mut block), Ok(fields));
            prop_assert_eq!(&block[..], b"GET / HTTP/1.1\r\n\r\n");
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Fields::decode(&mut Bytes::from(bytes));
        }
    }
}
