//! What the end of a request or a connection says of the version that it went to, when versions are compared.

use bytes::Bytes;

use super::*;

/// A server that answers the first words of each connection with these pieces, each after so many milliseconds, and then
/// says nothing more.
async fn server_that_stops(pieces: &'static [(u64, &'static [u8])]) -> SocketAddr {
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
                while matches!(stream.read(&mut room).await, Ok(1..)) {}
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
        let stopped = left_after(server_that_stops(&[(0, SHORT)]).await, long);
        let left_early = left_after(server_that_stops(&[(0, SHORT)]).await, Duration::from_millis(200));
        let moving = left_after(server_that_stops(MOVES).await, long);
        let endless = left_after(server_that_stops(&[(0, STREAM)]).await, long);
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
