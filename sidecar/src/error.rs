//! Why a request or a connection was not served: one enum, mapped in one place to an HTTP status, a gRPC
//! status, and the [`Reason`] that is a metric label, a log field and a header. The name says who is at fault.

use std::io;
use std::sync::Arc;

use tulle_mesh::reason::Reason;
use tulle_mesh::wire::frame::Code;

/// What a client was too slow with when its [`Failure::Timeout`] is its own fault.
pub const REQUEST_HEAD: &str = "the request's head";

/// Why a request or a connection failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The client sent invalid HTTP.
    #[error("the client sent a request that is refused: {0}")]
    ClientBadRequest(&'static str),
    /// The head of the client's request has more bytes or lines than are taken.
    #[error("the client sent a head of more than 60 KiB or 200 lines")]
    ClientHeadTooLong,
    /// The client went away.
    #[error("the client closed the connection")]
    ClientGone,
    /// The client went away while it waited for the answer.
    #[error("the client closed the connection before there was an answer")]
    ClientGaveUp,
    /// An access rule refused it.
    #[error("refused by policy")]
    PolicyDenied,
    /// Plain text where encryption is required.
    #[error("plain text is refused: mTLS is Strict here")]
    PolicyPlaintext,
    /// The service has no endpoint that takes requests.
    #[error("the service has no ready endpoint")]
    UpstreamNone,
    /// No endpoint could be reached.
    #[error("no endpoint could be connected: nothing may be listening at the Service's targetPort")]
    UpstreamConnect,
    /// The endpoint's certificate names another workload: a reused address.
    #[error("the endpoint is another workload than expected")]
    UpstreamIdentity,
    /// The server closed or reset before its answer was complete.
    #[error("the server ended the connection before its answer was complete")]
    UpstreamReset,
    /// The connection to the server's sidecar ended before the answer was complete.
    #[error("the connection to the server's sidecar was lost before the answer was complete")]
    UpstreamLost,
    /// The server sent invalid HTTP.
    #[error("the server sent an answer that is refused: {0}")]
    UpstreamBadResponse(&'static str),
    /// Every endpoint that was tried had no application that took the request: its sidecar could not connect it, or it was
    /// ending.
    #[error(
        "no endpoint that was tried served it: nothing may be listening at the Service's targetPort, or the pods end"
    )]
    UpstreamNotProcessed,
    /// This sidecar has no certificate, so it can reach no other sidecar.
    #[error("this pod has no workload certificate yet: is the operator reachable?")]
    OursNoCertificate,
    /// This sidecar lacks a descriptor, a port or memory. The cause is in its log.
    #[error("the client's own sidecar has run out of descriptors, ports or memory")]
    OursResources,
    /// This pod has more requests than it takes. No byte has reached the application.
    #[error("the pod has more requests than it takes")]
    OursOverloaded,
    /// No rule of the routes matches the request.
    #[error("no route matches the request")]
    RouteNone,
    /// The rule that matches leads nowhere: it has no backend, or the chosen one does not exist or may not be used.
    #[error("the route has no valid backend for the request")]
    RouteNoBackend,
    /// With what this route adds, the head of the request is longer than another sidecar reads.
    #[error("with the headers that {0} adds, the head of the request has more than 62 KiB or 208 lines")]
    RouteHeadTooLong(Arc<str>),
    /// A policy makes requests fail on purpose, with this status.
    #[error("a policy makes this request fail with {0}")]
    FaultInjected(u16),
    /// The time that the request has, of its policy, its route or its client, was over before there was an answer.
    #[error("no answer within the time that the request has")]
    DeadlineExceeded,
    /// The endpoint had no answer within the time that one attempt may take.
    #[error("no answer within the time that an attempt may take")]
    UpstreamTimeout,
    /// No byte has moved in either direction for as long as a policy allows.
    #[error("no byte has moved for as long as the policy allows")]
    IdleTimeout,
    /// A head or a connection took too long.
    #[error("timed out: {0}")]
    Timeout(&'static str),
}

