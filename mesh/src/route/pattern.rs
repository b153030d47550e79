//! Regular expressions that match a whole value, in time linear in the value.

use regex_lite::{Regex, RegexBuilder};

use super::RouteError;

/// The longest regular expression, in bytes.
pub const MAX_PATTERN_BYTES: usize = 1024;
/// The most memory that a compiled regular expression may take, in bytes.
///
/// A counted repetition multiplies what it repeats, and each byte of a value visits every state in the worst case.
/// This is room for about 2,000 states; a pattern of [`MAX_PATTERN_BYTES`] without counted repetitions needs half.
pub const MAX_COMPILED_BYTES: usize = 64 * 1024;
/// How much of a pattern that is too long an error shows, in characters.
const SHOWN_CHARS: usize = 64;

/// Checks a regular expression of a route: the syntax of RE2 without Unicode classes (`\p`), compiled within
/// [`MAX_COMPILED_BYTES`].
///
/// # Errors
/// [`RouteError::Regex`] names the pattern and the reason.
pub fn check_regex(pattern: &str) -> Result<(), RouteError> {
    Pattern::compile(pattern).map(|_| ())
}

/// A compiled regular expression. Two are equal if their patterns are.
#[derive(Clone, Debug)]
pub(super) struct Pattern(Regex);

impl Pattern {
    pub(super) fn compile(pattern: &str) -> Result<Self, RouteError> {
        if pattern.len() > MAX_PATTERN_BYTES {
            let shown: String = pattern.chars().take(SHOWN_CHARS).collect();
            let reason = format!("{} bytes long, the limit is {MAX_PATTERN_BYTES}", pattern.len());
            return Err(RouteError::Regex { pattern: format!("{shown}…"), reason });
        }
        // By itself first: `a)|(b` is refused, and is not taken for two halves of what stands around it below.
        build(pattern, pattern)?;
        build(&format!(r"\A(?:{pattern})\z"), pattern).map(Self)
    }

    /// Whether the whole value matches. One that is not UTF-8 never does.
    pub(super) fn matches(&self, value: &[u8]) -> bool {
        std::str::from_utf8(value).is_ok_and(|value| self.matches_str(value))
    }

    pub(super) fn matches_str(&self, value: &str) -> bool {
        self.0.is_match(value)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

fn build(whole: &str, pattern: &str) -> Result<Regex, RouteError> {
    RegexBuilder::new(whole)
        .size_limit(MAX_COMPILED_BYTES)
        .build()
        .map_err(|error| RouteError::Regex { pattern: pattern.to_owned(), reason: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, value: &str) -> bool {
        Pattern::compile(pattern).unwrap().matches_str(value)
    }

    #[test]
    fn a_regular_expression_must_match_the_whole_value() {
        assert!(matches("/v[0-9]+/.*", "/v12/users"));
        assert!(!matches("/v[0-9]+", "/v12/users"));
        assert!(!matches("v[0-9]+", "/v12"));
        assert!(matches("a|ab", "ab"), "the shorter alternative comes first and does not end the match");
        assert!(!matches("a|b", "ab"));
        assert!(matches("(?i)canary", "Canary"));
        assert!(!matches("canary$", "canary\n"));
    }

    #[test]
    fn a_pattern_cannot_leave_the_group_that_it_is_put_into() {
        for pattern in ["a)|(?:b", "a)", "(?x)a # comment"] {
            let error = check_regex(pattern).unwrap_err();
            assert!(error.to_string().contains(&format!("{pattern:?}")), "{error}");
        }
    }

    #[test]
    fn a_refused_pattern_is_named_with_the_reason() {
        for pattern in ["(", "[a", "*a", r"(?=a)", r"\p{L}", r"\1", "a{2,1}"] {
            let RouteError::Regex { pattern: named, reason } = check_regex(pattern).unwrap_err() else {
                panic!("{pattern}");
            };
            assert_eq!(named, pattern);
            assert!(!reason.is_empty());
        }
    }

    #[test]
    fn a_pattern_that_grows_when_it_is_compiled_is_refused() {
        assert!(check_regex("[a-z]{1,100}").is_ok());
        assert!(check_regex("a{100}{100}{100}").is_err());
        assert!(check_regex("((a{60}){60}){60}").is_err());
    }

    #[test]
    fn a_long_pattern_is_refused_and_shown_in_part() {
        let longest = "é".repeat(MAX_PATTERN_BYTES / 2);
        assert!(check_regex(&longest).is_ok());
        let error = check_regex(&format!("{longest}a")).unwrap_err().to_string();
        assert!(error.contains("1025 bytes long, the limit is 1024") && error.len() < 300, "{error}");
    }

    #[test]
    fn a_value_that_is_not_utf_8_matches_no_regular_expression() {
        let any = Pattern::compile(".*").unwrap();
        assert!(any.matches(b"caf\xc3\xa9"));
        assert!(!any.matches(b"caf\xe9"));
    }

    #[test]
    fn patterns_are_equal_as_their_text_is() {
        assert_eq!(Pattern::compile("a+").unwrap(), Pattern::compile("a+").unwrap());
        assert_ne!(Pattern::compile("a+").unwrap(), Pattern::compile("aa*").unwrap());
    }
}
