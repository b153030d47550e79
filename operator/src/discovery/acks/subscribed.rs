//! What a sidecar has subscribed to, as far as this replica has heard.

use std::collections::BTreeSet;

use super::{AckTracker, Name, Sidecar, lock};

impl AckTracker {
    /// The resources that a pod's sidecar has subscribed to: every address that it dials, and of the others those whose
    /// acknowledgement somebody waits for. If it has been connected to several replicas, only
    /// the record of the present connection counts.
    pub fn subscribed(&self, pod_uid: &str) -> BTreeSet<Name> {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let known = [own.by_pod.get(pod_uid), relayed.by_pod.get(pod_uid)];
        let is_connected = |sidecar: &Sidecar| sidecar.streams > 0;
        let any_connected = known.into_iter().flatten().any(is_connected);
        let mut names = BTreeSet::new();
        for sidecar in known.into_iter().flatten() {
            if is_connected(sidecar) || !any_connected {
                let held = sidecar.resources.iter().filter(|(_, known)| !known.is_over());
                names.extend(held.map(|(name, _)| name.clone()));
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    use tulle_mesh::proto::ResourceType;

    use super::*;
    use crate::discovery::{SidecarEvent, Stamps};

    fn route(address: &str) -> Name {
        (ResourceType::Route as i32, address.into())
    }

    #[test]
    fn what_a_sidecar_has_left_or_told_another_replica_before_is_not_among_its_subscriptions() {
        let acks = AckTracker::default();
        let [first, second, third] = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(route);
        let sent = |name: &Name| SidecarEvent::Sent(name.clone(), Stamps::from([]));
        acks.report("u", SidecarEvent::Connected, |_| {});
        acks.report("u", sent(&first), |_| {});
        acks.report("u", sent(&second), |_| {});
        acks.report("u", SidecarEvent::Unsubscribed(second), |_| {});
        assert_eq!(acks.subscribed("u"), [first.clone()].into());
        acks.report("u", SidecarEvent::Gone, |_| {});
        assert_eq!(acks.subscribed("u"), [first].into(), "it goes on using that");
        acks.relayed("u", SidecarEvent::Connected);
        acks.relayed("u", sent(&third));
        assert_eq!(acks.subscribed("u"), [third].into());
        assert!(acks.subscribed("other").is_empty());
    }
}
