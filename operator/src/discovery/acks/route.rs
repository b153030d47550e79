//! How far a generation of a route of the Gateway API has come.
//!
//! In: the stamps of kind `Route` that resources carry, and the addresses at which a route holds. Out: for one route, the
//! sidecars that hold rules of it, and those that do not enforce its current generation. One of an earlier version, which
//! is sent no rules, is behind for as long as it dials such an address. Costs the route's own clients only.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tulle_mesh::proto::{ResourceType, stamp};

use super::{AckTracker, Known, Name, Sidecars, is_of, lock, name_of};
use crate::discovery::report::resource_name;
use crate::model::{Key, Model, Variant};

/// What there is to do about a sidecar whose resources carry no rules of routes.
const UNAWARE: &str =
    "its sidecar is of an earlier version, which does not know routes: restart the pod to update its sidecar";

/// Acknowledgements of one generation of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteAcknowledgement {
    /// Sidecars that enforce rules of the route, of any generation, or were sent some, or should be and cannot.
    pub holding: usize,
    /// Those of them that do not enforce this generation everywhere, as `namespace/name` of their pods.
    pub behind: BTreeSet<String>,
    /// Which pod has refused it, and why.
    pub refusal: Option<String>,
    /// When the last of the others acknowledged it.
    pub last: Option<Instant>,
}

/// What one sidecar has said about a route, over all its resources.
#[derive(Debug, Default)]
struct Holder {
    pod: String,
    behind: bool,
    refusal: Option<String>,
    last: Option<Instant>,
}

impl AckTracker {
    /// How many sidecars hold this route, its kind before its name, and which of them do not enforce this generation. A
    /// sidecar that is not heard of counts with what it last said. `addresses`: where the route holds, and the variant
    /// that the clients concerned get there.
    pub fn route(
        &self,
        model: &Model,
        (route, uid, generation): (&Key, &str, i64),
        addresses: &[(SocketAddr, Variant)],
    ) -> RouteAcknowledgement {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut holders: BTreeMap<Arc<str>, Holder> = BTreeMap::new();
        for (here, other) in [(&*own, &*relayed), (&*relayed, &*own)] {
            here.add_holders(model, other, (route, uid, generation), &mut holders);
            here.add_unaware(model, other, addresses, &mut holders);
        }
        let mut result = RouteAcknowledgement { holding: holders.len(), ..RouteAcknowledgement::default() };
        for holder in holders.into_values() {
            if holder.behind {
                if result.refusal.is_none() {
                    result.refusal = holder.refusal.map(|reason| format!("pod {}: {reason}", holder.pod));
                }
                result.behind.insert(holder.pod);
            } else {
                result.last = result.last.max(holder.last);
            }
        }
        result
    }

    /// Routes, with their kind before their name, of which sidecars have reported something since the last call.
    pub fn take_changed_routes(&self) -> HashSet<Key> {
        let mut changed = std::mem::take(&mut lock(&self.own).changed_routes);
        changed.extend(std::mem::take(&mut lock(&self.relayed).changed_routes));
        changed
    }
}

impl Sidecars {
    fn add_holders(
        &self,
        model: &Model,
        other: &Self,
        (route, uid, generation): (&Key, &str, i64),
        holders: &mut BTreeMap<Arc<str>, Holder>,
    ) {
        for (pod_uid, name) in self.by_route.get(route).into_iter().flatten() {
            let Some((pod, known)) = self.reported(model, other, (pod_uid, name)) else { continue };
            let holder = holders.entry(Arc::clone(pod_uid)).or_default();
            if known.enforces_route(route, uid, generation) {
                holder.last = holder.last.max(known.acked_at);
            } else {
                holder.behind = true;
                // Of thousands that are not behind, no name is made.
                holder.pod = name_of(pod);
                holder.refusal = holder.refusal.take().or_else(|| known.refused.clone());
            }
        }
    }
}

