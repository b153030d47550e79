//! Requests with a feature, compared with the same requests without it: an HTTPRoute of five rules and a MeshPolicy
//! with every section about traffic ([`RULES`]), traces of one request in a hundred ([`TRACES`]), or a tap ([`TAPS`]).
//!
//! The same pair of sidecars goes on running while the control plane turns the feature on and off, and short loads with
//! and without alternate, so that everything else that the machine does counts for either alike.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::measure::{Figures, host_and_port, http2, url, with_cpu, wrk};
use super::proxies::ProxyPair;
use super::rate::{self, FixedRate, Names};
use super::testbed::{CLIENT, Testbed};
use crate::host;

/// What is asked for, with a query to look at: the rule that is looked at last takes it.
pub const PATH: &str = "?page=7";

/// Whether they are on, slice by slice. Either comes as often, and early as often as late: neither a drift nor its
/// change is taken for a difference.
const SLICES: [bool; 8] = [false, true, true, false, true, false, false, true];
/// Duration of a slice of each protocol, in seconds.
const SECONDS: u64 = 3;
/// After a change, everything is in force: what the first request shows is only that the rules are.
const SETTLE: Duration = Duration::from_millis(300);

/// A sidecar sends its spans, and what a tap shows, within this time.
const COUNTED_WITHIN: Duration = Duration::from_secs(4);

/// What is turned on and off.
pub struct Feature {
    /// The file that turns it on; the control plane looks for it.
    file: &'static str,
    /// What stands above the table.
    pub title: &'static str,
    /// The most that it may cost.
    goal: f64,
    /// A protocol, and its figures without and with the feature.
    rows: [(&'static str, [&'static str; 2]); 2],
    /// The same at a fixed rate, if it is compared there too.
    fixed_rate: Option<FixedRate>,
    /// Waits until it is in force, or gone.
    settle: fn(&Testbed, &ProxyPair<'_>, bool) -> Result<()>,
}

/// Routes and a policy.
pub static RULES: Feature = Feature {
    file: "rules",
    title: "without, and with five rules and all sections of a policy",
    goal: 1.05,
    rows: [
        ("HTTP/1.1", ["http1_cpu_unruled", "http1_cpu_ruled"]),
        ("HTTP/2", ["http2_cpu_unruled", "http2_cpu_ruled"]),
    ],
    fixed_rate: None,
    settle: wait_until_ruled,
};

/// Traces.
pub static TRACES: Feature = Feature {
    file: "traces",
    title: "without, and with 1 % of them traced to a collector",
    goal: 1.05,
    rows: [
        ("HTTP/1.1", ["http1_cpu_untraced", "http1_cpu_traced"]),
        ("HTTP/2", ["http2_cpu_untraced", "http2_cpu_traced"]),
    ],
    fixed_rate: None,
    settle: wait_until_traced,
};

/// A tap.
pub static TAPS: Feature = Feature {
    file: "taps",
    title: "without a tap, and with one that gets 20 requests a second from each sidecar",
    goal: 1.02,
    rows: [
        ("HTTP/1.1", ["http1_cpu_untapped", "http1_cpu_tapped"]),
        ("HTTP/2", ["http2_cpu_untapped", "http2_cpu_tapped"]),
    ],
    fixed_rate: Some(FixedRate {
        without: Names { cpu: "rate_cpu_untapped", sent: "rate_sent_untapped", p99: "rate_p99_untapped" },
        with: Names { cpu: "rate_cpu_tapped", sent: "rate_sent_tapped", p99: "rate_p99_tapped" },
    }),
    settle: wait_until_tapped,
};

/// All features, in the order of their tables.
pub static ALL: [&Feature; 3] = [&RULES, &TRACES, &TAPS];

