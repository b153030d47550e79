//! What the sidecars work with that are asked about: what they have acknowledged, where it is known that they have something
//! else than they were sent last, and else what they are sent.

use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;
use tulle_mesh::proto::{self, Endpoint, ResourceName, ResourceType};

use super::World;
use crate::discovery::{Behind, Enforced, Name};
use crate::model::Pod;

/// What has to be said of a stage because a sidecar has not taken what it was sent last.
#[derive(Debug, Default)]
pub(super) struct Remark {
    /// The end of a sentence.
    pub(super) text: String,
    /// What the sidecar works with is not known, so the stage may decide otherwise.
    pub(super) is_open: bool,
}

impl World<'_> {
    /// The body of a resource, as the sidecar of a pod has it, or would get it.
    pub(super) fn body(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Body> {
        match self.enforced(kind, name, pod_uid) {
            Some(Enforced::Earlier(resource)) => resource.body.clone(),
            Some(Enforced::Nothing) => self.without(kind, name, pod_uid),
            _ => self.present(kind, name, pod_uid),
        }
    }

    fn present(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Body> {
        let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: name.to_owned() };
        self.model.resource(&name, pod_uid)?.body
    }

    /// What a sidecar works with that has refused the first version of a resource: of a route, where the address leads.
    fn without(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Body> {
        match self.present(kind, name, pod_uid)? {
            Body::Route(proto::Route { kind: Some(Kind::Service(service)) })
                if kind == ResourceType::Route =>
            {
                let service = proto::ServiceRoute { rules: None, traffic: None, shadow: None, ..service };
                Some(Body::Route(proto::Route { kind: Some(Kind::Service(service)) }))
            }
            route @ Body::Route(_) => Some(route),
            _ => None,
        }
    }

    /// What a pod enforces on connections that arrive, all in one.
    pub(super) fn inbound(&self, pod: &Pod) -> Option<proto::Inbound> {
        let of = |kind| self.enforced(kind, &pod.uid, &pod.uid);
        let earlier = |kind| match of(kind) {
            Some(Enforced::Earlier(resource)) => resource.body.clone(),
            _ => None,
        };
        if let Some(Body::Inbound(whole)) = earlier(ResourceType::Inbound) {
            return Some(whole);
        }
        let mut inbound = self.model.inbound(&pod.uid)?;
        if let Some(Body::Mtls(mtls)) = earlier(ResourceType::Mtls) {
            (inbound.mtls, inbound.mtls_from, inbound.shadow_strict) =
                (mtls.mode, mtls.from, mtls.shadow_strict);
        }
        if let Some(Body::Access(rules)) = earlier(ResourceType::Access) {
            (inbound.access, inbound.shadow) = (rules.access, rules.shadow);
        }
        // A sidecar that has never had a section that it can read lets nobody in that it might keep out.
        if of(ResourceType::Mtls) == Some(Enforced::Nothing) {
            inbound.set_mtls(proto::MtlsMode::Strict);
        }
        if of(ResourceType::Access) == Some(Enforced::Nothing) {
            inbound.access = Some(proto::Access { has_allow: true, ..proto::Access::default() });
        }
        Some(inbound)
    }

    fn behind(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Behind> {
        let name: Name = (kind.into(), name.into());
        self.acks.behind(self.model, pod_uid, &name)
    }

    fn enforced(&self, kind: ResourceType, name: &str, pod_uid: &str) -> Option<Enforced> {
        self.behind(kind, name, pod_uid).map(|behind| behind.enforced)
    }

    /// Whether the client has other rules for what it dials than the present ones, whose names and flaws are not theirs.
    pub(super) fn has_earlier_route(&self) -> bool {
        self.dialled.address.is_some_and(|address| {
            let enforced = self.enforced(ResourceType::Route, &address.to_string(), &self.client.pod.uid);
            matches!(enforced, Some(Enforced::Earlier(_)))
        })
    }

    /// Whether the client has other endpoints than the present ones.
    pub(super) fn has_earlier_endpoints(&self, name: &str) -> bool {
        let enforced = self.enforced(ResourceType::Endpoints, name, &self.client.pod.uid);
        matches!(enforced, Some(Enforced::Earlier(_) | Enforced::Nothing))
    }

    /// Whether the client's sidecar has been told that what it dials is nothing in the cluster, and nothing since.
    pub(super) fn takes_for_foreign(&self) -> bool {
        let Some(address) = self.dialled.address.map(|address| address.to_string()) else { return false };
        let Some(Enforced::Earlier(resource)) =
            self.enforced(ResourceType::Route, &address, &self.client.pod.uid)
        else {
            return false;
        };
        !matches!(
            &resource.body,
            Some(Body::Route(proto::Route { kind: Some(Kind::Service(_) | Kind::Pod(_)) }))
        )
    }

    /// What is to be said of a resource of the client.
    pub(super) fn client_is_behind(&self, kind: ResourceType, name: &str) -> Remark {
        let pod = self.client.pod;
        self.behind(kind, name, &pod.uid).map(|behind| remark(pod, &behind)).unwrap_or_default()
    }

    /// What is to be said of a server that is behind with one of these.
    pub(super) fn server_is_behind(&self, pod: &Pod, kinds: &[ResourceType]) -> Option<Remark> {
        let behind = kinds.iter().find_map(|kind| self.behind(*kind, &pod.uid, &pod.uid))?;
        Some(remark(pod, &behind))
    }

    /// What is to be said of a pod whose sidecar is not connected any more.
    pub(super) fn is_lost(&self, pod: &Pod) -> Option<Remark> {
        let text = format!(
            "; the sidecar of pod {}/{} is not connected to the operator, and works with what it had",
            pod.namespace, pod.name
        );
        (super::is_meshed(pod) && self.acks.is_lost(&pod.uid)).then_some(Remark { text, is_open: true })
    }

    /// Whether an endpoint may be looked at. An address of no pod may, since it is in a slice of the Service; one of a pod
    /// that is gone, where the namespace of its identity may.
    pub(super) fn shows_endpoint(&self, endpoint: &Endpoint) -> bool {
        match self.model.pod(&endpoint.pod_uid) {
            Some(pod) => self.shows(&pod.namespace),
            None => {
                endpoint.identity.parse().is_ok_and(|id: WorkloadId| self.shows(&id.namespace))
                    || endpoint.identity.is_empty()
            }
        }
    }
}

fn remark(pod: &Pod, behind: &Behind) -> Remark {
    let why = match &behind.refused {
        Some(why) => format!("because it has refused a later one: {why}"),
        None => "because it has not acknowledged the present one".to_owned(),
    };
    let pod = format!("{}/{}", pod.namespace, pod.name);
    let text = match &behind.enforced {
        Enforced::Earlier(_) => format!("; pod {pod} works with an earlier version, {why}"),
        Enforced::Unknown => format!(
            "; pod {pod} works with an earlier version that this operator does not have, {why}; what is said is about the \
             present one"
        ),
        Enforced::Nothing => format!("; pod {pod} works without, {why}"),
    };
    Remark { text, is_open: matches!(behind.enforced, Enforced::Unknown) }
}
