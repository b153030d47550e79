//! A whole connection, as its peer sees it.

mod abuse;
mod foreign;

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::{LocalSet, spawn_local};

use super::frame::{self, HEADER, Header};
use super::*;
use crate::http1::{Framing, Head, Part};
use crate::message::PumpError;

/// A GET of `shop/`, without indexing.
const GET: &[u8] = b"\x82\x86\x84\x01\x04shop";
/// A POST of it.
const POST: &[u8] = b"\x83\x86\x84\x01\x04shop";

/// A client that writes frames itself.
struct Peer(DuplexStream);

impl Peer {
    /// A connection that `serve` serves, whose handshake is done.
    async fn served<F: Future<Output = ()> + 'static>(serve: impl FnOnce(Server<DuplexStream>) -> F) -> Self {
        let (near, far) = duplex(64 * 1024);
        spawn_local(serve(Server::new(far, BytesMut::new())));
        let mut peer = Self(near);
        peer.0.write_all(frame::PREFACE).await.unwrap();
        peer.send(frame::SETTINGS, 0, 0, b"").await;
        for kind in [frame::SETTINGS, frame::WINDOW_UPDATE, frame::SETTINGS] {
            assert_eq!(peer.frame().await.unwrap().0.kind, kind);
        }
        peer
    }

    /// A connection of a client of ours, of which this is the server.
    fn asked(room: usize) -> (Client, Self) {
        let (near, far) = duplex(room);
        let (client, driving) = client(near);
        spawn_local(driving);
        (client, Self(far))
    }

    /// Whether these bytes, sent without waiting for answers, end the connection with `ENHANCE_YOUR_CALM`.
    async fn calmed_by(self, bytes: BytesMut) -> bool {
        let (mut read, mut write) = tokio::io::split(self.0);
        spawn_local(async move { write.write_all(&bytes).await });
        let mut answered = Vec::new();
        read.read_to_end(&mut answered).await.unwrap();
        // In the GOAWAY at the end, behind the number of a stream.
        answered[answered.len().saturating_sub(50)..].windows(4).any(|bytes| bytes == [0, 0, 0, 11])
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut bytes = BytesMut::new();
        frame::put(&mut bytes, kind, flags, stream, payload);
        self.0.write_all(&bytes).await.unwrap();
    }

    /// The next frame; `None` at the end.
    async fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut header = [0; HEADER];
        self.0.read_exact(&mut header).await.ok()?;
        let header = Header::parse(header);
        let mut payload = vec![0; header.length];
        self.0.read_exact(&mut payload).await.unwrap();
        Some((header, payload))
    }

    /// The next frame, by its kind, flags and stream.
    async fn kind(&mut self) -> (u8, u8, u32) {
        let (header, _) = self.frame().await.unwrap();
        (header.kind, header.flags, header.stream)
    }

    /// With what the connection is ended.
    async fn ended_with(&mut self) -> u32 {
        loop {
            let (header, payload) = self.frame().await.expect("a GOAWAY");
            if header.kind == frame::GOAWAY {
                assert!(self.frame().await.is_none(), "the connection is closed");
                return u32::from_be_bytes(payload[4..8].try_into().unwrap());
            }
        }
    }

    /// With what the stream is reset.
    async fn reset_with(&mut self, stream: u32) -> u32 {
        loop {
            let (header, payload) = self.frame().await.expect("a reset");
            if (header.kind, header.stream) == (frame::RST_STREAM, stream) {
                return u32::from_be_bytes(payload.try_into().unwrap());
            }
        }
    }
}

/// Answers before a request has ended, and wants no more of it.
async fn answer_at_once(mut server: Server<DuplexStream>) {
    while let Some(Ok((_, mut send, _))) = server.accept().await {
        send.head(&Head::answer(200, "OK", 0), true).unwrap();
    }
}

