//! Finds the operator: the replica that holds the Lease, or another that is ready.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use super::failure;
use crate::exit::CliError;
use crate::manifests::OPERATOR;

/// The label of the operator's pods (`config/base/operator.yaml`).
const SELECTOR: &str = "app=tulle-operator";

/// A replica of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The namespace that Tulle is installed in.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// Whether it leads. One that does not knows only the sidecars that are connected to it.
    pub leads: bool,
    /// Whether the user may read which replica leads.
    pub leader_is_known: bool,
}

impl Located {
    /// What the reader of its answers must know.
    pub fn note(&self) -> Option<String> {
        let why = match (self.leads, self.leader_is_known) {
            (true, _) => return None,
            (false, true) => "no leader is ready",
            (false, false) => "you may not read which replica leads",
        };
        Some(format!("note: {why}; pod {} answers with what it knows", self.pod))
    }
}

/// A pod of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Replica {
    pod: String,
    ready: bool,
}

/// Every replica that is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The leader first, if it is ready.
    pub replicas: Vec<Located>,
    /// Whether there can be no others: the user may list the operator's pods.
    pub are_all: bool,
}

/// The operator in the namespace where it is.
struct Found {
    namespace: String,
    holder: Holder,
    replicas: Vec<Replica>,
    are_all: bool,
}

/// Finds the operator in the namespace `system`, or elsewhere unless the user has named the namespace.
///
/// # Errors
/// Tulle is not installed, no replica is ready, or the user may not look.
pub async fn locate(client: &Client, system: &str, system_is_given: bool) -> Result<Located, CliError> {
    let found = find(client, system, system_is_given).await?;
    choose(&found.namespace, &found.holder, &found.replicas)
}

/// Finds every replica that is ready. Each has other sidecars.
///
/// # Errors
/// As [`locate`].
pub async fn ready(client: &Client, system: &str, system_is_given: bool) -> Result<Ready, CliError> {
    let found = find(client, system, system_is_given).await?;
    let first = choose(&found.namespace, &found.holder, &found.replicas)?;
    Ok(Ready { replicas: all(first, &found.replicas), are_all: found.are_all })
}

/// The replica that was chosen, and the others that are ready.
fn all(first: Located, replicas: &[Replica]) -> Vec<Located> {
    let others = replicas.iter().filter(|replica| replica.ready && replica.pod != first.pod);
    let other = |replica: &Replica| Located { pod: replica.pod.clone(), leads: false, ..first.clone() };
    let others: Vec<Located> = others.map(other).collect();
    std::iter::once(first).chain(others).collect()
}

async fn find(client: &Client, system: &str, system_is_given: bool) -> Result<Found, CliError> {
    let found = holder(client, system).await;
    if system_is_given || !matches!(found, Ok(Holder::NoLease)) {
        return in_namespace(client, system, found?).await;
    }
    let elsewhere = namespaces(client, system).await?;
    let namespace = only(&elsewhere, system)?;
    in_namespace(client, &namespace, holder(client, &namespace).await?).await
}

/// What the Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Holder {
    /// This pod leads.
    Pod(String),
    /// No replica leads at the moment.
    Nobody,
    /// There is no Lease.
    NoLease,
    /// The user may not read it.
    Secret,
}

async fn holder(client: &Client, namespace: &str) -> Result<Holder, CliError> {
    match Api::<Lease>::namespaced(client.clone(), namespace).get_opt(OPERATOR).await {
        Ok(None) => Ok(Holder::NoLease),
        Ok(Some(lease)) => Ok(holder_of(lease.spec.and_then(|spec| spec.holder_identity).as_deref())),
        Err(kube::Error::Api(status)) if status.code == 403 => Ok(Holder::Secret),
        Err(error) => Err(error.into()),
    }
}

/// The pod in a holder's identity, which is `pod/address`.
fn holder_of(identity: Option<&str>) -> Holder {
    match identity.and_then(|identity| identity.split('/').next()) {
        Some(pod) if !pod.is_empty() => Holder::Pod(pod.to_owned()),
        _ => Holder::Nobody,
    }
}

