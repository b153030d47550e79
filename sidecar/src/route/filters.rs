//! What rules do with the heads of requests and answers. Everything is done in place, and what a rule does not name
//! stays as it was sent, to the letter.

use bytes::{Bytes, BytesMut};
use tulle_mesh::proto;
use tulle_mesh::route::{Requested, location, rewritten_path};

use crate::config::{Filter, HeaderEdits, Rewrite};
use crate::http1::{Framing, Head, Start};

/// What is done with the head of an answer before it goes to the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseEdits {
    edits: Vec<HeaderEdits>,
    /// Of a cross-origin request.
    cors: Option<HeaderEdits>,
}

impl ResponseEdits {
    /// The changes that these filters ask for, in their order; `None`: none.
    pub(super) fn of<'a>(filters: impl Iterator<Item = &'a Filter>) -> Option<Self> {
        let edits = filters.filter_map(|filter| match filter {
            Filter::ResponseHeaders(edits) => Some(edits.clone()),
            _ => None,
        });
        let edits: Vec<HeaderEdits> = edits.collect();
        (!edits.is_empty()).then_some(Self { edits, cors: None })
    }

    /// The same with those of a session, and of a cross-origin request.
    pub(super) fn with(mut self, session: Option<HeaderEdits>, cors: Option<HeaderEdits>) -> Self {
        self.edits.extend(session);
        Self { cors, ..self }
    }

    /// Changes the head of a server's final answer.
    pub fn apply(&self, head: &mut Head) {
        for edits in self.edits.iter().chain(&self.cors) {
            edit(&mut head.headers, edits);
        }
    }

    /// Changes the head of an answer of our own that says why there is none of a server. What a route says of its
    /// servers' answers (how long they may be kept, for example) does not hold for it. But a browser that is not told that
    /// the origin is allowed hides even the status from its script.
    pub fn apply_to_failure(&self, head: &mut Head) {
        if let Some(cors) = &self.cors {
            edit(&mut head.headers, cors);
        }
    }
}

/// Changes the header lines of a request. Of one with an absolute target a server would refuse a Host that differs from
/// it: where Host is set, that is the host.
pub(super) fn edit_request(head: &mut Head, edits: &HeaderEdits) {
    edit(&mut head.headers, edits);
    if edits.set.iter().any(|(name, _)| name.eq_ignore_ascii_case(b"host")) {
        let path = head.path();
        let is_absolute = !path.is_empty() && path.len() < head.request_line().1.len();
        let path = Bytes::copy_from_slice(path.as_bytes());
        if let (true, Start::Request { target, .. }) = (is_absolute, &mut head.start) {
            *target = path;
        }
    }
}

/// What stands between two values of one header that are joined (RFC 9110 §5.3). Cookies are not a list (RFC 6265 §4.2).
pub(super) fn separator(name: &[u8]) -> &'static [u8] {
    if name.eq_ignore_ascii_case(b"cookie") { b"; " } else { b"," }
}

/// Changes header lines: sets, then adds, then removes.
pub(super) fn edit(lines: &mut Vec<(Bytes, Bytes)>, edits: &HeaderEdits) {
    for (name, value) in &edits.set {
        set(lines, name, value);
    }
    for (name, value) in &edits.add {
        add(lines, name, value);
    }
    for name in &edits.remove {
        lines.retain(|(present, _)| !present.eq_ignore_ascii_case(name));
    }
}

/// One line with this value instead of all of this name, where the first of them was.
fn set(lines: &mut Vec<(Bytes, Bytes)>, name: &Bytes, value: &Bytes) {
    let mut done = false;
    lines.retain_mut(|(present, old)| {
        if !present.eq_ignore_ascii_case(name) {
            return true;
        }
        if !done {
            *old = value.clone();
        }
        !std::mem::replace(&mut done, true)
    });
    if !done {
        lines.push((name.clone(), value.clone()));
    }
}

