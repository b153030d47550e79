//! The client's side of a request: what its sidecar makes of it, up to the endpoints that it chooses from.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::route::Kind;
use tulle_mesh::proto::value_match::Type;
use tulle_mesh::proto::{self, Protocol, ResourceType, filter};
use tulle_mesh::route::{Matcher, Requested, location, rewritten_path};

use super::asked::{Asked, steers};
use super::rules::{flaw_of, key_of, left_out, name_of, reference_of};
use super::{Ended, Trace, World, calls, words};
use crate::discovery::Acknowledgement;
use crate::model::gateway::Standings;
use crate::model::{EndpointsName, Key};

/// Reasons that an answer names at most for what did not match.
const NAMED: usize = 3;

/// What the rules of routes make of a request.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// The rule that takes it; `None`: it goes to the Service itself.
    pub(super) rule: Option<proto::RouteRule>,
    /// The rule's route, as a deciding object.
    object: String,
    /// The path prefix that matched.
    prefix: Option<String>,
    /// Why the rule answers every request with an error.
    flaw: Option<String>,
}

/// Where a request goes.
#[derive(Debug)]
pub(super) struct Target {
    /// The Service and its port, as `namespace/name:port`.
    pub(super) service: String,
    /// The name of its endpoints.
    pub(super) endpoints: String,
    /// The client's sidecar chooses among them.
    pub(super) chosen: bool,
    /// Only those of the client's zone, by this policy.
    pub(super) zone_only: Option<String>,
    /// The path, with what rules have made of it.
    pub(super) path: String,
}

/// Who sends it.
pub(super) fn source(world: &World<'_>, trace: &mut Trace) {
    let client = &world.client;
    let (namespace, pod) = (&client.pod.namespace, client.pod);
    let party = pod.party();
    let object = format!("{}/{namespace}/{}", party.kind, party.name);
    let account = format!("{namespace}/{}", pod.service_account);
    match client.with {
        0 => trace.pass("source", object, "the client has no sidecar, so it has no identity"),
        with if with == client.of => {
            trace.pass("source", object, format!("the client has a sidecar and the identity {account}"));
        }
        with => trace.depends(
            "source",
            object,
            format!(
                "only {with} of its {} pods have a sidecar; what follows is about those, whose identity is {account}",
                client.of
            ),
        ),
    }
}

/// What it dials. `None`: no sidecar chooses a pod.
pub(super) fn address(world: &World<'_>, trace: &mut Trace) -> Result<Option<proto::ServiceRoute>, Ended> {
    let dialled = &world.dialled;
    let Some(address) = dialled.address else {
        let because = "the Service is headless: clients dial its pods by their own addresses, so routes, shares of a Canary and sections about calls do not apply";
        trace.pass("address", dialled.object(), because);
        return Ok(None);
    };
    if !world.client.meshed {
        let because = format!("the client dials {address}, and kube-proxy chooses the pod");
        trace.pass("address", dialled.object(), because);
        return Ok(None);
    }
    let found = match world.body(ResourceType::Route, &address.to_string(), &world.client.pod.uid) {
        Some(Body::Route(proto::Route { kind: Some(Kind::Service(service)) })) => Some(service),
        _ => None,
    };
    let key = &dialled.key;
    match found.filter(|found| *found.namespace == *key.0 && *found.name == *key.1) {
        Some(found) => {
            trace.pass("address", dialled.object(), format!("the client dials {address}"));
            Ok(Some(found))
        }
        None if world.takes_for_foreign() => {
            let because = format!(
                "its sidecar passes connections to {address} on as they are, and kube-proxy chooses the pod"
            );
            trace.pass("address", dialled.object(), because);
            Ok(None)
        }
        None => {
            let because = format!("address {address} belongs to another Service or pod, which keeps it");
            Err(trace.stop("address", dialled.object(), because, "its connections lead elsewhere"))
        }
    }
}

