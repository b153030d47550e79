//! What would become of a request, who may reach what, and what a policy would deny.
//!
//! ```text
//!   address  whose an address is that is asked about instead of a Service
//!   stages   the client's side of a request: source, address, protocol, route, backend, split
//!   asked    a request as rules look at it
//!   calls    what policies and routes say about the calls to a Service
//!   rules    rules of routes by name, and which are not in force as they are written
//!   server   the server's side: endpoint, TLS, access, limits
//!   in_force what the sidecars that are asked about work with
//!   endpoints  where a Service's pods listen, and why none does
//!   access   who may reach what, and the least policies that the traffic seen needs
//!   diff     which of the traffic that was counted a policy would deny
//!   words    objects and rules in words
//! ```
//! In: the model, what sidecars have acknowledged, and the counts of some time. Out: answers of the query API. Requests
//! are matched and decided by the code that sidecars run, on the resources that they have acknowledged. Nothing is sent, waited
//! for or written, and there is no clock.

mod access;
mod address;
mod asked;
mod calls;
mod diff;
mod endpoints;
mod in_force;
mod rules;
mod server;
mod stages;
mod words;

#[cfg(test)]
mod tests;

use std::net::SocketAddr;

use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::ResourceType;
use tulle_mesh::query::{Explanation, Stage, Verdict};

use in_force::Remark;

use crate::discovery::AckTracker;
use crate::model::object::ServicePort;
use crate::model::{Key, Model, Pod};

pub use access::{AccessDirection, access};
pub use address::Address;
pub use diff::diff;

/// A request that is asked about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Question {
    /// Namespace and name of the client: a workload, or a pod without one.
    pub source: (String, String),
    /// The Service, as `namespace/name`, with `:port` behind it where it has several; or its address.
    pub destination: String,
    /// The method, in upper case.
    pub method: String,
    /// Path and query, as they are sent.
    pub path: String,
    /// Names and values.
    pub headers: Vec<(String, String)>,
}

/// Explains what would become of a request. `shown`: the namespaces that whoever asks may see. Where the request leads to
/// another one, the explanation ends.
///
/// # Errors
/// A sentence that names what the question is about and does not exist.
pub fn explain(
    model: &Model,
    acks: &AckTracker,
    question: &Question,
    shown: &dyn Fn(&str) -> bool,
) -> Result<Explanation, String> {
    let client = Client::find(model, &question.source)?;
    let dialled = match Address::parse(&question.destination) {
        Some(address) => Dialled::find(model, &address.service(model, shown)?)?,
        None => Dialled::find(model, &question.destination)?,
    };
    let world = World { model, acks, question, client, dialled, shown };
    let mut trace = Trace::default();
    let walked = walk(&world, &mut trace);
    let Question { source: (namespace, name), destination, method, path, .. } = question;
    let what = format!("{method} {path} from {namespace}/{name}");
    let (outcome, reaches) = match walked {
        Ok(reached) => (format!("{what} reaches {reached}{}.", trace.conditions()), true),
        Err(Ended::Answered(answer)) => {
            let unless = match trace.is_open {
                true => ", unless a sidecar works with a version that the operator does not know of",
                false => "",
            };
            (format!("{what} does not reach {destination}: {answer}{unless}."), false)
        }
        Err(Ended::Hidden(goes)) => (
            format!(
                "{what} {goes}: what becomes of it there is explained with a token of all namespaces (tulle -A)."
            ),
            false,
        ),
    };
    Ok(Explanation { stages: trace.stages, outcome, reaches })
}

