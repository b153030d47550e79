//! Whole connections over loopback: who reaches the application, and on how many connections.

use std::cell::Cell;
use std::future::poll_fn;
use std::net::IpAddr;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::policy::Access;
use tulle_mesh::proto;
use tulle_mesh::reason::Reason;
use tulle_mesh::wire::frame::Code;
use tulle_mesh::wire::head::{Fields, Protocol as Travels};

use super::*;
use crate::config::{ConfigStore, Inbound, InboundAccess, Mtls};
use crate::settings::{Settings, SourceAddress};
use crate::wire::{Connection, Event, Receiver, Role, Sender, drive};

mod limits;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: web\r\n\r\n";

fn worker(mtls: Mtls, access: Option<InboundAccess>, source_address: SourceAddress) -> Rc<Worker> {
    let settings = Settings {
        pod_name: "web".to_owned(),
        pod_namespace: "shop".to_owned(),
        pod_uid: "web".to_owned(),
        pod_ips: vec![IpAddr::from([127, 0, 0, 1])],
        trust_domain: "cluster.local".to_owned(),
        operator: String::new(),
        operator_addresses: Vec::new(),
        operator_identity: WorkloadId::new("cluster.local", "tulle", "operator"),
        token_file: String::new(),
        trust_file: String::new(),
        probes: Vec::new(),
        workers: 1,
        telemetry: true,
        source_address,
        features: Vec::new(),
    };
    let (config, _wanted) = ConfigStore::new();
    config.set_inbound(rules(mtls, access));
    Worker::new(Arc::new(settings), config, Arc::default(), Arc::default(), Arc::default(), Arc::default())
}

fn rules(mtls: Mtls, access: Option<InboundAccess>) -> Inbound {
    let revision = String::new();
    Inbound { mtls, access, shadow: None, shadow_strict: false, limits: None, revision }
}

fn permissive() -> Rc<Worker> {
    worker(Mtls::Permissive, None, SourceAddress::Sidecar)
}

/// A rule that needs HTTP: it denies one method, and everything whose method is not known.
fn no_deletes() -> Rc<Worker> {
    let to = vec![proto::Operation { methods: vec!["DELETE".into()], ..Default::default() }];
    let access = proto::Access { deny: vec![proto::Rule { from: vec![], to }], ..Default::default() };
    let access = InboundAccess::new(Access::compile(&access).unwrap(), "shop/a".to_owned());
    worker(Mtls::Permissive, Some(access), SourceAddress::Sidecar)
}

fn denials(worker: &Worker) -> u64 {
    let events = worker.telemetry.events();
    events.into_iter().filter(|((kind, _), _)| *kind == "policy_denied").map(|(_, count)| count).sum()
}

/// What an application does with a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum App {
    /// Answers requests, on one connection as long as its client wants.
    Http,
    /// Sends back what it gets, until its client has ended; then a last word.
    Echoes,
    /// Speaks first.
    Greets,
    /// Takes requests, and answers none.
    Silent,
    /// Answers with a head, and never with the body that it announces.
    Dawdles,
    /// The first request of a connection logs its client in, and the others are taken for that client's.
    Ntlm,
    /// Resets its first connection when it has read a request, and answers on others.
    ResetsFirst,
}

struct Application {
    address: SocketAddr,
    accepted: Rc<Cell<u32>>,
}

async fn application(app: App) -> Application {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepted = Rc::new(Cell::new(0));
    let count = Rc::clone(&accepted);
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.set(count.get() + 1);
            let app = if app == App::ResetsFirst && count.get() > 1 { App::Http } else { app };
            spawn_local(serve_one(app, stream));
        }
    });
    Application { address, accepted }
}

async fn serve_one(app: App, mut stream: TcpStream) {
    if app == App::Greets {
        let _ = stream.write_all(b"220 ready\r\n").await;
    }
    let mut room = vec![0; 4096];
    let mut logged_in = false;
    loop {
        let read = stream.read(&mut room).await.unwrap_or(0);
        if read == 0 {
            if app == App::Echoes {
                let _ = stream.write_all(b"bye").await;
            }
            return;
        }
        match app {
            App::Http => drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await),
            App::Echoes | App::Greets => drop(stream.write_all(&room[..read]).await),
            App::Ntlm if !std::mem::replace(&mut logged_in, true) => {
                let answer =
                    b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: NTLM\r\ncontent-length: 0\r\n\r\n";
                drop(stream.write_all(answer).await);
            }
            App::Ntlm => drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await),
            App::Dawdles => drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n").await),
            App::Silent => {}
            App::ResetsFirst => {
                let _ = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                return;
            }
        }
    }
}

