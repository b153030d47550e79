//! Path globs: `*` stands for what is within one segment, `**` (a whole segment) for any number of segments.
//!
//! Compiled once; matching allocates nothing, and takes time linear in the path: what stands between two
//! `**` is searched from the left, and a place where it was found is never given up.

use std::fmt::Write as _;

use super::RuleError;
use crate::canonical;

/// The longest pattern, in bytes.
const MAX_PATTERN: usize = 1024;

/// A path glob.
///
/// A pattern with escapes or characters outside ASCII, such as `/café/a%20b`, stands for a path however much
/// of it is encoded: the readings of one request are encoded and decoded ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob {
    forms: Vec<Form>,
    /// The same without the slash at the end, where there is one.
    open: Vec<Form>,
}

/// What stands between the `**` of a pattern; one run where there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Form(Vec<Run>);

/// Segments that follow each other.
type Run = Vec<Segment>;

/// What stands between the `*` of a segment; one literal where there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment(Vec<Vec<u8>>);

impl Glob {
    /// Compiles a pattern such as `/v1/**` or `/users/*/orders`.
    ///
    /// # Errors
    /// [`RuleError::Path`] unless it starts with `/`, is at most 1 KiB and is in canonical form.
    pub fn compile(pattern: &str) -> Result<Self, RuleError> {
        let refuse = || RuleError::Path(pattern.to_owned());
        if pattern.len() > MAX_PATTERN || !pattern.starts_with('/') {
            return Err(refuse());
        }
        match canonical::path(pattern) {
            Ok(path) if path == pattern => {}
            _ => return Err(refuse()),
        }
        let open = pattern.strip_suffix('/').filter(|open| !open.is_empty());
        Ok(Self { forms: Form::all(pattern), open: open.map(Form::all).unwrap_or_default() })
    }

    /// Whether a path matches.
    pub fn matches(&self, path: &[u8]) -> bool {
        self.forms.iter().any(|form| form.matches(path, &mut ()))
    }

    /// Whether a path matches for an application that ignores slashes at the end.
    pub fn may_match(&self, path: &[u8]) -> bool {
        let slashes = path.iter().rev().take_while(|byte| **byte == b'/').count();
        let open = path.get(..path.len() - slashes).unwrap_or(path);
        self.matches(path)
            || (slashes > 0 && self.forms.iter().any(|form| form.matches(open, &mut ())))
            || self.open.iter().any(|form| form.matches(open, &mut ()))
    }
}

/// Counts the steps of a match in tests.
trait Steps {
    fn add(&mut self, steps: usize);
}

impl Steps for () {
    fn add(&mut self, _: usize) {}
}

impl Form {
    /// The pattern as it is written, decoded, and encoded with upper-case and lower-case digits.
    fn all(pattern: &str) -> Vec<Self> {
        let mut forms = vec![Self::new(pattern, |literal| literal.as_bytes().to_vec())];
        if pattern.is_ascii() && !pattern.contains('%') {
            return forms;
        }
        let decoded = |literal: &str| {
            let literal = literal.as_bytes();
            canonical::decoded(literal).unwrap_or_else(|| literal.to_vec())
        };
        for form in [
            Self::new(pattern, decoded),
            Self::new(pattern, |literal| encoded(literal).into_bytes()),
            Self::new(pattern, |literal| with_lower_case_escapes(&encoded(literal)).into_bytes()),
        ] {
            if !forms.contains(&form) {
                forms.push(form);
            }
        }
        forms
    }

    fn new(pattern: &str, literal: impl Fn(&str) -> Vec<u8>) -> Self {
        let mut runs = vec![Run::new()];
        for segment in pattern.split('/').skip(1) {
            if segment == "**" {
                runs.push(Run::new());
            } else if let Some(run) = runs.last_mut() {
                run.push(Segment(segment.split('*').map(&literal).collect()));
            }
        }
        Self(runs)
    }

    fn matches(&self, path: &[u8], steps: &mut impl Steps) -> bool {
        let rest = Rest(path.strip_prefix(b"/"));
        match self.0.as_slice() {
            [] => false,
            [only] => rest.after(only, steps).is_some_and(Rest::is_empty),
            [first, between @ .., last] => {
                let Some(mut rest) = rest.after(first, steps) else { return false };
                for run in between {
                    match rest.after_first(run, steps) {
                        Some(after) => rest = after,
                        None => return false,
                    }
                }
                rest.ends_with(last, steps)
            }
        }
    }
}

