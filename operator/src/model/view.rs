//! Resources for sidecars. A version is a digest of the content, so that every replica gives the
//! same resource the same version and a reconnect is not a full push.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::SocketAddr;
use std::sync::Arc;

use prost::Message as _;
use tulle_crds::{MeshPolicySpec, MtlsMode, Phase, TargetKind};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::{features, proto};

use super::object::{Endpoint, ServicePort};
use super::{Key, Model, Pod, Service};

impl Model {
    /// The resource of this name, for the sidecar of a pod. `None`: there is no such pod.
    pub fn resource(&self, name: &proto::ResourceName, pod_uid: &str) -> Option<proto::Resource> {
        let (body, requires) = match name.r#type() {
            proto::ResourceType::Inbound => {
                let inbound = self.inbound(pod_uid)?;
                let shadow = inbound.shadow.is_some() || inbound.shadow_strict;
                let access = inbound.access.is_some() || inbound.shadow.is_some();
                let needs = [(access, features::ACCESS_V1), (shadow, features::SHADOW_V1)];
                let requires =
                    needs.into_iter().filter_map(|(needed, name)| needed.then_some(name)).collect();
                (proto::resource::Body::Inbound(inbound), requires)
            }
            proto::ResourceType::Destination => {
                let address = name.name.parse().ok()?;
                let node = self.pods.get(pod_uid).map(|pod| Arc::clone(&pod.node));
                let destination = self.destination(address, node.as_deref().unwrap_or(""));
                let splits = matches!(&destination.kind, Some(proto::destination::Kind::Service(s)) if !s.split.is_empty());
                let requires: Vec<&str> = splits.then_some(features::SPLIT_V1).into_iter().collect();
                (proto::resource::Body::Destination(destination), requires)
            }
            proto::ResourceType::Unspecified => return None,
        };
        let mut resource = proto::Resource {
            name: Some(name.clone()),
            version: String::new(),
            requires: requires.into_iter().map(str::to_owned).collect(),
            body: Some(body),
        };
        let mut digest = DefaultHasher::new();
        resource.encode_to_vec().hash(&mut digest);
        resource.version = format!("{:016x}", digest.finish());
        Some(resource)
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
            shadow_strict: self.is_strict_in_shadow(pod),
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
        if let Some(key) = self.services_by_ip.get(&address.ip()) {
            let service = self.services.get(key);
            let port = service.and_then(|s| s.ports.iter().find(|port| port.port == address.port()));
            return match (service, port) {
                (Some(service), Some(port)) => {
                    let ipv4 = address.is_ipv4();
                    Kind::Service(self.service_port(key, service, port, (node, ipv4)))
                }
                _ => Kind::Unknown(proto::Unknown {}),
            };
        }
        let pod = self.pods_by_ip.get(&address.ip()).and_then(|uid| self.pods.get(uid));
        match pod {
            Some(pod) => {
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
            None => Kind::Unknown(proto::Unknown {}),
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
        let (split, canary) = self.split(&endpoints);
        if split.is_empty() {
            // Nobody sets a share here: a pod on trial waits for its gate as with any client.
            endpoints
                .retain(|endpoint| !self.pods.get(endpoint.pod_uid.as_str()).is_some_and(Pod::is_parked));
        }
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
        endpoints.sort_by(|a, b| a.address.cmp(&b.address));
        endpoints
    }

    /// An endpoint that takes traffic, or would if it were not going. A pod parked behind our gate
    /// takes traffic as soon as its containers are ready: its share is set by the split.
    fn endpoint(&self, endpoint: &Endpoint, port: u16) -> Option<proto::Endpoint> {
        let pod = endpoint.pod_uid.as_ref().and_then(|uid| self.pods.get(uid));
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

    /// Shares of revisions where a Canary watches the workload behind these endpoints. An unapproved
    /// revision gets only its share whether or not its pods carry a gate.
    fn split(&self, endpoints: &[proto::Endpoint]) -> (Vec<proto::RevisionShare>, Option<proto::CanaryRef>) {
        let none = (Vec::new(), None);
        let mut workloads =
            endpoints.iter().filter_map(|e| self.pods.get(e.pod_uid.as_str())?.workload.as_ref());
        let Some(workload) = workloads.next() else { return none };
        if workloads.any(|other| other != workload) {
            return none;
        }
        let found = self.canary_of(workload);
        let Some((key, status)) = found.and_then(|(key, canary)| Some((key, canary.status.as_ref()?))) else {
            return none;
        };
        if status.approved_revision.is_empty() || status.phase == Phase::Promoting {
            return none;
        }
        let on_trial =
            !status.canary_revision.is_empty() && status.canary_revision != status.approved_revision;
        let weight = if on_trial { status.weight.min(100) * 10 } else { 0 };
        let share =
            |revision: &str, permille| proto::RevisionShare { revision: revision.to_owned(), permille };
        // What was stable until its replacement was approved stays stable as long as it has pods.
        let of =
            |revision: &str| endpoints.iter().filter(|endpoint| endpoint.revision == revision).count() as u32;
        let former =
            if status.former_revision == status.canary_revision { 0 } else { of(&status.former_revision) };
        let (approved, stable) = (of(&status.approved_revision), 1000 - weight);
        let formers = (stable * former).checked_div(former + approved).unwrap_or(0);
        let mut split = vec![share(&status.approved_revision, stable - formers)];
        if formers > 0 {
            split.push(share(&status.former_revision, formers));
        }
        if on_trial {
            split.push(share(&status.canary_revision, weight));
        }
        let canary =
            proto::CanaryRef { namespace: key.0.to_string(), name: key.1.to_string(), epoch: status.epoch };
        (split, Some(canary))
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
