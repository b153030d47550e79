//! Resources for sidecars. A version is a digest of the content, so that every replica gives the
//! same resource the same version and a reconnect is not a full push.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;

use prost::Message as _;
use tulle_crds::{MeshPolicySpec, MtlsMode, TargetKind};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::{features, proto};

use super::address::Owner;
use super::object::{Endpoint, ServicePort};
use super::touched::{Compiled, Dependency, Variant};
use super::{Key, Model, Pod, Service};

impl Model {
    /// The resource of this name, for the sidecar of a pod. `None`: there is no such pod.
    pub fn resource(&self, name: &proto::ResourceName, pod_uid: &str) -> Option<proto::Resource> {
        self.compile(name, &self.variant(name, pod_uid)).map(|compiled| compiled.resource)
    }

    /// Which variant of a resource a pod's sidecar gets.
    pub fn variant(&self, name: &proto::ResourceName, pod_uid: &str) -> Variant {
        if name.r#type() != proto::ResourceType::Destination {
            return Variant::default();
        }
        let local = name.name.parse().is_ok_and(
            |address: SocketAddr| matches!(self.owner(address), Owner::Service(_, service) if service.local_only),
        );
        let pod = self.pods.get(pod_uid).filter(|_| local);
        Variant(pod.map(|pod| Arc::clone(&pod.node)))
    }

    /// The resource of this name, for all sidecars of this variant. The name of an inbound resource is the pod's
    /// uid. `None`: there is no such pod, or the name is none.
    pub fn compile(&self, name: &proto::ResourceName, variant: &Variant) -> Option<Compiled> {
        match name.r#type() {
            proto::ResourceType::Inbound => self.compile_inbound(name),
            proto::ResourceType::Destination => self.compile_destination(name, variant),
            proto::ResourceType::Unspecified => None,
        }
    }

    fn compile_inbound(&self, name: &proto::ResourceName) -> Option<Compiled> {
        let pod = self.pods.get(name.name.as_str())?;
        let inbound = self.inbound(&pod.uid)?;
        let shadow = inbound.shadow.is_some() || inbound.shadow_strict;
        let access = inbound.access.is_some() || inbound.shadow.is_some();
        let needs = [(access, features::ACCESS_V1), (shadow, features::SHADOW_V1)];
        let requires = needs.into_iter().filter_map(|(needed, name)| needed.then_some(name)).collect();
        let mut stamps: Vec<proto::Stamp> = Vec::new();
        for policy in self.carried(pod, &inbound) {
            let stamp = policy_stamp(policy);
            if !stamps.contains(&stamp) {
                stamps.push(stamp);
            }
        }
        Some(Compiled {
            resource: versioned(name, requires, proto::resource::Body::Inbound(inbound)),
            stamps,
            counted_as: None,
            depends: Dependency::Inbound(Arc::clone(&pod.uid)),
        })
    }

    /// The policies that decide something for a pod.
    fn carried(&self, pod: &Pod, inbound: &proto::Inbound) -> impl Iterator<Item = proto::ObjectRef> + use<> {
        let of = |access: &Option<proto::Access>| access.as_ref().and_then(|access| access.policy.clone());
        let carried =
            [inbound.mtls_from.clone(), of(&inbound.access), of(&inbound.shadow), self.strict_in_shadow(pod)];
        carried.into_iter().flatten()
    }

    /// Whether a policy decides something for a pod. One that narrower policies overrule decides nothing, and its
    /// sidecar has nothing of it to acknowledge.
    pub fn carries(&self, policy: &Key, pod_uid: &str) -> bool {
        let Some(pod) = self.pods.get(pod_uid) else { return false };
        let Some(inbound) = self.inbound(pod_uid) else { return false };
        self.carried(pod, &inbound).any(|found| *found.namespace == *policy.0 && *found.name == *policy.1)
    }

    fn compile_destination(&self, name: &proto::ResourceName, variant: &Variant) -> Option<Compiled> {
        let address: SocketAddr = name.name.parse().ok()?;
        let depends = match self.owner(address) {
            Owner::Service(key, _) => Dependency::Service(key.clone()),
            Owner::Pod(_) | Owner::Nobody => Dependency::Address(address.ip()),
        };
        let destination = self.destination(address, variant.0.as_deref().unwrap_or(""));
        let (mut requires, mut stamps, mut counted_as) = (Vec::new(), Vec::new(), None);
        if let Some(proto::destination::Kind::Service(service)) = &destination.kind {
            let others = service.split.iter().any(|share| share.revision.is_empty());
            let needs = [(!service.split.is_empty(), features::SPLIT_V1), (others, features::SPLIT_V2)];
            requires.extend(needs.into_iter().filter_map(|(needed, name)| needed.then_some(name)));
            stamps.extend(service.canary.as_ref().map(|canary| self.canary_stamp(canary)));
            counted_as = Some((service.namespace.clone(), service.name.clone()));
        }
        let body = proto::resource::Body::Destination(destination);
        Some(Compiled { resource: versioned(name, requires, body), stamps, counted_as, depends })
    }

    fn canary_stamp(&self, canary: &proto::CanaryRef) -> proto::Stamp {
        let key: Key = (canary.namespace.as_str().into(), canary.name.as_str().into());
        let uid = self.canaries.get(&key).and_then(|canary| canary.metadata.uid.clone());
        proto::Stamp {
            kind: proto::stamp::Kind::Canary.into(),
            namespace: canary.namespace.clone(),
            name: canary.name.clone(),
            uid: uid.unwrap_or_default(),
            version: canary.epoch,
        }
    }

    /// What a pod enforces on connections that arrive.
    pub fn inbound(&self, pod_uid: &str) -> Option<proto::Inbound> {
        let pod = self.pods.get(pod_uid)?;
        let (mtls, mtls_from) = self.mtls_for(pod);
        let mode = match mtls {
            MtlsMode::Permissive => proto::MtlsMode::Permissive,
            MtlsMode::Strict => proto::MtlsMode::Strict,
            MtlsMode::Disabled => proto::MtlsMode::Off,
        };
        let (access, shadow) = self.access_for(pod);
        let workload = pod.workload.as_ref().map(|w| format!("{}/{}", w.kind.name(), w.name));
        Some(proto::Inbound {
            mtls: mode.into(),
            mtls_from,
            access,
            shadow,
            shadow_strict: self.strict_in_shadow(pod).is_some(),
            workload: workload.unwrap_or_default(),
            revision: pod.revision().to_owned(),
        })
    }

    /// Where a dialled address leads, for a client on `node`.
    pub fn destination(&self, address: SocketAddr, node: &str) -> proto::Destination {
        proto::Destination { kind: Some(self.kind_of(address, node)) }
    }

    fn kind_of(&self, address: SocketAddr, node: &str) -> proto::destination::Kind {
        use proto::destination::Kind;
        match self.owner(address) {
            Owner::Service(key, service) => {
                match service.ports.iter().find(|port| port.port == address.port()) {
                    Some(port) => {
                        Kind::Service(self.service_port(key, service, port, (node, address.is_ipv4())))
                    }
                    None => Kind::Unknown(proto::Unknown {}),
                }
            }
            Owner::Pod(pod) => {
                let endpoint = proto::Endpoint {
                    address: address.to_string(),
                    identity: self.identity(pod, address.port()),
                    revision: pod.revision().to_owned(),
                    zone: String::new(),
                    state: proto::EndpointState::Ready.into(),
                    pod_uid: pod.uid.to_string(),
                };
                Kind::Pod(proto::PodPort { endpoint: Some(endpoint) })
            }
            Owner::Nobody => Kind::Unknown(proto::Unknown {}),
        }
    }

    fn service_port(
        &self,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        (node, ipv4): (&str, bool),
    ) -> proto::ServicePort {
        let mut endpoints = self.endpoints(key, service, port, (node, ipv4));
        let (split, canary) = self.split(&mut endpoints);
        proto::ServicePort {
            namespace: key.0.to_string(),
            name: key.1.to_string(),
            port: u32::from(port.port),
            uid: service.uid.to_string(),
            protocol: protocol(port.app_protocol.as_deref()).into(),
            endpoints,
            split,
            session_affinity_seconds: service.affinity_seconds,
            canary,
        }
    }

    /// Endpoints come from slices only: address and port as they stand there. A pod that is in more
    /// than one slice counts once, and by the family of the address that was dialled, as with kube-proxy.
    fn endpoints(
        &self,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        (node, ipv4): (&str, bool),
    ) -> Vec<proto::Endpoint> {
        let mut found: HashMap<String, proto::Endpoint> = HashMap::new();
        for slice in
            self.slices_by_service.get(key).into_iter().flatten().filter_map(|key| self.slices.get(key))
        {
            let Some((_, number)) = slice.ports.iter().find(|(name, _)| *name == port.name) else { continue };
            for endpoint in &slice.endpoints {
                if endpoint.address.is_some_and(|address| address.is_ipv4() != ipv4) {
                    continue;
                }
                if service.local_only && &*endpoint.node != node {
                    continue;
                }
                if let Some(made) = self.endpoint(endpoint, *number) {
                    let id =
                        if made.pod_uid.is_empty() { made.address.clone() } else { made.pod_uid.clone() };
                    found.insert(id, made);
                }
            }
        }
        let mut endpoints: Vec<proto::Endpoint> = found.into_values().collect();
        endpoints.sort_by(|a, b| (&a.address, &a.pod_uid).cmp(&(&b.address, &b.pod_uid)));
        endpoints
    }

    /// An endpoint that takes traffic, or would if it were not going. A pod parked behind our gate
    /// takes traffic as soon as its containers are ready: its share is set by the split.
    fn endpoint(&self, endpoint: &Endpoint, port: u16) -> Option<proto::Endpoint> {
        let pod = match &endpoint.pod_uid {
            // A slice may be seen before its pod. Until the pod is known nobody can say whether it has a sidecar, and
            // without an identity clients would send it plain text.
            Some(uid) => Some(self.pods.get(uid)?),
            None => None,
        };
        let address = SocketAddr::new(endpoint.address?, port).to_string();
        let terminating = endpoint.terminating || pod.is_some_and(|pod| pod.terminating);
        let on_trial = pod.is_some_and(Pod::is_parked);
        let parked = on_trial && pod.is_some_and(|pod| pod.containers_ready && !pod.finished);
        // `ready` is true for every endpoint of a Service with publishNotReadyAddresses: a pod under
        // trial must really be ready.
        let ready = if on_trial { parked } else { endpoint.ready };
        let state = match (ready && !terminating, terminating && endpoint.serving) {
            (true, _) => proto::EndpointState::Ready,
            (false, true) => proto::EndpointState::Terminating,
            (false, false) => return None,
        };
        Some(proto::Endpoint {
            address,
            identity: pod.map_or_else(String::new, |pod| self.identity(pod, port)),
            revision: pod.map_or("", Pod::revision).to_owned(),
            zone: endpoint.zone.to_string(),
            state: state.into(),
            pod_uid: pod.map_or_else(String::new, |pod| pod.uid.to_string()),
        })
    }

    /// Whom a pod's certificate names; empty where no sidecar listens, or clients are to send plain text.
    fn identity(&self, pod: &Pod, port: u16) -> String {
        let listens = pod.injected && !pod.host_network && !pod.skipped_ports.contains(&port);
        if !listens || self.takes_plain_text(pod) {
            return String::new();
        }
        WorkloadId::new(&self.settings.trust_domain, &pod.namespace, &pod.service_account).to_string()
    }
}

