//! `tulle stat`: success rate, requests per second and latencies.

use std::time::Duration;

use tulle_mesh::query::{By, Golden, Meshed, Party, Paths, Stat, StatRow};

use crate::cluster::{Context, Operator};
use crate::exists;
use crate::exit::CliError;
use crate::human;
use crate::objects::{self, Kind};
use crate::output::{Colour, Output, Table};
use crate::refresh::{self, Frame};

#[cfg(test)]
mod tests;

/// The shortest and the longest time that the operator sums.
const WINDOW: std::ops::RangeInclusive<u64> = 10..=21_600;

/// The kind of a workload that is a pod of its own.
const POD: &str = "Pod";

/// Options of `tulle stat`.
#[derive(clap::Args)]
pub struct Args {
    /// What rows are about: workload, service, route or revision, or a kind of workload like deploy; with a name, as in
    /// service/web, only that one
    #[arg(value_name = "KIND[/NAME]", default_value = "workload")]
    target: String,
    /// The name, if it is not said as KIND/NAME
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Count only what this workload has sent
    #[arg(long, value_name = "[NAMESPACE/]WORKLOAD", conflicts_with = "to")]
    from: Option<String>,
    /// Count only what was sent to this workload
    #[arg(long, value_name = "[NAMESPACE/]WORKLOAD")]
    to: Option<String>,
    #[command(flatten)]
    shown: Shown,
}

/// What time `stat`, `edges` and `routes` are about, and how often they look.
#[derive(clap::Args)]
pub struct Shown {
    /// The time that is summed, from 10s to 6h
    #[arg(long, default_value = "60s", value_parser = human::duration)]
    pub window: Duration,
    /// Refresh every two seconds, until Ctrl-C
    #[arg(short, long)]
    pub watch: bool,
}

/// What rows are about.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    by: By,
    /// Only workloads of this kind.
    kind: Option<&'static str>,
    /// Only what has this name.
    name: Option<String>,
}

/// Runs `tulle stat`.
///
/// # Errors
/// The command line is wrong, or the operator gave no answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let target = Target::read(&args.target, args.name.as_deref())?;
    let asked = args.shown.window;
    let window = window(asked)?;
    let (namespace, output) = (context.namespace(), &context.output);
    let from = args.from.map(|workload| qualified(&workload, namespace)).transpose()?;
    let to = args.to.map(|workload| qualified(&workload, namespace)).transpose()?;
    refresh::show(context, args.shown.watch, async |operator: &Operator| {
        let mut parameters = vec![("by", word(target.by)), ("window", window.as_str())];
        let optional = [
            ("namespace", namespace),
            ("name", target.name.as_deref()),
            ("from", from.as_deref()),
            ("to", to.as_deref()),
        ];
        parameters.extend(optional.into_iter().filter_map(|(key, value)| Some((key, value?))));
        let mut stat: Stat = operator.get(Paths::STAT, &parameters).await?;
        stat.rows.retain(|row| target.kind.is_none_or(|kind| kind == row.party.kind));
        let mut notes = notes(asked.as_secs(), stat.window, stat.lost);
        if stat.rows.is_empty() {
            let workloads = from.as_deref().or(to.as_deref());
            known(context, &target, workloads).await?;
        }
        match target.kind {
            Some(POD) => notes.push(of_pods(namespace)),
            _ if stat.rows.is_empty() => notes.push(nothing(namespace, asked)),
            _ => {}
        }
        let table = |wide| table(&stat, target.by, namespace.is_none(), wide, output);
        Ok(Frame { text: output.text(&stat, table)?, notes })
    })
    .await
}

/// Fails where nothing is counted because what is named does not exist. The names of routes, and names in all namespaces,
/// are not looked up.
async fn known(context: &Context, target: &Target, workload: Option<&str>) -> Result<(), CliError> {
    if let (Some(name), Some(namespace)) = (&target.name, context.namespace()) {
        let kinds = target.kinds();
        if !kinds.is_empty() {
            exists::named(context, &kinds, namespace, name).await?;
        }
    }
    match workload.and_then(|workload| workload.split_once('/')) {
        Some((namespace, name)) => exists::named(context, &exists::WORKLOADS, namespace, name).await,
        None => Ok(()),
    }
}

