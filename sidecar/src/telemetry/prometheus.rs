//! `/metrics`, as text or as protobuf: [`Form`] says which a client gets.
//!
//! In: the counters. Out: the bytes of one scrape. Nothing is counted here.

mod exposition;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tulle_mesh::histogram::{BUCKETS, upper_bound_micros};

pub use exposition::Form;
use exposition::{Bucket, Buckets, Family, Histogram, Kind, LabelPair, Metric, Value};

use super::{CLASS_CLIENT, CLASS_GRPC, CLASS_NONE, Series, SeriesKey, Telemetry};

/// Bounds of the classic buckets in seconds. Each counts the exponential buckets up to the nearest bound, which is within
/// 4.5 %.
const CLASSIC: [f64; 12] = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// The schema of the native histograms. The sidecar's own buckets are those of schema 3, but of microseconds: in seconds
/// their bounds are 0.45 of a bucket off, 4 % of each latency. Two buckets of schema 4 cover one of them to within 0.5 %.
const SCHEMA: i32 = 4;

/// The upper bound of the sidecar's first bucket, as the index of a bucket in the schema: log2(2^6.125 µs / 1 s) · 16 is
/// -220.9.
const FIRST: i32 = -221;

/// A gauge that is not in [`Telemetry`] and has no labels.
#[derive(Clone, Copy, Debug)]
pub struct Gauge {
    /// The metric's name.
    pub name: &'static str,
    /// What it says.
    pub help: &'static str,
    /// Its value.
    pub value: f64,
}

