//! Where a dialled address leads, and, apart from it, where the pods behind a Service's port are. The endpoints change
//! often and the route hardly ever, and all addresses of a Service share the endpoints.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use tulle_mesh::proto;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;

use super::address::Owner;
use super::object::ServicePort;
use super::touched::{Compiled, Dependency, Variant};
use super::view::{protocol, versioned};
use super::{Key, Model, Pod, Service};

/// What follows the name of endpoints with IPv6 addresses.
const IPV6: &str = "/ipv6";

/// The name of an Endpoints resource: `namespace/service:port`. That of a Service's IPv6 addresses has `/ipv6` behind
/// it, because a client is led to a pod's address of the family that it dialled, as with kube-proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointsName {
    /// The Service.
    pub service: Key,
    /// Its port.
    pub port: u16,
    /// The family of the addresses.
    pub ipv4: bool,
}

impl fmt::Display for EndpointsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (namespace, name) = &self.service;
        write!(f, "{namespace}/{name}:{}{}", self.port, if self.ipv4 { "" } else { IPV6 })
    }
}

/// A text that does not name endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name of endpoints is namespace/service:port")]
pub struct NotEndpoints;

impl FromStr for EndpointsName {
    type Err = NotEndpoints;

    fn from_str(text: &str) -> Result<Self, NotEndpoints> {
        let (text, ipv4) = text.strip_suffix(IPV6).map_or((text, true), |text| (text, false));
        let (service, port) = text.split_once(':').ok_or(NotEndpoints)?;
        let (namespace, name) = service.split_once('/').ok_or(NotEndpoints)?;
        // One spelling each: `+80` and `080` would be other resources.
        let number: u16 = port.parse().map_err(|_| NotEndpoints)?;
        if namespace.is_empty() || name.is_empty() || name.contains('/') || number.to_string() != port {
            return Err(NotEndpoints);
        }
        Ok(Self { service: (namespace.into(), name.into()), port: number, ipv4 })
    }
}

impl Model {
    /// Where a dialled address leads.
    pub fn route(&self, address: SocketAddr) -> proto::Route {
        let kind = match self.owner(address) {
            Owner::Service(key, service) => {
                let port = service.ports.iter().find(|port| port.port == address.port());
                port.map(|port| Kind::Service(service_route(key, service, port, address.is_ipv4())))
            }
            Owner::Pod(pod) => Some(Kind::Pod(proto::PodRoute {
                endpoint: Some(self.pod_endpoint(pod, address)),
                protocol: self.declared(pod, address.port()).into(),
            })),
            Owner::Nobody => None,
        };
        proto::Route { kind: Some(kind.unwrap_or(Kind::Unknown(proto::Unknown {}))) }
    }

    pub(super) fn compile_route(&self, name: &proto::ResourceName) -> Option<Compiled> {
        let address: SocketAddr = name.name.parse().ok()?;
        let route = self.route(address);
        let counted_as = match &route.kind {
            Some(Kind::Service(service)) => Some((service.namespace.clone(), service.name.clone())),
            _ => None,
        };
        Some(Compiled {
            resource: versioned(name, Vec::new(), Body::Route(route)),
            stamps: Vec::new(),
            counted_as,
            // A change of a Service touches all its addresses, that of an endpoint none of them.
            depends: Dependency::Address(address.ip()),
        })
    }

    /// Endpoints without any where there is no such Service or port: their clients must learn that too.
    pub(super) fn compile_endpoints(
        &self,
        name: &proto::ResourceName,
        variant: &Variant,
    ) -> Option<Compiled> {
        let wanted: EndpointsName = name.name.parse().ok()?;
        let found = self.services.get(&wanted.service);
        let port = found.and_then(|service| service.ports.iter().find(|port| port.port == wanted.port));
        let mut made = proto::Endpoints::default();
        if let (Some(service), Some(port)) = (found, port) {
            let client = (variant.0.as_deref().unwrap_or(""), wanted.ipv4);
            made.endpoints = self.endpoints(&wanted.service, service, port, client);
            (made.split, made.canary) = self.split(&mut made.endpoints);
        }
        let stamps = made.canary.iter().map(|canary| self.canary_stamp(canary)).collect();
        // What is counted for a Service that does not exist would be a label that a sidecar makes up.
        let counted_as = found.map(|_| (wanted.service.0.to_string(), wanted.service.1.to_string()));
        Some(Compiled {
            resource: versioned(name, Vec::new(), Body::Endpoints(made)),
            stamps,
            counted_as,
            depends: Dependency::Service(wanted.service),
        })
    }

    /// What is spoken at a port of a pod, as the Services declare it of which it is an endpoint. Only those of the pod's
    /// own namespace have a say. Where two disagree, it is found out.
    fn declared(&self, pod: &Pod, port: u16) -> proto::Protocol {
        let mut found = None;
        for key in self.slices_by_pod.get(&pod.uid).into_iter().flatten() {
            let Some(slice) = self.slices.get(key).filter(|_| key.0 == pod.namespace) else { continue };
            let service = self.services.get(&(Arc::clone(&key.0), Arc::clone(&slice.service)));
            let Some(service) = service else { continue };
            for (name, _) in slice.ports.iter().filter(|(_, number)| *number == port) {
                let its = service.ports.iter().find(|port| port.name == *name);
                let Some(declared) = its.and_then(|port| port.app_protocol.as_deref()) else { continue };
                let declared = protocol(Some(declared));
                if *found.get_or_insert(declared) != declared {
                    return proto::Protocol::Detect;
                }
            }
        }
        found.unwrap_or(proto::Protocol::Detect)
    }
}

fn service_route(key: &Key, service: &Service, port: &ServicePort, ipv4: bool) -> proto::ServiceRoute {
    let endpoints = EndpointsName { service: key.clone(), port: port.port, ipv4 };
    proto::ServiceRoute {
        namespace: key.0.to_string(),
        name: key.1.to_string(),
        port: u32::from(port.port),
        uid: service.uid.to_string(),
        protocol: protocol(port.app_protocol.as_deref()).into(),
        endpoints: endpoints.to_string(),
        session_affinity_seconds: service.affinity_seconds,
    }
}
