//! Which pods each policy selects, and the version of it that holds. Both are kept, so that an event costs the
//! policies of one namespace and never all of them.
//!
//! A policy with a value that no sidecar could enforce is never sent. Its last valid version stays in force; where
//! this replica has seen none, its access section admits nobody, because a rule that was meant to keep somebody out
//! must not let everybody in. In mode Shadow it then does nothing, because it never refuses anything. Where another
//! section is invalid, those that decide who is let in hold as they are, and no other does.
//!
//! A policy that this build cannot decode has no target that anybody knows. Its last readable version stays in force.
//! Where there is none it counts as absent and its status says so: to refuse everything in its namespace instead would
//! let one object of a newer version stop a whole team, when an older operator is restarted.

use std::collections::BTreeSet;
use std::sync::Arc;

use tulle_crds::{AccessSpec, MeshPolicy, MtlsMode, PolicyMode, TargetKind};

use super::policy::Unenforceable;
use super::traffic::remove_traffic;
use super::{Key, Model, Pod};

/// A policy that this build cannot decode.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreadable {
    /// What is wrong with it.
    pub error: String,
    /// Its generation.
    pub generation: i64,
    /// Its version, for writing its status.
    pub resource_version: Option<String>,
}

/// What holds of a policy.
#[derive(Clone, Debug)]
pub(super) struct InForce {
    /// Its last valid version, or what stands in for it.
    pub(super) policy: MeshPolicy,
    /// `policy` is a version that was valid.
    was_valid: bool,
    /// What is wrong with the newest version, and what holds instead.
    pub(super) invalid: Option<String>,
}

impl Model {
    /// Takes a policy over.
    pub fn apply_policy(&mut self, key: Key, policy: MeshPolicy) {
        self.touched.policies.insert(key.clone());
        let was_unreadable = self.unreadable_policies.remove(&key).is_some();
        let what = |policy: &MeshPolicy| {
            let metadata = &policy.metadata;
            (metadata.uid.clone(), metadata.generation, metadata.creation_timestamp.clone())
        };
        let known = self.policies.get(&key);
        let same = known.is_some_and(|known| known.spec == policy.spec && what(known) == what(&policy));
        if same && !was_unreadable {
            // Only its status, which is written from here.
            self.policies.insert(key, policy);
            return;
        }
        self.touch_calls_of(&key);
        let known = self.in_force.remove(&key);
        let in_force = self.what_holds(&key, &policy, known);
        self.policies.insert(key.clone(), policy);
        self.hold(&key, Some(in_force));
        self.touch_calls_of(&key);
    }

    /// Notes a policy that this build cannot decode.
    pub fn mark_policy_unreadable(&mut self, key: Key, unreadable: Unreadable) {
        self.touched.policies.insert(key.clone());
        self.unreadable_policies.insert(key, unreadable);
    }

    /// Policies that this build cannot decode.
    pub fn unreadable_policies(&self) -> impl Iterator<Item = (&Key, &Unreadable)> {
        self.unreadable_policies.iter()
    }

    /// Forgets a policy.
    pub fn delete_policy(&mut self, key: &Key) {
        self.touched.policies.insert(key.clone());
        self.unreadable_policies.remove(key);
        if self.policies.remove(key).is_some() {
            self.touch_calls_of(key);
            self.hold(key, None);
        }
    }

    /// What holds of a new version of a policy, given what held before.
    fn what_holds(&self, key: &Key, policy: &MeshPolicy, known: Option<InForce>) -> InForce {
        let Err(error) = self.check(key, policy) else {
            return InForce { policy: policy.clone(), was_valid: true, invalid: None };
        };
        let same_object = |known: &InForce| known.policy.metadata.uid == policy.metadata.uid;
        if let Some(known) = known.filter(|known| known.was_valid && same_object(known)) {
            let invalid = Some(format!("{error}; the last valid version stays in force"));
            return InForce { invalid, ..known };
        }
        let mut instead = policy.clone();
        remove_traffic(&mut instead.spec);
        let spec = &mut instead.spec;
        let consequence = match (&error, spec.mode) {
            (Unenforceable::Value(_), _) if spec.mtls.is_some() || spec.access.is_some() => {
                "of its sections only mtls and access are in force until it is fixed"
            }
            (Unenforceable::Value(_), _) => "nothing of it is in force until it is fixed",
            (Unenforceable::Access(_), PolicyMode::Enforce) => {
                spec.mtls = None;
                spec.access = Some(AccessSpec { allow: Some(Vec::new()), deny: None });
                "nobody is admitted until it is fixed"
            }
            (Unenforceable::Access(_), PolicyMode::Shadow) => {
                (spec.mtls, spec.access) = (None, None);
                "nothing is tried until it is fixed"
            }
        };
        InForce { policy: instead, was_valid: false, invalid: Some(format!("{error}; {consequence}")) }
    }

    /// Puts what holds of a policy into all indices, or takes it out of them.
    fn hold(&mut self, key: &Key, in_force: Option<InForce>) {
        let possible = self.plain_text_is_possible();
        match in_force {
            Some(in_force) => {
                if names_labels(&in_force.policy) {
                    self.by_namespace_labels.insert(key.clone());
                } else {
                    self.by_namespace_labels.remove(key);
                }
                self.in_force.insert(key.clone(), in_force);
            }
            None => {
                self.in_force.remove(key);
                self.by_namespace_labels.remove(key);
            }
        }
        let disables = |held: &InForce| held.policy.spec.mtls == Some(MtlsMode::Disabled);
        self.some_policy_disables_mtls = self.in_force.values().any(disables);
        self.order(&key.0);
        self.reselect(key, possible || self.plain_text_is_possible());
        // A verdict depends on every other policy of the namespace.
        let all = self.ordered.get(&key.0).into_iter().flatten();
        self.touched.policies.extend(all.cloned());
    }

