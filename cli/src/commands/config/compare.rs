//! How the resources of a sidecar differ from those that the operator would send it. Pure: two lists in, a bounded list
//! of differences out.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tulle_mesh::resources::{Described, HIDDEN, MAX_CONTENTS};

use super::sections::compact;

/// Resources that are shown; more are counted.
pub(super) const MAX_RESOURCES: usize = MAX_CONTENTS;
/// Fields of a resource that are shown; more are counted.
const MAX_FIELDS: usize = 5;
/// Characters of a value that are shown.
const MAX_VALUE: usize = 120;
/// Characters of the names whose contents are asked for in one request: a URL's query has 8 KiB, and takes up to three
/// for each of these.
const MAX_ASKED: usize = 2_500;
/// Lists in which the place of an element matters: others refer to it, or it comes into force before the next.
const ORDERED: [&str; 5] = ["rules", "routes", "matches", "filters", "add"];
/// The fields that identify an element of any other list; the first that the element has counts.
const IDENTITY: [&str; 3] = ["address", "revision", "name"];

/// All differences.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Comparison {
    /// In order of the resources' names.
    pub(super) differences: Vec<Difference>,
    /// Resources that differ beyond these.
    pub(super) more: usize,
}

/// A resource that is not the same on both sides.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// `route 10.96.0.1:80`, or the name of a section.
    pub(super) resource: String,
    /// How it differs.
    pub(super) how: How,
}

/// How a resource differs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum How {
    /// The operator would not send it.
    OnlySidecar,
    /// The sidecar does not have it.
    OnlyOperator,
    /// In these fields.
    Fields {
        /// The fields that differ, up to a bound.
        fields: Vec<Field>,
        /// How many more fields differ.
        more: usize,
    },
    /// In what is not shown, or not kept: the versions say so.
    Versions {
        /// The sidecar's.
        sidecar: String,
        /// The operator's.
        operator: String,
    },
}

/// A field with two values; `-`: none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// `mtls.mode`.
    pub(super) path: String,
    /// The sidecar's value.
    pub(super) sidecar: String,
    /// The operator's value.
    pub(super) operator: String,
}

/// Resources that both have in different versions: those whose contents are worth asking for.
pub(super) fn differing(sidecar: &[Described], operator: &[Described]) -> Vec<String> {
    let operator = by_key(operator);
    let keys = sidecar.iter().filter_map(|found| {
        let key = found.key();
        let other = operator.get(&key)?;
        (other.version != found.version).then_some(key)
    });
    let mut length = 0;
    let fitting = keys.take_while(|key| {
        length += key.len();
        length <= MAX_ASKED
    });
    fitting.take(MAX_RESOURCES).collect()
}

/// Compares all resources. `read` makes JSON of a content, or `None` where there is none.
pub(super) fn compare(
    sidecar: &[Described],
    operator: &[Described],
    read: impl Fn(&Described) -> Option<Value>,
) -> Comparison {
    let (sidecar, operator) = (by_key(sidecar), by_key(operator));
    let keys: BTreeSet<&String> = sidecar.keys().chain(operator.keys()).collect();
    let mut comparison = Comparison::default();
    for key in keys {
        let (resource, how) = match (sidecar.get(key), operator.get(key)) {
            (Some(only), None) => (only, Some(How::OnlySidecar)),
            (None, Some(only)) => (only, Some(How::OnlyOperator)),
            (Some(one), Some(other)) => (one, differs(one, other, &read)),
            (None, None) => continue,
        };
        let Some(how) = how else { continue };
        if comparison.differences.len() < MAX_RESOURCES {
            comparison.differences.push(Difference { resource: title(resource), how });
        } else {
            comparison.more += 1;
        }
    }
    comparison
}

fn by_key(resources: &[Described]) -> BTreeMap<String, &Described> {
    resources.iter().map(|resource| (resource.key(), resource)).collect()
}

/// A section has the pod's uid for a name, which says nothing here.
fn title(resource: &Described) -> String {
    match resource.kind.as_str() {
        section @ ("workload" | "mtls" | "access" | "limits" | "telemetry") => section.to_owned(),
        kind => format!("{kind} {}", resource.name),
    }
}

fn differs(
    sidecar: &Described,
    operator: &Described,
    read: impl Fn(&Described) -> Option<Value>,
) -> Option<How> {
    if sidecar.version == operator.version {
        return None;
    }
    let versions = || How::Versions { sidecar: sidecar.version.clone(), operator: operator.version.clone() };
    let (Some(one), Some(other)) = (read(sidecar), read(operator)) else { return Some(versions()) };
    let mut fields = Vec::new();
    collect("", Some(&normal("", &one)), Some(&normal("", &other)), &mut fields);
    if fields.is_empty() {
        // Another order alone, or what is not shown.
        return (hides(&one) || hides(&other)).then(versions);
    }
    let more = fields.len().saturating_sub(MAX_FIELDS);
    fields.truncate(MAX_FIELDS);
    Some(How::Fields { fields, more })
}

fn hides(value: &Value) -> bool {
    match value {
        Value::String(text) => text == HIDDEN,
        Value::Array(items) => items.iter().any(hides),
        Value::Object(fields) => fields.values().any(hides),
        _ => false,
    }
}

