//! Routes of the Gateway API: which holds where and for whom, and what their status says.

use serde_json::Value;
use tulle_mesh::features::{ROUTES_V1, TRAFFIC_V1};
use tulle_mesh::proto::{ResourceName, ResourceType, route, stamp};

use super::*;
use crate::model::gateway::{ParentStatus, RouteKind, RouteObject, RouteSpec, Standings};

mod rules;

/// Of Service `shop/api`.
pub(super) const API: &str = "10.96.0.2:80";

pub(super) fn route_of(kind: RouteKind, name: &str, spec: Value) -> RouteObject {
    let (namespace, name) = name.split_once('/').unwrap();
    let spec: RouteSpec = serde_json::from_value(spec).unwrap();
    RouteObject {
        kind,
        namespace: namespace.into(),
        name: name.into(),
        uid: format!("uid-{name}").into(),
        generation: 3,
        created: 0,
        parents: spec.parents,
        hostnames: spec.hostnames,
        rules: spec.rules,
    }
}

/// A parent `shop/web` with more fields.
pub(super) fn web(more: Value) -> Value {
    let mut parent = json!({"group": "", "kind": "Service", "namespace": "shop", "name": "web"});
    parent.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    parent
}

/// An HTTPRoute of `shop/web` with one rule, of its own name, for this path.
pub(super) fn http(name: &str, created: i64, path: &str) -> RouteObject {
    let rule = name.rsplit('/').next().unwrap();
    let rule = json!({"name": rule, "matches": [{"path": {"value": path}}], "backendRefs": [{"name": "api", "namespace": "shop", "port": 80}]});
    let spec = json!({"parentRefs": [web(json!({}))], "rules": [rule]});
    RouteObject { created, ..route_of(RouteKind::Http, name, spec) }
}

pub(super) fn service(address: &str, ports: &[(&str, u16, Option<&str>)]) -> Service {
    let port = |&(name, port, app_protocol): &(&str, u16, Option<&str>)| Port {
        name: name.into(),
        port,
        app_protocol: app_protocol.map(Into::into),
    };
    Service {
        cluster_ips: vec![address.parse().unwrap()],
        ports: ports.iter().map(port).collect(),
        ..Service::default()
    }
}

/// `shop/web` with ports 80 (http) and 8080 (admin), `shop/api` with port 80, and a pod in namespaces shop and team.
pub(super) fn world() -> Model {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_pod(Pod { namespace: "team".into(), ..pod("c", "10.1.0.9", "r1") });
    model.apply_service(
        key("shop", "web"),
        service("10.96.0.1", &[("http", 80, None), ("admin", 8080, None)]),
    );
    model.apply_service(key("shop", "api"), service("10.96.0.2", &[("http", 80, None)]));
    model
}

pub(super) fn rules_at(model: &Model, address: &str, namespace: &str) -> Option<proto::Rules> {
    let route = model.route(address.parse().unwrap(), namespace);
    let Some(route::Kind::Service(service)) = route.kind else { panic!("{address}") };
    service.rules
}

/// Names of the rules of all matches, in order of precedence; of none where nothing is attached.
fn names(model: &Model, address: &str, namespace: &str) -> Vec<String> {
    let Some(rules) = rules_at(model, address, namespace) else { return Vec::new() };
    rules.matches.iter().map(|one| rules.rules[one.rule as usize].name.clone()).collect()
}

pub(super) fn status(model: &Model, route: &RouteObject) -> Vec<ParentStatus> {
    model.route_status(&route.key())
}

/// Accepted or not, and the reasons of both conditions, for the only parent.
pub(super) fn verdict(model: &Model, route: &RouteObject) -> (bool, &'static str, &'static str) {
    let status = status(model, route);
    let [one] = status.as_slice() else { panic!("{status:?}") };
    (one.accepted.status, one.accepted.reason, one.resolved.reason)
}

const GOOD: (bool, &str, &str) = (true, "Accepted", "ResolvedRefs");

