//! Resources as they are used. Decoding either gives all of a resource or says why not: a value that this build
//! does not know must never turn a deny into an allow.
//!
//! Resources are small, and each is refused by itself: what a pod enforces on connections that arrive comes in
//! sections (workload, mTLS, access, limits, logs), and where a dialled address leads (its route, with its rules) is apart
//! from who serves there (endpoints). The resources of earlier operators, `Inbound` and `Destination`, are not read: an
//! upgrade begins with the operator, which serves sidecars of both kinds.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tulle_mesh::policy::Access;
use tulle_mesh::proto;

use super::endpoints::{Endpoint, Endpoints, decode_endpoint, decode_endpoints};
use super::limits::{self, InboundLimits, LimitsSection};
use super::logs::{self, AccessLog};
use super::rules::{Rules, decode_rules};
use super::traces::Tracing;
use super::traffic::{Traffic, decode_traffic};
use crate::telemetry::rules::SectionCounts;

/// Where a dialled address leads.
#[derive(Clone, Debug)]
pub enum Route {
    /// Nobody in the cluster: passed through as it is.
    Unknown,
    /// A port of a Service.
    Service(ServiceRoute),
    /// A pod's own address.
    Pod(PodRoute),
}

/// A port of a Service.
#[derive(Clone, Debug, Default)]
pub struct ServiceRoute {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The Service's port.
    pub port: u16,
    /// What is spoken there, as far as it was declared.
    pub protocol: Protocol,
    /// A client stays with an endpoint for this long after its last request.
    pub affinity: Option<Duration>,
    /// The name of the resource with its endpoints.
    pub endpoints: Arc<str>,
    /// Of the Gateway API's routes; `None`: everything goes to the Service itself.
    pub rules: Option<Arc<Rules>>,
    /// Sections of MeshPolicies that are enforced.
    pub traffic: Arc<Traffic>,
    /// Sections of MeshPolicies that are only tried: what they would do is counted.
    pub shadow: Arc<Traffic>,
}

impl ServiceRoute {
    /// The names of all endpoints that this leads to, each once: those of the Service itself come first.
    pub(super) fn all_endpoints(&self) -> Vec<Arc<str>> {
        let mut names = vec![Arc::clone(&self.endpoints)];
        for service in self.rules.iter().flat_map(|rules| &rules.services) {
            if !names.contains(&service.endpoints) {
                names.push(Arc::clone(&service.endpoints));
            }
        }
        names
    }
}

/// A pod's own address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodRoute {
    /// The pod.
    pub endpoint: Endpoint,
    /// What is spoken there, as far as it was declared.
    pub protocol: Protocol,
}

/// Where this pod runs; empty: unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The zone of its node.
    pub zone: Arc<str>,
    /// Its node.
    pub node: Arc<str>,
}

/// What is spoken on a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// The first bytes say.
    #[default]
    Detect,
    /// HTTP/1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Anything.
    Opaque,
}

/// What this pod enforces on connections that arrive: the sum of its sections.
#[derive(Debug)]
pub struct Inbound {
    /// Whether plain text is accepted.
    pub mtls: Mtls,
    /// Who may call; `None`: everybody.
    pub access: Option<InboundAccess>,
    /// Rules that are only tried: what they would refuse is reported, and let through.
    pub shadow: Option<InboundAccess>,
    /// Whether plain text would be refused by what is only tried.
    pub shadow_strict: bool,
    /// The pod's revision.
    pub revision: String,
    /// How much at once reaches the application; `None`: as much as comes.
    pub limits: Option<InboundLimits>,
}

/// Access rules and where they come from.
#[derive(Clone, Debug)]
pub struct InboundAccess {
    /// The rules.
    pub rules: Access,
    /// `namespace/name` of the policy.
    pub policy: String,
    /// What its rules have refused.
    pub counts: Arc<SectionCounts>,
}

impl InboundAccess {
    /// Rules of a policy, as `namespace/name`.
    pub fn new(rules: Access, policy: String) -> Self {
        let counts = Arc::new(SectionCounts::new(&policy, rules.deny_rules()));
        Self { rules, policy, counts }
    }
}

/// Whether plain text is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtls {
    /// It is.
    Permissive,
    /// It is not.
    Strict,
    /// It is, and nothing else is asked of clients.
    Off,
}

