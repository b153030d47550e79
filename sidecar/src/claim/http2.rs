//! The names of the headers in what an HTTP/2 client sends, and whether one of them is ours.
//!
//! In: the bytes behind the preface. Out: whether they may pass. Frames are read as far as a header block reaches
//! (RFC 9113 §6.2, §6.10), and the block as far as it spells names out (RFC 7541 §6): a name that is used again has
//! been spelled out before. Nothing is decoded.

use super::{CLAIM, is_same};

/// Bytes of a frame's header.
const FRAME_HEADER: usize = 9;
/// Kinds of frames that carry a header block.
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
/// Flags of HEADERS.
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// `tulle-client-id` in the code of RFC 7541 appendix B, with its padding. Upper case is malformed in HTTP/2.
const ENCODED: [u8; 11] = [0x4d, 0xb4, 0x50, 0x55, 0x89, 0x41, 0x8b, 0x52, 0x56, 0x34, 0x9f];
/// Where `tulle_client_id` differs from it.
const DIFFERS: [u8; 11] = [0, 0, 0, 0x0d, 0, 0, 0, 0, 0x34, 0, 0];

/// Looks at what an HTTP/2 client sends behind its preface.
#[derive(Debug, Default)]
pub(super) struct Http2Filter {
    header: [u8; FRAME_HEADER],
    /// How many bytes of the frame's header are here.
    read: usize,
    /// Bytes of its payload that are still to come.
    left: usize,
    /// Of those: bytes in front of the header block.
    before: usize,
    /// Of those: bytes of padding behind it.
    padding: usize,
    block: Block,
}

/// Where in a header block the reader is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Block {
    /// In front of a field.
    #[default]
    Field,
    /// In a number that goes on.
    Number { of: Number, value: usize, shift: u32 },
    /// In front of the length of a name.
    NameLength,
    /// In front of the length of a value.
    ValueLength,
    /// In a name: how long it is, how far it has been read, and whether it is ours so far.
    Name { encoded: bool, length: usize, at: usize, ours: bool },
    /// In a value.
    Value { left: usize },
}

/// What a number in a header block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    /// The index of a whole field, or the size of the table.
    Field,
    /// The index of a name.
    NameIndex,
    /// The length of a name.
    NameLength { encoded: bool },
    /// The length of a value.
    ValueLength,
}

impl Http2Filter {
    /// Whether these bytes may pass.
    pub(super) fn admit(&mut self, mut bytes: &[u8]) -> bool {
        while let Some(byte) = bytes.first() {
            if self.read < FRAME_HEADER {
                if let Some(room) = self.header.get_mut(self.read) {
                    *room = *byte;
                }
                self.read += 1;
                if self.read == FRAME_HEADER {
                    self.begin();
                }
                bytes = bytes.get(1..).unwrap_or(&[]);
                continue;
            }
            let (piece, rest) = bytes.split_at(self.left.min(bytes.len()));
            if !self.payload(piece) {
                return false;
            }
            bytes = rest;
        }
        true
    }

    /// A frame's header is complete.
    fn begin(&mut self) {
        let [a, b, c, kind, flags, ..] = self.header;
        self.left = u32::from_be_bytes([0, a, b, c]) as usize;
        (self.before, self.padding) = (0, 0);
        if kind == HEADERS {
            let priority = if flags & PRIORITY != 0 { 5 } else { 0 };
            self.before = priority + usize::from(flags & PADDED != 0);
            self.block = Block::Field;
        }
        if self.left == 0 {
            self.read = 0;
        }
    }