/// What sidecars take the connection for. Whether they look at requests.
pub(super) fn protocol(world: &World<'_>, route: Option<&proto::ServiceRoute>, trace: &mut Trace) -> bool {
    let declared = match route {
        Some(route) => route.protocol(),
        None if world.client.meshed && !world.takes_for_foreign() => at_pod(world),
        None => Protocol::Detect,
    };
    let port = world.dialled.port;
    let by = match &port.app_protocol {
        Some(declared) => format!("appProtocol {declared} of port {}", port.port),
        None => format!("port {} declares no appProtocol", port.port),
    };
    let because = match declared {
        Protocol::Http1 => format!("taken for HTTP/1.1: {by}"),
        Protocol::Http2 => format!("taken for HTTP/2: {by}"),
        Protocol::Opaque => format!("taken for an opaque connection, whose requests nobody looks at: {by}"),
        Protocol::Detect => format!("found out from the first bytes, here HTTP: {by}"),
    };
    trace.pass("protocol", world.dialled.object(), because);
    declared != Protocol::Opaque
}

/// What is declared for the pods of a headless Service.
fn at_pod(world: &World<'_>) -> Protocol {
    let target = itself(world);
    let endpoints = endpoints(world, &target).endpoints;
    let first = endpoints.into_iter().find(|endpoint| world.shows_endpoint(endpoint));
    let kind = first
        .and_then(|first| first.address.parse::<SocketAddr>().ok())
        .map(|address| world.model.route(address, "").kind);
    match kind {
        Some(Some(Kind::Pod(pod))) => pod.protocol(),
        _ => Protocol::Detect,
    }
}

/// Which rule takes it.
pub(super) fn route(
    world: &World<'_>,
    route: Option<&proto::ServiceRoute>,
    is_http: bool,
    trace: &mut Trace,
) -> Result<Taken, Ended> {
    let Some(rules) = route.and_then(|route| route.rules.as_ref()) else {
        let because = match route {
            Some(_) => "no route holds at this port, so the request goes to the Service itself",
            None => "no route applies, because no sidecar chooses where the request goes",
        };
        trace.pass("route", "", because);
        return Ok(Taken::default());
    };
    let kind = rules.kind();
    let of_requests = matches!(kind, proto::RouteKind::Http | proto::RouteKind::Grpc);
    if of_requests && !is_http {
        let because =
            format!("a {} is about requests, and this connection is opaque", words::route_kind(kind));
        trace.pass("route", first_route(rules), because);
        return Ok(Taken::default());
    }
    let matcher = match Matcher::compile(rules) {
        Ok(matcher) => matcher,
        Err(error) => {
            let because = format!("sidecars refuse these rules: {error}");
            trace.depends("route", first_route(rules), because);
            return Ok(Taken::default());
        }
    };
    let asked = Asked::of(world.question);
    let found = match kind {
        proto::RouteKind::Tls if is_http => None,
        proto::RouteKind::Tls => matcher.find_server_name(asked.host()).map(|rule| (rule, None)),
        proto::RouteKind::Tcp => matcher.find_server_name(None).map(|rule| (rule, None)),
        _ => matcher.find(&asked).map(|found| (found.rule, found.prefix.map(str::to_owned))),
    };
    let found = found.and_then(|(number, prefix)| Some((number, rules.rules.get(number)?, prefix)));
    let Some((number, rule, prefix)) = found else {
        let answer = if of_requests {
            "its sidecar answers 404 (RouteNone)"
        } else {
            "its sidecar closes the connection (RouteNone)"
        };
        let because = match failing(world, rules, None, &asked) {
            _ if kind == proto::RouteKind::Tls && is_http => {
                "a TLSRoute takes connections that begin with TLS, and this one begins with HTTP".to_owned()
            }
            reasons if reasons.is_empty() => "the route has no rule that could take it".to_owned(),
            reasons => format!("no rule takes it: {reasons}"),
        };
        let because = format!("{because}{}", left_out(world, rules));
        return Err(trace.stop("route", first_route(rules), because, answer));
    };
    let (object, waiting) = route_of(world, rules, rule);
    let mut because = format!("{} takes it", name_of(world, rules, number, rule));
    if of_requests {
        let taking = rules.matches.iter().find(|m| unmet(rules, m, &asked).is_none());
        because = taking
            .map_or(because.clone(), |m| format!("{because}, by its match of {}", words::whole_match(m)));
        let others = failing(world, rules, Some(number), &asked);
        if !others.is_empty() {
            because = format!("{because}; before it, {others}");
        }
    }
    because = format!("{because}{waiting}{}", left_out(world, rules));
    if let Some((status, url)) = redirected(world, &rule.filters, prefix.as_deref()) {
        let because = format!("{because}; it redirects to {url}");
        return Err(trace.stop(
            "route",
            object,
            because,
            format!("its sidecar answers {status} with Location {url}"),
        ));
    }
    match kind {
        proto::RouteKind::Tls => trace.depends(
            "route",
            object.clone(),
            format!("{because}, if it begins with TLS for that server name"),
        ),
        _ => trace.pass("route", object.clone(), because),
    }
    Ok(Taken { flaw: flaw_of(world, rules, number, rule), rule: Some(rule.clone()), object, prefix })
}

