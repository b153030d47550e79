//! Rules of routes, with what was counted for them. Pure.
//!
//! In: series that a route took, and the routes of the model. Out: a row for each rule and revision. Sidecars count by
//! route and backend Service, and not by rule: what several rules of a route send to one Service is in one row. Requests
//! that reached no backend are counted under the Service that was dialled. They have a row of their own, with the rules
//! that have a backend to which nothing can be sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tulle_mesh::query::{RouteBackend, RouteRow, Routes, RuleName};
use tulle_mesh::reason::Reason;

use super::destination;
use crate::model::gateway::{AttachedRoute, AttachedRule};
use crate::model::{Key, Model, Sides};
use crate::telemetry::history::{Counts, Direction, SeriesId, Sum};

/// Whether the series is of requests that a rule of a route took, as their client has seen it.
pub fn is_routed(id: &SeriesId) -> bool {
    id.direction == Direction::Outbound && !id.route.is_empty()
}

/// What requests of a route are counted under.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Under {
    route: Arc<str>,
    service: Key,
}

impl Under {
    fn of(id: &SeriesId) -> Self {
        let service = (Arc::clone(&id.namespace), Arc::clone(&id.peer));
        Self { route: Arc::clone(&id.route), service }
    }
}

/// What was counted for one revision.
#[derive(Clone, Debug, Default)]
struct Counted {
    counts: Counts,
    last_seen: Option<i64>,
}

/// By revision.
type Revisions = BTreeMap<Arc<str>, Counted>;

fn counted(sum: &Sum, seen: &[(Arc<SeriesId>, i64)]) -> BTreeMap<Under, Revisions> {
    let mut all: BTreeMap<Under, Revisions> = BTreeMap::new();
    for (id, counts) in sum.series.iter().filter(|(id, _)| is_routed(id)) {
        let revisions = all.entry(Under::of(id)).or_default();
        revisions.entry(Arc::clone(&id.revision)).or_default().counts.merge(counts);
    }
    for (id, at) in seen.iter().filter(|(id, _)| is_routed(id)) {
        let revisions = all.entry(Under::of(id)).or_default();
        let of_revision = revisions.entry(Arc::clone(&id.revision)).or_default();
        of_revision.last_seen = of_revision.last_seen.max(Some(*at));
    }
    all
}

/// What becomes of the requests of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// They go to a Service.
    Leads,
    /// They are answered with `RouteNoBackend`.
    Fails,
    /// The rule names no backend: it redirects, or is answered as [`Self::Fails`].
    Answers,
}

/// What a rule does with its requests, or with the share of one backend.
#[derive(Clone, Debug)]
struct Use {
    rule: RuleName,
    backend: Option<RouteBackend>,
    fate: Fate,
}

/// A Service that requests of a route are counted under, with the rules that lead there.
#[derive(Clone, Debug)]
struct Place {
    service: Key,
    uses: Vec<Use>,
}

/// A row of some rules, without figures.
fn row_of(base: &RouteRow, uses: &[&Use]) -> RouteRow {
    let mut backends = uses.iter().filter_map(|one| one.backend.as_ref());
    let backend = backends.next().map(|first| {
        let is_same = backends.all(|other| other == first);
        RouteBackend { port: first.port.filter(|_| is_same), ..first.clone() }
    });
    RouteRow { rules: uses.iter().map(|one| one.rule.clone()).collect(), backend, ..base.clone() }
}

/// Where a rule's requests are counted, as whose, and what becomes of them.
struct Target {
    service: Key,
    backend: Option<RouteBackend>,
    fate: Fate,
}

/// Where a rule's requests are counted: what it answers itself, or cannot send, is counted under the Service that was
/// dialled.
fn targets(rule: &AttachedRule, parent: &Key) -> Vec<Target> {
    let mut found: Vec<Target> = Vec::new();
    for backend in &rule.backends {
        let (service, fate) = match &backend.service {
            Some(service) if backend.usable => (service, Fate::Leads),
            _ => (parent, Fate::Fails),
        };
        let shown = RouteBackend { party: backend.party.clone(), port: backend.port };
        let is_same = |target: &&mut Target| {
            let party = target.backend.as_ref().map(|backend| &backend.party);
            target.service == *service && target.fate == fate && party == Some(&shown.party)
        };
        let known = found.iter_mut().find(is_same);
        match known.and_then(|target| target.backend.as_mut()) {
            Some(known) => known.port = known.port.filter(|port| shown.port == Some(*port)),
            None => found.push(Target { service: service.clone(), backend: Some(shown), fate }),
        }
    }
    if found.is_empty() {
        found.push(Target { service: parent.clone(), backend: None, fate: Fate::Answers });
    }
    found
}

