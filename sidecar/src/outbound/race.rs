//! What a connection speaks whose port says nothing of it, or whose bytes may disagree with what it says.
//!
//! A client that speaks decides with its first bytes. One that is silent is believed to wait for the server after a
//! few milliseconds: a connection to an endpoint is opened, and from then on client and server race. A server that
//! wins (MySQL, SMTP) makes the connection opaque. No guess holds bytes back for longer than [`UNDECIDED`], and
//! none is final: what earlier connections have taught only shortens or lengthens the first wait, and is dropped
//! when a connection contradicts it.

use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::coop::consume_budget;
use tokio::time::{Instant, timeout, timeout_at};

use super::opaque::{self, Greeting, Opened, Unopened};
use super::{http, reset_on_close, speak};
use crate::backend::Backend;
use crate::config::Protocol;
use crate::detect::{Detector, PREFACE, UNDECIDED, is_surely_http2};
use crate::error::Failure;
use crate::http1::conn::split;
use crate::http1::{Reader, Writer};
use crate::io::READABLE_OR_RESET;
use crate::route::{Connection, Learned, Port, RouteTarget};
use crate::worker::Worker;

/// A client that is silent for this long after it has connected may be waiting for the server. Clients that speak
/// first do so in one go with connecting.
const SILENT: Duration = Duration::from_millis(3);
/// The same on a port whose clients usually speak first: a busy client is more likely than one that waits, and a
/// connection that it does not need costs its server more than these milliseconds.
const LATE: Duration = Duration::from_millis(25);
/// An HTTP/2 server has sent its settings to a client that is still silent: it is most likely about to speak
/// HTTP/2. After this long it gets to see them.
const UNANSWERED_SETTINGS: Duration = Duration::from_millis(250);
/// How long a client whose connection no endpoint took, or whose endpoint ended without a word, may take to speak HTTP,
/// before it sees that. It is then told why, or served by another: what looks like a client that waits for the server
/// may be one that is short of processor time, and the pod that was opened for it may have been about to end.
const PATIENCE: Duration = Duration::from_millis(250);
/// The same where requests may fare better: a policy that refused it may allow them, and the port's rules may lead them
/// elsewhere than to a Service that has no endpoints itself.
const LONG_PATIENCE: Duration = Duration::from_secs(10);

/// What the client has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Words {
    /// Enough to know.
    Known(Protocol),
    /// Too little in the time that there was, or its end.
    Undecided,
}

/// Reads until the client's first bytes say what they are, or it has ended. `limit`: how long they may be
/// undecided, once there are any. May be given up and begun again.
async fn listen(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    limit: Option<Duration>,
) -> Result<Words, Failure> {
    let mut detector = Detector::default();
    let mut since = None;
    loop {
        if let Some(protocol) = detector.look(buffer) {
            return Ok(Words::Known(protocol));
        }
        // Waited for without memory: a silent connection may stay so for hours.
        let ready = match limit.filter(|_| !buffer.is_empty() && !is_surely_http2(buffer)) {
            None => stream.ready(READABLE_OR_RESET).await,
            Some(limit) => {
                let by = *since.get_or_insert_with(Instant::now) + limit;
                match timeout_at(by, stream.ready(READABLE_OR_RESET)).await {
                    Ok(ready) => ready,
                    Err(_) => return Ok(Words::Undecided),
                }
            }
        };
        // A reset behind what was read is left to whoever passes it on: the server gets both.
        if ready.map_err(|_| Failure::ClientGone)?.is_error() && !buffer.is_empty() {
            return Ok(Words::Undecided);
        }
        buffer.reserve(4 * 1024);
        match stream.read_buf(buffer).now_or_never() {
            Some(Ok(0)) => return Ok(Words::Undecided),
            Some(Ok(_)) => {}
            Some(Err(_)) => return Err(Failure::ClientGone),
            // There was nothing after all, or the task has used up its turn.
            None => {
                if buffer.is_empty() {
                    *buffer = BytesMut::new();
                }
                consume_budget().await;
            }
        }
    }
}

