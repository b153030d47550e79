//! Rules of routes as people find them in the objects, and which of them are not in force as they are written.

use tulle_mesh::proto;

use super::{World, words};
use crate::model::gateway::{RouteKey, RouteKind};

/// Routes that an answer names at most for rules that are left out.
const NAMED: usize = 3;

/// The route that a rule is of.
pub(super) fn reference_of<'r>(
    rules: &'r proto::Rules,
    rule: &proto::RouteRule,
) -> Option<(&'r proto::RouteRef, &'r proto::ObjectRef)> {
    let reference = usize::try_from(rule.route).ok().and_then(|number| rules.routes.get(number))?;
    Some((reference, reference.object.as_ref()?))
}

/// The key of a route.
pub(super) fn key_of(reference: &proto::RouteRef, object: &proto::ObjectRef) -> Option<RouteKey> {
    let kind = RouteKind::of(reference.kind())?;
    Some(RouteKey { kind, namespace: object.namespace.as_str().into(), name: object.name.as_str().into() })
}

/// A rule as its place and its name.
pub(super) fn name_of(
    world: &World<'_>,
    rules: &proto::Rules,
    number: usize,
    rule: &proto::RouteRule,
) -> String {
    let name = if rule.name.is_empty() { String::new() } else { format!(" ({})", rule.name) };
    format!("rules[{}]{name}", index_of(world, rules, number, rule))
}

/// Rules are numbered within their own route, from 0, as in conditions of the route's status and in `tulle routes`.
fn index_of(world: &World<'_>, rules: &proto::Rules, number: usize, rule: &proto::RouteRule) -> usize {
    let before = rules.rules.iter().take(number).filter(|other| other.route == rule.route).count();
    if world.has_earlier_route() {
        return before;
    }
    let key = reference_of(rules, rule).and_then(|(reference, object)| key_of(reference, object));
    key.and_then(|key| world.model.rule_index(&key, before)).unwrap_or(before)
}

/// Why a rule answers every request with an error, as the status of its route says it. `None`: it is in force as it is
/// written.
pub(super) fn flaw_of(
    world: &World<'_>,
    rules: &proto::Rules,
    number: usize,
    rule: &proto::RouteRule,
) -> Option<String> {
    if world.has_earlier_route() {
        return None;
    }
    let (reference, object) = reference_of(rules, rule)?;
    let index = index_of(world, rules, number, rule);
    let flawed = world.model.flawed_rules(&key_of(reference, object)?);
    flawed.into_iter().find(|flawed| flawed.index == index).map(|flawed| flawed.text)
}

/// The rules that sidecars were not sent, as the end of a sentence: a request that was meant for one of them goes
/// elsewhere.
pub(super) fn left_out(world: &World<'_>, rules: &proto::Rules) -> String {
    if world.has_earlier_route() {
        return String::new();
    }
    let of = |reference: &proto::RouteRef| {
        let object = reference.object.as_ref()?;
        let flawed = world.model.flawed_rules(&key_of(reference, object)?);
        let texts: Vec<String> =
            flawed.into_iter().filter(|rule| rule.left_out).map(|rule| rule.text).collect();
        let first = texts.first()?;
        let more = match texts.len().saturating_sub(1) {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let route = words::object(words::route_kind(reference.kind()), object);
        Some(format!("; left out of {route}: {first}{more}"))
    };
    rules.routes.iter().filter_map(of).take(NAMED).collect()
}
