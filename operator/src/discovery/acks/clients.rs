//! How far a policy's sections about calls to Services have come.
//!
//! In: the addresses of the Services for which the policy decides something, and the stamps of resources of kind Route.
//! Out: the sidecars that dial one of those addresses or carry a section of the policy, and which of them do not carry
//! out its current generation. Costs the clients of the policy's own Services only.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;

use tulle_mesh::proto::ResourceType;

use super::{AckTracker, Name, Sidecars, lock, name_of};
use crate::model::{Key, Model};

/// What there is to do about a sidecar whose resources carry no sections about calls.
const UNAWARE: &str = "its sidecar is of an earlier version, which does not know these sections: restart the pod to update its sidecar";

/// Acknowledgements of one generation of a policy by the sidecars of clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientAcknowledgement {
    /// Sidecars of clients that the policy concerns.
    pub using: usize,
    /// Those of them that do not carry out this generation everywhere, as `namespace/name` of their pods.
    pub behind: BTreeSet<String>,
    /// Which pod has refused it, and why.
    pub refusal: Option<String>,
}

/// What one sidecar has said, over all its resources.
#[derive(Debug, Default)]
struct Client {
    pod: String,
    behind: bool,
    refusal: Option<String>,
}

/// A generation of a policy.
#[derive(Clone, Copy)]
struct Version<'a> {
    policy: &'a Key,
    uid: &'a str,
    generation: i64,
}

impl AckTracker {
    /// Which sidecars of clients carry out this generation of a policy. `addresses`: of the Services for which it
    /// decides something. A sidecar that dials one of them is waited for also where nothing of the policy has been sent
    /// to it yet.
    pub fn policy_clients(
        &self,
        model: &Model,
        (policy, uid, generation): (&Key, &str, i64),
        addresses: &BTreeSet<SocketAddr>,
    ) -> ClientAcknowledgement {
        let version = Version { policy, uid, generation };
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut clients: BTreeMap<Arc<str>, Client> = BTreeMap::new();
        for (here, other) in [(&*own, &*relayed), (&*relayed, &*own)] {
            here.add_clients(model, other, version, addresses, &mut clients);
        }
        let mut result = ClientAcknowledgement { using: clients.len(), ..ClientAcknowledgement::default() };
        for client in clients.into_values().filter(|client| client.behind) {
            if result.refusal.is_none() {
                result.refusal = client.refusal.map(|reason| format!("pod {}: {reason}", client.pod));
            }
            result.behind.insert(client.pod);
        }
        result
    }
}

impl Sidecars {
    fn add_clients(
        &self,
        model: &Model,
        other: &Self,
        version: Version<'_>,
        addresses: &BTreeSet<SocketAddr>,
        clients: &mut BTreeMap<Arc<str>, Client>,
    ) {
        let dialling = addresses.iter().filter_map(|address| self.by_address.get(address)).flatten();
        let carrying = self.by_policy.get(version.policy).into_iter().flatten();
        let concerned: HashSet<&(Arc<str>, Name)> = dialling.chain(carrying).collect();
        for (uid, name) in concerned {
            let Some((pod, known)) = self.reported(model, other, (uid, name)) else { continue };
            let client = clients.entry(Arc::clone(uid)).or_default();
            let Version { policy, uid, generation } = version;
            if !known.enforces(policy, uid, generation) || known.enforces_another(policy, uid, generation) {
                client.behind = true;
                client.pod = name_of(pod);
                let is_unaware = name.0 == ResourceType::Destination as i32;
                let refused = || known.refused.clone().or_else(|| is_unaware.then(|| UNAWARE.to_owned()));
                client.refusal = client.refusal.take().or_else(refused);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::{Stamp, stamp};

    use super::*;
    use crate::discovery::report::{SidecarEvent, Stamps};
    use crate::model::tests::{key, pod, shop};

    const VIP: &str = "10.96.0.1:80";
    const OTHER: &str = "10.96.0.2:80";

    fn model() -> Model {
        shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r1")])
    }

    fn route(address: &str) -> Name {
        (ResourceType::Route as i32, address.into())
    }

    fn stamps(version: u64) -> Stamps {
        let (namespace, name) = ("shop".into(), "fast".into());
        let kind = stamp::Kind::Policy.into();
        Stamps::from([Stamp { kind, namespace, name, uid: "p".into(), version }])
    }

    fn none() -> Stamps {
        Stamps::from([])
    }

    fn connected() -> AckTracker {
        let acks = AckTracker::default();
        for uid in ["uid-a", "uid-b"] {
            acks.report(uid, SidecarEvent::Connected, |_| {});
        }
        acks
    }

    /// Clients of the Service at [`VIP`], and those of them that are behind.
    fn seen(acks: &AckTracker, generation: i64) -> (usize, Vec<String>) {
        let addresses = BTreeSet::from([VIP.parse().unwrap()]);
        let policy = key("shop", "fast");
        let seen = acks.policy_clients(&model(), (&policy, "p", generation), &addresses);
        (seen.using, seen.behind.into_iter().collect())
    }

    #[test]
    fn whoever_dials_the_service_is_waited_for_before_anything_was_sent_and_nobody_else_is() {
        let acks = connected();
        assert_eq!(seen(&acks, 1), (0, vec![]));
        acks.report("uid-a", SidecarEvent::Acked(route(VIP), none()), |_| {});
        acks.report("uid-b", SidecarEvent::Acked(route(OTHER), none()), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec!["shop/a".to_owned()]));
        acks.report("uid-a", SidecarEvent::Sent(route(VIP), stamps(1)), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec!["shop/a".to_owned()]), "sent is not acknowledged");
        acks.report("uid-a", SidecarEvent::Acked(route(VIP), stamps(1)), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec![]));
        assert_eq!(seen(&acks, 2), (1, vec!["shop/a".to_owned()]));
    }

