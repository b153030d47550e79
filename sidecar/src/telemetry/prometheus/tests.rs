//! Tests of `/metrics`.

use std::time::Duration;

use proptest::prelude::*;
use prost::Message as _;
use tulle_mesh::policy::Reason;

use super::exposition::Span;
use super::*;
use crate::error::Failure;
use crate::telemetry::MAX_SERIES;
use crate::telemetry::rules::SectionCounts;

const LABELS: &str = "direction=\"outbound\",destination_namespace=\"shop\",destination_service=\"web\",revision=\"abc\",protocol=\"http1\"";
const RULE: &str = "policy_namespace=\"shop\",policy=\"web\",rule=\"DenyRule(0)\"";

fn text(telemetry: &Telemetry) -> String {
    String::from_utf8(encode(telemetry, &[], Form::Text)).unwrap()
}

fn protobuf(telemetry: &Telemetry) -> Vec<Family> {
    let bytes = encode(telemetry, &[], Form::Protobuf);
    let mut rest = bytes.as_slice();
    let mut families = Vec::new();
    while !rest.is_empty() {
        families.push(Family::decode_length_delimited(&mut rest).unwrap());
    }
    families
}

/// Native buckets of a histogram as a reader rebuilds them: index and count.
fn native(histogram: &Histogram) -> Vec<(i32, i64)> {
    read(&Buckets { spans: histogram.spans.clone(), deltas: histogram.deltas.clone() })
}

fn read(buckets: &Buckets) -> Vec<(i32, i64)> {
    let (mut read, mut index, mut count) = (Vec::new(), 0_i32, 0_i64);
    let mut deltas = buckets.deltas.iter();
    for span in &buckets.spans {
        index += span.offset;
        for delta in deltas.by_ref().take(span.length as usize) {
            count += delta;
            read.push((index, count));
            index += 1;
        }
    }
    assert!(deltas.next().is_none(), "every delta is of a span");
    read
}

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
    telemetry.event(tulle_mesh::counted_event::PolicyDenied::DenyRule);
    SectionCounts::new("shop/web", 1).count(&telemetry.rules, Reason::DenyRule(0), true);
    let text = text(&telemetry);
    for expected in [
        format!("tulle_requests_total{{{LABELS},status=\"2xx\"}} 1\n"),
        format!("tulle_requests_total{{{LABELS},status=\"grpc_error\"}} 1\n"),
        format!("tulle_requests_total{{{LABELS},status=\"none\"}} 1\n"),
        format!("tulle_failures_total{{{LABELS},reason=\"UpstreamNone\"}} 1\n"),
        "# TYPE tulle_request_duration_seconds histogram\n".to_owned(),
        format!("tulle_request_duration_seconds_bucket{{{LABELS},le=\"0.001\"}} 0\n"),
        format!("tulle_request_duration_seconds_bucket{{{LABELS},le=\"0.0025\"}} 2\n"),
        format!("tulle_request_duration_seconds_bucket{{{LABELS},le=\"0.5\"}} 2\n"),
        format!("tulle_request_duration_seconds_bucket{{{LABELS},le=\"1\"}} 3\n"),
        format!("tulle_request_duration_seconds_bucket{{{LABELS},le=\"+Inf\"}} 3\n"),
        format!("tulle_request_duration_seconds_count{{{LABELS}}} 3\n"),
        format!("tulle_request_duration_seconds_sum{{{LABELS}}} 0.704\n"),
        format!("tulle_sent_bytes_total{{{LABELS}}} 10\n"),
        "tulle_ejected_endpoints{destination_namespace=\"shop\",destination_service=\"web\"} 2\n".to_owned(),
        "tulle_events_total{kind=\"policy_denied\",reason=\"DenyRule\"} 1\n".to_owned(),
        format!("tulle_policy_verdicts_total{{{RULE},verdict=\"denied\"}} 0\n"),
        format!("tulle_policy_verdicts_total{{{RULE},verdict=\"would_deny\"}} 1\n"),
    ] {
        assert!(text.contains(&expected), "{expected} is not in\n{text}");
    }
}

