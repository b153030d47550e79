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
    BalanceBy, BalanceSpec, BreakerSpec, CALL_SECTIONS, FaultsSpec, MeshPolicy, MeshPolicySpec, PolicyMode,
    RetryOn, RetrySpec, TargetKind, TimeoutSpec, ZonePolicy,
};
use tulle_mesh::proto;

use super::policy::{reference, specificity};
use super::{Key, Model};

/// Takes out of a policy all sections but those that decide who is let in.
pub(super) fn remove_traffic(spec: &mut MeshPolicySpec) {
    spec.limits = None;
    spec.timeout = None;
    spec.retry = None;
    spec.breaker = None;
    spec.balance = None;
    spec.faults = None;
    spec.telemetry = None;
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
        let made = proto::Traffic {
            timeout: self.client_section(service, mode, |spec| spec.timeout.as_ref(), timeouts),
            retry: self.client_section(service, mode, |spec| spec.retry.as_ref(), retries),
            breaker: self.client_section(service, mode, |spec| spec.breaker.as_ref(), breaker),
            balance: self.client_section(service, mode, |spec| spec.balance.as_ref(), balance),
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
            CALL_SECTIONS
                .iter()
                .any(|(_, has)| self.winner(service, mode, has).is_some_and(|(winner, _)| winner == policy))
        };
        let mut addresses = BTreeSet::new();
        for key in self.called_services(policy) {
            let Some(service) = self.services.get(&key).filter(|_| decides(&key)) else { continue };
            for port in &service.ports {
                addresses.extend(self.addresses_at(&key, service, port.port));
            }
        }
        addresses
    }

    /// Why the sections about calls of a policy hold for no call: nobody dials an address of its Service, and no route
    /// leads there. `None`: some call may come, or there is no such Service.
    pub fn uncalled(&self, policy: &Key, spec: &MeshPolicySpec) -> Option<String> {
        let name = spec.target.name.as_deref().filter(|_| spec.target.kind == TargetKind::Service)?;
        let key: Key = (Arc::clone(&policy.0), name.into());
        let service = self.services.get(&key)?;
        let sections = spec.call_sections().join(", ");
        if sections.is_empty() || service.ips().next().is_some() || self.is_led_to(&key) {
            return None;
        }
        Some(if service.headless {
            format!(
                "target a Service with a cluster IP for {sections}: Service {name} is headless, and clients dial its pods by their own addresses"
            )
        } else {
            format!(
                "target a Service with a cluster IP for {sections}: Service {name} is an ExternalName, an alias in DNS"
            )
        })
    }

    /// An older policy for exactly the same Services that has a section about calls too, and the section.
    pub(super) fn call_conflict(&self, key: &Key, policy: &MeshPolicy) -> Option<(&Key, &'static str)> {
        let target = |policy: &MeshPolicy| (policy.spec.target.kind, policy.spec.target.name.clone());
        if policy.spec.target.kind == TargetKind::Workload {
            return None;
        }
        let alike =
            |other: &MeshPolicy| other.spec.mode == policy.spec.mode && target(other) == target(policy);
        CALL_SECTIONS.iter().filter(|(_, has)| has(&policy.spec)).find_map(|(name, has)| {
            let (oldest, _) = self.by_age(&key.0).find(|(_, other)| alike(other) && has(&other.spec))?;
            (oldest != key).then_some((oldest, *name))
        })
    }
}

/// Whether a policy says something about calls to any Service.
fn concerns_calls(spec: &MeshPolicySpec) -> bool {
    spec.target.kind != TargetKind::Workload && CALL_SECTIONS.iter().any(|(_, has)| has(spec))
}

fn timeouts(spec: &TimeoutSpec, policy: proto::ObjectRef) -> Option<proto::Timeouts> {
    let tulle_crds::TimeoutValues { request_ms, attempt_ms, idle_ms } = spec.values().ok()?;
    Some(proto::Timeouts { policy: Some(policy), request_ms, attempt_ms, idle_ms })
}

