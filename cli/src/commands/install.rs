//! `tulle install` and `tulle upgrade`: print the manifests, or apply them.
//!
//! ```text
//!   manifests   (crate) the objects, as they are in this program
//!   images      registry and tag or digests: given, installed, or of a development build
//!   plan        who else manages them, stored versions, what changes; pure
//!   apply       server-side apply in the order of the manifests, and waiting for the control plane
//! ```
//! Objects that Helm, Flux or Argo CD manage are never written: their tool would write them back.

mod apply;
mod images;
mod plan;

use std::path::PathBuf;

use serde_json::{Value, json};
use tulle_mesh::query::{self, Paths};

use self::images::{Digests, Images};
use super::check;
use crate::cluster::{Context, failure};
use crate::exit::{CliError, note};
use crate::manifests::{self, OPERATOR, Settings, WEBHOOK};
use crate::objects;
use crate::output::{Format, write};

/// How far `tulle install` and `tulle upgrade` go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DryRun {
    /// Print the manifests; the cluster is not asked
    Client,
    /// Let the API server check what it would do, and print what changes
    Server,
    /// Apply, as with --apply
    None,
}

/// Options of `tulle install` and of `tulle upgrade`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// Apply to the cluster, and wait until the control plane is available
    #[arg(long)]
    pub apply: bool,
    /// The registry of the images, with a folder if there is one: REGISTRY/tulle-operator; that of the installation if
    /// absent
    #[arg(long, value_name = "REGISTRY", value_parser = images::registry)]
    pub registry: Option<String>,
    /// The tag of the images; this program's version if absent
    #[arg(long, value_name = "TAG", value_parser = images::tag)]
    pub tag: Option<String>,
    /// The digests of the images in place of a tag: a file with lines PART@sha256:DIGEST, as `cargo xtask images` writes
    /// it
    #[arg(long, value_name = "FILE", conflicts_with = "tag")]
    pub digests: Option<PathBuf>,
    /// Grant the operator the right to restore Deployments, which `onFailure: Undo` of Canaries needs
    #[arg(long)]
    pub undo: bool,
    /// Take over fields that somebody else has set, except those of Helm, Flux and Argo CD
    #[arg(long)]
    pub force_conflicts: bool,
    /// Apply although the operator is newer than this program, or does not say its version
    #[arg(long)]
    pub allow_downgrade: bool,
    /// Apply images of a development build, which the nodes of the cluster must have already
    #[arg(long)]
    pub allow_development_images: bool,
    /// How far to go: print, let the API server check, or apply
    #[arg(long, value_enum, value_name = "MODE", conflicts_with = "apply")]
    pub dry_run: Option<DryRun>,
}

/// Prints the manifests, or applies them and checks the result. An installation that exists is upgraded.
///
/// # Errors
/// The cluster refuses an object, another tool manages one, or the control plane does not become available.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    match args.mode(DryRun::Client) {
        DryRun::Client => manifests_of(context, &args),
        mode => bring(context, &args, mode == DryRun::None).await,
    }
}

/// Prints the manifests, without a question to the cluster.
fn manifests_of(context: &Context, args: &Args) -> Result<(), CliError> {
    let objects = objects(context, args, args.images())?;
    if !args.allow_development_images {
        for image in images::development(&objects) {
            note(&format!("warning: {image} is an image of a development build: write --registry"));
        }
    }
    print(context, &objects)
}

/// Lists what an upgrade changes, prints its manifests, or with `--apply` does it.
///
/// # Errors
/// As [`run`], and an operator that is newer than this program.
pub async fn upgrade(context: &Context, args: Args) -> Result<(), CliError> {
    let mode = args.mode(DryRun::Server);
    if mode == DryRun::Client {
        return manifests_of(context, &args);
    }
    bring(context, &args, mode == DryRun::None).await?;
    if mode == DryRun::Server {
        note("nothing was changed: `tulle upgrade --apply` does it");
    }
    Ok(())
}

