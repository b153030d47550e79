//! The server's side of a request: whether a pod is there, what secures the connection, and whether its sidecar lets the
//! request in.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tulle_crds::AccessRule;
use tulle_mesh::canonical::readings;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::{Access, Http, Reason, Subject};
use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{self, EndpointState, ResourceType};
use tulle_mesh::query::Verdict;

use super::in_force::Remark;
use super::stages::Target;
use super::{Ended, Trace, World, endpoints, is_meshed, words};
use crate::model::{Key, Pod, Sections};

/// Why a rule that looks at requests denies a connection, as the end of a sentence.
const OPAQUE_IS_DENIED: &str = "; the content of an opaque connection is not known, so a rule of deny that looks at methods or paths matches all of them";

/// A pod that may serve the request.
pub(super) struct Server<'a> {
    /// `None`: the endpoint is of no pod.
    pod: Option<&'a Pod>,
    /// Its own port.
    port: u16,
    /// Whom its certificate has to name; empty: plain text is sent.
    identity: String,
    /// What its sidecar enforces; `None`: there is none, or it does not see the port.
    inbound: Option<proto::Inbound>,
    /// mTLS secures the connection.
    pub(super) mtls: bool,
}

impl<'a> Server<'a> {
    fn of(world: &World<'a>, endpoint: &proto::Endpoint) -> Self {
        let pod = world.model.pod(&endpoint.pod_uid);
        let port = endpoint.address.parse().map_or(0, |address: SocketAddr| address.port());
        let enforces = pod.is_some_and(|pod| is_meshed(pod) && !pod.skipped_ports.contains(&port));
        Self {
            pod,
            port,
            identity: endpoint.identity.clone(),
            inbound: pod.filter(|_| enforces).and_then(|pod| world.inbound(pod)),
            mtls: world.client.meshed && !endpoint.identity.is_empty() && !world.takes_for_foreign(),
        }
    }

    /// Whether its sidecar refuses plain text, and gets it.
    fn refuses_plain_text(&self) -> bool {
        !self.mtls && self.inbound.as_ref().is_some_and(|inbound| inbound.mtls() == proto::MtlsMode::Strict)
    }
}

/// Where the request arrives, in words. An EndpointSlice that somebody writes may list an address at which nothing answers.
pub(super) fn place(servers: &[Server<'_>]) -> String {
    let all = servers.len();
    let others = servers.iter().filter(|server| server.pod.is_none()).count();
    let noun = if others == 1 { "address" } else { "addresses" };
    let unchecked = format!("{others} {noun} of no pod (whether anything answers there is not checked)");
    match all.saturating_sub(others) {
        _ if others == 0 => format!("{all} of its pods"),
        0 => unchecked,
        pods => format!("{pods} of its pods and {unchecked}"),
    }
}

/// The pods that it may go to.
pub(super) fn endpoint<'a>(
    world: &World<'a>,
    target: &Target,
    shared: Vec<proto::Endpoint>,
    trace: &mut Trace,
) -> Result<Vec<Server<'a>>, Ended> {
    let object = format!("Service/{}", target.service.split(':').next().unwrap_or_default());
    let total = shared.len();
    let zone = world.model.zone_of(&world.client.pod.node);
    let zone_only = target.zone_only.as_ref().filter(|_| !zone.is_empty());
    let near: Vec<proto::Endpoint> =
        shared.into_iter().filter(|endpoint| zone_only.is_none() || endpoint.zone == zone).collect();
    let is_ready = |endpoint: &&proto::Endpoint| endpoint.state() == EndpointState::Ready;
    let ready: Vec<&proto::Endpoint> = near.iter().filter(is_ready).collect();
    let answer = match target.chosen {
        true => "its sidecar answers 503 (UpstreamNone)",
        false => "no pod takes the connection",
    };
    // As kube-proxy: endpoints that terminate serve on while there is no other.
    let serving: Vec<&proto::Endpoint> = if ready.is_empty() { near.iter().collect() } else { ready.clone() };
    if serving.is_empty() {
        let (object, because) = match zone_only {
            Some(policy) if total > 0 => (
                policy.clone(),
                format!(
                    "none of the {total} endpoints is in the client's zone {zone}, and balance.zone is Only"
                ),
            ),
            _ => (object, endpoints::missing(world, target)),
        };
        return Err(trace.stop("endpoint", object, because, answer));
    }
    let because = match ready.len() {
        0 => format!("no endpoint is ready, so the {} that terminate serve on", serving.len()),
        1 => "1 endpoint is ready".to_owned(),
        count => format!("{count} endpoints are ready"),
    };
    // A slice may list pods of any namespace.
    let (shown, hidden): (Vec<&proto::Endpoint>, Vec<&proto::Endpoint>) =
        serving.into_iter().partition(|endpoint| world.shows_endpoint(endpoint));
    if shown.is_empty() {
        let because = format!("{because}, of pods of other namespaces");
        return Err(trace.hidden("endpoint", object, because, "another namespace"));
    }
    let doubt = endpoints::gone(world, &shown).or_else(|| endpoints::undeclared(world, target, &shown));
    let addresses = endpoints::listed(&shown);
    if hidden.is_empty() {
        let verdict = if doubt.is_some() { Verdict::Depends } else { Verdict::Pass };
        trace.add("endpoint", verdict, object, format!("{because}{addresses}{}", doubt.unwrap_or_default()));
    } else {
        let because = format!(
            "{because}, {} of them of pods of other namespaces, which this token does not show; what follows is about the others{addresses}{}",
            hidden.len(),
            doubt.unwrap_or_default()
        );
        trace.depends("endpoint", object, because);
    }
    Ok(shown.into_iter().map(|endpoint| Server::of(world, endpoint)).collect())
}

