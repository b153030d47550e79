//! What policies do for a request that goes wrong: retries and their budget, time-outs, the breaker, hashing, faults.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::sleep;
use tulle_operator::model::gateway::RouteKind;

use crate::harness::cluster::{Port, service_ref};
use crate::harness::{Application, Cluster, NAMESPACE, Outcome, Pod, http1, within};

const UNAVAILABLE: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\ndown";

/// A policy for every Service of the namespace. To be applied before the Service is dialled.
fn policy(cluster: &Cluster, mode: &str, sections: Value) {
    let mut spec = json!({"target": {"kind": "Namespace"}, "mode": mode});
    for (name, section) in sections.as_object().unwrap() {
        spec[name] = section.clone();
    }
    let policy = json!({
        "apiVersion": "tulle.dev/v1alpha1", "kind": "MeshPolicy",
        "metadata": {"name": "traffic", "namespace": NAMESPACE, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": spec,
    });
    let policy = serde_json::from_value(policy).unwrap();
    cluster.operator.change(|model| model.apply_policy((NAMESPACE.into(), "traffic".into()), policy));
}

/// An application that counts what it is asked.
struct Server {
    application: Application,
    asked: Arc<AtomicUsize>,
    /// It answers with 503.
    fails: Arc<AtomicBool>,
}

impl Server {
    fn start(pod: &Pod, fails: bool) -> Self {
        let (asked, fails) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(fails)));
        let (count, failing) = (Arc::clone(&asked), Arc::clone(&fails));
        let application =
            Application::start(pod, move |stream| answers(stream, Arc::clone(&count), Arc::clone(&failing)));
        Self { application, asked, fails }
    }

    /// One that reads requests, and answers none.
    fn silent(pod: &Pod) -> Self {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let application = Application::start(pod, move |mut stream: TcpStream| {
            let count = Arc::clone(&count);
            async move {
                while http1::read_request(&mut stream, &mut BytesMut::new()).await.is_some() {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        Self { application, asked, fails: Arc::default() }
    }

    fn port(&self) -> &Port {
        &self.application.port
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

async fn answers(mut stream: TcpStream, asked: Arc<AtomicUsize>, fails: Arc<AtomicBool>) {
    let mut buffer = BytesMut::new();
    while http1::read_request(&mut stream, &mut buffer).await.is_some() {
        asked.fetch_add(1, Ordering::SeqCst);
        let answer = if fails.load(Ordering::SeqCst) { UNAVAILABLE } else { http1::OK };
        if stream.write_all(answer).await.is_err() {
            return;
        }
    }
}

/// Long enough for what a sidecar does after its client has the whole answer.
async fn settled() {
    sleep(Duration::from_millis(50)).await;
}

async fn ask(cluster: &Cluster, service: std::net::SocketAddr, request: &[u8]) -> Outcome {
    let mut stream = cluster.client.dial(service).await;
    within(http1::ask(&mut stream, request, || {})).await
}

#[tokio::test]
async fn a_retry_saves_a_request_from_an_endpoint_that_answers_503_and_is_counted() {
    for meshed in [false, true] {
        let cluster = Cluster::start().await;
        policy(&cluster, "Enforce", json!({"retry": {"on": ["5xx"], "attempts": 2, "budget": "20%"}}));
        let pods = [cluster.pod(meshed).await, cluster.pod(meshed).await];
        let (bad, good) = (Server::start(&pods[0], true), Server::start(&pods[1], false));
        let service = cluster.service(Some("http"), &[bad.port(), good.port()]).await;
        // Which of them comes first is chance.
        for number in 0..200 {
            assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(200), "{number}");
            if bad.asked() > 0 {
                break;
            }
        }
        assert_eq!(cluster.client.count("retry"), bad.asked() as u64);
        assert!(bad.asked() > 0, "nothing was retried");
    }
}

#[tokio::test]
async fn a_service_that_is_down_gets_a_quarter_more_requests_at_most_and_its_answers_go_on() {
    const REQUESTS: usize = 100;
    let cluster = Cluster::start().await;
    policy(&cluster, "Enforce", json!({"retry": {"on": ["unavailable"], "attempts": 2, "budget": "20%"}}));
    let pod = cluster.pod(true).await;
    let down = Server::start(&pod, true);
    let service = cluster.service(Some("http"), &[down.port()]).await;
    for _ in 0..REQUESTS {
        assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(503));
    }
    let retries = down.asked() - REQUESTS;
    assert!((10..=REQUESTS / 4).contains(&retries), "{retries} of {REQUESTS}");
    assert_eq!(cluster.client.count("retry"), retries as u64);
    assert!(cluster.client.count("retry_refused") > 0);
}

#[tokio::test]
async fn a_post_is_not_retried_for_its_status() {
    let cluster = Cluster::start().await;
    policy(&cluster, "Enforce", json!({"retry": {"on": ["5xx", "unavailable"], "attempts": 2}}));
    let pod = cluster.pod(false).await;
    let down = Server::start(&pod, true);
    let service = cluster.service(Some("http"), &[down.port()]).await;
    assert_eq!(ask(&cluster, service, &http1::request("POST", 10)).await, Outcome::Whole(503));
    assert_eq!((down.asked(), cluster.client.count("retry")), (1, 0));
}

#[tokio::test]
async fn an_attempt_that_takes_too_long_is_given_up_for_another_endpoint() {
    for meshed in [false, true] {
        let cluster = Cluster::start().await;
        let sections = json!({"timeout": {"attempt": "300ms"}, "retry": {"on": ["reset"], "attempts": 2}});
        policy(&cluster, "Enforce", sections);
        let pods = [cluster.pod(meshed).await, cluster.pod(meshed).await];
        let (silent, good) = (Server::silent(&pods[0]), Server::start(&pods[1], false));
        let service = cluster.service(Some("http"), &[silent.port(), good.port()]).await;
        for number in 0..200 {
            assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(200), "{number}");
            if silent.asked() > 0 {
                break;
            }
        }
        assert!(silent.asked() > 0 && cluster.client.count("timeout") > 0);
    }
}

#[tokio::test]
async fn a_request_whose_time_is_over_is_answered_504_and_a_caller_may_make_it_shorter() {
    for meshed in [false, true] {
        let cluster = Cluster::start().await;
        policy(&cluster, "Enforce", json!({"timeout": {"request": "400ms"}}));
        let pod = cluster.pod(meshed).await;
        let silent = Server::silent(&pod);
        let service = cluster.service(Some("http"), &[silent.port()]).await;
        let begun = std::time::Instant::now();
        assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(504));
        assert!(begun.elapsed() >= Duration::from_millis(400));
        let shorter = b"GET / HTTP/1.1\r\nhost: shop\r\ntulle-timeout: 1ms\r\n\r\n";
        assert_eq!(ask(&cluster, service, shorter).await, Outcome::Whole(504));
        // The server's sidecar knows how much time there is, and may be the first to say that it is over.
        assert!(meshed || cluster.client.count("timeout") == 2);
    }
}

/// Answers gRPC calls, and reports the headers of each that concern its time.
async fn grpc(stream: TcpStream, seen: UnboundedSender<(Option<String>, bool)>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let value = request.headers().get("grpc-timeout").map(|value| value.to_str().unwrap().to_owned());
        let _ = seen.send((value, request.headers().contains_key("tulle-timeout")));
        let answer = http::Response::builder().header("content-type", "application/grpc");
        let answer = answer.header("grpc-status", "0").body(()).unwrap();
        respond.send_response(answer, true).unwrap();
    }
}

