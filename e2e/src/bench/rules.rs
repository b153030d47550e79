//! Requests at a port with an HTTPRoute of five rules and a MeshPolicy with every section about traffic, compared with
//! the same requests without either.
//!
//! The same pair of sidecars goes on running while the control plane turns both on and off, and short loads with and
//! without alternate, so that everything else that the machine does counts for either alike.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::measure::{Figures, host_and_port, http2, url, with_cpu, wrk};
use super::proxies::ProxyPair;
use super::testbed::{CLIENT, Testbed};
use crate::host;

/// What is asked for, with a query to look at: the rule that is looked at last takes it.
pub const PATH: &str = "?page=7";

/// The file that turns rules and policy on; the control plane looks for it.
const SWITCH: &str = "rules";
/// Whether they are on, slice by slice. Either comes as often, and early as often as late: neither a drift nor its
/// change is taken for a difference.
const SLICES: [bool; 8] = [false, true, true, false, true, false, false, true];
/// Duration of a slice of each protocol, in seconds.
const SECONDS: u64 = 3;
/// After a change, everything is in force: what the first request shows is only that the rules are.
const SETTLE: Duration = Duration::from_millis(300);

/// The most that it may cost.
const GOAL: f64 = 1.05;

/// A protocol, and its figures without and with rules.
const ROWS: [(&str, [&str; 2]); 2] = [
    ("HTTP/1.1", ["http1_cpu_unruled", "http1_cpu_ruled"]),
    ("HTTP/2", ["http2_cpu_unruled", "http2_cpu_ruled"]),
];

/// Creates or removes the file that turns rules and policy on.
pub fn turn(testbed: &Testbed, on: bool) -> Result<()> {
    let path = testbed.folder.join(SWITCH);
    if on {
        fs::write(path, "")?;
        return Ok(());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// CPU seconds of both sidecars per million requests, without and with rules and policy.
pub fn compare(testbed: &Testbed, pair: &ProxyPair<'_>) -> Result<Figures> {
    testbed.wait_for(&host_and_port(&pair.targets.http1))?;
    let mut figures = Figures::new();
    // What is learned and allocated once is not a part of either.
    slice(testbed, pair, 1)?;
    for ruled in SLICES {
        turn(testbed, ruled)?;
        wait_until_ruled(testbed, pair, ruled)?;
        let found = slice(testbed, pair, SECONDS)?;
        for ((_, names), cpu) in ROWS.into_iter().zip(found) {
            let [unruled, with_rules] = names;
            let name = if ruled { with_rules } else { unruled };
            *figures.entry(name).or_default() += cpu / (SLICES.len() as f64 / 2.0);
        }
    }
    turn(testbed, false)?;
    wait_until_ruled(testbed, pair, false)?;
    Ok(figures)
}

/// CPU seconds per million requests of each protocol.
fn slice(testbed: &Testbed, pair: &ProxyPair<'_>, seconds: u64) -> Result<[f64; 2]> {
    let (first, second) = (url(&pair.targets.http1, PATH), url(&pair.targets.http2, PATH));
    let (_, http1_cpu) = with_cpu(pair, || wrk(testbed, &first, &[], seconds))?;
    let (_, http2_cpu) = with_cpu(pair, || http2(testbed, &second, false, seconds))?;
    Ok([http1_cpu, http2_cpu])
}

/// Waits until the outbound sidecar applies the rules, or none.
fn wait_until_ruled(testbed: &Testbed, pair: &ProxyPair<'_>, ruled: bool) -> Result<()> {
    let start = Instant::now();
    let url = url(&pair.targets.http1, PATH);
    while start.elapsed() < Duration::from_secs(10) {
        let arguments = ["-sf", "-m", "2", "-o", "/dev/null", "-D", "-", "-H", "x-tester: yes", &url];
        let head = host::output(testbed.inside(CLIENT.0, "curl").args(arguments))?;
        if head.to_ascii_lowercase().contains("x-rule: tester") == ruled {
            sleep(SETTLE);
            return Ok(());
        }
        sleep(Duration::from_millis(50));
    }
    let state = if ruled { "in force" } else { "gone" };
    bail!(
        "after 10 s the rules are not {state} at the outbound sidecar; see the logs of tulle-bench and the sidecars"
    )
}

/// The table; `figure` finds a figure by its name.
pub fn report(figure: impl Fn(&str) -> Option<f64>) -> String {
    let mut out = String::from(
        "\nTulle: CPU s of the pair per million requests, without, and with five rules and all sections of a policy\n\n\
         | | without | with | with ÷ without | goal |\n|---|---|---|---|---|\n",
    );
    for (label, [unruled, ruled]) in ROWS {
        let (Some(unruled), Some(ruled)) = (figure(unruled), figure(ruled)) else { continue };
        let ratio = ruled / unruled;
        let verdict = if ratio <= GOAL { "" } else { ", missed" };
        let _ = writeln!(out, "| {label} | {unruled:.2} | {ruled:.2} | {ratio:.3} | ≤ {GOAL}{verdict} |");
    }
    out
}
