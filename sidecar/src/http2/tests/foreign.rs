//! Connections whose other end is of another library, and those of both ends of ours.

use std::future::{pending, poll_fn};

use tokio::io::AsyncWriteExt as _;

use super::*;

/// The two ends of a connection, of ours to another library's server.
async fn to_foreign_server() -> (Client, h2::server::Connection<DuplexStream, Bytes>) {
    let (near, far) = duplex(64 * 1024);
    let (client, driving) = client(near);
    spawn_local(driving);
    (client, h2::server::handshake(far).await.unwrap())
}

pub(super) fn get() -> Head {
    crate::http1::head::parse_request(&mut BytesMut::from(&b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n"[..]))
        .unwrap()
        .unwrap()
}

#[test]
fn interim_answers_pass_in_their_order() {
    run(async {
        let (near, far) = duplex(64 * 1024);
        spawn_local(async move {
            let mut server = Server::new(far, BytesMut::new());
            let (_, mut send, _receive) = server.accept().await.unwrap().unwrap();
            for status in [100, 103, 101] {
                let mut head = Head::answer(status, "", 0);
                head.framing = Framing::None;
                send.interim(&head).unwrap();
            }
            send.head(&Head::answer(200, "OK", 0), true).unwrap();
            server.accept().await.is_none()
        });
        let (client, driving) = client(near);
        spawn_local(driving);
        let (_send, mut receive) = client.open(&get(), true, None).unwrap();
        let mut seen = Vec::new();
        loop {
            match receive.answer().await.unwrap() {
                Answered::Interim(head) => {
                    assert_eq!(head.header("content-type").unwrap(), "text/plain");
                    seen.push(head.status());
                }
                Answered::Final(block, end) => {
                    assert!(end);
                    seen.push(block.status.unwrap());
                    break;
                }
            }
        }
        assert_eq!(seen, [100, 103, 200]);
    });
}

#[test]
fn requests_beyond_the_last_stream_that_a_server_names_were_not_processed() {
    run(async {
        let (client, mut server) = to_foreign_server().await;
        let (_first, mut first) = client.open(&get(), true, None).unwrap();
        let (_, mut respond) = server.accept().await.unwrap().unwrap();
        server.graceful_shutdown();
        let serving = spawn_local(async move { server.accept().await.is_none() });
        while client.is_open() {
            tokio::task::yield_now().await;
        }
        assert!(client.open(&get(), true, None).is_none());
        respond.send_response(http::Response::new(()), true).unwrap();
        assert!(matches!(first.answer().await, Ok(Answered::Final(..))));
        assert!(serving.await.unwrap());
        drop(first);

        let (near, mut far) = duplex(64 * 1024);
        let (client, driving) = super::client(near);
        spawn_local(driving);
        let (_a, mut a) = client.open(&get(), true, None).unwrap();
        let (_b, mut b) = client.open(&get(), true, None).unwrap();
        let mut bytes = BytesMut::new();
        frame::put(&mut bytes, frame::GOAWAY, 0, 0, &[0, 0, 0, 1, 0, 0, 0, 0]);
        frame::put(&mut bytes, frame::RST_STREAM, 0, 1, &[0, 0, 0, 2]);
        far.write_all(&bytes).await.unwrap();
        assert_eq!(b.answer().await.err(), Some(Unanswered::Unprocessed));
        assert_eq!(a.answer().await.err(), Some(Unanswered::Lost));
    });
}

#[test]
fn the_code_of_a_reset_and_what_came_before_it_arrive() {
    run(async {
        let (client, mut server) = to_foreign_server().await;
        let (_send, mut receive) = client.open(&get(), true, None).unwrap();
        let (_, mut respond) = server.accept().await.unwrap().unwrap();
        spawn_local(async move { server.accept().await.is_none() });
        let mut body = respond.send_response(http::Response::new(()), false).unwrap();
        body.send_data(Bytes::from_static(b"some"), false).unwrap();
        assert!(matches!(receive.answer().await, Ok(Answered::Final(_, false))));
        assert_eq!(receive.part().await, Ok(Part::Data(Bytes::from_static(b"some"))));
        body.send_reset(h2::Reason::ENHANCE_YOUR_CALM);
        let code = tulle_mesh::wire::frame::Code::Http2(11);
        assert_eq!(receive.part().await, Err(PumpError::SourceReset(code)));
    });
}

#[test]
fn a_connection_ends_when_nobody_opens_requests_any_more() {
    run(async {
        let (client, mut server) = to_foreign_server().await;
        let opened = client.open(&get(), true, None).unwrap();
        drop(client);
        let (_, mut respond) = server.accept().await.unwrap().unwrap();
        respond.send_response(http::Response::new(()), true).unwrap();
        let (_send, mut receive) = opened;
        let serving = spawn_local(async move { server.accept().await.is_none() });
        assert!(matches!(receive.answer().await, Ok(Answered::Final(_, true))));
        assert!(serving.await.unwrap(), "it has closed");
    });
}

/// Sends frames of this content until the peer grants no more. Returns how many bytes they have.
async fn fill(stream: &mut h2::SendStream<Bytes>, content: &'static [u8], window: u32) -> usize {
    let mut sent = 0;
    while sent + content.len() <= window as usize {
        stream.reserve_capacity(content.len());
        while stream.capacity() < content.len() {
            if !matches!(poll_fn(|cx| stream.poll_capacity(cx)).await, Some(Ok(_))) {
                return sent;
            }
        }
        if stream.send_data(Bytes::from_static(content), false).is_err() {
            return sent;
        }
        sent += content.len();
    }
    sent
}

#[test]
fn a_slow_reader_of_small_messages_holds_up_nobody_and_costs_little_beside_its_window() {
    run(async {
        let (near, far) = duplex(64 * 1024);
        let mut server = Server::new(far, BytesMut::new());
        let (near, _) = tokio::join!(h2::client::handshake(near), tokio::task::yield_now());
        let (mut send, connection) = near.unwrap();
        spawn_local(connection);
        let request = || http::Request::post("http://shop/").body(()).unwrap();
        let (_slow, mut upload) = send.send_request(request(), false).unwrap();
        let filling = spawn_local(async move {
            let sent = fill(&mut upload, b"x", STREAM_WINDOW).await;
            (upload, sent)
        });
        // The server drives its connection and reads nothing of this one.
        let (_, _respond, mut unread) = server.accept().await.unwrap().unwrap();
        spawn_local(answer_at_once(server));
        send = send.ready().await.unwrap();
        let other = send.send_request(request(), true).unwrap().0;
        assert_eq!(other.await.unwrap().status(), 200);
        let (_upload, sent) = filling.await.unwrap();
        assert_eq!(sent, STREAM_WINDOW as usize);
        let (mut read, mut pieces) = (0, 0);
        while read < sent {
            let Ok(Part::Data(bytes)) = unread.part().await else { panic!() };
            read += bytes.len();
            pieces += 1;
        }
        assert!(pieces < 200, "{pieces} pieces of single bytes");
    });
}

#[test]
fn slow_readers_of_answers_do_not_end_the_connection_that_they_share() {
    run(async {
        let (client, mut server) = to_foreign_server().await;
        spawn_local(async move {
            while let Some(Ok((_, mut respond))) = server.accept().await {
                let mut stream = respond.send_response(http::Response::new(()), false).unwrap();
                spawn_local(async move {
                    fill(&mut stream, b"0123456789abcde", SHARED_STREAM_WINDOW).await;
                    // An answer that is dropped would be reset.
                    pending::<()>().await;
                });
            }
        });
        let mut unread = Vec::new();
        for _ in 0..10 {
            let (send, mut receive) = client.open(&get(), true, None).unwrap();
            receive.answer().await.unwrap();
            unread.push((send, receive));
        }
        // While the first is read, the others arrive.
        for (_, body) in &mut unread {
            let mut read = 0;
            while read + 15 <= SHARED_STREAM_WINDOW as usize {
                let Ok(Part::Data(bytes)) = body.part().await else { panic!() };
                read += bytes.len();
            }
        }
    });
}
