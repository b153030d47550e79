//! What each event touches, and that nothing that differs is left out.

use serde_json::json;
use tulle_mesh::proto::{ResourceName, ResourceType};

use super::super::gateway::{ParentStatus, RouteKind, RouteObject};
use super::super::tests::{canary, endpoint, key, pod, policy, route, shop};
use super::super::{Endpoint, Namespace, Service, Slice};
use super::*;

/// `shop/web` with one pod and a Canary, and nothing touched.
fn quiet() -> Model {
    let mut model = shop(&[pod("a", "10.1.0.1", "r1")]);
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1"})));
    model.take_touched();
    model
}

fn set<T: std::hash::Hash + Eq>(items: impl IntoIterator<Item = T>) -> HashSet<T> {
    items.into_iter().collect()
}

#[test]
fn an_identical_object_touches_nothing() {
    let mut model = quiet();
    model.apply_pod(pod("a", "10.1.0.1", "r1"));
    let service = model.services[&key("shop", "web")].clone();
    model.apply_service(key("shop", "web"), service);
    let slice = model.slices[&key("shop", "web-1")].clone();
    model.apply_slice(key("shop", "web-1"), slice);
    assert!(model.take_touched().is_empty());
}

#[test]
fn readiness_of_a_pod_touches_its_canary_only() {
    let mut model = quiet();
    model.apply_pod(Pod { ready: false, ..pod("a", "10.1.0.1", "r1") });
    let expected = Touched { canaries: set([key("shop", "web")]), ..Touched::default() };
    assert_eq!(model.take_touched(), expected);
}

#[test]
fn a_pod_that_begins_to_end_touches_its_service_and_address_and_not_its_inbound() {
    let mut model = quiet();
    model.apply_pod(Pod { terminating: true, ..pod("a", "10.1.0.1", "r1") });
    let expected = Touched {
        services: set([key("shop", "web")]),
        addresses: set(["10.1.0.1".parse().unwrap()]),
        canaries: set([key("shop", "web")]),
        ending: true,
        ..Touched::default()
    };
    assert_eq!(model.take_touched(), expected);
}

#[test]
fn a_policy_touches_the_inbound_of_its_pods_and_no_service_unless_plain_text_is_possible() {
    let mut model = quiet();
    let strict = json!({"target": {"kind": "Namespace"}, "mtls": "Strict"});
    model.apply_policy(key("shop", "p"), policy("p", 1, strict));
    let expected =
        Touched { inbound: set(["uid-a".into()]), policies: set([key("shop", "p")]), ..Touched::default() };
    assert_eq!(model.take_touched(), expected);
    let disabled = json!({"target": {"kind": "Namespace"}, "mtls": "Disabled"});
    model.apply_policy(key("shop", "p"), policy("p", 1, disabled));
    assert_eq!(model.take_touched().services, set([key("shop", "web")]));
}

#[test]
fn labels_of_a_namespace_touch_only_pods_whose_policies_name_them() {
    let mut model = quiet();
    let labelled = || Namespace { labels: [("env".into(), "dev".into())].into(), terminating: false };
    model.apply_namespace("dev".into(), labelled());
    assert!(model.take_touched().is_empty());
    let deny = json!({"target": {"kind": "Namespace"}, "access": {"deny": [{"from": [{"namespaceLabels": {"env": "dev"}}]}]}});
    model.apply_policy(key("shop", "p"), policy("p", 1, deny));
    model.take_touched();
    model.delete_namespace("dev");
    assert_eq!(model.take_touched(), Touched { inbound: set(["uid-a".into()]), ..Touched::default() });
}

#[test]
fn evidence_in_the_status_of_a_canary_touches_no_service() {
    let mut model = quiet();
    let status = json!({"approvedRevision": "r1", "evidenceSummary": "more"});
    model.apply_canary(key("shop", "web"), canary(status));
    let expected = Touched { canaries: set([key("shop", "web")]), ..Touched::default() };
    assert_eq!(model.take_touched(), expected);
    model.apply_canary(key("shop", "web"), canary(json!({"approvedRevision": "r1", "epoch": 2})));
    assert_eq!(model.take_touched().services, set([key("shop", "web")]));
}

