//! `tulle install` and `tulle upgrade`: print the manifests, or apply them.
//!
//! ```text
//!   manifests   (crate) the objects, as they are in this program
//!   plan        who else manages them, stored versions, what changes; pure
//!   apply       server-side apply in the order of the manifests, and waiting for the control plane
//! ```
//! Objects that Helm, Flux or Argo CD manage are never written: their tool would write them back.

mod apply;
mod plan;

use serde_json::{Value, json};
use tulle_mesh::query::{self, Paths};

use super::check;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::manifests::{self, Settings};
use crate::output::{Format, write};

/// How far `tulle install` goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DryRun {
    /// Print the manifests; the cluster is not asked
    Client,
    /// Let the API server check what it would do, and print what changes
    Server,
    /// Apply, as with --apply
    None,
}

/// What an installation and an upgrade have in common.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Common {
    /// Apply to the cluster, and wait until the control plane is available
    #[arg(long)]
    pub apply: bool,
    /// The registry of the images, with a folder if there is one: REGISTRY/tulle-operator
    #[arg(long, value_name = "REGISTRY")]
    pub registry: Option<String>,
    /// The tag of the images; this program's version if only --registry is given
    #[arg(long, value_name = "TAG")]
    pub tag: Option<String>,
    /// Grant the operator the right to restore Deployments, which `onFailure: Undo` of Canaries needs
    #[arg(long)]
    pub undo: bool,
    /// Take over fields that somebody else has set, except those of Helm, Flux and Argo CD
    #[arg(long)]
    pub force_conflicts: bool,
}

/// Options of `tulle install`.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub common: Common,
    /// How far to go: print, let the API server check, or apply
    #[arg(long, value_enum, value_name = "MODE", conflicts_with = "apply")]
    pub dry_run: Option<DryRun>,
}

/// Options of `tulle upgrade`.
#[derive(Clone, Debug, clap::Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    pub common: Common,
    /// Apply although the operator is newer than this program
    #[arg(long)]
    pub allow_downgrade: bool,
}

/// Prints the manifests, or applies them and checks the result.
///
/// # Errors
/// The cluster refuses an object, another tool manages one, or the control plane does not become available.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let objects = objects(context, &args.common)?;
    let mode = if args.common.apply { DryRun::None } else { args.dry_run.unwrap_or(DryRun::Client) };
    match mode {
        DryRun::Client => print(context, &objects),
        DryRun::Server => apply::preview(context, &objects, &args.common).await,
        DryRun::None => install(context, &objects, &args.common).await,
    }
}

/// Lists what an upgrade changes, and with `--apply` does it.
///
/// # Errors
/// As [`run`], and an operator that is newer than this program.
pub async fn upgrade(context: &Context, args: UpgradeArgs) -> Result<(), CliError> {
    let objects = objects(context, &args.common)?;
    let installed = installed(context).await;
    match plan::step(installed.as_deref(), env!("CARGO_PKG_VERSION")) {
        plan::Step::Down(installed) if args.common.apply && !args.allow_downgrade => {
            let own = env!("CARGO_PKG_VERSION");
            return Err(CliError::failed(format!(
                "the operator has version {installed}, and this program {own}"
            ))
            .hint(
                "use a newer `tulle`, or --allow-downgrade: an older operator may not know stored fields",
            ));
        }
        step => {
            if let Some(warning) = step.warning() {
                eprintln!("warning: {warning}");
            }
        }
    }
    apply::preview(context, &objects, &args.common).await?;
    if !args.common.apply {
        eprintln!("nothing was changed: `tulle upgrade --apply` does it");
        return Ok(());
    }
    install(context, &objects, &args.common).await
}

fn objects(context: &Context, common: &Common) -> Result<Vec<Value>, CliError> {
    let settings = Settings {
        namespace: context.system.clone(),
        registry: common.registry.clone(),
        tag: common.tag.clone(),
        undo: common.undo,
    };
    let objects = manifests::objects(&settings);
    objects.map_err(|error| CliError::failed(format!("the manifests of this program are not YAML: {error}")))
}

fn print(context: &Context, objects: &[Value]) -> Result<(), CliError> {
    let text = match context.output.format {
        Format::Json => {
            let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
            serde_json::to_string_pretty(&list).map(|text| text + "\n").map_err(|error| error.to_string())
        }
        Format::Name => Ok(objects.iter().map(|object| plan::title(object) + "\n").collect()),
        _ => manifests::yaml(objects).map_err(|error| error.to_string()),
    };
    write(&text.map_err(CliError::failed)?)
}

async fn install(context: &Context, objects: &[Value], common: &Common) -> Result<(), CliError> {
    apply::apply(context, objects, common).await?;
    apply::wait(context).await?;
    check::run(context, check::Args { short: true, ..check::Args::default() }).await
}

/// The operator's version, if it answers.
async fn installed(context: &Context) -> Option<String> {
    let operator = context.operator().await.ok()?;
    let health = operator.get::<query::Health>(Paths::HEALTH, &[]).await.ok()?;
    Some(health.version)
}
