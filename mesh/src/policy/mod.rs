//! Who may call what: compiled access rules and one decision per request or connection.
//!
//! A deny matches when it *may* match, an allow only when it *surely* matches:
//! - A rule that needs HTTP (methods, paths) denies on an opaque connection and never allows one.
//! - CONNECT asks for a tunnel whose content nobody knows. To a deny it is an opaque connection: a server that
//!   is not a proxy and answers every method with 200 (a handler of Go) reads the bytes behind it as more requests.
//!   An allow takes it for the request that it is.
//! - A denied path matches when any reading of the request's path does, an allowed one when all do
//!   ([`crate::canonical::readings()`]). A slash at the end makes no difference to a deny.
//! - Methods are compared without case by a deny, because many applications do so, and exactly by an allow.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::canonical::Readings;
use crate::identity::WorkloadId;
use crate::proto;

mod glob;

pub use glob::Glob;

/// The method that asks for a tunnel. Methods are case-sensitive, and no server opens one for `connect`.
const TUNNEL: &str = "CONNECT";

/// What is known about a request, or about a connection whose content is opaque.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// Who the peer's certificate says it is; `None` for plain connections.
    pub identity: Option<&'a WorkloadId>,
    /// Where the connection came from.
    pub address: IpAddr,
    /// The port that it was sent to.
    pub port: u16,
    /// The request; `None` for opaque connections.
    pub http: Option<Http<'a>>,
}

/// What rules look at in a request.
#[derive(Clone, Copy)]
pub struct Http<'a> {
    /// As it was sent.
    pub method: &'a str,
    /// The readings of its path. Asked for only by a rule with paths whose other conditions hold.
    pub readings: &'a dyn Fn() -> &'a Readings,
}

/// What an access section says about a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Let it through.
    pub allowed: bool,
    /// Which rule decided.
    pub reason: Reason,
}

/// Which part of an access section decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The n-th rule of `allow`.
    AllowRule(usize),
    /// The n-th rule of `deny`.
    DenyRule(usize),
    /// There is an `allow` list and none of its rules matched.
    NoAllowMatched,
    /// Only `deny` rules exist and none matched.
    NothingDenied,
    /// A deny rule looks at paths, and the path has more readings than are told apart.
    AmbiguousPath,
}

impl Reason {
    /// The word in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllowRule(_) => "AllowRule",
            Self::DenyRule(_) => "DenyRule",
            Self::NoAllowMatched => "NoAllowMatched",
            Self::NothingDenied => "NothingDenied",
            Self::AmbiguousPath => "AmbiguousPath",
        }
    }
}

/// A compiled access section.
#[derive(Clone, Debug, Default)]
pub struct Access {
    allow: Option<Vec<Rule>>,
    deny: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    from: Vec<Peer>,
    to: Vec<Operation>,
}

#[derive(Clone, Debug)]
enum Peer {
    Workload { service_account: Option<String>, namespaces: Option<Vec<String>> },
    Network(IpNet),
}

#[derive(Clone, Debug)]
struct Operation {
    methods: Vec<String>,
    paths: Vec<Glob>,
    ports: Vec<u16>,
}

/// Why an access section from the operator was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Not an address range.
    #[error("invalid CIDR {0:?}; write for example 10.1.0.0/16")]
    Cidr(String),
    /// Not a path glob.
    #[error("invalid path {0:?}; write it from the root, for example /v1/**")]
    Path(String),
    /// Outside 1..=65535.
    #[error("invalid port {0}")]
    Port(u32),
    /// A peer that names nothing would match everybody.
    #[error("a peer has neither service account, namespace nor CIDR, so it would match every client")]
    EmptyPeer,
}

impl Access {
    /// Compiles what the operator sent.
    ///
    /// # Errors
    /// [`RuleError`] names the first value that cannot be enforced; nothing of the section is kept.
    pub fn compile(access: &proto::Access) -> Result<Self, RuleError> {
        let allow = access.allow.iter().map(Rule::compile).collect::<Result<Vec<_>, _>>()?;
        let deny = access.deny.iter().map(Rule::compile).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { allow: access.has_allow.then_some(allow), deny })
    }

    /// How many rules of `deny` there are: [`Reason::DenyRule`] is below it.
    pub fn deny_rules(&self) -> usize {
        self.deny.len()
    }

    /// Decides; deny wins over allow.
    pub fn decide(&self, subject: &Subject<'_>) -> Decision {
        let denied = self.deny.iter().enumerate().find(|(_, rule)| rule.may_match(subject));
        if let Some((index, rule)) = denied {
            let ambiguous =
                rule.looks_at_paths() && subject.http.is_some_and(|http| !(http.readings)().is_complete());
            let reason = if ambiguous { Reason::AmbiguousPath } else { Reason::DenyRule(index) };
            return Decision { allowed: false, reason };
        }
        match &self.allow {
            None => Decision { allowed: true, reason: Reason::NothingDenied },
            Some(rules) => match rules.iter().position(|rule| rule.surely_matches(subject)) {
                Some(index) => Decision { allowed: true, reason: Reason::AllowRule(index) },
                None => Decision { allowed: false, reason: Reason::NoAllowMatched },
            },
        }
    }

    /// Whether some HTTP request of this client might be allowed. `subject`: its opaque connection.
    pub fn may_allow_http(&self, subject: &Subject<'_>) -> bool {
        !self.deny.iter().any(|rule| rule.reaches(subject, true))
            && self.allow.as_ref().is_none_or(|rules| rules.iter().any(|rule| rule.reaches(subject, false)))
    }
}

