//! The embedded cluster: upstream's own etcd, API server, controllers, scheduler, kubelet, proxy and
//! DNS, with containerd and runc, in mount, pid, network, UTS and IPC namespaces of their own.
//!
//! ```text
//!   components  the Go binary, built once and cached by what it was built from
//!   pki         certificates and kubeconfigs
//!   files       configuration of every component
//!   node        pid 1 of the namespaces: mounts, network, processes
//!   lifecycle   up, down, status, from outside
//! ```
//! Namespaces are the teardown: when pid 1 dies the kernel ends every process and mount with it;
//! only control groups stay, and `down` removes those.

mod components;
mod files;
mod lifecycle;
mod node;
mod pki;

pub use components::{helm, prepare};
pub use lifecycle::Cluster;

use std::path::PathBuf;

use anyhow::Result;

use crate::host;

/// What `cargo xtask cluster` can do.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Starts the cluster, or does nothing when it runs.
    Up {
        /// How many nodes it has; a running cluster of another size is made anew.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
        nodes: Option<u8>,
    },
    /// Ends it and leaves nothing behind, also after a crash.
    Down,
    /// Says whether it runs and what its node reports.
    Status,
    /// Runs kubectl against it.
    Kubectl {
        /// kubectl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Loads an image archive (docker-archive or OCI) into it.
    Load {
        /// The archive.
        archive: PathBuf,
    },
    /// Prints the log of a component (etcd, kubelet, containerd …).
    Logs {
        /// The component.
        component: String,
    },
    /// A shell inside the node, with kubectl's configuration set.
    Shell,
    /// Pid 1 of the node's namespaces; started by `up`.
    #[command(hide = true)]
    Init {
        /// The folder with the cluster's state.
        state: PathBuf,
        /// The component binary.
        components: PathBuf,
        /// How many nodes there are.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
        /// Which of the others this is; none: the first.
        #[arg(long)]
        worker: Option<u8>,
    },
}

/// Carries a command out.
pub fn run(command: Command) -> Result<()> {
    if let Command::Init { state, components, nodes, worker } = command {
        return match worker {
            Some(number) => node::run_worker(&state, &components, number),
            None => node::run(&state, &components, nodes),
        };
    }
    host::require_root()?;
    let cluster = Cluster::new()?;
    match command {
        Command::Up { nodes } => cluster.up(nodes),
        Command::Down => cluster.down(),
        Command::Status => cluster.status(),
        Command::Kubectl { arguments } => host::run(cluster.kubectl()?.args(arguments)),
        Command::Load { archive } => cluster.load(&archive),
        Command::Logs { component } => cluster.print_log(&component),
        Command::Shell => host::run(cluster.inside("bash")?.env("PS1", "tulle-node# ")),
        Command::Init { .. } => Ok(()),
    }
}
