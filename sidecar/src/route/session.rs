//! Clients that stay with an endpoint (session persistence, GEP-1619): a cookie or a header names it.
//!
//! The value is a [`Token`]: what names the endpoint's pod, and when the session began and was last used. It holds no
//! address, and means something to every sidecar that has the same rule: a browser's requests may come through several
//! pods of one application. Whoever changes it only gets another endpoint of the same Service, or none, as for a pod
//! that has gone: then the session begins anew. The endpoint is chosen, and named, before the first attempt: where that
//! fails and another one serves the request, the session is still with the first, until that has gone.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::backend::{Ask, Backend};
use crate::config::{Carrier, Endpoint, Endpoints, EndpointsEntry, HeaderEdits, SessionPersistence};
use crate::http1::Head;

/// How far the clocks of two sidecars may be apart, in seconds: a client's requests may come through several.
const SKEW: u64 = 60;

/// How the sessions of one rule are kept.
#[derive(Debug)]
pub(super) struct Session {
    kept: SessionPersistence,
    name: Bytes,
    /// Of the rule: the same pod has another name in another rule.
    key: u64,
}

/// A session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    /// What names the endpoint, see [`name_of`].
    endpoint: u64,
    /// When it began, in seconds of Unix time.
    began: u64,
    /// When it was last used.
    used: u64,
}

/// The endpoints of a Service by their names in sessions.
#[derive(Debug)]
pub(super) struct Members {
    entry: Arc<EndpointsEntry>,
    known: RefCell<Known>,
}

#[derive(Debug, Default)]
struct Known {
    of: Option<Arc<Endpoints>>,
    /// By key and name.
    by_name: HashMap<(u64, u64), SocketAddr>,
}

impl Session {
    /// The sessions of this rule of a route.
    pub(super) fn new(kept: &SessionPersistence, route: &str, rule: usize) -> Self {
        let key = hash(hash(SEED, route.as_bytes()), &rule.to_be_bytes());
        let name = match &*kept.name {
            "" => format!("tulle-session-{:08x}", key >> 32).into(),
            name => Bytes::copy_from_slice(name.as_bytes()),
        };
        Self { kept: kept.clone(), name, key }
    }

    /// The session that a request is of; `None`: of none, or of one that has ended.
    pub(super) fn of(&self, head: &Head, now: u64) -> Option<Token> {
        let name = std::str::from_utf8(&self.name).ok()?;
        let text = match self.kept.carrier {
            Carrier::Header => head.header(name).map(|value| &value[..]),
            Carrier::Cookie => head.cookies(name).next(),
        };
        let token: Token = std::str::from_utf8(text?).ok()?.parse().ok()?;
        let within = |since: u64, limit: Option<Duration>| {
            limit.is_none_or(|limit| now.saturating_sub(since) <= limit.as_secs())
        };
        // One from the future would last for longer than allowed.
        let is_valid = token.began.max(token.used) <= now.saturating_add(SKEW);
        (is_valid && within(token.began, self.kept.absolute) && within(token.used, self.kept.idle))
            .then_some(token)
    }

    /// Where the endpoint of a session is; `None`: it has gone.
    pub(super) fn find(&self, token: Token, members: &Members) -> Option<SocketAddr> {
        members.find(self.key, token.endpoint)
    }

    /// Makes a request go to the endpoint of its session, if it has one that is `stay`, or else to one that is chosen
    /// now, with which its session begins. Returns what the answer says of it.
    pub(super) fn keep(
        &self,
        found: Option<(Token, SocketAddr)>,
        backend: &Backend,
        ask: &mut Ask,
        now: u64,
    ) -> Option<HeaderEdits> {
        if let Some((token, stay)) = found {
            ask.stay = Some(stay);
            let renewed = self.kept.idle.is_some() && token.used != now;
            return renewed.then(|| self.answer(Token { used: now, ..token }, now));
        }
        // Only a look: the attempt has a choice of its own.
        ask.no_probe = true;
        let chosen = backend.pick(ask);
        ask.no_probe = false;
        let chosen = chosen?;
        ask.stay = Some(chosen.endpoint.address);
        Some(self.answer(Token { endpoint: name_of(self.key, &chosen.endpoint), began: now, used: now }, now))
    }