/// All stages, up to the one where the request ends. What it reaches, in words.
fn walk(world: &World<'_>, trace: &mut Trace) -> Result<String, Ended> {
    stages::source(world, trace);
    trace.remark(&world.is_lost(world.client.pod).unwrap_or_default());
    let route = stages::address(world, trace);
    if let Some(address) = world.dialled.address.filter(|_| world.client.meshed) {
        trace.remark(&world.client_is_behind(ResourceType::Route, &address.to_string()));
    }
    let route = route?;
    let is_http = stages::protocol(world, route.as_ref(), trace);
    let taken = stages::route(world, route.as_ref(), is_http, trace)?;
    let target = stages::backend(world, route.as_ref(), &taken, trace)?;
    let shared = stages::split(world, &target, trace);
    trace.remark(&world.client_is_behind(ResourceType::Endpoints, &target.endpoints));
    let servers = server::endpoint(world, &target, shared, trace)?;
    let behind = server::behind(world, &servers, &[ResourceType::Mtls, ResourceType::Inbound]);
    let servers = server::tls(world, servers, trace);
    trace.remark(&behind);
    let servers = servers?;
    let path = is_http.then_some(target.path.as_str());
    let admitted = server::access(world, &servers, path, trace);
    trace.remark(&server::behind(world, &servers, &[ResourceType::Access]));
    admitted?;
    server::limits(world, &servers, trace);
    trace.remark(&server::behind(world, &servers, &[ResourceType::Limits]));
    let over = if servers.iter().all(|server| server.mtls) { "over mTLS" } else { "in plain text" };
    Ok(format!("{} at {}, {over}", target.service, server::place(&servers)))
}

/// What a question is asked of.
struct World<'a> {
    model: &'a Model,
    acks: &'a AckTracker,
    question: &'a Question,
    client: Client<'a>,
    dialled: Dialled<'a>,
    /// Whether whoever asks may see a namespace.
    shown: &'a dyn Fn(&str) -> bool,
}

impl World<'_> {
    fn shows(&self, namespace: &str) -> bool {
        (self.shown)(namespace)
    }

    /// The first of these pods that may be named, each as `namespace/name`.
    fn nameable<'p>(&self, pods: impl IntoIterator<Item = &'p String>) -> Option<&'p str> {
        let mut pods = pods.into_iter().map(String::as_str);
        pods.find(|pod| self.shows(pod.split('/').next().unwrap_or_default()))
    }

    /// Why a sidecar has refused something, `pod namespace/name: reason`. The reason quotes its configuration.
    fn told_refusal<'r>(&self, refusal: Option<&'r str>) -> Option<&'r str> {
        let why = refusal?;
        let namespace = why.strip_prefix("pod ").and_then(|rest| rest.split('/').next()).unwrap_or_default();
        Some(if self.shows(namespace) { why } else { "a pod of another namespace" })
    }
}

/// Who sends the request: one pod speaks for its workload.
struct Client<'a> {
    pod: &'a Pod,
    /// The pod has a sidecar.
    meshed: bool,
    /// How many of the workload's pods have one.
    with: usize,
    of: usize,
}

impl<'a> Client<'a> {
    fn find(model: &'a Model, (namespace, name): &(String, String)) -> Result<Self, String> {
        let mut pods: Vec<&Pod> = pods_named(model, namespace, name).collect();
        pods.sort_by_key(|pod| (pod.terminating, !is_meshed(pod), !pod.ready, pod.name.clone()));
        let with = pods.iter().filter(|pod| is_meshed(pod)).count();
        let Some(pod) = pods.first().copied() else {
            return Err(format!(
                "namespace {namespace} has no pod of a workload {name}, and no pod of that name: the identity of the client is its service account, which only a pod has"
            ));
        };
        Ok(Self { pod, meshed: is_meshed(pod), with, of: pods.len() })
    }

    /// Whom its certificate names; `None`: it has none.
    fn identity(&self, model: &Model) -> Option<WorkloadId> {
        self.meshed.then(|| identity_of(model, self.pod))
    }
}

/// What the client dials.
struct Dialled<'a> {
    key: Key,
    port: &'a ServicePort,
    /// `None`: the Service is headless, and its pods are dialled.
    address: Option<SocketAddr>,
}