/// The Service or backend that it goes to, and under which sections.
pub(super) fn backend(
    world: &World<'_>,
    route: Option<&proto::ServiceRoute>,
    taken: &Taken,
    trace: &mut Trace,
) -> Result<Target, Ended> {
    let (Some(route), Some(rule)) = (route, &taken.rule) else {
        let mut target = itself(world);
        let goes = format!("to Service {} itself", target.service);
        let Some(route) = route else {
            trace.pass(
                "backend",
                world.dialled.object(),
                format!("{goes}, without timeouts, retries or a breaker"),
            );
            return Ok(target);
        };
        let calls = calls::of(world, route, None, None);
        target.chosen = true;
        target.zone_only = calls.zone_only.clone();
        calls.add("backend", world.dialled.object(), &goes, false, trace);
        return Ok(target);
    };
    let weighted = || rule.backends.iter().filter(|backend| backend.weight > 0);
    let may_exist = |backend: &&proto::Backend| may_exist(world, backend);
    // Of equal weights, the first.
    let chosen = weighted().rev().filter(may_exist).max_by_key(|backend| backend.weight);
    let Some(chosen) = chosen else {
        let because = match weighted().next() {
            Some(backend) => format!("backend {} does not exist or may not be used", service_name(backend)),
            None => taken.flaw.clone().unwrap_or_else(|| "the rule has no backend with a weight".to_owned()),
        };
        return Err(trace.stop(
            "backend",
            taken.object.clone(),
            because,
            "its sidecar answers 500 (RouteNoBackend)",
        ));
    };
    let goes = shares(world, &weighted().collect::<Vec<_>>());
    let is_shared = goes.len() > 1;
    let mut goes = match is_shared {
        true => format!("{}; what follows is about {}", goes.join(", "), service_name(chosen)),
        false => format!("to {}", service_name(chosen)),
    };
    if is_shared && rule.session.is_some() {
        goes.push_str("; a client with a session stays where it is");
    }
    if let Some((status, url)) = redirected(world, &chosen.filters, taken.prefix.as_deref()) {
        let answer = format!("its sidecar answers {status} with Location {url}");
        return Err(trace.stop(
            "backend",
            taken.object.clone(),
            format!("{goes}; it redirects to {url}"),
            answer,
        ));
    }
    if !world.shows(&chosen.namespace) {
        let place = format!("namespace {}", chosen.namespace);
        return Err(trace.hidden("backend", taken.object.clone(), goes, &place));
    }
    let sent = world.question.path.as_str();
    let path =
        [&chosen.filters, &rule.filters].into_iter().find_map(|filters| rewritten(sent, filters, taken));
    if let Some(path) = &path {
        goes = format!("{goes}, with the path {path}");
    }
    let calls = calls::of(world, route, Some(rule), Some(chosen));
    calls.add("backend", taken.object.clone(), &goes, is_shared, trace);
    Ok(Target {
        service: service_name(chosen),
        endpoints: chosen.endpoints.clone(),
        chosen: true,
        zone_only: calls.zone_only,
        path: path.unwrap_or_else(|| sent.to_owned()),
    })
}