#[tokio::test]
async fn what_is_left_of_a_calls_time_goes_on_with_it() {
    for meshed in [false, true] {
        let cluster = Cluster::start().await;
        policy(&cluster, "Enforce", json!({"timeout": {"request": "2s"}}));
        let pod = cluster.pod(meshed).await;
        let (sender, mut seen) = unbounded_channel();
        let application = Application::start(&pod, move |stream| grpc(stream, sender.clone()));
        let service = cluster.service(Some("grpc"), &[&application.port]).await;
        for (asked, own, most) in [("5S", None, 2_000), ("800m", None, 800), ("5S", Some("900ms"), 900)] {
            let (mut client, connection) =
                h2::client::handshake(cluster.client.dial(service).await).await.unwrap();
            tokio::spawn(connection);
            let mut request = http::Request::post("http://shop/a.B/C")
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .header("grpc-timeout", asked);
            if let Some(own) = own {
                request = request.header("tulle-timeout", own);
            }
            let (answer, _) = client.send_request(request.body(()).unwrap(), true).unwrap();
            assert_eq!(within(answer).await.unwrap().status(), 200);
            let (value, is_told) = within(seen.recv()).await.unwrap();
            let left = value.unwrap().strip_suffix('m').map(|ms| ms.parse::<u32>().unwrap());
            assert!(left.is_some_and(|left| left > 0 && left <= most), "{left:?} of {asked}");
            assert!(!is_told, "what a caller asks of its sidecar goes no further");
        }
    }
}

