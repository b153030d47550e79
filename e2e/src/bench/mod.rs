//! `cargo xtask bench`: compares no proxy, Tulle, Envoy and HAProxy.
//!
//! The path is client → outbound proxy → inbound proxy → server, in two network namespaces, with mutual TLS between the
//! proxies. Envoy is configured as in a mesh, HAProxy speaks HTTP/2 between the two, and each proxy has one worker. All get
//! their connections by redirect rules, as in a pod.
//! Compare only figures of the same run: absolute figures depend on the machine and its other load.
//!
//! ```text
//!   testbed namespaces and servers
//!   proxies a pair of proxies: tulle, envoy, haproxy
//!   redirect redirect rules for Envoy and HAProxy
//!   measure load generators and figures
//!   feature requests with rules and policies, traces, telemetry or a tap, compared with requests without
//!   rate the same comparison at a fixed rate, for a tap
//!   instructions instructions per request, counted by callgrind
//!   layout the order of the sidecar's functions, from what callgrind records at rest
//! ```

mod envoy;
mod feature;
mod haproxy;
mod instructions;
pub mod layout;
mod measure;
mod proxies;
mod rate;
mod redirect;
mod testbed;
mod tulle;

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;

use crate::host;
use crate::progress::step;
use feature::{RULES, TAPS, TELEMETRY, TRACES};
use measure::Figures;
use proxies::{Product, ProxyPair};
use testbed::Testbed;

/// Programs that the benchmark needs, and their Debian packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
    ("nginx", "nginx-light"),
    ("haproxy", "haproxy"),
    ("iperf3", "iperf3"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("setpriv", "util-linux"),
    ("pip3", "python3-pip"),
    ("python3", "python3"),
];

/// A row of the table.
struct Row {
    figure: &'static str,
    label: &'static str,
    /// The figure without a proxy is subtracted.
    added: bool,
}

const fn row(figure: &'static str, label: &'static str) -> Row {
    Row { figure, label, added: false }
}

const ROWS: &[Row] = &[
    row("http1_rate", "HTTP/1.1, 1 KiB, 64 connections: requests/s"),
    row("http1_cpu", "HTTP/1.1: CPU s per million requests"),
    row("http2_rate", "HTTP/2, 1 KiB, 16 × 8 streams: requests/s"),
    row("http2_cpu", "HTTP/2: CPU s per million requests"),
    row("post_cpu", "HTTP/2 POST of 128 bytes, as gRPC: CPU s per million"),
    row("opaque_cpu", "opaque request and answer, kept connections: CPU s per million"),
    row("connections", "new opaque connections/s"),
    row("connection_cpu", "new opaque connections: CPU s per million"),
    Row { figure: "p50", label: "at 1,000 requests/s: p50 added, µs", added: true },
    Row { figure: "p99", label: "at 1,000 requests/s: p99 added, µs", added: true },
    row("bulk", "one opaque connection, bulk: GB/s"),
    row("idle", "outbound memory idle, MiB"),
    row("http_idle", "with 1,000 idle HTTP connections, MiB"),
    row("tcp_idle", "with 1,000 idle TCP connections, MiB"),
    row("rested", "a minute after the load ÷ idle"),
    row("start", "exec to first response, ms"),
];

/// What can be measured alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Only {
    /// Tulle with rules and policies, compared with Tulle without them.
    Rules,
    /// Tulle with 1 % of the requests traced, compared with Tulle without traces.
    Traces,
    /// Tulle with telemetry and 1 % of the requests traced, compared with Tulle without either.
    Telemetry,
    /// Tulle with a tap, compared with Tulle without it, at full load and at 10,000 requests/s.
    Taps,
    /// Memory at rest and with idle connections, and the time to the first response.
    Memory,
    /// Requests over HTTP/2.
    Http2,
    /// One opaque connection with as many bytes as it takes.
    Bulk,
}

