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
use tulle_mesh::page;

use super::{canaries, get, namespace_of};
use crate::cluster::failure::cannot;
use crate::cluster::{Context, within};
use crate::exit::CliError;
use crate::objects::MANAGER;
use crate::output::{Format, write};

/// A status that changes between reading and writing is read again this often.
const ATTEMPTS: usize = 10;
/// The operator publishes its event after the status: it is looked for this often.
const LOOKS: usize = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// After a watch that broke, the Canary is read and watched again in this time.
const BETWEEN_WATCHES: Duration = Duration::from_secs(1);

/// Arguments of every action.
#[derive(clap::Args, Debug)]
pub(in crate::commands) struct Args {
    /// Name of the Canary.
    name: String,
    /// Revision that the action is meant for. Default: the one that is rolled out now. Nothing happens if another one is
    /// rolled out by the time the operator sees the action.
    #[arg(long)]
    revision: Option<String>,
    /// Where the rollout was when somebody decided ([`page::seen`]); `None`: wherever it is.
    #[arg(skip)]
    seen: Option<String>,
    /// How long to wait until the operator has taken the action.
    #[arg(long, default_value = "30s", value_parser = crate::human::duration)]
    timeout: Duration,
}

impl Args {
    /// The arguments of an action on a revision that somebody has seen, at a place of its rollout as [`page::seen`] writes it.
    pub(in crate::commands) fn of_page(
        name: &str,
        revision: String,
        seen: String,
        timeout: Duration,
    ) -> Self {
        Self { name: name.to_owned(), revision: Some(revision), seen: Some(seen), timeout }
    }
}

/// An action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
            // After an undo the target may be back at the approved revision before the operator sees the action.
            Self::Abort => {
                let is_back =
                    after.phase == Phase::Stable && after.approved_revision != before.canary_revision;
                is_back || after.phase == Phase::Failed
            }
            Self::Retry => after.phase != Phase::Failed,
        }
    }

    /// What was done, as a sentence.
    pub(super) fn done(self, revision: &str, after: &CanaryStatus) -> String {
        let target = &after.target;
        match self {
            Self::Promote => format!("revision {revision} of {target} is promoted"),
            Self::Pause => {
                format!("the rollout of revision {revision} of {target} pauses at {}%", after.weight)
            }
            Self::Resume => format!("the rollout of revision {revision} of {target} continues"),
            Self::Abort if after.phase == Phase::Stable => format!(
                "revision {revision} of {target} is not rolled out any more: the target is back at revision {}",
                after.approved_revision
            ),
            Self::Abort => format!(
                "revision {revision} of {target} is treated as failed and {}; its pods stay until the template is restored (tulle canary undo)",
                left_to_failed(after)
            ),
            Self::Retry => format!("revision {revision} of {target} goes through the steps again"),
        }
    }
}

/// What a failed revision gets. The column WEIGHT has what sidecars may still send it.
fn left_to_failed(status: &CanaryStatus) -> String {
    match (status.weight, status.weight_summary.as_str()) {
        (0, "" | "0%") => "gets no traffic".to_owned(),
        (0, sent) => format!("gets no traffic once every sidecar has acknowledged that ({sent} until then)"),
        (kept, _) => format!("keeps {kept}% of the traffic until other pods can carry it"),
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
            "is Failed: revision {} {}; promote or retry it, or restore the template with undo",
            status.canary_revision,
            left_to_failed(status)
        ),
    };
    Some(phase)
}

/// What a rollout is by now, as the end of a sentence that begins with the Canary; `None`: it is where it was `seen`.
pub(super) fn moved_on(status: &CanaryStatus, seen: &str) -> Option<String> {
    let phase = format!("{:?}", status.phase);
    if page::seen(&phase, status.step) == seen {
        return None;
    }
    let step = match status.step_summary.as_str() {
        "" => String::new(),
        step => format!(" at step {step}"),
    };
    Some(format!("is {phase}{step} by now, which the page did not show when it asked"))
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

/// Why an action is not known to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::commands) enum Undone {
    /// It was not done, and will not be.
    Not(CliError),
    /// It was requested, or may have been, and may be done yet.
    Unconfirmed(CliError),
}