/// The segments of a path that are left; `None`: there are none, which is not the same as one empty segment.
#[derive(Clone, Copy)]
struct Rest<'a>(Option<&'a [u8]>);

impl<'a> Rest<'a> {
    fn is_empty(self) -> bool {
        self.0.is_none()
    }

    fn split_first(self) -> Option<(&'a [u8], Self)> {
        let text = self.0?;
        match text.iter().position(|byte| *byte == b'/') {
            Some(slash) => {
                let (segment, rest) = text.split_at(slash);
                Some((segment, Self(rest.get(1..))))
            }
            None => Some((text, Self(None))),
        }
    }

    /// What is left when the next segments match the run.
    fn after(self, run: &[Segment], steps: &mut impl Steps) -> Option<Self> {
        let mut rest = self;
        for pattern in run {
            let (segment, after) = rest.split_first()?;
            if !pattern.matches(segment, steps) {
                return None;
            }
            rest = after;
        }
        Some(rest)
    }

    /// What is left behind the first segments that match the run.
    fn after_first(self, run: &[Segment], steps: &mut impl Steps) -> Option<Self> {
        let mut rest = self;
        loop {
            if let Some(after) = rest.after(run, steps) {
                return Some(after);
            }
            (_, rest) = rest.split_first()?;
        }
    }

    fn ends_with(self, run: &[Segment], steps: &mut impl Steps) -> bool {
        let Some(text) = self.0 else { return run.is_empty() };
        let mut segments = text.rsplit(|byte| *byte == b'/');
        run.iter().rev().all(|pattern| segments.next().is_some_and(|segment| pattern.matches(segment, steps)))
    }
}

impl Segment {
    fn matches(&self, text: &[u8], steps: &mut impl Steps) -> bool {
        steps.add(1);
        match self.0.as_slice() {
            [] => false,
            [only] => text == only,
            [first, between @ .., last] => {
                let Some(text) = text.strip_prefix(first.as_slice()) else { return false };
                let Some(mut text) = text.strip_suffix(last.as_slice()) else { return false };
                for literal in between.iter().filter(|literal| !literal.is_empty()) {
                    let found = text.windows(literal.len()).position(|window| window == literal);
                    steps.add(found.unwrap_or(text.len()));
                    let Some(at) = found else { return false };
                    text = text.get(at + literal.len()..).unwrap_or(&[]);
                }
                true
            }
        }
    }
}