impl Target {
    /// What may have its name. Empty: it is not looked up.
    fn kinds(&self) -> Vec<Kind> {
        match (self.by, self.kind) {
            (By::Service, _) => vec![objects::SERVICE],
            (By::Route, _) => Vec::new(),
            (By::Workload | By::Revision, None) => exists::WORKLOADS.to_vec(),
            (By::Workload | By::Revision, Some(kind)) => {
                exists::WORKLOADS.into_iter().filter(|known| known.kind == kind).collect()
            }
        }
    }

    fn read(target: &str, name: Option<&str>) -> Result<Self, CliError> {
        let (kind, inner) = match target.split_once('/') {
            Some((kind, name)) => (kind, Some(name)),
            None => (target, None),
        };
        let name = match (inner, name) {
            (Some(_), Some(_)) => return Err(CliError::usage("two names: say KIND/NAME or KIND NAME")),
            (Some(""), None) => {
                return Err(CliError::usage(format!("`{target}` has no name after the slash")));
            }
            (inner, outer) => inner.or(outer).map(str::to_owned),
        };
        let (by, kind) = match kind.to_ascii_lowercase().as_str() {
            "workload" | "workloads" | "wl" => (By::Workload, None),
            "deployment" | "deployments" | "deploy" => (By::Workload, Some("Deployment")),
            "statefulset" | "statefulsets" | "sts" => (By::Workload, Some("StatefulSet")),
            "daemonset" | "daemonsets" | "ds" => (By::Workload, Some("DaemonSet")),
            "job" | "jobs" => (By::Workload, Some("Job")),
            "pod" | "pods" | "po" => (By::Workload, Some(POD)),
            "service" | "services" | "svc" => (By::Service, None),
            "route" | "routes" => (By::Route, None),
            "revision" | "revisions" | "rev" => (By::Revision, None),
            _ => {
                return Err(CliError::usage(format!(
                    "unknown kind `{kind}`: say workload, service, route or revision, \
                     or for a workload of that name workload/{kind}"
                )));
            }
        };
        Ok(Self { by, kind, name })
    }
}

/// The value of the parameter `by`.
pub fn word(by: By) -> &'static str {
    match by {
        By::Workload => "workload",
        By::Service => "service",
        By::Route => "route",
        By::Revision => "revision",
    }
}

/// The value of the parameter `window`.
///
/// # Errors
/// The operator does not sum such a time.
pub fn window(window: Duration) -> Result<String, CliError> {
    match window.as_secs() {
        seconds if WINDOW.contains(&seconds) => Ok(seconds.to_string()),
        _ => Err(CliError::usage("--window is shorter than 10s or longer than 6h")),
    }
}

/// `namespace/name` of a workload that may lack its namespace.
fn qualified(workload: &str, namespace: Option<&str>) -> Result<String, CliError> {
    let (namespace, name) = super::explain::workload(workload, namespace)?;
    Ok(format!("{namespace}/{name}"))
}

/// What is missing in counts.
pub fn notes(asked: u64, window: u64, lost: u64) -> Vec<String> {
    let mut notes = Vec::new();
    if window < asked {
        let known = human::age(Duration::from_secs(window));
        notes.push(format!("only the last {known} are known: the operator has no older counts"));
    }
    if lost > 0 {
        let reports = if lost == 1 { "1 report was".to_owned() } else { format!("{lost} reports were") };
        notes.push(format!("{reports} lost on the way from sidecars: the counts are too low"));
    }
    notes
}

/// Why a table may be empty.
pub fn nothing(namespace: Option<&str>, window: Duration) -> String {
    let place = namespace.map_or("any namespace".to_owned(), |namespace| format!("namespace {namespace}"));
    let window = human::age(window);
    format!(
        "no sidecar has counted this in {place} in the last {window}; `tulle pods` shows which pods have a sidecar"
    )
}

/// What rows about pods leave out: what a pod of a Deployment has served is counted for the Deployment.
fn of_pods(namespace: Option<&str>) -> String {
    let scope = namespace.map_or(" -A".to_owned(), |namespace| format!(" -n {namespace}"));
    let tap = namespace.map_or(" -n NAMESPACE".to_owned(), |namespace| format!(" -n {namespace}"));
    format!(
        "only pods that belong to no workload have counts of their own: `tulle stat workload{scope}` shows the others by \
         workload, and `tulle tap WORKLOAD{tap} --status 5xx -o wide` names the pod of each request that fails"
    )
}

/// The failure that was counted most.
pub fn worst(golden: &Golden) -> String {
    golden.reasons.first().map_or_else(|| human::UNKNOWN.to_owned(), |reason| reason.name.clone())
}

