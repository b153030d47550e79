//! Metric families, and the two forms in which Prometheus reads them.
//!
//! In: one family at a time, so that a scrape never holds all of them twice. Out: the bytes of the answer. Knows
//! nothing of what is counted.
//!
//! The structs are the messages of `io.prometheus.client` (repository prometheus/client_model, file
//! `io/prometheus/client/metrics.proto`) as far as a sidecar needs them: no summaries, exemplars or timestamps.

use std::fmt::Write as _;

use prost::Message;

/// The media type of the protobuf form, without parameters.
const MEDIA_TYPE: &str = "application/vnd.google.protobuf";

/// How the answer is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// What every reader understands. Histograms are classic.
    Text,
    /// Delimited messages. Histograms are native, with the classic buckets beside for readers that take those only.
    Protobuf,
}

impl Form {
    /// The form that a client prefers, by the values of its `Accept` headers. Text unless it asks for protobuf by name
    /// and not with less weight than for `text/plain`: a wildcard is a person with curl.
    pub fn preferred<'a>(accept: impl IntoIterator<Item = &'a str>) -> Self {
        let (mut protobuf, mut text) = (0.0_f64, 0.0_f64);
        for range in accept.into_iter().flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default();
            let (mut weight, mut is_readable) = (1.0_f64, true);
            for (name, value) in parts.filter_map(|parameter| parameter.split_once('=')) {
                let value = value.trim().trim_matches('"');
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => weight = value.parse().unwrap_or(0.0),
                    "proto" => is_readable &= value == "io.prometheus.client.MetricFamily",
                    "encoding" => is_readable &= value == "delimited",
                    _ => {}
                }
            }
            if media_type.eq_ignore_ascii_case(MEDIA_TYPE) && is_readable {
                protobuf = f64::max(protobuf, weight);
            } else if media_type.eq_ignore_ascii_case("text/plain") {
                text = f64::max(text, weight);
            }
        }
        if protobuf > 0.0 && protobuf >= text { Self::Protobuf } else { Self::Text }
    }

    /// The content type of the answer.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4",
            Self::Protobuf => {
                "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
            }
        }
    }

    /// Appends a family.
    pub fn write(self, out: &mut Vec<u8>, family: &Family) {
        match self {
            Self::Text => out.extend_from_slice(text(family).as_bytes()),
            Self::Protobuf => out.extend_from_slice(&family.encode_length_delimited_to_vec()),
        }
    }
}

/// What a family consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter = 0,
    /// Grows and shrinks.
    Gauge = 1,
    /// A distribution.
    Histogram = 4,
}

/// All metrics of a name: `MetricFamily`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Family {
    /// The name, of counters with `_total`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What is counted.
    #[prost(string, tag = "2")]
    pub help: String,
    /// The [`Kind`] of the metrics.
    #[prost(int32, optional, tag = "3")]
    pub kind: Option<i32>,
    /// One for each set of label values.
    #[prost(message, repeated, tag = "4")]
    pub metrics: Vec<Metric>,
}

/// One metric.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metric {
    /// Its labels.
    #[prost(message, repeated, tag = "1")]
    pub labels: Vec<LabelPair>,
    /// Of a gauge.
    #[prost(message, optional, tag = "2")]
    pub gauge: Option<Value>,
    /// Of a counter.
    #[prost(message, optional, tag = "3")]
    pub counter: Option<Value>,
    /// Of a histogram.
    #[prost(message, optional, tag = "7")]
    pub histogram: Option<Histogram>,
}

/// A label.
#[derive(Clone, PartialEq, prost::Message)]
pub struct LabelPair {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its value.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// `Gauge` and `Counter`, which have the same field.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Value {
    /// The number.
    #[prost(double, tag = "1")]
    pub value: f64,
}

/// A distribution, both as a classic and as a native histogram.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Histogram {
    /// How many values.
    #[prost(uint64, tag = "1")]
    pub count: u64,
    /// Their sum.
    #[prost(double, tag = "2")]
    pub sum: f64,
    /// The classic buckets, ascending, without that of infinity.
    #[prost(message, repeated, tag = "3")]
    pub classic: Vec<Bucket>,
    /// Native: buckets grow by 2^(2^-schema).
    #[prost(sint32, tag = "5")]
    pub schema: i32,
    /// Native: the upper bound of the zero bucket. Above 0 even of an empty histogram, which shows that it is native.
    #[prost(double, tag = "6")]
    pub zero_threshold: f64,
    /// Native: values up to the threshold.
    #[prost(uint64, tag = "7")]
    pub zero_count: u64,
    /// Native: runs of buckets that are not empty.
    #[prost(message, repeated, tag = "12")]
    pub spans: Vec<Span>,
    /// Native: of every bucket in a span, the difference to the count of the one before.
    #[prost(sint64, repeated, tag = "13")]
    pub deltas: Vec<i64>,
}

/// A classic bucket.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Bucket {
    /// Values up to the bound.
    #[prost(uint64, tag = "1")]
    pub cumulative: u64,
    /// The bound.
    #[prost(double, tag = "2")]
    pub upper_bound: f64,
}

/// The buckets of a native histogram, as its fields of the same names have them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buckets {
    /// Runs of buckets that are not empty.
    pub spans: Vec<Span>,
    /// Differences of counts.
    pub deltas: Vec<i64>,
}

/// A run of buckets: `BucketSpan`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Span {
    /// Of the first span the index of its first bucket, of another the empty buckets before it.
    #[prost(sint32, tag = "1")]
    pub offset: i32,
    /// Its buckets.
    #[prost(uint32, tag = "2")]
    pub length: u32,
}

impl Buckets {
    /// From the index and count of each bucket, ascending. Empty ones are left out.
    pub fn new(counts: impl IntoIterator<Item = (i32, u64)>) -> Self {
        let mut buckets = Self::default();
        let (mut last_count, mut next_index) = (0_i64, 0_i32);
        for (index, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            let gap = index - next_index;
            match buckets.spans.last_mut() {
                Some(span) if gap == 0 => span.length += 1,
                _ => buckets.spans.push(Span { offset: gap, length: 1 }),
            }
            buckets.deltas.push(count - last_count);
            (last_count, next_index) = (count, index + 1);
        }
        buckets
    }
}

/// A family as text.
fn text(family: &Family) -> String {
    let (name, help) = (&family.name, &family.help);
    let is = |kind: Kind| family.kind == Some(kind as i32);
    let kind = match () {
        () if is(Kind::Histogram) => "histogram",
        () if is(Kind::Gauge) => "gauge",
        () => "counter",
    };
    // Writing to a string does not fail.
    let mut out = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for metric in &family.metrics {
        let labels = labels(&metric.labels);
        if let Some(value) = metric.counter.as_ref().or(metric.gauge.as_ref()) {
            let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
            let _ = writeln!(out, "{name}{braces} {}", value.value);
        }
        let Some(histogram) = &metric.histogram else { continue };
        let comma = if labels.is_empty() { "" } else { "," };
        for Bucket { cumulative, upper_bound } in &histogram.classic {
            let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{upper_bound}\"}} {cumulative}");
        }
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {}", histogram.count);
        let _ = writeln!(out, "{name}_count{{{labels}}} {}", histogram.count);
        let _ = writeln!(out, "{name}_sum{{{labels}}} {}", histogram.sum);
    }
    out
}

/// Kubernetes names need no escaping.
fn labels(labels: &[LabelPair]) -> String {
    let pairs = labels.iter().map(|LabelPair { name, value }| format!("{name}=\"{value}\""));
    pairs.collect::<Vec<String>>().join(",")
}
