//! What policies and routes say about the calls to a Service: timeouts, retries, breaker, balancing and faults, which the
//! client's sidecar carries out.

use std::collections::BTreeSet;

use k8s_openapi::jiff::Timestamp;
use tulle_mesh::proto::{self, balance, retries};

use super::stages::enforced;
use super::{Trace, World, words};
use crate::model::Key;

/// What is said about the calls that a rule, or none, makes.
#[derive(Debug, Default)]
pub(super) struct Calls {
    /// Section by section.
    parts: Vec<String>,
    /// Faults are added to some of them.
    has_faults: bool,
    /// Which sidecars do not carry it out yet, and what is only tried.
    notes: String,
    /// The policy that keeps them in the client's zone.
    pub(super) zone_only: Option<String>,
}

impl Calls {
    /// Adds a stage: where requests go, and under which of these sections.
    pub(super) fn add(&self, name: &str, object: String, goes: &str, by_chance: bool, trace: &mut Trace) {
        let with = if self.parts.is_empty() {
            "no section about calls holds".to_owned()
        } else {
            self.parts.join("; ")
        };
        let because = format!("{goes}; {with}{}", self.notes);
        if by_chance || self.has_faults {
            trace.depends(name, object, because);
        } else {
            trace.pass(name, object, because);
        }
    }
}

/// What holds for calls by a rule to one of its backends, or, without, to the Service itself.
pub(super) fn of(
    world: &World<'_>,
    route: &proto::ServiceRoute,
    rule: Option<&proto::RouteRule>,
    backend: Option<&proto::Backend>,
) -> Calls {
    let dialled = route.traffic.as_ref();
    // Breaker and balancer belong to the backend, whatever led there.
    let behind = match backend {
        Some(backend) => backend.traffic.as_ref(),
        None => dialled,
    };
    let mut made = Calls::default();
    let mut policies: Vec<&proto::ObjectRef> = Vec::new();
    made.timeouts(dialled.and_then(|traffic| traffic.timeout.as_ref()), rule, &mut policies);
    made.retries(dialled.and_then(|traffic| traffic.retry.as_ref()), rule, &mut policies);
    if let Some(breaker) = behind.and_then(|traffic| traffic.breaker.as_ref()) {
        let failures = match breaker.consecutive_failures {
            0 => "for the share of its failures only".to_owned(),
            failures => format!("after {failures} failures in a row"),
        };
        let time = words::span(breaker.eject_ms);
        let by = from(breaker.policy.as_ref(), &mut policies);
        made.parts.push(format!("breaker: a pod is ejected for {time} {failures}{by}"));
    }
    if let Some(balance) = behind.and_then(|traffic| traffic.balance.as_ref()) {
        let by = from(balance.policy.as_ref(), &mut policies);
        made.parts.push(format!("balanced {}{by}", balanced(balance)));
        if balance.zone() == balance::Zone::Only {
            made.zone_only = Some(words::policy(balance.policy.as_ref()));
        }
    }
    if let Some(faults) = dialled.and_then(|traffic| traffic.faults.as_ref()) {
        let by = from(faults.policy.as_ref(), &mut policies);
        made.parts.push(format!("faults: {}{by}", fault(faults)));
        made.has_faults = true;
    }
    for policy in policies {
        made.notes.push_str(&waiting(world, policy));
    }
    if let Some(backend) = backend {
        made.notes.push_str(&unheld(world, route, backend));
    }
    made.notes.push_str(&tried(route.shadow.as_ref()));
    made
}

impl Calls {
    fn timeouts<'a>(
        &mut self,
        section: Option<&'a proto::Timeouts>,
        rule: Option<&proto::RouteRule>,
        policies: &mut Vec<&'a proto::ObjectRef>,
    ) {
        let of_route = [
            ("request", rule.and_then(|rule| rule.request_timeout_ms)),
            ("attempt", rule.and_then(|rule| rule.attempt_timeout_ms)),
        ];
        let mut own = Vec::new();
        let mut of_policy = Vec::new();
        for (name, ms) in of_route {
            let policys = section.map_or(0, |section| match name {
                "request" => section.request_ms,
                _ => section.attempt_ms,
            });
            match ms {
                Some(ms) => own.push(format!("{name} {}", words::span(ms))),
                None if policys > 0 => of_policy.push(format!("{name} {}", words::span(policys))),
                None => {}
            }
        }
        if let Some(idle) = section.map(|section| section.idle_ms).filter(|ms| *ms > 0) {
            of_policy.push(format!("idle {}", words::span(idle)));
        }
        if !own.is_empty() {
            self.parts.push(format!("timeout {} (of the route)", own.join(", ")));
        }
        if let Some(section) = section.filter(|_| !of_policy.is_empty()) {
            let by = from(section.policy.as_ref(), policies);
            self.parts.push(format!("timeout {}{by}", of_policy.join(", ")));
        }
    }

    fn retries<'a>(
        &mut self,
        section: Option<&'a proto::Retries>,
        rule: Option<&proto::RouteRule>,
        policies: &mut Vec<&'a proto::ObjectRef>,
    ) {
        if let Some(retry) = rule.and_then(|rule| rule.retry.as_ref()) {
            let codes: Vec<String> = retry.codes.iter().map(ToString::to_string).collect();
            let on = if codes.is_empty() { "failed connections".to_owned() } else { codes.join(", ") };
            self.parts.push(format!("retries: at most {} on {on} (of the route)", retry.attempts));
            return;
        }
        let Some(section) = section else { return };
        let on: Vec<&str> = section
            .on()
            .map(|on| match on {
                retries::On::On5xx => "5xx",
                retries::On::Reset => "reset",
                retries::On::Connect => "connect",
                retries::On::Unavailable => "unavailable",
                retries::On::Unspecified => "unknown",
            })
            .collect();
        let by = from(section.policy.as_ref(), policies);
        let (attempts, budget) = (section.attempts, section.budget_percent);
        self.parts.push(format!("retries: at most {attempts} on {}, budget {budget} %{by}", on.join(", ")));
    }
}

