//! What the end of a request or a connection says of the version that it went to, when versions are compared.

use bytes::Bytes;

use super::*;
use crate::telemetry::attempts::{AttemptKey, AttemptTable};

/// What a server does behind its last piece.
#[derive(Clone, Copy, Debug)]
enum Then {
    Stays,
    Closes,
    Resets,
}

/// A server that answers the first words of each connection with these pieces, each after so many milliseconds.
async fn server_of(pieces: &'static [(u64, &'static [u8])], then: Then) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut room = [0; 1024];
                let _ = stream.read(&mut room).await;
                for (pause_ms, piece) in pieces {
                    sleep(Duration::from_millis(*pause_ms)).await;
                    if stream.write_all(piece).await.is_err() {
                        return;
                    }
                }
                match then {
                    Then::Stays => while matches!(stream.read(&mut room).await, Ok(1..)) {},
                    Then::Closes => {}
                    Then::Resets => {
                        // The client reads what came before.
                        sleep(Duration::from_millis(50)).await;
                        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
                    }
                }
            });
        }
    });
    address
}

/// What a version with this server is charged with: attempts and failures, when a client leaves it after so long.
async fn left_after(address: SocketAddr, stay: Duration) -> (u64, u64) {
    let (worker, port) = port_to_one(address).await;
    let (mut client, accepted) = connection().await;
    let served = speak(&worker, &port, Protocol::Http1, accepted, BytesMut::new());
    let asked = async move {
        client.write_all(REQUEST).await.unwrap();
        sleep(stay).await;
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    };
    let _ = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.expect("it ends");
    let seen = evidence(&worker, "new");
    (seen.attempts, seen.failures)
}

#[tokio::test]
async fn an_answer_that_stops_in_the_middle_of_its_length_has_failed_and_one_that_was_left_has_not() {
    const SHORT: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhello";
    const STREAM: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
    const MOVES: &[(u64, &[u8])] = &[(0, SHORT), (800, b"more"), (800, b"more"), (800, b"more")];
    let long = Duration::from_millis(2_300);
    let test = async {
        let stopped = left_after(server_of(&[(0, SHORT)], Then::Stays).await, long);
        let left_early = left_after(server_of(&[(0, SHORT)], Then::Stays).await, Duration::from_millis(200));
        let moving = left_after(server_of(MOVES, Then::Stays).await, long);
        let endless = left_after(server_of(&[(0, STREAM)], Then::Stays).await, long);
        let seen = tokio::join!(stopped, left_early, moving, endless);
        assert_eq!(seen, ((1, 1), (0, 0), (0, 0), (1, 0)));
    };
    LocalSet::new().run_until(test).await;
}

/// A gRPC server that begins each answer with a head and these bytes, and leaves it open.
async fn grpc_server_that_stops(bytes: &'static [u8]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            spawn_local(async move {
                let mut connection = h2::server::handshake(stream).await.unwrap();
                let mut open = Vec::new();
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    let mut body = respond.send_response(::http::Response::new(()), false).unwrap();
                    if !bytes.is_empty() {
                        body.send_data(Bytes::from_static(bytes), false).unwrap();
                    }
                    open.push((request, respond, body));
                }
            });
        }
    });
    address
}

#[tokio::test]
async fn a_grpc_call_without_a_message_by_its_own_deadline_has_failed_and_a_watch_has_not() {
    let test = async {
        for (bytes, stay_ms, expected) in [
            (&b""[..], 300, (1, 1)),
            // Cancelled long before.
            (b"", 30, (1, 0)),
            (b"\0\0\0\0\x01x", 300, (1, 0)),
        ] {
            let (worker, port) = port_to_one(grpc_server_that_stops(bytes).await).await;
            let (client, accepted) = connection().await;
            let served = speak(&worker, &port, Protocol::Http2, accepted, BytesMut::new());
            let asked = async {
                let (send, connection) = h2::client::handshake(client).await.unwrap();
                let connection = spawn_local(connection);
                let mut send = send.ready().await.unwrap();
                let request = ::http::Request::post("http://web/a.B/C")
                    .header("content-type", "application/grpc")
                    .header("grpc-timeout", "300m");
                let (answer, mut body) = send.send_request(request.body(()).unwrap(), false).unwrap();
                body.send_data(Bytes::from_static(b"\0\0\0\0\x01q"), true).unwrap();
                let answer = answer.await.unwrap();
                sleep(Duration::from_millis(stay_ms)).await;
                drop((answer, body));
                // The reset goes out, and is heard.
                sleep(Duration::from_millis(100)).await;
                drop(send);
                connection.abort();
            };
            let _ = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.expect("it ends");
            let seen = evidence(&worker, "new");
            assert_eq!((seen.attempts, seen.failures), expected, "{bytes:?} {stay_ms}");
        }
    };
    LocalSet::new().run_until(test).await;
}

