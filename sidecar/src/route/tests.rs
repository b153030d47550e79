//! Where a dialled address leads, from what the operator has sent to what becomes of a request.

use tulle_mesh::proto::value_match::Type;
use tulle_mesh::{features, proto};

use super::*;
use crate::backend::Ask;
use crate::config::{ConfigStore, Endpoint, Endpoints, PodRoute, Route, ServiceRoute, resource};
use crate::route::filters::tests::request;

const DIALLED: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), 80);

fn endpoint(port: u16) -> Endpoint {
    Endpoint { pod_uid: "pod".into(), ..Endpoint::at(SocketAddr::from(([10, 0, 0, 1], port))) }
}

fn service(endpoints: &str, protocol: Protocol) -> Route {
    Route::Service(ServiceRoute { protocol, endpoints: endpoints.into(), ..ServiceRoute::default() })
}

fn backend(port: &Port, backends: &Backends) -> Rc<Backend> {
    Rc::clone(&port.plan_of(backends).unwrap().default.backend)
}

async fn port() -> (Arc<ConfigStore>, Port) {
    let (store, _wanted) = ConfigStore::new();
    let entry = store.resolve(DIALLED).await;
    (store, Port::new(DIALLED, entry))
}

#[tokio::test]
async fn an_address_without_an_answer_passes_through_and_leads_somewhere_once_there_is_one() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    assert_eq!(port.target_for(&backends, &[]), Target::Passthrough);
    assert!(port.plan_of(&backends).is_none());
    store.set_route(DIALLED, service("shop/web:80", Protocol::Http2));
    assert_eq!(port.target_for(&backends, &[]), Target::Passthrough, "its endpoints are not known yet");
    let endpoints = Endpoints { endpoints: vec![endpoint(8080)], ..Endpoints::default() };
    store.set_endpoints(&"shop/web:80".into(), endpoints);
    assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Http2));
    let chosen = backend(&port, &backends).pick(&Ask::default()).unwrap();
    assert_eq!(chosen.endpoint.address.port(), 8080);
    store.set_route(DIALLED, Route::Unknown);
    assert_eq!(port.target_for(&backends, &[]), Target::Passthrough);
    assert!(port.plan_of(&backends).is_none());
}

#[tokio::test]
async fn what_is_known_of_endpoints_outlives_a_change_of_their_route() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    store.set_endpoints(&"shop/web:80".into(), Endpoints::default());
    store.set_route(DIALLED, service("shop/web:80", Protocol::Detect));
    let before = backend(&port, &backends);
    store.set_route(DIALLED, service("shop/web:80", Protocol::Http1));
    assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Http1));
    assert!(Rc::ptr_eq(&before, &backend(&port, &backends)));
}

#[tokio::test]
async fn a_pods_address_has_the_protocol_that_was_declared_and_the_pods_own_passes_through() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let pod = PodRoute { endpoint: endpoint(6379), protocol: Protocol::Opaque };
    let own = [pod.endpoint.address.ip()];
    store.set_route(DIALLED, Route::Pod(pod));
    assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Opaque));
    assert_eq!(port.target_for(&backends, &own), Target::Passthrough);
}

/// Publishes rules of the Service `shop/web`.
fn publish(store: &ConfigStore, rules: proto::Rules) {
    for name in ["shop/web:80", "shop/a:80", "shop/b:80"] {
        if !store.holds(&crate::config::store::Name::Endpoints(name.into())) {
            let endpoints = Endpoints { endpoints: vec![endpoint(8080)], ..Endpoints::default() };
            store.set_endpoints(&name.into(), endpoints);
        }
    }
    let service = proto::ServiceRoute {
        namespace: "shop".into(),
        name: "web".into(),
        port: 80,
        endpoints: "shop/web:80".into(),
        rules: Some(rules),
        ..Default::default()
    };
    let name = proto::ResourceName { name: DIALLED.to_string(), ..Default::default() };
    let route = proto::Route { kind: Some(proto::route::Kind::Service(service)) };
    let body = Some(proto::resource::Body::Route(route));
    let resource = proto::Resource { name: Some(name), body, ..Default::default() };
    store.apply(resource::decode(&resource, features::ALL).unwrap());
}

fn to(name: &str, weight: u32) -> proto::Backend {
    let endpoints = if name.is_empty() { String::new() } else { format!("shop/{name}:80") };
    proto::Backend {
        weight,
        endpoints,
        namespace: "shop".into(),
        name: name.into(),
        port: 80,
        ..Default::default()
    }
}

