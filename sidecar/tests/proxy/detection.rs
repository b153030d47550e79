//! What is spoken on a port that declares nothing. No guess holds bytes back for good, and none costs the application
//! a connection of its own: it takes exactly one for each of its clients'.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::unbounded_channel;
use tokio::time::sleep;

use crate::harness::http2::{self, Client};
use crate::harness::script::{Ending, Script};
use crate::harness::{Application, Cluster, Outcome, Pod, http1, within};

/// A client that says nothing for this long is silent.
const PAUSE: Duration = Duration::from_millis(100);

/// Pieces that a client sends one after the other, each when the one before it has come back.
type Words = &'static [&'static [u8]];

/// Content that is not HTTP, as far as can be known when its beginning is passed on. `true`: its client is silent at
/// first.
const OPAQUE: &[(&str, bool, Words)] = &[
    ("Hazelcast", false, &[b"HZC"]),
    ("Redis, inline", false, &[b"GET hello\r\n"]),
    ("Redis, inline, without a key", false, &[b"KEYS *\r\n"]),
    ("Redis", false, &[b"*1\r\n$4\r\nPING\r\n", b"*1\r\n$4\r\nPING\r\n"]),
    ("one letter at a time", false, &[b"G", b"E", b"T"]),
    ("a client that thinks first", true, &[b"hello"]),
    ("the application's own TLS", false, &[b"\x16\x03\x01\x00\x04\x01\x00\x00\x00"]),
    ("half the preface of HTTP/2, and something else", false, &[b"PRI * HT", b"something"]),
    ("half a request line, and the rest later", false, &[b"GET / HTTP", b"/1.1\r\nhost: shop\r\n\r\n"]),
    ("a source of Icecast", false, &[b"SOURCE /live HTTP/1.0\r\n\r\n", b"\xff\xfb\x90"]),
    ("zeroes", false, &[b"\0\0\0\0\0\0\0\0"]),
];

/// How an application is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// From the client's sidecar to the application itself.
    ToPlain,
    /// From sidecar to sidecar.
    Meshed,
    /// From a client without a sidecar to a sidecar.
    FromPlain,
}

const WAYS: [Way; 3] = [Way::ToPlain, Way::Meshed, Way::FromPlain];

struct Place {
    cluster: Cluster,
    plain: Pod,
    meshed: Pod,
}

/// An application that is reached in one of the ways.
struct Reached<'a> {
    place: &'a Place,
    way: Way,
    application: Application,
    service: SocketAddr,
}

impl Place {
    async fn new() -> Self {
        let cluster = Cluster::start().await;
        let (plain, meshed) = (cluster.pod(false).await, cluster.pod(true).await);
        Self { cluster, plain, meshed }
    }

    async fn reach<F>(&self, way: Way, serve: impl Fn(TcpStream) -> F + Send + 'static) -> Reached<'_>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let pod = if way == Way::ToPlain { &self.plain } else { &self.meshed };
        let application = Application::start(pod, serve);
        let service = self.cluster.service(None, &[&application.port]).await;
        Reached { place: self, way, application, service }
    }
}

impl Reached<'_> {
    async fn dial(&self) -> TcpStream {
        if self.way == Way::FromPlain {
            return TcpStream::connect(self.application.port.address).await.unwrap();
        }
        self.place.cluster.client.dial(self.service).await
    }

    /// A connection on which this is said and comes back.
    async fn echo(&self, (name, silent, words): (&str, bool, Words)) -> TcpStream {
        let mut stream = self.dial().await;
        if silent {
            sleep(PAUSE).await;
        }
        for piece in words {
            stream.write_all(piece).await.unwrap();
            hear(&mut stream, piece, name).await;
        }
        stream
    }
}

/// Greets its client, if that is what it does, and sends everything back.
async fn echo(mut stream: TcpStream, greeting: &'static [u8]) {
    if stream.write_all(greeting).await.is_err() {
        return;
    }
    let mut bytes = [0; 1024];
    while let Ok(read @ 1..) = stream.read(&mut bytes).await {
        if stream.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}

async fn hear(stream: &mut TcpStream, expected: &[u8], what: &str) {
    let mut heard = vec![0; expected.len()];
    within(stream.read_exact(&mut heard)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(heard, expected, "{what}");
}

#[tokio::test]
async fn what_is_not_http_is_passed_on_at_once_on_one_connection() {
    let place = &Place::new().await;
    let all = WAYS.iter().flat_map(|way| OPAQUE.iter().map(move |words| (*way, *words)));
    let running = all.map(|(way, words)| async move {
        let reached = place.reach(way, |stream| echo(stream, b"")).await;
        // What the first has taught must not hold up the second.
        for number in 1..=2 {
            let _stream = reached.echo(words).await;
            assert_eq!(reached.application.accepted(), number, "{}, {way:?}", words.0);
        }
    });
    join_all(running).await;
}

#[tokio::test]
async fn what_a_port_has_taught_is_dropped_when_a_client_contradicts_it() {
    let place = &Place::new().await;
    let running = WAYS.iter().map(|way| async move {
        let reached = place.reach(*way, |stream| echo(stream, b"")).await;
        for (number, words) in (1..).zip(OPAQUE.iter().chain(OPAQUE)) {
            let _stream = reached.echo(*words).await;
            assert_eq!(reached.application.accepted(), number, "{}, {way:?}", words.0);
        }
    });
    join_all(running).await;
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    const GREETING: &[u8] = b"220 shop ESMTP\r\n";
    let place = Place::new().await;
    for way in WAYS {
        let reached = place.reach(way, |stream| echo(stream, GREETING)).await;
        for number in 1..=3 {
            let mut stream = reached.dial().await;
            hear(&mut stream, GREETING, "the greeting").await;
            stream.write_all(b"EHLO shop\r\n").await.unwrap();
            hear(&mut stream, b"EHLO shop\r\n", "the answer").await;
            assert_eq!(reached.application.accepted(), number, "{way:?}");
        }
    }
}

/// Closes a connection with a reset.
fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
}

/// Linux reports a reset to whoever reads first, and a proper end to those who read after that.
#[tokio::test]
async fn a_server_that_resets_before_anybody_speaks_does_not_look_like_one_that_closes() {
    let place = Place::new().await;
    for way in WAYS {
        let reached = place.reach(way, |stream| async move { reset(stream) }).await;
        let declared = place.cluster.service(Some("tcp"), &[&reached.application.port]).await;
        for mut stream in [reached.dial().await, place.cluster.client.dial(declared).await] {
            let read = within(stream.read(&mut [0])).await;
            let kind = read.map_err(|error| error.kind());
            assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset), "{way:?}");
        }
    }
}

