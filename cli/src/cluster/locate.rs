//! Finds the operator: the replica that holds the Lease, or another that is ready. Where the Lease may not be read, the
//! replicas themselves say which one leads; where none is ready, each is asked all the same.

use std::cmp::Reverse;

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
/// The right to read the Lease, as `cli/README.md` has it.
const LEASE_RULE: &str = "{apiGroups: [coordination.k8s.io], resources: [leases], verbs: [get]}";

/// A replica of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The namespace that Tulle is installed in.
    pub namespace: String,
    /// The pod.
    pub pod: String,
    /// Whether it leads. One that does not knows only the sidecars that are connected to it.
    pub leads: bool,
    /// Whether the user may read the Lease, which says which replica leads.
    pub leader_is_known: bool,
    /// Whether it is ready. One that is not may answer, as under load.
    pub ready: bool,
}

impl Located {
    /// What the reader of its answers must know.
    pub fn note(&self) -> Option<String> {
        let Self { namespace, pod, .. } = self;
        match (self.leads, self.ready, self.leader_is_known) {
            (true, true, _) => None,
            (true, false, _) => {
                Some(format!("note: no replica of the operator is ready; pod {pod}, which leads, answers"))
            }
            (false, _, true) => {
                Some(format!("note: no leader is ready; pod {pod} answers with what it knows"))
            }
            (false, _, false) => Some(format!(
                "note: you may not read which replica leads, and none says that it does; pod {pod} answers with what it \
                 knows; ask for this right in namespace {namespace}: {LEASE_RULE}"
            )),
        }
    }

    /// Whether the Lease names it, and it is ready: then no other needs to be asked.
    pub fn is_certain(&self) -> bool {
        self.ready && self.leader_is_known
    }
}

/// A pod of the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Replica {
    pod: String,
    ready: bool,
}

/// Every replica that is ready; or every one, if none is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The leader, if it is ready and the Lease names it.
    pub first: Located,
    /// The others.
    pub others: Vec<Located>,
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

impl Ready {
    /// Every replica that is ready; they are asked in this order.
    pub fn into_all(self) -> Vec<Located> {
        std::iter::once(self.first).chain(self.others).collect()
    }
}

/// What replicas have answered to the question whether they lead.
#[derive(Debug, Default)]
pub struct Answers {
    follower: Option<Located>,
    failure: Option<CliError>,
    not_ready: usize,
}

impl Answers {
    /// Takes the answer of a replica. Returns the replica if it leads.
    pub fn take(&mut self, at: Located, leads: Result<bool, CliError>) -> Option<Located> {
        self.not_ready += usize::from(!at.ready);
        match leads {
            Ok(true) => return Some(Located { leads: true, ..at }),
            Ok(false) => self.follower = self.follower.take().or(Some(Located { leads: false, ..at })),
            Err(error) => self.failure = self.failure.take().or(Some(error)),
        }
        None
    }

    /// The replica to ask where none of those that have answered leads.
    ///
    /// # Errors
    /// None has answered.
    pub fn end(self, namespace: &str) -> Result<Located, CliError> {
        match (self.follower, self.failure) {
            (Some(follower), _) => Ok(follower),
            (None, Some(error)) if self.not_ready == 0 => Err(error),
            (None, error) => {
                let why = error.map(|error| format!(", and none answers: {error}")).unwrap_or_default();
                let what = format!(
                    "none of the operator's {} pods in namespace {namespace} is ready{why}",
                    self.not_ready
                );
                Err(CliError::failed(what).hint(pods_of(namespace)))
            }
        }
    }
}

/// The command that shows the operator's pods.
fn pods_of(namespace: &str) -> String {
    format!("kubectl -n {namespace} get pods -l {SELECTOR}")
}

/// Finds the operator in the namespace `system`, or elsewhere unless the user has named the namespace: every replica that
/// is ready, since each has other sidecars, or every one, if none is.
///
/// # Errors
/// Tulle is not installed, the operator has no pod, or the user may not look.
pub async fn ready(client: &Client, system: &str, system_is_given: bool) -> Result<Ready, CliError> {
    let found = find(client, system, system_is_given).await?;
    let first = choose(&found.namespace, &found.holder, &found.replicas)?;
    let others = others(&first, &found.replicas);
    Ok(Ready { first, others, are_all: found.are_all })
}

