//! `cargo xtask bench --instructions`: instructions per request of both sidecars in user space, counted by callgrind.
//! Unlike CPU time they do not depend on what else the machine does, so that binaries can be compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::feature::{self, Feature, RULES, TAPS, TRACES};
use super::measure::{h2load, host_and_port, url};
use super::proxies::{Product, Programs, ProxyPair, Targets};
use super::testbed::Testbed;
use super::tulle::Telemetry;
use crate::host;
use crate::progress::step;

/// Requests of the two runs whose difference is taken.
const FEW: usize = 1000;
const MANY: usize = 5000;

/// What is sent.
struct Load {
    label: &'static str,
    target: fn(&Targets) -> &(String, u16),
    http1: bool,
    post: bool,
    /// With this turned on.
    with: Option<&'static Feature>,
    /// Whether requests are counted. A sidecar that is older than the setting counts them in any case.
    telemetry: Telemetry,
}

const HTTP1: Load = Load {
    label: "HTTP/1.1",
    target: |all| &all.http1,
    http1: true,
    post: false,
    with: None,
    telemetry: Telemetry::On,
};
const HTTP2: Load = Load { label: "HTTP/2", target: |all| &all.http2, http1: false, ..HTTP1 };

const LOADS: [Load; 11] = [
    HTTP1,
    Load { label: "HTTP/1.1 without telemetry", telemetry: Telemetry::Off, ..HTTP1 },
    Load { label: "HTTP/1.1 with rules and policies", with: Some(&RULES), ..HTTP1 },
    Load { label: "HTTP/1.1, 1 % traced", with: Some(&TRACES), ..HTTP1 },
    Load { label: "HTTP/1.1 with a tap", with: Some(&TAPS), ..HTTP1 },
    HTTP2,
    Load { label: "HTTP/2 without telemetry", telemetry: Telemetry::Off, ..HTTP2 },
    Load { label: "HTTP/2 with rules and policies", with: Some(&RULES), ..HTTP2 },
    Load { label: "HTTP/2, 1 % traced", with: Some(&TRACES), ..HTTP2 },
    Load { label: "HTTP/2 POST of 128 bytes", post: true, ..HTTP2 },
    Load { label: "opaque request and answer", target: |all| &all.opaque, ..HTTP1 },
];

/// Counts for the sidecar of this tree and for others, and prints a table.
pub fn run(testbed: &Testbed, programs: &Programs, others: &[PathBuf]) -> Result<()> {
    host::install_packages(&[("valgrind", "valgrind")])?;
    let folder = testbed.folder.join("callgrind");
    fs::create_dir_all(&folder)?;
    // The sidecars run as another user.
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777))?;
    let mut columns = Vec::new();
    for sidecar in [&programs.sidecar].into_iter().chain(others) {
        step(&format!("counting instructions of {}", sidecar.display()));
        let programs = programs.with_sidecar(sidecar, &folder);
        columns.push(testbed.noting(count(testbed, &programs, &folder))?);
    }
    let mut table = String::from("\nInstructions per request, both sidecars, user space\n\n| |");
    for sidecar in [&programs.sidecar].into_iter().chain(others) {
        let _ = write!(table, " {} |", sidecar.display());
    }
    let _ = writeln!(table, "\n|---|{}", "---|".repeat(columns.len()));
    for (row, load) in LOADS.iter().enumerate() {
        let _ = write!(table, "| {} |", load.label);
        for column in &columns {
            let count = column.get(row).copied().flatten();
            let _ = write!(table, " {} |", count.map_or("–".to_owned(), |count| format!("{count:.0}")));
        }
        table.push('\n');
    }
    print!("{table}");
    Ok(())
}

/// The difference between two runs, so that what happens once (start, handshakes, first use) does not count. `None`:
/// the sidecar did not serve the load.
fn count(testbed: &Testbed, programs: &Programs, folder: &Path) -> Result<Vec<Option<f64>>> {
    let mut counts = Vec::new();
    for load in &LOADS {
        let per_request = || -> Result<f64> {
            let few = instructions(testbed, programs, folder, load, FEW)?;
            let many = instructions(testbed, programs, folder, load, MANY)?;
            Ok((many - few) / (MANY - FEW) as f64)
        };
        counts.push(match per_request() {
            Ok(count) => Some(count),
            // A sidecar that is older than the feature refuses it.
            Err(error) if load.with.is_some() => {
                eprintln!("{}: {error:#}", load.label);
                None
            }
            Err(error) => return Err(error),
        });
    }
    Ok(counts)
}

/// Instructions of both sidecars from their start to their end, with so many requests in between.
fn instructions(
    testbed: &Testbed,
    programs: &Programs,
    folder: &Path,
    load: &Load,
    requests: usize,
) -> Result<f64> {
    for file in fs::read_dir(folder)? {
        fs::remove_file(file?.path())?;
    }
    // Before the start: how soon the sidecars learn of it would make a difference.
    for feature in feature::ALL {
        feature.turn(testbed, false)?;
    }
    if let Some(feature) = load.with {
        feature.turn(testbed, true)?;
    }
    let pair = ProxyPair::start_with(Product::Tulle, testbed, programs, load.telemetry)?;
    testbed.wait_for(&host_and_port(&pair.targets.http1))?;
    let path = if load.post { "post" } else { feature::PATH };
    let requests = requests.to_string();
    let mut arguments = vec!["-n", &requests, "-c8"];
    arguments.extend(if load.http1 { ["--h1"] } else { ["-m4"] });
    h2load(testbed, &url((load.target)(&pair.targets), path), load.post, &arguments)?;
    pair.terminate()?;
    let mut sum = 0.0;
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        let text = fs::read_to_string(&path)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        let total = total.context("callgrind wrote no totals")?;
        sum += total.trim().parse::<f64>().context("the totals of callgrind are not a number")?;
        fs::remove_file(path)?;
    }
    Ok(sum)
}
