//! `tulle tap`: single requests, as they end.
//!
//! ```text
//!   replicas  a stream from every replica of the operator: a sidecar is connected to one of them
//!   row       a request as a row of a table
//! ```
//! Sidecars filter and count; nothing is restarted. Lines go to standard output, and what they lack to standard error.

mod replicas;
mod row;
#[cfg(test)]
mod tests;

use std::time::Duration;

use clap::value_parser;
use hyper::header::HeaderName;
use tokio::time::{Instant, sleep_until};
use tulle_mesh::policy::Glob;
use tulle_mesh::query::{Tap, TapRequest};

use super::explain;
use crate::cluster::Context;
use crate::exists;
use crate::exit::{self, CliError};
use crate::human;
use crate::objects::{self, Kind};
use crate::output::{self, Format};
use crate::tenants::some_of;

use replicas::{Heard, Replicas};
use row::Columns;

/// Parameters of the query.
type Parameters = Vec<(&'static str, String)>;

/// Options of `tulle tap`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// The workload at whose pods requests are seen, as NAME, KIND/NAME or NAMESPACE/NAME; all of the namespace if absent
    #[arg(value_name = "WORKLOAD")]
    workload: Option<String>,
    /// Show only what is sent to this Service
    #[arg(long, value_name = "[NAMESPACE/]SERVICE", conflicts_with_all = ["from", "inbound"])]
    to: Option<String>,
    /// Show only what arrives from clients with this service account
    #[arg(long, value_name = "[NAMESPACE/]ACCOUNT", conflicts_with = "outbound")]
    from: Option<String>,
    /// Show only requests with this method
    #[arg(long)]
    method: Option<String>,
    /// Show only requests whose path this matches: * within a segment, ** across. What a client's sidecar shows is the
    /// path as it was sent on, after a route has rewritten it
    #[arg(long, value_name = "GLOB")]
    path: Option<String>,
    /// Show only requests with this status, such as 503 or 5xx
    #[arg(long)]
    status: Option<String>,
    /// Show only requests that a policy or a limit has refused. The sidecar of the server refuses, so that they are seen at
    /// its side: name the workload that they are sent to
    #[arg(long)]
    denied: bool,
    /// Show only requests that took at least this long, such as 200ms
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    slow: Option<Duration>,
    /// A header of the request to show; may be given several times. Those with credentials are refused
    #[arg(long = "header", short = 'H', value_name = "NAME")]
    headers: Vec<String>,
    /// How many requests each sidecar shows in a second at most; the others are counted
    #[arg(long, default_value_t = 20, value_parser = value_parser!(u32).range(1..=100))]
    rate: u32,
    /// Show only what arrives at the pods
    #[arg(long, conflicts_with = "outbound")]
    inbound: bool,
    /// Show only what the pods send
    #[arg(long)]
    outbound: bool,
    /// End after this time
    #[arg(long, value_name = "TIME", value_parser = human::duration)]
    timeout: Option<Duration>,
    /// End after so many requests
    #[arg(long, value_name = "COUNT", value_parser = value_parser!(u64).range(1..))]
    max: Option<u64>,
}

/// Runs `tulle tap` until Ctrl-C, or what `--timeout` and `--max` say.
///
/// # Errors
/// The command line is wrong, or the operator refuses or cannot be reached any more.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    if context.output.format == Format::Name {
        return Err(CliError::usage("requests have no names: write -o table, wide, json or yaml"));
    }
    let parameters = parameters(context, &args)?;
    known(context, &args, &parameters).await?;
    let end = args.timeout.map(|timeout| Instant::now() + timeout);
    let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
    let mut tally = Tally::default();
    let mut replicas = Replicas::new(context, parameters);
    let columns = Columns {
        wide: context.output.format == Format::Wide,
        headers: !args.headers.is_empty(),
        namespace: context.namespace().map(str::to_owned),
    };
    // Below what keeps it from beginning no head of a table is wanted.
    let mut head = context.output.headers && matches!(context.output.format, Format::Table | Format::Wide);
    while args.max.is_none_or(|max| tally.shown < max) {
        let heard = tokio::select! {
            interrupted = &mut interrupted => {
                interrupted.map_err(|error| CliError::failed(format!("cannot wait for Ctrl-C: {error}")))?;
                break;
            }
            () = until(end) => break,
            heard = replicas.next() => heard?,
        };
        if std::mem::take(&mut head) {
            output::write(&columns.head())?;
        }
        if let Some(request) = tally.take(heard) {
            output::write(&text(context.output.format, &columns, &request)?)?;
        }
    }
    tally.lines().iter().for_each(|line| exit::note(line));
    Ok(())
}