/// The section with what the pod is, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// The pod's revision.
    pub revision: String,
    /// Where it runs.
    pub place: Place,
    /// Where spans go, if any are made.
    pub tracing: Option<Arc<Tracing>>,
}

/// The section that decides about plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MtlsSection {
    /// Whether plain text is accepted.
    pub mode: Mtls,
    /// Whether plain text would be refused by what is only tried.
    pub shadow_strict: bool,
}

/// The section with the access rules.
#[derive(Clone, Debug, Default)]
pub struct AccessSection {
    /// Who may call; `None`: everybody.
    pub access: Option<InboundAccess>,
    /// Rules that are only tried.
    pub shadow: Option<InboundAccess>,
}

/// Why a resource was refused; goes to the operator and into the object's condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A decoded resource.
#[derive(Debug)]
pub enum Resource {
    /// What this pod is, and where.
    Workload(Workload),
    /// Whether this pod accepts plain text.
    Mtls(MtlsSection),
    /// Who may call this pod.
    Access(AccessSection),
    /// How much at once reaches this pod's application.
    Limits(LimitsSection),
    /// Which requests at this pod are logged.
    Logs(AccessLog),
    /// Where an address leads.
    Route(SocketAddr, Route),
    /// Who serves what routes name so.
    Endpoints(Arc<str>, Endpoints),
}

/// Decodes a resource for a sidecar with these features.
///
/// # Errors
/// [`Refused`] with a reason; the last good one stays. Endpoints are never refused for a feature: every sidecar must
/// learn where pods are.
pub fn decode(resource: &proto::Resource, features: &[&str]) -> Result<Resource, Refused> {
    use proto::resource::Body;
    let name = resource.name.as_ref().map_or("", |name| name.name.as_str());
    if let Some(Body::Endpoints(endpoints)) = &resource.body {
        return Ok(Resource::Endpoints(name.into(), decode_endpoints(endpoints)));
    }
    if let Some(feature) = resource.requires.iter().find(|feature| !features.contains(&feature.as_str())) {
        let version = env!("CARGO_PKG_VERSION");
        return refuse(format!("this sidecar ({version}) lacks {feature}: restart the pod to update it"));
    }
    match &resource.body {
        Some(Body::Workload(workload)) => {
            let place = Place { zone: workload.zone.as_str().into(), node: workload.node.as_str().into() };
            let tracing = Tracing::decode(workload).map(Arc::new);
            Ok(Resource::Workload(Workload { revision: workload.revision.clone(), place, tracing }))
        }
        Some(Body::Mtls(mtls)) => Ok(Resource::Mtls(decode_mtls(mtls)?)),
        Some(Body::Access(access)) => Ok(Resource::Access(decode_access(access)?)),
        Some(Body::Limits(limits)) => Ok(Resource::Limits(limits::decode(limits)?)),
        Some(Body::Logs(logs)) => Ok(Resource::Logs(logs::decode(logs)?)),
        Some(Body::Route(route)) => {
            let address = name.parse().map_err(|_| Refused(format!("invalid address {name:?}")))?;
            Ok(Resource::Route(address, decode_route(route)?))
        }
        _ => refuse("the resource has no body that this sidecar knows".to_owned()),
    }
}

/// What can be used of a route that was refused: where the address leads, without rules and sections. A client that got
/// nothing of it would send plain text to pods that may have a sidecar, or wait. `None`: not even that can be read.
pub fn usable(resource: &proto::Resource) -> Option<(SocketAddr, Route)> {
    use proto::resource::Body;
    use proto::route::Kind;
    let address = resource.name.as_ref()?.name.parse().ok()?;
    let Some(Body::Route(route)) = &resource.body else { return None };
    // One that this build does not know: the first bytes say what it is.
    let known = |protocol: i32| i32::from(proto::Protocol::try_from(protocol).unwrap_or_default());
    let kind = match route.kind.as_ref()? {
        Kind::Service(service) => Kind::Service(proto::ServiceRoute {
            protocol: known(service.protocol),
            rules: None,
            traffic: None,
            shadow: None,
            ..service.clone()
        }),
        Kind::Pod(pod) => Kind::Pod(proto::PodRoute { protocol: known(pod.protocol), ..pod.clone() }),
        Kind::Unknown(_) => Kind::Unknown(proto::Unknown {}),
    };
    Some((address, decode_route(&proto::Route { kind: Some(kind) }).ok()?))
}

