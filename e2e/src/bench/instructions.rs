//! `cargo xtask bench --instructions`: instructions per request of both sidecars in user space, counted by callgrind.
//! Unlike CPU time they do not depend on what else the machine does, so that binaries can be compared.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::measure::{h2load, wrk};
use super::proxies::{Product, Programs, ProxyPair};
use super::testbed::Testbed;
use crate::host;
use crate::progress::step;

/// Duration of each load in seconds: callgrind slows a program down fifty times.
const SECONDS: u64 = 8;

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
        let pair = ProxyPair::start(Product::Tulle, testbed, &programs)?;
        columns.push(testbed.noting(count(testbed, &pair, &folder))?);
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

fn count(testbed: &Testbed, pair: &ProxyPair<'_>, folder: &Path) -> Result<Vec<f64>> {
    let at = |(host, port): &(String, u16)| format!("{host}:{port}");
    let targets = &pair.targets;
    testbed.wait_for(&at(&targets.http1))?;
    let mut counts = Vec::new();
    for load in LOADS {
        let send = || match load {
            "HTTP/1.1" => wrk(testbed, &at(&targets.http1), &[], SECONDS),
            "HTTP/2" => h2load(testbed, &at(&targets.http2), false, SECONDS),
            "HTTP/2 POST of 128 bytes" => h2load(testbed, &at(&targets.http2), true, SECONDS),
            _ => wrk(testbed, &at(&targets.opaque), &[], SECONDS),
        };
        // Once before, so that connections are open and everything has been used.
        send()?;
        control(pair, "instrumentation on")?;
        let (_, requests) = send()?;
        control(pair, "dump")?;
        control(pair, "instrumentation off")?;
        counts.push(dumped(folder)? / requests);
    }
    Ok(counts)
}

fn control(pair: &ProxyPair<'_>, command: &str) -> Result<()> {
    for pid in pair.processes() {
        let mut vgdb = Command::new("vgdb");
        vgdb.arg(format!("--pid={pid}")).args(["--wait=10", "--max-invoke-ms=100"]);
        host::output(vgdb.args(command.split(' ')))?;
    }
    Ok(())
}

/// Instructions in the dumps of all processes, which are removed.
fn dumped(folder: &Path) -> Result<f64> {
    let (mut instructions, mut dumps) = (0.0, 0);
    for file in fs::read_dir(folder)? {
        let path = file?.path();
        let text = fs::read_to_string(&path)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        if let Some(total) = total {
            instructions += total.trim().parse::<f64>().context("callgrind's totals are no number")?;
            dumps += 1;
        }
        fs::remove_file(path)?;
    }
    ensure!(dumps >= 2, "callgrind has written {dumps} dumps of two sidecars");
    Ok(instructions)
}
