//! What a request's path and host mean.
//!
//! Two readers that disagree about a path are how policies are bypassed (CVE-2021-31920, CVE-2021-39155,
//! CVE-2026-73551 and others). [`readings()`] therefore gives every reading that an application may have, for
//! the rules of policies; the request itself is forwarded as it was sent. [`path`] gives the one form in
//! which the patterns of those rules are written.

use std::borrow::Cow;

mod readings;

pub(crate) use readings::decoded;
pub use readings::{Readings, readings};

/// Why a request target has no canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Neither `/…` nor, for OPTIONS, `*`.
    #[error("the path does not start with a slash")]
    NotAbsolute,
    /// A fragment, NUL or control character: never legal in a request target.
    #[error("the path holds a character that is never legal in a request target")]
    Illegal,
    /// A percent sign without two hex digits.
    #[error("the path holds a broken percent escape")]
    BrokenEscape,
    /// An encoded slash or backslash, a backslash, or dot segments that remain: readers disagree
    /// about them, so no path rule can be applied safely.
    #[error("the path is ambiguous: encoded slash, backslash or dot segment")]
    Ambiguous,
}

/// The canonical path of a request target, without its query.
///
/// Percent escapes of unreserved characters are decoded once, others get upper-case hex; runs of
/// slashes become one; `.` and `..` segments are resolved. The result is idempotent: the canonical
/// form of a canonical path is itself.
///
/// # Errors
/// [`TargetError`] when the target has no single meaning.
pub fn path(target: &str) -> Result<Cow<'_, str>, TargetError> {
    let raw = target.split('?').next().unwrap_or("");
    if raw == "*" {
        return Ok(Cow::Borrowed(raw));
    }
    if !raw.starts_with('/') {
        return Err(TargetError::NotAbsolute);
    }
    if raw.bytes().any(|b| b == b'#' || b <= b' ' || b == 0x7f) {
        return Err(TargetError::Illegal);
    }
    if is_canonical(raw) {
        return Ok(Cow::Borrowed(raw));
    }
    let decoded = decode_unreserved(raw)?;
    resolve_segments(&decoded).map(Cow::Owned)
}

/// Whether a path rule may be matched against the raw target as it stands: the common case, which
/// costs no allocation.
fn is_canonical(raw: &str) -> bool {
    let mut previous = b' ';
    for byte in raw.bytes() {
        match byte {
            b'%' | b'\\' | b';' => return false,
            b'/' | b'.' if previous == b'/' => return false,
            _ => previous = byte,
        }
    }
    true
}

fn decode_unreserved(raw: &str) -> Result<String, TargetError> {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let hex = after.get(..2).ok_or(TargetError::BrokenEscape)?;
        if !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(TargetError::BrokenEscape);
        }
        let byte = u8::from_str_radix(hex, 16).map_err(|_| TargetError::BrokenEscape)?;
        match byte {
            b'/' | b'\\' => return Err(TargetError::Ambiguous),
            0 => return Err(TargetError::Illegal),
            _ if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => out.push(char::from(byte)),
            _ => {
                out.push('%');
                out.push_str(&hex.to_ascii_uppercase());
            }
        }
        rest = after.get(2..).unwrap_or("");
    }
    out.push_str(rest);
    if out.contains('\\') {
        return Err(TargetError::Ambiguous);
    }
    Ok(out)
}

fn resolve_segments(path: &str) -> Result<String, TargetError> {
    // `/a//../b` is `/b` to who merges slashes first and `/a/b` to who does not.
    if path.contains("//..") {
        return Err(TargetError::Ambiguous);
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut ends_open = false;
    for segment in path.split('/').skip(1) {
        ends_open = segment.is_empty();
        // `..;x=1` is a dot segment to servers that read parameters (CVE-2026-73551).
        match segment.split(';').next().unwrap_or("") {
            "" if segment.is_empty() => {}
            "." | ".." if segment.contains(';') => return Err(TargetError::Ambiguous),
            "." => ends_open = true,
            ".." => {
                if kept.pop().is_none() {
                    return Err(TargetError::Ambiguous);
                }
                ends_open = true;
            }
            _ => kept.push(segment),
        }
    }
    let mut out = String::with_capacity(path.len());
    for segment in &kept {
        out.push('/');
        out.push_str(segment);
    }
    if ends_open || kept.is_empty() {
        out.push('/');
    }
    Ok(out)
}

/// The canonical host of an authority: lower case, without port and final dot.
pub fn host(authority: &str) -> Cow<'_, str> {
    let bare = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !host.ends_with(':') => host,
        _ => authority,
    };
    let bare = bare.strip_suffix('.').unwrap_or(bare);
    if bare.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(bare.to_ascii_lowercase())
    } else {
        Cow::Borrowed(bare)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_bypasses_have_one_reading() {
        for (target, expected) in [
            ("/a//admin", "/a/admin"),
            ("//admin/x", "/admin/x"),
            ("/%61dmin", "/admin"),
            ("/%2561dmin", "/%2561dmin"),
            ("/a/./b/../c", "/a/c"),
            ("/a/..", "/"),
            ("/x%c3%a9?q=/../", "/x%C3%A9"),
            ("/a/.hidden", "/a/.hidden"),
            ("*", "*"),
        ] {
            assert_eq!(path(target).as_deref(), Ok(expected), "{target}");
        }
    }

    #[test]
    fn ambiguous_targets_are_refused() {
        for (target, why) in [
            ("/a%2Fadmin", TargetError::Ambiguous),
            ("/a%5cadmin", TargetError::Ambiguous),
            ("/a\\admin", TargetError::Ambiguous),
            ("/user/..;x=1/admin", TargetError::Ambiguous),
            ("/../admin", TargetError::Ambiguous),
            ("/admin#x", TargetError::Illegal),
            ("/a%00", TargetError::Illegal),
            ("/a%zz", TargetError::BrokenEscape),
            ("/a%+1", TargetError::BrokenEscape),
            ("/a//../b", TargetError::Ambiguous),
            ("/a%4", TargetError::BrokenEscape),
            ("pkg.Service/Method", TargetError::NotAbsolute),
        ] {
            assert_eq!(path(target), Err(why), "{target}");
        }
    }

    #[test]
    fn hosts_lose_case_port_and_dot() {
        assert_eq!(host("Admin.Shop.:80"), "admin.shop");
        assert_eq!(host("admin"), "admin");
        assert_eq!(host("[::1]:80"), "[::1]");
    }

    proptest! {
        #[test]
        fn canonical_paths_are_idempotent(target in "/[a-z./;%0-9A-F\\\\~-]{0,24}") {
            if let Ok(once) = path(&target) {
                prop_assert_eq!(path(&once).map(Cow::into_owned), Ok(once.into_owned()));
            }
        }
    }
}
