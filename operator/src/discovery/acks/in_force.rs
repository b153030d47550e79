//! What a sidecar enforces in place of the version that it was sent last.

use std::sync::Arc;

use tulle_mesh::proto::Resource;

use super::{AckTracker, Model, Name, lock};

/// A version that is enforced although a later one was sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Earlier {
    /// The version.
    pub resource: Arc<Resource>,
    /// Why the sidecar has refused the later one; `None`: it has not answered.
    pub refused: Option<String>,
}

impl AckTracker {
    /// What a pod's sidecar enforces of a resource, where that is not the version that it was sent last. `None`: it enforces
    /// that, has nothing, or what it has is not known.
    pub fn earlier(&self, model: &Model, pod_uid: &str, name: &Name) -> Option<Earlier> {
        let (own, relayed) = (lock(&self.own), lock(&self.relayed));
        [(&*own, &*relayed), (&*relayed, &*own)].into_iter().find_map(|(here, other)| {
            let (_, known) = here.reported(model, other, (pod_uid, name))?;
            let resource = Arc::clone(known.enforces_earlier.as_ref()?);
            Some(Earlier { resource, refused: known.refused.clone() })
        })
    }
}