/// What secures the connection. The pods that do not refuse it for that.
pub(super) fn tls<'a>(
    world: &World<'_>,
    servers: Vec<Server<'a>>,
    trace: &mut Trace,
) -> Result<Vec<Server<'a>>, Ended> {
    let all = servers.len();
    let (refusing, taking): (Vec<Server<'a>>, Vec<Server<'a>>) =
        servers.into_iter().partition(Server::refuses_plain_text);
    let why_plain = if world.takes_for_foreign() {
        "the client's sidecar takes the address for one outside the mesh"
    } else if world.client.meshed {
        "no sidecar of the server listens there, or mtls is Disabled"
    } else {
        "the client has no sidecar"
    };
    if let Some(first) = refusing.first() {
        let from = first.inbound.as_ref().and_then(|inbound| inbound.mtls_from.as_ref());
        let by = if from.is_none() { ", as MeshConfig sets it" } else { "" };
        let because = format!("plain text, because {why_plain}, and mtls of the server is Strict{by}");
        let because = format!(
            "{because}{}",
            acknowledged(world, &refusing, from, Sections { mtls: true, ..Sections::default() })
        );
        let object = words::policy(from);
        if taking.is_empty() {
            let answer = "the server's sidecar refuses it (PolicyPlaintext)";
            return Err(trace.stop("tls", object, because, answer));
        }
        trace.depends("tls", object, format!("{} of {all} pods refuse it: {because}", refusing.len()));
        return Ok(taking);
    }
    let secured: Vec<&Server<'a>> = taking.iter().filter(|server| server.mtls).collect();
    let tried = taking
        .iter()
        .filter(|server| !server.mtls)
        .any(|server| server.inbound.as_ref().is_some_and(|inbound| inbound.shadow_strict));
    let note = if tried { "; a policy in Shadow counts it, and would refuse it" } else { "" };
    let from = taking.iter().find_map(|server| server.inbound.as_ref()?.mtls_from.as_ref());
    let object = words::policy(from);
    match secured.first() {
        Some(first) if secured.len() == taking.len() => {
            trace.pass("tls", object, format!("mTLS; the server has to be {}", first.identity));
        }
        Some(_) => {
            let because = format!(
                "mTLS to {} of {all} pods; to the others plain text, because {why_plain}{note}",
                secured.len()
            );
            trace.depends("tls", object, because);
        }
        None => trace.pass("tls", object, format!("plain text, because {why_plain}{note}")),
    }
    Ok(taking)
}

