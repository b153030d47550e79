//! Readings of paths, and globs.
//!
//! The input is a pattern and a target, a line each; the pattern's bytes also choose how `/admin/x` is re-encoded.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use tulle_mesh::canonical::{self, Readings, readings};
use tulle_mesh::policy::{Access, Glob, Http, Subject};
use tulle_mesh::proto;

thread_local! {
    static DENY: Access = denying("/admin/**");
}

fuzz_target!(|input: &[u8]| {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (pattern, target) = text.split_once('\n').unwrap_or((text, text));
    let found = readings(target);
    bounded(target, &found);
    if target.starts_with('/') {
        let path = target.split('?').next().unwrap_or("");
        assert_eq!(found.as_sent(), path.as_bytes());
    }
    if let Ok(path) = canonical::path(target) {
        assert_eq!(canonical::path(&path).as_deref(), Ok(&*path), "canonical twice is something else");
        // The canonical form is what a reader makes of the path that decodes only what needs no escape.
        if path != "*" && path.starts_with("/admin/") && target.starts_with('/') {
            assert!(denied(target), "{path} gets through as {target}");
        }
    }
    if let Ok(glob) = Glob::compile(pattern) {
        compare(pattern, &glob, found.as_sent());
    }
    let spelling = spelled(pattern.as_bytes());
    assert!(denied(&spelling), "{spelling} gets through");
});

fn denying(pattern: &str) -> Access {
    let operation = proto::Operation { paths: vec![pattern.to_owned()], ..Default::default() };
    let rule = proto::Rule { from: vec![], to: vec![operation] };
    Access::compile(&proto::Access { deny: vec![rule], ..Default::default() }).expect("a valid pattern")
}

fn denied(target: &str) -> bool {
    let found = readings(target);
    let readings = || &found;
    let http = Some(Http { method: "GET", readings: &readings });
    let address = IpAddr::V4(Ipv4Addr::LOCALHOST);
    DENY.with(|deny| !deny.decide(&Subject { identity: None, address, port: 80, http }).allowed)
}

fn bounded(target: &str, found: &Readings) {
    let bytes: usize = found.iter().map(<[u8]>::len).sum();
    assert!(found.iter().count() <= 64 && bytes <= 32 * 1024 + 3 * target.len() + 16, "{bytes} bytes");
}

/// `/admin/x`, each character as it is, escaped or escaped twice, with what readers drop between the segments.
fn spelled(choices: &[u8]) -> String {
    let mut choices = choices.iter().copied().chain(std::iter::repeat(0));
    let mut next = || choices.next().unwrap_or(0);
    let mut out = String::new();
    for (index, byte) in b"/admin/x".iter().enumerate() {
        if *byte == b'/' {
            match next() % 6 {
                0 => out.push_str("/."),
                1 => out.push('/'),
                2 => out.push_str("/b/.."),
                3 if index > 0 => out.push_str(";a=b"),
                _ => {}
            }
        }
        // A path begins with a slash.
        let how = if out.is_empty() { 0 } else { next() % 5 };
        match how {
            1 => out.push_str(&format!("%{byte:02X}")),
            2 => out.push_str(&format!("%{byte:02x}")),
            3 => out.push_str(&format!("%25{byte:02x}")),
            4 if byte.is_ascii_alphabetic() => out.push_str(&format!("%25%3{}{:x}", byte >> 4, byte & 15)),
            _ => out.push(char::from(*byte)),
        }
    }
    out
}

/// Compares a glob with its meaning in simple words, as long as that does not take too long.
fn compare(pattern: &str, glob: &Glob, path: &[u8]) {
    let stars = pattern.matches('*').count();
    // A pattern with escapes has several forms.
    if stars > 6 || path.len() > 64 || pattern.contains('%') || !pattern.is_ascii() || !path.starts_with(b"/")
    {
        return;
    }
    let wanted: Vec<&[u8]> = pattern.as_bytes().split(|byte| *byte == b'/').skip(1).collect();
    let given: Vec<&[u8]> = path.split(|byte| *byte == b'/').skip(1).collect();
    assert_eq!(glob.matches(path), matches(&wanted, &given), "{pattern}");
    if glob.matches(path) {
        assert!(glob.may_match(path), "{pattern} allows a path that it does not deny");
    }
}

fn matches(pattern: &[&[u8]], path: &[&[u8]]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, rest) => rest.is_none(),
        (Some((first, rest)), _) if *first == b"**" => {
            (0..=path.len()).any(|skip| matches(rest, &path[skip..]))
        }
        (Some(_), None) => false,
        (Some((first, rest)), Some((segment, more))) => {
            segment_matches(first, segment) && matches(rest, more)
        }
    }
}

fn segment_matches(pattern: &[u8], text: &[u8]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((b'*', rest)) => (0..=text.len()).any(|skip| segment_matches(rest, &text[skip..])),
        Some((byte, rest)) => text.first() == Some(byte) && segment_matches(rest, &text[1..]),
    }
}
