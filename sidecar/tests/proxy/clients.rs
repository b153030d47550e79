//! Clients that end their side, leave, or are slow with their request.

use std::future::poll_fn;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::join_all;
use socket2::SockRef;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{sleep, timeout};

use crate::harness::http2::{self, Client};
use crate::harness::{Application, Cluster, Event, Outcome, http1, next, within};

/// Longer than a sidecar takes to notice that a client has left.
const LATE: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    Http1,
    Http2,
    Opaque,
}

impl Spoken {
    fn declared(self) -> Option<&'static str> {
        match self {
            Self::Http1 => None,
            Self::Http2 => Some("kubernetes.io/h2c"),
            Self::Opaque => Some("tcp"),
        }
    }
}

/// Reads everything, and answers late.
async fn answer_late(mut stream: TcpStream, spoken: Spoken) {
    let mut sent = Vec::new();
    if spoken == Spoken::Opaque {
        stream.read_to_end(&mut sent).await.unwrap();
    } else {
        http1::read_request(&mut stream, &mut BytesMut::new()).await.unwrap();
    }
    sleep(LATE).await;
    let _ = stream.write_all(if spoken == Spoken::Opaque { &sent[..] } else { http1::LAST }).await;
}

#[tokio::test]
async fn a_client_that_ends_its_side_is_answered_however_late() {
    let cluster = Cluster::start().await;
    let pods = [cluster.pod(false).await, cluster.pod(true).await];
    let all = pods.iter().flat_map(|pod| [Spoken::Http1, Spoken::Opaque].map(|spoken| (pod, spoken)));
    let cluster = &cluster;
    let running = all.map(|(pod, spoken)| async move {
        let application = Application::start(pod, move |stream| answer_late(stream, spoken));
        let service = cluster.service(spoken.declared(), &[&application.port]).await;
        let mut stream = cluster.client.dial(service).await;
        stream.write_all(http1::GET).await.unwrap();
        stream.shutdown().await.unwrap();
        if spoken == Spoken::Opaque {
            let mut answer = Vec::new();
            within(stream.read_to_end(&mut answer)).await.unwrap();
            assert_eq!(answer, http1::GET, "{}", pod.uid);
        } else {
            let outcome = within(http1::read_answer(&mut stream, || {})).await;
            assert_eq!(outcome, Outcome::Whole(200), "{}", pod.uid);
        }
        assert_eq!(application.accepted(), 1);
    });
    join_all(running).await;
}

/// Answers nothing, and reports what happens.
async fn hold(mut stream: TcpStream, spoken: Spoken, events: UnboundedSender<Event>) {
    match spoken {
        Spoken::Http1 => http1::hold(stream, events).await,
        Spoken::Http2 => http2::hold(stream, events).await,
        Spoken::Opaque => {
            stream.read_u8().await.unwrap();
            events.send(Event::Begun).unwrap();
            while matches!(stream.read(&mut [0; 64]).await, Ok(1..)) {}
            let _ = events.send(Event::GivenUp);
        }
    }
}

