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

use super::view::{End, View, end, on_its_way};
use super::{canaries, get, namespace_of, pods};
use crate::cluster::Context;
use crate::exit::CliError;
use crate::output::{Format, write};

/// Ages are redrawn this often when nothing else changes.
const TICK: Duration = Duration::from_secs(5);
/// Changes that come together are drawn together.
const TOGETHER: Duration = Duration::from_millis(200);
/// So many looks in a row may fail before the command gives up.
const MOST_FAILURES: u32 = 6;
/// From the top of an empty terminal.
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

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
    let (canary, view) = look(&client, namespace, &args.name).await?;
    print(context, &canary, &view)
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

async fn look(client: &Client, namespace: &str, name: &str) -> Result<(Canary, View), CliError> {
    let canary = get(&canaries(client.clone(), namespace), namespace, name).await?;
    let pods = pods::list(client, namespace, &canary.spec.target).await?;
    let view = View::of(&canary, &pods);
    Ok((canary, view))
}

async fn watch(context: &Context, client: &Client, namespace: &str, args: &Args) -> Result<(), CliError> {
    let timeout = args.timeout.unwrap_or(Duration::MAX);
    let deadline = Instant::now().checked_add(timeout);
    let mut changes = changes(client, namespace, &args.name);
    let mut watched: Option<String> = None;
    let mut drawn: Option<View> = None;
    let mut failures = 0;
    loop {
        match look(client, namespace, &args.name).await {
            Ok((canary, view)) => {
                failures = 0;
                let status = canary.status.clone().unwrap_or_default();
                if let Some(revision) = on_its_way(&status) {
                    watched = Some(revision.to_owned());
                }
                let ended = end(watched.as_deref(), &status);
                draw(context, &view, drawn.as_ref())?;
                drawn = Some(view);
                if let Some(ended) = ended {
                    return finish(context, &canary, drawn.as_ref(), ended);
                }
            }
            // The first look must succeed; a rollout is longer than most outages of an API server.
            Err(error) if drawn.is_none() || failures >= MOST_FAILURES => return Err(error),
            Err(_) => failures += 1,
        }
        let out_of_time = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = changes.next() => {}
            () = sleep(TICK) => {}
            () = out_of_time => {
                let seconds = timeout.as_secs();
                let what = format!("the rollout of Canary {namespace}/{} has not ended in {seconds} s", args.name);
                return Err(CliError::TimedOut(what));
            }
        }
        sleep(TOGETHER).await;
        while let Some(Some(())) = changes.next().now_or_never() {}
    }
}

/// On a terminal the picture is redrawn; elsewhere what has changed is added.
fn draw(context: &Context, view: &View, drawn: Option<&View>) -> Result<(), CliError> {
    let text = || view.text(Timestamp::now(), &context.output);
    if context.output.is_interactive() {
        return write(&format!("{CLEAR}{}", text()));
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
