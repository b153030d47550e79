//! What a sidecar counts in `tulle_events_total`, beside requests and connections.
//!
//! Each kind of event is an enum of its reasons. They generate the labels `kind` and `reason` and the table in the sidecar's
//! README. Names are labels: they never change. A [`CountedEvent`] can be made of these enums only, so that nothing is
//! counted that the table lacks.

use crate::policy;
use crate::reason::Reason;

/// One event to count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CountedEvent {
    kind: &'static str,
    reason: &'static str,
}

impl CountedEvent {
    /// The label `kind`.
    pub const fn kind(self) -> &'static str {
        self.kind
    }

    /// The label `reason`.
    pub const fn reason(self) -> &'static str {
        self.reason
    }
}

/// A kind of event, for documentation.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The label `kind`.
    pub name: &'static str,
    /// The kind under which the same is counted for a policy in Shadow. Empty: policies do not cause it.
    pub shadow: &'static [&'static str],
    /// Its reasons.
    pub reasons: &'static [KindReason],
}

/// A reason of a kind of event, for documentation.
#[derive(Clone, Copy, Debug)]
pub struct KindReason {
    /// The label `reason`.
    pub name: &'static str,
    /// When it is counted, as the end of a sentence.
    pub when: &'static str,
}

/// A kind of event whose reasons are those of failures, for documentation.
#[derive(Clone, Copy, Debug)]
pub struct FailureKind {
    /// The label `kind`.
    pub name: &'static str,
    /// When it is counted, as the end of a sentence.
    pub when: &'static str,
}

/// Each kind: its type and its label, that of a policy in Shadow, and its reasons.
macro_rules! kinds {
    ($(
        $(#[$doc:meta])*
        $kind:ident, $name:literal $(, $shadow:literal)?: { $($reason:ident: $when:literal,)+ }
    )+) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub enum $kind {
                $(
                    #[doc = concat!("Counted when ", $when, ".")]
                    $reason,
                )+
            }

            impl $kind {
                /// The label `reason`.
                pub const fn name(self) -> &'static str {
                    match self {
                        $(Self::$reason => stringify!($reason),)+
                    }
                }

                $(
                    /// The same of a policy in Shadow, which would have done it.
                    pub const fn would(self) -> CountedEvent {
                        CountedEvent { kind: $shadow, reason: self.name() }
                    }
                )?
            }

            impl From<$kind> for CountedEvent {
                fn from(reason: $kind) -> Self {
                    Self { kind: $name, reason: reason.name() }
                }
            }
        )+

        /// Every kind that has reasons of its own, in the order in which documentation lists them.
        pub const KINDS: &[Kind] = &[$(
            Kind {
                name: $name,
                shadow: &[$($shadow)?],
                reasons: &[$(KindReason { name: stringify!($reason), when: $when },)+],
            },
        )+];
    };
}

/// Each kind whose reasons are those of failures: its type, its label and when it is counted.
macro_rules! failure_kinds {
    ($($kind:ident, $name:literal, $when:literal;)+) => {
        $(
            #[doc = concat!("Counted when ", $when, ".")]
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub struct $kind(pub Reason);

            impl From<$kind> for CountedEvent {
                fn from($kind(reason): $kind) -> Self {
                    Self { kind: $name, reason: reason.name() }
                }
            }
        )+

        /// Every kind whose reasons are those of failures, in the order in which documentation lists them.
        pub const FAILURE_KINDS: &[FailureKind] = &[$(FailureKind { name: $name, when: $when },)+];
    };
}

failure_kinds! {
    RefusedRequest, "refused_request", "the head of a request was rejected";
    InboundConnection, "inbound_connection", "a connection to this pod ended early";
}