fn retries(spec: &RetrySpec, policy: proto::ObjectRef) -> Option<proto::Retries> {
    use proto::retries::On;
    let on = |on: &RetryOn| match on {
        RetryOn::ServerError => On::On5xx,
        RetryOn::Reset => On::Reset,
        RetryOn::Connect => On::Connect,
        RetryOn::Unavailable => On::Unavailable,
    };
    Some(proto::Retries {
        policy: Some(policy),
        on: spec.reasons().map(|reason| on(&reason).into()).collect(),
        attempts: spec.attempts,
        budget_percent: spec.budget_percent().ok()?,
    })
}

fn breaker(spec: &BreakerSpec, policy: proto::ObjectRef) -> Option<proto::Breaker> {
    let tulle_crds::BreakerValues { eject_ms, max_ejected_percent } = spec.values().ok()?;
    let consecutive_failures = spec.consecutive_failures;
    Some(proto::Breaker { policy: Some(policy), consecutive_failures, eject_ms, max_ejected_percent })
}

fn balance(spec: &BalanceSpec, policy: proto::ObjectRef) -> Option<proto::Balance> {
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
    let zone = match spec.zone {
        Some(ZonePolicy::Only) => Zone::Only,
        Some(ZonePolicy::Prefer) => Zone::Prefer,
        Some(ZonePolicy::Any) => Zone::Any,
        // The Service's own `trafficDistribution` goes on to hold.
        None => Zone::Unset,
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::net::IpAddr;

    use serde_json::{Value, json};

    use super::*;
    use crate::model::tests::{key, pod, policy, shop};
    use crate::model::{Service, Verdict};

    fn web() -> Value {
        json!({"kind": "Service", "name": "web"})
    }

    fn wait(request: &str) -> Value {
        json!({"request": request})
    }

    fn model() -> Model {
        shop(&[pod("a", "10.1.0.1", "r1")])
    }

    fn apply(model: &mut Model, name: &str, age: u32, spec: Value) {
        model.apply_policy(key("shop", name), policy(name, age, spec));
    }

    fn verdict(model: &Model, name: &str) -> Verdict {
        let key = key("shop", name);
        model.report(&key, &model.policies[&key]).verdict
    }

    /// Whose timeout holds for the Service, and how long it is.
    fn timeout(model: &Model, service: &str) -> Option<(String, u32)> {
        let timeout = model.traffic_for(&key("shop", service)).0?.timeout?;
        Some((timeout.policy?.name, timeout.request_ms))
    }

    #[test]
    fn each_section_is_that_of_the_narrowest_target_and_of_two_equals_of_the_older() {
        let mut model = model();
        let retry = json!({"on": ["5xx", "connect"], "attempts": 1});
        let wide = json!({"target": {"kind": "Namespace"}, "timeout": wait("9s"), "retry": retry});
        apply(&mut model, "wide", 1, wide);
        assert_eq!(timeout(&model, "web"), Some(("wide".to_owned(), 9000)));
        apply(&mut model, "younger", 3, json!({"target": web(), "timeout": wait("1s")}));
        apply(&mut model, "older", 2, json!({"target": web(), "timeout": wait("2s")}));
        assert_eq!(timeout(&model, "web"), Some(("older".to_owned(), 2000)));
        assert_eq!(timeout(&model, "other"), Some(("wide".to_owned(), 9000)), "another Service");
        let retry = model.traffic_for(&key("shop", "web")).0.unwrap().retry.unwrap();
        assert_eq!(
            (retry.policy.unwrap().name.as_str(), retry.attempts, retry.budget_percent),
            ("wide", 1, 20)
        );
        assert_eq!(retry.on, [proto::retries::On::On5xx as i32, proto::retries::On::Connect as i32]);
        assert!(model.traffic_for(&key("other", "web")).0.is_none(), "another namespace");
        let conflicted = Verdict::Conflicted { with: "older".to_owned(), section: "timeout" };
        assert_eq!(verdict(&model, "younger"), conflicted);
        assert_eq!(
            (verdict(&model, "older"), verdict(&model, "wide")),
            (Verdict::Accepted, Verdict::Accepted)
        );
    }

    #[test]
    fn what_is_only_tried_stands_beside_what_is_enforced() {
        let mut model = model();
        apply(&mut model, "tried", 1, json!({"target": web(), "mode": "Shadow", "timeout": wait("1s")}));
        apply(&mut model, "enforced", 2, json!({"target": web(), "timeout": wait("5s")}));
        let (enforced, tried) = model.traffic_for(&key("shop", "web"));
        let of = |traffic: Option<proto::Traffic>| traffic.unwrap().timeout.unwrap().request_ms;
        assert_eq!((of(enforced), of(tried)), (5000, 1000));
        assert_eq!(verdict(&model, "enforced"), Verdict::Accepted);
    }

    #[test]
    fn sections_become_numbers() {
        let mut model = model();
        let spec = json!({
            "target": web(), "breaker": {"ejectFor": "20s"},
            "balance": {"by": "Hash", "hash": {"cookie": "session"}, "zone": "Only", "warmUp": "30s"},
            "faults": {"abort": {"status": 503, "of": "0.5%"}, "until": "2026-12-01T12:00:00Z"},
        });
        apply(&mut model, "all", 1, spec);
        let traffic = model.traffic_for(&key("shop", "web")).0.unwrap();
        let (breaker, balance, faults) =
            (traffic.breaker.unwrap(), traffic.balance.unwrap(), traffic.faults.unwrap());
        assert_eq!(
            (breaker.consecutive_failures, breaker.eject_ms, breaker.max_ejected_percent),
            (5, 20_000, 50)
        );
        assert_eq!(balance.by(), proto::balance::By::HashCookie);
        assert_eq!(balance.zone(), proto::balance::Zone::Only);
        assert_eq!((balance.hash_name.as_str(), balance.warm_up_ms), ("session", 30_000));
        assert_eq!((faults.abort_status, faults.abort_permyriad, faults.delay_permyriad), (503, 50, 0));
        assert_eq!(faults.until_unix, 1_796_126_400);
        assert!(traffic.timeout.is_none() && traffic.retry.is_none());
        for (written, sent) in
            [(json!({"zone": "Any"}), proto::balance::Zone::Any), (json!({}), proto::balance::Zone::Unset)]
        {
            apply(&mut model, "all", 1, json!({"target": web(), "balance": written}));
            let traffic = model.traffic_for(&key("shop", "web")).0.unwrap();
            assert_eq!(traffic.balance.unwrap().zone(), sent);
        }
    }

    #[test]
    fn nothing_of_an_invalid_value_is_sent_and_the_verdict_says_what_to_write() {
        let mut model = model();
        let invalid = json!({"target": web(), "mtls": "Strict", "timeout": {"request": "1s", "attempt": "3s"}, "breaker": {}});
        apply(&mut model, "p", 1, invalid.clone());
        assert_eq!(model.traffic_for(&key("shop", "web")), (None, None));
        let Verdict::Invalid(why) = verdict(&model, "p") else { panic!("accepted") };
        assert!(why.contains("spec.timeout.attempt") && why.contains("write at most 1s"), "{why}");
        assert!(why.contains("only mtls and access are in force"), "{why}");
        let inbound = model.inbound("uid-a").unwrap();
        assert_eq!(inbound.mtls(), proto::MtlsMode::Strict, "who is let in does not depend on a timeout");
        assert!(inbound.access.is_none(), "and nobody is kept out by it");
        // A later version that is invalid leaves the last valid one.
        apply(&mut model, "p", 1, json!({"target": web(), "timeout": wait("7s")}));
        apply(&mut model, "p", 1, invalid);
        assert_eq!(timeout(&model, "web"), Some(("p".to_owned(), 7000)));
    }

    #[test]
    fn a_service_that_nobody_dials_by_an_address_of_its_own_is_told_apart() {
        let mut model = model();
        let headless = Service { headless: true, ..Service::default() };
        model.apply_service(key("shop", "db"), headless);
        model.apply_service(key("shop", "alias"), Service::default());
        let why = |name: &str, section: &str| {
            let value = if section == "timeout" { wait("1s") } else { json!("Strict") };
            let policy = policy("p", 1, json!({"target": {"kind": "Service", "name": name}, section: value}));
            model.uncalled(&key("shop", "p"), &policy.spec)
        };
        assert!(why("db", "timeout").is_some_and(|why| why.contains("for timeout: Service db is headless")));
        assert!(why("alias", "timeout").is_some_and(|why| why.contains("alias is an ExternalName")));
        assert_eq!(why("web", "timeout"), None);
        assert_eq!(why("absent", "timeout"), None, "the verdict says so");
        assert_eq!(why("db", "mtls"), None, "that is about its pods");
    }

    #[test]
    fn a_workload_target_is_about_no_service() {
        let mut model = model();
        let target = json!({"kind": "Workload", "selector": {"matchLabels": {"app": "web"}}});
        apply(&mut model, "p", 1, json!({"target": target, "timeout": wait("1s")}));
        assert_eq!(model.traffic_for(&key("shop", "web")), (None, None));
        assert!(model.called_addresses(&key("shop", "p")).is_empty());
    }

    #[test]
    fn a_policy_touches_the_services_that_it_is_for_before_and_after_it_changes() {
        let mut model = model();
        let ip: IpAddr = "10.96.0.2".parse().unwrap();
        model.apply_service(key("shop", "other"), Service { cluster_ips: vec![ip], ..Service::default() });
        let vip: IpAddr = "10.96.0.1".parse().unwrap();
        let touched = |model: &mut Model, spec: Value| -> HashSet<IpAddr> {
            model.take_touched();
            apply(model, "p", 1, spec);
            model.take_touched().addresses.into_iter().filter(|touched| [ip, vip].contains(touched)).collect()
        };
        let of_other = json!({"target": {"kind": "Service", "name": "other"}, "timeout": wait("1s")});
        assert_eq!(
            touched(&mut model, json!({"target": web(), "timeout": wait("1s")})),
            HashSet::from([vip])
        );
        assert_eq!(touched(&mut model, of_other), HashSet::from([vip, ip]), "the old target and the new one");
        let all = json!({"target": {"kind": "Namespace"}, "retry": {"on": ["reset"]}});
        assert_eq!(touched(&mut model, all), HashSet::from([vip, ip]));
        model.take_touched();
        model.delete_policy(&key("shop", "p"));
        assert!(model.take_touched().addresses.is_superset(&HashSet::from([vip, ip])));
        assert!(touched(&mut model, json!({"target": web(), "mtls": "Strict"})).is_empty());
    }

    #[test]
    fn the_addresses_of_services_that_a_narrower_policy_decides_about_are_not_those_of_the_wider_one() {
        let mut model = model();
        apply(&mut model, "wide", 1, json!({"target": {"kind": "Namespace"}, "timeout": wait("9s")}));
        let addresses = |model: &Model, name: &str| model.called_addresses(&key("shop", name));
        let of_web: BTreeSet<SocketAddr> =
            ["10.96.0.1:80", "203.0.113.1:80"].map(|address| address.parse::<SocketAddr>().unwrap()).into();
        assert_eq!(addresses(&model, "wide"), of_web);
        apply(&mut model, "narrow", 2, json!({"target": web(), "timeout": wait("1s")}));
        assert_eq!(
            (addresses(&model, "wide"), addresses(&model, "narrow")),
            (BTreeSet::new(), of_web.clone())
        );
        apply(
            &mut model,
            "wide",
            1,
            json!({"target": {"kind": "Namespace"}, "timeout": wait("9s"), "breaker": {}}),
        );
        assert_eq!(addresses(&model, "wide"), of_web, "its breaker holds there");
    }
}