impl Sidecars {
    /// Sidecars that are sent where the route's addresses lead without any rules.
    fn add_unaware(
        &self,
        model: &Model,
        other: &Self,
        addresses: &[(SocketAddr, Variant)],
        holders: &mut BTreeMap<Arc<str>, Holder>,
    ) {
        for (address, variant) in addresses {
            let dialling = self.by_address.get(address).into_iter().flatten();
            for (pod_uid, name) in dialling.filter(|(_, name)| name.0 == ResourceType::Destination as i32) {
                let known = self.by_pod.get(pod_uid).and_then(|sidecar| sidecar.resources.get(name));
                if known.is_none_or(Known::is_over) {
                    continue;
                }
                let Some(pod) = self.concerned(model, pod_uid, other) else { continue };
                // As a sidecar of this version would subscribe to it.
                let route: Name = (ResourceType::Route as i32, Arc::clone(&name.1));
                if model.variant(&resource_name(&route), pod_uid) != *variant {
                    continue;
                }
                let holder = holders.entry(Arc::clone(pod_uid)).or_default();
                holder.behind = true;
                holder.pod = name_of(pod);
                holder.refusal.get_or_insert_with(|| UNAWARE.to_owned());
            }
        }
    }
}

impl Known {
    fn enforces_route(&self, route: &Key, uid: &str, generation: i64) -> bool {
        let mut stamps = self.acked.as_deref().unwrap_or_default().iter();
        let its = stamps.find(|stamp| is_of(stamp, stamp::Kind::Route, route));
        its.is_some_and(|stamp| stamp.uid == uid && i64::try_from(stamp.version) == Ok(generation))
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::Stamp;

    use super::*;
    use crate::discovery::report::{SidecarEvent, Stamps};
    use crate::model::gateway::Standings;
    use crate::model::tests::{key, pod, route, shop};

    fn model() -> Model {
        shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])
    }

    fn address(text: &str) -> Name {
        (ResourceType::Route as i32, text.into())
    }

    fn stamps(uid: &str, version: u64) -> Stamps {
        let (namespace, name) = ("shop".into(), "HTTPRoute/web".into());
        Stamps::from([Stamp { kind: stamp::Kind::Route.into(), namespace, name, uid: uid.into(), version }])
    }

    fn none() -> Stamps {
        Stamps::from([])
    }

    fn web() -> Key {
        key("shop", "HTTPRoute/web")
    }

    fn seen(acks: &AckTracker, generation: i64) -> (usize, Vec<String>) {
        let seen = acks.route(&model(), (&web(), "u", generation), &[]);
        (seen.holding, seen.behind.into_iter().collect())
    }

    fn connected() -> AckTracker {
        let acks = AckTracker::default();
        for uid in ["uid-a", "uid-b"] {
            acks.report(uid, SidecarEvent::Connected, |_| {});
        }
        acks
    }

    #[test]
    fn only_sidecars_that_hold_a_route_are_counted_and_those_behind_are_named() {
        let acks = connected();
        let one = address("10.96.0.1:80");
        assert_eq!(seen(&acks, 1), (0, vec![]), "nobody uses it");
        acks.report("uid-a", SidecarEvent::Sent(one.clone(), stamps("u", 1)), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec!["shop/a".to_owned()]));
        acks.report("uid-a", SidecarEvent::Acked(one.clone(), stamps("u", 1)), |_| {});
        acks.report("uid-b", SidecarEvent::Sent(one.clone(), stamps("u", 1)), |_| {});
        assert_eq!(seen(&acks, 1), (2, vec!["shop/b".to_owned()]));
        acks.report("uid-b", SidecarEvent::Acked(one, stamps("u", 1)), |_| {});
        assert_eq!(seen(&acks, 1), (2, vec![]));
        assert_eq!(seen(&acks, 2).1.len(), 2, "generation 2 is not even compiled");
        assert!(acks.route(&model(), (&web(), "u", 1), &[]).last.is_some());
    }

    #[test]
    fn a_route_of_the_same_name_made_anew_is_not_the_acknowledged_one() {
        let acks = connected();
        acks.report("uid-a", SidecarEvent::Acked(address("10.96.0.1:80"), stamps("old", 1)), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec!["shop/a".to_owned()]));
    }

    #[test]
    fn a_sidecar_is_behind_while_any_of_its_addresses_is_and_until_it_has_let_go_of_the_route() {
        let acks = connected();
        let [one, two] = ["10.96.0.1:80", "10.96.0.2:80"].map(address);
        acks.report("uid-a", SidecarEvent::Acked(one.clone(), stamps("u", 1)), |_| {});
        acks.report("uid-a", SidecarEvent::Acked(two.clone(), stamps("u", 1)), |_| {});
        acks.report("uid-a", SidecarEvent::Acked(one.clone(), stamps("u", 2)), |_| {});
        assert_eq!(seen(&acks, 2), (1, vec!["shop/a".to_owned()]));
        // Generation 2 has nothing to do with the second address.
        acks.report("uid-a", SidecarEvent::Sent(two.clone(), none()), |_| {});
        assert_eq!(seen(&acks, 2).1.len(), 1, "it still enforces the old rules there");
        acks.report("uid-a", SidecarEvent::Acked(two, none()), |_| {});
        assert_eq!(seen(&acks, 2), (1, vec![]));
        acks.report("uid-a", SidecarEvent::Unsubscribed(one), |_| {});
        assert_eq!(seen(&acks, 2), (0, vec![]));
        assert!(lock(&acks.own).by_route.is_empty());
    }

    #[test]
    fn a_refusal_is_told_with_the_pod_that_it_comes_from() {
        let acks = connected();
        let refused = SidecarEvent::Refused(address("10.96.0.1:80"), stamps("u", 1), "too new".into());
        acks.report("uid-a", refused, |_| {});
        let seen = acks.route(&model(), (&web(), "u", 1), &[]);
        assert_eq!(seen.refusal.as_deref(), Some("pod shop/a: too new"));
        assert_eq!(seen.last, None);
    }

    #[test]
    fn a_sidecar_that_knows_no_routes_is_behind_where_one_holds_for_it() {
        let acks = connected();
        let dialled = "10.96.0.1:80";
        acks.report("uid-a", SidecarEvent::Acked(address(dialled), stamps("u", 1)), |_| {});
        let earlier: Name = (ResourceType::Destination as i32, dialled.into());
        acks.report("uid-b", SidecarEvent::Acked(earlier.clone(), none()), |_| {});
        let of = |namespace: &str| {
            let mut model = model();
            let one = route("web", namespace, "web", "web");
            model.apply_route(one.clone());
            let addresses = model.route_addresses(&one.key(), &mut Standings::default());
            acks.route(&model, (&web(), "u", 1), &addresses)
        };
        let seen = of("shop");
        assert_eq!((seen.holding, seen.behind), (2, BTreeSet::from(["shop/b".to_owned()])));
        let advice = seen.refusal.unwrap();
        assert!(advice.starts_with("pod shop/b: its sidecar is of an earlier version"), "{advice}");
        assert_eq!(of("team").behind, BTreeSet::new(), "the route is for clients in another namespace");
        acks.report("uid-b", SidecarEvent::Unsubscribed(earlier), |_| {});
        assert_eq!(of("shop").behind, BTreeSet::new());
    }

    #[test]
    fn a_pod_that_is_gone_is_not_waited_for() {
        let acks = connected();
        acks.report("uid-b", SidecarEvent::Sent(address("10.96.0.1:80"), stamps("u", 1)), |_| {});
        let mut model = model();
        model.delete_pod("uid-b");
        let seen = acks.route(&model, (&web(), "u", 1), &[]);
        assert_eq!(seen, RouteAcknowledgement::default());
    }

    #[test]
    fn routes_that_sidecars_report_about_are_told_once() {
        let acks = connected();
        let web = web();
        acks.report("uid-a", SidecarEvent::Acked(address("10.96.0.1:80"), stamps("u", 1)), |_| {});
        acks.relayed("uid-b", SidecarEvent::Connected);
        acks.relayed("uid-b", SidecarEvent::Acked(address("10.96.0.1:80"), none()));
        assert_eq!(acks.take_changed_routes(), HashSet::from([web.clone()]));
        assert!(acks.take_changed_routes().is_empty());
        acks.report("uid-a", SidecarEvent::Acked(address("10.96.0.1:80"), none()), |_| {});
        assert_eq!(acks.take_changed_routes(), HashSet::from([web]), "it was let go");
    }
}
