//! Sections of a MeshPolicy about what keeps calls alive: limits, timeouts, retries, breakers, balancing and faults.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::TOKEN_PATTERN;

/// The pattern of a duration: whole numbers with units, the largest unit first. Without days, which CEL does not know,
/// and with so few digits that CEL can read every match.
macro_rules! span {
    () => {
        "^([0-9]{1,4}h)?([0-9]{1,6}m)?([0-9]{1,8}s)?([0-9]{1,9}ms)?$"
    };
}

/// The schema's pattern of a duration in these sections.
const SPAN_PATTERN: &str = span!();
/// A percentage without fraction, from 0% to 100%.
const WHOLE_PERCENT: &str = "self.matches('^(100|[0-9]{1,2})%$')";
/// A percentage with at most two decimals, from 0% to 100%.
pub(crate) const PERCENT: &str = "self.matches('^(100([.]0{1,2})?|[0-9]{1,2}([.][0-9]{1,2})?)%$')";

const WITHIN_A_DAY: &str = concat!("self.matches('", span!(), "') && duration(self) <= duration('24h')");
const WITHIN_AN_HOUR: &str = concat!("self.matches('", span!(), "') && duration(self) <= duration('1h')");
const UP_TO_FIVE_MINUTES: &str = concat!(
    "self.matches('",
    span!(),
    "') && duration(self) > duration('0s') && duration(self) <= duration('5m')"
);
const ATTEMPT_WITHIN_REQUEST: &str = concat!(
    "!has(self.attempt) || !has(self.request) || !self.attempt.matches('",
    span!(),
    "') || !self.request.matches('",
    span!(),
    "') || duration(self.request) == duration('0s') || duration(self.attempt) <= duration(self.request)"
);

/// Limits of the load that a pod accepts. Each pod applies them by itself.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.concurrency) || has(self.connections)", "limits needs concurrency, connections or both; write for example {concurrency: 64}"))]
pub struct LimitsSpec {
    /// Number of requests that a pod handles at the same time. More requests wait for up to 20 ms; then they are
    /// refused with 503 and Retry-After, or UNAVAILABLE for gRPC. The client's sidecar repeats such a request at most
    /// once, at another pod, and only if `retry.on` has 5xx or unavailable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub concurrency: Option<u32>,
    /// Number of connections from clients that a pod accepts at the same time. More are closed at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connections: Option<u32>,
}

/// How long clients wait.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.request) || has(self.attempt) || has(self.idle)", "timeout needs request, attempt or idle; write for example {request: 2s, attempt: 500ms}"))]
#[x_kube(validation = (ATTEMPT_WITHIN_REQUEST, "timeout.attempt must not be longer than timeout.request, because all attempts together end with the request"))]
pub struct TimeoutSpec {
    /// Time from the head of the request to the head of the response, over all attempts, such as 2s; at most 24h. After
    /// it, the client gets 504, or DEADLINE_EXCEEDED for gRPC. A response that has begun is not cut; `idle` ends one
    /// that has stopped moving. 0s: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (WITHIN_A_DAY, "timeout.request must be at most 24h, in h, m, s and ms; write for example 2s, or 0s for no limit"))]
    pub request: Option<String>,
    /// Time from the start of an attempt to the head of its response, such as 500ms; at most 24h. After it, the request
    /// goes to another pod if nothing of it was sent yet, or if `retry.on` has reset or 5xx and its method is
    /// idempotent. 0s: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (WITHIN_A_DAY, "timeout.attempt must be at most 24h, in h, m, s and ms; write for example 500ms, or 0s for no limit"))]
    pub attempt: Option<String>,
    /// Time without a byte in either direction after which a response that has begun, a stream or a WebSocket is ended,
    /// such as 60s; at most 24h. It does not apply to connections whose content is opaque. 0s: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (WITHIN_A_DAY, "timeout.idle must be at most 24h, in h, m, s and ms; write for example 60s, or 0s for no limit"))]
    pub idle: Option<String>,
}

