//! Reads the cluster into [`Facts`]. Decides nothing, changes nothing, and goes on when something cannot be read.

use std::collections::BTreeMap;

use futures::StreamExt as _;
use futures::stream;
use jiff::Timestamp;
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::{Api, Client};
use serde_json::Value;
use tulle_crds::{WorkloadKind, keys};
use tulle_mesh::query::{self, Paths};

use super::facts::{Facts, Part, Permission, target_name};
use crate::cluster::{Context, failure, within};
use crate::exit::CliError;
use crate::manifests::{self, DEFINITIONS, DEPLOYMENTS, OPERATOR, Settings};
use crate::objects::{self, Kind, Read, unread};

/// Requests at the same time.
const AT_ONCE: usize = 8;

/// Reads all that is judged. With `pre`, also whether the user may install, and not what only an installation has.
///
/// # Errors
/// There is no cluster to ask.
pub async fn gather(context: &Context, pre: bool) -> Result<Facts, CliError> {
    let client = context.client().await?;
    let server = within("asking the API server for its version", server(&client)).await?;
    let located = context.locate().await;
    let system = located.as_ref().map_or(context.system.as_str(), |located| located.namespace.as_str());
    let namespace = context.namespace();
    if let Some(name) = namespace.filter(|_| !pre) {
        let found = objects::get(&client, objects::NAMESPACE, None, name).await;
        absent(name, &found).map_or(Ok(()), Err)?;
    }
    let (nodes, namespaces, cilium) = tokio::join!(
        objects::list(&client, objects::NODE, None, None),
        labelled(&client, namespace),
        objects::get(&client, objects::CONFIG_MAP, Some("kube-system"), "cilium-config"),
    );
    let (uninjected, definitions, deployments, permissions) = tokio::join!(
        uninjected(&client, &namespaces),
        each(&client, objects::DEFINITION, None, &DEFINITIONS),
        each(&client, objects::DEPLOYMENT, Some(system), &DEPLOYMENTS),
        permissions(&client, system, pre),
    );
    let parts = if pre { Vec::new() } else { parts(&client, system).await };
    let injected = objects::list(&client, objects::POD, namespace, Some(keys::INJECTED)).await;
    let (uninjected, injected) = by_container(uninjected, injected);
    let (lease, slices, mutating, validating) = tokio::join!(
        objects::get(&client, objects::LEASE, Some(system), OPERATOR),
        objects::list(&client, objects::ENDPOINT_SLICE, Some(system), None),
        objects::get(&client, objects::MUTATING, None, "tulle"),
        objects::get(&client, objects::VALIDATING, None, "tulle"),
    );
    let (config, policies, canaries, routes) = tokio::join!(
        objects::get(&client, objects::MESH_CONFIG, None, "mesh"),
        objects::list(&client, objects::MESH_POLICY, namespace, None),
        objects::list(&client, objects::CANARY, namespace, None),
        routes(&client, namespace),
    );
    let targets = targets(&client, canaries.as_deref().unwrap_or_default()).await;
    let (health, sidecars) = if pre { not_asked() } else { operator(context).await };
    Ok(Facts {
        now: Timestamp::now().as_second(),
        cli: env!("CARGO_PKG_VERSION").to_owned(),
        system: system.to_owned(),
        namespace: namespace.map(str::to_owned),
        server,
        nodes,
        permissions,
        namespaces,
        uninjected,
        definitions,
        parts,
        deployments,
        lease,
        slices,
        health,
        sidecars,
        injected,
        mutating,
        validating,
        config,
        policies,
        canaries,
        targets,
        routes,
        cilium,
    })
}

/// The error about a namespace that does not exist. Of one that the user may not read that is not known.
fn absent(namespace: &str, found: &Read<Option<Value>>) -> Option<CliError> {
    let hint = "`kubectl get namespaces` lists them; -A looks at all";
    let error = || CliError::failed(format!("namespace {namespace} does not exist")).hint(hint);
    matches!(found, Ok(None)).then(error)
}

type Answers = (Result<query::Health, String>, Result<query::Sidecars, String>);

