//! Many streams, long heads, and peers that break the rules.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use tokio::net::TcpStream;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::watch;
use tulle_mesh::wire::MAX_STREAMS;
use tulle_mesh::wire::frame::Kind;

use crate::harness::http2::{self, Client};
use crate::harness::peer::Peer;
use crate::harness::{Application, Cluster, Event, Outcome, http1, next, within};

/// Answers no request before so many have begun, on all connections together.
async fn answer_together(
    stream: TcpStream,
    begun: Arc<watch::Sender<usize>>,
    together: usize,
    most: Option<u32>,
) {
    let mut builder = h2::server::Builder::new();
    if let Some(most) = most {
        builder.max_concurrent_streams(most);
    }
    let Ok(mut connection) = builder.handshake::<_, Bytes>(stream).await else { return };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let mut begun_by_all = begun.subscribe();
        begun.send_modify(|begun| *begun += 1);
        tokio::spawn(async move {
            let enough = begun_by_all.wait_for(|begun| *begun >= together).await.is_ok();
            if enough {
                let _ = respond.send_response(http::Response::new(()), true);
            }
        });
    }
}

#[tokio::test]
async fn as_many_requests_run_at_once_as_a_client_sends() {
    let cluster = Cluster::start().await;
    let pods = [cluster.pod(false).await, cluster.pod(true).await];
    // Requests on one connection of the client, how many of them must run at once, and how many a connection to the
    // application may carry.
    for (requests, together, most) in [(150, 150, None), (150, 150, Some(100)), (1_100, 1_000, None)] {
        for pod in &pods {
            let begun = Arc::new(watch::Sender::new(0));
            let serve = move |stream| answer_together(stream, Arc::clone(&begun), together, most);
            let application = Application::start(pod, serve);
            let service = cluster.service(Some("grpc"), &[&application.port]).await;
            let client = Client::new(cluster.client.dial(service).await).await;
            let asked = join_all((0..requests).map(|_| client.ask("POST", 10, || {})));
            let outcomes = within(asked).await;
            let answered = outcomes.iter().filter(|outcome| **outcome == Outcome::Whole(200)).count();
            assert_eq!(answered, requests, "{}: {together} at once, {most:?} a connection", pod.uid);
        }
    }
}

#[tokio::test]
async fn heads_pass_up_to_60_kib_and_longer_ones_are_refused_with_431() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let application = Application::start(&pod, http1::answer_all);
        let service = cluster.service(Some("http"), &[&application.port]).await;
        for (kib, expected) in [(7, 200), (48, 200), (58, 200), (62, 431), (200, 431)] {
            let mut stream = cluster.client.dial(service).await;
            let long = "x".repeat(kib * 1024);
            let request = format!("GET / HTTP/1.1\r\nhost: shop\r\nx-long: {long}\r\n\r\n");
            let outcome = within(http1::ask(&mut stream, request.as_bytes(), || {})).await;
            assert_eq!(outcome, Outcome::Whole(expected), "{kib} KiB, {}", pod.uid);
        }
    }
}

/// CVE-2023-44487: requests that are given up as soon as they are sent.
#[tokio::test]
async fn requests_that_are_reset_at_once_leave_nothing_running() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let (events, mut seen) = unbounded_channel();
        let application = Application::start(&pod, move |stream| http2::hold(stream, events.clone()));
        let service = cluster.service(Some("grpc"), &[&application.port]).await;
        let abuser = Client::new(cluster.client.dial(service).await).await;
        let mut send = abuser.send().ready().await.unwrap();
        let first = send.send_request(http2::request("GET"), true).unwrap();
        assert_eq!(next(&mut seen).await, Event::Begun);
        drop(first);
        for _ in 0..1_000 {
            // The sidecar may have ended the connection by now.
            let Ok(mut ready) = within(abuser.send().ready()).await else { break };
            drop(ready.send_request(http2::request("GET"), true));
        }
        drop(abuser);
        // Others are served.
        let other = Application::start(&pod, http1::answer_all);
        let service = cluster.service(Some("http"), &[&other.port]).await;
        let mut stream = cluster.client.dial(service).await;
        let outcome = within(http1::ask(&mut stream, http1::GET, || {})).await;
        assert_eq!(outcome, Outcome::Whole(200), "{}", pod.uid);
        // Of what reached the application, nothing is left.
        let mut running = 1;
        while running > 0 || !seen.is_empty() {
            running += if next(&mut seen).await == Event::Begun { 1 } else { -1 };
        }
    }
}

#[tokio::test]
async fn a_sidecar_that_opens_too_many_streams_loses_its_connection_and_nobody_elses() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let (events, mut seen) = unbounded_channel();
    let held = Application::start(&pod, move |stream| http1::hold(stream, events.clone()));
    let answering = Application::start(&pod, http1::answer_all);
    let credentials = cluster.operator.credentials("stranger");
    let mut polite = Peer::connect(answering.port.address, &credentials).await;
    let mut rude = Peer::connect(held.port.address, &credentials).await;
    let streams = u32::try_from(MAX_STREAMS).unwrap();
    for number in 0..streams {
        rude.get(number * 2 + 1).await;
    }
    for _ in 0..streams {
        assert_eq!(next(&mut seen).await, Event::Begun);
    }
    rude.get(streams * 2 + 1).await;
    for _ in 0..streams {
        assert_eq!(next(&mut seen).await, Event::GivenUp);
    }
    within(async { while rude.read().await.is_some() {} }).await;
    assert_eq!(held.accepted(), MAX_STREAMS);
    polite.get(1).await;
    let answer = async {
        loop {
            let frame = polite.read().await.expect("the connection has ended");
            if frame.kind == Kind::Head {
                return frame.payload;
            }
        }
    };
    let head = within(answer).await;
    assert!(String::from_utf8_lossy(&head).contains("HTTP/1.1 200"), "{head:?}");
}
