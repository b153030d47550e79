//! `tulle config`: what a pod's sidecar works with, from its own admin port. There are no secrets in it.

pub(crate) mod forward;
mod sections;
#[cfg(test)]
mod tests;

use clap::ValueEnum;
use k8s_openapi::jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;
use tulle_mesh::ports;
use tulle_mesh::query::Sidecar;

use super::pods;
use crate::cluster::Context;
use crate::exit::CliError;
use crate::output::{Format, Table, write};

/// Arguments of `tulle config`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Name of the pod, also as kubectl writes it: pod/NAME
    #[arg(value_parser = pod_name)]
    pod: String,
    /// What to show
    #[arg(value_enum, default_value = "all")]
    section: Section,
    /// Compare what the sidecar has with what the operator has sent it
    #[arg(long)]
    diff: bool,
}

/// The name of a pod, with or without its kind before it.
fn pod_name(text: &str) -> Result<String, String> {
    let name = match text.split_once('/') {
        None => text,
        Some(("pod" | "pods" | "po", name)) => name,
        Some((kind, _)) => return Err(format!("{kind} is not the kind of a pod: write pod/NAME or NAME")),
    };
    if name.is_empty() { Err("the name is empty".to_owned()) } else { Ok(name.to_owned()) }
}

/// A part of a sidecar's configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Section {
    /// Addresses that the pod has called, and what each leads to
    Services,
    /// Rules of routes
    Routes,
    /// Policies for what the pod serves and for what it calls
    Policies,
    /// Endpoints of the Services that it has called
    Endpoints,
    /// Its certificate
    Certs,
    /// All of these
    All,
}

impl Section {
    const EACH: [Self; 5] = [Self::Services, Self::Routes, Self::Policies, Self::Endpoints, Self::Certs];

    fn title(self) -> &'static str {
        match self {
            Self::Services => "Services",
            Self::Routes => "Routes",
            Self::Policies => "Policies",
            Self::Endpoints => "Endpoints",
            Self::Certs => "Certificate",
            Self::All => "All",
        }
    }

    fn table(self, config: &Value, now: i64) -> Table {
        match self {
            Self::Services | Self::All => sections::services(config),
            Self::Routes => sections::routes(config),
            Self::Policies => sections::policies(config),
            Self::Endpoints => sections::endpoints(config),
            Self::Certs => sections::certificate(config, now),
        }
    }
}

/// Runs `tulle config`.
///
/// # Errors
/// The pod has no sidecar, or no port of it can be forwarded.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let Some(namespace) = context.namespace() else {
        let what = "a pod is in one namespace: use -n NAMESPACE instead of -A";
        return Err(CliError::Usage(what.to_owned()));
    };
    let client = context.streams().await?;
    let body = forward::get(&client, namespace, &args.pod, ports::ADMIN, "/config").await?;
    let config: Value = serde_json::from_slice(&body).map_err(|error| {
        CliError::failed(format!(
            "the sidecar of {namespace}/{} answers with invalid JSON: {error}",
            args.pod
        ))
    })?;
    let now = Timestamp::now().as_second();
    if args.diff {
        return diff(context, namespace, &args.pod, &config, now).await;
    }
    show(context, args.section, &config, now)
}

fn show(context: &Context, section: Section, config: &Value, now: i64) -> Result<(), CliError> {
    let output = &context.output;
    match (section, output.format) {
        (Section::All, Format::Table | Format::Wide) => {
            for section in Section::EACH {
                write(&format!("{}\n", section.title()))?;
                output.print(&(), |_| section.table(config, now))?;
                if section != Section::Certs {
                    write("\n")?;
                }
            }
            Ok(())
        }
        (Section::All, _) => output.print(config, |_| sections::services(config)),
        _ => {
            let table = section.table(config, now);
            output.print(&sections::objects(&table), |_| table)
        }
    }
}

/// A line of `--diff`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Line {
    what: &'static str,
    sidecar: String,
    operator: String,
    same: bool,
}

async fn diff(
    context: &Context,
    namespace: &str,
    pod: &str,
    config: &Value,
    now: i64,
) -> Result<(), CliError> {
    let known = pods::sidecars(context).await?.sidecars;
    let Some(known) = known.into_iter().find(|known| known.namespace == namespace && known.pod == pod) else {
        let what = format!("the operator does not know the sidecar of {namespace}/{pod}, which answers");
        return Err(CliError::failed(what).hint("tulle check says whether the operator runs"));
    };
    let lines = lines(config, &known, now);
    context.output.print(&lines, |_| {
        let row = |line: &Line| {
            let same = if line.same { "yes" } else { "no" };
            vec![line.what.to_owned(), line.sidecar.clone(), line.operator.clone(), same.to_owned()]
        };
        Table { headers: vec!["WHAT", "SIDECAR", "OPERATOR", "SAME"], rows: lines.iter().map(row).collect() }
    })
}

/// What the sidecar has, beside what the operator knows of it. `now` in Unix seconds.
fn lines(config: &Value, known: &Sidecar, now: i64) -> Vec<Line> {
    let connection = |is: bool| if is { "connected" } else { "not connected" }.to_owned();
    let line = |what, sidecar: String, operator: String| {
        let same = sidecar == operator;
        Line { what, sidecar, operator, same }
    };
    let version = config.get("version").and_then(Value::as_str).unwrap_or("-").to_owned();
    let is_connected = config.get("operatorConnected").and_then(Value::as_bool).unwrap_or(false);
    let not_after = config.get("certificateNotAfter").and_then(Value::as_i64);
    let mut lines = vec![
        line(
            "version",
            version,
            if known.version.is_empty() { "-".to_owned() } else { known.version.clone() },
        ),
        line("stream", connection(is_connected), connection(known.connected)),
        line("certificate", pods::left(not_after, now), pods::left(known.certificate_not_after, now)),
        line(
            "resources",
            format!("{} acknowledged", known.acknowledged),
            match known.behind_seconds {
                Some(behind) => format!("{} sent, the oldest waits for {behind} s", known.resources),
                None => format!("{} sent", known.resources),
            },
        ),
    ];
    if let Some(resources) = lines.last_mut() {
        resources.same = known.acknowledged == known.resources;
    }
    let refused = known.refused.iter().map(|why| Line {
        what: "refused",
        sidecar: why.clone(),
        operator: "sent".to_owned(),
        same: false,
    });
    lines.extend(refused);
    lines
}
