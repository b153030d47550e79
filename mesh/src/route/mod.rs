//! Routes of the Gateway API: which rule takes a request, and what its path or its `Location` becomes.
//!
//! ```text
//!   order      sorts the matches of several routes by the precedence of the Gateway API (operator)
//!   Matcher    finds the first match of a request, or the best one of a TLS server name (sidecar)
//!   rewritten_path, location   the paths of rewrites and redirects, and the URL of a redirect
//! ```
//!
//! In: the merged rules of one address, and what one request says. Out: the index of a rule. Never looks at backends,
//! waits, or changes a request. Paths are compared as they were sent: neither decoded nor normalised, because a rule
//! decides where a request goes, not whether it may ([`crate::policy`] decides that, on every reading of the path).
//!
//! Finding allocates nothing, with two exceptions: a header of several lines is joined by its [`Subject`], and an
//! encoded query value is decoded for a regular expression.

use std::borrow::Cow;

use crate::proto::{self, RouteKind};

mod condition;
mod order;
mod path;
mod pattern;
mod query;
mod redirect;

pub use order::{Candidate, order};
pub use path::rewritten_path;
pub use pattern::{MAX_COMPILED_BYTES, MAX_PATTERN_BYTES, check_regex};
pub use redirect::{Requested, location};

use condition::Condition;

/// What rules look at in a request.
pub trait Subject {
    /// As it was sent. Methods are case-sensitive.
    fn method(&self) -> &str;
    /// As it was sent, without query; `/` for an empty one.
    fn path(&self) -> &str;
    /// What stands behind the `?`.
    fn query(&self) -> Option<&str>;
    /// The value of a header, whose name is compared without case. Several lines are joined with `,`, those of Cookie
    /// with `; `.
    fn header(&self, name: &str) -> Option<Cow<'_, [u8]>>;
}

/// The compiled matches of one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matcher {
    kind: RouteKind,
    rules: usize,
    conditions: Vec<Condition>,
}

/// The rule that takes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// Index into the rules.
    pub rule: usize,
    /// The path prefix that matched, as the route has it. Rewrites and redirects may replace it.
    pub prefix: Option<&'a str>,
}

/// Why rules were refused. Each names the value, so that its author finds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// Not a regular expression of the supported syntax, or too large.
    #[error("invalid regular expression {pattern:?}: {reason}")]
    Regex {
        /// The pattern; the beginning of a long one.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Not an absolute path.
    #[error("invalid path {0:?}: write it from the root, for example /v1")]
    Path(String),
    /// Not a name that a header can have.
    #[error("invalid header name {0:?}")]
    HeaderName(String),
    /// A query parameter without a name.
    #[error("a match of a query parameter has no name")]
    QueryName,
    /// Neither a DNS name nor a wildcard in front of one.
    #[error("invalid server name {0:?}: write for example shop.example.com or *.example.com")]
    ServerName(String),
    /// A way to compare that this build does not know, or that this part of a request does not have.
    #[error("a match of the {part} compares in the unsupported way {way}")]
    Comparison {
        /// Of the request.
        part: &'static str,
        /// Number of the `ValueMatch.Type`.
        way: i32,
    },
    /// A match of a rule that does not exist.
    #[error("a match names rule {rule}, and there are {rules}")]
    Rule {
        /// The index.
        rule: u32,
        /// How many rules there are.
        rules: usize,
    },
    /// A kind of route that this build does not know.
    #[error("unknown kind of route {0}")]
    Kind(i32),
}

impl Matcher {
    /// Compiles the matches of rules, which stand in order of precedence.
    ///
    /// # Errors
    /// [`RouteError`] names the first value that cannot be matched; nothing of the rules is kept.
    pub fn compile(rules: &proto::Rules) -> Result<Self, RouteError> {
        let kind = match RouteKind::try_from(rules.kind) {
            Ok(RouteKind::Unspecified) | Err(_) => return Err(RouteError::Kind(rules.kind)),
            Ok(kind) => kind,
        };
        let rules_len = rules.rules.len();
        let conditions = rules.matches.iter().map(|m| Condition::compile(m, rules_len));
        Ok(Self { kind, rules: rules_len, conditions: conditions.collect::<Result<_, _>>()? })
    }

    /// The rule that takes an HTTP request, gRPC included. `None`: no rule matches it, or the rules are not of HTTP or
    /// gRPC.
    pub fn find(&self, subject: &impl Subject) -> Option<Found<'_>> {
        match self.kind {
            RouteKind::Http | RouteKind::Grpc => {
                self.conditions.iter().find_map(|condition| condition.find(subject))
            }
            RouteKind::Tls | RouteKind::Tcp | RouteKind::Unspecified => None,
        }
    }

    /// The rule that takes a connection. Of TLS: the one with the most specific of the names that match, an exact one
    /// before the longest wildcard before a rule without names; of equal ones, the first. Of TCP: the first rule.
    /// `None`: no rule matches, or the rules are not of TLS or TCP.
    ///
    /// `name`: the server name of the ClientHello. Without one, only a rule without names matches.
    pub fn find_server_name(&self, name: Option<&str>) -> Option<usize> {
        match self.kind {
            RouteKind::Tls => {
                let mut best: Option<(usize, usize)> = None;
                for condition in &self.conditions {
                    if let Some(specificity) = condition.server_name_specificity(name)
                        && best.is_none_or(|(highest, _)| specificity > highest)
                    {
                        best = Some((specificity, condition.rule));
                    }
                }
                best.map(|(_, rule)| rule)
            }
            RouteKind::Tcp => {
                let first = self.conditions.first().map(|condition| condition.rule);
                first.or((self.rules > 0).then_some(0))
            }
            RouteKind::Http | RouteKind::Grpc | RouteKind::Unspecified => None,
        }
    }
}

#[cfg(test)]
mod tests;
