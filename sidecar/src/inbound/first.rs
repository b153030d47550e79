//! What a connection is, by its first bytes.
//!
//! In: a connection of which nothing has been read. Out: an [`Opening`]. A client whose connection would be refused
//! does not reach the application while nobody knows what it speaks; where it would be let in, the application may be
//! the one that speaks first.

use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use rustls::server::Acceptor;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, timeout, timeout_at};
use tulle_mesh::counted_event::RefusedConnection;
use tulle_mesh::wire::ALPN;

use super::{Peer, app};
use crate::admit::{
    admit_client, might_admit_request, would_admit_client, would_admit_connection, would_admit_plaintext,
};
use crate::config::Protocol;
use crate::detect::{self, Detector};
use crate::error::Failure;
use crate::gate::Slot;
use crate::io::{Prefixed, READABLE_OR_RESET};
use crate::listen::{reset_on_close, watch_mesh};

/// A sidecar speaks at once, and its hello arrives within a few milliseconds, also where both nodes are busy. Who
/// stays silent for longer may be waiting for the application.
const SILENCE: Duration = Duration::from_millis(20);
/// The same where a silent client is reset because the clients' connections are at their limit: the first packet of a
/// sidecar may have been lost, and is sent again after 200 ms or more.
const LATE_HELLO: Duration = Duration::from_secs(1);
/// The same where no rule would let in anything that it could send: as long as another sidecar tries at least
/// (`HANDSHAKE_TIMEOUT` of the pool). A throttled sidecar runs for a part of each 100 ms only, and where packets are lost
/// while it connects, what is sent after that is repeated after a second or more.
const LAST_HELLO: Duration = Duration::from_secs(3);
/// How long a client has for its first byte where the rules might let an HTTP request in, and nothing else. As long as a
/// sidecar waits for such a request: an HTTP client that connects ahead of its requests connects again, and one that
/// waits for the application to speak first is refused while its user is still there.
const FIRST_BYTE: Duration = Duration::from_secs(10);
/// A ClientHello must be whole, and a beginning that is held back must say what it is, this long after its first byte.
const BEGINNING: Duration = Duration::from_secs(10);
/// The longest ClientHello that is waited for.
const MAX_HELLO: usize = 16 * 1024;
/// How long a client may stay silent to which the application has sent HTTP/2 SETTINGS, before it gets them. Clients
/// of HTTP/2 speak first.
const SETTINGS: Duration = Duration::from_secs(1);

/// What a connection is.
pub(super) enum Opening {
    /// TLS that offers `tulle/1`.
    Mesh(Prefixed),
    /// Anything else.
    Plain(Plain),
}

/// A plain connection, and what is known of it.
pub(super) struct Plain {
    /// The client.
    pub(super) stream: TcpStream,
    /// What has been read from it.
    pub(super) read: BytesMut,
    /// What is spoken.
    pub(super) protocol: Protocol,
    /// A connection to the application that was opened for this client. Nothing has been read from it.
    pub(super) app: Option<TcpStream>,
    /// The application has reset that connection before anybody spoke. Linux reports it once, so the next who reads
    /// would find a proper end.
    pub(super) app_broke_off: bool,
    /// Its place among the connections of clients, where these are limited.
    pub(super) slot: Option<Slot>,
    /// A place was taken, or is not needed.
    has_asked: bool,
}

/// Finds out what a connection is.
///
/// # Errors
/// When the client leaves or stays silent, there are too many of its kind, or the application cannot be reached.
pub(super) async fn listen(peer: &Peer, stream: TcpStream) -> Result<Opening, Failure> {
    let mut plain = Plain::new(stream);
    let speaks = match timeout(SILENCE, plain.read_some()).await {
        Ok(read) => read?,
        Err(_) if would_admit_connection(&peer.worker, &peer.client) => plain.wait_for_either(peer).await?,
        Err(_) => {
            let may_request = might_admit_request(&peer.worker, &peer.client);
            let patience = if may_request { FIRST_BYTE } else { LAST_HELLO };
            let Ok(read) = timeout(patience, plain.read_some()).await else {
                if may_request {
                    peer.worker.telemetry.event(RefusedConnection::Silent);
                }
                // It waits for the application to speak: opaque, which is refused and counted as such.
                return Ok(Opening::Plain(plain));
            };
            read?
        }
    };
    let opening = match speaks {
        true => plain.decide(peer).await?,
        // A client that has ended its side without a word may still be told something.
        false if would_admit_connection(&peer.worker, &peer.client) => Opening::Plain(plain),
        false => return Err(Failure::ClientGone),
    };
    match opening {
        Opening::Plain(mut plain) => {
            plain.take_place(peer)?;
            Ok(Opening::Plain(plain))
        }
        mesh => Ok(mesh),
    }
}