#[tokio::test]
async fn a_request_without_any_time_is_not_sent() {
    let cluster = Cluster::start().await;
    let pod = cluster.pod(false).await;
    let server = Server::start(&pod, false);
    let service = cluster.service(Some("http"), &[server.port()]).await;
    // From now on there is a connection that it could be sent on at once.
    assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(200));
    let late = b"GET / HTTP/1.1\r\nhost: shop\r\ntulle-timeout: 0ms\r\n\r\n";
    assert_eq!(ask(&cluster, service, late).await, Outcome::Whole(504));
    settled().await;
    assert_eq!(server.asked(), 1);
}

#[tokio::test]
async fn a_client_that_gives_little_time_ejects_nobody() {
    let cluster = Cluster::start().await;
    policy(&cluster, "Enforce", json!({"breaker": {"consecutiveFailures": 2}}));
    let pods = [cluster.pod(true).await, cluster.pod(true).await];
    let servers = [Server::silent(&pods[0]), Server::silent(&pods[1])];
    let service = cluster.service(Some("http"), &[servers[0].port(), servers[1].port()]).await;
    let hurried = b"GET / HTTP/1.1\r\nhost: shop\r\ntulle-timeout: 20ms\r\n\r\n";
    for _ in 0..20 {
        // The servers' sidecars know of the time too, and most often say first that it is over.
        assert_eq!(ask(&cluster, service, hurried).await, Outcome::Whole(504));
    }
    settled().await;
    assert_eq!(cluster.client.count("breaker"), 0);
}

