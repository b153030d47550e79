//! The commands: one file each, with its options and what it prints.

use crate::args::Command;
use crate::cluster::Context;
use crate::exit::CliError;

pub mod access;
pub mod canary;
pub mod check;
pub mod completion;
pub mod config;
pub mod dashboard;
pub mod denials;
pub mod diff;
pub mod edges;
pub mod explain;
pub mod inject;
pub mod install;
pub mod lint;
pub mod pods;
pub mod report;
pub mod routes;
pub mod stat;
pub mod tap;
pub mod top;
pub mod uninstall;
pub mod version;

/// Runs a command.
///
/// # Errors
/// What the command could not do, or that it found what it was asked to look for.
pub async fn run(context: &Context, command: Command) -> Result<(), CliError> {
    match command {
        Command::Check(args) => check::run(context, args).await,
        Command::Install(args) => install::run(context, args).await,
        Command::Upgrade(args) => install::upgrade(context, args).await,
        Command::Uninstall(args) => uninstall::run(context, args).await,
        Command::Stat(args) => stat::run(context, args).await,
        Command::Top(args) => top::run(context, args).await,
        Command::Edges(args) => edges::run(context, args).await,
        Command::Routes(args) => routes::run(context, args).await,
        Command::Tap(args) => tap::run(context, args).await,
        Command::Denials(args) => denials::run(context, args).await,
        Command::Pods(args) => pods::run(context, args).await,
        Command::Config(args) => config::run(context, args).await,
        Command::Explain(args) => explain::run(context, args).await,
        Command::Access(args) => access::run(context, args).await,
        Command::Diff(args) => diff::run(context, args).await,
        Command::Canary(args) => canary::run(context, args).await,
        Command::Inject(args) => inject::run(context, args).await,
        Command::Lint(args) => lint::run(context, args).await,
        Command::Report(args) => report::run(context, args).await,
        Command::Dashboard(args) => dashboard::run(context, args).await,
        Command::Version(args) => version::run(context, args).await,
        Command::Completion(args) => completion::run(context, args).await,
        Command::Complete(args) => completion::complete(context, args).await,
    }
}
