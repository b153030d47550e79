//! Who may use the page that this command serves, and what is passed on of their requests. Pure, but for the key.
//!
//! Cookies are sent to every port of a host, other users of this machine can connect to the port, and a name of anybody
//! can be made to point to 127.0.0.1. So the token stays in this process, and a request must name this address and
//! bring the key that only this command has printed.
//!
//! A form that changes something must also come from a page of this address, as the browser says by `Origin` and
//! `Sec-Fetch-Site`, and bring a token that is in such pages only. A page at another port of this machine is of the same
//! site and so sends the cookie, but it can neither claim the origin nor read the token. A program at another port that
//! gets the cookie so can do both: see SECURITY.md.

use hyper::header::{
    AUTHORIZATION, CONNECTION, COOKIE, HOST, HeaderName, HeaderValue, ORIGIN, TRANSFER_ENCODING, UPGRADE,
};
use hyper::http::request::Parts;
use hyper::{HeaderMap, Method, StatusCode, Uri};
use tulle_mesh::{page, ports};

use super::address::Asked;
use crate::exit::CliError;

/// Headers of a connection, not of a request or an answer.
const HOP_BY_HOP: [&str; 6] =
    ["keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"];

/// Lets requests in.
pub struct Door {
    port: u16,
    key: String,
    /// What a form must bring. Not the key, because pages show it. `None`: nothing can be changed.
    form_token: Option<String>,
}

/// What the sender of a form has seen. The action is meant for that, and for nothing that came after.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Form {
    /// The revision that was rolled out.
    pub revision: String,
    /// Where the rollout was: [`page::seen`].
    pub seen: String,
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It brings the key: this cookie is set, and the page is next.
    Opens(String),
    /// It is passed on.
    Enters,
    /// It is a form that asks for an action. Nothing is done before [`Door::form`] has found the token in it.
    Acts(Asked),
    /// It is not.
    Refused(StatusCode, &'static str),
}

impl Door {
    /// With a key that nobody knows yet. `actions`: forms are let in, too.
    ///
    /// # Errors
    /// The machine has no random numbers.
    pub fn new(port: u16, actions: bool) -> Result<Self, CliError> {
        let form_token = if actions { Some(secret()?) } else { None };
        Ok(Self { port, key: secret()?, form_token })
    }

    /// The address to open in a browser.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}/open?key={}", self.port, self.key)
    }

    /// The name of the cookie. Two of these commands at a time do not take it from each other.
    fn cookie(&self) -> String {
        format!("tulle-key-{}", self.port)
    }

    /// Decides about a request.
    pub fn judge(&self, head: &Parts) -> Entry {
        if !self.is_addressed(&head.headers, &head.uri) {
            return Entry::Refused(StatusCode::MISDIRECTED_REQUEST, "This is not the address of this page.");
        }
        if head.uri.path() == "/open" {
            let key = head.uri.query().and_then(|query| query.strip_prefix("key=")).unwrap_or_default();
            return match head.method == Method::GET && is_same(key, &self.key) {
                true => {
                    Entry::Opens(format!("{}={}; Path=/; HttpOnly; SameSite=Strict", self.cookie(), self.key))
                }
                false => Entry::Refused(
                    StatusCode::FORBIDDEN,
                    "The key is wrong. Open the address that `tulle dashboard` has printed.",
                ),
            };
        }
        // Where browsers say so: a page at another port of this machine is of the same site, and sends the cookie.
        let site = head.headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        if site.is_some_and(|site| site != b"same-origin" && site != b"none") {
            return Entry::Refused(StatusCode::FORBIDDEN, "Another page has sent this request.");
        }
        if !self.has_key(&head.headers) {
            return Entry::Refused(
                StatusCode::FORBIDDEN,
                "This browser has no key. Open the address that `tulle dashboard` has printed.",
            );
        }
        match Asked::at(head.uri.path()) {
            Some(asked) if head.method == Method::POST => self.judge_form(&head.headers, asked),
            _ => Entry::Enters,
        }
    }

    /// Decides about a form of somebody with the key.
    fn judge_form(&self, headers: &HeaderMap, asked: Asked) -> Entry {
        if self.form_token.is_none() {
            return Entry::Refused(
                StatusCode::METHOD_NOT_ALLOWED,
                "This page changes nothing: `tulle dashboard` runs without --allow-actions.",
            );
        }
        match is_of_this_page(headers) {
            true => Entry::Acts(asked),
            false => Entry::Refused(StatusCode::FORBIDDEN, "Another page has sent this form."),
        }
    }

    /// What the sender of a form has seen, or `None` where the form lacks that or the token.
    pub fn form(&self, body: &[u8]) -> Option<Form> {
        let field = |wanted: &str| {
            let found = form_urlencoded::parse(body).find(|(name, _)| name == wanted);
            found.map(|(_, value)| value.into_owned())
        };
        let brought = field(page::TOKEN)?;
        let is_right = is_same(&brought, self.form_token.as_deref()?);
        if is_right {
            Some(Form { revision: field(page::REVISION)?, seen: field(page::SEEN)? })
        } else {
            None
        }
    }

    /// Tells the operator to render forms, and with which token.
    pub fn offer(&self, headers: &mut HeaderMap) {
        let token = self.form_token.as_deref().and_then(|token| HeaderValue::from_str(token).ok());
        let Some(mut token) = token else { return };
        token.set_sensitive(true);
        let may = HeaderValue::from_static(page::CANARY_ACTIONS);
        headers.insert(HeaderName::from_static(page::MAY), may);
        headers.insert(HeaderName::from_static(page::FORM_TOKEN), token);
    }

    fn is_addressed(&self, headers: &HeaderMap, uri: &Uri) -> bool {
        let own = [format!("127.0.0.1:{}", self.port), format!("localhost:{}", self.port)];
        let is_own = |host: &str| own.iter().any(|own| own.eq_ignore_ascii_case(host));
        let mut hosts = headers.get_all(HOST).iter();
        let (first, more) = (hosts.next(), hosts.next());
        let named = first.and_then(|host| host.to_str().ok()).is_some_and(is_own);
        named && more.is_none() && uri.authority().is_none_or(|authority| is_own(authority.as_str()))
    }

    fn has_key(&self, headers: &HeaderMap) -> bool {
        let name = self.cookie();
        let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
        cookies
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.split_once('='))
            .any(|(found, value)| found.trim() == name && is_same(value.trim(), &self.key))
    }
}

