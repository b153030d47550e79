//! URLs as kubelet reads and writes them: the rules of Go's `net/url`.
//!
//! In: the path of a probe, or the `Location` of a redirect. Out: the request target, and the host and port
//! to connect to. Never resolves a name.
//!
//! The `url` crate follows WHATWG, where a backslash is a slash, tabs vanish and hosts are rewritten. Go keeps
//! what was written, and kubelet compares hosts as text.

use std::fmt;
use std::net::SocketAddr;

/// An absolute URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Url {
    scheme: String,
    /// Host and port as written: `10.0.0.1:8080`, `[fd00::1]:8080`, `shop`; may be empty.
    authority: String,
    /// Percent-encoded; may be empty.
    path: String,
    /// What follows the question mark, as written.
    query: Option<String>,
}

/// Why Go would not take a URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// A byte below 0x20, or DEL.
    #[error("the URL contains a control character")]
    ControlCharacter,
    /// A `%` without two hexadecimal digits.
    #[error("the URL contains an invalid percent-encoding")]
    InvalidEscape,
    /// `:path`.
    #[error("the URL has a colon but no scheme")]
    MissingScheme,
    /// `10:path`: neither a scheme nor a relative path.
    #[error("the first path segment contains a colon")]
    ColonInFirstSegment,
    /// The part between `//` and the path.
    #[error("invalid host {0:?}")]
    InvalidHost(String),
    /// Not a port number.
    #[error("invalid port {0:?}")]
    InvalidPort(String),
    /// Neither `http` nor `https`.
    #[error("unsupported scheme {0:?}")]
    UnsupportedScheme(String),
    /// `scheme:something`.
    #[error("the URL has no host")]
    MissingHost,
}

impl Url {
    /// The URL that kubelet requests for a probe with this path (`formatURL` in pkg/probe/http).
    ///
    /// # Errors
    /// [`UrlError::MissingHost`]: kubelet cannot request such a path either.
    pub(super) fn of_probe(scheme: &str, address: SocketAddr, path: &str) -> Result<Self, UrlError> {
        // A path that is not a URL reference is taken as plain text, question marks included.
        let reference = Reference::parse(path).unwrap_or_else(|_| Reference::plain(path));
        if reference.opaque {
            return Err(UrlError::MissingHost);
        }
        // A scheme or host in the path is overwritten.
        let slash = if reference.path.is_empty() || reference.path.starts_with('/') { "" } else { "/" };
        Ok(Self {
            scheme: scheme.to_owned(),
            authority: address.to_string(),
            path: format!("{slash}{}", reference.path),
            query: reference.query,
        })
    }

    /// Where a redirect from here leads (`ResolveReference`, RFC 3986 section 5.2).
    ///
    /// # Errors
    /// [`UrlError`] when the location is malformed.
    pub(super) fn join(&self, location: &str) -> Result<Self, UrlError> {
        let reference = Reference::parse(location)?;
        if !reference.scheme.is_empty() || reference.authority.is_some() {
            let scheme =
                if reference.scheme.is_empty() { self.scheme.clone() } else { reference.scheme.clone() };
            return Ok(Self {
                scheme,
                authority: reference.authority.unwrap_or_default(),
                path: without_dots(&reference.path),
                query: reference.query,
            });
        }
        let query = match (reference.path.is_empty(), reference.query) {
            (true, None) => self.query.clone().filter(|query| !query.is_empty()),
            (_, query) => query,
        };
        let path = if reference.path.is_empty() {
            self.path.clone()
        } else if reference.path.starts_with('/') {
            reference.path
        } else {
            let folder = self.path.rfind('/').and_then(|slash| self.path.get(..=slash)).unwrap_or("");
            format!("{folder}{}", reference.path)
        };
        Ok(Self {
            scheme: self.scheme.clone(),
            authority: self.authority.clone(),
            path: without_dots(&path),
            query,
        })
    }

    /// Host and port, as in the Host header.
    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    /// The host, without the brackets of an IPv6 address.
    pub(super) fn hostname(&self) -> &str {
        let (host, _) = split_port(&self.authority);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// Whether the connection uses TLS.
    pub(super) fn is_https(&self) -> bool {
        self.scheme == "https"
    }

    /// The port to connect to.
    ///
    /// # Errors
    /// [`UrlError::UnsupportedScheme`] or [`UrlError::InvalidPort`].
    pub(super) fn port(&self) -> Result<u16, UrlError> {
        let default = match self.scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return Err(UrlError::UnsupportedScheme(self.scheme.clone())),
        };
        match split_port(&self.authority).1 {
            "" => Ok(default),
            port => port.parse().map_err(|_| UrlError::InvalidPort(port.to_owned())),
        }
    }

