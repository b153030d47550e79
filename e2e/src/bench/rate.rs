//! Requests at a fixed rate, with and without a feature.
//!
//! A tap has a cost per second, because it shows a fixed number of requests. At full load that cost is divided by as many
//! requests as the machine can serve, so its share is smaller than at the rate for which the goal is stated.

use anyhow::Result;

use super::feature::Row;
use super::measure::{host_and_port, open_loop};
use super::proxies::ProxyPair;
use super::testbed::Testbed;

/// Requests per second. The load generator, which is not optimised, uses half of a core for them.
const RATE: u64 = 10_000;
/// Label of the row.
pub const LABEL: &str = "HTTP/1.1 at 10,000 requests/s";
/// Duration of a slice, in seconds. CPU is counted in hundredths of a second: over all slices of a state that is an
/// error of about two thousandths.
const SECONDS: u64 = 6;
/// The least part of the rate that must have been sent. If less was sent, the load generator or the machine is too slow.
const REACHED: f64 = 0.99;

/// Names of the figures without and with the feature.
pub struct FixedRate {
    /// Row of the CPU.
    pub cpu: Row,
    /// Without it.
    pub without: Names,
    /// With it.
    pub with: Names,
}

/// Names of the figures of one state.
pub struct Names {
    /// Requests that were sent per second.
    pub sent: &'static str,
    /// Their p99 in microseconds.
    pub p99: &'static str,
}

/// CPU seconds of both sidecars per million requests in a slice, and its other figures.
type Slice = (f64, [(&'static str, f64); 2]);

/// Figures of one state.
struct State {
    cpu: f64,
    sent: f64,
    p99: f64,
}

/// Figures of both states.
pub struct Compared {
    without: State,
    with: State,
}

impl FixedRate {
    /// One slice: CPU seconds of both sidecars per million requests, and the other figures of this state.
    pub fn measure(&self, testbed: &Testbed, pair: &ProxyPair<'_>, on: bool) -> Result<Slice> {
        let before = pair.cpu_seconds();
        let load = open_loop(testbed, &host_and_port(&pair.targets.http1), RATE, SECONDS)?;
        let cpu = (pair.cpu_seconds() - before) * 1e6 / load.sent;
        let names = if on { &self.with } else { &self.without };
        Ok((cpu, [(names.sent, load.sent / SECONDS as f64), (names.p99, load.p99)]))
    }

    /// The figures of both states, if they were measured; `figure` finds a figure by its name.
    pub fn find(&self, figure: impl Fn(&str) -> Option<f64>) -> Option<Compared> {
        let state = |cpu, names: &Names| {
            Some(State { cpu: figure(cpu)?, sent: figure(names.sent)?, p99: figure(names.p99)? })
        };
        let without = state(self.cpu.without, &self.without)?;
        Some(Compared { without, with: state(self.cpu.with, &self.with)? })
    }
}

impl State {
    /// CPU of both sidecars in percent of a core.
    fn of_a_core(&self) -> f64 {
        self.cpu * self.sent / 1e4
    }
}

impl Compared {
    /// Whether the rate was really sent in both states.
    pub fn reached(&self) -> bool {
        self.without.sent.min(self.with.sent) >= REACHED * RATE as f64
    }

    /// The sentence below the table.
    pub fn sentence(&self) -> String {
        let Self { without, with } = self;
        format!(
            "At {RATE} requests/s, without and with: {:.0} and {:.0} per second were sent, and all were answered with \
             success; both sidecars together use {:.1} % and {:.1} % of a core; p99 is {:.0} µs and {:.0} µs (mean of \
             the slices).",
            without.sent,
            with.sent,
            without.of_a_core(),
            with.of_a_core(),
            without.p99,
            with.p99
        )
    }
}