/// Runs the benchmark and prints its tables; with `only`, one of them. With `instructions`, counts those of this tree's
/// sidecar and of `others` instead.
pub fn run(rounds: Option<usize>, only: Option<Only>, instructions: bool, others: &[PathBuf]) -> Result<()> {
    host::require_root()?;
    host::install_packages(PROGRAMS)?;
    let programs = proxies::Programs::build()?;
    let testbed = Testbed::new()?;
    if instructions {
        return instructions::run(&testbed, &programs, others);
    }
    let mut table = Vec::new();
    let feature = match only {
        Some(Only::Rules) => Some(&RULES),
        Some(Only::Traces) => Some(&TRACES),
        Some(Only::Telemetry) => Some(&TELEMETRY),
        Some(Only::Taps) => Some(&TAPS),
        _ => None,
    };
    if let Some(feature) = feature {
        for round in 1..=rounds.unwrap_or(1) {
            step(&format!("round {round}: Tulle, {}", feature.title));
            let mut pair = ProxyPair::start(Product::Tulle, &testbed, &programs)?;
            table.push((Product::Tulle, testbed.noting(feature.compare(&testbed, &mut pair))?));
        }
        print!("{}", feature.report(|figure| median(&table, Product::Tulle, figure)));
        return Ok(());
    }
    let rounds = rounds.unwrap_or(if only.is_some() { 1 } else { 3 });
    for round in 1..=rounds {
        // Tulle first: its control plane writes the certificates that the others use.
        for product in [Product::Tulle, Product::Envoy, Product::HaProxy, Product::None] {
            step(&format!("round {round} of {rounds}: {}", product.name()));
            let mut pair = ProxyPair::start(product, &testbed, &programs)?;
            let measured = match only {
                Some(Only::Memory) => measure::memory(&testbed, &mut pair),
                Some(Only::Http2) => {
                    reached(&testbed, &pair).and_then(|()| measure::streams(&testbed, &pair))
                }
                Some(Only::Bulk) => reached(&testbed, &pair).and_then(|()| measure::bulk(&testbed, &pair)),
                Some(Only::Rules | Only::Traces | Only::Telemetry | Only::Taps) | None => {
                    measure::all(&testbed, &mut pair)
                }
            };
            let mut figures = testbed.noting(measured)?;
            if product == Product::Tulle && only.is_none() {
                for feature in feature::ALL {
                    figures.extend(testbed.noting(feature.compare(&testbed, &mut pair))?);
                }
            }
            table.push((product, figures));
        }
    }
    print!("{}", report(&table));
    if only.is_some() {
        return Ok(());
    }
    for feature in feature::ALL {
        print!("{}", feature.report(|figure| median(&table, Product::Tulle, figure)));
    }
    Ok(())
}

fn reached(testbed: &Testbed, pair: &ProxyPair<'_>) -> Result<()> {
    testbed.wait_for(&measure::host_and_port(&pair.targets.http1))
}

/// The median of a figure over all rounds.
fn median(table: &[(Product, Figures)], product: Product, figure: &str) -> Option<f64> {
    let of = table.iter().filter(|(of, _)| *of == product);
    let mut values: Vec<f64> = of.filter_map(|(_, figures)| figures.get(figure)).copied().collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn report(table: &[(Product, Figures)]) -> String {
    let median = |product: Product, figure: &str| median(table, product, figure);
    let mut out =
        String::from("\nMedians. CPU is that of both proxies, memory that of the outbound one.\n\n|");
    for product in Product::ALL {
        let _ = write!(out, " | {}", product.name());
    }
    let _ = writeln!(out, " | Tulle ÷ Envoy | Tulle ÷ HAProxy |\n|---|---|---|---|---|---|---|");
    let measured = |row: &&Row| table.iter().any(|(_, figures)| figures.contains_key(row.figure));
    for row in ROWS.iter().filter(measured) {
        let base = if row.added { median(Product::None, row.figure).unwrap_or(0.0) } else { 0.0 };
        let value = |product| match product {
            Product::None => median(product, row.figure).filter(|value| *value > 0.0),
            product => median(product, row.figure).map(|value| value - base),
        };
        let _ = write!(out, "| {}", row.label);
        for product in Product::ALL {
            let _ =
                write!(out, " | {}", value(product).map_or("–".to_owned(), |value| format!("{value:.2}")));
        }
        for other in [Product::Envoy, Product::HaProxy] {
            let ratio = value(Product::Tulle).zip(value(other)).map(|(tulle, other)| tulle / other);
            let _ = write!(out, " | {}", ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}")));
        }
        out.push_str(" |\n");
    }
    out
}