impl Plain {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            read: BytesMut::new(),
            protocol: Protocol::Opaque,
            app: None,
            app_broke_off: false,
            slot: None,
            has_asked: false,
        }
    }

    /// Takes a place among the connections of clients, once. A client beyond their limit is reset.
    fn take_place(&mut self, peer: &Peer) -> Result<(), Failure> {
        if !std::mem::replace(&mut self.has_asked, true) {
            self.slot = admit_client(&peer.worker).map_err(|denied| {
                reset_on_close(&self.stream);
                denied.0
            })?;
        }
        Ok(())
    }

    /// Reads from the client. `false`: it has ended its side, or has reset the connection behind what was read: that is
    /// left to whoever passes it on, so that the application sees both.
    async fn read_some(&mut self) -> Result<bool, Failure> {
        loop {
            // Waited for without memory: a silent connection may stay so for hours.
            let ready = self.stream.ready(READABLE_OR_RESET).await.map_err(|_| Failure::ClientGone)?;
            if ready.is_error() && !self.read.is_empty() {
                return Ok(false);
            }
            self.read.reserve(2 * 1024);
            // Not `try_read_buf`: after a short read that would read again before it waits, and so take off a reset that
            // has come meanwhile.
            match self.stream.read_buf(&mut self.read).now_or_never() {
                Some(Ok(read)) => return Ok(read > 0),
                Some(Err(_)) => return Err(Failure::ClientGone),
                // There was nothing after all, or the task has used up its turn.
                None => {
                    if self.read.is_empty() {
                        self.read = BytesMut::new();
                    }
                    consume_budget().await;
                }
            }
        }
    }

    /// Connects to the application, and waits for whoever speaks first. `false`: it was not the client, or one of the
    /// two has ended its side.
    async fn wait_for_either(&mut self, peer: &Peer) -> Result<bool, Failure> {
        if !would_admit_client(&peer.worker)
            && let Ok(read) = timeout(LATE_HELLO, self.read_some()).await
        {
            return read;
        }
        // Another sidecar would have spoken.
        self.take_place(peer)?;
        let connected = tokio::select! {
            biased;
            read = self.read_some() => return read,
            connected = app::connect(peer) => connected,
        };
        let app = connected.inspect_err(|_| reset_on_close(&self.stream))?;
        let read = tokio::select! {
            biased;
            read = self.read_some() => read,
            heard = first_of(&app) => {
                self.app_broke_off = heard == Heard::Reset;
                match heard {
                    Heard::Settings => timeout(SETTINGS, self.read_some()).await.unwrap_or(Ok(false)),
                    Heard::Greeting | Heard::Reset => Ok(false),
                }
            }
        };
        if read.is_err() {
            // The client has reset its connection: the application sees that too.
            reset_on_close(&app);
        }
        self.app = Some(app);
        read
    }

    /// Reads until it is clear what the client speaks, or held back for long enough.
    async fn decide(mut self, peer: &Peer) -> Result<Opening, Failure> {
        let since = Instant::now();
        let mut detector = Detector::default();
        loop {
            if detect::is_tls(&self.read) {
                if self.offers_mesh(since + BEGINNING).await {
                    watch_mesh(&self.stream).map_err(|_| Failure::ClientGone)?;
                    app::keep_untouched(peer, self.app.take());
                    return Ok(Opening::Mesh(Prefixed::new(self.stream, self.read)));
                }
                return Ok(Opening::Plain(self));
            }
            if let Some(protocol) = detector.look(&self.read) {
                self.protocol = protocol;
                return Ok(Opening::Plain(self));
            }
            if !would_admit_plaintext(&peer.worker, &peer.client) {
                // It is refused whatever it turns out to be.
                return Ok(Opening::Plain(self));
            }
            let may_pass = would_admit_connection(&peer.worker, &peer.client);
            let hold =
                if !may_pass || detect::is_surely_http2(&self.read) { BEGINNING } else { detect::UNDECIDED };
            match timeout_at(since + hold, self.read_some()).await {
                Ok(Ok(true)) => {}
                // It has said all that it will say, or waits for an answer.
                Ok(Ok(false)) | Err(_) => return Ok(Opening::Plain(self)),
                Ok(Err(failure)) => return Err(failure),
            }
        }
    }

    /// Whether a ClientHello offers `tulle/1`. Its bytes stay in the buffer.
    async fn offers_mesh(&mut self, until: Instant) -> bool {
        let mut acceptor = Acceptor::default();
        let mut shown = 0;
        loop {
            let mut new = self.read.get(shown..).unwrap_or(&[]);
            shown = self.read.len();
            while !new.is_empty() {
                if !matches!(acceptor.read_tls(&mut new), Ok(read) if read > 0) {
                    return false;
                }
            }
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    return accepted
                        .client_hello()
                        .alpn()
                        .is_some_and(|mut names| names.any(|name| name == ALPN));
                }
                Ok(None) if shown < MAX_HELLO => {}
                _ => return false,
            }
            if !matches!(timeout_at(until, self.read_some()).await, Ok(Ok(true))) {
                return false;
            }
        }
    }
}

/// What the application has done before its client has spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heard {
    /// It has spoken to its client, or has closed.
    Greeting,
    /// The first frame of an HTTP/2 server (gRPC-Go sends it at once): the client speaks all the same.
    Settings,
    /// It has reset the connection.
    Reset,
}

/// Waits until the application speaks or closes. What it says stays unread, but an error is taken off the connection.
async fn first_of(app: &TcpStream) -> Heard {
    let mut start = [0; 9];
    let Ok(length) = app.peek(&mut start).await else { return Heard::Reset };
    match start.get(..length) {
        Some([0, _, _, 4, 0, 0, 0, 0, 0]) => Heard::Settings,
        _ => Heard::Greeting,
    }
}
