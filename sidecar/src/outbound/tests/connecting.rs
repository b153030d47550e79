//! Endpoints that cannot be connected, or only after a while: how often that counts, what follows, and what is said of
//! the time.

use super::*;
use crate::attempt::http2_exchange;
use crate::config::traffic::{Retries, RetryOn};
use crate::grpc;
use crate::http1::{Framing, Head, Start};

/// A worker, and its port of a Service with such sections, of which so many pods are there and none can be reached.
async fn port_to_nobody(pods: usize, traffic: Traffic) -> (Rc<Worker>, Rc<Port>) {
    let mut endpoints = Vec::new();
    for _ in 0..pods {
        endpoints.push(endpoint(server(Server::Gone).await.0, "new", false));
    }
    let (worker, port) = port_to(endpoints).await;
    let service = ServiceRoute {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        port: 80,
        endpoints: "shop/web:80".into(),
        traffic: Arc::new(traffic),
        ..ServiceRoute::default()
    };
    worker.config.set_route(port.address(), Route::Service(service));
    (worker, port)
}

fn events(worker: &Worker, kind: &str) -> u64 {
    worker.telemetry.events().iter().filter(|((name, _), _)| *name == kind).map(|(_, count)| count).sum()
}

#[tokio::test]
async fn what_is_repeated_without_a_policy_leaves_its_retries_and_all_together_are_bounded() {
    let test = async {
        // Four endpoints by repeating, and one attempt for each retry.
        for (pods, retries, attempts) in [(3, 1, 5), (6, 2, 6), (6, 0, 4)] {
            let on = RetryOn { connect: true, ..RetryOn::default() };
            let retry = Some(Retries { on, attempts: retries, budget_percent: 20 });
            let (worker, port) = port_to_nobody(pods, Traffic { retry, ..Traffic::default() }).await;
            let answer = ask(&worker, &port, REQUEST).await;
            assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
            let seen = (events(&worker, "retry"), evidence(&worker, "new").attempts);
            assert_eq!(seen, (u64::from(retries), attempts), "{pods} pods");
        }
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn requests_that_wait_for_one_connection_are_not_as_many_failures_for_the_breaker() {
    let test = async {
        let eject_for = Duration::from_secs(60);
        let breaker = Breaker { consecutive_failures: Some(10), eject_for, max_ejected_percent: 50 };
        let (worker, port) =
            port_to_nobody(2, Traffic { breaker: Some(breaker), ..Traffic::default() }).await;
        let (client, accepted) = connection().await;
        let served = speak(&worker, &port, Protocol::Http2, accepted, BytesMut::new());
        let asked = async {
            let (send, connection) = h2::client::handshake(client).await.unwrap();
            let answers: Vec<_> = (0..40)
                .map(|_| {
                    let request = ::http::Request::get("http://web/").body(()).unwrap();
                    send.clone().send_request(request, true).unwrap().0
                })
                .collect();
            spawn_local(async move { drop(connection.await) });
            for answer in answers {
                assert_eq!(answer.await.unwrap().status(), 503);
            }
        };
        let both = async {
            tokio::select! {
                _ = served => panic!("the connection has ended"),
                () = asked => {}
            }
        };
        timeout(PATIENCE, both).await.expect("it was never answered");
        assert_eq!(evidence(&worker, "new").attempts, 80, "each request was at both");
        assert_eq!(events(&worker, "breaker"), 0);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_call_that_has_waited_for_its_connection_says_how_much_time_is_left_then() {
    const WAIT: Duration = Duration::from_millis(100);
    let test = async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, seen) = tokio::sync::oneshot::channel();
        spawn_local(async move {
            let (stream, _) = listener.accept().await.unwrap();
            // Its settings are waited for.
            sleep(WAIT).await;
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let (request, _respond) = connection.accept().await.unwrap().unwrap();
            sender.send(request.headers().get("grpc-timeout").cloned()).unwrap();
        });
        let (worker, _port) = port_to_nobody(0, Traffic::default()).await;
        let line = |name: &'static str, value: &'static str| (name.into(), value.into());
        let head = Head {
            start: Start::Request { method: "POST".into(), target: "/a.B/C".into() },
            headers: vec![line("host", "web"), line("grpc-timeout", "5S")],
            framing: Framing::None,
            keep_alive: true,
            upgrade: false,
            expects_continue: false,
            http10: false,
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        let waits = Cell::new(false);
        let sent = http2_exchange(&worker, address.into(), &head, IMPATIENT, Some(deadline), &waits).await;
        let _sent = sent.unwrap();
        let told = timeout(PATIENCE, seen).await.unwrap().unwrap().unwrap();
        let told = grpc::parse_timeout(told.as_bytes()).unwrap();
        assert!(told <= Duration::from_secs(5) - WAIT, "{told:?}");
    };
    LocalSet::new().run_until(test).await;
}
