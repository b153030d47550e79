//! Resources as they are used. Decoding either gives all of a resource or says why not: a value that
//! this build does not know must never turn a deny into an allow.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::Access;
use tulle_mesh::proto;

/// Where a dialled address leads.
#[derive(Clone, Debug)]
pub enum Destination {
    /// Nobody in the cluster: passed through as it is.
    Unknown,
    /// A port of a Service.
    Service(Service),
    /// A pod's own address.
    Pod(Endpoint),
}

/// A port of a Service and its endpoints.
#[derive(Clone, Debug, Default)]
pub struct Service {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The Service's port.
    pub port: u16,
    /// What is spoken there.
    pub protocol: Protocol,
    /// Where it is served.
    pub endpoints: Vec<Endpoint>,
    /// Shares of revisions in permille; empty: none. One without a name is that of every endpoint whose
    /// revision no other names.
    pub split: Vec<(Arc<str>, u32)>,
    /// The Canary that the shares are of.
    pub canary: Option<CanaryRef>,
    /// A client stays with an endpoint for this long after its last request.
    pub affinity: Option<Duration>,
}

/// A Canary and the version of its shares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CanaryRef {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// The version of the shares.
    pub epoch: u64,
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

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address and port, as in the slice.
    pub address: SocketAddr,
    /// Whom its certificate must name; `None`: it is not meshed.
    pub identity: Option<WorkloadId>,
    /// The revision of its pod.
    pub revision: Arc<str>,
    /// It is going: no new requests.
    pub terminating: bool,
    /// The uid of its pod; empty: it is none of the cluster's.
    pub pod_uid: Arc<str>,
}

/// What this pod enforces on connections that arrive.
#[derive(Debug)]
pub struct Inbound {
    /// Whether plain text is accepted.
    pub mtls: Mtls,
    /// Who may call; `None`: everybody.
    pub access: Option<InboundAccess>,
    /// Rules that are only tried: what they would refuse is told, and let through.
    pub shadow: Option<InboundAccess>,
    /// Whether plain text would be refused by what is only tried.
    pub shadow_strict: bool,
    /// The pod's revision.
    pub revision: String,
}

