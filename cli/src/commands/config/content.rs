//! Resources of the discovery protocol as JSON, under the names that its description gives to fields and values.
//!
//! What this program does not know, because the other side is newer, is not shown; that there is something is.

use prost_reflect::{DescriptorPool, DynamicMessage, Kind, MessageDescriptor, Value};
use serde_json::{Map, Value as Json};
use tulle_mesh::resources::{DESCRIPTORS, Described, HIDDEN, MAX_CONTENT_BYTES};

/// Stands in for the name of fields that this program does not know.
const UNKNOWN: &str = "(unknown)";

/// Reads contents.
pub(super) struct Reader {
    resource: Option<MessageDescriptor>,
}

impl Reader {
    pub(super) fn new() -> Self {
        let pool = DescriptorPool::decode(DESCRIPTORS).ok();
        Self { resource: pool.and_then(|pool| pool.get_message_by_name("tulle.v1.Resource")) }
    }

    /// The content of a resource. `None`: it has none, or it cannot be read. One that neither end would show is not
    /// read: a message takes many times the memory of its bytes, and a pod may answer anything.
    pub(super) fn read(&self, described: &Described) -> Option<Json> {
        // Two digits for each byte.
        described.content.as_ref().filter(|content| content.len() / 2 <= MAX_CONTENT_BYTES)?;
        let bytes = described.bytes()?;
        let message = DynamicMessage::decode(self.resource.clone()?, bytes.as_slice()).ok()?;
        Some(object(&message))
    }
}

fn object(message: &DynamicMessage) -> Json {
    let fields = message.fields();
    let fields = fields.map(|(field, value)| (field.json_name().to_owned(), json(&field.kind(), value)));
    let mut fields: Map<String, Json> = fields.collect();
    if message.unknown_fields().next().is_some() {
        fields.insert(UNKNOWN.to_owned(), Json::from(HIDDEN));
    }
    Json::Object(fields)
}

fn json(kind: &Kind, value: &Value) -> Json {
    match value {
        Value::Bool(value) => Json::from(*value),
        Value::I32(value) => Json::from(*value),
        Value::I64(value) => Json::from(*value),
        Value::U32(value) => Json::from(*value),
        Value::U64(value) => Json::from(*value),
        Value::F32(value) => Json::from(*value),
        Value::F64(value) => Json::from(*value),
        Value::String(value) => Json::from(value.as_str()),
        Value::EnumNumber(number) => {
            let name = kind.as_enum().and_then(|known| known.get_value(*number));
            name.map_or_else(|| Json::from(*number), |name| Json::from(name.name()))
        }
        Value::Message(message) => object(message),
        Value::List(items) => items.iter().map(|item| json(kind, item)).collect(),
        // No resource has any. Bytes would be keys.
        Value::Bytes(_) | Value::Map(_) => Json::from(HIDDEN),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;
    use tulle_mesh::proto::resource::Body;
    use tulle_mesh::proto::{
        Access, AccessRules, Mtls, MtlsMode, Peer, Resource, ResourceName, ResourceType, Rule,
    };

    use super::*;

    fn described(kind: ResourceType, body: Body) -> Described {
        let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: "uid".to_owned() };
        let resource = Resource { name: Some(name), body: Some(body), ..Resource::default() };
        Described::of(&resource, true).unwrap()
    }

    #[test]
    fn a_resource_is_read_with_the_names_of_its_fields_and_values() {
        let mtls = Mtls { mode: MtlsMode::Strict.into(), shadow_strict: true, ..Mtls::default() };
        let read = Reader::new().read(&described(ResourceType::Mtls, Body::Mtls(mtls)));
        assert_eq!(read, Some(json!({"mtls": {"mode": "MTLS_MODE_STRICT", "shadowStrict": true}})));

        let peer = Peer { service_account: "front".into(), ..Peer::default() };
        let rule = Rule { from: vec![peer], to: Vec::new() };
        let access = Access { has_allow: true, allow: vec![rule], ..Access::default() };
        let rules = AccessRules { access: Some(access), shadow: None };
        let read = Reader::new().read(&described(ResourceType::Access, Body::Access(rules)));
        let allow = json!([{"from": [{"serviceAccount": "front"}]}]);
        assert_eq!(read, Some(json!({"access": {"access": {"hasAllow": true, "allow": allow}}})));
    }

    #[test]
    fn what_this_program_does_not_know_is_seen_to_be_there() {
        // Field 900 of a resource, a varint.
        let newer = Described { content: Some("a03801".to_owned()), ..Described::default() };
        assert_eq!(Reader::new().read(&newer), Some(json!({"(unknown)": "(hidden)"})));
        for content in [None, Some("ff".to_owned()), Some("no hex".to_owned())] {
            assert_eq!(Reader::new().read(&Described { content, ..Described::default() }), None);
        }
    }

    #[test]
    fn content_that_is_longer_than_either_end_shows_is_not_read() {
        let of = |bytes: usize| {
            let content = Some("a03801".repeat(bytes / 3));
            Reader::new().read(&Described { content, ..Described::default() })
        };
        assert!(of(3 * 1_000).is_some());
        assert_eq!(of(MAX_CONTENT_BYTES + 3), None);
    }

    /// A field of this kind would be a key or a token: whoever adds one decides here whether it may be shown.
    #[test]
    fn no_field_of_a_resource_is_bytes_or_has_the_name_of_a_secret() {
        let mut seen = BTreeSet::new();
        let mut next = vec![Reader::new().resource.unwrap()];
        while let Some(message) = next.pop() {
            if !seen.insert(message.full_name().to_owned()) {
                continue;
            }
            for field in message.fields() {
                let name = field.full_name().to_owned();
                assert!(!matches!(field.kind(), Kind::Bytes), "{name}");
                for secret in ["secret", "password", "private", "jwk", "token", "_key"] {
                    assert!(!field.name().contains(secret), "{name}");
                }
                next.extend(field.kind().as_message().cloned());
            }
        }
        assert!(seen.contains("tulle.v1.RouteRule") && seen.contains("tulle.v1.Endpoint"), "{seen:?}");
    }
}
