//! Section of a MeshPolicy about what the selected pods' sidecars write down.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::traffic::PERCENT;

/// What the sidecars of the selected pods log.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("self.accessLog == 'Sampled' || !has(self.sample)", "telemetry.sample belongs to accessLog: Sampled; write accessLog: Sampled, or leave sample out"))]
pub struct TelemetrySpec {
    /// Which requests at the selected pods the pods' sidecars log, one line each: Disabled (none), Errors (5xx, gRPC
    /// server errors, failures and denials), Sampled (errors and a share of the others) or All. A connection whose
    /// content is opaque gets one line when it ends. A sidecar writes at most 500 lines per second and counts the
    /// others. Lines have neither headers nor query strings.
    #[serde(default)]
    pub access_log: AccessLog,
    /// How many of the requests that are not errors are logged, as a percentage with at most two decimals. Only with
    /// accessLog: Sampled. Absent: 1%.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = (PERCENT, "telemetry.sample must be a percentage from 0% to 100% with at most two decimals; write for example 1%"))]
    pub sample: Option<String>,
}

/// Which requests are logged.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    missing_docs,
    reason = "the field that uses it explains the values; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum AccessLog {
    // Not `Off`: without quotes YAML 1.1, and so kubectl, makes `false` of that.
    #[default]
    Disabled,
    Errors,
    Sampled,
    All,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json, to_value};

    use super::*;
    use crate::MeshPolicySpec;

    fn read(telemetry: Value) -> Result<MeshPolicySpec, serde_json::Error> {
        from_value(json!({"target": {"kind": "Namespace"}, "telemetry": telemetry}))
    }

    #[test]
    fn the_section_is_read_and_written_as_it_was_and_without_fields_logs_nothing() {
        let telemetry = json!({"accessLog": "Sampled", "sample": "0.5%"});
        let policy = read(telemetry.clone()).unwrap();
        assert_eq!(to_value(&policy).unwrap()["telemetry"], telemetry);
        let empty = read(json!({})).unwrap().telemetry.unwrap();
        assert_eq!((empty.access_log, empty.sample), (AccessLog::Disabled, None));
    }

    #[test]
    fn a_misspelled_field_and_a_bare_off_of_yaml_are_not_read() {
        for wrong in [json!({"accesslog": "All"}), json!({"accessLog": false}), json!({"accessLog": "Some"})]
        {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
