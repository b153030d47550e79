//! Rules about one backend: what is spoken there, and what is done to requests that go there.

use bytes::Bytes;
use http::Response;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::harness::Application;
use crate::harness::echo::{ask, get};
use crate::routes::Shop;

/// Serves HTTP/2 and nothing else: `/empty` with a head alone, everything else with the method, the path and the body.
async fn serve_h2c(stream: TcpStream) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        tokio::spawn(async move {
            let (parts, mut body) = request.into_parts();
            if parts.uri.path() == "/empty" {
                respond.send_response(Response::new(()), true).unwrap();
                return;
            }
            let mut text = format!("h2c\n{} {}\n", parts.method, parts.uri.path());
            while let Some(piece) = body.data().await {
                let piece = piece.unwrap();
                let _ = body.flow_control().release_capacity(piece.len());
                text.push_str(std::str::from_utf8(&piece).unwrap());
            }
            let head = Response::builder().header("content-length", text.len()).body(()).unwrap();
            respond.send_response(head, false).unwrap().send_data(Bytes::from(text), true).unwrap();
        });
    }
}

fn rewrites(prefix: &str) -> Value {
    json!([{"type": "URLRewrite", "urlRewrite": {
        "path": {"type": "ReplacePrefixMatch", "replacePrefixMatch": prefix},
    }}])
}

#[tokio::test]
async fn a_client_of_http_1_reaches_a_backend_of_a_route_that_declares_h2c() {
    let shop = Shop::open().await;
    for meshed in [false, true] {
        let pod = shop.cluster.pod(meshed).await;
        let application = Application::start(&pod, serve_h2c);
        let to_h2c = shop.cluster.service(Some("kubernetes.io/h2c"), &[&application.port]).await;
        shop.http_route(json!([{"backendRefs": [shop.backend(to_h2c, 1)]}])).await;
        // On one connection, which the answers do not end.
        let mut stream = shop.cluster.client.dial(shop.web).await;
        let posted =
            ask(&mut stream, "POST /cart HTTP/1.1\r\nhost: shop\r\ncontent-length: 5\r\n\r\nhello").await;
        assert_eq!((posted.status, posted.body.as_str()), (200, "h2c\nPOST /cart\nhello"), "{meshed}");
        let empty = ask(&mut stream, &get("/empty", "")).await;
        assert_eq!((empty.status, empty.all("content-length")), (200, vec!["0"]), "{meshed}");
        let got = ask(&mut stream, &get("/cart", "")).await;
        assert_eq!((got.status, got.body.as_str()), (200, "h2c\nGET /cart\n"), "{meshed}");
    }
}

#[tokio::test]
async fn a_path_that_rule_and_backend_rewrite_is_rewritten_from_what_was_matched() {
    let shop = Shop::open().await;
    let mut backend = shop.backend(shop.to_a, 1);
    backend["filters"] = rewrites("/inner");
    shop.http_route(json!([{
        "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
        "filters": rewrites("/outer"),
        "backendRefs": [backend],
    }]))
    .await;
    let reply = shop.ask(&get("/v1/cart?x=1", "")).await;
    assert!(reply.body.contains("GET /inner/cart?x=1 HTTP/1.1"), "{}", reply.body);
}

#[tokio::test]
async fn a_script_of_an_allowed_origin_learns_that_the_backend_does_not_exist() {
    let shop = Shop::open().await;
    let cors = json!([{"type": "CORS", "cors": {"allowOrigins": ["https://a.example"]}}]);
    let missing = json!({"name": "missing", "port": 80});
    for backends in [json!([missing]), json!([])] {
        shop.http_route(json!([{"filters": cors, "backendRefs": backends}])).await;
        let reply = shop.ask(&get("/", "origin: https://a.example\r\n")).await;
        assert_eq!((reply.status, reply.all("tulle-reason")), (500, vec!["RouteNoBackend"]), "{backends}");
        assert_eq!(reply.all("access-control-allow-origin"), ["https://a.example"], "{backends}");
    }
}

#[tokio::test]
async fn a_head_that_a_route_makes_too_long_is_refused_with_the_name_of_the_route() {
    let shop = Shop::open().await;
    shop.http_route(json!([{
        "filters": [{"type": "RequestHeaderModifier", "requestHeaderModifier": {
            "set": [{"name": "x-more", "value": "y".repeat(5 * 1024)}],
        }}],
        "backendRefs": [shop.backend(shop.to_a, 1)],
    }]))
    .await;
    let long = get("/", &format!("x-long: {}\r\n", "x".repeat(59 * 1024)));
    let reply = shop.ask(&long).await;
    assert_eq!((reply.status, reply.all("tulle-reason")), (431, vec!["RouteHeadTooLong"]));
    assert!(reply.body.contains("HTTPRoute/shop/web"), "{}", reply.body);
    assert_eq!(shop.ask(&get("/", "")).await.from(), "a", "others are served");
}