#[test]
fn routes_and_mtls_are_no_labels_and_their_counts_are_added_up() {
    let telemetry = Telemetry::default();
    for (route, mtls) in [("", false), ("HTTPRoute/shop/web", true), ("HTTPRoute/shop/web", false)] {
        let route: Arc<str> = route.into();
        let key = SeriesKey::outbound("shop", "web", "abc", "http1");
        let series = telemetry.series(key.of_route(Some(&route)).with_mtls(mtls));
        series.retried(2);
        series.request(&Ok(200), None, Duration::from_millis(2), (10, 20));
    }
    let text = text(&telemetry);
    for expected in [
        format!("tulle_requests_total{{{LABELS},status=\"2xx\"}} 3"),
        format!("tulle_request_duration_seconds_count{{{LABELS}}} 3"),
        format!("tulle_retries_total{{{LABELS}}} 6"),
        format!("tulle_sent_bytes_total{{{LABELS}}} 30"),
    ] {
        assert_eq!(text.matches(&expected).count(), 1, "{expected} is not once in\n{text}");
    }
}

#[test]
fn more_peers_than_the_table_holds_become_one_series() {
    let telemetry = Telemetry::default();
    for number in 0..MAX_SERIES + 500 {
        telemetry.outbound("shop", &format!("s{number}"), "", "http1").request(
            &Ok(200),
            None,
            Duration::ZERO,
            (0, 0),
        );
    }
    assert_eq!(telemetry.all().len(), MAX_SERIES + 1);
}

#[test]
fn both_forms_have_the_same_families_and_each_distribution_is_one_metric_of_protobuf() {
    let telemetry = Telemetry::default();
    for service in ["web", "api"] {
        let series = telemetry.outbound("shop", service, "abc", "http1");
        for micros in [0, 65, 900, 900, 2_000, 40_000, 70_000_000, 400_000_000] {
            series.request(&Ok(200), None, Duration::from_micros(micros), (1, 1));
        }
    }
    // A connection has no duration.
    telemetry.outbound("shop", "db", "abc", "opaque").connection(None, (1, 1));
    let (text, families) = (text(&telemetry), protobuf(&telemetry));
    let of_text: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
    let kinds = ["counter", "gauge", "", "", "histogram"];
    let kind = |family: &Family| kinds[usize::try_from(family.kind.unwrap()).unwrap()];
    let of_protobuf: Vec<_> = families.iter().map(|f| format!("{} {}", f.name, kind(f))).collect();
    assert_eq!(of_text, of_protobuf);

    let durations = families.iter().find(|family| family.name == "tulle_request_duration_seconds").unwrap();
    assert_eq!(durations.metrics.len(), 2);
    for metric in &durations.metrics {
        let histogram = metric.histogram.as_ref().unwrap();
        let service = &metric.labels[2].value;
        let count = text.lines().find(|line| {
            line.starts_with("tulle_request_duration_seconds_count{")
                && line.contains(&format!("destination_service=\"{service}\""))
        });
        assert_eq!(count.unwrap().rsplit(' ').next().unwrap(), histogram.count.to_string());
        let native: i64 = native(histogram).iter().map(|(_, count)| *count).sum();
        // Prometheus refuses a histogram whose buckets and count disagree.
        assert_eq!(u64::try_from(native).unwrap() + histogram.zero_count, histogram.count);
        assert_eq!(histogram.zero_count, 2, "0 and 65 µs are in the first bucket");
        assert_eq!(histogram.classic.len(), CLASSIC.len());
    }
}

#[test]
fn the_sidecars_buckets_are_two_native_ones_each_to_half_a_per_cent() {
    for bucket in 0..BUCKETS {
        let index = FIRST + 2 * i32::try_from(bucket).unwrap();
        let (native, own) = ((f64::from(index) / 16.0).exp2(), upper_bound_micros(bucket) / 1e6);
        assert!((native / own - 1.0).abs() < 0.005, "bucket {bucket}: {native} s for {own} s");
    }
}