/// Brings the cluster to this program's version, or only lists what that would change.
async fn bring(context: &Context, args: &Args, apply: bool) -> Result<(), CliError> {
    let (operator, webhook) = (deployment(context, OPERATOR).await?, deployment(context, WEBHOOK).await?);
    let exists = operator.is_some() || webhook.is_some();
    let given = args.images();
    given.keep_digests(operator.as_ref(), webhook.as_ref())?;
    // What the user names is not looked up.
    let live = match given.registry {
        Some(_) => None,
        None => Images::live(operator.as_ref(), webhook.as_ref())?,
    };
    let objects = objects(context, args, Images::choose(&given, live.as_ref()))?;
    let is_development_already = live.is_some_and(|live| live.registry.is_none());
    if !args.allow_development_images && !is_development_already {
        development(&objects, apply)?;
    }
    if exists {
        let step = plan::step(installed(context).await.as_deref(), env!("CARGO_PKG_VERSION"));
        if apply
            && !args.allow_downgrade
            && let Some(refusal) = step.refusal()
        {
            return Err(CliError::failed(refusal).hint(
                "use a newer `tulle`, or --allow-downgrade: an older operator may not know stored fields",
            ));
        }
        if let Some(warning) = step.warning() {
            note(&format!("warning: {warning}"));
        }
    }
    if exists || !apply {
        apply::preview(context, &objects, args).await?;
    }
    if apply { install(context, &objects, args).await } else { Ok(()) }
}

/// Refuses images that no cluster can pull, or warns of them where nothing is applied.
fn development(objects: &[Value], apply: bool) -> Result<(), CliError> {
    let images = images::development(objects);
    let Some(first) = images.first() else { return Ok(()) };
    let what = format!("{first} is an image of a development build, which no cluster can pull");
    if !apply {
        note(&format!("warning: {what}"));
        return Ok(());
    }
    Err(CliError::failed(what)
        .hint("write --registry REGISTRY; or --allow-development-images if the nodes have these images"))
}

async fn deployment(context: &Context, name: &str) -> Result<Option<Value>, CliError> {
    let (client, system) = (context.client().await?, context.system.as_str());
    let found = objects::get(&client, objects::DEPLOYMENT, Some(system), name).await;
    found.map_err(|why| failure::of_unread(&format!("cannot read Deployment {system}/{name}"), &why))
}

impl Args {
    /// How far to go, with what holds if neither `--apply` nor `--dry-run` is given.
    fn mode(&self, unless_given: DryRun) -> DryRun {
        if self.apply { DryRun::None } else { self.dry_run.unwrap_or(unless_given) }
    }

    /// The images that the options name.
    fn images(&self) -> Images {
        Images { registry: self.registry.clone(), tag: self.tag.clone(), by_digest: self.digests.is_some() }
    }
}

fn objects(context: &Context, args: &Args, images: Images) -> Result<Vec<Value>, CliError> {
    let settings = Settings {
        namespace: context.system.clone(),
        registry: images.registry,
        tag: images.tag,
        undo: args.undo,
    };
    let mut objects = manifests::objects(&settings)
        .map_err(|error| CliError::failed(format!("the manifests of this program are not YAML: {error}")))?;
    if let Some(file) = &args.digests {
        Digests::read(file)?.pin(&mut objects)?;
    }
    Ok(objects)
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

async fn install(context: &Context, objects: &[Value], args: &Args) -> Result<(), CliError> {
    apply::apply(context, objects, args).await?;
    apply::wait(context).await?;
    check::run(context, check::Args { short: true, ..check::Args::default() }).await
}

/// The operator's version, if it answers.
async fn installed(context: &Context) -> Option<String> {
    let operator = context.operator().await.ok()?;
    let health = operator.get::<query::Health>(Paths::HEALTH, &[]).await.ok()?;
    Some(health.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_installation_prints_and_an_upgrade_compares_unless_the_options_say_otherwise() {
        let none = Args::default();
        assert_eq!((none.mode(DryRun::Client), none.mode(DryRun::Server)), (DryRun::Client, DryRun::Server));
        let applied = Args { apply: true, ..Args::default() };
        assert_eq!(applied.mode(DryRun::Server), DryRun::None);
        for mode in [DryRun::Client, DryRun::Server, DryRun::None] {
            let given = Args { dry_run: Some(mode), ..Args::default() };
            assert_eq!((given.mode(DryRun::Client), given.mode(DryRun::Server)), (mode, mode));
        }
    }

    #[test]
    fn images_that_no_cluster_can_pull_are_refused_only_where_they_would_be_applied() {
        let dev = manifests::objects(&Settings::default()).unwrap();
        let error = development(&dev, true).unwrap_err();
        assert!(error.to_string().starts_with("tulle.local/operator:dev is an image"), "{error}");
        assert_eq!(development(&dev, false), Ok(()));
        let registry = Some("r.example".to_owned());
        let released = manifests::objects(&Settings { registry, ..Settings::default() }).unwrap();
        assert_eq!(development(&released, true), Ok(()));
    }
}
