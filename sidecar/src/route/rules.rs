//! Rules of the Gateway API's routes, compiled for one worker: which rule takes a request, what is done to it, and to
//! which of the rule's backends it goes.
//!
//! Backends take turns by their weights (smooth weighted round robin), so that ten requests of a share of 70 % are seven
//! requests. An invalid backend keeps its turns, and they are answered with an error. The turns begin anywhere in their
//! round, because many clients send few requests each, and go on where they were when the rules come again with the same
//! backends.

use std::borrow::Cow;
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tulle_mesh::route::Subject;

use super::call_policy::CallPolicy;
use super::cors;
use super::filters::{ResponseEdits, edit, edit_request, redirect, rewrite, separator};
use super::session::{Members, Session, Token};
use super::{Connection, RouteTarget};
use crate::backend::{Ask, Backend, Backends};
use crate::config::{Cors, Filter, Protocol, RouteKind, Rule, RuleBackend, Rules, Service};
use crate::error::Failure;
use crate::http1::Head;

/// The most turns that are skipped to begin anywhere in a round: among so many each share is as it should be, within a
/// thousandth.
const MOST_SKIPPED: u64 = 1_000;

/// The rules of a port.
#[derive(Debug)]
pub struct CompiledRules {
    source: Arc<Rules>,
    /// As the source numbers them.
    services: Vec<Behind>,
    /// As the source numbers them.
    rules: Vec<CompiledRule>,
}

/// A Service that rules name.
#[derive(Debug)]
struct Behind {
    backend: Rc<Backend>,
    members: Members,
    /// What it declares.
    protocol: Protocol,
}

#[derive(Debug)]
struct CompiledRule {
    shares: Vec<Share>,
    /// What is done with answers of this sidecar's own.
    edits: Option<Rc<ResponseEdits>>,
    session: Option<Session>,
}

/// A backend of a rule.
#[derive(Debug)]
struct Share {
    /// `None`: it is invalid.
    way: Option<Rc<RouteTarget>>,
    edits: Option<Rc<ResponseEdits>>,
    due: Due,
}

/// How much a backend is due; see [`turn`]. A connection that waits for its client takes a turn before its content is
/// known. If that is a request, it takes one too: were they the same turns, every request of a client that is slow with
/// its first bytes would go to one of two equal backends.
#[derive(Debug, Default)]
struct Due {
    requests: Cell<i64>,
    connections: Cell<i64>,
}

/// Who takes turns.
#[derive(Clone, Copy, Debug)]
enum Among {
    Requests,
    Connections,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Found<'p> {
    /// It goes to a backend.
    Forward(Forward<'p>),
    /// It is answered with a head, and nothing else.
    Answer {
        /// The head.
        head: Box<Head>,
        /// The route whose rule answers.
        route: Arc<str>,
    },
    /// It fails.
    Fail {
        /// Why.
        failure: Failure,
        /// What is done with the answer that says so.
        edits: Option<Rc<ResponseEdits>>,
        /// The route whose rule took it; `None`: no rule did.
        route: Option<Arc<str>>,
    },
}

/// A request that goes to a backend.
#[derive(Debug)]
pub struct Forward<'p> {
    /// Where it goes, and under what policy.
    pub way: &'p Rc<RouteTarget>,
    taken: Taken<'p>,
    share: &'p Share,
    backend: &'p RuleBackend,
    session: Option<(Token, SocketAddr)>,
}

/// What is done with a request: by the rule that takes it, or by the backend that it goes to.
#[derive(Clone, Copy, Debug)]
pub struct Filters<'p> {
    taken: Taken<'p>,
    all: &'p [Filter],
}

/// Where a copy of a request goes.
#[derive(Clone, Copy, Debug)]
pub struct CopyTo<'p> {
    /// Who gets it.
    pub backend: &'p Rc<Backend>,
    /// What is spoken there, as it is declared.
    pub protocol: Protocol,
}

/// The rule that takes a request.
#[derive(Clone, Copy, Debug)]
struct Taken<'p> {
    rules: &'p CompiledRules,
    source: &'p Rule,
    compiled: &'p CompiledRule,
    prefix: Option<&'p str>,
}

