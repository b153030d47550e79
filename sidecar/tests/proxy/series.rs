//! How many series clients can make: nothing that they write into a request is a label.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::Request;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tulle_sidecar::telemetry::Telemetry;
use tulle_sidecar::telemetry::prometheus::{Form, encode};

use crate::harness::http2::Client;
use crate::harness::{Application, Cluster, Outcome, http1, within};

/// Requests on each path. Fewer than the table of series has room for, so that a label of theirs would show as a series
/// each and not as one of the overflow.
const REQUESTS: usize = 500;

/// A host and a method that no other request has.
fn names(number: usize) -> (String, String) {
    (format!("host-{number}.example"), format!("METHOD{number}"))
}

/// A request without a body.
fn request(number: usize) -> Vec<u8> {
    let (host, method) = names(number);
    format!("{method} / HTTP/1.1\r\nhost: {host}\r\n\r\n").into_bytes()
}

/// Answers every stream with 200.
async fn answer_http2(stream: TcpStream) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let _ = respond.send_response(http::Response::new(()), true);
    }
}

/// Sends these requests one after the other on one connection.
async fn ask_http1(mut stream: TcpStream, numbers: Range<usize>) {
    for number in numbers {
        let outcome = within(http1::ask(&mut stream, &request(number), || {})).await;
        assert_eq!(outcome, Outcome::Whole(200), "request {number}");
    }
}

/// The same over HTTP/2.
async fn ask_http2(stream: TcpStream, numbers: Range<usize>) {
    let client = Client::new(stream).await;
    for number in numbers {
        let (host, method) = names(number);
        let request =
            Request::builder().method(method.as_str()).uri(format!("http://{host}/")).body(()).unwrap();
        let mut send = within(client.send().ready()).await.unwrap();
        let (answer, _) = send.send_request(request, true).unwrap();
        assert_eq!(within(answer).await.unwrap().status(), 200, "request {number}");
    }
}

/// To a Service without endpoints, each on a connection of its own.
async fn ask_nobody(cluster: &Cluster, nobody: SocketAddr, numbers: Range<usize>) {
    for number in numbers {
        let mut stream = cluster.client.dial(nobody).await;
        let outcome = within(http1::ask(&mut stream, &request(number), || {})).await;
        assert_eq!(outcome, Outcome::Whole(503), "request {number}");
    }
}

/// How many requests were counted, in all series.
fn counted(telemetry: &Telemetry) -> u64 {
    let all = telemetry.all();
    all.iter().flat_map(|(_, series)| &series.by_class).map(|count| count.load(Ordering::Relaxed)).sum()
}

/// The series in the table, which the operator gets, and the samples of `/metrics` without their values, once so many
/// requests are counted.
async fn series(telemetry: &Telemetry, requests: usize) -> BTreeSet<String> {
    let requests = u64::try_from(requests).unwrap();
    // A client may have its answer before its request is counted.
    within(async {
        while counted(telemetry) < requests {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(counted(telemetry), requests);
    let text = String::from_utf8(encode(telemetry, &[], Form::Text)).unwrap();
    // Kinds and reasons of events are constants of the program, and a pool may have its own at any time.
    let samples =
        text.lines().filter(|line| !line.starts_with('#') && !line.starts_with("tulle_events_total"));
    let samples = samples.map(|line| line.rsplit_once(' ').unwrap().0.to_owned());
    let table = telemetry.all().into_iter().map(|(key, _)| format!("{key:?}"));
    samples.chain(table).collect()
}

#[tokio::test]
async fn hosts_and_methods_that_clients_make_up_add_no_series() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let server = pod.sidecar.as_ref().unwrap();
    let text = Application::start(&pod, http1::answer_all);
    let frames = Application::start(&pod, answer_http2);
    let http = cluster.service(Some("http"), &[&text.port]).await;
    let grpc = cluster.service(Some("grpc"), &[&frames.port]).await;
    let nobody = cluster.service(Some("http"), &[]).await;
    let ask = async |numbers: Range<usize>| {
        let plain = TcpStream::connect(text.port.address).await.unwrap();
        let (meshed, streams) = (cluster.client.dial(http).await, cluster.client.dial(grpc).await);
        tokio::join!(
            ask_http1(plain, numbers.clone()),
            ask_http1(meshed, numbers.clone()),
            ask_http2(streams, numbers.clone()),
            ask_nobody(&cluster, nobody, numbers),
        );
    };
    // The client's sidecar sees all but the plain ones, the server's all that have a server.
    let paths = 3;
    let known = async |requests: usize| {
        let client = series(&cluster.client.telemetry, paths * requests).await;
        (client, series(&server.telemetry, paths * requests).await)
    };
    ask(0..1).await;
    let (client, inbound) = known(1).await;
    let is_counted =
        |all: &BTreeSet<String>| all.iter().any(|line| line.starts_with("tulle_requests_total{"));
    assert!(is_counted(&client) && is_counted(&inbound), "{client:?}, {inbound:?}");
    ask(1..REQUESTS).await;
    let (client_after, inbound_after) = known(REQUESTS).await;
    for (before, after) in [(client, client_after), (inbound, inbound_after)] {
        let added: Vec<&String> = after.difference(&before).take(5).collect();
        assert_eq!(added, Vec::<&String>::new(), "{} before, {} after", before.len(), after.len());
    }
}
