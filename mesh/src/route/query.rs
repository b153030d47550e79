//! Query parameters: found and compared without being copied.

use std::borrow::Cow;

/// The value of a parameter as it was sent, of several the first. Its name is compared decoded.
pub(super) fn value<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|parameter| {
        let (found, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        is(found, name).then_some(value)
    })
}

/// Whether an encoded text stands for this one.
pub(super) fn is(encoded: &str, text: &str) -> bool {
    Decoded(encoded.as_bytes()).eq(text.bytes())
}

/// The bytes that an encoded text stands for; borrowed where nothing is encoded.
pub(super) fn decoded(encoded: &str) -> Cow<'_, [u8]> {
    if encoded.bytes().any(|byte| matches!(byte, b'%' | b'+')) {
        Cow::Owned(Decoded(encoded.as_bytes()).collect())
    } else {
        Cow::Borrowed(encoded.as_bytes())
    }
}

/// The bytes that a text stands for, as forms are encoded: `%41` is `A` and `+` is a space. A broken escape stands for
/// itself.
struct Decoded<'a>(&'a [u8]);

impl Iterator for Decoded<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        match (*first, rest) {
            (b'+', _) => Some(b' '),
            (b'%', [high, low, rest @ ..]) => {
                let (Some(high), Some(low)) = (digit(*high), digit(*low)) else { return Some(b'%') };
                self.0 = rest;
                Some((high << 4) | low)
            }
            (byte, _) => Some(byte),
        }
    }
}

fn digit(hexadecimal: u8) -> Option<u8> {
    char::from(hexadecimal).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_parameters_of_a_name_the_first_counts() {
        let query = "a=1&b=2&a=3&c&=x&a%62=4&d=1=2";
        for (name, expected) in [
            ("a", Some("1")),
            ("b", Some("2")),
            ("c", Some("")),
            ("ab", Some("4")),
            ("d", Some("1=2")),
            ("A", None),
            ("e", None),
        ] {
            assert_eq!(value(query, name), expected, "{name}");
        }
        assert_eq!(value("", "a"), None);
    }

    #[test]
    fn values_are_compared_decoded() {
        for (encoded, text) in [
            ("a%20b", "a b"),
            ("a+b", "a b"),
            ("a%2Bb", "a+b"),
            ("caf%c3%A9", "café"),
            ("", ""),
            ("100%", "100%"),
            ("%zz%4", "%zz%4"),
            ("%2541", "%41"),
        ] {
            assert!(is(encoded, text), "{encoded}");
            assert_eq!(decoded(encoded).as_ref(), text.as_bytes(), "{encoded}");
        }
        assert!(!is("a%20b", "a%20b"));
        assert!(!is("a", "ab") && !is("ab", "a"));
    }

    #[test]
    fn a_value_without_escapes_is_borrowed() {
        assert!(matches!(decoded("plain-value"), Cow::Borrowed(_)));
        assert!(matches!(decoded("a%20b"), Cow::Owned(_)));
    }
}