fn variant(model: &Model, address: &str, pod: &str) -> Variant {
    let r#type = ResourceType::Route.into();
    model.variant(&ResourceName { r#type, cluster: String::new(), name: address.into() }, pod)
}

#[test]
fn a_route_is_attached_to_services_and_to_nothing_else() {
    let mut model = world();
    for parent in [
        json!({"kind": "Service", "name": "web"}),
        json!({"group": "gateway.networking.k8s.io", "kind": "Service", "name": "web"}),
        json!({"group": "", "name": "web"}),
        json!({"group": "", "kind": "Gateway", "name": "web"}),
    ] {
        let other = route_of(RouteKind::Http, "shop/r", json!({"parentRefs": [parent], "rules": [{}]}));
        model.apply_route(other.clone());
        assert_eq!(rules_at(&model, VIP, "shop"), None, "{parent}");
        assert!(status(&model, &other).is_empty(), "it is somebody else's: {parent}");
    }
    let own = json!({"group": "", "kind": "Service", "name": "web"});
    let route = route_of(RouteKind::Http, "shop/r", json!({"parentRefs": [own], "rules": [{"name": "r"}]}));
    model.apply_route(route.clone());
    for address in [VIP, "10.96.0.1:8080"] {
        assert_eq!(names(&model, address, "shop"), ["r"], "{address}");
    }
    assert_eq!(rules_at(&model, API, "shop"), None);
    assert_eq!(status(&model, &route)[0].parent.namespace, None, "it is echoed as it is");
    model.delete_route(&route.key());
    assert_eq!((rules_at(&model, VIP, "shop"), model.routes().count()), (None, 0));
}

#[test]
fn a_parent_means_the_port_that_it_names_by_number_and_name() {
    let both = |at_http: bool, at_admin: bool| [(VIP, at_http), ("10.96.0.1:8080", at_admin)];
    for (more, expected) in [
        (json!({}), both(true, true)),
        (json!({"port": 80}), both(true, false)),
        (json!({"sectionName": "admin"}), both(false, true)),
        (json!({"port": 8080, "sectionName": "admin"}), both(false, true)),
        (json!({"port": 8080, "sectionName": "http"}), both(false, false)),
        (json!({"port": 81}), both(false, false)),
    ] {
        let mut model = world();
        let route =
            route_of(RouteKind::Http, "shop/r", json!({"parentRefs": [web(more.clone())], "rules": [{}]}));
        model.apply_route(route.clone());
        for (address, attached) in expected {
            assert_eq!(rules_at(&model, address, "shop").is_some(), attached, "{more} {address}");
        }
        let anywhere = expected.iter().any(|(_, attached)| *attached);
        let reason = if anywhere { "Accepted" } else { "NoMatchingParent" };
        assert_eq!(verdict(&model, &route).1, reason, "{more}");
    }
}

#[test]
fn only_a_service_with_a_cluster_address_can_be_a_parent() {
    let mut model = world();
    let route = http("shop/r", 0, "/");
    model.apply_route(route.clone());
    assert_eq!(verdict(&model, &route), GOOD);
    let headless =
        Service { cluster_ips: Vec::new(), headless: true, ..model.services[&key("shop", "web")].clone() };
    // An external address does not make it one.
    let headless = Service { other_ips: vec!["203.0.113.1".parse().unwrap()], ..headless };
    model.apply_service(key("shop", "web"), headless);
    assert_eq!(verdict(&model, &route).1, "NoMatchingParent");
    assert_eq!(rules_at(&model, "203.0.113.1:80", "shop"), None);
    model.delete_service(&key("shop", "web"));
    let message = &status(&model, &route)[0].accepted.message;
    assert!(message.contains("no Service shop/web"), "{message}");
}

#[test]
fn a_consumers_routes_replace_the_producers_for_its_own_clients_only() {
    let mut model = world();
    let (producer, consumer) = (http("shop/producer", 1, "/p"), http("team/consumer", 2, "/c"));
    model.apply_route(producer.clone());
    assert_eq!(names(&model, VIP, "team"), ["producer"], "a producer's route is for everybody");
    assert_eq!(variant(&model, VIP, "uid-c"), Variant::Any);
    model.apply_route(consumer.clone());
    assert_eq!(names(&model, VIP, "team"), ["consumer"], "the two are not merged");
    for other in ["shop", "elsewhere", ""] {
        assert_eq!(names(&model, VIP, other), ["producer"], "{other:?}");
    }
    assert_eq!(variant(&model, VIP, "uid-c"), Variant::Namespace("team".into()));
    assert_eq!(variant(&model, VIP, "uid-a"), Variant::Any);
    assert_eq!(variant(&model, API, "uid-c"), Variant::Any, "another Service");
    for route in [&producer, &consumer] {
        assert_eq!(verdict(&model, route), GOOD);
    }
    model.delete_route(&producer.key());
    assert_eq!(
        (names(&model, VIP, "team"), rules_at(&model, VIP, "shop")),
        (vec!["consumer".to_owned()], None)
    );
}

#[test]
fn a_rule_has_its_place_in_the_route_also_where_one_before_it_is_not_sent() {
    let mut model = world();
    let broken = json!({"matches": [{"headers": [{"name": "Connection", "value": "close"}]}]});
    let whole = json!({"backendRefs": [{"name": "api", "namespace": "shop", "port": 80}]});
    let spec = json!({"parentRefs": [web(json!({}))], "rules": [broken, whole]});
    let route = route_of(RouteKind::Http, "shop/r", spec);
    let key = route.key();
    model.apply_route(route);
    assert_eq!((model.rule_index(&key, 0), model.rule_index(&key, 1)), (Some(1), None));
}

#[test]
fn routes_are_merged_by_precedence_and_then_by_age() {
    let mut model = world();
    for (name, created, path) in [
        ("shop/young", 9, "/a"),
        ("shop/old", 1, "/a"),
        ("shop/b", 5, "/a"),
        ("shop/a", 5, "/a"),
        ("shop/long", 9, "/a/b"),
    ] {
        model.apply_route(http(name, created, path));
    }
    assert_eq!(names(&model, VIP, "shop"), ["long", "old", "a", "b", "young"]);
    let rules = rules_at(&model, VIP, "shop").unwrap();
    for one in &rules.matches {
        let rule = &rules.rules[one.rule as usize];
        let object = rules.routes[rule.route as usize].object.as_ref().unwrap();
        assert_eq!((object.name.as_str(), object.generation), (rule.name.as_str(), 3));
    }
}

#[test]
fn of_two_kinds_at_one_port_the_first_holds_whatever_its_age() {
    let of = |kind, name: &str, parent| {
        route_of(kind, name, json!({"parentRefs": [web(parent)], "rules": [{"name": name}]}))
    };
    let grpc = RouteObject { created: 9, ..of(RouteKind::Grpc, "shop/grpc", json!({"port": 80})) };
    let (http, tls, tcp) = (
        of(RouteKind::Http, "shop/http", json!({})),
        of(RouteKind::Tls, "shop/tls", json!({"port": 80})),
        of(RouteKind::Tcp, "shop/tcp", json!({"port": 8080})),
    );
    let mut model = world();
    for route in [&tcp, &tls, &http, &grpc] {
        model.apply_route(route.clone());
    }
    let kind = |model: &Model, address: &str| rules_at(model, address, "shop").unwrap().kind();
    assert_eq!(kind(&model, VIP), proto::RouteKind::Grpc);
    assert_eq!(kind(&model, "10.96.0.1:8080"), proto::RouteKind::Http);
    assert_eq!((verdict(&model, &grpc), verdict(&model, &http)), (GOOD, GOOD), "one port is enough");
    let message = &status(&model, &http)[0].accepted.message;
    assert!(message.contains("GRPCRoute shop/grpc holds at port 80"), "{message}");
    let conflicted = (false, "RouteReasonConflicted", "ResolvedRefs");
    assert_eq!((verdict(&model, &tls), verdict(&model, &tcp)), (conflicted, conflicted));
    model.delete_route(&grpc.key());
    model.delete_route(&http.key());
    assert_eq!(kind(&model, VIP), proto::RouteKind::Tls);
    assert_eq!((verdict(&model, &tls), verdict(&model, &tcp)), (GOOD, GOOD));
}

#[test]
fn a_consumers_route_does_not_conflict_with_a_producers_of_another_kind() {
    let mut model = world();
    let spec = json!({"parentRefs": [web(json!({}))], "rules": [{}]});
    let (grpc, http) =
        (route_of(RouteKind::Grpc, "shop/r", spec.clone()), route_of(RouteKind::Http, "team/r", spec));
    model.apply_route(grpc.clone());
    model.apply_route(http.clone());
    assert_eq!((verdict(&model, &grpc), verdict(&model, &http)), (GOOD, GOOD));
    assert_eq!(rules_at(&model, VIP, "team").unwrap().kind(), proto::RouteKind::Http);
}

#[test]
fn a_route_for_which_there_is_no_room_is_refused_and_the_older_ones_hold() {
    let mut model = world();
    let rules: Vec<Value> = (0..16).map(|_| json!({})).collect();
    let route = |number: i64| RouteObject {
        created: number,
        ..route_of(
            RouteKind::Http,
            &format!("shop/r{number}"),
            json!({"parentRefs": [web(json!({}))], "rules": rules}),
        )
    };
    for number in (0..=32).rev() {
        model.apply_route(route(number));
    }
    assert_eq!(rules_at(&model, VIP, "shop").unwrap().rules.len(), 512);
    assert_eq!(verdict(&model, &route(31)), GOOD);
    assert_eq!(verdict(&model, &route(32)).1, "TooManyRules");
    let value = "x".repeat(4096);
    let large = |name: &str| json!({"name": name, "value": value});
    let headers: Vec<Value> = (0..16).map(|n| large(&format!("x-{n}"))).collect();
    let rule = json!({"matches": (0..17).map(|_| json!({"headers": headers})).collect::<Vec<_>>()});
    let large =
        route_of(RouteKind::Http, "team/large", json!({"parentRefs": [web(json!({}))], "rules": [rule]}));
    model.apply_route(large.clone());
    assert_eq!(verdict(&model, &large).1, "TooManyRules");
    assert_eq!(variant(&model, VIP, "uid-c"), Variant::Any);
}

/// What clients in a namespace are sent for [`VIP`].
fn compiled(model: &Model, namespace: &str) -> Compiled {
    let r#type = ResourceType::Route.into();
    let name = ResourceName { r#type, cluster: String::new(), name: VIP.into() };
    model.compile(&name, &Variant::Namespace(namespace.into())).unwrap()
}

#[test]
fn the_route_of_an_address_is_stamped_with_the_routes_in_it_and_requires_a_sidecar_that_knows_rules() {
    let mut model = world();
    assert!(compiled(&model, "shop").resource.requires.is_empty());
    model.apply_route(http("shop/one", 0, "/1"));
    model.apply_route(http("shop/two", 0, "/2"));
    model.apply_route(http("team/three", 0, "/3"));
    let made = compiled(&model, "shop");
    assert_eq!(made.resource.requires, [ROUTES_V1]);
    assert_eq!(made.endpoints(), ["shop/api:80", "shop/web:80"]);
    let stamps: Vec<_> = made
        .stamps
        .iter()
        .map(|stamp| (stamp.kind(), stamp.namespace.as_str(), stamp.name.as_str(), stamp.version))
        .collect();
    let expected = |name: &'static str| (stamp::Kind::Route, "shop", name, 3);
    assert_eq!(stamps, [expected("HTTPRoute/one"), expected("HTTPRoute/two")]);
    assert_eq!(
        (made.stamps[0].uid.as_str(), http("shop/one", 0, "/").key().stamped()),
        ("uid-one", "HTTPRoute/one".into())
    );
    let consumer = compiled(&model, "team");
    assert_eq!((consumer.stamps.len(), consumer.stamps[0].name.as_str()), (1, "HTTPRoute/three"));
}

#[test]
fn the_route_that_leads_to_a_backend_carries_what_policies_say_about_it_as_a_backend() {
    let mut model = world();
    model.apply_route(http("shop/r", 0, "/"));
    let target = json!({"kind": "Service", "name": "api"});
    let spec = json!({"target": target, "breaker": {"consecutiveFailures": 3}, "timeout": {"request": "1s"}});
    model.apply_policy(key("shop", "p"), policy("p", 0, spec));
    let made = compiled(&model, "shop");
    assert_eq!(made.resource.requires, [ROUTES_V1, TRAFFIC_V1]);
    let stamps: Vec<_> = made.stamps.iter().map(|stamp| (stamp.kind(), stamp.name.as_str())).collect();
    assert_eq!(stamps, [(stamp::Kind::Route, "HTTPRoute/r"), (stamp::Kind::Policy, "p")]);
    let rules = rules_at(&model, VIP, "shop").unwrap();
    let traffic = rules.rules[0].backends[0].traffic.as_ref().unwrap();
    assert_eq!(
        (traffic.breaker.is_some(), traffic.timeout.is_some()),
        (true, false),
        "its time is the route's"
    );
    model.delete_policy(&key("shop", "p"));
    assert_eq!(compiled(&model, "shop").resource.requires, [ROUTES_V1]);
}

#[test]
fn traffic_to_a_pods_own_address_sees_no_route() {
    let mut model = world();
    model.apply_route(http("shop/r", 0, "/"));
    let route = model.route("10.1.0.1:80".parse().unwrap(), "shop");
    assert!(matches!(route.kind, Some(route::Kind::Pod(_))));
}

#[test]
fn nothing_of_a_gateways_route_is_compiled_and_its_backends_do_not_touch_it() {
    let mut model = world();
    let rule = json!({"backendRefs": [{"name": "api", "port": 80}]});
    let spec = json!({"parentRefs": [{"name": "edge"}], "hostnames": ["a.example"], "rules": [rule]});
    let route = route_of(RouteKind::Http, "shop/ingress", spec);
    model.apply_route(route.clone());
    assert!(model.route_object(&route.key()).unwrap().rules.is_empty());
    drop(model.take_touched());
    model.apply_service(key("shop", "api"), service("10.96.0.2", &[("http", 81, None)]));
    assert!(model.take_touched().routes.is_empty());
    model.apply_route(RouteObject { parents: http("shop/other", 0, "/").parents, ..route.clone() });
    assert_eq!(rules_at(&model, VIP, "shop").unwrap().rules.len(), 1, "it is a Service's now");
    model.apply_route(route);
    assert_eq!(rules_at(&model, VIP, "shop"), None);
}

#[test]
fn routes_that_are_looked_at_together_say_what_each_says_alone() {
    let mut model = world();
    let spec = json!({"parentRefs": [web(json!({"port": 80}))], "rules": [{}]});
    let routes = [
        http("shop/one", 1, "/"),
        http("shop/two", 2, "/"),
        http("team/three", 0, "/"),
        route_of(RouteKind::Grpc, "shop/four", spec.clone()),
        route_of(RouteKind::Tcp, "team/five", spec),
    ];
    for route in &routes {
        model.apply_route(route.clone());
    }
    let mut known = Standings::default();
    for route in &routes {
        let among = model.route_status_among(&route.key(), &mut known);
        assert_eq!(among, model.route_status(&route.key()), "{}", route.key());
    }
}