/// A rule for a path prefix.
fn rule(prefix: &str, backends: Vec<proto::Backend>) -> (proto::Match, proto::RouteRule) {
    let path = proto::ValueMatch { r#type: Type::Prefix.into(), value: prefix.into(), ..Default::default() };
    let wanted = proto::Match { path: Some(path), ..Default::default() };
    (wanted, proto::RouteRule { backends, ..Default::default() })
}

fn rules(kind: proto::RouteKind, all: Vec<(proto::Match, proto::RouteRule)>) -> proto::Rules {
    let (matches, rules): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    let matches = matches.into_iter().zip(0..).map(|(one, rule)| proto::Match { rule, ..one }).collect();
    let routes = vec![proto::RouteRef { kind: kind.into(), object: Some(proto::ObjectRef::default()) }];
    proto::Rules { kind: kind.into(), routes, rules, matches }
}

fn get(path: &str) -> Head {
    request(&format!("GET {path} HTTP/1.1\r\nhost: web\r\n\r\n"))
}

/// The Service that a request goes to, or the status that it is answered with.
fn outcome(plan: &Plan, head: &Head) -> String {
    match plan.rules.as_ref().unwrap().find(head, 80) {
        Found::Forward(found) => found.way.backend.counted_as().1.to_owned(),
        Found::Answer { head, .. } => head.status().to_string(),
        Found::Fail { failure, .. } => failure.status().to_string(),
    }
}

#[tokio::test]
async fn a_request_goes_to_the_backend_of_its_rule_and_one_without_a_rule_nowhere() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let redirect = proto::Redirect { hostname: "other".into(), ..Default::default() };
    let (moved, mut elsewhere) = rule("/moved", vec![]);
    elsewhere.filters = vec![proto::Filter { kind: Some(proto::filter::Kind::Redirect(redirect)) }];
    let all = vec![
        rule("/a", vec![to("a", 1)]),
        rule("/b", vec![to("b", 1)]),
        rule("/none", vec![]),
        rule("/nought", vec![to("a", 0)]),
        (moved, elsewhere),
    ];
    publish(&store, rules(proto::RouteKind::Http, all));
    let plan = port.plan_of(&backends).unwrap();
    for (path, expected) in [
        ("/a/x", "a"),
        ("/b", "b"),
        ("/none", "500"),
        ("/nought", "500"),
        ("/moved", "302"),
        ("/elsewhere", "404"),
    ] {
        assert_eq!(outcome(&plan, &get(path)), expected, "{path}");
    }
    assert_eq!(plan.default.backend.counted_as(), ("shop", "web"));
    let opaque = plan.connection(Connection::Other).unwrap();
    assert!(Rc::ptr_eq(&opaque, &plan.default), "what is not HTTP goes to the Service itself");
}

#[tokio::test]
async fn the_share_of_an_invalid_backend_is_an_error_and_turns_go_on_over_a_change_of_another_rule() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let shared = || rule("/", vec![to("a", 5), to("", 3), to("b", 2)]);
    let mut seen = Vec::new();
    for round in 0..10 {
        // Another rule comes and goes.
        let mut all = vec![shared()];
        if round % 2 == 1 {
            all.push(rule("/other", vec![to("b", 1)]));
        }
        publish(&store, rules(proto::RouteKind::Http, all));
        let plan = port.plan_of(&backends).unwrap();
        seen.push(outcome(&plan, &get("/")));
    }
    let count = |wanted: &str| seen.iter().filter(|one| *one == wanted).count();
    assert_eq!((count("a"), count("500"), count("b")), (5, 3, 2), "{seen:?}");
}

#[tokio::test]
async fn a_connection_goes_by_the_name_that_it_asks_for_or_by_weight() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let named = |name: &str, server: &str| {
        let wanted = proto::Match { server_names: vec![server.into()], ..Default::default() };
        (wanted, proto::RouteRule { backends: vec![to(name, 1)], ..Default::default() })
    };
    let all = vec![named("a", "a.example"), named("b", "*.example")];
    publish(&store, rules(proto::RouteKind::Tls, all));
    assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Opaque));
    let plan = port.plan_of(&backends).unwrap();
    assert!(plan.is_by_server_name());
    let leads = |connection| -> Result<String, Failure> {
        let way = plan.connection(connection)?;
        Ok(way.backend.counted_as().1.to_owned())
    };
    assert_eq!(leads(Connection::Tls(Some("a.example"))), Ok("a".to_owned()));
    assert_eq!(leads(Connection::Tls(Some("x.example"))), Ok("b".to_owned()));
    for lost in [Connection::Tls(Some("example.org")), Connection::Tls(None), Connection::Other] {
        assert_eq!(leads(lost), Err(Failure::RouteNone), "{lost:?}");
    }

    let any = (
        proto::Match::default(),
        proto::RouteRule { backends: vec![to("a", 1), to("", 1)], ..Default::default() },
    );
    publish(&store, rules(proto::RouteKind::Tcp, vec![any]));
    let plan = port.plan_of(&backends).unwrap();
    let ways: Vec<_> = (0..4).map(|_| plan.connection(Connection::Other).map(|_| ())).collect();
    assert_eq!(ways.iter().filter(|way| **way == Ok(())).count(), 2, "{ways:?}");
    assert_eq!(ways.iter().filter(|way| **way == Err(Failure::RouteNoBackend)).count(), 2, "{ways:?}");
    assert!(ways.windows(2).all(|two| two[0] != two[1]), "they take turns: {ways:?}");
}