impl Failure {
    /// A connection to an upstream that could not be opened. What this pod lacks itself is not blamed on the
    /// endpoint.
    pub fn connecting(error: &io::Error) -> Self {
        // From errno(3): ENOMEM, ENFILE, EMFILE, EADDRNOTAVAIL (no free port), ENOBUFS.
        const LACKING: [i32; 5] = [12, 23, 24, 99, 105];
        if error.raw_os_error().is_some_and(|code| LACKING.contains(&code)) {
            return Self::OursResources;
        }
        Self::UpstreamConnect
    }

    /// The status that an HTTP client is answered with, if it still can be.
    pub fn status(&self) -> u16 {
        match self {
            Self::ClientBadRequest(_) => 400,
            Self::ClientHeadTooLong | Self::RouteHeadTooLong(_) => 431,
            Self::ClientGone | Self::ClientGaveUp => 499,
            Self::PolicyDenied | Self::PolicyPlaintext => 403,
            Self::UpstreamNone
            | Self::UpstreamConnect
            | Self::UpstreamNotProcessed
            | Self::OursNoCertificate
            | Self::OursResources
            | Self::OursOverloaded => 503,
            Self::UpstreamIdentity
            | Self::UpstreamReset
            | Self::UpstreamLost
            | Self::UpstreamBadResponse(_) => 502,
            Self::RouteNone => 404,
            Self::RouteNoBackend => 500,
            Self::FaultInjected(status) => *status,
            Self::Timeout(what) if *what == REQUEST_HEAD => 408,
            Self::DeadlineExceeded | Self::UpstreamTimeout | Self::IdleTimeout | Self::Timeout(_) => 504,
        }
    }

    /// The status that a gRPC client is answered with: INTERNAL, PERMISSION_DENIED, UNIMPLEMENTED, DEADLINE_EXCEEDED
    /// or UNAVAILABLE; for an injected fault, what gRPC makes of its HTTP status.
    pub fn grpc_status(&self) -> u16 {
        match self {
            Self::ClientBadRequest(_)
            | Self::ClientHeadTooLong
            | Self::RouteHeadTooLong(_)
            | Self::FaultInjected(400) => 13,
            Self::PolicyDenied | Self::PolicyPlaintext | Self::FaultInjected(403) => 7,
            Self::RouteNone | Self::FaultInjected(404) => 12,
            Self::DeadlineExceeded | Self::UpstreamTimeout | Self::IdleTimeout => 4,
            Self::FaultInjected(401) => 16,
            Self::FaultInjected(429 | 502 | 503 | 504) => 14,
            Self::FaultInjected(_) => 2,
            _ => 14,
        }
    }

    /// Whether the client is at fault, or broke off what the server was carrying out: nothing is known of the
    /// server. One that gave up waiting for an answer may well have had reason to.
    pub fn is_of_client(&self) -> bool {
        match self {
            Self::ClientBadRequest(_) | Self::ClientHeadTooLong | Self::ClientGone => true,
            Self::Timeout(what) => *what == REQUEST_HEAD,
            _ => false,
        }
    }

    /// Whether a policy or a route ended it, as its author wants: that is counted, and not logged as a failure.
    pub fn is_of_policy(&self) -> bool {
        matches!(
            self,
            Self::PolicyDenied
                | Self::PolicyPlaintext
                | Self::OursOverloaded
                | Self::RouteNone
                | Self::FaultInjected(_)
                | Self::IdleTimeout
        )
    }

