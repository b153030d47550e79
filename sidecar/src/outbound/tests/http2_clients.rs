//! Connections that outlive what they lead to: HTTP/2 clients that are told to leave, and those that go on.

use bytes::Bytes;

use super::*;
use crate::config::PodRoute;

/// A worker, and its port of this pod's own address.
async fn port_of_pod(pod: Endpoint) -> (Rc<Worker>, Rc<Port>) {
    let (worker, port) = port_to(vec![]).await;
    let pod = PodRoute { endpoint: pod, protocol: Protocol::Detect };
    worker.config.set_route(port.address(), Route::Pod(pod));
    (worker, port)
}

/// A connection of HTTP/2 whose server has answered a PING: it has begun to serve.
async fn http2_client(client: TcpStream) -> h2::client::SendRequest<Bytes> {
    let (send, mut connection) = h2::client::handshake(client).await.unwrap();
    let mut pings = connection.ping_pong().unwrap();
    spawn_local(connection);
    pings.ping(h2::Ping::opaque()).await.unwrap();
    send
}

/// Serves a client at this port until it has left, or is told to.
async fn served<T>(
    worker: &Rc<Worker>,
    port: &Rc<Port>,
    asks: impl AsyncFnOnce(h2::client::SendRequest<Bytes>) -> T,
) -> T {
    let (client, accepted) = connection().await;
    let served = speak(worker, port, Protocol::Http2, accepted, BytesMut::new());
    let asked = async { asks(http2_client(client).await).await };
    let (served, asked) = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.expect("it stays");
    assert!(served.is_ok());
    asked
}

#[tokio::test]
async fn an_http2_client_leaves_when_the_pod_that_it_has_dialled_ends() {
    let test = async {
        let (address, _) = server(Server::Gone).await;
        let pod = |uid: &str, terminating| {
            let endpoint = endpoint(address, uid, terminating);
            Route::Pod(PodRoute { endpoint, protocol: Protocol::Detect })
        };
        // The pod has gone, it ends, or another has its address.
        for change in [Route::Unknown, pod("old", true), pod("new", false)] {
            let (worker, port) = port_of_pod(endpoint(address, "old", false)).await;
            let _send = served(&worker, &port, async |send| {
                worker.config.set_route(port.address(), change);
                // It stays for as long as the sidecar lets it.
                send
            })
            .await;
        }
    };
    LocalSet::new().run_until(test).await;
}

/// Asks over HTTP/2, and returns the status.
async fn get(send: &h2::client::SendRequest<Bytes>) -> Option<u16> {
    let mut send = send.clone().ready().await.ok()?;
    let request = ::http::Request::get("http://web/").body(()).unwrap();
    let answer = send.send_request(request, true).ok()?.0.await.ok()?;
    Some(answer.status().as_u16())
}

#[tokio::test]
async fn an_http2_client_whose_pod_is_not_reached_is_answered_and_leaves() {
    let test = async {
        let (address, _) = server(Server::Gone).await;
        let (worker, port) = port_of_pod(endpoint(address, "old", false)).await;
        let begun = Instant::now();
        let _send = served(&worker, &port, async |send| {
            assert_eq!(get(&send).await, Some(503));
            send
        })
        .await;
        assert!(begun.elapsed() >= http::MIN_STAY, "it would come again and again while the pod restarts");
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn an_http2_client_leaves_when_its_service_has_gone_unnoticed_and_nobody_is_reached() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Gone).await.0).await;
        let _send = served(&worker, &port, async |send| {
            assert_eq!(get(&send).await, Some(503));
            // It says nothing for so long that its address is not kept current any more.
            (0..3).for_each(|_| worker.config.forget_idle());
            assert!(port.is_gone());
            assert_eq!(get(&send).await, Some(503));
            send
        })
        .await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_service_that_has_gone_is_not_served_for_ever() {
    let (worker, port) = port_to_one(server(Server::Gone).await.0).await;
    let (kept, begun) = (http::KeptPlan::default(), Instant::now());
    let last = begun + Duration::from_secs(60);
    assert!(kept.plan(port.plan(&worker), begun).is_some());
    assert!(kept.plan(port.plan(&worker), last).is_some());
    assert!(kept.plan(None, begun + http::KEPT_FOR).is_some(), "it was there a minute later");
    assert!(kept.plan(None, last + http::KEPT_FOR).is_none(), "another pod may have the address of its last");
    assert!(kept.plan(None, last).is_none());
}

#[tokio::test]
async fn an_http2_client_of_a_service_that_nobody_serves_stays() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Gone).await.0).await;
        served(&worker, &port, async |send| {
            assert_eq!(get(&send).await, Some(503));
            sleep(Duration::from_millis(50)).await;
            assert_eq!(get(&send).await, Some(503), "to the same Service it would come again");
        })
        .await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_grpc_client_whose_head_is_refused_gets_a_status_of_grpc() {
    let test = async {
        let (worker, port) = port_to_one(server(Server::Gone).await.0).await;
        served(&worker, &port, async |send| {
            let mut send = send.ready().await.unwrap();
            let request = ::http::Request::post("http://web/a.B/C")
                .header("host", "another")
                .header("content-type", "application/grpc+proto");
            let (answer, _) = send.send_request(request.body(()).unwrap(), true).unwrap();
            let answer = answer.await.unwrap();
            let field = |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap());
            assert_eq!(answer.status(), 200);
            assert_eq!(field("grpc-status"), Some("13"));
            assert_eq!(field("content-type"), Some("application/grpc+proto"));
            assert_eq!(field("tulle-reason"), Some("ClientBadRequest"));
        })
        .await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_connection_to_a_service_that_was_deleted_goes_on_and_one_to_a_pod_does_not() {
    const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: web\r\n\r\n";
    let test = async {
        let (address, _) = server(Server::ClosesKept).await;
        let service = port_to_one(address).await;
        let pod = port_of_pod(endpoint(address, "old", false)).await;
        for ((worker, port), expected) in [(service, "HTTP/1.1 200 "), (pod, "HTTP/1.1 503 ")] {
            let (mut client, accepted) = connection().await;
            let served = speak(&worker, &port, Protocol::Http1, accepted, BytesMut::new());
            let asked = async {
                client.write_all(GET).await.unwrap();
                let mut answer = Vec::new();
                while !answer.ends_with(b"ok") {
                    assert!(client.read_buf(&mut answer).await.unwrap() > 0, "it has closed");
                }
                worker.config.set_route(port.address(), Route::Unknown);
                client.write_all(GET).await.unwrap();
                answer.clear();
                client.read_buf(&mut answer).await.unwrap();
                let answer = String::from_utf8_lossy(&answer);
                assert!(answer.starts_with(expected), "{answer}");
                drop(client);
            };
            let (served, ()) = timeout(PATIENCE, async { tokio::join!(served, asked) }).await.unwrap();
            assert!(served.is_ok());
        }
    };
    LocalSet::new().run_until(test).await;
}
