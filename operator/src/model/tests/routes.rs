//! Routes and endpoints: what is spoken at an address, and whose endpoints it leads to.

use tulle_mesh::proto::resource::Body;
use tulle_mesh::proto::{Protocol, ResourceName, ResourceType, route};

use super::*;

fn compiled(model: &Model, kind: ResourceType, name: &str) -> Option<Compiled> {
    let name = ResourceName { r#type: kind.into(), cluster: String::new(), name: name.into() };
    model.compile(&name, &Variant::Any)
}

fn leads_to(model: &Model, address: &str) -> route::Kind {
    model.route(address.parse().unwrap(), "").kind.unwrap()
}

fn service_route(model: &Model, address: &str) -> proto::ServiceRoute {
    let route::Kind::Service(service) = leads_to(model, address) else { panic!("{address}") };
    service
}

fn spoken_at_pod(model: &Model, address: &str) -> Protocol {
    let route::Kind::Pod(pod) = leads_to(model, address) else { panic!("{address}") };
    pod.protocol()
}

fn endpoints(model: &Model, name: &str) -> proto::Endpoints {
    let found = compiled(model, ResourceType::Endpoints, name).unwrap();
    let Some(Body::Endpoints(endpoints)) = found.resource.body else { panic!("{name}") };
    endpoints
}

/// `shop/web` as another Service with this name, addresses and declared protocol.
fn also(model: &mut Model, name: &str, ip: Option<&str>, app_protocol: Option<&str>) {
    let web = model.services[&key("shop", "web")].clone();
    let port = Port { app_protocol: app_protocol.map(Into::into), ..web.ports[0].clone() };
    let cluster_ips = ip.into_iter().map(|ip| ip.parse().unwrap()).collect();
    let other =
        Service { cluster_ips, other_ips: Vec::new(), headless: ip.is_none(), ports: vec![port], ..web };
    model.apply_service(key("shop", name), other);
    let slice = Slice { service: name.into(), ..model.slices[&key("shop", "web-1")].clone() };
    model.apply_slice(key("shop", &format!("{name}-1")), slice);
}

#[test]
fn all_addresses_of_a_service_lead_to_the_same_endpoints() {
    let model = shop(&[pod("a", "10.1.0.1", "r1")]);
    for address in [VIP, "203.0.113.1:80"] {
        let route = service_route(&model, address);
        assert_eq!(route.endpoints, "shop/web:80");
        assert_eq!((route.namespace.as_str(), route.name.as_str(), route.port), ("shop", "web", 80));
        let made = compiled(&model, ResourceType::Route, address).unwrap();
        assert_eq!(made.endpoints(), ["shop/web:80"]);
        assert_eq!(made.counted_as, Some(("shop".into(), "web".into())));
        assert!(made.stamps.is_empty() && made.resource.requires.is_empty());
    }
    assert_eq!(endpoints(&model, "shop/web:80").endpoints, view(&model, "").endpoints);
    for address in ["10.96.0.1:81", "192.0.2.7:80"] {
        assert!(matches!(leads_to(&model, address), route::Kind::Unknown(_)), "{address}");
    }
}

#[test]
fn each_family_of_a_service_has_endpoints_of_its_own() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "fd00:1::2", "r1")]);
    let mut service = model.services[&key("shop", "web")].clone();
    service.cluster_ips.push("fd00::1".parse().unwrap());
    model.apply_service(key("shop", "web"), service);
    let of = |address: &str| {
        let found = endpoints(&model, &service_route(&model, address).endpoints).endpoints;
        found.into_iter().map(|endpoint| endpoint.address).collect::<Vec<_>>()
    };
    assert_eq!(of(VIP), ["10.1.0.1:8080"]);
    assert_eq!(of("[fd00::1]:80"), ["[fd00:1::2]:8080"]);
}

#[test]
fn a_name_of_endpoints_has_one_spelling() {
    for text in ["shop/web:80", "shop/web:80/ipv6", "a/b:65535"] {
        let name: EndpointsName = text.parse().unwrap();
        assert_eq!(name.to_string(), text);
    }
    for text in ["", "shop/web", "web:80", "/web:80", "shop/:80", "shop/web:+80", "shop/web:080", "a/b/c:1"] {
        assert_eq!(text.parse::<EndpointsName>(), Err(NotEndpoints), "{text}");
    }
    assert!(
        "shop/web:65536".parse::<EndpointsName>().is_err() && "a/b:1/ipv4".parse::<EndpointsName>().is_err()
    );
}

#[test]
fn endpoints_carry_the_shares_and_the_stamp_of_the_canary_and_require_nothing() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), pod("b", "10.1.0.2", "r2")]);
    let status = json!({"approvedRevision": "r1", "canaryRevision": "r2", "weight": 5, "phase": "Progressing", "epoch": 7});
    model.apply_canary(key("shop", "web"), canary(status));
    let made = compiled(&model, ResourceType::Endpoints, "shop/web:80").unwrap();
    let stamp = made.stamps.first().unwrap();
    assert_eq!((made.stamps.len(), stamp.name.as_str(), stamp.version), (1, "web", 7));
    assert_eq!(stamp.kind(), proto::stamp::Kind::Canary);
    assert!(made.resource.requires.is_empty(), "any sidecar must learn where pods are");
    let found = endpoints(&model, "shop/web:80");
    assert_eq!((found.split, found.canary), (view(&model, "").split, view(&model, "").canary));
    let route = compiled(&model, ResourceType::Route, VIP).unwrap();
    assert!(route.stamps.is_empty(), "a weight changes no route");
}