async fn until(end: Option<Instant>) {
    match end {
        Some(end) => sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// A request as it is printed.
fn text(format: Format, columns: &Columns, request: &TapRequest) -> Result<String, CliError> {
    let formless = |error: &dyn std::fmt::Display| {
        CliError::failed(format!("the request cannot be written in this format: {error}"))
    };
    match format {
        Format::Table | Format::Wide | Format::Name => Ok(columns.row(request)),
        Format::Json => match serde_json::to_string(request) {
            Ok(text) => Ok(text + "\n"),
            Err(error) => Err(formless(&error)),
        },
        Format::Yaml => match crate::yaml::to_string(request) {
            Ok(text) => Ok(format!("---\n{text}")),
            Err(error) => Err(formless(&error)),
        },
    }
}

/// What the operator is asked for.
fn parameters(context: &Context, args: &Args) -> Result<Parameters, CliError> {
    checked(args)?;
    let mut parameters = Parameters::new();
    let own = context.namespace();
    let workload = args.workload.as_deref().map(|text| explain::workload(text, own)).transpose()?;
    if let Some((namespace, name)) = workload {
        explain::visible(context, &namespace)?;
        parameters.extend([("namespace", namespace), ("name", name)]);
    } else {
        parameters.extend(own.map(|namespace| ("namespace", namespace.to_owned())));
    }
    let direction = match (args.inbound || args.from.is_some(), args.outbound || args.to.is_some()) {
        (true, _) => Some("inbound"),
        (_, true) => Some("outbound"),
        (false, false) => None,
    };
    parameters.extend(direction.map(|direction| ("direction", direction.to_owned())));
    if let Some(text) = args.to.as_deref().or(args.from.as_deref()) {
        parameters.push(("peer", peer(text, own)?));
    }
    for (name, value) in [("method", &args.method), ("path", &args.path), ("status", &args.status)] {
        parameters.extend(value.clone().map(|value| (name, value)));
    }
    if args.denied {
        parameters.push(("denied", "true".to_owned()));
    }
    if let Some(slow) = args.slow {
        if slow.is_zero() {
            return Err(CliError::usage("--slow is no time: leave it out to see all requests"));
        }
        parameters.push(("slow", slow.as_millis().to_string()));
    }
    parameters.extend(args.headers.iter().map(|header| ("header", header.clone())));
    parameters.push(("rate", args.rate.to_string()));
    Ok(parameters)
}

/// Fails where what is named does not exist.
async fn known(context: &Context, args: &Args, parameters: &Parameters) -> Result<(), CliError> {
    let of = |wanted: &str| {
        let mut values = parameters.iter().filter(|(name, _)| *name == wanted);
        values.next().map(|(_, value)| value.as_str())
    };
    if let (Some(namespace), Some(name)) = (of("namespace"), of("name")) {
        exists::named(context, &exists::WORKLOADS, namespace, name).await?;
    }
    match of("peer").and_then(|peer| peer.split_once('/')) {
        Some((namespace, name)) => exists::named(context, peers(args), namespace, name).await,
        None => Ok(()),
    }
}

/// What a peer may be. A pod that is dialled by its own address is shown as its service account.
fn peers(args: &Args) -> &'static [Kind] {
    const SENT_TO: [Kind; 2] = [objects::SERVICE, objects::SERVICE_ACCOUNT];
    const CLIENTS: [Kind; 1] = [objects::SERVICE_ACCOUNT];
    if args.to.is_some() { &SENT_TO } else { &CLIENTS }
}

/// Checks what the operator would refuse, so that it is a wrong command line here.
fn checked(args: &Args) -> Result<(), CliError> {
    if let Some(status) = args.status.as_deref()
        && !is_status(status)
    {
        let why = format!("--status is {status:?}: write one such as 503 or 5xx");
        return Err(CliError::Usage(why));
    }
    for header in &args.headers {
        if HeaderName::from_bytes(header.as_bytes()).is_err() {
            let why = format!(
                "--header is {header:?}, which is not the name of a header: write one such as user-agent"
            );
            return Err(CliError::Usage(why));
        }
        if tulle_mesh::tap::is_secret(header) {
            let why = format!("header {header} may hold credentials: no tap shows it, whoever asks");
            return Err(CliError::Usage(why));
        }
    }
    match args.path.as_deref().map(Glob::compile) {
        Some(Err(error)) => {
            Err(CliError::Usage(format!("--path is not a glob: {error}; write one such as /api/**")))
        }
        _ => Ok(()),
    }
}

/// Whether a text is a status code, such as 503, or a class of them, such as 5xx.
fn is_status(text: &str) -> bool {
    let class = text.strip_suffix("xx").or_else(|| text.strip_suffix("XX"));
    match class {
        Some(class) => class.parse().is_ok_and(|class: u32| (1..=5).contains(&class)),
        None => text.parse().is_ok_and(|status: u32| (100..=599).contains(&status)),
    }
}

/// A Service or service account as `namespace/name`.
fn peer(text: &str, namespace: Option<&str>) -> Result<String, CliError> {
    match (text.split_once('/'), namespace) {
        (Some((namespace, name)), _) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(text.to_owned())
        }
        (None, Some(namespace)) => Ok(format!("{namespace}/{text}")),
        (None, None) => Err(CliError::usage(format!("which namespace is {text} in? Write NAMESPACE/{text}"))),
        (Some(_), _) => Err(CliError::usage(format!("{text:?} is not a name: write NAMESPACE/NAME"))),
    }
}

