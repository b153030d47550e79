//! Where a dialled address leads.
//!
//! In: what the operator has answered of the address. Out: how to speak there ([`Target`]), and a [`Plan`] of where each
//! request or connection goes: the [`RouteTarget`] of the Service itself, or what its rules make of it ([`CompiledRules`]).
//! Never waits, opens a connection, or reads a body.
//!
//! ```text
//!   rules        which rule takes a request, and which of its backends
//!   filters      changes of heads; redirects
//!   cors         cross-origin requests
//!   session      clients that stay with an endpoint
//!   call_policy  timeouts, retries and faults of a rule
//! ```

pub mod call_policy;
mod cors;
mod filters;
mod rules;
mod session;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use tulle_mesh::wire::head::Protocol as Travels;

use crate::backend::{Backend, Backends};
use crate::config::{Destination, Entry, HashKey, Protocol};
use crate::error::Failure;
use crate::http1::Head;

pub use call_policy::CallPolicy;
pub use filters::ResponseEdits;
pub use rules::{CompiledRules, CopyTo, Filters, Forward, Found};

/// A dialled address, with this worker's knowledge of it.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    entry: Arc<Entry>,
    compiled: RefCell<Compiled>,
    /// What earlier connections to this address have taught.
    pub learned: Cell<Learned>,
}

/// What the operator has answered, as it is used.
#[derive(Debug, Default)]
struct Compiled {
    destination: Option<Arc<Destination>>,
    plan: Option<Rc<Plan>>,
}

/// Where what arrives at a port goes. A request keeps the plan that it began with.
#[derive(Debug)]
pub struct Plan {
    /// To the Service or the pod itself.
    pub default: Rc<RouteTarget>,
    /// What routes make of it; `None`: nothing.
    pub rules: Option<CompiledRules>,
}

/// The backend of one request or connection, and the policy that applies to it.
#[derive(Debug)]
pub struct RouteTarget {
    /// Who serves it.
    pub backend: Rc<Backend>,
    /// Timeouts, retries and faults.
    pub policy: Rc<CallPolicy>,
    /// The route whose rule decided; `None`: none did.
    pub route: Option<Arc<str>>,
    /// What the backend of its rule declares. `Detect` without a rule: who dials a Service itself chose what to speak.
    pub protocol: Protocol,
}

/// What is known of a connection whose content is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection<'a> {
    /// It begins with a TLS handshake that asks for this server, if for any.
    Tls(Option<&'a str>),
    /// Anything else.
    Other,
}

/// What earlier connections have taught about a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Learned {
    /// Nothing yet.
    #[default]
    Nothing,
    /// Its clients speak first.
    ClientFirst,
    /// Its servers speak first: the content is opaque.
    ServerFirst,
}

/// What kind of destination a port leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nobody that the mesh knows, or this pod itself.
    Passthrough,
    /// One or more endpoints, and what is spoken there as far as it was declared.
    Endpoints(Protocol),
}

impl Port {
    /// A port of which nothing has been learned.
    pub(crate) fn new(address: SocketAddr, entry: Arc<Entry>) -> Self {
        Self { address, entry, compiled: RefCell::default(), learned: Cell::default() }
    }

    /// The address as it was dialled.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether this port is no longer kept current: a connection that outlives it asks for a new one.
    pub fn is_gone(&self) -> bool {
        self.entry.is_gone()
    }

    /// What is known of the address.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// What kind of destination this is now, for a pod with these addresses.
    pub(crate) fn target_for(&self, backends: &Backends, own: &[IpAddr]) -> Target {
        self.refresh(backends);
        match self.compiled.borrow().destination.as_deref() {
            None | Some(Destination::Unknown) => Target::Passthrough,
            Some(Destination::Pod(pod)) if own.contains(&pod.endpoint.address.ip()) => Target::Passthrough,
            Some(Destination::Pod(pod)) => Target::Endpoints(pod.protocol),
            Some(Destination::Service(service)) => Target::Endpoints(service.route.spoken()),
        }
    }

    /// Where what arrives here goes now; `None`: nobody knows the address.
    pub(crate) fn plan_of(&self, backends: &Backends) -> Option<Rc<Plan>> {
        self.refresh(backends);
        self.compiled.borrow().plan.clone()
    }

    fn refresh(&self, backends: &Backends) {
        let newer = self.entry.newer_than(self.compiled.borrow().destination.as_ref());
        if let Some(destination) = newer {
            let before = self.compiled.take().plan;
            let plan = Plan::of(&destination, backends, before.as_deref()).map(Rc::new);
            self.compiled.replace(Compiled { destination: Some(destination), plan });
        }
    }
}

impl Plan {
    fn of(destination: &Destination, backends: &Backends, before: Option<&Self>) -> Option<Self> {
        let backend = backends.of(destination)?;
        let way = |policy| {
            Rc::new(RouteTarget { backend, policy: Rc::new(policy), route: None, protocol: Protocol::Detect })
        };
        Some(match destination {
            Destination::Unknown | Destination::Pod(_) => {
                Self { default: way(CallPolicy::default()), rules: None }
            }
            Destination::Service(service) => {
                let before = before.and_then(|before| before.rules.as_ref());
                Self {
                    default: way(CallPolicy::of(&service.route.traffic, &service.route.shadow, None)),
                    rules: CompiledRules::of(service, backends, before),
                }
            }
        })
    }

    /// Where a connection goes whose content is not looked at.
    ///
    /// # Errors
    /// [`Failure::RouteNone`] where no rule takes it, [`Failure::RouteNoBackend`] where it is the turn of an invalid
    /// backend.
    pub fn connection(&self, connection: Connection<'_>) -> Result<Rc<RouteTarget>, Failure> {
        let by_rule = self.rules.as_ref().and_then(|rules| rules.find_connection(connection));
        by_rule.unwrap_or_else(|| Ok(Rc::clone(&self.default)))
    }

    /// Whether requests may go elsewhere than a connection whose content is not looked at.
    pub fn is_by_request(&self) -> bool {
        self.rules.as_ref().is_some_and(CompiledRules::is_of_requests)
    }

    /// Whether the first bytes of a connection say where it goes.
    pub fn is_by_server_name(&self) -> bool {
        self.rules.as_ref().is_some_and(CompiledRules::is_of_tls)
    }
}

/// As which message a request goes on that `came` as this one: a backend of a route is spoken to as its Service declares
/// (GEP-1911), because who wrote the client knows only what was dialled. The server's sidecar speaks to its application
/// as the message travels, so this decides for it too.
///
/// HTTP/2 goes on as it came, whatever is declared: `http` is written for servers of both, and gRPC needs HTTP/2. What
/// HTTP/2 cannot carry stays HTTP/1: an `Upgrade`, and a request that names no host.
pub fn spoken_to(declared: Protocol, head: &Head, came: Travels) -> Travels {
    let names_host = || head.header("host").is_some_and(|host| !host.is_empty());
    match declared {
        Protocol::Http2 if came == Travels::Http1 && !head.upgrade && names_host() => Travels::Http2,
        _ => came,
    }
}

/// What a request has in common with others that go to the same endpoint, as a number; `None`: it has nothing of it.
/// `client`: the uid of the pod that sends it.
pub fn hash_of_request(key: &HashKey, head: &Head, client: &str) -> Option<u64> {
    match key {
        HashKey::Header(name) => head.header(name).map(|value| session::hash_of(value)),
        HashKey::Cookie(name) => head.cookies(name).next().map(session::hash_of),
        HashKey::Source => Some(session::hash_of(client.as_bytes())),
    }
}
