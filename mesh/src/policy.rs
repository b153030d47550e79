//! Who may call what: compiled access rules and one decision per request or connection.
//!
//! A deny matches when it *may* match, an allow only when it *surely* matches: a rule that needs
//! HTTP (methods, paths) denies on an opaque connection and never allows one.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::canonical;
use crate::identity::WorkloadId;
use crate::proto;

/// What is known about a request, or about a connection whose content is opaque.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Who the peer's certificate says it is; `None` for plain connections.
    pub identity: Option<&'a WorkloadId>,
    /// Where the connection came from.
    pub address: IpAddr,
    /// The port that it was sent to.
    pub port: u16,
    /// Method and request target; `None` for opaque connections.
    pub http: Option<(&'a str, &'a str)>,
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
    /// A path rule applies and the path has no canonical form.
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
    needs_path: bool,
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
        let needs_path =
            allow.iter().chain(&deny).flat_map(|rule| &rule.to).any(|operation| !operation.paths.is_empty());
        Ok(Self { allow: access.has_allow.then_some(allow), deny, needs_path })
    }

    /// Whether a rule looks at paths: the application must then get the path that was looked at.
    pub fn needs_path(&self) -> bool {
        self.needs_path
    }

    /// Decides; deny wins over allow.
    pub fn decide(&self, subject: &Subject<'_>) -> Decision {
        let paths = match subject.http {
            Some((_, target)) if self.needs_path => match canonical::path(target) {
                Ok(path) => {
                    let bare = canonical::without_parameters(&path);
                    Some((path, bare))
                }
                Err(_) => return Decision { allowed: false, reason: Reason::AmbiguousPath },
            },
            _ => None,
        };
        let paths = paths.as_ref().map(|(path, bare)| (path.as_ref(), bare.as_deref()));
        if let Some(index) = self.deny.iter().position(|rule| rule.may_match(subject, paths)) {
            return Decision { allowed: false, reason: Reason::DenyRule(index) };
        }
        match &self.allow {
            None => Decision { allowed: true, reason: Reason::NothingDenied },
            Some(rules) => match rules.iter().position(|rule| rule.surely_matches(subject, paths)) {
                Some(index) => Decision { allowed: true, reason: Reason::AllowRule(index) },
                None => Decision { allowed: false, reason: Reason::NoAllowMatched },
            },
        }
    }
}

/// The canonical path, and the same without segment parameters where that differs.
type Paths<'a> = Option<(&'a str, Option<&'a str>)>;

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

    fn may_match(&self, subject: &Subject<'_>, paths: Paths<'_>) -> bool {
        self.caller_matches(subject)
            && (self.to.is_empty() || self.to.iter().any(|operation| operation.may_match(subject, paths)))
    }

    fn surely_matches(&self, subject: &Subject<'_>, paths: Paths<'_>) -> bool {
        self.caller_matches(subject)
            && (self.to.is_empty()
                || self.to.iter().any(|operation| operation.surely_matches(subject, paths)))
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

    fn may_match(&self, subject: &Subject<'_>, paths: Paths<'_>) -> bool {
        let Some((method, _)) = subject.http else { return self.port_matches(subject) };
        self.port_matches(subject)
            && (self.methods.is_empty() || self.methods.iter().any(|m| m == method))
            && (self.paths.is_empty()
                || paths.is_none_or(|(path, bare)| {
                    self.paths.iter().any(|glob| glob.matches(path) || bare.is_some_and(|b| glob.matches(b)))
                }))
    }

    fn surely_matches(&self, subject: &Subject<'_>, paths: Paths<'_>) -> bool {
        if !self.port_matches(subject) {
            return false;
        }
        let Some((method, _)) = subject.http else {
            return self.methods.is_empty() && self.paths.is_empty();
        };
        (self.methods.is_empty() || self.methods.iter().any(|m| m == method))
            && (self.paths.is_empty()
                || paths.is_some_and(|(path, bare)| {
                    self.paths.iter().any(|glob| glob.matches(path) && bare.is_none_or(|b| glob.matches(b)))
                }))
    }
}

/// A path glob: `*` stands for what is within one segment, `**` (a whole segment) for any number of
/// segments. Matching is linear in the path for the patterns people write; no regular expressions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Glob(Vec<String>);

impl Glob {
    /// Compiles a pattern such as `/v1/**` or `/users/*/orders`.
    ///
    /// # Errors
    /// [`RuleError::Path`] unless it starts with `/`, is at most 1 KiB and is in canonical form.
    pub fn compile(pattern: &str) -> Result<Self, RuleError> {
        let refuse = || RuleError::Path(pattern.to_owned());
        if pattern.len() > 1024 || !pattern.starts_with('/') {
            return Err(refuse());
        }
        match canonical::path(pattern) {
            Ok(path) if path == pattern => {}
            _ => return Err(refuse()),
        }
        Ok(Self(pattern.split('/').skip(1).map(str::to_owned).collect()))
    }

    /// Whether a canonical path matches.
    pub fn matches(&self, path: &str) -> bool {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        segments_match(&self.0, &segments)
    }
}

fn segments_match(pattern: &[String], path: &[&str]) -> bool {
    match (pattern.split_first(), path.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((first, rest)), _) if first == "**" => {
            rest.is_empty()
                || (0..=path.len()).any(|skip| segments_match(rest, path.get(skip..).unwrap_or(&[])))
        }
        (Some(_), None) => false,
        (Some((first, rest)), Some((segment, more))) => {
            segment_matches(first.as_bytes(), segment.as_bytes()) && segments_match(rest, more)
        }
    }
}