/// Characters outside ASCII as clients send them: escaped, with upper-case digits.
fn encoded(literal: &str) -> String {
    let mut out = String::with_capacity(literal.len());
    for character in literal.chars() {
        if character.is_ascii() {
            out.push(character);
            continue;
        }
        for byte in character.encode_utf8(&mut [0; 4]).bytes() {
            // Writing to a string cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn with_lower_case_escapes(literal: &str) -> String {
    let mut digits = 0;
    let lower = |character: char| {
        let is_digit = digits > 0;
        digits = if character == '%' { 2 } else { digits - i32::from(is_digit) };
        if is_digit { character.to_ascii_lowercase() } else { character }
    };
    literal.chars().map(lower).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Steps for usize {
        fn add(&mut self, steps: usize) {
            *self += steps;
        }
    }

    fn matches(pattern: &str, path: &str) -> bool {
        Glob::compile(pattern).unwrap().matches(path.as_bytes())
    }

    /// The meaning of a glob in its simplest words, exponential in its stars.
    fn simply_matches(pattern: &[&str], path: &[&str]) -> bool {
        match (pattern.split_first(), path.split_first()) {
            (None, None) => true,
            (None, Some(_)) => false,
            (Some((&"**", rest)), _) => (0..=path.len()).any(|skip| simply_matches(rest, &path[skip..])),
            (Some(_), None) => false,
            (Some((first, rest)), Some((segment, more))) => {
                simply_matches_segment(first.as_bytes(), segment.as_bytes()) && simply_matches(rest, more)
            }
        }
    }

    fn simply_matches_segment(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|skip| simply_matches_segment(rest, &text[skip..])),
            Some((byte, rest)) => text.first() == Some(byte) && simply_matches_segment(rest, &text[1..]),
        }
    }

    #[test]
    fn stars_stand_for_parts_of_a_segment_and_two_for_segments() {
        for (pattern, path, expected) in [
            ("/admin/**", "/admin", true),
            ("/admin/**", "/admin/", true),
            ("/admin/**", "/admin/a/b", true),
            ("/admin/**", "/administrator", false),
            ("/**", "/", true),
            ("/**", "*", true),
            ("/**", "host:443", true),
            ("/*", "*", false),
            ("/a/*", "/a/", true),
            ("/a/*", "/a", false),
            ("/a/*", "/a/b/c", false),
            ("/v1/*:delete", "/v1/x:delete", true),
            ("/v1/*:delete", "/v1/:delete", true),
            ("/v1/*:delete", "/v1/x:deleted", false),
            ("/*a*b*", "/xaxbx", true),
            ("/*a*b*", "/xbxax", false),
            ("/ab*ba", "/aba", false),
            ("/**/x/**/y", "/x/y", true),
            ("/**/x/**/y", "/y/x", false),
            ("/**/x/y/**", "/x/x/y", true),
            ("/a/**/a", "/a", false),
        ] {
            assert_eq!(matches(pattern, path), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn a_pattern_with_escapes_matches_the_encoded_and_the_decoded_path() {
        for path in ["/caf\u{e9}/a b", "/caf%C3%A9/a%20b", "/caf%c3%a9/a%20b", "/caf\u{e9}/a%20b"] {
            assert!(matches("/caf\u{e9}/a%20b", path), "{path}");
        }
        assert!(matches("/a%2Ab", "/a*b"));
        assert!(!matches("/a%2Ab", "/axb"), "an escaped star is a star");
    }

    #[test]
    fn a_slash_at_the_end_makes_no_difference_to_a_deny() {
        for (pattern, path) in [("/a", "/a/"), ("/a", "/a//"), ("/a/", "/a"), ("/a/", "/a/"), ("/a/*", "/a/")]
        {
            assert!(Glob::compile(pattern).unwrap().may_match(path.as_bytes()), "{pattern} {path}");
        }
        assert!(!matches("/a", "/a/") && !matches("/a/", "/a"), "an allow is exact");
        assert!(!Glob::compile("/a").unwrap().may_match(b"/"));
    }

    #[test]
    fn matching_is_linear_whatever_the_pattern() {
        for (pattern, path) in [
            ("/**/a".repeat(20) + "/**/b/**", "/a".repeat(30 * 1024)),
            ("/**/*a*a".repeat(20) + "/**/b/**", "/aaa".repeat(15 * 1024)),
            ("/".to_owned() + &"*a".repeat(20) + "*b*", "/".to_owned() + &"a".repeat(60 * 1024)),
            ("/**/a/a/b".repeat(20), "/a".repeat(30 * 1024)),
        ] {
            let form = &Form::all(&pattern)[0];
            let mut steps = 0usize;
            assert!(!form.matches(path.as_bytes(), &mut steps), "{pattern}");
            assert!(steps <= 4 * path.len(), "{pattern}: {steps} steps for {} bytes", path.len());
        }
    }

    proptest! {
        #[test]
        fn a_glob_without_stars_matches_itself_alone(path in "/[a-z]{1,4}(/[a-z]{1,4}){0,3}", other in "/[a-z]{1,4}") {
            prop_assert!(matches(&path, &path));
            prop_assert_eq!(matches(&path, &other), path == other);
        }

        #[test]
        fn a_star_covers_every_character_of_a_segment(middle in "[!-.0-~&&[^%\\\\#?]]{0,12}") {
            let path = format!("/a/x{middle}y/b");
            prop_assert!(matches("/a/x*y/b", &path), "{path}");
        }

        #[test]
        fn searching_from_the_left_finds_what_trying_everything_finds(
            pattern in "(/(\\*\\*|[ab*]{1,3})){1,6}",
            path in "(/[ab]{0,3}){1,8}",
        ) {
            let split = |text: &str| text.split('/').skip(1).map(str::to_owned).collect::<Vec<_>>();
            let (wanted, given) = (split(&pattern), split(&path));
            let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
            let given: Vec<&str> = given.iter().map(String::as_str).collect();
            prop_assert_eq!(matches(&pattern, &path), simply_matches(&wanted, &given), "{} {}", pattern, path);
        }
    }
}
