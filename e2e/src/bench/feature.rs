//! Requests with a feature, compared with the same requests without it: an HTTPRoute of five rules and a MeshPolicy
//! with every section about traffic ([`RULES`]), traces of one request in a hundred ([`TRACES`]), a tap ([`TAPS`]), or
//! telemetry together with these traces ([`TELEMETRY`]).
//!
//! The same pair of sidecars goes on running while the control plane turns the feature on and off, and short loads with
//! and without alternate, so that everything else that the machine does counts for either alike. Whether a sidecar counts
//! requests is fixed at its start: both are started again for each slice of that comparison. Processes differ a little
//! from start to start, and with a start for each slice the standard error includes that. Two pairs that run side by side
//! would add the same difference to every slice.

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
use super::tulle::Telemetry;
use crate::host;

/// What is asked for, with a query to look at: the rule that is looked at last takes it.
pub const PATH: &str = "?page=7";

/// Whether they are on, slice by slice. Either comes as often, and early as often as late: neither a drift nor its
/// change is taken for a difference. One slice of each makes a pair.
const SLICES: [bool; 8] = [false, true, true, false, true, false, false, true];
/// Standard errors within which a difference may be chance: of the t distribution with as many degrees of freedom as there
/// are pairs but one, 95 % on both sides.
const CERTAIN: f64 = 3.2;
/// How many pairs there are.
const PAIRS: f64 = (SLICES.len() / 2) as f64;
/// Duration of a slice of each protocol, in seconds.
const SECONDS: u64 = 3;
/// After a change, everything is in force: what the first request shows is only that the rules are.
const SETTLE: Duration = Duration::from_millis(300);

/// The file that turns traces on.
const TRACES_FILE: &str = "traces";

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
    /// HTTP/1.1 and HTTP/2.
    rows: [Row; 2],
    /// The same at a fixed rate, if it is compared there too.
    fixed_rate: Option<FixedRate>,
    /// Whether sidecars have no telemetry without it, and are started again for each slice.
    is_with_telemetry: bool,
    /// Waits until it is in force, or gone.
    settle: fn(&Testbed, &ProxyPair<'_>, bool) -> Result<()>,
}

/// A row of the table: names of its figures.
pub struct Row {
    /// Label of the row.
    pub label: &'static str,
    /// CPU seconds of both sidecars per million requests without the feature.
    pub without: &'static str,
    /// The same with it.
    pub with: &'static str,
    /// The one divided by the other.
    pub ratio: &'static str,
    /// The standard error of that.
    pub error: &'static str,
}