#[test]
fn a_service_that_does_not_exist_has_no_endpoints_and_is_not_counted() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    assert!(endpoints(&model, "shop/web:81").endpoints.is_empty(), "it has no such port");
    model.delete_service(&key("shop", "web"));
    let made = compiled(&model, ResourceType::Endpoints, "shop/web:80").unwrap();
    assert_eq!(made.counted_as, None);
    assert!(endpoints(&model, "shop/web:80").endpoints.is_empty());
    assert!(compiled(&model, ResourceType::Endpoints, "web").is_none());
}

#[test]
fn what_is_sent_to_a_pods_own_address_is_counted_as_its_service_account() {
    let plain = Pod { injected: false, ..pod("b", "10.1.0.2", "r1") };
    let model = shop(&[pod("a", "10.1.0.1", "r1"), plain]);
    let counted_as = |address| compiled(&model, ResourceType::Route, address).unwrap().counted_as;
    assert_eq!(counted_as("10.1.0.1:8080"), Some(("shop".into(), "web".into())));
    assert_eq!(counted_as("10.1.0.2:8080"), None, "its client knows no name of it");
    assert!(model.has_service("shop", "web"));
    assert!(!model.has_service("shop", "api") && !model.has_service("payments", "web"));
}

#[test]
fn endpoints_of_a_local_service_are_those_of_the_clients_node() {
    let far = Pod { node: "node-b".into(), ..pod("b", "10.1.0.2", "r1") };
    let mut model = shop(&[pod("a", "10.1.0.1", "r1"), far]);
    let name = |kind: ResourceType, name: &str| ResourceName {
        r#type: kind.into(),
        cluster: String::new(),
        name: name.into(),
    };
    let web = name(ResourceType::Endpoints, "shop/web:80");
    assert_eq!(model.variant(&web, "uid-b"), Variant::default());
    let local = Service { local_only: true, ..model.services[&key("shop", "web")].clone() };
    model.apply_service(key("shop", "web"), local);
    let variant = model.variant(&web, "uid-b");
    assert_eq!(variant, Variant::Node("node-b".into()));
    assert_eq!(model.variant(&name(ResourceType::Route, VIP), "uid-b"), Variant::default());
    let Some(Body::Endpoints(found)) = model.compile(&web, &variant).unwrap().resource.body else { panic!() };
    assert_eq!(found.endpoints.len(), 1);
    assert_eq!(found.endpoints[0].address, "10.1.0.2:8080");
}

#[test]
fn a_pods_own_address_speaks_what_its_services_declare() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Detect, "nobody declares anything");
    also(&mut model, "peers", None, Some("redis"));
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Opaque);
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:9090"), Protocol::Detect, "another port");
    also(&mut model, "again", Some("10.96.0.8"), Some("tcp"));
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Opaque, "another word for the same");
    also(&mut model, "other", Some("10.96.0.9"), Some("http"));
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Detect, "they disagree");
    model.delete_service(&key("shop", "other"));
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Opaque);
}

#[test]
fn another_namespace_has_no_say_in_what_a_pod_speaks() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    let port = Port { name: "http".into(), port: 80, app_protocol: Some("tcp".into()) };
    model.apply_service(key("evil", "web"), Service { ports: vec![port], ..Service::default() });
    let slice = model.slices[&key("shop", "web-1")].clone();
    model.apply_slice(key("evil", "web-1"), slice);
    assert_eq!(spoken_at_pod(&model, "10.1.0.1:8080"), Protocol::Detect);
}

#[test]
fn what_a_service_declares_is_in_its_route() {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    also(&mut model, "grpc", Some("10.96.0.7"), Some("grpc"));
    assert_eq!(service_route(&model, "10.96.0.7:80").protocol(), Protocol::Http2);
    assert_eq!(service_route(&model, VIP).protocol(), Protocol::Detect);
}

#[test]
fn an_endpoint_says_where_it_is_since_when_it_is_ready_and_who_should_use_it() {
    let a = Pod { ready_unix: 1_700_000_000, ..pod("a", "10.1.0.1", "r1") };
    let mut model = shop(std::slice::from_ref(&a));
    let service = model.services[&key("shop", "web")].clone();
    assert_eq!(endpoints(&model, "shop/web:80").distribution(), proto::Distribution::Any);
    let one = Endpoint {
        zone: "zone-a".into(),
        for_zones: Box::new(["zone-b".into()]),
        for_nodes: Box::new(["node-b".into()]),
        ..endpoint(&a, true)
    };
    let slice = Slice { endpoints: vec![one], ..model.slices[&key("shop", "web-1")].clone() };
    model.apply_slice(key("shop", "web-1"), slice);
    let distribution = Distribution::of(Some("PreferClose"));
    model.apply_service(key("shop", "web"), Service { distribution, ..service });
    let made = endpoints(&model, "shop/web:80");
    assert_eq!(made.distribution(), proto::Distribution::SameZone);
    let one = &made.endpoints[0];
    assert_eq!((one.zone.as_str(), one.node.as_str()), ("zone-a", "node-a"));
    assert_eq!((one.for_zones.join(","), one.for_nodes.join(",")), ("zone-b".into(), "node-b".into()));
    assert_eq!(one.ready_unix, 1_700_000_000);
}

#[test]
fn a_distribution_that_this_build_does_not_know_prefers_nothing() {
    for (text, expected) in [
        (Some("PreferSameZone"), Distribution::SameZone),
        (Some("PreferSameNode"), Distribution::SameNode),
        (Some("PreferSameRack"), Distribution::Any),
        (None, Distribution::Any),
    ] {
        assert_eq!(Distribution::of(text), expected, "{text:?}");
    }
}