/// The places of a route, in order of the first rule that leads there.
fn places(route: &AttachedRoute) -> Vec<Place> {
    let mut places: Vec<Place> = Vec::new();
    for (index, rule) in (0_u32..).zip(&route.rules) {
        for Target { service, backend, fate } in targets(rule, &route.service) {
            let one = Use { rule: RuleName { index, name: rule.name.clone() }, backend, fate };
            match places.iter_mut().find(|place| place.service == service) {
                Some(place) => place.uses.push(one),
                None => places.push(Place { service, uses: vec![one] }),
            }
        }
    }
    places
}

/// Parts what was counted without a revision into what reached no backend, and the rest. How long requests took is not
/// known apart: it stays with the rest, if there is one.
fn apart(counted: &Counted) -> (Option<Counted>, Option<Counted>) {
    let is_it = |name: &str| Reason::from_name(name) == Some(Reason::RouteNoBackend);
    let counts = &counted.counts;
    let failed: u64 = counts.reasons.iter().filter(|(name, _)| is_it(name)).map(|(_, count)| *count).sum();
    if failed == 0 {
        return (None, Some(counted.clone()));
    }
    if failed >= counts.requests().saturating_add(counts.connections) {
        return (Some(counted.clone()), None);
    }
    let (mut without, mut rest) = (Counts::default(), counts.clone());
    let all = counts.reasons.iter().cloned();
    let (its, others): (Vec<_>, Vec<_>) = all.partition(|(name, _)| is_it(name));
    (without.reasons, rest.reasons) = (its, others);
    let mut left = failed;
    let mut shift = |from: &mut u64, to: &mut u64| {
        let moved = left.min(*from);
        (*from, *to, left) = (*from - moved, *to + moved, left - moved);
    };
    let [_, _, _, _, server, grpc, unanswered, _] = &mut rest.classes;
    let [_, _, _, _, to_server, to_grpc, to_unanswered, _] = &mut without.classes;
    shift(unanswered, to_unanswered);
    shift(server, to_server);
    shift(grpc, to_grpc);
    shift(&mut rest.connections, &mut without.connections);
    without.failed_connections = without.connections.min(rest.failed_connections);
    rest.failed_connections -= without.failed_connections;
    let of = |counts| Some(Counted { counts, last_seen: counted.last_seen });
    (of(without), of(rest))
}

/// What rows are made of.
struct Table<'a> {
    model: &'a Model,
    window: u64,
    rows: Vec<RouteRow>,
    /// By Service: revisions come from sidecars, which may name hundreds of one with thousands of pods.
    sides: HashMap<Key, Sides<'a>>,
}