/// Serves a connection to a port that declares HTTP. The declaration is a hint: bytes that disagree with it go by
/// what they are, and those that are undecided by the hint.
pub(super) async fn serve_declared(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    hint: Protocol,
    mut stream: TcpStream,
) -> Result<(), Failure> {
    let mut buffer = BytesMut::new();
    // In a box, which is gone when the connection is served.
    let protocol = match Box::pin(listen(&mut stream, &mut buffer, Some(UNDECIDED))).await? {
        Words::Known(protocol) => protocol,
        // What is too slow for a decision is not what it cannot be any more.
        Words::Undecided if hint == Protocol::Http2 && !PREFACE.starts_with(&buffer) => Protocol::Http1,
        Words::Undecided => hint,
    };
    speak(worker, port, protocol, stream, buffer).await
}

/// Serves a connection to a port that declares nothing.
pub(super) async fn serve(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    mut stream: TcpStream,
) -> Result<(), Failure> {
    let mut buffer = BytesMut::new();
    let grace = match port.learned.get() {
        Learned::ServerFirst => Duration::ZERO,
        Learned::Nothing => SILENT,
        Learned::ClientFirst => LATE,
    };
    match Box::pin(timeout(grace, listen(&mut stream, &mut buffer, Some(UNDECIDED)))).await {
        Ok(words) => match words? {
            Words::Known(protocol) => {
                teach(port, Learned::ClientFirst);
                speak(worker, port, protocol, stream, buffer).await
            }
            Words::Undecided => undecided(worker, port, stream, buffer, true).await,
        },
        // Rare beside clients that speak at once: not a part of every connection's future.
        Err(_) => undecided(worker, port, stream, buffer, false).await,
    }
}

/// Takes over what a connection has taught; what contradicts an earlier one leaves nothing known.
fn teach(port: &Port, learned: Learned) {
    let contradicted = matches!(
        (port.learned.get(), learned),
        (Learned::ServerFirst, Learned::ClientFirst) | (Learned::ClientFirst, Learned::ServerFirst)
    );
    port.learned.set(if contradicted { Learned::Nothing } else { learned });
}

/// What is left of a race, to be served when everything that it has taken is gone.
pub(super) enum Winner {
    /// The client, which speaks this.
    Client(Protocol, TcpStream, BytesMut),
    /// The same for HTTP/1 and a connection to an endpoint that is open already.
    Request(TcpStream, BytesMut, Box<Opened>),
    /// Nobody, and the content is opaque: on what was opened, if anything was.
    Opaque(Box<(Result<Opened, Unopened>, Reader, Writer)>),
    /// Nobody yet: a connection is open to an endpoint, and both are silent. From [`decide`]: and it is opaque.
    Silent(Box<Opened>, TcpStream, BytesMut),
    /// The client may still say what it wants; no endpoint took the connection.
    Unopened(Unopened, TcpStream, BytesMut),
}

/// Serves a client that is silent, or (`spoke`) whose bytes say nothing and have waited for long enough. Each stage has
/// a future of its own, which is gone when the next one begins: such a connection may stay idle for hours.
async fn undecided(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    stream: TcpStream,
    buffer: BytesMut,
    spoke: bool,
) -> Result<(), Failure> {
    // Whose turn it is takes the connection also if it turns out to be HTTP, of which each request has a way of its own.
    let way = match port.plan(worker) {
        Some(plan) => plan.connection(Connection::Other),
        None => Err(Failure::UpstreamNone),
    };
    let way = way.inspect_err(|_| reset_on_close(&stream))?;
    let mut winner = Box::pin(race(worker, port, &way.backend, stream, buffer, spoke)).await?;
    if let Winner::Silent(opened, stream, buffer) = winner {
        winner = Box::pin(decide(port, opened, stream, buffer)).await?;
    }
    match winner {
        Winner::Client(protocol, stream, buffer) => speak(worker, port, protocol, stream, buffer).await,
        Winner::Request(stream, buffer, opened) => {
            Box::pin(http::serve_http1(worker, port, stream, buffer, Some(opened))).await
        }
        Winner::Opaque(all) => {
            let (opened, reader, writer) = unboxed(all);
            Box::pin(opaque::carry(worker, &way, opened, reader, writer)).await
        }
        Winner::Silent(opened, stream, buffer) => {
            let (reader, writer) = split(stream, buffer);
            Box::pin(opaque::carry(worker, &way, Ok(unboxed(opened)), reader, writer)).await
        }
        Winner::Unopened(why, stream, buffer) => {
            Box::pin(await_request(worker, port, &way, why, stream, buffer)).await
        }
    }
}