/// Whether a backend may be one. Whether it is, is known where its namespace may be seen.
fn may_exist(world: &World<'_>, backend: &proto::Backend) -> bool {
    !backend.endpoints.is_empty() || !world.shows(&backend.namespace)
}

/// What goes to each backend.
fn shares(world: &World<'_>, backends: &[&proto::Backend]) -> Vec<String> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    let share = |backend: &&proto::Backend| {
        let permyriad = u64::from(backend.weight) * 10_000 / total.max(1);
        let share = words::percent(u32::try_from(permyriad).unwrap_or(u32::MAX));
        let invalid = match may_exist(world, backend) {
            true => "",
            false => ", which is answered 500 (RouteNoBackend)",
        };
        format!("{share} to {}{invalid}", service_name(backend))
    };
    backends.iter().map(share).collect()
}

/// The endpoints that a request may go to, by the shares of a Canary.
pub(super) fn split(world: &World<'_>, target: &Target, trace: &mut Trace) -> Vec<proto::Endpoint> {
    let found = endpoints(world, target);
    let canary = found.canary.as_ref().filter(|_| target.chosen);
    let Some(canary) = canary else {
        let because = match &found.canary {
            Some(canary) => format!(
                "the shares of Canary {}/{} do not apply, because no sidecar chooses the pod",
                canary.namespace, canary.name
            ),
            None => "no Canary sets shares".to_owned(),
        };
        trace.pass("split", "", because);
        let parked = |endpoint: &proto::Endpoint| {
            world.model.pod(&endpoint.pod_uid).is_some_and(|pod| pod.is_parked())
        };
        return found.endpoints.into_iter().filter(|endpoint| target.chosen || !parked(endpoint)).collect();
    };
    let object = format!("Canary/{}/{}", canary.namespace, canary.name);
    let key: Key = (canary.namespace.as_str().into(), canary.name.as_str().into());
    let waiting = match world.acks.acknowledged_canary(world.model, &key, canary.epoch) {
        // Others are ahead of a client that is behind.
        _ if world.has_earlier_endpoints(&target.endpoints) => String::new(),
        Acknowledgement::Complete => String::new(),
        // Clients of any namespace carry shares out.
        Acknowledgement::Awaited(whom) => {
            // It ends with the name of a pod.
            let pod = whom.rsplit(' ').next().unwrap_or_default().to_owned();
            let known = world.nameable([&pod]).map(|_| whom);
            format!("; {}", known.unwrap_or_else(|| "not all sidecars carry it out yet".to_owned()))
        }
        Acknowledgement::Refused(why) => {
            format!("; refused by {}", world.told_refusal(Some(&why)).unwrap_or_default())
        }
    };
    if let Some(steering) = &found.steering {
        let on_trial: Vec<proto::Endpoint> = found
            .endpoints
            .iter()
            .filter(|endpoint| endpoint.revision == steering.revision)
            .cloned()
            .collect();
        let holding = steering.r#match.iter().find(|wanted| steers(wanted, world.question));
        if let Some(wanted) = holding.filter(|_| !on_trial.is_empty()) {
            let because = format!(
                "{} matches, so it goes to revision {}{waiting}",
                steered_by(wanted),
                steering.revision
            );
            trace.pass("split", object, because);
            return on_trial;
        }
    }
    let name = |revision: &str| {
        if revision.is_empty() { "all other pods".to_owned() } else { format!("revision {revision}") }
    };
    let shares: Vec<String> = found
        .split
        .iter()
        .map(|share| format!("{} to {}", words::percent(share.permille * 10), name(&share.revision)))
        .collect();
    let because = format!(
        "{}{}{waiting}",
        shares.join(", "),
        found.steering.as_ref().map(unsteered).unwrap_or_default()
    );
    let sharing = found.split.iter().filter(|share| share.permille > 0).count();
    match sharing {
        0 | 1 => trace.pass("split", object, because),
        _ => trace.depends("split", object, because),
    }
    // The first share is that of the approved version, which serves rather than nobody.
    let serves = |revision: &str| {
        let mut shares = found.split.iter().enumerate();
        shares.any(|(number, share)| {
            share.revision == revision && (share.permille > 0 || (number == 0 && !revision.is_empty()))
        })
    };
    found.endpoints.iter().filter(|endpoint| serves(&endpoint.revision)).cloned().collect()
}