fn not_asked() -> Answers {
    let why = || "not asked before the installation".to_owned();
    (Err(why()), Err(why()))
}

async fn operator(context: &Context) -> Answers {
    let operator = match context.operator().await {
        Ok(operator) => operator,
        Err(error) => return (Err(error.to_string()), Err(error.to_string())),
    };
    let health = operator.get::<query::Health>(Paths::HEALTH, &[]).await;
    let namespace = context.namespace().map(|namespace| ("namespace", namespace.to_owned()));
    let wanted: Vec<(&str, &str)> =
        namespace.iter().map(|(parameter, value)| (*parameter, value.as_str())).collect();
    let sidecars = operator.get::<query::Sidecars>(Paths::SIDECARS, &wanted).await;
    (health.map_err(|error| error.to_string()), sidecars.map_err(|error| error.to_string()))
}

/// The API server's version. Without an answer there is nothing to check.
async fn server(client: &Client) -> Result<Read<String>, CliError> {
    match client.apiserver_version().await {
        Ok(info) => Ok(Ok(info.git_version)),
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => {
            Ok(Err(unread(kube::Error::Api(status))))
        }
        Err(error) => Err(failure::of(&error)),
    }
}

/// Namespaces that ask for sidecars: all of them, or the one.
async fn labelled(client: &Client, namespace: Option<&str>) -> Read<Vec<Value>> {
    let Some(namespace) = namespace else {
        return objects::list(client, objects::NAMESPACE, None, Some(keys::INJECT)).await;
    };
    let found = objects::get(client, objects::NAMESPACE, None, namespace).await?;
    Ok(found.into_iter().filter(|found| objects::label(found, keys::INJECT).is_some()).collect())
}

async fn uninjected(client: &Client, namespaces: &Read<Vec<Value>>) -> Read<Vec<Value>> {
    let namespaces = namespaces.as_ref().map_err(Clone::clone)?;
    let without = format!("!{}", keys::INJECTED);
    let lists = stream::iter(namespaces)
        .map(|namespace| {
            objects::list(client, objects::POD, Some(objects::name(namespace)), Some(without.as_str()))
        })
        .buffered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    let mut pods = Vec::new();
    for list in lists {
        pods.extend(list?);
    }
    Ok(pods)
}

/// Moves pods without the label to the others where they have the sidecar all the same.
fn by_container(
    unlabelled: Read<Vec<Value>>,
    labelled: Read<Vec<Value>>,
) -> (Read<Vec<Value>>, Read<Vec<Value>>) {
    match unlabelled {
        Err(why) => (Err(why), labelled),
        Ok(pods) => {
            let (with, without): (Vec<Value>, Vec<Value>) = pods.into_iter().partition(objects::has_sidecar);
            let labelled = labelled.map(|mut pods| {
                pods.extend(with);
                pods
            });
            (Ok(without), labelled)
        }
    }
}

async fn each(
    client: &Client,
    kind: Kind,
    namespace: Option<&str>,
    names: &[&'static str],
) -> BTreeMap<&'static str, Read<Option<Value>>> {
    let mut found = BTreeMap::new();
    for name in names {
        found.insert(*name, objects::get(client, kind, namespace, name).await);
    }
    found
}

/// Whether each object exists that this program installs, and that nothing else looks for.
async fn parts(client: &Client, system: &str) -> Vec<Part> {
    let settings = Settings { namespace: system.to_owned(), ..Settings::default() };
    let elsewhere = [objects::DEFINITION, objects::DEPLOYMENT, objects::MUTATING, objects::VALIDATING];
    // A test reads the manifests of this program.
    let wanted = manifests::objects(&settings).unwrap_or_default();
    let wanted = wanted.iter().filter_map(|object| Some((Kind::of(object)?, object)));
    stream::iter(wanted.filter(|(kind, _)| !elsewhere.contains(kind)))
        .map(|(kind, object)| async move {
            let place = Some(objects::namespace(object)).filter(|namespace| !namespace.is_empty());
            let found = objects::get(client, kind, place, objects::name(object)).await;
            Part {
                object: format!("{}/{}", kind.kind, objects::full_name(object)),
                exists: found.map(|found| found.is_some()),
            }
        })
        .buffered(AT_ONCE)
        .collect()
        .await
}

