//! Resources of one pod's sidecar, as `tulle config POD --diff` compares them: those that the sidecar has accepted, from
//! its admin port, and those that the operator would send it now, from [`crate::query::Paths::RESOURCES`].
//!
//! Contents travel as the bytes of the discovery protocol. Both ends replace values that may be credentials before
//! they answer ([`HIDDEN`]), and the protocol itself carries no keys.

use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::proto::{self, ResourceType, filter, resource, route, value_match};
use crate::tap::is_secret;

/// The path of the sidecar's admin port. It answers through a port-forward only. As with the operator, parameter
/// `resource=KIND/NAME`, here not escaped, asks for a content.
pub const PATH: &str = "/config/resources";
/// Contents that are asked for in one request.
pub const MAX_CONTENTS: usize = 50;
/// Bytes of contents, on the wire, that the operator answers at once; beyond them, versions alone. Ten endpoints take
/// about 2 KiB.
pub const MAX_CONTENT_BYTES: usize = 2 << 20;
/// Stands for a value that is not shown.
pub const HIDDEN: &str = "(hidden)";
/// The description of the discovery protocol, by which contents are read: a `FileDescriptorSet`.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// All resources of a sidecar.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// In order of kind and name.
    pub resources: Vec<Described>,
}

/// A resource.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Described {
    /// `route`, `endpoints`, or the section of the pod: `workload`, `mtls`, `access`, `limits`, `telemetry`.
    pub kind: String,
    /// Its name: of a route the dialled address, of a section the pod's uid.
    pub name: String,
    /// A digest of its content.
    pub version: String,
    /// A `tulle.v1.Resource` without name and version, in hexadecimal. `None`: not asked for, not kept, beyond what one
    /// answer may have, or about a namespace that whoever asks may not see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

impl Described {
    /// A resource as it is shown. `None`: it has no name.
    pub fn of(resource: &proto::Resource, with_content: bool) -> Option<Self> {
        let name = resource.name.as_ref()?;
        Some(Self {
            kind: kind_name(name.r#type()).to_owned(),
            name: name.name.clone(),
            version: resource.version.clone(),
            content: with_content.then(|| hex(&content(resource))),
        })
    }

    /// With a [`content`] that was kept.
    #[must_use]
    pub fn with(self, content: &[u8]) -> Self {
        Self { content: Some(hex(content)), ..self }
    }

    /// Kind and name, as parameter `resource` has them: `route/10.96.0.1:80`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.kind, self.name)
    }

    /// The bytes of the content. `None`: there is none, or it is not hexadecimal.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        unhex(self.content.as_deref()?)
    }
}

fn kind_name(kind: ResourceType) -> &'static str {
    match kind {
        ResourceType::Inbound => "inbound",
        ResourceType::Destination => "destination",
        ResourceType::Endpoints => "endpoints",
        ResourceType::Route => "route",
        ResourceType::Workload => "workload",
        ResourceType::Mtls => "mtls",
        ResourceType::Access => "access",
        ResourceType::Limits => "limits",
        ResourceType::Logs => "telemetry",
        ResourceType::Unspecified => "resource",
    }
}

/// What is shown of a resource: it on the wire, without name, version, and values that may be credentials.
pub fn content(resource: &proto::Resource) -> Vec<u8> {
    shown(resource).encode_to_vec()
}

/// The content of a resource without values that may be credentials.
fn shown(resource: &proto::Resource) -> proto::Resource {
    let mut shown = proto::Resource { name: None, version: String::new(), ..resource.clone() };
    match &mut shown.body {
        Some(resource::Body::Route(proto::Route { kind: Some(route::Kind::Service(service)) })) => {
            if let Some(rules) = &mut service.rules {
                hide_rules(rules);
            }
        }
        Some(resource::Body::Endpoints(endpoints)) => {
            let steering = endpoints.steering.iter_mut();
            steering.flat_map(|steering| &mut steering.r#match).for_each(hide_match);
        }
        _ => {}
    }
    shown
}

fn hide_rules(rules: &mut proto::Rules) {
    for rule in &mut rules.rules {
        hide_filters(&mut rule.filters);
        rule.backends.iter_mut().for_each(|backend| hide_filters(&mut backend.filters));
    }
    for found in &mut rules.matches {
        found.headers.iter_mut().chain(&mut found.query).for_each(hide_match);
    }
}

/// Routes add credentials to requests under any name of a header.
fn hide_filters(filters: &mut [proto::Filter]) {
    for filter in filters {
        match &mut filter.kind {
            Some(filter::Kind::RequestHeaders(edits) | filter::Kind::ResponseHeaders(edits)) => {
                edits.set.iter_mut().chain(&mut edits.add).for_each(|header| hide(&mut header.value));
            }
            Some(filter::Kind::Mirror(mirror)) => {
                if let Some(backend) = &mut mirror.backend {
                    hide_filters(&mut backend.filters);
                }
            }
            _ => {}
        }
    }
}

fn hide_match(found: &mut proto::ValueMatch) {
    if found.r#type() == value_match::Type::Cookie || is_secret(&found.name) {
        hide(&mut found.value);
    }
}

