//! What a replica tells a new leader of its sidecars at first.

use std::sync::Arc;

use super::{AckTracker, SidecarEvent, Stamps, lock};

impl AckTracker {
    /// Everything that is known of those of this replica's own sidecars that are `wanted`, for a leader that
    /// has just begun, with `then` carried out before the next report.
    pub fn snapshot(&self, wanted: impl Fn(&str) -> bool, then: impl FnOnce(Vec<(Arc<str>, SidecarEvent)>)) {
        let own = lock(&self.own);
        let mut all = Vec::new();
        for (uid, sidecar) in own.by_pod.iter().filter(|(uid, sidecar)| sidecar.streams > 0 && wanted(uid)) {
            all.extend((0..sidecar.streams).map(|_| (Arc::clone(uid), SidecarEvent::Connected)));
            if !sidecar.lacks.is_empty() {
                all.push((Arc::clone(uid), SidecarEvent::Lacks(sidecar.lacks.clone())));
            }
            all.extend(sidecar.described().map(|event| (Arc::clone(uid), event)));
            for (name, known) in sidecar.resources.iter().filter(|(_, known)| !known.is_over()) {
                let acked = known.acked.clone().map(|stamps| SidecarEvent::Acked(name.clone(), stamps));
                let sent = known.sent.clone().filter(|_| known.sent != known.acked);
                let sent = sent.map(|stamps| SidecarEvent::Sent(name.clone(), stamps));
                let refused = known.refused.clone().map(|reason| {
                    SidecarEvent::Refused(
                        name.clone(),
                        known.sent.clone().unwrap_or_else(|| Stamps::from([])),
                        reason,
                    )
                });
                let enforces = known.enforces.as_deref().cloned();
                let enforces = enforces.map(|enforced| SidecarEvent::Enforces(name.clone(), Some(enforced)));
                all.extend(
                    [acked, sent, refused, enforces]
                        .into_iter()
                        .flatten()
                        .map(|event| (Arc::clone(uid), event)),
                );
            }
        }
        then(all);
    }
}
