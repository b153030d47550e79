//! Rules about clients: those that stay with a pod, copies of their requests, and browsers of other origins.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::harness::echo::{Echo, Reply, ask, get};
use crate::harness::{Application, Cluster, within};
use crate::routes::Shop;

/// Two pods of one Service, and a rule that keeps clients with one of them.
async fn kept(session: Value) -> (Shop, [Echo; 2], Vec<crate::harness::Pod>) {
    let shop = Shop::open().await;
    let pods = vec![shop.cluster.pod(true).await, shop.cluster.pod(true).await];
    let echoes = [Echo::start(&pods[0], "one"), Echo::start(&pods[1], "two")];
    let both = shop.cluster.service(None, &[echoes[0].port(), echoes[1].port()]).await;
    shop.http_route(json!([{"backendRefs": [shop.backend(both, 1)], "sessionPersistence": session}])).await;
    (shop, echoes, pods)
}

#[tokio::test]
async fn a_cookie_keeps_a_client_with_a_pod_and_tells_nothing_of_its_address() {
    let (shop, echoes, _pods) = kept(json!({"sessionName": "stay", "type": "Cookie"})).await;
    let first = shop.ask(&get("/", "")).await;
    let [cookie] = first.all("set-cookie")[..] else { panic!("{first:?}") };
    let value = cookie.split(';').next().unwrap().to_owned();
    assert!(value.starts_with("stay="), "{value}");
    let addresses = echoes.each_ref().map(|echo| echo.port().address.ip().to_string());
    assert!(addresses.iter().all(|address| !value.contains(address)), "{value}");
    for _ in 0..20 {
        let reply = shop.ask(&get("/", &format!("cookie: a=b; {value}\r\n"))).await;
        assert_eq!(reply.from(), first.from());
        assert_eq!(reply.all("set-cookie"), [""; 0], "the session goes on");
    }
    // Clients without one are shared out.
    for _ in 0..40 {
        shop.ask(&get("/", "")).await;
    }
    assert!(echoes.iter().all(|echo| echo.seen() > 0));
}

#[tokio::test]
async fn a_session_of_nobody_begins_anew() {
    let (shop, _echoes, _pods) = kept(json!({"sessionName": "Stay", "type": "Header"})).await;
    let began = shop.ask(&get("/", "stay: 0000000000000007.1.1\r\n")).await;
    let [token] = began.all("stay")[..] else { panic!("{began:?}") };
    for _ in 0..10 {
        let reply = shop.ask(&get("/", &format!("stay: {token}\r\n"))).await;
        assert_eq!(reply.from(), began.from());
    }
}