/// Encodes the metrics of one scrape.
pub fn encode(telemetry: &Telemetry, gauges: &[Gauge], form: Form) -> Vec<u8> {
    let mut out = Vec::new();
    let all = sums(telemetry);
    form.write(&mut out, &requests(&all));
    form.write(&mut out, &durations(&all));
    form.write(&mut out, &failures(&all));
    type Counter = fn(&Sum) -> u64;
    let counters: [(&str, &str, Counter); 4] = [
        ("tulle_retries_total", "Attempts beyond the first of each request.", |sum| sum.retries),
        ("tulle_sent_bytes_total", "Bytes of requests.", |sum| sum.bytes_up),
        ("tulle_received_bytes_total", "Bytes of answers.", |sum| sum.bytes_down),
        ("tulle_connections_total", "Connections whose content is opaque.", |sum| sum.connections),
    ];
    for (name, help, count) in counters {
        let metrics = all.iter().map(|(key, sum)| counter(labels(key), count(sum)));
        form.write(&mut out, &family(name, help, Kind::Counter, metrics));
    }
    for family in breakers(telemetry) {
        form.write(&mut out, &family);
    }
    form.write(&mut out, &verdicts(telemetry));
    let (exported, dropped) = telemetry.spans.counts();
    let spans = [("exported", exported), ("dropped", dropped)]
        .map(|(outcome, count)| counter(vec![label("outcome", outcome)], count));
    let help = "Spans of traces, by what became of them.";
    form.write(&mut out, &family("tulle_spans_total", help, Kind::Counter, spans));
    let events = telemetry.events().into_iter();
    let events = events
        .map(|((kind, reason), count)| counter(vec![label("kind", kind), label("reason", reason)], count));
    let help = "What is neither request nor connection.";
    form.write(&mut out, &family("tulle_events_total", help, Kind::Counter, events));
    for Gauge { name, help, value } in gauges {
        form.write(&mut out, &family(name, help, Kind::Gauge, [gauge(Vec::new(), *value)]));
    }
    out
}

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

    fn histogram(&self) -> Histogram {
        let buckets = || self.latency.iter().enumerate().map(|(bucket, count)| (bucket, *count));
        let within = |bound: f64| -> u64 {
            // Half a bucket more: the nearest bound, whether below or above.
            let highest = bound * 1e6 * (1.0 / 16.0_f64).exp2();
            buckets()
                .filter(|(bucket, _)| upper_bound_micros(*bucket) <= highest)
                .map(|(_, count)| count)
                .sum()
        };
        let classic = CLASSIC.map(|bound| Bucket { cumulative: within(bound), upper_bound: bound });
        let native = buckets().skip(1).flat_map(|(bucket, count)| {
            let index = FIRST + 2 * i32::try_from(bucket).unwrap_or(i32::MAX / 4);
            // Neither half ever shrinks.
            [(index - 1, count / 2), (index, count - count / 2)]
        });
        let Buckets { spans, deltas } = Buckets::new(native);
        Histogram {
            count: self.latency.iter().sum(),
            sum: self.latency_sum as f64 / 1e6,
            classic: classic.to_vec(),
            schema: SCHEMA,
            zero_threshold: (f64::from(FIRST) / 16.0).exp2(),
            // The first bucket holds whatever is quicker.
            zero_count: self.latency.first().copied().unwrap_or_default(),
            spans,
            deltas,
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

fn requests(all: &Sums) -> Family {
    let metrics = all.iter().flat_map(|(key, sum)| {
        let counted = sum.by_class.iter().enumerate().filter(|(_, count)| **count > 0);
        counted.map(move |(class, count)| counter(labels_and(key, "status", class_name(class)), *count))
    });
    family("tulle_requests_total", "Requests, by class of status.", Kind::Counter, metrics)
}

fn durations(all: &Sums) -> Family {
    // Opaque connections have none.
    let timed = all.iter().filter(|(_, sum)| sum.latency.iter().any(|count| *count > 0));
    let metrics = timed.map(|(key, sum)| Metric {
        labels: labels(key),
        histogram: Some(sum.histogram()),
        ..Metric::default()
    });
    let help = "Time from the head of a request to the end of its answer.";
    family("tulle_request_duration_seconds", help, Kind::Histogram, metrics)
}

fn failures(all: &Sums) -> Family {
    let metrics = all.iter().flat_map(|(key, sum)| {
        sum.failures.iter().map(move |(reason, count)| counter(labels_and(key, "reason", reason), *count))
    });
    let help = "Requests and connections that failed in the mesh, by reason.";
    family("tulle_failures_total", help, Kind::Counter, metrics)
}

fn breakers(telemetry: &Telemetry) -> [Family; 2] {
    let (mut ejected, mut panicking) = (Vec::new(), Vec::new());
    for ((namespace, service), breaker) in telemetry.breakers.all() {
        let labels = vec![label("destination_namespace", &namespace), label("destination_service", &service)];
        let (endpoints, workers) = breaker.read();
        ejected.push(gauge(labels.clone(), endpoints as f64));
        panicking.push(gauge(labels, workers as f64));
    }
    let endpoints = "Endpoints that the breaker leaves alone for a while.";
    let workers = "Workers in which so many are ejected that all are used.";
    [
        family("tulle_ejected_endpoints", endpoints, Kind::Gauge, ejected),
        family("tulle_breaker_panic", workers, Kind::Gauge, panicking),
    ]
}

fn verdicts(telemetry: &Telemetry) -> Family {
    let metrics = telemetry.rules.all().into_iter().flat_map(|(key, totals)| {
        [("denied", totals.denied), ("would_deny", totals.would_deny)].map(|(verdict, count)| {
            let labels = vec![
                label("policy_namespace", &key.namespace),
                label("policy", &key.policy),
                label("rule", &key.rule),
                label("verdict", verdict),
            ];
            counter(labels, count)
        })
    });
    let help = "Requests and opaque connections that a rule refused, or would have refused in Shadow.";
    family("tulle_policy_verdicts_total", help, Kind::Counter, metrics)
}

fn family(name: &str, help: &str, kind: Kind, metrics: impl IntoIterator<Item = Metric>) -> Family {
    let metrics = metrics.into_iter().collect();
    Family { name: name.to_owned(), help: help.to_owned(), kind: Some(kind as i32), metrics }
}

fn counter(labels: Vec<LabelPair>, count: u64) -> Metric {
    Metric { labels, counter: Some(Value { value: count as f64 }), ..Metric::default() }
}

fn gauge(labels: Vec<LabelPair>, value: f64) -> Metric {
    Metric { labels, gauge: Some(Value { value }), ..Metric::default() }
}

fn label(name: &str, value: &str) -> LabelPair {
    LabelPair { name: name.to_owned(), value: value.to_owned() }
}

fn labels(key: &SeriesKey) -> Vec<LabelPair> {
    let (namespace, peer) = match key.direction {
        "outbound" => ("destination_namespace", "destination_service"),
        _ => ("source_namespace", "source_service_account"),
    };
    vec![
        label("direction", key.direction),
        label(namespace, &key.namespace),
        label(peer, &key.peer),
        label("revision", &key.revision),
        label("protocol", key.protocol),
    ]
}

fn labels_and(key: &SeriesKey, name: &str, value: &str) -> Vec<LabelPair> {
    let mut labels = labels(key);
    labels.push(label(name, value));
    labels
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
