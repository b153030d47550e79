//! What policies say about calls to a Service: timeouts, retries, breaker, balancing and faults, which clients' sidecars
//! carry out.
//!
//! In: the versions of policies that hold. Out: the sections for one Service, section by section that of the narrowest
//! target (the Service over its namespace, of two equals the older), enforced and only tried. A policy for pods by their
//! labels says nothing about any Service: a call is made to a Service, and no pod has been chosen yet.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use tulle_crds::{
    BalanceBy, BalanceSpec, BreakerSpec, FaultsSpec, MeshPolicy, MeshPolicySpec, PolicyMode, RetryOn,
    RetrySpec, TargetKind, TimeoutSpec, ZonePolicy,
};
use tulle_mesh::proto;

use super::address::Owner;
use super::object::Distribution;
use super::policy::{reference, specificity};
use super::{Key, Model};

/// A section by its name, and whether a policy has it.
pub(super) type Section = (&'static str, fn(&MeshPolicySpec) -> bool);

/// The sections about calls to Services.
pub(super) const CLIENT_SECTIONS: [Section; 5] = [
    ("timeout", |spec| spec.timeout.is_some()),
    ("retry", |spec| spec.retry.is_some()),
    ("breaker", |spec| spec.breaker.is_some()),
    ("balance", |spec| spec.balance.is_some()),
    ("faults", |spec| spec.faults.is_some()),
];

/// The names of a policy's sections about calls to Services.
pub fn client_sections(spec: &MeshPolicySpec) -> Vec<&'static str> {
    CLIENT_SECTIONS.iter().filter_map(|(name, has)| has(spec).then_some(*name)).collect()
}

/// Whether a policy has sections about pods.
pub fn has_pod_sections(spec: &MeshPolicySpec) -> bool {
    spec.mtls.is_some() || spec.access.is_some() || spec.limits.is_some()
}

/// Takes out of a policy all sections but those that decide who is let in.
pub(super) fn remove_traffic(spec: &mut MeshPolicySpec) {
    spec.limits = None;
    spec.timeout = None;
    spec.retry = None;
    spec.breaker = None;
    spec.balance = None;
    spec.faults = None;
}

/// Whether a policy of the Service's namespace is about calls to it.
fn concerns(policy: &MeshPolicy, service: &Key) -> bool {
    let target = &policy.spec.target;
    match target.kind {
        TargetKind::Namespace => true,
        TargetKind::Service => target.name.as_deref() == Some(&*service.1),
        TargetKind::Workload => false,
    }
}

impl Model {
    /// The sections about calls to a Service: those that are enforced, and those that are only tried.
    pub fn traffic_for(&self, service: &Key) -> (Option<proto::Traffic>, Option<proto::Traffic>) {
        (self.traffic_in(service, PolicyMode::Enforce), self.traffic_in(service, PolicyMode::Shadow))
    }

    fn traffic_in(&self, service: &Key, mode: PolicyMode) -> Option<proto::Traffic> {
        // Most namespaces have no such policy.
        let mut policies = self.by_age(&service.0);
        policies.find(|(_, policy)| policy.spec.mode == mode && concerns_calls(&policy.spec))?;
        let distribution = self.services.get(service).map(|service| service.distribution);
        let distribution = distribution.unwrap_or_default();
        let made = proto::Traffic {
            timeout: self.client_section(service, mode, |spec| spec.timeout.as_ref(), timeouts),
            retry: self.client_section(service, mode, |spec| spec.retry.as_ref(), retries),
            breaker: self.client_section(service, mode, |spec| spec.breaker.as_ref(), breaker),
            balance: self.client_section(
                service,
                mode,
                |spec| spec.balance.as_ref(),
                |spec, policy| balance(spec, policy, distribution),
            ),
            faults: self.client_section(service, mode, |spec| spec.faults.as_ref(), faults),
        };
        (made != proto::Traffic::default()).then_some(made)
    }

