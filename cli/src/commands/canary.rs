//! `tulle canary`: what Canaries do, and the actions that people request on them.
//!
//! In: Canaries, their targets' pods, what the operator's judge has, and an action. Out: tables, a tree that is redrawn
//! while a rollout is in progress, and the annotation `tulle.dev/action`, which the operator carries out once. What is
//! shown and what is refused is decided in functions without I/O (`view`, [`attempts::text`], [`action::refusal`]).

pub(super) mod action;
mod attempts;
mod next;
mod pods;
mod status;
#[cfg(test)]
mod tests;
mod undo;
mod view;

use std::time::Duration;

use clap::Subcommand;
use k8s_openapi::jiff::Timestamp;
use kube::api::ListParams;
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::{Canary, CanaryVerdict};

use crate::cluster::{Context, failure};
use crate::exit::CliError;
use crate::human;
use crate::objects::{self, Read};
use crate::output::Table;

/// Arguments of `tulle canary`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the Canaries.
    #[command(visible_alias = "ls")]
    List,
    /// Show one Canary as a row, or the whole object with -o yaml.
    Get {
        /// Name of the Canary.
        name: String,
    },
    /// Show a rollout: its step, verdict and evidence, and the pods of each revision; with -o wide also attempts by pod.
    Status(status::Args),
    /// Promote the new revision now.
    Promote(action::Args),
    /// Pause the rollout at its current weight, until `resume`.
    Pause(action::Args),
    /// Continue after a pause.
    Resume(action::Args),
    /// Stop the rollout, and treat the new revision as failed.
    Abort(action::Args),
    /// Try a failed revision again.
    Retry(action::Args),
    /// Restore the pod template of the approved revision, as `kubectl rollout undo` does.
    Undo(undo::Args),
}

/// Runs `tulle canary`.
///
/// # Errors
/// [`CliError`]; with `status -w`, [`CliError::Findings`] for a rollout that failed.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    use action::Verb;
    match args.command {
        Command::List => list(context).await,
        Command::Get { name } => {
            let namespace = namespace_of(context)?;
            let canary = get(&canaries(context.client().await?, namespace), namespace, &name).await?;
            let now = Timestamp::now();
            context.output.print(&canary, |_| table([&canary], false, now))
        }
        Command::Status(args) => status::run(context, args).await,
        Command::Promote(args) => action::run(context, Verb::Promote, args).await,
        Command::Pause(args) => action::run(context, Verb::Pause, args).await,
        Command::Resume(args) => action::run(context, Verb::Resume, args).await,
        Command::Abort(args) => action::run(context, Verb::Abort, args).await,
        Command::Retry(args) => action::run(context, Verb::Retry, args).await,
        Command::Undo(args) => undo::run(context, args).await,
    }
}

async fn list(context: &Context) -> Result<(), CliError> {
    let client = context.client().await?;
    let api = match context.namespace() {
        Some(namespace) => canaries(client, namespace),
        None => Api::all(client),
    };
    let found = api
        .list(&ListParams::default())
        .await
        .map_err(|error| failure::doing_tulle("cannot list Canaries", &error))?;
    if let Some(namespace) = context.namespace().filter(|_| found.items.is_empty()) {
        // The API server lists nothing in a namespace that does not exist. Whoever may not read namespaces is not told.
        let read = objects::get(&context.client().await?, objects::NAMESPACE, None, namespace).await;
        if let Some(error) = absent(&read, namespace) {
            return Err(error);
        }
    }
    let now = Timestamp::now();
    context.output.print(&found.items, |_| table(&found.items, context.namespace().is_none(), now))
}

/// The error about a namespace that surely does not exist.
fn absent(read: &Read<Option<Value>>, namespace: &str) -> Option<CliError> {
    matches!(read, Ok(None)).then(|| CliError::failed(format!("namespace {namespace} does not exist")))
}

/// The columns of `kubectl get canaries`, the longest one last.
fn table<'a>(canaries: impl IntoIterator<Item = &'a Canary>, all_namespaces: bool, now: Timestamp) -> Table {
    let mut headers = vec!["NAME", "TARGET", "PHASE", "STEP", "WEIGHT", "VERDICT", "AGE", "EVIDENCE"];
    if all_namespaces {
        headers.insert(0, "NAMESPACE");
    }
    let row = |canary: &Canary| {
        let status = canary.status.clone().unwrap_or_default();
        let target = &canary.spec.target;
        let mut row = vec![
            canary.metadata.name.clone().unwrap_or_default(),
            format!("{}/{}", target.kind.name(), target.name),
            format!("{:?}", status.phase),
            dash(status.step_summary),
            dash(status.weight_summary),
            dash(verdict(status.verdict).to_owned()),
            age(canary.metadata.creation_timestamp.as_ref().map(|created| since(created.0, now))),
            dash(status.evidence_summary),
        ];
        if all_namespaces {
            row.insert(0, canary.metadata.namespace.clone().unwrap_or_default());
        }
        row
    };
    Table { headers, rows: canaries.into_iter().map(row).collect() }
}

/// Seconds from then to now.
fn since(then: Timestamp, now: Timestamp) -> i64 {
    now.as_second().saturating_sub(then.as_second())
}

/// A cell is never empty, so that columns can be counted.
fn dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

/// The verdict as in the status.
fn verdict(verdict: CanaryVerdict) -> &'static str {
    match verdict {
        CanaryVerdict::NotJudged => "",
        CanaryVerdict::Undecided => "Undecided",
        CanaryVerdict::Pass => "Pass",
        CanaryVerdict::Fail => "Fail",
        CanaryVerdict::Inconclusive => "Inconclusive",
        CanaryVerdict::FailedBefore => "FailedBefore",
    }
}

/// The one namespace of a command about one object.
fn namespace_of(context: &Context) -> Result<&str, CliError> {
    let several =
        || CliError::Usage("a Canary is in one namespace: use -n NAMESPACE instead of -A".to_owned());
    context.namespace().ok_or_else(several)
}

fn canaries(client: Client, namespace: &str) -> Api<Canary> {
    Api::namespaced(client, namespace)
}

async fn get(api: &Api<Canary>, namespace: &str, name: &str) -> Result<Canary, CliError> {
    match api.get(name).await {
        Ok(canary) => Ok(canary),
        Err(kube::Error::Api(status)) if status.code == 404 && failure::names_object(&status) => {
            Err(CliError::failed(format!("there is no Canary {namespace}/{name}"))
                .hint(format!("tulle canary list -n {namespace} lists those that there are")))
        }
        Err(error) => Err(failure::doing_tulle(&format!("cannot read Canary {namespace}/{name}"), &error)),
    }
}

/// How long ago something was, as kubectl prints ages; `-` where it is not known.
fn age(seconds: Option<i64>) -> String {
    let age = |seconds: i64| human::age(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)));
    seconds.map_or_else(|| "-".to_owned(), age)
}