/// Which failed requests are repeated, and how often. A request is repeated only if that is safe: its method is
/// idempotent, no application has seen it, or it is gRPC and the author of the policy has named UNAVAILABLE.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.on) || has(self.__true__)", "retry.on says which failures are repeated; write for example on: [5xx, reset]"))]
pub struct RetrySpec {
    /// What is repeated: 5xx (an HTTP response from 500 to 599, and what reset means), unavailable (HTTP 503, or gRPC
    /// UNAVAILABLE without a message), reset (the connection ended, or `timeout.attempt` passed, before the response
    /// began), connect (no pod could be connected). The method must be idempotent, except for connect and for gRPC
    /// UNAVAILABLE. Required.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 4), extend("x-kubernetes-list-type" = "set"))]
    pub on: Vec<RetryOn>,
    /// What YAML 1.1, and so kubectl, makes of the name `on` without quotes. It means the same.
    #[serde(default, rename = "true", skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 4), extend("x-kubernetes-list-type" = "set"))]
    pub on_without_quotes: Vec<RetryOn>,
    /// Number of attempts beside the first, at most 2. 0 turns these retries off; requests that no application has seen
    /// still go to another pod.
    #[serde(default = "retry_attempts")]
    #[schemars(range(min = 0, max = 2))]
    pub attempts: u32,
    /// How many retries a sidecar may send for its requests to the Service, as a whole percentage of the first
    /// attempts. A budget keeps retries from overloading a Service that fails. A sidecar with few requests may still
    /// retry once in ten seconds, unless the budget is 0%.
    #[serde(default = "retry_budget")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = (WHOLE_PERCENT, "retry.budget must be a whole percentage from 0% to 100%; write for example 20%"))]
    pub budget: String,
}

impl RetrySpec {
    /// What is repeated, however the name `on` was read.
    pub fn reasons(&self) -> impl Iterator<Item = RetryOn> {
        self.on.iter().chain(&self.on_without_quotes).copied()
    }
}

fn retry_attempts() -> u32 {
    2
}

fn retry_budget() -> String {
    "20%".to_owned()
}

/// Why a request is repeated.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[serde(rename_all = "lowercase")]
#[allow(
    missing_docs,
    reason = "the field that uses it explains the values; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum RetryOn {
    #[serde(rename = "5xx")]
    ServerError,
    Reset,
    Connect,
    Unavailable,
}

/// When a pod that fails gets no requests for a time. Each sidecar decides by the requests that it has sent itself.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BreakerSpec {
    /// Number of failures in a row after which a pod is ejected. 0: any number. In either case a pod is ejected when
    /// less than half of at least 10 requests within 10 s succeeded.
    #[serde(default = "consecutive_failures")]
    #[schemars(range(min = 0, max = 1000))]
    pub consecutive_failures: u32,
    /// How long a pod is ejected the first time, such as 10s; at most 5m. It doubles with every further ejection, up to
    /// 5m. After it, one request tries the pod.
    #[serde(default = "eject_for")]
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (UP_TO_FIVE_MINUTES, "breaker.ejectFor must be longer than 0s and at most 5m, in m, s and ms; write for example 10s"))]
    pub eject_for: String,
    /// The largest part of the Service's pods that is ejected at the same time, as a whole percentage of the pods of
    /// one version. One pod may always be ejected if there are two or more.
    #[serde(default = "max_ejected")]
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = (WHOLE_PERCENT, "breaker.maxEjected must be a whole percentage from 0% to 100%; write for example 50%"))]
    pub max_ejected: String,
}

impl Default for BreakerSpec {
    fn default() -> Self {
        Self {
            consecutive_failures: consecutive_failures(),
            eject_for: eject_for(),
            max_ejected: max_ejected(),
        }
    }
}

fn consecutive_failures() -> u32 {
    5
}

fn eject_for() -> String {
    "10s".to_owned()
}

fn max_ejected() -> String {
    "50%".to_owned()
}

