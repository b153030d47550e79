//! What a rewrite or redirect makes of a path.

use crate::proto::PathModifier;
use crate::proto::path_modifier::Kind;

/// The path of a request after a rewrite or redirect, without query. It always starts with `/`.
///
/// `path`: as it was sent. `prefix`: the path prefix that matched ([`super::Found::prefix`]); without one, a
/// replacement of the prefix is put in front of the path. Slashes at the end of the prefix and of its replacement make
/// no difference, as where the prefix was matched.
pub fn rewritten_path(path: &str, modifier: &PathModifier, prefix: Option<&str>) -> String {
    let (replacement, rest) = match &modifier.kind {
        None => ("", behind(path, None)),
        Some(Kind::Full(full)) => (full.as_str(), ""),
        Some(Kind::Prefix(replacement)) => (replacement.trim_end_matches('/'), behind(path, prefix)),
    };
    let mut whole = String::with_capacity(1 + replacement.len() + rest.len());
    if !(replacement.starts_with('/') || replacement.is_empty() && rest.starts_with('/')) {
        whole.push('/');
    }
    whole.push_str(replacement);
    whole.push_str(rest);
    whole
}

/// What is behind the prefix: nothing, or a path of its own.
fn behind<'a>(path: &'a str, prefix: Option<&str>) -> &'a str {
    let prefix = prefix.unwrap_or("").trim_end_matches('/');
    // `*` of OPTIONS has no path behind the root, and a path that does not start with the prefix has none at all.
    path.strip_prefix(prefix).filter(|rest| rest.starts_with('/')).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full(path: &str) -> PathModifier {
        PathModifier { kind: Some(Kind::Full(path.to_owned())) }
    }

    fn replacing(prefix: &str) -> PathModifier {
        PathModifier { kind: Some(Kind::Prefix(prefix.to_owned())) }
    }

    #[test]
    fn a_replaced_prefix_gives_the_eleven_paths_of_the_gateway_api() {
        for (path, prefix, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
        ] {
            let found = rewritten_path(path, &replacing(replacement), Some(prefix));
            assert_eq!(found, expected, "{path}: {prefix} -> {replacement}");
        }
    }

    #[test]
    fn the_root_as_prefix_is_replaced_by_putting_something_in_front() {
        for (path, expected) in [("/", "/xyz/"), ("/foo/bar", "/xyz/foo/bar"), ("*", "/xyz")] {
            assert_eq!(rewritten_path(path, &replacing("/xyz"), Some("/")), expected, "{path}");
            assert_eq!(rewritten_path(path, &replacing("/xyz"), None), expected, "{path}");
        }
    }

    #[test]
    fn a_full_path_replaces_all_of_it() {
        assert_eq!(rewritten_path("/foo/bar", &full("/xyz"), Some("/foo")), "/xyz");
        assert_eq!(rewritten_path("/foo/bar", &full("/xyz/"), None), "/xyz/");
        assert_eq!(rewritten_path("/foo/bar", &full("xyz"), None), "/xyz");
        assert_eq!(rewritten_path("/foo/bar", &full(""), None), "/");
    }

    #[test]
    fn a_modifier_of_an_unknown_kind_changes_nothing() {
        assert_eq!(rewritten_path("/foo/bar", &PathModifier { kind: None }, Some("/foo")), "/foo/bar");
    }

    #[test]
    fn escapes_in_a_path_stay_as_they_are() {
        assert_eq!(rewritten_path("/foo/a%2Fb;c", &replacing("/x"), Some("/foo")), "/x/a%2Fb;c");
    }

    proptest! {
        #[test]
        fn every_path_starts_with_a_slash(
            path in "\\PC{0,12}", replacement in "[/a-z]{0,6}", prefix in "[/a-z]{0,6}"
        ) {
            for modifier in [replacing(&replacement), full(&replacement), PathModifier { kind: None }] {
                prop_assert!(rewritten_path(&path, &modifier, Some(&prefix)).starts_with('/'));
            }
        }

        #[test]
        fn a_prefix_replaced_by_itself_changes_nothing(rest in "(/[a-z]{0,3}){0,4}") {
            let path = format!("/foo{rest}");
            prop_assert_eq!(rewritten_path(&path, &replacing("/foo"), Some("/foo")), path);
        }
    }
}
