//! What a pod enforces on connections that arrive: as one resource for old sidecars, and as one resource per section,
//! so that a sidecar that refuses a section keeps its last good version of that one and takes all others. Limits
//! and logs are in resources of their own only: an old sidecar that refused them would refuse everything else with them.

use std::sync::Arc;

use tulle_crds::{MtlsMode, parse_percent};
use tulle_mesh::features;
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{self, ResourceType};
use tulle_mesh::trace::Share;

use super::touched::{Compiled, Dependency};
use super::view::versioned;
use super::{Key, Model, Pod};

/// Sections of a policy that decide something for a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sections {
    /// The mTLS mode.
    pub mtls: bool,
    /// Who may call.
    pub access: bool,
    /// How much at once reaches the application.
    pub limits: bool,
    /// What the sidecar logs.
    pub telemetry: bool,
}

impl Sections {
    /// Every section.
    pub const ALL: Self = Self { mtls: true, access: true, limits: true, telemetry: true };

    /// The resources that carry them, and what users call them.
    pub fn resources(self) -> impl Iterator<Item = (ResourceType, &'static str)> {
        let all = [
            (self.mtls, (ResourceType::Mtls, "mtls")),
            (self.access, (ResourceType::Access, "access")),
            (self.limits, (ResourceType::Limits, "limits")),
            (self.telemetry, (ResourceType::Logs, "telemetry")),
        ];
        all.into_iter().filter_map(|(decides, resource)| decides.then_some(resource))
    }
}

impl Model {
    /// What a pod enforces on connections that arrive, all in one.
    pub fn inbound(&self, pod_uid: &str) -> Option<proto::Inbound> {
        let pod = self.pods.get(pod_uid)?;
        let proto::Mtls { mode, from, shadow_strict } = self.mtls_section(pod);
        let (access, shadow) = self.access_for(pod);
        let proto::Workload { workload, revision, .. } = self.workload_section(pod);
        Some(proto::Inbound {
            mtls: mode,
            mtls_from: from,
            access,
            workload,
            revision,
            shadow,
            shadow_strict,
        })
    }

    /// Which sections of a policy decide something for a pod. A policy that narrower ones overrule decides nothing,
    /// and the pod's sidecar has nothing of it to acknowledge.
    pub fn sections(&self, policy: &Key, pod_uid: &str) -> Sections {
        let Some(pod) = self.pods.get(pod_uid) else { return Sections::default() };
        let is_it = |found: &proto::ObjectRef| *found.namespace == *policy.0 && *found.name == *policy.1;
        let mtls = [self.mtls_for(pod).1, self.strict_in_shadow(pod)];
        let access = self.access_policies(pod);
        let (limits, tried) = self.limits_for(pod);
        Sections {
            mtls: mtls.iter().flatten().any(is_it),
            access: access.iter().flatten().any(|(key, _)| *key == policy),
            limits: [policy_of_limits(limits.as_ref()), policy_of_limits(tried.as_ref())]
                .iter()
                .flatten()
                .any(is_it),
            telemetry: self.logs_for(pod).policy.as_ref().is_some_and(is_it),
        }
    }

    /// The whole of it, for sidecars that know no sections.
    pub(super) fn compile_inbound(&self, name: &proto::ResourceName) -> Option<Compiled> {
        let pod = self.pods.get(name.name.as_str())?;
        let inbound = self.inbound(&pod.uid)?;
        let shadow = inbound.shadow.is_some() || inbound.shadow_strict;
        let access = inbound.access.is_some() || inbound.shadow.is_some();
        let requires = required([(access, features::ACCESS_V1), (shadow, features::SHADOW_V1)]);
        let carried = [
            inbound.mtls_from.clone(),
            policy_of(inbound.access.as_ref()),
            policy_of(inbound.shadow.as_ref()),
            self.strict_in_shadow(pod),
        ];
        Some(compiled(pod, (name, requires, Body::Inbound(inbound)), carried))
    }