pub(super) fn refuse<T>(reason: String) -> Result<T, Refused> {
    Err(Refused(reason))
}

fn decode_mtls(mtls: &proto::Mtls) -> Result<MtlsSection, Refused> {
    // An unknown mode reads as `Unspecified`.
    let mode = match mtls.mode() {
        proto::MtlsMode::Permissive => Mtls::Permissive,
        proto::MtlsMode::Strict => Mtls::Strict,
        proto::MtlsMode::Off => Mtls::Off,
        proto::MtlsMode::Unspecified => return refuse(format!("unknown mTLS mode {}", mtls.mode)),
    };
    Ok(MtlsSection { mode, shadow_strict: mtls.shadow_strict })
}

fn decode_access(section: &proto::AccessRules) -> Result<AccessSection, Refused> {
    let rules = |access: &proto::Access| -> Result<InboundAccess, Refused> {
        let rules = Access::compile(access).map_err(|error| Refused(error.to_string()))?;
        let policy = access.policy.as_ref();
        let policy = policy.map_or_else(String::new, |p| format!("{}/{}", p.namespace, p.name));
        Ok(InboundAccess::new(rules, policy))
    };
    Ok(AccessSection {
        access: section.access.as_ref().map(rules).transpose()?,
        shadow: section.shadow.as_ref().map(rules).transpose()?,
    })
}

fn decode_route(route: &proto::Route) -> Result<Route, Refused> {
    use proto::route::Kind;
    match &route.kind {
        None => refuse("the route is of a kind that this sidecar does not know".to_owned()),
        Some(Kind::Unknown(_)) => Ok(Route::Unknown),
        Some(Kind::Pod(pod)) => {
            let Some(endpoint) = &pod.endpoint else { return refuse("a pod without endpoint".to_owned()) };
            let (endpoint, protocol) = (decode_endpoint(endpoint)?, decode_protocol(pod.protocol)?);
            Ok(Route::Pod(PodRoute { endpoint, protocol }))
        }
        Some(Kind::Service(service)) => {
            if service.endpoints.is_empty() {
                return refuse("a Service without the name of its endpoints".to_owned());
            }
            Ok(Route::Service(ServiceRoute {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                port: decode_port(service.port)?,
                protocol: decode_protocol(service.protocol)?,
                affinity: match service.session_affinity_seconds {
                    0 => None,
                    seconds => Some(Duration::from_secs(u64::from(seconds))),
                },
                endpoints: service.endpoints.as_str().into(),
                rules: service.rules.as_ref().map(decode_rules).transpose()?.map(Arc::new),
                traffic: decode_traffic(service.traffic.as_ref())?,
                shadow: decode_traffic(service.shadow.as_ref())?,
            }))
        }
    }
}

pub(super) fn decode_port(port: u32) -> Result<u16, Refused> {
    u16::try_from(port).map_err(|_| Refused(format!("invalid port {port}")))
}

pub(super) fn decode_protocol(protocol: i32) -> Result<Protocol, Refused> {
    match proto::Protocol::try_from(protocol) {
        Ok(proto::Protocol::Detect) => Ok(Protocol::Detect),
        Ok(proto::Protocol::Http1) => Ok(Protocol::Http1),
        Ok(proto::Protocol::Http2) => Ok(Protocol::Http2),
        Ok(proto::Protocol::Opaque) => Ok(Protocol::Opaque),
        Err(_) => refuse(format!("unknown protocol {protocol}")),
    }
}

#[cfg(test)]
mod tests {
    use proto::resource::Body;
    use tulle_mesh::features;

    use super::*;

    fn named(name: &str, body: Body) -> proto::Resource {
        let name = proto::ResourceName { name: name.into(), ..Default::default() };
        proto::Resource { name: Some(name), body: Some(body), ..Default::default() }
    }

    fn refused(resource: &proto::Resource) -> String {
        decode(resource, features::ALL).unwrap_err().0
    }

