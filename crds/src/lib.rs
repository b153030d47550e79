//! The Kubernetes API of Tulle, group `tulle.dev`, with one file per kind. `step` is a part of Canary, `traffic` of
//! MeshPolicy; `values` has the values of `traffic` as numbers; `strategy` says what in a workload hinders its Canary.
//!
//! ```text
//!   MeshPolicy   encryption, access rules, limits, timeouts, retries and more for the traffic to a target
//!   Canary       stepwise rollout of a workload's new versions
//!   MeshConfig   settings of the whole mesh: trust domain, certificate lifetime, defaults
//! ```
//!
//! In: Rust types. Out: the CustomResourceDefinitions below `manifests/`, which are generated from these types and
//! compared by a test. Doc comments of the types are what `kubectl explain` shows, so they address users. What a
//! JSON schema and CEL cannot check is checked by the webhook.
#![deny(missing_docs)]

mod action;
mod canary;
mod condition;
mod config;
#[cfg(test)]
mod fields;
mod policy;
mod quantity;
mod step;
mod strategy;
mod telemetry;
mod traffic;
mod values;

pub use action::{CanaryAction, Requested};
pub use canary::*;
pub use condition::{reason, set_condition};
pub use config::*;
pub use policy::*;
pub use quantity::{QuantityError, parse_duration, parse_percent};
pub use step::*;
pub use strategy::*;
pub use telemetry::*;
pub use traffic::*;
pub use values::*;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt as _;
use serde_json::{Value, json};

/// Labels and annotations that Tulle reads and writes.
pub mod keys {
    /// Label of a namespace, `enabled` or `required`; label of a pod, `disabled` (in `enabled` namespaces).
    pub const INJECT: &str = "tulle.dev/inject";
    /// Label of an injected pod: the sidecar's version.
    pub const INJECTED: &str = "tulle.dev/sidecar";
    /// Annotation of an injected pod: proof that its sidecar is as Tulle made it.
    pub const SEAL: &str = "tulle.dev/injection";
    /// Readiness gate of pods whose revision has not been approved.
    pub const GATE: &str = "tulle.dev/approved";
    /// Annotation of a Canary: a requested action and its id, such as `promote@4711`.
    pub const ACTION: &str = "tulle.dev/action";
    /// Annotation of a pod: ports whose inbound connections bypass the sidecar.
    pub const SKIP_INBOUND_PORTS: &str = "tulle.dev/skip-inbound-ports";
    /// Label of the ConfigMaps in which Tulle distributes the trust bundle.
    pub const TRUST: &str = "tulle.dev/trust";

    /// Annotations that set something of the sidecar, without `tulle.dev/`: of a pod, and of its namespace as defaults. Admission
    /// reads them, and `tulle lint` tells those that have no effect.
    pub const SIDECAR_SETTINGS: [&str; 9] = [
        "skip-inbound-ports",
        "skip-outbound-ports",
        "source-address",
        "log-level",
        "workers",
        "cpu",
        "memory",
        "cpu-limit",
        "memory-limit",
    ];
}

/// File name and content of every CustomResourceDefinition.
pub fn manifests() -> Vec<(&'static str, Value)> {
    vec![
        ("canaries.yaml", manifest(Canary::crd())),
        ("meshconfigs.yaml", manifest(MeshConfig::crd())),
        ("meshpolicies.yaml", manifest(MeshPolicy::crd())),
    ]
}

fn manifest(definition: CustomResourceDefinition) -> Value {
    let mut definition = serde_json::to_value(definition).unwrap_or_default();
    remove_what_kubernetes_rejects(&mut definition);
    let versions = definition.pointer_mut("/spec/versions").and_then(Value::as_array_mut);
    for version in versions.into_iter().flatten() {
        if let Some(Value::Object(status)) = version.pointer_mut("/schema/openAPIV3Schema/properties/status")
        {
            status.insert("default".to_owned(), json!({ "observedGeneration": UNSEEN }));
        }
    }
    definition
}

/// `status.observedGeneration` of an object that no operator has seen. Without a status, kstatus (Flux, and whatever
/// else waits with it) would call an object that was just created Current.
const UNSEEN: i64 = -1;

