//! `tulle inject`: what admission would make of a manifest's pods.
//!
//! Each pod, and a pod from each workload's template, is created as a dry run: the API server calls Tulle's webhook and all
//! others, and stores nothing. So what is printed is what the cluster would really do, in the version that is installed.

pub(crate) mod admission;
pub(crate) mod template;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::api::core::v1::Namespace;
use kube::api::PostParams;
use kube::core::Request;
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::keys;

use self::admission::{Answer, send};
use super::lint::read;
use crate::cluster::Context;
use crate::cluster::failure::cannot;
use crate::exit::{CliError, note};
use crate::output::{Colour, Format, Table, write};

/// Namespaces that Tulle's webhook is never called for, whatever their labels.
const NEVER: [&str; 3] = ["kube-system", "kube-public", "kube-node-lease"];

/// Arguments of `tulle inject`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Files, or directories with all files below them that end in .yaml, .yml or .json; `-`: standard input
    #[arg(short, long = "file", value_name = "FILE", num_args = 1.., required = true)]
    files: Vec<PathBuf>,
}

/// Runs `tulle inject`.
///
/// # Errors
/// [`CliError::Findings`] if a namespace does not ask for sidecars, or the API server would reject a pod: the other pods are
/// printed before. [`CliError::Failed`] if the files have no pod, or the API server does not answer.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let input = read::files(&args.files)?.whole()?;
    let default = context.namespace().unwrap_or("default");
    let client = context.client().await?;
    let mut namespaces: BTreeMap<&str, bool> = BTreeMap::new();
    let (mut pods, mut left_out) = (Vec::new(), 0_usize);
    for document in &input.documents {
        let namespace = document.namespace(default);
        let Some(pod) = template::pod(document, namespace) else { continue };
        let asks = match namespaces.get(namespace) {
            Some(asks) => *asks,
            None => {
                let refusal = check_namespace(&client, namespace).await?;
                refusal.iter().for_each(|error| error.print(&context.output));
                namespaces.insert(namespace, refusal.is_none());
                refusal.is_none()
            }
        };
        let label = document.label(default);
        let made = if asks { create(context, &client, namespace, &label, pod).await? } else { None };
        match made {
            Some(pod) => pods.push(pod),
            None => left_out += 1,
        }
    }
    if pods.is_empty() && left_out == 0 {
        let what = "the files have neither a Pod nor a workload with a template of pods";
        return Err(CliError::failed(what));
    }
    print(context, &pods)?;
    if left_out == 0 {
        return Ok(());
    }
    note(&format!("{left_out} of {} pods were left out", pods.len() + left_out));
    Err(CliError::Findings)
}

fn print(context: &Context, pods: &[Value]) -> Result<(), CliError> {
    match context.output.format {
        Format::Table | Format::Wide | Format::Yaml => {
            for pod in pods {
                let yaml = crate::yaml::to_string(pod);
                let yaml =
                    yaml.map_err(|error| CliError::failed(format!("the pod has no YAML form: {error}")))?;
                write(&format!("---\n{yaml}"))?;
            }
            Ok(())
        }
        Format::Json | Format::Name => context.output.print(&pods, |_| {
            let name =
                |pod: &Value| pod.pointer("/metadata/name").and_then(Value::as_str).unwrap_or("-").to_owned();
            Table { headers: vec!["NAME"], rows: pods.iter().map(|pod| vec![name(pod)]).collect() }
        }),
    }
}

/// Why nothing would be injected into the pods of a namespace: it must exist, and ask for sidecars.
async fn check_namespace(client: &Client, name: &str) -> Result<Option<CliError>, CliError> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let found = namespaces.get_opt(name).await;
    let found = found.map_err(|error| cannot(&format!("read namespace {name}"), &error))?;
    let Some(namespace) = found else {
        return Ok(Some(
            CliError::failed(format!("namespace {name} does not exist"))
                .hint("the dry run needs the namespace: create it, or choose another with -n"),
        ));
    };
    let labels = namespace.metadata.labels.unwrap_or_default();
    Ok(refusal(name, labels.get(keys::INJECT).map(String::as_str)))
}

/// Why a namespace gets no sidecars, by the value of its label.
fn refusal(namespace: &str, label: Option<&str>) -> Option<CliError> {
    if NEVER.contains(&namespace) {
        return Some(CliError::failed(format!("{namespace} never gets sidecars: it belongs to Kubernetes")));
    }
    let what = match label {
        Some("enabled" | "required") => return None,
        Some(other) => {
            format!(
                "namespace {namespace} has {}={other}, which is neither enabled nor required",
                keys::INJECT
            )
        }
        None => format!("namespace {namespace} has no label {}, so nothing is injected there", keys::INJECT),
    };
    let hint = format!("kubectl label --overwrite namespace {namespace} {}=enabled", keys::INJECT);
    Some(CliError::failed(what).hint(hint))
}

/// Creates a pod as a dry run; what admission has made of it. `None`: it would be rejected, which was printed.
async fn create(
    context: &Context,
    client: &Client,
    namespace: &str,
    label: &str,
    pod: Value,
) -> Result<Option<Value>, CliError> {
    let unsent = |why: String| CliError::failed(format!("cannot send the pod of {label}: {why}"));
    let body = serde_json::to_vec(&pod).map_err(|error| unsent(error.to_string()))?;
    let params = PostParams { dry_run: true, field_manager: Some("tulle-inject".to_owned()) };
    let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods")).create(&params, body);
    let request = request.map_err(|error| unsent(error.to_string()))?;
    let warn = |text: &str| {
        note(&format!("{} {label}: {text}", context.output.paint(Colour::Yellow, "warning:")));
    };
    match send(client, request).await? {
        Answer::Refused { message, warnings } => {
            warnings.iter().for_each(|warning| warn(warning));
            let what = format!("the API server would reject the pod of {label}: {message}");
            CliError::failed(what).print(&context.output);
            Ok(None)
        }
        Answer::Taken { object, warnings } => {
            warnings.iter().for_each(|warning| warn(warning));
            if let Some(why) = without_sidecar(&object, &warnings) {
                warn(&why);
            }
            Ok(Some(template::without_bookkeeping(object)))
        }
    }
}

/// How the webhook begins the warning about a pod that cannot have a sidecar.
const NO_SIDECAR: &str = "the pod gets no sidecar";

/// Why a pod has no sidecar, where it has none and no warning of the webhook has said it.
fn without_sidecar(pod: &Value, warnings: &[String]) -> Option<String> {
    let label = |key: &str| pod.pointer("/metadata/labels")?.get(key)?.as_str();
    if label(keys::INJECTED).is_some() || warnings.iter().any(|warning| warning.contains(NO_SIDECAR)) {
        return None;
    }
    let is_host = pod.pointer("/spec/hostNetwork").and_then(Value::as_bool).unwrap_or(false);
    Some(match label(keys::INJECT) {
        Some("disabled") => format!("no sidecar, because the pod has {}=disabled", keys::INJECT),
        _ if is_host => "no sidecar, because the pod uses the network of its node".to_owned(),
        _ => "no sidecar was injected: tulle check says whether the webhook runs".to_owned(),
    })
}