    #[test]
    fn a_resource_that_needs_more_than_this_build_has_is_refused() {
        let resource = proto::Resource { requires: vec!["access/v9".into()], ..Default::default() };
        assert!(refused(&resource).contains("access/v9"));
    }

    #[test]
    fn of_a_route_that_is_refused_the_service_itself_is_used() {
        let service = proto::ServiceRoute {
            name: "web".into(),
            endpoints: "shop/web:80".into(),
            protocol: 99,
            rules: Some(proto::Rules { kind: 99, ..Default::default() }),
            traffic: Some(proto::Traffic::default()),
            ..Default::default()
        };
        let kind = Some(proto::route::Kind::Service(service));
        let mut resource = named("10.96.0.1:80", Body::Route(proto::Route { kind }));
        resource.requires = vec!["routes/v9".into()];
        refused(&resource);
        let Some((_, Route::Service(used))) = usable(&resource) else { panic!("nothing") };
        assert_eq!((&*used.endpoints, used.protocol), ("shop/web:80", Protocol::Detect));
        assert!(used.rules.is_none());
        assert!(usable(&named("10.96.0.1:80", Body::Route(proto::Route { kind: None }))).is_none());
    }

    #[test]
    fn a_route_names_its_endpoints_and_a_pod_has_a_protocol() {
        let service = proto::ServiceRoute {
            namespace: "shop".into(),
            name: "web".into(),
            port: 80,
            protocol: proto::Protocol::Http2.into(),
            endpoints: "shop/web:80".into(),
            session_affinity_seconds: 60,
            ..Default::default()
        };
        let kind = Some(proto::route::Kind::Service(service.clone()));
        let decoded = decode(&named("10.96.0.1:80", Body::Route(proto::Route { kind })), features::ALL);
        let Ok(Resource::Route(address, Route::Service(route))) = decoded else { panic!("no Service") };
        assert_eq!(address, SocketAddr::from(([10, 96, 0, 1], 80)));
        assert_eq!((&*route.endpoints, route.protocol), ("shop/web:80", Protocol::Http2));
        assert_eq!(route.affinity, Some(Duration::from_secs(60)));

        let endpoint = proto::Endpoint { address: "10.0.0.1:6379".into(), ..Default::default() };
        let pod = proto::PodRoute { endpoint: Some(endpoint), protocol: proto::Protocol::Opaque.into() };
        let kind = Some(proto::route::Kind::Pod(pod));
        let decoded = decode(&named("10.0.0.1:6379", Body::Route(proto::Route { kind })), features::ALL);
        let Ok(Resource::Route(_, Route::Pod(pod))) = decoded else { panic!("no pod") };
        assert_eq!(pod.protocol, Protocol::Opaque);
    }

    #[test]
    fn values_that_this_build_does_not_know_are_refused_and_not_defaulted() {
        let mtls = |mode| named("uid", Body::Mtls(proto::Mtls { mode, ..Default::default() }));
        assert!(refused(&mtls(99)).contains("99"));
        assert!(refused(&mtls(0)).contains('0'));
        let deny =
            proto::Rule { from: vec![proto::Peer { any_namespace: true, ..Default::default() }], to: vec![] };
        let access = proto::Access { deny: vec![deny], ..Default::default() };
        let rules = |rules| named("uid", Body::Access(rules));
        refused(&rules(proto::AccessRules { access: Some(access.clone()), shadow: None }));
        refused(&rules(proto::AccessRules { access: None, shadow: Some(access) }));
        refused(&named("10.96.0.1:80", Body::Route(proto::Route { kind: None })));
        let nowhere = proto::route::Kind::Service(proto::ServiceRoute::default());
        refused(&named("10.96.0.1:80", Body::Route(proto::Route { kind: Some(nowhere) })));
        let strange = proto::ServiceRoute { endpoints: "a/b:1".into(), protocol: 99, ..Default::default() };
        let strange = proto::route::Kind::Service(strange);
        assert!(
            refused(&named("10.96.0.1:80", Body::Route(proto::Route { kind: Some(strange) }))).contains("99")
        );
        let unknown = proto::route::Kind::Unknown(proto::Unknown {});
        assert!(
            refused(&named("nowhere", Body::Route(proto::Route { kind: Some(unknown) }))).contains("nowhere")
        );
        refused(&proto::Resource::default());
    }
}