async fn in_namespace(client: &Client, namespace: &str, holder: Holder) -> Result<Found, CliError> {
    let pods = Api::<Pod>::namespaced(client.clone(), namespace);
    let (replicas, are_all) = match pods.list(&ListParams::default().labels(SELECTOR)).await {
        Ok(list) => (list.items.iter().map(replica).collect(), true),
        // Whoever may read the Lease and forward ports does not need to list pods.
        Err(kube::Error::Api(status)) if status.code == 403 => match &holder {
            Holder::Pod(pod) => (vec![Replica { pod: pod.clone(), ready: true }], false),
            _ => return Err(failure::of(&kube::Error::Api(status))),
        },
        Err(error) => return Err(error.into()),
    };
    Ok(Found { namespace: namespace.to_owned(), holder, replicas, are_all })
}

fn replica(pod: &Pod) -> Replica {
    let status = pod.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    Replica { pod: pod.name_any(), ready: ready && pod.metadata.deletion_timestamp.is_none() }
}

/// The leader if it is ready, else the first replica that is.
fn choose(namespace: &str, holder: &Holder, replicas: &[Replica]) -> Result<Located, CliError> {
    if replicas.is_empty() && *holder == Holder::NoLease {
        return Err(not_installed(&format!("namespace {namespace} has no operator")));
    }
    let leader = replicas.iter().find(|replica| replica.ready && *holder == Holder::Pod(replica.pod.clone()));
    let Some(chosen) = leader.or_else(|| replicas.iter().find(|replica| replica.ready)) else {
        let what =
            format!("none of the operator's {} pods in namespace {namespace} is ready", replicas.len());
        return Err(CliError::failed(what).hint(format!("kubectl -n {namespace} get pods -l {SELECTOR}")));
    };
    Ok(Located {
        namespace: namespace.to_owned(),
        pod: chosen.pod.clone(),
        leads: leader.is_some(),
        leader_is_known: *holder != Holder::Secret,
    })
}

/// The namespaces with a Deployment of the operator's name.
///
/// # Errors
/// The user may not list Deployments, or the API server does not answer.
pub async fn namespaces(client: &Client, system: &str) -> Result<Vec<String>, CliError> {
    let deployments = Api::<Deployment>::all(client.clone());
    let named = ListParams::default().fields(&format!("metadata.name={OPERATOR}"));
    match deployments.list_metadata(&named).await {
        Ok(list) => Ok(list.items.iter().filter_map(|deployment| deployment.namespace()).collect()),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            let what = format!(
                "Tulle is not in namespace {system}, and you may not look for it: {}",
                status.message
            );
            Err(CliError::failed(what).hint("say where it is with --system-namespace"))
        }
        Err(error) => Err(error.into()),
    }
}

/// The one namespace with an operator.
fn only(namespaces: &[String], system: &str) -> Result<String, CliError> {
    match namespaces {
        [namespace] => Ok(namespace.clone()),
        [] => Err(not_installed("no namespace has an operator")),
        // The Deployment is there, but the operator has not started yet.
        several if several.iter().any(|namespace| namespace == system) => Ok(system.to_owned()),
        several => {
            let what = format!("several namespaces have an operator: {}", several.join(", "));
            Err(CliError::failed(what).hint("choose one with --system-namespace"))
        }
    }
}