#[tokio::test]
async fn the_only_pod_is_not_asked_again_when_it_sheds_load() {
    let cluster = Cluster::start().await;
    let sections = json!({"limits": {"concurrency": 1}, "retry": {"on": ["5xx"], "attempts": 2}});
    policy(&cluster, "Enforce", sections);
    let pod = cluster.pod(true).await;
    let busy = Server::silent(&pod);
    let service = cluster.service(Some("http"), &[busy.port()]).await;
    let mut held = cluster.client.dial(service).await;
    held.write_all(http1::GET).await.unwrap();
    within(async {
        while busy.asked() == 0 {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(503));
    assert_eq!((busy.asked(), cluster.client.count("retry")), (1, 0));
}

/// Answers gRPC calls with this status after a pause.
async fn grpc_with(stream: TcpStream, status: &'static str, pause: Duration, asked: Arc<AtomicUsize>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((_, mut respond))) = connection.accept().await {
        asked.fetch_add(1, Ordering::SeqCst);
        sleep(pause).await;
        let answer = http::Response::builder().header("content-type", "application/grpc");
        let answer = answer.header("grpc-status", status).body(()).unwrap();
        let _ = respond.send_response(answer, true);
    }
}

#[tokio::test]
async fn a_grpc_server_that_fails_fast_does_not_get_the_calls_of_one_that_serves() {
    for meshed in [false, true] {
        let cluster = Cluster::start().await;
        let pods = [cluster.pod(meshed).await, cluster.pod(meshed).await];
        let asked = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
        let start = |pod: &Pod, status, pause, asked: &Arc<AtomicUsize>| {
            let asked = Arc::clone(asked);
            Application::start(pod, move |stream| grpc_with(stream, status, pause, Arc::clone(&asked)))
        };
        let bad = start(&pods[0], "13", Duration::ZERO, &asked[0]);
        let good = start(&pods[1], "0", Duration::from_millis(30), &asked[1]);
        let service = cluster.service(Some("grpc"), &[&bad.port, &good.port]).await;
        let (mut client, connection) =
            h2::client::handshake(cluster.client.dial(service).await).await.unwrap();
        tokio::spawn(connection);
        for _ in 0..40 {
            client = within(client.ready()).await.unwrap();
            let request = http::Request::post("http://shop/a.B/C")
                .header("content-type", "application/grpc")
                .header("te", "trailers");
            let (answer, _) = client.send_request(request.body(()).unwrap(), true).unwrap();
            assert_eq!(within(answer).await.unwrap().status(), 200);
        }
        let [failed, served] = asked.map(|asked| asked.load(Ordering::SeqCst));
        assert!(failed + served == 40 && failed <= 12, "{failed} failed, {served} were served");
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_is_left_alone_until_one_request_finds_that_it_serves_again() {
    let cluster = Cluster::start().await;
    let breaker = json!({"consecutiveFailures": 3, "ejectFor": "1s", "maxEjected": "50%"});
    policy(&cluster, "Enforce", json!({"breaker": breaker, "balance": {"by": "RoundRobin"}}));
    let pods = [cluster.pod(true).await, cluster.pod(true).await];
    let (bad, good) = (Server::start(&pods[0], true), Server::start(&pods[1], false));
    let service = cluster.service(Some("http"), &[bad.port(), good.port()]).await;
    for _ in 0..6 {
        ask(&cluster, service, http1::GET).await;
    }
    settled().await;
    assert_eq!((bad.asked(), cluster.client.count("breaker")), (3, 1));
    for _ in 0..10 {
        assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(200));
    }
    assert_eq!(bad.asked(), 3, "it is left alone");
    let gauges = cluster.client.telemetry.breakers.all();
    assert_eq!(gauges.iter().map(|(_, gauge)| gauge.read().0).sum::<i64>(), 1);
    bad.fails.store(false, Ordering::SeqCst);
    sleep(Duration::from_millis(1_400)).await;
    for _ in 0..4 {
        assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(200));
    }
    settled().await;
    assert!(bad.asked() > 4, "it serves its share again");
    assert_eq!(cluster.client.count("breaker"), 2);
}

#[tokio::test]
async fn an_ejection_is_counted_under_the_route_whose_requests_failed() {
    let cluster = Cluster::start().await;
    let breaker = json!({"consecutiveFailures": 2, "maxEjected": "50%"});
    policy(&cluster, "Enforce", json!({"breaker": breaker, "balance": {"by": "RoundRobin"}}));
    let pods = [cluster.pod(true).await, cluster.pod(true).await];
    let (bad, good) = (Server::start(&pods[0], true), Server::start(&pods[1], false));
    let service = cluster.service(Some("http"), &[bad.port(), good.port()]).await;
    let rules = json!([{"backendRefs": [service_ref(service)]}]);
    let spec = json!({"parentRefs": [service_ref(service)], "rules": rules});
    cluster.route(RouteKind::Http, "web", spec, service).await;
    for _ in 0..6 {
        ask(&cluster, service, http1::GET).await;
    }
    settled().await;
    assert_eq!(cluster.client.count("breaker"), 1);
    let all = cluster.client.telemetry.all();
    let ejected = all.iter().filter(|(_, series)| series.ejections.load(Ordering::Relaxed) > 0);
    let routes: Vec<_> = ejected.map(|(key, _)| key.route.to_string()).collect();
    assert_eq!(routes, ["HTTPRoute/shop/web"]);
}

#[tokio::test]
async fn a_fault_fails_a_request_that_no_application_sees_and_says_so() {
    let cluster = Cluster::start().await;
    let faults = json!({"abort": {"status": 418, "of": "100%"}, "until": "2099-01-01T00:00:00Z"});
    policy(&cluster, "Enforce", json!({"faults": faults}));
    let pod = cluster.pod(true).await;
    let server = Server::start(&pod, false);
    let service = cluster.service(Some("http"), &[server.port()]).await;
    let mut stream = cluster.client.dial(service).await;
    stream.write_all(http1::GET).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 418 "), "{answer}");
    assert!(answer.contains("tulle-reason: FaultInjected\r\n"), "{answer}");
    assert_eq!((server.asked(), cluster.client.count("fault"), cluster.client.count("breaker")), (0, 1, 0));
}

#[tokio::test]
async fn requests_of_one_user_go_to_one_endpoint() {
    let cluster = Cluster::start().await;
    policy(&cluster, "Enforce", json!({"balance": {"by": "Hash", "hash": {"header": "x-user"}}}));
    let pods = [cluster.pod(false).await, cluster.pod(true).await, cluster.pod(true).await];
    let servers: Vec<Server> = pods.iter().map(|pod| Server::start(pod, false)).collect();
    let ports: Vec<&Port> = servers.iter().map(Server::port).collect();
    let service = cluster.service(Some("http"), &ports).await;
    let mut used = Vec::new();
    for user in 0..20 {
        let request = format!("GET / HTTP/1.1\r\nhost: shop\r\nx-user: user-{user}\r\n\r\n");
        let before: Vec<usize> = servers.iter().map(Server::asked).collect();
        for _ in 0..5 {
            assert_eq!(ask(&cluster, service, request.as_bytes()).await, Outcome::Whole(200));
        }
        let asked = servers.iter().zip(before).map(|(server, before)| server.asked() - before);
        let here: Vec<usize> = asked.enumerate().filter(|(_, asked)| *asked > 0).map(|(at, _)| at).collect();
        let [only] = here.as_slice() else { panic!("user {user} was at {here:?}") };
        used.push(*only);
    }
    used.sort_unstable();
    used.dedup();
    assert!(used.len() > 1, "all users are at one endpoint");
}

#[tokio::test]
async fn what_is_only_tried_is_counted_and_not_done() {
    let cluster = Cluster::start().await;
    let sections = json!({
        "timeout": {"request": "1ms"},
        "retry": {"on": ["5xx"], "attempts": 2},
        "breaker": {"consecutiveFailures": 2},
        "faults": {"abort": {"status": 500, "of": "100%"}, "until": "2099-01-01T00:00:00Z"},
    });
    policy(&cluster, "Shadow", sections);
    let pod = cluster.pod(true).await;
    let down = Server::start(&pod, true);
    let service = cluster.service(Some("http"), &[down.port()]).await;
    for _ in 0..3 {
        assert_eq!(ask(&cluster, service, http1::GET).await, Outcome::Whole(503));
    }
    settled().await;
    assert_eq!(down.asked(), 3);
    let count = |kind| cluster.client.count(kind);
    for done in ["retry", "fault", "timeout", "breaker"] {
        assert_eq!(count(done), 0, "{done}");
    }
    assert_eq!((count("would_retry"), count("would_fault"), count("would_eject")), (2, 3, 1));
}