impl Rule {
    fn compile(rule: &proto::Rule) -> Result<Self, RuleError> {
        Ok(Self {
            from: rule.from.iter().map(Peer::compile).collect::<Result<_, _>>()?,
            to: rule.to.iter().map(Operation::compile).collect::<Result<_, _>>()?,
        })
    }

    fn caller_matches(&self, subject: &Subject<'_>) -> bool {
        self.from.is_empty() || self.from.iter().any(|peer| peer.matches(subject))
    }

    /// Whether the rule is of this caller and port; `whole`: whatever the request is.
    fn reaches(&self, subject: &Subject<'_>, whole: bool) -> bool {
        let request = |operation: &Operation| operation.methods.is_empty() && operation.paths.is_empty();
        let mut operations = self.to.iter().filter(|operation| !whole || request(operation));
        self.caller_matches(subject)
            && (self.to.is_empty() || operations.any(|operation| operation.port_matches(subject)))
    }

    fn looks_at_paths(&self) -> bool {
        self.to.iter().any(|operation| !operation.paths.is_empty())
    }

    fn may_match(&self, subject: &Subject<'_>) -> bool {
        self.caller_matches(subject)
            && (self.to.is_empty() || self.to.iter().any(|operation| operation.may_match(subject)))
    }

    fn surely_matches(&self, subject: &Subject<'_>) -> bool {
        self.caller_matches(subject)
            && (self.to.is_empty() || self.to.iter().any(|operation| operation.surely_matches(subject)))
    }
}

impl Peer {
    fn compile(peer: &proto::Peer) -> Result<Self, RuleError> {
        if !peer.cidr.is_empty() {
            let network = peer.cidr.parse().map_err(|_| RuleError::Cidr(peer.cidr.clone()))?;
            return Ok(Self::Network(network));
        }
        let service_account = (!peer.service_account.is_empty()).then(|| peer.service_account.clone());
        if service_account.is_none() && peer.any_namespace {
            return Err(RuleError::EmptyPeer);
        }
        Ok(Self::Workload {
            service_account,
            namespaces: (!peer.any_namespace).then(|| peer.namespaces.clone()),
        })
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        match self {
            Self::Network(network) => network.contains(&canonical_address(subject.address)),
            Self::Workload { service_account, namespaces } => subject.identity.is_some_and(|id| {
                service_account.as_ref().is_none_or(|account| *account == id.service_account)
                    && namespaces.as_ref().is_none_or(|names| names.contains(&id.namespace))
            }),
        }
    }
}

/// An IPv4 address that arrives on a dual-stack socket is the IPv4 address that rules name.
fn canonical_address(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

impl Operation {
    fn compile(operation: &proto::Operation) -> Result<Self, RuleError> {
        let ports = operation.ports.iter().map(|port| match u16::try_from(*port) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(RuleError::Port(*port)),
        });
        Ok(Self {
            methods: operation.methods.clone(),
            paths: operation.paths.iter().map(|path| Glob::compile(path)).collect::<Result<_, _>>()?,
            ports: ports.collect::<Result<_, _>>()?,
        })
    }

    fn port_matches(&self, subject: &Subject<'_>) -> bool {
        self.ports.is_empty() || self.ports.contains(&subject.port)
    }

    fn may_match(&self, subject: &Subject<'_>) -> bool {
        if !self.port_matches(subject) {
            return false;
        }
        let Some(http) = subject.http.filter(|http| http.method != TUNNEL) else { return true };
        (self.methods.is_empty() || self.methods.iter().any(|m| m.eq_ignore_ascii_case(http.method)))
            && (self.paths.is_empty() || self.may_match_path((http.readings)()))
    }

    fn surely_matches(&self, subject: &Subject<'_>) -> bool {
        if !self.port_matches(subject) {
            return false;
        }
        let Some(http) = subject.http else {
            return self.methods.is_empty() && self.paths.is_empty();
        };
        (self.methods.is_empty() || self.methods.iter().any(|m| m == http.method))
            && (self.paths.is_empty() || self.surely_matches_path((http.readings)()))
    }

    fn may_match_path(&self, readings: &Readings) -> bool {
        !readings.is_complete()
            || readings.iter().any(|path| self.paths.iter().any(|glob| glob.may_match(path)))
    }

    fn surely_matches_path(&self, readings: &Readings) -> bool {
        readings.is_complete() && readings.iter().all(|path| self.paths.iter().any(|glob| glob.matches(path)))
    }
}

#[cfg(test)]
mod tests;
