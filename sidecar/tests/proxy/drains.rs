//! A sidecar that is told to stop: what runs ends well, and what is new goes elsewhere.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::harness::{Application, Cluster, Outcome, http1, within};

/// Reads a request, says so, and answers when it is told to.
async fn answer_later(mut stream: TcpStream, begun: Arc<Notify>, go: Arc<Notify>) {
    if http1::read_request(&mut stream, &mut BytesMut::new()).await.is_some() {
        begun.notify_one();
        go.notified().await;
        let _ = stream.write_all(http1::OK).await;
    }
}

#[tokio::test]
async fn a_request_that_runs_is_answered_by_a_sidecar_that_stops() {
    // A server without a sidecar, the server's sidecar that stops, and the client's.
    for (meshed, server_stops) in [(false, false), (true, true), (true, false)] {
        let cluster = Cluster::start().await;
        let pod = cluster.pod(meshed).await;
        let (begun, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (begins, goes) = (Arc::clone(&begun), Arc::clone(&go));
        let serve = move |stream| answer_later(stream, Arc::clone(&begins), Arc::clone(&goes));
        let application = Application::start(&pod, serve);
        let service = cluster.service(Some("http"), &[&application.port]).await;
        let mut stream = cluster.client.dial(service).await;
        let request = http1::request("POST", 100);
        let asking = http1::ask(&mut stream, &request, || {});
        let stopping = async {
            begun.notified().await;
            let stops = if server_stops { pod.sidecar.as_ref().unwrap() } else { &cluster.client };
            stops.stop().await;
            go.notify_one();
        };
        let (outcome, ()) = within(async { tokio::join!(asking, stopping) }).await;
        assert_eq!(outcome, Outcome::Whole(200), "sidecar at the server: {meshed}, it stops: {server_stops}");
    }
}

#[tokio::test]
async fn no_request_is_lost_when_the_sidecar_of_one_of_two_endpoints_stops() {
    let cluster = Cluster::start().await;
    let (ends, stays) = (cluster.pod(true).await, cluster.pod(true).await);
    let first = Application::start(&ends, http1::answer_all);
    let second = Application::start(&stays, http1::answer_all);
    let service = cluster.service(Some("http"), &[&first.port, &second.port]).await;
    let ask = async |number: usize| {
        let mut stream = cluster.client.dial(service).await;
        let request = http1::request("POST", 100);
        let outcome = within(http1::ask(&mut stream, &request, || {})).await;
        assert_eq!(outcome, Outcome::Whole(200), "request {number}");
    };
    for number in 0..10 {
        ask(number).await;
    }
    let stopping = async { ends.sidecar.as_ref().unwrap().stop().await };
    let asking = async {
        for number in 10..60 {
            ask(number).await;
        }
    };
    tokio::join!(stopping, asking);
}

/// Answers requests until a POST is there; then says so, and closes a moment later without having read it.
async fn stop_before_post(mut stream: TcpStream, stops: Arc<Notify>) {
    let mut buffer = BytesMut::new();
    let mut first = [0; 4];
    while matches!(stream.peek(&mut first).await, Ok(1..)) {
        if first == *b"POST" {
            stops.notify_one();
            sleep(Duration::from_millis(20)).await;
            return;
        }
        if http1::read_request(&mut stream, &mut buffer).await.is_none()
            || stream.write_all(http1::OK).await.is_err()
        {
            return;
        }
    }
}

/// A server that is told to stop closes its listener and its idle connections, also one that a request has just come on.
#[tokio::test]
async fn a_post_that_an_application_had_not_read_when_it_stopped_goes_elsewhere() {
    for listens_on in [false, true] {
        let cluster = Cluster::start().await;
        let (ends, stays) = (cluster.pod(true).await, cluster.pod(true).await);
        let stops = Arc::new(Notify::new());
        let told = Arc::clone(&stops);
        let mut first =
            Some(Application::start(&ends, move |stream| stop_before_post(stream, Arc::clone(&told))));
        let second = Application::start(&stays, http1::answer_all);
        let ports = [&first.as_ref().unwrap().port, &second.port];
        let service = cluster.service(Some("http"), &ports).await;
        let ask = async |method: &str| {
            let mut stream = cluster.client.dial(service).await;
            within(http1::ask(&mut stream, &http1::request(method, 10), || {})).await
        };
        while first.as_ref().unwrap().accepted() == 0 {
            assert_eq!(ask("PUT").await, Outcome::Whole(200));
        }
        let stopped = Cell::new(false);
        let stopping = async {
            stops.notified().await;
            stopped.set(true);
            if !listens_on {
                first.take();
            }
        };
        let asking = async {
            let mut failed = 0;
            while !stopped.get() {
                failed += usize::from(ask("POST").await != Outcome::Whole(200));
            }
            failed
        };
        let ((), failed) = within(async { tokio::join!(stopping, asking) }).await;
        // One that listens on may have carried it out and reset the connection.
        assert_eq!(failed > 0, listens_on, "{failed} failed");
    }
}