kinds! {
    /// A connection was refused.
    RefusedConnection, "refused_connection": {
        NotRedirected: "a connection to 26150 or 26151 was not redirected",
        TooMany: "nine tenths of the file descriptors are in use: the connection is reset",
        ClaimedIdentity: "opaque HTTP/2 has a `tulle-client-id` of the client",
        RulesUnknown: "the operator has not answered for 60 s what is enforced",
        Silent: "a client without a sidecar sent nothing for 10 s where only an HTTP request could be allowed",
    }
    /// A stream of another sidecar was refused.
    RefusedStream, "refused_stream": {
        BadHead: "the head of another sidecar's stream cannot be decoded",
        BadRequest: "the head of the request in another sidecar's stream is invalid",
    }
    /// A connection of another sidecar.
    MeshConnection, "mesh_connection": {
        Failed: "a connection of another sidecar ended early",
    }
    /// Section `access` or `mtls` of a policy refused something.
    PolicyDenied, "policy_denied", "policy_would_deny": {
        Plaintext: "`mtls` rejected plain text",
        DenyRule: "a rule of `access.deny` matched",
        NoAllowMatched: "no rule of `access.allow` matched",
        AmbiguousPath: "a rule of `access.deny` has paths, and the request's path has too many readings",
        Withdrawn: "a new policy ended a request or connection that an earlier one had allowed",
    }
    /// A line of the access log.
    AccessLog, "access_log": {
        Written: "a line of the [access log](#access-log) was written",
        Dropped: "a line was left out because there were 500 in that second",
    }
    /// Section `limits` of a policy refused something.
    Limited, "limited", "would_limit": {
        Concurrency: "`limits.concurrency` refused a request",
        Connections: "`limits.connections` refused a connection",
    }
    /// The time of a request was over before the application had it.
    ExpiredRequest, "expired_request": {
        Queue: "the request's time was over while it waited for its turn under `limits.concurrency`",
        Connect: "the request's time was over before there was a connection to the application",
    }
    /// A request was sent again without any policy.
    RepeatedRequest, "repeated_request": {
        NotProcessed: "a request was sent to another endpoint [without any policy](#retries): it had reached no application",
        Unread: "the same, or again to this pod's own application: the server had closed the connection, or reset it",
        Unanswered: "a request was sent to another endpoint without any policy: nothing of an answer had arrived",
        SameEndpoint: "a request was sent to the same endpoint on a fresh connection: no other was left",
        KeptConnectionClosed: "a request was sent to this pod's own application again, which had closed a kept connection",
    }
    /// A request was sent again because `retry` of a policy or route says so.
    Retry, "retry", "would_retry": {
        ServerError: "a request was sent again because `retry` says so: its status was from 500 on",
        Code: "the same: its status is one that the route names",
        Unavailable: "the same: its status was 503, or UNAVAILABLE of gRPC",
        Overloaded: "the same: the pod had more requests than it takes",
        Reset: "the same: the server broke off before an answer",
        Connect: "the same: no endpoint could be reached",
        Timeout: "the same: the attempt took too long",
    }
    /// A retry was not made.
    RetryRefused, "retry_refused": {
        Budget: "a retry was not made because the budget was used up",
    }
    /// The time of something was over.
    Timeout, "timeout", "would_timeout": {
        Request: "a timeout ended a request",
        Attempt: "a timeout ended an attempt",
        Idle: "a timeout ended what had stopped moving",
    }
    /// What the breaker did.
    Breaker, "breaker": {
        Ejected: "an endpoint was ejected; the log names it",
        Restored: "an ejected endpoint serves again; the log names it",
        Capped: "an endpoint was not ejected because too many are already",
        Panic: "so many are ejected that all are used",
    }
    /// A breaker in Shadow would have done something.
    WouldEject, "would_eject": {
        Failures: "a breaker in Shadow would have ejected an endpoint, for failures in a row or for their share",
    }
    /// Section `faults` of a policy did something to an attempt.
    Fault, "fault", "would_fault": {
        Delay: "`faults` delayed an attempt",
        Abort: "`faults` aborted an attempt",
    }
    /// A copy of a request (mirror).
    CopiedRequest, "copied_request": {
        Sent: "a copy (mirror) was answered",
        Failed: "a copy was not answered",
        SkippedTunnel: "no copy was sent: the request is an upgrade or has `Expect`",
        SkippedLong: "no copy was sent: the body has more than 64 KiB",
        SkippedSlow: "no copy was sent: the body took more than 100 ms",
        SkippedStream: "no copy was sent: the body of a gRPC call took more than 5 ms",
        SkippedBusy: "no copy was sent: 64 copies were under way",
        SkippedNoEndpoint: "no copy was sent: there was no endpoint for it",
    }
    /// This pod did not process a request.
    NotProcessed, "not_processed": {
        AppRefused: "this pod's application did not take a request, so it went elsewhere",
    }
    /// Connections with the addresses of clients.
    SourceAddress, "source_address": {
        NotPreserved: "the capability NET_RAW is missing, and the sidecar is never ready",
    }
    /// Attempts under a Canary were not counted.
    EvidenceDropped, "evidence_dropped": {
        TableFull: "attempts under a Canary were not counted: there are too many Canaries and revisions at once",
    }
}

