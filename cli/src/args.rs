//! Options and commands, as clap reads them. The options of a command stand in the command's own file.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::builder::NonEmptyStringValueParser;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::commands::{
    access, canary, check, completion, config, dashboard, denials, diff, edges, explain, inject, install,
    lint, pods, report, routes, stat, tap, top, uninstall, version,
};
use crate::exit;
use crate::output::Format;

#[cfg(test)]
mod tests;

/// The name of the program when kubectl calls it.
const PLUGIN: &str = "kubectl-tulle";

/// What the service mesh Tulle does, and what it makes of a manifest or a request.
#[derive(Parser)]
#[command(name = "tulle", version, disable_help_subcommand = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The namespace to look at; that of the kubeconfig's context if absent
    #[arg(short, long, global = true, value_name = "NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    pub namespace: Option<String>,
    /// Look at all namespaces
    #[arg(short = 'A', long, global = true)]
    pub all_namespaces: bool,
    /// The context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// The kubeconfig; those of KUBECONFIG or ~/.kube/config if absent
    #[arg(long, global = true, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Act as this user of Kubernetes, who you must be allowed to impersonate
    #[arg(long = "as", global = true, value_name = "USER")]
    pub impersonate: Option<String>,
    /// The namespace of Tulle itself; tulle-system, or where it is found, if absent
    #[arg(long, global = true, value_name = "NAMESPACE", value_parser = NonEmptyStringValueParser::new())]
    pub system_namespace: Option<String>,
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub output: Format,
    /// Print tables without headers
    #[arg(long, global = true)]
    pub no_headers: bool,
    /// Print without colours, as with the variable NO_COLOR
    #[arg(long, global = true)]
    pub no_color: bool,
}

/// The commands.
#[derive(Subcommand)]
#[allow(clippy::large_enum_variant, reason = "one value of it exists, for as long as the program runs")]
pub enum Command {
    /// Find what is wrong before, during and after installation
    Check(check::Args),
    /// Install Tulle, or print its manifests
    Install(install::Args),
    /// Bring an installation to the version of this program
    Upgrade(install::Args),
    /// Remove Tulle in an order that breaks no pod
    Uninstall(uninstall::Args),
    /// Success rate, requests per second and latencies of workloads, Services, routes or revisions
    Stat(stat::Args),
    /// The busiest connections between workloads, refreshed
    Top(top::Args),
    /// Who talks to whom, and whether mTLS secures it
    Edges(edges::Args),
    /// Routes of a Service, as its clients have seen them
    Routes(routes::Args),
    /// Single requests as they end, with filters
    Tap(tap::Args),
    /// Requests and connections that access rules or Strict mTLS refused, one by one
    Denials(denials::Args),
    /// Sidecars: version, configuration and certificate
    Pods(pods::Args),
    /// The configuration that a pod's sidecar has
    Config(config::Args),
    /// What would become of a request, and what decides it
    Explain(explain::Args),
    /// Who may reach what, and the policies that the traffic needs
    Access(access::Args),
    /// What a policy would deny, before it is applied
    Diff(diff::Args),
    /// Rollouts: list, watch, promote, pause, resume, abort, retry, undo
    Canary(canary::Args),
    /// What admission would make of a manifest
    Inject(inject::Args),
    /// Find mistakes in manifests
    Lint(lint::Args),
    /// Collect what a bug report needs, without secrets
    Report(report::Args),
    /// Open the page in a browser, through a port-forward
    Dashboard(dashboard::Args),
    /// Versions of this program and of the operator
    Version(version::Args),
    /// Print the completion of commands and options for a shell
    Completion(completion::Args),
    /// Candidates for kubectl's completion of plugins
    #[command(name = "__complete", hide = true, disable_help_flag = true)]
    Complete(completion::CompleteArgs),
}

/// Reads the command line. The program names itself as it was called: `tulle` or `kubectl tulle`.
///
/// # Errors
/// The command line is wrong, or asks for help or the version: [`clap::Error::exit`] prints that and ends the program.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Cli, clap::Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let plugin = arguments.first().is_some_and(|program| is_plugin(program));
    let mut command = command(plugin);
    let matches = command.try_get_matches_from_mut(arguments)?;
    let mut cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    if let Some(why) = misplaced(&cli).or_else(|| contradiction(&cli.command)) {
        return Err(command.error(ErrorKind::ArgumentConflict, why));
    }
    // These are about the whole mesh, unless a namespace is named.
    let is_of_all = matches!(
        cli.command,
        Command::Check(_) | Command::Report(_) | Command::Install(_) | Command::Upgrade(_)
    );
    cli.global.all_namespaces |= is_of_all && cli.global.namespace.is_none();
    Ok(cli)
}

/// Why `-n` or `-A` does not go together with the command. The installation has its own option for its namespace.
fn misplaced(cli: &Cli) -> Option<String> {
    let is_installation =
        matches!(cli.command, Command::Install(_) | Command::Upgrade(_) | Command::Uninstall(_));
    let named = cli.global.namespace.as_ref().map(|_| "--namespace");
    let option =
        named.or(cli.global.all_namespaces.then_some("--all-namespaces")).filter(|_| is_installation)?;
    Some(format!(
        "{option} is for commands that look at namespaces; the namespace of Tulle is --system-namespace NAMESPACE"
    ))
}

/// Why arguments and options of a command contradict each other, where clap cannot see it.
fn contradiction(command: &Command) -> Option<String> {
    match command {
        Command::Explain(args) => args.request().err(),
        _ => None,
    }
}

/// The command line's definition, under the name `tulle` or `kubectl tulle`.
pub fn command(plugin: bool) -> clap::Command {
    let codes = exit::CODES.map(|row| format!("  {}  {}", row.code, row.meaning)).join("\n");
    Cli::command()
        .bin_name(if plugin { "kubectl tulle" } else { "tulle" })
        .after_help(format!("Exit codes:\n{codes}"))
}

fn is_plugin(program: &OsStr) -> bool {
    Path::new(program).file_stem().is_some_and(|name| name == PLUGIN)
}
