//! What the status of a route says, for each of its parents that is a Service.

use tulle_mesh::event_reason::EventReason;

use super::super::{Key, Model};
use super::Held;
use super::attach::{MAX_RULES, Standing, Standings, is_parent, means, service_of};
use super::check::{CheckedRule, Flaw, references};
use super::object::{ParentRef, RouteKey, RouteKind};

/// Characters of a message. The schema of conditions allows 32,768.
const MAX_MESSAGE: usize = 2048;
/// Of `Accepted`, where the Gateway API names none: routes of another kind hold. As GEP-1294 writes it.
const CONFLICTED: EventReason = EventReason::RouteReasonConflicted;
/// Of `Accepted`, our own: there is no room beside the other routes of the port.
const TOO_MANY_RULES: EventReason = EventReason::TooManyRules;

/// A condition of a route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteCondition {
    /// Whether it is true.
    pub status: bool,
    /// Its reason, in PascalCase.
    pub reason: &'static str,
    /// Its message.
    pub message: String,
}

impl RouteCondition {
    fn new(status: bool, reason: &'static str, message: impl Into<String>) -> Self {
        Self { status, reason, message: bounded(message.into()) }
    }
}

fn bounded(mut message: String) -> String {
    if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE) {
        message.truncate(end);
    }
    message
}

/// What the status of a route says about one of its parents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentStatus {
    /// The parent, as the route has it.
    pub parent: ParentRef,
    /// Condition `Accepted`.
    pub accepted: RouteCondition,
    /// Condition `ResolvedRefs`.
    pub resolved: RouteCondition,
    /// The message of condition `PartiallyInvalid`, whose reason is `UnsupportedValue`: some rules are not in force. The
    /// condition is never false; without a message it is absent.
    pub partially_invalid: Option<String>,
}

/// A rule that is not in force as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlawedRule {
    /// Its place among the rules of its route.
    pub index: usize,
    /// It takes no requests. Otherwise it answers those that it takes with an error.
    pub left_out: bool,
    /// Its place, what is wrong with it, and what happens to its requests.
    pub text: String,
    /// The reason of the condition that says so.
    reason: &'static str,
}

impl Model {
    /// The rules of a route that are not in force as they are written, in order.
    pub fn flawed_rules(&self, route: &RouteKey) -> Vec<FlawedRule> {
        self.gateway.routes.get(route).map(|held| held.flawed().collect()).unwrap_or_default()
    }

    /// What the status of a route says, for each of its parents that is a Service, in order. Nothing about others.
    pub fn route_status(&self, key: &RouteKey) -> Vec<ParentStatus> {
        self.route_status_among(key, &mut Standings::default())
    }