    /// One section of a pod.
    pub(super) fn compile_section(&self, name: &proto::ResourceName) -> Option<Compiled> {
        let pod = self.pods.get(name.name.as_str())?;
        match name.r#type() {
            ResourceType::Workload => {
                let body = Body::Workload(self.workload_section(pod));
                Some(compiled(pod, (name, Vec::new(), body), []))
            }
            ResourceType::Mtls => {
                let mtls = self.mtls_section(pod);
                let requires = required([(mtls.shadow_strict, features::SHADOW_V1)]);
                let carried = [mtls.from.clone(), self.strict_in_shadow(pod)];
                Some(compiled(pod, (name, requires, Body::Mtls(mtls)), carried))
            }
            ResourceType::Access => {
                let (access, shadow) = self.access_for(pod);
                let rules = access.is_some() || shadow.is_some();
                let requires =
                    required([(rules, features::ACCESS_V1), (shadow.is_some(), features::SHADOW_V1)]);
                let carried = [policy_of(access.as_ref()), policy_of(shadow.as_ref())];
                let body = Body::Access(proto::AccessRules { access, shadow });
                Some(compiled(pod, (name, requires, body), carried))
            }
            ResourceType::Limits => {
                let (enforced, shadow) = self.limits_for(pod);
                let requires = required([(enforced.is_some() || shadow.is_some(), features::LIMITS_V1)]);
                let carried = [policy_of_limits(enforced.as_ref()), policy_of_limits(shadow.as_ref())];
                let body = Body::Limits(proto::Limits { enforced, shadow });
                Some(compiled(pod, (name, requires, body), carried))
            }
            ResourceType::Logs => {
                let logs = self.logs_for(pod);
                let writes = logs.access() != proto::AccessLog::Unspecified;
                let (requires, carried) = (required([(writes, features::LOGS_V1)]), [logs.policy.clone()]);
                Some(compiled(pod, (name, requires, Body::Logs(logs)), carried))
            }
            _ => None,
        }
    }

    fn workload_section(&self, pod: &Pod) -> proto::Workload {
        let workload = pod.workload.as_ref().map(|w| format!("{}/{}", w.kind.name(), w.name));
        proto::Workload {
            workload: workload.unwrap_or_default(),
            revision: pod.revision().to_owned(),
            zone: self.zone_of(&pod.node).to_owned(),
            node: pod.node.to_string(),
            tracing: self.settings().tracing.as_ref().map(tracing),
        }
    }

    fn mtls_section(&self, pod: &Pod) -> proto::Mtls {
        let (mode, from) = self.mtls_for(pod);
        let mode = match mode {
            MtlsMode::Permissive => proto::MtlsMode::Permissive,
            MtlsMode::Strict => proto::MtlsMode::Strict,
            MtlsMode::Disabled => proto::MtlsMode::Off,
        };
        proto::Mtls { mode: mode.into(), from, shadow_strict: self.strict_in_shadow(pod).is_some() }
    }
}

/// A percentage that cannot be read begins no traces: those that exist are joined all the same.
fn tracing(setting: &tulle_crds::Tracing) -> proto::Tracing {
    let share = parse_percent(&setting.sampling).map_or(Share::NONE, Share::of_fraction);
    proto::Tracing { endpoint: setting.endpoint.clone(), share: share.ids() }
}

/// A resource of a pod, stamped with the policies that it carries, each once.
fn compiled(
    pod: &Pod,
    (name, requires, body): (&proto::ResourceName, Vec<&'static str>, Body),
    carried: impl IntoIterator<Item = Option<proto::ObjectRef>>,
) -> Compiled {
    let mut stamps: Vec<proto::Stamp> = Vec::new();
    for policy in carried.into_iter().flatten() {
        let stamp = policy_stamp(policy);
        if !stamps.contains(&stamp) {
            stamps.push(stamp);
        }
    }
    Compiled {
        resource: versioned(name, requires, body),
        stamps,
        counted_as: None,
        depends: Dependency::Inbound(Arc::clone(&pod.uid)),
    }
}

/// The features that are needed.
pub(super) fn required(features: impl IntoIterator<Item = (bool, &'static str)>) -> Vec<&'static str> {
    features.into_iter().filter_map(|(needed, name)| needed.then_some(name)).collect()
}

fn policy_of(access: Option<&proto::Access>) -> Option<proto::ObjectRef> {
    access.and_then(|access| access.policy.clone())
}

/// The policy that both limits are of.
fn policy_of_limits(limits: Option<&proto::LimitSet>) -> Option<proto::ObjectRef> {
    let limits = limits?;
    limits.concurrency.as_ref().or(limits.connections.as_ref())?.policy.clone()
}

fn policy_stamp(policy: proto::ObjectRef) -> proto::Stamp {
    proto::Stamp {
        kind: proto::stamp::Kind::Policy.into(),
        namespace: policy.namespace,
        name: policy.name,
        uid: policy.uid,
        version: u64::try_from(policy.generation).unwrap_or_default(),
    }
}
