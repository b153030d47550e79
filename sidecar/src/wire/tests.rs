//! Two ends of a connection in one process.

use std::future::poll_fn;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;
use tulle_mesh::wire::frame::{self, Code, Kind};
use tulle_mesh::wire::{CONNECTION_GROWTH, MAX_STREAM_CREDIT, MAX_STREAMS, STREAM_CREDIT};

use super::*;

/// Runs a test on one thread, as a worker does, and for at most ten seconds.
fn local(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    LocalSet::new()
        .block_on(&runtime, async { timeout(Duration::from_secs(10), test).await.expect("it hangs") });
}

fn pair() -> (Connection, Connection) {
    let (a, b) = duplex(64 * 1024);
    let (client, server) = (Connection::new(Role::Client), Connection::new(Role::Server));
    spawn_local(drive(client.clone(), a));
    spawn_local(drive(server.clone(), b));
    (client, server)
}

async fn accept(server: &Connection) -> (Bytes, Sender, Receiver) {
    poll_fn(|cx| server.poll_accept(cx)).await.expect("a stream")
}

/// A server whose peer is raw bytes; the outcome of its driver.
fn raw() -> (DuplexStream, tokio::task::JoinHandle<Result<(), super::driver::DriveError>>) {
    let (ours, theirs) = duplex(1 << 20);
    (ours, spawn_local(drive(Connection::new(Role::Server), theirs)))
}

#[test]
fn a_request_and_its_answer_cross() {
    local(async {
        let (client, server) = pair();
        let (sender, mut receiver) = client.open(b"head", false).unwrap();
        let (head, answer, mut request) = accept(&server).await;
        assert_eq!(&head[..], b"head");
        sender.data(Bytes::from_static(b"body")).await.unwrap();
        sender.end();
        assert_eq!(request.next().await, Event::Data(Bytes::from_static(b"body")));
        assert_eq!(request.next().await, Event::End);
        answer.head(b"ok", false);
        answer.trailers(b"x: y\r\n\r\n");
        assert_eq!(receiver.next().await, Event::Head(Bytes::from_static(b"ok")));
        assert_eq!(receiver.next().await, Event::Trailers(Bytes::from_static(b"x: y\r\n\r\n")));
        assert_eq!(receiver.next().await, Event::End);
        assert_eq!((client.active(), server.active()), (0, 0), "nothing is kept of a stream that has ended");
    });
}

#[test]
fn a_slow_reader_stalls_its_own_stream_and_no_other() {
    local(async {
        let (client, server) = pair();
        let (slow, _slow_answer) = client.open(b"slow", false).unwrap();
        let (quick, _quick_answer) = client.open(b"quick", false).unwrap();
        let (_, _a, mut slow_request) = accept(&server).await;
        let (_, _b, mut quick_request) = accept(&server).await;
        let much = Bytes::from(vec![1u8; STREAM_CREDIT as usize * 3]);
        let blocked = spawn_local(async move {
            let sent = slow.data(much).await;
            slow.end();
            sent
        });
        quick.data(Bytes::from_static(b"through")).await.unwrap();
        assert_eq!(quick_request.next().await, Event::Data(Bytes::from_static(b"through")));
        assert!(!blocked.is_finished(), "more was sent than was granted");
        let mut read = 0;
        while let Event::Data(bytes) = slow_request.next().await {
            read += bytes.len();
        }
        assert_eq!(read, STREAM_CREDIT as usize * 3);
        blocked.await.unwrap().unwrap();
    });
}

#[test]
fn a_reader_that_keeps_up_is_sent_more_at_a_time_and_gives_it_back() {
    local(async {
        let (client, server) = pair();
        let growth = |connection: &Connection| connection.shared.borrow().growth;
        let (sender, answer) = client.open(b"bulk", false).unwrap();
        let (_, _reply, mut request) = accept(&server).await;
        let sending = spawn_local(async move {
            sender.data(Bytes::from(vec![1u8; 4 << 20])).await.unwrap();
            sender.end();
        });
        let mut read = 0;
        while let Event::Data(bytes) = request.next().await {
            read += bytes.len();
        }
        assert_eq!(read, 4 << 20);
        assert_eq!(growth(&server), CONNECTION_GROWTH - (MAX_STREAM_CREDIT - STREAM_CREDIT));
        sending.await.unwrap();
        drop((request, answer));
        assert_eq!(growth(&server), CONNECTION_GROWTH);
    });
}

#[test]
fn a_reset_says_why_to_both_halves() {
    local(async {
        let (client, server) = pair();
        let (sender, mut receiver) = client.open(b"", false).unwrap();
        let (_, answer, _request) = accept(&server).await;
        answer.reset(Code::NotProcessed);
        assert_eq!(receiver.next().await, Event::Reset(Code::NotProcessed));
        assert_eq!(sender.data(Bytes::from_static(b"x")).await, Err(StreamError::Reset(Code::NotProcessed)));
        assert_eq!(client.active(), 0);
    });
}

#[test]
fn a_lost_connection_ends_every_stream() {
    local(async {
        let (a, b) = duplex(1024);
        let client = Connection::new(Role::Client);
        spawn_local(drive(client.clone(), a));
        let (_sender, mut receiver) = client.open(b"head", true).unwrap();
        drop(b);
        assert_eq!(receiver.next().await, Event::Lost);
        assert!(client.open(b"", true).is_err());
    });
}