/// The value behind the last one of this name, with a [`separator`], or in a line of its own where there is none.
/// Values of Set-Cookie cannot be joined (RFC 9110 §5.3).
fn add(lines: &mut Vec<(Bytes, Bytes)>, name: &Bytes, value: &Bytes) {
    let joins = !name.eq_ignore_ascii_case(b"set-cookie");
    let last = lines.iter_mut().rev().find(|(present, _)| joins && present.eq_ignore_ascii_case(name));
    match last {
        Some((_, old)) if !old.is_empty() => {
            let mut joined = BytesMut::with_capacity(old.len() + 2 + value.len());
            joined.extend_from_slice(old);
            joined.extend_from_slice(separator(name));
            joined.extend_from_slice(value);
            *old = joined.freeze();
        }
        Some((_, old)) => *old = value.clone(),
        None => lines.push((name.clone(), value.clone())),
    }
}

/// Gives a request another host and path. `prefix`: what of its path the rule has matched.
pub(super) fn rewrite(head: &mut Head, rewrite: &Rewrite, prefix: Option<&str>) {
    // Those of a CONNECT name where a tunnel leads, not what is asked for there.
    if head.is_connect() {
        return;
    }
    let sent = head.path();
    let (path, query) = match sent.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (sent, None),
    };
    let is_absolute = sent.len() < head.request_line().1.len();
    let changed = match &rewrite.path {
        // `*` is the server itself.
        Some(modifier) if path.starts_with('/') => Some(rewritten_path(path, modifier, prefix)),
        // An absolute target has a host too, and a server would refuse one that differs from Host.
        _ => (is_absolute && rewrite.host.is_some()).then(|| path.to_owned()),
    };
    let changed = changed.map(|mut target| {
        if let Some(query) = query {
            target.push('?');
            target.push_str(query);
        }
        target
    });
    if let (Some(changed), Start::Request { target, .. }) = (changed, &mut head.start) {
        *target = Bytes::from(changed);
    }
    if let Some(host) = &rewrite.host {
        set(&mut head.headers, &Bytes::from_static(b"host"), host);
    }
}

/// The answer that sends the client of a request elsewhere. `port`: the one that it dialled.
pub(super) fn redirect(to: &proto::Redirect, request: &Head, port: u16, prefix: Option<&str>) -> Head {
    let host = request.header("host").and_then(|host| std::str::from_utf8(host).ok());
    // What arrives here is not encrypted.
    let requested = Requested { scheme: "http", host, port, target: request.path() };
    let status = u16::try_from(to.status).unwrap_or(302);
    let mut head = empty(status, reason(status));
    head.push("location", location(to, &requested, prefix));
    head
}

/// The head of an answer of our own without a body.
pub(super) fn empty(status: u16, reason: &'static str) -> Head {
    let mut head = Head::answer(status, reason, 0);
    head.headers.clear();
    if status == 204 {
        head.framing = Framing::None;
    }
    head
}

