//! One request as a value: its head and body, where its answer goes, when it began and what has been tried.
//!
//! In: a head that was read from an HTTP/1 client, an HTTP/2 client or another sidecar, with the halves of
//! its connection or stream. [`Call::finish`] is the only place that counts a request, logs its failure and
//! answers the client where no server has. Nothing here opens a connection or picks an endpoint.

use std::cell::OnceCell;
use std::rc::Rc;

use bytes::Bytes;
use tokio::time::Instant;
use tulle_mesh::canonical::{self, Readings};
use tulle_mesh::counted_event::NotProcessed;
use tulle_mesh::denial::DenialId;
use tulle_mesh::reason::Reason;
use tulle_mesh::wire::head::Protocol as Travels;

use crate::attempt::answer::{Answer, Load, Refused};
use crate::attempt::body::RequestBody;
use crate::error::Failure;
use crate::http1::{Framing, Head, Reader, Writer, logged_host};
use crate::http2::{RecvStream, SendStream};
use crate::message::Source;
use crate::route::ResponseEdits;
use crate::tap;
use crate::telemetry::{Limited, Series};
use crate::trace::Trace;
use crate::wire::{Receiver, Sender};
use crate::worker::Worker;

/// A server that is down fails every request: its failures are logged this often in a second.
static FAILURES: Limited = Limited::new(10);

/// One request and everything that is known of it.
pub struct Call<'a> {
    /// What is asked.
    pub head: Head,
    /// Its body, kept while it may have to be sent again.
    pub body: RequestBody<'a>,
    /// Where the answer goes.
    pub answer: Answer<'a>,
    /// As which message it travels.
    pub travels: Travels,
    /// When its head was complete.
    pub since: Instant,
    /// When its answer must have begun; `None`: never.
    pub deadline: Option<Instant>,
    /// Attempts so far.
    pub attempts: u8,
    /// What the route does to the head of the answer.
    pub edits: Option<Rc<ResponseEdits>>,
    /// The value of a `Set-Cookie` that goes out with the answer: of a session, or of a user who stays with a version.
    pub set_cookie: Option<Bytes>,
    /// The server span of a request to this pod, if it is recorded.
    pub trace: Option<Box<Trace>>,
    /// Under which id it was refused, if rules have refused it.
    pub denial: Option<DenialId>,
    /// Attempts at it are evidence, where a Canary compares versions.
    pub compared: bool,
    readings: OnceCell<Readings>,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The status of the server's answer, or why the client got none of it, or not all of it.
    pub result: Result<u16, Failure>,
    /// The `grpc-status` of the answer.
    pub grpc_status: Option<u16>,
    /// Why the server's sidecar gave the answer; `None`: the server did, or nobody.
    pub sidecar_reason: Option<Reason>,
    /// Bytes of the bodies: request, answer.
    pub bytes: (u64, u64),
    /// The head of an answer has gone to the client: nothing else can be answered.
    pub answered: bool,
    /// The client's connection may carry another request.
    pub client_reusable: bool,
}

impl Ended {
    /// A request that got nowhere: the client is answered with this failure. Its body may not have been read,
    /// so its connection is closed afterwards.
    pub fn failed(failure: Failure) -> Self {
        Self {
            result: Err(failure),
            grpc_status: None,
            sidecar_reason: None,
            bytes: (0, 0),
            answered: false,
            client_reusable: false,
        }
    }

    /// The reason that the request is counted under; `None`: an application answered it.
    pub fn reason(&self) -> Option<Reason> {
        match &self.result {
            Ok(_) => self.sidecar_reason,
            Err(failure) => Some(failure.reason()),
        }
    }
}

/// The statuses that a client got. What it has not seen is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statuses {
    /// Of HTTP.
    pub http: Option<u16>,
    /// Of gRPC.
    pub grpc: Option<u16>,
}

impl<'a> Call<'a> {
    /// A request of an HTTP/1 client.
    #[inline(always)]
    pub fn http1(head: Head, reader: &'a mut Reader, writer: &'a mut Writer) -> Self {
        Self::new(head, Source::Http1(reader), Answer::Http1(writer), Travels::Http1)
    }

    /// A request of an HTTP/2 client.
    #[inline(always)]
    pub fn http2(head: Head, body: &'a mut RecvStream, respond: &'a mut SendStream) -> Self {
        Self::new(head, Source::Http2(body), Answer::Http2(respond), Travels::Http2)
    }

    /// A request of another sidecar. `load`: what its answer reports of this pod.
    #[inline(always)]
    pub fn mesh(
        head: Head,
        travels: Travels,
        sender: &'a Sender,
        receiver: &'a mut Receiver,
        load: impl Into<Load>,
    ) -> Self {
        Self::new(head, Source::Mesh(receiver), Answer::Mesh(sender, load.into()), travels)
    }

