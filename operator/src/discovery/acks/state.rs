//! What is known of each sidecar: its build, its certificate, and how far it is with what it was sent.
//!
//! In: what sidecars have said to any replica. Out: one [`SidecarState`] for each pod, for people to read. Nothing is
//! decided by it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tulle_mesh::proto::ResourceType;

use super::{AckTracker, Known, Sidecar, SidecarEvent, Sidecars, lock};
use crate::discovery::report::Name;

/// The sidecar of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SidecarState {
    /// The pod.
    pub pod_uid: Arc<str>,
    /// The version of its build; empty: it has not said so.
    pub version: String,
    /// Whether a stream is up.
    pub connected: bool,
    /// Resources that it enforces in the version that was sent last.
    pub acknowledged: u32,
    /// Resources that were sent, as far as somebody waits for their acknowledgement.
    pub resources: u32,
    /// Since when the oldest resource that it has not answered waits; `None`: it has answered all.
    pub behind_since: Option<Instant>,
    /// Resources that it has refused, each with the reason; sorted.
    pub refused: Vec<String>,
    /// When its certificate ends, in Unix seconds.
    pub certificate_not_after: Option<i64>,
    /// Resident memory of its process in bytes.
    pub memory_bytes: Option<u64>,
    /// The replica that its stream is connected to; `None`: this one.
    pub replica: Option<Arc<str>>,
}

impl AckTracker {
    /// All sidecars that have been heard of, by the uid of their pod. Of one that has been connected to several replicas,
    /// what the replica says that it is connected to now.
    pub fn sidecars(&self) -> Vec<SidecarState> {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let mut found: HashMap<&Arc<str>, &Sidecar> = HashMap::new();
        for sidecars in [&own, &relayed] {
            let sidecars: &Sidecars = sidecars;
            for (uid, sidecar) in &sidecars.by_pod {
                let known = found.entry(uid).or_insert(sidecar);
                if known.streams == 0 && sidecar.streams > 0 {
                    *known = sidecar;
                }
            }
        }
        let mut all: Vec<_> = found.into_iter().map(|(uid, sidecar)| sidecar.state(uid)).collect();
        all.sort_unstable_by(|one, other| one.pod_uid.cmp(&other.pod_uid));
        all
    }

    /// Notes which replica a sidecar is connected to whose reports that replica relays.
    pub fn set_replica(&self, pod_uid: &str, replica: Option<&Arc<str>>) {
        if let Some(sidecar) = lock(&self.relayed).by_pod.get_mut(pod_uid) {
            sidecar.replica = replica.cloned();
        }
    }
}

impl AckTracker {
    /// Discovery streams that this replica has served since it started, also those that have ended. Those of other
    /// replicas are not among them: a leader that takes over hears of all that are open at once.
    pub fn opened_streams(&self) -> u64 {
        lock(&self.own).opened
    }
}

impl Sidecar {
    /// What it has said of itself, for a leader that has just begun.
    pub(super) fn described(&self) -> impl Iterator<Item = SidecarEvent> {
        let version = (!self.version.is_empty()).then(|| SidecarEvent::Version(Arc::clone(&self.version)));
        let not_after = self.certificate_not_after;
        let certificate = (not_after != 0).then_some(SidecarEvent::CertificateEnds(not_after));
        let memory = (self.memory_bytes != 0).then_some(SidecarEvent::Memory(self.memory_bytes));
        version.into_iter().chain(certificate).chain(memory)
    }

    /// Takes over what it says of itself.
    pub(super) fn describe(&mut self, event: SidecarEvent) {
        match event {
            SidecarEvent::Lacks(lacks) => self.lacks = lacks,
            SidecarEvent::Version(version) => self.version = version,
            SidecarEvent::CertificateEnds(at) => self.certificate_not_after = at,
            SidecarEvent::Memory(bytes) => self.memory_bytes = bytes,
            _ => {}
        }
    }

    fn state(&self, pod_uid: &Arc<str>) -> SidecarState {
        let held = || self.resources.iter().filter(|(_, known)| !known.is_over());
        let refused = held().filter_map(|(name, known)| {
            known.refused.as_ref().map(|reason| format!("{}: {reason}", shown(name)))
        });
        let mut refused: Vec<_> = refused.collect();
        refused.sort_unstable();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        SidecarState {
            pod_uid: Arc::clone(pod_uid),
            version: self.version.to_string(),
            connected: self.streams > 0,
            acknowledged: count(held().filter(|(_, known)| known.is_current()).count()),
            resources: count(held().count()),
            behind_since: held().filter_map(|(_, known)| known.behind_since).min(),
            refused,
            certificate_not_after: Some(self.certificate_not_after).filter(|at| *at != 0),
            memory_bytes: Some(self.memory_bytes).filter(|bytes| *bytes != 0),
            replica: self.replica.clone(),
        }
    }
}

impl Known {
    /// Whether it enforces what was sent last.
    fn is_current(&self) -> bool {
        self.acked.is_some() && self.behind_since.is_none() && self.refused.is_none()
    }
}