/// Access rules and where they come from.
#[derive(Debug)]
pub struct InboundAccess {
    /// The rules.
    pub rules: Access,
    /// `namespace/name` of the policy.
    pub policy: String,
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

/// Why a resource was refused; goes to the operator and into the object's condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// A decoded resource.
#[derive(Debug)]
pub enum Resource {
    /// For connections that arrive.
    Inbound(Inbound),
    /// For connections to an address.
    Destination(SocketAddr, Destination),
}

/// Decodes a resource for a sidecar with these features.
///
/// # Errors
/// [`Refused`] with a reason; the last good one stays.
pub fn decode(resource: &proto::Resource, features: &[&str]) -> Result<Resource, Refused> {
    if let Some(feature) = resource.requires.iter().find(|feature| !features.contains(&feature.as_str())) {
        let version = env!("CARGO_PKG_VERSION");
        return Err(Refused(format!(
            "this sidecar ({version}) has no {feature}: restart the pod to update it"
        )));
    }
    match &resource.body {
        Some(proto::resource::Body::Inbound(inbound)) => Ok(Resource::Inbound(decode_inbound(inbound)?)),
        Some(proto::resource::Body::Destination(destination)) => {
            let name = resource.name.as_ref().map_or("", |name| name.name.as_str());
            let address = name.parse().map_err(|_| Refused(format!("{name:?} is no address")))?;
            Ok(Resource::Destination(address, decode_destination(destination)?))
        }
        None => Err(Refused("the resource has no body that this sidecar knows".to_owned())),
    }
}

fn decode_inbound(inbound: &proto::Inbound) -> Result<Inbound, Refused> {
    let mtls = match inbound.mtls() {
        proto::MtlsMode::Permissive => Mtls::Permissive,
        proto::MtlsMode::Strict => Mtls::Strict,
        proto::MtlsMode::Off => Mtls::Off,
        proto::MtlsMode::Unspecified => {
            return Err(Refused(format!("mTLS mode {} is unknown", inbound.mtls)));
        }
    };
    let rules = |access: &proto::Access| {
        let policy = access.policy.as_ref();
        let rules = Access::compile(access).map_err(|error| Refused(error.to_string()))?;
        let policy = policy.map_or_else(String::new, |p| format!("{}/{}", p.namespace, p.name));
        Ok(InboundAccess { rules, policy })
    };
    Ok(Inbound {
        mtls,
        access: inbound.access.as_ref().map(rules).transpose()?,
        shadow: inbound.shadow.as_ref().map(rules).transpose()?,
        shadow_strict: inbound.shadow_strict,
        revision: inbound.revision.clone(),
    })
}

fn decode_destination(destination: &proto::Destination) -> Result<Destination, Refused> {
    match &destination.kind {
        None => Err(Refused("the destination is of a kind that this sidecar does not know".to_owned())),
        Some(proto::destination::Kind::Unknown(_)) => Ok(Destination::Unknown),
        Some(proto::destination::Kind::Pod(pod)) => {
            let endpoint =
                pod.endpoint.as_ref().ok_or_else(|| Refused("a pod without endpoint".to_owned()))?;
            Ok(Destination::Pod(decode_endpoint(endpoint)?))
        }
        Some(proto::destination::Kind::Service(service)) => {
            let endpoints = service.endpoints.iter().map(decode_endpoint).collect::<Result<_, _>>()?;
            let split = service.split.iter().map(|share| (share.revision.as_str().into(), share.permille));
            Ok(Destination::Service(Service {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
                port: u16::try_from(service.port)
                    .map_err(|_| Refused(format!("{} is no port", service.port)))?,
                protocol: match proto::Protocol::try_from(service.protocol) {
                    Ok(proto::Protocol::Detect) => Protocol::Detect,
                    Ok(proto::Protocol::Http1) => Protocol::Http1,
                    Ok(proto::Protocol::Http2) => Protocol::Http2,
                    Ok(proto::Protocol::Opaque) => Protocol::Opaque,
                    Err(_) => return Err(Refused(format!("protocol {} is unknown", service.protocol))),
                },
                endpoints,
                split: split.collect(),
                canary: service.canary.as_ref().map(|canary| CanaryRef {
                    namespace: canary.namespace.as_str().into(),
                    name: canary.name.as_str().into(),
                    epoch: canary.epoch,
                }),
                affinity: match service.session_affinity_seconds {
                    0 => None,
                    seconds => Some(Duration::from_secs(u64::from(seconds))),
                },
            }))
        }
    }
}

fn decode_endpoint(endpoint: &proto::Endpoint) -> Result<Endpoint, Refused> {
    let address =
        endpoint.address.parse().map_err(|_| Refused(format!("{:?} is no address", endpoint.address)))?;
    let identity = if endpoint.identity.is_empty() {
        None
    } else {
        let parsed = endpoint.identity.parse();
        Some(parsed.map_err(|error| Refused(format!("identity {:?}: {error}", endpoint.identity)))?)
    };
    Ok(Endpoint {
        address,
        identity,
        revision: endpoint.revision.as_str().into(),
        terminating: endpoint.state() == proto::EndpointState::Terminating,
        pod_uid: endpoint.pod_uid.as_str().into(),
    })
}

#[cfg(test)]
mod tests {
    use tulle_mesh::features;

    use super::*;

    #[test]
    fn a_resource_that_needs_more_than_this_build_has_is_refused() {
        let resource = proto::Resource { requires: vec!["access/v9".into()], ..Default::default() };
        assert!(decode(&resource, features::ALL).unwrap_err().0.contains("access/v9"));
    }

    #[test]
    fn the_canary_of_a_service_and_the_pods_of_its_endpoints_are_known() {
        let service = proto::ServicePort {
            split: vec![proto::RevisionShare { revision: "a".into(), permille: 1000 }],
            canary: Some(proto::CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 7 }),
            endpoints: vec![proto::Endpoint {
                address: "10.0.0.1:80".into(),
                pod_uid: "u1".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let kind = Some(proto::destination::Kind::Service(service));
        let decoded = decode_destination(&proto::Destination { kind }).unwrap();
        let Destination::Service(service) = decoded else { panic!("no Service") };
        let canary = CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 7 };
        assert_eq!(service.canary, Some(canary));
        assert_eq!(&*service.endpoints[0].pod_uid, "u1");
    }

    #[test]
    fn values_that_this_build_does_not_know_are_refused_and_not_defaulted() {
        let inbound = |inbound| proto::Resource {
            body: Some(proto::resource::Body::Inbound(inbound)),
            ..Default::default()
        };
        assert!(decode(&inbound(proto::Inbound { mtls: 99, ..Default::default() }), features::ALL).is_err());
        let access = proto::Access {
            deny: vec![proto::Rule {
                from: vec![proto::Peer { any_namespace: true, ..Default::default() }],
                to: vec![],
            }],
            ..Default::default()
        };
        let unknown_peer = proto::Inbound { mtls: 1, access: Some(access), ..Default::default() };
        assert!(decode(&inbound(unknown_peer), features::ALL).is_err());
        let empty = proto::Resource {
            body: Some(proto::resource::Body::Destination(proto::Destination { kind: None })),
            ..Default::default()
        };
        assert!(decode(&empty, features::ALL).is_err());
    }
}