#[tokio::test]
async fn a_server_gets_the_bytes_before_a_reset_and_the_reset() {
    let place = Place::new().await;
    for way in WAYS {
        let (sender, mut seen) = unbounded_channel();
        let serve = move |mut stream: TcpStream| {
            let sender = sender.clone();
            async move {
                let mut bytes = Vec::new();
                let was_reset = stream.read_to_end(&mut bytes).await.is_err();
                let _ = sender.send((bytes, was_reset));
            }
        };
        let reached = place.reach(way, serve).await;
        let declared = place.cluster.service(Some("tcp"), &[&reached.application.port]).await;
        // The first are undecided, the others are not.
        for words in [&b"abc"[..], b"PING\r\n"] {
            for mut stream in [reached.dial().await, place.cluster.client.dial(declared).await] {
                stream.write_all(words).await.unwrap();
                reset(stream);
                let (bytes, was_reset) = within(seen.recv()).await.unwrap();
                assert_eq!((&bytes[..], was_reset), (words, true), "{way:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_request_uses_the_connection_that_was_opened_while_its_client_was_silent() {
    let place = Place::new().await;
    for way in WAYS {
        // It closes each connection after one request: what is kept would hide what is thrown away.
        let reached = place.reach(way, http1::answer_one).await;
        for (number, silent) in (1..).zip([false, true, true, false, true]) {
            let mut stream = reached.dial().await;
            if silent {
                sleep(PAUSE).await;
            }
            let outcome = within(http1::ask(&mut stream, http1::GET, || {})).await;
            assert_eq!(outcome, Outcome::Whole(200), "number {number}, {way:?}");
            assert_eq!(reached.application.accepted(), number, "{way:?}");
        }
    }
}

/// The server of frames sends its SETTINGS at once, as gRPC-Go does: that is not a greeting.
#[tokio::test]
async fn http2_is_spoken_also_by_clients_that_are_silent_at_first() {
    let place = Place::new().await;
    for way in WAYS {
        let script = Arc::new(Script::new(Ending::Answers, true));
        let serving = Arc::clone(&script);
        let reached = place.reach(way, move |stream| http2::serve(stream, Arc::clone(&serving))).await;
        script.arm();
        for (number, silent) in (1..).zip([false, true, true, false]) {
            let stream = reached.dial().await;
            if silent {
                sleep(PAUSE).await;
            }
            let client = Client::new(stream).await;
            for _ in 0..3 {
                let outcome = within(client.ask("POST", 10, || {})).await;
                assert_eq!(outcome, Outcome::Whole(200), "number {number}, {way:?}");
            }
            assert_eq!(script.whole(), number * 3, "{way:?}");
        }
    }
}

/// What a port declares is a hint: bytes that disagree with it go by what they are.
#[tokio::test]
async fn a_declaration_that_is_wrong_does_no_harm() {
    let Place { cluster, plain, meshed } = Place::new().await;
    for pod in [&plain, &meshed] {
        let web = Application::start(pod, http1::answer_all);
        let echoing = Application::start(pod, |stream| echo(stream, b""));
        for declared in ["kubernetes.io/h2c", "grpc", "http", "redis"] {
            let service = cluster.service(Some(declared), &[&web.port]).await;
            let mut stream = cluster.client.dial(service).await;
            let outcome = within(http1::ask(&mut stream, http1::GET, || {})).await;
            assert_eq!(outcome, Outcome::Whole(200), "{declared}, {}", pod.uid);
        }
        for declared in ["http", "grpc", "redis"] {
            let service = cluster.service(Some(declared), &[&echoing.port]).await;
            let mut stream = cluster.client.dial(service).await;
            stream.write_all(b"KEYS *\r\n").await.unwrap();
            hear(&mut stream, b"KEYS *\r\n", declared).await;
        }
        assert_eq!(echoing.accepted(), 3, "{}", pod.uid);
    }
}