impl CompiledRules {
    /// The rules of a Service's port; `None`: there are none, and everything goes to the Service itself. `before`: those
    /// that were in force.
    pub(super) fn of(service: &Service, backends: &Backends, before: Option<&Self>) -> Option<Self> {
        let source = Arc::clone(service.route.rules.as_ref()?);
        let behind = |service: &Service| Behind {
            backend: backends.of_service(service),
            members: Members::of(&service.endpoints),
            protocol: service.route.protocol,
        };
        let services: Vec<Behind> = service.behind.iter().map(behind).collect();
        let compile = |(number, rule): (usize, &Rule)| {
            let policy =
                Rc::new(CallPolicy::of(&service.route.traffic, &service.route.shadow, Some(&rule.times)));
            let share = |backend: &RuleBackend| {
                let behind = backend.service.and_then(|service| services.get(service));
                let filters = rule.filters.iter().chain(&backend.filters);
                Share {
                    way: behind.map(|behind| {
                        Rc::new(RouteTarget {
                            backend: Rc::clone(&behind.backend),
                            policy: Rc::clone(&policy),
                            route: Some(Arc::clone(&rule.route)),
                            protocol: behind.protocol,
                        })
                    }),
                    edits: ResponseEdits::of(filters).map(Rc::new),
                    due: Due::default(),
                }
            };
            CompiledRule {
                shares: rule.backends.iter().map(share).collect(),
                edits: ResponseEdits::of(rule.filters.iter()).map(Rc::new),
                session: rule.session.as_ref().map(|kept| Session::new(kept, &rule.route, number)),
            }
        };
        let rules = source.rules.iter().enumerate().map(compile).collect();
        let compiled = Self { source, services, rules };
        compiled.begin_turns(before);
        Some(compiled)
    }

    /// Takes over whose turn it is, in every rule that has the same backends as before. The others begin anywhere in their
    /// round.
    fn begin_turns(&self, before: Option<&Self>) {
        for (rule, compiled) in self.source.rules.iter().zip(&self.rules) {
            let same = before.and_then(|before| {
                let same = before.source.rules.iter().position(|old| {
                    old.route == rule.route
                        && old.name == rule.name
                        && self.shares(rule).eq(before.shares(old))
                });
                before.rules.get(same?)
            });
            let Some(old) = same else {
                skip_turns(compiled, rule);
                continue;
            };
            for (share, old) in compiled.shares.iter().zip(&old.shares) {
                share.due.requests.set(old.due.requests.get());
                share.due.connections.set(old.due.connections.get());
            }
        }
    }

