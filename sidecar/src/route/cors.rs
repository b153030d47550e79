//! Cross-origin requests of browsers (the fetch standard's CORS protocol, as GEP-1767 has it): which answers a script of
//! another origin may see. A preflight is answered here; the server never sees it.

use bytes::Bytes;

use super::filters::empty;
use crate::config::{Cors, HeaderEdits};
use crate::http1::{Head, Start};

const CREDENTIALS: &[u8] = b"access-control-allow-credentials";

/// The method that a preflight asks about; `None`: the request is not a preflight.
pub(super) fn asked_method(head: &Head) -> Option<&str> {
    // Asked of every request at a port with rules.
    if !matches!(&head.start, Start::Request { method, .. } if &method[..] == b"OPTIONS") {
        return None;
    }
    head.header("origin")?;
    std::str::from_utf8(head.header("access-control-request-method")?).ok()
}

/// The answer to a preflight. Without any of these headers it says no.
pub(super) fn preflight(cors: &Cors, request: &Head) -> Head {
    let mut head = empty(204, "No Content");
    if let Some(mut lines) = common(cors, request) {
        let credentials = cors.allow_credentials;
        let method = request.header("access-control-request-method");
        let names = request.header("access-control-request-headers");
        lines.extend(listed("access-control-allow-methods", &cors.allow_methods, method, credentials));
        lines.extend(listed("access-control-allow-headers", &cors.allow_headers, names, credentials));
        lines.push(line("access-control-max-age", cors.max_age_seconds.to_string().into()));
        head.headers = lines;
    }
    head
}

/// What the answer to a request gets. Where it depends on the origin, that is said with every answer: a browser that
/// has kept one without it (of an image, for example) would use it for a script too, and refuse it then. `None`: nothing.
pub(super) fn decoration(cors: &Cors, request: &Head) -> Option<HeaderEdits> {
    let Some(mut set) = common(cors, request) else {
        let add = || HeaderEdits { add: vec![vary()], ..HeaderEdits::default() };
        return depends_on_origin(cors).then(add);
    };
    // What caches keep apart is added to what the server wants them to.
    let add = set.extract_if(.., |(name, _)| &name[..] == b"vary").collect();
    // Nor does the server allow more than the route.
    let remove = match cors.allow_credentials {
        true => Vec::new(),
        false => vec![Bytes::from_static(CREDENTIALS)],
    };
    // To a request with credentials, `*` is a name.
    let named: Vec<String> = match cors.allow_credentials {
        true => cors.expose_headers.iter().filter(|name| *name != "*").cloned().collect(),
        false => cors.expose_headers.clone(),
    };
    set.extend(listed("access-control-expose-headers", &named, None, false));
    Some(HeaderEdits { set, add, remove })
}

/// Whether one origin is answered otherwise than another.
fn depends_on_origin(cors: &Cors) -> bool {
    cors.allow_credentials || !cors.allow_origins.iter().any(|allowed| allowed == "*")
}

/// What both kinds of answers say of an allowed origin.
fn common(cors: &Cors, request: &Head) -> Option<Vec<(Bytes, Bytes)>> {
    let origin = request.header("origin")?;
    let any = cors.allow_origins.iter().any(|allowed| allowed == "*");
    if !any && !cors.allow_origins.iter().any(|allowed| is_allowed(allowed, origin)) {
        return None;
    }
    let mut lines = Vec::with_capacity(6);
    if depends_on_origin(cors) {
        lines.push(line("access-control-allow-origin", origin.clone()));
        lines.push(vary());
    } else {
        lines.push(line("access-control-allow-origin", Bytes::from_static(b"*")));
    }
    if cors.allow_credentials {
        lines.push((Bytes::from_static(CREDENTIALS), Bytes::from_static(b"true")));
    }
    Some(lines)
}

fn vary() -> (Bytes, Bytes) {
    line("vary", Bytes::from_static(b"Origin"))
}

/// Whether an origin is the allowed one, or fits it where that has a `*` for a part of the host.
fn is_allowed(allowed: &str, origin: &[u8]) -> bool {
    let Some((before, behind)) = allowed.split_once('*') else {
        return origin.eq_ignore_ascii_case(allowed.as_bytes());
    };
    let Some(middle) = origin.len().checked_sub(before.len() + behind.len()).filter(|length| *length > 0)
    else {
        return false;
    };
    let (head, rest) = origin.split_at(before.len());
    let (middle, tail) = rest.split_at(middle);
    head.eq_ignore_ascii_case(before.as_bytes())
        && tail.eq_ignore_ascii_case(behind.as_bytes())
        && !middle.contains(&b'/')
}

/// A list as one line; `None`: an empty one. Where credentials are allowed, `*` is a name like others (RFC of fetch,
/// §3.3.4): what was `asked` for is answered instead.
fn listed(
    name: &'static str,
    values: &[String],
    asked: Option<&Bytes>,
    credentials: bool,
) -> Option<(Bytes, Bytes)> {
    if credentials && values.iter().any(|value| value == "*") {
        return asked.map(|asked| line(name, asked.clone()));
    }
    (!values.is_empty()).then(|| line(name, values.join(", ").into()))
}

