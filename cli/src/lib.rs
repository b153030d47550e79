//! The command `tulle`: what the mesh does, and what it makes of a manifest or a request.
//!
//! ```text
//!   args      options and commands, as clap reads them
//!   cluster   the kubeconfig, the API server, and the operator behind a port-forward
//!   commands  one file per command
//!   refresh   commands that draw again and again
//!   yaml      YAML that kubectl reads as it was meant
//!   output    tables, JSON, YAML and names on standard output
//!   human     numbers and durations as people read and write them
//!   exists    whether something that a user has named exists
//!   exit      errors and exit codes
//!   objects   objects of Kubernetes as JSON, as `check` and `install` read them
//!   manifests what `install` applies
//!   tenants   what is in the namespace of Tulle and is not part of Tulle
//! ```
//! What the mesh does comes from the operator's query API (`tulle_mesh::query`), which listens on the loopback address
//! of its pod. A command gets there through a port-forward, with a token for the namespace that it asks about. Commands
//! never open a discovery stream, and write nothing unless their name says so.

pub mod args;
pub mod cluster;
pub mod commands;
pub mod exists;
pub mod exit;
pub mod human;
pub mod manifests;
pub mod objects;
pub mod output;
#[cfg(test)]
mod reference;
pub mod refresh;
pub mod tenants;
pub mod yaml;