/// The same with all lists sorted whose order does not matter. `name` is that of the field.
fn normal(name: &str, value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| (name.clone(), normal(name, value))).collect()
        }
        Value::Array(items) => {
            let mut items: Vec<Value> = items.iter().map(|item| normal(name, item)).collect();
            if !ORDERED.contains(&name) {
                items.sort_by_cached_key(Value::to_string);
            }
            Value::Array(items)
        }
        other => other.clone(),
    }
}

/// Adds the fields that differ.
fn collect(path: &str, sidecar: Option<&Value>, operator: Option<&Value>, found: &mut Vec<Field>) {
    match (sidecar, operator) {
        (Some(Value::Object(one)), Some(Value::Object(other))) => {
            let names: BTreeSet<&String> = one.keys().chain(other.keys()).collect();
            for name in names {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(&path, one.get(name), other.get(name), found);
            }
        }
        // An empty list is not on the wire.
        (Some(Value::Array(one)), Some(Value::Array(other))) => list(path, one, other, found),
        (Some(Value::Array(one)), None) => list(path, one, &[], found),
        (None, Some(Value::Array(other))) => list(path, &[], other, found),
        (one, other) if one == other => {}
        (one, other) => {
            found.push(Field { path: path.to_owned(), sidecar: shown(one), operator: shown(other) });
        }
    }
}

fn list(path: &str, sidecar: &[Value], operator: &[Value], found: &mut Vec<Field>) {
    let name = path.rsplit('.').next().unwrap_or_default();
    if ORDERED.contains(&name) {
        for at in 0..sidecar.len().max(operator.len()) {
            collect(&format!("{path}[{at}]"), sidecar.get(at), operator.get(at), found);
        }
        return;
    }
    let mut others: Vec<&Value> = operator.iter().collect();
    let mut unmatched = Vec::new();
    for item in sidecar {
        match others.iter().position(|other| *other == item) {
            Some(at) => {
                others.remove(at);
            }
            None => unmatched.push(item),
        }
    }
    for item in unmatched {
        let at = others.iter().position(|other| identity(other) == identity(item));
        let other = at.map(|at| others.remove(at));
        collect(&element(path, item), Some(item), other, found);
    }
    for other in others {
        collect(&element(path, other), None, Some(other), found);
    }
}

fn identity(item: &Value) -> Option<&str> {
    IDENTITY.iter().find_map(|name| item.get(name)?.as_str())
}

fn element(path: &str, item: &Value) -> String {
    format!("{path}[{}]", identity(item).unwrap_or_default())
}