fn line(name: &'static str, value: Bytes) -> (Bytes, Bytes) {
    (Bytes::from_static(name.as_bytes()), value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::filters::tests::request;

    fn cors(origins: &[&str], allow_credentials: bool) -> Cors {
        let all = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Cors {
            allow_origins: all(origins),
            allow_credentials,
            allow_methods: all(&["*"]),
            allow_headers: all(&["x-a", "x-b"]),
            expose_headers: all(&["x-c"]),
            max_age_seconds: 600,
        }
    }

    fn asks(origin: &str) -> Head {
        request(&format!(
            "OPTIONS /x HTTP/1.1\r\nhost: web\r\norigin: {origin}\r\n\
             access-control-request-method: PUT\r\naccess-control-request-headers: x-z\r\n\r\n"
        ))
    }

    fn value(head: &Head, name: &str) -> String {
        head.header(name).map_or_else(String::new, |value| String::from_utf8(value.to_vec()).unwrap())
    }

    #[test]
    fn a_preflight_is_told_what_is_allowed() {
        let asked = asks("https://a.example");
        assert_eq!(asked_method(&asked), Some("PUT"));
        let answer = preflight(&cors(&["https://a.example"], false), &asked);
        assert_eq!(answer.status(), 204);
        for (name, expected) in [
            ("access-control-allow-origin", "https://a.example"),
            ("access-control-allow-methods", "*"),
            ("access-control-allow-headers", "x-a, x-b"),
            ("access-control-max-age", "600"),
            ("access-control-allow-credentials", ""),
            ("vary", "Origin"),
        ] {
            assert_eq!(value(&answer, name), expected, "{name}");
        }
        let any = preflight(&cors(&["*"], false), &asked);
        assert_eq!(value(&any, "access-control-allow-origin"), "*");
        let refused = preflight(&cors(&["https://b.example"], false), &asked);
        assert_eq!((refused.status(), refused.headers.len()), (204, 0));
    }

    #[test]
    fn with_credentials_nothing_is_a_wildcard() {
        let answer = preflight(&cors(&["*"], true), &asks("https://a.example"));
        assert_eq!(value(&answer, "access-control-allow-origin"), "https://a.example");
        assert_eq!(value(&answer, "access-control-allow-methods"), "PUT");
        assert_eq!(value(&answer, "access-control-allow-credentials"), "true");
        let all = Cors { allow_headers: vec!["*".to_owned()], ..cors(&["*"], true) };
        let answer = preflight(&all, &asks("https://a.example"));
        assert_eq!(value(&answer, "access-control-allow-headers"), "x-z");
    }

    #[test]
    fn a_wildcard_stands_for_a_part_of_the_host() {
        for (allowed, origin, expected) in [
            ("https://*.example", "https://a.example", true),
            ("https://*.example", "https://a.b.EXAMPLE", true),
            ("https://*.example", "https://.example", false),
            ("https://*.example", "http://a.example", false),
            ("https://*.example", "https://example", false),
            ("https://*.example", "https://evil/x.example", false),
            ("https://a.example", "https://a.example:8443", false),
            ("https://a.example", "null", false),
        ] {
            assert_eq!(is_allowed(allowed, origin.as_bytes()), expected, "{allowed} {origin}");
        }
    }

    #[test]
    fn an_answer_to_another_origin_is_decorated_and_one_to_the_own_is_not() {
        let get = |origin: &str| request(&format!("GET / HTTP/1.1\r\nhost: web\r\n{origin}\r\n"));
        let edits =
            decoration(&cors(&["https://a.example"], true), &get("origin: https://a.example\r\n")).unwrap();
        let names: Vec<_> = edits.set.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(
            names,
            [
                &b"access-control-allow-origin"[..],
                b"access-control-allow-credentials",
                b"access-control-expose-headers"
            ]
        );
        assert_eq!(edits.add.len(), 1, "vary");
        assert!(edits.remove.is_empty());
        assert!(decoration(&cors(&["*"], false), &get("")).is_none());
        assert_eq!(asked_method(&get("origin: https://a\r\n")), None);
    }

    #[test]
    fn caches_keep_answers_apart_that_depend_on_the_origin_and_a_server_allows_no_more_than_the_route() {
        let get = |origin: &str| request(&format!("GET / HTTP/1.1\r\nhost: web\r\n{origin}\r\n"));
        let only = HeaderEdits { add: vec![vary()], ..HeaderEdits::default() };
        for cors in [cors(&["https://b"], false), cors(&["https://b"], true)] {
            assert_eq!(decoration(&cors, &get("origin: https://a\r\n")), Some(only.clone()));
            assert_eq!(decoration(&cors, &get("")), Some(only.clone()), "what is kept serves other origins");
        }
        let any = decoration(&cors(&["*"], false), &get("origin: https://a\r\n")).unwrap();
        assert_eq!(any.remove, [CREDENTIALS]);
        assert!(any.add.is_empty(), "{any:?}");
    }
}