    /// Its reason, without what only this occurrence has.
    pub fn reason(&self) -> Reason {
        match self {
            Self::ClientBadRequest(_) => Reason::ClientBadRequest,
            Self::ClientHeadTooLong => Reason::ClientHeadTooLong,
            Self::ClientGone => Reason::ClientGone,
            Self::ClientGaveUp => Reason::ClientGaveUp,
            Self::PolicyDenied => Reason::PolicyDenied,
            Self::PolicyPlaintext => Reason::PolicyPlaintext,
            Self::UpstreamNone => Reason::UpstreamNone,
            Self::UpstreamConnect => Reason::UpstreamConnect,
            Self::UpstreamIdentity => Reason::UpstreamIdentity,
            Self::UpstreamReset => Reason::UpstreamReset,
            Self::UpstreamLost => Reason::UpstreamLost,
            Self::UpstreamBadResponse(_) => Reason::UpstreamBadResponse,
            Self::UpstreamNotProcessed => Reason::UpstreamNotProcessed,
            Self::OursNoCertificate => Reason::OursNoCertificate,
            Self::OursResources => Reason::OursResources,
            Self::OursOverloaded => Reason::OursOverloaded,
            Self::RouteNone => Reason::RouteNone,
            Self::RouteNoBackend => Reason::RouteNoBackend,
            Self::RouteHeadTooLong(_) => Reason::RouteHeadTooLong,
            Self::FaultInjected(_) => Reason::FaultInjected,
            Self::DeadlineExceeded => Reason::DeadlineExceeded,
            Self::UpstreamTimeout => Reason::UpstreamTimeout,
            Self::IdleTimeout => Reason::IdleTimeout,
            Self::Timeout(_) => Reason::Timeout,
        }
    }

    /// The word in metrics and logs.
    pub fn name(&self) -> &'static str {
        self.reason().name()
    }
}