impl Row {
    /// The figures of a run: means of the slices, their ratio, and its standard error by the differences within the pairs.
    fn summary(&self, slices: &[f64]) -> [(&'static str, f64); 4] {
        let (mut without, mut with) = (0.0, 0.0);
        for (on, cpu) in SLICES.into_iter().zip(slices) {
            *(if on { &mut with } else { &mut without }) += cpu / PAIRS;
        }
        let pairs = SLICES.chunks_exact(2).zip(slices.chunks_exact(2));
        let differences = pairs.map(|(on, cpu)| if on[0] { cpu[0] - cpu[1] } else { cpu[1] - cpu[0] });
        let squares: f64 = differences.map(|difference| (difference - (with - without)).powi(2)).sum();
        let error = (squares / (PAIRS - 1.0) / PAIRS).sqrt() / without;
        [(self.without, without), (self.with, with), (self.ratio, with / without), (self.error, error)]
    }
}

/// Routes and a policy.
pub static RULES: Feature = Feature {
    file: "rules",
    title: "without, and with five rules and all sections of a policy",
    goal: 1.05,
    rows: [
        row("HTTP/1.1", ["http1_cpu_unruled", "http1_cpu_ruled", "http1_ratio_ruled", "http1_error_ruled"]),
        row("HTTP/2", ["http2_cpu_unruled", "http2_cpu_ruled", "http2_ratio_ruled", "http2_error_ruled"]),
    ],
    fixed_rate: None,
    is_with_telemetry: false,
    settle: wait_until_ruled,
};

/// Traces.
pub static TRACES: Feature = Feature {
    file: TRACES_FILE,
    title: "without, and with 1 % of them traced to a collector",
    goal: 1.05,
    rows: [
        row(
            "HTTP/1.1",
            ["http1_cpu_untraced", "http1_cpu_traced", "http1_ratio_traced", "http1_error_traced"],
        ),
        row("HTTP/2", ["http2_cpu_untraced", "http2_cpu_traced", "http2_ratio_traced", "http2_error_traced"]),
    ],
    fixed_rate: None,
    is_with_telemetry: false,
    settle: wait_until_traced,
};

/// Telemetry, and traces.
pub static TELEMETRY: Feature = Feature {
    file: TRACES_FILE,
    title: "without telemetry and traces, and with telemetry and 1 % of them traced to a collector",
    goal: 1.05,
    rows: [
        row(
            "HTTP/1.1",
            ["http1_cpu_uncounted", "http1_cpu_counted", "http1_ratio_counted", "http1_error_counted"],
        ),
        row(
            "HTTP/2",
            ["http2_cpu_uncounted", "http2_cpu_counted", "http2_ratio_counted", "http2_error_counted"],
        ),
    ],
    fixed_rate: None,
    is_with_telemetry: true,
    settle: wait_until_traced,
};

/// A tap.
pub static TAPS: Feature = Feature {
    file: "taps",
    title: "without a tap, and with one that gets 20 requests a second from each sidecar",
    goal: 1.02,
    rows: [
        row(
            "HTTP/1.1",
            ["http1_cpu_untapped", "http1_cpu_tapped", "http1_ratio_tapped", "http1_error_tapped"],
        ),
        row("HTTP/2", ["http2_cpu_untapped", "http2_cpu_tapped", "http2_ratio_tapped", "http2_error_tapped"]),
    ],
    fixed_rate: Some(FixedRate {
        cpu: row(
            rate::LABEL,
            ["rate_cpu_untapped", "rate_cpu_tapped", "rate_ratio_tapped", "rate_error_tapped"],
        ),
        without: Names { sent: "rate_sent_untapped", p99: "rate_p99_untapped" },
        with: Names { sent: "rate_sent_tapped", p99: "rate_p99_tapped" },
    }),
    is_with_telemetry: false,
    settle: wait_until_tapped,
};

const fn row(label: &'static str, [without, with, ratio, error]: [&'static str; 4]) -> Row {
    Row { label, without, with, ratio, error }
}

/// All features, in the order of their tables.
pub static ALL: [&Feature; 4] = [&RULES, &TRACES, &TELEMETRY, &TAPS];

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
    pub fn compare(&self, testbed: &Testbed, pair: &mut ProxyPair<'_>) -> Result<Figures> {
        testbed.wait_for(&host_and_port(&pair.targets.http1))?;
        let mut figures = Figures::new();
        // What is learned and allocated once is not a part of either.
        slice(testbed, pair, 1)?;
        let mut slices = [Vec::new(), Vec::new(), Vec::new()];
        for on in SLICES {
            self.turn(testbed, on)?;
            if self.is_with_telemetry {
                restart(testbed, pair, if on { Telemetry::On } else { Telemetry::Off })?;
            }
            (self.settle)(testbed, pair, on)?;
            for (slices, cpu) in slices.iter_mut().zip(slice(testbed, pair, SECONDS)?) {
                slices.push(cpu);
            }
            if let Some(rate) = &self.fixed_rate {
                let (cpu, found) = rate.measure(testbed, pair, on)?;
                slices[2].push(cpu);
                for (name, value) in found {
                    *figures.entry(name).or_default() += value / PAIRS;
                }
            }
        }
        for (row, slices) in self.table().zip(slices) {
            figures.extend(row.summary(&slices));
        }
        self.turn(testbed, false)?;
        if self.is_with_telemetry {
            restart(testbed, pair, Telemetry::On)?;
        }
        (self.settle)(testbed, pair, false)?;
        Ok(figures)
    }

    /// All rows of its table.
    fn table(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().chain(self.fixed_rate.as_ref().map(|rate| &rate.cpu))
    }

    /// The table; `figure` finds a figure by its name.
    pub fn report(&self, figure: impl Fn(&str) -> Option<f64>) -> String {
        let mut out = format!(
            "\nTulle: CPU s of the pair per million requests, {}\n\n\
             | | without | with | with ÷ without ± standard error | goal |\n|---|---|---|---|---|\n",
            self.title
        );
        let goal = self.goal;
        let compared = self.fixed_rate.as_ref().and_then(|rate| rate.find(&figure));
        for row in self.table() {
            let figures = [row.without, row.with, row.ratio, row.error].map(&figure);
            let [Some(without), Some(with), Some(ratio), Some(error)] = figures else { continue };
            let verdict = match ratio - goal {
                distance if distance.abs() <= CERTAIN * error => ", inconclusive",
                ..=0.0 => "",
                _ => ", missed",
            };
            let is_below_rate =
                row.label == rate::LABEL && compared.as_ref().is_some_and(|rate| !rate.reached());
            let remark = if is_below_rate { ", but that rate was not reached" } else { "" };
            let _ = writeln!(
                out,
                "| {} | {without:.2} | {with:.2} | {ratio:.3} ± {error:.3} | ≤ {goal}{verdict}{remark} |",
                row.label
            );
        }
        if let Some(compared) = compared {
            let _ = writeln!(out, "\n{}", compared.sentence());
        }
        out
    }
}