    /// Takes bytes of a frame's payload, at most what is left of it.
    fn payload(&mut self, mut bytes: &[u8]) -> bool {
        let [_, _, _, kind, flags, ..] = self.header;
        let after = self.left - bytes.len();
        if matches!(kind, HEADERS | CONTINUATION) {
            while self.before > 0
                && let Some((byte, rest)) = bytes.split_first()
            {
                // The length of the padding comes first.
                let is_first = self.before == if flags & PRIORITY != 0 { 6 } else { 1 };
                if flags & PADDED != 0 && is_first {
                    self.padding = usize::from(*byte);
                }
                self.before -= 1;
                bytes = rest;
            }
            let padding_here = self.padding.saturating_sub(after).min(bytes.len());
            let block = bytes.get(..bytes.len() - padding_here).unwrap_or(bytes);
            if !self.block(block) {
                return false;
            }
        }
        self.left = after;
        if after == 0 {
            self.read = 0;
        }
        true
    }

    /// Takes bytes of a header block; `false`: they spell our name, or are malformed.
    fn block(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        while let Some((byte, behind)) = rest.split_first() {
            if let Block::Value { left } = self.block {
                let taken = left.min(rest.len());
                self.block = in_value(left - taken);
                rest = rest.get(taken..).unwrap_or(&[]);
                continue;
            }
            let Some(next) = self.block.next(*byte) else { return false };
            self.block = next;
            rest = behind;
        }
        true
    }
}

/// In a value with so many bytes left.
fn in_value(left: usize) -> Block {
    if left == 0 { Block::Field } else { Block::Value { left } }
}

impl Block {
    /// Takes one byte anywhere but in a value.
    fn next(self, byte: u8) -> Option<Self> {
        Some(match self {
            Self::Field if byte & 0x80 != 0 => Self::number(Number::Field, byte, 0x7f),
            Self::Field if byte & 0x40 != 0 => Self::number(Number::NameIndex, byte, 0x3f),
            Self::Field if byte & 0x20 != 0 => Self::number(Number::Field, byte, 0x1f),
            Self::Field => Self::number(Number::NameIndex, byte, 0x0f),
            Self::NameLength => Self::number(Number::NameLength { encoded: byte & 0x80 != 0 }, byte, 0x7f),
            Self::ValueLength => Self::number(Number::ValueLength, byte, 0x7f),
            Self::Number { of, value, shift } => {
                // More than 28 bits are more than any block has.
                let value = value.checked_add(usize::from(byte & 0x7f).checked_shl(shift)?)?;
                match (byte & 0x80 != 0, shift) {
                    (false, _) => of.then(value),
                    (true, ..21) => Self::Number { of, value, shift: shift + 7 },
                    (true, _) => return None,
                }
            }
            Self::Name { encoded, length, at, ours } => {
                let ours = ours && is_ours(byte, at, encoded);
                match at + 1 == length {
                    false => Self::Name { encoded, length, at: at + 1, ours },
                    true if ours => return None,
                    true => Self::ValueLength,
                }
            }
            Self::Value { left } => in_value(left.saturating_sub(1)),
        })
    }

    /// The number that begins with a byte, in the bits of this mask (RFC 7541 §5.1).
    fn number(of: Number, byte: u8, mask: u8) -> Self {
        let value = usize::from(byte & mask);
        if byte & mask == mask { Self::Number { of, value, shift: 0 } } else { of.then(value) }
    }
}

impl Number {
    /// What follows a number that is this.
    fn then(self, value: usize) -> Block {
        match (self, value) {
            (Self::Field, _) => Block::Field,
            (Self::NameIndex, 0) => Block::NameLength,
            (Self::NameIndex, _) | (Self::NameLength { .. }, 0) => Block::ValueLength,
            (Self::NameLength { encoded }, length) => {
                let ours = length == if encoded { ENCODED.len() } else { CLAIM.len() };
                Block::Name { encoded, length, at: 0, ours }
            }
            (Self::ValueLength, left) => in_value(left),
        }
    }
}

/// Whether the byte at a place of a name is that of our name.
fn is_ours(byte: u8, at: usize, encoded: bool) -> bool {
    if !encoded {
        return CLAIM.get(at).is_some_and(|ours| is_same(byte, *ours));
    }
    match (ENCODED.get(at), DIFFERS.get(at)) {
        (Some(ours), Some(differs)) => (byte ^ ours) & !differs == 0,
        _ => false,
    }
}
