//! Why a request or a connection was not served: one enum, mapped in one place to an HTTP status, a
//! metric label and a log field. The name says who is at fault.

/// Why a request or a connection failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The client's bytes are no acceptable HTTP.
    #[error("the client sent a request that is refused: {0}")]
    ClientBadRequest(&'static str),
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
    #[error("no endpoint could be reached")]
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
    /// The server's bytes are no acceptable HTTP.
    #[error("the server sent an answer that is refused: {0}")]
    UpstreamBadResponse(&'static str),
    /// The request met endpoints that were gone, three times.
    #[error("every endpoint that was tried had gone")]
    UpstreamNotProcessed,
    /// A head or a connection took too long.
    #[error("timed out: {0}")]
    Timeout(&'static str),
}

impl Failure {
    /// The status that an HTTP client is answered with, if it still can be.
    pub fn status(&self) -> u16 {
        match self {
            Self::ClientBadRequest(_) => 400,
            Self::ClientGone | Self::ClientGaveUp => 499,
            Self::PolicyDenied | Self::PolicyPlaintext => 403,
            Self::UpstreamNone | Self::UpstreamConnect | Self::UpstreamNotProcessed => 503,
            Self::UpstreamIdentity
            | Self::UpstreamReset
            | Self::UpstreamLost
            | Self::UpstreamBadResponse(_) => 502,
            Self::Timeout(_) => 504,
        }
    }

    /// Whether the client is at fault, or broke off what the server was carrying out: nothing is known of the
    /// server. One that gave up waiting for an answer may well have had reason to.
    pub fn is_of_client(&self) -> bool {
        matches!(self, Self::ClientBadRequest(_) | Self::ClientGone)
    }

    /// The word in metrics and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ClientBadRequest(_) => "ClientBadRequest",
            Self::ClientGone => "ClientGone",
            Self::ClientGaveUp => "ClientGaveUp",
            Self::PolicyDenied => "PolicyDenied",
            Self::PolicyPlaintext => "PolicyPlaintext",
            Self::UpstreamNone => "UpstreamNone",
            Self::UpstreamConnect => "UpstreamConnect",
            Self::UpstreamIdentity => "UpstreamIdentity",
            Self::UpstreamReset => "UpstreamReset",
            Self::UpstreamLost => "UpstreamLost",
            Self::UpstreamBadResponse(_) => "UpstreamBadResponse",
            Self::UpstreamNotProcessed => "UpstreamNotProcessed",
            Self::Timeout(_) => "Timeout",
        }
    }
}
