//! Rules of the Gateway API: where requests go, and what is done to them and to their answers.
//!
//! The operator's own code makes the rules of the routes that a test applies, and pods with and without a sidecar serve
//! them.

use std::net::SocketAddr;
use std::time::Duration;

use http::Request;
use serde_json::{Value, json};
use tokio::time::sleep;
use tulle_operator::model::gateway::RouteKind;

use crate::harness::cluster::{service_name, service_ref};
use crate::harness::echo::{Echo, Reply, ask, get};
use crate::harness::http2::Client;
use crate::harness::{Cluster, Pod, within};

/// A cluster with two Services behind the one that is dialled: `a` of a pod with a sidecar, `b` of one without.
pub struct Shop {
    pub cluster: Cluster,
    pub a: Echo,
    pub b: Echo,
    pub to_a: SocketAddr,
    pub to_b: SocketAddr,
    /// The Service that routes are attached to; by itself it leads to `a`.
    pub web: SocketAddr,
    _pods: [Pod; 2],
}

impl Shop {
    pub async fn open() -> Self {
        let cluster = Cluster::start().await;
        let pods = [cluster.pod(true).await, cluster.pod(false).await];
        let (a, b) = (Echo::start(&pods[0], "a"), Echo::start(&pods[1], "b"));
        let to_a = cluster.service(None, &[a.port()]).await;
        let to_b = cluster.service(None, &[b.port()]).await;
        let web = cluster.service(None, &[a.port()]).await;
        Self { cluster, a, b, to_a, to_b, web, _pods: pods }
    }

    /// Attaches a route with these rules to the Service that is dialled.
    pub async fn http_route(&self, rules: Value) {
        let spec = json!({"parentRefs": [service_ref(self.web)], "rules": rules});
        self.cluster.route(RouteKind::Http, "web", spec, self.web).await;
    }

    /// The answer to one request on a connection of its own.
    pub async fn ask(&self, request: &str) -> Reply {
        ask(&mut self.cluster.client.dial(self.web).await, request).await
    }

    /// A backend of a rule.
    pub fn backend(&self, dialled: SocketAddr, weight: u32) -> Value {
        let mut backend = service_ref(dialled);
        backend["weight"] = json!(weight);
        backend
    }
}

