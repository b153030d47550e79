//! `cargo xtask bench --instructions`: instructions per request of both sidecars in user space, counted by callgrind.
//! Unlike CPU time they do not depend on what else the machine does, so that binaries can be compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::measure::h2load;
use super::proxies::{Product, Programs, ProxyPair};
use super::testbed::Testbed;
use crate::host;
use crate::progress::step;

/// Requests of the two runs whose difference is taken.
const FEW: usize = 1000;
const MANY: usize = 5000;

/// What is sent.
const LOADS: [&str; 4] = ["HTTP/1.1", "HTTP/2", "HTTP/2 POST of 128 bytes", "opaque request and answer"];

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
        let _ = write!(table, "| {load} |");
        for column in &columns {
            let _ = write!(table, " {:.0} |", column.get(row).copied().unwrap_or(0.0));
        }
        table.push('\n');
    }
    print!("{table}");
    Ok(())
}

/// The difference between two runs, so that what happens once (start, handshakes, first use) does not count.
fn count(testbed: &Testbed, programs: &Programs, folder: &Path) -> Result<Vec<f64>> {
    let mut counts = Vec::new();
    for load in LOADS {
        let few = instructions(testbed, programs, folder, load, FEW)?;
        let many = instructions(testbed, programs, folder, load, MANY)?;
        counts.push((many - few) / (MANY - FEW) as f64);
    }
    Ok(counts)
}

/// Instructions of both sidecars from their start to their end, with so many requests in between.
fn instructions(
    testbed: &Testbed,
    programs: &Programs,
    folder: &Path,
    load: &str,
    requests: usize,
) -> Result<f64> {
    let pair = ProxyPair::start(Product::Tulle, testbed, programs)?;
    let at = |(host, port): &(String, u16)| format!("{host}:{port}");
    let (target, http1, post) = match load {
        "HTTP/1.1" => (at(&pair.targets.http1), true, false),
        "HTTP/2" => (at(&pair.targets.http2), false, false),
        "HTTP/2 POST of 128 bytes" => (at(&pair.targets.http2), false, true),
        _ => (at(&pair.targets.opaque), true, false),
    };
    testbed.wait_for(&at(&pair.targets.http1))?;
    let requests = requests.to_string();
    let mut arguments = vec!["-n", &requests, "-c8"];
    arguments.extend(if http1 { ["--h1"] } else { ["-m4"] });
    h2load(testbed, &target, post, &arguments)?;
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
