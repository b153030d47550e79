//! Header blocks to fields (RFC 7541 §3).

use std::collections::VecDeque;

use bytes::Bytes;

use super::tables::STATIC;
use super::{FIELD_COST, huffman};

/// What the dynamic table may hold: HTTP/2's default, of which nothing else is said to peers.
const TABLE: usize = 4096;

/// A block that cannot be decoded: nothing that follows on its connection can be either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undecodable;

/// What a field is by its name (RFC 9113 §8.2, §8.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `:method`
    Method,
    /// `:scheme`
    Scheme,
    /// `:authority`
    Authority,
    /// `:path`
    Path,
    /// `:status`
    Status,
    /// An end-to-end field.
    Regular,
    /// `te`, which has one meaning for one connection and is allowed with it.
    Te,
    /// A name that HTTP/2 forbids: with capital letters, of another version's connection handling, or unknown among the
    /// pseudo-header fields.
    Forbidden,
}

impl Kind {
    /// What a field of this name is.
    fn of(name: &[u8]) -> Self {
        match name {
            b":method" => Self::Method,
            b":scheme" => Self::Scheme,
            b":authority" => Self::Authority,
            b":path" => Self::Path,
            b":status" => Self::Status,
            b"te" => Self::Te,
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" | b"" => {
                Self::Forbidden
            }
            _ if name.iter().all(|byte| is_lower_token(*byte)) => Self::Regular,
            _ => Self::Forbidden,
        }
    }
}

/// Whether a byte may be in the name of a field of HTTP/2: a token without capital letters (RFC 9110 §5.6.2).
pub fn is_lower_token(byte: u8) -> bool {
    const SIGNS: &[u8] = b"!#$%&'*+-.^_`|~";
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || SIGNS.contains(&byte)
}

/// Whether a value may be sent as that of a field (RFC 9110 §5.5).
pub fn is_value(value: &[u8]) -> bool {
    value.iter().all(|byte| *byte >= b' ' && *byte != 0x7f || *byte == b'\t')
}

/// A field of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: Bytes,
    /// Its value.
    pub value: Bytes,
    /// Whether the value has only bytes that values may have.
    pub is_value: bool,
}

impl Field {
    fn of(name: Bytes, kind: Kind, value: Bytes) -> Self {
        let is_value = is_value(&value);
        Self { kind, name, value, is_value }
    }

    /// What it costs in a table or a list.
    pub fn cost(&self) -> usize {
        self.name.len() + self.value.len() + FIELD_COST
    }
}

/// Decodes the blocks that a peer sends, in their order.
#[derive(Debug)]
pub struct Decoder {
    /// The dynamic table, the newest entry first.
    table: VecDeque<Field>,
    /// What its entries cost.
    size: usize,
    /// What they may cost, as the peer has chosen.
    limit: usize,
    /// Where strings are decoded.
    text: Vec<u8>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { table: VecDeque::new(), size: 0, limit: TABLE, text: Vec::new() }
    }
}

impl Decoder {
    /// Decodes a block, and hands its fields over one by one.
    ///
    /// # Errors
    /// [`Undecodable`]: the connection has to end.
    pub fn decode(&mut self, block: &[u8], mut take: impl FnMut(Field)) -> Result<(), Undecodable> {
        let mut rest = block;
        let mut has_field = false;
        while let Some((first, _)) = rest.split_first() {
            match *first {
                0x80.. => take(self.entry(number(&mut rest, 7)?)?),
                0x40.. => {
                    let field = self.literal(&mut rest, 6)?;
                    self.insert(field.clone());
                    take(field);
                }
                0x20.. => {
                    // Only in front of all fields (RFC 7541 §4.2).
                    let limit = number(&mut rest, 5)?;
                    if has_field || limit > TABLE {
                        return Err(Undecodable);
                    }
                    self.limit = limit;
                    self.shrink(limit);
                    continue;
                }
                _ => take(self.literal(&mut rest, 4)?),
            }
            has_field = true;
        }
        Ok(())
    }

    /// A field with a value of its own, whose first byte has an index in so many bits.
    fn literal(&mut self, rest: &mut &[u8], bits: u32) -> Result<Field, Undecodable> {
        let (name, kind) = match number(rest, bits)? {
            0 => {
                let name = self.string(rest)?;
                let kind = Kind::of(&name);
                (name, kind)
            }
            index => {
                let Field { name, kind, .. } = self.entry(index)?;
                (name, kind)
            }
        };
        Ok(Field::of(name, kind, self.string(rest)?))
    }

    fn string(&mut self, rest: &mut &[u8]) -> Result<Bytes, Undecodable> {
        let is_coded = rest.first().is_some_and(|first| first & 0x80 != 0);
        let length = number(rest, 7)?;
        let (string, behind) = rest.split_at_checked(length).ok_or(Undecodable)?;
        *rest = behind;
        if !is_coded {
            return Ok(Bytes::copy_from_slice(string));
        }
        self.text.clear();
        huffman::decode(string, &mut self.text).ok_or(Undecodable)?;
        Ok(Bytes::copy_from_slice(&self.text))
    }

    /// The field with this index.
    fn entry(&self, index: usize) -> Result<Field, Undecodable> {
        let place = index.checked_sub(1).ok_or(Undecodable)?;
        match STATIC.get(place) {
            Some((name, value)) => Ok(Field {
                kind: match index {
                    1 => Kind::Authority,
                    2 | 3 => Kind::Method,
                    4 | 5 => Kind::Path,
                    6 | 7 => Kind::Scheme,
                    8..=14 => Kind::Status,
                    57 => Kind::Forbidden,
                    _ => Kind::Regular,
                },
                name: Bytes::from_static(name),
                value: Bytes::from_static(value),
                is_value: true,
            }),
            None => self.table.get(place - STATIC.len()).cloned().ok_or(Undecodable),
        }
    }

