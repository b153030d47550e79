//! Attempts between a client and a server over loopback.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tulle_mesh::wire::STREAM_CREDIT;

use super::answer::Refused;
use super::*;
use crate::http1::conn::split;

const PATIENCE: Duration = Duration::from_secs(5);

/// Both ends of a connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

/// A client that has sent this, its end of the connection, and the request's head at ours.
pub(super) async fn client(sent: &[u8]) -> (TcpStream, Reader, Writer, Head) {
    let (mut far, near) = pair().await;
    far.write_all(sent).await.unwrap();
    let (mut reader, writer) = split(near, BytesMut::new());
    let head = reader.request().await.unwrap().unwrap();
    (far, reader, writer, head)
}

/// An exchange with a server, and the server's end of it.
pub(super) async fn server(call: &Call<'_>) -> (TcpStream, Exchange) {
    let (near, far) = pair().await;
    let (reader, writer) = split(near, BytesMut::new());
    (far, http1_exchange(reader, writer, &call.head, false))
}

/// Reads until what has come ends like this.
pub(super) async fn read_until(stream: &mut TcpStream, end: &[u8]) -> String {
    let mut read = Vec::new();
    let reading = async {
        while !read.ends_with(end) {
            let byte = stream.read_u8().await.unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&read));
            });
            read.push(byte);
        }
    };
    timeout(PATIENCE, reading).await.expect("it never came");
    String::from_utf8(read).unwrap()
}

/// Waits for as long as it takes.
pub(super) const ANY: AttemptPolicy<'static> = AttemptPolicy {
    deadline: None,
    cutoff: None,
    idle: None,
    refuses_claims: false,
    compared: true,
    refuses: None,
};

#[tokio::test]
async fn what_may_be_repeated_depends_on_what_was_read_and_on_the_method() {
    let ends = [
        End::NotProcessed(Failure::UpstreamNotProcessed),
        End::Unread(Failure::UpstreamReset),
        End::Reset(Failure::UpstreamReset),
        End::Unanswered(Failure::UpstreamReset),
        End::Final(Failure::UpstreamBadResponse("a head")),
        End::Client(Failure::ClientGone),
        End::Delivered(Ok(503)),
        End::Refused(503),
    ];
    let body = STREAM_CREDIT as usize + 1;
    let table = [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), [true, true, true, true]),
        ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok".to_owned(), [true, true, true, true]),
        ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nok".to_owned(), [true, true, false, false]),
        ("PATCH / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), [true, true, false, false]),
        ("get / HTTP/1.1\r\nHost: a\r\n\r\n".to_owned(), [true, true, false, false]),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n".to_owned(),
            [true, true, false, false],
        ),
        (
            format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {body}\r\n\r\n{}", "x".repeat(body)),
            [false, false, false, false],
        ),
    ];
    for (request, expected) in table {
        let (_client, mut reader, mut writer, head) = client(request.as_bytes()).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        // The server reads everything and says nothing.
        let reads = async {
            let mut room = [0; 16 * 1024];
            while matches!(timeout(Duration::from_millis(50), far.read(&mut room)).await, Ok(Ok(1..))) {}
        };
        let policy = AttemptPolicy { deadline: Some(Instant::now() + Duration::from_millis(150)), ..ANY };
        let (attempt, ()) = tokio::join!(run(&mut call, exchange, &policy), reads);
        assert_eq!(attempt.end, End::Final(Failure::DeadlineExceeded));
        let seen: Vec<bool> = ends.iter().map(|end| end.may_repeat(&call)).collect();
        let first = request.lines().next().unwrap_or_default();
        assert_eq!(seen, [&expected[..], &[false; 4]].concat(), "{first}, {} bytes", request.len());
    }
}

#[tokio::test]
async fn what_the_client_still_sends_before_the_answer_is_not_the_applications_time() {
    let (mut asking, mut reader, mut writer, head) =
        client(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n").await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let answers = async {
        read_until(&mut far, b"\r\n\r\n").await;
        let body_at = Instant::now();
        asking.write_all(b"hello").await.unwrap();
        read_until(&mut far, b"hello").await;
        far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        body_at
    };
    let (attempt, body_at) = tokio::join!(run(&mut call, exchange, &ANY), answers);
    assert_eq!(attempt.end, End::Delivered(Ok(204)));
    assert!(attempt.sent_at >= Some(body_at) && attempt.sent_at <= attempt.head_at, "{attempt:?}");
}