    /// Whether clients send plain text to any pod that has a sidecar.
    pub(super) fn plain_text_is_possible(&self) -> bool {
        self.settings.mtls == MtlsMode::Disabled || self.some_policy_disables_mtls
    }

    /// Sorts the policies of a namespace by age, then by name.
    fn order(&mut self, namespace: &Arc<str>) {
        let from: Key = (Arc::clone(namespace), "".into());
        let of_namespace = self.policies.range(from..).take_while(|(key, _)| key.0 == *namespace);
        let mut keys: Vec<Key> = of_namespace.map(|(key, _)| key.clone()).collect();
        let created = |key: &Key| self.policies.get(key).and_then(|p| p.metadata.creation_timestamp.clone());
        keys.sort_by(|a, b| created(a).cmp(&created(b)).then(a.cmp(b)));
        if keys.is_empty() {
            self.ordered.remove(namespace);
        } else {
            self.ordered.insert(Arc::clone(namespace), keys);
        }
    }

    /// Selects the pods of a policy anew, and touches those that it selected or selects.
    fn reselect(&mut self, key: &Key, plain_text_possible: bool) {
        let mut either = self.selected.remove(key).unwrap_or_default();
        if let Some(held) = self.in_force.get(key) {
            let uids = self.pods_by_namespace.get(&key.0).into_iter().flatten();
            let selected: BTreeSet<Arc<str>> = uids
                .filter(|uid| self.pods.get(*uid).is_some_and(|pod| self.selects(key, &held.policy, pod)))
                .cloned()
                .collect();
            either.extend(selected.iter().cloned());
            self.selected.insert(key.clone(), selected);
        }
        self.touch_selected(&either, plain_text_possible);
    }

    /// Policies that target a Service whose selector has changed, or that has come or gone.
    pub(super) fn reselect_for_service(&mut self, service: &Key) {
        let targets = |policy: &MeshPolicy| {
            policy.spec.target.kind == TargetKind::Service
                && policy.spec.target.name.as_deref() == Some(&*service.1)
        };
        let all = self.ordered.get(&service.0).into_iter().flatten();
        let mut its: Vec<Key> = Vec::new();
        for key in all {
            let held = self.in_force.get(key).is_some_and(|held| targets(&held.policy));
            // The newest version names the target in the verdict even where it does not hold.
            if held || self.policies.get(key).is_some_and(targets) {
                its.push(key.clone());
            }
        }
        if its.is_empty() {
            return;
        }
        let possible = self.plain_text_is_possible();
        for key in &its {
            self.reselect(key, possible);
        }
        // Whom it selects decides which other policies conflict.
        let all = self.ordered.get(&service.0).into_iter().flatten();
        self.touched.policies.extend(all.cloned());
    }

    /// Adds a pod to the policies that select it.
    pub(super) fn select_pod(&mut self, pod: &Pod) {
        let keys = self.ordered.get(&pod.namespace).into_iter().flatten();
        let selecting: Vec<Key> = keys
            .filter(|key| self.in_force.get(*key).is_some_and(|held| self.selects(key, &held.policy, pod)))
            .cloned()
            .collect();
        for key in selecting {
            self.selected.entry(key).or_default().insert(Arc::clone(&pod.uid));
        }
    }

    /// Removes a pod from the policies that select it.
    pub(super) fn deselect_pod(&mut self, pod: &Pod) {
        for key in self.ordered.get(&pod.namespace).into_iter().flatten() {
            if let Some(selected) = self.selected.get_mut(key) {
                selected.remove(&pod.uid);
            }
        }
    }

    /// Whether the version of a policy that holds selects a pod.
    pub(crate) fn is_selected(&self, key: &Key, uid: &str) -> bool {
        self.selected.get(key).is_some_and(|selected| selected.contains(uid))
    }

    /// The policies of a namespace that hold, the oldest first.
    pub(crate) fn by_age(&self, namespace: &str) -> impl Iterator<Item = (&Key, &MeshPolicy)> {
        let keys = self.ordered.get(namespace).into_iter().flatten();
        keys.filter_map(|key| Some((key, &self.in_force.get(key)?.policy)))
    }

    /// Uids of the pods that a policy selects and whose acknowledgement counts, in order: one that has no sidecar, has
    /// no address yet or is going enforces nothing that anybody waits for.
    pub fn policy_pods(&self, key: &Key) -> Vec<Arc<str>> {
        let selected = self.selected.get(key).into_iter().flatten();
        let serves = |pod: &Pod| pod.injected && !pod.terminating && !pod.ips.is_empty();
        selected.filter(|uid| self.pods.get(*uid).is_some_and(serves)).cloned().collect()
    }

    /// The labels of a namespace have changed: policies that name callers by them mean others now.
    pub(super) fn touch_callers_by_label(&mut self) {
        let selected = self.by_namespace_labels.iter().filter_map(|key| self.selected.get(key));
        self.touched.inbound.extend(selected.flatten().cloned());
    }
}

/// Whether a policy names callers by labels of their namespaces.
fn names_labels(policy: &MeshPolicy) -> bool {
    let access = policy.spec.access.iter();
    let rules = access.flat_map(|access| [&access.allow, &access.deny]).flatten().flatten();
    rules.flat_map(|rule| &rule.from).any(|caller| caller.namespace_labels.is_some())
}