/// Reads requests to their ends, and answers each with its length.
async fn echo(mut server: Server<DuplexStream>) {
    while let Some(Ok((_, mut send, mut receive))) = server.accept().await {
        spawn_local(async move {
            let mut length = 0;
            loop {
                match receive.part().await {
                    Ok(Part::Data(bytes)) => length += bytes.len(),
                    Ok(Part::Trailers(_)) => {}
                    Ok(Part::End) => break,
                    Err(_) => return,
                }
            }
            let text = length.to_string();
            send.head(&Head::answer(200, "OK", text.len()), false).unwrap();
            send.data(text.into()).await.unwrap();
            send.end(None).unwrap();
        });
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new().block_on(&runtime, test);
}

#[test]
fn a_request_is_answered_and_its_end_comes_with_the_last_data() {
    run(async {
        let mut peer = Peer::served(echo).await;
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, GET).await;
        assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS, 1));
        assert_eq!(peer.kind().await, (frame::DATA, frame::END_STREAM, 1));
        // Padded, with priority, in three frames, and with a body of padding and nothing.
        let block = [b"\x02\0\0\0\0\x10", &POST[..2], b"\0\0"].concat();
        peer.send(frame::HEADERS, frame::PADDED | frame::HAS_PRIORITY, 3, &block).await;
        peer.send(frame::CONTINUATION, 0, 3, &POST[2..3]).await;
        peer.send(frame::CONTINUATION, frame::END_HEADERS, 3, &POST[3..]).await;
        peer.send(frame::DATA, frame::PADDED, 3, b"\x03ab\0\0\0").await;
        peer.send(frame::DATA, 0, 3, b"").await;
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 3, b"\0\x01t\x01x").await;
        assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS, 3));
        assert_eq!(peer.frame().await.unwrap().1, b"2");
    });
}

