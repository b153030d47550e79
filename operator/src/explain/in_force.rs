//! What the sidecars work with that are asked about: what they have acknowledged, where it is known that they have something
//! else than they were sent last, and else what they are sent.

use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{self, ResourceName, ResourceType};

use super::World;
use crate::discovery::{Earlier, Name};
use crate::model::Pod;

impl World<'_> {
    /// The body of a resource, as the sidecar of a pod has it, or would get it.
    pub(super) fn body(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Body> {
        if let Some(earlier) = self.earlier(kind, name, pod_uid) {
            return earlier.resource.body.clone();
        }
        let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: name.to_owned() };
        self.model.resource(&name, pod_uid)?.body
    }

    /// What a pod enforces on connections that arrive, all in one.
    pub(super) fn inbound(&self, pod: &Pod) -> Option<proto::Inbound> {
        let of =
            |kind| self.earlier(kind, &pod.uid, &pod.uid).and_then(|earlier| earlier.resource.body.clone());
        if let Some(Body::Inbound(whole)) = of(ResourceType::Inbound) {
            return Some(whole);
        }
        let mut inbound = self.model.inbound(&pod.uid)?;
        if let Some(Body::Mtls(mtls)) = of(ResourceType::Mtls) {
            (inbound.mtls, inbound.mtls_from, inbound.shadow_strict) =
                (mtls.mode, mtls.from, mtls.shadow_strict);
        }
        if let Some(Body::Access(rules)) = of(ResourceType::Access) {
            (inbound.access, inbound.shadow) = (rules.access, rules.shadow);
        }
        Some(inbound)
    }

    fn earlier(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Earlier> {
        let name: Name = (kind.into(), name.into());
        self.acks.earlier(self.model, pod_uid, &name)
    }

    /// Whether the client has earlier rules for what it dials: names and flaws of the present ones are not theirs.
    pub(super) fn has_earlier_route(&self) -> bool {
        self.dialled.address.is_some_and(|address| {
            self.earlier(ResourceType::Route, &address.to_string(), &self.client.pod.uid).is_some()
        })
    }

    /// That the client works with an earlier version of a resource, as the end of a sentence.
    pub(super) fn client_is_behind(&self, kind: ResourceType, name: &str) -> String {
        let pod = self.client.pod;
        let earlier = self.earlier(kind, name, &pod.uid);
        earlier.map(|earlier| behind(pod, &earlier)).unwrap_or_default()
    }

    /// That a server works with an earlier version of one of these, as the end of a sentence.
    pub(super) fn server_is_behind(&self, pod: &Pod, kinds: &[ResourceType]) -> Option<String> {
        let earlier = kinds.iter().find_map(|kind| self.earlier(*kind, &pod.uid, &pod.uid))?;
        Some(behind(pod, &earlier))
    }
}

fn behind(pod: &Pod, earlier: &Earlier) -> String {
    let why = match &earlier.refused {
        Some(why) => format!("it has refused the present one: {why}"),
        None => "it has not acknowledged the present one".to_owned(),
    };
    format!("; pod {}/{} works with an earlier version, because {why}", pod.namespace, pod.name)
}
