//! The operator's metrics as OpenMetrics text.
//!
//! In: the numbers of one scrape. Out: the text. Nothing is counted here: a scrape is a snapshot of other modules'
//! counters.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::rollout::gauges::CanaryGauges;
use crate::status::routes::times::Times;
use crate::telemetry::counts::Verdicts;
use crate::telemetry::rules::RuleId;
use crate::telemetry::{Counts, Destination};

/// The content type of the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The numbers of one scrape.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Whether this replica leads.
    pub leader: bool,
    /// Sidecars that are connected, as far as this replica knows.
    pub sidecars: usize,
    /// Discovery streams that this replica has served.
    pub opened_streams: u64,
    /// Pods without the sidecar that their namespace asks for.
    pub pods_without_sidecar: usize,
    /// Refused calls: kind of call, reason, and number.
    pub refusals: Vec<((&'static str, &'static str), u64)>,
    /// Requests that sidecars have reported.
    pub requests: Vec<(Destination, Counts)>,
    /// What rules of policies have refused, or would have in Shadow.
    pub rules: Vec<(RuleId, Verdicts)>,
    /// Canaries.
    pub canaries: Vec<CanaryGauges>,
    /// Changes of routes, by the time until all sidecars had acknowledged them. Counted while this replica leads.
    pub routes_acknowledged: Times,
}

impl Metrics {
    /// Encodes the metrics.
    ///
    /// # Errors
    /// Never in practice: writing to a string does not fail.
    pub fn into_text(self) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }

    fn encode_rules(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut verdicts = encoder.encode_descriptor(
            "tulle_operator_policy_verdicts",
            "Requests and opaque connections that a rule refused, or would have refused in Shadow.",
            None,
            MetricType::Counter,
        )?;
        for (RuleId { policy: (namespace, policy), rule }, Verdicts { denied, would_deny }) in &self.rules {
            for (verdict, value) in [("denied", *denied), ("would_deny", *would_deny)] {
                let labels = [
                    ("policy_namespace", &**namespace),
                    ("policy", &**policy),
                    ("rule", &**rule),
                    ("verdict", verdict),
                ];
                counter(&mut verdicts, &labels, value)?;
            }
        }
        Ok(())
    }

    fn encode_canaries(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut phases = encoder.encode_descriptor(
            "tulle_canary_phase",
            "The phase of a Canary: 1 for the one that it is in.",
            None,
            MetricType::Gauge,
        )?;
        for canary in &self.canaries {
            let labels = [
                ("canary_namespace", &*canary.namespace),
                ("canary", &*canary.name),
                ("phase", &*canary.phase),
            ];
            phases.encode_family(&labels)?.encode_gauge(&1_u64)?;
        }
        let mut weights = encoder.encode_descriptor(
            "tulle_canary_weight",
            "Percentage of the requests that goes to the new version.",
            None,
            MetricType::Gauge,
        )?;
        for canary in &self.canaries {
            let labels = [("canary_namespace", &*canary.namespace), ("canary", &*canary.name)];
            weights.encode_family(&labels)?.encode_gauge(&u64::from(canary.weight))?;
        }
        let mut changes = encoder.encode_descriptor(
            "tulle_canary_last_change_timestamp_seconds",
            "When the rollout last began, got a weight, paused or ended, or its target came or went.",
            None,
            MetricType::Gauge,
        )?;
        for (canary, time) in self.canaries.iter().filter_map(|canary| Some((canary, canary.last_change?))) {
            let labels = [("canary_namespace", &*canary.namespace), ("canary", &*canary.name)];
            changes.encode_family(&labels)?.encode_gauge(&time)?;
        }
        Ok(())
    }
}

// The encoder appends `_total` to the name of a counter.
impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let leader = ("tulle_operator_leader", "Whether this replica leads.", u64::from(self.leader));
        let sidecars = ("tulle_operator_sidecars", "Connected sidecars.", count(self.sidecars));
        let uninjected = (
            "tulle_operator_pods_without_sidecar",
            "Pods without the sidecar that their namespace asks for.",
            count(self.pods_without_sidecar),
        );
        for (name, help, value) in [leader, sidecars, uninjected] {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        encoder
            .encode_descriptor(
                "tulle_operator_discovery_streams",
                "Discovery streams that sidecars have opened.",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&self.opened_streams, None)?;
        let mut refusals = encoder.encode_descriptor(
            "tulle_operator_refusals",
            "Calls that were refused.",
            None,
            MetricType::Counter,
        )?;
        for ((what, reason), value) in &self.refusals {
            counter(&mut refusals, &[("what", *what), ("reason", *reason)], *value)?;
        }
        let mut requests = encoder.encode_descriptor(
            "tulle_operator_requests",
            "Requests that sidecars have reported.",
            None,
            MetricType::Counter,
        )?;
        for (to, Counts { requests: all, failures }) in &self.requests {
            for (outcome, value) in [("success", all.saturating_sub(*failures)), ("failure", *failures)] {
                let labels = [
                    ("destination_namespace", to.namespace.as_str()),
                    ("destination_service", to.service.as_str()),
                    ("revision", to.revision.as_str()),
                    ("outcome", outcome),
                ];
                counter(&mut requests, &labels, value)?;
            }
        }
        self.encode_rules(&mut encoder)?;
        self.encode_canaries(&mut encoder)?;
        let times = &self.routes_acknowledged;
        encoder
            .encode_descriptor(
                "tulle_operator_route_acknowledged_seconds",
                "Time from a change of a route to its last acknowledgement.",
                None,
                MetricType::Histogram,
            )?
            .encode_histogram::<NoLabelSet>(times.sum, times.count, &times.buckets(), None)
    }
}