/// How a steering treats a request that matches none of its conditions.
fn unsteered(steering: &proto::Steering) -> String {
    let mut text = String::new();
    if !steering.r#match.is_empty() {
        let all: Vec<String> = steering.r#match.iter().map(steered_by).collect();
        text = format!(
            "; requests with {} go to revision {}, and this is none of them",
            all.join(" or "),
            steering.revision
        );
    }
    if !steering.sticky_cookie.is_empty() {
        text = format!("{text}; cookie {} keeps a user with a revision", steering.sticky_cookie);
    }
    if steering.mirror_permille > 0 {
        let share = words::percent(steering.mirror_permille * 10);
        text = format!(
            "{text}; copies of {share} of the requests with GET, HEAD or OPTIONS go to revision {}",
            steering.revision
        );
    }
    text
}

fn steered_by(wanted: &proto::ValueMatch) -> String {
    let kind = if wanted.r#type() == Type::Cookie { "cookie" } else { "header" };
    format!("{kind} {}={}", wanted.name, wanted.value)
}

/// The endpoints of a target, as the client's sidecar gets them.
pub(super) fn endpoints(world: &World<'_>, target: &Target) -> proto::Endpoints {
    let of = |name: &str| match world.body(ResourceType::Endpoints, name, &world.client.pod.uid) {
        Some(Body::Endpoints(found)) => found,
        _ => proto::Endpoints::default(),
    };
    let found = of(&target.endpoints);
    // Nobody has dialled an address of a headless Service yet, so either family will do.
    if world.dialled.address.is_none() && found.endpoints.is_empty() {
        return of(&itself_in(world, false).to_string());
    }
    found
}

/// The dialled Service itself.
fn itself(world: &World<'_>) -> Target {
    let name = itself_in(world, world.dialled.address.is_none_or(|address| address.is_ipv4()));
    Target {
        service: format!("{}/{}:{}", name.service.0, name.service.1, name.port),
        endpoints: name.to_string(),
        chosen: false,
        zone_only: None,
        path: world.question.path.clone(),
    }
}

fn itself_in(world: &World<'_>, ipv4: bool) -> EndpointsName {
    EndpointsName { service: world.dialled.key.clone(), port: world.dialled.port.port, ipv4 }
}

fn service_name(backend: &proto::Backend) -> String {
    format!("{}/{}:{}", backend.namespace, backend.name, backend.port)
}

/// The status and `Location` of a redirect among filters.
fn redirected(world: &World<'_>, filters: &[proto::Filter], prefix: Option<&str>) -> Option<(u32, String)> {
    let redirect = filters.iter().find_map(|filter| match &filter.kind {
        Some(filter::Kind::Redirect(redirect)) => Some(redirect),
        _ => None,
    })?;
    let asked = Asked::of(world.question);
    let name = format!("{}.{}", world.dialled.key.1, world.dialled.key.0);
    let request = Requested {
        scheme: "http",
        host: asked.host().or(Some(name.as_str())),
        port: world.dialled.port.port,
        target: &world.question.path,
    };
    Some((redirect.status, location(redirect, &request, prefix)))
}

