//! Writes the objects, and waits for the control plane. Decisions are in [`super::plan`].

use std::time::Duration;

use kube::Client;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::Args;
use super::plan::{Change, conflict_hint, is_called, missing, obstacle, ordered, taken, title};
use crate::cluster::{Context, failure};
use crate::exit::{CliError, note};
use crate::manifests::DEPLOYMENTS;
use crate::objects::{self, Kind, MANAGER, name, namespace, text};
use crate::output::Table;
use crate::tenants;

/// How long the control plane may take to become available.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What would become of an object, as it is printed.
#[derive(Serialize)]
struct Row {
    kind: String,
    namespace: String,
    name: String,
    change: &'static str,
}

/// Prints what would change, as the API server says. Changes nothing.
pub async fn preview(context: &Context, objects: &[Value], args: &Args) -> Result<(), CliError> {
    let client = context.client().await?;
    let mut rows = Vec::new();
    for Planned { kind, new, live } in planned(&client, objects).await? {
        let change = match send(&client, kind, new, args, true).await? {
            Some(next) => Change::of(live.as_ref(), &next),
            None => Change::Created,
        };
        rows.push(Row {
            kind: kind.kind.to_owned(),
            namespace: namespace(new).to_owned(),
            name: name(new).to_owned(),
            change: change.name(),
        });
    }
    let cells =
        |row: &Row| vec![row.kind.clone(), row.namespace.clone(), row.name.clone(), row.change.to_owned()];
    context.output.print(&rows, |_| Table {
        headers: vec!["KIND", "NAMESPACE", "NAME", "CHANGE"],
        rows: rows.iter().map(cells).collect(),
    })
}

/// Applies every object, after it is known that all may be written.
pub async fn apply(context: &Context, objects: &[Value], args: &Args) -> Result<(), CliError> {
    let client = context.client().await?;
    for Planned { kind, new, .. } in planned(&client, objects).await? {
        send(&client, kind, new, args, false).await?;
        if kind == objects::DEFINITION {
            established(&client, name(new)).await?;
        }
    }
    Ok(())
}

/// An object to apply, and what is there now.
struct Planned<'a> {
    kind: Kind,
    new: &'a Value,
    live: Option<Value>,
}

/// The objects in the order in which they are applied. Fails with every object that may not be written.
async fn planned<'a>(client: &Client, objects: &'a [Value]) -> Result<Vec<Planned<'a>>, CliError> {
    let (mut planned, mut obstacles) = (Vec::new(), Vec::new());
    for new in ordered(objects) {
        let kind =
            Kind::of(new).ok_or_else(|| CliError::failed(format!("unknown kind of {}", title(new))))?;
        let place = Some(namespace(new)).filter(|namespace| !namespace.is_empty());
        let live = objects::get(client, kind, place, name(new)).await;
        let live = live.map_err(|why| failure::of_unread(&title(new), &why))?;
        if kind == objects::NAMESPACE
            && let Some(live) = &live
            && !tenants::is_labelled(live)
        {
            let workloads = tenants::workloads(client, name(live)).await;
            let workloads = workloads.map_err(|why| failure::of_unread(&title(live), &why))?;
            obstacles.extend(taken(live, &workloads));
        }
        obstacles.extend(live.as_ref().and_then(|live| obstacle(live, new)));
        planned.push(Planned { kind, new, live });
    }
    if obstacles.is_empty() {
        return Ok(planned);
    }
    let what = format!("{} objects may not be written:\n  {}", obstacles.len(), obstacles.join("\n  "));
    Err(CliError::failed(what)
        .hint("upgrade with the tool that manages them, for example `helm upgrade tulle`; a namespace of others cannot be Tulle's: name another with --system-namespace"))
}

/// Applies an object, or asks what would become of it. `None`: it cannot be asked before its namespace exists.
async fn send(
    client: &Client,
    kind: Kind,
    new: &Value,
    args: &Args,
    dry_run: bool,
) -> Result<Option<Value>, CliError> {
    let mut params = PatchParams::apply(MANAGER);
    params.dry_run = dry_run;
    params.force = args.force_conflicts;
    let place = Some(namespace(new)).filter(|namespace| !namespace.is_empty());
    let answer = kind.api(client, place).patch(name(new), &params, &Patch::Apply(new)).await;
    match answer {
        Ok(object) => {
            let mut object = serde_json::to_value(object).unwrap_or_default();
            if let Some(fields) = object.as_object_mut() {
                fields.insert("apiVersion".to_owned(), kind.api_version.into());
                fields.insert("kind".to_owned(), kind.kind.into());
            }
            Ok(Some(object))
        }
        Err(kube::Error::Api(status)) if status.code == 404 && dry_run => Ok(None),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            let what = format!("{}: {}", title(new), status.message);
            Err(CliError::failed(what).hint(conflict_hint(&status.message)))
        }
        Err(error) => Err(failure::doing(&title(new), &error)),
    }
}

/// Waits until the API server serves a new kind.
async fn established(client: &Client, name: &str) -> Result<(), CliError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = objects::get(client, objects::DEFINITION, None, name).await.ok().flatten();
        let condition = found.as_ref().and_then(|found| objects::condition(found, "Established"));
        if condition.is_some_and(|condition| text(condition, "/status") == "True") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(CliError::TimedOut(format!(
                "{name} is not established after {} s: `kubectl describe crd {name}` says why",
                PATIENCE.as_secs()
            )));
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Waits until operator and webhook are available, and the API server can verify the webhook.
pub async fn wait(context: &Context) -> Result<(), CliError> {
    let client = context.client().await?;
    let deadline = Instant::now() + PATIENCE;
    let mut said = String::new();
    loop {
        let Some(waits) = waits_for(&client, &context.system).await else { return Ok(()) };
        if Instant::now() >= deadline {
            let system = &context.system;
            return Err(CliError::TimedOut(format!(
                "after {} s: {waits}; `kubectl -n {system} describe pods` and `tulle check --system-namespace {system}` say why",
                PATIENCE.as_secs()
            )));
        }
        // Each state once: this may be a log.
        if waits != said {
            note(&format!("waiting: {waits}"));
            said = waits;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// What is not ready yet.
async fn waits_for(client: &Client, system: &str) -> Option<String> {
    for name in DEPLOYMENTS {
        match objects::get(client, objects::DEPLOYMENT, Some(system), name).await {
            Ok(Some(deployment)) => {
                if let Some(waits) = missing(&deployment) {
                    return Some(waits);
                }
            }
            Ok(None) => return Some(format!("Deployment {system}/{name} does not exist")),
            Err(why) => return Some(format!("Deployment {system}/{name}: {why}")),
        }
    }
    for kind in [objects::MUTATING, objects::VALIDATING] {
        let configuration = objects::get(client, kind, None, "tulle").await.ok().flatten();
        if !configuration.is_some_and(|configuration| is_called(&configuration)) {
            return Some(format!("{} tulle has no caBundle yet", kind.kind));
        }
    }
    None
}