/// The policy behind a section, in brackets.
fn from<'a>(policy: Option<&'a proto::ObjectRef>, policies: &mut Vec<&'a proto::ObjectRef>) -> String {
    let Some(policy) = policy else { return String::new() };
    if !policies.contains(&policy) {
        policies.push(policy);
    }
    format!(" ({})", words::object("MeshPolicy", policy))
}

fn balanced(balance: &proto::Balance) -> String {
    let by = match balance.by() {
        balance::By::Latency => "by latency".to_owned(),
        balance::By::Requests => "by requests in progress".to_owned(),
        balance::By::RoundRobin => "round robin".to_owned(),
        balance::By::HashHeader => format!("by header {}", balance.hash_name),
        balance::By::HashCookie => format!("by cookie {}", balance.hash_name),
        balance::By::HashSource => "by client".to_owned(),
    };
    match balance.zone() {
        balance::Zone::Only => format!("{by}, in the client's zone only"),
        balance::Zone::Prefer => format!("{by}, in the client's zone while it has capacity"),
        balance::Zone::Any => format!("{by}, in all zones alike"),
        balance::Zone::Unset => by,
    }
}

fn fault(faults: &proto::Faults) -> String {
    let mut parts = Vec::new();
    if faults.delay_permyriad > 0 {
        let (share, time) = (words::percent(faults.delay_permyriad), words::span(faults.delay_ms));
        parts.push(format!("{share} of attempts are delayed by {time}"));
    }
    if faults.abort_permyriad > 0 {
        let (share, status) = (words::percent(faults.abort_permyriad), faults.abort_status);
        parts.push(format!("{share} of attempts are answered {status} (FaultInjected)"));
    }
    let until = Timestamp::from_second(faults.until_unix).map(|until| format!(" until {until}"));
    format!("{}{}", parts.join(", "), until.unwrap_or_default())
}

/// Which sidecars of the Service's clients do not carry out a policy yet, as the end of a sentence.
fn waiting(world: &World<'_>, policy: &proto::ObjectRef) -> String {
    if world.has_earlier_route() {
        return String::new();
    }
    let key: Key = (policy.namespace.as_str().into(), policy.name.as_str().into());
    let addresses: BTreeSet<_> = world.dialled.address.into_iter().collect();
    let version = (&key, policy.uid.as_str(), policy.generation);
    let seen = world.acks.policy_clients(world.model, version, &addresses);
    match enforced(world, seen.using, &seen.behind, seen.refusal.as_deref()) {
        text if text.is_empty() => text,
        text => format!("{text} for {}", words::object("MeshPolicy", policy)),
    }
}

/// The sections of a backend's policies that do not hold for who reaches it through a route, as the end of a sentence.
fn unheld(world: &World<'_>, route: &proto::ServiceRoute, backend: &proto::Backend) -> String {
    let service: Key = (backend.namespace.as_str().into(), backend.name.as_str().into());
    if service == world.dialled.key {
        return String::new();
    }
    let (of_backend, _) = world.model.traffic_for(&service);
    let own = decided_by_dialled(of_backend.as_ref());
    let holding = decided_by_dialled(route.traffic.as_ref());
    // A policy for a whole namespace may be that of both.
    let sections: Vec<String> = own
        .into_iter()
        .zip(holding)
        .filter(|((_, own), (_, holding))| own.is_some() && own != holding)
        .map(|((name, own), _)| format!("{name} of {}", words::policy(own)))
        .collect();
    let (does, it) = match sections.len() {
        0 => return String::new(),
        1 => ("does", "it"),
        _ => ("do", "them"),
    };
    let is_http = route.rules.as_ref().is_some_and(|rules| rules.kind() == proto::RouteKind::Http);
    let or = if is_http { " or, for timeouts and retries, in the rule of the route" } else { "" };
    let (namespace, name) = &world.dialled.key;
    format!(
        "; {} {does} not hold, because the client dials Service {namespace}/{name}: set {it} in a MeshPolicy for that Service{or}",
        sections.join(", ")
    )
}

/// The sections that are those of the Service that is dialled, whatever the backend, with their policies.
fn decided_by_dialled(traffic: Option<&proto::Traffic>) -> [(&'static str, Option<&proto::ObjectRef>); 3] {
    [
        ("timeout", traffic.and_then(|traffic| traffic.timeout.as_ref()?.policy.as_ref())),
        ("retry", traffic.and_then(|traffic| traffic.retry.as_ref()?.policy.as_ref())),
        ("faults", traffic.and_then(|traffic| traffic.faults.as_ref()?.policy.as_ref())),
    ]
}

/// What policies in Shadow would set for these calls, as the end of a sentence.
fn tried(shadow: Option<&proto::Traffic>) -> String {
    let Some(proto::Traffic { timeout, retry, breaker, faults, .. }) = shadow else { return String::new() };
    let all = [
        ("timeout", timeout.as_ref().map(|section| section.policy.as_ref())),
        ("retry", retry.as_ref().map(|section| section.policy.as_ref())),
        ("breaker", breaker.as_ref().map(|section| section.policy.as_ref())),
        ("faults", faults.as_ref().map(|section| section.policy.as_ref())),
    ];
    let tried: Vec<String> = all
        .into_iter()
        .filter_map(|(name, policy)| Some(format!("{name} of {}", words::policy(policy?))))
        .collect();
    if tried.is_empty() { String::new() } else { format!("; only counted, in Shadow: {}", tried.join(", ")) }
}