impl PolicyDenied {
    /// The same of a decision; `None`: the decision allows it.
    pub const fn of(decided: policy::Reason) -> Option<Self> {
        match decided {
            policy::Reason::AllowRule(_) | policy::Reason::NothingDenied => None,
            policy::Reason::DenyRule(_) => Some(Self::DenyRule),
            policy::Reason::NoAllowMatched => Some(Self::NoAllowMatched),
            policy::Reason::AmbiguousPath => Some(Self::AmbiguousPath),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn kinds_are_unique_words_in_snake_case_and_reasons_unique_words_in_pascal_case() {
        let own = KINDS.iter().flat_map(|kind| kind.shadow.iter().copied().chain([kind.name]));
        let kinds: Vec<&str> = own.chain(FAILURE_KINDS.iter().map(|kind| kind.name)).collect();
        assert_eq!(kinds.iter().collect::<HashSet<_>>().len(), kinds.len(), "{kinds:?}");
        for kind in kinds {
            assert!(kind.chars().all(|letter| letter.is_ascii_lowercase() || letter == '_'), "{kind}");
        }
        for kind in KINDS {
            let names: HashSet<&str> = kind.reasons.iter().map(|reason| reason.name).collect();
            assert_eq!(names.len(), kind.reasons.len(), "{kind:?}");
            for name in names {
                assert!(name.starts_with(|first: char| first.is_ascii_uppercase()), "{name}");
                assert!(name.chars().all(|letter| letter.is_ascii_alphanumeric()), "{name}");
            }
        }
    }

    #[test]
    fn explanations_fit_into_a_row_of_a_table() {
        let own = KINDS.iter().flat_map(|kind| kind.reasons).map(|reason| reason.when);
        for when in own.chain(FAILURE_KINDS.iter().map(|kind| kind.when)) {
            assert!(!when.is_empty() && !when.ends_with('.') && !when.contains(['|', '\n']), "{when}");
            assert_eq!(when.matches('`').count() % 2, 0, "{when}");
        }
    }

    #[test]
    fn what_a_policy_in_shadow_would_do_has_the_reason_of_what_it_does_and_another_kind() {
        let (did, would) = (CountedEvent::from(Limited::Concurrency), Limited::Concurrency.would());
        assert_eq!((did.kind(), did.reason()), ("limited", "Concurrency"));
        assert_eq!((would.kind(), would.reason()), ("would_limit", "Concurrency"));
        let refused = CountedEvent::from(RefusedRequest(Reason::ClientBadRequest));
        assert_eq!((refused.kind(), refused.reason()), ("refused_request", "ClientBadRequest"));
    }

    #[test]
    fn a_refusal_is_counted_by_the_name_that_logs_give_it_and_nothing_else_is() {
        use crate::policy::Reason::{AllowRule, AmbiguousPath, DenyRule, NoAllowMatched, NothingDenied};
        for decided in [DenyRule(0), NoAllowMatched, AmbiguousPath] {
            assert_eq!(PolicyDenied::of(decided).map(PolicyDenied::name), Some(decided.name()));
        }
        assert!([AllowRule(0), NothingDenied].into_iter().all(|allowed| PolicyDenied::of(allowed).is_none()));
    }
}
