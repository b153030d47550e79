//! `/metrics`: the text form that every Prometheus reads.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tulle_mesh::histogram::{BUCKETS, upper_bound_micros};

use super::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, Series, SeriesKey, Telemetry};

/// Seconds; each the upper bound of exponential buckets to within 9 %, and enough for a quick look.
const CLASSIC: [f64; 12] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Counts of all series with the same labels: routes and mTLS are no labels.
struct Sum {
    by_class: [u64; 8],
    latency: [u64; BUCKETS],
    latency_sum: u64,
    bytes_up: u64,
    bytes_down: u64,
    connections: u64,
    retries: u64,
    failures: BTreeMap<&'static str, u64>,
}

impl Default for Sum {
    fn default() -> Self {
        Self {
            by_class: [0; 8],
            latency: [0; BUCKETS],
            latency_sum: 0,
            bytes_up: 0,
            bytes_down: 0,
            connections: 0,
            retries: 0,
            failures: BTreeMap::new(),
        }
    }
}

impl Sum {
    fn add(&mut self, series: &Series) {
        self.by_class.iter_mut().zip(&series.by_class).for_each(|(sum, count)| *sum += load(count));
        self.latency.iter_mut().zip(series.latency.iter()).for_each(|(sum, count)| *sum += load(count));
        self.latency_sum += load(&series.latency_sum);
        self.bytes_up += load(&series.bytes_up);
        self.bytes_down += load(&series.bytes_down);
        self.connections += load(&series.connections);
        self.retries += load(&series.retries);
        for (reason, count) in series.failures() {
            *self.failures.entry(reason).or_default() += count;
        }
    }
}

/// Sums by what the labels say.
type Sums = BTreeMap<SeriesKey, Sum>;

fn sums(telemetry: &Telemetry) -> Sums {
    let mut sums = Sums::new();
    for (key, series) in telemetry.all() {
        let key = SeriesKey { route: Arc::default(), mtls: false, ..key };
        sums.entry(key).or_default().add(&series);
    }
    sums
}

/// A series or an event, as lines.
pub fn render(telemetry: &Telemetry) -> String {
    let mut out = String::new();
    let all = sums(telemetry);
    family(&mut out, "tulle_requests_total", "counter", "Requests, by class of status.");
    for (key, sum) in &all {
        for (class, count) in sum.by_class.iter().enumerate().filter(|(_, count)| **count > 0) {
            let status = format!(",status=\"{}\"", class_name(class));
            line(&mut out, "tulle_requests_total", key, &status, *count);
        }
    }
    histogram(&mut out, &all);
    family(
        &mut out,
        "tulle_failures_total",
        "counter",
        "Requests and connections that failed in the mesh, by reason.",
    );
    for (key, sum) in &all {
        for (reason, count) in &sum.failures {
            line(&mut out, "tulle_failures_total", key, &format!(",reason=\"{reason}\""), *count);
        }
    }
    type Counter = fn(&Sum) -> u64;
    let counters: [(&str, &str, Counter); 4] = [
        ("tulle_retries_total", "Attempts beyond the first of each request.", |sum| sum.retries),
        ("tulle_sent_bytes_total", "Bytes of requests.", |sum| sum.bytes_up),
        ("tulle_received_bytes_total", "Bytes of answers.", |sum| sum.bytes_down),
        ("tulle_connections_total", "Connections whose content is opaque.", |sum| sum.connections),
    ];
    for (name, help, counter) in counters {
        family(&mut out, name, "counter", help);
        for (key, sum) in &all {
            line(&mut out, name, key, "", counter(sum));
        }
    }
    breakers(&mut out, telemetry);
    let (exported, dropped) = telemetry.spans.counts();
    family(&mut out, "tulle_spans_total", "counter", "Spans of traces, by what became of them.");
    let _ = writeln!(out, "tulle_spans_total{{outcome=\"exported\"}} {exported}");
    let _ = writeln!(out, "tulle_spans_total{{outcome=\"dropped\"}} {dropped}");
    family(&mut out, "tulle_events_total", "counter", "What is neither request nor connection.");
    for ((kind, reason), count) in telemetry.events() {
        let _ = writeln!(out, "tulle_events_total{{kind=\"{kind}\",reason=\"{reason}\"}} {count}");
    }
    out
}

fn breakers(out: &mut String, telemetry: &Telemetry) {
    let gauges = telemetry.breakers.all();
    let (ejected, panicking) = ("tulle_ejected_endpoints", "tulle_breaker_panic");
    family(out, ejected, "gauge", "Endpoints that the breaker leaves alone for a while.");
    for ((namespace, service), gauge) in &gauges {
        let labels = format!("destination_namespace=\"{namespace}\",destination_service=\"{service}\"");
        let _ = writeln!(out, "{ejected}{{{labels}}} {}", gauge.read().0);
    }
    family(out, panicking, "gauge", "Workers in which so many are ejected that all are used.");
    for ((namespace, service), gauge) in &gauges {
        let labels = format!("destination_namespace=\"{namespace}\",destination_service=\"{service}\"");
        let _ = writeln!(out, "{panicking}{{{labels}}} {}", gauge.read().1);
    }
}