/// What has been shown, and what not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    /// Requests that were printed.
    shown: u64,
    /// Requests that passed the filter, as far as sidecars have counted them.
    passed: u64,
    /// Of these: not shown.
    lost: u64,
    /// It has been said that some sidecars are not looked at.
    is_partial: bool,
}

impl Tally {
    /// Counts what a replica has said. Returns a request that is to be printed.
    fn take(&mut self, heard: Heard) -> Option<TapRequest> {
        match heard {
            Heard::Line(Tap::Request(request)) => {
                self.shown += 1;
                return Some(*request);
            }
            Heard::Line(Tap::Counts { passed, lost, not_shown, refused }) => {
                self.passed = self.passed.saturating_add(passed);
                self.lost = self.lost.saturating_add(lost);
                self.missing(not_shown, &refused).iter().for_each(|line| exit::note(line));
            }
            Heard::Line(Tap::Started { unable, .. }) => {
                if let Some(line) = unable_line(&unable) {
                    exit::note(&line);
                }
            }
            Heard::NobodyThere => exit::note(
                "note: no sidecar that this looks at is connected yet; `tulle pods` shows the sidecars",
            ),
        }
        None
    }

    /// Lines about sidecars that do not show their requests.
    fn missing(&mut self, not_shown: Option<u64>, refused: &[String]) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(count) = not_shown.filter(|_| !self.is_partial) {
            self.is_partial = true;
            lines.push(format!(
                "note: not all requests are shown: this tap does not look at {count} more sidecars of a replica of the \
                 operator, since there are too many; name a workload with fewer pods"
            ));
        }
        if !refused.is_empty() {
            lines.push(format!("note: not shown, because their sidecars refuse it: {}", some_of(refused)));
        }
        lines
    }

    /// The last lines. Counts come every second, so that some of the last requests may not be counted yet.
    fn lines(&self) -> Vec<String> {
        let passed = self.passed.max(self.shown.saturating_add(self.lost));
        let mut lines = vec![format!("{} shown, {passed} passed the filter, {} lost", self.shown, self.lost)];
        if passed == 0 {
            lines.push(
                "note: no request has passed the filter; `tulle pods` shows the sidecars, and `tulle stat` counts \
                 connections that were refused before there was a request"
                    .to_owned(),
            );
        }
        lines
    }
}

/// A line about pods whose sidecars cannot show requests.
fn unable_line(pods: &[String]) -> Option<String> {
    if pods.is_empty() {
        return None;
    }
    let pods = output::plain(&some_of(pods));
    Some(format!("note: not shown, because their sidecars are older than this command: {pods}; restart them"))
}
