//! `canary status`: once, or again and again until the rollout has ended.

use std::time::Duration;

use futures::future::FutureExt as _;
use futures::stream::{BoxStream, StreamExt as _, select};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::time::{Instant, sleep, sleep_until};
use tulle_crds::Canary;

use super::attempts;
use super::pods::{self, Target};
use super::view::{End, View, end, on_its_way};
use super::{canaries, get, namespace_of};
use crate::cluster::{Context, within};
use crate::exit::{CliError, note};
use crate::output::{Format, write};
use crate::refresh::{self, Frame};

/// Ages are redrawn this often when nothing else changes.
const TICK: Duration = Duration::from_secs(5);
/// Changes that come together are drawn together.
const TOGETHER: Duration = Duration::from_millis(200);
/// For how long a target must have only its approved revision before it counts as at rest. The operator sees a new
/// template some time after this command may.
const AT_REST: Duration = Duration::from_secs(5);
/// So many looks in a row may fail before the command gives up, unless the user has set a time.
const MOST_FAILURES: u32 = 6;

/// Arguments of `canary status`.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name of the Canary.
    name: String,
    /// Watch until the rollout has ended. Exit code 0: it was promoted; 3: it failed or was aborted.
    #[arg(short, long)]
    watch: bool,
    /// With --watch: give up after this time, with exit code 4.
    #[arg(long, requires = "watch", value_parser = crate::human::duration)]
    timeout: Option<Duration>,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let namespace = namespace_of(context)?;
    let client = context.client().await?;
    if args.watch {
        return watch(context, &client, namespace, &args).await;
    }
    let (canary, target) = look(&client, namespace, &args.name).await?;
    print(context, &canary, &View::of(&canary, &target.pods))?;
    match context.output.format {
        Format::Wide => attempts::print(context, namespace, &args.name).await,
        _ => Ok(()),
    }
}

fn print(context: &Context, canary: &Canary, view: &View) -> Result<(), CliError> {
    let now = Timestamp::now();
    match context.output.format {
        Format::Table | Format::Wide => write(&view.text(now, &context.output)),
        Format::Json | Format::Yaml | Format::Name => {
            context.output.print(view, |_| super::table([canary], false, now))
        }
    }
}

async fn look(client: &Client, namespace: &str, name: &str) -> Result<(Canary, Target), CliError> {
    let looked = async {
        let canary = get(&canaries(client.clone(), namespace), namespace, name).await?;
        let target = pods::look(client, namespace, &canary.spec.target).await?;
        Ok::<_, CliError>((canary, target))
    };
    within("reading the Canary and its pods", looked).await
}

/// Whether a target without a rollout stays as it is.
#[derive(Debug, Default)]
pub(super) struct Rest {
    /// When it was first seen with its approved revision only.
    since: Option<Instant>,
}

impl Rest {
    /// Takes a look into account; whether the target has been at rest in two looks that are far enough from each other.
    pub(super) fn is_over(&mut self, only_approved: bool, now: Instant) -> bool {
        if !only_approved {
            self.since = None;
            return false;
        }
        now.duration_since(*self.since.get_or_insert(now)) >= AT_REST
    }
}

/// What a watch has seen so far.
#[derive(Default)]
struct Watch {
    /// The revision that was on its way last.
    revision: Option<String>,
    drawn: Option<View>,
    failures: u32,
    rest: Rest,
    /// Whether the reader knows what is waited for.
    said: bool,
}

impl Watch {
    /// Draws what was seen; how the rollout has ended, if it has.
    fn take(&mut self, context: &Context, canary: &Canary, target: &Target) -> Result<Option<End>, CliError> {
        self.failures = 0;
        let status = canary.status.clone().unwrap_or_default();
        if let Some(revision) = on_its_way(&status) {
            self.revision = Some(revision.to_owned());
        }
        let view = View::of(canary, &target.pods);
        draw(context, &view, self.drawn.as_ref())?;
        self.drawn = Some(view);
        let ended = end(self.revision.as_deref(), &status);
        if self.revision.is_some() || !matches!(ended, Some(End::Promoted(_))) {
            return Ok(ended);
        }
        let only_approved = target.has_only(&status.approved_revision);
        if self.rest.is_over(only_approved, Instant::now()) {
            return Ok(ended);
        }
        if !only_approved && !self.said {
            self.said = true;
            let revision = &status.approved_revision;
            note(&format!(
                "waiting: the target changes, or has pods of another revision than {revision}, and the operator has begun no rollout yet"
            ));
        }
        Ok(None)
    }
}