    /// One section. A value that is invalid is never in force: what does not compile is left out.
    fn client_section<'a, S: 'a, T>(
        &'a self,
        service: &Key,
        mode: PolicyMode,
        section: impl Fn(&'a MeshPolicySpec) -> Option<&'a S>,
        compile: impl Fn(&S, proto::ObjectRef) -> Option<T>,
    ) -> Option<T> {
        let (key, policy) = self.winner(service, mode, |spec| section(spec).is_some())?;
        compile(section(&policy.spec)?, reference(key, policy))
    }

    /// The policy whose section holds for calls to a Service.
    fn winner<'a>(
        &'a self,
        service: &Key,
        mode: PolicyMode,
        has: impl Fn(&'a MeshPolicySpec) -> bool,
    ) -> Option<(&'a Key, &'a MeshPolicy)> {
        let mut best: Option<(&Key, &MeshPolicy)> = None;
        for (key, policy) in self.by_age(&service.0) {
            if policy.spec.mode != mode || !concerns(policy, service) || !has(&policy.spec) {
                continue;
            }
            // The older comes first, and stays first among equals.
            if best.is_none_or(|(_, best)| specificity(policy) > specificity(best)) {
                best = Some((key, policy));
            }
        }
        best
    }

    /// The Services that a policy's sections about calls are for, whether or not they decide anything there.
    fn called_services(&self, policy: &Key) -> Vec<Key> {
        let Some(held) = self.in_force.get(policy) else { return Vec::new() };
        let spec = &held.policy.spec;
        if !concerns_calls(spec) {
            return Vec::new();
        }
        match (spec.target.kind, &spec.target.name) {
            (TargetKind::Namespace, _) => self.services_in(&policy.0).map(|(key, _)| key.clone()).collect(),
            (TargetKind::Service, Some(name)) => vec![(Arc::clone(&policy.0), name.as_str().into())],
            (TargetKind::Service, None) | (TargetKind::Workload, _) => Vec::new(),
        }
    }

    /// Touches what clients of a policy's Services are sent. To be called before and after the policy changes.
    pub(super) fn touch_calls_of(&mut self, policy: &Key) {
        for service in self.called_services(policy) {
            self.touch_routes_of(&service);
        }
    }

    /// The addresses of the Services for which a policy decides something about calls: who dials one of them has to
    /// carry the policy out.
    pub fn called_addresses(&self, policy: &Key) -> BTreeSet<SocketAddr> {
        let Some(mode) = self.in_force.get(policy).map(|held| held.policy.spec.mode) else {
            return BTreeSet::new();
        };
        let decides = |service: &Key| {
            CLIENT_SECTIONS
                .iter()
                .any(|(_, has)| self.winner(service, mode, has).is_some_and(|(winner, _)| winner == policy))
        };
        let mut addresses = BTreeSet::new();
        for key in self.called_services(policy) {
            let Some(service) = self.services.get(&key).filter(|_| decides(&key)) else { continue };
            let ports = service.ports.iter().map(|port| port.port);
            let all = ports.flat_map(|port| service.ips().map(move |ip| SocketAddr::new(ip, port)));
            let leads_here = |address: &SocketAddr| matches!(self.owner(*address), Owner::Service(owner, _) if *owner == key);
            addresses.extend(all.filter(leads_here));
        }
        addresses
    }

    /// An older policy for exactly the same Services that has a section about calls too, and the section.
    pub(super) fn call_conflict(&self, key: &Key, policy: &MeshPolicy) -> Option<(&Key, &'static str)> {
        let target = |policy: &MeshPolicy| (policy.spec.target.kind, policy.spec.target.name.clone());
        if policy.spec.target.kind == TargetKind::Workload {
            return None;
        }
        let alike =
            |other: &MeshPolicy| other.spec.mode == policy.spec.mode && target(other) == target(policy);
        CLIENT_SECTIONS.iter().filter(|(_, has)| has(&policy.spec)).find_map(|(name, has)| {
            let (oldest, _) = self.by_age(&key.0).find(|(_, other)| alike(other) && has(&other.spec))?;
            (oldest != key).then_some((oldest, *name))
        })
    }
}

/// Whether a policy says something about calls to any Service.
fn concerns_calls(spec: &MeshPolicySpec) -> bool {
    spec.target.kind != TargetKind::Workload && CLIENT_SECTIONS.iter().any(|(_, has)| has(spec))
}

fn timeouts(spec: &TimeoutSpec, policy: proto::ObjectRef) -> Option<proto::Timeouts> {
    let tulle_crds::TimeoutValues { request_ms, attempt_ms, idle_ms } = spec.values().ok()?;
    Some(proto::Timeouts { policy: Some(policy), request_ms, attempt_ms, idle_ms })
}

fn retries(spec: &RetrySpec, policy: proto::ObjectRef) -> Option<proto::Retries> {
    use proto::retries::On;
    let on = |on: &RetryOn| match on {
        RetryOn::ServerError => On::On5xx.into(),
        RetryOn::Reset => On::Reset.into(),
        RetryOn::Connect => On::Connect.into(),
        RetryOn::Unavailable => On::Unavailable.into(),
    };
    Some(proto::Retries {
        policy: Some(policy),
        on: spec.on.iter().map(on).collect(),
        attempts: spec.attempts,
        budget_percent: spec.budget_percent().ok()?,
    })
}

fn breaker(spec: &BreakerSpec, policy: proto::ObjectRef) -> Option<proto::Breaker> {
    let tulle_crds::BreakerValues { eject_ms, max_ejected_percent } = spec.values().ok()?;
    let consecutive_failures = spec.consecutive_failures;
    Some(proto::Breaker { policy: Some(policy), consecutive_failures, eject_ms, max_ejected_percent })
}

/// Without a word about zones, the Service's own preference goes on to hold.
fn balance(
    spec: &BalanceSpec,
    policy: proto::ObjectRef,
    distribution: Distribution,
) -> Option<proto::Balance> {
    use proto::balance::{By, Zone};
    let warm_up_ms = spec.warm_up_ms().ok()?;
    let hash = spec.hash.clone().unwrap_or_default();
    let (by, hash_name) = match (spec.by, hash.header, hash.cookie) {
        (BalanceBy::Latency, ..) => (By::Latency, None),
        (BalanceBy::Requests, ..) => (By::Requests, None),
        (BalanceBy::RoundRobin, ..) => (By::RoundRobin, None),
        (BalanceBy::Hash, Some(header), _) => (By::HashHeader, Some(header)),
        (BalanceBy::Hash, None, Some(cookie)) => (By::HashCookie, Some(cookie)),
        (BalanceBy::Hash, None, None) => (By::HashSource, None),
    };
    let zone = match (spec.zone, distribution) {
        (Some(ZonePolicy::Only), _) => Zone::Only,
        (Some(ZonePolicy::Prefer), _) | (None, Distribution::SameZone | Distribution::SameNode) => {
            Zone::Prefer
        }
        (Some(ZonePolicy::Any), _) | (None, Distribution::Any) => Zone::Any,
    };
    Some(proto::Balance {
        policy: Some(policy),
        by: by.into(),
        hash_name: hash_name.unwrap_or_default(),
        zone: zone.into(),
        warm_up_ms,
    })
}

fn faults(spec: &FaultsSpec, policy: proto::ObjectRef) -> Option<proto::Faults> {
    let values = spec.values().ok()?;
    Some(proto::Faults {
        policy: Some(policy),
        delay_ms: values.delay_ms,
        delay_permyriad: values.delay_permyriad,
        abort_status: values.abort_status,
        abort_permyriad: values.abort_permyriad,
        until_unix: values.until_unix,
    })
}
