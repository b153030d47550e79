//! The Huffman code of strings (RFC 7541 §5.2 and appendix B).
//!
//! The code is canonical: codes of one length follow each other in the order of their symbols, and the first of a length
//! follows the last of the length before. So the lengths say everything.

use std::sync::LazyLock;

/// The length of each symbol's code, in bits.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];
/// The longest code, that of the end of a string: all ones. It never appears.
const LONGEST: u32 = 30;
/// Codes up to this length are looked up at once: all of letters, digits and most punctuation.
const SHORT: u32 = 8;

/// Codes of one length.
#[derive(Clone, Copy, Default)]
struct OfLength {
    /// The length, in bits.
    bits: u32,
    /// What lies behind the last code, with 32 bits.
    end: u64,
    /// The first code.
    first: u32,
    /// Where its symbol is among all, in the order of the codes.
    at: usize,
}

struct Code {
    /// By the next bits: a symbol and the length of its code, or a length of 0.
    short: [(u8, u8); 1 << SHORT],
    lengths: Vec<OfLength>,
    symbols: Vec<u8>,
}

static CODE: LazyLock<Code> = LazyLock::new(|| {
    let mut code = Code { short: [(0, 0); 1 << SHORT], lengths: Vec::new(), symbols: Vec::new() };
    let mut next = 0_u32;
    for bits in 1..=LONGEST {
        next <<= 1;
        let (first, at) = (next, code.symbols.len());
        let of_this_length = (0..=u8::MAX).zip(LENGTHS).filter(|(_, length)| u32::from(*length) == bits);
        for (symbol, _) in of_this_length {
            code.symbols.push(symbol);
            if bits <= SHORT {
                let from = (next << (SHORT - bits)) as usize;
                let places = code.short.iter_mut().skip(from).take(1 << (SHORT - bits));
                places.for_each(|place| *place = (symbol, bits as u8));
            }
            next += 1;
        }
        if next > first {
            code.lengths.push(OfLength { bits, end: u64::from(next) << (32 - bits), first, at });
        }
    }
    code
});

/// Appends what `coded` says; `None`: it is no string in this code.
pub(super) fn decode(coded: &[u8], to: &mut Vec<u8>) -> Option<()> {
    let code = &*CODE;
    let mut coded = coded.iter();
    // Bits that are to be read, from the highest one on.
    let (mut bits, mut have) = (0_u64, 0_u32);
    loop {
        while have <= 56
            && let Some(byte) = coded.next()
        {
            bits |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let (symbol, length) = match code.short.get((bits >> (64 - SHORT)) as usize) {
            Some((symbol, length)) if *length > 0 => (*symbol, u32::from(*length)),
            _ => {
                let next = bits >> 32;
                let Some(of) = code.lengths.iter().find(|of| next < of.end) else {
                    return is_padding(bits, have);
                };
                let place = ((next >> (32 - of.bits)) as u32).checked_sub(of.first)?;
                (*code.symbols.get(of.at + place as usize)?, of.bits)
            }
        };
        if length > have {
            return is_padding(bits, have);
        }
        to.push(symbol);
        bits <<= length;
        have -= length;
    }
}

/// What is left must be fewer than eight bits, all ones.
fn is_padding(bits: u64, have: u32) -> Option<()> {
    let ones = if have == 0 { 0 } else { u64::MAX << (64 - have) };
    (have < 8 && bits == ones).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(coded: &[u8]) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        decode(coded, &mut text).map(|()| text)
    }

    /// As the appendix of the RFC spells the codes.
    fn encoded(text: &[u8]) -> Vec<u8> {
        let (mut bits, mut count, mut coded) = (0_u64, 0_u32, Vec::new());
        for byte in text {
            let length = u32::from(LENGTHS[usize::from(*byte)]);
            let of = CODE.lengths.iter().find(|of| of.bits == length).unwrap();
            let place = CODE.symbols[of.at..].iter().position(|symbol| symbol == byte).unwrap();
            bits = bits << length | u64::from(of.first + place as u32);
            count += length;
            while count >= 8 {
                count -= 8;
                coded.push((bits >> count) as u8);
            }
        }
        if count > 0 {
            coded.push((bits << (8 - count)) as u8 | (0xff >> count));
        }
        coded
    }

    #[test]
    fn the_examples_of_the_rfc_are_read() {
        let url = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decoded(&url).unwrap(), b"www.example.com");
        assert_eq!(decoded(&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]).unwrap(), b"no-cache");
        assert_eq!(decoded(&[0x64, 0x02]).unwrap(), b"302");
        // Codes at the ends of appendix B: 10 (30 bits), 22 (30 bits), 249 (28 bits), 127 (28 bits).
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xf3]).unwrap(), b"\n");
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xfb]).unwrap(), [22]);
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xef]).unwrap(), [249]);
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xcf]).unwrap(), [127]);
        assert_eq!(decoded(b"").unwrap(), b"");
    }

    #[test]
    fn every_byte_is_read_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decoded(&encoded(&all)).unwrap(), all);
        for byte in 0..=255 {
            for count in 1..9 {
                let text = vec![byte; count];
                assert_eq!(decoded(&encoded(&text)).unwrap(), text);
            }
        }
    }

    #[test]
    fn padding_is_the_beginning_of_the_end_and_shorter_than_a_byte() {
        // "a" is 00011.
        assert_eq!(decoded(&[0b0001_1111]).unwrap(), b"a");
        assert_eq!(decoded(&[0b0001_1110]), None);
        assert_eq!(decoded(&[0b0001_1111, 0xff]), None);
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xff]), None, "the end of a string");
        assert_eq!(decoded(&[0xff]), None);
    }
}
