//! Why a request or a connection failed.
//!
//! One enum generates the label `reason` of metrics, the field `error.type` of access logs, the header `tulle-reason`
//! and the table in the sidecar's README. Names are labels: they never change. In commands, upper-case words stand for
//! names of the reader's cluster.

/// Which side is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The client, or its user.
    Client,
    /// The server: its application, pods or node.
    Upstream,
    /// Tulle, or what it has been given.
    Ours,
    /// A MeshPolicy did what its author wants.
    Policy,
    /// A route of the Gateway API.
    Route,
}

impl Blame {
    /// The side in a word, as tables show it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "server",
            Self::Ours => "Tulle",
            Self::Policy => "policy",
            Self::Route => "route",
        }
    }
}

/// Each reason: its name, who is at fault, what was observed, and what to do.
macro_rules! reasons {
    ($($name:ident, $blame:ident, $sentence:literal, $remedy:literal;)+) => {
        /// Why a request or a connection failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $(
                #[doc = $sentence]
                $name,
            )+
        }

        impl Reason {
            /// Every reason, in the order in which documentation lists them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The word in metrics, logs and headers.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => stringify!($name),)+
                }
            }

            /// Which side is at fault.
            pub const fn blames(self) -> Blame {
                match self {
                    $(Self::$name => Blame::$blame,)+
                }
            }

            /// What was observed, as a sentence.
            pub const fn sentence(self) -> &'static str {
                match self {
                    $(Self::$name => $sentence,)+
                }
            }

            /// What to do, with the command to run.
            pub const fn remedy(self) -> &'static str {
                match self {
                    $(Self::$name => $remedy,)+
                }
            }
        }
    };
}

reasons! {
    ClientBadRequest, Client,
        "The client sent invalid HTTP.",
        "Correct the client; the log of its sidecar names what is invalid: `kubectl logs POD -c tulle-proxy`.";
    ClientHeadTooLong, Client,
        "The head of the request has more than 60 KiB or 200 lines.",
        "Send fewer or smaller headers and cookies. `tulle stat service/SERVICE` shows how often it happens.";
    ClientGone, Client,
        "The client closed the connection while its request or the response was on its way.",
        "Nothing: it is not counted against the server.";
    ClientGaveUp, Client,
        "The client closed the connection while it waited for the response; that is counted as a failure of the server.",
        "Find out with `tulle stat service/SERVICE` whether the server is slow, or raise the client's timeout.";
    Timeout, Client,
        "The head of a request (408), a handshake or the first byte of a connection (504) took too long.",
        "Look at the client and the network; the log of the sidecar names what took too long: `kubectl logs POD -c tulle-proxy`.";
    PolicyDenied, Policy,
        "An access rule of a MeshPolicy refused it, or the pod has no policy yet. Opaque connections are reset.",
        "`tulle denials WORKLOAD` lists the last ones with caller and rule, and `tulle access who-can SERVICE` those who may call.";
    PolicyPlaintext, Policy,
        "It was plain text where mTLS is Strict: new connections are reset, requests on older ones get 403.",
        "Give the client a sidecar (`tulle edges` shows who sends plain text), or set `mtls: Permissive`.";
    UpstreamNone, Upstream,
        "The Service has no ready endpoint, a Canary gives the only revision of them no share, or `zone: Only` excludes all.",
        "Compare `kubectl get endpointslices` with `tulle config POD endpoints` of the client's pod.";
    UpstreamConnect, Upstream,
        "No endpoint could be connected: nothing listens at the Service's `targetPort`, or the network does not let it through.",
        "Compare the Service's `targetPort` with the port that the application listens at; one that listens at 127.0.0.1 alone is not reached either. Then look at NetworkPolicies and nodes: `tulle pods`.";
    UpstreamNotProcessed, Upstream,
        "Every endpoint that was tried (at most four) passed it on to nobody: nothing listens at the Service's `targetPort`, or the pods end.",
        "Compare the Service's `targetPort` with the port that the application listens at: the log of the server's sidecar names it (`kubectl logs SERVER-POD -c tulle-proxy`). Else find out whether the server's pods end or restart: `kubectl get pods`.";
    UpstreamIdentity, Upstream,
        "The endpoint has another identity than expected, usually because its address has been reused.",
        "Nothing if it ends by itself within seconds; else compare the pod's service account with `tulle config POD endpoints` of the client's pod.";
    UpstreamReset, Upstream,
        "The server ended the connection before its response was complete.",
        "Look at the application's log: `kubectl logs POD`.";
    UpstreamLost, Upstream,
        "The connection to the server's sidecar ended before the response was complete.",
        "Find out whether the server's pod or node has ended: `tulle pods`.";
    UpstreamBadResponse, Upstream,
        "The response is invalid HTTP.",
        "Correct the application; the log of the sidecar names what is invalid: `kubectl logs POD -c tulle-proxy`.";
    UpstreamTimeout, Upstream,
        "One attempt had no answer within `timeout.attempt` (of a route: `backendRequest`), and could not be retried.",
        "Find out with `tulle stat service/SERVICE` whether the server is slow, or allow `retry`.";
    DeadlineExceeded, Upstream,
        "No answer came within `timeout.request`, the route's `request`, `tulle-timeout` or `grpc-timeout`.",
        "Find out with `tulle stat service/SERVICE` whether the server is slow; `tulle explain CLIENT SERVICE` shows which time is set.";
    IdleTimeout, Policy,
        "No byte moved for `timeout.idle` after the answer had begun.",
        "Raise `timeout.idle`, or send keep-alive messages. `tulle config POD policies` of the client's pod shows what is set.";
    RouteNone, Route,
        "The Service has a route, and none of its rules matches. A TLS connection is closed.",
        "Add a rule without matches; `tulle explain CLIENT SERVICE --path PATH` shows which rules were compared.";
    RouteNoBackend, Route,
        "The rule has no backend, the chosen one does not exist or may not be used, or a filter is not supported.",
        "Read conditions `ResolvedRefs`, `Accepted` and `PartiallyInvalid` of the route: `tulle routes SERVICE`, then `kubectl describe` of the route.";
    RouteHeadTooLong, Route,
        "With the headers that the route adds, the head of the request has more than 62 KiB or 208 lines.",
        "Let the route add less, or the client send less; the response names the route, and `tulle config POD routes` shows it.";
    FaultInjected, Policy,
        "Section `faults` of a MeshPolicy made the request fail on purpose.",
        "Wait for `until`, or delete the policy: `tulle config POD policies` of the client's pod shows it.";
    OursOverloaded, Ours,
        "The server's pod has more requests than `limits.concurrency` allows, or more connections than `limits.connections`.",
        "Add pods, or raise the limit: `tulle config POD policies` of the server's pod shows what is in use.";
    OursNoCertificate, Ours,
        "The client's sidecar has no certificate.",
        "Find out with `tulle check` whether the operator runs and the pod reaches it.";
    OursResources, Ours,
        "The client's sidecar has run out of descriptors, ports or memory.",
        "Its log names the cause (`kubectl logs POD -c tulle-proxy`); raise its limits.";
}