/// Waits until an application has seen so many requests.
async fn until_seen(echo: &Echo, count: usize) {
    within(async {
        while echo.seen() < count {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Requests that the client's sidecar has counted, by Service.
fn counted(cluster: &Cluster) -> Vec<String> {
    cluster.client.telemetry.all().into_iter().map(|(key, _)| key.peer).collect()
}

#[tokio::test]
async fn a_copy_arrives_once_with_its_body_and_is_counted_for_nobody() {
    let shop = Shop::open().await;
    shop.http_route(json!([{
        "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": shop.backend(shop.to_b, 1)}}],
        "backendRefs": [shop.backend(shop.to_a, 1)],
    }]))
    .await;
    let before = counted(&shop.cluster);
    let request = "POST /cart HTTP/1.1\r\nhost: shop\r\ncontent-length: 5\r\n\r\nhello";
    assert_eq!(shop.ask(request).await.from(), "a");
    until_seen(&shop.b, 1).await;
    within(async {
        while shop.cluster.client.count_of("copied_request", "Sent") == 0 {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    sleep(Duration::from_millis(50)).await;
    assert_eq!((shop.a.seen(), shop.b.seen()), (1, 1));
    let after = counted(&shop.cluster);
    assert_eq!(after.len(), before.len() + 1, "{after:?}: that of the request itself");
}

/// Answers requests without bodies, and keeps their heads.
async fn note(mut stream: TcpStream, heads: Arc<Mutex<String>>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    heads.lock().unwrap().push_str(&String::from_utf8(head).unwrap());
    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
}

#[tokio::test]
async fn what_is_added_for_a_backend_is_not_in_the_copies_that_others_get() {
    let shop = Shop::open().await;
    let pod = shop.cluster.pod(false).await;
    let heads = Arc::new(Mutex::new(String::new()));
    let noted = Arc::clone(&heads);
    let other = Application::start(&pod, move |stream| note(stream, Arc::clone(&noted)));
    let to_other = shop.cluster.service(None, &[&other.port]).await;
    let set = |name: &str| {
        json!({"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": name, "value": "yes"}],
        }})
    };
    let mut backend = shop.backend(shop.to_a, 1);
    backend["filters"] = json!([set("x-token")]);
    let mirror = json!({"type": "RequestMirror", "requestMirror": {"backendRef": shop.backend(to_other, 1)}});
    shop.http_route(json!([{"filters": [set("x-rule"), mirror], "backendRefs": [backend]}])).await;
    let reply = shop.ask(&get("/", "")).await;
    assert_eq!((reply.asked("x-rule"), reply.asked("x-token")), (vec!["yes"], vec!["yes"]));
    within(async {
        while heads.lock().unwrap().is_empty() {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let copied = heads.lock().unwrap().clone();
    assert!(copied.contains("x-rule: yes\r\n") && !copied.contains("x-token"), "{copied}");
}

#[tokio::test]
async fn a_script_of_an_allowed_origin_learns_why_its_request_failed() {
    let shop = Shop::open().await;
    let nobody = shop.cluster.service(None, &[]).await;
    shop.http_route(json!([{
        "filters": [
            {"type": "CORS", "cors": {"allowOrigins": ["https://a.example"]}},
            {"type": "ResponseHeaderModifier", "responseHeaderModifier": {
                "set": [{"name": "cache-control", "value": "max-age=3600"}],
            }},
        ],
        "backendRefs": [shop.backend(nobody, 1)],
    }]))
    .await;
    let failed = shop.ask(&get("/", "origin: https://a.example\r\n")).await;
    assert_eq!((failed.status, failed.all("tulle-reason")), (503, vec!["UpstreamNone"]));
    assert_eq!(failed.all("access-control-allow-origin"), ["https://a.example"]);
    assert_eq!(failed.all("cache-control"), [""; 0], "it is not the server's answer");
}

#[tokio::test]
async fn a_request_that_is_too_long_or_comes_slowly_is_served_and_not_copied() {
    let shop = Shop::open().await;
    shop.http_route(json!([{
        "filters": [{"type": "RequestMirror", "requestMirror": {"backendRef": shop.backend(shop.to_b, 1)}}],
        "backendRefs": [shop.backend(shop.to_a, 1)],
    }]))
    .await;
    let long = 100 * 1024;
    let body = "x".repeat(long);
    let reply =
        shop.ask(&format!("POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: {long}\r\n\r\n{body}")).await;
    assert!(reply.from() == "a" && reply.body.ends_with(&body), "{}", reply.head);
    let mut stream = shop.cluster.client.dial(shop.web).await;
    let slow = async {
        let head = b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 2\r\n\r\n1";
        stream.write_all(head).await.unwrap();
        sleep(Duration::from_millis(400)).await;
        ask(&mut stream, "2").await
    };
    let reply: Reply = timeout(Duration::from_secs(30), slow).await.unwrap();
    assert!(reply.from() == "a" && reply.body.ends_with("12"), "{}", reply.body);
    let skipped = |why| shop.cluster.client.count_of("copied_request", why);
    assert_eq!((skipped("SkippedLong"), skipped("SkippedSlow"), shop.b.seen()), (1, 1, 0));
}

#[tokio::test]
async fn browsers_of_an_allowed_origin_are_told_so_and_the_server_sees_no_preflight() {
    let shop = Shop::open().await;
    shop.http_route(json!([{
        "filters": [{"type": "CORS", "cors": {
            "allowOrigins": ["https://*.example"],
            "allowMethods": ["GET", "PUT"],
            "allowHeaders": ["x-a"],
            "allowCredentials": true,
            "maxAge": 60,
        }}],
        "backendRefs": [shop.backend(shop.to_a, 1)],
    }]))
    .await;
    let preflight = |origin: &str| {
        format!(
            "OPTIONS / HTTP/1.1\r\nhost: shop\r\norigin: {origin}\r\naccess-control-request-method: PUT\r\n\r\n"
        )
    };
    let allowed = shop.ask(&preflight("https://a.example")).await;
    assert_eq!(allowed.status, 204);
    for (name, value) in [
        ("access-control-allow-origin", "https://a.example"),
        ("access-control-allow-methods", "GET, PUT"),
        ("access-control-allow-headers", "x-a"),
        ("access-control-allow-credentials", "true"),
        ("access-control-max-age", "60"),
    ] {
        assert_eq!(allowed.all(name), [value], "{name}");
    }
    let refused = shop.ask(&preflight("https://a.org")).await;
    assert_eq!(refused.all("access-control-allow-origin"), [""; 0]);
    assert_eq!(shop.a.seen(), 0);
    let simple = shop.ask(&get("/", "origin: https://a.example\r\n")).await;
    assert_eq!(simple.from(), "a");
    assert_eq!(simple.all("access-control-allow-origin"), ["https://a.example"]);
    assert_eq!(simple.all("vary"), ["Origin"]);
}