    /// What makes the backends of a rule the same as those of another.
    fn shares<'a>(&'a self, rule: &'a Rule) -> impl Iterator<Item = (u32, Option<&'a str>)> {
        rule.backends.iter().map(|backend| {
            let service = backend.service.and_then(|service| self.source.services.get(service));
            (backend.weight, service.map(|service| &*service.endpoints))
        })
    }

    /// What becomes of a request to a port with this number.
    pub fn find(&self, head: &Head, port: u16) -> Found<'_> {
        if let Some(answer) = self.preflight(head) {
            return answer;
        }
        let Some(taken) = self.take(&Asked::of(head)) else {
            return Found::Fail { failure: Failure::RouteNone, edits: None, route: None };
        };
        if let Some(answer) = taken.redirects(&taken.source.filters, head, port) {
            return answer;
        }
        let session = taken.session(head);
        let chosen = match session {
            Some((number, ..)) => Some(number),
            None => taken.compiled.turn(taken.source, Among::Requests),
        };
        let chosen = chosen.and_then(|number| {
            Some((taken.compiled.shares.get(number)?, taken.source.backends.get(number)?))
        });
        let Some((share, backend)) = chosen else { return taken.leads_nowhere(&[], head) };
        if let Some(answer) = taken.redirects(&backend.filters, head, port) {
            return answer;
        }
        let Some(way) = &share.way else { return taken.leads_nowhere(&backend.filters, head) };
        let session = session.map(|(_, token, stay)| (token, stay));
        Found::Forward(Forward { way, taken, share, backend, session })
    }

    /// Whether they are about requests.
    pub(super) fn is_of_requests(&self) -> bool {
        matches!(self.source.kind, RouteKind::Http | RouteKind::Grpc)
    }

    /// Whether they are about the names of servers.
    pub(super) fn is_of_tls(&self) -> bool {
        self.source.kind == RouteKind::Tls
    }

    /// Where a connection goes whose requests are not looked at. `None`: rules about requests do not concern it.
    pub(super) fn find_connection(
        &self,
        connection: Connection<'_>,
    ) -> Option<Result<Rc<RouteTarget>, Failure>> {
        let name = match (self.source.kind, connection) {
            (RouteKind::Http | RouteKind::Grpc, _) => return None,
            (RouteKind::Tls, Connection::Tls(name)) => name,
            (RouteKind::Tls, Connection::Other) => return Some(Err(Failure::RouteNone)),
            (RouteKind::Tcp, _) => None,
        };
        let Some(number) = self.source.matcher.find_server_name(name) else {
            return Some(Err(Failure::RouteNone));
        };
        let found = self.source.rules.get(number).zip(self.rules.get(number));
        let way = found.and_then(|(source, compiled)| {
            let number = compiled.turn(source, Among::Connections)?;
            compiled.shares.get(number)?.way.clone()
        });
        Some(way.ok_or(Failure::RouteNoBackend))
    }

    /// The answer to a preflight, by the rule of the request that it asks about. `None`: it is not a preflight, or that
    /// rule leaves cross-origin requests to the server.
    fn preflight(&self, head: &Head) -> Option<Found<'_>> {
        let method = cors::asked_method(head)?;
        let taken = self.take(&Asked { method, ..Asked::of(head) })?;
        let of_backends = taken.source.backends.iter().flat_map(|backend| &backend.filters);
        let cors = cors_of(taken.source.filters.iter().chain(of_backends))?;
        Some(taken.answer(cors::preflight(cors, head)))
    }

    fn take(&self, asked: &Asked<'_>) -> Option<Taken<'_>> {
        let (number, prefix) = match self.source.kind {
            RouteKind::Http | RouteKind::Grpc => {
                let found = self.source.matcher.find(asked)?;
                (found.rule, found.prefix)
            }
            // Requests at a port with rules about connections: each is a connection of its own to us.
            RouteKind::Tcp => (self.source.matcher.find_server_name(None)?, None),
            RouteKind::Tls => return None,
        };
        let (source, compiled) = (self.source.rules.get(number)?, self.rules.get(number)?);
        Some(Taken { rules: self, source, compiled, prefix })
    }
}

impl Taken<'_> {
    /// An answer of our own, with what the rule does to answers.
    fn answer<'p>(&self, mut head: Head) -> Found<'p> {
        if let Some(edits) = &self.compiled.edits {
            edits.apply(&mut head);
        }
        Found::Answer { head: Box::new(head), route: Arc::clone(&self.source.route) }
    }

    fn redirects<'p>(&self, filters: &[Filter], request: &Head, port: u16) -> Option<Found<'p>> {
        let to = filters.iter().find_map(|filter| match filter {
            Filter::Redirect(to) => Some(to),
            _ => None,
        })?;
        let mut head = redirect(to, request, port, self.prefix);
        if let Some(decoration) = cors_of(filters.iter()).and_then(|cors| cors::decoration(cors, request)) {
            edit(&mut head.headers, &decoration);
        }
        Some(self.answer(head))
    }

    /// The error of a backend with these filters that does not exist. A script of an allowed origin may see it, as it may
    /// see those of servers.
    fn leads_nowhere<'p>(&self, of_backend: &[Filter], request: &Head) -> Found<'p> {
        let cors = cors_of(self.source.filters.iter().chain(of_backend));
        let decoration = cors.and_then(|cors| cors::decoration(cors, request));
        let edits = decoration.map(|set| Rc::new(ResponseEdits::default().with(None, Some(set))));
        let route = Some(Arc::clone(&self.source.route));
        Found::Fail { failure: Failure::RouteNoBackend, edits, route }
    }

    /// The session that a request is of: the number of its backend, and where in it the request goes. Whoever has one
    /// stays with it, whatever the weights are now.
    fn session(&self, head: &Head) -> Option<(usize, Token, SocketAddr)> {
        let session = self.compiled.session.as_ref()?;
        let token = session.of(head, now())?;
        let mut backends = self.source.backends.iter().enumerate();
        backends.find_map(|(number, backend)| {
            let behind = self.rules.services.get(backend.service?)?;
            Some((number, token, session.find(token, &behind.members)?))
        })
    }
}