    /// Inserts an entry; one that is larger than the table empties it (RFC 7541 §4.4).
    fn insert(&mut self, field: Field) {
        let cost = field.cost();
        self.shrink(self.limit.saturating_sub(cost));
        if cost <= self.limit {
            self.size += cost;
            self.table.push_front(field);
        }
    }

    fn shrink(&mut self, limit: usize) {
        while self.size > limit
            && let Some(oldest) = self.table.pop_back()
        {
            self.size -= oldest.cost();
        }
    }

    /// Gives memory back that only blocks in a row make use of.
    pub fn release(&mut self) {
        self.text = Vec::new();
    }
}

/// A number whose first byte has so many bits of it (RFC 7541 §5.1).
fn number(rest: &mut &[u8], bits: u32) -> Result<usize, Undecodable> {
    let mask = (1_u8 << bits) - 1;
    let (first, mut behind) = rest.split_first().ok_or(Undecodable)?;
    let mut value = usize::from(first & mask);
    if first & mask == mask {
        for shift in [0, 7, 14, 21] {
            let (byte, more) = behind.split_first().ok_or(Undecodable)?;
            behind = more;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                *rest = behind;
                return Ok(value);
            }
        }
        // More than any block has.
        return Err(Undecodable);
    }
    *rest = behind;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fields(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<(String, String)>, Undecodable> {
        let mut fields = Vec::new();
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        decoder.decode(block, |field| fields.push((text(&field.name), text(&field.value))))?;
        Ok(fields)
    }

    fn pairs(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// RFC 7541 appendix C.4: three requests on one connection.
    #[test]
    fn requests_that_share_a_table_are_read() {
        let mut decoder = Decoder::default();
        let first = b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
        let base =
            [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
        assert_eq!(fields(&mut decoder, first).unwrap(), pairs(&base));
        let second = b"\x82\x86\x84\xbe\x58\x86\xa8\xeb\x10\x64\x9c\xbf";
        let with = [&base[..], &[("cache-control", "no-cache")]].concat();
        assert_eq!(fields(&mut decoder, second).unwrap(), pairs(&with));
        let third = b"\x82\x87\x85\xbf\x40\x88\x25\xa8\x49\xe9\x5b\xa9\x7d\x7f\x89\x25\xa8\x49\xe9\x5b\xb8\xe8\xb4\xbf";
        let last = [
            (":method", "GET"),
            (":scheme", "https"),
            (":path", "/index.html"),
            (":authority", "www.example.com"),
            ("custom-key", "custom-value"),
        ];
        assert_eq!(fields(&mut decoder, third).unwrap(), pairs(&last));
        assert_eq!((decoder.table.len(), decoder.size), (3, 164));
    }

    #[test]
    fn old_entries_leave_the_table_and_one_that_is_too_large_empties_it() {
        let mut decoder = Decoder::default();
        // A table of 100 bytes, and three entries of 35.
        let block = [&b"\x3f\x45"[..], b"\x40\x01a\x02bb", b"\x40\x01c\x02dd", b"\x40\x01e\x02ff"].concat();
        fields(&mut decoder, &block).unwrap();
        assert_eq!((decoder.table.len(), decoder.size), (2, 70));
        assert_eq!(fields(&mut decoder, b"\xbe\xbf").unwrap(), pairs(&[("e", "ff"), ("c", "dd")]));
        assert_eq!(fields(&mut decoder, b"\xc0"), Err(Undecodable), "it has gone");
        let large = [b"\x40\x01a\x64".to_vec(), vec![b'x'; 100]].concat();
        assert_eq!(fields(&mut decoder, &large).unwrap().len(), 1);
        assert_eq!((decoder.table.len(), decoder.size), (0, 0));
    }

    #[test]
    fn what_no_encoder_writes_is_refused() {
        for block in [
            &b"\x80"[..],                // index 0
            b"\xff\xff\xff\xff\xff\x0f", // an endless number
            b"\xff",                     // a number that breaks off
            b"\x00\x05ab",               // a name that breaks off
            b"\x82\x20",                 // the size of the table behind a field
            b"\x3f\xe2\x1f",             // a table of 4097
            b"\xbe",                     // an entry that is not there
            b"\x00\x81\x00\x00",         // a string that is not in the code
        ] {
            assert_eq!(fields(&mut Decoder::default(), block), Err(Undecodable), "{}", block.escape_ascii());
        }
        assert!(fields(&mut Decoder::default(), b"\x20\x3f\xe1\x1f\x82").is_ok(), "twice is allowed");
    }

    #[test]
    fn fields_are_known_by_their_names() {
        let kind = |name: &[u8]| Kind::of(name);
        assert_eq!(kind(b"x-test_1.a"), Kind::Regular);
        for name in [&b"X-Test"[..], b"a b", b"a:", b":protocol", b"connection", b"a\0", b"\xc3\xa4"] {
            assert_eq!(kind(name), Kind::Forbidden, "{}", name.escape_ascii());
        }
        assert!(is_value(b"a\tb \xff") && !is_value(b"a\rb") && !is_value(b"\0") && !is_value(b"\x7f"));
    }

    proptest! {
        #[test]
        fn no_block_makes_the_table_larger_than_it_may_be(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20)) {
            let mut decoder = Decoder::default();
            for block in blocks {
                if decoder.decode(&block, |_| {}).is_err() {
                    break;
                }
                prop_assert!(decoder.size <= decoder.limit && decoder.limit <= TABLE);
                prop_assert_eq!(decoder.size, decoder.table.iter().map(Field::cost).sum::<usize>());
            }
        }
    }
}
