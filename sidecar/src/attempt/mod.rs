//! One attempt at serving a request: from whatever protocol it came to whatever protocol it goes.
//!
//! In: a [`Call`], and an [`Exchange`] that is open to one server. Out: an [`Attempt`], which says how it
//! ended. First the answer's head is awaited, under an [`AttemptPolicy`], while the body is sent; then the
//! answer is delivered. Until the head has arrived the request may still be sent elsewhere: its body is kept
//! as long as it fits the credit that a peer grants before its application has taken anything
//! ([`STREAM_CREDIT`](tulle_mesh::wire::STREAM_CREDIT)). Nothing here picks an endpoint, counts or logs.
//!
//! ```text
//!   body      the request's body on its way, kept for another attempt
//!   answer    the client's side: where the answer goes
//!   exchange  the server's side: where the request goes and the answer comes from
//!   open      an exchange with an endpoint
//!   tunnel    bytes both ways until each way has ended
//! ```

mod answer;
mod body;
mod exchange;
mod open;
#[cfg(test)]
mod tests;
pub mod tunnel;

pub use answer::Answer;
pub use body::RequestBody;
pub use exchange::{Exchange, UpSink, UpSource, http1_exchange, http2_exchange};
pub use open::{Opening, open, open_plain};
pub use tunnel::{Joined, join, proxy_tcp, splice, tunnel};

use tokio::time::Instant;

use crate::call::{Call, Ended};
use crate::error::Failure;
use crate::http1::{Reader, Writer};

/// What an attempt may take, and which answers are accepted.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttemptPolicy {
    /// When the answer's head must have arrived; `None`: whenever it comes.
    pub deadline: Option<Instant>,
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The head of the server's answer went to the client, with this status. `Err`: the answer broke off later.
    Delivered(Result<u16, Failure>),
    /// The policy did not accept an answer with this status. Nothing went to the client.
    Refused(u16),
    /// No byte reached an application.
    NotProcessed(Failure),
    /// The application has provably not read the request to its end.
    Unread(Failure),
    /// Nothing of an answer arrived; the application may have seen the request.
    Unanswered(Failure),
    /// A failure that no other attempt mends: a malformed answer, a policy, the deadline.
    Final(Failure),
    /// The client is at fault, or has gone.
    Client(Failure),
}

/// An attempt that has ended, and what was seen of it.
#[derive(Debug)]
pub struct Attempt {
    /// How it ended.
    pub end: End,
    /// When the head of the answer arrived.
    pub head_at: Option<Instant>,
    /// The status in that head.
    pub status: Option<u16>,
    /// The `grpc-status` of the answer.
    pub grpc_status: Option<u16>,
    /// Bytes of the bodies: request, answer.
    pub bytes: (u64, u64),
    /// A connection to an HTTP/1 server that has ended its exchange cleanly.
    pub idle: Option<(Reader, Writer)>,
    /// The client's connection has ended its exchange cleanly too, and may carry another request.
    pub client_reusable: bool,
}

impl End {
    /// Whether the request may be sent once more, elsewhere or on a fresh connection. What no application has
    /// read to its end may be, whatever its method; what one may have carried out only if its method allows it
    /// to be carried out twice (RFC 9110 §9.2.2). The body must still be here as a whole.
    pub fn may_repeat(&self, call: &Call<'_>) -> bool {
        call.body.is_replayable()
            && match self {
                Self::NotProcessed(_) | Self::Unread(_) => true,
                Self::Unanswered(_) => {
                    let method = call.head.request_line().0;
                    let idempotent = matches!(method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE");
                    idempotent && !call.head.upgrade
                }
                Self::Delivered(_) | Self::Refused(_) | Self::Final(_) | Self::Client(_) => false,
            }
    }
}

impl Attempt {
    /// What the client of a request gets that ends with this attempt.
    pub fn ended(self) -> Ended {
        let (result, answered) = match self.end {
            End::Delivered(result) => (result, true),
            End::Refused(_) => (Err(Failure::UpstreamBadResponse("a status that is not accepted")), false),
            End::NotProcessed(failure)
            | End::Unread(failure)
            | End::Unanswered(failure)
            | End::Final(failure)
            | End::Client(failure) => (Err(failure), false),
        };
        Ended {
            result,
            answered,
            grpc_status: self.grpc_status,
            bytes: self.bytes,
            client_reusable: self.client_reusable,
        }
    }
}

/// Makes one attempt.
pub async fn run(call: &mut Call<'_>, exchange: Exchange, policy: &AttemptPolicy) -> Attempt {
    unfinished
}

// The signatures beside it, for whoever calls:
//   exchange.rs
//     pub struct Exchange { pub sink: UpSink, pub source: UpSource, pub reused: bool, pub place: Option<Place> }
//     pub fn http1_exchange(reader: Reader, writer: Writer, head: &Head, reused: bool) -> Exchange;
//     pub async fn http2_exchange(worker: &Worker, server: Server, head: &Head, limit: Duration) -> Result<Exchange, Failure>;
//   answer.rs
//     pub enum Answer<'a> { Http1(&'a mut Writer), Mesh(&'a Sender, u32), Http2(&'a mut SendResponse<Bytes>, Option<SendStream<Bytes>>) }
//     pub async fn Answer::fail(&mut self, failure: &Failure);          // where there is no Call: a head that cannot be read
//     pub async fn Answer::gone(&mut self);                             // resolves when the client has gone
//   tunnel.rs
//     pub async fn tunnel(up: (Source, Sink), down: (Source, Sink), admit: impl FnMut(&[u8]) -> bool, stop: impl Future<Output = ()>) -> (u64, u64);
//     pub async fn join(up, down, admit, heard: impl FnMut(), stop) -> Joined;
//     pub async fn splice(a: (TcpStream, BytesMut), b: TcpStream, admit, stop) -> (u64, u64);
//     pub async fn proxy_tcp(client: (&mut Reader, &mut Writer), server: (&mut Reader, &mut Writer), admit, heard, stop) -> Joined;  // unframes all four
//   call.rs: `call.prepare().await?` before the first attempt; Ended::failed(failure)
