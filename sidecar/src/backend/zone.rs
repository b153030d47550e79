//! Which endpoints are near this pod, and when requests leave its zone all the same.
//!
//! In: the endpoints, where this pod runs, what the Service and its policy say. Out: near or not, for each. As
//! kube-proxy does it where only the Service says something; a policy's `Prefer` also looks at how many are left and how
//! busy they are.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::traffic::ZonePolicy;
use crate::config::{Distribution, Endpoint, Endpoints, Place};

/// Requests that leave the zone whatever is near: who never asks far away does not know how busy it is there.
pub(super) const ALWAYS_FAR: f64 = 0.02;
/// Near endpoints take everything while so many of them are left of the most that there were.
const ENOUGH: f64 = 0.7;
/// And while they are at most this much busier than the others.
const BUSIER: f64 = 1.5;
/// The most that there were, in so many spans.
const SPANS: usize = 5;
/// The length of a span: ten minutes in all.
const SPAN: Duration = Duration::from_secs(120);

/// What being near means for the choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Preference {
    /// Nothing.
    #[default]
    None,
    /// Near ones are used while there is one.
    First,
    /// Near ones are used while they can take it.
    Prefer,
    /// Others are not used.
    Only,
}

/// Which endpoints are near, in their order, and what that means.
pub(super) fn near(list: &Endpoints, place: &Place, policy: ZonePolicy) -> (Preference, Vec<bool>) {
    let in_zone = |endpoint: &Endpoint| *endpoint.zone == *place.zone;
    let of =
        |is_near: &dyn Fn(&Endpoint) -> bool| -> Vec<bool> { list.endpoints.iter().map(is_near).collect() };
    match policy {
        _ if place.zone.is_empty() && place.node.is_empty() => (Preference::None, Vec::new()),
        ZonePolicy::Prefer | ZonePolicy::Only if place.zone.is_empty() => (Preference::None, Vec::new()),
        ZonePolicy::Prefer => (Preference::Prefer, of(&in_zone)),
        ZonePolicy::Only => (Preference::Only, of(&in_zone)),
        ZonePolicy::Any => (Preference::None, Vec::new()),
        ZonePolicy::Unset => match list.distribution {
            Distribution::Any => (Preference::None, Vec::new()),
            Distribution::SameZone => (Preference::First, same_zone(list, place)),
            Distribution::SameNode => (Preference::First, same_node(list, place)),
        },
    }
}

/// The endpoints whose hints name this zone, if every endpoint that is ready has hints; else those in it.
fn same_zone(list: &Endpoints, place: &Place) -> Vec<bool> {
    let hinted = hinted(list, &place.zone, |endpoint| &endpoint.for_zones);
    hinted.unwrap_or_else(|| {
        let in_zone = |endpoint: &Endpoint| !place.zone.is_empty() && *endpoint.zone == *place.zone;
        list.endpoints.iter().map(in_zone).collect()
    })
}

/// The same of nodes; where there is none on this node, of the zone.
fn same_node(list: &Endpoints, place: &Place) -> Vec<bool> {
    let hinted = hinted(list, &place.node, |endpoint| &endpoint.for_nodes);
    let near: Vec<bool> = hinted.unwrap_or_else(|| {
        let on_node = |endpoint: &Endpoint| !place.node.is_empty() && *endpoint.node == *place.node;
        list.endpoints.iter().map(on_node).collect()
    });
    let is_ready = |(endpoint, near): (&Endpoint, &bool)| *near && !endpoint.terminating;
    if list.endpoints.iter().zip(&near).any(is_ready) { near } else { same_zone(list, place) }
}

/// What the hints say; `None`: an endpoint that is ready has none, or none of them names `own`.
fn hinted(list: &Endpoints, own: &str, hints: impl Fn(&Endpoint) -> &[Arc<str>]) -> Option<Vec<bool>> {
    let mut ready = list.endpoints.iter().filter(|endpoint| !endpoint.terminating);
    if ready.any(|endpoint| hints(endpoint).is_empty()) {
        return None;
    }
    let names = |endpoint: &Endpoint| hints(endpoint).iter().any(|name| **name == *own);
    let near: Vec<bool> = list.endpoints.iter().map(names).collect();
    near.contains(&true).then_some(near)
}

/// Whether the near ones can no longer take everything. `busy`: requests in flight per endpoint, near and far, where
/// both are known.
pub(super) fn spills(ready: usize, most: usize, busy: Option<(f64, f64)>) -> bool {
    if (ready as f64) < ENOUGH * most as f64 {
        return true;
    }
    // Of one request here and none there nothing follows.
    busy.is_some_and(|(near, far)| near > BUSIER * far.max(1.0))
}

/// The most near endpoints that were ready in the last ten minutes, give or take a span.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    spans: [usize; SPANS],
    at: Instant,
}