/// The others that are as ready as the replica that was chosen.
fn others(first: &Located, replicas: &[Replica]) -> Vec<Located> {
    let others = replicas.iter().filter(|replica| replica.ready == first.ready && replica.pod != first.pod);
    let other = |replica: &Replica| Located { pod: replica.pod.clone(), leads: false, ..first.clone() };
    others.map(other).collect()
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

/// The leader if it is ready, else the first replica that is, else the leader, else the first replica.
fn choose(namespace: &str, holder: &Holder, replicas: &[Replica]) -> Result<Located, CliError> {
    if replicas.is_empty() && *holder == Holder::NoLease {
        return Err(not_installed(&format!("namespace {namespace} has no operator")));
    }
    let leads = |pod: &str| matches!(holder, Holder::Pod(leader) if leader == pod);
    // The first of equals.
    let rank = |replica: &&Replica| Reverse((replica.ready, leads(&replica.pod)));
    let Some(chosen) = replicas.iter().min_by_key(rank) else {
        let what = format!("the operator has no pod in namespace {namespace}");
        return Err(
            CliError::failed(what).hint(format!("kubectl -n {namespace} describe deployment {OPERATOR}"))
        );
    };
    Ok(Located {
        namespace: namespace.to_owned(),
        pod: chosen.pod.clone(),
        leads: leads(&chosen.pod),
        leader_is_known: *holder != Holder::Secret,
        ready: chosen.ready,
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
        let others = others(&first, &three);
        let all = Ready { first, others, are_all: true }.into_all();
        let found: Vec<(String, bool)> =
            all.into_iter().map(|located| (located.pod, located.leads)).collect();
        assert_eq!(found, [("b".to_owned(), true), ("a".to_owned(), false)]);
    }

    #[test]
    fn replicas_that_are_not_ready_are_tried_where_none_is() {
        let busy = replicas(&[("a", false), ("b", false)]);
        let first = choose("tulle-system", &pod("b"), &busy).unwrap();
        assert_eq!((first.pod.as_str(), first.leads, first.is_certain()), ("b", true, false));
        assert_eq!(others(&first, &busy).len(), 1);
        let mut answers = Answers::default();
        let found = answers.take(first.clone(), Ok(true)).unwrap();
        let expected = "note: no replica of the operator is ready; pod b, which leads, answers";
        assert_eq!(found.note().as_deref(), Some(expected));
        let mut answers = Answers::default();
        assert_eq!(answers.take(first, Err(CliError::failed("refused"))), None);
        let error = answers.end("tulle-system").unwrap_err().to_string();
        let expected =
            "none of the operator's 1 pods in namespace tulle-system is ready, and none answers: refused";
        assert_eq!(error, expected);
    }

    #[test]
    fn replicas_say_which_one_leads_where_the_lease_may_not_be_read() {
        let both = replicas(&[("a", true), ("b", true)]);
        let first = choose("tulle-system", &Holder::Secret, &both).unwrap();
        assert!(!first.is_certain());
        let second = others(&first, &both).remove(0);
        let mut answers = Answers::default();
        assert_eq!(answers.take(first.clone(), Ok(false)), None);
        let leader = answers.take(second.clone(), Ok(true)).unwrap();
        assert_eq!((leader.pod.as_str(), leader.note()), ("b", None));
        let mut answers = Answers::default();
        assert_eq!(answers.take(first.clone(), Err(CliError::failed("refused"))), None);
        assert_eq!(answers.take(second, Ok(false)), None);
        assert_eq!(answers.end("tulle-system").unwrap().pod, "b", "one that answers");
        let mut answers = Answers::default();
        assert_eq!(answers.take(first, Err(CliError::failed("refused"))), None);
        assert_eq!(answers.end("tulle-system"), Err(CliError::failed("refused")));
    }

    #[test]
    fn answers_of_a_replica_that_does_not_lead_have_a_note() {
        let note = |holder| choose("tulle-system", &holder, &replicas(&[("a", true)])).unwrap().note();
        assert_eq!(note(pod("a")), None);
        let gone = "note: no leader is ready; pod a answers with what it knows";
        assert_eq!(note(pod("gone")).as_deref(), Some(gone));
        let secret = note(Holder::Secret).unwrap();
        assert!(secret.starts_with("note: you may not read which replica leads"), "{secret}");
        assert!(secret.ends_with(&format!("in namespace tulle-system: {LEASE_RULE}")), "{secret}");
        let readme = include_str!("../../README.md");
        assert!(readme.contains(LEASE_RULE), "the table of rights has another rule");
    }

    #[test]
    fn without_a_pod_the_deployment_is_named_and_without_an_operator_the_installation() {
        let error = choose("tulle-system", &Holder::Nobody, &[]).unwrap_err();
        assert!(error.to_string().contains("the operator has no pod"), "{error}");
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
