//! `tulle check`: whether the mesh works, what does not, and what to do about it.
//!
//! ```text
//!   gather    reads the cluster into facts
//!   facts     what was observed, and what could not be read
//!   judge     facts in, findings out; pure
//!   finding   findings about what could not be read
//!   render    findings as text and as JSON
//! ```
//! The checks with their numbers, and the judgement of what the operator's page looks at too, are in `tulle_mesh::check`.
//! It changes nothing, goes on when something cannot be read, and needs nothing but the cluster.

mod facts;
mod finding;
mod gather;
mod judge;
#[cfg(test)]
mod reference;
mod render;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use render::Report;
use tulle_mesh::check::{Outcome, ROOT_ENDS_SOON};

use crate::cluster::Context;
use crate::exit::CliError;
use crate::output::{Format, Table, write};

/// From which result on the command ends with code 3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum FailOn {
    /// Something does not work.
    #[default]
    Error,
    /// Something does not work, or may soon not work.
    Warning,
}

/// Options of `tulle check`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// Before the installation: whether the cluster can run Tulle, and whether you may install it
    #[arg(long)]
    pub pre: bool,
    /// End with code 3 if a finding is at least this bad
    #[arg(long, value_enum, default_value_t)]
    pub fail_on: FailOn,
    /// Warn about a root certificate that ends within this time
    #[arg(long, value_name = "DURATION", default_value = "720h", value_parser = crate::human::duration)]
    pub certs_within: Duration,
    /// Print only what is not well
    #[arg(long)]
    pub short: bool,
}

impl Default for Args {
    fn default() -> Self {
        let certs_within = Duration::from_secs(ROOT_ENDS_SOON.unsigned_abs());
        Self { pre: false, fail_on: FailOn::Error, certs_within, short: false }
    }
}

/// Checks, prints, and fails if a finding is bad enough.
///
/// # Errors
/// [`CliError::Findings`], or there is no cluster to ask.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let report = report(context, &args).await?;
    match context.output.format {
        Format::Json | Format::Yaml => context.output.print(&report, |_| Table::default())?,
        Format::Name => write(&report.ids())?,
        Format::Table | Format::Wide => write(&report.text(&context.output, args.short))?,
    }
    let limit = match args.fail_on {
        FailOn::Error => Outcome::Error,
        FailOn::Warning => Outcome::Warning,
    };
    if report.result >= limit { Err(CliError::Findings) } else { Ok(()) }
}

/// What [`run`] prints.
///
/// # Errors
/// There is no cluster to ask.
pub async fn report(context: &Context, args: &Args) -> Result<Report, CliError> {
    let facts = gather::gather(context, args.pre).await?;
    let certs_within = i64::try_from(args.certs_within.as_secs()).unwrap_or(i64::MAX);
    Ok(Report::of(judge::judge(&facts, judge::Options { pre: args.pre, certs_within })))
}
