//! Rules of routes, a request, and where it is redirected.
//!
//! The input is text. Its first line is `METHOD TARGET HOST`. Each other line begins with a letter that says what it
//! is: `>` a header of the request, `L` a redirect (`L SCHEME HOSTNAME PORT PATH`), `/` the end of a match; all others
//! are a part of a match, of which upper-case letters are regular expressions (see [`Input::part`]).
#![no_main]

use std::borrow::Cow;
use std::net::Ipv6Addr;

use libfuzzer_sys::fuzz_target;
use tulle_mesh::proto::path_modifier::Kind;
use tulle_mesh::proto::value_match::Type;
use tulle_mesh::proto::{self, Match, PathModifier, Redirect, RouteKind, ValueMatch};
use tulle_mesh::route::{Candidate, Matcher, Requested, Subject, location, order, rewritten_path};

/// More matches than this only make a run slow.
const MAX_MATCHES: usize = 16;
/// Longest input, in bytes. Each byte of a value may visit each state of a regular expression, and an input can hold
/// many of both.
const MAX_TEXT: usize = 1024;

#[derive(Default)]
struct Input<'a> {
    method: &'a str,
    target: &'a str,
    host: Option<&'a str>,
    headers: Vec<(&'a str, &'a str)>,
    matches: Vec<Match>,
    redirect: Redirect,
}

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if text.len() > MAX_TEXT {
        return;
    }
    let mut input = Input::read(text);
    // A match that is refused says why; the others are left.
    input.matches.retain(|m| match compile(RouteKind::Http, std::slice::from_ref(m)) {
        Ok(_) => true,
        Err(error) => {
            assert!(!error.is_empty());
            false
        }
    });
    for kind in [RouteKind::Http, RouteKind::Grpc] {
        let matches = ordered(kind, &input.matches);
        let prefix = first_match(kind, &matches, &input);
        redirected(&input, prefix.as_deref());
    }
    server_names(&input);
});

impl Subject for Input<'_> {
    fn method(&self) -> &str {
        self.method
    }

    fn path(&self) -> &str {
        let path = self.target.split('?').next().unwrap_or("");
        if path.is_empty() { "/" } else { path }
    }

    fn query(&self) -> Option<&str> {
        Some(self.target.split_once('?')?.1)
    }

    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let lines = self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        let lines: Vec<&str> = lines.map(|(_, value)| *value).collect();
        (!lines.is_empty()).then(|| Cow::Owned(lines.join(",").into_bytes()))
    }
}

