//! The steps of a rollout, and what keeps a user with a version.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::{DURATION_PATTERN, TOKEN_PATTERN};

/// One step: exactly one of `match`, `mirror`, `weight` and `pause`.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("[has(self.match), has(self.mirror), has(self.weight), has(self.pause)].filter(given, given).size() == 1", "a step has exactly one of match, mirror, weight and pause; write for example {weight: 5, hold: 2m} or {pause: {}}"))]
#[x_kube(validation = ("!has(self.hold) || !has(self.pause)", "a pause has no hold, because it lasts until it is resumed; for a step that ends by itself, write a weight, for example {weight: 5, hold: 10m}"))]
pub struct Step {
    /// Requests that go to the new version whatever the weight: those with any of these headers or cookies. The weight
    /// stays as it was: in a first step, all other requests stay with the stable version. The match holds in the steps
    /// after this one too, until another match replaces it.
    #[serde(rename = "match", default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    pub match_: Vec<StepMatch>,
    /// Percentage of the GET, HEAD and OPTIONS requests of which the new version gets a copy during this step, from 1
    /// to 100. The weight stays as it was. The responses to the copies are dropped. Only for applications that may
    /// handle a request twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub mirror: Option<u8>,
    /// Percentage of the traffic that the new version gets, from 0 to 100. With 0 it gets only what the match of an
    /// earlier step gives it. With 100 it gets all traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub weight: Option<u8>,
    /// Minimum duration of the step, such as 90s, 5m or 1h30m. Default: 2m. Not for a pause, which lasts until it is
    /// resumed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = DURATION_PATTERN), length(min = 2, max = 32))]
    pub hold: Option<String>,
    /// Pauses the rollout at the current weight until `kubectl annotate --overwrite canary NAME
    /// tulle.dev/action=resume@ID` resumes it. ID is any text that was not used before. Write `{}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<Pause>,
}

/// A header or a cookie that a request must have.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.header) != has(self.cookie)", "each entry of match is either a header or a cookie; write for example {header: {name: x-group, exact: insider}}"))]
pub struct StepMatch {
    /// A header. Its name is compared without case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<NameValue>,
    /// A cookie. Its name is compared with case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<NameValue>,
}

/// The name of a header or cookie, and the value that it must have.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct NameValue {
    /// The name, such as x-group.
    #[schemars(regex(pattern = TOKEN_PATTERN), length(min = 1, max = 256))]
    pub name: String,
    /// The whole value.
    #[schemars(length(max = 1024))]
    pub exact: String,
}

/// How users are kept with one version.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase")]
pub struct Sticky {
    /// Name of the cookie that sidecars set, such as tulle-version.
    #[schemars(regex(pattern = TOKEN_PATTERN), length(min = 1, max = 256))]
    pub cookie: String,
}

/// A pause. It has no settings; write `{}`.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
pub struct Pause {}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json, to_value};

    use super::*;

    #[test]
    fn a_step_is_read_and_written_as_it_was() {
        let header = json!({"header": {"name": "x-group", "exact": "insider"}});
        let cookie = json!({"cookie": {"name": "beta", "exact": "1"}});
        for step in [
            json!({"match": [header, cookie], "hold": "10m"}),
            json!({"mirror": 10, "hold": "5m"}),
            json!({"weight": 0}),
            json!({"weight": 100, "hold": "10m"}),
            json!({"pause": {}}),
        ] {
            let read: Step = from_value(step.clone()).unwrap();
            assert_eq!(to_value(&read).unwrap(), step);
        }
    }

    #[test]
    fn a_sticky_rollout_needs_the_name_of_a_cookie() {
        assert!(from_value::<Sticky>(json!({})).is_err());
        let sticky: Sticky = from_value(json!({"cookie": "tulle-revision"})).unwrap();
        assert_eq!(sticky.cookie, "tulle-revision");
    }
}