/// Whether a form comes from a page of the address that it is sent to. Browsers say so by `Origin`, which no page can
/// write. `Sec-Fetch-Site` must agree where it is there: with `none`, nobody has pressed a button of a page.
fn is_of_this_page(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let mut origins = headers.get_all(ORIGIN).iter();
    let (first, more) = (origins.next(), origins.next());
    let origin = first.and_then(|origin| origin.to_str().ok()?.strip_prefix("http://"));
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    more.is_none()
        && origin.is_some_and(|origin| origin.eq_ignore_ascii_case(host))
        && site.is_none_or(|site| site == b"same-origin")
}

/// A text that nobody can guess.
fn secret() -> Result<String, CliError> {
    let mut random = [0; 32];
    let filled = rustls::crypto::aws_lc_rs::default_provider().secure_random.fill(&mut random);
    filled.map_err(|_| CliError::failed("this machine gives no random numbers"))?;
    Ok(random.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Whether two texts are the same, in a time that does not tell where they differ.
fn is_same(one: &str, other: &str) -> bool {
    let differing =
        one.bytes().zip(other.bytes()).fold(0, |differing, (one, other)| differing | (one ^ other));
    one.len() == other.len() && differing == 0
}

/// Makes a request of the browser one for the operator: without cookies, with the token, and without what only this
/// command may say to the operator.
///
/// # Errors
/// The token is none that a header can hold.
pub fn readdress(head: &mut Parts, token: &str) -> Result<(), CliError> {
    let mut bearer = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|error| CliError::failed(format!("the token fits into no header: {error}")))?;
    bearer.set_sensitive(true);
    let host = HeaderValue::from_str(&format!("127.0.0.1:{}", ports::QUERY))
        .map_err(|error| CliError::failed(format!("invalid address of the operator: {error}")))?;
    // Of an address in absolute form, the operator needs what comes behind the host.
    let target = head.uri.path_and_query().map_or("/", |target| target.as_str());
    head.uri =
        target.parse::<Uri>().map_err(|error| CliError::failed(format!("invalid address: {error}")))?;
    end_to_end(&mut head.headers);
    // Those of other ports are among them.
    head.headers.remove(COOKIE);
    let is_ours = |name: &&HeaderName| name.as_str().starts_with(page::HEADERS);
    let ours: Vec<HeaderName> = head.headers.keys().filter(is_ours).cloned().collect();
    for name in ours {
        head.headers.remove(name);
    }
    head.headers.insert(HOST, host);
    head.headers.insert(AUTHORIZATION, bearer);
    // Each request has a port-forward of its own.
    head.headers.insert(CONNECTION, HeaderValue::from_static("close"));
    Ok(())
}

/// Removes headers that are about a connection.
pub fn end_to_end(headers: &mut HeaderMap) {
    for name in [CONNECTION, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(HeaderName::from_static(name));
    }
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    fn door() -> Door {
        Door { port: 4000, key: "abc".to_owned(), form_token: None }
    }

    fn acting_door() -> Door {
        Door { form_token: Some("f0".to_owned()), ..door() }
    }

    fn head(path: &str, headers: &[(&'static str, &str)]) -> Parts {
        let mut request = Request::get(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn posted(path: &str, headers: &[(&'static str, &str)]) -> Parts {
        let mut head = head(path, headers);
        head.method = Method::POST;
        head
    }

    const PAUSE: &str = "/canary/shop/web/pause";
    const OWN: (&str, &str) = ("host", "127.0.0.1:4000");
    const KEY: (&str, &str) = ("cookie", "other=x; tulle-key-4000=abc");

    fn status(entry: Entry) -> Option<u16> {
        match entry {
            Entry::Refused(status, _) => Some(status.as_u16()),
            _ => None,
        }
    }

    #[test]
    fn the_printed_address_opens_the_page_for_one_browser() {
        let opened = door().judge(&head("/open?key=abc", &[OWN]));
        let cookie = "tulle-key-4000=abc; Path=/; HttpOnly; SameSite=Strict";
        assert_eq!(opened, Entry::Opens(cookie.to_owned()));
        assert_eq!(door().judge(&head("/", &[OWN, KEY])), Entry::Enters);
        assert_eq!(door().judge(&head("/", &[("host", "localhost:4000"), KEY])), Entry::Enters);
        assert_eq!(door().address(), "http://127.0.0.1:4000/open?key=abc");
    }

    #[test]
    fn without_the_key_nothing_is_shown() {
        for (path, cookie) in [
            ("/", "x=y"),
            ("/", "tulle-key-4000=abd"),
            ("/", "tulle-key-4000="),
            ("/", "tulle-key-4001=abc"),
            ("/api/v1/stat", "tulle-session=abc"),
            ("/open?key=abd", "x=y"),
            ("/open?key=", "x=y"),
            ("/open", "x=y"),
        ] {
            let entry = door().judge(&head(path, &[OWN, ("cookie", cookie)]));
            assert_eq!(status(entry), Some(403), "{path} {cookie}");
        }
    }

    #[test]
    fn another_name_for_this_machine_is_refused_even_with_the_key() {
        for host in ["evil.example:4000", "127.0.0.1", "127.0.0.1:4001", "localhost", ""] {
            assert_eq!(status(door().judge(&head("/", &[("host", host), KEY]))), Some(421), "{host}");
            assert_eq!(status(door().judge(&head("/open?key=abc", &[("host", host)]))), Some(421), "{host}");
        }
        assert_eq!(status(door().judge(&head("/", &[KEY]))), Some(421), "no host");
        assert_eq!(status(door().judge(&head("/", &[OWN, ("host", "evil.example"), KEY]))), Some(421));
        let absolute = head("http://evil.example/", &[OWN, KEY]);
        assert_eq!(status(door().judge(&absolute)), Some(421));
    }

    #[test]
    fn a_page_at_another_port_may_not_ask() {
        for (site, expected) in
            [("same-site", Some(403)), ("cross-site", Some(403)), ("same-origin", None), ("none", None)]
        {
            let entry = door().judge(&head("/", &[OWN, KEY, ("sec-fetch-site", site)]));
            assert_eq!(status(entry), expected, "{site}");
        }
    }

    #[test]
    fn the_operator_gets_the_token_and_no_cookie() {
        let mut head = head(
            "http://127.0.0.1:4000/workload/shop/web?window=10m",
            &[
                OWN,
                KEY,
                ("authorization", "Basic x"),
                ("connection", "keep-alive"),
                ("accept", "text/html"),
                ("tulle-may", "canary-actions"),
                ("Tulle-Form-Token", "f0"),
            ],
        );
        readdress(&mut head, "a.b.c").unwrap();
        assert_eq!(head.uri, "/workload/shop/web?window=10m");
        assert_eq!(head.headers.get(AUTHORIZATION).unwrap(), "Bearer a.b.c");
        assert_eq!(head.headers.get(HOST).unwrap(), "127.0.0.1:26162");
        assert_eq!(head.headers.get("accept").unwrap(), "text/html");
        assert_eq!(head.headers.get(CONNECTION).unwrap(), "close");
        assert!(!head.headers.contains_key(COOKIE));
        let claimed = head.headers.keys().find(|name| name.as_str().starts_with("tulle-"));
        assert_eq!(claimed, None, "a browser cannot say what its user may do");
    }

    #[test]
    fn without_the_flag_no_form_is_taken() {
        let own = [OWN, KEY, ("origin", "http://127.0.0.1:4000"), ("sec-fetch-site", "same-origin")];
        for action in ["promote", "pause", "resume", "abort", "retry"] {
            let entry = door().judge(&posted(&format!("/canary/shop/web/{action}"), &own));
            assert_eq!(status(entry), Some(405), "{action}");
        }
        assert_eq!(door().form(b"token=f0&revision=v2&seen=Paused/1"), None);
        let mut headers = HeaderMap::new();
        door().offer(&mut headers);
        assert!(headers.is_empty(), "{headers:?}");
    }

    #[test]
    fn a_form_of_the_page_itself_is_taken() {
        let own = [OWN, KEY, ("origin", "http://127.0.0.1:4000"), ("sec-fetch-site", "same-origin")];
        let Entry::Acts(asked) = acting_door().judge(&posted(PAUSE, &own)) else { panic!("not taken") };
        assert_eq!(
            (asked.namespace.as_str(), asked.name.as_str(), asked.verb.name()),
            ("shop", "web", "pause")
        );
        let old_browser = [("host", "localhost:4000"), KEY, ("origin", "http://localhost:4000")];
        assert!(matches!(acting_door().judge(&posted(PAUSE, &old_browser)), Entry::Acts(_)));
    }

    #[test]
    fn a_form_of_another_origin_or_of_none_is_refused_even_with_the_key() {
        let others: [&[(&'static str, &str)]; 9] = [
            &[],
            &[("origin", "null")],
            &[("origin", "http://127.0.0.1:4001")],
            &[("origin", "http://localhost:4000")],
            &[("origin", "https://127.0.0.1:4000")],
            &[("origin", "http://evil.example")],
            &[("origin", "http://127.0.0.1:4000"), ("origin", "http://evil.example")],
            &[("origin", "http://127.0.0.1:4000"), ("sec-fetch-site", "none")],
            &[("origin", "http://127.0.0.1:4000"), ("sec-fetch-site", "same-site")],
        ];
        for more in others {
            let entry = acting_door().judge(&posted(PAUSE, &[&[OWN, KEY], more].concat()));
            assert_eq!(status(entry), Some(403), "{more:?}");
        }
        let without_key = [OWN, ("origin", "http://127.0.0.1:4000"), ("sec-fetch-site", "same-origin")];
        assert_eq!(status(acting_door().judge(&posted(PAUSE, &without_key))), Some(403));
    }

    #[test]
    fn what_is_not_a_form_of_an_action_is_passed_on_with_the_flag_too() {
        let own = [OWN, KEY, ("origin", "http://127.0.0.1:4000")];
        assert_eq!(acting_door().judge(&head(PAUSE, &own)), Entry::Enters, "the page that asks");
        for path in ["/canary/shop/web", "/canary/shop/web/undo", "/canary/shop/web/pause/x", "/"] {
            assert_eq!(acting_door().judge(&posted(path, &own)), Entry::Enters, "{path}");
        }
    }

    #[test]
    fn a_form_needs_the_token_and_says_which_revision_was_seen_and_where() {
        let door = acting_door();
        let form = |revision: &str, seen: &str| Form { revision: revision.to_owned(), seen: seen.to_owned() };
        assert_eq!(door.form(b"token=f0&revision=v2&seen=Paused%2F1"), Some(form("v2", "Paused/1")));
        assert_eq!(door.form(b"seen=Failed/0&revision=&token=f0"), Some(form("", "Failed/0")));
        for body in [
            "",
            "revision=v2&seen=Paused/1",
            "token=&revision=v2&seen=Paused/1",
            "token=f1&revision=v2&seen=Paused/1",
            "token=abc&revision=v2&seen=Paused/1",
            "token=f0",
            "token=f0&revision=v2",
            "token=f0&seen=Paused/1",
        ] {
            assert_eq!(door.form(body.as_bytes()), None, "{body}");
        }
    }

    #[test]
    fn the_operator_gets_the_token_of_forms_and_the_key_never() {
        let door = Door::new(1, true).unwrap();
        let mut headers = HeaderMap::new();
        door.offer(&mut headers);
        assert_eq!(headers.get(page::MAY).unwrap(), page::CANARY_ACTIONS);
        let token = headers.get(page::FORM_TOKEN).unwrap().to_str().unwrap().to_owned();
        assert_eq!(token.len(), 64);
        assert_ne!(token, door.key);
        assert!(door.form(format!("token={token}&revision=v2&seen=Paused/1").as_bytes()).is_some());
    }

    #[test]
    fn each_run_has_a_key_of_its_own() {
        let (one, other) = (Door::new(1, false).unwrap(), Door::new(1, false).unwrap());
        assert_eq!(one.key.len(), 64);
        assert_ne!(one.key, other.key);
    }
}