impl<'a> Input<'a> {
    fn read(text: &'a str) -> Self {
        let mut lines = text.split('\n');
        let mut words = lines.next().unwrap_or("").splitn(3, ' ');
        let mut input = Self {
            method: words.next().unwrap_or(""),
            target: words.next().unwrap_or(""),
            host: words.next(),
            matches: vec![Match::default()],
            ..Self::default()
        };
        for line in lines {
            let Some(what) = line.chars().next() else { continue };
            let rest = &line[what.len_utf8()..];
            let (name, value) = rest.split_once(' ').unwrap_or((rest, ""));
            match what {
                '>' => input.headers.push((name, value)),
                'L' => input.redirect = redirect(rest.strip_prefix(' ').unwrap_or(rest)),
                '/' if input.matches.len() < MAX_MATCHES => input.matches.push(Match::default()),
                _ => {
                    let Some(m) = input.matches.last_mut() else { continue };
                    Self::part(
                        m,
                        what,
                        rest,
                        ValueMatch { r#type: 0, name: name.into(), value: value.into() },
                    );
                }
            }
        }
        input
    }

    /// Adds one part to a match.
    fn part(m: &mut Match, what: char, rest: &str, mut named: ValueMatch) {
        let way = if what.is_ascii_uppercase() { Type::Regex } else { Type::Exact };
        let unnamed = |way: Type| ValueMatch { r#type: way as i32, name: String::new(), value: rest.into() };
        named.r#type = way as i32;
        match what {
            'p' => m.path = Some(unnamed(Type::Prefix)),
            'e' | 'E' => m.path = Some(unnamed(way)),
            'h' | 'H' => m.headers.push(named),
            'q' | 'Q' => m.query.push(named),
            's' | 'S' => m.grpc_service = Some(unnamed(way)),
            'd' | 'D' => m.grpc_method = Some(unnamed(way)),
            'm' => m.method = rest.into(),
            'n' => m.server_names.push(rest.into()),
            // A way to compare that headers do not have.
            'c' => m.headers.push(ValueMatch { r#type: Type::Cookie as i32, ..named }),
            _ => {}
        }
    }
}

fn redirect(text: &str) -> Redirect {
    let mut words = text.splitn(4, ' ');
    let mut next = || words.next().unwrap_or("").to_owned();
    let (scheme, hostname, port, path) = (next(), next(), next(), next());
    let kind = match path.strip_prefix('=') {
        Some(full) => Kind::Full(full.to_owned()),
        None => Kind::Prefix(path),
    };
    let path = Some(PathModifier { kind: Some(kind) });
    Redirect { scheme, hostname, path, port: port.parse().unwrap_or(0), status: 302 }
}

fn compile(kind: RouteKind, matches: &[Match]) -> Result<Matcher, String> {
    let rules = vec![proto::RouteRule::default(); matches.len()];
    let numbered = (0..).zip(matches).map(|(rule, m)| Match { rule, ..m.clone() });
    let rules = proto::Rules { kind: kind as i32, rules, matches: numbered.collect(), ..Default::default() };
    Matcher::compile(&rules).map_err(|error| error.to_string())
}

/// The matches in order of precedence, which does not depend on the order in which they came.
fn ordered(kind: RouteKind, matches: &[Match]) -> Vec<Match> {
    let candidate = |(rule, m): (usize, &Match)| {
        let route = ("shop".to_owned(), "web".to_owned());
        Candidate { m: m.clone(), created: 0, route, rule, kind }
    };
    let mut candidates: Vec<Candidate> = matches.iter().enumerate().map(candidate).collect();
    let mut reversed: Vec<Candidate> = candidates.iter().rev().cloned().collect();
    order(&mut candidates);
    order(&mut reversed);
    assert_eq!(candidates, reversed, "the order depends on the order before");
    candidates.into_iter().map(|candidate| candidate.m).collect()
}

/// What is found is the first match that matches alone; its prefix is returned.
fn first_match(kind: RouteKind, matches: &[Match], input: &Input<'_>) -> Option<String> {
    let all = compile(kind, matches).expect("each match was accepted");
    let found = all.find(input);
    assert_eq!(found, all.find(input), "the same request is matched differently");
    let alone = |m: &Match| compile(kind, std::slice::from_ref(m)).is_ok_and(|m| m.find(input).is_some());
    assert_eq!(found.map(|found| found.rule), matches.iter().position(alone));
    let prefix = found?.prefix?;
    let segments: Vec<&str> = prefix.trim_end_matches('/').split('/').collect();
    let starts = input.path().split('/').take(segments.len()).eq(segments.iter().copied());
    assert!(starts || segments == [""], "{prefix} is not a prefix of {}", input.path());
    Some(prefix.to_owned())
}

fn server_names(input: &Input<'_>) {
    let names = compile(RouteKind::Tls, &input.matches).expect("each match was accepted");
    for name in [None, Some(input.method), input.host] {
        let found = names.find_server_name(name);
        assert_eq!(found, names.find_server_name(name));
        assert!(found.is_none_or(|rule| rule < input.matches.len()));
    }
}

fn redirected(input: &Input<'_>, prefix: Option<&str>) {
    let modifier = input.redirect.path.clone().unwrap_or(PathModifier { kind: None });
    for prefix in [prefix, None, Some(input.method)] {
        let path = rewritten_path(input.path(), &modifier, prefix);
        assert!(path.starts_with('/'), "{path}");
        for (scheme, port) in [("http", 80), ("http", 8080), ("https", 443)] {
            let request = Requested { scheme, host: input.host, port, target: input.target };
            let url = location(&input.redirect, &request, prefix);
            parse(&url, &input.redirect, &request, &path);
        }
    }
}

/// The URL consists of what it was made of, as far as that has no delimiters of URLs in it.
fn parse(url: &str, redirect: &Redirect, request: &Requested<'_>, path: &str) {
    let query = request.target.split_once('?').map(|(_, query)| query);
    let host =
        if redirect.hostname.is_empty() { request.host.unwrap_or("") } else { redirect.hostname.as_str() };
    if host.is_empty() {
        assert!(url.starts_with('/') && !url.starts_with("//"), "{url} names a host");
        return;
    }
    let Some(host) = host_of(host) else { return };
    let scheme = if redirect.scheme.is_empty() { request.scheme } else { redirect.scheme.as_str() };
    if redirect.hostname.contains(':') || !scheme.bytes().all(|byte| byte.is_ascii_alphabetic()) {
        return;
    }
    let rest = url.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://")).expect("the scheme");
    let (authority, behind) = rest.split_at(rest.find('/').expect("a path"));
    let port = authority.strip_prefix(&*host).expect("the host");
    if !port.is_empty() {
        let port: u16 = port.strip_prefix(':').and_then(|port| port.parse().ok()).expect("a port");
        assert!((scheme, port) != ("http", 80) && (scheme, port) != ("https", 443), "{url}");
    }
    let written = query.map_or_else(|| path.to_owned(), |query| format!("{path}?{query}"));
    assert_eq!(behind, written);
}

/// The host of an authority that is a valid one, as URLs have it.
fn host_of(authority: &str) -> Option<String> {
    if authority.parse::<Ipv6Addr>().is_ok() {
        return Some(format!("[{authority}]"));
    }
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            (format!("[{address}]"), port)
        }
        None => {
            let end = authority.find(':').unwrap_or(authority.len());
            let (name, port) = authority.split_at(end);
            let valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
            (Some(name.to_owned()).filter(|name| valid && !name.is_empty())?, port)
        }
    };
    let digits = port.strip_prefix(':').unwrap_or(port);
    (port.is_empty() || (port.starts_with(':') && digits.bytes().all(|byte| byte.is_ascii_digit())))
        .then_some(host)
}