/// How a pod is chosen for each request.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("(self.by == 'Hash') == has(self.hash)", "balance.hash and by: Hash belong together; write for example {by: Hash, hash: {header: x-user}}"))]
pub struct BalanceSpec {
    /// Latency (the pod that will probably answer first, of two at random), Requests (the one with fewer requests in
    /// progress, of two at random), RoundRobin (one after the other) or Hash (the same pod for the same header, cookie
    /// or client address, unless it has much more load than the others).
    #[serde(default)]
    pub by: BalanceBy,
    /// What the pod is chosen by. Only with `by: Hash`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<HashSpec>,
    /// Prefer (pods of the client's zone while they have capacity), Only (no other pods, even if there are none in the
    /// zone) or Any (all pods alike, whatever the Service's `trafficDistribution` says). Absent: as that field says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<ZonePolicy>,
    /// How long a pod that has become ready gets fewer requests than the others, such as 30s; at most 1h. 0s: it gets
    /// its full share at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (WITHIN_AN_HOUR, "balance.warmUp must be at most 1h, in h, m, s and ms; write for example 30s, or 0s for none"))]
    pub warm_up: Option<String>,
}

/// How a pod is chosen.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "the field that uses it explains the values; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum BalanceBy {
    #[default]
    Latency,
    Requests,
    RoundRobin,
    Hash,
}

/// What of a request the pod is chosen by: exactly one of the fields.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("[has(self.header), has(self.cookie), has(self.sourceIp)].filter(given, given).size() == 1", "balance.hash needs exactly one of header, cookie and sourceIp"))]
#[x_kube(validation = ("!has(self.sourceIp) || self.sourceIp", "balance.hash.sourceIp can only be true; leave it out to use header or cookie"))]
pub struct HashSpec {
    /// Name of a header, such as x-user. Requests without it are balanced by latency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = TOKEN_PATTERN), length(min = 1, max = 256))]
    pub header: Option<String>,
    /// Name of a cookie, such as session. Requests without it are balanced by latency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = TOKEN_PATTERN), length(min = 1, max = 256))]
    pub cookie: Option<String>,
    /// The address of the client's pod. Write `true`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_ip: Option<bool>,
}

/// Whether pods of the client's own zone are preferred.
#[derive(JsonSchema, Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "the field that uses it explains the values; a doc comment on a variant would turn the schema's enum into oneOf"
)]
pub enum ZonePolicy {
    Any,
    Prefer,
    Only,
}

/// Faults that sidecars add to attempts on purpose, to test how clients react. Delays and aborts are independent of
/// each other, and neither counts for the breaker, the balancer or a Canary.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = ("has(self.delay) || has(self.abort)", "faults needs delay, abort or both; write for example {delay: {by: 200ms, of: 5%}}"))]
pub struct FaultsSpec {
    /// Attempts that begin later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay: Option<DelaySpec>,
    /// Attempts that end with an error instead of being sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abort: Option<AbortSpec>,
    /// When the faults end, such as 2026-12-01T12:00:00Z; at most 24 hours after the policy is applied. Required, so
    /// that a forgotten test ends.
    pub until: Time,
}

/// Requests that are sent later.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DelaySpec {
    /// How much later, such as 200ms; at most 5m.
    #[schemars(regex(pattern = SPAN_PATTERN), length(min = 2, max = 32))]
    #[x_kube(validation = (UP_TO_FIVE_MINUTES, "faults.delay.by must be longer than 0s and at most 5m, in m, s and ms; write for example 200ms"))]
    pub by: String,
    /// Percentage of the attempts, such as 5% or 0.5%.
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = (PERCENT, "faults.delay.of must be from 0% to 100%, with at most two decimals; write for example 5%"))]
    pub of: String,
}

