//! Two ends of a connection in one process.

mod suspect;

use std::future::poll_fn;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};
use tulle_mesh::wire::frame::{self, Code, Frame, Kind};
use tulle_mesh::wire::{CONNECTION_GROWTH, MAX_STREAM_CREDIT, MAX_STREAMS, STREAM_CREDIT};

use super::connection::{OUTPUT, SMALL_OUTPUT, TURN};
use super::driver::DriveError;
use super::*;

/// Runs a test on one thread, as a worker does, and for at most ten seconds.
fn local(test: impl Future<Output = ()>) {
    run(false, Duration::from_secs(10), test);
}

/// The same with a clock that runs ahead whenever everybody waits.
fn paused(test: impl Future<Output = ()>) {
    run(true, Duration::from_secs(600), test);
}

fn run(paused: bool, limit: Duration, test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(paused).build().unwrap();
    LocalSet::new().block_on(&runtime, async { timeout(limit, test).await.expect("it hangs") });
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
fn raw() -> (DuplexStream, tokio::task::JoinHandle<Result<(), DriveError>>) {
    let (peer, _, driver) = raw_peer(Role::Server, 1 << 20);
    (peer, driver)
}

/// One end whose peer is raw bytes, on a connection that takes this many at once.
fn raw_peer(
    role: Role,
    room: usize,
) -> (DuplexStream, Connection, tokio::task::JoinHandle<Result<(), DriveError>>) {
    let (peer, ours) = duplex(room);
    let connection = Connection::new(role);
    let driver = spawn_local(drive(connection.clone(), ours));
    (peer, connection, driver)
}

async fn next_frame(peer: &mut DuplexStream, read: &mut BytesMut) -> Frame {
    loop {
        if let Some(frame) = frame::decode(read).unwrap() {
            return frame;
        }
        assert!(peer.read_buf(read).await.unwrap() > 0, "the connection was closed");
    }
}

/// Opens these streams and grants as much as fits.
async fn ask(peer: &mut DuplexStream, streams: impl Iterator<Item = u32>) {
    let mut bytes = BytesMut::new();
    let much = (1u32 << 30).to_be_bytes();
    for stream in streams {
        frame::encode(&mut bytes, Kind::Open, frame::END, stream, b"\0");
        frame::encode(&mut bytes, Kind::Credit, 0, stream, &much);
    }
    frame::encode(&mut bytes, Kind::Credit, 0, 0, &much);
    peer.write_all(&bytes).await.unwrap();
}

fn waiting(connection: &Connection) -> usize {
    connection.shared.borrow().waiting()
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
        while read < 4 << 20 {
            let Event::Data(bytes) = request.next().await else { panic!("it broke off") };
            read += bytes.len();
        }
        assert_eq!(growth(&server), CONNECTION_GROWTH - (MAX_STREAM_CREDIT - STREAM_CREDIT));
        sending.await.unwrap();
        assert_eq!(request.next().await, Event::End);
        assert_eq!(growth(&server), CONNECTION_GROWTH);
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
                for _ in 0..5 {
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

#[test]
fn a_peer_that_grants_credit_and_does_not_read_fills_no_buffer() {
    local(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 4096);
        ask(&mut peer, [1].into_iter()).await;
        let (_, answer, _request) = accept(&server).await;
        let sending = spawn_local(async move {
            answer.data(Bytes::from(vec![1; 4 << 20])).await.unwrap();
            answer.end();
        });
        sleep(Duration::from_millis(100)).await;
        assert!(!sending.is_finished());
        let held = waiting(&server);
        assert!((OUTPUT..OUTPUT + TURN + 1024).contains(&held), "{held} bytes wait");
        let (mut read, mut seen) = (BytesMut::new(), 0);
        while seen < 4 << 20 {
            seen += next_frame(&mut peer, &mut read).await.payload.len();
        }
        sending.await.unwrap();
    });
}

#[test]
fn pings_of_a_peer_that_does_not_read_are_not_answered_without_end() {
    local(async {
        let (mut peer, server, driver) = raw_peer(Role::Server, 4096);
        let mut pings = BytesMut::new();
        (0..19_000).for_each(|_| frame::encode(&mut pings, Kind::Ping, 0, 0, b"12345678"));
        peer.write_all(&pings).await.unwrap();
        sleep(Duration::from_millis(50)).await;
        assert!(!driver.is_finished());
        assert!(waiting(&server) <= SMALL_OUTPUT + 16, "{} bytes wait", waiting(&server));
    });
}

#[test]
fn streams_take_turns_and_a_small_answer_does_not_wait_for_all_of_them() {
    local(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 16 * 1024);
        ask(&mut peer, [1, 3, 5, 7].into_iter()).await;
        for _ in 0..4 {
            let (_, answer, request) = accept(&server).await;
            spawn_local(async move {
                let _request = request;
                answer.data(Bytes::from(vec![1; 4 << 20])).await
            });
        }
        let (mut read, mut shares) = (BytesMut::new(), [0usize; 4]);
        while shares.iter().sum::<usize>() < 2 << 20 {
            let frame = next_frame(&mut peer, &mut read).await;
            shares[frame.stream as usize / 2] += frame.payload.len();
        }
        assert!(shares.iter().all(|share| *share > 256 * 1024), "{shares:?}");
        ask(&mut peer, [9].into_iter()).await;
        let (_, quick, _request) = accept(&server).await;
        quick.head(b"ok", false);
        quick.data(Bytes::from_static(b"small")).await.unwrap();
        let mut before = 0;
        loop {
            let frame = next_frame(&mut peer, &mut read).await;
            if frame.stream == 9 && frame.kind == Kind::Data {
                break;
            }
            before += frame.payload.len();
        }
        assert!(before < OUTPUT + TURN + 64 * 1024, "{before} bytes came first");
    });
}