fn hide(value: &mut String) {
    HIDDEN.clone_into(value);
}

fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(u32::from(half), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |letter: char| letter.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let halves: Vec<u8> = text.chars().map(digit).collect::<Option<_>>()?;
    let pairs = halves.chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    Some(pairs.map(|pair| pair.iter().fold(0_u8, |byte, half| (byte << 4) | half)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, value: &str) -> proto::Header {
        proto::Header { name: name.into(), value: value.into() }
    }

    fn matching(name: &str, value: &str) -> proto::ValueMatch {
        proto::ValueMatch { name: name.into(), value: value.into(), ..Default::default() }
    }

    fn named(kind: ResourceType, name: &str, body: resource::Body) -> proto::Resource {
        let name = proto::ResourceName { r#type: kind.into(), cluster: String::new(), name: name.into() };
        proto::Resource { name: Some(name), version: "v1".into(), body: Some(body), ..Default::default() }
    }

    fn read(described: &Described) -> proto::Resource {
        proto::Resource::decode(described.bytes().unwrap().as_slice()).unwrap()
    }

    #[test]
    fn a_resource_is_described_by_kind_name_version_and_content() {
        let workload = proto::Workload { revision: "r1".into(), ..Default::default() };
        let body = resource::Body::Workload(workload);
        let resource = named(ResourceType::Workload, "uid", body.clone());
        let described = Described::of(&resource, true).unwrap();
        assert_eq!((described.key().as_str(), described.version.as_str()), ("workload/uid", "v1"));
        assert_eq!(read(&described), proto::Resource { body: Some(body), ..Default::default() });
        assert_eq!(Described::of(&resource, false).unwrap().content, None);
        assert_eq!(Described::of(&proto::Resource::default(), true), None);
    }

    #[test]
    fn credentials_in_a_route_are_hidden_and_other_matches_are_not() {
        let edits =
            |value| proto::HeaderEdits { set: vec![header("x-partner", value)], ..Default::default() };
        let filter = |kind| proto::Filter { kind: Some(kind) };
        let mirrored = proto::Backend {
            filters: vec![filter(filter::Kind::ResponseHeaders(edits("s3cret-b")))],
            ..Default::default()
        };
        let mirror = proto::Mirror { backend: Some(mirrored), ..Default::default() };
        let rule = proto::RouteRule {
            filters: vec![
                filter(filter::Kind::RequestHeaders(edits("s3cret-a"))),
                filter(filter::Kind::Mirror(mirror)),
            ],
            ..Default::default()
        };
        let found = proto::Match {
            headers: vec![matching("authorization", "s3cret-c"), matching("x-stage", "beta")],
            query: vec![matching("api_token", "s3cret-d")],
            ..Default::default()
        };
        let rules = proto::Rules { rules: vec![rule], matches: vec![found], ..Default::default() };
        let service = proto::ServiceRoute { rules: Some(rules), ..Default::default() };
        let kind = Some(route::Kind::Service(service));
        let body = resource::Body::Route(proto::Route { kind });
        let described = Described::of(&named(ResourceType::Route, "10.96.0.1:80", body), true).unwrap();
        let text = format!("{:?}", read(&described));
        assert!(!text.contains("s3cret") && text.contains("beta"), "{text}");
        assert_eq!(text.matches(HIDDEN).count(), 4, "{text}");
    }

    #[test]
    fn cookies_that_steer_are_hidden() {
        let cookie =
            proto::ValueMatch { r#type: value_match::Type::Cookie.into(), ..matching("beta", "s3cret") };
        let steering = proto::Steering { r#match: vec![cookie], ..Default::default() };
        let endpoints = proto::Endpoints { steering: Some(steering), ..Default::default() };
        let resource = named(ResourceType::Endpoints, "shop/web:80", resource::Body::Endpoints(endpoints));
        let described = Described::of(&resource, true).unwrap();
        assert!(!format!("{:?}", read(&described)).contains("s3cret"));
    }

    #[test]
    fn bytes_survive_hexadecimal_and_other_text_is_refused() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&all)), Some(all));
        assert_eq!((unhex("0"), unhex("0g"), unhex("")), (None, None, Some(Vec::new())));
    }
}