fn shown(value: Option<&Value>) -> String {
    let text = compact(value);
    match text.char_indices().nth(MAX_VALUE) {
        None => text,
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resource(kind: &str, name: &str, version: &str, content: &Value) -> Described {
        let content = Some(content.to_string());
        Described { kind: kind.into(), name: name.into(), version: version.into(), content }
    }

    fn compared(sidecar: &[Described], operator: &[Described]) -> Comparison {
        compare(sidecar, operator, |described| serde_json::from_str(described.content.as_deref()?).ok())
    }

    /// How a route differs that has one content here and another one there.
    fn how(sidecar: &Value, operator: &Value) -> Option<How> {
        let route = |version, content| resource("route", "10.96.0.1:80", version, content);
        let found = compared(&[route("v1", sidecar)], &[route("v2", operator)]);
        found.differences.into_iter().next().map(|difference| difference.how)
    }

    fn fields<const N: usize>(found: [(&str, &str, &str); N]) -> Option<How> {
        let field = |(path, sidecar, operator): (&str, &str, &str)| Field {
            path: path.to_owned(),
            sidecar: sidecar.to_owned(),
            operator: operator.to_owned(),
        };
        Some(How::Fields { fields: found.map(field).into(), more: 0 })
    }

    #[test]
    fn equal_resources_are_no_difference() {
        let all = [
            resource("route", "10.96.0.1:80", "v1", &json!({"route": {}})),
            resource("mtls", "uid", "v1", &json!({"mtls": {"mode": "MTLS_MODE_STRICT"}})),
        ];
        assert_eq!(compared(&all, &all), Comparison::default());
        // A build of the operator that makes other digests.
        assert_eq!(how(&json!({"route": {"port": 80}}), &json!({"route": {"port": 80}})), None);
    }

    #[test]
    fn a_resource_that_one_side_has_is_named() {
        let here = resource("route", "10.96.0.1:80", "v1", &json!({}));
        let there = resource("limits", "uid", "v1", &json!({}));
        let expected = [
            Difference { resource: "limits".to_owned(), how: How::OnlyOperator },
            Difference { resource: "route 10.96.0.1:80".to_owned(), how: How::OnlySidecar },
        ];
        assert_eq!(compared(&[here], &[there]).differences, expected);
    }

    #[test]
    fn an_old_rule_under_the_same_count_is_found() {
        let rules = |timeout: u32| {
            json!({"route": {"service": {"rules": {"rules": [
                {"name": "a", "requestTimeoutMs": 500}, {"name": "b", "requestTimeoutMs": timeout},
            ]}}}})
        };
        let expected = fields([("route.service.rules.rules[1].requestTimeoutMs", "1000", "2000")]);
        assert_eq!(how(&rules(1_000), &rules(2_000)), expected);
        let none = json!({"route": {"service": {}}});
        let some = json!({"route": {"service": {"sessionAffinitySeconds": 60}}});
        assert_eq!(how(&none, &some), fields([("route.service.sessionAffinitySeconds", "-", "60")]));
    }

    #[test]
    fn order_matters_in_matches_and_filters_and_nowhere_else() {
        let list = |name: &str, items: [&str; 2]| json!({ name: items });
        for name in ["allow", "methods", "endpoints", "ports"] {
            assert_eq!(how(&list(name, ["a", "b"]), &list(name, ["b", "a"])), None, "{name}");
        }
        for name in ["matches", "filters", "rules"] {
            assert!(how(&list(name, ["a", "b"]), &list(name, ["b", "a"])).is_some(), "{name}");
        }
        let deep = |namespaces: [&str; 2]| json!({"deny": [{"from": [{"namespaces": namespaces}]}]});
        assert_eq!(how(&deep(["a", "b"]), &deep(["b", "a"])), None);
    }

    #[test]
    fn endpoints_are_compared_by_address() {
        let endpoints = |all: &[(&str, &str)]| {
            let all = all.iter().map(|(address, state)| json!({"address": address, "state": state}));
            json!({"endpoints": {"endpoints": all.collect::<Value>()}})
        };
        let sidecar =
            endpoints(&[("10.1.0.1:80", "OLD"), ("10.1.0.2:80", "READY"), ("10.1.0.3:80", "READY")]);
        let operator =
            endpoints(&[("10.1.0.3:80", "READY"), ("10.1.0.4:80", "READY"), ("10.1.0.1:80", "NEW")]);
        let expected = fields([
            ("endpoints.endpoints[10.1.0.1:80].state", "OLD", "NEW"),
            ("endpoints.endpoints[10.1.0.2:80]", "{address: 10.1.0.2:80, state: READY}", "-"),
            ("endpoints.endpoints[10.1.0.4:80]", "-", "{address: 10.1.0.4:80, state: READY}"),
        ]);
        assert_eq!(how(&sidecar, &operator), expected);
        let none = json!({"endpoints": {}});
        let one = endpoints(&[("10.1.0.1:80", "READY")]);
        let expected =
            fields([("endpoints.endpoints[10.1.0.1:80]", "-", "{address: 10.1.0.1:80, state: READY}")]);
        assert_eq!(how(&none, &one), expected);
    }

    #[test]
    fn what_is_not_shown_or_not_kept_differs_by_its_version() {
        let versions = How::Versions { sidecar: "v1".to_owned(), operator: "v2".to_owned() };
        let hidden = json!({"set": [{"name": "authorization", "value": HIDDEN}]});
        assert_eq!(how(&hidden, &hidden), Some(versions));
        let bare =
            |version: &str| Described { content: None, ..resource("mtls", "uid", version, &json!({})) };
        let found = compared(&[bare("v1")], &[resource("mtls", "uid", "v2", &json!({}))]);
        assert!(matches!(found.differences[0].how, How::Versions { .. }));
        assert_eq!(compared(&[bare("v1")], &[bare("v1")]), Comparison::default());
    }

    #[test]
    fn fields_values_and_resources_are_bounded_and_the_rest_is_counted() {
        let many = |value: &str| {
            let fields = (0..12).map(|at| (format!("f{at:02}"), json!(value)));
            fields.collect::<Value>()
        };
        let Some(How::Fields { fields, more }) = how(&many("a"), &many(&"b".repeat(1_000))) else { panic!() };
        assert_eq!((fields.len(), more), (5, 7));
        assert_eq!(fields[0].operator.len(), MAX_VALUE + 3);

        let all = |version: &str| -> Vec<Described> {
            let one = |at| resource("route", &format!("10.0.0.{at}:80"), version, &json!({"v": version}));
            (0..60).map(one).collect()
        };
        let found = compared(&all("v1"), &all("v2"));
        assert_eq!((found.differences.len(), found.more), (50, 10));
        assert_eq!(differing(&all("v1"), &all("v2")).len(), 50);
        assert!(differing(&all("v1"), &all("v1")).is_empty());
    }

    #[test]
    fn contents_are_asked_for_of_what_both_have_and_in_a_query_of_bounded_length() {
        let here = [resource("route", "a", "v1", &json!({})), resource("mtls", "uid", "v1", &json!({}))];
        let there = [resource("mtls", "uid", "v2", &json!({}))];
        assert_eq!(differing(&here, &there), ["mtls/uid"]);
        let long = |version: &str| -> Vec<Described> {
            let one = |at| resource("endpoints", &format!("{at:0250}"), version, &json!({}));
            (0..40).map(one).collect()
        };
        let asked: usize = differing(&long("v1"), &long("v2")).iter().map(String::len).sum();
        assert!(asked > 2_000 && asked <= MAX_ASKED, "{asked}");
    }
}
