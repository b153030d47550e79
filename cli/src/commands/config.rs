//! `tulle config`: what a pod's sidecar works with, from its own admin port. There are no secrets in it.
//!
//! ```text
//!   forward     one request to the sidecar
//!   sections    its configuration as tables
//!   difference  beside what the operator has
//!   content     resources as JSON
//!   compare     how two resources differ
//! ```

mod compare;
mod content;
mod difference;
pub(crate) mod forward;
mod sections;
#[cfg(test)]
mod tests;

use clap::ValueEnum;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use tulle_mesh::ports;

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
    /// Compare what the sidecar has with what the operator would send it now, resource by resource
    #[arg(long, conflicts_with = "section")]
    diff: bool,
}

/// The name of a pod, with or without its kind before it.
fn pod_name(text: &str) -> Result<String, String> {
    let name = match text.split_once('/') {
        None => text,
        Some(("pod" | "pods" | "po", name)) => name,
        Some((kind, _)) => {
            return Err(format!(
                "{kind} is not the kind of a pod: write pod/NAME or NAME, and the namespace as -n NAMESPACE"
            ));
        }
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
        return difference::diff(context, namespace, &args.pod, &config, now).await;
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