impl Table<'_> {
    /// Adds the rows of an attached route, and notes where it is counted.
    fn add(
        &mut self,
        route: &AttachedRoute,
        counted: &BTreeMap<Under, Revisions>,
        shown: &mut BTreeSet<Under>,
    ) {
        let base =
            RouteRow { party: party(&route.service), route: route.route.clone(), ..RouteRow::default() };
        if route.rules.is_empty() {
            self.rows.push(base.clone());
        }
        for place in places(route) {
            let under = Under { route: route.route.as_str().into(), service: place.service.clone() };
            match counted.get(&under) {
                Some(revisions) => self.add_place(&base, &place, revisions),
                // None of its rules has sent anything there.
                None => self.rows.extend(place.uses.iter().map(|one| row_of(&base, &[one]))),
            }
            shown.insert(under);
        }
    }

    /// Adds the rows of a place where something was counted. What a rule answers itself, by a redirect or an error, is
    /// counted without a revision.
    fn add_place(&mut self, base: &RouteRow, place: &Place, revisions: &Revisions) {
        let of = |fate: Fate| place.uses.iter().filter(move |one| one.fate == fate).collect::<Vec<&Use>>();
        let (leading, failing, answering) = (of(Fate::Leads), of(Fate::Fails), of(Fate::Answers));
        let (of_pods, others): (Vec<_>, Vec<_>) =
            revisions.iter().partition(|(revision, _)| !revision.is_empty());
        let all: Vec<&Use> = leading.iter().chain(&answering).copied().collect();
        let (mut without, mut rest) = others.first().map_or((None, None), |(_, counted)| apart(counted));
        if all.is_empty() && rest.as_ref().is_some_and(|rest| rest.counts.is_empty()) {
            // Why it was counted before the window is not known, and no rule that is here now leads to anything else.
            without = rest.take();
        }
        if !of_pods.is_empty() {
            // From before the route or the Service has changed, where no rule leads there any more.
            let backend = || RouteBackend { party: party(&place.service), port: None };
            let row = row_of(base, &leading);
            let row = RouteRow { backend: row.backend.clone().or_else(|| Some(backend())), ..row };
            self.add_counted(row, &place.service, &of_pods);
        }
        let none: Arc<str> = Arc::default();
        match &rest {
            Some(rest) => self.add_counted(row_of(base, &all), &place.service, &[(&none, rest)]),
            None if of_pods.is_empty() => self.add_unused(base, leading.iter().chain(&answering)),
            None => self.add_unused(base, &answering),
        }
        match &without {
            Some(without) => {
                // Rules without backends are answered so too, unless they redirect.
                let rules = if failing.is_empty() { &answering } else { &failing };
                let row = RouteRow { backend: None, ..row_of(base, rules) };
                self.add_counted(row, &place.service, &[(&none, without)]);
            }
            None => self.add_unused(base, &failing),
        }
    }

    /// Adds a row for each rule by which nothing was sent.
    fn add_unused<'u>(&mut self, base: &RouteRow, uses: impl IntoIterator<Item = &'u &'u Use>) {
        self.rows.extend(uses.into_iter().map(|one| row_of(base, &[*one])));
    }

    /// Adds a row for each revision with counts in the window; without any, one that says when there were some last.
    fn add_counted(&mut self, row: RouteRow, service: &Key, revisions: &[(&Arc<str>, &Counted)]) {
        let before = self.rows.len();
        let model = self.model;
        let sides = self.sides.entry(service.clone()).or_insert_with(|| model.sides_of(service));
        for (revision, counted) in revisions.iter().filter(|(_, counted)| !counted.counts.is_empty()) {
            self.rows.push(RouteRow {
                set: sides.of(revision).unwrap_or_default().to_owned(),
                revision: (!revision.is_empty()).then(|| revision.to_string()),
                last_seen: counted.last_seen,
                golden: Some(counted.counts.golden(self.window)),
                ..row.clone()
            });
        }
        if self.rows.len() == before {
            let last_seen = revisions.iter().filter_map(|(_, counted)| counted.last_seen).max();
            self.rows.push(RouteRow { last_seen, ..row });
        }
    }
}

fn party(service: &Key) -> tulle_mesh::query::Party {
    destination(&service.0, &service.1, false)
}

/// The rules of all routes that are attached to Services, with what was counted for them in the window and when that was
/// `seen` last. With a namespace: of Services there.
pub fn routes(sum: &Sum, seen: &[(Arc<SeriesId>, i64)], model: &Model, namespace: Option<&str>) -> Routes {
    let counted = counted(sum, seen);
    let attached = model.attached_routes();
    let mut shown = BTreeSet::new();
    let mut table = Table { model, window: sum.window, rows: Vec::new(), sides: HashMap::new() };
    for route in &attached {
        table.add(route, &counted, &mut shown);
    }
    // What no rule accounts for: the route has changed or gone, or its share was answered with an error.
    for (under, revisions) in counted.iter().filter(|(under, _)| !shown.contains(under)) {
        if revisions.values().all(|counted| counted.counts.is_empty()) {
            continue;
        }
        let mut parents = attached.iter().filter(|one| *one.route == *under.route).map(|one| &one.service);
        let is_parent = parents.clone().any(|parent| *parent == under.service);
        let parent = parents.next().filter(|_| !is_parent).unwrap_or(&under.service);
        let backend = Some(RouteBackend { party: party(&under.service), port: None });
        let row =
            RouteRow { party: party(parent), route: under.route.to_string(), backend, ..RouteRow::default() };
        let revisions: Vec<_> = revisions.iter().collect();
        table.add_counted(row, &under.service, &revisions);
    }
    let mut rows = table.rows;
    rows.retain(|row| namespace.is_none_or(|wanted| row.party.namespace == wanted));
    rows.sort_by(|a, b| {
        let first = |row: &RouteRow| row.rules.first().map_or(u32::MAX, |rule| rule.index);
        (&a.party, &a.route, first(a)).cmp(&(&b.party, &b.route, first(b)))
    });
    Routes { window: sum.window, lost: sum.lost, rows }
}