/// Removes the integer formats that schemars derives from Rust types and Kubernetes does not know (`uint8`), about
/// which the API server warns when a CRD is applied. Minimum and maximum stay, so the range is still checked.
///
/// Removes `additionalProperties: false` too, which `deny_unknown_fields` adds and the API server rejects beside
/// `properties`: it prunes unknown fields by itself.
///
/// Done here, on all that was generated, because an attribute on each field would be forgotten on the next one.
fn remove_what_kubernetes_rejects(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            let format = fields.get("format").and_then(Value::as_str);
            let is_integer = fields.get("type").and_then(Value::as_str) == Some("integer");
            if is_integer && format.is_some_and(|format| !matches!(format, "int32" | "int64")) {
                fields.remove("format");
            }
            if fields.get("additionalProperties") == Some(&Value::Bool(false)) {
                fields.remove("additionalProperties");
            }
            fields.values_mut().for_each(remove_what_kubernetes_rejects);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_what_kubernetes_rejects),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::{Value, json};

    use super::{CanaryStatus, Tracing};

    /// Where a version's schema is in a CustomResourceDefinition.
    const SCHEMA: &str = "/spec/versions/0/schema/openAPIV3Schema";

    /// Each kind and its generated schema.
    fn schemas() -> Vec<(String, Value)> {
        let parse = |(_, definition): (&str, Value)| {
            let kind = definition["spec"]["names"]["kind"].as_str().unwrap().to_owned();
            (kind, definition.pointer(SCHEMA).unwrap().clone())
        };
        super::manifests().into_iter().map(parse).collect()
    }

    fn schema(kind: &str) -> Value {
        schemas().into_iter().find(|(name, _)| name == kind).unwrap().1
    }

    #[test]
    fn an_object_that_no_operator_has_seen_says_so() {
        for (kind, schema) in schemas() {
            assert_eq!(
                schema["properties"]["status"]["default"],
                json!({"observedGeneration": -1}),
                "{kind}"
            );
            assert!(
                schema["properties"]["status"].get("required").is_none(),
                "{kind}: the default is incomplete"
            );
        }
    }

    /// Every `format` in a schema, with the path to it.
    fn formats(path: &str, schema: &Value, found: &mut Vec<(String, String)>) {
        match schema {
            Value::Object(fields) => {
                for (key, value) in fields {
                    match value {
                        Value::String(format) if key == "format" => {
                            found.push((path.to_owned(), format.clone()))
                        }
                        _ => formats(&format!("{path}.{key}"), value, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| formats(path, item, found)),
            _ => {}
        }
    }

    /// Quotes names that YAML 1.1, and so Helm, reads as true or false.
    fn quoted(yaml: &str) -> String {
        let line = |line: &str| match line.trim_start().split_once(':') {
            Some((name @ ("on" | "off" | "yes" | "no" | "y" | "n"), rest)) => {
                let indent = &line[..line.len() - line.trim_start().len()];
                format!("{indent}'{name}':{rest}\n")
            }
            _ => format!("{line}\n"),
        };
        yaml.lines().map(line).collect()
    }

    #[test]
    fn the_checked_in_manifests_are_what_the_types_generate() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests");
        for (name, definition) in super::manifests() {
            let generated = quoted(&serde_yaml::to_string(&definition).unwrap());
            let path = folder.join(name);
            if std::env::var_os("TULLE_UPDATE").is_some() {
                fs::write(&path, &generated).unwrap();
            }
            let checked_in = fs::read_to_string(&path).unwrap_or_default();
            assert!(checked_in == generated, "{name} is stale: TULLE_UPDATE=1 cargo test -p tulle-crds");
        }
    }

    #[test]
    fn kubernetes_knows_every_format_in_the_schemas() {
        let known = ["int32", "int64", "float", "double", "date-time", "byte", "date", "password"];
        for (kind, schema) in schemas() {
            let mut found = Vec::new();
            formats(&kind, &schema, &mut found);
            assert!(!found.is_empty(), "{kind} has no format at all: the search is broken");
            for (path, format) in found {
                assert!(known.contains(&format.as_str()), "{path} has format {format}");
            }
        }
    }

    #[test]
    fn no_schema_forbids_unknown_fields_because_the_api_server_rejects_such_a_schema() {
        for (kind, schema) in schemas() {
            let text = schema.to_string();
            assert!(!text.contains("\"additionalProperties\":false"), "{kind}");
        }
    }

    #[test]
    fn a_policy_with_an_unknown_field_cannot_be_read() {
        let read = |spec: Value| serde_json::from_value::<super::MeshPolicySpec>(spec);
        assert!(read(json!({"target": {"kind": "Namespace"}, "access": {"allow": []}})).is_ok());
        for spec in [
            json!({"target": {"kind": "Namespace"}, "acess": {"allow": []}}),
            json!({"target": {"kind": "Namespace", "except": "web"}}),
            json!({"target": {"kind": "Namespace"}, "access": {"deny": [{"unless": []}]}}),
            json!({"target": {"kind": "Namespace"}, "access": {"deny": [{"from": [{"notNamespace": "a"}]}]}}),
        ] {
            assert!(read(spec.clone()).is_err(), "{spec}");
        }
    }

    #[test]
    fn an_address_range_is_checked_by_the_api_server_too() {
        let text = schema("MeshPolicy").to_string();
        assert!(text.contains("write for example 10.1.0.0/16"), "{text}");
        let rules = rules(
            "MeshPolicy",
            "/properties/access/properties/allow/items/properties/from/items/properties/cidr",
        );
        assert!(rules.iter().any(|(rule, _)| rule.contains("/(3[0-2]|[12]?[0-9])$")), "{rules:?}");
    }

    #[test]
    fn a_number_without_a_format_keeps_its_range() {
        let weight = "/properties/spec/properties/steps/items/properties/weight";
        let weight = schema("Canary").pointer(weight).unwrap().clone();
        assert_eq!(weight["type"], "integer");
        assert_eq!((&weight["minimum"], &weight["maximum"]), (&json!(0.0), &json!(100.0)));
    }

    #[test]
    fn conditions_are_a_map_by_their_type_so_that_several_managers_can_own_one_each() {
        for (kind, schema) in schemas() {
            let conditions = schema.pointer("/properties/status/properties/conditions").unwrap();
            assert_eq!(conditions["x-kubernetes-list-type"], "map", "{kind}");
            assert_eq!(conditions["x-kubernetes-list-map-keys"], json!(["type"]), "{kind}");
        }
    }

    /// The CEL rules and messages at a place in a kind's `spec`.
    fn rules(kind: &str, pointer: &str) -> Vec<(String, String)> {
        let schema = schema(kind);
        let at = schema.pointer(&format!("/properties/spec{pointer}/x-kubernetes-validations")).unwrap();
        let text = |rule: &Value, key: &str| rule[key].as_str().unwrap().to_owned();
        at.as_array().unwrap().iter().map(|rule| (text(rule, "rule"), text(rule, "message"))).collect()
    }

    #[test]
    fn a_policy_target_rejects_the_fields_that_its_kind_does_not_use_and_says_what_to_write() {
        let rules = rules("MeshPolicy", "/properties/target");
        for (unused, instead) in [
            ("self.kind != 'Service' || !has(self.selector)", "write kind: Workload"),
            ("self.kind != 'Workload' || !has(self.name)", "write kind: Service"),
            (
                "self.kind != 'Namespace' || (!has(self.name) && !has(self.selector))",
                "leave name and selector out",
            ),
        ] {
            let found = rules.iter().find(|(rule, _)| rule == unused);
            assert!(found.is_some_and(|(_, message)| message.contains(instead)), "{unused}: {found:?}");
        }
    }

    #[test]
    fn values_that_would_decide_a_rollout_before_it_starts_are_rejected_with_what_to_write() {
        for (place, rule, message) in [
            ("/properties/deadline", "matches('[1-9]')", "write for example 24h"),
            ("/properties/judge/properties/confidence", "{1,2}", "write for example 99%"),
        ] {
            let rules = rules("Canary", place);
            let has = |(r, m): &(String, String)| r.contains(rule) && m.contains(message);
            assert!(rules.iter().any(has), "{place}: {rules:?}");
        }
    }

    /// Every number in a schema without a minimum or a maximum.
    fn unbounded(path: &str, schema: &Value, found: &mut Vec<String>) {
        match schema {
            Value::Object(fields) => {
                let is_number =
                    matches!(fields.get("type"), Some(Value::String(t)) if t == "integer" || t == "number");
                if is_number && !(fields.contains_key("minimum") && fields.contains_key("maximum")) {
                    found.push(path.to_owned());
                }
                fields.iter().for_each(|(key, value)| unbounded(&format!("{path}.{key}"), value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| unbounded(path, item, found)),
            _ => {}
        }
    }

    #[test]
    fn every_number_that_a_user_writes_is_bounded() {
        for (kind, schema) in schemas() {
            let mut found = Vec::new();
            unbounded(&kind, schema.pointer("/properties/spec").unwrap(), &mut found);
            assert_eq!(found, Vec::<String>::new());
        }
        let mut found = Vec::new();
        unbounded("x", &json!({"items": [{"type": "integer", "minimum": 1}]}), &mut found);
        assert_eq!(found, ["x.items"]);
    }

    #[test]
    fn a_collector_and_a_share_of_traces_that_cannot_work_are_rejected_with_what_to_write() {
        for (field, rule, message) in [
            ("endpoint", "^http://", "http://collector.observability:4317"),
            ("sampling", "{1,2}([.][0-9]{1,4})?", "write for example 1%"),
        ] {
            let rules = rules("MeshConfig", &format!("/properties/tracing/properties/{field}"));
            let has = |(r, m): &(String, String)| r.contains(rule) && m.contains(message);
            assert!(rules.iter().any(has), "{field}: {rules:?}");
        }
        let tracing: Tracing = serde_json::from_value(json!({"endpoint": "http://otel:4317"})).unwrap();
        assert_eq!(tracing.sampling, "0%", "who names a collector joins traces, and begins none");
    }

    #[test]
    fn a_step_is_one_of_four_and_says_so() {
        let found = rules("Canary", "/properties/steps/items");
        let one = "[has(self.match), has(self.mirror), has(self.weight), has(self.pause)]";
        assert!(found.iter().any(|(rule, message)| rule.starts_with(one) && message.contains("exactly one")));
        assert!(found.iter().any(|(rule, _)| rule == "!has(self.hold) || !has(self.pause)"), "{found:?}");
        let found = rules("Canary", "/properties/steps/items/properties/match/items");
        assert!(found.iter().any(|(_, message)| message.contains("x-group")), "{found:?}");
        let step = schema("Canary").pointer("/properties/spec/properties/steps/items").unwrap().clone();
        assert_eq!(step["required"], Value::Null, "an absent list of matches is not an empty one");
        assert_eq!(step["properties"]["match"]["default"], Value::Null);
    }

    #[test]
    fn values_of_a_policy_that_cannot_work_are_rejected_with_what_to_write() {
        for (place, rule, message) in [
            ("limits", "has(self.concurrency) || has(self.connections)", "{concurrency: 64}"),
            ("timeout", "has(self.request) ||", "{request: 2s, attempt: 500ms}"),
            ("timeout", "duration(self.attempt) <= duration(self.request)", "must not be longer"),
            ("timeout/properties/request", "duration('24h')", "for example 2s, or 0s"),
            ("timeout/properties/attempt", "duration('24h')", "for example 500ms, or 0s"),
            ("timeout/properties/idle", "duration('24h')", "for example 60s, or 0s"),
            ("retry/properties/budget", "(100|[0-9]{1,2})%", "for example 20%"),
            ("breaker/properties/ejectFor", "duration('5m')", "for example 10s"),
            ("breaker/properties/maxEjected", "(100|[0-9]{1,2})%", "for example 50%"),
            ("balance", "(self.by == 'Hash') == has(self.hash)", "hash: {header: x-user}"),
            ("balance/properties/hash", ".size() == 1", "exactly one of header, cookie and sourceIp"),
            ("balance/properties/warmUp", "duration('1h')", "for example 30s"),
            ("faults", "has(self.delay) || has(self.abort)", "{delay: {by: 200ms, of: 5%}}"),
            ("faults/properties/delay/properties/by", "duration(self) > duration('0s')", "for example 200ms"),
            ("faults/properties/delay/properties/of", "[0-9]{1,2}", "for example 5%"),
            ("faults/properties/abort/properties/of", "[0-9]{1,2}", "for example 1%"),
            ("telemetry", "self.accessLog == 'Sampled' || !has(self.sample)", "leave sample out"),
            ("telemetry/properties/sample", "[0-9]{1,2}", "for example 1%"),
        ] {
            let rules = rules("MeshPolicy", &format!("/properties/{place}"));
            let has = |(r, m): &(String, String)| r.contains(rule) && m.contains(message);
            assert!(rules.iter().any(has), "{place}: {rules:?}");
        }
        let faults = schema("MeshPolicy").pointer("/properties/spec/properties/faults").unwrap().clone();
        assert_eq!(faults["required"], json!(["until"]));
        assert_eq!(faults["properties"]["until"]["format"], "date-time");
        let telemetry =
            schema("MeshPolicy").pointer("/properties/spec/properties/telemetry").unwrap().clone();
        // The rule about `sample` reads it: the API server must fill it in.
        assert_eq!(telemetry["properties"]["accessLog"]["default"], "Disabled");
    }

    #[test]
    fn verdicts_and_outcomes_are_enums_with_the_values_that_were_strings_before() {
        let schema = schema("Canary");
        let status = |pointer: &str| schema.pointer(&format!("/properties/status{pointer}")).unwrap().clone();
        assert_eq!(
            status("/properties/verdict/enum"),
            json!(["", "Undecided", "Pass", "Fail", "Inconclusive", "FailedBefore"])
        );
        assert_eq!(
            status("/properties/history/items/properties/outcome/enum"),
            json!(["Promoted", "PromotionStalled", "Failed", "Superseded"])
        );
        let at_rest: CanaryStatus = serde_json::from_value(json!({"verdict": ""})).unwrap();
        assert_eq!(at_rest, CanaryStatus::default());
        assert_eq!(serde_json::to_value(&at_rest).unwrap()["verdict"], "");
    }

    #[test]
    fn kubectl_explain_begins_with_what_the_kind_is_for() {
        for (kind, schema) in schemas() {
            let description = schema["description"].as_str().unwrap();
            assert!(description.starts_with(&kind) && description.ends_with('.'), "{kind}: {description}");
            assert!(!description.contains("  "), "{kind}: indentation of the source is left: {description}");
        }
    }
}
