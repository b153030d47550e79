//! Ten thousand sidecars that report ten series each, every five seconds, at 20 requests a second.

use std::time::Duration;

use prost::Message as _;
use tulle_mesh::histogram::Histogram;
use tulle_mesh::proto::{SeriesCounts, SeriesKey, TelemetryReport, series_key};
use tulle_operator::telemetry::history::{Counts, Direction, MAX_SERIES, Reporter, SeriesId};
use tulle_operator::telemetry::{Aggregates, Taken};

const SIDECARS: u32 = 10_000;
const SERIES: u32 = 10;
/// Each with 20 pods: so there are as many series as the history keeps.
const WORKLOADS: u32 = 500;
/// Requests of a series between two reports: 20 a second.
const REQUESTS: u64 = 100;
const INTERVAL: i64 = 5;
/// Reports of each sidecar that are measured: those of a minute.
const ROUNDS: u32 = 12;
/// The time at which the measurement begins, in Unix seconds.
const START: i64 = 1_800_000_000;
/// How long the history reaches back.
const HISTORY: i64 = 21_600;

/// What was measured.
pub struct Measured {
    /// Time on a core.
    pub cpu: Duration,
    /// Time that was simulated.
    pub time: Duration,
    /// Bytes of all reports.
    pub bytes: usize,
    /// Bytes of the slots of a series.
    pub bytes_of_a_series: f64,
    /// Keeps what is in memory, until that is measured too.
    pub _aggregates: Aggregates,
}

/// Latencies as they are found: log-normal, a p99 of four times the p50. `seed` makes one sample differ from another.
fn latencies(requests: u64, seed: &mut u64) -> Histogram {
    let mut uniform = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 11) as f64 / (1_u64 << 53) as f64
    };
    let mut histogram = Histogram::default();
    for _ in 0..requests {
        let normal = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        histogram.record((5_000.0 * (0.6 * normal).exp()) as u64);
    }
    histogram
}

fn counts(requests: u64, seed: &mut u64) -> Counts {
    Counts {
        classes: [0, requests - requests / 50, 0, requests / 100, requests / 50 - requests / 100, 0, 0, 0],
        latency: latencies(requests, seed),
        bytes_up: requests * 200,
        bytes_down: requests * 2_000,
        ..Counts::default()
    }
}

/// The same latencies, so many times.
fn times(counts: &Counts, factor: u64) -> Counts {
    let mut latency = Histogram::default();
    counts.latency.buckets().for_each(|(bucket, count)| latency.add(bucket, count * factor));
    latency.add_sum(counts.latency.sum_micros() * factor);
    Counts {
        classes: counts.classes.map(|class| class * factor),
        latency,
        bytes_up: counts.bytes_up * factor,
        bytes_down: counts.bytes_down * factor,
        ..Counts::default()
    }
}

fn reporter(workload: u32) -> Reporter {
    let workload = format!("service-{workload}").into();
    Reporter { namespace: "shop".into(), kind: "Deployment".into(), workload }
}

fn id(workload: u32, series: u32) -> SeriesId {
    SeriesId {
        namespace: "shop".into(),
        peer: format!("service-{series}").into(),
        revision: "6b8f9c5d4".into(),
        protocol: "http1".into(),
        ..SeriesId::other(reporter(workload), Direction::Outbound, true)
    }
}

fn key(series: u32) -> SeriesKey {
    SeriesKey {
        id: series,
        direction: series_key::Direction::Outbound.into(),
        namespace: "shop".into(),
        peer: format!("service-{series}"),
        revision: "6b8f9c5d4".into(),
        protocol: "http1".into(),
        mtls: true,
        ..SeriesKey::default()
    }
}

/// Six hours of what all pods of each workload report; `sample` is that of one interval.
fn fill(aggregates: &Aggregates, sample: &Counts) {
    let mut history = aggregates.history();
    let mut time = START - HISTORY;
    while time < START {
        // Slots of the length that they have at the end.
        let step = match START - time {
            3_601.. => 300,
            601.. => 60,
            _ => 10,
        };
        let sum = times(sample, u64::try_from(step / INTERVAL).unwrap());
        for workload in 0..WORKLOADS {
            (0..SERIES).for_each(|series| history.add(id(workload, series), &sum, time));
        }
        time += step;
    }
    assert_eq!(history.series(), MAX_SERIES);
}

/// Reports of all sidecars, as they arrive.
fn reports(round: u32, samples: &[SeriesCounts]) -> Vec<Vec<u8>> {
    let report = |sidecar: u32| {
        let sample = |series: u32| samples.get((sidecar + series + round) as usize % samples.len()).unwrap();
        let series = (0..SERIES).map(|series| SeriesCounts { key: series, ..sample(series).clone() });
        TelemetryReport {
            sequence: u64::from(round) + 1,
            process: u64::from(sidecar),
            // Named once.
            keys: if round == 0 { (0..SERIES).map(key).collect() } else { Vec::new() },
            series: series.collect(),
            interval_ms: 5_000,
            ..TelemetryReport::default()
        }
    };
    (0..SIDECARS).map(|sidecar| report(sidecar).encode_to_vec()).collect()
}

/// Measures it. `cpu` is the time that this process has had on cores.
pub fn measure(cpu: impl Fn() -> Duration) -> Measured {
    let mut seed = 1;
    let samples: Vec<SeriesCounts> = (0..101).map(|_| counts(REQUESTS, &mut seed).to_proto()).collect();
    let aggregates = Aggregates::default();
    let pods = u64::from(SIDECARS / WORKLOADS);
    fill(&aggregates, &counts(REQUESTS * pods, &mut seed));
    let senders: Vec<(String, Reporter)> = (0..SIDECARS)
        .map(|sidecar| (format!("0fd1c2a4-5b7e-4c0e-9d7b-{sidecar:012}"), reporter(sidecar % WORKLOADS)))
        .collect();
    let (mut used, mut bytes) = (Duration::ZERO, 0);
    for round in 0..ROUNDS {
        let reports = reports(round, &samples);
        bytes += reports.iter().map(Vec::len).sum::<usize>();
        let before = cpu();
        for (report, (uid, reporter)) in reports.iter().zip(&senders) {
            let report = TelemetryReport::decode(report.as_slice()).unwrap();
            let now = START + i64::from(round) * INTERVAL;
            let taken = aggregates.add_at(uid, Some(reporter.clone()), &report, now);
            assert_eq!(taken, Taken::Counted);
        }
        used += cpu() - before;
    }
    let bytes_of_a_series = aggregates.history().heap() as f64 / MAX_SERIES as f64;
    let time = Duration::from_secs(u64::from(ROUNDS) * INTERVAL.unsigned_abs());
    Measured { cpu: used, time, bytes, bytes_of_a_series, _aggregates: aggregates }
}
