//! Whole requests and connections over loopback, and the evidence that they leave.

mod connecting;
mod copies;
mod evidence;
mod http2_clients;
mod passing;
mod silent;

use std::cell::Cell;
use std::sync::Arc;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::AttemptCounts;

use super::*;
use crate::config::traffic::{Breaker, Traffic};
use crate::config::{CanaryRef, ConfigStore, Endpoint, Endpoints, Route, ServiceRoute};
use crate::http1::conn::split;
use crate::route::Learned;
use crate::settings::Settings;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
const KEPT: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const REFUSED: &[u8] = b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";
const POST: &[u8] = b"POST / HTTP/1.1\r\nhost: web\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}";
const PATIENCE: Duration = Duration::from_secs(5);

/// What a server does with a connection once it has read from it.
#[derive(Clone, Copy, Debug)]
enum Server {
    Answers,
    Closes,
    Resets,
    /// Resets without having read.
    Unread,
    /// Answers the first request of a connection, and closes when the second one comes.
    ClosesKept,
    /// The same, with a reset before it has read the second one.
    ResetsKept,
    /// Answers as soon as it has read something, and then reads on.
    Refuses,
    /// Speaks first.
    Greets,
    /// Sends its settings, as an HTTP/2 server does, and then back what it has read.
    Settings,
    /// Nobody listens.
    Gone,
}

/// A server, and how many connections it has accepted.
async fn server(server: Server) -> (SocketAddr, Rc<Cell<usize>>) {
    let accepted = Rc::new(Cell::new(0));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    if matches!(server, Server::Gone) {
        return (address, accepted);
    }
    let counter = Rc::clone(&accepted);
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            counter.set(counter.get() + 1);
            spawn_local(behave(server, stream));
        }
    });
    (address, accepted)
}

async fn behave(server: Server, mut stream: TcpStream) {
    let reset = |stream: &TcpStream| SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    let mut room = [0; 1024];
    match server {
        Server::Greets => drop(stream.write_all(b"220 mail\r\n").await),
        Server::Settings => drop(stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await),
        Server::Unread => {
            let _ = stream.readable().await;
            return reset(&stream);
        }
        _ => {}
    }
    let read = stream.read(&mut room).await.unwrap_or(0);
    match server {
        Server::Answers => drop(stream.write_all(OK).await),
        Server::Refuses => {
            let _ = stream.write_all(REFUSED).await;
            while matches!(stream.read(&mut room).await, Ok(1..)) {}
        }
        Server::Resets => reset(&stream),
        Server::ClosesKept | Server::ResetsKept => {
            let _ = stream.write_all(KEPT).await;
            let _ = stream.readable().await;
            match server {
                Server::ResetsKept => reset(&stream),
                _ => drop(stream.read(&mut room).await),
            }
        }
        Server::Greets | Server::Settings => {
            let _ = stream.write_all(room.get(..read).unwrap_or(&[])).await;
        }
        Server::Closes | Server::Unread | Server::Gone => {}
    }
}

fn endpoint(address: SocketAddr, revision: &str, terminating: bool) -> Endpoint {
    let (revision, pod_uid) = (revision.into(), format!("{revision}-pod").into());
    Endpoint { revision, terminating, pod_uid, ..Endpoint::at(address) }
}

/// A worker, and its port of a Service with a Canary that sends nearly everything to `new`.
async fn port_to(endpoints: Vec<Endpoint>) -> (Rc<Worker>, Rc<Port>) {
    let split = vec![("old".into(), 1), ("new".into(), 999)];
    port_of(Endpoints { endpoints, split, ..Endpoints::default() }).await
}

/// A worker, and its port of a Service with a Canary.
async fn port_of(endpoints: Endpoints) -> (Rc<Worker>, Rc<Port>) {
    let settings = Settings::of_test_pod("client");
    let dialled = SocketAddr::from(([10, 96, 0, 1], 80));
    let (config, _wanted) = ConfigStore::new();
    config.resolve(dialled).await;
    let name: Arc<str> = "shop/web:80".into();
    let service = ServiceRoute {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        port: 80,
        endpoints: Arc::clone(&name),
        ..ServiceRoute::default()
    };
    config.set_route(dialled, Route::Service(service));
    let canary = Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 3 });
    config.set_endpoints(&name, Endpoints { canary, ..endpoints });
    let worker = Worker::new(
        Arc::new(settings),
        config,
        Arc::default(),
        Arc::default(),
        Arc::default(),
        Arc::default(),
    );
    let port = worker.port(dialled).await;
    (worker, port)
}