    #[test]
    fn whoever_carries_the_policy_at_another_address_is_a_client_until_it_has_let_go_of_it() {
        let acks = connected();
        // A route of the Gateway API leads from there to the Service.
        acks.report("uid-b", SidecarEvent::Acked(route(OTHER), stamps(1)), |_| {});
        assert_eq!(seen(&acks, 1), (1, vec![]));
        assert_eq!(seen(&acks, 2), (1, vec!["shop/b".to_owned()]));
        acks.report("uid-b", SidecarEvent::Sent(route(OTHER), none()), |_| {});
        assert_eq!(seen(&acks, 2), (1, vec!["shop/b".to_owned()]), "it still carries out the old one");
        acks.report("uid-b", SidecarEvent::Acked(route(OTHER), none()), |_| {});
        assert_eq!(seen(&acks, 2), (0, vec![]));
        assert!(lock(&acks.own).by_policy.is_empty());
    }

    #[test]
    fn a_refusal_is_told_with_its_pod() {
        let acks = connected();
        let refused = SidecarEvent::Refused(route(VIP), stamps(1), "lacks traffic/v1".into());
        acks.report("uid-a", refused, |_| {});
        let addresses = BTreeSet::from([VIP.parse().unwrap()]);
        let seen = acks.policy_clients(&model(), (&key("shop", "fast"), "p", 1), &addresses);
        assert_eq!(seen.refusal.as_deref(), Some("pod shop/a: lacks traffic/v1"));
    }

    #[test]
    fn a_sidecar_that_knows_no_sections_about_calls_is_not_waited_for_in_silence() {
        let acks = connected();
        let earlier: Name = (ResourceType::Destination as i32, VIP.into());
        acks.report("uid-a", SidecarEvent::Acked(earlier, none()), |_| {});
        let addresses = BTreeSet::from([VIP.parse().unwrap()]);
        let seen = acks.policy_clients(&model(), (&key("shop", "fast"), "p", 1), &addresses);
        assert_eq!((seen.using, seen.behind), (1, BTreeSet::from(["shop/a".to_owned()])));
        assert!(seen.refusal.is_some_and(|why| why.starts_with("pod shop/a: its sidecar is of an earlier")));
    }

    #[test]
    fn what_a_pod_enforces_itself_makes_it_no_client() {
        let acks = connected();
        let mtls: Name = (ResourceType::Mtls as i32, "uid-a".into());
        acks.report("uid-a", SidecarEvent::Acked(mtls, stamps(1)), |_| {});
        assert_eq!(seen(&acks, 2), (0, vec![]));
    }
}
