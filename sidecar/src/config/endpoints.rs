//! Who serves a port of a Service: its endpoints, and how requests are shared out among their versions.
//!
//! Decoding is lenient where that of all other resources is strict, because every sidecar must learn where pods are.

use std::net::SocketAddr;
use std::sync::Arc;

use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto;

use super::resource::Refused;

/// Who serves a port of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Where it is served.
    pub endpoints: Vec<Endpoint>,
    /// Shares of revisions in permille; empty: none. One without a name is that of every endpoint whose
    /// revision no other names.
    pub split: Vec<(Arc<str>, u32)>,
    /// The Canary that the shares are of.
    pub canary: Option<CanaryRef>,
    /// Which requests go to a version on trial beside its share.
    pub steering: Option<Steering>,
    /// Which endpoints the Service prefers.
    pub distribution: Distribution,
}

impl Endpoints {
    /// As the operator sends them, without what was left out when they were decoded.
    pub(super) fn to_proto(&self) -> proto::Endpoints {
        let share = |(revision, permille): &(Arc<str>, u32)| proto::RevisionShare {
            revision: revision.to_string(),
            permille: *permille,
        };
        let distribution = match self.distribution {
            Distribution::Any => proto::Distribution::Any,
            Distribution::SameZone => proto::Distribution::SameZone,
            Distribution::SameNode => proto::Distribution::SameNode,
        };
        proto::Endpoints {
            endpoints: self.endpoints.iter().map(Endpoint::to_proto).collect(),
            split: self.split.iter().map(share).collect(),
            canary: self.canary.as_ref().map(|canary| proto::CanaryRef {
                namespace: canary.namespace.to_string(),
                name: canary.name.to_string(),
                epoch: canary.epoch,
            }),
            steering: self.steering.as_ref().map(Steering::to_proto),
            distribution: distribution.into(),
        }
    }
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

/// Which requests go to a version on trial beside its share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steering {
    /// The version on trial.
    pub revision: Arc<str>,
    /// A request with any of these goes to it.
    pub matches: Vec<SteeringMatch>,
    /// A copy of so many of the other requests, in permille, goes to it.
    pub mirror_permille: u32,
    /// The name of the cookie that keeps a user with a version; `None`: users are not kept.
    pub sticky: Option<Arc<str>>,
    /// What it gets by its share.
    pub share: TrialShare,
}

impl Steering {
    /// Whether copies are all that the version on trial is compared by: it has no share of the requests.
    pub fn compares_copies(&self) -> bool {
        self.mirror_permille > 0 && self.share == TrialShare::None
    }

    fn to_proto(&self) -> proto::Steering {
        use proto::value_match::Type;
        let matched = |wanted: &SteeringMatch| {
            let (kind, name, value) = match wanted {
                SteeringMatch::Header { name, value } => (Type::Exact, name, value),
                SteeringMatch::Cookie { name, value } => (Type::Cookie, name, value),
            };
            proto::ValueMatch { r#type: kind.into(), name: name.to_string(), value: value.to_string() }
        };
        proto::Steering {
            revision: self.revision.to_string(),
            r#match: self.matches.iter().map(matched).collect(),
            mirror_permille: self.mirror_permille,
            sticky_cookie: self.sticky.as_deref().unwrap_or_default().to_owned(),
        }
    }
}

/// What a version on trial gets by its share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TrialShare {
    /// Nothing.
    #[default]
    None,
    /// A part of the requests.
    Part,
    /// All requests.
    All,
}

impl TrialShare {
    /// That of a revision. What other workloads behind the Service get, which has no name, does not count.
    fn of(revision: &str, split: &[proto::RevisionShare]) -> Self {
        let mut served = split.iter().filter(|share| share.permille > 0 && !share.revision.is_empty());
        let has_own = served.clone().any(|share| share.revision == revision);
        match (has_own, served.any(|share| share.revision != revision)) {
            (false, _) => Self::None,
            (true, true) => Self::Part,
            (true, false) => Self::All,
        }
    }
}

/// What sends a request to a version on trial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SteeringMatch {
    /// A header with exactly this value.
    Header {
        /// Its name.
        name: Arc<str>,
        /// Its value.
        value: Arc<str>,
    },
    /// A cookie with exactly this value.
    Cookie {
        /// Its name.
        name: Arc<str>,
        /// Its value.
        value: Arc<str>,
    },
}

/// Which endpoints a Service prefers (`trafficDistribution`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Distribution {
    /// All are equal.
    #[default]
    Any,
    /// Those in the client's zone.
    SameZone,
    /// Those on the client's node.
    SameNode,
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
    /// The zone of its node; empty: unknown.
    pub zone: Arc<str>,
    /// Its node; empty: unknown.
    pub node: Arc<str>,
    /// When its pod became ready, in seconds of Unix time; 0: unknown.
    pub ready_unix: i64,
    /// The zones whose clients shall use it, as its slice says; empty: it says nothing.
    pub for_zones: Box<[Arc<str>]>,
    /// The same by node.
    pub for_nodes: Box<[Arc<str>]>,
}