impl CompiledRule {
    /// Whose turn it is.
    fn turn(&self, source: &Rule, among: Among) -> Option<usize> {
        turn(self.shares.iter().zip(&source.backends).map(|(share, backend)| {
            let due = match among {
                Among::Requests => &share.due.requests,
                Among::Connections => &share.due.connections,
            };
            (i64::from(backend.weight), due)
        }))
    }
}

impl<'p> Forward<'p> {
    /// What is done with requests to any backend of the rule.
    pub fn of_rule(&self) -> Filters<'p> {
        Filters { taken: self.taken, all: &self.taken.source.filters }
    }

    /// What is done with requests to this backend, and with no others.
    pub fn of_backend(&self) -> Filters<'p> {
        Filters { taken: self.taken, all: &self.backend.filters }
    }

    /// The path of a request as it was sent, where both the rule and the backend rewrite it: what the rule has matched is
    /// at its beginning, and no longer at that of what the rule has made of it. `None`: it need not be kept.
    pub fn path_for_backend(&self, request: &Head) -> Option<Bytes> {
        let rewritten = self.of_rule().rewrite_paths() && self.of_backend().rewrite_paths();
        // Of a CONNECT and of `*` there is nothing to rewrite.
        let path = request.path();
        (rewritten && path.starts_with('/')).then(|| Bytes::copy_from_slice(path.as_bytes()))
    }

    /// Makes a request stay where its session is, and returns what is done with its answer. `request`: as it was sent.
    pub fn settle(&self, request: &Head, ask: &mut Ask) -> Option<Rc<ResponseEdits>> {
        let session = self.taken.compiled.session.as_ref();
        let kept = session.and_then(|session| session.keep(self.session, &self.way.backend, ask, now()));
        let decoration = cors_of(self.filters()).and_then(|cors| cors::decoration(cors, request));
        if kept.is_none() && decoration.is_none() {
            return self.share.edits.clone();
        }
        let edits = self.share.edits.as_deref().cloned().unwrap_or_default();
        Some(Rc::new(edits.with(kept, decoration)))
    }

    fn filters(&self) -> impl Iterator<Item = &'p Filter> + use<'p> {
        self.taken.source.filters.iter().chain(&self.backend.filters)
    }
}

impl<'p> Filters<'p> {
    /// Whether they change requests.
    pub fn change_requests(&self) -> bool {
        self.all.iter().any(|filter| matches!(filter, Filter::RequestHeaders(_) | Filter::Rewrite(_)))
    }

    fn rewrite_paths(&self) -> bool {
        self.all.iter().any(|filter| matches!(filter, Filter::Rewrite(to) if to.path.is_some()))
    }

    /// Changes a request.
    pub fn edit(&self, head: &mut Head) {
        for filter in self.all {
            match filter {
                Filter::RequestHeaders(edits) => edit_request(head, edits),
                Filter::Rewrite(to) => rewrite(head, to, self.taken.prefix),
                Filter::ResponseHeaders(_) | Filter::Redirect(_) | Filter::Mirror(_) | Filter::Cors(_) => {}
            }
        }
    }

    /// Where copies of this request go. An invalid one takes none.
    pub fn copies(&self) -> impl Iterator<Item = CopyTo<'p>> + use<'p> {
        let services = &self.taken.rules.services;
        self.all.iter().filter_map(move |filter| {
            let Filter::Mirror(mirror) = filter else { return None };
            // A fraction of nought out of nought is refused where rules are decoded.
            let all = mirror.numerator >= mirror.denominator;
            if !all && fastrand::u32(..mirror.denominator) >= mirror.numerator {
                return None;
            }
            services
                .get(mirror.service?)
                .map(|behind| CopyTo { backend: &behind.backend, protocol: behind.protocol })
        })
    }
}

fn cors_of<'a>(mut filters: impl Iterator<Item = &'a Filter>) -> Option<&'a Cors> {
    filters.find_map(|filter| match filter {
        Filter::Cors(cors) => Some(cors),
        _ => None,
    })
}