    fn answer(&self, token: Token, now: u64) -> HeaderEdits {
        match self.kept.carrier {
            Carrier::Header => {
                let set = vec![(self.name.clone(), Bytes::from(token.to_string()))];
                HeaderEdits { set, ..HeaderEdits::default() }
            }
            Carrier::Cookie => {
                let name = String::from_utf8_lossy(&self.name);
                let mut value = format!("{name}={token}; Path=/; HttpOnly");
                if let (true, Some(absolute)) = (self.kept.permanent, self.kept.absolute) {
                    let left = (token.began + absolute.as_secs()).saturating_sub(now);
                    value.push_str(&format!("; Max-Age={left}"));
                }
                let add = vec![(Bytes::from_static(b"set-cookie"), Bytes::from(value))];
                HeaderEdits { add, ..HeaderEdits::default() }
            }
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{:x}.{:x}", self.endpoint, self.began, self.used)
    }
}

/// A text that is not a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotAToken;

impl FromStr for Token {
    type Err = NotAToken;

    fn from_str(text: &str) -> Result<Self, NotAToken> {
        let mut numbers = text.splitn(3, '.').map(|part| u64::from_str_radix(part, 16));
        let (Some(Ok(endpoint)), Some(Ok(began)), Some(Ok(used))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return Err(NotAToken);
        };
        Ok(Self { endpoint, began, used })
    }
}

impl Members {
    /// Those that this entry keeps current.
    pub(super) fn of(entry: &Arc<EndpointsEntry>) -> Self {
        Self { entry: Arc::clone(entry), known: RefCell::default() }
    }