#[test]
fn what_breaks_the_protocol_ends_the_connection_and_says_so() {
    const CASES: [(u8, u8, u32, &[u8], ErrorCode); 16] = [
        (frame::DATA, 0, 1, b"x", ErrorCode::PROTOCOL_ERROR),
        (frame::DATA, 0, 0, b"x", ErrorCode::PROTOCOL_ERROR),
        (frame::HEADERS, frame::END_HEADERS, 2, GET, ErrorCode::PROTOCOL_ERROR),
        (frame::HEADERS, frame::END_HEADERS, 0, GET, ErrorCode::PROTOCOL_ERROR),
        (frame::HEADERS, frame::END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff", ErrorCode::COMPRESSION_ERROR),
        (frame::HEADERS, frame::END_HEADERS | frame::PADDED, 1, b"\xffabc", ErrorCode::PROTOCOL_ERROR),
        (frame::CONTINUATION, frame::END_HEADERS, 1, GET, ErrorCode::PROTOCOL_ERROR),
        (frame::RST_STREAM, 0, 1, b"\0\0\0\x08", ErrorCode::PROTOCOL_ERROR),
        (frame::RST_STREAM, 0, 1, b"\0\0\0", ErrorCode::FRAME_SIZE_ERROR),
        (frame::SETTINGS, 0, 0, b"\0\x04\x80\0\0\0", ErrorCode::FLOW_CONTROL_ERROR),
        (frame::SETTINGS, 0, 0, b"\0\x02\0\0\0\x02", ErrorCode::PROTOCOL_ERROR),
        (frame::SETTINGS, 0, 0, b"\0\x05\0\0\0\x01", ErrorCode::PROTOCOL_ERROR),
        (frame::SETTINGS, frame::ACK, 0, b"\0\x02\0\0\0\0", ErrorCode::FRAME_SIZE_ERROR),
        (frame::PING, 0, 0, b"short", ErrorCode::FRAME_SIZE_ERROR),
        (frame::WINDOW_UPDATE, 0, 0, b"\0\0\0\0", ErrorCode::PROTOCOL_ERROR),
        (frame::WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff", ErrorCode::FLOW_CONTROL_ERROR),
    ];
    run(async {
        for (kind, flags, stream, payload, code) in CASES {
            let mut peer = Peer::served(echo).await;
            peer.send(kind, flags, stream, payload).await;
            let ended = peer.ended_with().await;
            assert_eq!(ErrorCode(ended), code, "{kind} {flags} {stream} {}", payload.escape_ascii());
        }
        let mut peer = Peer::served(echo).await;
        peer.send(frame::HEADERS, 0, 1, GET).await;
        peer.send(frame::PING, 0, 0, b"amid it.").await;
        assert_eq!(
            ErrorCode(peer.ended_with().await),
            ErrorCode::PROTOCOL_ERROR,
            "a block is not interrupted"
        );
    });
}

#[test]
fn a_malformed_request_ends_its_stream_and_no_other() {
    const BLOCKS: [(&[u8], &str); 10] = [
        (b"\x82\x86", "no path"),
        (b"\x82\x84", "no scheme"),
        (b"\x86\x84", "no method"),
        (b"\x82\x82\x86\x84", "two methods"),
        (b"\x82\x86\x84\x88", "a status"),
        (b"\x82\x86\x84\0\x01X\x01y", "a capital letter"),
        (b"\x82\x86\0\x01x\x01y\x84", "a pseudo-header field behind others"),
        (b"\x82\x86\x84\0\x0aconnection\x05close", "connection handling"),
        (b"\x82\x86\x84\0\x02te\x04gzip", "a te that is not trailers"),
        (b"\x82\x86\x84\0\x01x\x02\r\n", "a line end in a value"),
    ];
    run(async {
        let mut peer = Peer::served(echo).await;
        for (number, (block, what)) in (0..).zip(BLOCKS) {
            let stream = 2 * number + 1;
            peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, stream, block).await;
            assert_eq!(ErrorCode(peer.reset_with(stream).await), ErrorCode::PROTOCOL_ERROR, "{what}");
        }
        for (length, sent) in [("1", "xy"), ("3", "xy")] {
            let stream = if length == "1" { 101 } else { 103 };
            let block = [POST, b"\x0f\x0d\x01", length.as_bytes()].concat();
            peer.send(frame::HEADERS, frame::END_HEADERS, stream, &block).await;
            peer.send(frame::DATA, frame::END_STREAM, stream, sent.as_bytes()).await;
            assert_eq!(ErrorCode(peer.reset_with(stream).await), ErrorCode::PROTOCOL_ERROR, "{length}");
        }
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 201, GET).await;
        assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS, 201));
    });
}

#[test]
fn what_comes_too_late_for_a_stream_costs_the_connection_nothing() {
    run(async {
        let mut peer = Peer::served(answer_at_once).await;
        peer.send(frame::HEADERS, frame::END_HEADERS, 1, POST).await;
        assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1));
        assert_eq!(ErrorCode(peer.reset_with(1).await), ErrorCode::NO_ERROR);
        for _ in 0..100 {
            peer.send(frame::DATA, 0, 1, &[0; 16_000]).await;
        }
        peer.send(frame::WINDOW_UPDATE, 0, 1, b"\0\0\0\x01").await;
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, b"\0\x01t\x01x").await;
        peer.send(frame::PING, 0, 0, b"are you?").await;
        // The bytes of the connection have been granted again.
        let mut granted = 0;
        loop {
            let (header, payload) = peer.frame().await.unwrap();
            match header.kind {
                frame::WINDOW_UPDATE => granted += u32::from_be_bytes(payload.try_into().unwrap()),
                frame::PING => break,
                kind => panic!("{kind}"),
            }
        }
        assert!(granted > 1_000_000, "{granted}");
    });
}

