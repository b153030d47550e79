//! How much at once reaches the application, and what comes too late for it.

use super::*;
use crate::config::limits::{InUse, InboundLimits, Limit, LimitSet, LimitsSection};
use crate::gate::PATIENCE;

const GRPC: &[u8] = b"POST /shop.Cart/Add HTTP/1.1\r\nhost: web\r\ncontent-type: application/grpc\r\n\r\n";

fn at_most(concurrency: Option<u32>, connections: Option<u32>) -> LimitSet {
    let limit = |max: Option<u32>| max.map(|max| Limit { max, policy: "shop/calm".into() });
    LimitSet { concurrency: limit(concurrency), connections: limit(connections) }
}

fn limited(section: LimitsSection) -> Rc<Worker> {
    let worker = permissive();
    let limits = Some(InboundLimits { section, in_use: InUse::default() });
    let (mtls, revision) = (Mtls::Permissive, String::new());
    let inbound = Inbound { mtls, access: None, shadow: None, shadow_strict: false, limits, revision };
    worker.config.set_inbound(inbound);
    worker
}

fn enforced(set: LimitSet) -> Rc<Worker> {
    limited(LimitsSection { enforced: set, ..LimitsSection::default() })
}

fn tried(set: LimitSet) -> Rc<Worker> {
    limited(LimitsSection { shadow: set, ..LimitsSection::default() })
}

fn counted(worker: &Worker, kind: &str) -> u64 {
    worker.telemetry.events().into_iter().filter(|((of, _), _)| *of == kind).map(|(_, count)| count).sum()
}

/// The head of an answer: what it tells the client's sidecar, and its text.
async fn answer(receiver: &mut Receiver) -> (Fields, String) {
    let Event::Head(mut block) = next(receiver).await else { panic!("no answer") };
    let fields = Fields::decode(&mut block).unwrap();
    (fields, String::from_utf8_lossy(&block).into_owned())
}

fn open_until(connection: &Connection, protocol: Travels, head: &[u8], left_ms: u32) -> (Sender, Receiver) {
    let mut block = BytesMut::new();
    Fields { protocol, deadline_ms: Some(left_ms), ..Fields::default() }.encode(&mut block);
    block.extend_from_slice(head);
    connection.open(&block, true).unwrap()
}

