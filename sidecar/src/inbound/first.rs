//! What a connection is, by its first bytes.
//!
//! In: a connection of which nothing has been read. Out: an [`Opening`]. A client whose connection would be refused
//! does not reach the application while nobody knows what it speaks; where it would be let in, the application may be
//! the one that speaks first.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use rustls::server::Acceptor;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};
use tulle_mesh::wire::ALPN;

use super::{Peer, app, plain};
use crate::admit::would_admit_connection;
use crate::config::Protocol;
use crate::detect::{self, Detector};
use crate::error::Failure;
use crate::io::Prefixed;

/// A sidecar speaks at once, and its hello arrives within a few milliseconds, also where both nodes are busy. Who
/// stays silent for longer may be waiting for the application.
const SILENCE: Duration = Duration::from_millis(20);
/// A stranger has this long for its first byte, unless the application has been connected: then its own patience
/// counts.
const FIRST_BYTE: Duration = Duration::from_secs(60);
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
}

/// Finds out what a connection is.
///
/// # Errors
/// When the client leaves or stays silent, or the application cannot be reached.
pub(super) async fn listen(peer: &Peer, stream: TcpStream) -> Result<Opening, Failure> {
    let mut plain = Plain { stream, read: BytesMut::with_capacity(4 * 1024), protocol: Protocol::Opaque, app: None };
    match timeout(SILENCE, plain.read_some()).await {
        Ok(read) => read?,
        Err(_) if would_admit_connection(&peer.worker, &peer.client) => {
            if plain.wait_for_either(peer).await? == Speaker::Application {
                return Ok(Opening::Plain(plain));
            }
        }
        Err(_) => {
            let Ok(read) = timeout(FIRST_BYTE, plain.read_some()).await else {
                peer.worker.telemetry.event("refused_connection", "Silent");
                return Err(Failure::Timeout("the client's first byte"));
            };
            read?;
        }
    }
    plain.decide(peer).await
}

/// Who has spoken first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaker {
    Client,
    Application,
}

impl Plain {
    /// Reads from the client; its end is an error.
    async fn read_some(&mut self) -> Result<(), Failure> {
        self.read.reserve(2 * 1024);
        match self.stream.read_buf(&mut self.read).await {
            Ok(read) if read > 0 => Ok(()),
            _ => Err(Failure::ClientGone),
        }
    }

    /// Connects to the application, and waits for whoever speaks first.
    async fn wait_for_either(&mut self, peer: &Peer) -> Result<Speaker, Failure> {
        let connected = tokio::select! {
            biased;
            read = self.read_some() => return read.map(|()| Speaker::Client),
            connected = app::connect(peer) => connected,
        };
        let app = connected.inspect_err(|_| plain::reset_on_close(&self.stream))?;
        let spoken = tokio::select! {
            biased;
            read = self.read_some() => read.map(|()| Speaker::Client),
            greets = is_greeting(&app) => {
                if greets || timeout(SETTINGS, self.read_some()).await.is_err() {
                    Ok(Speaker::Application)
                } else {
                    // Whether it has spoken or left shows with the next read.
                    Ok(Speaker::Client)
                }
            }
        };
        self.app = Some(app);
        spoken
    }

    /// Reads until it is clear what the client speaks, or held back for long enough.
    async fn decide(mut self, peer: &Peer) -> Result<Opening, Failure> {
        let since = Instant::now();
        let mut detector = Detector::default();
        loop {
            if detect::is_tls(&self.read) {
                if self.offers_mesh(since + BEGINNING).await {
                    app::keep_untouched(peer, self.app.take());
                    return Ok(Opening::Mesh(Prefixed::new(self.stream, self.read)));
                }
                return Ok(Opening::Plain(self));
            }
            if let Some(protocol) = detector.look(&self.read) {
                self.protocol = protocol;
                return Ok(Opening::Plain(self));
            }
            let may_pass = would_admit_connection(&peer.worker, &peer.client);
            let hold = if !may_pass || detect::is_surely_http2(&self.read) { BEGINNING } else { detect::UNDECIDED };
            match timeout_at(since + hold, self.read_some()).await {
                Ok(Ok(())) => {}
                // It has said all that it will say, or waits for an answer.
                Ok(Err(_)) | Err(_) => return Ok(Opening::Plain(self)),
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
                    let names = accepted.client_hello().alpn();
                    return names.is_some_and(|mut names| names.any(|name| name == ALPN));
                }
                Ok(None) if shown < MAX_HELLO => {}
                _ => return false,
            }
            if !matches!(timeout_at(until, self.read_some()).await, Ok(Ok(()))) {
                return false;
            }
        }
    }
}

/// Waits until the application speaks or closes; whether that is for its client. A server of HTTP/2 may send its
/// SETTINGS before its client has said anything (gRPC-Go does): the client speaks all the same.
async fn is_greeting(app: &TcpStream) -> bool {
    let mut start = [0; 9];
    let length = match app.peek(&mut start).await {
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
        Err(_) => return true,
    };
    !matches!(start.get(..length), Some([0, _, _, 4, 0, 0, 0, 0, 0]))
}