impl Most {
    pub(super) fn new(now: Instant) -> Self {
        Self { spans: [0; SPANS], at: now }
    }

    /// The most, of which one is known now.
    pub(super) fn with(&mut self, ready: usize, now: Instant) -> usize {
        let passed = now.duration_since(self.at).as_secs() / SPAN.as_secs();
        if passed > 0 {
            let gone = usize::try_from(passed).unwrap_or(SPANS).min(SPANS);
            self.spans.rotate_right(gone);
            self.spans.iter_mut().take(gone).for_each(|span| *span = 0);
            self.at += SPAN.saturating_mul(u32::try_from(passed).unwrap_or(u32::MAX));
        }
        let [first, ..] = &mut self.spans;
        *first = (*first).max(ready);
        self.spans.iter().copied().max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn endpoint(port: u16, zone: &str, node: &str, for_zones: &[&str]) -> Endpoint {
        Endpoint {
            zone: zone.into(),
            node: node.into(),
            for_zones: for_zones.iter().map(|zone| (*zone).into()).collect(),
            ..Endpoint::at(SocketAddr::from(([10, 0, 0, 1], port)))
        }
    }

    fn near_of(endpoints: Vec<Endpoint>, distribution: Distribution) -> Vec<bool> {
        let place = Place { zone: "a".into(), node: "n1".into() };
        let list = Endpoints { endpoints, distribution, ..Endpoints::default() };
        near(&list, &place, ZonePolicy::Unset).1
    }

    #[test]
    fn a_policy_for_any_zone_overrides_what_the_service_says() {
        let place = Place { zone: "a".into(), node: "n1".into() };
        let endpoints = vec![endpoint(1, "a", "n1", &[]), endpoint(2, "b", "n2", &[])];
        let list = Endpoints { endpoints, distribution: Distribution::SameZone, ..Endpoints::default() };
        assert_eq!(near(&list, &place, ZonePolicy::Unset), (Preference::First, vec![true, false]));
        assert_eq!(near(&list, &place, ZonePolicy::Any), (Preference::None, Vec::new()));
    }

    #[test]
    fn hints_decide_if_every_endpoint_has_them_and_zones_where_not() {
        let hinted = || vec![endpoint(1, "a", "", &["b"]), endpoint(2, "b", "", &["a"])];
        assert_eq!(near_of(hinted(), Distribution::SameZone), [false, true]);
        let mut partly = hinted();
        partly.push(endpoint(3, "b", "", &[]));
        assert_eq!(near_of(partly, Distribution::SameZone), [true, false, false]);
        let elsewhere = vec![endpoint(1, "a", "", &["b"]), endpoint(2, "b", "", &["c"])];
        assert_eq!(near_of(elsewhere, Distribution::SameZone), [true, false], "no hint is for this zone");
    }

    #[test]
    fn where_the_node_has_none_the_zone_serves() {
        let both = vec![endpoint(1, "a", "n1", &[]), endpoint(2, "a", "n2", &[])];
        assert_eq!(near_of(both, Distribution::SameNode), [true, false]);
        let mut ending = endpoint(1, "a", "n1", &[]);
        ending.terminating = true;
        let zone = vec![ending, endpoint(2, "a", "n2", &[]), endpoint(3, "b", "n3", &[])];
        assert_eq!(near_of(zone, Distribution::SameNode), [true, true, false]);
    }

    #[test]
    fn a_pod_that_does_not_know_where_it_runs_prefers_nobody() {
        let list = Endpoints { endpoints: vec![endpoint(1, "", "", &[])], ..Endpoints::default() };
        let nowhere = Place { zone: "".into(), node: "".into() };
        for policy in [ZonePolicy::Unset, ZonePolicy::Any, ZonePolicy::Prefer, ZonePolicy::Only] {
            assert_eq!(near(&list, &nowhere, policy).0, Preference::None);
        }
    }

    #[test]
    fn requests_leave_the_zone_when_few_are_left_or_they_are_much_busier() {
        assert!(!spills(7, 10, None) && spills(6, 10, None));
        assert!(!spills(10, 10, Some((6.0, 4.0))) && spills(10, 10, Some((6.1, 4.0))));
        assert!(!spills(10, 10, Some((1.0, 0.0))));
    }

    #[test]
    fn the_most_is_remembered_for_ten_minutes() {
        let start = Instant::now();
        let at = |minutes: u64| start + Duration::from_secs(60 * minutes);
        let mut most = Most::new(start);
        assert_eq!(most.with(10, at(0)), 10);
        assert_eq!(most.with(4, at(1)), 10);
        assert_eq!([3, 5, 7, 9].map(|minutes| most.with(4, at(minutes))), [10; 4]);
        assert_eq!(most.with(4, at(11)), 4);
        assert_eq!(most.with(6, at(60)), 6, "nobody has asked for long");
    }
}
