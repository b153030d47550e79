//! `tulle uninstall`: prints the commands that remove Tulle, or performs them.
//!
//! ```text
//!   plan   what is there in; what to do, in order, out; pure
//! ```
//! The order is such that nothing waits for what is already gone: first what the API server calls, then what only the
//! operator would undo, then the rest. It works while the operator is dead.

mod plan;

use std::fmt::Write as _;
use std::time::Duration;

use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tulle_crds::keys;

use self::plan::{Action, Seen};
use crate::cluster::Context;
use crate::exit::CliError;
use crate::manifests::{self, Settings};
use crate::objects::{self, Read, Unread, condition, full_name, items, text};
use crate::output::write;

/// How long the API server may take to finish deleting the objects of Tulle's kinds.
const PATIENCE: Duration = Duration::from_secs(30);
/// Time between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Options of `tulle uninstall`.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Args {
    /// Remove Tulle now, in place of printing the commands
    #[arg(long)]
    pub apply: bool,
    /// Go on although pods with a sidecar exist, or another tool has installed Tulle
    #[arg(long)]
    pub force: bool,
}

/// Prints the commands, or performs them.
///
/// # Errors
/// Pods with a sidecar exist, another tool manages the installation, or the cluster refuses.
pub async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let client = context.client().await?;
    let seen = look(context, &client).await?;
    if !args.force
        && let Some(refusal) = plan::refusal(&seen)
    {
        return Err(CliError::failed(refusal.what).hint(refusal.hint));
    }
    let actions = plan::plan(&seen);
    if !args.apply {
        let commands = actions.iter().fold(String::new(), |mut text, action| {
            let _ = writeln!(text, "{}", action.command());
            text
        });
        return write(&format!("# `tulle uninstall --apply` does the same.\n{commands}"));
    }
    for action in &actions {
        perform(&client, action).await?;
        write(&format!("{}\n", action.done()))?;
    }
    Ok(())
}

/// What is there. A kind that the cluster does not have is an empty list; another failure ends the command, because it
/// must not be mistaken for nothing.
async fn look(context: &Context, client: &Client) -> Result<Seen, CliError> {
    // What the API server calls says where Tulle is, even if nothing of it runs.
    let called = objects::get(client, objects::MUTATING, None, "tulle").await.ok().flatten();
    let called = called.as_ref().map(|found| text(found, "/webhooks/0/clientConfig/service/namespace"));
    let system = called.filter(|namespace| !namespace.is_empty()).unwrap_or(&context.system);
    let settings = Settings { namespace: system.to_owned(), undo: true, ..Settings::default() };
    let installed = manifests::objects(&settings).map_err(|error| CliError::failed(error.to_string()))?;
    let pods = some("pods", objects::list(client, objects::POD, None, None).await)?;
    let operator = objects::get(client, objects::DEPLOYMENT, Some(system), "tulle-operator").await;
    let trust = format!("{}=bundle", keys::TRUST);
    Ok(Seen {
        system: system.to_owned(),
        injected: pods.iter().filter(|pod| is_injected(pod)).map(full_name).collect(),
        gated: pods.iter().filter(|pod| is_gated(pod)).map(plan::Place::of).collect(),
        canaries: some("Canaries", objects::list(client, objects::CANARY, None, None).await)?,
        policies: some("MeshPolicies", objects::list(client, objects::MESH_POLICY, None, None).await)?,
        configs: some("MeshConfigs", objects::list(client, objects::MESH_CONFIG, None, None).await)?,
        bundles: some(
            "ConfigMaps with the trust bundle",
            objects::list(client, objects::CONFIG_MAP, None, Some(&trust)).await,
        )?
        .iter()
        .map(plan::Place::of)
        .collect(),
        tool: operator.ok().flatten().as_ref().and_then(objects::managed_by),
        installed,
    })
}

fn some(what: &str, list: Read<Vec<Value>>) -> Result<Vec<Value>, CliError> {
    match list {
        Ok(list) => Ok(list),
        Err(Unread::NotServed) => Ok(Vec::new()),
        Err(why) => Err(CliError::failed(format!("cannot list {what}: {why}"))),
    }
}

/// Whether a pod runs with a sidecar.
fn is_injected(pod: &Value) -> bool {
    let ended = matches!(text(pod, "/status/phase"), "Succeeded" | "Failed");
    !ended && objects::label(pod, keys::INJECTED).is_some()
}

/// Whether a pod waits for its readiness gate, which nobody opens any more.
fn is_gated(pod: &Value) -> bool {
    let gates = items(pod, "/spec/readinessGates");
    let has_gate = gates.iter().any(|gate| text(gate, "/conditionType") == keys::GATE);
    has_gate && condition(pod, keys::GATE).is_none_or(|condition| text(condition, "/status") != "True")
}

/// Performs an action. What is already gone is fine.
async fn perform(client: &Client, action: &Action) -> Result<(), CliError> {
    let done = match action {
        Action::Delete { kind, place } => {
            let api = kind.api(client, place.namespace());
            api.delete(&place.name, &DeleteParams::background()).await.map(drop)
        }
        Action::RemoveFinalizers { place, left } => {
            let api = objects::CANARY.api(client, place.namespace());
            let patch = Patch::Merge(json!({"metadata": {"finalizers": left}}));
            api.patch(&place.name, &PatchParams::default(), &patch).await.map(drop)
        }
        Action::OpenGate { place } => {
            let api = objects::POD.api(client, place.namespace());
            let patch = Patch::Strategic(plan::open_gate());
            api.patch_status(&place.name, &PatchParams::default(), &patch).await.map(drop)
        }
        Action::AwaitGone { kind } => return gone(client, *kind).await,
    };
    match done {
        Ok(()) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(kube::Error::Api(status)) => {
            Err(CliError::failed(format!("{}: {}", action.done(), status.message)))
        }
        Err(error) => Err(CliError::failed(format!("{}: {error}", action.done()))),
    }
}

/// Waits until there is no object of a kind, so that deleting its definition does not wait for a finalizer.
async fn gone(client: &Client, kind: objects::Kind) -> Result<(), CliError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = some(kind.plural, objects::list(client, kind, None, None).await)?;
        let Some(first) = left.first() else { return Ok(()) };
        if Instant::now() >= deadline {
            let finalizers = items(first, "/metadata/finalizers").iter().filter_map(Value::as_str);
            let finalizers = finalizers.collect::<Vec<_>>().join(", ");
            let what = format!("{} {} is not gone: finalizers {finalizers}", kind.kind, full_name(first));
            return Err(CliError::TimedOut(what));
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_counts_as_injected_until_it_has_ended() {
        let pod = |phase: &str| json!({"metadata": {"labels": {"tulle.dev/sidecar": "0.1.0"}}, "status": {"phase": phase}});
        assert!(is_injected(&pod("Running")) && is_injected(&pod("Pending")));
        assert!(!is_injected(&pod("Succeeded")) && !is_injected(&json!({})));
    }

    #[test]
    fn a_pod_is_gated_while_its_gate_is_not_open() {
        let pod = |status: Value| {
            json!({"spec": {"readinessGates": [{"conditionType": "tulle.dev/approved"}]},
                "status": {"conditions": status}})
        };
        assert!(is_gated(&pod(json!([]))));
        assert!(is_gated(&pod(json!([{"type": "tulle.dev/approved", "status": "False"}]))));
        assert!(!is_gated(&pod(json!([{"type": "tulle.dev/approved", "status": "True"}]))));
        assert!(!is_gated(&json!({"spec": {}})));
    }
}
