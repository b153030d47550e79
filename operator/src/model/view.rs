//! Resources for sidecars. A version is a digest of the content, so that every replica gives the
//! same resource the same version and a reconnect is not a full push.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;

use prost::Message as _;
use tulle_crds::{MeshPolicySpec, TargetKind};
use tulle_mesh::features;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::{self, ResourceType};

use super::address::Owner;
use super::object::{Endpoint, ServicePort};
use super::routes::EndpointsName;
use super::sections::required;
use super::touched::{Compiled, Dependency, Variant};
use super::{Key, Model, Pod, Service};

impl Model {
    /// The resource of this name, for the sidecar of a pod. `None`: there is no such pod.
    pub fn resource(&self, name: &proto::ResourceName, pod_uid: &str) -> Option<proto::Resource> {
        self.compile(name, &self.variant(name, pod_uid)).map(|compiled| compiled.resource)
    }

    /// Which variant of a resource a pod's sidecar gets.
    pub fn variant(&self, name: &proto::ResourceName, pod_uid: &str) -> Variant {
        let service = match name.r#type() {
            ResourceType::Route => return self.route_variant(name, pod_uid),
            ResourceType::Destination => {
                name.name.parse().ok().and_then(|address: SocketAddr| match self.owner(address) {
                    Owner::Service(_, service) => Some(service),
                    Owner::Pod(_) | Owner::Nobody => None,
                })
            }
            ResourceType::Endpoints => {
                let name: Option<EndpointsName> = name.name.parse().ok();
                name.and_then(|name| self.services.get(&name.service))
            }
            _ => None,
        };
        let local = service.is_some_and(|service| service.local_only);
        let pod = self.pods.get(pod_uid).filter(|_| local);
        pod.map_or(Variant::Any, |pod| Variant::Node(Arc::clone(&pod.node)))
    }

    /// The resource of this name, for all sidecars of this variant. What a pod enforces is named by the pod's uid.
    /// `None`: there is no such pod, or the name is none.
    pub fn compile(&self, name: &proto::ResourceName, variant: &Variant) -> Option<Compiled> {
        match name.r#type() {
            ResourceType::Inbound => self.compile_inbound(name),
            ResourceType::Destination => self.compile_destination(name, variant),
            ResourceType::Endpoints => self.compile_endpoints(name, variant),
            ResourceType::Route => self.compile_route(name, variant),
            ResourceType::Workload
            | ResourceType::Mtls
            | ResourceType::Access
            | ResourceType::Limits
            | ResourceType::Logs => self.compile_section(name),
            ResourceType::Unspecified => None,
        }
    }

    fn compile_destination(&self, name: &proto::ResourceName, variant: &Variant) -> Option<Compiled> {
        let address: SocketAddr = name.name.parse().ok()?;
        let depends = match self.owner(address) {
            Owner::Service(key, _) => Dependency::Service(key.clone()),
            Owner::Pod(_) | Owner::Nobody => Dependency::Address(address.ip()),
        };
        let destination = self.destination(address, variant.node());
        let (mut requires, mut stamps, mut counted_as) = (Vec::new(), Vec::new(), None);
        if let Some(proto::destination::Kind::Service(service)) = &destination.kind {
            let others = service.split.iter().any(|share| share.revision.is_empty());
            let needs = [(!service.split.is_empty(), features::SPLIT_V1), (others, features::SPLIT_V2)];
            requires.extend(required(needs));
            stamps.extend(service.canary.as_ref().map(|canary| self.canary_stamp(canary)));
            counted_as = Some((service.namespace.clone(), service.name.clone()));
        }
        let body = proto::resource::Body::Destination(destination);
        Some(Compiled { resource: versioned(name, requires, body), stamps, counted_as, depends })
    }

    pub(super) fn canary_stamp(&self, canary: &proto::CanaryRef) -> proto::Stamp {
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
            Owner::Pod(pod) => Kind::Pod(proto::PodPort { endpoint: Some(self.pod_endpoint(pod, address)) }),
            Owner::Nobody => Kind::Unknown(proto::Unknown {}),
        }
    }

    /// A pod that is dialled by its own address.
    pub(super) fn pod_endpoint(&self, pod: &Pod, address: SocketAddr) -> proto::Endpoint {
        // While it ends it still serves who dials it, and clients of HTTP/2 are told to leave.
        let state =
            if pod.terminating { proto::EndpointState::Terminating } else { proto::EndpointState::Ready };
        proto::Endpoint {
            address: address.to_string(),
            identity: self.identity(pod, address.port()),
            revision: pod.revision().to_owned(),
            state: state.into(),
            pod_uid: pod.uid.to_string(),
            // There is no other to compare it with.
            ..proto::Endpoint::default()
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
        let (split, canary, steering) = self.split(&mut endpoints);
        // Sidecars that ask for this do not steer. They go on by the shares, but what they do then is neither an
        // acknowledgement of the step nor evidence.
        let canary = canary.filter(|_| steering.is_none());
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

    /// Endpoints come from slices only: address and port as they stand there. A pod that more
    /// than one slice names counts once, and by the family of the address that was dialled, as with kube-proxy.
    pub(super) fn endpoints(
        &self,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        (node, ipv4): (&str, bool),
    ) -> Vec<proto::Endpoint> {
        let mut found: HashMap<String, proto::Endpoint> = HashMap::new();
        // By address: a hand-made slice may list several ports of one pod.
        let mut unnamed: HashMap<String, proto::Endpoint> = HashMap::new();
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
                let Some(made) = self.endpoint(endpoint, *number) else { continue };
                match &endpoint.pod_uid {
                    Some(uid) => found.insert(uid.to_string(), made),
                    None => unnamed.insert(made.address.clone(), made),
                };
            }
        }
        if !unnamed.is_empty() {
            let named: HashSet<&str> = found.values().map(|made| made.address.as_str()).collect();
            unnamed.retain(|address, _| !named.contains(address.as_str()));
        }
        let mut endpoints: Vec<proto::Endpoint> = found.into_values().chain(unnamed.into_values()).collect();
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
            // An endpoint without `targetRef` may be a machine outside of the cluster, or a pod all the same.
            None => self.pod_of_endpoint(endpoint),
        };
        let address = SocketAddr::new(endpoint.address?, port).to_string();
        let terminating = endpoint.terminating || pod.is_some_and(|pod| pod.terminating);
        let on_trial = pod.is_some_and(Pod::is_parked);
        let parked = on_trial && pod.is_some_and(|pod| pod.containers_ready && !pod.finished);
        // `ready` is true for every endpoint of a Service with publishNotReadyAddresses: a pod under trial must really be
        // ready. One whose gate opens serves on: a version of one pod would get nothing until its slice follows.
        let ready = if on_trial { parked } else { endpoint.ready || pod.is_some_and(Pod::is_let_in) };
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
            ready_unix: pod.map_or(0, |pod| pod.ready_unix),
            node: endpoint.node.to_string(),
            for_zones: endpoint.for_zones.iter().map(ToString::to_string).collect(),
            for_nodes: endpoint.for_nodes.iter().map(ToString::to_string).collect(),
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
pub(super) fn versioned(
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

/// `appProtocol` as Kubernetes and its meshes write it; what nobody knows is found out.
pub(super) fn protocol(app_protocol: Option<&str>) -> proto::Protocol {
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