    /// The target of the request line.
    pub(super) fn target(&self) -> String {
        let path = if self.path.is_empty() { "/" } else { &self.path };
        let Some(query) = &self.query else { return path.to_owned() };
        let mut target = format!("{path}?");
        for c in query.chars() {
            match c {
                // Go sends these as they are, `http::Uri` refuses them. Encoded they mean the same, except for
                // a space, with which kubelet's request line is malformed.
                ' ' | '"' | '<' | '>' => target.push_str(&format!("%{:02X}", u32::from(c))),
                c => target.push(c),
            }
        }
        target
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.path)?;
        self.query.as_ref().map_or(Ok(()), |query| write!(f, "?{query}"))
    }
}

/// A URL or a part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reference {
    /// Lower case; empty when there is none.
    scheme: String,
    /// Something follows the scheme that is not a path: `mailto:x`.
    opaque: bool,
    /// `None`: neither host nor user. User and password are checked and left out.
    authority: Option<String>,
    /// Percent-encoded.
    path: String,
    query: Option<String>,
}

impl Reference {
    /// `url.Parse`.
    fn parse(text: &str) -> Result<Self, UrlError> {
        let (text, fragment) = text.split_once('#').unwrap_or((text, ""));
        if text.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(UrlError::ControlCharacter);
        }
        unescape(fragment)?;
        if text == "*" {
            return Ok(Self { path: "*".to_owned(), ..Self::default() });
        }
        let (scheme, rest) = split_scheme(text)?;
        let scheme = scheme.to_ascii_lowercase();
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, Some(query.to_owned())),
            None => (rest, None),
        };
        if !rest.starts_with('/') {
            if !scheme.is_empty() {
                return Ok(Self { scheme, opaque: !rest.is_empty(), query, ..Self::default() });
            }
            if rest.split('/').next().is_some_and(|segment| segment.contains(':')) {
                return Err(UrlError::ColonInFirstSegment);
            }
        }
        let (authority, path) = match rest.strip_prefix("//") {
            Some(after) if !scheme.is_empty() || !after.starts_with('/') => {
                let (authority, path) = after.split_at(after.find('/').unwrap_or(after.len()));
                (parse_authority(authority)?, path)
            }
            _ => (None, rest),
        };
        Ok(Self { scheme, opaque: false, authority, path: encoded(path)?, query })
    }

    /// All of it is a path.
    fn plain(path: &str) -> Self {
        Self { path: escape(path.as_bytes()), ..Self::default() }
    }
}

fn split_scheme(text: &str) -> Result<(&str, &str), UrlError> {
    let in_scheme = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    match text.split_once(':') {
        Some(("", _)) => Err(UrlError::MissingScheme),
        Some((scheme, rest))
            if scheme.chars().all(in_scheme) && scheme.starts_with(|c: char| c.is_ascii_alphabetic()) =>
        {
            Ok((scheme, rest))
        }
        _ => Ok(("", text)),
    }
}

fn parse_authority(text: &str) -> Result<Option<String>, UrlError> {
    let (user, host) = match text.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, text),
    };
    let invalid = || UrlError::InvalidHost(text.to_owned());
    if let Some(user) = user {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c);
        if !user.chars().all(allowed) {
            return Err(invalid());
        }
        unescape(user)?;
    }
    let port = match host.rfind('[') {
        Some(0) => host.rsplit_once(']').map(|(_, port)| port).ok_or_else(invalid)?,
        Some(_) => return Err(invalid()),
        None => host.rfind(':').and_then(|colon| host.get(colon..)).unwrap_or(""),
    };
    let number = if port.is_empty() { Some("") } else { port.strip_prefix(':') };
    if !number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(UrlError::InvalidPort(port.to_owned()));
    }
    let allowed =
        |c: char| !c.is_ascii() || c.is_ascii_alphanumeric() || "-_.~!$&'()*+,;=:[]<>\"%".contains(c);
    if !host.chars().all(allowed) {
        return Err(invalid());
    }
    // Only what cannot be written plainly may be escaped, so that comparing the text is enough.
    if unescape(host)?.is_ascii() && host.contains('%') && !host.contains("%25") {
        return Err(invalid());
    }
    Ok((user.is_some() || !host.is_empty()).then(|| host.to_owned()))
}

fn split_port(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
        _ => (authority, ""),
    }
}