/// Asks, leaves when the application has been asked, and returns when the application knows. `reset`: by a reset of
/// the stream or the connection.
async fn ask_and_leave(
    mut stream: TcpStream,
    spoken: Spoken,
    reset: bool,
    mut events: UnboundedReceiver<Event>,
) {
    if spoken == Spoken::Http2 {
        let client = Client::new(stream).await;
        let mut send = client.send().ready().await.unwrap();
        let (answer, upload) = send.send_request(http2::request("GET"), true).unwrap();
        assert_eq!(next(&mut events).await, Event::Begun);
        // A stream is reset when both of its halves are dropped.
        if reset {
            drop((answer, upload));
            assert_eq!(next(&mut events).await, Event::GivenUp);
        } else {
            drop(client);
            assert_eq!(next(&mut events).await, Event::GivenUp);
        }
        return;
    }
    stream.write_all(http1::GET).await.unwrap();
    assert_eq!(next(&mut events).await, Event::Begun);
    if reset {
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    drop(stream);
    assert_eq!(next(&mut events).await, Event::GivenUp);
}

#[tokio::test]
async fn a_client_that_leaves_ends_what_the_application_does_for_it() {
    let cluster = Cluster::start().await;
    let pods = [cluster.pod(false).await, cluster.pod(true).await];
    let mut running = Vec::new();
    for pod in &pods {
        for spoken in [Spoken::Http1, Spoken::Http2, Spoken::Opaque] {
            for reset in [false, true] {
                let (events, seen) = unbounded_channel();
                let application = Application::start(pod, move |stream| hold(stream, spoken, events.clone()));
                let service = cluster.service(spoken.declared(), &[&application.port]).await;
                let stream = cluster.client.dial(service).await;
                running.push(async move {
                    ask_and_leave(stream, spoken, reset, seen).await;
                    drop(application);
                });
            }
        }
    }
    join_all(running).await;
}

/// Answers a request when it has its head, then reads five bytes of its body, and wants no more of it.
async fn answer_first(mut stream: TcpStream, spoken: Spoken, bodies: UnboundedSender<Vec<u8>>) {
    if spoken == Spoken::Http2 {
        let mut connection = h2::server::handshake(stream).await.unwrap();
        let (request, mut respond) = connection.accept().await.unwrap().unwrap();
        let mut body = request.into_body();
        respond.send_response(http::Response::new(()), true).unwrap();
        tokio::spawn(async move {
            let mut read = Vec::new();
            while read.len() < 5 {
                read.extend_from_slice(&body.data().await.unwrap().unwrap());
            }
            bodies.send(read).unwrap();
        });
        drop(respond);
        while connection.accept().await.is_some() {}
        return;
    }
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    stream.write_all(http1::OK).await.unwrap();
    let mut body = vec![0; 5];
    stream.read_exact(&mut body).await.unwrap();
    bodies.send(body).unwrap();
}

/// Sends half of a body behind the answer, and waits until the application has it, and then until it has closed.
async fn send_behind_answer(mut stream: TcpStream, spoken: Spoken, mut bodies: UnboundedReceiver<Vec<u8>>) {
    if spoken == Spoken::Http2 {
        let client = Client::new(stream).await;
        let mut send = client.send().ready().await.unwrap();
        let (answer, mut upload) = send.send_request(http2::request("POST"), false).unwrap();
        let answer = answer.await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        upload.send_data(Bytes::from_static(b"hello"), false).unwrap();
        assert_eq!(bodies.recv().await.unwrap(), b"hello");
        assert_eq!(poll_fn(|cx| upload.poll_reset(cx)).await.unwrap(), h2::Reason::NO_ERROR);
        return;
    }
    stream.write_all(b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 10\r\n\r\n").await.unwrap();
    assert_eq!(http1::read_answer(&mut stream, || {}).await, Outcome::Whole(200));
    stream.write_all(b"hello").await.unwrap();
    assert_eq!(bodies.recv().await.unwrap(), b"hello");
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_body_reaches_an_application_that_has_answered_for_as_long_as_it_reads() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        for spoken in [Spoken::Http1, Spoken::Http2] {
            let (bodies, read) = unbounded_channel();
            let application =
                Application::start(&pod, move |stream| answer_first(stream, spoken, bodies.clone()));
            let service = cluster.service(spoken.declared(), &[&application.port]).await;
            let stream = cluster.client.dial(service).await;
            within(send_behind_answer(stream, spoken, read)).await;
        }
    }
}

#[tokio::test]
async fn a_client_that_is_slow_with_its_head_is_told_so_and_does_not_reach_the_application() {
    const BEGINNING: &[u8] = b"GET / HTTP/1.1\r\nhost: sh";
    /// A head may take a minute.
    const LONGER: Duration = Duration::from_secs(90);
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let application = Application::start(&pod, http1::answer_all);
    let service = cluster.service(Some("http"), &[&application.port]).await;
    let mut redirected = cluster.client.dial(service).await;
    redirected.write_all(BEGINNING).await.unwrap();
    let mut plain = TcpStream::connect(application.port.address).await.unwrap();
    plain.write_all(BEGINNING).await.unwrap();
    let answers = [&mut redirected, &mut plain].map(|stream| http1::read_answer(stream, || {}));
    let answers = timeout(LONGER, join_all(answers)).await.expect("it hangs");
    assert_eq!(answers, [Outcome::Whole(408); 2]);
    assert_eq!(application.accepted(), 0);
}

/// A head of several pieces is one request, and one piece may be several requests.
#[tokio::test]
async fn requests_may_come_in_any_pieces() {
    const LAST: &[u8] = b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n";
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let application = Application::start(&pod, http1::answer_all);
        let service = cluster.service(Some("http"), &[&application.port]).await;
        let mut stream = cluster.client.dial(service).await;
        for piece in [&b"GET / HTTP/1.1\r\nho"[..], b"st: shop\r", b"\n\r\n"] {
            stream.write_all(piece).await.unwrap();
            sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(within(http1::read_answer(&mut stream, || {})).await, Outcome::Whole(200));
        stream.write_all(&[http1::GET, http1::GET, LAST].concat()).await.unwrap();
        let mut answers = String::new();
        within(stream.read_to_string(&mut answers)).await.unwrap();
        assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
        assert_eq!(application.accepted(), 1);
    }
}

/// Answers with a head and a message, and resets the stream right behind it.
async fn reset_behind_message(stream: TcpStream, code: h2::Reason, content_type: &str) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_request, mut respond))) = connection.accept().await {
        let answer = http::Response::builder().header("content-type", content_type).body(()).unwrap();
        let mut answer = respond.send_response(answer, false).unwrap();
        answer.send_data(Bytes::from_static(b"hello"), false).unwrap();
        tokio::spawn(async move {
            sleep(Duration::from_millis(1)).await;
            answer.send_reset(code);
        });
    }
}