#[test]
fn windows_that_are_closed_and_opened_again_hold_answers_back_and_lose_nothing() {
    run(async {
        let mut peer = Peer::served(|mut server| async move {
            while let Some(Ok((_, mut send, _))) = server.accept().await {
                spawn_local(async move {
                    send.head(&Head::answer(200, "OK", 20), false).unwrap();
                    send.data(Bytes::from_static(b"01234567890123456789")).await.unwrap();
                    send.end(None).unwrap();
                });
            }
        })
        .await;
        peer.send(frame::SETTINGS, 0, 0, b"\0\x04\0\0\0\x05").await;
        assert_eq!(peer.kind().await, (frame::SETTINGS, frame::ACK, 0));
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, GET).await;
        assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS, 1));
        assert_eq!(peer.frame().await.unwrap().1, b"01234");
        // Five bytes have been sent: the window is below zero by two, and then open by three.
        peer.send(frame::SETTINGS, 0, 0, b"\0\x04\0\0\0\x03").await;
        assert_eq!(peer.kind().await, (frame::SETTINGS, frame::ACK, 0));
        peer.send(frame::WINDOW_UPDATE, 0, 1, b"\0\0\0\x05").await;
        assert_eq!(peer.frame().await.unwrap().1, b"567");
        peer.send(frame::SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff").await;
        assert_eq!(peer.kind().await, (frame::SETTINGS, frame::ACK, 0));
        assert_eq!(peer.frame().await.unwrap(), {
            let header = Header { length: 12, kind: frame::DATA, flags: frame::END_STREAM, stream: 1 };
            (header, b"890123456789".to_vec())
        });
    });
}

#[test]
fn a_table_that_the_peer_makes_smaller_is_confirmed_once() {
    run(async {
        let mut peer = Peer::served(echo).await;
        peer.send(frame::SETTINGS, 0, 0, b"\0\x01\0\0\0\0").await;
        assert_eq!(peer.kind().await, (frame::SETTINGS, frame::ACK, 0));
        for (stream, first) in [(1, 0x20), (3, 0x88)] {
            peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, stream, GET).await;
            assert_eq!(peer.frame().await.unwrap().1[0], first);
            assert_eq!(peer.kind().await.0, frame::DATA);
        }
    });
}

#[test]
fn a_client_that_is_told_to_leave_is_answered_and_then_let_go() {
    run(async {
        let (near, far) = duplex(1024 * 1024);
        let leaves = Rc::new(tokio::sync::Notify::new());
        let told = Rc::clone(&leaves);
        spawn_local(async move {
            let mut server = Server::new(far, BytesMut::new());
            let mut held = Vec::new();
            loop {
                tokio::select! {
                    accepted = server.accept() => match accepted {
                        Some(Ok((_, send, _))) => held.push(send),
                        _ => return,
                    },
                    () = leaves.notified() => {
                        server.leave();
                        for mut send in held.drain(..) {
                            spawn_local(async move {
                                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                                send.head(&Head::answer(200, "OK", 0), true).unwrap();
                            });
                        }
                    }
                }
            }
        });
        let mut peer = Peer(near);
        peer.0.write_all(frame::PREFACE).await.unwrap();
        peer.send(frame::SETTINGS, 0, 0, b"").await;
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, GET).await;
        for _ in 0..3 {
            peer.frame().await.unwrap();
        }
        told.notify_one();
        let (header, payload) = peer.frame().await.unwrap();
        assert_eq!((header.kind, &payload[..]), (frame::GOAWAY, &b"\x7f\xff\xff\xff\0\0\0\0"[..]));
        let (header, payload) = peer.frame().await.unwrap();
        assert_eq!((header.kind, header.flags), (frame::PING, 0));
        // One that was on its way is still taken; the next one is not.
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 3, GET).await;
        peer.send(frame::PING, frame::ACK, 0, &payload).await;
        peer.send(frame::HEADERS, frame::END_HEADERS, 5, POST).await;
        peer.send(frame::DATA, frame::END_STREAM, 5, b"late").await;
        let (header, payload) = peer.frame().await.unwrap();
        assert_eq!((header.kind, &payload[..]), (frame::GOAWAY, &b"\0\0\0\x03\0\0\0\0"[..]));
        assert_eq!(ErrorCode(peer.reset_with(5).await), ErrorCode::STREAM_CLOSED);
        told.notify_one();
        for stream in [1, 3] {
            assert_eq!(peer.kind().await, (frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, stream));
        }
        assert!(peer.frame().await.is_none());
    });
}

