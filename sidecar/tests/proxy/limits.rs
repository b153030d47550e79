//! Many streams, long heads, and peers that break the rules; what policies limit, and what comes too late.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use http::HeaderValue;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::unbounded_channel;
use tokio::sync::watch;
use tokio::time::sleep;
use tulle_mesh::wire::MAX_STREAMS;
use tulle_mesh::wire::frame::Kind;

use crate::connecting::Busy;
use crate::harness::http2::{self, Client};
use crate::harness::peer::Peer;
use crate::harness::{Application, Cluster, Event, NAMESPACE, Outcome, Pod, http1, next, within};

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
            // A client that knows how many streams it is granted holds the others back.
            within(async {
                while client.send().current_max_send_streams() > 1_000 {
                    sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
            // Without bodies: h2 ends the connection of an application that leaves a hundred small ones unread.
            let asked = join_all((0..requests).map(|_| client.ask("GET", 0, || {})));
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

/// A policy with limits for all pods.
fn limit(cluster: &Cluster, mode: &str, limits: Value) {
    let policy = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": "limits", "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"target": {"kind": "Namespace"}, "mode": mode, "limits": limits},
    });
    let policy = serde_json::from_value(policy).unwrap();
    cluster.operator.change(|model| model.apply_policy((NAMESPACE.into(), "limits".into()), policy));
}

/// A pod whose sidecar knows its limits: it is ready without them.
async fn limited_pod(cluster: &Cluster) -> Pod {
    let pod = cluster.pod(true).await;
    let config = &pod.sidecar.as_ref().unwrap().config;
    within(async {
        while config.inbound().is_none_or(|inbound| inbound.limits.is_none()) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    pod
}

#[tokio::test]
async fn requests_beyond_the_limit_are_refused_and_the_application_never_sees_them() {
    let cluster = Cluster::start().await;
    limit(&cluster, "Enforce", json!({"concurrency": 3}));
    let pod = limited_pod(&cluster).await;
    let (events, mut seen) = unbounded_channel();
    let application = Application::start(&pod, move |stream| http1::hold(stream, events.clone()));
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut stream = cluster.client.dial(service).await;
        stream.write_all(http1::GET).await.unwrap();
        held.push(stream);
        assert_eq!(next(&mut seen).await, Event::Begun);
    }
    // Three of them wait for a moment. No sidecar sends a refused one again.
    let asked = (0..7).map(|_| async {
        let mut stream = cluster.client.dial(service).await;
        http1::ask(&mut stream, http1::GET, || {}).await
    });
    assert_eq!(within(join_all(asked)).await, [Outcome::Whole(503); 7]);
    let sidecar = pod.sidecar.as_ref().unwrap();
    assert_eq!((application.accepted(), sidecar.count("limited")), (3, 7));
    // One who has no sidecar learns the same.
    let mut plain = TcpStream::connect(application.port.address).await.unwrap();
    assert_eq!(within(http1::ask(&mut plain, http1::GET, || {})).await, Outcome::Whole(503));
    drop(held.pop());
    assert_eq!(next(&mut seen).await, Event::GivenUp);
    let mut served = cluster.client.dial(service).await;
    within(async {
        // The place may be free a moment after the application has learnt of it.
        loop {
            served.write_all(http1::GET).await.unwrap();
            tokio::select! {
                event = next(&mut seen) => return assert_eq!(event, Event::Begun),
                _ = http1::read_answer(&mut served, || {}) => {}
            }
            served = cluster.client.dial(service).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_limit_in_shadow_is_counted_and_refuses_nothing() {
    let cluster = Cluster::start().await;
    limit(&cluster, "Shadow", json!({"concurrency": 3}));
    let pod = limited_pod(&cluster).await;
    let (events, mut seen) = unbounded_channel();
    let application = Application::start(&pod, move |stream| http1::hold(stream, events.clone()));
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut held = Vec::new();
    for _ in 0..8 {
        let mut stream = cluster.client.dial(service).await;
        stream.write_all(http1::GET).await.unwrap();
        held.push(stream);
        assert_eq!(next(&mut seen).await, Event::Begun);
    }
    let sidecar = pod.sidecar.as_ref().unwrap();
    assert_eq!((sidecar.count("would_limit"), sidecar.count("limited")), (5, 0));
}

/// Sends back what comes.
async fn echo(mut stream: TcpStream) {
    let (mut input, mut output) = stream.split();
    let _ = tokio::io::copy(&mut input, &mut output).await;
}

#[tokio::test]
async fn an_opaque_connection_that_one_pod_has_no_room_for_goes_to_another() {
    let cluster = Cluster::start().await;
    limit(&cluster, "Enforce", json!({"connections": 1}));
    let pods = [limited_pod(&cluster).await, limited_pod(&cluster).await];
    let applications = pods.each_ref().map(|pod| Application::start(pod, echo));
    let ports = applications.each_ref().map(|application| &application.port);
    let service = cluster.service(Some("tcp"), &ports).await;
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut stream = cluster.client.dial(service).await;
        stream.write_all(b"hello").await.unwrap();
        let mut heard = [0; 5];
        within(stream.read_exact(&mut heard)).await.unwrap();
        open.push(stream);
    }
    assert_eq!(applications.each_ref().map(Application::accepted), [1, 1]);
    let mut beyond = cluster.client.dial(service).await;
    let _ = beyond.write_all(b"hello").await;
    assert!(within(beyond.read_exact(&mut [0; 5])).await.is_err(), "there is no room anywhere");
    assert_eq!(applications.each_ref().map(Application::accepted), [1, 1]);
}

#[tokio::test]
async fn an_application_that_accepts_late_never_sees_requests_whose_time_is_up() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let Busy { listener, port, filling } = Busy::start(&pod).await;
    let client = Client::new(TcpStream::connect(port.address).await.unwrap()).await;
    let call = |timeout: &'static str| {
        let mut request = http2::request("POST");
        request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        request.headers_mut().insert("grpc-timeout", HeaderValue::from_static(timeout));
        request
    };
    let late = (0..5).map(|_| async {
        let (answer, _) = client.send().ready().await.unwrap().send_request(call("300m"), true).unwrap();
        let answer = answer.await.unwrap();
        answer.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned())
    });
    let answers = within(join_all(late)).await;
    // DEADLINE_EXCEEDED.
    assert!(answers.iter().all(|status| status.as_deref() == Some("4")), "{answers:?}");
    drop(filling);
    let (events, mut seen) = unbounded_channel();
    let _application = Application::on(listener, port, move |stream| http2::hold(stream, events.clone()));
    let waiting = client.send().ready().await.unwrap().send_request(call("1H"), true).unwrap();
    // The connections that filled the application's backlog end without a request.
    while next(&mut seen).await != Event::Begun {}
    while let Ok(event) = seen.try_recv() {
        assert_eq!(event, Event::GivenUp, "a request of which the time was up has come to the application");
    }
    assert_eq!(pod.sidecar.as_ref().unwrap().count("expired_request"), 5);
    drop(waiting);
}