/// A plain client of the application, through the sidecar.
async fn client(worker: &Rc<Worker>, app: SocketAddr) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (accepted, from) = listener.accept().await.unwrap();
    spawn_local(accept(Rc::clone(worker), accepted, Client::plain(from, app)));
    client
}

async fn read(client: &mut TcpStream) -> Vec<u8> {
    let mut room = vec![0; 4096];
    let read = timeout(Duration::from_secs(5), client.read(&mut room)).await.expect("nothing came");
    room.truncate(read.unwrap());
    room
}

/// Sends a request; the status of its answer.
async fn asks(client: &mut TcpStream) -> String {
    client.write_all(GET).await.unwrap();
    String::from_utf8_lossy(&read(client).await[9..12]).into_owned()
}

async fn local(test: impl Future<Output = ()>) {
    LocalSet::new().run_until(test).await;
}

const SOON: Duration = Duration::from_millis(60);

#[tokio::test]
async fn a_denied_client_does_not_reach_the_application() {
    local(async {
        for worker in [no_deletes(), worker(Mtls::Strict, None, SourceAddress::Sidecar)] {
            let app = application(App::Echoes).await;
            let mut silent = client(&worker, app.address).await;
            let mut speaks = client(&worker, app.address).await;
            sleep(SOON).await;
            assert_eq!(denials(&worker), 0, "nobody knows what they speak");
            silent.write_all(b"PING\r\n").await.unwrap();
            speaks.write_all(b"DELETE / HTTP/1.1\r\nhost: web\r\n\r\n").await.unwrap();
            let refused = timeout(Duration::from_secs(5), silent.read(&mut [0])).await.unwrap();
            assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
            let _ = timeout(Duration::from_secs(5), speaks.read(&mut [0; 12])).await.unwrap();
            assert_eq!((app.accepted.get(), denials(&worker)), (0, 2));
        }
    })
    .await;
}

#[tokio::test]
async fn a_silent_client_of_which_nothing_would_be_let_in_is_refused_and_counted_soon() {
    local(async {
        let worker = worker(Mtls::Strict, None, SourceAddress::Sidecar);
        let app = application(App::Greets).await;
        let mut silent = client(&worker, app.address).await;
        let refused = timeout(Duration::from_secs(5), silent.read(&mut [0])).await.expect("it waits");
        assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
        assert_eq!((app.accepted.get(), denials(&worker)), (0, 1));
        let counted = worker.telemetry.inbound_plain("", "opaque").failures();
        assert_eq!(counted, [(Failure::PolicyPlaintext.name(), 1)]);
    })
    .await;
}

