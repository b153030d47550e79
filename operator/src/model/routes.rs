//! Where a dialled address leads, and, apart from it, where the pods behind a Service's port are. The endpoints change
//! often and the route hardly ever, and all addresses of a Service share the endpoints. A route carries the rules of the
//! Gateway API's routes too, and what policies say about traffic to the Service.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

use tulle_mesh::features;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;
use tulle_mesh::proto::{self, filter, stamp};

use super::address::Owner;
use super::gateway::{RouteClient, RouteKind};
use super::object::{Distribution, ServicePort};
use super::sections::required;
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
    /// Where a dialled address leads, for clients in `namespace`. Without a namespace: for those in namespaces that have
    /// no routes of their own for it.
    pub fn route(&self, address: SocketAddr, namespace: &str) -> proto::Route {
        let kind = match self.owner(address) {
            Owner::Service(key, service) => {
                let port = service.ports.iter().find(|port| port.port == address.port());
                let client = RouteClient { namespace, ipv4: address.is_ipv4() };
                port.map(|port| Kind::Service(self.service_route(key, service, port, client)))
            }
            Owner::Pod(pod) => Some(Kind::Pod(proto::PodRoute {
                endpoint: Some(self.pod_endpoint(pod, address)),
                protocol: self.declared(pod, address.port()).into(),
            })),
            Owner::Nobody => None,
        };
        proto::Route { kind: Some(kind.unwrap_or(Kind::Unknown(proto::Unknown {}))) }
    }

    fn service_route(
        &self,
        key: &Key,
        service: &Service,
        port: &ServicePort,
        client: RouteClient<'_>,
    ) -> proto::ServiceRoute {
        let endpoints = EndpointsName { service: key.clone(), port: port.port, ipv4: client.ipv4 };
        let (traffic, shadow) = self.traffic_for(key);
        proto::ServiceRoute {
            namespace: key.0.to_string(),
            name: key.1.to_string(),
            port: u32::from(port.port),
            uid: service.uid.to_string(),
            protocol: protocol(port.app_protocol.as_deref()).into(),
            endpoints: endpoints.to_string(),
            session_affinity_seconds: service.affinity_seconds,
            rules: self.rules_for(key, port, client),
            traffic,
            shadow,
        }
    }

    /// Which variant of an address's route a pod's sidecar gets.
    pub(super) fn route_variant(&self, name: &proto::ResourceName, pod_uid: &str) -> Variant {
        let variant = || {
            let address: SocketAddr = name.name.parse().ok()?;
            let Owner::Service(key, service) = self.owner(address) else { return None };
            let port = service.ports.iter().find(|port| port.port == address.port())?;
            let namespace = &self.pods.get(pod_uid)?.namespace;
            let differs = self.has_consumer_routes(key, port, namespace);
            differs.then(|| Variant::Namespace(Arc::clone(namespace)))
        };
        variant().unwrap_or_default()
    }

    pub(super) fn compile_route(&self, name: &proto::ResourceName, variant: &Variant) -> Option<Compiled> {
        let address: SocketAddr = name.name.parse().ok()?;
        let route = self.route(address, variant.namespace());
        let (mut requires, mut stamps, mut counted_as) = (Vec::new(), Vec::new(), None);
        if let Some(Kind::Service(service)) = &route.kind {
            let traffic = sections(service);
            let needs =
                [(service.rules.is_some(), features::ROUTES_V1), (!traffic.is_empty(), features::TRAFFIC_V1)];
            requires.extend(required(needs));
            stamps = stamps_of(service, &traffic);
            counted_as = Some((service.namespace.clone(), service.name.clone()));
        }
        if let Some(Kind::Pod(pod)) = &route.kind {
            // As sidecars count it. Of a pod without a sidecar they know no name.
            let identity = pod.endpoint.as_ref().and_then(|of| of.identity.parse::<WorkloadId>().ok());
            counted_as = identity.map(|of| (of.namespace, of.service_account));
        }
        Some(Compiled {
            resource: versioned(name, requires, Body::Route(route)),
            stamps,
            counted_as,
            // A change of a Service touches all its addresses, that of an endpoint none of them.
            depends: Dependency::Address(address.ip()),
        })
    }

    /// Whether there is a Service of this name.
    pub fn has_service(&self, namespace: &str, name: &str) -> bool {
        let key: Key = (namespace.into(), name.into());
        self.services.contains_key(&key)
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
            let client = (variant.node(), wanted.ipv4);
            made.endpoints = self.endpoints(&wanted.service, service, port, client);
            (made.split, made.canary, made.steering) = self.split(&mut made.endpoints);
            made.distribution = distribution(service.distribution).into();
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

fn distribution(of: Distribution) -> proto::Distribution {
    match of {
        Distribution::Any => proto::Distribution::Any,
        Distribution::SameZone => proto::Distribution::SameZone,
        Distribution::SameNode => proto::Distribution::SameNode,
    }
}

/// The sections of policies that a route carries, those for backends too.
fn sections(service: &proto::ServiceRoute) -> Vec<&proto::Traffic> {
    let of_backends = backends(service).flat_map(|backend| backend.traffic.iter().chain(&backend.shadow));
    service.traffic.iter().chain(&service.shadow).chain(of_backends).collect()
}

/// The backends and mirrors that the rules of a route name.
pub(super) fn backends(service: &proto::ServiceRoute) -> impl Iterator<Item = &proto::Backend> {
    service.rules.iter().flat_map(|rules| &rules.rules).flat_map(|rule| {
        let of_backends = rule.backends.iter().flat_map(|backend| &backend.filters);
        let mirrors = rule.filters.iter().chain(of_backends).filter_map(mirrored_to);
        rule.backends.iter().chain(mirrors)
    })
}

fn mirrored_to(filter: &proto::Filter) -> Option<&proto::Backend> {
    let Some(filter::Kind::Mirror(mirror)) = &filter.kind else { return None };
    mirror.backend.as_ref()
}

/// The objects whose acknowledgement is that of this route: the Gateway API's routes and the policies in it, each once.
fn stamps_of(service: &proto::ServiceRoute, traffic: &[&proto::Traffic]) -> Vec<proto::Stamp> {
    let mut stamps: Vec<proto::Stamp> = Vec::new();
    let mut add = |kind: stamp::Kind, name: String, object: &proto::ObjectRef| {
        let stamp = proto::Stamp {
            kind: kind.into(),
            namespace: object.namespace.clone(),
            name,
            uid: object.uid.clone(),
            version: u64::try_from(object.generation).unwrap_or_default(),
        };
        if !stamps.contains(&stamp) {
            stamps.push(stamp);
        }
    };
    for route in service.rules.iter().flat_map(|rules| &rules.routes) {
        let kind = RouteKind::ALL.into_iter().find(|kind| kind.proto() == route.kind());
        if let (Some(kind), Some(object)) = (kind, &route.object) {
            add(stamp::Kind::Route, kind.stamped(&object.name), object);
        }
    }
    for policy in traffic.iter().flat_map(|traffic| policies(traffic)) {
        add(stamp::Kind::Policy, policy.name.clone(), policy);
    }
    stamps
}

/// The policies that sections are of.
fn policies(traffic: &proto::Traffic) -> impl Iterator<Item = &proto::ObjectRef> {
    let proto::Traffic { timeout, retry, breaker, balance, faults } = traffic;
    let all = [
        timeout.as_ref().and_then(|section| section.policy.as_ref()),
        retry.as_ref().and_then(|section| section.policy.as_ref()),
        breaker.as_ref().and_then(|section| section.policy.as_ref()),
        balance.as_ref().and_then(|section| section.policy.as_ref()),
        faults.as_ref().and_then(|section| section.policy.as_ref()),
    ];
    all.into_iter().flatten()
}