impl Reason {
    /// The reason of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|reason| reason.name() == name)
    }

    /// Whether it says that no endpoint was chosen. Nothing was sent then, and nothing says whether mTLS would have
    /// secured it: tables show neither yes nor no.
    pub const fn has_no_endpoint(self) -> bool {
        matches!(self, Self::UpstreamNone | Self::RouteNone | Self::RouteNoBackend)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::Path;

    use super::*;

    const INTRODUCTION: &str = "\
# Failure reasons

The word in the header `tulle-reason`, in the label `reason` of `tulle_failures_total`, in `error.type` of access logs and
spans, and in what `tulle` shows. [A table](../../../sidecar/README.md#failure-reasons) has the status codes of HTTP and
gRPC too. Words in capitals stand for names of your cluster. Generated from
[reason.rs](../../../mesh/src/reason.rs): `TULLE_UPDATE=1 cargo test -p tulle-mesh reason`.
";

    #[test]
    fn the_page_of_reasons_is_what_the_code_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/src/reference/reasons.md");
        let of = |reason: &Reason| {
            let (name, blames) = (reason.name(), reason.blames().name());
            let (sentence, remedy) = (reason.sentence(), reason.remedy());
            format!("\n## {name}\n\n**At fault: {blames}.** {sentence}\n\n{remedy}\n")
        };
        let generated = INTRODUCTION.to_owned() + &Reason::ALL.iter().map(of).collect::<String>();
        if std::env::var_os("TULLE_UPDATE").is_some() {
            fs::write(&path, &generated).unwrap();
        }
        let checked_in = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            checked_in == generated,
            "reasons.md is stale: TULLE_UPDATE=1 cargo test -p tulle-mesh reason"
        );
    }

    #[test]
    fn every_reason_is_found_by_its_name_and_no_other_word_is_one() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_name(reason.name()), Some(*reason));
        }
        let names: HashSet<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), Reason::ALL.len());
        for word in ["", "policydenied", "Other"] {
            assert_eq!(Reason::from_name(word), None, "{word}");
        }
    }

    #[test]
    fn a_name_begins_with_the_side_that_is_at_fault_where_it_names_one() {
        for reason in Reason::ALL {
            let prefix = match reason.blames() {
                Blame::Client => "Client",
                Blame::Upstream => "Upstream",
                Blame::Ours => "Ours",
                Blame::Policy => "Policy",
                Blame::Route => "Route",
            };
            let unnamed =
                [Reason::Timeout, Reason::DeadlineExceeded, Reason::IdleTimeout, Reason::FaultInjected];
            assert!(reason.name().starts_with(prefix) || unnamed.contains(reason), "{reason:?}");
        }
    }

    #[test]
    fn every_reason_is_explained_in_sentences_that_fit_into_a_row_of_a_table() {
        for reason in Reason::ALL {
            for text in [reason.sentence(), reason.remedy()] {
                assert!(text.ends_with('.') && !text.contains('|') && !text.contains('\n'), "{text}");
                assert_eq!(text.matches('`').count() % 2, 0, "{text}");
            }
        }
    }
}