#[test]
fn floods_end_their_connection() {
    run(async {
        for (kind, flags, payload) in [
            (frame::PING, 0, &b"pingping"[..]),
            (frame::SETTINGS, 0, b""),
            (frame::PRIORITY, 0, b"\0\0\0\0\0"),
        ] {
            let stream = u32::from(kind == frame::PRIORITY);
            let mut bytes = BytesMut::new();
            for _ in 0..25_000 {
                frame::put(&mut bytes, kind, flags, stream, payload);
            }
            assert!(Peer::served(echo).await.calmed_by(bytes).await, "{kind}");
        }
    });
}

#[test]
fn requests_that_are_given_up_one_after_another_end_their_connection() {
    run(async {
        let mut peer = Peer::served(|mut server| async move {
            while let Some(Ok((_, mut send, _receive))) = server.accept().await {
                spawn_local(async move { send.gone().await });
            }
        })
        .await;
        for stream in (1..).step_by(2).take(1_200) {
            if peer.0.write_all(b"").await.is_err() {
                break;
            }
            let mut bytes = BytesMut::new();
            frame::put(&mut bytes, frame::HEADERS, frame::END_HEADERS, stream, POST);
            frame::put(&mut bytes, frame::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
            if peer.0.write_all(&bytes).await.is_err() {
                break;
            }
        }
        assert_eq!(ErrorCode(peer.ended_with().await), ErrorCode::ENHANCE_YOUR_CALM);
    });
}

#[test]
fn a_header_block_without_end_ends_its_connection_before_it_fills_memory() {
    run(async {
        for (piece, frames) in [(vec![0; 16_000], 20), (Vec::new(), 120)] {
            let mut peer = Peer::served(echo).await;
            peer.send(frame::HEADERS, 0, 1, GET).await;
            for _ in 0..frames {
                peer.send(frame::CONTINUATION, 0, 1, &piece).await;
            }
            assert_eq!(ErrorCode(peer.ended_with().await), ErrorCode::ENHANCE_YOUR_CALM);
        }
    });
}

#[test]
fn a_list_that_grows_when_it_is_decoded_is_refused_by_itself() {
    run(async {
        let mut peer = Peer::served(|mut server| async move {
            while let Some(Ok((mut request, mut send, _))) = server.accept().await {
                let failure = request_head(&mut request.block, request.end).unwrap_err();
                assert!(request.block.headers.len() < 20, "what is beyond is not kept");
                send.head(&Head::answer(failure.status(), "", 0), true).unwrap();
            }
        })
        .await;
        // An entry of the table of 4,000 bytes, used 10,000 times by a byte each.
        let block = [GET, b"\x40\x01x\x7f\xa1\x1e", &[b'y'; 4_000], &[0xbe; 10_000]].concat();
        peer.send(frame::HEADERS, frame::END_HEADERS | frame::END_STREAM, 1, &block).await;
        let (header, payload) = peer.frame().await.unwrap();
        assert_eq!((header.kind, &payload[..5]), (frame::HEADERS, &b"\x08\x03431"[..]));
    });
}

#[test]
fn a_peer_that_reads_nothing_gets_no_more_answers_than_fit() {
    run(async {
        let mut peer = Peer::served(answer_at_once).await;
        // Pings fill its output; it stops reading them.
        let mut bytes = BytesMut::new();
        frame::put(&mut bytes, frame::PING, 0, 0, b"pingping");
        let pings = bytes.repeat(1_000);
        let mut written = 0;
        loop {
            let writing = peer.0.write_all(&pings);
            match tokio::time::timeout(std::time::Duration::from_millis(300), writing).await {
                Ok(done) => done.unwrap(),
                Err(_) => break,
            }
            written += pings.len();
            // Slower than a flood.
            if written.is_multiple_of(17 * 10_000) {
                tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
            }
            assert!(written < 1024 * 1024, "it takes pings without end");
        }
    });
}
