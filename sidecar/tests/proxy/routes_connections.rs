//! Rules about connections: TLS by the name of the server, TCP by weight; and opaque connections beside rules about
//! requests.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tulle_operator::model::gateway::RouteKind;

use crate::harness::cluster::service_ref;
use crate::harness::{Application, Cluster, Pod, within};

/// Two opaque servers, each behind a Service of its own, and one that leads to the first by itself.
struct Servers {
    cluster: Cluster,
    first: SocketAddr,
    second: SocketAddr,
    web: SocketAddr,
    _running: (Vec<Pod>, Vec<Application>),
}

/// Says its name once it has read something.
async fn named(mut stream: TcpStream, name: &'static str) {
    let mut bytes = [0; 1024];
    if matches!(stream.read(&mut bytes).await, Ok(1..)) {
        let _ = stream.write_all(name.as_bytes()).await;
    }
}

impl Servers {
    async fn start(protocol: Option<&str>) -> Self {
        let cluster = Cluster::start().await;
        let pods = vec![cluster.pod(true).await, cluster.pod(false).await];
        let servers = vec![
            Application::start(&pods[0], |stream| named(stream, "first")),
            Application::start(&pods[1], |stream| named(stream, "second")),
        ];
        let first = cluster.service(protocol, &[&servers[0].port]).await;
        let second = cluster.service(protocol, &[&servers[1].port]).await;
        let web = cluster.service(protocol, &[&servers[0].port]).await;
        Self { cluster, first, second, web, _running: (pods, servers) }
    }

    /// What a client gets that sends these pieces, with pauses between them; empty: its connection ends.
    async fn told(&self, pieces: &[&[u8]]) -> String {
        let mut stream = self.cluster.client.dial(self.web).await;
        for piece in pieces {
            let _ = stream.write_all(piece).await;
            sleep(Duration::from_millis(30)).await;
        }
        let mut answer = Vec::new();
        let _ = within(stream.read_to_end(&mut answer)).await;
        String::from_utf8(answer).unwrap()
    }
}

/// A ClientHello that asks for this server, with nothing else in it.
fn client_hello(name: &str) -> Vec<u8> {
    let sized = |content: &[u8]| {
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        [&length[..], content].concat()
    };
    let entry = [&[0][..], &sized(name.as_bytes())].concat();
    let extensions = [&[0, 0][..], &sized(&sized(&entry))].concat();
    let body = [&[3, 3][..], &[7; 32], &[0], &sized(&[0x13, 1]), &[1, 0], &sized(&extensions)].concat();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    let message = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &sized(&message)].concat()
}

#[tokio::test]
async fn a_tls_connection_goes_by_the_name_that_its_client_asks_for() {
    let servers = Servers::start(None).await;
    let attach = async |name: &str, host: &str, backend| {
        let spec = json!({
            "parentRefs": [service_ref(servers.web)],
            "hostnames": [host],
            "rules": [{"backendRefs": [service_ref(backend)]}],
        });
        servers.cluster.route(RouteKind::Tls, name, spec, servers.web).await;
    };
    attach("one", "first.example", servers.first).await;
    attach("two", "*.example", servers.second).await;
    for (name, expected) in [
        ("first.example", "first"),
        ("FIRST.example", "first"),
        ("other.example", "second"),
        ("elsewhere.org", ""),
    ] {
        let hello = client_hello(name);
        assert_eq!(servers.told(&[&hello]).await, expected, "{name}");
        let (head, tail) = hello.split_at(40);
        assert_eq!(servers.told(&[head, tail]).await, expected, "{name}, in two segments");
    }
    assert_eq!(servers.told(&[b"GET / HTTP/1.1\r\nhost: first.example\r\n\r\n"]).await, "", "not TLS");
}

#[tokio::test]
async fn tcp_connections_are_shared_out_by_weight() {
    let servers = Servers::start(None).await;
    let weighted = |dialled, weight: u32| {
        let mut backend = service_ref(dialled);
        backend["weight"] = json!(weight);
        backend
    };
    let spec = json!({
        "parentRefs": [service_ref(servers.web)],
        "rules": [{"backendRefs": [weighted(servers.first, 1), weighted(servers.second, 3)]}],
    });
    servers.cluster.route(RouteKind::Tcp, "web", spec, servers.web).await;
    let mut seen = Vec::new();
    for _ in 0..8 {
        seen.push(servers.told(&[b"\x00\x01"]).await);
    }
    assert_eq!(seen.iter().filter(|name| *name == "first").count(), 2, "{seen:?}");
    assert_eq!(seen.iter().filter(|name| *name == "second").count(), 6, "{seen:?}");
}

#[tokio::test]
async fn an_opaque_connection_beside_rules_about_requests_goes_to_the_service_itself() {
    let servers = Servers::start(None).await;
    let spec = json!({
        "parentRefs": [service_ref(servers.web)],
        "rules": [{"backendRefs": [service_ref(servers.second)]}],
    });
    servers.cluster.route(RouteKind::Http, "web", spec, servers.web).await;
    assert_eq!(servers.told(&[b"\x00\x01"]).await, "first");
}