/// Which side of a body on its way broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PumpError {
    /// The source's bytes are malformed.
    SourceMalformed(&'static str),
    /// The source ended early.
    SourceGone,
    /// The source, a sidecar, gave the stream up.
    SourceReset(Code),
    /// The sink takes no more.
    SinkGone,
    /// The body does not fit what its head declared.
    SinkRefused(&'static str),
}

impl PumpError {
    /// Whether it was the request's side that broke off, when the request is what moves.
    pub fn is_of_client(self) -> bool {
        !matches!(self, Self::SinkGone)
    }

    /// The failure of a request whose body broke off on its way to the server, if the client's side did.
    pub fn of_client(self) -> Failure {
        match self {
            Self::SourceMalformed(why) | Self::SinkRefused(why) => Failure::ClientBadRequest(why),
            Self::SourceGone | Self::SourceReset(_) | Self::SinkGone => Failure::ClientGone,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    /// One failure of each reason, and two where the status depends on more.
    fn each() -> Vec<Failure> {
        vec![
            Failure::ClientBadRequest("a header"),
            Failure::ClientHeadTooLong,
            Failure::ClientGone,
            Failure::ClientGaveUp,
            Failure::Timeout(REQUEST_HEAD),
            Failure::Timeout("the handshake"),
            Failure::PolicyDenied,
            Failure::PolicyPlaintext,
            Failure::UpstreamNone,
            Failure::UpstreamConnect,
            Failure::UpstreamNotProcessed,
            Failure::UpstreamIdentity,
            Failure::UpstreamReset,
            Failure::UpstreamLost,
            Failure::UpstreamBadResponse("a length"),
            Failure::UpstreamTimeout,
            Failure::DeadlineExceeded,
            Failure::IdleTimeout,
            Failure::RouteNone,
            Failure::RouteNoBackend,
            Failure::RouteHeadTooLong("HTTPRoute/shop/web".into()),
            Failure::FaultInjected(503),
            Failure::OursOverloaded,
            Failure::OursNoCertificate,
            Failure::OursResources,
        ]
    }

    fn grpc_name(status: u16) -> &'static str {
        match status {
            4 => "4 DEADLINE_EXCEEDED",
            7 => "7 PERMISSION_DENIED",
            12 => "12 UNIMPLEMENTED",
            13 => "13 INTERNAL",
            14 => "14 UNAVAILABLE",
            other => panic!("gRPC status {other} has no name here"),
        }
    }

    /// What a client gets, over HTTP and over gRPC.
    fn answers(reason: Reason) -> (String, String) {
        let of_reason: Vec<Failure> =
            each().into_iter().filter(|failure| failure.reason() == reason).collect();
        let first = of_reason.first().unwrap_or_else(|| panic!("no failure is {reason:?}"));
        match reason {
            // Nobody is left to answer.
            Reason::ClientGone | Reason::ClientGaveUp => (format!("({})", first.status()), String::new()),
            // The head of the answer has gone.
            Reason::IdleTimeout => ("cut off".to_owned(), String::new()),
            Reason::FaultInjected => {
                ("as `faults.abort.status`".to_owned(), "what gRPC makes of it".to_owned())
            }
            _ => {
                let statuses: Vec<String> =
                    of_reason.iter().map(|failure| failure.status().to_string()).collect();
                (statuses.join(", "), grpc_name(first.grpc_status()).to_owned())
            }
        }
    }

    fn table() -> String {
        let mut table = "| reason | HTTP | gRPC | at fault | what was observed | what to do |\n".to_owned();
        table.push_str("|---|---|---|---|---|---|\n");
        for reason in Reason::ALL {
            let (http, grpc) = answers(*reason);
            let (name, blames) = (reason.name(), reason.blames().name());
            let (sentence, remedy) = (reason.sentence(), reason.remedy());
            table.push_str(&format!("| `{name}` | {http} | {grpc} | {blames} | {sentence} | {remedy} |\n"));
        }
        table
    }

    #[test]
    fn the_table_of_reasons_in_the_readme_is_what_the_code_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
        let readme = fs::read_to_string(&path).unwrap();
        let (before, rest) = readme.split_once("| reason | HTTP |").expect("the README has the table");
        let (_, after) = rest.split_once("\n\n").expect("an empty line ends the table");
        let generated = format!("{before}{}\n{after}", table());
        if std::env::var_os("TULLE_UPDATE").is_some() {
            fs::write(&path, &generated).unwrap();
            return;
        }
        assert!(
            readme == generated,
            "README.md is stale: TULLE_UPDATE=1 cargo test -p tulle-sidecar reasons"
        );
    }

    #[test]
    fn a_client_that_is_slow_with_its_head_is_at_fault_and_a_slow_server_is_not() {
        let (slow_client, slow_server) = (Failure::Timeout(REQUEST_HEAD), Failure::Timeout("a connection"));
        assert_eq!((slow_client.status(), slow_client.is_of_client()), (408, true));
        assert_eq!((slow_server.status(), slow_server.is_of_client()), (504, false));
    }

    #[test]
    fn what_routes_and_policies_end_has_the_status_that_their_specifications_name() {
        for (failure, http, grpc) in [
            (Failure::RouteNone, 404, 12),
            (Failure::RouteNoBackend, 500, 14),
            (Failure::RouteHeadTooLong("HTTPRoute/shop/web".into()), 431, 13),
            (Failure::OursOverloaded, 503, 14),
            (Failure::DeadlineExceeded, 504, 4),
            (Failure::UpstreamTimeout, 504, 4),
            (Failure::FaultInjected(503), 503, 14),
            (Failure::FaultInjected(418), 418, 2),
        ] {
            assert_eq!((failure.status(), failure.grpc_status()), (http, grpc), "{failure:?}");
        }
    }

    #[test]
    fn what_this_pod_lacks_is_not_blamed_on_the_endpoint() {
        for (code, expected) in [
            (24, Failure::OursResources),
            (99, Failure::OursResources),
            (111, Failure::UpstreamConnect),
            (113, Failure::UpstreamConnect),
        ] {
            assert_eq!(Failure::connecting(&io::Error::from_raw_os_error(code)), expected, "{code}");
        }
    }
}
