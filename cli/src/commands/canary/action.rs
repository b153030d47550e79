//! Requests an action by annotation, waits until the operator has taken it, and shows what came of it. `tulle dashboard`
//! does the same for a form of the page.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use serde_json::{Value, json};
use tulle_crds::{Canary, CanaryStatus, Phase, keys};

use super::{canaries, get, namespace_of};
use crate::cluster::Context;
use crate::cluster::failure::cannot;
use crate::exit::CliError;
use crate::objects::MANAGER;
use crate::output::{Format, write};

/// A status that changes between reading and writing is read again this often.
const ATTEMPTS: usize = 10;
/// The operator publishes its event after the status: it is looked for this often.
const LOOKS: usize = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// Arguments of every action.
#[derive(clap::Args, Debug)]
pub(in crate::commands) struct Args {
    /// Name of the Canary.
    name: String,
    /// Revision that the action is meant for. Default: the one that is rolled out now. Nothing happens if another one is
    /// rolled out by the time the operator sees the action.
    #[arg(long)]
    revision: Option<String>,
    /// How long to wait until the operator has taken the action.
    #[arg(long, default_value = "30s", value_parser = crate::human::duration)]
    timeout: Duration,
}

impl Args {
    /// The arguments of an action on a revision that somebody has seen.
    pub(in crate::commands) fn new(name: &str, revision: Option<String>, timeout: Duration) -> Self {
        Self { name: name.to_owned(), revision, timeout }
    }
}

/// An action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::commands) enum Verb {
    Promote,
    Pause,
    Resume,
    Abort,
    Retry,
}

impl Verb {
    const ALL: [Self; 5] = [Self::Promote, Self::Pause, Self::Resume, Self::Abort, Self::Retry];

    /// The action that the annotation writes like this.
    pub(in crate::commands) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|verb| verb.name() == name)
    }

    /// As the annotation writes it.
    pub(in crate::commands) fn name(self) -> &'static str {
        match self {
            Self::Promote => "promote",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Abort => "abort",
            Self::Retry => "retry",
        }
    }

    /// The phases in which it does something.
    fn phases(self) -> &'static [Phase] {
        match self {
            Self::Promote => &[Phase::Progressing, Phase::Paused, Phase::Failed],
            Self::Pause => &[Phase::Progressing],
            Self::Resume => &[Phase::Paused],
            Self::Abort => &[Phase::Progressing, Phase::Paused, Phase::Promoting],
            Self::Retry => &[Phase::Failed],
        }
    }

    /// Whether the status shows that it was done.
    pub(super) fn has_effect(self, before: &CanaryStatus, after: &CanaryStatus) -> bool {
        match self {
            Self::Promote => {
                after.approved_revision == before.canary_revision
                    && matches!(after.phase, Phase::Promoting | Phase::Stable)
            }
            Self::Pause => after.phase == Phase::Paused,
            Self::Resume => after.phase != Phase::Paused || after.step != before.step,
            Self::Abort => after.phase == Phase::Failed,
            Self::Retry => after.phase != Phase::Failed,
        }
    }

    /// What was done, as a sentence.
    fn done(self, revision: &str, after: &CanaryStatus) -> String {
        let target = &after.target;
        match self {
            Self::Promote => format!("revision {revision} of {target} is promoted"),
            Self::Pause => {
                format!("the rollout of revision {revision} of {target} pauses at {}%", after.weight)
            }
            Self::Resume => format!("the rollout of revision {revision} of {target} continues"),
            Self::Abort => format!(
                "revision {revision} of {target} is treated as failed and gets no traffic; its pods stay until the template is restored (tulle canary undo)"
            ),
            Self::Retry => format!("revision {revision} of {target} goes through the steps again"),
        }
    }
}

/// Why an action would do nothing, as the end of a sentence that begins with the Canary; `None`: it does something.
pub(super) fn refusal(verb: Verb, status: &CanaryStatus, revision: Option<&str>) -> Option<String> {
    if let Some(named) = revision.filter(|named| *named != status.canary_revision) {
        return Some(match status.canary_revision.as_str() {
            "" => format!("rolls out no revision, so not {named} either"),
            // The page names no revision where it has shown none.
            present if named.is_empty() => format!("rolls out revision {present} by now"),
            present => format!("rolls out revision {present}, not {named}"),
        });
    }
    if verb.phases().contains(&status.phase) {
        return None;
    }
    let phase = match status.phase {
        Phase::Waiting => "is Waiting: its target does not exist or has no revision yet".to_owned(),
        Phase::Stable => format!(
            "is Stable: no rollout is in progress, and the target runs the approved revision {}",
            status.approved_revision
        ),
        Phase::Progressing => {
            format!("is Progressing: revision {} goes through the steps", status.canary_revision)
        }
        Phase::Paused => format!("is Paused: revision {} waits for resume", status.canary_revision),
        Phase::Promoting => format!(
            "is Promoting: revision {} is approved already, and its pods replace the others",
            status.approved_revision
        ),
        Phase::Failed => format!(
            "is Failed: revision {} gets no traffic; promote or retry it, or restore the template with undo",
            status.canary_revision
        ),
    };
    Some(phase)
}

/// The annotation's value. It always names a revision, where there is one: what was seen is what is meant.
pub(super) fn annotation(verb: Verb, revision: &str, id: &str) -> String {
    match revision {
        "" => format!("{}@{id}", verb.name()),
        revision => format!("{}:{revision}@{id}", verb.name()),
    }
}

