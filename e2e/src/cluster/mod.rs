//! The embedded cluster: upstream etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet, kube-proxy
//! and CoreDNS, with containerd and runc, in their own mount, PID, network, UTS and IPC namespaces.
//!
//! ```text
//!   components  the Go binary, cached by the hash of its sources
//!   pki         certificates and kubeconfigs
//!   files       configuration of every component
//!   node        pid 1 of the namespaces: mounts, network, processes
//!   lifecycle   up, down and status, from outside the namespaces
//! ```
//! When pid 1 of the namespaces ends, the kernel ends every process and mount in them. Only control groups remain, and
//! `down` removes them.

mod components;
mod files;
mod lifecycle;
mod node;
mod pki;

pub use components::{
    binary, check, collector, conformance, echo, gateway_api, grpcurl, h2spec, helm, kstatus, prepare,
};
pub use lifecycle::Cluster;

use std::path::PathBuf;

use anyhow::Result;

use crate::host;

/// Subcommands of `cargo xtask cluster`.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Starts the cluster unless it is running.
    Up {
        /// Number of nodes; a running cluster with another number is replaced.
        #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
        nodes: Option<u8>,
    },
    /// Stops the cluster and removes its files, also after a crash.
    Down,
    /// Shows nodes and pods, or fails if the cluster is not running.
    Status,
    /// Runs kubectl against the cluster.
    Kubectl {
        /// kubectl's arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Loads an image archive (docker-archive or OCI) into the cluster.
    Load {
        /// Path of the archive.
        archive: PathBuf,
    },
    /// Prints the log of a component (etcd, kubelet, containerd …).
    Logs {
        /// Name of the component; nodes other than the first: COMPONENT-NODE.
        component: String,
    },
    /// Starts a shell inside the first node, with KUBECONFIG set.
    Shell,
    /// Pid 1 of the node's namespaces; started by `up`.
    #[command(hide = true)]
    Init {
        /// The folder with the cluster's state.
        state: PathBuf,
        /// The component binary.
        components: PathBuf,
        /// Number of nodes.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
        /// Number of this node, unless it is the first.
        #[arg(long)]
        worker: Option<u8>,
    },
}

/// Runs a command.
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