    /// The address of a member; `None`: there is none of this name that takes requests. Names are computed once for
    /// each version of the endpoints, not with each request.
    fn find(&self, key: u64, name: u64) -> Option<SocketAddr> {
        let mut known = self.known.borrow_mut();
        if let Some(newer) = self.entry.newer_than(known.of.as_ref()) {
            *known = Known { of: Some(newer), by_name: HashMap::new() };
        }
        let Known { of, by_name } = &mut *known;
        if !by_name.keys().any(|(known, _)| *known == key) {
            let ready = of.iter().flat_map(|all| &all.endpoints).filter(|endpoint| !endpoint.terminating);
            by_name.extend(ready.map(|endpoint| ((key, name_of(key, endpoint)), endpoint.address)));
        }
        by_name.get(&(key, name)).copied()
    }
}

/// What names an endpoint in a session: of its pod, whose uid nobody can guess.
fn name_of(key: u64, endpoint: &Endpoint) -> u64 {
    match &*endpoint.pod_uid {
        "" => hash(key, endpoint.address.to_string().as_bytes()),
        uid => hash(key, uid.as_bytes()),
    }
}

/// The start of [`hash`], and its prime (FNV-1a).
const SEED: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// A number that is the same in every version of this program, and in all pods: it goes out in sessions, and clients
/// with the same key go to the same endpoint.
pub(crate) fn hash(start: u64, bytes: &[u8]) -> u64 {
    let mixed = bytes.iter().fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(PRIME));
    // The last bytes have hardly moved the upper half: spread them (the finalizer of MurmurHash3).
    let mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

/// The same from the start.
pub(crate) fn hash_of(bytes: &[u8]) -> u64 {
    hash(SEED, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigStore;
    use crate::route::filters::tests::request;

    fn session(carrier: Carrier, absolute: u64, idle: u64) -> Session {
        let seconds = |seconds| (seconds > 0).then(|| Duration::from_secs(seconds));
        let kept = SessionPersistence {
            carrier,
            name: "Stay".into(),
            absolute: seconds(absolute),
            idle: seconds(idle),
            permanent: true,
        };
        Session::new(&kept, "HTTPRoute/shop/web", 0)
    }

    fn cookies(text: &str) -> Head {
        request(&format!("GET / HTTP/1.1\r\nhost: web\r\nCookie: {text}\r\n\r\n"))
    }

    #[test]
    fn a_token_is_read_as_it_was_written_and_only_so() {
        let token = Token { endpoint: 7, began: 1_700_000_000, used: 1_700_000_001 };
        assert_eq!(token.to_string().parse(), Ok(token));
        for bad in ["", "7", "7.7", "x.7.7", "7.7.7.7", "10.0.0.1"] {
            assert_eq!(bad.parse::<Token>(), Err(NotAToken), "{bad}");
        }
    }

    #[test]
    fn a_session_ends_when_it_is_old_or_was_idle_for_long() {
        let token = Token { endpoint: 7, began: 1000, used: 1050 };
        let head = cookies(&format!("a=b; Stay={token}; Stayed=no"));
        for (absolute, idle, now, alive) in [
            (0, 0, 9999, true),
            (100, 0, 1100, true),
            (100, 0, 1101, false),
            (0, 10, 1060, true),
            (0, 10, 1061, false),
            // Another sidecar's clock may be ahead.
            (0, 0, 990, true),
            (0, 0, 989, false),
        ] {
            let found = session(Carrier::Cookie, absolute, idle).of(&head, now);
            assert_eq!(found.is_some(), alive, "{absolute} {idle} {now}");
        }
        let header = request(&format!("GET / HTTP/1.1\r\nhost: web\r\nstay: {token}\r\n\r\n"));
        assert_eq!(session(Carrier::Header, 0, 0).of(&header, 2000), Some(token));
        assert_eq!(session(Carrier::Cookie, 0, 0).of(&header, 2000), None);
    }

    #[test]
    fn a_cookie_lasts_for_what_is_left_of_its_session_and_tells_no_address() {
        let began = Token { endpoint: 7, began: 1000, used: 1000 };
        let edits = session(Carrier::Cookie, 100, 0).answer(began, 1040);
        let [(name, value)] = edits.add.as_slice() else { panic!("{edits:?}") };
        assert_eq!(name, "set-cookie");
        assert_eq!(value, "Stay=0000000000000007.3e8.3e8; Path=/; HttpOnly; Max-Age=60");
        let edits = session(Carrier::Header, 100, 0).answer(began, 1040);
        assert_eq!(edits.set, [(Bytes::from_static(b"Stay"), Bytes::from(began.to_string()))]);
    }

    #[tokio::test]
    async fn a_pod_that_ends_or_is_gone_has_no_session() {
        let (store, _wanted) = ConfigStore::new();
        let address = SocketAddr::from(([10, 96, 0, 1], 80));
        let entry = store.resolve(address).await;
        let endpoint = |port: u16, terminating| Endpoint {
            pod_uid: format!("pod-{port}").into(),
            terminating,
            ..Endpoint::at(SocketAddr::from(([10, 0, 0, 1], port)))
        };
        let set = |endpoints| {
            store.set_endpoints(&"shop/web:80".into(), Endpoints { endpoints, ..Endpoints::default() });
        };
        set(vec![endpoint(1, false), endpoint(2, false)]);
        let route = crate::config::ServiceRoute { endpoints: "shop/web:80".into(), ..Default::default() };
        store.set_route(address, crate::config::Route::Service(route));
        let destination = entry.current().unwrap();
        let crate::config::Destination::Service(service) = &*destination else { panic!("{destination:?}") };
        let members = Members::of(&service.endpoints);
        let session = session(Carrier::Cookie, 0, 0);
        let token =
            |port| Token { endpoint: name_of(session.key, &endpoint(port, false)), began: 0, used: 0 };
        assert_eq!(session.find(token(2), &members).map(|at| at.port()), Some(2));
        assert_eq!(session.find(token(3), &members), None);
        set(vec![endpoint(1, false), endpoint(2, true)]);
        assert_eq!(session.find(token(2), &members), None);
        assert_eq!(session.find(token(1), &members).map(|at| at.port()), Some(1));
    }
}