#[tokio::test]
async fn requests_go_by_path_segments_and_by_headers_and_what_matches_nothing_is_not_found() {
    let shop = Shop::open().await;
    let to = |dialled| json!([shop.backend(dialled, 1)]);
    shop.http_route(json!([
        {"matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}], "backendRefs": to(shop.to_a)},
        {"matches": [{"headers": [{"name": "Version", "value": "two"}]}], "backendRefs": to(shop.to_b)},
    ]))
    .await;
    for (request, expected) in [
        (get("/v1", ""), "a"),
        (get("/v1/cart?x=1", ""), "a"),
        (get("/", "version: two\r\n"), "b"),
        (get("/v1", "version: two\r\n"), "a"),
    ] {
        assert_eq!(shop.ask(&request).await.from(), expected, "{request}");
    }
    for request in [get("/", ""), get("/v12", ""), get("/", "version: three\r\n")] {
        let reply = shop.ask(&request).await;
        assert_eq!((reply.status, reply.all("tulle-reason")), (404, vec!["RouteNone"]), "{request}");
    }
}

#[tokio::test]
async fn requests_are_counted_by_the_route_that_took_them_and_by_what_secures_them() {
    let shop = Shop::open().await;
    let path = |path: &str| json!([{"path": {"type": "PathPrefix", "value": path}}]);
    shop.http_route(json!([
        {"matches": path("/a"), "backendRefs": [shop.backend(shop.to_a, 1)]},
        {"matches": path("/b"), "backendRefs": [shop.backend(shop.to_b, 1)]},
        {"matches": path("/none")},
    ]))
    .await;
    for path in ["/a", "/b", "/none", "/elsewhere"] {
        shop.ask(&get(path, "")).await;
    }
    let telemetry = &shop.cluster.client.telemetry;
    // A request is counted after its answer has been delivered.
    within(async {
        while telemetry.all().len() < 4 {
            sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let keys = telemetry.all().into_iter().map(|(key, _)| (key.route.to_string(), key.mtls));
    let mut seen: Vec<_> = keys.map(|(route, mtls)| (route.ends_with("/web"), mtls)).collect();
    seen.sort_unstable();
    // What reached nobody counts as the Service that was dialled would have secured it: an edge that is meshed gets no row
    // of plain text because something failed.
    assert_eq!(seen, [(false, true), (true, false), (true, true), (true, true)]);
}

#[tokio::test]
async fn shares_are_exact_and_that_of_a_backend_that_is_missing_is_an_error() {
    let shop = Shop::open().await;
    let backends = json!([shop.backend(shop.to_a, 70), shop.backend(shop.to_b, 30)]);
    shop.http_route(json!([{"backendRefs": backends}])).await;
    let mut stream = shop.cluster.client.dial(shop.web).await;
    for _ in 0..100 {
        assert_eq!(ask(&mut stream, &get("/", "")).await.status, 200);
    }
    assert_eq!((shop.a.seen(), shop.b.seen()), (70, 30));

    let missing = json!({"name": "missing", "port": 80, "weight": 1});
    shop.http_route(json!([{"backendRefs": [shop.backend(shop.to_b, 3), missing]}])).await;
    let mut failed = 0;
    for _ in 0..20 {
        let reply = shop.ask(&get("/", "")).await;
        failed += usize::from(reply.status == 500);
        assert!(reply.status == 500 || reply.from() == "b", "{reply:?}");
    }
    assert_eq!((failed, shop.b.seen()), (5, 45));
}

#[tokio::test]
async fn a_redirect_says_where_to_and_nobody_serves_it() {
    let shop = Shop::open().await;
    let redirect = |to: Value| json!({"type": "RequestRedirect", "requestRedirect": to});
    shop.http_route(json!([
        {
            "matches": [{"path": {"type": "PathPrefix", "value": "/old"}}],
            "filters": [redirect(json!({
                "scheme": "https", "hostname": "shop.example", "statusCode": 308,
                "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/new"},
            }))],
        },
        {
            "matches": [{"path": {"type": "PathPrefix", "value": "/port"}}],
            "filters": [redirect(json!({"port": 8080}))],
        },
    ]))
    .await;
    // On one connection: an answer of the sidecar's own does not end it.
    let mut stream = shop.cluster.client.dial(shop.web).await;
    for (path, status, location) in
        [("/old/cart?x=1", 308, "https://shop.example/new/cart?x=1"), ("/port", 302, "http://shop:8080/port")]
    {
        let reply = ask(&mut stream, &get(path, "")).await;
        assert_eq!((reply.status, reply.all("location")), (status, vec![location]));
        assert_eq!(reply.body, "");
    }
    assert_eq!(shop.a.seen(), 0);
}

#[tokio::test]
async fn a_request_is_rewritten_and_its_headers_and_those_of_its_answer_are_changed() {
    let shop = Shop::open().await;
    for backend in [shop.to_a, shop.to_b] {
        shop.http_route(json!([{
            "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
            "filters": [
                {"type": "URLRewrite", "urlRewrite": {
                    "hostname": "inner.example",
                    "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": "/v2"},
                }},
                {"type": "RequestHeaderModifier", "requestHeaderModifier": {
                    "set": [{"name": "X-Set", "value": "new"}],
                    "add": [{"name": "X-Add", "value": "b"}],
                    "remove": ["X-Gone"],
                }},
                {"type": "ResponseHeaderModifier", "responseHeaderModifier": {
                    "set": [{"name": "X-Server", "value": "hidden"}],
                    "add": [{"name": "X-Route", "value": "web"}],
                }},
            ],
            "backendRefs": [shop.backend(backend, 1)],
        }]))
        .await;
        let lines = "x-set: old\r\nx-add: a\r\nx-gone: 1\r\nx-gone: 2\r\nx-kept: k\r\n";
        let reply = shop.ask(&get("/v1/cart?x=1&y=%20", lines)).await;
        assert!(reply.body.contains("GET /v2/cart?x=1&y=%20 HTTP/1.1"), "{}", reply.body);
        for (name, expected) in [
            ("host", vec!["inner.example"]),
            ("x-set", vec!["new"]),
            ("x-add", vec!["a,b"]),
            ("x-gone", vec![]),
            ("x-kept", vec!["k"]),
        ] {
            assert_eq!(reply.asked(name), expected, "{name}");
        }
        assert_eq!(reply.all("x-server"), ["hidden"]);
        assert_eq!(reply.all("x-route"), ["web"]);
    }
}

#[tokio::test]
async fn a_change_of_a_route_takes_effect_with_the_next_request_of_a_connection() {
    let shop = Shop::open().await;
    let mut stream = shop.cluster.client.dial(shop.web).await;
    assert_eq!(ask(&mut stream, &get("/", "")).await.from(), "a", "the Service itself");
    for (backend, expected) in [(shop.to_b, "b"), (shop.to_a, "a"), (shop.to_b, "b")] {
        shop.http_route(json!([{"backendRefs": [shop.backend(backend, 1)]}])).await;
        assert_eq!(ask(&mut stream, &get("/", "")).await.from(), expected);
    }
}

#[tokio::test]
async fn a_pods_own_address_and_a_backend_have_no_rules() {
    let shop = Shop::open().await;
    let marked = json!([{"type": "ResponseHeaderModifier", "responseHeaderModifier": {
        "set": [{"name": "x-route", "value": "web"}],
    }}]);
    shop.http_route(json!([{"filters": marked, "backendRefs": [shop.backend(shop.to_a, 1)]}])).await;
    assert_eq!(shop.ask(&get("/", "")).await.all("x-route"), ["web"]);
    for address in [shop.a.port().address, shop.to_a] {
        let mut stream = shop.cluster.client.dial(address).await;
        let reply = ask(&mut stream, &get("/", "")).await;
        assert_eq!((reply.from(), reply.all("x-route")), ("a", vec![]), "{address}");
    }
}

/// The client is of the namespace of the route, and the Service is not.
#[tokio::test]
async fn a_route_of_the_clients_namespace_changes_where_its_own_requests_go() {
    let shop = Shop::open().await;
    let other = shop.cluster.service_in("other", None, &[shop.b.port()]).await;
    let mut parent = service_ref(other);
    parent["namespace"] = json!("other");
    let own = json!([shop.backend(shop.to_a, 1)]);
    let spec = json!({"parentRefs": [parent], "rules": [{"backendRefs": own}]});
    let mut stream = shop.cluster.client.dial(other).await;
    assert_eq!(ask(&mut stream, &get("/", "")).await.from(), "b", "{}", service_name(other));
    shop.cluster.route(RouteKind::Http, "consumer", spec, other).await;
    assert_eq!(ask(&mut stream, &get("/", "")).await.from(), "a");
}

#[tokio::test]
async fn a_backend_without_endpoints_is_not_available() {
    let shop = Shop::open().await;
    let nobody = shop.cluster.service(None, &[]).await;
    shop.http_route(json!([{"backendRefs": [shop.backend(nobody, 1)]}])).await;
    let reply = shop.ask(&get("/", "")).await;
    assert_eq!((reply.status, reply.all("tulle-reason")), (503, vec!["UpstreamNone"]));
}

#[tokio::test]
async fn a_client_that_is_slow_to_speak_is_served_by_routes_of_a_service_without_endpoints() {
    let shop = Shop::open().await;
    let front = shop.cluster.service(None, &[]).await;
    let spec = json!({
        "parentRefs": [service_ref(front)],
        "rules": [{"backendRefs": [shop.backend(shop.to_b, 1)]}],
    });
    shop.cluster.route(RouteKind::Http, "front", spec, front).await;
    let mut stream = shop.cluster.client.dial(front).await;
    // Longer than anybody is waited for whose connection nobody can take.
    sleep(Duration::from_millis(600)).await;
    assert_eq!(ask(&mut stream, &get("/", "")).await.from(), "b");
}

/// What a gRPC client is told.
async fn grpc_status(client: &Client, path: &str) -> Option<String> {
    let request = Request::builder().method("POST").uri(format!("http://shop{path}"));
    let request = request.header("content-type", "application/grpc").body(()).unwrap();
    let mut send = client.send().ready().await.unwrap();
    let (answer, _) = send.send_request(request, true).unwrap();
    let answer = within(answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.headers().get("grpc-status").map(|status| status.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn a_method_that_no_route_of_grpc_knows_is_not_implemented() {
    let shop = Shop::open().await;
    let known = json!({"method": {"service": "shop.Cart", "method": "Add"}});
    let missing = json!([{"name": "missing", "port": 80}]);
    let spec = json!({
        "parentRefs": [service_ref(shop.web)],
        "rules": [{"matches": [known], "backendRefs": missing}],
    });
    shop.cluster.route(RouteKind::Grpc, "web", spec, shop.web).await;
    let client = Client::new(shop.cluster.client.dial(shop.web).await).await;
    let unimplemented = grpc_status(&client, "/shop.Cart/Remove").await;
    assert_eq!(unimplemented.as_deref(), Some("12"));
    let unavailable = grpc_status(&client, "/shop.Cart/Add").await;
    assert_eq!(unavailable.as_deref(), Some("14"));
    // Both are answers on a connection that stays.
    sleep(Duration::from_millis(20)).await;
    assert!(client.send().ready().await.is_ok());
}