/// Starts both sidecars again. What the new processes learn and allocate once is not a part of the slice that follows.
fn restart(testbed: &Testbed, pair: &mut ProxyPair<'_>, telemetry: Telemetry) -> Result<()> {
    pair.restart(telemetry)?;
    testbed.wait_for(&host_and_port(&pair.targets.http1))?;
    slice(testbed, pair, 1).map(drop)
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
            "rate_ratio_tapped" => Some(cpu_tapped / 40.0),
            "rate_error_tapped" => Some(0.001),
            "rate_sent_untapped" => Some(10_000.0),
            "rate_sent_tapped" => Some(sent),
            "rate_p99_untapped" | "rate_p99_tapped" => Some(2_000.0),
            _ => None,
        })
    }

    #[test]
    fn the_row_of_the_fixed_rate_has_its_ratio_and_the_sentence_the_share_of_a_core() {
        let report = report_of(9_990.0, 40.4);
        let row = "| HTTP/1.1 at 10,000 requests/s | 40.00 | 40.40 | 1.010 ± 0.001 | ≤ 1.02 |\n\n";
        assert!(report.contains(row), "{report}");
        assert!(report.contains("10000 and 9990 per second were sent"), "{report}");
        assert!(report.contains("use 40.0 % and 40.4 % of a core"), "{report}");
    }

    #[test]
    fn a_tap_that_costs_more_than_its_limit_has_missed_it() {
        assert!(report_of(10_000.0, 41.0).contains("| 1.025 ± 0.001 | ≤ 1.02, missed |"));
    }

    #[test]
    fn a_ratio_that_chance_may_have_brought_to_the_other_side_of_its_limit_is_inconclusive() {
        assert!(report_of(10_000.0, 40.9).contains("| 1.022 ± 0.001 | ≤ 1.02, inconclusive |"));
        assert!(report_of(10_000.0, 40.72).contains("| 1.018 ± 0.001 | ≤ 1.02, inconclusive |"));
    }

    #[test]
    fn the_error_is_the_standard_error_of_the_differences_within_the_pairs() {
        let figures = TAPS.rows[0].summary(&[10.0, 11.0, 15.0, 12.0, 12.0, 11.0, 10.0, 11.0]);
        let [(_, without), (_, with), _, (_, error)] = figures;
        assert_eq!((without, with), (10.75, 12.25));
        // The pairs differ by 1, 3, 1 and 1 where the mean is 1.5: their standard deviation is 1, half of it for four.
        assert!((error - 0.5 / 10.75).abs() < 1e-9, "{error}");
    }

    #[test]
    fn every_feature_has_figures_of_its_own() {
        let rows = ALL.iter().flat_map(|feature| feature.table());
        let mut names: Vec<&str> =
            rows.flat_map(|row| [row.without, row.with, row.ratio, row.error]).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
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
