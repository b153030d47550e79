//! The `Location` of a redirect.

use std::fmt::Write as _;
use std::net::Ipv6Addr;

use super::rewritten_path;
use crate::proto::{PathModifier, Redirect};

/// The request that is redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requested<'a> {
    /// `http` or `https`.
    pub scheme: &'a str,
    /// As it was sent; it may have a port, which is not used.
    pub host: Option<&'a str>,
    /// The port that the application dialled.
    pub port: u16,
    /// Path and query.
    pub target: &'a str,
}

/// The URL that a redirect answers with. The request's query is kept, whatever becomes of its path.
///
/// `prefix`: the path prefix that matched ([`super::Found::prefix`]).
///
/// The port is that of the redirect; without one, the well-known port of the redirect's scheme; without that, the port
/// that was dialled. 80 is not written for `http`, nor 443 for `https`. Without any host (HTTP/1.0), the URL is
/// relative to the request's: a path.
pub fn location(redirect: &Redirect, request: &Requested<'_>, prefix: Option<&str>) -> String {
    let (path, query) = match request.target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (request.target, None),
    };
    let path = if path.is_empty() { "/" } else { path };
    let unchanged = PathModifier { kind: None };
    let path = rewritten_path(path, redirect.path.as_ref().unwrap_or(&unchanged), prefix);
    let scheme = if redirect.scheme.is_empty() { request.scheme } else { redirect.scheme.as_str() };
    let host = Some(redirect.hostname.as_str()).filter(|name| !name.is_empty());
    let host = host.or_else(|| request.host.map(without_port)).filter(|name| !name.is_empty());

    let mut url = String::with_capacity(64 + path.len());
    match host {
        Some(host) => {
            push_origin(&mut url, scheme, host, port(redirect, request, scheme));
            url.push_str(&path);
        }
        // Two slashes in front would be a host.
        None => {
            url.push('/');
            url.push_str(path.trim_start_matches('/'));
        }
    }
    if let Some(query) = query {
        url.push('?');
        url.push_str(query);
    }
    url
}

fn port(redirect: &Redirect, request: &Requested<'_>, scheme: &str) -> u16 {
    let well_known = || if redirect.scheme.is_empty() { None } else { well_known_port(scheme) };
    let given = u16::try_from(redirect.port).ok().filter(|port| *port > 0);
    given.or_else(well_known).unwrap_or(request.port)
}