fn reason(status: u16) -> &'static str {
    match status {
        301 => "Moved Permanently",
        303 => "See Other",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        _ => "Found",
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proto::path_modifier::Kind;

    use super::*;

    pub(in crate::route) fn request(text: &str) -> Head {
        crate::http1::head::parse_request(&mut text.as_bytes().into()).unwrap().unwrap()
    }

    fn lines(text: &[(&'static str, &'static str)]) -> Vec<(Bytes, Bytes)> {
        let line = |(name, value): &(&'static str, &'static str)| {
            (Bytes::from_static(name.as_bytes()), Bytes::from_static(value.as_bytes()))
        };
        text.iter().map(line).collect()
    }

    fn written(head: &Head) -> String {
        let mut out = BytesMut::new();
        head.write(&mut out, false);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn headers_are_set_added_and_removed_whatever_their_case() {
        let mut all =
            lines(&[("X-Set", "a"), ("x-add", "a"), ("x-set", "b"), ("X-Gone", "a"), ("x-gone", "b")]);
        let edits = HeaderEdits {
            set: lines(&[("x-sET", "new"), ("X-Other", "o")]),
            add: lines(&[("X-Add", "b"), ("X-First", "f")]),
            remove: vec![Bytes::from_static(b"x-GONE")],
        };
        edit(&mut all, &edits);
        let expected = lines(&[("X-Set", "new"), ("x-add", "a,b"), ("X-Other", "o"), ("X-First", "f")]);
        assert_eq!(all, expected);
    }

    #[test]
    fn cookies_that_are_set_are_not_joined() {
        let mut all = lines(&[("set-cookie", "a=1; expires=Thu, 01 Jan 1970 00:00:00 GMT")]);
        edit(&mut all, &HeaderEdits { add: lines(&[("Set-Cookie", "b=2")]), ..HeaderEdits::default() });
        assert_eq!(all.len(), 2);
        let mut sent = lines(&[("cookie", "a=1")]);
        edit(&mut sent, &HeaderEdits { add: lines(&[("Cookie", "b=2")]), ..HeaderEdits::default() });
        assert_eq!(sent, lines(&[("cookie", "a=1; b=2")]), "those of a request are, but not as a list");
    }

    #[test]
    fn a_host_that_is_set_is_that_of_an_absolute_target_too() {
        let edits = HeaderEdits { set: lines(&[("Host", "other")]), ..HeaderEdits::default() };
        for (target, expected) in [
            ("http://web/a?b", "/a?b"),
            ("http://web", "/"),
            ("/a?b", "/a?b"),
            ("/http://web/a", "/http://web/a"),
        ] {
            let mut head = request(&format!("GET {target} HTTP/1.1\r\nhost: web\r\n\r\n"));
            edit_request(&mut head, &edits);
            assert_eq!(written(&head), format!("GET {expected} HTTP/1.1\r\nhost: other\r\n\r\n"));
        }
        let mut kept = request("GET http://web/a HTTP/1.1\r\nhost: web\r\n\r\n");
        edit_request(&mut kept, &HeaderEdits { set: lines(&[("x", "y")]), ..HeaderEdits::default() });
        assert_eq!(kept.request_line().1, "http://web/a");
    }

    #[test]
    fn a_rewrite_keeps_the_query_and_takes_the_host_out_of_an_absolute_target() {
        let prefix = |to: &str| Rewrite {
            path: Some(proto::PathModifier { kind: Some(Kind::Prefix(to.into())) }),
            ..Rewrite::default()
        };
        let mut head = request("GET /v1/cart?x=1&y=%20 HTTP/1.1\r\nhost: web\r\n\r\n");
        rewrite(&mut head, &prefix("/v2"), Some("/v1"));
        assert_eq!(head.request_line().1, "/v2/cart?x=1&y=%20");
        let host = Rewrite { host: Some(Bytes::from_static(b"other")), path: None };
        rewrite(&mut head, &host, None);
        assert_eq!(written(&head), "GET /v2/cart?x=1&y=%20 HTTP/1.1\r\nhost: other\r\n\r\n");

        let mut absolute = request("GET http://web/v1?q HTTP/1.1\r\nHost: web\r\n\r\n");
        rewrite(&mut absolute, &host, None);
        assert_eq!(written(&absolute), "GET /v1?q HTTP/1.1\r\nHost: other\r\n\r\n");
        let mut asterisk = request("OPTIONS * HTTP/1.1\r\nHost: web\r\n\r\n");
        rewrite(&mut asterisk, &prefix("/v2"), Some("/"));
        assert_eq!(asterisk.request_line().1, "*");
        let mut tunnel = request("CONNECT web:443 HTTP/1.1\r\nHost: web:443\r\n\r\n");
        rewrite(&mut tunnel, &host, None);
        assert_eq!(tunnel.request_line().1, "web:443");
        assert_eq!(tunnel.header("host").unwrap(), "web:443");
    }

    #[test]
    fn a_redirect_is_an_answer_without_a_body() {
        let to = proto::Redirect { hostname: "shop.example".into(), status: 301, ..Default::default() };
        let head = redirect(&to, &request("GET /a?b HTTP/1.1\r\nhost: web\r\n\r\n"), 8080, None);
        assert_eq!(
            written(&head),
            "HTTP/1.1 301 Moved Permanently\r\nlocation: http://shop.example:8080/a?b\r\nContent-Length: 0\r\n\r\n"
        );
    }
}
