//! What logs and spans say of a request: its method, path and version, in words of OpenTelemetry where it has some.
//!
//! In: what a client has sent. Out: a word of a closed set, or text that is cut and has no query. Pure.

use std::borrow::Cow;

use tulle_mesh::wire::head::Protocol as Travels;

use super::Head;

/// The longest path that is written. A head may have 60 KiB.
pub const MAX_PATH: usize = 1024;
/// The longest host that is written: as long as a name in DNS may be.
const MAX_HOST: usize = 255;
/// The methods that OpenTelemetry knows: RFC 9110, PATCH (RFC 5789) and QUERY. Others could be anything that a client
/// makes up.
const METHODS: [&str; 10] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"];

/// A method by the name that OpenTelemetry has for it; `None`: it has none, and calls it `_OTHER`.
pub fn known_method(method: &str) -> Option<&'static str> {
    METHODS.into_iter().find(|known| *known == method)
}

/// The version of HTTP that a request came with.
pub fn version(head: &Head, travels: Travels) -> &'static str {
    match travels {
        Travels::Http2 => "2",
        _ if head.http10 => "1.0",
        _ => "1.1",
    }
}

/// The path of a target, whatever its form, without its query: that may hold credentials, and so may the user
/// information before a host. `None`: it has none (CONNECT).
pub fn logged_path(target: &str) -> Option<&str> {
    // First: a query may look like a path.
    let target = target.split(['?', '#']).next()?;
    let path = if target.starts_with('/') || target == "*" {
        target
    } else {
        let (_, rest) = target.split_once("://")?;
        rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
    };
    Some(cut(path, MAX_PATH))
}

/// The host of a request as text: bytes that are not UTF-8 are replaced. `None`: it has none.
pub fn logged_host(head: &Head) -> Option<Cow<'_, str>> {
    let host = head.header("host")?;
    Some(String::from_utf8_lossy(host.get(..MAX_HOST).unwrap_or(host)))
}

/// At most so many bytes of a text, and whole characters.
pub fn cut(text: &str, most: usize) -> &str {
    text.get(..text.floor_char_boundary(most)).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_what_is_before_the_query_and_is_cut_where_it_is_too_long() {
        for (target, expected) in [
            ("/", Some("/")),
            ("/a#b", Some("/a")),
            ("/a?b?c", Some("/a")),
            ("http://u:p@web", Some("/")),
            ("http://u:p@web/a?b", Some("/a")),
            ("http://web?x=/s3cret", Some("/")),
            ("*", Some("*")),
            ("db:5432", None),
            ("", None),
        ] {
            assert_eq!(logged_path(target), expected, "{target}");
        }
        let long = format!("/{}", "ä".repeat(2_000));
        let path = logged_path(&long).unwrap();
        assert!(path.len() <= MAX_PATH && long.starts_with(path) && path.len() > MAX_PATH - 4);
    }

    #[test]
    fn a_host_is_text_and_is_cut_where_it_is_too_long() {
        let of = |host: Option<Vec<u8>>| {
            let mut head = Head::answer(200, "OK", 0);
            if let Some(host) = host {
                head.push("host", host);
            }
            logged_host(&head).map(Cow::into_owned)
        };
        assert_eq!(of(None), None);
        assert_eq!(of(Some(b"web:80".to_vec())).as_deref(), Some("web:80"));
        assert_eq!(of(Some(vec![b'a', 0xff])).as_deref(), Some("a\u{fffd}"));
        assert_eq!(of(Some(vec![b'h'; 300])).map(|host| host.len()), Some(MAX_HOST));
    }

    #[test]
    fn a_method_is_known_by_its_letters_and_their_case() {
        assert_eq!(known_method("GET"), Some("GET"));
        assert_eq!((known_method("get"), known_method("S3CRET"), known_method("")), (None, None, None));
    }
}
