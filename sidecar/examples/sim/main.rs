//! How requests share themselves out among servers one of which is slow or fails: the sidecar's balancer beside chance,
//! least requests and plain latency, in a simulation. Pure and seeded: the same table at every run.
//!
//! Ten servers with four workers each serve in 20 ms on average. Each client has a view of its own, as sidecars have.
//! The balancer is the sidecar's own code ([`Backend::pick`]); only servers and time are made up.
//!
//! [`Backend::pick`]: tulle_sidecar::backend::Backend::pick
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a simulation that panics has failed"
)]

mod choosers;
mod world;

use std::process::ExitCode;

use choosers::{Service, Way};
use world::{Fault, Figures, Load, simulate};

/// Requests in one cell of the table. Those of its first tenth are not counted: nobody knows anything yet.
const REQUESTS: usize = 20_000;

/// One line of the table.
struct Case {
    name: &'static str,
    load: Load,
    fault: Fault,
}

const CASES: [Case; 7] = [
    Case { name: "50 clients x 1 rps, one slow", load: Load { clients: 50, rate: 1.0 }, fault: Fault::Slow },
    Case {
        name: "50 clients x 20 rps, one slow",
        load: Load { clients: 50, rate: 20.0 },
        fault: Fault::Slow,
    },
    Case {
        name: "200 clients x 0.1 rps, one slow",
        load: Load { clients: 200, rate: 0.1 },
        fault: Fault::Slow,
    },
    Case { name: "5 clients x 0.2 rps, one slow", load: Load { clients: 5, rate: 0.2 }, fault: Fault::Slow },
    Case {
        name: "50 clients x 1 rps, one fails",
        load: Load { clients: 50, rate: 1.0 },
        fault: Fault::Fails,
    },
    Case {
        name: "50 clients x 20 rps, one fails",
        load: Load { clients: 50, rate: 20.0 },
        fault: Fault::Fails,
    },
    Case {
        name: "50 clients x 20 rps, all well",
        load: Load { clients: 50, rate: 20.0 },
        fault: Fault::None,
    },
];

/// What the table must show: which figure of which line, and the most that it may be.
struct Goal {
    what: &'static str,
    figure: f64,
    most: f64,
}

#[tokio::main(flavor = "current_thread", start_paused = true)]
async fn main() -> ExitCode {
    let service = Service::of_ten().await;
    println!("Share of the bad server (fair: 10 %) and p99 of all requests.\n");
    print!("{:<33}", "");
    for way in Way::ALL {
        print!("{:>19}", way.name());
    }
    println!();
    let mut table = Vec::new();
    for (number, case) in CASES.iter().enumerate() {
        print!("{:<33}", case.name);
        let mut line = Vec::new();
        for way in Way::ALL {
            // The same arrivals and the same work for each.
            fastrand::seed(number as u64 + 1);
            let figures = simulate(case.load, case.fault, way, &service, REQUESTS).await;
            print!("{:>9.1} % {:>5.0} ms", figures.share * 100.0, figures.p99_ms);
            line.push(figures);
        }
        println!();
        table.push(line);
    }
    judge(&table)
}

/// Compares the table with what the balancer is there for.
fn judge(table: &[Vec<Figures>]) -> ExitCode {
    let of = |line: usize, way: Way| table[line][way as usize];
    let goals = [
        Goal { what: "share of the slow server, 1 rps", figure: of(0, Way::Ours).share, most: 0.04 },
        Goal { what: "share of the failing server, 1 rps", figure: of(4, Way::Ours).share, most: 0.05 },
        Goal {
            what: "p99 with reports, of that without",
            figure: of(0, Way::Ours).p99_ms / of(0, Way::OwnView).p99_ms,
            most: 0.6,
        },
        Goal {
            what: "p99 where all are well, of chance",
            figure: of(6, Way::Ours).p99_ms / of(6, Way::Random).p99_ms,
            most: 1.1,
        },
    ];
    println!();
    let mut met = true;
    for Goal { what, figure, most } in goals {
        let verdict = if figure <= most { "met" } else { "missed" };
        println!("{what:<36} {figure:>6.3}  at most {most:.3}  {verdict}");
        met &= figure <= most;
    }
    if met { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