/// Gives the box's memory back at once: one that is moved out of keeps it to the end of its scope.
#[expect(clippy::boxed_local, reason = "to take it out of its box is what this is for")]
fn unboxed<T>(it: Box<T>) -> T {
    *it
}

/// A silent client against the endpoint that is opened for it. `spoke`: it is not silent, but its bytes have waited for
/// long enough.
async fn race(
    worker: &Worker,
    port: &Port,
    backend: &Rc<Backend>,
    mut stream: TcpStream,
    mut buffer: BytesMut,
    spoke: bool,
) -> Result<Winner, Failure> {
    let left = Notify::new();
    let opened = {
        let mut opening = pin!(opaque::open(worker, backend, left.notified()));
        tokio::select! {
            biased;
            // While nothing is open no byte is held back by reading on.
            words = listen(&mut stream, &mut buffer, None) => match words? {
                Words::Known(protocol @ (Protocol::Http1 | Protocol::Http2)) => {
                    teach(port, Learned::ClientFirst);
                    return Ok(Winner::Client(protocol, stream, buffer));
                }
                _ => {
                    let all = opaque::await_open(opening.as_mut(), &left, stream, buffer).await;
                    return Ok(Winner::Opaque(Box::new(all)));
                }
            },
            opened = opening.as_mut() => opened,
        }
    };
    Ok(match opened {
        Ok(opened) if spoke => {
            let (reader, writer) = split(stream, buffer);
            Winner::Opaque(Box::new((Ok(opened), reader, writer)))
        }
        Ok(opened) => Winner::Silent(Box::new(opened), stream, buffer),
        Err(why) => Winner::Unopened(why, stream, buffer),
    })
}

/// Whoever speaks first decides.
pub(super) async fn decide(
    port: &Port,
    mut opened: Box<Opened>,
    mut stream: TcpStream,
    mut buffer: BytesMut,
) -> Result<Winner, Failure> {
    let mut words = tokio::select! {
        biased;
        words = listen(&mut stream, &mut buffer, Some(UNDECIDED)) => {
            Some(words.inspect_err(|_| opened.break_off())?)
        }
        () = opened.answered() => None,
    };
    if words.is_none() {
        let patience = match opened.greeting() {
            Greeting::Opaque => {
                teach(port, Learned::ServerFirst);
                None
            }
            Greeting::None => (port.learned.get() != Learned::ServerFirst).then_some(PATIENCE),
            Greeting::Settings => Some(UNANSWERED_SETTINGS),
        };
        if let Some(patience) = patience {
            let listening = listen(&mut stream, &mut buffer, Some(UNDECIDED));
            let heard = timeout(patience, listening).await.ok().transpose();
            words = heard.inspect_err(|_| opened.break_off())?;
        }
    }
    if let Some(Words::Known(protocol)) = words {
        teach(port, Learned::ClientFirst);
        match protocol {
            Protocol::Http1 => return Ok(Winner::Request(stream, buffer, opened)),
            Protocol::Http2 => return Ok(Winner::Client(protocol, stream, buffer)),
            Protocol::Opaque | Protocol::Detect => {}
        }
    }
    Ok(Winner::Silent(opened, stream, buffer))
}

/// No endpoint took the connection as it is, but a client that turns out to speak HTTP can be told why, and may
/// be allowed what an unknown protocol is not.
async fn await_request(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    way: &RouteTarget,
    Unopened { failure, is_meshed }: Unopened,
    mut stream: TcpStream,
    mut buffer: BytesMut,
) -> Result<(), Failure> {
    // A client that waits for the server to speak is not kept waiting in vain.
    let goes_elsewhere = || {
        port.learned.get() != Learned::ServerFirst
            && port.plan(worker).is_some_and(|plan| plan.is_by_request())
    };
    let hopes = failure == Failure::PolicyDenied || goes_elsewhere();
    let patience = if hopes { LONG_PATIENCE } else { PATIENCE };
    match timeout(patience, listen(&mut stream, &mut buffer, None)).await {
        Ok(Ok(Words::Known(protocol @ (Protocol::Http1 | Protocol::Http2)))) => {
            teach(port, Learned::ClientFirst);
            speak(worker, port, protocol, stream, buffer).await
        }
        _ => {
            reset_on_close(&stream);
            opaque::count_unopened(worker, way, &failure, is_meshed);
            Err(failure)
        }
    }
}
