//! Which policy's section holds for a pod: the narrowest target wins, of two of equal specificity the
//! older; the younger is told that it conflicts. Sections about calls to Services are in [`super::traffic`].

use std::collections::BTreeMap;
use std::sync::Arc;

use tulle_crds::{
    AccessLog, Caller, InvalidValue, MeshPolicy, MtlsMode, POD_SECTIONS, PolicyMode, TargetKind,
};
use tulle_mesh::policy::{Access, RuleError};
use tulle_mesh::proto;

use super::{Key, Model, Pod};

/// What a policy's status is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyReport {
    /// Uids of the injected pods that it selects.
    pub pods: Vec<String>,
    /// Whether it holds.
    pub verdict: Verdict,
}

/// Whether a policy holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Accepted,
    /// A section of it is overruled by an older policy of the same specificity.
    Conflicted {
        /// The older policy.
        with: String,
        /// The section.
        section: &'static str,
    },
    /// A value cannot be enforced: which one, what to write, and what holds instead.
    Invalid(String),
    /// The Service that it targets does not exist.
    TargetNotFound(String),
}

/// Why a version of a policy is not in force.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unenforceable {
    /// No sidecar could decide by its access section.
    #[error(transparent)]
    Access(#[from] RuleError),
    /// A value of another section.
    #[error(transparent)]
    Value(#[from] InvalidValue),
}

/// How narrow a target is; more is narrower.
pub(crate) fn specificity(policy: &MeshPolicy) -> u8 {
    match policy.spec.target.kind {
        TargetKind::Namespace => 0,
        TargetKind::Service | TargetKind::Workload => 1,
    }
}

impl Model {
    /// Whether a policy's target includes a pod.
    pub fn selects(&self, key: &Key, policy: &MeshPolicy, pod: &Pod) -> bool {
        if pod.namespace != key.0 || pod.finished {
            return false;
        }
        match policy.spec.target.kind {
            TargetKind::Namespace => true,
            TargetKind::Workload => policy
                .spec
                .target
                .selector
                .as_ref()
                .is_some_and(|selector| pod.matches(&selector.match_labels)),
            TargetKind::Service => {
                let name = policy.spec.target.name.as_deref().unwrap_or("");
                let service = self.services.get(&(Arc::clone(&key.0), name.into()));
                service.is_some_and(|service| service.selects(pod))
            }
        }
    }

    /// The policy whose section holds for a pod. Only versions that hold count.
    fn section_for<'a, T>(
        &'a self,
        pod: &Pod,
        section: impl Fn(&'a MeshPolicy) -> Option<T>,
    ) -> Option<(&'a Key, &'a MeshPolicy, T)> {
        let mut best: Option<(u8, &Key, &MeshPolicy, T)> = None;
        for (key, policy) in self.by_age(&pod.namespace) {
            let Some(value) = section(policy).filter(|_| self.is_selected(key, &pod.uid)) else { continue };
            if best.as_ref().is_none_or(|(narrow, ..)| specificity(policy) > *narrow) {
                best = Some((specificity(policy), key, policy, value));
            }
        }
        best.map(|(_, key, policy, value)| (key, policy, value))
    }

    /// The mTLS mode of a pod and the policy that set it. A policy in Shadow sets nothing.
    pub(super) fn mtls_for(&self, pod: &Pod) -> (MtlsMode, Option<proto::ObjectRef>) {
        match self.section_for(pod, |policy| policy.spec.mtls.filter(|_| enforces(policy))) {
            Some((key, policy, mode)) => (mode, Some(reference(key, policy))),
            None => (self.settings.mtls, None),
        }
    }

    /// The policy in Shadow that would refuse plain text, if any.
    pub(super) fn strict_in_shadow(&self, pod: &Pod) -> Option<proto::ObjectRef> {
        let shadow = self.section_for(pod, |policy| policy.spec.mtls.filter(|_| !enforces(policy)));
        let (key, policy, mode) = shadow?;
        (mode == MtlsMode::Strict).then(|| reference(key, policy))
    }

    /// Whether clients send a pod plain text.
    pub(super) fn takes_plain_text(&self, pod: &Pod) -> bool {
        // Asked for every endpoint of every view: nearly always the answer costs nothing.
        // Rules name callers by their certificates: without those a deny would let everybody in.
        self.plain_text_is_possible()
            && self.mtls_for(pod).0 == MtlsMode::Disabled
            && matches!(self.access_policies(pod), [None, _])
    }

    /// The policies whose access sections hold for a pod: the one that is enforced, and the one that is only tried.
    pub(super) fn access_policies(&self, pod: &Pod) -> [Option<(&Key, &MeshPolicy)>; 2] {
        [PolicyMode::Enforce, PolicyMode::Shadow].map(|mode| {
            let section = |policy: &MeshPolicy| {
                (policy.spec.access.is_some() && policy.spec.mode == mode).then_some(())
            };
            self.section_for(pod, section).map(|(key, policy, ())| (key, policy))
        })
    }

    /// What limits the load of a pod: what is enforced, and what is only tried.
    pub(super) fn limits_for(&self, pod: &Pod) -> (Option<proto::LimitSet>, Option<proto::LimitSet>) {
        let of = |mode: PolicyMode| {
            let section =
                |policy: &MeshPolicy| policy.spec.limits.clone().filter(|_| policy.spec.mode == mode);
            let (key, policy, limits) = self.section_for(pod, section)?;
            let limit =
                |max: Option<u32>| max.map(|max| proto::Limit { policy: Some(reference(key, policy)), max });
            let (concurrency, connections) = (limit(limits.concurrency), limit(limits.connections));
            Some(proto::LimitSet { concurrency, connections })
        };
        (of(PolicyMode::Enforce), of(PolicyMode::Shadow))
    }

    /// What the sidecar of a pod logs. A policy in Shadow sets nothing.
    pub(super) fn logs_for(&self, pod: &Pod) -> proto::Logs {
        let section = |policy: &MeshPolicy| policy.spec.telemetry.clone().filter(|_| enforces(policy));
        let Some((key, policy, telemetry)) = self.section_for(pod, section) else {
            return proto::Logs::default();
        };
        let access = match telemetry.access_log {
            AccessLog::Disabled => proto::AccessLog::Unspecified,
            AccessLog::Errors => proto::AccessLog::Errors,
            AccessLog::Sampled => proto::AccessLog::Sampled,
            AccessLog::All => proto::AccessLog::All,
        };
        proto::Logs {
            access: access.into(),
            // A policy with an invalid share is not in force.
            sample_permyriad: telemetry.sample_permyriad().unwrap_or_default(),
            policy: Some(reference(key, policy)),
        }
    }

    /// The access sections of a pod: the one that is enforced, and the one that is only tried. A sidecar that
    /// cannot enforce what it is sent keeps its last good one.
    pub(super) fn access_for(&self, pod: &Pod) -> (Option<proto::Access>, Option<proto::Access>) {
        let rules = |(key, policy): (&Key, &MeshPolicy)| self.access_of(key, policy);
        let [enforced, tried] = self.access_policies(pod);
        (enforced.map(rules), tried.map(rules))
    }

    /// The access rules of a policy, whether or not it decides anything anywhere.
    pub fn access_of(&self, key: &Key, policy: &MeshPolicy) -> proto::Access {
        let access = policy.spec.access.clone().unwrap_or_default();
        let rules = |rules: Vec<tulle_crds::AccessRule>| {
            let rule = |rule: tulle_crds::AccessRule| proto::Rule {
                from: rule.from.iter().map(|caller| self.peer(key, caller)).collect(),
                to: rule.to.into_iter().map(operation).collect(),
            };
            rules.into_iter().map(rule).collect::<Vec<_>>()
        };
        proto::Access {
            policy: Some(reference(key, policy)),
            has_allow: access.allow.is_some(),
            allow: rules(access.allow.unwrap_or_default()),
            deny: rules(access.deny.unwrap_or_default()),
        }
    }

    /// A caller, with labels of namespaces resolved to their names.
    fn peer(&self, key: &Key, caller: &Caller) -> proto::Peer {
        if let Some(cidr) = &caller.cidr {
            return proto::Peer { cidr: cidr.clone(), ..Default::default() };
        }
        let namespaces = match (&caller.namespace, &caller.namespace_labels) {
            (Some(namespace), _) => vec![namespace.clone()],
            (None, Some(labels)) => self.namespaces_with(labels),
            (None, None) => vec![key.0.to_string()],
        };
        proto::Peer {
            service_account: caller.service_account.clone().unwrap_or_default(),
            namespaces,
            ..Default::default()
        }
    }

    fn namespaces_with(&self, labels: &BTreeMap<String, String>) -> Vec<String> {
        let has = |name: &str| {
            self.namespaces
                .get(name)
                .is_some_and(|n| labels.iter().all(|(key, value)| n.labels.get(key) == Some(value)))
        };
        let mut names: Vec<String> =
            self.namespaces.keys().filter(|name| has(name)).map(|n| n.to_string()).collect();
        names.sort_unstable();
        names
    }

    /// What a policy's status is made of.
    pub fn report(&self, key: &Key, policy: &MeshPolicy) -> PolicyReport {
        let uids = self.policy_pods(key);
        let pods: Vec<&Pod> = uids.iter().filter_map(|uid| self.pods.get(uid)).collect();
        let verdict = self.verdict(key, policy, &pods);
        PolicyReport { pods: uids.iter().map(ToString::to_string).collect(), verdict }
    }

    fn verdict(&self, key: &Key, policy: &MeshPolicy, pods: &[&Pod]) -> Verdict {
        if let Some(invalid) = self.in_force.get(key).and_then(|held| held.invalid.clone()) {
            return Verdict::Invalid(invalid);
        }
        if let (TargetKind::Service, Some(name)) = (policy.spec.target.kind, &policy.spec.target.name)
            && !self.services.contains_key(&(key.0.clone(), name.as_str().into()))
        {
            return Verdict::TargetNotFound(format!("there is no Service {name} in namespace {}", key.0));
        }
        for pod in pods {
            for (name, has) in POD_SECTIONS {
                // What is only tried does not stand in the way of what is enforced.
                let rival =
                    |candidate: &MeshPolicy| has(&candidate.spec) && candidate.spec.mode == policy.spec.mode;
                let winner = self.section_for(pod, |candidate| rival(candidate).then_some(()));
                if let Some((other, winning, ())) = winner
                    && has(&policy.spec)
                    && other != key
                    && specificity(winning) == specificity(policy)
                {
                    return Verdict::Conflicted { with: other.1.to_string(), section: name };
                }
            }
        }
        if let Some((other, section)) = self.call_conflict(key, policy) {
            return Verdict::Conflicted { with: other.1.to_string(), section };
        }
        Verdict::Accepted
    }

    /// Whether a sidecar could enforce a policy.
    ///
    /// # Errors
    /// [`Unenforceable`] names the value.
    pub(super) fn check(&self, key: &Key, policy: &MeshPolicy) -> Result<(), Unenforceable> {
        Access::compile(&self.access_of(key, policy))?;
        match policy.spec.invalid_values().into_iter().next() {
            Some(invalid) => Err(invalid.into()),
            None => Ok(()),
        }
    }
}

fn enforces(policy: &MeshPolicy) -> bool {
    policy.spec.mode == PolicyMode::Enforce
}

pub(super) fn reference(key: &Key, policy: &MeshPolicy) -> proto::ObjectRef {
    proto::ObjectRef {
        namespace: key.0.to_string(),
        name: key.1.to_string(),
        uid: policy.metadata.uid.clone().unwrap_or_default(),
        generation: policy.metadata.generation.unwrap_or_default(),
    }
}

fn operation(operation: tulle_crds::Operation) -> proto::Operation {
    proto::Operation {
        methods: operation.methods.unwrap_or_default(),
        paths: operation.paths.unwrap_or_default(),
        ports: operation.ports.unwrap_or_default().into_iter().map(u32::from).collect(),
    }
}
