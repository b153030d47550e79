//! `cargo xtask`: the embedded cluster, the demo, the tests and the benchmark. See `--help`.
#![allow(
    clippy::indexing_slicing,
    reason = "indexing JSON of kubectl returns null for an absent field, and a panic fails only one test"
)]

mod archive;
mod bench;
mod book;
mod build;
#[cfg(test)]
mod chart;
mod cli;
mod cluster;
mod collector;
mod conformance;
mod demo;
mod earlier;
mod fuzz;
mod gateway;
mod host;
mod images;
mod install;
mod kubectl;
mod progress;
mod publish;
mod suites;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, demonstrates, tests and measures Tulle.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Manages the embedded cluster: Kubernetes on this machine, in its own Linux namespaces.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Installs Tulle and the sample shop on a cluster, and shows injection, mTLS, a policy, a route, retries, a breaker,
    /// two rollouts, and what `tulle` shows of them.
    Demo {
        /// `embedded`, or `context:NAME` of KUBECONFIG.
        #[arg(long, default_value = "embedded")]
        cluster: String,
        /// Leaves the cluster running.
        #[arg(long)]
        keep: bool,
    },
    /// Runs the tests: all suites, or one.
    Test {
        /// workspace, node, lifecycle, updates, rollouts, skew, admission, control, mesh, routes, seeing, browser,
        /// prometheus, resilience, talk, applications, framing, conformance, operations, helm, setup, downgrade or
        /// faults.
        suite: Option<String>,
        /// Runs only tests whose sentence contains this text.
        #[arg(long)]
        only: Option<String>,
        /// `embedded`, or `context:NAME` of KUBECONFIG.
        #[arg(long, default_value = "embedded")]
        cluster: String,
        /// Leaves the cluster running.
        #[arg(long)]
        keep: bool,
        /// How many tests run in parallel.
        #[arg(long)]
        jobs: Option<usize>,
    },
    /// Runs the official conformance suite of the Gateway API against Tulle: profiles MESH-HTTP and MESH-GRPC with all
    /// extended features. Fails if a test of a mesh failed or was skipped.
    Conformance {
        /// `embedded`, or `context:NAME` of KUBECONFIG.
        #[arg(long, default_value = "embedded")]
        cluster: String,
        /// Writes the suite's report into the clone (e2e/conformance/report.yaml), unchanged.
        #[arg(long)]
        update: bool,
        /// Leaves the cluster running.
        #[arg(long)]
        keep: bool,
    },
    /// Compares no proxy, Tulle, Envoy and HAProxy.
    Bench {
        /// Number of rounds; the medians are printed. 3, or 1 with --only.
        #[arg(long)]
        rounds: Option<usize>,
        /// Measures only this, in one to three minutes.
        #[arg(long, conflicts_with = "instructions")]
        only: Option<bench::Only>,
        /// Counts the sidecars' instructions per request instead, which other load on the machine does not change.
        #[arg(long)]
        instructions: bool,
        /// Another sidecar program to count beside this tree's.
        #[arg(long, requires = "instructions")]
        sidecar: Vec<PathBuf>,
        /// Writes sidecar/at-rest.ld instead, which puts together the functions that run in a sidecar at rest.
        #[arg(long, conflicts_with_all = ["rounds", "only", "instructions"])]
        layout: bool,
    },
    /// Measures the operator without Kubernetes: 10,000 pods, 1,000 Services, 500 policies, 200 Canaries and 2,000
    /// sidecars, simulated. Prints each figure beside its goal, and fails when one is missed by more than half.
    Scale,
    /// Simulates rollouts, and prints how often the judge stops a good version and how soon a bad one.
    Judge,
    /// Simulates ten servers of which one is slow or fails fast, and prints its share of the requests and the p99 of each
    /// way to choose a server: Tulle's, random, least requests, and a moving average of the latency alone.
    Sim,
    /// Fuzzes what reads bytes from the network: all targets, or one. Prints executions and findings, and fails when
    /// there is a finding.
    Fuzz {
        /// http1, detection, wire, paths or routes.
        target: Option<String>,
        /// How long each target runs.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// Builds the images that go to a registry, and prints how they are pushed.
    Images {
        /// Where they will be pushed, such as registry.example/team.
        #[arg(long)]
        registry: String,
        /// Their tag.
        #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
        tag: String,
        /// Architectures; more than one makes a manifest list.
        #[arg(long, value_delimiter = ',', default_value = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" })]
        arch: Vec<publish::Arch>,
    },
    /// Builds the documentation as HTML, with every link checked, and prints where it is.
    Book,
    /// Builds the images, loads them and installs Tulle with the sample shop.
    Install {
        /// `embedded`, or `context:NAME` of KUBECONFIG.
        #[arg(long, default_value = "embedded")]
        cluster: String,
    },
}

fn main() -> ExitCode {
    progress::start();
    let done = match Arguments::parse().command {
        Command::Cluster(command) => cluster::run(command),
        Command::Demo { cluster, keep } => demo::run(&cluster, keep),
        Command::Test { suite, only, cluster, keep, jobs } => suites::run(&suites::Choice {
            suite: suite.as_deref(),
            only: only.as_deref(),
            cluster: &cluster,
            keep,
            jobs,
        }),
        Command::Bench { layout: true, .. } => bench::layout::run(),
        Command::Bench { rounds, only, instructions, sidecar, .. } => {
            bench::run(rounds, only, instructions, &sidecar)
        }
        Command::Conformance { cluster, update, keep } => conformance::run(&cluster, update, keep),
        Command::Scale => build::example("tulle-operator", "scale"),
        Command::Judge => build::example("tulle-operator", "judge"),
        Command::Sim => build::example("tulle-sidecar", "sim"),
        Command::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Command::Images { registry, tag, arch } => publish::run(&registry, &tag, &arch),
        Command::Book => book::run(),
        Command::Install { cluster } => install(&cluster),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn install(cluster: &str) -> anyhow::Result<()> {
    build::prepare(images::TULLE, cluster)?;
    let kube = install::cluster(cluster)?;
    install::load_images(&kube)?;
    install::tulle(&kube)?;
    kube.apply(&install::sample("shop.yaml")?).map(drop)
}