fn histogram(out: &mut String, all: &Sums) {
    let name = "tulle_request_duration_seconds";
    family(out, name, "histogram", "Time from the head of a request to the end of its answer.");
    for (key, sum) in all {
        let total: u64 = sum.latency.iter().sum();
        if total == 0 {
            continue;
        }
        for bound in CLASSIC {
            let within = sum
                .latency
                .iter()
                .enumerate()
                .filter(|(bucket, _)| upper_bound_micros(*bucket) <= bound * 1e6 * 1.045);
            let count: u64 = within.map(|(_, count)| *count).sum();
            line(out, "tulle_request_duration_seconds_bucket", key, &format!(",le=\"{bound}\""), count);
        }
        line(out, "tulle_request_duration_seconds_bucket", key, ",le=\"+Inf\"", total);
        line(out, "tulle_request_duration_seconds_count", key, "", total);
        let seconds = sum.latency_sum as f64 / 1e6;
        let _ = writeln!(out, "tulle_request_duration_seconds_sum{{{}}} {seconds}", labels(key));
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, key: &SeriesKey, more: &str, value: u64) {
    let _ = writeln!(out, "{name}{{{}{more}}} {value}", labels(key));
}

/// Kubernetes names need no escaping.
fn labels(key: &SeriesKey) -> String {
    let (namespace, peer) = match key.direction {
        "outbound" => ("destination_namespace", "destination_service"),
        _ => ("source_namespace", "source_service_account"),
    };
    format!(
        "direction=\"{}\",{namespace}=\"{}\",{peer}=\"{}\",revision=\"{}\",protocol=\"{}\"",
        key.direction, key.namespace, key.peer, key.revision, key.protocol
    )
}

fn class_name(class: usize) -> &'static str {
    match class {
        CLASS_GRPC => "grpc_error",
        CLASS_NONE => "none",
        CLASS_CLIENT => "client",
        0 => "1xx",
        1 => "2xx",
        2 => "3xx",
        3 => "4xx",
        _ => "5xx",
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Failure;
    use std::time::Duration;

    #[test]
    fn what_was_counted_is_what_is_read() {
        let telemetry = Telemetry::default();
        let series = telemetry.outbound("shop", "web", "abc", "http1");
        series.request(&Ok(200), None, Duration::from_millis(2), (10, 20));
        series.request(&Ok(200), Some(13), Duration::from_millis(2), (0, 0));
        series.request(&Err(Failure::UpstreamNone), None, Duration::from_millis(700), (0, 0));
        let gauge = telemetry.breakers.of("shop", "web");
        let ejected = [1, 2].map(|last| std::net::SocketAddr::from(([10, 0, 0, last], 80)));
        gauge.change(&[], &ejected, 0);
        telemetry.spans.settle(5, 2);
        let text = render(&telemetry);
        let labels = "direction=\"outbound\",destination_namespace=\"shop\",destination_service=\"web\",revision=\"abc\",protocol=\"http1\"";
        for expected in [
            "tulle_spans_total{outcome=\"exported\"} 5".to_owned(),
            "tulle_spans_total{outcome=\"dropped\"} 2".to_owned(),
            format!("tulle_requests_total{{{labels},status=\"2xx\"}} 1"),
            format!("tulle_requests_total{{{labels},status=\"grpc_error\"}} 1"),
            format!("tulle_requests_total{{{labels},status=\"none\"}} 1"),
            format!("tulle_failures_total{{{labels},reason=\"UpstreamNone\"}} 1"),
            format!("tulle_request_duration_seconds_bucket{{{labels},le=\"0.0025\"}} 2"),
            format!("tulle_request_duration_seconds_count{{{labels}}} 3"),
            format!("tulle_sent_bytes_total{{{labels}}} 10"),
            "tulle_ejected_endpoints{destination_namespace=\"shop\",destination_service=\"web\"} 2"
                .to_owned(),
        ] {
            assert!(text.contains(&expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn routes_and_mtls_are_no_labels_and_their_counts_are_added_up() {
        let telemetry = Telemetry::default();
        for (route, mtls) in [("", false), ("HTTPRoute/shop/web", true), ("HTTPRoute/shop/web", false)] {
            let series = telemetry.series(SeriesKey {
                direction: "outbound",
                namespace: "shop".into(),
                peer: "web".into(),
                revision: "abc".into(),
                protocol: "http1",
                route: route.into(),
                mtls,
            });
            series.retried(2);
            series.request(&Ok(200), None, Duration::from_millis(2), (10, 20));
        }
        let text = render(&telemetry);
        let labels = "direction=\"outbound\",destination_namespace=\"shop\",destination_service=\"web\",revision=\"abc\",protocol=\"http1\"";
        for expected in [
            format!("tulle_requests_total{{{labels},status=\"2xx\"}} 3"),
            format!("tulle_request_duration_seconds_count{{{labels}}} 3"),
            format!("tulle_retries_total{{{labels}}} 6"),
            format!("tulle_sent_bytes_total{{{labels}}} 30"),
        ] {
            assert_eq!(text.matches(&expected).count(), 1, "{expected} is not once in\n{text}");
        }
    }

    #[test]
    fn more_peers_than_the_table_holds_become_one_series() {
        let telemetry = Telemetry::default();
        for number in 0..super::super::MAX_SERIES + 500 {
            telemetry.outbound("shop", &format!("s{number}"), "", "http1").request(
                &Ok(200),
                None,
                Duration::ZERO,
                (0, 0),
            );
        }
        assert_eq!(telemetry.all().len(), super::super::MAX_SERIES + 1);
    }
}
