//! `canary undo`: what `kubectl rollout undo` would do, to the revision that the Canary has approved.

use kube::Client;
use kube::api::{DynamicObject, ListParams, PostParams};
use serde::Serialize;
use serde_json::Value;
use tulle_crds::{CanarySpec, CanaryStatus, Phase, WorkloadKind};

use super::{canaries, get, namespace_of};
use crate::cluster::Context;
use crate::cluster::failure::cannot;
use crate::exit::CliError;
use crate::objects::{self, Kind, MANAGER, managed_by};
use crate::output::Table;

/// The label that a Deployment's controller adds to the templates of its ReplicaSets.
const HASH: &str = "pod-template-hash";

/// Arguments of `canary undo`.
#[derive(clap::Args, Debug)]
pub(super) struct Args {
    /// Name of the Canary.
    name: String,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Restore the template although a tool manages the Deployment and will write its own again.
    #[arg(long)]
    force: bool,
}

/// What was done.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Undone {
    target: String,
    from: String,
    to: String,
    dry_run: bool,
}

pub(super) async fn run(context: &Context, args: Args) -> Result<(), CliError> {
    let namespace = namespace_of(context)?;
    let client = context.client().await?;
    let canary = get(&canaries(client.clone(), namespace), namespace, &args.name).await?;
    let status = canary.status.clone().unwrap_or_default();
    let revision = revision_to_restore(&canary.spec, &status, namespace)?;
    let target = &canary.spec.target.name;
    // As the API server has it: fields that this build does not know are kept.
    let deployments = objects::DEPLOYMENT.api(&client, Some(namespace));
    let read = format!("read Deployment {namespace}/{target}");
    let mut deployment = deployments.get(target).await.map_err(|error| cannot(&read, &error))?;
    unmanaged(&deployment, namespace, target, args.force)?;
    let template = template(&client, namespace, &deployment, revision).await?;
    if deployment.data.pointer("/spec/template") == Some(&template) {
        let what = format!("Deployment {namespace}/{target} has the template of revision {revision} already");
        return Err(CliError::failed(what));
    }
    let Some(place) = deployment.data.pointer_mut("/spec/template") else {
        return Err(CliError::failed(format!("Deployment {namespace}/{target} has no template")));
    };
    *place = template;
    // A PUT with the resourceVersion that was read: refused if anybody has changed the Deployment since.
    let params = PostParams { dry_run: args.dry_run, field_manager: Some(MANAGER.to_owned()) };
    deployments.replace(target, &params, &deployment).await.map_err(|error| match &error {
        kube::Error::Api(answer) if answer.is_conflict() => CliError::failed(format!(
            "Deployment {namespace}/{target} changed while its template was restored, and was left alone"
        ))
        .hint("try again"),
        _ => cannot(&format!("restore the template of Deployment {namespace}/{target}"), &error),
    })?;
    let undone = Undone {
        target: format!("Deployment/{target}"),
        from: status.canary_revision.clone(),
        to: revision.to_owned(),
        dry_run: args.dry_run,
    };
    context.output.print(&undone, |_| Table {
        headers: vec!["TARGET", "FROM", "TO", "RESTORED"],
        rows: vec![vec![
            undone.target.clone(),
            undone.from.clone(),
            undone.to.clone(),
            if undone.dry_run { "no (dry run)" } else { "yes" }.to_owned(),
        ]],
    })
}

/// Refuses a Deployment that a tool keeps as its own source says: it would write the failed template again.
pub(super) fn unmanaged(
    deployment: &impl Serialize,
    namespace: &str,
    name: &str,
    force: bool,
) -> Result<(), CliError> {
    let deployment = serde_json::to_value(deployment).map_err(|error| {
        CliError::failed(format!("Deployment {namespace}/{name} has no JSON form: {error}"))
    })?;
    match managed_by(&deployment).filter(|_| !force) {
        None => Ok(()),
        Some(tool) => Err(CliError::failed(format!(
            "Deployment {namespace}/{name} is managed by {}: revert the commit, or use --force",
            tool.name()
        ))),
    }
}

/// The revision whose template is restored, or why there is none.
pub(super) fn revision_to_restore<'a>(
    spec: &CanarySpec,
    status: &'a CanaryStatus,
    namespace: &str,
) -> Result<&'a str, CliError> {
    let (kind, name) = (spec.target.kind, &spec.target.name);
    let by_hand = format!("kubectl rollout undo {}/{name} -n {namespace}", singular(kind));
    if kind != WorkloadKind::Deployment {
        let what = format!("undo restores Deployments only, and the target is {} {name}", kind.name());
        return Err(CliError::failed(what).hint(by_hand));
    }
    match status.phase {
        Phase::Progressing | Phase::Paused | Phase::Failed if !status.approved_revision.is_empty() => {
            Ok(status.approved_revision.as_str())
        }
        Phase::Promoting => {
            let what = format!(
                "revision {} is approved already, so there is nothing newer to undo",
                status.approved_revision
            );
            Err(CliError::failed(what).hint(format!(
                "tulle canary abort goes back to the revision before it while pods of it serve; later: {by_hand}"
            )))
        }
        Phase::Stable => {
            let what = format!(
                "no rollout is in progress: Deployment {namespace}/{name} runs the approved revision {}",
                status.approved_revision
            );
            Err(CliError::failed(what).hint(format!("to go back to an older one: {by_hand}")))
        }
        Phase::Waiting | Phase::Progressing | Phase::Paused | Phase::Failed => {
            Err(CliError::failed("no revision is approved yet, so there is none to go back to"))
        }
    }
}

/// `deployment`, as kubectl writes it before a name.
pub(super) fn singular(kind: WorkloadKind) -> &'static str {
    Kind::from(kind).plural.trim_end_matches('s')
}

/// The template of a revision, from the Deployment's own ReplicaSet.
async fn template(
    client: &Client,
    namespace: &str,
    deployment: &DynamicObject,
    revision: &str,
) -> Result<Value, CliError> {
    let sets = objects::REPLICA_SET.api(client, Some(namespace));
    let found = sets.list(&ListParams::default().labels(&format!("{HASH}={revision}"))).await;
    let found = found.map_err(|error| cannot(&format!("list ReplicaSets in {namespace}"), &error))?;
    let uid = deployment.metadata.uid.as_deref();
    let is_own = |set: &&DynamicObject| {
        let owners = set.metadata.owner_references.as_deref().unwrap_or_default();
        owners.iter().any(|owner| Some(owner.uid.as_str()) == uid)
    };
    let set = found.items.iter().find(is_own);
    set.and_then(|set| template_of(&set.data)).ok_or_else(|| {
        let what = format!("there is no ReplicaSet of revision {revision} any more");
        CliError::failed(what).hint("apply the former manifest; spec.revisionHistoryLimit keeps more of them")
    })
}

/// The template of a ReplicaSet as its Deployment had it. Fields that this build does not know are kept.
pub(super) fn template_of(set: &Value) -> Option<Value> {
    let mut template = set.pointer("/spec/template")?.clone();
    if let Some(labels) = template.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(HASH);
    }
    Some(template)
}