/// A worker, and its port of a Service with one endpoint.
async fn port_to_one(address: SocketAddr) -> (Rc<Worker>, Rc<Port>) {
    port_to(vec![endpoint(address, "new", false)]).await
}

/// A connection of the application, and the sidecar's end of it.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

/// Sends this as one request of a connection that is known to speak HTTP/1, and reads to the end.
async fn ask(worker: &Rc<Worker>, port: &Rc<Port>, request: &[u8]) -> String {
    let (mut client, accepted) = connection().await;
    let served = speak(worker, port, Protocol::Http1, accepted, BytesMut::new());
    let asked = async {
        client.write_all(request).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        answer
    };
    tokio::join!(served, asked).1
}

fn evidence(worker: &Worker, revision: &str) -> AttemptCounts {
    let all = worker.telemetry.attempts.take();
    all.into_iter().find(|counts| counts.revision == revision).unwrap_or_default()
}

#[tokio::test]
async fn a_connection_takes_little_memory_while_it_is_idle() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Answers).await.0).await;
        let (_client, stream) = connection().await;
        let task = serve(Rc::clone(&worker), stream);
        assert!(size_of_val(&task) <= 1024, "{} bytes", size_of_val(&task));
        let (_client, stream) = connection().await;
        let waiting = http::serve_http1(&worker, &port, stream, BytesMut::new(), None);
        assert!(size_of_val(&waiting) <= 1024, "{} bytes", size_of_val(&waiting));
        let way = Rc::clone(&port.plan(&worker).unwrap().default);
        let (_client, stream) = connection().await;
        let (reader, writer) = split(stream, BytesMut::new());
        let unopened = opaque::Unopened { failure: Failure::UpstreamNone, is_meshed: false };
        let carried = opaque::carry(&worker, &way, Err(unopened), reader, writer);
        assert!(size_of_val(&carried) <= 3 * 1024, "{} bytes", size_of_val(&carried));
        let (_client, stream) = connection().await;
        let opened = opaque::open(&worker, &way.backend, pending()).await.unwrap();
        let silent = race::decide(&port, Box::new(opened), stream, BytesMut::new());
        assert!(size_of_val(&silent) <= 1024, "{} bytes", size_of_val(&silent));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn what_no_endpoint_of_a_mesh_has_served_is_counted_with_what_they_serve() {
    let test = async {
        let identity = Some(WorkloadId::new("cluster.local", "shop", "web"));
        let gone = server(Server::Gone).await.0;
        let meshed = |identity| vec![Endpoint { identity, ..endpoint(gone, "new", false) }];
        for (identity, is_meshed) in [(identity, true), (None, false)] {
            let (worker, port) = port_to(meshed(identity)).await;
            let way = Rc::clone(&port.plan(&worker).unwrap().default);
            assert_eq!(way.backend.is_meshed(), is_meshed);
            opaque::count_unopened(&worker, &way, &Failure::UpstreamNone, way.backend.is_meshed());
            let all: Vec<_> =
                worker.telemetry.all().into_iter().map(|(key, _)| (key.peer, key.mtls)).collect();
            assert_eq!(all, [("web".to_owned(), is_meshed)]);
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_attempt_that_another_endpoint_saved_is_evidence_against_the_first() {
    let test = async {
        let (good, bad) = (server(Server::Answers).await.0, server(Server::Closes).await.0);
        let (worker, port) = port_to(vec![endpoint(good, "old", false), endpoint(bad, "new", false)]).await;
        for _ in 0..20 {
            let answer = ask(&worker, &port, REQUEST).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
        let mut all = worker.telemetry.attempts.take();
        all.sort_by(|a, b| a.revision.cmp(&b.revision));
        let [new, old] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!((&*new.canary, new.epoch, &*new.pod_uid), ("web", 3, "new-pod"));
        assert!(new.attempts > 0);
        assert_eq!((new.failures, new.unreached), (new.attempts, 0));
        assert_eq!((old.attempts, old.failures, old.client_errors), (20, 0, 0));
        assert_eq!(old.buckets.chunks(2).map(|pair| pair[1]).sum::<u64>(), 20);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_endpoint_that_cannot_be_reached_fails_unless_it_is_known_to_end() {
    let test = async {
        for (terminating, expected) in [(false, (1, 1, 1)), (true, (0, 0, 0))] {
            let gone = server(Server::Gone).await.0;
            let (worker, port) = port_to(vec![endpoint(gone, "new", terminating)]).await;
            let answer = ask(&worker, &port, REQUEST).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
            let seen = evidence(&worker, "new");
            assert_eq!((seen.attempts, seen.failures, seen.unreached), expected);
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn the_only_endpoint_is_tried_again_where_that_cannot_do_harm() {
    // How the server ends, the request, its status, and attempts at the request.
    let table = [
        (Server::Closes, REQUEST, "502", 1),
        (Server::Closes, POST, "502", 1),
        (Server::Unread, REQUEST, "502", 3),
        // A reset does not prove that it was not carried out.
        (Server::Unread, POST, "502", 1),
        (Server::Gone, POST, "503", 1),
    ];
    let test = async {
        for (kind, request, status, attempts) in table {
            let (worker, port) = port_to_one(server(kind).await.0).await;
            let answer = ask(&worker, &port, request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{kind:?}: {answer}");
            assert_eq!(evidence(&worker, "new").attempts, attempts, "{kind:?}: {answer}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_kept_connection_that_the_server_closes_costs_no_request_that_may_be_repeated() {
    let table = [
        (Server::ClosesKept, REQUEST, "200"),
        // The application may have carried it out.
        (Server::ClosesKept, POST, "502"),
        (Server::ResetsKept, REQUEST, "200"),
        (Server::ResetsKept, POST, "502"),
    ];
    let test = async {
        for (kind, request, status) in table {
            let (address, accepted) = server(kind).await;
            let (worker, port) = port_to_one(address).await;
            let first = ask(&worker, &port, REQUEST).await;
            assert!(first.starts_with("HTTP/1.1 200 "), "{kind:?}: {first}");
            let second = ask(&worker, &port, request).await;
            assert!(second.starts_with(&format!("HTTP/1.1 {status} ")), "{kind:?}: {second}");
            assert_eq!(accepted.get(), if status == "200" { 2 } else { 1 }, "{kind:?}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn kept_connections_of_all_endpoints_may_be_closed_and_the_last_one_is_asked_anew() {
    let test = async {
        let (a, b) = (server(Server::ClosesKept).await.0, server(Server::ClosesKept).await.0);
        let (worker, port) = port_to(vec![endpoint(a, "new", false), endpoint(b, "new", false)]).await;
        for request in 0..12 {
            let answer = ask(&worker, &port, REQUEST).await;
            assert!(answer.starts_with("HTTP/1.1 200 "), "request {request}: {answer}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_opaque_connection_is_one_attempt() {
    let table = [
        (Server::Answers, (1, 0, 0)),
        // Its client stays, and gets no answer.
        (Server::Closes, (1, 1, 0)),
        (Server::Resets, (1, 1, 0)),
        (Server::Gone, (1, 1, 1)),
    ];
    let test = async {
        for (kind, expected) in table {
            let (worker, port) = port_to_one(server(kind).await.0).await;
            let (mut client, accepted) = connection().await;
            let served = speak(&worker, &port, Protocol::Opaque, accepted, BytesMut::new());
            let used = async move {
                let _ = client.write_all(b"x").await;
                let _ = client.read_to_end(&mut Vec::new()).await;
            };
            let _ = tokio::join!(served, used);
            let seen = evidence(&worker, "new");
            assert_eq!((seen.attempts, seen.failures, seen.unreached), expected);
            assert!(seen.buckets.is_empty());
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_endpoint_that_takes_no_opaque_connection_is_ejected_as_one_that_takes_no_request() {
    let test = async {
        let (good, gone) = (server(Server::Answers).await.0, server(Server::Gone).await.0);
        let (worker, port) = port_to(vec![endpoint(gone, "new", false), endpoint(good, "new", false)]).await;
        let eject_for = Duration::from_secs(60);
        let breaker = Breaker { consecutive_failures: Some(1), eject_for, max_ejected_percent: 50 };
        let service = ServiceRoute {
            namespace: "shop".to_owned(),
            name: "web".to_owned(),
            port: 80,
            endpoints: "shop/web:80".into(),
            traffic: Arc::new(Traffic { breaker: Some(breaker), ..Traffic::default() }),
            ..ServiceRoute::default()
        };
        worker.config.set_route(port.address(), Route::Service(service));
        let backend = Rc::clone(&port.plan(&worker).unwrap().default.backend);
        // Which of them comes first is chance.
        for _ in 0..100 {
            assert!(opaque::open(&worker, &backend, pending()).await.is_ok());
        }
        let ejections: Vec<_> =
            worker.telemetry.events().into_iter().filter(|((kind, _), _)| *kind == "breaker").collect();
        assert_eq!(ejections, [(("breaker", "Ejected"), 1)]);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn opaque_failures_are_counted() {
    let test = async {
        for (kind, reason) in [(Server::Gone, "UpstreamConnect"), (Server::Resets, "UpstreamReset")] {
            let (worker, port) = port_to_one(server(kind).await.0).await;
            let (mut client, accepted) = connection().await;
            let served = speak(&worker, &port, Protocol::Opaque, accepted, BytesMut::new());
            let used = async move {
                let _ = client.write_all(b"x").await;
                let _ = client.read_to_end(&mut Vec::new()).await;
            };
            let _ = tokio::join!(served, used);
            let failures: Vec<_> =
                worker.telemetry.all().iter().flat_map(|(_, series)| series.failures()).collect();
            assert_eq!(failures, [(reason, 1)], "{kind:?}");
        }
    };
    LocalSet::new().run_until(test).await;
}

/// What a client gets that sends each piece after its pause, and how long the last byte took after the last piece.
async fn converse(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    pieces: &[(u64, &[u8])],
    until: &[u8],
) -> (String, Duration) {
    let (mut client, accepted) = connection().await;
    let (worker, port) = (Rc::clone(worker), Rc::clone(port));
    let served = spawn_local(async move { race::serve(&worker, &port, accepted).await });
    for (pause_ms, piece) in pieces {
        sleep(Duration::from_millis(*pause_ms)).await;
        client.write_all(piece).await.unwrap();
    }
    let since = Instant::now();
    let mut seen = Vec::new();
    let reading =
        async { while !seen.ends_with(until) && client.read_buf(&mut seen).await.unwrap_or(0) > 0 {} };
    timeout(PATIENCE, reading).await.expect("it never came");
    let took = since.elapsed();
    drop(client);
    served.abort();
    (String::from_utf8_lossy(&seen).into_owned(), took)
}

#[tokio::test]
async fn undecided_bytes_are_forwarded_after_a_moment_and_teach_nothing() {
    let test = async {
        for bytes in [&b"HZC"[..], b"GET", b"GET hello\r\n", b"KEYS *\r\n"] {
            let (worker, port) = port_to_one(server(Server::Settings).await.0).await;
            let (seen, took) = converse(&worker, &port, &[(0, bytes)], bytes).await;
            assert!(seen.ends_with(&*String::from_utf8_lossy(bytes)), "{seen:?}");
            assert!(took < Duration::from_millis(500), "{bytes:?} took {took:?}");
            if bytes.len() == 3 {
                assert_eq!(port.learned.get(), Learned::Nothing, "{bytes:?}");
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard_and_a_client_that_does_contradicts_it() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Greets).await.0).await;
        let (seen, took) = converse(&worker, &port, &[], b"220 mail\r\n").await;
        assert_eq!(seen, "220 mail\r\n");
        assert!(took < Duration::from_millis(500), "{took:?}");
        assert_eq!(port.learned.get(), Learned::ServerFirst);
        let (mut client, accepted) = connection().await;
        client.write_all(REQUEST).await.unwrap();
        // The request is there before the connection is looked at.
        sleep(Duration::from_millis(5)).await;
        let _ = timeout(PATIENCE, race::serve(&worker, &port, accepted)).await;
        assert_ne!(port.learned.get(), Learned::ServerFirst);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_silent_client_that_then_speaks_http_uses_the_connection_that_was_opened_for_it() {
    let test = async {
        let (address, accepted) = server(Server::Answers).await;
        let (worker, port) = port_to_one(address).await;
        let (seen, _) = converse(&worker, &port, &[(60, REQUEST)], b"ok").await;
        assert!(seen.starts_with("HTTP/1.1 200 "), "{seen}");
        assert_eq!(accepted.get(), 1, "connections to the server");
        assert_eq!(port.learned.get(), Learned::ClientFirst);
        assert_eq!(evidence(&worker, "new").attempts, 1);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn settings_of_an_http_2_server_are_not_a_greeting() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Settings).await.0).await;
        // The client of an opaque protocol sees them in the end.
        let (seen, _) = converse(&worker, &port, &[], b"\0\0\0\x04\0\0\0\0\0").await;
        assert_eq!(seen.len(), 9);
        assert_eq!(port.learned.get(), Learned::Nothing);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn bytes_that_disagree_with_a_declaration_go_by_what_they_are() {
    let test = async {
        for (hint, bytes, expected) in [
            (Protocol::Http2, REQUEST, "HTTP/1.1 200 OK"),
            (Protocol::Http1, b"*1\r\n$4\r\nPING\r\n", "HTTP/1.1 200 OK"),
        ] {
            let (worker, port) = port_to_one(server(Server::Answers).await.0).await;
            let (mut client, accepted) = connection().await;
            let served = race::serve_declared(&worker, &port, hint, accepted);
            let asked = async move {
                client.write_all(bytes).await.unwrap();
                let mut answer = String::new();
                client.read_to_string(&mut answer).await.unwrap();
                answer
            };
            let (_, answer) = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.unwrap();
            assert!(answer.starts_with(expected), "{hint:?}: {answer}");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_answer_that_comes_early_reaches_a_client_that_sends_everything_before_it_reads() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Refuses).await.0).await;
        let (mut client, accepted) = connection().await;
        let served = speak(&worker, &port, Protocol::Http1, accepted, BytesMut::new());
        let asked = async move {
            let head = b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 9000000\r\n\r\n";
            client.write_all(head).await.unwrap();
            for _ in 0..100 {
                client.write_all(&vec![b'x'; 64 * 1024]).await.unwrap();
            }
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let (_, answer) = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 413 ") && answer.ends_with("no"), "{answer}");
        assert!(answer.contains("Connection: close\r\n"), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_an_endpoint_was_reached_is_evidence() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Answers).await.0).await;
        let backend = Rc::clone(&port.plan(&worker).unwrap().default.backend);
        let opened = opaque::open(&worker, &backend, std::future::ready(())).await;
        assert_eq!(opened.err().map(Failure::from), Some(Failure::ClientGaveUp));
        let seen = evidence(&worker, "new");
        assert_eq!((seen.attempts, seen.unreached), (1, 1));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_slow_request_line_is_not_taken_for_http_2_because_the_port_declares_it() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Answers).await.0).await;
        let (mut client, accepted) = connection().await;
        let served = race::serve_declared(&worker, &port, Protocol::Http2, accepted);
        let asked = async move {
            client.write_all(&REQUEST[..8]).await.unwrap();
            sleep(Duration::from_millis(40)).await;
            client.write_all(&REQUEST[8..]).await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let (_, answer) = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_idle_connection_takes_little_memory() {
    let (worker, port) = port_to(vec![]).await;
    let ((near, far), (other, _)) = (connection().await, connection().await);
    let sizes = [
        size_of_val(&super::serve_to(Rc::clone(&worker), near, SocketAddr::from(([10, 0, 0, 1], 1)))),
        size_of_val(&super::http::serve_http1(&worker, &port, far, BytesMut::new(), None)),
        size_of_val(&super::race::serve(&worker, &port, other)),
    ];
    assert!(sizes.iter().all(|size| *size <= 1792), "{sizes:?}");
}
