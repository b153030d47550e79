//! The rules of a Service's port, merged, as sidecars are sent them.

use prost::Message as _;
use tulle_mesh::proto;
use tulle_mesh::route::{Candidate, order};

use super::super::object::ServicePort;
use super::super::{Key, Model};
use super::check::{BackendTerm, CheckedRule, Terms};
use super::filter::FilterTerm;
use super::object::{RouteKey, RouteObject};

/// About how many bytes a backend is, with the sections of policies for it.
const BACKEND_BYTES: usize = 256;

/// Whom the rules of a port are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteClient<'a> {
    /// The client's namespace.
    pub namespace: &'a str,
    /// The family of the address that it dialled.
    pub ipv4: bool,
}

/// About how many bytes a rule is for a sidecar.
pub(super) fn estimate(rule: &CheckedRule) -> usize {
    let filters = |filters: &[FilterTerm]| -> usize {
        let bytes = |filter: &FilterTerm| match filter {
            FilterTerm::Ready(kind) => kind.encoded_len(),
            FilterTerm::Mirror { .. } => BACKEND_BYTES,
        };
        filters.iter().map(bytes).sum()
    };
    let matches: usize = rule.matches.iter().map(proto::Match::encoded_len).sum();
    let terms = rule.terms.as_ref().map_or(0, |terms| {
        let backends = terms.backends.iter().map(|backend| BACKEND_BYTES + filters(&backend.filters));
        filters(&terms.filters) + backends.sum::<usize>()
    });
    rule.name.len() + matches + terms
}

impl Model {
    /// The merged rules of a port of a Service for a client. `None`: no route holds there, and everything goes to the
    /// Service itself.
    pub fn rules_for(
        &self,
        service: &Key,
        port: &ServicePort,
        client: RouteClient<'_>,
    ) -> Option<proto::Rules> {
        let holding = self.holding(service, port, client.namespace);
        let (first, _) = holding.first()?;
        let kind = first.kind.proto();
        let mut made = proto::Rules { kind: kind.into(), ..proto::Rules::default() };
        let mut candidates = Vec::new();
        for (key, held) in &holding {
            let route = index(made.routes.len());
            made.routes.push(reference(key, &held.object));
            let rules = held.rules.iter().enumerate();
            for (number, rule) in rules.filter(|(_, rule)| !rule.matches.is_empty()) {
                let at = index(made.rules.len());
                candidates.extend(rule.matches.iter().map(|one| Candidate {
                    m: proto::Match { rule: at, ..one.clone() },
                    created: held.object.created,
                    route: (key.namespace.to_string(), key.name.to_string()),
                    rule: number,
                    kind,
                }));
                made.rules.push(self.route_rule(&held.object, rule, route, client.ipv4));
            }
        }
        order(&mut candidates);
        made.matches = candidates.into_iter().map(|candidate| candidate.m).collect();
        Some(made)
    }

    /// The place of a rule among those of its route as it is written, by its place among those that sidecars are sent: a
    /// rule without a match that they could look for is not sent.
    pub fn rule_index(&self, route: &RouteKey, sent: usize) -> Option<usize> {
        let rules = self.gateway.routes.get(route)?.rules.iter().enumerate();
        rules.filter(|(_, rule)| !rule.matches.is_empty()).nth(sent).map(|(index, _)| index)
    }

    fn route_rule(
        &self,
        route: &RouteObject,
        rule: &CheckedRule,
        index: u32,
        ipv4: bool,
    ) -> proto::RouteRule {
        let failing = proto::RouteRule { route: index, name: rule.name.clone(), ..Default::default() };
        // Without backends and a redirect every request is answered with an error.
        let Some(Terms { filters, backends, request_timeout_ms, attempt_timeout_ms, retry, session }) =
            &rule.terms
        else {
            return failing;
        };
        proto::RouteRule {
            filters: self.route_filters(route, filters, ipv4),
            backends: backends.iter().map(|backend| self.route_backend(route, backend, ipv4)).collect(),
            request_timeout_ms: *request_timeout_ms,
            attempt_timeout_ms: *attempt_timeout_ms,
            retry: retry.clone(),
            session: session.clone(),
            ..failing
        }
    }

    /// A backend of a rule. One that cannot be used keeps its weight: its share is answered with an error.
    fn route_backend(&self, route: &RouteObject, term: &BackendTerm, ipv4: bool) -> proto::Backend {
        let Ok(made) = self.backend(route, &term.to, ipv4) else {
            return proto::Backend {
                weight: term.weight,
                namespace: term.to.namespace.clone().unwrap_or_else(|| route.namespace.to_string()),
                name: term.to.name.clone(),
                port: term.to.port.and_then(|port| u32::try_from(port).ok()).unwrap_or_default(),
                ..proto::Backend::default()
            };
        };
        let filters = self.route_filters(route, &term.filters, ipv4);
        proto::Backend { weight: term.weight, filters, ..made }
    }

    /// Filters. A mirror that leads nowhere is left out, as the Gateway API demands.
    fn route_filters(&self, route: &RouteObject, terms: &[FilterTerm], ipv4: bool) -> Vec<proto::Filter> {
        let kind = |term: &FilterTerm| match term {
            FilterTerm::Ready(kind) => Some((**kind).clone()),
            FilterTerm::Mirror { to, numerator, denominator } => {
                let backend = self.backend(route, to, ipv4).ok()?;
                let (numerator, denominator) = (*numerator, *denominator);
                let mirror = proto::Mirror { backend: Some(backend), numerator, denominator };
                Some(proto::filter::Kind::Mirror(mirror))
            }
        };
        terms.iter().filter_map(kind).map(|kind| proto::Filter { kind: Some(kind) }).collect()
    }
}

fn reference(key: &RouteKey, object: &RouteObject) -> proto::RouteRef {
    proto::RouteRef {
        kind: key.kind.proto().into(),
        object: Some(proto::ObjectRef {
            namespace: key.namespace.to_string(),
            name: key.name.to_string(),
            uid: object.uid.to_string(),
            generation: object.generation,
        }),
    }
}

/// [`super::attach::MAX_RULES`] is far below what the number can say.
fn index(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