/// A resource whose version is a digest of its content.
fn versioned(
    name: &proto::ResourceName,
    requires: Vec<&'static str>,
    body: proto::resource::Body,
) -> proto::Resource {
    let mut resource = proto::Resource {
        name: Some(name.clone()),
        version: String::new(),
        requires: requires.into_iter().map(str::to_owned).collect(),
        body: Some(body),
    };
    let mut digest = DefaultHasher::new();
    resource.encode_to_vec().hash(&mut digest);
    resource.version = format!("{:016x}", digest.finish());
    resource
}

fn policy_stamp(policy: proto::ObjectRef) -> proto::Stamp {
    proto::Stamp {
        kind: proto::stamp::Kind::Policy.into(),
        namespace: policy.namespace,
        name: policy.name,
        uid: policy.uid,
        version: u64::try_from(policy.generation).unwrap_or_default(),
    }
}

/// `appProtocol` as Kubernetes and its meshes write it; what nobody knows is found out.
fn protocol(app_protocol: Option<&str>) -> proto::Protocol {
    match app_protocol {
        Some("http" | "HTTP" | "kubernetes.io/ws") => proto::Protocol::Http1,
        Some("grpc" | "http2" | "kubernetes.io/h2c") => proto::Protocol::Http2,
        Some("tcp" | "opaque" | "tls" | "https" | "kubernetes.io/wss" | "mysql" | "redis" | "postgresql") => {
            proto::Protocol::Opaque
        }
        _ => proto::Protocol::Detect,
    }
}

/// A policy's target in one word.
pub fn target_name(spec: &MeshPolicySpec, namespace: &str) -> String {
    match spec.target.kind {
        TargetKind::Service => format!("Service/{}", spec.target.name.as_deref().unwrap_or("")),
        TargetKind::Namespace => format!("Namespace/{namespace}"),
        TargetKind::Workload => {
            let labels = spec.target.selector.iter().flat_map(|selector| &selector.match_labels);
            let labels: Vec<String> = labels.map(|(key, value)| format!("{key}={value}")).collect();
            format!("Workload/{}", labels.join(","))
        }
    }
}

/// A policy's access section in a few words.
pub fn access_summary(spec: &MeshPolicySpec) -> String {
    let Some(access) = &spec.access else { return "all".to_owned() };
    let count =
        |rules: &Option<Vec<_>>, word: &str| rules.as_ref().map(|rules| format!("{} {word}", rules.len()));
    let parts: Vec<String> =
        [count(&access.allow, "allow"), count(&access.deny, "deny")].into_iter().flatten().collect();
    parts.join(", ")
}