impl From<Undone> for CliError {
    fn from(undone: Undone) -> Self {
        match undone {
            Undone::Not(error) | Undone::Unconfirmed(error) => error,
        }
    }
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
/// [`Undone::Not`]: the action would do nothing or has changed nothing, with the reason; the user may not request it.
/// [`Undone::Unconfirmed`]: the operator has not taken it in time, or nobody knows.
pub(in crate::commands) async fn act(
    client: &Client,
    streams: Client,
    namespace: &str,
    verb: Verb,
    args: &Args,
) -> Result<Done, Undone> {
    let id = fresh_id();
    let api = canaries(client.clone(), namespace);
    let mut is_sent = false;
    let requested = request(&api, namespace, verb, args, &id, &mut is_sent);
    let requested = within(&format!("requesting {}", verb.name()), requested).await;
    let before = match requested {
        Ok(before) => before,
        Err(error) if is_sent => return Err(Undone::Unconfirmed(error)),
        Err(error) => return Err(Undone::Not(error)),
    };
    let canary = taken(&api, &canaries(streams, namespace), namespace, verb, args, &id).await?;
    let status = canary.status.clone().unwrap_or_default();
    if !verb.has_effect(&before, &status) {
        let why = ignored(client, namespace, &args.name, verb, &id).await;
        let why = why.unwrap_or_else(|| format!("the Canary is {:?} now", status.phase));
        return Err(Undone::Not(CliError::failed(format!(
            "the operator has taken {}, and it changed nothing: {why}",
            verb.name()
        ))));
    }
    Ok(Done { sentence: verb.done(&before.canary_revision, &status), canary })
}

/// Writes the annotation; what the Canary was when it was written. `is_sent`: whether it may be written although this ends
/// with an error or is dropped.
async fn request(
    api: &Api<Canary>,
    namespace: &str,
    verb: Verb,
    args: &Args,
    id: &str,
    is_sent: &mut bool,
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
        if let Some(now) = args.seen.as_deref().and_then(|seen| moved_on(&status, seen)) {
            return Err(CliError::failed(format!(
                "{} was not requested, because Canary {namespace}/{} {now}",
                verb.name(),
                args.name
            )));
        }
        let action = annotation(verb, &status.canary_revision, id);
        let patch = patch(canary.metadata.resource_version.as_deref(), &action);
        *is_sent = true;
        let written = api.patch(&args.name, &params, &Patch::Merge(&patch)).await;
        *is_sent = written.as_ref().err().is_some_and(|error| !is_refused(error));
        match written {
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

/// Whether the API server has said that it has not written. Without an answer, and with one of its own failures, it may
/// have.
pub(super) fn is_refused(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(answer) if answer.code < 500)
}

/// Waits until the operator has taken the action. `api` reads, `streams` watches.
async fn taken(
    api: &Api<Canary>,
    streams: &Api<Canary>,
    namespace: &str,
    verb: Verb,
    args: &Args,
    id: &str,
) -> Result<Canary, Undone> {
    // A Canary that is deleted meanwhile takes nothing any more.
    let is_over = |canary: Option<&Canary>| canary.is_none_or(|canary| is_taken(canary, id));
    let until_over = async {
        loop {
            if let Ok(canary) = await_condition(streams.clone(), &args.name, is_over).await {
                return canary;
            }
            // The connection broke, say, or the user may not watch. The action was requested all the same.
            tokio::time::sleep(BETWEEN_WATCHES).await;
            if let Ok(canary) = api.get_opt(&args.name).await
                && is_over(canary.as_ref())
            {
                return canary;
            }
        }
    };
    let last = match tokio::time::timeout(args.timeout, until_over).await {
        Ok(canary) => Ok(canary),
        Err(_) => {
            within("reading the Canary once more", async {
                api.get_opt(&args.name).await.map_err(CliError::from)
            })
            .await
        }
    };
    let last = match last {
        Ok(Some(canary)) if is_taken(&canary, id) => return Ok(canary),
        Ok(None) => {
            let gone = format!("Canary {namespace}/{} was deleted", args.name);
            return Err(Undone::Not(CliError::failed(gone)));
        }
        Ok(Some(canary)) => Ok(canary),
        Err(error) => Err(error),
    };
    Err(late(&last, verb, id, args.timeout))
}

/// Why the operator has not taken an action in time, with what was read `last`: whether the request still stands.
pub(super) fn late(last: &Result<Canary, CliError>, verb: Verb, id: &str, limit: Duration) -> Undone {
    let (verb, seconds) = (verb.name(), limit.as_secs());
    let late = format!("the operator has not taken {verb} within {seconds} s");
    let requested = last.as_ref().map(|canary| canary.metadata.annotations.as_ref()?.get(keys::ACTION));
    match requested {
        Ok(Some(action)) if action.ends_with(&format!("@{id}")) => Undone::Unconfirmed(CliError::TimedOut(
            format!("{late}; the request still stands, and is taken once the operator runs: see tulle check"),
        )),
        Ok(_) => Undone::Not(CliError::failed(format!(
            "{late}, and the request does not stand any more: somebody has replaced or removed annotation {}",
            keys::ACTION
        ))),
        Err(error) => Undone::Unconfirmed(CliError::TimedOut(format!(
            "{late}, and whether the request still stands is unknown: {error}"
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