#[tokio::test]
async fn what_is_beyond_the_limit_is_refused_with_the_mark_that_keeps_sidecars_from_repeating_it() {
    local(async {
        let (worker, app) = (enforced(at_most(Some(2), None)), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let held: Vec<_> = (0..2).map(|_| open(&peer, Travels::Http1, GET)).collect();
        sleep(SOON).await;
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        let (fields, text) = answer(&mut receiver).await;
        assert!(fields.shed && text.starts_with("HTTP/1.1 503"), "{text}");
        assert!(
            text.contains("retry-after: 1\r\n") && text.contains("tulle-reason: OursOverloaded"),
            "{text}"
        );
        let (_sender, mut receiver) = open(&peer, Travels::Http2, GRPC);
        let (fields, text) = answer(&mut receiver).await;
        assert!(fields.shed && text.contains("grpc-status: 14"), "{text}");
        assert!(text.contains("grpc-retry-pushback-ms: 1000"), "{text}");
        let mut plain = client(&worker, app.address).await;
        assert_eq!(asks(&mut plain).await, "503");
        assert_eq!((app.accepted.get(), worker.load.get(), counted(&worker, "limited")), (2, 2, 3));
        drop(held);
        sleep(SOON).await;
        let _served = open(&peer, Travels::Http1, GET);
        sleep(SOON).await;
        assert_eq!((app.accepted.get(), worker.load.get()), (3, 1), "the places are free again");
    })
    .await;
}

#[tokio::test]
async fn a_request_whose_client_leaves_the_queue_never_reaches_the_application() {
    local(async {
        let (worker, app) = (enforced(at_most(Some(1), None)), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let held = open(&peer, Travels::Http1, GET);
        sleep(SOON).await;
        let (sender, receiver) = open(&peer, Travels::Http1, GET);
        sleep(PATIENCE / 4).await;
        sender.reset(Code::Cancel);
        drop((sender, receiver, held));
        sleep(SOON).await;
        assert_eq!((app.accepted.get(), worker.load.get()), (1, 0));
    })
    .await;
}

#[tokio::test]
async fn a_request_in_the_queue_is_refused_by_rules_that_come_meanwhile() {
    local(async {
        let (worker, app) = (enforced(at_most(Some(1), None)), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let _held = open(&peer, Travels::Http1, GET);
        sleep(SOON).await;
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        sleep(PATIENCE / 4).await;
        let nobody = proto::Access { has_allow: true, ..Default::default() };
        let (rules, policy) = (Access::compile(&nobody).unwrap(), "shop/nobody".to_owned());
        let (mtls, revision) = (Mtls::Permissive, String::new());
        let access = Some(InboundAccess::new(rules, policy));
        // The request that held the place is broken off, and the place is free.
        let inbound = Inbound { mtls, access, shadow: None, shadow_strict: false, limits: None, revision };
        worker.config.set_inbound(inbound);
        let (fields, text) = answer(&mut receiver).await;
        assert!(fields.shed || text.starts_with("HTTP/1.1 403"), "{text}");
        assert_eq!((app.accepted.get(), worker.load.get()), (1, 0));
    })
    .await;
}

#[tokio::test]
async fn a_client_that_is_refused_for_load_keeps_its_connection() {
    local(async {
        let (worker, app) = (enforced(at_most(Some(1), None)), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let held = open(&peer, Travels::Http1, GET);
        sleep(SOON).await;
        let mut plain = client(&worker, app.address).await;
        for _ in 0..3 {
            assert_eq!(asks(&mut plain).await, "503");
        }
        let upload = b"POST / HTTP/1.1\r\nhost: web\r\ncontent-length: 100\r\n\r\n";
        plain.write_all(upload).await.unwrap();
        let refused = String::from_utf8(read(&mut plain).await).unwrap().to_ascii_lowercase();
        assert!(refused.starts_with("http/1.1 503") && refused.contains("connection: close"), "{refused}");
        drop(held);
    })
    .await;
}

#[tokio::test]
async fn a_limit_that_is_only_tried_lets_everything_through_and_counts_it() {
    local(async {
        let (worker, app) = (tried(at_most(Some(1), Some(1))), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let _requests: Vec<_> = (0..3).map(|_| open(&peer, Travels::Http1, GET)).collect();
        let _opaque: Vec<_> = (0..3).map(|_| open(&peer, Travels::Opaque, b"")).collect();
        // A machine may be busy.
        for _ in 0..100 {
            sleep(SOON).await;
            if app.accepted.get() == 6 {
                break;
            }
        }
        assert_eq!((app.accepted.get(), worker.load.get()), (6, 3));
        assert_eq!((counted(&worker, "would_limit"), counted(&worker, "limited")), (4, 0));
    })
    .await;
}

#[tokio::test]
async fn connections_beyond_the_limit_are_reset_and_opaque_streams_go_elsewhere() {
    local(async {
        let (worker, app) = (enforced(at_most(None, Some(2))), application(App::Echoes).await);
        let mut first = client(&worker, app.address).await;
        first.write_all(b"hello\r\n").await.unwrap();
        assert_eq!(read(&mut first).await, b"hello\r\n");
        let peer = mesh(&worker, app.address).await;
        let (sender, mut receiver) = open(&peer, Travels::Opaque, b"");
        assert!(matches!(next(&mut receiver).await, Event::Head(_)));
        // Two are open.
        let (_refused, mut elsewhere) = open(&peer, Travels::Opaque, b"");
        assert_eq!(next(&mut elsewhere).await, Event::Reset(Code::NotProcessed));
        for words in [&b""[..], b"hello\r\n", GET] {
            let mut beyond = client(&worker, app.address).await;
            beyond.write_all(words).await.unwrap();
            let refused = timeout(Duration::from_secs(5), beyond.read(&mut [0])).await.expect("it is kept");
            assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "{words:?}");
        }
        assert_eq!(app.accepted.get(), 2);
        // Requests of another sidecar are no connections of clients.
        let (_sender, mut request) = open(&peer, Travels::Http1, GET);
        assert!(
            matches!(next(&mut request).await, Event::Head(_)),
            "it reaches the application, whose echo is refused"
        );
        drop((sender, receiver, first));
        sleep(SOON).await;
        let mut again = client(&worker, app.address).await;
        again.write_all(b"hello\r\n").await.unwrap();
        assert_eq!(read(&mut again).await, b"hello\r\n");
    })
    .await;
}

/// What another sidecar sends first.
fn mesh_hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = vec![tulle_mesh::wire::ALPN.to_vec()];
    let name = rustls::pki_types::ServerName::try_from("web").unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

#[tokio::test]
async fn a_sidecar_whose_first_packet_is_lost_is_not_reset_while_clients_are_at_their_limit() {
    local(async {
        let (worker, app) = (enforced(at_most(None, Some(1))), application(App::Echoes).await);
        let mut full = client(&worker, app.address).await;
        full.write_all(b"hello\r\n").await.unwrap();
        assert_eq!(read(&mut full).await, b"hello\r\n");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut late = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, from) = listener.accept().await.unwrap();
        let peer = Peer::new(Rc::clone(&worker), Client::plain(from, app.address));
        let says = async {
            sleep(SOON).await;
            late.write_all(&mesh_hello()).await.unwrap();
        };
        let (opening, ()) = tokio::join!(first::listen(&peer, accepted), says);
        assert!(matches!(opening, Ok(first::Opening::Mesh(_))));
        assert_eq!((app.accepted.get(), counted(&worker, "limited")), (1, 0));
    })
    .await;
}

#[tokio::test]
async fn a_request_whose_time_is_up_is_answered_504_and_the_application_never_sees_it() {
    local(async {
        let (worker, app) = (enforced(at_most(Some(1), None)), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let (_sender, mut receiver) = open_until(&peer, Travels::Http1, GET, 0);
        let (fields, text) = answer(&mut receiver).await;
        assert!(!fields.shed && text.starts_with("HTTP/1.1 504"), "{text}");
        assert_eq!(app.accepted.get(), 0);
        let _held = open(&peer, Travels::Http1, GET);
        sleep(SOON).await;
        // In the queue, where it would wait for longer.
        let (_sender, mut receiver) = open_until(&peer, Travels::Http2, GRPC, 5);
        let (_, text) = answer(&mut receiver).await;
        assert!(text.contains("grpc-status: 4\r\n"), "{text}");
        assert_eq!((app.accepted.get(), counted(&worker, "expired_request")), (1, 2));
    })
    .await;
}

#[tokio::test]
async fn a_grpc_client_says_itself_how_long_it_waits() {
    local(async {
        let (worker, app) = (permissive(), application(App::Silent).await);
        let peer = mesh(&worker, app.address).await;
        let head = [&GRPC[..GRPC.len() - 2], b"grpc-timeout: 0n\r\n\r\n"].concat();
        let (_sender, mut receiver) = open(&peer, Travels::Http2, &head);
        assert!(answer(&mut receiver).await.1.contains("grpc-status: 4"));
        // What its sidecar says is newer.
        let _served = open_until(&peer, Travels::Http2, &head, 60_000);
        sleep(SOON).await;
        assert_eq!(worker.load.get(), 1);
    })
    .await;
}

#[tokio::test]
async fn an_answer_tells_how_long_the_application_takes() {
    local(async {
        let (worker, app) = (permissive(), application(App::Http).await);
        let peer = mesh(&worker, app.address).await;
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        assert_eq!(answer(&mut receiver).await.0.latency_us, None, "nothing is known at first");
        sleep(SOON).await;
        let (_sender, mut receiver) = open(&peer, Travels::Http1, GET);
        let (fields, _) = answer(&mut receiver).await;
        assert!(fields.latency_us.is_some_and(|micros| micros > 0) && fields.load == Some(1), "{fields:?}");
    })
    .await;
}
