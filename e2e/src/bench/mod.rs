//! `cargo xtask bench`: compares no proxy, Tulle and Envoy.
//!
//! The path is client → outbound proxy → inbound proxy → server, in two network namespaces, with mutual TLS between the
//! proxies. Envoy is configured as in a mesh, and each proxy has one worker. Compare only figures of the same run:
//! absolute figures depend on the machine and its other load.
//!
//! ```text
//!   testbed namespaces, server, load generators
//!   proxies Tulle's pair and Envoy's pair
//! ```

mod proxies;
mod testbed;

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;

use crate::host;
use crate::progress::step;
use proxies::ProxyPair;
use testbed::{Measurement, Testbed};

/// Programs that the benchmark needs, and their Debian packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("wrk", "wrk"),
    ("nginx", "nginx-light"),
    ("iperf3", "iperf3"),
    ("ip", "iproute2"),
    ("setpriv", "util-linux"),
    ("pip3", "python3-pip"),
];

/// Duration of each measurement, in seconds.
const SECONDS: u64 = 8;

/// Runs the benchmark and prints the table.
pub fn run(rounds: usize) -> Result<()> {
    host::require_root()?;
    host::install_packages(PROGRAMS)?;
    let programs = proxies::Programs::build()?;
    let testbed = Testbed::new()?;
    let mut table = Vec::new();
    for round in 1..=rounds {
        step(&format!("round {round} of {rounds}: no proxy"));
        table.push(("none", measure(&testbed, None)?));
        step(&format!("round {round} of {rounds}: Tulle"));
        let tulle = ProxyPair::tulle(&testbed, &programs)?;
        table.push(("Tulle", measure(&testbed, Some(&tulle))?));
        drop(tulle);
        step(&format!("round {round} of {rounds}: Envoy"));
        let envoy = ProxyPair::envoy(&testbed, &programs)?;
        table.push(("Envoy", measure(&testbed, Some(&envoy))?));
    }
    print!("{}", report(&table));
    Ok(())
}

fn measure(testbed: &Testbed, pair: Option<&ProxyPair>) -> Result<Measurement> {
    let target = pair.map_or_else(|| testbed.direct(), ProxyPair::target);
    testbed.wait_for(&target)?;
    std::thread::sleep(Duration::from_secs(2));
    let idle = pair.map_or(0, ProxyPair::rss_kib);
    let before = pair.map_or(0.0, ProxyPair::cpu_seconds);
    let (rps, requests) = testbed.closed_loop(&target, SECONDS)?;
    let cpu = pair.map_or(0.0, ProxyPair::cpu_seconds) - before;
    let (p50, p99) = testbed.open_loop(&target, SECONDS)?;
    let bulk =
        testbed.bulk(&pair.map_or_else(|| testbed.direct_bulk(), ProxyPair::bulk_target), SECONDS / 2)?;
    let per_million = if requests > 0 { cpu * 1e6 / requests as f64 } else { 0.0 };
    Ok(Measurement { rps, cpu_per_million: per_million, p50, p99, bulk, idle_kib: idle / 2 })
}

fn report(table: &[(&str, Measurement)]) -> String {
    let mut out = String::new();
    let mean = |name: &str, value: &dyn Fn(&Measurement) -> f64| {
        let mut values: Vec<f64> = table.iter().filter(|(n, _)| *n == name).map(|(_, m)| value(m)).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let _ = writeln!(out, "\nMedians. CPU is that of both proxies, memory that of one proxy.\n");
    let _ = writeln!(out, "| | none | Tulle | Envoy | Tulle ÷ Envoy |\n|---|---|---|---|---|");
    type Row<'a> = (&'a str, &'a dyn Fn(&Measurement) -> f64, bool);
    let rows: [Row<'_>; 6] = [
        ("HTTP/1.1, 1 KiB, 64 connections: requests/s", &|m| m.rps, false),
        ("CPU seconds per million requests", &|m| m.cpu_per_million, false),
        ("at 1,000 requests/s: p50 added, µs", &|m| m.p50, true),
        ("at 1,000 requests/s: p99 added, µs", &|m| m.p99, true),
        ("opaque TCP, bulk: GB/s", &|m| m.bulk, false),
        ("idle memory of one proxy, MiB", &|m| m.idle_kib as f64 / 1024.0, false),
    ];
    for (name, value, added) in rows {
        let [none, tulle, envoy] = ["none", "Tulle", "Envoy"].map(|which| mean(which, value));
        let base = if added { none } else { 0.0 };
        let ratio = (tulle - base) / (envoy - base);
        let _ =
            writeln!(out, "| {name} | {none:.2} | {:.2} | {:.2} | {ratio:.2} |", tulle - base, envoy - base);
    }
    out
}