impl Endpoint {
    /// An endpoint that is not meshed, and of which nothing else is known.
    pub fn at(address: SocketAddr) -> Self {
        Self {
            address,
            identity: None,
            revision: Arc::default(),
            terminating: false,
            pod_uid: Arc::default(),
            zone: Arc::default(),
            node: Arc::default(),
            ready_unix: 0,
            for_zones: Box::default(),
            for_nodes: Box::default(),
        }
    }

    fn to_proto(&self) -> proto::Endpoint {
        let state = match self.terminating {
            true => proto::EndpointState::Terminating,
            false => proto::EndpointState::Ready,
        };
        proto::Endpoint {
            address: self.address.to_string(),
            identity: self.identity.as_ref().map(WorkloadId::to_string).unwrap_or_default(),
            revision: self.revision.to_string(),
            zone: self.zone.to_string(),
            state: state.into(),
            pod_uid: self.pod_uid.to_string(),
            ready_unix: self.ready_unix,
            node: self.node.to_string(),
            for_zones: self.for_zones.iter().map(|zone| zone.to_string()).collect(),
            for_nodes: self.for_nodes.iter().map(|node| node.to_string()).collect(),
        }
    }
}

/// One endpoint that cannot be read is left out: without the others, nobody could be reached.
pub(super) fn decode_endpoints(endpoints: &proto::Endpoints) -> Endpoints {
    let decode = |endpoint: &proto::Endpoint| match decode_endpoint(endpoint) {
        Ok(endpoint) => Some(endpoint),
        Err(Refused(reason)) => {
            tracing::error!(reason, "left out an endpoint");
            None
        }
    };
    let split = endpoints.split.iter().map(|share| (share.revision.as_str().into(), share.permille));
    Endpoints {
        endpoints: endpoints.endpoints.iter().filter_map(decode).collect(),
        split: split.collect(),
        canary: endpoints.canary.as_ref().map(|canary| CanaryRef {
            namespace: canary.namespace.as_str().into(),
            name: canary.name.as_str().into(),
            epoch: canary.epoch,
        }),
        steering: endpoints.steering.as_ref().map(|steering| decode_steering(steering, &endpoints.split)),
        // One that this build does not know: all endpoints are used.
        distribution: match endpoints.distribution() {
            proto::Distribution::Any => Distribution::Any,
            proto::Distribution::SameZone => Distribution::SameZone,
            proto::Distribution::SameNode => Distribution::SameNode,
        },
    }
}

/// A match that cannot be read is left out: without it, fewer requests go to a version on trial.
fn decode_steering(steering: &proto::Steering, split: &[proto::RevisionShare]) -> Steering {
    use proto::value_match::Type;
    let decode = |wanted: &proto::ValueMatch| {
        let (name, value) = (wanted.name.as_str().into(), wanted.value.as_str().into());
        match wanted.r#type() {
            Type::Exact => Some(SteeringMatch::Header { name, value }),
            Type::Cookie => Some(SteeringMatch::Cookie { name, value }),
            other => {
                tracing::error!(?other, name = wanted.name, "left out a match of a Canary");
                None
            }
        }
    };
    Steering {
        revision: steering.revision.as_str().into(),
        matches: steering.r#match.iter().filter_map(decode).collect(),
        mirror_permille: steering.mirror_permille,
        sticky: (!steering.sticky_cookie.is_empty()).then(|| steering.sticky_cookie.as_str().into()),
        share: TrialShare::of(&steering.revision, split),
    }
}

pub(super) fn decode_endpoint(endpoint: &proto::Endpoint) -> Result<Endpoint, Refused> {
    let address =
        endpoint.address.parse().map_err(|_| Refused(format!("invalid address {:?}", endpoint.address)))?;
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
        zone: endpoint.zone.as_str().into(),
        node: endpoint.node.as_str().into(),
        ready_unix: endpoint.ready_unix,
        for_zones: endpoint.for_zones.iter().map(|zone| zone.as_str().into()).collect(),
        for_nodes: endpoint.for_nodes.iter().map(|node| node.as_str().into()).collect(),
    })
}

#[cfg(test)]
mod tests {
    use proto::resource::Body;

    use super::*;
    use crate::config::resource::{Resource, decode};