/// What is to be said where one of the servers is behind with one of these.
pub(super) fn behind(world: &World<'_>, servers: &[Server<'_>], kinds: &[ResourceType]) -> Remark {
    let enforcing = servers.iter().filter(|server| server.inbound.is_some()).filter_map(|server| server.pod);
    // Of several, one that leaves the most open.
    let remarks =
        enforcing.filter_map(|pod| world.server_is_behind(pod, kinds).or_else(|| world.is_lost(pod)));
    remarks.reduce(|one, other| if other.is_open && !one.is_open { other } else { one }).unwrap_or_default()
}

/// What a pod's access rules say.
#[derive(Debug)]
struct Judged {
    allowed: bool,
    policy: Option<proto::ObjectRef>,
    because: String,
}

/// Whether the servers' access rules let it in. `path`: of the request; `None` for an opaque connection.
pub(super) fn access(
    world: &World<'_>,
    servers: &[Server<'_>],
    path: Option<&str>,
    trace: &mut Trace,
) -> Result<(), Ended> {
    let judged: Vec<Judged> = servers.iter().map(|server| judge(world, server, path)).collect();
    let denying: Vec<&Judged> = judged.iter().filter(|judged| !judged.allowed).collect();
    let Some(told) = denying.first().copied().or(judged.first()) else { return Ok(()) };
    let sections = Sections { access: true, ..Sections::default() };
    let waiting = acknowledged(world, servers, told.policy.as_ref(), sections);
    let object = words::policy(told.policy.as_ref());
    let because = format!("{}{waiting}", told.because);
    if denying.is_empty() {
        trace.pass("access", object, because);
        return Ok(());
    }
    if denying.len() < judged.len() {
        trace.depends(
            "access",
            object,
            format!("{} of {} pods refuse it: {because}", denying.len(), judged.len()),
        );
        return Ok(());
    }
    let answer = match path {
        Some(_) => "the server's sidecar answers 403 (PolicyDenied)",
        None => "the server's sidecar resets the connection (PolicyDenied)",
    };
    Err(trace.stop("access", object, because, answer))
}

fn judge(world: &World<'_>, server: &Server<'_>, path: Option<&str>) -> Judged {
    let pass = |because: &str| Judged { allowed: true, policy: None, because: because.to_owned() };
    let Some(inbound) = &server.inbound else {
        return pass("no sidecar of the server enforces access rules");
    };
    let identity = world.client.identity(world.model).filter(|_| server.mtls);
    let mut judged = match &inbound.access {
        None => pass("no access section holds for the server, so every client may call"),
        Some(access) => {
            let (allowed, because) = decide(world, server, (access, identity.as_ref()), path);
            Judged { allowed, policy: access.policy.clone(), because }
        }
    };
    if let Some(shadow) = &inbound.shadow {
        let (allowed, why) = decide(world, server, (shadow, identity.as_ref()), path);
        let would = if allowed { "allow" } else { "deny" };
        let policy = words::policy(shadow.policy.as_ref());
        judged.because = format!("{}; {policy}, in Shadow, would {would} it: {why}", judged.because);
    }
    judged
}

/// What an access section decides, and why.
fn decide(
    world: &World<'_>,
    server: &Server<'_>,
    (access, identity): (&proto::Access, Option<&WorkloadId>),
    path: Option<&str>,
) -> (bool, String) {
    let compiled = match Access::compile(access) {
        Ok(compiled) => compiled,
        Err(error) => return (false, format!("its rules cannot be compiled: {error}")),
    };
    let readings = readings(path.unwrap_or("/"));
    let reader = || &readings;
    let method = world.question.method.as_str();
    let http = path.map(|_| Http { method, readings: &reader });
    let address = world.client.pod.ips.first().copied().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let decision = compiled.decide(&Subject { identity, address, port: server.port, http });
    let client = match identity {
        Some(identity) => format!("client {}/{}", identity.namespace, identity.service_account),
        None => format!("a client without a certificate at {address}"),
    };
    let written = words::written(world.model, access);
    let numbered = |rules: &[proto::Rule], written: Option<&Vec<AccessRule>>, index: usize| {
        rules.get(index).map(|rule| words::rule(rule, words::rule_at(written, index))).unwrap_or_default()
    };
    let because = match decision.reason {
        Reason::AllowRule(index) => {
            let written = written.and_then(|written| written.allow.as_ref());
            format!("allowed by rule {} of allow ({})", index + 1, numbered(&access.allow, written, index))
        }
        Reason::DenyRule(index) => {
            let written = written.and_then(|written| written.deny.as_ref());
            let rule = numbered(&access.deny, written, index);
            let needs_http = access.deny.get(index).is_some_and(words::needs_http);
            let opaque = if path.is_none() && needs_http { OPAQUE_IS_DENIED } else { "" };
            format!("denied by rule {} of deny ({rule}){opaque}", index + 1)
        }
        Reason::NoAllowMatched => match path {
            Some(path) => format!("no rule of allow matches {client} with {method} {path}"),
            None => format!("no rule of allow matches an opaque connection of {client}"),
        },
        Reason::NothingDenied => "no rule of deny matches, and there is no allow".to_owned(),
        Reason::AmbiguousPath => {
            "a rule of deny looks at paths, and this path has more readings than are told apart".to_owned()
        }
    };
    (decision.allowed, because)
}

/// How many of these pods do not enforce a policy's section yet, as the end of a sentence.
fn acknowledged(
    world: &World<'_>,
    servers: &[Server<'_>],
    policy: Option<&proto::ObjectRef>,
    sections: Sections,
) -> String {
    let Some(policy) = policy else { return String::new() };
    // The version of one that is behind is not what the others are waited for.
    let kinds: Vec<ResourceType> = sections.resources().map(|(kind, _)| kind).collect();
    let is_behind =
        |server: &Server<'_>| server.pod.and_then(|pod| world.server_is_behind(pod, &kinds)).is_some();
    if servers.iter().any(is_behind) {
        return String::new();
    }
    let key: Key = (policy.namespace.as_str().into(), policy.name.as_str().into());
    let deciding: Vec<(Arc<str>, Sections)> = servers
        .iter()
        .filter(|server| server.inbound.is_some())
        .filter_map(|server| server.pod)
        .filter(|pod| {
            let its = world.model.sections(&key, &pod.uid);
            (its.access && sections.access) || (its.mtls && sections.mtls) || (its.limits && sections.limits)
        })
        .map(|pod| (Arc::clone(&pod.uid), sections))
        .collect();
    let seen = world.acks.policy(world.model, &key, &policy.uid, policy.generation, &deciding);
    let (enforcing, all) = (seen.enforcing, deciding.len());
    if enforcing >= all {
        return String::new();
    }
    let refused = seen.refusal.map(|why| format!(", refused by {why}")).unwrap_or_default();
    let pod = seen.awaited.map(|pod| format!(", waiting for pod {pod}")).unwrap_or_default();
    format!("; enforced by {enforcing} of {all} sidecars{pod}{refused}")
}

/// What the servers' sidecars refuse for load.
pub(super) fn limits(world: &World<'_>, servers: &[Server<'_>], trace: &mut Trace) {
    let of = |server: &Server<'_>| {
        let pod = server.pod.filter(|_| server.inbound.is_some())?;
        match world.body(ResourceType::Limits, &pod.uid, &pod.uid)? {
            Body::Limits(limits) => limits.enforced,
            _ => None,
        }
    };
    let Some(limits) = servers.iter().find_map(of) else {
        trace.pass("limits", "", "no limits hold for the server");
        return;
    };
    let policy =
        limits.concurrency.as_ref().or(limits.connections.as_ref()).and_then(|limit| limit.policy.as_ref());
    let mut parts = Vec::new();
    if let Some(limit) = &limits.concurrency {
        parts.push(format!("a pod that has {} requests at once answers 503 (OursOverloaded)", limit.max));
    }
    if let Some(limit) = &limits.connections {
        parts.push(format!("a pod that has {} connections closes further ones", limit.max));
    }
    let waiting = acknowledged(world, servers, policy, Sections { limits: true, ..Sections::default() });
    trace.depends("limits", words::policy(policy), format!("{}{waiting}", parts.join("; ")));
}