/// A resource, as people know it: `route 10.96.0.1:80`.
fn shown((kind, name): &Name) -> String {
    let kind = match ResourceType::try_from(*kind) {
        Ok(ResourceType::Inbound) => return "rules of the pod".to_owned(),
        Ok(ResourceType::Workload) => return "workload".to_owned(),
        Ok(ResourceType::Mtls) => return "section mtls".to_owned(),
        Ok(ResourceType::Access) => return "section access".to_owned(),
        Ok(ResourceType::Limits) => return "section limits".to_owned(),
        Ok(ResourceType::Logs) => return "section telemetry".to_owned(),
        Ok(ResourceType::Destination) => "destination",
        Ok(ResourceType::Endpoints) => "endpoints",
        Ok(ResourceType::Route) => "route",
        Ok(ResourceType::Unspecified) | Err(_) => "resource",
    };
    format!("{kind} {name}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::Stamps;

    fn route(address: &str) -> Name {
        (ResourceType::Route as i32, address.into())
    }

    fn none() -> Stamps {
        Stamps::from([])
    }

    fn reported(reports: impl IntoIterator<Item = SidecarEvent>) -> AckTracker {
        let acks = AckTracker::default();
        acks.report("u", SidecarEvent::Connected, |_| {});
        reports.into_iter().for_each(|report| acks.report("u", report, |_| {}));
        acks
    }

    fn only(acks: &AckTracker) -> SidecarState {
        let [state] = <[SidecarState; 1]>::try_from(acks.sidecars()).unwrap();
        state
    }

    #[test]
    fn a_sidecar_shows_its_build_its_certificate_and_what_it_has_answered() {
        let [first, second, third] = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"].map(route);
        let acks = reported([
            SidecarEvent::Version("0.13.0".into()),
            SidecarEvent::CertificateEnds(1_700_000_000),
            SidecarEvent::Memory(9 << 20),
            SidecarEvent::Sent(first.clone(), none()),
            SidecarEvent::Acked(first.clone(), none()),
            SidecarEvent::Sent(second.clone(), none()),
            SidecarEvent::Sent(third.clone(), none()),
            SidecarEvent::Refused(third, none(), "too new".into()),
        ]);
        let state = only(&acks);
        assert_eq!((state.version.as_str(), state.certificate_not_after), ("0.13.0", Some(1_700_000_000)));
        assert_eq!((state.memory_bytes, state.replica.as_deref()), (Some(9 << 20), None));
        assert!(state.connected && state.behind_since.is_some());
        assert_eq!((state.acknowledged, state.resources), (1, 3));
        assert_eq!(state.refused, ["route 10.0.0.3:80: too new"]);
        acks.report("u", SidecarEvent::Acked(second, none()), |_| {});
        let state = only(&acks);
        assert_eq!((state.acknowledged, state.behind_since), (2, None));
        // What it enforced so far is not what was sent last.
        acks.report("u", SidecarEvent::Sent(first, none()), |_| {});
        assert_eq!(only(&acks).acknowledged, 1);
    }

    #[test]
    fn the_oldest_resource_that_waits_counts_and_not_its_newest_version() {
        let acks = reported([SidecarEvent::Sent(route("10.0.0.1:80"), none())]);
        let since = only(&acks).behind_since;
        acks.report("u", SidecarEvent::Sent(route("10.0.0.1:80"), none()), |_| {});
        acks.report("u", SidecarEvent::Sent(route("10.0.0.2:80"), none()), |_| {});
        assert_eq!(only(&acks).behind_since, since);
    }

    #[test]
    fn what_the_replica_says_that_a_sidecar_is_connected_to_is_shown() {
        let acks = reported([SidecarEvent::Version("0.12.0".into()), SidecarEvent::Gone]);
        assert!(!only(&acks).connected);
        acks.relayed("u", SidecarEvent::Connected);
        acks.relayed("u", SidecarEvent::Version("0.13.0".into()));
        acks.set_replica("u", Some(&"operator-1".into()));
        let state = only(&acks);
        assert_eq!((state.version.as_str(), state.connected), ("0.13.0", true));
        assert_eq!(state.replica.as_deref(), Some("operator-1"));
    }

    #[test]
    fn a_second_stream_of_a_connected_sidecar_is_counted_also_when_it_has_ended() {
        let acks = reported([]);
        assert_eq!((acks.connected(), acks.opened_streams()), (1, 1));
        acks.report("u", SidecarEvent::Connected, |_| {});
        acks.report("u", SidecarEvent::Gone, |_| {});
        acks.relayed("v", SidecarEvent::Connected);
        assert_eq!((acks.connected(), acks.opened_streams()), (2, 2));
    }

    #[test]
    fn a_new_leader_is_told_the_version_the_certificate_and_the_memory() {
        let acks = reported([
            SidecarEvent::Version("0.13.0".into()),
            SidecarEvent::CertificateEnds(7),
            SidecarEvent::Memory(8),
        ]);
        let successor = AckTracker::default();
        acks.snapshot(
            |_| true,
            |known| known.into_iter().for_each(|(uid, event)| successor.relayed(&uid, event)),
        );
        assert_eq!(acks.sidecars(), successor.sidecars());
    }
}