#[tokio::test]
async fn of_a_stream_what_was_said_before_the_answer_counts_and_nothing_behind_it() {
    let (mut asking, mut reader, mut writer, head) =
        client(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let talks = async {
        read_until(&mut far, b"\r\n\r\n").await;
        let first_at = Instant::now();
        asking.write_all(b"5\r\nhello\r\n").await.unwrap();
        read_until(&mut far, b"hello\r\n").await;
        far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n").await.unwrap();
        read_until(&mut asking, b"\r\n\r\n").await;
        asking.write_all(b"0\r\n\r\n").await.unwrap();
        read_until(&mut far, b"0\r\n\r\n").await;
        far.write_all(b"ok").await.unwrap();
        first_at
    };
    let (attempt, first_at) = tokio::join!(run(&mut call, exchange, &ANY), talks);
    assert_eq!(attempt.end, End::Delivered(Ok(200)));
    assert!(attempt.sent_at >= Some(first_at) && attempt.sent_at <= attempt.head_at, "{attempt:?}");
}

#[tokio::test]
async fn a_deadline_that_passes_loses_nothing_of_the_request() {
    let sent = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
    let (mut asking, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (_silent, exchange) = server(&call).await;
    let policy = AttemptPolicy { deadline: Some(Instant::now() + Duration::from_millis(20)), ..ANY };
    let attempt = run(&mut call, exchange, &policy).await;
    assert_eq!(attempt.end, End::Final(Failure::DeadlineExceeded));
    let (mut far, exchange) = server(&call).await;
    let answers = async {
        let request = read_until(&mut far, b"hello").await;
        far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        request
    };
    let (attempt, request) = tokio::join!(run(&mut call, exchange, &ANY), answers);
    assert!(request.starts_with("POST / HTTP/1.1\r\n"), "{request}");
    assert_eq!((attempt.end, attempt.bytes), (End::Delivered(Ok(200)), (5, 2)));
    assert!(attempt.idle.is_some() && attempt.client_reusable);
    read_until(&mut asking, b"\r\n\r\nok").await;
}

#[tokio::test]
async fn a_body_is_sent_to_its_end_also_behind_an_answer_that_does_not_refuse_it() {
    for (framing, body, end) in [
        ("Content-Length: 5", &b"hello"[..], &b"hello"[..]),
        ("Transfer-Encoding: chunked", &b"5\r\nhello\r\n0\r\n\r\n"[..], &b"0\r\n\r\n"[..]),
    ] {
        let sent = format!("POST / HTTP/1.1\r\nHost: a\r\n{framing}\r\n\r\n");
        let (mut asking, mut reader, mut writer, head) = client(sent.as_bytes()).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let talks = async {
            read_until(&mut far, b"\r\n\r\n").await;
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            let answer = read_until(&mut asking, b"\r\n\r\nok").await;
            asking.write_all(body).await.unwrap();
            read_until(&mut far, end).await;
            answer.to_lowercase()
        };
        let (attempt, answer) = tokio::join!(run(&mut call, exchange, &ANY), talks);
        assert_eq!((attempt.end, attempt.bytes), (End::Delivered(Ok(200)), (5, 2)), "{framing}");
        assert!(attempt.client_reusable, "{framing}");
        assert!(attempt.idle.is_none(), "{framing}: what the server has not read could become a request");
        assert!(!answer.contains("connection: close"), "{answer}");
    }
}

#[tokio::test]
async fn behind_an_early_answer_whoever_leaves_ends_the_upload_and_the_answer_stays_whole() {
    for leaves in ["server", "client", "nobody"] {
        let sent = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe";
        let (mut asking, mut reader, mut writer, head) = client(sent).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let talks = async move {
            read_until(&mut far, b"\r\n\r\nhe").await;
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            read_until(&mut asking, b"\r\n\r\nok").await;
            match leaves {
                "server" => vec![asking],
                "client" => vec![far],
                _ => vec![asking, far],
            }
        };
        let idle = (leaves == "nobody").then_some(Duration::from_millis(200));
        let policy = AttemptPolicy { idle, ..ANY };
        let both = async { tokio::join!(run(&mut call, exchange, &policy), talks) };
        let (attempt, _who_stays) = timeout(PATIENCE, both).await.expect(leaves);
        assert_eq!((attempt.end, attempt.bytes), (End::Delivered(Ok(200)), (2, 2)), "{leaves}");
        assert!(!attempt.client_reusable && attempt.idle.is_none(), "{leaves}");
    }
}

#[tokio::test]
async fn an_upgrade_sends_its_body_first_and_then_bytes_both_ways() {
    let sent = b"POST /exec HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\nContent-Length: 2\r\n\r\n{}";
    let (mut asking, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let answers = async move {
        let request = read_until(&mut far, b"\r\n\r\n{}").await;
        far.write_all(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello ")
            .await
            .unwrap();
        assert_eq!(read_until(&mut far, b"ping").await, "ping");
        far.write_all(b"pong").await.unwrap();
        assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0, "the client's end passes on");
        far.write_all(b" bye").await.unwrap();
        request
    };
    let asks = async {
        let head = read_until(&mut asking, b"hello ").await;
        asking.write_all(b"ping").await.unwrap();
        read_until(&mut asking, b"pong").await;
        asking.shutdown().await.unwrap();
        read_until(&mut asking, b" bye").await;
        head
    };
    let (attempt, request, head) = tokio::join!(run(&mut call, exchange, &ANY), answers, asks);
    assert!(request.to_lowercase().contains("upgrade: tcp\r\n"), "{request}");
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!((attempt.end, attempt.bytes), (End::Delivered(Ok(101)), (6, 14)));
}

#[tokio::test]
async fn a_server_that_breaks_a_tunnel_off_has_failed_and_a_client_or_a_forward_proxy_has_not() {
    const UPGRADE: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n";
    const UPGRADED: &[u8] = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nhello";
    const CONNECT: &[u8] = b"CONNECT b:443 HTTP/1.1\r\nHost: b:443\r\n\r\n";
    const CONNECTED: &[u8] = b"HTTP/1.1 200 OK\r\n\r\nhello";
    for (asked, granted, by_server, expected) in [
        (UPGRADE, UPGRADED, true, Err(Failure::UpstreamReset)),
        (UPGRADE, UPGRADED, false, Ok(101)),
        (CONNECT, CONNECTED, true, Ok(200)),
        (CONNECT, CONNECTED, false, Ok(200)),
    ] {
        let (mut asking, mut reader, mut writer, head) = client(asked).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let ends = async {
            far.write_all(granted).await.unwrap();
            read_until(&mut asking, b"hello").await;
            let broken = if by_server { &far } else { &asking };
            socket2::SockRef::from(broken).set_linger(Some(Duration::ZERO)).unwrap();
            // The other one stays.
            if by_server { asking } else { far }
        };
        let (attempt, _other) = tokio::join!(run(&mut call, exchange, &ANY), ends);
        assert_eq!(attempt.end, End::Delivered(expected), "{by_server}");
    }
}

#[tokio::test]
async fn a_request_behind_a_connect_does_not_name_its_client_to_a_server_that_is_no_proxy() {
    for (refuses_claims, passes) in [(true, false), (false, true)] {
        let sent = b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n\
            GET /x HTTP/1.1\r\nHost: a\r\ntulle-client-id: spiffe://forged\r\n\r\n";
        let (mut asking, mut reader, mut writer, head) = client(sent).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let answers = async move {
            read_until(&mut far, b"\r\n\r\n").await;
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
            let mut rest = Vec::new();
            let _ = far.read_to_end(&mut rest).await;
            rest
        };
        asking.shutdown().await.unwrap();
        let policy = AttemptPolicy { refuses_claims, ..ANY };
        let (attempt, rest) = tokio::join!(run(&mut call, exchange, &policy), answers);
        let rest = String::from_utf8(rest).unwrap();
        assert!(rest.ends_with("forged\r\n\r\n"), "{rest}");
        assert_eq!(rest.contains("tulle-client-id"), passes, "{rest}");
        assert_eq!(attempt.end, End::Delivered(Ok(200)));
    }
}

#[tokio::test]
async fn trailers_name_no_client_to_the_server() {
    let sent = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
        0\r\nTulle_Client-Id: spiffe://forged\r\nX-Sum: 7\r\n\r\n";
    let (_client, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let answers = async {
        let request = read_until(&mut far, b"7\r\n\r\n").await;
        far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        request
    };
    let (_, request) = tokio::join!(run(&mut call, exchange, &ANY), answers);
    assert!(!request.contains("forged"), "{request}");
}

#[tokio::test]
async fn a_declined_upgrade_is_an_ordinary_answer() {
    let sent = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n";
    let (mut asking, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    far.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
    let attempt = run(&mut call, exchange, &ANY).await;
    assert_eq!(attempt.end, End::Delivered(Ok(404)));
    assert!(attempt.client_reusable, "the client may ask for something else");
    assert!(attempt.idle.is_none(), "the server may think otherwise of the connection");
    read_until(&mut asking, b"\r\n\r\nno").await;
}

#[tokio::test]
async fn a_101_that_nobody_asked_for_is_not_passed_on() {
    let (_client, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let granted = b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n";
    far.write_all(granted).await.unwrap();
    let attempt = run(&mut call, exchange, &ANY).await;
    assert!(matches!(attempt.end, End::Final(Failure::UpstreamBadResponse(_))), "{:?}", attempt.end);
}

#[tokio::test]
async fn a_body_in_chunks_before_a_tunnel_is_gathered_up_to_64_kib() {
    let table: [(usize, _, &[u8]); 3] = [
        (5, (true, Framing::Length(10)), b"xxxxxxxxxx"),
        (40 * 1024, (false, Framing::Chunked), b"\r\n0\r\n\r\n"),
        (0, (true, Framing::Length(0)), b"\r\n\r\n"),
    ];
    for (chunk, expected, end) in table {
        let mut sent = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\
            Transfer-Encoding: chunked\r\n\r\n"
            .to_vec();
        for _ in 0..chunk.min(2) {
            sent.extend_from_slice(format!("{chunk:x}\r\n{}\r\n", "x".repeat(chunk)).as_bytes());
        }
        sent.extend_from_slice(b"0\r\n\r\n");
        let (_client, mut reader, mut writer, head) = client(&sent).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        call.prepare().await.unwrap();
        assert_eq!((call.head.upgrade, call.head.framing), expected);
        let (mut far, exchange) = server(&call).await;
        let answers = async {
            let request = read_until(&mut far, end).await;
            far.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            request
        };
        let (attempt, request) = tokio::join!(run(&mut call, exchange, &ANY), answers);
        assert_eq!((attempt.end, attempt.bytes.0), (End::Delivered(Ok(204)), 2 * chunk as u64));
        assert_eq!(request.matches('x').count(), 2 * chunk);
        assert_eq!(request.to_lowercase().contains("upgrade: tcp\r\n"), expected.0, "{chunk}");
    }
}

#[tokio::test]
async fn a_client_that_has_left_ends_the_wait_for_the_answer() {
    let (asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (_silent, exchange) = server(&call).await;
    socket2::SockRef::from(&asking).set_linger(Some(Duration::ZERO)).unwrap();
    drop(asking);
    let attempt = timeout(PATIENCE, run(&mut call, exchange, &ANY)).await.unwrap();
    assert_eq!(attempt.end, End::Client(Failure::ClientGaveUp));
}

#[tokio::test]
async fn an_answer_of_ours_to_head_has_no_body() {
    for (method, bodiless) in [("HEAD", true), ("GET", false)] {
        let sent = format!("{method} / HTTP/1.1\r\nHost: a\r\n\r\n");
        let (mut asking, mut reader, mut writer, head) = client(sent.as_bytes()).await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let refused = Refused { failure: &Failure::UpstreamNone, denial: None, keep: false };
        call.answer.fail_request(&call.head, refused, None).await;
        drop(call);
        drop((reader, writer));
        let mut answer = String::new();
        asking.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.contains("tulle-reason: UpstreamNone\r\n"), "{answer}");
        assert_eq!(answer.ends_with("\r\n\r\n"), bodiless, "{answer}");
    }
}

#[tokio::test]
async fn a_server_that_closes_its_connection_closes_its_clients() {
    for (closing, kept) in [("", true), ("Connection: close\r\n", false)] {
        let (mut asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let answers = async {
            read_until(&mut far, b"\r\n\r\n").await;
            let answer = format!("HTTP/1.1 200 OK\r\n{closing}Content-Length: 2\r\n\r\nok");
            far.write_all(answer.as_bytes()).await.unwrap();
        };
        let (attempt, ()) = tokio::join!(run(&mut call, exchange, &ANY), answers);
        assert_eq!(attempt.client_reusable, kept);
        let seen = read_until(&mut asking, b"ok").await.to_lowercase();
        assert_eq!(seen.contains("connection: close"), !kept, "{seen}");
    }
}

#[tokio::test]
async fn an_attempt_that_is_cut_off_says_so_and_the_end_of_the_requests_time_is_another_matter() {
    let soon = Duration::from_millis(20);
    for (cutoff, deadline, expected) in [
        (Some(soon), None, Failure::UpstreamTimeout),
        (Some(soon), Some(soon * 10), Failure::UpstreamTimeout),
        (Some(soon * 10), Some(soon), Failure::DeadlineExceeded),
        (None, Some(soon), Failure::DeadlineExceeded),
    ] {
        let (_asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (_silent, exchange) = server(&call).await;
        let at = |after: Option<Duration>| after.map(|after| Instant::now() + after);
        let policy = AttemptPolicy { deadline: at(deadline), cutoff: at(cutoff), ..ANY };
        let attempt = run(&mut call, exchange, &policy).await;
        assert_eq!(attempt.end, End::Final(expected));
    }
}

#[tokio::test]
async fn an_answer_that_is_refused_does_not_reach_the_client_and_the_request_goes_whole_once_more() {
    let sent = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
    let (mut asking, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let refuses = |head: &Head, _: &Report| head.status() == 503;
    let policy = AttemptPolicy { refuses: Some(&refuses), ..ANY };
    for (status, expected) in [(503, End::Refused(503)), (200, End::Delivered(Ok(200)))] {
        let (mut far, exchange) = server(&call).await;
        let answers = async {
            read_until(&mut far, b"hello").await;
            let answer = format!("HTTP/1.1 {status} x\r\nContent-Length: 3\r\n\r\n{status}");
            far.write_all(answer.as_bytes()).await.unwrap();
        };
        let (attempt, ()) = tokio::join!(run(&mut call, exchange, &policy), answers);
        assert_eq!((attempt.end, attempt.status), (expected, Some(status)));
    }
    let seen = read_until(&mut asking, b"\r\n\r\n200").await;
    assert!(!seen.contains("503"), "{seen}");
}

#[tokio::test]
async fn a_request_that_is_too_long_to_be_kept_has_the_answer_that_it_gets() {
    let body = STREAM_CREDIT as usize + 1;
    let sent = format!("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: {body}\r\n\r\n{}", "x".repeat(body));
    let (mut asking, mut reader, mut writer, head) = client(sent.as_bytes()).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let refuses = |_: &Head, _: &Report| true;
    let policy = AttemptPolicy { refuses: Some(&refuses), ..ANY };
    let (mut far, exchange) = server(&call).await;
    let answers = async {
        let mut left = body;
        read_until(&mut far, b"\r\n\r\n").await;
        while left > 0 {
            left -= far.read(&mut vec![0; left]).await.unwrap();
        }
        far.write_all(b"HTTP/1.1 503 x\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
    };
    let (attempt, ()) = tokio::join!(run(&mut call, exchange, &policy), answers);
    assert_eq!(attempt.end, End::Delivered(Ok(503)));
    read_until(&mut asking, b"\r\n\r\nno").await;
}

#[tokio::test]
async fn an_answer_on_which_nothing_moves_is_ended_and_one_that_trickles_is_not() {
    let idle = Duration::from_millis(600);
    for stops in [true, false] {
        let (asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        let answers = async {
            read_until(&mut far, b"\r\n\r\n").await;
            far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n").await.unwrap();
            let pieces = if stops { 1 } else { 8 };
            for _ in 0..pieces {
                far.write_all(b"x").await.unwrap();
                tokio::time::sleep(idle / 6).await;
            }
            tokio::time::sleep(idle * 2).await;
        };
        let policy = AttemptPolicy { idle: Some(idle), ..ANY };
        let (attempt, ()) = tokio::join!(run(&mut call, exchange, &policy), answers);
        let expected = if stops { Err(Failure::IdleTimeout) } else { Ok(200) };
        assert_eq!(attempt.end, End::Delivered(expected));
        drop(asking);
    }
}

#[tokio::test]
async fn a_tunnel_on_which_nothing_moves_is_ended() {
    let sent = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
    let (mut asking, mut reader, mut writer, head) = client(sent).await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    let idle = Duration::from_millis(400);
    let answers = async {
        read_until(&mut far, b"\r\n\r\n").await;
        let granted = b"HTTP/1.1 101 x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        far.write_all(granted).await.unwrap();
        for _ in 0..6 {
            far.write_all(b"tick").await.unwrap();
            tokio::time::sleep(idle / 4).await;
        }
        far.read(&mut [0; 1]).await.is_ok_and(|bytes| bytes > 0)
    };
    let ticks = "tick".repeat(6);
    let reads = read_until(&mut asking, ticks.as_bytes());
    let policy = AttemptPolicy { idle: Some(idle), ..ANY };
    let (attempt, more, seen) = tokio::join!(run(&mut call, exchange, &policy), answers, reads);
    assert_eq!(attempt.end, End::Delivered(Err(Failure::IdleTimeout)));
    assert!(!more && seen.ends_with(&ticks), "{seen}");
}

#[tokio::test]
async fn a_cookie_of_the_route_goes_out_with_the_answer() {
    let (mut asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut call = Call::http1(head, &mut reader, &mut writer);
    call.set_cookie = Some(Bytes::from_static(b"tulle-session=a; Path=/"));
    let (mut far, exchange) = server(&call).await;
    far.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    run(&mut call, exchange, &ANY).await;
    let seen = read_until(&mut asking, b"\r\n\r\nok").await;
    assert!(seen.contains("set-cookie: tulle-session=a; Path=/\r\n"), "{seen}");
}

#[tokio::test]
async fn an_answer_that_a_cache_keeps_for_everybody_carries_nobodys_cookie() {
    for (lines, carried) in [
        ("Cache-Control: Public, max-age=60\r\n", false),
        ("Cache-Control: max-age=1\r\nCache-Control: s-maxage = 60\r\n", false),
        ("Cache-Control: private, max-age=60\r\n", true),
        ("Cache-Control: x-public\r\n", true),
    ] {
        let (mut asking, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let mut call = Call::http1(head, &mut reader, &mut writer);
        call.set_cookie = Some(Bytes::from_static(b"version=a"));
        let (mut far, exchange) = server(&call).await;
        let answer = format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: 2\r\n\r\nok");
        far.write_all(answer.as_bytes()).await.unwrap();
        run(&mut call, exchange, &ANY).await;
        let seen = read_until(&mut asking, b"\r\n\r\nok").await;
        assert_eq!(seen.contains("set-cookie: version=a\r\n"), carried, "{lines}");
    }
}

#[tokio::test]
async fn a_copy_whose_answer_stops_in_the_middle_of_its_length_has_failed() {
    let (_client, mut reader, mut writer, head) = client(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let call = Call::http1(head, &mut reader, &mut writer);
    let (mut far, exchange) = server(&call).await;
    far.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf").await.unwrap();
    let ends_by = Instant::now() + progress::STALLED + Duration::from_millis(100);
    let copied = timeout(PATIENCE, send_copy(exchange, &call.head, Bytes::new(), ends_by)).await.unwrap();
    assert_eq!(copied.result, Err(Failure::UpstreamTimeout));
}

#[tokio::test]
async fn a_copy_whose_answer_goes_on_and_on_is_good_as_far_as_it_went() {
    let stream = &b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\na\n\r\n"[..];
    for (answer, result) in [(stream, Ok(200)), (&b""[..], Err(Failure::UpstreamTimeout))] {
        let sent = b"GET /events HTTP/1.1\r\nHost: a\r\n\r\n";
        let (_client, mut reader, mut writer, head) = client(sent).await;
        let call = Call::http1(head, &mut reader, &mut writer);
        let (mut far, exchange) = server(&call).await;
        far.write_all(answer).await.unwrap();
        let ends_by = Instant::now() + Duration::from_millis(200);
        let copied = timeout(PATIENCE, send_copy(exchange, &call.head, Bytes::new(), ends_by)).await.unwrap();
        assert_eq!((copied.result.clone(), copied.head_at.is_some()), (result, !answer.is_empty()));
        assert!(copied.idle.is_none(), "the connection is not used again");
    }
}