async fn watch(context: &Context, client: &Client, namespace: &str, args: &Args) -> Result<(), CliError> {
    let timeout = args.timeout.unwrap_or(Duration::MAX);
    let deadline = Instant::now().checked_add(timeout);
    let watching = follow(context, client, namespace, &args.name, args.timeout.is_some());
    let out_of_time = async {
        match deadline {
            Some(deadline) => sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    };
    // Around all of it: a request that hangs must not outlast the time that the user has given.
    tokio::select! {
        ended = watching => ended,
        () = out_of_time => {
            let seconds = timeout.as_secs();
            let what = format!("the rollout of Canary {namespace}/{} has not ended in {seconds} s", args.name);
            Err(CliError::TimedOut(what))
        }
    }
}

/// Looks again and again until the rollout has ended. `patient`: failures do not end it once a look has succeeded.
async fn follow(
    context: &Context,
    client: &Client,
    namespace: &str,
    name: &str,
    patient: bool,
) -> Result<(), CliError> {
    let mut changes = changes(&context.streams().await?, namespace, name);
    let mut watch = Watch::default();
    loop {
        match look(client, namespace, name).await {
            Ok((canary, target)) => {
                if let Some(ended) = watch.take(context, &canary, &target)? {
                    return finish(context, &canary, watch.drawn.as_ref(), ended);
                }
            }
            Err(error) => {
                watch.failures += 1;
                if gives_up(watch.drawn.is_some(), watch.failures, patient) {
                    return Err(error);
                }
            }
        }
        tokio::select! {
            _ = changes.next() => {}
            () = sleep(TICK) => {}
        }
        sleep(TOGETHER).await;
        while let Some(Some(())) = changes.next().now_or_never() {}
    }
}

/// Whether a failed look ends the command. The first one must succeed; a rollout is longer than most outages of an API
/// server.
pub(super) fn gives_up(has_succeeded: bool, failures: u32, patient: bool) -> bool {
    !has_succeeded || (!patient && failures > MOST_FAILURES)
}

/// On a terminal the picture is redrawn; elsewhere what has changed is added.
fn draw(context: &Context, view: &View, drawn: Option<&View>) -> Result<(), CliError> {
    let text = || view.text(Timestamp::now(), &context.output);
    if context.output.is_interactive() {
        return refresh::replace(&Frame { text: text(), notes: Vec::new() });
    }
    let is_text = matches!(context.output.format, Format::Table | Format::Wide);
    match drawn {
        Some(drawn) if drawn == view => Ok(()),
        _ if !is_text => Ok(()),
        Some(_) => write(&format!("\n{}", text())),
        None => write(&text()),
    }
}

fn finish(context: &Context, canary: &Canary, view: Option<&View>, ended: End) -> Result<(), CliError> {
    let (sentence, result) = match ended {
        End::Promoted(sentence) => (sentence, Ok(())),
        End::Failed(sentence) => (sentence, Err(CliError::Findings)),
    };
    match (context.output.format, view) {
        (Format::Table | Format::Wide, _) => write(&format!("\n{sentence}\n"))?,
        (_, Some(view)) => print(context, canary, view)?,
        (_, None) => {}
    }
    result
}

/// One `()` for each change of the Canary or of a pod of its namespace.
fn changes(client: &Client, namespace: &str, name: &str) -> BoxStream<'static, ()> {
    let one = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let canary = watcher(canaries(client.clone(), namespace), one).default_backoff().map(|_| ());
    let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = watcher(pods, watcher::Config::default()).default_backoff().map(|_| ());
    select(canary, pods).boxed()
}
