//! Peers that grant what they do not take. What a sidecar holds for them is bounded: the other side stands still when
//! the buffers of the kernels on the way are full, whatever it is granted.

use std::future::{pending, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::sleep;
use tulle_mesh::wire::frame::Kind;

use crate::harness::http2;
use crate::harness::peer::Peer;
use crate::harness::{Application, Cluster, http1, within};

/// What is sent, if it is taken.
const OFFERED: usize = 192 << 20;
/// More than the kernel holds in three connections one behind the other: 4 MiB at the sender and 6 MiB at the receiver
/// of each (`tcp_wmem`, `tcp_rmem`). A sidecar holds less than one of them.
const HELD: usize = 96 << 20;
const PIECE: usize = 64 << 10;
/// More than the heads of answers.
const HEADS: usize = 64 << 10;

/// How much has been sent.
type Moved = Arc<AtomicUsize>;

/// Sends what is offered, as it is taken; whether all of it was.
async fn pour(stream: &mut TcpStream, moved: &Moved) -> bool {
    let piece = vec![b'x'; PIECE];
    while moved.load(Ordering::SeqCst) < OFFERED {
        let Ok(written) = stream.write(&piece).await else { return false };
        moved.fetch_add(written, Ordering::SeqCst);
    }
    true
}

/// Reads so many bytes: what stood still goes on.
async fn read(stream: &mut TcpStream, mut bytes: usize) {
    let mut piece = vec![0; PIECE];
    while bytes > 0 {
        let read = within(stream.read(&mut piece)).await.unwrap();
        assert!(read > 0, "it broke off");
        bytes = bytes.saturating_sub(read);
    }
}

/// Answers with all that is offered.
async fn answer(mut stream: TcpStream, moved: Moved) {
    if http1::read_request(&mut stream, &mut BytesMut::new()).await.is_some() {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {OFFERED}\r\n\r\n");
        let _ = stream.write_all(head.as_bytes()).await;
        pour(&mut stream, &moved).await;
    }
}

/// The same over HTTP/2, as far as the sidecar grants it.
async fn answer_http2(stream: TcpStream, moved: Moved) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        let moved = Arc::clone(&moved);
        tokio::spawn(async move {
            let Ok(mut body) = respond.send_response(http::Response::new(()), false) else { return };
            while moved.load(Ordering::SeqCst) < OFFERED {
                body.reserve_capacity(PIECE);
                let Some(Ok(granted)) = poll_fn(|cx| body.poll_capacity(cx)).await else { return };
                if body.send_data(Bytes::from(vec![b'x'; granted]), false).is_err() {
                    return;
                }
                moved.fetch_add(granted, Ordering::SeqCst);
            }
        });
    }
}

/// Waits until nothing has moved for a second. Returns how much has.
async fn stalled(moved: &Moved, mut meanwhile: impl AsyncFnMut()) -> usize {
    let mut before = 0;
    loop {
        sleep(Duration::from_secs(1)).await;
        meanwhile().await;
        let now = moved.load(Ordering::SeqCst);
        if now > 0 && now == before {
            return now;
        }
        before = now;
    }
}

/// Reads the beginning of what is sent, and nothing more.
async fn read_little(mut stream: TcpStream) {
    let _ = stream.read(&mut [0; 16]).await;
    pending::<()>().await;
}

fn counter() -> (Moved, Moved) {
    let moved = Moved::default();
    (Arc::clone(&moved), moved)
}

#[tokio::test]
async fn a_sidecar_that_grants_and_does_not_read_stops_the_application() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(true).await;
    let (moved, moving) = counter();
    let application = Application::start(&pod, move |stream| answer(stream, Arc::clone(&moving)));
    let mut peer = Peer::connect(application.port.address, &cluster.operator.credentials("stranger")).await;
    peer.get(1).await;
    peer.grant_everything(1).await;
    let held = within(stalled(&moved, async || peer.ping().await)).await;
    assert!(held < HELD, "{held} bytes for a peer that reads nothing");
    // It goes on when the peer reads.
    let mut read = 0;
    while read <= held {
        let frame = within(peer.read()).await.expect("the connection has ended");
        if frame.kind == Kind::Data {
            read += frame.payload.len();
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_application() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        for declared in ["http", "tcp"] {
            let (moved, moving) = counter();
            let application = Application::start(&pod, move |stream| answer(stream, Arc::clone(&moving)));
            let service = cluster.service(Some(declared), &[&application.port]).await;
            let mut stream = cluster.client.dial(service).await;
            stream.write_all(http1::GET).await.unwrap();
            let held = within(stalled(&moved, async || {})).await;
            assert!(held < HELD, "{declared}, {}: {held} bytes", pod.uid);
            read(&mut stream, held + HEADS).await;
        }
    }
}

#[tokio::test]
async fn an_http2_client_that_grants_and_does_not_read_stops_the_application() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let (moved, moving) = counter();
        let application = Application::start(&pod, move |stream| answer_http2(stream, Arc::clone(&moving)));
        let service = cluster.service(Some("grpc"), &[&application.port]).await;
        let mut stream = cluster.client.dial(service).await;
        stream.write_all(http2::PREFACE).await.unwrap();
        http2::grant_everything(&mut stream).await.unwrap();
        for number in 0..20 {
            http2::write_get(&mut stream, number * 2 + 1).await.unwrap();
        }
        let held = within(stalled(&moved, async || {})).await;
        assert!(held < HELD, "{}: {held} bytes", pod.uid);
        // The headers of frames are less than a hundredth.
        read(&mut stream, held + held / 100 + HEADS).await;
    }
}

#[tokio::test]
async fn an_application_that_does_not_read_stops_its_client() {
    let cluster = Cluster::start().await;
    for meshed in [false, true] {
        let pod = cluster.pod(meshed).await;
        let application = Application::start(&pod, read_little);
        for declared in ["http", "tcp"] {
            let service = cluster.service(Some(declared), &[&application.port]).await;
            let mut stream = cluster.client.dial(service).await;
            let moved = Moved::default();
            let uploading = async {
                let head = format!("POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: {OFFERED}\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
                assert!(pour(&mut stream, &moved).await, "it broke off");
                pending::<()>().await;
            };
            let held = tokio::select! {
                held = within(stalled(&moved, async || {})) => held,
                () = uploading => unreachable!(),
            };
            assert!(held < HELD, "{declared}, {}: {held} bytes", pod.uid);
        }
    }
}