/// Routes of the kinds that the cluster has.
async fn routes(client: &Client, namespace: Option<&str>) -> Read<Vec<Value>> {
    let mut routes = objects::list(client, objects::HTTP_ROUTE, namespace, None).await?;
    if let Ok(more) = objects::list(client, objects::GRPC_ROUTE, namespace, None).await {
        routes.extend(more);
    }
    Ok(routes)
}

async fn targets(client: &Client, canaries: &[Value]) -> BTreeMap<String, Value> {
    let found = stream::iter(canaries)
        .map(|canary| async move {
            let kind = canary.pointer("/spec/target/kind")?.clone();
            let kind = Kind::from(serde_json::from_value::<WorkloadKind>(kind).ok()?);
            let (namespace, name) = (objects::namespace(canary), objects::text(canary, "/spec/target/name"));
            let target = objects::get(client, kind, Some(namespace), name).await.ok().flatten()?;
            Some((target_name(kind.kind, namespace, name), target))
        })
        .buffered(AT_ONCE)
        .collect::<Vec<_>>()
        .await;
    found.into_iter().flatten().collect()
}

/// Whether the user may create and change what an installation consists of.
async fn permissions(client: &Client, system: &str, pre: bool) -> Vec<Permission> {
    let mut permissions = Vec::new();
    // `tulle install --apply` and `kubectl apply --server-side` send a patch, which creates what is missing.
    for kind in objects::INSTALLED.iter().filter(|_| pre) {
        for verb in ["create", "patch"] {
            let namespace = kind.namespaced.then_some(system);
            let place = namespace.map(|namespace| format!(" -n {namespace}")).unwrap_or_default();
            permissions.push(Permission {
                right: format!("{verb} {}{place}", kind.resource()),
                allowed: allowed(client, *kind, verb, namespace).await,
            });
        }
    }
    permissions
}

async fn allowed(client: &Client, kind: Kind, verb: &str, namespace: Option<&str>) -> Read<bool> {
    let attributes = ResourceAttributes {
        group: Some(kind.group_version().0.to_owned()),
        namespace: namespace.map(str::to_owned),
        resource: Some(kind.plural.to_owned()),
        verb: Some(verb.to_owned()),
        ..ResourceAttributes::default()
    };
    let spec = SelfSubjectAccessReviewSpec {
        resource_attributes: Some(attributes),
        ..SelfSubjectAccessReviewSpec::default()
    };
    let review = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let api = Api::<SelfSubjectAccessReview>::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await.map_err(unread)?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pod_without_the_label_counts_by_its_container() {
        let sidecar = json!({"name": "tulle-proxy", "restartPolicy": "Always", "args": ["proxy"]});
        let own = json!({"name": "tulle-proxy", "command": ["true"]});
        let wrapped =
            json!({"name": "tulle-proxy", "restartPolicy": "Always", "args": ["-c", "exec /program proxy"]});
        let pod = |container: &Value| json!({"spec": {"initContainers": [container]}});
        let (copy, plain) = (pod(&sidecar), pod(&own));
        let (without, with) = by_container(Ok(vec![copy.clone(), plain.clone()]), Ok(Vec::new()));
        assert_eq!((without, with), (Ok(vec![plain]), Ok(vec![copy])));
        assert!(objects::has_sidecar(&pod(&wrapped)));
        let unread = || Err(objects::Unread::NotServed);
        assert_eq!(by_container(unread(), unread()), (unread(), unread()));
    }

    #[test]
    fn only_a_namespace_that_surely_does_not_exist_ends_a_check() {
        let error = absent("shop", &Ok(None)).unwrap();
        assert_eq!((error.to_string().as_str(), error.code()), ("namespace shop does not exist", 1));
        assert_eq!(absent("shop", &Ok(Some(Value::Null))), None);
        assert_eq!(absent("shop", &Err(objects::Unread::Forbidden("no".into()))), None);
    }
}