/// Requests that are answered with an error instead of being sent.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AbortSpec {
    /// HTTP status of the answer, from 400 to 599. gRPC calls get the code that belongs to it.
    #[schemars(range(min = 400, max = 599))]
    pub status: u16,
    /// Percentage of the attempts, such as 1% or 0.5%.
    #[schemars(length(min = 2, max = 8))]
    #[x_kube(validation = (PERCENT, "faults.abort.of must be from 0% to 100%, with at most two decimals; write for example 1%"))]
    pub of: String,
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json, to_value};

    use super::*;
    use crate::{MeshPolicySpec, parse_duration, parse_percent};

    fn read(section: &str, value: Value) -> Result<MeshPolicySpec, serde_json::Error> {
        from_value(json!({"target": {"kind": "Service", "name": "web"}, section: value}))
    }

    #[test]
    fn a_policy_with_every_section_is_read_and_written_as_it_was() {
        let spec = json!({
            "target": {"kind": "Service", "name": "payments"},
            "mode": "Enforce",
            "limits": {"concurrency": 64, "connections": 1000},
            "timeout": {"request": "2s", "attempt": "500ms", "idle": "60s"},
            "retry": {"on": ["5xx", "reset", "connect", "unavailable"], "attempts": 2, "budget": "10%"},
            "breaker": {"consecutiveFailures": 7, "ejectFor": "20s", "maxEjected": "30%"},
            "balance": {"by": "Hash", "hash": {"sourceIp": true}, "zone": "Prefer", "warmUp": "30s"},
            "faults": {
                "delay": {"by": "200ms", "of": "5%"},
                "abort": {"status": 503, "of": "0.5%"},
                "until": "2026-12-01T12:00:00Z"
            }
        });
        let read: MeshPolicySpec = from_value(spec.clone()).unwrap();
        assert_eq!(to_value(&read).unwrap(), spec);
    }

    #[test]
    fn what_a_section_leaves_out_has_the_documented_default() {
        let retry = read("retry", json!({"on": ["connect"]})).unwrap().retry.unwrap();
        assert_eq!((retry.attempts, retry.budget.as_str()), (2, "20%"));
        let breaker = read("breaker", json!({})).unwrap().breaker.unwrap();
        assert_eq!(breaker, BreakerSpec::default());
        assert_eq!(breaker.consecutive_failures, 5);
        assert_eq!((breaker.eject_for.as_str(), breaker.max_ejected.as_str()), ("10s", "50%"));
        let balance = read("balance", json!({})).unwrap().balance.unwrap();
        assert_eq!(balance, BalanceSpec::default());
        assert_eq!(balance.by, BalanceBy::Latency);
    }

    #[test]
    fn the_defaults_are_values_that_can_be_parsed() {
        let breaker = BreakerSpec::default();
        assert_eq!(parse_duration(&breaker.eject_for).unwrap().as_secs(), 10);
        assert_eq!(parse_percent(&breaker.max_ejected).unwrap(), 0.5);
        assert_eq!(parse_percent(&retry_budget()).unwrap(), 0.2);
    }

    #[test]
    fn faults_without_an_end_are_not_read() {
        let abort = json!({"status": 503, "of": "1%"});
        assert!(read("faults", json!({"abort": abort, "until": "2026-12-01T12:00:00Z"})).is_ok());
        let error = read("faults", json!({"abort": abort})).unwrap_err();
        assert!(error.to_string().contains("until"), "{error}");
    }

    #[test]
    fn reasons_of_retries_are_read_also_as_yaml_1_1_spells_their_name() {
        for name in ["on", "true"] {
            let retry = read("retry", json!({name: ["reset", "5xx"]})).unwrap().retry.unwrap();
            assert_eq!(retry.reasons().collect::<Vec<_>>(), [RetryOn::Reset, RetryOn::ServerError], "{name}");
        }
        assert!(read("retry", json!({"on": ["4xx"]})).is_err());
    }

    #[test]
    fn a_misspelled_field_of_a_section_is_not_read() {
        for (section, value) in [
            ("limits", json!({"concurency": 1})),
            ("timeout", json!({"requests": "2s"})),
            ("retry", json!({"on": ["connect"], "attempt": 1})),
            ("breaker", json!({"ejectfor": "10s"})),
            ("balance", json!({"warmup": "10s"})),
            ("balance", json!({"by": "Hash", "hash": {"sourceIP": true}})),
            (
                "faults",
                json!({"delay": {"by": "1s", "of": "1%", "for": "x"}, "until": "2026-12-01T12:00:00Z"}),
            ),
        ] {
            assert!(read(section, value.clone()).is_err(), "{section}: {value}");
        }
    }
}
