//! `cargo xtask`: the embedded cluster, the demo, the tests and the benchmark. See `--help`.

mod cluster;
mod host;
mod images;
mod kubectl;
mod progress;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tries and measures Tulle.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A real Kubernetes on this machine, in namespaces of its own.
    #[command(subcommand)]
    Cluster(cluster::Command),
}

fn main() -> ExitCode {
    progress::start();
    let done = match Arguments::parse().command {
        Command::Cluster(command) => cluster::run(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