#[test]
fn draining_ends_what_runs_and_opens_nothing_new() {
    local(async {
        let (client, server) = pair();
        let (_sender, mut receiver) = client.open(b"head", true).unwrap();
        let (_, answer, _request) = accept(&server).await;
        server.drain();
        answer.head(b"ok", true);
        assert_eq!(receiver.next().await, Event::Head(Bytes::from_static(b"ok")));
        assert_eq!(receiver.next().await, Event::End);
        assert!(client.open(b"", true).is_err());
    });
}

#[test]
fn peers_that_break_the_rules_lose_their_connection() {
    let frames = |build: &dyn Fn(&mut BytesMut)| {
        let mut bytes = BytesMut::new();
        build(&mut bytes);
        bytes
    };
    let cases: [(&str, BytesMut); 8] = [
        ("an even stream", frames(&|out| frame::encode(out, Kind::Open, 0, 2, b""))),
        (
            "a stream that goes back",
            frames(&|out| {
                frame::encode(out, Kind::Open, frame::END, 3, b"\0");
                frame::encode(out, Kind::Open, frame::END, 1, b"\0");
            }),
        ),
        (
            "more than was granted",
            frames(&|out| {
                frame::encode(out, Kind::Open, 0, 1, b"\0");
                for _ in 0..=STREAM_CREDIT / 16_000 {
                    frame::encode(out, Kind::Data, 0, 1, &[0; 16_000]);
                }
            }),
        ),
        (
            "credit that overflows",
            frames(&|out| {
                frame::encode(out, Kind::Credit, 0, 0, &u32::MAX.to_be_bytes());
                frame::encode(out, Kind::Credit, 0, 0, &u32::MAX.to_be_bytes());
            }),
        ),
        (
            "too many streams",
            frames(&|out| {
                for number in 0..=MAX_STREAMS as u32 {
                    frame::encode(out, Kind::Open, 0, number * 2 + 1, b"\0");
                }
            }),
        ),
        (
            "a head without end",
            frames(&|out| {
                for _ in 0..4 {
                    frame::encode(out, Kind::Open, frame::MORE, 1, &[0; 16_000]);
                }
            }),
        ),
        (
            "bytes after the end",
            frames(&|out| {
                frame::encode(out, Kind::Open, frame::END, 1, b"\0");
                frame::encode(out, Kind::Data, 0, 1, b"more");
            }),
        ),
        (
            "a flood of pings",
            frames(&|out| {
                for _ in 0..30_000 {
                    frame::encode(out, Kind::Ping, frame::ACK, 0, b"12345678");
                }
            }),
        ),
    ];
    for (what, bytes) in cases {
        local(async {
            let (mut peer, driver) = raw();
            peer.write_all(&bytes).await.unwrap();
            assert!(driver.await.unwrap().is_err(), "{what} was accepted");
        });
    }
}

#[test]
fn a_stream_of_heads_that_nobody_reads_is_reset_and_the_others_go_on() {
    local(async {
        let (client, server) = pair();
        let (_sender, mut many) = client.open(b"many", true).unwrap();
        let (_other, mut quick) = client.open(b"quick", true).unwrap();
        let (_, heads, _a) = accept(&server).await;
        let (_, answer, _b) = accept(&server).await;
        (0..30).for_each(|_| heads.head(b"interim", false));
        answer.head(b"ok", true);
        assert_eq!(quick.next().await, Event::Head(Bytes::from_static(b"ok")));
        let mut last = many.next().await;
        while let Event::Head(_) = last {
            last = many.next().await;
        }
        assert_eq!(last, Event::Reset(Code::FlowControl));
    });
}

#[test]
fn pings_are_answered() {
    local(async {
        let (mut peer, _driver) = raw();
        let mut ping = BytesMut::new();
        frame::encode(&mut ping, Kind::Ping, 0, 0, b"abcdefgh");
        peer.write_all(&ping).await.unwrap();
        let mut answer = [0; 16];
        peer.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, *b"\0\x08\x07\x01\0\0\0\0abcdefgh");
    });
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig { cases: 300, ..Default::default() })]
    /// Whatever frames a peer sends, in whatever order: an error or not, never a panic, and the driver's memory
    /// stays within what was granted.
    #[test]
    fn no_sequence_of_frames_breaks_a_connection(
        frames in proptest::collection::vec((1u8..10, 0u8..4, 0u32..8, 0usize..3000), 0..60),
    ) {
        local(async move {
            let (mut peer, driver) = raw();
            let mut bytes = BytesMut::new();
            for (kind, flags, stream, length) in frames {
                let length = match kind { 5 | 6 => 4, 7 => 8, 8 => 0, _ => length };
                bytes.extend_from_slice(&(length as u16).to_be_bytes());
                bytes.extend_from_slice(&[kind, flags]);
                bytes.extend_from_slice(&stream.to_be_bytes());
                bytes.extend(std::iter::repeat_n(1u8, length));
            }
            let _ = peer.write_all(&bytes).await;
            drop(peer);
            let _ = timeout(Duration::from_secs(5), driver).await.expect("the driver hangs").expect("it panicked");
        });
    }
}