#[test]
fn runs_of_buckets_become_spans_and_gaps_their_offsets() {
    let buckets = Buckets::new([(-3, 2), (-2, 5), (-1, 0), (4, 1)]);
    let spans = [Span { offset: -3, length: 2 }, Span { offset: 5, length: 1 }];
    assert_eq!(buckets.spans, spans);
    assert_eq!(buckets.deltas, [2, 3, -4]);
    assert_eq!(Buckets::new([(0, 0)]), Buckets::default());
}

#[test]
fn native_histograms_have_the_field_numbers_of_prometheus() {
    let telemetry = Telemetry::default();
    let series = telemetry.outbound("shop", "web", "abc", "http1");
    for micros in [10, 2_000] {
        series.request(&Ok(200), None, Duration::from_micros(micros), (0, 0));
    }
    let families = protobuf(&telemetry);
    let histogram = families[1].metrics[0].histogram.clone().unwrap();
    let bytes = Histogram { classic: Vec::new(), ..histogram }.encode_to_vec();
    // Number and wire type: count, sum, schema, zero threshold, zero count, one span (number 12), its delta (13).
    let expected = [(0, 0x08), (2, 0x11), (11, 0x28), (13, 0x31), (22, 0x38), (24, 0x62)];
    for (at, key) in expected {
        assert_eq!(bytes[at], key, "at {at} of {bytes:02x?}");
    }
    assert_eq!(bytes[12], 8, "schema 4, zigzag");
    assert!(bytes.ends_with(&[0x6a, 0x01, 0x02]), "one delta of 1: {bytes:02x?}");
}

proptest! {
    #[test]
    fn spans_and_deltas_say_what_was_counted(counts in proptest::collection::btree_map(-300i32..200, 0u64..1_000, 0..60)) {
        let expected: Vec<(i32, i64)> =
            counts.iter().filter(|(_, count)| **count > 0).map(|(index, count)| (*index, *count as i64)).collect();
        prop_assert_eq!(read(&Buckets::new(counts)), expected);
    }

    #[test]
    fn no_bucket_shrinks_from_one_scrape_to_the_next(first in proptest::collection::vec(0u64..100_000_000, 1..50), then in proptest::collection::vec(0u64..100_000_000, 1..50)) {
        let telemetry = Telemetry::default();
        let series = telemetry.outbound("shop", "web", "", "http1");
        let scrape = |latencies: &[u64]| {
            for micros in latencies {
                series.request(&Ok(200), None, Duration::from_micros(*micros), (0, 0));
            }
            let families = protobuf(&telemetry);
            let histogram = families[1].metrics[0].histogram.clone().unwrap();
            native(&histogram).into_iter().collect::<BTreeMap<i32, i64>>()
        };
        let (before, after) = (scrape(&first), scrape(&then));
        for (index, count) in before {
            prop_assert!(after.get(&index).is_some_and(|later| *later >= count), "bucket {index} shrank");
        }
    }
}

#[test]
fn protobuf_is_for_whoever_prefers_it_by_name() {
    const NATIVE: &str =
        "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited";
    let with = |more: &str| Form::preferred([format!("{NATIVE}{more}").as_str()]);
    // Prometheus 3 with `scrape_native_histograms`, Prometheus 2.42 with its feature flag.
    assert_eq!(
        with(
            ";q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        ),
        Form::Protobuf
    );
    assert_eq!(
        with(",application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5,*/*;q=0.1"),
        Form::Protobuf
    );
    assert_eq!(with(";q=0.3,text/plain;version=0.0.4;q=0.6"), Form::Text, "the other one is preferred");
    assert_eq!(with(";q=0"), Form::Text);
    assert_eq!(Form::preferred(["*/*"]), Form::Text);
    assert_eq!(Form::preferred([]), Form::Text);
    assert_eq!(Form::preferred(["application/vnd.google.protobuf;encoding=text"]), Form::Text);
    assert_eq!(Form::preferred(["text/plain;q=0.5", NATIVE]), Form::Protobuf, "two headers");
}