fn well_known_port(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

fn push_origin(url: &mut String, scheme: &str, host: &str, port: u16) {
    url.push_str(scheme);
    url.push_str("://");
    if host.parse::<Ipv6Addr>().is_ok() {
        url.push('[');
        url.push_str(host);
        url.push(']');
    } else {
        url.push_str(host);
    }
    if well_known_port(scheme) != Some(port) {
        // Writing to a String cannot fail.
        let _ = write!(url, ":{port}");
    }
}

/// The host of an authority: `shop` of `shop:8080`, `[::1]` of `[::1]:8080`.
fn without_port(authority: &str) -> &str {
    if authority.starts_with('[') {
        return match authority.split_once("]:") {
            Some((host, _)) => authority.get(..=host.len()).unwrap_or(authority),
            None => authority,
        };
    }
    if authority.parse::<Ipv6Addr>().is_ok() {
        return authority;
    }
    authority.split_once(':').map_or(authority, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::path_modifier::Kind;

    fn get(target: &str) -> Requested<'_> {
        Requested { scheme: "http", host: Some("shop"), port: 80, target }
    }

    fn to_path(kind: Kind) -> Redirect {
        Redirect { path: Some(PathModifier { kind: Some(kind) }), ..Redirect::default() }
    }

    #[test]
    fn what_a_redirect_does_not_name_is_as_in_the_request() {
        let same = location(&Redirect::default(), &get("/a/b?x=1&y=%20"), Some("/"));
        assert_eq!(same, "http://shop/a/b?x=1&y=%20");
        let host = Redirect { hostname: "example.org".to_owned(), ..Redirect::default() };
        assert_eq!(location(&host, &get("/a"), None), "http://example.org/a");
    }

    #[test]
    fn a_port_that_is_given_is_used_and_a_well_known_one_is_not_written() {
        let to = |scheme: &str, port| {
            let redirect = Redirect { scheme: scheme.to_owned(), port, ..Redirect::default() };
            location(&redirect, &Requested { port: 8080, ..get("/") }, None)
        };
        for (scheme, port, expected) in [
            ("", 8081, "http://shop:8081/"),
            ("", 80, "http://shop/"),
            ("", 443, "http://shop:443/"),
            ("https", 443, "https://shop/"),
            ("https", 80, "https://shop:80/"),
            ("http", 80, "http://shop/"),
            ("https", 8443, "https://shop:8443/"),
        ] {
            assert_eq!(to(scheme, port), expected, "{scheme} {port}");
        }
    }

    #[test]
    fn without_a_port_it_is_that_of_the_scheme_and_without_a_scheme_that_which_was_dialled() {
        let to = |scheme: &str, dialled| {
            let redirect = Redirect { scheme: scheme.to_owned(), ..Redirect::default() };
            location(&redirect, &Requested { port: dialled, ..get("/") }, None)
        };
        for (scheme, dialled, expected) in [
            ("", 80, "http://shop/"),
            ("", 8080, "http://shop:8080/"),
            ("", 443, "http://shop:443/"),
            ("http", 8080, "http://shop/"),
            ("https", 80, "https://shop/"),
            ("https", 8080, "https://shop/"),
            ("ftp", 8080, "ftp://shop:8080/"),
        ] {
            assert_eq!(to(scheme, dialled), expected, "{scheme:?} {dialled}");
        }
        let over_tls = Requested { scheme: "https", port: 443, ..get("/") };
        assert_eq!(location(&Redirect::default(), &over_tls, None), "https://shop/");
        let invalid = Redirect { port: 70_000, ..Redirect::default() };
        assert_eq!(location(&invalid, &get("/"), None), "http://shop/");
    }

    #[test]
    fn the_port_of_the_host_header_is_replaced_by_the_one_that_was_dialled() {
        for (host, port, expected) in [
            ("shop:8080", 8080, "http://shop:8080/"),
            ("shop:1", 80, "http://shop/"),
            ("shop.", 80, "http://shop./"),
            ("shop:", 80, "http://shop/"),
        ] {
            let requested = Requested { host: Some(host), port, ..get("/") };
            assert_eq!(location(&Redirect::default(), &requested, None), expected, "{host}");
        }
    }

    #[test]
    fn an_ipv6_host_stands_in_brackets() {
        for (host, port, expected) in [
            ("[fd00::1]", 80, "http://[fd00::1]/"),
            ("[fd00::1]:8080", 8080, "http://[fd00::1]:8080/"),
            ("[fd00::1]:8080", 80, "http://[fd00::1]/"),
            ("fd00::1", 8080, "http://[fd00::1]:8080/"),
        ] {
            let requested = Requested { host: Some(host), port, ..get("/") };
            assert_eq!(location(&Redirect::default(), &requested, None), expected, "{host}");
        }
    }

    #[test]
    fn a_path_is_changed_and_the_query_kept() {
        let full = to_path(Kind::Full("/new".to_owned()));
        assert_eq!(location(&full, &get("/old/x?a=1"), Some("/old")), "http://shop/new?a=1");
        let prefix = to_path(Kind::Prefix("/new".to_owned()));
        assert_eq!(location(&prefix, &get("/old/x?a=/old"), Some("/old")), "http://shop/new/x?a=/old");
        assert_eq!(location(&prefix, &get("/old?"), Some("/old")), "http://shop/new?");
        assert_eq!(location(&prefix, &get("?a"), Some("/")), "http://shop/new/?a");
    }

    #[test]
    fn without_a_host_the_location_is_a_path_and_never_another_host() {
        let requested = Requested { host: None, ..get("//example.org/a?b") };
        assert_eq!(location(&Redirect::default(), &requested, None), "/example.org/a?b");
        let empty = Requested { host: Some(""), ..get("/a") };
        assert_eq!(location(&Redirect::default(), &empty, None), "/a");
        let named = Redirect { hostname: "shop".to_owned(), ..Redirect::default() };
        assert_eq!(location(&named, &requested, None), "http://shop//example.org/a?b");
    }
}
