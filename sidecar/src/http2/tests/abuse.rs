//! What peers do on purpose or by mistake, and what it must not cost others.

use super::foreign::get;
use super::*;
use crate::http2::connection::{Role, Shared};

/// A server that holds its requests, and reads none of them.
async fn hold(mut server: Server<DuplexStream>) {
    let mut held = Vec::new();
    while let Some(Ok((_, send, receive))) = server.accept().await {
        held.push((send, receive));
    }
}

#[test]
fn streams_that_a_client_makes_its_server_reset_end_the_connection() {
    run(async {
        for (kind, payload) in [(frame::WINDOW_UPDATE, &b"\0\0\0\0"[..]), (frame::HEADERS, b"\x82")] {
            let mut bytes = BytesMut::new();
            for stream in (1..).step_by(2).take(3_000) {
                frame::put(&mut bytes, frame::HEADERS, frame::END_HEADERS, stream, POST);
                frame::put(&mut bytes, kind, frame::END_HEADERS, stream, payload);
            }
            assert!(Peer::served(hold).await.calmed_by(bytes).await, "{kind}");
        }
    });
}

#[test]
fn uploads_that_nobody_reads_leave_what_is_left_of_the_window_to_others() {
    run(async {
        let mut peer = Peer::served(|mut server| async move {
            let mut held = Vec::new();
            while let Some(Ok((_, mut send, mut receive))) = server.accept().await {
                if held.len() < 3 {
                    held.push((send, receive));
                    continue;
                }
                spawn_local(async move {
                    while let Ok(Part::Data(_)) = receive.part().await {}
                    send.head(&Head::answer(200, "OK", 0), true).unwrap();
                });
            }
        })
        .await;
        let (mut left, mut of_stream) = (CONNECTION_WINDOW, STREAM_WINDOW);
        for stream in [1, 3, 5] {
            peer.send(frame::HEADERS, frame::END_HEADERS, stream, POST).await;
            for _ in 0..16 {
                peer.send(frame::DATA, 0, stream, &[0; 16_000]).await;
                left -= 16_000;
            }
        }
        peer.send(frame::HEADERS, frame::END_HEADERS, 7, POST).await;
        let mut sent = 0;
        while sent < 1024 * 1024 {
            while left < 16_000 || of_stream < 16_000 {
                let (header, payload) = peer.frame().await.unwrap();
                assert_eq!(header.kind, frame::WINDOW_UPDATE);
                let grant = u32::from_be_bytes(payload.try_into().unwrap());
                if header.stream == 0 { left += grant } else { of_stream += grant }
            }
            peer.send(frame::DATA, 0, 7, &[0; 16_000]).await;
            (left, of_stream, sent) = (left - 16_000, of_stream - 16_000, sent + 16_000);
        }
        peer.send(frame::DATA, frame::END_STREAM, 7, b"").await;
        while peer.kind().await.0 != frame::HEADERS {}
    });
}

#[test]
fn a_body_that_is_too_short_is_granted_once() {
    let mut shared = Shared::new(Role::Server);
    for stream in (1..).step_by(2).take(200) {
        let mut block = Block { method: Some("POST".into()), path: Some("/".into()), ..Block::default() };
        block.scheme = Some("http".into());
        block.headers.push(("content-length".into(), "100000".into()));
        shared.block_frame(stream, false, block).unwrap();
        let header = Header { length: 16_384, kind: frame::DATA, flags: frame::END_STREAM, stream };
        shared.data_frame(header, Bytes::from(vec![0; 16_384])).unwrap();
        let accepted = shared.accepted.pop_front().unwrap();
        assert_eq!(accepted.state.borrow_mut().unread(), 0, "what was given back is not there any more");
        assert!(shared.may_send() <= CONNECTION_WINDOW);
    }
}

#[test]
fn an_answer_to_a_request_that_was_given_up_long_ago_ends_nothing() {
    run(async {
        let (client, mut peer) = Peer::asked(1024 * 1024);
        for _ in 0..1_100 {
            drop(client.open(&get(), true, None).unwrap());
        }
        let (_send, mut receive) = client.open(&get(), true, None).unwrap();
        peer.send(frame::SETTINGS, 0, 0, b"").await;
        peer.send(frame::HEADERS, frame::END_HEADERS, 1, b"\x88").await;
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 2_201, b"\x88").await;
        assert!(matches!(receive.answer().await, Ok(Answered::Final(_, true))));
    });
}

#[test]
fn the_length_that_an_answer_to_connect_declares_is_none_of_the_tunnel() {
    run(async {
        let (client, mut peer) = Peer::asked(64 * 1024);
        let text = &b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"[..];
        let connect = crate::http1::head::parse_request(&mut text.into()).unwrap().unwrap();
        let (_send, mut receive) = client.open(&connect, false, None).unwrap();
        peer.send(frame::HEADERS, frame::END_HEADERS, 1, b"\x88\x0f\x0d\x010").await;
        peer.send(frame::DATA, 0, 1, b"through").await;
        assert!(matches!(receive.answer().await, Ok(Answered::Final(_, false))));
        assert_eq!(receive.part().await, Ok(Part::Data(Bytes::from_static(b"through"))));
    });
}

#[test]
fn a_server_that_answers_before_it_has_the_request_gets_no_other_on_the_connection() {
    run(async {
        let (client, mut peer) = Peer::asked(64 * 1024);
        let (mut send, mut receive) = client.open(&get(), false, None).unwrap();
        assert!(client.is_shareable());
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, b"\x88").await;
        assert!(matches!(receive.answer().await, Ok(Answered::Final(_, true))));
        assert!(client.is_open() && !client.is_shareable());
        send.end(None).unwrap();
        assert!(client.is_shareable());
    });
}

#[test]
fn a_reset_without_an_error_behind_a_whole_answer_is_its_end() {
    run(async {
        let (client, mut peer) = Peer::asked(64 * 1024);
        let (_send, mut receive) = client.open(&get(), true, None).unwrap();
        let (_other, mut cut) = client.open(&get(), true, None).unwrap();
        for stream in [1, 3] {
            peer.send(frame::HEADERS, frame::END_HEADERS, stream, b"\x88\x0f\x0d\x015").await;
        }
        peer.send(frame::DATA, 0, 1, b"whole").await;
        peer.send(frame::DATA, 0, 3, b"not").await;
        for stream in [1, 3] {
            peer.send(frame::RST_STREAM, 0, stream, &[0; 4]).await;
        }
        for (receive, content) in [(&mut receive, "whole"), (&mut cut, "not")] {
            assert!(matches!(receive.answer().await, Ok(Answered::Final(_, false))));
            assert_eq!(receive.part().await, Ok(Part::Data(content.into())));
        }
        assert_eq!(receive.part().await, Ok(Part::End));
        assert!(matches!(cut.part().await, Err(PumpError::SourceReset(_))));
    });
}

#[test]
fn what_is_behind_a_mistake_is_not_read_though_the_goodbye_is_given_up() {
    run(async {
        let (near, far) = duplex(64 * 1024);
        let mut peer = Peer(near);
        peer.0.write_all(frame::PREFACE).await.unwrap();
        // A frame that is too long, whose payload is a request.
        let mut request = BytesMut::new();
        frame::put(&mut request, frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, GET);
        peer.send(frame::PING, 0, 0, &request).await;
        let mut server = Server::new(far, BytesMut::new());
        let accepted = futures::FutureExt::now_or_never(server.accept());
        assert!(accepted.is_none_or(|accepted| matches!(accepted, Some(Err(_)))));
        assert!(server.accept().await.is_none());
    });
}