#[test]
fn a_sender_that_gives_up_while_it_waits_lets_the_others_go_on() {
    local(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 4096);
        ask(&mut peer, [1, 3, 5].into_iter()).await;
        let mut senders = Vec::new();
        for _ in 0..3 {
            let (_, answer, request) = accept(&server).await;
            senders.push(spawn_local(async move {
                let _request = request;
                answer.data(Bytes::from(vec![1; 1 << 20])).await.unwrap();
                answer.end();
            }));
        }
        sleep(Duration::from_millis(50)).await;
        senders.remove(0).abort();
        let (mut read, mut ended) = (BytesMut::new(), 0);
        while ended < 2 {
            let frame = next_frame(&mut peer, &mut read).await;
            ended += usize::from(frame.kind == Kind::Data && frame.flags & frame::END != 0);
        }
    });
}

/// Waits until the connection has read everything that was sent to it: a ping is answered behind all of it.
async fn all_is_read(peer: &mut DuplexStream) {
    let mut ping = BytesMut::new();
    frame::encode(&mut ping, Kind::Ping, 0, 0, b"all read");
    peer.write_all(&ping).await.unwrap();
    let mut read = BytesMut::new();
    while next_frame(peer, &mut read).await.kind != Kind::Ping {}
}

#[test]
fn bytes_that_come_one_by_one_are_joined_while_nobody_reads_them() {
    local(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 1 << 20);
        let mut bytes = BytesMut::new();
        frame::encode(&mut bytes, Kind::Open, 0, 1, b"\0");
        (0..10_000u32).for_each(|n| frame::encode(&mut bytes, Kind::Data, 0, 1, &[n as u8]));
        frame::encode(&mut bytes, Kind::Data, frame::END, 1, &[]);
        peer.write_all(&bytes).await.unwrap();
        all_is_read(&mut peer).await;
        let (_, _answer, mut request) = accept(&server).await;
        let (mut pieces, mut whole) = (0, Vec::new());
        while let Event::Data(bytes) = request.next().await {
            pieces += 1;
            whole.extend_from_slice(&bytes);
        }
        assert_eq!(whole, (0..10_000u32).map(|n| n as u8).collect::<Vec<u8>>());
        assert!(pieces <= 3, "{pieces} pieces");
    });
}

