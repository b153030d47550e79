//! What a sidecar enforces in place of the version that it was sent last.

use std::sync::{Arc, Weak};

use tulle_mesh::proto::Resource;

use super::{AckTracker, Model, Name, SidecarEvent, Sidecars, lock};
use crate::discovery::report::Enforced;

/// Versions that are noted before those are forgotten that nobody enforces any more.
const MANY: usize = 1_000;

/// That a sidecar has not taken a version.
#[derive(Clone, Debug, PartialEq)]
pub struct Behind {
    /// What it enforces instead.
    pub enforced: Enforced,
    /// Why it has refused a version; `None`: it has not answered.
    pub refused: Option<String>,
}

impl AckTracker {
    /// What a pod's sidecar enforces of a resource, where that is not the version that it was sent last. Of one without a
    /// stream ([`Self::is_lost`]), as far as it is known.
    pub fn behind(&self, model: &Model, pod_uid: &str, name: &Name) -> Option<Behind> {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let any_connected = own.has_stream(pod_uid) || relayed.has_stream(pod_uid);
        [(&*own, &*relayed), (&*relayed, &*own)].into_iter().find_map(|(here, other)| {
            let (_, known) = here.reported(model, other, (pod_uid, name))?;
            let enforced =
                known.enforces.as_deref().cloned().filter(|_| here.has_stream(pod_uid) || !any_connected)?;
            Some(Behind { enforced, refused: known.refused.clone() })
        })
    }

    /// Whether a sidecar has been connected, and is not any more: what it was sent last is not known to be the present.
    pub fn is_lost(&self, pod_uid: &str) -> bool {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        let is_known = own.by_pod.contains_key(pod_uid) || relayed.by_pod.contains_key(pod_uid);
        is_known && !own.has_stream(pod_uid) && !relayed.has_stream(pod_uid)
    }

    /// A stream of a sidecar of this replica has begun. Its numbers ascend.
    pub fn begins(&self, pod_uid: &str, stream: u64) {
        if let Some(sidecar) = lock(&self.own).by_pod.get_mut(pod_uid) {
            sidecar.newest = sidecar.newest.max(stream);
        }
    }

    /// Takes what one of this replica's sidecars enforces, from its newest stream only: what an older one has not been
    /// answered, the newer one may have been. As with [`Self::report`], `pass_on` sees it.
    pub fn enforces(
        &self,
        (pod_uid, stream): (&str, u64),
        (name, enforced): (&Name, Option<Enforced>),
        pass_on: impl FnOnce(SidecarEvent),
    ) {
        let mut own = lock(&self.own);
        if own.by_pod.get(pod_uid).is_some_and(|sidecar| sidecar.newest == stream) {
            let event = SidecarEvent::Enforces(name.clone(), enforced);
            own.take(pod_uid, event.clone());
            pass_on(event);
        }
    }

    /// Shares an earlier version with the other sidecars that enforce it: a thousand that are behind keep one copy.
    pub(super) fn interned(&self, event: SidecarEvent) -> SidecarEvent {
        let SidecarEvent::Enforces(name, Some(Enforced::Earlier(resource))) = event else { return event };
        let mut known = lock(&self.earlier);
        if known.len() >= MANY {
            known.retain(|_, resource| resource.strong_count() > 0);
        }
        let of = (name.clone(), resource.version.clone());
        let shared = known.get(&of).and_then(Weak::upgrade).unwrap_or(resource);
        known.insert(of, Arc::downgrade(&shared));
        SidecarEvent::Enforces(name, Some(Enforced::Earlier(shared)))
    }

    /// What an earlier stream has said that a sidecar enforces of a resource, to this replica or another; of the other, only
    /// this version. Whether it was to this one.
    pub fn kept(&self, pod_uid: &str, name: &Name, version: &str) -> (Option<Arc<Resource>>, bool) {
        let of = |sidecars: &Sidecars| {
            let known = sidecars.by_pod.get(pod_uid).and_then(|sidecar| sidecar.resources.get(name));
            known.and_then(|known| known.enforces.as_deref().cloned())
        };
        let (own, relayed) = (of(&lock(&self.own)), of(&lock(&self.relayed)));
        let is_own = own.is_some();
        let found = [own, relayed].into_iter().flatten().find_map(|enforced| match enforced {
            Enforced::Earlier(resource) if resource.version == version => Some(resource),
            _ => None,
        });
        (found, is_own)
    }
}

impl Sidecars {
    fn has_stream(&self, pod_uid: &str) -> bool {
        self.by_pod.get(pod_uid).is_some_and(|sidecar| sidecar.streams > 0)
    }
}