    /// Always inlined, as are its callers: a call that wrote into a future before it has its place (`task::boxed`) would
    /// make the whole future be copied there, 10 kB for each request.
    #[inline(always)]
    fn new(head: Head, source: Source<'a>, answer: Answer<'a>, travels: Travels) -> Self {
        Self {
            body: RequestBody::new(source, head.framing, head.upgrade),
            head,
            answer,
            travels,
            since: Instant::now(),
            deadline: None,
            attempts: 0,
            edits: None,
            set_cookie: None,
            trace: None,
            denial: None,
            compared: true,
            readings: OnceCell::new(),
        }
    }

    /// The label of the protocol in metrics.
    pub fn protocol(&self) -> &'static str {
        if self.travels == Travels::Http2 { "http2" } else { "http1" }
    }

    /// Whether its method allows it to be carried out twice (RFC 9110 §9.2.2). A request for a tunnel is not.
    pub fn is_idempotent(&self) -> bool {
        let method = self.head.request_line().0;
        matches!(method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE") && !self.head.upgrade
    }

    /// Every reading of the path that an application may have. Computed when a rule asks for the first time.
    pub fn readings(&self) -> &Readings {
        self.readings.get_or_init(|| canonical::readings(self.head.request_line().1))
    }

    /// To be awaited before the first attempt. A request for a tunnel whose body comes in chunks is gathered, up
    /// to 64 KiB, and then goes on with a length: a stream between sidecars does not say where a body ends and
    /// the tunnel begins. With a longer body it goes on as an ordinary request, which a server may always make of
    /// it (RFC 9110 §7.8).
    ///
    /// # Errors
    /// [`Failure::ClientBadRequest`] or [`Failure::ClientGone`] when the body breaks off.
    pub async fn prepare(&mut self) -> Result<(), Failure> {
        if !self.head.upgrade || self.head.framing != Framing::Chunked {
            return Ok(());
        }
        if self.head.expects_continue {
            // Its client sends the body only when the server has asked for it.
            self.head.upgrade = false;
            return Ok(());
        }
        // Rare: not a part of every request's future.
        Box::pin(self.body.gather(&mut self.head)).await
    }

    /// The statuses that the client got with this end, or gets from [`Self::finish`].
    pub fn statuses(&self, ended: &Ended) -> Statuses {
        match &ended.result {
            Ok(status) => Statuses { http: Some(*status), grpc: ended.grpc_status },
            // Of an answer that was cut off only its end is known.
            Err(_) if ended.answered => Statuses { http: None, grpc: ended.grpc_status },
            Err(failure) => match self.answer.statuses_of(&self.head, failure) {
                Some((status, grpc)) => Statuses { http: Some(status), grpc },
                None => Statuses::default(),
            },
        }
    }

    /// Counts the request, logs its failure (rate-limited) and answers the client if nothing was answered yet.
    /// Returns whether the client's connection may carry another request.
    pub async fn finish(mut self, worker: &Worker, series: &Series, ended: Ended) -> bool {
        series.retried(u64::from(self.attempts.saturating_sub(1)));
        let took = self.since.elapsed();
        match (&ended.result, ended.sidecar_reason) {
            (Ok(_), Some(reason)) => series.refused(reason, took, ended.bytes),
            (result, _) => series.request(result, ended.grpc_status, took, ended.bytes),
        }
        worker.telemetry.taps.show(|| tap::Request::of(&self, series, &ended, took));
        if let Some(trace) = &self.trace {
            trace.served(worker, &self, &ended);
        }
        let Err(failure) = &ended.result else { return ended.client_reusable };
        if ended.answered {
            return ended.client_reusable;
        }
        if self.answer.sends_elsewhere(failure) {
            worker.telemetry.event(NotProcessed::AppRefused);
        }
        // Whoever refuses by a rule logs the rule, and whoever cannot connect the application its port.
        let is_logged = failure.is_of_policy()
            || (*failure == Failure::UpstreamConnect && series.key.direction == "inbound");
        if !failure.is_of_client()
            && !is_logged
            && let Some(suppressed) = FAILURES.allow()
        {
            let (method, host) = (self.head.request_line().0, logged_host(&self.head));
            tracing::info!(
                reason = failure.name(),
                method,
                host = host.as_deref(),
                attempts = self.attempts,
                suppressed,
                "a request failed: {failure}"
            );
        }
        // What the client still sends of its body would be taken for another request. Whoever is refused by a rule or
        // for load and has sent all of it keeps its connection: to open another for every refusal would add to the load.
        let head = &self.head;
        let is_whole = self.body.is_ended() && head.keep_alive && !head.upgrade && !head.http10;
        let keep = is_whole
            && matches!(failure, Failure::OursOverloaded | Failure::RouteNone | Failure::RouteNoBackend);
        let refused = Refused { failure, denial: self.denial, keep };
        self.answer.fail_request(&self.head, refused, self.edits.as_deref()).await;
        keep
    }
}