#[tokio::test]
async fn a_denied_upload_is_answered_and_not_reset() {
    local(async {
        let (worker, app) = (no_deletes(), application(App::Http).await);
        let mut client = client(&worker, app.address).await;
        let size = 512 * 1024;
        let head = format!("DELETE / HTTP/1.1\r\nhost: web\r\ncontent-length: {size}\r\n\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&vec![0; size]).await.expect("it may send everything");
        // As clients do that read when they have sent.
        sleep(SOON).await;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.expect("not reset");
        assert!(answer.starts_with(b"HTTP/1.1 403"));
        assert_eq!(app.accepted.get(), 0);
    })
    .await;
}

#[tokio::test]
async fn a_late_request_that_is_allowed_is_no_denial() {
    local(async {
        let (worker, app) = (no_deletes(), application(App::Http).await);
        let mut client = client(&worker, app.address).await;
        sleep(SOON).await;
        client.write_all(b"GE").await.unwrap();
        sleep(SOON).await;
        client.write_all(&GET[2..]).await.unwrap();
        assert!(read(&mut client).await.starts_with(b"HTTP/1.1 200"));
        assert_eq!((app.accepted.get(), denials(&worker)), (1, 0));
    })
    .await;
}

#[tokio::test]
async fn a_silent_client_and_its_request_use_one_connection() {
    local(async {
        let (worker, app) = (permissive(), application(App::Http).await);
        let mut client = client(&worker, app.address).await;
        sleep(SOON).await;
        assert_eq!(app.accepted.get(), 1, "the application may be the one that speaks first");
        for _ in 0..3 {
            client.write_all(GET).await.unwrap();
            assert!(read(&mut client).await.starts_with(b"HTTP/1.1 200"));
        }
        assert_eq!(app.accepted.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn what_is_undecided_is_not_held_back() {
    local(async {
        let (worker, app) = (permissive(), application(App::Echoes).await);
        for words in
            [&b"HZC"[..], b"GET hello\r\n", b"KEYS *\r\n", b"*1\r\n$4\r\nPING\r\n", b"\x16\x03rubbish"]
        {
            let mut client = client(&worker, app.address).await;
            client.write_all(words).await.unwrap();
            assert_eq!(read(&mut client).await, words);
        }
    })
    .await;
}

#[tokio::test]
async fn an_application_that_speaks_first_is_heard() {
    local(async {
        let (worker, app) = (permissive(), application(App::Greets).await);
        let mut client = client(&worker, app.address).await;
        assert_eq!(read(&mut client).await, b"220 ready\r\n");
        client.write_all(b"EHLO\r\n").await.unwrap();
        assert_eq!(read(&mut client).await, b"EHLO\r\n");
        assert_eq!(app.accepted.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_has_ended_its_side_without_a_word_is_still_told_something() {
    local(async {
        let (worker, app) = (permissive(), application(App::Echoes).await);
        let mut client = client(&worker, app.address).await;
        client.shutdown().await.unwrap();
        assert_eq!(read(&mut client).await, b"bye");
    })
    .await;
}

#[tokio::test]
async fn a_new_deny_ends_the_connections_that_it_forbids() {
    local(async {
        let (worker, app) = (permissive(), application(App::Echoes).await);
        let mut client = client(&worker, app.address).await;
        client.write_all(b"hello\r\n").await.unwrap();
        assert_eq!(read(&mut client).await, b"hello\r\n");
        let strict = no_deletes().config.inbound().unwrap();
        let access = strict.access.clone();
        let mtls = Mtls::Permissive;
        let revision = String::new();
        worker.config.set_inbound(Inbound {
            mtls,
            access,
            shadow: None,
            shadow_strict: false,
            limits: None,
            revision,
        });
        let ended = timeout(Duration::from_secs(5), client.read(&mut [0])).await.expect("it goes on");
        assert!(ended.is_err(), "broken off, not ended: {ended:?}");
    })
    .await;
}

/// A mesh connection without TLS: what a peer opens, and the peer as its server sees it.
async fn mesh(worker: &Rc<Worker>, app: SocketAddr) -> Connection {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (ours, theirs) = (Connection::new(Role::Server), Connection::new(Role::Client));
    spawn_local(drive(theirs.clone(), near));
    spawn_local(drive(ours.clone(), far));
    let client = Client::plain(SocketAddr::from(([10, 1, 2, 3], 4444)), app);
    let client = client.with_identity(WorkloadId::new("cluster.local", "shop", "client"));
    let peer = Peer::new(Rc::clone(worker), client);
    spawn_local(async move {
        while let Some((head, sender, receiver)) = poll_fn(|cx| ours.poll_accept(cx)).await {
            let peer = Rc::clone(&peer);
            spawn_local(mesh::stream_of(peer, head, sender, receiver));
        }
    });
    theirs
}

fn open(connection: &Connection, protocol: Travels, head: &[u8]) -> (Sender, Receiver) {
    let mut block = BytesMut::new();
    Fields { protocol, ..Fields::default() }.encode(&mut block);
    block.extend_from_slice(head);
    connection.open(&block, protocol != Travels::Opaque).unwrap()
}

async fn next(receiver: &mut Receiver) -> Event {
    timeout(Duration::from_secs(5), receiver.next()).await.expect("nothing came")
}

#[tokio::test]
async fn another_sidecar_is_told_why_this_one_has_answered_and_of_the_applications_answers_nothing() {
    local(async {
        let nobody = proto::Access { has_allow: true, ..Default::default() };
        let nobody = InboundAccess::new(Access::compile(&nobody).unwrap(), "shop/nobody".to_owned());
        let refusing = worker(Mtls::Permissive, Some(nobody), SourceAddress::Sidecar);
        for (worker, is_told) in [(refusing, true), (permissive(), false)] {
            let app = application(App::Http).await;
            let peer = mesh(&worker, app.address).await;
            let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
            let Event::Head(mut block) = next(&mut receiver).await else { panic!("no answer") };
            let reason = Fields::decode(&mut block).unwrap().reason;
            assert_eq!(reason, is_told.then_some(Reason::PolicyDenied), "{block:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_application_breaks_off_is_told_with_the_answer_that_saves_the_request() {
    local(async {
        for (app, broken) in [(App::ResetsFirst, 1), (App::Http, 0)] {
            let (worker, app) = (permissive(), application(app).await);
            let peer = mesh(&worker, app.address).await;
            let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
            let Event::Head(mut block) = next(&mut receiver).await else { panic!("no answer") };
            assert_eq!(Fields::decode(&mut block).unwrap().broken, broken);
            assert!(block.starts_with(b"HTTP/1.1 200 "), "{block:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn an_opaque_stream_that_was_given_up_untouched_leaves_its_connection_for_the_request() {
    local(async {
        let (worker, app) = (permissive(), application(App::Http).await);
        let peer = mesh(&worker, app.address).await;
        let (sender, mut receiver) = open(&peer, Travels::Opaque, b"");
        assert!(matches!(next(&mut receiver).await, Event::Head(_)));
        drop((sender, receiver));
        sleep(SOON).await;
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        let Event::Head(head) = next(&mut receiver).await else { panic!("no answer") };
        assert!(head.windows(12).any(|part| part == b"HTTP/1.1 200"));
        assert_eq!(app.accepted.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn an_opaque_stream_carries_bytes_both_ways() {
    local(async {
        for (app, says) in [(App::Echoes, &b"hello"[..]), (App::Greets, b"220 ready\r\n")] {
            let (worker, app) = (permissive(), application(app).await);
            let peer = mesh(&worker, app.address).await;
            let (sender, mut receiver) = open(&peer, Travels::Opaque, b"");
            assert!(matches!(next(&mut receiver).await, Event::Head(_)));
            if says == b"hello" {
                sender.data(Bytes::from_static(b"hello")).await.unwrap();
            }
            assert_eq!(next(&mut receiver).await, Event::Data(Bytes::copy_from_slice(says)));
            sender.end();
            loop {
                match next(&mut receiver).await {
                    Event::Data(_) => {}
                    Event::End => break,
                    other => panic!("{other:?}"),
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_refused_opaque_stream_is_no_denial_once_its_client_sends_a_request_that_is_allowed() {
    local(async {
        let (worker, app) = (no_deletes(), application(App::Http).await);
        let peer = mesh(&worker, app.address).await;
        let (_sender, mut receiver) = open(&peer, Travels::Opaque, b"");
        assert_eq!(next(&mut receiver).await, Event::Reset(Code::Denied));
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        assert!(matches!(next(&mut receiver).await, Event::Head(_)));
        sleep(SOON).await;
        assert_eq!((app.accepted.get(), denials(&worker)), (1, 0));
        let (_sender, mut receiver) = open(&peer, Travels::Http1, b"DELETE / HTTP/1.1\r\nhost: web\r\n\r\n");
        let Event::Head(head) = next(&mut receiver).await else { panic!("no answer") };
        assert!(head.windows(12).any(|part| part == b"HTTP/1.1 403"));
        assert_eq!(denials(&worker), 1);
    })
    .await;
}

#[tokio::test]
async fn a_stream_that_is_reset_ends_its_task() {
    local(async {
        let (worker, app) = (permissive(), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let streams: Vec<_> = (0..20).map(|_| open(&peer, Travels::Http1, GET)).collect();
        sleep(SOON).await;
        assert_eq!(worker.load.get(), 20);
        drop(streams);
        sleep(SOON).await;
        assert_eq!(worker.load.get(), 0);
    })
    .await;
}

#[tokio::test]
async fn an_application_that_serves_one_connection_at_a_time_serves_all() {
    local(async {
        let worker = permissive();
        spawn_local(app::watch(Rc::clone(&worker)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                serve_one(App::Http, stream).await;
            }
        });
        let mut clients = Vec::new();
        for _ in 0..8 {
            let mut client = client(&worker, address).await;
            client.write_all(GET).await.unwrap();
            clients.push(client);
        }
        // Each would wait for as long as a kept connection is idle, one after the other.
        for client in &mut clients {
            assert!(read(client).await.starts_with(b"HTTP/1.1 200"));
        }
        sleep(SOON).await;
        assert!(worker.app_waiting.longest().is_none());
        // The application now waits on a connection that is kept, and does not accept the one that is opened for a
        // silent client.
        assert_eq!(asks(&mut clients[0]).await, "200");
        let mut silent = client(&worker, address).await;
        sleep(SOON).await;
        assert_eq!(asks(&mut silent).await, "200");
    })
    .await;
}

#[tokio::test]
async fn whoever_has_the_head_of_an_answer_does_not_wait_for_the_application_to_accept() {
    local(async {
        let (worker, app) = (permissive(), application(App::Dawdles).await);
        let mut client = client(&worker, app.address).await;
        client.write_all(GET).await.unwrap();
        sleep(SOON).await;
        assert_eq!((worker.load.get(), worker.app_waiting.longest()), (1, None));
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_has_logged_its_client_in_serves_nobody_else() {
    local(async {
        let (worker, app) = (permissive(), application(App::Ntlm).await);
        let mut first = client(&worker, app.address).await;
        assert_eq!(asks(&mut first).await, "401");
        assert_eq!(asks(&mut first).await, "200");
        assert_eq!(app.accepted.get(), 1, "its own connection");
        let mut second = client(&worker, app.address).await;
        assert_eq!(asks(&mut second).await, "401", "it has not logged in");
        assert_eq!(asks(&mut first).await, "200");
        assert_eq!(app.accepted.get(), 2);
        let peer = mesh(&worker, app.address).await;
        for connections in [3, 4] {
            let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
            assert!(matches!(next(&mut receiver).await, Event::Head(_)));
            sleep(SOON).await;
            assert_eq!(app.accepted.get(), connections, "its sidecar may speak for many");
        }
    })
    .await;
}

#[tokio::test]
async fn what_a_new_rule_forbids_is_broken_off_as_denied() {
    local(async {
        const DELETE: &[u8] = b"DELETE / HTTP/1.1\r\nhost: web\r\n\r\n";
        for (travels, head) in [(Travels::Http1, DELETE), (Travels::Opaque, b"")] {
            let (worker, app) = (permissive(), application(App::Silent).await);
            let peer = mesh(&worker, app.address).await;
            let (sender, mut receiver) = open(&peer, travels, head);
            if travels == Travels::Opaque {
                assert!(matches!(next(&mut receiver).await, Event::Head(_)));
                sender.data(Bytes::from_static(b"PING\r\n")).await.unwrap();
            }
            sleep(SOON).await;
            assert_eq!(app.accepted.get(), 1);
            let strict = no_deletes().config.inbound().unwrap();
            worker.config.set_inbound(rules(Mtls::Permissive, strict.access.clone()));
            assert_eq!(next(&mut receiver).await, Event::Reset(Code::Denied));
        }
    })
    .await;
}

#[tokio::test]
async fn the_application_sees_the_clients_address_where_that_is_asked_for() {
    let own = IpAddr::from([127, 0, 0, 1]);
    let other = IpAddr::from([10, 1, 2, 3]);
    let server = |source_address, ip: IpAddr| {
        let client = Client::plain(SocketAddr::new(ip, 4444), SocketAddr::from(([10, 1, 2, 4], 80)));
        app::server(&worker(Mtls::Permissive, None, source_address), &client).source
    };
    assert_eq!(server(SourceAddress::Sidecar, other), None);
    assert_eq!(server(SourceAddress::Preserve, other), Some(other));
    assert_eq!(server(SourceAddress::Preserve, own), None, "an own address");
    assert_eq!(server(SourceAddress::Preserve, IpAddr::from([127, 9, 9, 9])), None, "loopback");
    assert_eq!(server(SourceAddress::Preserve, "fd00::1".parse().unwrap()), None, "another family");
}

#[tokio::test]
async fn a_connection_takes_little_memory_while_it_is_silent() {
    let worker = permissive();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stream = TcpStream::connect(address).await.unwrap();
    // The task of a connection; its stages are futures of their own.
    let task = serve(Rc::clone(&worker), stream, address);
    assert!(size_of_val(&task) <= 2 * 1024, "{} bytes", size_of_val(&task));
    let stream = TcpStream::connect(address).await.unwrap();
    let peer = Peer::new(worker, Client::plain(address, address));
    let listening = first::listen(&peer, stream);
    assert!(size_of_val(&listening) <= 2 * 1024 + 128, "{} bytes", size_of_val(&listening));
}

#[tokio::test]
async fn a_request_takes_little_memory() {
    local(async {
        let worker = permissive();
        let connection = Connection::new(Role::Client);
        let (sender, receiver) = connection.open(b"\0", false).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 9));
        let peer = Peer::new(worker, Client::plain(address, address));
        let task = mesh::stream_of(Rc::clone(&peer), Bytes::new(), sender, receiver);
        assert!(size_of_val(&task) <= 8 * 1024 + 256, "{} bytes", size_of_val(&task));
    })
    .await;
}
