//! Services that rules lead to. A reference to another namespace needs no ReferenceGrant: in a mesh, whoever may send
//! requests to a Service may send them by way of a route too (GEP-1294).

use std::sync::Arc;

use tulle_mesh::proto;

use super::super::object::ServicePort;
use super::super::view::protocol;
use super::super::{EndpointsName, Key, Model, Service};
use super::check::Flaw;
use super::object::{BackendRef, RouteKind, RouteObject};

/// Reasons of `ResolvedRefs`.
const BACKEND_NOT_FOUND: &str = "BackendNotFound";
const INVALID_KIND: &str = "InvalidKind";
const UNSUPPORTED_PROTOCOL: &str = "UnsupportedProtocol";

/// A backend that exists.
#[derive(Debug)]
struct Target<'a> {
    key: &'a Key,
    service: &'a Service,
    port: &'a ServicePort,
    protocol: proto::Protocol,
}

impl Target<'_> {
    /// A client is led to addresses of the family that it dialled, unless the backend has the other one only.
    fn endpoints(&self, ipv4: bool) -> EndpointsName {
        let has_family = |ipv4: bool| self.service.cluster_ips.iter().any(|ip| ip.is_ipv4() == ipv4);
        let ipv4 = if has_family(!ipv4) && !has_family(ipv4) { !ipv4 } else { ipv4 };
        EndpointsName { service: self.key.clone(), port: self.port.port, ipv4 }
    }
}

/// The Service that a backend is. `None`: it is not a Service.
pub(super) fn service_of(namespace: &Arc<str>, to: &BackendRef) -> Option<Key> {
    let is_service = to.group.as_deref().is_none_or(str::is_empty)
        && to.kind.as_deref().is_none_or(|kind| kind == "Service");
    let namespace = || match to.namespace.as_deref() {
        Some(namespace) if !namespace.is_empty() => namespace.into(),
        _ => Arc::clone(namespace),
    };
    is_service.then(|| (namespace(), to.name.as_str().into()))
}

/// What is spoken at a backend, as its Service declares it and a kind of route can use it.
fn spoken(kind: RouteKind, declared: Option<&str>) -> Option<proto::Protocol> {
    match (kind, protocol(declared)) {
        // Connections are passed on as they are.
        (RouteKind::Tls | RouteKind::Tcp, _) => Some(proto::Protocol::Opaque),
        (_, proto::Protocol::Opaque) => None,
        (RouteKind::Http, protocol) => Some(protocol),
        (RouteKind::Grpc, _) if declared == Some("kubernetes.io/ws") => None,
        // Where nothing is declared, a GRPCRoute says that gRPC is spoken, which is HTTP/2 (GEP-1911).
        (RouteKind::Grpc, _) => Some(proto::Protocol::Http2),
    }
}

/// Of the sections for a Service those that hold for it as a backend: the others are of what was dialled.
fn of_a_backend(traffic: proto::Traffic) -> Option<proto::Traffic> {
    let proto::Traffic { breaker, balance, .. } = traffic;
    let is_any = breaker.is_some() || balance.is_some();
    is_any.then(|| proto::Traffic { breaker, balance, ..proto::Traffic::default() })
}

impl Model {
    fn target(&self, route: &RouteObject, to: &BackendRef) -> Result<Target<'_>, Flaw> {
        let Some(key) = service_of(&route.namespace, to) else {
            let kind = to.kind.as_deref().unwrap_or("Service");
            let group = to.group.as_deref().filter(|group| !group.is_empty()).unwrap_or("core");
            let what = format!("{kind} {} of group {group} is not supported as a backend", to.name);
            return Err(Flaw { reason: INVALID_KIND, what });
        };
        let not_found = |what: String| Flaw { reason: BACKEND_NOT_FOUND, what };
        let name = format!("{}/{}", key.0, key.1);
        let Some((key, service)) = self.services.get_key_value(&key) else {
            return Err(not_found(format!("there is no Service {name}")));
        };
        if service.cluster_ips.is_empty() && !service.headless {
            return Err(not_found(format!("Service {name} is of type ExternalName and has no endpoints")));
        }
        let number = to.port.ok_or_else(|| not_found(format!("Service {name} needs a port")))?;
        let port = service.ports.iter().find(|port| i64::from(port.port) == number);
        let port = port.ok_or_else(|| not_found(format!("Service {name} has no TCP port {number}")))?;
        let declared = port.app_protocol.as_deref();
        let protocol = spoken(route.kind, declared).ok_or_else(|| Flaw {
            reason: UNSUPPORTED_PROTOCOL,
            what: format!(
                "{} to port {number} of Service {name}, whose appProtocol is {}",
                route.kind.name(),
                declared.unwrap_or_default()
            ),
        })?;
        Ok(Target { key, service, port, protocol })
    }

    /// A backend as sidecars are sent it, for a client that dialled an address of this family.
    ///
    /// # Errors
    /// Why it cannot be used, for `ResolvedRefs`.
    pub(super) fn backend(
        &self,
        route: &RouteObject,
        to: &BackendRef,
        ipv4: bool,
    ) -> Result<proto::Backend, Flaw> {
        let target = self.target(route, to)?;
        let endpoints = target.endpoints(ipv4);
        let Target { key, port, protocol, .. } = target;
        // Also of a mirror: sidecars have one balancer and one breaker for each Service's port.
        let (traffic, shadow) = self.traffic_for(key);
        Ok(proto::Backend {
            weight: 1,
            endpoints: endpoints.to_string(),
            namespace: key.0.to_string(),
            name: key.1.to_string(),
            port: u32::from(port.port),
            protocol: protocol.into(),
            traffic: traffic.and_then(of_a_backend),
            shadow: shadow.and_then(of_a_backend),
            filters: Vec::new(),
        })
    }

    /// The endpoints of a backend for a client that dialled an address of this family.
    ///
    /// # Errors
    /// As [`Self::backend`].
    pub(super) fn backend_endpoints(
        &self,
        route: &RouteObject,
        to: &BackendRef,
        ipv4: bool,
    ) -> Result<EndpointsName, Flaw> {
        Ok(self.target(route, to)?.endpoints(ipv4))
    }

    /// What is wrong with a backend, for `ResolvedRefs`.
    pub(super) fn unresolved(&self, route: &RouteObject, to: &BackendRef) -> Option<Flaw> {
        self.target(route, to).err()
    }
}
