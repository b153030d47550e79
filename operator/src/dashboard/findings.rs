//! What is wrong in the mesh: those checks of `tulle check` for which the operator has the facts. How they are judged is in
//! [`tulle_mesh::check`], for the command as well.
//!
//! In: the operator's own state, the sidecars, and the model. Out: findings, in order of their numbers, and the sidecars
//! that they are about. Pure.

use std::collections::HashSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use tulle_crds::{MeshPolicy, Phase};
use tulle_mesh::check::{
    self, Condition, Finding, Leadership, Outcome, Pod, Policy, PolicyState, ROOT_ENDS_SOON, Reader,
    SidecarJudge, Uninjected, View, WithoutSidecar, list as checks,
};
use tulle_mesh::query::{Health, Sidecar, Sidecars};

use crate::identity::lifetime::Lifetime;
use crate::model::{Key, Model};

/// Checks that only the command makes, by what they are about.
pub const COMMAND_ONLY: &[(&str, &[&str])] = &[
    ("the Kubernetes version and the nodes", &[checks::SERVER.id, checks::KUBELETS.id]),
    ("your own rights", &[checks::PERMISSIONS.id]),
    ("Pod Security", &[checks::POD_SECURITY.id]),
    (
        "the objects of the installation",
        &[
            checks::DEFINITIONS.id,
            checks::VERSIONS.id,
            checks::MANAGER.id,
            checks::OBJECTS.id,
            checks::SCHEMAS.id,
        ],
    ),
    ("the Deployments of the control plane", &[checks::DEPLOYMENT.id, checks::REPLICAS.id]),
    ("how the command reaches the operator", &[checks::QUERY.id, checks::SKEW.id]),
    ("the webhook", &[checks::HOOKS.id, checks::BUNDLE.id, checks::FAILURE.id, checks::ENDPOINTS.id]),
    ("labels of namespaces", &[checks::NAMESPACES.id]),
    ("tools that undo a rollout", &[checks::OWNERS.id]),
    ("update strategies", &[checks::STRATEGY.id]),
    ("routes", &[checks::ROUTES.id]),
    ("the network plugin", &[checks::CILIUM.id]),
];

/// What is judged besides the model.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    /// The operator.
    pub health: &'a Health,
    /// The sidecars that the token shows.
    pub sidecars: &'a Sidecars,
    /// This replica leads, or knows which one does.
    pub is_led: bool,
    /// The namespace of the control plane.
    pub system: &'a str,
    /// The namespace that the token shows; `None`: all.
    pub only: Option<&'a str>,
    /// The present time, in Unix seconds.
    pub now: i64,
}

impl<'a> Facts<'a> {
    fn shows(&self, namespace: &str) -> bool {
        self.only.is_none_or(|only| only == namespace)
    }

