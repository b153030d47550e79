//! HTTP/2 as a server and as a client read it: a whole connection, whose peer sends these bytes and closes.
#![no_main]

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;
use tulle_sidecar::http1::{Head, Part, head};
use tulle_sidecar::http2::{Answered, RecvStream, SendStream, Server, client, request_head, response_head};

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_time().build().expect("a runtime");
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\n";

fuzz_target!(|bytes: &[u8]| {
    RUNTIME.with(|runtime| {
        runtime.block_on(async {
            let both = async {
                serve(bytes).await;
                ask(bytes).await;
            };
            timeout(Duration::from_secs(5), both).await.expect("the connection outlives its peer");
        });
    });
});

/// A server that answers, reads, refuses or drops the requests of a client.
async fn serve(bytes: &[u8]) {
    let mut server = Server::new(tokio::io::join(bytes, tokio::io::sink()), BytesMut::from(PREFACE));
    let mut held = Vec::new();
    while let Some(Ok((mut request, send, receive))) = server.accept().await {
        if let Ok(head) = request_head(&mut request.block, request.end) {
            rewritten(&head);
            held.push((head.headers.len() % 4, send, receive));
        }
    }
    for (how, send, receive) in held {
        stream(how, send, receive).await;
    }
}

async fn stream(how: usize, mut send: SendStream, mut receive: RecvStream) {
    match how {
        0 => return,
        1 => {
            let _ = send.head(&Head::answer(200, "OK", 4_096), false);
            let _ = send.data(Bytes::from_static(&[0; 4_096])).await;
            let _ = send.end(None);
        }
        2 => drop(send),
        _ => {
            let _ = send.head(&Head::answer(404, "", 0), true);
        }
    }
    // Each stream has an end, since its connection has.
    while let Ok(Part::Data(_) | Part::Trailers(_)) = receive.part().await {}
}

/// What HTTP/2 lets pass, HTTP/1 reads as the same request.
fn rewritten(request: &Head) {
    let mut text = BytesMut::new();
    request.write(&mut text, false);
    if let Ok(Some(again)) = head::parse_request(&mut text) {
        assert_eq!(again.start, request.start);
        assert!(text.is_empty(), "a head became more than one");
    }
}

/// A client whose server answers with these bytes.
async fn ask(bytes: &[u8]) {
    let (client, driving) = client(tokio::io::join(bytes, tokio::io::sink()));
    let request = head::parse_request(&mut BytesMut::from(REQUEST)).expect("a request").expect("a whole one");
    let streams: Vec<_> = (0..3).filter_map(|_| client.open(&request, true, None)).collect();
    let _ = driving.await;
    for (_send, mut receive) in streams {
        loop {
            match receive.answer().await {
                Ok(Answered::Interim(_)) => {}
                Ok(Answered::Final(block, end)) => {
                    let _ = response_head(b"GET", *block, end);
                    while let Ok(Part::Data(_) | Part::Trailers(_)) = receive.part().await {}
                    break;
                }
                Err(_) => break,
            }
        }
    }
}
