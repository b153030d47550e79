//! Whole requests and connections over loopback, and the evidence that they leave.

use std::sync::Arc;

use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::{LocalSet, spawn_local};
use tulle_mesh::identity::WorkloadId;
use tulle_mesh::proto::AttemptCounts;

use super::*;
use crate::config::{CanaryRef, ConfigStore, Destination, Endpoint, Service};
use crate::settings::Settings;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: web\r\nconnection: close\r\n\r\n";

/// What a server does with a connection once it has read from it.
#[derive(Clone, Copy)]
enum Server {
    Answers,
    Closes,
    Resets,
    /// Nobody listens.
    Gone,
}

async fn server(server: Server) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    if matches!(server, Server::Gone) {
        return address;
    }
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 1024]).await;
            match server {
                Server::Answers => drop(stream.write_all(OK).await),
                Server::Resets => drop(SockRef::from(&stream).set_linger(Some(Duration::ZERO))),
                Server::Closes | Server::Gone => {}
            }
        }
    });
    address
}

fn endpoint(address: SocketAddr, revision: &str, terminating: bool) -> Endpoint {
    let (revision, pod_uid) = (revision.into(), format!("{revision}-pod").into());
    Endpoint { address, identity: None, revision, terminating, pod_uid }
}

/// A worker, and its route to a Service with a Canary that sends nearly everything to `new`.
async fn route_to(endpoints: Vec<Endpoint>) -> (Rc<Worker>, Rc<Route>) {
    let settings = Settings {
        pod_name: "client".to_owned(),
        pod_namespace: "shop".to_owned(),
        pod_uid: "client".to_owned(),
        pod_ips: Vec::new(),
        trust_domain: "cluster.local".to_owned(),
        operator: String::new(),
        operator_identity: WorkloadId::new("cluster.local", "tulle", "operator"),
        token_file: String::new(),
        trust_file: String::new(),
        probes: Vec::new(),
        workers: 1,
        features: Vec::new(),
    };
    let service = Service {
        endpoints,
        split: vec![("old".into(), 1), ("new".into(), 999)],
        canary: Some(CanaryRef { namespace: "shop".into(), name: "web".into(), epoch: 3 }),
        ..Service::default()
    };
    let dialled = SocketAddr::from(([10, 96, 0, 1], 80));
    let (config, _wanted) = ConfigStore::new();
    config.resolve(dialled).await;
    config.set_destination(dialled, Destination::Service(service));
    let worker = Worker::new(Arc::new(settings), config, Arc::default(), Arc::default());
    let route = worker.route(dialled).await;
    (worker, route)
}

/// A connection of the application, and the sidecar's end of it.
async fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

async fn get(worker: &Rc<Worker>, route: &Rc<Route>) -> String {
    let (mut client, accepted) = connection().await;
    let served = speak(worker, route, Protocol::Http1, accepted, BytesMut::new());
    let asked = async {
        client.write_all(REQUEST).await.unwrap();
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
async fn an_attempt_that_another_endpoint_saved_is_evidence_against_the_first() {
    let test = async {
        let (good, bad) = (server(Server::Answers).await, server(Server::Closes).await);
        let (worker, route) = route_to(vec![endpoint(good, "old", false), endpoint(bad, "new", false)]).await;
        for _ in 0..20 {
            let answer = get(&worker, &route).await;
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
            let gone = server(Server::Gone).await;
            let (worker, route) = route_to(vec![endpoint(gone, "new", terminating)]).await;
            let answer = get(&worker, &route).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
            let seen = evidence(&worker, "new");
            assert_eq!((seen.attempts, seen.failures, seen.unreached), expected);
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_opaque_connection_is_one_attempt() {
    let table = [
        (Server::Answers, (1, 0, 0)),
        // A server may have nothing to say.
        (Server::Closes, (1, 0, 0)),
        (Server::Resets, (1, 1, 0)),
        (Server::Gone, (1, 1, 1)),
    ];
    let test = async {
        for (kind, expected) in table {
            let (worker, route) = route_to(vec![endpoint(server(kind).await, "new", false)]).await;
            let (mut client, accepted) = connection().await;
            let served = speak(&worker, &route, Protocol::Opaque, accepted, BytesMut::new());
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