/// A path as Go sends it (`EscapedPath`): as written if that is a valid encoding, else encoded afresh.
fn encoded(path: &str) -> Result<String, UrlError> {
    let plain = unescape(path)?;
    let valid = |byte: u8| is_plain(byte) || b"!'()*[]%".contains(&byte);
    Ok(if path.bytes().all(valid) { path.to_owned() } else { escape(&plain) })
}

/// What Go leaves as it is when it encodes a path.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~$&+,/:;=@".contains(&byte)
}

fn escape(path: &[u8]) -> String {
    let mut text = String::with_capacity(path.len());
    for &byte in path {
        if is_plain(byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

fn unescape(text: &str) -> Result<Vec<u8>, UrlError> {
    let mut plain = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            plain.push(byte);
            continue;
        }
        let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else { return Err(UrlError::InvalidEscape) };
        plain.push(u8::try_from(high * 16 + low).map_err(|_| UrlError::InvalidEscape)?);
    }
    Ok(plain)
}

/// Takes `.` and `..` out of a path (`resolvePath`).
fn without_dots(path: &str) -> String {
    if path.is_empty() {
        return String::new();
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut last = "";
    for segment in path.strip_prefix('/').unwrap_or(path).split('/') {
        last = segment;
        match segment {
            "." => {}
            ".." => drop(kept.pop()),
            segment => kept.push(segment),
        }
    }
    // What ends in a dot segment is a folder.
    if matches!(last, "." | "..") {
        kept.push("");
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(path: &str) -> Result<Url, UrlError> {
        Url::of_probe("http", "10.0.0.1:8080".parse().unwrap(), path)
    }

    /// What Go's `ResolveReference` gives for the same input.
    #[test]
    fn redirects_resolve_as_in_go() {
        for (location, wanted) in [
            ("/b", "http://10.0.0.1:8080/b"),
            ("b", "http://10.0.0.1:8080/a/b"),
            ("../b/./c/..", "http://10.0.0.1:8080/b/"),
            ("/../..", "http://10.0.0.1:8080/"),
            ("?y", "http://10.0.0.1:8080/a/x?y"),
            ("#part", "http://10.0.0.1:8080/a/x?q"),
            ("//10.0.0.2/z", "http://10.0.0.2/z"),
            ("///z", "http://10.0.0.1:8080///z"),
            ("HTTPS://10.0.0.1/z?", "https://10.0.0.1/z?"),
            ("http:///z", "http:///z"),
            ("https://user:secret@10.0.0.1:1/", "https://10.0.0.1:1/"),
            ("/a b", "http://10.0.0.1:8080/a%20b"),
        ] {
            assert_eq!(url("/a/x?q").unwrap().join(location).unwrap().to_string(), wanted, "{location}");
        }
    }

    #[test]
    fn what_go_refuses_is_refused() {
        let base = url("/").unwrap();
        for (location, error) in [
            ("/\t", UrlError::ControlCharacter),
            ("/%4", UrlError::InvalidEscape),
            ("/#%4", UrlError::InvalidEscape),
            (":80/", UrlError::MissingScheme),
            ("10:80/", UrlError::ColonInFirstSegment),
            ("http://[::1/", UrlError::InvalidHost("[::1".into())),
            ("http://a b/", UrlError::InvalidHost("a b".into())),
            ("http://%31/", UrlError::InvalidHost("%31".into())),
            ("http://a:b/", UrlError::InvalidPort(":b".into())),
        ] {
            assert_eq!(base.join(location), Err(error), "{location}");
        }
        assert_eq!(url("mailto:x"), Err(UrlError::MissingHost));
    }

    #[test]
    fn hosts_and_ports_are_read_from_what_was_written() {
        let base = url("/").unwrap();
        for (location, host, port) in [
            ("//10.0.0.1/", "10.0.0.1", Ok(80)),
            ("https://10.0.0.1/", "10.0.0.1", Ok(443)),
            ("//[fd00::1]:81/", "fd00::1", Ok(81)),
            ("//[fd00::1]/", "fd00::1", Ok(80)),
            ("//Shop:/", "Shop", Ok(80)),
            ("//shop:99999/", "shop", Err(UrlError::InvalidPort("99999".into()))),
            ("ftp://shop/", "shop", Err(UrlError::UnsupportedScheme("ftp".into()))),
            ("mailto:x", "", Err(UrlError::UnsupportedScheme("mailto".into()))),
        ] {
            let url = base.join(location).unwrap();
            assert_eq!((url.hostname(), url.port()), (host, port), "{location}");
        }
    }
}