#[test]
fn an_endpoint_that_comes_touches_its_pods_address_and_a_change_of_its_state_does_not() {
    let a = pod("a", "10.1.0.1", "r1");
    let mut model = quiet();
    let mut slice = model.slices[&key("shop", "web-1")].clone();
    slice.endpoints[0].ready = false;
    model.apply_slice(key("shop", "web-1"), slice.clone());
    assert!(model.take_touched().addresses.is_empty());
    slice.endpoints.clear();
    model.apply_slice(key("shop", "web-1"), slice.clone());
    assert_eq!(model.take_touched().addresses, set(["10.1.0.1".parse().unwrap()]));
    slice.endpoints.push(endpoint(&a, true));
    model.apply_slice(key("shop", "web-1"), slice.clone());
    assert_eq!(model.take_touched().addresses, set(["10.1.0.1".parse().unwrap()]));
    slice.ports[0].1 = 80;
    model.apply_slice(key("shop", "web-1"), slice);
    assert_eq!(model.take_touched().addresses, set(["10.1.0.1".parse().unwrap()]));
}

#[test]
fn what_a_service_declares_touches_the_addresses_of_its_pods() {
    let mut model = quiet();
    let mut service = model.services[&key("shop", "web")].clone();
    service.affinity_seconds = 10;
    model.apply_service(key("shop", "web"), service.clone());
    let pod = "10.1.0.1".parse().unwrap();
    assert!(!model.take_touched().addresses.contains(&pod));
    service.ports[0].app_protocol = Some("http".into());
    model.apply_service(key("shop", "web"), service);
    assert!(model.take_touched().addresses.contains(&pod));
    model.delete_service(&key("shop", "web"));
    assert!(model.take_touched().addresses.contains(&pod));
}

#[test]
fn a_route_touches_the_addresses_of_its_parents_before_and_after_and_whom_it_may_conflict_with() {
    let mut model = quiet();
    let (web, external) = ("10.96.0.1".parse().unwrap(), "203.0.113.1".parse().unwrap());
    let other = Service { cluster_ips: vec!["10.96.0.2".parse().unwrap()], ..Service::default() };
    model.apply_service(key("shop", "other"), other);
    model.apply_route(route("rival", "shop", "web", "web"));
    model.take_touched();
    let one = route("one", "shop", "web", "web");
    model.apply_route(one.clone());
    let routes = set([one.key(), route("rival", "shop", "web", "web").key()]);
    let expected = Touched { addresses: set([web, external]), routes: routes.clone(), ..Touched::default() };
    assert_eq!(model.take_touched(), expected, "and no endpoints");
    model.apply_route(one.clone());
    assert!(model.take_touched().is_empty(), "an identical route");
    model.apply_route(route("one", "shop", "other", "web"));
    let touched = model.take_touched();
    assert_eq!(touched.addresses, set([web, external, "10.96.0.2".parse().unwrap()]));
    assert_eq!(touched.routes, routes);
    model.delete_route(&one.key());
    assert_eq!(model.take_touched().addresses, set(["10.96.0.2".parse().unwrap()]));
}

#[test]
fn a_consumers_route_touches_the_addresses_of_its_parents_for_its_own_namespace_only() {
    let mut model = quiet();
    let ours = route("ours", "team", "web", "api");
    let ips = ["10.96.0.1", "203.0.113.1"].map(|ip| ip.parse().unwrap());
    let expected: HashSet<(IpAddr, Arc<str>)> = set(ips.map(|ip| (ip, "team".into())));
    model.apply_route(ours.clone());
    let touched = model.take_touched();
    assert_eq!((&touched.consumers, touched.addresses.len()), (&expected, 0));
    model.touch_routes_of(&key("shop", "api"));
    let touched = model.take_touched();
    assert_eq!((&touched.consumers, touched.addresses.len()), (&expected, 0), "its backend");
    model.delete_route(&ours.key());
    let touched = model.take_touched();
    assert_eq!((&touched.consumers, touched.addresses.len()), (&expected, 0));
}

