//! Routes by the Services that they are attached to, with their rules as they are written: also rules that are not in
//! force, or that no request has matched.

use std::collections::BTreeSet;

use tulle_mesh::query::Party;

use super::super::{Key, Model};
use super::Held;
use super::backend::service_of;
use super::check::CheckedRule;
use super::object::{BackendRef, RouteKey, RouteObject, RuleSpec};

/// A route at one of the Services that it is attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedRoute {
    /// The Service.
    pub service: Key,
    /// As sidecars name it: `HTTPRoute/namespace/name`.
    pub route: String,
    /// Its rules, in order.
    pub rules: Vec<AttachedRule>,
}

/// A rule of an attached route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedRule {
    /// Its name; empty: it has none.
    pub name: String,
    /// Where it leads, in order.
    pub backends: Vec<AttachedBackend>,
}

/// Where a rule leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedBackend {
    /// The Service. `None`: something that is not a Service, which no request reaches.
    pub service: Option<Key>,
    /// As it is shown.
    pub party: Party,
    /// Its port.
    pub port: Option<u16>,
    /// Requests reach it. Those to one that does not exist, or of a rule that is not supported, are answered with an
    /// error (`RouteNoBackend`).
    pub usable: bool,
}

impl AttachedBackend {
    fn of(model: &Model, route: &RouteObject, to: &BackendRef) -> Self {
        let service = service_of(&route.namespace, to);
        let usable = model.unresolved(route, to).is_none();
        let namespace = to.namespace.as_deref().filter(|namespace| !namespace.is_empty());
        let party = Party {
            namespace: namespace.unwrap_or(&route.namespace).to_owned(),
            kind: to.kind.clone().unwrap_or_else(|| "Service".to_owned()),
            name: to.name.clone(),
        };
        Self { service, party, port: port(to), usable }
    }
}

impl AttachedRoute {
    fn of(model: &Model, service: &Key, key: &RouteKey, held: &Held) -> Self {
        let route = &held.object;
        let rule = |(rule, checked): (&RuleSpec, &CheckedRule)| {
            let mut backends: Vec<AttachedBackend> =
                rule.backend_refs.iter().map(|to| AttachedBackend::of(model, route, to)).collect();
            backends.iter_mut().for_each(|backend| backend.usable &= checked.terms.is_some());
            AttachedRule { name: rule.name.clone().unwrap_or_default(), backends }
        };
        // Each rule is checked, in the same order.
        let rules = route.rules.iter().zip(&held.rules).map(rule).collect();
        Self { service: service.clone(), route: key.reported(), rules }
    }
}

fn port(to: &BackendRef) -> Option<u16> {
    to.port.and_then(|port| u16::try_from(port).ok())
}

impl Model {
    /// All routes whose parents are Services that exist, in order of Service and route: of several parents once for each.
    pub fn attached_routes(&self) -> Vec<AttachedRoute> {
        let mut all = Vec::new();
        for (service, keys) in &self.gateway.by_parent {
            if !self.services.contains_key(service) {
                continue;
            }
            let held = keys.iter().filter_map(|key| Some((key, self.gateway.routes.get(key)?)));
            all.extend(held.map(|(key, held)| AttachedRoute::of(self, service, key, held)));
        }
        all.sort_by(|a, b| (&a.service, &a.route).cmp(&(&b.service, &b.route)));
        all
    }

    /// The ports by which the rules of a route, as sidecars name it, lead to a Service.
    pub fn route_ports(&self, route: &str, service: &Key) -> BTreeSet<u16> {
        let held = RouteKey::of_reported(route).and_then(|key| self.gateway.routes.get(&key));
        let Some(route) = held.map(|held| &held.object) else { return BTreeSet::new() };
        let references = route.rules.iter().flat_map(|rule| &rule.backend_refs);
        let to_it = references.filter(|to| service_of(&route.namespace, to).as_ref() == Some(service));
        to_it.filter_map(port).collect()
    }
}