fn not_installed(seen: &str) -> CliError {
    CliError::failed(format!("Tulle is not installed: {seen}")).hint("tulle install")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicas(pods: &[(&str, bool)]) -> Vec<Replica> {
        pods.iter().map(|(pod, ready)| Replica { pod: (*pod).to_owned(), ready: *ready }).collect()
    }

    fn pod(name: &str) -> Holder {
        Holder::Pod(name.to_owned())
    }

    #[test]
    fn the_holder_is_the_pod_before_the_address() {
        assert_eq!(holder_of(Some("tulle-operator-0/10.0.0.7")), pod("tulle-operator-0"));
        assert_eq!(holder_of(Some("")), Holder::Nobody, "a released Lease");
        assert_eq!(holder_of(None), Holder::Nobody);
    }

    #[test]
    fn the_leader_is_asked_if_it_is_ready_and_else_another_that_is() {
        let both = replicas(&[("a", true), ("b", true)]);
        let chosen = |holder, replicas: &[Replica]| {
            let located = choose("tulle-system", &holder, replicas).unwrap();
            (located.pod, located.leads)
        };
        assert_eq!(chosen(pod("b"), &both), ("b".to_owned(), true));
        assert_eq!(chosen(Holder::Nobody, &both), ("a".to_owned(), false));
        assert_eq!(chosen(Holder::Secret, &both), ("a".to_owned(), false));
        let dying = replicas(&[("a", true), ("b", false)]);
        assert_eq!(chosen(pod("b"), &dying), ("a".to_owned(), false));
        assert_eq!(chosen(pod("gone"), &both), ("a".to_owned(), false));
    }

    #[test]
    fn every_replica_that_is_ready_is_found_and_the_leader_first() {
        let three = replicas(&[("a", true), ("b", true), ("c", false)]);
        let first = choose("tulle-system", &pod("b"), &three).unwrap();
        let found: Vec<(String, bool)> =
            all(first, &three).into_iter().map(|located| (located.pod, located.leads)).collect();
        assert_eq!(found, [("b".to_owned(), true), ("a".to_owned(), false)]);
    }

    #[test]
    fn answers_of_a_replica_that_does_not_lead_have_a_note() {
        let note = |holder| choose("tulle-system", &holder, &replicas(&[("a", true)])).unwrap().note();
        assert_eq!(note(pod("a")), None);
        let gone = "note: no leader is ready; pod a answers with what it knows";
        assert_eq!(note(pod("gone")).as_deref(), Some(gone));
        let secret = "note: you may not read which replica leads; pod a answers with what it knows";
        assert_eq!(note(Holder::Secret).as_deref(), Some(secret));
    }

    #[test]
    fn without_a_ready_replica_the_pods_are_named_and_without_an_operator_the_installation() {
        let starting = replicas(&[("a", false)]);
        let error = choose("tulle-system", &Holder::Nobody, &starting).unwrap_err();
        assert!(error.to_string().contains("none of the operator's 1 pods"), "{error}");
        let error = choose("tulle-system", &Holder::NoLease, &[]).unwrap_err();
        assert_eq!(error, not_installed("namespace tulle-system has no operator"));
    }

    #[test]
    fn an_installation_elsewhere_is_found_if_it_is_the_only_one() {
        let namespaces = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(only(&namespaces(&["mesh"]), "tulle-system"), Ok("mesh".to_owned()));
        assert_eq!(
            only(&namespaces(&["mesh", "tulle-system"]), "tulle-system"),
            Ok("tulle-system".to_owned())
        );
        let error = only(&namespaces(&["a", "b"]), "tulle-system").unwrap_err();
        assert!(error.to_string().ends_with("a, b"), "{error}");
        assert_eq!(only(&[], "tulle-system"), Err(not_installed("no namespace has an operator")));
    }

    #[test]
    fn a_pod_that_is_being_deleted_is_not_ready() {
        let read = |text: &str| serde_yaml::from_str::<Pod>(text).unwrap();
        let ready = "{metadata: {name: a}, status: {conditions: [{type: Ready, status: 'True'}]}}";
        assert_eq!(replica(&read(ready)), Replica { pod: "a".into(), ready: true });
        let leaving = "{metadata: {name: a, deletionTimestamp: '2026-01-01T00:00:00Z'}, \
                       status: {conditions: [{type: Ready, status: 'True'}]}}";
        assert!(!replica(&read(leaving)).ready);
        assert!(!replica(&read("{metadata: {name: a}}")).ready);
    }
}