fn counter<const N: usize>(
    family: &mut MetricEncoder<'_>,
    labels: &[(&str, &str); N],
    value: u64,
) -> fmt::Result {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::status::routes::times::AcknowledgeTimes;

    /// One value of every metric.
    fn sample() -> Metrics {
        let destination =
            Destination { namespace: "shop".into(), service: "web".into(), revision: "r1".into() };
        let rule = RuleId { policy: ("shop".into(), "web".into()), rule: "DenyRule(0)".into() };
        let times = AcknowledgeTimes::default();
        times.observe(Duration::from_millis(125));
        Metrics {
            leader: true,
            sidecars: 3,
            opened_streams: 5,
            pods_without_sidecar: 1,
            refusals: vec![(("certificate", "OtherPod"), 2)],
            requests: vec![(destination, Counts { requests: 10, failures: 4 })],
            rules: vec![(rule, Verdicts { denied: 0, would_deny: 7 })],
            canaries: vec![
                CanaryGauges {
                    namespace: "shop".into(),
                    name: "api".into(),
                    phase: "Waiting".into(),
                    weight: 0,
                    last_change: None,
                },
                CanaryGauges {
                    namespace: "shop".into(),
                    name: "web".into(),
                    phase: "Paused".into(),
                    weight: 25,
                    last_change: Some(1_800_000_000),
                },
            ],
            routes_acknowledged: times.snapshot(),
        }
    }

    #[test]
    fn the_text_names_every_metric_as_dashboards_know_it() {
        let expected = r#"# HELP tulle_operator_leader Whether this replica leads.
# TYPE tulle_operator_leader gauge
tulle_operator_leader 1
# HELP tulle_operator_sidecars Connected sidecars.
# TYPE tulle_operator_sidecars gauge
tulle_operator_sidecars 3
# HELP tulle_operator_pods_without_sidecar Pods without the sidecar that their namespace asks for.
# TYPE tulle_operator_pods_without_sidecar gauge
tulle_operator_pods_without_sidecar 1
# HELP tulle_operator_discovery_streams Discovery streams that sidecars have opened.
# TYPE tulle_operator_discovery_streams counter
tulle_operator_discovery_streams_total 5
# HELP tulle_operator_refusals Calls that were refused.
# TYPE tulle_operator_refusals counter
tulle_operator_refusals_total{what="certificate",reason="OtherPod"} 2
# HELP tulle_operator_requests Requests that sidecars have reported.
# TYPE tulle_operator_requests counter
tulle_operator_requests_total{destination_namespace="shop",destination_service="web",revision="r1",outcome="success"} 6
tulle_operator_requests_total{destination_namespace="shop",destination_service="web",revision="r1",outcome="failure"} 4
# HELP tulle_operator_policy_verdicts Requests and opaque connections that a rule refused, or would have refused in Shadow.
# TYPE tulle_operator_policy_verdicts counter
tulle_operator_policy_verdicts_total{policy_namespace="shop",policy="web",rule="DenyRule(0)",verdict="denied"} 0
tulle_operator_policy_verdicts_total{policy_namespace="shop",policy="web",rule="DenyRule(0)",verdict="would_deny"} 7
# HELP tulle_canary_phase The phase of a Canary: 1 for the one that it is in.
# TYPE tulle_canary_phase gauge
tulle_canary_phase{canary_namespace="shop",canary="api",phase="Waiting"} 1
tulle_canary_phase{canary_namespace="shop",canary="web",phase="Paused"} 1
# HELP tulle_canary_weight Percentage of the requests that goes to the new version.
# TYPE tulle_canary_weight gauge
tulle_canary_weight{canary_namespace="shop",canary="api"} 0
tulle_canary_weight{canary_namespace="shop",canary="web"} 25
# HELP tulle_canary_last_change_timestamp_seconds When the rollout last began, got a weight, paused or ended, or its target came or went.
# TYPE tulle_canary_last_change_timestamp_seconds gauge
tulle_canary_last_change_timestamp_seconds{canary_namespace="shop",canary="web"} 1800000000
# HELP tulle_operator_route_acknowledged_seconds Time from a change of a route to its last acknowledgement.
# TYPE tulle_operator_route_acknowledged_seconds histogram
tulle_operator_route_acknowledged_seconds_sum 0.125
tulle_operator_route_acknowledged_seconds_count 1
tulle_operator_route_acknowledged_seconds_bucket{le="0.01"} 0
tulle_operator_route_acknowledged_seconds_bucket{le="0.025"} 0
tulle_operator_route_acknowledged_seconds_bucket{le="0.05"} 0
tulle_operator_route_acknowledged_seconds_bucket{le="0.1"} 0
tulle_operator_route_acknowledged_seconds_bucket{le="0.2"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="0.5"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="1.0"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="2.5"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="5.0"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="10.0"} 1
tulle_operator_route_acknowledged_seconds_bucket{le="+Inf"} 1
# EOF
"#;
        assert_eq!(sample().into_text().unwrap(), expected);
    }

    #[test]
    fn a_label_cannot_break_the_text() {
        let destination =
            Destination { revision: "a\"b\n".into(), namespace: "n".into(), service: "s".into() };
        let metrics = Metrics { requests: vec![(destination, Counts::default())], ..Metrics::default() };
        let text = metrics.into_text().unwrap();
        assert!(text.contains(r#"revision="a\"b\n",outcome="success"} 0"#), "{text}");
    }
}