    fn view(&self) -> View<'a> {
        View { system: self.system, only: self.only, now: self.now, reader: Reader::Page }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Judged {
    /// What is not well, by number.
    pub findings: Vec<Finding>,
    /// The sidecars among it.
    pub sidecars: Vec<Sidecar>,
}

/// Judges the facts.
pub fn judge(facts: &Facts<'_>, model: &Model) -> Judged {
    let sidecars = sidecar_judge(facts, model);
    let mut findings = made(facts, model, &sidecars);
    findings.retain(|finding| finding.result != Outcome::Ok);
    let reported = facts.sidecars.sidecars.iter().filter(|sidecar| sidecars.is_reported(sidecar));
    Judged { findings, sidecars: reported.cloned().collect() }
}

fn sidecar_judge<'a>(facts: &Facts<'a>, model: &'a Model) -> SidecarJudge<'a> {
    let pods = model.pods().filter(|pod| pod.injected).map(|pod| Pod {
        namespace: &pod.namespace,
        name: &pod.name,
        started: Some(pod.started_unix).filter(|at| *at != 0),
        terminating: pod.terminating,
        // The model has no states of containers.
        idle: None,
    });
    let lifetime = Lifetime::of(&model.settings().leaf_lifetime).leaf;
    SidecarJudge::new(facts.view(), Some(facts.health), pods, lifetime)
}

/// Every check that is made here, whatever it has found.
fn made(facts: &Facts<'_>, model: &Model, sidecars: &SidecarJudge<'_>) -> Vec<Finding> {
    let view = facts.view();
    let mut findings = vec![
        check::leader(&Leadership::Replica { knows_leader: facts.is_led }, &view),
        check::series(facts.health),
    ];
    let config = model.config().and_then(|config| config.status.as_ref());
    findings.extend(check::config(config.into_iter().flat_map(|status| &status.conditions).map(condition)));
    findings.push(check::root(facts.health, ROOT_ENDS_SOON, &view));
    let without = facts.sidecars.without.iter().filter_map(|pod| pod.split_once('/'));
    findings.extend(check::uninjected(without.map(|(namespace, name)| uninjected(model, namespace, name))));
    findings.extend(sidecars.judge(&facts.sidecars.sidecars));
    findings.extend(check::policies(&policies(facts, model), &view));
    findings.extend(check::canaries(&canaries(facts, model)));
    findings
}

/// A pod without a sidecar. One that is gone already was of a workload that is not known.
fn uninjected<'a>(model: &Model, namespace: &'a str, name: &'a str) -> Uninjected<'a> {
    let pod = model.pod_named(namespace, name);
    let workload = pod.and_then(|pod| pod.workload.as_ref());
    let workload = workload.map(|key| format!("{}/{}", key.kind.name().to_ascii_lowercase(), key.name));
    let is_restartable = pod.is_none() || workload.is_some();
    Uninjected { pod: WithoutSidecar { namespace, name, is_restartable }, workload }
}

fn policies<'a>(facts: &Facts<'_>, model: &'a Model) -> Vec<Policy<'a>> {
    let unreadable: Vec<Policy<'_>> = model
        .unreadable_policies()
        .filter(|((namespace, _), _)| facts.shows(namespace))
        .map(|((namespace, name), policy)| {
            let state = PolicyState::Unreadable { error: &policy.error };
            Policy { namespace, name, state }
        })
        .collect();
    // Of a policy whose newest version cannot be decoded, the model has the one before, and its status.
    let unread: HashSet<(&str, &str)> =
        unreadable.iter().map(|policy| (policy.namespace, policy.name)).collect();
    let readable = model
        .policies()
        .filter(|((namespace, name), _)| facts.shows(namespace) && !unread.contains(&(&**namespace, &**name)))
        .map(|(key, policy)| read(key, policy));
    let mut all: Vec<Policy<'_>> = readable.collect();
    all.extend(unreadable);
    all.sort_by_key(|policy| (policy.namespace, policy.name));
    all
}

fn read<'a>((namespace, name): &'a Key, policy: &'a MeshPolicy) -> Policy<'a> {
    let status = policy.status.as_ref();
    let mut conditions = status.into_iter().flat_map(|status| &status.conditions);
    let state = PolicyState::Read {
        generation: policy.metadata.generation.unwrap_or(0),
        observed: status.and_then(|status| status.observed_generation),
        ready: conditions.find(|condition| condition.type_ == "Ready").map(condition),
    };
    Policy { namespace, name, state }
}

fn condition(of: &meta::Condition) -> Condition<'_> {
    Condition {
        type_: &of.type_,
        status: &of.status,
        reason: &of.reason,
        message: &of.message,
        since: Some(of.last_transition_time.0.as_second()),
    }
}

fn canaries<'a>(facts: &Facts<'_>, model: &'a Model) -> Vec<check::Canary<'a>> {
    let shown = model.canaries().filter(|((namespace, _), _)| facts.shows(namespace));
    let canary = |((namespace, name), canary): (&'a Key, &'a tulle_crds::Canary)| {
        let status = canary.status.as_ref();
        let conditions = status.into_iter().flat_map(|status| &status.conditions);
        check::Canary {
            namespace,
            name,
            is_waiting: status.is_some_and(|status| status.phase == Phase::Waiting),
            conditions: conditions.map(condition).collect(),
        }
    };
    shown.map(canary).collect()
}

#[cfg(test)]
mod tests;