#[tokio::test]
async fn clients_that_send_two_requests_each_share_both_by_weight() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    publish(&store, rules(proto::RouteKind::Http, vec![rule("/", vec![to("a", 90), to("b", 10)])]));
    let destination = port.entry.current().unwrap();
    let (mut first, mut second) = (0, 0);
    for _ in 0..2_000 {
        let plan = Plan::of(&destination, &backends, None).unwrap();
        first += usize::from(outcome(&plan, &get("/")) == "b");
        second += usize::from(outcome(&plan, &get("/")) == "b");
    }
    assert!((100..300).contains(&first) && (100..300).contains(&second), "{first}, {second} of 2000");
}

#[tokio::test]
async fn a_connection_that_turns_out_to_be_http_takes_no_turn_of_requests() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let any = (
        proto::Match::default(),
        proto::RouteRule { backends: vec![to("a", 1), to("b", 1)], ..Default::default() },
    );
    publish(&store, rules(proto::RouteKind::Tcp, vec![any]));
    let plan = port.plan_of(&backends).unwrap();
    let mut seen = Vec::new();
    for _ in 0..10 {
        plan.connection(Connection::Other).unwrap();
        seen.push(outcome(&plan, &get("/")));
    }
    assert_eq!(seen.iter().filter(|name| *name == "a").count(), 5, "{seen:?}");
}

#[tokio::test]
async fn routes_of_grpc_speak_http_2_where_nothing_is_declared() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    publish(
        &store,
        rules(proto::RouteKind::Grpc, vec![(proto::Match::default(), proto::RouteRule::default())]),
    );
    assert_eq!(port.target_for(&backends, &[]), Target::Endpoints(Protocol::Http2));
}

#[tokio::test]
async fn a_preflight_is_answered_by_the_rule_of_the_request_that_it_asks_about() {
    let (store, port) = port().await;
    let backends = Backends::of_client("client");
    let cors = proto::Cors { allow_origins: vec!["*".into()], ..Default::default() };
    let (mut puts, mut allowed) = rule("/", vec![to("a", 1)]);
    puts.method = "PUT".into();
    allowed.filters = vec![proto::Filter { kind: Some(proto::filter::Kind::Cors(cors)) }];
    publish(&store, rules(proto::RouteKind::Http, vec![(puts, allowed), rule("/", vec![to("b", 1)])]));
    let plan = port.plan_of(&backends).unwrap();
    let asks = |method: &str| {
        request(&format!(
            "OPTIONS / HTTP/1.1\r\nhost: web\r\norigin: http://x\r\naccess-control-request-method: {method}\r\n\r\n"
        ))
    };
    assert_eq!(outcome(&plan, &asks("PUT")), "204");
    assert_eq!(outcome(&plan, &asks("POST")), "b", "the server answers it itself");
}

#[test]
fn requests_with_the_same_key_have_the_same_number() {
    let head = request("GET / HTTP/1.1\r\nhost: web\r\nx-user: ann\r\ncookie: a=b; user=ann\r\n\r\n");
    let of = |key| hash_of_request(&key, &head, "pod-1");
    let header = of(HashKey::Header("X-User".into())).unwrap();
    assert_eq!(of(HashKey::Cookie("user".into())), Some(header));
    assert_ne!(of(HashKey::Source), Some(header));
    assert_eq!(of(HashKey::Header("x-other".into())), None);
}

#[test]
fn only_a_declared_backend_changes_what_is_spoken_and_only_where_http_2_can_carry_the_request() {
    let upgrade = request("GET / HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
    let nameless = request("GET / HTTP/1.0\r\n\r\n");
    for (declared, head, came, expected) in [
        (Protocol::Http2, get("/"), Travels::Http1, Travels::Http2),
        (Protocol::Http2, get("/"), Travels::Http2, Travels::Http2),
        (Protocol::Http2, upgrade, Travels::Http1, Travels::Http1),
        (Protocol::Http2, nameless, Travels::Http1, Travels::Http1),
        (Protocol::Detect, get("/"), Travels::Http1, Travels::Http1),
        (Protocol::Opaque, get("/"), Travels::Http1, Travels::Http1),
        (Protocol::Http1, get("/"), Travels::Http2, Travels::Http2),
    ] {
        assert_eq!(spoken_to(declared, &head, came), expected, "{declared:?} {head:?}");
    }
}