#[tokio::test]
async fn a_reset_behind_the_head_says_what_the_server_said() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        for (code, status) in
            [(h2::Reason::CANCEL, "1"), (h2::Reason::ENHANCE_YOUR_CALM, "8"), (h2::Reason::NO_ERROR, "13")]
        {
            for content_type in ["text/plain", "application/grpc"] {
                let application =
                    Application::start(&pod, move |stream| reset_behind_message(stream, code, content_type));
                let service = cluster.service(Spoken::Http2.declared(), &[&application.port]).await;
                let client = Client::new(cluster.client.dial(service).await).await;
                let mut send = client.send().ready().await.unwrap();
                let (answer, _) = send.send_request(http2::request("GET"), true).unwrap();
                let mut body = within(answer).await.unwrap().into_body();
                assert_eq!(within(body.data()).await.unwrap().unwrap(), "hello", "{code:?} {meshed}");
                if content_type == "text/plain" {
                    let error = within(body.data()).await.unwrap().unwrap_err();
                    assert_eq!(error.reason(), Some(code), "{meshed}");
                } else {
                    assert!(within(body.data()).await.is_none());
                    let trailers = within(body.trailers()).await.unwrap().unwrap();
                    assert_eq!(trailers["grpc-status"], status, "{code:?} {meshed}");
                }
            }
        }
    }
}

/// Answers with a head that is the end.
async fn answer_with_head_alone(stream: TcpStream, lengths: bool) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_request, mut respond))) = connection.accept().await {
        let answer = http::Response::builder().header("content-type", "application/grpc");
        let answer = answer.header("grpc-status", "5").header("x-t", "1");
        let answer = if lengths { answer.header("content-length", "0") } else { answer };
        respond.send_response(answer.body(()).unwrap(), true).unwrap();
    }
}

/// gRPC takes every header of such an answer for a trailer of its server's (Trailers-Only).
#[tokio::test]
async fn an_answer_that_is_its_head_alone_has_the_headers_that_were_sent() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        for lengths in [false, true] {
            let application = Application::start(&pod, move |stream| answer_with_head_alone(stream, lengths));
            let service = cluster.service(Spoken::Http2.declared(), &[&application.port]).await;
            let client = Client::new(cluster.client.dial(service).await).await;
            let mut send = client.send().ready().await.unwrap();
            let (answer, _) = send.send_request(http2::request("POST"), true).unwrap();
            let answer = within(answer).await.unwrap();
            assert!(answer.body().is_end_stream());
            let mut names: Vec<&str> = answer.headers().keys().map(|name| name.as_str()).collect();
            names.sort_unstable();
            let length: &[&str] = if lengths { &["content-length"] } else { &[] };
            let sent = [length, &["content-type", "grpc-status", "x-t"]].concat();
            assert_eq!(names, sent, "meshed: {meshed}");
        }
    }
}