/// What is written: guarded by the version that was read, so that the action is decided on what it applies to.
pub(super) fn patch(resource_version: Option<&str>, action: &str) -> Value {
    json!({"metadata": {"resourceVersion": resource_version, "annotations": {(keys::ACTION): action}}})
}

/// Whether the operator has taken the request with this id.
pub(super) fn is_taken(canary: &Canary, id: &str) -> bool {
    let used =
        |status: &CanaryStatus| status.last_action == id || status.used_actions.iter().any(|used| used == id);
    canary.status.as_ref().is_some_and(used)
}

/// A request id that was not used before.
fn fresh_id() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("cli-{:x}-{:x}", since.as_nanos(), std::process::id())
}

pub(super) async fn run(context: &Context, verb: Verb, args: Args) -> Result<(), CliError> {
    let namespace = namespace_of(context)?;
    let (client, streams) = (context.client().await?, context.streams().await?);
    let Done { sentence, canary } = act(&client, streams, namespace, verb, &args).await?;
    if matches!(context.output.format, Format::Table | Format::Wide) {
        write(&format!("{}\n", crate::output::plain(&sentence)))?;
    }
    context.output.print(&canary, |_| super::table([&canary], false, Timestamp::now()))
}

/// An action that the operator has taken and that had its effect.
pub(in crate::commands) struct Done {
    /// What was done.
    pub(in crate::commands) sentence: String,
    /// The Canary afterwards.
    canary: Canary,
}

/// Requests an action, and waits until the operator has taken it. `streams`: the client that watches.
///
/// # Errors
/// The action would do nothing or has changed nothing, with the reason; the user may not request it; the operator has
/// not taken it in time.
pub(in crate::commands) async fn act(
    client: &Client,
    streams: Client,
    namespace: &str,
    verb: Verb,
    args: &Args,
) -> Result<Done, CliError> {
    let id = fresh_id();
    let before = request(&canaries(client.clone(), namespace), namespace, verb, args, &id).await?;
    let canary = taken(&canaries(streams, namespace), namespace, verb, args, &id).await?;
    let status = canary.status.clone().unwrap_or_default();
    if !verb.has_effect(&before, &status) {
        let why = ignored(client, namespace, &args.name, verb, &id).await;
        let why = why.unwrap_or_else(|| format!("the Canary is {:?} now", status.phase));
        return Err(CliError::failed(format!(
            "the operator has taken {}, and it changed nothing: {why}",
            verb.name()
        )));
    }
    Ok(Done { sentence: verb.done(&before.canary_revision, &status), canary })
}

/// Writes the annotation; what the Canary was when it was written.
async fn request(
    api: &Api<Canary>,
    namespace: &str,
    verb: Verb,
    args: &Args,
    id: &str,
) -> Result<CanaryStatus, CliError> {
    let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
    for _ in 0..ATTEMPTS {
        let canary = get(api, namespace, &args.name).await?;
        let status = canary.status.clone().unwrap_or_default();
        if let Some(why) = refusal(verb, &status, args.revision.as_deref()) {
            return Err(CliError::failed(format!(
                "{} would do nothing, because Canary {namespace}/{} {why}",
                verb.name(),
                args.name
            )));
        }
        let action = annotation(verb, &status.canary_revision, id);
        let patch = patch(canary.metadata.resource_version.as_deref(), &action);
        match api.patch(&args.name, &params, &Patch::Merge(&patch)).await {
            Ok(_) => return Ok(status),
            // The operator wrote the status meanwhile.
            Err(kube::Error::Api(answer)) if answer.is_conflict() => {}
            Err(error) => {
                return Err(cannot(&format!("annotate Canary {namespace}/{}", args.name), &error));
            }
        }
    }
    let what = format!("Canary {namespace}/{} changed {ATTEMPTS} times while it was written", args.name);
    Err(CliError::failed(what).hint("try again"))
}

/// Waits until the operator has taken the action.
async fn taken(
    api: &Api<Canary>,
    namespace: &str,
    verb: Verb,
    args: &Args,
    id: &str,
) -> Result<Canary, CliError> {
    // A Canary that is deleted meanwhile takes nothing any more.
    let is_over = |canary: Option<&Canary>| canary.is_none_or(|canary| is_taken(canary, id));
    let waited = tokio::time::timeout(args.timeout, await_condition(api.clone(), &args.name, is_over)).await;
    match waited {
        Ok(Ok(Some(canary))) => Ok(canary),
        Ok(Ok(None)) => Err(CliError::failed(format!("Canary {namespace}/{} was deleted", args.name))),
        Ok(Err(error)) => Err(CliError::failed(format!(
            "{} was requested, but Canary {namespace}/{} cannot be watched: {error}",
            verb.name(),
            args.name
        ))),
        Err(_) => Err(CliError::TimedOut(format!(
            "the operator has not taken {} within {} s; it takes it once it runs: see tulle check",
            verb.name(),
            args.timeout.as_secs()
        ))),
    }
}

/// What the operator has said about an action that changed nothing.
async fn ignored(client: &Client, namespace: &str, name: &str, verb: Verb, id: &str) -> Option<String> {
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let about = format!("involvedObject.kind=Canary,involvedObject.name={name},reason=ActionIgnored");
    let params = ListParams::default().fields(&about);
    // As the operator writes it, without the revision.
    let request = format!("{}@{id}", verb.name());
    for _ in 0..LOOKS {
        let list = events.list(&params).await.ok()?;
        let mut found = list.items.into_iter().filter_map(|event| event.message);
        if let Some(message) = found.find(|message| message.contains(&request)) {
            return Some(message);
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
    None
}
