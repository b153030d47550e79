//! `/metrics`: the text form that every Prometheus reads.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use tulle_mesh::histogram::upper_bound_micros;

use super::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, Series, SeriesKey, Telemetry};

/// Seconds; each the upper bound of exponential buckets to within 9 %, and enough for a quick look.
const CLASSIC: [f64; 12] = [0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// A series or an event, as lines.
pub fn render(telemetry: &Telemetry) -> String {
    let mut out = String::new();
    let all = telemetry.all();
    family(&mut out, "tulle_requests_total", "counter", "Requests, by class of status.");
    for (key, series) in &all {
        for (class, count) in series.by_class.iter().enumerate() {
            let count = load(count);
            if count > 0 {
                line(
                    &mut out,
                    "tulle_requests_total",
                    key,
                    &format!(",status=\"{}\"", class_name(class)),
                    count,
                );
            }
        }
    }
    histogram(&mut out, &all);
    family(
        &mut out,
        "tulle_failures_total",
        "counter",
        "Requests and connections that failed in the mesh, by reason.",
    );
    for (key, series) in &all {
        for (reason, count) in series.failures() {
            line(&mut out, "tulle_failures_total", key, &format!(",reason=\"{reason}\""), count);
        }
    }
    type Counter = fn(&Series) -> &AtomicU64;
    let counters: [(&str, &str, Counter); 3] = [
        ("tulle_sent_bytes_total", "Bytes of requests.", |series| &series.bytes_up),
        ("tulle_received_bytes_total", "Bytes of answers.", |series| &series.bytes_down),
        ("tulle_connections_total", "Connections whose content is opaque.", |series| &series.connections),
    ];
    for (name, help, counter) in counters {
        family(&mut out, name, "counter", help);
        for (key, series) in &all {
            line(&mut out, name, key, "", load(counter(series)));
        }
    }
    breakers(&mut out, telemetry);
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

fn histogram(out: &mut String, all: &[(SeriesKey, std::sync::Arc<Series>)]) {
    let name = "tulle_request_duration_seconds";
    family(out, name, "histogram", "Time from the head of a request to the end of its answer.");
    for (key, series) in all {
        let total: u64 = series.latency.iter().map(load).sum();
        if total == 0 {
            continue;
        }
        for bound in CLASSIC {
            let within = series
                .latency
                .iter()
                .enumerate()
                .filter(|(bucket, _)| upper_bound_micros(*bucket) <= bound * 1e6 * 1.045);
            let count: u64 = within.map(|(_, count)| load(count)).sum();
            line(out, "tulle_request_duration_seconds_bucket", key, &format!(",le=\"{bound}\""), count);
        }
        line(out, "tulle_request_duration_seconds_bucket", key, ",le=\"+Inf\"", total);
        line(out, "tulle_request_duration_seconds_count", key, "", total);
        let sum = load(&series.latency_sum) as f64 / 1e6;
        let _ = writeln!(out, "tulle_request_duration_seconds_sum{{{}}} {sum}", labels(key));
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
        let text = render(&telemetry);
        let labels = "direction=\"outbound\",destination_namespace=\"shop\",destination_service=\"web\",revision=\"abc\",protocol=\"http1\"";
        for expected in [
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