    #[test]
    fn endpoints_are_known_whatever_they_require_and_one_that_cannot_be_read_is_left_out() {
        let endpoint = |address: &str, identity: &str| proto::Endpoint {
            address: address.into(),
            identity: identity.into(),
            pod_uid: "u1".into(),
            zone: "z1".into(),
            for_nodes: vec!["n1".into()],
            ..Default::default()
        };
        let matched = |kind: proto::value_match::Type| proto::ValueMatch {
            r#type: kind.into(),
            name: "x".into(),
            value: "y".into(),
        };
        let endpoints = proto::Endpoints {
            endpoints: vec![
                endpoint("10.0.0.1:80", ""),
                endpoint("10.0.0.2:80", "spiffe://no"),
                endpoint("x", ""),
            ],
            split: vec![proto::RevisionShare { revision: "a".into(), permille: 1000 }],
            canary: Some(proto::CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 7 }),
            distribution: 99,
            steering: Some(proto::Steering {
                revision: "b".into(),
                r#match: vec![
                    matched(proto::value_match::Type::Exact),
                    matched(proto::value_match::Type::Regex),
                    matched(proto::value_match::Type::Cookie),
                ],
                sticky_cookie: "user".into(),
                ..Default::default()
            }),
        };
        let name = proto::ResourceName { name: "shop/web:80".into(), ..Default::default() };
        let resource = proto::Resource {
            name: Some(name),
            body: Some(Body::Endpoints(endpoints)),
            requires: vec!["endpoints/v9".into()],
            ..Default::default()
        };
        let Ok(Resource::Endpoints(name, decoded)) = decode(&resource, &[]) else { panic!("no endpoints") };
        assert_eq!(&*name, "shop/web:80");
        let canary = CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 7 };
        assert_eq!(decoded.canary, Some(canary));
        assert_eq!(decoded.split, vec![(Arc::from("a"), 1000)]);
        let [only] = decoded.endpoints.as_slice() else { panic!("{decoded:?}") };
        assert_eq!((only.address.port(), &*only.pod_uid, &*only.zone), (80, "u1", "z1"));
        assert_eq!(*only.for_nodes, [Arc::from("n1")]);
        assert_eq!(decoded.distribution, Distribution::Any);
        let steering = decoded.steering.unwrap();
        let (name, value): (Arc<str>, Arc<str>) = ("x".into(), "y".into());
        let header = SteeringMatch::Header { name: Arc::clone(&name), value: Arc::clone(&value) };
        assert_eq!(steering.matches, [header, SteeringMatch::Cookie { name, value }]);
        assert_eq!(steering.sticky.as_deref(), Some("user"));
    }

    #[test]
    fn what_is_shown_of_endpoints_is_what_the_operator_sent() {
        let full = proto::Endpoint {
            address: "[fd00::1]:80".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
            revision: "r1".into(),
            zone: "z1".into(),
            state: proto::EndpointState::Terminating.into(),
            pod_uid: "u1".into(),
            ready_unix: 1_700_000_000,
            node: "n1".into(),
            for_zones: vec!["z1".into(), "z2".into()],
            for_nodes: vec!["n1".into()],
        };
        let bare = proto::Endpoint { address: "10.0.0.1:80".into(), ..Default::default() };
        let matched = |kind: proto::value_match::Type| proto::ValueMatch {
            r#type: kind.into(),
            name: "x".into(),
            value: "y".into(),
        };
        for distribution in
            [proto::Distribution::Any, proto::Distribution::SameZone, proto::Distribution::SameNode]
        {
            let sent = proto::Endpoints {
                endpoints: vec![full.clone(), bare.clone()],
                split: vec![proto::RevisionShare { revision: "a".into(), permille: 1000 }],
                canary: Some(proto::CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 7 }),
                steering: Some(proto::Steering {
                    revision: "b".into(),
                    r#match: vec![
                        matched(proto::value_match::Type::Exact),
                        matched(proto::value_match::Type::Cookie),
                    ],
                    mirror_permille: 5,
                    sticky_cookie: "user".into(),
                }),
                distribution: distribution.into(),
            };
            assert_eq!(decode_endpoints(&sent).to_proto(), sent);
        }
        let none = proto::Endpoints::default();
        assert_eq!(decode_endpoints(&none).to_proto(), none);
    }

    #[test]
    fn the_share_of_the_version_on_trial_is_told_from_the_split() {
        for (split, expected) in [
            (&[("a", 1000), ("b", 0)][..], TrialShare::None),
            (&[("a", 1000)], TrialShare::None),
            (&[("a", 500), ("", 500), ("b", 0)], TrialShare::None),
            (&[("a", 950), ("b", 50)], TrialShare::Part),
            (&[("a", 0), ("b", 1000)], TrialShare::All),
            (&[("a", 0), ("", 500), ("b", 500)], TrialShare::All),
        ] {
            let share = |(revision, permille): &(&str, u32)| proto::RevisionShare {
                revision: (*revision).to_owned(),
                permille: *permille,
            };
            let shares: Vec<proto::RevisionShare> = split.iter().map(share).collect();
            assert_eq!(TrialShare::of("b", &shares), expected, "{split:?}");
        }
    }
}
