//! `tulle uninstall`: prints the commands that remove Tulle, or performs them.
//!
//! ```text
//!   system  the namespace of Tulle, as its objects name it; pure
//!   plan    what is there in; what to do, in order, out; pure
//! ```
//! The order is such that nothing waits for what is already gone: first what the API server calls, then what only the
//! operator would undo, then the rest. It works while the operator is dead.

mod plan;
mod system;

use std::fmt::Write as _;
use std::time::Duration;

use kube::Client;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tulle_crds::keys;

use self::plan::{Action, Seen};
use self::system::{Witness, agreed};
use crate::cluster::{Context, failure, locate};
use crate::exit::CliError;
use crate::manifests::{self, DEFINITIONS, OPERATOR, Settings};
use crate::objects::{self, Kind, Read, Unread, condition, full_name, items, text};
use crate::output::write;
use crate::tenants;

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
    let seen = look(context, &client, args.force).await?;
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
        let was_there = perform(&client, action).await?;
        write(&format!("{}\n", if was_there { action.done() } else { action.absent() }))?;
    }
    Ok(())
}

/// What is there. A kind that the cluster does not have is an empty list; another failure ends the command, because it
/// must not be mistaken for nothing.
async fn look(context: &Context, client: &Client, force: bool) -> Result<Seen, CliError> {
    let own = Own::read(client).await?;
    let witnesses = witnesses(client, context, &own).await?;
    let system = agreed(&witnesses, context.given_system(), force)?;
    let system = system.unwrap_or_else(|| context.system.clone());
    let settings = Settings { namespace: system.clone(), undo: true, ..Settings::default() };
    let installed = manifests::objects(&settings).map_err(|error| CliError::failed(error.to_string()))?;
    let pods = some("pods", objects::list(client, objects::POD, None, None).await)?;
    let namespace = one(client, objects::NAMESPACE, None, &system).await?;
    let held = tenants::workloads(client, &system).await;
    let held =
        held.map_err(|why| failure::of_unread(&format!("cannot list the workloads of {system}"), &why))?;
    let trust = format!("{}=bundle", keys::TRUST);
    let bundles = objects::list(client, objects::CONFIG_MAP, None, Some(&trust)).await;
    Ok(Seen {
        managed: plan::managed(&own.managed(client, &system).await?),
        foreign: tenants::foreign(&held),
        injected: pods.iter().filter(|pod| is_injected(pod)).map(full_name).collect(),
        gated: pods.iter().filter(|pod| is_gated(pod)).map(plan::Place::of).collect(),
        canaries: some("Canaries", objects::list(client, objects::CANARY, None, None).await)?,
        policies: some("MeshPolicies", objects::list(client, objects::MESH_POLICY, None, None).await)?,
        configs: some("MeshConfigs", objects::list(client, objects::MESH_CONFIG, None, None).await)?,
        bundles: some("ConfigMaps with the trust bundle", bundles)?.iter().map(plan::Place::of).collect(),
        namespace,
        system,
        installed,
    })
}

/// Objects without a namespace that an installation has once in a cluster.
struct Own {
    mutating: Option<Value>,
    validating: Option<Value>,
    binding: Option<Value>,
    role: Option<Value>,
    definitions: Vec<Value>,
}

impl Own {
    async fn read(client: &Client) -> Result<Self, CliError> {
        let mut definitions = Vec::new();
        for name in DEFINITIONS {
            definitions.extend(one(client, objects::DEFINITION, None, name).await?);
        }
        Ok(Self {
            mutating: one(client, objects::MUTATING, None, "tulle").await?,
            validating: one(client, objects::VALIDATING, None, "tulle").await?,
            binding: one(client, objects::CLUSTER_ROLE_BINDING, None, OPERATOR).await?,
            role: one(client, objects::CLUSTER_ROLE, None, OPERATOR).await?,
            definitions,
        })
    }

    /// The objects that tell which tool has installed Tulle.
    async fn managed(&self, client: &Client, system: &str) -> Result<Vec<Value>, CliError> {
        let operator = one(client, objects::DEPLOYMENT, Some(system), OPERATOR).await?;
        let single = [&operator, &self.mutating, &self.validating, &self.role];
        let single = single.into_iter().filter_map(Option::as_ref);
        Ok(single.chain(&self.definitions).cloned().collect())
    }
}

/// What names the namespace of Tulle.
async fn witnesses(client: &Client, context: &Context, own: &Own) -> Result<Vec<Witness>, CliError> {
    let configurations = [&own.mutating, &own.validating].into_iter().filter_map(Option::as_ref);
    let mut witnesses: Vec<Witness> = configurations.flat_map(Witness::of_webhooks).collect();
    witnesses.extend(own.binding.iter().flat_map(Witness::of_subjects));
    for namespace in locate::namespaces(client, &context.system).await? {
        witnesses.push(Witness { object: format!("Deployment/{OPERATOR}"), namespace });
    }
    if witnesses.is_empty() {
        // What an uninstallation that was interrupted leaves last.
        let labels = format!("{}=tulle,tulle.dev/control-plane=true", tenants::PART_OF);
        let found = objects::list(client, objects::NAMESPACE, None, Some(&labels)).await;
        for namespace in some("namespaces", found)?.iter().map(objects::name) {
            let object = format!("Namespace/{namespace}");
            witnesses.push(Witness { object, namespace: namespace.to_owned() });
        }
    }
    Ok(witnesses)
}

/// An object, if it exists. Only the API server's "not found" is absence.
async fn one(
    client: &Client,
    kind: Kind,
    namespace: Option<&str>,
    name: &str,
) -> Result<Option<Value>, CliError> {
    let found = objects::get(client, kind, namespace, name).await;
    found.map_err(|why| failure::of_unread(&format!("cannot read {} {name}", kind.kind), &why))
}

fn some(what: &str, list: Read<Vec<Value>>) -> Result<Vec<Value>, CliError> {
    match list {
        Ok(list) => Ok(list),
        Err(Unread::NotServed) => Ok(Vec::new()),
        Err(why) => Err(failure::of_unread(&format!("cannot list {what}"), &why)),
    }
}

/// Whether a pod runs with a sidecar.
fn is_injected(pod: &Value) -> bool {
    let ended = matches!(text(pod, "/status/phase"), "Succeeded" | "Failed");
    !ended && objects::has_sidecar(pod)
}

/// Whether a pod waits for its readiness gate, which nobody opens any more.
fn is_gated(pod: &Value) -> bool {
    let gates = items(pod, "/spec/readinessGates");
    let has_gate = gates.iter().any(|gate| text(gate, "/conditionType") == keys::GATE);
    has_gate && condition(pod, keys::GATE).is_none_or(|condition| text(condition, "/status") != "True")
}

/// Performs an action. `false`: its object is not there, so that nothing was to be done.
async fn perform(client: &Client, action: &Action) -> Result<bool, CliError> {
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
        Action::AwaitGone { kind } => return gone(client, *kind).await.map(|()| true),
        Action::Keep { .. } => return Ok(true),
    };
    match done {
        Ok(()) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(failure::doing(&action.failed(), &error)),
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
            let what = format!(
                "{} {} is not gone after {} s: finalizers {finalizers}; remove them, or wait for whoever has added them, and try again",
                kind.kind,
                full_name(first),
                PATIENCE.as_secs()
            );
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
        let sidecar = json!({"name": "tulle-proxy", "restartPolicy": "Always", "args": ["proxy"]});
        let pod = |phase: &str| json!({"spec": {"initContainers": [sidecar]}, "status": {"phase": phase}});
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
