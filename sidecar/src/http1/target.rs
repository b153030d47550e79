//! The request target. Its form is passed on as it was sent: only the server knows whether it is a
//! forward proxy, which needs the absolute form and CONNECT (RFC 9112 §3.2).

use super::error::HeadError;

/// Checks a request target. `host` is the value of the Host field.
///
/// A server takes the authority of an absolute target and ignores Host (RFC 9112 §3.2.2), but many
/// frameworks look at Host alone. So the two must name one host; else the request would be routed or
/// admitted as one thing and served as another. A default port that only one of them states is the same
/// host. With CONNECT nobody reads Host for anything else, and many clients leave the port away there.
///
/// # Errors
/// [`HeadError`] for a target that could be read in two ways.
pub(super) fn check(method: &str, target: &str, host: Option<&[u8]>) -> Result<(), HeadError> {
    let host = host.map(|host| std::str::from_utf8(host).unwrap_or("/"));
    if method == "CONNECT" {
        let there = Authority::parse(target).filter(|there| there.port.is_some());
        let there = there.ok_or(HeadError("a CONNECT whose target is not a host and a port"))?;
        return match host.filter(|host| !host.is_empty()).map(Authority::parse) {
            None => Ok(()),
            Some(Some(host)) if host.is(&there, there.port) => Ok(()),
            Some(_) => Err(HeadError("Host and request target name different hosts")),
        };
    }
    if target.contains('#') {
        return Err(HeadError("a fragment in the request target"));
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(());
    }
    let (scheme, rest) = target.split_once("://").ok_or(HeadError("a request target that is not a path"))?;
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.');
    if !scheme.starts_with(|first: char| first.is_ascii_alphabetic()) || !scheme.bytes().all(letters) {
        return Err(HeadError("a request target that is not a path"));
    }
    // A query behind an empty path is refused with the host that it would be part of: whether the path
    // is then `/` has had two answers.
    let (authority, _) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let there = Authority::parse(authority).ok_or(HeadError("a request target without a valid host"))?;
    match host.map(Authority::parse) {
        None => Ok(()),
        Some(Some(host)) if host.is(&there, default_port(scheme)) => Ok(()),
        Some(_) => Err(HeadError("Host and request target name different hosts")),
    }
}

/// Path and query of a target that [`check`] has seen: what rules about paths are about. Empty for CONNECT.
pub(super) fn path(target: &str) -> &str {
    if target.starts_with('/') || target == "*" {
        return target;
    }
    match target.split_once("://") {
        Some((_, rest)) => rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/"),
        None => "",
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    let is = |name: &str| scheme.eq_ignore_ascii_case(name);
    if is("http") || is("ws") {
        Some(80)
    } else if is("https") || is("wss") {
        Some(443)
    } else {
        None
    }
}

/// A host and its port, without user information.
struct Authority<'a> {
    host: &'a str,
    port: Option<u16>,
}

impl<'a> Authority<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let end = match text.strip_prefix('[') {
            Some(rest) => rest.find(']')? + 2,
            None => text.find(':').unwrap_or(text.len()),
        };
        let (host, rest) = text.split_at_checked(end)?;
        let port = match rest.strip_prefix(':') {
            Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok()?)
            }
            None if rest.is_empty() => None,
            _ => return None,
        };
        let legal = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(address) => address.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')),
            None => host.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_')),
        };
        (legal && !host.is_empty()).then_some(Self { host, port })
    }

    /// Whether both are one host, where a port that is not stated is `default`.
    fn is(&self, other: &Self, default: Option<u16>) -> bool {
        self.host.eq_ignore_ascii_case(other.host) && self.port.or(default) == other.port.or(default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_passes_when_it_and_host_have_one_reading() {
        for (method, target, host) in [
            ("GET", "/a?b=c", "a"),
            ("OPTIONS", "*", "a"),
            ("GET", "http://a/x", "a"),
            ("GET", "HTTP://A/x", "a"),
            ("GET", "http://a", "a"),
            ("GET", "http://a:80/x", "a"),
            ("GET", "http://a/x", "a:80"),
            ("GET", "https://a/x", "a:443"),
            ("GET", "ftp://a/x", "a"),
            ("GET", "http://[::1]:8080/x", "[::1]:8080"),
            ("CONNECT", "a:443", "a:443"),
            ("CONNECT", "a:443", "a"),
            ("CONNECT", "[::1]:443", "[::1]"),
            ("CONNECT", "a:443", ""),
        ] {
            assert_eq!(check(method, target, Some(host.as_bytes())), Ok(()), "{method} {target} {host}");
        }
        assert_eq!(check("CONNECT", "a:443", None), Ok(()));
    }

    #[test]
    fn a_target_with_two_readings_is_refused() {
        for (method, target, host) in [
            ("GET", "/a#b", "a"),
            ("GET", "*", "a"),
            ("GET", "x", "a"),
            ("GET", "a:443", "a:443"),
            ("GET", "://a/", "a"),
            ("GET", "http:/a/x", "a"),
            ("GET", "http:///x", ""),
            ("GET", "http://b/", "a"),
            ("GET", "http://a/", ""),
            ("GET", "http://a:81/", "a"),
            ("GET", "https://a/", "a:80"),
            ("GET", "http://u@a/", "a"),
            ("GET", "http://a@b/", "a"),
            ("GET", "http://a?x=/", "a"),
            ("GET", "http://a\\b/", "a"),
            ("GET", "http://a:/", "a"),
            ("GET", "http://a:99999/", "a:99999"),
            ("GET", "http://a%2eb/", "a.b"),
            ("CONNECT", "a", "a"),
            ("CONNECT", "/", "a"),
            ("CONNECT", "http://a:443/", "a"),
            ("CONNECT", "a:443/", "a"),
            ("CONNECT", "a:443", "b:443"),
            ("CONNECT", "a:443", "a:80"),
            ("CONNECT", "u@a:443", "a"),
            ("CONNECT", ":443", "a"),
        ] {
            assert!(check(method, target, Some(host.as_bytes())).is_err(), "{method} {target} {host}");
        }
    }

    #[test]
    fn the_path_is_the_same_in_every_form() {
        for (target, expected) in [
            ("/a?b", "/a?b"),
            ("http://a/a?b", "/a?b"),
            ("http://a", "/"),
            ("*", "*"),
            ("a:443", ""),
            ("/x://y/z", "/x://y/z"),
        ] {
            assert_eq!(path(target), expected);
        }
    }
}