/// The success rate, coloured where it is low.
pub fn success(golden: &Golden, output: &Output) -> String {
    let text = human::percent(golden.success);
    match golden.success {
        Some(part) if part < 0.95 => output.paint(Colour::Red, &text),
        Some(part) if part < 0.99 => output.paint(Colour::Yellow, &text),
        _ => text,
    }
}

fn table(stat: &Stat, by: By, with_namespace: bool, wide: bool, output: &Output) -> Table {
    let mut headers = Vec::new();
    if with_namespace {
        headers.push("NAMESPACE");
    }
    headers.push("NAME");
    let own: &[&'static str] = match by {
        By::Workload => &["MESHED"],
        By::Revision => &["REVISION", "MESHED"],
        By::Route => &["SERVICE"],
        By::Service => &[],
    };
    headers.extend(own);
    headers.extend(["RPS", "SUCCESS", "P50", "P95", "P99", "WORST"]);
    if wide {
        headers.extend(["RETRIES", "TIMEOUTS", "4XX", "ABANDONED", "DENIED", "CONNS", "IN", "OUT"]);
    }
    let first = stat.rows.first().map(|row| row.party.kind.as_str());
    let mixed = stat.rows.iter().any(|row| Some(row.party.kind.as_str()) != first);
    let rows = stat.rows.iter().map(|row| {
        let mut cells = Vec::with_capacity(headers.len());
        if with_namespace {
            cells.push(row.party.namespace.clone());
        }
        cells.extend(names(row, by, mixed));
        cells.extend(signals(&row.golden, output));
        if wide {
            cells.extend(more(&row.golden, stat.window));
        }
        cells
    });
    Table { rows: rows.collect(), headers }
}

/// The cells that say what a row is about.
fn names(row: &StatRow, by: By, mixed: bool) -> Vec<String> {
    let name = if mixed { qualified_by_kind(&row.party) } else { row.party.name.clone() };
    let unknown = || human::UNKNOWN.to_owned();
    match by {
        By::Workload => vec![name, meshed(row.meshed)],
        By::Revision => vec![name, row.revision.clone().unwrap_or_else(unknown), meshed(row.meshed)],
        By::Route => vec![route_of(row.route.as_deref(), &row.party.namespace), name],
        By::Service => vec![name],
    }
}

fn qualified_by_kind(party: &Party) -> String {
    format!("{}/{}", party.kind.to_ascii_lowercase(), party.name)
}

/// `httproute/name` of `HTTPRoute/namespace/name`.
pub fn route(route: Option<&str>) -> String {
    let Some(route) = route else { return human::UNKNOWN.to_owned() };
    match route.splitn(3, '/').collect::<Vec<_>>().as_slice() {
        [kind, _, name] => format!("{}/{name}", kind.to_ascii_lowercase()),
        _ => route.to_owned(),
    }
}

/// The same beside a Service of this namespace: `client/httproute/name` of another one, where a route of the same name
/// may be that concerns other clients.
pub fn route_of(named: Option<&str>, namespace: &str) -> String {
    let own = named.and_then(|named| named.split('/').nth(1)).filter(|own| *own != namespace);
    let name = route(named);
    own.map_or_else(|| name.clone(), |own| format!("{own}/{name}"))
}

fn meshed(meshed: Option<Meshed>) -> String {
    meshed.map_or_else(|| human::UNKNOWN.to_owned(), |meshed| format!("{}/{}", meshed.with, meshed.of))
}

/// RPS SUCCESS P50 P95 P99 WORST.
pub fn signals(golden: &Golden, output: &Output) -> [String; 6] {
    [
        human::rate(golden.rps),
        success(golden, output),
        human::millis(golden.p50_ms),
        human::millis(golden.p95_ms),
        human::millis(golden.p99_ms),
        worst(golden),
    ]
}

/// RETRIES TIMEOUTS 4XX ABANDONED DENIED CONNS IN OUT, in a window of so many seconds.
fn more(golden: &Golden, window: u64) -> [String; 8] {
    [
        human::count(golden.retries),
        human::count(golden.timeouts),
        human::count(golden.client_errors),
        human::count(golden.abandoned),
        human::count(golden.denied),
        human::count(golden.connections),
        human::bytes_per_second(golden.bytes_up, window),
        human::bytes_per_second(golden.bytes_down, window),
    ]
}