/// What filters make of a path. `None`: they leave it.
fn rewritten(sent: &str, filters: &[proto::Filter], taken: &Taken) -> Option<String> {
    let modifier = filters.iter().find_map(|filter| match &filter.kind {
        Some(filter::Kind::Rewrite(rewrite)) => rewrite.path.as_ref(),
        _ => None,
    })?;
    let (path, query) = sent.split_once('?').map_or((sent, None), |(path, query)| (path, Some(query)));
    if !path.starts_with('/') {
        return None;
    }
    let path = rewritten_path(path, modifier, taken.prefix.as_deref());
    Some(query.map_or_else(|| path.clone(), |query| format!("{path}?{query}")))
}

/// The route that a rule is of, and which sidecars do not enforce it yet.
fn route_of(world: &World<'_>, rules: &proto::Rules, rule: &proto::RouteRule) -> (String, String) {
    let Some((reference, object)) = reference_of(rules, rule) else {
        return (String::new(), String::new());
    };
    let name = words::object(words::route_kind(reference.kind()), object);
    let Some(key) = key_of(reference, object).filter(|_| !world.has_earlier_route()) else {
        return (name, String::new());
    };
    let addresses = world.model.route_addresses(&key, &mut Standings::default());
    let stamped: Key = (key.namespace.clone(), key.stamped().into());
    let seen = world.acks.route(world.model, (&stamped, &object.uid, object.generation), &addresses);
    (name, enforced(world, seen.holding, &seen.behind, seen.refusal.as_deref()))
}

/// How many sidecars enforce something that not all of them do, as the end of a sentence.
pub(super) fn enforced(
    world: &World<'_>,
    of: usize,
    behind: &BTreeSet<String>,
    refusal: Option<&str>,
) -> String {
    if behind.is_empty() {
        return String::new();
    }
    let enforcing = of.saturating_sub(behind.len());
    let refused = world.told_refusal(refusal).map(|why| format!(", refused by {why}")).unwrap_or_default();
    let first = world.nameable(behind);
    let first = first.map_or_else(|| "a pod of another namespace".to_owned(), |pod| format!("pod {pod}"));
    format!("; enforced by {enforcing} of {of} sidecars, waiting for {first}{refused}")
}

/// The only route, as a deciding object; of several the first.
fn first_route(rules: &proto::Rules) -> String {
    let first = rules.routes.first().and_then(|route| Some((route.kind(), route.object.as_ref()?)));
    first.map(|(kind, object)| words::object(words::route_kind(kind), object)).unwrap_or_default()
}

/// Why the matches before the one that takes a request do not; `taken`: the rule that does.
fn failing(world: &World<'_>, rules: &proto::Rules, taken: Option<usize>, asked: &Asked<'_>) -> String {
    let mut reasons = Vec::new();
    for m in &rules.matches {
        let Ok(number) = usize::try_from(m.rule) else { continue };
        let Some(reason) = unmet(rules, m, asked) else { break };
        if let Some(rule) = rules.rules.get(number).filter(|_| Some(number) != taken) {
            reasons.push(format!("{} wants {reason}", name_of(world, rules, number, rule)));
        }
    }
    let more = reasons.len().saturating_sub(NAMED);
    reasons.truncate(NAMED);
    match more {
        0 => reasons.join(", "),
        _ => format!("{} and {more} more do not match", reasons.join(", ")),
    }
}

/// The first part of a match that a request does not meet.
fn unmet(rules: &proto::Rules, m: &proto::Match, asked: &Asked<'_>) -> Option<String> {
    if rules.kind() == proto::RouteKind::Tls {
        return (!m.server_names.is_empty()).then(|| format!("server name {}", m.server_names.join(" or ")));
    }
    words::parts(m).into_iter().find_map(|(only, text)| {
        let alone = proto::Rules {
            kind: rules.kind,
            rules: vec![proto::RouteRule::default()],
            matches: vec![only],
            ..proto::Rules::default()
        };
        let meets = Matcher::compile(&alone).is_ok_and(|matcher| matcher.find(asked).is_some());
        (!meets).then_some(text)
    })
}