    /// The same for one of many routes.
    pub fn route_status_among<'a>(&'a self, key: &RouteKey, known: &mut Standings<'a>) -> Vec<ParentStatus> {
        let Some((key, held)) = self.gateway.routes.get_key_value(key) else { return Vec::new() };
        let resolved = self.resolved(held);
        let flawed = listed(held);
        let status = |parent: &ParentRef| {
            let service = service_of(&held.object, parent)?;
            let accepted = self.accepted((key, held), parent, &service, known);
            let is_partial = accepted.status && !flawed.is_empty();
            Some(ParentStatus {
                parent: parent.clone(),
                accepted,
                resolved: resolved.clone(),
                partially_invalid: is_partial.then(|| bounded(format!("Dropped Rule {flawed}"))),
            })
        };
        held.object.parents.iter().filter_map(status).collect()
    }

    fn accepted<'a>(
        &'a self,
        (key, held): (&RouteKey, &Held),
        parent: &ParentRef,
        of: &Key,
        known: &mut Standings<'a>,
    ) -> RouteCondition {
        let no_parent = |why: String| RouteCondition::new(false, EventReason::NoMatchingParent.name(), why);
        let name = format!("{}/{}", of.0, of.1);
        let Some(service) = self.services.get(of) else {
            return no_parent(format!("there is no Service {name}"));
        };
        if !is_parent(service) {
            return no_parent(format!(
                "Service {name} has no cluster IP: a headless Service or an ExternalName cannot have routes"
            ));
        }
        let ports: Vec<_> = service.ports.iter().filter(|port| means(parent, port)).collect();
        if ports.is_empty() {
            return no_parent(format!("Service {name} has no TCP port {}", wanted(parent)));
        }
        if !held.is_accepted()
            && let Some(first) = held.flawed().next()
        {
            return RouteCondition::new(false, first.reason, listed(held));
        }
        let (mut holds, mut fails) = (Vec::new(), Vec::new());
        for port in ports {
            match self.standing((of, port), key, known) {
                Some(Standing::Holds) => holds.push(port.port.to_string()),
                Some(Standing::Overruled(by)) => {
                    fails.push((CONFLICTED, format!("{by} holds at port {} of Service {name}", port.port)));
                }
                Some(Standing::NoRoom) => {
                    let port = port.port;
                    let why = format!(
                        "older routes leave no room at port {port} of Service {name}, where all together may have {MAX_RULES} rules and 1 MiB"
                    );
                    fails.push((TOO_MANY_RULES, why));
                }
                // Only of routes that are not accepted.
                None => {}
            }
        }
        let reason = fails.first().map_or(EventReason::NoMatchingParent, |(reason, _)| *reason);
        let mut message: Vec<String> = fails.into_iter().map(|(_, message)| message).collect();
        if holds.is_empty() {
            return RouteCondition::new(false, reason.name(), message.join("; "));
        }
        message.insert(0, format!("holds for Service {name} at port {}", holds.join(", ")));
        if held.object.kind.is_of_requests() && !held.object.hostnames.is_empty() {
            let why = "hostnames have no effect at a Service: requests are told apart by the address that the client dials, and not by the Host header";
            message.push(why.to_owned());
        }
        RouteCondition::new(true, "Accepted", message.join("; "))
    }

    /// Whether all backends can be used, also those of rules that are not in force.
    fn resolved(&self, held: &Held) -> RouteCondition {
        let flaws: Vec<Flaw> =
            references(&held.object).filter_map(|to| self.unresolved(&held.object, to)).collect();
        match flaws.first() {
            None => RouteCondition::new(true, "ResolvedRefs", "all backends exist"),
            Some(first) => {
                let mut messages: Vec<&str> = flaws.iter().map(|flaw| flaw.what.as_str()).collect();
                messages.dedup();
                RouteCondition::new(false, first.reason, messages.join("; "))
            }
        }
    }
}

impl Held {
    /// Its rules that are not in force as they are written, in order.
    fn flawed(&self) -> impl Iterator<Item = FlawedRule> {
        self.rules.iter().enumerate().filter_map(|(index, rule)| {
            let flaw = rule.flaw.as_ref()?;
            Some(FlawedRule {
                index,
                left_out: rule.matches.is_empty(),
                text: format!("rules[{index}]: {}: {}", flaw.what, self.outcome(rule)),
                reason: flaw.reason,
            })
        })
    }

    /// What happens to the requests of a rule that is not in force as it is written.
    fn outcome(&self, rule: &CheckedRule) -> &'static str {
        match (self.object.kind, rule.matches.is_empty()) {
            (RouteKind::Http, false) => "its requests are answered 500",
            (RouteKind::Grpc, false) => "its requests are answered UNAVAILABLE",
            (RouteKind::Tls | RouteKind::Tcp, false) => "its connections are closed",
            (_, true) if !self.is_in_force() => "all is as it would be without this route",
            (RouteKind::Http, true) => "its requests go to other rules, and get 404 where none takes them",
            (RouteKind::Grpc, true) => {
                "its requests go to other rules, and get UNIMPLEMENTED where none takes them"
            }
            (RouteKind::Tls | RouteKind::Tcp, true) => {
                "its connections go to other rules, and are closed where none takes them"
            }
        }
    }
}

fn listed(held: &Held) -> String {
    held.flawed().map(|rule| rule.text).collect::<Vec<_>>().join("; ")
}

/// What a parent wants of the ports.
fn wanted(parent: &ParentRef) -> String {
    let named = parent.section_name.as_ref().map(|name| format!("named {name}"));
    let number = parent.port.map(|number| number.to_string());
    let both: Vec<String> = [number, named].into_iter().flatten().collect();
    if both.is_empty() { "at all".to_owned() } else { both.join(" ") }
}