/// What a version with this server is charged with when a client says this and reads to the end. `ends`: its pod does.
async fn read_to_end(address: SocketAddr, ends: bool, protocol: Protocol, words: &[u8]) -> (u64, u64) {
    let (worker, port) = port_to(vec![endpoint(address, "new", ends)]).await;
    let (mut client, accepted) = connection().await;
    let served = speak(&worker, &port, protocol, accepted, BytesMut::new());
    let asked = async move {
        client.write_all(words).await.unwrap();
        let _ = client.read_to_end(&mut Vec::new()).await;
    };
    let _ = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.expect("it ends");
    let seen = evidence(&worker, "new");
    (seen.attempts, seen.failures)
}

#[tokio::test]
async fn a_server_that_hangs_up_on_its_clients_has_failed() {
    const NOTHING: &[(u64, &[u8])] = &[];
    const WORD: &[(u64, &[u8])] = &[(0, b"-ERR busy\r\n")];
    let test = async {
        for (pieces, then, expected) in
            [(NOTHING, Then::Closes, (1, 1)), (NOTHING, Then::Resets, (1, 1)), (WORD, Then::Resets, (1, 1))]
        {
            for (ends, expected) in [(false, expected), (true, (0, 0))] {
                let address = server_of(pieces, then).await;
                let seen = read_to_end(address, ends, Protocol::Opaque, b"PING\r\n").await;
                assert_eq!(seen, expected, "{pieces:?} {then:?} {ends}");
            }
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_server_that_has_answered_and_ends_has_served() {
    const FAREWELL: &[(u64, &[u8])] = &[(0, b"+OK\r\n")];
    let test = async {
        for ends in [false, true] {
            let address = server_of(FAREWELL, Then::Closes).await;
            assert_eq!(read_to_end(address, ends, Protocol::Opaque, b"QUIT\r\n").await, (1, 0));
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_server_that_ends_a_tunnel_without_a_word_has_failed() {
    const UPGRADE: &[u8] =
        b"GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    const GRANTED: (u64, &[u8]) =
        (0, b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
    // A frame that closes, as every server sends it that ends a WebSocket properly.
    const GOODBYE: (u64, &[u8]) = (20, b"\x88\x02\x03\xe9");
    let test = async {
        let mute = server_of(&[GRANTED], Then::Closes).await;
        assert_eq!(read_to_end(mute, false, Protocol::Http1, UPGRADE).await, (1, 1));
        assert_eq!(read_to_end(mute, true, Protocol::Http1, UPGRADE).await, (0, 0));
        let proper = server_of(&[GRANTED, GOODBYE], Then::Closes).await;
        assert_eq!(read_to_end(proper, false, Protocol::Http1, UPGRADE).await, (1, 0));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_client_that_says_all_it_has_to_say_and_ends_was_served_without_an_answer() {
    let test = async {
        let (worker, port) = port_to_one(server_of(&[], Then::Stays).await).await;
        let (mut client, accepted) = connection().await;
        let served = speak(&worker, &port, Protocol::Opaque, accepted, BytesMut::new());
        let asked = async move {
            client.write_all(b"<13>a line of a log\n").await.unwrap();
            sleep(Duration::from_millis(50)).await;
            drop(client);
        };
        let _ = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.expect("it ends");
        let seen = evidence(&worker, "new");
        assert_eq!((seen.attempts, seen.failures), (1, 0));
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_has_served_for_a_while_is_not_charged_with_its_end() {
    let test = async {
        let key = |uid: &str| AttemptKey {
            namespace: "shop".into(),
            canary: "web".into(),
            epoch: 3,
            revision: "new".into(),
            pod_uid: uid.into(),
        };
        let table = AttemptTable::default();
        let moment = Duration::from_millis(100);
        for (lasts, failures) in [(opaque::PROVES_ITSELF - moment, 1), (opaque::PROVES_ITSELF + moment, 0)] {
            let held = opaque::Held::new(table.of(key("a")).unwrap());
            held.heard();
            sleep(lasts).await;
            held.ended(Some(Seen::Failed));
            sleep(opaque::PROVES_ITSELF).await;
            let counts = table.take();
            let seen: Vec<_> = counts.iter().map(|counts| (counts.attempts, counts.failures)).collect();
            assert_eq!(seen, [(1, failures)], "{lasts:?}");
        }
    };
    LocalSet::new().run_until(test).await;
}