impl Feature {
    /// Creates or removes the file that turns it on.
    pub fn turn(&self, testbed: &Testbed, on: bool) -> Result<()> {
        let path = testbed.folder.join(self.file);
        if on {
            fs::write(path, "")?;
            return Ok(());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// CPU seconds of both sidecars per million requests, without and with it, and the figures of the fixed rate.
    pub fn compare(&self, testbed: &Testbed, pair: &ProxyPair<'_>) -> Result<Figures> {
        testbed.wait_for(&host_and_port(&pair.targets.http1))?;
        let mut figures = Figures::new();
        // What is learned and allocated once is not a part of either.
        slice(testbed, pair, 1)?;
        for on in SLICES {
            self.turn(testbed, on)?;
            (self.settle)(testbed, pair, on)?;
            let mut found = Vec::new();
            for ((_, [without, with]), cpu) in self.rows.into_iter().zip(slice(testbed, pair, SECONDS)?) {
                found.push((if on { with } else { without }, cpu));
            }
            if let Some(rate) = &self.fixed_rate {
                let names = if on { &rate.with } else { &rate.without };
                found.extend(names.measure(testbed, pair)?);
            }
            for (name, value) in found {
                *figures.entry(name).or_default() += value / (SLICES.len() as f64 / 2.0);
            }
        }
        self.turn(testbed, false)?;
        (self.settle)(testbed, pair, false)?;
        Ok(figures)
    }

    /// The table; `figure` finds a figure by its name.
    pub fn report(&self, figure: impl Fn(&str) -> Option<f64>) -> String {
        let mut out = format!(
            "\nTulle: CPU s of the pair per million requests, {}\n\n\
             | | without | with | with ÷ without | goal |\n|---|---|---|---|---|\n",
            self.title
        );
        let goal = self.goal;
        let mut row = |label: &str, without: f64, with: f64, remark: &str| {
            let ratio = with / without;
            let verdict = if ratio <= goal { "" } else { ", missed" };
            let _ = writeln!(
                out,
                "| {label} | {without:.2} | {with:.2} | {ratio:.3} | ≤ {goal}{verdict}{remark} |"
            );
        };
        for (label, [without, with]) in self.rows {
            let (Some(without), Some(with)) = (figure(without), figure(with)) else { continue };
            row(label, without, with, "");
        }
        if let Some(compared) = self.fixed_rate.as_ref().and_then(|rate| rate.find(&figure)) {
            let remark = if compared.reached() { "" } else { ", but that rate was not reached" };
            row(rate::LABEL, compared.without.cpu, compared.with.cpu, remark);
            let _ = writeln!(out, "\n{}", compared.sentence());
        }
        out
    }
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
    let url = url(&pair.targets.http1, PATH);
    wait_until("the rules", ruled, || {
        let arguments = ["-sf", "-m", "2", "-o", "/dev/null", "-D", "-", "-H", "x-tester: yes", &url];
        let head = host::output(testbed.inside(CLIENT.0, "curl").args(arguments))?;
        Ok(head.to_ascii_lowercase().contains("x-rule: tester"))
    })
}

/// Waits until the spans of a request that asks for them arrive at the collector, or none.
fn wait_until_traced(testbed: &Testbed, pair: &ProxyPair<'_>, traced: bool) -> Result<()> {
    let header = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    wait_until("the traces", traced, || is_counted(testbed, pair, "spans", header))
}

/// Waits until the tap shows a request, or none.
fn wait_until_tapped(testbed: &Testbed, pair: &ProxyPair<'_>, tapped: bool) -> Result<()> {
    wait_until("the tap", tapped, || is_counted(testbed, pair, "tapped", "x-tester: no"))
}

/// Whether the number in a file of the control plane grows with a request.
fn is_counted(testbed: &Testbed, pair: &ProxyPair<'_>, file: &str, header: &str) -> Result<bool> {
    let url = url(&pair.targets.http1, PATH);
    let file = testbed.folder.join(file);
    let count = || fs::read_to_string(&file).unwrap_or_default();
    let before = count();
    let arguments = ["-sf", "-m", "2", "-o", "/dev/null", "-H", header, &url];
    host::output(testbed.inside(CLIENT.0, "curl").args(arguments))?;
    let start = Instant::now();
    while start.elapsed() < COUNTED_WITHIN {
        if count() != before {
            return Ok(true);
        }
        sleep(Duration::from_millis(50));
    }
    Ok(false)
}

fn wait_until(what: &str, on: bool, is_on: impl Fn() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(20) {
        if is_on()? == on {
            sleep(SETTLE);
            return Ok(());
        }
        sleep(Duration::from_millis(50));
    }
    let state = if on { "in force" } else { "gone" };
    bail!(
        "after 20 s {what} are not {state} at the outbound sidecar; see the logs of tulle-bench and the sidecars"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The report of a tap that was measured at the fixed rate alone.
    fn report_of(sent: f64, cpu_tapped: f64) -> String {
        TAPS.report(|name| match name {
            "rate_cpu_untapped" => Some(40.0),
            "rate_cpu_tapped" => Some(cpu_tapped),
            "rate_sent_untapped" => Some(10_000.0),
            "rate_sent_tapped" => Some(sent),
            "rate_p99_untapped" | "rate_p99_tapped" => Some(2_000.0),
            _ => None,
        })
    }

    #[test]
    fn the_row_of_the_fixed_rate_has_its_ratio_and_the_sentence_the_share_of_a_core() {
        let report = report_of(9_990.0, 40.4);
        let row = "| HTTP/1.1 at 10,000 requests/s | 40.00 | 40.40 | 1.010 | ≤ 1.02 |\n\n";
        assert!(report.contains(row), "{report}");
        assert!(report.contains("10000 and 9990 per second were sent"), "{report}");
        assert!(report.contains("use 40.0 % and 40.4 % of a core"), "{report}");
    }

    #[test]
    fn a_tap_that_costs_more_than_its_limit_has_missed_it() {
        assert!(report_of(10_000.0, 41.0).contains("| 1.025 | ≤ 1.02, missed |"));
    }

    #[test]
    fn a_rate_that_was_not_reached_is_reported_beside_the_goal() {
        assert!(report_of(9_000.0, 40.4).contains("≤ 1.02, but that rate was not reached |"));
    }

    #[test]
    fn without_figures_there_is_no_row() {
        assert!(TAPS.report(|_| None).ends_with("|---|---|---|---|---|\n"));
    }
}