#[test]
fn a_stream_that_is_reset_before_anybody_looked_at_it_is_not_accepted() {
    local(async {
        let (mut peer, server, _driver) = raw_peer(Role::Server, 1 << 20);
        let mut bytes = BytesMut::new();
        for stream in (1..2_000).step_by(2) {
            frame::encode(&mut bytes, Kind::Open, frame::END, stream, b"\0gone");
            frame::encode(&mut bytes, Kind::Reset, 0, stream, &Code::Cancel.to_u32().to_be_bytes());
        }
        frame::encode(&mut bytes, Kind::Open, frame::END, 2_001, b"\0here");
        peer.write_all(&bytes).await.unwrap();
        all_is_read(&mut peer).await;
        let (head, answer, _request) = accept(&server).await;
        assert_eq!(&head[..], b"\0here");
        assert_eq!(server.active(), 1);
        let gone = spawn_local(async move { answer.gone().await });
        let mut reset = BytesMut::new();
        frame::encode(&mut reset, Kind::Reset, 0, 2_001, &Code::Cancel.to_u32().to_be_bytes());
        peer.write_all(&reset).await.unwrap();
        gone.await.unwrap();
        assert_eq!(server.active(), 0);
    });
}

#[test]
fn a_peer_that_is_silent_while_a_stream_waits_is_given_up_within_seconds() {
    paused(async {
        let (mut peer, client, driver) = raw_peer(Role::Client, 1 << 20);
        let since = Instant::now();
        let (_sender, mut receiver) = client.open(b"head", true).unwrap();
        let mut read = BytesMut::new();
        while next_frame(&mut peer, &mut read).await.kind != Kind::Ping {}
        assert!((3..5).contains(&since.elapsed().as_secs()), "pinged after {:?}", since.elapsed());
        assert_eq!(receiver.next().await, Event::Lost);
        assert!((8..11).contains(&since.elapsed().as_secs()), "given up after {:?}", since.elapsed());
        assert!(matches!(driver.await.unwrap(), Err(DriveError::Silent)));
    });
}

#[test]
fn a_peer_is_not_given_up_for_the_time_that_this_process_stood_still() {
    paused(async {
        let (mut peer, client, driver) = raw_peer(Role::Client, 1 << 20);
        let (_sender, _receiver) = client.open(b"head", true).unwrap();
        let mut read = BytesMut::new();
        while next_frame(&mut peer, &mut read).await.kind != Kind::Ping {}
        // The whole node was paused.
        tokio::time::advance(Duration::from_secs(30)).await;
        sleep(Duration::from_secs(1)).await;
        let mut answer = BytesMut::new();
        frame::encode(&mut answer, Kind::Ping, frame::ACK, 0, b"tulle/1?");
        peer.write_all(&answer).await.unwrap();
        sleep(Duration::from_secs(1)).await;
        assert!(!driver.is_finished());
    });
}

#[test]
fn a_peer_that_answers_pings_is_kept_however_long_a_stream_waits() {
    paused(async {
        let (mut peer, client, driver) = raw_peer(Role::Client, 1 << 20);
        let (_sender, _receiver) = client.open(b"head", true).unwrap();
        let (mut read, since) = (BytesMut::new(), Instant::now());
        let mut pings = 0;
        while since.elapsed() < Duration::from_secs(60) {
            if next_frame(&mut peer, &mut read).await.kind == Kind::Ping {
                pings += 1;
                let mut answer = BytesMut::new();
                frame::encode(&mut answer, Kind::Ping, frame::ACK, 0, b"tulle/1?");
                peer.write_all(&answer).await.unwrap();
            }
        }
        assert!(!driver.is_finished());
        assert!((12..=21).contains(&pings), "{pings} pings in a minute");
    });
}

#[test]
fn an_idle_connection_is_pinged_seldom_and_holds_no_buffers() {
    paused(async {
        let (mut peer, client, _driver) = raw_peer(Role::Client, 1 << 20);
        let mut read = BytesMut::new();
        // Twice: there are two buffers, one of which is filled while the other is written.
        for _ in 0..2 {
            let (sender, receiver) = client.open(b"head", false).unwrap();
            sender.data(Bytes::from(vec![1; 60_000])).await.unwrap();
            drop((sender, receiver));
            while next_frame(&mut peer, &mut read).await.kind != Kind::Reset {}
        }
        let since = Instant::now();
        assert!(client.shared.borrow().out.held() > 0);
        sleep(Duration::from_secs(5)).await;
        assert_eq!(client.shared.borrow().out.held(), 0);
        assert_eq!(next_frame(&mut peer, &mut read).await.kind, Kind::Ping);
        assert!((14..17).contains(&since.elapsed().as_secs()), "pinged after {:?}", since.elapsed());
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