#[test]
fn a_backend_touches_the_addresses_of_the_services_whose_routes_name_it() {
    let mut model = quiet();
    let one = route("one", "shop", "web", "api");
    model.apply_route(one.clone());
    model.take_touched();
    let web = "10.96.0.1".parse().unwrap();
    model.touch_routes_of(&key("shop", "api"));
    assert!(model.take_touched().addresses.contains(&web), "what a policy says about it");
    let api = Service { cluster_ips: vec!["10.96.0.2".parse().unwrap()], ..Service::default() };
    model.apply_service(key("shop", "api"), api);
    let touched = model.take_touched();
    assert!(touched.addresses.contains(&web) && touched.routes.contains(&one.key()));
    let a = pod("a", "10.1.0.1", "r1");
    let slice = Slice { service: "api".into(), ports: Vec::new(), endpoints: vec![endpoint(&a, true)] };
    model.apply_slice(key("shop", "api-1"), slice);
    let touched = model.take_touched();
    assert!(!touched.addresses.contains(&web) && touched.routes.is_empty(), "endpoints change no route");
    model.delete_service(&key("shop", "api"));
    assert!(model.take_touched().addresses.contains(&web));
}

#[test]
fn the_zone_of_a_node_touches_what_its_pods_are_told() {
    let mut model = quiet();
    model.apply_node("node-a".into(), "zone-a".into());
    assert_eq!(model.take_touched(), Touched { inbound: set(["uid-a".into()]), ..Touched::default() });
    assert_eq!((model.zone_of("node-a"), model.zone_of("node-b")), ("zone-a", ""));
    model.apply_node("node-a".into(), "zone-a".into());
    model.apply_node("node-b".into(), "zone-b".into());
    assert!(model.take_touched().is_empty());
    model.delete_node("node-a");
    assert_eq!(model.take_touched().inbound, set(["uid-a".into()]));
}

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    fn index(&mut self, below: u64) -> usize {
        usize::try_from(self.roll(below)).unwrap()
    }

    fn coin(&mut self) -> bool {
        self.roll(2) == 0
    }
}

fn random_pod(dice: &mut Dice) -> Pod {
    let (name, revision) = (dice.roll(3), format!("r{}", dice.roll(2)));
    let made = pod(&format!("p{name}"), &format!("10.1.0.{}", dice.roll(4)), &revision);
    Pod {
        ready_unix: i64::try_from(dice.roll(2)).unwrap(),
        injected: dice.coin(),
        terminating: dice.roll(4) == 0,
        finished: dice.roll(5) == 0,
        gated: dice.coin(),
        workload: if dice.roll(4) == 0 { None } else { made.workload.clone() },
        labels: if dice.roll(4) == 0 { Box::default() } else { made.labels.clone() },
        ..made
    }
}

fn random_policy(dice: &mut Dice) -> serde_json::Value {
    let target = match dice.coin() {
        true => json!({"kind": "Namespace"}),
        false => json!({"kind": "Service", "name": format!("web{}", dice.roll(2))}),
    };
    match dice.roll(6) {
        0 => json!({"target": target, "mtls": "Disabled"}),
        1 => json!({"target": target, "mtls": "Strict", "mode": "Shadow"}),
        2 => json!({"target": target, "access": {"allow": []}}),
        3 => json!({"target": target, "access": {"deny": [{"from": [{"cidr": "10.0.0.0/99"}]}]}}),
        4 => {
            json!({"target": target, "timeout": {"request": "1s"}, "breaker": {"consecutiveFailures": 1 + dice.roll(3)}})
        }
        _ => {
            json!({"target": target, "access": {"deny": [{"from": [{"namespaceLabels": {"env": "dev"}}]}]}})
        }
    }
}

fn random_service(dice: &mut Dice) -> Service {
    let mut service = shop(&[]).services[&key("shop", "web")].clone();
    service.cluster_ips = vec![format!("10.96.0.{}", dice.roll(2)).parse().unwrap()];
    service.other_ips = vec![format!("10.1.0.{}", dice.roll(4)).parse().unwrap()];
    service.created = i64::try_from(dice.roll(3)).unwrap();
    service.local_only = dice.roll(4) == 0;
    service.ports[0].app_protocol = [None, Some("http"), Some("tcp")][dice.index(3)].map(Into::into);
    if dice.coin() {
        service.selector.clear();
    }
    service
}

fn random_route(dice: &mut Dice) -> RouteObject {
    let [name, parent, backend] = [0, 1, 2].map(|_| format!("web{}", dice.roll(2)));
    let made = route(&name, ["shop", "team"][dice.index(2)], &parent, &backend);
    RouteObject {
        kind: [RouteKind::Http, RouteKind::Grpc][dice.index(2)],
        created: i64::try_from(dice.roll(3)).unwrap(),
        ..made
    }
}