impl<'a> Dialled<'a> {
    fn find(model: &'a Model, text: &str) -> Result<Self, String> {
        let malformed =
            || format!("invalid destination {text:?}; write namespace/service or namespace/service:port");
        let (name, port) = match text.split_once(':') {
            Some((name, port)) => (name, Some(port.parse::<u16>().map_err(|_| malformed())?)),
            None => (text, None),
        };
        let (namespace, name) = name.split_once('/').ok_or_else(malformed)?;
        let key: Key = (namespace.into(), name.into());
        let Some(service) = model.service(&key) else {
            return Err(format!("there is no Service {name} in namespace {namespace}"));
        };
        let has = || {
            let ports: Vec<String> = service.ports.iter().map(|port| port.port.to_string()).collect();
            if ports.is_empty() {
                "no TCP ports".to_owned()
            } else {
                format!("the ports {}", ports.join(", "))
            }
        };
        let port = match (port, service.ports.as_slice()) {
            (Some(number), ports) => ports.iter().find(|port| port.port == number),
            (None, [only]) => Some(only),
            (None, _) => {
                return Err(format!("Service {namespace}/{name} has {}: name one, as {text}:PORT", has()));
            }
        };
        let port = port.ok_or_else(|| format!("Service {namespace}/{name} has {}", has()))?;
        let ip = service.ips().next();
        if ip.is_none() && !service.headless {
            return Err(format!(
                "Service {namespace}/{name} has no cluster IP: it is an alias in DNS, and sidecars pass connections to what it names through as they are"
            ));
        }
        Ok(Self { key, port, address: ip.map(|ip| SocketAddr::new(ip, port.port)) })
    }

    /// As a deciding object.
    fn object(&self) -> String {
        format!("Service/{}/{}", self.key.0, self.key.1)
    }
}

/// The stages so far.
#[derive(Debug, Default)]
struct Trace {
    stages: Vec<Stage>,
    /// It is not known what one of the sidecars works with.
    is_open: bool,
}

/// The request, or what can be told of it, has ended.
#[derive(Debug)]
enum Ended {
    /// What its client sees, as a part of a sentence.
    Answered(String),
    /// Where it goes on, out of sight, as a part of a sentence.
    Hidden(String),
}

impl Trace {
    fn add(&mut self, name: &str, verdict: Verdict, object: impl Into<String>, because: impl Into<String>) {
        let (object, because) = (object.into(), because.into());
        self.stages.push(Stage { name: name.to_owned(), verdict, object, because });
    }

    fn pass(&mut self, name: &str, object: impl Into<String>, because: impl Into<String>) {
        self.add(name, Verdict::Pass, object, because);
    }

    fn depends(&mut self, name: &str, object: impl Into<String>, because: impl Into<String>) {
        self.add(name, Verdict::Depends, object, because);
    }

    fn stop(
        &mut self,
        name: &str,
        object: impl Into<String>,
        because: impl Into<String>,
        answer: impl Into<String>,
    ) -> Ended {
        self.add(name, Verdict::Stop, object, because);
        Ended::Answered(answer.into())
    }

    /// Adds to what the last stage says.
    fn remark(&mut self, remark: &Remark) {
        let Some(last) = self.stages.last_mut() else { return };
        last.because.push_str(&remark.text);
        self.is_open |= remark.is_open;
        if remark.is_open && last.verdict == Verdict::Pass {
            last.verdict = Verdict::Depends;
        }
    }

    /// The request goes on in a namespace that whoever asks may not see.
    fn hidden(
        &mut self,
        name: &str,
        object: impl Into<String>,
        because: impl Into<String>,
        place: &str,
    ) -> Ended {
        let goes = format!("goes to {place}, which this token does not show");
        self.depends(name, object, format!("{}; it {goes}", because.into()));
        Ended::Hidden(goes)
    }

    /// The stages on which the outcome depends, as the end of a sentence.
    fn conditions(&self) -> String {
        let open = self.stages.iter().filter(|stage| stage.verdict == Verdict::Depends);
        let names: Vec<&str> = open.map(|stage| stage.name.as_str()).collect();
        match names.as_slice() {
            [] => String::new(),
            [one] => format!(", depending on stage {one}"),
            _ => format!(", depending on stages {}", names.join(", ")),
        }
    }
}

/// The pods of a workload, or the pod of that name.
fn pods_named<'a>(model: &'a Model, namespace: &str, name: &str) -> impl Iterator<Item = &'a Pod> {
    model.pods().filter(move |pod| {
        let workload = pod.workload.as_ref().map(|workload| &*workload.name);
        *pod.namespace == *namespace && !pod.finished && (workload == Some(name) || *pod.name == *name)
    })
}

/// Whether a sidecar sends and receives for a pod.
fn is_meshed(pod: &Pod) -> bool {
    pod.injected && !pod.host_network
}

fn identity_of(model: &Model, pod: &Pod) -> WorkloadId {
    WorkloadId::new(&model.settings().trust_domain, &pod.namespace, &pod.service_account)
}