/// Takes turns that nobody gets, so that the next one is anywhere in its round. Clients that send one request each (Jobs,
/// or an address that is forgotten between two) would all send it to the backend with the most weight.
fn skip_turns(compiled: &CompiledRule, source: &Rule) {
    let weights = || source.backends.iter().map(|backend| u64::from(backend.weight));
    let divisor = weights().fold(0, greatest_common_divisor);
    let round = weights().sum::<u64>().checked_div(divisor).unwrap_or(0);
    if round < 2 {
        return;
    }
    for among in [Among::Requests, Among::Connections] {
        for _ in 0..fastrand::u64(..round.min(MOST_SKIPPED)) {
            compiled.turn(source, among);
        }
    }
}

fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b > 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Whose turn it is, by weight: everybody gets its weight, and who then has the most pays for all. `None`: nobody has
/// a weight.
fn turn<'a>(shares: impl Iterator<Item = (i64, &'a Cell<i64>)>) -> Option<usize> {
    let (mut total, mut best): (i64, Option<(usize, &Cell<i64>)>) = (0, None);
    for (number, (weight, due)) in shares.enumerate().filter(|(_, (weight, _))| *weight > 0) {
        total += weight;
        due.set(due.get() + weight);
        if best.is_none_or(|(_, most)| due.get() > most.get()) {
            best = Some((number, due));
        }
    }
    let (number, due) = best?;
    due.set(due.get() - total);
    Some(number)
}

/// Seconds of Unix time.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A request as matches see it.
struct Asked<'a> {
    head: &'a Head,
    method: &'a str,
    path: &'a str,
    query: Option<&'a str>,
}

impl<'a> Asked<'a> {
    fn of(head: &'a Head) -> Self {
        let whole = head.path();
        let (path, query) = match whole.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (whole, None),
        };
        let path = if path.is_empty() { "/" } else { path };
        Self { head, method: head.request_line().0, path, query }
    }
}

impl Subject for Asked<'_> {
    fn method(&self) -> &str {
        self.method
    }

    fn path(&self) -> &str {
        self.path
    }

    fn query(&self) -> Option<&str> {
        self.query
    }

    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>> {
        let mut values =
            self.head.headers.iter().filter(|(line, _)| line.eq_ignore_ascii_case(name.as_bytes()));
        let (_, first) = values.next()?;
        let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
        let mut joined = first.to_vec();
        for (_, value) in std::iter::once(second).chain(values) {
            joined.extend_from_slice(separator(name.as_bytes()));
            joined.extend_from_slice(value);
        }
        Some(Cow::Owned(joined))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::filters::tests::request;

    fn turns(weights: &[i64], count: usize) -> Vec<Option<usize>> {
        let due: Vec<Cell<i64>> = weights.iter().map(|_| Cell::new(0)).collect();
        (0..count).map(|_| turn(weights.iter().copied().zip(&due))).collect()
    }

    #[test]
    fn turns_are_exact_and_spread() {
        let seen = turns(&[70, 30, 0], 10);
        let of = |wanted| seen.iter().filter(|number| **number == Some(wanted)).count();
        assert_eq!((of(0), of(1), of(2)), (7, 3, 0));
        assert_eq!(turns(&[2, 1], 6), [0, 1, 0, 0, 1, 0].map(Some));
        assert_eq!(turns(&[0, 0], 2), [None, None]);
        assert_eq!(turns(&[], 1), [None]);
        assert_eq!(turns(&[1_000_000], 2), [Some(0), Some(0)]);
    }

    #[test]
    fn a_request_is_matched_as_it_was_sent() {
        let head = request("GET http://web/a?b=c HTTP/1.1\r\nhost: web\r\nX-A: 1\r\nx-a: 2\r\n\r\n");
        let asked = Asked::of(&head);
        assert_eq!((asked.method(), asked.path(), asked.query()), ("GET", "/a", Some("b=c")));
        assert_eq!(asked.header("x-A").as_deref(), Some(&b"1,2"[..]));
        assert_eq!(asked.header("host").as_deref(), Some(&b"web"[..]));
        assert_eq!(asked.header("x-b"), None);
        // As HTTP/2 may send cookies.
        let crumbs = request("GET / HTTP/1.1\r\nhost: web\r\ncookie: a=1\r\ncookie: b=2\r\n\r\n");
        assert_eq!(Asked::of(&crumbs).header("Cookie").as_deref(), Some(&b"a=1; b=2"[..]));
        let tunnel = request("CONNECT web:443 HTTP/1.1\r\nhost: web:443\r\n\r\n");
        assert_eq!(Asked::of(&tunnel).path(), "/");
    }
}