/// `*` within one segment, by the usual single back-track.
fn segment_matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(byte) if text.get(t) == Some(byte) => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    p = at + 1;
                    t = from + 1;
                    star = Some((at, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).is_none_or(|rest| rest.iter().all(|byte| *byte == b'*'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(account: &str, namespace: &str) -> proto::Peer {
        proto::Peer {
            service_account: account.into(),
            namespaces: vec![namespace.into()],
            any_namespace: namespace.is_empty(),
            cidr: String::new(),
        }
    }

    fn subject<'a>(identity: Option<&'a WorkloadId>, http: Option<(&'a str, &'a str)>) -> Subject<'a> {
        Subject { identity, address: "10.1.2.3".parse().unwrap(), port: 8080, http }
    }

    fn access(allow: Option<Vec<proto::Rule>>, deny: Vec<proto::Rule>) -> Access {
        let has_allow = allow.is_some();
        let allow = allow.unwrap_or_default();
        Access::compile(&proto::Access { has_allow, allow, deny, ..Default::default() }).unwrap()
    }

    #[test]
    fn deny_wins_over_allow() {
        let rule = proto::Rule { from: vec![peer("web", "shop")], to: vec![] };
        let both = access(Some(vec![rule.clone()]), vec![rule]);
        let web = WorkloadId::new("cluster.local", "shop", "web");
        assert_eq!(both.decide(&subject(Some(&web), None)).reason, Reason::DenyRule(0));
    }

    #[test]
    fn an_empty_allow_list_denies_all_and_an_absent_one_allows_all() {
        assert!(!access(Some(vec![]), vec![]).decide(&subject(None, None)).allowed);
        assert!(access(None, vec![]).decide(&subject(None, None)).allowed);
    }

    #[test]
    fn a_service_account_matches_only_in_its_namespace_and_never_a_plain_client() {
        let rule = proto::Rule { from: vec![peer("web", "shop")], to: vec![] };
        let allow = access(Some(vec![rule]), vec![]);
        let (here, there) = (WorkloadId::new("td", "shop", "web"), WorkloadId::new("td", "dev", "web"));
        assert!(allow.decide(&subject(Some(&here), None)).allowed);
        assert!(!allow.decide(&subject(Some(&there), None)).allowed);
        assert!(!allow.decide(&subject(None, None)).allowed);
    }

    #[test]
    fn a_rule_that_needs_http_denies_an_opaque_connection_and_never_allows_one() {
        let rule = proto::Rule {
            from: vec![],
            to: vec![proto::Operation { paths: vec!["/admin/**".into()], ..Default::default() }],
        };
        assert!(!access(None, vec![rule.clone()]).decide(&subject(None, None)).allowed);
        assert!(!access(Some(vec![rule]), vec![]).decide(&subject(None, None)).allowed);
    }

    #[test]
    fn no_spelling_of_a_denied_path_gets_through() {
        let rule = proto::Rule {
            from: vec![],
            to: vec![proto::Operation { paths: vec!["/admin/**".into()], ..Default::default() }],
        };
        let deny = access(None, vec![rule]);
        for target in [
            "/admin/x",
            "/admin",
            "//admin/x",
            "/%61dmin/x",
            "/a/../admin/x",
            "/admin;a=b/x",
            "/admin%2Fx",
            "/x/..;y/admin/x",
            "/admin/x?y=1",
            "/admin#x",
            "/admin/a*b",
            "/./admin/x",
            "/admin//x",
        ] {
            assert!(!deny.decide(&subject(None, Some(("GET", target)))).allowed, "{target}");
        }
        assert!(deny.decide(&subject(None, Some(("GET", "/administrator")))).allowed);
    }

    #[test]
    fn addresses_mapped_into_ipv6_match_their_ipv4_range() {
        let rule = proto::Rule {
            from: vec![proto::Peer { cidr: "10.1.0.0/16".into(), ..Default::default() }],
            to: vec![],
        };
        let allow = access(Some(vec![rule]), vec![]);
        let mut mapped = subject(None, None);
        mapped.address = "::ffff:10.1.2.3".parse().unwrap();
        assert!(allow.decide(&mapped).allowed);
    }

    #[test]
    fn values_that_cannot_be_enforced_are_refused_whole() {
        let with = |peer, operation| proto::Access {
            deny: vec![proto::Rule { from: vec![peer], to: vec![operation] }],
            ..Default::default()
        };
        let operation = proto::Operation::default();
        let cidr = proto::Peer { cidr: "10.1".into(), ..Default::default() };
        assert_eq!(
            Access::compile(&with(cidr, operation.clone())).unwrap_err(),
            RuleError::Cidr("10.1".into())
        );
        assert_eq!(Access::compile(&with(peer("", ""), operation)).unwrap_err(), RuleError::EmptyPeer);
        let path = proto::Operation { paths: vec!["/a//b".into()], ..Default::default() };
        assert!(matches!(Access::compile(&with(peer("a", "b"), path)), Err(RuleError::Path(_))));
    }

    proptest! {
        #[test]
        fn a_glob_without_stars_matches_itself_alone(path in "/[a-z]{1,4}(/[a-z]{1,4}){0,3}", other in "/[a-z]{1,4}") {
            let glob = Glob::compile(&path).unwrap();
            prop_assert!(glob.matches(&path));
            prop_assert_eq!(glob.matches(&other), path == other);
        }

        #[test]
        fn a_star_covers_every_character_of_a_segment(middle in "[!-.0-~&&[^%\\\\#?]]{0,12}") {
            let path = format!("/a/x{middle}y/b");
            prop_assert!(Glob::compile("/a/x*y/b").unwrap().matches(&path), "{path}");
        }
    }
}