fn random_event(model: &mut Model, dice: &mut Dice) {
    let number = dice.roll(2);
    let (service, object) = (key("shop", &format!("web{number}")), key("shop", &format!("o{number}")));
    match dice.roll(15) {
        0..=2 => model.apply_pod(random_pod(dice)),
        3 => model.delete_pod(&format!("uid-p{}", dice.roll(3))),
        4 => model.apply_service(service, random_service(dice)),
        5 => model.delete_service(&service),
        6 => {
            let pods = [random_pod(dice), random_pod(dice)];
            let named = dice.coin();
            let listed = |pod: &Pod| {
                let made = endpoint(pod, true);
                Endpoint { pod_uid: made.pod_uid.clone().filter(|_| named), ..made }
            };
            let endpoints = pods.iter().map(listed).collect();
            let ports = vec![("http".into(), [80, 8080][dice.index(2)])];
            model.apply_slice(object, Slice { service: Arc::clone(&service.1), ports, endpoints });
        }
        7 => model.delete_slice(&object),
        8 => {
            let age = u32::try_from(dice.roll(9)).unwrap();
            model.apply_policy(object.clone(), policy(&object.1, age, random_policy(dice)));
        }
        9 => model.delete_policy(&object),
        10 if dice.coin() => model.delete_canary(&object),
        10 => {
            let status = json!({"approvedRevision": "r0", "canaryRevision": "r1", "weight": dice.roll(3), "phase": "Progressing"});
            model.apply_canary(object, canary(status));
        }
        11..=12 => model.apply_route(random_route(dice)),
        13 => model.delete_route(&random_route(dice).key()),
        _ => {
            let labels = if dice.coin() { [("env".into(), "dev".into())].into() } else { Default::default() };
            model.apply_namespace(service.1, Namespace { labels, terminating: false });
        }
    }
}

/// A variant of a resource, and its version and what it was made of, if there is one.
type Made = ((ResourceName, Variant), Option<(String, Dependency)>);

/// Version and dependency of every resource that this small world can have.
fn compiled(model: &Model) -> Vec<Made> {
    use ResourceType::{Access, Destination, Endpoints, Inbound, Mtls, Route, Workload};
    let enforced =
        (0..3).flat_map(|n| [Inbound, Workload, Mtls, Access].map(|kind| (kind, format!("uid-p{n}"))));
    let services = (0..2).map(|n| format!("10.96.0.{n}:80"));
    let pods = (0..4).flat_map(|n| [80, 81, 8080].map(|port| format!("10.1.0.{n}:{port}")));
    let addresses =
        services.chain(pods).flat_map(|name| [Destination, Route].map(|kind| (kind, name.clone())));
    let endpoints = ["shop/web0:80", "shop/web1:80", "shop/web1:80/ipv6", "shop/web0:81"];
    let endpoints = endpoints.map(|name| (Endpoints, name.to_owned()));
    let mut all = Vec::new();
    for (kind, name) in enforced.chain(addresses).chain(endpoints) {
        let name = ResourceName { r#type: kind.into(), cluster: String::new(), name };
        for variant in [Variant::Any, Variant::Node("node-a".into()), Variant::Namespace("team".into())] {
            let made = model.compile(&name, &variant).map(|made| (made.resource.version, made.depends));
            all.push(((name.clone(), variant), made));
        }
    }
    all
}

fn statuses(model: &Model) -> Vec<(RouteKey, Vec<ParentStatus>)> {
    let keys = model.routes().map(RouteObject::key);
    keys.map(|key| (key.clone(), model.route_status(&key))).collect()
}

#[test]
fn whatever_differs_after_an_event_was_touched_by_it() {
    let mut dice = Dice(7);
    let mut model = Model::default();
    let (mut before, mut said) = (compiled(&model), statuses(&model));
    for round in 0..3000 {
        random_event(&mut model, &mut dice);
        let touched = model.take_touched();
        let (after, says) = (compiled(&model), statuses(&model));
        for status in says.iter().filter(|status| !said.contains(status)) {
            assert!(touched.routes.contains(&status.0), "round {round}: {status:?} {touched:?}");
        }
        said = says;
        for ((name, old), (_, new)) in before.iter().zip(&after) {
            if old == new {
                continue;
            }
            for (_, depends) in [old, new].into_iter().flatten() {
                let is_covered = touched.covers(depends, &name.1);
                assert!(is_covered, "round {round}: {name:?}: {old:?} {new:?} {touched:?}");
            }
        }
        before = after;
    }
}
